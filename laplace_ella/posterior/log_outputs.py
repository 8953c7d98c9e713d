r"""Likelihoods with outputs that are logarithms: of the rates of counts, and of the variances of numbers.

Their predictions are moments of the targets, whose noise follows from the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import mixtures
from .gaussian import Outputs, finite
from .likelihood import Likelihood, Prediction

# Of rates and variances that single precision holds.
LARGEST_LOGARITHM = 80.0


class Poisson(Likelihood):
    """Counts, independent given their rates, whose logarithms are the C outputs."""

    name = "poisson"
    host_name = "regression"
    has_probabilities = False

    def targets(self, y: Tensor, f: Tensor) -> Tensor:
        """Return counts (B, C), float64."""
        if y.ndim == 1 and f.shape[-1] == 1:
            y = y[:, None]
        if y.shape != f.shape or y.is_complex():
            raise ValueError(
                f"Poisson targets must have the shape of the outputs, {tuple(f.shape)}, with one count for each; "
                f"got {tuple(y.shape)} and {y.dtype}."
            )
        y = y.double()
        bad = ~(y.isfinite() & (y >= 0) & (y == y.round()))
        if bad.any():
            raise ValueError(
                f"Poisson targets must be counts, whole numbers of at least 0; got {float(y[bad][0]):.6g}. For rates or "
                "other positive numbers take the logarithm, and likelihood='regression'."
            )
        _check_logarithms(f, "The outputs of a Poisson likelihood are logarithms of rates")
        return y

    def losses(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the negative log likelihoods, log-factorials included."""
        return -mixtures.log_poisson(f.double(), y).sum(-1)

    def curvature_root(self, phi: Tensor, f: Tensor) -> Tensor:
        """Return features times the roots of the rates."""
        return (f.exp().sqrt()[..., None] * phi).flatten(0, 1)

    def sampled_gradients(self, f: Tensor, u: Tensor) -> Tensor:
        """Return the roots of the rates with random signs, whose second moments are those of rate minus count."""
        return f.exp().sqrt()[:, None] * (u - 0.5).sign()

    def nll(self, prediction: Prediction, y: Tensor, noise_variance: Any) -> Tensor:
        """Score each count under the Gaussian of its log rate."""
        mean, variance = prediction
        return -mixtures.log_poisson_of_gaussian(mean, variance, y).sum(-1)

    def inverse_link(self, f: Tensor) -> Tensor:
        """Return the rates."""
        return finite(f.exp())

    def uncertainty(
        self, outputs: Outputs, samples: Iterable[Tensor], noise_variance: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the mean (B, C) of each rate, which is the variance of a count given its rate, and the rate's variance."""
        return _log_normal(outputs.mean, outputs.variance)

    def conditional_moments(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rates, twice."""
        rate = self.inverse_link(f)
        return rate, rate

    def target_moments(self, mean: Tensor, spread: Tensor, n_outputs: int) -> tuple[Tensor, Tensor]:
        """Return the moments of counts, whose rates are log-normal: the mean rate, and its (co)variance plus the mean."""
        if spread.ndim == mean.ndim:
            rate, of_rates = _log_normal(mean, spread)
            return rate, finite(rate + of_rates)
        rate = finite((mean + spread.diagonal(dim1=-2, dim2=-1) / 2).exp())
        of_rates = finite(rate[..., None] * rate[..., None, :]) * finite(spread.expm1())
        return rate, finite(torch.diag_embed(rate) + finite(of_rates))


class Heteroscedastic(Likelihood):
    """Regression with noise that depends on the input: 2 D outputs, D means and then the logarithms of D variances."""

    name = "heteroscedastic"
    host_name = "regression"
    has_probabilities = False
    scores_marginals = False
    has_intervals = True
    has_positive_loss = False

    def targets(self, y: Tensor, f: Tensor) -> Tensor:
        """Return targets (B, D), float64."""
        if f.shape[-1] % 2:
            raise ValueError(
                "A heteroscedastic likelihood needs two outputs for each target, all means and then the logarithms of all "
                f"variances; got outputs of shape {tuple(f.shape)}."
            )
        means, logarithms = f.chunk(2, -1)
        if y.ndim == 1 and means.shape[-1] == 1:
            y = y[:, None]
        if y.shape != means.shape or y.is_complex():
            raise ValueError(
                f"Heteroscedastic targets must have the shape of the means, {tuple(means.shape)}, half of the outputs; "
                f"got {tuple(y.shape)} and {y.dtype}."
            )
        if not y.isfinite().all():
            raise ValueError("Heteroscedastic targets must be finite; got NaN or infinity.")
        what = "The second half of the outputs of a heteroscedastic likelihood are logarithms of variances"
        _check_logarithms(logarithms, what)
        return y.double()

    def losses(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the negative log densities, with their constants."""
        mean, logarithm = f.double().chunk(2, -1)
        return -mixtures.log_normal(y - mean, logarithm.exp()).sum(-1)

    def curvature_root(self, phi: Tensor, f: Tensor) -> Tensor:
        """Return the root of the Fisher information: 1 / variance for a mean, 1/2 for the logarithm of a variance."""
        return (_root_information(f)[..., None] * phi).flatten(0, 1)

    def sampled_gradients(self, f: Tensor, u: Tensor) -> Tensor:
        """Return the roots of the Fisher information with random signs, whose second moments are those of gradients."""
        return _root_information(f)[:, None] * (u - 0.5).sign()

    def nll(self, prediction: Prediction, y: Tensor, noise_variance: Any) -> Tensor:
        """Score each target under the Gaussian of its mean and of the logarithm of its variance."""
        mean, spread = prediction
        return -mixtures.log_normal_of_gaussian(mean, spread, y).sum(-1)

    def inverse_link(self, f: Tensor) -> Tensor:
        """Return D means, and then D variances."""
        mean, logarithm = f.chunk(2, -1)
        return torch.cat([mean, finite(logarithm.exp())], -1)

    def uncertainty(
        self, outputs: Outputs, samples: Iterable[Tensor], noise_variance: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the mean of each target's variance, and the variance of its mean, both (B, D)."""
        of_mean, of_logarithm = outputs.variance.chunk(2, -1)
        return _log_normal(outputs.mean.chunk(2, -1)[1], of_logarithm)[0], of_mean

    def conditional_moments(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means and the variances."""
        mean, variance = self.inverse_link(f).chunk(2, -1)
        return mean, variance

    def target_moments(self, mean: Tensor, spread: Tensor, n_outputs: int) -> tuple[Tensor, Tensor]:
        """Return the moments of targets: to the (co)variance of a mean comes the mean of its log-normal variance."""
        of_means = (
            torch.arange(mean.shape[-1], dtype=torch.int64, device=mean.device) % n_outputs < n_outputs // 2
        )
        is_matrix = spread.ndim > mean.ndim
        variance = spread.diagonal(dim1=-2, dim2=-1) if is_matrix else spread
        noise = finite((mean + variance / 2).exp())[..., ~of_means]
        if not is_matrix:
            return mean[..., of_means], finite(spread[..., of_means] + noise)
        return mean[..., of_means], finite(spread[..., of_means, :][..., of_means] + torch.diag_embed(noise))


def _log_normal(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of exponentials of Gaussian numbers."""
    found = finite((mean + variance / 2).exp())
    return found, finite(finite(found.square()) * finite(variance.expm1()))


def _check_logarithms(f: Tensor, what: str) -> None:
    """Require outputs whose exponentials are far from what floating point can hold."""
    bad = f.isfinite() & (f.abs() > LARGEST_LOGARITHM)
    if bad.any():
        raise ValueError(
            f"{what}, which must lie in -{LARGEST_LOGARITHM:.0f}..{LARGEST_LOGARITHM:.0f}; the model returned "
            f"{float(f[bad][0]):.6g}. If its outputs are on the scale of the targets, let it return their logarithms."
        )


def _root_information(f: Tensor) -> Tensor:
    """Return the roots of the Fisher information of D means and D logarithms of variances."""
    logarithm = f.chunk(2, -1)[1]
    return torch.cat([(-logarithm / 2).exp(), torch.full_like(logarithm, 0.5**0.5)], -1)
