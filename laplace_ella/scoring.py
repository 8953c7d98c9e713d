r"""Scoring predictions on validation data that the model has seen once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torchmetrics
from torch import Tensor

from .likelihoods import Likelihood, Prediction
from .posterior import Linearised, NotPositiveDefiniteError
from .ranks import ALONE, Ranks
from .store import Store
from .validation import NonFiniteSamplesError

Loss: TypeAlias = torchmetrics.Metric | Callable[..., Any]
# Errors of a setting, not of the data: it is skipped.
SKIPPED = (NotPositiveDefiniteError, NonFiniteSamplesError)


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
    """Validation data reduced to what predictions need, on one rank: the model runs once.

    Parameters
    ----------
    likelihood : Likelihood
    store : Store
    """

    def __init__(self, likelihood: Likelihood, store: Store) -> None:
        self.likelihood, self.store, self.n_inputs = likelihood, store, 0

    def append(self, n_inputs: int, block: Block) -> None:
        """Add what is known of so many inputs."""
        self.n_inputs += n_inputs
        seen = block.linearised
        self.store.append(seen.f, seen.phi, seen.pushed, seen.gram, block.targets, block.last_layer)

    def __iter__(self) -> Iterator[Block]:
        """Yield the data block by block."""
        for f, phi, pushed, gram, targets, norms in self.store:
            assert f is not None
            assert phi is not None
            assert targets is not None
            yield Block(Linearised(f, phi, pushed, gram), targets, norms)


def score(
    pairs_of: Callable[[], Iterable[tuple[Prediction, Tensor]]],
    likelihood: Likelihood,
    loss: Loss | None,
    noise_variance: Any,
    ranks: Ranks = ALONE,
) -> float:
    r"""Score predictions as laplace-torch does, except that the default is NLL for regression too.

    Parameters
    ----------
    pairs_of : callable
        Returns this rank's pairs of (prediction, targets).
    likelihood : Likelihood
    loss : torchmetrics.Metric or callable, optional
        A metric is reset, updated batch by batch with (prediction, targets), or
        (mean, covariance, targets) if it takes three, and computed. A callable gets
        all predictions and targets joined: (probabilities, targets) or (means,
        covariances, targets). Default: mean NLL an input.
    noise_variance : float or Tensor ()
        :math:`\sigma^2`, for the default loss.
    ranks : Ranks
        Whose predictions are scored together. They exchange two numbers; for a loss of the user's,
        which need not be a mean, all predictions.
    """
    if loss is None:
        sums = torch.zeros(2, dtype=torch.float64)
        with ranks.together("the score of a setting", SKIPPED):
            for prediction, y in pairs_of():
                values = likelihood.nll(prediction, y, noise_variance).detach()
                sums += torch.tensor([float(values.sum()), len(values)], dtype=torch.float64)
        total, n = ranks.total(sums).tolist()
        return total / n
    evaluate = _metric_score if isinstance(loss, torchmetrics.Metric) else _joined_score
    if ranks.size == 1:
        return evaluate(pairs_of(), loss)
    with ranks.together("the predictions of a setting", SKIPPED):
        mine = list(pairs_of())
    everyone = ranks.gathered(mine, "the predictions of a setting")
    with ranks.together("the loss of a setting", SKIPPED):
        return evaluate((pair for theirs in everyone for pair in theirs), loss)


def _joined_score(pairs: Iterable[tuple[Prediction, Tensor]], loss: Any) -> float:
    predictions, targets = zip(*pairs)
    columns = zip(*(p if isinstance(p, tuple) else (p,) for p in predictions))
    return float(loss(*(torch.cat(column) for column in columns), torch.cat(targets)))


def _metric_score(pairs: Iterable[tuple[Prediction, Tensor]], metric: Any) -> float:
    metric.reset()
    with _alone(metric):
        for prediction, y in pairs:
            parts = (prediction,) if isinstance(prediction, Tensor) else prediction
            try:
                metric.update(*parts, y)
            except TypeError:  # a metric of two arguments, as in laplace-torch
                metric.update(parts[0], y)
        return float(metric.compute().sum())


@contextmanager
def _alone(metric: torchmetrics.Metric) -> Iterator[None]:
    """Keep a metric from adding up what the ranks of the default group have: each has everything, or works alone."""
    before = metric.distributed_available_fn
    metric.distributed_available_fn = lambda: False
    try:
        yield
    finally:
        metric.distributed_available_fn = before
