"""The evidence: its gradients, loops that maximise it, and its relation to that of exact linearised Laplace."""

import dataclasses

import oracle
import pytest
import torch
from conftest import C, assert_close, make_problem
from helpers import build, fitted, full_laplace
from helpers import fit_problem as fit
from torch import nn

F64 = torch.float64
N_TENSORS, N_WEIGHTS = 4, 2 * 13 + 13 + 13 * C + C
PRIORS = {
    "scalar": torch.tensor([0.6], dtype=F64),
    "layerwise": torch.tensor([0.2, 1.7, 0.6, 3.1], dtype=F64),
    "diagonal": torch.logspace(-1, 1, N_WEIGHTS, dtype=F64),
}


@pytest.mark.parametrize("structure", PRIORS)
def test_gradients_in_prior_and_noise_are_those_of_finite_differences(small_problem, structure):
    la, leaves = fit(small_problem, prior_mean=0.2), [PRIORS[structure].clone().requires_grad_()]
    if small_problem.likelihood == "regression":
        leaves.append(torch.tensor([0.7], dtype=F64, requires_grad=True))
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, tuple(leaves))


def test_evidence_at_other_hyperparameters_keeps_them():
    la = fitted("regression")
    la.log_marginal_likelihood(torch.tensor(3.0), torch.tensor(0.5))
    assert (la.prior_precision.item(), la.sigma_noise.item()) == (3.0, 0.5)
    torch.testing.assert_close(la.posterior_precision, la.H / 0.25 + 3 * torch.eye(5, dtype=F64))
    with pytest.raises(ValueError, match="regression"):
        fitted().log_marginal_likelihood(sigma_noise=torch.tensor(0.5))
    with pytest.raises(AttributeError, match="fit"):
        build().log_marginal_likelihood()


@pytest.mark.parametrize("prior_precision", [0.05, 0.6, 20.0])
def test_evidence_of_a_small_span_is_above_the_exact_one_and_falls_with_rank(small_problem, prior_precision):
    exact = full_laplace(small_problem, prior_precision=prior_precision).log_marginal_likelihood()
    fits = (fit(small_problem, n_eigenvalues=k, prior_precision=prior_precision) for k in (2, 5, 11))
    values = [float(la.log_marginal_likelihood()) for la in fits]
    assert values[0] > values[1] > values[2] > float(exact)


@pytest.mark.parametrize("prior", PRIORS)
def test_evidence_of_the_full_span_is_the_exact_one(likelihood, prior):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, C)).double().eval()
        landmarks = 2 * torch.randn(101, 2, dtype=F64), torch.arange(101) % C
    n_weights = len(oracle.weights(model))
    delta = PRIORS[prior] if prior != "diagonal" else torch.logspace(-1, 1, n_weights, dtype=F64)
    p = dataclasses.replace(make_problem("mlp", likelihood), model=model, landmarks=landmarks)
    la = fit(p, n_eigenvalues=n_weights, prior_precision=delta, prior_mean=0.2)
    assert la.basis.rank == n_weights
    exact = full_laplace(p, prior_precision=delta, prior_mean=0.2).log_marginal_likelihood()
    assert_close(la.log_marginal_likelihood(), exact, rtol=1e-7)
