"""Checkpoints: what is stored, what comes back, and what is refused."""

from copy import deepcopy

import laplace
import pytest
import torch
from helpers import (
    C,
    DictModel,
    RewardModel,
    Snapshot,
    assert_same,
    build,
    dict_batches,
    fitted,
    inputs,
    loader,
    mlp,
    reward_batches,
    targets,
    train_loader,
    val_loader,
)
from torch import nn

from laplace_ella import ELLALaplace

# Networks of a few weights on random labels often have their optimum on an edge of the grid;
# test_hyperparameter_search.py tests what is said of it.
pytestmark = pytest.mark.filterwarnings("ignore:The best (prior_precision|temperature), ")


X = inputs(11, seed=7)


def through_a_file(state, path):
    torch.save(state, path / "la.pt")
    return torch.load(path / "la.pt", weights_only=True, map_location="cpu")


SETTINGS = {
    "classification": ("classification", {}),
    "regression": ("regression", {"sigma_noise": 0.4, "prior_mean": 0.1}),
    "layerwise": ("classification", {"prior_precision": torch.arange(1.0, 5.0)}),
    "diagonal": (
        "regression",
        {"prior_precision": torch.linspace(1, 2, 66), "prior_mean": torch.full((66,), 0.2)},
    ),
    "sizes": ("classification", {"subsample_size": 17, "n_eigenvalues": 3, "curvature_size": 7, "seed": 5}),
    "streamed": ("classification", {"curvature_size": None, "enable_backprop": True}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_restored_estimator_is_the_one_saved(name, tmp_path):
    likelihood, options = SETTINGS[name]
    la = fitted(likelihood, **options)
    other = build(likelihood, enable_backprop=la.enable_backprop)
    other.load_state_dict(through_a_file(la.state_dict(), tmp_path))
    assert_same(other(X), la(X))
    assert_same(other(X, joint=True), la(X, joint=True))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(other.sample(3, generators[0]), la.sample(3, generators[1]))
    assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    for field in ("H", "loss", "mean", "prior_precision", "sigma_noise", "posterior_covariance"):
        assert torch.equal(getattr(other, field), getattr(la, field)), field
    torch.testing.assert_close(other.prior_mean.squeeze(), la.prior_mean.squeeze())
    for field in ("n_data", "subsample_size", "n_eigenvalues", "curvature_size", "seed", "enable_backprop"):
        assert getattr(other, field) == getattr(la, field), field
    for field in ("eigenvalues", "trace", "n_landmarks", "rank", "retained"):
        assert torch.equal(*(torch.as_tensor(getattr(e.basis, field)) for e in (other, la))), field
    assert repr(other) == repr(la)


def test_other_inputs_and_likelihoods(tmp_path):
    la = fitted("reward_modeling", RewardModel(), reward_batches())
    other = build("reward_modeling", RewardModel())
    other.load_state_dict(through_a_file(la.state_dict(), tmp_path))
    assert_same(other(X), la(X))
    la = fitted(model=DictModel(), data=dict_batches())
    other = build(model=DictModel())
    other.load_state_dict(through_a_file(la.state_dict(), tmp_path))
    assert_same(other(dict_batches()[0]), la(dict_batches()[0]))


@pytest.mark.parametrize("temperature", [None, 3.0])
@pytest.mark.parametrize("initial", [None, 7.0])
def test_temperature_comes_back_fixed_or_free(temperature, initial, tmp_path):
    la = fitted(temperature=temperature)
    if temperature is None:
        la.optimize_prior_precision(method="gridsearch", val_loader=val_loader(), grid_size=3)
    other = build(temperature=initial)
    state = through_a_file(la.state_dict(), tmp_path)
    if initial is None:
        other.load_state_dict(state)
    else:
        with pytest.warns(UserWarning, match=r"replaces temperature=7\.0"):
            other.load_state_dict(state)
    restored = la.temperature
    assert other.temperature == restored
    x = inputs(31, seed=9) * 3
    la.temperature, la.prior_precision = 1e3, 1.0
    other.optimize_prior_precision(method="gridsearch", val_loader=loader(x, la(x)), grid_size=3)
    assert (other.temperature == restored) == (temperature is not None)


def test_a_fitted_estimator_is_replaced_and_can_go_on(tmp_path):
    la, other = fitted(), fitted(n_eigenvalues=3, seed=9, prior_precision=4.0)
    other(X)  # its posterior is factored by now
    state = la.state_dict()
    copy = deepcopy(state)
    other.load_state_dict(through_a_file(state, tmp_path))
    assert_same(other(X), la(X))
    for estimator in (la, other):
        estimator.fit(loader(inputs(seed=20), targets("classification", seed=21)), override=False)
        estimator.optimize_prior_precision(n_steps=3)
    assert other.n_data == 46
    assert_same(other(X), la(X))
    for a, b in zip(leaves(state), leaves(copy), strict=True):  # which no later work changes
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def leaves(value):
    if isinstance(value, dict):
        assert type(value) is dict
        for key, item in value.items():
            assert type(key) is str
            yield from leaves(item)
    elif type(value) in (list, tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


@pytest.mark.parametrize("likelihood", ["classification", laplace.Likelihood.REGRESSION])
def test_a_checkpoint_holds_tensors_and_plain_types(likelihood):
    la = fitted("regression" if likelihood != "classification" else likelihood)
    la.log_marginal_likelihood(torch.tensor([2.0], dtype=torch.float64, requires_grad=True))
    for leaf in leaves(la.state_dict()):
        assert type(leaf) in (torch.Tensor, int, float, bool, str, type(None)), type(leaf)
        assert not (isinstance(leaf, torch.Tensor) and leaf.requires_grad)


def test_a_checkpoint_holds_no_copy_of_the_model():
    width = 401
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, C)).double()
    model[0].weight.requires_grad_(False)
    model.register_buffer("statistics", torch.randn(10_007, dtype=torch.float64))
    la = fitted(model=model, n_eigenvalues=2)
    state = la.state_dict()
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held = [leaf for leaf in leaves(state) if isinstance(leaf, torch.Tensor)]
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
    return la.state_dict()


def host_state():
    la = laplace.Laplace(mlp(), "classification", "all", "diag", backend=laplace.curvature.AsdlGGN)
    la.H, la.mean = torch.ones(66), torch.zeros(66)
    return la.state_dict()


# name: (model, state of something else, what the message names)
OTHERS = {
    "weights": (mlp, lambda: fitted(model=mlp(seed=1)).state_dict(), "another model"),
    "architecture": (mlp, lambda: fitted(model=mlp(4)).state_dict(), "model"),
    "names": (mlp, lambda: fitted(model=nn.Sequential(mlp())).state_dict(), "model"),
    "dtype": (
        mlp,
        lambda: fitted(model=mlp(dtype=torch.float32), data=train_loader(dtype=torch.float32)).state_dict(),
        "model",
    ),
    "buffers": (lambda: Buffered(1.0), lambda: fitted(model=Buffered(2.0)).state_dict(), "model"),
    "requires_grad": (mlp, lambda: fitted(model=frozen_first_layer()).state_dict(), "grad"),
    "likelihood": (mlp, lambda: fitted("regression").state_dict(), "likelihood"),
    "class": (mlp, other_class, "ELLALaplace"),
    "host": (mlp, host_state, "ELLALaplace"),
    "format": (mlp, lambda: {**fitted().state_dict(), "format": 0}, "format"),
    "a list": (mlp, lambda: [1], "ELLALaplace"),
    "nothing": (mlp, dict, "ELLALaplace"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_something_else_is_refused_and_changes_nothing(name):
    model, state, message = OTHERS[name]
    la, unfitted = fitted(model=model(), prior_precision=3.0, temperature=None), build(model=model())
    before = Snapshot(la, X)
    for estimator in (la, unfitted):
        with pytest.raises(ValueError, match=message):
            estimator.load_state_dict(state())
    before.check()
    with pytest.raises(AttributeError, match="fit"):
        unfitted(X)
