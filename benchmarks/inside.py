"""The steps of a fit, which no user calls one by one. No other module of the benchmarks looks inside the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ella.data.landmarks import Landmarks
from laplace_ella.fitting.curvature import Curvature, Part
from laplace_ella.fitting.curvature import curvature as curvature_of_features
from laplace_ella.network.functional import FunctionalModel
from laplace_ella.network.gradients import asdl_rows, backpack_rows, gradient_rows
from laplace_ella.network.safety import safely
from laplace_ella.nystrom.jacobian import row_source
from laplace_ella.nystrom.rows import inner_products
from laplace_ella.posterior.likelihoods import LIKELIHOODS
from laplace_ella.posterior.links import quasi_normal

__all__ = [
    "ENGINES",
    "curvature",
    "fit_curvature",
    "forget_points",
    "inner_products",
    "landmark_rows",
    "mode",
    "rows_by",
    "scan",
]

ENGINES = {"torch.func": gradient_rows, "BackPACK": backpack_rows, "ASDL": asdl_rows}


def rows_by(engine: str, model: nn.Module, x: Tensor, outputs: Tensor) -> Callable[[], Any]:
    """Return what computes the gradients of one output (B,) of each input, by an engine."""
    function = FunctionalModel(model)

    def compute() -> Any:
        return safely(model, lambda: ENGINES[engine](function, function.weights(), x, outputs))

    return compute


def landmark_rows(backend: Any, inputs: Iterable[Tensor], outputs: Tensor) -> Callable[[], Tensor]:
    """Return what computes the gradient rows (M, P) of landmarks, as a fit does."""
    source = row_source(backend.engine, Landmarks(list(inputs), outputs))

    def compute() -> Tensor:
        return safely(backend.model, lambda: source(list(range(len(outputs)))))

    return compute


def scan(backend: Any, x: Tensor) -> Tensor:
    """Run the network on a batch as the scan of the training data does."""
    return backend.engine.forward(x)


def mode(backend: Any, x: Tensor, rank: int) -> str:
    """Return "forward" or "reverse": how features of a batch are computed."""
    return backend.engine.mode(x, rank)


def curvature(backend: Any, phi: Tensor, f: Tensor) -> Tensor:
    """Return G (K, K) of a batch, from its features and outputs."""
    return curvature_of_features(LIKELIHOODS[backend.likelihood], phi, f)


def fit_curvature(la: Any, batches: Iterable[Any]) -> None:
    """Estimate G anew, along the directions that an estimator has."""
    backend, labels = la.backend, int(la.curvature == "mc")
    curvature_of = Curvature(backend.engine, LIKELIHOODS[backend.likelihood], la.basis, labels)
    la.H, n = torch.zeros_like(la.H), 0
    for xb, _ in batches:
        la.H += curvature_of(Part("a batch", torch.arange(n, n + len(xb)), xb))
        n += len(xb)


def forget_points() -> None:
    """Let go of the points of Monte-Carlo links, of which the latest eight sets stay."""
    quasi_normal.cache_clear()
