"""A vision transformer by the same string, and how sure it is of images of which less and less is seen.

A transformer of 18 000 weights (class token, learned positions, nn.MultiheadAttention) reads scikit-learn's 8 x 8
digits as 16 patches of 2 x 2. Raw parameters and attention are what backends with rules for each layer trip over:
KFAC is tried first, and what it says is printed. ELLA asks for derivatives only, so that nothing in the
model has to change. One pass over the validation images then tunes temperature and logit scale.

What to look for: the more patches are hidden, the less accurate the network is, and the more over-confident. Temperature
scaling and ELLA, tuned on whole images, repair a part of that, and about the same part: neither knows what was
never seen. What ELLA buys here is that it runs at all, over all weights; use temperature scaling if that is all you need.

Data: digits (scikit-learn). Nothing is downloaded.

    python examples/vit.py [--quick] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
from laplace import Laplace
from ood import COLORS, LINK, tune
from quickstart import Sizes, expected_calibration_error, fit_weights, in_batches, nll
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_ella  # noqa: F401 (makes hessian_structure="ella" known)

SIZES = Sizes(train=1000, validation=400, test=397, epochs=60, landmarks=400)
QUICK = Sizes(train=500, validation=200, test=150, epochs=25, landmarks=80)
N_PATCHES = 16
HIDDEN = (0, 2, 4, 6, 8)


class Block(nn.Module):
    """Attention between tokens, then an MLP of each; both are added to what came in."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, n_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, L, width) to tokens."""
        normed = self.before_attention(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(self.before_mlp(tokens))


class VisionTransformer(nn.Module):
    """Classify images (B, 1, 8, 8) by their patches of 2 x 2."""

    def __init__(self, width: int = 32, n_heads: int = 4, depth: int = 2, n_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, N_PATCHES + 1, width))
        self.blocks = nn.Sequential(*(Block(width, n_heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), tokens], 1) + self.positions
        return self.head(self.blocks(tokens)[:, 0])


def load(sizes: Sizes) -> dict[str, tuple[Tensor, Tensor]]:
    """Split the digits by a seeded shuffle."""
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].float().reshape(-1, 1, 8, 8) / 8 - 1, y[order]
    counts = [sizes.train, sizes.validation, sizes.test]
    parts = [t[: sum(counts)].split(counts) for t in (x, y)]
    return dict(zip(("train", "validation", "test"), zip(*parts)))


def hide(x: Tensor, n: int) -> Tensor:
    """Paint n patches of each image in the middle grey, drawn by a seed: more of them include the fewer."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.rand(len(x), N_PATCHES, generator=generator).argsort(1).argsort(1) < n
    mask = hidden.reshape(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return x.masked_fill(mask, 0.0)


def try_kfac(model: nn.Module, loader: DataLoader) -> str:
    """Say what becomes of laplace-torch's KFAC over all weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron").fit(loader)
        except Exception as error:  # which one depends on its version
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"
    return "fitted"


def rows(methods: dict[str, Any], x: Tensor, y: Tensor) -> dict[str, list[tuple[float, float, float, float]]]:
    """Return (NLL, ECE, accuracy, confidence) of each method, for each number of hidden patches."""
    found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in methods}
    for n in HIDDEN:
        for name, predict in methods.items():
            p = in_batches(predict, hide(x, n))
            accuracy, confidence = (p.argmax(1) == y).double().mean(), p.max(1).values.mean()
            scores = nll(p, y).mean(), expected_calibration_error(p, y), accuracy, confidence
            found[name].append(tuple(float(s) for s in scores))
    return found


def print_table(found: dict[str, list[tuple[float, float, float, float]]]) -> None:
    """Print the NLL and the ECE of each method, one column for each number of hidden patches."""
    print(f"\n{'patches hidden':29}" + "".join(f"{n:>9}" for n in HIDDEN))
    for i, score in enumerate(("NLL", "ECE", "accuracy")):
        for name, values in found.items():
            print(f"{name:21}{score:8}" + "".join(f"{v[i]:9.3f}" for v in values))


def plot(found: dict[str, list[tuple[float, float, float, float]]], x: Tensor) -> plt.Figure:
    """Draw images, confidence and accuracy, NLL and ECE."""
    figure = plt.figure(figsize=(10, 5.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 2.6])
    for ax, (image, n) in zip(above.subplots(1, 10).flat, [(i, n) for i in (0, 1) for n in HIDDEN]):
        ax.imshow(hide(x, n)[image, 0], cmap="gray", vmin=-1, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.set_xlabel(f"{n} hidden", fontsize="small")
    left, middle, right = below.subplots(1, 3)
    for name, values in found.items():
        losses, errors, accuracies, confidences = zip(*values)
        left.plot(HIDDEN, confidences, "o-", ms=4, color=COLORS[name], label=f"confidence, {name}")
        middle.plot(HIDDEN, losses, "o-", ms=4, color=COLORS[name], label=name)
        right.plot(HIDDEN, errors, "o-", ms=4, color=COLORS[name], label=name)
    left.plot(HIDDEN, accuracies, "s--", ms=4, color="black", label="accuracy (ELLA)")
    left.set(xlabel="patches hidden, of 16", title="confidence and accuracy")
    middle.set(xlabel="patches hidden, of 16", title="NLL")
    right.set(xlabel="patches hidden, of 16", title="expected calibration error")
    for ax in (left, middle, right):
        ax.legend(frameon=False, fontsize="x-small")
    return figure


def check(la: Any, result: Any, found: dict[str, list[tuple[float, float, float, float]]]) -> None:
    """Assert what must hold on any machine."""
    assert found["MAP"][0][2] > 0.75, "the transformer reads digits"
    assert "class_token" in la.basis.directions, "all weights: raw parameters too"
    assert "blocks.0.attention.in_proj_weight" in la.basis.directions, "and attention"
    scaled = result.baselines["temperature scaling"].score
    assert result.score <= scaled + 1e-3, "with no variance at all, ELLA is temperature scaling"
    assert found["ELLA"][-1][0] < found["MAP"][-1][0], "with half of the image hidden, ELLA beats MAP"


def main() -> None:
    """Train, try KFAC, swap one string, tune, hide patches, draw, check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and epochs, for a test run")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures", help="where figures go"
    )
    args = parser.parse_args()
    sizes, start = QUICK if args.quick else SIZES, time.perf_counter()

    data = load(sizes)
    torch.manual_seed(0)
    model = fit_weights(VisionTransformer(), *data["train"], sizes.epochs, batch=50, rate=2e-3)
    train_loader, val_loader = (
        DataLoader(TensorDataset(*data[k]), batch_size=100) for k in ("train", "validation")
    )
    n_weights = sum(p.numel() for p in model.parameters())
    print(f"transformer of {n_weights} weights trained: {time.perf_counter() - start:.0f} s")
    print(f"KFAC over all weights: {try_kfac(model, train_loader)}")

    la = Laplace(
        model,
        "classification",
        "all",
        "ella",
        subsample_size=sizes.landmarks,
        n_eigenvalues=sizes.landmarks // 8,
    )
    la.fit(train_loader)
    print(f"ELLA: {la.backend.support(data['test'][0][:2])}, {time.perf_counter() - start:.0f} s\n")
    result = tune(la, val_loader, ["temperature", "logit_scale"])

    scale = result.baselines["temperature scaling"].parameters["logit_scale"]
    methods = {
        "MAP": lambda x: model(x).softmax(1),
        "temperature scaling": lambda x: (model(x) * scale).softmax(1),
        "ELLA": lambda x: la(x, **LINK),
    }
    found = rows(methods, *data["test"])
    print_table(found)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(found, data["test"][0]).savefig(args.out / "vit.png", dpi=110)
    print(f"\nfigure: {os.path.relpath(args.out / 'vit.png')}")
    check(la, result, found)
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
