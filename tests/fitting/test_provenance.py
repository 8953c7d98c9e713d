"""Where a basis and a saved estimator come from: of another model or damaged, they are refused by name."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from helpers import (
    C,
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


# ---------------------------------------------------------------------------- a basis


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


# ---------------------------------------------------------------------------- copies


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def containers(value):
    if isinstance(value, (dict, list)):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


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
    for container in containers(state):
        container.clear()
    assert_same((la(X), la.novelty(X)), expected)
    assert_same((other(X), other.novelty(X)), restored)
    for estimator in (la, other):
        for name in ("H", "loss", "prior_mean", "prior_precision", "sigma_noise"):
            assert torch.equal(getattr(estimator, name).reshape(-1), before[name].reshape(-1)), name
        assert estimator.fit_history_ == before["fit_history"]
    state = la.state_dict(directions=directions)
    kept = copy.deepcopy(state)
    la.H.zero_()
    la.basis.eigenvalues.zero_()
    la.fit_history_["val_nll"].append(3.0)
    for a, b in zip(tensors(state), tensors(kept), strict=True):
        assert torch.equal(a, b)
    assert state["fit_history"] == kept["fit_history"]


# ---------------------------------------------------------------------------- damage

NAN = float("nan")


def nan_like(value):
    if isinstance(value, torch.Tensor):
        out = value.clone()
        if out.is_floating_point():
            out.view(-1)[0] = NAN
            return out
        return None
    return NAN


def negative(value):
    if isinstance(value, torch.Tensor):
        return -value - 1
    return -value - 1 if isinstance(value, (int, float)) else None


def other_shape(value):
    if isinstance(value, torch.Tensor):
        return torch.cat([value.reshape(-1), value.reshape(-1)])
    return [*value, *value] if isinstance(value, list) else None


def other_dtype(value):
    if not isinstance(value, torch.Tensor):
        return None
    return value.to(torch.int32 if value.is_floating_point() else torch.float64)


DAMAGE = {
    "NaN": nan_like,
    "negative": negative,
    "shape": other_shape,
    "dtype": other_dtype,
    "string": lambda value: "x",
    "none": lambda value: None,
    "list": lambda value: [value],
    "tensor": lambda value: torch.full((2, 2), 0.5),
    "sparse": lambda value: torch.eye(5, dtype=torch.float64).to_sparse(),
    "meta": lambda value: torch.empty(5, 5, dtype=torch.float64, device="meta"),
    "complex": lambda value: 1j,
}
BASIS = ("directions", "eigenvalues", "trace", "spectrum", "shard", "grams", "model", "stored")
# What may be None, or have another value of this kind, and be a state that could have been saved
# (the hash tells that it was not).
ALLOWED = {
    ("none", "curvature_size"),
    ("none", "novelty_reference"),
    ("none", "basis.grams"),
    ("none", "basis.model"),
    ("string", "basis.model"),
    ("negative", "seed"),
    ("negative", "prior_mean"),
    ("list", "novelty_setting"),
    ("shape", "novelty_setting"),
    ("shape", "named_by_user"),
}


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


def is_same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        alike = (a.shape, a.dtype, a.layout, a.device) == (b.shape, b.dtype, b.layout, b.device)
        return alike and a.layout == torch.strided and not a.is_meta and torch.equal(a, b)
    return type(a) is type(b) and not isinstance(a, torch.Tensor) and a == b


@pytest.mark.parametrize("path", sorted([*STATE_KEYS, *(f"basis.{name}" for name in BASIS)]))
def test_an_entry_that_is_damaged_is_refused(path, good, victim):
    la, before = victim
    value = entry(good, path)
    for kind, damage in DAMAGE.items():
        changed = damage(value)
        if is_same(changed, value) or (changed is None and kind != "none"):
            continue
        with pytest.raises(ValueError, match=r"checkpoint|state must come from"):
            la.load_state_dict(with_entry(good, path, changed))
        if (kind, path) not in ALLOWED and path.split(".")[-1] not in ("model", "stored"):
            # Not by the hash alone: by what is wrong.
            resigned = with_entry(good, path, changed)
            with pytest.raises(ValueError, match=r"checkpoint|state must come from") as said:
                la.load_state_dict({**resigned, "digest": "?"})
            assert "what was read is not what was saved" not in str(said.value), (kind, path)
            if path not in ("basis", "format"):
                with pytest.raises(ValueError, match=r"checkpoint|state must come from"):
                    la.load_state_dict(old(resigned))
    before.check()


@pytest.mark.parametrize("path", sorted([*STATE_KEYS, "digest", *(f"basis.{name}" for name in BASIS)]))
def test_a_missing_or_an_added_entry_is_refused(path, good, victim):
    la, before = victim
    with pytest.raises(ValueError, match=r"checkpoint|state must come from"):
        la.load_state_dict(without(good, path))
    with pytest.raises(ValueError, match=r"checkpoint"):
        la.load_state_dict(with_entry(good, f"{path}_", 3))
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
    parts = [la(X), la(X, link_approx="mc"), la.log_marginal_likelihood(), la.H, la.basis.eigenvalues]
    parts += [la.sample(2, torch.Generator().manual_seed(0)), la.novelty(X)]
    return parts, (la.n_data, la.n_curvature, la.seed, la.basis.trace, la.fit_history_, la.temperature)


@pytest.mark.parametrize("directions", ["full", "half", "landmarks"])
def test_a_flipped_bit_in_a_file_is_found_or_changes_nothing(directions, tmp_path):
    model = mlp()
    la = fitted(model=model, residual="isotropic")
    la.calibrate_novelty(val_loader())
    file = tmp_path / "la.pt"
    torch.save(la.state_dict(directions=directions), file)
    whole = file.read_bytes()
    other = build(model=model, residual="isotropic")
    other.load_state_dict(torch.load(file, weights_only=True))
    expected, plain = outcome(other)
    draw, refused = random.Random(0), 0
    for _ in range(60 if directions == "full" else 30):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            state = torch.load(file, weights_only=True)
        except Exception:
            refused += 1
            continue
        try:
            other.load_state_dict(state)
        except ValueError:
            refused += 1
            continue
        found, found_plain = outcome(other)
        assert found_plain == plain
        assert_same(tuple(found), tuple(expected))
    assert refused > 5


# ---------------------------------------------------------------------------- what still loads


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


def everything(seed=0):
    x = inputs(60, seed=seed)
    return loader(x, targets("classification", 60))


@pytest.mark.filterwarnings("ignore:n_eigenvalues was reduced", "ignore:subsample_size was reduced")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_directions_down_to_the_numerical_rank_load(dtype, tmp_path):
    """The smallest eigenvalues that are kept are rounding next to the largest, and their directions nearly so."""
    model = mlp(dtype=dtype)
    x = inputs(60, dtype=dtype)
    data = loader(torch.cat([x, x * 1.01]), targets("classification", 120))
    la = build(model=model, subsample_size=200, n_eigenvalues=0.9999999999)
    la.fit(data)
    for directions in ("full", "half", "landmarks"):
        other = build(model=model)
        other.load_state_dict(saved(old_or_new(la.state_dict(directions=directions)), tmp_path))
        assert other.basis.rank == la.basis.rank


def old_or_new(state):
    return old(state) if state["basis"]["stored"] == "full" else state


@pytest.mark.filterwarnings("ignore:subsample_size was reduced")
@pytest.mark.parametrize("n_outputs", [1, C])
def test_the_state_after_every_change_loads(n_outputs, tmp_path):
    likelihood = "regression" if n_outputs == 1 else "classification"
    x, y = inputs(), targets(likelihood, n_outputs=n_outputs)
    model = mlp(n_outputs)
    la = fitted(likelihood, model, loader(x[:12], y[:12]), temperature=None)
    la.fit(loader(x[12:], y[12:]), override=False)
    la.forget(loader(x[:2], y[:2]))
    other = build(likelihood, model)
    other.load_state_dict(saved(la.state_dict(), tmp_path))
    assert_same(other(X), la(X))
    la.fit(loader(x, y), val_loader=loader(x[:5], y[:5]), val_steps=1)
    other.load_state_dict(saved(la.state_dict(), tmp_path))
    assert_same(other(X), la(X))
    assert other.n_curvature == la.n_curvature


def test_a_model_whose_outputs_do_not_depend_on_its_inputs_loads(tmp_path):
    la = fitted()
    la.H = torch.zeros_like(la.H)
    la.snapshots = [(23, la.H)]
    other = build()
    other.load_state_dict(saved(la.state_dict(), tmp_path))
    assert_same(other(X), la(X))
