r"""The data as a stream of batches, in which every input has a position among the data of all ranks.

What is drawn from the data (landmarks, curvature inputs, sampled labels) is a function of
these positions, so that it depends neither on batches nor on how the data are divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler

from ..parallel.ranks import ALONE, Ranks
from .batches import Input, batch_size, in_slices, input_digest, inputs_between
from .hashing import digest
from .loading import Prepare, named_batches, named_inputs
from .progress import Progress, no_progress

# Where it is not known how the data are divided, positions of rank r start at r times this.
RANK_STRIDE = 2**40


@dataclass(frozen=True)
class Batch:
    """A batch of inputs and targets.

    Attributes
    ----------
    name : str
        The name by which messages call it.
    positions : LongTensor (B,)
        The positions of its inputs in the data of all ranks.
    x : Input
    y : Tensor (B, ...)
    weights : Tensor (B, ...), optional
        Of the loss and curvature of each input, or of each of its positions.
    """

    name: str
    positions: Tensor
    x: Input
    y: Tensor
    weights: Tensor | None = None

    def digest(self) -> str:
        """Return a hash of inputs, targets and weights."""
        more = () if self.weights is None else (self.weights,)
        return digest(input_digest(self.x), self.y, *more)


class Stream:
    """The batches of a loader with the positions of their inputs, up to the number of inputs that is wanted.

    With a ``torch.utils.data.DistributedSampler``, the j-th input of rank r has the position r + j W on W
    ranks, and inputs that the sampler repeats to fill the last round are left out. With any other loader, also with
    a sampler of whole batches, the position of an input depends on r and j alone, and no two inputs share one.

    Parameters
    ----------
    loader : iterable
        The batches of this rank.
    dict_key_x, dict_key_y : str
    prepare : callable
        (inputs as the loader has them, how many there are) -> inputs that can be cut along the batch.
    ranks : Ranks
    progress : callable
    first_position : int
        How many inputs came before those of the loader.
    max_samples : int, optional
        How many inputs all ranks read together. The batch that completes them is cut, and is the last to be asked for.

    Raises
    ------
    ValueError
        If the loader's sampler is one for other ranks.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        dict_key_x: str,
        dict_key_y: str,
        prepare: Prepare,
        ranks: Ranks = ALONE,
        progress: Progress = no_progress,
        first_position: int = 0,
        max_samples: int | None = None,
    ) -> None:
        self.loader, self.progress = loader, progress
        self.keys, self.prepare = (dict_key_x, dict_key_y), prepare
        self.start, self.step = first_position + ranks.rank * RANK_STRIDE, 1
        self.limit = None if max_samples is None else ranks.lengths(max_samples)[ranks.rank]
        self.n_batches: int | None = None
        sampler, of_inputs = (None, False) if ranks.size == 1 else distributed_sampler(loader, ranks)
        if sampler is None:
            return
        size = len(sampler.dataset)  # type: ignore[arg-type]
        if of_inputs:
            self.start, self.step = first_position + ranks.rank, ranks.size
            wanted = size if max_samples is None else min(size, max_samples)
            self.limit = len(range(ranks.rank, wanted, ranks.size))
        else:  # the sampler deals batches, whose lengths are not known
            self.n_batches = len(range(ranks.rank, size, ranks.size))

    def batches(self, title: str) -> Iterator[Batch]:
        """Read the loader once; ``title`` is shown beside the progress bar.

        Raises
        ------
        ValueError
            If a batch has the wrong structure, or its inputs are not finite.
        """
        for first, (name, x, y, weights) in self._limited(named_batches, title, *self.keys):
            numbers = torch.arange(first, first + batch_size(x), dtype=torch.int64, device="cpu")
            yield Batch(name, self.start + self.step * numbers, x, y, weights)

    def parts(self, title: str, bounded: Callable[[Input], Iterable[Input]]) -> Iterator[Batch]:
        """Read the loader once, its batches cut by a function that returns the parts of an input in order."""
        for batch in self.batches(title):
            for i, x in in_slices(batch.x, bounded):
                weights = None if batch.weights is None else batch.weights[i]
                yield replace(batch, x=x, y=batch.y[i], positions=batch.positions[i], weights=weights)

    def inputs(self, title: str) -> Iterator[Input]:
        """Read the loader once, whose batches may be inputs without targets."""
        for _, (_, x) in self._limited(named_inputs, title, self.keys[0]):
            yield x

    def _limited(
        self, read: Callable[..., Iterable[Any]], title: str, *keys: str
    ) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Yield the number of a batch's first input with (name, inputs, ...), of no more inputs than wanted."""
        first = 0
        if self.limit == 0:
            return
        for name, x, *y in read(
            islice(self.progress(self.loader, title), self.n_batches), *keys, self.prepare
        ):
            stop = first + batch_size(x)
            if self.limit is not None and stop > self.limit:
                size, stop = self.limit - first, self.limit
                x, y = inputs_between(x, 0, size), [None if t is None else t[:size] for t in y]
            yield first, (name, x, *y)
            first = stop
            if first == self.limit:
                return


def distributed_sampler(loader: Any, ranks: Ranks) -> tuple[DistributedSampler[Any] | None, bool]:
    """Return the DistributedSampler by which a loader reads in order, if any, and whether it deals inputs, not batches.

    Raises
    ------
    ValueError
        If the sampler is one for other ranks.
    """
    batch_sampler: Any = getattr(loader, "batch_sampler", None)
    of_inputs = type(batch_sampler) is BatchSampler
    sampler = batch_sampler.sampler if of_inputs else getattr(loader, "sampler", None)
    in_order = getattr(loader, "in_order", True)
    if type(sampler) is not DistributedSampler or not in_order or not (of_inputs or batch_sampler is None):
        return None, False
    if (sampler.num_replicas, sampler.rank) != (ranks.size, ranks.rank):
        raise ValueError(
            f"The loader's DistributedSampler is for rank {sampler.rank} of {sampler.num_replicas}, and this is rank "
            f"{ranks.rank} of {ranks.size}. Build it from the same process group, or pass process_group=None to fit in "
            "this process alone."
        )
    return sampler, of_inputs
