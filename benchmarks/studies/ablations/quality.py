"""NLL and calibration against K, n, M and the way landmarks are drawn, as they are and with (T) or (T, s) tuned."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import laplace_ella
from benchmarks.networks import SmallCNN
from benchmarks.problems import network
from benchmarks.studies.ablations.features import (
    BATCH,
    Draw,
    Pair,
    Spectrum,
    features,
    landmarks,
    snapshots,
    stacked_bases,
)
from benchmarks.studies.common import baselines, scores
from benchmarks.studies.common.grid_search import Setting
from benchmarks.studies.common.images import Counts, Data, cifar_data, fashion_data, parts
from benchmarks.studies.common.training import train

PRIOR, USUAL_K, USUAL_M = 1.0, 20, 500
PRIORS = tuple(10.0**e for e in range(-4, 5))
SMALL = (25, 50, 100, 200, 400, 800)
TEMPERATURES = tuple(10.0**e for e in range(-3, 7))
REDRAWN = 4  # small validation sets of each size
TUNED = {
    "T": {"temperature": [10.0**e for e in range(-2, 7)]},
    "T, s": {
        "temperature": [10.0**e for e in range(-2, 7)],
        "logit_scale": [0.5, 0.71, 1.0, 1.41, 2.0],
    },
}


@dataclass(frozen=True)
class Case:
    """A network with its images, and the values of each sweep."""

    title: str
    images: str
    counts: Counts
    K: tuple[int, ...]
    M: tuple[int, ...]
    n: tuple[int, ...]

    @property
    def usual_m(self) -> int:
        """M of all sweeps but its own."""
        return min(USUAL_M, self.M[-1])


CASES = {
    "cifar10-jpeg": Case(
        "ResNet-20, published weights",
        "CIFAR-10 (JPEG)",
        Counts(train=10_000, validation=800, test=1500, ood=1),
        (1, 2, 5, 10, 20, 30, 50, 100),
        (100, 200, 500, 1000),
        (1, 5, 20, 50, 200, 500),
    ),
    "fashion-cnn": Case(
        "strided CNN",
        "Fashion-MNIST",
        Counts(train=30_000, validation=800, test=2000, ood=1),
        (1, 2, 5, 10, 20, 30, 50, 100, 200),
        (50, 100, 200, 500, 1000),
        (1, 5, 20, 50, 200, 500, 1000),
    ),
}


def quick(case: Case) -> Case:
    counts = replace(case.counts, train=300, validation=60, test=60)
    return replace(case, counts=counts, K=(1, 5, 20), M=(20, 50), n=(1, 10, 50))


def data_of(name: str, case: Case, args: argparse.Namespace) -> Data:
    load = cifar_data if name == "cifar10-jpeg" else fashion_data
    return load(case.counts, 0, args.fashion, args.data)


def network_of(name: str, data: Data, args: argparse.Namespace) -> nn.Module:
    if name == "cifar10-jpeg":
        return network("resnet20", args.data, torch.device("cpu"))
    torch.manual_seed(0)
    return train(SmallCNN(), *data.train, 1 if args.quick else 5, 0, 4e-3)


@dataclass(frozen=True)
class Seen:
    """Features, logits and labels of one set of images."""

    phi: Tensor
    f: Tensor
    y: Tensor

    def of(self, columns: slice) -> Seen:
        return replace(self, phi=self.phi[..., columns])

    def rows(self, chosen: Tensor) -> Seen:
        return Seen(self.phi[chosen], self.f[chosen], self.y[chosen])


@dataclass(frozen=True)
class Posterior:
    """G over the leading K directions, by its eigenvectors: psi is phi Q scaled, for every T and prior."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, G: Tensor) -> Posterior:
        values, vectors = torch.linalg.eigh(G)
        return cls(values.clamp_min(0), vectors)

    def predictor(self, seen: Seen, n_samples: int = baselines.N_SAMPLES) -> Callable[[Setting], Tensor]:
        """Return what gives the probabilities of a setting."""
        rotated = seen.phi[..., : len(self.values)] @ self.vectors.float()
        noise = baselines.quasi_normal(n_samples, len(self.values), 0).float()

        def probabilities(setting: Setting) -> Tensor:
            psi = rotated * (self.values / setting.temperature + setting.prior_precision).rsqrt().float()
            return baselines.mean_softmax(setting.logit_scale * seen.f, (psi @ sample for sample in noise))

        return probabilities


UNTUNED = Setting(PRIOR, 1.0)


def mean_nll(predict_at: Callable[[Setting], Tensor], y: Tensor) -> Callable[[Setting], float]:
    return lambda setting: float(scores.nll(predict_at(setting), y).mean())


def tuned(posterior: Posterior, validation: Seen, grids: dict[str, Sequence[float]]) -> Setting:
    """Return the setting of the smallest validation NLL, as ``optimize_hyperparameters`` searches it.

    The best of the grids; then each parameter in turn, twice, between the neighbours of its value there.
    """
    # Half the samples do for a search, and take half the time.
    loss = cache(mean_nll(posterior.predictor(validation, baselines.N_SAMPLES // 2), validation.y))
    best = min((replace(UNTUNED, **dict(zip(grids, at))) for at in product(*grids.values())), key=loss)
    bounds = {name: neighbours(values, getattr(best, name)) for name, values in grids.items()}
    for _ in range(2):
        for name in grids:
            best = refined(loss, best, name, *bounds[name])
    return best


def neighbours(values: Sequence[float], value: float) -> tuple[float, float]:
    place = list(values).index(value)
    return values[max(place - 1, 0)], values[min(place + 1, len(values) - 1)]


def refined(loss: Callable[[Setting], float], best: Setting, name: str, low: float, high: float) -> Setting:
    """Return the best setting of a golden-section search over one parameter, down to 0.02 decades."""
    a, b = math.log10(low), math.log10(high)
    while b - a > 0.02:
        step = (math.sqrt(5) - 1) / 2 * (b - a)
        left, right = (replace(best, **{name: 10**v}) for v in (b - step, a + step))
        a, b = (a, a + step) if loss(left) <= loss(right) else (b - step, b)
        best = min(best, left, right, key=loss)
    return best


def stopped(curvatures: dict[int, Tensor], validation: Seen, n_data: int) -> tuple[int, Setting]:
    """Return the paper's early stopping: the n of the best validation NLL, with T = N / n and delta n / N."""

    def loss(n: int) -> float:
        predict_at = Posterior.of(curvatures[n]).predictor(validation)
        return mean_nll(predict_at, validation.y)(stopped_at(n, n_data))

    best = min(curvatures, key=loss)
    return best, stopped_at(best, n_data)


def stopped_at(n: int, n_data: int) -> Setting:
    return replace(UNTUNED, temperature=n_data / n, prior_precision=PRIOR * n / n_data)


def scored(posterior: Posterior, setting: Setting, test: Seen, **more: Any) -> dict[str, Any]:
    p = posterior.predictor(test)(setting)
    return {
        **_scores(p, test.y),
        "temperature": setting.temperature,
        "logit_scale": setting.logit_scale,
        **more,
    }


def _scores(p: Tensor, y: Tensor) -> dict[str, float]:
    return {
        "nll": float(scores.nll(p, y).mean()),
        "ece": scores.calibration_error(p, y),
        "accuracy": float((p.argmax(1) == y).double().mean()),
    }


def methods(
    curvatures: dict[int, Tensor], n: int, validation: Seen, test: Seen, n_data: int, at_n: bool = False
) -> dict[str, Any]:
    """Score a posterior as it is, stopped early, and tuned; ``at_n``: stopped at n, whatever is best."""
    posterior = Posterior.of(curvatures[n])
    chosen, setting = (n, stopped_at(n, n_data)) if at_n else stopped(curvatures, validation, n_data)
    return {
        "T = 1": scored(posterior, UNTUNED, test),
        "stopped": scored(Posterior.of(curvatures[chosen]), setting, test, n=chosen),
        **{
            name: scored(posterior, tuned(posterior, validation, grids), test)
            for name, grids in TUNED.items()
        },
    }


def draws(case: Case, n_seeds: int) -> list[Draw]:
    """Return all bases that the sweeps need: one a seed for every K, one for every other M, one for every way."""
    found, usual_m = [], case.usual_m
    for seed in range(n_seeds):
        found.append(Draw("uniform", usual_m, min(case.K[-1], usual_m), seed))
        found += [Draw("uniform", m, min(USUAL_K, m), seed) for m in case.M if m != usual_m]
        found += [Draw(way, usual_m, USUAL_K, seed) for way in ("balanced", "label")]
    return found


@dataclass(frozen=True)
class Sweeps:
    """All that is known of one network's images, whatever the basis."""

    case: Case
    where: dict[Draw, tuple[slice, Spectrum]]
    curvature: Seen
    validation: Seen
    test: Seen

    def rows(self) -> list[dict[str, Any]]:
        """Return every sweep's rows."""
        return [row for draw in self.where for row in self.of_draw(draw)]

    def of_draw(self, draw: Draw) -> list[dict[str, Any]]:
        """Return what one basis says: of every K and n the usual one, of M or the way any other."""
        usual_m = self.case.usual_m
        rows = [self.row("way", draw.way, draw, USUAL_K)] if usual_m == draw.M else []
        if draw.way == "uniform":
            rows.append(self.row("M", draw.M, draw, USUAL_K))
        if draw.way == "uniform" and usual_m == draw.M:
            rows += [self.row("K", k, draw, k) for k in self.case.K]
            rows += [self.row("n", n, draw, USUAL_K, n) for n in self.case.n]
        return rows

    def row(self, sweep: str, value: Any, draw: Draw, k: int, n: int | None = None) -> dict[str, Any]:
        curvatures, validation, test, spectrum = self.parts(draw, k)
        k = test.phi.shape[-1]
        n_data = self.case.counts.train
        found = methods(curvatures, n or self.case.n[-1], validation, test, n_data, at_n=n is not None)
        about = {"sweep": sweep, "value": value, "seed": draw.seed, "K": k, "retained": spectrum.retained(k)}
        return {**about, "methods": found}

    def parts(self, draw: Draw, k: int) -> tuple[dict[int, Tensor], Seen, Seen, Spectrum]:
        """Return G for every n, validation and test features, of the leading directions of a basis."""
        columns, spectrum = self.where[draw]
        columns = slice(columns.start, min(columns.start + k, columns.stop))
        # The first n of another order for each seed: a sample of its own.
        order = torch.randperm(len(self.curvature.y), generator=torch.Generator().manual_seed(draw.seed))
        seen = self.curvature.of(columns).rows(order)
        found = snapshots(seen.phi, seen.f, self.case.n, self.case.counts.train)
        return found, self.validation.of(columns), self.test.of(columns), spectrum

    def priors(self) -> list[dict[str, float]]:
        """Return validation NLL over temperatures and prior precisions, of the usual basis."""
        curvatures, validation, _, _ = self.parts(next(iter(self.where)), USUAL_K)
        loss = mean_nll(Posterior.of(curvatures[self.case.n[-1]]).predictor(validation), validation.y)
        return [
            {
                "temperature": t,
                "prior_precision": p,
                "nll": loss(replace(UNTUNED, temperature=t, prior_precision=p)),
            }
            for t in TEMPERATURES
            for p in PRIORS
        ]

    def small(self, outputs: dict[str, baselines.Outputs]) -> list[dict[str, Any]]:
        """Tune on parts of the validation images, and score on test, of the usual basis."""
        curvatures, validation, test, _ = self.parts(next(iter(self.where)), USUAL_K)
        posterior = Posterior.of(curvatures[self.case.n[-1]])
        sizes = [n for n in SMALL if n <= len(validation.y)]
        rows = []
        for n in sizes:
            for seed in range(1 if n == len(validation.y) else REDRAWN):
                (chosen,) = parts(len(validation.y), seed, n)
                some = validation.rows(chosen)
                found = {
                    name: scored(posterior, tuned(posterior, some, grids), test)
                    for name, grids in TUNED.items()
                }
                found |= simple(outputs, some.y, test.y, chosen)
                rows.append({"n": n, "seed": seed, "methods": found})
        return rows


SIMPLE = ("MAP", "temperature scaling", "vector scaling")


def simple(
    outputs: dict[str, baselines.Outputs], y: Tensor, test_y: Tensor, chosen: Tensor | slice = slice(None)
) -> dict[str, Any]:
    """Score what needs no Jacobian, tuned on the same images."""
    val = outputs["validation"]
    val = baselines.Outputs(val.f[chosen], val.z[chosen])
    found = {name: baselines.METHODS[name](val, y, 0).probabilities(outputs["test"]) for name in SIMPLE}
    return {name: _scores(p, test_y) for name, p in found.items()}


def run_case(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return all sweeps of one network."""
    case = quick(CASES[name]) if args.quick else CASES[name]
    start = time.process_time()
    data = data_of(name, case, args)
    model = network_of(name, data, args)
    # In reverse mode the number of directions hardly matters, and here are hundreds of them.
    backend = laplace_ella.NystromGGN(model, "classification", autodiff="reverse")
    chosen = draws(case, args.seeds)
    # Curvature inputs come from the training data, whatever the landmarks are.
    (of_curvature,) = parts(len(data.train[1]), 1, case.n[-1])
    sets = {
        "curvature": (data.train[0][of_curvature], data.train[1][of_curvature]),
        "validation": data.validation,
        "test": data.test,
    }
    given = ((draw, landmarks(draw, data.train, 10), draw.K) for draw in chosen)
    basis, where = stacked_bases(model, given, (data.train[0][:BATCH], data.train[1][:BATCH]))
    of_bases = time.process_time() - start
    seen = {key: seen_by(backend, pair, basis) for key, pair in sets.items()}
    of_features = time.process_time() - start
    outputs = {key: baselines.outputs(model, pair[0]) for key, pair in sets.items() if key != "curvature"}
    sweeps = Sweeps(case, where, **seen)
    found = {
        "title": case.title,
        "images": case.images,
        "parameters": sum(p.numel() for p in model.parameters()),
        "counts": {k: v for k, v in asdict(case.counts).items() if k != "ood"} | {"curvature": case.n[-1]},
        "prior_precision": PRIOR,
        "usual": {"M": case.usual_m, "K": USUAL_K},
        "samples": baselines.N_SAMPLES,
        "directions": basis.rank,
        "simple": simple(outputs, sets["validation"][1], sets["test"][1]),
        "rows": sweeps.rows(),
        "priors": sweeps.priors(),
        "small": sweeps.small(outputs),
    }
    ended = time.process_time() - start
    return found | {"seconds": {"bases": of_bases, "features": of_features - of_bases, "all": ended}}


def seen_by(backend: Any, pair: Pair, basis: Any) -> Seen:
    phi, f = features(backend, pair[0], basis)
    return Seen(phi, f, pair[1])
