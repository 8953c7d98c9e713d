r"""Lists with one value for each input (lengths, strings, arrays), which are no tensors and cannot be cut.

A model uses such a list if its outputs change when the values change places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from .batches import Path, is_container, items, leaves, like, rebuilt


def input_lists(x: Any, size: int, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield lists, tuples and arrays of ``size`` values that are not all the same and hold no tensor of that length.

    Parameters
    ----------
    x : container
    size : int
        How many inputs there are.
    """
    for key, value in items(x):
        here = (*path, key)
        if isinstance(value, np.ndarray) and value.ndim and len(value) == size:
            if not (value == value[:1]).all():
                yield here, value
        elif is_container(value):
            if not isinstance(value, Mapping) and len(value) == size and not _holds_inputs(value, size):
                if not all(_same(v, value[0]) for v in value):
                    yield here, value
            else:
                yield from input_lists(value, size, here)


def rotated(x: Any, path: Path) -> Any:
    """Return a container in which the values of one list have moved on by one place."""
    return rebuilt(x, lambda here, value: _moved_on(value) if here == path else value)


def _moved_on(values: Any) -> Any:
    if isinstance(values, np.ndarray):
        return np.roll(values, 1, 0)
    return like(values, dict(enumerate([values[-1], *values[:-1]])))


def _holds_inputs(value: Any, size: int) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size for _, leaf in leaves(value))


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return left is right
    equal = left == right
    return bool(equal.all()) if isinstance(equal, np.ndarray) else bool(equal)
