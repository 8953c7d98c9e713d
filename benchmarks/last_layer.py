"""Last-layer Laplace of laplace-torch, tuned over a grid of prior precisions and temperatures.

A last-layer posterior is that of the last layer alone, fed with what enters it. So the host's
estimator for all weights is put on that layer, and the network runs once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from baselines import N_SAMPLES, Outputs, Tuned, mean_softmax
from laplace import Laplace
from measure import loader
from torch import Tensor, nn

from laplace_ella.links import quasi_normal

STRUCTURES = {"last-layer full": "full", "last-layer KFAC": "kron", "last-layer diagonal": "diag"}
BATCH = 500


class LastLayer:
    """The host's posterior over the last layer, and roots of the covariances of logits.

    Only one number matters to the shape of a covariance: prior precision times temperature, since
    the posterior precision is (H + T delta I) / T. So the host is asked once for each product on the
    grid instead of once for each pair, and T scales what it says.
    """

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
        """Return R (N, C, C) with R R^T the covariance at T = 1 and this prior precision.

        What all logits have in common is taken out first: the softmax does not see it, and it is
        by far the largest part where the prior precision is small.
        """
        self.la.prior_precision = product
        covariance = torch.cat([self.la.functional_variance(js) for js in jacobians])
        covariance = covariance - covariance.mean(1, keepdim=True)
        covariance = covariance - covariance.mean(2, keepdim=True)
        values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
        return vectors * values.clamp_min(0).sqrt()[:, None]


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


def tune(
    structure: str, head: nn.Linear, train: Outputs, y_train: Tensor, val: Outputs, y: Tensor, seed: int
) -> Tuned:
    """Fit, and choose prior precision (one value a decade) and temperature (two a decade) by validation NLL."""
    posterior = LastLayer(structure, head, train, y_train)
    noise = quasi_normal(N_SAMPLES, val.f.shape[1], seed).to(val.f)
    jacobians = posterior.jacobians(val)
    _, delta, temperature = min(
        (label_nll(val.f, roots @ noise.T, y, t), d, t)
        for product, pairs in pairs_by_product().items()
        for roots in [posterior.roots(jacobians, product)]
        for d, t in pairs
    )

    def probabilities(out: Outputs) -> Tensor:
        roots = posterior.roots(posterior.jacobians(out), delta * temperature)
        offsets = (math.sqrt(temperature) * (roots @ sample) for sample in noise)
        return mean_softmax(out.f, offsets)

    return Tuned(probabilities, {"prior_precision": delta, "temperature": temperature})


def pairs_by_product() -> dict[float, list[tuple[float, float]]]:
    """Return the grid's pairs of prior precision and temperature by their product."""
    found: dict[float, list[tuple[float, float]]] = {}
    for prior in range(-4, 7):
        for halves in range(-6, 13):
            product = 10 ** (prior + halves / 2)
            found.setdefault(product, []).append((10.0**prior, 10 ** (halves / 2)))
    return found


def label_nll(f: Tensor, offsets: Tensor, y: Tensor, temperature: float) -> float:
    """Return the mean NLL under the mean softmax of f plus scaled offsets (N, C, S); float32, as there are many."""
    logits = f.float()[:, :, None] + math.sqrt(temperature) * offsets.float()
    log_p = logits[torch.arange(len(y)), y] - logits.logsumexp(1)
    value = float((math.log(log_p.shape[1]) - log_p.logsumexp(1)).mean())
    return value if math.isfinite(value) else math.inf
