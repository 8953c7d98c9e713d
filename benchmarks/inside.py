"""The steps of a fit, which no user calls one by one. No other module of the benchmarks looks inside the package."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ella.data.landmarks import Landmarks
from laplace_ella.data.progress import no_progress
from laplace_ella.fitting.curvature import Curvature, Part
from laplace_ella.fitting.curvature import curvature as curvature_of_features
from laplace_ella.network.functional import FunctionalModel
from laplace_ella.network.gradients import asdl_rows, backpack_rows, gradient_rows
from laplace_ella.network.memory import Chunks
from laplace_ella.network.safety import safely
from laplace_ella.nystrom.basis import NystromBasis
from laplace_ella.nystrom.gram import choose_rows
from laplace_ella.nystrom.jacobian import row_source
from laplace_ella.nystrom.kernels import kernel_way, kernels_of_layers
from laplace_ella.nystrom.rows import inner_products
from laplace_ella.posterior.likelihoods import LIKELIHOODS
from laplace_ella.posterior.links import quasi_normal
from laplace_ella.posterior.residual import kernels_from_rows

__all__ = [
    "ENGINES",
    "chunk_bytes",
    "chunks",
    "curvature",
    "features_in_chunks",
    "fit_curvature",
    "forget_points",
    "inner_products",
    "kernels",
    "landmark_gram",
    "landmark_rows",
    "mode",
    "predicted",
    "predicted_crossover",
    "random_basis",
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
    """Return what computes the gradient rows (M, P) of landmarks, as a fit does that keeps rows."""
    source = row_source(backend.engine, Landmarks(list(inputs), outputs), by_layer=False)

    def compute() -> Tensor:
        return safely(backend.model, lambda: source(list(range(len(outputs)))).values)

    return compute


def landmark_gram(
    backend: Any, inputs: Iterable[Tensor], outputs: Tensor, by_layer: bool = True
) -> Callable[[], Tensor]:
    """Return what computes the Gram matrix (M, M) of landmarks, as a fit does, or from rows in any case."""
    landmarks, engine = Landmarks(list(inputs), outputs), backend.engine
    source = safely(backend.model, lambda: row_source(engine, landmarks, by_layer=by_layer))
    rows = choose_rows(source, engine.budget())
    return lambda: safely(backend.model, lambda: rows.gram(no_progress))


def kernels(backend: Any, x: Tensor, by_layer: bool = True) -> Callable[[], Tensor]:
    """Return what computes the kernels J J^T (B, C, C) of inputs, as the exact residual does: layer by layer, or from rows."""
    engine, compute = backend.engine, kernels_of_layers if by_layer else kernels_from_rows
    if by_layer and safely(backend.model, lambda: kernel_way(engine, x)).layers is None:
        raise ValueError("rows of P numbers are counted as cheaper, so that they are taken")
    return lambda: safely(backend.model, lambda: compute(engine, x))


def scan(backend: Any, x: Tensor) -> Tensor:
    """Run the network on a batch as the scan of the training data does."""
    return backend.engine.forward(x)


@torch.no_grad()
def mode(backend: Any, x: Tensor, rank: int) -> str:
    """Return how features of a batch are computed: "forward", "contraction", "reverse", or a substitute of one."""
    return backend.engine.choice(x).mode(rank)


def random_basis(backend: Any, rank: int) -> NystromBasis:
    """Return K random directions, nearly orthonormal, which cost what those of a fit do."""
    weights = backend.engine.function.weights()
    n_weights = sum(w.numel() for w in weights.values())
    generator = torch.Generator().manual_seed(0)
    directions = {}
    for name, w in weights.items():
        block = torch.empty(rank, *w.shape, dtype=w.dtype).normal_(0, n_weights**-0.5, generator=generator)
        directions[name] = block.to(w.device)
    return NystromBasis(directions, torch.ones(rank).double(), float(rank), torch.ones(rank).double())


@torch.no_grad()
def predicted(backend: Any, x: Tensor, rank: int, way: str) -> float:
    """Return what the package counts that features of a batch cost by a way, in forwards an input."""
    choice = backend.engine.choice(x)
    return choice.cost(way, rank) / choice.counts.forward


def predicted_crossover(backend: Any, x: Tensor, most: int = 1000) -> int | None:
    """Return the K from which the package counts contraction as cheaper than forward mode; None beyond the most."""

    def cheaper(rank: int) -> bool:
        return predicted(backend, x, rank, "contraction") <= predicted(backend, x, rank, "forward")

    found = 1 + bisect.bisect_left(range(1, most + 1), True, key=cheaper)
    return found if found <= most else None


@torch.no_grad()
def chunks(backend: Any, way: str, x: Tensor, rank: int) -> tuple[int, int]:
    """Return how many inputs and directions one call takes; of a way without chunks of directions, all of them."""
    found = backend.engine.choice(x).chunks(way, rank)
    return found.inputs, rank if way == "contraction" else found.directions


@torch.no_grad()
def chunk_bytes(backend: Any, way: str, x: Tensor, inputs: int, directions: int) -> int:
    """Return what the package estimates that a call of so many inputs and directions holds."""
    used = Chunks(inputs, 1 if way == "contraction" else directions)
    return backend.engine.choice(x).feature_bytes(way, used)


def features_in_chunks(
    backend: Any, way: str, x: Tensor, basis: NystromBasis, inputs: int, directions: int
) -> Any:
    """Compute features by the way that the backend's user named, in other chunks than it chooses."""
    engine, chunks = backend.engine, Chunks(inputs, 1 if way == "contraction" else directions)
    phi, f = safely(backend.model, lambda: engine.bound(way, x, basis.directions)(x, chunks))
    n_outputs = engine.facts(x).n_outputs
    return phi.reshape(-1, n_outputs, basis.rank), f.reshape(-1, n_outputs)


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
