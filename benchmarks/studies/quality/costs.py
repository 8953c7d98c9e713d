"""What each method costs by its own calls, from the JSON of benchmarks.run's costs-..., for reports."""

from __future__ import annotations

from typing import Any

from benchmarks.report import NOTHING, plain, table
from benchmarks.studies.common.tables import Run

# What a process says that was stopped at a limit, in part.
FAILURES = {
    "exit code -24": "out of processor time",
    "exit code -9": "killed at a limit",
    "TimeoutError: stopped after": "out of processor time",
    "can't allocate memory": "out of memory",
    "NotImplementedError: Found parameters in un-supported layers.": "refuses its layers",
}
STAGES = {
    "fit": "fit, forwards an input",
    "grid search": "search of 100 priors, forwards a validation input",
    "joint search": "search of T and s, forwards a validation input",
    "predict": "prediction, forwards an input",
}


def by_stage(name: str, costs: Run) -> dict[str, dict[str, Any]]:
    """Return the rows of each method's stages."""
    found: dict[str, dict[str, Any]] = {}
    for row in costs["results"]:
        if row["group"] == f"costs-{name}":
            found.setdefault(row.get("method") or row["part"], {})[row.get("stage", "fit")] = row
    return found


def costs_of_methods(name: str, costs: Run | None) -> str:
    """Write what each method costs by its own calls: fit, searches, prediction, memory."""
    found = by_stage(name, costs) if costs else {}
    if not found:
        return NOTHING
    lines = [
        [method, *(stage_cell(stages, stage) for stage in STAGES), _peak(stages)]
        for method, stages in found.items()
    ]
    return table(["method", *STAGES.values(), "peak memory, GB"], lines)


def stage_cell(stages: dict[str, Any], stage: str) -> str:
    """Return the forwards an input of one stage, or why there is no number."""
    row = stages.get(stage)
    if row is None:
        return ""
    if row["value"] is None:
        return next((words for said, words in FAILURES.items() if said in row["failure"]), row["failure"])
    return f"{row['value'] * (100 / row['candidates'] if row.get('candidates') else 1):.3g}"


def _peak(stages: dict[str, Any]) -> str:
    peaks = [row["peak_gb"] for row in stages.values() if row.get("peak_gb") is not None]
    return f"{max(peaks):.2f}" if peaks else ""


# Of a run's environment.
FACTS = {
    "commit": "commit",
    "package_changed_since": "with uncommitted changes",
    "cpu": "CPU",
    "threads": "threads",
    "python": "Python",
    "torch": "torch",
    "laplace-torch": "laplace-torch",
}


def where(titles: dict[str, str], costs: Run | None) -> str:
    """Say with which versions, and on what, the costs of the networks with these titles were measured."""
    measured = {row["group"] for row in costs["results"]} if costs else set()
    groups = {f"costs-{name}": title for name, title in titles.items() if f"costs-{name}" in measured}
    if not costs or not groups:
        return NOTHING
    run = [environment_of(group, costs) for group in groups]
    lines = [[words, *(plain(about.get(key)) for about in run)] for key, words in FACTS.items()]
    return table(["", *groups.values()], lines)


def environment_of(group: str, costs: Run) -> Run:
    """Return where a group of rows was measured: by what was added last, if it was."""
    for added in reversed(costs.get("added", [])):
        if group in added["only"]:
            return added
    return costs["environment"]
