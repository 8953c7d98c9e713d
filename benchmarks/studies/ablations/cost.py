"""Seconds and memory of a fit's stages, of features and predictions, against P, C, K, M and N, with exponents.

A convolutional network of a stated width on noise. Each cell has a process of its own and one thread; time is processor
time, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import inside
from benchmarks.measure import PeakMemory, give_back, interleaved, loader, plain
from benchmarks.methods import ours
from benchmarks.problems import noise
from laplace_ella import NystromGGN

BATCH, CURVATURE = 50, 100
MOST_PULLED = 100  # outputs, for reverse mode to be measured
SHAPE = (3, 16, 16)
AXES: dict[str, tuple[int, ...]] = {
    "width": (8, 16, 32, 48, 64, 96),  # P goes with its square
    "C": (2, 10, 30, 100, 300, 1000),
    "K": (5, 10, 20, 40, 80, 160),
    "M": (25, 50, 100, 200, 400, 800),
    "N": (500, 1000, 2000, 4000, 8000, 16000),
}
QUICK = {"width": (8, 16, 32), "C": (2, 5, 10), "K": (2, 4, 8), "M": (10, 20, 40), "N": (50, 100, 200)}


@dataclass(frozen=True)
class Cell:
    """One setting."""

    width: int = 32
    C: int = 10
    K: int = 20
    M: int = 200
    N: int = 1000
    rounds: int = 2


def convolutional(width: int, n_outputs: int) -> nn.Module:
    """Three strided convolutions, the mean over positions, and one linear layer: P goes with the squared width."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, n_outputs),
    )


def measured(cell: Cell) -> dict[str, Any]:
    """Return what one cell costs: seconds of each stage, and bytes a fit takes at its peak."""
    device = torch.device("cpu")
    torch.manual_seed(0)
    model = convolutional(cell.width, cell.C).eval()
    x, y = noise(cell.N, SHAPE, 0, cell.C)
    estimator(model, Cell(M=4, K=2)).fit(loader(x[:8], y[:8], 8))  # loads what is loaded at the first use
    la = estimator(model, cell)
    give_back()
    with warnings.catch_warnings(), PeakMemory(device) as of_fit:
        warnings.simplefilter("ignore", UserWarning)
        start = time.process_time()
        la.fit(loader(x, y, BATCH))
        seconds = time.process_time() - start
    give_back()
    with PeakMemory(device) as of_prediction:
        la(x[:BATCH])
    calls = interleaved(stages(la, model, x, cell), cell.rounds, device, time.process_time)
    return {
        "P": sum(p.numel() for p in model.parameters()),
        "mode": inside.mode(la.backend, x[:BATCH], cell.K),
        "rank": la.basis.rank,
        "seconds": {"fit": seconds, **{name: found.median() for name, found in calls.items()}},
        "bytes": {"fit": of_fit.extra, "prediction": of_prediction.extra},
    }


def estimator(model: nn.Module, cell: Cell) -> Any:
    options = {"subsample_size": cell.M, "n_eigenvalues": cell.K, "curvature_size": CURVATURE}
    return ours(model, **options)


def stages(la: Any, model: nn.Module, x: Tensor, cell: Cell) -> dict[str, Callable[[], Any]]:
    """Return a fit's stages one by one, and predictions, each as long as it would be there."""
    backend, batch, device = la.backend, x[:BATCH], x.device
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randint(cell.C, (cell.M,), generator=generator)
    rows_of = inside.landmark_rows(backend, (x[i % len(x)][None] for i in range(cell.M)), outputs)
    rows = rows_of()
    phi, f = backend.features(batch, la.basis)
    matrix = inside.inner_products(rows, device=device)
    coefficients = torch.randn(cell.M, cell.K, dtype=torch.float64, generator=generator)
    modes = {
        mode: NystromGGN(model, "classification", autodiff=mode)
        for mode in ("forward", "reverse")
        if mode == "forward" or cell.C <= MOST_PULLED
    }
    return {
        "forward": plain(model, batch),
        "scan": lambda: [inside.scan(backend, part) for part in x.split(BATCH)],
        "landmark gradients": rows_of,
        "Gram matrix": lambda: inside.inner_products(rows, device=device),
        "eigenvectors": partial(torch.linalg.eigh, matrix),
        "directions": lambda: [coefficients.T @ part.double() for part in rows.split(2048, 1)],
        **{
            f"features, {mode} mode": partial(with_mode.features, batch, la.basis)
            for mode, with_mode in modes.items()
        },
        "curvature": lambda: inside.curvature(backend, phi, f),
        "prediction": lambda: la(batch),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return all cells, and the exponents of each stage along each axis."""
    base = Cell(width=8, M=20, N=100, K=4, rounds=1) if args.quick else Cell()
    found: dict[str, list[dict[str, Any]]] = {}
    # A server that has imported everything and computed nothing forks a process for each cell.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(1, torch.set_num_threads, (args.threads,), maxtasksperchild=1) as pool:
        for axis, values in (QUICK if args.quick else AXES).items():
            cells = [replace(base, **{axis: v}) for v in values]
            found[axis] = [{"cell": asdict(cell), **pool.apply(measured, (cell,))} for cell in cells]
            print(f"cost along {axis}: done", flush=True)
    return {
        "batch": BATCH,
        "curvature_size": CURVATURE,
        "shape": SHAPE,
        "base": asdict(base),
        "axes": found,
        "exponents": {axis: exponents(axis, rows) for axis, rows in found.items()},
    }


def exponents(axis: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the slope of the log of each cost in the log of P, C, K, M or N, over the upper range.

    A stage that was not measured there is left out.
    """
    upper = rows[-max(3, len(rows) - 2) :]
    at = [row["P"] if axis == "width" else row["cell"][axis] for row in upper]
    names = [("seconds", name) for name in rows[0]["seconds"]] + [("bytes", "fit"), ("bytes", "prediction")]
    found = {}
    for kind, name in names:
        costs = [row[kind].get(name) for row in upper]
        key = name if kind == "seconds" else f"peak memory of a {name}"
        if all(costs) and min(costs) > 0:
            found[key] = {**slope(at, costs), "from": at[0], "to": at[-1]}
    return found


def slope(at: list[float], costs: list[float]) -> dict[str, float]:
    """Fit log cost = a + b log at by least squares: b with its standard error."""
    x, y = [math.log(v) for v in at], [math.log(c) for c in costs]
    b, a = statistics.linear_regression(x, y)
    left = sum((v - a - b * u) ** 2 for u, v in zip(x, y))
    around = sum((u - statistics.fmean(x)) ** 2 for u in x)
    return {"exponent": b, "standard_error": math.sqrt(left / (len(x) - 2) / around)}
