r"""What an engine computes for a basis: features J V, products with J transposed, gradient rows, and the basis itself.

Where ranks share the directions, each computes everybody's products with its own directions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..data.batches import Input, Raw, n_bytes
from ..data.landmarks import Landmarks
from ..data.packing import packed
from ..data.progress import Progress
from ..network.engine import Engine
from ..network.functional import Weights
from ..network.safety import safely
from ..parallel.ranks import ALONE, Ranks
from ..parallel.sharding import for_everyone
from .basis import NystromBasis, build_basis, combined
from .gram import FRESH, Unfinished
from .rows import RowSource


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
    engine: Engine, landmarks: Landmarks, ranks: Ranks = ALONE, sharded: bool = False
) -> RowSource:
    """Prepare the gradient rows of landmarks; see :class:`laplace_ella.nystrom.rows.RowSource`."""
    longest = engine.to_model(max(landmarks.inputs, key=n_bytes))
    support = engine.support(longest)
    return RowSource(
        engine.function,
        landmarks,
        engine.row_engine or support.engine,
        engine.to_model,
        engine.gradients_per_call(longest),
        ranks=ranks,
        sharded=sharded,
    )


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
    with ranks.together("the gradients of landmarks"):
        source = safely(engine.module, lambda: row_source(engine, landmarks, ranks, sharded))
        budget = engine.budget()
    budget = ranks.least(budget, "the memory budget")
    return safely(
        engine.module,
        lambda: build_basis(
            source, rank, budget=budget, spill=engine.spill, progress=progress, unfinished=unfinished
        ),
    )


def directions_of(engine: Engine, landmarks: Landmarks, coefficients: Tensor) -> Weights:
    r"""Compute the directions :math:`V = R^T a` of landmarks and coefficients a (M, K)."""
    return safely(
        engine.module,
        lambda: combined(row_source(engine, landmarks), coefficients.to(engine.device), engine.budget()),
    )
