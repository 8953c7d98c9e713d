r"""How weights enter a layer: what each kind of layer does to cotangents of its output and to directions.

A layer is linear in each of its weights, y = L(a; W), so that with cotangents g of its output the features
along directions V are <g, L(a; V)>. A :class:`Use` computes that in either of two orders: the gradients
of the weight for each input and cotangent first, and their products with V then; or the layer with all
directions in place of the weight first. :mod:`laplace_ella.network.rules` says which uses a
call of torch's functions consists of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# A number that is read or written costs as much as this many multiplications in a matrix product.
MOVED = 20.0
# Gradients of weights, or outputs of all directions, of so many bytes are formed at a time.
BLOCK_BYTES = 2**23
# Products with gradients of fewer rows of a matrix are slower.
FEWEST_ROWS = 16


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

    def without_input(self) -> Use:
        """Return the use without what the layer took: its shapes, which may be kept."""
        return self


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

    def without_input(self) -> Product:
        """Return the use without what the layer took."""
        return replace(self, operand=_forgotten)

    def _gradients(self, g: Tensor, a: Tensor) -> Tensor:
        """Return the gradients (B, n, groups, O, J) of cotangents (n, B, T, groups, O) with inputs (B, T, groups, J).

        One product for each input and group, of the cotangents in an order that keeps their numbers of one position together.
        """
        n, size, t, groups, o = g.shape
        left = g.permute(1, 3, 2, 0, 4).reshape(size * groups, t, n * o)
        right = a.transpose(1, 2).reshape(size * groups, t, -1)
        return (left.mT @ right).view(size, groups, n, o, -1).transpose(1, 2)

    def features(self, g: Tensor, v: Tensor) -> Tensor:
        """Return <g, L(a; V)> (B, n, K)."""
        g, a, v = self.cotangent(g), self.operand(), self.to_matrix(v)
        t, groups, o, j = self.shape
        if self._gradients_first(len(g), len(v)):
            form, held = self._by_gradients, len(g) * groups * min(o, FEWEST_ROWS) * j
        else:
            form, held = self._by_outputs, len(v) * t * groups * o
        step = max(1, 2 * BLOCK_BYTES // (g.element_size() * held))  # inputs at a time
        return torch.cat([form(x, y, v) for x, y in zip(g.split(step, 1), a.split(step))])

    def _by_gradients(self, g: Tensor, a: Tensor, v: Tensor) -> Tensor:
        """Form gradients with respect to a few rows of the matrix at a time: they stay in the cache, and V is read once."""
        n, size, _, groups, o = g.shape
        row = g.element_size() * n * size * groups * a.shape[-1]
        rows = max(FEWEST_ROWS, BLOCK_BYTES // row)
        rows = math.ceil(o / math.ceil(o / rows))  # parts of equal size
        total: Any = None
        for x, w in zip(g.split(rows, -1), v.split(rows, 2)):
            gradients = self._gradients(x, a).reshape(size * n, -1)
            # Matrix products are faster with the narrower matrix on the left. Autocast does not convert those in place.
            left = w.flatten(1).to(gradients.dtype)
            total = left @ gradients.T if total is None else total.addmm_(left, gradients.T)
        return total.T.reshape(size, n, -1)

    def _by_outputs(self, g: Tensor, a: Tensor, v: Tensor) -> Tensor:
        pushed = torch.einsum("btpj,kpoj->btkpo", a, v)
        return torch.einsum("zbtpo,btkpo->bzk", g, pushed)

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


def _forgotten() -> Tensor:
    raise ValueError("What the layer took was not kept.")


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

    def without_input(self) -> Elementwise:
        """Return the use without what the weight was multiplied with."""
        return replace(self, factor=1.0)

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
    padded = (1,) * (g.ndim - 2 - len(shape)) + tuple(shape)
    axes = [i + 2 for i, n in enumerate(padded) if n == 1 and g.shape[i + 2] != 1]
    found = g if factor is None else g * factor
    found = found.sum(axes) if axes else found
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
