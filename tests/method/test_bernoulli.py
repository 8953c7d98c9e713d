"""The Bernoulli likelihood: binary and multi-label targets, one logit each. Test_positions.py has its sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import B, K, M, assert_close
from helpers import edited, inputs, loader, mlp, moments
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


def fit(n_outputs: int, y: Tensor | None = None, **options) -> ELLALaplace:
    la = ELLALaplace(mlp(n_outputs), "bernoulli", **{**BASE, **options})
    landmarks = 2 * inputs(M, seed=3), torch.arange(M) % n_outputs
    la.fit(loader(inputs(), labels(n_outputs) if y is None else y), landmarks=landmarks)
    return la


def test_one_logit_is_classification_with_the_logits_zero_and_f():
    la, model = fit(1), Applied(lambda net, x: F.pad(net(x), (1, 0)), mlp(1))
    two = ELLALaplace(model, "classification", **BASE)
    landmarks = 2 * inputs(M, seed=3), torch.ones(M, dtype=torch.long)
    two.fit(loader(inputs(), labels(1)[:, 0]), landmarks=landmarks)
    for name in ("H", "loss"):
        assert_close(getattr(la, name), getattr(two, name))
    assert_close(la.log_marginal_likelihood(), two.log_marginal_likelihood())
    (mean, cov), (two_mean, two_cov) = moments(la, X), moments(two, X)
    assert_close(mean, two_mean[:, 1:])
    assert_close(cov, two_cov[:, 1:, 1:])
    ours, theirs = (e.predictive_samples(X, n_samples=5, generator=generator()) for e in (la, two))
    assert_close(ours, theirs[..., 1:])


@pytest.mark.parametrize("form", ["bool", "byte", "int", "long", "float", "double"])
def test_targets_of_any_type_give_the_same_fit_and_may_be_flat_for_one_output(form):
    for n_outputs in WIDTHS:
        y, expected = getattr(labels(n_outputs), form)(), fit(n_outputs)
        for given in (y, y[:, 0]) if n_outputs == 1 else (y,):
            la = fit(n_outputs, given)
            assert_close(la.loss, expected.loss)
            assert_close(la.H, expected.H)


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
        with pytest.raises(ValueError, match="bridge"):
            fit(3).load_state_dict(edited(la.state_dict(), link=link))


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


def brier(p: Tensor, y: Tensor) -> Tensor:
    assert p.shape == y.shape == (17, 3)
    return (p - y.double()).square().mean()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("link", ["probit", "mc"])
def test_a_loss_of_the_users_is_what_a_loop_over_calls_finds(link):
    la, x, y = fit(3, temperature=200.0), inputs(17, seed=5), labels(3, 17, seed=6)
    options = {"link_approx": link, "n_samples": 23}
    expected = by_loop(la, lambda: float(brier(la(x, **options), y)))
    assert grid_search(la, loader(x, y, 5), loss=brier, **options) == expected
