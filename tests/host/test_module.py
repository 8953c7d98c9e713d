"""An estimator as a module: what code that takes modules does with it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import C, D, DictModel, assert_same, build, dict_batches, fitted, inputs, mlp, train_loader
from torch import nn

X = inputs(11, seed=7)
PICKLED = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


def saved(module):
    """The state of a module, through a file of tensors and plain types."""
    torch.save(module.state_dict(), file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_a_forward_pass_is_a_call(likelihood):
    la = fitted(likelihood)
    for options in ({}, {"diagonal_output": True}, {"link_approx": "mc", "n_samples": 7}, {"joint": True}):
        assert_same(la.as_module(**options)(X), la(X, **options))
    mean, variance = fitted("regression").as_module(diagonal_output=True)(X)
    assert mean.shape == variance.shape == (11, C)


@pytest.mark.parametrize(
    "options", [{"link_approx": "none"}, {"pred_type": "mc"}, {"n_samples": 0}, {"joint": 2}]
)
def test_arguments_are_checked_at_once(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fitted().as_module(**options)


def test_train_flags_change_no_prediction_and_stay_as_they_are():
    net = nn.Sequential(nn.Linear(D, 7), nn.Dropout(0.5), nn.Linear(7, C)).double().eval()
    la = fitted(model=net)
    module, expected = la.as_module(), la(X)
    assert not module.training
    assert_same(module.train()(X), expected)
    assert net[1].training
    assert la.as_module().training
    assert_same(module.eval()(X), expected)
    assert not net[1].training


def test_a_module_keeps_the_setting_there_was():
    la = fitted(temperature=None)
    module, expected = la.as_module(), la(X)
    la.temperature, la.n_directions = 50.0, 1
    la.fit(train_loader(), override=False)
    assert not torch.equal(la(X), expected)
    assert_same(module(X), expected)


def test_parameters_and_state_are_those_of_the_network_and_the_posterior():
    la = fitted()
    module = la.as_module()
    assert all(a is b for a, b in zip(module.parameters(), la.model.parameters(), strict=True))
    names = [f"model.{k}" for k in la.model.state_dict()]
    assert list(module.state_dict()) == [*names, "posterior._extra_state"]


@pytest.mark.parametrize("other", [build, fitted])
def test_a_state_brings_the_networks_weights_and_the_posterior(other):
    la = fitted(temperature=None, prior_precision=5.0)
    new = other(model=mlp(seed=9), temperature=None).as_module()
    found = new.load_state_dict(saved(la.as_module()))
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert_same(new(X), la(X))


def test_a_state_of_the_network_alone_has_no_posterior():
    module = build().as_module()
    with pytest.raises(RuntimeError, match=r"Missing key.*posterior._extra_state"):
        module.load_state_dict({f"model.{k}": v for k, v in mlp(seed=9).state_dict().items()})
    with pytest.raises(AttributeError, match=r"[Ff]it"):
        module(X)


@pytest.mark.parametrize("name", PICKLED)
def test_copies_have_one_network_of_their_own(name):
    la = fitted()
    module, expected = la.as_module(link_approx="mc"), la(X, link_approx="mc")
    new = PICKLED[name](module)
    assert new.posterior.estimator.model is new.model is not la.model
    la.model[0].bias.data += 1
    assert_same(new(X), expected)


def test_it_moves_with_its_network():
    model = mlp(dtype=torch.float32)
    la = fitted(model=model, data=train_loader(dtype=torch.float32))
    module, expected = la.as_module(), la(X.float())
    with pytest.raises(ValueError, match="was fitted with"):
        module.to(torch.float64)(X)
    assert_same(module.to(torch.float32)(X.float()), expected)
    assert module.to("meta").model[0].weight.is_meta  # any device


def test_entries_by_name():
    la = fitted(model=DictModel(), data=dict_batches())
    batch = dict_batches()[0]
    entries = {k: batch[k] for k in ("input_ids", "attention_mask")}
    assert_same(la.as_module()(**entries), la(entries))
    for args, kwargs in (((), {}), ((entries,), entries)):
        with pytest.raises(ValueError, match=r"takes one input.*or else"):
            la.as_module()(*args, **kwargs)


def test_in_other_modules_and_without_gradients():
    la = fitted()
    stacked = nn.Sequential(nn.Identity(), la.as_module())
    assert_same(stacked(X), la(X))
    assert not stacked(X).requires_grad
    with torch.inference_mode():
        assert_same(stacked(X), la(X))
    x = X.clone().requires_grad_()
    fitted(enable_backprop=True).as_module()(x)[:, 0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_compiler_leaves_it_as_it_is():
    la = fitted()
    assert_same(torch.compile(la.as_module(), backend="eager")(X), la(X))


def test_no_graph_is_made_of_it():
    module = fitted().as_module()
    with pytest.raises(RuntimeError, match="cannot be traced or exported"):
        torch.jit.trace(module, (X,))
    with pytest.raises(Exception, match=r"cannot be traced or exported|PredictiveModule.forward"):
        torch.export.export(module, (X,))
    assert module(X).isfinite().all()
