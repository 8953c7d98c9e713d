"""Run by test_other_hosts.py where ``laplace`` is the stand-in beside this file."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import warnings
from pathlib import Path

import laplace
import pytest
import torch
from helpers import M, as_tuple, assert_same, build, fitted, inputs, mlp, train_loader
from laplace.curvature import CurvlinopsEF, CurvlinopsGGN
from laplace.curvature.asdl import AsdlGGN, AsdlHessian
from laplace.curvature.backpack import BackPackEF, BackPackGGN

import laplace_ella
from laplace_ella import ELLALaplace, NystromGGN, host

HAS_REGISTRY = os.environ["STAND_IN"] == "registry"
SIZES = {"subsample_size": M, "n_eigenvalues": 5, "temperature": 1.0}
X = inputs(11, seed=7)


def test_the_host_is_the_stand_in():
    assert Path(laplace.__file__).is_relative_to(Path(__file__).parent)
    assert not {"asdl", "backpack"} & sys.modules.keys()


def test_a_factory_that_does_not_find_plug_ins_is_warned_of():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.reload(host)
    assert (not HAS_REGISTRY) == host.FINDS_SUBCLASSES
    assert ["laplace_ella.Laplace instead" in str(w.message) for w in caught] == [True] * HAS_REGISTRY


@pytest.mark.skipif(HAS_REGISTRY, reason="its factory knows its own classes alone")
def test_the_hosts_factory_builds_ella():
    la = laplace.Laplace(mlp(), "classification", "all", "ella", **SIZES)
    assert isinstance(la, ELLALaplace)
    la.fit(train_loader())
    assert torch.equal(la(X), fitted()(X))
    with pytest.raises(ValueError, match="hessian_structure must be one of"):
        laplace_ella.Laplace(mlp(), "classification", "all", "elle")


def test_our_factory_builds_ella_and_leaves_others_to_the_host():
    la = laplace_ella.Laplace(mlp(), "classification", "all", "ella", **SIZES)
    assert isinstance(la, ELLALaplace)
    la.fit(train_loader())
    assert torch.equal(la(X), fitted()(X))
    assert isinstance(laplace_ella.Laplace(mlp(), "regression", "all", "full"), laplace.FullLaplace)


@pytest.mark.parametrize(
    ("backend", "package"), [(BackPackGGN, "backpack-for-pytorch"), (AsdlGGN, "asdfghjkl")], ids=str
)
def test_a_missing_library_is_named_with_what_to_install(backend, package):
    with pytest.raises(ImportError, match=f"pip install {package}"):
        build(backend=backend)


def test_backends_are_known_by_name():
    class Mine(CurvlinopsGGN):
        pass

    for backend in (CurvlinopsGGN, Mine, CurvlinopsGGN(mlp(), "classification"), None):
        assert type(build(backend=backend).backend) is NystromGGN
    for backend in (CurvlinopsEF, BackPackEF, AsdlHessian):
        with pytest.raises(ValueError, match=f"backend={backend.__name__} cannot be used"):
            build(backend=backend)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_an_estimator_tunes_its_prior_and_is_saved_and_sent(likelihood):
    la = fitted(likelihood, sigma_noise=0.5 if likelihood == "regression" else 1.0, dict_key_x="x")
    la.optimize_prior_precision(n_steps=3, prior_structure="layerwise")
    assert la.prior_precision.shape == (4,)
    new = pickle.loads(pickle.dumps(la))
    again = type(la)(**la.get_params())
    again.load_state_dict(la.state_dict())
    for other in (new, again):
        assert (other.backend.dict_key_x, other.dict_key_x) == ("x", "x")
        assert_same(as_tuple(other(X)), as_tuple(la(X)))
