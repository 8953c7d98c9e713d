"""The calls of code that was written for laplace-torch, unchanged but for one string; and its factory."""

from __future__ import annotations

import laplace
import numpy as np
import pytest
import torch
from helpers import C, M, as_tuple, build, fitted, inputs, mlp, nll_of_calls, train_loader, val_loader
from laplace.baselaplace import BaseLaplace
from laplace.curvature import AsdlEF, AsdlGGN, AsdlHessian, CurvlinopsGGN
from laplace.utils.enums import LinkApprox, PredType, PriorStructure, TuningMethod
from torch import nn

import laplace_ella
from laplace_ella import ELLALaplace

pytestmark = pytest.mark.filterwarnings("ignore:The best (prior_precision|temperature), ")

LIKELIHOODS = ["classification", "regression"]
SIZES = {"scalar": 1, "layerwise": 4, "diag": sum(p.numel() for p in mlp().parameters())}
X = inputs(11, seed=7)


def test_positional_arguments_are_the_hosts():
    options = 0.5, 3.0, 0.1, 2.0, True, "x", "y", CurvlinopsGGN, {"chunk_size": 2}, {}
    la = laplace_ella.Laplace(mlp(), "regression", "all", "ella", *options)
    assert (la.sigma_noise.item(), la.prior_precision.item(), la.temperature) == (0.5, 3.0, 2.0)
    assert la.prior_mean.item() == 0.1
    assert (la.enable_backprop, la.dict_key_x, la.dict_key_y) == (True, "x", "y")
    assert la.backend.engine.chunk_size == 2


def test_enums_mean_what_their_strings_mean():
    options = {"subsample_size": M, "n_eigenvalues": 5, "temperature": 1.0}
    kind = laplace.Likelihood.CLASSIFICATION, laplace.SubsetOfWeights.ALL
    by_enum = laplace.Laplace(mlp(), *kind, "ella", **options)
    by_enum.fit(train_loader())
    by_string = fitted()
    for link in LinkApprox:
        left = by_enum(X, pred_type=PredType.GLM, link_approx=link)
        assert torch.equal(left, by_string(X, pred_type="glm", link_approx=link.value))
    by_enum(X, PredType.NN, link_approx=LinkApprox.MC)
    enums = PredType.GLM, TuningMethod.MARGLIK
    by_enum.optimize_prior_precision(*enums, n_steps=3, prior_structure=PriorStructure.LAYERWISE)
    by_string.optimize_prior_precision("glm", "marglik", n_steps=3, prior_structure="layerwise")
    assert torch.equal(by_enum.prior_precision, by_string.prior_precision)
    for la, method in ((by_enum, TuningMethod.GRIDSEARCH), (by_string, "gridsearch")):
        la.optimize_prior_precision(method=method, val_loader=val_loader(), grid_size=5)
    assert torch.equal(by_enum.prior_precision, by_string.prior_precision)
    assert "classification" in repr(by_enum)
    by_string.load_state_dict(by_enum.state_dict())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_code_for_the_hosts_own_ella_runs(likelihood):
    options = {"subsample_size": M, "n_eigenvalues": 5, "prior_precision": 2.0, "temperature": 1.0, "seed": 3}
    la, val = laplace.Laplace(mlp(), likelihood, "all", "ella", **options), val_loader(likelihood)
    la.fit(train_loader(likelihood), val_loader=val, val_steps=1, balanced=likelihood == "classification")
    history = la.fit_history_["val_nll"]
    assert la.fit_history_["processed_examples"] == [7, 14, 21, 23]
    assert len(history) == len(set(history)) == 4
    assert history[-1] == pytest.approx(nll_of_calls(la, val))
    la.optimize_prior_precision(pred_type="gp", method="gridsearch", val_loader=val, grid_size=5)
    assert as_tuple(la(X, pred_type="gp", link_approx="probit"))[0].shape == (11, C)
    la.fit(train_loader(likelihood))
    assert la.fit_history_ == {"processed_examples": [23.0], "val_nll": []}


@pytest.mark.parametrize(
    ("likelihood", "structure"),
    [("classification", "scalar"), ("classification", "diag"), ("regression", "layerwise")],
)
@pytest.mark.parametrize("backend", [AsdlGGN, CurvlinopsGGN])
def test_marglik_training_runs(likelihood, structure, backend):
    model = mlp()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    options = {"hessian_structure": "ella", "backend": backend, "prior_structure": structure}
    data = train_loader(likelihood)
    la, trained, margliks, losses = laplace.marglik_training(
        model, data, likelihood, **options, n_epochs=2, n_hypersteps=2
    )
    assert isinstance(la, ELLALaplace)
    assert trained is model
    assert (len(margliks), len(losses)) == (4, 2)
    assert np.isfinite(margliks).all()
    assert not torch.equal(before, nn.utils.parameters_to_vector(model.parameters()).detach())
    assert la.prior_precision.shape == (SIZES[structure],)
    assert as_tuple(la(X))[0].shape == (11, C)


STRUCTURES = {"full": "Full", "kron": "Kron", "diag": "Diag", "lowrank": "LowRank", "gp": "Functional"}
SUBSETS = {"all": ("", STRUCTURES), "last_layer": ("LL", ["full", "kron", "diag", "gp"])}
SUBSETS["subnetwork"] = ("Subnet", ["full", "diag"])
OTHERS = {(s, h): f"{STRUCTURES[h]}{of}Laplace" for s, (of, names) in SUBSETS.items() for h in names}


@pytest.mark.parametrize("key", OTHERS, ids="-".join)
@pytest.mark.parametrize("factory", [laplace.Laplace, laplace_ella.Laplace])
def test_every_other_flavour_still_resolves(key, factory):
    kwargs = {"subnetwork_indices": torch.tensor([0, 1])} if key[0] == "subnetwork" else {}
    kwargs |= {"n_subset": 3} if key[1] == "gp" else {}
    try:
        name = type(factory(mlp(), "classification", *key, **kwargs)).__name__
    except ImportError as error:  # the class itself asks for a package that it needs
        name = next(word for word in str(error).replace(",", "").split() if word.endswith("Laplace"))
    assert name == OTHERS[key]


REFUSED = [
    ({"backend": AsdlEF}, "empirical Fisher"),
    ({"backend": AsdlHessian}, "backend"),
    ({"backend": "CurvlinopsGGN"}, "backend"),
    ({"likelihood": "reward_modeling", "sigma_noise": 0.7}, "regression"),
]


@pytest.mark.parametrize(("options", "match"), REFUSED, ids=str)
def test_what_the_host_takes_and_ella_cannot_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        build(**options)


def test_keys_are_unique():
    todo, named = [BaseLaplace], set()
    while todo:
        todo += (own := todo.pop().__subclasses__())
        named |= {c for c in own if hasattr(c, "_key")}
    keys = [c._key for c in named]
    assert ("all", "ella") in keys
    assert len(set(keys)) == len(keys), sorted((c._key, c.__name__) for c in named)
