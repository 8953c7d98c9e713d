"""The targets of a batch, checked against the outputs of the model, and the weights of its predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.notices import warn_user
from .likelihoods import Likelihood


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
