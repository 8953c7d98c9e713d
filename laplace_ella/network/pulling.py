r"""Products with the transposed Jacobian, by backward passes whose gradients of P numbers are contracted with V.

Reverse mode needs no rules for layers, and no forward-mode rule for any operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.func import vjp

from ..data.batches import Input, batch_size, inputs_between
from .functional import FunctionalModel, Pull, Weights, backward_passes, flat
from .gradients import per_input
from .memory import Chunks


def reverse_features(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\phi(x)` by one backward pass per output, contracted with V at once.

    Notes
    -----
    Cost: about 1 + 2C forward passes per row plus the contraction, C K / t of them where
    t positions share a weight, however large K is. Memory: ``chunks.inputs`` x P numbers.
    """
    return pulled(model, weights, directions, x, chunks.inputs)


def looped_reverse_features(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`reverse_features` does, one row after the other.

    Needs no more than ``backward()``. Cost: at least 1 + 2C forward passes of a single row.
    """
    return pulled(model, None, directions, x, 1)


def pulled_cotangents(
    model: FunctionalModel,
    weights: Weights,
    directions: Weights,
    x: Input,
    cotangents: Tensor,
    chunks: Chunks,
    looped: bool,
) -> Tensor:
    r"""Compute :math:`V^T J(x)^T u` (B, n, K) of n cotangents u (B, n, C) per input.

    ``looped``: one row after the other, with plain backward passes. Cost: about 1 + 2n
    forward passes per row, plus contractions. Memory: ``chunks.inputs`` x P numbers.
    """
    if looped:
        return pulled(model, None, directions, x, 1, cotangents)[0]
    return pulled(model, weights, directions, x, chunks.inputs, cotangents)[0]


def pulled(
    model: FunctionalModel,
    weights: Weights | None,
    directions: Weights,
    x: Input,
    at_once: int,
    *cotangents: Tensor,
) -> tuple[Tensor, Tensor]:
    r"""Return :math:`V^T J^T u` (B, n, K) and f (B, C), for cotangents u (B, n, C) or, without any, unit vectors.

    Without weights, by plain backward passes of single rows.
    """
    record = torch.is_grad_enabled()
    bases = {k: flat(v).T for k, v in directions.items()}

    def coordinates(gradients: Iterable[Weights]) -> Tensor:
        # One gradient after the other: each takes P numbers.
        return torch.stack([sum(g[k].reshape(-1) @ b for k, b in bases.items()) for g in gradients])  # type: ignore[misc]

    def contract(row: Input, *us: Tensor) -> tuple[Tensor, Tensor]:
        f, pull, *_ = vjp(lambda w: model(w, row)[0], weights)
        units = us[0] if us else torch.eye(len(f), dtype=f.dtype, device=f.device)
        return coordinates(pull(u)[0] for u in units), f

    def contract_alone(row: Input, *us: Tensor) -> tuple[Tensor, Tensor]:
        def action(f: Tensor, leaves: Weights, pull: Pull) -> tuple[Tensor, Tensor]:
            scalars = us[0][0] @ f[0] if us else f[0]
            return coordinates(pull(s, bases) for s in scalars)[None], f if record else f.detach()

        return backward_passes(model, row, action)

    def compute(block: Input, *us: Tensor) -> tuple[Tensor, Tensor]:
        return contract_alone(block, *us) if weights is None else per_input(contract, block, *us)

    return in_blocks(compute, at_once, x, *cotangents)


def in_blocks(
    compute: Callable[..., tuple[Tensor, Tensor]], at_once: int, x: Input, *more: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply ``compute(inputs, *entries)`` to parts of equal size of a batch and of ``more`` (B, ...); join the results."""
    size = batch_size(x)
    step = math.ceil(size / math.ceil(size / at_once))  # blocks of equal size
    starts = range(0, size, step)
    blocks = [compute(inputs_between(x, a, a + step), *(t[a : a + step] for t in more)) for a in starts]
    return torch.cat([phi for phi, _ in blocks]), torch.cat([f for _, f in blocks])
