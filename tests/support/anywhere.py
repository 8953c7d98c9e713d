"""Interrupts at any point of a call."""

import signal
import sys
import threading
from contextlib import contextmanager

from laplace_ella.network.safety import LOCK


def ctrl_c():
    """Deliver the signal, which Python handles at once."""
    signal.raise_signal(signal.SIGINT)


class Interrupting:
    """Counts the points at which an interrupt can come, and raises one at one of them.

    Parameters
    ----------
    at : int
        The number of the point, from 1; 0 for none.
    lines : tuple of str
        Modules in which every line is a point. Without any, the points are where CPython may handle a signal: at
        the start of every function of every module, and after every function of C.
    interrupt : callable
        Raises it.
    """

    def __init__(self, at, lines=(), interrupt=ctrl_c):
        self.at, self.lines, self.interrupt = at, lines, interrupt
        self.seen, self.where = 0, ""

    def _come_to(self, frame):
        self.seen += 1
        if self.at == self.seen:
            self.where = f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}, line {frame.f_lineno}, at {self.at}"
            self.interrupt()

    def _profile(self, frame, event, argument):
        if event in ("call", "c_return") and frame.f_code.co_filename != __file__:
            self._come_to(frame)

    def _trace(self, frame, event, argument):
        if not frame.f_globals.get("__name__", "").startswith(self.lines):
            return None
        if event == "line":
            self._come_to(frame)
        return self._trace

    @contextmanager
    def on(self):
        if self.lines:
            sys.settrace(self._trace)
        else:
            sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.settrace(None)
            sys.setprofile(None)


def points(call, lines=()):
    """Return the numbers of the points at which a call can be interrupted."""
    counting = Interrupting(0, lines)
    with counting.on():
        call()
    return range(1, counting.seen + 1)


def free():
    """Say whether another thread may take its turn."""
    found = []

    def try_to():
        found.append(LOCK.acquire(blocking=False))
        if found[0]:
            LOCK.release()

    thread = threading.Thread(target=try_to)
    thread.start()
    thread.join()
    return found[0]
