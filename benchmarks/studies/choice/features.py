"""Features of a network's images, computed once, and a small model that has them.

That model is linear in K weights, so that an estimator fitted to it is the one fitted to the network: all that the package
does beyond features is done by the package, at no cost of the network's.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.measure import loader
from benchmarks.methods import ours
from benchmarks.studies.common import baselines
from benchmarks.studies.common.cases import Case, prepared
from benchmarks.studies.common.images import Counts, Pair, parts
from laplace_ella import NystromBasis

BATCH = 100
N_OTHER_SETS = 2
# Of the study of quality's images as many as a core takes in an hour or two; other counts are its own.
COUNTS = {
    "fashion-cnn": {"validation": 1000, "test": 4000, "ood": 500},
    "fashion-vit": {"validation": 800, "test": 1000, "ood": 150},
    "mnist-cnn": {"validation": 1000, "test": 2000, "ood": 250},
    "cifar10-jpeg": {"validation": 800, "test": 1000, "ood": 150},
}
CURVATURE = {"fashion-cnn": 1000, "fashion-vit": 600, "mnist-cnn": 1000, "cifar10-jpeg": 600}


@dataclass(frozen=True)
class Sizes:
    """M, K of the fit, and how many training images G is estimated from."""

    subsample_size: int = 500
    n_eigenvalues: int = 200
    curvature_size: int = 1000


@dataclass(frozen=True)
class Seen:
    """What is known of N images: outputs (N, C), inputs of the last layer (N, D), features (N, C, K), labels (N,).

    ``trace`` (N,) is that of J J^T, inside and outside the span; of images of other sets there are no labels.
    """

    f: Tensor
    z: Tensor
    phi: Tensor
    y: Tensor
    trace: Tensor

    def __getitem__(self, which: slice) -> Seen:
        return Seen(*(t[which] for t in vars(self).values()))

    def share(self, rank: int) -> Tensor:
        """Return the share (N,) of the trace outside the leading directions, float64."""
        inside = self.phi[..., :rank].double().square().sum((1, 2))
        return (1 - inside / self.trace).clamp(0, 1)

    def loader(self) -> DataLoader[Any]:
        """Return batches for a :class:`FeatureModel`."""
        return loader(self.packed, self.y, BATCH)

    @property
    def packed(self) -> Tensor:
        return torch.cat([self.z, self.f, self.phi.flatten(1)], 1)


@dataclass(frozen=True)
class Features:
    """Features of all sets of images, and of how many training images the network is."""

    sets: dict[str, Seen]
    n_train: int
    retained: Tensor  # (K,), the share of the landmarks' trace that the leading directions retain
    squared_norm: float  # of the weights, which the evidence depends on
    training_accuracy: float
    seconds: float


class _Head(nn.Module):
    """The layer that returns the outputs; what it takes first counts as the last layer's input."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.coordinates = nn.Parameter(torch.zeros(rank))

    def forward(self, z: Tensor, f: Tensor, phi: Tensor) -> Tensor:
        return f + phi @ self.coordinates


class FeatureModel(nn.Module):
    """Outputs that are linear in K weights, at 0, with given features: of packed inputs (N, D + C + C K)."""

    def __init__(self, like: Seen) -> None:
        super().__init__()
        self.n_hidden, (self.n_outputs, rank) = like.z.shape[1], like.phi.shape[1:]
        self.head = _Head(rank)

    def forward(self, x: Tensor) -> Tensor:
        z, f, phi = x.split([self.n_hidden, self.n_outputs, x.shape[1] - self.n_hidden - self.n_outputs], 1)
        return self.head(z, f, phi.unflatten(1, (self.n_outputs, -1)))


def estimator(curvature: Seen, n_train: int, rank: int, seed: int = 0) -> Any:
    """Return the estimator with the leading directions, whose G is that of some training images, scaled to all."""
    curvature = replace(curvature, phi=curvature.phi[..., :rank])
    la = ours(FeatureModel(curvature), curvature_size=len(curvature.y), seed=seed)
    ones = torch.ones(rank, dtype=torch.float64)
    basis = NystromBasis({"head.coordinates": torch.eye(rank)}, ones, float(rank), ones)
    la.fit(curvature.loader(), basis=basis, n_total=n_train)
    return la


def counts_of(name: str, case: Case) -> Counts:
    return replace(case.counts, **COUNTS[name])


def computed(name: str, case: Case, sizes: Sizes, seed: int, args: argparse.Namespace) -> Features:
    """Fit to the network, and compute features of all sets; from the folder ``--keep`` if they are there."""
    path = args.keep / f"{name}_{seed}.pt" if args.keep else None
    if path is not None and path.exists():
        found: Features = torch.load(path, weights_only=False)
        return found
    start = time.perf_counter()
    data = case.data(case.counts, seed, args.fashion, args.data)
    model = prepared(case, data, seed, args)
    la = ours(model, seed=seed, **{**vars(sizes), "curvature_size": 1})  # which is computed below, and kept
    la.fit(loader(*data.train, BATCH))
    (of_curvature,) = parts(len(data.train[1]), seed + 1, sizes.curvature_size)
    sets = {"curvature": tuple(t[of_curvature] for t in data.train)}
    sets |= {"validation": data.validation, "test": data.test}
    none = torch.zeros(case.counts.ood, dtype=torch.int64)
    sets |= {of: (x, none) for of, x in list(data.ood.items())[:N_OTHER_SETS]}
    seen = {of: _seen(la, model, pair) for of, pair in sets.items()}
    hits = baselines.outputs(model, data.train[0]).f.argmax(1) == data.train[1]
    values = la.basis.spectrum.clamp_min(0)
    found = Features(
        seen,
        len(data.train[1]),
        (values.cumsum(0) / values.sum())[: la.basis.rank],
        sum(float(p.detach().square().sum()) for p in model.parameters()),
        float(hits.double().mean()),
        time.perf_counter() - start,
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, path)
    return found


@torch.no_grad()
def _seen(la: Any, model: nn.Module, pair: Pair) -> Seen:
    x, y = pair
    columns = zip(*(_of_batch(la, part) for part in x.split(BATCH)))
    f, phi, trace = (torch.cat(column) for column in columns)
    return Seen(f, baselines.outputs(model, x).z.float(), phi, y, trace)


def _of_batch(la: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    phi, f = la.features(x)
    outside = la.residual_share(x).double()
    return f, phi, phi.double().square().sum((1, 2)) / (1 - outside)
