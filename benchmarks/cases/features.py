"""Gradients of landmarks, and features by every way to compute them."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import laplace_ella
from benchmarks import inside
from benchmarks.cases.setting import BATCHES, TITLES, Rows, on_device, repeats
from benchmarks.inside import ENGINES, random_basis, rows_by
from benchmarks.measure import GIGABYTE, Calls, PeakMemory, failure, interleaved, plain, ratios, result
from benchmarks.problems import PROBLEMS, network, noise

# As their users name them, and what has to be done by each at least, in forwards an input: C outputs, K directions.
WAYS: dict[str, Callable[[int, int], int]] = {
    "forward": lambda n_outputs, rank: 1 + 2 * rank,
    "contraction": lambda n_outputs, rank: 1 + n_outputs,
    "reverse": lambda n_outputs, rank: 1 + 2 * n_outputs,
}
# Whose Gram matrix is computed, in a minute from rows.
LANDMARKS = {"resnet20": 50, "vit": 16, "mlp": 200}
# So many landmarks as a large fit has, without rows, whose products would take minutes.
MANY_LANDMARKS = {"mlp": 2000}
# Of whose outputs the kernels of the exact residual are computed at once.
KERNELS = {"resnet20": 8, "vit": 2, "mlp": 4}
# Network, C, K -> what features may cost by the way that is chosen, in forwards an input.
FEATURES: dict[tuple[str, int, int], float | None] = {
    ("resnet20", 10, 20): 25,
    ("resnet20", 10, 100): 30,
    ("resnet20", 1, 20): 4.5,
    ("vit", 10, 20): 30,
    ("vit", 10, 100): 42,
    ("vit", 1, 20): 4.5,
    ("mlp", 10, 20): None,
    ("mlp", 1, 20): None,
}
CROSSOVER_BATCHES = {"resnet20": 8, "vit": 2, "mlp": 50, "tagger": 8}
CROSSOVER = [(1, 5), (1, 20), (10, 5), (10, 20), (10, 100)]
CHOSEN = "the way that is chosen"
# Of a round of calls, in seconds.
WITHIN = 100


def likelihood(n_outputs: int) -> str:
    return "regression" if n_outputs == 1 else "classification"


def ways(
    model: nn.Module, x: Tensor, n_outputs: int, rank: int, chosen: bool = True
) -> tuple[Any, dict[str, Callable[[], Any]]]:
    """Return a backend that chooses, and what computes features as it does and by each way, along the same directions."""
    backend = laplace_ella.NystromGGN(model, likelihood(n_outputs))
    basis = random_basis(backend, rank)
    functions = {CHOSEN: partial(backend.features, x, basis)} if chosen else {}
    for way in WAYS:
        named = laplace_ella.NystromGGN(model, likelihood(n_outputs), autodiff=way)
        functions[way] = partial(named.features, x, basis)
    return backend, functions


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


def gram(args: argparse.Namespace, name: str, size: int, ways: tuple[str, ...] = ("fit", "rows")) -> Rows:
    """Gradients and Gram matrix of M landmarks, as a fit computes them and from rows, in one batch's share of forwards."""
    batch = BATCHES[name]
    model = network(name, args.data, args.device)
    x = on_device(name, size, args)[0]
    outputs = torch.arange(size, device=args.device) % 10
    backend = laplace_ella.NystromGGN(model, "classification")
    forward = [plain(model, part) for part in x.split(batch)]
    functions = {
        "forward": lambda: [compute() for compute in forward],
        **{way: inside.landmark_gram(backend, x.split(1), outputs, by_layer=way == "fit") for way in ways},
    }
    calls = interleaved(functions, repeats(args, 2, 7), args.device, within=WITHIN)
    return [
        result(
            f"landmark gradients and Gram matrix, {TITLES[name]}, M = {size}, {way}",
            "forwards a landmark",
            ratios(calls, way, "forward")["median"],
            12 if (name, size, way) == ("mlp", LANDMARKS["mlp"], "fit") else None,
            problem=name,
            engine=way,
            M=size,
            spread=ratios(calls, way, "forward"),
        )
        for way in ways
    ]


def kernels(args: argparse.Namespace, name: str) -> Rows:
    """The kernels J J^T that the exact residual takes, layer by layer and from rows."""
    size, unit = KERNELS[name], "forwards an input"
    model = network(name, args.data, args.device)
    x = on_device(name, size, args)[0]
    backend = laplace_ella.NystromGGN(model, "classification")

    def title(way: str) -> str:
        return f"exact residual, {TITLES[name]}, {way}"

    functions: dict[str, Callable[[], Any]] = {"forward": plain(model, x)}
    rows = []
    for way in ("layer by layer", "rows"):
        try:
            functions[way] = inside.kernels(backend, x, way != "rows")
        except ValueError as error:
            rows.append(failure(title(way), unit, error, problem=name, engine=way))
    calls = interleaved(functions, repeats(args, 2, 7), args.device, within=WITHIN)
    about = {"problem": name, "batch": size}
    return [
        result(title(way), unit, of["median"], engine=way, spread=of, **about)
        for way in functions
        if way != "forward"
        for of in [ratios(calls, way, "forward")]
    ] + rows


def features(args: argparse.Namespace, name: str, n_outputs: int, rank: int) -> Rows:
    """Features by the way that is chosen and by each, in the chunks that are chosen."""
    batch = BATCHES[name]
    model = network(name, args.data, args.device, n_outputs)
    x = on_device(name, batch, args, n_outputs)[0]
    backend, functions = ways(model, x, n_outputs, rank)
    calls = interleaved(
        {"forward pass": plain(model, x), **functions}, repeats(args, 5, 21), args.device, within=WITHIN
    )
    mode = inside.mode(backend, x, rank)
    rows = []
    for way in functions:
        target = FEATURES[name, n_outputs, rank] if way == CHOSEN else None
        autodiff = mode.split()[0] if way == CHOSEN else way
        more = {"share_of_products": share_of_products(functions[way])} if way == CHOSEN else {}
        rows.append(
            result(
                f"features by {way}, {TITLES[name]}, K = {rank}, C = {n_outputs}",
                "forwards a sample",
                ratios(calls, way, "forward pass")["median"],
                target,
                headline=target is not None,
                **about_features(calls, way, WAYS[autodiff](n_outputs, rank), batch),
                problem=name,
                C=n_outputs,
                K=rank,
                way=way,
                mode=mode if way == CHOSEN else way,
                predicted=inside.predicted(backend, x, rank, autodiff),
                **more,
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


def about_features(calls: dict[str, Calls], way: str, floor: int, batch: int) -> dict[str, Any]:
    """What rows on features say besides the value."""
    quotients = ratios(calls, way, "forward pass")
    return {
        "batch": batch,
        "spread": quotients,
        "floor": floor,
        "over_floor": quotients["median"] / floor,
        "forward_ms_an_image": 1e3 * calls["forward pass"].median() / batch,
        "page_faults_a_call": statistics.median(calls[way].faults),
        "page_faults_a_forward": statistics.median(calls["forward pass"].faults),
    }


def crossover(args: argparse.Namespace, name: str) -> Rows:
    """Each way for several C and K, along the same directions, beside what the package counts for it."""
    rows, batch = [], CROSSOVER_BATCHES[name]
    x = on_device(name, batch, args)[0]
    for n_outputs, rank in CROSSOVER:
        model = network(name, args.data, args.device, n_outputs)
        backend, functions = ways(model, x, n_outputs, rank, chosen=False)
        calls = interleaved(
            {"forward pass": plain(model, x), **functions}, repeats(args, 2, 7), args.device, within=WITHIN
        )
        about = {"problem": name, "C": n_outputs, "K": rank, "batch": batch}
        about["chosen"] = inside.mode(backend, x, rank)
        about["predicted_crossover"] = inside.predicted_crossover(backend, x)
        rows += [
            result(
                f"features by {way}, {TITLES[name]}, K = {rank}, C = {n_outputs}",
                "forwards a sample",
                ratios(calls, way, "forward pass")["median"],
                mode=way,
                predicted=inside.predicted(backend, x, rank, way),
                spread=ratios(calls, way, "forward pass"),
                **about,
            )
            for way in functions
        ]
    return rows


# Network, C -> the batch, and the ways. Where outputs are many, each of them would have a backward pass in the other ways.
CUDA: dict[tuple[str, int], tuple[int, tuple[str, ...]]] = {
    ("resnet20", 10): (500, ("forward", "contraction", "reverse")),
    ("resnet50", 10): (50, ("forward", "contraction", "reverse")),
    ("resnet50", 1000): (50, ("forward",)),
    ("vit_b_16", 10): (50, ("forward", "contraction", "reverse")),
    ("vit_b_16", 1000): (50, ("forward",)),
}


def cuda(args: argparse.Namespace, name: str, n_outputs: int, rank: int = 20) -> Rows:
    """Each way on a GPU, with products in float32 and in TF32; the unit is a plain pass with the same ones."""
    batch, chosen = CUDA[name, n_outputs]
    model = network(name, None, args.device, n_outputs)
    x = noise(batch, PROBLEMS[name].shape, seed=0)[0].to(args.device)
    rows = []
    for tf32 in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        backend, functions = ways(model, x, n_outputs, rank, chosen=False)
        functions = {way: functions[way] for way in chosen}
        calls = interleaved(
            {"forward pass": plain(model, x), **functions}, repeats(args, 2, 7), args.device, within=10
        )
        for way, compute in functions.items():
            with PeakMemory(args.device) as peak:
                compute()
            rows.append(
                result(
                    f"features by {way}, {'TF32' if tf32 else 'float32'}, {name}",
                    "forwards a sample",
                    ratios(calls, way, "forward pass")["median"],
                    spread=ratios(calls, way, "forward pass"),
                    images_per_second=batch / calls[way].median(),
                    forward_images_per_second=batch / calls["forward pass"].median(),
                    peak_gb=peak.extra / GIGABYTE,
                    problem=name,
                    C=n_outputs,
                    K=rank,
                    batch=batch,
                    way=way,
                    tf32=tf32,
                    chosen=inside.mode(backend, x, rank),
                    predicted=inside.predicted(backend, x, rank, way),
                )
            )
    return rows
