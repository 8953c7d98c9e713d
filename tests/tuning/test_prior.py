"""Tuning of the prior precision by validation data and by the evidence, and of the temperature with it."""

import math
import warnings

import pytest
import torch
import torchmetrics
from conftest import C, assert_close
from helpers import N, as_tuple, build, fitted, inputs, loader, mlp, nll_of_calls, train_loader, val_loader
from laplace.utils import validate
from searching import brier, by_loop, fit, grid_search, over_confident, state, validation, whole
from torch import nn

F64 = torch.float64
X = inputs(7, seed=7)
LIKELIHOODS = ["classification", "regression"]
LINKS = ("probit", "mc", "bridge", "bridge_norm")
SIZES = {"scalar": 1, "layerwise": 4, "diag": sum(p.numel() for p in mlp().parameters())}

quiet = pytest.mark.filterwarnings("ignore::UserWarning")


def calibration_error():
    return torchmetrics.CalibrationError("multiclass", num_classes=C, n_bins=7)


def of_whole(loss):
    """Score the predictions of all data at once."""
    return lambda la, val, **options: loss()(la(whole(val)[0], **options), whole(val)[1]).item()


# Name: what makes the loss, and the same from calls.
LOSSES = {
    "default": (lambda: None, nll_of_calls),
    "callable": (lambda: brier, of_whole(lambda: brier)),
    "metric": (calibration_error, of_whole(calibration_error)),
}


@quiet
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("name", LOSSES)
def test_grid_search_finds_what_a_loop_over_calls_finds_whatever_the_memory(name, link):
    p, (make, score) = over_confident("classification"), LOSSES[name]
    val, options = validation(p), {"link_approx": link, "n_samples": 16}
    found = []
    for budget in (2000, 10**9):
        la = fit(p, temperature=300.0, memory_budget=budget)
        found.append(grid_search(la, val, loss=make(), pred_type="gp", **options))
    assert found == [by_loop(la, lambda: score(la, val, **options))] * 2
    assert la.temperature == 300.0


NOISE_SCALE_RESIDUAL = [
    ("regression", {"sigma_noise": 0.5}),
    ("regression", {"sigma_noise": 1.3, "memory_budget": 2000}),
    ("classification", {"logit_scale": 0.5, "temperature": 300.0}),
    ("classification", {"residual": "isotropic", "residual_scale": 0.1}),
    *((likelihood, {"residual": "exact", "residual_scale": 0.1}) for likelihood in LIKELIHOODS),
]


@quiet
@pytest.mark.parametrize(("likelihood", "options"), NOISE_SCALE_RESIDUAL, ids=str)
def test_grid_search_uses_noise_scale_and_residual(likelihood, options):
    p = over_confident(likelihood)
    la, val = fit(p, **{"temperature": 30.0, **options}), validation(p)
    expected = by_loop(la, lambda: nll_of_calls(la, val))
    assert grid_search(la, val) == expected
    numbers = {k: v for k, v in options.items() if k != "residual"}
    assert {k: float(getattr(la, k)) for k in numbers} == pytest.approx(numbers)


@quiet
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("as_float", [False, True])
def test_a_callable_gets_what_the_hosts_validation_gives_it(likelihood, as_float):
    la, calls = fitted(likelihood, temperature=30.0, prior_precision=0.7), []

    def record(*parts):
        calls.append(parts)
        value = sum(p.double().square().sum() for p in parts[:-1]).log() ** 2
        return value.item() if as_float else value

    validate(la, val_loader(likelihood), lambda *p: torch.as_tensor(record(*p)))
    value = math.log10(0.7)
    options = {"log_prior_prec_min": value, "log_prior_prec_max": value + 1, "grid_size": 2}
    grid_search(la, val_loader(likelihood), loss=record, **options)
    expected, *ours = calls  # from large to small precision
    assert [len(parts) for parts in ours] == [2 if likelihood == "classification" else 3] * 2
    for a, b in zip(ours[-1], expected, strict=True):
        torch.testing.assert_close(a, b)


class VarianceMetric(torchmetrics.Metric):
    """Takes mean, covariance and targets; best where the mean variance is one."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()))
        self.add_state("count", torch.zeros(()))

    def update(self, mean, cov, y):
        assert cov.shape == (*mean.shape, C)
        assert mean.shape == y.shape
        self.total += cov.diagonal(dim1=1, dim2=2).sum()
        self.count += y.numel()

    def compute(self):
        return (self.total / self.count).log().abs()


def test_a_metric_of_three_arguments_gets_mean_covariance_and_targets_and_one_of_two_the_mean():
    la, val = fitted("regression", temperature=1e9), val_loader("regression")
    options = {"log_prior_prec_min": -2, "log_prior_prec_max": 2, "grid_size": 41}
    best = grid_search(la, val, loss=VarianceMetric(), **options)
    _, var = la(whole(val)[0], diagonal_output=True)
    assert var.mean().log().abs().item() < math.log(10) / 20 + 1e-6
    with pytest.warns(UserWarning, match="same for every setting"):
        assert grid_search(la, val, loss=torchmetrics.MeanSquaredError(num_outputs=C), grid_size=3) == best


@quiet
def test_grid_search_over_another_base():
    options = {"log_prior_prec_min": 1, "log_prior_prec_max": 4, "grid_size": 4, "log_prior_prec_base": 2.0}
    assert grid_search(fitted(temperature=200.0), val_loader(), **options) in (2, 4, 8, 16)


@quiet
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_nn_predictive_is_repeatable_and_leaves_the_global_generator_alone(likelihood):
    chosen, data = [], list(val_loader(likelihood))
    for seed in (0, 1):
        torch.manual_seed(seed)
        la = fitted(likelihood)
        before = torch.get_rng_state()
        options = {"pred_type": "nn", "link_approx": "mc", "n_samples": 7, "grid_size": 5}
        chosen.append(grid_search(la, data, log_prior_prec_min=-4, log_prior_prec_max=6, **options))
        assert torch.equal(torch.get_rng_state(), before)
    grid = torch.logspace(-4, 6, 5).tolist()
    assert chosen[0] == chosen[1] in grid[1:]  # a prior as wide as the first ruins sampled weights


def soft_labels(la, temperature, prior_precision=1e-7, **options):
    """Targets whose cross-entropy is lowest, by Gibbs, at these very hyperparameters."""
    x = inputs(31, seed=9) * 3
    la.temperature, la.prior_precision = temperature, prior_precision
    y = la(x, **options)
    la.temperature, la.prior_precision = None, 1.0
    return loader(x, y, 13)


FAR = {"log_prior_prec_min": -9, "log_prior_prec_max": -6, "grid_size": 4}


@quiet
@pytest.mark.parametrize("temperature", [1e2, 1e4])
@pytest.mark.parametrize("link", ["probit", "mc"])
def test_a_free_temperature_is_tuned_to_a_known_optimum(temperature, link):
    la = fitted()
    val = soft_labels(la, temperature, link_approx=link)
    assert grid_search(la, val, link_approx=link, **FAR) < 1e-5
    assert la.temperature == pytest.approx(temperature, rel=0.1)


@quiet
@pytest.mark.parametrize("temperature", [1e2, 1e4])
def test_a_free_temperature_of_a_regression_is_tuned_to_its_closed_form(temperature):
    # One weight: f = w, f_var = sigma^2 T / N, so NLL is lowest where it equals the residuals' excess.
    model = nn.Linear(1, 1, bias=False).double()
    ones, sigma = torch.ones(N, 1, dtype=F64), 0.5
    la = fitted("regression", model, loader(ones, ones), sigma_noise=sigma, temperature=None, n_eigenvalues=1)
    residual = (sigma**2 * temperature / N + sigma**2) ** 0.5
    f = model(ones[:2]).detach()
    grid_search(la, loader(ones[:2], f + residual * torch.tensor([[1.0], [-1.0]], dtype=F64)), **FAR)
    assert la.temperature == pytest.approx(temperature, rel=0.05)


@quiet
def test_a_given_temperature_is_fixed_and_none_is_free():
    val = soft_labels(fitted(), 1e3)
    free, fixed = (fitted(temperature=t) for t in (None, 1.0))
    assert (free.temperature, free.temperature_fixed, fixed.temperature_fixed) == (1.0, False, True)
    for la in (free, fixed):
        grid_search(la, val, grid_size=5)
    assert free.temperature > 10
    assert fixed.temperature == 1.0
    tuned = free.temperature
    free.fit(train_loader())
    assert (free.temperature, free.temperature_fixed) == (tuned, False)
    free.temperature = 3.0
    grid_search(free, val, grid_size=5)
    assert (free.temperature, free.temperature_fixed) == (3.0, True)
    free.temperature = None
    assert free.temperature == 1.0
    grid_search(free, val, grid_size=5)
    assert free.temperature > 10


@pytest.mark.parametrize("right", [True, False])
def test_an_optimum_on_an_edge_of_the_prior_grid_warns_and_says_which_way(right):
    p = over_confident("classification")
    la, x = fit(p, temperature=100.0), whole(validation(p))[0]
    f = p.model(x).detach()
    # Right labels want less variance, hence a larger precision.
    labels = f.argmax(1) if right else f.argmin(1)
    with pytest.warns(UserWarning, match=rf"edge.*log_prior_prec_{'max' if right else 'min'}"):
        grid_search(la, [(x, labels)], log_prior_prec_min=-1, log_prior_prec_max=2)
    assert la.prior_precision.item() == pytest.approx(100.0 if right else 0.1)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_a_flat_loss_warns_and_leaves_the_setting_alone(likelihood, pred_type):
    la = fitted(likelihood, temperature=None, prior_precision=0.7)
    before = state(la)
    options = {"pred_type": pred_type, "link_approx": "mc", "n_samples": 3, "grid_size": 3}
    with pytest.warns(UserWarning, match="same for every setting"):
        grid_search(la, val_loader(likelihood), loss=lambda *parts: 0.5, **options)
    assert state(la) == before


def test_skipped_candidates_are_counted_and_all_failing_changes_nothing():
    la, calls = fitted(temperature=300.0), []

    def every_other(p, y):
        calls.append(1)
        return brier(p, y) if len(calls) % 2 else float("nan")

    with pytest.warns(UserWarning, match="skipped"):
        grid_search(la, val_loader(), loss=every_other)
    before = state(la)
    with pytest.raises(ValueError, match="finite"):
        grid_search(la, val_loader(), loss=lambda *parts: float("nan"))
    assert state(la) == before


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_marglik_with_a_free_temperature_warns_exactly_once_and_is_silent_otherwise(likelihood):
    free, fixed = (fitted(likelihood, temperature=t) for t in (None, 1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fixed.optimize_prior_precision(method="marglik", n_steps=3)
        fixed.optimize_prior_precision(method="gridsearch", val_loader=val_loader(likelihood), grid_size=1)
        assert not caught
        free.optimize_prior_precision(method="marglik", n_steps=3)
    (warning,) = caught
    assert "gridsearch" in str(warning.message)
    assert warning.filename == __file__
    assert free.temperature == 1.0


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_marglik_raises_the_evidence_the_more_the_finer_the_prior(likelihood):
    reached = []
    for structure, size in SIZES.items():
        la = fitted(likelihood)
        start = la.log_marginal_likelihood(torch.tensor(3.0)).item()
        options = {"prior_structure": structure, "init_prior_prec": 3.0, "n_steps": 200}
        la.optimize_prior_precision(method="marglik", **options)
        assert la.prior_precision.shape == (size,)
        assert not la.prior_precision.requires_grad
        reached.append(la.log_marginal_likelihood().item())
        other = fitted(likelihood, prior_precision=la.prior_precision)
        for ours, theirs in zip(as_tuple(la(X)), as_tuple(other(X)), strict=True):
            assert_close(ours, theirs)
            assert not ours.requires_grad
    assert start < reached[0] < reached[1] < reached[2]


def test_marglik_is_the_default_prints_and_keeps_the_structure_of_its_start(capsys):
    la = fitted()
    la.optimize_prior_precision(n_steps=3, verbose=True)
    assert "prior precision" in capsys.readouterr().out
    assert la.prior_precision.shape == (1,)
    assert la.prior_precision.item() != 1.0
    la.optimize_prior_precision(n_steps=3, init_prior_prec=torch.ones(4))
    assert la.prior_precision.shape == (4,)


@pytest.mark.parametrize("kind", ["isotropic", "exact"])
@pytest.mark.parametrize("structure", ["layerwise", "diag"])
def test_a_prior_of_several_values_is_refused_with_a_residual(kind, structure):
    la, several = fitted(residual=kind), torch.ones(SIZES[structure])
    for action in (
        lambda: la.optimize_prior_precision(method="marglik", prior_structure=structure, n_steps=2),
        lambda: setattr(la, "prior_precision", several),
        lambda: build(residual=kind, prior_precision=several),
    ):
        with pytest.raises(ValueError, match="scalar"):
            action()
    assert la.prior_precision.item() == 1.0


FLAT_GRID = {"log_prior_prec_min": -4, "log_prior_prec_max": 6, "grid_size": 11}


def certain(la, n=60):
    """Labels of which the network is sure, so that no variance helps."""
    x = inputs(n, seed=3)
    return loader(x, la.model(x).argmax(-1), 20)


@quiet
def test_a_prior_that_a_search_has_collapsed_does_not_survive_a_later_search_on_other_data():
    p = over_confident("classification")
    la, fresh = fit(p), fit(p)
    x = whole(validation(p))[0]
    la.optimize_prior_precision(method="gridsearch", val_loader=[(x, p.model(x).argmax(-1))], **FLAT_GRID)
    assert la.prior_precision > 100
    search = ["temperature", "logit_scale"]
    ends = [
        each.optimize_hyperparameters(validation(p), search, link_approx="probit") for each in (la, fresh)
    ]
    assert ends[0].score <= ends[1].score + 1e-6


@quiet
def test_a_prior_of_the_users_own_is_kept_by_searches_of_other_parameters():
    p = over_confident("classification")
    la = fit(p)
    la.prior_precision = 50.0
    la.optimize_hyperparameters(validation(p), ["temperature"], link_approx="probit")
    assert la.prior_precision == 50.0


def test_where_nothing_helps_nothing_changes():
    la = fitted(temperature=None, prior_precision=1e9)
    before = state(la)
    with pytest.warns(UserWarning, match="nothing is changed"):
        grid_search(la, certain(la), **FLAT_GRID)
    after = state(la)
    assert {k for k in after if after[k] != before[k]} <= {"link", "digest"}


@quiet  # of the smallest variance, too
def test_a_noise_that_is_too_large_is_named():
    x = inputs(60, seed=3)
    la = fitted("regression", temperature=None)
    y = la.model(x).detach() + 0.3 * torch.randn(60, C, dtype=F64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"sigma_noise = 1 alone .* 0\.29"):
        grid_search(la, loader(x, y, 20), **FLAT_GRID)
