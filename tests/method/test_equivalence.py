"""Other roads to the same numbers: FullLaplace, closed-form regression, laplace-torch's own ELLA."""

from __future__ import annotations

from dataclasses import replace

import laplace
import oracle
import pytest
import torch
from conftest import B, C, Problem, assert_close, make_problem
from laplace import FullLaplace
from laplace.curvature import GGNInterface
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ella import ELLALaplace

PRIOR_MEAN = 0.2
N_WEIGHTS = 2 * 5 + 5 + 5 * 3 + 3
PRIORS = {
    "scalar": torch.tensor([0.6], dtype=torch.float64),
    "layerwise": torch.tensor([0.2, 1.7, 0.6, 3.1], dtype=torch.float64),
    "diagonal": torch.logspace(-1, 1, N_WEIGHTS, dtype=torch.float64),
}


def spanning_problem(likelihood: str) -> Problem:
    """A network small enough that 33 weights are spanned by well-conditioned landmarks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, C)).double().eval()
        landmarks = 2 * torch.randn(101, 2, dtype=torch.float64), torch.arange(101) % C
    return replace(make_problem("mlp", likelihood), model=model, landmarks=landmarks)


def spanning(problem: Problem, **options) -> ELLALaplace:
    """K = P: the basis spans all weights."""
    n_weights = len(oracle.weights(problem.model))
    la = ELLALaplace(problem.model, n_eigenvalues=n_weights, **options)
    la.fit(problem.loader(), landmarks=problem.landmarks)
    assert la.basis.rank == n_weights
    return la


@pytest.fixture(params=PRIORS)
def pair(request, likelihood) -> tuple[Problem, ELLALaplace, FullLaplace]:
    problem = spanning_problem(likelihood)
    options = problem.options(prior_precision=PRIORS[request.param], prior_mean=PRIOR_MEAN)
    full = FullLaplace(problem.model, backend=GGNInterface, **options)
    full.fit(DataLoader(TensorDataset(problem.x, problem.y), batch_size=5))
    return problem, spanning(problem, **options), full


# A basis of condition 1e4 is orthonormal to about 1e-9 only.
RTOL = 1e-7


def test_full_span_equals_full_laplace(pair):
    problem, la, full = pair
    for joint in (False, True):
        moments = (a._glm_predictive_distribution(problem.x_test, joint=joint) for a in (la, full))
        for ours, theirs, name in zip(*moments, ("mean", "covariance")):
            assert_close(ours, theirs, RTOL, name=name)
    assert_close(la.loss, full.loss, name="loss")
    assert_close(la.log_marginal_likelihood(), full.log_marginal_likelihood(), RTOL, name="evidence")
    assert_close(la.scatter, full.scatter, name="scatter")
    assert_close(la.log_det_ratio, full.log_det_ratio, RTOL, name="log determinants")
    V = oracle.dense(la.basis.directions)
    assert_close(V @ la.posterior_covariance @ V.T, full.posterior_covariance, RTOL)
    assert_close(V @ la.H @ V.T, full.H, RTOL)
    if problem.likelihood == "regression":
        for options in ({}, {"joint": True}, {"diagonal_output": True}):
            for ours, theirs in zip(la(problem.x_test, **options), full(problem.x_test, **options)):
                assert_close(ours, theirs, RTOL, name=str(options))
        return
    for link in ("probit", "bridge", "bridge_norm"):
        theirs = full(problem.x_test, link_approx=link)
        assert_close(la(problem.x_test, link_approx=link), theirs, 10 * RTOL, name=link)


def test_linear_model_is_bayesian_linear_regression(dtype):
    """Closed form: f = W x + b, one row of weights per output, known noise."""
    problem = make_problem("mlp", "regression", dtype)
    model = nn.Linear(2, C).to(dtype)
    design = torch.cat([problem.x, torch.ones(len(problem.x), 1, dtype=dtype)], 1)
    delta, sigma = problem.prior_precision, problem.sigma_noise
    precision = design.T @ design / sigma**2 + delta * torch.eye(3, dtype=dtype)
    map_weights = torch.linalg.solve(precision, design.T @ problem.y / sigma**2)  # (3, C)
    with torch.no_grad():
        model.weight.copy_(map_weights[:2].T)
        model.bias.copy_(map_weights[2])
    landmarks = problem.x[: 3 * C], torch.arange(3 * C) % C
    la = ELLALaplace(model, "regression", sigma, delta, n_eigenvalues=3 * C)
    la.fit(problem.loader(), landmarks=landmarks)

    test = torch.cat([problem.x_test, torch.ones(B, 1, dtype=dtype)], 1)
    mean, cov = la(problem.x_test)
    assert_close(mean, test @ map_weights)
    kernel = test @ torch.linalg.inv(precision) @ test.T
    assert_close(cov, kernel.diagonal()[:, None, None] * torch.eye(C, dtype=dtype))
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    pairs = zip(("glm", "nn"), generators)
    assert_close(*(la.functional_samples(problem.x_test, k, 13, generator=g) for k, g in pairs))
    _, joint = la(problem.x_test, joint=True)
    assert_close(joint, torch.kron(kernel, torch.eye(C, dtype=dtype)))
    # p(y): each output is N(0, X X^T / delta + sigma^2 I) on its own.
    marginal = design @ design.T / delta + sigma**2 * torch.eye(len(design), dtype=dtype)
    exact = torch.distributions.MultivariateNormal(torch.zeros(len(design), dtype=dtype), marginal)
    assert_close(la.log_marginal_likelihood(), exact.log_prob(problem.y.T).sum())


def drawn_pairs(x, batch: int, subsample_size: int, seed: int):
    """The landmarks that laplace.ELLA draws: a permutation, then outputs batch by batch."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:subsample_size]
    generator = torch.Generator().manual_seed(seed + 1)
    outputs = [torch.randint(C, (len(part),), generator=generator) for part in order.split(batch)]
    return x[order], torch.cat(outputs)


@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm", "residual_inplace"])
def test_same_landmarks_equal_the_hosts_own_ella(name, likelihood, dtype):
    if not hasattr(laplace, "ELLA"):
        pytest.skip("laplace-torch has an ELLA of its own from 0.3 on; this is an older one")
    problem, rank, seed = make_problem(name, likelihood, dtype), 5, 1234
    options = problem.options(temperature=1.0)
    flavour = {"subset_of_weights": "all", "hessian_structure": "gp", "functional_approximation": "nystrom"}
    sizes = {"subsample_size": 11, "n_eigenvalues": rank, "seed": seed, "backend": GGNInterface}
    theirs = laplace.Laplace(problem.model, **flavour, **sizes, **options)
    assert isinstance(theirs, laplace.ELLA)
    theirs.fit(DataLoader(TensorDataset(problem.x, problem.y), batch_size=5))
    ours = ELLALaplace(problem.model, n_eigenvalues=rank, curvature_size=None, **options)
    ours.fit(problem.loader(), landmarks=drawn_pairs(problem.x, 5, 11, seed))

    V = oracle.dense(ours.basis.directions)
    signs = (V * theirs.dual_directions).sum(0).sign()
    assert_close(V, theirs.dual_directions * signs, name="V")
    assert_close(ours.H, theirs.feature_gram * torch.outer(signs, signs), name="G")
    x = problem.x_test
    if likelihood == "regression":
        for joint in (False, True):
            for a, b in zip(ours(x, joint=joint), theirs(x, pred_type="gp", joint=joint)):
                assert_close(a, b, name=f"moments, joint={joint}")
    else:
        for link in ("probit", "bridge", "bridge_norm"):
            expected = theirs(x, pred_type="gp", link_approx=link)
            assert_close(ours(x, link_approx=link), expected, rtol=1e-7, name=link)
