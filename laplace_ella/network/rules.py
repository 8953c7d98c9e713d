r"""Which uses of weights a call of torch's functions consists of: one rule for each function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cache
from inspect import signature
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .calls import REPEATING
from .context import Context, Rule, UnknownUseError, bias_of
from .convolutions import CONVOLUTIONS, convolution, transposed_convolution
from .uses import Elementwise, Lookup, Product, Use


def _matrix(context: Context, slot: str, x: Tensor, weight: Tensor, transposed: bool) -> Product:
    """Return the use of a matrix (O, J), or (J, O) if ``transposed``, by a linear layer with input (..., J)."""
    a = context.layout.batch_first(x.detach())
    size, j, o = a.shape[0], a.shape[-1], weight.numel() // max(1, a.shape[-1])
    positions = math.prod(a.shape[1:-1])

    def matrix(v: Tensor) -> Tensor:
        found = v.reshape(-1, j, o).transpose(1, 2).contiguous() if transposed else v.reshape(-1, o, j)
        return found[:, None]

    def back(g: Tensor) -> Tensor:
        g = g.squeeze(-3)
        return (g.transpose(-1, -2) if transposed else g).reshape(*g.shape[:-2], *weight.shape)

    return Product(
        slot,
        lambda: a.reshape(size, positions, 1, j),
        lambda g: context.batch_first(g).reshape(len(g), size, positions, 1, o),
        (positions, 1, o, j),
        matrix,
        back,
    )


def _linear(context: Context, x: Tensor, weight: Tensor, bias: Any = None) -> tuple[Tensor, list[Use]]:
    w, b = context.slot(weight), context.slot(bias)
    if context.slot(x):
        raise UnknownUseError
    uses: list[Use] = [_matrix(context, w, x, weight, transposed=False)] if w else []
    return F.linear(x, weight, bias), uses + ([bias_of(context, b, bias)] if b else [])


def _matmul(context: Context, x: Tensor, other: Tensor) -> tuple[Tensor, list[Use]]:
    if context.slot(x) or other.ndim > 2 or x.ndim < 2:
        raise UnknownUseError
    slot = context.slot(other)
    assert slot is not None
    return torch.matmul(x, other), [_matrix(context, slot, x, other, transposed=True)]


def _addmm(
    context: Context, bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1
) -> tuple[Tensor, list[Use]]:
    if beta != 1 or alpha != 1 or context.slot(x) or bias.ndim != 1:
        raise UnknownUseError
    w, b = context.slot(weight), context.slot(bias)
    uses: list[Use] = [_matrix(context, w, x, weight, transposed=True)] if w else []
    return torch.addmm(bias, x, weight), uses + ([bias_of(context, b, bias)] if b else [])


def _scaled(
    context: Context, normalised: Tensor, weight: Any, bias: Any, shape: tuple[int, ...]
) -> tuple[Tensor, list[Use]]:
    """Return a normalised tensor times a weight plus a bias, which are viewed in a shape, and their uses."""
    y, uses = normalised, list[Use]()
    for tensor, factor in ((weight, context.layout.batch_first(normalised.detach())), (bias, 1.0)):
        if tensor is not None:
            slot = context.slot(tensor)
            uses += [Elementwise(slot, shape, factor, context.batch_first)] if slot else []
            y = y * tensor.view(shape) if tensor is weight else y + tensor.view(shape)
    return y, uses


def _layer_norm(
    context: Context, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> tuple[Tensor, list[Use]]:
    return _scaled(context, F.layer_norm(x, shape, None, None, eps), weight, bias, tuple(shape))


def _rms_norm(
    context: Context, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None
) -> tuple[Tensor, list[Use]]:
    return _scaled(context, F.rms_norm(x, shape, None, eps), weight, None, tuple(shape))


def _channels(x: Tensor) -> tuple[int, ...]:
    return (x.shape[1], *[1] * (x.ndim - 2))


def _group_norm(
    context: Context, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> tuple[Tensor, list[Use]]:
    return _scaled(context, F.group_norm(x, groups, None, None, eps), weight, bias, _channels(x))


def _batch_norm(
    context: Context,
    x: Tensor,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> tuple[Tensor, list[Use]]:
    if training or mean is None or var is None:
        raise UnknownUseError
    shape = _channels(x)
    normalised = (x - mean.view(shape)) * (var + eps).rsqrt().view(shape)
    return _scaled(context, normalised, weight, bias, shape)


def _instance_norm(
    context: Context,
    x: Tensor,
    mean: Any = None,
    var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> tuple[Tensor, list[Use]]:
    if not use_input_stats:
        return _batch_norm(context, x, mean, var, weight, bias, False, momentum, eps)
    return _scaled(context, F.instance_norm(x, eps=eps), weight, bias, _channels(x))


def _prelu(context: Context, x: Tensor, weight: Tensor) -> tuple[Tensor, list[Use]]:
    slot = context.slot(weight)
    if slot is None or context.slot(x):
        raise UnknownUseError
    shape = _channels(x) if weight.numel() > 1 else (1,)
    factor = context.layout.batch_first(x.detach().clamp(max=0))
    return F.prelu(x, weight), [Elementwise(slot, shape, factor, context.batch_first)]


def _elementwise(
    context: Context, function: Callable[..., Tensor], x: Any, other: Any, **kwargs: Any
) -> tuple[Tensor, list[Use]]:
    """Add a weight, subtract it, or multiply with it, on either side."""
    left, right = context.slot(x), context.slot(other)
    if kwargs or bool(left) == bool(right):
        raise UnknownUseError
    weight, entered = (x, other) if left else (other, x)
    slot = left or right
    assert slot is not None
    product, difference = function in _PRODUCTS, function in _DIFFERENCES
    factor: Any = -1.0 if difference and right else 1.0
    if product:
        if not isinstance(entered, Tensor):
            raise UnknownUseError
        factor = entered.detach().clone() if function in _IN_PLACE else entered.detach()
    y = function(x, other)
    shape = tuple(weight.shape)
    if context.layout.kind != "first" or len(shape) > y.ndim or (len(shape) == y.ndim and shape[0] != 1):
        raise UnknownUseError
    if product:
        factor = factor.expand(y.shape)
    return y, [Elementwise(slot, shape[1:] if len(shape) == y.ndim else shape, factor, context.batch_first)]


def _repeated(
    context: Context, function: Callable[..., Tensor], weight: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, list[Use]]:
    """Repeat a weight for every input of a batch."""
    slot = context.slot(weight)
    y = function(weight, *args, **kwargs)
    shape = tuple(weight.shape)
    padded = (1,) * (y.ndim - len(shape)) + shape
    if slot is None or padded[0] != 1 or any(n not in (1, m) for n, m in zip(padded, y.shape)):
        raise UnknownUseError
    return y, [Elementwise(slot, padded[1:], 1.0, context.batch_first)]


def _embedding(
    context: Context,
    ids: Tensor,
    weight: Tensor,
    padding_idx: Any = None,
    max_norm: Any = None,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, list[Use]]:
    slot = context.slot(weight)
    if slot is None or max_norm is not None:
        raise UnknownUseError
    ids = context.layout.batch_first(ids)
    return F.embedding(ids, weight), [Lookup(slot, ids, len(weight), context.batch_first)]


_PRODUCTS = frozenset([torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__])
_DIFFERENCES = frozenset([torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__])
_SUMS = frozenset([torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__])
_IN_PLACE = frozenset([Tensor.mul_, Tensor.__imul__])

RULES: dict[Any, Rule] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.prelu: _prelu,
    F.embedding: _embedding,
    **({F.rms_norm: _rms_norm} if hasattr(F, "rms_norm") else {}),
}
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
# Rules that are told which of several functions was called.
_FAMILIES: tuple[tuple[Iterable[Any], Rule], ...] = (
    (CONVOLUTIONS, convolution),
    (_TRANSPOSED, transposed_convolution),
    (_PRODUCTS | _DIFFERENCES | _SUMS, _elementwise),
    (REPEATING, _repeated),
)


def _of(function: Any, rule: Rule) -> Rule:
    return lambda context, *args, **kwargs: rule(context, function, *args, **kwargs)


RULES.update({function: _of(function, rule) for functions, rule in _FAMILIES for function in functions})


_signature = cache(signature)


def used(function: Any, context: Context, args: Any, kwargs: Any) -> tuple[Tensor, list[Use]]:
    """Compute a call by its rule, and return the output and the uses of weights.

    Raises
    ------
    UnknownUseError
        If the rule does not know such a call.
    """
    if kwargs and isinstance(function, FunctionType):
        bound = _signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        args, kwargs = bound.args, bound.kwargs
    elif "input" in kwargs:
        args, kwargs = (kwargs["input"], *args), {k: v for k, v in kwargs.items() if k != "input"}
    return RULES[function](context, *args, **kwargs)
