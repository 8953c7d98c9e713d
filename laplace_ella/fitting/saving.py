"""A fitted estimator in a file."""

from __future__ import annotations

import os
from os import PathLike
from typing import Any

from ..parallel.ranks import Ranks
from .checkpoint import objections
from .files import check_place, file_of, read, write


def saved_state(path: str | PathLike[str], cls_name: str, ranks: Ranks) -> dict[str, Any]:
    """Return the state of this class that the file of this rank holds, without running what is in the file.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is truncated, or no file of such a state, or one in a format that cannot be read.
    """
    place = file_of("path", path, ranks)
    where = f"The file {str(place)!r} cannot be loaded"
    try:
        state = read(place)
    except OSError:
        raise
    except Exception as error:  # whatever unpickling something else leads to
        raise ValueError(
            f"{where}: it is truncated, or no file that {cls_name}.save() wrote ({type(error).__name__})."
        ) from error
    for objection in objections(state, cls_name):
        raise ValueError(f"{where}: {objection}")
    return state


def save(state: dict[str, Any], path: str | PathLike[str], ranks: Ranks) -> None:
    """Write a state to a file, which is replaced as a whole or not at all.

    Raises
    ------
    OSError
        If the file cannot be written.
    ValueError
        If the path is not that of a file in an existing folder.
    """
    place = file_of("path", path, ranks)
    check_place("path", place)
    # Processes may save the same at the same time.
    write(state, place, place.with_name(f"{place.name}.{os.urandom(4).hex()}.tmp"))
