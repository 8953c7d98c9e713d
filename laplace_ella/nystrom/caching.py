r"""Values that are computed once, and checked before they are used again: users can change tensors in place.

Small tensors are compared with copies, which finds every change. Of large ones the count of
writes is compared that PyTorch keeps of each tensor, which misses writes through ``.data``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """A value, and what it was made of.

    Attributes
    ----------
    value : Any
    small : tuple
        Copies of tensors, and plain values.
    large : tuple of (Tensor, int)
        Tensors, each with the count of its writes.
    """

    value: Any
    small: tuple[Any, ...]
    large: tuple[tuple[Tensor, int], ...]

    def is_of(self, small: Iterable[Any] = (), large: Iterable[Tensor] = ()) -> bool:
        """Tell whether the value was made of the same; NaN is never the same."""
        found = [(t, _writes(t)) for t in large]
        same = (a is b and m == n for (a, m), (b, n) in zip(self.large, found))
        return len(found) == len(self.large) and all(same) and all(map(_equal, self.small, small))


def keep(value: Any, small: Iterable[Any] = (), large: Iterable[Tensor] = ()) -> Kept:
    """Keep a value with what it was made of."""
    copies = tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in small)
    return Kept(value, copies, tuple((t, _writes(t)) for t in large))


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and left.device == right.device and torch.equal(left, right)
    return type(left) is type(right) and bool(left == right)


def _writes(tensor: Tensor) -> int:
    """Return how often a tensor was written to; 0 for those of ``inference_mode``, of which no writes are counted."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def outside_inference() -> Iterator[None]:
    """Make tensors that a graph may hold later, where the user has ``inference_mode`` on, and record none now."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def without_inference(value: Any) -> Any:
    """Return a value in which tensors made under ``inference_mode`` are copied; the rest is as it is.

    It has to be called within :func:`outside_inference`.
    """
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {k: without_inference(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_inference(v) for v in value)
    return value
