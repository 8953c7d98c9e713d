"""What another thread does in the middle of a call: a prediction gives the old answer or the new one, never a mixture.

``interleaved`` stops a call wherever it enters or leaves a function of the package without holding a lock, lets
another thread do something from beginning to end, and goes on. Every such place is tried, or a spread of them.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import calls
import pytest
import torch
from calls import error
from helpers import as_tuple, build, fitted, inputs, loader, mlp, targets, train_loader, val_loader

import laplace_ella
from laplace_ella.network.safety import LOCK
from laplace_ella.posterior.attributes import SWAP

pytestmark = pytest.mark.filterwarnings(
    "ignore:The best (prior_precision|temperature)",
    "ignore:No setting",
    "ignore:Only 17 validation inputs",
    "ignore:The checkpoint has",
)

X = inputs(7, seed=7)
PACKAGE = str(Path(laplace_ella.__file__).parent)


def in_thread(action):
    """Run an action in another thread, and return what it returns."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result(60)


class Interleaved:
    """Run ``call``, and at the place numbered ``at`` let another thread do ``other``."""

    def __init__(self, call, other=None, at=-1):
        self.other, self.at, self.places, self.found = other, at, 0, None
        sys.setprofile(self._see)
        try:
            self.result = call()
        finally:
            sys.setprofile(None)

    def _see(self, frame, event, argument):
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if LOCK._is_owned() or SWAP._is_owned():
            return
        if self.places == self.at:
            sys.setprofile(None)
            self.found = in_thread(self.other)
            sys.setprofile(self._see)
        self.places += 1


def places(call, most):
    n = Interleaved(call).places
    assert n > 0
    return range(0, n, -(-n // most))


def same(left, right):
    pairs = list(zip(as_tuple(left), as_tuple(right), strict=True))
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def assert_one_of(found, allowed, where):
    assert any(same(found, a) for a in allowed), f"a mixture at place {where}"


def states(likelihood="classification", residual="none", second_rank=5):
    """Two states of one model that differ in all that predictions read."""
    regression = likelihood == "regression"
    options = {"residual": residual, "model": mlp()}
    first = fitted(likelihood, **options, sigma_noise=0.4 if regression else 1.0)
    others = {"prior_precision": 0.3, "temperature": 7.0, "residual_scale": 3.0, "residual_samples": 3}
    others |= {"sigma_noise": 0.9} if regression else {"logit_scale": 1.4}
    second = fitted(likelihood, **options, seed=5, n_eigenvalues=second_rank, **others)
    return first, [first.state_dict(), second.state_dict()]


PREDICTIONS = {**calls.PREDICTIONS, "error": lambda la, x: error(la, x)}
TWO_CALLS = ("functional variance",)
CASES = [
    *[("classification", "isotropic", name) for name in PREDICTIONS if name not in ("joint", *TWO_CALLS)],
    *[("classification", "exact", name) for name in ("probit", "functional samples", "nn", "sample")],
    *[("regression", "exact", name) for name in ("probit", "joint", "nn", "evidence")],
]


@pytest.mark.parametrize(("likelihood", "residual", "name"), CASES)
def test_a_prediction_is_of_one_state_while_another_thread_loads(likelihood, residual, name):
    second_rank = 3 if name in ("probit", "nn", "sample") else 5
    predict = lambda la: PREDICTIONS[name](la, X)  # noqa: E731
    la, (first, second) = states(likelihood, residual, second_rank)
    allowed = []
    for state in (second, first):
        la.load_state_dict(state)
        allowed.append(predict(la))
    assert not same(*allowed)
    for at in places(lambda: predict(la), 12):
        found = Interleaved(lambda: predict(la), lambda: la.load_state_dict(second), at).result
        assert_one_of(found, allowed, at)
        assert same(predict(la), allowed[0])  # nothing of the old state was kept
        la.load_state_dict(first)


def test_a_saved_state_is_of_one_moment():
    la, (first, second) = states("regression", "isotropic", 3)
    known = {state["seed"]: state for state in (first, second)}
    other = build("regression", model=la.model)
    for at in places(la.state_dict, 30):
        la.load_state_dict(first)
        found = Interleaved(la.state_dict, lambda: la.load_state_dict(second), at).result
        expected = known[found["seed"]]
        assert found["temperature"] == expected["temperature"]
        for name in ("H", "prior_precision", "sigma_noise"):
            assert torch.equal(found[name], expected[name])
        other.load_state_dict(found)


ASSIGNED = {"prior_precision": 9.0, "temperature": 5.0, "logit_scale": 2.0, "sigma_noise": 2.0, "seed": 8}
ASSIGNED |= {"residual_scale": 4.0, "residual": "none", "residual_samples": 2, "n_directions": 2}


@pytest.mark.parametrize("name", ASSIGNED)
def test_a_prediction_is_of_one_state_while_another_thread_assigns(name):
    likelihood = "regression" if name == "sigma_noise" else "classification"
    la, _ = states(likelihood, "isotropic")
    link = {} if likelihood == "regression" else {"link_approx": "mc", "n_samples": 8}
    before = getattr(la, name)

    def predict():
        return la(X, **link)

    def assign():
        setattr(la, name, ASSIGNED[name])

    old = predict()
    assign()
    allowed = [predict(), old]
    assert not same(*allowed)
    setattr(la, name, before)
    for at in places(predict, 25):
        assert_one_of(Interleaved(predict, assign, at).result, allowed, at)
        assert same(predict(), allowed[0])
        setattr(la, name, before)


def halves():
    x, y = inputs(), targets("classification")
    return loader(x[:12], y[:12]), loader(x[12:], y[12:])


def merged(la):
    other = build(model=la.model)
    other.fit(halves()[1], basis=la.basis)
    return lambda: la.merge(other)


GRID = {"method": "gridsearch", "val_loader": val_loader()}
FEW_SAMPLES = {"grid_size": 2, "n_samples": 2, "link_approx": "mc"}
JOINT = {"temperature": [10.0, 100.0], "n_eigenvalues": [2], "residual_scale": [0.5, 2.0]}
# What changes several attributes of an estimator, given the estimator
CHANGES = {
    "fit": lambda la: lambda: la.fit(halves()[1]),
    "fit with fewer directions": lambda la: lambda: (setattr(la, "n_eigenvalues", 2), la.fit(halves()[1])),
    "add": lambda la: lambda: la.fit(halves()[1], override=False),
    "stop early": lambda la: lambda: la.fit(train_loader(), val_loader=val_loader()),
    "merge": merged,
    "forget": lambda la: lambda: la.forget(loader(inputs()[:3], targets("classification")[:3])),
    "grid": lambda la: lambda: la.optimize_prior_precision(**GRID, grid_size=3),
    "grid nn": lambda la: lambda: la.optimize_prior_precision("nn", **GRID, **FEW_SAMPLES),
    "evidence": lambda la: lambda: la.optimize_prior_precision(n_steps=3),
    "jointly": lambda la: lambda: la.optimize_hyperparameters(val_loader(), JOINT),
    "calibrate": lambda la: lambda: la.calibrate_novelty(val_loader()),
}


def start(name):
    free = name in ("grid", "jointly", "stop early")
    la = build(model=mlp(), residual="isotropic", temperature=None if free else 1.0)
    la.fit(halves()[0])
    return la, CHANGES[name](la)


@pytest.mark.filterwarnings("ignore:n_eigenvalues was reduced", "ignore:The evidence tunes the prior only")
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_several_things_appears_at_once(name):
    la, change = start(name)
    kinds = [lambda: la(X), lambda: la.residual_share(X), lambda: la.novelty(X)]
    old = [kind() for kind in kinds]
    change()
    new = [kind() for kind in kinds]
    assert not all(map(same, old, new))
    steps = places(start(name)[1], 4 if name in ("grid nn", "jointly") else 9)
    for i, at in enumerate(steps):
        la, change = start(name)
        kind = i % len(kinds)
        kinds = [lambda la=la: la(X), lambda la=la: la.residual_share(X), lambda la=la: la.novelty(X)]
        seen = Interleaved(change, kinds[kind], at).found
        assert_one_of(seen, (old[kind], new[kind]), at)
        assert same(kinds[kind](), new[kind])


@pytest.mark.parametrize("name", ["add", "merge", "forget", "calibrate"])
def test_what_was_derived_from_a_fit_is_not_mixed_with_another(name):
    la, change = start(name)
    change()
    derived = la.state_dict()
    la, change = start(name)
    state = la.state_dict()
    la.fit(halves()[1])
    second = la.state_dict()
    refused = 0
    for at in places(start(name)[1], 10):
        la, change = start(name)

        def run(change=change):
            try:
                change()
            except (RuntimeError, ValueError) as error:
                return str(error)
            return ""

        said = Interleaved(run, lambda la=la: la.load_state_dict(second), at).result
        refused += "Another thread has fitted" in said
        found = la.state_dict()
        if said:
            assert torch.equal(found["H"], second["H"])
            assert found["n_data"] == second["n_data"]
            assert found["novelty_reference"] is None
        else:  # one after the other, in either order
            more = derived["n_data"] - state["n_data"]
            assert found["n_data"] - second["n_data"] in (0, more)
    assert refused


@pytest.mark.parametrize("name", ["add", "merge"])
def test_data_that_two_threads_add_at_once_both_count(name):
    x, y = inputs(11, seed=20), targets("classification", 11, seed=21)
    la, change = start(name)
    change()
    la.fit(loader(x, y), override=False)
    for at in places(start(name)[1], 10):
        other, change = start(name)
        Interleaved(change, lambda other=other: other.fit(loader(x, y), override=False), at)
        assert other.n_data == other.n_curvature == la.n_data
        for found, expected in ((other.H, la.H), (other.loss, la.loss)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_backend_has_the_basis_of_the_estimator():
    la, (_, second) = states("classification", "none", 3)
    for change in (lambda: None, lambda: la.load_state_dict(second)):
        change()
        assert la.backend.basis is la.basis
        assert same(la.backend.jacobians(X), la.features(X))


TUNE = {
    "grid": lambda la, val: la.optimize_prior_precision(method="gridsearch", val_loader=val, grid_size=3),
    "jointly": lambda la, val: la.optimize_hyperparameters(val, {"temperature": [10.0, 100.0]}),
}


@pytest.mark.parametrize("name", TUNE)
def test_a_setting_is_taken_over_though_another_fit_came_meanwhile(name):
    la = build(temperature=None)
    la.fit(halves()[0])

    class Fitting:
        def __iter__(self):
            la.fit(halves()[1])
            return iter(val_loader())

    TUNE[name](la, Fitting())
    assert torch.equal(la.H, fitted(model=la.model, data=halves()[1]).H)
    assert la.temperature != 1
