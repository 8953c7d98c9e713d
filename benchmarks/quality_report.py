"""Write the tables and plots of docs/evidence.md from the JSON of quality.py, and of the costs of run.py.

    python benchmarks/quality_report.py [FOLDER]

FOLDER (default: results/ here) holds quality_CASE.json of the cases that were run, and quick_costs.json.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cost_tables
from report import NOTHING, of_run, table, with_tables
from scores import mean_and_error

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "evidence.md"
IMAGES = HERE.parent / "docs" / "images"
TITLES = {
    "cifar10-jpeg": "ResNet-20, CIFAR-10 (JPEG)",
    "fashion-cnn": "CNN, Fashion-MNIST",
    "fashion-vit": "ViT, Fashion-MNIST",
    "mnist-cnn": "CNN, MNIST",
}
COSTS = {**TITLES, "efficientnet-lite0": "EfficientNet-Lite0, ImageNet"}
ORDER = (
    "MAP",
    "temperature scaling",
    "vector scaling",
    "constant variance (T)",
    "constant variance (T, s)",
    "last-layer variance (T)",
    "last-layer variance (T, s)",
    "last-layer full",
    "last-layer full (T, s)",
    "last-layer KFAC",
    "last-layer KFAC (T, s)",
    "last-layer diagonal",
    "last-layer diagonal (T, s)",
    "all-weights diagonal",
    "all-weights diagonal (T, s)",
    "all-weights KFAC",
    "all-weights KFAC (T, s)",
    "laplace-torch's ELLA (T)",
    "laplace-torch's ELLA (T, s)",
    "ELLA, T = 1",
    "ELLA (T)",
    "ELLA (T, s)",
    "ELLA + residual (T, s, rho)",
    "ELLA, sampled G (T, s)",
)
ELLA_COLOR, OTHER_COLOR = "#c44e52", "#4c72b0"

Run = dict[str, Any]
Runs = dict[str, Run]  # the JSON of each case; what was not run is missing
Get = Callable[[dict[str, Any]], float]


@dataclass(frozen=True)
class Found:
    """What benchmarks wrote: quality of each case, and costs of each method."""

    runs: Runs
    costs: Run | None


SCORES: dict[str, tuple[Get, str]] = {
    "NLL": (lambda row: row["nll"], ".4f"),
    "ECE": (lambda row: row["ece"], ".4f"),
    "accuracy": (lambda row: row["accuracy"], ".4f"),
    "Brier": (lambda row: row["brier"], ".4f"),
}


def over_seeds(run: Run, kind: str, name: str, get: Get) -> tuple[float, float | None]:
    """Return the mean of a score over seeds, with its standard error."""
    return mean_and_error([get(row) for row in rows_of(run, kind, name)])


def rows_of(run: Run, kind: str, name: str) -> list[dict[str, Any]]:
    """Return what is known of a method, for each seed that it was run with."""
    return [seed[kind][name] for seed in run["seeds"] if name in seed[kind]]


def shown(found: tuple[float, float | None], form: str) -> str:
    value, error = found
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def names(run: Run, kind: str) -> list[str]:
    found = list(run["seeds"][0][kind])
    return sorted(found, key=ORDER.index) if kind == "methods" else found


def title(run: Run, name: str) -> str:
    """Name a method, and say with how many seeds if not all."""
    n = len(rows_of(run, "methods", name))
    return name if n == len(run["seeds"]) else f"{name} ({n} seed{'s' * (n > 1)})"


def sets(run: Run) -> list[str]:
    return list(run["seeds"][0]["methods"]["MAP"]["auroc"])


def gap(run: Run, name: str, other: str) -> tuple[float, float]:
    """Return how much larger a method's NLL is, as means over seeds: the difference, its paired standard error."""
    found = [row["nll_minus"][other] for row in rows_of(run, "methods", name)]
    mean, error = (statistics.fmean(row[key] for row in found) for key in ("mean", "standard_error"))
    return mean, error


def difference(run: Run, name: str, other: str) -> str:
    if name == other:
        return ""
    mean, error = gap(run, name, other)
    return f"{mean:+.4f} ± {error:.4f}"


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


def note_table(run: Run) -> str:
    """Write what the library said of its own tuning, with the seeds in which it did."""
    found: dict[tuple[str, str], list[str]] = {}
    for seed in run["seeds"]:
        for name, row in seed["methods"].items():
            for note in _single(row["notes"] + row.get("notes_of_result", [])):
                found.setdefault((name, note), []).append(str(seed["seed"]))
    lines = [[name, ", ".join(seeds), note] for (name, note), seeds in found.items()]
    return table(["method", "seeds", "warning or note"], lines) if lines else "None.\n"


def _single(notes: list[str]) -> list[str]:
    """Leave out repetitions, and warnings that say several other notes at once."""
    notes = list(dict.fromkeys(" ".join(note.split()) for note in notes))
    return [note for note in notes if _rest(note, notes)]


def _rest(note: str, notes: list[str]) -> str:
    for part in notes:
        note = note if part == note else note.replace(part, "")
    return note.strip()


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


def where(runs: Runs) -> str:
    """Say what was run, with which versions and sizes."""
    if not runs:
        return NOTHING
    lines = [[name, *(_cell(get, run) for run in runs.values())] for name, get in FACTS.items()]
    return table(["", *(TITLES[name] for name in runs)], lines)


def _cell(get: Callable[[Run], Any], run: Run) -> str:
    found = get(run)
    return "" if found is None else str(found)


def _environment(key: str) -> Callable[[Run], Any]:
    return lambda run: run["environment"][key]


def _training_accuracy(run: Run) -> str:
    return shown(mean_and_error([seed["training_accuracy"] for seed in run["seeds"]]), ".4f")


def _training_seconds(run: Run) -> str | None:
    seconds = [seed["training_seconds"] for seed in run["seeds"]]
    return None if seconds[0] is None else f"{statistics.fmean(seconds):.0f}"


def _addition(one: dict[str, Any]) -> str:
    groups = ", ".join(name for name in one["groups"] if name != "simple")
    return f"{groups}: commit {one['commit'][:8]}, torch {one['torch']}, {one['cpu']}"


FACTS: dict[str, Callable[[Run], Any]] = {
    "network": lambda run: run["network"],
    "parameters": lambda run: run["parameters"],
    "images": _environment("images"),
    "training images": lambda run: run["counts"]["train"],
    "validation images": lambda run: run["counts"]["validation"],
    "test images": lambda run: run["counts"]["test"],
    "images of each other set": lambda run: run["counts"]["ood"],
    "accuracy on training images": _training_accuracy,
    "training, s": _training_seconds,
    "seeds": lambda run: len(run["seeds"]),
    "M, K, n": lambda run: ", ".join(str(n) for n in run["ella"].values()),
    "samples of the Monte-Carlo link": lambda run: run["samples"],
    "commit": _environment("commit"),
    "with uncommitted changes": lambda run: "yes" if run["environment"]["package_changed_since"] else "no",
    "CPU": _environment("cpu"),
    "GPU": lambda run: run["environment"]["gpu"] or "not used",
    "threads": _environment("threads"),
    "torch": _environment("torch"),
    "laplace-torch": _environment("laplace-torch"),
    "added later": lambda run: "; ".join(dict.fromkeys(map(_addition, run.get("added", [])))),
    "tiny sizes": lambda run: "yes" if run["environment"]["quick"] else "no",
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


def _of_qualities(write: Callable[[Runs], str], found: Found) -> str:
    return write(found.runs)


def _of_costs(name: str, found: Found) -> str:
    return cost_tables.costs_of_methods(name, found.costs)


def _where_costs(found: Found) -> str:
    return cost_tables.where(COSTS, found.costs)


TABLES: dict[str, Callable[[Found], str]] = {
    "where": partial(_of_qualities, where),
    "NLL": partial(_of_qualities, partial(summary, _nll)),
    "ECE": partial(_of_qualities, partial(summary, _ece)),
    "AUROC": partial(_of_qualities, partial(summary, _ood)),
    **{
        f"{name} {kind}": partial(_of_qualities, partial(of_run, name, write))
        for name in TITLES
        for kind, write in OF_CASE.items()
    },
    **{f"costs {name}": partial(_of_costs, name) for name in COSTS},
    "costs where": _where_costs,
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


def read(folder: Path) -> Found:
    paths = {name: folder / f"quality_{name}.json" for name in TITLES}
    runs = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    costs = folder / "quick_costs.json"
    return Found(runs, json.loads(costs.read_text()) if costs.exists() else None)


def main() -> None:
    found = read(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results")
    PAGE.write_text(with_tables(PAGE.read_text(), found, TABLES, "quality_report.py"))
    print(f"{PAGE.name}: tables of {', '.join(found.runs) or 'nothing'} written")
    for name, run in found.runs.items():
        plot(run, IMAGES / f"quality_{name}.png")
        print(f"quality_{name}.png drawn")


if __name__ == "__main__":
    main()
