"""Fit and predict for a long time in one process, and see whether memory, descriptors, hooks or threads grow.

    python -m benchmarks.soak [--quick] [--threads 2] [--out benchmarks/results/soak.json]

Writes JSON, prints a summary, and exits with 1 if something grows beyond its bound.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from scipy.stats import t as student
from torch import Tensor, nn

import laplace_ella
from benchmarks.environment import HERE, environment
from benchmarks.inside import forget_points
from benchmarks.measure import give_back, loader, peak_memory

# Memory that a fit or a prediction may leave behind, in kB.
BOUNDS = {"fit": 10.0, "prediction": 1.0}
# What is done repeats after so many rounds; memory grows in the first of these periods, whatever is left behind.
PERIOD = 15
N_TRAIN, N_OUTPUTS, PIXELS, N_TOKENS, N_FEATURES = 48, 4, 12, 6, 20
BATCHES = (16, 7, 48, 1, 11)
LIKELIHOODS = ("classification", "regression", "bernoulli")
LINKS = ("probit", "mc", "bridge", "bridge_norm")
FITS = (
    {},
    {"curvature_size": None},
    {"curvature": "mc", "n_eigenvalues": 3},
    {"memory_budget": 2**20, "n_eigenvalues": 0.9},
    {"spill": "cpu", "memory_budget": 2**16, "residual": "isotropic"},
)


def cnn(norm: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=not norm),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, 2),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 5 * 5, N_OUTPUTS),
    )


def mlp(norm: bool) -> nn.Module:
    return nn.Sequential(
        nn.Linear(N_FEATURES, 32),
        nn.BatchNorm1d(32) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Linear(32, N_OUTPUTS),
    )


class Encoder(nn.Module):
    """Two layers of a transformer over short sequences."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.BatchNorm1d(16) if norm else nn.Identity()
        self.head = nn.Linear(16, N_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(x).mean(1)))


NETWORKS: dict[str, tuple[Callable[[bool], nn.Module], bool, tuple[int, ...]]] = {
    "cnn": (cnn, False, (3, PIXELS, PIXELS)),
    "cnn, batch norm": (cnn, True, (3, PIXELS, PIXELS)),
    "mlp": (mlp, False, (N_FEATURES,)),
    "mlp, batch norm": (mlp, True, (N_FEATURES,)),
    "encoder": (Encoder, False, (N_TOKENS, 16)),
    "encoder, batch norm": (Encoder, True, (N_TOKENS, 16)),
}


@dataclass
class Subject:
    """A network, data for it, and the estimator fitted last, if it is kept."""

    name: str
    model: nn.Module
    shape: tuple[int, ...]
    la: Any = None

    def fit(self, round_: int) -> None:
        """Fit a new estimator, and every second time add data to it; data, batches and options change."""
        kind = round_ % len(FITS)
        likelihood = LIKELIHOODS[round_ % len(LIKELIHOODS)]
        options = {"n_eigenvalues": 6, **FITS[kind]}
        self.la = laplace_ella.ELLALaplace(self.model, likelihood, subsample_size=24, **options)
        generator = torch.Generator().manual_seed(round_)
        x = torch.randn(N_TRAIN, *self.shape, generator=generator)
        y = torch.randint(N_OUTPUTS, (N_TRAIN,), generator=generator)
        if likelihood != "classification":
            y = nn.functional.one_hot(y, N_OUTPUTS).float()
        batches = loader(x, y, max(5, BATCHES[kind]))
        self.la.fit(batches, val_loader=batches if kind % 2 else None)
        if kind % 2 == 0:
            self.la.fit(batches, override=False)
        if kind == 2:
            self.la.optimize_prior_precision(method="gridsearch", val_loader=batches, grid_size=5)

    def predict(self, round_: int) -> None:
        size = BATCHES[round_ % len(BATCHES)]
        x = torch.randn(size, *self.shape, generator=torch.Generator().manual_seed(round_))
        kind = round_ % 7
        if kind == 5:
            self.la.functional_samples(x, n_samples=8)
        elif kind == 6:
            self.la(x, "nn", link_approx="mc", n_samples=3)
        else:
            usable = LINKS[:2] if self.la.likelihood == "bernoulli" else LINKS
            self.la(x, link_approx=usable[kind % len(usable)])


def rss() -> float:
    """Return the resident set in kB, after garbage was collected and, with glibc, free memory given back."""
    gc.collect()
    give_back()
    return psutil.Process().memory_info().rss / 1024


def counts(models: Iterable[nn.Module]) -> dict[str, int]:
    """Count what must not grow; the points of Monte-Carlo links, of which the latest eight sets stay, are let go."""
    forget_points()
    tensors = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [m for model in models for m in model.modules()]
    return {
        "descriptors": psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0,
        "hooks": sum(len(getattr(m, kind, ())) for m in modules for kind in kinds),
        "threads": psutil.Process().num_threads(),
        "python_threads": threading.active_count(),
        "training_flags": sum(m.training for m in modules),
        "tensors": tensors,
    }


def slope(values: Sequence[float], per_step: int) -> dict[str, float]:
    """Fit a line to the second half of what was read after every ``per_step`` calls: kB a call, with 95 %."""
    values = values[len(values) // 2 :]
    steps = [float(i * per_step) for i in range(len(values))]
    n, mean_x, mean_y = len(values), sum(steps) / len(values), sum(values) / len(values)
    spread = sum((x - mean_x) ** 2 for x in steps)
    found = sum((x - mean_x) * (y - mean_y) for x, y in zip(steps, values)) / spread
    rest = sum((y - mean_y - found * (x - mean_x)) ** 2 for x, y in zip(steps, values))
    margin = float(student.ppf(0.975, n - 2)) * math.sqrt(rest / (n - 2) / spread)
    return {"kB": round(found, 4), "low": round(found - margin, 4), "high": round(found + margin, 4), "n": n}


def rounds(number: int, subjects: Sequence[Subject], act: str) -> list[float]:
    """Let every subject act in each round, and return the resident set after each; of fits, none is kept."""
    readings = []
    for round_ in range(number):
        for subject in subjects:
            getattr(subject, act)(round_)
            if act == "fit":
                subject.la = None
        readings.append(rss())
    return readings


def fit_all(subjects: Sequence[Subject]) -> None:
    """Fit estimators of several kinds, and predict once."""
    for i, subject in enumerate(subjects):
        subject.fit(i)
        subject.predict(0)


def soak(n_fits: int, n_predictions: int) -> dict[str, Any]:
    torch.manual_seed(0)
    subjects = [Subject(name, build(norm).eval(), shape) for name, (build, norm, shape) in NETWORKS.items()]
    for subject in subjects[::2]:  # flags of every kind, which have to be left as they are
        subject.model.train()
    models = [subject.model for subject in subjects]
    for round_ in range(PERIOD):
        for subject in subjects:
            subject.fit(round_)
            subject.predict(round_)
    fit_all(subjects)
    start, before = rss(), counts(models)
    per_round = len(subjects)
    found: dict[str, Any] = {"before": before, "rss_before_kB": start}
    for kind, number, act in (("fit", n_fits, "fit"), ("prediction", n_predictions, "predict")):
        if act == "predict":
            fit_all(subjects)
        began = time.perf_counter()
        readings = rounds(-(-number // per_round), subjects, act)
        found[kind] = {
            "number": len(readings) * per_round,
            "warm_up": PERIOD * per_round,
            "seconds": round(time.perf_counter() - began, 1),
            "slope": slope(readings, per_round),
            "bound_kB": BOUNDS[kind],
            "rss_kB": [round(r) for r in readings],
        }
    fit_all(subjects)  # so that as much is held as before
    found["rss_after_kB"], found["after"] = rss(), counts(models)
    found["peak_rss_kB"] = round(peak_memory(torch.device("cpu")) / 1024)
    return found


def complaints(found: dict[str, Any]) -> list[str]:
    """Say what has grown: memory, if the slope is beyond the bound and its interval beyond zero."""
    said = []
    for kind, bound in BOUNDS.items():
        line = found[kind]["slope"]
        if line["kB"] > bound and line["low"] > 0:
            said.append(
                f"memory grows by {line['kB']} kB a {kind} ({line['low']} to {line['high']}); bound {bound}"
            )
    for name, number in found["before"].items():
        if found["after"][name] != number:
            said.append(f"{name}: {number} before, {found['after'][name]} after")
    return said


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a third of the fits and predictions")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, help="default: results/soak.json here; with --quick, none")
    args = parser.parse_args()
    if args.out is None and not args.quick:
        args.out = HERE / "results" / "soak.json"
    # What environment() asks of a benchmark's arguments.
    args.device, args.data, args.malloc = torch.device("cpu"), None, False
    return args


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # optima on edges of grids, few labels
    found = {"environment": environment(args)}
    found["environment"]["images"] = "noise"
    found.update(soak(*((66, 660) if args.quick else (200, 2000))))
    found["complaints"] = complaints(found)
    for kind in BOUNDS:
        line = found[kind]["slope"]
        print(
            f"{found[kind]['number']} {kind}s in {found[kind]['seconds']} s: {line['kB']:+.3f} kB each "
            f"(95 %: {line['low']:+.3f} to {line['high']:+.3f}, {line['n']} readings; bound {BOUNDS[kind]:g})"
        )
    print(f"resident set: {found['rss_before_kB'] / 1024:.0f} MB before, ", end="")
    print(f"{found['rss_after_kB'] / 1024:.0f} MB after, peak {found['peak_rss_kB'] / 1024:.0f} MB")
    for name, number in found["before"].items():
        print(f"{name}: {number} before, {found['after'][name]} after")
    for complaint in found["complaints"]:
        print(f"GROWS: {complaint}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written: {os.path.relpath(args.out)}")
    return 1 if found["complaints"] else 0


if __name__ == "__main__":
    sys.exit(main())
