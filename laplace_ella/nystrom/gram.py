r"""The Gram matrix :math:`R R^T` of M gradient rows, and :math:`R^T a`, within a memory budget.

Rows that fit are computed once. Others are kept elsewhere (``spill``), or computed
again: either in blocks of rows, of which one stays while the others stream past it,
or in blocks of weights, for all landmarks at once; whichever needs fewer passes.
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
from .rows import RowSource

# A gradient with respect to few weights costs this much of one with respect to all:
# two of three passes, the forward and the backward one, are needed in any case.
PARTIAL_COST = 2 / 3


@dataclass(frozen=True)
class Spill:
    """Where rows go that do not fit the budget.

    Attributes
    ----------
    folder : str or None
        None: CPU memory. Else a temporary file, mapped into memory, in this folder.
    dtype : torch.dtype
        bfloat16, float16 or float32. Rows are divided by their norms first. The error of an
        entry is half the dtype's eps of it (or 3e-8 of the norm, in float16, where entries
        are small), so that of the Gram matrix, in spectral norm, is at most about eps of its
        largest eigenvalue times the square root of M.
    """

    folder: str | None
    dtype: torch.dtype

    def empty(self, size: int, n_weights: int) -> tuple[Tensor, Any]:
        """Return an uninitialised tensor (M, P), and what must live as long as it."""
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
    """How far a Gram matrix has come that is made block by block, and what keeps it.

    Attributes
    ----------
    layout : list
        Of the blocks, in plain types: another one's matrix is of no use.
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


class KeptRows:
    """All M rows at hand: on the device, or spilled."""

    kind = "kept"

    def __init__(self, source: RowSource, spill: Spill | None = None) -> None:
        self.source, self.spill = source, spill
        self.eps = torch.finfo(source.dtype if spill is None else spill.dtype).eps
        self.norms: Tensor | None = None  # by which spilled rows were divided
        self.cost = self.gradients = len(source)
        self.n_bytes = _largest_share(source) * source.row_bytes if spill is None else 0

    def gram(self, progress: Progress, unfinished: Unfinished = FRESH) -> Tensor:
        """Return the Gram matrix (M, M), float64."""
        source, out = self.source, None
        if self.spill is not None:
            n_rows = len(source.ranks.share(range(len(source))))
            with source.ranks.together("the place of gradient rows"):
                out, self._file = self.spill.empty(n_rows, sum(source.sizes.values()))
            self.norms = torch.empty(n_rows, dtype=torch.float64, device=source.device)
        self.rows = source(
            list(range(len(source))),
            out=out,
            progress=lambda blocks: progress(blocks, "Landmark gradients"),
            norms=self.norms,
        )
        found = source.gram(self.rows, len(source), lambda slices: progress(slices, "Gram matrix"))
        if self.norms is None:
            return found
        norms = source.ranks.joined(self.norms)
        return found * torch.outer(norms, norms)

    def combine(self, coefficients: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return the combinations (K, numel) of all rows with coefficients (M, K), by weight."""
        if self.norms is not None:
            coefficients = coefficients * self.source.ranks.joined(self.norms)[:, None]
        return _by_weight(self.source.combination(coefficients, self.rows), self.source.sizes)


class SampleBlocks:
    """Blocks of rows: one is kept while those after it stream past."""

    kind = "blocks of rows"

    def __init__(self, source: RowSource, n_kept: int, n_streamed: int) -> None:
        n_bytes = (n_kept + n_streamed) * source.row_bytes
        n_kept, n_streamed = n_kept * source.ranks.size, n_streamed * source.ranks.size
        self.source, self.n_streamed, self.n_bytes = source, n_streamed, n_bytes
        self.eps = torch.finfo(source.dtype).eps
        self.blocks = [list(range(a, min(a + n_kept, len(source)))) for a in range(0, len(source), n_kept)]
        size = len(source)
        self.kept: Tensor | None = None  # the rows of the last block
        self.cost = self.gradients = sum(size - b[0] for b in self.blocks) + size - len(self.blocks[-1])

    def gram(self, progress: Progress, unfinished: Unfinished = FRESH) -> Tensor:
        """Return the Gram matrix (M, M), float64."""
        source, size = self.source, len(self.source)
        layout = ["rows", *(block[0] for block in self.blocks)]
        out, done = unfinished.start(layout, size, source.device)
        for i, block in enumerate(progress(self.blocks, "Gram matrix, block by block")):
            if i < done:
                continue
            self.kept = None  # before the next is computed
            self.kept = source(block)
            a, b = block[0], block[-1] + 1
            out[a:b, a:b] = source.gram(self.kept, b - a)
            for c in range(b, size, self.n_streamed):
                d = min(c + self.n_streamed, size)
                out[a:b, c:d] = source.cross(self.kept, b - a, source(list(range(c, d))), d - c)
            unfinished.keep(layout, i + 1, out)
        return out.triu() + out.triu(1).T

    def combine(self, coefficients: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return the combinations (K, numel) of all rows with coefficients (M, K), by weight."""
        last = self.blocks[-1]
        kept = self.source(last) if self.kept is None else self.kept
        total = self.source.combination(coefficients[last], kept)
        for block in progress(self.blocks[:-1], "Directions"):
            del kept  # before the next is computed
            self.kept = None
            kept = self.source(block)
            total += self.source.combination(coefficients[block], kept)
        return _by_weight(total, self.source.sizes)


class WeightBlocks:
    """Blocks of weights: rows with respect to some of them, for all landmarks."""

    kind = "blocks of weights"

    def __init__(self, source: RowSource, groups: list[list[str]]) -> None:
        self.source, self.groups = source, groups
        self.rows: Tensor | None = None  # those of the last block
        self.eps = torch.finfo(source.dtype).eps
        self.gradients = (2 * len(groups) - 1) * len(source)
        self.cost = PARTIAL_COST * self.gradients
        largest = max(sum(source.sizes[k] for k in group) for group in groups)
        self.n_bytes = _largest_share(source) * largest * source.dtype.itemsize

    def gram(self, progress: Progress, unfinished: Unfinished = FRESH) -> Tensor:
        """Return the Gram matrix (M, M), float64."""
        source, size = self.source, len(self.source)
        layout = ["weights", *(group[0] for group in self.groups)]
        out, done = unfinished.start(layout, size, source.device)
        for i, group in enumerate(progress(self.groups, "Gram matrix, weight by weight")):
            if i < done:
                continue
            self.rows = None  # before the next are computed
            self.rows = source(list(range(size)), group)
            out = out + source.gram(self.rows, size)
            unfinished.keep(layout, i + 1, out)
        return out

    def combine(self, coefficients: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return the combinations (K, numel) of all rows with coefficients (M, K), by weight."""
        found: dict[str, Tensor] = {}
        for group in progress(self.groups[::-1], "Directions"):
            if self.rows is None or group is not self.groups[-1]:  # else they are still there
                self.rows = None
                self.rows = self.source(list(range(len(self.source))), group)
            sizes = {k: self.source.sizes[k] for k in group}
            found.update(_by_weight(self.source.combination(coefficients, self.rows), sizes))
        return found


Rows = KeptRows | SampleBlocks | WeightBlocks


def choose_rows(source: RowSource, budget: int, spill: Spill | None = None) -> Rows:
    """Decide how rows are held, so that they take ``budget`` bytes and are computed least often.

    The ranks of ``source`` must have the same budget.
    """
    size, row = _largest_share(source), source.row_bytes
    if size * row <= budget:
        return KeptRows(source)
    if spill is not None:
        return KeptRows(source, spill)
    capacity = max(2, budget // row)  # less than one row against another cannot be
    streamed = min(source.ranks.least(source.rows_per_call, "the size of blocks"), max(1, capacity // 4))
    samples = SampleBlocks(source, capacity - streamed, streamed)
    groups = _groups(source.sizes, budget // (size * source.dtype.itemsize)) if source.separable else []
    if not groups:
        return samples
    weights = WeightBlocks(source, groups)
    return weights if weights.cost < samples.cost else samples


def _groups(sizes: dict[str, int], capacity: int) -> list[list[str]]:
    """Put weights into groups of at most ``capacity`` numbers; no groups if one is larger."""
    if max(sizes.values()) > capacity:
        return []
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            groups.append([])
            room = capacity
        groups[-1].append(name)
        room -= size
    return groups


def _largest_share(source: RowSource) -> int:
    return source.ranks.lengths(len(source))[0]


def _by_weight(values: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    return dict(zip(sizes, values.split(list(sizes.values()), 1)))
