"""What laplace-torch promises the users of its parametric flavours, kept here too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calls import generator
from helpers import (
    N,
    as_tuple,
    assert_same,
    build,
    dict_batches,
    fitted,
    inputs,
    reward_batches,
    targets,
    train_loader,
)
from models import Applied, C, D, DictModel, H, RewardModel, mlp, weighted
from torch import nn
from torch.nn import functional as F
from torch.utils.data import SubsetRandomSampler, WeightedRandomSampler

from laplace_ella import NystromGGN, ReverseNystromGGN

pytestmark = pytest.mark.filterwarnings("ignore:The best (prior_precision|temperature), ")

F64 = torch.float64
L, P = 4, D * H + H + H * C + C
LIKELIHOODS = ["classification", "regression"]
LINKS = ["probit", "mc", "bridge", "bridge_norm"]
X = inputs(11, seed=7)


# What a test_arguments.py refuses is not here.
FORMS = {
    "float": 0.7,
    "numpy32": np.float32(0.7),
    "numpy-int": np.int64(3),
    "0-d": torch.tensor(0.7),
    "1-d": torch.tensor([0.7]),
}
VECTORS = {"layerwise": torch.arange(1.0, L + 1), "diagonal": torch.linspace(1, 2, P)}


@pytest.mark.parametrize("value", FORMS.values(), ids=FORMS)
def test_noise_and_temperature_take_every_scalar_form(value):
    la = fitted("regression", sigma_noise=value, temperature=value)
    assert la.sigma_noise.shape == ()
    expected = torch.as_tensor(value, dtype=F64).item()
    assert (la.sigma_noise.item(), la.temperature) == pytest.approx((expected, expected))
    torch.testing.assert_close(la.posterior_precision, la.H / expected**3 + torch.eye(5, dtype=F64))


@pytest.mark.parametrize("form", [*FORMS, *VECTORS])
def test_prior_precision_takes_every_form(form):
    value = {**FORMS, **VECTORS}[form]
    la = fitted(prior_precision=value)
    torch.testing.assert_close(la.prior_precision, torch.as_tensor(value).reshape(-1).to(F64))
    assert la.prior_precision_diag.shape == (P,)
    assert la(X).isfinite().all()


def test_prior_mean_takes_every_form_and_enters_the_scatter():
    for value in (0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.full((P,), 0.3)):
        la = fitted(prior_mean=value, prior_precision=2.0)
        theta = nn.utils.parameters_to_vector(la.model.parameters()).detach()
        torch.testing.assert_close(la.scatter, 2 * (theta - 0.3).square().sum())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize(("pred_type", "diagonal_output"), [("glm", False), ("glm", True), ("nn", False)])
@pytest.mark.parametrize("method", ["functional_samples", "predictive_samples"])
def test_function_samples_have_the_hosts_shape_and_repeat(likelihood, pred_type, diagonal_output, method):
    draw = getattr(fitted(likelihood), method)
    options = {"pred_type": pred_type, "n_samples": 13, "diagonal_output": diagonal_output}
    first, second, other = (draw(X, **options, generator=generator(s)) for s in (0, 0, 1))
    assert first.shape == (13, 11, C)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    total = first.sum(-1)
    is_distribution = torch.allclose(total, torch.ones_like(total)) and bool((first > 0).all())
    assert is_distribution == (likelihood == "classification" and method == "predictive_samples")


def test_nn_samples_are_outputs_at_weight_samples():
    la = fitted("regression")
    weights, model = la.sample(3, generator()), mlp()
    assert weights.shape == (3, P)
    samples = la.functional_samples(X, "nn", 3, generator=generator())
    moments = la(X, "nn", link_approx="mc", n_samples=3, generator=generator())
    torch.testing.assert_close(moments, (samples.mean(0), samples.var(0)))
    for w, f in zip(weights, samples, strict=True):
        nn.utils.vector_to_parameters(w, model.parameters())
        torch.testing.assert_close(f, model(X).detach())


@pytest.mark.parametrize("link", LINKS)
def test_class_probabilities(link):
    la = fitted()
    options = {"link_approx": link, "n_samples": 19}
    p = la(X, **options)
    assert p.shape == (11, C)
    torch.testing.assert_close(p.sum(-1), torch.ones(11, dtype=F64))
    assert (p > 0).all()
    assert not p.requires_grad
    for same in (la(X, "gp", **options), la(X, joint=True, **options), la.predictive(X, "glm", link, 19)):
        assert torch.equal(p, same)


@pytest.mark.parametrize("pred_type", ["glm", "gp"])
def test_regression_moments(pred_type):
    la = fitted("regression")
    mean, cov = la(X, pred_type)
    torch.testing.assert_close(mean, la.model(X).detach())
    same, var = la(X, pred_type, diagonal_output=True)
    torch.testing.assert_close(var, cov.diagonal(dim1=1, dim2=2))
    assert torch.equal(mean, same)
    joint_mean, joint_cov = la(X, pred_type, joint=True)
    assert torch.equal(joint_mean, mean.flatten())
    blocks = joint_cov.reshape(11, C, 11, C)
    torch.testing.assert_close(torch.stack([blocks[b, :, b] for b in range(11)]), cov)
    Js = la.backend.jacobians(X)[0]
    torch.testing.assert_close(joint_cov, la.functional_covariance(Js))
    torch.testing.assert_close(cov, la.functional_variance(Js))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("n", [0, 11])
def test_nn_predictions_and_batches_without_inputs(likelihood, n):
    la = fitted(likelihood)
    shapes = [(n, C)] if likelihood == "classification" else [(n, C), (n, C, C)]
    assert [t.shape for t in as_tuple(la(X[:n]))] == shapes
    assert la.functional_samples(X[:n], n_samples=2).shape == (2, n, C)
    if n:
        first, same = (la(X, "nn", link_approx="mc", n_samples=13, generator=generator()) for _ in range(2))
        assert_same(first, same)
        assert all(t.shape == (n, C) for t in as_tuple(first))


def test_reward_modeling_fits_and_tunes_pairs_and_predicts_rewards():
    la, pairs = (
        fitted(name, RewardModel(), reward_batches()) for name in ("reward_modeling", "classification")
    )
    assert_same(la.H, pairs.H)
    assert_same(la.log_marginal_likelihood(), pairs.log_marginal_likelihood())
    mean, cov = la(X)
    assert cov.shape == (11, 1, 1)
    torch.testing.assert_close(mean, la.model(X).detach())
    assert [t.shape for t in la(X, "nn", link_approx="mc")] == [(11, 1), (11, 1)]
    assert [t.shape for t in la(X, joint=True)] == [(11,), (11, 11)]
    x, _ = next(iter(reward_batches()))
    p = la(x, fitting=True)
    assert p.shape == (7, 2)
    torch.testing.assert_close(p.sum(-1), torch.ones(7, dtype=F64))
    for method in ("marglik", "gridsearch"):
        for estimator in (la, pairs):
            val = reward_batches(17) if method == "gridsearch" else None
            estimator.optimize_prior_precision(method=method, n_steps=5, val_loader=val, grid_size=7)
        assert torch.equal(la.prior_precision, pairs.prior_precision)
        assert la.prior_precision.item() != 1.0


def test_mapping_batches_and_logits():
    data = dict_batches("tokens", "y")
    la = fitted(model=DictModel("tokens"), data=data, dict_key_x="tokens", dict_key_y="y")
    assert la.n_data == N
    for options in ({}, {"pred_type": "nn", "link_approx": "mc"}, *({"link_approx": link} for link in LINKS)):
        assert la(data[1], **options).shape == (7, C)
    for pred_type in ("glm", "nn"):
        assert la.predictive_samples(data[1], pred_type, 5).shape == (5, 7, C)
    la.optimize_prior_precision(method="gridsearch", val_loader=dict_batches("tokens", "y", 17), grid_size=5)
    assert la.prior_precision.item() in torch.logspace(-4, 6, 5).tolist()
    with pytest.raises(KeyError, match="labels"):
        fitted(model=DictModel(), data=dict_batches(key_y="y"))


def test_dict_key_x_names_the_entry_that_holds_the_batch():
    weights = torch.arange(1.0, 6.0).double()
    shared = [{"weights": weights, **b} for b in dict_batches()]
    written_out = [{**b, "weights": weights.expand(len(b["labels"]), 5)} for b in dict_batches()]
    la, expected = (fitted(model=Applied(weighted, DictModel()), data=data) for data in (shared, written_out))
    torch.testing.assert_close(la.H, expected.H)
    torch.testing.assert_close(la(shared[0]), expected(written_out[0]))


@pytest.mark.parametrize("backend", [NystromGGN, ReverseNystromGGN])
@pytest.mark.parametrize("options", [{}, {"joint": True}, {"diagonal_output": True}], ids=str)
def test_backprop_reaches_the_inputs_through_mean_and_covariance(backend, options):
    la = fitted("regression", enable_backprop=True, backend=backend)
    for p in la.model.parameters():
        p.grad = torch.full_like(p, 7.0)
    x = inputs(2, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: la(x, **options), (x,))
    sum(t.sum() for t in la(x, **options)).backward()
    assert x.grad.abs().min() > 0
    assert all(bool((p.grad == 7).all()) for p in la.model.parameters())


@pytest.mark.parametrize("link", LINKS)
def test_backprop_reaches_the_inputs_through_every_link(link):
    la = fitted(enable_backprop=True, n_eigenvalues=2 if link == "mc" else 5, temperature=3.0)
    x = inputs(2, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: la(x, link_approx=link, n_samples=7), (x,))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_backprop_reaches_the_inputs_through_samples_if_asked_for(likelihood, pred_type):
    la = fitted(likelihood, enable_backprop=True)
    x = inputs(2, seed=8).requires_grad_()
    draw = lambda x: la.predictive_samples(x, pred_type, 3, generator=generator())  # noqa: E731
    assert torch.autograd.gradcheck(draw, (x,))
    plain = fitted(likelihood)
    assert not any(t.requires_grad for t in as_tuple(plain(x, pred_type, link_approx="mc")))


SAMPLERS = {
    "subset": lambda: SubsetRandomSampler(range(17), generator=generator()),
    "weighted": lambda: WeightedRandomSampler(torch.arange(1.0, N + 1), 19, generator=generator()),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_decides_what_the_data_are(name):
    la = fitted(data=train_loader(sampler=SAMPLERS[name]()))
    index = torch.tensor(list(SAMPLERS[name]()))
    assert la.n_data == len(index)
    logits = la.model(inputs()[index])
    expected = F.cross_entropy(logits, targets("classification")[index], reduction="sum")
    torch.testing.assert_close(la.loss, expected)


def test_progress_bars_name_their_step(capsys):
    la = build()
    la.fit(train_loader(), progress_bar=True)
    search = {"method": "gridsearch", "val_loader": train_loader(), "grid_size": 3}
    la.optimize_prior_precision(**search, progress_bar=True)
    text = capsys.readouterr().err
    for step in ("Training data", "Landmark gradients", "Gram matrix", "Curvature", "Grid search"):
        assert step in text
