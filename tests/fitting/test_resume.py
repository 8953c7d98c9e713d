"""Checkpoints of a running fit: what is interrupted and started again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import warnings
from collections import UserDict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    DictModel,
    K,
    M,
    Snapshot,
    build,
    dict_batches,
    inputs,
    mlp,
    targets,
)
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import laplace_ella
from laplace_ella.fitting import checkpoint, resume
from laplace_ella.fitting.resume import random_state, set_random_state
from laplace_ella.nystrom.gram import SampleBlocks, Unfinished, WeightBlocks
from laplace_ella.parallel.ranks import ALONE

SIZE, N_BATCHES = 5, 5  # of 23 inputs: 5, 5, 5, 5, 3
N_DATA = 23
X = inputs(11, seed=7)

pytestmark = pytest.mark.filterwarnings("ignore:curvature='mc' estimates G")


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """Ends a fit at a moment of the test's choice; nothing may catch it."""


def batches(likelihood="classification", seed=1, n=N_DATA, size=SIZE):
    x, y = inputs(n, seed=seed), targets(likelihood, n, seed=seed + 1)
    return list(zip(x.split(size), y.split(size)))


class Ending:
    """A loader that raises instead of yielding one of its batches, counted over all passes."""

    def __init__(self, data, at=None, error=OSError):
        self.data, self.at, self.error, self.yielded, self.passes = data, at, error, 0, 0

    def __iter__(self):
        self.passes += 1
        for batch in self.data:
            if self.yielded == self.at:
                raise self.error("interrupted")
            self.yielded += 1
            yield batch


class Watched(nn.Module):
    """Raises at one of its calls, and tells plain passes from those that derivatives need."""

    def __init__(self, net=None, at=None, error=Killed):
        super().__init__()
        self.net = mlp() if net is None else net
        self.at, self.error, self.calls, self.plain, self.derived = at, error, 0, [], []
        self.seen: dict[tuple[int, float], int] = {}  # plain passes, by the call that was the first of them

    def forward(self, x):
        if self.calls == self.at:
            raise self.error("interrupted")
        self.calls += 1
        weight = next(self.net.parameters())
        tangent = torch.autograd.forward_ad.unpack_dual(weight).tangent
        derived = torch._C._functorch.is_functorch_wrapped_tensor(weight) or tangent is not None
        if not derived and not torch.is_grad_enabled():
            first = x if isinstance(x, torch.Tensor) else x["input_ids"]
            self.plain.append((len(first), float(first.flatten()[0])))
            self.seen.setdefault(self.plain[-1], self.calls)
        elif isinstance(x, torch.Tensor):
            self.derived.append(len(x))
        return self.net(x)


def outcome(la):
    """All that a fit finds, for comparison bit for bit."""
    return {
        "H": la.H,
        "loss": la.loss,
        "eigenvalues": la.basis.eigenvalues,
        "spectrum": la.basis.spectrum,
        "mean": la.mean,
        "prior_precision": la.prior_precision,
        **{f"directions of {k}": v for k, v in la.basis.directions.items()},
        **{f"snapshot {i}": G for i, (_, G) in enumerate(la.snapshots)},
    }, (
        [n for n, _ in la.snapshots],
        la.n_data,
        la.n_curvature,
        la.n_predictions,
        la.n_outputs,
        la.temperature,
        la.fit_history_,
        la.basis.trace,
    )


def assert_equal_fits(la, expected, note=""):
    tensors, plain = outcome(la)
    expected_tensors, expected_plain = outcome(expected)
    assert plain == expected_plain, note
    assert tensors.keys() == expected_tensors.keys(), note
    for name, t in tensors.items():
        assert torch.equal(t, expected_tensors[name]), f"{name} {note}"


def interrupt(la, data, path, error, **options):
    with pytest.raises(error, match="interrupted"):
        la.fit(data, checkpoint=path, **{"checkpoint_every": 1, **options})


# ---------------------------------------------------------------------------- what is fitted


# Gradient rows beyond it are computed again, in blocks of some of them, or of some of the weights.
ROWS_BUDGET, WEIGHTS_BUDGET = 3000, 4000
CASES = {
    # likelihood, options of the estimator, options of the fit
    "sample": ("classification", {}, {}),
    "streamed": ("classification", {"curvature_size": None}, {}),
    "small sample": ("classification", {"curvature_size": 11}, {"val_steps": 1}),
    "sampled labels": ("classification", {"curvature": "mc", "curvature_samples": 2}, {}),
    "sampled labels, streamed": (
        "regression",
        {"curvature": "mc", "curvature_size": None, "sigma_noise": 0.6},
        {"val_steps": 2},
    ),
    "regression": ("regression", {"sigma_noise": 0.6, "n_eigenvalues": 0.9}, {}),
    "balanced": ("classification", {}, {"balanced": True}),
    "early stopping": ("classification", {"temperature": None}, {"val": True}),
    "early stopping, streamed": (
        "classification",
        {"temperature": None, "curvature_size": None},
        {"val": True, "val_steps": 2},
    ),
    "landmarks": ("classification", {}, {"landmarks": True}),
    "more pairs than inputs": ("classification", {"subsample_size": 31}, {}),
    "blocks of rows": ("classification", {"memory_budget": ROWS_BUDGET}, {}),
    "blocks of weights": ("classification", {"memory_budget": WEIGHTS_BUDGET}, {}),
}


def case(name):
    """Return what builds an estimator (of a model), and the options of its fit."""
    likelihood, options, fit_options = CASES[name]
    fit_options = dict(fit_options)
    if fit_options.pop("val", False):
        fit_options["val_loader"] = batches(likelihood, seed=30, n=17)
    if fit_options.pop("landmarks", False):
        fit_options["landmarks"] = inputs(M, seed=40), torch.arange(M) % 3
    return lambda model: build(likelihood, model, **options), batches(likelihood), fit_options


@cache
def fitted_without_checkpoint(name):
    """Return the uninterrupted fit, which nothing may change, and how often it called the model."""
    make, data, options = case(name)
    model = Watched()
    la = make(model)
    la.fit(data, **options)
    return la, model.calls


def reads(name):
    """Return how many batches a fit reads."""
    return N_BATCHES * (1 + (CASES[name][1].get("curvature_size", 0) is None))


@pytest.mark.parametrize(("name", "at"), [(name, at) for name in CASES for at in range(reads(name))])
def test_a_loader_that_fails_at_a_batch(name, at, tmp_path):
    make, data, options = case(name)
    expected, _ = fitted_without_checkpoint(name)
    interrupt(make(Watched()), Ending(data, at), tmp_path / "fit", OSError, **options)
    assert bool(list(tmp_path.iterdir())) == (at > 0)
    la = make(Watched())
    la.fit(Ending(data), checkpoint=tmp_path / "fit", checkpoint_every=1, **options)
    assert_equal_fits(la, expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_fails_at_any_of_its_calls(name, tmp_path):
    make, data, options = case(name)
    expected, calls = fitted_without_checkpoint(name)
    assert calls > 2 * N_BATCHES
    step = 1 if name in ("sample", "streamed", "sampled labels") else 4
    for at in range(step // 2, calls, step):
        interrupt(make(Watched(at=at)), data, tmp_path / "fit", Killed, **options)
        la = make(Watched())
        la.fit(data, checkpoint=tmp_path / "fit", checkpoint_every=1, **options)
        assert_equal_fits(la, expected, f"interrupted at call {at} of {calls}")
        assert not list(tmp_path.iterdir()), at


@pytest.mark.parametrize("every", [1, 2, 3, 100])
@pytest.mark.parametrize("size", [None, 2000])
def test_a_fit_that_is_interrupted_again_and_again(every, size, tmp_path):
    """Each time a few calls later; whatever is lost in between, the end is the same."""
    expected = build(model=Watched(), curvature_size=size)
    expected.fit(batches())
    at, interruptions = 1, 0
    while True:
        la = build(model=Watched(at=at), curvature_size=size)
        try:
            la.fit(batches(), checkpoint=tmp_path / "fit", checkpoint_every=every)
        except Killed:
            interruptions += 1
            at += 1
        else:
            break
    assert interruptions >= 8
    assert_equal_fits(la, expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_fit_with_checkpoints_is_the_one_without(as_path, tmp_path):
    for name in CASES:
        make, data, options = case(name)
        expected, calls = fitted_without_checkpoint(name)
        model = Watched()
        la = make(model)
        la.fit(data, checkpoint=as_path(tmp_path / "fit"), checkpoint_every=2, **options)
        assert_equal_fits(la, expected, name)
        assert model.calls == calls, name
        assert not list(tmp_path.iterdir())


def test_files_are_where_they_are_said_to_be(tmp_path):
    seen = set()

    class Looking(Watched):
        def forward(self, x):
            seen.update(os.listdir(tmp_path))
            return super().forward(x)

    build(model=Looking()).fit(batches(), checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert seen == {"fit", "fit.basis", "fit.curvature"}
    assert not os.listdir(tmp_path)


def test_files_hold_tensors_and_plain_types(tmp_path):
    calls = fitted_without_checkpoint("sample")[1]
    interrupt(build(model=Watched(at=calls - 1)), batches(), tmp_path / "fit", Killed)
    assert {p.name for p in tmp_path.iterdir()} == {"fit", "fit.basis", "fit.curvature"}
    for file in tmp_path.iterdir():
        assert isinstance(torch.load(file, weights_only=True), dict)


def test_other_files_in_the_folder_stay(tmp_path):
    for name in ("fit.pt", "fi", "fit.1-of-2", "other.basis"):
        (tmp_path / name).write_text("mine")
    interrupt(build(model=Watched()), Ending(batches(), 3), tmp_path / "fit", OSError)
    build(model=Watched()).fit(batches(), checkpoint=tmp_path / "fit")
    assert {p.name for p in tmp_path.iterdir()} == {"fit.pt", "fi", "fit.1-of-2", "other.basis"}
    assert all(p.read_text() == "mine" for p in tmp_path.iterdir())


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupt(build(model=Watched()), Ending(batches(), 3), "fit", OSError)
    assert os.listdir() == ["fit"]
    build(model=Watched()).fit(batches(), checkpoint="fit")
    assert os.listdir() == []


# ---------------------------------------------------------------------------- inputs of other kinds


class Encoding(UserDict):
    """A mapping with attributes and a method of its own, as tokenisers return."""

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device):
        return Encoding({k: v.to(device) for k, v in self.data.items()})


class OfEncodings(DictModel):
    """Insists on the type of mapping that its loader yields."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, batch):
        assert type(batch) is self.kind, type(batch)
        return super().forward(batch)


MAPPINGS = {
    "dict": dict,
    "UserDict": UserDict,
    "encoding": Encoding,
}


def of_transformers():
    transformers = pytest.importorskip("transformers")
    return transformers.BatchEncoding


@pytest.mark.parametrize("size", [None, 11])
@pytest.mark.parametrize("name", [*MAPPINGS, "transformers"])
def test_mapping_batches(name, size, tmp_path):
    kind = of_transformers() if name == "transformers" else MAPPINGS[name]
    data = [kind(batch) for batch in dict_batches(batch_size=SIZE)]

    def make(at=None):
        return build(model=Watched(OfEncodings(kind), at), curvature_size=size)

    expected = make()
    expected.fit(data)
    calls = expected.model.calls
    for at in [*range(2, calls - 1, 5), calls - 1]:
        interrupt(make(at), data, tmp_path / "fit", Killed)
        la = make()
        la.fit(data, checkpoint=tmp_path / "fit", checkpoint_every=1)
        assert_equal_fits(la, expected, f"interrupted at call {at} of {calls}")
        assert not list(tmp_path.iterdir())


def test_batches_of_other_lengths_and_sequences_of_other_shapes(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 4), (5, 2), (3, 4), (6, 1)]
    data = [
        (torch.randn(*s, 5, generator=generator).double(), torch.randint(3, s, generator=generator))
        for s in shapes
    ]

    def make(at=None):
        return build(model=Watched(net, at))

    expected = make()
    expected.fit(data)
    for at in range(1, expected.model.calls, 3):
        interrupt(make(at), data, tmp_path / "fit", Killed)
        la = make()
        la.fit(data, checkpoint=tmp_path / "fit", checkpoint_every=1)
        assert_equal_fits(la, expected, str(at))
    assert la.n_predictions == sum(a * b for a, b in shapes)


# ---------------------------------------------------------------------------- random numbers


def shuffled(generator=None, **options):
    x, y = inputs(N_DATA), targets("classification")
    return DataLoader(TensorDataset(x, y), batch_size=SIZE, shuffle=True, generator=generator, **options)


class Breaking(TensorDataset):
    """A data set that fails when it has given so many inputs."""

    def __init__(self, left=None):
        super().__init__(inputs(N_DATA), targets("classification"))
        self.left = left

    def __getitem__(self, index):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed("interrupted")
        return super().__getitem__(index)


@pytest.mark.parametrize("own", [False, True], ids=["global", "own"])
@pytest.mark.parametrize("size", [None, 11])
def test_a_loader_that_shuffles_replays(own, size, tmp_path):
    def make_loader(left, seed):
        torch.manual_seed(seed + 100 * own)
        generator = torch.Generator().manual_seed(seed) if own else None
        return DataLoader(Breaking(left), batch_size=SIZE, shuffle=True, generator=generator)

    expected = build(curvature_size=size)
    expected.fit(make_loader(None, 5))
    other = build(curvature_size=size)
    other.fit(make_loader(None, 6))
    assert not torch.equal(other.H, expected.H)  # the order matters
    for left in range(0, N_DATA * (1 + (size is None)), 3):
        interrupt(build(curvature_size=size), make_loader(left, 5), tmp_path / "fit", Killed)
        seed = 6 if left >= SIZE else 5  # before the first checkpoint nothing is remembered
        la = build(curvature_size=size)
        la.fit(make_loader(None, seed), checkpoint=tmp_path / "fit", checkpoint_every=1)
        assert_equal_fits(la, expected, f"interrupted at input {left}")


@pytest.mark.parametrize("own", [False, True], ids=["global", "own"])
@pytest.mark.parametrize("size", [None, 11])
def test_a_loader_that_shuffles_replays_whatever_was_interrupted(own, size, tmp_path):
    def make_loader(seed):
        torch.manual_seed(seed + 100 * own)
        return shuffled(torch.Generator().manual_seed(seed) if own else None)

    expected = build(model=Watched(), curvature_size=size)
    expected.fit(make_loader(5))
    calls = expected.model.calls
    _, second, *_ = [call for (size, _), call in expected.model.seen.items() if size == SIZE]
    for at in [*range(second, calls - 1, 3), calls - 1]:
        interrupt(build(model=Watched(at=at), curvature_size=size), make_loader(5), tmp_path / "fit", Killed)
        assert (tmp_path / "fit").exists()
        la = build(model=Watched(), curvature_size=size)
        la.fit(make_loader(6), checkpoint=tmp_path / "fit", checkpoint_every=1)
        assert_equal_fits(la, expected, f"interrupted at call {at} of {calls}")


@pytest.mark.parametrize("size", [None, 11])
def test_a_sampler_in_a_batch_sampler_replays(size, tmp_path):
    def make_loader(seed, left=None):
        data = Breaking(left)
        order = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
        return DataLoader(data, batch_sampler=BatchSampler(order, SIZE, drop_last=False))

    expected = build(curvature_size=size)
    expected.fit(make_loader(5))
    for left in range(SIZE, N_DATA * (1 + (size is None)), 4):
        interrupt(build(curvature_size=size), make_loader(5, left), tmp_path / "fit", Killed)
        la = build(curvature_size=size)
        la.fit(make_loader(6), checkpoint=tmp_path / "fit", checkpoint_every=1)
        assert_equal_fits(la, expected, f"interrupted at input {left}")


def test_another_generator_of_numpys(tmp_path):
    get, set_ = np.random.get_bit_generator, np.random.set_bit_generator
    before = get()
    try:
        for make in (np.random.PCG64, np.random.Philox, np.random.SFC64, np.random.MT19937):
            set_(make(3))
            state = random_state([])
            drawn = np.random.random(5)  # noqa: NPY002
            torch.save(state, tmp_path / "state")
            set_random_state(torch.load(tmp_path / "state", weights_only=True), [])
            assert (np.random.random(5) == drawn).all()  # noqa: NPY002
    finally:
        set_(before)


def test_a_refusal_leaves_the_generators_as_they_were(tmp_path):
    interrupt(build(), Ending(batches(), 3), tmp_path / "fit", OSError)
    la, data = build(), batches(seed=77)
    torch.manual_seed(4)
    random.seed(4)
    np.random.seed(4)  # noqa: NPY002
    expected = torch.rand(3), random.random(), np.random.random()  # noqa: NPY002
    torch.manual_seed(4)
    random.seed(4)
    np.random.seed(4)  # noqa: NPY002
    with pytest.raises(ValueError, match="order"):
        la.fit(data, checkpoint=tmp_path / "fit")
    found = torch.rand(3), random.random(), np.random.random()  # noqa: NPY002
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]


@pytest.mark.parametrize("size", [None, 11])
def test_a_loader_that_shuffles_by_other_generators_replays(size, tmp_path):
    class Shuffling:
        def __init__(self, at=None):
            self.at = at

        def __iter__(self):
            order = np.random.permutation(N_BATCHES).tolist()  # noqa: NPY002
            random.shuffle(order)
            data = batches()
            for i in order:
                if self.at == 0:
                    raise Killed("interrupted")
                self.at = None if self.at is None else self.at - 1
                yield data[i]

    def seeded(seed):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002

    seeded(1)
    expected = build(curvature_size=size)
    expected.fit(Shuffling())
    for at in range(1, N_BATCHES * (1 + (size is None))):
        seeded(1)
        interrupt(build(curvature_size=size), Shuffling(at), tmp_path / "fit", Killed)
        seeded(2)
        la = build(curvature_size=size)
        la.fit(Shuffling(), checkpoint=tmp_path / "fit", checkpoint_every=1)
        assert_equal_fits(la, expected, f"interrupted at batch {at}")


def test_a_loader_with_workers_replays(tmp_path):
    def make_loader():
        return shuffled(num_workers=2)

    torch.manual_seed(5)
    expected = build(model=Watched())
    expected.fit(make_loader())
    for at in (8, expected.model.calls - 1):
        torch.manual_seed(5)
        interrupt(build(model=Watched(at=at)), make_loader(), tmp_path / "fit", Killed)
        torch.manual_seed(6)
        la = build(model=Watched())
        la.fit(make_loader(), checkpoint=tmp_path / "fit", checkpoint_every=1)
        assert_equal_fits(la, expected)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_fit_leaves_the_global_generators_as_the_loader_does(checkpoint, tmp_path):
    states = []
    for again in (False, True):
        torch.manual_seed(5)
        options = {"checkpoint": tmp_path / "fit", "checkpoint_every": 1} if checkpoint and again else {}
        build().fit(shuffled(), **options)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# ---------------------------------------------------------------------------- data that are added


@pytest.mark.parametrize("name", ["sample", "streamed", "sampled labels"])
def test_added_data(name, tmp_path):
    make, data, options = case(name)
    more = batches(seed=50)

    def before():
        la = make(Watched())
        la.fit(data, **options)
        return la

    expected = before()
    first = expected.model.calls
    expected.fit(more, override=False)
    calls = expected.model.calls - first
    assert calls > N_BATCHES
    for at in range(calls):
        la = before()
        untouched = Snapshot(la, X)
        la.model.at = la.model.calls + at
        interrupt(la, more, tmp_path / "fit", Killed, override=False)
        la.model.at = None
        untouched.check()
        la = before()
        la.fit(more, override=False, checkpoint=tmp_path / "fit", checkpoint_every=1)
        assert_equal_fits(la, expected, f"interrupted at call {at}")
        assert not list(tmp_path.iterdir())


def test_added_data_are_not_added_twice_by_the_same_estimator(tmp_path):
    """As in a notebook: the cell that failed is run again."""
    la = build(model=Watched())
    la.fit(batches())
    expected = build(model=Watched())
    expected.fit(batches())
    expected.fit(batches(seed=50), override=False)
    la.model.at = la.model.calls + 7
    interrupt(la, batches(seed=50), tmp_path / "fit", Killed, override=False)
    la.model.at = None
    la.fit(batches(seed=50), override=False, checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert_equal_fits(la, expected)


def test_a_checkpoint_of_added_data_does_not_go_with_another_fit_before(tmp_path):
    def fitted_to(seed):
        la = build(model=Watched())
        la.fit(batches(seed=seed))
        return la

    la = fitted_to(1)
    la.model.at = la.model.calls + 7
    interrupt(la, batches(seed=50), tmp_path / "fit", Killed, override=False)
    files = contents(tmp_path)
    for other in (fitted_to(60), build(model=Watched())):
        with pytest.raises(ValueError, match="checkpoint"):
            other.fit(batches(seed=50), override=False, checkpoint=tmp_path / "fit", checkpoint_every=1)
        assert contents(tmp_path) == files


# ---------------------------------------------------------------------------- nothing is done twice


def test_batches_that_were_scanned_are_not_passed_through_the_model_again(tmp_path):
    data = batches()
    whole = [(len(x), float(x[0, 0])) for x, _ in data]
    for at in range(1, N_BATCHES):
        first = Watched()
        interrupt(build(model=first), Ending(data, at), tmp_path / "fit", OSError)
        second = Watched()
        build(model=second).fit(data, checkpoint=tmp_path / "fit", checkpoint_every=1)
        assert [p for p in first.plain if p in whole] == whole[:at]
        assert [p for p in second.plain if p in whole] == whole[at:]


def test_only_what_came_after_the_last_checkpoint_is_done_again(tmp_path):
    data = batches()
    whole = [(len(x), float(x[0, 0])) for x, _ in data]
    for at in range(1, N_BATCHES):
        interrupt(build(model=Watched()), Ending(data, at), tmp_path / "fit", OSError, checkpoint_every=2)
        model = Watched()
        build(model=model).fit(data, checkpoint=tmp_path / "fit", checkpoint_every=2)
        assert [p for p in model.plain if p in whole] == whole[at // 2 * 2 :], at


@pytest.mark.parametrize("size", [None, 2000])
def test_derivatives_that_were_summed_are_not_taken_again(size, tmp_path):
    """Features of whole batches: as many in all as without an interruption, and one batch more for that one."""

    def of_batches(model):
        return sum(n in (SIZE, N_DATA % SIZE) for n in model.derived)

    def make(at=None):
        return build(model=Watched(at=at), curvature_size=size, subsample_size=2, n_eigenvalues=2)

    la = make()
    la.fit(batches())
    total, calls = of_batches(la.model), la.model.calls
    assert total >= N_BATCHES
    per_batch = -(-total // N_BATCHES)
    resumed = []
    for at in range(calls):
        first, second = make(at), make()
        interrupt(first, batches(), tmp_path / "fit", Killed)
        second.fit(batches(), checkpoint=tmp_path / "fit", checkpoint_every=1)
        assert of_batches(first.model) + of_batches(second.model) <= total + per_batch
        resumed.append(of_batches(second.model))
    assert resumed[0] == total
    assert resumed[-1] <= 2 * per_batch
    assert resumed == sorted(resumed, reverse=True)


def test_gradient_rows_are_computed_once_the_basis_is_kept(tmp_path):
    data = batches()
    la = build(model=Watched())
    la.fit(data)
    calls = la.model.calls
    interrupt(build(model=Watched(at=calls - 1)), data, tmp_path / "fit", Killed)
    assert (tmp_path / "fit.basis").exists()
    second = build(model=Watched())
    second.backend.build_basis = lambda *args, **kwargs: pytest.fail("the basis is computed again")
    second.fit(data, checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert_equal_fits(second, la)


BUDGETS = {SampleBlocks: ROWS_BUDGET, WeightBlocks: WEIGHTS_BUDGET}


@pytest.mark.parametrize("kind", BUDGETS)
def test_blocks_of_the_gram_matrix_are_not_computed_again(kind, tmp_path, monkeypatch):
    made, gram = [], kind.gram

    def remember(self, *args):
        made.append(self)
        return gram(self, *args)

    monkeypatch.setattr(kind, "gram", remember)

    def fit(model, **more):
        made.clear()
        la = build(model=model, memory_budget=BUDGETS[kind])
        la.fit(batches(), **more)
        return la

    whole = fit(Watched())
    rows = made[0]
    gradients = rows.source.computed
    # What each block takes, and what is computed again after the last for the directions.
    if kind is SampleBlocks:
        costs, again = [M - block[0] for block in rows.blocks], len(rows.blocks[-1])
    else:
        costs, again = [M] * len(rows.groups), M
    assert len(costs) >= 2
    seen = set()
    for at in range(max(whole.model.seen.values()), whole.model.calls):  # after the pass over the data
        with pytest.raises(Killed):
            fit(Watched(at=at), checkpoint=tmp_path / "fit", checkpoint_every=1)
        if (tmp_path / "fit.basis").exists():
            assert not (tmp_path / "fit.gram").exists()
            break
        done = 0
        if (tmp_path / "fit.gram").exists():
            done = torch.load(tmp_path / "fit.gram", weights_only=True)["state"]["done"]
        resumed = fit(Watched(), checkpoint=tmp_path / "fit", checkpoint_every=1)
        assert_equal_fits(resumed, whole, f"interrupted at call {at}")
        left = gradients - sum(costs[:done]) + (again if done == len(costs) else 0)
        assert made[0].source.computed == left, (at, done)
        seen.add(done)
        assert not list(tmp_path.iterdir())
    assert seen == set(range(len(costs) + 1))


def test_blocks_of_another_layout_are_of_no_use():
    matrix = torch.ones(M, M, dtype=torch.float64)
    unfinished = Unfinished(["rows", 0, 4], 1, matrix)
    device = torch.device("cpu")
    assert torch.equal(unfinished.start(["rows", 0, 4], M, device)[0], matrix)
    assert unfinished.start(["rows", 0, 4], M, device)[1] == 1
    found, done = unfinished.start(["rows", 0, 5], M, device)
    assert done == 0
    assert not found.any()


# ---------------------------------------------------------------------------- wrong orders


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def refused(la, data, path, match, **options):
    """Require a ValueError, and that files stay as they are."""
    files = contents(path.parent)
    assert files
    before = la.H
    with pytest.raises(ValueError, match=match) as caught:
        la.fit(data, checkpoint=path, **{"checkpoint_every": 1, **options})
    assert contents(path.parent) == files
    assert la.H is before
    return str(caught.value)


WRONG_ORDERS = {
    "reversed": lambda data: data[::-1],
    "last batch": lambda data: [*data[:2], data[3], data[2], *data[4:]],
    "other targets": lambda data: [(x, (y + 1) % 3) for x, y in data],
    "other inputs": lambda data: [(x + 1e-12, y) for x, y in data],
    "other sizes": lambda data: [
        (torch.cat([x for x, _ in data])[i : i + 4], torch.cat([y for _, y in data])[i : i + 4])
        for i in range(0, N_DATA, 4)
    ],
}


@pytest.mark.parametrize("name", WRONG_ORDERS)
@pytest.mark.parametrize(("size", "at"), [(None, 3), (2000, 3), (None, N_BATCHES + 3)])
def test_data_in_another_order_are_refused(name, size, at, tmp_path):
    data = batches()
    interrupt(build(curvature_size=size), Ending(data, at), tmp_path / "fit", OSError)
    refused(build(curvature_size=size), WRONG_ORDERS[name](data), tmp_path / "fit", "order")
    la, expected = build(curvature_size=size), build(curvature_size=size)
    la.fit(data, checkpoint=tmp_path / "fit", checkpoint_every=1)  # the right one still goes on
    expected.fit(data)
    assert_equal_fits(la, expected)


def test_other_data_are_refused_when_all_have_been_read(tmp_path):
    """The first batch is looked at, though no batch is needed any more."""
    data = batches()
    calls = fitted_without_checkpoint("sample")[1]
    interrupt(build(model=Watched(at=calls - 1)), data, tmp_path / "fit", Killed)
    refused(build(model=Watched()), data[::-1], tmp_path / "fit", "order")


def test_too_few_batches_are_refused(tmp_path):
    data = batches()
    interrupt(build(), Ending(data, 3), tmp_path / "fit", OSError)
    for n in (0, 1, 2):
        refused(build(), data[:n], tmp_path / "fit", r".")


# ---------------------------------------------------------------------------- files that do not fit


def all_files(path, **options):
    """Leave the files of every stage."""
    la = build(model=Watched(), **options)
    la.fit(batches())
    interrupt(build(model=Watched(at=la.model.calls - 1), **options), batches(), path, Killed)
    assert {p.name for p in path.parent.iterdir()} == {path.name + s for s in ("", ".basis", ".curvature")}


@pytest.mark.parametrize("suffix", ["", ".basis", ".curvature"])
def test_truncated_files_are_refused(suffix, tmp_path):
    path = tmp_path / "fit"
    all_files(path)
    file = tmp_path / f"fit{suffix}"
    whole = file.read_bytes()
    for length in (0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(build(model=Watched()), batches(), path, "fit")
    file.write_bytes(whole)
    build(model=Watched()).fit(batches(), checkpoint=path)


@pytest.mark.parametrize("suffix", ["", ".basis", ".curvature"])
def test_damaged_files_are_refused(suffix, tmp_path):
    """One byte; those between the entries of the archive mean nothing."""
    path = tmp_path / "fit"
    all_files(path)
    expected = build(model=Watched())
    expected.fit(batches())
    file = tmp_path / f"fit{suffix}"
    whole = contents(tmp_path)
    generator = random.Random(3)
    refusals = 0
    for _ in range(25):
        content = bytearray(whole[file.name])
        content[generator.randrange(len(content))] ^= 0xFF
        file.write_bytes(content)
        damaged = contents(tmp_path)
        la = build(model=Watched())
        try:
            la.fit(batches(), checkpoint=path, checkpoint_every=1)
        except ValueError:
            refusals += 1
            assert contents(tmp_path) == damaged
        else:
            assert_equal_fits(la, expected)
        for name, content in whole.items():
            (tmp_path / name).write_bytes(content)
    assert refusals


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def foreign(name, file, victim):
    if name == "text":
        file.write_text("a list of things to do\n" * 20)
    elif name == "dict of tensors":
        torch.save({"weight": torch.zeros(3)}, file)
    elif name == "state_dict of an estimator":
        la = build()
        la.fit(batches())
        torch.save(la.state_dict(), file)
    elif name == "list":
        torch.save([torch.zeros(3)], file)
    elif name == "tensor":
        torch.save(torch.zeros(3), file)
    elif name == "pickle":
        file.write_bytes(pickle.dumps({"format": 1}))
    elif name == "payload":
        file.write_bytes(pickle.dumps(Payload(victim)))
    elif name == "payload of torch.save":
        torch.save({"format": 1, "stage": Payload(victim)}, file)
    elif name == "zip":
        import zipfile

        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a", "b")


FOREIGN = (
    *("text", "dict of tensors", "state_dict of an estimator", "list", "tensor"),
    *("pickle", "payload", "payload of torch.save", "zip"),
)


@pytest.mark.parametrize("suffix", ["", ".basis", ".curvature"])
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused_and_not_executed(name, suffix, tmp_path):
    path = tmp_path / "folder" / "fit"
    path.parent.mkdir()
    if suffix:
        all_files(path)
    foreign(name, path.parent / f"fit{suffix}", tmp_path / "executed")
    refused(build(model=Watched()), batches(), path, "fit")
    assert not (tmp_path / "executed").exists()


def test_the_payload_works(tmp_path):
    """Or else the test above would prove nothing."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("suffix", ["", ".basis", ".curvature"])
@pytest.mark.parametrize("change", ["older", "newer", "none"])
def test_another_format_is_refused(suffix, change, tmp_path):
    path = tmp_path / "fit"
    all_files(path)
    file = tmp_path / f"fit{suffix}"
    state = torch.load(file, weights_only=True)
    if change == "none":
        del state["format"]
    else:
        state["format"] += 1 if change == "newer" else -1
    torch.save(state, file)
    refused(build(model=Watched()), batches(), path, "." if change == "none" else "format")


@pytest.mark.parametrize("suffix", ["", ".basis", ".curvature"])
def test_a_file_without_one_of_its_entries_is_refused(suffix, tmp_path):
    path = tmp_path / "fit"
    all_files(path)
    file = tmp_path / f"fit{suffix}"
    state = torch.load(file, weights_only=True)
    for key in state:
        torch.save({k: v for k, v in state.items() if k != key}, file)
        refused(build(model=Watched()), batches(), path, ".")


def test_files_of_two_fits_do_not_go_together(tmp_path):
    path = tmp_path / "fit"
    all_files(path, seed=3)
    others = contents(tmp_path)
    for suffix in ("", ".basis", ".curvature"):
        for file in tmp_path.iterdir():
            file.unlink()
        all_files(path, seed=4)
        (tmp_path / f"fit{suffix}").write_bytes(others[f"fit{suffix}"])
        refused(build(model=Watched(), seed=4), batches(), path, "seed")


def other_weights():
    net = mlp()
    with torch.no_grad():
        net[2].bias[0] += 1e-12
    return net


def partly_frozen():
    net = mlp()
    net[0].bias.requires_grad_(False)
    return net


OTHER_FITS = {
    # estimator's changes, fit's changes, what the message names
    "seed": ({"seed": 4}, {}, "seed"),
    "M": ({"subsample_size": M - 1}, {}, "subsample_size"),
    "K": ({"n_eigenvalues": K}, {}, "n_eigenvalues"),
    "share": ({"n_eigenvalues": 0.9}, {}, "n_eigenvalues"),
    "curvature_size": ({"curvature_size": 11}, {}, "curvature_size"),
    "streamed": ({"curvature_size": None}, {}, "curvature_size"),
    "curvature": ({"curvature": "mc"}, {}, "curvature"),
    "weights": ({"model": other_weights}, {}, "model|weights"),
    "width": ({"model": lambda: mlp(4)}, {}, "model|weights"),
    "float32": ({"model": lambda: mlp(dtype=torch.float32)}, {}, "model|weights|dtype"),
    "balanced": ({}, {"balanced": True}, "balanced"),
    "landmarks": ({}, {"landmarks": (inputs(M, seed=9), torch.arange(M) % 3)}, "landmarks"),
    "val_steps": ({}, {"val_steps": 1}, "val_steps"),
    "max_samples": ({}, {"max_samples": 20}, "max_samples"),
    "n_total": ({}, {"n_total": 200}, "n_total"),
    "memory_budget": ({"memory_budget": 5000}, {}, "memory_budget"),
    "chunk_size": ({"chunk_size": 1}, {}, "chunk_size"),
    "autodiff": ({"autodiff": "reverse"}, {}, "autodiff"),
    "spill": ({"spill": "cpu"}, {}, "spill"),
}


@pytest.mark.parametrize("stage", ["scan", "curvature"])
@pytest.mark.parametrize("name", OTHER_FITS)
def test_a_checkpoint_of_another_fit_is_refused(name, stage, tmp_path):
    changes, fit_options, message = OTHER_FITS[name]
    path = tmp_path / "fit"
    if stage == "curvature":
        all_files(path)
    else:
        interrupt(build(model=Watched()), Ending(batches(), 3), path, OSError)
    changes = dict(changes)
    model = Watched(changes.pop("model", mlp)())
    said = refused(build(model=model, **changes), batches(), path, message, **fit_options)
    assert not model.plain, "the model was run before the checkpoint was looked at"
    assert str(path) in said


def test_a_basis_of_other_parameters_is_refused(tmp_path):
    all_files(tmp_path / "fit")
    refused(build(model=Watched(partly_frozen())), batches(), tmp_path / "fit", "grad|frozen|parameters")


def test_a_checkpoint_of_another_likelihood_is_refused(tmp_path):
    interrupt(build(), Ending(batches(), 3), tmp_path / "fit", OSError)
    refused(build("regression"), batches("regression"), tmp_path / "fit", "likelihood")
    refused(build("bernoulli"), batches(), tmp_path / "fit", "likelihood")


def test_a_checkpoint_with_sampled_labels_of_another_number_is_refused(tmp_path):
    options = {"curvature": "mc", "curvature_samples": 2}
    interrupt(build(**options), Ending(batches(), 3), tmp_path / "fit", OSError)
    other = build(**{**options, "curvature_samples": 3})
    refused(other, batches(), tmp_path / "fit", "curvature_samples")


def test_a_refusal_leaves_a_fitted_estimator_as_it_was(tmp_path):
    interrupt(build(seed=4), Ending(batches(), 3), tmp_path / "fit", OSError)
    la = build()
    la.fit(batches())
    untouched = Snapshot(la, X)
    refused(la, batches(), tmp_path / "fit", "seed")
    untouched.check()


# ---------------------------------------------------------------------------- arguments


class Untouchable:
    """A loader that must not be read."""

    def __iter__(self):
        raise AssertionError("the loader was read")


@pytest.mark.parametrize("every", [0, -1, 1.5, "3", None, True, float("nan")])
def test_a_bad_checkpoint_every_is_refused(every, tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every"):
        build().fit(Untouchable(), checkpoint=tmp_path / "fit", checkpoint_every=every)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_refused_before_any_work(tmp_path):
    model = Watched()
    for path in (tmp_path / "missing" / "fit", str(tmp_path / "missing" / "fit")):
        with pytest.raises(ValueError, match="missing"):
            build(model=model).fit(Untouchable(), checkpoint=path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file"):
        build(model=model).fit(Untouchable(), checkpoint=tmp_path / "file" / "fit")
    assert not model.calls
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("path", [3, True, b"fit", ""])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(ValueError, match="checkpoint"):
        build().fit(Untouchable(), checkpoint=path)


def test_a_folder_as_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder|director|file"):
        build().fit(batches(), checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- writing


def test_files_reach_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def syncing(fd):
        if os.path.isdir("/proc/self/fd"):
            events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
        return fsync(fd)

    def replacing(source, target, **options):
        events.append(("replace", os.path.basename(source), os.path.basename(target)))
        return replace(source, target, **options)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(os, "rename", replacing)
    build().fit(batches(), checkpoint=tmp_path / "fit", checkpoint_every=1)
    replaced = [(i, *event[1:]) for i, event in enumerate(events) if event[0] == "replace"]
    assert {target for _, _, target in replaced} == {"fit", "fit.basis", "fit.curvature"}
    assert sum(target == "fit" for _, _, target in replaced) >= N_BATCHES
    for i, source, _ in replaced:
        assert source.startswith("fit.")
        assert source.endswith(".tmp")
        if os.path.isdir("/proc/self/fd"):
            assert ("sync", source) in events[:i]
            last = max(j for j in range(i) if events[j] == ("sync", source))
            assert not any(event[:2] == ("replace", source) for event in events[last:i])


@pytest.mark.parametrize("error", [OSError, Killed])
def test_a_file_that_cannot_be_renamed_leaves_the_old_one(error, tmp_path, monkeypatch):
    """And a process killed just before."""
    expected = build()
    expected.fit(batches())
    renames = 3 + 2 * N_BATCHES
    for at in range(renames):
        left = at

        def replacing(source, target, replace=os.replace, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise error("no space left")
            return replace(source, target, **options)

        before = {}
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replacing)
            patch.setattr(os, "rename", replacing)
            la = build()
            try:
                la.fit(batches(), checkpoint=tmp_path / "fit", checkpoint_every=1)
            except error:
                before = contents(tmp_path)
            else:
                break
        for name in before:
            if not name.endswith(".tmp"):
                torch.load(tmp_path / name, weights_only=True)
        assert sum(name.endswith(".tmp") for name in before) <= 1
        la = build()
        la.fit(batches(), checkpoint=tmp_path / "fit", checkpoint_every=1)
        assert_equal_fits(la, expected, f"at the renaming {at}")
        assert not list(tmp_path.iterdir()), at
    assert at >= N_BATCHES


def test_what_a_process_that_died_was_writing_is_deleted(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    host, run = resume._HOST, "0123456789abcdef"
    left = tmp_path / f"fit.{host}.{process.pid}-{run}.tmp"
    names = [
        *(f"fit.{host}.{os.getpid()}-{run}.tmp", "fit.tmp", "fit.x-y.tmp"),
        *("fit.2019-results.tmp", f"fit.{host}.{process.pid}-results.tmp", f"fit.{host}.0-{run}.tmp"),
        # Of a rank, of another fit, of another machine.
        *(f"fit.0-of-2.{host}.{process.pid}-{run}.tmp", f"fit2.{host}.{process.pid}-{run}.tmp"),
        f"fit.elsewhere.{process.pid}-{run}.tmp",
    ]
    others = [tmp_path / name for name in names]
    for file in (left, *others):
        file.write_bytes(b"half a fi")
    build().fit(batches(), checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_full_disk_is_an_error_that_leaves_no_rubbish(tmp_path, monkeypatch):
    save, writes = torch.save, []

    def failing(whole, file):
        writes.append(file)
        if len(writes) == 3:
            save(whole, file)
            raise RuntimeError("unexpected pos 64 vs 0")
        return save(whole, file)

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match=r"fit.*could not be written"):
        build().fit(batches(), checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert [p.name for p in tmp_path.iterdir()] == ["fit"]
    monkeypatch.undo()
    expected = build()
    expected.fit(batches())
    la = build()
    la.fit(batches(), checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert_equal_fits(la, expected)


def test_a_folder_that_cannot_be_written_to_is_an_error_before_any_work(tmp_path, monkeypatch):
    def refusing(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", refusing)
    with pytest.raises(PermissionError):
        build().fit(Untouchable(), checkpoint=tmp_path / "fit")


def test_files_of_two_runs_of_one_fit_do_not_go_together(tmp_path):
    all_files(tmp_path / "fit")
    others = contents(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    all_files(tmp_path / "fit")
    (tmp_path / "fit.curvature").write_bytes(others["fit.curvature"])
    refused(build(model=Watched()), batches(), tmp_path / "fit", "does not belong")


def test_the_files_of_another_fit_are_not_deleted(tmp_path):
    files = resume.FitFiles(tmp_path / "fit", 1, {}, ALONE)
    for stage in ("scan", "basis"):
        files.save(stage, {})
    (tmp_path / "other").write_bytes(b"of another fit")
    os.replace(tmp_path / "other", tmp_path / "fit")
    files.delete_all()
    assert contents(tmp_path) == {"fit": b"of another fit"}


def test_two_fits_with_one_checkpoint(tmp_path):
    """The one that comes second notices; the other's files stay."""
    inner = []

    class Nested:
        def __init__(self, data):
            self.data = data

        def __iter__(self):
            for i, batch in enumerate(self.data):
                if i == 3:
                    inner.append(True)
                    with pytest.raises(OSError, match="interrupted"):
                        build(seed=9).fit(
                            Ending(batches(), 2), checkpoint=tmp_path / "other", checkpoint_every=1
                        )
                    os.replace(tmp_path / "other", tmp_path / "fit")
                yield batch

    with pytest.raises(ValueError, match="another fit"):
        build().fit(Nested(batches()), checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert inner
    assert [p.name for p in tmp_path.iterdir()] == ["fit"]
    assert torch.load(tmp_path / "fit", weights_only=True)["arguments"]["seed"] == 9


def test_files_stay_if_the_fit_fails_after_its_last_batch(tmp_path):
    """Here in validation data, which come last."""
    expected = build(temperature=None)
    val = batches(seed=30, n=17)
    expected.fit(batches(), val_loader=val)
    la = build(temperature=None)
    interrupt(la, batches(), tmp_path / "fit", OSError, val_loader=Ending(val, 1))
    assert la.H is None
    assert list(tmp_path.iterdir())
    la = build(temperature=None)
    la.fit(batches(), val_loader=val, checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert_equal_fits(la, expected)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- Ctrl-C


INTERRUPTED = {
    "sample": {},
    "streamed": {"curvature_size": None},
    "sampled labels": {"curvature": "mc"},
    "small sample": {"curvature_size": 11},
}


def test_ctrl_c_before_the_first_fit_leaves_no_fit(tmp_path):
    la = build()
    with pytest.raises(KeyboardInterrupt):
        la.fit(Ending(batches(), 3, KeyboardInterrupt), checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert la.H is None
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", INTERRUPTED)
def test_ctrl_c_keeps_the_curvature_there_is(name, checkpoint, tmp_path):
    """And before there is any, the fit before."""
    options = INTERRUPTED[name]
    complete, steps = (build(model=Watched(), **options) for _ in range(2))
    complete.fit(batches(seed=80))
    complete.model.calls = 0
    complete.fit(batches())
    calls = complete.model.calls
    steps.fit(batches(), val_steps=1)
    after = dict(steps.snapshots)
    kept = []
    for at in range(calls):
        la = build(model=Watched(), **options)
        la.fit(batches(seed=80))
        untouched = Snapshot(la, X)
        la.model.calls, la.model.at, la.model.error = 0, at, KeyboardInterrupt
        extra = {"checkpoint": tmp_path / "fit", "checkpoint_every": 1} if checkpoint else {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.raises(KeyboardInterrupt):
                la.fit(batches(), **extra)
        la.model.at = None
        said = [w for w in caught if "interrupted" in str(w.message)]
        if not said:
            assert not kept, "what was kept before is not kept any more"
            untouched.check()
        else:
            assert len(said) == 1
            assert said[0].category is UserWarning
            n, wanted = la.n_curvature, steps.n_curvature
            assert f"{n} of {wanted}" in str(said[0].message)
            assert (la.n_data, la.n_predictions, la.n_outputs) == (N_DATA, N_DATA, 3)
            assert torch.equal(la.H, after[n])
            assert torch.equal(la.loss, complete.loss)
            assert torch.equal(la.basis.eigenvalues, complete.basis.eigenvalues)
            assert la.snapshots[-1][0] == n
            kept.append(n)
            assert la(X).isfinite().all()
            assert la.log_marginal_likelihood().isfinite()
            other = build(model=Watched(), **options)
            other.load_state_dict(la.state_dict())
            assert torch.equal(other(X), la(X))
        if checkpoint and kept:
            resumed = la if at % 2 else build(model=Watched(), **options)
            resumed.fit(batches(), **extra)
            assert_equal_fits(resumed, complete, f"interrupted at call {at}")
        for file in tmp_path.iterdir():
            assert not kept
            file.unlink()
    assert kept == sorted(kept)
    assert sorted(set(kept)) == sorted(after)[:-1]


def test_ctrl_c_while_a_loader_is_read_again(tmp_path):
    la = build(curvature_size=None)
    data = Ending(batches(), N_BATCHES + 2, KeyboardInterrupt)
    with pytest.warns(UserWarning, match=r"interrupted.*10 of 23"), pytest.raises(KeyboardInterrupt):
        la.fit(data, checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert (la.n_curvature, la.n_data) == (10, N_DATA)
    first = build(curvature_size=None)
    first.fit(batches(), val_steps=1)
    assert torch.equal(la.H, dict(first.snapshots)[10])


@pytest.mark.parametrize("checkpoint", [False, True])
def test_ctrl_c_while_validation_data_are_read(checkpoint, tmp_path):
    """G is complete then, and kept as a fit without validation data has it."""
    expected = build(temperature=None)
    expected.fit(batches(), val_steps=1)
    la = build(temperature=None)
    more = {"checkpoint": tmp_path / "fit", "checkpoint_every": 1} if checkpoint else {}
    val = Ending(batches(seed=30, n=17), 1, KeyboardInterrupt)
    with pytest.warns(UserWarning, match="interrupted after 23 of 23"), pytest.raises(KeyboardInterrupt):
        la.fit(batches(), val_loader=val, **more)
    assert_equal_fits(la, expected)
    if checkpoint:
        la.fit(batches(), val_loader=batches(seed=30, n=17), **more)
        whole = build(temperature=None)
        whole.fit(batches(), val_loader=batches(seed=30, n=17))
        assert_equal_fits(la, whole)


def test_ctrl_c_while_data_are_added_with_a_checkpoint(tmp_path):
    """They are in its files alone, or they would be added twice by the fit that goes on."""
    whole = build(curvature_size=None)
    whole.fit(batches())
    whole.fit(batches(seed=50), override=False)
    la = build(curvature_size=None)
    la.fit(batches())
    untouched = Snapshot(la, X)
    more = {"override": False, "checkpoint": tmp_path / "fit", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):  # and no warning
        la.fit(Ending(batches(seed=50), N_BATCHES + 3, KeyboardInterrupt), **more)
    untouched.check()
    la.fit(batches(seed=50), **more)
    assert_equal_fits(la, whole)


@pytest.mark.parametrize("name", ["merge", "forget"])
def test_ctrl_c_while_a_fit_is_put_in_place(name, monkeypatch):
    """What merges and forgets is whole, or was never there."""
    la, other = build(), build()
    la.fit(batches())
    other.fit(batches(seed=50), basis=la.basis)
    action = {"merge": lambda: la.merge(other), "forget": lambda: la.forget(batches()[:2])}[name]
    untouched = Snapshot(la, X)
    fingerprint, left = checkpoint.fingerprint, [0]

    def interrupting(model):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return fingerprint(model)

    monkeypatch.setattr(checkpoint, "fingerprint", interrupting)
    interruptions = 0
    while True:
        left[0] = interruptions + 1
        try:
            action()
        except KeyboardInterrupt:
            interruptions += 1
            untouched.check()
        else:
            break
    assert interruptions >= 2


def test_ctrl_c_while_data_are_added():
    la, first = build(model=Watched()), build(model=Watched())
    for estimator in (la, first):
        estimator.fit(batches())
    before = la.H
    more = batches(seed=50)
    first.model.calls = 0
    steps = build(model=Watched())
    steps.fit(more, basis=first.basis, val_steps=1)
    added = []
    for at in range(6, 60):
        la = build(model=Watched())
        la.fit(batches())
        la.model.calls, la.model.at, la.model.error = 0, at, KeyboardInterrupt
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                la.fit(more, override=False)
        except KeyboardInterrupt:
            said = [w for w in caught if "interrupted" in str(w.message)]
            if not said:
                assert torch.equal(la.H, before)
                assert la.n_data == N_DATA
                continue
            assert len(said) == 1
            assert la.n_data == 2 * N_DATA
            n = la.n_curvature - N_DATA
            assert 0 < n < N_DATA
            # Draws differ, as positions go on: only the size of what was added is known.
            assert (la.H - before).trace() > 0.2 * steps.H.trace()
            assert (la.H - before).trace() < 5 * steps.H.trace()
            added.append(n)
        else:
            break
    assert added
    assert added == sorted(added)


def test_another_error_in_the_curvature_keeps_nothing(tmp_path):
    la = build(curvature_size=None)
    la.fit(batches(seed=80))
    untouched = Snapshot(la, X)
    interrupt(la, Ending(batches(), N_BATCHES + 2), tmp_path / "fit", OSError)
    untouched.check()


# ---------------------------------------------------------------------------- processes that are killed

DRIVER = """
import json, os, random, signal, sys

import torch
from helpers import build, inputs, mlp, targets
from torch import nn

torch.set_num_threads(1)
N, SIZE, KILLS = 60, 3, 10
os.fsync = lambda descriptor: None  # a kill loses no file that was written
folder, result = sys.argv[1:]
path = os.path.join(folder, "fit")
choose = random.Random(7)


class Telling(nn.Module):
    # Says what it is about to do, and waits until it may.

    def __init__(self, out, back):
        super().__init__()
        self.net, self.out, self.back = mlp(), out, back

    def forward(self, x):
        weight = next(self.net.parameters())
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(weight)
        dual = torch.autograd.forward_ad.unpack_dual(weight).tangent is not None
        plain = not (wrapped or dual or torch.is_grad_enabled()) and len(x) == SIZE
        os.write(self.out, b"s" if plain else b"d" if len(x) == SIZE else b"o")
        os.read(self.back, 1)
        return self.net(x)


def child(size, out, back, checkpoint):
    x, y = inputs(N), targets("classification", N)
    data = list(zip(x.split(SIZE), y.split(SIZE)))
    la = build(model=Telling(out, back), subsample_size=7, n_eigenvalues=3, curvature_size=size)
    la.fit(data, **({"checkpoint": path, "checkpoint_every": 1} if checkpoint else {}))
    found = {"H": la.H, "loss": la.loss, "eigenvalues": la.basis.eigenvalues, "n_data": torch.tensor(la.n_data)}
    found.update(la.basis.directions)
    found.update({f"snapshot {i}, {n}": G for i, (n, G) in enumerate(la.snapshots)})
    torch.save(found, result)


def run(size, kill_at, checkpoint=True):
    # Fork, and kill at that call, just after it was allowed to begin.
    out_r, out_w = os.pipe()
    back_r, back_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(out_r)
            os.close(back_w)
            child(size, out_w, back_r, checkpoint)
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(out_w)
    os.close(back_r)
    done, killed = "", False
    while word := os.read(out_r, 1):
        done += word.decode()
        os.write(back_w, b".")
        if len(done) == kill_at:
            os.kill(pid, signal.SIGKILL)
            killed = True
            break
    _, status = os.waitpid(pid, 0)
    os.close(out_r)
    os.close(back_w)
    assert killed or os.waitstatus_to_exitcode(status) == 0, "the fit failed"
    return done, killed


def read_result():
    found = torch.load(result, weights_only=True)
    os.remove(result)
    return found


def fits_that_are_killed(size):
    # Each a list of what its processes did, and whether they were killed.
    whole, _ = run(size, None, checkpoint=False)
    expected = read_result()
    fits, kills = [], 0
    while kills < KILLS:
        fits.append([])
        killed = True
        while killed:
            done, killed = run(size, choose.randrange(1, len(whole) // 2) if kills < KILLS else None)
            fits[-1].append((done, killed))
            kills += killed
        found = read_result()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected)
        assert os.listdir(folder) == [], os.listdir(folder)
    return {"whole": whole, "fits": fits}


print(json.dumps([fits_that_are_killed(2000), fits_that_are_killed(None)]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_processes_that_are_killed_ten_times(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "folder").mkdir()
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(
        [str(here), str(here.parent / "support"), str(Path(laplace_ella.__file__).parents[1])]
    )
    command = [sys.executable, "-W", "ignore", "driver.py", "folder", "result"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    n_batches = 60 // 3
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert found["whole"].count("s") == n_batches
        n_derived = found["whole"].count("d")
        assert n_derived >= n_batches
        per_batch = -(-n_derived // n_batches)
        assert sum(killed for fit in found["fits"] for _, killed in fit) == 10
        for fit in found["fits"]:
            interruptions = len(fit) - 1
            # Each loses one batch at most.
            scanned = sum(done.count("s") for done, _ in fit)
            assert n_batches <= scanned <= n_batches + interruptions
            derived = sum(done.count("d") for done, _ in fit)
            assert n_derived - n_derived % n_batches <= derived <= n_derived + interruptions * (per_batch + 1)


MOMENTS = """
import os, signal, sys, time, warnings

import torch
from test_resume import build, mlp
from torch.utils.data import DataLoader, TensorDataset

from helpers import inputs, targets

warnings.simplefilter("ignore")
torch.set_num_threads(1)
signals, path = sys.argv[1], sys.argv[2]
result = path + ".result"
# When a process has computed for so long, the system ends it at once, or an interrupt is raised.
END = {"kill": -signal.SIGPROF, "interrupt": 42}[signals]


def fit(**more):
    torch.manual_seed(3)
    data = TensorDataset(inputs(400), targets("classification", 400))
    la = build(model=mlp(), subsample_size=60, n_eigenvalues=9, curvature_size=None, memory_budget=2**14)
    la.fit(DataLoader(data, batch_size=8, shuffle=True), **more)
    return la


def outcome(la):
    return [la.H, la.loss, *la.basis.directions.values()]


def in_child(delay):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGPROF, signal.SIG_DFL if signals == "kill" else signal.default_int_handler)
            signal.setitimer(signal.ITIMER_PROF, delay)
            la = fit(checkpoint=path, checkpoint_every=1)
            signal.setitimer(signal.ITIMER_PROF, 0)
            torch.save(outcome(la), result)
            code = 0
        except KeyboardInterrupt:
            code = END
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


fit()  # what is loaded at the first use
start = time.process_time()
whole = outcome(fit(checkpoint=path, checkpoint_every=1))
length = time.process_time() - start
n_stopped = 0
generator = torch.Generator().manual_seed(0)
while n_stopped < 10:
    code = in_child(1e-3 + 0.6 * length * float(torch.rand((), generator=generator)))
    assert code in (0, END), code
    n_stopped += code == END
    if code == 0:
        found = torch.load(result, weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(found, whole))
        os.remove(result)
assert all(torch.equal(a, b) for a, b in zip(outcome(fit(checkpoint=path, checkpoint_every=1)), whole))
left = os.listdir(os.path.dirname(path))
assert not left, left
print("stopped", n_stopped)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("signals", ["kill", "interrupt"])
def test_processes_that_are_stopped_at_any_moment(signals, tmp_path):
    """Ten times at random moments, in the middle of what is written too."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "moments.py").write_text(MOMENTS)
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(
        [str(here), str(here.parent / "support"), str(Path(laplace_ella.__file__).parents[1])]
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "moments.py", signals, str(tmp_path / "folder" / "fit")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "stopped 10"
