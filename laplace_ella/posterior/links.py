r"""From a Gaussian over logits to class probabilities.

Every link takes a Gaussian over the outputs; none forms a C x C matrix of the span of
the basis, and all work with K < C.

A link is one function of (outputs, likelihood, :class:`Noise`); :data:`LINKS` has those that are known, by the name
that users pass, and an entry added to it is a link like the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .gaussian import Outputs
from .likelihoods import Likelihood

_SAMPLES_PER_BLOCK = 16
# From where on, and from where on fully, the Laplace bridge applies: the least variance relative to the largest, ...
_EQUAL = (1e-3, 1e-2)
# ... the mean variance (a standard deviation of .001 and .01), ...
_UNCERTAIN = (1e-6, 1e-4)
# ... and one over the share of the sum of the logits by which one of them is corrected.
_STILL = (0.1, 0.3)
InverseLink = Callable[[Tensor], Tensor]


def probit(outputs: Outputs, inverse_link: InverseLink) -> Tensor:
    """Scale each logit by its variance: the (multiclass) probit approximation (B, C).

    Source: Gibbs (1998), Bayesian Gaussian processes for regression and classification.
    """
    return inverse_link(outputs.mean / torch.sqrt(1 + math.pi / 8 * outputs.variance))


def laplace_bridge(outputs: Outputs, normalize: bool) -> Tensor:
    r"""Match a Dirichlet to the logits and return its mean (B, C); the probit link where there is none.

    Parameters
    ----------
    normalize : bool
        Rescale logits and variances by the mean variance first ("bridge_norm").

    Notes
    -----
    Source: Hobbhahn, Kristiadi, Hennig (2022), Fast predictive uncertainty for
    classification with Bayesian deep networks, eq. 7-8. The correction to logits
    of zero sum needs only their covariances with the sum. Where the sum of the logits has no
    variance, there is nothing to correct.

    The parameters of the Dirichlet are divided by the variances, so that a class whose variance vanishes gets
    all probability, whatever its logit: :func:`_applicability` says how far an input is from that.
    Probabilities are those of the bridge times this, and those of the probit link, whose limit of no variance is the
    softmax, for the rest.
    """
    plain = probit(outputs, lambda f: f.softmax(-1))
    f, (outputs, unit) = _within_root(outputs.mean), _in_units(outputs)
    var = outputs.variance
    row_sums, total = _sum_of_logits(outputs, var)
    safe_total = torch.where(total > 0, total, torch.ones_like(total))
    shares = row_sums / safe_total
    corrected = var - row_sums.square() / safe_total
    weight = _applicability(var, corrected, shares, unit)
    # What is not used has to be finite too: its gradient is multiplied by 0.
    applies = weight > 0
    shares = torch.where(applies, shares, torch.zeros_like(shares))
    corrected = torch.where(applies, corrected, torch.ones_like(corrected))
    dirichlet = _dirichlet_mean(f - shares * f.sum(-1, keepdim=True), corrected, unit, normalize)
    return weight * dirichlet + (1 - weight) * plain


def _dirichlet_mean(mean: Tensor, var: Tensor, unit: Tensor, normalize: bool) -> Tensor:
    """Return the mean (B, C) of the Dirichlet, of logits of zero sum; the variances are in squares of the unit."""
    n_outputs = mean.shape[-1]
    if normalize:
        ratio = var.mean(-1, keepdim=True) / math.sqrt(n_outputs / 2)
        mean, var = mean / (ratio.sqrt() * unit), var / ratio
    # log of 1 - 2/C + exp(f) sum(exp(-f)) / C^2, which overflows if written out
    exponent = mean + (-mean).logsumexp(-1, keepdim=True) - 2 * math.log(n_outputs)
    offset = torch.full_like(exponent, 1 - 2 / n_outputs).log()
    return (torch.logaddexp(offset, exponent) - var.log()).softmax(-1)


def _applicability(var: Tensor, corrected: Tensor, shares: Tensor, unit: Tensor) -> Tensor:
    r"""Say whether the Laplace bridge applies to an input (B, 1): 1 if it does, 0 if not, continuous in between.

    It needs logits of zero sum that are uncertain at all, of variances that are not too unequal, and whose correction does
    not move a mean by many times the sum of the logits. With one direction (K = 1) no variance is left.

    Parameters
    ----------
    var, corrected : Tensor (B, C)
        Variances of the logits, and of logits of zero sum, in squares of the unit.
    shares : Tensor (B, C)
        The shares of the sum of the logits by which each of them is corrected.
    unit : Tensor (B, 1)
    """
    rounding = 64 * torch.finfo(var.dtype).eps * var.amax(-1, keepdim=True)
    largest = corrected.amax(-1, keepdim=True).clamp_min(torch.finfo(var.dtype).tiny ** 0.5)
    equality = (corrected.amin(-1, keepdim=True) - rounding) / largest
    moved = shares.abs().amax(-1, keepdim=True).clamp_min(1)
    uncertainty = corrected.mean(-1, keepdim=True) * unit * unit
    return _rise(equality, *_EQUAL) * _rise(1 / moved, *_STILL) * _rise(uncertainty, *_UNCERTAIN)


def _rise(x: Tensor, low: float, high: float) -> Tensor:
    """Rise smoothly from exactly 0, up to ``low``, to exactly 1, from ``high`` on, in the logarithm of x."""
    t = ((x.clamp(low, high) / low).log() / math.log(high / low)).clamp(0, 1)
    t = torch.where(x >= high, torch.ones_like(t), t)
    return t.square() * (3 - 2 * t)


def _sum_of_logits(outputs: Outputs, var: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance of each logit with their sum (B, C), and the variance of the sum (B, 1)."""
    row_sums, total = outputs.covariance_with_sum(), outputs.sum_variance()
    all_variance = var.sum(-1, keepdim=True)
    # Rounding the features moves a share of the sum by about eps over this: close to it the sum is constant.
    relative = total / all_variance.clamp_min(torch.finfo(var.dtype).tiny ** 0.5)
    eps = torch.finfo(var.dtype).eps
    known = _rise(relative, 1e2 * eps, 1e3 * eps)
    return row_sums * known, torch.where(known > 0, total, torch.zeros_like(total))


def monte_carlo(outputs: Outputs, inverse_link: InverseLink, noise: Tensor, diagonal_output: bool) -> Tensor:
    """Average the inverse link over samples of the logits (B, C).

    Parameters
    ----------
    noise : Tensor (S, noise dimension), or (S, C) with ``diagonal_output``
        Shared by all inputs.
    diagonal_output : bool
        Ignore correlations between outputs.
    """
    total = torch.zeros_like(outputs.mean)
    for logits in blocks_of_samples(outputs, noise, diagonal_output):
        total = total + inverse_link(logits).sum(0)
    return total / len(noise)


def blocks_of_samples(outputs: Outputs, noise: Tensor, diagonal_output: bool = False) -> Iterator[Tensor]:
    """Yield samples (s, B, C) of the logits, a few at a time; the arguments are those of :func:`monte_carlo`."""
    outputs = with_room(outputs)
    draw = outputs.independent_samples if diagonal_output else outputs.samples
    largest = torch.finfo(outputs.mean.dtype).max / 4  # differences of two are finite
    for block in noise.to(outputs.psi).split(_SAMPLES_PER_BLOCK):
        logits = draw(block[:, None] if diagonal_output else block)
        yield logits.clamp(-largest, largest)


def with_room(outputs: Outputs) -> Outputs:
    """Return outputs whose samples are finite sums: beyond it, deviations are as good as infinite."""
    room = torch.finfo(outputs.mean.dtype).max / 64
    each = room / max(1, outputs.noise_dimension)
    block = None if outputs.block is None else outputs.block.clamp(-each, each)
    return replace(
        outputs, mean=outputs.mean.clamp(-room, room), psi=outputs.psi.clamp(-each, each), block=block
    )


def _in_units(outputs: Outputs) -> tuple[Outputs, Tensor]:
    """Return outputs in units (B, 1) in which squares of deviations cannot overflow.

    A unit is a power of two, and 1 where that is enough, so that nothing is rounded.
    """
    dtype = outputs.mean.dtype
    largest = torch.ones_like(outputs.mean[:, :1])
    for part in (outputs.psi, outputs.isotropic, outputs.block):
        if part is not None and part[:1].numel():
            largest = torch.maximum(largest, part.detach().flatten(1).abs().amax(1, keepdim=True).to(dtype))
    unit = largest / (2 * torch.frexp(largest).mantissa)
    of_outputs = unit[..., None]
    scaled = replace(
        outputs,
        psi=outputs.psi / of_outputs,
        isotropic=None if outputs.isotropic is None else outputs.isotropic / unit,
        block=None if outputs.block is None else outputs.block / of_outputs,
    )
    return scaled, unit


def _within_root(f: Tensor) -> Tensor:
    """Return logits (B, C) of which sums and products are finite, in the same order."""
    most = torch.finfo(f.dtype).max ** 0.5
    return f * (most / f.detach().abs().amax(-1, keepdim=True).clamp_min(most))


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
    with torch.inference_mode(False):  # the points are kept, and may meet a graph later
        engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed)
        # The engine rounds the first of its points to the default dtype.
        first = engine.quasi.to(torch.float32).double() / 2**engine.MAXBIT
        points = engine.draw(n_samples, dtype=torch.float64)
        points[0] = first
        # Scrambled points lie on a grid of 2^-30 and may be 0, whose quantile is infinite.
        return torch.special.ndtri(points * (1 - 2**-30) + 2**-31)


@dataclass(frozen=True)
class Noise:
    """How a link draws, if it does.

    Attributes
    ----------
    n_samples : int
    seed : int
    diagonal_output : bool
        Whether correlations between outputs are ignored.
    """

    n_samples: int = 100
    seed: int = 0
    diagonal_output: bool = False

    @classmethod
    def seeded(cls, n: int, generator: torch.Generator | None, seed: int, diagonal_output: bool) -> Noise:
        """Return noise with a seed that a generator gives, if there is one."""
        if generator is not None:
            device = generator.device
            seed = int(torch.randint(2**31, (), generator=generator, dtype=torch.int64, device=device))
        return cls(n, seed, diagonal_output)


@dataclass(frozen=True)
class Link:
    """A way from a Gaussian over outputs to probabilities.

    Attributes
    ----------
    predict : callable
        (outputs, likelihood, noise) -> probabilities (B, C).
    of_classes : bool
        Whether it makes probabilities that sum to one over the outputs.
    """

    predict: Callable[[Outputs, Likelihood, Noise], Tensor]
    of_classes: bool = False


def _monte_carlo(outputs: Outputs, likelihood: Likelihood, noise: Noise) -> Tensor:
    return monte_carlo(outputs, likelihood.inverse_link, _points(outputs, noise), noise.diagonal_output)


def samples_of(outputs: Outputs, noise: Noise) -> Iterator[Tensor]:
    """Yield samples (s, B, C) of the logits, those that the Monte-Carlo link averages; drawn when they are asked for."""
    yield from blocks_of_samples(outputs, _points(outputs, noise), noise.diagonal_output)


def _points(outputs: Outputs, noise: Noise) -> Tensor:
    dimension = outputs.mean.shape[-1] if noise.diagonal_output else outputs.noise_dimension
    if dimension == 0:  # outputs are certain, and all samples of them the same
        return torch.zeros(1, 0, dtype=torch.float64, device="cpu")
    return quasi_normal(noise.n_samples, dimension, noise.seed)


LINKS = {
    "probit": Link(lambda outputs, likelihood, _: probit(outputs, likelihood.inverse_link)),
    "mc": Link(_monte_carlo),
    "bridge": Link(lambda outputs, *_: laplace_bridge(outputs, normalize=False), of_classes=True),
    "bridge_norm": Link(lambda outputs, *_: laplace_bridge(outputs, normalize=True), of_classes=True),
}
