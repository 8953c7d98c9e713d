"""What a fit costs on several processes: measure one process, and work out the rest.

    python benchmarks/scaling.py --measure [--device cpu|cuda] [--threads 2] [--clock wall|processor] [--out FILE]
    python benchmarks/scaling.py [--measured FILE] [--within 300] [--between 25] [--latency 50]

With --measure: seconds of one process, for ResNet-50 and ViT-B/16, to results/scaling_measured.json. Without: a
model of a fit on 1 to 64 GPUs from that file and from what is assumed of GPUs and links, to results/scaling.json and
the tables of docs/scaling.md. No number of the model is a measurement of several processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import GIGABYTE, PeakMemory, interleaved, plain, ratios
from problems import network, samples
from report import table, with_tables
from run import environment

import laplace_ella
from laplace_ella.basis import NystromBasis
from laplace_ella.gram import gram
from laplace_ella.landmarks import Landmarks

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "scaling.md"
MEASURED = HERE / "results" / "scaling_measured.json"
MODELLED = HERE / "results" / "scaling.json"

TITLES = {"resnet50": "ResNet-50", "vit_b_16": "ViT-B/16"}
N_OUTPUTS = 1000
# ------------------------------------------------------------------ measuring

# Images a batch: of the passes that are compared with each other.
BATCHES = {"resnet50": 8, "vit_b_16": 4}
RANK = 20
# Directions of a second measurement, to see whether features cost 1 + 2K there too; memory allows one network.
MORE_DIRECTIONS = {"resnet50": 100}
# Columns of the matrices whose products are timed; a fit multiplies slices, so that their number does not matter.
COLUMNS = 2**15
LANDMARKS = (500, 2000)


# Processor time is for machines that others use too: with one thread, their work hardly adds to it.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def random_basis(model: torch.nn.Module, rank: int) -> NystromBasis:
    """Return K directions of noise: features cost the same along any."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    directions = {
        name: torch.randn(rank, *p.shape, generator=generator, device=p.device) / p.numel() ** 0.5
        for name, p in model.named_parameters()
    }
    ones = torch.ones(rank, dtype=torch.float64)
    return NystromBasis(directions, ones, float(rank), ones)


def measure_network(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time passes, gradients and features of one network against a plain pass of the same batch."""
    device, batch = args.device, BATCHES[name]
    model = network(name, None, device, N_OUTPUTS)
    x = samples(name, batch, None, N_OUTPUTS)[0].to(device)
    plain(model, x)()
    backend = laplace_ella.NystromGGN(model, "classification")
    landmarks = Landmarks([x[i : i + 1] for i in range(batch)], torch.arange(batch) * 7 % N_OUTPUTS)
    source = backend.row_source(landmarks)
    with PeakMemory(device) as peak:
        basis = random_basis(model, RANK)
        phi, f = backend.features(x, basis)
        functions: dict[str, Callable[[], Any]] = {
            "forward": plain(model, x),
            "scan": lambda: backend.forward(x),
            "gradients": lambda: rows_of(backend, source, batch),
            "features": lambda: backend.features(x, basis),
            "curvature": lambda: backend.curvature(phi, f),
        }
        calls = interleaved(functions, args.rounds, device, CLOCKS[args.clock])
    found = {
        "title": TITLES[name],
        "P": sum(p.numel() for p in model.parameters()),
        "row_bytes": backend.engine.row_size(),
        "input_bytes": x[0].numel() * x.element_size(),
        "batch": batch,
        "K": RANK,
        "C": N_OUTPUTS,
        "seconds_a_forward": calls["forward"].median() / batch,
        "forwards": {kind: ratios(calls, kind, "forward") for kind in functions if kind != "forward"},
        "rounds": args.rounds,
        "features_mode": backend.engine.mode(x, RANK),
        "extra_gb": peak.extra / GIGABYTE,
        "peak_gb": (peak.before + peak.extra) / GIGABYTE,
    }
    basis = None  # before the next
    functions.clear()
    rank = MORE_DIRECTIONS.get(name)
    if rank:
        x = x[:1]
        basis = random_basis(model, rank)
        functions = {"forward": plain(model, x), "features": lambda: backend.features(x, basis)}
        calls = interleaved(functions, 2, device, CLOCKS[args.clock])
        found["more_directions"] = {
            "K": rank,
            "batch": len(x),
            "features": statistics.fmean(
                a / b for a, b in zip(calls["features"].seconds, calls["forward"].seconds)
            ),
        }
    return found


def rows_of(backend: Any, source: Any, n: int) -> torch.Tensor:
    from laplace_ella.autodiff import safe_autodiff

    with safe_autodiff(backend.model):
        return source(list(range(n)))


def measure_products(args: argparse.Namespace) -> dict[str, Any]:
    """Time what a fit does in float64: Gram matrices, their eigenvectors, combinations of rows."""
    found: dict[str, Any] = {"columns": COLUMNS, "gram": {}, "eigh": {}, "combine": {}}
    for m in LANDMARKS:
        generator = torch.Generator(args.device).manual_seed(0)
        values = torch.randn(m, COLUMNS, generator=generator, device=args.device)
        coefficients = torch.randn(m, RANK, dtype=torch.float64, generator=generator, device=args.device)
        matrix = gram(values, args.device)
        calls = interleaved(
            {
                "gram": partial(gram, values, args.device),
                "combine": partial(combine, coefficients, values),
                "eigh": partial(torch.linalg.eigh, matrix),
            },
            args.rounds,
            args.device,
            CLOCKS[args.clock],
        )
        # As many operations as the whole M x M product has, of which symmetry saves nearly half.
        found["gram"][str(m)] = {
            "seconds": calls["gram"].median(),
            "gflops": 2 * m * m * COLUMNS / calls["gram"].median() / 1e9,
        }
        found["combine"][str(m)] = {
            "seconds": calls["combine"].median(),
            "gflops": 2 * m * RANK * COLUMNS / calls["combine"].median() / 1e9,
        }
        found["eigh"][str(m)] = {"seconds": calls["eigh"].median()}
    return found


def combine(coefficients: torch.Tensor, values: torch.Tensor, width: int = 2048) -> torch.Tensor:
    """Combine rows slice by slice in float64, as a fit does."""
    return torch.cat([(coefficients.T @ part.double()).float() for part in values.split(width, 1)], 1)


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    **{name: partial(measure_network, name) for name in TITLES},
    "products": measure_products,
}


def measure(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    found: dict[str, Any] = {"environment": environment(args) | {"clock": args.clock}}
    for part in PARTS:  # each in a process of its own, so that none inherits another's memory
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", "--part", part]
        command += [
            "--device",
            str(args.device),
            "--threads",
            str(args.threads),
            "--rounds",
            str(args.rounds),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{part} failed:\n{done.stderr}")
        found[part] = json.loads(done.stdout.splitlines()[-1])
        print(f"{part}: {time.perf_counter() - start:.0f} s since the start", flush=True)
    found["environment"]["seconds"] = round(time.perf_counter() - start)
    write(args.out or MEASURED, found)


def write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = found.pop("rows", None)
    text = json.dumps(found, indent=1)
    if rows is not None:  # of a model, hundreds of them: one a line
        found["rows"] = rows
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        text = text[:-2] + ',\n "rows": [\n' + lines + "\n ]\n}"
    path.write_text(text + "\n")
    print(f"written: {os.path.relpath(path)}")


# ------------------------------------------------------------------ modelling

WORLDS = (1, 2, 4, 8, 16, 32, 64)
# Numbers of a sum up to which every rank sends its terms to every other, instead of an all-reduce.
GATHERED_SUM = 2**16
# Whether that holds for the slices of the directions too, or these are all-reduced whatever their size.
GATHERED_SLICES = False
DOUBLE = 8


@dataclass(frozen=True)
class Links:
    """How processes are connected; bytes a second are those that one GPU sends, while it receives as many."""

    per_node: int = 8
    within: float = 300e9
    between: float = 25e9
    latency: float = 50e-6  # of one collective, whatever it carries

    def seconds(self, world: int, n_bytes: float, calls: float) -> tuple[float, float]:
        """Return what sending takes, and what starting the calls takes."""
        if world == 1:
            return 0.0, 0.0
        return n_bytes / (self.within if world <= self.per_node else self.between), calls * self.latency


@dataclass(frozen=True)
class Device:
    """What one process computes with."""

    name: str
    images: dict[str, float]  # plain forward passes a second
    products: float  # float64 operations a second, of Gram matrices
    combinations: float  # the same, of K combinations of rows
    eigh: dict[str, float]  # seconds of M x M eigenvectors
    memory: float | None  # bytes; None: not of interest


@dataclass(frozen=True)
class Fit:
    """The sizes of a fit and of a grid search."""

    n_landmarks: int
    rank: int
    n_data: int = 1_281_167  # images of ImageNet's training set
    n_curvature: int = 2000
    n_validation: int = 50_000
    batch: int = 128
    candidates: int = 100


@dataclass(frozen=True)
class Stage:
    """Seconds and bytes of one process in one stage."""

    name: str
    bound: str  # what the computation waits for
    compute: float
    sent: float = 0.0  # bytes
    sending: float = 0.0  # seconds
    starting: float = 0.0  # seconds

    @property
    def seconds(self) -> float:
        return self.compute + self.sending + self.starting

    @property
    def limit(self) -> str:
        """Which part of it is the longest."""
        parts = {self.bound: self.compute, "links": self.sending, "latency": self.starting}
        return max(parts, key=lambda part: parts[part])


# Published figures: github.com/facebookincubator/AITemplate, examples/01_resnet-50 and 04_vit, README.md: PyTorch 1.12
# eager, half precision, batches of 128, 224 x 224, A100-40GB. Float64 products: NVIDIA's data sheet of the A100, peak
# of its tensor cores, of which half is assumed to be reached.
A100_IMAGES = {"resnet50": 4816.71, "vit_b_16": 2138.35}
A100_PEAK, A100_SHARE, A100_MEMORY = 19.5e12, 0.5, 40e9


def devices(measured: dict[str, Any]) -> list[Device]:
    """Return the device that was measured, and one GPU from published figures."""
    products = measured["products"]
    about = measured["environment"]
    name = about["gpu"] or threads(about)
    largest = str(max(map(int, products["gram"])))
    here = Device(
        name,
        {network: 1 / measured[network]["seconds_a_forward"] for network in TITLES},
        1e9 * products["gram"][largest]["gflops"],
        1e9 * products["combine"][largest]["gflops"],
        {m: found["seconds"] for m, found in products["eigh"].items()},
        None,
    )
    flops = A100_PEAK * A100_SHARE
    gpu = Device("A100-40GB (published)", A100_IMAGES, flops, flops, here.eigh, A100_MEMORY)
    return [here, gpu]


def threads(about: dict[str, Any]) -> str:
    return f"{about['cpu']}, {about['threads']} thread" + "s" * (about["threads"] > 1)


def features_cost(network: dict[str, Any], rank: int) -> float:
    """Return the forwards of one input's features: those measured, times (1 + 2K) over that of the K measured."""
    return network["forwards"]["features"]["median"] * (1 + 2 * rank) / (1 + 2 * network["K"])


def slice_width(n_rows: int) -> int:
    """Return how many columns of M rows are held in float64 at once (gram.py)."""
    return max(64, min(8192, 2**22 // n_rows))


def times_computed(network: dict[str, Any], fit: Fit, world: int, budget: float, streamed: int = 8) -> float:
    """Return how often a gradient row is computed, at most, if rows may take so many bytes (gram.py).

    Blocks of weights can be cheaper than these blocks of rows.
    """
    m, row = fit.n_landmarks, network["row_bytes"]
    if share(m, world) * row <= budget:
        return 1.0
    capacity = max(2, int(budget // row))
    streamed = min(streamed, max(1, capacity // 4))
    starts = range(0, m, (capacity - streamed) * world)
    return sum(m - a for a in starts) / m + (starts[-1] / m)


def stages(
    network: dict[str, Any], images: float, device: Device, links: Links, fit: Fit, world: int, sharded: bool
) -> list[Stage]:
    """Work out the stages of a fit and of a grid search for the busiest of ``world`` processes."""
    m, k, n_params = fit.n_landmarks, fit.rank, network["P"]
    itemsize = network["row_bytes"] / n_params
    forward = 1 / images
    forwards = {kind: found["median"] for kind, found in network["forwards"].items()}
    of_others = (world - 1) / world
    n_landmarks, n_curvature, n_validation = (share(n, world) for n in (m, fit.n_curvature, fit.n_validation))
    width = slice_width(m)
    features = features_cost(network, k)
    exchanged = [0.0, 0.0]  # bytes an input, calls a batch
    if sharded and world > 1:
        # Each process pushes its own directions through every process's inputs, its plain passes among them.
        features *= world * (1 + 2 * share(k, world)) / (1 + 2 * k)
        exchanged = [
            (world - 1) * network["input_bytes"] + of_others * network["C"] * k * itemsize,
            2.0,
        ]

    def stage(name: str, bound: str, compute: float, sent: float = 0.0, calls: float = 0.0) -> Stage:
        return Stage(name, bound, compute, sent * (world > 1), *links.seconds(world, sent, calls))

    def batches(n: float) -> float:
        return -(-n // fit.batch)

    n_snapshots = max(1, fit.n_curvature // fit.batch).bit_length() + 1
    return [
        stage("scan", "forwards", share(fit.n_data, world) * forward * forwards["scan"], 0, 2),
        stage("inputs exchanged", "nothing", 0.0, of_others * (m + n_curvature) * network["input_bytes"], 6),
        stage("gradient rows", "forwards", n_landmarks * forward * forwards["gradients"]),
        stage(
            "Gram matrix",
            "float64 products",
            2 * m * m * n_params / world / device.products,
            of_others * n_landmarks * network["row_bytes"] + summed(m * m, world),
            -(-n_params // (width * world)) + 2,
        ),
        # Every rank computes them; all take those of the first.
        stage("eigenvectors", "eigenvectors", device.eigh[str(m)], m * m * DOUBLE, 4),
        stage(
            "directions",
            "float64 products",
            2 * k * n_landmarks * n_params / device.combinations,
            # One sum a slice.
            summed(k * width, world, GATHERED_SLICES) * n_params / width,
            calls_of_sum(k * width, GATHERED_SLICES) * -(-n_params // width),
        ),
        stage(
            "curvature",
            "forwards",
            n_curvature * forward * (features + forwards["curvature"]),
            n_curvature * exchanged[0],
            batches(n_curvature) * exchanged[1],
        ),
        stage("sums of G", "nothing", 0.0, summed(n_snapshots * k * k, world), 5),
        stage(
            "grid search",
            "forwards",
            n_validation * forward * features,
            n_validation * exchanged[0] + fit.candidates * summed(2, world),
            batches(n_validation) * exchanged[1] + 2 * fit.candidates,
        ),
    ]


def share(n: int, world: int) -> int:
    return -(-n // world)


def summed(n_numbers: float, world: int, gathered: bool = True) -> float:
    """Return the bytes a process sends for a sum of float64 numbers over all."""
    if gathered and n_numbers <= GATHERED_SUM:
        return (world - 1) * n_numbers * DOUBLE
    return 2 * (world - 1) / world * n_numbers * DOUBLE


def calls_of_sum(n_numbers: float, gathered: bool = True) -> int:
    """Return how many collectives a sum takes; terms are told their lengths first."""
    return 2 if gathered and n_numbers <= GATHERED_SUM else 1


def memory(network: dict[str, Any], fit: Fit, world: int, sharded: bool) -> dict[str, float]:
    """Return bytes of one process: what it holds at once on the device at most, and of inputs on the host."""
    m, k, row = fit.n_landmarks, fit.rank, network["row_bytes"]
    rows = share(m, world) * row
    directions = (share(k, world) if sharded else k) * row
    matrices = 3 * m * m * DOUBLE + 3 * m * slice_width(m) * DOUBLE
    return {
        "weights": row,
        "rows": rows,
        "directions": directions,
        "peak": row + matrices + rows + directions,
        "afterwards": row + directions,
        "inputs while reading": (m + fit.n_curvature) * network["input_bytes"],
        "inputs afterwards": (m + share(fit.n_curvature, world)) * network["input_bytes"],
        "validation features": share(fit.n_validation, world) * network["C"] * k * row / network["P"],
    }


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Return numbers with five digits."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}


FITS = tuple(Fit(m, k) for m in LANDMARKS for k in (20, 100))


def modelled(measured: dict[str, Any], links: Links) -> dict[str, Any]:
    """Return all fits on all numbers of processes, as plain types."""
    chosen = devices(measured)
    rows = []
    for key in TITLES:
        for fit in FITS:
            for device in chosen:
                for sharded in (False, True):
                    for world in WORLDS:
                        found = stages(measured[key], device.images[key], device, links, fit, world, sharded)
                        rows.append(
                            {
                                "network": key,
                                "device": device.name,
                                "M": fit.n_landmarks,
                                "K": fit.rank,
                                "world": world,
                                "shard_directions": sharded,
                                "fit_seconds": sum(s.seconds for s in found[:-1]),
                                "stages": [
                                    rounded(asdict(s) | {"seconds": s.seconds, "limit": s.limit})
                                    for s in found
                                ],
                                "bytes": rounded(memory(measured[key], fit, world, sharded)),
                            }
                        )
    return {
        "measured": measured["environment"],
        "links": asdict(links),
        "devices": [asdict(device) for device in chosen],
        "fit": asdict(FITS[0]) | {"n_landmarks": list(LANDMARKS), "rank": [20, 100]},
        "rows": rows,
    }


# ------------------------------------------------------------------ tables

Model = dict[str, Any]  # {"measured": ..., "model": ...}
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


TABLES: dict[str, Callable[[Model], str]] = {
    "measured": measured_table,
    "assumed": assumed_table,
    "totals": totals_table,
    "stages-resnet50": stages_table("resnet50"),
    "stages-vit": stages_table("vit_b_16"),
    "bytes": bytes_table,
    "memory": memory_table,
    "sharded": sharded_table,
}


def report(args: argparse.Namespace) -> None:
    """Write the model and the page."""
    measured = json.loads(args.measured.read_text())
    links = Links(args.per_node, args.within * 1e9, args.between * 1e9, args.latency * 1e-6)
    found = modelled(measured, links)
    write(args.out or MODELLED, found)
    if args.out is None:
        PAGE.write_text(
            with_tables(PAGE.read_text(), {"measured": measured, "model": found}, TABLES, "scaling.py")
        )
        print(f"{PAGE.name}: tables written")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="time one process, and model nothing")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of interleaved calls")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="processor: use --threads 1")
    parser.add_argument("--part", choices=list(PARTS), help="in this process, printed as JSON")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="JSON of --measure")
    parser.add_argument("--per-node", type=int, default=8, help="GPUs a node")
    parser.add_argument("--within", type=float, default=300, help="GB/s a GPU sends within a node")
    parser.add_argument("--between", type=float, default=25, help="GB/s a GPU sends between nodes")
    parser.add_argument("--latency", type=float, default=50, help="microseconds a collective takes to start")
    parser.add_argument("--out", type=Path, help="where the JSON goes; of a model, without touching the page")
    args = parser.parse_args()
    if args.clock == "processor" and args.device.type != "cpu":
        parser.error("--clock processor measures nothing of a GPU")
    return args


def main() -> None:
    args = parse()
    args.data, args.malloc, args.quick = None, False, False  # what environment() says of run.py's options
    if args.part:
        torch.set_num_threads(args.threads)
        warnings.simplefilter("ignore")  # of other libraries
        print(json.dumps(PARTS[args.part](args)))
    elif args.measure:
        measure(args)
    else:
        report(args)


if __name__ == "__main__":
    main()
