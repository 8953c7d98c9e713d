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
from dataclasses import dataclass
from typing import Any

import kron_basis
import torch
from baselines import Row
from grid_search import best_pair, mean_probabilities, pairs_by_product, root
from laplace import Laplace
from measure import loader
from methods import of_host
from scores import nll
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from laplace_ella.autodiff import safe_autodiff

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

    with safe_autodiff(model):
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


def row(
    fit: Fit, model: nn.Module, curvature: Pair, scale: float, val: Pair, sets: dict[str, Tensor], seed: int
) -> Row:
    """Fit, tune on validation data, and let it predict all sets."""
    start = time.perf_counter()
    posterior = fit(model, *curvature, scale)
    delta, temperature, score = tune(posterior, *val, seed)
    seconds = time.perf_counter() - start
    found = {name: predict(posterior, x, delta, temperature, seed) for name, x in sets.items()}
    setting = {"prior_precision": delta, "temperature": temperature}
    return Row(found, setting, seconds, more={"validation_nll": score})


def tune(posterior: Posterior, x: Tensor, y: Tensor, seed: int) -> tuple[float, float, float]:
    """Return the prior precision, the temperature and the validation NLL."""
    products = list(pairs_by_product())
    f, covariances = covariances_at(posterior, x, products)
    roots = ((product, root(found.double())) for product, found in zip(products, covariances))
    delta, temperature = best_pair(f, y.cpu(), roots, seed)
    best = min(range(len(products)), key=lambda i: abs(math.log(products[i] / (delta * temperature))))
    probabilities = mean_probabilities(f, root(covariances[best].double()), temperature, seed)
    return delta, temperature, float(nll(probabilities, y.cpu()).mean())


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


def predict(posterior: Posterior, x: Tensor, delta: float, temperature: float, seed: int) -> Tensor:
    """Return class probabilities (N, C)."""
    found = []
    for part in x.split(BATCH):
        f, js = posterior.rotated(part)
        roots = root(posterior.covariance(js, delta * temperature))
        found.append(mean_probabilities(f.double().cpu(), roots, temperature, seed))
    return torch.cat(found)
