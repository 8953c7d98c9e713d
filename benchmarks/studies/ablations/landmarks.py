"""What ways to choose landmarks do to the span, to the covariance and to the NLL, at equal M and K, and at equal cost."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import laplace_ella
from benchmarks.studies.ablations import error, quality
from benchmarks.studies.ablations.features import BATCH, Pair, Spectrum, curvature, stacked_bases
from benchmarks.studies.ablations.quality import TUNED, Posterior, Seen, scored, seen_by, tuned
from benchmarks.studies.ablations.schemes import SCHEMES, Candidates
from benchmarks.studies.common import baselines
from benchmarks.studies.common.all_weights import jacobians
from benchmarks.studies.common.images import Counts, parts
from benchmarks.studies.common.training import train

COMPARED = 100  # test images whose covariances are compared
PRODUCTS = (10.0, 100.0)  # T times the prior precision: a relative error depends on no more


@dataclass(frozen=True)
class Case:
    """A network with its images, the M and K that are tried, and of what the exact covariance is."""

    title: str
    images: str
    counts: dict[str, int]  # training, validation, test images; curvature inputs; the pool
    M: tuple[int, ...]
    K: tuple[int, ...]
    exact: str | None


CASES = {
    "digits": Case(
        "small convolutional network in float64",
        "MNIST",
        {"train": 4000, "curvature": 4000, "validation": 744, "test": 256, "pool": 1600},
        (100, 400),
        (20, 100),
        "all training images",
    ),
    "fashion-cnn": Case(
        "strided CNN",
        "Fashion-MNIST",
        {"train": 30_000, "curvature": 300, "validation": 600, "test": 1000, "pool": 1600},
        (100, 400),
        (20, 100),
        "the curvature inputs, as for ELLA",
    ),
    "cifar10-jpeg": Case(
        "ResNet-20, published weights",
        "CIFAR-10 (JPEG)",
        {"train": 10_000, "curvature": 200, "validation": 500, "test": 800, "pool": 800},
        (100,),
        (20,),
        None,
    ),
}


def quick(case: Case) -> Case:
    counts = {"train": 500, "curvature": 40, "validation": 200, "test": 32, "pool": 60}
    return replace(case, counts=counts, M=(12, 20)[: len(case.M)], K=(5, 12)[: len(case.K)])


@dataclass(frozen=True)
class Problem:
    """A network with its images, and the exact covariances (B, C, C) at each of the products, if they are known."""

    model: nn.Module
    sets: dict[str, Pair]
    exact: list[Tensor]

    @property
    def compared(self) -> Tensor:
        return self.sets["test"][0][:COMPARED]


def problem(name: str, case: Case, args: argparse.Namespace) -> Problem:
    """Return the network, trained if its weights are not published, and its images."""
    if name == "digits":
        sets = error.digits(args.quick)
        torch.manual_seed(0)
        model = train(error.TinyCNN().double(), *sets["train"], 2 if args.quick else 15, 0, 4e-3)
    else:
        counts = Counts(*(case.counts[key] for key in ("train", "validation", "test")), ood=1)
        of_quality = replace(quality.CASES[name], counts=counts)
        data = quality.data_of(name, of_quality, args)
        model = quality.network_of(name, data, args)
        sets = {"train": data.train, "validation": data.validation, "test": data.test}
    x, y = sets["train"]
    (of_curvature,) = parts(len(y), 1, case.counts["curvature"])
    sets["curvature"] = x[of_curvature], y[of_curvature]
    compared = sets["test"][0][:COMPARED]
    if case.exact is None:
        return Problem(model, sets, [])
    exact: error.Exact | Dual
    if name == "digits":
        exact = error.Exact(model, x, compared)
    else:
        exact = Dual(model, sets["curvature"][0], len(y) / case.counts["curvature"], compared)
    return Problem(model, sets, [exact.covariance(product, 1.0) for product in PRODUCTS])


class Dual:
    """Exact linearised Laplace of few curvature inputs, whatever the number of weights.

    With the rows R of a root of G, (R^T R / T + d I)^-1 = (I - R^T (R R^T + T d I)^-1 R) / d.
    """

    def __init__(self, model: nn.Module, x: Tensor, scale: float, test_x: Tensor) -> None:
        roots = []
        for part in x.split(BATCH):
            f, J = jacobians(model, part)
            p = f.softmax(1)[..., None]
            roots.append((scale * p).sqrt() * (J - (p * J).sum(1, keepdim=True)))
        R = torch.cat(roots).flatten(0, 1)
        J = torch.cat([jacobians(model, part)[1] for part in test_x.split(BATCH)])
        self.gram, self.blocks = products(R, R), J.double() @ J.double().mT
        self.cross = products(R, J.flatten(0, 1)).unflatten(1, J.shape[:2])

    def covariance(self, prior: float, temperature: float) -> Tensor:
        """Return the predictive covariances (B, C, C)."""
        ridge = temperature * prior * torch.eye(len(self.gram), dtype=self.gram.dtype)
        factor = torch.linalg.cholesky(self.gram + ridge)
        half = torch.linalg.solve_triangular(factor, self.cross.flatten(1), upper=False)
        half = half.unflatten(1, self.cross.shape[1:])
        return (self.blocks - torch.einsum("rbc,rbd->bcd", half, half)) / prior


def products(a: Tensor, b: Tensor, width: int = 4096) -> Tensor:
    """Return a b^T in float64, of which only some columns are copied at a time."""
    return sum(
        (x.double() @ z.double().T for x, z in zip(a.split(width, 1), b.split(width, 1))),
        torch.zeros(len(a), len(b), dtype=torch.float64),
    )


def trace(model: nn.Module, x: Tensor) -> float:
    """Return the trace of J J^T over inputs and outputs."""
    return sum(float(jacobians(model, part)[1].double().square().sum()) for part in x.split(10))


# ------------------------------------------------------------------------------------- one seed

Key = tuple[str, int]  # a scheme, M


def choices(
    case: Case, candidates: Candidates, seed: int
) -> tuple[dict[Key, Tensor], dict[str, float], float]:
    """Return what each scheme chooses for each M; its processor time for the largest; and that of the pool's kernel."""
    found, seconds = {}, {}
    start = time.process_time()
    _ = candidates.kernel
    of_kernel = time.process_time() - start
    for name, scheme in SCHEMES.items():
        for m in case.M:
            start = time.process_time()
            found[name, m] = scheme(candidates, m, torch.Generator().manual_seed(seed))
            seconds[name] = time.process_time() - start
    # At the cost of the pool, about: all of it, none chosen.
    found["uniform", candidates.pool] = torch.arange(candidates.pool)
    return found, seconds, of_kernel


@dataclass(frozen=True)
class Measured:
    """What is known of one seed's bases, all of them side by side: features of all sets."""

    case: Case
    problem: Problem
    seen: dict[str, Seen]
    trace: float

    def row(self, columns: slice, spectrum: Spectrum, k: int) -> dict[str, Any]:
        """Return the scores of the leading directions of a basis."""
        columns = slice(columns.start, min(columns.start + k, columns.stop))
        seen = {name: one.of(columns) for name, one in self.seen.items()}
        of_curvature = seen["curvature"]
        scale = self.case.counts["train"] / len(of_curvature.y)
        G = scale * curvature(of_curvature.phi, of_curvature.f)
        posterior = Posterior.of(G)
        single = {name: Seen(one.phi.float(), one.f.float(), one.y) for name, one in seen.items()}
        methods = {
            name: scored(posterior, tuned(posterior, single["validation"], grids), single["test"])
            for name, grids in TUNED.items()
        }
        phi = seen["test"].phi[:COMPARED].double()
        return {
            "retained": spectrum.retained(k),
            "captured": float(phi.square().sum()) / self.trace,
            "errors": self.errors(phi, G),
            "methods": methods,
        }

    def errors(self, phi: Tensor, G: Tensor) -> list[float]:
        """Return the covariance's error at each of the products, if there is an exact one."""
        return [
            error.relative(error.covariance(phi, G, product, 1.0), exact)
            for product, exact in zip(PRODUCTS, self.problem.exact)
        ]


def of_seed(case: Case, of: Problem, whole: float, seed: int) -> dict[str, Any]:
    """Return a seed's rows, and what choosing took."""
    candidates = Candidates.drawn(of.model, of.sets["train"], 10, case.counts["pool"], seed)
    chosen, seconds, of_kernel = choices(case, candidates, seed)
    given = ((key, candidates.chosen(indices), max(case.K)) for key, indices in chosen.items())
    x, y = of.sets["train"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "n_eigenvalues was reduced")  # to the numerical rank
        basis, where = stacked_bases(of.model, given, (x[:2], y[:2]))
    # In reverse mode the number of directions hardly matters, and here are hundreds of them.
    backend = laplace_ella.NystromGGN(of.model, "classification", autodiff="reverse")
    seen = {name: seen_by(backend, of.sets[name], basis) for name in ("curvature", "validation", "test")}
    measured, rows = Measured(case, of, seen, whole), []
    for (scheme, m), place in where.items():
        for k in case.K:
            rows.append({"seed": seed, "scheme": scheme, "M": m, "K": k, **measured.row(*place, k)})
    return {"rows": rows, "seconds": seconds, "kernel": of_kernel}


def run_case(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what was found of one network, after each seed."""
    case = quick(CASES[name]) if args.quick else CASES[name]
    of = problem(name, case, args)
    outputs = {key: baselines.outputs(of.model, of.sets[key][0]) for key in ("validation", "test")}
    found: dict[str, Any] = {
        "title": case.title,
        "images": case.images,
        "parameters": sum(p.numel() for p in of.model.parameters()),
        "counts": case.counts,
        "M": case.M,
        "K": case.K,
        "products": PRODUCTS,
        "exact": case.exact,
        "compared": len(of.compared),
        "samples": baselines.N_SAMPLES,
        "simple": quality.simple(outputs, of.sets["validation"][1], of.sets["test"][1]),
        "seeds": [],
    }
    whole = trace(of.model, of.compared)
    for seed in range(args.seeds):
        found["seeds"].append(of_seed(case, of, whole, seed))
        yield found
