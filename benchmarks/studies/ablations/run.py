"""Measure what M, K, n, the prior, the temperature and the draw of landmarks do, and write it as JSON."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.studies.ablations import cost, error, landmarks, price, quality
from benchmarks.studies.common.cases import DEBIAN
from benchmarks.studies.common.results import results, save
from benchmarks.studies.common.start import options_of

# What is found so far, again and again until all is.
Part = Callable[[argparse.Namespace], Iterator[dict[str, Any]]]


# Of the published network, which --data holds.
OF_DATA = {"price": price.calls, "directions": price.quality}


def at_once(run: Callable[[argparse.Namespace], dict[str, Any]]) -> Part:
    return lambda args: (run(args) for _ in range(1))


def parts_of(args: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    """Yield the name of each file, and what computes what is in it."""
    if args.part in (None, "error"):
        yield "error", at_once(error.run)
    if args.part in (None, "quality"):
        for name in cases_of("quality", quality.CASES, args):
            yield f"quality_{name}", at_once(partial(quality.run_case, name))
    if args.part in (None, "cost"):
        yield "cost", at_once(cost.run)
    if args.part in (None, "landmarks"):
        for name in cases_of("landmarks", landmarks.CASES, args):
            yield f"landmarks_{name}", partial(landmarks.run_case, name)
    for name, part in OF_DATA.items():
        if args.part in (None, name):
            if args.data is None:
                print(f"{name}: skipped, as it needs --data", flush=True)
            else:
                yield name, at_once(part)


def cases_of(part: str, cases: Iterable[str], args: argparse.Namespace) -> Iterator[str]:
    """Yield the networks that are asked for, and can be had."""
    for name in cases:
        if args.case in (None, name):
            if name == "cifar10-jpeg" and args.data is None:
                print(f"{part} of {name}: skipped, as it needs --data", flush=True)
            else:
                yield name


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = options_of(__package__)
    parser.add_argument(
        "--part", choices=("error", "quality", "cost", "landmarks", *OF_DATA), help="default: all"
    )
    parser.add_argument(
        "--case", choices=list(landmarks.CASES), help="of quality and landmarks; default: all"
    )
    parser.add_argument("--data", type=Path, help="folder with cifar10_resnet20.pt and cifar10_jpeg_*.npz")
    parser.add_argument("--fashion", type=Path, default=DEBIAN, help="folder of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=3, help="of the landmarks")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it runs; writes nothing"
    )
    parser.add_argument("--out", type=Path, help="folder of the JSON; default: results/ here")
    return parser.parse_args(arguments)


# What environment() cannot know. The parts say which images they used.
OWN = {"weights": "see network", "images": "see data"}
ABOUT = {
    "error": {**OWN, "dtype": "float64"},
    "quality": OWN,
    "landmarks": {**OWN, "dtype": "see network"},
    "cost": {"weights": "random", "images": "noise"},
    **dict.fromkeys(OF_DATA, OWN),
}


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of other libraries
    folder = args.out or (None if args.quick else results("ablations"))
    for name, run in parts_of(args):
        start, about = time.perf_counter(), environment(args)
        for found in run(args):
            about |= ABOUT[name.split("_")[0]] | {"seconds": round(time.perf_counter() - start)}
            print(f"{name}: {about['seconds']} s", flush=True)
            save(folder and folder / f"ablation_{name}.json", {"environment": about, **found})
