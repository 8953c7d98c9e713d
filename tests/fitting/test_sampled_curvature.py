"""``curvature="mc"``: G from sampled labels, one backward pass each."""

import warnings
from functools import partial

import pytest
import torch
from conftest import Problem, assert_close, make_problem
from helpers import fit_problem

F64 = torch.float64
LIKELIHOODS = ("classification", "regression", "bernoulli")
SEEDS = 30
fit = partial(fit_problem, curvature_size=2000)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request):
    return request.param


def problem_of(likelihood, n=None):
    p = make_problem("mlp", "classification" if likelihood == "classification" else "regression")
    y = (p.y > 0).double() if likelihood == "bernoulli" else p.y
    p = Problem("mlp", likelihood, p.model, p.x, y, p.x_test, p.landmarks, 1.0)
    if n is not None:
        x = torch.randn(n, p.x.shape[1], generator=torch.Generator().manual_seed(9), dtype=F64)
        p = p.with_data(x, p.y[torch.arange(n) % len(p.y)])
    return p


def sampled(problem, **options):
    """G (SEEDS, K, K)."""
    return torch.stack([fit(problem, curvature="mc", seed=s, **options).H for s in range(SEEDS)])


def test_sampled_curvature_is_unbiased_symmetric_and_positive_semi_definite(likelihood):
    p = problem_of(likelihood)
    exact = fit(p).H
    traces = sampled(p, curvature_size=13).diagonal(dim1=1, dim2=2).sum(1)
    assert (traces.mean() - exact.trace()).abs() < 5 * traces.std() / SEEDS**0.5
    G = sampled(p)
    standard_error = G.std(0) / SEEDS**0.5
    assert (standard_error > 0).all()
    assert ((G.mean(0) - exact).abs() / standard_error).max() < 5
    traces = G.diagonal(dim1=1, dim2=2).sum(1)
    assert (traces.mean() - exact.trace()).abs() < 0.25 * exact.trace()
    assert G.dtype == F64
    assert_close(G, G.mT)
    assert torch.linalg.eigvalsh(G).min() > -1e-12 * traces.max()


def test_one_label_an_input_gives_rank_one_an_input(likelihood):
    """Of two inputs, one sampled label each."""
    p = problem_of(likelihood)
    p = p.with_data(p.x[:2], p.y[:2])
    rank = {s: torch.linalg.matrix_rank(fit(p, curvature="mc", curvature_samples=s).H) for s in (1, 2)}
    assert rank[1] <= 2
    assert rank[2] <= 4
    assert torch.linalg.matrix_rank(fit(p).H) > 2


def test_seed_and_position_decide_the_labels(likelihood):
    """And neither batches, targets, nor the global generator, which is left alone."""
    p = problem_of(likelihood)
    la, before = fit(p, curvature="mc", seed=3), torch.get_rng_state()
    assert torch.equal(fit(p, curvature="mc", seed=3).H, la.H)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(fit(p, curvature="mc", seed=3).H, la.H)
    assert (fit(p, curvature="mc", seed=4).H - la.H).abs().max() > 1e-3 * la.H.abs().max()
    for batch in (3, 23):
        assert_close(fit(p, batch=batch, curvature="mc", seed=3).H, la.H)
    flipped = fit(p.with_data(p.x, p.y.flip(0)), curvature="mc", seed=3)
    assert_close(flipped.H, la.H)
    exact = fit(p)
    assert_close(exact.loss, la.loss)
    assert_close(exact.features(p.x_test)[0], la.features(p.x_test)[0])
    assert (flipped.loss - la.loss).abs() > 1e-6


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


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("n", "curvature_size", "expected"),
    [(103, 99, 1), (99, 2000, 1), (100, 100, 0), (100, 2000, 0), (100, None, 0)],
)
def test_fewer_than_twenty_inputs_a_direction_warn_once(likelihood, n, curvature_size, expected):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(problem_of(likelihood, n), curvature="mc", curvature_size=curvature_size)
        fit(problem_of(likelihood), curvature="exact")
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert len(said) == expected
    assert all("badly wrong" in text for text in said)
