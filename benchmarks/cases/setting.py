"""What several cases share: names and batches of the problems, and inputs on the device."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import laplace
from torch import Tensor

from benchmarks.measure import loader
from benchmarks.methods import ours
from benchmarks.problems import network, samples

Rows = list[dict[str, Any]]
Part = Callable[[argparse.Namespace], Rows]

TITLES = {
    "resnet20": "ResNet-20",
    "vit": "ViT",
    "mlp": "MLP",
    "tiny": "tiny MLP",
    "large-mlp": "MLP of 10 M weights",
    "bert": "text encoder",
    "tagger": "tagger",
    "resnet18": "ResNet-18",
    "resnet18-64": "ResNet-18 at 64",
    "resnet50": "ResNet-50",
    "resnet50-64": "ResNet-50 at 64",
    "vit_b_16": "ViT-B/16",
    "vit_b_16-64": "ViT-B/16 at 64",
}
# Small enough that a fit or a few rounds take seconds.
BATCHES = {"resnet20": 50, "vit": 16, "mlp": 50}


def repeats(args: argparse.Namespace, quick: int, full: int) -> int:
    return quick if args.quick else full


def on_device(name: str, n: int, args: argparse.Namespace, n_outputs: int = 10) -> tuple[Tensor, Tensor]:
    x, y = samples(name, n, args.data, n_outputs)
    return x.to(args.device), y.to(args.device)


def has_host() -> bool:
    if not hasattr(laplace, "ELLA"):
        print(f"laplace-torch {version('laplace-torch')} has no ELLA: comparison skipped")
    return hasattr(laplace, "ELLA")


def tuned_problem(args: argparse.Namespace, n_validation: int) -> tuple[Any, list[Any]]:
    """Return an estimator fitted to 200 images, and validation batches of 50."""
    model = network("resnet20", args.data, args.device)
    x, y = on_device("resnet20", 200 + n_validation, args)
    la = ours(model, subsample_size=50, n_eigenvalues=20)
    la.fit(loader(x[:200], y[:200], 50))
    return la, list(loader(x[200:], y[200:], 50))


def is_cuda(args: argparse.Namespace) -> bool:
    return args.device.type == "cuda"
