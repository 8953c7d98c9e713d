r"""Values computed from weights, and kept beside them by modules.

While other weights stand in the module's places, such a value would be that of the
wrong weights; and one that is computed then would stay behind, belonging to a
transform that has ended.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from inspect import getattr_static
from types import MethodType
from typing import Any

from torch import Tensor, nn

MAPPINGS = (dict, OrderedDict, defaultdict)
OF_TORCH = frozenset(vars(nn.Module()))  # parameters, buffers, submodules and hooks are cared for elsewhere
MISSING = object()


def holds_tensors(value: Any, depth: int = 4) -> bool:
    """Tell whether a value is a tensor, or a container of Python's own that holds one."""
    if isinstance(value, (dict, list, tuple, deque)):
        inner = value.values() if isinstance(value, dict) else value
        return depth > 0 and any(holds_tensors(v, depth - 1) for v in inner)
    return isinstance(value, Tensor)


@contextmanager
def caches_emptied(module: nn.Module) -> Iterator[list[str]]:
    """Take from modules what they may have computed and kept; yield the names of the attributes.

    These are tensors that are neither parameters nor buffers, tensors in dicts, and the values of methods under
    ``functools.lru_cache``.
    """
    names: list[str] = []
    before = [(vars(m), dict(vars(m))) for m in module.modules()]
    try:
        for prefix, m in module.named_modules():
            attributes = vars(m)
            changes = {**_without_tensors(attributes, type(m)), **_uncached_methods(m)}
            names += [f"{prefix}.{k}" if prefix else k for k in changes]
            attributes.update(changes)
            for k in [k for k, v in changes.items() if v is MISSING]:
                del attributes[k]
        yield names
    finally:
        for attributes, values in before:
            for k in [k for k in attributes if k not in values]:
                del attributes[k]
            attributes.update(values)


def _without_tensors(attributes: dict[str, Any], kind: type) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name, value in attributes.items():
        if name in OF_TORCH or not holds_tensors(value):
            continue
        if getattr_static(kind, name, MISSING) is not MISSING:
            # This uncovers the class's value, or has a cached property computed again.
            changes[name] = MISSING
        elif isinstance(value, Tensor):
            changes[name] = None
        elif type(value) in MAPPINGS:
            changes[name] = copy(value)
            for key in [k for k, v in value.items() if holds_tensors(v)]:
                del changes[name][key]
    return changes


def _uncached_methods(module: nn.Module) -> dict[str, Any]:
    methods: dict[str, Any] = {k: getattr_static(module, k, None) for k in dir(type(module))}
    return {
        k: MethodType(v.__wrapped__, module)
        for k, v in methods.items()
        if hasattr(v, "cache_info") and hasattr(v, "__wrapped__") and v.cache_info().currsize
    }
