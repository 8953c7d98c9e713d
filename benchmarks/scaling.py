"""What a fit costs on several processes: measure one process, and work out the rest.

    python benchmarks/scaling.py --measure [--device cpu|cuda] [--threads 2] [--clock wall|processor] [--out FILE]
    python benchmarks/scaling.py [--measured FILE] [--within 300] [--between 25] [--latency 50] [--out FILE]
    python benchmarks/scaling_report.py

With --measure: seconds of one process, for ResNet-50 and ViT-B/16, to results/scaling_measured.json. Without: the
model of scaling_model.py, of a fit on 1 to 64 GPUs, from that file and from what is assumed of GPUs and links, to
results/scaling.json. scaling_report.py writes the tables of docs/scaling.md from both.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from laplace_ella.basis import NystromBasis
from laplace_ella.landmarks import Landmarks
from laplace_ella.row_source import gram
from measure import GIGABYTE, PeakMemory, interleaved, plain, ratios
from problems import network, samples
from run import environment
from scaling_model import LANDMARKS, RANK, TITLES, Links, modelled

import laplace_ella

HERE = Path(__file__).resolve().parent
MEASURED = HERE / "results" / "scaling_measured.json"
MODELLED = HERE / "results" / "scaling.json"

N_OUTPUTS = 1000
# Images a batch: of the passes that are compared with each other.
BATCHES = {"resnet50": 8, "vit_b_16": 4}
# Directions of a second measurement, to see whether features cost 1 + 2K there too; memory allows one network.
MORE_DIRECTIONS = {"resnet50": 100}
# Columns of the matrices whose products are timed; a fit multiplies slices, so that their number does not matter.
COLUMNS = 2**15


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
    from laplace_ella.safety import safe_autodiff

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
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        text = text[:-2] + ',\n "rows": [\n' + lines + "\n ]\n}"
    path.write_text(text + "\n")
    print(f"written: {os.path.relpath(path)}")


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
    parser.add_argument("--out", type=Path, help="where the JSON goes")
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
        links = Links(args.per_node, args.within * 1e9, args.between * 1e9, args.latency * 1e-6)
        write(args.out or MODELLED, modelled(json.loads(args.measured.read_text()), links))


if __name__ == "__main__":
    main()
