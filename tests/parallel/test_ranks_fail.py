"""Ranks that disagree, fail, end or stay away: all of them stop with an error that says why, and none waits."""

import os

import pytest
import torch
import torch.distributed as dist
from conftest import C, N
from parts import Counting
from processes import outcome_of
from ranked import (
    F64,
    GRIDS,
    SAMPLE,
    STREAMED,
    Case,
    assert_identical,
    assert_refused,
    assert_stopped,
    batches,
    loader,
    miscalibration,
    report,
    run,
    tune,
)
from torch import Tensor, nn

from laplace_ella.fitting import curvature
from laplace_ella.nystrom import basis, gram
from laplace_ella.nystrom import rows as row_source
from laplace_ella.parallel import ranks

pytest_plugins = ("groups",)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# Name: what the error names, and what the last rank has.
DIFFERENT = {
    "seed": ("seed", Case(options={"seed": 1})),
    "landmarks": ("subsample_size", Case(options={"subsample_size": 7})),
    "rank": ("n_eigenvalues", Case(options={"n_eigenvalues": 3})),
    "share": ("n_eigenvalues", Case(options={"n_eigenvalues": 0.5})),
    "second pass": ("curvature_size", Case(options=STREAMED)),
    "labels": ("curvature", Case(options={"curvature": "mc"})),
    "sharded": ("shard_directions", Case(options={"shard_directions": True})),
    "given landmarks": ("landmarks", Case(fit={"landmarks": True})),
    "validation data": ("val_loader", Case(fit={"val_loader": True})),
    **{
        k: (k, Case(fit={k: v}))
        for k, v in {"balanced": True, "val_steps": 2, "max_samples": 7, "n_total": 101}.items()
    },
    **{name: (name.split()[-1], Case()) for name in ("other landmarks", "basis")},
    **{name: ("model", Case()) for name in ("weight", "buffer", "architecture")},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_between_ranks_is_refused(two, name):
    found = two(fit_with_difference, name)
    assert_refused([outcome for outcome, _ in found], DIFFERENT[name][0])
    assert all(asked <= 1 for _, asked in found)


def fit_with_difference(name):
    """The last rank differs."""
    differs = dist.get_rank() == dist.get_world_size() - 1
    same = Case(model="conv_batchnorm" if name == "buffer" else "mlp")
    case, p = DIFFERENT[name][1] if differs else same, same.problem
    model, arguments, data = p.model, case.arguments(), Counting(batches(p.x, p.y))
    if differs and name == "weight":
        model[2].bias.data[1] += 1e-9
    elif differs and name == "buffer":
        model[1].running_mean[1] += 1e-9
    elif differs and name == "architecture":
        model = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, C)).double()
    if name == "other landmarks":
        arguments = {"landmarks": (p.landmarks[0] + 1e-9 * differs, p.landmarks[1])}
    elif name == "basis":
        alone = case.fitted(data=batches(p.x, p.y), process_group=None, seed=int(differs))
        arguments = {"basis": alone.basis}
    la = case.estimator(model)
    return outcome_of(lambda: la.fit(data, **arguments)), data.asked


def test_fewer_inputs_in_total_than_were_read_are_refused_on_all_ranks(two):
    assert_refused(two(outcome_of, run, Case(fit={"n_total": N - 1})), "n_total")


def test_calls_that_differ_are_told_apart(two):
    for outcome in two(call_differently):
        assert outcome.error == "RankError", outcome.trace
        assert "out of step" in outcome.text
        assert "a question" in outcome.text


def call_differently():
    group = ranks.ranks_of("default")
    if dist.get_rank() == 0:
        return outcome_of(group.total, torch.ones(3))
    return outcome_of(group.exchanged, ["two", "items"], "a question")


class Broken:
    """Raises after a few batches of a pass over the data, or ends its process, or yields fewer at every pass."""

    def __init__(self, batches, after=None, error=None, passes=0):
        self.batches, self.after, self.error, self.passes = list(batches), after, error, passes

    def __iter__(self):
        self.passes -= 1
        for i, batch in enumerate(list(self.batches)):
            if self.passes < 0 and i == self.after:
                if self.error is None:
                    os._exit(3)
                raise self.error
            yield batch
        if self.after is None:
            self.batches.pop()


class Moody(nn.Module):
    """A network that can be told to fail, with a root that has no derivative at zero."""

    def __init__(self):
        super().__init__()
        self.net, self.scale, self.mood = Case().problem.model, nn.Parameter(torch.ones(C, dtype=F64)), ""

    def forward(self, x):
        if self.mood == "raises":
            raise RuntimeError("out of order")
        root = (self.scale * x.square().sum(1, keepdim=True)).sqrt()
        return (self.net(x) + root) * (float("nan") if self.mood == "nan" else 1.0)


def fire():
    return ValueError("disk on fire")


def enough():
    return KeyboardInterrupt("enough")


def with_mood(mood):
    return lambda la, data, arguments: setattr(la.model, "mood", mood) or data


def with_argument(name, make):
    return lambda la, data, arguments: arguments.update({name: make(data)}) or data


def second(change):
    """Change the inputs of the second batch."""
    return lambda la, data, arguments: [data[0], (change(data[1][0]), data[1][1])]


def one_too_many(data):
    return data[1][0], torch.zeros(1 + len(data[1][0]), dtype=torch.int64)


# The error and its text, and what a rank passes in place of its data.
FAILURES = {
    "first batch": ("ValueError", "disk", lambda la, data, args: Broken(data, 0, fire())),
    "later batch": ("ValueError", "disk", lambda la, data, args: Broken(data, 2, fire())),
    "second pass": ("ValueError", "disk", lambda la, data, args: Broken(data, 1, fire(), passes=1)),
    "validation": ("ValueError", "disk", with_argument("val_loader", lambda data: Broken(data, 1, fire()))),
    "interrupt": ("KeyboardInterrupt", "enough", lambda la, data, args: Broken(data, 1, enough())),
    "structure": ("ValueError", "batch", lambda la, data, args: [data[0], "a batch"]),
    "targets": ("ValueError", "", lambda la, data, args: [data[0], (data[1][0], data[1][1] + 100)]),
    "short second pass": ("ValueError", "second pass", lambda la, data, args: Broken(data)),
    "model raises": ("RuntimeError", "out of order", with_mood("raises")),
    "model gives NaN": ("ValueError", "", with_mood("nan")),
    "input is NaN": ("ValueError", "finite", second(lambda x: x * torch.nan)),
    "features are NaN": ("ValueError", "finite", second(lambda x: x * 0)),
    "landmarks": ("ValueError", "landmarks", with_argument("landmarks", one_too_many)),
    "argument": ("ValueError", "val_steps", with_argument("val_steps", lambda data: 0)),
    "type": ("ValueError", "train_loader must be an iterable", lambda la, data, args: None),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_rank_raises_its_error_and_the_others_say_so(two, name):
    found = two(fail_on_last_rank, name)
    for _, before, after, again in found:
        assert_identical(after, before)  # the fit before is as it was
        assert_identical(again, before)  # and the group can go on
    assert_stopped([outcome for outcome, *_ in found], *FAILURES[name][:2])


def fail_on_last_rank(name):
    case = Case(options={"curvature_size": None, "temperature": None})
    la, p = case.estimator(Moody()), case.problem
    data = batches(*case.shard((11, 12)), 3)
    arguments = {"landmarks": p.landmarks, "val_loader": batches(*case.validation(), 3)}
    la.fit(data, **arguments)
    before, usual = report(la, p.x_test), dict(arguments)
    broken = FAILURES[name][2](la, data, arguments) if dist.get_rank() == 1 else data
    outcome = outcome_of(lambda: la.fit(broken, **arguments))
    la.model.mood = ""
    after = report(la, p.x_test)
    other = case.estimator(la.model)
    other.fit(data, **usual)
    return outcome, before, after, report(other, p.x_test)


def test_an_exception_that_a_loader_raises_again_is_reported_again(two):
    for outcomes in zip(*two(fail_twice)):
        assert_stopped(list(outcomes), "ValueError", "disk on fire")


def fail_twice():
    case, error = Case(options=SAMPLE), fire()
    la, data = case.estimator(), batches(*case.shard((11, 12)), 3)
    data = Broken(data, 1, error) if dist.get_rank() == 1 else data
    return [outcome_of(la.fit, data) for _ in range(2)]


@pytest.mark.parametrize("name", ["grid", "nn grid", "joint", "novelty", "forget", "added", "loss"])
def test_a_rank_that_fails_in_later_steps(two, name):
    found = two(fail_later, name)
    assert_stopped([outcome for outcome, *_ in found], "OSError", "disk", failed=0 if name == "loss" else 1)
    for _, before, after in found:
        assert_identical(before, after)


def fail_later(name):
    case = Case(options={"temperature": 50.0 if name in ("nn grid", "loss") else None})
    la, x = case.fitted(), case.problem.x_test
    before = report(la, x)
    val = batches(*case.validation(), 3)
    if dist.get_rank() == 1 and name != "loss":
        val = Broken(val, 1, OSError("disk on fire"))

    def loss(p, y):  # the first rank evaluates it for all
        if dist.get_rank() == 0:
            raise OSError("disk on fire")
        return miscalibration(p, y)

    steps = {
        "grid": lambda: tune(la, case, {}, val),
        "nn grid": lambda: tune(la, case, GRIDS["nn"][2], val),
        "joint": lambda: la.optimize_hyperparameters(val, link_approx="probit"),
        "novelty": lambda: la.calibrate_novelty(val),
        "forget": lambda: la.forget(val),
        "added": lambda: la.fit(val, override=False),
        "loss": lambda: tune(la, case, {"loss": loss}, val),
    }
    return outcome_of(steps[name]), before, report(la, x)


class Full(OSError):
    pass


def failing(*args, **kwargs):
    raise Full("no space left")


def interrupting(*args, **kwargs):
    raise KeyboardInterrupt("no space left")


SHARED = {"shard_directions": True}
PLACES = {
    "spilled rows": ({"memory_budget": 2000, "spill": "cpu"}, gram.Spill, "empty", failing),
    "eigenvectors": ({}, torch.linalg, "eigh", failing),
    "directions": ({}, basis, "_like", failing),
    "directions, spread": (SHARED, basis, "_like", failing),
    "Gram matrix": ({}, row_source, "combinations_with_replacement", failing),
    "Gram matrix, interrupted": ({}, row_source, "combinations_with_replacement", interrupting),
    "sampled labels": ({**SHARED, "curvature": "mc"}, curvature.Curvature, "_sampled", failing),
    "curvature": (SHARED, curvature, "curvature", failing),
}


@pytest.mark.parametrize("name", PLACES)
def test_an_error_anywhere_in_a_fit_stops_all_ranks(two, name):
    kind = "KeyboardInterrupt" if "interrupted" in name else "Full"
    assert_stopped(two(fail_in, name), kind, "no space left")


def fail_in(name):
    options, place, attribute, replacement = PLACES[name]
    case = Case(options={**SAMPLE, **options})
    la = case.estimator()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(place, attribute, replacement)
        return outcome_of(la.fit, loader(case.problem.x, case.problem.y))


@pytest.mark.parametrize("what", ["columns", "sum", "large sum", "broadcast"])
def test_no_room_for_an_exchange_stops_all_ranks(two, what):
    assert_stopped(two(run_out_of_room, what), "MemoryError", "no room")


def run_out_of_room(what):
    case = Case(options=SAMPLE)
    la = case.estimator()
    with pytest.MonkeyPatch.context() as patch:
        if what == "large sum":
            patch.setattr(ranks, "GATHERED_SUM", 0)
        if dist.get_rank() == 1:
            refuse_room(patch, what)
        return outcome_of(la.fit, loader(case.problem.x, case.problem.y))


def refuse_room(patch, what):
    def refuse(*args, **kwargs):
        raise MemoryError("no room")

    new_zeros, packed, exchange = Tensor.new_zeros, ranks._packed, ranks.Ranks._replaced

    def replaced(self, values, name, collective):
        with pytest.MonkeyPatch.context() as inner:
            if name == {"large sum": "a sum", "broadcast": "a broadcast"}.get(what):
                inner.setattr(Tensor, "clone", refuse)
            return exchange(self, values, name, collective)

    if what == "columns":
        patch.setattr(
            Tensor, "new_zeros", lambda t, *n, **o: refuse() if len(n) == 3 else new_zeros(t, *n, **o)
        )
    elif what == "sum":
        of_tensor = ("a sum", Tensor)
        refused = lambda item: (item[0], type(item[1])) == of_tensor  # noqa: E731
        patch.setattr(ranks, "_packed", lambda item: refuse() if refused(item) else packed(item))
    else:
        patch.setattr(ranks.Ranks, "_replaced", replaced)


def test_an_error_that_is_known_is_not_told_twice(two):
    """In a search with spread directions, pieces of common work are nested."""
    assert_stopped(two(fail_in_nested_work), "Full", "no space left")


def fail_in_nested_work():
    case = Case(options={"temperature": None})
    la = case.fitted(shard_directions=True)
    if dist.get_rank() == 1:
        la.backend.engine.features = failing
    return outcome_of(lambda: tune(la, case, {}))


@pytest.mark.parametrize("residual", ["none", "isotropic"])
def test_features_that_are_not_finite_stop_the_first_prediction_of_all(two, residual):
    assert_stopped(two(predict_nan, residual), "ValueError", "finite")


def predict_nan(residual):
    case = Case(options={"residual": residual})
    la = case.estimator(Moody(), shard_directions=True)
    la.fit(loader(case.problem.x + 0.1, case.problem.y))
    return outcome_of(la, torch.zeros(3, 2, dtype=F64) if dist.get_rank() else case.problem.x_test[:3])


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_ends_or_stays_away_does_not_leave_the_others_waiting(fresh, size):
    outcomes = fresh(size).outcomes(end_on_rank_1 if size == 3 else stay_away_on_rank_1)
    assert outcomes[1].exit_code == (3 if size == 3 else None)
    for outcome in (outcomes[0], *outcomes[2:]):
        assert outcome.error == "RankError", outcome.trace
        assert "timeout" in outcome.text


def end_on_rank_1():
    case = Case(options=STREAMED)
    data = batches(case.problem.x, case.problem.y)
    case.fitted(data=Broken(data, 1, passes=1) if dist.get_rank() == 1 else data)


def stay_away_on_rank_1():
    if dist.get_rank() == 0:
        Case().fitted()
