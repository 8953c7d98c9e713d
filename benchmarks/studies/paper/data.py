"""The images of this study: CIFAR-10, ImageNet, or CIFAR-10 (JPEG), split by a seed. Nothing is downloaded."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from benchmarks.problems import decoded
from benchmarks.studies.common.images import parts
from benchmarks.studies.paper.networks import Network, Transform


@dataclass(frozen=True)
class Counts:
    """How many images of each kind; of the test images, ``validation`` are tuned on in the second protocol."""

    train: int
    held_out: int
    validation: int
    test: int
    curvature: int  # at most; snapshots of G after every so many:
    every: int

    def at_most(self, n: int) -> Counts:
        """Return smaller counts, to try things out."""
        names = ("train", "held_out", "test", "curvature")
        smaller = {name: min(getattr(self, name), n) for name in names}
        validation = min(self.validation, smaller["test"] // 2)
        every = max(1, min(self.every, smaller["curvature"] // 4))
        return replace(self, **smaller, validation=validation, every=every)


@dataclass(frozen=True)
class Source:
    """Training and test pictures, before any transform; ``n_total`` images the network was fitted to."""

    images: str
    train: Dataset
    test: Dataset
    n_total: int


@dataclass(frozen=True)
class Sets:
    """Inputs with labels. ``validation`` are positions among the test images, ``scored`` the others."""

    train: Dataset
    held_out: Dataset
    test: Dataset
    validation: torch.Tensor
    scored: torch.Tensor


class Pictures(Dataset):
    """Pixels (N, height, width, 3), uint8, with labels."""

    def __init__(self, pixels: Any, labels: Sequence[Any]) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.fromarray(self.pixels[index]), int(self.labels[index])


class Transformed(Dataset):
    """Chosen pictures as inputs of a network; random transforms draw the same at every pass."""

    def __init__(self, base: Any, transform: Transform, chosen: torch.Tensor) -> None:
        self.base, self.transform, self.chosen = base, transform, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        at = int(self.chosen[index])
        picture, label = self.base[at]
        with drawn_by(at):
            return self.transform(picture), label


@contextmanager
def drawn_by(seed: int) -> Iterator[None]:
    """Let the generators of torch and Python start from a seed, and put them back."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


def split(source: Source, transforms: tuple[Transform, Transform], counts: Counts, seed: int) -> Sets:
    """Draw the images that ELLA is fitted to, those held out of the training images, and test images."""
    as_input, cropped = transforms
    held_out, train = parts(len(source.train), seed, counts.held_out, counts.train)
    validation, scored = parts(len(source.test), seed, counts.validation, counts.test - counts.validation)
    return Sets(
        Transformed(source.train, as_input, train),
        Transformed(source.train, cropped, held_out),
        Transformed(source.test, as_input, torch.cat([validation, scored])),
        torch.arange(len(validation)),
        torch.arange(len(validation), counts.test),
    )


def cifar10(root: Path) -> Source:
    """Read torchvision's CIFAR-10 under a root."""
    from torchvision.datasets import CIFAR10

    if not (root / CIFAR10.base_folder).is_dir():
        raise ValueError(
            f"--cifar-root {root} must hold the folder {CIFAR10.base_folder} (the python version of CIFAR-10); it holds "
            f"{listing(root)}. {'Pass its parent. ' if root.name == CIFAR10.base_folder else ''}"
            "torchvision.datasets.CIFAR10(ROOT, download=True) makes it."
        )
    try:
        train, test = (CIFAR10(str(root), train=train, download=False) for train in (True, False))
    except RuntimeError as error:
        raise ValueError(
            f"{root / CIFAR10.base_folder} is incomplete or damaged, by torchvision's checksums. Delete it, and get it again "
            "with torchvision.datasets.CIFAR10(ROOT, download=True)."
        ) from error
    return Source(
        "CIFAR-10", Pictures(train.data, train.targets), Pictures(test.data, test.targets), len(train)
    )


def imagenet(root: Path, network: Network) -> Source:
    """Read ImageNet's train and val folders, a folder a class."""
    from torchvision.datasets import ImageFolder

    found = []
    for name in ("train", "val"):
        folder = root / name
        if not folder.is_dir():
            raise ValueError(
                f"--imagenet-root {root} must hold the folders train and val, each with a folder a class; it holds "
                f"{listing(root)}."
            )
        try:
            found.append(ImageFolder(str(folder)))
        except FileNotFoundError as error:
            raise ValueError(
                f"{folder} must hold a folder of images for each class ({error}). Sort the images into folders named by "
                "their WordNet identifiers."
            ) from error
    train, val = found
    if not len(train.classes) == len(val.classes) == network.n_outputs or train.classes != val.classes:
        raise ValueError(
            f"{network.name} tells {network.n_outputs} classes apart; {root} has {len(train.classes)} class folders in train and "
            f"{len(val.classes)} in val, {len({*train.classes} & {*val.classes})} with the same name. Both need all classes."
        )
    return Source("ImageNet", train, val, len(train))


def cifar10_jpeg(folder: Path) -> Source:
    """Read CIFAR-10 (JPEG): 10 000 of the 50 000 training images that the network was fitted to, and the test images."""
    files = [folder / f"cifar10_jpeg_{name}.npz" for name in ("train10k", "test")]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(
            f"--data {folder} must hold {' and '.join(path.name for path in files)} (see benchmarks/README.md); missing: "
            f"{', '.join(missing)}. With the original images, pass --cifar-root instead."
        )
    train, test = (Pictures(*decoded(path)) for path in files)
    return Source("CIFAR-10 (JPEG)", train, test, 50_000)


def listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return (
        ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        if names
        else "nothing"
    )
