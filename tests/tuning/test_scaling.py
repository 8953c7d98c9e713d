"""Scales and biases of classes tuned with everything else: optima of a loss that calls give, with a ridge."""

import numpy as np
import pytest
import torch
from conftest import C
from helpers import fitted, nll_of_calls
from searching import N_VAL, fit, over_confident, state, validation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SEARCH = ["temperature", "logit_scale", "class_scales", "class_biases"]
FAST = {"link_approx": "probit"}


def unequal(val):
    """Labels of the first class twice as often, so that biases matter."""
    generator = torch.Generator().manual_seed(5)
    return [(x, torch.where(torch.rand(len(y), generator=generator) < 0.4, 0, y)) for x, y in val]


def objective(la, val, ridge):
    v, b = np.log(la.class_scales), np.asarray(la.class_biases)
    return nll_of_calls(la, val) + ridge / N_VAL * (((v - v.mean()) ** 2).sum() + (b**2).sum())


@pytest.fixture(scope="module")
def problem():
    p = over_confident("classification")
    return p, unequal(validation(p))


def test_the_optimum_is_one_of_the_mean_nll_with_the_ridge_in_every_direction(problem):
    p, val = problem
    la = fit(p)
    before = la.optimize_hyperparameters(val, SEARCH[:2], apply=False, **FAST)
    result = la.optimize_hyperparameters(val, SEARCH, **FAST)
    assert result.searched == tuple(SEARCH)
    assert result.score == pytest.approx(nll_of_calls(la, val), abs=1e-9)
    assert result.score < before.score - 0.01
    assert np.prod(la.class_scales) == pytest.approx(1)
    assert max(np.abs(la.class_biases)) > 0.1
    ridge = ridge_of(la, val, result)
    lowest = objective(la, val, ridge)
    scales, biases = la.class_scales, la.class_biases
    for c in range(C):
        for step in (-0.05, 0.05):
            la.class_scales = np.array(scales) * np.exp(step * np.eye(C)[c])
            assert objective(la, val, ridge) > lowest
            la.class_scales, la.class_biases = scales, np.array(biases) + step * np.eye(C)[c]
            assert objective(la, val, ridge) > lowest
            la.class_biases = biases
    scale = la.logit_scale
    for factor in (0.8, 1.25):  # the temperature is at its lower end
        la.logit_scale = scale * factor
        assert objective(la, val, ridge) > lowest


def ridge_of(la, val, result):
    """The weight of the ridge, which the derivative of the NLL in a bias gives."""
    step, b = 1e-4, np.array(la.class_biases)
    slopes = []
    for sign in (-1, 1):
        la.class_biases = b + sign * step * np.eye(C)[0]
        slopes.append(nll_of_calls(la, val))
    la.class_biases = b
    weight = -(slopes[1] - slopes[0]) / (2 * step) * N_VAL / (2 * b[0])
    found = min((1000.0, 100.0, 10.0, 1.0, 0.1), key=lambda v: abs(np.log(v / weight)))
    assert weight == pytest.approx(found, rel=0.1)
    return found


def test_one_of_the_two_alone_leaves_the_other(problem):
    p, val = problem
    la = fit(p, class_scales=(0.5, 2.0, 1.0))
    la.optimize_hyperparameters(val, ["temperature", "class_biases"], **FAST)
    assert la.class_scales == (0.5, 2.0, 1.0)
    assert la.class_biases is not None


def test_values_and_likelihoods_without_logits_are_refused(problem):
    p, val = problem
    la = fit(p)
    before = state(la)
    with pytest.raises(ValueError, match="by gradients"):
        la.optimize_hyperparameters(val, {"class_scales": [1.0]})
    assert state(la) == before
    with pytest.raises(ValueError, match="no logits"):
        fitted("regression").optimize_hyperparameters(val, ["class_biases"])


def test_the_ridge_grows_where_there_is_nothing_to_scale_and_held_out_scores_are_no_worse():
    p = over_confident("classification")
    la = fit(p)
    result = la.optimize_hyperparameters(validation(p), ["logit_scale", "class_biases"], apply=False, **FAST)
    assert result.baselines["vector scaling"].parameters["ridge"] >= 10
    scores = result.held_out
    assert scores["vector scaling"].score <= scores["temperature scaling"].score + 0.01
