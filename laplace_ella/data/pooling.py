r"""One sample from the samples of all ranks, and which rank gets which of its items.

The smallest keys of all ranks are among the smallest of each. So the ranks tell each other their keys
first, and then send only those items that stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..parallel.ranks import Ranks
from .batches import Input
from .landmarks import BottomK
from .packing import packed, unpacked


@dataclass(frozen=True)
class Dealt:
    """The part of a sample of inputs with weights that this rank has, in the order of the keys.

    Attributes
    ----------
    size : int
        n, the size of the whole sample.
    rows : list of (index, position, (input, weights or None))
        Each has its index in the whole sample, of which every rank holds every W-th input.
    """

    size: int
    rows: list[tuple[int, int, tuple[Input, Tensor | None]]]


def pooled(sample: BottomK, ranks: Ranks) -> BottomK:
    """Return the sample of the data of all ranks, items (input, number of outputs) included, on every rank."""
    if ranks.size == 1:
        return sample
    whole = _winners(sample, ranks)
    with ranks.together("the choice of landmarks"):
        example = sample.items()[0][0] if sample.positions() else None
        own = [p for p in whole.positions() if whole.row(p) == ranks.rank]
        sent = {p: (packed(x), n) for p in own for x, n in [sample.row(p)]}
    everyone = ranks.gathered(sent, "the choice of landmarks")
    pairs = {p: (unpacked(x, example), n) for theirs in everyone for p, (x, n) in theirs.items()}
    return BottomK.of(sample.capacity, whole.entries(), pairs)


def dealt(sample: BottomK, ranks: Ranks) -> Dealt:
    """Return this rank's part of the sample (of inputs) of all ranks."""
    whole = sample if ranks.size == 1 else _winners(sample, ranks)
    order = [(i, p) for i, (_, p, _) in enumerate(whole.entries())]
    if ranks.size == 1:
        return Dealt(len(order), [(i, p, sample.row(p)) for i, p in order])
    with ranks.together("the choice of curvature inputs"):
        example = sample.items()[0][0] if sample.positions() else None
        sent: list[dict[int, Any]] = [{} for _ in range(ranks.size)]
        for i, p in order:
            if whole.row(p) == ranks.rank:
                x, weights = sample.row(p)
                sent[i % ranks.size][p] = packed(x), weights
    received = ranks.exchanged(sent, "the choice of curvature inputs")
    inputs = {p: (unpacked(x, example), w) for theirs in received for p, (x, w) in theirs.items()}
    return Dealt(len(order), [(i, p, inputs[p]) for i, p in order[ranks.turns()]])


def _winners(sample: BottomK, ranks: Ranks) -> BottomK:
    """Return the sample of all ranks, with the rank that has it in place of each item."""
    found = ranks.gathered(sample.entries(), "the choice of a sample")
    owners = {p: rank for rank, entries in enumerate(found) for _, p, _ in entries}
    return BottomK.of(sample.capacity, [entry for entries in found for entry in entries], owners)
