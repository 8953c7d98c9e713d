"""A way to compute features is one row of one table: another one is added from outside."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import assert_close
from helpers import C, D, H, N, build, fitted, inputs, mlp, train_loader
from torch import nn

from laplace_ella import NystromGGN
from laplace_ella.network import features
from laplace_ella.network.features import FEATURES, Way
from laplace_ella.network.functional import Weights

X = inputs(7, seed=7)
PREPARED: list[Weights] = []


def prepare(model, directions):
    """Lay the directions of linear layers out as matrices, once for a basis."""
    PREPARED.append({k: v.clone() for k, v in directions.items()})
    return PREPARED[-1]


def contracted(model, weights, prepared, x, chunks):
    """Contract each layer's input and the cotangents of its output with the directions, without any gradient."""
    hidden = (x @ weights["0.weight"].T + weights["0.bias"]).tanh()
    f = hidden @ weights["2.weight"].T + weights["2.bias"]
    of_head = torch.einsum("kch,bh->bck", prepared["2.weight"], hidden) + prepared["2.bias"].T
    cotangents = weights["2.weight"] * (1 - hidden.square())[:, None]
    of_first = torch.einsum("khd,bd->bhk", prepared["0.weight"], x) + prepared["0.bias"].T
    return of_head + cotangents @ of_first, f


CONTRACTED = Way(
    autodiff="layers",
    compute=contracted,
    forwards=lambda n_outputs, rank: 3.0 + n_outputs,
    held=(0, 2, 0),
    words="contraction of layers",
    directions="all",
    prepare=prepare,
)


@pytest.fixture(autouse=True)
def _row():
    before = dict(FEATURES)
    FEATURES["layers"] = CONTRACTED
    PREPARED.clear()
    yield
    FEATURES.clear()
    FEATURES.update(before)


def test_a_row_of_the_table_is_all_that_a_new_way_takes():
    la, expected = fitted(autodiff="layers"), fitted()
    assert la.backend.support(X).features == la.backend.engine.choice(X).mode(5) == "layers"
    for found, other in zip(la.features(X), expected.features(X)):
        assert_close(found, other)
    assert_close(la.H, expected.H)
    backend = NystromGGN(mlp(), "classification", autodiff="layers")
    assert_close(backend.features(X, la.basis)[0], expected.features(X)[0])


def test_directions_are_prepared_once_for_as_long_as_they_live():
    la = fitted(autodiff="layers")
    la.features(X)
    n_prepared = len(PREPARED)
    la.features(X[:2])
    assert len(PREPARED) == n_prepared
    engine, tangents = la.backend.engine, {k: v[:2] for k, v in la.basis.directions.items()}
    for _ in range(2):
        phi, _ = engine.push(X, tangents)
        assert_close(phi, la.features(X)[0][..., :2])
    assert len(PREPARED) == n_prepared + 1
    kept = engine._prepared
    n_kept = len(kept)
    del tangents
    gc.collect()
    assert len(kept) == n_kept - 1


@pytest.mark.filterwarnings("ignore:This model has no contraction of layers, so features are computed by")
def test_first_in_the_table_it_is_tried_first(monkeypatch):
    for name in [k for k in FEATURES if k != "layers"]:
        FEATURES[name] = FEATURES.pop(name)
    la = fitted()
    monkeypatch.setattr(features, "SHARED_WEIGHTS", 0)
    assert la.backend.support(X).features == la.backend.engine.choice(X).mode(10**6) == "layers"
    other = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C, bias=False)).double()
    assert fitted(model=other).backend.support(X).features == "forward"


def test_a_wrong_one_is_found_out():
    model = mlp()
    model[1] = nn.Sigmoid()
    with pytest.raises(ValueError, match="Forward and reverse mode disagree"):
        fitted(model=model, autodiff="layers")
    allowed = r"\['auto', 'forward', 'double', 'contraction', 'reverse', 'layers'\]"
    with pytest.raises(ValueError, match=f"autodiff must be one of {allowed}; got 'by layers'"):
        build(autodiff="by layers")


def test_a_plan_knows_what_it_costs():
    plan = build(autodiff="layers").plan(train_loader(), verbose=False)
    assert plan.mode == "layers"
    assert {s.name: s.forwards for s in plan.stages}["curvature"] == N * (3 + C)
