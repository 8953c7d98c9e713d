r"""From a Gaussian over logits to class probabilities.

Every link takes a Gaussian over the outputs; none forms a C x C matrix of the span of
the basis, and all work with K < C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from .posterior import Outputs

_SAMPLES_PER_BLOCK = 16
InverseLink = Callable[[Tensor], Tensor]


def probit(outputs: Outputs, inverse_link: InverseLink) -> Tensor:
    """Scale each logit by its variance: the (multiclass) probit approximation (B, C).

    Source: Gibbs (1998), Bayesian Gaussian processes for regression and classification.
    """
    return inverse_link(outputs.mean / torch.sqrt(1 + math.pi / 8 * outputs.variance))


def laplace_bridge(outputs: Outputs, normalize: bool) -> Tensor:
    r"""Match a Dirichlet to the logits and return its mean (B, C).

    Parameters
    ----------
    normalize : bool
        Rescale logits and variances by the mean variance first ("bridge_norm").

    Notes
    -----
    Source: Hobbhahn, Kristiadi, Hennig (2022), Fast predictive uncertainty for
    classification with Bayesian deep networks, eq. 7-8. The correction to logits
    of zero sum needs only their covariances with the sum. Where the sum of the logits has no
    variance, there is nothing to correct; where a corrected variance vanishes (K = 1)
    it is replaced by the rounding error of the largest.
    """
    f, var = outputs.mean, outputs.variance
    n_outputs = f.shape[-1]
    row_sums, total = _sum_of_logits(outputs, var)
    safe_total = torch.where(total > 0, total, torch.ones_like(total))
    mean = f - row_sums * f.sum(-1, keepdim=True) / safe_total
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


def _sum_of_logits(outputs: Outputs, var: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance of each logit with their sum (B, C), and the variance of the sum (B, 1)."""
    row_sums, total = outputs.covariance_with_sum(), outputs.sum_variance()
    # Below rounding the sum is constant, and a quotient would be noise.
    bound = var.shape[1] * torch.finfo(var.dtype).eps ** 2 * var.sum(-1, keepdim=True)
    return row_sums * (total > bound), total * (total > bound)


def monte_carlo(outputs: Outputs, inverse_link: InverseLink, noise: Tensor, diagonal_output: bool) -> Tensor:
    """Average the inverse link over samples of the logits (B, C).

    Parameters
    ----------
    noise : Tensor (S, noise dimension), or (S, C) with ``diagonal_output``
        Shared by all inputs.
    diagonal_output : bool
        Ignore correlations between outputs.
    """
    draw = outputs.independent_samples if diagonal_output else outputs.samples
    total = torch.zeros_like(outputs.mean)
    for block in noise.to(outputs.psi).split(_SAMPLES_PER_BLOCK):
        total = total + inverse_link(draw(block[:, None] if diagonal_output else block)).sum(0)
    return total / len(noise)


@lru_cache(maxsize=8)
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
