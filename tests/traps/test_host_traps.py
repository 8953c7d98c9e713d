"""What laplace-torch does unexpectedly, or its users rely on."""

from __future__ import annotations

import configparser
import importlib.metadata
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from awkward import X
from helpers import N_TEST, C, D, DictModel, K, dict_batches, fitted, inputs, loader, val_loader
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:The best (prior_precision|temperature), ")


@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
@pytest.mark.parametrize("rank", [1, K])
def test_fewer_directions_than_outputs(link, rank):
    la = fitted(n_eigenvalues=rank, temperature=50.0)
    p = la(X, link_approx=link)
    assert rank < C
    torch.testing.assert_close(p.sum(-1), torch.ones(N_TEST, dtype=torch.float64))
    assert la.predictive_samples(X, n_samples=7).isfinite().all()


@pytest.mark.parametrize("link", ["bridge", "bridge_norm"])
def test_bridge_links_edit_nothing_in_place(link):
    la = fitted(temperature=200.0)
    first = la(X, link_approx=link)
    assert torch.equal(first, la(X, link_approx=link))


def test_marglik_does_not_reset_a_temperature_that_was_tuned():
    la = fitted(temperature=None)
    x = inputs(31, seed=9) * 3
    other = fitted(temperature=1e3)
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, other(x)), grid_size=3)
    tuned = la.temperature
    with pytest.warns(UserWarning, match=r"temperature") as caught:
        la.optimize_prior_precision(n_steps=2)
    assert la.temperature == tuned
    assert "stays 1" not in str(caught[0].message)


def test_the_default_loss_of_regression_depends_on_the_prior():
    la = fitted("regression", temperature=30.0, prior_precision=7.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a tie would warn
        la.optimize_prior_precision(method="gridsearch", val_loader=val_loader("regression"))
    assert la.prior_precision.item() != 7.7


def test_the_default_grid_reaches_large_priors():
    torch.manual_seed(0)
    la = fitted(model=nn.Linear(D, C).double(), temperature=1e9)
    x = inputs(31, seed=9) * 300
    la.prior_precision = 2e5
    y = la(x)
    la.prior_precision = 1.0
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(x, y))
    assert la.prior_precision.item() == pytest.approx(2e5, rel=0.15)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_mappings_and_logits_without_gradients(context):
    la = fitted(model=DictModel(), data=dict_batches())
    with context():
        batch = dict_batches()[0]
        p = la(batch)
    torch.testing.assert_close(p, la(batch))


def test_asdl_is_the_right_package():
    import asdl.core

    assert callable(asdl.core.extend)
    owners = importlib.metadata.packages_distributions()["asdl"]
    assert "asdfghjkl" in owners
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    required = setup["options"]["install_requires"].split()
    assert "asdfghjkl" in required
    assert "asdl" not in required


def test_importing_the_package_switches_nothing():
    code = (
        "import warnings; warnings.simplefilter('ignore');"
        "import torch, laplace, sys; sys.path.insert(0, sys.argv[1]);"
        "state = lambda: (torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.mkldnn.enabled,"
        "torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled(),"
        "torch.initial_seed(), torch.get_rng_state().sum().item());"
        "torch.manual_seed(3); before = state(); import laplace_ella; assert state() == before"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
