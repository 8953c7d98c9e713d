r"""The likelihoods, each with its targets, loss, curvature in f, predictive density, links and parameters.

A likelihood is one class. :data:`LIKELIHOODS` has those that are known, by the name that users pass; an entry added
to it is a likelihood like the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .gaussian import Outputs
from .likelihood import Likelihood, Prediction, entropy_of
from .log_outputs import Heteroscedastic, Poisson

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Classification",
    "Heteroscedastic",
    "Likelihood",
    "Poisson",
    "Prediction",
    "Regression",
    "RewardModeling",
    "entropy_of",
    "name_of",
]

# The class index that says that there is no target, as in nn.CrossEntropyLoss.
IGNORED = -100


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

    def log_probabilities(self, f: Tensor) -> Tensor:
        """Return the log probabilities (..., C) of the classes."""
        return f.log_softmax(-1)


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

    def log_probabilities(self, f: Tensor) -> Tensor:
        """Return the log probabilities (..., C, 2) of each of the C targets to be 1, and to be 0."""
        return F.logsigmoid(torch.stack([f, -f], -1))

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
    has_noise = has_intervals = True
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

    def uncertainty(
        self, outputs: Outputs, samples: Iterable[Tensor], noise_variance: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the variances (B, C) of the noise and of each output; no samples are drawn."""
        variance = outputs.variance
        ratios = torch.ones_like(variance) if self.ratios is None else self.ratios.to(variance)
        return noise_variance * ratios.square().expand_as(variance), variance

    def log_normaliser(self, sigma_noise: Tensor) -> Tensor:
        """Return log(sigma sqrt(2 pi))."""
        return torch.log(sigma_noise * math.sqrt(2 * math.pi))


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


def _log(p: Tensor) -> Tensor:
    return p.double().clamp_min(torch.finfo(torch.float64).tiny).log()
