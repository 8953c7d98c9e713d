r"""Adds the data of another fit to a fit, and takes some of its data away.

With the basis kept, G and the loss are sums over the data, so that parts of them can be added and
subtracted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.hashing import digest
from ..data.loading import check_some
from ..data.stream import Batch, Stream
from ..network.checks import check_finite_features
from ..network.engine import Engine
from ..nystrom.jacobian import answer_others, features
from ..parallel.ranks import Ranks
from ..parallel.sharding import work_through
from ..posterior.fit import Fit
from ..posterior.gaussian import positive_part
from ..posterior.likelihoods import Likelihood
from ..posterior.posterior import Posterior
from ..posterior.targets import check_weights, checked_targets, prediction_weights, sum_of_weights
from ..posterior.targets import loss as loss_of
from .curvature import curvature

# Features of one input differ by rounding where batches do: eigenvalues of a difference of two G down to
# minus so many eps of the largest there ever was are zero.
ROUNDING = 100
LARGEST_ROUNDING = 0.01  # of half precision


def check_other(estimator: Any, other: Any, kind: type) -> None:
    """Require another estimator.

    Raises
    ------
    ValueError
    """
    if isinstance(other, kind) and other is not estimator:
        return
    itself = "this estimator itself, whose data would count twice"
    got = itself if other is estimator else type(other).__name__
    raise ValueError(f"merge() takes another fitted ELLALaplace; got {got}.")


def merged(mine: Posterior, theirs: Posterior) -> Fit:
    """Return the fit to the data of two posteriors, which have to agree in everything but their data.

    Raises
    ------
    ValueError
        Naming what differs.
    """
    own, other = _identity(mine), _identity(theirs)
    differ = [name for name in own if own[name] != other[name]]
    if differ:
        raise ValueError(
            f"Estimators to be merged must have the same {', '.join(own)}; these differ in {', '.join(differ)}. "
            "Fit the other one with basis=la.basis, of all directions (la.n_directions = None); give both the same noise, temperature and prior, or merge before tuning."
        )
    return mine.fit.plus(theirs.fit)


def _identity(posterior: Posterior) -> dict[str, Any]:
    """Return what two posteriors must share to be merged, in plain types."""
    setting, basis = posterior.setting, posterior.fit.basis
    values = {
        "sigma_noise": posterior.sigma_noise,
        "temperature": torch.tensor(setting.temperature, dtype=torch.float32, device="cpu"),
        "prior_precision": setting.prior_precision,
        "prior_mean": posterior.prior_mean,
    }
    return {
        "model": posterior.fit.fingerprint,
        "likelihood": posterior.likelihood.name,
        "basis": digest(basis.directions, basis.eigenvalues),
        **{k: digest(v.double().reshape(-1)) for k, v in values.items()},
    }


def without(posterior: Posterior, engine: Engine, stream: Stream, ranks: Ranks) -> Fit:
    """Return the fit to the data that remain when those of a stream are taken away.

    Raises
    ------
    ValueError
        If the stream is empty or holds all data, or data that were not fitted, as far as G and the loss can tell.
    """
    fit = posterior.fit
    G, loss, (n, n_predictions) = _sums_over(fit, posterior.likelihood, engine, stream, ranks)
    check_some(n, "loader of the data to forget")
    with ranks.together("what remains"):
        _check_count(fit, n)
        eps = torch.finfo(next(iter(engine.function.weights().values())).dtype).eps
        is_positive = posterior.likelihood.has_positive_loss
        remaining = _remaining(fit, G, loss, min(ROUNDING * eps, LARGEST_ROUNDING), is_positive)
    n_left = fit.n_data - n
    snapshots = [(n_left, ranks.of_first(remaining))]
    rest = (fit.loss - loss).clamp_min(0) if is_positive else fit.loss - loss
    left = fit.n_predictions - n_predictions
    return fit.with_sums(snapshots, rest, n_left, round(left) if isinstance(fit.n_predictions, int) else left)


def _sums_over(
    fit: Fit, likelihood: Likelihood, engine: Engine, stream: Stream, ranks: Ranks
) -> tuple[Tensor, Tensor, tuple[int, float]]:
    """Return G (K, K) and loss () of the data of all ranks, and how many inputs and predictions they are."""
    basis, what = fit.basis, "the data to forget"
    G, loss = torch.zeros_like(fit.H), torch.zeros_like(fit.loss)
    counts = torch.zeros(2, dtype=torch.float64, device="cpu")

    def add(batch: Batch | None) -> None:
        if batch is None:
            answer_others(engine, basis)
            return
        phi, f = features(engine, basis, batch.x)
        check_finite_features(phi, f, batch.name)
        axes = engine.axes(batch.x)
        y = checked_targets(likelihood, batch.y, f, axes, batch.name)
        check_weights(batch.weights, torch.Size((len(batch.y), *axes.positions)), batch.name)
        weights = prediction_weights(likelihood, batch.y, batch.weights)
        G.add_(curvature(likelihood, phi, f, weights))
        loss.add_(loss_of(likelihood, f, y, batch.weights))
        n = len(batch.y), sum_of_weights(weights, len(f))
        counts.add_(torch.tensor(n, dtype=torch.float64, device="cpu"))
        _check_count(fit, int(counts[0]))  # of a stream without end, too

    parts = stream.parts("Data to forget", partial(engine.bounded, width=basis.rank))
    work_through(parts, add, ranks, basis.ranks, what)
    n, n_predictions = ranks.total(counts).tolist()
    return ranks.total(G), ranks.total(loss), (int(n), n_predictions)


def check_exact(fit: Fit) -> None:
    """Require the G of all data, of which the part of some is known.

    Raises
    ------
    ValueError
    """
    if fit.exact:
        return
    found = "sampled labels" if fit.labels_sampled else f"{fit.n_curvature} of N = {fit.n_data} inputs"
    raise ValueError(
        "forget() needs the exact G of all data, as it cannot be known what the data to be forgotten have contributed to an "
        f"estimate; this one is made from {found}. Fit with curvature_size=None, or N at least, with "
        "curvature='exact' and without n_total or early stopping."
    )


def _check_count(fit: Fit, n: int) -> None:
    if n >= fit.n_data:
        raise ValueError(
            f"forget() would leave no data: the loader has {n} inputs or more, and the estimator was fitted to {fit.n_data}. "
            "Pass those to be forgotten; fit again to start anew."
        )


def _remaining(fit: Fit, G: Tensor, loss: Tensor, eps: float, is_positive: bool) -> Tensor:
    """Return what remains of G, and require that it is a sum over data: no negative curvature, and no negative loss.

    The latter only if no target's loss is negative.
    """
    largest, largest_loss = fit.largest_sums
    remaining = fit.H - G
    lowest = float(torch.linalg.eigvalsh(remaining)[0])
    if lowest < -eps * largest or (is_positive and fit.loss - loss < -eps * largest_loss):
        raise ValueError(
            "The data to be forgotten are not among those that the estimator was fitted to: without them, the smallest "
            f"eigenvalue of G would be {lowest:.3g} (the largest was {largest:.3g}), and the loss, a sum of positive "
            f"terms, {float(fit.loss - loss):.3g}. Pass inputs and targets as they were fitted, each once."
        )
    return positive_part(remaining) if lowest < 0 else remaining
