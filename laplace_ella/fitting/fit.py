r"""A fit: one pass over the data, landmarks, basis, curvature, in this order."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ..data.batches import Input, inputs_between
from ..data.landmarks import BottomK, Scheme, check_coordinates, draw_outputs, explicit_landmarks
from ..data.loading import check_total
from ..data.notices import warn_user
from ..data.pooling import dealt
from ..data.stream import Batch
from ..network.engine import Engine
from ..network.outputs import Axes, channels_last
from ..nystrom.basis import NystromBasis
from ..parallel.ranks import ALONE, Ranks
from ..posterior.checks import check_classes
from ..posterior.fit import Fit, sums_over_data
from ..posterior.targets import channel_axis_of
from .checkpoint import fingerprint
from .curvature import RunningSum
from .scan import Scan, over_all, scan
from .stages import Job, accumulate, find_basis, read_data


@dataclass(frozen=True)
class Sizes:
    """The values that the attributes of an estimator with these names have at one moment.

    Attributes
    ----------
    subsample_size : int
        M.
    n_eigenvalues : int or float
        K, or the share of the trace to retain.
    curvature_size : int or None
        How many inputs G is estimated from; None stands for all of them, in a second pass.
    curvature : str
        "exact" or "mc".
    curvature_samples : int
        How many labels "mc" samples for each curvature input.
    curvature_positions : int or None
        At how many of its positions a curvature input is looked at; None: at all.
    """

    subsample_size: int
    n_eigenvalues: int | float
    curvature_size: int | None
    curvature: str
    curvature_samples: int
    curvature_positions: int | None = None

    @property
    def labels(self) -> int:
        """How many labels are sampled for each curvature input; 0 for the exact curvature."""
        return 0 if self.curvature == "exact" else self.curvature_samples


@dataclass(frozen=True)
class Recipe:
    """What a fit is asked for.

    Attributes
    ----------
    sizes : Sizes
    shard : bool
        Whether the directions are spread over ranks.
    named : set of str
        The sizes that the user named; if one is reduced, there is a warning.
    landmarks : (input of M rows, LongTensor (M,)) or None
        The landmarks, if they are given.
    scheme : callable
        How landmark inputs are drawn otherwise; see :data:`laplace_ella.data.landmarks.Scheme`.
    basis : NystromBasis or None
        The basis that takes the place of landmarks, if one is given.
    n_total : int or None
        N, where the loader shows a sample of the data only.
    """

    sizes: Sizes
    shard: bool
    named: Set[str]
    landmarks: tuple[Input, Tensor] | None
    scheme: Scheme
    basis: NystromBasis | None
    n_total: int | None


class FitInterrupted(KeyboardInterrupt):
    """Ctrl-C, after G has got some of its inputs.

    Attributes
    ----------
    fit : Fit
        With G as estimated from these.
    """

    def __init__(self, fit: Fit, message: str) -> None:
        super().__init__(message)
        self.fit = fit


def fit(
    job: Job, recipe: Recipe, before: Fit | None = None, finished: Callable[[Fit], Any] = lambda fit: fit
) -> Any:
    """Fit to data, with a new basis or with that of what was fitted before.

    Parameters
    ----------
    job : Job
    recipe : Recipe
    before : Fit, optional
        The fit that the caller adds the new one to.
    finished : callable
        What is done with the new fit, and part of it: an interruption leaves the fit as it is without.

    Returns
    -------
    Any
        What ``finished`` returns; by default the new fit.

    Raises
    ------
    FitInterrupted
        After Ctrl-C in a single process. Not if the new fit is added and kept in files: it would be added twice.
    """
    ranks = job.ranks
    own = _scan(job, recipe, draws=before is None and recipe.basis is None and recipe.landmarks is None)
    job = replace(job, engine=job.engine.along(own.channel_axis))
    found, n_read = over_all(own, ranks), own.n_data
    check_total(recipe.n_total, found.n_data)
    sample = None if recipe.sizes.curvature_size is None else dealt(own.curvature, ranks)
    del own  # and with it the inputs that went to other ranks
    basis = recipe.basis if before is None else before.basis
    basis = (_new_basis(job, recipe, found) if basis is None else basis).to(job.engine.device)
    found = replace(found, landmarks=BottomK(0))
    total = RunningSum(basis.rank, job.engine.device)
    result = partial(_result, job, recipe, basis, found, total)
    try:
        accumulate(job, basis, sample, n_read, found.longest, total)
        return finished(result(ranks))
    except KeyboardInterrupt as interrupt:
        if ranks.size > 1 or not total.seen or (before is not None and job.files.paths):
            raise
        wanted = n_read if sample is None else sample.size
        message = f"fit() was interrupted after {total.seen} of {wanted} curvature inputs."
        raise FitInterrupted(result(ALONE, unfinished=True), message) from interrupt


def _scan(job: Job, recipe: Recipe, draws: bool) -> Scan:
    """Read this rank's training data, drawing landmarks if they are neither given nor kept."""
    sizes = recipe.sizes
    found = Scan(BottomK(sizes.subsample_size if draws else 0), BottomK(sizes.curvature_size or 0))
    unchecked = [] if recipe.landmarks is None else [recipe.landmarks]

    def forward(batch: Batch) -> tuple[Tensor, Axes]:
        x = batch.x
        f, engine = _outputs(job, found, batch)
        check_classes(job.setting, f.shape[-1])
        while unchecked:  # at the first batch, before any long work
            inputs, outputs = unchecked.pop()
            of_landmark = engine.forward(inputs_between(inputs, 0, 1)) if f.ndim > 2 else f
            check_coordinates(outputs, of_landmark.shape[1:].numel())
        engine.support_for(x)  # probes, at the first batch too
        return f, engine.axes_of(f)

    read_data(job, found, partial(scan, forward=forward, likelihood=job.likelihood, scheme=recipe.scheme))
    return found


def _outputs(job: Job, found: Scan, batch: Batch) -> tuple[Tensor, Engine]:
    """Return the outputs (B, ..., C) of a batch, and the engine that reads them as the first batch says."""
    engine = job.engine.along(found.channel_axis if found.n_batches else job.engine.channel_axis)
    f = engine.forward(batch.x)
    if found.n_batches or not job.finds_channels:
        return f, engine
    axis = channel_axis_of(job.likelihood, batch.y, f, batch.name)
    return channels_last(f, axis), engine.along(axis)


def _new_basis(job: Job, recipe: Recipe, found: Scan) -> NystromBasis:
    """Draw landmarks, and compute their basis; warn if there is less of anything than the user named."""
    size, rank = recipe.sizes.subsample_size, recipe.sizes.n_eigenvalues
    if recipe.landmarks is None:
        landmarks = draw_outputs(found.landmarks, job.seed)
        if len(landmarks) < size:
            reason = "the data have no more pairs of input and output"
            _report_reduction(recipe, "subsample_size", len(landmarks), reason)
    else:
        landmarks = explicit_landmarks(recipe.landmarks)
    basis = find_basis(job, landmarks, rank, recipe.shard)
    basis = replace(basis, of_model=fingerprint(job.engine.module))
    if isinstance(rank, float):
        if basis.retained < rank - 1e-9:
            reason = f"more directions exceed the memory budget or the numerical rank; these retain {basis.retained:.3g}"
            _report_reduction(recipe, "n_eigenvalues", basis.rank, reason)
    elif basis.rank < rank:
        reason = f"the gradients of {len(landmarks)} landmarks have no higher numerical rank"
        _report_reduction(recipe, "n_eigenvalues", basis.rank, reason)
    return basis


def _report_reduction(recipe: Recipe, name: str, reached: int, reason: str) -> None:
    if name in recipe.named:
        warn_user(f"{name} was reduced from {getattr(recipe.sizes, name)} to {reached}: {reason}.")


def _result(
    job: Job,
    recipe: Recipe,
    basis: NystromBasis,
    found: Scan,
    total: RunningSum,
    ranks: Ranks,
    unfinished: bool = False,
) -> Fit:
    """Put together what was found, scaled to all data."""
    n_data = recipe.n_total or found.n_data
    snapshots = total.snapshots(n_data, ranks, unfinished)
    if job.labels and snapshots[-1][0] < 20 * basis.rank:
        warn_user(
            f"curvature='mc' estimates G (K = {basis.rank}) from {snapshots[-1][0]} inputs; under 20 K = {20 * basis.rank} "
            "it is badly wrong. Raise curvature_size, lower n_eigenvalues, or use curvature='exact'."
        )
    share, engine = n_data / found.n_data, job.engine
    loss, n_predictions = (found.loss * share).to(engine.device), found.n_predictions * share
    if isinstance(found.n_predictions, int):  # no sum of weights
        n_predictions = round(n_predictions)
    return Fit(
        basis=basis,
        n_outputs=found.n_outputs,
        channel_axis=found.channel_axis,
        mean=engine.function.flat_weights(),
        fingerprint=fingerprint(engine.module),
        labels_sampled=job.labels > 0 or found.n_positions > (job.positions or found.n_positions),
        **sums_over_data(snapshots, loss, n_data, n_predictions),
    )
