r"""The Gram matrix :math:`R R^T` of M gradient rows, and :math:`R^T a`, within a memory budget.

Rows that fit are computed once. Others are kept elsewhere (``spill``), or computed again: in blocks, of
which one stays while the rows after it stream past.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.progress import Progress
from .rows import Rows, RowSource


@dataclass(frozen=True)
class Spill:
    """Where rows go that do not fit the budget.

    Attributes
    ----------
    folder : str or None
        The folder of a temporary file, which is mapped into memory; None for CPU memory.
    dtype : torch.dtype
        bfloat16, float16 or float32. Rows are divided by their norms first. The error of an
        entry is half the dtype's eps of it (or 3e-8 of the norm, in float16, where entries
        are small), so that the error of the Gram matrix, in spectral norm, is at most about eps
        of its largest eigenvalue times the square root of M.
    """

    folder: str | None
    dtype: torch.dtype

    def empty(self, size: int, n_weights: int) -> tuple[Tensor, Any]:
        """Return an uninitialised tensor (M, P), and what must live as long as it does."""
        if self.folder is None:
            return torch.empty(size, n_weights, dtype=self.dtype, device="cpu"), None
        file = tempfile.NamedTemporaryFile(dir=self.folder, prefix="laplace_ella-rows-")  # noqa: SIM115
        n = size * n_weights
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash later
            os.posix_fallocate(file.fileno(), 0, n * self.dtype.itemsize)
        rows = torch.from_file(file.name, shared=True, size=n, dtype=self.dtype).view(size, n_weights)
        if os.name != "posix":
            return rows, file
        file.close()  # the mapping survives its name, which no process that dies leaves behind
        return rows, None


@dataclass(frozen=True)
class Unfinished:
    """A Gram matrix that is made block by block, as far as it has come, and the function that saves it.

    Attributes
    ----------
    layout : list
        The matrices whose gradients are outer products, and the starts of the blocks; a matrix of other blocks is of no use.
    done : int
        How many blocks are in it.
    matrix : Tensor (M, M), optional
    keep : callable
        (layout, done, matrix) -> None; called after every block.
    """

    layout: list[Any] | None = None
    done: int = 0
    matrix: Tensor | None = None
    keep: Callable[[list[Any], int, Tensor], None] = lambda layout, done, matrix: None

    def start(self, layout: list[Any], size: int, device: torch.device) -> tuple[Tensor, int]:
        """Return the matrix (size, size) so far, and how many blocks are in it."""
        if self.matrix is None or layout != self.layout:
            return torch.zeros(size, size, dtype=torch.float64, device=device), 0
        return self.matrix.to(device), self.done


FRESH = Unfinished()


class HeldRows:
    """Gradient rows in blocks, of which one is kept while the rows after it stream past; all are one block if they fit.

    Parameters
    ----------
    source : RowSource
    n_kept, n_streamed : int
        Rows of a block, and of those that are computed at once and stream past, on each rank.
    spill : Spill, optional
        Where the rows of the one block are kept, but for outer products; with None, they stay on the device.

    Attributes
    ----------
    kind : str
        How the rows are held, in words.
    dtype, device
        Those of the rows at hand.
    gradients : int
        How many rows are computed in all, for the Gram matrix and for the directions.
    n_bytes : int
        Bytes on the device that the rows at hand take.
    """

    def __init__(
        self, source: RowSource, n_kept: int, n_streamed: int = 0, spill: Spill | None = None
    ) -> None:
        self.source, self.spill, size = source, spill, len(source)
        step, self.n_streamed = n_kept * source.ranks.size, n_streamed * source.ranks.size
        self.blocks = [range(a, min(a + step, size)) for a in range(0, size, step)]
        self.kind = "kept" if len(self.blocks) == 1 else "blocks of rows"
        self.dtype = source.dtype if spill is None else spill.dtype
        self.device = source.device if spill is None else torch.device("cpu")
        on_device = source.row_bytes if spill is None else source.outer_bytes
        self.n_bytes = (n_kept + n_streamed) * on_device
        # The directions need all blocks again but the last, which is still there.
        self.gradients = sum(size - b.start for b in self.blocks) + self.blocks[-1].start
        self._kept: Rows | None = None  # the rows of the last block
        self._norms: Tensor | None = None  # spilled rows were divided by these

    def gram(self, progress: Progress, unfinished: Unfinished = FRESH) -> Tensor:
        """Return the Gram matrix (M, M), float64."""
        if len(self.blocks) == 1:
            return self._gram_of_all(progress)
        source, size = self.source, len(self.source)
        layout = [*source.matrices, *(block.start for block in self.blocks)]
        out, done = unfinished.start(layout, size, source.device)
        for i, block in enumerate(progress(self.blocks, "Gram matrix, block by block")):
            if i < done:
                continue
            self._kept = None  # its memory is free before the next block is computed
            self._kept = source(block)
            own, a, b = (self._kept, len(block)), block.start, block.stop
            out[a:b, a:b] = source.products(own)
            for c in range(b, size, self.n_streamed):
                others = range(c, min(c + self.n_streamed, size))
                out[a:b, c : others.stop] = source.products(own, (source(others), len(others)))
            unfinished.keep(layout, i + 1, out)
        return out.triu() + out.triu(1).T

    def _gram_of_all(self, progress: Progress) -> Tensor:
        source, every, out = self.source, range(len(self.source)), None
        if self.spill is not None:
            n_rows = len(source.ranks.share(every))
            with source.ranks.together("the place of gradient rows"):
                out, self._file = self.spill.empty(n_rows, source.n_values)
            self._norms = torch.empty(n_rows, dtype=torch.float64, device=source.device)
        self._kept = source(every, out, self._norms, lambda calls: progress(calls, "Landmark gradients"))
        found = source.products((self._kept, len(every)), progress=lambda s: progress(s, "Gram matrix"))
        if self._norms is None:
            return found
        norms = source.ranks.joined(self._norms)
        return found * torch.outer(norms, norms)

    def combine(self, coefficients: Tensor, progress: Progress) -> Tensor:
        """Return the combinations (K, P) of all rows with coefficients (M, K)."""
        if self._norms is not None:
            coefficients = coefficients * self.source.ranks.joined(self._norms)[:, None]
        last, *others = self.blocks[::-1]
        kept = self.source(last) if self._kept is None else self._kept
        total = self.source.combination(coefficients[last.start :], kept)
        for block in progress(others[::-1], "Directions") if others else ():
            del kept  # its memory is free before the next block is computed
            self._kept = None
            kept = self.source(block)
            total += self.source.combination(coefficients[block.start : block.stop], kept)
        return total


def choose_rows(source: RowSource, budget: int, spill: Spill | None = None) -> HeldRows:
    """Decide how rows are held, so that they take ``budget`` bytes and are computed least often.

    The ranks of ``source`` must have the same budget.
    """
    row, share = source.row_bytes, source.ranks.lengths(len(source))[0]
    if share * row <= budget:
        return HeldRows(source, share)
    if spill is not None and source.n_values:
        return HeldRows(source, share, spill=spill)
    capacity = max(2, budget // row)  # one row has to meet another at least
    at_once = source.ranks.least(source.landmarks_per_call, "the size of blocks")
    streamed = min(at_once, max(1, capacity // 4))
    return HeldRows(source, capacity - streamed, streamed)
