r"""Checks of what the computation of the basis is given: its rank, the memory it may use, where rows are spilled."""

from __future__ import annotations

import math
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..data.checks import integer, shown

SPILL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_rank(value: Any) -> int | float | None:
    """Return a positive number of directions as an int, a share of the trace in (0, 1) as a float, or None."""
    what = "a positive integer, a share of the Gram matrix's trace in (0, 1), or None"
    return _size_or_share("n_eigenvalues", value, what, math.nextafter(1, 0))  # 1 itself is no share


def check_budget(value: Any) -> int | float | None:
    """Return a positive number of bytes as an int, a share of the free memory in (0, 1] as a float, or None."""
    what = "a positive number of bytes (an int), a share of the free memory in (0, 1] (a float), or None"
    return _size_or_share("memory_budget", value, what, 1)


def _size_or_share(name: str, value: Any, what: str, largest: float) -> int | float | None:
    """Return a positive integer as an int, a share of at most ``largest`` as a float, or None."""
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 < float(value) <= largest:
        return float(value)
    return None if value is None else integer(name, value, what, 1)


def check_spill(spill: Any, dtype: Any) -> str | None:
    """Return the folder that rows are spilled to; None stands for CPU memory, or for no spilling."""
    if dtype not in SPILL_DTYPES:
        raise ValueError(f"spill_dtype must be one of {[str(d) for d in SPILL_DTYPES]}; got {shown(dtype)}.")
    if spill is None or spill == "cpu":
        return None
    if not isinstance(spill, (str, PathLike)) or not Path(spill).is_dir():
        raise ValueError(f"spill must be 'cpu', an existing folder, or None; got {shown(spill)}.")
    return str(spill)
