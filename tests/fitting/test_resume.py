"""A fit that is interrupted and started again ends as if nothing had happened, to the bit."""

from __future__ import annotations

import json
import os
import random
from collections import UserDict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DictModel, M, Snapshot, build, dict_batches, inputs, targets
from interrupting import (
    N_BATCHES,
    N_DATA,
    SIZE,
    Ending,
    Killed,
    Watched,
    assert_equal_fits,
    batches,
    contents,
    go_on,
    interrupt,
)
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from laplace_ella.fitting.resume import random_state, set_random_state
from laplace_ella.nystrom.gram import HeldRows, Unfinished

X = inputs(11, seed=7)

pytestmark = pytest.mark.filterwarnings("ignore:curvature='mc' estimates G")


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# Gradient rows beyond it are computed again, in blocks.
ROWS_BUDGET = 3000
MC = {"curvature": "mc", "curvature_samples": 2}
CASES = {
    # likelihood, options of the estimator, options of the fit
    "sample": ("classification", {}, {}),
    "streamed": ("classification", {"curvature_size": None}, {}),
    "small sample": ("classification", {"curvature_size": 11}, {"val_steps": 1}),
    "sampled labels": ("classification", MC, {}),
    "sampled labels, streamed": (
        "regression",
        {**MC, "curvature_size": None, "sigma_noise": 0.6},
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
    "landmarks": ("classification", {}, {"landmarks": (inputs(M, seed=40), torch.arange(M) % 3)}),
    "more pairs than inputs": ("classification", {"subsample_size": 31}, {}),
    "blocks of rows": ("classification", {"memory_budget": ROWS_BUDGET}, {}),
}


def case(name):
    """Return what builds an estimator (of a model), its data, and the options of its fit."""
    likelihood, options, fit_options = CASES[name]
    fit_options = dict(fit_options)
    if fit_options.pop("val", False):
        fit_options["val_loader"] = batches(likelihood, seed=30, n=17)
    return lambda model: build(likelihood, model, **options), batches(likelihood), fit_options


@cache
def fitted_without_checkpoint(name):
    """Return the uninterrupted fit, which nothing may change, and how often it called the model."""
    make, data, options = case(name)
    la = make(Watched())
    la.fit(data, **options)
    return la, la.model.calls


@pytest.mark.parametrize("name", CASES)
def test_a_loader_that_fails_at_a_batch(name, tmp_path):
    make, data, options = case(name)
    expected, _ = fitted_without_checkpoint(name)
    streamed = CASES[name][1].get("curvature_size", 0) is None
    for at in [0, 1, 4] + [6, 9] * streamed:
        interrupt(make(Watched()), Ending(data, at), tmp_path / "fit", OSError, **options)
        assert bool(os.listdir(tmp_path)) == (at > 0)
        la = go_on(make(Watched()), Ending(data), tmp_path / "fit", **options)
        assert_equal_fits(la, expected, f"interrupted at batch {at}")


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_fails_at_any_of_its_calls(name, tmp_path):
    make, data, options = case(name)
    expected, calls = fitted_without_checkpoint(name)
    assert calls > 2 * N_BATCHES
    step = 3 if name in ("sample", "streamed") else 1 + calls // 4
    for at in [*range(step // 2, calls, step), calls - 1]:
        interrupt(make(Watched(at=at)), data, tmp_path / "fit", **options)
        la = go_on(make(Watched()), data, tmp_path / "fit", **options)
        assert_equal_fits(la, expected, f"interrupted at call {at} of {calls}")


@pytest.mark.parametrize(("every", "size"), [(1, None), (1, 2000), (2, None), (3, 2000), (100, 2000)])
def test_a_fit_that_is_interrupted_again_and_again(every, size, tmp_path):
    """Each time a few calls later; whatever is lost in between, the end is the same."""
    expected = build(model=Watched(), curvature_size=size)
    expected.fit(batches())
    for at in range(1, 1000, 2):
        la = build(model=Watched(at=at), curvature_size=size)
        try:
            la.fit(batches(), checkpoint=tmp_path / "fit", checkpoint_every=every)
        except Killed:
            continue
        break
    assert at >= 8
    assert_equal_fits(la, expected)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", CASES)
def test_a_fit_with_checkpoints_is_the_one_without(name, tmp_path):
    make, data, options = case(name)
    expected, calls = fitted_without_checkpoint(name)
    seen = set()

    class Looking(Watched):
        def forward(self, x):
            seen.update(os.listdir(tmp_path))
            return super().forward(x)

    la = make(Looking())
    la.fit(data, checkpoint=str(tmp_path / "fit"), checkpoint_every=2, **options)
    assert_equal_fits(la, expected)
    assert la.model.calls == calls
    assert seen == {"fit", "fit.basis", "fit.curvature"}
    assert os.listdir(tmp_path) == []


def test_a_relative_path_beside_files_of_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = {"fit.pt", "fi", "fit.1-of-2", "fit.gram", "other.basis"}
    for name in others:
        Path(name).write_text("mine")
    interrupt(build(model=Watched()), Ending(batches(), 3), "fit", OSError)
    assert set(os.listdir()) == {*others, "fit"}
    assert isinstance(torch.load("fit", weights_only=True), dict)
    build(model=Watched()).fit(batches(), checkpoint="fit")
    assert contents(tmp_path) == dict.fromkeys(others, b"mine")


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


def of_sequences():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 4), (5, 2), (3, 4), (6, 1)]
    data = [
        (torch.randn(*s, 5, generator=generator).double(), torch.randint(3, s, generator=generator))
        for s in shapes
    ]
    return net, data


def of_mappings(name):
    if name == "transformers":
        kind = pytest.importorskip("transformers").BatchEncoding
    else:
        kind = {"dict": dict, "UserDict": UserDict, "encoding": Encoding}[name]
    return OfEncodings(kind), [kind(batch) for batch in dict_batches(batch_size=SIZE)]


@pytest.mark.parametrize("size", [None, 11])
@pytest.mark.parametrize("name", ["dict", "UserDict", "encoding", "transformers", "sequences"])
def test_inputs_of_other_kinds(name, size, tmp_path):
    net, data = of_sequences() if name == "sequences" else of_mappings(name)
    expected = build(model=Watched(net), curvature_size=size)
    expected.fit(data)
    calls = expected.model.calls
    for at in [*range(2, calls - 1, 16), calls - 1]:
        interrupt(build(model=Watched(net, at), curvature_size=size), data, tmp_path / "fit")
        la = go_on(build(model=Watched(net), curvature_size=size), data, tmp_path / "fit")
        assert_equal_fits(la, expected, f"interrupted at call {at} of {calls}")


# ---------------------------------------------------------------------------- random numbers


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


class Shuffling:
    """Shuffles by numpy's and Python's generators."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        order = np.random.permutation(N_DATA).tolist()  # noqa: NPY002
        random.shuffle(order)
        for i in range(0, N_DATA, SIZE):
            x, y = zip(*(self.data[j] for j in order[i : i + SIZE]))
            yield torch.stack(x), torch.stack(y)


def seeded(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def in_batches(data, seed):
    order = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
    return DataLoader(data, batch_sampler=BatchSampler(order, SIZE, drop_last=False))


# (data set, seed) -> loader
SHUFFLED = {
    "torch": lambda data, seed: DataLoader(data, SIZE, shuffle=True),
    "its own": lambda data, seed: DataLoader(
        data, SIZE, shuffle=True, generator=torch.Generator().manual_seed(seed)
    ),
    "a sampler's": in_batches,
    "numpy and Python": lambda data, seed: Shuffling(data),
}


@pytest.mark.parametrize("name", SHUFFLED)
@pytest.mark.parametrize("size", [None, 11])
def test_a_loader_that_shuffles_replays(name, size, tmp_path):
    def loader(seed, left=None):
        seeded(seed if "its" not in name else 0)
        return SHUFFLED[name](Breaking(left), seed)

    def make(at=None):
        return build(model=Watched(at=at), curvature_size=size)

    expected, other = make(), make()
    expected.fit(loader(5))
    other.fit(loader(6))
    assert not torch.equal(other.H, expected.H)  # the order matters
    # Whatever fails: the data set, with one checkpoint at least, or the model.
    for left in range(SIZE, N_DATA * (1 + (size is None)), 9):
        interrupt(make(), loader(5, left), tmp_path / "fit")
        la = go_on(make(), loader(6), tmp_path / "fit")
        assert_equal_fits(la, expected, f"interrupted at input {left}")
    calls = expected.model.calls
    for at in (3 * calls // 4, calls - 1):
        interrupt(make(at), loader(5), tmp_path / "fit")
        la = go_on(make(), loader(6), tmp_path / "fit")
        assert_equal_fits(la, expected, f"interrupted at call {at}")


@pytest.mark.parametrize("make", [np.random.PCG64, np.random.Philox, np.random.SFC64, np.random.MT19937])
def test_another_generator_of_numpys(make, tmp_path):
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(make(3))
        np.random.standard_normal()  # noqa: NPY002
        torch.save(random_state([]), tmp_path / "state")
        drawn = np.random.standard_normal(5)  # noqa: NPY002
        set_random_state(torch.load(tmp_path / "state", weights_only=True), [])
        assert (np.random.standard_normal(5) == drawn).all()  # noqa: NPY002
    finally:
        np.random.set_bit_generator(before)


def test_a_loader_with_workers_replays(tmp_path):
    def loader(seed):
        torch.manual_seed(seed)
        return DataLoader(Breaking(), SIZE, shuffle=True, num_workers=2)

    expected = build(model=Watched())
    expected.fit(loader(5))
    interrupt(build(model=Watched(at=expected.model.calls - 1)), loader(5), tmp_path / "fit")
    assert_equal_fits(go_on(build(model=Watched()), loader(6), tmp_path / "fit"), expected)


def test_a_fit_leaves_the_global_generators_as_the_loader_does(tmp_path):
    states = []
    for options in ({}, {}, {"checkpoint": tmp_path / "fit", "checkpoint_every": 1}):
        seeded(5)
        build().fit(DataLoader(Breaking(), SIZE, shuffle=True), **options)
        state = random_state([])
        states.append(json.dumps([state["torch"].tolist(), state["numpy"], state["python"]]))
    assert len(set(states)) == 1


# ---------------------------------------------------------------------------- data that are added


@pytest.mark.parametrize("name", ["sample", "streamed", "sampled labels"])
def test_added_data(name, tmp_path):
    """By a new estimator, or the same one, as in a notebook whose cell is run again: never added twice."""
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
    for at in [*range(0, calls, 4), calls - 1]:
        la = before()
        untouched = Snapshot(la, X)
        la.model.at = la.model.calls + at
        interrupt(la, more, tmp_path / "fit", override=False)
        la.model.at = None
        untouched.check()
        la = la if at % 8 else before()
        go_on(la, more, tmp_path / "fit", override=False)
        assert_equal_fits(la, expected, f"interrupted at call {at}")


# ---------------------------------------------------------------------------- nothing is done twice


@pytest.mark.parametrize("every", [1, 2])
def test_only_what_came_after_the_last_checkpoint_is_done_again(every, tmp_path):
    data = batches()

    def scanned(model):
        whole = [(len(x), float(x[0, 0])) for x, _ in data]
        return [whole.index(found) for found in model.plain if found in whole]

    for at in range(1, N_BATCHES):
        first, second = Watched(), Watched()
        interrupt(build(model=first), Ending(data, at), tmp_path / "fit", OSError, checkpoint_every=every)
        go_on(build(model=second), data, tmp_path / "fit")
        assert scanned(first) == list(range(at))
        assert scanned(second) == list(range(at // every * every, N_BATCHES))


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
    for at in [*range(0, calls, 5), calls - 1]:
        first, second = make(at), make()
        interrupt(first, batches(), tmp_path / "fit")
        go_on(second, batches(), tmp_path / "fit")
        assert of_batches(first.model) + of_batches(second.model) <= total + per_batch
        resumed.append(of_batches(second.model))
    assert resumed[0] == total
    assert resumed[-1] <= 2 * per_batch
    assert resumed == sorted(resumed, reverse=True)


def test_blocks_of_the_gram_matrix_are_not_computed_again(tmp_path, monkeypatch):
    made, gram = [], HeldRows.gram

    def remember(self, *args):
        made.append(self)
        return gram(self, *args)

    monkeypatch.setattr(HeldRows, "gram", remember)

    def fit(at=None, **more):
        made.clear()
        la = build(model=Watched(at=at), memory_budget=ROWS_BUDGET)
        la.fit(batches(), **more)
        return la

    whole, more = fit(), {"checkpoint": tmp_path / "fit", "checkpoint_every": 1}
    rows = made[0]
    gradients = rows.source.computed
    # What each block takes, and what is computed again after the last for the directions.
    costs, again = [M - block.start for block in rows.blocks], len(rows.blocks[-1])
    assert len(costs) >= 2
    seen = set()
    for at in range(2 * N_BATCHES, whole.model.calls):
        with pytest.raises(Killed):
            fit(at, **more)
        file, gram_so_far = tmp_path / "fit.basis", None
        if file.exists():
            state = torch.load(file, weights_only=True)["state"]
            if state["basis"] is not None:
                break
            gram_so_far = state["gram"]
        done = gram_so_far["done"] if gram_so_far else 0
        if done in seen:
            file.unlink(missing_ok=True)
            (tmp_path / "fit").unlink(missing_ok=True)
            continue
        assert_equal_fits(fit(**more), whole, f"interrupted at call {at}")
        left = gradients - sum(costs[:done]) + (again if done == len(costs) else 0)
        assert made[0].source.computed == left, (at, done)
        seen.add(done)
    assert seen == set(range(len(costs) + 1))
    monkeypatch.setattr(HeldRows, "gram", lambda *args: pytest.fail("the basis is computed again"))
    assert_equal_fits(fit(**more), whole)


def test_blocks_of_another_layout_are_of_no_use():
    matrix, device = torch.ones(M, M, dtype=torch.float64), torch.device("cpu")
    unfinished = Unfinished(["rows", 0, 4], 1, matrix)
    found, done = unfinished.start(["rows", 0, 4], M, device)
    assert (done, bool(found.all())) == (1, True)
    found, done = unfinished.start(["rows", 0, 5], M, device)
    assert (done, bool(found.any())) == (0, False)


def test_calls_are_cut_as_if_the_memory_of_the_interrupted_fit_were_free(tmp_path):
    """Other chunks would have other rounding."""
    first, second = build(model=Watched()), build(model=Watched())
    first.backend.engine.assume_free(2**28 + 1)
    interrupt(first, Ending(batches(), 3), tmp_path / "fit", OSError)
    go_on(second, batches(), tmp_path / "fit")
    assert second.backend.engine.free() == 2**28 + 1
