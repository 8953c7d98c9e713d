"""Fit and tune a ResNet-20 in one process and in several, each with one thread: what is gained, and whether they agree.

    python -m benchmarks.processes [--data PATH] [--world 2] [--rounds 3] [--out benchmarks/results/processes.json]

Every run has processes of its own. The report of the study of scaling puts the result into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import laplace_ella
from benchmarks.environment import HERE, environment
from benchmarks.measure import GIGABYTE, PeakMemory
from benchmarks.problems import network, samples

N_TRAIN, N_VALIDATION, N_TEST, BATCH = 4000, 1000, 50, 50
OPTIONS = {"subsample_size": 300, "n_eigenvalues": 20, "curvature_size": 1000}


def loader(x: Tensor, y: Tensor, rank: int, world: int) -> DataLoader:
    data = TensorDataset(x, y)
    return DataLoader(data, BATCH, sampler=DistributedSampler(data, world, rank, shuffle=False))


def run(rank: int, world: int, folder: str, data: Path | None) -> None:
    """Do the work of one process; the first writes what came of it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of other libraries
    if world > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    device = torch.device("cpu")
    model = network("resnet20", data, device)
    x, y = samples("resnet20", N_TRAIN + N_VALIDATION + N_TEST, data)
    train, validation = slice(0, N_TRAIN), slice(N_TRAIN, N_TRAIN + N_VALIDATION)
    la = laplace_ella.ELLALaplace(model, "classification", **OPTIONS)
    with torch.no_grad():
        model(x[:BATCH])
    seconds = {}
    with PeakMemory(device) as peak:
        start = time.perf_counter()
        la.fit(loader(x[train], y[train], rank, world))
        seconds["fit"] = time.perf_counter() - start
        start = time.perf_counter()
        la.optimize_prior_precision(
            method="gridsearch",
            val_loader=loader(x[validation], y[validation], rank, world),
            link_approx="probit",
        )
        seconds["grid search"] = time.perf_counter() - start
    if rank == 0:
        found = {
            "H": la.H,
            "eigenvalues": la.basis.eigenvalues,
            "probabilities": la(x[-N_TEST:]),
            "temperature": torch.tensor(la.temperature),
        }
        torch.save(
            {"seconds": seconds, "extra_gb": peak.extra / GIGABYTE, "found": found}, f"{folder}/result.pt"
        )
    if world > 1:
        dist.destroy_process_group()


def once(world: int, data: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (world, folder, data), world)
        return torch.load(f"{folder}/result.pt", weights_only=True)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with cifar10_resnet20.pt, cifar10_jpeg_test.npz")
    parser.add_argument("--world", type=int, default=2, help="how many processes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "processes.json")
    args = parser.parse_args()
    # What environment() asks of a benchmark's arguments.
    args.device, args.malloc, args.threads, args.quick = torch.device("cpu"), False, 1, False
    found: dict[str, Any] = {"environment": environment(args), "world": args.world, "rounds": args.rounds}
    found |= {"N": N_TRAIN, "validation": N_VALIDATION, **OPTIONS}
    runs = [(once(1, args.data), once(args.world, args.data)) for _ in range(args.rounds)]
    for kind in ("fit", "grid search"):
        one, several = ([r[i]["seconds"][kind] for r in runs] for i in (0, 1))
        found[kind] = {
            "seconds_of_one": statistics.median(one),
            "seconds_of_several": statistics.median(several),
            "times_as_fast": statistics.median(a / b for a, b in zip(one, several)),
        }
        print(kind, found[kind])
    found["extra_gb"] = [statistics.median(r[i]["extra_gb"] for r in runs) for i in (0, 1)]
    found["relative_difference"] = {
        name: relative(runs[0][1]["found"][name], values) for name, values in runs[0][0]["found"].items()
    }
    print(found["extra_gb"], found["relative_difference"])
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {os.path.relpath(args.out)}")


if __name__ == "__main__":
    main()
