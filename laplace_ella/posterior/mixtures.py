r"""Densities of targets whose distributions have a Gaussian parameter, which is integrated out by quadrature."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# So many nodes lie between the peak minus and plus so many standard deviations.
_NODES, _REACH = 64, 8.5
# Exponents beyond it are as good as infinite, and gradients have to be finite.
_LARGEST = 700.0


def log_poisson(f: Tensor, y: Tensor) -> Tensor:
    """Return the log probability of counts y, given log rates f in float64."""
    return y * f - f.clamp(max=_LARGEST).exp() - torch.lgamma(y + 1)


def log_normal(difference: Tensor, variance: Tensor) -> Tensor:
    """Return the log density of a Gaussian at a difference from its mean."""
    return -0.5 * (difference.square() / variance + (2 * math.pi * variance).log())


def log_poisson_of_gaussian(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    r"""Return :math:`\log \int \mathrm{Poisson}(y | e^f) \, N(f | m, v) \, df` (...), float64.

    Parameters
    ----------
    mean, variance : Tensor (...)
        m and v, of the log rate.
    y : Tensor (...)
        Counts, float64.

    Notes
    -----
    The absolute error is below 1e-6 for v up to 10, and below 1e-2 for any v.
    """
    mean, variance = mean.double(), variance.double()
    root = _root(variance)
    f = _likely_log_rates(mean.detach(), variance.detach(), y)
    width = (1 + variance.detach() * f.exp()).rsqrt()
    z, log_weights = _normal_nodes(((f - mean) / root).detach(), width)
    return (log_poisson(mean + root * z, y) + log_weights).logsumexp(0)


def log_normal_of_gaussian(mean: Tensor, spread: Tensor, y: Tensor) -> Tensor:
    r"""Return :math:`\log \int N(y | m, e^s) \, N(m, s | \text{mean}, \text{spread}) \, dm \, ds` (B, D), float64.

    Given s, y is Gaussian; s is integrated out.

    Parameters
    ----------
    mean : Tensor (B, 2 D)
        Of m, and then of s.
    spread : Tensor (B, 2 D) or (B, 2 D, 2 D)
        Their variance, or covariance.
    y : Tensor (B, D)
    """
    mean, spread = mean.double(), spread.double()
    n, is_matrix = y.shape[-1], spread.ndim > mean.ndim
    variance = spread.diagonal(dim1=-2, dim2=-1) if is_matrix else spread
    root = _root(variance[..., n:])
    # m = its mean + shared z + what is independent of z, where s = its mean + root z.
    shared = spread[..., :n, n:].diagonal(dim1=-2, dim2=-1) / root if is_matrix else torch.zeros_like(root)
    own = (variance[..., :n] - shared.square()).clamp_min(0)
    z, log_weights = _normal_nodes(torch.zeros_like(root), torch.ones_like(root))
    noise = (mean[..., n:] + root * z).clamp(-_LARGEST, _LARGEST).exp()
    log_density = log_normal(y - mean[..., :n] - shared * z, own + noise)
    return (log_density + log_weights).logsumexp(0)


def _normal_nodes(centre: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return nodes z and log weights (Q, ...) with :math:`\sum_q w_q g(z_q) \approx E[g(z)]`, z standard normal.

    The trapezoidal rule in t, with :math:`z = c + h \sinh t`: nodes are dense where the integrand has its peak, and reach
    as far as the normal density does.

    Parameters
    ----------
    centre : Tensor (...)
        c, float64, where g times the density is large; it has no influence but on the precision.
    width : Tensor (...)
        h in (0, 1], how wide the peak there is.
    """
    end = torch.asinh(_REACH / width)
    steps = torch.linspace(-1, 1, _NODES, dtype=torch.float64, device=centre.device)
    t = steps.reshape(-1, *[1] * centre.ndim) * end
    z = centre + width * t.sinh()
    step = 2 * end / (_NODES - 1)
    return z, (width * t.cosh() * step).log() - 0.5 * (z.square() + math.log(2 * math.pi))


@torch.no_grad()
def _likely_log_rates(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Return the most likely log rates, given counts and a Gaussian of the log rates.

    They solve f = mean + variance (y - exp(f)), a convex function, which Newton's method descends from the right.
    """
    mean = mean.clamp(-_LARGEST / 2, _LARGEST / 2)
    f = torch.minimum(mean + variance * y, torch.maximum(mean, y.log()))
    for _ in range(30):
        rate = variance * f.exp()
        f = f - (f - mean - variance * y + rate) / (1 + rate)
    return f


def _root(variance: Tensor) -> Tensor:
    """Return the standard deviation, whose derivative is 0 where the variance is."""
    return variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
