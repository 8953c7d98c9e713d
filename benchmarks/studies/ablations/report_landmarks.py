"""Tables of how landmarks are chosen: differences to uniform ones, paired over seeds, and what choosing takes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from scipy.stats import t as student

from benchmarks.report import table
from benchmarks.studies.common import tables
from benchmarks.studies.common.scores import mean_and_error
from benchmarks.studies.common.tables import Run

CASES = ("digits", "fashion-cnn", "cifar10-jpeg")
UNIFORM = "uniform"
OF_POOL = ("pivoted Cholesky", "pivoted Cholesky, random", "leverage")

Get = Callable[[dict[str, Any]], float]


def columns(run: Run) -> dict[str, tuple[Get, str]]:
    """Return what is compared, with its format; covariances only where there are exact ones."""
    found: dict[str, tuple[Get, str]] = {
        "retained trace": (lambda row: row["retained"], ".3f"),
        "captured at test inputs": (lambda row: row["captured"], ".4f"),
    }
    for i, product in enumerate(run["products"] if run["exact"] else ()):
        found[f"covariance error, T δ = {product:g}"] = (lambda row, i=i: row["errors"][i], ".4f")
    for name, words in {"T": "T tuned", "T, s": "T and s tuned"}.items():
        found[f"NLL, {words}"] = (lambda row, name=name: row["methods"][name]["nll"], ".5f")
    return found


def by_seed(run: Run, scheme: str, m: int, k: int) -> list[dict[str, Any]]:
    """Return the rows of a way to choose, in the order of the seeds."""
    wanted = {"scheme": scheme, "M": m, "K": k}
    return [
        row
        for seed in run["seeds"]
        for row in seed["rows"]
        if all(row[key] == value for key, value in wanted.items())
    ]


def difference(values: list[float], reference: list[float], form: str) -> str:
    """Return the mean of paired differences with its standard error, in bold where it is not noise.

    That is, where a two-sided test of Student's t at 5 % says so; of a table's many cells a few will by chance.
    """
    gaps = [a - b for a, b in zip(values, reference)]
    mean = statistics.fmean(gaps)
    if len(gaps) == 1:
        return f"{mean:+{form}}"
    error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    text = f"{mean:+{form}} ± {error:{form}}"
    return f"**{text}**" if abs(mean) > student.ppf(0.975, len(gaps) - 1) * error else text


def compared(run: Run) -> str:
    """Write for each K and M what uniform landmarks reach, and the differences of other ways to it."""
    pool, of = run["counts"]["pool"], columns(run)
    others = [name for name in run["seeds"][0]["seconds"] if name != UNIFORM]
    lines = []
    for k in run["K"]:
        for m in run["M"]:
            reference = by_seed(run, UNIFORM, m, k)
            cells = [
                tables.shown(mean_and_error([get(row) for row in reference]), form)
                for get, form in of.values()
            ]
            lines.append([str(k), str(m), UNIFORM, *cells])
            rows = {name: by_seed(run, name, m, k) for name in others}
            rows[f"uniform, M = {pool}"] = by_seed(run, UNIFORM, pool, k)
            for name, found in rows.items():
                cells = [
                    difference([get(row) for row in found], [get(row) for row in reference], form)
                    for get, form in of.values()
                ]
                lines.append(["", "", name, *cells])
    return table(["K", "M", "landmarks", *of], lines)


def setting(run: Run) -> str:
    """Say what was compared."""
    counts, simple = run["counts"], run["simple"]
    exact = ""
    if run["exact"]:
        exact = f"exact covariance of {run['exact']}, at {run['compared']} test images; "
    used = f"{counts['train']} training images, {counts['curvature']} curvature inputs, {counts['validation']} validation"
    return (
        f"{run['title']}, {run['parameters']} weights; {used} and {counts['test']} test images of {run['images']}; a pool of "
        f"{counts['pool']}; {exact}{len(run['seeds'])} seeds. NLL of MAP {simple['MAP']['nll']:.4f}, of temperature scaling "
        f"{simple['temperature scaling']['nll']:.4f}.\n"
    )


def cost(runs: dict[str, Run]) -> str:
    """Write what each way takes, for the largest M: gradients, and processor time of choosing."""
    first = next(iter(runs.values()))
    lines = []
    for name in first["seeds"][0]["seconds"]:
        gradients = "the pool's, and M in the fit" if name in OF_POOL else "M in the fit"
        cells = []
        for run in runs.values():
            pool = [seed["kernel"] if name in OF_POOL else 0.0 for seed in run["seeds"]]
            seconds = statistics.fmean(s["seconds"][name] + p for s, p in zip(run["seeds"], pool))
            cells.append(f"{seconds:.2f}")
        lines.append([name, gradients, *cells])
    head = [f"s, {run['title']}, M = {run['M'][-1]}" for run in runs.values()]
    return table(["landmarks", "gradients", *head], lines)
