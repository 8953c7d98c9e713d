"""Interrupts that reach torch in the middle of a function transform."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._functorch import eager_transforms


@contextmanager
def raised_as_such() -> Iterator[None]:
    """Raise KeyboardInterrupt where torch tells of one by an error of its own.

    An interrupt that comes just when a transform has been entered leaves torch's stack of them one too high until
    the traceback is gone, and the transform around it fails on its way out: "INTERNAL ASSERT FAILED".
    """
    try:
        yield
    except Exception as error:
        if _follows_interrupt(error):
            raise KeyboardInterrupt from error
        raise


def restore_count() -> None:
    """Let torch count nested forward-mode transforms from zero if there are none, in case an interrupt made it lose count.

    It would take the next one for an inner one, and find no level for its dual numbers.
    """
    functorch: Any = torch._C._functorch
    if functorch.peek_interpreter_stack() is None:
        eager_transforms.JVP_NESTING = 0


def _follows_interrupt(error: BaseException) -> bool:
    before: BaseException | None = error
    while before is not None and not isinstance(before, KeyboardInterrupt):
        before = before.__cause__ or before.__context__
    return before is not None
