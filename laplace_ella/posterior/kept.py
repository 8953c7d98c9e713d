r"""What a posterior keeps between calls, with what it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..nystrom.caching import Kept, keep


class Memory:
    """Values by name, each computed again if what it was made of has changed, also in place.

    What one thread computes from its values serves no other values: each entry holds its own.
    """

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy computes everything again

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    def __call__(
        self, name: str, compute: Callable[[], Any], small: Iterable[Any], large: Iterable[Tensor] = ()
    ) -> Any:
        """Return what was computed before from the same values (small) and tensors (large), or compute it."""
        found = self._kept.get(name)
        if found is None or not found.is_of(small, large):
            # Before the work: what changes meanwhile is not what it is made of.
            made_of = keep(None, small, large)
            self._kept[name] = found = replace(made_of, value=compute())
        return found.value
