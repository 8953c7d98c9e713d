"""Every argument of every public method: what is wrong is said before any work, by the package itself, with the
argument's name and what was passed; the estimator stays as it was."""

from __future__ import annotations

import os
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from helpers import (
    C,
    D,
    K,
    M,
    Snapshot,
    assert_same,
    build,
    fitted,
    inputs,
    loader,
    mlp,
    targets,
    train_loader,
    val_loader,
)
from laplace.utils.enums import LinkApprox, PredType
from torch import nn

import laplace_ella
from laplace_ella import BackPackNystromGGN, ELLALaplace, NystromGGN
from laplace_ella.fitting.resume import FitFiles
from laplace_ella.parallel.ranks import ALONE

mpl.use("Agg")
NAN, INF = float("nan"), float("inf")
X = inputs(11, seed=7)
PACKAGE = str(Path(laplace_ella.__file__).parent)
P = sum(p.numel() for p in mlp().parameters())


class Counting(nn.Module):
    """Counts how often it is called."""

    def __init__(self, **kwargs):
        super().__init__()
        self.net, self.calls = mlp(**kwargs), 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


class Thing:
    """No argument takes one."""


THING = Thing()

# ------------------------------------------------------------------ values that are wrong

FLAG = ["no", "yes", None, 2, -1, 0.5, [], THING, torch.ones(2)]
SIZE = [0, -3, 1.5, 2.0, True, NAN, "3", [3], THING, torch.ones(2)]
COUNT = [-3, 1.5, True, None, NAN, INF, "3", [3], THING]
NUMBER = [NAN, INF, -INF, True, "1", [1.0], THING, 1j, torch.ones(2)]
POSITIVE = [0, 0.0, -0.5, *NUMBER]
CHOICE = ["nonsense", "", None, 3, True, ["mc"], THING, torch.ones(2), np.zeros(2)]
GENERATOR = [3, "cpu", True, THING, torch.Generator]
LOADER = [3, True, 0.5, "data", THING, lambda: None, torch.utils.data.DataLoader, {"input_ids": X}]
PRIOR = [
    *(0.0, -1.0, NAN, INF, True, "1", [], ["a"], THING, 1j, None),
    *(torch.ones(5), torch.ones(1, P), torch.ones(2, 2), torch.ones(0), torch.ones(1, dtype=torch.bool)),
    *(torch.ones(4, dtype=torch.complex64), torch.ones(4, device="meta"), torch.tensor([1.0, 2, 3, NAN])),
    *(torch.tensor([1.0, 2, 3, 0]), torch.tensor(-1)),
]
MEAN = [
    *(NAN, INF, True, "0", [0.0], ["a"], THING, 1j, None, np.zeros(P)),
    *(torch.ones(5), torch.ones(4), torch.ones(1, P), torch.ones(0), torch.zeros(1, dtype=torch.bool)),
    *(torch.zeros(P, dtype=torch.complex64), torch.zeros(P, device="meta"), torch.full((P,), NAN)),
]
NOISE = [
    *POSITIVE,
    None,
    torch.ones(1, 1),
    torch.ones(0),
    torch.tensor(NAN),
    torch.tensor(True),
    torch.tensor(1j),
]
INPUT = [None, 3, "x", X.tolist(), X.numpy(), THING, torch.tensor(1.0), (X, X)]
NO_INPUT = [v for v in INPUT if not isinstance(v, torch.Tensor)]
MODULE = [None, 3, "model", mlp, nn.Linear, nn.Linear(2, 2).state_dict(), THING]
SPILL = [3, True, "/no/such/folder", THING]
DTYPE = [None, "float32", torch.float64, torch.int8, 32]
BASIS = [3, "basis", THING, {}, NystromGGN]
FEATURES = [None, 3, "Js", torch.ones(2, 5), torch.ones(2, C, 7), torch.ones(2, C, P), X.numpy()]
KEY = [None, [], {}, ["a"]]
MAPPING = [3, "chunk_size", [1], THING, {3: 4}]
LANDMARKS = [3, "random", X, (X,), (X, None), (X, [0] * 11), (None, torch.zeros(11, dtype=torch.long)), THING]
PATH = [3, 0.5, True, "", b"file", ["a"], THING, "/no/such/folder/file", "/"]
SEED = [-1, 1.0, None, True, "0", 2**63, NAN, [0], THING]
RANK = [0, -1, 1.0, 1.5, NAN, INF, True, "3", [3], THING, torch.ones(2)]
BUDGET = [0, -1, 0.0, 1.5, NAN, INF, True, "1 GB", [3], THING]
LOSS = [3, "nll", True, [], THING]

BASE = {"subsample_size": M, "n_eigenvalues": 5, "temperature": 1.0}


def constructed(la, likelihood="classification", model=None, **options):
    ELLALaplace(mlp() if model is None else model, likelihood, **{**BASE, **options})


def of_regression(la, **options):
    constructed(la, likelihood="regression", **options)


# Argument -> (what calls with it, values that are wrong)
CONSTRUCTOR: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "model": (lambda la, model: ELLALaplace(model, "classification"), MODULE),
    "likelihood": (constructed, CHOICE),
    "sigma_noise": (of_regression, NOISE),
    "prior_precision": (constructed, PRIOR),
    "prior_mean": (constructed, MEAN),
    "temperature": (constructed, POSITIVE),
    "enable_backprop": (constructed, FLAG),
    "dict_key_x": (constructed, KEY),
    "dict_key_y": (constructed, KEY),
    "backend": (constructed, [3, "backpack", THING, nn.Linear, mlp()]),
    "backend_kwargs": (constructed, [*MAPPING, {"nonsense": 1}]),
    "asdl_fisher_kwargs": (constructed, MAPPING),
    "subsample_size": (constructed, SIZE),
    "n_eigenvalues": (constructed, RANK),
    "curvature_size": (constructed, SIZE),
    "seed": (constructed, SEED),
    "chunk_size": (constructed, SIZE),
    "memory_budget": (constructed, BUDGET),
    "autodiff": (constructed, [v for v in CHOICE if v is not None]),
    "compile": (constructed, FLAG),
    "spill": (constructed, SPILL),
    "spill_dtype": (constructed, DTYPE),
    "curvature": (constructed, CHOICE),
    "curvature_samples": (constructed, [*SIZE, None]),
    "logit_scale": (constructed, [*POSITIVE, None]),
    "residual": (constructed, CHOICE),
    "residual_scale": (constructed, [*POSITIVE, None]),
    "residual_samples": (constructed, [*SIZE, None]),
    "process_group": (constructed, [3, "nccl", True, THING]),
    "shard_directions": (constructed, FLAG),
    "temperature_fixed": (constructed, [v for v in FLAG if v is not None]),
}
FACTORY = {
    "model": (lambda la, model: laplace_ella.Laplace(model), MODULE),
    "likelihood": (lambda la, likelihood: laplace_ella.Laplace(mlp(), likelihood, "all", "ella"), CHOICE),
    "subset_of_weights": (lambda la, **o: laplace_ella.Laplace(mlp(), hessian_structure="ella", **o), CHOICE),
    "hessian_structure": (
        lambda la, **o: laplace_ella.Laplace(mlp(), subset_of_weights="all", **o),
        CHOICE,
    ),
}


def fit(la, **options):
    la.fit(**{"train_loader": train_loader(), **options})


def plan(la, **options):
    la.plan(**{"train_loader": train_loader(), "verbose": False, **options})


def call(la, **options):
    la(**{"x": X, **options})


def marglik(la, **options):
    la.optimize_prior_precision(**{"method": "marglik", **options})


def gridsearch(la, **options):
    la.optimize_prior_precision(
        **{"method": "gridsearch", "val_loader": val_loader(), "grid_size": 3, **options}
    )


def joint(la, **options):
    la.optimize_hyperparameters(**{"val_loader": val_loader(), "search": ["logit_scale"], **options})


def method(name: str, **fixed: Any) -> Callable[..., None]:
    return lambda la, **options: getattr(la, name)(**{**fixed, **options})


def of_backend(name: str, **fixed: Any) -> Callable[..., None]:
    return lambda la, **options: getattr(la.backend, name)(**{**fixed, **options})


def attribute(la, **values):
    for name, value in values.items():
        setattr(la, name, value)


def searched(la, **values):
    la.optimize_hyperparameters(val_loader(), values)


X_METHODS = {
    name: {"x": (method(name), INPUT)}
    for name in ("features", "residual_share", "novelty", "approximation_error")
}
SAMPLES = {
    "x": INPUT,
    "pred_type": CHOICE,
    "n_samples": [*SIZE, None],
    "diagonal_output": FLAG,
    "generator": GENERATOR,
}
TUNING = {
    "pred_type": CHOICE,
    "method": CHOICE,
    "n_steps": COUNT,
    "lr": [*POSITIVE, None],
    "init_prior_prec": PRIOR,
    "prior_structure": CHOICE,
    "log_prior_prec_min": [*NUMBER, None, -1000],
    "log_prior_prec_max": [*NUMBER, None, 400],
    "grid_size": [*SIZE, None],
    "link_approx": CHOICE,
    "n_samples": [*SIZE, None],
    "verbose": FLAG,
    "progress_bar": FLAG,
    "log_prior_prec_base": [*POSITIVE, None, 1],
}
METHODS: dict[str, dict[str, tuple[Callable[..., Any], list[Any]]]] = {
    "ELLALaplace": CONSTRUCTOR,
    "Laplace": FACTORY,
    "assignment": {
        "sigma_noise": (attribute, NOISE),
        "prior_precision": (attribute, PRIOR),
        "prior_mean": (attribute, MEAN),
        "temperature": (attribute, POSITIVE),
        "logit_scale": (attribute, POSITIVE),
        "residual": (attribute, CHOICE),
        "residual_scale": (attribute, POSITIVE),
    },
    "fit": {
        "train_loader": (fit, [None, *LOADER]),
        "override": (fit, FLAG),
        "progress_bar": (fit, FLAG),
        "landmarks": (fit, LANDMARKS),
        "balanced": (fit, FLAG),
        "val_loader": (fit, LOADER),
        "val_steps": (fit, SIZE),
        "link_approx": (fit, CHOICE),
        "basis": (fit, BASIS),
        "max_samples": (fit, SIZE),
        "n_total": (fit, SIZE),
        "checkpoint": (fit, PATH),
        "checkpoint_every": (fit, [*SIZE, None]),
    },
    "plan": {"train_loader": (plan, [None, *LOADER]), "verbose": (plan, FLAG)},
    "merge": {"merge": (lambda la, merge: la.merge(merge), [None, 3, "la", THING, mlp()])},
    "forget": {
        "loader": (method("forget"), [None, *LOADER]),
        "progress_bar": (method("forget", loader=val_loader()), FLAG),
    },
    "calibrate_novelty": {"in_distribution_loader": (method("calibrate_novelty"), [None, *LOADER])},
    **X_METHODS,
    "approximation_error, data": {"train_loader": (method("approximation_error", x=X), LOADER)},
    "log_marginal_likelihood": {
        "prior_precision": (method("log_marginal_likelihood"), [v for v in PRIOR if v is not None]),
        "sigma_noise": (method("log_marginal_likelihood"), [v for v in NOISE if v is not None]),
    },
    "sample": {k: (method("sample"), SAMPLES[k]) for k in ("n_samples", "generator")},
    "functional_samples": {k: (method("functional_samples", x=X), v) for k, v in SAMPLES.items()},
    "predictive_samples": {k: (method("predictive_samples", x=X), v) for k, v in SAMPLES.items()},
    "call": {
        "x": (call, INPUT),
        "pred_type": (call, CHOICE),
        "joint": (call, FLAG),
        "link_approx": (call, CHOICE),
        "n_samples": (call, [*SIZE, None]),
        "diagonal_output": (call, FLAG),
        "generator": (call, GENERATOR),
        "fitting": (call, FLAG),
    },
    "call nn": {
        "x": (lambda la, x: la(x, "nn", link_approx="mc"), INPUT),
        "n_samples": (lambda la, **o: la(X, "nn", link_approx="mc", **o), [*SIZE, None]),
    },
    "predictive": {
        "x": (method("predictive"), INPUT),
        "pred_type": (method("predictive", x=X), CHOICE),
        "link_approx": (method("predictive", x=X), CHOICE),
        "n_samples": (method("predictive", x=X), [*SIZE, None]),
    },
    "functional_variance": {"Js": (method("functional_variance"), FEATURES)},
    "functional_covariance": {"Js": (method("functional_covariance"), FEATURES)},
    "marglik": {k: (marglik, v) for k, v in TUNING.items()} | {"val_loader": (marglik, LOADER)},
    "gridsearch": {k: (gridsearch, v) for k, v in TUNING.items()}
    | {"val_loader": (gridsearch, [None, *LOADER]), "loss": (gridsearch, LOSS)},
    "optimize_hyperparameters": {
        "val_loader": (joint, [None, *LOADER]),
        "search": (joint, [3, "temperature", [3], ["nonsense"], [["a"]], {3: None}, True, []]),
        "link_approx": (joint, CHOICE),
        "n_samples": (joint, [*SIZE, None]),
        "loss": (joint, LOSS),
        "apply": (joint, FLAG),
        "progress_bar": (joint, FLAG),
    },
    "search": {
        "logit_scale": (searched, [3, "abc", [], [0.0], [NAN], ["a"], [None], True]),
        "n_eigenvalues": (searched, [3, [0], [6], ["a"], [1.5]]),
        "curvature_size": (searched, [3, [0], [10**9]]),
    },
    "NystromGGN": {
        name: (lambda la, **o: NystromGGN(**{"model": mlp(), "likelihood": "classification", **o}), values)
        for name, values in (
            ("model", MODULE),
            ("likelihood", CHOICE),
            ("chunk_size", SIZE),
            ("memory_budget", BUDGET),
            ("autodiff", [v for v in CHOICE if v is not None]),
            ("compile", FLAG),
            ("spill", SPILL),
            ("spill_dtype", DTYPE),
        )
    },
    "BackPackNystromGGN": {"model": (lambda la, model: BackPackNystromGGN(model, "classification"), MODULE)},
    "backend.features": {
        "basis": (of_backend("features", x=X), [None, *BASIS]),
    },
    "backend.full": {"y": (of_backend("full", x=X), [None, 3, [0] * 11, THING])},
    "basis.plot": {"ax": (lambda la, ax: la.basis.plot(ax), [3, "ax", THING, True])},
}
for _name in ("jacobians", "forward", "positions"):
    METHODS[f"backend.{_name}"] = {
        "input": (lambda la, n=_name, **o: getattr(la.backend, n)(o["input"]), NO_INPUT)
    }
METHODS["backend.full"]["input"] = (
    lambda la, **o: la.backend.full(o["input"], torch.zeros(11, dtype=torch.long)),
    NO_INPUT,
)

CASES = [
    pytest.param(function, argument, value, id=f"{name}-{argument}-{i}")
    for name, arguments in METHODS.items()
    for argument, (function, values) in arguments.items()
    for i, value in enumerate(values)
]


@pytest.fixture(scope="module")
def la():
    torch.manual_seed(0)
    return fitted(model=Counting(), temperature=None)


@pytest.fixture(scope="module")
def before(la):
    return Snapshot(la, X)


def words_for(value) -> list[str]:
    """What a message may say of a value that was passed."""
    if isinstance(value, torch.Tensor):
        return [str(tuple(value.shape)), str(value), *([str(value.item())] if value.numel() == 1 else [])]
    if isinstance(value, type):
        return [value.__name__]
    if isinstance(value, (list, tuple, dict, str)) and not len(value):
        return [repr(value), type(value).__name__, "none", "empty"]
    contents = [repr(v) for v in value] if isinstance(value, (list, dict)) else []
    return [repr(value), str(value), type(value).__name__, *contents]


def assert_said_by_us(error: BaseException, argument: str, value: Any) -> None:
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    assert raised_in.startswith(PACKAGE), f"{raised_in}: {error}"
    text = str(error)
    assert argument in text
    assert any(word in text for word in words_for(value)), text
    assert len(text) < 1500


@pytest.mark.parametrize(("function", "argument", "value"), CASES)
def test_a_wrong_argument_is_refused_before_any_work(function, argument, value, la, before):
    calls = la.model.calls
    with pytest.raises(ValueError, match=r"\w+") as caught:
        function(la, **{argument: value})
    assert_said_by_us(caught.value, argument, value)
    assert la.model.calls == calls
    before.check()


# ------------------------------------------------------------------ values of numpy, and of tensors, that are right

ACCEPTED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "constructor": (
        of_regression,
        {
            "sigma_noise": np.float32(0.5),
            "prior_precision": np.float64(2.0),
            "prior_mean": np.float32(0.5),
            "temperature": np.float32(2.0),
            "enable_backprop": np.bool_(True),
            "subsample_size": np.int64(5),
            "n_eigenvalues": np.int32(3),
            "curvature_size": np.int64(7),
            "seed": np.int64(3),
            "chunk_size": np.int64(2),
            "memory_budget": np.int64(10**6),
            "compile": np.bool_(False),
            "curvature_samples": np.int64(2),
            "logit_scale": np.float64(1.0),
            "residual_scale": torch.tensor(0.5),
            "residual_samples": np.int64(2),
            "shard_directions": 0,
        },
    ),
    "classifier": (constructed, {"prior_precision": 1, "prior_mean": 0, "logit_scale": np.float32(0.5)}),
    "share": (constructed, {"n_eigenvalues": np.float64(0.5), "memory_budget": np.float32(0.5)}),
    "huge": (
        constructed,
        {"subsample_size": 10**30, "curvature_size": 10**30, "seed": 2**63 - 1, "memory_budget": 10**30},
    ),
    "fit": (
        fit,
        {
            "override": np.bool_(True),
            "progress_bar": 0,
            "balanced": np.bool_(True),
            "val_steps": np.int64(2),
            "max_samples": np.int64(14),
            "n_total": np.int64(99),
            "checkpoint_every": np.int64(2),
        },
    ),
    "plan": (plan, {"verbose": np.bool_(False)}),
    "call": (call, {"joint": np.bool_(False), "n_samples": np.int64(5), "diagonal_output": 1, "fitting": 0}),
    "mc": (call, {"link_approx": LinkApprox.MC, "pred_type": PredType.GLM}),
    "marglik": (
        marglik,
        {"n_steps": np.int64(3), "lr": np.float32(0.1), "init_prior_prec": np.float32(2.0), "verbose": 0},
    ),
    "layers": (marglik, {"n_steps": 0, "init_prior_prec": [1.0, 2.0, 3.0, 4.0]}),
    "gridsearch": (
        gridsearch,
        {
            "grid_size": np.int64(3),
            "n_samples": np.int64(7),
            "log_prior_prec_min": np.float32(-1),
            "log_prior_prec_max": np.int64(1),
            "log_prior_prec_base": 2,
        },
    ),
    "optimize_hyperparameters": (
        joint,
        {"n_samples": np.int64(7), "apply": np.bool_(False), "search": (n for n in ["temperature"])},
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_values_of_other_types_are_accepted(name):
    function, options = ACCEPTED[name]
    la = fitted(temperature=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few validation data
        function(la, **options)


def test_plain_types_are_kept_of_those_of_numpy():
    la = build(
        subsample_size=np.int64(7), seed=np.int64(3), residual_samples=np.int64(2), chunk_size=np.int64(3)
    )
    la.fit(train_loader())
    state = la.state_dict()
    for name in ("subsample_size", "seed", "residual_samples", "curvature_size"):
        assert type(state[name]) is int


# ------------------------------------------------------------------ settings assigned after construction


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("subsample_size", SIZE),
        ("n_eigenvalues", RANK),
        ("curvature_size", SIZE),
        ("curvature_samples", SIZE),
        ("residual_samples", SIZE),
        ("seed", SEED),
        ("curvature", CHOICE),
    ],
)
@pytest.mark.parametrize("method", [fit, plan])
def test_a_wrong_setting_is_refused_by_the_next_fit(name, values, method):
    la = build(model=Counting())
    for value in values:
        setattr(la, name, value)
        with pytest.raises(ValueError, match=name) as caught:
            method(la)
        assert_said_by_us(caught.value, name, value)
    assert la.model.calls == 0


# ------------------------------------------------------------------ models


def test_a_model_whose_weights_have_no_values():
    with torch.device("meta"):
        model = mlp()
    for make in (lambda: build(model=model), lambda: NystromGGN(model, "classification")):
        with pytest.raises(ValueError, match=r"model .*'0.weight' has none.*meta device"):
            make()
    with pytest.raises(ValueError, match=r"model .*'1.running_mean' has none.*meta device"):
        build(model=nn.Sequential(nn.Linear(D, C), nn.BatchNorm1d(C, device="meta", affine=False)))


def test_a_model_that_has_not_seen_an_input():
    with pytest.raises(ValueError, match=r"model .*'0.weight' has none.*lazy: run the model once"):
        build(model=nn.Sequential(nn.LazyLinear(C)))


def test_no_model_of_any_flavour():
    for structure in ("kron", "diag", "ella"):
        with pytest.raises(ValueError, match=r"model must be a torch.nn.Module.*got None"):
            laplace_ella.Laplace(None, "classification", "all", structure)


# ------------------------------------------------------------------ loaders without data


def of_rows(n):
    return (
        loader(inputs(n), targets("classification", n)) if n else [(inputs(0), targets("classification", 0))]
    )


@pytest.mark.parametrize(
    "data", [list, lambda: iter(()), lambda: of_rows(0)], ids=["list", "iterator", "rows"]
)
@pytest.mark.parametrize(
    "use",
    [
        lambda la, data: la.fit(data),
        lambda la, data: la.fit(train_loader(), val_loader=data),
        lambda la, data: la.forget(data),
        lambda la, data: la.calibrate_novelty(data),
        lambda la, data: la.approximation_error(X, data),
        lambda la, data: la.optimize_hyperparameters(data),
        lambda la, data: la.optimize_prior_precision(method="gridsearch", val_loader=data),
        lambda la, data: la.optimize_prior_precision(
            "nn", method="gridsearch", val_loader=data, link_approx="mc", grid_size=2
        ),
    ],
    ids=["fit", "val_loader", "forget", "calibrate", "error", "joint", "gridsearch", "gridsearch nn"],
)
def test_loaders_without_data(use, data, la, before):
    with pytest.raises(ValueError, match=r"no data|at least two inputs; got 0"):
        use(la, data())
    before.check()


@pytest.mark.parametrize("data", [[], iter(()), of_rows(0)], ids=["list", "iterator", "rows"])
def test_a_plan_of_no_data(data, la):
    with pytest.raises(ValueError, match=r"no data|iterator"):
        la.plan(data)


def test_the_error_of_an_approximation_at_no_inputs(la):
    with pytest.raises(ValueError, match="x must hold at least one input; got none"):
        la.approximation_error(inputs(0))


# ------------------------------------------------------------------ before a fit

UNFITTED = {
    "forget": lambda la: la.forget(train_loader()),
    "merge": lambda la: la.merge(fitted()),
    "merge other": lambda la: fitted().merge(la),
    "residual_share": lambda la: la.residual_share(X),
    "novelty": lambda la: la.novelty(X),
    "calibrate_novelty": lambda la: la.calibrate_novelty(val_loader()),
    "approximation_error": lambda la: la.approximation_error(X),
    "optimize_hyperparameters": lambda la: la.optimize_hyperparameters(val_loader()),
    "log_det_posterior_precision": lambda la: la.log_det_posterior_precision,
    "log_det_prior_precision": lambda la: la.log_det_prior_precision,
    "log_det_ratio": lambda la: la.log_det_ratio,
    "posterior_scale": lambda la: la.posterior_scale,
    "backend.full": lambda la: la.backend.full(X, targets("classification", 11)),
}


@pytest.mark.parametrize("residual", ["none", "isotropic", "exact"])
@pytest.mark.parametrize("name", UNFITTED)
def test_use_before_a_fit(name, residual):
    la = build(model=Counting(), residual=residual)
    with pytest.raises(AttributeError, match=r"[Ff]it"):
        UNFITTED[name](la)
    assert la.model.calls == 0


# ------------------------------------------------------------------ inputs of another width


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="Python 3.10 has no notes")
@pytest.mark.parametrize(
    "use",
    [
        lambda la, x: la(x),
        lambda la, x: la(x, "nn", link_approx="mc"),
        lambda la, x: la.features(x),
        lambda la, x: la.novelty(x),
        lambda la, x: la.functional_samples(x),
        lambda la, x: la.fit([(x, torch.zeros(len(x), dtype=torch.long))]),
    ],
    ids=["call", "nn", "features", "novelty", "samples", "fit"],
)
def test_the_models_own_error_is_raised_and_says_what_it_was_given(use, la, before):
    wide = torch.zeros(11, D + 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="shape") as caught:
        use(la, wide)
    assert caught.value.__notes__ == ["The inputs were x of shape (11, 7)."]
    before.check()


# ------------------------------------------------------------------ what takes no argument


@pytest.mark.parametrize("function", [laplace_ella.raise_malloc_thresholds])
def test_functions_without_arguments(function):
    with pytest.raises(TypeError, match="argument"):
        function(1)


def test_a_plot_of_a_result_takes_no_argument():
    la = fitted(temperature=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = la.optimize_hyperparameters(val_loader(), ["temperature"])
    with pytest.raises(TypeError, match="argument"):
        found.plot(3)


def test_unknown_arguments_of_the_constructor():
    with pytest.raises(TypeError, match="n_eigenvectors"):
        build(n_eigenvectors=K)


# ------------------------------------------------------------------ files of a fit in progress


class Stopping:
    """Batches that end with an error in the second pass."""

    def __init__(self):
        self.batches, self.passes = list(train_loader()), 0

    def __iter__(self):
        self.passes += 1
        for i, batch in enumerate(self.batches):
            if self.passes == 2 and i == 2:
                raise RuntimeError("stopped")
            yield batch


SUFFIXES = ("", ".basis", ".curvature")


def stopped(path, **options):
    """What a fit that has failed in its last stage leaves: a file of each stage."""
    la = build(curvature_size=None, **options)
    with pytest.raises(RuntimeError, match="stopped"):
        la.fit(Stopping(), checkpoint=path, checkpoint_every=1)
    return {s: Path(f"{os.path.realpath(path)}{s}").read_bytes() for s in SUFFIXES}


@pytest.mark.parametrize(("left", "right"), [(a, b) for a in SUFFIXES for b in SUFFIXES if a < b])
def test_exchanged_files_of_two_stages(left, right, tmp_path):
    path = tmp_path / "fit"
    files = stopped(path)
    for here, there in ((left, right), (right, left)):
        Path(f"{path}{here}").write_bytes(files[there])
    now = {s: Path(f"{path}{s}").read_bytes() for s in SUFFIXES}
    la = build(curvature_size=None)
    stages = {"": "scan", ".basis": "basis", ".curvature": "curvature"}
    with pytest.raises(
        ValueError, match=rf"of the stage '{stages[right]}', and its name that of '{stages[left]}'"
    ):
        la.fit(train_loader(), checkpoint=path, checkpoint_every=1)
    assert {s: Path(f"{path}{s}").read_bytes() for s in SUFFIXES} == now
    assert la.H is None


def test_files_of_another_rank(tmp_path):
    path = tmp_path / "fit"
    files = FitFiles(path, 1, {}, ALONE)
    other = FitFiles(tmp_path / "other", 1, {}, ALONE)
    other._rank = [1, 2]
    other.save("scan", {"a": 1})
    Path(path).write_bytes((tmp_path / "other").read_bytes())
    with pytest.raises(ValueError, match="of rank 1 of 2, and this is rank 0 of 1"):
        FitFiles(path, 1, {}, ALONE)
    assert files.found("scan") is None


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_given_as_checkpoint_is_followed_and_stays(exists, tmp_path):
    (tmp_path / "scratch").mkdir()
    link, target = tmp_path / "fit", tmp_path / "scratch" / "file"
    link.symlink_to(target)
    stopped(link if not exists else target)
    assert link.is_symlink()
    assert zipfile.is_zipfile(target)
    la = build(curvature_size=None)
    la.fit(train_loader(), checkpoint=link, checkpoint_every=1)
    assert link.is_symlink()
    assert list((tmp_path / "scratch").iterdir()) == []
    assert_same(la(X), fitted(curvature_size=None)(X))


def test_a_file_of_the_users_behind_a_link_is_neither_replaced_nor_deleted(tmp_path):
    link, target = tmp_path / "fit", tmp_path / "file"
    target.write_text("thesis")
    link.symlink_to(target)
    with pytest.raises(ValueError, match="cannot be used"):
        build().fit(train_loader(), checkpoint=link)
    assert target.read_text() == "thesis"
    assert link.is_symlink()


def test_links_that_lead_nowhere(tmp_path):
    link = tmp_path / "fit"
    for target, reason in (
        (tmp_path / "no" / "file", "existing folder"),
        (tmp_path, "path of a file"),
        (link, "link"),
    ):
        link.symlink_to(target)
        with pytest.raises(ValueError, match=rf"checkpoint .*{reason}"):
            build().fit(train_loader(), checkpoint=link)
        assert link.is_symlink()
        link.unlink()


@pytest.mark.parametrize("stage", ["gram", "basis", "curvature"])
@pytest.mark.parametrize("dangling", [True, False])
def test_a_link_in_the_place_of_a_later_stage(stage, dangling, tmp_path):
    target, link = tmp_path / "file", tmp_path / f"fit.{stage}"
    if not dangling:
        target.write_text("thesis")
    link.symlink_to(target)
    with pytest.raises(ValueError, match=rf"checkpoint .*fit.{stage}, where there is a symbolic link"):
        build().fit(train_loader(), checkpoint=tmp_path / "fit")
    assert link.is_symlink()
    assert target.exists() is not dangling


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fit")
    with pytest.raises(ValueError, match=r"checkpoint .*no regular file"):
        build().fit(train_loader(), checkpoint=tmp_path / "fit")
