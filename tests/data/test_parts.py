"""Parts of the data: the first inputs, a sample of more data, loaders of every kind."""

import math
import multiprocessing
from itertools import cycle

import pytest
import torch
from conftest import assert_close
from helpers import C, DictModel, N, as_tuple, assert_same, build, dict_batches, fitted, inputs, targets
from parts import (
    KINDS,
    QUIET,
    SIZE,
    SIZES,
    Counting,
    L,
    Lines,
    Untouchable,
    X,
    assert_same_posterior,
    la_data,
    mapped,
    refused,
)
from torch.utils.data import DataLoader

pytestmark = QUIET


@pytest.fixture(params=KINDS, ids=repr)
def kind(request):
    return request.param


@pytest.mark.parametrize("n", [1, 4, 10, 12, 23, 10**6])
@pytest.mark.parametrize("size", SIZES)
def test_the_first_inputs_are_those_that_are_read_and_no_batch_more(kind, n, size):
    x, y = (torch.cat(parts)[:n] for parts in zip(*kind.data(1)))
    la, expected = kind.build(curvature_size=size), kind.build(curvature_size=size)
    loader = Counting(kind.data(1))
    la.fit(loader, max_samples=n)
    assert loader.reads == (2 if size is None else 1)
    assert loader.asked == loader.reads * min(math.ceil(n / SIZE), math.ceil(N / SIZE))
    expected.fit(list(zip(x.split(SIZE), y.split(SIZE))))
    assert la.n_data == min(n, N)
    assert torch.equal(la.H, expected.H)
    assert_same_posterior(la, expected)
    assert [n for n, _ in la.snapshots] == [n for n, _ in expected.snapshots]


def test_the_first_mappings_are_added_scaled_and_forgotten():
    model, data = DictModel(), dict_batches(batch_size=5)
    la, expected = build(model=model), build(model=model)
    la.fit(data[3:])
    la.fit(data, override=False, max_samples=12)
    expected.fit([*data[3:], *data[:2], {k: v[:2] for k, v in data[2].items()}], basis=la.basis)
    assert_close(la.H, expected.H)
    assert la.n_data == expected.n_data == N - 15 + 12
    la.forget(data[3:])
    before, second = la.H, build(model=model)
    second.fit(data[:3], basis=la.basis)
    la.fit(data[:3], override=False, n_total=100)
    assert (la.n_data, la.n_predictions) == (112, 112)
    assert_close(la.H, before + 100 / 15 * second.H)


def test_a_loader_without_end():
    la = build()
    la.fit(cycle(la_data()), max_samples=200)
    assert la.n_data == 200


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n_total", [N, N + 1, 1000])
def test_a_sample_is_scaled_to_the_size_of_the_data(kind, size, n_total):
    plain, la = kind.build(curvature_size=size), kind.build(curvature_size=size)
    plain.fit(kind.data(1))
    la.fit(kind.data(1), n_total=n_total)
    factor = n_total / N
    assert_close(la.H, factor * plain.H)
    assert_close(la.loss, factor * plain.loss)
    assert la.n_data == n_total
    assert la.n_predictions == n_total * (L if kind.positions else 1)
    assert la.n_curvature == plain.n_curvature
    for (n, G), (m, expected) in zip(la.snapshots, plain.snapshots, strict=True):
        assert n == m
        assert_close(G, factor * expected)
    for k, v in plain.basis.directions.items():
        assert torch.equal(la.basis.directions[k], v)


def test_the_evidence_is_that_of_the_whole_data(kind):
    """Here the data are copies of the sample, so that scaling is exact."""
    la, whole = kind.build(), kind.build()
    la.fit(kind.data(1), n_total=3 * N)
    whole.fit(kind.data(1) * 3, basis=la.basis)
    assert_close(la.log_likelihood, whole.log_likelihood)
    assert_close(la.log_marginal_likelihood(), whole.log_marginal_likelihood())
    assert_close(la.posterior_precision, whole.posterior_precision)
    x = kind.data(4)[0][0]
    for a, b in zip(as_tuple(la(x)), as_tuple(whole(x)), strict=True):
        assert_close(a, b)
    if kind.likelihood == "regression":
        n_terms = 3 * N * (L if kind.positions else 1) * C
        expected = -whole.loss / 0.6**2 - n_terms * math.log(0.6 * math.sqrt(2 * math.pi))
        assert_close(la.log_likelihood, expected)


@pytest.mark.parametrize("override", [True, False])
def test_fewer_data_than_were_read_are_refused(override):
    la = fitted()
    refused(la, lambda: la.fit(la_data(), override=override, n_total=N - 1), "n_total")
    la.fit(la_data(), override=override, n_total=N)
    refused(la, lambda: la.fit(la_data(), override=override, n_total=9, max_samples=10), "n_total")
    la.fit(la_data(), override=override, n_total=10, max_samples=10)


def test_early_stopping_of_a_sample_which_is_restored():
    """n of the N inputs that there are in all."""
    la, other = build(temperature=None), build(temperature=None)
    val = [(inputs(17, seed=3), targets("classification", 17, seed=4))]
    la.fit(la_data(), n_total=230, val_loader=val)
    assert la.fit_history_["processed_examples"] == [5, 10, 15, 20, 23]
    assert la.temperature == pytest.approx(230 / la.n_curvature)
    other.load_state_dict(la.state_dict())
    assert other.n_data == 230
    assert_same(other(X), la(X))
    assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    for estimator in (la, other):  # it is still known that G is not a sum over N inputs
        refused(estimator, lambda e=estimator: e.forget(la_data()[:1]), r".")


def test_batches_that_are_empty_are_left_out():
    la, expected = build(curvature_size=None), build(curvature_size=None)
    nothing = (inputs(N)[:0], targets("classification")[:0])
    loader = Counting([nothing, *la_data()[:2], nothing, *la_data()[2:], nothing])
    la.fit(loader)
    expected.fit(la_data())
    assert torch.equal(la.H, expected.H)
    loader.asked = 0
    la.fit(loader, max_samples=5)
    assert loader.asked == 2 * 2
    assert la.n_data == 5


@pytest.mark.parametrize("n", [0, 1.5, True, "3"])
@pytest.mark.parametrize("name", ["max_samples", "n_total"])
def test_a_bad_number_of_inputs_is_refused(name, n):
    la = fitted()
    refused(la, lambda: la.fit(Untouchable(), **{name: n}), name)


PINNED = {"num_workers": 2, "persistent_workers": True, "pin_memory": True}
LOADERS = {
    "iterable data set, workers": lambda *data: DataLoader(Lines(*data), SIZE, num_workers=2),
    "persistent workers, pinned": lambda *data: DataLoader(mapped(*data), SIZE, **PINNED),
    "batches of the data set": lambda *data: DataLoader(list(DataLoader(mapped(*data), SIZE)), None),
    "generator": lambda *data: (batch for batch in DataLoader(mapped(*data), SIZE)),
}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, 2000) for name in LOADERS), ("batches of the data set", None), ("generator", None)],
)
def test_loaders_give_what_their_batches_do(name, size):
    """Fits, additions, data that are forgotten, early stops, both searches, and novelty."""
    make = LOADERS[name]
    if name == "generator" and size is None:
        with pytest.raises(ValueError, match="twice"):
            build(curvature_size=None).fit(make(N, 1))
        return
    workers = len(multiprocessing.active_children())
    la, expected = (build(curvature_size=size, temperature=None) for _ in range(2))
    for estimator, as_is in ((la, lambda loader: loader), (expected, list)):
        estimator.fit(as_is(make(N, 1)), max_samples=7)
        assert estimator.n_data == 7
        estimator.fit(as_is(make(N, 1)))
        estimator.fit(as_is(make(17, 5)), override=False)
        estimator.forget(as_is(make(17, 5)))
    assert torch.equal(la.H, expected.H)
    assert torch.equal(la.loss, expected.loss)
    for estimator, as_is in ((la, lambda loader: loader), (expected, list)):
        estimator.fit(as_is(make(N, 1)), val_loader=as_is(make(17, 5)))
        for n, options in ((17, {}), (5, {"pred_type": "nn", "link_approx": "mc", "n_samples": 2})):
            val = as_is(make(n, 5))
            estimator.optimize_prior_precision(method="gridsearch", val_loader=val, grid_size=3, **options)
        estimator.optimize_hyperparameters(as_is(make(17, 5)), ["temperature", "logit_scale"], n_samples=8)
        estimator.calibrate_novelty(as_is(make(17, 5)))
    assert la.fit_history_ == expected.fit_history_
    assert len(la.fit_history_["val_nll"]) > 1
    assert torch.equal(la.prior_precision, expected.prior_precision)
    assert_same(la(X), expected(X))
    assert torch.equal(la.novelty(X), expected.novelty(X))
    assert len(multiprocessing.active_children()) == workers
