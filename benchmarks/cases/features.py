"""Gradients of landmarks, and features by forward and reverse mode."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import laplace_ella
from benchmarks.cases.setting import BATCHES, TITLES, Rows, on_device, repeats
from benchmarks.inside import ENGINES, rows_by, scan
from benchmarks.measure import Calls, failure, interleaved, loader, plain, ratios, result
from benchmarks.methods import ours
from benchmarks.problems import network

CROSSOVER_BATCHES = {"resnet20": 8, "vit": 2, "mlp": 50}
CROSSOVER = [(1, 5), (1, 20), (2, 20), (10, 20), (10, 100)]


def likelihood(n_outputs: int) -> str:
    return "regression" if n_outputs == 1 else "classification"


def fitted(
    model: nn.Module, name: str, n_outputs: int, rank: int, args: argparse.Namespace, **options: Any
) -> Any:
    """Return an estimator with K directions, from a fit as short as they allow."""
    n = max(50, rank + 10)
    la = ours(
        model,
        likelihood(n_outputs),
        subsample_size=min(rank + 10, n * n_outputs),
        n_eigenvalues=rank,
        curvature_size=1,
        **options,
    )
    la.fit(loader(*on_device(name, n, args, n_outputs), 10))
    return la


def gradients(args: argparse.Namespace, name: str) -> Rows:
    """Landmark gradients of one batch, by each engine that knows the layers."""
    batch = BATCHES[name]
    model = network(name, args.data, args.device)
    x = on_device(name, batch, args)[0]
    outputs = torch.arange(batch, device=args.device) % 10
    unit = "forwards a landmark"

    def title(engine: str) -> str:
        return f"landmark gradients, {TITLES[name]}, {engine}"

    functions, rows = {}, []
    for engine in ENGINES:
        try:
            rows_by(engine, model, x[:2], outputs[:2])()  # libraries without a rule for a layer say so
            functions[engine] = rows_by(engine, model, x, outputs)
        except Exception as error:
            rows.append(failure(title(engine), unit, error, problem=name, engine=engine))
    calls = interleaved({"forward": plain(model, x), **functions}, repeats(args, 7, 21), args.device)
    return [
        result(
            title(engine),
            unit,
            ratios(calls, engine, "forward")["median"],
            6 if (name, engine) == ("resnet20", "torch.func") else None,
            headline=name == "resnet20",
            problem=name,
            engine=engine,
            batch=batch,
            spread=ratios(calls, engine, "forward"),
            forward_ms_an_image=1e3 * calls["forward"].median() / batch,
        )
        for engine in functions
    ] + rows


def features(args: argparse.Namespace, name: str) -> Rows:
    """Features at K = 20, C = 10, with the automatic chunks."""
    model = network(name, args.data, args.device)
    la = fitted(model, name, 10, 20, args)
    rows = []
    for batch in {"resnet20": (50, 8), "vit": (16,)}[name]:
        x = on_device(name, batch, args)[0]
        functions = {
            "forward": plain(model, x),
            "unfused": lambda x=x: scan(la.backend, x),
            "features": lambda x=x: la.backend.features(x, la.basis),
        }
        calls = interleaved(functions, repeats(args, 7 if name == "resnet20" else 3, 21), args.device)
        usual = batch == BATCHES[name]
        rows.append(
            result(
                f"features, {TITLES[name]}, K = 20, C = 10" + ("" if usual else f", batches of {batch}"),
                "forwards a sample",
                ratios(calls, "features", "forward")["median"],
                44 if usual else None,
                headline=usual,
                **about_features(calls, 1 + 2 * la.basis.rank, batch),
                problem=name,
                # Without fused kernels, as forward mode needs it.
                over_unfused_forward=ratios(calls, "features", "unfused")["median"],
                share_of_products=share_of_products(functions["features"]),
            )
        )
    return rows


PRODUCTS = ("convolution", "mm", "conv2d", "matmul")


def share_of_products(function: Callable[[], Any]) -> float:
    """Profile one call: the share of its time that convolutions and matrix products take.

    The rest is elementwise: what more fusing could remove at most.
    """
    with torch.profiler.profile() as profiled:
        function()
    times = {row.key: row.self_cpu_time_total + row.self_device_time_total for row in profiled.key_averages()}
    products = sum(time for name, time in times.items() if any(part in name for part in PRODUCTS))
    return products / sum(times.values())


def about_features(calls: dict[str, Calls], floor: int, batch: int) -> dict[str, Any]:
    """What rows on features say besides the value."""
    quotients = ratios(calls, "features", "forward")
    return {
        "batch": batch,
        "spread": quotients,
        "floor": floor,
        "over_floor": quotients["median"] / floor,
        "forward_ms_an_image": 1e3 * calls["forward"].median() / batch,
        "page_faults_a_call": statistics.median(calls["features"].faults),
        "page_faults_a_forward": statistics.median(calls["forward"].faults),
    }


def reverse(args: argparse.Namespace) -> Rows:
    """Features by reverse mode, where C is small against K."""
    rows, name, batch = [], "resnet20", 50
    for n_outputs, rank, target in ((1, 20, 12), (10, 100, 90)):
        model = network(name, args.data, args.device, n_outputs)
        la = fitted(model, name, n_outputs, rank, args, backend=laplace_ella.ReverseNystromGGN)
        x = on_device(name, batch, args)[0]
        functions = {
            "forward": plain(model, x),
            "features": lambda x=x, la=la: la.backend.features(x, la.basis),
        }
        calls = interleaved(functions, repeats(args, 5, 21), args.device)
        rows.append(
            result(
                f"features by reverse mode, {TITLES[name]}, K = {la.basis.rank}, C = {n_outputs}",
                "forwards a sample",
                ratios(calls, "features", "forward")["median"],
                target,
                headline=True,
                problem=name,
                **about_features(calls, 1 + 2 * n_outputs, batch),
            )
        )
    return rows


def crossover(args: argparse.Namespace, name: str) -> Rows:
    """Forward against reverse mode for several C and K, on the same directions."""
    rows, batch = [], CROSSOVER_BATCHES[name]
    x = on_device(name, batch, args)[0]
    modes = ("forward", "reverse")
    for n_outputs, rank in CROSSOVER:
        model = network(name, args.data, args.device, n_outputs)
        basis = fitted(model, name, n_outputs, rank, args).basis
        functions: dict[str, Callable[[], Any]] = {"plain": plain(model, x)}
        for mode in modes:
            backend = laplace_ella.NystromGGN(model, likelihood(n_outputs), autodiff=mode)
            functions[mode] = partial(backend.features, x, basis)
        calls = interleaved(functions, repeats(args, 2, 7), args.device)
        rows += [
            result(
                f"features by {mode} mode, {TITLES[name]}, K = {basis.rank}, C = {n_outputs}",
                "forwards a sample",
                ratios(calls, mode, "plain")["median"],
                problem=name,
                mode=mode,
                C=n_outputs,
                K=basis.rank,
                batch=batch,
                spread=ratios(calls, mode, "plain"),
            )
            for mode in modes
        ]
        del basis, functions
    return rows
