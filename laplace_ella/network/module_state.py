"""The state of a module that a call may change, which is noted before and put back after it."""

from __future__ import annotations

from collections import deque
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import nn

from .caches import MAPPINGS, MISSING, OF_TORCH, holds_tensors
from .places import entries_of

_LISTS = (list, deque)
_CONTAINERS = frozenset([*MAPPINGS, *_LISTS])
_TENSORS = attrgetter("_parameters", "_buffers")


class ModuleState:
    """Training flags of modules, and the tensors they hold: parameters, buffers, attributes, and those in containers.

    Tensors are noted as the very objects that they are, so that putting them back needs no copy of them.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        # All of this is asked of every module at every call.
        self._training = [(m, m.training) for m in modules]
        attributes = list(map(vars, modules))
        # Parameters and buffers are noted by themselves; submodules and hooks are left alone.
        own = [a[k] for a in attributes for k in {*a} - OF_TORCH]
        containers = [v for v in own if type(v) in _CONTAINERS]
        mappings = [*chain.from_iterable(map(_TENSORS, modules)), *attributes]
        mappings += [v for v in containers if not isinstance(v, _LISTS)]
        self._mappings: list[tuple[Any, dict[Any, Any]]] = list(zip(mappings, map(dict, mappings)))
        self._lists = [(v, list(v)) for v in containers if isinstance(v, _LISTS)]

    def evaluate(self) -> None:
        """Switch to evaluation mode.

        The flag itself, not ``.eval()``: modules may override ``train()`` with side effects
        (LoRA layers merge their weights there), and each keeps its own flag.
        """
        for m, training in self._training:
            if training is not False:
                _set_training(m, False)

    def restore(self) -> None:
        """Take out the tensors that came in, and put back those that went; all else stays, such as counts."""
        for m, training in self._training:
            if m.training is not training:
                _set_training(m, training)
        now, before = zip(*self._mappings)
        if list(map(len, now)) != list(map(len, before)) or not all(
            map(is_, entries_of(now), entries_of(before))
        ):
            for mapping, old in self._mappings:
                _restore_mapping(mapping, old)
        for values, kept in self._lists:
            if len(values) != len(kept) or not all(map(is_, values, kept)):
                _restore_list(values, kept)


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
