"""Measure what M, K, n, the prior, the temperature and the draw of landmarks do, and write it as JSON."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.studies.ablations import cost, error, price, quality
from benchmarks.studies.common.cases import DEBIAN
from benchmarks.studies.common.results import results, save
from benchmarks.studies.common.start import options_of

Part = Callable[[argparse.Namespace], dict[str, Any]]


# Of the published network, which --data holds.
OF_DATA = {"price": price.calls, "directions": price.quality}


def parts_of(args: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    """Yield the name of each file, and what computes what is in it."""
    if args.part in (None, "error"):
        yield "error", error.run
    if args.part in (None, "quality"):
        for name in [args.case] if args.case else quality.CASES:
            if name == "cifar10-jpeg" and args.data is None:
                print(f"quality of {name}: skipped, as it needs --data", flush=True)
            else:
                yield f"quality_{name}", partial(quality.run_case, name)
    if args.part in (None, "cost"):
        yield "cost", cost.run
    for name, part in OF_DATA.items():
        if args.part in (None, name):
            if args.data is None:
                print(f"{name}: skipped, as it needs --data", flush=True)
            else:
                yield name, part


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = options_of(__package__)
    parser.add_argument("--part", choices=("error", "quality", "cost", *OF_DATA), help="default: all")
    parser.add_argument("--case", choices=list(quality.CASES), help="of quality; default: all")
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
        found = {"environment": about | ABOUT[name.split("_")[0]], **run(args)}
        found["environment"]["seconds"] = round(time.perf_counter() - start)
        print(f"{name}: {found['environment']['seconds']} s", flush=True)
        save(folder and folder / f"ablation_{name}.json", found)
