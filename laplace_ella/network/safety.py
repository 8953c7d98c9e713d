r"""What makes it safe to run and differentiate the user's module.

Everything that runs the model runs inside :func:`safely`, which notes what can change and restores
it in one place, exceptions included.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

from .caches import Containers, parametrisation_cache, set_parametrisation_cache
from .interrupts import Transforms, close_contexts, completed, interrupt_behind
from .module_state import ModuleState
from .norms import ElementaryNorms

Method = TypeVar("Method", bound=Callable[..., Any])
Result = TypeVar("Result")
Switch = tuple[Callable[[], Any], Callable[[Any], Any], Any]

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


def safely(module: nn.Module, action: Callable[[], Result], enable_backprop: bool = False) -> Result:
    """Run an action with the module's forward pass differentiable in both modes, and change nothing for good.

    Inside: evaluation mode, mathematical attention and no fused fast path (neither
    fused kernel has a forward-mode rule), no fused recurrent kernels if the module
    holds recurrent layers, compiled parts run eagerly, no inference mode, gradients
    recorded only with ``enable_backprop``. Threads take turns.

    Parameters
    ----------
    module : torch.nn.Module
    action : callable
    enable_backprop : bool
        Record a graph, so that gradients can reach the inputs.

    Notes
    -----
    Parameters, buffers, modes, switches and torch's transforms are noted at the start and restored at the end,
    wherever an interrupt comes. No ``with`` alone could promise as much: an interrupt at the first instruction of
    its ``__exit__`` keeps it from starting. Here, what was not left there is left in ``finally``.
    """
    visit = _Visit(module, enable_backprop)
    try:
        with visit.inside():
            return action()
    finally:
        visit.end()


@contextmanager
def safe_autodiff(module: nn.Module, enable_backprop: bool = False) -> Iterator[None]:
    """Be inside :func:`safely` for a ``with`` block.

    An interrupt at the first instruction of leaving is dealt with when its traceback goes.
    """
    visit = _Visit(module, enable_backprop)
    try:
        with visit.inside():
            yield
    finally:
        visit.end()


class _Visit:
    """What one call of :func:`safely` found, and has to restore."""

    def __init__(self, module: nn.Module, enable_backprop: bool) -> None:
        self.module, self.enable_backprop = module, enable_backprop
        self.handled = sys.exc_info()[1]  # by the caller, who may be dealing with an interrupt
        self.locked_before = _locked()
        self.noted: _Noted | None = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        try:
            self._enter()
            yield
        except BaseException as error:
            interrupt = interrupt_behind(error, self.handled)
            if interrupt is not None:
                close_contexts(error, self.handled)
            if interrupt is None or interrupt is error:
                raise
            raise interrupt from error
        finally:
            self.leave()

    def _enter(self) -> None:
        if not self.locked_before:
            LOCK.acquire()
        self.noted = _Noted(self.module)  # all of it, before anything changes
        _begin(self)
        self.noted.switch(self.enable_backprop)

    def leave(self) -> None:
        """Restore everything, and let other threads in; whatever interrupts, and if that is not done yet."""
        completed(self._restore)
        completed(self._unlock)

    def end(self) -> None:
        """Leave; let other threads in though something could not be restored."""
        try:
            self.leave()
        finally:
            completed(self._unlock)

    def _restore(self) -> None:
        if self.noted is not None:
            self.noted.restore()
            self.noted = None

    def _unlock(self) -> None:
        _end(self)
        if not self.locked_before:
            while _locked():
                LOCK.release()


# The outermost call that has the lock: a child forked by another thread finds the model in the middle of it.
_running: _Visit | None = None


def _begin(visit: _Visit) -> None:
    global _running
    _running = _running or visit


def _end(visit: _Visit) -> None:
    global _running
    if _running is visit:
        _running = None


def _in_forked_child() -> None:
    """Release what other threads held, which a child does not have, and end their calls, which it does not go on with."""
    global _running
    if _locked():  # by the thread that forked, whose call goes on in the child too
        return
    visit, _running = _running, None
    LOCK._at_fork_reinit()  # type: ignore[attr-defined]
    if visit is not None and visit.noted is not None:
        visit.noted.restore_process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)


def _locked() -> bool:
    """Say whether this thread holds the lock: a count of one's own could miss an interrupted acquisition."""
    return LOCK._is_owned()  # type: ignore[attr-defined]


class _Noted:
    """All that a call may change, noted in one place and restored in one place."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self.transforms = Transforms()
        self.modules, self.containers = ModuleState(modules), Containers(modules)
        self.inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else None
        self.switches = _switches(modules)
        self.values = [read() for read, _, _ in self.switches]

    def switch(self, enable_backprop: bool) -> None:
        if self.inference is not None:
            self.inference.__enter__()
        torch.set_grad_enabled(enable_backprop)
        for _, write, value in self.switches:
            if value is not None:
                write(value)
        self.modules.evaluate()
        if enable_backprop:
            ElementaryNorms().__enter__()  # left with the other transforms

    def restore_process(self) -> None:
        """Put back what is the same for all threads, where another thread than this one has changed it."""
        self.transforms.restore_process()
        self.modules.restore()
        self.containers.restore()
        for (read, write, inside), value in zip(self.switches, self.values):
            if inside is None or read() == inside:
                write(value)

    def restore(self) -> None:
        """Put everything back; may be run again where it was cut short."""
        self.transforms.restore()
        if self.inference is not None and not torch.is_inference_mode_enabled():
            self.inference.__exit__(None, None, None)
        self.modules.restore()
        self.containers.restore()
        for (_, write, _), value in zip(self.switches, self.values):
            write(value)


def _switches(modules: list[nn.Module]) -> list[Switch]:
    """Return (read, write, value inside) of every switch of the process that matters; None: left alone."""
    found = [*_FIXED]
    # torch 2.4 and 2.5 cannot be told to run compiled parts eagerly.
    if hasattr(torch.compiler, "set_stance") and any("_orig_mod" in m._modules for m in modules):
        found.append(_compiler_stance())
    # oneDNN's and cuDNN's recurrent kernels have no forward-mode rule; both
    # also run convolutions, so they stay on for every other model.
    if any(isinstance(m, nn.RNNBase) for m in modules):
        found += [_library(torch.backends.mkldnn), _library(torch.backends.cudnn)]
    return found


def _compiler_stance() -> Switch:
    # torch.compiler.set_stance tells what it replaced only after it has.
    eval_frame: Any = importlib.import_module("torch._dynamo.eval_frame")
    return lambda: eval_frame._stance, eval_frame._set_stance, eval_frame.DynamoStance("force_eager")


def _library(library: Any) -> Switch:
    # The libraries' own flags() contexts set their TF32 options too, and may warn.
    return lambda: library.enabled, lambda value: setattr(library, "enabled", value), False


def _attention_kernels() -> list[Switch]:
    # What torch.nn.attention.sdpa_kernel switches; torch 2.4 has fewer of them.
    names = ("flash", "mem_efficient", "math", "cudnn", "overrideable")
    known = [name for name in names if hasattr(torch._C, f"_get_{name}_sdp_enabled")]
    return [
        (getattr(torch._C, f"_get_{k}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{k}"), k == "math")
        for k in known
    ]


@contextmanager
def switched(read: Callable[[], bool], write: Callable[[bool], Any], value: bool) -> Iterator[None]:
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


_functorch: Any = torch._C._functorch
_FIXED: list[Switch] = [
    # Values of parametrised weights that parametrize.cached() keeps are those of the module's own weights.
    (parametrisation_cache, set_parametrisation_cache, (0, None)),
    *_attention_kernels(),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
    # Under the user's autocast, every copy of the weights would stay until its end.
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, False),
    (_get_vmap_warns, _set_vmap_warns, False),
    (_functorch._is_vmap_fallback_enabled, _functorch._set_vmap_fallback_enabled, None),
]
