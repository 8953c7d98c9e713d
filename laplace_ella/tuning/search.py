r"""Searches over settings that are cheap to score: grids first, then refinement.

A *setting* is a value of everything that can be tuned without another pass over the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
from scipy.optimize import minimize

from ..data.progress import Progress
from ..posterior.setting import Setting
from .scoring import SKIPPED

# Four values a decade: NLL changes by less than a standard error in between.
TEMPERATURES = tuple(10 ** (e / 4) for e in range(-12, 25))
# The values are dense around 1, and no sensible network needs those at the ends.
LOGIT_SCALES = (0.01, 0.1, 0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0, 10.0)
_GOLDEN = (math.sqrt(5) - 1) / 2
# There is nothing between two values of the grids of these parameters.
DISCRETE = ("n_eigenvalues", "curvature_size")
# These parameters only widen the variance of the logits; the function picks the narrowest of some values.
NARROWEST = {"temperature": min, "residual_scale": min, "prior_precision": max}
# Differences of the loss below this share of it are rounding.
ROUNDING = 1e-12
# A loss that changes by less than this share of it at the edge of a grid is flat there.
FLAT = 1e-6


def decades(low: int, high: int) -> list[float]:
    """Return the powers of ten from 10^low to 10^high."""
    return [10.0**e for e in range(low, high + 1)]


def noises(sigma: float) -> list[float]:
    """Return ten values a decade, three decades either way: the NLL is steep in sigma, and cheap."""
    return [sigma * 10 ** (e / 10) for e in range(-30, 31)]


class Search:
    """Scores settings, each once, and remembers the best; ties keep the earlier one.

    Parameters
    ----------
    evaluate : callable
        Setting -> loss. A setting is skipped if this is NaN or infinite, or the precision is not positive definite.
    """

    def __init__(self, evaluate: Callable[[Setting], float]) -> None:
        self.evaluate = evaluate
        self.table: dict[Setting, float] = {}
        self.failure = ""  # the reason why a setting was skipped for the first time

    def __call__(self, setting: Setting) -> float:
        """Return the loss of a setting; infinity if it fails."""
        if setting not in self.table:
            self.table[setting], reason = self._scored(setting)
            self.failure = self.failure or reason
        return self.table[setting]

    def _scored(self, setting: Setting) -> tuple[float, str]:
        """Return a loss and nothing; or infinity, and why."""
        try:
            value = self.evaluate(setting)
        except SKIPPED as error:
            return math.inf, str(error)
        return (value, "") if math.isfinite(value) else (math.inf, f"the loss is {value} at {setting}")

    def _beside(self, setting: Setting) -> float:
        """Return the loss of a setting that is no candidate."""
        return self.table[setting] if setting in self.table else self._scored(setting)[0]

    @property
    def best(self) -> Setting:
        """The setting with the smallest loss."""
        return min(self.table, key=self.table.__getitem__)

    @property
    def optima(self) -> list[Setting]:
        """The best setting; and if its temperature is the smallest, the best of those where a larger one helps."""
        table, best = self.table, self.best
        narrowest = min(setting.temperature for setting in table)
        if best.temperature > narrowest:
            return [best]
        without = {s: table.get(s.at(temperature=narrowest), math.inf) for s in table}
        helped = [s for s, value in table.items() if without[s] - value > FLAT * abs(value)]
        return [best, *([min(helped, key=table.__getitem__)] if helped else [])]

    def conclude(self) -> str:
        """Return what is to be said of settings that were skipped, if any.

        Raises
        ------
        ValueError
            If all were.
        """
        skipped = sum(math.isinf(v) for v in self.table.values())
        if skipped == len(self.table):
            raise ValueError(
                f"None of the {skipped} settings tried has a finite loss; the first reason: {self.failure}. "
                "The estimator is as it was. Check the validation targets and the loss."
            )
        if not skipped:
            return ""
        return f"{skipped} of {len(self.table)} settings were skipped; the first reason: {self.failure}."

    def without_ignored(
        self, start: Setting, grids: Mapping[str, Sequence[Any]]
    ) -> tuple[Setting, list[str]]:
        """Return the best setting with the values of ``start`` where the loss does not depend on them, and those names."""
        best, lowest = self.best, self.table[self.best]
        ignored: list[str] = []
        for name, values in grids.items():
            old = getattr(start, name)
            if old is None or len(values) == 1:  # a single value was asked for as it is
                continue
            tried = [self._beside(best.at(**{name: v})) for v in (old, min(values), max(values))]
            if max(tried) - lowest <= FLAT * abs(lowest):
                best, ignored = best.at(**{name: old}), [*ignored, name]
        self(best)
        return best, ignored

    def edge(self, name: str, values: Sequence[float], best: Setting | None = None) -> str:
        """Return what is to be said of a best value on an edge of its grid, where the loss still falls.

        Parameters
        ----------
        values : sequence of float
            The values of the grid in ascending order.
        best : Setting, optional
            The one that is chosen; by default that of the smallest loss.
        """
        best = best or self.best
        lowest = self.table[best]
        value = getattr(best, name)
        for outer, inner, word in ((0, 1, "below"), (-1, -2, "above")):
            if len(values) > 1 and math.isclose(value, values[outer], rel_tol=1e-6):
                gain = self._beside(best.at(**{name: values[inner]})) - lowest
                if gain > FLAT * abs(lowest):
                    return (
                        f"The best {name}, {value:.4g}, lies on an edge of its grid ({values[0]:.4g} to "
                        f"{values[-1]:.4g}); the loss still falls {word} it."
                    )
        return ""

    def is_flat(self) -> bool:
        """Tell whether the loss is the same for every setting."""
        values = [v for v in self.table.values() if math.isfinite(v)]
        return len(values) > 1 and max(values) - min(values) <= ROUNDING * abs(min(values))


def grid_search(
    search: Search, start: Setting, priors: Sequence[float], free_temperature: bool, progress: Progress
) -> None:
    """Search prior precisions, and with a free temperature the two jointly.

    With a fixed temperature every prior is tried. Else all temperatures are, with one
    prior a decade, then all priors and a golden-section search at the best. Candidates
    go from small to large variance, so that ties go to the smaller one.
    """
    descending = sorted(priors, reverse=True)
    temperatures = TEMPERATURES if free_temperature else [start.temperature]
    coarse = _one_a_decade(descending) if free_temperature else descending
    grid = [start.at(temperature=t, prior_precision=p) for t in temperatures for p in coarse]
    for setting in progress(grid, "Grid search"):
        search(setting)
    if not free_temperature or math.isinf(search.table[search.best]):
        return
    best = search.best
    for p in progress(descending, "Prior precision"):
        search(best.at(prior_precision=p))
    best = search.best
    golden_section(search, best, "temperature", *_neighbours(TEMPERATURES, best.temperature))


def _one_a_decade(descending: Sequence[float]) -> list[float]:
    chosen = [descending[0]]
    for p in descending[1:]:
        if p <= chosen[-1] / 9.99:
            chosen.append(p)
    return chosen


def _neighbours(grid: Sequence[float], value: float) -> tuple[float, float]:
    """Return the grid's values on both sides of one of them; itself where there is none."""
    i = grid.index(_closest(grid, value))
    return grid[max(0, i - 1)], grid[min(len(grid) - 1, i + 1)]


def golden_section(search: Search, start: Setting, name: str, low: float, high: float) -> None:
    """Narrow the minimum over one parameter down to 0.02 decades."""
    a, b = math.log10(low), math.log10(high)
    while b - a > 0.02:
        left, right = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
        tried = [search(start.at(**{name: 10**v})) for v in (left, right)]
        a, b = (a, right) if tried[0] <= tried[1] else (left, b)


def joint_search(
    search: Search, start: Setting, grids: Mapping[str, Sequence[Any]], progress: Progress
) -> None:
    """Search all pairs of parameters over their grids, until no pair improves (three rounds at most).

    One or two parameters are searched completely. With more, every pair is, the others
    staying at the best found so far. At first, they stay at their smallest width, as wide ones have
    optima of their own with large logits, and at the values of their grids nearest to those in ``start``. So the
    result is no worse than scaled logits alone, or than a search of any pair beside these values.

    Parameters
    ----------
    grids : mapping
        Name of a parameter -> its values, from small to large variance.
    """
    present = {k: getattr(start, k) for k in grids}
    nearest = {k: _closest(v, present[k]) for k, v in grids.items() if present[k] is not None}
    narrowest = {k: NARROWEST[k](v) for k, v in grids.items() if k in NARROWEST}
    best, own = start.at(**nearest | narrowest), start.at(**narrowest | nearest)
    groups: list[tuple[str, ...]] = [*combinations(grids, 2)] or [tuple(grids)]
    for round_ in range(3 if len(groups) > 1 else 1):
        before = best
        for group in groups:
            cells = [dict(zip(group, values)) for values in product(*(grids[k] for k in group))]
            origins = [best] if round_ else [best, own]
            tried = dict.fromkeys(origin.at(**cell) for origin in origins for cell in cells)
            for setting in progress(list(tried), " x ".join(group)):
                search(setting)
            best = search.best
        if best == before:
            break


def _closest(values: Sequence[Any], value: Any) -> Any:
    return min(values, key=lambda v: abs(math.log(v / value)))


Gradient = Callable[[Setting, Sequence[str]], tuple[float, Sequence[float]]]


def refine(
    search: Search,
    grids: Mapping[str, Sequence[Any]],
    gradient: Gradient | None,
    max_steps: int = 50,
    tolerance: float = 1e-10,
    start: Setting | None = None,
) -> None:
    """Improve a setting, by default the best, within the ranges of the grids.

    This is done by L-BFGS over the logarithms if the loss has a gradient; else by golden-section
    searches between the neighbouring values, one parameter after the other, twice.

    Parameters
    ----------
    gradient : callable, optional
        (setting, names) -> (loss, its derivatives in the log10 of the parameters named).
    max_steps, tolerance : int, float
        When L-BFGS ends: after so many steps, or one that lowers the loss by less than this share.
    start : Setting, optional
        Where L-BFGS starts.
    """
    names = [k for k, values in grids.items() if k not in DISCRETE and len(values) > 1]
    if not names or math.isinf(search.table[search.best]):
        return
    if gradient is None:
        bounds = {k: _neighbours(sorted(grids[k]), getattr(search.best, k)) for k in names}
        for _ in range(2):
            for name in names:
                golden_section(search, search.best, name, *bounds[name])
        return
    start = start or search.best

    def at(logs: Any) -> Setting:
        return start.at(**{k: float(10**v) for k, v in zip(names, logs)})

    def objective(logs: Any) -> tuple[float, Any]:
        try:
            value, slope = gradient(at(logs), names)
        except SKIPPED:
            value, slope = math.inf, [0.0] * len(names)
        # A line search steps back from a large number, and fails on infinity.
        return (value, np.asarray(slope)) if np.isfinite([value, *slope]).all() else (1e30, 0 * logs)

    found = minimize(
        objective,
        [math.log10(getattr(start, k)) for k in names],
        jac=True,
        method="L-BFGS-B",
        bounds=[(math.log10(min(grids[k])), math.log10(max(grids[k]))) for k in names],
        options={"maxiter": max_steps, "ftol": tolerance},
    )
    if np.isfinite(found.x).all():
        search(at(found.x))
