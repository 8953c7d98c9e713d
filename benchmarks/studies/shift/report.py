"""Tables and plots of docs/robustness.md, from the JSON of this study."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import NOTHING, of_run, table
from benchmarks.studies.common import tables
from benchmarks.studies.common.results import DOCS, IMAGES, write_page
from benchmarks.studies.shift.summary import (
    NAMES,
    REFERENCE,
    Run,
    Runs,
    curve,
    gap_over_all,
    gaps,
    gaps_of_kind,
    kinds,
    lower,
    means,
    methods,
    others,
    per_kind,
    read,
    severities,
)

PAGE = DOCS / "robustness.md"
COLORS = {
    "MAP": "#444444",
    "temperature scaling": "#1f77b4",
    "vector scaling": "#17becf",
    "last-layer variance (T)": "#2ca02c",
    "last-layer full": "#98df8a",
    "last-layer KFAC": "#bcbd22",
    "last-layer KFAC (T, s)": "#8c564b",
    "ELLA, T = 1": "#aaaaaa",
    "ELLA (T)": "#ff9e4a",
    "ELLA (T, s)": "#d62728",
    "ELLA + residual (T, s, rho)": "#9467bd",
}
GAP_TICKS = (-2, -1, -0.5, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1, 2)
AT = (0.0, 0.5, 0.7, 0.9, 0.99)

SCORES = {"NLL": "nll", "accuracy": "accuracy", "Brier": "brier", "entropy": "entropy"}


def figure(suffix: str, text: str, run: Run) -> str:
    """Write the link of an image, which is there if the case was run."""
    return f"![{text}](images/shift_{run['case']}{suffix}.png)\n"


def summary_table(run: Run) -> str:
    """Write what comes out over all corruptions and severities."""
    lines = []
    for name in methods(run):
        nll, ece = (f"{statistics.fmean(means(run, name, score)[1:]):.3f}" for score in ("nll", "ece"))
        beside = ["", "", ""] if name == REFERENCE else _beside(run, name)
        lines.append([name, nll, *beside[:2], ece, beside[2]])
    head = [
        "method",
        "NLL",
        f"NLL minus that of {REFERENCE}",
        "NLL is lower, times",
        "ECE",
        "ECE is lower, times",
    ]
    return table(head, lines)


def _beside(run: Run, name: str) -> list[str]:
    counts = ("{} of {}".format(*lower(run, name, score)) for score in ("nll", "ece"))
    return [signed(*gap_over_all(run, name)), *counts]


def score_table(score: str, run: Run) -> str:
    """Write a score by severity."""
    lines = [[name, *(f"{value:.3f}" for value in means(run, name, score))] for name in methods(run)]
    return table(["method", *severities(run)], lines)


def ece_table(run: Run) -> str:
    """Write ECE by severity, with that of calibrated probabilities."""
    lines = []
    for name in methods(run):
        pairs = zip(means(run, name, "ece"), means(run, name, "ece_of_calibrated"))
        lines.append([name, *(f"{found:.3f} ({floor:.3f})" for found, floor in pairs)])
    return table(["method", *severities(run)], lines)


def gap_table(run: Run) -> str:
    """Write differences of NLL to the reference by severity."""
    lines = [
        [name, *(signed(*found) for found in gaps(run, name))] for name in methods(run) if name != REFERENCE
    ]
    return table([f"NLL minus that of {REFERENCE}", *severities(run)], lines)


def signed(mean: float, error: float | None) -> str:
    return f"{mean:+.3f}" + ("" if error is None else f" ± {error:.3f}")


def kind_table(run: Run) -> str:
    """Write differences of NLL to the reference by kind of corruption."""
    lines = [
        [name, *(signed(*gaps_of_kind(run, name, kind)) for kind in kinds(run))]
        for name in methods(run)
        if name != REFERENCE
    ]
    return table([f"NLL minus that of {REFERENCE}", *kinds(run)], lines)


def every_table(run: Run) -> str:
    """Write accuracy, and NLL with ECE of some methods, of every kind and severity."""
    chosen = ["MAP", "temperature scaling", "vector scaling", "last-layer full", "ELLA (T, s)"]
    lines = []
    for place, kind in enumerate(kinds(run)):
        for severity in range(1, len(severities(run))):
            nll, ece = (
                [per_kind(run, name, score)[severity][place] for name in chosen] for score in ("nll", "ece")
            )
            accuracy = per_kind(run, "MAP", "accuracy")[severity][place]
            cells = [f"{one:.3f} ({other:.3f})" for one, other in zip(nll, ece)]
            lines.append([kind, str(severity), f"{accuracy:.3f}", *cells])
    return table(
        ["corruption", "severity", "accuracy of MAP", *(f"{name}: NLL (ECE)" for name in chosen)], lines
    )


def mixed_table(run: Run) -> str:
    """Write accuracy among images above a confidence, with the share of images that are."""
    lines = []
    for other in others(run):
        for name in methods(run):
            at = {c: (a, share) for c, a, share in zip(*curve(run, name, other))}
            lines.append([other, name, *(_at(*at[confidence]) for confidence in AT)])
    return table(
        ["mixed with", "method", *(f"confidence at least {confidence:g}" for confidence in AT)], lines
    )


def _at(accuracy: float | None, kept: float) -> str:
    return "none left" if accuracy is None else f"{accuracy:.3f} ({100 * kept:.0f} %)"


def level_table(runs: Runs) -> str:
    """Write what the severities are."""
    if not runs:
        return NOTHING
    lines = [
        [kind, found["of"], name, *(f"{level:g}" for level in found["levels"])]
        for kind in kinds(next(iter(runs.values())))
        for name, found in ((name, run["levels"][kind]) for name, run in runs.items())
    ]
    return table(["corruption", "level", "case", *severities(next(iter(runs.values())))[1:]], lines)


FACTS = {**tables.IMAGES, **tables.SIZES, **tables.VERSIONS, **tables.TINY}
OF_CASE: dict[str, Callable[[Run], str]] = {
    "summary": summary_table,
    "boxes": partial(figure, "", "NLL and ECE by severity"),
    "confidence": partial(figure, "_confidence", "accuracy and share of images above a confidence"),
    **{name: partial(score_table, score) for name, score in SCORES.items()},
    "ECE": ece_table,
    "gaps": gap_table,
    "kinds": kind_table,
    "every": every_table,
    "mixed": mixed_table,
}


TABLES: dict[str, Callable[[Runs], str]] = {
    "where": partial(tables.where, facts=FACTS),
    "levels": level_table,
    **{f"{name} {what}": partial(of_run, name, write) for name in NAMES for what, write in OF_CASE.items()},
}


def plot_boxes(run: Run, path: Path) -> None:
    """Draw NLL, its difference to the reference's, and ECE: a box a method and severity, over the kinds."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(3, 1, figsize=(11, 11), sharex=True, layout="constrained")
    names = methods(run)
    base = per_kind(run, REFERENCE, "nll")
    for place, name in enumerate(names):
        nll = per_kind(run, name, "nll")
        gap = [[a - b for a, b in zip(*columns)] for columns in zip(nll, base)]
        for ax, found in zip(axes, (nll, gap, per_kind(run, name, "ece"))):
            _boxes(ax, found, (place - (len(names) - 1) / 2) * 0.8 / len(names), COLORS[name])
    accuracy = means(run, "MAP", "accuracy")
    labels = [f"{name}\naccuracy {value:.2f}" for name, value in zip(severities(run), accuracy)]
    axes[0].set(ylabel="NLL", title=f"{run['network']} on {run['environment']['images']}")
    axes[1].set(ylabel=f"NLL minus that of\n{REFERENCE}")
    axes[1].set_yscale("symlog", linthresh=0.1)
    low, high = axes[1].get_ylim()
    ticks = [tick for tick in GAP_TICKS if low <= tick <= high]
    axes[1].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[1].axhline(0, color=COLORS[REFERENCE], lw=0.8)
    axes[2].set(ylabel="ECE", xticks=range(len(labels)), xticklabels=labels)
    for ax in axes:
        ax.grid(axis="y", color="#dddddd")
        for edge in range(1, len(labels)):
            ax.axvline(edge - 0.5, color="#dddddd")
    handles = [plt.Line2D([], [], color=COLORS[name], lw=6) for name in names]
    fig.legend(handles, names, ncols=5, frameon=False, loc="outside lower center")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _boxes(ax: Any, found: list[list[float]], offset: float, color: str) -> None:
    """Draw a box of each severity: quartiles and median, with whiskers to the extremes."""
    ax.boxplot(
        found,
        positions=[place + offset for place in range(len(found))],
        widths=0.066,
        whis=(0, 100),
        patch_artist=True,
        manage_ticks=False,
        boxprops={"facecolor": color, "edgecolor": color},
        medianprops={"color": "black", "lw": 1.2},
        whiskerprops={"color": color},
        capprops={"color": color},
    )
    ax.plot(offset, found[0][0], "o", ms=5, color=color)


def plot_confidence(run: Run, path: Path) -> None:
    """Draw accuracy above each confidence, and the share of images above it, a column a mixture."""
    import matplotlib.pyplot as plt

    columns = others(run)
    fig, axes = plt.subplots(
        2,
        len(columns),
        figsize=(1 + 4.6 * len(columns), 7.6),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for column, other in zip(axes.T, columns):
        for name in methods(run):
            confidence, accuracy, kept = curve(run, name, other)
            style = {"color": COLORS[name], "ls": "--" if name == "ELLA, T = 1" else "-", "label": name}
            column[0].plot(confidence, [float("nan") if a is None else a for a in accuracy], **style)
            column[1].plot(confidence, kept, **style)
        column[0].set_title(f"{run['environment']['images']} and {other}")
        column[1].set(xlabel="confidence τ")
        for ax in column:
            ax.grid(color="#dddddd")
    axes[0, 0].set_ylabel("accuracy where confidence ≥ τ")
    axes[1, 0].set_ylabel("share of images with confidence ≥ τ")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), ncols=4, frameon=False, loc="outside lower center")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> None:
    runs = read()
    write_page(PAGE, "shift/report.py", runs, TABLES)
    for name, run in runs.items():
        plot_boxes(run, IMAGES / f"shift_{name}.png")
        plot_confidence(run, IMAGES / f"shift_{name}_confidence.png")
        print(f"shift_{name}.png, shift_{name}_confidence.png drawn")
