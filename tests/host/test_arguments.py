"""Every argument of every public method: what is wrong is said before any work, by the package itself, with the
argument's name and what was passed; the estimator stays as it was."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from helpers import C, M, Snapshot, build, fitted, inputs, mlp, train_loader, val_loader
from laplace.utils.enums import LinkApprox, PredType
from models import Counting
from torch import nn

import laplace_ella
from laplace_ella import BackPackNystromGGN, ELLALaplace, NystromGGN

mpl.use("Agg")
NAN, INF = float("nan"), float("inf")
X = inputs(11, seed=7)
PACKAGE = str(Path(laplace_ella.__file__).parent)
P = sum(p.numel() for p in mlp().parameters())


THING = type("Thing", (), {})()  # no argument takes one

FLAG = ["no", "yes", None, 2, -1, 0.5, [], THING, torch.ones(2)]
SIZE = [0, -3, 1.5, 2.0, True, NAN, "3", [3], THING, torch.ones(2)]
COUNT = [*SIZE, None]  # where None is no default
NUMBER = [NAN, INF, -INF, True, "1", [1.0], THING, 1j, torch.ones(2)]
POSITIVE = [0, 0.0, -0.5, *NUMBER]
CHOICE = ["nonsense", "", None, 3, True, ["mc"], THING, torch.ones(2), np.zeros(2)]
LOADER = [3, True, 0.5, "data", THING, lambda: None, torch.utils.data.DataLoader, {"input_ids": X}]
PRIOR = [
    *(0.0, -1.0, NAN, INF, True, "1", [], ["a"], THING, 1j),
    *(torch.ones(5), torch.ones(1, P), torch.ones(2, 2), torch.ones(0), torch.ones(1, dtype=torch.bool)),
    *(torch.ones(4, dtype=torch.complex64), torch.ones(4, device="meta"), torch.tensor([1.0, 2, 3, NAN])),
    *(torch.tensor([1.0, 2, 3, 0]), torch.tensor([INF] * P), torch.tensor(-1)),
]
MEAN = [
    *(NAN, INF, True, "0", [0.0], ["a"], THING, 1j, None, np.zeros(P)),
    *(torch.ones(5), torch.ones(4), torch.ones(1, P), torch.ones(0), torch.zeros(1, dtype=torch.bool)),
    *(torch.zeros(P, dtype=torch.complex64), torch.zeros(P, device="meta"), torch.full((P,), NAN)),
]
# Of several outputs there may be several.
ONE_OR_MORE = [v for v in POSITIVE if not isinstance(v, torch.Tensor)]
NOISE = [*ONE_OR_MORE, torch.ones(1, 1), torch.ones(0), *map(torch.tensor, (NAN, True, 1j, 0.0))]
INPUT = [None, 3, "x", X.tolist(), X.numpy(), THING, torch.tensor(1.0), (X, X)]
MODULE = [None, 3, "model", mlp, nn.Linear, nn.Linear(2, 2).state_dict(), THING]
FEATURES = [None, 3, "Js", torch.ones(2, 5), torch.ones(2, C, 7), torch.ones(2, C, P), X.numpy()]
KEY = [None, [], {}, ["a"]]
MAPPING = [3, "chunk_size", [1], THING, {3: 4}]
BASIS = [3, "basis", THING, {}, NystromGGN]
RANK = [0, -1, 1.0, 1.5, NAN, INF, True, "3", [3], THING, torch.ones(2)]
SEED = [-1, 1.0, None, True, "0", 2**63, NAN, [0], THING]


def each(names: str, values: list[Any]) -> dict[str, list[Any]]:
    return dict.fromkeys(names.split(), values)


# Of an argument of this name, whatever the method.
WRONG: dict[str, list[Any]] = {
    "model": MODULE,
    **each("likelihood residual curvature variance pred_type", CHOICE),
    **each("link_approx method", [v for v in CHOICE if v is not None]),  # None is the usual one
    **each(
        "class_scales class_biases", [3, "abc", [], [[1.0]], [NAN], ["a"], [True], torch.ones(3, 3), THING]
    ),
    **each("subset_of_weights hessian_structure prior_structure", CHOICE),
    "sigma_noise": NOISE,
    "prior_precision": PRIOR,
    "init_prior_prec": [*PRIOR, None],
    "prior_mean": MEAN,
    **each("temperature logit_scale residual_scale lr", POSITIVE),
    "log_prior_prec_base": [*POSITIVE, None, 1],
    "log_prior_prec_min": [*NUMBER, None, -1000],
    "log_prior_prec_max": [*NUMBER, None, 400],
    **each("enable_backprop compile shard_directions override progress_bar", FLAG),
    **each("balanced verbose diagonal_output joint fitting apply", FLAG),
    "temperature_fixed": [v for v in FLAG if v is not None],
    **each("dict_key_x dict_key_y", KEY),
    "backend": [3, "backpack", THING, nn.Linear, mlp()],
    "backend_kwargs": [*MAPPING, {"nonsense": 1}],
    "asdl_fisher_kwargs": MAPPING,
    **each("subsample_size curvature_size curvature_positions chunk_size val_steps", SIZE),
    "channel_axis": [0, 2, -2, True, 1.0, "1", [1], THING],
    **each("max_samples n_total", SIZE),
    **each("curvature_samples residual_samples n_samples grid_size checkpoint_every", COUNT),
    "n_steps": [-3, 1.5, True, None, NAN, INF, "3", [3], THING],
    "n_eigenvalues": RANK,
    "seed": SEED,
    "memory_budget": [0, -1, 0.0, 1.5, NAN, INF, True, "1 GB", [3], THING],
    "autodiff": [v for v in CHOICE if v is not None],
    "spill": [3, True, "/no/such/folder", THING],
    "spill_dtype": [None, "float32", torch.float64, torch.int8, 32],
    "process_group": [3, "nccl", True, THING],
    **each("train_loader loader in_distribution_loader", [None, *LOADER]),
    "val_loader": LOADER,
    "landmarks": [3, "random", X, (X,), (X, None), (X, [0] * 11), (None, torch.zeros(11).long()), THING],
    "basis": BASIS,
    "checkpoint": [3, 0.5, True, "", b"file", ["a"], THING, "/no/such/folder/file", "/"],
    "x": INPUT,
    "generator": [3, "cpu", True, THING, torch.Generator],
    "Js": FEATURES,
    "search": [3, "temperature", [3], ["nonsense"], [["a"]], {3: None}, True, []],
    "loss": [3, "nll", True, [], THING],
    "other": [None, 3, "la", THING, mlp()],
    "y": [None, 3, [0] * 11, THING],
    "ax": [3, "ax", THING, True],
}


def method(name: str, **fixed: Any) -> Callable[..., Any]:
    return lambda la, **options: getattr(la, name)(**{**fixed, **options})


def of_backend(name: str, **fixed: Any) -> Callable[..., Any]:
    return lambda la, **options: getattr(la.backend, name)(**{**fixed, **options})


def constructed(la, **options):
    likelihood = "regression" if "sigma_noise" in options else "classification"
    sizes = {"subsample_size": M, "n_eigenvalues": 5, "temperature": 1.0}
    ELLALaplace(**{"model": mlp(), "likelihood": likelihood, **sizes, **options})


def through_the_factory(la, **options):
    kind = {"subset_of_weights": "all", "hessian_structure": "ella"}
    laplace_ella.Laplace(**{"model": mlp(), "likelihood": "classification", **kind, **options})


def attribute(la, **values):
    for name, value in values.items():
        setattr(la, name, value)


def searched(la, **values):
    la.optimize_hyperparameters(val_loader(), values)


def signature(function, *without: str) -> list[str]:
    """The names of the arguments; those of the host that have no meaning here left out."""
    left_out = ("self", "model_kwargs", "kwargs", *without)
    return [n for n in inspect.signature(function).parameters if n not in left_out]


def own(name: str, **fixed: Any) -> tuple[Callable[..., Any], list[str]]:
    """A method of the estimator with all its arguments."""
    return method(name, **fixed), signature(getattr(ELLALaplace, name))


PRIOR_SEARCH = ELLALaplace.optimize_prior_precision
GRID = {"method": "gridsearch", "val_loader": val_loader(), "grid_size": 3}
JOINT = "optimize_hyperparameters"
BACKEND = "model likelihood chunk_size memory_budget autodiff compile spill spill_dtype"
OF_INPUTS = "features residual_share novelty approximation_error"
SETTERS = "sigma_noise prior_precision prior_mean temperature logit_scale residual residual_scale variance link_approx"

# Name: what calls, with one argument after the other, and their names.
METHODS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "ELLALaplace": (constructed, signature(ELLALaplace.__init__)),
    "Laplace": (through_the_factory, ["model", "likelihood", "subset_of_weights", "hessian_structure"]),
    "assignment": (attribute, SETTERS.split()),
    "fit": own("fit", train_loader=train_loader()),
    "plan": own("plan", train_loader=train_loader(), verbose=False),
    "forget": own("forget", loader=val_loader()),
    **{name: own(name) for name in ["merge", "calibrate_novelty", "log_marginal_likelihood", "sample"]},
    **{name: own(name, x=X) for name in ["functional_samples", "predictive_samples", "predictive"]},
    **{name: (method(name), ["x"]) for name in OF_INPUTS.split()},
    "call": own("__call__", x=X),
    "call nn": (method("__call__", x=X, pred_type="nn", link_approx="mc"), ["x", "n_samples"]),
    "functional_variance": (method("functional_variance"), ["Js"]),
    "functional_covariance": (method("functional_covariance"), ["Js"]),
    "marglik": (method("optimize_prior_precision", method="marglik"), signature(PRIOR_SEARCH, "loss")),
    "gridsearch": (method("optimize_prior_precision", **GRID), signature(PRIOR_SEARCH)),
    JOINT: own(JOINT, val_loader=val_loader(), search=["logit_scale"]),
    "NystromGGN": (
        lambda la, **o: NystromGGN(**{"model": mlp(), "likelihood": "classification", **o}),
        BACKEND.split(),
    ),
    "BackPackNystromGGN": (lambda la, model: BackPackNystromGGN(model, "classification"), ["model"]),
    "backend.features": (of_backend("features", x=X, basis=None), ["basis"]),
    "backend.full": (of_backend("full", x=X), ["y"]),
    "basis.plot": (lambda la, ax: la.basis.plot(ax), ["ax"]),
}
# Where a name means something else, or more.
SPECIAL: dict[tuple[str, str], tuple[Callable[..., Any], list[Any]]] = {
    ("search", "logit_scale"): (searched, [3, "abc", [], [0.0], [NAN], ["a"], [None], True]),
    ("search", "n_eigenvalues"): (searched, [3, [0], [6], ["a"], [1.5]]),
    ("search", "curvature_size"): (searched, [3, [0], [10**9]]),
    ("gridsearch without", "val_loader"): (METHODS["gridsearch"][0], [None]),
    (f"{JOINT} without", "val_loader"): (METHODS[JOINT][0], [None]),
    ("approximation_error", "train_loader"): (method("approximation_error", x=X), LOADER),
    **{
        (f"backend.{name}", "input"): (
            lambda la, name=name, more=more, **o: getattr(la.backend, name)(o["input"], *more),
            [value for value in INPUT if not isinstance(value, torch.Tensor)],
        )
        for name, more in (("jacobians", ()), ("full", (torch.zeros(11).long(),)))
    },
}


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


@pytest.fixture(scope="module")
def la():
    torch.manual_seed(0)
    return fitted(model=Counting(), temperature=None)


CASES = [(m, n, f, WRONG[n]) for m, (f, names) in METHODS.items() for n in names]
CASES += [(*key, *case) for key, case in SPECIAL.items()]


@pytest.mark.parametrize(
    ("method", "argument", "function", "values"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_wrong_argument_is_refused_before_any_work(method, argument, function, values, la):
    before, calls = Snapshot(la, X), la.model.calls
    for value in values:
        with pytest.raises(ValueError, match=r"\w+") as caught:
            function(la, **{argument: value})
        assert_said_by_us(caught.value, argument, value)
    assert la.model.calls == calls
    before.check()


ASSIGNED = "subsample_size n_eigenvalues curvature_size curvature_samples residual_samples seed curvature"


@pytest.mark.parametrize("name", ASSIGNED.split())
@pytest.mark.parametrize("method", ["fit", "plan"])
def test_a_wrong_setting_that_was_assigned_is_refused_by_the_next_fit(name, method):
    la = build(model=Counting())
    for value in WRONG[name]:
        if value is None and name != "seed":
            continue
        setattr(la, name, value)
        with pytest.raises(ValueError, match=name) as caught:
            METHODS[method][0](la)
        assert_said_by_us(caught.value, name, value)
    assert la.model.calls == 0


REVERSED = {**GRID, "log_prior_prec_min": 2, "log_prior_prec_max": -2}
ONE = {"pred_type": "nn", "link_approx": "mc", "n_samples": 1}
UNKNOWN = [
    (lambda la: build(n_eigenvectors=2), "n_eigenvectors"),
    (lambda la: la(X, link_aprox="mc"), "link_aprox"),
    (lambda la: laplace_ella.raise_malloc_thresholds(1), "argument"),
    (lambda la: la(X, "nn", link_approx="probit"), "mc"),
    (lambda la: la.optimize_prior_precision("nn", **GRID), "mc"),
    (lambda la: la.optimize_prior_precision(**REVERSED), "min must be smaller than .*; got 2 and -2"),
    (lambda la: fitted("regression")(X, **ONE), "at least 2"),
]


@pytest.mark.parametrize(("function", "match"), UNKNOWN)
def test_unknown_arguments_and_combinations_are_refused(function, match, la):
    with pytest.raises((TypeError, ValueError), match=match):
        function(la)


RIGHT: dict[str, list[Any]] = {
    **each("sigma_noise prior_precision logit_scale temperature lr", [1, np.float32(0.5)]),
    **each("prior_mean log_prior_prec_min", [0, np.float32(-0.5)]),
    "residual_scale": [torch.tensor(0.5)],
    "init_prior_prec": [np.float32(2.0), [1.0, 2.0, 3.0, 4.0]],
    "log_prior_prec_max": [np.int64(1)],
    "log_prior_prec_base": [2],
    **each("enable_backprop compile shard_directions joint diagonal_output", [np.bool_(False), 0]),
    **each("override balanced verbose fitting progress_bar apply", [np.bool_(False), 0]),
    **each("subsample_size curvature_size", [np.int64(5), 10**30]),
    **each("chunk_size curvature_samples residual_samples val_steps", [np.int64(2)]),
    **each("max_samples n_total checkpoint_every n_samples grid_size", [np.int64(23)]),
    "n_steps": [np.int64(3), 0],
    "n_eigenvalues": [np.int32(3), np.float64(0.5)],
    "seed": [np.int64(3), 2**63 - 1],
    "memory_budget": [np.int64(10**6), np.float32(0.5), 10**30],
    "pred_type": [PredType.GLM],
    "link_approx": [LinkApprox.MC],
    "search": [(n for n in ["temperature"])],
}
TAKEN = "ELLALaplace fit plan call marglik gridsearch optimize_hyperparameters"


@pytest.mark.filterwarnings("ignore::UserWarning")  # of few validation data
@pytest.mark.parametrize("name", TAKEN.split())
def test_values_of_other_types_are_accepted(name):
    function, arguments = METHODS[name]
    for argument in arguments:
        for value in RIGHT.get(argument, ()):
            function(fitted(temperature=None), **{argument: value})


def test_numbers_are_kept_as_plain_ones():
    options = {"subsample_size": 7, "seed": 3, "residual_samples": 2, "chunk_size": 3, "n_eigenvalues": 4}
    la = fitted(**{name: np.int64(value) for name, value in options.items()})
    state = la.state_dict()
    for name in ("subsample_size", "seed", "residual_samples", "curvature_size", "n_eigenvalues"):
        assert type(state[name]) is int
    assert la(X).shape == (11, C)
    prior = torch.tensor([2.0], dtype=torch.float64)
    la = fitted(prior_precision=prior)
    prior.fill_(100)  # changed by the user
    assert la.prior_precision == 2
