r"""The Nystrom basis: gradient rows R -> Gram matrix -> directions V in weight space.

:math:`R R^T = U \operatorname{diag}(\lambda) U^T` and
:math:`V = R^T U_K \operatorname{diag}(\lambda_K)^{-1/2}`, so that :math:`V^T V = I`
(Deng, Zhou, Zhu, NeurIPS 2022, section 3; arXiv 2210.12642).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from .autodiff import FunctionalModel, Weights, flat
from .batches import collate
from .gradients import Engine, weighted_gradients
from .landmarks import Landmarks

Progress = Callable[[Iterable[Any], str], Iterable[Any]]

# The Gram matrix is summed over slices of this many weights, each held in float64.
_SLICE = 8192


@dataclass(frozen=True)
class NystromBasis:
    r"""K orthonormal directions in weight space.

    Attributes
    ----------
    directions : dict of Tensor (K, *shape)
        V, one block per trainable weight, in the weight's dtype and memory format.
    eigenvalues : Tensor (K,)
        The leading eigenvalues of the Gram matrix, descending, float64.
    trace : float
        Trace of the Gram matrix: the sum of all its eigenvalues.
    n_landmarks : int
        M.
    """

    directions: Weights
    eigenvalues: Tensor
    trace: float
    n_landmarks: int

    @property
    def rank(self) -> int:
        """K, the number of directions."""
        return len(self.eigenvalues)

    @property
    def retained(self) -> float:
        """Share of the Gram matrix's trace that the K directions retain, in (0, 1]."""
        return float(self.eigenvalues.sum()) / self.trace

    @cached_property
    def weight_grams(self) -> Tensor:
        r""":math:`V_l^T V_l` (L, K, K) of each weight tensor l, float64; they sum to the identity."""
        blocks = (flat(v).double() for v in self.directions.values())
        return torch.stack([b @ b.T for b in blocks])

    def project_precision(self, prior_precision: Tensor) -> Tensor:
        r"""Project a prior precision onto the span: :math:`V^T \Delta V` (K, K), float64.

        Parameters
        ----------
        prior_precision : Tensor (1,), (L,) or (P,)
            One for all weights, one per weight tensor, or one per weight.
            Differentiable.
        """
        delta = prior_precision.double()
        if delta.numel() == 1:
            return delta * torch.eye(self.rank, dtype=torch.float64, device=delta.device)
        blocks = [flat(v) for v in self.directions.values()]
        if delta.numel() == sum(b.shape[1] for b in blocks):
            parts = delta.split([b.shape[1] for b in blocks])
            return sum((b.double() * d) @ b.double().T for b, d in zip(blocks, parts))
        return torch.einsum("l,lkj->kj", delta, self.weight_grams)

    def combine(self, coordinates: Tensor) -> Weights:
        r"""Map coordinates z (S, K) to weight offsets :math:`V z`, a dict of (S, *shape)."""
        return {k: torch.tensordot(coordinates.to(v.dtype), v, 1) for k, v in self.directions.items()}


def build_basis(
    model: FunctionalModel,
    landmarks: Landmarks,
    rank: int,
    *,
    engine: Engine,
    to_model: Callable[[Any], Any],
    block_rows: int,
    memory_rows: int,
    progress: Progress,
) -> NystromBasis:
    """Compute the leading directions of the landmarks' gradients.

    Parameters
    ----------
    landmarks : Landmarks
        M pairs.
    rank : int
        K wanted; fewer are returned if the numerical rank of the rows is lower.
    engine : callable
        Computes gradient rows (see gradients.py).
    to_model : callable
        Moves an input to the model.
    block_rows : int
        Landmarks per call of the engine.
    memory_rows : int
        How many rows of P numbers may be kept. At least M: every gradient is
        computed once. Below: the Gram matrix is built block by block, recomputing
        rows, and V comes from weighted backward passes.
    progress : callable
        Wraps an iterable in a progress bar: (iterable, description) -> iterable.

    Raises
    ------
    ValueError
        If a gradient is not finite, or all of them vanish.

    Notes
    -----
    Cost: 3 or more forward passes a landmark if all rows fit. With b blocks of
    half of ``memory_rows``, b (b + 1) / 2 times a block's gradients, and 1 + 2K
    forward passes a landmark for V.
    """
    source = _RowSource(model, landmarks, engine, to_model, block_rows)
    size = len(landmarks)
    if size <= memory_rows:
        rows = source(list(range(size)), lambda blocks: progress(blocks, "Landmark gradients"))
        gram = _gram(rows, lambda slices: progress(slices, "Gram matrix"))
    else:
        gram = _gram_by_blocks(source, size, max(1, memory_rows // 2), progress)
    eigenvalues, coefficients = _leading_eigenpairs(gram, rank, source.eps)
    if size <= memory_rows:
        directions = _directions_from_rows(rows, coefficients, source.weights)
    else:
        directions = source.combine(coefficients, progress)
    return NystromBasis(directions, eigenvalues, float(gram.trace()), size)


class _RowSource:
    """Gradient rows of chosen landmarks, computed when asked for."""

    def __init__(
        self,
        model: FunctionalModel,
        landmarks: Landmarks,
        engine: Engine,
        to_model: Callable[[Any], Any],
        block_rows: int,
    ) -> None:
        self.model, self.landmarks, self.engine = model, landmarks, engine
        self.to_model, self.block_rows = to_model, block_rows
        self.weights = model.weights()
        self.sizes = [w.numel() for w in self.weights.values()]
        first = next(iter(self.weights.values()))
        self.device, self.dtype = first.device, first.dtype
        self.eps = torch.finfo(self.dtype).eps

    def _batches(self, indices: Sequence[int], size: int) -> list[tuple[list[int], Any]]:
        return list(collate([self.landmarks.inputs[i] for i in indices], size))

    def __call__(self, indices: Sequence[int], progress: Callable[[Any], Any] = iter) -> Tensor:
        """Return the rows (len(indices), P)."""
        out = torch.empty(len(indices), sum(self.sizes), device=self.device, dtype=self.dtype)
        for part, x in progress(self._batches(indices, self.block_rows)):
            chosen = [indices[i] for i in part]
            outputs = self.landmarks.outputs[chosen].to(self.device)
            gradients = self.engine(self.model, self.weights, self.to_model(x), outputs)
            start = 0
            for name, size in zip(self.weights, self.sizes):
                block = flat(gradients[name])
                if not block.isfinite().all():
                    raise ValueError(
                        f"The gradients of landmarks {self.landmarks.names(chosen)} hold NaN or infinite values in {name!r}; "
                        "they must be finite. A square root or a norm at zero is a usual cause."
                    )
                out[part, start : start + size] = block
                start += size
        return out

    def combine(self, coefficients: Tensor, progress: Progress) -> Weights:
        """Return the combinations of all rows with coefficients (M, K), without the rows."""
        rank = coefficients.shape[1]
        accumulate = torch.promote_types(self.dtype, torch.float32)
        total = {
            k: torch.zeros(rank, *w.shape, device=self.device, dtype=accumulate)
            for k, w in self.weights.items()
        }
        # Each row's activations are differentiated K times at once.
        batches = self._batches(range(len(self.landmarks)), max(1, self.block_rows // rank))
        for part, x in progress(batches, "Directions"):
            outputs = self.landmarks.outputs[part].to(self.device)
            sums = weighted_gradients(self.model, self.weights, self.to_model(x), outputs, coefficients[part])
            for name, value in sums.items():
                total[name] += value
        return {k: _like(w, total[k]) for k, w in self.weights.items()}


def _like(weight: Tensor, values: Tensor) -> Tensor:
    """Store (K, *shape) so that each slice has the weight's dtype and strides.

    A tangent whose strides differ from its weight's is copied at every use.
    """
    strides = (weight.numel(), *weight.stride())
    return weight.new_empty(0).new_empty_strided(tuple(values.shape), strides).copy_(values)


def _gram(rows: Tensor, progress: Callable[[Any], Any] = iter) -> Tensor:
    """Return ``rows @ rows.T`` (M, M) in float64, computing the upper half only."""
    size = rows.shape[0]
    gram = torch.zeros(size, size, dtype=torch.float64, device=rows.device)
    parts = list(torch.arange(size, device=rows.device).chunk(min(8, size)))
    bounds = [(int(p[0]), int(p[-1]) + 1) for p in parts]
    for start in progress(range(0, rows.shape[1], _SLICE)):
        piece = rows[:, start : start + _SLICE].double()
        for (a, b), (c, d) in combinations_with_replacement(bounds, 2):
            gram[a:b, c:d].addmm_(piece[a:b], piece[c:d].T)
    return gram.triu() + gram.triu(1).T


def _cross(left: Tensor, right: Tensor) -> Tensor:
    out = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float64, device=left.device)
    for start in range(0, left.shape[1], _SLICE):
        stop = start + _SLICE
        out.addmm_(left[:, start:stop].double(), right[:, start:stop].double().T)
    return out


def _gram_by_blocks(source: _RowSource, size: int, block: int, progress: Progress) -> Tensor:
    """Build the Gram matrix with two blocks of rows in memory at a time."""
    blocks = [list(range(a, min(a + block, size))) for a in range(0, size, block)]
    gram = torch.zeros(size, size, dtype=torch.float64, device=source.device)
    pairs = list(combinations_with_replacement(range(len(blocks)), 2))
    left = torch.empty(0)
    for i, j in progress(pairs, "Gram matrix, block by block"):
        if i == j:
            left = source(blocks[i])
            part = _gram(left)
        else:
            part = _cross(left, source(blocks[j]))
        a, b = slice(blocks[i][0], blocks[i][-1] + 1), slice(blocks[j][0], blocks[j][-1] + 1)
        gram[a, b], gram[b, a] = part, part.T
    return gram


def _leading_eigenpairs(gram: Tensor, rank: int, eps: float) -> tuple[Tensor, Tensor]:
    r"""Return eigenvalues (K,), descending, and :math:`U_K \operatorname{diag}(\lambda_K)^{-1/2}` (M, K).

    Eigenvalues up to max(eps of the rows, M eps of float64) times the largest are
    rounding: a Weyl bound for a float64 Gram matrix of rounded rows.
    """
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    if eigenvalues[0] <= 0:
        raise ValueError(
            "All landmark gradients are zero, so they span no direction; at least one must differ. "
            "Check that the outputs depend on weights that require grad."
        )
    floor = max(eps, len(gram) * torch.finfo(torch.float64).eps) * eigenvalues[0]
    kept = min(rank, int((eigenvalues > floor).sum()))
    eigenvalues, vectors = eigenvalues[:kept].clone(), vectors[:, :kept]
    # Eigenvectors have a sign of their own on every machine; fix it.
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return eigenvalues, vectors * signs / eigenvalues.sqrt()


def _directions_from_rows(rows: Tensor, coefficients: Tensor, weights: Weights) -> Weights:
    directions, start = {}, 0
    for name, weight in weights.items():
        stop = start + weight.numel()
        parts = [
            coefficients.T @ rows[:, a : min(a + _SLICE, stop)].double() for a in range(start, stop, _SLICE)
        ]
        parts.append(coefficients.new_empty(coefficients.shape[1], 0))  # a weight may be empty
        values = torch.cat(parts, 1).reshape(coefficients.shape[1], *weight.shape)
        directions[name], start = _like(weight, values), stop
    return directions
