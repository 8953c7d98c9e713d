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

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..data.batches import Input
from .functional import FunctionalModel, Weights
from .lookups import Lookups
from .memory import attempt
from .recording import tolerance

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)
# Questions about a tensor that do not read its values.
_QUESTIONS = (Tensor.dim, Tensor.size, Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__)  # type: ignore[attr-defined]


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

    def __init__(
        self,
        module: nn.Module,
        rewrites: Rewrites,
        in_pairs: bool = False,
        names: Collection[str] | None = None,
    ) -> None:
        super().__init__(module, names)
        self.rewrites, self.in_pairs = rewrites, in_pairs

    def outputs(self, weights: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, ..., C) at ``weights``, in their own shape."""
        if self.rewrites.channels_last and isinstance(x, Tensor):
            x = x.to(memory_format=torch.channels_last)
        tensors = {**self.constants(), **weights}
        frozen = {k: p for k, p in self.module.named_parameters() if k not in weights}
        mode = _Rewriting(self.rewrites.folds, {**frozen, **tensors})

        def run(module: nn.Module) -> Tensor:
            with mode, Lookups():
                f = self.outputs_of(module, x, **model_kwargs)
            mode.finish()
            return f

        try:
            return self.within(tensors, run)
        except _DivergedError:  # a branch that depends on the data
            return super().outputs(weights, x, **model_kwargs)


class _Rewriting(TorchFunctionMode):
    """Fold normalisations into convolutions, and make left sides of products contiguous."""

    def __init__(self, folds: dict[int, Normalisation], tensors: Weights) -> None:
        super().__init__()
        self.folds, self.tensors, self.names = folds, tensors, _names(tensors)
        self.calls = 0
        self.folded: dict[int, tuple[Tensor, Normalisation]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and args:
            return func(args[0].contiguous() if _is_stack(args[0]) else args[0], *args[1:], **kwargs)
        if func is F.multi_head_attention_forward:
            return func(*_contiguous(args[:3]), *args[3:], **kwargs)
        if not self.folds:
            return func(*args, **kwargs)
        if func in _CONVOLUTIONS:
            return self._convolve(func, *args, **kwargs)
        if func is F.batch_norm and id(args[0]) in self.folded:
            return self._skip(*args, **kwargs)
        if func not in _QUESTIONS and any(id(t) in self.folded for t in _tensors(args, kwargs)):
            raise _DivergedError
        return func(*args, **kwargs)

    def _convolve(
        self, func: Any, x: Tensor, weight: Tensor, bias: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        norm = self.folds.get(self.calls)
        self.calls += 1
        if id(x) in self.folded:
            raise _DivergedError
        if norm is not None and len(self.tensors[norm.running_var]) != len(weight):
            raise _DivergedError
        if norm is None:
            return func(x, weight, bias, *args, **kwargs)
        scale = (self.tensors[norm.running_var] + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * self.tensors[norm.weight]
        mean = self.tensors[norm.running_mean]
        shift = (-mean if bias is None else bias - mean) * scale
        if norm.bias is not None:
            shift = shift + self.tensors[norm.bias]
        out = func(x, weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift, *args, **kwargs)
        self.folded[id(out)] = (out, norm)
        return out

    def _skip(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out, norm = self.folded.pop(id(x))
        if _normalisation(self.names, *args, **kwargs) != norm:
            raise _DivergedError
        return out

    def finish(self) -> None:
        """Make sure that every fold met its normalisation."""
        if self.folded:
            raise _DivergedError


class _Recording(TorchFunctionMode):
    """Find convolutions whose output goes to one batch normalisation, and nowhere else."""

    def __init__(self, tensors: Weights) -> None:
        super().__init__()
        self.names = _names(tensors)
        self.calls = 0
        self.outputs: dict[int, tuple[int, Tensor]] = {}
        self.uses: dict[int, list[Normalisation | None]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _QUESTIONS:
            for t in _tensors(args, kwargs):
                if id(t) in self.outputs:
                    norm = _normalisation(self.names, *args[1:], **kwargs) if func is F.batch_norm else None
                    self.uses[self.outputs[id(t)][0]].append(norm)
        out = func(*args, **kwargs)
        if func in _CONVOLUTIONS:
            self.outputs[id(out)] = (self.calls, out)
            self.uses[self.calls] = []
            self.calls += 1
        return out

    def folds(self) -> dict[int, Normalisation]:
        return {i: u[0] for i, u in self.uses.items() if len(u) == 1 and u[0] is not None}


def _names(tensors: Weights) -> dict[int, str]:
    return {id(t): k for k, t in tensors.items()}


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
    if isinstance(x, Tensor) and x.ndim == 4 and x.device.type == "cpu" and x.dtype != torch.float64:
        # None: a .view() that wants the layout given, say.
        recording, _ = attempt(lambda: _record(model, x.to(memory_format=torch.channels_last)))
        if recording is not None:
            return Rewrites(recording.folds(), channels_last=recording.calls > 0)
    return Rewrites(_record(model, x).folds())


def rewritten(model: FunctionalModel, pair: Input, precision: torch.dtype) -> FunctionalModel:
    """Return the model for forward mode: rewritten if that works and agrees on two rows, else as it is.

    ``precision`` is the coarsest on the way, which says what rounding may do. Call it inside :func:`laplace_ella.network.safety.safely`.
    """
    weights = model.weights()
    tangents = {k: torch.ones_like(w) for k, w in weights.items()}

    def pushed(function: FunctionalModel) -> Any:
        return jvp(lambda w: function(w, pair), (weights,), (tangents,))

    def candidate(find: Callable[..., Rewrites]) -> tuple[FunctionalModel, Any]:
        function = RewrittenModel(model.module, find(model, pair), model.in_pairs, model.names)
        return function, pushed(function)

    expected = pushed(model)
    for find in (find_rewrites, lambda *_: Rewrites()):
        made, _ = attempt(partial(candidate, find))
        if made is not None and all(_agree(a, b, precision) for a, b in zip(made[1], expected)):
            return made[0]
    return model


def _agree(left: Tensor, right: Tensor, precision: torch.dtype) -> bool:
    if not right.isfinite().all():
        return torch.equal(left.isfinite(), right.isfinite())
    return bool((left - right).norm() <= tolerance(right.dtype, precision) * right.norm())


def _record(model: FunctionalModel, x: Input) -> _Recording:
    tensors = {**dict(model.module.named_parameters()), **model.buffers(), **model.weights()}

    def run(module: nn.Module) -> _Recording:
        with _Recording(tensors) as recording:
            model.outputs_of(module, x)
        return recording

    return model.within(tensors, run)


def _is_stack(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 2


def _contiguous(values: Any) -> list[Any]:
    # Query, key and value may be one tensor, which the function looks at.
    made = {id(v): v.contiguous() if isinstance(v, Tensor) else v for v in values}
    return [made[id(v)] for v in values]


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, Tensor):
                yield item
