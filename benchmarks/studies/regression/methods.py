r"""What ELLA is compared with in regression: laplace-torch's flavours, and variances that need no Jacobian.

A Gaussian posterior over weights gives an output the variance :math:`T \sigma^2 q_a(x)` with
:math:`q_a(x) = J (H + a I)^{-1} J^T` and :math:`a = T \sigma^2 \delta`: prior precision, noise and temperature
matter through a and a factor only. In the eigenvectors of H, :math:`q_a = \sum_i s_i(x) / (\lambda_i + a)`, whatever
the flavour, so that the network's Jacobians are computed once for the whole search.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from laplace import Laplace
from torch import Tensor, nn

from benchmarks.measure import loader
from benchmarks.studies.common import kron_basis
from benchmarks.studies.common.last_layer import copy_of, double_precision
from benchmarks.studies.regression.data import Data
from benchmarks.studies.regression.scores import nll

BATCH = 100
# Values of a, two a decade: all products of usual prior precisions, noises and temperatures.
PRODUCTS = tuple(10 ** (e / 2) for e in range(-18, 25))
# Mean variance of the outputs, and noise variance, as multiples of the mean squared error.
SHARES = tuple(10 ** (e / 2) for e in range(-8, 5))
NOISES = (1e-3, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Found:
    r"""The best variance :math:`c q + \sigma^2`: which q, c, and the noise variance."""

    index: int
    factor: float
    noise: float
    score: float
    settings: int


def search(errors: Tensor, shapes: Tensor) -> Found:
    r"""Find q among ``shapes`` (A, N), c and the noise variance by the mean NLL: a grid for each q, then L-BFGS.

    ``errors`` (N,) are targets minus predicted means. All methods are searched in this way.
    """
    mse = errors.square().mean()
    found = [_refined(errors, shape, _best_on_grid(errors, shape, mse), i) for i, shape in enumerate(shapes)]
    return min(
        (setting for setting in found if math.isfinite(setting.score)), key=lambda setting: setting.score
    )


def _best_on_grid(errors: Tensor, shape: Tensor, mse: Tensor) -> Tensor:
    """Return the logarithms of c and of the noise variance."""
    factors = torch.tensor(SHARES, dtype=errors.dtype) * mse / shape.mean()
    noises = torch.tensor(NOISES, dtype=errors.dtype) * mse
    scores = torch.stack([nll(0.0, f * shape + noises[:, None], errors).mean(1) for f in factors])
    i, j = divmod(int(scores.argmin()), len(noises))
    return torch.stack([factors[i], noises[j]]).log()


def _refined(errors: Tensor, shape: Tensor, start: Tensor, index: int) -> Found:
    logs = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        factor, noise = logs.exp()
        loss = nll(0.0, factor * shape + noise, errors).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    factor, noise = logs.detach().exp()
    score = float(nll(0.0, factor * shape + noise, errors).mean())
    return Found(index, float(factor), float(noise), score, len(PRODUCTS) * len(SHARES) * len(NOISES))


def setting(product: float, factor: float, noise: float) -> dict[str, float]:
    """Return noise, temperature and prior precision of a, c and the noise variance."""
    return {
        "sigma_noise": math.sqrt(noise),
        "temperature": factor / noise,
        "prior_precision": product / factor,
    }


@dataclass(frozen=True)
class Flavour:
    """A fitted posterior of laplace-torch in the eigenvectors of its curvature.

    Attributes
    ----------
    la : object
        Of laplace-torch.
    embed : callable
        Inputs -> what the posterior's model takes: for a last layer, what enters it.
    """

    la: Any
    embed: Map

    @cached_property
    def eigen(self) -> tuple[Map, Tensor]:
        """What turns Jacobians (B, P) into coordinates in the eigenvectors (B, R), and the eigenvalues (R,)."""
        return _eigen(self.la)

    @torch.no_grad()
    def shapes(self, x: Tensor, products: tuple[float, ...]) -> Tensor:
        """Return q_a of each input for each a (A, N), float64."""
        weights = torch.stack([1 / (self.eigen[1] + a) for a in products], 1)
        parts = [self._squares(part) @ weights for part in x.split(BATCH)]
        return torch.cat(parts).double().T

    def _squares(self, x: Tensor) -> Tensor:
        jacobians = self.la.backend.jacobians(self.embed(x))[0][:, 0].detach()
        rotate, values = self.eigen
        return rotate(jacobians.to(values)).square()

    def give(self, product: float, factor: float, noise: float) -> dict[str, float]:
        """Give laplace-torch's estimator the setting that was found, and return it."""
        found = setting(product, factor, noise)
        for name, value in found.items():
            setattr(self.la, name, value)
        return found

    @torch.no_grad()
    def library(self, x: Tensor) -> Tensor:
        """Return the variances (N,) that laplace-torch's own call gives."""
        return torch.cat([self.la(self.embed(part))[1].detach().reshape(-1) for part in x.split(BATCH)])


def last_layer(structure: str, model: nn.Module, data: Data) -> Flavour:
    head = copy_of(model.fc)
    embed = partial(hidden, model)
    la = Laplace(head, "regression", "all", structure)
    with double_precision():
        la.fit(loader(embed(data.train[0]), data.train[1].double(), 500))
    return Flavour(la, embed)


def all_weights(structure: str, model: nn.Module, data: Data) -> Flavour:
    la = Laplace(copy.deepcopy(model), "regression", "all", structure)
    la.fit(loader(*data.train, BATCH))
    return Flavour(la, lambda x: x)


def exact(model: nn.Module, data: Data) -> Flavour:
    """All weights and the whole matrix, in float64."""
    la = Laplace(copy.deepcopy(model).double(), "regression", "all", "full")
    with double_precision():
        la.fit(loader(data.train[0].double(), data.train[1].double(), BATCH))
    return Flavour(la, lambda x: x.double())


def host_ella(model: nn.Module, data: Data, n_landmarks: int, rank: int, seed: int) -> Flavour:
    """Return laplace-torch's own ELLA."""
    sizes = {"subsample_size": n_landmarks, "n_eigenvalues": rank, "seed": seed}
    options = {"functional_approximation": "nystrom", **sizes}
    la = Laplace(copy.deepcopy(model), "regression", "all", "gp", **options)
    la.fit(loader(*data.train, BATCH))
    return Flavour(la, lambda x: x)


def _eigen(la: Any) -> tuple[Map, Tensor]:
    if hasattr(la, "feature_gram"):  # laplace-torch's ELLA
        values, vectors = torch.linalg.eigh(la.feature_gram.double())
        directions = (la.dual_directions.double() @ vectors).to(la.dual_directions.dtype)
        return lambda J: J @ directions, values.clamp_min(0).to(directions.dtype)
    if hasattr(la.H, "eigenvectors"):  # KFAC
        return partial(kron_basis.rotated, la.H), kron_basis.eigenvalues(la.H)
    if la.H.ndim == 1:
        return lambda J: J, la.H
    values, vectors = torch.linalg.eigh(la.H)
    return lambda J: J @ vectors, values.clamp_min(0)


@torch.no_grad()
def hidden(model: nn.Module, x: Tensor) -> Tensor:
    """Return what enters the last layer (N, D), float64."""
    return torch.cat([model.hidden(part) for part in x.split(1000)]).double()
