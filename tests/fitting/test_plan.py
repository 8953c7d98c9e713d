"""The plan's seconds: those of chunks that were run, on a clock that the model itself moves."""

import random

import numpy as np
import pytest
import torch
from helpers import C, N, Snapshot, assert_same, build, fitted, inputs, loader, targets, train_loader
from models import Applied
from torch import nn

from laplace_ella.fitting import rehearsal
from laplace_ella.fitting.rehearsal import LONG, REPEATS, seconds_of
from laplace_ella.network import choice, memory
from laplace_ella.network.features import FEATURES


class Clock:
    """Seconds that pass only where a model says so."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, 0
        monkeypatch.setattr(rehearsal, "perf_counter", lambda: self.now)


def priced(monkeypatch, fixed=1.0, per_row=0.01, **options):
    """A network whose forward takes a fixed time, as reading its weights does, and some for every row."""
    clock = Clock(monkeypatch)

    def forward(net, x):
        clock.calls += 1
        clock.now += fixed + per_row * len(x)
        return net(x)

    return build(model=Applied(forward), **options), clock


def check(la, clock):
    """Compare the planned seconds with those that fit and predictions take."""

    def taken(call, *args):
        start = clock.now
        call(*args)
        return clock.now - start

    plan = la.plan(train_loader(), verbose=False)
    fit = taken(la.fit, train_loader())
    assert fit / 1.5 < plan.total_seconds < 1.5 * fit
    assert plan.total_seconds == sum(s.seconds for s in plan.stages)
    for x, planned in ((inputs()[:7], 7 * plan.prediction), (inputs()[:1], plan.single_prediction)):
        prediction = taken(la, x)
        assert prediction / 1.5 <= planned <= 1.5 * prediction
    return plan


# The clock stands still in backward passes, so that autodiff="double" is not here.
OPTIONS = [
    {},
    {"chunk_size": 3, "curvature_size": 11},
    {"memory_budget": 2000},
    {"memory_budget": 2000, "spill": "cpu"},
    {"autodiff": "reverse"},
    {"curvature": "mc", "curvature_samples": 3},
    {"curvature_size": None},
    {"n_eigenvalues": 1},
    {"subsample_size": 3, "n_eigenvalues": 2},
]


@pytest.mark.filterwarnings("ignore:curvature='mc' estimates G")
@pytest.mark.parametrize("options", [*OPTIONS, *(m for m in FEATURES if m != "double")], ids=str)
def test_planned_seconds_are_those_of_fit_and_predictions(monkeypatch, options):
    monkeypatch.setattr(choice, "CPU_WORKING_SET", 6 * 7 * 8)  # bytes of six inputs
    if isinstance(options, str):
        monkeypatch.setattr(choice.Choice, "mode", lambda self, rank: options)
        assert check(*priced(monkeypatch)).mode == options
        return
    for fixed in (0.0, 1.0):
        check(*priced(monkeypatch, fixed, **options))


def test_a_call_that_is_long_is_timed_once(monkeypatch):
    la, clock = priced(monkeypatch, fixed=10 * LONG)
    la.plan(train_loader(), verbose=False)
    before = clock.calls
    la.plan(train_loader(), verbose=False)
    # The forward pass, the gradients, and features of a chunk and of a row.
    assert clock.calls - before == 4


def test_calls_that_are_short_are_repeated_after_a_warm_up(monkeypatch):
    clock = Clock(monkeypatch)
    prices = iter([LONG / 2, 0.01, 0.03, 0.02, 0.01, 0.04, 7.0])

    def call():
        clock.now += next(prices)
        return torch.zeros(())

    assert seconds_of(call) == pytest.approx(0.02)
    assert REPEATS == 5
    assert next(prices) == 7.0


def test_a_plan_leaves_estimator_model_generators_and_the_next_fit_as_they_were():
    la, other = fitted(), fitted()
    generator = torch.Generator().manual_seed(3)
    data = loader(inputs(), targets("classification"), shuffle=True, generator=generator)
    la.model.train()
    snapshot, attributes = Snapshot(la, inputs()[:3]), set(vars(la))
    states = torch.get_rng_state(), random.getstate(), generator.get_state()
    of_numpy = np.random.get_state()[1].copy()  # noqa: NPY002
    la.plan(data, verbose=False)
    assert_same((torch.get_rng_state(), generator.get_state()), (states[0], states[2]))
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == of_numpy).all()  # noqa: NPY002
    assert all(m.training for m in la.model.modules())
    assert all(p.grad is None and p.requires_grad for p in la.model.parameters())
    assert set(vars(la)) == attributes
    snapshot.check()
    for again in (la, other):
        again.fit(train_loader())
    assert torch.equal(la.H, other.H)


def test_tangents_are_stored_as_a_basis_is():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, C)).double()
    la = build(model=model.to(memory_format=torch.channels_last))
    x = torch.randn(7, 2, 4, 4, dtype=torch.float64)
    found, _ = rehearsal.Rehearsal(la.backend.engine, x, None, 4, 7, 0, None).tangents(1)
    la.fit(loader(x, torch.arange(7) % C))
    for name, stored in la.basis.directions.items():
        assert found[name].stride()[1:] == stored.stride()[1:]
        assert found[name].shape[1:] == stored.shape[1:]


def test_a_plan_says_what_exceeds_the_budget():
    assert build().plan(train_loader(), verbose=False).over_budget == ()
    beyond = build(memory_budget=3000).plan(train_loader(), verbose=False)
    assert beyond.over_budget
    names = [s.name for s in beyond.stages if s.n_bytes > 3000]
    assert [s.name for s in beyond.over_budget] == names
    (line,) = (row for row in str(beyond).splitlines() if row.startswith("WARNING"))
    assert memory.gigabytes(3000) in line
    assert all(name in line for name in names)


def test_the_printed_plan_has_the_seconds_of_each_stage(monkeypatch):
    la, _ = priced(monkeypatch, fixed=20.0, per_row=0.0)
    plan = la.plan(train_loader(), verbose=False)
    lines = str(plan).splitlines()
    assert f"{plan.stages[0].seconds:.0f} s" in lines[2]
    assert plan.stages[0].seconds == pytest.approx(N / 7 * 20)
    assert plan.seconds == pytest.approx(20 / 7)
    la, _ = priced(monkeypatch, fixed=0.5, per_row=0.0)
    assert "500 ms alone" in str(la.plan(train_loader(), verbose=False))
    assert "a prediction takes 2.9 s an input in batches like the first, 20 s alone" in str(plan)


def test_a_plan_compiles_nothing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", lambda function, **options: refuse)
    la = build(compile=True)
    assert la.plan(train_loader(), verbose=False).total_seconds > 0
