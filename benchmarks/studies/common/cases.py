"""Networks with their images, for the studies of quality and of shift, and the options that both have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.environment import environment
from benchmarks.networks import SmallCNN, SmallViT, mnist_cnn
from benchmarks.problems import network
from benchmarks.studies.common.baselines import N_SAMPLES
from benchmarks.studies.common.ella import Size
from benchmarks.studies.common.images import Counts, Data, cifar_data, fashion_data, mnist_data
from benchmarks.studies.common.training import train

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Case:
    """A network with its images."""

    network: str
    images: str
    data: Callable[[Counts, int, Path, Any], Data]
    counts: Counts
    build: Callable[[], nn.Module] | None = None  # None: the published ResNet-20, which --data holds
    epochs: int = 0  # 0: the weights are published
    rate: float = 0.0
    size: Size = field(default_factory=Size)


FASHION = Counts(train=30_000)
CASES = {
    "fashion-cnn": Case("strided CNN", "Fashion-MNIST", fashion_data, FASHION, SmallCNN, 5, 4e-3),
    "fashion-vit": Case(
        "small ViT", "Fashion-MNIST", fashion_data, replace(FASHION, test=2000, ood=500), SmallViT, 4, 2e-3
    ),
    "mnist-cnn": Case(
        "CNN, published weights",
        "MNIST",
        mnist_data,
        Counts(train=2000, validation=1000, test=1000, ood=250),
        mnist_cnn,
    ),
    "cifar10-jpeg": Case(
        "ResNet-20, published weights",
        "CIFAR-10 (JPEG)",
        cifar_data,
        Counts(train=10_000, test=2500, ood=500),
    ),
}


def quick(case: Case) -> Case:
    return replace(
        case,
        counts=Counts(train=1000, validation=200, test=200, ood=50),
        size=Size(subsample_size=40, n_eigenvalues=5, curvature_size=100),
    )


def prepared(case: Case, data: Data, seed: int, args: argparse.Namespace) -> nn.Module:
    """Return the network in evaluation mode, trained if its weights are not published."""
    if case.build is None:
        return network("resnet20", args.data, args.device)
    if not case.epochs:
        return case.build().to(args.device)
    torch.manual_seed(seed)
    return train(case.build().to(args.device), *data.train, case.epochs, seed, case.rate)


def about(name: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Return what was run, on what."""
    weights = "trained here" if case.epochs else "published"
    return {
        "case": name,
        "environment": {**environment(args), "weights": weights, "images": case.images},
        "network": case.network,
        "parameters": n_parameters(case),
        "counts": asdict(case.counts),
        "epochs": case.epochs,
        "ella": asdict(case.size),
        "samples": N_SAMPLES,
        "seeds": [],
    }


def n_parameters(case: Case) -> int:
    model = case.build() if case.build else network("resnet20", None, torch.device("cpu"))
    return sum(p.numel() for p in model.parameters())


def parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Add the options that both studies have, and read and check them."""
    parser.add_argument("--data", type=Path, help="folder with cifar10_resnet20.pt, cifar10_jpeg_*.npz")
    parser.add_argument(
        "--fashion", type=Path, default=DEBIAN, help="Fashion-MNIST: IDX files, or torchvision's root"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--seeds", type=int, help="how many; default 3, or 1 with --quick")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, help="of one case; default: in results/, or nothing with --quick")
    args = parser.parse_args(arguments)
    if args.out is not None and args.case == "all":
        parser.error("--out names the file of one case; with --case all, leave it out")
    if args.data is None and args.case in ("cifar10-jpeg", "all"):
        parser.error("cifar10-jpeg needs --data; benchmarks/README.md says what the folder holds")
    args.seeds = args.seeds or (1 if args.quick else 3)
    return args
