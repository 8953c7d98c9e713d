"""How other libraries call a laplace-torch estimator, without these libraries; tests/clients has them."""

from __future__ import annotations

import copy

import laplace
import pytest
import torch
from helpers import as_tuple, assert_same, fitted, inputs, mlp, train_loader
from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsGGN

from laplace_ella import ELLALaplace, NystromGGN, ReverseNystromGGN

X = inputs(11, seed=7)
SIZES = {"subsample_size": 13, "n_eigenvalues": 5}


@pytest.mark.filterwarnings("ignore:The evidence tunes the prior only")
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_torch_uncertainty_fits_by_the_hosts_keywords(task):
    """torch_uncertainty/post_processing/laplace.py (0.13.0): LaplaceApprox."""
    la = laplace.Laplace(model=mlp(), likelihood=task, subset_of_weights="all", hessian_structure="ella")
    la.fit(train_loader=train_loader(task))
    la.optimize_prior_precision(method="marglik", pred_type="glm", link_approx="probit")
    found = la(X, pred_type="glm", link_approx="probit", n_samples=100)
    assert isinstance(found, tuple) == (task == "regression")
    assert la.prior_precision.item() != 1


@pytest.mark.parametrize("backend", [CurvlinopsGGN, BackPackGGN, AsdlGGN, NystromGGN, ReverseNystromGGN])
def test_lightning_uq_box_rebuilds_from_names_in_the_code_with_the_backend_as_an_instance(backend):
    """lightning_uq_box/uq_methods/laplace_model.py (0.2.0): LaplaceBase."""
    la = laplace.Laplace(mlp(), "regression", "all", "ella", backend=backend, sigma_noise=0.7, **SIZES)
    names = la.__init__.__code__.co_varnames
    given = {n: getattr(la, n) for n in names if hasattr(la, n) and n != "model"}
    assert isinstance(given["backend"], NystromGGN)
    assert {"backend", "likelihood", "sigma_noise", "seed", "temperature"} <= given.keys()
    new = type(la)(**given, model=copy.deepcopy(la.model))
    assert type(new.backend) is type(la.backend)
    assert new.backend is not la.backend
    for each in (la, new):
        each.fit(train_loader("regression"))
    assert_same(as_tuple(new(X)), as_tuple(la(X)))


def test_lightning_uq_box_tunes_by_gradients_and_predicts_in_inference_mode():
    """The same file: tune_prior_precision_and_sigma, LaplaceRegression.predict_step."""
    la = fitted("regression")
    logs = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = torch.optim.Adam(logs, lr=0.1)
    with torch.inference_mode():
        for _ in range(3):
            with torch.inference_mode(False):
                optimizer.zero_grad()
                (-la.log_marginal_likelihood(logs[0].exp(), logs[1].exp())).backward()
                optimizer.step()
        assert all(log.grad.abs().sum() > 0 for log in logs)
        with torch.inference_mode(False):
            x = X.clone().requires_grad_()
        mean, variance = la(x, pred_type="glm", link_approx="probit")
        samples = la.predictive_samples(x, pred_type="glm", n_samples=7)
    assert la.sigma_noise.item() > 0
    torch.testing.assert_close(mean, la.model(X).detach())
    assert (variance.diagonal(dim1=1, dim2=2) > 0).all()
    assert samples.permute(1, 2, 0).shape == (*mean.shape, 7)


def test_laplace_bayesopt_adds_noise_to_joint_covariances_in_place():
    """laplace_bayesopt/botorch.py (0.1.7): LaplaceBoTorch.posterior, after the evidence left its graph."""
    la = fitted("regression", model=mlp(1), data=one_output(), enable_backprop=True)
    log_prior = torch.ones(1, requires_grad=True)
    (-la.log_marginal_likelihood(log_prior.exp(), torch.tensor([0.5]))).backward()
    x = X[:6].clone().requires_grad_()
    before = la(x, joint=True)[1].detach()
    mean, covariance = la(x, joint=True)
    covariance += la.sigma_noise**2 * torch.eye(6, dtype=covariance.dtype)
    blocks = torch.einsum("bqkbrl->bqkrl", covariance.reshape(3, 2, 1, 3, 2, 1)).reshape(3, 2, 2)
    (mean.sum() + torch.linalg.cholesky(blocks).sum()).backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    torch.testing.assert_close(la(x, joint=True)[1].detach(), before)


def one_output():
    return [(x, y[:, :1]) for x, y in train_loader("regression")]


def test_types_are_what_they_are_called():
    assert isinstance(fitted(), laplace.ParametricLaplace)
    assert isinstance(fitted(), laplace.BaseLaplace)
    assert type(fitted()) is ELLALaplace
