"""Tables and plots of docs/evidence.md, from the JSON of this study, and of the costs of benchmarks.run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import NOTHING, of_run, table
from benchmarks.studies.common import tables
from benchmarks.studies.common.grid_search import searches
from benchmarks.studies.common.results import COSTS as FOLDER_OF_COSTS
from benchmarks.studies.common.results import DOCS, IMAGES, write_page
from benchmarks.studies.common.results import read as read_runs
from benchmarks.studies.common.scores import mean_and_error
from benchmarks.studies.common.tables import (
    ELLA_COLOR,
    OTHER_COLOR,
    SCORES,
    Run,
    Runs,
    difference,
    gap,
    note_table,
    over_seeds,
    rows_of,
    shown,
)
from benchmarks.studies.quality import costs

PAGE = DOCS / "evidence.md"
TITLES = {
    "cifar10-jpeg": "ResNet-20, CIFAR-10 (JPEG)",
    "fashion-cnn": "CNN, Fashion-MNIST",
    "fashion-vit": "ViT, Fashion-MNIST",
    "mnist-cnn": "CNN, MNIST",
}
COSTS = {**TITLES, "efficientnet-lite0": "EfficientNet-Lite0, ImageNet"}
# Posteriors of which the grid has been searched with T, and with T and s.
TWICE = (
    *("constant variance (T)", "last-layer variance (T)", "last-layer full", "last-layer KFAC"),
    *("last-layer diagonal", "all-weights diagonal", "all-weights KFAC", "laplace-torch's ELLA (T)"),
)
ORDER = (
    *("MAP", "temperature scaling", "vector scaling"),
    *(row for name in TWICE for row, _ in searches(name)),
    *("ELLA, T = 1", "ELLA (T)", "ELLA (T, s)", "ELLA + residual (T, s, rho)", "ELLA, sampled G (T, s)"),
)


@dataclass(frozen=True)
class Found:
    """What benchmarks wrote: quality of each case, and costs of each method."""

    runs: Runs
    costs: Run | None


def names(run: Run, kind: str) -> list[str]:
    found = list(run["seeds"][0][kind])
    return sorted(found, key=ORDER.index) if kind == "methods" else found


def title(run: Run, name: str) -> str:
    """Name a method, and say with how many seeds if not all."""
    n = len(rows_of(run, "methods", name))
    return name if n == len(run["seeds"]) else f"{name} ({n} seed{'s' * (n > 1)})"


def sets(run: Run) -> list[str]:
    return list(run["seeds"][0]["methods"]["MAP"]["auroc"])


def figure(run: Run) -> str:
    """Write the link to what ``plot`` draws."""
    return f"![NLL and AUROC of each method](images/quality_{run['case']}.png)\n"


def score_table(run: Run) -> str:
    """Write the scores on test data."""
    references = ("MAP", "temperature scaling")
    lines = []
    for name in names(run, "methods"):
        cells = [shown(over_seeds(run, "methods", name, get), form) for get, form in SCORES.values()]
        lines.append(
            [title(run, name), cells[0], *(difference(run, name, other) for other in references), *cells[1:]]
        )
    head = ["method", "NLL", *(f"NLL minus that of {other}" for other in references), *list(SCORES)[1:]]
    return table(head, lines)


def ood_table(run: Run) -> str:
    """Write how well predictive entropy tells other data from test data."""
    return table(["method", *sets(run)], [[name, *aurocs(run, name)] for name in names(run, "methods")])


def novelty_table(run: Run) -> str:
    """Write how well novelty scores do, and whether they find the network's errors."""
    lines = []
    for name in names(run, "novelty"):
        # A small norm is what is unusual.
        sign = "minus " if name == "last-layer squared norm" else ""
        rows, cells = rows_of(run, "novelty", name), []
        for of in [*sets(run), "errors"]:
            values = [row["errors"] if of == "errors" else row["auroc"][of] for row in rows]
            cells.append(shown(mean_and_error([1 - v if sign else v for v in values]), ".3f"))
        lines.append([sign + name, *cells])
    return table(["score", *sets(run), "errors on test data"], lines)


def aurocs(run: Run, name: str) -> list[str]:
    rows = rows_of(run, "methods", name)
    return [
        shown(mean_and_error([row["auroc"][of] for row in rows]), ".3f") if of in rows[0]["auroc"] else ""
        for of in sets(run)
    ]


def setting_table(run: Run) -> str:
    """Write what tuning found, seed by seed, and what it took."""
    lines = []
    for name in names(run, "methods"):
        rows = rows_of(run, "methods", name)
        scores = [row["validation_nll"] for row in rows if row.get("validation_nll") is not None]
        lines.append(
            [
                name,
                "; ".join(
                    _setting(key, [row["parameters"][key] for row in rows]) for key in rows[0]["parameters"]
                ),
                " / ".join(f"{score:.4f}" for score in scores),
                f"{statistics.fmean(row['seconds'] for row in rows):.2g}",
            ]
        )
    return table(["method", "setting, by seed", "validation NLL, by seed", "seconds"], lines)


def _setting(key: str, values: list[Any]) -> str:
    words = key.replace("_", " ")
    if isinstance(values[0], list):
        return f"{words}: {len(values[0])} numbers"
    return f"{words} " + ", ".join(f"{value:.3g}" for value in values)


def cost_table(run: Run) -> str:
    """Write what each stage of ELLA took."""
    lines = []
    for name in names(run, "times"):
        stages = rows_of(run, "times", name)
        means = {key: statistics.fmean(stage[key] for stage in stages) for key in stages[0]}
        lines.append(
            [
                name,
                f"{means['inputs']:.0f}",
                f"{means['seconds']:.3g}",
                f"{means['forwards']:.3g}",
                f"{means['forwards_an_input']:.3g}",
            ]
        )
    return table(["stage", "inputs", "seconds", "forwards", "forwards an input"], lines)


def summary(write: Callable[[Run, str], str], runs: Runs) -> str:
    """Write one number of each method, a column a network."""
    if not runs:
        return NOTHING
    lines = [
        [
            name,
            *(
                write(run, name) if name in names(run, "methods") else absent(of, name)
                for of, run in runs.items()
            ),
        ]
        for name in ORDER
        if any(name in names(run, "methods") for run in runs.values())
    ]
    return table(["method", *(TITLES[name] for name in runs)], lines)


def absent(case: str, name: str) -> str:
    """Say why a method has no score: laplace-torch's KFAC refuses the raw parameters of the ViT."""
    return "does not run" if case == "fashion-vit" and "all-weights KFAC" in name else "not measured"


def _nll(run: Run, name: str) -> str:
    return shown(over_seeds(run, "methods", name, SCORES["NLL"][0]), ".4f")


def _ece(run: Run, name: str) -> str:
    return shown(over_seeds(run, "methods", name, SCORES["ECE"][0]), ".4f")


def _ood(run: Run, name: str) -> str:
    chosen = sets(run)[:2]
    return " / ".join(
        f"{over_seeds(run, 'methods', name, lambda row, of=of: row['auroc'][of])[0]:.3f}" for of in chosen
    )


def _training_accuracy(run: Run) -> str:
    return shown(mean_and_error([seed["training_accuracy"] for seed in run["seeds"]]), ".4f")


def _training_seconds(run: Run) -> str | None:
    seconds = [seed["training_seconds"] for seed in run["seeds"]]
    return None if seconds[0] is None else f"{statistics.fmean(seconds):.0f}"


def _addition(one: dict[str, Any]) -> str:
    groups = ", ".join(name for name in one["groups"] if name != "simple")
    return f"{groups}: commit {one['commit'][:8]}, torch {one['torch']}, {one['cpu']}"


FACTS = {
    **tables.IMAGES,
    "accuracy on training images": _training_accuracy,
    "training, s": _training_seconds,
    **tables.SIZES,
    **tables.VERSIONS,
    "added later": lambda run: "; ".join(dict.fromkeys(map(_addition, run.get("added", [])))),
    **tables.TINY,
}
OF_CASE = {
    "figure": figure,
    "scores": score_table,
    "ood": ood_table,
    "novelty": novelty_table,
    "settings": setting_table,
    "notes": note_table,
    "costs": cost_table,
}


def _of_runs(write: Callable[[Runs], str], found: Found) -> str:
    return write(found.runs)


TABLES: dict[str, Callable[[Found], str]] = {
    "where": partial(_of_runs, partial(tables.where, facts=FACTS, titles=TITLES)),
    "NLL": partial(_of_runs, partial(summary, _nll)),
    "ECE": partial(_of_runs, partial(summary, _ece)),
    "AUROC": partial(_of_runs, partial(summary, _ood)),
    **{
        f"{name} {kind}": partial(_of_runs, partial(of_run, name, write))
        for name in TITLES
        for kind, write in OF_CASE.items()
    },
    **{f"costs {name}": lambda found, name=name: costs.costs_of_methods(name, found.costs) for name in COSTS},
    "costs where": lambda found: costs.where(COSTS, found.costs),
}


def plot(run: Run, path: Path) -> None:
    """Draw NLL, its difference to temperature scaling's, and AUROC on every other set, a line a method."""
    import matplotlib.pyplot as plt

    methods, others = names(run, "methods"), sets(run)
    fig, axes = plt.subplots(
        1,
        2 + len(others),
        figsize=(5.2 + 1.7 * len(others), 0.9 + 0.3 * len(methods)),
        sharey=True,
        layout="constrained",
        width_ratios=[1.5, 1.5] + [1] * len(others),
    )
    places = range(len(methods))
    colors = [ELLA_COLOR if name.startswith("ELLA") else OTHER_COLOR for name in methods]
    nlls = [over_seeds(run, "methods", name, SCORES["NLL"][0]) for name in methods]
    gaps = [gap(run, name, "temperature scaling") for name in methods]
    for place, color, nll, difference_ in zip(places, colors, nlls, gaps):
        axes[0].errorbar(nll[0], place, xerr=nll[1], fmt="o", color=color, capsize=2)
        axes[1].errorbar(difference_[0], place, xerr=difference_[1], fmt="o", color=color, capsize=2)
    axes[0].set(title="NLL", yticks=places, yticklabels=methods)
    axes[1].set_title("NLL minus that of\ntemperature scaling")
    if max(abs(mean) for mean, _ in gaps) > 0.05:
        axes[1].set_xscale("symlog", linthresh=0.01)
    for ax in axes:
        if ax.get_xscale() == "linear":
            ax.locator_params(axis="x", nbins=3)
    axes[1].axvline(0, color="black", lw=0.8)
    for ax, of in zip(axes[2:], others):
        for place, color, name in zip(places, colors, methods):
            if of not in rows_of(run, "methods", name)[0]["auroc"]:
                continue
            value, error = over_seeds(run, "methods", name, lambda row, of=of: row["auroc"][of])
            ax.errorbar(value, place, xerr=error, fmt="o", color=color, capsize=2)
        ax.set_title(f"AUROC,\n{of}")
    axes[0].invert_yaxis()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def read() -> Found:
    path = FOLDER_OF_COSTS / "quick_costs.json"
    return Found(
        read_runs("quality", TITLES, "quality_"), json.loads(path.read_text()) if path.exists() else None
    )


def main() -> None:
    from benchmarks.studies.quality import readme

    found = read()
    write_page(PAGE, "quality/report.py", found, TABLES)
    for name, run in found.runs.items():
        plot(run, IMAGES / f"quality_{name}.png")
        print(f"quality_{name}.png drawn")
    readme.main()
