"""Measure the choice among methods, numbers of directions and ways without validation data, and write it as JSON."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.choice import methods
from benchmarks.studies.choice.features import CURVATURE, Sizes, computed, counts_of
from benchmarks.studies.common.cases import CASES, Case, about, parsed, quick
from benchmarks.studies.common.results import chosen, results, save, text_of
from benchmarks.studies.common.start import options_of

# The seeds of the study of quality, 0 to 2, are those that rules were made on.
FIRST_SEED = 10


def run_seed(name: str, case: Case, sizes: Sizes, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return all that is measured with one seed."""
    features = computed(name, case, sizes, seed, args)
    start = time.process_time()
    choice, found = methods.choice(features, seed)
    return {
        "seed": seed,
        "training_accuracy": features.training_accuracy,
        "choice": choice,
        "ranks": methods.ranks(features),
        "defaults": methods.defaults(features, seed, found),
        "seconds": {"features": features.seconds, "all else": time.process_time() - start},
    }


def run_case(name: str, args: argparse.Namespace) -> None:
    """Run all seeds, and write after each."""
    case, sizes = CASES[name], Sizes(curvature_size=CURVATURE[name])
    case = replace(case, counts=counts_of(name, case))
    if args.quick:
        case, sizes = quick(case), Sizes(40, 30, 100)
    path = args.out or (None if args.quick else results("choice") / f"choice_{name}.json")
    found = {**about(name, case, args), "ella": asdict(sizes)}
    if args.add:
        found = _read(path, found)
    done = {one["seed"] for one in found["seeds"]}
    for seed in sorted(set(range(args.first_seed, args.first_seed + args.seeds)) - done):
        found["seeds"].append(run_seed(name, case, sizes, seed, args))
        one = found["seeds"][-1]
        print(text_of(f"{name}, seed {seed}", chosen(one["choice"]["methods"], "nll", "ece")), flush=True)
        print(text_of("without validation data", chosen(one["defaults"], "nll", "ece")), flush=True)
        save(path, found)


def _read(path: Path | None, like: dict[str, Any]) -> dict[str, Any]:
    """Return what a file holds, if it was run with the same sizes."""
    found: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else like
    for key in ("counts", "ella", "samples"):
        if found[key] != like[key]:
            raise SystemExit(
                f"The file holds a run with {key} {found[key]}, not {like[key]}. Run it again without --add."
            )
    return found


def main(arguments: list[str]) -> None:
    parser = options_of(__package__)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument(
        "--first-seed", type=int, default=FIRST_SEED, help=f"of as many as --seeds; default {FIRST_SEED}"
    )
    parser.add_argument("--add", action="store_true", help="the seeds that the file lacks")
    parser.add_argument("--keep", type=Path, help="folder in which features are kept, to be used again")
    args = parsed(parser, arguments)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # of other libraries, hundreds of them
    for name in CASES if args.case == "all" else [args.case]:
        run_case(name, args)
