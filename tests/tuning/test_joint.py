"""Searches of several hyperparameters: every score is that of a loop over calls, and failures change nothing."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from conftest import K, assert_close
from helpers import C, D, Snapshot, fitted, inputs, loader, mlp, nll_of_calls, train_loader, val_loader
from models import Counting
from searching import N_VAL, drawn, fit, over_confident, state, validation, whole
from torch import nn

# Of few validation data, and of simpler methods that are as good: test_result.py asks for both.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

F64 = torch.float64
LINKS = ("probit", "mc", "bridge", "bridge_norm")
X = inputs(7, seed=7)
SEARCH = ["temperature", "logit_scale", "residual_scale"]
GRIDS = {
    "temperature": (0.5, 20.0, 900.0),
    "prior_precision": (0.05, 3.0),
    "residual_scale": (1e-3, 0.7),
    "n_eigenvalues": (2, K),
    "curvature_size": (10, 23),
}


@pytest.fixture
def confident(likelihood):
    return over_confident(likelihood)


def second(likelihood):
    """What is searched by default beside the temperature."""
    return "logit_scale" if likelihood == "classification" else "sigma_noise"


free = partial(fitted, temperature=None)


def numbers(setting):
    return [v for v in dataclasses.astuple(setting) if v is not None]


def values_of(result, name):
    return {getattr(setting, name) for setting, _ in result.table}


class ByHand:
    """Scores a setting by calls to an estimator of its rank, with its snapshot of G and its attributes."""

    def __init__(self, problem, la, val, **options):
        self.problem, self.val, self.options = problem, val, options
        self.snapshots, self.H = dict(la.snapshots), la.H.clone()
        self.fits = {}

    def __call__(self, setting, **link):
        rank = setting.n_eigenvalues
        if rank not in self.fits:
            self.fits[rank] = fit(self.problem, **{**self.options, "n_eigenvalues": rank})
            assert self.fits[rank].basis.rank == rank
        la = self.fits[rank]
        la.H = self.snapshots.get(setting.curvature_size, self.H)[:rank, :rank]
        names = ["temperature", "prior_precision", second(self.problem.likelihood)]
        for name in [*names, *(["residual_scale"] if la.residual != "none" else [])]:
            setattr(la, name, getattr(setting, name))
        return nll_of_calls(la, self.val, **link)


RESIDUALS = ("none", "isotropic", "exact")
OF_ONE = [(name, "none", "probit") for name in GRIDS if name != "residual_scale"]
OF_ALL = [("all", residual, link) for link in ("probit", "mc") for residual in RESIDUALS]


@pytest.mark.parametrize(("what", "residual", "link"), OF_ONE + OF_ALL)
def test_every_score_is_that_of_a_loop_over_calls(confident, what, residual, link):
    if (confident.likelihood, link) == ("regression", "mc"):
        return
    grids = {k: v for k, v in GRIDS.items() if residual != "none" or k != "residual_scale"}
    grids[second(confident.likelihood)] = (0.6, 1.0)
    la, val = fit(confident, residual=residual), validation(confident, 23 if residual == "exact" else N_VAL)
    options = {"link_approx": link, "n_samples": 16}
    result = la.optimize_hyperparameters(val, grids if what == "all" else [what], apply=False, **options)
    for searched in grids if what == "all" else [what]:
        values = values_of(result, searched)
        assert values >= set(grids[searched]) if what == "all" else len(values) >= 3
    by_hand = ByHand(confident, la, [whole(val)], residual=residual)
    for setting, score in result.table:
        assert score == pytest.approx(by_hand(setting, **options), abs=1e-6), setting


@pytest.mark.parametrize("link", [None, *LINKS])
def test_the_best_setting_is_the_lowest_of_the_table_and_scores_so_when_applied(confident, link):
    la, val = fit(confident), validation(confident)
    options = {} if link is None else {"link_approx": link, "n_samples": 32}
    result = la.optimize_hyperparameters(val, **options)
    assert result.score == min(score for _, score in result.table)
    assert (result.best, result.score) in result.table
    assert result.n_inputs == N_VAL
    used = options or {"link_approx": "mc", "n_samples": 128}  # the default
    assert nll_of_calls(la, val, **used) == pytest.approx(result.score, abs=1e-6)
    assert la.temperature == pytest.approx(result.best.temperature)
    assert not la.temperature_fixed
    again = la.optimize_hyperparameters(val, **options)
    assert again.score == pytest.approx(result.score, abs=1e-6)


def test_defaults_are_temperature_and_logit_scale_or_noise_and_a_residual(confident):
    for residual, third in (("none", ()), ("isotropic", ("residual_scale",))):
        la = fit(confident, residual=residual)
        result = la.optimize_hyperparameters(validation(confident, 23), link_approx="probit", apply=False)
        assert result.searched == ("temperature", second(confident.likelihood), *third)
        for name in (*GRIDS, second(confident.likelihood)):
            assert (len(values_of(result, name)) > 3) == (name in result.searched), name
        assert "held fixed: prior_precision" in result.summary()


def test_the_residual_scale_is_searched_down_to_tiny_values(confident):
    la, other = (fit(confident, residual="isotropic") for _ in range(2))
    val = validation(confident)
    result = la.optimize_hyperparameters(val, ["residual_scale"], link_approx="probit")
    values = values_of(result, "residual_scale")
    assert min(values) <= 1e-9
    assert max(values) >= 1
    for rho in np.logspace(-9, 1, 21):
        other.residual_scale = float(rho)
        assert result.score <= nll_of_calls(other, val) + 1e-6


def test_equal_eigenvalues_of_the_residual_do_not_stop_a_search():
    la = free(model=nn.Linear(D, C, dtype=F64), residual="exact", n_eigenvalues=2)  # J J^T is a multiple of I
    result = la.optimize_hyperparameters(val_loader(), ["residual_scale", "prior_precision"])
    assert result.score == min(s for _, s in result.table)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_searches_work_where_no_gradient_is_recorded(context, residual):
    search = SEARCH if residual != "none" else SEARCH[:2]
    expected = free(residual=residual).optimize_hyperparameters(val_loader(), search).score
    la = free(residual=residual)
    with context():
        found = la.optimize_hyperparameters(val_loader(), [*search, "n_eigenvalues"])
    assert found.score <= expected + 1e-6
    assert la(X).isfinite().all()


def test_nothing_is_applied_unless_wanted(confident):
    la = fit(confident)
    before, of_calls = state(la), Snapshot(la, confident.x_test)
    result = la.optimize_hyperparameters(validation(confident), apply=False)
    assert state(la) == before
    of_calls.check()
    assert result.best.temperature != la.temperature


def test_a_lower_rank_leaves_the_trailing_directions_out(confident):
    la, other = fit(confident), fit(confident, n_eigenvalues=3)
    before = la.H.clone()
    la.optimize_hyperparameters(validation(confident), {"n_eigenvalues": [3]}, link_approx="probit")
    assert la.basis.rank == la.n_directions == 3
    assert_close(la.H, before[:3, :3])
    assert_close(la.features(confident.x_test)[0], other.features(confident.x_test)[0])
    assert_close(la.basis.eigenvalues, other.basis.eigenvalues)
    assert_close(la.posterior_precision, other.posterior_precision)


def test_a_rank_that_does_not_matter_is_not_cut_and_a_later_search_may_raise_it():
    la = free(prior_precision=1e12)  # no variance, whatever the rank
    la.optimize_hyperparameters(val_loader(), ["n_eigenvalues"])
    assert la.basis.rank == 5
    la.optimize_hyperparameters(val_loader(), {"n_eigenvalues": [2]})
    assert la.basis.rank == 2
    with pytest.raises(ValueError, match="Fit again"):
        la.optimize_hyperparameters(val_loader(), {"n_eigenvalues": [6]})
    la.optimize_hyperparameters(val_loader(), ["n_eigenvalues"])
    assert la.basis.rank == 2  # which matters as little
    la.optimize_hyperparameters(val_loader(), {"n_eigenvalues": [4]})
    assert la.basis.rank == 4
    la.fit(train_loader())
    assert la.basis.rank == 5


def test_a_search_over_ranks_does_not_depend_on_how_many_are_used(confident):
    la, other = fit(confident), fit(confident)
    la.n_directions = 2
    search, data = {"n_eigenvalues": [5, 3, 1], "temperature": [1.0, 30.0]}, validation(confident)
    found, expected = (e.optimize_hyperparameters(data, search, apply=False) for e in (la, other))
    assert found.best == expected.best
    scores, of_other = dict(found.table), dict(expected.table)
    # The present setting is compared too.
    assert scores.keys() - of_other.keys() == {la._posterior.plain}
    assert_close(torch.tensor([scores[s] for s in of_other]), torch.tensor(list(of_other.values())))


def test_a_smaller_curvature_size_takes_its_snapshot_and_a_searched_prior_becomes_scalar(confident):
    la = fit(confident, prior_precision=torch.tensor([0.2, 1.7, 0.6, 3.1], dtype=F64))
    snapshots, search = dict(la.snapshots), {"curvature_size": [10], "prior_precision": [0.3, 2.0]}
    la.optimize_hyperparameters(validation(confident), search, link_approx="probit")
    assert_close(la.H, snapshots[10])
    assert la.prior_precision.tolist() in ([pytest.approx(0.3)], [pytest.approx(2.0)])


def test_a_parameter_that_the_loss_ignores_keeps_its_value():
    la = fitted("regression", temperature=None, sigma_noise=0.7)
    loss = lambda mean, cov, y: (mean - y).square().mean()  # noqa: E731
    result = la.optimize_hyperparameters(val_loader("regression"), loss=loss)
    assert (float(la.sigma_noise), la.temperature) == (0.7, 1)
    assert sum("does not depend" in note for note in result.notes) == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
def test_a_search_that_fails_changes_nothing(error):
    """By an error or Ctrl-C in the fifth call of its loss, or as all its scores are NaN."""
    la, calls = free(), []

    def loss(p, y):
        calls.append(float("nan") if error is ValueError else float(p.log().mean()))
        if len(calls) == 5 and error is not ValueError:
            raise error("stop")
        return calls[-1]

    before = state(la)
    with pytest.raises(error, match=r"stop|finite"):
        la.optimize_hyperparameters(val_loader(), loss=loss)
    assert state(la) == before


BAD_SEARCHES = {
    "no residual": ("classification", ["residual_scale"]),
    "of regression": ("classification", ["sigma_noise"]),
    "of classification": ("regression", ["logit_scale"]),
    "negative": ("classification", {"temperature": [-1.0]}),
    "empty": ("classification", {}),
}


@pytest.mark.parametrize("name", BAD_SEARCHES)
def test_a_search_that_makes_no_sense_is_refused(name):
    likelihood, search = BAD_SEARCHES[name]
    la = fitted(likelihood, temperature=None)
    before = Snapshot(la, X)
    with pytest.raises(ValueError, match=r"temperature|search|residual|logit_scale"):
        la.optimize_hyperparameters(val_loader(likelihood), search)
    before.check()


def test_a_temperature_fixed_by_the_user_is_not_searched():
    la = fitted(temperature=2.0)
    with pytest.raises(ValueError, match="temperature"):
        la.optimize_hyperparameters(val_loader(), ["temperature"])
    la.optimize_hyperparameters(val_loader(), ["prior_precision"], link_approx="probit")
    assert la.temperature == 2.0


def test_forward_passes_do_not_depend_on_the_search(likelihood):
    p = over_confident(likelihood)
    model, val, calls = Counting(p.model), validation(p), []
    p = dataclasses.replace(p, model=model)
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


@pytest.mark.parametrize("link", ["probit", "mc"])
def test_little_memory_gives_the_same_table(confident, link):
    val, grids = validation(confident), {"temperature": [1.0, 50.0, 900.0], "prior_precision": [0.1, 4.0]}
    fits = [fit(confident, memory_budget=budget) for budget in (2000, 10**9)]
    options = {"link_approx": link, "n_samples": 16}
    small, large = (la.optimize_hyperparameters(val, grids, **options) for la in fits)
    # Sums of blocks are rounded in another order, which refinement may see.
    for (ours, our_score), (theirs, their_score) in zip(small.table, large.table, strict=True):
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-6)
        assert our_score == pytest.approx(their_score, abs=1e-9)
    for name, baseline in large.baselines.items():
        assert small.baselines[name].score == pytest.approx(baseline.score, abs=1e-6), name


@pytest.mark.parametrize(("seed", "prior"), [(0, 1e-3), (1, 1e-3), (3, 1e-3), (3, 1e-6)])
def test_a_search_of_many_parameters_is_no_worse_than_scaled_logits(seed, prior):
    """Started from the current widths it ended in an optimum of large logits in these cases."""
    model, x = mlp(seed=seed), inputs(300, seed=3)
    with torch.no_grad():
        model[-1].weight.mul_(5)
        labels = drawn((model(x) / 3).softmax(-1), torch.Generator().manual_seed(0))
    la = free(model=model, residual="isotropic", seed=seed, prior_precision=prior)
    result = la.optimize_hyperparameters(loader(x, labels, 100), SEARCH, n_samples=32)
    assert result.score <= result.baselines["temperature scaling"].score + 1e-4
