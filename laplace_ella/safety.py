r"""The contexts that make it safe to run and differentiate the user's module.

Everything that runs the model runs inside :func:`safe_autodiff`, which undoes
whatever it switches, exceptions included.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .interrupts import contained
from .norms import ElementaryNorms

Method = TypeVar("Method", bound=Callable[..., Any])

# Train flags, backend switches and torch.func.functional_call act on the whole
# process or the whole module. One re-entrant lock, held while any of them is
# changed, makes the contexts nest strictly: the last one out restores.
LOCK = threading.RLock()


def exclusively(method: Method) -> Method:
    """Let a method wait until no other thread has the model's weights exchanged."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with LOCK:
            return method(*args, **kwargs)

    return run  # type: ignore[return-value]


def safe_autodiff(module: nn.Module, enable_backprop: bool = False) -> AbstractContextManager[None]:
    """Make a module's forward pass differentiable in both modes, and change nothing for good.

    Inside: evaluation mode, mathematical attention and no fused fast path (neither
    fused kernel has a forward-mode rule), no fused recurrent kernels if the module
    holds recurrent layers, compiled parts run eagerly, no inference mode, gradients
    recorded only with ``enable_backprop``. Threads take turns.

    Parameters
    ----------
    module : torch.nn.Module
    enable_backprop : bool
        Record a graph, so that gradients can reach the inputs.
    """
    return _Safe(module, enable_backprop)


class _Safe:
    """What :func:`safe_autodiff` returns: no generator, as an interrupt can leave those entered for too long."""

    def __init__(self, module: nn.Module, enable_backprop: bool) -> None:
        self.module, self.enable_backprop = module, enable_backprop
        self._stack = ExitStack()

    def __enter__(self) -> None:
        try:
            self._stack.enter_context(LOCK)
            self._stack.enter_context(contained())
            _switch_all(self._stack, self.module, self.enable_backprop)
        except BaseException:
            self._stack.__exit__(*sys.exc_info())
            raise

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def __del__(self) -> None:
        self._stack.close()  # if an interrupt came at the first instruction of leaving


def _switch_all(stack: ExitStack, module: nn.Module, enable_backprop: bool) -> None:
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.set_grad_enabled(enable_backprop))
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    mha = torch.backends.mha
    stack.enter_context(switched(mha.get_fastpath_enabled, mha.set_fastpath_enabled, False))
    # Under the user's autocast, every copy of the weights would stay until its end.
    stack.enter_context(switched(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, False))
    stack.enter_context(_without_batching_warnings())
    if _has_compiled_parts(module):
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    # oneDNN's and cuDNN's recurrent kernels have no forward-mode rule; both
    # also run convolutions, so they stay on for every other model.
    if any(isinstance(m, nn.RNNBase) for m in module.modules()):
        stack.enter_context(_disabled(torch.backends.mkldnn))
        stack.enter_context(_disabled(torch.backends.cudnn))
    stack.enter_context(_evaluation_mode(module))
    if enable_backprop:
        stack.enter_context(ElementaryNorms())


@contextmanager
def switched(read: Callable[[], bool], write: Callable[[bool], Any], value: bool) -> Iterator[None]:
    """Give a process-wide switch a value, and its old one back at the end."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


_quiet = 0


@contextmanager
def _without_batching_warnings() -> Iterator[None]:
    # vmap would warn of an operator without batching rule at every call; probing says it once.
    # torch does not tell the flag's value, so that contexts are counted; on is its default.
    global _quiet
    functorch: Any = torch._C._functorch
    _quiet += 1
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        _quiet -= 1
        functorch._set_vmap_fallback_warning_enabled(_quiet == 0)


def _has_compiled_parts(module: nn.Module) -> bool:
    # torch 2.4 and 2.5 cannot be told to run such parts eagerly.
    return hasattr(torch.compiler, "set_stance") and any(hasattr(m, "_orig_mod") for m in module.modules())


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
    before = [(m, m.training, dict(vars(m))) for m in module.modules()]
    try:
        for m, _, _ in before:
            m.training = False
        yield
    finally:
        for m, training, attributes in before:
            m.training = training
            _restore_tensors(m.__dict__, attributes)


def _restore_tensors(current: dict[str, Any], before: dict[str, Any]) -> None:
    stored = [k for k, v in current.items() if isinstance(v, Tensor) and before.get(k) is not v]
    for name in stored:
        if name in before:
            current[name] = before[name]
        else:
            del current[name]
