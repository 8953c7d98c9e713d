"""The callback in a trainer of Lightning, on a CPU: fit, tune, predict, save, load."""

from __future__ import annotations

import pytest
import torch
from helpers import N, assert_same, inputs, loader, mlp, targets
from torch import nn

from laplace_ella.lightning import ELLACallback

pl = pytest.importorskip("lightning.pytorch")
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]  # Lightning warns of its loaders

SIZES = {"subsample_size": 11, "n_eigenvalues": 3}
X = inputs(11, seed=7, dtype=torch.float32)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader(inputs(dtype=torch.float32), targets("classification"), shuffle=True)

    def val_dataloader(self):
        return loader(inputs(230, seed=3, dtype=torch.float32), targets("classification", 230, seed=4), 50)

    def predict_dataloader(self):
        return loader(X, targets("classification", 11), 5)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.dropout = mlp(dtype=torch.float32), nn.Dropout(0.3)

    def forward(self, x):
        return self.net(self.dropout(x))

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    validation_step = training_step

    def predict_step(self, batch, index):
        return "the module's own"

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def trainer(tmp_path, callback, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "default_root_dir": tmp_path}
    return pl.Trainer(callbacks=[callback], **{"max_epochs": 2, **quiet, **options})


@pytest.mark.parametrize("network", [None, "net"])
def test_it_fits_tunes_predicts_and_is_saved(network, tmp_path):
    callback, net = ELLACallback(network=network, **SIZES), Net()
    run = trainer(tmp_path, callback)
    run.fit(net, Data())
    la = callback.la
    assert la.model is (net if network is None else net.net)
    assert la.n_data == N
    assert callback.result.chosen
    found = run.predict(net, Data())
    assert_same(torch.cat(found), torch.cat([la(x) for x in X.split(5)]))
    assert net.predict_step(None, 0) == "the module's own"
    run.save_checkpoint(tmp_path / "run.ckpt")
    other = ELLACallback(network=network, **SIZES)
    again = trainer(tmp_path, other).predict(Net(), Data(), ckpt_path=tmp_path / "run.ckpt")
    assert other.la.model is not la.model
    assert_same(torch.cat(again), torch.cat(found))


def test_a_run_for_trial_is_as_short_as_the_trainers(tmp_path):
    callback = ELLACallback(tune=None, **SIZES)
    trainer(tmp_path, callback, fast_dev_run=1).fit(Net(), Data())
    assert callback.la.n_data == 7  # one batch
