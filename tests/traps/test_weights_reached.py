"""Weights that a forward pass finds elsewhere than in their places: handled, or refused by name."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from awkward import X, check_features
from helpers import N_TEST, C, D, H, build, fitted, mlp, train_loader
from models import Applied
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

# Checkpoints call it in older versions of torch.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")

MODES = ["auto", "forward", "double", "reverse"]


class Net(nn.Module):
    """An MLP whose first weight, of shape (H, D), is read by a function of the network."""

    cached_weight = None

    def __init__(self, first_weight=lambda net: net.first.weight):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(D, H).double(), nn.Linear(H, C).double()
        self.aliases, self.cache, self.first_weight = [self.first.weight], {}, first_weight

    @functools.cached_property
    def cached_property(self):
        return self.first.weight * 1.5

    @functools.lru_cache  # noqa: B019
    def cached(self):
        return self.first.weight * 1.5

    def forward(self, x):
        return self.head(F.linear(x, self.first_weight(self), self.first.bias).tanh())


def in_closure():
    model = Net()
    weight = model.first.weight
    model.first_weight = lambda net: torch.cat([net.first.weight[:2], weight[2:]])
    return model


def in_dict(net):
    if "weight" not in net.cache:
        net.cache["weight"] = (net.first.weight * 1.5, 1)
    return net.cache["weight"][0]


def in_attribute(net):
    if net.cached_weight is None:
        net.cached_weight = net.first.weight * 1.5
    return net.cached_weight


CACHES = {
    "tuple in dict": lambda: Net(in_dict),
    "attribute": lambda: Net(in_attribute),
    "cached property": lambda: Net(lambda net: net.cached_property),
    "lru_cache": lambda: Net(lambda net: net.cached()),
}
KINDS = {"list": lambda: Net(lambda net: net.aliases[0]), "part in closure": in_closure, **CACHES}
ELSEWHERE = r"reads 'first.weight' elsewhere"


def stored(model):
    """What a model keeps, as plain values to compare."""
    return {k: list(v) if isinstance(v, (dict, list)) else v for k, v in vars(model).items() if "cache" in k}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autodiff", MODES)
def test_weights_read_elsewhere_are_refused_by_name(kind, autodiff):
    model = KINDS[kind]()
    before = stored(model)
    la = build(model=model, autodiff=autodiff)
    for start in (la.plan, la.fit):
        with pytest.raises(ValueError, match=ELSEWHERE):
            start(train_loader())
    assert la.H is None
    assert stored(model) == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("freed", [False, True])
def test_caches_filled_before(kind, freed):
    model = CACHES[kind]()
    f = model(X)
    if freed:
        f.sum().backward()
    kept = [p.grad for p in model.parameters()]
    with pytest.raises(ValueError, match=ELSEWHERE):
        fitted(model=model)
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
    assert torch.equal(model(X), f)


@pytest.mark.parametrize("kind", CACHES)
def test_constants_that_stand_for_weights_are_warned_of(kind):
    model = CACHES[kind]()
    with torch.no_grad():
        expected = model(X)
    with pytest.warns(UserWarning, match=r"do not depend on 'first.weight', because .* 'cache"):
        la = fitted(model=model)
    assert torch.equal(model(X), expected)
    check_features(la, X)
    assert not la.basis.directions["first.weight"].any()


def test_all_names_are_told():
    model = mlp()
    weights = list(model.parameters())
    model.forward = lambda x: F.linear(F.linear(x, *weights[:2]).tanh(), *weights[2:])
    with pytest.raises(ValueError, match=r"reads '0.weight', '0.bias', '2.weight', '2.bias' elsewhere"):
        fitted(model=model)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_inside_a_re_entrant_checkpoint_whose_graph_does_not_show_it():
    model = Net()
    weight = model.first.weight

    def forward(net, x):
        h = x * net.head.bias.sum()  # an input that requires grad
        return net.head(
            checkpoint(lambda h: F.linear(h, weight, net.first.bias).tanh(), h, use_reentrant=True)
        )

    weight.grad = kept = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"reads 'net.first.weight' elsewhere"):
        fitted(model=Applied(forward, model))
    assert weight.grad is kept
    assert (kept == 1).all()
    assert model.head.bias.grad is None


@pytest.mark.filterwarnings("ignore:.*(one by one|forward mode|slice by slice)")
@pytest.mark.parametrize("warm", [False, True])
def test_cached_parametrizations(warm):
    layers = [parametrizations.orthogonal(nn.Linear(D, D)), nn.Tanh(), nn.Linear(D, C)]
    model = nn.Sequential(*layers).double()
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
    check_features(la, X)


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
    check_features(la, X, copy.deepcopy(model))


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
    check_features(la, X, copy.deepcopy(model))
    assert model.tables == {N_TEST: kept}
    assert all(a is b for a, b in zip(model.seen, seen, strict=True))
    assert model.calls["n"] > 1


def test_leaves_that_are_no_parameters_stay_constants():
    model = Net(lambda net: net.first.weight * net.hidden[0] + net.aliases[0])
    model.hidden = [torch.full((D,), 2.0, dtype=torch.float64, requires_grad=True)]
    frozen, model.spare = nn.Linear(D, H).double().requires_grad_(False), nn.Linear(2, 3).double()
    model.frozen, model.aliases = frozen, [frozen.weight]
    la = fitted(model=model)
    check_features(la, X)
    assert model.hidden[0].grad is None
    assert not la.basis.directions["spare.weight"].any()


def test_a_model_whose_graph_cannot_be_recorded():
    with torch.inference_mode():
        model = Net()
    la, expected = (fitted(model=m, autodiff="reverse") for m in (model, Net()))
    torch.testing.assert_close(la(X), expected(X))
