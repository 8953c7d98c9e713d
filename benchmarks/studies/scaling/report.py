"""Tables of docs/scaling.md, from the JSON of this study, of benchmarks.processes and of benchmarks.soak."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from benchmarks.measure import GIGABYTE
from benchmarks.report import table
from benchmarks.studies.common.results import COSTS, DOCS, results, write_page
from benchmarks.studies.scaling.model import (
    A100_MEMORY,
    A100_PEAK,
    A100_SHARE,
    FITS,
    LANDMARKS,
    RANK,
    TITLES,
    WORLDS,
    Fit,
    features_cost,
    threads,
    times_computed,
)

PAGE = DOCS / "scaling.md"
Model = dict[str, Any]  # of the JSON files, by what they are of
MAIN = {"M": 2000, "K": 20}
FIT_OF_MAIN = {"n_landmarks": 2000, "rank": 20}
HEADS = [f"{world}" for world in WORLDS]


def selected(model: Model, **wanted: Any) -> list[dict[str, Any]]:
    """Return the rows with these values, one for each number of processes."""
    wanted = {"shard_directions": False, "device": model["model"]["devices"][-1]["name"], **wanted}
    return [row for row in model["model"]["rows"] if all(row[k] == v for k, v in wanted.items())]


def seconds(value: float) -> str:
    if value == 0:
        return "0"
    if value < 0.001:
        return "< 0.001"
    if value < 600:
        return f"{value:.3g}"
    return f"{value / 60:.0f} min" if value < 36_000 else f"{value / 3600:.3g} h"


def gigabytes(value: float) -> str:
    value /= GIGABYTE
    return "0" if value == 0 else "< 0.001" if value < 0.001 else f"{value:.3g}"


def measured_table(model: Model) -> str:
    """Write what was measured in one process."""
    found = model["measured"]
    keys = list(TITLES)

    def quartiles(kind: str) -> list[str]:
        spreads = [found[key]["forwards"][kind] for key in keys]
        return [f"{s['median']:.3g} ({s['quartile_1']:.3g} to {s['quartile_3']:.3g})" for s in spreads]

    def numbers(key: str, form: str, factor: float = 1.0) -> list[str]:
        return [format(found[name][key] * factor if factor != 1 else found[name][key], form) for name in keys]

    lines = [
        ["weights, P", *(cell.replace(",", " ") for cell in numbers("P", ",d"))],
        ["a gradient row, MB", *numbers("row_bytes", ".1f", 1e-6)],
        ["an input, MB", *numbers("input_bytes", ".3f", 1e-6)],
        ["images a batch", *numbers("batch", "d")],
        ["a plain forward, ms an image", *numbers("seconds_a_forward", ".1f", 1e3)],
        ["a forward of the scan, forwards", *quartiles("scan")],
        ["a gradient row, forwards", *quartiles("gradients")],
        [f"features, K = {RANK}, forwards an input", *quartiles("features")],
        ["their product, forwards an input", *quartiles("curvature")],
    ]
    for key in keys:
        more = found[key].get("more_directions")
        if more:
            told = f"{more['features']:.3g}; {features_cost(found[key], more['K']):.3g} by the model"
            cells = [told if key == other else "not measured" for other in keys]
            lines.append([f"features, K = {more['K']}, forwards an input", *cells])
    lines.append(["peak resident memory of this measurement, GB", *numbers("peak_gb", ".1f")])
    head = table(["", *TITLES.values()], lines)
    products = found["products"]
    lines = [
        [
            m,
            f"{products['gram'][m]['gflops']:.3g}",
            f"{products['combine'][m]['gflops']:.3g}",
            f"{products['eigh'][m]['seconds']:.3g}",
        ]
        for m in products["gram"]
    ]
    about = found["environment"]
    where = (
        f"{about['gpu'] or threads(about)}, {about['clock']} time, torch {about['torch']}, commit {about['commit'][:7]}, "
        f"load before {about['load_before']}, medians of {found[keys[0]]['rounds']} rounds.\n\n"
    )
    tail = table(["M", "Gram matrix, GFLOP/s", f"{RANK} combinations, GFLOP/s", "eigenvectors, s"], lines)
    return where + head + "\n" + tail


def assumed_table(model: Model) -> str:
    """Write what was not measured."""
    links, gpu = model["model"]["links"], model["model"]["devices"][-1]
    fit = model["model"]["fit"]
    rates = ", ".join(f"{TITLES[key]}: {rate:.0f}" for key, rate in gpu["images"].items())
    source = (
        "published by [AITemplate](https://github.com/facebookincubator/AITemplate/tree/main/examples): "
        "PyTorch 1.12, half precision, batches of 128"
    )
    return table(
        ["assumption", "value", "where from"],
        [
            ["plain forwards of an A100-40GB, images a second", rates, source],
            ["forwards a gradient row, an input's features", "those above", "measured on the CPU"],
            [
                "float64 operations of an A100",
                f"{gpu['products'] / 1e12:.3g} TFLOP/s",
                f"{A100_SHARE:.0%} of the data sheet's {A100_PEAK / 1e12:g} (tensor cores)",
            ],
            ["eigenvectors on an A100", "as long as above", "measured on the CPU"],
            [
                f"links between the {links['per_node']} GPUs of a node",
                f"{links['within'] / 1e9:g} GB/s each way",
                "NVLink of an A100, data sheet",
            ],
            [
                "links between nodes",
                f"{links['between'] / 1e9:g} GB/s a GPU",
                "one port of 200 Gbit/s a GPU",
            ],
            ["start of a collective", f"{links['latency'] * 1e6:g} µs", "assumed"],
            [
                "training images, curvature inputs, validation images",
                "{n_data:,}; {n_curvature:,}; {n_validation:,}".format(**fit).replace(",", " "),
                "ImageNet; the default; ImageNet",
            ],
            ["values in a grid search", str(fit["candidates"]), "the default"],
        ],
    )


def totals_table(model: Model) -> str:
    """Write the seconds of whole fits."""
    lines = []
    for device in model["model"]["devices"][::-1]:
        for key, title in TITLES.items():
            for fit in FITS:
                rows = selected(model, network=key, M=fit.n_landmarks, K=fit.rank, device=device["name"])
                name = device["name"]
                lines.append(
                    [
                        title,
                        str(fit.n_landmarks),
                        str(fit.rank),
                        name,
                        *(seconds(row["fit_seconds"]) + _too_large(row, device) for row in rows),
                    ]
                )
    return table(["network", "M", "K", "each process has", *HEADS], lines)


def _too_large(row: dict[str, Any], device: dict[str, Any]) -> str:
    return " *" if device["memory"] is not None and row["bytes"]["peak"] > device["memory"] else ""


def stages_table(key: str) -> Callable[[Model], str]:
    """Return what writes the stages of one network's fit."""

    def write(model: Model) -> str:
        rows = selected(model, network=key, **MAIN)
        lines = []
        for i, stage in enumerate(rows[0]["stages"]):
            cells = [seconds(row["stages"][i]["seconds"]) for row in rows]
            lines.append([stage["name"], *cells, rows[-1]["stages"][i]["limit"]])
        fit_lines, search = lines[:-1], lines[-1]
        total = [row["fit_seconds"] for row in rows]
        largest = [max(row["stages"][:-1], key=lambda s: s["seconds"])["name"] for row in rows]
        sending = [
            sum(s["sending"] + s["starting"] for s in row["stages"][:-1]) / row["fit_seconds"] for row in rows
        ]
        return table(
            ["s", *HEADS, "limited by, on 64"],
            [
                *fit_lines,
                ["**the fit**", *(f"**{seconds(t)}**" for t in total), ""],
                ["times as fast as one", *(f"{total[0] / t:.3g}" for t in total), ""],
                ["of which links and latency", *(f"{part:.0%}" for part in sending), ""],
                ["longest stage", *largest, ""],
                ["then a " + search[0], *search[1:]],
            ],
        )

    return write


def bytes_table(model: Model) -> str:
    """Write what a process sends."""
    lines = []
    for key, title in TITLES.items():
        for rank in (20, 100):
            rows = selected(model, network=key, M=MAIN["M"], K=rank)
            for i, stage in enumerate(rows[0]["stages"]):
                sent = [row["stages"][i]["sent"] for row in rows]
                alike = rank != MAIN["K"] and stage["name"] != "directions"
                if max(sent) < 1e6 or alike:
                    continue
                what = f"{stage['name']}, K = {rank}" if stage["name"] == "directions" else stage["name"]
                lines.append([title, what, *map(gigabytes, sent)])
    return table(["network", "GB sent by each process", *HEADS], lines)


def memory_table(model: Model) -> str:
    """Write what a process holds."""
    lines = []
    for key, title in TITLES.items():
        for m in LANDMARKS:
            rows = selected(model, network=key, M=m, K=20)
            lines.append([title, f"rows, M = {m}", *(gigabytes(row["bytes"]["rows"]) for row in rows)])
        lines.append(
            [
                title,
                f"how often a row is computed, M = {MAIN['M']}, rows in {A100_MEMORY / 4e9:.0f} GB",
                *(
                    f"{times_computed(model['measured'][key], Fit(**FIT_OF_MAIN), world, A100_MEMORY / 4):.3g}"
                    for world in WORLDS
                ),
            ]
        )
        for rank in (20, 100):
            for sharded in (False, True):
                rows = selected(model, network=key, M=MAIN["M"], K=rank, shard_directions=sharded)
                name = f"V, K = {rank}" + (", shard_directions" if sharded else "")
                lines.append([title, name, *(gigabytes(row["bytes"]["directions"]) for row in rows)])
        for what in ("inputs while reading", "inputs afterwards"):
            rows = selected(model, network=key, **MAIN)
            name = f"host: {what}, M = {MAIN['M']}"
            lines.append([title, name, *(gigabytes(row["bytes"][what]) for row in rows)])
    return table(["network", "GB of each process", *HEADS], lines)


def sharded_table(model: Model) -> str:
    """Write what shard_directions costs."""
    lines = []
    for key, title in TITLES.items():
        for rank in (20, 100):
            both = [
                selected(model, network=key, M=MAIN["M"], K=rank, shard_directions=sharded)
                for sharded in (False, True)
            ]
            for name, rows in zip(("whole V", "shard_directions"), both):
                found = [next(s for s in row["stages"] if s["name"] == "curvature") for row in rows]
                lines.append([title, str(rank), name, *(seconds(s["seconds"]) for s in found)])
    return table(["network", "K", "curvature, s", *HEADS], lines)


def soak_table(model: Model) -> str:
    """Write what grew in a process that fitted and predicted for a long time."""
    soak = model["soak"]
    about = soak["environment"]
    lines = []
    for kind in ("fit", "prediction"):
        found, line = soak[kind], soak[kind]["slope"]
        lines.append(
            [
                f"{found['number']} {kind}s",
                f"{found['seconds']:.0f}",
                f"{line['kB']:.2f} ({line['low']:.2f} to {line['high']:.2f})",
                f"{found['bound_kB']:g}",
            ]
        )
    grown = {k: (n, soak["after"][k]) for k, n in soak["before"].items() if n != soak["after"][k]}
    same = ", ".join(k.replace("_", " ") for k in soak["before"] if k not in grown)
    tail = "".join(f"\n{k.replace('_', ' ')}: {a} before, {b} after." for k, (a, b) in grown.items())
    return (
        f"{about['cpu']}, {about['threads']} thread(s), torch {about['torch']}, commit {about['commit'][:7]}.\n\n"
        + table(["what", "seconds", "growth of the resident set, kB each (95 %)", "bound"], lines)
        + f"\nResident set: {soak['rss_before_kB'] / 1024:.0f} MB before, {soak['rss_after_kB'] / 1024:.0f} MB after. "
        f"The same before and after: {same}.{tail}\n"
    )


def processes_table(model: Model) -> str:
    """Write what several processes of one machine gain."""
    found = model["processes"]
    about, world = found["environment"], found["world"]
    lines = [
        [
            kind,
            f"{found[kind]['seconds_of_one']:.1f}",
            f"{found[kind]['seconds_of_several']:.1f}",
            f"{found[kind]['times_as_fast']:.2f} times as fast",
        ]
        for kind in ("fit", "grid search")
    ]
    one, several = found["extra_gb"]
    lines.append(
        ["memory beyond the start, GB a process", f"{one:.2f}", f"{several:.2f}", f"{several / one:.2f}"]
    )
    differences = found["relative_difference"]
    return (
        f"ResNet-20 ({about['weights']} weights, {about['images']}), N = {found['N']}, M = {found['subsample_size']}, "
        f"n = {found['curvature_size']}, K = {found['n_eigenvalues']}, {found['validation']} validation images, float32; "
        f"{about['cpu']}, {about['cores']} cores, one thread a process, gloo; medians of {found['rounds']} rounds.\n\n"
        + table(["seconds", "1 process", f"{world} processes", ""], lines)
        + f"\nRelative difference of G: {differences['H']:.1g}, of eigenvalues: {differences['eigenvalues']:.1g}, of "
        f"predictions: {differences['probabilities']:.1g}.\n"
    )


TABLES: dict[str, Callable[[Model], str]] = {
    "processes": processes_table,
    "soak": soak_table,
    "measured": measured_table,
    "assumed": assumed_table,
    "totals": totals_table,
    "stages-resnet50": stages_table("resnet50"),
    "stages-vit": stages_table("vit_b_16"),
    "bytes": bytes_table,
    "memory": memory_table,
    "sharded": sharded_table,
}


def read() -> Model:
    """Return what was measured, modelled and soaked."""
    own = results("scaling")
    paths = {"measured": own / "scaling_measured.json", "model": own / "scaling.json"}
    paths |= {name: COSTS / f"{name}.json" for name in ("soak", "processes")}
    return {name: json.loads(path.read_text()) for name, path in paths.items()}


def main() -> None:
    write_page(PAGE, "scaling/report.py", read(), TABLES)
