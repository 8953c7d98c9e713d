"""The targets of a batch, checked against the outputs of the model."""

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
