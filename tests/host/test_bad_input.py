"""Bad input: a clear error before any work, and nothing lost."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import (
    C,
    D,
    DictModel,
    M,
    N,
    Snapshot,
    assert_same,
    build,
    dict_batches,
    fitted,
    inputs,
    loader,
    mlp,
    targets,
    train_loader,
    val_loader,
)
from torch import nn

import laplace_ella

LIKELIHOODS = ["classification", "regression"]
X = inputs(11, seed=7)
NAN, INF = float("nan"), float("inf")


class Counting(nn.Module):
    """Counts how often it is called."""

    def __init__(self, **kwargs):
        super().__init__()
        self.net, self.calls = mlp(**kwargs), 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


def snapshot(la):
    return Snapshot(la, X)


# ------------------------------------------------------------------ constructor


@pytest.mark.parametrize("name", ["link_aprox", "diagonal_outputs"])
def test_misspelt_arguments_of_a_prediction(name):
    with pytest.raises(ValueError, match=name):
        fitted()(inputs(3), **{name: "mc"})


def test_ella_needs_all_weights():
    with pytest.raises(ValueError, match=r"needs subset_of_weights='all'; got 'last_layer'"):
        laplace_ella.Laplace(mlp(), hessian_structure="ella")


@pytest.mark.parametrize("likelihood", ["poisson", "", None, 3])
def test_unknown_likelihood(likelihood):
    with pytest.raises(ValueError, match="classification"):
        build(likelihood)


@pytest.mark.parametrize("value", [0, -1, 0.0, -0.5, 1.5, 2.0, NAN, True, "3", [3]], ids=str)
def test_a_memory_budget_is_bytes_or_a_share(value):
    with pytest.raises(ValueError, match=r"memory_budget must be .* got"):
        build(memory_budget=value)


@pytest.mark.parametrize("name", ["subsample_size", "curvature_size", "chunk_size"])
@pytest.mark.parametrize("value", [0, -1, 1.0, 0.5, 2.0, NAN, True, "3", [3]], ids=str)
def test_sizes_must_be_positive_integers(name, value):
    with pytest.raises(ValueError, match=name):
        build(**{name: value})


@pytest.mark.parametrize("value", [-1, 1.0, None, True, 2**63])
def test_seed_must_be_a_seed(value):
    with pytest.raises(ValueError, match="seed"):
        build(seed=value)


@pytest.mark.parametrize("model", [nn.Tanh(), nn.Linear(2, 3).requires_grad_(False)], ids=["none", "frozen"])
def test_model_without_trainable_parameters(model):
    with pytest.raises(ValueError, match=r"requires? grad"):
        laplace_ella.Laplace(model, "classification", "all", "ella")


POSITIVE = ["prior_precision", "temperature", "sigma_noise"]
NOT_POSITIVE = [
    0,
    0.0,
    -1.0,
    NAN,
    INF,
    torch.tensor(0.0),
    torch.tensor([-1.0]),
    torch.tensor([NAN]),
    "1",
    True,
]


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", NOT_POSITIVE, ids=str)
def test_hyperparameters_must_be_positive(name, value):
    with pytest.raises(ValueError, match=name):
        build("regression", **{name: value})


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", NOT_POSITIVE, ids=str)
def test_a_refused_assignment_changes_nothing(name, value):
    la = fitted("regression")
    before = snapshot(la)
    with pytest.raises(ValueError, match=name):
        setattr(la, name, value)
    before.check()


@pytest.mark.parametrize("size", [4, 66])
@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF])
def test_vector_priors_must_be_positive_in_every_entry(size, value):
    delta = torch.ones(size)
    delta[2] = value
    with pytest.raises(ValueError, match="prior_precision"):
        build(prior_precision=delta)


# ------------------------------------------------------------------ loaders


def bad_targets(likelihood):
    x = inputs(7)
    if likelihood == "regression":
        f = targets("regression", 7)
        return {
            "one axis": (x, f[:, 0]),
            "one output": (x, f[:, :1]),
            "three axes": (x, f[..., None]),
            "not a number": (x, torch.where(f > 0, f, NAN)),
            "infinite": (x, torch.where(f > 0, f, INF)),
        }
    y = targets("classification", 7)
    p = nn.functional.one_hot(y, C).double()
    return {
        "float": (x, y.double()),
        "bool": (x, y > 0),
        "too large": (x, y + C),
        "negative": (x, y - C),
        "ignore index": (x, torch.full_like(y, -100)),
        "too few probabilities": (x, p[:, :2]),
        "three axes": (x, p[..., None]),
        "probabilities not a number": (x, torch.where(p > 0, p, NAN)),
    }


BAD_BATCHES = {
    "a tensor": inputs(7),
    "one element": (inputs(7),),
    "three elements": (inputs(7), targets("classification", 7), targets("classification", 7)),
    "a string": "xy",
    "a number": 3,
    "inputs as list": (inputs(7).tolist(), targets("classification", 7)),
    "targets as list": (inputs(7), [0, 1, 2, 0, 1, 2, 0]),
    "other length": (inputs(7), targets("classification", 5)),
    "scalar target": (inputs(7), torch.tensor(1)),
    "scalar input": (torch.tensor(1.0), targets("classification", 7)),
    "a mapping without inputs": {"labels": torch.tensor(1)},
}


def assert_refused(la, data, match, error=ValueError, **options):
    """A fresh fit, a second one and an addition of data are refused; the previous fit stays."""
    before = Snapshot(la, X)
    for override in (True, False):
        with pytest.raises(error, match=match):
            la.fit(data, override=override, **options)
        before.check()


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_batches_of_the_wrong_structure(name):
    assert_refused(fitted(), [BAD_BATCHES[name]], r"[Bb]atch|[Ii]nputs|[Tt]argets")


@pytest.mark.parametrize(
    ("likelihood", "name"),
    [(likelihood, name) for likelihood in LIKELIHOODS for name in bad_targets(likelihood)],
)
@pytest.mark.parametrize("position", [0, 1])
def test_targets_that_do_not_fit(likelihood, name, position):
    good = (inputs(7), targets(likelihood, 7))
    data = [good, good]
    data[position] = bad_targets(likelihood)[name]
    assert_refused(fitted(likelihood), data, f"batch {position}")


def test_a_single_output_is_no_classification():
    with pytest.raises(ValueError, match="two outputs"):
        fitted(model=mlp(1), data=loader(inputs(), torch.zeros(N, dtype=torch.long)))


@pytest.mark.parametrize("data", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_empty_loader(data):
    assert_refused(fitted(), data, "no data")


def test_a_loader_of_empty_batches():
    assert_refused(fitted(), [(inputs(0), targets("classification", 0))], "no data")


def test_a_generator_that_was_read_before():
    la = build()
    generator = (b for b in train_loader())
    la.fit(generator)
    before = snapshot(la)
    with pytest.raises(ValueError, match="no data"):
        la.fit(generator)
    before.check()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_inputs_that_are_not_finite(value, likelihood):
    x = inputs()
    x[8, 1] = value
    assert_refused(fitted(likelihood), loader(x, targets(likelihood)), "batch 1")


def test_mapping_inputs_that_are_not_finite():
    batches = dict_batches()
    batches[2]["attention_mask"] = batches[2]["attention_mask"].double() * NAN
    with pytest.raises(ValueError, match="batch 2"):
        fitted(model=DictModel(), data=batches)


class Log(nn.Module):
    """Its outputs are infinite where the first input is zero."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x) + x[:, :1].abs().log()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_outputs_that_are_not_finite(likelihood):
    x = inputs()
    x[15, 0] = 0
    assert_refused(fitted(likelihood, Log()), loader(x, targets(likelihood)), "batch 2")


class Root(nn.Module):
    """Its outputs are finite everywhere, their gradients not where the input is zero."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.net[0].bias.data.zero_()
        self.net[2].bias.data.zero_()

    def forward(self, x):
        f = self.net(x)
        return f.square().sum(-1, keepdim=True).sqrt() + f


def test_features_that_are_not_finite():
    x = inputs()
    x[15] = 0
    la = fitted(model=Root())
    landmarks = (inputs(M, seed=20), torch.arange(M) % C)
    before = snapshot(la)
    with pytest.raises(ValueError, match=r"training inputs \[.*features|features.*training inputs \["):
        la.fit(loader(x, targets("classification")), landmarks=landmarks)
    before.check()
    with pytest.raises(ValueError, match=r"landmarks.*net"):
        la.fit(train_loader(), landmarks=(torch.zeros(1, D, dtype=torch.float64), torch.tensor([1])))
    before.check()
    with pytest.raises(ValueError, match="features"):
        la(torch.zeros(2, D, dtype=torch.float64))
    before.check()


class Shaped(nn.Module):
    """Returns its outputs in a shape of choice."""

    def __init__(self, shape):
        super().__init__()
        self.net, self.shape = mlp(), shape

    def forward(self, x):
        return self.shape(self.net(x))


@pytest.mark.parametrize(
    "shape",
    [
        lambda f: f[:, 0],
        lambda f: f.sum(),
        lambda f: (f, f),
        lambda f: {"logits": f},
        lambda f: SimpleNamespace(logits=f[:, 0]),
        lambda f: f.tolist(),
    ],
    ids=["one axis", "scalar", "tuple", "dict", "logits of one axis", "list"],
)
def test_outputs_that_are_not_a_matrix(shape):
    with pytest.raises(ValueError, match=r"\(batch, outputs\)"):
        fitted(model=Shaped(shape))


def test_outputs_whose_number_changes():
    class AsWideAsInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(nn.functional.pad(x, (0, D - x.shape[1])))[:, : x.shape[1] - 2]

    batches = [*train_loader(), (inputs()[:, : D - 1], torch.zeros(N, dtype=torch.long))]
    with pytest.raises(ValueError, match=r"2 outputs in batch 4 and 3"):
        fitted(model=AsWideAsInputs(), data=batches)


# ------------------------------------------------------------------ options of fit


@pytest.mark.parametrize(
    "landmarks",
    [
        3,
        inputs(2),
        (inputs(2),),
        (inputs(2), [0, 1]),
        (inputs(2), torch.tensor([0.0, 1.0])),
        (inputs(2), torch.tensor([[0, 1]])),
        (inputs(3), torch.tensor([0, 1])),
        (inputs(0), torch.tensor([], dtype=torch.long)),
        (inputs(2) * NAN, torch.tensor([0, 1])),
        (inputs(2), torch.tensor([0, C])),
        (inputs(2), torch.tensor([0, -1])),
    ],
    ids=range(11),
)
def test_landmarks_of_the_wrong_form(landmarks):
    la = fitted()
    before = snapshot(la)
    with pytest.raises(ValueError, match="landmarks"):
        la.fit(train_loader(), landmarks=landmarks)
    before.check()


def test_gradients_that_all_vanish():
    model = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="zero"):
        fitted(model=model)


def test_balanced_landmarks_need_classes():
    la = fitted("regression")
    before = snapshot(la)
    with pytest.raises(ValueError, match="balanced"):
        la.fit(train_loader("regression"), balanced=True)
    before.check()


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_val_steps_must_be_a_positive_integer(value):
    assert_refused(fitted(), train_loader(), "val_steps", val_loader=val_loader(), val_steps=value)


def test_a_one_shot_iterator_cannot_be_streamed_twice():
    model = Counting()
    la = fitted(model=model, curvature_size=None)
    before, calls = snapshot(la), model.calls
    with pytest.raises(ValueError, match="curvature_size"):
        la.fit(iter(list(train_loader())))
    assert model.calls == calls
    before.check()


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [(inputs(7), targets("classification", 7) + C)],
        [(inputs(7) * NAN, targets("classification", 7))],
        [3],
    ],
    ids=["empty", "class index", "nan", "structure"],
)
def test_a_bad_validation_loader_leaves_the_previous_fit(bad):
    la = fitted()
    before = snapshot(la)
    other = loader(inputs(seed=30), targets("classification", seed=31))
    with pytest.raises(ValueError, match=r"[Vv]alidation|batch"):
        la.fit(other, val_loader=bad)
    before.check()


# ------------------------------------------------------------------ prediction

CALLS = {
    "call": lambda la: la(X),
    "nn": lambda la: la(X, "nn", link_approx="mc"),
    "predictive": lambda la: la.predictive(X, "glm", "probit", 3),
    "sample": lambda la: la.sample(3),
    "functional_samples": lambda la: la.functional_samples(X),
    "functional_samples nn": lambda la: la.functional_samples(X, "nn"),
    "predictive_samples": lambda la: la.predictive_samples(X),
    "features": lambda la: la.features(X),
    "jacobians": lambda la: la.backend.jacobians(X),
    "basis": lambda la: la.basis,
    "functional_variance": lambda la: la.functional_variance(torch.zeros(11, C, 5)),
    "functional_covariance": lambda la: la.functional_covariance(torch.zeros(11, C, 5)),
    "posterior_precision": lambda la: la.posterior_precision,
    "posterior_covariance": lambda la: la.posterior_covariance,
    "evidence": lambda la: la.log_marginal_likelihood(),
    "marglik": lambda la: la.optimize_prior_precision(),
    "gridsearch": lambda la: la.optimize_prior_precision(method="gridsearch", val_loader=val_loader()),
    "state_dict": lambda la: la.state_dict(),
}


@pytest.mark.parametrize("name", CALLS)
def test_use_before_fit_raises_an_attribute_error_as_in_the_host(name):
    model = Counting()
    la = build(model=model)
    with pytest.raises(AttributeError, match=r"fit"):
        CALLS[name](la)
    assert model.calls == 0


BAD_CALLS = {
    "pred_type": {"pred_type": "mcmc"},
    "pred_type None": {"pred_type": None},
    "link": {"link_approx": "softmax"},
    "link None": {"link_approx": None},
    "nn with probit": {"pred_type": "nn", "link_approx": "probit"},
    "n_samples 0": {"link_approx": "mc", "n_samples": 0},
    "n_samples -1": {"link_approx": "mc", "n_samples": -1},
    "n_samples float": {"link_approx": "mc", "n_samples": 10.0},
    "generator": {"link_approx": "mc", "generator": 3},
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_unknown_options_of_a_call(name, likelihood):
    model = Counting()
    la = fitted(likelihood, model)
    before, calls = snapshot(la), model.calls
    with pytest.raises(ValueError, match=r"pred_type|link_approx|n_samples|generator"):
        la(X, **BAD_CALLS[name])
    assert model.calls == calls
    before.check()


@pytest.mark.parametrize("method", ["functional_samples", "predictive_samples"])
@pytest.mark.parametrize(
    "options", [{"pred_type": "mcmc"}, {"n_samples": 0}, {"n_samples": 2.5}, {"generator": 3}], ids=str
)
def test_unknown_options_of_samples(method, options):
    model = Counting()
    la = fitted(model=model)
    calls = model.calls
    with pytest.raises(ValueError, match=next(iter(options))):
        getattr(la, method)(X, **options)
    assert model.calls == calls


@pytest.mark.parametrize("n_samples", [0, -1, 2.5])
def test_unknown_options_of_weight_samples(n_samples):
    with pytest.raises(ValueError, match="n_samples"):
        fitted().sample(n_samples)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    "name", ["call", "nn", "functional_samples", "functional_samples nn", "predictive_samples"]
)
def test_predicting_at_inputs_that_are_not_finite(value, name, monkeypatch):
    la = fitted()
    before = Snapshot(la, X.clone())
    bad = X.clone()
    bad[3, 1] = value
    monkeypatch.setitem(globals(), "X", bad)
    with pytest.raises(ValueError, match="finite"):
        CALLS[name](la)
    before.check()


@pytest.mark.parametrize("x", [X.tolist(), X.numpy(), None], ids=["list", "array", "None"])
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_inputs_that_are_no_tensor(x, pred_type):
    with pytest.raises(ValueError, match="tensor"):
        fitted()(x, pred_type, link_approx="mc")


@pytest.mark.parametrize("method", ["functional_variance", "functional_covariance"])
@pytest.mark.parametrize(
    "features",
    [torch.zeros(2, C, 7), torch.zeros(2, 5), torch.zeros(2, C, 66), "phi"],
    ids=["K", "axes", "P", "type"],
)
def test_jacobians_must_be_features(method, features):
    with pytest.raises(ValueError, match="features"):
        getattr(fitted(), method)(features)


@pytest.mark.parametrize("method", ["log_prob", "square_norm"])
def test_there_is_no_density_over_all_weights(method):
    la = fitted()
    with pytest.raises(NotImplementedError, match="density"):
        getattr(la, method)(la.mean)


# ------------------------------------------------------------------ tuning

BAD_TUNING = {
    "method": {"method": "crossval"},
    "structure": {"method": "marglik", "prior_structure": "kron"},
    "pred_type": {"pred_type": "mcmc"},
    "link": {"method": "gridsearch", "link_approx": "softmax", "val_loader": val_loader()},
    "nn with probit": {"method": "gridsearch", "pred_type": "nn", "val_loader": val_loader()},
    "grid_size": {"method": "gridsearch", "grid_size": 0, "val_loader": val_loader()},
    "n_samples": {"method": "gridsearch", "n_samples": 0, "val_loader": val_loader()},
    "no data": {"method": "gridsearch"},
    "empty": {"method": "gridsearch", "val_loader": []},
    "class index": {"method": "gridsearch", "val_loader": [(X, torch.full((11,), C))]},
    "nan": {"method": "gridsearch", "val_loader": [(X * NAN, torch.zeros(11, dtype=torch.long))]},
    "loss": {"method": "gridsearch", "loss": "nll", "val_loader": val_loader()},
    "nan loss": {"method": "gridsearch", "loss": lambda p, y: torch.tensor(NAN), "val_loader": val_loader()},
    "init": {"method": "marglik", "init_prior_prec": -1.0},
    "init tensor": {"method": "marglik", "init_prior_prec": torch.ones(5)},
}


@pytest.mark.parametrize("name", BAD_TUNING)
@pytest.mark.parametrize("temperature", [None, 3.0])
def test_tuning_with_bad_input_changes_nothing(name, temperature):
    la = fitted(temperature=temperature, prior_precision=2.0)
    before = snapshot(la)
    with pytest.raises(ValueError, match=r"\w+ .*\w+"):
        la.optimize_prior_precision(**BAD_TUNING[name])
    before.check()


@pytest.mark.parametrize(
    ("likelihood", "sigma"), [("regression", -1.0), ("regression", NAN), ("classification", 0.5)]
)
def test_a_refused_noise_leaves_the_prior_too(likelihood, sigma):
    la = fitted(likelihood)
    before = snapshot(la)
    with pytest.raises(ValueError, match=r"noise"):
        la.log_marginal_likelihood(prior_precision=torch.tensor(7.0), sigma_noise=torch.tensor(sigma))
    before.check()


# ------------------------------------------------------------------ dtypes and checkpoints


def test_double_data_are_converted_to_the_dtype_of_the_model():
    single = fitted(model=mlp(dtype=torch.float32), data=train_loader(dtype=torch.float32))
    with pytest.warns(UserWarning, match=r"inputs of torch.float64.*converted to torch.float32"):
        double = fitted(model=mlp(dtype=torch.float32), data=train_loader())
    assert_same(double(X), single(X.float()))
    assert_same(
        double(X, "nn", link_approx="mc", generator=torch.Generator().manual_seed(0)),
        single(X.float(), "nn", link_approx="mc", generator=torch.Generator().manual_seed(0)),
    )
    assert double(X).dtype == torch.float32
    assert torch.equal(double.loss, single.loss)


def test_double_targets_are_converted_to_the_dtype_of_the_model():
    x, y = inputs(dtype=torch.float32), targets("regression")
    single = fitted("regression", mlp(dtype=torch.float32), loader(x, y.float()))
    double = fitted("regression", mlp(dtype=torch.float32), loader(x, y))
    torch.testing.assert_close(double.loss, single.loss)


def test_a_checkpoint_of_another_model():
    state = fitted(model=mlp(seed=1)).state_dict()
    la = fitted()
    before = snapshot(la)
    with pytest.raises(ValueError, match="another model"):
        la.load_state_dict(state)
    before.check()
