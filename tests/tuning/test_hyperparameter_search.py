"""Searches of hyperparameters: every score is that of a loop over calls, and failures change nothing."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings

import numpy as np
import pytest
import torch
import torchmetrics
from conftest import C, K, Problem, assert_close, make_problem
from helpers import nll_of_calls
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from laplace_ella import ELLALaplace
from laplace_ella.posterior.links import quasi_normal

F64 = torch.float64
LINKS = ("probit", "mc", "bridge", "bridge_norm")
CLASSIFICATION = ("MAP", "temperature scaling", "vector scaling", "constant variance", "last-layer variance")
REGRESSION = ("MAP", "constant variance", "last-layer variance")
N_VAL = 211  # above the 200 under which a search warns

# Those of the specification: each has a test below that asks for it.
quiet = pytest.mark.filterwarnings("ignore::UserWarning")


def validation(problem: Problem, n: int = N_VAL, size: int = 53) -> list[tuple[Tensor, Tensor]]:
    """Labels from the model's own logits at a temperature, so that confidence matters."""
    generator = torch.Generator().manual_seed(17)
    x = 2 * torch.randn(n, 2, generator=generator, dtype=F64)
    with torch.no_grad():
        f = problem.model(x)
    if problem.likelihood == "classification":
        y = torch.multinomial((f / 2.5).softmax(-1), 1, generator=generator)[:, 0]
    else:
        y = f + 1.1 * torch.randn(n, C, generator=generator, dtype=F64)
    return list(zip(x.split(size), y.split(size)))


def over_confident(likelihood: str) -> Problem:
    p = make_problem("mlp", likelihood)
    with torch.no_grad():
        p.model[-1].weight.mul_(4)
    return p


@pytest.fixture
def confident(likelihood) -> Problem:
    return over_confident(likelihood)


def fit(problem: Problem, **options) -> ELLALaplace:
    options = {"n_eigenvalues": K, "temperature": None, **options}
    la = ELLALaplace(problem.model, **problem.options(**options))
    la.fit(problem.loader(), landmarks=problem.landmarks, val_steps=1)
    return la


def whole(val) -> list[tuple[Tensor, Tensor]]:
    """All batches in one."""
    return [tuple(torch.cat(part) for part in zip(*val))]


def joined(problem: Problem, val) -> tuple[Tensor, Tensor]:
    x, y = (torch.cat(part) for part in zip(*val))
    with torch.no_grad():
        return problem.model(x), y


def state(la: ELLALaplace) -> dict:
    """What must be as before, as plain values."""
    found = {}

    def add(prefix, value):
        if isinstance(value, dict):
            for key, part in value.items():
                add(f"{prefix}.{key}", part)
        elif isinstance(value, Tensor):
            found[prefix] = (value.dtype, value.flatten().tolist())
        elif isinstance(value, (list, tuple)):
            for i, part in enumerate(value):
                add(f"{prefix}[{i}]", part)
        else:
            found[prefix] = value

    add("state", la.state_dict())
    return found


def settings_differ_in(table, name: str) -> int:
    return len({getattr(setting, name) for setting, _ in table})


# ---------------------------------------------------------------------------- the table

GRIDS = {
    "temperature": (0.5, 20.0, 900.0),
    "prior_precision": (0.05, 3.0),
    "residual_scale": (1e-3, 0.7),
    "n_eigenvalues": (2, K),
    "curvature_size": (10, 23),
}


class ByHand:
    """Scores a setting by calls to an estimator of its rank, with its snapshot of G and its attributes."""

    def __init__(self, problem: Problem, la: ELLALaplace, val, **options) -> None:
        self.problem, self.val, self.options = problem, val, options
        self.snapshots, self.H = dict(la.snapshots), la.H.clone()
        self.fits: dict[int, ELLALaplace] = {}

    def __call__(self, setting, **link) -> float:
        rank = setting.n_eigenvalues
        if rank not in self.fits:
            self.fits[rank] = fit(self.problem, **{**self.options, "n_eigenvalues": rank})
            assert self.fits[rank].basis.rank == rank
        la = self.fits[rank]
        la.H = self.snapshots.get(setting.curvature_size, self.H)[:rank, :rank]
        la.temperature = setting.temperature
        la.prior_precision = setting.prior_precision
        if self.problem.likelihood == "classification":
            la.logit_scale = setting.logit_scale
        else:
            la.sigma_noise = setting.sigma_noise
        if la.residual != "none":
            la.residual_scale = setting.residual_scale
        return nll_of_calls(la, self.val, **link)


@quiet
@pytest.mark.parametrize("residual", ["none", "isotropic", "exact"])
@pytest.mark.parametrize("link", ["probit", "mc"])
def test_every_score_is_that_of_a_loop_over_calls(confident, residual, link):
    p = confident
    if p.likelihood == "regression" and link == "mc":
        pytest.skip("regression has no link")
    options = {"residual": residual}
    grids = {k: v for k, v in GRIDS.items() if residual != "none" or k != "residual_scale"}
    grids |= {"logit_scale": (0.6, 1.0)} if p.likelihood == "classification" else {"sigma_noise": (0.4, 1.3)}
    la, val = fit(p, **options), validation(p, 23 if residual == "exact" else N_VAL)
    result = la.optimize_hyperparameters(val, grids, link_approx=link, n_samples=16, apply=False)
    for name, values in grids.items():
        assert {getattr(s, name) for s, _ in result.table} >= set(values), name
    by_hand = ByHand(p, la, whole(val), **options)
    for setting, score in result.table:
        assert score == pytest.approx(by_hand(setting, link_approx=link, n_samples=16), abs=1e-6), setting


@quiet
@pytest.mark.parametrize("name", ["temperature", "prior_precision", "curvature_size", "n_eigenvalues"])
def test_every_score_of_one_parameter_is_that_of_a_loop_over_calls(confident, name):
    p, val = confident, validation(confident)
    la = fit(p)
    result = la.optimize_hyperparameters(val, [name], link_approx="probit", apply=False)
    assert settings_differ_in(result.table, name) >= 3
    by_hand = ByHand(p, la, whole(val))
    for setting, score in result.table:
        assert score == pytest.approx(by_hand(setting), abs=1e-6), setting


@quiet
def test_best_is_the_minimum_of_the_table(confident):
    result = fit(confident).optimize_hyperparameters(validation(confident))
    assert result.score == min(score for _, score in result.table)
    assert (result.best, result.score) in result.table
    assert result.n_inputs == N_VAL


@quiet
@pytest.mark.parametrize("link", LINKS)
def test_applied_setting_scores_what_the_result_says(confident, link):
    la, val = fit(confident), validation(confident)
    result = la.optimize_hyperparameters(val, link_approx=link, n_samples=32)
    assert nll_of_calls(la, val, link_approx=link, n_samples=32) == pytest.approx(result.score, abs=1e-6)
    assert la.temperature == pytest.approx(result.best.temperature)


@quiet
def test_defaults_are_temperature_and_logit_scale_or_noise(confident):
    la = fit(confident)
    result = la.optimize_hyperparameters(validation(confident), apply=False)
    second = "logit_scale" if confident.likelihood == "classification" else "sigma_noise"
    for name in ("temperature", second):
        assert settings_differ_in(result.table, name) > 3, name
    for name in ("prior_precision", "n_eigenvalues", "curvature_size", "residual_scale"):
        assert settings_differ_in(result.table, name) == 1, name


@quiet
def test_default_link_is_monte_carlo_with_128_samples(dtype):
    p = over_confident("classification")
    la, val = fit(p), validation(p)
    result = la.optimize_hyperparameters(val)
    expected = nll_of_calls(la, val, link_approx="mc", n_samples=128)
    assert result.score == pytest.approx(expected, abs=1e-6)


@quiet
def test_refined_optimum_is_at_least_as_good_as_a_dense_grid(confident):
    p, val = confident, validation(confident)
    la, other = fit(p), fit(p)
    result = la.optimize_hyperparameters(val, link_approx="probit")
    lowest = math.inf
    for temperature in np.logspace(-2, 6, 33):
        other.temperature = float(temperature)
        for value in np.geomspace(0.2, 2.0, 15):
            if p.likelihood == "classification":
                other.logit_scale = float(value)
            else:
                other.sigma_noise = float(value)
            lowest = min(lowest, nll_of_calls(other, val))
    assert result.score <= lowest + 1e-6


@quiet
def test_residual_scale_is_searched_down_to_tiny_values(confident):
    p, val = confident, validation(confident)
    la = fit(p, residual="isotropic")
    result = la.optimize_hyperparameters(val, ["residual_scale"], link_approx="probit")
    values = sorted(s.residual_scale for s, _ in result.table)
    assert values[0] <= 1e-9
    assert values[-1] >= 1
    other = fit(p, residual="isotropic")
    for rho in np.logspace(-9, 1, 21):
        other.residual_scale = float(rho)
        assert result.score <= nll_of_calls(other, val) + 1e-6


# ---------------------------------------------------------------------------- what is applied


@quiet
def test_nothing_is_applied_unless_wanted(confident):
    la = fit(confident)
    before, x = state(la), confident.x_test
    prediction = la(x)
    result = la.optimize_hyperparameters(validation(confident), apply=False)
    assert state(la) == before
    for ours, theirs in zip(
        prediction if isinstance(prediction, tuple) else [prediction],
        la(x) if isinstance(prediction, tuple) else [la(x)],
    ):
        assert torch.equal(ours, theirs)
    assert result.best.temperature != la.temperature


@quiet
def test_a_lower_rank_drops_the_trailing_directions(confident):
    p, val = confident, validation(confident)
    la = fit(p)
    before = la.H.clone()
    la.optimize_hyperparameters(val, {"n_eigenvalues": [3]}, link_approx="probit")
    assert la.basis.rank == 3
    assert_close(la.H, before[:3, :3])
    other = fit(p, n_eigenvalues=3)
    assert_close(la.features(p.x_test)[0], other.features(p.x_test)[0])
    assert_close(la.basis.eigenvalues, other.basis.eigenvalues)
    assert_close(la.posterior_precision, other.posterior_precision)


@quiet
def test_a_smaller_curvature_size_takes_its_snapshot(confident):
    la = fit(confident)
    snapshots = dict(la.snapshots)
    la.optimize_hyperparameters(validation(confident), {"curvature_size": [10]}, link_approx="probit")
    assert_close(la.H, snapshots[10])


@quiet
def test_the_prior_becomes_scalar_if_searched(confident):
    la = fit(confident, prior_precision=torch.tensor([0.2, 1.7, 0.6, 3.1], dtype=F64))
    la.optimize_hyperparameters(validation(confident), {"prior_precision": [0.3, 2.0]}, link_approx="probit")
    assert la.prior_precision.shape == (1,)
    assert la.prior_precision.item() in (pytest.approx(0.3), pytest.approx(2.0))


@quiet
def test_temperature_stays_free(confident):
    la = fit(confident)
    la.optimize_hyperparameters(validation(confident), link_approx="probit")
    assert not la._temperature_fixed
    la.optimize_hyperparameters(validation(confident), ["temperature"], link_approx="probit")


@quiet
def test_a_search_again_gives_the_same(confident):
    la, val = fit(confident), validation(confident)
    first = la.optimize_hyperparameters(val, link_approx="probit")
    again = la.optimize_hyperparameters(val, link_approx="probit")
    assert again.score == pytest.approx(first.score, abs=1e-6)


@quiet
def test_the_setting_is_restored_from_a_checkpoint(confident, tmp_path):
    p = confident
    la = fit(p, residual="isotropic")
    la.optimize_hyperparameters(validation(p))
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other = ELLALaplace(p.model, **p.options(temperature=None))
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    for ours, theirs in zip(
        other._glm_predictive_distribution(p.x_test), la._glm_predictive_distribution(p.x_test)
    ):
        assert_close(ours, theirs)
    assert other.logit_scale == la.logit_scale


# ---------------------------------------------------------------------------- the baselines


def log_likelihoods(logits: Tensor, y: Tensor) -> float:
    return F.cross_entropy(logits, y).item()


@quiet
def test_map_and_temperature_scaling_are_those_of_a_direct_minimisation(dtype):
    p = over_confident("classification")
    val = validation(p)
    result = fit(p).optimize_hyperparameters(val, apply=False)
    f, y = joined(p, val)
    assert tuple(result.baselines) == CLASSIFICATION
    assert result.baselines["MAP"].score == pytest.approx(log_likelihoods(f, y), abs=1e-9)
    best = minimize_scalar(
        lambda t: log_likelihoods(f / math.exp(t), y),
        bounds=(-5, 5),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert result.baselines["temperature scaling"].score == pytest.approx(best.fun, abs=1e-6)


@quiet
def test_vector_scaling_is_that_of_a_direct_minimisation(dtype):
    p = over_confident("classification")
    val = validation(p)
    baselines = fit(p).optimize_hyperparameters(val, apply=False).baselines
    f, y = joined(p, val)

    def objective(w):
        return log_likelihoods(f * torch.as_tensor(w[:C]) + torch.as_tensor(w[C:]), y)

    best = minimize(objective, np.r_[np.full(C, 0.4), np.zeros(C)], method="L-BFGS-B")
    assert baselines["vector scaling"].score <= baselines["temperature scaling"].score + 1e-9
    assert baselines["vector scaling"].score == pytest.approx(best.fun, abs=1e-4)


@quiet
def test_constant_variance_of_a_classifier_is_that_of_a_direct_minimisation(dtype):
    """E softmax(f + v eps), eps ~ N(0, I_C) by the quasi-random points of the link."""
    p = over_confident("classification")
    val = validation(p)
    result = fit(p).optimize_hyperparameters(val, apply=False)
    f, y = joined(p, val)
    noise = quasi_normal(128, C, 0)

    def objective(log_v):
        probabilities = (f + math.exp(log_v / 2) * noise[:, None]).softmax(-1).mean(0)
        return F.nll_loss(probabilities.log(), y).item()

    grid = np.linspace(-8, 10, 181)
    lowest = min(objective(v) for v in grid)
    # Other points, or the probit link, move the optimum by less than this.
    assert result.baselines["constant variance"].score == pytest.approx(lowest, abs=0.01)
    assert result.baselines["constant variance"].score < result.baselines["MAP"].score


@quiet
def test_constant_variance_with_the_probit_link_is_temperature_scaling(dtype):
    p = over_confident("classification")
    baselines = fit(p).optimize_hyperparameters(validation(p), link_approx="probit", apply=False).baselines
    assert baselines["constant variance"].score == pytest.approx(
        baselines["temperature scaling"].score, abs=1e-5
    )


@quiet
def test_last_layer_variance_with_the_probit_link_is_that_of_a_direct_minimisation(dtype):
    """Variance v (|z|^2 + 1) of every logit, z the input of the last layer."""
    p = over_confident("classification")
    val = validation(p)
    result = fit(p).optimize_hyperparameters(val, link_approx="probit", apply=False)
    f, y = joined(p, val)
    with torch.no_grad():
        z = p.model[:-1](torch.cat([x for x, _ in val]))
    shape = (z.square().sum(-1, keepdim=True) + 1).sqrt()

    def objective(log_v):
        return log_likelihoods(f / torch.sqrt(1 + math.pi / 8 * math.exp(log_v) * shape**2), y)

    lowest = min(objective(v) for v in np.linspace(-12, 10, 881))
    assert result.baselines["last-layer variance"].score <= lowest + 1e-5


@quiet
def test_baselines_of_a_regression_are_direct_minimisations(dtype):
    p = over_confident("regression")
    val = validation(p)
    result = fit(p).optimize_hyperparameters(val, apply=False)
    f, y = joined(p, val)
    assert tuple(result.baselines) == REGRESSION
    with torch.no_grad():
        z = p.model[:-1](torch.cat([x for x, _ in val]))
    shape = z.square().sum(-1, keepdim=True) + 1

    def nll(variance):
        return -Normal(f, variance.sqrt().expand_as(f)).log_prob(y).sum().item() / len(f)

    # One variance, noise and constant together: its optimum is the mean squared error.
    best = nll((f - y).square().mean())
    assert result.baselines["constant variance"].score == pytest.approx(best, abs=1e-4)
    variances = np.r_[0, np.geomspace(1e-6, 2, 80)]
    free = min(nll(s**2 + v * shape) for s in np.linspace(0.02, 2.5, 60) for v in variances)
    fixed = min(nll(p.sigma_noise**2 + v * shape) for v in variances)
    assert free - 5e-3 <= result.baselines["last-layer variance"].score <= fixed + 1e-3
    assert result.baselines["MAP"].score >= result.baselines["constant variance"].score - 1e-9


@quiet
def test_differences_and_standard_errors_are_paired(dtype):
    p = over_confident("classification")
    la, val = fit(p), validation(p)
    result = la.optimize_hyperparameters(val, link_approx="probit")
    f, y = joined(p, val)
    ours = torch.cat([F.nll_loss(la(x).log(), t, reduction="none") for x, t in val])
    difference = F.cross_entropy(f, y, reduction="none") - ours
    for baseline in result.baselines.values():
        assert baseline.difference == pytest.approx(baseline.score - result.score, abs=1e-9)
    entry = result.baselines["MAP"]
    assert entry.difference == pytest.approx(difference.mean().item(), abs=1e-6)
    assert entry.standard_error == pytest.approx(difference.std().item() / N_VAL**0.5, rel=0.01)


@quiet
def test_last_layer_variance_is_not_available_where_no_module_returns_the_outputs():
    class Scaled(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.net(x)

    p = over_confident("classification")
    p = Problem(p.name, p.likelihood, Scaled(p.model), p.x, p.y, p.x_test, p.landmarks, 1.0)
    result = fit(p).optimize_hyperparameters(validation(p))
    assert result.baselines["last-layer variance"] is None
    assert "last-layer variance" in result.summary()
    assert "not available" in result.summary()


@quiet
def test_baselines_leave_no_hooks_behind(confident):
    la = fit(confident)
    la.optimize_hyperparameters(validation(confident))
    for module in confident.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


# ---------------------------------------------------------------------------- other losses


def brier(p: Tensor, y: Tensor) -> Tensor:
    return (p - F.one_hot(y, C)).square().sum(-1).mean()


@quiet
def test_another_loss_is_what_is_minimised(dtype):
    p = over_confident("classification")
    la, val = fit(p), validation(p)
    result = la.optimize_hyperparameters(val, link_approx="probit", loss=brier)
    x, y = (torch.cat(part) for part in zip(*val))
    assert result.score == pytest.approx(brier(la(x), y).item(), abs=1e-6)
    f, _ = joined(p, val)
    assert result.baselines["MAP"].score == pytest.approx(brier(f.softmax(-1), y).item(), abs=1e-6)
    assert all(b.standard_error is None for b in result.baselines.values())
    assert "MAP" in result.summary()


@quiet
def test_settings_whose_loss_is_not_a_number_are_skipped(dtype):
    p = over_confident("classification")
    la, val = fit(p), validation(p)
    x, y = (torch.cat(part) for part in zip(*val))

    def picky(probabilities, targets):
        value = brier(probabilities, targets)
        return value if probabilities.max(-1).values.mean() < 0.9 else value * float("nan")

    result = la.optimize_hyperparameters(
        val, {"temperature": [1e-3, 30.0, 300.0, 3000.0]}, link_approx="probit", loss=picky
    )
    assert math.isfinite(result.score)
    assert math.isfinite(picky(la(x), y))
    assert result.best.temperature > 1


@quiet
def test_a_search_in_which_all_settings_fail_changes_nothing(confident):
    la = fit(confident)
    before = state(la)
    with pytest.raises(ValueError, match="finite"):
        la.optimize_hyperparameters(validation(confident), loss=lambda *parts: float("nan"))
    assert state(la) == before


@quiet
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_search_changes_nothing(confident, error):
    la, calls = fit(confident), []
    before = state(la)

    def interrupted(*parts):
        calls.append(1)
        if len(calls) == 5:
            raise error("stop")
        return float(parts[0].abs().log().mean())

    with pytest.raises(error, match="stop"):
        la.optimize_hyperparameters(validation(confident), loss=interrupted)
    assert state(la) == before
    for module in confident.model.modules():
        assert not module._forward_pre_hooks


@quiet
def test_an_error_of_the_loader_changes_nothing(confident):
    la = fit(confident)
    before = state(la)

    def broken():
        yield validation(confident)[0]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        la.optimize_hyperparameters(broken())
    assert state(la) == before


# ---------------------------------------------------------------------------- cost


class Counting(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


@quiet
def test_forward_passes_do_not_depend_on_the_search(likelihood):
    p = over_confident(likelihood)
    model, val = Counting(p.model), validation(p)
    p = Problem(p.name, likelihood, model, p.x, p.y, p.x_test, p.landmarks, p.sigma_noise)
    calls = []
    for search in ({"temperature": [3.0, 4.0]}, None, ["temperature", "prior_precision"]):
        la = fit(p)
        model.calls = 0
        la.optimize_hyperparameters(iter(val), search, link_approx="probit")  # an iterator: read once
        calls.append(model.calls)
    assert len(set(calls)) == 1
    la = fit(p)
    model.calls = 0
    for x, _ in val:
        la.features(x)
    # The last layer's inputs may take a plain pass of their own, nothing more.
    assert len(val) <= calls[0] <= 2 * model.calls + len(val)


@quiet
@pytest.mark.parametrize("link", ["probit", "mc"])
def test_little_memory_gives_the_same_table(confident, link):
    val, grids = validation(confident), {"temperature": [1.0, 50.0, 900.0], "prior_precision": [0.1, 4.0]}
    results = []
    for budget in (2000, 10**9):
        la = fit(confident, memory_budget=budget)
        results.append(la.optimize_hyperparameters(val, grids, link_approx=link, n_samples=16))
    small, large = (r.table for r in results)
    assert len(small) == len(large)
    # Sums of blocks are rounded in another order, which refinement may see.
    for (ours, our_score), (theirs, their_score) in zip(small, large):
        assert dataclasses.astuple(ours) == pytest.approx(dataclasses.astuple(theirs), rel=1e-6)
        assert our_score == pytest.approx(their_score, abs=1e-9)
    for name, baseline in results[1].baselines.items():
        assert results[0].baselines[name].score == pytest.approx(baseline.score, abs=1e-6), name


# ---------------------------------------------------------------------------- warnings


def test_few_validation_inputs_warn(confident):
    la = fit(confident)
    with pytest.warns(UserWarning, match="200") as caught:
        la.optimize_hyperparameters(validation(confident, 23, 7), link_approx="probit")
    assert sum("200" in str(w.message) for w in caught) == 1


def messages_of(la: ELLALaplace, val, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = la.optimize_hyperparameters(val, **options)
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert isinstance(result.notes, tuple)
    assert all(isinstance(note, str) for note in result.notes)
    return messages


def test_a_simpler_method_as_good_within_the_standard_error_is_named(dtype):
    p = over_confident("classification")
    messages = messages_of(fit(p), validation(p), search=["temperature"], link_approx="probit")
    assert any("as good" in m and "temperature scaling" in m for m in messages)
    assert not any("200" in m for m in messages)


def test_predictions_that_are_those_of_map_are_named(dtype):
    p = over_confident("classification")
    messages = messages_of(fit(p), validation(p), search={"temperature": [1e-9]}, link_approx="probit")
    assert any("MAP" in m for m in messages)


# ---------------------------------------------------------------------------- errors

BAD_SEARCHES = {
    "unknown": ["temprature"],
    "unknown in a mapping": {"T": [1.0]},
    "empty": [],
    "empty mapping": {},
    "no values": {"temperature": []},
    "negative": {"temperature": [-1.0]},
    "residual": ["residual_scale"],
}


@quiet
@pytest.mark.parametrize("name", BAD_SEARCHES)
def test_a_search_that_makes_no_sense_is_refused(confident, name):
    la = fit(confident)
    before = state(la)
    with pytest.raises(ValueError):  # noqa: PT011
        la.optimize_hyperparameters(validation(confident), BAD_SEARCHES[name])
    assert state(la) == before


@quiet
def test_parameters_of_another_likelihood_are_refused(confident):
    name = "sigma_noise" if confident.likelihood == "classification" else "logit_scale"
    with pytest.raises(ValueError, match=name):
        fit(confident).optimize_hyperparameters(validation(confident), [name])


@quiet
def test_a_temperature_fixed_by_the_user_is_not_searched(confident):
    la = fit(confident, temperature=2.0)
    with pytest.raises(ValueError, match="temperature"):
        la.optimize_hyperparameters(validation(confident), ["temperature"])
    la.optimize_hyperparameters(validation(confident), ["prior_precision"], link_approx="probit")
    assert la.temperature == 2.0


def test_a_search_before_a_fit_is_refused(confident):
    la = ELLALaplace(confident.model, **confident.options(temperature=None))
    with pytest.raises(AttributeError):
        la.optimize_hyperparameters(validation(confident))


# ---------------------------------------------------------------------------- the result


@quiet
def test_the_result_is_frozen(confident):
    result = fit(confident).optimize_hyperparameters(validation(confident))
    for frozen, name in (
        (result, "score"),
        (result.best, "temperature"),
        (result.baselines["MAP"], "score"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 0.0)
    assert isinstance(result.table, tuple)


@quiet
def test_summary_names_every_baseline_and_its_score(confident):
    result = fit(confident).optimize_hyperparameters(validation(confident))
    text = result.summary()
    numbers = [float(t) for t in re.findall(r"-?\d+\.\d+", text)]
    assert any(abs(v - result.score) < 5e-3 for v in numbers)
    for name in CLASSIFICATION if confident.likelihood == "classification" else REGRESSION:
        assert name in text
        assert any(abs(v - result.baselines[name].score) < 5e-3 for v in numbers), name
    assert str(N_VAL) in text


@quiet
def test_plot_returns_a_figure(confident):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fit(confident).optimize_hyperparameters(validation(confident), link_approx="probit")
        figure = result.plot()
    assert isinstance(figure, Figure)
    assert len(figure.axes) >= 2  # one for each parameter searched
    pyplot.close(figure)


# ---------------------------------------------------------------------------- grid search


def grid_search(la: ELLALaplace, val, **options) -> None:
    options = {"log_prior_prec_min": -3, "log_prior_prec_max": 4, "grid_size": 15, **options}
    la.optimize_prior_precision(method="gridsearch", val_loader=val, **options)


def naive(la: ELLALaplace, score, low=-3.0, high=4.0, size=15) -> float:
    scores = {}
    for delta in torch.logspace(low, high, size).tolist():
        la.prior_precision = delta
        scores[delta] = score()
    la.prior_precision = 1.0
    assert len(set(scores.values())) > size // 2
    return min(scores, key=scores.__getitem__)


@pytest.mark.parametrize("right", [True, False])
def test_an_optimum_on_an_edge_of_the_prior_grid_warns_and_says_which_way(dtype, right):
    p = over_confident("classification")
    la, x = fit(p, temperature=100.0), torch.cat([x for x, _ in validation(p)])
    with torch.no_grad():
        f = p.model(x)
    val = [(x, f.argmax(1) if right else f.argmin(1))]
    with pytest.warns(UserWarning, match="edge") as caught:
        grid_search(la, val, log_prior_prec_min=-1, log_prior_prec_max=2)
    message = str(caught[0].message)
    # Right labels want less variance, hence a larger precision.
    assert ("log_prior_prec_max" if right else "log_prior_prec_min") in message or (
        "large" if right else "small"
    ) in message
    assert la.prior_precision.item() == pytest.approx(100.0 if right else 0.1)


def test_an_optimum_on_an_edge_of_the_temperature_range_warns(dtype):
    p = over_confident("classification")
    la, x = fit(p), torch.cat([x for x, _ in validation(p)])
    with torch.no_grad():
        val = [(x, p.model(x).argmin(1))]
    with pytest.warns(UserWarning, match=r"[Tt]emperature"):
        grid_search(la, val, log_prior_prec_min=-12, log_prior_prec_max=-8, grid_size=5)
    assert la.temperature > 1e5


def test_an_optimum_at_a_very_large_temperature_is_found(dtype):
    """Soft targets from the estimator itself: by Gibbs' inequality the optimum is where they come from."""
    p = over_confident("classification")
    la, x = fit(p, prior_precision=1e-7), torch.cat([x for x, _ in validation(p)])
    la.temperature = 1e4
    y = la(x)
    la.temperature = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grid_search(la, [(x, y)], log_prior_prec_min=-9, log_prior_prec_max=-6, grid_size=4)
    assert la.temperature == pytest.approx(1e4, rel=0.1)


@quiet
@pytest.mark.parametrize("link", LINKS)
def test_grid_search_with_a_callable_finds_what_a_loop_finds(dtype, link):
    p = over_confident("classification")
    la, val = fit(p, temperature=300.0), validation(p)
    x, y = (torch.cat(part) for part in zip(*val))
    options = {"link_approx": link, "n_samples": 16}
    expected = naive(la, lambda: brier(la(x, **options), y).item())
    grid_search(la, val, loss=brier, **options)
    assert la.prior_precision.item() == expected


@quiet
@pytest.mark.parametrize("link", LINKS)
def test_grid_search_with_a_metric_finds_what_a_loop_finds(dtype, link):
    p = over_confident("classification")
    la, val = fit(p, temperature=300.0), validation(p)
    options = {"link_approx": link, "n_samples": 16}

    def metric():
        return torchmetrics.CalibrationError("multiclass", num_classes=C, n_bins=7)

    def score():
        m = metric()
        for x, y in val:
            m.update(la(x, **options), y)
        return m.compute().item()

    expected = naive(la, score)
    grid_search(la, val, loss=metric(), **options)
    assert la.prior_precision.item() == expected


@quiet
@pytest.mark.parametrize("link", LINKS)
def test_grid_search_with_little_memory_finds_the_same(confident, link):
    val, found = validation(confident), []
    for budget in (2000, 10**9):
        la = fit(confident, temperature=300.0, memory_budget=budget)
        grid_search(la, val, link_approx=link, n_samples=16)
        found.append(la.prior_precision.item())
    assert found[0] == found[1]
    expected = naive(la, lambda: nll_of_calls(la, val, link_approx=link, n_samples=16))
    assert found[0] == expected


@quiet
def test_grid_search_tunes_the_temperature_and_the_prior_at_fixed_logit_scale(dtype):
    p = over_confident("classification")
    la, val = fit(p, temperature=300.0, logit_scale=0.5), validation(p)
    expected = naive(la, lambda: nll_of_calls(la, val))
    grid_search(la, val)
    assert la.prior_precision.item() == expected
    assert la.logit_scale == 0.5


@quiet
@pytest.mark.parametrize("residual", ["isotropic", "exact"])
def test_grid_search_with_a_residual_finds_what_a_loop_finds(confident, residual):
    la, val = fit(confident, temperature=30.0, residual=residual, residual_scale=0.1), validation(confident)
    expected = naive(la, lambda: nll_of_calls(la, val))
    grid_search(la, val)
    assert la.prior_precision.item() == expected


def test_a_flat_loss_warns_and_leaves_the_setting_alone(confident):
    la = fit(confident, prior_precision=0.37)
    with pytest.warns(UserWarning, match="same for every setting"):
        grid_search(la, validation(confident), loss=lambda *parts: 1.5)
    assert la.prior_precision.item() == pytest.approx(0.37)
    assert la.temperature == 1.0


def test_a_grid_that_ends_before_it_begins_is_refused(confident):
    la = fit(confident, temperature=1.0)
    for low, high in ((2.0, 2.0), (3.0, -1.0)):
        with pytest.raises(ValueError, match="log_prior_prec"):
            grid_search(la, validation(confident), log_prior_prec_min=low, log_prior_prec_max=high)
    assert la.prior_precision.item() == confident.prior_precision


@quiet
def test_skipped_candidates_are_counted_and_all_failing_changes_nothing(dtype):
    p = over_confident("classification")
    la, val, calls = fit(p, temperature=300.0), validation(p), []

    def every_other(probabilities, y):
        calls.append(1)
        return brier(probabilities, y) if len(calls) % 2 else float("nan")

    with pytest.warns(UserWarning, match="skipped"):
        grid_search(la, val, loss=every_other)
    before = state(la)
    with pytest.raises(ValueError, match="finite"):
        grid_search(la, val, loss=lambda *parts: float("nan"))
    assert state(la) == before
