"""Every quantity, on every problem, against the slow twin in oracle.py."""

from __future__ import annotations

import functools

import oracle
import pytest
import torch
from conftest import LIKELIHOODS, MODELS, B, C, K, M, N, Problem, assert_close, make_problem
from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsGGN

from laplace_ella import ELLALaplace, ReverseNystromGGN
from laplace_ella.network.features import Chunks, forward_features, reverse_features
from laplace_ella.network.functional import FunctionalModel
from laplace_ella.network.gradients import asdl_rows, backpack_rows, gradient_rows
from laplace_ella.network.safety import safely

PRIOR_MEAN = 0.2


def fit(problem: Problem, landmarks=None, **options) -> ELLALaplace:
    options = problem.options(prior_mean=PRIOR_MEAN, n_eigenvalues=K, curvature_size=None, **options)
    la = ELLALaplace(problem.model, **options)
    la.fit(problem.loader(), landmarks=problem.landmarks if landmarks is None else landmarks)
    return la


def dense_directions(la: ELLALaplace) -> torch.Tensor:
    return oracle.dense(la.basis.directions)


class Case:
    """A fitted estimator, and what it should have computed."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        problem.model.train()  # both must evaluate in evaluation mode all the same
        self.la = fit(problem)
        model, x, sigma, T = problem.model, problem.x, problem.sigma_noise, problem.temperature
        self.rows = oracle.gradient_rows(model, *problem.landmarks)
        V, self.eigenvalues, self.trace = oracle.basis(self.rows, K)
        self.V = V = oracle.with_signs_of(V, dense_directions(self.la))
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


@pytest.fixture(
    scope="module", params=[(name, like) for name in MODELS for like in LIKELIHOODS], ids="-".join
)
def case(request, dtype) -> Case:
    return made(*request.param, dtype)


@pytest.fixture(scope="module", params=MODELS)
def classification(request, dtype) -> Case:
    return made(request.param, "classification", dtype)


@pytest.fixture(scope="module", params=MODELS)
def regression(request, dtype) -> Case:
    return made(request.param, "regression", dtype)


def test_sizes_are_distinct(case):
    P = len(oracle.weights(case.problem.model))
    assert case.la.features(case.problem.x_test)[0].shape == (B, C, K)
    assert len({B, C, K, M, N, P}) == 6


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
    compute = functools.partial(
        safely, problem.model, lambda: engine(function, function.weights(), x, outputs)
    )
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
    assert_close(dense_directions(ours), dense_directions(default))
    assert_close(ours.H, default.H)


def test_basis(case):
    basis = case.la.basis
    assert_close(basis.eigenvalues, case.eigenvalues)
    assert_close(torch.tensor(basis.trace, dtype=torch.float64), case.trace)
    assert basis.n_landmarks == M
    assert basis.retained == pytest.approx(float(case.eigenvalues.sum() / case.trace), rel=1e-9)
    assert_close(oracle.dense(basis.directions), case.V)


@pytest.mark.parametrize("chunks", [Chunks(1, 1), Chunks(2, 3), Chunks(B, K), Chunks(100, 100)])
@pytest.mark.parametrize("project", [forward_features, reverse_features])
def test_features_do_not_depend_on_mode_or_chunks(case, project, chunks):
    function = FunctionalModel(case.problem.model)
    directions, x = case.la.basis.directions, case.problem.x_test
    phi, f = safely(function.module, lambda: project(function, function.weights(), directions, x, chunks))
    assert_close(phi, case.phi, name="phi")
    assert_close(f, case.f, name="f")


@pytest.mark.parametrize("options", [{"backend": ReverseNystromGGN}, {"chunk_size": 2}, {"chunk_size": 100}])
def test_estimator_does_not_depend_on_mode_or_chunks(small_problem, options):
    la, default = fit(small_problem, **options), fit(small_problem)
    assert_close(la.features(small_problem.x_test)[0], default.features(small_problem.x_test)[0])
    assert_close(la.H, default.H)


def test_curvature_and_posterior(case):
    la = case.la
    assert la.H.dtype == torch.float64
    assert_close(la.H, case.G)
    assert_close(la.posterior_precision, case.A)
    assert_close(la.posterior_covariance, torch.linalg.inv(case.A))
    assert_close(la.posterior_scale @ la.posterior_scale.T, torch.linalg.inv(case.A))
    assert_close(la.log_det_posterior_precision, torch.logdet(case.A))
    assert_close(la.log_det_prior_precision, torch.logdet(case.projected_prior))


def test_features_and_moments(case):
    la, x = case.la, case.problem.x_test
    phi, f = la.features(x)
    assert_close(phi, case.phi, name="phi")
    assert_close(f, case.f, name="f")
    assert_close(la.functional_variance(phi), case.cov)
    assert_close(la.functional_covariance(phi), oracle.joint_covariance(case.phi, case.A))
    assert_close(la.backend.jacobians(x)[0], phi)
    mean, cov = la._glm_predictive_distribution(x)
    assert_close(mean, case.f)
    assert_close(cov, case.cov)


def test_regression_predictions(regression):
    case = regression
    x = case.problem.x_test
    mean, cov = case.la(x)
    assert_close(mean, case.f)
    assert_close(cov, case.cov)
    mean, var = case.la(x, diagonal_output=True)
    assert_close(mean, case.f)
    assert_close(var, case.cov.diagonal(dim1=1, dim2=2))
    mean, joint = case.la(x, joint=True)
    assert_close(mean, case.f.flatten())
    assert_close(joint, oracle.joint_covariance(case.phi, case.A))


def test_probit(classification):
    probabilities = classification.la(classification.problem.x_test, link_approx="probit")
    assert_close(probabilities, oracle.probit(classification.f, classification.cov))


@pytest.mark.parametrize("link", ["bridge", "bridge_norm"])
def test_bridge(classification, link):
    probabilities = classification.la(classification.problem.x_test, link_approx=link)
    expected = oracle.bridge(classification.f, classification.cov, normalize=link == "bridge_norm")
    # The corrected variances are small differences of large numbers.
    assert_close(probabilities, expected, rtol=1e-7)


@pytest.mark.parametrize("diagonal_output", [False, True])
def test_monte_carlo(classification, diagonal_output):
    la, problem = classification.la, classification.problem
    cov = classification.cov
    if diagonal_output:
        cov = torch.diag_embed(cov.diagonal(dim1=1, dim2=2))
    n_samples = 40_000
    expected = oracle.monte_carlo(classification.f, cov, n_samples, torch.Generator().manual_seed(1))
    actual = la(problem.x_test, link_approx="mc", n_samples=2**12, diagonal_output=diagonal_output)
    # A probability has a standard deviation of at most 1/2, the quasi-random error is smaller still.
    assert_close(actual, expected, rtol=0, atol=5 * 0.5 / n_samples**0.5)


def test_loss_and_sizes(case):
    problem = case.problem
    assert_close(case.la.loss, oracle.loss(case.f_train, problem.y, problem.likelihood))
    assert (case.la.n_data, case.la.n_outputs) == (N, C)
    assert_close(case.la.mean, oracle.weights(problem.model))


def test_evidence(case):
    problem = case.problem
    expected = oracle.log_evidence(
        case.f_train,
        problem.y,
        problem.likelihood,
        case.A,
        case.projected_prior,
        case.prior,
        oracle.weights(problem.model) - PRIOR_MEAN,
        problem.sigma_noise,
        problem.temperature,
    )
    assert_close(case.la.log_marginal_likelihood(), expected)


def test_evidence_at_new_hyperparameters_is_the_one_of_a_new_estimator(small_problem):
    la, options, sigma = fit(small_problem), {"prior_precision": 3.1}, None
    if small_problem.likelihood == "regression":
        options["sigma_noise"], sigma = 1.9, torch.tensor(1.9, dtype=torch.float64)
    changed = la.log_marginal_likelihood(torch.tensor(3.1, dtype=torch.float64), sigma)
    assert_close(changed, fit(small_problem, **options).log_marginal_likelihood())


def test_evidence_gradients_are_difference_quotients(small_problem):
    la = fit(small_problem)
    h, values = 1e-5, []
    for delta in (0.6 - h, 0.6 + h):
        values.append(la.log_marginal_likelihood(torch.tensor(delta, dtype=torch.float64)))
    delta = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(la.log_marginal_likelihood(delta), delta)
    assert_close(gradient, (values[1] - values[0]) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize("rows_in_memory", [0, 4])
@pytest.mark.parametrize("name", MODELS)
def test_small_memory_budget_changes_nothing(name, rows_in_memory, dtype):
    problem = make_problem(name, "classification", dtype)
    n_weights = len(oracle.weights(problem.model))
    roomy = fit(problem)
    tight = fit(problem, memory_budget=max(1, rows_in_memory * n_weights * 8))
    assert_close(tight.basis.eigenvalues, roomy.basis.eigenvalues)
    assert tight.basis.trace == pytest.approx(roomy.basis.trace, rel=1e-12)
    assert_close(dense_directions(tight), dense_directions(roomy))
    assert_close(tight.H, roomy.H)


def test_landmark_coordinates_are_not_confused(small_problem):
    """The rows depend on the outputs given, each with its own input."""
    x, outputs = small_problem.landmarks
    changed = outputs.clone()
    changed[3] = (changed[3] + 1) % C
    found, before = (fit(small_problem, pairs).basis.eigenvalues for pairs in ((x, changed), None))
    expected = oracle.basis(oracle.gradient_rows(small_problem.model, x, changed), K)[1]
    assert_close(found, expected)
    assert (before - expected).abs().max() > 1e-3 * expected[0]
