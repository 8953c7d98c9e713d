"""Measure what M, K, n, the prior, the temperature and the draw of landmarks do to quality and cost, as JSON.

    python benchmarks/ablations.py [--part error|quality|cost] [--case CASE] [--data PATH] [--fashion PATH]
        [--seeds 3] [--threads 1] [--quick] [--out FILE]
    python benchmarks/ablation_report.py

error: the kernel and the predictive covariance against exact linearised Laplace. quality: NLL and ECE of two
networks. cost: seconds and memory, and their exponents. Without --part, all of them. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ablation_cost
import ablation_error
import ablation_quality
import torch
from quality import DEBIAN
from run import environment

HERE = Path(__file__).resolve().parent
Part = Callable[[argparse.Namespace], dict[str, Any]]


def parts_of(args: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    """Yield the name of each file, and what computes what is in it."""
    if args.part in (None, "error"):
        yield "error", ablation_error.run
    if args.part in (None, "quality"):
        for name in [args.case] if args.case else ablation_quality.CASES:
            if name == "cifar10-jpeg" and args.data is None:
                print(f"quality of {name}: skipped, as it needs --data", flush=True)
            else:
                yield f"quality_{name}", partial(ablation_quality.run_case, name)
    if args.part in (None, "cost"):
        yield "cost", ablation_cost.run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("error", "quality", "cost"), help="default: all")
    parser.add_argument("--case", choices=list(ablation_quality.CASES), help="of quality; default: all")
    parser.add_argument("--data", type=Path, help="folder with cifar10_resnet20.pt and cifar10_jpeg_*.npz")
    parser.add_argument("--fashion", type=Path, default=DEBIAN, help="folder of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=3, help="of the landmarks")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that it runs; writes nothing"
    )
    parser.add_argument("--out", type=Path, help="folder of the JSON; default: results/ here")
    return parser.parse_args()


# What environment() cannot know, since it speaks of run.py's data. The parts say which images they used.
OWN = {"weights": "see network", "images": "see data"}
ABOUT = {
    "error": {**OWN, "dtype": "float64"},
    "quality": OWN,
    "cost": {"weights": "random", "images": "noise"},
}


def main() -> None:
    args = parse()
    args.device, args.malloc = torch.device("cpu"), False  # what environment() says of run.py's options
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of other libraries
    folder = args.out or (None if args.quick else HERE / "results")
    for name, run in parts_of(args):
        start, about = time.perf_counter(), environment(args)
        found = {"environment": about | ABOUT[name.split("_")[0]], **run(args)}
        found["environment"]["seconds"] = round(time.perf_counter() - start)
        print(f"{name}: {found['environment']['seconds']} s", flush=True)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"ablation_{name}.json"
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(f"written: {os.path.relpath(path)}", flush=True)


if __name__ == "__main__":
    main()
