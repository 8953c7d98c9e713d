"""Write the tables and plots of docs/tuning.md from the JSON of quality.py.

    python benchmarks/quality_report.py [FOLDER]

FOLDER (default: results/ here) holds quality_CASE.json of the cases that were run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from report import NOTHING, table, with_tables
from scores import mean_and_error

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "tuning.md"
IMAGES = HERE.parent / "docs" / "images"
NAMES = ("fashion-cnn", "fashion-vit", "cifar10-jpeg")
ELLA_COLOR, OTHER_COLOR = "#c44e52", "#4c72b0"

Run = dict[str, Any]
Runs = dict[str, Run]  # the JSON of each case; what was not run is missing
Get = Callable[[dict[str, Any]], float]

SCORES: dict[str, tuple[Get, str]] = {
    "NLL": (lambda row: row["nll"], ".4f"),
    "ECE": (lambda row: row["ece"], ".4f"),
    "accuracy": (lambda row: row["accuracy"], ".4f"),
    "Brier": (lambda row: row["brier"], ".4f"),
}


def over_seeds(run: Run, kind: str, name: str, get: Get) -> tuple[float, float | None]:
    """Return the mean of a score over seeds, with its standard error."""
    return mean_and_error([get(seed[kind][name]) for seed in run["seeds"]])


def shown(found: tuple[float, float | None], form: str) -> str:
    value, error = found
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form}}")


def names(run: Run, kind: str) -> list[str]:
    return list(run["seeds"][0][kind])


def sets(run: Run) -> list[str]:
    return list(run["seeds"][0]["methods"]["MAP"]["auroc"])


def gap(run: Run, name: str, other: str) -> tuple[float, float]:
    """Return how much larger a method's NLL is, as means over seeds: the difference, its paired standard error."""
    found = [seed["methods"][name]["nll_minus"][other] for seed in run["seeds"]]
    mean, error = (statistics.fmean(row[key] for row in found) for key in ("mean", "standard_error"))
    return mean, error


def difference(run: Run, name: str, other: str) -> str:
    if name == other:
        return ""
    mean, error = gap(run, name, other)
    return f"{mean:+.4f} ± {error:.4f}"


def score_table(run: Run) -> str:
    """Write the scores on test data."""
    references = ("MAP", "temperature scaling")
    lines = []
    for name in names(run, "methods"):
        cells = [shown(over_seeds(run, "methods", name, get), form) for get, form in SCORES.values()]
        lines.append([name, cells[0], *(difference(run, name, other) for other in references), *cells[1:]])
    head = ["method", "NLL", *(f"NLL minus that of {other}" for other in references), *list(SCORES)[1:]]
    return table(head, lines)


def ood_table(run: Run) -> str:
    """Write how well predictive entropy tells other data from test data."""
    return table(
        ["method", *sets(run)], [[name, *aurocs(run, "methods", name)] for name in names(run, "methods")]
    )


def novelty_table(run: Run) -> str:
    """Write how well novelty scores do, and whether they find the network's errors."""
    lines = []
    for name in names(run, "novelty"):
        errors = shown(over_seeds(run, "novelty", name, lambda row: row["errors"]), ".3f")
        lines.append([name, *aurocs(run, "novelty", name), errors])
    return table(["score", *sets(run), "errors on test data"], lines)


def aurocs(run: Run, kind: str, name: str) -> list[str]:
    return [
        shown(over_seeds(run, kind, name, lambda row, of=of: row["auroc"][of]), ".3f") for of in sets(run)
    ]


def setting_table(run: Run) -> str:
    """Write what tuning found, seed by seed, and what it took."""
    lines = []
    for name in names(run, "methods"):
        rows = [seed["methods"][name] for seed in run["seeds"]]
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
            for note in dict.fromkeys([*row["notes"], *row.get("notes_of_result", [])]):
                found.setdefault((name, note), []).append(str(seed["seed"]))
    lines = [[name, ", ".join(seeds), " ".join(note.split())] for (name, note), seeds in found.items()]
    return table(["method", "seeds", "warning or note"], lines) if lines else "None.\n"


def cost_table(run: Run) -> str:
    """Write what each stage of ELLA took."""
    lines = []
    for name in names(run, "times"):
        stages = [seed["times"][name] for seed in run["seeds"]]
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


def where(runs: Runs) -> str:
    """Say what was run, with which versions and sizes."""
    if not runs:
        return NOTHING
    lines = [[name, *(_cell(get, run) for run in runs.values())] for name, get in FACTS.items()]
    return table(["", *runs], lines)


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
    "changed since": lambda run: "yes" if run["environment"]["package_changed_since"] else "no",
    "CPU": _environment("cpu"),
    "GPU": lambda run: run["environment"]["gpu"] or "not used",
    "threads": _environment("threads"),
    "torch": _environment("torch"),
    "laplace-torch": _environment("laplace-torch"),
    "tiny sizes": lambda run: "yes" if run["environment"]["quick"] else "no",
}
OF_CASE = {
    "scores": score_table,
    "ood": ood_table,
    "novelty": novelty_table,
    "settings": setting_table,
    "notes": note_table,
    "costs": cost_table,
}


def _of_case(name: str, write: Callable[[Run], str], runs: Runs) -> str:
    return write(runs[name]) if name in runs else NOTHING


TABLES: dict[str, Callable[[Runs], str]] = {
    "where": where,
    **{f"{name} {kind}": partial(_of_case, name, write) for name in NAMES for kind, write in OF_CASE.items()},
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
    axes[1].set_xscale("symlog", linthresh=0.01)
    axes[1].axvline(0, color="black", lw=0.8)
    for ax, of in zip(axes[2:], others):
        found = [over_seeds(run, "methods", name, lambda row, of=of: row["auroc"][of]) for name in methods]
        for place, color, (value, error) in zip(places, colors, found):
            ax.errorbar(value, place, xerr=error, fmt="o", color=color, capsize=2)
        ax.set_title(f"AUROC,\n{of}")
    axes[0].invert_yaxis()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def read(folder: Path) -> Runs:
    paths = {name: folder / f"quality_{name}.json" for name in NAMES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def main() -> None:
    runs = read(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results")
    PAGE.write_text(with_tables(PAGE.read_text(), runs, TABLES, "quality_report.py"))
    print(f"{PAGE.name}: tables of {', '.join(runs) or 'nothing'} written")
    for name, run in runs.items():
        plot(run, IMAGES / f"quality_{name}.png")
        print(f"quality_{name}.png drawn")


if __name__ == "__main__":
    main()
