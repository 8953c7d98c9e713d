r"""What makes it safe to run and differentiate the user's module.

Everything that runs the model runs inside :func:`safely`, which changes the module and the process
in one place and restores them in one place, exceptions included.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from .interrupts import ctrl_c_held_back
from .module_state import ModuleState
from .norms import ElementaryNorms
from .places import modules_of

Method = TypeVar("Method", bound=Callable[..., Any])
Result = TypeVar("Result")

# Train flags, backend switches and torch.func.functional_call act on the whole
# process or the whole module. One re-entrant lock, held while any of them is
# changed, makes the contexts nest strictly: the last one out restores.
LOCK = threading.RLock()

if hasattr(os, "register_at_fork"):
    # A fork waits for the calls of other threads: a child has none of these threads, to end what they began.
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


def exclusively(method: Method) -> Method:
    """Let a method wait until no other thread has the model's weights exchanged."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with LOCK:
            return method(*args, **kwargs)

    return run  # type: ignore[return-value]


def safely(module: nn.Module, action: Callable[[], Result], enable_backprop: bool = False) -> Result:
    """Run an action with the module's forward pass differentiable in both modes, and change nothing for good.

    The action runs in evaluation mode, with mathematical attention and without the fused fast path (neither
    fused kernel has a forward-mode rule), without fused recurrent kernels if the module holds recurrent
    layers, with compiled parts run eagerly, outside of inference mode, and with gradients recorded only if
    ``enable_backprop`` is set. Threads take turns. Ctrl-C waits for the end of a chunk of the work.

    Parameters
    ----------
    module : torch.nn.Module
    action : callable
    enable_backprop : bool
        Record a graph, so that gradients can reach the inputs.
    """
    with LOCK, ctrl_c_held_back(), ExitStack() as stack:
        modules = modules_of(module)
        state = ModuleState(modules)
        stack.callback(state.restore)
        for context in _contexts(modules, enable_backprop):
            stack.enter_context(context)
        state.evaluate()
        return action()


def _contexts(modules: list[nn.Module], enable_backprop: bool) -> Iterator[AbstractContextManager[Any]]:
    """Yield the contexts of :func:`safely`; some act when they are made, so each is entered before the next."""
    if torch.is_inference_mode_enabled():
        yield torch.inference_mode(False)
    yield torch.set_grad_enabled(enable_backprop)
    # Values of parametrised weights that parametrize.cached() keeps are those of the module's own weights.
    yield _attribute(parametrize, "_cache_enabled", 0)
    yield _attribute(parametrize, "_cache", {})
    yield sdpa_kernel(SDPBackend.MATH)
    yield switched(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False)
    # Under the user's autocast, every copy of the weights would stay until its end.
    yield switched(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, False)
    yield switched(_get_vmap_warns, _set_vmap_warns, False)
    # torch 2.4 and 2.5 cannot be told to run compiled parts eagerly.
    if hasattr(torch.compiler, "set_stance") and any("_orig_mod" in m._modules for m in modules):
        yield torch.compiler.set_stance("force_eager")
    # oneDNN's and cuDNN's recurrent kernels have no forward-mode rule; both
    # also run convolutions, so they stay on for every other model.
    if any(isinstance(m, nn.RNNBase) for m in modules):
        # The libraries' own flags() contexts set their TF32 options too, and may warn.
        yield _attribute(torch.backends.mkldnn, "enabled", False)
        yield _attribute(torch.backends.cudnn, "enabled", False)
    if enable_backprop:
        yield ElementaryNorms()


def _attribute(owner: Any, name: str, value: Any) -> AbstractContextManager[None]:
    """Give an attribute a value, and its old one back at the end."""
    return switched(partial(getattr, owner, name), partial(setattr, owner, name), value)


@contextmanager
def switched(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """Give a process-wide switch a value, and its old one back at the end."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


# torch does not tell whether vmap warns of operators without batching rule, at every call; probing says it once.
_vmap_warns = True


def _get_vmap_warns() -> bool:
    return _vmap_warns


def _set_vmap_warns(value: bool) -> None:
    global _vmap_warns
    functorch: Any = torch._C._functorch
    functorch._set_vmap_fallback_warning_enabled(value)
    _vmap_warns = value
