"""Data, models and states that are wrong: a clear error before any work, and nothing lost."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import C, D, DictModel, M, N, Snapshot, build, dict_batches, fitted, inputs, loader, mlp, targets

from helpers import train_loader, val_loader  # isort: skip
from models import Applied, Counting
from torch import nn

import laplace_ella
from laplace_ella import NystromGGN

LIKELIHOODS = ["classification", "regression"]
X = inputs(11, seed=7)
NAN, INF = float("nan"), float("inf")


def assert_refused(la, data, match):
    """A fresh fit, a second one and an addition of data are refused; the previous fit stays."""
    before = Snapshot(la, X)
    for override in (True, False):
        with pytest.raises(ValueError, match=match):
            la.fit(data, override=override)
        before.check()


def meta_statistics():
    return nn.Sequential(nn.Linear(D, C), nn.BatchNorm1d(C, affine=False, device="meta"))


META, LAZY = "has none.*meta device", "has none.*lazy: run the model once"
NO_MODELS = {
    "no weights": (nn.Tanh, r"requires? grad"),
    "frozen": (lambda: nn.Linear(2, 3).requires_grad_(False), r"requires? grad"),
    "meta": (lambda: nn.Sequential(nn.Linear(2, 3, device="meta")), f"model .*'0.weight' {META}"),
    "meta statistics": (meta_statistics, f"model .*'1.running_mean' {META}"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(C)), f"model .*'0.weight' {LAZY}"),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_models_without_weights_or_values(name):
    make, match = NO_MODELS[name]
    with pytest.raises(ValueError, match=match):
        build(model=make())
    if name in ("meta", "lazy"):
        with pytest.raises(ValueError, match=match):
            NystromGGN(make(), "classification")


def test_no_model_of_another_flavour():
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module.*got None"):
        laplace_ella.Laplace(None, "classification", "all", "kron")


def bad_targets(likelihood):
    y, f = targets("classification", 7), targets("regression", 7)
    p = nn.functional.one_hot(y, C).double()
    return {
        "regression": [
            f[:, 0],
            f[:, :1],
            f[..., None],
            f * NAN,
            f / (f > 0),
        ],
        "classification": [y.double(), y > 0, y + C, y - C, y * 0 - 101, p[:, :2], p[..., None], p / (p > 0)],
        "bernoulli": [y, p.repeat(1, 2), 2 * p - 1, p / (p > 0), p.to(torch.complex128)],
    }[likelihood]


LABELS = targets("classification", 7)
STRUCTURES = [inputs(7), (inputs(7),), (inputs(7), LABELS, LABELS), "xy", 3, {"labels": torch.tensor(1)}]
STRUCTURES += [(inputs(7).tolist(), LABELS), (inputs(7), LABELS.tolist()), (inputs(7), LABELS[:5])]
STRUCTURES += [(inputs(7), torch.tensor(1)), (torch.tensor(1.0), LABELS)]


@pytest.mark.parametrize("batch", STRUCTURES)
def test_batches_of_the_wrong_structure(batch):
    assert_refused(fitted(), [batch], r"[Bb]atch|[Ii]nputs|[Tt]argets")


BAD_TARGETS = [(k, y) for k in (*LIKELIHOODS, "bernoulli") for y in bad_targets(k)]


@pytest.mark.parametrize(("likelihood", "bad"), BAD_TARGETS)
def test_targets_that_do_not_fit_are_refused_naming_the_batch(likelihood, bad):
    y = (targets("regression") > 0).long() if likelihood == "bernoulli" else targets(likelihood)
    la, good = fitted(likelihood, data=loader(inputs(), y)), (inputs()[:7], y[:7])
    for position in (0, 1):
        data = [good, good]
        data[position] = inputs(7), bad
        assert_refused(la, data, f"batch {position}")


def test_a_single_output_is_no_classification():
    with pytest.raises(ValueError, match="two outputs"):
        fitted(model=mlp(1), data=loader(inputs(), torch.zeros(N, dtype=torch.long)))


def with_value(x, row, value):
    x = x.clone()
    x[row, 1] = value
    return x


@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_inputs_that_are_not_finite(value, likelihood):
    la = fitted(likelihood)
    assert_refused(la, loader(with_value(inputs(), 8, value), targets(likelihood)), "batch 1")
    before, bad = Snapshot(la, X), with_value(X, 3, value)
    for draw in (la, la.functional_samples, la.predictive_samples):
        for options in ({}, {"pred_type": "nn"} | ({"link_approx": "mc"} if draw is la else {})):
            with pytest.raises(ValueError, match="finite"):
                draw(bad, **options)
    before.check()


def test_mapping_inputs_that_are_not_finite():
    batches = dict_batches()
    batches[2]["attention_mask"] = batches[2]["attention_mask"].double() * NAN
    with pytest.raises(ValueError, match="batch 2"):
        fitted(model=DictModel(), data=batches)


class Shrinking(list):
    """Yields less the second time."""

    def __iter__(self):
        found = list(super().__iter__())
        del self[1:]
        return iter(found)


NO_DATA = (list, lambda: iter(()), lambda: [(inputs(0), targets("classification", 0))])
GRID = {"method": "gridsearch", "link_approx": "mc", "grid_size": 2}
READERS = {
    "plan": lambda la, data: la.plan(data),
    "fit": lambda la, data: la.fit(data),
    "add": lambda la, data: la.fit(data, override=False),
    "val_loader": lambda la, data: la.fit(train_loader(), val_loader=data),
    "forget": lambda la, data: la.forget(data),
    "calibrate": lambda la, data: la.calibrate_novelty(data),
    "error": lambda la, data: la.approximation_error(X, data),
    "joint": lambda la, data: la.optimize_hyperparameters(data),
    "gridsearch": lambda la, data: la.optimize_prior_precision(method="gridsearch", val_loader=data),
    "gridsearch nn": lambda la, data: la.optimize_prior_precision("nn", **GRID, val_loader=data),
}


@pytest.mark.parametrize("use", READERS)
def test_loaders_without_data(use):
    la = fitted(temperature=None)
    before = Snapshot(la, X)
    for make in NO_DATA:
        with pytest.raises(ValueError, match=r"no data|iterator|at least two inputs; got 0"):
            READERS[use](la, make())
    before.check()


class DataModule:
    """Holds loaders, as those of Lightning do."""

    def train_dataloader(self):
        raise AssertionError("nothing is asked of it")

    val_dataloader = train_dataloader


@pytest.mark.parametrize("use", READERS)
def test_what_holds_loaders_is_no_loader(use):
    own = r"must be an iterable of batches.*type DataModule. Pass one of its own: train_dataloader\(\) or val_dataloader\(\)"
    with pytest.raises(ValueError, match=own):
        READERS[use](fitted(temperature=None), DataModule())


def test_errors_of_no_inputs():
    with pytest.raises(ValueError, match="x must hold at least one input; got none"):
        fitted().approximation_error(inputs(0))


@pytest.mark.parametrize("use", ["val_loader", "joint", "gridsearch"])
def test_bad_validation_data_change_nothing(use):
    la = fitted(temperature=None)
    before = Snapshot(la, X)
    for data in ([(inputs(7), LABELS + C)], [(inputs(7) * NAN, LABELS)], [3]):
        with pytest.raises(ValueError, match=r"[Vv]alidation|batch|\w+ .*\w+"):
            READERS[use](la, data)
    before.check()


def test_loaders_that_cannot_be_read_twice():
    la = fitted(model=Counting(), curvature_size=None)
    before, calls = Snapshot(la, X), la.model.calls
    with pytest.raises(ValueError, match="curvature_size"):
        la.fit(iter(list(train_loader())))
    assert la.model.calls == calls
    with pytest.raises(ValueError, match=f"read 7 inputs, the first {N}"):
        la.fit(Shrinking(list(train_loader())))
    before.check()
    la, generator = build(), (b for b in train_loader())
    la.fit(generator)
    before = Snapshot(la, X)
    with pytest.raises(ValueError, match="no data"):
        la.fit(generator)
    before.check()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_outputs_that_are_not_finite(likelihood):
    x = inputs()
    x[15, 0] = 0
    model = Applied(lambda net, x: net(x) + x[:, :1].abs().log())
    assert_refused(fitted(likelihood, model), loader(x, targets(likelihood)), "batch 2")


def test_features_that_are_not_finite():
    """Outputs are finite everywhere, their gradients not where the input is zero."""
    net = mlp()
    net[0].bias.data.zero_()
    net[2].bias.data.zero_()
    model = Applied(lambda net, x: net(x).square().sum(-1, keepdim=True).sqrt() + net(x), net)
    la, x, landmarks = fitted(model=model), inputs(), (inputs(M, seed=20), torch.arange(M) % C)
    x[15], zero = 0, torch.zeros(1, D, dtype=torch.float64)
    before = Snapshot(la, X)
    with pytest.raises(ValueError, match=r"training inputs \[.*features|features.*training inputs \["):
        la.fit(loader(x, targets("classification")), landmarks=landmarks)
    with pytest.raises(ValueError, match=r"landmarks.*net"):
        la.fit(train_loader(), landmarks=(zero, torch.tensor([1])))
    with pytest.raises(ValueError, match="features"):
        la(zero)
    before.check()


SHAPES = lambda f: f.sum(), lambda f: {"a": f, "b": f}, lambda f: f.tolist(), lambda f: f[:3, 0]


@pytest.mark.parametrize("shape", [*SHAPES, lambda f: SimpleNamespace(logits=f.sum())])
def test_outputs_that_are_not_a_matrix(shape):
    with pytest.raises(ValueError, match=r"\(batch, outputs\)"):
        fitted(model=Applied(lambda net, x: shape(net(x))))


def test_outputs_whose_number_changes():
    def as_wide_as_inputs(net, x):
        return net(nn.functional.pad(x, (0, D - x.shape[1])))[:, : x.shape[1] - 2]

    batches = [*train_loader(), (inputs()[:, : D - 1], torch.zeros(N, dtype=torch.long))]
    with pytest.raises(ValueError, match=r"2 outputs in batch 4 and 3"):
        fitted(model=Applied(as_wide_as_inputs), data=batches)


def test_gradients_that_all_vanish():
    model = mlp()
    for name, p in model.named_parameters():
        p.data.zero_()
        p.requires_grad_(name == "2.weight")
    with pytest.raises(ValueError, match="zero"):
        fitted(model=model)


COORDINATES = [0.0, 1.0], [[0, 1]], [0, 1, 1], [0, C], [0, -1]
LANDMARKS = [*((inputs(2), torch.tensor(outputs)) for outputs in COORDINATES)]
LANDMARKS += [(inputs(2) * NAN, torch.tensor([0, 1])), (inputs(0), torch.tensor([], dtype=torch.long))]


@pytest.mark.parametrize("landmarks", LANDMARKS)
def test_landmarks_that_are_wrong(landmarks):
    la, read = fitted(), []
    before = Snapshot(la, X)
    with pytest.raises(ValueError, match=r"landmarks|0\.\.2"):
        la.fit((read.append(batch) or batch for batch in train_loader()), landmarks=landmarks)
    assert len(read) <= 1
    before.check()


WITHOUT_ARGUMENTS = "sample log_marginal_likelihood optimize_prior_precision state_dict"
OF_INPUTS = "functional_samples predictive_samples features residual_share novelty approximation_error"
ATTRIBUTES = (
    "basis posterior_precision posterior_covariance posterior_scale "
    "log_det_posterior_precision log_det_prior_precision log_det_ratio"
)
UNFITTED = {
    "call": lambda la: la(X),
    "nn": lambda la: la(X, "nn", link_approx="mc"),
    "predictive": lambda la: la.predictive(X, "glm", "probit", 3),
    "functional_samples nn": lambda la: la.functional_samples(X, "nn"),
    "backend.jacobians": lambda la: la.backend.jacobians(X),
    "backend.full": lambda la: la.backend.full(X, targets("classification", 11)),
    "functional_variance": lambda la: la.functional_variance(torch.zeros(11, C, 5)),
    "functional_covariance": lambda la: la.functional_covariance(torch.zeros(11, C, 5)),
    "gridsearch": lambda la: la.optimize_prior_precision(method="gridsearch", val_loader=val_loader()),
    "optimize_hyperparameters": lambda la: la.optimize_hyperparameters(val_loader()),
    "forget": lambda la: la.forget(train_loader()),
    "merge": lambda la: la.merge(fitted()),
    "merge other": lambda la: fitted().merge(la),
    "calibrate_novelty": lambda la: la.calibrate_novelty(val_loader()),
    **{name: lambda la, name=name: getattr(la, name)() for name in WITHOUT_ARGUMENTS.split()},
    **{name: lambda la, name=name: getattr(la, name)(X) for name in OF_INPUTS.split()},
    **{name: lambda la, name=name: getattr(la, name) for name in ATTRIBUTES.split()},
}


@pytest.mark.parametrize("name", UNFITTED)
def test_use_before_a_fit_raises_an_attribute_error_as_in_the_host(name):
    for residual in ("none", "isotropic", "exact"):
        la = build(model=Counting(), residual=residual)
        with pytest.raises(AttributeError, match=r"[Ff]it"):
            UNFITTED[name](la)
        assert la.model.calls == 0


def test_numbers_that_float32_cannot_hold():
    la = fitted(model=mlp(dtype=torch.float32), data=train_loader(dtype=torch.float32))
    for value in (1e39, 1e-50):
        with pytest.raises(ValueError, match="prior_precision"):
            la.prior_precision = value
    assert la.prior_precision == 1


def test_a_folder_that_is_read_only(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("read-only")

    la = fitted(model=Counting())
    before, calls = Snapshot(la, X), la.model.calls
    monkeypatch.setattr(Path, "touch", refuse)  # which works everywhere for those who own the machine
    with pytest.raises(PermissionError, match="read-only"):
        la.fit(train_loader(), checkpoint=tmp_path / "fit")
    assert la.model.calls == calls
    before.check()


def test_networks_at_sampled_weights_whose_outputs_overflow():
    la = fitted(model=Applied(lambda net, x: net(x).exp()), prior_precision=1e-12, temperature=1e6)
    before = Snapshot(la, X)
    draws = {"n_samples": 30, "generator": torch.Generator().manual_seed(0)}
    for predict in (la.functional_samples, la.predictive_samples, partial(la, link_approx="mc")):
        with pytest.raises(ValueError, match="raise the prior precision"):
            predict(X, pred_type="nn", **draws)
    before.check()


@pytest.mark.skipif(not hasattr(BaseException, "add_note"), reason="Python 3.10 has no notes")
@pytest.mark.parametrize("name", ["call", "nn", "features", "novelty", "functional_samples", "fit"])
def test_the_models_own_error_is_raised_and_says_what_it_was_given(name, monkeypatch):
    la = fitted()
    before = Snapshot(la, X)
    monkeypatch.setitem(globals(), "X", torch.zeros(11, D + 2, dtype=torch.float64))
    use = {**UNFITTED, "fit": lambda la: la.fit([(X, torch.zeros(11, dtype=torch.long))])}[name]
    with pytest.raises(RuntimeError, match="shape") as caught:
        use(la)
    assert caught.value.__notes__ == ["The inputs were x of shape (11, 7)."]
    before.check()
