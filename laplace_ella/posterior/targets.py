"""The targets of a batch, checked against the outputs of the model, and the weights of its predictions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..data.notices import warn_user
from ..network.outputs import Axes, channels_last
from .likelihoods import Likelihood


def channel_axis_of(likelihood: Likelihood, y: Tensor, f: Tensor, name: str) -> int | None:
    """Find out from targets whether outputs are (B, C, ...), as ``nn.CrossEntropyLoss`` takes them: 1, else None.

    Both readings may fit: numbers (B, C, ...) for outputs of that shape, whose loss is the same in both, and class indices of as many
    positions as there are classes, whose loss is not.

    Parameters
    ----------
    y : Tensor (B, ...)
        The targets of a batch.
    f : Tensor (B, ...)
        Its outputs as the network has them.
    name : str
        The name of the batch, for messages.

    Warns
    -----
    UserWarning
        If both fit, and their losses differ; the last axis is taken for the channels then.
    """
    if f.ndim < 3:
        return None
    last, second = (_loss_along(axis, likelihood, y, f, name) for axis in (None, 1))
    if last is None and second is not None:
        return 1
    if last is not None and second is not None and not math.isclose(last, second, rel_tol=1e-6):
        warn_user(
            f"In {name}: targets of shape {tuple(y.shape)} fit two readings of outputs of shape {tuple(f.shape)}. Their last axis "
            f"is taken for the classes, and those between for positions: the loss is {last / len(y):.4g} per input. If the classes "
            f"come second, as nn.CrossEntropyLoss has them, it is {second / len(y):.4g}. Pass channel_axis=-1 or channel_axis=1 to "
            "the estimator, to say which it is."
        )
    return None


def _loss_along(
    channel_axis: int | None, likelihood: Likelihood, y: Tensor, f: Tensor, name: str
) -> float | None:
    """Return the loss of a batch, read with its channels on an axis; None if the targets do not fit."""
    f = channels_last(f, channel_axis)
    axes, rows = Axes(tuple(f.shape[1:-1]), channel_axis), f.flatten(0, -2)
    try:
        return float(likelihood.loss(rows, checked_targets(likelihood, y, rows, axes, name)))
    except ValueError:
        return None


def checked_targets(likelihood: Likelihood, y: Tensor, f: Tensor, axes: Axes, name: str) -> Tensor:
    """Return the targets of one batch in the likelihood's shape, on the device of f (B L, C).

    Parameters
    ----------
    y : Tensor (B, ...)
        Its axes after the first that equal the positions are flattened into the batch.
    axes : Axes
        Those that the outputs had.
    name : str
        The name of the batch, for messages.

    Raises
    ------
    ValueError
        If targets do not fit or outputs are not finite; the message names the batch.
    """
    positions, n, found = axes.positions, len(axes.positions), tuple(y.shape)
    y = axes.targets(y)
    if n and tuple(y.shape[1 : 1 + n]) != positions:
        where = "axis 1" if axes.channel_axis == 1 else "the last axis"
        raise ValueError(
            f"In {name}: the outputs have {f.shape[-1]} channels in {where}, and positions {positions} for each input. Targets must "
            f"have these positions too, after the batch axis; got targets of shape {found}. channel_axis=1 reads outputs (batch, "
            "classes, ...), as nn.CrossEntropyLoss does, and channel_axis=-1 outputs (batch, ..., classes); without it, the targets of "
            "the first batch of a fit say which it is."
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


def prediction_weights(likelihood: Likelihood, y: Tensor, weights: Tensor | None) -> Tensor | None:
    """Return the weights of the predictions of a batch, float64: 0 where its target is ignored; None if all are 1.

    Parameters
    ----------
    y : Tensor (B, ...)
        Targets as they come from the loader.
    weights : Tensor (B,) or (B, ...), optional
        Those of the user, for each input, or for each of its positions.

    Returns
    -------
    Tensor (B, L) or (B, 1), or None
    """
    ignored = likelihood.ignored(y)
    of_user = None if weights is None else weights.detach().double().reshape(len(y), -1).cpu()
    if ignored is None:
        return of_user
    counted = (~ignored).double().reshape(len(y), -1).cpu()
    return counted if of_user is None else counted * of_user


def sum_of_weights(weights: Tensor | None, n: int) -> float:
    """Return the sum of the weights (B, L) or (B, 1) of n predictions."""
    return n if weights is None else float(weights.sum()) * n / weights.numel()


def check_weights(weights: Tensor | None, shape: torch.Size, name: str) -> None:
    """Require weights for each input of a batch, or for each of its positions.

    Parameters
    ----------
    weights : Tensor, optional
    shape : torch.Size
        (B, ...), of the outputs without C.
    name : str
        The name of the batch, for messages.
    """
    if weights is not None and weights.shape not in (shape[:1], shape):
        allowed = " or ".join(dict.fromkeys([str(tuple(shape[:1])), str(tuple(shape))]))
        raise ValueError(
            f"In {name}: weights must be one for each input, or one for each prediction, of shape {allowed}; got "
            f"{tuple(weights.shape)}."
        )


def check_unweighted(weights: Tensor | None, name: str) -> None:
    """Require a batch without weights, where predictions are scored."""
    if weights is not None:
        raise ValueError(
            f"In {name}: weights are for data that are fitted, and scores are plain means. Pass pairs (inputs, targets)."
        )


def weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    """Multiply values (B L, ...) of predictions by the roots of their weights (B, L) or (B, 1)."""
    if weights is None:
        return values
    roots = weights.to(values).sqrt().expand(-1, len(values) // len(weights))
    return values * roots.reshape(-1, *[1] * (values.ndim - 1))


def loss(likelihood: Likelihood, f: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
    """Return the sum of the losses of a batch, each times the weight that the user gave it, float64."""
    if weights is None:
        return likelihood.loss(f, y)
    each = likelihood.losses(f, y).reshape(len(weights), -1)
    return (each * weights.to(each).reshape(len(weights), -1)).sum()


def scored_rows(likelihood: Likelihood, y: Tensor) -> Tensor | None:
    """Return which of the predictions (B L,) have targets; None if all have."""
    ignored = likelihood.ignored(y)
    return None if ignored is None else ~ignored.flatten()
