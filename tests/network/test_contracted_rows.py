"""Gradients layer by layer: rows, outer products and kernels against plain torch.func, and what they cannot follow."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from models import Applied, Pixels, Residual, Sequence, Tied
from test_contraction import (
    C,
    LowRank,
    Parts,
    convolution,
    encoder,
    images,
    normalised,
    sequences,
    tokens,
    vectors,
)
from torch import nn
from torch.func import functional_call, jacrev, vmap

from laplace_ella import ELLALaplace, NystromGGN
from laplace_ella.network.by_layer import Outer, kernels_by_layer, outer_matrices, rows_by_layer
from laplace_ella.network.calls import DivergedError
from laplace_ella.network.contraction import contracted_model
from laplace_ella.network.functional import FunctionalModel
from laplace_ella.network.safety import safely
from laplace_ella.network.uses import Elementwise, Product

F64 = torch.float64


def linear(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


def frozen():
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, C))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def pooled_to_a_point():
    """A kernel as large as what it sees, after one of the same kind with padding, and a transposed one."""
    return nn.Sequential(
        nn.Conv2d(4, 5, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(5, 6, 3, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(4, C),
    )


def unknown(net, x):
    return net[1](torch.einsum("bi,oi->bo", x, net[0].weight) + net[0].bias)


def unused(net, x):
    net[1](x)
    return net[0](x)


# Name: model, inputs, and the matrices that are outer products.
MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, C)), vectors, 2),
    "a matrix from the right": (
        lambda: Applied(
            lambda net, x: net[1]((x @ net[0].weight).tanh()),
            nn.ModuleList([nn.Linear(7, 6), nn.Linear(7, C)]),
        ),
        vectors,
        2,
    ),
    "convolution": (lambda: convolution(nn.Conv2d(4, 6, 3, padding=1)), images, 0),
    "one position": (pooled_to_a_point, images, 3),
    "batch norm": (normalised, images, 0),
    "embedding, parametrised, tied, bare": (Parts, tokens, 0),
    "tied": (Tied, lambda: torch.randn(5, 2), 2),
    "low rank": (LowRank, vectors, 2),
    "attention": (lambda: encoder(True), sequences, 1),
    "frozen": (frozen, vectors, 2),
    "residual": (Residual, lambda: torch.randn(5, 2), 4),
    "uncovered": (lambda: Applied(unknown, nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, C)])), vectors, 1),
    "unused": (lambda: Applied(unused, nn.ModuleList([nn.Linear(6, C), nn.Linear(6, C)])), vectors, 2),
    "positions": (Sequence, lambda: torch.randn(5, 4, 2), 0),
    "pixels": (Pixels, lambda: torch.randn(5, 2, 2, 3), 0),
    "regression": (lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1)), vectors, 1),
}


def problem(name, dtype=F64):
    torch.manual_seed(0)
    build, draw, _ = MODELS[name]
    model, x = build().to(dtype).eval(), draw()
    return model, (x.to(dtype) if x.is_floating_point() else x)


def jacobians(model, x):
    """The gradients (B, L C, *shape) of each output of each input, by torch.func."""
    weights = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def of_one(row):
        return jacrev(lambda w: functional_call(model, w, (row[None],)).flatten())(weights)

    return safely(model, lambda: vmap(of_one)(x))


def dense(gradients, use=None):
    """Write outer products out."""
    if not isinstance(gradients, Outer):
        return gradients
    return use.from_matrix(torch.einsum("bnto,btj->bnoj", gradients.left, gradients.right))


def recorded(model, x):
    return contracted_model(FunctionalModel(model), x)


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_torch_func(name, dtype):
    model, x = problem(name, dtype)
    expected = jacobians(model.to(F64), x.to(F64) if x.is_floating_point() else x)
    n = next(iter(expected.values())).shape[1]
    outputs = torch.arange(len(x)) * 2 % n
    model.to(dtype)

    def compute():
        made = recorded(model, x)
        matrices = outer_matrices(made)
        return matrices, rows_by_layer(made, x, outputs, matrices), rows_by_layer(made, x, outputs, {})

    matrices, mixed, plain = safely(model, compute)
    assert len(matrices) == MODELS[name][2]
    assert {k for k, g in mixed.items() if isinstance(g, Outer)} == set(matrices)
    assert list(mixed) == list(plain) == list(expected)
    for k, rows in expected.items():
        for found in (mixed[k], plain[k]):
            found = dense(found, matrices.get(k))
            assert found.dtype == dtype
            chosen = rows[torch.arange(len(x)), outputs]
            assert_close(found, chosen, 1e-10 if dtype == F64 else 1e-4, 1e-12 if dtype == F64 else 1e-6, k)


@pytest.mark.parametrize("name", MODELS)
def test_kernels_are_those_of_torch_func(name):
    model, x = problem(name)
    J = torch.cat([g.reshape(*g.shape[:2], -1) for g in jacobians(model, x).values()], 2)
    n_outputs = model(x).shape[-1]
    J = J.unflatten(1, (-1, n_outputs))
    found = safely(model, lambda: kernels_by_layer(recorded(model, x), x, J.shape[1], n_outputs))
    assert_close(found, J @ J.mT, 1e-10)


def test_few_positions_are_outer_products_whose_sums_are_gradients():
    """And shorter inputs have fewer of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(29, 31), nn.Tanh(), nn.Flatten(), nn.LazyLinear(C)).double()
    long, short = torch.randn(5, 3, 29, dtype=F64), torch.randn(5, 3, 29, dtype=F64)
    model(long)
    body = Applied(lambda net, x: net[3](net[1](net[0](x)).sum(1).repeat(1, 3)), model)
    short = short[:, :2]
    outputs = torch.arange(5) % C

    def compute():
        matrices = outer_matrices(recorded(body, long))
        assert matrices["net.0.weight"].shape == (3, 1, 31, 29)
        return matrices, [rows_by_layer(recorded(body, x), x, outputs, matrices) for x in (long, short)]

    matrices, found = safely(body, compute)
    for x, rows in zip((long, short), found):
        assert rows["net.0.weight"].right.shape == (5, 3, 29)
        expected = jacobians(body, x)
        for k, g in rows.items():
            assert_close(dense(g, matrices.get(k)), expected[k][torch.arange(5), outputs], 1e-10)
    of_short = safely(body, lambda: outer_matrices(recorded(body, short)))
    with pytest.raises(DivergedError):  # more positions than there is room for
        safely(body, lambda: rows_by_layer(recorded(body, long), long, outputs, of_short))


def cut_to_the_longest(net, x):
    return net[1](net[0](x[:, : int((x != 0).any(-1).sum(1).max())]).sum(1).tanh())


@pytest.mark.filterwarnings("ignore:This model cannot be differentiated for several inputs at once")
def test_inputs_of_one_shape_may_have_more_positions_than_the_recorded_one():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(29, 31, bias=False), nn.Linear(31, C)])
    model, x = Applied(cut_to_the_longest, layers).double(), torch.randn(5, 3, 29, dtype=F64)
    for i, length in enumerate((1, 3, 2, 1, 3)):
        x[i, length:] = 0
    outputs = torch.arange(5) % C
    found = [
        torch.autograd.grad(model(x[i : i + 1])[0, c], list(model.parameters()))
        for i, c in enumerate(outputs)
    ]
    rows = torch.stack([torch.cat([g.flatten() for g in gradients]) for gradients in found])
    la = ELLALaplace(model, "classification", n_eigenvalues=5)
    la.fit([(x, outputs)], landmarks=(x, outputs))
    assert_close(la.basis.spectrum, torch.linalg.eigvalsh(rows @ rows.T).flip(0), 1e-10)

    made = safely(model, lambda: recorded(model, x[:1]))
    matrices = outer_matrices(made)
    assert matrices["net.0.weight"].shape[0] == 1
    with pytest.raises(DivergedError):
        safely(model, lambda: rows_by_layer(made, x, outputs, matrices))
    with pytest.raises(DivergedError):  # the model has one prediction for each input, not three
        safely(model, lambda: kernels_by_layer(made, x, 3, C))


def test_a_record_keeps_shapes_and_no_activations():
    model, x = problem("batch norm")
    made = safely(model, lambda: recorded(model, x))
    for use in made.uses:
        if isinstance(use, Product):
            with pytest.raises(ValueError, match="not kept"):
                use.operand()
        else:
            assert isinstance(use, Elementwise)
            assert use.factor == 1.0


def branching(net, x):
    return net[1]((net[0](x) if x.sum() > 0 else x).tanh())


@pytest.mark.filterwarnings("ignore:This model cannot be differentiated for several inputs at once")
def test_a_pass_that_takes_another_branch_is_found_out():
    model = Applied(branching, nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, C)])).double()
    x = vectors().double().abs()
    made = safely(model, lambda: recorded(model, x))
    with pytest.raises(DivergedError):
        safely(model, lambda: rows_by_layer(made, -x, torch.zeros(5, dtype=torch.int64), {}))
    with pytest.raises(DivergedError):
        safely(model, lambda: kernels_by_layer(made, -x, 1, C))
    assert NystromGGN(model, "classification").engine.layers(x) is not None
