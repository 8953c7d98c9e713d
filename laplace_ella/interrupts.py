"""Interrupts that reach torch in the middle of a function transform."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch import eager_transforms

_torch: Any = torch._C


@contextmanager
def contained() -> Iterator[None]:
    """Raise KeyboardInterrupt for an interrupt inside, and leave torch as it was.

    An interrupt that comes just when a transform has been entered leaves torch's stack of them one too high until
    the traceback is gone. The transform around it then fails on its way out ("INTERNAL ASSERT FAILED"), which would
    hide the interrupt, and what was entered is left too late: without gradients, or with a count of forward-mode
    transforms that makes the next one fail.
    """
    gradients, n_modes = torch.is_grad_enabled(), _torch._len_torch_function_stack()
    try:
        yield
    except BaseException as error:
        if not _follows_interrupt(error):
            raise
        _leave_all(error)
        torch.set_grad_enabled(gradients)
        while _torch._len_torch_function_stack() > n_modes:
            _torch._pop_torch_function_stack()
        if _torch._functorch.peek_interpreter_stack() is None:
            eager_transforms.JVP_NESTING = 0
        if isinstance(error, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from error


def _follows_interrupt(error: BaseException) -> bool:
    return any(isinstance(one, KeyboardInterrupt) for one in _chain(error))


def _leave_all(error: BaseException) -> None:
    """Leave contexts that were entered and not left yet: the frames of a traceback hold them."""
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and those that it followed."""
    before: BaseException | None = error
    while before is not None:
        yield before
        before = before.__cause__ or before.__context__
