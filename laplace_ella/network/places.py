r"""Where the tensors of a module are, found by one walk over it.

``named_parameters()`` and ``named_buffers()`` walk over all modules each, and hash every tensor by a function of Python; a
call of the model needs both, and the places of tied tensors too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

Named = TypeVar("Named")


@dataclass(frozen=True)
class Places:
    """The tensors of a module.

    Attributes
    ----------
    parameters, buffers : dict of Tensor
        By their first names, in the order of ``named_parameters()`` and ``named_buffers()``.
    holders : list of (mapping, str, str)
        All places: the mapping that holds a tensor, its key there, and the tensor's name. One that is tied has several.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    holders: list[tuple[MutableMapping[str, Any], str, str]] = field(default_factory=list)


def places_of(module: nn.Module) -> Places:
    """Return the tensors of a module, and where they are."""
    places, names = Places(), dict[int, str]()
    waiting: list[tuple[str, nn.Module]] = [("", module)]
    met = set[int]()
    while waiting:
        prefix, m = waiting.pop()
        if id(m) in met:
            continue
        met.add(id(m))
        of_kinds: Any = ((m._parameters, places.parameters), (m._buffers, places.buffers))
        for holder, found in of_kinds:
            for key, tensor in holder.items():
                if tensor is None:
                    continue
                name = names.get(id(tensor))
                if name is None:
                    name = names[id(tensor)] = prefix + key
                    found[name] = tensor
                places.holders.append((holder, key, name))
        if m._modules:
            children = [(f"{prefix}{key}.", child) for key, child in m._modules.items() if child is not None]
            waiting += reversed(children)
    return places


def named(names: Mapping[int, Named], values: Iterable[Any]) -> list[Named]:
    """Return, in their order, what the values in nested lists, tuples and dicts are named by their ids, if they are."""
    found = []
    for v in values:
        if id(v) in names:
            found.append(names[id(v)])
        elif isinstance(v, (list, tuple, dict)):
            found += named(names, v.values() if isinstance(v, dict) else v)
    return found
