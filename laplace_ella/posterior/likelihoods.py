r"""What a likelihood has to say: its targets, loss, curvature in f, and predictive density.

The curvature enters as a root: :math:`\Phi^T \Lambda \Phi = W^T W` with W returned by
``curvature_root``, so that no C x C matrix is formed and the result is positive
semi-definite by construction.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

# Class probabilities (B, C); or mean (B, C) and covariance (B, C, C) or variance (B, C).
Prediction: TypeAlias = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Likelihood:
    r"""One observation model.

    Attributes
    ----------
    targets : callable
        (y, f) -> y in the shape the loss wants; raises ValueError on targets that
        do not fit the outputs f (B, C).
    loss : callable
        (f, y) -> negative log likelihood summed over the batch, up to constants and
        the noise: cross-entropy, or half the squared error. float64.
    curvature_root : callable
        (phi, f) -> W (R, K) with :math:`W^T W = \sum_b \Phi_b^T \Lambda_b \Phi_b`.
    sampled_gradients : callable
        (f, u) -> gradients (B, n, C) of the loss in f at n targets drawn from the likelihood
        itself, by numbers u (B, n, C) uniform in (0, 1); the mean of their outer products is :math:`\Lambda`.
    nll : callable
        (prediction, y, sigma^2) -> negative log predictive density (B,), float64.
    inverse_link : callable or None
        f -> probabilities (B, C); None where outputs are predicted themselves.
    """

    targets: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    curvature_root: Callable[[Tensor, Tensor], Tensor]
    sampled_gradients: Callable[[Tensor, Tensor], Tensor]
    nll: Callable[[Prediction, Tensor, Tensor], Tensor]
    inverse_link: Callable[[Tensor], Tensor] | None

    def certain(self, f: Tensor) -> Prediction:
        """Return the prediction of outputs (B, C) without variance."""
        return (f, torch.zeros_like(f)) if self.inverse_link is None else self.inverse_link(f)


# ---------------------------------------------------------------------- categorical


def softmax(f: Tensor) -> Tensor:
    """Return class probabilities (..., C)."""
    return f.softmax(-1)


def _softmax_root(phi: Tensor, f: Tensor) -> Tensor:
    # Lambda = diag(p) - p p^T, so the sum is over sqrt(p_c) (phi_c - mean_p phi).
    p = f.softmax(-1)
    centred = phi - torch.einsum("bc,bck->bk", p, phi)[:, None]
    return (p.sqrt()[..., None] * centred).flatten(0, 1)


def _softmax_gradients(f: Tensor, u: Tensor) -> Tensor:
    p = f.softmax(-1)
    # The last entry of the sum may be rounded below a draw.
    labels = torch.searchsorted(p.cumsum(-1), u[..., 0].contiguous()).clamp(max=f.shape[-1] - 1)
    return p[:, None] - F.one_hot(labels, f.shape[-1])


def _softmax_targets(y: Tensor, f: Tensor) -> Tensor:
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


def _categorical_nll(prediction: Prediction, y: Tensor, noise_variance: Tensor) -> Tensor:
    assert isinstance(prediction, Tensor)
    log_p = _log(prediction)
    return -(log_p.gather(1, y[:, None])[:, 0] if y.ndim == 1 else (log_p * y).sum(-1))


# ---------------------------------------------------------------------- Bernoulli


def _sigmoid_root(phi: Tensor, f: Tensor) -> Tensor:
    p = f.sigmoid()
    return ((p * (1 - p)).sqrt()[..., None] * phi).flatten(0, 1)


def _sigmoid_gradients(f: Tensor, u: Tensor) -> Tensor:
    p = f.sigmoid()[:, None]
    return p - (u < p).to(f)


def _binary_targets(y: Tensor, f: Tensor) -> Tensor:
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


def _bernoulli_nll(prediction: Prediction, y: Tensor, noise_variance: Tensor) -> Tensor:
    assert isinstance(prediction, Tensor)
    return -(y * _log(prediction) + (1 - y) * _log(1 - prediction.double())).sum(-1)


# ---------------------------------------------------------------------- Gaussian


def _gaussian_gradients(f: Tensor, u: Tensor) -> Tensor:
    return torch.special.ndtri(u)  # in units of the noise, as the loss


def _gaussian_targets(y: Tensor, f: Tensor) -> Tensor:
    if y.shape != f.shape:
        hint = " Add the output axis with y.unsqueeze(-1)." if y.ndim == 1 else ""
        raise ValueError(
            f"Regression targets must have the shape of the outputs, {tuple(f.shape)}; "
            f"got {tuple(y.shape)}, which would broadcast.{hint}"
        )
    if not y.isfinite().all():
        raise ValueError("Regression targets must be finite; got NaN or infinity.")
    return y.to(f.dtype)


def _gaussian_nll(prediction: Prediction, y: Tensor, noise_variance: Tensor) -> Tensor:
    r"""Score the marginals of the outputs, with :math:`\sigma^2` added to their variances."""
    mean, spread = prediction
    var = spread if spread.ndim == mean.ndim else spread.diagonal(dim1=-2, dim2=-1)
    var = var.double() + noise_variance
    squared = (y.double() - mean.double()).square()
    return 0.5 * (squared / var + (2 * math.pi * var).log()).sum(-1)


CATEGORICAL = Likelihood(
    targets=_softmax_targets,
    loss=lambda f, y: F.cross_entropy(f.double(), y, reduction="sum"),
    curvature_root=_softmax_root,
    sampled_gradients=_softmax_gradients,
    nll=_categorical_nll,
    inverse_link=softmax,
)
BERNOULLI = Likelihood(
    targets=_binary_targets,
    loss=lambda f, y: F.binary_cross_entropy_with_logits(f.double(), y, reduction="sum"),
    curvature_root=_sigmoid_root,
    sampled_gradients=_sigmoid_gradients,
    nll=_bernoulli_nll,
    inverse_link=torch.sigmoid,
)
GAUSSIAN = Likelihood(
    targets=_gaussian_targets,
    loss=lambda f, y: 0.5 * (f.double() - y.double()).square().sum(),
    curvature_root=lambda phi, f: phi.flatten(0, 1),
    sampled_gradients=_gaussian_gradients,
    nll=_gaussian_nll,
    inverse_link=None,
)
# As laplace-torch does, reward models are fitted as classifiers of pairs.
LIKELIHOODS = {
    "classification": CATEGORICAL,
    "regression": GAUSSIAN,
    "reward_modeling": CATEGORICAL,
    "bernoulli": BERNOULLI,
}


def warn_of_two_readings(y: Tensor, shape: torch.Size, name: str) -> None:
    """Say so where class indices fit outputs (B, ..., C), as here, and (B, C, ...), as in ``nn.CrossEntropyLoss``.

    Parameters
    ----------
    y : Tensor (B, ...)
    shape : torch.Size
        Of the outputs.
    name : str
        Of the batch, for messages.
    """
    if len(shape) > 2 and y.shape == shape[:-1] and y.shape[1:] == shape[2:]:
        warnings.warn(
            f"In {name}: targets of shape {tuple(y.shape)} fit two readings of outputs of shape {tuple(shape)}. Their last axis "
            "is taken for the classes, and those between for positions. If the classes come second, as nn.CrossEntropyLoss has "
            "them, let the model return outputs.movedim(1, -1).",
            stacklevel=2,
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
        Of the batch, for messages.

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
