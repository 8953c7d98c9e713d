r"""Scoring predictions on validation data that the model has seen once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
import torchmetrics
from torch import Tensor

from .basis import Progress
from .batches import Input, named_batches
from .likelihoods import Likelihood, checked_targets

Prediction: TypeAlias = Tensor | tuple[Tensor, Tensor]
Loss: TypeAlias = torchmetrics.Metric | Callable[..., Any]


def nll(prediction: Prediction, y: Tensor, noise_variance: Tensor) -> Tensor:
    r"""Return the negative log predictive density of a batch, summed, float64.

    Parameters
    ----------
    prediction : Tensor (B, C), or pair of Tensor
        Class probabilities; or mean (B, C) and covariance (B, C, C) or variance (B, C)
        of the outputs, without observation noise.
    y : Tensor
        Class indices (B,) or probabilities (B, C); or targets (B, C).
    noise_variance : Tensor ()
        :math:`\sigma^2`, added to the variance of each output (regression).
    """
    if isinstance(prediction, Tensor):
        log_p = prediction.double().clamp_min(torch.finfo(torch.float64).tiny).log()
        picked = log_p.gather(1, y[:, None]) if y.ndim == 1 else log_p * y
        return -picked.sum()
    mean, spread = prediction
    var = spread if spread.ndim == mean.ndim else spread.diagonal(dim1=-2, dim2=-1)
    var = var.double() + noise_variance.double()
    squared = (y.double() - mean.double()).square()
    return 0.5 * (squared / var + (2 * math.pi * var).log()).sum()


class ValidationData:
    """Validation batches, reduced to what predictions need: the model runs once.

    Parameters
    ----------
    loader : iterable
        Batches of inputs and targets.
    prepare : callable
        Input -> (what to keep of it, outputs (B, C)). Tuples of tensors are joined.
    likelihood : Likelihood
    dict_key_x, dict_key_y : str
    progress : callable

    Raises
    ------
    ValueError
        If the loader is empty, or a batch malformed.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        prepare: Callable[[Input], tuple[Any, Tensor]],
        likelihood: Likelihood,
        dict_key_x: str,
        dict_key_y: str,
        progress: Progress,
    ) -> None:
        self.kept: list[Any] = []
        self.targets: list[Tensor] = []
        for name, x, y in progress(named_batches(loader, dict_key_x, dict_key_y), "Validation data"):
            kept, f = prepare(x)
            self.kept.append(kept)
            self.targets.append(checked_targets(likelihood, y, f, f"validation {name}"))
        if not self.kept:
            raise ValueError("The validation loader yielded no data; at least one input is needed.")
        if isinstance(self.kept[0], tuple):  # features: one batch of all, as candidates are many
            self.kept = [tuple(torch.cat(column) for column in zip(*self.kept))]
            self.targets = [torch.cat(self.targets)]

    def score(self, predict: Callable[[Any], Prediction], loss: Loss | None, noise_variance: Tensor) -> float:
        r"""Score predictions as laplace-torch does, except that the default is NLL for regression too.

        Parameters
        ----------
        predict : callable
            What was kept of a batch -> its prediction.
        loss : torchmetrics.Metric or callable, optional
            A metric is reset, updated batch by batch with (prediction, targets), or
            (mean, covariance, targets) if it takes three, and computed. A callable gets
            all predictions and targets joined: (probabilities, targets) or (means,
            covariances, targets). Default: mean NLL an input.
        noise_variance : Tensor ()
            :math:`\sigma^2`, for the default loss.
        """
        predictions = [predict(kept) for kept in self.kept]
        if loss is None:
            total = sum(nll(p, y, noise_variance) for p, y in zip(predictions, self.targets))
            return float(total / sum(len(y) for y in self.targets))
        if isinstance(loss, torchmetrics.Metric):
            return _metric_score(predictions, self.targets, loss)
        columns = zip(*(p if isinstance(p, tuple) else (p,) for p in predictions))
        parts = [torch.cat(column) for column in columns]
        return float(loss(*parts, torch.cat(self.targets)))


def _metric_score(
    predictions: Sequence[Prediction], targets: Sequence[Tensor], metric: torchmetrics.Metric
) -> float:
    metric.reset()
    for prediction, y in zip(predictions, targets):
        parts = (prediction,) if isinstance(prediction, Tensor) else prediction
        try:
            metric.update(*parts, y)
        except TypeError:  # a metric of two arguments, as in laplace-torch
            metric.update(parts[0], y)
    return float(metric.compute().sum())
