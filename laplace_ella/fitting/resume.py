r"""The files of a fit in progress, which keep what each stage has found, so that a fit that was killed goes on.

Each stage writes one file: ``path`` (the pass over the data), ``path.basis`` (the Gram matrix while it is made block
by block, then V) and ``path.curvature``. A file is replaced as a whole, or not at all, and holds a hash of its content.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from ..data.hashing import digest_of
from ..data.stream import Batch
from ..parallel.ranks import Ranks
from .curvature import Part
from .files import check_place, file_of, read, write

KIND, FORMAT = "laplace_ella: a fit in progress", 6
STAGES = {"scan": "", "basis": ".basis", "curvature": ".curvature"}

Item = TypeVar("Item", Batch, Part)


class FitFiles:
    """The files of one fit on one rank. Without a path, nothing is read or written.

    Parameters
    ----------
    path : path-like, optional
        In a group, ``.<rank>-of-<size>`` is appended. A symbolic link is followed, also one to a file that does not
        exist yet: the files are where it leads, and the link stays.
    every : int
        Batches between two checkpoints.
    arguments : dict
        Everything but the data that the result of the fit depends on, in plain types.
    ranks : Ranks
        The ranks that fit together.

    Raises
    ------
    ValueError
        If the folder does not exist, a file is no checkpoint of a fit in this format, or is one of another fit,
        stage or rank, or no file at all. Files stay as they are.
    OSError
        If files cannot be read, or the folder cannot be written to.
    """

    def __init__(
        self, path: str | PathLike[str] | None, every: int, arguments: dict[str, Any], ranks: Ranks
    ) -> None:
        self.every, self.arguments = every, arguments
        self.paths: dict[str, Path] = {}
        self._found: dict[str, Any] = {}
        self._rank = [ranks.rank, ranks.size]
        # Files of an earlier fit, with the same arguments and perhaps other data, are told apart by it.
        self._run = os.urandom(8).hex()
        if path is None:
            return
        first = file_of("checkpoint", path, ranks)
        self.paths = {stage: Path(f"{first}{suffix}") for stage, suffix in STAGES.items()}
        self._temporary = Path(f"{first}.tmp")
        for place in (*self.paths.values(), self._temporary):
            check_place("checkpoint", place)
        self._temporary.touch()  # fails before any long work if it has to
        self._temporary.unlink()
        for stage, place in self.paths.items():
            if place.exists():
                self._found[stage] = self._read(stage, place)

    def found(self, stage: str) -> Any:
        """Return what a stage left, or None."""
        return self._found.get(stage)

    def ignore(self, stage: str) -> None:
        """Forget what a stage left, so that it is done again."""
        self._found.pop(stage, None)

    def save(self, stage: str, state: dict[str, Any]) -> None:
        """Replace the file of a stage by one that holds ``state``, made of tensors and plain types.

        Raises
        ------
        OSError
            If the file cannot be written. The file that was there before stays as it was.
        """
        if not self.paths:
            return
        whole: dict[str, Any] = {"kind": KIND, "format": FORMAT, "stage": stage, "rank": self._rank}
        whole.update(run=self._run, arguments=self.arguments, state=state)
        whole["digest"] = digest_of(whole)
        write(whole, self.paths[stage], self._temporary)

    def delete_all(self) -> None:
        """Delete the files, because the fit has ended."""
        for path in reversed(self.paths.values()):
            path.unlink(missing_ok=True)

    def _read(self, stage: str, path: Path) -> Any:
        try:
            whole = read(path)
            intact = whole["digest"] == digest_of({k: v for k, v in whole.items() if k != "digest"})
        except OSError:
            raise
        except Exception as error:  # whatever unpickling what is no checkpoint leads to
            reason = f"it is truncated, or no checkpoint of a fit ({type(error).__name__})"
            raise ValueError(_unusable(path, reason)) from error
        for objection in self._objections(stage, whole, intact):
            raise ValueError(_unusable(path, objection))
        return whole["state"]

    def _objections(self, stage: str, whole: dict[str, Any], intact: bool) -> Iterator[str]:
        """Say why the content of a file is of no use to this fit."""
        if whole.get("kind") != KIND:
            yield "it is no checkpoint of a fit"
        if whole.get("format") != FORMAT:
            yield f"it has format {whole.get('format')}, and this version reads {FORMAT}"
        if not intact:
            yield "it is damaged: what was read is not what was written"
        if whole["stage"] != stage:
            yield f"it is of the stage {whole['stage']!r}, and its name that of {stage!r}"
        if whole["rank"] != self._rank:
            yield "it is of rank {} of {}, and this is rank {} of {}".format(*whole["rank"], *self._rank)
        theirs, mine = whole["arguments"], self.arguments
        differ = [k for k in mine if k not in theirs or theirs[k] != mine[k]]
        if differ:
            was = ", ".join(f"{k} was {theirs.get(k)!r} and is {mine[k]!r}" for k in differ)
            yield f"it belongs to another fit: {was}"
        if stage == "scan":  # the first to be read
            self._run = whole["run"]
        if whole["run"] != self._run:
            yield f"it does not belong to {self.paths['scan']}"


def _unusable(path: Path, reason: str) -> str:
    return f"The checkpoint {path} cannot be used: {reason}. It was left as it is: delete it, or pass another path."


# ---------------------------------------------------------------------- the order of the data


_OTHER_DATA = (
    "The data are not those that the interrupted fit read, or their order is another now. The loader must replay the "
    "same order: shuffle with a generator of a fixed seed, or not at all. The checkpoint was left as it is."
)


class Pass:
    """A pass over data in a fixed order, of which an interrupted fit may have done a part.

    Parameters
    ----------
    files : FitFiles
    stage : str
        The stage that the pass belongs to.
    loader : iterable
        Where the data come from; its generators are set back to what they were when the interrupted pass began.
    """

    def __init__(self, files: FitFiles, stage: str, loader: Any) -> None:
        self._files, self._stage, self._loader = files, stage, loader
        self._before = files.found(stage)
        if self._before is not None:
            set_random_state(self._before["random"], loader)
        self._start = random_state(loader) if files.paths else None
        self._first = "" if self._before is None else self._before["first"]

    def left(self, items: Iterator[Item], restore: Callable[[Any, Any], None]) -> Iterator[Item]:
        """Read items again that an interrupted pass has read, and return those that are left.

        Parameters
        ----------
        items : iterator of Batch or Part
        restore : callable
            (what was found in the items that are done, one of their inputs) -> None.

        Raises
        ------
        ValueError
            If the first or the last item that was done is another now. Of a pass that was complete, only the first is
            read again.
        """
        before = self._before
        if before is None:
            return items
        item: Item | None = None
        complete = before["after"] is not None
        expected = {before["done"]: before["last"], 1: before["first"]}
        for step in range(1, 2 if complete else before["done"] + 1):
            item = next(items, None)
            if step in expected and _digest(item) != expected[step]:
                raise ValueError(_OTHER_DATA)
        restore(before["found"], None if item is None else item.x)
        if not complete:
            return items
        set_random_state(before["after"], self._loader)
        return iter(())

    def after(self, item: Batch | Part, done: int, found: Callable[[], dict[str, Any]]) -> None:
        """Keep what was found in so many items, of which this is the last, if it is time to."""
        if not self._files.paths:
            return
        if done == 1:
            self._first = _digest(item)
        if done % self._files.every == 0:
            self._keep(found(), done=done, last=_digest(item), after=None)

    def complete(self, done: int, found: Callable[[], dict[str, Any]]) -> None:
        """Keep what was found in all items."""
        kept = self._before is not None and self._before["after"] is not None
        if self._files.paths and not kept:
            self._keep(found(), done=done, last="", after=random_state(self._loader))

    def _keep(self, found: dict[str, Any], **more: Any) -> None:
        self._files.save(self._stage, {"random": self._start, "first": self._first, "found": found, **more})


def _digest(item: Batch | Part | None) -> str:
    """Return a hash of the data of an item, or an empty string if there is no item."""
    return "" if item is None else item.digest()


def _generators(loader: Any) -> list[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)
    found = [getattr(place, "generator", None) for place in (loader, *samplers)]
    return [g for g in found if isinstance(g, torch.Generator)]


def random_state(loader: Any) -> dict[str, Any]:
    """Return the states of all generators that a loader may draw its order from.

    These are torch's, numpy's and Python's, and those of the loader and its samplers.
    """
    return {
        "torch": torch.get_rng_state(),
        # As text: files hold plain types, and generators of numpy's keep arrays of several.
        "numpy": json.dumps(np.random.get_state(legacy=False), default=lambda v: v.tolist()),  # noqa: NPY002
        "python": random.getstate(),
        "loader": [g.get_state() for g in _generators(loader)],
    }


def set_random_state(state: dict[str, Any], loader: Any) -> None:
    """Give the generators the states that :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(json.loads(state["numpy"]))  # noqa: NPY002
    random.setstate(state["python"])
    for generator, before in zip(_generators(loader), state["loader"]):
        generator.set_state(before)
