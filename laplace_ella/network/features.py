r"""Features :math:`\phi(x) = J(x) V`: the Jacobian seen through the basis.

Several ways with one signature, (model, weights, directions, x, chunks) -> (phi, f),
which agree to rounding and differ in cost and in what operators they need. None
forms a Jacobian. :mod:`laplace_ella.network.probing` finds out which a model supports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from ..data.batches import Input, batch_size, rows
from .functional import FunctionalModel, Weights, backward_passes, flat
from .gradients import per_row
from .memory import Chunks

Features = Callable[[FunctionalModel, Weights, Weights, Input, Chunks], tuple[Tensor, Tensor]]


def forward_features(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\phi(x)` by batched forward-mode AD.

    Parameters
    ----------
    directions : dict of Tensor (K, *shape)
        One tangent per direction, for every trainable weight.
    x : input of B rows

    Returns
    -------
    phi, f : Tensor (B, C, K), Tensor (B, C)

    Notes
    -----
    Cost: at least 1 + 2K forward passes a row. Memory: ``chunks.rows`` x
    ``chunks.directions`` copies of a row's activations, a few layers at a time.
    """

    def push_block(block: Input) -> tuple[Tensor, Tensor]:
        def push(tangent: Weights) -> tuple[Tensor, Tensor]:
            f, phi, *_ = jvp(lambda w: model(w, block), (weights,), (tangent,))
            return f, phi

        parts = []
        for start in range(0, _rank(directions), chunks.directions):
            tangents = {k: v[start : start + chunks.directions] for k, v in directions.items()}
            # out_dims=None for the outputs would be natural, but fails under chunking.
            f, phi = vmap(push, out_dims=(0, -1))(tangents)
            parts.append(phi)
        return torch.cat(parts, -1), f[0]

    return _in_blocks(push_block, x, chunks.rows)


def looped_forward_features(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`forward_features` does, one direction after the other.

    For models whose operators do not batch over tangents. Cost: at least 3K forward passes a row.
    """

    def push_block(block: Input) -> tuple[Tensor, Tensor]:
        columns = []
        for k in range(_rank(directions)):
            tangent = {name: v[k] for name, v in directions.items()}
            f, phi, *_ = jvp(lambda w: model(w, block), (weights,), (tangent,))
            columns.append(phi)
        return torch.stack(columns, -1), f

    return _in_blocks(push_block, x, chunks.rows)


def double_vjp_features(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\phi(x)` by two backward passes a direction.

    :math:`J^T u` is linear in u, and the gradient of :math:`\langle J^T u, v \rangle` with
    respect to u is :math:`J v`. Needs operators that can be differentiated twice, and no
    forward-mode rule. Cost: about 3 + 3K forward passes a row.
    """
    record = torch.is_grad_enabled()

    def push_block(block: Input) -> tuple[Tensor, Tensor]:
        def push(f: Tensor, leaves: Weights, _: Any) -> tuple[Tensor, Tensor]:
            u = torch.zeros_like(f, requires_grad=True)
            pulled = torch.autograd.grad(f, list(leaves.values()), u, create_graph=True, allow_unused=True)
            used = [(k, g) for k, g in zip(leaves, pulled) if g is not None]
            names, gradients = [k for k, _ in used], [g for _, g in used]
            columns = [
                torch.autograd.grad(
                    gradients, u, [directions[n][k] for n in names], retain_graph=True, create_graph=record
                )[0]
                for k in range(_rank(directions))
            ]
            return torch.stack(columns, -1), f if record else f.detach()

        return backward_passes(model, block, push)

    return _in_blocks(push_block, x, chunks.rows)


def reverse_features(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\phi(x)` by one backward pass an output, contracted with V at once.

    ``chunks.directions`` is not used.

    Notes
    -----
    Cost: about 1 + 2C forward passes a row plus the contraction, C K / t of them where
    t positions share a weight, however large K is. Memory: ``chunks.rows`` x P numbers.
    """
    bases = {k: flat(v).T for k, v in directions.items()}

    def contract(row: Input) -> tuple[Tensor, Tensor]:
        f, pull, *_ = vjp(lambda w: model(w, row)[0], weights)
        units = torch.eye(len(f), dtype=f.dtype, device=f.device)
        return _coordinates((pull(u)[0] for u in units), bases), f

    return _in_blocks(lambda block: per_row(contract, block), x, chunks.rows)


def pulled_cotangents(
    model: FunctionalModel,
    weights: Weights,
    directions: Weights,
    x: Input,
    cotangents: Tensor,
    chunks: Chunks,
    looped: bool,
) -> Tensor:
    r"""Compute :math:`V^T J(x)^T u` (B, n, K) of n cotangents u (B, n, C) an input.

    ``looped``: one row after the other, with plain backward passes. Cost: about 1 + 2n
    forward passes a row, plus contractions. Memory: ``chunks.rows`` x P numbers.
    """
    bases = {k: flat(v).T for k, v in directions.items()}

    def contract(row: Input, us: Tensor) -> Tensor:
        _, pull, *_ = vjp(lambda w: model(w, row)[0], weights)
        return _coordinates((pull(u)[0] for u in us), bases)

    def contract_alone(row: Input, us: Tensor) -> Tensor:
        return backward_passes(
            model,
            row,
            lambda f, leaves, pull: _coordinates((pull(s, bases) for s in us[0] @ f[0]), bases)[None],
        )

    def compute(block: Input, us: Tensor) -> Tensor:
        return contract_alone(block, us) if looped else per_row(contract, block, us)

    step = 1 if looped else chunks.rows
    size = batch_size(x)
    return torch.cat([compute(rows(x, a, a + step), cotangents[a : a + step]) for a in range(0, size, step)])


def looped_reverse_features(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`reverse_features` does, one row after the other.

    Needs no more than ``backward()``. Cost: at least 1 + 2C forward passes of a single row.
    """
    record = torch.is_grad_enabled()
    bases = {k: flat(v).T for k, v in directions.items()}

    def contract(f: Tensor, leaves: Weights, pull: Any) -> tuple[Tensor, Tensor]:
        columns = _coordinates((pull(output, bases) for output in f[0]), bases)
        return columns[None], f if record else f.detach()

    return _in_blocks(lambda row: backward_passes(model, row, contract), x, 1)


FEATURES: dict[str, Features] = {
    "forward": forward_features,
    "forward loop": looped_forward_features,
    "double": double_vjp_features,
    "reverse": reverse_features,
    "reverse loop": looped_reverse_features,
}


def _coordinates(gradients: Iterable[Weights], bases: Weights) -> Tensor:
    """Return the coordinates (n, K) of gradients, one after the other, in bases of (numel, K) a weight."""
    return torch.stack([sum(g[k].reshape(-1) @ b for k, b in bases.items()) for g in gradients])  # type: ignore[misc]


def _rank(directions: Weights) -> int:
    return next(iter(directions.values())).shape[0]


def _in_blocks(
    compute: Callable[[Input], tuple[Tensor, Tensor]], x: Input, block_rows: int
) -> tuple[Tensor, Tensor]:
    size = batch_size(x)
    step = math.ceil(size / math.ceil(size / block_rows))  # blocks of equal size
    blocks = [compute(rows(x, start, start + step)) for start in range(0, size, step)]
    return torch.cat([phi for phi, _ in blocks]), torch.cat([f for _, f in blocks])
