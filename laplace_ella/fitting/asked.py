"""Checks what users ask of a fit, and turns it into what the stages need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..data.batches import Raw, batch_size, input_digest
from ..data.checks import check_choice, check_flag, check_seed, check_size, integer, shown
from ..data.hashing import digest
from ..data.landmarks import Scheme, balanced, check_landmarks, uniform
from ..data.loading import check_loader
from ..network.engine import Engine
from ..network.outputs import check_channel_axis
from ..network.safety import exclusively
from ..nystrom.basis import NystromBasis
from ..nystrom.checks import check_rank
from ..parallel.ranks import ALONE, Ranks
from ..posterior.checks import check_link, check_prediction
from ..posterior.fit import Fit
from ..posterior.likelihoods import Likelihood
from ..posterior.posterior import Posterior
from . import checkpoint
from .curvature import CURVATURES
from .fit import Recipe, Sizes
from .plan import Plan, data_size, first_batch, make_plan
from .resume import FitFiles, random_state, set_random_state
from .stages import Job

DEFAULT_SUBSAMPLE_SIZE = 500
DEFAULT_N_EIGENVALUES = 20


def checked_sizes(estimator: Any) -> Sizes:
    """Return the sizes that an estimator asks for, and turn its own into plain numbers.

    They are checked here because they may have been assigned since the last fit.

    Raises
    ------
    ValueError
    """
    e, curvature = estimator, estimator.curvature
    check_choice("curvature", curvature, CURVATURES)
    sizes = Sizes(
        check_size("subsample_size", e.subsample_size) or DEFAULT_SUBSAMPLE_SIZE,
        check_rank(e.n_eigenvalues) or DEFAULT_N_EIGENVALUES,
        check_size("curvature_size", e.curvature_size),
        curvature,
        integer("curvature_samples", e.curvature_samples, "a positive integer", 1),
        check_size("curvature_positions", e.curvature_positions),
    )
    check_channel_axis(e.channel_axis)
    n_tangents = integer("residual_samples", e.residual_samples, "a positive integer", 1)
    plain = {**vars(sizes), "residual_samples": n_tangents, "seed": check_seed(e.seed)}
    for name, value in plain.items():
        setattr(e, name, value)
    return sizes


def named(**values: Any) -> set[str]:
    """Return the names of the arguments that are not None."""
    return {name for name, value in values.items() if value is not None}


def sharing(estimator: Any) -> Ranks:
    """Return the ranks that share the directions of an estimator."""
    return estimator._ranks if estimator.shard_directions else ALONE


@dataclass(frozen=True)
class Request:
    """The arguments of one call of ``fit``."""

    train_loader: Iterable[Any]
    override: bool
    progress_bar: bool
    landmarks: tuple[Raw, Any] | Scheme | None
    balanced: bool
    val_loader: Iterable[Any] | None
    val_steps: int | None
    link_approx: str
    basis: NystromBasis | None
    max_samples: int | None
    n_total: int | None
    checkpoint: Any
    checkpoint_every: int

    @property
    def pairs(self) -> tuple[Raw, Any] | None:
        """The landmarks that are given, if they are."""
        return None if callable(self.landmarks) else self.landmarks

    @property
    def scheme(self) -> Scheme:
        """How landmark inputs are drawn if none are given."""
        if callable(self.landmarks):
            return self.landmarks
        return balanced if self.balanced else uniform

    @property
    def every(self) -> int | None:
        """After how many curvature batches a snapshot of G is taken; None: after 1, 2, 4, 8 ..."""
        return self.val_steps or (1 if self.val_loader is not None else None)


def prepare(estimator: Any, request: Request) -> tuple[Job, Recipe, Fit | None]:
    """Check what a fit is asked for, before any work, and return it with the fit that data are added to.

    The latter is None if there is none, or if it is to be replaced.

    Raises
    ------
    ValueError
    """
    now, ranks = estimator._now(), estimator._ranks
    with ranks.together("the arguments of fit"):
        fresh = check_flag("override", request.override) or now.current is None
        check_flag("progress_bar", request.progress_bar)
        sizes = _checked_loader(request, estimator, now.likelihood)
        asked_axis = estimator.channel_axis
        engine = estimator._engine.along(asked_axis if fresh else now.fit.channel_axis)
        _check_weights(engine, estimator.params, fresh)
        estimator._follow_model()
        now = estimator._posterior if fresh else estimator._unchanged()
        _check_basis(request, engine, sharing(estimator), fresh)
        request = _checked_options(request, now.likelihood, estimator.dict_key_x)
        needed = request.checkpoint is not None or ranks.size > 1  # hashing V takes seconds
        arguments = _arguments(request, sizes, estimator, now, fresh) if needed else {}
        # What rounding depends on; ranks may differ in it.
        options = {**estimator._backend_kwargs, "spill": estimator._backend_kwargs["spill"] is not None}
        of_files = {**arguments, **{k: str(v) for k, v in options.items()}}
        files = FitFiles(request.checkpoint, request.checkpoint_every, of_files, ranks)
        more = {"first_position": 0 if fresh else now.fit.n_data, "max_samples": request.max_samples}
        stream = estimator._stream(request.train_loader, request.progress_bar, engine, **more)
        given = request.pairs  # which are cut into single inputs
        landmarks = None if given is None else (engine.inputs(given[0], len(given[1])), given[1])
        of_user = request.scheme, request.basis, request.n_total
        named = frozenset(estimator._named_by_user)
        recipe = Recipe(sizes, estimator.shard_directions, named, landmarks, *of_user)
    ranks.require_equal({**arguments, "checkpoint": request.checkpoint is not None}, "fit()")
    of_labels = request.every, now.seed, sizes.labels, sizes.curvature_positions, fresh and asked_axis is None
    job = Job(ranks, stream, files, stream.progress, engine, now.likelihood, now.setting, *of_labels)
    return job, recipe, None if fresh else now.fit


@exclusively
def _checked_loader(request: Request, estimator: Any, likelihood: Likelihood) -> Sizes:
    """Require a loader that can be read as often as the sizes ask for, and return these."""
    check_loader("train_loader", request.train_loader)
    sizes = checked_sizes(estimator)
    if check_flag("balanced", request.balanced) and not likelihood.has_classes:
        raise ValueError(f"balanced=True needs classes; {likelihood.name} has none. Leave it out.")
    if sizes.curvature_size is None and isinstance(request.train_loader, Iterator):
        raise ValueError(
            "curvature_size=None reads the data twice, and this loader is an iterator that can be read once. "
            "Pass an iterable that can be started again, or a number as curvature_size."
        )
    return sizes


@exclusively
def _check_weights(engine: Engine, params: Iterable[Any], fresh: bool) -> None:
    """Require the weights that the estimator was built with, all of which may have been frozen since."""
    settled, named = engine.function.names, list(engine.module.named_parameters())
    trainable = {k for k, p in named if p.requires_grad}
    same = [p.shape for k, p in named if k in settled] == [p.shape for p in params]
    if not same or (fresh and trainable and trainable != settled):
        raise ValueError(
            "The model's parameters that require grad are not those it had when the estimator was built, over which "
            "its posterior is. Build a new estimator after changing them, or set the flags back."
        )


def _check_basis(request: Request, engine: Engine, ranks: Ranks, fresh: bool) -> None:
    """Require a basis that is given, if one is, to be that of this model."""
    basis = request.basis
    if basis is None:
        return
    if request.landmarks is not None or not fresh:
        raise ValueError(
            "basis= takes the place of landmarks, and override=False keeps the basis there is; pass one of them."
        )
    if not isinstance(basis, NystromBasis):
        raise ValueError(f"basis must be the basis of a fitted estimator, or None; got {shown(basis)}.")
    checkpoint.check_shard((basis.ranks.rank, basis.ranks.size), ranks, "The basis given")
    checkpoint.check_shapes(checkpoint.pack_basis(basis), engine.function.weights(), "The basis given")
    if basis.of_model not in (None, checkpoint.fingerprint(engine.module)):
        raise ValueError(
            "The basis given was made from another model: parameters and buffers have the same shapes, but other "
            "values. Its directions are gradients at those values. Pass the basis of a fit of this model as it is "
            "now, or leave basis= out, so that one is made."
        )


def _checked_options(request: Request, likelihood: Likelihood, dict_key_x: str) -> Request:
    """Require options that make sense, and return the request with plain numbers."""
    check_size("checkpoint_every", request.checkpoint_every, optional=False)
    check_prediction("glm", request.link_approx, 100)
    check_link(likelihood, request.link_approx)
    if request.val_loader is not None:
        check_loader("val_loader", request.val_loader)
    if callable(request.landmarks) and request.balanced:
        raise ValueError(
            "landmarks= is a scheme by which landmarks are drawn, and so is balanced=True; pass one of them."
        )
    if request.pairs is not None:
        check_landmarks(request.pairs, dict_key_x)
    return replace(
        request,
        max_samples=check_size("max_samples", request.max_samples),
        n_total=check_size("n_total", request.n_total),
        val_steps=check_size("val_steps", request.val_steps),
    )


def _arguments(request: Request, sizes: Sizes, estimator: Any, now: Posterior, fresh: bool) -> dict[str, Any]:
    """Return everything but the data that the result of a fit depends on, in plain types."""
    given, basis = request.pairs, request.basis
    before = "nothing" if fresh else digest(now.fit.H, now.fit.basis.fingerprint())
    return {
        "model": checkpoint.fingerprint(estimator.model),
        "seed": now.seed,
        **vars(sizes),
        "channel_axis": estimator.channel_axis,
        "shard_directions": estimator.shard_directions,
        "likelihood": now.likelihood.name,
        **now.likelihood.options,
        "backend": type(estimator.backend).__name__,
        "dtype": str(now.setting.prior_precision.dtype),
        "override": fresh,
        "scheme": _name_of(request.scheme),
        "val_loader": request.val_loader is not None,
        "val_steps": request.every,
        "max_samples": request.max_samples,
        "n_total": request.n_total,
        "landmarks": None if given is None else digest(input_digest(given[0]), given[1]),
        "basis": None if basis is None else basis.fingerprint(),
        "fitted before": before,
    }


def _name_of(scheme: Scheme) -> str:
    """Return the name by which the landmark schemes of two fits are compared."""
    if not hasattr(scheme, "__qualname__"):
        raise ValueError(
            "With checkpoint=, and on several ranks, landmarks= must be a function with a name, by which it is told apart "
            f"from others; got {shown(scheme)}. Define one with def."
        )
    return f"{scheme.__module__}.{scheme.__qualname__}"


def plan(estimator: Any, train_loader: Any) -> Plan:
    """Work out what a fit will cost; see :meth:`laplace_ella.ELLALaplace.plan`."""
    check_loader("train_loader", train_loader)
    sizes = checked_sizes(estimator)
    ranks, engine, n, rank = estimator._ranks, estimator._engine, sizes.curvature_size, sizes.n_eigenvalues
    if not isinstance(rank, int):  # a share, which is not known before: as much as the budget allows
        rank = max(1, min(sizes.subsample_size, engine.budget() // engine.row_size()))
    before = random_state(train_loader)
    try:
        x = first_batch(train_loader, estimator.dict_key_x, estimator.dict_key_y, engine.inputs)
    finally:
        set_random_state(before, train_loader)
    return make_plan(
        engine.eager(),
        engine.to_model(x),
        n_data=data_size(train_loader, batch_size(x)),
        n_landmarks=ranks.lengths(sizes.subsample_size)[0],
        rank=rank,
        n_curvature=None if n is None else ranks.lengths(n)[0],
        sampled=sizes.labels,
        likelihood=estimator._posterior.likelihood,
    )
