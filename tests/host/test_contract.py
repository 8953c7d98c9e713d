"""What laplace-torch promises the users of its parametric flavours, kept here too."""

from __future__ import annotations

import warnings

import laplace
import numpy as np
import pytest
import torch
import torchmetrics
from helpers import (
    C,
    D,
    DictModel,
    H,
    M,
    N,
    RewardModel,
    as_tuple,
    assert_same,
    build,
    dict_batches,
    fitted,
    inputs,
    loader,
    mlp,
    reward_batches,
    targets,
    train_loader,
    val_loader,
)
from laplace.baselaplace import BaseLaplace
from laplace.curvature import (
    AsdlEF,
    AsdlGGN,
    AsdlHessian,
    BackPackEF,
    BackPackGGN,
    CurvlinopsEF,
    CurvlinopsGGN,
    CurvlinopsHessian,
)
from laplace.utils import RunningNLLMetric
from laplace.utils.enums import LinkApprox, PredType, PriorStructure, TuningMethod
from torch import nn
from torch.distributions import Categorical, Normal
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, WeightedRandomSampler

import laplace_ella
from laplace_ella import ELLALaplace, NystromGGN, ReverseNystromGGN

# Networks of a few weights on random labels often have their optimum on an edge of the grid;
# test_hyperparameter_search.py tests what is said of it.
pytestmark = pytest.mark.filterwarnings("ignore:The best (prior_precision|temperature), ")


P = D * H + H + H * C + C
L = 4
LIKELIHOODS = ["classification", "regression"]
LINKS = ["probit", "mc", "bridge", "bridge_norm"]
X = inputs(11, seed=7)


# ------------------------------------------------------------------ constructor


@pytest.mark.parametrize(
    "value",
    [0.7, torch.tensor(0.7), torch.tensor([0.7]), np.float64(0.7), np.float32(0.7)],
    ids=["float", "0-d", "1-d", "numpy64", "numpy32"],
)
def test_sigma_noise_takes_every_scalar_form(value):
    la = build("regression", sigma_noise=value)
    assert la.sigma_noise.shape == ()
    assert la.sigma_noise.item() == pytest.approx(0.7)


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(1, 1), "0.7", None, [1.0, 2.0]])
def test_sigma_noise_of_a_wrong_form_is_refused(value):
    with pytest.raises(ValueError, match=r"[Nn]oise"):
        build("regression", sigma_noise=value)


@pytest.mark.parametrize("likelihood", ["classification", "reward_modeling"])
def test_sigma_noise_is_for_regression_only(likelihood):
    with pytest.raises(ValueError, match="regression"):
        build(likelihood, sigma_noise=0.7)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (3.5, 1),
        (3, 1),
        (np.float64(3.5), 1),
        (np.float32(3.5), 1),
        (np.int64(3), 1),
        (torch.tensor(3.5), 1),
        (torch.tensor([3.5]), 1),
        (torch.arange(1.0, L + 1), L),
        (torch.linspace(1, 2, P), P),
    ],
    ids=["float", "int", "numpy64", "numpy32", "numpy-int", "0-d", "1-d", "layerwise", "diagonal"],
)
def test_prior_precision_takes_every_form(value, size):
    la = build(prior_precision=value)
    expected = torch.as_tensor(value).reshape(-1).to(torch.float64)
    assert la.prior_precision.shape == (size,)
    torch.testing.assert_close(la.prior_precision, expected)
    la.fit(train_loader())
    assert la.prior_precision_diag.shape == (P,)
    assert la(X).isfinite().all()


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(P + 1), torch.ones(1, P), "1", None, [1.0]])
def test_prior_precision_of_a_wrong_form_is_refused(value):
    with pytest.raises(ValueError, match=r"[Pp]rior"):
        build(prior_precision=value)


@pytest.mark.parametrize(
    "value",
    [0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.full((P,), 0.3)],
    ids=["float", "0-d", "1-d", "P"],
)
def test_prior_mean_takes_every_form_and_enters_the_scatter(value):
    la = fitted(prior_mean=value, prior_precision=2.0)
    theta = torch.cat([p.detach().flatten() for p in la.model.parameters()])
    torch.testing.assert_close(la.scatter, 2 * (theta - 0.3).square().sum())


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(1, P), "0", None])
def test_prior_mean_of_a_wrong_form_is_refused(value):
    with pytest.raises(ValueError, match=r"prior_mean"):
        build(prior_mean=value)


@pytest.mark.parametrize("value", [2, 2.0, np.float64(2), np.float32(2), torch.tensor(2.0)])
def test_temperature_takes_numbers_and_divides_the_curvature(value):
    la = fitted(temperature=value)
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(la.posterior_precision, la.H / 2 + eye)


@pytest.mark.parametrize("sizes", [{"subsample_size": np.int64(7)}, {"n_eigenvalues": np.int32(3)}])
def test_sizes_may_be_numpy_integers_as_in_the_hosts_ella(sizes):
    la = build(**sizes)
    la.fit(train_loader())
    assert la(X).shape == (11, C)


def test_positional_arguments_are_the_hosts():
    la = laplace_ella.Laplace(
        mlp(),
        "regression",
        "all",
        "ella",
        0.5,
        3.0,
        0.1,
        2.0,
        True,
        "x",
        "y",
        CurvlinopsGGN,
        {"chunk_size": 2},
        {},
    )
    assert (la.sigma_noise.item(), la.prior_precision.item(), la.temperature) == (0.5, 3.0, 2.0)
    assert la.prior_mean.item() == 0.1
    assert (la.enable_backprop, la.dict_key_x, la.dict_key_y) == (True, "x", "y")
    assert la.backend.engine.chunk_size == 2


def test_unknown_backend_options_are_refused():
    with pytest.raises(ValueError, match="backend_kwargs"):
        build(backend_kwargs={"stochastic": True})


def test_enums_mean_what_their_strings_mean():
    by_enum = laplace.Laplace(
        mlp(),
        laplace.Likelihood.CLASSIFICATION,
        laplace.SubsetOfWeights.ALL,
        "ella",
        subsample_size=M,
        n_eigenvalues=5,
        temperature=1.0,
    )
    by_enum.fit(train_loader())
    by_string = fitted()
    for link in LinkApprox:
        left = by_enum(X, pred_type=PredType.GLM, link_approx=link)
        assert torch.equal(left, by_string(X, pred_type="glm", link_approx=link.value))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    left = by_enum(X, PredType.NN, link_approx=LinkApprox.MC, generator=generators[0])
    assert torch.equal(left, by_string(X, "nn", link_approx="mc", generator=generators[1]))
    by_enum.optimize_prior_precision(
        PredType.GLM, TuningMethod.MARGLIK, n_steps=3, prior_structure=PriorStructure.LAYERWISE
    )
    by_string.optimize_prior_precision("glm", "marglik", n_steps=3, prior_structure="layerwise")
    torch.testing.assert_close(by_enum.prior_precision, by_string.prior_precision)
    by_enum.optimize_prior_precision(method=TuningMethod.GRIDSEARCH, val_loader=val_loader(), grid_size=5)
    by_string.optimize_prior_precision(method="gridsearch", val_loader=val_loader(), grid_size=5)
    assert torch.equal(by_enum.prior_precision, by_string.prior_precision)
    assert "classification" in repr(by_enum)
    by_string.load_state_dict(by_enum.state_dict())


# ------------------------------------------------------------------ likelihood and evidence


def test_log_likelihood_is_the_categoricals():
    la = fitted()
    expected = Categorical(logits=la.model(inputs())).log_prob(targets("classification")).sum()
    torch.testing.assert_close(la.log_likelihood, expected.detach())


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7])
def test_log_likelihood_is_the_normals_and_follows_sigma(sigma):
    la = fitted("regression")
    la.sigma_noise = sigma
    expected = Normal(la.model(inputs()), sigma).log_prob(targets("regression")).sum()
    torch.testing.assert_close(la.log_likelihood, expected.detach())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("size", [1, L, P])
def test_evidence_has_the_gradient_of_finite_differences_in_the_prior(likelihood, size):
    la = fitted(likelihood)
    delta = torch.linspace(0.5, 2.0, size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: la.log_marginal_likelihood(prior_precision=d), (delta,))


@pytest.mark.parametrize("size", [1, L])
def test_evidence_has_the_gradient_of_finite_differences_in_prior_and_noise(size):
    la = fitted("regression", prior_mean=0.2)
    delta = torch.linspace(0.5, 2.0, size, dtype=torch.float64, requires_grad=True)
    for sigma in (torch.tensor(0.6, dtype=torch.float64), torch.tensor([0.6], dtype=torch.float64)):
        assert torch.autograd.gradcheck(la.log_marginal_likelihood, (delta, sigma.requires_grad_()))


def test_evidence_at_other_hyperparameters_keeps_them():
    la = fitted("regression")
    la.log_marginal_likelihood(torch.tensor(3.0), torch.tensor(0.5))
    assert (la.prior_precision.item(), la.sigma_noise.item()) == (3.0, 0.5)
    torch.testing.assert_close(la.posterior_precision, la.H / 0.25 + 3 * torch.eye(5, dtype=torch.float64))


def test_evidence_takes_no_noise_in_classification():
    with pytest.raises(ValueError, match="regression"):
        fitted().log_marginal_likelihood(sigma_noise=torch.tensor(0.5))


def test_evidence_of_an_unfitted_estimator_is_refused():
    with pytest.raises(AttributeError, match="fit"):
        build().log_marginal_likelihood()


def test_evidence_can_be_maximised_as_in_the_hosts_regression_example():
    la = fitted("regression")
    before = la.log_marginal_likelihood().item()
    log_prior = torch.ones(1, dtype=torch.float64, requires_grad=True)
    log_sigma = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_prior, log_sigma], lr=1e-1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = -la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())
        loss.backward()
        optimizer.step()
    assert -loss.item() > before
    assert log_prior.grad.abs().max() < 1
    residual = (la.model(inputs()) - targets("regression")).square().mean().sqrt().item()
    assert log_sigma.exp().item() == pytest.approx(residual, rel=0.3)
    mean, var = la(X)
    assert not mean.requires_grad
    assert not var.requires_grad


# ------------------------------------------------------------------ samples


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_weight_samples_have_the_hosts_shape_and_repeat(likelihood):
    la = fitted(likelihood)
    assert la.sample(17).shape == (17, P)
    first, second, other = (la.sample(17, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    first = la.sample(3)
    torch.manual_seed(0)
    assert torch.equal(first, la.sample(3))


def test_weight_samples_follow_the_parameters_order():
    la = fitted(prior_precision=1e12)
    theta = nn.utils.parameters_to_vector(la.model.parameters()).detach()
    torch.testing.assert_close(la.sample(2), theta.expand(2, P), atol=1e-4, rtol=0)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@pytest.mark.parametrize("diagonal_output", [False, True])
@pytest.mark.parametrize("method", ["functional_samples", "predictive_samples"])
def test_function_samples_have_the_hosts_shape_and_repeat(likelihood, pred_type, diagonal_output, method):
    draw = getattr(fitted(likelihood), method)
    options = {"pred_type": pred_type, "n_samples": 13, "diagonal_output": diagonal_output}
    first, second, other = (draw(X, **options, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == (13, 11, C)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    total = first.sum(-1)
    is_distribution = torch.allclose(total, torch.ones_like(total)) and bool((first > 0).all())
    assert is_distribution == (likelihood == "classification" and method == "predictive_samples")


def test_diagonal_samples_are_independent_and_full_ones_are_not():
    la = fitted("regression")
    _, cov = la(X)
    for diagonal in (False, True):
        draws = la.functional_samples(
            X, n_samples=4000, diagonal_output=diagonal, generator=torch.Generator().manual_seed(0)
        )
        found = torch.stack([draws[:, b].T.cov() for b in range(len(X))])
        expected = torch.diag_embed(cov.diagonal(dim1=1, dim2=2)) if diagonal else cov
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_nn_samples_are_outputs_at_weight_samples():
    la = fitted("regression")
    weights = la.sample(3, torch.Generator().manual_seed(0))
    outputs = la.functional_samples(X, "nn", 3, generator=torch.Generator().manual_seed(0))
    model = mlp()
    for w, f in zip(weights, outputs, strict=True):
        nn.utils.vector_to_parameters(w, model.parameters())
        torch.testing.assert_close(f, model(X).detach())


# ------------------------------------------------------------------ prediction


@pytest.mark.parametrize("pred_type", ["glm", "gp"])
@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("diagonal_output", [False, True])
def test_class_probabilities(pred_type, link, diagonal_output):
    la = fitted()
    p = la(X, pred_type, link_approx=link, n_samples=19, diagonal_output=diagonal_output)
    assert p.shape == (11, C)
    torch.testing.assert_close(p.sum(-1), torch.ones(11, dtype=torch.float64))
    assert (p > 0).all()
    assert torch.equal(p, la(X, pred_type, link_approx=link, n_samples=19, diagonal_output=diagonal_output))
    assert not p.requires_grad
    assert torch.equal(
        p, la(X, pred_type, joint=True, link_approx=link, n_samples=19, diagonal_output=diagonal_output)
    )


@pytest.mark.parametrize("pred_type", ["glm", "gp"])
def test_regression_moments(pred_type):
    la = fitted("regression")
    mean, cov = la(X, pred_type)
    assert mean.shape == (11, C)
    assert cov.shape == (11, C, C)
    torch.testing.assert_close(mean, la.model(X).detach())
    same, var = la(X, pred_type, diagonal_output=True)
    torch.testing.assert_close(var, cov.diagonal(dim1=1, dim2=2))
    assert torch.equal(mean, same)
    joint_mean, joint_cov = la(X, pred_type, joint=True)
    assert joint_mean.shape == (11 * C,)
    assert joint_cov.shape == (11 * C, 11 * C)
    assert torch.equal(joint_mean, mean.flatten())
    blocks = joint_cov.reshape(11, C, 11, C)
    torch.testing.assert_close(torch.stack([blocks[b, :, b] for b in range(11)]), cov)
    torch.testing.assert_close(joint_cov, la.functional_covariance(la.backend.jacobians(X)[0]))
    torch.testing.assert_close(cov, la.functional_variance(la.backend.jacobians(X)[0]))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_nn_predictions(likelihood):
    la = fitted(likelihood)
    first, second = (
        la(X, "nn", link_approx="mc", n_samples=13, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    )
    assert_same(first, second)
    if likelihood == "classification":
        torch.testing.assert_close(first.sum(-1), torch.ones(11, dtype=torch.float64))
    else:
        assert [t.shape for t in first] == [(11, C), (11, C)]
    with pytest.raises(ValueError, match="mc"):
        la(X, "nn", link_approx="probit")


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_predictive_is_a_call(likelihood):
    la = fitted(likelihood)
    assert_same(la.predictive(X, "glm", "bridge", 7), la(X, "glm", link_approx="bridge", n_samples=7))


def test_the_mean_of_predictive_samples_is_the_mc_link():
    la = fitted(prior_precision=0.1, temperature=3.0)
    draws = la.predictive_samples(X, n_samples=5000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(0), la(X, link_approx="mc", n_samples=1024), atol=1e-2, rtol=0)


def test_reward_modeling_fits_pairs_and_predicts_rewards():
    la = fitted("reward_modeling", RewardModel(), reward_batches())
    pairs, labels = next(iter(reward_batches(N)))
    mean, cov = la(X)
    assert mean.shape == (11, 1)
    assert cov.shape == (11, 1, 1)
    torch.testing.assert_close(mean, la.model(X).detach())
    assert [t.shape for t in la(X, "nn", link_approx="mc")] == [(11, 1), (11, 1)]
    assert [t.shape for t in la(X, joint=True)] == [(11,), (11, 11)]
    p = la(pairs, fitting=True)
    assert p.shape == (len(labels), 2)
    torch.testing.assert_close(p.sum(-1), torch.ones(len(labels), dtype=torch.float64))


def test_reward_modeling_has_the_evidence_and_posterior_of_classified_pairs():
    reward = fitted("reward_modeling", RewardModel(), reward_batches())
    pairs = fitted("classification", RewardModel(), reward_batches())
    torch.testing.assert_close(reward.H, pairs.H)
    torch.testing.assert_close(reward.log_marginal_likelihood(), pairs.log_marginal_likelihood())


@pytest.mark.parametrize("method", ["marglik", "gridsearch"])
def test_reward_modeling_can_be_tuned(method):
    la = fitted("reward_modeling", RewardModel(), reward_batches())
    classified = fitted("classification", RewardModel(), reward_batches())
    for estimator in (la, classified):
        val = reward_batches(17) if method == "gridsearch" else None
        estimator.optimize_prior_precision(method=method, n_steps=5, val_loader=val, grid_size=7)
    assert torch.equal(la.prior_precision, classified.prior_precision)
    assert la.prior_precision.item() != 1.0


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@pytest.mark.parametrize("link", LINKS)
def test_mapping_batches_and_logits(pred_type, link):
    la = fitted(
        model=DictModel("tokens"), data=dict_batches("tokens", "y"), dict_key_x="tokens", dict_key_y="y"
    )
    assert la.n_data == N
    batch = dict_batches("tokens", "y")[1]
    p = la(batch, pred_type, link_approx="mc" if pred_type == "nn" else link)
    assert p.shape == (7, C)
    assert la.predictive_samples(batch, pred_type, 5).shape == (5, 7, C)


def test_dict_key_x_names_the_entry_that_holds_the_batch():
    class Weighted(DictModel):
        def forward(self, batch):
            return super().forward({**batch, "attention_mask": batch["attention_mask"] * batch["weights"]})

    def shared(batches):
        return [{"weights": torch.arange(1.0, 6.0).double(), **b} for b in batches]

    def written_out(batches):
        return [
            {**b, "weights": torch.arange(1.0, 6.0).double().expand(len(b["labels"]), 5)} for b in batches
        ]

    la = fitted(model=Weighted(), data=shared(dict_batches()))
    expected = fitted(model=Weighted(), data=written_out(dict_batches()))
    torch.testing.assert_close(la.H, expected.H)
    torch.testing.assert_close(la(shared(dict_batches())[0]), expected(written_out(dict_batches())[0]))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_batch_without_inputs_gives_a_prediction_without_rows(likelihood):
    p = fitted(likelihood)(X[:0])
    assert [t.shape for t in as_tuple(p)] == (
        [(0, C)] if likelihood == "classification" else [(0, C), (0, C, C)]
    )


def test_a_missing_label_key_raises_a_key_error():
    with pytest.raises(KeyError, match="labels"):
        fitted(model=DictModel(), data=dict_batches(key_y="y"))


def test_mapping_validation_batches():
    la = fitted(
        model=DictModel("tokens"), data=dict_batches("tokens", "y"), dict_key_x="tokens", dict_key_y="y"
    )
    la.optimize_prior_precision(method="gridsearch", val_loader=dict_batches("tokens", "y", 17), grid_size=5)
    assert la.prior_precision.item() in torch.logspace(-4, 6, 5).tolist()


# ------------------------------------------------------------------ gradients of predictions


@pytest.mark.parametrize("backend", [NystromGGN, ReverseNystromGGN])
@pytest.mark.parametrize("options", [{}, {"joint": True}, {"diagonal_output": True}], ids=str)
def test_backprop_reaches_the_inputs_through_mean_and_covariance(backend, options):
    la = fitted("regression", enable_backprop=True, backend=backend)
    x = inputs(2, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: la(x, **options), (x,))
    assert all(p.grad is None for p in la.model.parameters())


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("n_eigenvalues", [2, 5])
def test_backprop_reaches_the_inputs_through_every_link(link, n_eigenvalues):
    la = fitted(enable_backprop=True, n_eigenvalues=n_eigenvalues, temperature=3.0)
    x = inputs(2, seed=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: la(x, link_approx=link, n_samples=7), (x,))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_backprop_reaches_the_inputs_through_samples(likelihood, pred_type):
    la = fitted(likelihood, enable_backprop=True)
    x = inputs(2, seed=8).requires_grad_()

    def draw(x):
        return la.predictive_samples(x, pred_type, 3, generator=torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(draw, (x,))


def test_backprop_leaves_the_models_gradients_alone():
    la = fitted("regression", enable_backprop=True)
    for p in la.model.parameters():
        p.grad = torch.full_like(p, 7.0)
    x = inputs(3).requires_grad_()
    mean, cov = la(x)
    (mean.sum() + cov.sum()).backward()
    assert x.grad.abs().min() > 0
    assert all(bool((p.grad == 7).all()) for p in la.model.parameters())


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_without_backprop_predictions_carry_no_graph(pred_type):
    la = fitted("regression")
    x = inputs(3).requires_grad_()
    assert not any(t.requires_grad for t in la(x, pred_type, link_approx="mc"))


# ------------------------------------------------------------------ tuning


def naive_grid_search(la, grid, score):
    scores = []
    for delta in grid:
        la.prior_precision = delta
        scores.append(score())
    assert len(set(scores)) > len(grid) // 2
    return grid[int(np.argmin(scores))]


def nll_of_calls(la, likelihood, **options):
    total, count = 0.0, 0
    for x, y in val_loader(likelihood):
        if likelihood == "classification":
            total += F.nll_loss(la(x, **options).log(), y, reduction="sum").item()
        else:
            mean, cov = la(x, **options)
            var = cov.diagonal(dim1=1, dim2=2) + la.sigma_noise**2
            total -= Normal(mean, var.sqrt()).log_prob(y).sum().item()
        count += len(y)
    return total / count


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diag"])
def test_marglik_increases_the_evidence(likelihood, structure):
    la = fitted(likelihood)
    la.optimize_prior_precision(method="marglik", n_steps=30, prior_structure=structure, init_prior_prec=3.0)
    assert la.prior_precision.shape == ({"scalar": 1, "layerwise": L, "diag": P}[structure],)
    assert not la.prior_precision.requires_grad
    tuned = la.log_marginal_likelihood().item()
    assert tuned > la.log_marginal_likelihood(torch.tensor(3.0)).item()


def test_marglik_keeps_the_structure_of_a_tensor():
    la = fitted()
    la.optimize_prior_precision(method="marglik", n_steps=3, init_prior_prec=torch.ones(L))
    assert la.prior_precision.shape == (L,)


def test_marglik_is_the_default_and_scalar():
    la = fitted()
    la.optimize_prior_precision(n_steps=3)
    assert la.prior_precision.shape == (1,)
    assert la.prior_precision.item() != 1.0


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("pred_type", ["glm", "gp"])
def test_grid_search_finds_what_a_loop_over_calls_finds(link, pred_type):
    la = fitted(temperature=200.0)
    grid = torch.logspace(-2, 3, 17).tolist()
    options = {"pred_type": pred_type, "link_approx": link, "n_samples": 23}
    expected = naive_grid_search(la, grid, lambda: nll_of_calls(la, "classification", **options))
    la.prior_precision = 1.0
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=val_loader(),
        log_prior_prec_min=-2,
        log_prior_prec_max=3,
        grid_size=17,
        **options,
    )
    assert la.prior_precision.item() == expected
    assert la.temperature == 200.0


@pytest.mark.parametrize("sigma", [0.5, 1.3])
def test_grid_search_of_regression_is_scored_by_the_gaussian_nll(sigma):
    la = fitted("regression", temperature=30.0, sigma_noise=sigma)
    grid = torch.logspace(-2, 3, 17).tolist()
    expected = naive_grid_search(la, grid, lambda: nll_of_calls(la, "regression"))
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=val_loader("regression"),
        log_prior_prec_min=-2,
        log_prior_prec_max=3,
        grid_size=17,
    )
    assert la.prior_precision.item() == expected


def test_grid_search_over_another_base():
    la = fitted(temperature=200.0)
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=val_loader(),
        log_prior_prec_min=1,
        log_prior_prec_max=4,
        grid_size=4,
        log_prior_prec_base=2.0,
    )
    assert la.prior_precision.item() in (2, 4, 8, 16)


def test_grid_search_with_a_metric_finds_what_a_loop_finds():
    la = fitted(temperature=200.0)
    grid = torch.logspace(-4, 6, 11).tolist()

    def score():
        metric = RunningNLLMetric()
        for x, y in val_loader():
            metric.update(la(x), y)
        return metric.compute().item()

    expected = naive_grid_search(la, grid, score)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=val_loader(), loss=RunningNLLMetric(), grid_size=11
    )
    assert la.prior_precision.item() == expected


class VarianceMetric(torchmetrics.Metric):
    """Takes mean, covariance and targets; best where the mean variance is one."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()))
        self.add_state("count", torch.zeros(()))

    def update(self, mean, cov, y):
        assert cov.shape == (*mean.shape, C)
        assert mean.shape == y.shape
        self.total += cov.diagonal(dim1=1, dim2=2).sum()
        self.count += y.numel()

    def compute(self):
        return (self.total / self.count).log().abs()


def test_a_metric_of_three_arguments_gets_mean_covariance_and_targets():
    la = fitted("regression", temperature=1e9)
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=val_loader("regression"),
        loss=VarianceMetric(),
        log_prior_prec_min=-2,
        log_prior_prec_max=2,
        grid_size=41,
    )
    _, var = la(
        next(iter(loader(inputs(17, seed=3), targets("regression", 17, seed=4), 17)))[0], diagonal_output=True
    )
    assert var.mean().log().abs().item() < np.log(10) / 20 + 1e-6


@pytest.mark.filterwarnings("ignore:The loss is the same for every setting")
def test_a_metric_of_two_arguments_gets_the_mean():
    la = fitted("regression")
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=val_loader("regression"),
        loss=torchmetrics.MeanSquaredError(num_outputs=C),
        grid_size=3,
    )
    assert la.prior_precision.item() == 1.0


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("as_float", [False, True])
def test_a_callable_gets_what_the_hosts_validation_gives_it(likelihood, as_float):
    from laplace.utils import validate

    la = fitted(likelihood, temperature=30.0)
    calls = []

    def record(*parts):
        calls.append(parts)
        value = sum(p.double().square().sum() for p in parts[:-1]).log() ** 2
        return value.item() if as_float else value

    la.optimize_prior_precision(
        method="gridsearch", val_loader=val_loader(likelihood), loss=record, grid_size=3
    )
    ours = list(calls)
    calls.clear()
    expected = {}
    for delta in torch.logspace(-4, 6, 3).tolist():
        la.prior_precision = delta
        la.model.eval()
        expected[delta] = validate(la, val_loader(likelihood), lambda *p: torch.as_tensor(record(*p)))
    assert len(ours[0]) == (2 if likelihood == "classification" else 3)
    assert len(ours) == len(calls) == 3
    for left, right in zip(ours, reversed(calls), strict=True):  # ours goes from large to small precision
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_grid_search_with_the_nn_predictive(likelihood):
    la = fitted(likelihood)
    torch.manual_seed(0)
    la.optimize_prior_precision(
        "nn", "gridsearch", val_loader=val_loader(likelihood), link_approx="mc", n_samples=7, grid_size=5
    )
    grid = torch.logspace(-4, 6, 5).tolist()
    assert la.prior_precision.item() in grid
    assert la.prior_precision.item() > grid[0]  # a prior that wide ruins sampled weights


@pytest.mark.parametrize("n_outputs", [1, C])
def test_the_nn_predictive_of_a_regression_is_scored_by_its_own_variances(n_outputs):
    x, y = inputs(17, seed=3), targets("regression", 17, n_outputs, seed=4)
    la = fitted(
        "regression", mlp(n_outputs), loader(inputs(), targets("regression", N, n_outputs)), temperature=30.0
    )
    torch.manual_seed(0)

    def nll(mean, var, y):
        return -Normal(mean, (var + la.sigma_noise**2).sqrt()).log_prob(y).sum()

    options = {
        "link_approx": "mc",
        "n_samples": 7,
        "grid_size": 5,
        "log_prior_prec_min": -1,
        "log_prior_prec_max": 3,
    }
    la.optimize_prior_precision("nn", "gridsearch", val_loader=[(x, y)], loss=nll, **options)
    expected = la.prior_precision.item()
    torch.manual_seed(0)
    la.optimize_prior_precision("nn", "gridsearch", val_loader=[(x, y)], **options)
    assert la.prior_precision.item() == expected


def test_grid_search_with_the_nn_predictive_wants_the_mc_link():
    with pytest.raises(ValueError, match="mc"):
        fitted().optimize_prior_precision("nn", "gridsearch", val_loader=val_loader())


def soft_labels(la, temperature, prior_precision=1e-7, **options):
    """Targets whose cross-entropy is lowest, by Gibbs, at these very hyperparameters."""
    x = inputs(31, seed=9) * 3
    la.temperature, la.prior_precision = temperature, prior_precision
    y = la(x, **options)
    la.temperature, la.prior_precision = None, 1.0
    return loader(x, y, 13)


@pytest.mark.parametrize("temperature", [1e2, 1e4])
@pytest.mark.parametrize("link", ["probit", "mc"])
def test_a_free_temperature_is_tuned_to_a_known_optimum(temperature, link):
    model = mlp()
    la = fitted(model=model)
    val = soft_labels(la, temperature, link_approx=link)
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=val,
        link_approx=link,
        log_prior_prec_min=-9,
        log_prior_prec_max=-6,
        grid_size=4,
    )
    assert la.temperature == pytest.approx(temperature, rel=0.1)
    assert la.prior_precision.item() < 1e-5


@pytest.mark.parametrize("temperature", [1e2, 1e4])
def test_a_free_temperature_of_a_regression_is_tuned_to_its_closed_form(temperature):
    # One weight: f = w, f_var = sigma^2 T / N, so NLL is lowest where it equals the residuals' excess.
    model = nn.Linear(1, 1, bias=False).double()
    ones, sigma = torch.ones(N, 1, dtype=torch.float64), 0.5
    la = fitted("regression", model, loader(ones, ones), sigma_noise=sigma, temperature=None, n_eigenvalues=1)
    excess = sigma**2 * temperature / N
    residual = (excess + sigma**2) ** 0.5
    f = model(ones[:2]).detach()
    val = loader(ones[:2], f + residual * torch.tensor([[1.0], [-1.0]], dtype=torch.float64))
    la.optimize_prior_precision(
        method="gridsearch", val_loader=val, log_prior_prec_min=-9, log_prior_prec_max=-6, grid_size=4
    )
    assert la.temperature == pytest.approx(temperature, rel=0.05)


def test_a_free_temperature_is_tuned_jointly_with_the_prior():
    la = fitted(temperature=None)
    val = soft_labels(la, 1e3, prior_precision=1.0)
    best = sum(F.cross_entropy(y.log(), y, reduction="sum").item() for _, y in val) / 31
    la.optimize_prior_precision(method="gridsearch", val_loader=val)
    reached = sum(-(y * la(x).log()).sum().item() for x, y in val) / 31
    assert best <= reached + 1e-12
    assert reached == pytest.approx(best, abs=2e-4)
    assert la.temperature > 30


def test_a_given_temperature_is_fixed_and_none_is_free():
    free, fixed = build(temperature=None), build(temperature=1.0)
    assert free.temperature == fixed.temperature == 1.0
    for la in (free, fixed):
        la.fit(train_loader())
    val = soft_labels(fitted(), 1e3)
    for la in (free, fixed):
        la.optimize_prior_precision(method="gridsearch", val_loader=val, grid_size=5)
    assert free.temperature > 10
    assert fixed.temperature == 1.0
    tuned = free.temperature
    free.fit(train_loader())
    assert free.temperature == tuned
    free.temperature = 3.0
    free.optimize_prior_precision(method="gridsearch", val_loader=val, grid_size=5)
    assert free.temperature == 3.0
    free.temperature = None
    assert free.temperature == 1.0
    free.optimize_prior_precision(method="gridsearch", val_loader=val, grid_size=5)
    assert free.temperature > 10


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_marglik_with_a_free_temperature_warns_exactly_once(likelihood):
    la = fitted(likelihood, temperature=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.optimize_prior_precision(method="marglik", n_steps=3)
    assert len(caught) == 1
    assert "gridsearch" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert la.temperature == 1.0


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("method", ["marglik", "gridsearch"])
def test_tuning_with_a_fixed_temperature_is_silent(likelihood, method):
    la = fitted(likelihood)
    val = val_loader(likelihood) if method == "gridsearch" else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.optimize_prior_precision(method=method, n_steps=3, val_loader=val, grid_size=1)
    assert not caught


def test_verbose_prints_the_result(capsys):
    la = fitted()
    la.optimize_prior_precision(n_steps=2, verbose=True)
    assert "prior precision" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("likelihood", "structure"),
    [("classification", "scalar"), ("classification", "diag"), ("regression", "layerwise")],
)
@pytest.mark.parametrize("backend", [AsdlGGN, CurvlinopsGGN])
def test_marglik_training_runs(likelihood, structure, backend):
    model = mlp()
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    la, trained, margliks, losses = laplace.marglik_training(
        model,
        train_loader(likelihood),
        likelihood,
        hessian_structure="ella",
        backend=backend,
        prior_structure=structure,
        n_epochs=2,
        n_hypersteps=2,
    )
    assert isinstance(la, ELLALaplace)
    assert trained is model
    assert len(margliks) == 4
    assert len(losses) == 2
    assert np.isfinite(margliks).all()
    assert not torch.equal(before, nn.utils.parameters_to_vector(model.parameters()).detach())
    assert la.prior_precision.shape == ({"scalar": 1, "layerwise": L, "diag": P}[structure],)
    p = la(X)
    assert (p if likelihood == "classification" else p[0]).shape == (11, C)


# ------------------------------------------------------------------ the call forms of the host's own ELLA


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_code_for_the_hosts_own_ella_runs(likelihood):
    la = laplace.Laplace(
        mlp(),
        likelihood,
        "all",
        "ella",
        subsample_size=M,
        n_eigenvalues=5,
        prior_precision=2.0,
        temperature=1.0,
        seed=3,
    )
    val = val_loader(likelihood)
    la.fit(train_loader(likelihood), val_loader=val, val_steps=1, balanced=likelihood == "classification")
    assert la.fit_history_["processed_examples"] == [7, 14, 21, 23]
    assert len(la.fit_history_["val_nll"]) == 4
    assert la.fit_history_["val_nll"][-1] == pytest.approx(nll_of_calls(la, likelihood))
    assert len(set(la.fit_history_["val_nll"])) == 4
    la.optimize_prior_precision(pred_type="gp", method="gridsearch", val_loader=val, grid_size=5)
    mean = la(X, pred_type="gp", link_approx="probit")
    assert (mean if likelihood == "classification" else mean[0]).shape == (11, C)


def test_the_seed_decides_the_landmarks():
    first, again, other = (fitted(seed=s) for s in (3, 3, 4))
    assert torch.equal(first.H, again.H)
    assert not torch.equal(first.basis.eigenvalues, other.basis.eigenvalues)


def test_a_later_fit_without_validation_starts_a_new_history():
    la = build()
    la.fit(train_loader(), val_loader=val_loader())
    assert len(la.fit_history_["val_nll"]) == 4
    la.fit(train_loader())
    assert la.fit_history_ == {"processed_examples": [23.0], "val_nll": []}


# ------------------------------------------------------------------ loaders


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(inputs(), targets("classification"))


def batches():
    return list(zip(inputs().split(7), targets("classification").split(7)))


LOADERS = {
    "list": batches,
    "generator": lambda: (b for b in batches()),
    "tuple of lists": lambda: tuple([x, y] for x, y in batches()),
    "IterableDataset": lambda: DataLoader(Stream(), batch_size=7),
    "batch size 1": lambda: train_loader(batch_size=1),
    "batch sampler": lambda: DataLoader(
        train_loader().dataset, batch_sampler=[[*range(5)], [*range(5, 16)], [*range(16, N)]]
    ),
}


@pytest.mark.parametrize("name", LOADERS)
def test_any_iterable_of_batches_gives_the_same_fit(name):
    expected = fitted()
    la = fitted(data=LOADERS[name]())
    assert (la.n_data, la.n_outputs) == (N, C)
    torch.testing.assert_close(la.loss, expected.loss)
    torch.testing.assert_close(la.H, expected.H)
    torch.testing.assert_close(la(X), expected(X))


@pytest.mark.parametrize(
    ("sampler", "size"),
    [
        (lambda: SubsetRandomSampler(range(17), generator=torch.Generator().manual_seed(0)), 17),
        (
            lambda: WeightedRandomSampler(
                torch.arange(1.0, N + 1), 19, generator=torch.Generator().manual_seed(0)
            ),
            19,
        ),
    ],
    ids=["subset", "weighted"],
)
def test_a_sampler_decides_what_the_data_are(sampler, size):
    la = fitted(data=train_loader(sampler=sampler()))
    assert la.n_data == size
    index = torch.tensor(list(sampler()))
    logits = la.model(inputs()[index])
    torch.testing.assert_close(
        la.loss, F.cross_entropy(logits, targets("classification")[index], reduction="sum")
    )


def test_streamed_curvature_equals_the_one_kept():
    kept, streamed = (fitted(curvature_size=n) for n in (2000, None))
    torch.testing.assert_close(kept.H, streamed.H)


def test_soft_targets_are_taken_as_by_cross_entropy():
    y = F.one_hot(targets("classification"), C).double()
    torch.testing.assert_close(fitted(data=loader(inputs(), y)).loss, fitted().loss)


def test_progress_bars_name_their_step(capsys):
    la = build()
    la.fit(train_loader(), progress_bar=True)
    text = capsys.readouterr().err
    for step in ("Training data", "Landmark gradients", "Gram matrix", "Curvature"):
        assert step in text
    la.optimize_prior_precision(method="gridsearch", val_loader=val_loader(), grid_size=3, progress_bar=True)
    assert "Grid search" in capsys.readouterr().err


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_override_false_adds_data(likelihood):
    x, y = inputs(), targets(likelihood)
    landmarks = (x[:M], torch.arange(M) % C)
    whole, parts = build(likelihood), build(likelihood)
    whole.fit(loader(x, y), landmarks=landmarks)
    parts.fit(loader(x[:13], y[:13]), landmarks=landmarks)
    basis = parts.basis
    parts.fit(loader(x[13:], y[13:]), override=False)
    assert parts.basis is basis
    assert parts.n_data == N
    torch.testing.assert_close(parts.H, whole.H)
    torch.testing.assert_close(parts.loss, whole.loss)
    torch.testing.assert_close(parts.log_marginal_likelihood(), whole.log_marginal_likelihood())


def test_override_true_starts_again():
    la = fitted()
    before = la.H.clone()
    la.fit(train_loader())
    assert la.n_data == N
    assert torch.equal(la.H, before)


def test_override_false_before_any_fit_is_a_fit():
    la = build()
    la.fit(train_loader(), override=False)
    assert torch.equal(la.H, fitted().H)


# ------------------------------------------------------------------ backends


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("backend", [CurvlinopsGGN, BackPackGGN, AsdlGGN, ReverseNystromGGN])
def test_backends_agree_to_rounding(likelihood, backend):
    default, other = fitted(likelihood), fitted(likelihood, backend=backend)
    torch.testing.assert_close(other.basis.eigenvalues, default.basis.eigenvalues, rtol=1e-11, atol=0)
    torch.testing.assert_close(other.H, default.H, rtol=1e-9, atol=1e-9)
    left, right = other(X), default(X)
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", [AsdlEF, BackPackEF, CurvlinopsEF])
def test_empirical_fisher_backends_are_refused(backend):
    with pytest.raises(ValueError, match=r"empirical Fisher"):
        build(backend=backend)


@pytest.mark.parametrize("backend", [AsdlHessian, CurvlinopsHessian, nn.Linear, "CurvlinopsGGN"])
def test_backends_without_a_known_ggn_are_refused(backend):
    with pytest.raises(ValueError, match="backend"):
        build(backend=backend)


@pytest.mark.parametrize("backend", [BackPackGGN, AsdlGGN])
def test_a_library_without_a_rule_is_refused_and_not_trusted(backend):
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
            self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))

        def forward(self, x):
            return self.net(x) * self.scale

    with pytest.raises(ValueError, match="scale"):
        fitted(model=Raw(), backend=backend)


# ------------------------------------------------------------------ factory and layout


def test_the_literal_call():
    la = laplace_ella.Laplace(mlp(), subset_of_weights="all", hessian_structure="ella")
    assert type(la) is ELLALaplace
    assert la.likelihood == "classification"
    assert type(laplace.Laplace(mlp(), "regression", "all", "ella")) is ELLALaplace


OTHERS = {
    ("all", "full"): "FullLaplace",
    ("all", "kron"): "KronLaplace",
    ("all", "diag"): "DiagLaplace",
    ("all", "lowrank"): "LowRankLaplace",
    ("all", "gp"): "FunctionalLaplace",
    ("last_layer", "full"): "FullLLLaplace",
    ("last_layer", "kron"): "KronLLLaplace",
    ("last_layer", "diag"): "DiagLLLaplace",
    ("last_layer", "gp"): "FunctionalLLLaplace",
    ("subnetwork", "full"): "FullSubnetLaplace",
    ("subnetwork", "diag"): "DiagSubnetLaplace",
}


@pytest.mark.parametrize("key", OTHERS, ids="-".join)
@pytest.mark.parametrize("factory", [laplace.Laplace, laplace_ella.Laplace])
def test_every_other_flavour_still_resolves(key, factory):
    kwargs = {}
    if key[0] == "subnetwork":
        kwargs["subnetwork_indices"] = torch.tensor([0, 1])
    if key[1] == "gp":
        kwargs["n_subset"] = 3
    try:
        name = type(factory(mlp(), "classification", *key, **kwargs)).__name__
    except ImportError as error:  # the class itself asks for a package that it needs
        name = next(word for word in str(error).replace(",", "").split() if word.endswith("Laplace"))
    assert name == OTHERS[key]


def all_subclasses(cls):
    return {s for c in cls.__subclasses__() for s in {c, *all_subclasses(c)}}


def test_keys_are_unique():
    named = [c for c in all_subclasses(BaseLaplace) if hasattr(c, "_key")]
    keys = [c._key for c in named]
    assert ("all", "ella") in keys
    assert len(set(keys)) == len(keys), sorted((c._key, c.__name__) for c in named)
