"""The figure of the project's README, and the comparison of docs/when_not.md, from the JSON of this study and of benchmarks.run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.report import HERE, NOTHING, table
from benchmarks.studies.common import results
from benchmarks.studies.common.results import IMAGES, write_page
from benchmarks.studies.common.tables import SCORES, Run, over_seeds
from benchmarks.studies.quality.costs import STAGES, by_stage, stage_cell
from benchmarks.studies.quality.report import COSTS, Found, read, sets

PAGE = HERE.parent / "docs" / "when_not.md"
CASE = "cifar10-jpeg"
METHODS = {
    "MAP": "network as trained",
    "temperature scaling": "temperature scaling",
    "vector scaling": "vector scaling",
    "last-layer full (T, s)": "last layer, full",
    "last-layer KFAC (T, s)": "last layer, KFAC",
    "all-weights diagonal (T, s)": "all weights, diagonal",
    "all-weights KFAC (T, s)": "all weights, KFAC",
    "ELLA (T, s)": "ELLA",
}
NOVELTY = {
    "entropy of MAP": "entropy, network as trained",
    "entropy after temperature scaling": "entropy, temperature scaling",
    "energy": "energy",
    "last-layer squared norm": "small norm in the last layer",
    "ELLA novelty": "ELLA, novelty",
}
SPEED = {
    "prediction against laplace-torch's own ELLA": "prediction",
    "fit against laplace-torch's own ELLA": "fit, small",
    "fit to 50 000 inputs against laplace-torch's own ELLA (composed)": "fit, 50 000 inputs",
    "grid search of 100 priors against laplace-torch's own ELLA": "search of 100 priors",
}
# Columns of the comparison: heading, its costs, its scores.
COMPARED = {
    "this package (T, s)": ("ELLA", "ELLA (T, s)"),
    "this package (T)": ("ELLA", "ELLA (T)"),
    "laplace-torch 0.3's ELLA (T)": ("laplace-torch's ELLA", "laplace-torch's ELLA (T)"),
    "KFAC (T, s)": ("all-weights KFAC", "all-weights KFAC (T, s)"),
    "last layer, full (T, s)": ("last-layer full", "last-layer full (T, s)"),
    "temperature scaling": (None, "temperature scaling"),
}
OURS, OTHERS = "#b2182b", "#4d4d4d"


def comparison(found: Found) -> str:
    """Write costs and scores of each way to a posterior, on the ResNet."""
    if CASE not in found.runs or found.costs is None:
        return NOTHING
    run, stages = found.runs[CASE], by_stage(CASE, found.costs)
    lines = [
        [words, *("" if name is None else stage_cell(stages[name], stage) for name, _ in COMPARED.values())]
        for stage, words in STAGES.items()
    ]
    lines += [["NLL", *(_score(run, name, lambda row: row["nll"], ".3f") for _, name in COMPARED.values())]]
    lines += [["ECE", *(_score(run, name, lambda row: row["ece"], ".3f") for _, name in COMPARED.values())]]
    lines += [
        [
            f"AUROC of the entropy, {of}",
            *(_score(run, name, lambda row, of=of: row["auroc"][of], ".3f") for _, name in COMPARED.values()),
        ]
        for of in sets(run)[:2]
    ]
    return f"{COSTS[CASE]}.\n\n" + table(["", *COMPARED], lines)


def _score(run: Run, name: str, get: Any, form: str) -> str:
    if name not in run["seeds"][0]["methods"]:
        return "not measured"
    return f"{over_seeds(run, 'methods', name, get)[0]:{form}}"


TABLES = {"comparison": comparison}


def speeds(*runs: dict[str, Any]) -> dict[str, float]:
    """Return how many times as fast each step is as with laplace-torch's own ELLA."""
    rows = {row["case"]: row["value"] for run in runs for row in run["results"]}
    return {label: rows[case] for case, label in SPEED.items() if rows.get(case)}


def _auroc(run: Run, name: str, of: str) -> float:
    value = over_seeds(run, "novelty", name, lambda row: row["auroc"][of])[0]
    return 1 - value if name == "last-layer squared norm" else value


def draw(quality: Run, *costs: dict[str, Any], path: Path) -> None:
    """Draw calibration, novelty and speed, a panel each."""
    import matplotlib.pyplot as plt

    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.3), layout="constrained")
    found = {
        label: over_seeds(quality, "methods", name, SCORES["NLL"][0])
        for name, label in METHODS.items()
        if name in quality["seeds"][0]["methods"]
    }
    for place, (label, (value, error)) in enumerate(found.items()):
        left.errorbar(
            value, place, xerr=error, fmt="o", color=OURS if label.startswith("ELLA") else OTHERS, capsize=3
        )
    left.set(yticks=range(len(found)), yticklabels=list(found), xlabel="NLL on test images (lower is better)")
    left.set_title("Calibration; posteriors: T and s tuned")
    left.invert_yaxis()

    others = sets(quality)
    for offset, (name, label) in enumerate(NOVELTY.items()):
        values = [_auroc(quality, name, of) for of in others]
        places = [place + 0.16 * (offset - 2) for place in range(len(others))]
        color = OURS if name.startswith("ELLA") else str(0.15 + 0.2 * offset)
        middle.barh(places, [value - 0.5 for value in values], 0.14, left=0.5, color=color, label=label)
    middle.set(
        yticks=range(len(others)), yticklabels=others, xlim=(0.5, 1), xlabel="AUROC against test images"
    )
    middle.set_title("Other data")
    middle.invert_yaxis()
    fig.legend(
        *middle.get_legend_handles_labels(), loc="outside lower center", ncol=5, frameon=False, fontsize=9
    )

    bars = speeds(*costs)
    drawn = right.barh(list(bars), list(bars.values()), 0.6, color=OURS)
    right.bar_label(drawn, [f"{value:.0f}x" for value in bars.values()], padding=3)
    right.set(xscale="log", xlim=(1, 3000), xlabel="times as fast as laplace-torch's ELLA")
    right.set_title("Speed")
    right.invert_yaxis()
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main() -> None:
    found = read()
    write_page(PAGE, "quality/readme.py", found, TABLES)
    costs = [json.loads((results.COSTS / f"{name}.json").read_text()) for name in ("quick", "quick_tuning")]
    draw(found.runs[CASE], *costs, path=IMAGES / "readme.png")
    print("readme.png drawn")
