"""Data that come and go: samples of them, parts that are added, merged and taken away, loaders of every kind."""

from __future__ import annotations

import math
import multiprocessing
import tempfile
from dataclasses import replace
from itertools import count, cycle
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from helpers import (
    C,
    D,
    DictModel,
    H,
    K,
    M,
    N,
    Snapshot,
    as_tuple,
    assert_same,
    build,
    dict_batches,
    fitted,
    inputs,
    mlp,
    targets,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

from laplace_ella import ELLALaplace, NystromBasis

SIZE = 5
X = inputs(11, seed=7)
L = 2

# Tuning of a few weights on a few random labels.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The best (prior_precision|temperature)",
    "ignore:No setting predicts better than the network itself",
    "ignore:.*validation inputs",
    "ignore:curvature='mc' estimates G",
    "ignore:(subsample_size|n_eigenvalues) was reduced",
)


def positions_model(dtype=torch.float64):
    """Outputs (B, L, C) for inputs (B, L, D)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C)).to(dtype)


class Kind:
    """A likelihood, a model for it, and data."""

    def __init__(self, likelihood, positions=False, **options):
        self.likelihood, self.positions, self.options = likelihood, positions, options

    def __repr__(self):
        return self.likelihood + (" at positions" if self.positions else "")

    def model(self):
        return positions_model() if self.positions else mlp()

    def build(self, model=None, **options):
        options = {"curvature_size": None, **self.options, **options}
        return build(self.likelihood, self.model() if model is None else model, **options)

    def data(self, seed, n=N, size=SIZE):
        generator = torch.Generator().manual_seed(seed)
        shape = (n, L) if self.positions else (n,)
        x = torch.randn(*shape, D, generator=generator, dtype=torch.float64)
        if self.likelihood == "classification":
            y = torch.randint(C, shape, generator=generator)
        else:
            y = torch.randn(*shape, C, generator=generator, dtype=torch.float64)
            y = (y > 0).double() if self.likelihood == "bernoulli" else y
        return list(zip(x.split(size), y.split(size)))


KINDS = [
    Kind("classification"),
    Kind("regression", sigma_noise=0.6),
    Kind("bernoulli"),
    Kind("classification", positions=True),
    Kind("regression", positions=True, sigma_noise=0.6),
    Kind("bernoulli", positions=True),
]
SIZES = (None, 11, 2000)


@pytest.fixture(params=KINDS, ids=repr)
def kind(request):
    return request.param


def assert_same_posterior(la, expected, rtol=1e-9):
    for name in ("H", "loss", "posterior_covariance", "posterior_precision"):
        assert_close(getattr(la, name), getattr(expected, name), rtol, name=name)
    for name in ("n_data", "n_curvature", "n_predictions", "n_outputs"):
        assert getattr(la, name) == getattr(expected, name), name
    assert_close(la.log_marginal_likelihood(), expected.log_marginal_likelihood(), rtol)
    x = torch.randn(7, L, D, dtype=torch.float64) if getattr(la.model[0], "in_features", 0) == 0 else X
    for a, b in zip(as_tuple(la(x)), as_tuple(expected(x)), strict=True):
        assert_close(a, b, rtol)
    for k, v in expected.basis.directions.items():
        assert torch.equal(la.basis.directions[k], v)


class Counting:
    """A loader that counts how often it was read, and how many batches it was asked for."""

    def __init__(self, data):
        self.data, self.reads, self.asked = data, 0, 0

    def __iter__(self):
        self.reads += 1
        for batch in self.data:
            self.asked += 1
            yield batch


class Calls(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


class Untouchable:
    def __iter__(self):
        raise AssertionError("the loader was read")


def refused(la, action, match, error=ValueError):
    """Require an error that leaves the estimator as it was, bit for bit."""
    before = Snapshot(la, X[:, None].expand(-1, L, -1) if la.n_predictions > la.n_data else X)
    snapshots = [(n, G.clone()) for n, G in la.snapshots]
    plain = (la.n_curvature, la.n_predictions, la._fingerprint, la.fit_history_)
    basis = la.basis
    with pytest.raises(error, match=match) as caught:
        action()
    before.check()
    assert la.basis is basis
    assert plain == (la.n_curvature, la.n_predictions, la._fingerprint, la.fit_history_)
    assert [n for n, _ in snapshots] == [n for n, _ in la.snapshots]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(snapshots, la.snapshots, strict=True))
    return str(caught.value)


# ---------------------------------------------------------------------------- a basis that is given


@pytest.mark.parametrize("size", SIZES)
def test_a_basis_takes_the_place_of_landmarks(kind, size):
    first, second = kind.build(curvature_size=size), kind.build(curvature_size=size)
    first.fit(kind.data(1))
    assert second.fit(kind.data(1), basis=first.basis) is None
    assert torch.equal(second.basis.eigenvalues, first.basis.eigenvalues)
    assert_same_posterior(second, first)
    third = kind.build(curvature_size=size)
    third.fit(kind.data(2), basis=first.basis)
    fourth = kind.build(curvature_size=size)
    fourth.fit(kind.data(2))
    assert not torch.equal(third.basis.directions["0.weight"], fourth.basis.directions["0.weight"])
    assert third.basis.rank == first.basis.rank
    assert (third.H - first.H).abs().max() > 1e-3 * first.H.abs().max()


def test_a_basis_saves_the_gradients_of_landmarks():
    la = fitted(model=Calls(mlp()))
    again = build(model=Calls(mlp()))
    again.fit(list(la_data()))
    with_landmarks = again.model.calls
    given = build(model=Calls(mlp()))
    given.backend.build_basis = lambda *args, **kwargs: pytest.fail("a basis is built")
    given.fit(list(la_data()), basis=la.basis)
    assert given.model.calls < with_landmarks


def la_data():
    return KINDS[0].data(1)


def test_a_basis_is_not_copied_nor_changed():
    la = fitted()
    before = {k: v.clone() for k, v in la.basis.directions.items()}
    other = build()
    other.fit(la_data(), basis=la.basis)
    other.fit(la_data(), override=False)
    for k, v in before.items():
        assert torch.equal(la.basis.directions[k], v)


def test_a_basis_cut_to_its_leading_directions():
    la = fitted()
    cut, whole = build(), build()
    cut.fit(la_data(), basis=la.basis.leading(K))
    whole.fit(la_data(), basis=la.basis)
    assert cut.basis.rank == K
    assert_close(cut.H, whole.H[:K, :K])


def test_a_basis_with_landmarks_or_with_data_that_are_added_is_refused():
    la = fitted()
    landmarks = inputs(M), torch.arange(M) % C
    refused(la, lambda: la.fit(Untouchable(), basis=la.basis, landmarks=landmarks), "basis")
    refused(la, lambda: la.fit(Untouchable(), override=False, basis=la.basis), "basis")


def wrong_shape(basis):
    directions = dict(basis.directions)
    directions["0.weight"] = directions["0.weight"].transpose(1, 2)
    return replace(basis, directions=directions)


def missing_weight(basis):
    return replace(basis, directions={k: v for k, v in basis.directions.items() if k != "0.bias"})


def of_another_model(basis):
    del basis
    return fitted(model=mlp(4), data=KINDS[0].data(1)).basis


def too_few_directions(basis):
    directions = {k: v[:-1] if k == "0.bias" else v for k, v in basis.directions.items()}
    return replace(basis, directions=directions)


def eigenvalues_only(basis):
    return replace(basis, eigenvalues=basis.eigenvalues[:-1])


@pytest.mark.parametrize(
    "change", [wrong_shape, missing_weight, of_another_model, too_few_directions, eigenvalues_only]
)
def test_a_basis_that_does_not_fit_the_model_is_refused(change):
    la = fitted()
    basis = change(la.basis)
    assert isinstance(basis, NystromBasis)
    refused(la, lambda: la.fit(Untouchable(), basis=basis), r"basis|directions")


@pytest.mark.parametrize("basis", [{}, 3, "basis", torch.zeros(3)])
def test_what_is_no_basis_is_refused(basis):
    la = fitted()
    refused(la, lambda: la.fit(Untouchable(), basis=basis), "basis")


# ---------------------------------------------------------------------------- data that are added


def test_added_data_are_those_of_one_fit(kind):
    la, whole = kind.build(), kind.build()
    la.fit(kind.data(1))
    whole.fit(kind.data(1) + kind.data(2), basis=la.basis)
    la.fit(kind.data(2), override=False)
    assert_same_posterior(la, whole)
    assert len(la.snapshots) == 1
    assert_close(la.snapshots[0][1], la.H)
    la.fit(kind.data(3), override=False)
    whole.fit(kind.data(1) + kind.data(2) + kind.data(3), basis=la.basis)
    assert_same_posterior(la, whole)


@pytest.mark.parametrize("curvature", ["exact", "mc"])
def test_adding_without_a_fit_before_is_a_fit(curvature):
    la, other = build(curvature=curvature), build(curvature=curvature)
    la.fit(la_data(), override=False)
    other.fit(la_data())
    assert torch.equal(la.H, other.H)
    assert len(la.snapshots) == len(other.snapshots) > 1


def test_data_that_cannot_be_added_leave_the_estimator_as_it_was(kind):
    la = kind.build()
    la.fit(kind.data(1))
    x, y = kind.data(2)[0]
    broken = [*kind.data(2), (x * math.nan, y)]
    refused(la, lambda: la.fit(broken, override=False), "NaN")
    refused(la, lambda: la.fit([], override=False), "no data")


# ---------------------------------------------------------------------------- merge


def two(kind, **options):
    """Return two estimators of one model and one basis, with data of their own."""
    model = kind.model()
    la, other = kind.build(model, **options), kind.build(model, **options)
    la.fit(kind.data(1))
    other.fit(kind.data(2), basis=la.basis)
    return la, other


@pytest.mark.parametrize("size", SIZES)
def test_merging_is_adding(kind, size):
    la, other = two(kind, curvature_size=size)
    added = kind.build(la.model, curvature_size=size)
    added.fit(kind.data(1))
    added.fit(kind.data(2), override=False)
    before = [la.H.clone(), other.H.clone()]
    untouched = Snapshot(other, kind.data(9)[0][0])
    assert la.merge(other) is None
    untouched.check()
    assert torch.equal(other.H, before[1])
    assert_close(la.H, before[0] + before[1])
    if size != 11:  # else other inputs are drawn, as positions go on
        assert_same_posterior(la, added)
    assert (la.n_data, la.n_curvature) == (added.n_data, added.n_curvature)
    assert la.n_predictions == added.n_predictions
    assert_close(la.loss, added.loss)
    assert [n for n, _ in la.snapshots] == [la.n_curvature]
    assert torch.equal(la.snapshots[0][1], la.H)


def test_merging_many_parts_in_any_order(kind):
    model = kind.model()
    first = kind.build(model)
    first.fit(kind.data(1))
    parts = []
    for seed in (2, 3, 4):
        part = kind.build(model)
        part.fit(kind.data(seed, n=7 + seed), basis=first.basis)
        parts.append(part)
    whole = kind.build(model)
    whole.fit(
        [b for seed in (1, 2, 3, 4) for b in kind.data(seed, n=7 + seed if seed > 1 else N)],
        basis=first.basis,
    )
    copy = kind.build(model)
    copy.fit(kind.data(1), basis=first.basis)
    for part in parts:
        first.merge(part)
    for part in parts[::-1]:
        copy.merge(part)
    assert_same_posterior(first, whole)
    assert_same_posterior(copy, whole)


def test_a_merged_estimator_can_go_on(tmp_path):
    kind = KINDS[0]
    la, other = two(kind)
    la.merge(other)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    restored = kind.build(la.model)
    restored.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    restored.merge(other)
    la.merge(other)
    assert torch.equal(restored.H, la.H)
    assert la.n_data == 3 * N
    la.fit(kind.data(5), override=False)
    la.forget(kind.data(5))
    assert_same_posterior(la, restored)
    la.optimize_prior_precision(n_steps=3)


def test_merging_does_not_keep_what_belonged_to_the_posterior_before():
    la, other = two(KINDS[0])
    before = la(X)
    la.calibrate_novelty(KINDS[0].data(8))
    la.merge(other)
    assert not torch.equal(la(X), before)
    added = KINDS[0].build(la.model)
    added.fit(KINDS[0].data(1))
    added.fit(KINDS[0].data(2), override=False)
    assert_close(la.novelty(X), added.novelty(X))  # not calibrated any more


def nudged():
    model = mlp()
    with torch.no_grad():
        model[2].bias[0] += 1e-9
    return model


DIFFERENT = {
    "basis": ({"seed": 5}, "basis|directions"),
    "rank": ({"n_eigenvalues": 3}, "basis|directions"),
    "model": ({"model": nudged}, "model"),
    "temperature": ({"temperature": 2.0}, "temperature"),
    "prior_precision": ({"prior_precision": 3.0}, "prior_precision"),
    "prior_precision of layers": ({"prior_precision": torch.arange(1.0, 5.0)}, "prior_precision"),
    "prior_mean": ({"prior_mean": 0.1}, "prior_mean"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_not_merged(name):
    changes, message = DIFFERENT[name]
    changes = dict(changes)
    la = fitted()
    other = build(model=changes.pop("model", mlp)(), **changes)
    same_basis = name not in ("basis", "rank")
    basis = replace(la.basis, of_model=None)  # else that of another model is refused here already
    other.fit(la_data(), **({"basis": basis} if same_basis else {}))
    theirs = Snapshot(other, X)
    refused(la, lambda: la.merge(other), message)
    theirs.check()


def test_other_noise_or_likelihood_is_not_merged():
    la, other = two(KINDS[1])
    other.sigma_noise = 0.7
    refused(la, lambda: la.merge(other), "sigma_noise")
    counts = Kind("bernoulli").build(la.model)
    counts.fit(Kind("bernoulli").data(2), basis=la.basis)
    refused(la, lambda: la.merge(counts), "likelihood")


def test_a_model_that_has_changed_since_is_not_merged():
    """The basis belongs to the weights at the fit."""
    la, other = two(KINDS[0])
    after = fitted(model=mlp(seed=3))
    refused(la, lambda: la.merge(after), "model|basis|directions")
    assert other.H is not None


def test_merging_needs_two_fits():
    la = fitted()
    refused(la, lambda: la.merge(build()), r".", AttributeError)
    with pytest.raises(AttributeError):
        build().merge(la)


def test_merging_in_inference_mode_leaves_tensors_that_a_graph_can_save():
    la, other = two(KINDS[1])
    with torch.inference_mode():
        la.merge(other)
    assert not la.H.is_inference()
    assert not la.loss.is_inference()
    prior, sigma = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.6))
    la.log_marginal_likelihood(prior, sigma).backward()
    assert sigma.grad.isfinite()


def test_the_history_is_that_of_what_was_merged_and_forgotten():
    la, other = two(KINDS[0])
    la.merge(other)
    assert la.fit_history_ == {"processed_examples": [float(la.n_curvature)], "val_nll": []}
    la.forget(KINDS[0].data(2))
    assert la.fit_history_ == {"processed_examples": [float(N)], "val_nll": []}


def test_data_are_not_added_at_other_weights():
    la = build()
    la.fit(la_data())
    H, n = la.H.clone(), la.n_data
    with torch.no_grad():
        la.model[0].bias.add_(0.1)
    with pytest.raises(ValueError, match="changed since the fit"):
        la.fit(Untouchable(), override=False)
    assert torch.equal(la.H, H)
    assert la.n_data == n
    la.fit(la_data())  # anew is another matter


def test_an_estimator_is_not_merged_with_itself():
    la = fitted()
    refused(la, lambda: la.merge(la), "itself")


def test_a_basis_of_another_dtype_is_refused():
    la, other = fitted(), build(model=mlp(dtype=torch.float32))
    x, y = inputs(dtype=torch.float32), targets("classification")
    with pytest.raises(ValueError, match="dtype"):
        other.fit([(x, y)], basis=la.basis)
    assert other.H is None


@pytest.mark.parametrize("other", [None, 3, "la", {}])
def test_what_is_no_estimator_is_not_merged(other):
    la = fitted()
    refused(la, lambda: la.merge(other), r".", (ValueError, TypeError))


# ---------------------------------------------------------------------------- forget


@pytest.mark.parametrize("size", [None, 2000])
def test_forgetting_undoes_adding(kind, size):
    la, kept = kind.build(curvature_size=size), kind.build(curvature_size=size)
    la.fit(kind.data(1) + kind.data(2))
    kept.fit(kind.data(1), basis=la.basis)
    loader = Counting(kind.data(2, size=4))
    assert la.forget(loader) is None
    assert loader.reads == 1
    assert_same_posterior(la, kept)
    assert torch.equal(la.snapshots[-1][1], la.H)
    la.fit(kind.data(2), override=False)
    kept.fit(kind.data(2), override=False)
    assert_same_posterior(la, kept)


def test_forgetting_in_parts_and_again(kind):
    la, kept = kind.build(), kind.build()
    la.fit(kind.data(1) + kind.data(2))
    kept.fit(kind.data(1)[:2], basis=la.basis)
    for batch in kind.data(2) + kind.data(1)[2:]:
        la.forget([batch])
    assert la.n_data == 2 * SIZE
    assert_same_posterior(la, kept, rtol=1e-8)


def test_forgetting_runs_the_model_in_evaluation_mode_and_once():
    model = Calls(
        nn.Sequential(nn.Linear(D, H), nn.Dropout(0.5), nn.Tanh(), nn.Linear(H, C)).double()
    ).train()
    la = build(model=model)
    la.fit(la_data())
    model.calls = 0
    la(la_data()[0][0])
    of_one_batch = model.calls
    model.calls = 0
    la.forget(la_data()[:2])
    assert model.calls <= 2 * of_one_batch + 2
    assert model.training


def test_forgetting_is_seen_by_predictions_at_once():
    la, kept = build(), build()
    la.fit(la_data())
    kept.fit(la_data()[:2], basis=la.basis)
    before = la(X)
    la.calibrate_novelty(la_data())
    la.forget(la_data()[2:])
    assert not torch.equal(la(X), before)
    assert_close(la(X), kept(X))
    assert_close(la.novelty(X), kept.novelty(X))


def test_forgetting_from_a_restored_estimator(tmp_path):
    la = build()
    la.fit(la_data())
    other = build()
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    for estimator in (la, other):
        estimator.forget(la_data()[:1])
    assert torch.equal(la.H, other.H)
    assert torch.equal(la.loss, other.loss)


APPROXIMATE = {
    "sample": ({"curvature_size": 11}, {}),
    "sampled labels": ({"curvature": "mc"}, {}),
    "sampled labels, streamed": ({"curvature": "mc", "curvature_size": None}, {}),
    "scaled": ({}, {"n_total": 200}),
    "scaled, streamed": ({"curvature_size": None}, {"n_total": 200}),
}


@pytest.mark.parametrize("name", APPROXIMATE)
def test_an_approximate_curvature_forgets_nothing(name):
    options, fit_options = APPROXIMATE[name]
    la = build(**options)
    la.fit(la_data(), **fit_options)
    refused(la, lambda: la.forget(la_data()[:1]), r".")


def test_an_approximate_part_that_was_added_forgets_nothing():
    la = build(curvature_size=11)
    la.fit(la_data()[:2])
    la.forget(la_data()[:1])  # exact so far
    la.fit(la_data(), override=False)
    refused(la, lambda: la.forget(la_data()[:1]), r".")
    la = build()
    la.fit(la_data())
    la.fit(la_data(), override=False, n_total=100)
    refused(la, lambda: la.forget(la_data()[:1]), r".")


def test_sampled_labels_that_were_merged_forget_nothing():
    """The counts of a sum of exact and sampled parts are those of an exact one."""
    la, sampled, exact = build(), build(curvature="mc"), build()
    la.fit(la_data())
    sampled.fit(KINDS[0].data(2), basis=la.basis)
    exact.fit(la_data() + KINDS[0].data(2), basis=la.basis)
    try:
        la.merge(sampled)
    except ValueError as error:
        assert "curvature" in str(error)  # noqa: PT017
    else:
        assert (la.H - exact.H).norm() > 1e-3 * exact.H.norm()
        refused(la, lambda: la.forget(la_data()[:1]), r".")


def test_an_early_stop_forgets_nothing():
    la = build(temperature=None)
    labels = la.model(inputs(17, seed=3)).argmin(1)
    la.fit(la_data(), val_loader=[(inputs(17, seed=3), labels)])
    assert la.n_curvature < la.n_data
    refused(la, lambda: la.forget(la_data()[:1]), r".")


def test_nothing_is_forgotten_if_no_data_would_remain(kind):
    la = kind.build()
    la.fit(kind.data(1))
    refused(la, lambda: la.forget(kind.data(1)), r".")
    refused(la, lambda: la.forget(kind.data(1) + kind.data(1)[:1]), r".")
    refused(la, lambda: la.forget(cycle(kind.data(1))), r".")


def test_data_that_were_never_added_are_not_forgotten(kind):
    """Where they say more of a direction than all that was added, G would be indefinite."""
    la = kind.build()
    la.fit(kind.data(1))
    others = kind.data(2, n=N - 1)
    kept = kind.build(la.model)
    kept.fit(others, basis=la.basis)
    assert torch.linalg.eigvalsh(la.H - kept.H).min() < -1e-3 * torch.linalg.eigvalsh(la.H).max()
    refused(la, lambda: la.forget(others), r".")


@pytest.mark.parametrize(("share", "refused"), [(1e-6, True), (1e-12, True), (1e-15, False)])
def test_what_rounding_does_not_explain_is_refused(share, refused):
    """In float64 a remainder may be negative by 100 eps of the largest eigenvalue, and no more."""
    kind = KINDS[1]
    la, part = kind.build(), kind.build()
    la.fit(kind.data(1))
    part.fit(kind.data(1)[:2], basis=la.basis)
    values, vectors = torch.linalg.eigh(la.H)
    values[0] = -share * values[-1]
    la.H = part.H + vectors @ values.diag() @ vectors.T
    if refused:
        with pytest.raises(ValueError, match="not among those"):
            la.forget(kind.data(1)[:2])
    else:
        la.forget(kind.data(1)[:2])
        assert torch.linalg.eigvalsh(la.H)[0] > -1e-16 * values[-1]


def test_forgetting_twice_is_refused():
    kind = KINDS[1]
    la = kind.build(n_eigenvalues=K)
    la.fit(kind.data(1, n=11, size=1))
    la.forget(kind.data(1, n=11, size=1)[:9])
    refused(la, lambda: la.forget(kind.data(1, n=11, size=1)[:1]), r".")


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[2]], ids=repr)
def test_a_loss_below_zero_is_refused(kind):
    """The curvature is that of inputs that were fitted, only the targets are others."""
    la = kind.build()
    with torch.no_grad():
        la.model[2].weight.mul_(20)
    la = kind.build(la.model)
    data = kind.data(1)
    f = [la.model(x).detach() for x, _ in data]
    if kind.likelihood == "classification":
        right, wrong = [out.argmax(1) for out in f], [out.argmin(1) for out in f]
    elif kind.likelihood == "bernoulli":
        right, wrong = [(out > 0).double() for out in f], [(out < 0).double() for out in f]
    else:
        right, wrong = f, [out + 3 for out in f]
    la.fit([(x, y) for (x, _), y in zip(data, right)])
    refused(la, lambda: la.forget([(data[0][0], wrong[0])]), "loss|likelihood")
    la.forget([(data[0][0], right[0])])


@pytest.mark.parametrize("seed", range(3))
def test_rounding_of_what_was_forgotten_first_is_no_obstacle(seed):
    """Labels that were wrong make nearly all of the loss; in float32, what rounding leaves of it is more than the rest."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, 10)).requires_grad_()
    with torch.no_grad():
        model[0].weight.mul_(5)
        model[2].weight.mul_(60)
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
    torch.save(la.state_dict(), (path := Path(tempfile.mkdtemp()) / "la.pt"))
    restored = build(model=model, subsample_size=50, curvature_size=None)
    restored.load_state_dict(torch.load(path, weights_only=True))
    for estimator in (la, restored):
        estimator.forget(list(zip(x[20:60].split(7), y[20:60].split(7))))
        estimator.forget(list(zip(x[60:90].split(7), y[60:90].split(7))))
        assert estimator.n_data == 10
    refused_later = list(zip(x[90:95], wrong[90:95]))
    with pytest.raises(ValueError, match="loss"):
        la.forget([(x[None], y[None]) for x, y in refused_later])


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
    assert (la.H - kept.H).norm() < tolerance * la._largest_sums[0]
    assert torch.linalg.eigvalsh(la.H)[0] > -1e-12 * la._largest_sums[0]
    assert la(x[:3]).isfinite().all()


def test_bad_data_are_not_forgotten(kind):
    la = kind.build()
    la.fit(kind.data(1))
    (x, y), *_ = kind.data(1)
    refused(la, lambda: la.forget([(x, y), (x * math.nan, y)]), "NaN")
    refused(la, lambda: la.forget([(x, y[:-1])]), r".")
    refused(la, lambda: la.forget([3]), r".")
    refused(la, lambda: la.forget([]), r".")

    def ends():
        yield x, y
        raise OSError("disk")

    refused(la, lambda: la.forget(ends()), "disk", OSError)


def test_forgetting_needs_a_fit_and_the_same_model():
    with pytest.raises(AttributeError):
        build().forget(Untouchable())
    la = build()
    la.fit(la_data())
    with torch.no_grad():
        la.model[0].bias.add_(0.1)
    H, loss, n = la.H.clone(), la.loss.clone(), la.n_data
    with pytest.raises(ValueError, match=r"model|weights|changed"):
        la.forget(la_data()[:1])
    assert torch.equal(la.H, H)
    assert torch.equal(la.loss, loss)
    assert la.n_data == n


def test_mapping_batches_are_forgotten():
    model = DictModel()
    la, kept = build(model=model), build(model=model)
    la.fit(dict_batches())
    kept.fit(dict_batches()[:2], basis=la.basis)
    la.forget(dict_batches()[2:])
    assert_close(la.H, kept.H)
    assert_close(la.loss, kept.loss)
    assert la.n_data == kept.n_data


# ---------------------------------------------------------------------------- max_samples


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


def test_mapping_batches_are_cut():
    model = DictModel()
    la, expected = build(model=model), build(model=model)
    la.fit(dict_batches(batch_size=5), max_samples=12)
    data = dict_batches(batch_size=5)
    expected.fit([*data[:2], {k: v[:2] for k, v in data[2].items()}])
    assert torch.equal(la.H, expected.H)
    assert la.n_data == 12


class Endless(IterableDataset):
    """Inputs without end."""

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for i in count(first, step):
            generator = torch.Generator().manual_seed(i)
            yield (
                torch.randn(D, generator=generator, dtype=torch.float64),
                int(torch.randint(C, (), generator=generator)),
            )


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


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "3", float("inf")])
@pytest.mark.parametrize("name", ["max_samples", "n_total"])
def test_a_bad_number_of_inputs_is_refused(name, n):
    la = fitted()
    refused(la, lambda: la.fit(Untouchable(), **{name: n}), name)


# ---------------------------------------------------------------------------- n_total


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


def test_a_sample_of_a_sample():
    plain, la = build(), build()
    plain.fit(la_data()[:2])
    la.fit(la_data(), max_samples=10, n_total=37)
    assert_close(la.H, 3.7 * plain.H)
    assert_close(la.loss, 3.7 * plain.loss)
    assert la.n_data == 37


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


def test_the_size_of_data_that_were_merged():
    kind = KINDS[0]
    la, other = kind.build(), kind.build()
    la.fit(kind.data(1), n_total=100)
    other.fit(kind.data(2), n_total=50, basis=la.basis)
    H = la.H + other.H
    la.merge(other)
    assert_close(la.H, H)
    assert la.n_data == 150


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


# ---------------------------------------------------------------------------- loaders of every kind


class Lines(IterableDataset):
    """The inputs of a list, dealt out to workers."""

    def __init__(self, n=N, seed=1, labelled=True):
        self.x, self.y = inputs(n, seed=seed), targets("classification", n, seed=seed + 1)
        self.labelled = labelled

    def __iter__(self):
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for i in range(first, len(self.x), step):
            yield (self.x[i], self.y[i]) if self.labelled else self.x[i]


def mapped(n=N, seed=1):
    return TensorDataset(inputs(n, seed=seed), targets("classification", n, seed=seed + 1))


class Restarting:
    """Starts a generator at every pass."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return (batch for batch in self.data)


LOADERS = {
    "iterable data set": lambda n, seed: DataLoader(Lines(n, seed), batch_size=SIZE),
    "iterable data set, workers": lambda n, seed: DataLoader(Lines(n, seed), batch_size=SIZE, num_workers=2),
    "workers": lambda n, seed: DataLoader(mapped(n, seed), batch_size=SIZE, num_workers=2),
    "persistent workers, pinned": lambda n, seed: DataLoader(
        mapped(n, seed), batch_size=SIZE, num_workers=2, persistent_workers=True, pin_memory=True
    ),
    "generators": lambda n, seed: Restarting(list(DataLoader(mapped(n, seed), batch_size=SIZE))),
    "batches of the data set": lambda n, seed: DataLoader(
        list(DataLoader(mapped(n, seed), SIZE)), batch_size=None
    ),
}
without_accelerator = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture(params=LOADERS)
def make_loader(request):
    return LOADERS[request.param]


@without_accelerator
@pytest.mark.parametrize("size", SIZES)
def test_loaders_fit_what_their_batches_do(make_loader, size):
    la, expected = build(curvature_size=size), build(curvature_size=size)
    la.fit(make_loader(N, 1))
    expected.fit(list(make_loader(N, 1)))
    assert torch.equal(la.H, expected.H)
    assert torch.equal(la.loss, expected.loss)
    la.fit(make_loader(17, 5), override=False)
    expected.fit(list(make_loader(17, 5)), override=False)
    assert torch.equal(la.H, expected.H)
    if size != 11:
        la.forget(make_loader(17, 5))
        expected.forget(list(make_loader(17, 5)))
        assert torch.equal(la.H, expected.H)


@without_accelerator
@pytest.mark.parametrize("size", [None, 11])
@pytest.mark.parametrize("n", [7, 10])
def test_loaders_that_are_stopped_early(make_loader, size, n):
    workers = len(multiprocessing.active_children())
    la, expected = build(curvature_size=size), build(curvature_size=size)
    loader = make_loader(N, 1)
    expected.fit(list(make_loader(N, 1)), max_samples=n)
    for _ in range(2):  # the same loader is read again
        la.fit(loader, max_samples=n)
        assert torch.equal(la.H, expected.H)
        assert la.n_data == n
    assert [len(y) for _, y in loader] == [len(y) for _, y in make_loader(N, 1)]
    del loader
    assert len(multiprocessing.active_children()) == workers


@without_accelerator
def test_loaders_validate_what_their_batches_do(make_loader):
    la, expected = build(temperature=None), build(temperature=None)
    la.fit(la_data(), val_loader=make_loader(17, 5))
    expected.fit(la_data(), val_loader=list(make_loader(17, 5)))
    assert la.fit_history_ == expected.fit_history_
    assert len(la.fit_history_["val_nll"]) > 1
    for estimator, val in ((la, make_loader(17, 5)), (expected, list(make_loader(17, 5)))):
        estimator.optimize_prior_precision(method="gridsearch", val_loader=val, grid_size=5)
    assert torch.equal(la.prior_precision, expected.prior_precision)
    assert la.temperature == expected.temperature
    la.optimize_prior_precision(
        "nn", "gridsearch", val_loader=make_loader(5, 5), grid_size=2, link_approx="mc", n_samples=2
    )
    expected.optimize_prior_precision(
        "nn", "gridsearch", val_loader=list(make_loader(5, 5)), grid_size=2, link_approx="mc", n_samples=2
    )
    assert torch.equal(la.prior_precision, expected.prior_precision)


@without_accelerator
def test_loaders_search_what_their_batches_do(make_loader):
    la, expected = fitted(temperature=None), fitted(temperature=None)
    found = la.optimize_hyperparameters(make_loader(17, 5), ["temperature", "logit_scale"], n_samples=8)
    other = expected.optimize_hyperparameters(
        list(make_loader(17, 5)), ["temperature", "logit_scale"], n_samples=8
    )
    assert found.best == other.best
    assert found.loss == other.loss
    assert_same(la(X), expected(X))


@without_accelerator
def test_loaders_calibrate_what_their_batches_do(make_loader):
    la, expected = fitted(), fitted()
    la.calibrate_novelty(make_loader(17, 5))
    expected.calibrate_novelty(list(make_loader(17, 5)))
    assert torch.equal(la.novelty(X), expected.novelty(X))
    assert la._novelty_reference is not None


def test_generators_that_can_be_read_once():
    la, expected = build(temperature=None), build(temperature=None)
    val = KINDS[0].data(5, n=17)
    la.fit(iter(la_data()), val_loader=iter(val))
    expected.fit(la_data(), val_loader=val)
    assert torch.equal(la.H, expected.H)
    assert la.fit_history_ == expected.fit_history_
    la.fit((b for b in la_data()), override=False)
    expected.fit(la_data(), override=False)
    la.forget(b for b in la_data()) if la.n_data == la.n_curvature else None
    for estimator, data in ((la, iter(val)), (expected, val)):
        estimator.optimize_prior_precision(method="gridsearch", val_loader=data, grid_size=3)
    assert_same(la(X), expected(X))
    la.optimize_hyperparameters(iter(val), ["temperature"], n_samples=8)
    expected.optimize_hyperparameters(val, ["temperature"], n_samples=8)
    assert_same(la(X), expected(X))
    la.calibrate_novelty(x for x, _ in val)
    expected.calibrate_novelty(val)
    assert torch.equal(la.novelty(X), expected.novelty(X))
    streamed = build(curvature_size=None)
    with pytest.raises(ValueError, match="twice"):
        streamed.fit(iter(la_data()))


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
