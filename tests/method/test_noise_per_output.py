"""Regression with a noise of its own for each output: a tensor (C,) as ``sigma_noise``."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from conftest import C, K, M, assert_close
from helpers import Snapshot, assert_same, inputs, loader, mlp, targets
from models import Applied
from sklearn.base import clone
from test_counts_and_noise import jacobian
from torch.distributions import Normal

from laplace_ella import ELLALaplace
from laplace_ella.nystrom.basis import identity_basis

F64 = torch.float64
T, DELTA = 1.3, 0.6
SIGMA = torch.tensor([0.2, 1.7, 0.6], dtype=F64)
SCALE = float(SIGMA.log().mean().exp())
X, X_VAL = inputs(7, seed=7), inputs(17, seed=5)
Y_VAL = targets("regression", 17, seed=6)


def build(sigma=SIGMA, model=None, **options) -> ELLALaplace:
    model = mlp() if model is None else model
    sizes = {"n_eigenvalues": K, "subsample_size": M, "curvature_size": None}
    return ELLALaplace(
        model, "regression", sigma, **{**sizes, "temperature": T, "prior_precision": DELTA, **options}
    )


def fit(sigma=SIGMA, model=None, y=None, **options) -> ELLALaplace:
    la = build(sigma, model, **options)
    la.fit(loader(inputs(), targets("regression") if y is None else y))
    return la


@pytest.fixture(scope="module")
def la():
    return fit()


def exact() -> ELLALaplace:
    la = build()
    basis = identity_basis(la.backend.engine.function.weights())
    la.fit(loader(inputs(), targets("regression")), basis=basis)
    return la


def test_precision_evidence_and_moments_are_those_of_dense_matrices():
    la, model = exact(), mlp()
    x, y, theta = inputs(), targets("regression"), oracle.weights(mlp())
    J, f = jacobian(model, x), oracle.outputs(model, x)
    G = torch.einsum("bcp,c,bcq->pq", J, SIGMA**-2, J)
    A = G / T + DELTA * torch.eye(len(G), dtype=F64)
    assert_close(la.posterior_precision, A)
    assert_close(la.sigma_noise, SIGMA)
    misfit = ((f - y).square() / SIGMA**2).sum() / 2
    normaliser = len(x) * (SIGMA * math.sqrt(2 * math.pi)).log().sum()
    complexity = torch.logdet(A) - len(theta) * math.log(DELTA) + DELTA * theta @ theta
    assert_close(la.log_marginal_likelihood(), -misfit / T - normaliser - complexity / 2)
    J_test = jacobian(model, X)
    mean, covariance = la(X)
    assert_close(mean, oracle.outputs(model, X))
    assert_close(covariance, J_test @ torch.linalg.inv(A) @ J_test.mT)
    loss, curvature = la.backend.full(x, y)
    assert_close(curvature, la.H)
    assert_close(loss, la.loss)


def test_it_is_one_noise_of_outputs_in_other_units():
    ratios = SIGMA / SCALE
    scaled = Applied(lambda net, x: net(x) / ratios, mlp())
    other, same = build(SCALE, scaled), build()
    for e, y in ((other, targets("regression") / ratios), (same, targets("regression"))):
        e.fit(loader(inputs(), y), basis=identity_basis(e.backend.engine.function.weights()))
    assert_close(same.H, other.H)
    assert_close(same.log_marginal_likelihood(), other.log_marginal_likelihood())
    assert_close(same(X)[0], other(X)[0] * ratios)
    assert_close(same(X)[1], other(X)[1] * ratios[:, None] * ratios)


def test_labels_may_be_sampled():
    expected = fit()
    sampled = build(curvature="mc", curvature_samples=2000)
    with pytest.warns(UserWarning, match="estimates G"):
        sampled.fit(loader(inputs(), targets("regression")), basis=expected.basis)
    assert_close(sampled.H, expected.H, rtol=0.08)


def nll(la) -> float:
    mean, variance = la(X_VAL, diagonal_output=True)
    return -float(Normal(mean, (variance + la.sigma_noise**2).sqrt()).log_prob(Y_VAL).sum(1).mean())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tuning_scales_all_noises_together():
    la = fit(temperature=None)
    result = la.optimize_hyperparameters(loader(X_VAL, Y_VAL, 5))
    assert la.sigma_noise.shape == (C,)
    assert_close(la.sigma_noise / la.sigma_noise[0], SIGMA / SIGMA[0])
    assert result.best.sigma_noise == pytest.approx(float(la.sigma_noise.log().mean().exp()), rel=1e-9)
    assert result.score == pytest.approx(nll(la), rel=1e-9)
    assert la.sigma_noise[0] != SIGMA[0]
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(X_VAL, Y_VAL), grid_size=3)
    assert_close(la.sigma_noise / la.sigma_noise[0], SIGMA / SIGMA[0])


def test_the_scale_has_the_gradient_of_the_evidence():
    la = fit()
    log_scale = torch.tensor([0.3], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: la.log_marginal_likelihood(sigma_noise=s.exp() * SIGMA), (log_scale,)
    )
    assert_close(la.sigma_noise, SIGMA * math.exp(0.3), rtol=1e-5)


def test_a_fit_lets_it_be_scaled_and_nothing_else():
    la, before = fit(), Snapshot(fit(), X)
    la.sigma_noise = 2 * la.sigma_noise
    expected = fit(2 * SIGMA)
    assert_close(la.posterior_precision, expected.posterior_precision)
    for value in (0.5, torch.tensor(0.5), SIGMA.flip(0), torch.ones(C), torch.tensor([0.2, 1.7])):
        with pytest.raises(ValueError, match="as a whole only"):
            before.la.sigma_noise = value
        with pytest.raises(ValueError, match="as a whole only"):
            before.la.log_marginal_likelihood(sigma_noise=torch.as_tensor(value))
    one = fit(0.5)
    with pytest.raises(ValueError, match="as a whole only"):
        one.sigma_noise = SIGMA
    before.check()
    unfitted = build()
    unfitted.sigma_noise = 0.5
    assert unfitted.sigma_noise.shape == ()


def test_states_clones_and_merges(la, tmp_path):
    torch.save(la.state_dict(), tmp_path / "la.pt")
    for sigma in (1.0, SIGMA.flip(0)):
        other = fit(sigma)
        other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
        assert_close(other.sigma_noise, SIGMA)
        assert_same(other(X), la(X))
    twin = clone(la)
    assert_close(twin.sigma_noise, SIGMA)
    twin.fit(loader(inputs(), targets("regression")), basis=la.basis)
    assert_close(twin.H, la.H)
    twin.merge(la)
    assert_close(twin.H, 2 * la.H)
    turned = build(SIGMA.flip(0))
    turned.fit(loader(inputs(), targets("regression")), basis=la.basis)
    with pytest.raises(ValueError, match="sigma_noise"):
        turned.merge(la)
    assert "sigma_noise=3 values" in repr(la)
    damaged = {**la.state_dict(), "sigma_noise": SIGMA[:2]}
    with pytest.raises(ValueError, match="sigma_noise must be 1 or C positive numbers"):
        twin.load_state_dict(damaged)


class Stopping:
    """Batches that end with an error at first."""

    def __init__(self):
        self.data, self.stops = list(loader(inputs(), targets("regression"), 5)), True

    def __iter__(self):
        for i, batch in enumerate(self.data):
            if self.stops and i == 3:
                raise OSError("no more")
            yield batch


def test_a_fit_is_not_resumed_with_other_ratios(tmp_path):
    data = Stopping()
    with pytest.raises(OSError, match="no more"):
        build().fit(data, checkpoint=tmp_path / "fit", checkpoint_every=1)
    data.stops = False
    with pytest.raises(ValueError, match="ratios of sigma_noise"):
        build(SIGMA.flip(0)).fit(data, checkpoint=tmp_path / "fit", checkpoint_every=1)
    la = build()
    la.fit(data, checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert_close(la.H, fit(y=targets("regression")).H)


def test_the_number_of_noises_is_that_of_the_outputs():
    with pytest.raises(ValueError, match=r"batch 0.*one for each of the model's 3 outputs; got 2"):
        fit(SIGMA[:2])
    for bad in (SIGMA[None], -SIGMA, SIGMA[:0], SIGMA * float("nan")):
        with pytest.raises(ValueError, match="sigma_noise must be"):
            build(bad)
    with pytest.raises(ValueError, match="sigma_noise is for regression"):
        ELLALaplace(mlp(), "classification", SIGMA)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_methods_are_compared_with_the_noise_of_each_output():
    x, y = inputs(60, seed=5), targets("regression", 60, seed=6)
    la = fit(temperature=None)
    result = la.optimize_hyperparameters(loader(x, y, 13), "auto", method="MAP")
    assert la.variance == "none"
    with torch.no_grad():
        inside = (y - la.model(x)).abs() <= 1.6448536269514722 * SIGMA
    coverage = result.held_out["MAP"].metrics["coverage 90%"]
    assert coverage == pytest.approx(float(inside.double().mean()))
    assert_close(la.uncertainty(x).total, SIGMA.square().expand(60, C))
