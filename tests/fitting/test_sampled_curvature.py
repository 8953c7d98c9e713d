"""``curvature="mc"``: G from sampled labels, one backward pass each."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import C, K, Problem, assert_close, make_problem
from torch import Tensor

from laplace_ella import ELLALaplace

F64 = torch.float64
LIKELIHOODS = ("classification", "regression", "bernoulli")
SEEDS = 40

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request) -> str:
    return request.param


def problem_of(likelihood: str, n: int | None = None) -> Problem:
    p = make_problem("mlp", "classification" if likelihood == "classification" else "regression")
    y = (p.y > 0).double() if likelihood == "bernoulli" else p.y
    p = Problem("mlp", likelihood, p.model, p.x, y, p.x_test, p.landmarks, 1.0)
    if n is not None:
        x = torch.randn(n, p.x.shape[1], generator=torch.Generator().manual_seed(9), dtype=F64)
        p = p.with_data(x, p.y[torch.arange(n) % len(p.y)])
    return p


def fit(problem: Problem, **options) -> ELLALaplace:
    options = {"n_eigenvalues": K, **options}
    la = ELLALaplace(problem.model, **problem.options(**options))
    la.fit(problem.loader(), landmarks=problem.landmarks)
    return la


def sampled(problem: Problem, seeds: int = SEEDS, **options) -> Tensor:
    """G (seeds, K, K)."""
    return torch.stack([fit(problem, curvature="mc", seed=s, **options).H for s in range(seeds)])


def test_sampled_curvature_is_unbiased(likelihood):
    p = problem_of(likelihood)
    draws, exact = sampled(p).flatten(1), fit(p).H.flatten()
    standard_error = draws.std(0) / SEEDS**0.5
    assert (standard_error > 0).all()
    assert ((draws.mean(0) - exact).abs() / standard_error).max() < 5
    trace = exact.reshape(K, K).trace()
    assert (draws.reshape(-1, K, K).diagonal(dim1=1, dim2=2).sum(1).mean() - trace).abs() < 0.25 * trace


def test_sampled_curvature_of_a_part_of_the_data_is_unbiased_too(likelihood):
    p = problem_of(likelihood)
    traces = sampled(p, curvature_size=13).diagonal(dim1=1, dim2=2).sum(1)
    exact = fit(p).H.trace()
    assert (traces.mean() - exact).abs() < 5 * traces.std() / SEEDS**0.5


def test_sampled_curvature_is_symmetric_and_positive_semi_definite(likelihood):
    G = sampled(problem_of(likelihood), seeds=3)
    assert G.dtype == F64
    assert_close(G, G.mT)
    assert torch.linalg.eigvalsh(G).min() > -1e-12 * G.diagonal(dim1=1, dim2=2).sum(1).max()


def test_one_label_an_input_gives_rank_one_an_input(likelihood):
    """Of two inputs, one sampled label each."""
    p = problem_of(likelihood)
    p = p.with_data(p.x[:2], p.y[:2])
    rank = {s: torch.linalg.matrix_rank(fit(p, curvature="mc", curvature_samples=s).H) for s in (1, 2)}
    assert rank[1] <= 2
    assert rank[2] <= 4
    assert torch.linalg.matrix_rank(fit(p).H) > 2


def test_the_seed_decides_the_labels(likelihood):
    p = problem_of(likelihood)
    first, again, other = (fit(p, curvature="mc", seed=s).H for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert (other - first).abs().max() > 1e-3 * first.abs().max()


def test_sampling_leaves_the_global_generator_alone(likelihood):
    p = problem_of(likelihood)
    before = torch.get_rng_state()
    first = fit(p, curvature="mc").H
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(fit(p, curvature="mc").H, first)


def test_error_falls_with_the_number_of_labels(likelihood):
    """Variance falls as 1 / s, so the error at s = 16 is a quarter of that at s = 1."""
    p = problem_of(likelihood)
    exact = fit(p).H
    errors = [
        (sampled(p, 25, curvature_samples=s) - exact).square().sum((1, 2)).mean().sqrt() for s in (1, 16)
    ]
    assert 0.15 * errors[0] < errors[1] < 0.4 * errors[0]


def test_many_labels_give_the_exact_curvature(likelihood):
    p = problem_of(likelihood)
    exact = fit(p).H
    error = (fit(p, curvature="mc", curvature_samples=300).H - exact).norm() / exact.norm()
    assert error < 0.1


def test_targets_do_not_enter_the_sampled_curvature(likelihood):
    p = problem_of(likelihood)
    other = p.with_data(p.x, p.y.flip(0))
    la, flipped = fit(p, curvature="mc"), fit(other, curvature="mc")
    assert_close(flipped.H, la.H)
    assert (flipped.loss - la.loss).abs() > 1e-6


def test_basis_and_loss_are_those_of_the_exact_curvature(likelihood):
    p = problem_of(likelihood)
    la, exact = fit(p, curvature="mc"), fit(p)
    assert_close(la.loss, exact.loss)
    assert_close(la.basis.eigenvalues, exact.basis.eigenvalues)
    assert_close(la.features(p.x_test)[0], exact.features(p.x_test)[0])


def test_batch_size_does_not_bias_it(likelihood):
    p = problem_of(likelihood)
    exact = fit(p).H.trace()
    for size in (3, 23):
        traces = []
        for seed in range(20):
            la = ELLALaplace(p.model, **p.options(n_eigenvalues=K, curvature="mc", seed=seed))
            la.fit(p.loader(size), landmarks=p.landmarks)
            traces.append(la.H.trace())
        traces = torch.stack(traces)
        assert (traces.mean() - exact).abs() < 5 * traces.std() / 20**0.5, size


# ---------------------------------------------------------------------------- warnings, errors


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("options", [{"curvature_size": 20 * K - 1}, {"curvature_size": 2000}, {}])
def test_fewer_than_twenty_inputs_a_direction_warn_once(likelihood, options):
    n = 20 * K + 3 if options.get("curvature_size") == 20 * K - 1 else 20 * K - 1
    p = problem_of(likelihood, n)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(p, curvature="mc", **options)
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert len(messages) == 1


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("curvature_size", [20 * K, 2000, None])
def test_enough_inputs_and_the_exact_curvature_are_silent(likelihood, curvature_size):
    p = problem_of(likelihood, 20 * K)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(p, curvature="mc", curvature_size=curvature_size)
        fit(problem_of(likelihood), curvature="exact")


@pytest.mark.parametrize("value", ["MC", "ef", "empirical", None, 1])
def test_an_unknown_curvature_is_refused(value):
    with pytest.raises(ValueError, match="curvature"):
        fit(problem_of("classification"), curvature=value)


@pytest.mark.parametrize("value", [0, -1, 1.5, None, "1"])
def test_a_bad_number_of_labels_is_refused(value):
    with pytest.raises(ValueError, match="curvature_samples"):
        fit(problem_of("classification"), curvature="mc", curvature_samples=value)


def test_defaults():
    la = ELLALaplace(problem_of("classification").model, "classification")
    assert (la.curvature, la.curvature_samples) == ("exact", 1)


def test_a_restored_estimator_knows_its_curvature(tmp_path):
    p = problem_of("classification")
    la = fit(p, curvature="mc", curvature_samples=3, seed=5)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other = ELLALaplace(p.model, **p.options())
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    assert (other.curvature, other.curvature_samples) == ("mc", 3)
    assert torch.equal(other.H, la.H)
    assert torch.equal(other(p.x_test), la(p.x_test))
    other.fit(p.loader(), landmarks=p.landmarks)
    assert_close(other.H, la.H)


def test_added_data_are_sampled_independently(likelihood):
    """Were the labels of equal inputs equal, the error of their sum would not average out."""
    p = problem_of(likelihood)
    exact, ratios = fit(p).H, []
    for seed in range(25):
        la = fit(p, curvature="mc", seed=seed)
        first = (la.H - exact).norm()
        la.fit(p.loader(), override=False)
        assert la.n_data == 2 * len(p.x)
        ratios.append((la.H - 2 * exact).norm() / first)
    assert float(torch.stack(ratios).square().mean().sqrt()) < 1.9


def test_outputs_of_the_problem_are_as_many_as_expected(likelihood):
    assert fit(problem_of(likelihood), curvature="mc").n_outputs == C
