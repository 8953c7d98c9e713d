"""What ``plan`` says that a fit and a prediction take, beside what they then take: ``run.py --only plan``."""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.measure import loader, once, result
from benchmarks.methods import ours
from benchmarks.problems import PROBLEMS, network, noise

# Network -> batch, N, M, n; a fit takes seconds.
SIZES = {
    "resnet18": (64, 200, 50, 100),
    "resnet18-64": (16, 64, 32, 32),
    "resnet20": (50, 400, 100, 100),
    "resnet50-64": (8, 48, 24, 16),
    "vit": (16, 100, 32, 32),
    "vit_b_16-64": (4, 24, 12, 8),
    "mlp": (50, 5000, 200, 2000),
    "large-mlp": (50, 1000, 64, 500),
}
RANKS = (5, 20)
FEW = ("vit_b_16-64",)  # 20 directions of which, and what is prepared of them, take 14 GB


def planned(args: argparse.Namespace, name: str, rank: int) -> list[dict[str, Any]]:
    """Plan, fit and predict in turn, round after round after a warm-up."""
    batch, n, n_landmarks, n_curvature = SIZES[name]
    n_outputs = PROBLEMS[name].n_outputs
    x, y = (t.to(args.device) for t in noise(n, PROBLEMS[name].shape, 0, n_outputs))
    batches, model = loader(x, y, batch), network(name, args.data, args.device)
    la = ours(model, subsample_size=n_landmarks, n_eigenvalues=rank, curvature_size=n_curvature)
    about = {"problem": name, "batch": batch, "N": n, "M": n_landmarks, "n": n_curvature}
    about |= {"C": n_outputs, "K": rank}
    calls: dict[str, Callable[[], Any]] = {
        "fit": lambda: la.fit(batches),
        "prediction of a batch": lambda: la(x[:batch]),
        "prediction of an input": lambda: la(x[:1]),
    }
    plans: list[Any] = []
    said, took = defaultdict(list), defaultdict(list)
    for round_ in range((2 if args.quick else 7) + 1):
        took["plan"].append(once(lambda: plans.append(la.plan(batches, verbose=False)), args.device)[0])
        plan = plans[-1]
        seconds = plan.total_seconds, plan.prediction * batch, plan.single_prediction
        for (what, call), planned_s in zip(calls.items(), seconds):
            measured = once(call, args.device)[0]
            if round_:
                said[what].append(planned_s)
                took[what].append(measured)
    stages = {s.name: s.seconds for s in plan.stages}
    about |= {"plan_took_s": statistics.median(took["plan"]), "last_plan_s": stages}
    return [
        result(
            f"plan of seconds and measurement, {what}, {name}, K = {rank}",
            "times apart",
            max(quotient, 1 / quotient),
            1.5,
            planned_s=said[what],
            measured_s=took[what],
            **about,
        )
        for what in calls
        for quotient in [statistics.median([a / b for a, b in zip(said[what], took[what])])]
    ]


PLAN_CASES = {
    "plan": {
        f"{name}-{rank}": partial(planned, name=name, rank=rank)
        for name in SIZES
        for rank in RANKS[: 1 if name in FEW else None]
    }
}
