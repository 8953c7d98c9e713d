"""One property of the method per test, named as the property."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import oracle
import pytest
import torch
from conftest import B, C, K, M, N, Problem, assert_close, make_problem
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from laplace_ella import ELLALaplace
from laplace_ella.data.hashing import LANDMARK_INPUT, hash_keys
from laplace_ella.data.landmarks import BottomK, draw_outputs
from laplace_ella.data.stream import Stream
from laplace_ella.fitting.scan import Scan, scan
from laplace_ella.nystrom.basis import NystromBasis
from laplace_ella.posterior.gaussian import Outputs
from laplace_ella.posterior.likelihoods import CATEGORICAL
from laplace_ella.posterior.links import quasi_normal
from laplace_ella.posterior.predictive import moments, predict

LINKS = ("probit", "mc", "bridge", "bridge_norm")
F64 = torch.float64


def fit(problem: Problem, *, landmarks=True, loader=None, **options) -> ELLALaplace:
    options = problem.options(**{"n_eigenvalues": K, "curvature_size": None, **options})
    la = ELLALaplace(problem.model, **options)
    given = problem.landmarks if landmarks is True else landmarks
    la.fit(problem.loader() if loader is None else loader, landmarks=given or None)
    return la


def dense_directions(la: ELLALaplace) -> torch.Tensor:
    """V (P, K)."""
    return torch.cat([v.flatten(1) for v in la.basis.directions.values()], 1).T


def all_covariances(la: ELLALaplace, x: torch.Tensor) -> torch.Tensor:
    """(BC, BC)."""
    return la._glm_predictive_distribution(x, joint=True)[1]


def smallest_eigenvalue(matrix: torch.Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[0])


def with_basis(la: ELLALaplace, basis: NystromBasis, x: torch.Tensor) -> None:
    """Replace the basis of a fitted estimator, and compute G anew."""
    G = la.backend.curvature(*la.backend.features(x, basis))
    la._set_fit(basis, [(la.n_data, G)], la.loss, (la.n_data, la.n_predictions, la.n_outputs))


PRIORS = {
    "scalar": torch.tensor([0.6], dtype=F64),
    "layerwise": torch.tensor([0.2, 1.7, 0.6, 3.1], dtype=F64),
    "diagonal": torch.logspace(-1, 1, 2 * 13 + 13 + 13 * C + C, dtype=F64),
}

# ---------------------------------------------------------------------------- the basis


def test_directions_are_orthonormal(problem):
    V = dense_directions(fit(problem))
    assert_close(V.T @ V, torch.eye(K, dtype=F64))


def test_weight_grams_sum_to_the_identity(problem):
    assert_close(fit(problem).basis.weight_grams.sum(0), torch.eye(K, dtype=F64))


def test_span_holds_the_landmark_gradients_at_full_rank(problem):
    la = fit(problem, n_eigenvalues=M)
    V, R = dense_directions(la), oracle.gradient_rows(problem.model, *problem.landmarks)
    assert_close(R @ V @ V.T, R)
    assert la.basis.retained == pytest.approx(1, abs=1e-12)


def test_leading_columns_are_the_solution_of_lower_rank(problem):
    large, small = fit(problem, n_eigenvalues=9), fit(problem, n_eigenvalues=4)
    assert_close(large.features(problem.x_test)[0][..., :4], small.features(problem.x_test)[0])
    assert_close(large.H[:4, :4], small.H)
    assert_close(large.basis.eigenvalues[:4], small.basis.eigenvalues)


def test_rotating_the_basis_changes_nothing(small_problem):
    la, other = fit(small_problem, prior_precision=PRIORS["layerwise"]), fit(small_problem)
    other.prior_precision = PRIORS["layerwise"]
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


# ---------------------------------------------------------------------------- the Loewner order


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_covariance_is_below_that_of_exact_linearised_laplace(small_problem, prior):
    p = small_problem
    la = fit(p, prior_precision=prior)
    J = oracle.jacobian(p.model, p.x)
    G = oracle.curvature(J, oracle.outputs(p.model, p.x), p.likelihood)
    A = oracle.precision(G, oracle.prior_matrix(p.model, prior), p.sigma_noise, p.temperature)
    exact = oracle.joint_covariance(oracle.jacobian(p.model, p.x_test), A)
    difference = exact - all_covariances(la, p.x_test)
    assert smallest_eigenvalue(difference) > -1e-12 * float(exact.trace())
    assert float(difference.trace()) > 1e-3 * float(exact.trace())


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_covariance_grows_with_rank(small_problem, prior):
    covs = [
        all_covariances(fit(small_problem, n_eigenvalues=k, prior_precision=prior), small_problem.x_test)
        for k in (2, 5, 11)
    ]
    for low, high in pairwise(covs):
        assert smallest_eigenvalue(high - low) > -1e-12 * float(high.trace())
        assert float((high - low).trace()) > 1e-3 * float(high.trace())


def test_covariance_is_exact_where_the_span_holds_the_rows_involved(dtype):
    """Scalar prior: the span of all training and test rows is enough, whatever P."""
    p = make_problem("mlp", "regression", dtype)
    x, x_test = p.x[:5], p.x_test[:2]
    inputs = torch.cat([x, x_test]).repeat_interleave(C, 0)
    landmarks = inputs, torch.arange(len(inputs)) % C
    la = fit(p.with_data(x, p.y[:5]), landmarks=landmarks, n_eigenvalues=len(inputs))
    assert la.basis.rank < la.n_params
    J = oracle.jacobian(p.model, x)
    prior = oracle.prior_matrix(p.model, p.prior_precision)
    G = oracle.curvature(J, oracle.outputs(p.model, x), p.likelihood)
    A = oracle.precision(G, prior, p.sigma_noise, p.temperature)
    exact = oracle.joint_covariance(oracle.jacobian(p.model, x_test), A)
    assert_close(all_covariances(la, x_test), exact, rtol=1e-7)


# ---------------------------------------------------------------------------- the curvature


def test_curvature_is_a_sum_over_data(small_problem):
    p = small_problem
    parts = [fit(p.with_data(p.x[s], p.y[s])) for s in (slice(0, 9), slice(9, N))]
    whole = fit(p)
    assert_close(parts[0].H + parts[1].H, whole.H)
    assert_close(parts[0].loss + parts[1].loss, whole.loss)


@pytest.mark.parametrize("curvature_size", [None, 2000, N])
def test_adding_data_is_fitting_all_of_it(small_problem, curvature_size):
    p = small_problem
    la = fit(p.with_data(p.x[:9], p.y[:9]), curvature_size=curvature_size)
    basis = la.basis
    la.fit(p.with_data(p.x[9:], p.y[9:]).loader(), override=False)
    whole = fit(p)
    assert la.basis is basis
    assert la.n_data == N
    assert_close(la.loss, whole.loss)
    assert_close(la.H, whole.H)
    assert_close(all_covariances(la, p.x_test), all_covariances(whole, p.x_test))


def test_overriding_forgets_the_data_before(small_problem):
    p = small_problem
    la = fit(p)
    la.fit(p.loader(), landmarks=p.landmarks)
    assert la.n_data == N
    assert_close(la.H, fit(p).H)


@pytest.mark.parametrize("curvature_size", [N, N + 1, 2000])
def test_curvature_is_exact_if_the_sample_holds_all_data(small_problem, curvature_size):
    assert_close(fit(small_problem, curvature_size=curvature_size).H, fit(small_problem).H)


def test_sampled_curvature_is_unbiased(small_problem):
    n, n_seeds = 7, 200
    draws = torch.stack(
        [fit(small_problem, curvature_size=n, seed=seed).H for seed in range(n_seeds)]
    ).flatten(1)
    error = draws.mean(0) - fit(small_problem).H.flatten()
    standard_error = draws.std(0) / n_seeds**0.5
    assert (standard_error > 0).all()
    assert (error.abs() / standard_error).max() < 4.5


def test_curvature_is_positive_semi_definite_for_confident_outputs(dtype):
    p = make_problem("mlp", "classification", dtype)
    with torch.no_grad():
        p.model[-1].bias.copy_(torch.tensor([0.0, 50.0, -50.0]))
    la = fit(p)
    assert smallest_eigenvalue(la.H) >= -1e-12 * float(la.H.trace())
    assert torch.linalg.cholesky(la.posterior_precision).isfinite().all()


def test_adding_a_constant_to_all_logits_changes_no_curvature(dtype):
    """Lambda has the null vector 1: without its mean term this fails."""
    model = nn.Linear(2, C).to(dtype)
    p = make_problem("mlp", "classification", dtype)
    la = ELLALaplace(model, "classification", n_eigenvalues=3 * C)
    la.fit(p.loader(), landmarks=(p.x[: 3 * C], torch.arange(3 * C) % C))
    V = dense_directions(la)
    shift = torch.cat([torch.zeros(2 * C, dtype=dtype), torch.ones(C, dtype=dtype)])
    z = V.T @ shift
    assert float(z @ la.H @ z) < 1e-12 * float(la.H.trace())


def test_batch_size_and_data_order_do_not_matter(small_problem):
    p = small_problem
    order = torch.randperm(N)
    shuffled = p.with_data(p.x[order], p.y[order])
    la = fit(p)
    for loader in (p.loader(1), p.loader(7), p.loader(N), shuffled.loader(5)):
        other = fit(p, loader=loader)
        assert_close(other.H, la.H)
        assert_close(other.loss, la.loss)
        assert_close(other.log_marginal_likelihood(), la.log_marginal_likelihood())
        assert_close(all_covariances(other, p.x_test), all_covariances(la, p.x_test))


def test_curvature_is_the_same_for_landmarks_in_another_order(small_problem):
    x, outputs = small_problem.landmarks
    order = torch.randperm(M)
    la, other = fit(small_problem), fit(small_problem, landmarks=(x[order], outputs[order]))
    assert_close(all_covariances(other, small_problem.x_test), all_covariances(la, small_problem.x_test))


# ---------------------------------------------------------------------------- the posterior


def test_stopping_after_n_points_is_a_temperature_and_a_prior(dtype):
    """[G_n + (n/N) delta I]^-1 is T = N/n, delta n/N with the unbiased (N/n) G_n."""
    p, n, delta = make_problem("mlp", "classification", dtype), 9, 0.6
    G_n = fit(p.with_data(p.x[:n], p.y[:n])).H
    la = fit(p, temperature=N / n, prior_precision=delta * n / N)
    la.H = (N / n) * G_n
    expected = torch.linalg.inv(G_n + n / N * delta * torch.eye(K, dtype=F64))
    assert_close(la.posterior_covariance, expected)


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_scaling_the_covariance_is_scaling_temperature_and_prior(small_problem, prior):
    c, T = 3.7, small_problem.temperature
    la = fit(small_problem, prior_precision=prior)
    scaled = fit(small_problem, prior_precision=prior / c, temperature=c * T)
    x = small_problem.x_test
    assert_close(all_covariances(scaled, x), c * all_covariances(la, x))


def test_one_eigendecomposition_gives_all_variances(small_problem):
    la, x = fit(small_problem), small_problem.x_test
    phi, _ = la.features(x)
    g, Q = torch.linalg.eigh(la.H)
    for delta, T in ((0.6, 1.3), (40.0, 0.2), (1e-3, 300.0)):
        la.prior_precision, la.temperature = delta, T
        h = 1 / (small_problem.sigma_noise**2 * T)
        variances = ((phi @ Q).square() / (h * g + delta)).sum(-1)
        assert_close(all_covariances(la, x).diagonal().reshape(B, C), variances)


@pytest.mark.parametrize("name", ["temperature", "prior_precision", "sigma_noise"])
def test_a_new_hyperparameter_reaches_the_next_prediction(name, dtype):
    p = make_problem("mlp", "regression", dtype)
    la = fit(p)
    la(p.x_test)
    setattr(la, name, 2.9)
    assert_close(all_covariances(la, p.x_test), all_covariances(fit(p, **{name: 2.9}), p.x_test))


def test_infinite_prior_precision_leaves_no_variance(small_problem):
    before = all_covariances(fit(small_problem), small_problem.x_test).abs().max()
    after = all_covariances(fit(small_problem, prior_precision=1e20), small_problem.x_test).abs().max()
    assert after < 1e-18 * before


def test_prior_mean_moves_the_evidence_only(small_problem):
    la, other = fit(small_problem), fit(small_problem, prior_mean=0.4)
    assert_close(all_covariances(other, small_problem.x_test), all_covariances(la, small_problem.x_test))
    theta = oracle.weights(small_problem.model)
    moved = small_problem.prior_precision * ((theta - 0.4).square().sum() - theta.square().sum())
    assert_close(other.log_marginal_likelihood() - la.log_marginal_likelihood(), -0.5 * moved)


def test_variance_vanishes_for_gradients_orthogonal_to_the_span(dtype):
    model = nn.Linear(5, C, bias=False).to(dtype)
    x = torch.zeros(N, 5, dtype=dtype)
    x[:, :2] = torch.randn(N, 2, dtype=dtype)
    la = ELLALaplace(model, "regression", n_eigenvalues=4, subsample_size=M)
    la.fit([(x, torch.randn(N, C, dtype=dtype))])
    far = torch.tensor([[0.0, 0.0, 0.0, 9.0, 0.0]], dtype=dtype)
    assert all_covariances(la, far).abs().max() == 0
    assert all_covariances(la, x[:1]).trace() > 0


# ---------------------------------------------------------------------------- samples


def within_sampling_error(sample: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> None:
    """Moments of iid Gaussian rows (S, D), entry by entry, within 5 standard errors."""
    size = len(sample)
    variance = cov.diagonal()
    assert ((sample.mean(0) - mean).abs() <= 5 * (variance / size).sqrt() + 1e-12).all()
    error = (torch.outer(variance, variance) + cov.square()).div(size).sqrt()
    assert ((sample.T.cov() - cov).abs() <= 5 * error + 1e-12).all()


def test_functional_samples_have_the_joint_covariance_of_all_inputs(small_problem):
    la, x = fit(small_problem), small_problem.x_test
    samples = la.functional_samples(x, n_samples=20_000, generator=torch.Generator().manual_seed(0))
    mean, cov = la._glm_predictive_distribution(x, joint=True)
    within_sampling_error(samples.flatten(1), mean, cov)
    outside = cov.clone()
    for b in range(B):
        outside[b * C : (b + 1) * C, b * C : (b + 1) * C] = 0
    assert outside.abs().max() > 0.1 * cov.abs().max()  # noise of each input's own would fail


def test_functional_samples_share_one_noise_of_k_dimensions(small_problem):
    la, x = fit(small_problem), small_problem.x_test
    offsets = la.functional_samples(x, n_samples=50) - la.features(x)[1]
    assert torch.linalg.matrix_rank(offsets.flatten(1), rtol=1e-9) == K
    parts = [
        la.functional_samples(part, n_samples=13, generator=torch.Generator().manual_seed(2))
        for part in x.split([2, 5])
    ]
    whole = la.functional_samples(x, n_samples=13, generator=torch.Generator().manual_seed(2))
    assert_close(torch.cat(parts, 1), whole)


def test_independent_samples_have_variances_and_no_correlation(small_problem):
    la, x = fit(small_problem), small_problem.x_test
    samples = la.functional_samples(x, n_samples=20_000, diagonal_output=True)
    mean, cov = la._glm_predictive_distribution(x, joint=True)
    within_sampling_error(samples.flatten(1), mean, cov.diagonal().diag())


def test_predictive_samples_are_functional_samples_through_the_link(small_problem):
    la, x = fit(small_problem), small_problem.x_test
    for kind in ("glm", "nn"):
        functional, predictive = (
            draw(x, pred_type=kind, n_samples=13, generator=torch.Generator().manual_seed(4))
            for draw in (la.functional_samples, la.predictive_samples)
        )
        expected = functional.softmax(-1) if small_problem.likelihood == "classification" else functional
        assert_close(predictive, expected)


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


# ---------------------------------------------------------------------------- links


def test_mc_link_is_repeatable(dtype):
    p = make_problem("mlp", "classification", dtype)
    la = fit(p)
    first = la(p.x_test, link_approx="mc")
    torch.manual_seed(99)
    assert torch.equal(la(p.x_test, link_approx="mc"), first)
    assert torch.equal(fit(p)(p.x_test, link_approx="mc"), first)
    assert_close(la(p.x_test[2:4], link_approx="mc"), first[2:4])


def test_mc_link_leaves_the_global_generator_alone(dtype):
    p = make_problem("mlp", "classification", dtype)
    la = fit(p)
    before = torch.get_rng_state()
    la(p.x_test, link_approx="mc")
    assert torch.equal(torch.get_rng_state(), before)


def test_mc_link_agrees_with_independent_samples(dtype):
    p = make_problem("mlp", "classification", dtype)
    la = fit(p, prior_precision=0.01, temperature=30.0)  # wide: the link matters
    iid = la.predictive_samples(p.x_test, n_samples=50_000)
    standard_error = iid.std(0) / len(iid) ** 0.5
    dense = la(p.x_test, link_approx="mc", n_samples=2**12)
    assert ((dense - iid.mean(0)).abs() < 5 * standard_error + 2e-4).all()
    coarse = la(p.x_test, link_approx="mc", n_samples=128)
    assert_close(coarse, dense, rtol=0, atol=0.02)
    assert (dense - la.features(p.x_test)[1].softmax(-1)).abs().max() > 0.05


@pytest.mark.parametrize("n_samples", [1, 7, 100, 1000])
@pytest.mark.parametrize("diagonal_output", [False, True])
def test_mc_noise_is_finite_for_any_number_of_samples(n_samples, diagonal_output, dtype):
    p = make_problem("mlp", "classification", dtype)
    out = fit(p)(p.x_test, link_approx="mc", n_samples=n_samples, diagonal_output=diagonal_output)
    assert_close(out.sum(-1), torch.ones(B, dtype=dtype))


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


def test_mc_noise_is_standard_normal():
    noise = quasi_normal(2**12, K, seed=0)
    assert_close(noise.mean(0), torch.zeros(K, dtype=F64), atol=1e-3)
    assert_close(noise.T.cov(), torch.eye(K, dtype=F64), atol=0.02)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("rank", [1, 2, C, K])
def test_every_link_gives_probabilities_at_every_rank(link, rank, dtype):
    p = make_problem("mlp", "classification", dtype)
    la = fit(p, n_eigenvalues=rank)
    probabilities = la(p.x_test, link_approx=link)
    assert probabilities.shape == (B, C)
    assert probabilities.isfinite().all()
    assert (probabilities >= 0).all()
    assert_close(probabilities.sum(-1), torch.ones(B, dtype=dtype))


@pytest.mark.parametrize("link", ["probit", "mc"])
def test_links_without_variance_are_the_softmax(link, dtype):
    p = make_problem("mlp", "classification", dtype)
    la = fit(p, prior_precision=1e20)
    assert_close(la(p.x_test, link_approx=link), la.features(p.x_test)[1].softmax(-1))


@pytest.mark.parametrize("link", LINKS)
def test_links_are_equivariant_to_the_order_of_classes(link):
    f, psi = torch.randn(B, C, dtype=F64), torch.randn(B, C, K, dtype=F64)
    order = torch.tensor([2, 0, 1])
    plain = predict(Outputs(f, psi), "classification", link_approx=link)
    assert_close(
        predict(Outputs(f[:, order], psi[:, order]), "classification", link_approx=link), plain[:, order]
    )


@pytest.mark.parametrize("link", LINKS)
def test_links_are_finite_for_extreme_logits(link):
    f = torch.tensor([[900.0, -900.0, 0.0], [0.0, 0.0, 0.0]])
    out = predict(Outputs(f, 30 * torch.randn(2, C, K)), "classification", link_approx=link)
    assert_close(out.sum(-1), torch.ones(2))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("link", [*LINKS, "mc diagonal", "variance"])
def test_links_never_form_a_matrix_of_classes(link):
    batch, n_classes, rank = 64, 1000, 20
    f, psi = torch.randn(batch, n_classes), torch.randn(batch, n_classes, rank)
    with LargestTensor() as record:
        if link == "variance":
            moments(Outputs(f, psi), diagonal_output=True)
        else:
            name, *diagonal = link.split()
            predict(Outputs(f, psi), "classification", link_approx=name, diagonal_output=bool(diagonal))
    assert 0 < record.numel <= batch * n_classes * rank < batch * n_classes**2 / 40


def test_fit_and_prediction_never_form_a_matrix_of_classes():
    batch, n_classes, rank = 64, 1000, 20
    model, x = nn.Linear(2, n_classes), torch.randn(batch, 2)
    la = ELLALaplace(model, "classification", subsample_size=53, n_eigenvalues=rank)
    with LargestTensor() as record:
        la.fit([(x, torch.randint(n_classes, (batch,)))])
        for link in LINKS:
            la(x, link_approx=link)
    assert la.basis.rank == rank
    assert 0 < record.numel <= batch * n_classes * rank


# ---------------------------------------------------------------------------- drawing landmarks


def offered(capacity: int, keys: torch.Tensor, groups, batch: int) -> BottomK:
    """Stream positions 0, 1, ... in batches; each row is its own position."""
    sample = BottomK(capacity)
    for start in range(0, len(keys), batch):
        part = slice(start, start + batch)
        positions = torch.arange(len(keys))[part]
        labels = None if groups is None else groups[part]
        sample.offer(positions, keys[part], labels, lambda i, p=positions: int(p[i]))
    return sample


def water_filling(keys: torch.Tensor, groups: list[int], capacity: int) -> list[int]:
    """Offline: give every group one place in turn, lowest label first, while it has rows left."""
    queues = {
        g: sorted((i for i in range(len(keys)) if groups[i] == g), key=lambda i: int(keys[i]))
        for g in sorted(set(groups))
    }
    chosen = []
    while len(chosen) < min(capacity, len(keys)):
        for queue in queues.values():
            if queue and len(chosen) < capacity:
                chosen.append(queue.pop(0))
    return sorted(chosen)


@pytest.mark.parametrize("capacity", [1, 7, 22, 23, 31])
@pytest.mark.parametrize("seed", range(5))
def test_sample_is_the_smallest_keys(capacity, seed):
    keys = hash_keys(seed, LANDMARK_INPUT, torch.arange(N))
    for batch in (1, 5, N):
        sample = offered(capacity, keys, None, batch)
        assert sample.positions() == sorted(keys.argsort()[:capacity].tolist())
        assert sample.rows() == sample.positions()


@pytest.mark.parametrize("seed", range(40))
def test_balanced_sample_is_water_filling(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 17, (int(torch.randint(1, 6, (), generator=generator)),), generator=generator)
    groups = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    groups = groups[torch.randperm(len(groups), generator=generator)].tolist()
    capacity = int(torch.randint(1, len(groups) + 3, (), generator=generator))
    keys = hash_keys(seed, LANDMARK_INPUT, torch.arange(len(groups)))
    for batch in (1, 5, len(groups)):
        sample = offered(capacity, keys, groups, batch)
        assert sample.positions() == water_filling(keys, groups, capacity)
        assert sample.groups() == [groups[i] for i in sample.positions()]


@pytest.mark.parametrize(
    ("sizes", "capacity", "expected"),
    [
        ([7, 7, 7], 12, [4, 4, 4]),  # even
        ([7, 7, 7], 11, [4, 4, 3]),  # a remainder
        ([2, 13, 7], 11, [2, 5, 4]),  # a class with too few
        ([1, 2, 3], 11, [1, 2, 3]),  # too few of all
        ([13, 7, 5], 2, [1, 1, 0]),  # fewer places than classes
    ],
)
def test_balanced_sample_shares_places_evenly(sizes, capacity, expected):
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).tolist()
    for order in (groups, groups[::-1]):
        keys = hash_keys(0, LANDMARK_INPUT, torch.arange(len(order)))
        counts = Counter(offered(capacity, keys, order, 5).groups())
        assert [counts[g] for g in range(len(sizes))] == expected


def test_every_input_is_drawn_equally_often():
    n_seeds, capacity = 1500, 7
    counts = torch.zeros(N)
    for seed in range(n_seeds):
        keys = hash_keys(seed, LANDMARK_INPUT, torch.arange(N))
        counts[offered(capacity, keys, None, N).positions()] += 1
    share = capacity / N
    z = (counts - n_seeds * share) / (n_seeds * share * (1 - share)) ** 0.5
    assert z.abs().max() < 4


def test_keys_are_distinct_nonnegative_and_differ_by_seed_and_purpose():
    positions = torch.arange(20_000)
    keys = [hash_keys(*args, positions) for args in ((0, 0), (1, 0), (0, 1), (2**62, 3))]
    joined = torch.cat(keys)
    assert joined.min() >= 0
    assert len(joined.unique()) == len(joined)
    bits = (keys[0][:, None] >> torch.arange(62)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / len(positions) ** 0.5


def landmark_scan(
    n: int,
    seed: int,
    n_landmarks: int = 0,
    n_curvature: int = 0,
    batch: int = 50,
    balanced: bool = False,
    first_position: int = 0,
) -> Scan:
    x = torch.arange(n, dtype=F64)[:, None]
    y = torch.arange(n) % C
    found = Scan(BottomK(n_landmarks), BottomK(n_curvature))
    batches = list(zip(x.split(batch), y.split(batch)))
    stream = Stream(batches, "input_ids", "labels", lambda x, size: x, first_position=first_position)
    scan(
        stream.batches("Training data"),
        lambda x: x.repeat(1, C),
        CATEGORICAL,
        found=found,
        seed=seed,
        balanced=balanced,
    )
    return found


def test_landmarks_and_curvature_inputs_are_independent_samples():
    n, m, k, n_seeds = 1000, 300, 200, 20
    overlaps = []
    for seed in range(n_seeds):
        found = landmark_scan(n, seed, m, k)
        overlaps.append(len(set(found.landmarks.positions()) & set(found.curvature.positions())))
    # Hypergeometric
    mean = m * k / n
    variance = k * (m / n) * (1 - m / n) * (n - k) / (n - 1)
    assert abs(sum(overlaps) / n_seeds - mean) < 4 * (variance / n_seeds) ** 0.5


def test_data_added_later_draws_a_sample_of_its_own():
    first, second = (landmark_scan(100, 0, n_curvature=10, first_position=p) for p in (0, 100))
    assert [p - 100 for p in second.curvature.positions()] != first.curvature.positions()
    assert second.curvature.positions()[0] >= 100


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("m", [11, 50, 150])
def test_landmarks_do_not_depend_on_the_batch_size(m, balanced):
    drawn = []
    for batch in (1, 7, 100):
        found = landmark_scan(100, 3, m, batch=batch, balanced=balanced)
        pairs = draw_outputs(found.landmarks, 3, balanced)
        drawn.append([(float(x), int(c)) for x, c in zip(pairs.inputs, pairs.outputs)])
    assert drawn[0] == drawn[1] == drawn[2]


def test_landmark_inputs_are_distinct_while_there_are_enough():
    found = landmark_scan(100, 0, 100)
    pairs = draw_outputs(found.landmarks, 0, balanced=False)
    assert len({float(x) for x in pairs.inputs}) == len(pairs) == 100


def test_landmark_outputs_are_uniform():
    found = landmark_scan(3000, 0, 2000)
    counts = torch.bincount(draw_outputs(found.landmarks, 0, balanced=False).outputs, minlength=C)
    assert (counts - 2000 / C).abs().max() < 4 * (2000 * (1 / C) * (1 - 1 / C)) ** 0.5


@pytest.mark.parametrize("balanced", [False, True])
def test_more_landmarks_than_inputs_are_distinct_pairs(balanced):
    found = landmark_scan(N, 0, 53, balanced=balanced)
    pairs = draw_outputs(found.landmarks, 0, balanced)
    assert len({(float(x), int(c)) for x, c in zip(pairs.inputs, pairs.outputs)}) == len(pairs) == 53
    if balanced:
        counts = Counter(int(x) % C for x in pairs.inputs)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_more_landmarks_than_pairs_take_all_pairs_with_one_warning_if_named(dtype):
    p = make_problem("mlp", "regression", dtype)
    with pytest.warns(
        UserWarning, match=rf"subsample_size was reduced from {N * C + 1} to {N * C}"
    ) as record:
        la = fit(p, landmarks=None, subsample_size=N * C + 1)
    assert len(record) == 1
    everything = p.x.repeat_interleave(C, 0), torch.arange(N * C) % C
    assert_close(la.basis.eigenvalues, fit(p, landmarks=everything).basis.eigenvalues)
    assert la.basis.n_landmarks == N * C
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(p, landmarks=None).basis.n_landmarks == N * C
        assert fit(p, landmarks=None, subsample_size=N * C).basis.n_landmarks == N * C


def test_rank_above_the_data_is_reduced_with_one_warning_if_named(dtype):
    p = make_problem("mlp", "regression", dtype)
    x, outputs = p.landmarks
    repeated = x[[0, 1, 2, 0, 1]], outputs[[0, 1, 2, 0, 1]]
    with pytest.warns(UserWarning, match="n_eigenvalues was reduced from 5 to 3") as record:
        la = fit(p, landmarks=repeated)
    assert len(record) == 1
    assert la.basis.rank == 3
    assert fit(p, landmarks=repeated, n_eigenvalues=None).basis.rank == 3


def test_fit_draws_by_seed_alone(small_problem):
    p = small_problem
    eigenvalues = [
        fit(p, landmarks=None, subsample_size=M, seed=seed, loader=p.loader(batch)).basis.eigenvalues
        for seed, batch in ((0, 5), (0, 23), (1, 5))
    ]
    assert_close(eigenvalues[0], eigenvalues[1])
    assert (eigenvalues[0] - eigenvalues[2]).abs().max() > 1e-3


def test_balanced_fit_uses_the_balanced_landmarks(dtype):
    p = make_problem("mlp", "classification", dtype)
    y = torch.cat([torch.zeros(19), torch.ones(2), torch.full((2,), 2.0)]).long()
    p = p.with_data(p.x, y)
    la = ELLALaplace(p.model, "classification", subsample_size=6, n_eigenvalues=3)
    la.fit(p.loader(), balanced=True)
    chosen = water_filling(hash_keys(0, LANDMARK_INPUT, torch.arange(N)), y.tolist(), 6)
    assert Counter(y[chosen].tolist()) == {0: 2, 1: 2, 2: 2}
    rows = oracle.jacobian(p.model, p.x[chosen]).flatten(0, 1)
    V = dense_directions(la)
    span = torch.linalg.qr(rows.T)[0]
    assert_close(span @ span.T @ V, V)


# ---------------------------------------------------------------------------- precision


@pytest.mark.parametrize("name", ["mlp", "conv_batchnorm"])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_agrees_with_double(low, name, likelihood):
    p = make_problem(name, likelihood, low)
    la = fit(p, sigma_noise=1.0)
    exact = make_problem(name, likelihood, low)
    exact.model.double()
    exact = replace(
        exact,
        x=exact.x.double(),
        y=exact.y.double() if likelihood == "regression" else exact.y,
        landmarks=(exact.landmarks[0].double(), exact.landmarks[1]),
    )
    reference = fit(exact, sigma_noise=1.0)
    assert la.H.dtype == la.posterior_precision.dtype == la.basis.eigenvalues.dtype == F64
    assert all(v.dtype == low for v in la.basis.directions.values())
    phi, f = la.features(p.x_test)
    assert phi.dtype == f.dtype == low
    G = oracle.curvature(phi.double(), f.double(), likelihood)
    assert_close(la.backend.curvature(phi, f), G, rtol=1e-9)  # rounded features, but no rounding after them
    tolerance = 30 * torch.finfo(low).eps
    assert_close(la.basis.eigenvalues, reference.basis.eigenvalues, tolerance)
    mean, cov = la._glm_predictive_distribution(p.x_test)
    exact_mean, exact_cov = reference._glm_predictive_distribution(p.x_test.double())
    assert_close(mean, exact_mean, tolerance)
    assert_close(cov, exact_cov, 3 * tolerance)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_rank_twenty_survives_low_precision(low):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(13, 53), nn.Tanh(), nn.Linear(53, C)).to(low)
        x = torch.randn(67, 13).to(low)
    la = ELLALaplace(model, "classification", subsample_size=61, n_eigenvalues=20)
    la.fit([(x, torch.arange(67) % C)])
    assert la.basis.rank == 20
    V = dense_directions(la).double()
    assert_close(V.T @ V, torch.eye(20, dtype=F64), rtol=10 * torch.finfo(low).eps)
    for link in LINKS:
        probabilities = la(x[:B], link_approx=link).double()
        assert_close(probabilities.sum(-1), torch.ones(B, dtype=F64), rtol=10 * torch.finfo(low).eps)
    assert math.isfinite(float(la.log_marginal_likelihood()))


def test_double_data_enter_a_single_precision_model(dtype):
    p = make_problem("mlp", "regression", torch.float32)
    la = fit(p)
    doubled = p.with_data(p.x.double(), p.y.double())
    with pytest.warns(UserWarning, match=r"converted to torch.float32"):
        assert_close(fit(doubled).H, la.H)
    with pytest.warns(UserWarning, match=r"converted to torch.float32"):
        assert la(p.x_test.double())[0].dtype == torch.float32
