"""Features along the directions of many bases at once, so that a sweep over them runs the network once.

Reverse mode costs C backward passes whatever the number of directions, so that the directions of all bases are put
side by side, and each basis takes its columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from benchmarks.measure import loader
from benchmarks.methods import ours
from laplace_ella import NystromBasis

Pair = tuple[Tensor, Tensor]
BATCH = 50


@dataclass(frozen=True)
class Draw:
    """How landmarks are drawn, and how many directions are made of them."""

    way: str  # "uniform", "balanced" or "label"
    M: int
    K: int
    seed: int


def landmarks(draw: Draw, data: Pair, n_outputs: int) -> Pair:
    """Draw inputs, and one output of each: any, or with "label" that of its label; "balanced" over the classes."""
    x, y = data
    generator = torch.Generator().manual_seed(draw.seed)
    order = torch.randperm(len(y), generator=generator)
    if draw.way == "balanced":  # the first of every class, then the second of every class, and so on
        place = one_hot(y[order]).cumsum(0).gather(1, y[order, None])[:, 0]
        order = order[place.argsort(stable=True)]
    chosen = order[: draw.M]
    outputs = torch.randint(n_outputs, (len(chosen),), generator=generator)
    return x[chosen], y[chosen] if draw.way == "label" else outputs


@dataclass(frozen=True)
class Spectrum:
    """What is kept of a basis: how many directions there are, and the eigenvalues of the Gram matrix."""

    rank: int
    values: Tensor

    def retained(self, k: int) -> float:
        """Return the share of the trace that k directions retain."""
        return float(self.values[:k].sum() / self.values.sum())


def stacked_bases(
    model: nn.Module, draws: Sequence[Draw], data: Pair, n_outputs: int
) -> tuple[NystromBasis, dict[Draw, tuple[slice, Spectrum]]]:
    """Return the directions of all draws side by side, and where each has its own."""
    blocks: dict[str, list[Tensor]] = {}
    found, start = {}, 0
    few = loader(data[0][:BATCH], data[1][:BATCH], BATCH)  # of which the basis does not depend
    for draw in draws:
        la = ours(model, subsample_size=draw.M, n_eigenvalues=draw.K)
        la.fit(few, landmarks=landmarks(draw, data, n_outputs))
        basis = la.basis
        for name, directions in basis.directions.items():
            blocks.setdefault(name, []).append(directions)
        found[draw] = slice(start, start + basis.rank), Spectrum(basis.rank, basis.spectrum.clamp_min(0))
        start += basis.rank
    ones = torch.ones(start, dtype=torch.float64)
    directions = {name: torch.cat(blocks.pop(name)) for name in list(blocks)}
    return NystromBasis(directions, ones, float(start), ones), found


@torch.no_grad()
def features(backend: Any, x: Tensor, basis: NystromBasis) -> Pair:
    """Return phi (N, C, K of all), and f (N, C)."""
    found = [backend.features(part, basis) for part in x.split(BATCH)]
    return torch.cat([phi for phi, _ in found]), torch.cat([f for _, f in found])


def curvature(phi: Tensor, f: Tensor) -> Tensor:
    """Return G (K, K) of inputs, the sum of phi^T (diag p - p p^T) phi, float64."""
    p = f.double().softmax(-1)[..., None]
    root = (p.sqrt() * (phi - (p * phi).sum(1, keepdim=True))).flatten(0, 1)
    return root.mT @ root


def snapshots(phi: Tensor, f: Tensor, sizes: Sequence[int], n_data: int) -> dict[int, Tensor]:
    """Return G as estimated from the first n inputs, scaled to all the data, for each n, ascending."""
    total = torch.zeros(phi.shape[-1], phi.shape[-1], dtype=torch.float64)
    found, done = {}, 0
    for n in sizes:
        total = total + curvature(phi[done:n], f[done:n])
        done = n
        found[n] = total * (n_data / n)
    return found
