r"""Gradient rows of landmarks, computed when asked for, and their products.

On several ranks each computes its share of the rows of a block, and the ranks exchange slices of
columns, so that each multiplies all rows for its part of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from ..data.batches import collate, rows
from ..data.landmarks import Landmarks
from ..network.functional import FunctionalModel, flat
from ..network.gradients import RowEngine
from ..network.memory import Chunks, with_smaller_chunks
from ..parallel.ranks import ALONE, Ranks

# Products are summed over slices of this many weights, each held in float64.
SLICE = 8192
# Numbers of one sum over ranks.
SUMMED = 2**22


class RowSource:
    """Gradient rows of landmarks, computed when asked for.

    Parameters
    ----------
    model : FunctionalModel
    landmarks : Landmarks
        M pairs.
    engine : callable
        Computes gradient rows (see gradients.py).
    to_model : callable
        Moves an input to the model.
    rows_per_call : int
        Landmarks per call of the engine.
    separable : bool
        The engine can leave weights out.
    ranks : Ranks
        Which compute the rows together: each its share of those asked for.
    sharded : bool
        Of combinations of the rows, each rank keeps some.
    """

    def __init__(
        self,
        model: FunctionalModel,
        landmarks: Landmarks,
        engine: RowEngine,
        to_model: Callable[[Any], Any],
        rows_per_call: int,
        separable: bool = True,
        ranks: Ranks = ALONE,
        sharded: bool = False,
    ) -> None:
        self.model, self.landmarks, self.engine = model, landmarks, engine
        self.ranks, self.sharded = ranks, sharded
        self.to_model, self.separable = to_model, separable
        self.weights = model.weights()
        self.sizes = {k: w.numel() for k, w in self.weights.items()}
        first = next(iter(self.weights.values()))
        self.device, self.dtype = first.device, first.dtype
        self.computed = 0
        self._chunks = Chunks(rows_per_call, 1)

    def __len__(self) -> int:
        return len(self.landmarks)

    @property
    def rows_per_call(self) -> int:
        """Landmarks per call of the engine; halved whenever the device runs out of memory."""
        return self._chunks.rows

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return sum(self.sizes.values()) * self.dtype.itemsize

    def gram(self, values: Tensor, size: int, progress: Callable[[Any], Any] = iter) -> Tensor:
        """Return the Gram matrix (size, size), float64, of rows of which each rank has its share."""
        return gram(values, self.device, progress, self.ranks, self.ranks.lengths(size))

    def cross(self, left: Tensor, n_left: int, right: Tensor, n_right: int) -> Tensor:
        """Return the products (n_left, n_right), float64, of two sets of rows of which each rank has its share."""
        out = torch.zeros(n_left, n_right, dtype=torch.float64, device=self.device)
        width = _slices(n_left + n_right, left.shape[1]).step
        lengths = self.ranks.lengths(n_left), self.ranks.lengths(n_right)
        pairs = (self.ranks.columns(rows, n, width) for rows, n in zip((left, right), lengths))
        with self.ranks.lockstep("the Gram matrix") as between:
            for a, b in zip(*pairs):
                with between():
                    out.addmm_(a.to(self.device).double(), b.to(self.device).double().T)
        return self.ranks.total(out)

    def combination(self, coefficients: Tensor, values: Tensor) -> Tensor:
        """Return ``coefficients.T @ rows`` (K, P), of coefficients (M, K) and rows of which each rank has its share.

        Each slice is computed in float64. If directions are spread over the ranks, only those of this rank.
        """
        # Spilled rows may be coarser than the weights, whose precision orthonormal directions need.
        dtype = torch.promote_types(torch.promote_types(values.dtype, self.dtype), torch.float32)
        n_weights, rank = values.shape[1], coefficients.shape[1]
        width = _slices(len(coefficients), n_weights).step
        mine = coefficients[self.ranks.bounds(len(coefficients))]
        kept = self.ranks.turns() if self.sharded else slice(None)
        out = coefficients.new_empty(len(range(rank)[kept]), n_weights, dtype=dtype)
        # Several slices in one sum over the ranks.
        block = width * max(1, SUMMED // (rank * width))
        with self.ranks.lockstep("the directions") as between:
            for start in range(0, n_weights, block):
                columns = slice(start, min(start + block, n_weights))
                product = coefficients.new_zeros(rank, columns.stop - columns.start)
                with between():
                    pieces = values[:, columns].split(width, 1)
                    product = torch.cat([mine.T @ p.to(mine.device).double() for p in pieces], 1)
                total = self.ranks.total(product)
                with between():
                    out[:, columns] = total[kept]
        return out

    def __call__(
        self,
        indices: Sequence[int],
        names: Sequence[str] | None = None,
        out: Tensor | None = None,
        progress: Callable[[Any], Any] = iter,
        norms: Tensor | None = None,
    ) -> Tensor:
        """Return the rows (len(indices), P) with respect to the weights named, all by default.

        On several ranks, all of which ask for the same rows, each gets its share of them. ``out`` takes them, if given; ``norms`` takes their norms, by which they are then divided.
        """
        names = list(self.weights) if names is None else names
        indices = self.ranks.share(indices)
        with self.ranks.together("the gradients of landmarks"):
            return self._rows(indices, names, out, progress, norms)

    def _rows(
        self,
        indices: Sequence[int],
        names: Sequence[str],
        out: Tensor | None,
        progress: Callable[[Any], Any],
        norms: Tensor | None,
    ) -> Tensor:
        if out is None:
            n_weights = sum(self.sizes[k] for k in names)
            out = torch.empty(len(indices), n_weights, device=self.device, dtype=self.dtype)
        inputs = [self.landmarks.inputs[i] for i in indices]
        for part, x in progress(list(collate(inputs, self.rows_per_call))):
            self._write(out, part, [indices[i] for i in part], self.to_model(x), names, norms)
        self.computed += len(indices)
        return out

    def _write(
        self,
        out: Tensor,
        part: list[int],
        chosen: list[int],
        x: Any,
        names: Sequence[str],
        norms: Tensor | None,
    ) -> None:
        weights = {k: self.weights[k] for k in names}
        outputs = self.landmarks.outputs[chosen].to(self.device)
        gradients, self._chunks = with_smaller_chunks(
            lambda c: self._gradients(weights, x, outputs, c.rows),
            self._chunks,
            self.device,
            lambda c: 2 * c.rows * sum(self.sizes.values()) * self.dtype.itemsize,
        )
        scale = None
        if norms is not None:
            squares = [flat(g).double().square().sum(1) for g in gradients.values()]
            norms[part] = torch.stack(squares).sum(0).sqrt()
            scale = norms[part, None].clamp_min(torch.finfo(torch.float64).tiny)
        start = 0
        for name in names:
            block = flat(gradients[name])
            if not block.isfinite().all():
                raise ValueError(
                    f"The gradients of landmarks {self.landmarks.names(chosen)} hold NaN or infinite values in {name!r}; "
                    "they must be finite. A square root or a norm at zero is a usual cause."
                )
            block = block if scale is None else block / scale
            out[part, start : start + self.sizes[name]] = block.to(out.device, out.dtype)
            start += self.sizes[name]

    def _gradients(self, weights: Any, x: Any, outputs: Tensor, size: int) -> dict[str, Tensor]:
        if size >= len(outputs):
            return self.engine(self.model, weights, x, outputs)
        parts = [
            self.engine(self.model, weights, rows(x, a, a + size), outputs[a : a + size])
            for a in range(0, len(outputs), size)
        ]
        return {k: torch.cat([p[k] for p in parts]) for k in weights}


def _slices(n_rows: int, n_weights: int) -> range:
    return range(0, n_weights, max(64, min(SLICE, 2**22 // n_rows)))


def gram(
    values: Tensor,
    device: torch.device,
    progress: Callable[[Any], Any] = iter,
    ranks: Ranks = ALONE,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Return ``values @ values.T`` (M, M) in float64, computing the upper half only.

    On several ranks, each with so many of the rows, in the order of the ranks.
    """
    lengths = [len(values)] if lengths is None else lengths
    size = sum(lengths)
    out = torch.zeros(size, size, dtype=torch.float64, device=device)
    parts = list(torch.arange(size, dtype=torch.int64, device="cpu").chunk(min(8, size)))
    bounds = [(int(p[0]), int(p[-1]) + 1) for p in parts]
    slices = _slices(size, values.shape[1])
    with ranks.lockstep("the Gram matrix") as between:
        for _, columns in zip(progress(slices), ranks.columns(values, lengths, slices.step)):
            with between():
                piece = columns.to(device).double()
                for (a, b), (c, d) in combinations_with_replacement(bounds, 2):
                    out[a:b, c:d].addmm_(piece[a:b], piece[c:d].T)
    out = ranks.total(out)
    return out.triu() + out.triu(1).T


def block_grams(values: Tensor, size: int) -> Tensor:
    """Return the Gram matrices (B, C, C) of consecutive groups of C = ``size`` rows, float64."""
    out = torch.zeros(len(values) // size, size, size, dtype=torch.float64, device=values.device)
    slices = _slices(values.shape[0], values.shape[1])
    for start in slices:
        piece = values[:, start : start + slices.step].double().view(len(out), size, -1)
        out.baddbmm_(piece, piece.mT)
    return out
