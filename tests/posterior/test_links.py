"""Links at the ends of what a Gaussian over logits can be: no variance, little, unequal, huge; logits of any size."""

import oracle
import pytest
import torch
from conftest import assert_close
from helpers import build, fitted, inputs, loader, mlp, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from laplace_ella.posterior.gaussian import Outputs, finite, whiten
from laplace_ella.posterior.links import laplace_bridge, monte_carlo, probit, quasi_normal

F64 = torch.float64
BRIDGES = ("bridge", "bridge_norm")
LINKS = ("probit", "mc", *BRIDGES)
quick = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def softmax(f):
    return f.softmax(-1)


def through(link, outputs, inverse_link=softmax, diagonal_output=False):
    """Probabilities of a Gaussian over outputs, by a link."""
    if link == "probit":
        return probit(outputs, inverse_link)
    if link == "mc":
        n = outputs.mean.shape[-1] if diagonal_output else outputs.noise_dimension
        return monte_carlo(outputs, inverse_link, quasi_normal(32, n, 0), diagonal_output)
    return laplace_bridge(outputs, link == "bridge_norm")


def links_of(outputs, inverse_link=softmax):
    """Every link, with and without correlations."""
    names = LINKS if inverse_link is softmax else ("probit", "mc")
    found = {name: through(name, outputs, inverse_link) for name in names}
    return found | {"mc, diagonal": through("mc", outputs, inverse_link, diagonal_output=True)}


def assert_probabilities(p, name="probabilities", sums=True):
    eps = torch.finfo(p.dtype).eps
    assert ((p >= 0) & (p <= 1 + 8 * eps)).all(), f"{name}: {p}"  # and no NaN
    if sums:
        error = (p.double().sum(-1) - 1).abs().max()
        assert error <= 8 * p.shape[-1] * eps, f"{name}: rows sum to 1 up to {error:.2e}"


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZES = [0.0, 1e-300, 1e-150, 1e-30, 1e-8, 1e-3, 1.0, 1e4, 1e15, 1e19, 1e30, 1e38, 1e150, 1e300]
sizes = st.sampled_from(SIZES)
logit_sizes = st.sampled_from([0.0, 1e-30, 1.0, 60.0, 1e4, 1e18, 1e30, 3e38, 1e300])


@st.composite
def gaussians(draw):
    """Gaussians over the outputs of a few inputs, from features and a root of a covariance; and a residual."""
    dtype = draw(st.sampled_from(DTYPES))
    n, c, k = 3, draw(st.integers(2, 7)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def numbers(*shape, size=1.0, kind=dtype):
        most = torch.finfo(kind).max
        found = torch.randn(*shape, generator=generator, dtype=F64) * size
        return found.clamp(-most, most).to(kind)

    per_output = torch.tensor(draw(st.lists(sizes, min_size=c, max_size=c)), dtype=F64)
    psi = whiten(numbers(n, c, k, size=per_output[:, None]), numbers(k, k, size=draw(sizes), kind=F64))
    mean = numbers(n, c, size=draw(logit_sizes)).to(psi.dtype)
    mean = finite(mean * draw(st.sampled_from([1, 1e-10, 1e10])))
    residual, size = draw(st.sampled_from(["none", "isotropic", "exact"])), draw(sizes)
    isotropic = numbers(n, c * 2, size=size, kind=psi.dtype) if residual == "isotropic" else None
    block = numbers(n, c, c, size=size, kind=psi.dtype) if residual == "exact" else None
    return Outputs(mean, psi, isotropic, block)


@quick
@given(gaussians())
def test_every_link_gives_probabilities_whatever_the_gaussian(outputs):
    for name, p in links_of(outputs).items():
        assert_probabilities(p, name=name)
    for name, p in links_of(outputs, torch.sigmoid).items():
        assert_probabilities(p, name=f"bernoulli, {name}", sums=False)


@quick
@given(gaussians())
def test_links_depend_smoothly_on_inputs_whatever_the_gaussian(outputs):
    # Monte Carlo without correlations takes roots of variances, whose derivative at 0 is infinite.
    for psi in (outputs.psi, torch.zeros_like(outputs.psi)):
        leaves = [t.detach().double().clamp(-1e100, 1e100).requires_grad_() for t in (outputs.mean, psi)]
        for name, p in links_of(Outputs(*leaves)).items():
            for gradient in torch.autograd.grad(p[:, 0].sum(), leaves):
                assert gradient.isfinite().all(), name


logits = st.lists(st.floats(-6, 6), min_size=2, max_size=7)


@quick
@given(logits, st.integers(1, 4), st.sampled_from([0.0, 1e-12, 1e-6, 1e-4]), st.integers(0, 99))
def test_links_are_the_softmax_where_there_is_no_variance(f, k, deviation, seed):
    f = torch.tensor([f], dtype=F64)
    psi = torch.randn(1, f.shape[1], k, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for name, p in links_of(Outputs(f, deviation * psi)).items():
        # The mean of 32 samples is not quite that of the distribution.
        assert_close(p, f.softmax(-1), 1e-6, atol=1e-6 + 0.1 * deviation, name=name)


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
    la = fitted(model=nn.Linear(5, 3, dtype=F64), subsample_size=1, n_eigenvalues=1)
    x = inputs(7, seed=3)
    limit = la.model(x).detach().softmax(-1)
    monte_carlo = la(x, link_approx="mc", n_samples=512)
    assert (monte_carlo - limit).abs().max() < 0.2  # the variance is of moderate size ...
    for link in BRIDGES:
        assert (la(x, link_approx=link) - monte_carlo).abs().max() < 0.07
    la.prior_precision = 1e12  # ... and of none
    for link in LINKS:
        assert_close(la(x, link_approx=link), limit, 1e-6, name=link)


@quick
@given(logits, st.floats(0.02, 30), st.integers(0, 999))
def test_the_bridge_is_the_papers_where_variances_are_alike(f, deviation, seed):
    f = torch.tensor([f], dtype=F64)
    c = f.shape[1]
    noise = torch.randn(1, c, c, generator=torch.Generator().manual_seed(seed), dtype=F64)
    psi = deviation * (1.5 * torch.eye(c, dtype=F64) + 0.2 * noise)
    for link in BRIDGES:
        expected = oracle.bridge(f, psi @ psi.mT, link == "bridge_norm")
        assert_close(through(link, Outputs(f, psi)), expected, 1e-10)


FIRST, EYE = torch.tensor([1.0, 0, 0], dtype=F64), torch.eye(3, dtype=F64)
# Paths (T, C, K) from variances the bridge is for to ones it is not for, for t from 0 to 1 (T, 1, 1).
PATHS = {
    "size": lambda t: EYE * t,
    "one output": lambda t: EYE * (1 - FIRST[:, None] * (1 - t)),
    "rank": lambda t: EYE * (FIRST + (1 - FIRST) * t) + 0.3 * FIRST,
    "sum": lambda t: EYE - (1 - t) / 3 + FIRST[:, None] * t,
}


@pytest.mark.parametrize("link", BRIDGES)
@pytest.mark.parametrize("path", PATHS)
def test_links_have_no_jumps(link, path):
    t = torch.logspace(-9, 0, 20_000, dtype=F64)
    f = torch.tensor([1.5, -0.5, 0.2], dtype=F64).expand(len(t), 3)
    p = through(link, Outputs(f, PATHS[path](t[:, None, None])))
    assert (p[1:] - p[:-1]).abs().max() < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_deviations_whose_squares_overflow_are_as_good_as_infinite(dtype):
    f = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype)
    psi = torch.tensor([[[1.0, 0.5], [0.2, 1.0], [0.3, -0.4]]], dtype=dtype)
    found = links_of(Outputs(f, psi * torch.finfo(dtype).max ** 0.5 * 1e5))
    for name, expected in links_of(Outputs(f, psi * 1e8)).items():
        if name != "mc, diagonal":  # where an infinite deviation is no larger than another
            assert_close(found[name], expected, 1e-5, name=name)


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
    if dtype == F64:
        assert_probabilities(la(x, "nn", link_approx="mc", n_samples=7, generator=generator), name="nn")


def test_monte_carlo_in_too_many_dimensions_names_the_limit():
    with pytest.raises(ValueError, match="at most 21201 dimensions"):
        quasi_normal(3, 30000, 0)
