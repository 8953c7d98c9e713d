"""Saved estimators without the whole of V: in half precision, or as landmarks and coefficients."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    as_tuple,
    assert_same,
    build,
    dict_batches,
    fitted,
    inputs,
    loader,
    targets,
    train_loader,
    val_loader,
)
from interrupting import Watched, all_files, batches, go_on
from models import Applied, DictModel, mlp
from torch import nn

from laplace_ella.fitting import stages

X = inputs(7, seed=7)
STORED = ("full", "half", "landmarks")


def restored(la, directions, path, **options):
    """Save, read and load; return the estimator and the size of the file in bytes."""
    file = path / f"{directions}.pt"
    torch.save(la.state_dict(directions=directions), file)
    other = build(la.likelihood, la.model, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other, file.stat().st_size


def difference(left, right):
    pairs = zip(as_tuple(left), as_tuple(right), strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


def products(la):
    """V^T V, from the numbers of V and nothing of the package."""
    flat = torch.cat([v.double().flatten(1) for v in la.basis.directions.values()], 1)
    return flat @ flat.T


def wide(dtype, width=199):
    torch.manual_seed(0)
    hidden = nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
    return nn.Sequential(*hidden, nn.Linear(width, 3)).to(dtype)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_files_are_as_small_as_promised_and_predictions_agree(likelihood, dtype, tmp_path):
    la = fitted(likelihood, wide(dtype), train_loader(likelihood, dtype=dtype), prior_precision=0.1)
    x, sizes, n_numbers = X.to(dtype), {}, la.basis.rank * la.n_params
    rounding = 100 * torch.finfo(dtype).eps
    for stored, allowed in (("full", 0.0), ("half", 1e-3), ("landmarks", rounding)):
        other, sizes[stored] = restored(la, stored, tmp_path)
        phi, expected = other.features(x)[0], la.features(x)[0]
        assert difference(phi, expected) <= allowed
        covariances = (e.functional_variance(p) for e, p in ((other, phi), (la, expected)))
        assert difference(*covariances) <= allowed
        assert difference(other(x), la(x)) <= allowed
        assert difference(other.H, la.H) == 0
        error = (products(other) - torch.eye(la.basis.rank, dtype=torch.float64)).abs().max()
        assert error <= 100 * torch.finfo(dtype).eps
    assert sizes["full"] > n_numbers * dtype.itemsize
    assert sizes["half"] < 2 * n_numbers + 20_000
    assert sizes["landmarks"] < 40_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_in_half_precision_already_stays_as_it_is(dtype, tmp_path):
    la = fitted(model=mlp(dtype=dtype), data=train_loader(dtype=dtype))
    for stored in STORED:
        other, _ = restored(la, stored, tmp_path)
        assert_same(other(X.to(dtype)), la(X.to(dtype)))


def with_given_landmarks():
    la, given = build(), (inputs(13, seed=11), torch.arange(13) % 3)
    la.fit(train_loader(), landmarks=given)
    given[0].zero_()
    return la


def with_a_basis_of_fewer_directions_and_data_added():
    first = fitted()
    la = build(model=first.model, temperature=None)
    la.fit(loader(inputs(11, seed=8), targets("classification", 11)), basis=first.basis)
    la.optimize_hyperparameters(val_loader(), {"n_eigenvalues": [2]})
    la.fit(loader(inputs(seed=20), targets("classification", seed=21)), override=False)
    return la


BLOCKS = {"memory_budget": 8 * 66 * 3}  # rows that do not fit at once
FITS = {
    "mappings": lambda: fitted(model=DictModel(), data=dict_batches()),
    "more landmarks than inputs": lambda: fitted(data=loader(inputs(5), targets("classification", 5))),
    "blocks": lambda: fitted(**BLOCKS),
    "given landmarks": with_given_landmarks,
    "given basis": with_a_basis_of_fewer_directions_and_data_added,
}


@pytest.mark.filterwarnings("ignore:Only 17 validation inputs", "ignore:The best temperature")
@pytest.mark.parametrize("name", FITS)
def test_fits_of_all_kinds_and_saved_again(name, tmp_path):
    la, options = FITS[name](), BLOCKS if name == "blocks" else {}
    x = dict_batches()[0] if name == "mappings" else X
    if name.startswith("more"):  # each input is stored once
        assert len(la.state_dict(directions="landmarks")["basis"]["inputs"]) == 5
    for stored, allowed in (("half", 2e-3), ("landmarks", 1e-12)):
        other, _ = restored(la, stored, tmp_path, **options)
        assert other.basis.rank == la.basis.rank
        assert difference(other(x), la(x)) <= allowed
        again = "landmarks" if stored == "landmarks" else "full"
        assert_same(restored(other, again, tmp_path, **options)[0](x), other(x))


def test_directions_without_landmarks_are_not_saved_as_such(tmp_path):
    with pytest.raises(ValueError, match=r"directions must be one of .*'landmarks'"):
        fitted().state_dict(directions="tiny")
    other, _ = restored(fitted(), "full", tmp_path)
    with pytest.raises(ValueError, match="this basis has none: it was restored"):
        other.state_dict(directions="landmarks")
    model, data = mlp(dtype=torch.float32), train_loader(dtype=torch.float32)
    la = fitted(model=model, data=data, memory_budget=500, spill="cpu")
    with pytest.raises(ValueError, match="spilled in a lower precision"):
        la.state_dict(directions="landmarks")
    la.state_dict(directions="half")
    tagged = Applied(lambda net, batch: net({k: v for k, v in batch.items() if batch["tag"]}), DictModel())
    la = fitted(model=tagged, data=[{**batch, "tag": object()} for batch in dict_batches()])
    with pytest.raises(ValueError, match="tag"):
        la.state_dict(directions="landmarks")


def test_a_fit_that_was_interrupted_and_goes_on(tmp_path, monkeypatch):
    """Here after the basis, of which its file has the coefficients, and the scan's the landmarks."""
    all_files(tmp_path / "fit")
    la = build(model=Watched())
    with monkeypatch.context() as patch:
        patch.setattr(stages, "basis_of", lambda *args: pytest.fail("the basis is computed again"))
        go_on(la, batches(), tmp_path / "fit")
    other, _ = restored(la, "landmarks", tmp_path)
    assert difference(other(X), fitted(model=la.model, data=batches())(X)) < 1e-12


def test_a_state_of_landmarks_that_a_model_cannot_take_changes_nothing():
    la = fitted()
    before = la(X)
    state = la.state_dict(directions="landmarks")
    other = fitted(model=la.model, seed=3)
    expected = other(X)
    broken = {**state["basis"], "inputs": [x[:, :3] for x in state["basis"]["inputs"]]}
    with pytest.raises(ValueError, match="what was read is not what was saved"):
        other.load_state_dict({**state, "basis": broken})
    assert_same(other(X), expected)
    assert_same(la(X), before)
