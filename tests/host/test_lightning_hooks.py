"""The hooks of the callback, without Lightning: a stand-in takes its place."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import N, Snapshot, assert_same, inputs, loader, mlp, targets, train_loader
from torch import nn

import laplace_ella

X = inputs(11, seed=7)
SIZES = {"subsample_size": 11, "n_eigenvalues": 3}
VAL = loader(inputs(230, seed=3), targets("classification", 230, seed=4), 50)


class Callback:
    state_key = "ELLACallback"


def imported(monkeypatch, **packages):
    """Import the module anew, where these packages are what there is of Lightning."""
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, packages.get(name.replace(".", "_")))
    monkeypatch.delitem(sys.modules, "laplace_ella.lightning", raising=False)
    found = importlib.import_module("laplace_ella.lightning")
    monkeypatch.delattr(laplace_ella, "lightning", raising=False)  # the next test imports its own
    monkeypatch.delitem(sys.modules, "laplace_ella.lightning")
    return found


@pytest.fixture
def make(monkeypatch):
    package = ModuleType("pytorch_lightning")
    package.Callback = Callback
    return imported(monkeypatch, pytorch_lightning=package).ELLACallback


class Module(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.net = mlp(seed=seed)

    def forward(self, x):
        return self.net(x)

    def predict_step(self, batch, index):
        return "the module's own"


def trainer(train=None, val=VAL, **limits):
    """What the callback reads of a trainer."""
    limits = {"num_training_batches": 4, "num_val_batches": [5], **limits}
    train = train_loader() if train is None else train
    return SimpleNamespace(train_dataloader=train, val_dataloaders=val, **limits)


def trained(make, run=None, module=None, **options):
    callback, module = make(**{"tune": None, **SIZES, **options}), module or Module()
    callback.on_train_start(run, module)
    callback.on_train_end(run or trainer(), module)
    return callback, module


def test_without_lightning_the_module_is_imported_and_the_callback_refused(monkeypatch):
    refused = imported(monkeypatch).ELLACallback
    with pytest.raises(ImportError, match="pip install lightning"):
        refused()


def test_the_package_in_use_is_taken(monkeypatch):
    packages = {
        name: SimpleNamespace(Callback=type(name, (), {}))
        for name in ("lightning_pytorch", "pytorch_lightning")
    }
    found = imported(monkeypatch, lightning=ModuleType("lightning"), **packages).ELLACallback
    assert found.__mro__[1] is packages["lightning_pytorch"].Callback
    found = imported(monkeypatch, pytorch_lightning=packages["pytorch_lightning"]).ELLACallback
    assert found.__mro__[1] is packages["pytorch_lightning"].Callback


@pytest.mark.filterwarnings("ignore:The best .* lies on an edge")  # labels are drawn by chance
@pytest.mark.parametrize("network", [None, "net"])
def test_it_fits_and_tunes_at_the_end_of_training(make, network):
    callback, module = trained(make, network=network, tune={"search": "auto"})
    assert callback.la.model is (module if network is None else module.net)
    assert callback.la.n_data == N
    assert callback.result.chosen


@pytest.mark.parametrize("val", [VAL, [VAL], {"only": VAL}])
def test_loaders_are_cut_to_what_the_trainer_reads(make, val):
    limits = {"num_training_batches": 2, "num_val_batches": [1]}
    with pytest.warns(UserWarning, match="Only 50 validation inputs"):
        callback, _ = trained(make, trainer(val=val, **limits), tune={"search": ["temperature"]})
    assert callback.la.n_data == 14
    endless = (batch for batch in list(train_loader()) * 99)
    callback, _ = trained(make, trainer(endless, num_training_batches=3))
    assert callback.la.n_data == 21


def test_several_loaders_are_refused_and_none_for_tuning_is_warned_of(make):
    with pytest.raises(ValueError, match=r"one training loader; the trainer has 2.*callback.fit"):
        trained(make, trainer([train_loader()] * 2))
    with pytest.warns(UserWarning, match="no validation loader"):
        callback, _ = trained(make, trainer(val=None), tune={"search": "auto"})
    assert callback.result is None


def test_it_takes_the_place_of_predict_step_until_the_end(make):
    callback, module = trained(make)
    for stop in (
        lambda: callback.on_predict_end(None, module),
        lambda: callback.on_exception(None, module, OSError()),
    ):
        callback.on_predict_start(None, module)
        for batch in (X, [X], (X, torch.zeros(11))):
            assert_same(module.predict_step(batch, 0), callback.la(X))
        stop()
        assert module.predict_step(X, 0) == "the module's own"


def test_no_posterior_predicts_at_other_weights(make):
    callback, module = make(**SIZES), Module()
    with pytest.raises(RuntimeError, match=r"no posterior.*ckpt_path.*callback.fit"):
        callback.on_predict_start(None, module)
    callback, module = trained(make)
    module.net[0].bias.data += 1
    with pytest.raises(ValueError, match="changed since the fit"):
        callback.on_predict_start(None, module)
    other = Module(seed=1)
    with pytest.raises(ValueError, match="of another module"):
        trained(make)[0].on_predict_start(None, other)
    callback.fit(module, train_loader())
    callback.on_predict_start(None, module)
    callback.on_train_start(None, module)
    assert callback.la is None


def test_checkpoints_hold_the_posterior_once_there_is_one(make):
    callback, module = make(tune=None, **SIZES), Module()
    assert callback.state_dict() == {}
    callback, module = trained(make, temperature=3.0)
    checkpoint = {"callbacks": {"ELLACallback": callback.state_dict()}}
    other, new = make(**SIZES), Module(seed=1)
    other.on_load_checkpoint(None, new, {"callbacks": {}})
    assert other.la is None
    with pytest.raises(ValueError, match="made with another model"):
        other.on_load_checkpoint(None, new, checkpoint)
    new.load_state_dict(module.state_dict())
    other.on_load_checkpoint(None, new, checkpoint)
    assert_same(other.la(X), callback.la(X))


def test_a_fit_that_fails_leaves_no_posterior_of_other_weights(make):
    callback, module = trained(make)
    before = Snapshot(callback.la, X)
    with pytest.raises(ValueError, match="no data"):
        callback.fit(module, [])
    assert callback.la is None
    before.check()
