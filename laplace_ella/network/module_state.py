"""What a call may change of a module, noted and put back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from operator import is_
from typing import Any

from torch import nn

_MISSING = object()


class Watch:
    """A forward hook of this package: one that was left behind can be told from the user's."""

    def __init__(self, calls: list[tuple[nn.Module, Any, Any]]) -> None:
        self.calls = calls

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        """Keep the call."""
        self.calls.append((module, args, out))


class ModuleState:
    """Parameters, buffers and training flags of modules.

    They are noted as the very objects that they are, so that putting them back needs no copy of them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._noted = [
            (m, m.training, dict(m._parameters), dict(m._buffers), list(m._forward_hooks)) for m in modules
        ]

    def evaluate(self) -> None:
        """Switch to evaluation mode.

        The flag itself, not ``.eval()``: modules may override ``train()`` with side effects
        (LoRA layers merge their weights there), and each keeps its own flag.
        """
        for m, *_ in self._noted:
            _set_training(m, False)

    def restore(self) -> None:
        """Put everything back; may be run again where it was cut short."""
        for m, training, parameters, buffers, hooks in self._noted:
            _set_training(m, training)
            _put_back(m._parameters, parameters)
            _put_back(m._buffers, buffers)
            if len(m._forward_hooks) > len(hooks):
                _remove_watches(m, hooks)


def _set_training(m: nn.Module, training: bool) -> None:
    attributes = vars(m)
    if "training" in attributes:
        attributes["training"] = training  # nn.Module.__setattr__ takes ten times as long
    if m.training is not training:  # a property, or an attribute of C++
        m.training = training


def _put_back(current: MutableMapping[str, Any], before: Mapping[str, Any]) -> None:
    if _same(current, before):
        return
    for name in [k for k in current if k not in before]:
        del current[name]
    for name, value in before.items():
        if current.get(name, _MISSING) is not value:
            current[name] = value


def _same(current: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    return len(current) == len(before) and all(map(is_, current.values(), before.values()))


def _remove_watches(m: nn.Module, hooks: list[int]) -> None:
    for number, hook in list(m._forward_hooks.items()):
        if number not in hooks and isinstance(hook, Watch):
            del m._forward_hooks[number]
