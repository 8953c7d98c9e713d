"""Where a basis and a saved estimator come from: of another model or damaged, they are refused by name."""

import copy
import random
from dataclasses import replace

import pytest
import torch
from helpers import (
    Snapshot,
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

from laplace_ella.fitting.checkpoint import STATE_KEYS, digest_of_state, fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:The checkpoint has temperature")

X = inputs(7, seed=7)


def saved(state, path):
    torch.save(state, path / "la.pt")
    return torch.load(path / "la.pt", weights_only=True, map_location="cpu")


def test_the_basis_of_a_model_with_other_weights_is_refused():
    theirs, la = fitted(model=mlp(seed=1)), fitted()
    before = Snapshot(la, X)
    with pytest.raises(
        ValueError, match="made from another model: parameters and buffers have the same shapes"
    ):
        la.fit(train_loader(), basis=theirs.basis)
    before.check()
    basis = la.basis
    with torch.no_grad():  # its own, before the weights changed
        la.model[0].bias[0] += 1e-3
    with pytest.raises(ValueError, match="another model"):
        la.fit(train_loader(), basis=basis)


def test_the_basis_of_an_equal_model_or_of_unknown_origin_is_taken():
    la = fitted()
    other = build(model=copy.deepcopy(la.model))
    other.fit(train_loader(), basis=la.basis)
    assert_same(other(X), la(X))
    unknown = replace(fitted(model=mlp(seed=1)).basis, of_model=None)
    other.fit(train_loader(), basis=unknown)
    assert other.basis.of_model is None


def test_a_basis_keeps_the_mark_of_its_model(tmp_path):
    la = fitted()
    mark = fingerprint(la.model)
    other = build(model=la.model)
    other.load_state_dict(saved(la.state_dict(), tmp_path))
    third = build(model=la.model)
    third.fit(train_loader(), basis=other.basis)
    for basis in (la.basis, la.basis.leading(2), replace(la.basis, trace=2.0), other.basis, third.basis):
        assert basis.of_model == mark
    la.fit(train_loader(), override=False)
    assert la.basis.of_model == mark


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def calibrated(**options):
    la = fitted(residual="isotropic", **options)
    la.calibrate_novelty(val_loader())
    return la


@pytest.mark.parametrize("directions", ["full", "half", "landmarks"])
def test_a_state_shares_no_memory_with_the_estimator_saved_or_restored(directions):
    la = calibrated()
    la.prior_mean = torch.full((la.n_params,), 0.1, dtype=torch.float64)
    state = la.state_dict(directions=directions)
    other = build(residual="isotropic")
    other.load_state_dict(state)
    before, expected = copy.deepcopy(state), (la(X), la.novelty(X))
    restored = other(X), other.novelty(X)
    for tensor in tensors(state):
        tensor.zero_()
    state["fit_history"].clear()
    assert_same((la(X), la.novelty(X)), expected)
    assert_same((other(X), other.novelty(X)), restored)
    for estimator in (la, other):
        for name in ("H", "loss", "prior_mean", "prior_precision", "sigma_noise"):
            assert torch.equal(getattr(estimator, name).reshape(-1), before[name].reshape(-1)), name
        assert estimator.fit_history_ == before["fit_history"]
    state = la.state_dict(directions=directions)
    la.H.zero_()
    la.basis.eigenvalues.zero_()
    for a, b in zip(tensors(state), tensors(before), strict=True):
        assert torch.equal(a, b)


WRONG_VALUES = (
    "x",
    None,
    1j,
    torch.full((2, 2), 0.5),
    torch.eye(5, dtype=torch.float64).to_sparse(),
    torch.empty(5, 5, dtype=torch.float64, device="meta"),
)
BASIS = ("directions", "eigenvalues", "trace", "spectrum", "shard", "grams", "model", "stored")


def entry(state, path):
    return state["basis"][path.split(".")[1]] if "." in path else state[path]


def with_entry(state, path, value):
    if "." in path:
        return {**state, "basis": {**state["basis"], path.split(".")[1]: value}}
    return {**state, path: value}


def without(state, path):
    if "." in path:
        return {**state, "basis": {k: v for k, v in state["basis"].items() if k != path.split(".")[1]}}
    return {k: v for k, v in state.items() if k != path}


@pytest.fixture(scope="module")
def good():
    return calibrated().state_dict()


@pytest.fixture
def victim():
    la = fitted(residual="isotropic", seed=3, prior_precision=2.0)
    return la, Snapshot(la, X)


def old(state):
    """Return the state as version 0.1.0 would have saved it."""
    basis = {k: v for k, v in state["basis"].items() if k not in ("model", "stored")}
    return {**{k: v for k, v in state.items() if k != "digest"}, "format": 3, "basis": basis}


@pytest.mark.parametrize("path", sorted([*STATE_KEYS, "digest", *(f"basis.{name}" for name in BASIS)]))
def test_an_entry_that_is_damaged_missing_or_added_is_refused(path, good, victim):
    la, before = victim
    states = [without(good, path), with_entry(good, f"{path}_", 3)]
    states += [
        with_entry(good, path, v) for v in WRONG_VALUES if v is not None or entry(good, path) is not None
    ]
    for state in states:
        with pytest.raises(ValueError, match=r"checkpoint|state must come from"):
            la.load_state_dict(state)
    before.check()


def asymmetric(H):
    H = H.clone()
    H[0, 1] += 1e-3 * H.abs().max()
    return H


def indefinite(H):
    values, vectors = torch.linalg.eigh(H)
    values[0] = -1e-3 * values[-1]
    return (vectors * values) @ vectors.T


def scaled(directions, factor=1.01):
    return {k: factor * v for k, v in directions.items()}


def one_scaled(directions):
    found = {k: v.clone() for k, v in directions.items()}
    for v in found.values():
        v[-1] *= 1.05
    return found


# path: (what is done to it, what the message says)
WRONG = [
    ("H", asymmetric, "symmetric"),
    ("H", indefinite, "semi-definite"),
    ("H", lambda H: -H, "semi-definite"),
    ("snapshots", lambda pairs: [(n, asymmetric(G)) for n, G in pairs], "matrix as H"),
    ("snapshots", lambda pairs: [], "matrix as H"),
    ("snapshots", lambda pairs: [*pairs, pairs[-1]], "ascending"),
    ("n_data", lambda n: "x", "positive integer"),
    ("n_data", lambda n: 0, "positive integer"),
    ("n_data", lambda n: True, "positive integer"),
    ("n_data", float, "positive integer"),
    ("n_outputs", lambda n: -1, "positive integer"),
    ("temperature", lambda t: float("inf"), "positive and finite"),
    ("temperature_fixed", lambda t: 1, "True or False"),
    ("residual", lambda r: "all", "one of"),
    ("prior_precision", lambda p: torch.ones(2, dtype=torch.float64), "1, L or P"),
    ("prior_precision", lambda p: 0 * p, "positive"),
    ("named_by_user", lambda names: ["seed"], "subsample_size"),
    ("novelty_reference", lambda r: r.flip(0), "ascending"),
    ("fit_history", lambda h: {"val_nll": []}, "two lists"),
    ("largest_sums", lambda pair: pair[:1], "2 numbers"),
    ("basis.directions", scaled, "orthonormal"),
    ("basis.directions", one_scaled, "orthonormal"),
    (
        "basis.directions",
        lambda d: {k: v.flip(0) if "weight" in k else v for k, v in d.items()},
        "orthonormal",
    ),
    ("basis.eigenvalues", lambda e: e.flip(0), "descending"),
    ("basis.eigenvalues", lambda e: 0 * e, "positive"),
    ("basis.spectrum", lambda e: e.flip(0), "descending"),
    ("basis.trace", lambda t: 0.0, "positive"),
    ("basis.shard", lambda s: (1, 1), "rank"),
]


@pytest.mark.parametrize("version", [3, 4])
@pytest.mark.parametrize("i", range(len(WRONG)), ids=[f"{p}-{m}" for p, _, m in WRONG])
def test_what_cannot_be_an_estimators_is_refused_by_name(i, version, good, victim):
    path, damage, message = WRONG[i]
    la, before = victim
    state = with_entry(good, path, damage(entry(good, path)))
    state = old(state) if version == 3 else {**state, "digest": digest_of_state(state)}
    with pytest.raises(ValueError, match=message):
        la.load_state_dict(state)
    before.check()


def test_what_is_plausible_and_not_what_was_saved_is_refused(good, victim):
    la, before = victim
    for path, value in (("seed", 4), ("n_data", 24), ("H", 1.001 * good["H"]), ("temperature", 1.5)):
        with pytest.raises(ValueError, match="what was read is not what was saved"):
            la.load_state_dict(with_entry(good, path, value))
    before.check()


def outcome(la):
    parts = la(X), la.log_marginal_likelihood(), la.H, la.sample(2, torch.Generator().manual_seed(0))
    return (*parts, la.novelty(X)), (la.n_data, la.n_curvature, la.seed, la.basis.trace, la.temperature)


@pytest.mark.parametrize("directions", ["full", "half", "landmarks"])
def test_a_flipped_bit_in_a_file_is_found_or_changes_nothing(directions, tmp_path):
    la = calibrated()
    file = tmp_path / "la.pt"
    torch.save(la.state_dict(directions=directions), file)
    whole = file.read_bytes()
    other = build(residual="isotropic")
    other.load_state_dict(torch.load(file, weights_only=True))
    expected, plain = outcome(other)
    draw, refused = random.Random(0), 0
    for _ in range(30):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            other.load_state_dict(torch.load(file, weights_only=True))
        except Exception:
            refused += 1
            continue
        found, found_plain = outcome(other)
        assert found_plain == plain
        assert_same(found, expected)
    assert refused > 5


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_a_state_of_the_first_release_loads(likelihood, tmp_path):
    la = fitted(likelihood, sigma_noise=0.4 if likelihood == "regression" else 1.0)
    other = build(likelihood)
    state = saved(old(la.state_dict()), tmp_path)
    assert "digest" not in state
    other.load_state_dict(state)
    assert_same(other(X), la(X))
    assert other.basis.of_model is None
    again = saved(other.state_dict(), tmp_path)
    assert again["format"] == 4
    build(likelihood).load_state_dict(again)


@pytest.mark.filterwarnings("ignore:(n_eigenvalues|subsample_size) was reduced")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_directions_down_to_the_numerical_rank_load(dtype, tmp_path):
    """The smallest eigenvalues that are kept are rounding next to the largest, and their directions nearly so."""
    x = inputs(60, dtype=dtype)
    data = loader(torch.cat([x, x * 1.01]), targets("classification", 120))
    la = fitted(model=mlp(dtype=dtype), data=data, subsample_size=200, n_eigenvalues=0.9999999999)
    for directions in ("full", "half", "landmarks"):
        other = build(model=la.model)
        other.load_state_dict(saved(la.state_dict(directions=directions), tmp_path))
        assert other.basis.rank == la.basis.rank
