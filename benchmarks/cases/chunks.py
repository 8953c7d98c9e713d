"""Features in the chunks that the package chooses, beside the best of a grid of them: ``run.py --only chunks``."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from functools import partial
from itertools import product

import laplace_ella
from benchmarks import inside
from benchmarks.cases.setting import TITLES, Part, Rows, repeats
from benchmarks.measure import interleaved, once, ratios, result
from benchmarks.problems import PROBLEMS, network, noise

Cut = tuple[int, int]  # inputs and directions of a call

NETWORKS = ("resnet20", "resnet18", "resnet18-64", "resnet50-64", "vit", "vit_b_16-64", "large-mlp")
BATCHES = (1, 8, 64)
# With --quick, these alone.
QUICK = (("resnet20", 8), ("resnet20", 64), ("resnet18", 1), ("resnet18", 8), ("large-mlp", 64))
WAYS = ("forward", "contraction")
# K is 20, but for a network of which 20 directions and what is prepared of them take 14 GB.
RANKS = {"vit_b_16-64": 5}
# Seconds for trying out a grid once; what is left of it then is not tried, and the row says so.
WITHIN = {True: 30, False: 400}
# How many of a grid are compared with what is chosen, round after round.
CONTENDERS = 3


def chosen_chunks(args: argparse.Namespace, name: str, batch: int, way: str) -> Rows:
    """Try chunks once, those like the chosen ones first; then compare the best of them with these."""
    model = network(name, args.data, args.device)
    x = noise(batch, PROBLEMS[name].shape, seed=0)[0].to(args.device)
    backend = laplace_ella.NystromGGN(model, "classification", autodiff=way)
    rank = RANKS.get(name, 20)
    basis = inside.random_basis(backend, rank)
    chosen = inside.chunks(backend, way, x, rank)
    call = partial(inside.features_in_chunks, backend, way, x, basis)
    room = max(inside.chunk_bytes(backend, way, x, *chosen), backend.engine.budget())
    cuts = [c for c in grid(len(x), rank, way) if inside.chunk_bytes(backend, way, x, *c) <= room]
    call(*chosen)  # a warm-up, which prepares what is kept for the directions
    seconds = {chosen: once(partial(call, *chosen), args.device)[0]}
    deadline = time.perf_counter() + WITHIN[args.quick]
    for cut in sorted(cuts, key=partial(distance, chosen)):
        if cut not in seconds and time.perf_counter() + seconds[chosen] < deadline:
            seconds[cut] = once(partial(call, *cut), args.device)[0]
    names = {c: f"{c[0]} x {c[1]}" for c in contenders(seconds, chosen)}
    functions = {names[c]: partial(call, *c) for c in names}
    calls = interleaved(functions, repeats(args, 3, 9), args.device, within=WITHIN[args.quick])
    best = min(calls, key=lambda key: calls[key].median())
    quotients = ratios(calls, names[chosen], best)
    return [
        result(
            f"chosen chunks over the best of a grid, {way}, {TITLES[name]}, B = {len(x)}",
            "times the best",
            quotients["median"],
            1.2,
            spread=quotients,
            problem=name,
            way=way,
            batch=len(x),
            K=rank,
            C=PROBLEMS[name].n_outputs,
            chosen=names[chosen],
            best=best,
            tried=f"{len(seconds)} of {len({chosen, *cuts})}",
            seconds={key: of.median() for key, of in calls.items()},
            seconds_of_one_call={f"{a} x {b}": s for (a, b), s in seconds.items()},
        )
    ]


def grid(batch: int, rank: int, way: str) -> list[Cut]:
    """Return how a batch and K directions may be cut: by powers of two, and into equal parts."""
    inputs = sorted({batch, *(2**i for i in range(batch.bit_length()) if 2**i < batch)})
    if way == "contraction":
        return [(b, rank) for b in inputs]
    directions = sorted({math.ceil(rank / parts) for parts in (1, 2, 3, 4, 5, 7, 10, 20)})
    return [(b, d) for b in inputs for d in directions]


def distance(chosen: Cut, other: Cut) -> float:
    """Say how unlike two ways to cut are, in doublings."""
    return sum(abs(math.log2(a / b)) for a, b in zip(chosen, other))


def contenders(seconds: dict[Cut, float], chosen: Cut) -> list[Cut]:
    """Return what is worth a comparison: what is chosen, and the fastest of the others."""
    others = sorted((cut for cut in seconds if cut != chosen), key=lambda cut: seconds[cut])
    return [chosen, *others[:CONTENDERS]]


def parts(sizes: Iterable[tuple[str, int]]) -> dict[str, Part]:
    return {
        f"{name}-{batch}-{way}": partial(chosen_chunks, name=name, batch=batch, way=way)
        for name, batch in sizes
        for way in WAYS
    }


CHUNK_CASES = {"chunks": parts(product(NETWORKS, BATCHES))}
QUICK_CHUNKS = {"chunks": parts(QUICK)}
