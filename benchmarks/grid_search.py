"""The grid of prior precisions and temperatures over which posteriors of laplace-torch are tuned.

Only one number matters to the shape of a covariance: prior precision times temperature, since
the posterior precision is (H + T delta I) / T. So a posterior is asked once for each product on the
grid instead of once for each pair, and T scales what it says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from baselines import N_SAMPLES, mean_softmax, minimum_on_line
from torch import Tensor

from laplace_ella.links import quasi_normal

# Products whose temperature is refined.
N_REFINED = 3


def pairs_by_product() -> dict[float, list[tuple[float, float]]]:
    """Return the grid's pairs of prior precision and temperature by their product.

    One prior precision a decade, two temperatures a decade: 209 pairs, 39 products.
    """
    found: dict[float, list[tuple[float, float]]] = {}
    for prior in range(-4, 7):
        for halves in range(-6, 13):
            product = 10 ** (prior + halves / 2)
            found.setdefault(product, []).append((10.0**prior, 10 ** (halves / 2)))
    return found


def root(covariance: Tensor) -> Tensor:
    """Return R (N, C, C) with R R^T the covariance of the logits, less what they all have in common.

    The softmax does not see the common part, and it is by far the largest where the prior precision is small.
    """
    covariance = covariance - covariance.mean(1, keepdim=True)
    covariance = covariance - covariance.mean(2, keepdim=True)
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return vectors * values.clamp_min(0).sqrt()[:, None]


def best_pair(f: Tensor, y: Tensor, roots: Iterable[tuple[float, Tensor]], seed: int) -> tuple[float, float]:
    """Return the prior precision and the temperature with the smallest validation NLL.

    The grid first; then the temperature is refined, as finely as those of other methods, for the products that
    did best: with a product given, the prior precision follows from the temperature.

    Parameters
    ----------
    f : Tensor (N, C)
        Logits.
    y : LongTensor (N,)
    roots : iterable of (product, Tensor (N, C, C))
        Of the covariances at T = 1 and a prior precision of each product on the grid.
    """
    noise, pairs = quasi_normal(N_SAMPLES, f.shape[1], seed).to(f), pairs_by_product()
    kept = dict(roots)
    coarse = []
    for product, root_ in kept.items():
        offsets = root_ @ noise.T
        coarse += [(label_nll(f, offsets, y, t), t, product) for _, t in pairs[product]]
    fine = []
    for _, start, product in best_of_each(coarse)[:N_REFINED]:
        offsets = (kept[product] @ noise.T).float()

        def loss(t: float, offsets: Tensor = offsets) -> float:
            return label_nll(f, offsets, y, t)

        middle = math.log10(start)
        temperature = minimum_on_line(loss, middle - 1, middle + 1)
        fine.append((loss(temperature), temperature, product))
    _, temperature, product = min(fine)
    return product / temperature, temperature


def best_of_each(found: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Return the best (NLL, temperature, product) of each product, the best first."""
    best: dict[float, tuple[float, float, float]] = {}
    for one in sorted(found):
        best.setdefault(one[2], one)
    return list(best.values())


def mean_probabilities(f: Tensor, roots: Tensor, temperature: float, seed: int) -> Tensor:
    """Average the softmax over the logits' posterior (N, C)."""
    noise = quasi_normal(N_SAMPLES, f.shape[1], seed).to(f)
    return mean_softmax(f, (math.sqrt(temperature) * (roots @ sample) for sample in noise))


def label_nll(f: Tensor, offsets: Tensor, y: Tensor, temperature: float) -> float:
    """Return the mean NLL under the mean softmax of f plus scaled offsets (N, C, S); float32, as there are many."""
    logits = f.float()[:, :, None] + math.sqrt(temperature) * offsets.float()
    log_p = logits[torch.arange(len(y)), y] - logits.logsumexp(1)
    value = float((math.log(log_p.shape[1]) - log_p.logsumexp(1)).mean())
    return value if math.isfinite(value) else math.inf
