"""Clocks, page faults and memory, and the rows in which they are written down."""

from __future__ import annotations

import contextlib
import ctypes
import math
import resource
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

GIGABYTE = 1e9


@dataclass
class Calls:
    """What repeated calls of one function took: wall-clock seconds, and minor page faults of this process."""

    seconds: list[float] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)

    def median(self) -> float:
        return statistics.median(self.seconds)


def interleaved(
    functions: dict[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    within: float = math.inf,
) -> dict[str, Calls]:
    """Call functions in turn, round after round after a warm-up, so that drift hits all alike.

    After ``within`` seconds no more rounds begin, if there were two.
    """
    calls = {name: Calls() for name in functions}
    start = time.perf_counter()
    for round_ in range(repeats + 1):
        if round_ > 2 and time.perf_counter() - start > within:
            break
        for name, function in functions.items():
            seconds, faults = once(function, device, clock)
            if round_:
                calls[name].seconds.append(seconds)
                calls[name].faults.append(faults)
    return calls


def once(
    function: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, int]:
    """Return the seconds and page faults of one call."""
    synchronize(device)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = clock()
    function()
    synchronize(device)
    seconds = clock() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(calls: dict[str, Calls], name: str, unit: str) -> dict[str, float]:
    """Median of the quotients of each round, with the quartiles."""
    return spread([a / b for a, b in zip(calls[name].seconds, calls[unit].seconds)])


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def plain(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass of the user's model, without a graph."""

    @torch.no_grad()
    def forward() -> Tensor:
        return model(x)

    return forward


def loader(x: Tensor, y: Tensor, batch: int) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def result(
    case: str,
    unit: str,
    value: float | None,
    target: float | None = None,
    at_most: bool = True,
    headline: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Return a row of the JSON; ``headline`` rows are those the project's README shows."""
    met = None
    if target is not None and value is not None:
        met = value <= target if at_most else value >= target
    return {
        "case": case,
        "value": None if value is None else round(value, 3),
        "unit": unit,
        "target": None if target is None else {"at most" if at_most else "at least": target},
        "met": met,
        "headline": headline,
        **more,
    }


def failure(case: str, unit: str, reason: BaseException | str, **more: Any) -> dict[str, Any]:
    """Return a row that says why there is no number."""
    if isinstance(reason, BaseException):
        reason = f"{type(reason).__name__}: {reason}"
    first = (reason.strip().splitlines() or ["failed"])[0]
    return result(case, unit, None, failure=textwrap.shorten(first, 120, placeholder=" ..."), **more)


class PeakMemory:
    """Bytes a process takes at its peak, beyond what it held on entry: resident set, or CUDA's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            with contextlib.suppress(OSError):  # Linux: forget the peak of what came before
                Path("/proc/self/clear_refs").write_text("5")
            self.before = psutil.Process().memory_info().rss
        return self

    def __exit__(self, *error: object) -> None:
        self.extra = peak_memory(self.device) - self.before


def give_back() -> None:
    """Return freed memory to the system, so that what is allocated next is counted (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """Return the peak of this process, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's peak too
        (line,) = (row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
