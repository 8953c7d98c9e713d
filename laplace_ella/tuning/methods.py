r"""A method that predicts from a setting: tuned on validation data, and without each fold of them in turn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

from torch import Tensor

from ..data.progress import Progress, no_progress
from ..posterior.setting import Setting
from .scaling import Problem, scaled_by_class
from .scorer import HeldOut, Predictor, Scorer
from .scoring import N_FOLDS
from .search import DISCRETE, FLAT, Search, joint_search, refine

# With fewer validation inputs nothing is said of methods on data held out, as their standard errors are chance too.
FEWEST = 50


class Scores:
    """The losses of a method's settings, each computed once: of all data, and without a fold.

    Parameters
    ----------
    scorer : Scorer
    predictor : callable
        Setting -> what predicts a block under it.
    """

    def __init__(self, scorer: Scorer, predictor: Predictor) -> None:
        self.scorer, self.predictor = scorer, predictor
        self._of_all: dict[Setting, float] = {}
        self._of_folds: dict[Setting, Tensor] = {}

    def __call__(self, setting: Setting) -> float:
        """Return the loss of a setting."""
        if self.scorer.loss is None:
            losses, sizes = self._folds(setting).sum(1)
            return float(losses / sizes)
        if setting not in self._of_all:
            self._of_all[setting] = self.scorer(self.predictor, setting)
        return self._of_all[setting]

    def without(self, fold: int, setting: Setting) -> float:
        """Return the loss of a setting on all data but a fold; of a user's loss, the mean of the folds' losses."""
        losses, sizes = self._folds(setting)
        return float((losses.sum() - losses[fold]) / (sizes.sum() - sizes[fold]))

    def _folds(self, setting: Setting) -> Tensor:
        if setting not in self._of_folds:
            self._of_folds[setting] = self.scorer.by_fold(self.predictor, setting)
        return self._of_folds[setting]


@dataclass(frozen=True)
class Method:
    """A way to predict, and what of it is tuned.

    Attributes
    ----------
    name : str
    scores : Scores
    starts : tuple of Setting
        The settings to start from; the first is the one that stays if nothing is better.
    grids : mapping
        Name of a parameter -> its values, from small to large variance.
    per_class : tuple of str
        Which of "class_scales" and "class_biases" are tuned, with a ridge.
    n_outputs : int
    variance : str
        Where the variance of the outputs comes from.
    """

    name: str
    scores: Scores
    starts: tuple[Setting, ...]
    grids: Mapping[str, Sequence[Any]]
    per_class: tuple[str, ...] = ()
    n_outputs: int = 0
    variance: str = "ella"

    @property
    def n_predictions(self) -> int:
        """About how many times tuning with the NLL predicts all data, a gradient counted as three: what candidates took where it was counted."""
        sizes = [len(values) for values in self.grids.values()]
        pairs = [math.prod(pair) for pair in combinations(sizes, 2)] or [math.prod(sizes)]
        cells = sum(pairs) * (2 if len(pairs) > 1 else 1)
        return cells + 3 * (25 * len(self.grids) + 100 * bool(self.per_class))


@dataclass(frozen=True)
class Tuned:
    """A method that was tuned.

    Attributes
    ----------
    method : Method
    search : Search
        All settings tried on all data.
    best : Setting
    held_out : HeldOut or None
        What it reaches on each fold, tuned on the others; None where there are too few data.
    ignored : tuple of str
        The parameters on which the loss does not depend.
    ridge : float or None
        The weight of the ridge on scales and biases of classes.
    """

    method: Method
    search: Search
    best: Setting
    held_out: HeldOut | None = None
    ignored: tuple[str, ...] = ()
    ridge: float | None = None

    @property
    def score(self) -> float:
        """The loss on the data that it was tuned on."""
        return self.search.table[self.best]

    @property
    def parameters(self) -> dict[str, float]:
        """What was tuned, in numbers."""
        found = {k: float(getattr(self.best, k)) for k in self.method.grids}
        if self.ridge is not None:
            found |= {
                "numbers": float(self.method.n_outputs * len(self.method.per_class)),
                "ridge": self.ridge,
            }
        return found


def tuned(method: Method, progress: Progress = no_progress) -> Tuned:
    """Tune a method on all data; and, if there are enough, without each fold in turn."""
    scorer, grids, start = method.scores.scorer, method.grids, method.starts[0]
    by_folds = scorer.n_inputs >= FEWEST
    search = Search(method.scores)
    for each in method.starts:
        joint_search(search, each, grids, progress)
    gradient = _gradient(method)
    # At the smallest variance T has no slope, so that logits scaled alone are an optimum of their own, and can be ahead on a
    # grid by chance.
    for each in [search.best] if gradient is None else search.optima:
        refine(search, grids, gradient, start=each)
    if math.isinf(search.table[search.best]):
        return Tuned(method, search, search.best)
    if not (grids or method.per_class):
        return Tuned(method, search, search.best, _held_out(method, [search.best] * N_FOLDS * by_folds))
    best, ignored = search.best, list[str]()
    if method.variance == "ella":
        best, ignored = search.without_ignored(start, grids)
    if method.per_class:
        return _by_class(method, search, best, tuple(ignored), by_folds)
    # A single value was asked for as it is.
    present = start.at(**{k: values[0] for k, values in grids.items() if len(values) == 1})
    if method.variance == "ella" and search(present) - search.table[best] <= FLAT * abs(search.table[best]):
        best = present  # where nothing helps, nothing changes
    folds = [_without(method, search, fold) for fold in range(N_FOLDS)] if by_folds else []
    return Tuned(method, search, best, _held_out(method, folds), ignored=tuple(ignored))


def _gradient(method: Method, without: int | None = None) -> Any:
    scores = method.scores
    if scores.scorer.loss is not None:
        return None
    return partial(scores.scorer.gradient, scores.predictor, without=without)


def _without(method: Method, search: Search, fold: int) -> Setting:
    """Return the setting that the data without a fold choose among those tried, with the NLL by refinement too."""
    own = Search(partial(method.scores.without, fold))
    for setting, value in search.table.items():
        if math.isfinite(value):
            own(setting)
    if method.scores.scorer.loss is None:
        refine(own, method.grids, _gradient(method, fold), max_steps=10, tolerance=1e-7)
    return own.best


def _by_class(
    method: Method, search: Search, start: Setting, ignored: tuple[str, ...], by_folds: bool
) -> Tuned:
    """Tune scales and biases of classes, and all else with them, from what was best without."""
    scores = method.scores
    grids = {k: v for k, v in method.grids.items() if k not in (*DISCRETE, *ignored) and len(v) > 1}
    problem = Problem(scores.scorer, scores.predictor, grids, method.per_class, method.n_outputs)
    found = scaled_by_class(problem, start, by_folds)
    search(found.best)
    held_out = _held_out(method, found.folds)
    return Tuned(method, search, found.best, held_out, ignored, found.weight)


def _held_out(method: Method, folds: Sequence[Setting]) -> HeldOut | None:
    scores = method.scores
    return scores.scorer.held_out(scores.predictor, folds) if folds else None
