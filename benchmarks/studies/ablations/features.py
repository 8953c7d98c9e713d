"""Features along the directions of many bases at once, so that a sweep over them runs the network once.

Reverse mode costs C backward passes whatever the number of directions, so that the directions of all bases are put
side by side, and each basis takes its columns.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from benchmarks.measure import loader
from benchmarks.methods import ours
from laplace_ella import NystromBasis

Pair = tuple[Tensor, Tensor]
Key = TypeVar("Key", bound=Hashable)
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
    model: nn.Module, given: Iterable[tuple[Key, Pair, int]], few: Pair
) -> tuple[NystromBasis, dict[Key, tuple[slice, Spectrum]]]:
    """Return the directions of all landmarks side by side, and where those of each key are.

    ``given`` are keys with landmarks, and how many directions are made of them; ``few`` inputs and labels to fit to, of
    which the bases do not depend.
    """
    blocks: dict[str, list[Tensor]] = {}
    found, start = {}, 0
    for key, pair, rank in given:
        la = ours(model, subsample_size=len(pair[1]), n_eigenvalues=rank)
        la.fit(loader(*few, BATCH), landmarks=pair)
        basis = la.basis
        for name, directions in basis.directions.items():
            blocks.setdefault(name, []).append(directions)
        found[key] = slice(start, start + basis.rank), Spectrum(basis.rank, basis.spectrum.clamp_min(0))
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
