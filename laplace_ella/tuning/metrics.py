r"""Metrics of predictions on data that they were not tuned on: NLL, Brier score, calibration errors, coverage."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_calibration_error

from ..posterior.likelihoods import Likelihood, Prediction

# Bins of a reliability diagram, and of both calibration errors.
N_BINS = 15
# The levels at which the coverage of intervals is reported, and those that a picture shows.
LEVELS = (0.5, 0.9, 0.95)
SHOWN_LEVELS = tuple(i / 20 for i in range(1, 20))


def of_rows(
    likelihood: Likelihood, prediction: Prediction, y: Tensor, noise_variance: float
) -> dict[str, Tensor]:
    r"""Return what metrics are made of, of each row, float64.

    Returns
    -------
    dict of Tensor
        "NLL" (B,); of probabilities "Brier" (B,), and "confidence" and "correct", (B,) of the class that is most probable
        or (B C,) of every label; of outputs with noise "squared error" (B,) and "level" (B C,), the level of the
        narrowest central interval that holds the target.
    """
    found = {"NLL": likelihood.nll(prediction, y, noise_variance)}
    if isinstance(prediction, Tensor):
        found |= _of_probabilities(likelihood, prediction.double(), y)
    elif likelihood.has_noise:
        mean, spread = prediction
        variance = spread if spread.ndim == mean.ndim else spread.diagonal(dim1=-2, dim2=-1)
        error = (y.double() - mean.double()).abs()
        found["squared error"] = error.square().mean(-1)
        noise = likelihood.noise(
            torch.tensor(noise_variance, dtype=torch.float64, device=error.device).sqrt()
        )
        found["level"] = torch.erf(error / (2 * (variance.double() + noise.square())).sqrt()).flatten()
    return found


def _of_probabilities(likelihood: Likelihood, p: Tensor, y: Tensor) -> dict[str, Tensor]:
    if not likelihood.has_classes:
        return {"Brier": (p - y).square().sum(-1), "confidence": p.flatten(), "correct": y.double().flatten()}
    targets = F.one_hot(y, p.shape[-1]).double() if y.ndim == 1 else y
    confidence, predicted = p.max(-1)
    correct = targets.gather(1, predicted[:, None])[:, 0]
    return {"Brier": (p - targets).square().sum(-1), "confidence": confidence, "correct": correct}


def metrics(rows: dict[str, Tensor]) -> dict[str, float]:
    """Return metrics by name, of what :func:`of_rows` returned of all data."""
    found: dict[str, float] = {k: float(v.mean()) for k, v in rows.items() if k in ("NLL", "Brier")}
    if "confidence" in rows:
        confidence, correct = rows["confidence"].clamp(0, 1), rows["correct"]
        error = binary_calibration_error(confidence, correct, n_bins=N_BINS, norm="l1", validate_args=False)
        found |= {"ECE": float(error), "adaptive ECE": adaptive_error(confidence, correct)}
    if "level" in rows:
        found["RMSE"] = math.sqrt(float(rows["squared error"].mean()))
        found |= {
            f"coverage {level:.0%}": float((rows["level"] <= level).double().mean()) for level in LEVELS
        }
    return found


def adaptive_error(confidence: Tensor, correct: Tensor) -> float:
    """Return the calibration error over bins of equally many rows (Nixon et al., CVPR Workshops 2019)."""
    in_order = (correct - confidence)[confidence.argsort(stable=True)]
    return float(sum(part.sum().abs() for part in in_order.tensor_split(N_BINS)) / len(in_order))


def reliability(rows: dict[str, Tensor]) -> tuple[tuple[float, float, float], ...]:
    """Return points (predicted, observed, share of the rows) of a reliability diagram.

    Of probabilities, the mean confidence of each bin that is not empty and how often it was right; of outputs with
    noise, the levels of intervals and how many targets they hold.
    """
    if "level" in rows:
        held = [float((rows["level"] <= level).double().mean()) for level in SHOWN_LEVELS]
        return tuple((level, share, 1.0) for level, share in zip(SHOWN_LEVELS, held))
    if "confidence" not in rows:
        return ()
    confidence, correct = rows["confidence"], rows["correct"]
    bins = (confidence * N_BINS).long().clamp(0, N_BINS - 1)
    parts: list[Any] = [bins == i for i in range(N_BINS)]
    return tuple(
        (float(confidence[b].mean()), float(correct[b].mean()), float(b.double().mean()))
        for b in parts
        if b.any()
    )
