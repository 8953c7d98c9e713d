"""The evidence: its gradients, its tuning, and its relation to that of exact linearised Laplace."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from conftest import C, K, Problem, assert_close, make_problem
from laplace import FullLaplace
from laplace.curvature import GGNInterface
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ella import ELLALaplace

F64 = torch.float64
N_TENSORS, N_WEIGHTS = 4, 2 * 13 + 13 + 13 * C + C
PRIORS = {
    "scalar": torch.tensor([0.6], dtype=F64),
    "layerwise": torch.tensor([0.2, 1.7, 0.6, 3.1], dtype=F64),
    "diagonal": torch.logspace(-1, 1, N_WEIGHTS, dtype=F64),
}
STRUCTURES = {"scalar": 1, "layerwise": N_TENSORS, "diag": N_WEIGHTS}


def fit(problem: Problem, **options) -> ELLALaplace:
    la = ELLALaplace(
        problem.model, **problem.options(**{"n_eigenvalues": K, "curvature_size": None, **options})
    )
    la.fit(problem.loader(), landmarks=problem.landmarks)
    return la


def full_laplace(problem: Problem, **options) -> FullLaplace:
    full = FullLaplace(problem.model, backend=GGNInterface, **problem.options(**options))
    full.fit(DataLoader(TensorDataset(problem.x, problem.y), batch_size=5))
    return full


def central_differences(evidence, at: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """Gradient with respect to every entry, by relative steps."""
    gradient = torch.zeros_like(at)
    for i in range(at.numel()):
        sides = []
        for sign in (1, -1):
            moved = at.clone()
            moved[i] *= 1 + sign * step
            sides.append(float(evidence(moved)))
        gradient[i] = (sides[0] - sides[1]) / (2 * step * at[i])
    return gradient


# ---------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("structure", PRIORS)
def test_gradient_in_the_prior_precision_is_that_of_finite_differences(small_problem, structure):
    la, at = fit(small_problem, prior_mean=0.2), PRIORS[structure]
    leaf = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(la.log_marginal_likelihood(leaf), leaf)
    assert_close(gradient, central_differences(la.log_marginal_likelihood, at), rtol=1e-6)


def test_gradient_in_the_noise_is_that_of_finite_differences(dtype):
    la = fit(make_problem("mlp", "regression", dtype))
    at = torch.tensor([0.7], dtype=F64)
    leaf = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(la.log_marginal_likelihood(sigma_noise=leaf), leaf)
    expected = central_differences(lambda s: la.log_marginal_likelihood(sigma_noise=s), at)
    assert_close(gradient, expected, rtol=1e-6)


def test_gradients_in_prior_and_noise_together(dtype):
    la = fit(make_problem("mlp", "regression", dtype))
    prior, noise = (torch.tensor([v], dtype=F64, requires_grad=True) for v in (0.6, 0.7))
    joint = torch.autograd.grad(la.log_marginal_likelihood(prior, noise), (prior, noise))
    alone = (
        torch.autograd.grad(la.log_marginal_likelihood(prior, noise.detach()), prior)[0],
        torch.autograd.grad(la.log_marginal_likelihood(prior.detach(), noise), noise)[0],
    )
    for together, single in zip(joint, alone):
        assert_close(together, single)


def test_gradient_in_the_prior_precision_matches_its_closed_form(small_problem):
    """1/2 (K / delta - tr A^-1 - |theta* - mu0|^2)."""
    la = fit(small_problem, prior_mean=0.2)
    leaf = torch.tensor([0.6], dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(la.log_marginal_likelihood(leaf), leaf)
    scatter = (oracle.weights(small_problem.model) - 0.2).square().sum()
    expected = 0.5 * (K / 0.6 - la.posterior_covariance.trace() - scatter)
    assert_close(gradient, expected.reshape(1))


# ---------------------------------------------------------------------------- tuning


@pytest.mark.parametrize("structure", STRUCTURES)
def test_marglik_reaches_a_higher_evidence(small_problem, structure):
    la = fit(small_problem, temperature=1.0)
    start = torch.tensor(5.0, dtype=F64)
    before = float(la.log_marginal_likelihood(start))
    la.optimize_prior_precision(method="marglik", prior_structure=structure, init_prior_prec=5.0, n_steps=40)
    assert la.prior_precision.shape == (STRUCTURES[structure],)
    assert not la.prior_precision.requires_grad
    assert float(la.log_marginal_likelihood()) > before + 1e-3


@pytest.mark.parametrize("structure", STRUCTURES)
def test_predictions_after_marglik_use_the_new_prior(small_problem, structure):
    p = small_problem
    la = fit(p, temperature=1.0)
    la.optimize_prior_precision(method="marglik", prior_structure=structure, n_steps=10)
    other = fit(p, temperature=1.0, prior_precision=la.prior_precision)
    assert (la.prior_precision - 1).abs().max() > 1e-3
    for ours, expected in zip(
        la._glm_predictive_distribution(p.x_test, joint=True),
        other._glm_predictive_distribution(p.x_test, joint=True),
    ):
        assert_close(ours, expected)
    prediction = la(p.x_test)
    for part in prediction if isinstance(prediction, tuple) else (prediction,):
        assert part.isfinite().all()
        assert not part.requires_grad


def test_a_finer_structure_of_the_prior_reaches_at_least_the_evidence_of_a_coarser_one(small_problem):
    reached = []
    for structure in STRUCTURES:
        la = fit(small_problem, temperature=1.0)
        la.optimize_prior_precision(method="marglik", prior_structure=structure, n_steps=300)
        reached.append(float(la.log_marginal_likelihood()))
    assert reached[0] < reached[1] < reached[2]


def test_online_tuning_of_prior_and_noise_as_in_the_hosts_regression_example(dtype):
    p = make_problem("mlp", "regression", dtype)
    la = fit(p, temperature=1.0, sigma_noise=1.0, prior_precision=1.0)
    log_prior, log_sigma = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = torch.optim.Adam([log_prior, log_sigma], lr=1e-1)
    evidence = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = -la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())
        loss.backward()
        optimizer.step()
        evidence.append(-float(loss.detach()))
    assert evidence[-1] > evidence[0] + 1
    assert math.isfinite(evidence[-1])
    # It ends near the stationary point in sigma.
    best = max(
        float(la.log_marginal_likelihood(sigma_noise=torch.tensor([s], dtype=F64)).detach())
        for s in torch.linspace(0.3, 3, 271).tolist()
    )
    assert evidence[-1] == pytest.approx(best, abs=0.05)


def test_online_tuning_ends_in_usable_predictions(dtype):
    p = make_problem("mlp", "regression", dtype)
    la = fit(p, temperature=1.0)
    log_prior, log_sigma = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([log_prior, log_sigma], lr=1e-1)
    for _ in range(5):
        optimizer.zero_grad()
        (-la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())).backward()
        optimizer.step()
    prior, sigma = float(la.prior_precision.detach()), float(la.sigma_noise.detach())
    expected = fit(p, temperature=1.0, prior_precision=prior, sigma_noise=sigma)
    for ours, theirs in zip(la(p.x_test), expected(p.x_test)):
        assert_close(ours.detach(), theirs, rtol=1e-6)


# ---------------------------------------------------------------------------- against exact LLA


@pytest.mark.parametrize("prior_precision", [0.05, 0.6, 20.0])
def test_evidence_of_a_small_span_is_above_the_exact_one_and_falls_with_rank(small_problem, prior_precision):
    exact = float(full_laplace(small_problem, prior_precision=prior_precision).log_marginal_likelihood())
    values = [
        float(
            fit(small_problem, n_eigenvalues=rank, prior_precision=prior_precision).log_marginal_likelihood()
        )
        for rank in (2, 5, 11)
    ]
    assert values[0] > values[1] > values[2] > exact


@pytest.mark.parametrize("prior", PRIORS)
def test_evidence_of_the_full_span_is_the_exact_one(likelihood, prior):
    p = make_problem("mlp", likelihood)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, C)).double().eval()
        landmarks = 2 * torch.randn(101, 2, dtype=F64), torch.arange(101) % C
    n_weights = 2 * 5 + 5 + 5 * C + C
    delta = PRIORS[prior] if prior != "diagonal" else torch.logspace(-1, 1, n_weights, dtype=F64)
    p = Problem("spanned", likelihood, model, p.x, p.y, p.x_test, landmarks, p.sigma_noise)
    la = fit(p, n_eigenvalues=n_weights, prior_precision=delta, prior_mean=0.2)
    assert la.basis.rank == n_weights
    exact = full_laplace(p, prior_precision=delta, prior_mean=0.2).log_marginal_likelihood()
    assert_close(la.log_marginal_likelihood(), exact, rtol=1e-7)


def test_evidence_of_the_span_of_all_training_gradients_is_the_exact_one(dtype):
    """Scalar prior: what lies outside of the training gradients is as the prior has it."""
    p = make_problem("mlp", "regression", dtype)
    p = Problem("few", "regression", p.model, p.x[:7], p.y[:7], p.x_test, p.landmarks, p.sigma_noise)
    rows = p.x.repeat_interleave(C, 0), torch.arange(7 * C) % C
    la = ELLALaplace(p.model, **p.options(n_eigenvalues=7 * C, curvature_size=None))
    la.fit(p.loader(), landmarks=rows)
    assert la.basis.rank == 7 * C < N_WEIGHTS
    assert_close(la.log_marginal_likelihood(), full_laplace(p).log_marginal_likelihood(), rtol=1e-7)
