"""Contraction layer by layer: each layer alone against plain backward passes, in both orders, and what it does not know."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close
from models import Applied
from torch import nn
from torch.nn import functional as F

from laplace_ella import NystromGGN
from laplace_ella.data.hashing import normal_like
from laplace_ella.network import uses
from laplace_ella.network.calls import DivergedError
from laplace_ella.network.contraction import contracted_cotangents, contracted_features, contracted_model
from laplace_ella.network.facts import find_facts
from laplace_ella.network.functional import FunctionalModel
from laplace_ella.network.memory import Chunks
from laplace_ella.network.pulling import looped_reverse_features, pulled_cotangents
from laplace_ella.network.rewriting import rewritten
from laplace_ella.network.safety import safely

C, K, B = 3, 4, 5


def vectors():
    return torch.randn(B, 6)


def sequences():
    return torch.randn(B, 3, 6)


def images(channels=4):
    return torch.randn(B, channels, 8, 6)


def tokens():
    return torch.randint(0, 9, (B, 4))


class Between(nn.Module):
    """A layer between others, so that cotangents of its output and its input are of no special kind."""

    def __init__(self, before, layer):
        super().__init__()
        self.before, self.layer = before, layer

    def forward(self, x):
        y = F.relu(self.layer(self.before(x).tanh()), inplace=True).flatten(1)
        return torch.stack([y[:, i::C].square().mean(1) for i in range(C)], 1)


class Parts(nn.Module):
    """Weights that are used bare: added, multiplied, repeated, transposed, through a parametrisation and twice."""

    def __init__(self):
        super().__init__()
        self.positions, self.start = nn.Parameter(torch.randn(1, 4, 6)), nn.Parameter(torch.randn(1, 1, 6))
        self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(5))
        self.matrix, self.gain = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(()))
        self.table = nn.Embedding(9, 6, padding_idx=1)
        self.places = nn.Embedding(4, 6)
        self.square = nn.utils.parametrize.register_parametrization(nn.Linear(5, 5), "weight", Symmetric())

    def forward(self, x):
        h = self.table(x) + self.positions + self.places(torch.arange(4))
        h = torch.cat([self.start.expand(len(x), -1, -1), h], 1)
        h = (self.scale * h).tanh() @ self.matrix
        h = self.gain * self.square(h).relu() - self.shift
        return F.linear(h.mean(1), self.matrix)


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).T


class LowRank(nn.Module):
    """A frozen linear layer with a correction of rank two, as LoRA has it."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(6, C).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, C, bias=False)

    def forward(self, x):
        return self.frozen(x) + 0.5 * self.up(self.down(x))


class Folded(nn.Module):
    """Positions folded into the batch axis, of either stride, and behind it."""

    def __init__(self, how):
        super().__init__()
        self.how, self.inner, self.outer = how, nn.Linear(6, 5), nn.Linear(5, C)

    def forward(self, x):
        if self.how == "outer":
            h = self.inner(x.reshape(-1, 6)).view(len(x), 3, 5)
        elif self.how == "inner":
            h = self.inner(x.transpose(0, 1).reshape(-1, 6)).view(3, len(x), 5).transpose(0, 1)
        else:
            h = self.inner(x.transpose(0, 1)).transpose(0, 1)
        return self.outer(h.tanh().mean(1))


class Products(nn.Module):
    """Matrices and vectors as torch's functions take them: addmm as GPT-2 has it, from the left, and from the right."""

    def __init__(self):
        super().__init__()
        self.wide, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))
        self.left, self.vector = nn.Parameter(torch.randn(C, 3)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        h = torch.addmm(self.bias, x.reshape(-1, 6), self.wide).view(len(x), 3, 5).tanh()
        return torch.matmul(h + 1.0, self.vector) @ self.left.T - 2.0 * (h @ self.vector).square()


def encoder(batch_first):
    layer = nn.TransformerEncoderLayer(6, 2, 7, 0.0, batch_first=batch_first)
    head = nn.Linear(6, C)

    def forward(net, x):
        axis = 1 if batch_first else 0
        return net[1](net[0](x if batch_first else x.transpose(0, 1)).mean(axis))

    return Applied(forward, nn.ModuleList([layer, head]))


def convolution(layer, channels=4):
    return Between(nn.Conv2d(channels, channels, 1), layer)


def normalised():
    net = nn.Sequential(
        nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3, affine=False)
    )
    for m in net:
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return Between(net[0], nn.Sequential(*net[1:]))


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, C)), vectors),
    "linear, positions": (lambda: Between(nn.Linear(6, 7), nn.Linear(7, 5)), sequences),
    "convolution": (lambda: convolution(nn.Conv2d(4, 6, 3, padding=1)), images),
    "stride, dilation": (lambda: convolution(nn.Conv2d(4, 6, (3, 2), 2, (2, 1), dilation=(2, 1))), images),
    "groups": (lambda: convolution(nn.Conv2d(4, 6, 3, groups=2)), images),
    "depthwise": (lambda: convolution(nn.Conv2d(4, 8, 3, groups=4, bias=False)), images),
    "same": (lambda: convolution(nn.Conv2d(4, 6, 4, padding="same")), images),
    "circular": (lambda: convolution(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")), images),
    "transposed": (lambda: convolution(nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1)), images),
    "transposed, groups": (lambda: convolution(nn.ConvTranspose2d(4, 6, 3, 2, groups=2, dilation=2)), images),
    "one axis": (lambda: Between(nn.Conv1d(3, 4, 2), nn.Conv1d(4, 5, 3, 2, 1)), sequences),
    "three axes": (
        lambda: Between(nn.Conv3d(2, 3, 2), nn.ConvTranspose3d(3, 4, 2)),
        lambda: torch.randn(B, 2, 3, 4, 3),
    ),
    "batch norm": (lambda: convolution(nn.BatchNorm2d(4)), images),
    "folded batch norm": (normalised, images),
    "group norm": (lambda: convolution(nn.GroupNorm(2, 4)), images),
    "instance norm": (lambda: convolution(nn.InstanceNorm2d(4, affine=True)), images),
    "layer norm": (lambda: convolution(nn.LayerNorm([8, 6])), images),
    "prelu": (lambda: convolution(nn.PReLU(4)), images),
    "bare": (Parts, tokens),
    "products": (Products, sequences),
    "low rank": (LowRank, vectors),
    "outer": (lambda: Folded("outer"), sequences),
    "inner": (lambda: Folded("inner"), sequences),
    "second": (lambda: Folded("second"), sequences),
    "encoder": (lambda: encoder(True), sequences),
    "encoder, batch second": (lambda: encoder(False), sequences),
}


def problem(name, dtype):
    torch.manual_seed(0)
    build, draw = MODELS[name]
    model, x = build().to(dtype).eval(), draw()
    x = x.to(dtype) if x.is_floating_point() else x
    function = FunctionalModel(model)
    return model, function, x, normal_like(function.weights(), K, seed=1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("moved", [0.0, 1e6], ids=["gradients first", "directions first"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_has_the_features_of_plain_backward_passes(name, dtype, moved, monkeypatch):
    model, function, x, V = problem(name, dtype)
    # Whether gradients or directions come first follows from costs: whichever number is small.
    first = {0.0: True, 1e6: False}[moved]
    monkeypatch.setattr(uses.Product, "_gradients_first", lambda *_: first)
    expected = safely(model, lambda: looped_reverse_features(function, None, V, x, Chunks(1, 1)))

    def contract():
        base = rewritten(function, x[:2], dtype)
        made = contracted_model(base, x)
        assert not made.uncovered
        return contracted_features(made, made.ready(), {**V, **made.prepared(V)}, x, Chunks(2, 1))

    for found, other in zip(safely(model, contract), expected):
        assert found.dtype == dtype
        assert_close(found, other, rtol=1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("name", ["convolution", "bare", "encoder"])
def test_cotangents_are_pulled_through_the_same_layers(name):
    model, function, x, V = problem(name, torch.float64)
    u = torch.randn(B, 2, model(x).shape[-1], dtype=torch.float64)
    weights = function.weights()

    def contract():
        made = contracted_model(function, x)
        return contracted_cotangents(made, made.ready(), {**V, **made.prepared(V)}, x, u, Chunks(3, 1))

    expected = safely(model, lambda: pulled_cotangents(function, weights, V, x, u, Chunks(9, 1), False))
    assert_close(safely(model, contract), expected, rtol=1e-10)


@pytest.mark.parametrize("block", [1, 10**4, 10**9])
def test_blocks_change_no_features(block, monkeypatch):
    model, function, x, V = problem("convolution", torch.float64)
    expected = safely(model, lambda: contracted_features(function, {}, V, x, Chunks(9, 1)))[0]
    monkeypatch.setattr(uses, "BLOCK_BYTES", block)
    monkeypatch.setattr(uses, "FEWEST_ROWS", 1)
    assert_close(safely(model, lambda: contracted_features(function, {}, V, x, Chunks(9, 1)))[0], expected)


def unknown(net, x):
    return net[1](torch.einsum("bi,oi->bo", x, net[0].weight) + net[0].bias)


def test_weights_that_no_rule_knows_have_their_gradients_by_reverse_mode():
    torch.manual_seed(0)
    model = Applied(unknown, nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, C)])).double()
    function, x = FunctionalModel(model), vectors().double()
    V = normal_like(function.weights(), K, seed=1)
    made = safely(model, lambda: contracted_model(function, x))
    (name,) = made.uncovered
    assert name.endswith("0.weight")
    found = safely(model, lambda: contracted_features(made, made.ready(), V, x, Chunks(9, 1)))
    expected = safely(model, lambda: looped_reverse_features(function, None, V, x, Chunks(1, 1)))
    for a, b in zip(found, expected):
        assert_close(a, b, rtol=1e-10)
    engine = NystromGGN(model, "classification", autodiff="contraction").engine
    with pytest.warns(UserWarning, match=r"1 weights \(.*0\.weight .*no rule for.*reverse mode") as said:
        found = [engine.push(x, V)[0] for _ in range(2)]
    for phi in found:
        assert_close(phi, expected[0], rtol=1e-10)
    assert len(said) == 1


def test_with_a_graph_back_to_the_inputs_another_way_is_taken_and_said():
    model, _, x, V = problem("linear", torch.float64)
    engine = NystromGGN(model, "classification", autodiff="contraction").engine
    with pytest.warns(UserWarning, match="records no graph back to the inputs"):
        phi, _ = engine.push(x.requires_grad_(), V, enable_backprop=True)
    assert phi.requires_grad
    assert_close(phi.detach(), engine.push(x.detach(), V)[0])


def selected(net, x):
    """Adds a layer of some of the inputs."""
    k = (x[:, 0] > 0).nonzero()[:, 0]
    return net[0](x).index_add(0, k, F.linear(x[k], net[1].weight))


def cut(net, x):
    """Adds weights as many as the longest input has entries."""
    length = int((x != 0).sum(1).max())
    return net[0](x) + (net[1].weight[:, :length] * x[:, None, :length]).sum(-1)


def in_order(net, x):
    order = x[:, 0].argsort()
    return net[1](F.pad(net[0](x[order]).tanh()[order.argsort()], (0, 3)))


def gathered_in_order(net, x):
    order = (x != 0).sum(1, keepdim=True).argsort(0).expand_as(x)
    back = order[:, :C].argsort(0)
    return net[0](x.gather(0, order)).take_along_dim(dim=0, indices=back) + net[1](x)


# Functions of two linear layers and inputs that depend on the data, or on all inputs of a batch, on their way.
AWKWARD = {
    "selected inputs": selected,
    "length of the longest": cut,
    "sorted inputs": in_order,
    "sorted by length": lambda net, x: in_order(
        net, torch.cat([(x != 0).sum(1, keepdim=True).to(x), x[:, 1:]], 1)
    ),
    "gathered by length": gathered_in_order,
    "written to itself": lambda net, x: net[0](x) + F.linear(x, net[1].weight.clone().mul_(2.0)),
    "what is its own type": lambda net, x: net[0](x) + F.linear(x, net[1].weight.to(x.dtype).contiguous()),
    "there and back": lambda net, x: net[0](x.roll(1, 0)).tanh().roll(-1, 0) + net[1](x),
    "squeezed": lambda net, x: (net[0](x.squeeze()).tanh() + net[1](x.squeeze())).view(len(x), C),
}


@pytest.mark.filterwarnings(
    r"ignore:This model (cannot be differentiated for several|has no )", "ignore:autodiff="
)
@pytest.mark.parametrize("autodiff", ["auto", "contraction", "forward"])
@pytest.mark.parametrize("name", AWKWARD)
def test_features_are_right_whatever_a_pass_depends_on(name, autodiff):
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(6, C), nn.Linear(6, C, bias=name != "selected inputs")])
    model = Applied(AWKWARD[name], layers).double().eval()
    function, x = FunctionalModel(model), torch.randn(8, 6, dtype=torch.float64)
    V = normal_like(function.weights(), 40, seed=1)
    short = torch.cat([x[:3, :2], torch.zeros(3, 4, dtype=x.dtype)], 1)
    engine = NystromGGN(model, "classification", autodiff=autodiff).engine
    if autodiff == "contraction" and name in (
        "selected inputs",
        "sorted inputs",
        "sorted by length",
        "gathered by length",
        "written to itself",
    ):
        with pytest.raises(ValueError, match="cannot be differentiated"):
            engine.push(x, V)
        return
    padded = x * (torch.arange(6) < torch.tensor([[6, 1, 4, 2, 6, 3, 5, 1]]).T)
    for batch in (x, x[:1], -x, short, padded, x[:2].flip(0), x[:, [3, 1, 2, 0, 5, 4]]):
        expected = safely(model, lambda b=batch: looped_reverse_features(function, None, V, b, Chunks(1, 1)))
        for found, other in zip(engine.push(batch, V), expected):
            assert_close(found, other, rtol=1e-10)


@pytest.mark.parametrize("autodiff", ["auto", "contraction", "forward"])
def test_writes_that_nobody_counts_are_seen(autodiff):
    model, function, x, V = problem("folded batch norm", torch.float64)
    engine = NystromGGN(model, "classification", autodiff=autodiff).engine
    for change in (
        lambda: None,
        lambda: [p.data.mul_(1.5) for p in model.parameters()],
        lambda: V["before.weight"].mul_(2),
    ):
        change()
        expected = safely(model, lambda: looped_reverse_features(function, None, V, x, Chunks(1, 1)))
        for found, other in zip(engine.push(x, V), expected):
            assert_close(found, other, rtol=1e-10)


@pytest.mark.parametrize("autodiff", ["auto", "contraction", "forward"])
def test_a_weight_that_is_transposed_where_it_is_is_seen(autodiff):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, C)).double()
    function, x = FunctionalModel(model), vectors().double()
    V = normal_like(function.weights(), K, seed=1)
    engine = NystromGGN(model, "classification", autodiff=autodiff).engine
    for _ in range(2):
        expected = safely(model, lambda: looped_reverse_features(function, None, V, x, Chunks(1, 1)))
        for found, other in zip(engine.push(x, V), expected):
            assert_close(found, other, rtol=1e-10)
        model[0].weight.data = model[0].weight.data.T  # the same address and shape


def test_weights_that_meet_a_number_are_recorded():
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight * torch.tensor(2.0, dtype=x.dtype), self.bias)

    pair = torch.cat([vectors().double()[:1]] * 2)
    model = Scaled(6, C).double()
    facts = safely(model, lambda: find_facts(FunctionalModel(model), pair, torch.float64, True, False))
    assert facts.contracted is not None


@pytest.mark.filterwarnings("ignore:This model cannot be differentiated for several inputs at once")
def test_a_pass_that_does_not_follow_the_record_is_found_out():
    branch = Applied(
        lambda net, x: net[1](net[0](x) if x.sum() > 0 else x),
        nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, C)]),
    )
    model, x = branch.double(), vectors().double().abs()
    function = FunctionalModel(model)
    V = normal_like(function.weights(), K, seed=1)
    made = safely(model, lambda: contracted_model(function, x))
    with pytest.raises(DivergedError):
        safely(model, lambda: contracted_features(made, made.ready(), V, -x, Chunks(9, 1)))
    engine = NystromGGN(model, "classification", autodiff="contraction").engine
    for batch in (x, -x):
        phi, _ = engine.push(batch, V)
        expected = safely(model, lambda b=batch: looped_reverse_features(function, None, V, b, Chunks(1, 1)))
        assert_close(phi, expected[0], rtol=1e-10)


def test_where_inputs_meet_each_other_it_is_refused():
    model = Applied(lambda net, x: net(x - 0.1 * x.flip(0)), nn.Linear(6, C)).double()
    function, x = FunctionalModel(model), vectors().double()
    pair = torch.cat([x[:1]] * 2)
    facts = safely(model, lambda: find_facts(function, pair, torch.float64, True, False))
    assert facts.contracted is None
    assert "disagree" in facts.why_not


def test_weights_that_are_written_into_other_tensors_are_refused():
    def forward(net, x):
        padded = torch.zeros(2, 6, dtype=x.dtype)
        padded[:1] = net[1].weight[:1] * 1e-9  # too little to change a product of random directions
        return net[0](x) + padded.sum()

    model = Applied(forward, nn.ModuleList([nn.Linear(6, C), nn.Linear(6, 1)])).double()
    pair = torch.cat([vectors().double()[:1]] * 2)
    facts = safely(model, lambda: find_facts(FunctionalModel(model), pair, torch.float64, True, False))
    assert facts.contracted is None
    assert "is written to, of weights or with them" in facts.why_not


def test_what_is_derived_is_computed_anew_when_a_weight_changes():
    model, function, x, V = problem("folded batch norm", torch.float64)
    made = safely(model, lambda: contracted_model(rewritten(function, x[:2], torch.float64), x))
    first = made.ready()
    assert made.ready() is first
    with torch.no_grad():
        model.layer[2].running_var.mul_(2)
    expected = safely(model, lambda: looped_reverse_features(function, None, V, x, Chunks(1, 1)))
    found = safely(
        model, lambda: contracted_features(made, made.ready(), {**V, **made.prepared(V)}, x, Chunks(9, 1))
    )
    assert made.ready() is not first
    assert_close(found[0], expected[0], rtol=1e-10)
