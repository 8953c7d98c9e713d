"""The Bernoulli likelihood: binary and multi-label targets, one logit each. Test_positions.py has its sums."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from conftest import B, K, M, assert_close
from helpers import inputs, loader, mlp, moments
from models import Applied
from scipy.integrate import quad
from searching import by_loop, grid_search
from torch import Tensor
from torch.nn import functional as F

from laplace_ella import ELLALaplace

F64 = torch.float64
WIDTHS = (1, 3)  # binary, multi-label
X = inputs(B, seed=7)
BASE = {"n_eigenvalues": K, "temperature": 1.3, "prior_precision": 0.6}
WIDE = {"temperature": 30.0, "prior_precision": 0.05}  # large variances, so that links matter


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def labels(n_outputs: int, n: int = 23, seed: int = 2) -> Tensor:
    return torch.randint(2, (n, n_outputs), generator=generator(seed))


def fit(n_outputs: int, y: Tensor | None = None, model=None, n_landmarks: int = M, **options) -> ELLALaplace:
    la = ELLALaplace(mlp(n_outputs) if model is None else model, "bernoulli", **{**BASE, **options})
    landmarks = 2 * inputs(n_landmarks, seed=3), torch.arange(n_landmarks) % n_outputs
    la.fit(loader(inputs(), labels(n_outputs) if y is None else y), landmarks=landmarks)
    return la


@pytest.mark.parametrize("n_outputs", WIDTHS)
def test_full_span_equals_dense_laplace(n_outputs):
    model = mlp(n_outputs)
    n_weights = len(oracle.weights(model))
    la = fit(n_outputs, model=model, n_eigenvalues=n_weights, n_landmarks=101)
    assert la.basis.rank == n_weights
    J, f = oracle.jacobian(model, inputs()), oracle.outputs(model, inputs())
    p = 1 / (1 + (-f).exp())
    A = torch.einsum("bcp,bc,bcq->pq", J, p * (1 - p), J) / 1.3 + 0.6 * torch.eye(n_weights, dtype=F64)
    J = oracle.jacobian(model, X)
    mean, cov = moments(la, X)
    assert_close(mean, oracle.outputs(model, X), name="mean")
    assert_close(cov, oracle.covariance(J, A), 1e-6, name="covariance")
    assert_close(moments(la, X, joint=True)[1], oracle.joint_covariance(J, A), 1e-6, name="joint covariance")
    pairs = zip(f.flatten().tolist(), labels(n_outputs).flatten().tolist())
    expected = sum(math.log1p(math.exp(-v if t else v)) for v, t in pairs)
    assert_close(la.loss, torch.tensor(expected, dtype=F64))


def test_one_logit_is_classification_with_the_logits_zero_and_f():
    la, model = fit(1), Applied(lambda net, x: F.pad(net(x), (1, 0)), mlp(1))
    two = ELLALaplace(model, "classification", **BASE)
    two.fit(
        loader(inputs(), labels(1)[:, 0]), landmarks=(2 * inputs(M, seed=3), torch.ones(M, dtype=torch.long))
    )
    for name in ("H", "loss"):
        assert_close(getattr(la, name), getattr(two, name))
    assert_close(la.log_marginal_likelihood(), two.log_marginal_likelihood())
    (mean, cov), (two_mean, two_cov) = moments(la, X), moments(two, X)
    assert_close(mean, two_mean[:, 1:])
    assert_close(cov, two_cov[:, 1:, 1:])
    ours, theirs = (e.predictive_samples(X, n_samples=5, generator=generator()) for e in (la, two))
    assert_close(ours, theirs[..., 1:])


# ---------------------------------------------------------------------------- targets


@pytest.mark.parametrize("form", ["bool", "byte", "int", "long", "float", "double"])
def test_targets_of_any_type_give_the_same_fit_and_may_be_flat_for_one_output(form):
    for n_outputs in WIDTHS:
        y, expected = getattr(labels(n_outputs), form)(), fit(n_outputs)
        for given in (y, y[:, 0]) if n_outputs == 1 else (y,):
            la = fit(n_outputs, given)
            assert_close(la.loss, expected.loss)
            assert_close(la.H, expected.H)


BAD = {
    "flat": (3, labels(3)[:, 0]),
    "too wide": (1, labels(3)),
    "minus one": (3, 2 * labels(3) - 1),
    "NaN": (3, labels(3).double().where(labels(3) > 0, float("nan"))),
    "complex": (1, labels(1).to(torch.complex128)),
}


@pytest.mark.parametrize("name", BAD)
def test_targets_that_do_not_fit_are_refused_naming_the_batch(name):
    with pytest.raises(ValueError, match=r"batch \d"):
        fit(*BAD[name])


def test_what_is_of_other_likelihoods_is_refused():
    with pytest.raises(ValueError, match=r"[Nn]oise"):
        ELLALaplace(mlp(1), "bernoulli", sigma_noise=0.5)
    with pytest.raises(ValueError, match="likelihood"):
        ELLALaplace(mlp(3), "classification").load_state_dict(fit(3).state_dict())
    la = fit(3)
    for link in ("bridge", "bridge_norm"):
        with pytest.raises(ValueError, match="bridge"):
            la(X, link_approx=link)
        with pytest.raises(ValueError, match="bridge"):
            grid_search(la, loader(inputs(), labels(3)), link_approx=link)


# ---------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("n_outputs", WIDTHS)
def test_links_are_the_closed_form_and_the_integral(n_outputs):
    la = fit(n_outputs, **WIDE)
    mean, cov = moments(la, X)
    variance = cov.diagonal(dim1=1, dim2=2)
    assert_close(la(X), 1 / (1 + (-mean / (1 + math.pi / 8 * variance).sqrt()).exp()))
    assert la(X).shape == (B, n_outputs)
    assert (la(X) - la.features(X)[1].sigmoid()).abs().max() > 0.02
    expected = torch.empty_like(mean)
    for at in np.ndindex(*mean.shape):
        m, s = float(mean[at]), math.sqrt(variance[at])

        def integrand(z, m=m, s=s):
            return math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / (1 + math.exp(-m - s * z))

        expected[at] = quad(integrand, -9, 9)[0]
    assert_close(la(X, link_approx="mc", n_samples=2**13), expected, rtol=0, atol=2e-3)
    assert_close(la(X, link_approx="mc", n_samples=128), expected, rtol=0, atol=0.03)


def test_logit_scale_multiplies_the_mean_only(tmp_path):
    la = fit(3, **WIDE)
    mean, cov = moments(la, X)
    plain = la.functional_samples(X, n_samples=7, generator=generator())
    la.logit_scale = 1.7
    found, same = moments(la, X)
    assert_close(found, 1.7 * mean)
    assert_close(same, cov)
    samples = la.functional_samples(X, n_samples=7, generator=generator())
    assert_close(samples, plain + 0.7 * mean)
    assert_close(la.predictive_samples(X, n_samples=7, generator=generator()), samples.sigmoid())
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other = ELLALaplace(la.model, "bernoulli")
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    for link in ("probit", "mc"):
        assert torch.equal(other(X, link_approx=link), la(X, link_approx=link))
    assert other.logit_scale == 1.7


# ---------------------------------------------------------------------------- tuning


def nll(p: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy(p, y.double())


def brier(p: Tensor, y: Tensor) -> Tensor:
    assert p.shape == y.shape == (17, 3)
    return (p - y.double()).square().mean()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("link", ["probit", "mc"])
@pytest.mark.parametrize(("n_outputs", "loss"), [(1, None), (3, None), (3, brier)])
def test_grid_search_finds_what_a_loop_over_calls_finds(n_outputs, loss, link):
    la, x, y = fit(n_outputs, temperature=200.0), inputs(17, seed=5), labels(n_outputs, 17, seed=6)
    options = {"link_approx": link, "n_samples": 23}
    expected = by_loop(la, lambda: float((loss or nll)(la(x, **options), y)))
    assert grid_search(la, loader(x, y, 5), loss=loss, **options) == expected
