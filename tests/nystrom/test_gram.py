"""Gradient rows under a memory budget: the same Gram matrix and basis, however they are held."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from conftest import assert_close
from helpers import C, D, H, M, build, fitted, inputs, mlp, train_loader
from models import Applied
from torch import Tensor, nn

from laplace_ella import BackPackNystromGGN, NystromGGN
from laplace_ella.data.landmarks import Landmarks
from laplace_ella.data.progress import no_progress
from laplace_ella.network.calls import DivergedError
from laplace_ella.network.gradients import backpack_rows
from laplace_ella.nystrom import jacobian, outer
from laplace_ella.nystrom import rows as rows_module
from laplace_ella.nystrom.gram import HeldRows, RowSource, Spill, choose_rows
from laplace_ella.nystrom.jacobian import row_source

P = D * H + H + H * C + C
ROW = 8 * P  # bytes
X, OUTPUTS = inputs(M, seed=20), torch.arange(M) % C


def source(landmarks_per_call: int = 4, by_layer: bool = True) -> RowSource:
    landmarks = Landmarks([X[i : i + 1] for i in range(M)], OUTPUTS)
    found = row_source(NystromGGN(mlp(), "classification").engine, landmarks, by_layer=by_layer)
    assert bool(found.matrices) == by_layer  # outer products are fewer numbers
    return replace(found, landmarks_per_call=landmarks_per_call)


def dense_rows() -> Tensor:
    """The rows by plain backward passes."""
    model, rows = mlp(), []
    for i in range(M):
        gradients = torch.autograd.grad(model(X[i : i + 1])[0, OUTPUTS[i]], list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


HELD = {
    "kept": lambda s: HeldRows(s, M),
    "spilled": lambda s: HeldRows(s, M, spill=Spill(None, torch.float32)),
    "one row against one": lambda s: HeldRows(s, 1, 1),
    "blocks of rows": lambda s: HeldRows(s, 5, 2),
    "two blocks": lambda s: HeldRows(s, 7, 3),
}


@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("name", HELD)
def test_gram_matrix_and_combinations_are_those_of_the_dense_rows(name, by_layer):
    held, rows = HELD[name](source(by_layer=by_layer)), dense_rows()
    rtol = 1e-6 if name == "spilled" else 1e-12
    assert_close(held.gram(no_progress), rows @ rows.T, rtol=rtol)
    coefficients = torch.randn(M, 2, dtype=torch.float64)
    assert_close(held.combine(coefficients, no_progress), coefficients.T @ rows, rtol=rtol)
    assert held.source.computed == held.gradients  # what was planned is what was computed


@pytest.mark.parametrize("n_rows", [0.5, 1, 2, 3, 5, 7, M - 1, M, 2 * M])
@pytest.mark.parametrize("landmarks_per_call", [1, 4])
@pytest.mark.parametrize("by_layer", [True, False])
def test_rows_are_held_so_that_they_are_computed_least_often(n_rows, landmarks_per_call, by_layer):
    s = source(landmarks_per_call, by_layer)
    row, budget = s.row_bytes, int(n_rows * s.row_bytes)
    assert row == (8 * (2 * H + D + 2 * C + H) if by_layer else ROW)  # biases have rows
    held = choose_rows(s, budget)
    assert held.n_bytes <= max(budget, 2 * row)  # less than one row against another cannot be
    if n_rows >= M:
        assert (held.kind, held.gradients) == ("kept", M)
        return
    assert held.kind == "blocks of rows"
    for kept in range(1, max(2, budget // row)):
        streamed = max(1, min(budget // row - kept, budget // row // 4))
        assert held.gradients <= HeldRows(s, kept, streamed).gradients + M  # kept is the largest that fits


def pixels_to_a_point():
    """Normalised convolutions, the second of which sees a point: folded into others for features, and not for rows."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(2, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 7, 3, 2, 1),
        nn.BatchNorm2d(7),
        nn.Flatten(),
    )
    model = nn.Sequential(*layers, nn.Linear(7, C)).double().eval()
    for m in (model[1], model[4]):
        m.running_mean.normal_()
        m.running_var.uniform_(0.5, 2)
    return model


def few_words():
    """Texts of two and three words: matrices with positions, and with shorter inputs."""
    torch.manual_seed(0)
    body = nn.ModuleList([nn.Embedding(11, 29), nn.Linear(29, 31), nn.Linear(31, C)]).double()
    return Applied(lambda net, x: net[2](net[1](net[0](x)).tanh().mean(1)), body)


# Model, inputs of M landmarks, and what is an outer product.
OTHERS = {
    "one position": (
        pixels_to_a_point,
        [torch.randn(1, 2, 3, 3, dtype=torch.float64) for _ in range(M)],
        "3.weight",
    ),
    "few positions": (few_words, [torch.randint(11, (1, 2 + i % 2)) for i in range(M)], "net.1.weight"),
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("name", OTHERS)
def test_outer_products_of_convolutions_and_positions(name, held):
    build_model, rows_of, matrix = OTHERS[name]
    model = build_model()
    landmarks = Landmarks(rows_of, OUTPUTS)
    gradients = [
        torch.autograd.grad(model(x)[0, c], list(model.parameters())) for x, c in zip(rows_of, OUTPUTS)
    ]
    rows = torch.stack([torch.cat([g.flatten() for g in of_one]) for of_one in gradients])
    s = row_source(NystromGGN(model, "classification").engine, landmarks)
    assert matrix in s.matrices
    found, rtol = HELD[held](s), 1e-6 if held == "spilled" else 1e-12
    assert_close(found.gram(no_progress), rows @ rows.T, rtol=rtol)
    norms = torch.empty(M, dtype=torch.float64)
    s(range(M), norms=norms)
    assert_close(norms, rows.norm(dim=1), rtol=1e-12)
    coefficients = torch.randn(M, 2, dtype=torch.float64)
    assert_close(found.combine(coefficients, no_progress), coefficients.T @ rows, rtol=rtol)


@pytest.mark.parametrize("block", [1, 60, 10**9])
def test_blocks_of_outer_products_change_nothing(block, monkeypatch):
    rows, coefficients = dense_rows(), torch.randn(M, 5, dtype=torch.float64)
    for place, name in ((outer, "BLOCK"), (rows_module, "SUMMED"), (rows_module, "SLICE")):
        monkeypatch.setattr(place, name, block)
    held = HELD["kept"](source())
    assert_close(held.gram(no_progress), rows @ rows.T, rtol=1e-12)
    assert_close(held.combine(coefficients, no_progress), coefficients.T @ rows, rtol=1e-12)


@pytest.mark.parametrize("at", [0, 2])
def test_passes_that_cannot_be_followed_begin_again_with_rows(at, monkeypatch):
    calls, original = [], jacobian.rows_by_layer

    def diverge(*args):
        calls.append(args)
        if len(calls) > at:
            raise DivergedError
        return original(*args)

    budget = 8 * ROW
    expected = fitted(memory_budget=budget)
    monkeypatch.setattr(jacobian, "rows_by_layer", diverge)
    la = fitted(memory_budget=budget)
    assert len(calls) == at + 1
    assert_close(la.basis.eigenvalues, expected.basis.eigenvalues, rtol=1e-12)
    assert_close(la(X), expected(X))


def test_what_users_name_computes_all_rows():
    landmarks = Landmarks([X[i : i + 1] for i in range(M)], OUTPUTS)
    found = row_source(BackPackNystromGGN(mlp(), "classification").engine, landmarks)
    assert not found.matrices
    assert found.engine is backpack_rows


def test_outer_products_that_are_not_finite_are_named():
    model = mlp()
    landmarks = Landmarks([X[i : i + 1] for i in range(M)], OUTPUTS)
    found = row_source(NystromGGN(model, "classification").engine, landmarks)
    assert "0.weight" in found.matrices
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"gradients of landmarks .* in '0.weight'"):
        found(range(M))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_spilled_rows_give_the_basis_to_their_precision(dtype, where, tmp_path):
    """And directions that are orthonormal to the precision of the weights."""
    exact = fitted(n_eigenvalues=2)
    folder = "cpu" if where == "cpu" else tmp_path
    la = fitted(n_eigenvalues=2, memory_budget=5 * ROW, spill=folder, spill_dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert_close(la.basis.eigenvalues, exact.basis.eigenvalues, rtol=eps * M**0.5)  # Weyl
    assert_close(la.basis.weight_grams.sum(0), torch.eye(2, dtype=torch.float64), rtol=1e-12)
    assert_close(la(X), exact(X), rtol=50 * eps)
    other = build()
    other.load_state_dict(la.state_dict())  # which refuses directions that are not orthonormal
    assert_close(other(X), la(X))
    assert not list(tmp_path.iterdir())  # nothing is left behind


@pytest.mark.parametrize("scale", [1e-8, 1e6])
def test_float16_holds_rows_of_any_size(scale):
    model = mlp()
    with torch.no_grad():
        model[2].weight *= scale  # the first layer's gradients
        model[2].bias *= scale
    exact = fitted(model=model, n_eigenvalues=2)
    la = fitted(model=model, n_eigenvalues=2, memory_budget=5 * ROW, spill="cpu", spill_dtype=torch.float16)
    assert_close(la.basis.eigenvalues, exact.basis.eigenvalues, rtol=1e-2)


def test_rounding_of_spilled_rows_is_no_rank():
    model = nn.Linear(D, C, bias=False).double()  # rows x e_c: of rank 3 with three inputs of one output
    landmarks = (inputs(3, seed=1).repeat(3, 1), torch.zeros(9, dtype=torch.int64))
    for spill in (None, "cpu"):
        la = build(model=model, n_eigenvalues=None, memory_budget=5 * 8 * D * C, spill=spill)
        la.fit(train_loader(), landmarks=landmarks)
        assert la.basis.rank == 3


@pytest.mark.parametrize("spill", ["no such folder", 3])
def test_where_rows_cannot_be_spilled(spill):
    with pytest.raises(ValueError, match=r"spill must be 'cpu', an existing folder"):
        fitted(spill=spill)
    with pytest.raises(ValueError, match="spill_dtype must be one of"):
        fitted(spill="cpu", spill_dtype=torch.int8)


@pytest.mark.skipif(os.name != "posix", reason="a mapped file has to keep its name")
def test_spilled_rows_have_no_name(tmp_path):
    rows, _ = Spill(str(tmp_path), torch.float32).empty(7, 11)
    assert not list(tmp_path.iterdir())
    rows.fill_(3.0)
    assert rows.sum() == 3 * 7 * 11
