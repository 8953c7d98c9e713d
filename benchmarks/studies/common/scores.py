"""Scores of class probabilities on test data, and of novelty scores out of distribution."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

N_BINS = 15


def nll(p: Tensor, y: Tensor) -> Tensor:
    """Return the negative log likelihood of each input (N,)."""
    return -p.double().gather(1, y[:, None]).squeeze(1).clamp_min(torch.finfo(torch.float64).tiny).log()


def brier(p: Tensor, y: Tensor) -> float:
    """Return the mean squared distance of the probabilities from the label's corner of the simplex."""
    return float((p - torch.nn.functional.one_hot(y, p.shape[1])).square().sum(1).mean())


def calibration_error(p: Tensor, y: Tensor) -> float:
    """Return the mean gap of confidence and accuracy over 15 bins of confidence, weighted by their counts."""
    confidence, predicted = p.double().max(1)
    gap = confidence - (predicted == y).double()
    bins = (confidence * N_BINS).long().clamp(max=N_BINS - 1)
    sums = torch.zeros(N_BINS, dtype=gap.dtype, device=gap.device).index_add(0, bins, gap)
    return float(sums.abs().sum() / len(y))


def entropy(p: Tensor) -> Tensor:
    """Return the predictive entropy of each input (N,)."""
    return torch.special.entr(p.double()).sum(1)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Return the probability that a score outside is larger than one inside, ties counted as half."""
    scores = torch.cat([inside, outside]).double().cpu().numpy()
    return float(roc_auc_score([0] * len(inside) + [1] * len(outside), scores))


def of_probabilities(test: Tensor, y: Tensor, ood: dict[str, Tensor]) -> dict[str, Any]:
    """Return the scores of one method."""
    inside = entropy(test)
    return {
        "nll": float(nll(test, y).mean()),
        "ece": calibration_error(test, y),
        "accuracy": float((test.argmax(1) == y).double().mean()),
        "brier": brier(test, y),
        "auroc": {name: auroc(inside, entropy(p)) for name, p in ood.items()},
    }


def of_novelty(test: Tensor, wrong: Tensor, ood: dict[str, Tensor]) -> dict[str, Any]:
    """Return how well a score tells other data from test data, and the network's errors from its hits."""
    return {
        "auroc": {name: auroc(test, score) for name, score in ood.items()},
        "errors": auroc(test[~wrong], test[wrong]),
    }


def difference(p: Tensor, reference: Tensor, y: Tensor) -> dict[str, float]:
    """Return how much larger the NLL is than another method's, with the paired standard error."""
    gaps = nll(p, y) - nll(reference, y)
    return {"mean": float(gaps.mean()), "standard_error": float(gaps.std()) / math.sqrt(len(y))}


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """Return the mean over seeds with its standard error, None for a single seed."""
    if len(values) == 1:
        return values[0], None
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
