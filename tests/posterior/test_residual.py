"""The residual variance: what the span leaves out, added back."""

import dataclasses

import oracle
import pytest
import torch
from conftest import N_HIDDEN, N_INPUTS, B, C, assert_close, make_problem
from helpers import N, as_tuple, build, directions, fitted, full_laplace, inputs, mlp, moments, train_loader
from helpers import fit_problem as fit

F64 = torch.float64
FEW = 7  # training inputs: their FEW * C gradient rows have full rank, below P
N_WEIGHTS = N_INPUTS * N_HIDDEN + N_HIDDEN + N_HIDDEN * C + C
KINDS = ("isotropic", "exact")
RTOL = 1e-6  # the rows' condition is that of a Gram matrix
X = inputs(7, seed=7)


@pytest.fixture
def few(likelihood):
    """Few enough inputs that all their gradient rows can be landmarks; T = 1."""
    p = make_problem("mlp", likelihood)
    rows = p.x[:FEW].repeat_interleave(C, 0), torch.arange(FEW * C) % C
    return dataclasses.replace(p, x=p.x[:FEW], y=p.y[:FEW], landmarks=rows, temperature=1.0)


def spanning(problem, **options):
    la = fit(problem, **{"n_eigenvalues": FEW * C, "residual": "exact", **options})
    assert la.basis.rank == FEW * C < N_WEIGHTS
    return la


def outside(la, problem, x):
    """J (I - V V^T) (B, C, P)."""
    J, V = oracle.jacobian(problem.model, x), directions(la)
    return J - J @ V @ V.T


def joint(la, x):
    """(BC, BC)."""
    return moments(la, x, joint=True)[1]


def added(la, x):
    """What the residual adds to the joint covariance of the span."""
    return joint(la, x) - la.functional_covariance(la.features(x)[0])


def draws(la, x, n, seed=0, **options):
    return la.functional_samples(x, n_samples=n, generator=torch.Generator().manual_seed(seed), **options)


def within_sampling_error(sample, mean, cov):
    """Moments of iid Gaussian rows (S, D), entry by entry, within 5 standard errors."""
    variance = cov.diagonal()
    assert ((sample.mean(0) - mean).abs() <= 5 * (variance / len(sample)).sqrt() + 1e-12).all()
    error = (torch.outer(variance, variance) + cov.square()).div(len(sample)).sqrt()
    assert ((sample.T.cov() - cov).abs() <= 5 * error + 1e-12).all()


def test_exact_residual_makes_predictions_those_of_exact_laplace_at_any_input(few):
    la, x = spanning(few), few.x_test
    full = full_laplace(few)
    for together in (False, True):
        for ours, theirs in zip(moments(la, x, joint=together), moments(full, x, joint=together)):
            assert_close(ours, theirs, RTOL, name=f"moments, joint={together}")
    missing = moments(full, x, joint=True)[1] - joint(spanning(few, residual="none"), x)
    assert missing.trace() > 5e-3 * joint(la, x).trace()
    if few.likelihood == "regression":
        for options in ({}, {"joint": True}, {"diagonal_output": True}):
            for ours, theirs in zip(la(x, **options), full(x, **options), strict=True):
                assert_close(ours, theirs, RTOL, name=str(options))
        return
    for link in ("probit", "bridge", "bridge_norm"):
        assert_close(la(x, link_approx=link), full(x, link_approx=link), 10 * RTOL, name=link)


def test_exact_residual_is_the_part_of_the_gradients_outside_of_the_span(small_problem):
    p, rho = small_problem, 0.3
    la = fit(p, residual="exact", residual_scale=rho)
    R = outside(la, p, p.x_test).flatten(0, 1)
    assert_close(added(la, p.x_test), rho / p.prior_precision * R @ R.T, 1e-8)


def test_weight_samples_have_the_functional_covariance_if_exact_and_stay_in_the_span_if_not():
    p = make_problem("mlp", "regression")
    J = oracle.jacobian(p.model, p.x_test).flatten(0, 1)
    for kind in KINDS:
        la = fit(p, residual=kind, residual_scale=0.5)
        samples = la.sample(20_000, generator=torch.Generator().manual_seed(0))
        assert samples.shape == (20_000, N_WEIGHTS)
        offsets = samples - la.mean
        if kind == "exact":
            within_sampling_error(offsets @ J.T, torch.zeros(B * C, dtype=F64), joint(la, p.x_test))
        else:
            V = directions(la)
            assert_close(offsets @ V @ V.T, offsets, 1e-8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_the_exact_residual_has_no_negative_variance(likelihood, dtype):
    data, x = train_loader(likelihood, dtype=torch.float32), inputs(dtype=torch.float32)
    options = {"residual": "exact", "n_eigenvalues": None, "prior_precision": 1e-5, "subsample_size": N * C}
    la = fitted(likelihood, mlp(dtype=dtype), data, **options)
    if likelihood == "regression":
        assert (la(x)[1].diagonal(dim1=1, dim2=2) >= 0).all()
        assert (la(x[:5], joint=True)[1].diagonal() >= 0).all()
    assert all(t.isfinite().all() for t in as_tuple(la(x)))
    assert la.functional_samples(x, diagonal_output=True, n_samples=3).isfinite().all()


def isotropic_kernel(la, x):
    """<u(x), u(x')> (B, B), times rho / delta, after checking that it comes as a multiple of I_C."""
    found, largest = added(la, x), float(joint(la, x).abs().max())
    assert_close(found, torch.kron(found[::C, ::C], torch.eye(C, dtype=F64)), rtol=0, atol=1e-10 * largest)
    return found[::C, ::C]


@pytest.mark.parametrize("samples", [1, 2])
def test_isotropic_residual_is_a_kernel_of_the_rank_of_its_tangents_times_the_identity(
    small_problem, samples
):
    la = fit(small_problem, residual="isotropic", residual_samples=samples)
    kernel = isotropic_kernel(la, small_problem.x_test)
    assert (kernel.diagonal() > 0).all()
    assert (kernel - kernel.diagonal().diag()).abs().max() > 1e-3 * kernel.trace()
    assert torch.linalg.matrix_rank(kernel, rtol=1e-9) == min(B, samples * C)


def test_isotropic_residual_averages_over_seeds_to_the_mean_of_the_exact_diagonal(small_problem):
    p, seeds = small_problem, 12
    options = {"residual": "isotropic", "residual_samples": 40, "residual_scale": 0.3}
    kernels = torch.stack([isotropic_kernel(fit(p, seed=s, **options), p.x_test) for s in range(seeds)])
    assert (kernels.std(0).diagonal() > 0).all()
    R = outside(fit(p), p, p.x_test)
    expected = 0.3 / p.prior_precision * torch.einsum("bcp,acp->ba", R, R) / C
    assert ((kernels.mean(0) - expected).abs() < 5 * kernels.std(0) / seeds**0.5 + 1e-12).all()
    assert_close(kernels.mean(0), expected, rtol=0.15)


def test_isotropic_residual_depends_on_the_seed_alone_and_on_no_batch(small_problem):
    p = small_problem
    first, again, other = (fit(p, residual="isotropic", seed=s) for s in (3, 3, 4))
    assert_close(joint(again, p.x_test), joint(first, p.x_test))
    assert (joint(other, p.x_test) - joint(first, p.x_test)).abs().max() > 1e-3
    parts = torch.cat([moments(first, part)[1] for part in p.x_test.split([2, 5])])
    assert_close(parts, moments(first, p.x_test)[1])


def test_tangents_made_in_inference_mode_can_meet_a_graph():
    la = fitted(residual="isotropic", enable_backprop=True)
    with torch.inference_mode():
        la(X)
    x = X.clone().requires_grad_()
    la(x).square().sum().backward()
    assert x.grad.isfinite().all()


def test_overlaps_keep_their_precision_under_autocast():
    basis = fitted(model=mlp(dtype=torch.float32), data=train_loader(dtype=torch.float32)).basis
    tangents = {k: torch.randn_like(v) for k, v in basis.directions.items()}
    expected = basis.overlap(tangents)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(basis.overlap(tangents).float(), expected.float())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_psd_scaled_by_rho_over_delta_and_not_tempered(small_problem, kind):
    la, x = fit(small_problem, residual=kind), small_problem.x_test
    difference = added(la, x)
    assert_close(difference, difference.T, atol=1e-12)
    assert torch.linalg.eigvalsh(difference)[0] > -1e-10 * joint(la, x).trace()
    assert difference.trace() > 1e-3 * joint(la, x).trace()
    delta = small_problem.prior_precision
    for prior, scale, factor in ((7 * delta, 7.0, 1), (delta, 0.2, 0.2)):
        la.prior_precision, la.residual_scale = prior, scale
        assert_close(added(la, x), factor * difference, 1e-8)
    la.temperature = 90.0
    assert_close(added(la, x), 0.2 * difference, 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_links_see_the_residual(kind):
    p = make_problem("mlp", "classification")
    la, x = fit(p, residual=kind, residual_scale=0.3), p.x_test
    f, cov = moments(la, x)
    assert_close(la(x), oracle.probit(f, cov), name="probit")
    for link in ("bridge", "bridge_norm"):
        assert_close(la(x, link_approx=link), oracle.bridge(f, cov, link == "bridge_norm"), 1e-7, name=link)
    dense = oracle.monte_carlo(f, cov, 20_000, torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    assert_close(la(x, link_approx="mc", n_samples=2**13), dense, rtol=0, atol=0.01, name="mc")
    assert torch.equal(la(x, link_approx="mc"), la(x, link_approx="mc"))
    assert torch.equal(torch.get_rng_state(), before)
    assert (la(x) - fit(p)(x)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_joint_covariance_and_one_noise_for_all_inputs(small_problem, kind):
    la, x = fit(small_problem, residual=kind, residual_scale=0.5), small_problem.x_test
    mean, cov = moments(la, x, joint=True)
    within_sampling_error(draws(la, x, 20_000).flatten(1), mean, cov)
    independent = draws(la, x, 20_000, diagonal_output=True).flatten(1)
    within_sampling_error(independent, mean, cov.diagonal().diag())
    functional = draws(la, x, 13, seed=2)
    assert_close(torch.cat([draws(la, part, 13, seed=2) for part in x.split([2, 5])], 1), functional)
    predictive = la.predictive_samples(x, n_samples=13, generator=torch.Generator().manual_seed(2))
    classes = small_problem.likelihood == "classification"
    assert_close(predictive, functional.softmax(-1) if classes else functional)


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_and_span_moments_do_not_see_the_residual(small_problem, kind):
    p = small_problem
    la, plain = fit(p, residual=kind, residual_scale=0.3), fit(p)
    assert_close(la.log_marginal_likelihood(), plain.log_marginal_likelihood())
    phi, _ = plain.features(p.x_test)
    assert_close(la.features(p.x_test)[0], phi)
    assert_close(la.functional_variance(phi), plain.functional_variance(phi))
    assert_close(la.functional_covariance(phi), plain.functional_covariance(phi))
    assert_close(la.posterior_precision, plain.posterior_precision)
    assert_close(joint(plain, p.x_test), plain.functional_covariance(phi))
    assert_close(joint(fit(p, residual_scale=5.0), p.x_test), joint(plain, p.x_test))


def test_defaults_and_what_is_refused():
    la = build()
    assert (la.residual, la.residual_scale, la.residual_samples) == ("none", 1.0, 4)
    with pytest.raises(ValueError, match="enable_backprop"):
        build(residual="exact", enable_backprop=True)
