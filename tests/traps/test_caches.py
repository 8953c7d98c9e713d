"""What is kept between calls: never of an earlier state, of another mode of autograd, or of a value that was refused."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import assert_close
from helpers import Snapshot, as_tuple, assert_same, build, fitted, inputs, mlp, train_loader, val_loader

from laplace_ella.posterior.gaussian import NotPositiveDefiniteError
from laplace_ella.posterior.links import quasi_normal

X = inputs(7, seed=8)
N_PARAMS = sum(p.numel() for p in mlp().parameters())
PRIORS = {
    "scalar": torch.tensor([0.6], dtype=torch.float64),
    "layerwise": torch.tensor([0.6, 2.0, 0.3, 1.1], dtype=torch.float64),
    "diagonal": torch.linspace(0.2, 3.0, N_PARAMS, dtype=torch.float64),
}


def generator():
    return torch.Generator().manual_seed(3)


def predictions(la):
    """All kinds of predictions that the posterior enters."""
    found = [
        la(X),
        la.functional_variance(la.backend.jacobians(X)[0]),
        la.posterior_covariance,
        la.functional_samples(X, n_samples=3, generator=generator()),
        la.sample(3, generator=generator()),
        la(X, pred_type="nn", link_approx="mc", n_samples=3, generator=generator()),
    ]
    if la.likelihood == "classification":
        found.append(la(X, link_approx="mc", n_samples=8))
    return tuple(t for p in found for t in as_tuple(p))


def fresh(likelihood="classification", **values):
    """An estimator that has never predicted under other values."""
    la = fitted(likelihood)
    for name, value in values.items():
        setattr(la, name, value)
    return la


# ---------------------------------------------------------------------- first used under inference_mode


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


@pytest.mark.parametrize("structure", PRIORS)
def test_evidence_has_gradients_after_predictions_under_inference_mode(structure):
    def gradient(before):
        la = fresh(prior_precision=PRIORS[structure])
        before(la)
        prior = PRIORS[structure].clone().requires_grad_()
        la.log_marginal_likelihood(prior).backward()
        return prior.grad

    def use(la):
        with torch.inference_mode():
            la.log_marginal_likelihood()
            predictions(la)

    assert torch.equal(gradient(use), gradient(lambda la: None))


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


# ---------------------------------------------------------------------- changed in place

IN_PLACE = {
    "fill_": lambda t, value: t.copy_(value),
    "through data": lambda t, value: t.data.copy_(value),
    "one by one": lambda t, value: [t.__setitem__(i, v) for i, v in enumerate(value)],
    "detached": lambda t, value: t.detach().copy_(value),
    "numpy": lambda t, value: t.numpy().__setitem__(..., value.numpy()),
}


@pytest.mark.parametrize("how", IN_PLACE)
@pytest.mark.parametrize("structure", PRIORS)
def test_a_prior_precision_changed_in_place_is_used(structure, how):
    expected = predictions(fresh(prior_precision=PRIORS[structure]))
    la = fresh(prior_precision=3 * PRIORS[structure])
    before = predictions(la)
    IN_PLACE[how](la.prior_precision, PRIORS[structure])
    assert_same(predictions(la), expected)
    assert not torch.equal(before[0], expected[0])


@pytest.mark.parametrize("how", ["fill_", "through data", "detached", "numpy"])
def test_a_noise_changed_in_place_is_used(how):
    value = torch.tensor(0.4, dtype=torch.float64)
    expected = predictions(fresh("regression", sigma_noise=value))
    la = fresh("regression", sigma_noise=0.9)
    predictions(la)
    IN_PLACE[how](la.sigma_noise, value)
    assert_same(predictions(la), expected)


@pytest.mark.parametrize("change", ["in place", "assigned"])
def test_a_curvature_that_was_changed_is_used(change):
    la, other = fitted(), fitted()
    predictions(la)
    if change == "in place":
        la.H.mul_(3)
    else:
        la.H = 3 * la.H
    other.H = 3 * other.H
    assert_same(predictions(la), predictions(other))
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


def test_a_leaf_that_is_optimised_reaches_predictions():
    """As laplace-torch's users tune by hand: each value that the evidence got is the current one."""
    la = fitted("regression")
    logs = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([logs], lr=1e-3)
    for _ in range(3):
        optimiser.zero_grad()
        (-la.log_marginal_likelihood(logs[:1].exp(), logs[1].exp())).backward()
        optimiser.step()
        la(X)
    la.log_marginal_likelihood(logs[:1].exp(), logs[1].exp())
    prior, noise = logs.detach().exp()
    expected = fresh("regression", prior_precision=prior, sigma_noise=noise)
    assert_same(la(X), expected(X))


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


def test_novelty_notices_another_prior_of_several_values():
    la = fresh(prior_precision=PRIORS["layerwise"])
    la.calibrate_novelty(val_loader())
    la.novelty(X)
    la.prior_precision = 2 * PRIORS["layerwise"]
    with pytest.raises(ValueError, match="has changed since calibrate_novelty"):
        la.novelty(X)


# ---------------------------------------------------------------------- refused, and gone

NAN, INF = float("nan"), float("inf")
BAD = {
    "prior_mean": [
        NAN,
        INF,
        torch.full((N_PARAMS,), NAN),
        torch.zeros(3),
        torch.zeros(2, 2),
        "one",
        None,
        [0.0],
    ],
    "prior_precision": [NAN, INF, 0.0, -1.0, torch.tensor([1.0, NAN, 1.0, 1.0]), torch.ones(3), "one", None],
    "sigma_noise": [NAN, INF, 0.0, -1.0, torch.ones(2), torch.ones(1, 1), "one", None],
    "temperature": [NAN, INF, 0.0, -1.0, "one", torch.ones(2)],
    "logit_scale": [NAN, INF, 0.0, 2.0, "one", None],
    "residual": ["some", None, 1],
    "residual_scale": [NAN, INF, 0.0, -1.0, "one", None],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in BAD.items() for v in values])
def test_a_refused_value_does_not_stay(name, value):
    la = fitted("regression", prior_precision=0.4, sigma_noise=0.8, prior_mean=0.1)
    before, snapshot = getattr(la, name), Snapshot(la, X)
    evidence = la.log_marginal_likelihood()
    with pytest.raises(ValueError, match=r"."):
        setattr(la, name, value)
    assert getattr(la, name) is before
    snapshot.check()
    assert torch.equal(la.log_marginal_likelihood(), evidence)


@pytest.mark.parametrize(
    ("likelihood", "prior", "noise"),
    [
        ("classification", torch.tensor([2.0]), torch.tensor(1.0)),  # noise, even of 1, is for regression
        ("classification", torch.tensor([2.0]), torch.tensor(0.5)),
        ("regression", torch.tensor([2.0]), torch.tensor(NAN)),
        ("regression", torch.ones(3), torch.tensor(0.5)),
        ("regression", torch.tensor([2.0]), torch.ones(3)),
    ],
)
def test_evidence_that_is_refused_leaves_prior_and_noise_alone(likelihood, prior, noise):
    la = fitted(likelihood)
    snapshot = Snapshot(la, X)
    with pytest.raises(ValueError, match=r"."):
        la.log_marginal_likelihood(prior, noise)
    snapshot.check()


def test_evidence_that_fails_leaves_prior_and_noise_alone():
    la = fitted("regression")
    la.H.copy_(-1e6 * torch.eye(len(la.H), dtype=torch.float64))  # a precision that no Gaussian has
    before = la.prior_precision, la.sigma_noise
    with pytest.raises(NotPositiveDefiniteError):
        la.log_marginal_likelihood(torch.tensor([2.0]), torch.tensor(0.5))
    assert (la.prior_precision, la.sigma_noise) == before
