"""What one call of a prediction takes, in milliseconds: ``run.py --only latency``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.setting import TITLES, Part, Rows, on_device, repeats
from benchmarks.measure import interleaved, loader, plain, result, spread
from benchmarks.methods import LAST, flavour, ours
from benchmarks.problems import network
from laplace_ella.network.safety import safely

NETWORKS = ("resnet20", "resnet18", "vit", "bert")
BATCHES = (1, 8, 64)
# What locks, contexts, checks and the posterior take; ms that they may, in other networks 5.
BEYOND = "ELLA beyond its features"
BEYOND_FEATURES = {"resnet20": 2}
# Seconds of rounds for one batch size.
WITHIN = {True: 25, False: 300}


def features_alone(la: Any, x: Tensor) -> Callable[[], Any]:
    """Compute the features of ``x`` as a prediction does, with all checks, choices and preparations made before."""
    engine, directions = la.backend.engine, la.basis.directions
    choice = engine.choice(x)
    mode = choice.mode(la.basis.rank)
    return partial(engine.bound(mode, x, directions), x, choice.chunks(mode, la.basis.rank))


def latency(args: argparse.Namespace, name: str) -> Rows:
    """ELLA (K = 20), its features alone, the network, and laplace-torch's last-layer Laplace, of the same inputs.

    What a prediction takes beyond its features is what locks, contexts, checks, and the posterior take.
    """
    model = network(name, args.data, args.device)
    x, y = on_device(name, max(BATCHES), args)
    few = loader(x[:48], y[:48], 8)
    ella = ours(model, subsample_size=40, n_eigenvalues=20, curvature_size=8, temperature=1.0)
    last = flavour(LAST, "kron")(model)
    for la in (ella, last):
        la.fit(few)
    rows: Rows = []
    for batch in BATCHES:
        part = x[:batch]
        functions: dict[str, Callable[[], Any]] = {
            "MAP": plain(model, part),
            "ELLA": partial(ella, part),
            "ELLA's features alone": safely(model, partial(features_alone, ella, part)),
            "last layer, kron": partial(torch.no_grad()(last), part),
        }
        n = repeats(args, 20 if batch == 1 else 5, 100)
        run = partial(interleaved, functions, n, args.device, within=WITHIN[args.quick])
        calls = safely(model, run)  # outside of it, features cannot be computed by themselves
        seconds = {method: of.seconds for method, of in calls.items()}
        pairs = zip(seconds["ELLA"], seconds["ELLA's features alone"])
        seconds[BEYOND] = [whole - features for whole, features in pairs]
        for method, found in seconds.items():
            times = spread([1e3 * s for s in found])
            about = {"problem": name, "batch": batch, "method": method, "spread": times, "K": ella.basis.rank}
            title = f"prediction, {method}, {TITLES[name]}, B = {batch}"
            target = BEYOND_FEATURES.get(name, 5) if method == BEYOND else None
            rows.append(result(title, "ms", times["median"], target, **about))
    return rows


LATENCY_CASES: dict[str, dict[str, Part]] = {
    "latency": {name: partial(latency, name=name) for name in NETWORKS}
}
