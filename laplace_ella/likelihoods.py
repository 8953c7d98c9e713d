r"""What a likelihood has to say: which targets it takes, its loss, and its curvature in f.

The curvature enters as a root: :math:`\Phi^T \Lambda \Phi = W^T W` with W returned by
``curvature_root``, so that no C x C matrix is formed and the result is positive
semi-definite by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


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
    """

    targets: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    curvature_root: Callable[[Tensor, Tensor], Tensor]


def _softmax_root(phi: Tensor, f: Tensor) -> Tensor:
    # Lambda = diag(p) - p p^T, so the sum is over sqrt(p_c) (phi_c - mean_p phi).
    p = f.softmax(-1)
    centred = phi - torch.einsum("bc,bck->bk", p, phi)[:, None]
    return (p.sqrt()[..., None] * centred).flatten(0, 1)


def _softmax_targets(y: Tensor, f: Tensor) -> Tensor:
    n_outputs = f.shape[-1]
    if n_outputs < 2:
        raise ValueError(
            "Classification needs at least two outputs (the softmax of one is constant); "
            f"got outputs of shape {tuple(f.shape)}. Give the model one output per class."
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
            "Check the labels, or the width of the model's last layer."
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


CATEGORICAL = Likelihood(
    targets=_softmax_targets,
    loss=lambda f, y: F.cross_entropy(f.double(), y, reduction="sum"),
    curvature_root=_softmax_root,
)
GAUSSIAN = Likelihood(
    targets=_gaussian_targets,
    loss=lambda f, y: 0.5 * (f.double() - y.double()).square().sum(),
    curvature_root=lambda phi, f: phi.flatten(0, 1),
)
# As laplace-torch does, reward models are fitted as classifiers of pairs.
LIKELIHOODS = {
    "classification": CATEGORICAL,
    "regression": GAUSSIAN,
    "reward_modeling": CATEGORICAL,
}


def checked_targets(likelihood: Likelihood, y: Tensor, f: Tensor, name: str) -> Tensor:
    """Return the targets of one batch in the likelihood's shape, on the device of f (B, C).

    Raises
    ------
    ValueError
        If targets do not fit or outputs are not finite; the message names the batch.
    """
    try:
        y = likelihood.targets(y.to(f.device), f)
    except ValueError as error:
        raise ValueError(f"In {name}: {error}") from None
    if not f.isfinite().all():
        raise ValueError(
            f"The model's outputs for {name} hold NaN or infinite values; they must be finite. "
            "Check the weights and the inputs of that batch."
        )
    return y
