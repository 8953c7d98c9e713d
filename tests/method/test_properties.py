"""One property of the method per test, named as the property."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import oracle
import pytest
import torch
from conftest import B, C, K, M, N, Problem, assert_close, make_problem
from helpers import as_tuple
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from laplace_ella import ELLALaplace
from laplace_ella.fitting.curvature import curvature
from laplace_ella.nystrom.basis import NystromBasis
from laplace_ella.posterior.attributes import become
from laplace_ella.posterior.gaussian import Outputs
from laplace_ella.posterior.likelihoods import LIKELIHOODS
from laplace_ella.posterior.links import quasi_normal
from laplace_ella.posterior.prediction import moments

LINKS = ("probit", "mc", "bridge", "bridge_norm")
F64 = torch.float64
PRIORS = {
    "scalar": torch.tensor([0.6], dtype=F64),
    "layerwise": torch.tensor([0.2, 1.7, 0.6, 3.1], dtype=F64),
    "diagonal": torch.logspace(-1, 1, 2 * 13 + 13 + 13 * C + C, dtype=F64),
}
every_prior = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)


def fit(problem: Problem, *, landmarks=None, loader=None, **options) -> ELLALaplace:
    options = problem.options(**{"n_eigenvalues": K, "curvature_size": None, **options})
    la = ELLALaplace(problem.model, **options)
    la.fit(loader or problem.loader(), landmarks=landmarks or problem.landmarks)
    return la


def dense_directions(la: ELLALaplace) -> torch.Tensor:
    return oracle.dense(la.basis.directions)


def all_covariances(la: ELLALaplace, x: torch.Tensor) -> torch.Tensor:
    """(BC, BC)."""
    return la._glm_predictive_distribution(x, joint=True)[1]


def exact_covariance(p: Problem, x: torch.Tensor, x_test: torch.Tensor, prior) -> torch.Tensor:
    """Covariance (BC, BC) of exact linearised Laplace over all weights, with data x."""
    G = oracle.curvature(oracle.jacobian(p.model, x), oracle.outputs(p.model, x), p.likelihood)
    A = oracle.precision(G, oracle.prior_matrix(p.model, prior), p.sigma_noise, p.temperature)
    return oracle.joint_covariance(oracle.jacobian(p.model, x_test), A)


def with_basis(la: ELLALaplace, basis: NystromBasis, x: torch.Tensor) -> None:
    """Replace the basis of a fitted estimator, and compute G anew."""
    G = curvature(LIKELIHOODS[la.likelihood], *la.backend.features(x, basis))
    fit = replace(la._posterior.fit, basis=basis)
    become(la, current=fit.with_sums([(la.n_data, G)], la.loss, la.n_data, la.n_predictions))


def test_directions_are_orthonormal_and_span_the_landmark_gradients(problem):
    la = fit(problem, n_eigenvalues=M)
    V, R = dense_directions(la), oracle.gradient_rows(problem.model, *problem.landmarks)
    assert_close(V.T @ V, torch.eye(M, dtype=F64))
    assert_close(la.basis.weight_grams.sum(0), torch.eye(M, dtype=F64))
    assert_close(R @ V @ V.T, R)
    assert la.basis.retained == pytest.approx(1, abs=1e-12)


def test_rotating_the_basis_changes_nothing(small_problem):
    la, other = (fit(small_problem, prior_precision=PRIORS["layerwise"]) for _ in range(2))
    Q = torch.linalg.qr(torch.randn(K, K, dtype=F64))[0]
    rotated = {k: torch.tensordot(Q, v, 1) for k, v in la.basis.directions.items()}
    with_basis(other, replace(la.basis, directions=rotated), small_problem.x)
    assert (dense_directions(la) - dense_directions(other)).abs().max() > 0.01
    x = small_problem.x_test
    assert_close(all_covariances(other, x), all_covariances(la, x))
    assert_close(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    if small_problem.likelihood == "classification":
        for link in ("probit", "bridge", "bridge_norm"):
            assert_close(other(x, link_approx=link), la(x, link_approx=link), rtol=1e-7)


@every_prior
def test_covariance_grows_with_rank_and_stays_below_that_of_exact_laplace(small_problem, prior):
    p = small_problem
    covs = [all_covariances(fit(p, n_eigenvalues=k, prior_precision=prior), p.x_test) for k in (2, 5, 11)]
    for low, high in pairwise([*covs, exact_covariance(p, p.x, p.x_test, prior)]):
        assert torch.linalg.eigvalsh(high - low)[0] > -1e-12 * high.trace()
        assert float((high - low).trace()) > 1e-3 * float(high.trace())


def test_covariance_is_exact_where_the_span_holds_the_rows_involved(dtype):
    """Scalar prior: the span of all training and test rows is enough, whatever P."""
    p = make_problem("mlp", "regression", dtype)
    x, x_test = p.x[:5], p.x_test[:2]
    inputs = torch.cat([x, x_test]).repeat_interleave(C, 0)
    landmarks = inputs, torch.arange(len(inputs)) % C
    la = fit(p.with_data(x, p.y[:5]), landmarks=landmarks, n_eigenvalues=len(inputs))
    assert la.basis.rank < la.n_params
    assert_close(all_covariances(la, x_test), exact_covariance(p, x, x_test, p.prior_precision), rtol=1e-7)


def test_sampled_curvature_is_unbiased(small_problem):
    n, n_seeds = 7, 200
    fits = [fit(small_problem, curvature_size=n, seed=seed).H for seed in range(n_seeds)]
    draws = torch.stack(fits).flatten(1)
    error = draws.mean(0) - fit(small_problem).H.flatten()
    standard_error = draws.std(0) / n_seeds**0.5
    assert (standard_error > 0).all()
    assert (error.abs() / standard_error).max() < 4.5


@pytest.mark.parametrize("name", ["classification", "regression", "bernoulli"])
def test_gradients_at_sampled_labels_have_the_curvature_as_second_moment(name):
    n, f = 40_000, torch.randn(2, C, dtype=F64)
    gradients = LIKELIHOODS[name].sampled_gradients(f, torch.rand(2, n, C, dtype=F64))
    for row, g in zip(f, gradients):
        p, products = row.sigmoid(), g[:, :, None] * g[:, None]
        expected = torch.diag(p * (1 - p)) if name == "bernoulli" else oracle.output_hessian(row, name)
        assert ((products.mean(0) - expected).abs() <= 5 * products.std(0) / n**0.5 + 1e-12).all()


def test_neither_batch_size_nor_the_order_of_data_and_landmarks_matters(small_problem):
    p, order, of_landmarks = small_problem, torch.randperm(N), torch.randperm(M)
    la, (x, outputs) = fit(p), p.landmarks
    shuffled = p.with_data(p.x[order], p.y[order])
    others = [fit(p, loader=found) for found in (p.loader(1), p.loader(7), p.loader(N), shuffled.loader(5))]
    for other in (*others, fit(p, landmarks=(x[of_landmarks], outputs[of_landmarks]))):
        assert_close(other.loss, la.loss)
        assert_close(other.log_marginal_likelihood(), la.log_marginal_likelihood())
        assert_close(all_covariances(other, p.x_test), all_covariances(la, p.x_test))
    for other in others:
        assert_close(other.H, la.H)


@every_prior
def test_scaling_the_covariance_is_scaling_temperature_and_prior(small_problem, prior):
    c, T = 3.7, small_problem.temperature
    la = fit(small_problem, prior_precision=prior)
    scaled = fit(small_problem, prior_precision=prior / c, temperature=c * T)
    x = small_problem.x_test
    assert_close(all_covariances(scaled, x), c * all_covariances(la, x))


def test_variance_vanishes_for_gradients_orthogonal_to_the_span(dtype):
    x = torch.zeros(N, 5, dtype=dtype)
    x[:, :2] = torch.randn(N, 2, dtype=dtype)
    la = ELLALaplace(nn.Linear(5, C, bias=False).to(dtype), "regression", n_eigenvalues=4, subsample_size=M)
    la.fit([(x, torch.randn(N, C, dtype=dtype))])
    far = torch.tensor([[0.0, 0.0, 0.0, 9.0, 0.0]], dtype=dtype)
    assert all_covariances(la, far).abs().max() == 0
    assert all_covariances(la, x[:1]).trace() > 0


def within_sampling_error(sample: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> None:
    """Moments of iid Gaussian rows (S, D), entry by entry, within 5 standard errors."""
    size = len(sample)
    variance = cov.diagonal()
    assert ((sample.mean(0) - mean).abs() <= 5 * (variance / size).sqrt() + 1e-12).all()
    error = (torch.outer(variance, variance) + cov.square()).div(size).sqrt()
    assert ((sample.T.cov() - cov).abs() <= 5 * error + 1e-12).all()


def test_functional_samples_have_the_joint_covariance_of_all_inputs(small_problem):
    """With ``diagonal_output``, its diagonal alone."""
    la, x = fit(small_problem), small_problem.x_test
    mean, cov = la._glm_predictive_distribution(x, joint=True)
    samples = la.functional_samples(x, n_samples=20_000, generator=torch.Generator().manual_seed(0))
    within_sampling_error(samples.flatten(1), mean, cov)
    predictive = la.predictive_samples(x, n_samples=20_000, generator=torch.Generator().manual_seed(0))
    assert_close(predictive, samples.softmax(-1) if small_problem.likelihood == "classification" else samples)
    outside = cov - torch.block_diag(*(cov[i : i + C, i : i + C] for i in range(0, B * C, C)))
    assert outside.abs().max() > 0.1 * cov.abs().max()  # noise of each input's own would fail
    samples = la.functional_samples(x, n_samples=20_000, diagonal_output=True)
    within_sampling_error(samples.flatten(1), mean, cov.diagonal().diag())


def test_weight_samples_have_the_posterior_covariance(small_problem):
    la = fit(small_problem, prior_precision=PRIORS["layerwise"])
    samples = la.sample(20_000, generator=torch.Generator().manual_seed(0))
    V = dense_directions(la)
    offsets = samples - oracle.weights(small_problem.model)
    within_sampling_error(samples, la.mean, V @ la.posterior_covariance @ V.T)
    within_sampling_error(offsets @ V, torch.zeros(K, dtype=F64), la.posterior_covariance)
    assert_close(offsets @ V @ V.T, offsets)


def test_samples_follow_the_generator_or_the_global_one(small_problem):
    la, x = fit(small_problem), small_problem.x_test
    for draw in (la.sample, lambda *a, **k: la.functional_samples(x, "glm", *a, **k)):
        first, again = (draw(5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, again)
        torch.manual_seed(8)
        first = draw(5)
        assert not torch.equal(first, draw(5))
        torch.manual_seed(8)
        assert torch.equal(first, draw(5))


def test_mc_link_agrees_with_independent_samples_and_is_repeatable(dtype):
    p = make_problem("mlp", "classification", dtype)
    la = fit(p, prior_precision=0.01, temperature=30.0)  # wide: the link matters
    iid = la.predictive_samples(p.x_test, n_samples=50_000)
    standard_error = iid.std(0) / len(iid) ** 0.5
    dense = la(p.x_test, link_approx="mc", n_samples=2**12)
    assert ((dense - iid.mean(0)).abs() < 5 * standard_error + 2e-4).all()
    coarse = la(p.x_test, link_approx="mc", n_samples=128)
    assert_close(coarse, dense, rtol=0, atol=0.02)
    assert (dense - la.features(p.x_test)[1].softmax(-1)).abs().max() > 0.05
    torch.manual_seed(99)
    assert torch.equal(la(p.x_test, link_approx="mc", n_samples=128), coarse)
    assert_close(la(p.x_test[2:4], link_approx="mc", n_samples=128), coarse[2:4])


def test_scores_of_novelty_are_centred_on_the_data_they_were_calibrated_on(dtype):
    """Normal scores of two quantities, one of which counts half."""
    la, x = fit(make_problem("mlp", "classification", dtype)), torch.randn(1000, 2, dtype=dtype)
    la.calibrate_novelty(x.split(100))
    scores = la.novelty(torch.randn(1000, 2, dtype=dtype))
    assert scores.mean().abs() < 0.15
    assert 0.3 < scores.var() < 2.4  # 1/4 if the two were opposite, 9/4 if they were one
    assert la.novelty(100 * x).mean() > 1


@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2**-30])
def test_mc_noise_is_finite_for_every_point_of_the_sequence(point, monkeypatch):
    """A scrambled point lies on a grid of 2^-30, and 0 has no finite quantile."""

    def draw(self, n, dtype):
        return torch.full((n, self.dimension), point, dtype=dtype)

    monkeypatch.setattr(torch.quasirandom.SobolEngine, "draw", draw)
    noise = quasi_normal(3, K, seed=987_654 + int(1000 * point))
    assert noise.isfinite().all()
    expected = torch.special.ndtri(torch.full((2, K), point, dtype=F64)).clamp(-6.3, 6.3)
    assert_close(noise[1:], expected, 0, 0.2)  # the first of all points comes from the engine's own state


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_fit_and_predictions_never_form_a_matrix_of_classes():
    batch, n_classes, rank = 64, 1000, 20
    model, x = nn.Linear(2, n_classes), torch.randn(batch, 2)
    la = ELLALaplace(model, "classification", subsample_size=53, n_eigenvalues=rank)
    with LargestTensor() as record:
        la.fit([(x, torch.randint(n_classes, (batch,)))])
        for link in LINKS:
            la(x, link_approx=link)
        la(x, link_approx="mc", diagonal_output=True)
        moments(Outputs(*la.features(x)[::-1]), diagonal_output=True)
    assert la.basis.rank == rank
    assert 0 < record.numel <= batch * n_classes * rank < batch * n_classes**2 / 40


@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm"])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_agrees_with_double(low, name, likelihood):
    p, exact = (make_problem(name, likelihood, low) for _ in range(2))
    exact.model.double()
    y = exact.y.double() if likelihood == "regression" else exact.y
    landmarks = exact.landmarks[0].double(), exact.landmarks[1]
    reference = fit(replace(exact, x=exact.x.double(), y=y, landmarks=landmarks), sigma_noise=1.0)
    la = fit(p, sigma_noise=1.0)
    assert la.H.dtype == la.posterior_precision.dtype == la.basis.eigenvalues.dtype == F64
    assert all(v.dtype == low for v in la.basis.directions.values())
    phi, f = la.features(p.x_test)
    assert phi.dtype == f.dtype == low
    G = oracle.curvature(phi.double(), f.double(), likelihood)
    # Rounded features, but no rounding after them.
    assert_close(curvature(LIKELIHOODS[la.likelihood], phi, f), G, rtol=1e-9)
    tolerance = 30 * torch.finfo(low).eps
    assert_close(la.basis.eigenvalues, reference.basis.eigenvalues, tolerance)
    assert all(t.dtype == low for t in as_tuple(la(p.x_test)))
    mean, cov = la._glm_predictive_distribution(p.x_test)
    exact_mean, exact_cov = reference._glm_predictive_distribution(p.x_test.double())
    assert_close(mean, exact_mean, tolerance)
    assert_close(cov, exact_cov, 3 * tolerance)
