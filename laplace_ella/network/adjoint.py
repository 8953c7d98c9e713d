r"""The test that forward and reverse mode agree about a model's derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..data.batches import Input
from ..data.hashing import normal_like
from .functional import FunctionalModel, Pull, Weights, backward_passes
from .recording import tolerance

Push = Callable[[Weights], Tensor]

# A derivative is linear, so that tangents and cotangents of other lengths show how products scatter by rounding.
SCALES = (1.0, 1.1, 1.25, 1.4, 1.6, 1.8)
N_PRODUCTS = 4
# Two means may be apart by this many times their scatter. Roundings that all scales share made it up to 9 times
# (attention and layer norms in bfloat16); a `no_grad` for half of a layer's output makes it 50 times and more.
LARGEST_RATIO = 32.0


def check_adjoint(
    model: FunctionalModel, x: Input, tangents: Weights, phi: Tensor, push: Push, precision: torch.dtype
) -> None:
    r"""Require :math:`\langle u, J v \rangle = \langle J^T u, v \rangle`.

    u points along :math:`J v`, where nothing cancels, and consists of ones if that is zero. How much rounding
    there may be follows from the precision of the outputs; where something coarser is on the way, it is
    measured by how much such products scatter.

    Parameters
    ----------
    tangents : dict of Tensor (n, *shape)
    phi : Tensor (B, C, n)
        J times the tangents, as ``push`` computes it.
    push : callable
        Tangents -> J times the tangents.
    precision : torch.dtype
        The coarsest on the way from the input to the outputs.

    Raises
    ------
    ValueError
        If they differ by more than rounding.
    """
    left, right = _products(model, x, tangents, phi[..., :1], (1.0,))
    if not (left.isfinite().all() and right.isfinite().all()):
        return
    gap, bound = float((left - right).abs() / torch.maximum(left.abs(), right.abs())), tolerance(phi.dtype)
    if phi.is_cuda and phi.dtype == torch.float32:
        # TF32, which float32 convolutions use on GPUs by default, has the precision of float16.
        bound = tolerance(torch.float16)
    if gap > bound and tolerance(precision) > bound:
        gap, scatter = _scatter(model, x, push)
        bound = max(bound, min(tolerance(precision), LARGEST_RATIO * scatter))
    if gap > bound:
        raise ValueError(
            f"Forward and reverse mode disagree about this model's derivative: {float(left):.6g} and {float(right):.6g} "
            "for the same product. An operation that only one of them sees is the usual cause: a `no_grad` inside the "
            "forward pass (use detach()), or an autograd.Function whose jvp and backward differ. Mend the model, "
            "or name the mode to trust: autodiff='reverse'."
        )


def _products(
    model: FunctionalModel, x: Input, tangents: Weights, phi: Tensor, scales: Sequence[float]
) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\langle u, J s v \rangle / s` and :math:`\langle J^T s u, v \rangle / s` (n, ) of n scales s.

    ``phi`` (B, C, n) is J s v, and the first of the tangents v.
    """
    phi = phi.detach()
    u = phi[..., 0] / phi[..., 0].norm() if phi[..., 0].any() else torch.ones_like(phi[..., 0])
    left = torch.stack([(u.double() * p.double()).sum() / s for p, s in zip(phi.unbind(-1), scales)])

    def pulled(f: Tensor, leaves: Weights, pull: Pull) -> Tensor:
        gradients = [(pull((f * (s * u)).sum(), leaves), s) for s in scales]
        return torch.stack([_dot(g, tangents).to(left) / s for g, s in gradients])

    with torch.no_grad():
        return left, backward_passes(model, x, pulled)


def _dot(gradient: Weights, tangents: Weights) -> Tensor:
    return torch.stack([(g.double() * tangents[k][0].double()).sum() for k, g in gradient.items()]).sum()


def _scatter(model: FunctionalModel, x: Input, push: Push) -> tuple[float, float]:
    """Return how far forward and reverse mode are apart, and how much their products scatter, both relative to these.

    Cost: 24 directions and backward passes of two inputs.
    """
    tangents = normal_like(model.weights(), N_PRODUCTS, seed=1)
    gaps = spreads = sizes = 0.0
    for i in range(N_PRODUCTS):
        one = {k: v[i : i + 1] for k, v in tangents.items()}
        phi = push({k: torch.cat([s * v for s in SCALES]) for k, v in one.items()})
        left, right = _products(model, x, one, phi, SCALES)
        gaps += float((left.mean() - right.mean()).square())
        spreads += float(left.var() + right.var())
        sizes += float(torch.maximum(left.abs(), right.abs()).mean().square())
    return math.sqrt(gaps / sizes), math.sqrt(spreads / sizes)
