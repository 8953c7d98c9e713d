"""What tables and plots of this study are made of: means over seeds and kinds, differences, curves."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.studies.common import results
from benchmarks.studies.common.scores import mean_and_error
from benchmarks.studies.common.tables import Run, Runs

NAMES = ("fashion-cnn", "cifar10-jpeg")
REFERENCE = "temperature scaling"


def read() -> Runs:
    return results.read("shift", NAMES, "shift_")


def by_severity(row: dict[str, Any], score: str) -> list[float]:
    """Return the means of a score over the kinds of corruption, at severities 0 (clean) to 5."""
    columns = zip(*row["corrupted"].values())
    return [row["clean"][score], *(statistics.fmean(of[score] for of in column) for column in columns)]


def severities(run: Run) -> list[str]:
    n = len(next(iter(run["levels"].values()))["levels"])
    return ["clean", *(f"severity {k}" for k in range(1, n + 1))]


def methods(run: Run) -> list[str]:
    return list(run["seeds"][0]["methods"])


def kinds(run: Run) -> list[str]:
    return list(run["levels"])


def of_method(run: Run, name: str) -> list[dict[str, Any]]:
    """Return what was found of a method, seed by seed."""
    return [seed["methods"][name] for seed in run["seeds"]]


def means(run: Run, name: str, score: str) -> list[float]:
    """Return a score at severities 0 to 5, as means over seeds and kinds."""
    return [
        statistics.fmean(values) for values in zip(*(by_severity(row, score) for row in of_method(run, name)))
    ]


def of_kind(row: dict[str, Any], kind: str, score: str) -> list[float]:
    return [found[score] for found in row["corrupted"][kind]]


def per_kind(run: Run, name: str, score: str) -> list[list[float]]:
    """Return the scores of the kinds, as means over seeds, at severities 0 (one score) to 5."""
    rows = of_method(run, name)
    clean = statistics.fmean(row["clean"][score] for row in rows)
    seeds = [[of_kind(row, kind, score) for kind in kinds(run)] for row in rows]
    found = [[statistics.fmean(values) for values in zip(*same)] for same in zip(*seeds)]
    return [[clean], *(list(column) for column in zip(*found))]


def gaps(run: Run, name: str) -> list[tuple[float, float | None]]:
    """Return how much larger the NLL is than the reference's at severities 0 to 5, with standard errors over seeds."""
    pairs = zip(of_method(run, name), of_method(run, REFERENCE))
    found = [
        [a - b for a, b in zip(by_severity(one, "nll"), by_severity(other, "nll"))] for one, other in pairs
    ]
    return [mean_and_error(list(values)) for values in zip(*found)]


def gaps_of_kind(run: Run, name: str, kind: str) -> tuple[float, float | None]:
    """Return the same of one kind of corruption, as means over severities."""
    pairs = zip(of_method(run, name), of_method(run, REFERENCE))
    return mean_and_error(
        [
            statistics.fmean(of_kind(one, kind, "nll")) - statistics.fmean(of_kind(other, kind, "nll"))
            for one, other in pairs
        ]
    )


def gap_over_all(run: Run, name: str) -> tuple[float, float | None]:
    """Return the same over all kinds and severities, clean images left out."""
    pairs = zip(of_method(run, name), of_method(run, REFERENCE))
    found = [[statistics.fmean(by_severity(row, "nll")[1:]) for row in pair] for pair in pairs]
    return mean_and_error([one - other for one, other in found])


def lower(run: Run, name: str, score: str) -> tuple[int, int]:
    """Return at how many pairs of kind and severity the mean score over seeds is below the reference's, and of how many."""
    found, reference = (
        [value for column in per_kind(run, of, score)[1:] for value in column] for of in (name, REFERENCE)
    )
    return sum(a < b for a, b in zip(found, reference)), len(found)


def others(run: Run) -> list[str]:
    return list(run["seeds"][0]["methods"]["MAP"]["mixed"])


def curve(run: Run, name: str, other: str) -> tuple[list[float], list[float | None], list[float]]:
    """Return the confidences, and accuracy and share kept at each, over the images of all seeds together.

    Accuracy is missing where no image is left.
    """
    found = [row["mixed"][other] for row in of_method(run, name)]
    kept = [statistics.fmean(values) for values in zip(*(of["kept"] for of in found))]
    right = [
        statistics.fmean(share * (accuracy or 0.0) for share, accuracy in values)
        for values in zip(*(zip(of["kept"], of["accuracy"]) for of in found))
    ]
    return found[0]["confidence"], [a / b if b else None for a, b in zip(right, kept)], kept
