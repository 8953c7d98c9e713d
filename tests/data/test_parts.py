"""Parts of the data: the first inputs, a sample of more data, loaders of every kind."""

from __future__ import annotations

import math
import multiprocessing
import warnings
from itertools import cycle

import pytest
import torch
from conftest import assert_close
from helpers import (
    C,
    DictModel,
    N,
    as_tuple,
    assert_same,
    build,
    dict_batches,
    fitted,
    inputs,
    targets,
)
from parts import (
    KINDS,
    SIZE,
    SIZES,
    Counting,
    Endless,
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

from laplace_ella import ELLALaplace

# Tuning of a few weights on a few random labels.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The best (prior_precision|temperature)",
    "ignore:No setting predicts better than the network itself",
    "ignore:.*validation inputs",
    "ignore:curvature='mc' estimates G",
    "ignore:(subsample_size|n_eigenvalues) was reduced",
)


@pytest.fixture(params=KINDS[:4], ids=repr)
def kind(request):
    return request.param


@pytest.mark.parametrize("n", [1, 4, 5, 6, 10, 22, 23, 24, 10**6])
@pytest.mark.parametrize("size", SIZES)
def test_no_batch_is_asked_for_beyond_the_last_one_needed(n, size):
    kind = KINDS[0]
    loader = Counting(kind.data(1))
    la = kind.build(curvature_size=size)
    la.fit(loader, max_samples=n)
    passes = 2 if size is None else 1
    assert loader.reads == passes
    assert loader.asked == passes * min(math.ceil(n / SIZE), math.ceil(N / SIZE))
    assert la.n_data == min(n, N)


@pytest.mark.parametrize("n", [4, 10, 12, 30])
@pytest.mark.parametrize("size", SIZES)
def test_the_first_inputs_are_those_that_are_read(kind, n, size):
    x, y = (torch.cat(parts)[:n] for parts in zip(*kind.data(1)))
    la, expected = kind.build(curvature_size=size), kind.build(curvature_size=size)
    la.fit(kind.data(1), max_samples=n)
    expected.fit(list(zip(x.split(SIZE), y.split(SIZE))))
    assert torch.equal(la.H, expected.H)
    assert torch.equal(la.loss, expected.loss)
    assert_same_posterior(la, expected)
    assert [n for n, _ in la.snapshots] == [n for n, _ in expected.snapshots]


def test_a_loader_without_end():
    la, other = build(), build(curvature_size=None)
    la.fit(cycle(la_data()), max_samples=200)
    assert la.n_data == 200
    other.fit(DataLoader(Endless(), batch_size=7), max_samples=100)
    assert other.n_data == other.n_curvature == 100


def test_a_part_of_the_data_is_added():
    la, expected = build(), build()
    la.fit(la_data(), max_samples=10)
    la.fit(KINDS[0].data(2), override=False, max_samples=7)
    (x, y), (x2, y2), *_ = KINDS[0].data(2)
    expected.fit(la_data()[:2])
    expected.fit([(x, y), (x2[:2], y2[:2])], override=False)
    assert torch.equal(la.H, expected.H)
    assert la.n_data == 17


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


def test_the_size_of_data_that_are_added():
    plain, la, second = build(), build(), build()
    for estimator in (plain, la):
        estimator.fit(la_data())
    second.fit(KINDS[0].data(2), basis=la.basis)
    la.fit(KINDS[0].data(2), override=False, n_total=100)
    assert la.n_data == N + 100
    assert la.n_predictions == N + 100
    assert_close(la.H, plain.H + 100 / N * second.H)
    assert_close(la.loss, plain.loss + 100 / N * second.loss)


@pytest.mark.parametrize("override", [True, False])
def test_fewer_data_than_were_read_are_refused(override):
    la = fitted()
    refused(la, lambda: la.fit(la_data(), override=override, n_total=N - 1), "n_total")
    la.fit(la_data(), override=override, n_total=N)
    refused(la, lambda: la.fit(la_data(), override=override, n_total=9, max_samples=10), "n_total")
    la.fit(la_data(), override=override, n_total=10, max_samples=10)


def test_a_scaled_fit_is_restored(tmp_path):
    la, other = build(), build()
    la.fit(la_data(), n_total=200)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    assert other.n_data == 200
    assert_same(other(X), la(X))
    assert torch.equal(other.log_marginal_likelihood(), la.log_marginal_likelihood())
    for estimator in (la, other):  # it is still known that G is not a sum over N inputs
        refused(estimator, lambda e=estimator: e.forget(la_data()[:1]), r".")


def test_early_stopping_of_a_sample():
    """n of the N inputs that there are in all."""
    la = build(temperature=None)
    val = [(inputs(17, seed=3), targets("classification", 17, seed=4))]
    la.fit(la_data(), n_total=230, val_loader=val)
    assert la.fit_history_["processed_examples"] == [5, 10, 15, 20, 23]
    assert la.temperature == pytest.approx(230 / la.n_curvature)


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


def test_a_stream_that_comes_in_parts():
    """Day by day: each part is seen once, and parts that are too old are forgotten."""
    kind = KINDS[0]
    la = kind.build(curvature_size=2000)
    days = [kind.data(seed, n=11) for seed in range(20, 26)]
    la.fit(iter(days[0]))
    for today, old in zip(days[2:], days):
        if la.n_data == 11:
            la.fit(iter(days[1]), override=False)
        la.fit(iter(today), override=False)
        la.forget(iter(old))
        assert la.n_data == 22
    expected = kind.build(curvature_size=2000)
    expected.fit(days[4] + days[5], basis=la.basis)
    assert_same_posterior(la, expected, rtol=1e-8)
    assert isinstance(la, ELLALaplace)


@pytest.mark.parametrize("n", [0, 1.5, True, "3"])
@pytest.mark.parametrize("name", ["max_samples", "n_total"])
def test_a_bad_number_of_inputs_is_refused(name, n):
    la = fitted()
    refused(la, lambda: la.fit(Untouchable(), **{name: n}), name)


def test_mapping_batches_are_cut_and_forgotten():
    model, data = DictModel(), dict_batches(batch_size=5)
    la, expected = build(model=model), build(model=model)
    la.fit(data, max_samples=12)
    expected.fit([*data[:2], {k: v[:2] for k, v in data[2].items()}])
    assert torch.equal(la.H, expected.H)
    assert la.n_data == 12
    whole = build(model=model)
    whole.fit(data, basis=la.basis)
    whole.forget([{k: v[2:] for k, v in data[2].items()}, *data[3:]])
    assert_close(whole.H, la.H)
    assert_close(whole.loss, la.loss)


# ---------------------------------------------------------------------------- loaders of every kind

LOADERS = {
    "iterable data set, workers": lambda n, seed: DataLoader(Lines(n, seed), batch_size=SIZE, num_workers=2),
    "persistent workers, pinned": lambda n, seed: DataLoader(
        mapped(n, seed), batch_size=SIZE, num_workers=2, persistent_workers=True, pin_memory=True
    ),
    "batches of the data set": lambda n, seed: DataLoader(
        list(DataLoader(mapped(n, seed), SIZE)), batch_size=None
    ),
    "generator": lambda n, seed: (batch for batch in DataLoader(mapped(n, seed), SIZE)),
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
        estimator.optimize_prior_precision(method="gridsearch", val_loader=as_is(make(17, 5)), grid_size=3)
        estimator.optimize_prior_precision(
            "nn", "gridsearch", val_loader=as_is(make(5, 5)), grid_size=2, link_approx="mc", n_samples=2
        )
        estimator.optimize_hyperparameters(as_is(make(17, 5)), ["temperature", "logit_scale"], n_samples=8)
        estimator.calibrate_novelty(as_is(make(17, 5)))
    assert la.fit_history_ == expected.fit_history_
    assert len(la.fit_history_["val_nll"]) > 1
    assert torch.equal(la.prior_precision, expected.prior_precision)
    assert_same(la(X), expected(X))
    assert torch.equal(la.novelty(X), expected.novelty(X))
    assert len(multiprocessing.active_children()) == workers


@pytest.mark.parametrize("size", [None, 11])
def test_a_loader_that_is_stopped_early_is_read_again(size):
    loader = LOADERS["persistent workers, pinned"](N, 1)
    la, expected = build(curvature_size=size), build(curvature_size=size)
    expected.fit(list(mapped_batches()), max_samples=7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there may be nothing to pin memory for
        for _ in range(2):
            la.fit(loader, max_samples=7)
            assert torch.equal(la.H, expected.H)
        assert [len(y) for _, y in loader] == [5, 5, 5, 5, 3]


def mapped_batches():
    return DataLoader(mapped(), SIZE)
