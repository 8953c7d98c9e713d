r"""Inputs as tensors and plain types: what can be kept in a checkpoint, or sent to other processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .batches import Input, Nested, Slot, at_positions, is_container, is_plain, items, leaves, like, name_of

# The names of the kinds of containers, each with its type and an empty one.
_KINDS: dict[str, tuple[type, Any]] = {"mapping": (Mapping, {}), "list": (list, []), "tuple": (tuple, ())}


def packed(x: Input) -> Any:
    """Return an input as tensors and plain types: on the CPU, without graphs, each tensor in a storage of its own size.

    Raises
    ------
    ValueError
        If a container holds anything else.
    """
    if isinstance(x, Tensor):
        return _own(x)
    foreign = [name_of(path) for path, leaf in x.shared() if not is_plain(leaf)]
    foreign += [name_of(path) for path in x.paths if not all(map(is_plain, path))]
    if foreign:
        raise ValueError(
            f"The inputs hold objects other than tensors and plain Python types under {foreign}, which can neither be sent "
            "to other processes nor kept in a checkpoint. Convert them in the data set."
        )
    found = {"rows": [_own(t) for t in x.cut], "template": _plain(x.template)}
    return {**found, "picked": True} if x.picked else found


def _own(tensor: Tensor) -> Tensor:
    moved = tensor.detach().cpu()
    n_bytes = moved.numel() * moved.element_size()
    return moved if moved.untyped_storage().nbytes() == n_bytes else moved.clone()


def _plain(value: Any) -> dict[str, Any]:
    """Write a template as plain types."""
    if isinstance(value, Slot):
        return {"slot": value.index}
    if not is_container(value):
        return {"leaf": _own(value) if isinstance(value, Tensor) else value}
    kind = next(name for name, (base, _) in _KINDS.items() if isinstance(value, base))
    return {kind: [(key, _plain(entry)) for key, entry in items(value)]}


def unpacked(found: Any, example: Input | None) -> Input:
    """Return a packed input with the types of containers, and on the devices, that an example has."""
    if isinstance(found, Tensor):
        return _beside(found, example)
    template = _of_plain(found["template"], example.template if isinstance(example, Nested) else None)
    paths = {leaf.index: path for path, leaf in leaves(template) if isinstance(leaf, Slot)}
    device = example.cut[0].device if isinstance(example, Nested) else torch.device("cpu")
    cut, picked = tuple(t.to(device) for t in found["rows"]), found.get("picked", False)
    whole = cut[:-1] if picked else cut
    x = Nested(whole, tuple(paths[i] for i in range(len(whole))), template)
    return at_positions(x, cut[-1]) if picked else x


def _of_plain(found: dict[str, Any], example: Any) -> Any:
    ((kind, value),) = found.items()
    if kind == "slot":
        return Slot(value)
    if kind == "leaf":
        return _beside(value, example)
    known = dict(items(example)) if is_container(example) else {}
    entries = {key: _of_plain(entry, known.get(key)) for key, entry in value}
    base, empty = _KINDS[kind]
    return like(example if isinstance(example, base) else empty, entries)


def _beside(value: Any, example: Any) -> Any:
    both = isinstance(value, Tensor) and isinstance(example, Tensor)
    return value.to(example.device) if both else value
