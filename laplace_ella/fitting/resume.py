r"""Checkpoints of a fit in progress: what each stage has found, so that a killed fit goes on.

Files, each written by one stage: ``path`` (the pass over the data), ``path.gram`` (only while a Gram matrix
is made block by block), ``path.basis`` and ``path.curvature``. A file is replaced as a whole, or not at all.
"""

from __future__ import annotations

import os
import platform
import random
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from ..data.hashing import digest_of
from ..data.stream import Batch
from ..parallel.ranks import Ranks
from .accumulation import NOTHING, Part
from .scan import Scan

KIND, FORMAT = "laplace_ella: a fit in progress", 4
STAGES = ("scan", "gram", "basis", "curvature")
ENTRIES = {"kind", "format", "stage", "rank", "run", "arguments", "state", "digest"}


# Whether a process lives can be told on its own machine only.
_HOST = re.sub(r"[^\w-]", "_", platform.node()) or "localhost"


class FitFiles:
    """The files of one fit on one rank; without a path, nothing is read or written.

    Parameters
    ----------
    path : path-like, optional
        In a group, ``.<rank>-of-<size>`` is appended. A symbolic link is followed, also one to a file that does not
        exist yet: the files are where it leads, and the link stays.
    every : int
        Batches between two checkpoints.
    arguments : dict
        All that the result of the fit depends on, data apart, in plain types.
    ranks : Ranks

    Raises
    ------
    ValueError
        If the folder does not exist, a file is no checkpoint of a fit in this format, or is one of another fit,
        stage or rank, or no file at all. Files stay as they are.
    OSError
        If files cannot be read, or the folder not be written to.
    """

    def __init__(
        self, path: str | PathLike[str] | None, every: int, arguments: dict[str, Any], ranks: Ranks
    ) -> None:
        self.every, self.arguments = every, arguments
        self.paths: dict[str, Path] = {}
        self._found: dict[str, Any] = {}
        self._run = os.urandom(8).hex()
        self._rank = [ranks.rank, ranks.size]
        if path is None:
            return
        if not isinstance(path, (str, PathLike)) or not os.fspath(path):
            raise ValueError(f"checkpoint must be a path or None; got {path!r}.")
        own = path if ranks.size == 1 else f"{os.fspath(path)}.{ranks.rank}-of-{ranks.size}"
        first = Path(os.path.realpath(own))  # what replaces a link, or deletes it, takes what is the user's
        if not first.parent.is_dir() or first.is_dir():
            raise ValueError(
                f"checkpoint must be the path of a file, in an existing folder; got {str(path)!r}. Create {first.parent}, or "
                "add a name to the path."
            )
        self.paths = {s: Path(f"{first}{'' if s == 'scan' else '.' + s}") for s in STAGES}
        for place in self.paths.values():
            _check_place(place)
        _sweep(first)
        self._temporary = Path(f"{first}.{_HOST}.{os.getpid()}-{self._run}.tmp")
        self._temporary.touch()  # before any long work, if that is not possible
        self._temporary.unlink()
        # As they were when this fit last saw them.
        self._marks = {s: _mark(p) for s, p in self.paths.items()}
        self._found = {s: self._read(s, p) for s, p in self.paths.items() if p.exists()}
        if "scan" in self._found:
            self._run = self._found["scan"]["run"]
        for stage, found in self._found.items():
            if found["run"] != self._run:
                raise ValueError(_unusable(self.paths[stage], f"it does not belong to {self.paths['scan']}"))

    def found(self, stage: str) -> Any:
        """Return what a stage left, or None."""
        return self._found[stage]["state"] if stage in self._found else None

    def ignore(self, stage: str) -> None:
        """Let a stage be done again."""
        self._found.pop(stage, None)

    def is_due(self, step: int) -> bool:
        """Say whether to save after so many batches."""
        return bool(self.paths) and step % self.every == 0

    def save(self, stage: str, state: dict[str, Any]) -> None:
        """Replace the file of a stage; once this returns, it is on the disk.

        Raises
        ------
        OSError
            If the file cannot be written. The one before is as it was.
        ValueError
            If another fit has replaced it meanwhile.
        """
        if not self.paths:
            return
        path = self.paths[stage]
        whole = {
            "kind": KIND,
            "format": FORMAT,
            "stage": stage,
            "rank": self._rank,
            "run": self._run,
            "arguments": self.arguments,
            "state": state,
            "digest": digest_of(state),
        }
        try:
            self._write(whole)
            if _mark(path) != self._marks[stage]:
                raise ValueError(_unusable(path, "another fit has written to it meanwhile"))
            os.replace(self._temporary, path)
        except BaseException:
            self._temporary.unlink(missing_ok=True)
            raise
        self._marks[stage] = _mark(path)
        _flush_folder(path.absolute().parent)

    def _write(self, whole: dict[str, Any]) -> None:
        try:
            # By its name: from a file of Python's, torch turns an interrupt into an error of its own.
            torch.save(whole, os.fspath(self._temporary))
        except RuntimeError as error:
            raise OSError(
                f"The checkpoint {self._temporary} could not be written: {error}. Is there space on the disk?"
            ) from error
        with self._temporary.open("rb+") as file:
            os.fsync(file.fileno())

    def delete(self, stage: str) -> None:
        """Delete the file of a stage, if there is one and it is this fit's."""
        if self.paths and _mark(self.paths[stage]) == self._marks[stage]:
            self.paths[stage].unlink(missing_ok=True)

    def delete_all(self) -> None:
        """Delete the files: the fit has ended."""
        for stage in reversed(STAGES):
            self.delete(stage)

    def _read(self, stage: str, path: Path) -> dict[str, Any]:
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
                damaged = archive.testzip()
            found = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            reason = f"it is truncated, or no checkpoint of a fit ({type(error).__name__})"
            raise ValueError(_unusable(path, reason)) from error
        if damaged is not None:
            raise ValueError(_unusable(path, "it is damaged: a checksum is wrong"))
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise ValueError(_unusable(path, "it is no checkpoint of a fit"))
        if found.get("format") != FORMAT:
            raise ValueError(
                _unusable(path, f"it has format {found.get('format')}, and this version reads {FORMAT}")
            )
        if found.keys() != ENTRIES:
            raise ValueError(_unusable(path, f"it lacks {sorted(ENTRIES - found.keys())}"))
        if found["stage"] != stage:
            raise ValueError(
                _unusable(path, f"it is of the stage {found['stage']!r}, and its name that of {stage!r}")
            )
        if found["rank"] != self._rank:
            of = "it is of rank {} of {}, and this is rank {} of {}".format(*found["rank"], *self._rank)
            raise ValueError(_unusable(path, of))
        theirs = found["arguments"]
        differ = [k for k in self.arguments if k not in theirs or theirs[k] != self.arguments[k]]
        if differ:
            was = ", ".join(f"{k} was {theirs.get(k)!r} and is {self.arguments[k]!r}" for k in differ)
            raise ValueError(_unusable(path, f"it belongs to another fit: {was}"))
        # A damaged directory of the archive can lead torch elsewhere than the checksums were compared.
        if found["digest"] != digest_of(found["state"]):
            raise ValueError(_unusable(path, "it is damaged: what was read is not what was written"))
        return found


def _sweep(first: Path) -> None:
    """Delete what processes that died while they wrote have left."""
    # Only names that _write gives: others are the user's, or another rank's.
    ours = re.compile(re.escape(f"{first.name}.{_HOST}.") + r"([1-9]\d*)-[0-9a-f]{16}\.tmp")
    for path in first.absolute().parent.iterdir():
        found = ours.fullmatch(path.name)
        if found and not psutil.pid_exists(int(found[1])):
            path.unlink(missing_ok=True)


def _check_place(path: Path) -> None:
    """Require that a path is that of a file, or of nothing."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        kind = "a symbolic link" if path.is_symlink() else "no regular file"
        raise ValueError(
            f"checkpoint keeps a file at {path}, where there is {kind}. It was left as it is: pass another path."
        )


def _mark(path: Path) -> tuple[int, int, int] | None:
    """Return what tells a file from another that takes its place; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _unusable(path: Path, reason: str) -> str:
    return f"The checkpoint {path} cannot be used: {reason}. It was left as it is: delete it, or pass another path."


def _flush_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # not everywhere can a folder be opened
        return
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- the order of the data


def _generators(loader: Any) -> list[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    places = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    found = [getattr(place, "generator", None) for place in places]
    return [g for g in found if isinstance(g, torch.Generator)]


def random_state(loader: Any) -> dict[str, Any]:
    """Return the states of the generators a loader's order may come from: torch's, numpy's, Python's, its own."""
    return {
        "torch": torch.get_rng_state(),
        "numpy": _plain(np.random.get_state(legacy=False)),  # noqa: NPY002
        "python": random.getstate(),
        "loader": [g.get_state() for g in _generators(loader)],
    }


def _plain(state: Any) -> Any:
    """Return the state of a generator of numpy's as tensors and plain types."""
    if isinstance(state, dict):
        return {k: _plain(v) for k, v in state.items()}
    if isinstance(state, np.ndarray):
        return torch.from_numpy(state.astype(np.int64))
    return state if isinstance(state, (str, float)) else int(state)


def _of_numpy(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: _of_numpy(v) for k, v in state.items()}
    return state.numpy().astype(np.uint64) if isinstance(state, torch.Tensor) else state


def set_random_state(state: dict[str, Any], loader: Any) -> None:
    """Give the generators the states that :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(_of_numpy(state["numpy"]))  # noqa: NPY002
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    for generator, before in zip(_generators(loader), state["loader"]):
        generator.set_state(before)


@contextmanager
def random_state_kept_on_error(loader: Any) -> Iterator[None]:
    """Give generators back the states they had, if what is done inside fails with a ValueError: data were refused."""
    before = random_state(loader)
    try:
        yield
    except ValueError:
        set_random_state(before, loader)
        raise


@contextmanager
def random_state_restored(loader: Any) -> Iterator[None]:
    """Give generators back the states they had, whatever is done inside."""
    before = random_state(loader)
    try:
        yield
    finally:
        set_random_state(before, loader)


def replay(batches: Iterator[Batch], before: dict[str, Any] | None, found: Scan) -> str:
    """Read again what an interrupted pass has read, and let ``found`` be what it had found.

    Returns
    -------
    str
        The digest of the first batch; empty if nothing was read before.

    Raises
    ------
    ValueError
        If the loader yields other data.
    """
    if before is None or not before["first"]:
        return ""
    batch = next(batches, None)
    check_replayed(before["first"], batch, "The first batch")
    if not before["complete"]:
        for _ in range(before["scan"]["n_batches"] - 1):
            batch = next(batches, None)
        check_replayed(before["last"], batch, f"Batch {before['scan']['n_batches'] - 1}")
    assert batch is not None
    found.restore(before["scan"], batch.x)
    return str(before["first"])


def skip(parts: Iterator[Part], before: dict[str, Any] | None) -> None:
    """Leave out the parts that an interrupted sum holds.

    Raises
    ------
    ValueError
        If the loader yields other data.
    """
    if before is None:
        return
    part: Part = NOTHING  # which is what a rank adds that has run out
    for _ in range(before["total"]["steps"]):
        part = next(parts, NOTHING)
    if before["total"]["steps"]:
        check_replayed(before["last"], part, "A part of the second pass")


def check_replayed(before: str, now: Batch | Part | None, what: str) -> None:
    """Require that a batch is the one whose digest was kept before the fit was interrupted.

    Raises
    ------
    ValueError
    """
    if now is None or before != now.digest():
        raise ValueError(
            f"{what} is not the one that the interrupted fit read, so the data, or their order, are others now. The "
            "loader must replay the same order: shuffle with a generator of a fixed seed, or not at all. The "
            "checkpoint was left as it is."
        )
