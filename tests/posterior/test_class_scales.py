"""Scales and biases of classes: the mean of the logits becomes w s f + b, and their covariance stays what it is."""

import copy

import oracle
import pytest
import torch
from conftest import C, assert_close, make_problem
from helpers import Snapshot, as_tuple, build, fitted, inputs, loader, moments, reference_features
from helpers import fit_problem as fit
from models import Sequence

import laplace_ella
from laplace_ella.posterior.links import quasi_normal

F64 = torch.float64
W, B, S = (0.5, 1.7, 1.1), (-0.8, 0.3, 1.2), 0.6
OWN = {"class_scales": W, "class_biases": B, "logit_scale": S}
X = inputs(7, seed=7)


def dense(la, x):
    """Mean w s f + b and covariance phi A^-1 phi^T, from one backward pass for each number."""
    phi, f = reference_features(la.model, la.basis, x)
    phi, f = phi.flatten(0, -3), f.flatten(0, -2)
    mean = torch.tensor(W, dtype=F64) * S * f + torch.tensor(B, dtype=F64)
    return mean, torch.einsum("bck,kl,bdl->bcd", phi, la.posterior_covariance, phi), phi


@pytest.fixture
def problem():
    return make_problem("mlp", "classification")


def test_every_link_takes_the_mean_that_is_scaled_and_shifted(problem):
    la, x = fit(problem, **OWN, temperature=30.0), problem.x_test
    mean, cov, phi = dense(la, x)
    assert_close(la(x, link_approx="probit"), oracle.probit(mean, cov))
    for link in ("bridge", "bridge_norm"):
        assert_close(
            la(x, link_approx=link), oracle.bridge(mean, cov, link == "bridge_norm"), 1e-6, name=link
        )
    points = quasi_normal(50, la.basis.rank, la.seed)
    logits = mean + torch.einsum("bck,kl,sl->sbc", phi, la.posterior_scale, points)
    assert_close(la(x, link_approx="mc", n_samples=50), logits.softmax(-1).mean(0))


@pytest.mark.parametrize("residual", ["none", "isotropic", "exact"])
def test_covariances_and_samples_are_those_without_around_another_mean(problem, residual):
    x = problem.x_test
    plain, la = (fit(problem, residual=residual, **own) for own in ({}, OWN))
    f = moments(plain, x)[0]
    mean = torch.tensor(W, dtype=F64) * S * f + torch.tensor(B, dtype=F64)
    for options in ({}, {"joint": True}, {"diagonal_output": True}):
        found, without = (moments(each, x, **options) for each in (la, plain))
        assert_close(found[0], mean.flatten() if options.get("joint") else mean)
        assert_close(found[1], without[1])
    for options in ({}, {"diagonal_output": True}):
        draws = [
            each.functional_samples(x, n_samples=3, generator=torch.Generator().manual_seed(1), **options)
            for each in (la, plain)
        ]
        assert_close(draws[0] - mean, draws[1] - f, 1e-8)
    generator = torch.Generator().manual_seed(1)
    samples = la.functional_samples(x, n_samples=3, generator=torch.Generator().manual_seed(1))
    assert_close(la.predictive_samples(x, n_samples=3, generator=generator), samples.softmax(-1))


def test_labels_of_bernoulli_have_scales_and_biases_of_their_own():
    y = torch.randint(2, (23, C), generator=torch.Generator().manual_seed(2))
    la = fitted("bernoulli", data=loader(inputs(), y), **OWN)
    mean, cov, _ = dense(la, X)
    assert_close(la(X, link_approx="probit"), oracle.probit(mean, cov, "bernoulli"))


def test_all_positions_share_them():
    model = Sequence().double()
    x = torch.randn(11, 7, 2, dtype=F64)
    la = fitted(model=model, data=loader(x, torch.randint(C, (11, 7))), **OWN)
    mean, cov, _ = dense(la, x)
    assert_close(la(x), oracle.probit(mean, cov))


def test_they_are_saved_copied_and_shown():
    la = fitted(**OWN)
    expected = la(X)
    new = build()
    new.load_state_dict(la.state_dict())
    for each in (new, copy.deepcopy(la)):
        assert (each.class_scales, each.class_biases) == (W, B)
        assert torch.equal(each(X), expected)
    again = laplace_ella.ELLALaplace(**la.get_params())
    assert (again.class_scales, again.class_biases) == (W, B)
    assert "class_scales: 3 values" in repr(la)
    la.class_scales = la.class_biases = None
    assert "class_scales" not in repr(la)
    assert_close(la(X), fitted(logit_scale=S)(X))


@pytest.mark.parametrize("value", [torch.tensor(W), list(W), torch.tensor(W).numpy()], ids=type)
def test_any_sequence_of_numbers_is_taken(value):
    la = fitted()
    la.class_scales = value
    assert la.class_scales == pytest.approx(W)


WRONG = {
    "negative": (1.0, -1.0, 1.0),
    "zero": (0.0, 1, 1),
    "text": "abc",
    "number": 3.0,
    "empty": (),
    "long": (1.0,) * 4,
}


@pytest.mark.parametrize("name", WRONG)
def test_other_values_are_refused_and_change_nothing(name):
    la = fitted(**OWN)
    before = Snapshot(la, X)
    with pytest.raises(ValueError, match="class_scales"):
        la.class_scales = WRONG[name]
    before.check()


def test_a_wrong_number_of_them_is_found_before_any_long_work_and_others_have_none():
    la = build(class_biases=(0.0, 1.0))
    with pytest.raises(ValueError, match="class_biases must hold one number for each of the model's 3"):
        la.fit(loader(inputs(), torch.randint(C, (23,))))
    with pytest.raises(ValueError, match="classification"):
        build("regression", class_scales=W)
    la.class_biases = None
    la.fit(loader(inputs(), torch.randint(C, (23,))))


def test_gradients_reach_the_inputs_through_them():
    la = fitted(**OWN, enable_backprop=True)
    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: la(x), x[:2])
    assert all(t.requires_grad for t in as_tuple(la(x)))
