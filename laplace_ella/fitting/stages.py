r"""The stages of a fit: data, basis, curvature. Ranks do each of them together, and a checkpoint keeps what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..data.batches import batch_size
from ..data.landmarks import Landmarks
from ..data.pooling import Dealt
from ..data.progress import Progress
from ..data.stream import Batch, Stream
from ..network.engine import Engine
from ..nystrom.basis import NystromBasis
from ..nystrom.gram import FRESH, Unfinished
from ..nystrom.jacobian import basis_of
from ..parallel.ranks import ALONE, Ranks
from ..parallel.sharding import work_through
from ..posterior.likelihoods import Likelihood
from ..posterior.setting import Setting
from ..posterior.targets import prediction_weights
from .checkpoint import pack_basis, unpack_basis
from .curvature import NOTHING, Curvature, Part, RunningSum, cut, parts_of_sample, parts_of_stream
from .resume import FitFiles, Pass
from .scan import Scan


@dataclass(frozen=True)
class Job:
    """One call of ``fit``.

    Attributes
    ----------
    ranks : Ranks
        Those that do it together.
    stream : Stream
        This rank's training data.
    files : FitFiles
        What an interrupted fit has left, and what this one leaves if it is interrupted.
    progress : callable
    engine : Engine
    likelihood : Likelihood
    setting : Setting
        What there has to be a number of for each output.
    every : int or None
        Curvature batches between snapshots; None: at 1, 2, 4, 8 ...
    seed : int
    labels : int
        How many labels are sampled for the curvature of each input; 0: none.
    positions : int or None
        At how many of its positions a curvature input is looked at; None: at all.
    finds_channels : bool
        Whether the targets of the first batch say on which axis outputs have their channels.
    """

    ranks: Ranks
    stream: Stream
    files: FitFiles
    progress: Progress
    engine: Engine
    likelihood: Likelihood
    setting: Setting
    every: int | None
    seed: int
    labels: int
    positions: int | None = None
    finds_channels: bool = False


def read_data(job: Job, found: Scan, scan: Callable[..., None]) -> None:
    """Read this rank's training data, or what is left of them after an interruption, into ``found``.

    Parameters
    ----------
    scan : callable
        :func:`laplace_ella.fitting.scan.scan` of (batches, found, seed, after).
    """
    engine = job.engine

    def state() -> dict[str, Any]:
        return {**found.state(), "free": engine.free()}

    def restore(before: dict[str, Any], example: Any) -> None:
        engine.assume_free(before["free"])  # the same chunks have the same rounding
        found.restore(before, example)

    with job.ranks.together("the training data"):
        data = Pass(job.files, "scan", job.stream.loader)
        batches = data.left(job.stream.batches("Training data"), restore)
        scan(
            batches,
            found=found,
            seed=job.seed,
            after=lambda batch: data.after(batch, found.n_batches, state),
        )
        data.complete(found.n_batches, state)


def find_basis(job: Job, landmarks: Landmarks, rank: int | float, shard: bool) -> NystromBasis:
    """Compute the basis, or take it from the files of an interrupted fit."""
    files, ranks = job.files, job.ranks
    found = files.found("basis") or {"basis": None, "gram": None}
    if not ranks.any(found["basis"] is None, "the basis of an interrupted fit"):
        with ranks.together("the basis of an interrupted fit"):
            weights = job.engine.function.weights()
            basis = unpack_basis(found["basis"], weights, ranks if shard else ALONE)
            return basis if basis.sharded else replace(basis, landmarks=landmarks)
    files.ignore("curvature")
    unfinished = _unfinished_gram(job, found["gram"])
    basis = basis_of(job.engine, landmarks, rank, job.progress, ranks, shard, unfinished)
    with ranks.together("the checkpoint of the basis"):
        files.save(
            "basis", {"basis": {**pack_basis(basis), "coefficients": basis.coefficients}, "gram": None}
        )
    return basis


def _unfinished_gram(job: Job, found: dict[str, Any] | None) -> Unfinished:
    """Return what an interrupted fit left of the Gram matrix, which the first rank keeps."""

    def keep(layout: list[Any], done: int, matrix: Tensor) -> None:
        with job.ranks.together("the checkpoint of the Gram matrix"):
            if job.ranks.rank == 0:
                gram = {"layout": layout, "done": done, "matrix": matrix}
                job.files.save("basis", {"basis": None, "gram": gram})

    if not job.files.paths:  # on no rank, then
        return FRESH
    found = job.ranks.gathered(found, "the Gram matrix of an interrupted fit")[0]
    return Unfinished(**(found or {}), keep=keep)


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
        The length of the longest batch.
    """
    files, ranks = job.files, job.ranks
    if basis.sharded:  # in which case all go through the same steps
        found = files.found("curvature") or {"done": 0}
        if len(set(ranks.gathered(found["done"], "the curvature of an interrupted fit"))) > 1:
            files.ignore("curvature")
    with ranks.together("the data read again"):
        data = Pass(files, "curvature", job.stream.loader)
        if sample is None:
            parts = parts_of_stream(_second_pass(job, n_data), job.every)
        else:
            parts = iter(job.progress(parts_of_sample(sample, longest, job.every), "Curvature"))
        parts = cut(parts, partial(job.engine.bounded, width=basis.rank))
        parts = data.left(parts, lambda before, _: total.restore(before))
    curvature_of = Curvature(job.engine, job.likelihood, basis, job.labels, job.seed, job.positions)

    def add(part: Part | None) -> None:
        part = part or NOTHING
        total.add(part, curvature_of(part))
        data.after(part, total.steps, total.state)

    work_through(parts, add, ranks, basis.ranks, "the curvature")
    with ranks.together("the checkpoint of the curvature"):
        data.complete(total.steps, total.state)


def _second_pass(job: Job, n_data: int) -> Iterator[Batch]:
    seen = 0
    for batch in job.stream.batches("Curvature"):
        seen += batch_size(batch.x)
        yield replace(batch, weights=prediction_weights(job.likelihood, batch.y, batch.weights))
    if seen != n_data:
        raise ValueError(
            f"The second pass over the training data read {seen} inputs, the first {n_data}; with "
            "curvature_size=None the loader must yield the same data twice. Pass a number instead."
        )
