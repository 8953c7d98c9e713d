"""The figures of docs/ablations.md and docs/choosing.md, drawn from the JSON of ablations.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.studies.ablations.report import AXES, CASES, METHODS, SIMPLE, SWEEPS, Run, Runs, of_sweep
from benchmarks.studies.common.scores import mean_and_error

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000",
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#b8a800",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
)
STYLES = {"T = 1": (BLACK, "o"), "stopped": (ORANGE, "s"), "T": (SKY, "^"), "T, s": (BLUE, "D")}
SIMPLE_STYLES = {"MAP": (PURPLE, ":"), "temperature scaling": (RED, "--"), "vector scaling": (GREEN, "-.")}
HEAT = {
    "ntk": "neural tangent kernel,\n||K - K_nys|| / ||K||",
    "evidence": "predictive covariance against exact,\nδ by evidence, T = 1",
    "tuned": "predictive covariance against exact,\nthe same δ, T tuned",
    "tuned, residual": "the same with the residual\nadded back (rho = 1)",
}


def plot_heat(run: Run, path: Path) -> None:
    """Draw the errors over M and K, with their values."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 2, figsize=(11, 10), layout="constrained")
    for ax, (key, title) in zip(axes.flat, HEAT.items()):
        _heat(ax, run["cells"], key, run["sizes"], title)
    image = axes[0, 0].images[0]
    fig.colorbar(image, ax=axes, label="relative Frobenius error; 1 and above in one colour", shrink=0.6)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _heat(ax: Any, cells: list[dict[str, Any]], key: str, sizes: list[int], title: str) -> None:
    import numpy as np

    values = np.full((len(sizes), len(sizes)), np.nan)
    for i, m in enumerate(sizes):
        for j, k in enumerate(sizes):
            found = [row[key] for row in cells if (row["M"], row["K"]) == (m, k)]
            if found:
                values[i, j] = statistics.fmean(found)
    ax.imshow(values, origin="lower", cmap="cividis_r", vmin=0, vmax=1, aspect="auto")
    _write_values(ax, values, 0.42, ".2f", 9)
    ax.set(xticks=range(len(sizes)), yticks=range(len(sizes)), xticklabels=sizes, yticklabels=sizes)
    ax.set(xlabel="K, directions", ylabel="M, landmarks", title=title)
    ax.spines[["top", "right"]].set_visible(False)


def _write_values(ax: Any, values: Any, dark: float, form: str, size: int) -> None:
    """Write each value that is known into its cell, in white where it is beyond ``dark``."""
    import numpy as np

    for i, j in np.argwhere(~np.isnan(values)):
        color = "white" if values[i, j] > dark else "black"
        ax.text(j, i, f"{values[i, j]:{form}}", ha="center", va="center", fontsize=size, color=color)


def plot_products(run: Run, path: Path) -> None:
    """Draw the covariance's error against T times the prior precision."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    ranks = list(dict.fromkeys(row["K"] for row in run["products"]))
    for k, color, marker in zip(ranks, (ORANGE, SKY, BLUE, BLACK), "os^D"):
        rows = [row for row in run["products"] if row["K"] == k]
        ax.plot(
            [row["product"] for row in rows],
            [row["error"] for row in rows],
            marker=marker,
            ms=5,
            color=color,
            label=f"K = {k}",
        )
    for key, words in (("evidence", "T = 1"), ("tuned", "T tuned")):
        product = run["settings"][key]["prior"] * run["settings"][key]["temperature"]
        ax.axvline(product, color="0.6", ls="--", lw=1)
        ax.text(product * 1.08, 0.03, words, rotation=90, color="0.35", fontsize=9)
    ax.axvline(run["largest_curvature"], color="0.6", ls=":", lw=1)
    ax.text(run["largest_curvature"] * 1.08, 0.2, "largest curvature", rotation=90, color="0.35", fontsize=9)
    ax.set(
        xscale="log",
        ylim=(0, 1.02),
        xlabel="T x prior precision",
        ylabel="relative error of the predictive covariance",
        title=f"M = {run['sizes'][-1]}",
    )
    ax.legend(frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_quality(run: Run, path: Path) -> None:
    """Draw NLL and ECE against K, n, M and the draw, a line a way of setting T and s."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        2, len(SWEEPS), figsize=(14, 6.6), sharey="row", layout="constrained", width_ratios=[1, 1, 1, 0.7]
    )
    for column, sweep in enumerate(SWEEPS):
        rows = of_sweep(run, sweep)
        for ax, score in zip(axes[:, column], ("nll", "ece")):
            _lines(ax, rows, score, run["simple"], sweep == "way")
        axes[0, column].set_title(_held(run, sweep), fontsize=10)
        axes[1, column].set_xlabel(SWEEPS[sweep])
    for ax, score in zip(axes[:, 0], ("nll", "ece")):
        ax.set_ylabel(f"test {score.upper()}")
        ax.set_ylim(*_limits(run, score))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _held(run: Run, sweep: str) -> str:
    held = {"M": run["usual"]["M"], "K": run["usual"]["K"], "n": run["counts"]["curvature"]}
    return ", ".join(f"{name} = {value}" for name, value in held.items() if name != sweep)


def _lines(
    ax: Any, rows: dict[Any, list[dict[str, Any]]], score: str, simple: dict[str, Any], words: bool
) -> None:
    places = list(range(len(rows))) if words else list(rows)
    for i, (name, label) in enumerate(METHODS.items()):
        found = [mean_and_error([row["methods"][name][score] for row in of]) for of in rows.values()]
        color, marker = STYLES[name]
        # Side by side, where lines would say that there is something between the values.
        shifted = [p + 0.12 * (i - 1.5) for p in places] if words else places
        ax.errorbar(
            shifted,
            [value for value, _ in found],
            yerr=[error or 0 for _, error in found],
            color=color,
            marker=marker,
            ls="" if words else "-",
            ms=5,
            lw=1.2,
            capsize=2,
            label=label,
        )
    for name in SIMPLE:
        color, style = SIMPLE_STYLES[name]
        ax.axhline(simple[name][score], color=color, ls=style, lw=1.2, label=name)
    if words:
        ax.set_xticks(places, list(rows))
        ax.margins(x=0.2)
    else:
        ax.set_xscale("log")
        ax.set_xticks(places, [str(p) for p in places], fontsize=8, rotation=45)
        ax.minorticks_off()


def _limits(run: Run, score: str) -> tuple[float, float]:
    """Return the range of what matters: all simpler methods, and what was tuned; the rest may go off scale."""
    values = [run["simple"][name][score] for name in SIMPLE]
    values += [
        row["methods"][name][score] for row in run["rows"] for name in ("T", "T, s") if row["sweep"] != "n"
    ]
    low, high = min(values), max(values)
    return max(0.0, low - 0.08 * (high - low)), high + 0.12 * (high - low)


def plot_priors(runs: list[Run], path: Path) -> None:
    """Draw validation NLL over temperature and prior precision."""
    import matplotlib.pyplot as plt
    import numpy as np

    fig, axes = plt.subplots(
        1, len(runs), figsize=(6.4 * len(runs), 4.8), layout="constrained", squeeze=False
    )
    for ax, run in zip(axes[0], runs):
        nlls = {(row["temperature"], row["prior_precision"]): row["nll"] for row in run["priors"]}
        temperatures, priors = (sorted(set(of)) for of in zip(*nlls))
        values = np.array([[nlls[t, p] for t in temperatures] for p in priors])
        low, middle = values.min(), np.median(values)
        image = ax.imshow(
            values, origin="lower", cmap="cividis_r", vmin=low, vmax=2 * middle - low, aspect="auto"
        )
        _write_values(ax, values, low + 1.1 * (middle - low), ".3f", 7)
        best = np.unravel_index(values.argmin(), values.shape)
        ax.plot(best[1], best[0], "s", ms=24, mfc="none", mec=RED, mew=2)
        ax.set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures], fontsize=8)
        ax.set_yticks(range(len(priors)), [f"{p:g}" for p in priors], fontsize=8)
        ax.set(xlabel="temperature T", ylabel="prior precision δ", title=f"{run['title']}, {run['images']}")
        fig.colorbar(image, ax=ax, label="validation NLL", extend="max")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_small(runs: list[Run], path: Path) -> None:
    """Draw the test NLL of what was tuned on few validation images."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(runs), figsize=(6 * len(runs), 4.2), layout="constrained", squeeze=False)
    for ax, run in zip(axes[0], runs):
        sizes = list(dict.fromkeys(row["n"] for row in run["small"]))
        for name in ("T", "T, s", *SIMPLE[1:]):
            color, style = STYLES.get(name) or (SIMPLE_STYLES[name][0], "v")
            found = [
                mean_and_error([row["methods"][name]["nll"] for row in run["small"] if row["n"] == n])
                for n in sizes
            ]
            values, errors = [v for v, _ in found], [e or 0 for _, e in found]
            label = METHODS.get(name, name)
            ax.errorbar(sizes, values, yerr=errors, color=color, marker=style, ms=5, capsize=2, label=label)
        ax.axhline(run["simple"]["MAP"]["nll"], color=PURPLE, ls=":", label="MAP")
        last = [r["methods"][n]["nll"] for r in run["small"][-1:] for n in ("T", "T, s", *SIMPLE)]
        low, high = min(last), max(last)
        ax.set(xscale="log", ylim=(low - 0.1 * (high - low), high + 0.6 * (high - low)))
        ax.set_xticks(sizes, [str(n) for n in sizes])
        ax.minorticks_off()
        ax.set(xlabel="validation images", ylabel="test NLL", title=f"{run['title']}, {run['images']}")
    axes[0, 0].legend(frameon=False, fontsize=9)
    fig.savefig(path, dpi=130)
    plt.close(fig)


STAGES = {
    "fit": (BLACK, "o"),
    "scan": (ORANGE, "s"),
    "landmark gradients": (GREEN, "^"),
    "Gram matrix": (PURPLE, "v"),
    "eigenvectors": (YELLOW, "<"),
    "features, forward mode": (SKY, "D"),
    "features, reverse mode": (RED, "P"),
    "prediction": (BLUE, "X"),
}


def plot_cost(run: Run, path: Path) -> None:
    """Draw seconds of each stage, and the peak memory of fits and predictions, along each axis."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    fig, axes = plt.subplots(2, len(AXES), figsize=(15, 7), sharey="row", layout="constrained")
    for column, (axis, letter) in enumerate(AXES.items()):
        rows = run["axes"][axis]
        at = [row["P"] if axis == "width" else row["cell"][axis] for row in rows]
        for stage, (color, marker) in STAGES.items():
            pairs = [(a, row["seconds"][stage]) for a, row in zip(at, rows) if stage in row["seconds"]]
            axes[0, column].plot(*zip(*pairs), color=color, marker=marker, ms=4, lw=1.2, label=stage)
        for kind, style in (("fit", "-"), ("prediction", ":")):
            color, marker = STAGES[kind]
            values = [max(row["bytes"][kind], 1e5) / 1e6 for row in rows]
            axes[1, column].plot(at, values, style, color=color, marker=marker, ms=4, label=f"a {kind}")
        for ax in axes[:, column]:
            ax.set(xscale="log", yscale="log")
            ax.xaxis.set_minor_formatter(NullFormatter())  # labels between decades overlap
            ax.grid(alpha=0.25)
        axes[1, column].set_xlabel("P, weights" if letter == "P" else letter)
    axes[0, 0].set_ylabel("processor time, s")
    axes[1, 0].set_ylabel("peak memory beyond the start, MB")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    axes[1, 0].legend(frameon=False, fontsize=9)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_all(runs: Runs, folder: Path) -> Iterator[str]:
    """Draw what was run, and yield the names of the files."""
    of_quality = [runs[f"quality_{case}"] for case in CASES if f"quality_{case}" in runs]
    figures: list[tuple[str, Callable[..., None], Any]] = [
        ("error", plot_heat, runs.get("error")),
        ("products", plot_products, runs.get("error")),
        *((f"quality_{case}", plot_quality, runs.get(f"quality_{case}")) for case in CASES),
        ("prior", plot_priors, of_quality),
        ("small", plot_small, of_quality),
        ("cost", plot_cost, runs.get("cost")),
    ]
    for name, draw, run in figures:
        if run:
            draw(run, folder / f"ablation_{name}.png")
            yield f"ablation_{name}.png"
