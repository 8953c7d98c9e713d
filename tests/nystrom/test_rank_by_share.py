"""The rank as a share of the Gram matrix's trace, its spectrum, and the error that is left."""

from __future__ import annotations

import dataclasses
import warnings

import oracle
import pytest
import torch
from conftest import C, K, M, Problem, assert_close, make_problem
from laplace import FullLaplace
from laplace.curvature import GGNInterface
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ella import ELLALaplace

F64 = torch.float64


def fit(problem: Problem, landmarks=None, **options) -> ELLALaplace:
    la = ELLALaplace(problem.model, **problem.options(**{"curvature_size": None, **options}))
    la.fit(problem.loader(), landmarks=problem.landmarks if landmarks is None else landmarks)
    return la


def spectrum(problem: Problem) -> torch.Tensor:
    """Eigenvalues of R R^T (M,), descending."""
    return torch.linalg.eigvalsh(oracle.gram(oracle.gradient_rows(problem.model, *problem.landmarks))).flip(0)


# ---------------------------------------------------------------------------- the rank


@pytest.mark.parametrize("share", [1e-6, 0.3, 0.5, 0.9, 0.99, 0.9999])
def test_rank_is_the_smallest_that_retains_the_share(small_problem, share):
    values = spectrum(small_problem)
    retained = values.cumsum(0) / values.sum()
    expected = int((retained < share).sum()) + 1
    la = fit(small_problem, n_eigenvalues=share)
    assert la.basis.rank == expected
    assert la.basis.retained >= share
    assert la.basis.retained == pytest.approx(float(retained[expected - 1]))
    assert la.H.shape == (expected, expected)


def test_shares_of_this_problem_give_several_ranks(small_problem):
    ranks = [fit(small_problem, n_eigenvalues=share).basis.rank for share in (0.3, 0.9, 0.9999)]
    assert ranks[0] < ranks[1] < ranks[2]


def test_a_share_gives_what_its_rank_gives(small_problem):
    p = small_problem
    by_share = fit(p, n_eigenvalues=0.9)
    by_rank = fit(p, n_eigenvalues=by_share.basis.rank)
    assert_close(by_share.H, by_rank.H)
    for ours, theirs in zip(
        by_share._glm_predictive_distribution(p.x_test), by_rank._glm_predictive_distribution(p.x_test)
    ):
        assert_close(ours, theirs)


def test_a_share_is_chosen_anew_at_every_fit(small_problem):
    p = small_problem
    la = fit(p, n_eigenvalues=0.999)
    x, outputs = p.landmarks
    la.fit(p.loader(), landmarks=(x[:2], outputs[:2]))
    assert la.basis.rank <= 2
    la.fit(p.loader(), landmarks=p.landmarks)
    assert la.basis.rank == fit(p, n_eigenvalues=0.999).basis.rank


def test_a_share_works_for_random_landmarks_and_default_settings(small_problem):
    p = small_problem
    la = ELLALaplace(p.model, p.likelihood, n_eigenvalues=0.8)
    la.fit(p.loader())
    assert la.basis.retained >= 0.8
    smaller = la.basis.eigenvalues[:-1].sum() / la.basis.trace
    assert smaller < 0.8


def test_a_share_that_exceeds_the_memory_budget_is_capped_with_a_warning():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 997), nn.Tanh(), nn.Linear(997, C)).double().eval()
    p = make_problem("mlp", "regression")
    p = Problem("wide", "regression", model, p.x, p.y, p.x_test, p.landmarks, p.sigma_noise)
    n_weights = len(oracle.weights(model))
    with pytest.warns(UserWarning, match=r"memory|budget"):
        la = fit(p, n_eigenvalues=0.999999, memory_budget=4 * n_weights * 8)
    assert 1 <= la.basis.rank < M
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(p, n_eigenvalues=0.999999, memory_budget=10**9).basis.rank > la.basis.rank


@pytest.mark.parametrize("value", [0.0, 1.0, 1.5, -0.3, float("nan"), float("inf"), "0.5", True])
def test_a_share_outside_of_zero_to_one_is_refused(small_problem, value):
    with pytest.raises(ValueError, match="n_eigenvalues"):
        fit(small_problem, n_eigenvalues=value)


def test_a_share_is_restored_from_a_checkpoint(small_problem, tmp_path):
    p = small_problem
    la = fit(p, n_eigenvalues=0.9)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other = ELLALaplace(p.model, **p.options())
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    assert torch.equal(other.H, la.H)
    assert_close(other.basis.spectrum, la.basis.spectrum)
    other.fit(p.loader(), landmarks=p.landmarks)
    assert other.basis.rank == la.basis.rank


# ---------------------------------------------------------------------------- the spectrum


@pytest.mark.parametrize("rank", [2, 0.5, M])
def test_spectrum_holds_all_eigenvalues_whatever_the_rank(small_problem, rank):
    basis = fit(small_problem, n_eigenvalues=rank).basis
    assert basis.spectrum.shape == (M,)
    assert (basis.spectrum.diff() <= 0).all()
    assert_close(basis.spectrum, spectrum(small_problem))
    assert_close(basis.spectrum[: basis.rank], basis.eigenvalues)
    assert float(basis.spectrum.sum()) == pytest.approx(basis.trace)


@pytest.mark.filterwarnings("ignore")
def test_spectrum_can_be_drawn(small_problem):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ax = pyplot.figure().add_subplot()
    fit(small_problem, n_eigenvalues=3).basis.plot(ax)
    assert ax.has_data()
    fit(small_problem, n_eigenvalues=3).basis.plot()
    pyplot.close("all")


# ---------------------------------------------------------------------------- the error left


def captured(la: ELLALaplace, problem: Problem) -> float:
    J = oracle.jacobian(problem.model, problem.x_test)
    V = torch.cat([v.flatten(1) for v in la.basis.directions.values()], 1).T
    return float((J @ V).square().sum() / J.square().sum())


def full_span(likelihood: str) -> tuple[Problem, ELLALaplace]:
    p = make_problem("mlp", likelihood)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, C)).double().eval()
    landmarks = 2 * torch.randn(101, 2, dtype=F64), torch.arange(101) % C
    p = Problem("spanned", likelihood, model, p.x, p.y, p.x_test, landmarks, p.sigma_noise)
    n_weights = len(oracle.weights(model))
    la = fit(p, n_eigenvalues=n_weights)
    assert la.basis.rank == n_weights
    return p, la


def train_loader(problem: Problem) -> DataLoader:
    return DataLoader(TensorDataset(problem.x, problem.y), batch_size=5)


@pytest.mark.parametrize("rank", [2, K, M])
def test_captured_trace_is_close_to_the_dense_one(small_problem, rank):
    la = fit(small_problem, n_eigenvalues=rank)
    error = la.approximation_error(small_problem.x_test)
    assert 0 <= error.captured_trace <= 1
    assert error.captured_trace == pytest.approx(captured(la, small_problem), abs=0.25)
    assert error.covariance_error is None


def test_captured_trace_averages_to_the_dense_one(small_problem):
    estimates, exact = [], captured(fit(small_problem, n_eigenvalues=K), small_problem)
    for seed in range(40):
        la = fit(small_problem, n_eigenvalues=K, seed=seed, residual_samples=4)
        estimates.append(la.approximation_error(small_problem.x_test).captured_trace)
    assert sum(estimates) / 40 == pytest.approx(exact, abs=0.05)


def test_full_span_captures_everything(likelihood):
    p, la = full_span(likelihood)
    error = la.approximation_error(p.x_test, train_loader(p))
    assert error.captured_trace == pytest.approx(1, abs=1e-6)
    assert error.covariance_error == pytest.approx(0, abs=1e-6)


def test_covariance_error_is_that_against_exact_laplace(small_problem):
    p = small_problem
    la = fit(p, n_eigenvalues=K)
    full = FullLaplace(p.model, backend=GGNInterface, **p.options())
    full.fit(train_loader(p))
    _, exact = full._glm_predictive_distribution(p.x_test)
    _, ours = la._glm_predictive_distribution(p.x_test)
    error = la.approximation_error(p.x_test, train_loader(p)).covariance_error
    separate = float((ours - exact).norm() / exact.norm())
    _, exact = full._glm_predictive_distribution(p.x_test, joint=True)
    _, ours = la._glm_predictive_distribution(p.x_test, joint=True)
    together = float((ours - exact).norm() / exact.norm())
    assert error == pytest.approx(separate, rel=1e-5) or error == pytest.approx(together, rel=1e-5)
    assert error > 1e-3


def test_covariance_error_falls_with_rank(small_problem):
    p = small_problem
    errors = [
        fit(p, n_eigenvalues=rank).approximation_error(p.x_test, train_loader(p)).covariance_error
        for rank in (2, 5, 11)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_exact_residual_leaves_no_error_where_the_training_gradients_are_spanned(dtype):
    p = make_problem("mlp", "regression", dtype)
    p = Problem("few", "regression", p.model, p.x[:7], p.y[:7], p.x_test, p.landmarks, p.sigma_noise, 1.0)
    rows = p.x.repeat_interleave(C, 0), torch.arange(7 * C) % C
    la = fit(p, rows, n_eigenvalues=7 * C, residual="exact")
    assert la.approximation_error(p.x_test, train_loader(p)).covariance_error < 1e-5
    without = fit(p, rows, n_eigenvalues=7 * C)
    assert without.approximation_error(p.x_test, train_loader(p)).covariance_error > 1e-2


def test_the_estimator_and_its_model_are_as_before(small_problem):
    p = small_problem
    la = fit(p, n_eigenvalues=K)
    before, weights = la._glm_predictive_distribution(p.x_test), oracle.weights(p.model)
    flags = [m.training for m in p.model.modules()]
    la.approximation_error(p.x_test, train_loader(p))
    for ours, theirs in zip(la._glm_predictive_distribution(p.x_test), before):
        assert torch.equal(ours, theirs)
    assert torch.equal(oracle.weights(p.model), weights)
    assert [m.training for m in p.model.modules()] == flags
    assert all(w.grad is None for w in p.model.parameters())


def test_the_result_is_frozen(small_problem):
    error = fit(small_problem, n_eigenvalues=K).approximation_error(small_problem.x_test)
    assert isinstance(error.captured_trace, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        error.captured_trace = 0.0


def test_covariance_error_of_a_large_model_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 997), nn.Tanh(), nn.Linear(997, C)).double().eval()
    p = make_problem("mlp", "regression")
    p = Problem("wide", "regression", model, p.x, p.y, p.x_test, p.landmarks, p.sigma_noise)
    la = fit(p, n_eigenvalues=K)
    with pytest.raises(ValueError, match="5"):
        la.approximation_error(p.x_test, train_loader(p))
    assert la.approximation_error(p.x_test).covariance_error is None


def test_an_unfitted_estimator_has_no_error(small_problem):
    la = ELLALaplace(small_problem.model, **small_problem.options())
    with pytest.raises(AttributeError):
        la.approximation_error(small_problem.x_test)
