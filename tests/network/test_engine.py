"""The engine: ways to compute features, rewrites for forward mode, chunks, memory, and the plan of a fit."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import replace
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close
from helpers import C, M, N, build, fitted, inputs, loader, reference_features, targets, train_loader
from models import Applied
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

import laplace_ella
from laplace_ella import NystromGGN, ReverseNystromGGN
from laplace_ella.network.engine import Engine
from laplace_ella.network.features import FEATURES, SHARED_WEIGHTS, reverse_is_cheaper
from laplace_ella.network.functional import FunctionalModel
from laplace_ella.network.gradients import gradient_rows
from laplace_ella.network.memory import Chunks, OutOfMemory
from laplace_ella.network.pulling import pulled_cotangents
from laplace_ella.network.rewriting import RewrittenModel, find_rewrites
from laplace_ella.network.safety import safely
from laplace_ella.nystrom import gram

X = inputs(7, seed=7)
MODES = ["forward", "double", "reverse"]


class Endless(IterableDataset):
    """Inputs without end."""

    def __iter__(self):
        return zip(iter(lambda: inputs(1)[0], None), cycle([0, 1]))


class ConvNet(nn.Module):
    """Convolutions with and without normalisation, a residual, and branches that share one."""

    def __init__(self, view=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm1 = nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.second, self.norm2 = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5, affine=False)
        self.third = nn.Conv2d(5, 5, 1)  # whose output is used twice
        self.norm3 = nn.BatchNorm2d(5)
        self.before, self.head, self.view = nn.Conv2d(2, 2, 1), nn.Linear(5 * 9, C), view
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
                if m.affine:
                    nn.init.normal_(m.weight)
                    nn.init.normal_(m.bias)

    def forward(self, x):
        h = F.relu(self.norm1(self.first(x)))
        h = F.relu(self.norm2(self.second(h)) + h, inplace=True)
        g = self.third(h)
        h = self.norm3(g) + g.tanh()
        return self.head(h.view(len(h), -1) if self.view else h.flatten(1))


def normed(norm):
    """A network that normalises by statistics of its input."""
    for p in norm.parameters():
        nn.init.normal_(p)
    before = nn.Flatten(), nn.Linear(18, 12), nn.Tanh(), nn.Unflatten(1, (4, 3))
    return nn.Sequential(*before, norm, nn.Flatten(), nn.Linear(12, C))


def images(n, dtype=torch.float64):
    return torch.randn(n, 2, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def fitted_to_images(model, dtype=torch.float64, **kwargs):
    return fitted(model=model, data=loader(images(N, dtype), targets("classification")), **kwargs)


def conv_net():
    """A network with images, and five directions in its weights."""
    model = ConvNet().double().eval()
    function = FunctionalModel(model)
    directions = {k: torch.randn(5, *w.shape, dtype=w.dtype) for k, w in function.weights().items()}
    return model, function, directions, images(7)


@pytest.mark.parametrize("mode", FEATURES)
@pytest.mark.parametrize("chunks", [Chunks(1, 1), Chunks(3, 2), Chunks(100, 100)], ids=str)
@pytest.mark.parametrize("rewritten", [False, True])
def test_every_way_gives_the_same_features(mode, chunks, rewritten):
    model, function, directions, x = conv_net()
    basis = type("Basis", (), {"rank": 5, "directions": directions})
    expected_phi, expected_f = reference_features(model, basis, x)
    if rewritten:
        function = RewrittenModel(function, safely(model, lambda: find_rewrites(function, x[:2])))
        assert sorted(function.rewrites.folds) == [0, 1]
    phi, f = safely(model, lambda: FEATURES[mode](function, function.weights(), directions, x, chunks))
    assert_close(f, expected_f)
    assert_close(phi, expected_phi)
    assert not phi.requires_grad


@pytest.mark.parametrize("looped", [False, True])
def test_cotangents_are_pulled_as_the_features_say(looped):
    model, function, directions, x = conv_net()
    u = torch.randn(7, 2, C, dtype=torch.float64)
    of_directions = function, function.weights(), directions, x
    phi, _ = safely(model, lambda: FEATURES["double"](*of_directions, Chunks(7, 1)))
    found = safely(model, lambda: pulled_cotangents(*of_directions, u, Chunks(3, 1), looped))
    assert_close(found, u @ phi)


DIFFERENTIABLE = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(18, 7), nn.Tanh(), nn.Linear(7, C)),
    "conv": ConvNet,
    "layer norm": lambda: normed(nn.LayerNorm(3)),
    "layer norm, two axes": lambda: normed(nn.LayerNorm((4, 3), elementwise_affine=False)),
    "group norm": lambda: normed(nn.GroupNorm(2, 4)),
    "instance norm": lambda: normed(nn.InstanceNorm1d(4, affine=True)),
    "instance norm, running": lambda: normed(nn.InstanceNorm1d(4, track_running_stats=True)),
    "rms norm": lambda: normed(Applied(lambda net, h: F.rms_norm(h, (3,)), nn.Identity())),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_features_reach_the_inputs(mode, name):
    model = DIFFERENTIABLE[name]().double().eval()
    la = fitted_to_images(model, autodiff=mode, enable_backprop=True, chunk_size=2)
    x = images(3).requires_grad_()
    weight = torch.randn(3, C, 5, dtype=torch.float64)

    def scalar(x):
        phi, f = la.features(x)
        return (phi * weight).sum() + f.square().sum()

    scalar(x).backward()
    step = 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    with torch.no_grad():
        difference = scalar(x + step) - scalar(x - step)
    assert_close(2 * (x.grad * step).sum(), difference, rtol=1e-6)
    assert all(p.grad is None for p in model.parameters())
    assert_close(la.features(x)[1], model(x))


@pytest.mark.filterwarnings("ignore:.*one by one", "ignore:None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")  # of checkpoints in torch 2.4
def test_gradients_through_a_re_entrant_checkpoint_are_an_error_and_not_a_constant():
    model = Applied(lambda net, x: checkpoint(torch.tanh, net(x), use_reentrant=True))
    la = fitted(model=model, autodiff="reverse", enable_backprop=True)
    assert la.backend.engine.function.knows_backward_only
    with pytest.raises(RuntimeError, match=r"(?i)checkpoint"):
        la.features(X.clone().requires_grad_())


class OldStyle(torch.autograd.Function):
    """The identity, which torch.func refuses and whose backward pass fails."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("gradients are not written yet")


@pytest.mark.parametrize("mode", ["auto", "reverse"])
def test_a_model_that_has_no_backward_pass_is_refused_with_that_as_the_reason(mode):
    model = Applied(lambda net, x: OldStyle.apply(net(x)))
    with pytest.raises(ValueError, match=r"cannot be differentiated: .*gradients are not written yet"):
        fitted(model=model, autodiff=mode)


def test_a_mode_is_chosen_by_outputs_directions_and_the_kind_of_network():
    model, x = ConvNet().double().eval(), images(7)
    engine = NystromGGN(model, "classification").engine
    assert not reverse_is_cheaper(10, 20)
    assert reverse_is_cheaper(1, 20)
    assert not reverse_is_cheaper(1, 20, 0.9 * SHARED_WEIGHTS)
    boundary = next(k for k in range(1, 1000) if reverse_is_cheaper(C, k))
    assert [engine.choice(x).mode(k) for k in (boundary - 1, boundary)] == ["forward", "reverse"]
    layers = nn.Linear(5, 99), nn.Linear(99, 99), nn.Tanh(), nn.Linear(99, 1)
    shares_no_weight = nn.Sequential(*layers).double()
    assert NystromGGN(shares_no_weight, "regression").engine.choice(X).mode(10**6) == "forward"
    for mode in MODES:
        named = NystromGGN(model, "classification", autodiff=mode).engine
        assert named.choice(x).mode(1) == named.choice(x).mode(10**6) == mode
    assert ReverseNystromGGN(model, "classification").engine.choice(x).mode(1) == "reverse"


@pytest.mark.parametrize("compiled", [False, True])
def test_only_batched_forward_mode_is_compiled(compiled, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda compute: made.append(compute) or compute)
    laplace_ella.network.engine._compiled.cache_clear()
    for mode in MODES:
        fitted(autodiff=mode, compile=compiled).features(X)
    laplace_ella.network.engine._compiled.cache_clear()
    assert made == [FEATURES["forward"].compute] * compiled


@pytest.mark.parametrize("view", [False, True], ids=["flatten", "view"])
def test_channels_last_where_the_model_takes_it(view):
    model, x = ConvNet(view).eval(), images(7, torch.float32)
    la = fitted_to_images(model, torch.float32, n_eigenvalues=3)
    rewrites = la.backend.engine.facts(x).rewritten.model.rewrites
    assert rewrites.channels_last != view
    assert sorted(rewrites.folds) == [0, 1]
    for found, expected in zip(la.features(x), reference_features(model, la.basis, x)):
        assert_close(found, expected, rtol=1e-4)


# Functions of a network and of what its first convolution returns, which depend on the data.
DETOURS = {
    "skips a norm": lambda net, x: net.norm1(net.first(x)) if x.sum() > 0 else net.first(x),
    "takes another norm": lambda net, x: (net.norm1 if x.sum() > 0 else net.norm3)(net.first(x)),
    "convolves once more": lambda net, x: net.norm1(net.first(x if x.sum() > 0 else net.before(x))),
}


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", DETOURS)
def test_a_pass_that_does_not_follow_the_recorded_one_is_run_as_it_is(name, bare):
    def forward(net, x):
        h = DETOURS[name](net, x)
        return h if bare else net.head(h.flatten(1))

    model, x = Applied(forward, ConvNet()).double().eval(), images(3).abs()
    function = FunctionalModel(model)
    weights = function.weights()
    directions = {k: torch.randn(2, *w.shape, dtype=w.dtype) for k, w in weights.items()}
    made = RewrittenModel(function, safely(model, lambda: find_rewrites(function, x)))
    assert list(made.rewrites.folds) == [0]

    def pushed(way, of, batch, chunks):
        return safely(model, lambda: FEATURES[way](of, weights, directions, batch, chunks))

    for batch in (x, -x):
        found = pushed("forward", made, batch, Chunks(3, 2))
        for left, right in zip(found, pushed("reverse loop", function, batch, Chunks(1, 1))):
            assert_close(left, right)
        assert_close(found[1], model(batch).flatten(1))


def limit(monkeypatch, most):
    """Let forward mode run out of memory above so many rows x directions; return what is tried."""
    way, tried = FEATURES["forward"], []

    def limited(model, weights, directions, x, chunks):
        tried.append(chunks)
        if chunks.inputs * chunks.directions > most:
            raise OutOfMemory("no room")
        return way.compute(model, weights, directions, x, chunks)

    monkeypatch.setitem(FEATURES, "forward", replace(way, compute=limited))
    return tried


def test_out_of_memory_halves_the_chunks_with_one_warning(monkeypatch):
    la = fitted(autodiff="forward")
    expected, _ = la.features(X)
    tried = limit(monkeypatch, 3)
    with pytest.warns(UserWarning, match=r"ran out of memory .* memory_budget") as record:
        phi, _ = la.features(X)
    assert len(record) == 1
    assert_close(phi, expected)
    n_inputs, n_directions = zip(*((c.inputs, c.directions) for c in tried))
    assert n_directions[n_inputs.index(2)] == 5  # inputs are halved first
    assert (n_inputs[-1], n_directions[-1]) == (1, 3)
    n_tried = len(tried)
    la.features(X)  # what fits is remembered
    assert len(tried) == n_tried + 1


def test_where_a_single_row_does_not_fit(monkeypatch):
    la = fitted(autodiff="forward")
    limit(monkeypatch, 0)
    match = r"needs about .* and does not fit on cpu, where .* are free.*n_eigenvalues"
    with pytest.raises(OutOfMemory, match=match):
        la.features(X)


def test_out_of_memory_in_landmark_gradients():
    sizes = []

    class Limited(NystromGGN):
        @staticmethod
        def row_engine(model, weights, x, outputs):
            sizes.append(len(outputs))
            if len(outputs) > 2:
                raise OutOfMemory("no room")
            return gradient_rows(model, weights, x, outputs)

    with pytest.warns(UserWarning, match="ran out of memory"):
        la = fitted(backend=Limited)
    assert max(sizes) == M
    assert_close(la.H, fitted().H)


@pytest.mark.parametrize("budget", [1, 3000, 10**12, 1e-9, 0.5, 1.0, None])
def test_the_budget_changes_chunks_and_no_result(budget):
    la = fitted(memory_budget=budget)
    assert_close(la(X), fitted()(X))
    engine = la.backend.engine
    assert engine.choice(X).chunks("forward", 5).inputs >= 1
    if isinstance(budget, int) and budget == 1:
        assert all(engine.choice(X).chunks(mode, 5) == Chunks(1, 1) for mode in FEATURES)
        assert engine.choice(X).gradients_per_call() == 1


def test_what_calls_take_follows_from_the_facts_of_their_way():
    engine = fitted().backend.engine
    facts, chunks = engine.facts(X), {mode: engine.choice(X).chunks(mode, 5) for mode in FEATURES}
    assert {mode: c.directions for mode, c in chunks.items() if c.directions > 1} == {"forward": 5}
    assert chunks["reverse"] == Chunks(engine.choice(X).gradients_per_call(), 1)
    assert chunks["reverse loop"] == Chunks(1, 1)
    n_bytes = {mode: engine.choice(X).feature_bytes(mode, Chunks(2, 3)) for mode in FEATURES}
    assert n_bytes["forward"] == n_bytes["forward loop"] == 6 * 8 * facts.input_bytes
    assert n_bytes["double"] == 6 * 2 * facts.graph_bytes
    assert n_bytes["reverse"] == n_bytes["reverse loop"] == 6 * (2 * engine.row_size() + facts.graph_bytes)
    assert engine.choice(X).gradient_bytes(2) == 2 * (2 * engine.row_size() + facts.graph_bytes)


def test_views_and_results_in_place_take_no_memory():
    shape = nn.Unflatten(1, (7, 1)), nn.Flatten()
    model = nn.Sequential(nn.Linear(5, 7), *shape, nn.ReLU(inplace=True), nn.Linear(7, 3)).double()
    facts = NystromGGN(model, "classification").engine.facts(X)
    assert (facts.input_bytes, facts.graph_bytes) == (7 * 8, (7 + 3) * 8)


def test_malloc_thresholds_are_raised_where_there_are_any(monkeypatch):
    calls = []
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        library = SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments) or 1)
        monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
        assert "2^30" in laplace_ella.raise_malloc_thresholds()
        assert calls == [(-3, 2**30), (-1, 2**31 - 1)]
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1"))
    assert laplace_ella.raise_malloc_thresholds().startswith("nothing done")


def test_a_plan_says_what_a_fit_does(capsys):
    la = build()
    plan = la.plan(train_loader())
    printed = capsys.readouterr().out
    assert str(plan) in printed
    assert la.H is None
    assert (plan.n_data, plan.n_outputs, plan.n_landmarks, plan.rank, plan.n_curvature) == (N, C, M, 5, N)
    assert plan.n_params == sum(p.numel() for p in la.model.parameters())
    by_name = {s.name: s for s in plan.stages}
    assert by_name["training data"].forwards == N
    assert by_name["curvature"].forwards == N * FEATURES[plan.mode].forwards(C, 5)
    assert plan.forwards == sum(s.forwards for s in plan.stages)
    assert plan.peak == max(s.n_bytes for s in plan.stages)
    assert all(name in printed for name in by_name)
    la.plan(train_loader(), verbose=False)
    assert capsys.readouterr().out == ""


def test_a_plan_knows_blocks_and_unknown_sizes():
    kept = build().plan(train_loader(), verbose=False)
    blocks = build(memory_budget=2000).plan(train_loader(), verbose=False)
    assert blocks.stages[1].forwards > 2 * kept.stages[1].forwards
    assert "blocks" in str(blocks)

    unknown = build(curvature_size=100).plan(DataLoader(Endless(), 5), verbose=False)
    assert unknown.n_data is None
    assert unknown.n_curvature == 100
    assert "N=unknown" in str(unknown)


def test_a_plan_refuses_what_it_would_use_up():
    with pytest.raises(ValueError, match="an iterator, whose batch would be lost"):
        build().plan(iter(train_loader()))


def test_the_plan_counts_the_gradients_that_are_computed(monkeypatch):
    counted, original = [], gram.RowSource.__call__
    count = lambda self, i, *rest, **options: counted.append(len(i)) or original(self, i, *rest, **options)  # noqa: E731
    monkeypatch.setattr(gram.RowSource, "__call__", count)
    la = build(memory_budget=4000)
    plan = la.plan(train_loader(), verbose=False)
    counted.clear()  # those that were timed
    la.fit(train_loader())
    assert f"x {sum(counted) / M:.3g}" in plan.stages[1].what


@pytest.mark.parametrize(
    ("net", "axis"), [(nn.Linear(4, 4), None), (nn.Conv1d(4, 4, 1), 1)], ids=["linear", "conv"]
)
def test_a_layer_over_positions_has_no_norms_of_channels(net, axis):
    x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = x.double().square().sum(-1 if axis is None else 1).flatten()
    torch.testing.assert_close(Engine(net, channel_axis=axis).last_layer_norms(x), expected)
    assert Engine(net, channel_axis=None if axis else 1).last_layer_norms(x) is None
