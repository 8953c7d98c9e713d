"""What ``plan`` says a fit and a prediction take, beside what they then take: ``run.py --only plan``."""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

from measure import Calls, interleaved, loader, result, synchronize
from methods import ours
from problems import PROBLEMS, network, noise

# Network -> batch, N, M, n; a fit takes seconds.
SIZES = {
    "resnet18": (64, 200, 50, 100),
    "resnet20": (50, 1000, 100, 200),
    "vit": (16, 200, 50, 60),
    "mlp": (50, 5000, 200, 2000),
}
RANKS = (5, 20)


def planned(args: argparse.Namespace, name: str, rank: int) -> list[dict[str, Any]]:
    """Plan a fit and fit, in turn; the seconds of both, and of predictions."""
    batch, n, n_landmarks, n_curvature = SIZES[name]
    model = network(name, args.data, args.device)
    x, y = (t.to(args.device) for t in noise(n, PROBLEMS[name].shape, 0, PROBLEMS[name].n_outputs))
    batches = loader(x, y, batch)
    la = ours(model, subsample_size=n_landmarks, n_eigenvalues=rank, curvature_size=n_curvature)
    plans, fits = [], Calls()
    spent = Calls()
    for _ in range(3 if args.quick else 7):
        start = time.perf_counter()
        plans.append(la.plan(batches, verbose=False))
        spent.seconds.append(time.perf_counter() - start)
        synchronize(args.device)
        start = time.perf_counter()
        la.fit(batches)
        synchronize(args.device)
        fits.seconds.append(time.perf_counter() - start)
    calls = interleaved(
        {"many": lambda: la(x[:batch]), "single": lambda: la(x[:1])}, 3 if args.quick else 7, args.device
    )
    about = {
        "problem": name,
        "batch": batch,
        "N": n,
        "M": n_landmarks,
        "n": n_curvature,
        "C": PROBLEMS[name].n_outputs,
        "K": rank,
    }
    title = f"{name}, K = {rank}"
    rows = []
    for what, plan, measured in (
        ("fit", [p.total_seconds for p in plans], fits.seconds),
        ("prediction of a batch", [p.prediction * batch for p in plans], calls["many"].seconds),
        ("prediction of an input", [p.single_prediction for p in plans], calls["single"].seconds),
    ):
        quotient = statistics.median(plan) / statistics.median(measured)
        rows.append(
            result(
                f"plan of seconds and measurement, {what}, {title}",
                "times apart",
                max(quotient, 1 / quotient),
                1.5,
                planned_s=plan,
                measured_s=measured,
                plan_took_s=statistics.median(spent.seconds),
                stages_s={s.name: s.seconds for s in plans[-1].stages},
                **about,
            )
        )
    return rows


PLAN_CASES = {
    "plan": {f"{name}-{rank}": partial(planned, name=name, rank=rank) for name in SIZES for rank in RANKS}
}
