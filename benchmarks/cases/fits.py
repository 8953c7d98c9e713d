"""Fits and predictions: their memory, by each method, and end to end on CUDA."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.cases.setting import BATCHES, TITLES, Rows, is_cuda, on_device, repeats
from benchmarks.measure import GIGABYTE, PeakMemory, failure, interleaved, loader, once, plain, ratios, result
from benchmarks.methods import METHODS, does_not_fit, ours
from benchmarks.problems import PROBLEMS, NoiseBatches, network, samples


def memory(args: argparse.Namespace, name: str, n_landmarks: int) -> Rows:
    """Peak memory of a fit beyond what model, data and one forward pass hold, and what ``plan`` says of it."""
    model = network(name, args.data, args.device)
    n = max(100, n_landmarks + 50)
    batch = BATCHES[name]
    x, y = samples(name, n, args.data)
    plain(model, x[:batch].to(args.device))()
    la = ours(model, subsample_size=n_landmarks, n_eigenvalues=20, curvature_size=batch)
    planned = la.plan(loader(x, y, batch)).peak if hasattr(la, "plan") else None
    with PeakMemory(args.device) as peak:
        la.fit(loader(x, y, batch))
    about = {"problem": name, "batch": batch, "M": n_landmarks, "K": 20, "N": n}
    headline = (name, n_landmarks) == ("resnet20", 200)
    title = f"{TITLES[name]}, M = {n_landmarks}"
    measured = peak.extra / GIGABYTE
    rows = [
        result(
            f"peak extra memory of fit, {title}",
            "GB",
            measured,
            2 if headline else None,
            headline=headline,
            **about,
        )
    ]
    if planned is not None:
        quotient = planned / GIGABYTE / measured
        rows.append(
            result(
                f"plan of peak memory and measurement, {title}",
                "times apart",
                max(quotient, 1 / quotient),
                1.5,
                planned_gb=planned / GIGABYTE,
                measured_gb=measured,
                **about,
            )
        )
    return rows


def method(args: argparse.Namespace, name: str, chosen: str) -> Rows:
    """Fit to 200 inputs and prediction of 8, in batches of 8, and the peak memory of both."""
    model = network(name, args.data, args.device)
    x, y = on_device(name, 200, args)
    unit = "forwards an input"
    about = {"problem": name, "method": chosen, "batch": 8, "N": 200}
    fit_title, predict_title = (f"{stage}, {chosen}, {TITLES[name]}" for stage in ("fit", "prediction"))
    batches, few = loader(x, y, 8), loader(x[:8], y[:8], 8)
    passes = [plain(model, xb) for xb, _ in batches]
    build, reason = METHODS[chosen], does_not_fit(chosen, model)
    if reason:
        return [failure(title, unit, reason, **about) for title in (fit_title, predict_title)]
    calls = interleaved({"forward": lambda: [forward() for forward in passes]}, 3, args.device)
    forward = calls["forward"].median() / 200
    rows = []
    try:
        with PeakMemory(args.device) as peak:
            if build is not None:
                la = build(model)
                seconds, _ = once(lambda: la.fit(batches), args.device)
                rows.append(
                    result(fit_title, unit, seconds / 200 / forward, stage="fit", seconds=seconds, **about)
                )
                predict = partial(predictions, la, few)
            else:
                predict = partial(predictions, model.forward, few)
            calls = interleaved({"predict": predict}, repeats(args, 1, 3), args.device)
    except Exception as error:
        title = predict_title if rows or build is None else fit_title
        return [*rows, failure(title, unit, error, stage="prediction" if rows else "fit", **about)]
    seconds = calls["predict"].median()
    rows.append(
        result(predict_title, unit, seconds / 8 / forward, stage="prediction", seconds=seconds, **about)
    )
    return [{**row, "peak_gb": peak.extra / GIGABYTE} for row in rows]


@torch.no_grad()
def predictions(predict: Callable[[Tensor], Tensor], batches: Iterable[Any]) -> Tensor:
    return torch.cat([predict(x).detach() for x, _ in batches])


def cuda(args: argparse.Namespace, name: str, n: int, batch: int) -> Rows:
    """A fit end to end (M = 2 000, K = 20), and predictions, with peak memory; nothing is repeated."""
    n = n if not args.quick else min(n, 5_000)
    n_landmarks = 2_000 if not args.quick else 500
    model = network(name, None, args.device)
    batches: Any = DataLoader(NoiseBatches(name, n, batch), batch_size=None)
    if name == "resnet20":
        batches = list(batches)  # small images: making them would take longer than the fit
    few = [x.to(args.device) for x, _ in (NoiseBatches(name, 4 * batch, batch)[i] for i in range(4))]
    options = {"n_eigenvalues": 20, "curvature_size": 2_000}
    warm_up = ours(model, subsample_size=24, n_eigenvalues=20, curvature_size=24)
    warm_up.fit([(x[:8], torch.zeros(len(x[:8]), dtype=torch.int64)) for x in few])
    del warm_up
    la = ours(model, subsample_size=n_landmarks, **options)
    with PeakMemory(args.device) as peak:
        fit_seconds, _ = once(lambda: la.fit(batches), args.device)
    calls = interleaved(
        {
            "forward": lambda: [plain(model, x)() for x in few],
            "predict": lambda: [la(x, link_approx="probit") for x in few],
        },
        repeats(args, 2, 5),
        args.device,
    )
    about = {"problem": name, "batch": batch, "M": n_landmarks, "curvature_size": 2_000, "K": la.basis.rank}
    about |= {"N": n, "C": PROBLEMS[name].n_outputs}
    in_all = {"peak_gb": torch.cuda.max_memory_allocated(args.device) / GIGABYTE} if is_cuda(args) else {}
    images = 4 * batch
    return [
        result(
            f"fit, {name}",
            "s",
            fit_seconds,
            images_per_second=n / fit_seconds,
            extra_gb=peak.extra / GIGABYTE,
            **in_all,
            **about,
        ),
        result(
            f"prediction, {name}",
            "forwards a sample",
            ratios(calls, "predict", "forward")["median"],
            6,
            spread=ratios(calls, "predict", "forward"),
            images_per_second=images / calls["predict"].median(),
            forward_images_per_second=images / calls["forward"].median(),
            **in_all,
            **about,
        ),
    ]
