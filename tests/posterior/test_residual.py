"""The residual variance: what the span leaves out, added back; and the share it has."""

from __future__ import annotations

from itertools import pairwise

import oracle
import pytest
import torch
from conftest import N_HIDDEN, N_INPUTS, B, C, K, Problem, assert_close, make_problem
from laplace import FullLaplace
from laplace.curvature import GGNInterface
from torch.utils.data import DataLoader, TensorDataset

from laplace_ella import ELLALaplace

F64 = torch.float64
FEW = 7  # training inputs: their FEW * C gradient rows have full rank, below P
N_WEIGHTS = N_INPUTS * N_HIDDEN + N_HIDDEN + N_HIDDEN * C + C
KINDS = ("isotropic", "exact")
RTOL = 1e-6  # the rows' condition is that of a Gram matrix


def fit(problem: Problem, **options) -> ELLALaplace:
    options = {"n_eigenvalues": K, "curvature_size": None, **options}
    la = ELLALaplace(problem.model, **problem.options(**options))
    la.fit(problem.loader(), landmarks=problem.landmarks)
    return la


@pytest.fixture
def few(likelihood) -> Problem:
    """Few enough inputs that all their gradient rows can be landmarks; T = 1."""
    p = make_problem("mlp", likelihood)
    x, y = p.x[:FEW], p.y[:FEW]
    rows = x.repeat_interleave(C, 0), torch.arange(FEW * C) % C
    return Problem("few", likelihood, p.model, x, y, p.x_test, rows, p.sigma_noise, temperature=1.0)


def spanning(problem: Problem, **options) -> ELLALaplace:
    la = fit(problem, **{"n_eigenvalues": FEW * C, "curvature_size": 1000, "residual": "exact", **options})
    assert la.basis.rank == FEW * C < N_WEIGHTS
    return la


def full_laplace(problem: Problem) -> FullLaplace:
    full = FullLaplace(problem.model, backend=GGNInterface, **problem.options())
    full.fit(DataLoader(TensorDataset(problem.x, problem.y), batch_size=5))
    return full


def directions(la: ELLALaplace) -> torch.Tensor:
    """V (P, K)."""
    return torch.cat([v.flatten(1) for v in la.basis.directions.values()], 1).T


def outside(la: ELLALaplace, problem: Problem, x: torch.Tensor) -> torch.Tensor:
    """J (I - V V^T) (B, C, P)."""
    J, V = oracle.jacobian(problem.model, x), directions(la)
    return J - J @ V @ V.T


def joint(la: ELLALaplace, x: torch.Tensor) -> torch.Tensor:
    """(BC, BC)."""
    return la._glm_predictive_distribution(x, joint=True)[1]


def span_joint(la: ELLALaplace, x: torch.Tensor) -> torch.Tensor:
    return la.functional_covariance(la.features(x)[0])


def own_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """(B, C, C) of (BC, BC)."""
    return torch.stack([matrix[b : b + C, b : b + C] for b in range(0, len(matrix), C)])


def draws(la: ELLALaplace, x: torch.Tensor, n: int, seed: int = 0, **options) -> torch.Tensor:
    return la.functional_samples(x, n_samples=n, generator=torch.Generator().manual_seed(seed), **options)


def within_sampling_error(sample: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor) -> None:
    """Moments of iid Gaussian rows (S, D), entry by entry, within 5 standard errors."""
    variance = cov.diagonal()
    assert ((sample.mean(0) - mean).abs() <= 5 * (variance / len(sample)).sqrt() + 1e-12).all()
    error = (torch.outer(variance, variance) + cov.square()).div(len(sample)).sqrt()
    assert ((sample.T.cov() - cov).abs() <= 5 * error + 1e-12).all()


# ---------------------------------------------------------------------------- exact


def test_exact_residual_makes_moments_those_of_exact_laplace_at_any_input(few):
    la, full = spanning(few), full_laplace(few)
    for together in (False, True):
        ours = la._glm_predictive_distribution(few.x_test, joint=together)
        theirs = full._glm_predictive_distribution(few.x_test, joint=together)
        for a, b, name in zip(ours, theirs, ("mean", "covariance")):
            assert_close(a, b, RTOL, name=f"{name}, joint={together}")
    without = spanning(few, residual="none")
    missing = full._glm_predictive_distribution(few.x_test, joint=True)[1] - joint(without, few.x_test)
    assert missing.trace() > 5e-3 * joint(la, few.x_test).trace()


def test_exact_residual_makes_predictions_those_of_exact_laplace(few):
    la, full, x = spanning(few), full_laplace(few), few.x_test
    if few.likelihood == "regression":
        for options in ({}, {"joint": True}, {"diagonal_output": True}):
            for ours, theirs in zip(la(x, **options), full(x, **options), strict=True):
                assert_close(ours, theirs, RTOL, name=str(options))
        return
    for link in ("probit", "bridge", "bridge_norm"):
        assert_close(la(x, link_approx=link), full(x, link_approx=link), 10 * RTOL, name=link)
    _, cov = full._glm_predictive_distribution(x)
    dense = oracle.monte_carlo(oracle.outputs(few.model, x), cov, 20_000, torch.Generator().manual_seed(0))
    assert_close(la(x, link_approx="mc", n_samples=2**13), dense, rtol=0, atol=0.01, name="mc")


def test_exact_residual_is_the_part_of_the_gradients_outside_of_the_span(small_problem):
    p, rho = small_problem, 0.3
    la = fit(p, residual="exact", residual_scale=rho)
    R = outside(la, p, p.x_test).flatten(0, 1)
    assert_close(joint(la, p.x_test) - span_joint(la, p.x_test), rho / p.prior_precision * R @ R.T, 1e-8)


def test_prior_predictive_with_exact_residual_is_the_ntk_over_the_prior_precision(small_problem):
    """No data to speak of, rho = 1: J J^T / delta, whatever the span."""
    p = small_problem
    la = fit(p, residual="exact", temperature=1e25)
    J = oracle.jacobian(p.model, p.x_test).flatten(0, 1)
    assert_close(joint(la, p.x_test), J @ J.T / p.prior_precision, 1e-8)


def test_weight_samples_with_exact_residual_have_the_functional_covariance(dtype):
    p = make_problem("mlp", "regression", dtype)
    la = fit(p, residual="exact", residual_scale=0.5)
    samples = la.sample(20_000, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (20_000, N_WEIGHTS)
    J = oracle.jacobian(p.model, p.x_test).flatten(0, 1)
    offsets = (samples - la.mean) @ J.T
    within_sampling_error(offsets, torch.zeros(B * C, dtype=dtype), joint(la, p.x_test))


def test_weight_samples_with_isotropic_residual_stay_in_the_span(small_problem):
    la = fit(small_problem, residual="isotropic")
    offsets = la.sample(13, generator=torch.Generator().manual_seed(0)) - la.mean
    V = directions(la)
    assert_close(offsets @ V @ V.T, offsets, 1e-8)


# ---------------------------------------------------------------------------- isotropic


def isotropic_kernel(la: ELLALaplace, x: torch.Tensor) -> torch.Tensor:
    """<u(x), u(x')> (B, B), times rho / delta, after checking that it comes as a multiple of I_C."""
    difference = joint(la, x) - span_joint(la, x)
    kernel = difference[::C, ::C]
    eye = torch.eye(C, dtype=difference.dtype)
    assert_close(difference, torch.kron(kernel, eye), rtol=0, atol=1e-10 * float(joint(la, x).abs().max()))
    return kernel


def test_isotropic_residual_is_a_kernel_of_inputs_times_the_identity(small_problem):
    kernel = isotropic_kernel(fit(small_problem, residual="isotropic"), small_problem.x_test)
    assert (kernel.diagonal() > 0).all()
    assert torch.linalg.eigvalsh(kernel)[0] > -1e-12 * kernel.trace()
    assert (kernel - kernel.diagonal().diag()).abs().max() > 1e-3 * kernel.trace()


@pytest.mark.parametrize("samples", [1, 2])
def test_isotropic_residual_has_the_rank_of_its_tangents(small_problem, samples):
    la = fit(small_problem, residual="isotropic", residual_samples=samples)
    kernel = isotropic_kernel(la, small_problem.x_test)
    assert torch.linalg.matrix_rank(kernel, rtol=1e-9) == min(B, samples * C)


def test_isotropic_residual_averages_over_seeds_to_the_mean_of_the_exact_diagonal(small_problem):
    p, seeds, S = small_problem, 12, 40
    kernels = torch.stack(
        [
            isotropic_kernel(
                fit(p, residual="isotropic", residual_samples=S, residual_scale=0.3, seed=seed), p.x_test
            )
            for seed in range(seeds)
        ]
    )
    assert (kernels.std(0).diagonal() > 0).all()
    R = outside(fit(p), p, p.x_test)
    expected = 0.3 / p.prior_precision * torch.einsum("bcp,acp->ba", R, R) / C
    standard_error = kernels.std(0) / seeds**0.5
    assert ((kernels.mean(0) - expected).abs() < 5 * standard_error + 1e-12).all()
    assert_close(kernels.mean(0), expected, rtol=0.15)


def test_isotropic_residual_depends_on_the_seed_alone(small_problem):
    p = small_problem
    first, again, other = (joint(fit(p, residual="isotropic", seed=s), p.x_test) for s in (3, 3, 4))
    assert_close(again, first)
    assert (other - first).abs().max() > 1e-3 * first.abs().max()


def test_isotropic_residual_of_an_input_does_not_depend_on_its_batch(small_problem):
    la, x = fit(small_problem, residual="isotropic"), small_problem.x_test
    whole = la._glm_predictive_distribution(x)[1]
    parts = torch.cat([la._glm_predictive_distribution(part)[1] for part in x.split([2, 5])])
    assert_close(parts, whole)


# ---------------------------------------------------------------------------- both


@pytest.mark.parametrize("kind", KINDS)
def test_covariance_with_residual_is_psd_and_above_that_of_the_span(small_problem, kind):
    la, x = fit(small_problem, residual=kind), small_problem.x_test
    difference = joint(la, x) - span_joint(la, x)
    assert_close(difference, difference.T, atol=1e-12)
    assert torch.linalg.eigvalsh(difference)[0] > -1e-10 * joint(la, x).trace()
    assert difference.trace() > 1e-3 * joint(la, x).trace()


@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_single_inputs_are_blocks_of_the_joint_ones(small_problem, kind):
    la, x = fit(small_problem, residual=kind), small_problem.x_test
    cov = la._glm_predictive_distribution(x)[1]
    assert_close(cov, own_blocks(joint(la, x)))
    _, variance = la._glm_predictive_distribution(x, diagonal_output=True)
    assert_close(variance, cov.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("kind", KINDS)
def test_links_see_the_residual(dtype, kind):
    p = make_problem("mlp", "classification", dtype)
    la = fit(p, residual=kind, residual_scale=0.3)
    f, cov = la._glm_predictive_distribution(p.x_test)
    assert_close(la(p.x_test), oracle.probit(f, cov), name="probit")
    assert_close(la(p.x_test, link_approx="bridge"), oracle.bridge(f, cov, False), 1e-7, name="bridge")
    assert_close(
        la(p.x_test, link_approx="bridge_norm"), oracle.bridge(f, cov, True), 1e-7, name="bridge_norm"
    )
    dense = oracle.monte_carlo(f, cov, 20_000, torch.Generator().manual_seed(0))
    assert_close(la(p.x_test, link_approx="mc", n_samples=2**13), dense, rtol=0, atol=0.01, name="mc")
    assert (la(p.x_test) - fit(p)(p.x_test)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_mc_link_with_residual_is_repeatable_and_leaves_the_global_generator_alone(dtype, kind):
    p = make_problem("mlp", "classification", dtype)
    la = fit(p, residual=kind)
    before = torch.get_rng_state()
    first = la(p.x_test, link_approx="mc")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(la(p.x_test, link_approx="mc"), first)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_samples_have_the_joint_covariance(small_problem, kind):
    la, x = fit(small_problem, residual=kind, residual_scale=0.5), small_problem.x_test
    mean, cov = la._glm_predictive_distribution(x, joint=True)
    within_sampling_error(draws(la, x, 20_000).flatten(1), mean, cov)


@pytest.mark.parametrize("kind", KINDS)
def test_independent_samples_have_the_variances_with_the_residual(small_problem, kind):
    la, x = fit(small_problem, residual=kind), small_problem.x_test
    mean, cov = la._glm_predictive_distribution(x, joint=True)
    samples = draws(la, x, 20_000, diagonal_output=True)
    within_sampling_error(samples.flatten(1), mean, cov.diagonal().diag())


@pytest.mark.parametrize("kind", KINDS)
def test_all_inputs_share_the_noise_of_a_draw(small_problem, kind):
    la, x = fit(small_problem, residual=kind), small_problem.x_test
    parts = [draws(la, part, 13, seed=2) for part in x.split([2, 5])]
    assert_close(torch.cat(parts, 1), draws(la, x, 13, seed=2))


@pytest.mark.parametrize("kind", KINDS)
def test_predictive_samples_are_functional_samples_through_the_link(small_problem, kind):
    la, x = fit(small_problem, residual=kind), small_problem.x_test
    predictive = la.predictive_samples(x, n_samples=13, generator=torch.Generator().manual_seed(4))
    functional = draws(la, x, 13, seed=4)
    classes = small_problem.likelihood == "classification"
    assert_close(predictive, functional.softmax(-1) if classes else functional)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_ratio_of_residual_scale_and_prior_precision_is_identified(small_problem, kind):
    la, x = fit(small_problem, residual=kind), small_problem.x_test
    residual = joint(la, x) - span_joint(la, x)
    la.prior_precision, la.residual_scale = 7 * small_problem.prior_precision, 7.0
    assert_close(joint(la, x) - span_joint(la, x), residual, 1e-8)
    la.prior_precision, la.residual_scale = small_problem.prior_precision, 0.2
    assert_close(joint(la, x) - span_joint(la, x), 0.2 * residual, 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_residual_is_not_tempered(small_problem, kind):
    la, x = fit(small_problem, residual=kind), small_problem.x_test
    residual = joint(la, x) - span_joint(la, x)
    la.temperature = 90.0
    assert_close(joint(la, x) - span_joint(la, x), residual, 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_and_span_moments_do_not_see_the_residual(small_problem, kind):
    p = small_problem
    la, plain = fit(p, residual=kind, residual_scale=0.3), fit(p)
    assert_close(la.log_marginal_likelihood(), plain.log_marginal_likelihood())
    phi, _ = plain.features(p.x_test)
    assert_close(la.features(p.x_test)[0], phi)
    assert_close(la.functional_variance(phi), plain.functional_variance(phi))
    assert_close(la.functional_covariance(phi), plain.functional_covariance(phi))
    assert_close(joint(plain, p.x_test), plain.functional_covariance(phi))
    assert_close(la.posterior_precision, plain.posterior_precision)


def test_without_residual_nothing_is_added_whatever_its_scale(small_problem):
    la, x = fit(small_problem, residual_scale=5.0), small_problem.x_test
    assert la.residual == "none"
    assert_close(joint(la, x), joint(fit(small_problem), x))


def test_defaults_and_attributes(dtype):
    la = ELLALaplace(make_problem("mlp", "regression", dtype).model, "regression")
    assert (la.residual, la.residual_scale, la.residual_samples) == ("none", 1.0, 4)
    la = ELLALaplace(la.model, "regression", residual="exact", residual_scale=0.2, residual_samples=3)
    assert (la.residual, la.residual_scale, la.residual_samples) == ("exact", 0.2, 3)


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [4, N_WEIGHTS])
def test_a_vector_prior_and_a_residual_are_refused(small_problem, kind, size):
    with pytest.raises(ValueError, match="scalar"):
        fit(small_problem, residual=kind, prior_precision=torch.ones(size, dtype=F64))
    la = fit(small_problem, residual=kind)
    before = joint(la, small_problem.x_test)
    with pytest.raises(ValueError, match="scalar"):
        la.prior_precision = torch.ones(size, dtype=F64)
    assert torch.equal(joint(la, small_problem.x_test), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", ["layerwise", "diag"])
def test_tuning_a_vector_prior_with_a_residual_is_refused(small_problem, kind, structure):
    la = fit(small_problem, residual=kind)
    with pytest.raises(ValueError, match="scalar"):
        la.optimize_prior_precision(method="marglik", prior_structure=structure, n_steps=2)
    assert la.prior_precision.item() == small_problem.prior_precision


def test_exact_residual_and_gradients_to_the_inputs_are_refused(small_problem):
    with pytest.raises(ValueError, match="enable_backprop"):
        fit(small_problem, residual="exact", enable_backprop=True)


@pytest.mark.parametrize(
    "options",
    [
        {"residual": "diagonal"},
        {"residual": None},
        {"residual_scale": 0.0},
        {"residual_scale": -1.0},
        {"residual_scale": float("nan")},
        {"residual_scale": float("inf")},
        {"residual_samples": 0},
        {"residual_samples": 1.5},
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(small_problem, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fit(small_problem, **options)


def test_a_bad_residual_scale_is_refused_when_assigned(small_problem):
    la = fit(small_problem, residual="isotropic")
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="residual_scale"):
            la.residual_scale = value
    assert la.residual_scale == 1.0


# ---------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_estimator_has_the_residual(small_problem, kind, tmp_path):
    p = small_problem
    la = fit(p, residual=kind, residual_scale=0.3, residual_samples=3, seed=5)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other = ELLALaplace(p.model, **p.options())
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    assert (other.residual, other.residual_scale, other.residual_samples) == (kind, 0.3, 3)
    assert_close(joint(other, p.x_test), joint(la, p.x_test))
    assert_close(draws(other, p.x_test, 5), draws(la, p.x_test, 5))


# ---------------------------------------------------------------------------- the share


def dense_share(la: ELLALaplace, problem: Problem, x: torch.Tensor) -> torch.Tensor:
    J = oracle.jacobian(problem.model, x)
    return 1 - (J @ directions(la)).square().sum((1, 2)) / J.square().sum((1, 2))


def test_share_of_an_exact_residual_is_that_of_the_dense_gradients(small_problem):
    la = fit(small_problem, residual="exact")
    share = la.residual_share(small_problem.x_test)
    assert share.shape == (B,)
    assert_close(share, dense_share(la, small_problem, small_problem.x_test), 1e-8)


def test_share_does_not_depend_on_prior_temperature_and_scale(small_problem):
    la = fit(small_problem, residual="exact")
    before = la.residual_share(small_problem.x_test)
    la.prior_precision, la.temperature, la.residual_scale = 9.0, 80.0, 0.1
    assert_close(la.residual_share(small_problem.x_test), before)


def test_share_of_training_inputs_is_zero_where_their_rows_are_spanned(few):
    la = spanning(few)
    assert la.residual_share(few.x).abs().max() < 1e-6
    assert la.residual_share(few.x_test).max() > 0.01


@pytest.mark.parametrize("kind", ["none", *KINDS])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_share_lies_between_zero_and_one(small_problem, kind, scale):
    la = fit(small_problem, residual=kind)
    share = la.residual_share(scale * small_problem.x_test)
    assert share.shape == (B,)
    assert (share >= 0).all()
    assert (share <= 1).all()


@pytest.mark.parametrize("kind", ["none", "isotropic"])
def test_share_from_many_tangents_is_close_to_the_exact_one(small_problem, kind):
    la = fit(small_problem, residual=kind, residual_samples=400)
    expected = dense_share(la, small_problem, small_problem.x_test)
    assert_close(la.residual_share(small_problem.x_test), expected, rtol=0, atol=0.05)


def test_share_falls_with_rank(small_problem):
    shares = [
        fit(small_problem, residual="exact", n_eigenvalues=rank).residual_share(small_problem.x_test)
        for rank in (2, 5, 11)
    ]
    for low, high in pairwise(shares):
        assert (high <= low + 1e-12).all()
        assert (low - high).max() > 1e-3


# ---------------------------------------------------------------------------- novelty


def fit_classifier(**options) -> tuple[Problem, ELLALaplace]:
    problem = make_problem("mlp", "classification")
    return problem, fit(problem, **options)


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_novelty_before_calibration_is_the_share(kind):
    p, la = fit_classifier(residual=kind)
    assert_close(la.novelty(p.x_test), la.residual_share(p.x_test))


def test_calibrated_novelty_needs_no_labels():
    p, la = fit_classifier(residual="exact")
    la.calibrate_novelty(p.loader())
    with_labels = la.novelty(p.x_test)
    la.calibrate_novelty([x for x, _ in p.loader()])
    without = la.novelty(p.x_test)
    assert_close(without, with_labels)
    la.calibrate_novelty(p.with_data(p.x, (p.y + 1) % C).loader())
    assert_close(la.novelty(p.x_test), without)


def test_calibrated_novelty_of_the_calibration_data_is_centred():
    p, la = fit_classifier(residual="exact")
    la.calibrate_novelty(p.loader())
    scores = la.novelty(p.x)
    assert scores.isfinite().all()
    assert abs(float(scores.mean())) < 0.3
    assert 0.5 < float(scores.std()) < 2.5


def test_calibrated_novelty_is_finite_far_from_the_data():
    p, la = fit_classifier(residual="exact")
    la.calibrate_novelty(p.loader())
    for scale in (0.0, 1e-3, 1e3):
        assert la.novelty(scale * p.x_test).isfinite().all()


def test_calibration_of_novelty_changes_no_prediction():
    p, la = fit_classifier(residual="isotropic")
    before = la(p.x_test)
    la.calibrate_novelty(p.loader())
    assert torch.equal(la(p.x_test), before)


def test_calibration_of_novelty_is_restored_from_a_checkpoint(tmp_path):
    p, la = fit_classifier(residual="exact")
    la.calibrate_novelty(p.loader())
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other = ELLALaplace(p.model, **p.options())
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    assert_close(other.novelty(p.x_test), la.novelty(p.x_test))
    assert (la.novelty(p.x_test) - la.residual_share(p.x_test)).abs().max() > 1e-3


def test_calibrating_novelty_of_a_regression_is_refused():
    p = make_problem("mlp", "regression")
    la = fit(p)
    assert la.novelty(p.x_test).shape == (B,)
    with pytest.raises(ValueError, match=r"classification|regression"):
        la.calibrate_novelty(p.loader())
