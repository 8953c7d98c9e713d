r"""Where the inputs of a batch are in a tensor: its first axis, its second, or a part of the first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the inputs of a batch are in a tensor.

    Attributes
    ----------
    kind : {"first", "second", "outer", "inner"}
        The first axis, the second one, or a part of the first: that of the longer or the shorter stride.
    length : int
        Of the other part of the first axis.
    """

    kind: str
    length: int = 1

    def size(self, t: Tensor) -> int:
        """Return B; -1 if there is none in such a tensor."""
        axis = 1 if self.kind == "second" else 0
        if t.ndim <= axis or t.shape[axis] % self.length:
            return -1
        return t.shape[axis] // self.length

    def batch_first(self, t: Tensor, axis: int = 0) -> Tensor:
        """Bring the batch axis to the front, ``axis`` axes before it left alone."""
        if self.kind == "first":
            return t
        if self.kind == "second":
            return t.transpose(axis, axis + 1)
        if self.kind == "outer":
            return t.unflatten(axis, (-1, self.length))
        return t.unflatten(axis, (self.length, -1)).transpose(axis, axis + 1)


FIRST = Layout("first")


def layout_of(t: Tensor, size: int) -> Layout | None:
    """Say where the inputs are in a tensor made of a batch of one input ``size`` times, if that is clear."""
    if t.ndim and t.shape[0] == size:
        return FIRST
    if t.ndim > 1 and t.shape[1] == size:
        return Layout("second")
    if not t.ndim or t.shape[0] % size:
        return None
    length = t.shape[0] // size
    found = [
        Layout(kind, length)
        for kind in ("outer", "inner")
        if _same_inputs(Layout(kind, length).batch_first(t.detach()))
    ]
    return found[0] if len(found) == 1 else None


def _same_inputs(t: Tensor) -> bool:
    return bool(((t - t[:1]).abs().max() <= 1e-3 * t.abs().max()).all()) if t.numel() else False
