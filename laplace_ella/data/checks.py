r"""Checks of plain values that users pass: choices, flags, integers, numbers.

They are made once, before any work. Messages say what is wrong, what is allowed, what was passed, and what to do.
What is checked of a batch, a model or a posterior stands beside these.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Integral, Number, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


def shown(value: Any) -> str:
    """Describe in a few words what was passed, whatever it is."""
    kind = type(value).__name__
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {kind} of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__} itself (make an instance)"
    if isinstance(value, (list, tuple, set, dict)):
        return reprlib.repr(value) if all(map(_is_short, value)) else f"a {kind} of length {len(value)}"
    return reprlib.repr(value) if _is_short(value) else f"an object of type {kind}"


def _is_short(value: Any) -> bool:
    return value is None or isinstance(value, (Number, str, bytes, torch.dtype))


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Require one of a few strings."""
    allowed = list(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}; got {shown(value)}.")


def check_flag(name: str, value: Any) -> bool:
    """Return True or False; 1 and 0 are accepted too."""
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, Integral) and value in (0, 1)):
        return bool(value)
    raise ValueError(f"{name} must be True or False; got {shown(value)}.")


def check_key(name: str, value: Any) -> None:
    """Require a value that can be a key of a mapping."""
    if value is None or not isinstance(value, Hashable):
        raise ValueError(f"{name} must be a key of mapping batches, a str; got {shown(value)}.")


def check_options(name: str, value: Any) -> dict[str, Any]:
    """Return a copy of keyword arguments, which may be None, as a dict."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(k, str) for k in value)):
        raise ValueError(f"{name} must be a dict of keyword arguments, or None; got {shown(value)}.")
    return dict(value or {})


def integer(name: str, value: Any, what: str, least: int, most: float = math.inf) -> int:
    """Return an integer between two bounds as an int; ``what`` says for the message which are allowed."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise ValueError(f"{name} must be {what}; got {shown(value)}.")
    return int(value)


def check_size(name: str, value: Any, optional: bool = True) -> int | None:
    """Return a positive integer as an int, or None if that is allowed."""
    if value is None and optional:
        return None
    return integer(name, value, f"a positive integer{' or None' if optional else ''}", 1)


def check_seed(value: Any) -> int:
    """Return the seed of a generator as an int."""
    return integer("seed", value, "an integer from 0 to 2^63 - 1", 0, 2**63 - 1)


def number(name: str, value: Any, what: str = "a finite number", positive: bool = False) -> float:
    """Return a finite real number, or the only entry of a tensor, as a float."""
    found = value
    if isinstance(value, Tensor) and value.numel() == 1 and _has_real_values(value):
        found = value.item()
    is_finite = isinstance(found, Real) and not isinstance(found, bool) and math.isfinite(found)
    if not is_finite or (positive and found <= 0):
        raise ValueError(f"{name} must be {what}; got {shown(found)}.")
    return float(found)


def positive_number(name: str, value: Any) -> float:
    """Return a positive finite number as a float."""
    return number(name, value, "a positive finite number", positive=True)


def check_numbers(
    name: str, value: Any, what: str, sizes: Sequence[int] | None = None, positive: bool = True
) -> None:
    """Require a finite number, or a tensor of such numbers.

    Parameters
    ----------
    name, what : str
        The argument, and which values it may have, for the message.
    sizes : sequence of int, optional
        How many numbers a tensor with at most one axis may hold. With None, a tensor of any shape is allowed.
    positive : bool
        Whether the numbers must be positive too.
    """
    if not isinstance(value, Tensor):
        number(name, value, what, positive)
        return
    fits = sizes is None or (value.ndim < 2 and value.numel() in sizes)
    if not fits or not _has_real_values(value):
        raise ValueError(f"{name} must be {what}; got {shown(value)} on {value.device}.")
    values = value.detach()
    if not (values.isfinite() & (values > 0 if positive else True)).all():
        kind = "positive and finite" if positive else "finite"
        raise ValueError(f"{name} must be {kind} in every entry; got {values}.")


def check_positive(name: str, value: Any) -> None:
    """Require a positive finite number, or a tensor of them."""
    check_numbers(name, value, "a positive finite number, or a tensor of them")


def _has_real_values(value: Tensor) -> bool:
    return not (value.is_meta or value.is_complex() or value.dtype == torch.bool)
