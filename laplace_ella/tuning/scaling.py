r"""Scales and biases of classes, tuned by gradients of the NLL with everything else, and a ridge that keeps them small.

Minimised is the mean NLL plus :math:`\lambda (\sum_c (v_c - m)^2 + \sum_c b_c^2) / n`, with
the logarithms v of the scales, m their mean, and n validation inputs (or positions). Scales have the geometric mean 1; what they have in common is the
logit scale's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ..posterior.setting import PER_CLASS, Setting
from .scorer import Predictor, Scorer
from .scoring import N_FOLDS, SKIPPED, Block

# From strong to weak; the search ends where a weaker one is worse on data held out.
WEIGHTS = (1000.0, 100.0, 10.0, 1.0, 0.1)
# The weight where there are too few data to choose.
USUAL_WEIGHT = 1.0
# A scale or its inverse beyond it is that of a class which no validation input has.
_LARGEST_LOG = 5.0


@dataclass(frozen=True)
class Scaled:
    """Scales and biases of classes that were tuned.

    Attributes
    ----------
    best : Setting
        Tuned on all data.
    folds : tuple of Setting
        Tuned without the first fold, without the second, and so on; empty where there are too few data.
    weight : float
        The weight of the ridge.
    """

    best: Setting
    folds: tuple[Setting, ...]
    weight: float


@dataclass(frozen=True)
class Problem:
    """What is minimised: a scorer's mean NLL with a ridge, over parameters within the ranges of their grids.

    Attributes
    ----------
    scorer : Scorer
    predictor : Predictor
    grids : mapping
        Name of a parameter that has no discrete values -> its values.
    per_class : tuple of str
        Some of "class_scales" and "class_biases".
    n_outputs : int
    """

    scorer: Scorer
    predictor: Predictor
    grids: Mapping[str, Sequence[Any]]
    per_class: tuple[str, ...]
    n_outputs: int

    def setting(self, start: Setting, numbers: Tensor) -> Setting:
        """Return the setting of numbers: log10 of the parameters, then logarithms of scales, then biases."""
        names, k = list(self.grids), len(self.grids)
        values: dict[str, Any] = {name: 10 ** numbers[i] for i, name in enumerate(names)}
        parts = dict(zip(self.per_class, numbers[k:].split(self.n_outputs)))
        if "class_scales" in parts:
            v = parts["class_scales"]
            parts["class_scales"] = (v - v.mean()).exp()
        return start.at(**values, **parts)

    def numbers(self, setting: Setting) -> Any:
        """Return the numbers of a setting."""
        logs = [math.log10(getattr(setting, name)) for name in self.grids]
        scales = np.log(setting.class_scales or np.ones(self.n_outputs))
        parts = {
            "class_scales": scales - scales.mean(),
            "class_biases": np.asarray(setting.class_biases or np.zeros(self.n_outputs)),
        }
        return np.concatenate([logs, *(parts[name] for name in self.per_class)])

    def penalty(self, numbers: Tensor) -> Tensor:
        """Return the sum of the squared logarithms of scales about their mean, and of squared biases."""
        parts = dict(zip(self.per_class, numbers[len(self.grids) :].split(self.n_outputs)))
        if "class_scales" in parts:
            parts["class_scales"] = parts["class_scales"] - parts["class_scales"].mean()
        return torch.stack([part.square().sum() for part in parts.values()]).sum()

    def solve(self, start: Setting, weight: float, without: int | None = None) -> Setting:
        """Return the setting of the smallest loss, by L-BFGS from a setting; if wanted, without a fold."""

        def nll(block: Block, numbers: Tensor) -> Tensor:
            at = self.setting(start, numbers)
            return self.scorer.nll(self.predictor(at)(block), block, at)

        def objective(numbers: Any) -> tuple[float, Any]:
            try:
                value, slope, n = self.scorer.mean_and_gradient(nll, numbers, without)
            except SKIPPED:
                return 1e30, 0 * numbers
            leaf = torch.tensor(numbers, dtype=torch.float64, device="cpu", requires_grad=True)
            with torch.enable_grad():
                ridge = self.penalty(leaf) * (weight / n)
            value, slope = value + float(ridge.detach()), slope + torch.autograd.grad(ridge, leaf)[0]
            return (value, slope.numpy()) if np.isfinite([value, *slope]).all() else (1e30, 0 * numbers)

        ends = [(math.log10(min(v)), math.log10(max(v))) for v in self.grids.values()]
        of_classes = {"class_scales": (-_LARGEST_LOG, _LARGEST_LOG), "class_biases": (None, None)}
        bounds = ends + [of_classes[name] for name in self.per_class for _ in range(self.n_outputs)]
        # Folds start close to their optimum, and need it less precisely.
        options = {"maxiter": 200, "ftol": 1e-9} if without is None else {"maxiter": 30, "ftol": 1e-7}
        found = minimize(
            objective, self.numbers(start), jac=True, method="L-BFGS-B", bounds=bounds, options=options
        )
        return _plain(self.setting(start, torch.tensor(found.x, dtype=torch.float64, device="cpu")))


def _plain(setting: Setting) -> Setting:
    """Return a setting in numbers, and tuples of numbers."""
    values = {k: v for k, v in vars(setting).items() if isinstance(v, Tensor)}
    return setting.at(**{k: tuple(v.tolist()) if k in PER_CLASS else float(v) for k, v in values.items()})


def scaled_by_class(problem: Problem, start: Setting, by_folds: bool) -> Scaled:
    """Tune scales and biases of classes with the other parameters, and the weight of the ridge by cross-validation.

    Each fold is scored with what was tuned on the others, with the weight that was best for those.

    Parameters
    ----------
    start : Setting
        What to start from.
    by_folds : bool
        Whether there are enough data for cross-validation.
    """
    if not by_folds:
        return Scaled(problem.solve(start, USUAL_WEIGHT), (), USUAL_WEIGHT)
    whole: list[Setting] = []
    folds: list[list[Setting]] = []
    losses: list[Tensor] = []
    for weight in WEIGHTS:
        start = problem.solve(start, weight)
        whole.append(start)
        folds.append([problem.solve(start, weight, without=k) for k in range(N_FOLDS)])
        found = [problem.scorer.nll_by_fold(problem.predictor, s)[0, k] for k, s in enumerate(folds[-1])]
        losses.append(torch.stack(found))
        if len(losses) > 1 and losses[-1].sum() > losses[-2].sum():
            break
    table = torch.stack(losses)
    best = int(table.sum(1).argmin())
    elsewhere = [(table.sum(1) - table[:, k]).argmin() for k in range(N_FOLDS)]
    return Scaled(whole[best], tuple(folds[int(i)][k] for k, i in enumerate(elsewhere)), WEIGHTS[best])
