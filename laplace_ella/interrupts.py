"""Interrupts that reach torch in the middle of a function transform."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

_torch: Any = torch._C


@contextmanager
def contained() -> Iterator[None]:
    """Raise KeyboardInterrupt for an interrupt inside, and leave torch as it was.

    An interrupt that comes just when a transform has been entered leaves torch's stack of them one too high until
    the traceback is gone. The transform around it then fails on its way out ("INTERNAL ASSERT FAILED"), which would
    hide the interrupt, and what was entered is left too late: without gradients, or with a count of forward-mode
    transforms that makes the next one fail.
    """
    handled = sys.exc_info()[1]  # by the caller, who may be dealing with an interrupt
    before = _State()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        chain = _chain(error, handled)
        if not any(isinstance(one, KeyboardInterrupt) for one in chain):
            raise
        for one in chain:  # the frames of a traceback hold contexts that were entered and not left
            traceback.clear_frames(one.__traceback__)
        before.restore()
        if isinstance(error, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from error


class _State:
    """What torch's transforms, and what overrides its functions, have entered."""

    def __init__(self) -> None:
        self.gradients = torch.is_grad_enabled()
        self.functions = _torch._len_torch_function_stack()
        self.level = forward_ad._current_level
        self.jvps = eager_transforms.JVP_NESTING

    def restore(self) -> None:
        torch.set_grad_enabled(self.gradients)
        while _torch._len_torch_function_stack() > self.functions:
            _torch._pop_torch_function_stack()
        while forward_ad._current_level > self.level:
            forward_ad.exit_dual_level()
        eager_transforms.JVP_NESTING = min(eager_transforms.JVP_NESTING, self.jvps)


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
