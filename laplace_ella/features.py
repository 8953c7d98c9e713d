r"""Features :math:`\phi(x) = J(x) V`: the Jacobian seen through the basis.

Two twins with one signature: forward mode (K Jacobian-vector products, which share
one evaluation of the model) and reverse mode (C per-sample gradients, contracted
with V). Neither forms a Jacobian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp, vmap

from .autodiff import FunctionalModel, Weights, flat
from .batches import Input, batch_size, rows
from .gradients import Engine, gradient_rows

# Tensors of this many bytes stay in cache, and below the size at which glibc maps
# and unmaps memory at every allocation.
CPU_WORKING_SET = 2**23
# A forward-mode pass keeps about this many tensors of the largest size alive.
LIVE_TENSORS = 8


@dataclass(frozen=True)
class Chunks:
    """How much one call of the model takes: rows of the batch, and directions."""

    rows: int
    directions: int


def plan_chunks(row_bytes: int, n_directions: int, working_set: int, chunk_size: int | None) -> Chunks:
    """Split a batch and K directions so that tensors stay within ``working_set`` bytes.

    Directions first: every further chunk of directions evaluates the model again.

    Parameters
    ----------
    row_bytes : int
        Bytes one row takes in the largest intermediate tensor.
    n_directions : int
        K.
    working_set : int
        Bytes the largest tensor may take, tangents included.
    chunk_size : int, optional
        Directions per call, if the user fixed them.
    """
    slots = max(1, working_set // max(1, row_bytes))
    directions = min(n_directions, chunk_size or slots)
    return Chunks(rows=max(1, slots // directions), directions=directions)


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
        for start in range(0, n_directions, chunks.directions):
            tangents = {k: v[start : start + chunks.directions] for k, v in directions.items()}
            # out_dims=None for the outputs would be natural, but fails under chunking.
            f, phi = vmap(push, out_dims=(0, -1))(tangents)
            parts.append(phi)
        return torch.cat(parts, -1), f[0]

    n_directions = next(iter(directions.values())).shape[0]
    size = batch_size(x)
    step = math.ceil(size / math.ceil(size / chunks.rows))  # blocks of equal size
    blocks = [push_block(rows(x, start, start + step)) for start in range(0, size, step)]
    return torch.cat([phi for phi, _ in blocks]), torch.cat([f for _, f in blocks])


def reverse_features(
    model: FunctionalModel,
    weights: Weights,
    directions: Weights,
    x: Input,
    chunks: Chunks,
    engine: Engine = gradient_rows,
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\phi(x)` by one per-sample gradient per output, contracted with V.

    Parameters, returns: as :func:`forward_features`; ``chunks.directions`` is not used,
    ``engine`` computes the gradients.

    Notes
    -----
    Cost: about 1 + 3C forward passes a row, however large K is. Memory:
    ``chunks.rows`` x P numbers.
    """
    blocks = []
    f = model(weights, x)
    for start in range(0, batch_size(x), chunks.rows):
        block = rows(x, start, start + chunks.rows)
        columns = []
        for c in range(f.shape[-1]):
            outputs = torch.full((batch_size(block),), c, device=f.device)
            gradients = engine(model, weights, block, outputs)
            parts = [flat(gradients[k]) @ flat(v).T for k, v in directions.items()]
            columns.append(torch.stack(parts).sum(0))
        blocks.append(torch.stack(columns, 1))
    return torch.cat(blocks), f
