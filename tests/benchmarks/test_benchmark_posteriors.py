"""The posteriors that studies compare ELLA with are laplace-torch's, and predictions from kept features are ELLA's own."""

import importlib

import pytest
import torch
from conftest import assert_close
from laplace import Laplace
from laplace.curvature import GGNInterface
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.methods import of_host, ours
from benchmarks.studies.common import all_weights, ella, grid_search

B, C, N = 3, 5, 11


@pytest.fixture
def problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        features = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten()
        model = nn.Sequential(*features, nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, C)).double().eval()
        x, y = torch.randn(N, 2, 4, 4, dtype=torch.float64), torch.arange(N) % C
        return model, x, y, torch.randn(B, 2, 4, 4, dtype=torch.float64)


def test_jacobians(problem):
    model, _, _, x = problem
    f, js = all_weights.jacobians(model, x)
    assert_close(f, model(x), 1e-12)
    for row, of_row in zip(x, js):
        for c in range(C):
            grads = torch.autograd.grad(model(row[None])[0, c], list(model.parameters()))
            assert_close(of_row[c], torch.cat([g.flatten() for g in grads]), 1e-10)


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_structures_of_the_host(problem, structure):
    model, x, y, x_test = problem
    ours = (all_weights.diagonal if structure == "diag" else all_weights.kron)(model, x, y, 1.0)
    of_host = model if structure == "diag" else all_weights.without_norms(model)
    more = {"backend": GGNInterface} if structure == "diag" else {}
    host = Laplace(of_host, "classification", "all", structure, prior_precision=0.7, **more)
    host.fit(DataLoader(TensorDataset(x, y), batch_size=100))
    js = all_weights.jacobians(of_host, x_test)[1]
    assert_close(ours.covariance(ours.rotated(x_test)[1], 0.7), host.functional_variance(js), 1e-8)
    assert all(p.requires_grad for p in model.parameters()), "the user's network is not changed"


def test_ella_of_laplace_torch(problem):
    pytest.importorskip("laplace.baselaplace")
    if not hasattr(importlib.import_module("laplace"), "ELLA"):
        pytest.skip("laplace-torch 0.2.3 has no ELLA of its own")
    model, x, y, x_test = problem
    ours = all_weights.host_ella(model, x, y, 1.0, {"subsample_size": 7, "n_eigenvalues": 3})
    host = of_host(model, subsample_size=7, n_eigenvalues=3, prior_precision=0.7)
    host.fit(DataLoader(TensorDataset(x, y), batch_size=8))
    _, covariance = host._glm_predictive_distribution(x_test)
    assert_close(ours.covariance(ours.rotated(x_test)[1], 0.7), covariance, 1e-8)


def test_covariances_of_a_whole_grid(problem):
    """That at (delta, T) is T times that at (delta T, 1), which the grid search relies on."""
    model, x, y, x_test = problem
    ours = all_weights.diagonal(model, x, y, 1.0)
    f, found = all_weights.covariances_at(ours, x_test, [0.3, 0.7])
    assert_close(f, model(x_test), 1e-10)
    for precision, covariance in zip((0.3, 0.7), found):
        assert_close(covariance.double(), ours.covariance(ours.rotated(x_test)[1], precision), 1e-5)
    js = all_weights.jacobians(model, x_test)[1]
    tempered = js / (ours.eigenvalues / 3.0 + 0.7) @ js.mT
    assert_close(3.0 * ours.covariance(js, 3.0 * 0.7), tempered, 1e-10)


@pytest.fixture
def labelled():
    """Over-confident logits (N, C), labels, and roots of a covariance that falls with the prior precision."""
    torch.manual_seed(5)
    f = torch.randn(400, 3)
    y = torch.distributions.Categorical(logits=f).sample()
    j = torch.randn(400, 3, 4)
    eigenvalues = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    roots = {
        product: grid_search.root((j / (eigenvalues + product)) @ j.mT)
        for product in grid_search.pairs_by_product()
    }
    return 3 * f, y, roots


def test_a_logit_scale_can_only_help(labelled):
    f, y, roots = labelled
    (_, alone), (_, scales) = grid_search.searches("any")
    assert alone == (1.0,)

    def nll(at):
        root = roots[min(roots, key=lambda product: abs(product - at.product))]
        p = grid_search.mean_probabilities(f, root, at, 0)
        return -float(p[range(len(y)), y].log().mean())

    plain, scaled = (grid_search.best_setting(f, y, roots.items(), 0, s) for s in (alone, scales))
    assert plain.logit_scale == 1
    assert 0.25 < scaled.logit_scale < 0.55, "the logits are three times too large"
    assert nll(scaled) < nll(plain) - 1e-3
    others = (grid_search.Setting(1.0, t, s) for t in (0.001, 0.1, 1.0, 10.0) for s in (0.3, 0.5, 0.7, 1.0))
    assert nll(scaled) < min(map(nll, others))


@pytest.mark.parametrize("free_scale", [False, True])
def test_refinement_reaches_the_minimum(labelled, free_scale):
    f, y, roots = labelled
    start = grid_search.Setting(10.0, 0.1, 0.6)
    offsets = roots[1.0] @ grid_search.quasi_normal(grid_search.N_SAMPLES, 3, 0).float().T
    least, at = grid_search.refined(f, y, offsets, start, free_scale)
    assert at.product == pytest.approx(start.product)
    assert least == pytest.approx(grid_search.label_nll(at.logit_scale * f, offsets, y, at.temperature))
    scales = [0.15, 0.25, 0.3, 0.35, 0.4, 0.5] if free_scale else [0.6]
    assert (at.logit_scale != 0.6) == free_scale
    for t in (0.01, 0.03, 0.1, 0.3, 1.0):
        for s in scales:
            assert least <= grid_search.label_nll(s * f, offsets, y, t) + 1e-6


def test_roots_leave_out_what_logits_have_in_common():
    torch.manual_seed(1)
    a = torch.randn(7, 5, 5, dtype=torch.float64)
    covariance = a @ a.mT
    contrast = torch.eye(5, dtype=torch.float64) - 1 / 5
    roots = grid_search.root(covariance + 100.0)
    assert_close(roots @ roots.mT, contrast @ covariance @ contrast, 1e-9)


def test_rows_have_both_searches(problem):
    model, x, y, x_test = problem
    rows = all_weights.rows("diagonal", all_weights.diagonal, model, (x, y), 1.0, (x, y), {"test": x_test}, 0)
    assert list(rows) == ["diagonal", "diagonal (T, s)"]
    for row in rows.values():
        p = row.probabilities["test"]
        assert_close(p.sum(1), torch.ones(len(x_test)), 1e-6)
    assert rows["diagonal (T, s)"].more["validation_nll"] <= rows["diagonal"].more["validation_nll"] + 1e-3


@pytest.mark.parametrize("residual", ["none", "isotropic"])
def test_predictions_from_kept_features(problem, residual):
    model, x, y, x_test = problem
    la = ours(model, subsample_size=7, n_eigenvalues=3, residual=residual, temperature=3.0)
    la.fit([(x, y)])
    la.logit_scale = 0.7
    kept = ella.keep(la, x_test, ella.shares(la, x_test))
    expected = la(x_test, link_approx="mc", n_samples=32)
    assert_close(ella.probabilities(la, kept, 32), expected, 1e-9)


@pytest.mark.parametrize("residual", ["none", "isotropic", "exact"])
def test_variances_from_kept_features(residual):
    from benchmarks.studies.regression.ella import variances

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    x = torch.randn(N, 5, dtype=torch.float64)
    la = ours(model, "regression", subsample_size=7, n_eigenvalues=3, residual=residual, sigma_noise=0.3)
    la.fit([(x, x[:, :1])])
    kind = "isotropic" if residual == "none" else residual
    found = variances(la, {kind: {"test": ella.keep(la, x[:B], ella.shares(la, x[:B]))}})["test"]
    assert_close(found, la(x[:B], diagonal_output=True)[1][:, 0] + 0.3**2, 1e-9)
