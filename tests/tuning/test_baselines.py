"""The simpler methods beside a search: each is a direct minimisation on the same data."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import C
from helpers import fitted, val_loader
from models import Applied
from scipy.optimize import minimize, minimize_scalar
from searching import N_VAL, brier, fit, outputs_and_targets, over_confident, validation, whole
from torch.distributions import MultivariateNormal, Normal
from torch.nn import functional as F

from laplace_ella.posterior.links import quasi_normal
from laplace_ella.posterior.setting import Setting
from laplace_ella.tuning.methods import Method, tuned
from laplace_ella.tuning.search import LOGIT_SCALES, decades

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CLASSIFICATION = ("MAP", "temperature scaling", "vector scaling", "constant variance", "last-layer variance")
REGRESSION = ("MAP", "constant variance", "last-layer variance")


def scores(likelihood, methods, **options):
    """Scores of an over-confident network; its outputs, targets, and the last layer's squared norms."""
    p = over_confident(likelihood)
    val = validation(p)
    result = fit(p).optimize_hyperparameters(val, apply=False, **options)
    assert tuple(result.baselines) == methods
    with torch.no_grad():
        z = p.model[:-1](whole(val)[0])
    found = {k: b.score for k, b in result.baselines.items()}
    return found, *outputs_and_targets(p, val), z.square().sum(-1, keepdim=True) + 1, result.baselines


def test_baselines_of_a_classifier_are_direct_minimisations():
    found, f, y, _, tuned = scores("classification", CLASSIFICATION)
    assert found["MAP"] == pytest.approx(F.cross_entropy(f, y).item(), abs=1e-9)
    scaled = lambda t: F.cross_entropy(f / math.exp(t), y).item()  # noqa: E731
    best = minimize_scalar(scaled, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9})
    assert found["temperature scaling"] == pytest.approx(best.fun, abs=1e-6)

    ridge = tuned["vector scaling"].parameters["ridge"]

    def vector(w):  # w f + b
        return F.cross_entropy(f * torch.as_tensor(w[:C]).exp() + torch.as_tensor(w[C:]), y).item()

    def regularised(w):
        v = w[:C] - w[:C].mean()
        return vector(w) + ridge / N_VAL * ((v**2).sum() + (w[C:] ** 2).sum())

    best = minimize(regularised, np.r_[np.full(C, -1.0), np.zeros(C)], method="L-BFGS-B")
    assert found["vector scaling"] <= found["temperature scaling"] + 1e-9
    assert found["vector scaling"] == pytest.approx(vector(best.x), abs=1e-4)
    noise = quasi_normal(128, C, 0)

    def constant(log_v):  # E softmax(f + v eps), eps ~ N(0, I_C), by the quasi-random points of the link
        p = (f + math.exp(log_v / 2) * noise[:, None]).softmax(-1).mean(0)
        return F.nll_loss(p.log(), y).item()

    # Other points, or the probit link, move the optimum by less than this.
    lowest = min(constant(v) for v in np.linspace(-8, 10, 181))
    assert found["constant variance"] == pytest.approx(lowest, abs=0.01)
    assert found["constant variance"] < found["MAP"]


def test_variances_through_the_probit_link_are_direct_minimisations():
    found, f, y, shape, _ = scores("classification", CLASSIFICATION, link_approx="probit")
    assert found["constant variance"] == pytest.approx(found["temperature scaling"], abs=1e-5)

    def last_layer(log_v):  # variance v (|z|^2 + 1) of every logit, z the input of the last layer
        return F.cross_entropy(f / (1 + math.pi / 8 * math.exp(log_v) * shape).sqrt(), y).item()

    assert found["last-layer variance"] <= min(last_layer(v) for v in np.linspace(-12, 10, 881)) + 1e-5


class TwoOptima:
    """Scores with an optimum that does not depend on T, and a lower one halfway between two values of the grid of T."""

    loss, n_inputs, predictor = None, 10, None

    @property
    def scorer(self):
        return self

    def __call__(self, setting):
        return self.gradient(None, setting, ("temperature", "logit_scale"))[0]

    def gradient(self, predictor, setting, names, without=None):
        t, s = math.log10(setting.temperature) + 1.5, math.log10(setting.logit_scale)
        alone, with_variance = s - math.log10(0.53), s - math.log10(0.75)
        lower = 0.552 + 0.02 * t**2 + with_variance**2
        if 0.554 + alone**2 <= lower:
            return 0.554 + alone**2, [{"temperature": 0.0, "logit_scale": 2 * alone}[k] for k in names]
        return lower, [{"temperature": 0.04 * t, "logit_scale": 2 * with_variance}[k] for k in names]


def test_logits_scaled_alone_do_not_hide_a_variance_that_is_better():
    start = Setting(1.0, 1.0, 1.0, 1.0, None, None, 1.0)
    grids = {"temperature": decades(-6, 6), "logit_scale": LOGIT_SCALES}
    found = tuned(Method("last-layer variance", TwoOptima(), (start,), grids, variance="last_layer"))
    assert found.score == pytest.approx(0.552, abs=1e-6)
    assert found.best.temperature == pytest.approx(10**-1.5, rel=1e-2)


def test_baselines_of_a_regression_are_direct_minimisations():
    found, f, y, shape, _ = scores("regression", REGRESSION)

    def nll(variance):
        return -Normal(f, variance.sqrt().expand_as(f)).log_prob(y).sum().item() / len(f)

    # One variance, noise and constant together: its optimum is the mean squared error.
    assert found["constant variance"] == pytest.approx(nll((f - y).square().mean()), abs=1e-4)
    variances = np.r_[0, np.geomspace(1e-6, 2, 80)]
    free = min(nll(s**2 + v * shape) for s in np.linspace(0.02, 2.5, 60) for v in variances)
    fixed = min(nll(0.7**2 + v * shape) for v in variances)
    assert free - 5e-3 <= found["last-layer variance"] <= fixed + 1e-3
    assert found["MAP"] >= found["constant variance"] - 1e-9


def test_differences_and_standard_errors_are_paired():
    p = over_confident("classification")
    la, val = fit(p), validation(p)
    result = la.optimize_hyperparameters(val, link_approx="probit")
    f, y = outputs_and_targets(p, val)
    ours = torch.cat([F.nll_loss(la(x).log(), t, reduction="none") for x, t in val])
    difference = F.cross_entropy(f, y, reduction="none") - ours
    for baseline in result.baselines.values():
        assert baseline.difference == pytest.approx(baseline.score - result.score, abs=1e-9)
    entry = result.baselines["MAP"]
    assert entry.difference == pytest.approx(difference.mean().item(), abs=1e-6)
    assert entry.standard_error == pytest.approx(difference.std().item() / N_VAL**0.5, rel=0.01)


def test_another_loss_is_what_every_method_minimises():
    p = over_confident("classification")
    la, val = fit(p), validation(p)
    result = la.optimize_hyperparameters(val, link_approx="probit", loss=brier)
    (x, y), (f, _) = whole(val), outputs_and_targets(p, val)
    assert result.score == pytest.approx(brier(la(x), y).item(), abs=1e-6)
    assert result.baselines["MAP"].score == pytest.approx(brier(f.softmax(-1), y).item(), abs=1e-6)
    assert all(b.standard_error is None for b in result.baselines.values())
    assert "MAP" in result.summary()


def test_a_users_loss_gets_the_same_kind_of_prediction_from_every_method():
    shapes = set()

    def loss(mean, covariance, y):
        shapes.add(covariance.shape)
        noisy = covariance + 0.1 * torch.eye(C, dtype=covariance.dtype)
        return -MultivariateNormal(mean, noisy).log_prob(y).mean()

    la = fitted("regression", temperature=None)
    la.optimize_hyperparameters(val_loader("regression"), ["temperature"], loss=loss)
    assert shapes == {(17, C, C)}


def test_last_layer_variance_is_not_available_where_no_module_returns_the_outputs():
    p = over_confident("classification")
    p = dataclasses.replace(p, model=Applied(lambda net, x: 2 * net(x), p.model))
    result = fit(p).optimize_hyperparameters(validation(p))
    assert result.baselines["last-layer variance"] is None
    assert "last-layer variance" in result.summary()
    assert "not available" in result.summary()
