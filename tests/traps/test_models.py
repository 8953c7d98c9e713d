"""Modes, dtypes, layouts and weights of the user's model that results must not depend on."""

from __future__ import annotations

import copy

import pytest
import torch
from awkward import BACKENDS, X, batch_norm_net, check_features
from helpers import C, D, N, assert_same, build, fitted, loader, mlp, targets, train_loader, val_loader
from laplace.curvature import AsdlGGN, BackPackGGN
from models import N_INPUTS, Applied, Tied
from torch import nn
from untouched import Untouched

from laplace_ella import NystromGGN, ReverseNystromGGN

pytestmark = pytest.mark.filterwarnings("ignore:The best (prior_precision|temperature), ")


def test_wrappers_are_taken_off():
    plain = fitted()
    for wrapped in (torch.compile(mlp()), nn.DataParallel(mlp()), nn.DataParallel(torch.compile(mlp()))):
        la = fitted(model=wrapped)
        assert list(la.basis.directions) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert torch.equal(la(X), plain(X))
        assert type(la.model) is nn.Sequential
        la.load_state_dict(plain.state_dict())  # of the bare model


@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6 cannot run it eagerly"
)
def test_compiled_parts_run_eagerly():
    def compile_it(graph, examples):
        raise AssertionError("nothing is compiled")

    model = mlp()
    model[0] = torch.compile(model[0], backend=compile_it)
    torch.testing.assert_close(fitted(model=model)(X), fitted()(X))


def test_autocast():
    model, data, x = mlp(dtype=torch.float32), train_loader(dtype=torch.float32), X.float()
    la = fitted(model=model, data=data)
    exact, _ = la.features(x)
    with torch.autocast("cpu", torch.bfloat16):
        phi, _ = la.features(x)
        again = fitted(model=model, data=data, n_eigenvalues=3)
    assert phi.dtype == torch.bfloat16
    assert len(la.backend.engine._support) == 2  # what is supported is found out in either
    assert (phi.float() - exact).norm() < 2e-2 * exact.norm()
    assert again.H.dtype == torch.float64
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_links_keep_their_precision_under_autocast(link, dtype):
    model, data = mlp(dtype=torch.float32), train_loader(dtype=torch.float32)
    la = fitted(model=model, data=data, prior_precision=1e-4, temperature=1e4)
    x = X.float()
    exact = la(x, link_approx=link)
    with torch.autocast("cpu", dtype):
        found = la(x, link_approx=link)
    assert (found.float() - exact).abs().max() < 3e-2


@pytest.mark.parametrize("backend", [NystromGGN, ReverseNystromGGN, BackPackGGN, AsdlGGN])
def test_train_mode_changes_neither_results_nor_buffers(backend):
    evaluated, model = fitted(model=batch_norm_net().eval()), batch_norm_net().train()
    model[3].eval()
    untouched = Untouched(model)
    trained = fitted(model=model, backend=backend)
    torch.testing.assert_close(trained(X), evaluated(X), rtol=1e-8, atol=1e-10)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    left, right = (
        e(X, "nn", link_approx="mc", generator=g) for e, g in zip((trained, evaluated), generators)
    )
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)
    untouched.check()


@pytest.mark.parametrize("backend", [NystromGGN, ReverseNystromGGN, BackPackGGN, AsdlGGN])
def test_buffers_written_in_evaluation_mode_are_left_alone(backend):
    net = mlp()
    net.register_buffer("ticks", torch.zeros((), dtype=torch.float64))
    la = fitted(model=Applied(lambda net, x: net.ticks.add_(1) * 0 + net(x), net), backend=backend)
    torch.testing.assert_close(la(X), fitted()(X), rtol=1e-8, atol=1e-10)
    la(X, "nn", link_approx="mc", n_samples=3)
    la.optimize_prior_precision(method="gridsearch", val_loader=val_loader(), grid_size=3)
    assert net.ticks == 0


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("backend", BACKENDS)
def test_predicting_in_inference_mode(likelihood, context, backend):
    la = fitted(likelihood, backend=backend)
    with context():
        x = X.clone()
        inside = la(x)
        samples = la.predictive_samples(x, "nn", 3, generator=torch.Generator().manual_seed(0))
    assert_same(inside, la(x))
    assert torch.equal(samples, la.predictive_samples(x, "nn", 3, generator=torch.Generator().manual_seed(0)))


def test_sharded_models_are_refused():
    class FullyShardedDataParallel(nn.Sequential):
        pass

    sharded = mlp()
    sharded[0].weight.device_mesh = "cpu:0"  # what a DTensor has
    for model in (FullyShardedDataParallel(*mlp()), sharded):
        with pytest.raises(ValueError, match="sharded over processes"):
            build(model=model)


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_budget", [None, 20_000], ids=["rows", "blocks"])
@pytest.mark.parametrize(
    ("make", "width"), [(lambda: Tied().double(), N_INPUTS), (frozen, D)], ids=["tied", "frozen"]
)
def test_tied_weights_are_one_weight_and_frozen_ones_none(make, width, backend, memory_budget):
    x, model = torch.randn(N, width, dtype=torch.float64), make()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    n_params, before = sum(p.numel() for p in weights.values()), copy.deepcopy(model.state_dict())
    options = {
        "backend": backend,
        "memory_budget": memory_budget,
        "prior_precision": torch.linspace(1, 2, n_params),
    }
    la = fitted(model=model, data=loader(x, targets("classification")), **options)
    assert list(la.basis.directions) == list(weights)
    assert la.sample(2).shape == (2, n_params)
    assert la.prior_precision_diag.shape == (n_params,)
    check_features(la, x[:3])
    assert la(x, "nn", link_approx="mc").shape == (N, C)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_backpack_refuses_frozen_weights_as_in_the_host():
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"BackPACK|switched off"):
        build(model=model, backend=BackPackGGN)
