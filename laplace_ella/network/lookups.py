r"""Lookups in embeddings, with one derivative in every mode.

Reverse mode leaves out the gradient of a padding row, by design: the row is a constant, wherever it
is looked up. Forward mode does not know of it. And ``scale_grad_by_freq`` divides gradients by how
often a token comes in the batch, which makes them no derivative of anything: neither of a row's
output nor of the batch's. Inside :class:`Lookups` both modes have the same: that of a lookup whose
padding row is constant, and without dividing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


class Lookups(TorchFunctionMode):
    """A mode in which padding rows of embeddings are constants, and frequencies change no gradient.

    Parameters
    ----------
    held : mapping of int to Tensor, optional
        The tensor that a padding row comes from, by the id of the tensor that is looked up in. By default it
        comes from the latter, which is right where the weights are those of the model.
    """

    def __init__(self, held: Mapping[int, Tensor] | None = None) -> None:
        super().__init__()
        self.held = held or {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        return func(*args, **(kwargs or {})) if rule is None else rule(self.held, *args, **(kwargs or {}))


def _without_frequencies(function: Callable[..., Tensor], args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a lookup by their names, such that no gradient is divided by a frequency."""
    return {**dict(zip(_NAMES[function], args)), **kwargs, "scale_grad_by_freq": False}


def _embedding(held: Mapping[int, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Compute :func:`torch.nn.functional.embedding`."""
    call = _without_frequencies(F.embedding, args, kwargs)
    weight, padding = call["weight"], call.get("padding_idx")
    # The padding row is named all the same: a sparse gradient then has no entries for it.
    out = F.embedding(**call)
    if padding is None:
        return out
    row, source = padding % len(weight), held.get(id(weight))
    constant = out.detach() if source is None else source[row].to(out.dtype)
    return torch.where((call["input"] == row).unsqueeze(-1), constant, out)


def _raw_embedding(
    held: Mapping[int, Tensor],
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Compute :func:`torch.embedding`, where negative numbers mean that there is no padding."""
    return _embedding(held, indices, weight, None if padding_idx < 0 else padding_idx, sparse=sparse)


def _embedding_bag(held: Mapping[int, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Compute :func:`torch.nn.functional.embedding_bag`, whose sums leave padding out by themselves."""
    return F.embedding_bag(**_without_frequencies(F.embedding_bag, args, kwargs))


_NAMES = {function: tuple(signature(function).parameters) for function in (F.embedding, F.embedding_bag)}
_RULES: dict[Any, Callable[..., Tensor]] = {
    F.embedding: _embedding,
    torch.embedding: _raw_embedding,
    F.embedding_bag: _embedding_bag,
}


def padding_rows(module: nn.Module) -> dict[str, int]:
    """Return which row of which weight is looked up as padding, and is used for nothing else.

    A weight that another layer shares (the head of a language model, say) is left out: its row has
    a gradient from there.
    """
    uses: dict[int, set[int | None]] = {}
    for m in module.modules():
        row = m.padding_idx if isinstance(m, _EMBEDDINGS) else None
        for p in m._parameters.values():
            uses.setdefault(id(p), set()).add(row)
    found = ((name, uses[id(p)]) for name, p in module.named_parameters())
    return {name: row for name, rows in found if len(rows) == 1 for row in rows if row is not None}


def without_padding(module: nn.Module) -> dict[str, int]:
    """Let embeddings forget their padding rows and frequencies; return which row of which weight they were.

    It is called between a forward pass and its backward pass: libraries have rules of their own for the
    gradients of embeddings, which know of neither. The forward pass itself may look at them.
    """
    found = {}
    for prefix, m in module.named_modules():
        if isinstance(m, nn.Embedding):
            m.scale_grad_by_freq = False
            if m.padding_idx is not None:
                found[f"{prefix}.weight" if prefix else "weight"], m.padding_idx = m.padding_idx, None
    return found
