r"""Choosing prior precision and temperature on validation data.

Features do not depend on either, so the model runs once; every candidate is scored
from the features kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torchmetrics
from torch import Tensor

from .basis import Progress
from .batches import Input, named_batches
from .likelihoods import Likelihood, checked_targets
from .posterior import NotPositiveDefiniteError

Prediction: TypeAlias = Tensor | tuple[Tensor, Tensor]
Loss: TypeAlias = torchmetrics.Metric | Callable[..., Any]

# Four values a decade: NLL changes by less than a standard error in between.
TEMPERATURES = tuple(10 ** (e / 4) for e in range(-12, 25))
_GOLDEN = (math.sqrt(5) - 1) / 2


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


@dataclass(frozen=True)
class Setting:
    """One candidate: a prior precision, and a temperature."""

    prior_precision: float
    temperature: float


class _Search:
    """Scores candidates, each once, and remembers the best; ties keep the earlier one."""

    def __init__(self, evaluate: Callable[[Setting], float]) -> None:
        self.evaluate = evaluate
        self.table: dict[Setting, float] = {}
        self.failures: list[str] = []

    def __call__(self, setting: Setting) -> float:
        if setting not in self.table:
            try:
                value = self.evaluate(setting)
            except NotPositiveDefiniteError as error:
                self.failures.append(str(error))
                value = math.nan
            if not math.isfinite(value):
                self.failures.append(f"the loss is {value} at {setting}")
            self.table[setting] = value if math.isfinite(value) else math.inf
        return self.table[setting]

    @property
    def best(self) -> Setting:
        return min(self.table, key=self.table.__getitem__)


def grid_search(
    evaluate: Callable[[Setting], float],
    priors: Sequence[float],
    temperature: float | None,
    progress: Progress,
) -> Setting | None:
    """Find the setting with the smallest loss.

    With a fixed temperature every prior is tried. With None, temperature and prior
    are tuned jointly: all temperatures with one prior a decade, then all priors and a
    golden-section search at the best. Candidates go from small to large variance, so
    that ties go to the smaller one.

    Parameters
    ----------
    evaluate : callable
        Setting -> loss; NaN, infinity or a precision that is not positive definite skips the candidate.
    priors : sequence of float
    temperature : float, optional
        None tunes it.

    Returns
    -------
    Setting or None
        None if the loss is the same for every candidate.

    Raises
    ------
    ValueError
        If no candidate has a finite loss.
    """
    search = _Search(evaluate)
    descending = sorted(priors, reverse=True)
    if temperature is not None:
        grid = [Setting(p, temperature) for p in descending]
    else:
        grid = [Setting(p, t) for t in TEMPERATURES for p in _one_a_decade(descending)]
    for setting in progress(grid, "Grid search"):
        search(setting)
    if temperature is None and math.isfinite(search.table[search.best]):
        _refine(search, descending, progress)
    return _conclude(search)


def _one_a_decade(descending: Sequence[float]) -> list[float]:
    chosen = [descending[0]]
    for p in descending[1:]:
        if p <= chosen[-1] / 9.99:
            chosen.append(p)
    return chosen


def _refine(search: _Search, priors: Sequence[float], progress: Progress) -> None:
    temperature = search.best.temperature
    for p in progress(priors, "Prior precision"):
        search(Setting(p, temperature))
    prior = search.best.prior_precision
    low = math.log10(max(temperature * 10**-0.25, TEMPERATURES[0]))
    high = math.log10(min(temperature * 10**0.25, TEMPERATURES[-1]))
    while high - low > 0.02:
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if search(Setting(prior, 10**left)) <= search(Setting(prior, 10**right)):
            high = right
        else:
            low = left


def _conclude(search: _Search) -> Setting | None:
    values = list(search.table.values())
    lowest = min(values)
    if not math.isfinite(lowest):
        raise ValueError(
            f"None of the {len(values)} settings tried has a finite loss; the first reason: {search.failures[0]}. "
            "The estimator is as it was. Check the validation targets and the loss."
        )
    if search.failures:
        warnings.warn(
            f"{sum(math.isinf(v) for v in values)} of {len(values)} settings were skipped; "
            f"the first reason: {search.failures[0]}.",
            stacklevel=4,
        )
    if max(values) - lowest <= 1e-12 * abs(lowest):
        return None
    return search.best
