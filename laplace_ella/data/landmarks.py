r"""Drawing landmarks and curvature inputs from a stream: bottom-k sampling by hash.

Every input of the data gets a key, a hash of (seed, purpose, position in the stream);
the k inputs with the smallest keys are a uniform sample without replacement. One pass
suffices, the size of the data need not be known, and the result depends neither on
the batch size nor on the machine.

A *scheme* is a function that gives keys to the inputs of a batch, and may divide them into groups:
:func:`uniform` and :func:`balanced` are two.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .batches import Input, Raw, batch_size, check_finite, raw_size, single_input
from .checks import shown
from .hashing import LANDMARK_INPUT, LANDMARK_OUTPUT, LANDMARK_PAIR, hash_keys
from .stream import Batch

# (key, position, group)
Entry = tuple[int, int, int]
# (batch, seed) -> keys (B,), and groups (B,) or None for a single group. Of all inputs, those with the smallest
# keys are kept, evenly over the groups. Keys depend on the seed, the positions and the inputs alone.
Scheme = Callable[[Batch, int], tuple[Tensor, "Sequence[int] | None"]]


# How many pairs of an input and an output are looked at together.
PAIRS_AT_ONCE = 2**22


class BottomK:
    """A sample of fixed size from a stream: the smallest keys, evenly over groups.

    With one group it is a uniform sample. With several, items are given up from the
    largest group first, so that the groups end up as equal as their sizes allow:
    all of a small group, and what remains shared among the others.

    Parameters
    ----------
    capacity : int
        How many items to keep.

    Notes
    -----
    The items in the order of their keys are nested samples: the first n of them are a
    uniform sample of size n.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._heaps: dict[int, list[tuple[int, int]]] = {}  # group -> [(-key, position)]
        self._items: dict[int, tuple[int, Any]] = {}  # position -> (group, item)

    @classmethod
    def of(cls, capacity: int, entries: Iterable[Entry], items: Mapping[int, Any]) -> BottomK:
        """Return a sample of items that are given by their positions."""
        sample = cls(capacity)
        for entry in entries:
            sample._insert(entry, partial(items.__getitem__, entry[1]))
        return sample

    def offer(
        self, positions: Tensor, keys: Tensor, groups: Sequence[int] | None, item: Callable[[int], Any]
    ) -> None:
        """Offer items; ``item(i)`` is called for the i-th only if it is kept for now.

        Parameters
        ----------
        positions : LongTensor (B,)
        keys : Tensor (B,)
        groups : sequence of int (B,), optional
            With None, all items belong to one group.
        item : callable
        """
        labels = [0] * len(positions) if groups is None else groups
        for i, entry in enumerate(zip(keys.tolist(), positions.tolist(), labels)):
            self._insert(entry, partial(item, i))

    def _insert(self, entry: Entry, item: Callable[[], Any]) -> None:
        if not self.capacity:
            return
        key, position, group = entry
        heap = self._heaps.setdefault(group, [])
        heapq.heappush(heap, (-key, position))
        if len(self._items) == self.capacity:
            # Ties go to the largest label, always: a group once cut back never grows again.
            largest = max(self._heaps, key=lambda g: (len(self._heaps[g]), g))
            _, dropped = heapq.heappop(self._heaps[largest])
            if dropped == position:
                return
            self._items.pop(dropped, None)
        self._items[position] = (group, item())

    def entries(self) -> list[Entry]:
        """Return (key, position, group) of the items kept, from the smallest key on."""
        return sorted((-key, p, group) for group, heap in self._heaps.items() for key, p in heap)

    def row(self, position: int) -> Any:
        """Return the item kept of a position."""
        return self._items[position][1]

    def positions(self) -> list[int]:
        """Return the positions of the items kept, ascending."""
        return sorted(self._items)

    def items(self) -> list[Any]:
        """Return the items kept, in the order of the stream."""
        return [self._items[p][1] for p in self.positions()]

    def groups(self) -> list[int]:
        """Return the group of each item kept, in the order of the stream."""
        return [self._items[p][0] for p in self.positions()]


@dataclass(frozen=True)
class Landmarks:
    """M pairs of an input and one of its outputs.

    Attributes
    ----------
    inputs : sequence of inputs
        M batches of one input (the same object may occur several times).
    outputs : LongTensor (M,)
    positions : sequence of int, optional
        Where the inputs stood in the training data; None if they were given.
    """

    inputs: Sequence[Input]
    outputs: Tensor
    positions: Sequence[int] | None = None

    def names(self, indices: Sequence[int]) -> str:
        """Name the inputs of some landmarks, for error messages."""
        if self.positions is None:
            return f"{list(indices)[:8]} of those given"
        return f"drawn from training inputs {[self.positions[i] for i in indices][:8]}"

    def __len__(self) -> int:
        return len(self.inputs)


# ---------------------------------------------------------------------- drawn landmarks


def uniform(batch: Batch, seed: int) -> tuple[Tensor, None]:
    """Give every input the same chance."""
    return hash_keys(seed, LANDMARK_INPUT, batch.positions), None


def balanced(batch: Batch, seed: int) -> tuple[Tensor, list[int]]:
    """Draw the same number of inputs of each class, as far as there are so many.

    Raises
    ------
    ValueError
        If there is not one target for each input.
    """
    y, n_inputs = batch.y, batch_size(batch.x)
    if len(y) != n_inputs:
        raise ValueError(
            f"balanced=True needs one class for each input; got {len(y)} targets for {n_inputs} inputs. Leave it out."
        )
    return uniform(batch, seed)[0], (y if y.ndim == 1 else y.argmax(-1)).tolist()


def offer_inputs(
    sample: BottomK,
    batch: Batch,
    n_coordinates: int,
    scheme: Scheme,
    seed: int,
    counted: Tensor | None = None,
) -> None:
    """Offer a batch's inputs, each with the number L x C of its outputs, to a sample of landmark inputs.

    Parameters
    ----------
    batch : Batch
        Its targets have been checked.
    counted : BoolTensor (B,), optional
        Which inputs have a target that counts; the others are not offered. Default: all.
    """
    if not sample.capacity:
        return
    keys, groups = scheme(batch, seed)
    rows = list(range(len(keys))) if counted is None else counted.nonzero()[:, 0].tolist()
    some = None if groups is None else [groups[i] for i in rows]
    sample.offer(
        batch.positions[rows], keys[rows], some, lambda i: (single_input(batch.x, rows[i]), n_coordinates)
    )


def draw_outputs(sample: BottomK, seed: int) -> Landmarks:
    r"""Give each sampled input an output coordinate, uniformly over its L x C outputs.

    While the sample is full, inputs are distinct. If the data ended before (M > N),
    M of the N x C pairs are drawn without replacement and evenly over the groups of the sample,
    so that an input may occur with several of its outputs; all pairs are taken where there are no more than M.

    Parameters
    ----------
    sample : BottomK
        Its items are pairs (input, how many outputs it has); its capacity is M.

    Returns
    -------
    Landmarks
        M pairs, or as many as there are.
    """
    positions = sample.positions()
    inputs = [x for x, _ in sample.items()]
    counts = torch.tensor([n for _, n in sample.items()], dtype=torch.int64, device="cpu")
    if len(inputs) == sample.capacity:
        keys = hash_keys(seed, LANDMARK_OUTPUT, torch.tensor(positions, dtype=torch.int64, device="cpu"))
        return Landmarks(inputs, keys % counts, positions)
    pairs, ends = _drawn_pairs(counts, sample, seed), counts.cumsum(0)
    source = torch.searchsorted(ends, pairs, right=True)
    outputs, picked = pairs - (ends - counts)[source], source.tolist()
    return Landmarks([inputs[i] for i in picked], outputs, [positions[i] for i in picked])


def _drawn_pairs(counts: Tensor, sample: BottomK, seed: int) -> Tensor:
    """Draw M of all pairs of an input and an output, counted through: images have 10^6 each.

    Only those are offered that are among the M smallest keys of their group within some millions of pairs.
    """
    chosen, ends, capacity = BottomK(sample.capacity), counts.cumsum(0), sample.capacity
    of_inputs = torch.tensor(sample.groups(), dtype=torch.int64, device="cpu")
    total = int(counts.sum())
    for start in range(0, total, PAIRS_AT_ONCE):
        pairs = torch.arange(start, min(start + PAIRS_AT_ONCE, total), dtype=torch.int64, device="cpu")
        keys = hash_keys(seed, LANDMARK_PAIR, pairs)
        groups = of_inputs[torch.searchsorted(ends, pairs, right=True)]
        for group in groups.unique().tolist():
            own = (groups == group).nonzero()[:, 0]
            own = own[keys[own].topk(min(capacity, len(own)), largest=False).indices]
            some = pairs[own].tolist()
            chosen.offer(pairs[own], keys[own], [group] * len(own), some.__getitem__)
    return torch.tensor(chosen.items(), dtype=torch.int64, device="cpu")


# ---------------------------------------------------------------------- given landmarks


def check_landmarks(landmarks: Any, dict_key_x: str) -> tuple[Raw, Tensor]:
    """Require a pair of M finite inputs and a LongTensor (M,), and return it."""
    valid = isinstance(landmarks, (tuple, list)) and len(landmarks) == 2
    if not valid or not isinstance(landmarks[0], (Tensor, Mapping)) or not isinstance(landmarks[1], Tensor):
        raise ValueError(
            "landmarks must be a pair (inputs, outputs): one batch of M inputs, and a LongTensor (M,) with "
            f"the output coordinate of each; got {shown(landmarks)}."
        )
    inputs, outputs = landmarks
    if outputs.dtype != torch.int64 or outputs.ndim != 1 or not len(outputs):
        raise ValueError(
            f"The outputs of landmarks must be a LongTensor of shape (M,); got {shown(outputs)}."
        )
    check_finite(inputs, "The inputs of landmarks")
    size = raw_size(inputs, dict_key_x, len(outputs))
    if size != len(outputs):
        raise ValueError(f"landmarks must hold as many inputs as outputs; got {size} and {len(outputs)}.")
    return inputs, outputs


def check_coordinates(outputs: Tensor, n_outputs: int) -> None:
    """Require output coordinates that exist."""
    if int(outputs.min()) < 0 or int(outputs.max()) >= n_outputs:
        raise ValueError(
            f"The outputs of landmarks must lie in 0..{n_outputs - 1}; got {int(outputs.min())}..{int(outputs.max())}."
        )


def explicit_landmarks(given: tuple[Input, Tensor]) -> Landmarks:
    """Return the landmarks of a pair of M inputs and a LongTensor (M,)."""
    inputs, outputs = given
    return Landmarks([single_input(inputs, i) for i in range(len(outputs))], outputs.cpu())
