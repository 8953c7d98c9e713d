r"""How far inputs lie outside what the basis knows, and how far the basis is from the exact thing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Input, Raw
from ..data.hashing import digest
from ..data.loading import check_some
from ..data.stream import Stream
from ..network.engine import Engine
from ..nystrom.basis import identity_basis
from ..nystrom.jacobian import features
from ..parallel.ranks import Ranks
from ..parallel.sharding import work_through
from .fit import Fit
from .gaussian import Linearised, posterior_scale
from .likelihoods import Likelihood
from .links import Noise
from .posterior import Posterior
from .prediction import attend, linearise, numbers_per_output, predict
from .setting import PER_CLASS, SETTING_NAMES
from .targets import prediction_weights, weighted

# Exact linearised Laplace is made of P x P matrices.
LARGEST_EXACT = 5000
# Of more calibration inputs, so many quantiles are kept.
LARGEST_REFERENCE = 10_000
# Samples of the Monte-Carlo link from which the entropy is computed.
ENTROPY_SAMPLES = 128


@dataclass(frozen=True)
class ApproximationError:
    r"""How well the basis covers given inputs.

    Attributes
    ----------
    captured_trace : float
        Share of :math:`\operatorname{tr} J J^T`, summed over the inputs, that lies in the span.
    covariance_error : float or None
        Frobenius norm of the difference between the predictive covariances at the inputs and those of
        exact linearised Laplace, relative to the latter; None if no training data were given.
    """

    captured_trace: float
    covariance_error: float | None


def seen_with_shares(posterior: Posterior, engine: Engine, x: Raw | Input, backprop: bool) -> Linearised:
    """Compute features, and what the share of gradients outside the span is made of."""
    return linearise(posterior, engine, x, backprop, posterior.residual.of_shares)


def novelty(posterior: Posterior, engine: Engine, x: Raw | Input, backprop: bool) -> Tensor:
    """Return how novel inputs are (B,): the residual share, or once calibrated the sum of normal scores.

    Raises
    ------
    ValueError
        If the setting has changed since the calibration.
    """
    usual = posterior.fit.novelty
    seen = seen_with_shares(posterior, engine, x, backprop)
    if usual is None:
        return seen.residual_share.to(seen.f.dtype)
    if usual[1] != _setting(posterior):
        raise ValueError(
            "The setting has changed since calibrate_novelty() (prior, temperature, scales, rank, residual or "
            "seed), and with it what is usual. Call it again."
        )
    found = _entropy_and_share(posterior, seen)
    scores = normal_scores(found, usual[0].to(found))
    return (scores[:, 0] + scores[:, 1] / 2).to(posterior.setting.prior_precision.dtype)


def calibrated(posterior: Posterior, engine: Engine, stream: Stream, ranks: Ranks, backprop: bool) -> Fit:
    """Return the fit with the entropies and shares that are usual among inputs of a stream.

    Raises
    ------
    ValueError
        If there are fewer than two inputs.
    """
    found = [torch.zeros(0, 2, dtype=torch.float64, device="cpu")]

    def look_at(x: Input | None) -> None:
        if x is None:
            attend(posterior, engine, posterior.residual.of_shares)
        else:
            seen = seen_with_shares(posterior, engine, x, backprop)
            found.append(_entropy_and_share(posterior, seen).cpu())

    width = numbers_per_output(posterior)
    inputs = (part for x in stream.inputs("Novelty") for part in engine.bounded(x, width))
    work_through(inputs, look_at, ranks, posterior.fit.basis.ranks, "the data to calibrate novelty on")
    values = ranks.joined(torch.cat(found))
    if len(values) < 2:
        raise ValueError(f"calibrate_novelty() needs at least two inputs; got {len(values)}.")
    ascending = values.sort(0).values
    last, kept = len(ascending) - 1, min(len(ascending), LARGEST_REFERENCE)
    steps = torch.linspace(0, last, kept, dtype=torch.float32, device="cpu").round().long()
    return replace(posterior.fit, novelty=(ascending[steps.to(ascending.device)], _setting(posterior)))


def _setting(posterior: Posterior) -> list[Any]:
    """Return all that the score depends on, apart from the fit, in plain types."""
    prior = posterior.setting.prior_precision
    # The plain setting says nothing about priors of several values.
    more = [digest(prior)] if prior.numel() > 1 else []
    of_residual = posterior.residual.name, posterior.residual_samples, posterior.seed
    plain = posterior.plain
    per_class = (getattr(plain, k) for k in PER_CLASS)
    more += [digest(torch.tensor(v, dtype=torch.float64, device="cpu")) for v in per_class if v is not None]
    more += [] if posterior.variance == "ella" else [posterior.variance]
    return [*(getattr(plain, k) for k in SETTING_NAMES if k not in PER_CLASS), *of_residual, *more]


def _entropy_and_share(posterior: Posterior, seen: Linearised) -> Tensor:
    """Return predictive entropy and residual share (B, 2), float64."""
    likelihood = posterior.likelihood
    parts = seen if posterior.residual.adds else Linearised(seen.f, seen.phi, norms=seen.norms)
    p = predict(posterior.outputs(parts), likelihood, "mc", Noise(ENTROPY_SAMPLES, posterior.seed))
    assert isinstance(p, Tensor)
    return torch.stack([likelihood.entropy(p.double()), seen.residual_share], 1)


def normal_scores(values: Tensor, reference: Tensor) -> Tensor:
    r"""Return :math:`\Phi^{-1}` of the rank of each column's values among the reference's (B, D).

    Parameters
    ----------
    values : Tensor (B, D)
    reference : Tensor (n, D)
        Ascending in each column. Values beyond it get the score of its end.
    """
    ranks = torch.searchsorted(reference.T.contiguous(), values.T.contiguous(), right=True).T
    return torch.special.ndtri((ranks.to(values.dtype) + 0.5) / (len(reference) + 1))


@torch.no_grad()
def approximation_error(
    posterior: Posterior, engine: Engine, x: Raw | Input, stream: Stream | None, ranks: Ranks, backprop: bool
) -> ApproximationError:
    """Compare the basis at inputs with all directions, and with training data the covariances too."""
    seen = seen_with_shares(posterior, engine, x, backprop)
    inside, outside = (t.sum() for t in seen.traces())
    if not len(seen.f):
        raise ValueError("x must hold at least one input; got none.")
    error = None if stream is None else _covariance_error(posterior, engine, x, stream, ranks, backprop)
    return ApproximationError(float(inside / (inside + outside)), error)


def _covariance_error(
    posterior: Posterior, engine: Engine, x: Raw | Input, stream: Stream, ranks: Ranks, backprop: bool
) -> float:
    exact = identity_basis(engine.function.weights())
    G, n = torch.zeros(exact.rank, exact.rank, dtype=torch.float64, device=engine.device), 0
    with ranks.together("the training data"):
        for part in stream.parts("Training data", partial(engine.bounded, width=exact.rank)):
            n += len(part.y)
            phi, f = features(engine, exact, part.x)
            weights = prediction_weights(posterior.likelihood, part.y, part.weights)
            root = posterior.likelihood.curvature_root(weighted(phi.double(), weights), f.double())
            G += root.T @ root
    check_some(ranks.greatest(n, "the training data"), "train_loader")
    setting = posterior.setting
    precision = posterior.curvature_factor * ranks.total(G) + exact.project_precision(setting.prior_precision)
    phi, f = features(engine, exact, x)
    theirs = Linearised(f, phi).outputs(posterior_scale(precision)).covariance().double()
    ours = posterior.outputs(linearise(posterior, engine, x, backprop)).covariance().double()
    return float((ours - theirs).norm() / theirs.norm())


def check_probabilities(likelihood: Likelihood) -> None:
    """Require a likelihood whose predictions have an entropy."""
    if not likelihood.of_calls.has_probabilities:
        raise ValueError(
            f"calibrate_novelty() needs probabilities, which likelihood={likelihood.name!r} has not. "
            "Use residual_share(), or novelty() as it is."
        )


def check_exact_size(n_params: int) -> None:
    """Require a network that is small enough for P x P matrices."""
    if n_params > LARGEST_EXACT:
        raise ValueError(
            f"The comparison with exact linearised Laplace forms P x P matrices, for P up to {LARGEST_EXACT}; "
            f"this model has {n_params} trainable weights. Leave train_loader out."
        )
