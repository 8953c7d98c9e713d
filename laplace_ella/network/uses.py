r"""How weights enter a layer: what each kind of layer does to cotangents of its output and to directions.

A layer is linear in each of its weights, y = L(a; W), so that with cotangents g of its output the features
along directions V are <g, L(a; V)>. A :class:`Use` computes that in either of two orders: the gradients
of the weight for each input and cotangent first, and their products with V then; or the layer with all
directions in place of the weight first. :data:`RULES` says for each function of torch which uses a
call of it consists of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from inspect import signature
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# A number that is read or written costs as much as this many multiplications in a matrix product.
MOVED = 20.0
# Gradients of weights, or outputs of all directions, of so many bytes are formed at a time.
BLOCK_BYTES = 2**24


@dataclass(frozen=True)
class Use:
    """One weight in one call of a layer.

    Attributes
    ----------
    slot : str
        The weight's name.
    """

    slot: str

    def features(self, g: Tensor, v: Tensor) -> Tensor:
        """Return <g, L(a; V)> (B, n, K) of cotangents g (n, B, ...), and directions v (K, *shape)."""
        gradients = self.gradients(g)
        return gradients.flatten(2) @ v.flatten(1).T

    def gradients(self, g: Tensor) -> Tensor:
        """Return the gradients (B, n, *shape) of cotangents g (n, B, ...)."""
        raise NotImplementedError

    def products(self, n: int, rank: int) -> float:
        """Return the cost of the features of an input for n cotangents and K directions, in multiplications."""
        raise NotImplementedError


@dataclass(frozen=True)
class Product(Use):
    """A matrix that multiplies every position of a layer's input: a linear layer, a convolution.

    Attributes
    ----------
    operand : callable
        Returns the input (B, T, groups, J), each of T positions with what the matrix is multiplied by.
    cotangent : callable
        g (n, B, ...) -> (n, B, T, groups, O)
    shape : tuple of int
        (T, groups, O, J)
    to_matrix, from_matrix : callable
        Bring directions (K, *shape) into the order (K, groups, O, J), and gradients (..., groups, O, J) back.
    last : bool
        Directions come into this order without a copy where the axis of channels has the smallest stride.
    """

    operand: Callable[[], Tensor]
    cotangent: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int, int]
    to_matrix: Callable[[Tensor], Tensor]
    from_matrix: Callable[[Tensor], Tensor]
    last: bool = False

    def gradients(self, g: Tensor) -> Tensor:
        """Return the gradients (B, n, *shape) of cotangents g (n, B, ...)."""
        return self.from_matrix(self._gradients(self.cotangent(g), self.operand()))

    def _gradients(self, g: Tensor, a: Tensor) -> Tensor:
        return torch.einsum("zbtpo,btpj->bzpoj", g, a)

    def features(self, g: Tensor, v: Tensor) -> Tensor:
        """Return <g, L(a; V)> (B, n, K), a few inputs at a time."""
        g, a, v = self.cotangent(g), self.operand(), self.to_matrix(v)
        n, size = g.shape[:2]
        blocks = [self._block(g[:, s], a[s], v) for s in self._slices(n, size, len(v), g.element_size())]
        return torch.cat(blocks)

    def _block(self, g: Tensor, a: Tensor, v: Tensor) -> Tensor:
        if self._gradients_first(len(g), len(v)):
            return _products(self._gradients(g, a).flatten(2), v.flatten(1))
        pushed = torch.einsum("btpj,kpoj->btkpo", a, v)
        return torch.einsum("zbtpo,btkpo->bzk", g, pushed)

    def _slices(self, n: int, size: int, rank: int, item: int) -> Iterator[slice]:
        t, groups, o, j = self.shape
        held = n * groups * o * j if self._gradients_first(n, rank) else rank * t * groups * o
        step = max(1, BLOCK_BYTES // (item * held))
        return (slice(start, start + step) for start in range(0, size, step))

    def _costs(self, n: int, rank: int) -> tuple[float, float]:
        """Return the cost of an input with gradients first, and with directions first."""
        t, groups, o, j = self.shape
        matrix = groups * o * j
        first = n * t * matrix + n * rank * matrix + MOVED * 2 * n * matrix
        second = rank * t * matrix + n * rank * t * groups * o + MOVED * 2 * rank * t * groups * o
        return first, second

    def _gradients_first(self, n: int, rank: int) -> bool:
        first, second = self._costs(n, rank)
        return first <= second

    def products(self, n: int, rank: int) -> float:
        """Return the cost for n cotangents and K directions, in multiplications."""
        return min(self._costs(n, rank))


def _products(gradients: Tensor, v: Tensor) -> Tensor:
    """Return the products (B, n, K) of gradients (B, n, p) with directions (K, p)."""
    flat = gradients.flatten(0, 1)
    # Matrix products are faster with the narrower matrix on the left.
    found = flat @ v.T if len(flat) <= len(v) else (v @ flat.T).T
    return found.reshape(*gradients.shape[:2], len(v))


@dataclass(frozen=True)
class Elementwise(Use):
    """A weight that is multiplied with, or added to, a layer's input of the same or a larger shape.

    Attributes
    ----------
    shape : tuple of int
        The weight's, of as many axes as the output has without the batch axis, or fewer.
    factor : Tensor (B, ...), float
        What it is multiplied with.
    cotangent : callable
        g (n, B, ...) -> g in the shape of the sum or product, batch first.
    """

    shape: tuple[int, ...]
    factor: Any
    cotangent: Callable[[Tensor], Tensor]

    def gradients(self, g: Tensor) -> Tensor:
        """Return the gradients (B, n, *shape) of cotangents g (n, B, ...)."""
        g = self.cotangent(g)
        if isinstance(self.factor, Tensor):
            found = _summed(g, self.factor, self.shape)
        else:
            found = _summed(g, None, self.shape)
            found = found if self.factor == 1 else found * self.factor
        return found.transpose(0, 1)

    def products(self, n: int, rank: int) -> float:
        """Return the cost for n cotangents and K directions, in multiplications."""
        return n * rank * math.prod(self.shape)


def _summed(g: Tensor, factor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Return g (n, B, *y), times a factor (B, *y), summed to (n, B, *shape), the last axes of y."""
    letters = "abcdefghijklm"[: g.ndim - 2]
    padded = (1,) * (g.ndim - 2 - len(shape)) + tuple(shape)
    kept = "".join(k for k, n in zip(letters, padded) if n != 1)
    if factor is None:
        axes = [i + 2 for i, n in enumerate(padded) if n == 1 and g.shape[i + 2] != 1]
        found = g.sum(axes) if axes else g
    else:
        found = torch.einsum(f"yz{letters},z{letters}->yz{kept}", g, factor)
    return found.reshape(*g.shape[:2], *shape)


@dataclass(frozen=True)
class Lookup(Use):
    """A table that is looked up in.

    Attributes
    ----------
    ids : LongTensor (B, ...)
    rows : int
        The table's length.
    cotangent : callable
    """

    ids: Tensor
    rows: int
    cotangent: Callable[[Tensor], Tensor]

    def gradients(self, g: Tensor) -> Tensor:
        """Return the gradients (B, n, *shape) of cotangents g (n, B, ...)."""
        g = self.cotangent(g).flatten(2, -2)  # (n, B, T, D)
        found = g.new_zeros(*g.shape[:2], self.rows, g.shape[-1])
        index = self.ids.flatten(1)[None, ..., None].expand_as(g)
        return found.scatter_add_(2, index, g).transpose(0, 1)

    def features(self, g: Tensor, v: Tensor) -> Tensor:
        """Return <g, V[ids]> (B, n, K), a few inputs at a time."""
        g, ids = self.cotangent(g).flatten(2, -2), self.ids.flatten(1)
        step = max(1, BLOCK_BYTES // (g.element_size() * len(v) * g.shape[2] * g.shape[3]))
        blocks = []
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            found = v[:, ids[part]]  # (K, B, T, D)
            blocks.append(torch.einsum("zbtd,kbtd->bzk", g[:, part], found))
        return torch.cat(blocks)

    def products(self, n: int, rank: int) -> float:
        """Return the cost for n cotangents and K directions, in multiplications."""
        return 2 * MOVED * rank * self.ids[:1].numel() * 64


# ---------------------------------------------------------------------- where the batch axis is


@dataclass(frozen=True)
class Layout:
    """Where the inputs of a batch are in a tensor.

    Attributes
    ----------
    kind : {"first", "second", "outer", "inner"}
        The first axis, the second one, or a part of the first: that of the longer or the shorter stride.
    length : int
        Of the other part of the first axis.
    """

    kind: str
    length: int = 1

    def size(self, t: Tensor) -> int:
        """Return B."""
        return t.shape[1] if self.kind == "second" else t.shape[0] // self.length

    def batch_first(self, t: Tensor, axis: int = 0) -> Tensor:
        """Bring the batch axis to the front, ``axis`` axes before it left alone."""
        if self.kind == "first":
            return t
        if self.kind == "second":
            return t.transpose(axis, axis + 1)
        if self.kind == "outer":
            return t.unflatten(axis, (-1, self.length))
        return t.unflatten(axis, (self.length, -1)).transpose(axis, axis + 1)


FIRST = Layout("first")


def layout_of(t: Tensor, size: int) -> Layout | None:
    """Say where the inputs are in a tensor made of a batch of one input ``size`` times, if that is clear."""
    if t.ndim and t.shape[0] == size:
        return FIRST
    if t.ndim > 1 and t.shape[1] == size:
        return Layout("second")
    if not t.ndim or t.shape[0] % size:
        return None
    length = t.shape[0] // size
    found = [
        Layout(kind, length)
        for kind in ("outer", "inner")
        if _same_inputs(Layout(kind, length).batch_first(t.detach()))
    ]
    return found[0] if len(found) == 1 else None


def _same_inputs(t: Tensor) -> bool:
    return bool(((t - t[:1]).abs().max() <= 1e-3 * t.abs().max()).all()) if t.numel() else False


# ---------------------------------------------------------------------- functions of torch


@dataclass(frozen=True)
class Context:
    """What a rule needs to know of a call.

    Attributes
    ----------
    slot : callable
        Tensor -> its name if it is a weight, or derived from one, along which directions exist; else None.
    layout : Layout
        Where inputs are in the output, and in what enters.
    """

    slot: Callable[[Any], str | None]
    layout: Layout

    def batch_first(self, g: Tensor) -> Tensor:
        """Bring cotangents (n, ...) into the order (n, B, ...)."""
        return self.layout.batch_first(g, 1)


class UnknownUseError(Exception):
    """A use of weights that no rule knows."""


# (context, args, kwargs) -> output, uses
Rule = Callable[..., tuple[Tensor, list[Use]]]


def _identity(t: Tensor) -> Tensor:
    return t


def _matrix(context: Context, slot: str, x: Tensor, weight: Tensor, transposed: bool) -> Product:
    """Return the use of a matrix (O, J), or (J, O) if ``transposed``, by a linear layer with input (..., J)."""
    a = context.layout.batch_first(x.detach())
    size, j, o = a.shape[0], a.shape[-1], weight.numel() // max(1, a.shape[-1])
    positions = math.prod(a.shape[1:-1])

    def matrix(v: Tensor) -> Tensor:
        return (v.reshape(-1, j, o).transpose(1, 2).contiguous() if transposed else v.reshape(-1, o, j))[
            :, None
        ]

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


def _bias(context: Context, slot: str, bias: Tensor, channel: int | None = None) -> Elementwise:
    """Return the use of a bias, which is added along the last axis, or along that of channels of ``channel`` more axes."""
    shape = tuple(bias.shape) if channel is None else (*bias.shape, *[1] * channel)
    return Elementwise(slot, shape, 1.0, context.batch_first)


def _linear(context: Context, x: Tensor, weight: Tensor, bias: Any = None) -> tuple[Tensor, list[Use]]:
    w, b = context.slot(weight), context.slot(bias)
    if context.slot(x):
        raise UnknownUseError
    uses: list[Use] = [_matrix(context, w, x, weight, transposed=False)] if w else []
    return F.linear(x, weight, bias), uses + ([_bias(context, b, bias)] if b else [])


def _matmul(context: Context, x: Tensor, other: Tensor) -> tuple[Tensor, list[Use]]:
    if context.slot(x) or other.ndim > 2 or x.ndim < 2:
        raise UnknownUseError
    slot = context.slot(other)
    assert slot is not None
    if other.ndim == 1:
        y = torch.matmul(x, other)
        return y, [_matrix(context, slot, x, other, transposed=True)]
    return torch.matmul(x, other), [_matrix(context, slot, x, other, transposed=True)]


def _rmatmul(context: Context, other: Tensor, x: Tensor) -> tuple[Tensor, list[Use]]:
    return _matmul(context, x, other)


def _addmm(
    context: Context, bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1
) -> tuple[Tensor, list[Use]]:
    if beta != 1 or alpha != 1 or context.slot(x) or bias.ndim != 1:
        raise UnknownUseError
    w, b = context.slot(weight), context.slot(bias)
    uses: list[Use] = [_matrix(context, w, x, weight, transposed=True)] if w else []
    return torch.addmm(bias, x, weight), uses + ([_bias(context, b, bias)] if b else [])


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    return tuple(value) * (n // len(value)) if isinstance(value, (tuple, list)) else (value,) * n


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    n = len(kernel)
    if padding == "valid":
        return [(0, 0)] * n
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel)]
        return [(t // 2, t - t // 2) for t in totals]
    return [(p, p) for p in _tuple(padding, n)]


def unfolded(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: list[tuple[int, int]],
    dilation: tuple[int, ...],
    positions: tuple[int, ...],
) -> Tensor:
    """Return what a convolution multiplies at each position: (N, *positions, *kernel, channels) of x (N, channels, *spatial).

    A view of the padded input, channels last.
    """
    last = x.movedim(1, -1)
    if any(p != (0, 0) for p in padding):
        last = F.pad(last, [0, 0, *(n for p in reversed(padding) for n in p)])
    last = last.contiguous()
    spatial = last.stride()[1:-1]
    strides = [s * t for s, t in zip(spatial, stride)], [s * d for s, d in zip(spatial, dilation)]
    return last.as_strided(
        (len(x), *positions, *kernel, x.shape[1]), (last.stride(0), *strides[0], *strides[1], 1)
    )


def _convolution(
    context: Context,
    function: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, list[Use]]:
    if context.slot(x) or context.layout.kind == "second":
        raise UnknownUseError
    y = function(x, weight, bias, stride, padding, dilation, groups)
    n = weight.ndim - 2
    kernel, stride, dilation = tuple(weight.shape[2:]), _tuple(stride, n), _tuple(dilation, n)
    pads, a, positions = _padding(padding, kernel, dilation), x.detach(), tuple(y.shape[2:])
    size, o, i = context.layout.size(y), weight.shape[0] // groups, weight.shape[1]
    t, j = math.prod(positions) * (len(y) // size), math.prod(kernel) * i

    def operand() -> Tensor:
        found = unfolded(a, kernel, stride, pads, dilation, positions)
        parts = found.unflatten(-1, (groups, i)).movedim(-2, 1 + n)
        return context.layout.batch_first(parts).reshape(size, t, groups, j)

    def cotangent(g: Tensor) -> Tensor:
        g = context.batch_first(g.movedim(2, -1))
        return g.reshape(len(g), size, t, groups, o)

    def matrix(v: Tensor) -> Tensor:
        return v.movedim(2, -1).reshape(len(v), groups, o, j)

    def back(g: Tensor) -> Tensor:
        leading = g.shape[:-3]
        return g.reshape(*leading, groups * o, *kernel, i).movedim(-1, len(leading) + 1)

    w, b = context.slot(weight), context.slot(bias)
    uses: list[Use] = (
        [Product(w, operand, cotangent, (t, groups, o, j), matrix, back, math.prod(kernel) > 1)] if w else []
    )
    return y, uses + ([_bias(context, b, bias, n)] if b else [])


def _transposed_convolution(
    context: Context,
    function: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple[Tensor, list[Use]]:
    if context.slot(x) or context.layout.kind == "second":
        raise UnknownUseError
    y = function(x, weight, bias, stride, padding, output_padding, groups, dilation)
    n = weight.ndim - 2
    kernel, stride, dilation = tuple(weight.shape[2:]), _tuple(stride, n), _tuple(dilation, n)
    # The output is as large as a convolution takes it to get back to the input.
    pads, a, positions = _padding(_tuple(padding, n), kernel, dilation), x.detach(), tuple(x.shape[2:])
    more = [
        max(0, (p - 1) * s + d * (k - 1) + 1 - (full + 2 * low))
        for p, s, d, k, full, (low, _) in zip(positions, stride, dilation, kernel, y.shape[2:], pads)
    ]
    pads = [(low, high + m) for (low, high), m in zip(pads, more)]
    size, i, o = context.layout.size(y), weight.shape[0] // groups, weight.shape[1]
    t, j = math.prod(positions) * (len(y) // size), math.prod(kernel) * o

    def operand() -> Tensor:
        return context.layout.batch_first(a.movedim(1, -1)).reshape(size, t, groups, i)

    def cotangent(g: Tensor) -> Tensor:
        found = unfolded(g.flatten(0, 1), kernel, stride, pads, dilation, positions)
        parts = found.unflatten(-1, (groups, o)).movedim(-2, 1 + n).unflatten(0, (len(g), -1))
        return context.batch_first(parts).reshape(len(g), size, t, groups, j)

    def matrix(v: Tensor) -> Tensor:
        # (K, groups, I, O, *kernel) -> (K, groups, (*kernel, O), I)
        return (
            v.unflatten(1, (groups, i))
            .movedim(3, -1)
            .reshape(len(v), groups, i, j)
            .transpose(-1, -2)
            .contiguous()
        )

    def back(g: Tensor) -> Tensor:
        leading = g.shape[:-3]
        g = g.transpose(-1, -2).reshape(*leading, groups * i, *kernel, o)
        return g.movedim(-1, len(leading) + 1)

    w, b = context.slot(weight), context.slot(bias)
    uses: list[Use] = [Product(w, operand, cotangent, (t, groups, j, i), matrix, back)] if w else []
    return y, uses + ([_bias(context, b, bias, n)] if b else [])


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
_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
_REPEATING = (Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to)
# Rules that are told which of several functions was called.
_FAMILIES: tuple[tuple[Iterable[Any], Rule], ...] = (
    (_CONVOLUTIONS, _convolution),
    (_TRANSPOSED, _transposed_convolution),
    (_PRODUCTS | _DIFFERENCES | _SUMS, _elementwise),
    (_REPEATING, _repeated),
)


def _of(function: Any, rule: Rule) -> Rule:
    return lambda context, *args, **kwargs: rule(context, function, *args, **kwargs)


RULES.update({function: _of(function, rule) for functions, rule in _FAMILIES for function in functions})


def used(function: Any, context: Context, args: Any, kwargs: Any) -> tuple[Tensor, list[Use]]:
    """Compute a call by its rule, and return the output and the uses of weights.

    Raises
    ------
    UnknownUseError
        If the rule does not know such a call.
    """
    if isinstance(function, FunctionType):
        bound = signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        args, kwargs = bound.args, bound.kwargs
    elif "input" in kwargs:
        args, kwargs = (kwargs["input"], *args), {k: v for k, v in kwargs.items() if k != "input"}
    return RULES[function](context, *args, **kwargs)
