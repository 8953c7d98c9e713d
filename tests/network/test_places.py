"""Where the tensors of a module are."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from laplace_ella.network.functional import FunctionalModel
from laplace_ella.network.places import Tree, modules_of, named, places_of
from laplace_ella.network.rewriting import folded


class Shared(nn.Module):
    """A layer under two names, a tied weight, a missing one, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.again, self.last = self.first, nn.Linear(3, 3, bias=False)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(3))
        self.norm.running_var = None

    def forward(self, x):
        return self.last(self.again(self.norm.running_mean + self.first(x))) * self.scale


def test_names_and_order_are_those_of_torch():
    model = Shared()
    places = places_of(model)
    assert [(k, id(p)) for k, p in places.parameters.items()] == [
        (k, id(p)) for k, p in model.named_parameters()
    ]
    assert [(k, id(b)) for k, b in places.buffers.items()] == [(k, id(b)) for k, b in model.named_buffers()]
    of_weight = [(holder, key) for holder, key, name in places.holders if name == "first.weight"]
    assert of_weight == [(model.first._parameters, "weight"), (model.last._parameters, "weight")]


def test_every_place_is_exchanged_and_restored_after_errors():
    model = Shared()
    function, before = FunctionalModel(model), [id(t) for t in (*model.parameters(), *model.buffers())]
    new = {k: torch.zeros_like(w) for k, w in function.weights().items()}

    def action(module, _):
        assert module.first.weight is module.last.weight is new["first.weight"]
        assert module.scale is new["scale"]
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        function.within(new, action)
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == before


def test_what_a_pass_writes_to_buffers_does_not_stay():
    model = Shared()
    function = FunctionalModel(model)
    function.within(function.weights(), lambda m, _: m.norm.running_mean.add_(1))
    assert not model.norm.running_mean.any()


def test_parameters_that_are_no_weights_stand_in_their_places_without_gradients():
    model = Shared()
    function = FunctionalModel(model, ["first.weight"])
    placed = function.placed(function.weights())
    assert placed.keys() == {k for k, _ in (*model.named_parameters(), *model.named_buffers())}
    assert not any(t.requires_grad for t in placed.values())


def test_named_values_are_found_in_their_order():
    a, b, other = torch.ones(1), torch.ones(2), torch.ones(3)
    names = {id(a): "a", id(b): "b"}
    assert named(names, (other, [b, (a, 3)], {"x": a}, torch.Size([1]), None)) == ["b", "a", "a"]


def test_a_folded_normalisation_is_one_call_of_other_modes():
    seen = []

    class Seeing(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    conv, norm = nn.Conv2d(2, 3, 2).double(), nn.BatchNorm2d(3).double().eval()
    for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(t, 0.5, 2)
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    of_norm = norm.running_mean, norm.running_var, norm.weight, norm.bias
    with Seeing():
        weight, bias = folded(conv.weight, conv.bias, *of_norm, norm.eps)
    assert seen == [folded]
    torch.testing.assert_close(torch.conv2d(x, weight, bias), norm(conv(x)))


def replaced(model):
    model.scale = nn.Parameter(torch.zeros(3))


def renamed(model):
    model.last._parameters["other"] = model.last._parameters.pop("weight")


def given_another_mapping(model):
    model.norm._buffers = dict(model.norm._buffers)


def given_another_layer(model):
    model.last = nn.Linear(3, 3)


def moved_to_buffers(model):
    model.norm.bias, bias = None, model.norm.bias
    model.norm._parameters.pop("bias")
    model.norm._buffers = {"bias": bias, **model.norm._buffers}


def untied(model):
    model.again = nn.Linear(3, 3)


def taken_out(model):
    model.first.bias = None


@pytest.mark.parametrize(
    "change",
    [replaced, renamed, given_another_mapping, given_another_layer, moved_to_buffers, untied, taken_out],
)
def test_what_has_changed_is_found_anew(change):
    model = Shared()
    tree = Tree(model)
    assert tree.places() is tree.places(), "a walk would take as long as a small pass"
    change(model)
    found, expected = tree.places(), places_of(model)
    for kind in ("parameters", "buffers"):
        assert _ids(getattr(found, kind).items()) == _ids(getattr(expected, kind).items())
    assert [(id(m), *more) for m, *more in found.holders] == [(id(m), *more) for m, *more in expected.holders]
    assert list(map(id, found.modules)) == list(map(id, model.modules()))


def test_modules_are_those_of_torch():
    model = nn.Sequential(Shared(), nn.ModuleDict({"a": nn.ReLU(), "b": nn.Sequential(nn.Tanh())}))
    model.append(model[0])
    model.register_module("missing", None)
    assert list(map(id, modules_of(model))) == list(map(id, model.modules()))


def _ids(entries):
    return [(k, id(t)) for k, t in entries]
