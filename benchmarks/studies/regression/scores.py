"""Scores of Gaussian predictions: NLL, CRPS, calibration of quantiles, coverage of intervals."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.common.scores import auroc

COVERAGES = (0.5, 0.9, 0.95)
# The quantiles of the calibration error.
LEVELS = torch.arange(1, 100, dtype=torch.float64) / 100


def nll(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Return the negative log density of each target (N,)."""
    return 0.5 * ((y - mean).square() / variance + (2 * math.pi * variance).log())


def crps(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Return the continuous ranked probability score of each target (N,), in its unit; Gneiting et al. (2005), eq. 5."""
    scale = variance.sqrt()
    z = (y - mean) / scale
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    return scale * (z * (2 * _below(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))


def calibration_error(mean: Tensor, variance: Tensor, y: Tensor) -> float:
    """Return by how much the share of targets below a predicted quantile differs from its level, meaned over 99 levels.

    The distance from the diagonal in the plot of Kuleshov et al. (2018).
    """
    u = _below((y - mean) / variance.sqrt())
    shares = (u[:, None] <= LEVELS).double().mean(0)
    return float((shares - LEVELS).abs().mean())


def coverage(mean: Tensor, variance: Tensor, y: Tensor, level: float) -> float:
    """Return the share of targets inside the central interval."""
    u = _below((y - mean) / variance.sqrt())
    return float(((u - 0.5).abs() <= level / 2).double().mean())


def _below(z: Tensor) -> Tensor:
    return torch.special.ndtr(z)


def of_gaussians(
    means: dict[str, Tensor], variances: dict[str, Tensor], targets: dict[str, Tensor], scale: float
) -> dict[str, Any]:
    """Return the scores of one method; ``scale`` is the unit of the targets, which CRPS and the second NLL are in."""
    test = means["test"], variances["test"], targets["test"]
    others = [name for name in variances if name not in ("validation", "test")]
    standardised = float(nll(*test).mean())
    return {
        "nll": standardised,
        "nll_of_original_unit": standardised + math.log(scale),
        "crps": scale * float(crps(*test).mean()),
        "calibration_error": calibration_error(*test),
        "coverage": {f"{level:g}": coverage(*test, level) for level in COVERAGES},
        "auroc": {name: auroc(variances["test"], variances[name]) for name in others},
        "shifted": {
            name: {
                "nll": float(nll(means[name], variances[name], y).mean()),
                "coverage_of_0.9": coverage(means[name], variances[name], y, 0.9),
            }
            for name, y in targets.items()
            if name in others
        },
    }


def largest_errors(errors: Tensor, score: Tensor) -> float:
    """Return how well a score tells the tenth of the inputs with the largest errors from the others (AUROC)."""
    large = errors.abs() > errors.abs().quantile(0.9)
    return auroc(score[~large], score[large])


def difference(mean: Tensor, variance: Tensor, reference: Tensor, y: Tensor) -> dict[str, float]:
    """Return how much larger the NLL is than with the reference's variance, with the paired standard error."""
    gaps = nll(mean, variance, y) - nll(mean, reference, y)
    return {"mean": float(gaps.mean()), "standard_error": float(gaps.std()) / math.sqrt(len(y))}
