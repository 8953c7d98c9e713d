"""Tables that several reports have: means over seeds, differences, notes, and what was run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.report import NOTHING, table
from benchmarks.studies.common.scores import mean_and_error

ELLA_COLOR, OTHER_COLOR = "#c44e52", "#4c72b0"

Run = dict[str, Any]  # the JSON of a run
Runs = dict[str, Run]  # by name; what was not run is missing
Get = Callable[[Run], Any]

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


def where(runs: Runs, facts: dict[str, Get], titles: dict[str, str] | None = None) -> str:
    """Say what was run, with which versions and sizes; ``titles`` are those of the columns, if not the names."""
    if not runs:
        return NOTHING
    lines = [[name, *(_cell(get(run)) for run in runs.values())] for name, get in facts.items()]
    return table(["", *((titles or {}).get(name, name) for name in runs)], lines)


def _cell(found: Any) -> str:
    return "" if found is None else str(found)


def of_environment(key: str) -> Get:
    return lambda run: run["environment"][key]


# Of the environment, whatever was run.
VERSIONS: dict[str, Get] = {
    "commit": of_environment("commit"),
    "with uncommitted changes": lambda run: "yes" if run["environment"]["package_changed_since"] else "no",
    "CPU": of_environment("cpu"),
    "GPU": lambda run: run["environment"]["gpu"] or "not used",
    "threads": of_environment("threads"),
    "torch": of_environment("torch"),
    "laplace-torch": of_environment("laplace-torch"),
}
TINY: dict[str, Get] = {"tiny sizes": lambda run: "yes" if run["environment"]["quick"] else "no"}
# Of the studies that classify images.
IMAGES: dict[str, Get] = {
    "network": lambda run: run["network"],
    "parameters": lambda run: run["parameters"],
    "images": of_environment("images"),
    "training images": lambda run: run["counts"]["train"],
    "validation images": lambda run: run["counts"]["validation"],
    "test images": lambda run: run["counts"]["test"],
    "images of each other set": lambda run: run["counts"]["ood"],
}
SIZES: dict[str, Get] = {
    "seeds": lambda run: len(run["seeds"]),
    "M, K, n": lambda run: ", ".join(str(n) for n in run["ella"].values()),
    "samples of the Monte-Carlo link": lambda run: run["samples"],
}
