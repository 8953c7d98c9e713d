"""Modes, dtypes, layouts and weights of the user's model that results must not depend on."""

from __future__ import annotations

import pytest
import torch
from awkward import BACKENDS, X, batch_norm_net, check_features
from helpers import (
    N_TEST,
    C,
    D,
    H,
    M,
    N,
    as_tuple,
    assert_same,
    build,
    fitted,
    inputs,
    loader,
    mlp,
    targets,
    train_loader,
    val_loader,
)
from laplace.curvature import AsdlGGN, BackPackGGN
from models import N_INPUTS, Applied, Tied
from torch import nn

from laplace_ella import NystromGGN, ReverseNystromGGN

# Networks of a few weights on random labels often have their optimum on an edge of the grid;
# test_hyperparameter_search.py tests what is said of it.
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
    la = fitted(model=mlp(dtype=torch.float32), data=train_loader(dtype=torch.float32))
    x = X.float()
    exact, _ = la.features(x)
    with torch.autocast("cpu", torch.bfloat16):
        phi, _ = la.features(x)
        again = fitted(
            model=mlp(dtype=torch.float32), data=train_loader(dtype=torch.float32), n_eigenvalues=3
        )
    assert phi.dtype == torch.bfloat16
    assert len(la.backend.engine._support) == 2  # what is supported is found out in either
    assert (phi.float() - exact).norm() < 2e-2 * exact.norm()
    assert again.H.dtype == torch.float64
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_links_keep_their_precision_under_autocast(link, dtype):
    la = fitted(
        model=mlp(dtype=torch.float32),
        data=train_loader(dtype=torch.float32),
        prior_precision=1e-4,
        temperature=1e4,
    )
    x = X.float()
    exact = la(x, link_approx=link)
    with torch.autocast("cpu", dtype):
        found = la(x, link_approx=link)
    assert (found.float() - exact).abs().max() < 3e-2


@pytest.mark.parametrize("backend", [NystromGGN, ReverseNystromGGN, BackPackGGN, AsdlGGN])
def test_train_mode_changes_neither_results_nor_buffers(backend):
    evaluated, trained = (
        fitted(model=batch_norm_net().eval()),
        fitted(model=batch_norm_net().train(), backend=backend),
    )
    torch.testing.assert_close(trained(X), evaluated(X), rtol=1e-8, atol=1e-10)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    left, right = (
        e(X, "nn", link_approx="mc", generator=g) for e, g in zip((trained, evaluated), generators)
    )
    torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)
    for name, buffer in batch_norm_net().named_buffers():
        assert torch.equal(dict(trained.model.named_buffers())[name], buffer), name
    assert all(m.training for m in trained.model.modules())


class Ticking(nn.Module):
    """Counts its calls in a buffer, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("ticks", torch.zeros(()))

    def forward(self, x):
        self.ticks += 1
        return self.net(x)


@pytest.mark.parametrize("backend", [NystromGGN, ReverseNystromGGN, BackPackGGN, AsdlGGN])
def test_buffers_written_in_evaluation_mode_are_left_alone(backend):
    la = fitted(model=Ticking(), backend=backend)
    torch.testing.assert_close(la(X), fitted()(X), rtol=1e-8, atol=1e-10)
    la(X, "nn", link_approx="mc", n_samples=3)
    la.optimize_prior_precision(method="gridsearch", val_loader=val_loader(), grid_size=3)
    assert la.model.ticks.item() == 0


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


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)]
)
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_low_precision(dtype, tolerance, likelihood):
    la = fitted(likelihood, mlp(dtype=dtype), train_loader(likelihood, dtype), n_eigenvalues=5)
    # The same rounded weights and inputs in double precision.
    exact = fitted(
        likelihood, mlp(dtype=dtype).double(), [(x.double(), y) for x, y in train_loader(likelihood, dtype)]
    )
    assert la.basis.rank == 5
    assert la.H.dtype == la.basis.eigenvalues.dtype == torch.float64
    x = X.to(dtype)
    for got, expected in zip(as_tuple(la(x)), as_tuple(exact(x.double())), strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).norm() < tolerance * expected.norm()


def test_sharded_models_are_refused():
    class FullyShardedDataParallel(nn.Sequential):
        pass

    sharded = mlp()
    sharded[0].weight.device_mesh = "cpu:0"  # what a DTensor has
    for model in (FullyShardedDataParallel(*mlp()), sharded):
        with pytest.raises(ValueError, match="sharded over processes"):
            build(model=model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_budget", [None, 20_000], ids=["rows", "blocks"])
def test_tied_weights_are_one_weight(backend, memory_budget):
    x = torch.randn(N, N_INPUTS, dtype=torch.float64)
    data, model = loader(x, targets("classification")), Tied().double()
    n_params = sum(p.numel() for p in model.parameters())
    prior = torch.linspace(1, 2, n_params)
    la = fitted(model=model, data=data, backend=backend, memory_budget=memory_budget, prior_precision=prior)
    assert list(la.basis.directions) == [name for name, _ in model.named_parameters()]
    assert la.sample(2).shape == (2, n_params)
    assert la.prior_precision_diag.shape == (n_params,)
    check_features(la, x[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weights_have_no_directions(backend):
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    la = fitted(model=model, backend=backend)
    assert list(la.basis.directions) == ["0.bias", "2.weight"]
    assert la.sample(2).shape == (2, H + C * H)
    check_features(la, X)
    before = model[0].weight.clone()
    assert la(X, "nn", link_approx="mc").shape == (N_TEST, C)
    assert torch.equal(model[0].weight, before)


def test_backpack_refuses_frozen_weights_as_in_the_host():
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"BackPACK|switched off"):
        build(model=model, backend=BackPackGGN)


def test_a_root_at_zero_is_named():
    def norm_added(net, x):
        f = net(x)
        return f + f.square().sum(-1, keepdim=True).sqrt()

    x = inputs()
    x[9] = 0
    la = build(model=Applied(norm_added, nn.Linear(D, C, bias=False).double()))
    with pytest.raises(ValueError, match=r"training inputs \["):
        la.fit(loader(x, targets("classification")), landmarks=(inputs(M, seed=20), torch.arange(M) % C))
    with pytest.raises(ValueError, match="landmarks"):
        la.fit(train_loader(), landmarks=(torch.zeros(1, D, dtype=torch.float64), torch.tensor([0])))
    assert la.H is None
