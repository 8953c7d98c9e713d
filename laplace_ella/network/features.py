r"""Features :math:`\phi(x) = J(x) V`: the Jacobian seen through the basis.

There are several ways to compute them, which agree to rounding and differ in cost and in what
operators they need. None forms a Jacobian. :data:`FEATURES` is the table of them, and all that the
rest of the package knows of a way are the facts of its row; :mod:`laplace_ella.network.probing`
finds out which ways a model supports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from ..data.batches import Input, batch_size, inputs_between
from .functional import FunctionalModel, Pull, Weights, backward_passes, flat
from .gradients import per_input
from .memory import LIVE_TENSORS, Chunks

# (model, weights, directions or what is prepared of them, x, chunks) -> (phi, f)
Features = Callable[[FunctionalModel, Weights, Any, Input, Chunks], tuple[Tensor, Tensor]]

# Reverse mode is chosen if this many times C is at most K ...
REVERSE_COST = 8
# ... and a row's activations take at least this share of its gradient's bytes: where they are
# few, as in an MLP, writing C gradients of P numbers costs more than K tangents.
SHARED_WEIGHTS = 1 / 4


@dataclass(frozen=True)
class Way:
    """One way to compute features, and all that is known of it.

    Attributes
    ----------
    autodiff : str
        How users name it. Ways of the same name are tried in the order of the table.
    compute : callable
        (model, weights, directions, x, chunks) -> features (B, C, K) and outputs (B, C).
    forwards : callable
        (C, K) -> its cost in plain forward passes per row.
    held : tuple of int
        How often a call holds each row's largest tensor, all its tensors, and its gradient; if it takes several
        directions, for each of them.
    words : str
        What a model has or has not, and what is done at which cost where it has nothing cheaper.
    directions : {"one", "several", "all"}
        How many a call takes: one after the other, as many as the chunks say, or always all of them.
    gradients : {"vmap", "loop"}, optional
        If it forms gradients of single inputs: of many at once, for models that support it, or one by one, for others.
    forward : bool
        It is forward mode, for which models are rewritten.
    reference : bool
        It takes plain backward passes, with which the features of other ways are compared.
    prepare : callable, optional
        (model, directions) -> what ``compute`` takes in place of the directions. An engine prepares the same
        directions once, and keeps the result for as long as they live; it must not hold the directions itself.
    """

    autodiff: str
    compute: Features
    forwards: Callable[[int, int], float]
    held: tuple[int, int, int]
    words: str
    directions: str = "one"
    gradients: str | None = None
    forward: bool = False
    reference: bool = False
    prepare: Callable[[FunctionalModel, Weights], Any] | None = None

    def __call__(
        self, model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
    ) -> tuple[Tensor, Tensor]:
        """Compute the features (B, C, K) and outputs (B, C)."""
        prepared = directions if self.prepare is None else self.prepare(model, directions)
        return self.compute(model, weights, prepared, x, chunks)


def forward_features(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\phi(x)` by batched forward-mode AD.

    Parameters
    ----------
    directions : dict of Tensor (K, *shape)
        One tangent per direction, for every trainable weight.
    x : input of B rows

    Returns
    -------
    phi, f : Tensor (B, C, K), Tensor (B, C)

    Notes
    -----
    Cost: at least 1 + 2K forward passes per row. Memory: ``chunks.inputs`` x
    ``chunks.directions`` copies of a row's activations, a few layers at a time.
    """

    def push_block(block: Input) -> tuple[Tensor, Tensor]:
        # out_dims=None for the outputs would be natural, but fails under chunking.
        push = vmap(_pushing(model, weights, block), out_dims=(0, -1))
        parts = []
        for start in range(0, _rank(directions), chunks.directions):
            f, phi = push({k: v[start : start + chunks.directions] for k, v in directions.items()})
            parts.append(phi)
        return torch.cat(parts, -1), f[0]

    return _in_blocks(push_block, chunks.inputs, x)


def looped_forward_features(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`forward_features` does, one direction after the other.

    For models whose operators do not batch over tangents. Cost: at least 3K forward passes per row.
    """

    def push_block(block: Input) -> tuple[Tensor, Tensor]:
        push = _pushing(model, weights, block)
        pushed = [push({name: v[k] for name, v in directions.items()}) for k in range(_rank(directions))]
        return torch.stack([phi for _, phi in pushed], -1), pushed[-1][0]

    return _in_blocks(push_block, chunks.inputs, x)


def _pushing(
    model: FunctionalModel, weights: Weights, x: Input
) -> Callable[[Weights], tuple[Tensor, Tensor]]:
    """Return the function from a tangent v to the outputs f and J v, both (B, C)."""

    def push(tangent: Weights) -> tuple[Tensor, Tensor]:
        f, phi, *_ = jvp(lambda w: model(w, x), (weights,), (tangent,))
        return f, phi

    return push


def double_vjp_features(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\phi(x)` by two backward passes per direction.

    :math:`J^T u` is linear in u, and the gradient of :math:`\langle J^T u, v \rangle` with
    respect to u is :math:`J v`. Needs operators that can be differentiated twice, and no
    forward-mode rule. Cost: about 3 + 3K forward passes per row.
    """
    record = torch.is_grad_enabled()

    def push(f: Tensor, leaves: Weights, _: Pull) -> tuple[Tensor, Tensor]:
        u = torch.zeros_like(f, requires_grad=True)
        pulled = torch.autograd.grad(f, list(leaves.values()), u, create_graph=True, allow_unused=True)
        used = {k: g for k, g in zip(leaves, pulled) if g is not None}

        def pushed(k: int) -> Tensor:
            tangent = [directions[name][k] for name in used]
            outputs = list(used.values())
            return torch.autograd.grad(outputs, u, tangent, retain_graph=True, create_graph=record)[0]

        phi = torch.stack([pushed(k) for k in range(_rank(directions))], -1)
        return phi, f if record else f.detach()

    return _in_blocks(lambda block: backward_passes(model, block, push), chunks.inputs, x)


def reverse_features(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\phi(x)` by one backward pass per output, contracted with V at once.

    Notes
    -----
    Cost: about 1 + 2C forward passes per row plus the contraction, C K / t of them where
    t positions share a weight, however large K is. Memory: ``chunks.inputs`` x P numbers.
    """
    return _pulled(model, weights, directions, x, chunks.inputs)


def looped_reverse_features(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Compute what :func:`reverse_features` does, one row after the other.

    Needs no more than ``backward()``. Cost: at least 1 + 2C forward passes of a single row.
    """
    return _pulled(model, None, directions, x, 1)


def pulled_cotangents(
    model: FunctionalModel,
    weights: Weights,
    directions: Weights,
    x: Input,
    cotangents: Tensor,
    chunks: Chunks,
    looped: bool,
) -> Tensor:
    r"""Compute :math:`V^T J(x)^T u` (B, n, K) of n cotangents u (B, n, C) per input.

    ``looped``: one row after the other, with plain backward passes. Cost: about 1 + 2n
    forward passes per row, plus contractions. Memory: ``chunks.inputs`` x P numbers.
    """
    if looped:
        return _pulled(model, None, directions, x, 1, cotangents)[0]
    return _pulled(model, weights, directions, x, chunks.inputs, cotangents)[0]


def _pulled(
    model: FunctionalModel,
    weights: Weights | None,
    directions: Weights,
    x: Input,
    block_rows: int,
    *cotangents: Tensor,
) -> tuple[Tensor, Tensor]:
    r"""Return :math:`V^T J^T u` (B, n, K) and f (B, C), for cotangents u (B, n, C) or, without any, unit vectors.

    Without weights, by plain backward passes of single rows.
    """
    record = torch.is_grad_enabled()
    bases = {k: flat(v).T for k, v in directions.items()}

    def coordinates(gradients: Iterable[Weights]) -> Tensor:
        # One gradient after the other: each takes P numbers.
        return torch.stack([sum(g[k].reshape(-1) @ b for k, b in bases.items()) for g in gradients])  # type: ignore[misc]

    def contract(row: Input, *us: Tensor) -> tuple[Tensor, Tensor]:
        f, pull, *_ = vjp(lambda w: model(w, row)[0], weights)
        units = us[0] if us else torch.eye(len(f), dtype=f.dtype, device=f.device)
        return coordinates(pull(u)[0] for u in units), f

    def contract_alone(row: Input, *us: Tensor) -> tuple[Tensor, Tensor]:
        def action(f: Tensor, leaves: Weights, pull: Pull) -> tuple[Tensor, Tensor]:
            scalars = us[0][0] @ f[0] if us else f[0]
            return coordinates(pull(s, bases) for s in scalars)[None], f if record else f.detach()

        return backward_passes(model, row, action)

    def compute(block: Input, *us: Tensor) -> tuple[Tensor, Tensor]:
        return contract_alone(block, *us) if weights is None else per_input(contract, block, *us)

    return _in_blocks(compute, block_rows, x, *cotangents)


def _rank(directions: Weights) -> int:
    return next(iter(directions.values())).shape[0]


def _in_blocks(
    compute: Callable[..., tuple[Tensor, Tensor]], block_rows: int, x: Input, *more: Tensor
) -> tuple[Tensor, Tensor]:
    size = batch_size(x)
    step = math.ceil(size / math.ceil(size / block_rows))  # blocks of equal size
    starts = range(0, size, step)
    blocks = [compute(inputs_between(x, a, a + step), *(t[a : a + step] for t in more)) for a in starts]
    return torch.cat([phi for phi, _ in blocks]), torch.cat([f for _, f in blocks])


def reverse_is_cheaper(n_outputs: int, rank: int, share: float = 1.0) -> bool:
    """Say whether C backward passes cost less than K tangents; docs/performance.md has the figures.

    ``share``: the bytes of a row's activations, divided by those of its gradient.
    """
    return share >= SHARED_WEIGHTS and REVERSE_COST * n_outputs <= rank


# In the order in which they are tried where users name none: that of their cost.
FEATURES: dict[str, Way] = {
    "forward": Way(
        autodiff="forward",
        compute=forward_features,
        forwards=lambda n_outputs, rank: 1 + 2 * rank,
        held=(LIVE_TENSORS, 0, 0),
        words="batched forward mode",
        directions="several",
        forward=True,
    ),
    "forward loop": Way(
        autodiff="forward",
        compute=looped_forward_features,
        forwards=lambda n_outputs, rank: 3 * rank,
        held=(LIVE_TENSORS, 0, 0),
        words="one direction at a time, at 3 K instead of 1 + 2 K forward passes per row",
        forward=True,
    ),
    "double": Way(
        autodiff="double",
        compute=double_vjp_features,
        forwards=lambda n_outputs, rank: 3 + 3 * rank,
        held=(0, 2, 0),
        words="two backward passes per direction, at about 3 K instead of 1 + 2 K forward passes per row",
    ),
    "reverse": Way(
        autodiff="reverse",
        compute=reverse_features,
        forwards=lambda n_outputs, rank: 1 + 4 * n_outputs,
        held=(0, 1, 2),
        words="one backward pass for each of C outputs, at about 1 + 4 C forward passes per row",
        directions="all",
        gradients="vmap",
        reference=True,
    ),
    "reverse loop": Way(
        autodiff="reverse",
        compute=looped_reverse_features,
        forwards=lambda n_outputs, rank: 1 + 4 * n_outputs,
        held=(0, 1, 2),
        words="one backward pass for each row and output, at 1 + 4 C or more forward passes of single rows",
        directions="all",
        gradients="loop",
        reference=True,
    ),
}


class _Choices:
    """What ``autodiff`` may be, read from the table whenever somebody asks: rows may have been added."""

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(["auto", *(way.autodiff for way in FEATURES.values())]))


AUTODIFF: Iterable[str] = _Choices()
