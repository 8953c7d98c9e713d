"""Against laplace-torch's own ELLA: fits, predictions, memory and a search."""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.setting import Rows, has_host, on_device, repeats, tuned_problem
from benchmarks.measure import (
    GIGABYTE,
    Calls,
    PeakMemory,
    interleaved,
    loader,
    once,
    plain,
    ratios,
    result,
    spread,
)
from benchmarks.methods import of_host, ours
from benchmarks.problems import network, samples

SIZES = {"subsample_size": 24, "n_eigenvalues": 20}


def against_host(args: argparse.Namespace) -> Rows:
    """Fit and prediction against laplace-torch's own ELLA: M = N = 24, K = 20, exact G, batches of 8."""
    if not has_host():
        return []
    model = network("resnet20", args.data, args.device)
    x, y = on_device("resnet20", 24, args)
    batches = loader(x, y, 8)
    fitted: dict[str, Any] = {}

    def fit_ours(landmarks: tuple[Tensor, Tensor] | None = None) -> None:
        fitted["ours"] = la = ours(model, curvature_size=None, temperature=1.0, **SIZES)
        la.fit(batches, landmarks=landmarks)

    def fit_host(batch: int) -> None:
        fitted["host"] = la = of_host(model, **SIZES)
        la.fit(loader(x, y, batch))

    def predict(name: str) -> Tensor:
        return torch.cat([fitted[name](xb, link_approx="probit") for xb, _ in batches])

    fits = {"ours": fit_ours, "host, one at a time": partial(fit_host, 1), "host": partial(fit_host, 8)}
    fit_calls = interleaved(fits, repeats(args, 2, 7), args.device)
    predictions = {name: partial(predict, name) for name in ("ours", "host")}
    prediction_calls = interleaved(predictions, repeats(args, 3, 7), args.device)
    # The two draw different landmarks; with the host's, predictions agree.
    fit_ours(landmarks_of(fitted["host"], x))
    apart = float((predict("ours") - predict("host")).abs().max())
    fit_target, prediction_target = (8, 2.4) if args.malloc else (20, 3)
    own = "against laplace-torch's own ELLA"
    return [
        compared(f"fit {own}", fit_calls, "host", fit_target),
        compared(f"fit {own}, given one input at a time", fit_calls, "host, one at a time", None),
        compared(
            f"prediction {own}",
            prediction_calls,
            "host",
            prediction_target,
            largest_difference_with_equal_landmarks=apart,
        ),
    ]


def landmarks_of(host: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs and outputs that laplace-torch's own ELLA draws of these inputs, all of them."""
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(host.seed))
    outputs = torch.randint(10, (len(x),), generator=torch.Generator().manual_seed(host.seed + 1))
    return x[chosen.to(x.device)], outputs


def compared(case: str, calls: dict[str, Calls], host: str, target: float | None, **more: Any) -> Any:
    """Return the row that says how many times as fast ours is."""
    quotients = ratios(calls, host, "ours")
    seconds = {name: of.median() for name, of in calls.items()}
    more = {"headline": True, "spread": quotients, "seconds": seconds, **more}
    return result(case, "times as fast", quotients["median"], target, at_most=False, **more)


def composed(args: argparse.Namespace, m: int = 500) -> Rows:
    """A fit to N = 50 000 inputs, as the sum of its stages; each stage is the difference of two short fits."""
    if not has_host():
        return []
    n, n_curvature, rank = 50_000, 2_000, 20
    model = network("resnet20", args.data, args.device)
    more = 10 * m  # inputs are cheap: only many of them stand out
    x, y = on_device("resnet20", m + more, args)

    def fit(n_data: int, curvature_size: int) -> None:
        la = ours(model, subsample_size=m, n_eigenvalues=rank, curvature_size=curvature_size)
        la.fit(loader(x[:n_data], y[:n_data], 50))

    few = 10
    fits = {
        "short": partial(fit, m, few),
        "more data": partial(fit, m + more, few),
        "more G": partial(fit, m, few + 50),
    }
    calls = interleaved(fits, repeats(args, 2, 5), args.device)
    totals, stages = [], []
    for short, data, curvature in zip(*(c.seconds for c in calls.values())):
        an_input, a_feature = (data - short) / more, (curvature - short) / 50
        basis = short - m * an_input - few * a_feature
        totals.append(n * an_input + basis + n_curvature * a_feature)
        stages.append({"input": an_input, "landmarks": basis, "curvature_input": a_feature})
    host = {batch: host_stages(args, model, x, y, rank, batch) for batch in (1, 8)}
    host_totals = {batch: m * cost["landmark"] + n * cost["input"] for batch, cost in host.items()}
    best = min(host_totals, key=lambda batch: host_totals[batch])
    quotients = [host_totals[best] / total for total in totals]
    return [
        result(
            "fit to 50 000 inputs against laplace-torch's own ELLA (composed)",
            "times as fast",
            statistics.median(quotients),
            50,
            at_most=False,
            headline=True,
            spread=spread(quotients),
            seconds={"ours": statistics.median(totals), "host": host_totals[best]},
            seconds_of_stages={"ours": stages, "host": host},
            seconds_of_host_by_batch=host_totals,
            host_batch=best,
            N=n,
            M=m,
            K=rank,
            curvature_size=n_curvature,
        )
    ]


def host_stages(
    args: argparse.Namespace, model: nn.Module, x: Tensor, y: Tensor, rank: int, batch: int
) -> dict[str, float]:
    """Seconds laplace-torch's own ELLA takes a landmark, and an input of its curvature."""

    def fit(n_landmarks: int, n_eigenvalues: int, batch: int) -> Any:
        la = of_host(model, subsample_size=n_landmarks, n_eigenvalues=n_eigenvalues)
        la.fit(loader(x[:16], y[:16], batch))
        return la

    # The first call is a warm-up.
    _, few, many = (once(partial(fit, n, 2, batch), args.device)[0] for n in (8, 8, 16))
    # What its fit calls for every batch; a difference of two fits would drown in the landmarks' noise.
    la = fit_directions(model, x, y, rank)
    calls = interleaved({"features": lambda: la._features(x[:batch])}, 3, args.device)
    return {"landmark": (many - few) / 8, "input": calls["features"].median() / batch}


def fit_directions(model: nn.Module, x: Tensor, y: Tensor, rank: int) -> Any:
    la = of_host(model, subsample_size=rank, n_eigenvalues=rank)
    la.fit(loader(x[:rank], y[:rank], 1))
    return la


def memory_of_host(args: argparse.Namespace, batch: int | None) -> Rows:
    """Peak memory of a fit at M = N = 24 by laplace-torch's own ELLA; of ours (batches of 8) if no batch is given."""
    if not has_host():
        return []
    model = network("resnet20", args.data, args.device)
    x, y = samples("resnet20", 24, args.data)
    plain(model, x.to(args.device))()
    la = of_host(model, **SIZES) if batch else ours(model, **SIZES)
    with PeakMemory(args.device) as peak:
        la.fit(loader(x.to(args.device), y.to(args.device), batch or 8))
    who = f"laplace-torch's own ELLA in batches of {batch}" if batch else "ours in batches of 8"
    return [
        result(
            f"peak extra memory of fit, M = N = 24, {who}",
            "GB",
            peak.extra / GIGABYTE,
            estimator="host" if batch else "ours",
            batch=batch or 8,
            M=24,
            N=24,
            K=20,
        )
    ]


def compared_memory(rows: Rows) -> Rows:
    """Add how ours compares with laplace-torch's own ELLA at the batch size that suits that best."""
    by = {who: [row["value"] for row in rows if row.get("estimator") == who] for who in ("ours", "host")}
    if not by["ours"] or not by["host"] or None in by["ours"] + by["host"]:
        return rows
    title = "peak extra memory of fit over that of laplace-torch's own ELLA, M = N = 24"
    return [
        *rows,
        result(title, "times", by["ours"][0] / min(by["host"]), 1 / 5, headline=True, M=24, N=24, K=20),
    ]


def tuning_of_host(args: argparse.Namespace, n_images: int = 8, n_values: int = 2) -> Rows:
    """A grid search of laplace-torch's own ELLA on a few images and values; its cost is the product of both."""
    if not has_host():
        return []
    la, batches = tuned_problem(args, 100)
    x, y = on_device("resnet20", 24 + n_images, args)
    host = of_host(la.model, **SIZES)
    host.fit(loader(x[:24], y[:24], 8))
    la.temperature = 1.0

    def of_ours() -> None:
        la.optimize_prior_precision(method="gridsearch", val_loader=batches, grid_size=100)

    def of_theirs() -> None:
        validation = loader(x[24:], y[24:], n_images)
        host.optimize_prior_precision(
            pred_type="gp", method="gridsearch", val_loader=validation, grid_size=n_values
        )

    calls = interleaved({"ours": of_ours, "host": of_theirs}, repeats(args, 2, 5), args.device)
    # Seconds an image for 100 values.
    scale = (100 / n_values / n_images) / (1 / 100)
    quotients = {k: v * scale for k, v in ratios(calls, "host", "ours").items()}
    return [
        result(
            "grid search of 100 priors against laplace-torch's own ELLA",
            "times as fast",
            quotients["median"],
            100,
            at_most=False,
            headline=True,
            spread=quotients,
            seconds={k: v.median() for k, v in calls.items()},
            images={"ours": 100, "host": n_images},
            values={"ours": 100, "host": n_values},
        )
    ]
