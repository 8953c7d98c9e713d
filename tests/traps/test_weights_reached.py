"""Weights that a forward pass finds elsewhere than in their places: handled, or refused by name."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from helpers import (
    N_TEST,
    C,
    D,
    H,
    N,
    build,
    fitted,
    inputs,
    loader,
    mlp,
    reference_features,
    targets,
    train_loader,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

# Checkpoints call it in older versions of torch.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")

X = inputs(N_TEST, seed=7)
MODES = ["auto", "forward", "double", "reverse"]


class Net(nn.Module):
    """An MLP whose first weight, of shape (H, D), is read by :meth:`first_weight`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(D, H).double(), nn.Linear(H, C).double()

    def scaled(self):
        return self.first.weight * 1.5

    def first_weight(self):
        return self.first.weight

    def forward(self, x):
        return self.head(F.linear(x, self.first_weight(), self.first.bias).tanh())


class InList(Net):
    def __init__(self):
        super().__init__()
        self.aliases = [self.first.weight]

    def first_weight(self):
        return self.aliases[0]


class InClosure(Net):
    def __init__(self):
        super().__init__()
        weight = self.first.weight
        self.first_weight = lambda: weight


class PartInClosure(Net):
    def __init__(self):
        super().__init__()
        weight = self.first.weight
        self.first_weight = lambda: torch.cat([self.first.weight[:2], weight[2:]])


class InDict(Net):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def first_weight(self):
        if not self.cache:
            self.cache["weight"] = self.scaled()
        return self.cache["weight"]


class InTupleInDict(InDict):
    def first_weight(self):
        if not self.cache:
            self.cache["weight"] = (self.scaled(), 1)
        return self.cache["weight"][0]


class InAttribute(Net):
    cache = None

    def first_weight(self):
        if self.cache is None:
            self.cache = self.scaled()
        return self.cache


class InNewDict(Net):
    cache = None

    def first_weight(self):
        if self.cache is None:
            self.cache = {"weight": self.scaled()}
        return self.cache["weight"]


class InProperty(Net):
    @functools.cached_property
    def cache(self):
        return self.scaled()

    def first_weight(self):
        return self.cache


class InLruCache(Net):
    @functools.lru_cache  # noqa: B019
    def cache(self):
        return self.scaled()

    def first_weight(self):
        return self.cache()


ALIASES = [InList, InClosure, PartInClosure]
CACHES = [InDict, InTupleInDict, InAttribute, InNewDict, InProperty, InLruCache]


def stored(model):
    """What a model keeps, as plain values to compare."""
    return {k: list(v) if isinstance(v, (dict, list)) else v for k, v in vars(model).items() if "cache" in k}


def check_features(la, twin):
    phi, f = la.features(X)
    expected_phi, expected_f = reference_features(twin, la.basis, X)
    torch.testing.assert_close(f, expected_f)
    torch.testing.assert_close(phi, expected_phi)
    assert phi.abs().max() > 0


# ------------------------------------------------------------------ refused, or warned of


@pytest.mark.parametrize("kind", ALIASES + CACHES)
@pytest.mark.parametrize("autodiff", MODES)
def test_weights_read_elsewhere_are_refused_by_name(kind, autodiff):
    model = kind()
    before = stored(model)
    la = build(model=model, autodiff=autodiff)
    with pytest.raises(ValueError, match=r"reads 'first.weight' elsewhere"):
        la.fit(train_loader())
    assert la.H is None
    assert stored(model) == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("freed", [False, True])
def test_caches_filled_before(kind, freed):
    model = kind()
    f = model(X)
    if freed:
        f.sum().backward()
    kept = [p.grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"reads 'first.weight' elsewhere"):
        fitted(model=model)
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
    assert torch.equal(model(X), f)


@pytest.mark.parametrize("kind", CACHES)
def test_constants_that_stand_for_weights_are_warned_of(kind):
    model = kind()
    with torch.no_grad():
        expected = model(X)
    with pytest.warns(UserWarning, match=r"do not depend on 'first.weight', because .* 'cache'"):
        la = fitted(model=model)
    assert torch.equal(model(X), expected)
    phi, _ = la.features(X)
    torch.testing.assert_close(phi, reference_features(model, la.basis, X)[0])
    assert not la.basis.directions["first.weight"].any()


def test_a_plan_is_no_way_around():
    la = build(model=InLruCache())
    for start in (la.plan, la.plan, la.fit):
        with pytest.raises(ValueError, match=r"first\.weight"):
            start(train_loader())


def test_all_names_are_told():
    model = mlp()
    weights = list(model.parameters())
    model.forward = lambda x: F.linear(F.linear(x, *weights[:2]).tanh(), *weights[2:])
    with pytest.raises(ValueError, match=r"reads '0.weight', '0.bias', '2.weight', '2.bias' elsewhere"):
        fitted(model=model)


class Inside(InList):
    """Reads the alias inside a re-entrant checkpoint, whose graph does not show it."""

    def block(self, h):
        return F.linear(h, self.first_weight(), self.first.bias).tanh()

    def forward(self, x):
        h = x * self.head.bias.sum()  # an input that requires grad
        return self.head(checkpoint(self.block, h, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_inside_a_re_entrant_checkpoint():
    model = Inside()
    model.first.weight.grad = kept = torch.ones_like(model.first.weight)
    with pytest.raises(ValueError, match=r"reads 'first.weight' elsewhere"):
        fitted(model=model)
    assert model.first.weight.grad is kept
    assert (kept == 1).all()
    assert model.head.bias.grad is None


# ------------------------------------------------------------------ handled


def parametrized():
    torch.manual_seed(0)
    layers = [parametrizations.orthogonal(nn.Linear(D, D)), nn.Tanh(), nn.Linear(D, C)]
    return nn.Sequential(*layers).double()


@pytest.mark.filterwarnings("ignore:.*(one by one|forward mode|slice by slice)")
@pytest.mark.parametrize("warm", [False, True])
def test_cached_parametrizations(warm):
    model = parametrized()
    name = "0.parametrizations.weight.original"
    expected = fitted(model=copy.deepcopy(model), n_eigenvalues=3)
    with parametrize.cached():
        kept = model[0].weight if warm else None
        la = fitted(model=model, n_eigenvalues=3)
        phi, _ = la.features(X)
        assert parametrize._cache_enabled == 1
        assert len(parametrize._cache) == warm
        if warm:
            assert model[0].weight is kept
        samples = la.predictive_samples(X, "nn", 2, generator=torch.Generator().manual_seed(0))
    assert parametrize._cache_enabled == 0
    assert la.basis.directions[name].any()
    torch.testing.assert_close(phi, expected.features(X)[0])
    torch.testing.assert_close(la(X), expected(X))
    again = expected.predictive_samples(X, "nn", 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples, again)
    check_features(la, model)


@pytest.mark.filterwarnings("ignore:.*(one by one|forward mode|slice by slice)")
def test_parametrizations_cached_inside_the_forward_pass():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = parametrized()

        def forward(self, x):
            with parametrize.cached():
                return self.inner(x + self.inner[0](x))

    model = Steps()
    check_features(fitted(model=model, n_eigenvalues=3), model)
    assert parametrize._cache_enabled == 0


# ------------------------------------------------------------------ nothing wrong with these


@pytest.mark.parametrize("autodiff", MODES)
def test_hooks_and_gradients_stay_out_of_it(autodiff):
    model, ran = Net(), []
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
        p.register_hook(lambda g: ran.append("hook") or g * 0)
        p.register_post_accumulate_grad_hook(lambda p: ran.append("post"))
    kept = [p.grad for p in model.parameters()]
    la = fitted(model=model, autodiff=autodiff)
    assert not ran
    assert all(p.grad is g and (g == 3).all() for p, g in zip(model.parameters(), kept, strict=True))
    check_features(la, copy.deepcopy(model))


def test_weights_without_a_part_and_frozen_aliases():
    class Spare(Net):
        def __init__(self):
            super().__init__()
            self.spare, self.frozen = nn.Linear(2, 3).double(), nn.Linear(D, H).double().requires_grad_(False)
            self.aliases, self.table = [self.frozen.weight], {"mean": torch.zeros(D).double()}

        def first_weight(self):
            return self.first.weight + self.aliases[0] + self.table["mean"]

    model = Spare()
    la = fitted(model=model)
    assert not la.basis.directions["spare.weight"].any()
    check_features(la, model)


def test_kept_tensors_that_no_weight_went_into():
    class Rotated(Net):
        def __init__(self):
            super().__init__()
            self.tables, self.calls, self.seen = {}, {"n": 0}, []

        def forward(self, x):
            self.calls["n"] += 1
            self.seen.append(x)
            if len(x) not in self.tables:
                angle = torch.arange(D, dtype=x.dtype)
                self.tables[len(x)] = (angle.cos() * torch.ones_like(x), {"sin": angle.sin()})
            cos, more = self.tables[len(x)]
            return super().forward(x * cos + more["sin"])

    model = Rotated()
    model(X)
    kept, seen = model.tables[N_TEST], list(model.seen)
    la = fitted(model=model)
    check_features(la, copy.deepcopy(model))
    assert model.tables == {N_TEST: kept}
    assert all(a is b for a, b in zip(model.seen, seen, strict=True))
    assert model.calls["n"] > 1


def test_recurrent_layers_keep_weights_of_their_own():
    class Recurrent(nn.GRU):
        def forward(self, x):
            return super().forward(x)[0][:, -1]

    model = Recurrent(D, C, batch_first=True, dtype=torch.float64)
    x = torch.randn(N, 3, D, dtype=torch.float64)
    with pytest.warns(UserWarning, match="one by one"):
        fitted(model=model, data=loader(x, targets("classification")), n_eigenvalues=3)
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_a_leaf_that_is_no_parameter_stays_a_constant():
    class Hidden(Net):
        def first_weight(self):
            return self.first.weight * self.hidden[0]

    model = Hidden()
    model.hidden = [torch.full((D,), 2.0, dtype=torch.float64, requires_grad=True)]
    check_features(fitted(model=model), model)
    assert model.hidden[0].grad is None


def test_a_model_whose_graph_cannot_be_recorded():
    with torch.inference_mode():
        model = Net()
    la, expected = (fitted(model=m, autodiff="reverse") for m in (model, Net()))
    torch.testing.assert_close(la(X), expected(X))
