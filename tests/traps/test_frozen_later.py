"""Flags, dtypes and devices of a model that change once there is an estimator."""

from __future__ import annotations

import pytest
import torch
from calls import PREDICTIONS, error
from helpers import (
    Snapshot,
    as_tuple,
    assert_same,
    build,
    fitted,
    inputs,
    loader,
    targets,
    train_loader,
    val_loader,
)
from laplace.curvature import AsdlGGN, BackPackGGN
from models import C, Checkpointed, H, mlp, partly_frozen_mlp
from torch import nn

from laplace_ella import NystromGGN

X = inputs(7, seed=5)
F32, F64 = torch.float32, torch.float64


def freeze(model):
    model.eval().requires_grad_(False)


def unfreeze(model):
    model.requires_grad_(True)


# name: (model, what is done to it after the fit)
CHANGES = {
    "frozen for serving": (mlp, freeze),
    "partly frozen": (mlp, lambda model: model[2].requires_grad_(False)),
    "frozen though part of it was": (partly_frozen_mlp, freeze),
    "unfrozen": (partly_frozen_mlp, unfreeze),
}
of_every_change = pytest.mark.parametrize("change", CHANGES)


def more_data():
    return loader(inputs(5, seed=8), targets("classification", 5))


def added(la):
    la.fit(more_data(), override=False)
    return la.H, la(X)


def forgotten(la):
    la.forget(loader(inputs()[:5], targets("classification")[:5]))
    return la.H, la(X)


def saved_and_loaded(la):
    la.load_state_dict(la.state_dict())
    return la(X)


def searched(la):
    la.optimize_prior_precision(method="gridsearch", val_loader=val_loader(), link_approx="mc", n_samples=8)
    return la.prior_precision, torch.tensor(la.temperature), la(X, link_approx="mc")


def by_evidence(la):
    prior = torch.tensor([0.7], dtype=F64, requires_grad=True)
    value = la.log_marginal_likelihood(prior)
    return value.detach(), torch.autograd.grad(value, prior)[0]


USES = {
    **{name: lambda la, call=call: call(la, X) for name, call in PREDICTIONS.items()},
    "error": lambda la: error(la, X),
    "search": searched,
    "gradient of the evidence": by_evidence,
    "state": saved_and_loaded,
    "add": added,
    "forget": forgotten,
}


def estimator(make, **kwargs):
    return fitted(model=make(), curvature_size=None, **{"temperature": None, **kwargs})


@pytest.mark.filterwarnings("ignore::UserWarning")
@of_every_change
def test_what_is_done_with_a_fitted_estimator_goes_on(change):
    make, alter = CHANGES[change]
    expected, la = estimator(make), estimator(make)
    alter(la.model)
    flags = [p.requires_grad for p in la.model.parameters()]
    for name, use in USES.items():  # those that change it come last
        for ours, theirs in zip(as_tuple(use(la)), as_tuple(use(expected)), strict=True):
            assert torch.equal(ours, theirs), name
        assert [p.requires_grad for p in la.model.parameters()] == flags
        assert all(p.grad is None for p in la.model.parameters())


@pytest.mark.parametrize("autodiff", ["forward", "double", "reverse"])
@pytest.mark.parametrize("residual", ["isotropic", "exact"])
@of_every_change
def test_in_every_mode_and_with_a_residual(change, residual, autodiff):
    make, alter = CHANGES[change]
    expected, la = (estimator(make, residual=residual, autodiff=autodiff) for _ in range(2))
    alter(la.model)
    assert_same(la(X, link_approx="mc"), expected(X, link_approx="mc"))
    assert_same(la.novelty(X), expected.novelty(X))


@of_every_change
def test_merging(change):
    make, alter = CHANGES[change]
    la, expected = estimator(make), estimator(make)
    other = build(model=make(), curvature_size=None, temperature=None)
    other.fit(more_data(), basis=la.basis)
    alter(la.model)
    for each in (la, expected):
        each.merge(other)
    assert_same(la.H, expected.H)


@pytest.mark.parametrize("backend", [None, AsdlGGN, BackPackGGN])
def test_a_model_frozen_for_serving_can_be_fitted_again(backend):
    la, expected, early = fitted(backend=backend), fitted(backend=backend), build(backend=backend)
    freeze(la.model)
    freeze(early.model)  # between building and fitting
    for each in (la, expected, early):
        each.fit(loader(inputs(11, seed=8), targets("classification", 11)))
    assert_same(la(X), expected(X))
    assert_same(early(X), expected(X))


@pytest.mark.parametrize("change", ["partly frozen", "unfrozen"])
def test_a_fit_over_other_weights_than_at_construction_is_refused(change):
    make, alter = CHANGES[change]
    la, unfitted = fitted(model=make()), build(model=make())
    before = Snapshot(la, X)
    for each in (la, unfitted):
        alter(each.model)
        with pytest.raises(ValueError, match="require grad are not those"):
            each.fit(train_loader())
    before.check()


def test_other_weights_under_the_same_names_are_refused_unless_they_fit():
    la, expected = build(), fitted(model=mlp(seed=3))
    la.model[0], la.model[2] = mlp(seed=3)[0], mlp(seed=3)[2]
    la.fit(train_loader())
    assert_same(la(X), expected(X))
    assert torch.equal(la.mean, expected.mean)
    la.model[2] = nn.Linear(H, C + 1, dtype=F64)
    with pytest.raises(ValueError, match="require grad are not those"):
        la.fit(train_loader())


@pytest.mark.filterwarnings("ignore:This model:UserWarning", "ignore:None of the inputs:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")  # of checkpoints in torch 2.4
def test_parameters_unfrozen_later_get_no_gradients():
    torch.manual_seed(0)
    model = Checkpointed(use_reentrant=True).double()
    model.block[0].bias.requires_grad_(False)
    la = fitted(model=model, n_eigenvalues=3)
    before = la(X)
    unfreeze(la.model)
    assert_same(la(X), before)
    assert all(p.grad is None for p in la.model.parameters())


@pytest.mark.parametrize("autodiff", ["forward", "double", "reverse"])
def test_gradients_reach_the_inputs_only(autodiff):
    la = fitted("regression", model=partly_frozen_mlp(), enable_backprop=True, autodiff=autodiff)
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(la(x)[1].sum(), x)
    for alter in (unfreeze, freeze):
        alter(la.model)
        la(x)[1].sum().backward()
        assert torch.equal(x.grad, expected)
        assert all(p.grad is None for p in la.model.parameters())
        x.grad = None


def test_a_saved_estimator_is_loaded_before_or_after_freezing(tmp_path):
    expected = fitted()
    torch.save(expected.state_dict(), tmp_path / "la.pt")
    for frozen_first in (True, False):
        la = build()
        if frozen_first:
            freeze(la.model)
        la.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
        freeze(la.model)
        assert_same(la(X), expected(X))
    said = r"before the estimator is built; for serving, they may be frozen again"
    with pytest.raises(ValueError, match=said):
        build(model=la.model)


def test_a_backend_used_alone_settles_its_weights_too():
    model = mlp()
    backend, expected = NystromGGN(model, "classification"), NystromGGN(mlp(), "classification")
    basis = fitted().basis
    freeze(model)
    assert_same(backend.features(X, basis), expected.features(X, basis))


def of_dtype(dtype, **options):
    return fitted(model=mlp(dtype=dtype), data=train_loader(dtype=dtype), **options)


@pytest.mark.parametrize(("before", "after"), [(F32, F64), (F64, torch.float16)])
def test_another_dtype_after_the_fit_is_refused_by_name(before, after):
    la, other = of_dtype(before), of_dtype(before)
    la.model.to(after)
    uses = {
        **USES,
        "add": lambda la: la.fit(train_loader(dtype=after), override=False),
        "forget": lambda la: la.forget(train_loader(dtype=after)),
        "merge": lambda la: la.merge(other),
    }
    for name, use in uses.items():
        with pytest.raises(ValueError, match=f"{before}.*{after}") as caught:
            use(la)
        assert name == "merge" or "model.to" in str(caught.value)


def test_back_in_its_dtype_a_model_predicts_as_before():
    la = of_dtype(F32, residual="isotropic")
    before = Snapshot(la, X.float())
    la.model.double()
    la.model.float()
    before.check()


def test_a_model_in_another_dtype_is_fitted_anew():
    la = of_dtype(F32)
    la.model.double()
    la.fit(train_loader())
    expected = fitted(model=mlp(dtype=F32).double())
    assert_same(la(X), expected(X))
    assert la.log_marginal_likelihood() == expected.log_marginal_likelihood()
    assert la.prior_precision.dtype == F64
    with pytest.warns(UserWarning, match="converted to"):
        la.fit(train_loader(dtype=F32))  # what was found out in one dtype is not taken for another
    assert la.features(X)[0].dtype == F64


@pytest.mark.parametrize("residual", ["none", "isotropic"])
def test_no_tensor_stays_where_the_model_was(residual):
    la = fitted(residual=residual)
    la(X)  # caches what it makes
    la.model.to("meta")
    found = [la.posterior_precision]  # what is used follows the model
    found += [la.H, la.mean, la.prior_precision, la.sigma_noise, la.prior_precision_diag]
    found += [torch.as_tensor(la.loss), la.basis.eigenvalues, *la.basis.directions.values()]
    found += [G for _, G in la.snapshots]
    assert all(t.is_meta for t in found)
