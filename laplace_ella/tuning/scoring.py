r"""Scoring predictions on validation data that the model has seen once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torchmetrics
from torch import Tensor

from ..parallel.ranks import Ranks
from ..posterior.checks import NonFiniteSamplesError
from ..posterior.gaussian import Linearised, NotPositiveDefiniteError
from ..posterior.likelihoods import Likelihood, Prediction
from .store import Store

# Cross-validation cuts the validation data into so many parts.
N_FOLDS = 5
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
    positions : LongTensor (B,)
        The positions of the inputs in the data of all ranks; the same for all outputs of a sequence.
    """

    linearised: Linearised
    targets: Tensor
    positions: Tensor

    @property
    def folds(self) -> Tensor:
        """The folds (B,) of cross-validation, which are a function of positions."""
        return self.positions % N_FOLDS

    def of(self, rows: Tensor) -> Block:
        """Return some of its predictions, which a mask (B,) names."""
        return Block(self.linearised.of(rows), self.targets[rows], self.positions[rows])


class ValidationData:
    """Validation data reduced to what predictions need, on one rank: the model runs once.

    Parameters
    ----------
    likelihood : Likelihood
    store : Store
    """

    def __init__(self, likelihood: Likelihood, store: Store) -> None:
        self.likelihood, self.store, self.n_inputs = likelihood, store, 0
        self.overlap: Tensor | None = None  # the overlap of tangents is the same for all blocks
        self.lacks_last_layer = False

    def append(self, block: Block) -> None:
        """Add what is known of some inputs, of which those count that have targets."""
        self.n_inputs += len(block.positions.unique())
        seen = block.linearised
        self.lacks_last_layer |= seen.norms is None
        # They may share their memory with buffers that the loader fills again, so that copies are kept.
        f, targets = seen.f.clone(), block.targets.clone()
        self.overlap = seen.overlap
        self.store.append(f, seen.phi, seen.pushed, seen.kernel, targets, seen.norms, block.positions)

    def __iter__(self) -> Iterator[Block]:
        """Yield the data block by block."""
        for f, phi, pushed, kernel, targets, norms, positions in self.store:
            assert f is not None
            assert phi is not None
            assert targets is not None
            assert positions is not None
            yield Block(Linearised(f, phi, pushed, kernel, self.overlap, norms), targets, positions)


def score(
    pairs_of: Callable[[], Iterable[tuple[Prediction, Tensor]]],
    likelihood: Likelihood,
    loss: Loss | None,
    noise_variance: Any,
    ranks: Ranks,
    device: torch.device,
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
        covariances, targets). Default: the mean NLL of an input.
    noise_variance : float or Tensor ()
        :math:`\sigma^2`, for the default loss.
    ranks : Ranks
        The ranks whose predictions are scored together. They exchange two numbers; a loss of the user's,
        which need not be a mean, is evaluated by the first of them on all predictions.
    device : torch.device
        The device on which the first rank passes them to the user's loss.
    """
    if loss is None:
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        with ranks.together("the score of a setting", SKIPPED):
            for prediction, y in pairs_of():
                values = likelihood.nll(prediction, y, noise_variance).detach()
                sums += torch.tensor([float(values.sum()), len(values)], dtype=torch.float64, device="cpu")
        total, n = ranks.total(sums).tolist()
        return total / n
    evaluate = _metric_score if isinstance(loss, torchmetrics.Metric) else _joined_score
    if ranks.size == 1:
        return evaluate(loss, pairs_of())
    with ranks.together("the predictions of a setting", SKIPPED):
        mine = list(pairs_of())

    def evaluate_all(everyone: list[Any]) -> float:
        pairs = (pair for theirs in everyone for pair in theirs)
        return evaluate(loss, (_on_device(prediction, y, device) for prediction, y in pairs))

    # One rank computes it for all, as a loss may be random, or round in another way elsewhere.
    return ranks.on_first(mine, evaluate_all, "the loss of a setting", SKIPPED)


def _on_device(prediction: Prediction, y: Tensor, device: Any) -> tuple[Prediction, Tensor]:
    if isinstance(prediction, Tensor):
        return prediction.to(device), y.to(device)
    mean, variance = prediction
    return (mean.to(device), variance.to(device)), y.to(device)


def _joined_score(loss: Any, pairs: Iterable[tuple[Prediction, Tensor]]) -> float:
    predictions, targets = zip(*pairs)
    columns = zip(*(p if isinstance(p, tuple) else (p,) for p in predictions))
    found = loss(*(torch.cat(column) for column in columns), torch.cat(targets))
    if isinstance(found, Tensor) and found.numel() != 1:
        raise ValueError(
            f"loss must return one number for all predictions together; got a tensor of shape {tuple(found.shape)}. Take the mean."
        )
    return float(found)


def _metric_score(loss: Any, pairs: Iterable[tuple[Prediction, Tensor]]) -> float:
    loss.reset()
    with _alone(loss):
        for prediction, y in pairs:
            parts = (prediction,) if isinstance(prediction, Tensor) else prediction
            try:
                loss.update(*parts, y)
            except TypeError:  # the metric takes two arguments, as in laplace-torch
                loss.update(parts[0], y)
        return float(loss.compute().sum())


@contextmanager
def _alone(metric: torchmetrics.Metric) -> Iterator[None]:
    """Keep a metric, and those it is made of, from adding up what the ranks of the default group have."""
    parts = [m for m in metric.modules() if isinstance(m, torchmetrics.Metric)]
    before = [m.distributed_available_fn for m in parts]
    for m in parts:
        m.distributed_available_fn = lambda: False
    try:
        yield
    finally:
        for m, available in zip(parts, before):
            m.distributed_available_fn = available
