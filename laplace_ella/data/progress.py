"""Progress bars over the items of long work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

# (items, name of the work) -> items
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def progress_bars(enabled: bool) -> Progress:
    """Return a function that wraps an iterable in a named progress bar; or one that does nothing."""
    # tqdm.auto's bars start an iterable twice, and with it the workers of a loader.
    return lambda iterable, name: tqdm(iterable, desc=name) if enabled else iterable


def no_progress(iterable: Iterable[Any], name: str) -> Iterable[Any]:
    """Return an iterable as it is."""
    return iterable


def duration(seconds: float) -> str:
    """Write seconds for people."""
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
