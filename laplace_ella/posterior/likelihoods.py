r"""The likelihoods, each with its targets, loss, curvature in f, predictive density, links and parameters.

A likelihood is one class. :data:`LIKELIHOODS` has those that are known, by the name that users pass; an entry added
to it is a likelihood like the others. The curvature enters as a root: :math:`\Phi^T \Lambda \Phi = W^T W` with W
returned by ``curvature_root``, so that no C x C matrix is formed and the result is positive semi-definite by construction.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from . import mixtures
from .gaussian import finite

# Class probabilities (B, C); or mean (B, C) and covariance (B, C, C) or variance (B, C).
Prediction: TypeAlias = Tensor | tuple[Tensor, Tensor]
# The class index that says that there is no target, as in nn.CrossEntropyLoss.
IGNORED = -100
# Of rates and variances that single precision holds.
LARGEST_LOGARITHM = 80.0


class Likelihood:
    r"""One observation model, of which subclasses change what is different in theirs.

    Attributes
    ----------
    name : str
        The name that users pass.
    host_name : str
        The likelihood of laplace-torch's that comes closest, whose constructor knows no others.
    has_probabilities : bool
        Whether predictions are probabilities (B, C); else they are means and covariances of outputs.
    has_classes : bool
        Whether each input is of one of C classes: probabilities sum to one, and landmarks can be balanced.
    has_logits : bool
        Whether ``logit_scale`` applies.
    has_noise : bool
        Whether ``sigma_noise`` applies.
    tuned : tuple of str
        What is tuned beside the temperature unless the user says otherwise.
    scores_marginals : bool
        Whether ``nll`` needs the variances of outputs only, where predictions are no probabilities.
    has_positive_loss : bool
        Whether no target adds a negative number to the loss, as none does that is one of countably many.
    """

    name = ""
    host_name = "classification"
    has_probabilities = True
    has_classes = False
    has_logits = False
    has_noise = False
    tuned: tuple[str, ...] = ()
    scores_marginals = True
    has_positive_loss = True

    @property
    def of_calls(self) -> Likelihood:
        """The likelihood that predictions of users' calls are made with."""
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What tells it apart from others of its name, in plain types."""
        return {}

    def with_noise(self, sigma_noise: Tensor) -> Likelihood:
        """Return the likelihood for an observation noise (), (1,) or (C,), as far as its scale does not say it all."""
        return self

    def noise(self, scale: Tensor) -> Tensor:
        """Return the observation noise as users know it, () or (C,), of the scale () that is kept in the setting."""
        return scale

    def targets(self, y: Tensor, f: Tensor) -> Tensor:
        """Return y in the shape that the loss wants; raise ValueError on targets that do not fit the outputs f (B, C)."""
        raise NotImplementedError

    def ignored(self, y: Tensor) -> Tensor | None:
        """Return which of the targets of a batch (B, ...) are left out, (B, ...); None if none can be."""
        return None

    def losses(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the negative log likelihoods (B,), up to constants and the noise, float64."""
        raise NotImplementedError

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the negative log likelihood summed over the batch."""
        return self.losses(f, y).sum()

    def curvature_root(self, phi: Tensor, f: Tensor) -> Tensor:
        r"""Return W (R, K) with :math:`W^T W = \sum_b \Phi_b^T \Lambda_b \Phi_b`."""
        raise NotImplementedError

    def sampled_gradients(self, f: Tensor, u: Tensor) -> Tensor:
        r"""Return gradients (B, n, C) of the loss in f at n targets drawn from the likelihood itself.

        Parameters
        ----------
        f : Tensor (B, C)
        u : Tensor (B, n, C)
            Uniform in (0, 1). The mean of the outer products of the gradients is :math:`\Lambda`.
        """
        raise NotImplementedError

    def nll(self, prediction: Prediction, y: Tensor, noise_variance: Any) -> Tensor:
        """Return the negative log predictive density (B,), float64.

        Parameters
        ----------
        prediction : Tensor (B, C), or pair of Tensor
            Probabilities; or the mean (B, C) of the *outputs*, and their variance (B, C), or covariance (B, C, C) unless
            ``scores_marginals``.
        y : Tensor
            Targets, as ``targets`` returns them.
        noise_variance : float or Tensor ()
            The square of the observation noise.
        """
        raise NotImplementedError

    def inverse_link(self, f: Tensor) -> Tensor:
        """Return the predictions of outputs (..., C) that are certain: probabilities, or the outputs themselves."""
        return f

    def entropy(self, p: Tensor) -> Tensor:
        """Return the entropy (B,) of probabilities (B, C)."""
        return -torch.special.xlogy(p, p).sum(-1)

    def log_normaliser(self, sigma_noise: Tensor) -> Tensor | float:
        """Return the log of what the density of one output is divided by, beside what depends on the loss."""
        return 0.0

    def certain(self, f: Tensor) -> Prediction:
        """Return what ``nll`` takes for outputs (B, C) without variance."""
        return self.inverse_link(f) if self.has_probabilities else (f, torch.zeros_like(f))

    def conditional_moments(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance (..., D) of the targets of certain outputs (..., C); without ``sigma_noise``."""
        return f, torch.zeros_like(f)

    def target_moments(self, mean: Tensor, spread: Tensor, n_outputs: int) -> tuple[Tensor, Tensor]:
        """Return the moments of targets, given those of Gaussian outputs; without ``sigma_noise``.

        Parameters
        ----------
        mean : Tensor (..., n C)
            The C outputs of one input, or of n inputs together.
        spread : Tensor (..., n C) or (..., n C, n C)
            Variance or covariance.
        n_outputs : int
            C.

        Returns
        -------
        mean, spread : Tensor (..., n D), and as ``spread``
        """
        return mean, spread


class Classification(Likelihood):
    """Classes: softmax of C logits."""

    name = "classification"
    has_classes = has_logits = True
    tuned: tuple[str, ...] = ("logit_scale",)

    def targets(self, y: Tensor, f: Tensor) -> Tensor:
        """Return class indices (B,) or probabilities (B, C)."""
        n_outputs = f.shape[-1]
        if n_outputs < 2:
            raise ValueError(
                "Classification needs at least two outputs (the softmax of one is constant); "
                f"got outputs of shape {tuple(f.shape)}. Give the model one output per class, or use likelihood='bernoulli'."
            )
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.ndim == 2:
            return _class_probabilities(y, f)
        if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(
                "Classification targets must be class indices of shape (batch,), or class probabilities of "
                f"shape (batch, {n_outputs}); got shape {tuple(y.shape)} and {y.dtype}. "
                "Convert indices with y.long()."
            )
        bad = ((y < 0) | (y >= n_outputs)) & (y.long() != IGNORED)
        if bad.any():
            raise ValueError(
                f"Class indices must lie in 0..{n_outputs - 1}, the model's outputs, or be {IGNORED}, which is ignored; got "
                f"{int(y[bad][0])}. Check the labels, or the width of the model's last layer."
            )
        return y.long()

    def ignored(self, y: Tensor) -> Tensor | None:
        """Return which class indices are -100, as ``nn.CrossEntropyLoss`` ignores them."""
        if y.is_floating_point() or y.is_complex():
            return None
        found = y.long() == IGNORED  # unsigned numbers may equal it as they are
        return found if found.any() else None

    def losses(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the cross-entropies; 0 where targets are ignored."""
        return F.cross_entropy(f.double(), y, reduction="none", ignore_index=IGNORED)

    def curvature_root(self, phi: Tensor, f: Tensor) -> Tensor:
        """Return the root of p_c-weighted, centred features."""
        # Lambda = diag(p) - p p^T, so the sum is over sqrt(p_c) (phi_c - mean_p phi).
        p = f.softmax(-1)
        centred = phi - torch.einsum("bc,bck->bk", p, phi)[:, None]
        return (p.sqrt()[..., None] * centred).flatten(0, 1)

    def sampled_gradients(self, f: Tensor, u: Tensor) -> Tensor:
        """Return p minus the one-hot vectors of sampled labels."""
        p = f.softmax(-1)
        # The last entry of the sum may be rounded below a draw.
        labels = torch.searchsorted(p.cumsum(-1), u[..., 0].contiguous()).clamp(max=f.shape[-1] - 1)
        return p[:, None] - F.one_hot(labels, f.shape[-1])

    def nll(self, prediction: Prediction, y: Tensor, noise_variance: Any) -> Tensor:
        """Return the negative log probability of classes, or the cross-entropy with probabilities."""
        assert isinstance(prediction, Tensor)
        log_p = _log(prediction)
        return -(log_p.gather(1, y[:, None])[:, 0] if y.ndim == 1 else (log_p * y).sum(-1))

    def inverse_link(self, f: Tensor) -> Tensor:
        """Return class probabilities (..., C)."""
        return f.softmax(-1)


class RewardModeling(Classification):
    """Reward models, which laplace-torch fits as classifiers of pairs, and calls as regressions."""

    name = "reward_modeling"
    has_logits = False
    tuned: tuple[str, ...] = ()

    @property
    def of_calls(self) -> Likelihood:
        """The likelihood of regression, with which laplace-torch answers calls."""
        return LIKELIHOODS["regression"]


class Bernoulli(Likelihood):
    """C binary targets for each input, independent given the logits."""

    name = "bernoulli"
    has_logits = True
    tuned = ("logit_scale",)

    def targets(self, y: Tensor, f: Tensor) -> Tensor:
        """Return targets (B, C) in [0, 1]."""
        if y.ndim == 1 and f.shape[-1] == 1:
            y = y[:, None]
        if y.shape != f.shape:
            raise ValueError(
                f"Bernoulli targets must have the shape of the outputs, {tuple(f.shape)}, with one 0 or 1 for each; "
                f"got {tuple(y.shape)}."
            )
        if y.is_complex():
            raise ValueError(f"Bernoulli targets must be 0 or 1; got {y.dtype}.")
        y = y.double()
        if not bool(((y >= 0) & (y <= 1)).all()):
            raise ValueError(
                f"Bernoulli targets must lie in [0, 1]; got {float(y.min()):.4g}..{float(y.max()):.4g}."
            )
        return y

    def losses(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the binary cross-entropies, each summed over the C targets."""
        return F.binary_cross_entropy_with_logits(f.double(), y, reduction="none").sum(-1)

    def curvature_root(self, phi: Tensor, f: Tensor) -> Tensor:
        """Return features times the standard deviations of the targets."""
        p = f.sigmoid()
        return ((p * (1 - p)).sqrt()[..., None] * phi).flatten(0, 1)

    def sampled_gradients(self, f: Tensor, u: Tensor) -> Tensor:
        """Return p minus sampled targets."""
        p = f.sigmoid()[:, None]
        return p - (u < p).to(f)

    def nll(self, prediction: Prediction, y: Tensor, noise_variance: Any) -> Tensor:
        """Return the negative log probability of all C targets together."""
        assert isinstance(prediction, Tensor)
        return -(y * _log(prediction) + (1 - y) * _log(1 - prediction.double())).sum(-1)

    def inverse_link(self, f: Tensor) -> Tensor:
        """Return the probability of each target to be 1."""
        return f.sigmoid()

    def entropy(self, p: Tensor) -> Tensor:
        """Return the sum of the entropies of the C targets."""
        return super().entropy(p) + super().entropy(1 - p)


class Regression(Likelihood):
    r"""Outputs with Gaussian noise of standard deviation :math:`\sigma r_c`.

    Parameters
    ----------
    ratios : Tensor (C,), optional
        r, of which the product is 1, float64; None: the noise is the same for all outputs. Loss and curvature are in units
        of r, and sigma is one parameter.
    """

    name = host_name = "regression"
    has_probabilities = False
    has_noise = True
    tuned = ("sigma_noise",)

    def __init__(self, ratios: Tensor | None = None) -> None:
        self.ratios = ratios

    @property
    def options(self) -> dict[str, Any]:
        """The ratios of the noise."""
        return {} if self.ratios is None else {"ratios of sigma_noise": self.ratios.tolist()}

    def with_noise(self, sigma_noise: Tensor) -> Likelihood:
        """Return regression with the ratios of these noises."""
        if sigma_noise.numel() == 1:
            return Regression()
        sigma = sigma_noise.detach().double()
        return Regression(sigma / sigma.log().mean().exp())

    def noise(self, scale: Tensor) -> Tensor:
        """Return the noise of each output."""
        return scale if self.ratios is None else scale * self.ratios.to(scale)

    def _in_units(self, values: Tensor) -> Tensor:
        """Divide values (..., C) by the ratios."""
        return values if self.ratios is None else values / self.ratios.to(values)

    def targets(self, y: Tensor, f: Tensor) -> Tensor:
        """Return targets (B, C) in the dtype of the outputs."""
        if self.ratios is not None and len(self.ratios) != f.shape[-1]:
            raise ValueError(
                f"sigma_noise must be one number, or one for each of the model's {f.shape[-1]} outputs; got "
                f"{len(self.ratios)}."
            )
        if y.shape != f.shape:
            hint = " Add the output axis with y.unsqueeze(-1)." if y.ndim == 1 else ""
            raise ValueError(
                f"Regression targets must have the shape of the outputs, {tuple(f.shape)}; "
                f"got {tuple(y.shape)}, which would broadcast.{hint}"
            )
        if not y.isfinite().all():
            raise ValueError("Regression targets must be finite; got NaN or infinity.")
        return y.to(f.dtype)

    def losses(self, f: Tensor, y: Tensor) -> Tensor:
        """Return half the sums of squared errors, in units of the noise ratios."""
        return 0.5 * self._in_units(f.double() - y.double()).square().sum(-1)

    def curvature_root(self, phi: Tensor, f: Tensor) -> Tensor:
        """Return the features: the curvature of the loss is the identity, in units of the noise ratios."""
        return self._in_units(phi.mT).mT.flatten(0, 1)

    def sampled_gradients(self, f: Tensor, u: Tensor) -> Tensor:
        """Return standard normal numbers: gradients are in units of the noise, as the loss is."""
        return self._in_units(torch.special.ndtri(u))

    def nll(self, prediction: Prediction, y: Tensor, noise_variance: Any) -> Tensor:
        r"""Score the marginals of the outputs, with :math:`\sigma^2` added to their variances."""
        mean, spread = prediction
        var = spread if spread.ndim == mean.ndim else spread.diagonal(dim1=-2, dim2=-1)
        var = var.double()
        var = var + (noise_variance if self.ratios is None else noise_variance * self.ratios.square().to(var))
        squared = (y.double() - mean.double()).square()
        return 0.5 * (squared / var + (2 * math.pi * var).log()).sum(-1)

    def log_normaliser(self, sigma_noise: Tensor) -> Tensor:
        """Return log(sigma sqrt(2 pi))."""
        return torch.log(sigma_noise * math.sqrt(2 * math.pi))


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

    def conditional_moments(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rates, twice."""
        rate = self.inverse_link(f)
        return rate, rate

    def target_moments(self, mean: Tensor, spread: Tensor, n_outputs: int) -> tuple[Tensor, Tensor]:
        """Return the moments of counts, whose rates are log-normal: the mean rate, and its (co)variance plus the mean."""
        if spread.ndim == mean.ndim:
            rate = finite((mean + spread / 2).exp())
            return rate, finite(rate + finite(rate.square()) * finite(spread.expm1()))
        rate = finite((mean + spread.diagonal(dim1=-2, dim2=-1) / 2).exp())
        of_rates = finite(rate[..., None] * rate[..., None, :]) * finite(spread.expm1())
        return rate, finite(torch.diag_embed(rate) + finite(of_rates))


class Heteroscedastic(Likelihood):
    """Regression with noise that depends on the input: 2 D outputs, D means and then the logarithms of D variances."""

    name = "heteroscedastic"
    host_name = "regression"
    has_probabilities = False
    scores_marginals = False
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

    def conditional_moments(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means and the variances."""
        mean, variance = self.inverse_link(f).chunk(2, -1)
        return mean, variance

    def target_moments(self, mean: Tensor, spread: Tensor, n_outputs: int) -> tuple[Tensor, Tensor]:
        """Return the moments of targets: to the (co)variance of a mean comes the mean of its log-normal variance."""
        of_means = torch.arange(mean.shape[-1], device=mean.device) % n_outputs < n_outputs // 2
        is_matrix = spread.ndim > mean.ndim
        variance = spread.diagonal(dim1=-2, dim2=-1) if is_matrix else spread
        noise = finite((mean + variance / 2).exp())[..., ~of_means]
        if not is_matrix:
            return mean[..., of_means], finite(spread[..., of_means] + noise)
        return mean[..., of_means], finite(spread[..., of_means, :][..., of_means] + torch.diag_embed(noise))


KINDS = (Classification, Regression, RewardModeling, Bernoulli, Poisson, Heteroscedastic)
LIKELIHOODS: dict[str, Likelihood] = {kind.name: kind() for kind in KINDS}


def name_of(likelihood: Any) -> str:
    """Return the name of a likelihood, which may be one of laplace-torch's enumeration."""
    return str(getattr(likelihood, "value", likelihood))


def _class_probabilities(y: Tensor, f: Tensor) -> Tensor:
    if y.shape != f.shape:
        raise ValueError(
            f"Targets of shape {tuple(y.shape)} would broadcast against outputs of shape {tuple(f.shape)}. "
            "Give class indices of shape (batch,) or one probability per output."
        )
    y = y.double()
    if not bool((y >= 0).all()) or (y.sum(-1) - 1).abs().max() > 1e-3:
        raise ValueError(
            "Class probabilities must be non-negative and sum to one for each input; "
            f"got rows that sum to {float(y.sum(-1).min()):.4g}..{float(y.sum(-1).max()):.4g}."
        )
    return y


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


def _log(p: Tensor) -> Tensor:
    return p.double().clamp_min(torch.finfo(torch.float64).tiny).log()
