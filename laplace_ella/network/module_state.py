"""The state of a module that a call may change, which is noted before and put back after it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from operator import is_
from typing import Any

from torch import nn

from .caches import MAPPINGS, MISSING, OF_TORCH, holds_tensors

_LISTS = (list, deque)
_CONTAINERS = frozenset([*MAPPINGS, *_LISTS])


class ModuleState:
    """Training flags of modules, and the tensors they hold: parameters, buffers, attributes, and those in containers.

    Tensors are noted as the very objects that they are, so that putting them back needs no copy of them.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._training = [(m, m.training) for m in modules]
        self._holders: list[tuple[Any, Any]] = [
            (holder, list(holder) if isinstance(holder, _LISTS) else dict(holder))
            for m in modules
            for holder in _holders(m)
        ]

    def evaluate(self) -> None:
        """Switch to evaluation mode.

        The flag itself, not ``.eval()``: modules may override ``train()`` with side effects
        (LoRA layers merge their weights there), and each keeps its own flag.
        """
        for m, _ in self._training:
            _set_training(m, False)

    def restore(self) -> None:
        """Take out the tensors that came in, and put back those that went; all else stays, such as counts."""
        for m, training in self._training:
            _set_training(m, training)
        for holder, before in self._holders:
            if isinstance(holder, _LISTS):
                _restore_list(holder, before)
            else:
                _restore_mapping(holder, before)


def _holders(m: nn.Module) -> Iterator[Any]:
    """Yield whatever of a module can hold tensors."""
    attributes = vars(m)
    yield from (m._parameters, m._buffers, attributes)
    # Parameters and buffers are noted by themselves; submodules and hooks are left alone.
    yield from (v for k, v in attributes.items() if k not in OF_TORCH and type(v) in _CONTAINERS)


def _set_training(m: nn.Module, training: bool) -> None:
    attributes = vars(m)
    if "training" in attributes:
        attributes["training"] = training  # nn.Module.__setattr__ takes ten times as long
    if m.training is not training:  # it is a property, or an attribute of C++
        m.training = training


def _restore_list(current: Any, before: list[Any]) -> None:
    if not _same(current, before) and (holds_tensors(current) or holds_tensors(before)):
        current.clear()
        current.extend(before)


def _restore_mapping(current: Any, before: dict[Any, Any]) -> None:
    if _same(current.values(), before.values()):
        return
    for key, value in list(current.items()):
        old = before.get(key, MISSING)
        if value is old or not (holds_tensors(value) or holds_tensors(old)):
            continue
        if old is MISSING:
            del current[key]
        else:
            current[key] = old
    current.update({k: v for k, v in before.items() if k not in current and holds_tensors(v)})


def _same(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(map(is_, left, right))
