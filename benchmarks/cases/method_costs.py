"""What each method of the study of quality costs by its own calls, on each network: fit, tuning, prediction, peak memory.

Sizes are a fraction of those of that study, in the same proportions, so that costs an input are the same.
Every method has a process of its own, with limits of memory and processor time.
"""

from __future__ import annotations

import argparse
import resource
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.setting import Part, Rows
from benchmarks.measure import GIGABYTE, PeakMemory, failure, interleaved, loader, once, plain, result
from benchmarks.methods import ALL, LAST, does_not_fit, flavour, of_host, ours
from benchmarks.networks import MNISTCNN, SmallCNN, SmallViT, efficientnet_lite0, imagenet_images
from benchmarks.problems import ResNet20, noise

N_SAMPLES = 128
LIMIT_GB, LIMIT_SECONDS = 12, 120
# Processor time: what others do on the machine meanwhile matters little. Run with --threads 1. A limit of
# processor time makes the kernel count that of a whole process in ticks of milliseconds, not that of a thread.
CLOCK = time.thread_time
# Of the prior precision, in searches of laplace-torch: each costs as much as any other.
CANDIDATES = 2


@dataclass(frozen=True)
class Problem:
    """A network with inputs and the sizes of a fit; costs do not depend on weights and images."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n: int  # training inputs
    landmarks: int
    curvature: int
    batch: int = 20
    few: int = 40  # inputs to tune with, and to predict

    def inputs(self) -> tuple[Tensor, Tensor]:
        return noise(self.n, self.shape, seed=0)


@dataclass(frozen=True)
class Pictures(Problem):
    """ImageNet's twenty pictures."""

    def inputs(self) -> tuple[Tensor, Tensor]:
        return imagenet_images()


GREY = (1, 28, 28)
PROBLEMS = {
    "fashion-cnn": Problem(SmallCNN, GREY, 1200, 20, 80),
    "fashion-vit": Problem(SmallViT, GREY, 1200, 20, 80),
    "mnist-cnn": Problem(MNISTCNN, GREY, 80, 20, 80),
    "cifar10-jpeg": Problem(ResNet20, (3, 32, 32), 400, 20, 80),
    "efficientnet-lite0": Pictures(efficientnet_lite0, (3, 224, 224), 20, 20, 20, batch=1, few=4),
}


def ella(problem: Problem, **options: Any) -> Callable[[nn.Module], Any]:
    sizes = {"subsample_size": problem.landmarks, "n_eigenvalues": 20, "curvature_size": problem.curvature}
    return partial(ours, **sizes, **options)


def host_ella(problem: Problem, model: nn.Module) -> Any:
    return of_host(model, subsample_size=problem.landmarks, n_eigenvalues=20)


# These hold Jacobians of a whole batch: in larger ones they do not end.
IN_SMALL_BATCHES = {"all-weights diagonal", "all-weights KFAC", "laplace-torch's ELLA"}
METHODS: dict[str, Callable[[Problem], Callable[[nn.Module], Any]]] = {
    "last-layer full": lambda _: flavour(LAST, "full"),
    "last-layer KFAC": lambda _: flavour(LAST, "kron"),
    "last-layer diagonal": lambda _: flavour(LAST, "diag"),
    "all-weights full": lambda _: flavour(ALL, "full"),
    "all-weights KFAC": lambda _: flavour(ALL, "kron"),
    "all-weights diagonal": lambda _: flavour(ALL, "diag"),
    "laplace-torch's ELLA": lambda problem: partial(host_ella, problem),
    "ELLA": ella,
    "ELLA, sampled G": lambda problem: ella(problem, curvature="mc"),
}


def costs(args: argparse.Namespace, name: str, method: str) -> Rows:
    """Fit, tune and predict by the library's own calls; stages after one that fails are not tried."""
    set_limits()
    torch.manual_seed(0)
    problem = PROBLEMS[name]
    model = problem.build().eval()
    reason = does_not_fit(method.replace("-weights", " weights,"), model)
    x, y = problem.inputs()
    about = {"problem": name, "method": method, "parameters": sum(p.numel() for p in model.parameters())}
    if reason:
        return [failure(f"fit, {method}, {name}", "", reason, stage="fit", **about)]
    la = METHODS[method](problem)(model)
    batch = min(problem.batch, 8) if method in IN_SMALL_BATCHES else problem.batch
    few = loader(x[: problem.few], y[: problem.few], batch)
    n_few = min(problem.few, len(x))
    stages: dict[str, tuple[Callable[[], Any], int]] = {
        "fit": (lambda: la.fit(loader(x, y, batch)), len(x)),
        **{stage: (partial(tune, la, few), n_few) for stage, tune in searches(la).items()},
        "predict": (lambda: predictions(la, few), n_few),
    }
    rows: Rows = []
    before = forward_seconds(model, x, problem.batch)
    for stage, (run, n_inputs) in stages.items():
        title, unit = f"{stage}, {method}, {name}", "forwards an input"
        try:
            with PeakMemory(args.device) as peak:
                seconds, _ = once(run, args.device, CLOCK)
            after = forward_seconds(model, x, problem.batch)
        except Exception as error:
            return [*rows, failure(title, unit, error, stage=stage, **about)]
        forward, before = (before + after) / 2, after  # the machine's speed changes
        tried = {"candidates": CANDIDATES} if stage == "grid search" and not is_ours(la) else {}
        numbers = {"seconds": seconds, "forward_seconds": forward, "peak_gb": peak.extra / GIGABYTE, **tried}
        rows.append(result(title, unit, seconds / n_inputs / forward, stage=stage, **numbers, **about))
    return rows


def set_limits() -> None:
    """Make this process fail with an error, not die, beyond its memory and its processor time."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(LIMIT_GB * GIGABYTE),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, 2 * LIMIT_SECONDS))

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {LIMIT_SECONDS} s")

    signal.signal(signal.SIGXCPU, stop)


def forward_seconds(model: nn.Module, x: Tensor, batch: int) -> float:
    """Return the seconds that a plain forward pass takes an input."""
    few = x[: 4 * batch]
    passes = [plain(model, part) for part in few.split(batch)]
    device = torch.device("cpu")
    calls = interleaved({"forward": lambda: [run() for run in passes]}, 5, device, CLOCK)
    return calls["forward"].median() / len(few)


def is_ours(la: Any) -> bool:
    return hasattr(la, "logit_scale")


def searches(la: Any) -> dict[str, Callable[[Any, Iterable[Any]], Any]]:
    """Return how the class is tuned: each library's grid search of the prior, and ours of T and s."""
    return {"grid search": grid_search, **({"joint search": joint_search} if is_ours(la) else {})}


def grid_search(la: Any, few: Iterable[Any]) -> None:
    """Search the prior precision: 100 values, with T, in one pass; or some values, each a pass."""
    size = {} if is_ours(la) else {"grid_size": CANDIDATES}
    options = {} if hasattr(la, "dual_directions") else {"link_approx": "mc", "n_samples": N_SAMPLES}
    la.optimize_prior_precision(method="gridsearch", val_loader=few, **size, **options)


def joint_search(la: Any, few: Iterable[Any]) -> None:
    la.optimize_hyperparameters(few, ["temperature", "logit_scale"], n_samples=N_SAMPLES)


@torch.no_grad()
def predictions(la: Any, few: Iterable[Any]) -> Tensor:
    options = {} if hasattr(la, "dual_directions") else {"link_approx": "mc", "n_samples": N_SAMPLES}
    return torch.cat([la(x, **options).detach() for x, _ in few])


COST_CASES: dict[str, dict[str, Part]] = {
    f"costs-{name}": {method: partial(costs, name=name, method=method) for method in METHODS}
    for name in PROBLEMS
}
