"""Ctrl-C waits where torch could not be left halfway.

Python raises KeyboardInterrupt between any two of its instructions, so also between entering one of torch's transforms
and the start of the ``with`` block that leaves it. What is entered then stays: every later forward mode fails ("Nested
forward mode AD is not supported"), and so does every backward pass. One Ctrl-C in a hundred did that to a small network.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# The frames in which a Ctrl-C came that waits, and what the program does at one.
_waiting: list[FrameType | None] = []
_program: Callable[[int, FrameType | None], Any] = signal.default_int_handler


@contextmanager
def ctrl_c_held_back() -> Iterator[None]:
    """Let a first Ctrl-C wait for :func:`raise_held_back`, or for the end; a second one is raised at once.

    Signals are handled in the main thread only, so other threads have nothing to hold back. A program that
    ignores Ctrl-C goes on to do so, and one that has a handler of its own has it called.
    """
    global _program
    before = signal.getsignal(signal.SIGINT)
    elsewhere = threading.current_thread() is not threading.main_thread()
    if elsewhere or before is _hold or not callable(before):
        yield
        return
    _program = before
    _waiting.clear()  # a second Ctrl-C may have cut one short
    signal.signal(signal.SIGINT, _hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        raise_held_back()


def _hold(number: int, frame: FrameType | None) -> None:
    second = bool(_waiting)
    _waiting.append(frame)
    if second:
        raise_held_back()


def raise_held_back() -> None:
    """Do now what the program does at a Ctrl-C, if one waits: raise KeyboardInterrupt, in general."""
    if _waiting:
        frame = _waiting[-1]
        _waiting.clear()
        _program(signal.SIGINT, frame)
