"""A fit that is interrupted and started again ends as if nothing had happened, to the bit."""

import os
import random
from collections import UserDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DictModel, M, Snapshot, build, dict_batches, inputs, mlp, targets
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
from models import Applied
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from laplace_ella.fitting.resume import random_state, set_random_state
from laplace_ella.nystrom.gram import HeldRows, Unfinished

X = inputs(11, seed=7)

pytestmark = pytest.mark.filterwarnings("ignore:curvature='mc' estimates G")


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def fitted_again(make, data, folder, ats, **options):
    """Interrupt at calls of the model, go on, and compare with the fit that nothing interrupts; return that."""
    expected = make()
    expected.fit(data, **options)
    for at in ats(expected.model.calls):
        interrupt(make(at), data, folder / "fit", **options)
        la = go_on(make(), data, folder / "fit", **options)
        assert_equal_fits(la, expected, f"interrupted at call {at} of {expected.model.calls}")
    return expected


# Gradient rows beyond it are computed again, in blocks.
ROWS_BUDGET = 3000
MC = {"curvature": "mc", "curvature_samples": 2}
STREAMED_MC = {**MC, "curvature_size": None, "sigma_noise": 0.6}
VAL = batches(seed=30, n=17)
CASES = {
    # likelihood, options of the estimator, options of the fit
    "sample": ("classification", {}, {}),
    "streamed": ("classification", {"curvature_size": None}, {}),
    "small sample": ("classification", {"curvature_size": 11}, {"val_steps": 1}),
    "sampled labels": ("classification", MC, {}),
    "sampled labels, streamed": ("regression", STREAMED_MC, {"val_steps": 2}),
    "regression": ("regression", {"sigma_noise": 0.6, "n_eigenvalues": 0.9}, {}),
    "balanced": ("classification", {}, {"balanced": True}),
    "early stopping": ("classification", {"temperature": None}, {"val_loader": VAL, "val_steps": 2}),
    "landmarks": ("classification", {}, {"landmarks": (inputs(M, seed=40), torch.arange(M) % 3)}),
    "more pairs than inputs": ("classification", {"subsample_size": 31}, {}),
    "blocks of rows": ("classification", {"memory_budget": ROWS_BUDGET}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fit_that_is_interrupted_at_any_call_of_the_model(name, tmp_path):
    likelihood, options, fit_options = CASES[name]

    def make(at=None):
        return build(likelihood, Watched(at=at), **options)

    def ats(calls):
        step = 3 if name in ("sample", "streamed") else 1 + calls // 4
        return [*range(step // 2, calls, step), calls - 1]

    expected = fitted_again(make, batches(likelihood), tmp_path, ats, **fit_options)
    la = go_on(make(), batches(likelihood), tmp_path / "fit", checkpoint_every=2, **fit_options)
    assert_equal_fits(la, expected, "not interrupted")
    assert la.model.calls == expected.model.calls


@pytest.mark.parametrize(("every", "size"), [(1, None), (2, None), (3, 2000)])
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


def test_a_relative_path_beside_files_of_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = {"fit.pt", "fi", "fit.1-of-2", "fit.gram", "other.basis"}
    for name in others:
        Path(name).write_text("mine")
    interrupt(build(model=Watched()), Ending(batches(), 3), "fit", OSError)
    assert set(os.listdir()) == {*others, "fit"}
    build(model=Watched()).fit(batches(), checkpoint="fit")
    assert contents(tmp_path) == dict.fromkeys(others, b"mine")


class Encoding(UserDict):
    """A mapping with a method of its own, as tokenisers return."""

    def to(self, device):
        return Encoding({k: v.to(device) for k, v in self.data.items()})


@pytest.mark.parametrize("size", [None, 11])
@pytest.mark.parametrize("kind", [dict, UserDict, Encoding, "sequences"])
def test_inputs_of_other_kinds(kind, size, tmp_path):
    def forward(net, batch):
        assert type(batch) is kind, type(batch)
        return net(batch)

    if kind == "sequences":
        net, shapes = mlp(), [(4, 4), (5, 2), (3, 4), (6, 1)]
        data = [(torch.randn(*s, 5).double(), torch.randint(3, s)) for s in shapes]
    else:
        net, data = Applied(forward, DictModel()), [kind(batch) for batch in dict_batches(batch_size=SIZE)]

    def make(at=None):
        return build(model=Watched(net, at), curvature_size=size)

    fitted_again(make, data, tmp_path, lambda calls: [*range(2, calls - 1, 16), calls - 1])


DATA = TensorDataset(inputs(N_DATA), targets("classification"))


class Shuffling:
    """Shuffles by numpy's and Python's generators."""

    def __iter__(self):
        order = np.random.permutation(N_DATA).tolist()  # noqa: NPY002
        random.shuffle(order)
        return iter([DATA[order[i : i + SIZE]] for i in range(0, N_DATA, SIZE)])


def seeded(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    return torch.Generator().manual_seed(seed)


def by_a_sampler(seed):
    sampler = RandomSampler(DATA, generator=seeded(seed))
    return DataLoader(DATA, batch_sampler=BatchSampler(sampler, SIZE, drop_last=False))


SHUFFLED = {
    "torch": lambda seed: DataLoader(DATA, SIZE, shuffle=True),
    "workers": lambda seed: DataLoader(DATA, SIZE, shuffle=True, num_workers=2),
    "its own": lambda seed: DataLoader(DATA, SIZE, shuffle=True, generator=seeded(seed)),
    "a sampler's": by_a_sampler,
    "numpy and Python": lambda seed: Shuffling(),
}


@pytest.mark.parametrize("name", SHUFFLED)
@pytest.mark.parametrize("size", [None, 11])
def test_a_loader_that_shuffles_replays(name, size, tmp_path):
    def loader(seed):
        seeded(seed)
        return SHUFFLED[name](seed)

    def make(at=None):
        return build(model=Watched(at=at), curvature_size=size)

    expected, other = make(), make()
    expected.fit(loader(5))
    other.fit(loader(6))
    assert not torch.equal(other.H, expected.H)  # the order matters
    calls = expected.model.calls
    for at in (calls // 2, 3 * calls // 4, calls - 1):
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


def test_a_fit_leaves_the_global_generators_as_the_loader_does(tmp_path):
    states = []
    for options in ({}, {"checkpoint": tmp_path / "fit", "checkpoint_every": 1}):
        seeded(5)
        build().fit(DataLoader(DATA, SIZE, shuffle=True), **options)
        state = random_state([])
        states.append((state["torch"].tolist(), state["numpy"], state["python"]))
    assert states[0] == states[1]


@pytest.mark.parametrize("options", [{}, {"curvature_size": None}, MC])
def test_added_data(options, tmp_path):
    """By a new estimator, or the same one, as in a notebook whose cell is run again: never added twice."""
    more = batches(seed=50)

    def before():
        la = build(model=Watched(), **options)
        la.fit(batches())
        return la

    expected = before()
    first = expected.model.calls
    expected.fit(more, override=False)
    calls = expected.model.calls - first
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
    rows, file, seen = made[0], tmp_path / "fit.basis", set()
    gradients = rows.source.computed
    # What each block takes, and what is computed again after the last for the directions.
    costs, again = [M - block.start for block in rows.blocks], len(rows.blocks[-1])
    assert len(costs) >= 2
    for at in range(2 * N_BATCHES, whole.model.calls):
        with pytest.raises(Killed):
            fit(at, **more)
        state = (
            torch.load(file, weights_only=True)["state"] if file.exists() else {"basis": None, "gram": None}
        )
        if state["basis"] is not None:
            break
        done = state["gram"]["done"] if state["gram"] else 0
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
    unfinished = Unfinished(["rows", 0, 4], 1, torch.ones(M, M, dtype=torch.float64))
    for end, expected in ((4, 1), (5, 0)):
        found, done = unfinished.start(["rows", 0, end], M, torch.device("cpu"))
        assert (done, bool((found == expected).all())) == (expected, True)


def test_calls_are_cut_as_if_the_memory_of_the_interrupted_fit_were_free(tmp_path):
    """Other chunks would have other rounding."""
    first, second = build(model=Watched()), build(model=Watched())
    first.backend.engine.assume_free(2**28 + 1)
    interrupt(first, Ending(batches(), 3), tmp_path / "fit", OSError)
    go_on(second, batches(), tmp_path / "fit")
    assert second.backend.engine.free() == 2**28 + 1
