"""Write the README's numbers, the targets of benchmarks/README.md, and docs/performance.md, from the JSON of run.py.

    python -m benchmarks.report [FOLDER]

FOLDER (default: results/ here) holds quick.json, and those of the other files that were measured.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
PAGE = HERE.parent / "docs" / "performance.md"
TARGETS = HERE / "README.md"
IMAGES = HERE.parent / "docs" / "images"

Row = dict[str, Any]
Runs = dict[
    str, dict[str, Any]
]  # the JSON of "quick", "quick_malloc", "cuda" and so on; what was not run is missing
ALLOCATORS = {"quick": "stock allocator", "quick_malloc": "raised thresholds"}
COLORS = {"quick": "#4c72b0", "quick_malloc": "#55a868", "floor": "black"}
WAYS = ("forward", "contraction", "reverse")
NOTHING = "Not measured yet.\n"


# What the README says of each number, by the title of its row.
NUMBERS = {
    "features, ResNet-20, K = 20, C = 10": "a prediction, with K = 20 directions and C = 10 outputs",
    "prediction against laplace-torch's own ELLA": "a prediction, against laplace-torch's own ELLA",
    "fit to 50 000 inputs against laplace-torch's own ELLA (composed)": "a fit to 50 000 inputs, against the same",
}


def numbers(runs: Runs) -> str:
    """Return what the README says about costs."""
    found = {row["case"]: row for row in headlines(runs)}
    lines = [[words, f"**{value(found.get(case))}**"] for case, words in NUMBERS.items()]
    return f"{on_resnet(runs)}\n\n" + table(["", ""], lines) if "quick" in runs else NOTHING


def targets(runs: Runs) -> str:
    """Return the headline results beside their targets."""
    lines = [[row["case"], value(row), target(row)] for row in headlines(runs)]
    return f"{on_resnet(runs)}\n\n" + table(["what", "measured", "target"], lines) if lines else NOTHING


def headlines(runs: Runs) -> list[Row]:
    found = [row for name in ("quick", "quick_tuning") for row in runs.get(name, {}).get("results", [])]
    return [row for row in found if row.get("headline", True)]


def on_resnet(runs: Runs) -> str:
    about = runs["quick"]["environment"]
    return (
        f"ResNet-20 (272 474 weights) on {about['images']}, {about['dtype']}, {about['threads']} threads, "
        f"torch {about['torch']}, laplace-torch {about['laplace-torch']}; medians, each ratio of one run."
    )


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join("|" + "|".join(cells) + "|\n" if cells[0] == "---" else _line(cells) for cells in rows)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |\n"


def value(row: Row | None) -> str:
    """Return a value with its unit, or why there is none."""
    if row is None:
        return "not measured"
    return row["failure"] if row["value"] is None else f"{row['value']:.3g} {row['unit']}"


def target(row: Row) -> str:
    text = " ".join(f"{bound} {number:g}" for bound, number in (row["target"] or {}).items())
    return text + (" (missed)" if row["met"] is False else "")


def measured(row: Row | None) -> str:
    """Return a value with its quartiles, and its target if there is one."""
    if row is None:
        return "not measured"
    if row["value"] is None:
        return row["failure"]
    text = f"{row['value']:.3g}"
    if "spread" in row:
        text += f" ({row['spread']['quartile_1']:.3g} to {row['spread']['quartile_3']:.3g})"
    return text + (f"; {target(row)}" if row["target"] else "")


def number(row: Row | None, key: str, form: str = ".3g") -> str:
    """Return one of a row's further numbers."""
    return "" if row is None or row.get(key) is None else f"{row[key]:{form}}"


def of_group(run: dict[str, Any] | None, *groups: str) -> dict[str, Row]:
    """Return the rows of some cases, by their titles."""
    return {
        row["case"]: _with_floor(row) for row in (run or {}).get("results", []) if row.get("group") in groups
    }


def _with_floor(row: Row) -> Row:
    # One pass forwards and about two backwards; other rows bring theirs.
    if row.get("group") != "gradients" or row["value"] is None or row["unit"] != "forwards a landmark":
        return row
    return {"floor": 3, "over_floor": row["value"] / 3, **row}


def side_by_side(*groups: str, **extra: tuple[str, str]) -> Callable[[Runs], str]:
    """Return what writes a table of some cases: title, unit, both allocators, further numbers of both.

    ``extra`` maps a heading (underscores for spaces) to a key of the rows and its format.
    """

    def write(runs: Runs) -> str:
        found = {run: of_group(runs.get(run), *groups) for run in ALLOCATORS if run in runs}
        titles = list(dict.fromkeys(title for rows in found.values() for title in rows))
        if not titles:
            return NOTHING
        lines = []
        for title in titles:
            rows = [found[run].get(title) for run in found]
            unit = next(row["unit"] for row in rows if row)
            more = [number(row, *extra[name]) for name in extra for row in rows]
            lines.append([title, unit, *map(measured, rows), *more])
        names = [ALLOCATORS[run] for run in found]
        further = [f"{heading.replace('_', ' ')}, {name}" for heading in extra for name in names]
        return table(["what", "unit", *names, *further], lines)

    return write


def where(runs: Runs) -> str:
    """Say on what machine, with which versions, each file was measured."""
    if not runs:
        return NOTHING
    keys = {
        "commit": "commit",
        "package_changed_since": "with uncommitted changes",
        "cpu": "CPU",
        "gpu": "GPU",
        "threads": "threads",
        "OMP_WAIT_POLICY": "OMP_WAIT_POLICY",
        "load_before": "load before",
        "malloc": "allocator",
        "weights": "weights",
        "images": "images",
        "python": "Python",
        "torch": "torch",
        "laplace-torch": "laplace-torch",
        "quick": "few repeats",
    }
    lines = [
        [name, *(plain(run["environment"].get(key)) for run in runs.values())] for key, name in keys.items()
    ]
    return table(["", *(f"{name}.json" for name in runs)], lines)


def plain(entry: Any) -> str:
    """Write one entry of an environment."""
    words = {None: "not set", True: "yes", False: "no"}
    return words[entry] if entry is None or isinstance(entry, bool) else str(entry)[:60]


def crossover(runs: Runs) -> str:
    """Write the ways beside each other, the cheapest one in bold, with what the package counts for each."""
    lines = []
    for (problem, c, k), ways in by_way(runs.get("quick")).items():
        cheapest = min(ways, key=lambda way: ways[way]["value"])
        cells = [
            ("**{}**" if way == cheapest else "{}").format(measured(ways.get(way)))
            + (f"; {ways[way]['predicted']:.3g}" if "predicted" in ways.get(way, {}) else "")
            for way in WAYS
        ]
        lines.append([problem, str(c), str(k), *cells, ways[cheapest].get("chosen", "")])
    head = ["network", "C", "K", *(f"{way}; counted" for way in WAYS), "chosen"]
    return table(head, lines) if lines else NOTHING


def by_way(run: dict[str, Any] | None) -> dict[tuple[str, int, int], dict[str, Row]]:
    found: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in of_group(run, "crossover").values():
        if row["value"] is not None:
            found.setdefault((row["problem"], row["C"], row["K"]), {})[row["mode"]] = row
    return {key: ways for key, ways in found.items() if len(ways) > 1}


def crossings(runs: Runs) -> str:
    """Write from which K on contraction is cheaper than forward mode, as counted and as measured."""
    costs: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    counted: dict[tuple[str, int], Any] = {}
    for (problem, c, k), ways in by_way(runs.get("quick")).items():
        if "contraction" in ways:
            counted[problem, c] = ways["contraction"].get("predicted_crossover")
            for way, row in ways.items():
                costs.setdefault((problem, c), {}).setdefault(way, {})[k] = row["value"]
    lines = []
    for (problem, c), by in costs.items():
        seen = crossing(by.get("forward", {}), by["contraction"])
        lines.append([problem, str(c), str(counted[problem, c] or "never"), seen])
    head = ["network", "C", "counted K", "measured K"]
    return table(head, lines) if lines else NOTHING


def crossing(forward: dict[int, float], contraction: dict[int, float]) -> str:
    """Say from which K contraction is cheaper, between the ranks that were measured."""
    ranks = sorted(forward.keys() & contraction.keys())
    if not ranks:
        return "not measured"
    ahead = [forward[k] - contraction[k] for k in ranks]
    if ahead[0] >= 0:
        return f"below {ranks[0]}"
    for a, b, lead_a, lead_b in zip(ranks, ranks[1:], ahead, ahead[1:]):
        if lead_b >= 0:
            return f"{a + (b - a) * lead_a / (lead_a - lead_b):.0f}"
    return f"above {ranks[-1]}"


def chunks(runs: Runs) -> str:
    """Write what the chosen chunks cost beside the best of a grid."""
    lines = [
        [row["case"], measured(row), *(str(row.get(key, "")) for key in ("chosen", "best", "tried"))]
        for row in of_group(runs.get("quick_chunks"), "chunks").values()
    ]
    head = ["what", "times the best", "chosen: inputs x directions", "best", "of the grid, tried"]
    return table(head, lines) if lines else NOTHING


def plans(runs: Runs) -> str:
    """Write how far plans are from what then was measured."""
    rows = of_group(runs.get("plan"), "plan").values()
    lines = [
        [row["case"], measured(row), *(_seconds(row, key) for key in ("planned_s", "measured_s"))]
        for row in rows
    ]
    return table(["what", "times apart", "planned, s", "measured, s"], lines) if lines else NOTHING


def _seconds(row: Row, key: str) -> str:
    return f"{statistics.median(row[key]):.3g}" if row.get(key) else ""


def latency(runs: Runs) -> str:
    """Write what a call takes, one line a network and batch, one column a method."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    failed = []
    for row in of_group(runs.get("quick_latency"), "latency").values():
        if row["value"] is None:
            failed.append([row["case"], "", row["failure"]])
        else:
            found.setdefault((row["problem"], row["batch"]), {})[row["method"]] = row
    methods = list(dict.fromkeys(method for by in found.values() for method in by))
    lines = [
        [problem, str(batch), *(measured(by.get(method)) for method in methods)]
        for (problem, batch), by in found.items()
    ]
    lines += [cells + [""] * (len(methods) - 1) for cells in failed]
    return table(["network", "B", *(f"{m}, ms" for m in methods)], lines) if found else NOTHING


def methods(runs: Runs) -> str:
    """One line a method: fit, prediction, memory."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in of_group(runs.get("quick"), "methods").values():
        # A process that was stopped leaves only the name of its part.
        key = row.get("problem", ""), row.get("method", row.get("part", ""))
        found.setdefault(key, {})[row.get("stage", "fit")] = row
    lines = []
    for (problem, name), stages in found.items():
        fit, prediction = stages.get("fit"), stages.get("prediction")
        lines.append(
            [
                name,
                problem,
                measured(fit) if fit else "nothing to fit",
                measured(prediction) if prediction else "",
                number(prediction, "peak_gb"),
            ]
        )
    head = [
        "method",
        "network",
        "fit, forwards an input",
        "prediction, forwards an input",
        "peak extra memory, GB",
    ]
    return table(head, lines) if lines else NOTHING


def cuda(runs: Runs) -> str:
    """Write the GPU's numbers, or that there are none."""
    rows = [
        row for row in runs.get("cuda", {}).get("results", []) if str(row.get("group")).startswith("cuda-")
    ]
    if not rows:
        return "No CUDA numbers have been measured.\n"
    lines = [
        [
            row["case"],
            *(number(row, key, "d") for key in ("C", "M", "K", "N")),
            value(row),
            number(row, "images_per_second"),
            number(row, "peak_gb"),
        ]
        for row in rows
    ]
    return table(["what", "C", "M", "K", "N", "measured", "images a second", "peak memory, GB"], lines)


def tuning(runs: Runs) -> str:
    """Write what searches cost."""
    rows = of_group(runs.get("quick_tuning"), "tuning").values()
    lines = [[row["case"], row["unit"], measured(row)] for row in rows]
    return table(["what", "unit", "measured"], lines) if lines else NOTHING


def sampled(runs: Runs) -> str:
    """Write the error of sampled labels."""
    rows = of_group(runs.get("quick_sampled"), "sampled").values()
    keys = ("variance_ratio", "times_cheaper")
    lines = [[row["case"], measured(row), *(number(row, key) for key in keys)] for row in rows]
    return table(["what", "relative", "variance over exact", "times cheaper"], lines) if lines else NOTHING


FEATURE_COLUMNS = {
    "counted": ("predicted", ".3g"),
    "times_the_floor": ("over_floor", ".2f"),
    "page_faults_a_call": ("page_faults_a_call", ".0f"),
    "share_of_products": ("share_of_products", ".0%"),
}
TABLES: dict[str, Callable[[Runs], str]] = {
    "where": where,
    "gradients": side_by_side("gradients", times_the_floor=("over_floor", ".2f")),
    "features": side_by_side("features", **FEATURE_COLUMNS),
    "crossover": crossover,
    "crossings": crossings,
    "chunks": chunks,
    "latency": latency,
    "plan": plans,
    "host": side_by_side("host", "composed"),
    "memory": side_by_side("memory"),
    "tuning": tuning,
    "sampled": sampled,
    "methods": methods,
    "cuda": cuda,
}


PAGES = {README: {"numbers": numbers}, TARGETS: {"targets": targets}, PAGE: TABLES}


def of_run(name: str, write: Callable[[Any], str], runs: dict[str, Any]) -> str:
    """Write a table of one run, if there was one."""
    return write(runs[name]) if name in runs else NOTHING


def with_tables(
    text: str, runs: Runs, tables: dict[str, Callable[[Runs], str]] = TABLES, script: str = "report.py"
) -> str:
    """Return the page's text with every table between its markers written anew."""
    for name, write in tables.items():
        start, end = f"<!-- table {name}: written by benchmarks/{script} -->\n", f"<!-- end of {name} -->"
        before, rest = text.split(start)
        _, after = rest.split(end)
        text = before + start + "\n" + write(runs) + "\n" + end + after
    return text


def plot_features(runs: Runs, path: Path) -> None:
    """Draw what features cost with either allocator, and their arithmetic floor."""
    import matplotlib.pyplot as plt

    found = {run: of_group(runs.get(run), "features") for run in ALLOCATORS}
    rows = [row for row in found["quick"].values() if row["value"] is not None and row.get("target")]
    fig, ax = plt.subplots(figsize=(9, 0.9 + 0.55 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        for offset, run in ((-0.18, "quick"), (0.18, "quick_malloc")):
            bar = found[run].get(row["case"])
            if bar and bar["value"] is not None:
                ax.barh(place + offset, bar["value"], 0.34, color=COLORS[run], label=ALLOCATORS[run])
        ax.plot(
            [row["floor"]] * 2, [place - 0.4, place + 0.4], color=COLORS["floor"], label="arithmetic floor"
        )
    ax.set(yticks=range(len(rows)), yticklabels=[row["case"] for row in rows], xlabel="forwards a sample")
    ax.invert_yaxis()
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    fig.legend(unique.values(), unique.keys(), frameon=False, ncols=3, loc="outside lower center")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def plot_crossover(runs: Runs, path: Path) -> None:
    """Draw the ways for every network, C and K, with what the package counts for them."""
    import matplotlib.pyplot as plt

    found = by_way(runs.get("quick"))
    problems = list(dict.fromkeys(problem for problem, _, _ in found))
    fig, axes = plt.subplots(
        1, len(problems), figsize=(3.4 * len(problems), 3.4), squeeze=False, layout="constrained"
    )
    for ax, problem in zip(axes[0], problems):
        chosen = {(c, k): ways for (name, c, k), ways in found.items() if name == problem}
        for way, style, color in zip(WAYS, "oDs", ("C0", "C2", "C1")):
            rows = [ways.get(way, {}) for ways in chosen.values()]
            ax.plot([row.get("value") for row in rows], style, color=color, label=way)
            ax.plot([row.get("predicted") for row in rows], "_", color=color, ms=12, label=f"{way}, counted")
        ax.set(title=problem, yscale="log", xticks=range(len(chosen)))
        ax.set_xticklabels([f"C={c}\nK={k}" for c, k in chosen], fontsize="small")
        ax.margins(x=0.15)
    axes[0, 0].set_ylabel("forwards a sample")
    _legend(axes[0, 0])
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _legend(ax: Any) -> None:
    handles, labels = ax.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    ax.legend(unique.values(), unique.keys(), frameon=False, fontsize="small")


# The file of each plot, what draws it, and the cases without which there is nothing to draw.
PLOTS = {
    "performance_features.png": (plot_features, ("features",)),
    "performance_crossover.png": (plot_crossover, ("crossover",)),
}


def read(folder: Path) -> Runs:
    more = ("quick_tuning", "quick_sampled", "quick_chunks", "quick_latency", "plan", "cuda")
    paths = {name: folder / f"{name}.json" for name in (*ALLOCATORS, *more)}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results"
    runs = read(folder)
    for page, tables in PAGES.items():
        page.write_text(with_tables(page.read_text(), runs, tables))
        print(f"{page.relative_to(HERE.parent)}: tables of {', '.join(runs) or 'nothing'} written")
    for name, (draw, groups) in PLOTS.items():
        if of_group(runs.get("quick"), *groups):
            draw(runs, IMAGES / name)
            print(f"{name} drawn")


if __name__ == "__main__":
    main()
