"""The posteriors that benchmarks compare ELLA with are laplace-torch's."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from laplace import Laplace
from laplace.curvature import GGNInterface
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

B, C, N = 3, 5, 11


@pytest.fixture
def module(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    return importlib.import_module("all_weights")


@pytest.fixture
def problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(12, 7),
            nn.Tanh(),
            nn.Linear(7, C),
        )
        model = model.double().eval()
        x, y = torch.randn(N, 2, 4, 4, dtype=torch.float64), torch.arange(N) % C
        return model, x, y, torch.randn(B, 2, 4, 4, dtype=torch.float64)


def test_jacobians(module, problem):
    model, _, _, x = problem
    f, js = module.jacobians(model, x)
    assert_close(f, model(x), 1e-12)
    for row, of_row in zip(x, js):
        for c in range(C):
            grads = torch.autograd.grad(model(row[None])[0, c], list(model.parameters()))
            assert_close(of_row[c], torch.cat([g.flatten() for g in grads]), 1e-10)


def test_diagonal(module, problem):
    model, x, y, x_test = problem
    host = Laplace(model, "classification", "all", "diag", prior_precision=0.7, backend=GGNInterface)
    host.H = host.fit(DataLoader(TensorDataset(x, y), batch_size=4)) or host.H
    ours = module.diagonal(model, x, y, 1.0)
    js = module.jacobians(model, x_test)[1]
    assert_close(ours.covariance(ours.rotated(x_test)[1], 0.7), host.functional_variance(js), 1e-8)


def test_kron(module, problem):
    model, x, y, x_test = problem
    ours = module.kron(model, x, y, 1.0)
    frozen = module.without_norms(model)
    host = Laplace(frozen, "classification", "all", "kron", prior_precision=0.7)
    host.fit(DataLoader(TensorDataset(x, y), batch_size=100))
    js = module.jacobians(frozen, x_test)[1]
    assert_close(ours.covariance(ours.rotated(x_test)[1], 0.7), host.functional_variance(js), 1e-8)
    assert all(p.requires_grad for p in model.parameters()), "the user's network is not changed"


def test_ella_of_laplace_torch(module, problem):
    pytest.importorskip("laplace.baselaplace")
    if not hasattr(importlib.import_module("laplace"), "ELLA"):
        pytest.skip("laplace-torch 0.2.3 has no ELLA of its own")
    model, x, y, x_test = problem
    ours = module.host_ella(model, x, y, 1.0, {"subsample_size": 7, "n_eigenvalues": 3})
    host = module.of_host(model, subsample_size=7, n_eigenvalues=3, prior_precision=0.7)
    host.fit(DataLoader(TensorDataset(x, y), batch_size=8))
    _, covariance = host._glm_predictive_distribution(x_test)
    assert_close(ours.covariance(ours.rotated(x_test)[1], 0.7), covariance, 1e-8)


def test_temperature_multiplies_the_covariance(module, problem):
    """The covariance at (delta, T) is T times that at (delta T, 1), which the grid search relies on."""
    model, x, y, x_test = problem
    ours = module.diagonal(model, x, y, 1.0)
    js = module.jacobians(model, x_test)[1]
    tempered = js / (ours.eigenvalues / 3.0 + 0.7) @ js.mT
    assert_close(3.0 * ours.covariance(js, 3.0 * 0.7), tempered, 1e-10)


def test_covariances_of_a_whole_grid(module, problem):
    model, x, y, x_test = problem
    ours = module.diagonal(model, x, y, 1.0)
    f, found = module.covariances_at(ours, x_test, [0.3, 0.7])
    assert_close(f, model(x_test), 1e-10)
    for precision, covariance in zip((0.3, 0.7), found):
        assert_close(covariance.double(), ours.covariance(ours.rotated(x_test)[1], precision), 1e-5)


@pytest.fixture
def search(module):
    return importlib.import_module("grid_search")


@pytest.fixture
def labelled(search):
    """Over-confident logits (N, C), labels, and roots of a covariance that falls with the prior precision."""
    torch.manual_seed(5)
    f = torch.randn(400, 3)
    y = torch.distributions.Categorical(logits=f).sample()
    j = torch.randn(400, 3, 4)
    eigenvalues = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    roots = {
        product: search.root((j / (eigenvalues + product)) @ j.mT) for product in search.pairs_by_product()
    }
    return 3 * f, y, roots


def test_a_logit_scale_can_only_help(search, labelled):
    f, y, roots = labelled
    (_, alone), (_, scales) = search.searches("any")
    assert alone == (1.0,)

    def nll(at):
        root = roots[min(roots, key=lambda product: abs(product - at.product))]
        p = search.mean_probabilities(f, root, at, 0)
        return -float(p[range(len(y)), y].log().mean())

    plain, scaled = (search.best_setting(f, y, roots.items(), 0, s) for s in (alone, scales))
    assert plain.logit_scale == 1
    assert 0.25 < scaled.logit_scale < 0.55, "the logits are three times too large"
    assert nll(scaled) < nll(plain) - 1e-3
    assert nll(scaled) < min(
        nll(search.Setting(1.0, t, s)) for t in (0.001, 0.1, 1.0, 10.0) for s in (0.3, 0.5, 0.7, 1.0)
    )


def test_a_logit_scale_far_from_one_is_found_on_the_grid(search, labelled):
    """Refinement goes 0.75 of a decade at most."""
    f, y, roots = labelled
    few = {product: roots[product] for product in list(roots)[::6]}
    assert 0.02 < search.best_setting(10 * f, y, few.items(), 0, (1.0, 0.03)).logit_scale < 0.06


@pytest.mark.parametrize("free_scale", [False, True])
def test_refinement_reaches_the_minimum(search, labelled, free_scale):
    f, y, roots = labelled
    start = search.Setting(10.0, 0.1, 0.6)
    offsets = roots[1.0] @ search.quasi_normal(search.N_SAMPLES, 3, 0).float().T
    least, at = search.refined(f, y, offsets, start, free_scale)
    assert at.product == pytest.approx(start.product)
    assert least == pytest.approx(search.label_nll(at.logit_scale * f, offsets, y, at.temperature))
    scales = [0.15, 0.25, 0.3, 0.35, 0.4, 0.5] if free_scale else [0.6]
    assert (at.logit_scale != 0.6) == free_scale
    for t in (0.01, 0.03, 0.1, 0.3, 1.0):
        for s in scales:
            assert least <= search.label_nll(s * f, offsets, y, t) + 1e-6


def test_each_product_keeps_its_best_setting(search):
    at = [search.Setting(float(k), 1.0) for k in range(4)]
    found = [(0.3, 10.0, at[0]), (0.2, 20.0, at[1]), (0.1, 10.0, at[2]), (0.4, 20.0, at[3])]
    assert search.best_of_each(found) == [(10.0, at[2]), (20.0, at[1])]


def test_roots_leave_out_what_logits_have_in_common(search):
    torch.manual_seed(1)
    a = torch.randn(7, 5, 5, dtype=torch.float64)
    covariance = a @ a.mT
    contrast = torch.eye(5, dtype=torch.float64) - 1 / 5
    roots = search.root(covariance + 100.0)
    assert_close(roots @ roots.mT, contrast @ covariance @ contrast, 1e-9)


def test_names_of_searches(search):
    assert [name for name, _ in search.searches("ELLA (T)")] == ["ELLA (T)", "ELLA (T, s)"]
    assert [name for name, _ in search.searches("diagonal")] == ["diagonal", "diagonal (T, s)"]


def test_rows_have_both_searches(module, problem):
    model, x, y, x_test = problem
    rows = module.rows("diagonal", module.diagonal, model, (x, y), 1.0, (x, y), {"test": x_test}, 0)
    assert list(rows) == ["diagonal", "diagonal (T, s)"]
    for row in rows.values():
        p = row.probabilities["test"]
        assert_close(p.sum(1), torch.ones(len(x_test)), 1e-6)
    assert rows["diagonal (T, s)"].more["validation_nll"] <= rows["diagonal"].more["validation_nll"] + 1e-3
