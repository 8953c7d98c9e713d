r"""From a Gaussian over logits to class probabilities.

Every link takes the mean f (B, C) and the whitened features psi (B, C, K), whose
covariance is :math:`\psi \psi^T`; none forms a C x C matrix, and all work with K < C.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .posterior import functional_samples, independent_samples, variance

_SAMPLES_PER_BLOCK = 16


def probit(f: Tensor, psi: Tensor) -> Tensor:
    """Scale each logit by its variance: the multiclass probit approximation (B, C).

    Source: Gibbs (1998), Bayesian Gaussian processes for regression and classification.
    """
    return (f / torch.sqrt(1 + math.pi / 8 * variance(psi))).softmax(-1)


def laplace_bridge(f: Tensor, psi: Tensor, normalize: bool) -> Tensor:
    r"""Match a Dirichlet to the logits and return its mean (B, C).

    Parameters
    ----------
    normalize : bool
        Rescale logits and variances by the mean variance first ("bridge_norm").

    Notes
    -----
    Source: Hobbhahn, Kristiadi, Hennig (2022), Fast predictive uncertainty for
    classification with Bayesian deep networks, eq. 7-8. The correction to logits
    of zero sum needs only :math:`\psi^T 1`. Where the sum of the logits has no
    variance, there is nothing to correct; where a corrected variance vanishes (K = 1)
    it is replaced by the rounding error of the largest.
    """
    n_outputs = f.shape[-1]
    row_sums, total = _sum_of_logits(psi)
    safe_total = torch.where(total > 0, total, torch.ones_like(total))
    mean = f - row_sums * f.sum(-1, keepdim=True) / safe_total
    var = variance(psi)
    floor = torch.finfo(var.dtype).eps * var.amax(-1, keepdim=True)
    floor = floor.clamp_min(torch.finfo(var.dtype).tiny)
    var = torch.maximum(var - row_sums.square() / safe_total, floor)
    if normalize:
        ratio = var.mean(-1, keepdim=True) / math.sqrt(n_outputs / 2)
        mean, var = mean / ratio.sqrt(), var / ratio
    # log of 1 - 2/C + exp(f) sum(exp(-f)) / C^2, which overflows if written out
    exponent = mean + (-mean).logsumexp(-1, keepdim=True) - 2 * math.log(n_outputs)
    offset = torch.full_like(exponent, 1 - 2 / n_outputs).log()
    return (torch.logaddexp(offset, exponent) - var.log()).softmax(-1)


def _sum_of_logits(psi: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance of each logit with their sum (B, C), and the variance of the sum (B, 1)."""
    ones = psi.sum(1)
    row_sums = torch.einsum("bck,bk->bc", psi, ones)
    total = ones.square().sum(-1, keepdim=True)
    # Below rounding the sum is constant, and a quotient would be noise.
    bound = psi.shape[1] * torch.finfo(psi.dtype).eps ** 2 * variance(psi).sum(-1, keepdim=True)
    return row_sums * (total > bound), total * (total > bound)


def monte_carlo(f: Tensor, psi: Tensor, noise: Tensor, diagonal_output: bool) -> Tensor:
    """Average the softmax over samples of the logits (B, C).

    Parameters
    ----------
    noise : Tensor (S, K), or (S, C) with ``diagonal_output``
        Shared by all inputs.
    diagonal_output : bool
        Ignore correlations between outputs.
    """
    total = torch.zeros_like(f, dtype=psi.dtype)
    for block in noise.to(psi).split(_SAMPLES_PER_BLOCK):
        if diagonal_output:
            samples = independent_samples(f, psi, block[:, None])
        else:
            samples = functional_samples(f, psi, block)
        total = total + samples.softmax(-1).sum(0)
    return total / len(noise)


def quasi_normal(n_samples: int, dimension: int, seed: int) -> Tensor:
    """Draw quasi-random standard normal points (S, D), float64, on the CPU.

    A scrambled Sobol sequence: the same seed gives the same points, and a hundred of
    them integrate a smooth function as well as many more independent ones.

    Raises
    ------
    ValueError
        If D is larger than the sequence allows.
    """
    largest = torch.quasirandom.SobolEngine.MAXDIM
    if dimension > largest:
        raise ValueError(
            f"The Monte-Carlo link is quasi-random in at most {largest} dimensions (K, or C with "
            f"diagonal_output); got {dimension}. Use link_approx='probit', or predictive_samples()."
        )
    points = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed).draw(
        n_samples, dtype=torch.float64
    )
    # Scrambled points lie on a grid of 2^-30 and may be 0, whose quantile is infinite.
    return torch.special.ndtri(points * (1 - 2**-30) + 2**-31)
