r"""What is asked of an uncertainty: its parts, and intervals."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.batches import Input, Raw
from ..data.checks import number
from ..network.engine import Engine
from .gaussian import Outputs, root_of, without_autocast
from .likelihoods import Likelihood
from .links import Noise, samples_of
from .posterior import Posterior
from .prediction import in_parts, joined, linearise


class Uncertainty(NamedTuple):
    """The uncertainty of predictions, and its two parts; total = aleatoric + epistemic to the last digit.

    Entropies in nats, (B,) for classification and (B, C) for bernoulli; or variances of the targets, (B, C), in squares of
    their unit, for regression and counts.

    Attributes
    ----------
    total : Tensor
        Entropy of the mean prediction; or variance of a target, noise included.
    aleatoric : Tensor
        What more training data would not take away: the expected entropy of a prediction; or the noise variance.
    epistemic : Tensor
        What they would: the mutual information of target and weights; or the variance of the output. Not negative.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def uncertainty(
    posterior: Posterior,
    engine: Engine,
    x: Raw | Input,
    likelihood: Likelihood,
    noise: Noise,
    enable_backprop: bool = False,
) -> Uncertainty:
    """Return total, aleatoric and epistemic uncertainty of the targets at inputs, in the model's dtype."""

    def compute(inputs: Any) -> Uncertainty:
        seen, variance = linearise(posterior, engine, inputs, enable_backprop), noise_variance(posterior)
        parts = joined(
            [split(posterior.outputs(rows), likelihood, noise, variance) for rows in seen.blocks()]
        )
        aleatoric, epistemic = (part.to(seen.f.dtype) for part in parts)
        return Uncertainty(aleatoric + epistemic, aleatoric, epistemic)

    return in_parts(posterior, engine, x, compute)


@without_autocast
def split(
    outputs: Outputs, likelihood: Likelihood, noise: Noise, noise_variance: Any
) -> tuple[Tensor, Tensor]:
    """Return the aleatoric and the epistemic part of the uncertainty of the targets, given the outputs."""
    return likelihood.uncertainty(outputs, samples_of(outputs, noise), noise_variance)


def interval(
    posterior: Posterior,
    engine: Engine,
    x: Raw | Input,
    likelihood: Likelihood,
    level: float,
    observation_noise: bool,
    enable_backprop: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the central interval of each target, or output, with a probability of ``level``: lower and upper end (B, C)."""
    seen = linearise(posterior, engine, x, enable_backprop)
    outputs = posterior.outputs(seen)
    aleatoric, epistemic = split(outputs, likelihood, Noise(), noise_variance(posterior))
    deviation = root_of(aleatoric + epistemic if observation_noise else epistemic)
    # Of the lower tail, as 1 - tail is rounded.
    tail = torch.tensor((1 - level) / 2, dtype=torch.float64, device="cpu")
    half = -float(torch.special.ndtri(tail)) * deviation
    mean, dtype = (
        likelihood.target_moments(outputs.mean, outputs.variance, outputs.mean.shape[-1])[0],
        seen.f.dtype,
    )
    return (mean - half).to(dtype), (mean + half).to(dtype)


def noise_variance(posterior: Posterior) -> Any:
    r"""Return :math:`\sigma^2`, or 0 where the likelihood has no noise."""
    return posterior.setting.sigma_noise.detach() ** 2 if posterior.likelihood.has_noise else 0.0


def checked_level(level: Any) -> float:
    """Return the probability of an interval as a float between 0 and 1."""
    what = "a probability between 0 and 1, both excluded, such as 0.95"
    found = number("level", level, what)
    if not 0 < found < 1:
        raise ValueError(f"level must be {what}; got {level!r}.")
    return found


def check_numbers_predicted(likelihood: Likelihood) -> None:
    """Require a likelihood whose targets are numbers that are nearly Gaussian, given the outputs."""
    if not likelihood.of_calls.has_intervals:
        raise ValueError(
            f"interval() is for regression, whose targets are nearly Gaussian; the likelihood is {likelihood.name!r}. uncertainty() "
            "splits the uncertainty of its targets, and quantiles of predictive_samples() are intervals of its predictions."
        )
