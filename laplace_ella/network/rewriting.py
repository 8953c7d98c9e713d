r"""The same function, written so that forward mode costs less.

Forward mode pushes K tangents through every operator, so that what is cheap in a
plain forward pass is not any more:

- A convolution and the batch normalisation after it (evaluation mode) are one affine
  map. Folding the second into the weights of the first leaves nothing to do at the
  size of the activations, where normalising costs four passes over K tangents.
- A matrix product whose left side is not contiguous copies the weight for every row
  of the batch, K times, as soon as the weight has tangents.
- oneDNN converts every image to its own layout and back; channels-last needs neither.

Values agree to rounding; what a pattern does not fit is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from ..data.batches import Input, bare_tensor, each_cut
from .convolutions import CONVOLUTIONS
from .functional import FunctionalModel, Weights
from .lookups import Lookups
from .memory import attempt
from .places import named
from .recording import tolerance

_PRODUCTS = frozenset([F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__])
# Questions about a tensor that do not read its values.
_QUESTIONS = frozenset(
    [Tensor.dim, Tensor.size, *(getattr(Tensor, k).__get__ for k in ("shape", "ndim", "dtype"))]
)


@dataclass(frozen=True)
class Normalisation:
    """Names of the tensors of a batch normalisation that follows a convolution."""

    running_mean: str
    running_var: str
    weight: str | None
    bias: str | None
    eps: float


@dataclass(frozen=True)
class Rewrites:
    """What to rewrite in a model.

    Attributes
    ----------
    folds : dict of int to Normalisation
        By the number of the convolution's call.
    channels_last : bool
        Run 4-dimensional inputs in this layout.
    """

    folds: dict[int, Normalisation] = field(default_factory=dict)
    channels_last: bool = False


class _DivergedError(Exception):
    """A forward pass that does not follow the one that was recorded."""


class RewrittenModel(FunctionalModel):
    """A :class:`FunctionalModel` for forward mode, with rewrites found by :func:`find_rewrites`."""

    def __init__(self, model: FunctionalModel, rewrites: Rewrites) -> None:
        super().__init__(model.module, model.names, model.channel_axis, model.calling)
        self.rewrites, self.in_pairs, self.tree = rewrites, model.in_pairs, model.tree

    def called(self, module: nn.Module, placed: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, ..., C) of the module, in whose places ``placed`` stands now."""
        if self.rewrites.channels_last:
            x = _channels_last(x)
        mode = _Following(placed, self.rewrites.folds)
        try:
            with mode:
                return self.outputs_of(module, x, **model_kwargs)
        except _DivergedError:  # a branch that depends on the data
            return super().called(module, placed, x, **model_kwargs)


class _Following(Lookups):
    """Follow the outputs of convolutions to where they are used, and make left sides of products contiguous.

    One mode with lookups, as each takes its time at every call.

    Parameters
    ----------
    tensors : dict of Tensor
        Those that stand in the model's places.
    folds : dict of int to Normalisation, optional
        The normalisations that are folded into convolutions. By default none, and all uses are recorded.
    """

    def __init__(self, tensors: Weights, folds: dict[int, Normalisation] | None = None) -> None:
        super().__init__()
        self.tensors, self.folds = tensors, folds
        self.names = {id(t): k for k, t in tensors.items()}
        self.outputs: dict[
            int, tuple[int, Tensor]
        ] = {}  # those that are followed, and of which call they are
        self.uses: list[list[Normalisation | None]] = []  # of the output of every call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = not self.outputs or func in _QUESTIONS
        for call, out in () if asked else named(self.outputs, (*args, *kwargs.values())):
            norm = _normalisation(self.names, *args[1:], **kwargs) if func is F.batch_norm else None
            self.uses[call].append(norm)
            if self.folds is not None:
                if norm != self.folds[call]:
                    raise _DivergedError
                del self.outputs[id(out)]
                return out
        if func in CONVOLUTIONS:
            return self._convolve(func, *args, **kwargs)
        if func in _PRODUCTS and args and isinstance(args[0], Tensor) and args[0].ndim > 2:
            args = (args[0].contiguous(), *args[1:])
        if func is F.multi_head_attention_forward:
            args = (*_contiguous(args[:3]), *args[3:])
        return super().__torch_function__(func, types, args, kwargs)

    def _convolve(
        self, func: Any, x: Tensor, weight: Tensor, bias: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        call, norm = len(self.uses), (self.folds or {}).get(len(self.uses))
        self.uses.append([])
        if norm is not None:
            if len(weight) != len(self.tensors[norm.running_var]):  # it stands where another one was
                raise _DivergedError
            mean, variance = self.tensors[norm.running_mean], self.tensors[norm.running_var]
            factor, offset = (None if k is None else self.tensors[k] for k in (norm.weight, norm.bias))
            weight, bias = folded(weight, bias, mean, variance, factor, offset, norm.eps)
        out = func(x, weight, bias, *args, **kwargs)
        if self.folds is None or norm is not None:
            self.outputs[id(out)] = call, out
        return out


def folded(
    weight: Tensor, bias: Any, mean: Any, variance: Any, factor: Any, offset: Any, eps: float
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution with a normalisation after it; other modes see one call."""
    taken = weight, bias, mean, variance, factor, offset
    if has_torch_function(taken):
        return handle_torch_function(folded, taken, *taken, eps)
    scale = (variance + eps).rsqrt()
    scale = scale if factor is None else scale * factor
    shift = (-mean if bias is None else bias - mean) * scale
    weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    return weight, shift if offset is None else shift + offset


def _normalisation(
    names: dict[int, str],
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Normalisation | None:
    """Describe a call of ``batch_norm``, if it can be folded."""
    given = [t for t in (weight, bias) if t is not None]
    if training or not all(id(t) in names for t in (running_mean, running_var, *given)):
        return None
    return Normalisation(
        names[id(running_mean)], names[id(running_var)], names.get(id(weight)), names.get(id(bias)), eps
    )


def find_rewrites(model: FunctionalModel, x: Input) -> Rewrites:
    """Run the model once, and say what :class:`RewrittenModel` may do to it.

    Call it inside :func:`laplace_ella.network.safety.safely`. Cost: one or two forward passes.
    """
    # float64 convolutions are not oneDNN's.
    image = bare_tensor(x)
    if image is not None and image.ndim == 4 and image.device.type == "cpu" and image.dtype != torch.float64:
        # Nothing is found with a .view() that wants the layout given, say.
        uses, _ = attempt(lambda: _uses(model, _channels_last(x)))
        if uses is not None:
            return Rewrites(_folds(uses), channels_last=len(uses) > 0)
    return Rewrites(_folds(_uses(model, x)))


def _channels_last(x: Input) -> Input:
    """Bring the images that a model is called with into this layout; containers are left alone."""
    if bare_tensor(x) is None:
        return x
    return each_cut(x, lambda t: t.to(memory_format=torch.channels_last) if t.ndim == 4 else t)


def _folds(uses: list[list[Normalisation | None]]) -> dict[int, Normalisation]:
    """Return the normalisations of convolutions whose output goes to one of them, and nowhere else."""
    return {i: norms[0] for i, norms in enumerate(uses) if len(norms) == 1 and norms[0] is not None}


def _uses(model: FunctionalModel, x: Input) -> list[list[Normalisation | None]]:
    def run(module: nn.Module, placed: Weights) -> list[list[Normalisation | None]]:
        with _Following(placed) as mode:
            model.outputs_of(module, x)
        return mode.uses

    return model.within(model.weights(), run)


def rewritten(model: FunctionalModel, pair: Input, precision: torch.dtype) -> FunctionalModel:
    """Return the model for forward mode: rewritten if that works and agrees on two rows, else as it is.

    ``precision`` is the coarsest on the way, which says what rounding may do. Call it inside :func:`laplace_ella.network.safety.safely`.
    """
    weights = model.weights()
    tangents = {k: torch.ones_like(w) for k, w in weights.items()}

    def pushed(function: FunctionalModel) -> Any:
        return jvp(lambda w: function(w, pair), (weights,), (tangents,))

    def candidate(find: Callable[..., Rewrites]) -> tuple[FunctionalModel, Any]:
        function = RewrittenModel(model, find(model, pair))
        return function, pushed(function)

    expected = pushed(model)
    for find in (find_rewrites, lambda *_: Rewrites()):
        made, _ = attempt(partial(candidate, find))
        if made is not None and all(agree(a, b, precision) for a, b in zip(made[1], expected)):
            return made[0]
    return model


def agree(left: Tensor, right: Tensor, precision: torch.dtype, times: float = 1) -> bool:
    """Tell whether two results are equal up to (some times) rounding, of which the coarsest precision on the way is known."""
    if not right.isfinite().all():
        return torch.equal(left.isfinite(), right.isfinite())
    return bool((left - right).norm() <= times * tolerance(right.dtype, precision) * right.norm())


def _contiguous(values: Any) -> list[Any]:
    # Query, key and value may be one tensor, which the function looks at.
    made = {id(v): v.contiguous() if isinstance(v, Tensor) else v for v in values}
    return [made[id(v)] for v in values]
