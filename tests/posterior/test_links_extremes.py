"""Links at the ends of what a Gaussian over logits can be: no variance, little, unequal, huge; logits of any size."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from helpers import build, fitted, inputs, loader, mlp, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import laplace_ella
from laplace_ella.posterior.gaussian import Linearised, Outputs
from laplace_ella.posterior.predictive import predict

F64 = torch.float64
BRIDGES = ("bridge", "bridge_norm")
LINKS = ("probit", "mc", *BRIDGES)
quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def links_of(outputs, likelihood="classification"):
    """Every link, with and without correlations."""
    names = LINKS if likelihood == "classification" else ("probit", "mc")
    found = {name: predict(outputs, likelihood, link_approx=name, n_samples=32) for name in names}
    found["mc, diagonal"] = predict(outputs, likelihood, link_approx="mc", n_samples=32, diagonal_output=True)
    return found


def assert_probabilities(p, eps=None, name="probabilities", sums=True):
    eps = torch.finfo(p.dtype).eps if eps is None else eps
    assert p.isfinite().all(), f"{name}: {p}"
    assert (p >= 0).all(), f"{name}: {p}"
    assert (p <= 1 + 8 * eps).all(), f"{name}: {p}"
    if sums:
        error = (p.double().sum(-1) - 1).abs().max()
        assert error <= 8 * p.shape[-1] * eps, f"{name}: rows sum to 1 up to {error:.2e}"


# ---------------------------------------------------------------------- any size of anything

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
sizes = st.sampled_from(
    [0.0, 1e-300, 1e-150, 1e-30, 1e-8, 1e-3, 1.0, 1e4, 1e15, 1e19, 1e30, 1e38, 1e150, 1e300]
)
logit_sizes = st.sampled_from([0.0, 1e-30, 1.0, 60.0, 1e4, 1e18, 1e30, 3e38, 1e300])


@st.composite
def linearised(draw):
    """A model linearised at a few inputs, a root of a posterior covariance, and what multiplies them."""
    dtype = draw(st.sampled_from(DTYPES))
    n, c, k = 3, draw(st.integers(2, 7)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def numbers(*shape, size=1.0, kind=dtype):
        most = torch.finfo(kind).max
        found = torch.randn(*shape, generator=generator, dtype=F64) * size
        return found.clamp(-most, most).to(kind)

    residual, overlap = draw(st.sampled_from(["none", "isotropic", "exact"])), None
    # What a residual is made of, J g and J J^T, is finite, or refused.
    most = {"none": 1e300, "isotropic": 1e30, "exact": 1e100}[residual]
    per_output = torch.tensor(draw(st.lists(sizes, min_size=c, max_size=c)), dtype=F64).clamp_max(most)
    phi = numbers(n, c, k, size=per_output[:, None])
    f = numbers(n, c, size=draw(logit_sizes))
    scale = numbers(k, k, size=draw(sizes), kind=F64)
    pushed = gram = None
    if residual == "isotropic":
        pushed, overlap = numbers(n, c, 2, size=min(draw(sizes), most)), numbers(k, 2, kind=F64)
    if residual == "exact":
        root = numbers(n, c, c + k, size=min(draw(sizes), most), kind=F64)
        gram = root @ root.mT
    seen = Linearised(f, phi, pushed, gram)
    variance = draw(sizes.filter(lambda size: 0 < size < 1e100))
    return seen.outputs(scale, draw(st.sampled_from([1.0, 1e-10, 1e10])), variance, overlap)


@quick
@given(linearised())
def test_every_link_gives_probabilities_whatever_the_gaussian(outputs):
    for name, p in links_of(outputs).items():
        assert_probabilities(p, name=name)
    for name, p in links_of(outputs, "bernoulli").items():
        assert_probabilities(p, name=f"bernoulli, {name}", sums=False)


@quick
@given(linearised())
def test_links_depend_smoothly_on_inputs_whatever_the_gaussian(outputs):
    leaves = [t.detach().double().clamp(-1e100, 1e100).requires_grad_() for t in (outputs.mean, outputs.psi)]
    for name, p in links_of(Outputs(*leaves)).items():
        for gradient in torch.autograd.grad(p[:, 0].sum(), leaves):
            assert gradient.isfinite().all(), name


# ---------------------------------------------------------------------- the limit of no variance

logits = st.lists(st.floats(-6, 6), min_size=2, max_size=7)


@quick
@given(logits, st.integers(1, 4), st.sampled_from([0.0, 1e-12, 1e-6, 1e-4]), st.integers(0, 99))
def test_links_are_the_softmax_where_there_is_no_variance(f, k, deviation, seed):
    f = torch.tensor([f], dtype=F64)
    psi = torch.randn(1, f.shape[1], k, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for name, p in links_of(Outputs(f, deviation * psi)).items():
        assert_close(p, f.softmax(-1), 1e-6, atol=1e-6, name=name)


@quick
@given(logits, st.floats(1e-5, 3), st.data())
def test_links_of_one_uncertain_output(f, deviation, data):
    """As the only landmark of a linear layer leaves it: one output has all the variance."""
    f = torch.tensor([f], dtype=F64)
    c = f.shape[1]
    psi = torch.zeros(1, c, 1, dtype=F64)
    psi[0, data.draw(st.integers(0, c - 1))] = deviation
    found = links_of(Outputs(f, psi))
    for link in BRIDGES:
        assert torch.equal(found[link], found["probit"]), link


def test_one_landmark_of_a_linear_layer():
    torch.manual_seed(0)
    model = nn.Linear(5, 3, dtype=F64)
    data = loader(inputs(), targets("classification"))
    la = laplace_ella.Laplace(
        model, "classification", "all", "ella", subsample_size=1, n_eigenvalues=1, temperature=1.0
    )
    la.fit(data)
    x = inputs(7, seed=3)
    with torch.no_grad():
        limit = model(x).softmax(-1)
    monte_carlo = la(x, link_approx="mc", n_samples=512)
    assert (monte_carlo - limit).abs().max() < 0.2  # the variance is of moderate size ...
    for link in BRIDGES:
        assert (la(x, link_approx=link) - monte_carlo).abs().max() < 0.07
    la.prior_precision = 1e12  # ... and of none
    for link in LINKS:
        assert_close(la(x, link_approx=link), limit, 1e-6, name=link)


# ---------------------------------------------------------------------- where the bridge applies, and where not


def hosts_bridge(f, cov, normalize):
    """Hobbhahn et al., eq. 7-8, as laplace-torch has it, from a covariance (C, C)."""
    c = len(f)
    row_sums, total = cov.sum(-1), cov.sum()
    f, cov = f - row_sums * f.sum() / total, cov - torch.outer(row_sums, row_sums) / total
    var = cov.diagonal()
    if normalize:
        ratio = var.mean() / (c / 2) ** 0.5
        f, var = f / ratio.sqrt(), var / ratio
    alpha = (1 - 2 / c + f.exp() * (-f).exp().sum() / c**2) / var
    return alpha / alpha.sum()


@quick
@given(logits, st.floats(0.02, 30), st.integers(0, 999))
def test_the_bridge_is_the_papers_where_variances_are_alike(f, deviation, seed):
    f = torch.tensor([f], dtype=F64)
    c = f.shape[1]
    noise = torch.randn(1, c, c, generator=torch.Generator().manual_seed(seed), dtype=F64)
    psi = deviation * (1.5 * torch.eye(c, dtype=F64) + 0.2 * noise)
    for link in BRIDGES:
        expected = hosts_bridge(f[0], psi[0] @ psi[0].T, link == "bridge_norm")
        assert_close(predict(Outputs(f, psi), "classification", link_approx=link)[0], expected, 1e-10)


@pytest.mark.parametrize("link", BRIDGES)
@pytest.mark.parametrize("what", ["size", "one output", "rank", "sum"])
def test_links_have_no_jumps(link, what):
    """Along a path from variances the bridge is for to ones it is not for."""
    t = torch.logspace(-9, 0, 20_000, dtype=F64)
    f = torch.tensor([1.5, -0.5, 0.2], dtype=F64).expand(len(t), 3)
    psi = torch.eye(3, dtype=F64).expand(len(t), 3, 3).clone()
    if what == "size":
        psi *= t[:, None, None]
    elif what == "one output":
        psi[:, 2] *= t[:, None]
    elif what == "rank":
        psi[:, :, 1:] *= t[:, None, None]
        psi[:, :, 0] += 0.3
    else:
        psi = psi - psi.mean(1, keepdim=True) * (1 - t[:, None, None])
        psi[:, 0] += t[:, None]
    p = predict(Outputs(f, psi), "classification", link_approx=link)
    assert (p[1:] - p[:-1]).abs().max() < 5e-3


def test_each_input_is_judged_by_itself():
    f = torch.tensor([[1.5, -0.5, 0.2]], dtype=F64).expand(3, 3)
    psi = torch.eye(3, dtype=F64).expand(3, 3, 3).clone()
    psi[1] = 0
    psi[2, 2] = 0
    together = predict(Outputs(f, psi), "classification", link_approx="bridge")
    for i in range(3):
        alone = predict(Outputs(f[i : i + 1], psi[i : i + 1]), "classification", link_approx="bridge")
        assert torch.equal(alone[0], together[i])


# ---------------------------------------------------------------------- large numbers are right numbers


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_deviations_whose_squares_overflow_are_as_good_as_infinite(dtype):
    f = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
    psi = torch.tensor([[[1.0, 0.5], [0.2, 1.0], [0.3, -0.4]]], dtype=dtype)
    found = links_of(Outputs(f, psi * torch.finfo(dtype).max ** 0.5 * 1e5))
    for name, expected in links_of(Outputs(f, psi * 1e8)).items():
        if name != "mc, diagonal":  # where an infinite deviation is no larger than another
            assert_close(found[name], expected, 1e-5, name=name)


# ---------------------------------------------------------------------- the estimator


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prior", [1e-12, 1e12])
def test_probabilities_of_models_of_every_dtype(dtype, prior):
    model = mlp(dtype=dtype)
    la = build(model=model, prior_precision=prior, logit_scale=50.0)
    la.fit(loader(inputs(dtype=dtype), targets("classification")))
    x = 30 * inputs(5, seed=3, dtype=dtype)
    for link in LINKS:
        assert_probabilities(la(x, link_approx=link), name=link)
    assert_probabilities(la(x, link_approx="mc", diagonal_output=True), name="diagonal")
    generator = torch.Generator().manual_seed(0)
    assert_probabilities(la.predictive_samples(x, n_samples=7, generator=generator), name="samples")


def test_gradients_where_a_variance_is_zero():
    """Monte Carlo without correlations takes roots of variances, whose derivative at 0 is infinite."""
    f = torch.zeros(1, 3, dtype=F64, requires_grad=True)
    psi = torch.zeros(1, 3, 2, dtype=F64, requires_grad=True)
    for name, p in links_of(Outputs(f, psi)).items():
        for gradient in torch.autograd.grad(p[0, 0], (f, psi)):
            assert gradient.isfinite().all(), name


def test_samples_that_half_precision_cannot_hold():
    model = mlp(dtype=torch.float16)
    la = build(model=model, prior_precision=1e-12, residual="isotropic")
    la.fit(loader(inputs(dtype=torch.float16), targets("classification")))
    x = inputs(5, seed=3, dtype=torch.float16)
    generator = torch.Generator().manual_seed(0)
    assert la.functional_samples(x, n_samples=7, generator=generator).isinf().any()
    for diagonal in (False, True):
        p = la.predictive_samples(x, n_samples=7, diagonal_output=diagonal, generator=generator)
        assert p.dtype == torch.float16
        assert_probabilities(p)


@pytest.mark.parametrize("prior", [1e-6, 1e6])
def test_network_predictive_gives_probabilities(prior):
    la = fitted(prior_precision=prior)
    generator = torch.Generator().manual_seed(0)
    p = la(inputs(5, seed=3), pred_type="nn", link_approx="mc", n_samples=7, generator=generator)
    assert_probabilities(p)
