"""Poisson and heteroscedastic likelihoods against dense linearised Laplace, integrals and draws."""

from __future__ import annotations

import math
from functools import cache

import oracle
import pytest
import torch
from conftest import B, assert_close
from helpers import inputs, loader, mlp, moments
from scipy.integrate import dblquad, quad
from scipy.stats import norm, poisson
from torch import Tensor
from torch.distributions import Independent, LogNormal, MultivariateNormal, Normal
from torch.distributions import Poisson as Counts
from torch.func import functional_call, hessian, jacrev

from laplace_ella import ELLALaplace, Laplace
from laplace_ella.nystrom.basis import identity_basis
from laplace_ella.posterior.likelihoods import LIKELIHOODS

F64 = torch.float64
NAMES = ("poisson", "heteroscedastic")
WIDTHS = {"poisson": (1, 3), "heteroscedastic": (2, 4)}
CASES = [(name, n) for name in NAMES for n in WIDTHS[name]]
T, DELTA = 1.3, 0.6
X = inputs(B, seed=7)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def distribution(name: str, f: Tensor):
    """The targets of one input, given its outputs (C,)."""
    if name == "poisson":
        return Independent(Counts(f.exp()), 1)
    return Independent(Normal(f.chunk(2)[0], (f.chunk(2)[1] / 2).exp()), 1)


def targets(name: str, n_outputs: int, n: int = 23, seed: int = 2) -> Tensor:
    torch.manual_seed(seed)
    f = 0.5 * torch.randn(n, n_outputs, dtype=F64)
    return torch.stack([distribution(name, f_i).sample() for f_i in f])


def build(name: str, n_outputs: int, **options) -> ELLALaplace:
    return Laplace(
        mlp(n_outputs), name, "all", "ella", **{"temperature": T, "prior_precision": DELTA, **options}
    )


def fit(name: str, n_outputs: int, y: Tensor | None = None, **options) -> ELLALaplace:
    """Fit over all weights, so that the estimator is exact linearised Laplace."""
    la = build(name, n_outputs, curvature_size=None, **options)
    data = loader(inputs(), targets(name, n_outputs) if y is None else y)
    la.fit(data, basis=identity_basis(la.backend.engine.function.weights()))
    return la


def jacobian(model, x: Tensor) -> Tensor:
    """J (B, C, P) in the order of ``parameters()``."""
    weights = {k: p.detach() for k, p in model.named_parameters()}
    blocks = jacrev(lambda w: functional_call(model, w, (x,)))(weights)
    return torch.cat([blocks[k].flatten(2) for k in weights], 2)


def information(name: str, f: Tensor) -> Tensor:
    """The Fisher information (C, C): the mean Hessian of the loss over the targets."""
    if name == "poisson":
        return hessian(lambda g: -distribution(name, g).log_prob(torch.full_like(f, 2.0)))(f)
    n, hessians = len(f) // 2, []
    # Hessians are quadratic in the target, and two points have the moments of a Gaussian that these need.
    for sign in (-1, 1):
        y = f[:n] + sign * (f[n:] / 2).exp()
        hessians.append(hessian(lambda g, y=y: -distribution(name, g).log_prob(y))(f))
    return torch.stack(hessians).mean(0)


class Dense:
    """Exact linearised Laplace with P x P matrices."""

    def __init__(self, name: str, n_outputs: int) -> None:
        self.model, self.name = mlp(n_outputs), name
        x, self.y = inputs(), targets(name, n_outputs)
        self.f, J = oracle.outputs(self.model, x), jacobian(self.model, x)
        self.H = sum(a.T @ information(name, b) @ a for a, b in zip(J, self.f))
        self.A = self.H / T + DELTA * torch.eye(len(self.H), dtype=F64)
        self.loss = -sum(distribution(name, a).log_prob(b) for a, b in zip(self.f, self.y))

    def log_evidence(self) -> Tensor:
        theta = oracle.weights(self.model)
        ratio = torch.logdet(self.A) - len(theta) * math.log(DELTA)
        return -self.loss / T - 0.5 * (ratio + DELTA * theta @ theta)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B C,) and covariance (B C, B C) of the outputs at all inputs."""
        J = jacobian(self.model, x).flatten(0, 1)
        return oracle.outputs(self.model, x).flatten(), J @ torch.linalg.inv(self.A) @ J.T


@cache
def dense(name: str, n_outputs: int) -> Dense:
    return Dense(name, n_outputs)


@pytest.mark.parametrize(("name", "n_outputs"), CASES)
def test_fit_and_evidence_are_those_of_dense_matrices(name, n_outputs):
    la, exact = fit(name, n_outputs), dense(name, n_outputs)
    assert_close(la.H, exact.H)
    assert_close(la.loss, exact.loss)
    assert_close(la.log_marginal_likelihood(), exact.log_evidence())
    prior = torch.tensor([0.7], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, (prior,))
    assert_close(la.backend.full(inputs(), exact.y)[1], exact.H)


@pytest.mark.parametrize(("name", "n_outputs"), CASES)
def test_moments_of_targets_are_those_of_draws(name, n_outputs):
    la, exact = fit(name, n_outputs), dense(name, n_outputs)
    mean, covariance = exact.moments(X[:2])
    for ours, theirs in zip(moments(la, X[:2], joint=True), (mean, covariance)):
        assert_close(ours, theirs)
    torch.manual_seed(5)
    f = MultivariateNormal(mean, covariance).sample((200_000,)).unflatten(1, (2, n_outputs))
    if name == "poisson":
        y = torch.poisson(f.exp())
    else:
        noise = (f[..., n_outputs // 2 :] / 2).exp()
        y = f[..., : n_outputs // 2] + noise * torch.randn_like(noise)
    y = y.flatten(1)
    joint_mean, joint_covariance = la(X[:2], joint=True)
    assert_close(joint_mean, y.mean(0), rtol=0, atol=5 * float(y.std(0).max()) / len(y) ** 0.5)
    expected = y.T.cov().reshape(joint_covariance.shape)
    assert_close(joint_covariance, expected, rtol=0.05)
    each_mean, each_covariance = la(X[:2])
    assert_close(each_mean.flatten(), joint_mean)
    n = each_mean.shape[1]
    for i, block in enumerate(each_covariance):
        assert_close(block, joint_covariance[i * n : (i + 1) * n, i * n : (i + 1) * n])
    _, variance = la(X[:2], diagonal_output=True)
    assert_close(variance.flatten(), joint_covariance.diagonal())


@pytest.mark.parametrize("n_outputs", WIDTHS["poisson"])
def test_poisson_moments_are_those_of_a_log_normal_rate(n_outputs):
    la = fit("poisson", n_outputs)
    mean, covariance = moments(la, X)
    rate = LogNormal(mean, covariance.diagonal(dim1=1, dim2=2).sqrt())
    found, variance = la(X, diagonal_output=True)
    assert_close(found, rate.mean)
    assert_close(variance, rate.mean + rate.variance)
    assert (found - mean.exp()).abs().max() > 0.1  # the variance matters


def test_the_probability_of_a_count_is_the_integral_over_rates():
    m, v, y = (torch.tensor(t, dtype=F64) for t in zip(*POINTS))
    nll = LIKELIHOODS["poisson"].nll((m[:, None], v[:, None]), y[:, None], 1.0)
    expected = [-math.log(quad(integrand(*p), -9, 9, points=[peak(*p)], limit=500)[0]) for p in POINTS]
    assert_close(nll, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-6)
    certain = LIKELIHOODS["poisson"].nll((m[:, None], 0 * v[:, None]), y[:, None], 1.0)
    assert_close(certain, torch.tensor(-poisson.logpmf(y.numpy(), m.exp().numpy()), dtype=F64))
    both = LIKELIHOODS["poisson"].nll((m[None], v[None]), y[None], 1.0)
    assert_close(both, nll.sum()[None])


POINTS = [(0.3, 0.2, 2.0), (2.0, 3.0, 0.0), (-3.0, 1.0, 4.0), (1.0, 4.0, 250.0), (6.0, 0.01, 400.0)]


def integrand(m, v, y):
    def density(z):
        f = m + math.sqrt(v) * z
        return math.exp(y * f - math.exp(f) - math.lgamma(y + 1) - z * z / 2) / math.sqrt(2 * math.pi)

    return density


def peak(m, v, y):
    return max((i / 100 for i in range(-800, 801)), key=integrand(m, v, y))


def test_the_density_of_a_target_is_the_integral_over_mean_and_variance():
    mean = torch.tensor([[0.4, -1.1]], dtype=F64)
    covariance = torch.tensor([[[0.5, 0.3], [0.3, 0.8]]], dtype=F64)
    ((a, b, c, d), determinant) = torch.linalg.inv(covariance[0]).flatten().tolist(), 0.5 * 0.8 - 0.3**2

    def density(s, m):
        p, q = m - 0.4, s + 1.1
        exponent = a * p * p + (b + c) * p * q + d * q * q + (1.7 - m) ** 2 * math.exp(-s) + s
        return math.exp(-exponent / 2) / math.sqrt((2 * math.pi) ** 3 * determinant)

    expected, _ = dblquad(density, -4, 4.8, -6, 4, epsabs=1e-7, epsrel=1e-7)
    nll = LIKELIHOODS["heteroscedastic"].nll
    y = torch.tensor([[1.7]], dtype=F64)
    assert_close(nll((mean, covariance), y, 1.0), torch.tensor([-math.log(expected)], dtype=F64), rtol=1e-5)
    variance = covariance.diagonal(dim1=1, dim2=2)
    assert_close(nll((mean, variance), y, 1.0), nll((mean, torch.diag_embed(variance)), y, 1.0))
    assert (nll((mean, variance), y, 1.0) - nll((mean, covariance), y, 1.0)).abs() > 0.01
    certain = torch.tensor([-norm.logpdf(1.7, 0.4, math.exp(-0.55))], dtype=F64)
    assert_close(nll((mean, 0 * variance), y, 1.0), certain)


@pytest.mark.parametrize("name", NAMES)
def test_the_score_has_the_gradient_of_finite_differences(name):
    f = torch.randn(B, 2, dtype=F64, requires_grad=True)
    root = torch.randn(B, 2, 3, dtype=F64, requires_grad=True)
    y = targets(name, 2, B)

    def nll(mean, root):
        covariance = root @ root.mT
        spread = covariance.diagonal(dim1=1, dim2=2) if name == "poisson" else covariance
        return LIKELIHOODS[name].nll((mean, spread), y, 1.0)

    assert torch.autograd.gradcheck(nll, (f, root), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_random_signs_have_the_curvature_as_their_mean_product(name):
    f = torch.randn(3, 4, dtype=F64)
    u = torch.rand(3, 40_000, 4, dtype=F64, generator=generator())
    g = LIKELIHOODS[name].sampled_gradients(f, u)
    expected = torch.stack([information(name, f_i) for f_i in f])
    assert_close(torch.einsum("bnc,bnd->bcd", g, g) / 40_000, expected, rtol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_samples_and_networks_with_sampled_weights(name):
    la = fit(name, 4)
    f = la.functional_samples(X, n_samples=5, generator=generator())
    assert f.shape == (5, B, 4)
    parameters = la.predictive_samples(X, n_samples=5, generator=generator())
    mean, noise = f.chunk(2, -1)
    expected = f.exp() if name == "poisson" else torch.cat([mean, noise.exp()], -1)
    assert_close(parameters, expected)
    options = {"pred_type": "nn", "n_samples": 11}
    draws = la.functional_samples(X, generator=generator(), **options)
    mean, noise = (draws.exp(), draws.exp()) if name == "poisson" else draws.chunk(2, -1)
    noise = noise if name == "poisson" else noise.exp()
    found = la(X, link_approx="mc", generator=generator(), **options)
    assert_close(found[0], mean.mean(0))
    assert_close(found[1], mean.var(0) + noise.mean(0))
