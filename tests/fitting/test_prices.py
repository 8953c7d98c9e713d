"""``predict_plan``: what it promises is what predictions take, on a clock that the model itself moves."""

from types import SimpleNamespace

import pytest
import torch
from helpers import C, D, DictModel, Snapshot, build, dict_batches, fitted, inputs, train_loader
from models import Applied, Counting
from torch import nn

from laplace_ella.fitting import prices, rehearsal
from laplace_ella.network import by_layer as by_layer_of
from laplace_ella.network import choice
from laplace_ella.network import costs as costs_of
from laplace_ella.network.features import FEATURES
from laplace_ella.nystrom import kernels
from laplace_ella.nystrom.kernels import kernel_way
from laplace_ella.posterior import residual as posterior_residual
from laplace_ella.posterior.setting import USUAL_RANKS

X = inputs(7, seed=7)


class Clock:
    """Seconds that pass only where a model says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(rehearsal, "perf_counter", lambda: self.now)


def priced(monkeypatch, fixed=1.0, per_row=0.01, **options):
    """A fitted network whose forward takes a fixed time, as reading its weights does, and some for every row."""
    clock = Clock(monkeypatch)

    def forward(net, x):
        clock.now += fixed + per_row * len(x)
        return net(x)

    la = build(model=Applied(forward), **options)
    la.fit(train_loader())
    return la, clock


# The clock stands still in backward passes, so that autodiff="double" is not here.
OPTIONS = [
    *({}, {"chunk_size": 1}, {"memory_budget": 2000}, {"residual": "isotropic"}, {"residual": "exact"}),
    *({"autodiff": "reverse"}, {"enable_backprop": True}),
    *(mode for mode in FEATURES if mode != "double"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_promised_seconds_are_those_of_predictions(monkeypatch, options):
    monkeypatch.setattr(choice, "CPU_WORKING_SET", 6 * 7 * 8)  # bytes of six inputs
    if isinstance(options, str):
        monkeypatch.setattr(choice.Choice, "mode", lambda self, rank: options)
    la, clock = priced(monkeypatch, **({} if isinstance(options, str) else options))
    for x in (X, X[:1]):
        plan = la.predict_plan(x, verbose=False)
        assert plan.seconds == pytest.approx(1 + 0.01 * len(x))
        for price in plan.prices:
            la.n_directions = price.n_directions
            start = clock.now
            la(x)
            assert (clock.now - start) / 1.5 < price.seconds < 1.5 * (clock.now - start)
            assert price.forwards == pytest.approx(price.seconds / plan.seconds)
            assert price.mode in ([options] if isinstance(options, str) else FEATURES)
        la.n_directions = None


def test_it_goes_up_to_the_fitted_directions_and_says_how_much_of_the_trace_they_retain():
    la = fitted(n_eigenvalues=7)
    la.n_directions = 5
    plan = la.predict_plan(X, verbose=False)
    assert [p.n_directions for p in plan.prices] == [1, 2, 5, 7]
    assert (plan.n_inputs, plan.n_outputs, plan.n_params, plan.n_directions) == (7, C, la.n_params, 5)
    assert plan.directions_bytes == 7 * 8 * la.n_params
    whole = la._posterior.fit.basis
    for price in plan.prices:
        kept = float(whole.eigenvalues[: price.n_directions].sum()) / whole.trace
        assert price.retained == pytest.approx(kept, rel=1e-12)
    assert list(USUAL_RANKS) == sorted(USUAL_RANKS)


def counted(**options):
    return [p.counted for p in fitted(**options).predict_plan(X, verbose=False).prices]


def test_forward_passes_are_counted_with_those_of_the_residual():
    """A direction costs two forward passes more; two tangents as much as two directions; C gradients as the kernel's way says."""
    plain, isotropic, exact = (
        counted(autodiff="forward", residual=residual, residual_samples=2)
        for residual in ("none", "isotropic", "exact")
    )
    for rank, count in zip([1, 2, 5], plain):
        assert count >= 1 + 2 * rank
        assert count - plain[0] == pytest.approx((rank - 1) * (plain[1] - plain[0]))
    assert [a - b for a, b in zip(isotropic, plain)] == pytest.approx([plain[1]] * 3)
    la = fitted(residual="exact")
    way = kernel_way(la.backend.engine, X)
    assert [a - b for a, b in zip(exact, plain)] == pytest.approx([way.forwards] * 3)
    assert counted(autodiff="reverse") == [1 + 4 * C] * 3


@pytest.mark.parametrize("fits", [True, False])
def test_the_exact_residual_is_priced_in_the_way_in_which_it_is_computed(monkeypatch, fits):
    if not fits:
        monkeypatch.setattr(kernels, "numbers_at_once", lambda model: 10**15)
    la, done = fitted(residual="exact"), []

    def noting(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **more: done.append(name) or function(*args, **more))

    noting(kernels, "kernels_by_layer")
    noting(posterior_residual, "row_source")
    la(X)
    engine = la.backend.engine
    way, counts = kernel_way(engine, X), engine.choice(X).counts
    by_layer = set(done) == {"kernels_by_layer"}
    assert by_layer == fits
    assert by_layer == (way.layers is not None)
    outer = by_layer_of.outer_numbers(by_layer_of.outer_matrices(engine.layers(X)))
    costs = {
        True: costs_of.of_gradients_by_layer(counts, C, C, *outer),
        False: costs_of.of_gradients(counts, C, C),
    }
    assert way.forwards * counts.forward == pytest.approx(costs[by_layer])
    with torch.no_grad():
        features = engine.choice(X).cost("forward", 1) / counts.forward
    named = fitted(residual="exact", autodiff="forward")
    assert named.predict_plan(X, verbose=False).prices[0].counted == pytest.approx(way.forwards + features)


def test_bytes_grow_with_directions_inputs_and_residual():
    la = fitted(autodiff="forward")
    small, large = (la.predict_plan(x, verbose=False).prices for x in (X[:2], X))
    assert [p.n_bytes for p in small] == sorted({p.n_bytes for p in small})
    assert all(a.n_bytes < b.n_bytes for a, b in zip(small, large))
    la.residual = "exact"
    assert all(a.n_bytes < b.n_bytes for a, b in zip(large, la.predict_plan(X, verbose=False).prices))


@pytest.mark.parametrize("options", [{}, {"residual": "isotropic"}], ids=str)
def test_a_plan_leaves_estimator_and_model_as_they_were(options):
    la = fitted(**options)
    la.n_directions = 2
    la.model.train()
    snapshot, attributes, basis = Snapshot(la, X), set(vars(la)), la.basis
    state = torch.get_rng_state()
    la.predict_plan(X, verbose=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in la.model.modules())
    assert set(vars(la)) == attributes
    assert la.basis is basis
    snapshot.check()


def test_mappings_and_positions():
    la = fitted(model=DictModel(), data=dict_batches())
    assert la.predict_plan(dict_batches()[0], verbose=False).n_inputs == 7
    model = nn.Sequential(nn.Linear(D, 5), nn.Unflatten(1, (5, 1)), nn.Linear(1, C)).double()
    data = [(x, torch.zeros(len(x), 5, dtype=torch.int64)) for x in inputs().split(6)]
    la = fitted(model=model, data=data)
    plan = la.predict_plan(X, verbose=False)
    assert (plan.n_inputs, plan.n_outputs) == (7, C)


def test_the_printed_table(monkeypatch, capsys):
    la, _ = priced(monkeypatch, fixed=20.0, per_row=0.0)
    la.n_directions = 2
    plan = la.predict_plan(X)
    lines = str(plan).splitlines()
    assert capsys.readouterr().out == f"{plan}\n"
    assert "B=7 inputs" in lines[0]
    assert "20 s" in lines[0]
    assert len(lines) == 5
    assert lines[3].startswith("2 (now)")
    for line, price in zip(lines[2:], plan.prices):
        assert f"{price.retained:.1%}" in line
        assert f"{price.chunks.inputs} x {price.chunks.directions}" in line
        assert f"{price.seconds:.2g} s" in line
    la.predict_plan(X, verbose=False)
    assert capsys.readouterr().out == ""


def test_what_it_refuses(monkeypatch):
    with pytest.raises(AttributeError):
        build().predict_plan(X)
    la = fitted()
    with pytest.raises(ValueError, match="at least one input"):
        la.predict_plan(X[:0])
    with pytest.raises(ValueError, match="verbose"):
        la.predict_plan(X, verbose="yes")
    with pytest.raises(ValueError, match="finite"):
        la.predict_plan(torch.full_like(X, float("nan")))


def test_shared_directions_are_refused():
    now = fitted()._posterior
    shared = SimpleNamespace(variance="ella", fit=SimpleNamespace(basis=SimpleNamespace(sharded=True)))
    prices.check_priced(now)
    with pytest.raises(ValueError, match="spread over several ranks"):
        prices.check_priced(shared)


def test_a_plan_compiles_nothing(monkeypatch):
    la = fitted()

    def refuse(*args, **kwargs):
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", lambda function, **options: refuse)
    la.backend.engine.compiled = True
    assert la.predict_plan(X, verbose=False).prices


@pytest.mark.parametrize(("variance", "passes"), [("none", 1), ("constant", 1), ("last_layer", 2)])
def test_predictions_without_directions_have_no_price_of_them(variance, passes):
    model = Counting()
    la = fitted(model=model, variance=variance)
    with pytest.raises(ValueError, match=f"{('one', 'two')[passes - 1]} forward pass.*la.variance = 'ella'"):
        la.predict_plan(X)
    la(X)
    model.calls = 0
    la(X)
    assert model.calls == passes  # as the message says


def test_the_link_that_is_priced_is_that_of_calls(monkeypatch):
    la, seen, of_call = fitted(link_approx="mc"), [], prices.of_call
    monkeypatch.setattr(prices, "of_call", lambda *a, **k: seen.append(a[4]) or of_call(*a, **k))
    la.predict_plan(X, verbose=False)
    assert set(seen) == {"mc"}
