"""Interrupts: told apart from errors, and what they leave half done in torch put right.

Ctrl-C, a time-out's signal handler and an exception set from another thread can be raised at the start of any
function, so also at that of a context's ``__exit__``, which is then never left.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

_torch: Any = torch._C
_functorch: Any = torch._C._functorch
_TRANSFORM = _functorch.TransformType
_LEAVE_TRANSFORM = {
    _TRANSFORM.Vmap: _functorch._vmap_decrement_nesting,
    _TRANSFORM.Grad: _functorch._grad_decrement_nesting,
    _TRANSFORM.Jvp: _functorch._jvp_decrement_nesting,
    _TRANSFORM.Functionalize: _functorch._func_decrement_nesting,
}
# By these torch.compile knows that a dispatch mode is on: it would compile nothing any more. One has a copy in C++.
_MODE_FLAGS = [
    k for k, v in vars(_python_dispatch).items() if k.startswith("_is_in_") and isinstance(v, bool)
]
_COPIED_FLAG = "_is_in_any_mode_without_ignore_compile_internals"
# torch 2.4 crashes some time after a dispatch mode was taken off its stack by others than its own context.
_DISPATCHERS_CAN_BE_LEFT = torch.__version__ >= "2.5"
# How often a step is run again that something interrupts.
_ATTEMPTS = 100


def completed(step: Callable[[], None]) -> None:
    """Run a step to its end, again from its start if it is interrupted; then raise what came first.

    Parameters
    ----------
    step : callable
        May be run again wherever it was cut short.
    """
    first: BaseException | None = None
    for _ in range(_ATTEMPTS):
        try:
            step()
            break
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first


@contextmanager
def contained() -> Iterator[None]:
    """Raise an interrupt inside as what it is, and leave torch's transforms as they were.

    An interrupt that comes just when a transform has been entered leaves torch's stack of them one too high until
    the traceback is gone. The transform around it then fails on its way out ("INTERNAL ASSERT FAILED"), which would
    hide the interrupt.
    """
    handled = sys.exc_info()[1]  # by the caller, who may be dealing with an interrupt
    before = Transforms()
    try:
        yield
    except BaseException as error:
        interrupt = interrupt_behind(error, handled)
        if interrupt is None:
            raise
        close_contexts(error, handled)
        before.restore()
        if interrupt is error:
            raise
        raise interrupt from error


def interrupt_behind(error: BaseException, handled: BaseException | None) -> BaseException | None:
    """Return the interrupt that an error is, or hides; None if the error is one of the program's own.

    Parameters
    ----------
    error : BaseException
        What was raised.
    handled : BaseException, optional
        What its caller was handling when it began, which the error does not come from.
    """
    chain = _chain(error, handled)
    for one in chain:
        if not isinstance(one, (Exception, GeneratorExit)):
            return one
    handlers = _signal_handlers()
    for one in chain:
        if any(frame.f_code in handlers for frame, _ in traceback.walk_tb(one.__traceback__)):
            return one if _raised_by_torch(error) else error
    return None


def close_contexts(error: BaseException, handled: BaseException | None) -> None:
    """Leave the contexts of Python's that the frames of an error entered and did not leave.

    Later they would pop what others entered.
    """
    for one in _chain(error, handled):
        traceback.clear_frames(one.__traceback__)


class Transforms:
    """What torch's transforms, and what overrides its functions, have entered; noted, to be restored."""

    def __init__(self) -> None:
        self.gradients = torch.is_grad_enabled(), _torch._is_fwd_grad_enabled()
        self.functions = _torch._len_torch_function_stack()
        self.dispatchers = _torch._len_torch_dispatch_stack()
        self.flags = {name: getattr(_python_dispatch, name) for name in _MODE_FLAGS}
        self.depth = _depth()
        self.jvps = eager_transforms.JVP_NESTING
        self.level = forward_ad._current_level

    def restore(self) -> None:
        """Leave whatever has been entered since; may be run again where it was cut short."""
        while _depth() > self.depth:
            _LEAVE_TRANSFORM[_functorch.peek_interpreter_stack().key()]()
        self._leave_jvps()
        while _torch._len_torch_function_stack() > self.functions:
            _torch._pop_torch_function_stack()
        self._leave_dispatchers()
        torch.set_grad_enabled(self.gradients[0])
        _torch._set_fwd_grad_enabled(self.gradients[1])

    def _leave_jvps(self) -> None:
        eager_transforms.JVP_NESTING = self.jvps
        if self.level < 0:
            _leave_dual_levels()
        forward_ad._current_level = self.level

    def restore_process(self) -> None:
        """Leave what has been entered since and belongs to no thread."""
        self._leave_jvps()
        self._restore_flags()

    def _leave_dispatchers(self) -> None:
        if not _DISPATCHERS_CAN_BE_LEFT:
            return
        while _torch._len_torch_dispatch_stack() > self.dispatchers:
            _python_dispatch._pop_mode()
        self._restore_flags()

    def _restore_flags(self) -> None:
        for name, flag in self.flags.items():
            setattr(_python_dispatch, name, flag)
        copy = getattr(_python_dispatch, "set_is_in_mode_without_ignore_compile_internals", None)
        if copy is not None and _COPIED_FLAG in self.flags:
            copy(self.flags[_COPIED_FLAG])


def _depth() -> int:
    top = _functorch.peek_interpreter_stack()
    return 0 if top is None else int(top.level())


def _leave_dual_levels() -> None:
    # torch tells the level of forward mode only to those who enter one, and fails where one is open already.
    try:
        level = int(_torch._enter_dual_level())
    except RuntimeError:
        level = 0
    while level >= 0:
        _torch._exit_dual_level(level=level)
        level -= 1


def _chain(error: BaseException, handled: BaseException | None) -> list[BaseException]:
    """Return an error and those that it came from or followed, up to what was handled before."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and one is not handled and all(one is not known for known in found):
            found.append(one)
            waiting += [one.__cause__, one.__context__]
    return found


def _signal_handlers() -> set[CodeType]:
    """Return the code of the functions that handle signals: what they raise is raised anywhere."""
    found: set[Any] = set()
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        if callable(handler):
            handler = getattr(handler, "func", handler)  # of a partial
            function = getattr(handler, "__func__", handler)
            called = function if hasattr(function, "__code__") else type(function).__call__
            found.add(getattr(called, "__code__", None))
    return found - {None}


def _raised_by_torch(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("torch.")
