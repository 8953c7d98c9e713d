r"""The rules of convolutions and of transposed ones: each is a matrix product of what is below its kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .context import Context, UnknownUseError, bias_of
from .uses import Product, Use

# Convolutions, and what brings cotangents of their outputs back to their inputs.
_BACK = {
    torch.conv1d: torch.conv_transpose1d,
    torch.conv2d: torch.conv_transpose2d,
    torch.conv3d: torch.conv_transpose3d,
}
CONVOLUTIONS = frozenset(_BACK)


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


def _pads_back(
    low: tuple[int, ...], positions: tuple[int, ...], *sizes: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Return how a transposed convolution's output is padded for a convolution that gets back to its input.

    ``sizes``: of kernel, stride, dilation and output.
    """
    needed = [(p - 1) * s + d * (k - 1) + 1 for p, k, s, d in zip(positions, *sizes[:3])]
    return [(p, max(p, m - full - p)) for p, m, full in zip(low, needed, sizes[3])]


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


class _Convolved(torch.autograd.Function):
    """A convolution whose backward pass, with respect to the input alone, is a transposed convolution.

    vmap folds several passes into the batch of that one as they are. To torch's own backward pass it hands a single number,
    expanded, as the input, which kernels copy to full size, to return gradients in a layout that is not that of cotangents.
    """

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor, weight: Tensor, *options: Any) -> Tensor:
        """Convolve; ``options``: bias, stride, padding, dilation and groups."""
        ctx.save_for_backward(weight)
        ctx.function, ctx.options, ctx.spatial = function, options, x.shape[2:]
        return function(x, weight, *options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        """Return the cotangents of the input."""
        (weight,) = ctx.saved_tensors
        _, stride, padding, dilation, groups = ctx.options
        sizes = zip(ctx.spatial, g.shape[2:], weight.shape[2:], stride, padding, dilation)
        left = [m - ((p - 1) * s - 2 * pad + d * (k - 1) + 1) for m, p, k, s, pad, d in sizes]
        # Autocast, by which g may be of another dtype than the weight, is off here.
        back = _BACK[ctx.function](g, weight.to(g.dtype), None, stride, padding, left, groups, dilation)
        return None, back, *[None] * (1 + len(ctx.options))


def convolution(
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
    """Convolve, and return the uses of kernel and bias."""
    if context.slot(x) or context.layout.kind == "second":
        raise UnknownUseError
    n = weight.ndim - 2
    kernel, stride, dilation = tuple(weight.shape[2:]), _tuple(stride, n), _tuple(dilation, n)
    pads, a = _padding(padding, kernel, dilation), x.detach()
    if all(low == high for low, high in pads):
        low = tuple(p for p, _ in pads)
        y = cast(Tensor, _Convolved.apply(function, x, weight, bias, stride, low, dilation, groups))
    else:
        y = function(x, weight, bias, stride, padding, dilation, groups)
    positions = tuple(y.shape[2:])
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
    return y, uses + ([bias_of(context, b, bias, n)] if b else [])


def transposed_convolution(
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
    """Convolve transposed, and return the uses of kernel and bias."""
    if context.slot(x) or context.layout.kind == "second":
        raise UnknownUseError
    y = function(x, weight, bias, stride, padding, output_padding, groups, dilation)
    n = weight.ndim - 2
    kernel, stride, dilation = tuple(weight.shape[2:]), _tuple(stride, n), _tuple(dilation, n)
    a, positions = x.detach(), tuple(x.shape[2:])
    pads = _pads_back(_tuple(padding, n), positions, kernel, stride, dilation, tuple(y.shape[2:]))
    size, i, o = context.layout.size(y), weight.shape[0] // groups, weight.shape[1]
    t, j = math.prod(positions) * (len(y) // size), math.prod(kernel) * o

    def operand() -> Tensor:
        return context.layout.batch_first(a.movedim(1, -1)).reshape(size, t, groups, i)

    def cotangent(g: Tensor) -> Tensor:
        found = unfolded(g.flatten(0, 1), kernel, stride, pads, dilation, positions)
        parts = found.unflatten(-1, (groups, o)).movedim(-2, 1 + n).unflatten(0, (len(g), -1))
        return context.batch_first(parts).reshape(len(g), size, t, groups, j)

    def matrix(v: Tensor) -> Tensor:
        rows = v.unflatten(1, (groups, i)).movedim(3, -1)  # (K, groups, I, *kernel, O)
        return rows.reshape(len(v), groups, i, j).transpose(-1, -2).contiguous()

    def back(g: Tensor) -> Tensor:
        leading = g.shape[:-3]
        g = g.transpose(-1, -2).reshape(*leading, groups * i, *kernel, o)
        return g.movedim(-1, len(leading) + 1)

    w, b = context.slot(weight), context.slot(bias)
    uses: list[Use] = [Product(w, operand, cotangent, (t, groups, j, i), matrix, back)] if w else []
    return y, uses + ([bias_of(context, b, bias, n)] if b else [])
