r"""What a search over hyperparameters found: all scores, the best setting, and simpler methods beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..posterior.setting import SETTING_NAMES, Setting
from .baselines import Baseline

# Fewer validation inputs leave the optimum to chance (docs/tuning.md).
ENOUGH_INPUTS = 200


@dataclass(frozen=True)
class TuningResult:
    """The result of :meth:`laplace_ella.ELLALaplace.optimize_hyperparameters`.

    Attributes
    ----------
    best : Setting
        The setting with the smallest loss.
    score : float
        Its loss on the validation data; by default the mean NLL of an input (or position).
    searched : tuple of str
        The parameters that were searched.
    table : tuple of (Setting, float)
        Every setting tried, with its loss, in this order; infinity where it failed.
    baselines : dict of Baseline or None
        Simpler methods on the same data, each tuned on them; None where not available.
    n_inputs : int
        Size of the validation data.
    loss : str
        Name of the loss.
    applied : bool
        Whether the estimator now has the best setting.
    notes : tuple of str
        What to know before using the setting.
    """

    best: Setting
    score: float
    searched: tuple[str, ...]
    table: tuple[tuple[Setting, float], ...] = field(repr=False)
    baselines: dict[str, Baseline | None]
    n_inputs: int
    loss: str
    applied: bool
    notes: tuple[str, ...]

    def summary(self) -> str:
        """Return the comparison as a table in plain text."""
        found = ", ".join(f"{k} = {_format(getattr(self.best, k))}" for k in self.searched)
        others = [k for k in SETTING_NAMES if k not in self.searched]
        held = ", ".join(f"{k} = {_format(getattr(self.best, k))}" for k in others)
        data = f"{self.n_inputs} validation inputs, on which everything here was tuned"
        lines = [
            f"{self.loss} on {data} ({len(self.table)} settings)",
            f"{'':22}{'score':>9}{'minus ELLA':>22}  tuned",
            f"{'ELLA':22}{self.score:9.4f}{'':22}  {found}",
        ]
        for name, baseline in self.baselines.items():
            if baseline is None:
                lines.append(f"{name:22}{'':9}{'not available':>22}")
                continue
            error = "" if baseline.standard_error is None else f" +- {baseline.standard_error:.4f}"
            parameters = ", ".join(f"{k} = {_format(v)}" for k, v in baseline.parameters.items())
            difference = f"{baseline.difference:+.4f}{error}"
            lines.append(f"{name:22}{baseline.score:9.4f}{difference:>22}  {parameters}".rstrip())
        return "\n".join([*lines, f"held fixed: {held}", *self.notes])

    def plot(self) -> Any:
        """Draw the score against each parameter searched, with the simpler methods as lines.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ImportError
            Without matplotlib, which the extra ``plot`` installs.
        """
        import matplotlib.pyplot as plt

        n = len(self.searched)
        figure, axes = plt.subplots(
            1, n, figsize=(3.6 * n + 1.8, 3.6), sharey=True, squeeze=False, layout="constrained"
        )
        reached = [self.score, *(b.score for b in self.baselines.values() if b is not None)]
        low, high = min(reached), max(reached)
        margin = 0.1 * (high - low) or 0.01
        for ax, name in zip(axes[0], self.searched):
            values = [getattr(setting, name) for setting, _ in self.table]
            ax.plot(values, [s for _, s in self.table], ".", color="0.6", ms=4)
            ax.plot(*_lower_envelope(values, [s for _, s in self.table]), color="C3", lw=1)
            ax.plot([getattr(self.best, name)], [self.score], "*", color="C3", ms=12, label="ELLA, best")
            for i, (method, baseline) in enumerate(self.baselines.items()):
                if baseline is not None:
                    ax.axhline(baseline.score, color=f"C{i + 4}", ls="--", lw=1, label=method)
            ax.set_xscale("log", base=10 if max(values) > 100 * min(values) else 2)
            ax.set(xlabel=name, ylim=(low - margin, high + 5 * margin))
        axes[0][0].set_ylabel(self.loss)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
        return figure


def _format(value: Any) -> str:
    return "as it is" if value is None else f"{value:.4g}"


def _lower_envelope(values: Sequence[float], scores: Sequence[float]) -> tuple[list[float], list[float]]:
    best: dict[float, float] = {}
    for v, s in zip(values, scores):
        best[v] = min(s, best.get(v, math.inf))
    xs = sorted(best)
    return xs, [best[x] for x in xs]


def remarks(
    baselines: dict[str, Baseline | None],
    score: float,
    n_inputs: int,
    equals_map: bool,
    of_values: Sequence[str],
) -> tuple[str, ...]:
    """Say what a user should know before relying on the best setting."""
    notes = [note for note in of_values if note]
    if n_inputs < ENOUGH_INPUTS:
        notes.append(
            f"Only {n_inputs} validation inputs: with fewer than {ENOUGH_INPUTS} the tuned values are to a large "
            "part chance. Use more."
        )
    if equals_map:
        notes.append(
            "The predictions are those of MAP to 3 digits: nothing is gained over the network itself on these data."
        )
    better, as_good, rounding = [], [], 1e-6 * abs(score)
    for name, baseline in baselines.items():
        if baseline is None:
            continue
        difference, error = baseline.difference, baseline.standard_error or 0.0
        if difference < -2 * error - rounding:
            better.append(f"{name} (by {-difference:.4f})")
        elif difference <= error + rounding:
            as_good.append(name)
    if better:
        notes.append(
            f"Simpler methods are better: {', '.join(better)}. Use one of them, or search more parameters."
        )
    if as_good:
        notes.append(
            f"Simpler methods are as good within the standard error: {', '.join(as_good)}. If calibration is all "
            "you need, use one of them."
        )
    return tuple(notes)
