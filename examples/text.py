"""Sentences for a transformer of Hugging Face: batches are dictionaries, and foreign text is recognised, or not.

Which part of scikit-learn does a sentence describe? The sentences are those of its own documentation strings, read from
the installed package: seven classes, real prose, nothing to download. A small BERT is trained from a config on a few
hundred sentences a class, with a vocabulary of words made here. Its batches are mappings (``input_ids``,
``attention_mask``, ``labels``), as tokenizers and data collators of Hugging Face make them. Models of transformers get their entries
by name without a wrapper; ``Classifier`` below is one that makes the fit faster, by the shape of the mask. The rest is the one string.

What to look for: the network is sure and often wrong, since much can be said of several parts. Temperature and logit
scale, tuned on other sentences, repair most of that; temperature scaling does most of that alone. Sentences
from parts of scikit-learn that are no class, and from Python's standard library, are told from test sentences only to some extent, by
any score: the 3 500 sentences that it was trained on make no encoder of English. The same wrapper takes a pre-trained one.

transformers comes with the extra ``examples``.

    python examples/text.py [--quick] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import sklearn
import torch
from laplace import Laplace
from ood import COLORS, LINK, accuracy_of_kept, auroc, tune
from quickstart import Sizes, calibration, entropy, expected_calibration_error, nll
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import laplace_ella  # noqa: F401 (makes hessian_structure="ella" known)

CLASSES = (
    "cluster",
    "decomposition",
    "ensemble",
    "linear_model",
    "metrics",
    "model_selection",
    "preprocessing",
)
UNSEEN = ("gaussian_process", "manifold", "svm")
LIBRARY = ("email", "http", "logging", "urllib")
# Sentences of all classes together.
SIZES = Sizes(train=3500, validation=600, test=800, unseen=400, epochs=10, landmarks=300)
QUICK = Sizes(train=500, validation=200, test=100, unseen=40, epochs=12, landmarks=50)
N_WORDS, LENGTH = 2000, 32
PADDING, UNKNOWN, START = 0, 1, 2  # the first entries of the vocabulary


@dataclass(frozen=True)
class Text:
    """Tokenised sentences."""

    input_ids: Tensor  # (n, LENGTH)
    attention_mask: Tensor  # (n, LENGTH)
    labels: Tensor  # (n,)

    def batches(
        self, size: int = 50, generator: torch.Generator | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield mapping batches; shuffled, if there is a generator."""
        n = len(self.labels)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        for chosen in order.split(size):
            yield {name: values[chosen] for name, values in vars(self).items()}

    def loader(self) -> DataLoader:
        """Return a loader whose batches are the mappings."""
        return DataLoader(list(self.batches()), batch_size=None)


def sentences(folder: Path) -> set[str]:
    """Return the sentences of 6 to 40 words in the documentation strings of a package."""
    found = set()
    for path in sorted(folder.rglob("*.py")):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                prose = re.sub(r"\s+", " ", ast.get_docstring(node) or "")
                found |= set(re.split(r"(?<=[.!?]) (?=[A-Z])", prose))
    return {s for s in found if 6 <= len(s.split()) <= 40}


def read(folder: Path, packages: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """Return the sentences of packages, and which of them each comes from; those of several are left out."""
    of = [sentences(folder / name) for name in packages]
    counts = Counter(s for found in of for s in found)
    pairs = [(s, i) for i, found in enumerate(of) for s in sorted(found) if counts[s] == 1]
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[i][0] for i in order], [pairs[i][1] for i in order]


def words(sentence: str) -> list[str]:
    """Split into words, numbers as one word and punctuation away."""
    return [re.sub(r"\d+", "0", w) for w in re.findall(r"[a-z_]+|\d+", sentence.lower())]


def tokenise(texts: list[str], labels: list[int], vocabulary: dict[str, int]) -> Text:
    """Turn sentences into ids of words, padded to one length."""
    ids = torch.full((len(texts), LENGTH), PADDING)
    for row, sentence in zip(ids, texts):
        known = [START, *(vocabulary.get(w, UNKNOWN) for w in words(sentence))][:LENGTH]
        row[: len(known)] = torch.tensor(known)
    return Text(ids, (ids != PADDING).long(), torch.tensor(labels))


def load(sizes: Sizes) -> tuple[int, dict[str, Text]]:
    """Return the size of the vocabulary, and the parts of the data."""
    folder = Path(sklearn.__file__).parent
    texts, labels = read(folder, CLASSES)
    counts = Counter(w for s in texts[: sizes.train] for w in words(s))
    vocabulary = {w: i + 3 for i, (w, _) in enumerate(counts.most_common(N_WORDS))}
    parts, start = {}, 0
    for name in ("train", "validation", "test"):
        end = start + getattr(sizes, name)
        parts[name] = tokenise(texts[start:end], labels[start:end], vocabulary)
        start = end
    others = {
        "other parts": read(folder, UNSEEN)[0],
        "Python": read(Path(sysconfig.get_path("stdlib")), LIBRARY)[0],
    }
    for name, foreign in others.items():
        foreign = foreign[: sizes.unseen]
        parts[name] = tokenise(foreign, [0] * len(foreign), vocabulary)
    return len(vocabulary) + 3, parts


class Classifier(nn.Module):
    """A model of transformers that takes a mapping batch whole and returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return logits (B, classes)."""
        # Of a mask (B, L) transformers looks at the values, which stops vmap: it is given the shape of attention.
        mask = batch["attention_mask"][:, None, None, :].bool()
        return self.model(input_ids=batch["input_ids"], attention_mask=mask).logits


def train(n_words: int, text: Text, epochs: int) -> nn.Module:
    """Train a BERT of two layers from random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=n_words,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        num_labels=len(CLASSES),
    )
    model = Classifier(BertForSequenceClassification(config)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in text.batches(generator=generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), batch["labels"]).backward()
            optimizer.step()
    return model.eval()


def predicted(predict: Any, text: Text) -> Tensor:
    """Apply a function to batches, and join what it returns."""
    with torch.no_grad():
        return torch.cat([predict(batch) for batch in text.batches()])


def print_table(found: dict[str, dict[str, Tensor]], y: Tensor) -> None:
    """Print scores on test sentences, and AUROC of the entropy on foreign ones."""
    print(
        f"\n{len(y)} test sentences    {'NLL':>8}{'ECE':>8}{'accuracy':>10}{'other parts':>13}{'Python':>9}  (AUROC)"
    )
    for name, of in found.items():
        p = of["test"]
        aurocs = [auroc(entropy(p), entropy(of[k])) for k in ("other parts", "Python")]
        print(
            f"{name:21}{nll(p, y).mean():8.4f}{expected_calibration_error(p, y):8.4f}"
            f"{(p.argmax(1) == y).double().mean():10.4f}{aurocs[0]:13.3f}{aurocs[1]:9.3f}"
        )


def plot(found: dict[str, dict[str, Tensor]], y: Tensor) -> plt.Figure:
    """Draw calibration, the entropy of each kind of text, and accuracy where unsure answers are refused."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    left.plot([0, 1], [0, 1], color="black", ls=":", lw=1)
    for name, of in found.items():
        bins = [(c, a) for n, c, a in calibration(of["test"], y) if n >= 5]
        left.plot(*zip(*bins), "o-", ms=4, color=COLORS[name], label=name)
        right.plot(
            np.linspace(1, 0, len(y)),
            accuracy_of_kept(entropy(of["test"]), of["test"].argmax(1) == y),
            color=COLORS[name],
            label=name,
        )
    edges = np.linspace(0, np.log(len(CLASSES)), 25)
    for kind, color in (("test", "0.6"), ("other parts", "#dd8452"), ("Python", "#8172b3")):
        values = entropy(found["ELLA"][kind]).numpy()
        style = {"histtype": "step", "lw": 1.8} if kind != "test" else {"alpha": 0.6}
        middle.hist(values, edges, density=True, color=color, label=kind, **style)
    left.set(title="calibration", xlabel="confidence", ylabel="accuracy")
    middle.set(title="entropy of ELLA", xlabel="entropy, nats", ylabel="density")
    right.set(title="refusing the least certain", xlabel="share refused", ylabel="accuracy on the others")
    right.set_xlim(0, 0.9)
    for ax in (left, middle, right):
        ax.legend(frameon=False, fontsize="small")
    return figure


def check(result: Any, found: dict[str, dict[str, Tensor]], y: Tensor) -> None:
    """Assert what must hold on any machine."""
    assert (found["MAP"]["test"].argmax(1) == y).double().mean() > 0.3, "chance is one in seven"
    scaled = result.baselines["temperature scaling"].score
    assert result.score <= scaled + 1e-3, "with no variance at all, ELLA is temperature scaling"
    losses = {name: float(nll(of["test"], y).mean()) for name, of in found.items()}
    assert losses["ELLA"] < losses["MAP"], "an over-confident network is repaired"


def main() -> None:
    """Read, train, swap one string, tune, compare, draw, check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sentences, for a test run")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures", help="where figures go"
    )
    args = parser.parse_args()
    sizes, start = QUICK if args.quick else SIZES, time.perf_counter()

    n_words, text = load(sizes)
    print(f"{n_words} words: {time.perf_counter() - start:.0f} s")
    model = train(n_words, text["train"], sizes.epochs)
    print(f"trained on {sizes.train} sentences: {time.perf_counter() - start:.0f} s")
    la = Laplace(model, "classification", "all", "ella", subsample_size=sizes.landmarks)
    la.fit(text["train"].loader())
    print(f"{la}\n{time.perf_counter() - start:.0f} s\n")
    result = tune(la, text["validation"].loader(), ["temperature", "logit_scale"])

    scale = result.baselines["temperature scaling"].parameters["logit_scale"]
    methods = {
        "MAP": lambda batch: model(batch).softmax(1),
        "temperature scaling": lambda batch: (model(batch) * scale).softmax(1),
        "ELLA": lambda batch: la(batch, **LINK),
    }
    kinds = ("test", "other parts", "Python")
    found = {name: {k: predicted(predict, text[k]) for k in kinds} for name, predict in methods.items()}
    print_table(found, text["test"].labels)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(found, text["test"].labels).savefig(args.out / "text.png", dpi=110)
    print(f"\nfigure: {os.path.relpath(args.out / 'text.png')}")
    check(result, found, text["test"].labels)
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
