"""Choosing a method by cross-validation, and predicting with it."""

import copy
import dataclasses
import re
import warnings

import matplotlib as mpl
import numpy as np
import pytest
import torch
from helpers import Snapshot, edited, fitted, inputs, nll_of_calls, val_loader
from matplotlib import pyplot
from models import Counting
from searching import brier, fit, over_confident, state, validation, whole
from torch.nn import functional as F

from laplace_ella.tuning import choosing
from laplace_ella.tuning.scorer import HeldOut, Scorer

mpl.use("Agg")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
X = inputs(7, seed=7)
OF_CLASSES = [
    "MAP",
    "temperature scaling",
    "vector scaling",
    "constant variance",
    "last-layer variance",
    "ELLA (T)",
    "ELLA (T, s)",
    "ELLA (T, class scales and biases)",
]
OF_REGRESSION = ["MAP", "constant variance", "last-layer variance", "ELLA (T)", "ELLA (T, sigma)"]
FAST = {"link_approx": "probit"}


@pytest.fixture(scope="module")
def chosen():
    """An over-confident network, its validation data, an estimator that has chosen, and the result."""
    p = over_confident("classification")
    la, val = fit(p), validation(p)
    return p, val, la, la.optimize_hyperparameters(val, "auto", **FAST)


def test_every_method_is_compared_the_choice_is_named_and_predicts_as_scored(chosen):
    _, val, la, result = chosen
    assert list(result.held_out) == list(result.baselines) == OF_CLASSES
    assert result.chosen == "temperature scaling"
    assert nll_of_calls(la, val) == pytest.approx(result.score, abs=1e-9)
    text = result.summary()
    assert all(name in text for name in OF_CLASSES)
    assert f"Chosen: {result.chosen}. {result.reason}" in text
    figure = result.plot()
    rows = [label.get_text() for label in figure.axes[-2].get_yticklabels()]
    assert rows == OF_CLASSES
    pyplot.close(figure)


def test_scores_held_out_are_those_of_folds_tuned_by_hand(chosen):
    p, val, _, result = chosen
    x, y = whole(val)
    with torch.no_grad():
        f = p.model(x)
    folds, values = torch.arange(len(y)) % 5, torch.zeros(len(y), dtype=torch.float64)
    grid = torch.logspace(-1.5, 0.5, 4001, dtype=torch.float64)
    for fold in range(5):
        others = folds != fold
        nll = [F.cross_entropy(s * f[others], y[others]).item() for s in grid]
        s = grid[int(np.argmin(nll))]
        values[folds == fold] = F.cross_entropy(s * f[folds == fold], y[folds == fold], reduction="none")
    found = result.held_out["temperature scaling"]
    assert found.score == pytest.approx(values.mean().item(), abs=1e-4)
    assert result.reference == "temperature scaling"
    difference = F.cross_entropy(f, y, reduction="none") - values
    error = difference.std().item() / len(y) ** 0.5
    assert result.held_out["MAP"].difference == pytest.approx(difference.mean().item(), abs=1e-4)
    assert result.held_out["MAP"].standard_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_any_method_can_be_asked_for_and_survives_saving_and_copying(chosen, name):
    p, val, _, before = chosen
    la = fit(p)
    result = la.optimize_hyperparameters(val, "auto", method=name, **FAST)
    assert (result.chosen, result.reason) == (name, "It was asked for.")
    assert result.score == pytest.approx(before.baselines[name].score, abs=1e-6)
    assert before.baselines[name].setting == result.best
    assert nll_of_calls(la, val) == pytest.approx(result.score, abs=1e-9)
    assert ("features" in repr(la)) == (not name.startswith("ELLA"))
    expected, new = la(X[:, :2]), fit(p)
    new.load_state_dict(la.state_dict())
    for each in (new, copy.deepcopy(la)):
        assert torch.equal(each(X[:, :2]), expected)
    rebuilt = type(la)(**la.get_params())
    assert (rebuilt.variance, rebuilt.class_scales) == (la.variance, la.class_scales)


def test_a_prediction_without_features_is_one_forward_pass_and_differentiable():
    model = Counting()
    la = fitted(model=model, variance="none", enable_backprop=True)
    la(X)
    model.calls = 0
    x = X.clone().requires_grad_()
    assert torch.equal(la(x), model(x).softmax(-1))
    assert model.calls == 2  # one of them is the comparison's
    assert torch.autograd.grad(la(x).square().sum(), x)[0].abs().sum() > 0
    for kind in ("none", "constant", "last_layer"):
        la.variance = kind
        mean, cov = la._glm_predictive_distribution(X, joint=True)
        assert (mean.shape, cov.shape) == ((21,), (21, 21))
        assert (cov.diagonal() > 0).all() == (kind != "none")
        samples = la.functional_samples(X, n_samples=5000, generator=torch.Generator().manual_seed(0))
        _, spread = la._glm_predictive_distribution(X, diagonal_output=True)
        torch.testing.assert_close(samples.var(0), spread, rtol=0.15, atol=1e-12)


def test_variances_are_constant_or_grow_with_what_the_last_layer_takes():
    la = fitted(temperature=0.3)
    with torch.no_grad():
        z = la.model[:-1](X)
    for kind, expected in (("constant", torch.ones(7)), ("last_layer", 1 + z.square().sum(-1))):
        la.variance = kind
        _, spread = la._glm_predictive_distribution(X, diagonal_output=True)
        torch.testing.assert_close(spread, (0.3 * expected.double())[:, None].expand(7, 3))


def test_methods_of_a_regression_and_of_a_residual():
    p = over_confident("regression")
    la = fit(p, residual="isotropic")
    result = la.optimize_hyperparameters(validation(p), "auto", method="ELLA (T, sigma)")
    assert list(result.held_out) == OF_REGRESSION
    assert set(result.searched) == {"temperature", "residual_scale", "sigma_noise"}
    assert {"NLL", "RMSE", "coverage 90%"} <= result.held_out["MAP"].metrics.keys()


def test_other_losses_are_compared_fold_by_fold(chosen):
    p, val, _, _ = chosen
    la = fit(p)
    result = la.optimize_hyperparameters(val, "auto", loss=brier, apply=False, **FAST)
    (x, y), expected = whole(val), []
    for fold in range(5):
        which = torch.arange(len(y)) % 5 == fold
        expected.append(brier(p.model(x[which]).softmax(-1), y[which]).item() * int(which.sum()))
    assert result.held_out["MAP"].score == pytest.approx(sum(expected) / len(y), abs=1e-6)
    assert result.held_out["MAP"].standard_error > 0
    assert result.chosen != "MAP"


def test_one_pass_over_the_model_serves_all_folds_and_methods(chosen):
    p, val, _, _ = chosen
    la, calls = fit(dataclasses.replace(p, model=Counting(p.model))), []
    for search in (["temperature"], "auto"):
        la.model.calls = 0
        la.optimize_hyperparameters(iter(val), search, apply=False, **FAST)  # an iterator: read once
        calls.append(la.model.calls)
    assert calls[0] == calls[1] > 0


def test_the_bar_says_how_long_methods_take_and_they_predict_as_often_as_that_assumes(
    chosen, monkeypatch, capsys
):
    p, val, _, _ = chosen
    counted, tuned, expected = [], choosing.tuned, []

    def count(name, each):
        method = getattr(Scorer, name)
        monkeypatch.setattr(Scorer, name, lambda *args: counted.append(each) or method(*args))

    def counting(method):
        before, found = sum(counted), tuned(method)
        expected.append(method.n_predictions if method.variance != "none" else sum(counted) - before)
        return found

    count("nll_by_fold", 1)
    count("mean_and_gradient", 3)
    monkeypatch.setattr(choosing, "tuned", counting)
    fit(p).optimize_hyperparameters(val, "auto", progress_bar=True, **FAST)
    assert re.search(r"Methods, about [\d.]+ (ms|s|min)", capsys.readouterr().err)
    assert 0.5 < sum(counted) / sum(expected) < 2


def test_too_few_data_and_unknown_methods_are_refused_and_change_nothing():
    la = fitted(temperature=None)
    before = Snapshot(la, X)
    with pytest.raises(ValueError, match="50 validation inputs"):
        la.optimize_hyperparameters(val_loader(), "auto")
    with pytest.raises(ValueError, match="method must be one of"):
        la.optimize_hyperparameters(val_loader(), "auto", method="nonsense")
    with pytest.raises(ValueError, match="goes with search='auto'"):
        la.optimize_hyperparameters(val_loader(), ["temperature"], method="MAP")
    before.check()
    result = la.optimize_hyperparameters(val_loader(), "auto", method="ELLA (T)")
    assert not result.held_out
    assert "in sample" in result.summary()


def test_methods_whose_variance_is_a_temperature_that_is_fixed_are_not_available(chosen):
    p, val, _, _ = chosen
    la = fit(p, temperature=2.0)
    result = la.optimize_hyperparameters(val, "auto", **FAST)
    assert result.baselines["constant variance"] is None
    assert la.temperature == 2.0
    with pytest.raises(ValueError, match="not available"):
        la.optimize_hyperparameters(val, "auto", method="last-layer variance", **FAST)


class Fixed:
    """A method whose losses on data held out are given."""

    def __init__(self, losses, score):
        losses = torch.tensor(losses, dtype=torch.float64)
        self.held_out, self.score = HeldOut(losses, torch.ones_like(losses), {}), score


CASES = {
    "worse than a simpler one": (
        {"a": [3, 3, 3], "b": [1.1, 1.1, 1.11], "c": [0.2, 2, 1.2], "d": [1, 1, 1]},
        "d",
    ),
    "the simplest within an error": ({"a": [3, 3, 3], "b": [1, 1.2, 1], "c": [1.1, 1.0, 1]}, "b"),
    "the best, if it is clearly better": ({"a": [3, 3, 3], "b": [2, 2.1, 2], "c": [1, 1.1, 1]}, "c"),
    "not the first": ({"a": [1, 1, 1], "b": [1.1, 1.1, 1.1], "c": [1.2, 1.3, 1.4]}, "b"),
    "not one that is the first again": ({"a": [1, 1, 1], "b": [1.1, 1.1, 1.1], "c": [1, 1, 1]}, "b"),
    "nor one that nearly is": ({"a": [1, 1, 1], "b": [1.1, 1.1, 1.1], "c": [1 - 1e-6] * 3}, "b"),
    "not one that is better by nothing": ({"a": [3, 3, 3], "b": [1, 1, 1], "c": [1 - 1e-6] * 3}, "b"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_one_standard_error_rule(name):
    losses, expected = CASES[name]
    done = {k: Fixed(v, 1.0 - 0.1 * i) for i, (k, v) in enumerate(losses.items())}
    assert choosing._choice(done, None)[0] == expected


EDGES = {
    "temperature scaling": "logit_scale, 10, lies on an edge of its grid .*the loss still falls above it",
    "constant variance": "The best temperature is the smallest: a constant variance does not help",
    "ELLA (T)": "The best temperature is the smallest: the variance in the span of the basis does not help",
}


@pytest.mark.parametrize("name", EDGES)
def test_what_lies_on_an_edge_of_its_grid_is_said_of_the_chosen_method_too(name):
    p = over_confident("classification")
    with torch.no_grad():
        p.model[-1].weight.mul_(1e-3)
        p.model[-1].bias.zero_()
        x, _ = whole(validation(p))
        y = p.model(x).argmax(-1)  # of which no scale of the logits is sure enough
    la = fit(p)
    with pytest.warns(UserWarning, match=EDGES[name]):
        result = la.optimize_hyperparameters([(x, y)], "auto", method=name, **FAST)
    assert re.search(EDGES[name], result.summary())


OTHERS = [("constant", "ella"), ("ella", "constant"), ("last_layer", "constant"), ("constant", "none")]
ALIKE = [("ella", "none"), ("none", "ella"), ("constant", "constant"), ("last_layer", "last_layer")]


@pytest.mark.parametrize(("before", "after"), OTHERS + ALIKE)
@pytest.mark.parametrize("fixed", [False, True])
def test_a_temperature_that_was_tuned_for_one_variance_serves_no_other(before, after, fixed):
    la = fitted()
    found = {"temperature": 3.0, "temperature_fixed": fixed, "variance": before}
    la.load_state_dict(edited(la.state_dict(), **found))
    is_lost = (before, after) in OTHERS and not fixed
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.variance = after
    assert ["temperature 3 was found with variance=" in str(w.message) for w in caught] == [True] * is_lost
    assert (la.variance, la.temperature, la.temperature_fixed) == (after, 1.0 if is_lost else 3.0, fixed)
    assert torch.equal(la(X), fitted(temperature=la.temperature, variance=after)(X))


def test_tuning_ella_afterwards_predicts_with_ella_again(chosen):
    p, val, _, _ = chosen
    la = fit(p)
    la.optimize_hyperparameters(val, "auto", method="MAP", **FAST)
    assert la.variance == "none"
    la.optimize_hyperparameters(val, {"temperature": [30.0]}, **FAST)
    assert la.variance == "ella"
    assert state(la)["variance"] == "ella"


@pytest.mark.parametrize("name", ["constant variance", "last-layer variance"])
def test_a_temperature_that_is_the_size_of_another_variance_divides_no_curvature(chosen, name):
    p, val, _, _ = chosen
    la = fit(p)
    evidence, scale = la.log_marginal_likelihood(), la.posterior_scale
    la.optimize_hyperparameters(val, "auto", method=name, **FAST)
    assert la.temperature != 1
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence)
    torch.testing.assert_close(la.posterior_scale, scale)
    with pytest.warns(UserWarning, match="have no prior"):
        la.optimize_prior_precision(n_steps=1)
    la.optimize_hyperparameters(val, ["logit_scale"], **FAST)
    assert (la.variance, la.temperature) == ("ella", 1)


def test_a_loss_of_many_numbers_is_refused(chosen):
    p, val, _, _ = chosen
    with pytest.raises(ValueError, match="one number for all predictions"):
        fit(p).optimize_hyperparameters(val, ["temperature"], loss=lambda p, y: p[:, 0])


def test_early_stopping_afterwards_predicts_with_ella_again(chosen):
    p, val, _, _ = chosen
    la, fresh = fit(p), fit(p)
    la.optimize_hyperparameters(val, "auto", method="last-layer variance", **FAST)
    la.logit_scale = 1.0
    for each in (la, fresh):
        each.fit(validation(p), val_loader=val)
    assert la.variance == "ella"
    torch.testing.assert_close(la(X[:, :2]), fresh(X[:, :2]))
