r"""How much memory there is, how much of it may be used, and what to do when it runs out."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from .interrupts import raise_held_back

# Share of the free memory that is planned with, when the user names no budget.
DEFAULT_SHARE = 0.25
# Tensors of this many bytes are large enough to keep cores busy, and below the size at
# which glibc maps and unmaps memory at every allocation (docs/performance.md).
CPU_WORKING_SET = 2**24
# The same for a forward pass whose every intermediate is kept for a backward pass.
CPU_GRADIENT_SET = 2**22
# A forward-mode pass keeps about this many tensors of the largest size alive.
LIVE_TENSORS = 8

# The name that torch 2.4 knows too; it covers every accelerator.
OutOfMemory = torch.cuda.OutOfMemoryError
Result = TypeVar("Result")


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; on CPU, a process's share of the available RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator has reserved and not handed out is free for us too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # torchrun's processes on this machine all count on the same memory.
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(int(psutil.virtual_memory().available), _left_to_container()) // n_processes


def _left_to_container() -> int:
    # psutil sees the machine; a container may have less.
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used -= int(counts["file"])  # the page cache gives way
    except (OSError, ValueError, KeyError):
        return sys.maxsize
    return max(0, int(limit) - used) if limit.isdigit() else sys.maxsize


def budget_bytes(budget: int | float | None, free: int) -> int:
    """Turn a budget into bytes: an int is bytes, a float a share of the free memory, None a quarter."""
    if isinstance(budget, int):
        return budget
    return max(1, int((DEFAULT_SHARE if budget is None else budget) * free))


@dataclass(frozen=True)
class Chunks:
    """How much one call of the model takes: inputs of the batch, and directions."""

    inputs: int
    directions: int

    def halved(self) -> Chunks | None:
        """Return half the inputs, or else half the directions; None if there is one of each."""
        if self.inputs > 1:
            return Chunks((self.inputs + 1) // 2, self.directions)
        if self.directions > 1:
            return Chunks(1, (self.directions + 1) // 2)
        return None


def with_smaller_chunks(
    compute: Callable[[Chunks], Result], chunks: Chunks, device: torch.device, need: Callable[[Chunks], int]
) -> tuple[Result, Chunks]:
    """Compute; when the device runs out of memory, halve the chunks with one warning and go on.

    Parameters
    ----------
    compute : callable
        Chunks -> result.
    need : callable
        Chunks -> bytes they are expected to take, for messages.

    Returns
    -------
    result, chunks
        The chunks that did it.

    Raises
    ------
    torch.cuda.OutOfMemoryError
        If a single row and direction do not fit.
    """
    first = chunks
    while True:
        raise_held_back()
        try:
            result = compute(chunks)
        except OutOfMemory as error:
            smaller = chunks.halved()
            if smaller is None:
                raise OutOfMemory(_too_small(need(chunks), device)) from error
        else:
            if chunks != first:
                warnings.warn(
                    f"{device} ran out of memory with {first.inputs} inputs x {first.directions} directions in one call; "
                    f"going on with {chunks.inputs} x {chunks.directions}. A lower memory_budget avoids this.",
                    stacklevel=2,
                )
            return result, chunks
        # Outside of the handler, whose traceback keeps the tensors of the failed call alive.
        chunks = smaller
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _too_small(need: int, device: torch.device) -> str:
    return (
        f"One row with one direction needs about {gigabytes(need)} and does not fit on {device}, where "
        f"{gigabytes(free_memory(device))} are free. Smaller chunks do not exist: free memory there, use smaller "
        "inputs or fewer directions (n_eigenvalues), or move the model to a larger device."
    )


def gigabytes(n_bytes: float) -> str:
    """Write bytes for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes:.0f} bytes"


@cache
def let_malloc_adapt() -> None:
    """Free a block of nearly 32 MB that was never touched, once a process.

    glibc's malloc maps blocks larger than any that was freed before (up to 32 MB), and trims
    its heap beyond twice that size: having seen this one, it recycles the chunks used here
    from the first on. Costs nothing; does nothing to thresholds the user has set.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


def attempt(compute: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """Return (result, None), or (None, what was raised); lack of memory or of time says nothing of a model."""
    try:
        return compute(), None
    except (OutOfMemory, TimeoutError):
        raise
    except Exception as error:
        return None, error


def raise_malloc_thresholds() -> str:
    """Make glibc keep freed memory instead of handing it back, for this whole process.

    glibc maps large temporaries at every allocation and unmaps them when they are
    freed, so that every pass through a network touches fresh pages. Raising its
    thresholds (``M_MMAP_THRESHOLD`` to 2^30, ``M_TRIM_THRESHOLD`` to 2^31 - 1 bytes) avoids
    the page faults; the process holds on to its peak memory. Nothing calls this for
    you. docs/performance.md has the effect; jemalloc and tcmalloc have the same.

    Returns
    -------
    str
        What was done. Nothing is, where the C library is not glibc.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return "nothing done: the C library is not glibc"
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>
    mallopt = ctypes.CDLL(None).mallopt
    if mallopt(mmap, 2**30) and mallopt(trim, 2**31 - 1):
        return "glibc's M_MMAP_THRESHOLD is 2^30 bytes, M_TRIM_THRESHOLD 2^31 - 1"
    return "nothing done: mallopt refused"
