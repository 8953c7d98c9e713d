"""Saved estimators and bases: what is stored, what comes back, and what is refused by name."""

import random
from copy import deepcopy
from dataclasses import replace

import helpers
import laplace
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
from torch import nn

from laplace_ella import ELLALaplace
from laplace_ella.fitting.checkpoint import STATE_KEYS, digest_of_state, fingerprint
from laplace_ella.fitting.state_checks import SINCE_FORMAT_5

# Networks of a few weights on random labels often have their optimum on an edge of the grid.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The best (prior_precision|temperature), ", "ignore:(n_eigenvalues|subsample_size) was reduced"
)
STORED = ("full", "half", "landmarks")
X = inputs(11, seed=7)


def through_a_file(state, path):
    torch.save(state, path / "la.pt")
    return torch.load(path / "la.pt", weights_only=True, map_location="cpu")


def restored(la, path, **options):
    other = build(la.likelihood, la.model, **options)
    other.load_state_dict(through_a_file(la.state_dict(), path))
    return other


def tensors(value):
    """Yield the tensors of a state, of which the rest must be plain types."""
    if isinstance(value, torch.Tensor):
        assert not value.requires_grad
        yield value
    elif isinstance(value, (dict, list, tuple)):
        assert type(value) in (dict, list, tuple)
        assert not isinstance(value, dict) or all(type(key) is str for key in value)
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)
    else:
        assert type(value) in (int, float, bool, str, type(None)), type(value)


def calibrated(**options):
    la = fitted(residual="isotropic", **options)
    la.calibrate_novelty(val_loader())
    return la


DIAGONAL = {"prior_precision": torch.linspace(1, 2, 66), "prior_mean": torch.full((66,), 0.2)}
SETTINGS = {
    "classification": ("classification", {}),
    "regression": ("regression", {"sigma_noise": 0.4, "prior_mean": 0.1}),
    "layerwise": ("classification", {"prior_precision": torch.arange(1.0, 5.0)}),
    "diagonal": ("regression", DIAGONAL),
    "sizes": ("classification", {"subsample_size": 17, "n_eigenvalues": 3, "curvature_size": 7, "seed": 5}),
    "streamed": ("classification", {"curvature_size": None, "enable_backprop": True}),
    "sampled labels": ("classification", {"curvature": "mc", "curvature_samples": 3, "curvature_size": None}),
    "isotropic": ("regression", {"residual": "isotropic", "residual_scale": 0.3, "residual_samples": 3}),
    "exact": ("classification", {"residual": "exact", "residual_scale": 0.3, "logit_scale": 0.5}),
    "rewards": ("reward_modeling", {"model": helpers.RewardModel(), "data": helpers.reward_batches()}),
    "mappings": ("classification", {"model": helpers.DictModel(), "data": helpers.dict_batches()}),
}
FIELDS = (
    "n_data",
    "subsample_size",
    "n_eigenvalues",
    "curvature_size",
    "curvature",
    "curvature_samples",
    "seed",
)
FIELDS += ("residual", "residual_scale", "residual_samples", "logit_scale", "enable_backprop")


@pytest.mark.filterwarnings("ignore:curvature='mc' estimates G")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_restored_estimator_is_the_one_saved(name, tmp_path):
    likelihood, options = SETTINGS[name]
    la = fitted(likelihood, **options)
    several = torch.ones(1 if la.residual == "none" else la.n_params)  # refused with the residual that comes
    other = restored(la, tmp_path, enable_backprop=la.enable_backprop, prior_precision=several)
    x = options["data"][0] if name == "mappings" else X
    assert_same(other(x), la(x))
    if likelihood != "reward_modeling":
        assert_same(other(x, joint=True), la(x, joint=True))
    for draw in ("sample", "functional_samples"):
        args = (3,) if draw == "sample" else (x, "glm", 3)
        assert_same(
            *(getattr(e, draw)(*args, generator=torch.Generator().manual_seed(0)) for e in (other, la))
        )
    assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    for field in ("H", "loss", "mean", "prior_precision", "sigma_noise", "posterior_covariance"):
        assert torch.equal(getattr(other, field), getattr(la, field)), field
    torch.testing.assert_close(other.prior_mean.squeeze(), la.prior_mean.squeeze())
    for field in FIELDS:
        assert getattr(other, field) == getattr(la, field), field
    for field in ("eigenvalues", "trace", "n_landmarks", "rank", "retained"):
        assert torch.equal(*(torch.as_tensor(getattr(e.basis, field)) for e in (other, la))), field
    assert repr(other) == repr(la)


@pytest.mark.parametrize("temperature", [None, 3.0])
@pytest.mark.parametrize("initial", [None, 7.0])
def test_temperature_comes_back_fixed_or_free(temperature, initial, tmp_path):
    la, other = fitted(temperature=temperature), build(temperature=initial)
    if temperature is None:
        la.optimize_prior_precision(method="gridsearch", val_loader=val_loader(), grid_size=3)
    state = through_a_file(la.state_dict(), tmp_path)
    if initial is None:
        other.load_state_dict(state)
    else:
        with pytest.warns(UserWarning, match=r"replaces temperature=7\.0"):
            other.load_state_dict(state)
    before, x = la.temperature, inputs(31, seed=9) * 3
    assert other.temperature == before
    la.temperature, la.prior_precision = 1e3, 1.0
    other.optimize_prior_precision(method="gridsearch", val_loader=loader(x, la(x)), grid_size=3)
    assert (other.temperature == before) == (temperature is not None)


def test_a_fitted_estimator_is_replaced_and_can_go_on(tmp_path):
    la, other = fitted(), fitted(n_eigenvalues=3, seed=9, prior_precision=4.0)
    other(X)  # its posterior is factored by now
    other.load_state_dict(through_a_file(la.state_dict(), tmp_path))
    assert_same(other(X), la(X))
    for estimator in (la, other):
        estimator.fit(loader(inputs(seed=20), targets("classification", seed=21)), override=False)
        estimator.optimize_prior_precision(n_steps=3)
    assert other.n_data == 46
    assert_same(other(X), la(X))


@pytest.mark.parametrize("directions", STORED)
def test_a_state_shares_no_memory_with_the_estimator_saved_or_restored(directions):
    la, other = calibrated(), build(residual="isotropic")
    la.prior_mean = torch.full((la.n_params,), 0.1, dtype=torch.float64)
    state = la.state_dict(directions=directions)
    other.load_state_dict(state)
    before, expected = deepcopy(state), (la(X), la.novelty(X))
    of_other = other(X), other.novelty(X)
    for tensor in tensors(state):
        tensor.zero_()
    state["fit_history"].clear()
    assert_same((la(X), la.novelty(X)), expected)
    assert_same((other(X), other.novelty(X)), of_other)
    for estimator in (la, other):
        for name in ("H", "loss", "prior_mean", "prior_precision", "sigma_noise"):
            assert torch.equal(getattr(estimator, name).reshape(-1), before[name].reshape(-1)), name
        assert estimator.fit_history_ == before["fit_history"]
    state = la.state_dict(directions=directions)
    la.H.zero_()
    la.basis.eigenvalues.zero_()
    assert_same(tuple(tensors(state)), tuple(tensors(before)))


def test_a_checkpoint_holds_no_copy_of_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 401), nn.Tanh(), nn.Linear(401, C)).double()
    model[0].weight.requires_grad_(False)
    model.register_buffer("statistics", torch.randn(10_007, dtype=torch.float64))
    la = fitted(model=model, n_eigenvalues=2)
    la.log_marginal_likelihood(torch.tensor([2.0], dtype=torch.float64, requires_grad=True))
    held = list(tensors(la.state_dict()))
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert not own & {t.untyped_storage().data_ptr() for t in held}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() for t in held) < 2 * trainable + 100


def frozen_first_layer():
    model = mlp()
    model[0].requires_grad_(False)
    return model


class Buffered(nn.Sequential):
    def __init__(self, value):
        super().__init__(*mlp())
        self.register_buffer("offset", torch.tensor(value))


def other_class():
    class OtherELLA(ELLALaplace):
        _key = ("all", "ella-of-the-checkpoint-tests")

    la = OtherELLA(mlp(), "classification", subsample_size=13, n_eigenvalues=5)
    la.fit(train_loader())
    return la


def of_host():
    la = laplace.Laplace(mlp(), "classification", "all", "diag", backend=laplace.curvature.AsdlGGN)
    la.H, la.mean = torch.ones(66), torch.zeros(66)
    return la


F32 = {"dtype": torch.float32}
# Name: what a state is of, and what the message names.
OTHERS = {
    "weights": (lambda: fitted(model=mlp(seed=1)), "another model"),
    "architecture": (lambda: fitted(model=mlp(4)), "model"),
    "names": (lambda: fitted(model=nn.Sequential(mlp())), "model"),
    "dtype": (lambda: fitted(model=mlp(**F32), data=train_loader(**F32)), "model"),
    "buffers": (lambda: fitted(model=Buffered(2.0)), "model"),
    "requires_grad": (lambda: fitted(model=frozen_first_layer()), "grad"),
    "likelihood": (lambda: fitted("regression"), "likelihood"),
    "class": (other_class, "ELLALaplace"),
    "host": (of_host, "ELLALaplace"),
    "format": (lambda: {**fitted().state_dict(), "format": 0}, "format"),
    "a list": (lambda: [1], "ELLALaplace"),
    "nothing": (dict, "ELLALaplace"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing(name):
    make, message = OTHERS[name]
    model, state = Buffered(1.0) if name == "buffers" else mlp(), make()
    state = state if isinstance(state, (dict, list)) else state.state_dict()
    la, unfitted = fitted(model=model, prior_precision=3.0, temperature=None), build(model=model)
    before = Snapshot(la, X)
    for estimator in (la, unfitted):
        with pytest.raises(ValueError, match=message):
            estimator.load_state_dict(state)
    before.check()
    with pytest.raises(AttributeError, match="fit"):
        unfitted(X)


def test_a_basis_keeps_the_mark_of_its_model_and_is_taken_by_equal_models_alone(tmp_path):
    la, theirs = fitted(), fitted(model=mlp(seed=1))
    other, third = restored(la, tmp_path), build(model=deepcopy(la.model))
    third.fit(train_loader(), basis=other.basis)
    assert_same(third(X), la(X))
    mark = fingerprint(la.model)
    for basis in (la.basis, la.basis.leading(2), replace(la.basis, trace=2.0), other.basis, third.basis):
        assert basis.of_model == mark
    la.fit(train_loader(), override=False)
    assert la.basis.of_model == mark
    third.fit(train_loader(), basis=replace(theirs.basis, of_model=None))  # of unknown origin
    assert third.basis.of_model is None
    before, same_shapes = Snapshot(la, X), "another model: parameters and buffers have the same shapes"
    with pytest.raises(ValueError, match=f"made from {same_shapes}"):
        la.fit(train_loader(), basis=theirs.basis)
    before.check()
    basis = la.basis
    with torch.no_grad():  # its own, before the weights changed
        la.model[0].bias[0] += 1e-3
    with pytest.raises(ValueError, match="another model"):
        la.fit(train_loader(), basis=basis)


SQUARE, F64 = torch.eye(5, dtype=torch.float64), torch.float64
WRONG_VALUES = (
    "x",
    None,
    1j,
    SQUARE[:2, :2] / 2,
    SQUARE.to_sparse(),
    torch.empty(5, 5, dtype=F64, device="meta"),
)
BASIS = ("directions", "eigenvalues", "trace", "spectrum", "shard", "grams", "model", "stored")


def entry(state, path):
    for name in path.split("."):
        state = state[name]
    return state


def with_entry(state, path, value=None, left_out=False):
    first, _, rest = path.partition(".")
    if rest:
        return {**state, first: with_entry(state[first], rest, value, left_out)}
    return {k: v for k, v in state.items() if k != first} | ({} if left_out else {first: value})


@pytest.fixture(scope="module")
def good():
    return calibrated().state_dict()


@pytest.fixture
def victim():
    la = fitted(residual="isotropic", seed=3, prior_precision=2.0)
    return la, Snapshot(la, X)


def old(state):
    """Return the state as version 0.1.0 would have saved it."""
    for path in ("digest", "basis.model", "basis.stored", *SINCE_FORMAT_5):
        state = with_entry(state, path, left_out=True)
    return {**state, "format": 3}


@pytest.mark.parametrize("path", sorted([*STATE_KEYS, "digest", *(f"basis.{name}" for name in BASIS)]))
def test_an_entry_that_is_damaged_missing_or_added_is_refused(path, good, victim):
    la, before = victim
    values = [v for v in WRONG_VALUES if v is not None or entry(good, path) is not None]
    states = [with_entry(good, path, left_out=True), with_entry(good, f"{path}_", 3)]
    for state in states + [with_entry(good, path, v) for v in values]:
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


def one_scaled(directions):
    last = torch.tensor([1.0] * 4 + [1.05], dtype=F64)
    return {k: v * last.reshape(-1, *[1] * (v.ndim - 1)) for k, v in directions.items()}


# Path, what is done to it, and what the message says.
WRONG = [
    ("H", asymmetric, "symmetric"),
    ("H", indefinite, "semi-definite"),
    ("H", lambda H: -H, "semi-definite"),
    ("snapshots", lambda pairs: [(n, asymmetric(G)) for n, G in pairs], "matrix as H"),
    ("snapshots", lambda pairs: [], "matrix as H"),
    ("snapshots", lambda pairs: [*pairs, pairs[-1]], "ascending"),
    *(("n_data", lambda n, v=value: v, "positive integer") for value in ("x", 0, True, 23.0)),
    ("n_outputs", lambda n: -1, "positive integer"),
    ("temperature", lambda t: float("inf"), "positive and finite"),
    ("temperature", lambda t: 10**400, "positive and finite"),
    ("seed", lambda s: -1, "from 0 to"),
    ("seed", lambda s: 2**63, "from 0 to"),
    ("temperature_fixed", lambda t: 1, "True or False"),
    ("residual", lambda r: "all", "one of"),
    ("prior_precision", lambda p: torch.ones(2, dtype=F64), "1, L or P"),
    ("prior_precision", lambda p: 0 * p, "positive"),
    ("named_by_user", lambda names: ["seed"], "subsample_size"),
    ("novelty_reference", lambda r: r.flip(0), "ascending"),
    ("fit_history", lambda h: {"val_nll": []}, "two lists"),
    ("largest_sums", lambda pair: pair[:1], "2 numbers"),
    ("basis.directions", lambda d: {k: 1.01 * v for k, v in d.items()}, "orthonormal"),
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
    (path, damage, message), (la, before) = WRONG[i], victim
    state = with_entry(good, path, damage(entry(good, path)))
    state = old(state) if version == 3 else {**state, "digest": digest_of_state(state)}
    with pytest.raises(ValueError, match=message):
        la.load_state_dict(state)
    before.check()


def single():
    return mlp(dtype=torch.float32)


SEVERAL, TINY = torch.arange(1.0, 5.0, dtype=torch.float64), torch.full((1,), 1e-60, dtype=torch.float64)
EACH = torch.linspace(1, 2, 66, dtype=torch.float64)
# name: (likelihood, model, arguments of the estimator, entries of the state, what the message says)
REFUSED = {
    "residual": (mlp, {"residual": "isotropic"}, {"prior_precision": SEVERAL}, "needs a scalar prior"),
    "exact": (mlp, {}, {"residual": "exact", "enable_backprop": True}, "enable_backprop"),
    "exact prior": (mlp, {}, {"residual": "exact", "prior_precision": EACH}, "needs a scalar prior"),
    "noise": (mlp, {}, {"sigma_noise": 2 * SEVERAL[0]}, "sigma_noise is for regression"),
    "scale": (mlp, {"likelihood": "regression"}, {"logit_scale": 2.0}, "logit_scale is for classification"),
    "small prior": (single, {}, {"prior_precision": TINY}, "prior_precision must be positive"),
    "small noise": (
        single,
        {"likelihood": "regression"},
        {"sigma_noise": TINY},
        "sigma_noise must be positive",
    ),
    "large mean": (single, {}, {"prior_mean": 1 / TINY}, "prior_mean must be finite"),
    "shared": (mlp, {"shard_directions": True}, {"prior_precision": EACH}, "one prior precision"),
    "shared graphs": (mlp, {"shard_directions": True}, {"enable_backprop": True}, "no graph crosses"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_assigned_is_not_loaded(name):
    model, options, entries, message = REFUSED[name]
    likelihood = options.get("likelihood", "classification")
    model = model()
    dtype = model[0].weight.dtype
    la = fitted(model=model, data=train_loader(likelihood, dtype), seed=3, **options)
    before = Snapshot(la, X.to(dtype))
    state = {**la.state_dict(), **entries}
    with pytest.raises(ValueError, match=message):
        la.load_state_dict({**state, "digest": digest_of_state(state)})
    before.check()


def test_a_state_takes_the_place_of_what_it_could_not_be_assigned_beside():
    la = fitted(prior_precision=SEVERAL)
    other = build(residual="exact")
    other.load_state_dict(la.state_dict())
    assert other.residual == "none"
    assert_same(other(X), la(X))


def test_what_is_plausible_and_not_what_was_saved_is_refused(good, victim):
    la, before = victim
    for path, value in (("seed", 4), ("n_data", 24), ("H", 1.001 * good["H"]), ("temperature", 1.5)):
        with pytest.raises(ValueError, match="what was read is not what was saved"):
            la.load_state_dict(with_entry(good, path, value))
    before.check()


def outcome(la):
    parts = la(X), la.log_marginal_likelihood(), la.H, la.sample(2, torch.Generator().manual_seed(0))
    return (*parts, la.novelty(X)), (la.n_data, la.n_curvature, la.seed, la.basis.trace, la.temperature)


@pytest.mark.parametrize("directions", STORED)
def test_a_flipped_bit_in_a_file_is_found_or_changes_nothing(directions, tmp_path):
    other, file = build(residual="isotropic"), tmp_path / "la.pt"
    other.load_state_dict(through_a_file(calibrated().state_dict(directions=directions), tmp_path))
    whole, (expected, plain) = file.read_bytes(), outcome(other)
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


def test_a_state_of_the_first_release_loads_and_is_saved_as_today(tmp_path):
    """The files in tests/host/unchanged say what it has to give."""
    la, other = fitted("regression", sigma_noise=0.4), build("regression")
    other.load_state_dict(old(la.state_dict()))
    assert_same(other(X), la(X))
    assert other.basis.of_model is None
    state = other.state_dict()
    assert state["format"] == 5
    build("regression").load_state_dict(through_a_file(state, tmp_path))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_directions_down_to_the_numerical_rank_load(dtype, tmp_path):
    """The smallest eigenvalues that are kept are rounding next to the largest, and their directions nearly so."""
    x = inputs(60, dtype=dtype)
    data = loader(torch.cat([x, x * 1.01]), targets("classification", 120))
    la = fitted(model=mlp(dtype=dtype), data=data, subsample_size=200, n_eigenvalues=0.9999999999)
    for directions in STORED:
        other = build(model=la.model)
        other.load_state_dict(through_a_file(la.state_dict(directions=directions), tmp_path))
        assert other.basis.rank == la.basis.rank
