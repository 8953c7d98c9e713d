"""Tables of docs/evidence.md, docs/ablations.md and docs/choosing.md, from the JSON of this study."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from benchmarks.report import NOTHING, of_run, table
from benchmarks.studies.common import results, tables
from benchmarks.studies.common.results import DOCS, write_page
from benchmarks.studies.common.scores import mean_and_error
from benchmarks.studies.common.tables import Run, Runs
from benchmarks.studies.quality.report import TITLES

SCRIPT = "choice/report.py"
EVIDENCE, ABLATIONS, CHOOSING = (DOCS / f"{name}.md" for name in ("evidence", "ablations", "choosing"))
CLEAR = 2  # standard errors
OTHERS = {"best": "the best", "temperature scaling": "temperature scaling"}


def cases(runs: Runs) -> list[tuple[str, dict[str, Any]]]:
    """Return each network's title with what was measured, seed by seed."""
    return [(TITLES[name], seed) for name, run in runs.items() for seed in run["seeds"]]


def gap(found: dict[str, float]) -> str:
    return f"{found['mean']:+.4f} ± {found['standard_error']:.4f}"


def is_clear(found: dict[str, float], sign: int = 1) -> bool:
    """Tell whether a difference is positive (or with -1 negative) by more than two standard errors."""
    return sign * found["mean"] > CLEAR * found["standard_error"]


def over_seeds(found: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the means over seeds of differences and of their paired standard errors."""
    found = list(found)
    return {key: statistics.fmean(one[key] for one in found) for key in ("mean", "standard_error")}


def choice(runs: Runs) -> str:
    """Write what was chosen for each network and seed, and how far it is from the best."""
    if not runs:
        return NOTHING
    lines, autos = [], []
    for title, seed in cases(runs):
        one = seed["choice"]
        auto = one["methods"]["auto"]
        autos.append(auto["minus"])
        cells = [f"{auto['nll']:.4f}", *(gap(auto["minus"][of]) for of in OTHERS)]
        lines.append([title, str(seed["seed"]), one["chosen"], one["best"], *cells])
    head = ["network", "seed", "chosen", "best on test images", "NLL of the choice"]
    rows = table([*head, *(f"minus that of {words}" for words in OTHERS.values())], lines)
    return rows + "\n" + _verdict(autos)


def _verdict(autos: list[dict[str, dict[str, float]]]) -> str:
    within = [of for of in (one["best"] for one in autos) if of["mean"] <= of["standard_error"]]
    beyond = sorted((one["best"]["mean"] for one in autos if one["best"] not in within), reverse=True)
    worse, better = (sum(is_clear(one["temperature scaling"], sign) for one in autos) for sign in (1, -1))
    further = (
        f" (in the others it is behind by {', '.join(f'{gap:.4f}' for gap in beyond)})" if beyond else ""
    )
    return (
        f"In {len(within)} of {len(autos)} cases the choice is within one paired standard error of the best of the table on test "
        f"images{further}. It is worse than temperature scaling by more than {CLEAR} standard errors in {worse}, and better by more in {better}.\n"
    )


def methods(runs: Runs) -> str:
    """Write the NLL of every method, and how much that is above temperature scaling's."""
    if not runs:
        return NOTHING
    names = list(next(iter(runs.values()))["seeds"][0]["choice"]["methods"])
    lines = [[name, *(_method(run, name) for run in runs.values())] for name in names]
    return table(["method", *(TITLES[name] for name in runs)], lines)


def _method(run: Run, name: str) -> str:
    rows = [seed["choice"]["methods"][name] for seed in run["seeds"]]
    score = tables.shown(mean_and_error([row["nll"] for row in rows]), ".4f")
    if name == "temperature scaling":
        return score
    return f"{score} ({gap(over_seeds(row['minus']['temperature scaling'] for row in rows))})"


def ranks(run: Run) -> str:
    """Write probabilities and novelty of each number of directions."""
    lines = []
    for rows in zip(*(seed["ranks"] for seed in run["seeds"])):
        cells = [str(rows[0]["K"]), _mean(rows, lambda row: row["retained"], ".3f")]
        for name in ("T", "T, s"):
            found = [row["methods"][name] for row in rows]
            minus = over_seeds(one["minus"] for one in found)
            cells += [
                _mean(found, lambda one: one["nll"], ".4f"),
                gap(minus) if minus["standard_error"] else "",
            ]
            cells += [_mean(found, lambda one: one["ece"], ".4f")]
        for of in rows[0]["novelty"]:
            cells += [_mean(rows, lambda row, of=of: row["methods"]["T, s"]["auroc"][of], ".3f")]
            cells += [_mean(rows, lambda row, of=of: row["novelty"][of], ".3f")]
        lines.append(cells)
    columns = [
        f"{words}, {of}" for of in ("T", "T and s") for words in ("NLL", "minus that of the first K", "ECE")
    ]
    sets = run["seeds"][0]["ranks"][0]["novelty"]
    return table(
        [
            "K",
            "trace",
            *columns,
            *(f"{words}, {of}" for of in sets for words in ("AUROC of the entropy", "of novelty")),
        ],
        lines,
    )


def _mean(rows: Iterable[Any], get: Callable[[Any], float], form: str) -> str:
    return tables.shown(mean_and_error([get(row) for row in rows]), form)


def defaults(runs: Runs) -> str:
    """Write what ways to T without validation data do to the NLL of the network."""
    if not runs:
        return NOTHING
    lines = []
    for name in next(iter(runs.values()))["seeds"][0]["defaults"]:
        found = {title: [seed["defaults"][name] for seed in run["seeds"]] for title, run in runs.items()}
        if name == "MAP":
            cells = [_mean(rows, lambda row: row["nll"], ".4f") for rows in found.values()]
            lines.append([name, *cells, "", ""])
            continue
        all_rows = [row["minus"] for rows in found.values() for row in rows]
        counts = [f"{sum(is_clear(one, sign) for one in all_rows)} of {len(all_rows)}" for sign in (1, -1)]
        lines.append(
            [name, *(gap(over_seeds(row["minus"] for row in rows)) for rows in found.values()), *counts]
        )
    return table(["way", *(TITLES[name] for name in runs), "clearly worse", "clearly better"], lines)


FACTS = {
    **tables.IMAGES,
    **tables.SIZES,
    "seeds": lambda run: ", ".join(str(seed["seed"]) for seed in run["seeds"]),
    **tables.VERSIONS,
}
OF_EVIDENCE: dict[str, Callable[[Runs], str]] = {
    "choice": choice,
    "choice methods": methods,
    "choice where": partial(tables.where, facts=FACTS, titles=TITLES),
}
OF_ABLATIONS: dict[str, Callable[[Runs], str]] = {
    f"{name} ranks": partial(of_run, name, ranks) for name in TITLES
}
OF_CHOOSING: dict[str, Callable[[Runs], str]] = {"defaults": defaults}


def read() -> Runs:
    return results.read("choice", TITLES, "choice_")


def main() -> None:
    runs = read()
    for page, tables_of_page in ((EVIDENCE, OF_EVIDENCE), (ABLATIONS, OF_ABLATIONS), (CHOOSING, OF_CHOOSING)):
        write_page(page, SCRIPT, runs, tables_of_page)
