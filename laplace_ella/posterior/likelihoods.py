r"""The likelihoods, each with its targets, loss, curvature in f, predictive density, links and parameters.

A likelihood is one class. :data:`LIKELIHOODS` has those that are known, by the name that users pass; an entry added
to it is a likelihood like the others. The curvature enters as a root: :math:`\Phi^T \Lambda \Phi = W^T W` with W
returned by ``curvature_root``, so that no C x C matrix is formed and the result is positive semi-definite by construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.notices import warn_user
from .gaussian import Outputs

# Class probabilities (B, C); or mean (B, C) and covariance (B, C, C) or variance (B, C).
Prediction: TypeAlias = Tensor | tuple[Tensor, Tensor]


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
    """

    name = ""
    host_name = "classification"
    has_probabilities = True
    has_classes = False
    has_logits = False
    has_noise = False
    tuned: tuple[str, ...] = ()

    @property
    def of_calls(self) -> Likelihood:
        """The likelihood that predictions of users' calls are made with."""
        return self

    def targets(self, y: Tensor, f: Tensor) -> Tensor:
        """Return y in the shape that the loss wants; raise ValueError on targets that do not fit the outputs f (B, C)."""
        raise NotImplementedError

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the negative log likelihood summed over the batch, up to constants and the noise, float64."""
        raise NotImplementedError

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
        """Return the negative log predictive density (B,), float64."""
        raise NotImplementedError

    def inverse_link(self, f: Tensor) -> Tensor:
        """Return the predictions of outputs (..., C) that are certain: probabilities, or the outputs themselves."""
        return f

    def entropy(self, p: Tensor) -> Tensor:
        """Return the entropy (B,) of probabilities (B, C)."""
        return -torch.special.xlogy(p, p).sum(-1)

    def log_probabilities(self, f: Tensor) -> Tensor:
        """Return the log probabilities (..., Y) of the Y labels that each target may have, of outputs (..., C).

        Raises
        ------
        NotImplementedError
            If targets have no finite set of labels.
        """
        raise NotImplementedError(
            f"likelihood={self.name!r} names no finite set of labels, whose entropy could be taken. Define "
            "log_probabilities(), or uncertainty(), in its class."
        )

    def uncertainty(
        self, outputs: Outputs, samples: Iterable[Tensor], noise_variance: Any
    ) -> tuple[Tensor, Tensor]:
        r"""Split the uncertainty of each target: what remains if the outputs are known, and what their knowledge would take away.

        Here the expected entropy and the mutual information of target and outputs, in nats, whose sum is the entropy of the
        mean prediction; where targets are numbers, variances.

        Parameters
        ----------
        outputs : Outputs
            The Gaussian over outputs (B, C).
        samples : iterable of Tensor (s, B, C)
            Samples of it, some at a time; not drawn unless they are asked for.
        noise_variance : float or Tensor
            :math:`\sigma^2`, or 0.

        Returns
        -------
        aleatoric, epistemic : Tensor (B, ...)
            None is negative; one number for each target.
        """
        n, known, mean = 0, outputs.mean.new_zeros(()), None
        for f in samples:
            # In logarithms, since the derivative of p log p does not exist where p is rounded to 0.
            log_p = self.log_probabilities(f.double())
            n, known, block = n + len(f), known + entropy_of(log_p).sum(0), log_p.logsumexp(0)
            mean = block if mean is None else torch.logaddexp(mean, block)
        assert mean is not None
        known = known / n
        return known, (entropy_of(mean - math.log(n)) - known).clamp_min(0)

    def log_normaliser(self, sigma_noise: Tensor) -> Tensor | float:
        """Return the log of what the density of one output is divided by, beside what depends on the loss."""
        return 0.0

    def certain(self, f: Tensor) -> Prediction:
        """Return the prediction of outputs (B, C) without variance."""
        return self.inverse_link(f) if self.has_probabilities else (f, torch.zeros_like(f))


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
        bad = (y < 0) | (y >= n_outputs)
        if bad.any():
            raise ValueError(
                f"Class indices must lie in 0..{n_outputs - 1}, the model's outputs; got {int(y[bad][0])}. "
                "Check the labels, or the width of the model's last layer; there is no ignore_index."
            )
        return y.long()

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(f.double(), y, reduction="sum")

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

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(f.double(), y, reduction="sum")

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
    """Outputs with Gaussian noise of standard deviation sigma."""

    name = host_name = "regression"
    has_probabilities = False
    has_noise = True
    tuned = ("sigma_noise",)

    def targets(self, y: Tensor, f: Tensor) -> Tensor:
        """Return targets (B, C) in the dtype of the outputs."""
        if y.shape != f.shape:
            hint = " Add the output axis with y.unsqueeze(-1)." if y.ndim == 1 else ""
            raise ValueError(
                f"Regression targets must have the shape of the outputs, {tuple(f.shape)}; "
                f"got {tuple(y.shape)}, which would broadcast.{hint}"
            )
        if not y.isfinite().all():
            raise ValueError("Regression targets must be finite; got NaN or infinity.")
        return y.to(f.dtype)

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Return half the sum of squared errors."""
        return 0.5 * (f.double() - y.double()).square().sum()

    def curvature_root(self, phi: Tensor, f: Tensor) -> Tensor:
        """Return the features: the curvature of the loss is the identity."""
        return phi.flatten(0, 1)

    def sampled_gradients(self, f: Tensor, u: Tensor) -> Tensor:
        """Return standard normal numbers: gradients are in units of the noise, as the loss is."""
        return torch.special.ndtri(u)

    def nll(self, prediction: Prediction, y: Tensor, noise_variance: Any) -> Tensor:
        r"""Score the marginals of the outputs, with :math:`\sigma^2` added to their variances."""
        mean, spread = prediction
        var = spread if spread.ndim == mean.ndim else spread.diagonal(dim1=-2, dim2=-1)
        var = var.double() + noise_variance
        squared = (y.double() - mean.double()).square()
        return 0.5 * (squared / var + (2 * math.pi * var).log()).sum(-1)

    def uncertainty(
        self, outputs: Outputs, samples: Iterable[Tensor], noise_variance: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the variances (B, C) of the noise and of each output; no samples are drawn."""
        variance = outputs.variance
        return noise_variance + torch.zeros_like(variance), variance

    def log_normaliser(self, sigma_noise: Tensor) -> Tensor:
        """Return log(sigma sqrt(2 pi))."""
        return torch.log(sigma_noise * math.sqrt(2 * math.pi))


LIKELIHOODS: dict[str, Likelihood] = {
    kind.name: kind() for kind in (Classification, Regression, RewardModeling, Bernoulli)
}


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


def entropy_of(log_p: Tensor) -> Tensor:
    """Return the entropies (...), in nats, of distributions with log probabilities (..., Y)."""
    return -(log_p.exp() * log_p).sum(-1)


def _log(p: Tensor) -> Tensor:
    return p.double().clamp_min(torch.finfo(torch.float64).tiny).log()


def warn_of_two_readings(y: Tensor, shape: torch.Size, name: str) -> None:
    """Warn of class indices that fit outputs (B, ..., C), as here, and (B, C, ...), as in ``nn.CrossEntropyLoss``, too.

    Parameters
    ----------
    y : Tensor (B, ...)
        The targets of the batch.
    shape : torch.Size
        The shape of the outputs.
    name : str
        The name of the batch, for messages.
    """
    if len(shape) > 2 and y.shape == shape[:-1] and y.shape[1:] == shape[2:]:
        warn_user(
            f"In {name}: targets of shape {tuple(y.shape)} fit two readings of outputs of shape {tuple(shape)}. Their last axis "
            "is taken for the classes, and those between for positions. If the classes come second, as nn.CrossEntropyLoss has "
            "them, let the model return outputs.movedim(1, -1)."
        )


def checked_targets(
    likelihood: Likelihood, y: Tensor, f: Tensor, positions: tuple[int, ...], name: str
) -> Tensor:
    """Return the targets of one batch in the likelihood's shape, on the device of f (B L, C).

    Parameters
    ----------
    y : Tensor (B, ...)
        Its axes after the first that equal ``positions`` are flattened into the batch.
    positions : tuple of int
        The axes between batch and C that the outputs had.
    name : str
        The name of the batch, for messages.

    Raises
    ------
    ValueError
        If targets do not fit or outputs are not finite; the message names the batch.
    """
    n = len(positions)
    if n and tuple(y.shape[1 : 1 + n]) != tuple(positions):
        raise ValueError(
            f"In {name}: the outputs have positions {tuple(positions)} for each input, and targets must have them "
            f"too, after the batch axis; got targets of shape {tuple(y.shape)}. The last axis of the outputs must be "
            "the classes: a model that returns (batch, classes, ...) needs .movedim(1, -1)."
        )
    try:
        y = likelihood.targets(y.flatten(0, n).to(f.device), f)
    except ValueError as error:
        raise ValueError(f"In {name}: {error}") from None
    if not f.isfinite().all():
        raise ValueError(
            f"The model's outputs for {name} hold NaN or infinite values; they must be finite. "
            "Check the weights and the inputs of that batch."
        )
    return y
