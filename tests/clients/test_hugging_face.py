"""Models, trainers and adapters of Hugging Face, unwrapped, with random weights of tiny sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import C, assert_same, reference_features
from torch import nn

from laplace_ella import Laplace

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]  # the packages' own

WORDS, LENGTH, N_TRAIN, N_VAL = 31, 7, 20, 60
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LABELS = {"SequenceClassification": (), "TokenClassification": (LENGTH,)}


def bert(task="SequenceClassification"):
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=WORDS, num_labels=C, **SIZES)
    return getattr(transformers, f"BertFor{task}")(config).eval()


def rows(n, task="SequenceClassification", seed=0):
    """Padded sentences, as a tokenizer makes them, and labels; those of padding are ignored."""
    g = torch.Generator().manual_seed(seed)
    mask = (torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (n, 1), generator=g)).long()
    ids = torch.randint(1, WORDS, (n, LENGTH), generator=g) * mask
    labels = torch.randint(C, (n, *LABELS[task]), generator=g)
    if labels.ndim == 2:
        labels[mask == 0] = -100
    return [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels)]


def collate(batch):
    return transformers.BatchEncoding({k: torch.stack([row[k] for row in batch]) for k in batch[0]})


def inputs_of(batch):
    return transformers.BatchEncoding({k: v for k, v in batch.items() if k != "labels"})


class ByHand(nn.Module):
    """The wrapper that was needed: takes the mapping whole."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def fitted(model, data, **options):
    la = Laplace(model, "classification", "all", "ella", subsample_size=5, n_eigenvalues=3, **options)
    la.fit(data)
    return la


def with_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False
    )
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("kind", ["bert", "lora", "tokens"])
def test_an_unwrapped_model_is_one_that_was_wrapped_by_hand(kind):
    task = "TokenClassification" if kind == "tokens" else "SequenceClassification"
    model = with_lora(bert()) if kind == "lora" else bert(task)
    data, x = [collate(rows(N_TRAIN, task))], inputs_of(collate(rows(3, task, seed=1)))
    la, by_hand = fitted(model, data), fitted(ByHand(copy.deepcopy(model)), data)
    assert la(x).shape == ((3 * LENGTH, C) if kind == "tokens" else (3, C))
    torch.testing.assert_close(la(x), by_hand(x))
    assert la.n_predictions == (data[0]["labels"] != -100).sum()
    phi, f = la.features(x)
    expected = reference_features(by_hand.model, by_hand.basis, x)
    torch.testing.assert_close(f, expected[1].reshape(f.shape))
    # Bases agree up to signs.
    torch.testing.assert_close(phi.abs(), expected[0].abs().reshape(phi.shape), rtol=1e-3, atol=1e-4)


def as_float32(module, args):
    return tuple(x.float() for x in args)


def trained(model, tmp_path, **options):
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    data = {"train_dataset": rows(N_TRAIN), "eval_dataset": rows(N_VAL, seed=2), "data_collator": collate}
    trainer = transformers.Trainer(model, arguments, **data)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["float32", "lora in bf16", "autocast"])
def test_loaders_of_a_trainer(kind, tmp_path):
    model = bert()
    if kind == "lora in bf16":
        model = with_lora(model.to(torch.bfloat16))
        model.base_model.model.classifier.float().register_forward_pre_hook(as_float32)
        assert model.base_model.model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    trainer = trained(model, tmp_path, bf16=kind == "autocast")
    if kind == "autocast":
        model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    la = fitted(model, trainer.get_train_dataloader())
    result = la.optimize_hyperparameters(trainer.get_eval_dataloader(), "auto")
    assert la.n_data == N_TRAIN
    assert result.chosen
    x = inputs_of(collate(rows(4, seed=3)))
    assert la(x).isfinite().all()
    assert la.features(x)[1].dtype == torch.float32
    la.save(tmp_path / "posterior")
    new = type(la).load(tmp_path / "posterior", model)
    assert_same(new(x), la(x))
    assert_same(la.as_module()(**x), la(x))


class FloatHead(nn.Module):
    """A frozen body in bf16, a head in float32."""

    def __init__(self):
        super().__init__()
        self.body = bert().bert.to(torch.bfloat16).requires_grad_(False)
        self.head = nn.Linear(16, C)

    def forward(self, input_ids, attention_mask=None, labels=None):
        h = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        return self.head(h.float())


def test_a_float32_head_on_a_bf16_body():
    x = inputs_of(collate(rows(3, seed=1)))
    la = fitted(FloatHead(), [collate(rows(N_TRAIN))])
    assert la.features(x)[0].dtype == torch.float32
    assert {v.dtype for v in la.basis.directions.values()} == {torch.float32}
    assert la(x).isfinite().all()
