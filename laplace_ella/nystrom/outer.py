r"""Products and combinations of gradients that are outer products :math:`\sum_t g_t a_t^T`, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..network.by_layer import Gradients, Outer
from ..network.functional import flat
from ..network.uses import Product

# Products of so many numbers are formed at a time: of a block of rows with another.
BLOCK = 2**22


def is_finite(gradients: Gradients) -> bool:
    """Tell whether all gradients are finite, or the largest entries of outer products."""
    if isinstance(gradients, Tensor):
        return bool(gradients.isfinite().all())
    left, right = gradients.left.abs().amax(-1), gradients.right.abs().amax(-1)
    return bool((left * right[:, None]).isfinite().all())


def squares(gradients: Gradients) -> Tensor:
    """Return the squared norms (B,) of gradients, one of each input, float64."""
    if isinstance(gradients, Tensor):
        return flat(gradients).double().square().sum(1)
    left, right = gradients.left[:, 0].double(), gradients.right.double()
    return ((left @ left.mT) * (right @ right.mT)).sum((1, 2))


def joined(parts: Sequence[Gradients]) -> Gradients:
    """Join the gradients of several batches."""
    outer = [p for p in parts if isinstance(p, Outer)]
    if not outer:
        return torch.cat([p for p in parts if isinstance(p, Tensor)])
    return Outer(torch.cat([p.left for p in outer]), torch.cat([p.right for p in outer]))


def add_products(out: Tensor, left: Outer, right: Outer, first: int | None = None) -> None:
    r"""Add :math:`\sum_{ts} (g_t \cdot g'_s)(a_t \cdot a'_s)` of all pairs to ``out`` (m, M), float64.

    Parameters
    ----------
    left, right : Outer
        Of m landmarks and of M.
    first : int, optional
        Where the m landmarks begin among the M; what is left of the diagonal is then left out.
    """
    t, (m, size) = right.right.shape[1], out.shape
    step = max(1, min(int(BLOCK**0.5) // t, -(-size // 8) if first is not None else size))
    for a in range(0, m, step):
        rows = slice(a, min(a + step, m))
        g, b = (v[rows].reshape(-1, v.shape[-1]).double() for v in (left.left, left.right))
        for c in range(0, size, step):
            columns = slice(c, min(c + step, size))
            if first is not None and columns.stop <= first + a:
                continue
            others = (v[columns].reshape(-1, v.shape[-1]).double() for v in (right.left, right.right))
            found = (g @ next(others).T).mul_(b @ next(others).T)
            out[rows, columns] += found.view(rows.stop - a, t, -1, t).sum((1, 3)) if t > 1 else found


def combination(coefficients: Tensor, outer: Outer, use: Product) -> Tensor:
    """Return the combinations (K, O J) of the gradients of m landmarks with coefficients (m, K), float64.

    With one position, one matrix product makes K of them; the gradients of more positions are formed, a few at a time.
    """
    t, _, o, j = use.shape
    m, k = coefficients.shape
    left, right = outer.left[:, 0], outer.right
    if t == 1:
        found = (coefficients[:, :, None] * left.double()).flatten(1).T @ right[:, 0].double()
    else:
        found, step = coefficients.new_zeros(k, o * j), max(1, BLOCK // (o * j))
        for a in range(0, m, step):
            rows = torch.einsum("mto,mtj->moj", left[a : a + step], right[a : a + step])
            found.addmm_(coefficients[a : a + step].T, rows.flatten(1).double())
    return flat(use.from_matrix(found.view(k, 1, o, j)))
