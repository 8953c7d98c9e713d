"""The share of an input's gradient outside the span, and the score of novelty that is made of it."""

import oracle
import pytest
import torch
from conftest import B, C, assert_close, make_problem
from helpers import directions, fitted, inputs, val_loader
from helpers import fit_problem as fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

KINDS = ("none", "isotropic", "exact")
X = inputs(7, seed=7)


def dense_share(la, problem):
    J = oracle.jacobian(problem.model, problem.x_test)
    return 1 - (J @ directions(la)).square().sum((1, 2)) / J.square().sum((1, 2))


@pytest.mark.parametrize(("kind", "samples"), [("none", 400), ("isotropic", 400), ("exact", 4)])
def test_the_share_is_that_of_the_dense_gradients_whatever_the_posterior(small_problem, kind, samples):
    la = fit(small_problem, residual=kind, residual_samples=samples)
    share, expected = la.residual_share(small_problem.x_test), dense_share(la, small_problem)
    if kind == "exact":
        assert_close(share, expected, 1e-8)
    else:
        assert_close(share, expected, rtol=0, atol=0.05)
    la.prior_precision, la.temperature, la.residual_scale = 9.0, 80.0, 0.1
    assert_close(la.residual_share(small_problem.x_test), share)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_share_lies_between_zero_and_one_and_is_the_novelty_before_calibration(
    small_problem, kind, scale
):
    la, x = fit(small_problem, residual=kind), scale * small_problem.x_test
    share = la.residual_share(x)
    assert share.shape == (B,)
    assert ((share >= 0) & (share <= 1)).all()
    assert_close(la.novelty(x), share)


def test_calibration_needs_no_labels_and_changes_no_prediction():
    p = make_problem("mlp", "classification")
    la = fit(p, residual="exact")
    before, scores = la(p.x_test), []
    for data in (p.loader(), [x for x, _ in p.loader()], p.with_data(p.x, (p.y + 1) % C).loader()):
        la.calibrate_novelty(data)
        scores.append(la.novelty(p.x_test))
        assert_close(scores[-1], scores[0])
    assert torch.equal(la(p.x_test), before)
    assert (scores[0] - la.residual_share(p.x_test)).abs().max() > 1e-3


def test_calibrating_novelty_of_a_regression_is_refused():
    la = fitted("regression")
    assert la.novelty(X).shape == (7,)
    with pytest.raises(ValueError, match=r"classification|regression"):
        la.calibrate_novelty(val_loader("regression"))


CHANGES = {
    "temperature": lambda la: setattr(la, "temperature", 3.0),
    "logit scale": lambda la: setattr(la, "logit_scale", 0.5),
    "prior": lambda la: setattr(la, "prior_precision", 7.0),
    "residual": lambda la: setattr(la, "residual", "isotropic"),
    "seed": lambda la: setattr(la, "seed", 5),
    "rank": lambda la: la.optimize_hyperparameters(val_loader(), {"n_eigenvalues": [2]}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_calibration_made_under_another_setting_is_refused(change):
    la = fitted(temperature=None)
    la.calibrate_novelty(val_loader())
    la.novelty(X)
    CHANGES[change](la)
    with pytest.raises(ValueError, match=r"calibrate_novelty\(\)"):
        la.novelty(X)
    la.calibrate_novelty(val_loader())
    assert la.novelty(X).isfinite().all()
