"""Fits that are put together and taken apart: a basis that is given, data that are added, merged and forgotten."""

import math
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from conftest import assert_close
from helpers import C, D, N, Snapshot, build, fitted, inputs, mlp, targets
from parts import (
    KINDS,
    QUIET,
    SIZE,
    SIZES,
    Counting,
    Untouchable,
    X,
    assert_same_posterior,
    la_data,
    refused,
    two,
)
from torch import nn

from laplace_ella.fitting import stages

pytestmark = QUIET


@pytest.fixture(params=KINDS, ids=repr)
def kind(request):
    return request.param


@pytest.mark.parametrize("size", SIZES)
def test_a_basis_takes_the_place_of_landmarks(kind, size, monkeypatch):
    first, second, third = (kind.build(curvature_size=size) for _ in range(3))
    first.fit(kind.data(1))
    monkeypatch.setattr(stages, "basis_of", lambda *args: pytest.fail("a basis is built"))
    second.fit(kind.data(1), basis=first.basis)
    assert_same_posterior(second, first)
    third.fit(kind.data(2), basis=first.basis)
    assert torch.equal(third.basis.directions["0.weight"], first.basis.directions["0.weight"])
    assert (third.H - first.H).abs().max() > 1e-3 * first.H.abs().max()


def test_added_data_are_those_of_one_fit(kind):
    la, whole = kind.build(), kind.build()
    la.fit(kind.data(1))
    for last in (2, 3):
        whole.fit([b for seed in range(1, last + 1) for b in kind.data(seed)], basis=la.basis)
        la.fit(kind.data(last), override=False)
        assert_same_posterior(la, whole)
    assert len(la.snapshots) == 1
    assert_close(la.snapshots[0][1], la.H)
    x, y = kind.data(2)[0]
    refused(la, lambda: la.fit([(x, y), (x * math.nan, y)], override=False), "NaN")
    refused(la, lambda: la.fit([], override=False), "no data")
    refused(la, lambda: la.fit(Untouchable(), override=False, basis=la.basis), "basis")
    landmarks = x, torch.arange(SIZE) % C
    refused(la, lambda: la.fit(Untouchable(), basis=la.basis, landmarks=landmarks), "basis")


@pytest.mark.parametrize("size", SIZES)
def test_merging_is_adding(kind, size):
    """With the basis of the one, and its novelty not calibrated any more; what can be done with a fit can go on."""
    la, other = two(kind, curvature_size=size)
    added, restored = (kind.build(la.model, curvature_size=size) for _ in range(2))
    added.fit(kind.data(1))
    added.fit(kind.data(2), override=False)
    if kind.likelihood != "regression":
        la.calibrate_novelty(kind.data(8))
    H, untouched = la.H + other.H, Snapshot(other, kind.data(9)[0][0])
    with torch.inference_mode():
        la.merge(other)
    assert not la.H.is_inference()
    untouched.check()
    assert_close(la.H, H)
    if size != 11:  # else other inputs are drawn, as positions go on
        assert_same_posterior(la, added)
    assert (la.n_data, la.n_curvature, la.n_predictions) == (2 * N, added.n_curvature, added.n_predictions)
    assert_close(la.loss, added.loss)
    assert [n for n, _ in la.snapshots] == [la.n_curvature]
    assert la.fit_history_ == {"processed_examples": [float(la.n_curvature)], "val_nll": []}
    assert torch.equal(la.snapshots[0][1], la.H)
    x = kind.data(9)[0][0]
    assert torch.equal(la.novelty(x), la.residual_share(x))
    restored.load_state_dict(la.state_dict())
    for estimator in (la, restored):
        estimator.merge(other)
    assert torch.equal(restored.H, la.H)
    if size is None:
        la.fit(kind.data(5), override=False)
        la.forget(kind.data(5))
        assert_same_posterior(la, restored)
    la.optimize_prior_precision(n_steps=3)


DIFFERENT = [
    ({"seed": 5}, "basis|directions"),
    ({"n_eigenvalues": 3}, "basis|directions"),
    ({}, "model"),
    ({"temperature": 2.0}, "temperature"),
    ({"prior_precision": 3.0}, "prior_precision"),
    ({"prior_precision": torch.arange(1.0, 5.0)}, "prior_precision"),
    ({"prior_mean": 0.1}, "prior_mean"),
]


@pytest.mark.parametrize(("changes", "message"), DIFFERENT, ids=str)
def test_what_differs_is_not_merged(changes, message):
    la, other = fitted(), build(**changes)
    if message == "model":
        other.model[2].bias.data[0] += 1e-9
    basis = replace(la.basis, of_model=None)  # else that of another model is refused here already
    other.fit(la_data(), basis=None if "basis" in message else basis)
    theirs = Snapshot(other, X)
    refused(la, lambda: la.merge(other), message)
    theirs.check()


def test_other_noise_or_likelihood_is_not_merged():
    la, other = two(KINDS[1])
    other.sigma_noise = 0.7
    refused(la, lambda: la.merge(other), "sigma_noise")
    counts = KINDS[2].build(la.model)
    counts.fit(KINDS[2].data(2), basis=la.basis)
    refused(la, lambda: la.merge(counts), "likelihood")


@pytest.mark.parametrize("size", [None, 2000])
def test_forgetting_undoes_adding_and_reads_the_data_once(kind, size):
    la, kept = kind.build(curvature_size=size), kind.build(curvature_size=size)
    la.fit(kind.data(1) + kind.data(2))
    kept.fit(kind.data(1), basis=la.basis)
    loader = Counting(kind.data(2, size=4))
    la.forget(loader)
    assert loader.reads == 1
    assert_same_posterior(la, kept)
    assert torch.equal(la.snapshots[-1][1], la.H)
    for estimator in (la, kept):
        estimator.fit(kind.data(2), override=False)
    assert_same_posterior(la, kept)
    kept.fit(kind.data(1)[:2], basis=la.basis)
    for batch in kind.data(2) + kind.data(1)[2:]:
        la.forget([batch])
    assert_same_posterior(la, kept, rtol=1e-8)
    assert la.fit_history_ == {"processed_examples": [2.0 * SIZE], "val_nll": []}


def test_data_that_were_never_added_are_not_forgotten(kind):
    """Where they say more of a direction than all that was added, G would be indefinite."""
    la = kind.build()
    la.fit(kind.data(1))
    others = kind.data(2, n=N - 1)
    kept = kind.build(la.model)
    kept.fit(others, basis=la.basis)
    assert torch.linalg.eigvalsh(la.H - kept.H).min() < -1e-3 * torch.linalg.eigvalsh(la.H).max()
    refused(la, lambda: la.forget(others), r".")


@pytest.mark.parametrize(("share", "is_refused"), [(1e-6, True), (1e-12, True), (1e-15, False)])
def test_what_rounding_does_not_explain_is_refused(share, is_refused):
    """In float64 a remainder may be negative by 100 eps of the largest eigenvalue, and no more."""
    kind = KINDS[1]
    la, part = kind.build(), kind.build()
    la.fit(kind.data(1))
    part.fit(kind.data(1)[:2], basis=la.basis)
    values, vectors = torch.linalg.eigh(la.H)
    values[0] = -share * values[-1]
    la.H = part.H + vectors @ values.diag() @ vectors.T
    if is_refused:
        refused(la, lambda: la.forget(kind.data(1)[:2]), "not among those")
    else:
        la.forget(kind.data(1)[:2])
        assert torch.linalg.eigvalsh(la.H)[0] > -1e-15 * values[-1]


# Targets that outputs make likely, and unlikely.
TARGETS = {
    "classification": (lambda f: f.argmax(1), lambda f: f.argmin(1)),
    "bernoulli": (lambda f: (f > 0).double(), lambda f: (f < 0).double()),
    "regression": (lambda f: f, lambda f: f + 3),
}


@pytest.mark.parametrize("kind", KINDS[:3], ids=repr)
def test_a_loss_below_zero_is_refused(kind):
    """The curvature is that of inputs that were fitted, only the targets are others."""
    model, (right, wrong), data = mlp(), TARGETS[kind.likelihood], kind.data(1)
    model[2].weight.data.mul_(20)
    la, x, f = kind.build(model), data[0][0], model(data[0][0]).detach()
    la.fit([(x, right(model(x).detach())) for x, _ in data])
    refused(la, lambda: la.forget([(x, wrong(f))]), "loss|likelihood")
    la.forget([(x, right(f))])


@pytest.mark.parametrize("seed", range(3))
def test_rounding_of_what_was_forgotten_first_is_no_obstacle(seed):
    """Labels that were wrong make nearly all of the loss; in float32, what rounding leaves of it is more than the rest."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, 10)).requires_grad_()
    model[0].weight.data.mul_(5)
    model[2].weight.data.mul_(60)
    x = inputs(200, seed=seed, dtype=torch.float32)
    f = model(x).detach()
    sure = (f.topk(2).values @ torch.tensor([1.0, -1.0])).argsort(descending=True)[:100]
    x, right, wrong = x[sure], f[sure].argmax(1), f[sure].argmin(1)
    y = torch.where(torch.arange(100) < 20, wrong, right)
    la = build(model=model, subsample_size=50, curvature_size=None)
    la.fit(list(zip(x.split(10), y.split(10))))
    first = float(la.loss)
    la.forget(list(zip(x[:20].split(1), y[:20].split(1))))
    assert float(la.loss) < 1e-5 * first
    restored = build(model=model, subsample_size=50, curvature_size=None)
    restored.load_state_dict(la.state_dict())
    for estimator in (la, restored):
        estimator.forget(list(zip(x[20:60].split(7), y[20:60].split(7))))
        estimator.forget(list(zip(x[60:90].split(7), y[60:90].split(7))))
        assert estimator.n_data == 10
    with pytest.raises(ValueError, match="loss"):
        la.forget(list(zip(x[90:95].split(1), wrong[90:95].split(1))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_forgetting_in_low_precision(dtype):
    """In batches of other sizes, whose features round otherwise."""
    model = mlp(dtype=dtype)
    x, y = inputs(60, seed=5, dtype=dtype), targets("classification", 60)
    la, kept = build(model=model, n_eigenvalues=3), build(model=model, n_eigenvalues=3)
    la.fit(list(zip(x.split(20), y.split(20))))
    la.forget(list(zip(x[3:].split(1), y[3:].split(1))))
    kept.fit([(x[:3], y[:3])], basis=la.basis)
    assert la.n_data == 3
    tolerance = min(100 * torch.finfo(dtype).eps, 0.01)
    assert (la.H - kept.H).norm() < tolerance * la.state_dict()["largest_sums"][0]
    assert torch.linalg.eigvalsh(la.H)[0] > -1e-12 * la.state_dict()["largest_sums"][0]
    assert la(x[:3]).isfinite().all()


def with_direction(name, change):
    return lambda b: replace(b, directions={**b.directions, name: change(b.directions[name])})


FLOATS = [(x.float(), y) for x, y in la_data()]
BASES = {
    "shape": with_direction("0.weight", lambda v: v.mT),
    "missing weight": lambda b: replace(b, directions={"0.weight": b.directions["0.weight"]}),
    "dtype": lambda b: fitted(model=mlp(dtype=torch.float32), data=FLOATS).basis,
    "other model": lambda b: fitted(model=mlp(4), data=la_data()).basis,
    "too few directions": with_direction("0.bias", lambda v: v[:-1]),
    "too few eigenvalues": lambda b: replace(b, eigenvalues=b.eigenvalues[:-1]),
    "no basis": lambda b: {},
    "tensor": lambda b: torch.zeros(3),
}


@pytest.mark.parametrize("name", BASES)
def test_a_basis_that_does_not_fit_the_model_is_refused(name):
    la = fitted()
    refused(la, lambda: la.fit(Untouchable(), basis=BASES[name](la.basis)), r"basis|directions|dtype")


@pytest.mark.parametrize("override", [False, True])
def test_a_model_that_has_changed_since_is_told(override):
    la = fitted(data=la_data())
    H, n = la.H.clone(), la.n_data
    la.model[0].bias.data.add_(0.1)
    with pytest.raises(ValueError, match=r"model|weights|changed"):
        la.fit(Untouchable(), override=False) if override else la.forget(Untouchable())
    assert torch.equal(la.H, H)
    assert la.n_data == n
    la.fit(la_data())  # anew is another matter


@pytest.mark.parametrize("other", [None, 3, {}])
def test_what_is_no_fitted_estimator_is_not_merged(other):
    la = fitted()
    refused(la, lambda: la.merge(other), r".", (ValueError, TypeError))
    refused(la, lambda: la.merge(la), "itself")
    refused(la, lambda: la.merge(build()), r".", AttributeError)
    for act in (lambda: build().merge(la), lambda: build().forget(Untouchable())):
        with pytest.raises(AttributeError):
            act()


APPROXIMATE = {
    "sample": ({"curvature_size": 11}, {}),
    "sampled labels": ({"curvature": "mc"}, {}),
    "sampled labels, streamed": ({"curvature": "mc", "curvature_size": None}, {}),
    "sampled labels, merged": ({}, {}),
    "scaled": ({}, {"n_total": 200}),
    "early stop": ({"temperature": None}, {"val_loader": [(X, mlp()(X).argmin(1))]}),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_an_approximate_curvature_forgets_nothing(name):
    options, fit_options = APPROXIMATE[name]
    la, exact = build(**options), build()
    la.fit(la_data(), **fit_options)
    if "merged" in name:
        sampled = build(curvature="mc")
        sampled.fit(la_data(), basis=la.basis)
        la.merge(sampled)
    refused(la, lambda: la.forget(la_data()[:1]), r".")
    exact.fit(la_data())
    exact.forget(la_data()[:1])  # exact so far
    if name == "scaled":
        exact.fit(la_data(), override=False, n_total=100)
        refused(exact, lambda: exact.forget(la_data()[:1]), r".")


def test_what_cannot_be_forgotten(kind):
    la = kind.build()
    la.fit(kind.data(1))
    (x, y), *_ = kind.data(1)

    def ends():
        yield x, y
        raise OSError("disk")

    data = kind.data(1)
    for wrong in (data, data + data[:1], cycle(data), [(x, y[:-1])], [3], []):
        refused(la, lambda d=wrong: la.forget(d), r".")
    refused(la, lambda: la.forget([(x, y), (x * math.nan, y)]), "NaN")
    refused(la, lambda: la.forget(ends()), "disk", OSError)
