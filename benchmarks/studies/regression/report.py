"""Tables and plots of docs/regression.md, from the JSON of this study."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import of_run, table
from benchmarks.studies.common import tables
from benchmarks.studies.common.results import DOCS, IMAGES, write_page
from benchmarks.studies.common.results import read as read_runs
from benchmarks.studies.common.scores import mean_and_error
from benchmarks.studies.common.tables import (
    ELLA_COLOR,
    OTHER_COLOR,
    Get,
    Run,
    Runs,
    difference,
    gap,
    note_table,
    over_seeds,
    shown,
)

PAGE = DOCS / "regression.md"
NAMES = ("flights", "concrete")
REFERENCE = "MAP, tuned noise"


def _coverage(level: str) -> tuple[Get, str]:
    return lambda row: row["coverage"][level], ".3f"


SCORES: dict[str, tuple[Get, str]] = {
    "NLL": (lambda row: row["nll"], ".4f"),
    "NLL, original unit": (lambda row: row["nll_of_original_unit"], ".3f"),
    "CRPS": (lambda row: row["crps"], ".3f"),
    "calibration error": (lambda row: row["calibration_error"], ".4f"),
    "in the 50 % interval": _coverage("0.5"),
    "in the 90 % interval": _coverage("0.9"),
    "in the 95 % interval": _coverage("0.95"),
}


def names(run: Run, kind: str) -> list[str]:
    return list(run["seeds"][0][kind])


def score_table(run: Run) -> str:
    """Write the scores on test rows."""
    lines = []
    for name in names(run, "methods"):
        nll, *cells = [shown(over_seeds(run, "methods", name, get), form) for get, form in SCORES.values()]
        lines.append([name, nll, difference(run, name, REFERENCE), *cells])
    return table(["method", "NLL", f"NLL minus that of {REFERENCE}", *list(SCORES)[1:]], lines)


def sets(run: Run) -> list[str]:
    return list(run["seeds"][0]["methods"][REFERENCE]["auroc"])


def aurocs(run: Run, kind: str, name: str) -> list[str]:
    gets: list[Get] = [lambda row, of=of: row["auroc"][of] for of in sets(run)]
    return [shown(over_seeds(run, kind, name, get), ".3f") for get in [*gets, lambda row: row["errors"]]]


def ood_table(run: Run) -> str:
    """Write how well variances and other scores tell unusual inputs, and large errors, from the rest."""
    lines = [[name, *aurocs(run, kind, name)] for kind in ("methods", "novelty") for name in names(run, kind)]
    return table(["variance, or score", *sets(run), "largest tenth of test errors"], lines)


def shift_table(run: Run) -> str:
    """Write the scores on real rows unlike the training data."""
    shifted = list(run["seeds"][0]["methods"][REFERENCE]["shifted"])
    lines = []
    for name in names(run, "methods"):
        cells = []
        for of in shifted:
            for key, form in (("nll", ".3f"), ("coverage_of_0.9", ".3f")):
                found = over_seeds(run, "methods", name, lambda row, of=of, key=key: row["shifted"][of][key])
                cells.append(shown(found, form))
        lines.append([name, *cells])
    heads = [f"{what}, {of}" for of in shifted for what in ("NLL", "in the 90 % interval")]
    return table(["method", *heads], lines)


def setting_table(run: Run) -> str:
    """Write what tuning found, seed by seed, how many settings it tried, and what it would cost in the library."""
    lines = []
    for name in names(run, "methods"):
        rows = [seed["methods"][name] for seed in run["seeds"]]
        found = "; ".join(
            f"{key.replace('_', ' ')} " + ", ".join(f"{row['parameters'][key]:.2g}" for row in rows)
            for key in rows[0]["parameters"]
        )
        scores = " / ".join(f"{row['validation_nll']:.4f}" for row in rows)
        counts = [
            f"{rows[0][key]}" if key in rows[0] else "" for key in ("settings", "passes_of_its_own_search")
        ]
        lines.append([name, found, scores, *counts])
    head = ["method", "setting, by seed", "validation NLL, by seed", "settings tried"]
    return table([*head, "passes of the library's own search"], lines)


def cost_table(run: Run) -> str:
    """Write what each method takes to fit, tune and predict, and the memory of a fit."""
    lines = []
    for name in names(run, "methods"):
        fit = name if name in run["memory"] else name.split(": ")[0]
        prediction = _forwards(run, f"predict: {name}")
        if prediction is None:  # nothing to fit, or ELLA's features searched in another way
            continue
        passes = run["seeds"][0]["methods"][name]["passes_of_its_own_search"]
        numbers = [
            _forwards(run, f"fit: {fit}"),
            _forwards(run, f"tune: {name}"),
            passes * prediction if passes > 1 else None,
            prediction,
            run["memory"][fit]["peak_gb"],
        ]
        lines.append([name, *("" if number is None else f"{number:.3g}" for number in numbers)])
    lines += [[name, row["failure"], *[""] * 4] for name, row in run["memory"].items() if "failure" in row]
    head = ["method", "fit, forwards a training row", "tuning, forwards a validation row"]
    return table(
        [
            *head,
            "the same by one call a setting",
            "prediction, forwards a row",
            "peak extra memory of the fit, GB",
        ],
        lines,
    )


def _forwards(run: Run, stage: str) -> float | None:
    """Return the median over seeds."""
    found = [seed["times"][stage]["forwards_an_input"] for seed in run["seeds"] if stage in seed["times"]]
    return statistics.median(found) if found else None


def _over_seeds(get: Callable[[Any], float], form: str) -> Callable[[Run], str]:
    return lambda run: shown(mean_and_error([get(seed) for seed in run["seeds"]]), form)


def _unlike(run: Run) -> str:
    return "; ".join(f"{name}: {count}" for name, count in run["held_out"].items())


def _sizes(run: Run) -> str:
    return "; ".join(", ".join(str(n) for n in size.values()) for size in run["ella"].values())


FACTS: dict[str, Get] = {
    "rows": lambda run: run["rows"],
    "inputs": lambda run: ", ".join(run["inputs"]),
    "unit of the target": lambda run: run["unit"],
    "standard deviation of the target": _over_seeds(lambda seed: seed["scale"], ".2f"),
    "rows kept away from training": _unlike,
    "training rows": lambda run: run["seeds"][0]["rows"]["train"],
    "rows for stopping, validation, test": lambda run: ", ".join(
        str(run["counts"][key]) for key in ("stop", "validation", "test")
    ),
    "network": lambda run: run["network"],
    "parameters": lambda run: run["parameters"],
    "test RMSE, standardised": _over_seeds(lambda seed: seed["rmse"]["test"], ".4f"),
    "test RMSE, original unit": _over_seeds(lambda seed: seed["rmse"]["test"] * seed["scale"], ".3f"),
    "training, s of processor time": _over_seeds(lambda seed: seed["training_seconds"], ".1f"),
    "seeds": lambda run: len(run["seeds"]),
    "M, K, n of each ELLA": _sizes,
    **{name: get for name, get in tables.VERSIONS.items() if name != "GPU"},
    **tables.TINY,
}
OF_TASK: dict[str, Callable[[Run], str]] = {
    "scores": score_table,
    "shift": shift_table,
    "ood": ood_table,
    "settings": setting_table,
    "notes": note_table,
    "costs": cost_table,
}


TABLES: dict[str, Callable[[Runs], str]] = {
    "where": partial(tables.where, facts=FACTS),
    **{f"{name} {kind}": partial(of_run, name, write) for name in NAMES for kind, write in OF_TASK.items()},
}


def plot(run: Run, path: Path) -> None:
    """Draw each method's NLL beside that of tuned noise, the share in its intervals, and its AUROCs."""
    import matplotlib.pyplot as plt

    methods, outside = names(run, "methods"), sets(run)
    panels: list[tuple[str, Get | None, float]] = [
        (f"NLL minus that of\n{REFERENCE}", None, 0),
        ("share in the\n90 % interval", SCORES["in the 90 % interval"][0], 0.9),
        *((f"AUROC,\n{of}", lambda row, of=of: row["auroc"][of], 0.5) for of in outside),
        ("AUROC,\nlargest errors", lambda row: row["errors"], 0.5),
    ]
    fig, axes = plt.subplots(
        1,
        len(panels),
        figsize=(5.4 + 1.6 * len(panels), 1.2 + 0.27 * len(methods)),
        sharey=True,
        layout="constrained",
        width_ratios=[1.7] + [1] * (len(panels) - 1),
    )
    for ax, (title, get, reference) in zip(axes, panels):
        ax.axvline(reference, color="black", lw=0.8)
        for place, name in enumerate(methods):
            value, error = gap(run, name, REFERENCE) if get is None else over_seeds(run, "methods", name, get)
            color = ELLA_COLOR if name.startswith("ELLA") else OTHER_COLOR
            ax.errorbar(value, place, xerr=error, fmt="o", color=color, capsize=2, ms=4)
        ax.set_title(title, fontsize="small")
        if title.startswith("AUROC"):
            ax.set_xlim(0.2, 1.05)
        ax.grid(axis="y", color="0.92")
    axes[0].set(yticks=range(len(methods)), yticklabels=methods)
    axes[0].invert_yaxis()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def read() -> Runs:
    runs = read_runs("regression", NAMES, "regression_")
    for row in (row for run in runs.values() for seed in run["seeds"] for row in seed["methods"].values()):
        row.setdefault("notes", [])  # only searches of the package leave some
    return runs


def main() -> None:
    runs = read()
    write_page(PAGE, "regression/report.py", runs, TABLES)
    for name, run in runs.items():
        plot(run, IMAGES / f"regression_{name}.png")
        print(f"regression_{name}.png drawn")
