"""Interrupts at any point of a call, and all that they must leave as it was."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from laplace_ella.network import safety

# Where CPython may raise what a signal's handler raises: at the start of a function, and after one of C's.
POINTS = ("call", "c_return")


def ctrl_c() -> None:
    """Deliver the signal, which Python handles at once."""
    signal.raise_signal(signal.SIGINT)


class Interrupting:
    """Counts the points at which an interrupt can come, and raises one at one of them.

    Parameters
    ----------
    at : int
        The number of the point, from 1; 0 for none.
    lines : tuple of str
        Modules in which every line is a point; else functions are, of every module.
    interrupt : callable
        Raises it.
    """

    def __init__(self, at: int, lines: tuple[str, ...] = (), interrupt: Callable[[], Any] = ctrl_c) -> None:
        self.at, self.lines, self.interrupt = at, lines, interrupt
        self.seen, self.where = 0, ""
        self.names: list[str] = []

    def _come_to(self, frame: Any, name: str = "") -> None:
        self.seen += 1
        if self.at not in (0, self.seen):
            return
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        where = f"{module}.{function}, line {frame.f_lineno}{name}"
        self.names.append(where)
        if self.at == self.seen:
            self.where = where
            self.interrupt()

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        if event in POINTS and frame.f_code.co_filename != __file__:
            self._come_to(frame, "" if event == "call" else f", after {argument.__name__}")

    def _trace(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_globals.get("__name__", "").startswith(self.lines):
            return None
        if event == "line":
            self._come_to(frame)
        return self._trace

    @contextmanager
    def on(self) -> Iterator[None]:
        if self.lines:
            sys.settrace(self._trace)
        else:
            sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.settrace(None)
            sys.setprofile(None)


def points(call: Callable[[], Any], lines: tuple[str, ...] = ()) -> list[str]:
    """Return the name of every point of a call at which it can be interrupted."""
    counting = Interrupting(0, lines)
    with counting.on():
        call()
    return counting.names


def process_state() -> dict[str, Any]:
    """Return every switch, mode and stack of torch that a call changes."""
    functorch: Any = torch._C._functorch
    private: Any = torch._C
    top = functorch.peek_interpreter_stack()
    return {
        "gradients": torch.is_grad_enabled(),
        "forward gradients": private._is_fwd_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "transforms": None if top is None else top.level(),
        "jvps": eager_transforms.JVP_NESTING,
        "dual level": forward_ad._current_level,
        "true dual level": dual_level(),
        "functions": private._len_torch_function_stack(),
        "dispatchers": private._len_torch_dispatch_stack(),
        "dispatch flags": {k: v for k, v in vars(_python_dispatch).items() if k.startswith("_is_in_")},
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch.backends.mkldnn.enabled,
        "cudnn": torch.backends.cudnn.enabled,
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "vmap fallback": functorch._is_vmap_fallback_enabled(),
        "vmap warns": getattr(safety, "_vmap_warns", getattr(safety, "_quiet", 0) == 0),
        "included": str(private._dispatch_tls_local_include_set()),
        "excluded": str(private._dispatch_tls_local_exclude_set()),
        "anomaly": torch.is_anomaly_enabled(),
        "lock": safety.LOCK._is_owned(),
    }


def dual_level() -> int:
    private: Any = torch._C
    level = private._enter_dual_level()
    private._exit_dual_level(level=level)
    return int(level)


def module_state(model: nn.Module) -> list[Any]:
    """Return the tensors of a module, by identity, with what they are, and the flags and hooks of its parts."""
    found: list[Any] = []
    for name, m in model.named_modules():
        attributes = {k: id(v) for k, v in vars(m).items() if isinstance(v, Tensor)}
        tensors = [(k, id(t)) for k, t in (*m._parameters.items(), *m._buffers.items())]
        kinds = [(type(t), None if t is None else t.requires_grad) for t in m._parameters.values()]
        found.append((name, m.training, attributes, tensors, kinds, list(m._forward_hooks)))
    return found


def free() -> bool:
    """Say whether another thread may take its turn."""
    found = []

    def try_to() -> None:
        found.append(safety.LOCK.acquire(blocking=False))
        if found[0]:
            safety.LOCK.release()

    thread = threading.Thread(target=try_to)
    thread.start()
    thread.join()
    return found[0]
