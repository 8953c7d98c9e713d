"""The state of a module that a call may change, which is noted before and put back after it."""

from __future__ import annotations

from collections import deque
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
        self._mappings: list[tuple[Any, dict[Any, Any]]] = []
        self._lists: list[tuple[Any, list[Any]]] = []
        for m in modules:
            attributes = vars(m)
            # Parameters and buffers are noted by themselves; submodules and hooks are left alone.
            own = [v for k, v in attributes.items() if type(v) in _CONTAINERS and k not in OF_TORCH]
            self._mappings += [(v, dict(v)) for v in (m._parameters, m._buffers, attributes)]
            self._mappings += [(v, dict(v)) for v in own if not isinstance(v, _LISTS)]
            self._lists += [(v, list(v)) for v in own if isinstance(v, _LISTS)]

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
        for mapping, before in self._mappings:
            # This is asked of every module at every call.
            if len(mapping) != len(before) or not all(map(is_, mapping.values(), before.values())):
                _restore_mapping(mapping, before)
        for values, old in self._lists:
            if len(values) != len(old) or not all(map(is_, values, old)):
                _restore_list(values, old)


def _set_training(m: nn.Module, training: bool) -> None:
    attributes = vars(m)
    if "training" in attributes:
        attributes["training"] = training  # nn.Module.__setattr__ takes ten times as long
    if m.training is not training:  # it is a property, or an attribute of C++
        m.training = training


def _restore_list(current: Any, before: list[Any]) -> None:
    if holds_tensors(current) or holds_tensors(before):
        current.clear()
        current.extend(before)


def _restore_mapping(current: Any, before: dict[Any, Any]) -> None:
    for key, value in list(current.items()):
        old = before.get(key, MISSING)
        if value is old or not (holds_tensors(value) or holds_tensors(old)):
            continue
        if old is MISSING:
            del current[key]
        else:
            current[key] = old
    current.update({k: v for k, v in before.items() if k not in current and holds_tensors(v)})
