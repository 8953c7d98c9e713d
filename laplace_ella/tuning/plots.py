r"""Pictures of a search: the score over each parameter, methods side by side, and reliability diagrams."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..posterior.setting import PER_CLASS


def draw(result: Any) -> Any:
    """Draw a :class:`laplace_ella.tuning.result.TuningResult`: a panel for each parameter, methods, reliability."""
    import matplotlib.pyplot as plt

    tried = {k: [getattr(s, k) for s, _ in result.table] for k in result.searched if k not in PER_CLASS}
    varied = {k: v for k, v in tried.items() if len(set(v)) > 1}
    with_diagram = {k: found for k, found in result.held_out.items() if found.reliability}
    n = len(varied) + 1 + bool(with_diagram)
    figure, axes = plt.subplots(1, n, figsize=(3.4 * n + 1.2, 3.6), squeeze=False, layout="constrained")
    scores = [score for _, score in result.table]
    for ax, (name, values) in zip(axes[0], varied.items()):
        _parameter(ax, name, values, scores, getattr(result.best, name), result.score)
    axes[0][0].set_ylabel(f"{result.loss}, in sample" if varied else "")
    _methods(axes[0][len(varied)], result)
    if with_diagram:
        # Of methods that agree, one line lies on the other: only those that matter are drawn.
        names = dict.fromkeys(k for k in ("MAP", result.reference, result.chosen) if k in with_diagram)
        _reliability(axes[0][-1], {name: with_diagram[name] for name in names})
    return figure


def _parameter(
    ax: Any, name: str, values: Sequence[float], scores: Sequence[float], best: float, lowest: float
) -> None:
    """Draw all settings, and the lowest score at each value."""
    low: dict[float, float] = {}
    for value, score in zip(values, scores):
        low[value] = min(score, low.get(value, math.inf))
    at = sorted(low)
    ax.plot(values, scores, ".", color="0.7", ms=3)
    ax.plot(at, [low[v] for v in at], color="C3", lw=1)
    ax.plot([best], [lowest], "*", color="C3", ms=12)
    margin = max(min(sorted(low.values())[len(low) // 2] - lowest, 1.0), 1e-3 * abs(lowest), 1e-6)
    ax.set_xscale("log", base=10 if max(values) > 100 * min(values) else 2)
    ax.set(xlabel=name, ylim=(lowest - 0.1 * margin, lowest + 1.5 * margin))


def _methods(ax: Any, result: Any) -> None:
    """Draw a row for each method, so that ties lie side by side: held out with standard errors, or in sample."""
    if result.held_out:
        found = {k: (v.difference, v.standard_error) for k, v in result.held_out.items()}
        ax.set_xlabel(f"{result.loss}, held out, minus that of {result.reference}")
    else:
        simpler = {k: b for k, b in result.baselines.items() if b is not None}
        found = {"ELLA": (0.0, 0.0), **{k: (b.difference, 0.0) for k, b in simpler.items()}}
        ax.set_xlabel(f"{result.loss}, in sample, minus that of ELLA")
    rows = range(len(found))
    for row, (name, (difference, error)) in zip(rows, found.items()):
        ax.errorbar(
            [difference], [row], xerr=[error], fmt="o", color="C3" if name == result.chosen else "0.3", ms=4
        )
    ax.axvline(0, color="0.7", lw=0.8, zorder=0)
    ax.set_yticks(list(rows), list(found))
    ax.set_ylim(len(found) - 0.5, -0.5)
    ax.tick_params(axis="x", labelrotation=30)


def _reliability(ax: Any, held_out: Mapping[str, Any]) -> None:
    """Draw what was observed over what was predicted; marks grow with the share of the data."""
    for i, (name, found) in enumerate(held_out.items()):
        predicted, observed, shares = zip(*found.reliability)
        ax.plot(predicted, observed, lw=1, color=f"C{i}", label=name)
        ax.scatter(predicted, observed, s=[60 * share for share in shares], color=f"C{i}")
    ax.plot([0, 1], [0, 1], ls=":", color="0.5", lw=1)
    ax.set(xlabel="predicted", ylabel="observed", title="reliability, held out")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize="x-small")
