r"""The stages of a fit, each of which ranks do together, and a checkpoint remembers: data, basis, curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.batches import batch_size
from ..data.landmarks import Landmarks
from ..data.pooling import Dealt
from ..data.progress import Progress
from ..data.stream import Batch, Stream
from ..nystrom.basis import NystromBasis
from ..nystrom.gram import FRESH, Unfinished
from ..parallel.ranks import ALONE, Ranks
from ..parallel.sharding import work_through
from .accumulation import NOTHING, Part, RunningSum, cut, parts_of_sample, parts_of_stream
from .checkpoint import pack_basis, unpack_basis
from .resume import FitFiles, random_state, random_state_kept_on_error, replay, set_random_state, skip
from .scan import Scan


@dataclass(frozen=True)
class Job:
    """One call of ``fit``.

    Attributes
    ----------
    ranks : Ranks
        Which do it together.
    stream : Stream
        This rank's training data.
    files : FitFiles
        Of an interrupted fit, and for one that may be interrupted.
    progress : callable
    backend : NystromGGN
    every : int or None
        Curvature batches between snapshots; None: at 1, 2, 4, 8 ...
    seed : int
    labels : int
        How many labels an input are sampled for the curvature; 0: none.
    """

    ranks: Ranks
    stream: Stream
    files: FitFiles
    progress: Progress
    backend: Any
    every: int | None
    seed: int
    labels: int


def read_data(job: Job, found: Scan, scan: Callable[..., None]) -> None:
    """Read this rank's training data, or what is left of them after an interruption, into ``found``.

    Parameters
    ----------
    scan : callable
        :func:`laplace_ella.fitting.scan.scan` of (batches, found, seed, after).
    """
    files, loader, engine = job.files, job.stream.loader, job.backend.engine
    before = files.found("scan")
    with job.ranks.together("the training data"):
        with random_state_kept_on_error(loader):
            if before is not None:
                set_random_state(before["random"], loader)
                engine.assume_free(before["free"])
            start = {"random": random_state(loader), "free": engine.free()} if files.paths else {}
            batches = job.stream.batches("Training data")
            first = replay(batches, before, found)
        if before is not None and before["complete"]:
            set_random_state(before["after"], loader)
            return

        def after(batch: Batch) -> None:
            nonlocal first
            first = first or batch.digest()
            if files.is_due(found.n_batches):
                state = {"scan": found.state(), "first": first, "last": batch.digest()}
                files.save("scan", {**start, **state, "complete": False})

        scan(batches, found=found, seed=job.seed, after=after if files.paths else lambda batch: None)
        if files.paths:
            state = {"scan": found.state(), "first": first, "last": None, "after": random_state(loader)}
            files.save("scan", {**start, **state, "complete": True})


def find_basis(job: Job, landmarks: Landmarks, rank: int | float, shard: bool) -> NystromBasis:
    """Compute the basis, or take it from the files of an interrupted fit."""
    files, ranks = job.files, job.ranks
    if not ranks.any(files.found("basis") is None, "the basis of an interrupted fit"):
        with ranks.together("the basis of an interrupted fit"):
            kept = files.found("basis")
            weights = job.backend.engine.function.weights()
            basis = unpack_basis(kept, weights, ranks if shard else ALONE)
            return basis if basis.sharded else replace(basis, landmarks=landmarks)
    for stage in ("basis", "curvature"):
        files.ignore(stage)
    basis = job.backend.build_basis(landmarks, rank, job.progress, ranks, shard, _unfinished_gram(job))
    with ranks.together("the checkpoint of the basis"):
        files.save("basis", pack_basis(basis) if files.paths else {})
        files.delete("gram")
    return basis


def _unfinished_gram(job: Job) -> Unfinished:
    """Return the Gram matrix of an interrupted fit, which the first rank keeps."""

    def keep(layout: list[Any], done: int, matrix: Tensor) -> None:
        with job.ranks.together("the checkpoint of the Gram matrix"):
            if job.ranks.rank == 0:
                job.files.save("gram", {"layout": layout, "done": done, "matrix": matrix})

    if not job.files.paths:  # on no rank, then
        return FRESH
    found = job.files.found("gram")
    about = None if found is None else (found["layout"], found["done"], len(found["matrix"]))
    about = job.ranks.gathered(about, "the Gram matrix of an interrupted fit")[0]
    if about is None:
        return Unfinished(keep=keep)
    layout, done, size = about
    empty = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    mine = found["matrix"] if job.ranks.rank == 0 else empty
    return Unfinished(layout, done, job.ranks.of_first(mine), keep)


def accumulate(
    job: Job, basis: NystromBasis, sample: Dealt | None, n_data: int, longest: int, total: RunningSum
) -> None:
    """Add up the curvature of this rank's inputs, or what is left of them after an interruption.

    Parameters
    ----------
    sample : Dealt or None
        This rank's curvature inputs; None: all data, in a second pass.
    n_data : int
        How many inputs this rank read in the first pass.
    longest : int
        In batches of how many.
    """
    files, loader, ranks = job.files, job.stream.loader, job.ranks
    before = _unfinished_sum(job, basis)
    parts: Iterator[Part]
    with ranks.together("the data read again"), random_state_kept_on_error(loader):
        if before is not None:
            set_random_state(before["random"], loader)
            total.restore(before["total"])
        start = {"random": random_state(loader)} if files.paths else {}
        if before is not None and before["complete"]:
            parts, before = iter(()), None
        elif sample is None:
            parts = parts_of_stream(_second_pass(job, n_data), job.every)
        else:
            parts = iter(job.progress(parts_of_sample(sample, longest, job.every), "Curvature"))
        parts = cut(parts, partial(job.backend.bounded, width=basis.rank))
        skip(parts, before)
    curvature_of = job.backend.curvature_of(basis, job.labels, job.seed)

    def add(part: Part | None) -> None:
        part = part or NOTHING
        total.add(part, curvature_of(part))
        if files.is_due(total.steps):
            state = {"total": total.state(), "last": part.digest(), "complete": False}
            files.save("curvature", {**start, **state})

    work_through(parts, add, ranks, basis.ranks, "the curvature")
    with ranks.together("the checkpoint of the curvature"):
        if files.paths:
            state = {"total": total.state(), "last": None, "complete": True}
            files.save("curvature", {"random": random_state(loader), **state})


def _unfinished_sum(job: Job, basis: NystromBasis) -> Any:
    """Return what an interrupted fit left of the curvature, if all ranks can go on from theirs."""
    before = job.files.found("curvature")
    if basis.sharded:  # in which case all go through the same steps
        steps = 0 if before is None else before["total"]["steps"]
        if len(set(job.ranks.gathered(steps, "the curvature of an interrupted fit"))) > 1:
            return None
    return before


def _second_pass(job: Job, n_data: int) -> Iterator[Batch]:
    seen = 0
    for batch in job.stream.batches("Curvature"):
        seen += batch_size(batch.x)
        yield batch
    if seen != n_data:
        raise ValueError(
            f"The second pass over the training data read {seen} inputs, the first {n_data}; with "
            "curvature_size=None the loader must yield the same data twice. Pass a number instead."
        )
