"""Last-layer Laplace of laplace-torch, tuned over the grid of grid_search.py.

A last-layer posterior is that of the last layer alone, fed with what enters it. So the host's
estimator for all weights is put on that layer, and the network runs once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from laplace import Laplace
from torch import Tensor, nn

from benchmarks.measure import loader
from benchmarks.studies.common.baselines import Outputs, Tuned
from benchmarks.studies.common.grid_search import best_setting, mean_probabilities, pairs_by_product, root

STRUCTURES = {"last-layer full": "full", "last-layer KFAC": "kron", "last-layer diagonal": "diag"}
BATCH = 500


class LastLayer:
    """The host's posterior over the last layer, and roots of the covariances of logits."""

    def __init__(self, structure: str, head: nn.Linear, train: Outputs, y: Tensor) -> None:
        self.head = copy_of(head)
        self.la: Any = Laplace(self.head, "classification", "all", structure)
        with double_precision():
            self.la.fit(loader(train.z, y, BATCH))

    def jacobians(self, out: Outputs) -> list[Tensor]:
        """Return J (B, C, P) of each batch, which no prior and no temperature changes."""
        return [self.la.backend.jacobians(z)[0].detach() for z in out.z.split(BATCH)]

    @torch.no_grad()
    def roots(self, jacobians: list[Tensor], product: float) -> Tensor:
        """Return R (N, C, C) with R R^T the covariance at T = 1 and this prior precision."""
        self.la.prior_precision = product
        return root(torch.cat([self.la.functional_variance(js) for js in jacobians]))


@contextmanager
def double_precision() -> Iterator[None]:
    """Make float64 the default: the host's full H comes from ``torch.eye`` and has negative eigenvalues else."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def copy_of(head: nn.Linear) -> nn.Linear:
    """Return the layer in float64 on the CPU: at a prior precision of 1e-7, the full matrix is too much for float32."""
    copied = nn.Linear(head.in_features, head.out_features, dtype=torch.float64)
    copied.load_state_dict(head.state_dict())
    return copied


def validation_roots(posterior: LastLayer, val: Outputs) -> dict[float, Tensor]:
    """Return the roots (N, C, C) of each product on the grid."""
    jacobians = posterior.jacobians(val)
    return {product: posterior.roots(jacobians, product) for product in pairs_by_product()}


def tune(
    posterior: LastLayer,
    roots: dict[float, Tensor],
    val: Outputs,
    y: Tensor,
    seed: int,
    scales: tuple[float, ...],
) -> Tuned:
    """Choose prior precision, temperature and, of several, the logit scale by validation NLL."""
    best = best_setting(val.f, y, roots.items(), seed, scales)

    def probabilities(out: Outputs) -> Tensor:
        found = posterior.roots(posterior.jacobians(out), best.product)
        return mean_probabilities(out.f, found, best, seed)

    return Tuned(probabilities, asdict(best))
