"""Files that are replaced as a whole or not at all, and read without running what is in them."""

from __future__ import annotations

import os
import zipfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..parallel.ranks import Ranks


def file_of(name: str, path: Any, ranks: Ranks) -> Path:
    """Return the file that a path means on this rank.

    Parameters
    ----------
    name : str
        The argument, for messages.
    path : str or path
        In a group, ``.<rank>-of-<size>`` is appended. A symbolic link is followed, also one to a file that does not
        exist yet.
    ranks : Ranks

    Raises
    ------
    ValueError
        If it is no path of a file in an existing folder.
    """
    if not isinstance(path, (str, PathLike)) or not os.fspath(path):
        raise ValueError(f"{name} must be a path, a str or os.PathLike; got {path!r}.")
    own = path if ranks.size == 1 else f"{os.fspath(path)}.{ranks.rank}-of-{ranks.size}"
    found = Path(os.path.realpath(own))  # what replaces or deletes a link would take what is the user's
    if not found.parent.is_dir() or found.is_dir():
        raise ValueError(
            f"{name} must be the path of a file, in an existing folder; got {str(path)!r}. Create {found.parent}, or "
            "add a name to the path."
        )
    return found


def check_place(name: str, path: Path) -> None:
    """Require that a path is that of a file, or of nothing.

    Raises
    ------
    ValueError
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        kind = "a symbolic link" if path.is_symlink() else "no regular file"
        raise ValueError(
            f"{name} keeps a file at {path}, where there is {kind}. It was left as it is: pass another path."
        )


def write(content: Any, path: Path, temporary: Path) -> None:
    """Replace a file by one that holds ``content``, made of tensors and plain types.

    Parameters
    ----------
    content : Any
    path : Path
    temporary : Path
        Beside it; where the content is written first.

    Raises
    ------
    OSError
        If the file cannot be written. The file that was there before stays as it was.
    """
    try:
        # By its name: from a file of Python's, torch turns an interrupt into an error of its own.
        torch.save(content, os.fspath(temporary))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):
            raise OSError(
                f"{temporary} could not be written: {error}. Is there space on the disk?"
            ) from error
        raise


def read(path: Path) -> Any:
    """Return what :func:`write` wrote, on the CPU.

    Raises
    ------
    OSError
        If the file cannot be read.
    Exception
        Whatever unpickling what is no such file leads to.
    """
    with zipfile.ZipFile(path):  # torch.load has an OSError for files that were cut off
        pass
    return torch.load(path, map_location="cpu", weights_only=True)
