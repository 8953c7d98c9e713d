r"""Scoring predictions on validation data that the model has seen once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torchmetrics
from torch import Tensor

from .basis import Progress
from .batches import Input, named_batches
from .likelihoods import Likelihood, Prediction, checked_targets
from .posterior import Linearised
from .store import Store

Loss: TypeAlias = torchmetrics.Metric | Callable[..., Any]


@dataclass(frozen=True)
class Block:
    """Some of the validation data: all that any candidate's prediction needs.

    Attributes
    ----------
    linearised : Linearised
    targets : Tensor
        Class indices (B,) or probabilities (B, C); or targets (B, C).
    last_layer : Tensor (B,), optional
        Squared norms of what the last layer takes.
    """

    linearised: Linearised
    targets: Tensor
    last_layer: Tensor | None


class ValidationData:
    """Validation data reduced to what predictions need: the model runs once.

    Parameters
    ----------
    loader : iterable
        Batches of inputs and targets.
    linearise : callable
        Input -> parts of it, in order: (positions of its outputs, Linearised, squared norms of what the
        last layer takes or None).
    likelihood : Likelihood
    dict_key_x, dict_key_y : str
    progress : callable
    store : Store

    Raises
    ------
    ValueError
        If the loader is empty, or a batch malformed.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        linearise: Callable[[Input], Iterable[tuple[tuple[int, ...], Linearised, Tensor | None]]],
        likelihood: Likelihood,
        dict_key_x: str,
        dict_key_y: str,
        progress: Progress,
        store: Store,
    ) -> None:
        self.likelihood, self.store, self.n_inputs = likelihood, store, 0
        for name, x, y in progress(named_batches(loader, dict_key_x, dict_key_y), "Validation data"):
            start, n_rows = 0, len(y)
            self.n_inputs += n_rows
            for positions, seen, norms in linearise(x):
                size = len(seen.f) // math.prod(positions)
                part = y[start : start + size]
                start += size
                targets = checked_targets(likelihood, part, seen.f, positions, f"validation {name}")
                store.append(seen.f, seen.phi, seen.pushed, seen.gram, targets, norms)
        if not self.n_inputs:
            raise ValueError("The validation loader yielded no data; at least one input is needed.")

    def __iter__(self) -> Iterator[Block]:
        """Yield the data block by block."""
        for f, phi, pushed, gram, targets, norms in self.store:
            assert f is not None
            assert phi is not None
            assert targets is not None
            yield Block(Linearised(f, phi, pushed, gram), targets, norms)


def score(
    pairs: Iterable[tuple[Prediction, Tensor]],
    likelihood: Likelihood,
    loss: Loss | None,
    noise_variance: Any,
) -> float:
    r"""Score predictions as laplace-torch does, except that the default is NLL for regression too.

    Parameters
    ----------
    pairs : iterable of (prediction, targets)
    likelihood : Likelihood
    loss : torchmetrics.Metric or callable, optional
        A metric is reset, updated batch by batch with (prediction, targets), or
        (mean, covariance, targets) if it takes three, and computed. A callable gets
        all predictions and targets joined: (probabilities, targets) or (means,
        covariances, targets). Default: mean NLL an input.
    noise_variance : float or Tensor ()
        :math:`\sigma^2`, for the default loss.
    """
    if loss is None:
        values = [likelihood.nll(p, y, noise_variance) for p, y in pairs]
        return float(sum(v.sum() for v in values) / sum(len(v) for v in values))
    if isinstance(loss, torchmetrics.Metric):
        return _metric_score(pairs, loss)
    predictions, targets = zip(*pairs)
    columns = zip(*(p if isinstance(p, tuple) else (p,) for p in predictions))
    return float(loss(*(torch.cat(column) for column in columns), torch.cat(targets)))


def _metric_score(pairs: Iterable[tuple[Prediction, Tensor]], metric: torchmetrics.Metric) -> float:
    metric.reset()
    for prediction, y in pairs:
        parts = (prediction,) if isinstance(prediction, Tensor) else prediction
        try:
            metric.update(*parts, y)
        except TypeError:  # a metric of two arguments, as in laplace-torch
            metric.update(parts[0], y)
    return float(metric.compute().sum())
