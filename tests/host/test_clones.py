"""Estimators built again from their attributes, copied, pickled, cloned and subclassed."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import laplace
import pytest
import torch
from helpers import (
    Snapshot,
    as_tuple,
    assert_same,
    build,
    dict_batches,
    fitted,
    inputs,
    train_loader,
    val_loader,
)
from laplace.curvature import AsdlEF, CurvlinopsGGN
from models import Applied, DictModel, Waiting, mlp, weighted
from torch import nn

import laplace_ella
from laplace_ella import ELLALaplace, NystromGGN, ReverseNystromGGN

X = inputs(11, seed=7)
P = sum(p.numel() for p in mlp().parameters())


OTHER = list(val_loader())[:3]


def rebuilt_as_lightning_uq_box_does(la):
    """All variables of the constructor's code, those that are no arguments too."""
    names = la.__init__.__code__.co_varnames
    arguments = {n: getattr(la, n) for n in names if hasattr(la, n) and n != "model"}
    return type(la)(model=copy.deepcopy(la.model), **arguments)


def rebuilt_by_signature(la):
    names = list(inspect.signature(type(la).__init__).parameters)[1:]
    return type(la)(**{n: getattr(la, n) for n in names})


def saved_and_loaded(la):
    torch.save(la, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


ATTRIBUTES = {
    "lightning-uq-box": rebuilt_as_lightning_uq_box_does,
    "signature": rebuilt_by_signature,
    "get_params": lambda la: type(la)(**la.get_params()),
}
COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda la: pickle.loads(pickle.dumps(la)),
    "torch.save": saved_and_loaded,
}
REBUILT = {**ATTRIBUTES, **COPIES, "clone": lambda la: pytest.importorskip("sklearn.base").clone(la)}
BY_PARAMS = [name for name in REBUILT if name not in ("lightning-uq-box", "signature")]
of_every_copy = pytest.mark.parametrize("name", COPIES)

SETTINGS = {
    "defaults": {},
    "numbers": {"prior_precision": 0.3, "prior_mean": 0.2, "temperature": 7.0, "logit_scale": 0.8, "seed": 5}
    | {"n_eigenvalues": 0.9, "curvature_size": None},
    "vectors": {"likelihood": "regression", "sigma_noise": torch.tensor([0.4]), "temperature": 2.0}
    | {"prior_precision": torch.arange(1.0, P + 1), "prior_mean": torch.ones(P), "enable_backprop": True},
    "residual": {"residual": "isotropic", "residual_scale": 0.1, "residual_samples": 3}
    | {"backend_kwargs": {"chunk_size": 3, "autodiff": "reverse"}},
    "computing": {"likelihood": "bernoulli", "prior_precision": torch.arange(1.0, 5), "process_group": None}
    | {"chunk_size": 2, "memory_budget": 10_000, "autodiff": "double", "spill": "cpu"}
    | {"spill_dtype": torch.float32, "curvature": "mc", "curvature_samples": 3},
    "backend": {"backend": ReverseNystromGGN, "dict_key_x": "x", "dict_key_y": "y"},
    "host's backend": {"backend": CurvlinopsGGN, "compile": True, "asdl_fisher_kwargs": {"a": 1}},
}


def estimator(name, **more):
    sizes = {"subsample_size": 13, "curvature_size": 17}  # that nothing has to be reduced
    options = {"likelihood": "classification", **sizes, **more, **SETTINGS[name]}
    return laplace_ella.Laplace(mlp(), subset_of_weights="all", hessian_structure="ella", **options)


def described(la):
    """Everything that a fit and a prediction depend on, in plain types."""
    values = {n: getattr(la, n) for n in inspect.signature(ELLALaplace.__init__).parameters if n != "self"}
    values |= {"backend": (type(la.backend), la.backend.options)}
    del values["model"]
    return {k: v.reshape(-1).tolist() if isinstance(v, torch.Tensor) else v for k, v in values.items()}


@pytest.mark.parametrize("again", REBUILT)
@pytest.mark.parametrize("name", SETTINGS)
def test_an_estimator_built_again_is_equal_and_fits_the_same(name, again):
    la = estimator(name)
    assert described(REBUILT[again](la)) == described(la)
    if name not in ("numbers", "vectors", "residual"):
        return
    la = estimator(name, n_eigenvalues=5)
    new = REBUILT[again](la)
    for each in (la, new):
        each.fit(train_loader(la.likelihood))
    assert_same((*as_tuple(new(X)), new.H), (*as_tuple(la(X)), la.H))


@pytest.mark.filterwarnings("ignore::UserWarning")  # the validation data are few
@pytest.mark.parametrize("again", ATTRIBUTES)
def test_a_fitted_estimator_built_again_is_one_before_a_fit(again):
    la = fitted(temperature=None)
    la.optimize_hyperparameters(val_loader(), ["temperature", "logit_scale"])
    assert la.temperature != 1
    before = Snapshot(la, X)
    new = REBUILT[again](la)
    assert described(new) == described(la)
    assert not new.temperature_fixed
    with pytest.raises(AttributeError, match="fit"):
        new(X)
    new.fit(train_loader())
    assert_same(new(X), la(X))
    new.fit(OTHER)
    before.check()


def test_the_constructor_is_a_plain_function_whose_variables_are_its_arguments():
    code = ELLALaplace.__init__.__code__
    named = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    assert list(named) == list(inspect.signature(ELLALaplace.__init__).parameters)
    la = fitted()
    assert not [n for n in code.co_varnames[len(named) :] if hasattr(la, n)]
    assert all(hasattr(la, n) for n in named[1:])

    class Forgetful(ELLALaplace):
        def __init__(self, model, likelihood, forgotten=1, **kwargs):
            super().__init__(model, likelihood, **kwargs)

    with pytest.raises(AttributeError, match="forgotten"):
        Forgetful(mlp(), "classification").get_params()


def test_arguments_are_kept_as_the_host_has_them_without_graphs():
    options = {"backend_kwargs": {"chunk_size": 3}, "asdl_fisher_kwargs": {"a": 1}}
    la = fitted("regression", **options)
    assert {k: getattr(la, k) for k in options} == options
    la.backend_kwargs["chunk_size"] = 7
    assert options["backend_kwargs"] == {"chunk_size": 3}
    log_prior = torch.zeros(1, requires_grad=True, dtype=torch.float64)
    la.log_marginal_likelihood(log_prior.exp()).backward()
    params = la.get_params()
    assert not params["prior_precision"].requires_grad
    assert params["backend"] is NystromGGN
    assert params["model"] is la.model


def test_temperature_is_fixed_by_a_number_unless_something_else_is_said():
    for value in (None, 3.0, 1.0):
        assert build(temperature=value).temperature_fixed is (value is not None)
        for given in (True, False):
            la = build(temperature=value, temperature_fixed=given)
            assert (la.temperature_fixed, la.temperature) == (given, value or 1.0)


def test_sizes_left_at_their_defaults_stay_defaults():
    la = laplace_ella.Laplace(mlp(), "classification", "all", "ella")
    assert {"subsample_size": None, "n_eigenvalues": None}.items() <= la.get_params().items()
    for again in BY_PARAMS:  # those by attributes read 500 and 20, as if named
        new = REBUILT[again](la)
        new.fit(train_loader())  # reduced to the data without a warning
        assert new.basis.n_landmarks <= 500


def test_a_backend_instance_gives_its_class_and_options():
    options = {"chunk_size": 3, "spill": "cpu", "spill_dtype": torch.float32}
    theirs = ReverseNystromGGN(mlp(seed=3), "regression", **options)
    la = build(backend=theirs, chunk_size=5)  # what is named comes first
    assert type(la.backend) is ReverseNystromGGN
    assert la.backend.model is la.model
    assert la.backend.likelihood == "classification"
    assert la.backend.options == {**theirs.options, "chunk_size": 5}
    theirs = laplace.Laplace(mlp(), "classification", "all", "diag").backend
    assert type(build(backend=theirs).backend) is NystromGGN
    with pytest.raises(ValueError, match="empirical Fisher"):
        build(backend=AsdlEF.__new__(AsdlEF))


class Scaled(NystromGGN):
    def __init__(self, *args, factor=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor


@pytest.mark.parametrize("again", REBUILT)
def test_a_backend_with_an_argument_of_its_own(again):
    new = REBUILT[again](build(backend=Scaled, backend_kwargs={"factor": 2.0, "chunk_size": 3}))
    assert type(new.backend) is Scaled
    assert (new.backend.factor, new.backend.engine.chunk_size) == (2.0, 3)


def used():
    """A fitted estimator whose caches are full, with a calibration."""
    la = fitted(residual="isotropic")
    la.calibrate_novelty(val_loader())
    la(X), la.novelty(X)
    return la


@pytest.mark.filterwarnings("ignore::UserWarning")
@of_every_copy
def test_a_copy_predicts_the_same_and_is_independent(name):
    la = used()
    new = COPIES[name](la)
    for options in ({}, {"link_approx": "mc"}):
        assert_same(new(X, **options), la(X, **options))
    assert_same(new.novelty(X), la.novelty(X))
    assert repr(new) == repr(la)
    assert new.backend is not la.backend
    assert (new.model is la.model) == (name == "copy")
    before, novelty, history = Snapshot(la, X), la.novelty(X), dict(la.fit_history_)
    new.fit(OTHER)
    new.prior_precision, new.temperature, new.residual = 7.0, 3.0, "none"
    new.fit(OTHER, override=False)
    new.optimize_hyperparameters(val_loader(), ["n_eigenvalues"])
    new.fit_history_["val_nll"].append(0.0)
    before.check()
    assert_same(la.novelty(X), novelty)
    assert la.fit_history_ == history


@pytest.mark.parametrize("name", ["deepcopy", "pickle"])
def test_a_deep_copy_is_of_a_model_of_its_own(name):
    la = used()
    new = COPIES[name](la)
    model = new.model
    assert new.backend.model is model
    own = [id(p) for p in model.parameters()]
    assert [id(p) for p in new.params] == own == [id(p) for p in new.backend.params]
    before = Snapshot(la, X)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    before.check()
    new.fit(train_loader())
    other = mlp()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(new(X), fitted(model=other, residual="isotropic")(X))


@of_every_copy
def test_a_copy_knows_which_entries_all_inputs_share(name):
    weights = torch.arange(1.0, 6.0).double()
    batches = [{"weights": weights, **b} for b in dict_batches()]
    la = fitted(model=Applied(weighted, DictModel()), data=batches)
    five = {k: v if k == "weights" else v[:5] for k, v in batches[0].items()}
    assert_same(COPIES[name](la)(five), la(five))


@of_every_copy
def test_copies_after_a_gradient_of_the_evidence_and_of_a_frozen_model(name):
    la = fitted("regression", prior_mean=torch.zeros((), dtype=torch.float64, requires_grad=True) * 2)
    log_prior, log_sigma = (torch.zeros(1, requires_grad=True, dtype=torch.float64) for _ in range(2))
    la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp()).backward()
    la.model.requires_grad_(False)
    new = COPIES[name](la)
    assert_same(new(X), la(X))
    assert torch.equal(new.prior_precision, la.prior_precision)
    assert name == "copy" or not new.prior_mean.requires_grad
    assert [p.numel() for p in new.params] == [p.numel() for p in la.params]


def test_a_process_group_is_shared_by_copies_and_refused_by_pickle():
    la = build()
    la.process_group = group = threading.Lock()  # no rank is asked, and nothing can copy it
    for again in (copy.copy, copy.deepcopy):
        assert again(la).process_group is group
    with pytest.raises(TypeError, match=r"process_group must be 'default' or None.*state_dict"):
        pickle.dumps(la)


def test_a_copy_waits_until_another_thread_has_put_the_weights_back():
    la = fitted(model=Waiting())
    la.model.stop()
    with ThreadPoolExecutor(2) as pool:
        pool.submit(la, X)
        assert la.model.inside.wait(30)
        copied = pool.submit(copy.deepcopy, la)
        wait([copied], 0.2)
        assert not copied.done()
        la.model.go_on.set()
        assert all(isinstance(p, nn.Parameter) for p in copied.result().model.parameters())


class Named(ELLALaplace):
    """With an argument, a fit and a call of its own."""

    _key = ("all", "named")

    def __init__(self, model, likelihood, name="a", **kwargs):
        super().__init__(model, likelihood, **kwargs)
        self.name, self.calls = name, []

    def fit(self, train_loader, **kwargs):
        self.calls.append("fit")
        super().fit(train_loader, **kwargs)

    def __call__(self, x, *args, **kwargs):
        self.calls.append("call")
        return super().__call__(x, *args, **kwargs)


def named():
    options = {"name": "b", "subsample_size": 13, "n_eigenvalues": 5}
    return laplace.Laplace(mlp(), "classification", "all", "named", **options)


def test_a_subclass_has_the_key_it_gives_itself_or_none():
    la = named()
    la.fit(train_loader())
    la.predictive(X)
    assert la.calls == ["fit", "call"]
    assert_same(la(X), fitted(temperature=None)(X))

    class Plain(ELLALaplace):
        pass

    assert Plain._key != ELLALaplace._key
    assert type(laplace.Laplace(mlp(), "classification", "all", "ella")) is ELLALaplace
    la = Plain(mlp(), "classification", subsample_size=13, n_eigenvalues=5)
    la.fit(train_loader())
    Plain(mlp(), "classification").load_state_dict(la.state_dict())


@pytest.mark.parametrize("again", BY_PARAMS)
def test_a_subclass_is_built_again_with_its_own_arguments(again):
    la = named()
    new = REBUILT[again](la)
    assert (type(new), new.name, new.subsample_size) == (Named, "b", 13)
    new.fit(train_loader())
    assert (new.calls, la.calls) == (["fit"], [])
