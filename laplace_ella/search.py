r"""The search for prior precision and temperature over candidates that are cheap to score."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .basis import Progress
from .posterior import NotPositiveDefiniteError
from .validation import NonFiniteSamplesError

# Four values a decade: NLL changes by less than a standard error in between.
TEMPERATURES = tuple(10 ** (e / 4) for e in range(-12, 25))
_GOLDEN = (math.sqrt(5) - 1) / 2


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
            except (NotPositiveDefiniteError, NonFiniteSamplesError) as error:
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
            stacklevel=5,
        )
    if max(values) - lowest <= 1e-12 * abs(lowest):
        return None
    return search.best
