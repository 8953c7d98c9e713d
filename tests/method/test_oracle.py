"""Every quantity, on every problem, against the slow twin in oracle.py."""

from __future__ import annotations

import functools
from itertools import product

import oracle
import pytest
import torch
from conftest import LIKELIHOODS, MODELS, C, K, M, N, Problem, assert_close, make_problem
from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsGGN

from laplace_ella import ELLALaplace
from laplace_ella.network.functional import FunctionalModel
from laplace_ella.network.gradients import asdl_rows, backpack_rows, gradient_rows
from laplace_ella.network.safety import safely

PRIOR_MEAN = 0.2


def fit(problem: Problem, landmarks=None, **options) -> ELLALaplace:
    options = problem.options(prior_mean=PRIOR_MEAN, n_eigenvalues=K, curvature_size=None, **options)
    la = ELLALaplace(problem.model, **options)
    la.fit(problem.loader(), landmarks=problem.landmarks if landmarks is None else landmarks)
    return la


class Case:
    """A fitted estimator, and what it should have computed."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        problem.model.train()  # both must evaluate in evaluation mode all the same
        self.la = fit(problem)
        model, x, sigma, T = problem.model, problem.x, problem.sigma_noise, problem.temperature
        self.rows = oracle.gradient_rows(model, *problem.landmarks)
        V, self.eigenvalues, self.trace = oracle.basis(self.rows, K)
        self.V = V = oracle.with_signs_of(V, oracle.dense(self.la.basis.directions))
        self.f_train, self.f = oracle.outputs(model, x), oracle.outputs(model, problem.x_test)
        self.phi = oracle.features(model, problem.x_test, V)
        self.G = oracle.curvature(oracle.features(model, x, V), self.f_train, problem.likelihood)
        self.prior = oracle.prior_matrix(model, problem.prior_precision)
        self.projected_prior = V.T @ self.prior @ V
        self.A = oracle.precision(self.G, self.projected_prior, sigma, T)
        self.cov = oracle.covariance(self.phi, self.A)


@functools.cache
def made(name: str, likelihood: str, dtype: torch.dtype) -> Case:
    return Case(make_problem(name, likelihood, dtype))


@pytest.fixture(scope="module", params=list(product(MODELS, LIKELIHOODS)), ids="-".join)
def case(request, dtype) -> Case:
    return made(*request.param, dtype)


# What the two libraries that know layers by name cannot do: (engine, problem) -> what they say.
REFUSED = {
    (backpack_rows, "tied"): (ValueError, r"no correct per-sample gradient for first\.weight"),
    (asdl_rows, "tied"): (ValueError, r"no correct per-sample gradient for first\.weight"),
    (backpack_rows, "residual_inplace"): (ValueError, "BackPACK cannot differentiate this model"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", [gradient_rows, backpack_rows, asdl_rows])
def test_gradient_rows(engine, name, dtype):
    problem = make_problem(name, "regression", dtype)
    function = FunctionalModel(problem.model)
    x, outputs = problem.landmarks
    of_engine = lambda: engine(function, function.weights(), x, outputs)  # noqa: E731
    compute = functools.partial(safely, problem.model, of_engine)
    if (engine, name) in REFUSED:
        error, message = REFUSED[engine, name]
        with pytest.raises(error, match=message):
            compute()
        return
    rows = compute()
    expected = oracle.gradient_rows(problem.model, x, outputs)
    # BackPACK has rows for frozen weights too; its backend refuses such models.
    flat = torch.cat([rows[k].flatten(1) for k in function.weights()], 1)
    assert_close(flat, expected)


@pytest.mark.parametrize("backend", [CurvlinopsGGN, BackPackGGN, AsdlGGN])
def test_backends_give_one_estimator(small_problem, backend):
    ours, default = fit(small_problem, backend=backend), fit(small_problem)
    assert_close(oracle.dense(ours.basis.directions), oracle.dense(default.basis.directions))
    assert_close(ours.H, default.H)


def test_basis(case):
    basis = case.la.basis
    assert_close(basis.eigenvalues, case.eigenvalues)
    assert_close(torch.tensor(basis.trace, dtype=torch.float64), case.trace)
    assert basis.n_landmarks == M
    assert basis.retained == pytest.approx(float(case.eigenvalues.sum() / case.trace), rel=1e-9)
    assert_close(oracle.dense(basis.directions), case.V)


def test_curvature_and_posterior(case):
    la = case.la
    assert la.H.dtype == torch.float64
    assert_close(la.H, case.G)
    p = case.problem
    assert_close(la.loss, oracle.loss(case.f_train, p.y, p.likelihood))
    assert (la.n_data, la.n_outputs) == (N, C)
    theta = oracle.weights(p.model)
    assert_close(la.mean, theta)
    of_data, noise = (case.f_train, p.y, p.likelihood), (p.sigma_noise, p.temperature)
    prior = case.projected_prior, case.prior, theta - PRIOR_MEAN
    assert_close(la.log_marginal_likelihood(), oracle.log_evidence(*of_data, case.A, *prior, *noise))
    assert_close(la.posterior_precision, case.A)
    assert_close(la.posterior_covariance, torch.linalg.inv(case.A))
    assert_close(la.posterior_scale @ la.posterior_scale.T, torch.linalg.inv(case.A))
    assert_close(la.log_det_posterior_precision, torch.logdet(case.A))
    assert_close(la.log_det_prior_precision, torch.logdet(case.projected_prior))


def test_features_and_moments(case):
    la, x = case.la, case.problem.x_test
    phi, _ = la.features(x)
    assert_close(la.functional_variance(phi), case.cov)
    assert_close(la.functional_covariance(phi), oracle.joint_covariance(case.phi, case.A))
    assert_close(la.backend.jacobians(x)[0], phi)
    mean, cov = la._glm_predictive_distribution(x)
    assert_close(mean, case.f)
    assert_close(cov, case.cov)


def test_predictions(case):
    la, x = case.la, case.problem.x_test
    variances = case.cov.diagonal(dim1=1, dim2=2)
    if case.problem.likelihood == "regression":
        joint = case.f.flatten(), oracle.joint_covariance(case.phi, case.A)
        expected = {"joint": joint, "diagonal_output": (case.f, variances)}
        for ours, theirs in zip(la(x), (case.f, case.cov)):
            assert_close(ours, theirs)
        for option, moments in expected.items():
            for ours, theirs in zip(la(x, **{option: True}), moments):
                assert_close(ours, theirs, name=option)
        return
    assert_close(la(x, link_approx="probit"), oracle.probit(case.f, case.cov))
    for link in ("bridge", "bridge_norm"):
        expected = oracle.bridge(case.f, case.cov, normalize=link == "bridge_norm")
        # The corrected variances are small differences of large numbers.
        assert_close(la(x, link_approx=link), expected, rtol=1e-7, name=link)
    n_samples = 40_000
    for diagonal, cov in ((False, case.cov), (True, torch.diag_embed(variances))):
        expected = oracle.monte_carlo(case.f, cov, n_samples, torch.Generator().manual_seed(1))
        actual = la(x, link_approx="mc", n_samples=2**12, diagonal_output=diagonal)
        # A probability has a standard deviation of at most 1/2, the quasi-random error is smaller still.
        assert_close(actual, expected, rtol=0, atol=5 * 0.5 / n_samples**0.5)
