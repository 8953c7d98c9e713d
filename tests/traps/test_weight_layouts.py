"""Weights of any layout in memory: slices of larger tensors, expanded ones, channels-last, scalars, empty ones."""

from __future__ import annotations

import oracle
import pytest
import torch
from conftest import assert_close
from helpers import C, D, H, K, M, N, build, fitted, inputs, loader, targets
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from laplace_ella.network.functional import flat, is_dense

F64 = torch.float64


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=F64)


# What is stored at weights of (D, H).
LAYOUTS = {
    "contiguous": lambda: drawn(D, H),
    "columns": lambda: drawn(D, H + 4)[:, :H],
    "every other row": lambda: drawn(2 * D, H)[::2],
    "every other column": lambda: drawn(D, 2 * H)[:, ::2],
    "rows": lambda: drawn(D + 3, H)[1 : D + 1],
    "transposed": lambda: drawn(H, D).T,
    "transposed slice": lambda: drawn(H, D + 2)[:, 1 : D + 1].T,
    "expanded rows": lambda: drawn(1, H).expand(D, H),
    "expanded columns": lambda: drawn(D, 1).expand(D, H),
    "one number": lambda: drawn(1, 1).expand(D, H),
}


class Net(nn.Module):
    """A network with one weight (D, H) that is stored as it was given, a scalar and an empty one."""

    def __init__(self, weight):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(weight)
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=F64))
        self.empty = nn.Parameter(torch.zeros(0, H, dtype=F64))
        self.head = nn.Linear(H, C, dtype=F64)

    def forward(self, x):
        return self.head((x @ self.weight * self.scale).tanh()) + self.empty.sum()


def landmarks():
    return inputs(M, seed=20), torch.arange(M) % C


def fit(model, **kwargs):
    la = build(model=model, **kwargs)
    la.fit(loader(inputs(), targets("classification")), landmarks=landmarks())
    return la


def dense(basis):
    """V (P, K)."""
    return torch.cat([flat(v) for v in basis.directions.values()], 1).T


def check_against_dense(la, model, rtol=None):
    """Compare with a dense oracle: directions, features and curvature."""
    rows, V, x = oracle.gradient_rows(model, *landmarks()), dense(la.basis), inputs()
    assert_close(V.T @ V, torch.eye(la.basis.rank, dtype=F64), rtol=rtol, name="V^T V")
    expected, eigenvalues, _ = oracle.basis(rows, la.basis.rank)
    assert_close(la.basis.eigenvalues, eigenvalues, rtol=rtol, name="eigenvalues")
    assert_close(oracle.with_signs_of(expected, V), V, rtol=rtol, name="V")
    phi = oracle.features(model, x, V)
    assert_close(la.features(x)[0], phi, name="phi")
    assert_close(la.H, oracle.curvature(phi, oracle.outputs(model, x), "classification"), name="G")


@pytest.fixture(params=["columns", "transposed", "expanded rows"])
def model(request):
    return Net(LAYOUTS[request.param]())


@pytest.mark.parametrize("autodiff", ["forward", "double", "reverse"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_directions_and_curvature_are_those_of_a_dense_oracle(layout, autodiff):
    model = Net(LAYOUTS[layout]())
    check_against_dense(fit(model, autodiff=autodiff), model)


@pytest.mark.parametrize(
    "spilled", [{}, {"spill": "cpu", "spill_dtype": torch.float32}], ids=["blocks", "spilled"]
)
def test_in_blocks_and_spilled(model, spilled):
    check_against_dense(fit(model, memory_budget=2000, **spilled), model, rtol=1e-4 if spilled else None)


@pytest.mark.parametrize("dim", [0, 1])
def test_pruned_weights(dim):
    """A weight that is a product of a parameter, transposed in memory, and a mask of whole rows or columns."""
    model = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C)).double()
    model[0].weight = nn.Parameter(drawn(D, H).T)
    with torch.no_grad():  # what a hook stores is no graph that a copy would need
        prune.ln_structured(model[0], "weight", 0.4, n=2, dim=dim)
    mask, la = model[0].weight_mask.bool(), fit(model)
    check_against_dense(la, model)
    assert 0 < mask.sum() < mask.numel()
    assert not la.basis.directions["0.weight_orig"][:, ~mask].any()
    assert (model[0].weight == model[0].weight_orig * mask).all()


def test_restored_and_shortened(model, tmp_path):
    la = fit(model)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    restored = build(model=model)
    restored.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    assert torch.equal(restored(inputs()), la(inputs()))
    V = dense(la.basis.leading(K))
    assert_close(V.T @ V, torch.eye(K, dtype=F64), name="V^T V")


def test_the_exact_residual_and_sampled_weights(model):
    la = build("regression", model, residual="exact", prior_precision=0.6)
    la.fit(loader(inputs(), targets("regression")), landmarks=landmarks())
    x, V = inputs(7, seed=5), dense(la.basis)
    J, phi = oracle.jacobian(model, x), oracle.features(model, x, V)
    A = oracle.precision(la.H, 0.6 * torch.eye(la.basis.rank, dtype=F64), 1.0, 1.0)
    outside = J - phi @ V.T
    expected = oracle.covariance(phi, A) + outside @ outside.mT / 0.6
    assert_close(la(x)[1], expected)
    assert la.sample(3).shape == (3, la.n_params)
    layerwise = fit(model, prior_precision=torch.arange(1.0, la.n_layers + 1))
    assert layerwise(x).isfinite().all()
    assert la.predictive_samples(x, "nn", n_samples=3).isfinite().all()


def test_a_network_keeps_the_strides_of_its_dense_weights():
    """Tangents whose strides differ from their weight's are copied at every use."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 2).double().to(memory_format=torch.channels_last)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(5 * 4, C).double())
    model[2].weight = nn.Parameter(model[2].weight.detach().T.contiguous().T)
    la = fitted(model=model, data=loader(torch.randn(N, 3, 3, 3, dtype=F64), targets("classification")))
    assert conv.weight.stride() != torch.empty(conv.weight.shape).stride()
    for name, p in model.named_parameters():
        assert la.basis.directions[name][0].stride() == p.stride(), name
    assert model[2].weight.stride() == (1, C)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (5, 0), (2, 3), (1, 3, 1), (2, 3, 2, 2)])
def test_what_is_dense(shape):
    t = torch.zeros(shape)
    assert is_dense(t)
    if t.ndim > 1:
        assert is_dense(t.mT)
    if t.ndim == 4:
        assert is_dense(t.to(memory_format=torch.channels_last))
    if t.ndim and t.numel() > 1:
        assert not is_dense(F.pad(t, (0, 1))[..., :-1])
        assert not is_dense(F.pad(t, (0, 1))[..., :-1].expand(2, *shape))
