"""Tables of docs/paper.md: the paper's numbers, and those of this study beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.report import NOTHING, table
from benchmarks.studies.common import tables
from benchmarks.studies.common.baselines import REFERENCES
from benchmarks.studies.common.results import DOCS, results, write_page
from benchmarks.studies.common.tables import (
    SCORES,
    Get,
    Run,
    Runs,
    difference,
    note_table,
    of_environment,
    over_seeds,
    shown,
)
from benchmarks.studies.paper.run import HELD_OUT, STOPPED, TEST

PAGE = DOCS / "paper.md"
JPEG = "cifar10-jpeg"
NOT_RUN = "not run: needs the data"

# NLL and ECE as printed in the tables of Deng, Zhou, Zhu (NeurIPS 2022).
CIFAR = {
    "": "MAP, MFVI-BF, LLA*, LLA*-KFAC, LLA-Diag, LLA-KFAC, ELLA",
    "resnet20": ".2815 .0390, .2323 .0171, .2687 .0336, .2703 .0343, .7294 .4058, .8525 .4685, .2331 .0092",
    "resnet32": ".2921 .0408, .2215 .0202, .2588 .0327, .2596 .0329, .7549 .4315, 1.0271 .5477, .2161 .0082",
    "resnet44": ".2753 .0385, .2021 .0167, .2361 .0278, .2315 .0277, .7798 .4456, 1.0935 .5659, .2022 .0073",
    "resnet56": ".2523 .0374, .1868 .0160, .2131 .0216, .2014 .0245, .8414 .4807, 1.1732 .5776, .1866 .0065",
}
IMAGENET = {  # of MAP, only the first is quoted here
    "": "MAP, ELLA",
    "resnet18": "1.2469 .0263, 1.2431 .0163",
    "resnet34": ", 1.0709 .0141",
    "resnet50": ", .9479 .0179",
    "vit_base_patch16_224": ", .6953 .0224",
}
SHOWN = (100, 200, 500, 1000, 2000, 5000)  # of the n of early stopping
OURS = ("MAP", "temperature scaling", "vector scaling", STOPPED, "ELLA (T)", "ELLA (T, s)")


def of_paper(numbers: dict[str, str], runs: Runs) -> str:
    """Write the paper's table, NLL / ECE, with nothing of ours in it."""
    head, *lines = ([name, *cells.split(", ")] for name, cells in numbers.items())
    return table(["network", *head[1:]], [[cell.replace(" ", " / ") for cell in line] for line in lines])


def beside(numbers: dict[str, str], data: str, option: str, runs: Runs) -> str:
    """Write the paper's MAP and ELLA beside what was found here, with the command of each row."""
    lines = []
    for name, cells in list(numbers.items())[1:]:
        first, *_, last = (cell.replace(" ", " / ") for cell in cells.split(", "))
        command = f"`python -m benchmarks.studies.paper run {option} PATH --network {name} --download --device cuda`"
        found = [here(runs.get(f"{data}_{name}"), method) for method in OURS]
        lines.append([name, first, found[0], last, *found[1:], command])
    head = ["network", "MAP, paper", "MAP", "ELLA, paper", *OURS[1:], "command"]
    return table(head, lines)


def here(run: Run | None, method: str) -> str:
    """Return NLL / ECE of a method tuned on cropped training images, as the paper does, on all test images."""
    if run is None:
        return NOT_RUN
    view = tuned_on(run, HELD_OUT)
    return " / ".join(
        shown(over_seeds(view, "methods", method, SCORES[score][0]), ".4f") for score in ("NLL", "ECE")
    )


def tuned_on(run: Run, data: str) -> Run:
    """Return a run in the form of the study of quality: the methods tuned on one kind of validation data."""
    return {"seeds": [{"seed": seed["seed"], **seed["tuned_on"][data]} for seed in run["seeds"]]}


def score_table(run: Run) -> str:
    """Write the scores of each method, and how its NLL differs from those of the two references."""
    lines = []
    for name in OURS:
        nll, *others = (shown(over_seeds(run, "methods", name, get), form) for get, form in SCORES.values())
        lines.append([name, nll, *(difference(run, name, other) for other in REFERENCES), *others])
    gaps = [f"NLL minus that of {other}" for other in REFERENCES]
    return table(["method", "NLL", *gaps, *list(SCORES)[1:]], lines)


def setting_table(run: Run) -> str:
    """Write what tuning found, seed by seed, and what it took."""
    lines = []
    for name in OURS[1:]:
        rows = [seed["methods"][name] for seed in run["seeds"]]
        found = [{"n": row["n_curvature"]} if name == STOPPED else {} for row in rows]
        settings = ["; ".join(_numbers({**n, **row["parameters"]})) for n, row in zip(found, rows)]
        scores = " / ".join(f"{row['validation_nll']:.4f}" for row in rows)
        seconds = " / ".join(f"{row['seconds']:.2g}" for row in rows)
        lines.append([name, " / ".join(settings), scores, seconds])
    return table(["method", "setting", "validation NLL", "seconds"], lines)


def _numbers(parameters: dict[str, Any]) -> list[str]:
    return [
        f"{key.replace('_', ' ')} "
        + (f"{value:.3g}" if isinstance(value, float | int) else f"({len(value)} numbers)")
        for key, value in parameters.items()
        if (key, value) != ("logit_scale", 1.0)
    ]


def fair(runs: Runs) -> str:
    """Write, for the original data, the scores of all methods tuned on a part of the test images."""
    texts = [
        f"**{name}**\n\n{score_table(tuned_on(run, TEST))}" for name, run in runs.items() if name != JPEG
    ]
    return "\n".join(texts) if texts else f"N{NOT_RUN[1:]}.\n"


def of_jpeg(write: Callable[[Run], str], data: str, runs: Runs) -> str:
    return write(tuned_on(runs[JPEG], data)) if JPEG in runs else NOTHING


def stopping(runs: Runs) -> str:
    """Write the validation NLL of some of the n that early stopping looked at, first seed, the best in bold."""
    if JPEG not in runs:
        return NOTHING
    first, total = runs[JPEG]["seeds"][0]["tuned_on"], runs[JPEG]["n_total"]
    rows = [first[data]["methods"][STOPPED] for data in (HELD_OUT, TEST)]
    scores = [dict(zip(*(row["history"][key] for key in ("processed_examples", "val_nll")))) for row in rows]
    best = [row["n_curvature"] for row in rows]
    lines = [
        [f"{n:.0f}", f"{total / n:.3g}", *(_bold(f"{of[n]:.4f}", n == b) for of, b in zip(scores, best))]
        for n in scores[0]
        if n in SHOWN or n in best or n == max(scores[0])
    ]
    return table(["n", "T = N / n", *(f"NLL on {data}" for data in (HELD_OUT, TEST))], lines)


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _stage(name: str) -> Get:
    return lambda run: f"{run['seeds'][0]['times'][name]['forwards_an_input']:.3g}"


FACTS: dict[str, Get] = {
    "network": lambda run: run["network"],
    "parameters": lambda run: run["parameters"],
    "images": of_environment("images"),
    "weights": of_environment("weights"),
    "training images, of N": lambda run: f"{run['counts']['train']} of {run['n_total']}",
    "training images held out": lambda run: run["counts"]["held_out"],
    "test images": lambda run: run["counts"]["test"],
    "of these to tune on": lambda run: run["counts"]["validation"],
    "M, K": lambda run: f"{run['ella']['M']}, {run['ella']['K']}",
    "prior precision": lambda run: run["ella"]["prior_precision"],
    "curvature inputs n, every": lambda run: f"{run['counts']['curvature']}, {run['counts']['every']}",
    "samples of the Monte-Carlo link": lambda run: run["samples"],
    "seeds": lambda run: len(run["seeds"]),
    "fit, forwards a training image": _stage("fit"),
    "test images, forwards an image": _stage("features and predictions"),
    "seconds": of_environment("seconds"),
    **{name: get for name, get in tables.VERSIONS.items() if name != "with uncommitted changes"},
}
TABLES: dict[str, Callable[[Runs], str]] = {
    "cifar10 of the paper": partial(of_paper, CIFAR),
    "cifar10": partial(beside, CIFAR, "cifar10", "--cifar-root"),
    "imagenet": partial(beside, IMAGENET, "imagenet", "--imagenet-root"),
    "fair": fair,
    "jpeg training": partial(of_jpeg, score_table, HELD_OUT),
    "jpeg test": partial(of_jpeg, score_table, TEST),
    "jpeg settings training": partial(of_jpeg, setting_table, HELD_OUT),
    "jpeg settings test": partial(of_jpeg, setting_table, TEST),
    "jpeg stopping": stopping,
    "jpeg notes": partial(of_jpeg, note_table, TEST),
    "where": partial(tables.where, facts=FACTS),
}


def read() -> Runs:
    paths = {path.stem.removeprefix("paper_"): path for path in sorted(results("paper").glob("paper_*.json"))}
    return {name: json.loads(path.read_text()) for name, path in paths.items()}


def main() -> None:
    write_page(PAGE, "paper/report.py", read(), TABLES)
