"""What is measured: functions of the command line's options that return rows.

``CASES`` maps a case to its parts; each part runs in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from typing import Any

import laplace
import torch
from laplace_ella.autodiff import FunctionalModel
from laplace_ella.gradients import asdl_rows, backpack_rows, gradient_rows
from laplace_ella.safety import safe_autodiff
from measure import (
    GIGABYTE,
    Calls,
    PeakMemory,
    failure,
    interleaved,
    loader,
    once,
    plain,
    ratios,
    result,
    spread,
)
from methods import METHODS, does_not_fit, of_host, ours
from problems import PROBLEMS, NoiseBatches, network, samples
from torch import Tensor, nn
from torch.utils.data import DataLoader

import laplace_ella
from laplace_ella import accumulation

Rows = list[dict[str, Any]]
Part = Callable[[argparse.Namespace], Rows]

ENGINES = {"torch.func": gradient_rows, "BackPACK": backpack_rows, "ASDL": asdl_rows}
TITLES = {"resnet20": "ResNet-20", "vit": "ViT", "mlp": "MLP", "tiny": "tiny MLP"}
# Small enough that a fit or a few rounds take seconds.
BATCHES = {"resnet20": 50, "vit": 16, "mlp": 50}
CROSSOVER_BATCHES = {"resnet20": 8, "vit": 2, "mlp": 50}
CROSSOVER = [(1, 5), (1, 20), (2, 20), (10, 20), (10, 100)]


def repeats(args: argparse.Namespace, quick: int, full: int) -> int:
    return quick if args.quick else full


def on_device(name: str, n: int, args: argparse.Namespace, n_outputs: int = 10) -> tuple[Tensor, Tensor]:
    x, y = samples(name, n, args.data, n_outputs)
    return x.to(args.device), y.to(args.device)


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
    function = FunctionalModel(model)
    unit = "forwards a landmark"

    def rows_by(engine: Callable[..., Any], size: int = batch) -> Callable[[], Any]:
        def compute() -> Any:
            with safe_autodiff(model):
                return engine(function, function.weights(), x[:size], outputs[:size])

        return compute

    def title(engine: str) -> str:
        return f"landmark gradients, {TITLES[name]}, {engine}"

    functions, rows = {}, []
    for engine, rows_of in ENGINES.items():
        try:
            rows_by(rows_of, 2)()  # libraries without a rule for a layer say so
            functions[engine] = rows_by(rows_of)
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
            "unfused": lambda x=x: la.backend.forward(x),
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


def has_host() -> bool:
    if not hasattr(laplace, "ELLA"):
        print(f"laplace-torch {version('laplace-torch')} has no ELLA: comparison skipped")
    return hasattr(laplace, "ELLA")


def against_host(args: argparse.Namespace) -> Rows:
    """Fit and prediction against laplace-torch's own ELLA: M = N = 24, K = 20, exact G, batches of 8."""
    if not has_host():
        return []
    model = network("resnet20", args.data, args.device)
    x, y = on_device("resnet20", 24, args)
    batches = loader(x, y, 8)
    sizes = {"subsample_size": 24, "n_eigenvalues": 20}
    estimators: dict[str, Any] = {}

    def fit_ours(landmarks: tuple[Tensor, Tensor] | None = None) -> None:
        la = ours(model, curvature_size=None, temperature=1.0, **sizes)
        la.fit(batches, landmarks=landmarks)
        estimators["ours"] = la

    def fit_host(batch: int) -> None:
        estimators["host"] = la = of_host(model, **sizes)
        la.fit(loader(x, y, batch))

    def predict(name: str) -> Callable[[], Tensor]:
        return lambda: torch.cat([estimators[name](xb, link_approx="probit") for xb, _ in batches])

    fits = {"ours": fit_ours, "host, one at a time": partial(fit_host, 1), "host": partial(fit_host, 8)}
    fit_calls = interleaved(fits, repeats(args, 2, 7), args.device)
    predictions = {"ours": predict("ours"), "host": predict("host")}
    prediction_calls = interleaved(predictions, repeats(args, 3, 7), args.device)
    # The two draw different landmarks; with the host's, predictions agree.
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(estimators["host"].seed))
    outputs = torch.randint(10, (24,), generator=torch.Generator().manual_seed(estimators["host"].seed + 1))
    fit_ours((x[chosen.to(x.device)], outputs))
    apart = float((predict("ours")() - predict("host")()).abs().max())
    fit_target, prediction_target = (8, 2.4) if args.malloc else (20, 3)
    own = "against laplace-torch's own ELLA"
    return [
        result(
            case,
            "times as fast",
            ratios(calls, host, "ours")["median"],
            target,
            at_most=False,
            headline=True,
            spread=ratios(calls, host, "ours"),
            seconds={k: v.median() for k, v in calls.items()},
            **more,
        )
        for case, host, calls, target, more in (
            (f"fit {own}", "host", fit_calls, fit_target, {}),
            (f"fit {own}, given one input at a time", "host, one at a time", fit_calls, None, {}),
            (
                f"prediction {own}",
                "host",
                prediction_calls,
                prediction_target,
                {"largest_difference_with_equal_landmarks": apart},
            ),
        )
    ]


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


def memory_of_host(args: argparse.Namespace, batch: int | None) -> Rows:
    """Peak memory of a fit at M = N = 24 by laplace-torch's own ELLA; of ours (batches of 8) if no batch is given."""
    if not has_host():
        return []
    model = network("resnet20", args.data, args.device)
    x, y = samples("resnet20", 24, args.data)
    plain(model, x.to(args.device))()
    sizes = {"subsample_size": 24, "n_eigenvalues": 20}
    la = of_host(model, **sizes) if batch else ours(model, **sizes)
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
            spread=ratios(calls, "predict", "forward"),
            images_per_second=images / calls["predict"].median(),
            forward_images_per_second=images / calls["forward"].median(),
            **in_all,
            **about,
        ),
    ]


def tuned_problem(args: argparse.Namespace, n_validation: int) -> tuple[Any, list[Any]]:
    """Return an estimator fitted to 200 images, and validation batches of 50."""
    model = network("resnet20", args.data, args.device)
    x, y = on_device("resnet20", 200 + n_validation, args)
    la = ours(model, subsample_size=50, n_eigenvalues=20)
    la.fit(loader(x[:200], y[:200], 50))
    return la, list(loader(x[200:], y[200:], 50))


def tuning(args: argparse.Namespace, kind: str, n_validation: int = 1000) -> Rows:
    """What a search costs beyond the features of the validation data, of which one pass is the unit."""
    la, batches = tuned_problem(args, n_validation)

    def features() -> None:
        for x, _ in batches:
            la.features(x)

    def grid() -> None:
        la.temperature = 1.0
        la.optimize_prior_precision(method="gridsearch", val_loader=batches, grid_size=100)

    def joint(link: str) -> None:
        la.temperature = None
        la.optimize_hyperparameters(batches, link_approx=link, apply=False)

    title, search, target = {
        "grid": ("grid search of 100 priors", grid, 1.1),
        "probit": ("search of (T, s), probit link", partial(joint, "probit"), 1.3),
        "mc": ("search of (T, s), Monte-Carlo link of 128 samples", partial(joint, "mc"), 2),
    }[kind]
    calls = interleaved({"features": features, "search": search}, repeats(args, 2, 5), args.device)
    return [
        result(
            f"{title}, {n_validation} images",
            "passes of features",
            ratios(calls, "search", "features")["median"],
            target,
            headline=True,
            spread=ratios(calls, "search", "features"),
            seconds={k: v.median() for k, v in calls.items()},
            kind=kind,
        )
    ]


def tuning_of_host(args: argparse.Namespace, n_images: int = 8, n_values: int = 2) -> Rows:
    """A grid search of laplace-torch's own ELLA on a few images and values; its cost is the product of both."""
    if not has_host():
        return []
    la, batches = tuned_problem(args, 100)
    x, y = on_device("resnet20", 24 + n_images, args)
    host = of_host(la.model, subsample_size=24, n_eigenvalues=20)
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


def sampled_curvature(args: argparse.Namespace, rank: int, sizes: tuple[int, ...]) -> Rows:
    """G from sampled labels against the exact one of the same inputs: its error, and what an input costs."""
    model = network("resnet20", args.data, args.device)
    x, y = on_device("resnet20", max(sizes) + 100, args)
    rows = []
    for n in sizes:
        fitted, calls = {}, {}
        for kind in ("exact", "mc"):
            la = ours(model, subsample_size=2 * rank, n_eigenvalues=rank, curvature_size=None, curvature=kind)
            la.fit(loader(x[:50], y[:50], 50))  # finds out what the model supports
            batches = loader(x[:n], y[:n], 50)
            calls[kind], _ = once(partial(fit_curvature, la, batches), args.device)
            la.temperature = 1000.0
            fitted[kind] = la
        exact, mc = fitted["exact"], fitted["mc"]
        phi, _ = exact.features(x[-100:])
        spreads = [float(la.functional_variance(phi).diagonal(dim1=1, dim2=2).mean()) for la in (mc, exact)]
        rows.append(
            result(
                f"sampled labels, K = {rank}, n = {n}: error of G",
                "relative",
                float((mc.H - exact.H).norm() / exact.H.norm()),
                K=rank,
                n=n,
                variance_ratio=spreads[0] / spreads[1],
                times_cheaper=calls["exact"] / calls["mc"],
            )
        )
    return rows


def fit_curvature(la: Any, batches: list[Any]) -> None:
    curvature_of = la.backend.curvature_of(la.basis, sampled=int(la.curvature == "mc"))
    la.H, n = torch.zeros_like(la.H), 0
    for xb, _ in batches:
        la.H += curvature_of(accumulation.Part("a batch", torch.arange(n, n + len(xb)), xb))
        n += len(xb)


def is_cuda(args: argparse.Namespace) -> bool:
    return args.device.type == "cuda"


CASES: dict[str, dict[str, Part]] = {
    "gradients": {name: partial(gradients, name=name) for name in BATCHES},
    "features": {name: partial(features, name=name) for name in ("resnet20", "vit")},
    "reverse": {"resnet20": reverse},
    "crossover": {name: partial(crossover, name=name) for name in CROSSOVER_BATCHES},
    "host": {"resnet20": against_host},
    "composed": {"resnet20": composed},
    "memory": {
        **{
            f"{name}-{m}": partial(memory, name=name, n_landmarks=m)
            for name, m in (("resnet20", 200), ("resnet20", 500), ("mlp", 40), ("vit", 40))
        },
        "ours": partial(memory_of_host, batch=None),
        **{f"host-{batch}": partial(memory_of_host, batch=batch) for batch in (1, 4, 8)},
    },
    "methods": {
        **{name: partial(method, name="resnet20", chosen=name) for name in METHODS},
        "tiny, full": partial(method, name="tiny", chosen="all weights, full"),
    },
}
# Minutes of searches, in a file of their own.
TUNING_CASES: dict[str, dict[str, Part]] = {
    "tuning": {
        **{kind: partial(tuning, kind=kind) for kind in ("grid", "probit", "mc")},
        "host": tuning_of_host,
    },
    "sampled": {
        "20": partial(sampled_curvature, rank=20, sizes=(100, 400, 1000)),
        "100": partial(sampled_curvature, rank=100, sizes=(200,)),
    },
}
CUDA_CASES: dict[str, dict[str, Part]] = {
    "cuda-resnet20": {"resnet20": partial(cuda, name="resnet20", n=50_000, batch=500)},
    "cuda-resnet50": {"resnet50": partial(cuda, name="resnet50", n=2_000, batch=50)},
    "cuda-vit-b-16": {"vit_b_16": partial(cuda, name="vit_b_16", n=2_000, batch=50)},
}
# What is computed from the rows of all parts of a case.
COMBINE: dict[str, Callable[[Rows], Rows]] = {"memory": compared_memory}
