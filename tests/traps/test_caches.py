"""What is kept between calls: never of an earlier state, of another mode of autograd, or of a value that was refused."""

from __future__ import annotations

import copy

import pytest
import torch
from calls import predicted
from conftest import assert_close
from helpers import assert_same, build, fitted, inputs, mlp, train_loader

from laplace_ella.posterior.gaussian import NotPositiveDefiniteError
from laplace_ella.posterior.links import quasi_normal

X = inputs(7, seed=8)
N_PARAMS = sum(p.numel() for p in mlp().parameters())
PRIORS = {
    "scalar": torch.tensor([0.6], dtype=torch.float64),
    "layerwise": torch.tensor([0.6, 2.0, 0.3, 1.1], dtype=torch.float64),
    "diagonal": torch.linspace(0.2, 3.0, N_PARAMS, dtype=torch.float64),
}


def fresh(likelihood="classification", **values):
    """Return an estimator that has never predicted under other values."""
    la = fitted(likelihood)
    for name, value in values.items():
        setattr(la, name, value)
    return la


@pytest.mark.parametrize("residual", ["none", "isotropic"])
@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
def test_backward_passes_after_predictions_under_inference_mode(link, residual):
    def gradient(before):
        quasi_normal.cache_clear()
        la = fitted(enable_backprop=True, residual=residual)
        before(la)
        x = X.clone().requires_grad_()
        la(x, link_approx=link, n_samples=9)[:, 0].sum().backward()
        return x.grad

    def predict(la):
        with torch.inference_mode():
            la(X, link_approx=link, n_samples=9)

    assert torch.equal(gradient(predict), gradient(lambda la: None))


def test_a_life_under_inference_mode():
    """Built, fitted, changed, saved and loaded there; and differentiated outside."""
    model = mlp()

    def make():
        quasi_normal.cache_clear()
        la = build("regression", model, enable_backprop=True, prior_mean=torch.zeros(N_PARAMS))
        la.fit(train_loader("regression"))
        la.prior_precision = torch.tensor([0.6, 2.0, 0.3, 1.1], dtype=torch.float64)
        la.sigma_noise = torch.tensor(0.7, dtype=torch.float64)
        la.prior_mean = torch.full((N_PARAMS,), 0.1, dtype=torch.float64)
        other = build("regression", model, enable_backprop=True)
        other.load_state_dict({k: copy_of(v) for k, v in la.state_dict().items()})
        return la, other

    def copy_of(value):
        return value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)

    def gradients(la):
        x = X.clone().requires_grad_()
        mean, covariance = la(x)
        (mean.sum() + covariance.sum()).backward()
        prior, noise = (t.clone().requires_grad_() for t in (PRIORS["layerwise"], la.sigma_noise))
        la.log_marginal_likelihood(prior, noise).backward()
        return x.grad, prior.grad, noise.grad

    with torch.inference_mode():
        found = make()
        for la in found:
            la(X)
    for la, expected in zip(found, make()):
        assert_same(gradients(la), gradients(expected))


IN_PLACE = {
    "plainly": lambda t, value: t.copy_(value),
    "through data": lambda t, value: t.data.copy_(value),
    "detached": lambda t, value: t.detach().copy_(value),
    "numpy": lambda t, value: t.numpy().__setitem__(..., value.numpy()),
}


@pytest.mark.parametrize("how", IN_PLACE)
@pytest.mark.parametrize("structure", [*PRIORS, "noise"])
def test_what_was_changed_in_place_is_used(structure, how):
    if structure == "noise":
        likelihood, name, value = "regression", "sigma_noise", torch.tensor(0.4, dtype=torch.float64)
    else:
        likelihood, name, value = "classification", "prior_precision", PRIORS[structure]
    expected, la = predicted(fresh(likelihood, **{name: value}), X), fresh(likelihood, **{name: 3 * value})
    before = predicted(la, X)
    IN_PLACE[how](getattr(la, name), value)
    assert_same(predicted(la, X), expected)
    assert not all(map(torch.equal, before, expected))


def test_a_curvature_that_was_changed_is_used():
    la, other = fitted(), fitted()
    predicted(la, X)
    la.H.mul_(3)
    other.H = 3 * other.H
    assert_same(predicted(la, X), predicted(other, X))
    assert_close(torch.linalg.inv(la.posterior_covariance), la.posterior_precision)


@pytest.mark.parametrize(
    "options", [{}, {"prior_precision": "layerwise"}, {"residual": "isotropic"}], ids=str
)
def test_directions_that_were_exchanged_in_place_are_used(options):
    """In another order, with H in the same: the posterior over functions is what it was."""
    la = fitted(residual=options.get("residual", "none"))
    la.prior_precision = PRIORS[options.get("prior_precision", "scalar")]
    order = torch.tensor([3, 0, 1, 4, 2])
    before = la(X), la.novelty(X)
    for v in la.basis.directions.values():
        v.copy_(v[order].clone())
    la.H.copy_(la.H[order][:, order].clone())
    for a, b in zip((la(X), la.novelty(X)), before):
        assert_close(a, b)
    grams = torch.stack([v.flatten(1) @ v.flatten(1).T for v in la.basis.directions.values()])
    assert_close(la.basis.weight_grams, grams)


def test_the_root_that_is_handed_out_is_a_copy():
    la = fitted()
    before = la(X)
    la.posterior_scale.zero_()
    la.posterior_covariance.zero_()
    assert torch.equal(la(X), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_a_bad_value_set_in_place_is_refused_when_it_is_used(bad):
    la = fitted()
    la.prior_precision.fill_(bad)
    with pytest.raises(ValueError, match="prior_precision must be positive"):
        la(X)
    with pytest.raises(ValueError, match="prior_precision must be positive"):  # and not only once
        la(X)
    la.prior_precision.fill_(0.6)
    assert_same(la(X), fresh(prior_precision=0.6)(X))
    la.sigma_noise.fill_(2.0)
    with pytest.raises(ValueError, match="sigma_noise is for regression"):
        la(X)


def test_evidence_that_fails_leaves_prior_and_noise_alone():
    la = fitted("regression")
    la.H.copy_(-1e6 * torch.eye(len(la.H), dtype=torch.float64))  # a precision that no Gaussian has
    before = la.prior_precision, la.sigma_noise
    with pytest.raises(NotPositiveDefiniteError):
        la.log_marginal_likelihood(torch.tensor([2.0]), torch.tensor(0.5))
    assert (la.prior_precision, la.sigma_noise) == before
