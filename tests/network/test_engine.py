"""The engine: modes, rewrites for forward mode, chunks, memory, and the plan of a fit."""

from __future__ import annotations

import ctypes
import platform
import warnings

import pytest
import torch
from conftest import assert_close
from helpers import C, M, N, build, fitted, inputs, loader, mlp, reference_features, targets, train_loader
from torch import nn
from torch.nn import functional as F

import laplace_ella
from laplace_ella import NystromGGN, ReverseNystromGGN
from laplace_ella.network.engine import reverse_is_cheaper
from laplace_ella.network.features import FEATURES
from laplace_ella.network.functional import FunctionalModel
from laplace_ella.network.gradients import gradient_rows
from laplace_ella.network.memory import Chunks, OutOfMemory, with_smaller_chunks
from laplace_ella.network.rewriting import RewrittenModel, find_rewrites
from laplace_ella.network.safety import safe_autodiff
from laplace_ella.nystrom import gram

X = inputs(7, seed=7)


# ------------------------------------------------------------------ modes


class ConvNet(nn.Module):
    """Convolutions with and without normalisation, a residual, and branches that share one."""

    def __init__(self, view=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm1 = nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.second, self.norm2 = nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5, affine=False)
        self.third = nn.Conv2d(5, 5, 1)  # whose output is used twice
        self.norm3 = nn.BatchNorm2d(5)
        self.head = nn.Linear(5 * 9, C)
        self.view = view
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


def images(n, dtype=torch.float64):
    return torch.randn(n, 2, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("mode", FEATURES)
@pytest.mark.parametrize("chunks", [Chunks(1, 1), Chunks(3, 2), Chunks(100, 100)], ids=str)
@pytest.mark.parametrize("rewritten", [False, True])
def test_every_way_gives_the_same_features(mode, chunks, rewritten):
    model, x = ConvNet().double().eval(), images(7)
    function = FunctionalModel(model)
    directions = {k: torch.randn(5, *w.shape, dtype=w.dtype) for k, w in function.weights().items()}
    basis = type("Basis", (), {"rank": 5, "directions": directions})
    expected_phi, expected_f = reference_features(model, basis, x)
    with safe_autodiff(model):
        if rewritten:
            function = RewrittenModel(model, find_rewrites(function, x[:2]))
            assert sorted(function.rewrites.folds) == [0, 1]
        phi, f = FEATURES[mode](function, function.weights(), directions, x, chunks)
    assert_close(f, expected_f)
    assert_close(phi, expected_phi)
    assert not phi.requires_grad


class Normed(nn.Module):
    """Normalises by statistics of its input; RMSNorm by torch.nn's function."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(18, 12), nn.Linear(12, C)
        self.norm = norm
        for p in norm.parameters() if isinstance(norm, nn.Module) else ():
            nn.init.normal_(p)

    def forward(self, x):
        h = self.first(x.flatten(1)).tanh().view(-1, 4, 3)
        h = F.rms_norm(h, (3,)) if self.norm is None else self.norm(h)
        return self.head(h.flatten(1))


@pytest.mark.parametrize("mode", ["forward", "double", "reverse"])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(3),
        lambda: nn.LayerNorm((4, 3), elementwise_affine=False),
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.InstanceNorm1d(4, affine=True),
        lambda: nn.InstanceNorm1d(4, track_running_stats=True),
        lambda: None,
    ],
    ids=["layer", "layer, two axes", "group", "instance", "instance, running", "rms"],
)
def test_gradients_of_features_through_normalisations(mode, norm):
    model = Normed(norm()).double().eval()
    la = fitted(
        model=model, data=loader(images(N), targets("classification")), autodiff=mode, enable_backprop=True
    )
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
    plain = fitted(model=model, data=loader(images(N), targets("classification")))
    assert_close(la.features(x)[1], plain.features(x)[1])


@pytest.mark.parametrize("mode", ["forward", "double", "reverse"])
@pytest.mark.parametrize("make", [mlp, lambda: ConvNet().double().eval()], ids=["mlp", "conv"])
def test_gradients_reach_the_inputs_in_every_mode(mode, make):
    model = make()
    x = X[:3].clone() if isinstance(model, nn.Sequential) else images(3)
    data = loader(inputs() if isinstance(model, nn.Sequential) else images(N), targets("classification"))
    la = fitted("classification", model, data, autodiff=mode, enable_backprop=True, chunk_size=2)
    weight = torch.randn(3, C, 5, dtype=torch.float64)

    def scalar(x):
        phi, f = la.features(x)
        return (phi * weight).sum() + f.square().sum()

    x.requires_grad_()
    scalar(x).backward()
    step = 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    with torch.no_grad():
        difference = scalar(x + step) - scalar(x - step)
    assert_close(2 * (x.grad * step).sum(), difference, rtol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_a_mode_is_chosen_by_outputs_directions_and_the_kind_of_network():
    model, x = ConvNet().double().eval(), images(7)
    backend = NystromGGN(model, "classification")
    assert not reverse_is_cheaper(10, 20)
    assert reverse_is_cheaper(1, 20)
    boundary = next(k for k in range(1, 1000) if reverse_is_cheaper(C, k))
    assert backend.engine.mode(x, boundary - 1) == "forward"
    assert backend.engine.mode(x, boundary) == "reverse"
    wide = nn.Sequential(
        nn.Linear(5, 99), nn.Linear(99, 99), nn.Tanh(), nn.Linear(99, 1)
    ).double()  # shares no weight
    assert NystromGGN(wide, "regression").engine.mode(X, 10**6) == "forward"
    for forced, expected in (("forward", "forward"), ("reverse", "reverse")):
        named = NystromGGN(model, "classification", autodiff=forced)
        assert named.engine.mode(x, 1) == named.engine.mode(x, 10**6) == expected
    assert ReverseNystromGGN(model, "classification").engine.mode(x, 1) == "reverse"


# ------------------------------------------------------------------ rewrites


@pytest.mark.parametrize("view", [False, True], ids=["flatten", "view"])
def test_channels_last_where_the_model_takes_it(view):
    model, x = ConvNet(view).eval(), images(7, torch.float32)
    la = fitted(
        model=model, data=loader(images(N, torch.float32), targets("classification")), n_eigenvalues=3
    )
    rewrites = la.backend.engine.facts(x).rewritten.rewrites
    assert rewrites.channels_last != view
    assert sorted(rewrites.folds) == [0, 1]
    phi, f = la.features(x)
    expected_phi, expected_f = reference_features(model, la.basis, x)
    assert_close(phi, expected_phi, rtol=1e-4)
    assert_close(f, expected_f, rtol=1e-4)


class Branching(ConvNet):
    """Skips a normalisation, depending on the data."""

    def forward(self, x):
        h = self.first(x)
        if x.sum() > 0:
            h = self.norm1(h)
        return self.head(h.flatten(1))


def test_a_pass_that_does_not_follow_the_recorded_one_is_run_as_it_is():
    model = Branching().double().eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*one by one")  # a branch on the data
        la = fitted(model=model, data=loader(images(N).abs(), targets("classification")))
    assert list(la.backend.engine.facts(images(2)).rewritten.rewrites.folds) == [0]
    for x in (images(3).abs(), -images(3).abs()):
        for found, expected in zip(la.features(x), reference_features(model, la.basis, x)):
            assert_close(found, expected)


class Detour(ConvNet):
    """Convolves once more, to another width, depending on the data."""

    def __init__(self):
        super().__init__()
        self.before = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        if x.sum() < 0:
            x = self.before(x)
        return self.head(self.norm1(self.first(x)).flatten(1))


def test_a_convolution_in_the_place_of_another_is_not_folded():
    model = Detour().double().eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*one by one")
        la = fitted(model=model, data=loader(images(N).abs(), targets("classification")))
    for found, expected in zip(
        la.features(-images(3).abs()), reference_features(model, la.basis, -images(3).abs())
    ):
        assert_close(found, expected)


# ------------------------------------------------------------------ memory


def test_out_of_memory_halves_the_chunks_with_one_warning(monkeypatch):
    la, expected = fitted(), fitted()
    tried = []

    def limited(model, weights, directions, x, chunks):
        tried.append(chunks)
        if chunks.rows * chunks.directions > 3:
            raise OutOfMemory("no room")
        return FEATURES["forward"](model, weights, directions, x, chunks)

    monkeypatch.setattr(la.backend.engine, "forward_features", limited)
    with pytest.warns(UserWarning, match=r"ran out of memory .* memory_budget") as record:
        phi, _ = la.features(X)
    assert len(record) == 1
    assert_close(phi, expected.features(X)[0])
    n_tried = len(tried)
    la.features(X)  # what fits is remembered
    assert len(tried) == n_tried + 1


def test_where_a_single_row_does_not_fit(monkeypatch):
    la = fitted()

    def full(*_):
        raise OutOfMemory("no room")

    monkeypatch.setattr(la.backend.engine, "forward_features", full)
    with pytest.raises(
        OutOfMemory, match=r"needs about .* and does not fit on cpu, where .* are free.*n_eigenvalues"
    ):
        la.features(X)


def test_out_of_memory_in_landmark_gradients():
    class Limited(NystromGGN):
        sizes: list[int] = []  # noqa: RUF012

        @staticmethod
        def row_engine(model, weights, x, outputs):
            Limited.sizes.append(len(outputs))
            if len(outputs) > 2:
                raise OutOfMemory("no room")
            return gradient_rows(model, weights, x, outputs)

    with pytest.warns(UserWarning, match="ran out of memory"):
        la = fitted(backend=Limited)
    assert max(Limited.sizes) == M
    assert_close(la.H, fitted().H)


def test_chunks_are_halved_rows_first():
    sizes = []
    chunks = Chunks(5, 3)
    while chunks is not None:
        sizes.append((chunks.rows, chunks.directions))
        chunks = chunks.halved()
    assert sizes == [(5, 3), (3, 3), (2, 3), (1, 3), (1, 2), (1, 1)]
    assert with_smaller_chunks(lambda c: c, Chunks(2, 2), torch.device("cpu"), lambda c: 0)[1] == Chunks(2, 2)


@pytest.mark.parametrize("budget", [1, 3000, 10**12, 1e-9, 0.5, 1.0, None])
def test_the_budget_changes_chunks_and_no_result(budget):
    la = fitted(memory_budget=budget)
    assert_close(la(X), fitted()(X))
    engine = la.backend.engine
    assert engine.chunks("forward", X, 5).rows >= 1
    if isinstance(budget, int) and budget == 1:
        assert engine.chunks("forward", X, 5) == Chunks(1, 1)
        assert engine.gradients_per_call(X) == 1


def test_malloc_thresholds_are_raised_where_there_are_any(monkeypatch):
    glibc = platform.system() == "Linux" and platform.libc_ver()[0] == "glibc"
    calls = []
    if glibc:

        class Library:
            def mallopt(self, *arguments):
                calls.append(arguments)
                return 1

        monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
        assert "2^30" in laplace_ella.raise_malloc_thresholds()
        assert calls == [(-3, 2**30), (-1, 2**31 - 1)]
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1"))
    assert laplace_ella.raise_malloc_thresholds().startswith("nothing done")


# ------------------------------------------------------------------ the plan


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
    assert by_name["curvature"].forwards == N * (1 + 2 * 5)
    assert plan.forwards == sum(s.forwards for s in plan.stages)
    assert plan.peak == max(s.n_bytes for s in plan.stages)
    assert all(name in printed for name in by_name)
    la.plan(train_loader(), verbose=False)
    assert capsys.readouterr().out == ""


def test_a_plan_knows_blocks_and_unknown_sizes():
    kept = build().plan(train_loader(), verbose=False)
    blocks = build(memory_budget=3000).plan(train_loader(), verbose=False)
    assert blocks.stages[1].forwards > 2 * kept.stages[1].forwards
    assert "blocks" in str(blocks)

    class Endless:
        def __iter__(self):
            while True:
                yield next(iter(train_loader()))

    unknown = build(curvature_size=100).plan(Endless(), verbose=False)
    assert unknown.n_data is None
    assert unknown.n_curvature == 100
    assert "N=unknown" in str(unknown)


def test_a_plan_refuses_what_it_would_use_up():
    with pytest.raises(ValueError, match="an iterator, whose batch would be lost"):
        build().plan(iter(train_loader()))
    with pytest.raises(ValueError, match="no data"):
        build().plan([])


def test_the_plan_counts_the_gradients_that_are_computed(monkeypatch):
    counted = []
    original = gram.RowSource.__call__

    def count(self, indices, *arguments, **options):
        counted.append(len(indices))
        return original(self, indices, *arguments, **options)

    monkeypatch.setattr(gram.RowSource, "__call__", count)
    la = build(memory_budget=4000)
    plan = la.plan(train_loader(), verbose=False)
    counted.clear()  # those that were timed
    la.fit(train_loader())
    assert f"x {sum(counted) / M:.3g}" in plan.stages[1].what
