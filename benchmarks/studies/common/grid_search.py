"""The grid of prior precisions, temperatures and logit scales over which posteriors of laplace-torch are tuned.

Only one number matters to the shape of a covariance: prior precision times temperature, since
the posterior precision is (H + T delta I) / T. So a posterior is asked once for each product on the
grid instead of once for each pair, and T scales what it says. The logit scale s multiplies the logits and not
their covariance, as ELLA's does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.studies.common.baselines import N_SAMPLES, SCALES, mean_softmax, minimum_on_line, quasi_normal

# Products whose temperature is refined.
N_REFINED = 3


@dataclass(frozen=True)
class Setting:
    """What is tuned."""

    prior_precision: float
    temperature: float
    logit_scale: float = 1.0

    @property
    def product(self) -> float:
        return self.prior_precision * self.temperature


def searches(name: str) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yield the names of a posterior's rows, and the logit scales on the grid of each."""
    yield name, (1.0,)
    yield name.removesuffix(" (T)") + " (T, s)", SCALES


def pairs_by_product() -> dict[float, list[Setting]]:
    """Return the grid's pairs of prior precision and temperature by their product.

    One prior precision a decade, two temperatures a decade: 209 pairs, 39 products.
    """
    found: dict[float, list[Setting]] = {}
    for prior in range(-4, 7):
        for halves in range(-6, 13):
            product = 10 ** (prior + halves / 2)
            found.setdefault(product, []).append(Setting(10.0**prior, 10 ** (halves / 2)))
    return found


def root(covariance: Tensor) -> Tensor:
    """Return R (N, C, C) with R R^T the covariance of the logits, less what they all have in common.

    The softmax does not see the common part, and it is by far the largest where the prior precision is small.
    """
    covariance = covariance - covariance.mean(1, keepdim=True)
    covariance = covariance - covariance.mean(2, keepdim=True)
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return vectors * values.clamp_min(0).sqrt()[:, None]


def best_setting(
    f: Tensor, y: Tensor, roots: Iterable[tuple[float, Tensor]], seed: int, scales: tuple[float, ...] = (1.0,)
) -> Setting:
    """Return the setting with the smallest validation NLL.

    The grid first; then temperature and, if there are several, logit scale are refined in turn, as finely as those
    of other methods, for the products that did best: with a product given, the prior precision follows from the
    temperature.

    Parameters
    ----------
    f : Tensor (N, C)
        Logits.
    y : LongTensor (N,)
    roots : iterable of (product, Tensor (N, C, C))
        Of the covariances at T = 1 and a prior precision of each product on the grid.
    scales : tuple of float
        Logit scales on the grid; with one, it stays.
    """
    noise, pairs = quasi_normal(N_SAMPLES, f.shape[1], seed).to(f), pairs_by_product()
    kept = dict(roots)
    coarse = []
    for product, root_ in kept.items():
        offsets = (root_ @ noise.T).float()
        coarse += [
            (label_nll(s * f, offsets, y, at.temperature), product, replace(at, logit_scale=s))
            for at in pairs[product]
            for s in scales
        ]
    fine = []
    for product, start in best_of_each(coarse)[:N_REFINED]:
        offsets = (kept[product] @ noise.T).float()
        fine.append(refined(f, y, offsets, start, free_scale=len(scales) > 1))
    return min(fine, key=lambda one: one[0])[1]


def refined(f: Tensor, y: Tensor, offsets: Tensor, start: Setting, free_scale: bool) -> tuple[float, Setting]:
    """Return the NLL and the setting that minimises it with the product given, near a start."""
    t, s = start.temperature, start.logit_scale

    def of_temperature(value: float) -> float:
        return label_nll(s * f, offsets, y, value)

    def of_scale(value: float) -> float:
        return label_nll(value * f, offsets, y, t)

    for _ in range(3 if free_scale else 1):
        t = minimum_on_line(of_temperature, math.log10(t) - 1, math.log10(t) + 1)
        if free_scale:
            s = minimum_on_line(of_scale, math.log10(s) - 0.25, math.log10(s) + 0.25)
    return of_temperature(t), Setting(start.product / t, t, s)


def best_of_each(found: list[tuple[float, float, Setting]]) -> list[tuple[float, Setting]]:
    """Return each product with its best setting, the best first, from NLLs, products and settings."""
    best: dict[float, Setting] = {}
    for _, product, setting in sorted(found, key=lambda one: one[0]):
        best.setdefault(product, setting)
    return list(best.items())


def mean_probabilities(f: Tensor, roots: Tensor, at: Setting, seed: int) -> Tensor:
    """Average the softmax over the logits' posterior (N, C)."""
    noise = quasi_normal(N_SAMPLES, f.shape[1], seed).to(f)
    width = math.sqrt(at.temperature)
    return mean_softmax(at.logit_scale * f, (width * (roots @ sample) for sample in noise))


def label_nll(f: Tensor, offsets: Tensor, y: Tensor, temperature: float) -> float:
    """Return the mean NLL under the mean softmax of f plus scaled offsets (N, C, S); float32, as there are many."""
    logits = f.float()[:, :, None] + math.sqrt(temperature) * offsets.float()
    log_p = logits[torch.arange(len(y)), y] - logits.logsumexp(1)
    value = float((math.log(log_p.shape[1]) - log_p.logsumexp(1)).mean())
    return value if math.isfinite(value) else math.inf
