"""Features along the directions of many bases at once, so that a sweep over them runs the network once.

Reverse mode costs C backward passes whatever the number of directions, so that the directions of all bases are put
side by side, and each basis takes its columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from laplace_ella.basis import NystromBasis
from laplace_ella.hashing import LANDMARK_INPUT, hash_keys
from laplace_ella.landmarks import BottomK, Landmarks, draw_outputs
from torch import Tensor

Pair = tuple[Tensor, Tensor]
BATCH = 50


@dataclass(frozen=True)
class Draw:
    """How landmarks are drawn, and how many directions are made of them."""

    way: str  # "uniform", "balanced" or "label"
    M: int
    K: int
    seed: int


def landmarks(draw: Draw, data: Pair, n_outputs: int) -> Landmarks:
    """Draw as ``fit`` does from the same data; "label" takes the output of each input's label instead."""
    x, y = data
    positions = torch.arange(len(y))
    balanced = draw.way == "balanced"
    sample = BottomK(draw.M)
    keys = hash_keys(draw.seed, LANDMARK_INPUT, positions)
    groups = y.tolist() if balanced else None
    sample.offer(positions, keys, groups, lambda i: (x[i : i + 1], n_outputs))
    drawn = draw_outputs(sample, draw.seed, balanced)
    if draw.way != "label":
        return drawn
    assert drawn.positions is not None
    return replace(drawn, outputs=y[list(drawn.positions)])


def no_bars(iterable: Any, name: str) -> Any:
    return iterable


@dataclass(frozen=True)
class Spectrum:
    """What is kept of a basis: how many directions there are, and the eigenvalues of the Gram matrix."""

    rank: int
    values: Tensor

    def retained(self, k: int) -> float:
        """Return the share of the trace that k directions retain."""
        return float(self.values[:k].sum() / self.values.sum())


def stacked_bases(
    backend: Any, draws: Sequence[Draw], data: Pair, n_outputs: int
) -> tuple[NystromBasis, dict[Draw, tuple[slice, Spectrum]]]:
    """Return the directions of all draws side by side, and where each has its own."""
    blocks: dict[str, list[Tensor]] = {}
    found, start = {}, 0
    for draw in draws:
        basis = backend.build_basis(landmarks(draw, data, n_outputs), draw.K, no_bars)
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


def snapshots(backend: Any, phi: Tensor, f: Tensor, sizes: Sequence[int], n_data: int) -> dict[int, Tensor]:
    """Return G as estimated from the first n inputs, scaled to all the data, for each n, ascending."""
    total = torch.zeros(phi.shape[-1], phi.shape[-1], dtype=torch.float64)
    found, done = {}, 0
    for n in sizes:
        total = total + backend.curvature(phi[done:n], f[done:n])
        done = n
        found[n] = total * (n_data / n)
    return found
