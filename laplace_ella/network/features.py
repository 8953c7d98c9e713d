r"""Features :math:`\phi(x) = J(x) V`: the Jacobian seen through the basis.

There are several ways to compute them, which agree to rounding and differ in cost and in what
operators they need. None forms a Jacobian. :data:`FEATURES` is the table of them, and all that the
rest of the package knows of a way are the facts of its row; :mod:`laplace_ella.network.probing`
finds out which ways a model supports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vmap

from ..data.batches import Input
from .contraction import contracted_features
from .derived import DerivedModel
from .functional import FunctionalModel, Pull, Weights, backward_passes
from .memory import LIVE_TENSORS, Chunks
from .pulling import in_blocks, looped_reverse_features, reverse_features

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
    contracts : bool
        It contracts layer by layer, for which it is recorded how models use their weights.
    per_output : int
        How often a call holds each input's largest tensor for every output.
    reference : bool
        It takes plain backward passes, with which the features of other ways are compared.
    prepare : callable, optional
        (model, directions) -> what ``compute`` takes beside the directions, or in place of some. An engine prepares
        the same directions once, and keeps the result for as long as they live; it must not hold the directions itself.
    """

    autodiff: str
    compute: Features
    forwards: Callable[[int, int], float]
    held: tuple[int, int, int]
    words: str
    directions: str = "one"
    gradients: str | None = None
    forward: bool = False
    contracts: bool = False
    per_output: int = 0
    reference: bool = False
    prepare: Callable[[FunctionalModel, Weights], Any] | None = None

    def __call__(
        self, model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
    ) -> tuple[Tensor, Tensor]:
        """Compute the features (B, C, K) and outputs (B, C)."""
        prepared = {} if self.prepare is None else self.prepare(model, directions)
        return self.compute(model, weights, {**directions, **prepared}, x, chunks)


def prepared(model: FunctionalModel, directions: Weights) -> Weights:
    """Return directions for what a model derives from its weights."""
    return model.prepared(directions) if isinstance(model, DerivedModel) else {}


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
        rank = _rank(directions)
        for start in range(0, rank, chunks.directions):
            some = {k: v[start : start + chunks.directions] for k, v in directions.items()}
            # Forward mode takes tangents as they are only if they fill their memory.
            f, phi = push(some if chunks.directions >= rank else {k: v.clone() for k, v in some.items()})
            parts.append(phi)
        return torch.cat(parts, -1), f[0]

    return in_blocks(push_block, chunks.inputs, x)


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

    return in_blocks(push_block, chunks.inputs, x)


def forward_pass(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input
) -> tuple[Tensor, Tensor]:
    """Return J V (B, C, K) and f (B, C) of one chunk."""
    return forward_features(model, weights, directions, x, Chunks(10**9, 10**9))


def _pushing(
    model: FunctionalModel, weights: Weights, x: Input
) -> Callable[[Weights], tuple[Tensor, Tensor]]:
    """Return the function from a tangent v to the outputs f and J v, both (B, C)."""

    def push(tangent: Weights) -> tuple[Tensor, Tensor]:
        moving = {k: weights[k] for k in tangent}
        f, phi, *_ = jvp(lambda w: model({**weights, **w}, x), (moving,), (tangent,))
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

    return in_blocks(lambda block: backward_passes(model, block, push), chunks.inputs, x)


def _rank(directions: Weights) -> int:
    return next(iter(directions.values())).shape[0]


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
        prepare=prepared,
    ),
    "forward loop": Way(
        autodiff="forward",
        compute=looped_forward_features,
        forwards=lambda n_outputs, rank: 3 * rank,
        held=(LIVE_TENSORS, 0, 0),
        words="one direction at a time, at 3 K instead of 1 + 2 K forward passes per row",
        forward=True,
        prepare=prepared,
    ),
    "double": Way(
        autodiff="double",
        compute=double_vjp_features,
        forwards=lambda n_outputs, rank: 3 + 3 * rank,
        held=(0, 2, 0),
        words="two backward passes per direction, at about 3 K instead of 1 + 2 K forward passes per row",
    ),
    "contraction": Way(
        autodiff="contraction",
        compute=contracted_features,
        forwards=lambda n_outputs, rank: 2 + 2 * n_outputs,
        held=(0, 2, 0),
        words="contraction layer by layer, at about 2 + 2 C forward passes per input",
        directions="all",
        contracts=True,
        per_output=LIVE_TENSORS,
        prepare=prepared,
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
