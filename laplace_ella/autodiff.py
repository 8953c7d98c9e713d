r"""The user's module as a pure function of its weights, and the contexts that make it safe.

Everything that runs the model runs inside :func:`safe_autodiff`, which undoes
whatever it switches, exceptions included.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .batches import Input, collate, single_row

Weights = dict[str, Tensor]

# Train flags, backend switches and torch.func.functional_call act on the whole
# process or the whole module. One re-entrant lock, held while any of them is
# changed, makes the contexts nest strictly: the last one out restores.
_LOCK = threading.RLock()


def flat(values: Tensor) -> Tensor:
    """Flatten all axes but the first, also where there is no other, or an empty one."""
    return values.reshape(values.shape[0], math.prod(values.shape[1:]))


class FunctionalModel:
    r"""A module seen as :math:`\theta \mapsto f(x; \theta)` over its trainable weights.

    Tied weights appear once, frozen weights not at all. Buffers are handed to the
    module as copies, so that no call can alter them.

    Parameters
    ----------
    module : torch.nn.Module
        Takes a tensor or a mapping, returns a tensor (B, C) or an object whose
        ``.logits`` is one.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def weights(self) -> Weights:
        """Return the weights that require grad, detached, in the order of ``parameters()``."""
        return {k: p.detach() for k, p in self.module.named_parameters() if p.requires_grad}

    def __call__(self, weights: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, C) at ``weights``.

        Raises
        ------
        ValueError
            If the outputs are not a tensor of two axes.
        """
        buffers = {k: b.detach().clone() for k, b in self.module.named_buffers()}
        out = functional_call(self.module, (weights, buffers), (x,), model_kwargs)
        f = getattr(out, "logits", out)
        if not isinstance(f, Tensor) or f.ndim != 2:
            got = f"shape {tuple(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
            raise ValueError(
                "The model must return a tensor of shape (batch, outputs), or an object with such "
                f"`.logits`; got {got}. Wrap the model so that its forward flattens the outputs."
            )
        return f


@contextmanager
def safe_autodiff(module: nn.Module, enable_backprop: bool = False) -> Iterator[None]:
    """Make a module's forward pass differentiable in both modes, and change nothing for good.

    Inside: evaluation mode, mathematical attention and no fused fast path (neither
    fused kernel has a forward-mode rule), no fused recurrent kernels if the module
    holds recurrent layers, no inference mode, gradients recorded only with
    ``enable_backprop``. Threads take turns.

    Parameters
    ----------
    module : torch.nn.Module
    enable_backprop : bool
        Record a graph, so that gradients can reach the inputs.
    """
    with ExitStack() as stack:
        stack.enter_context(_LOCK)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(enable_backprop))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_without_fast_path())
        # oneDNN's and cuDNN's recurrent kernels have no forward-mode rule; both
        # also run convolutions, so they stay on for every other model.
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            stack.enter_context(_disabled(torch.backends.mkldnn))
            stack.enter_context(_disabled(torch.backends.cudnn))
        stack.enter_context(_evaluation_mode(module))
        yield


@contextmanager
def _without_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _disabled(library: Any) -> Iterator[None]:
    # The libraries' own flags() contexts set their TF32 options too, and may warn.
    before = library.enabled
    library.enabled = False
    try:
        yield
    finally:
        library.enabled = before


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    # The flag itself, not .eval(): modules may override train() with side effects
    # (LoRA layers merge their weights there), and each keeps its own flag. Tensors that
    # a forward pass stores would belong to a transform that has ended.
    before = [(m, dict(vars(m))) for m in module.modules()]
    try:
        for m, _ in before:
            m.training = False
        yield
    finally:
        for m, attributes in before:
            m.training = attributes["training"]
            _restore_tensors(m.__dict__, attributes)


def _restore_tensors(current: dict[str, Any], before: dict[str, Any]) -> None:
    stored = [k for k, v in current.items() if isinstance(v, Tensor) and before.get(k) is not v]
    for name in stored:
        if name in before:
            current[name] = before[name]
        else:
            del current[name]


class _TensorSizes(TorchDispatchMode):
    """Record the size in bytes of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        values = out if isinstance(out, (tuple, list)) else [out]
        self.nbytes += [v.numel() * v.element_size() for v in values if isinstance(v, Tensor)]
        return out


def largest_activation(model: FunctionalModel, x: Input) -> int:
    """Return the bytes one row of ``x`` takes in the largest intermediate tensor of a forward pass.

    Cost: a forward pass of one row and one of two. Their difference leaves out what
    does not grow with the batch (weights, masks). Call it inside :func:`safe_autodiff`.
    """
    row = single_row(x, 0)
    _, pair = next(collate([row, row], 2))
    sizes = []
    for batch in (row, pair):
        with _TensorSizes() as record:
            model(model.weights(), batch)
        sizes.append(record.nbytes)
    one, two = sizes
    if len(one) != len(two):
        return max(max(two) // 2, 1)
    return max(1, *(b - a for a, b in zip(one, two)))
