"""Measure what ELLA costs on this machine, in plain forward passes, and write it as JSON.

    python -m benchmarks.run --quick [--device cpu|cuda] [--data PATH] [--only CASE,CASE] [--malloc] [--out FILE]

See README.md beside this file for what is measured, and how.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import laplace_ella
from benchmarks.cases import ALL_CASES, CASES, COMBINE, COST_CASES, CUDA_CASES, QUICK_CASES
from benchmarks.environment import HERE, environment
from benchmarks.measure import failure

# Of the environment: numbers of one file are measured alike.
SAME_IN_A_FILE = (
    *("cpu", "gpu", "torch", "laplace-torch", "threads", "malloc", "OMP_WAIT_POLICY"),
    *("weights", "images", "dtype", "quick"),
)


def in_fresh_process(case: str, part: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one part of a case in a process of its own, so that none inherits another's memory."""
    command = [sys.executable, "-m", "benchmarks.run", "--part", case, part]
    command += ["--device", str(args.device), "--threads", str(args.threads)]
    command += ["--quick"] if args.quick else []
    command += ["--malloc"] if args.malloc else []
    command += ["--data", str(args.data)] if args.data else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return [failure(f"{case}, {part}", "", f"stopped after {args.limit} s", part=part)]
    if done.returncode < 0:  # by a signal, whatever was said before
        return [failure(f"{case}, {part}", "", f"exit code {done.returncode}", part=part)]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [failure(f"{case}, {part}", "", last, part=part)]
    *notes, last = done.stdout.splitlines()
    for note in notes:
        print(note)
    return json.loads(last)


def report(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return f"{row['case']:72} {row['failure']}"
    text = f"{row['case']:72}{row['value']:9.2f} {row['unit']:20}"
    if row["target"] is None:
        return text
    ((bound, number),) = row["target"].items()
    return f"{text} target: {bound} {number:g}, {'met' if row['met'] else 'MISSED'}"


def case_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in ALL_CASES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no case {', '.join(unknown)}; there are {', '.join(ALL_CASES)}")
    return names


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--data", type=Path, help="folder with cifar10_resnet20.pt, cifar10_jpeg_test.npz")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--only", type=case_names, metavar="CASE,CASE", help=f"of {', '.join(ALL_CASES)}")
    parser.add_argument("--add", action="store_true", help="to --out: of what it holds, --only is replaced")
    parser.add_argument("--malloc", action="store_true", help="call laplace_ella.raise_malloc_thresholds()")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument(
        "--limit", type=int, help="seconds a part may take; default: with --quick 180, or 65 on CUDA"
    )
    parser.add_argument("--out", type=Path, help="default: results/ here; with --only, nothing is written")
    parser.add_argument("--part", nargs=2, metavar=("CASE", "PART"), help="in this process, printed as JSON")
    args = parser.parse_args()
    if args.add and (args.out is None or args.only is None):
        parser.error("--add needs --out, the file, and --only, what to replace in it")
    if args.out is None and args.only is None:
        args.out = HERE / "results" / f"{default_name(args)}.json"
    if args.limit is None and args.quick:
        args.limit = 180 if args.device.type == "cpu" else 65  # eight parts in nine minutes
    if args.threads != 1 and any(case in COST_CASES for case in args.only or []):
        parser.error("costs-... are processor times of one thread: pass --threads 1")
    args.only = args.only or list(CASES if args.device.type == "cpu" else CUDA_CASES)
    return args


def default_name(args: argparse.Namespace) -> str:
    if args.device.type == "cuda":
        return "cuda"
    return ("quick" if args.quick else "full") + ("_malloc" if args.malloc else "")


def run_case(case: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    parts = (QUICK_CASES if args.quick else ALL_CASES)[case]
    rows = [row for part in parts for row in in_fresh_process(case, part, args)]
    combine = COMBINE.get(case)
    return [{**row, "group": case} for row in (combine(rows) if combine else rows)]


def require_same_settings(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to add to a file whose numbers were measured otherwise."""
    differ = [key for key in SAME_IN_A_FILE if before.get(key) != now.get(key)]
    if differ:
        was, is_ = (", ".join(f"{key} {about.get(key)}" for key in differ) for about in (before, now))
        raise SystemExit(
            f"The file's numbers were measured with {was}; this run has {is_}. Nothing was added; "
            "run it alike, or write another file."
        )


def main() -> None:
    args = parse()
    if args.part:
        if args.malloc:
            laplace_ella.raise_malloc_thresholds()
        torch.set_num_threads(args.threads)
        warnings.simplefilter("ignore")  # of other libraries, hundreds of them
        case, part = args.part
        print(json.dumps(ALL_CASES[case][part](args)))
        return
    about = environment(args)
    print("  ".join(f"{k} {v}" for k, v in about.items()))
    found: dict[str, Any] = {"environment": about, "results": []}
    if args.add:
        found = json.loads(args.out.read_text())
        require_same_settings(found["environment"], about)
        found["results"] = [row for row in found["results"] if row["group"] not in args.only]
        found.setdefault("added", []).append(about | {"only": args.only})
        about = found["added"][-1]
    start = time.perf_counter()
    for case in args.only:
        rows = run_case(case, args)
        found["results"] += rows
        for row in rows:
            print(report(row), flush=True)
        print(f"{case}: {time.perf_counter() - start:.0f} s since the start", flush=True)
    about["seconds"] = round(time.perf_counter() - start)
    if args.out is None:
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {os.path.relpath(args.out)}")


if __name__ == "__main__":
    main()
