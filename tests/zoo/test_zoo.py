"""Published architectures with random weights: which mode the backend chooses, and that it is right.

Deselected by default: ``make test-zoo``. With ZOO_TABLE=1 in the environment, what the run
found is written into docs/architectures.md.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build, loader, reference_features, targets
from models import ConvNet
from test_architectures import FEATURES, ROWS
from torch import Tensor, nn
from untouched import Untouched

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]  # the packages' own warnings

N_TRAIN, N_TEST, C, M, K = 5, 2, 3, 4, 3
PIXELS, STEPS, VOCABULARY = 32, 7, 31
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
BEGIN, END = "<!-- table: written by tests/zoo/test_zoo.py -->", "<!-- end of table -->"
HEADER = ["architecture", "package", "weights", "features", "landmark gradients", "note"]

# ------------------------------------------------------------------ inputs


def images(n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, 3, PIXELS, PIXELS, dtype=dtype)


def sentences(n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tokens and masks of sentences of different lengths, padded with token 0."""
    mask = (torch.arange(STEPS) < torch.randint(3, STEPS + 1, (n, 1))).long()
    return {"input_ids": torch.randint(1, VOCABULARY, (n, STEPS)) * mask, "attention_mask": mask}


# ------------------------------------------------------------------ models


class Keywords(nn.Module):
    """Hands the entries of a mapping, or a tensor of images, to a model of transformers by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self.model(pixel_values=x)
        return self.model(input_ids=x["input_ids"], attention_mask=x["attention_mask"])


def from_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("torchvision").models
        return getattr(models, name)(num_classes=C, **options)

    return make


def from_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=C, **options)


def from_transformers(
    name: str, task: str = "SequenceClassification", **options: Any
) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{name}Config")(num_labels=C, **options)
        return Keywords(getattr(transformers, f"{name}For{task}")(config))

    return make


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
make_bert = from_transformers("Bert", vocab_size=VOCABULARY, **SMALL)


def bert_with_lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    wrapped = make_bert()
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False
    )
    wrapped.model = peft.get_peft_model(wrapped.model, config)
    return wrapped


# ------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Case:
    """An architecture; ``note`` says what was made smaller than published."""

    name: str
    package: str
    make_model: Callable[[], nn.Module]
    make_input: Callable[[int, torch.dtype], Any] = images
    dtype: torch.dtype = torch.float64
    note: str = ""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make_model().to(self.dtype)
        with torch.no_grad():
            for p in model.parameters():  # layers that start at zero would hide those before them
                if p.requires_grad and not p.any():
                    p.normal_(std=0.1)
            if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
                for _ in range(10):
                    model.train()(self.make_input(8, self.dtype))
        return model.eval()


F32 = torch.float32
SMALL_NOTE = "2 layers, width 16"
make_small_vit = from_torchvision(
    "VisionTransformer",
    image_size=PIXELS,
    patch_size=16,
    num_layers=2,
    num_heads=2,
    hidden_dim=16,
    mlp_dim=24,
)
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": STEPS}
make_gpt2 = from_transformers("GPT2", **GPT2, pad_token_id=0, bos_token_id=1, eos_token_id=1)
make_distilbert = from_transformers(
    "DistilBert", vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=24
)
make_vit = from_transformers("ViT", "ImageClassification", image_size=PIXELS, patch_size=16, **SMALL)
LORA_NOTE = f"{SMALL_NOTE}; rank 2 on queries and values, trainable weights only"
CASES = [
    *(
        Case(name, "torchvision", from_torchvision(name))
        for name in ("resnet18", "densenet121", "mobilenet_v3_small", "efficientnet_b0")
    ),
    Case("convnext_tiny", "torchvision", from_torchvision("convnext_tiny"), dtype=F32),
    Case("vit_b_16", "torchvision", from_torchvision("vit_b_16", image_size=PIXELS), dtype=F32),
    Case("VisionTransformer", "torchvision", make_small_vit, note=SMALL_NOTE),
    Case("swin_t", "torchvision", from_torchvision("swin_t"), dtype=F32),
    Case("vit_tiny_patch16_224", "timm", from_timm("vit_tiny_patch16_224", img_size=PIXELS)),
    Case("resnet10t", "timm", from_timm("resnet10t")),
    Case("BERT", "transformers", make_bert, sentences, note=SMALL_NOTE),
    Case("GPT-2", "transformers", make_gpt2, sentences, note=SMALL_NOTE),
    Case("DistilBERT", "transformers", make_distilbert, sentences, note=SMALL_NOTE),
    Case("ViT", "transformers", make_vit, note=SMALL_NOTE),
    Case("BERT with LoRA", "peft", bert_with_lora, sentences, note=LORA_NOTE),
]


@pytest.fixture(scope="module")
def table() -> Iterator[list[list[str]]]:
    """Collect the rows of the table, and write them at the end if asked to."""
    lines: list[list[str]] = []
    yield lines
    if os.environ.get("ZOO_TABLE") == "1" and lines:
        write(lines)


def write(lines: list[list[str]]) -> None:
    rule = ["---", "---", "---:", "---", "---", "---"]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in [HEADER, rule, *lines])
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    versions = f"torch {torch.__version__}, {PIXELS} x {PIXELS} images, {C} classes."
    PAGE.write_text(f"{before}{BEGIN}\n{versions}\n\n{text}\n{END}{after}")


# ------------------------------------------------------------------ tests


def batches(x: Any) -> Any:
    y = targets("classification", N_TRAIN)
    return loader(x, y, batch_size=N_TRAIN) if isinstance(x, Tensor) else [{**x, "labels": y}]


def check_close(found: Tensor, expected: Tensor) -> None:
    """Compare relative to the largest entry, to the accuracy that deep networks keep of the dtype."""
    tolerance = 1e-3 if expected.dtype == torch.float32 else 1e-9
    assert expected.abs().max() > 0
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_zoo(case: Case, table: list[list[str]]) -> None:
    model = case.model()
    untouched = Untouched(model)
    data, x = batches(case.make_input(N_TRAIN, case.dtype)), case.make_input(N_TEST, case.dtype)
    la = build(model=model, subsample_size=M, n_eigenvalues=K)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", UserWarning)
        la.fit(data)
        phi, f = la.features(x)
        probs = la(x, link_approx="mc")
    untouched.check(case.name)
    assert probs.shape == (N_TEST, C)
    assert probs.isfinite().all()
    expected_phi, expected_f = reference_features(model, la.basis, x)
    check_close(f, expected_f)
    check_close(phi, expected_phi)
    support = la.backend.support(x)
    for part, fell_back in ((FEATURES, support.features != "forward"), (ROWS, support.gradients == "loop")):
        assert sum(part in str(w.message) for w in record) == fell_back
    n_weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    count = f"{n_weights:,}".replace(",", " ")
    table.append([case.name, case.package, count, support.features, support.gradients, case.note])


COMPILED = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, C)), (5,)),
    "cnn": (ConvNet, (2, 3, 3)),
}
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_features_are_those_of_plain_ones(name: str) -> None:
    make, shape = COMPILED[name]
    model = make().double().eval()
    data = batches(torch.randn(N_TRAIN, *shape, dtype=torch.float64))
    sizes = {"subsample_size": M, "n_eigenvalues": K}
    plain, compiled = (build(model=model, compile=flag, **sizes) for flag in (False, True))
    plain.fit(data)
    compiled.fit(data)
    for n in (1, N_TEST, N_TRAIN):  # other shapes are compiled anew
        x = torch.randn(n, *shape, dtype=torch.float64)
        for found, expected in zip(compiled.features(x), reference_features(model, compiled.basis, x)):
            check_close(found, expected)
        # The bases agree up to signs only, predictions do not depend on them.
        check_close(compiled(x, link_approx="probit"), plain(x, link_approx="probit"))
