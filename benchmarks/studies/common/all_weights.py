"""Other posteriors over all weights, tuned over the grid of grid_search.py: diagonal, KFAC, laplace-torch's own ELLA.

In all three the posterior precision is diagonal after a rotation that no prior and no temperature
changes. So Jacobians are formed and rotated once, and a covariance at any setting is one product.
The curvature is that of ``curvature_size`` training inputs, scaled up, as for ELLA.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from laplace import Laplace
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import loader
from benchmarks.methods import of_host
from benchmarks.studies.common import kron_basis
from benchmarks.studies.common.baselines import Row
from benchmarks.studies.common.grid_search import (
    Setting,
    best_setting,
    mean_probabilities,
    pairs_by_product,
    root,
    searches,
)
from benchmarks.studies.common.scores import nll

BATCH = 16  # inputs whose Jacobians are held at once
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Posterior:
    """A posterior whose precision is diagonal in some basis.

    ``rotated`` maps inputs to logits (B, C) and Jacobians in that basis (B, C, D); ``eigenvalues`` (D,)
    are those of the curvature.
    """

    rotated: Callable[[Tensor], Pair]
    eigenvalues: Tensor

    def covariance(self, jacobians: Tensor, precision: float) -> Tensor:
        """Return the covariance of the logits (B, C, C) at T = 1 and this prior precision."""
        return ((jacobians / (self.eigenvalues + precision)) @ jacobians.mT).double().cpu()


def jacobians(model: nn.Module, x: Tensor) -> Pair:
    """Return logits (B, C), and their Jacobians (B, C, P) by the weights that require grad."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def outputs(w: dict[str, Tensor], row: Tensor) -> Pair:
        f = functional_call(model, w, (row[None],))[0]
        return f, f

    with sdpa_kernel(SDPBackend.MATH):  # whose derivatives torch.func knows
        rows, f = vmap(jacrev(outputs, has_aux=True), (None, 0))(weights, x)
    return f.detach(), torch.cat([part.detach().flatten(2) for part in rows.values()], 2)


def diagonal(model: nn.Module, x: Tensor, y: Tensor, scale: float) -> Posterior:
    """Return diagonal Laplace with the exact diagonal of the GGN.

    laplace-torch's own takes 1 700 forward passes an input for it on a ResNet, and its other engines refuse
    vision transformers; the sum is the same.
    """
    total: Tensor | float = 0.0
    for part in x.split(BATCH):
        f, js = jacobians(model, part)
        p = f.softmax(1)[:, :, None]
        total = total + (p * (js - (p * js).sum(1, keepdim=True)).square()).sum((0, 1))
    return Posterior(lambda x: jacobians(model, x), scale * total)


def kron(model: nn.Module, x: Tensor, y: Tensor, scale: float) -> Posterior:
    """Return laplace-torch's KFAC, without the weights of normalisation layers, which it refuses."""
    model = without_norms(model)
    la: Any = Laplace(model, "classification", "all", "kron")
    la.fit(loader(x, y, 100))

    def rotated(x: Tensor) -> Pair:
        f, js = jacobians(model, x)
        return f, kron_basis.rotated(la.H, js)

    return Posterior(rotated, scale * kron_basis.eigenvalues(la.H).clamp_min(0))


def without_norms(model: nn.Module) -> nn.Module:
    """Return a copy in which normalisation layers have no uncertain weights."""
    model = deepcopy(model)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            module.requires_grad_(False)
    return model


def host_ella(model: nn.Module, x: Tensor, y: Tensor, scale: float, size: dict[str, int]) -> Posterior:
    """Return laplace-torch's own ELLA, with as many landmarks and directions as ours, given 8 inputs at a time."""
    la = of_host(model, **size)
    la.fit(loader(x, y, 8))
    values, vectors = torch.linalg.eigh(la.feature_gram.double())

    @torch.no_grad()
    def rotated(x: Tensor) -> Pair:
        phi, f = la._features(x)
        return f, phi.double() @ vectors

    return Posterior(rotated, scale * values.clamp_min(0))


Fit = Callable[[nn.Module, Tensor, Tensor, float], Posterior]


def rows(
    name: str,
    fit: Fit,
    model: nn.Module,
    curvature: Pair,
    scale: float,
    val: Pair,
    sets: dict[str, Tensor],
    seed: int,
) -> dict[str, Row]:
    """Fit, tune on validation data with and without a logit scale, and let both predict all sets."""
    start = time.perf_counter()
    posterior = fit(model, *curvature, scale)
    f, covariances = covariances_at(posterior, val[0], list(pairs_by_product()))
    roots = {product: root(found.double()) for product, found in zip(pairs_by_product(), covariances)}
    shared, y = time.perf_counter() - start, val[1].cpu()
    best: dict[str, Setting] = {}
    seconds: dict[str, float] = {}
    for title, scales in searches(name):
        start = time.perf_counter()
        best[title] = best_setting(f, y, roots.items(), seed, scales)
        seconds[title] = shared + time.perf_counter() - start
    of_validation = {title: validation_nll(f, y, roots, at, seed) for title, at in best.items()}
    del roots, covariances
    found = {of: predict(posterior, x, list(best.values()), seed) for of, x in sets.items()}
    return {
        title: Row(
            {of: predictions[i] for of, predictions in found.items()},
            asdict(at),
            seconds[title],
            more={"validation_nll": of_validation[title]},
        )
        for i, (title, at) in enumerate(best.items())
    }


def validation_nll(f: Tensor, y: Tensor, roots: dict[float, Tensor], at: Setting, seed: int) -> float:
    nearest = min(roots, key=lambda product: abs(math.log(product / at.product)))
    return float(nll(mean_probabilities(f, roots[nearest], at, seed), y).mean())


def covariances_at(posterior: Posterior, x: Tensor, precisions: list[float]) -> tuple[Tensor, Tensor]:
    """Return logits (N, C), and covariances at T = 1 and each prior precision (S, N, C, C), in float32.

    Written into one tensor: small ones that stay between large ones that go would fragment the heap by gigabytes.
    """
    weights = 1 / (posterior.eigenvalues[:, None] + torch.tensor(precisions).to(posterior.eigenvalues))
    logits: list[Tensor] = []
    found = torch.empty(0)
    for start in range(0, len(x), BATCH):
        f, js = posterior.rotated(x[start : start + BATCH])
        if not start:
            found = torch.empty(len(precisions), len(x), f.shape[1], f.shape[1])
        logits.append(f.double().cpu())
        for i, of_input in enumerate(js, start):
            found[:, i] = weighted_squares(of_input, weights).cpu()
    return torch.cat(logits), found


def weighted_squares(js: Tensor, weights: Tensor) -> Tensor:
    """Return J diag(w) J^T for each column w of the weights (D, S): (S, C, C), from one product.

    Products of rows are formed once, those below the diagonal not at all, instead of scaled rows for each w.
    """
    rows, columns = torch.tril_indices(len(js), len(js), device=js.device)
    lower = ((js[rows] * js[columns]) @ weights).mT
    found = lower.new_empty(len(lower), len(js), len(js))
    found[:, rows, columns] = lower
    found[:, columns, rows] = lower
    return found


def predict(posterior: Posterior, x: Tensor, settings: list[Setting], seed: int) -> list[Tensor]:
    """Return class probabilities (N, C) at each setting."""
    found: list[list[Tensor]] = [[] for _ in settings]
    for part in x.split(BATCH):
        f, js = posterior.rotated(part)
        logits = f.double().cpu()
        for at, kept in zip(settings, found):
            roots = root(posterior.covariance(js, at.product))
            kept.append(mean_probabilities(logits, roots, at, seed))
    return [torch.cat(kept) for kept in found]
