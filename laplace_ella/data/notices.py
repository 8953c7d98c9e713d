"""Warnings that name the line of the user's code."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

# What may lie between a user's line and the place that warns.
_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), contextlib.__file__)


def warn_user(message: str) -> None:
    """Warn with the user's line: the last call from outside of this package and of torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
