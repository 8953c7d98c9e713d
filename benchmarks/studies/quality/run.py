"""Measure how good ELLA's probabilities are, beside simpler methods, and write it as JSON."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.studies.common import baselines, ella, scores
from benchmarks.studies.common.cases import CASES, Case, about, parsed, prepared, quick
from benchmarks.studies.common.groups import GROUPS, Shared
from benchmarks.studies.common.images import Data
from benchmarks.studies.common.results import chosen, results, save, text_of
from benchmarks.studies.common.start import options_of


def run_seed(case: Case, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return all scores of one seed."""
    data = case.data(case.counts, seed, args.fashion, args.data)
    on_device = data.to(args.device)
    start = time.perf_counter()
    model = prepared(case, on_device, seed, args)
    seconds = time.perf_counter() - start
    inputs = {"train": on_device.train[0], "validation": on_device.validation[0], "test": on_device.test[0]}
    outputs = {name: baselines.outputs(model, x) for name, x in (inputs | on_device.ood).items()}
    times = ella.Times(model, on_device.test[0][: ella.BATCH])
    shared = Shared(model, data, on_device, outputs, case.size, seed, times, "ella" in args.groups)
    rows: dict[str, baselines.Row] = {}
    for group in args.groups:
        rows |= GROUPS[group](shared)
    return {
        "seed": seed,
        "training_seconds": seconds if case.epochs else None,
        "training_accuracy": float((outputs["train"].f.argmax(1) == data.train[1]).double().mean()),
        "methods": baselines.scored(rows, data.test[1]),
        "novelty": novelty_scored(simple_novelty(outputs, rows) | shared.novelty, rows["MAP"], data),
        "times": times.stages,
    }


def simple_novelty(
    outputs: dict[str, baselines.Outputs], rows: dict[str, baselines.Row]
) -> dict[str, dict[str, Tensor]]:
    """Return the novelty scores that one forward pass gives, by their names, of each set."""
    functions = baselines.novelty_scores(outputs["train"], rows["temperature scaling"].parameters["divisor"])
    chosen = {name: out for name, out in outputs.items() if name not in ("train", "validation")}
    return {name: {of: score(out) for of, out in chosen.items()} for name, score in functions.items()}


def novelty_scored(found: dict[str, dict[str, Tensor]], row: baselines.Row, data: Data) -> dict[str, Any]:
    """Return how well each novelty score does; errors are those of the row's method."""
    wrong = row.probabilities["test"].argmax(1) != data.test[1]
    return {
        name: scores.of_novelty(of["test"], wrong, {outside: of[outside] for outside in data.ood})
        for name, of in found.items()
    }


def run_case(name: str, args: argparse.Namespace) -> None:
    """Run all seeds, and write after each."""
    case = quick(CASES[name]) if args.quick else CASES[name]
    path = args.out or (None if args.quick else results("quality") / f"quality_{name}.json")
    found = json.loads(path.read_text()) if args.add else about(name, case, args)
    seeds = args.only_seeds or list(range(args.seeds))
    if args.add:
        require_fitting(found, case, [] if args.only_seeds else seeds)
        about_seeds = {"seeds": args.only_seeds} if args.only_seeds else {}
        found.setdefault("added", []).append({"groups": args.groups, **about_seeds, **environment(args)})
    start = time.perf_counter()
    for seed in seeds:
        one = run_seed(case, seed, args)
        before = next((known for known in found["seeds"] if known["seed"] == seed), None)
        if before is None:
            found["seeds"].append(one)
        else:
            add(before, one)
        if not args.add:
            found["environment"]["seconds"] = round(time.perf_counter() - start)
        scores_of = chosen((before or one)["methods"], "nll", "ece", "accuracy", "brier")
        print(text_of(f"{name}, seed {seed}", scores_of), flush=True)
        save(path, found)


def require_fitting(found: dict[str, Any], case: Case, seeds: list[int]) -> None:
    """Refuse to add to what was run with other sizes, or without these seeds."""
    if (found["counts"], found["ella"]) != (asdict(case.counts), asdict(case.size)):
        raise SystemExit(
            "The file holds a run of other sizes. Nothing was added; run the whole case again, without --add."
        )
    missing = set(seeds) - {one["seed"] for one in found["seeds"]}
    if missing:
        raise SystemExit(
            f"The file has no seed {sorted(missing)}. Name it with --only-seeds to add it whole."
        )


def add(seed: dict[str, Any], more: dict[str, Any]) -> None:
    """Add methods to a seed's scores, if network and split are the same: then so is the NLL of MAP."""
    before, now = (one["methods"]["MAP"]["nll"] for one in (seed, more))
    if abs(before - now) > 1e-4:
        raise SystemExit(
            f"The NLL of MAP was {before:.5f} and is {now:.5f}: these are other networks or images. "
            "Nothing was added; run the whole case again, without --add."
        )
    seed["methods"] |= {k: row for k, row in more["methods"].items() if k not in baselines.REFERENCES}
    seed["novelty"] |= {k: row for k, row in more["novelty"].items() if k.startswith("ELLA")}
    seed["times"] |= more["times"]


def group_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    return [name for name in GROUPS if name in {"simple", *names}]


def seed_numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = options_of(__package__)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument(
        "--groups", type=group_names, default=list(GROUPS), help=f"of {','.join(GROUPS)}; 'simple' always"
    )
    parser.add_argument("--add", action="store_true", help="to the scores, or seeds, that the file holds")
    parser.add_argument(
        "--only-seeds", type=seed_numbers, help="with --add: these seeds instead of all, such as 1,2"
    )
    args = parsed(parser, arguments)
    if args.only_seeds and not args.add:
        parser.error("--only-seeds needs --add: a new file starts with seed 0")
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # of other libraries, hundreds of them
    for name in CASES if args.case == "all" else [args.case]:
        run_case(name, args)
