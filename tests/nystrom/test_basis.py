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


def fit(problem: Problem, landmarks=None, **options) -> ELLALaplace:
    la = ELLALaplace(problem.model, **problem.options(**{"curvature_size": None, **options}))
    la.fit(problem.loader(), landmarks=landmarks or problem.landmarks)
    return la


def with_model(width: int, landmarks=None, likelihood: str = "regression") -> Problem:
    """The problem of the MLP, for one of another width."""
    p = make_problem("mlp", likelihood)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, C)).double().eval()
    return dataclasses.replace(p, name="other", model=model, landmarks=landmarks or p.landmarks)


def spectrum(problem: Problem) -> torch.Tensor:
    """Eigenvalues of R R^T (M,), descending."""
    return torch.linalg.eigvalsh(oracle.gram(oracle.gradient_rows(problem.model, *problem.landmarks))).flip(0)


def train_loader(problem: Problem) -> DataLoader:
    return DataLoader(TensorDataset(problem.x, problem.y), batch_size=5)


# ---------------------------------------------------------------------------- the rank


def test_rank_is_the_smallest_that_retains_the_share(small_problem):
    p, values = small_problem, spectrum(small_problem)
    retained = values.cumsum(0) / values.sum()
    ranks = []
    for share in (1e-6, 0.3, 0.5, 0.9, 0.99, 0.9999):
        ranks.append(int((retained < share).sum()) + 1)
        la = fit(p, n_eigenvalues=share)
        assert la.basis.rank == ranks[-1]
        assert la.basis.retained >= share
        assert la.basis.retained == pytest.approx(float(retained[ranks[-1] - 1]))
        by_rank = fit(p, n_eigenvalues=ranks[-1])
        assert_close(la.H, by_rank.H)
        moments = (a._glm_predictive_distribution(p.x_test) for a in (la, by_rank))
        for ours, theirs in zip(*moments):
            assert_close(ours, theirs)
    assert len(set(ranks)) > 3


def test_a_share_that_exceeds_the_memory_budget_is_capped_with_a_warning():
    p = with_model(997)
    row = 8 * len(oracle.weights(p.model))
    with pytest.warns(UserWarning, match=r"memory|budget"):
        la = fit(p, n_eigenvalues=0.999999, memory_budget=4 * row)
    assert 1 <= la.basis.rank < M
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(p, n_eigenvalues=0.999999, memory_budget=10**9).basis.rank > la.basis.rank


@pytest.mark.parametrize("value", [0.0, 1.0, 1.5, -0.3, float("nan"), float("inf"), "0.5", True])
def test_a_share_outside_of_zero_to_one_is_refused(small_problem, value):
    with pytest.raises(ValueError, match="n_eigenvalues"):
        fit(small_problem, n_eigenvalues=value)


def test_a_share_is_restored_from_a_checkpoint_and_chosen_anew_at_every_fit(small_problem, tmp_path):
    p = small_problem
    la = fit(p, n_eigenvalues=0.9)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other = ELLALaplace(p.model, **p.options())
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    assert torch.equal(other.H, la.H)
    assert_close(other.basis.spectrum, la.basis.spectrum)
    other.fit(p.loader(), landmarks=tuple(t[:2] for t in p.landmarks))
    assert other.basis.rank <= 2
    other.fit(p.loader(), landmarks=p.landmarks)  # the share is chosen anew
    assert other.basis.rank == la.basis.rank


# ---------------------------------------------------------------------------- the spectrum


@pytest.mark.parametrize("rank", [2, 0.5, M])
def test_spectrum_holds_all_eigenvalues_whatever_the_rank(small_problem, rank):
    basis = fit(small_problem, n_eigenvalues=rank).basis
    assert_close(basis.spectrum, spectrum(small_problem))
    assert_close(basis.spectrum[: basis.rank], basis.eigenvalues)
    assert float(basis.spectrum.sum()) == pytest.approx(basis.trace)
    largest = basis.coefficients.abs().argmax(0, keepdim=True)
    assert (basis.coefficients.gather(0, largest) > 0).all()  # the sign, which eigenvectors leave open


@pytest.mark.filterwarnings("ignore")
def test_spectrum_can_be_drawn(small_problem):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    basis = fit(small_problem, n_eigenvalues=3).basis
    ax = pyplot.figure().add_subplot()
    assert basis.plot(ax) is ax
    assert basis.plot().has_data()
    for drawn in (ax, pyplot.gca()):
        assert drawn.has_data()
    with pytest.raises(ValueError, match="ax must be one of matplotlib's Axes, or None"):
        basis.plot(pyplot.figure())
    pyplot.close("all")


# ---------------------------------------------------------------------------- the error left


@pytest.mark.parametrize("rank", [2, K, M])
def test_captured_trace_is_close_to_the_dense_one_and_averages_to_it(small_problem, rank):
    p = small_problem
    la = fit(p, n_eigenvalues=rank)
    J = oracle.jacobian(p.model, p.x_test)
    V = oracle.dense(la.basis.directions)
    exact = float((J @ V).square().sum() / J.square().sum())
    error = la.approximation_error(p.x_test)
    assert 0 <= error.captured_trace <= 1
    assert error.captured_trace == pytest.approx(exact, abs=0.25)
    assert error.covariance_error is None
    estimates = [
        fit(p, n_eigenvalues=rank, seed=seed, residual_samples=4).approximation_error(p.x_test).captured_trace
        for seed in range(30)
    ]
    assert sum(estimates) / 30 == pytest.approx(exact, abs=0.05)


def test_full_span_captures_everything(likelihood):
    p = with_model(5, (2 * torch.randn(101, 2, dtype=torch.float64), torch.arange(101) % C), likelihood)
    la = fit(p, n_eigenvalues=len(oracle.weights(p.model)))
    error = la.approximation_error(p.x_test, train_loader(p))
    assert error.captured_trace == pytest.approx(1, abs=1e-6)
    assert error.covariance_error == pytest.approx(0, abs=1e-6)


def test_covariance_error_is_that_against_exact_laplace_and_falls_with_rank(small_problem):
    p = small_problem
    full = FullLaplace(p.model, backend=GGNInterface, **p.options())
    full.fit(train_loader(p))
    found = []
    for rank in (2, K, M):
        la = fit(p, n_eigenvalues=rank)
        error = la.approximation_error(p.x_test, train_loader(p)).covariance_error
        expected = []
        for joint in (False, True):
            ours, exact = (a._glm_predictive_distribution(p.x_test, joint=joint)[1] for a in (la, full))
            expected.append(float((ours - exact).norm() / exact.norm()))
        assert any(error == pytest.approx(e, rel=1e-5) for e in expected)
        found.append(error)
    assert found[0] > found[1] > found[2] > 1e-3


def test_exact_residual_leaves_no_error_where_the_training_gradients_are_spanned(dtype):
    p = make_problem("mlp", "regression", dtype)
    p = dataclasses.replace(p, x=p.x[:7], y=p.y[:7], temperature=1.0)
    rows = p.x.repeat_interleave(C, 0), torch.arange(7 * C) % C
    errors = [
        fit(p, rows, n_eigenvalues=7 * C, residual=kind).approximation_error(p.x_test, train_loader(p))
        for kind in ("exact", "none")
    ]
    assert errors[0].covariance_error < 1e-5
    assert errors[1].covariance_error > 1e-2


def test_covariance_error_of_a_large_model_is_refused():
    p = with_model(997)
    la = fit(p, n_eigenvalues=K)
    with pytest.raises(ValueError, match="5"):
        la.approximation_error(p.x_test, train_loader(p))
    assert la.approximation_error(p.x_test).covariance_error is None
