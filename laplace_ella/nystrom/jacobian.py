r"""What an engine computes for a basis: features J V, products with J transposed, gradient rows, and the basis itself.

Where ranks share the directions, each computes everybody's products with its own directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from ..data.batches import Input, Raw, n_bytes
from ..data.landmarks import Landmarks
from ..data.packing import packed
from ..data.progress import Progress
from ..network.by_layer import (
    Gradients,
    Matrices,
    outer_matrices,
    outer_numbers,
    rows_by_layer,
    small_outer_products,
)
from ..network.calls import DivergedError
from ..network.costs import of_gradients, of_gradients_by_layer
from ..network.engine import Engine
from ..network.functional import Weights
from ..network.safety import safely
from ..parallel.ranks import ALONE, Ranks
from ..parallel.sharding import for_everyone
from .basis import NystromBasis, build_basis, combined
from .gram import FRESH, Unfinished
from .rows import RowSource

Found = TypeVar("Found")


def features(
    engine: Engine, basis: NystromBasis, x: Raw | Input, enable_backprop: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\phi(x) = J(x) V` (B, C, K) and f(x) (B, C).

    Where ranks share the directions, all have to call, each with inputs of its own, or :func:`answer_others`.

    Notes
    -----
    Cost: at least 1 + 2K forward passes for each input.
    """
    if not basis.sharded:
        return engine.push(x, basis.directions, enable_backprop)
    phi = _shared_features(engine, basis, packed(engine.inputs(x)))
    f = engine.forward(x).flatten(0, -2)
    assert phi is not None
    return phi.to(f), f


def _shared_features(engine: Engine, basis: NystromBasis, question: Any) -> Tensor | None:
    def answer(theirs: Any) -> Tensor:
        return engine.push(engine.restored(theirs), basis.directions)[0]

    return for_everyone(basis.ranks, question, answer, basis.rank, "the features")


def pull(engine: Engine, basis: NystromBasis, x: Raw | Input, cotangents: Tensor) -> Tensor:
    r"""Compute :math:`V^T J^T u` (B, n, K) of cotangents u (B, n, L C)."""
    if not basis.sharded:
        return _pulled(engine, basis, x, cotangents)
    found = _shared_pull(engine, basis, (packed(engine.inputs(x)), cotangents))
    assert found is not None
    return found.to(cotangents)


def _pulled(engine: Engine, basis: NystromBasis, x: Raw | Input, cotangents: Tensor) -> Tensor:
    return safely(engine.module, lambda: engine.pull(engine.to_model(x), basis.directions, cotangents))


def _shared_pull(engine: Engine, basis: NystromBasis, question: Any) -> Tensor | None:
    def answer(theirs: Any) -> Tensor:
        return _pulled(engine, basis, engine.restored(theirs[0]), theirs[1].to(engine.device))

    return for_everyone(basis.ranks, question, answer, basis.rank, "the sampled curvature")


def answer_others(engine: Engine, basis: NystromBasis, labels: int = 0) -> None:
    """Compute products for other ranks with this rank's directions, having no inputs of its own.

    Parameters
    ----------
    labels : int
        How many labels are sampled for each input, if the others pull; 0: they compute features.
    """
    (_shared_pull if labels else _shared_features)(engine, basis, None)


def row_source(
    engine: Engine, landmarks: Landmarks, ranks: Ranks = ALONE, sharded: bool = False, by_layer: bool = True
) -> RowSource:
    """Prepare the gradient rows of landmarks; see :class:`laplace_ella.nystrom.rows.RowSource`.

    Layer by layer where that is counted to be cheaper, if it is allowed; see ``laplace_ella/network/costs.py``.
    """
    longest = engine.to_model(max(landmarks.inputs, key=n_bytes))
    support = engine.support(longest)
    matrices = _worthwhile(engine, longest, len(landmarks)) if by_layer else {}
    compute = partial(_by_layer, engine, matrices) if matrices else engine.row_engine or support.engine
    source = RowSource(
        engine.function,
        landmarks,
        compute,
        engine.to_model,
        1,
        ranks=ranks,
        sharded=sharded,
        matrices=matrices,
    )
    source.landmarks_per_call = engine.choice(longest).gradients_per_call(source.row_bytes)
    return source


def _worthwhile(engine: Engine, x: Input, n_landmarks: int) -> Matrices:
    """Return the matrices whose gradients are to be outer products; none if rows are cheaper without, or were named."""
    choice, met = engine.choice(x), n_landmarks / 2

    def cheaper(matrices: Matrices) -> bool:
        cost = of_gradients_by_layer(choice.counts, 1, met, *outer_numbers(matrices))
        return cost < of_gradients(choice.counts, 1, met)

    contracted = choice.facts.contracted
    if engine.row_engine or contracted is None or not cheaper(small_outer_products(contracted)):
        return {}
    layers = engine.layers(x)
    matrices = {} if layers is None else outer_matrices(layers)
    return matrices if cheaper(matrices) else {}


def _by_layer(
    engine: Engine, matrices: Matrices, model: Any, weights: Any, x: Input, outputs: Tensor
) -> Mapping[str, Gradients]:
    layers = engine.layers(x)
    if layers is None:
        raise DivergedError
    return rows_by_layer(layers, x, outputs, matrices)


def from_rows(
    engine: Engine,
    landmarks: Landmarks,
    compute: Callable[[RowSource], Found],
    ranks: Ranks = ALONE,
    sharded: bool = False,
) -> Found:
    """Compute something from gradient rows; again from those of another way if they cannot come layer by layer."""

    def source(by_layer: bool) -> RowSource:
        with ranks.together("the gradients of landmarks"):
            return safely(engine.module, lambda: row_source(engine, landmarks, ranks, sharded, by_layer))

    first = source(True)
    if ranks.least(bool(first.matrices), "the way to gradients of landmarks") == bool(first.matrices):
        with suppress(DivergedError):
            return safely(engine.module, lambda: compute(first))
    return safely(engine.module, lambda: compute(source(False)))


def basis_of(
    engine: Engine,
    landmarks: Landmarks,
    rank: int | float,
    progress: Progress,
    ranks: Ranks = ALONE,
    sharded: bool = False,
    unfinished: Unfinished = FRESH,
) -> NystromBasis:
    """Compute the basis of the landmarks' gradients; see :func:`laplace_ella.nystrom.basis.build_basis`."""
    with ranks.together("the memory budget"):
        budget = engine.budget()
    budget = ranks.least(budget, "the memory budget")
    build = partial(
        build_basis,
        rank=rank,
        budget=budget,
        spill=engine.spill,
        progress=progress,
        unfinished=unfinished,
    )
    return from_rows(engine, landmarks, build, ranks, sharded)


def directions_of(engine: Engine, landmarks: Landmarks, coefficients: Tensor) -> Weights:
    r"""Compute the directions :math:`V = R^T a` of landmarks and coefficients a (M, K)."""
    coefficients, budget = coefficients.to(engine.device), engine.budget()
    return from_rows(engine, landmarks, lambda source: combined(source, coefficients, budget))
