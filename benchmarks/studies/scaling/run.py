"""Measure what a fit takes in one process, or work out what it takes on several, and write it as JSON."""

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
from functools import partial
from pathlib import Path
from typing import Any

import torch

import laplace_ella
from benchmarks import inside
from benchmarks.environment import environment
from benchmarks.measure import GIGABYTE, PeakMemory, interleaved, plain, ratios
from benchmarks.problems import network, samples
from benchmarks.studies.common.results import results, save
from benchmarks.studies.common.start import options_of
from benchmarks.studies.scaling.model import LANDMARKS, RANK, TITLES, Links, modelled

MEASURED = results("scaling") / "scaling_measured.json"
MODELLED = results("scaling") / "scaling.json"

N_OUTPUTS = 1000
# Images a batch: of the passes that are compared with each other.
BATCHES = {"resnet50": 8, "vit_b_16": 4}
# Directions of a second measurement, to see whether features cost 1 + 2K there too; memory allows one network.
MORE_DIRECTIONS = {"resnet50": 100}
# Columns of the matrices whose products are timed; a fit multiplies slices, so that their number does not matter.
COLUMNS = 2**15


# Processor time is for machines that others use too: with one thread, their work hardly adds to it.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def random_basis(model: torch.nn.Module, rank: int) -> laplace_ella.NystromBasis:
    """Return K directions of noise: features cost the same along any."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    directions = {
        name: torch.randn(rank, *p.shape, generator=generator, device=p.device) / p.numel() ** 0.5
        for name, p in model.named_parameters()
    }
    ones = torch.ones(rank, dtype=torch.float64)
    return laplace_ella.NystromBasis(directions, ones, float(rank), ones)


def measure_network(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time passes, gradients and features of one network against a plain pass of the same batch."""
    device, batch = args.device, BATCHES[name]
    model = network(name, None, device, N_OUTPUTS)
    x = samples(name, batch, None, N_OUTPUTS)[0].to(device)
    plain(model, x)()
    backend = laplace_ella.NystromGGN(model, "classification")
    rows = inside.landmark_rows(backend, x.split(1), torch.arange(batch) * 7 % N_OUTPUTS)
    with PeakMemory(device) as peak:
        basis = random_basis(model, RANK)
        phi, f = backend.features(x, basis)
        functions: dict[str, Callable[[], Any]] = {
            "forward": plain(model, x),
            "scan": lambda: inside.scan(backend, x),
            "gradients": rows,
            "features": lambda: backend.features(x, basis),
            "curvature": lambda: inside.curvature(backend, phi, f),
        }
        calls = interleaved(functions, args.rounds, device, CLOCKS[args.clock])
    found = {
        "title": TITLES[name],
        "P": sum(p.numel() for p in model.parameters()),
        "row_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "input_bytes": x[0].numel() * x.element_size(),
        "batch": batch,
        "K": RANK,
        "C": N_OUTPUTS,
        "seconds_a_forward": calls["forward"].median() / batch,
        "forwards": {kind: ratios(calls, kind, "forward") for kind in functions if kind != "forward"},
        "rounds": args.rounds,
        "features_mode": inside.mode(backend, x, RANK),
        "extra_gb": peak.extra / GIGABYTE,
        "peak_gb": (peak.before + peak.extra) / GIGABYTE,
    }
    basis = None  # before the next
    functions.clear()
    if name in MORE_DIRECTIONS:
        found["more_directions"] = more_directions(model, backend, x[:1], MORE_DIRECTIONS[name], args)
    return found


def more_directions(
    model: torch.nn.Module, backend: Any, x: torch.Tensor, rank: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Time features along more directions against a plain pass, in the mean of two rounds."""
    basis = random_basis(model, rank)
    functions = {"forward": plain(model, x), "features": lambda: backend.features(x, basis)}
    calls = interleaved(functions, 2, args.device, CLOCKS[args.clock])
    quotients = [a / b for a, b in zip(calls["features"].seconds, calls["forward"].seconds)]
    return {"K": rank, "batch": len(x), "features": statistics.fmean(quotients)}


def measure_products(args: argparse.Namespace) -> dict[str, Any]:
    """Time what a fit does in float64: Gram matrices, their eigenvectors, combinations of rows."""
    found: dict[str, Any] = {"columns": COLUMNS, "gram": {}, "eigh": {}, "combine": {}}
    for m in LANDMARKS:
        generator = torch.Generator(args.device).manual_seed(0)
        values = torch.randn(m, COLUMNS, generator=generator, device=args.device)
        coefficients = torch.randn(m, RANK, dtype=torch.float64, generator=generator, device=args.device)
        matrix = inside.inner_products(values, device=args.device)
        calls = interleaved(
            {
                "gram": partial(inside.inner_products, values, device=args.device),
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
        command = [sys.executable, "-m", __package__, "run", "--measure", "--part", part]
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
    save(args.out or MEASURED, found)


def write(path: Path, found: dict[str, Any]) -> None:
    """Write the model: of its rows, which are hundreds, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in found.pop("rows"))
    path.write_text(json.dumps(found, indent=1)[:-2] + ',\n "rows": [\n' + lines + "\n ]\n}\n")
    print(f"written: {os.path.relpath(path)}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = options_of(__package__)
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
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args(arguments)
    if args.clock == "processor" and args.device.type != "cpu":
        parser.error("--clock processor measures nothing of a GPU")
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    if args.part:
        torch.set_num_threads(args.threads)
        warnings.simplefilter("ignore")  # of other libraries
        print(json.dumps(PARTS[args.part](args)))
    elif args.measure:
        measure(args)
    else:
        links = Links(args.per_node, args.within * 1e9, args.between * 1e9, args.latency * 1e-6)
        write(args.out or MODELLED, modelled(json.loads(args.measured.read_text()), links))
