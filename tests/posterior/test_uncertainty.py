"""Total, aleatoric and epistemic uncertainty; intervals, and how often they cover."""

import math

import oracle
import pytest
import torch
from conftest import assert_close
from helpers import C, D, RewardModel, fitted, inputs, loader, mlp, moments, reward_batches, targets
from models import WITH_POSITIONS
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal

from laplace_ella import Laplace
from laplace_ella.nystrom.basis import identity_basis
from laplace_ella.posterior.gaussian import Outputs
from laplace_ella.posterior.likelihoods import LIKELIHOODS
from laplace_ella.posterior.links import Noise
from laplace_ella.posterior.uncertainty import split

F64 = torch.float64
N_TEST = 7
X = inputs(N_TEST, seed=7)
LEVELS = (0.5, 0.9, 0.95)


def labels(likelihood):
    y = targets("regression")
    return (y > 0).double() if likelihood == "bernoulli" else targets(likelihood)


def fit(likelihood, model=None, **options):
    """Fit with a posterior that is wide enough for its parts to be far from each other."""
    data = loader(inputs(), labels(likelihood))
    return fitted(likelihood, model, data, **{"prior_precision": 0.3, **options})


def with_samples(la, x, likelihood, n=200_000):
    """Expected entropy, and entropy of the mean, from many independent samples of each input's logits."""
    mean, covariance = moments(la, x)
    generator = torch.Generator().manual_seed(0)
    of = {"classification": Categorical, "bernoulli": Bernoulli}[likelihood]
    expected, of_mean = [], []
    for m, c in zip(mean, covariance):
        f = m + torch.randn(n, len(m), generator=generator, dtype=F64) @ torch.linalg.cholesky(c).T
        p = oracle.inverse_link(f, likelihood)
        expected.append(of(p).entropy().mean(0))
        of_mean.append(of(p.mean(0)).entropy())
    return torch.stack(expected), torch.stack(of_mean)


@pytest.mark.parametrize("likelihood", ["classification", "bernoulli"])
def test_entropies_are_those_of_many_samples(likelihood):
    la = fit(likelihood)
    found, (aleatoric, total) = la.uncertainty(X, 4096), with_samples(la, X, likelihood)
    assert found.total.shape == ((N_TEST,) if likelihood == "classification" else (N_TEST, C))
    assert_close(found.aleatoric, aleatoric, 3e-3, name="aleatoric")
    assert_close(found.total, total, 3e-3, name="total")
    assert found.epistemic.max() > 0.05  # far from what is tolerated


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("likelihood", ["classification", "bernoulli", "regression"])
@pytest.mark.parametrize("prior", [1e-12, 1.0, 1e12])
def test_the_parts_add_up_to_the_last_digit_and_none_is_negative(likelihood, dtype, prior):
    y = labels(likelihood)
    data = loader(inputs(dtype=dtype), y.to(dtype) if y.is_floating_point() else y)
    la = fitted(likelihood, mlp(dtype=dtype), data, prior_precision=prior)
    total, aleatoric, epistemic = la.uncertainty(X.to(dtype))
    assert total.dtype == dtype
    assert torch.equal(total, aleatoric + epistemic)
    assert aleatoric.min() >= 0
    assert epistemic.min() >= 0
    if likelihood != "regression":
        assert total.max() <= math.log(C) * (1 + torch.finfo(dtype).eps)


def test_the_total_is_the_entropy_of_the_monte_carlo_prediction():
    la = fit("classification", seed=3)
    found = la.uncertainty(X, 64)
    assert_close(found.total, Categorical(la(X, link_approx="mc", n_samples=64)).entropy(), 1e-12)
    assert all(map(torch.equal, found, la.uncertainty(X, 64)))
    assert_close(found.total[2:4], la.uncertainty(X[2:4], 64).total, 1e-12)
    with_generator = la.uncertainty(X, 64, generator=torch.Generator().manual_seed(1))
    repeated = la.uncertainty(X, 64, generator=torch.Generator().manual_seed(1))
    assert all(map(torch.equal, with_generator, repeated))
    assert not torch.equal(with_generator.total, found.total)


def test_without_variance_all_of_the_entropy_is_aleatoric():
    la = fit("classification", prior_precision=1e12)
    found = la.uncertainty(X)
    assert_close(found.aleatoric, Categorical(logits=la.model(X)).entropy(), 1e-8)
    assert found.epistemic.max() < 1e-9


def test_one_binary_target_is_two_classes():
    generator = torch.Generator().manual_seed(0)
    mean, psi = (torch.randn(*s, generator=generator, dtype=F64) for s in ((5, 1), (5, 1, 2)))
    two = Outputs(torch.cat([mean, 0 * mean], 1), torch.cat([psi, 0 * psi], 1))
    binary = split(Outputs(mean, psi), LIKELIHOODS["bernoulli"], Noise(64), 0.0)
    classes = split(two, LIKELIHOODS["classification"], Noise(64), 0.0)
    for one, other in zip(binary, classes):
        assert_close(one[:, 0], other, 1e-12)


@pytest.mark.parametrize("residual", ["none", "isotropic", "exact"])
def test_regression_has_variances_with_and_without_noise(residual):
    la = fit("regression", sigma_noise=0.7, residual=residual)
    _, variance = la(X, diagonal_output=True)
    found = la.uncertainty(X)
    assert_close(found.epistemic, variance, 1e-12)
    assert_close(found.aleatoric, torch.full_like(variance, 0.7**2), 1e-12)
    assert_close(found.total, variance + 0.7**2, 1e-12)


def test_rewards_are_answered_as_a_regression_without_noise():
    la = fitted("reward_modeling", RewardModel(), reward_batches())
    _, variance = la(X, diagonal_output=True)
    found = la.uncertainty(X)
    assert torch.equal(found.aleatoric, torch.zeros_like(variance))
    assert_close(found.total, variance, 1e-12)
    for noise in (True, False):
        lower, upper = la.interval(X, observation_noise=noise)
        assert_close((upper - lower) / 2, 1.959963984540054 * variance.sqrt(), 1e-12)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("name", WITH_POSITIONS)
def test_every_position_has_an_uncertainty(name, likelihood):
    build, shape = WITH_POSITIONS[name]
    model = build().double()
    x = torch.randn(11, *shape, dtype=F64)
    f = model(x).detach()
    la = fitted(likelihood, model, loader(x, f.argmax(-1) if likelihood == "classification" else f))
    n = f[:3].shape[:-1].numel()
    assert la.uncertainty(x[:3]).total.shape == ((n,) if likelihood == "classification" else (n, C))
    if likelihood == "regression":
        assert la.interval(x[:3])[0].shape == (n, C)


@pytest.mark.parametrize("likelihood", ["classification", "bernoulli", "regression"])
@pytest.mark.parametrize("residual", ["none", "isotropic"])
def test_gradients_reach_the_inputs(likelihood, residual):
    la = fit(likelihood, enable_backprop=True, residual=residual)
    x = X[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(la.uncertainty(x, 16)), (x,))
    if likelihood == "regression":
        assert torch.autograd.gradcheck(la.interval, (x,))
        assert torch.autograd.gradcheck(lambda x: la.interval(x, 0.5, observation_noise=False), (x,))


@pytest.mark.parametrize("likelihood", ["classification", "bernoulli"])
def test_gradients_are_finite_where_probabilities_are_rounded_to_zero(likelihood):
    la = fit(likelihood, enable_backprop=True, logit_scale=1e5)
    x = X.clone().requires_grad_()
    found = la.uncertainty(x, 16)
    assert found.total.min() < 1e-300
    for part in found:
        assert torch.autograd.grad(part.sum(), x, retain_graph=True)[0].isfinite().all()


def test_what_is_asked_of_an_estimator_that_is_not_fitted_or_with_bad_arguments():
    la = Laplace(mlp(), "regression", "all", "ella")
    for ask in (la.uncertainty, la.interval):
        with pytest.raises(AttributeError):
            ask(X)
    la = fit("regression")
    for n in (0, -1, 2.5, None, "many"):
        with pytest.raises(ValueError, match="n_samples must be a positive integer"):
            la.uncertainty(X, n)
    with pytest.raises(ValueError, match="generator must be"):
        la.uncertainty(X, generator=3)
    with pytest.raises(ValueError, match="finite"):
        la.interval(X * float("nan"))


@pytest.mark.parametrize("level", [0, 1, 1.0, -0.5, 95, float("nan"), None, "0.95", True])
def test_a_level_lies_between_zero_and_one(level):
    with pytest.raises(ValueError, match="level must be a probability between 0 and 1"):
        fit("regression").interval(X, level)


@pytest.mark.parametrize("likelihood", ["classification", "bernoulli"])
def test_intervals_are_for_numbers(likelihood):
    with pytest.raises(ValueError, match=f"for regression.*{likelihood}.*uncertainty"):
        fit(likelihood).interval(X)
    with pytest.raises(ValueError, match="observation_noise must be True or False"):
        fit("regression").interval(X, observation_noise="no")


@pytest.mark.parametrize("level", [1e-9, *LEVELS, 1 - 1e-15])
@pytest.mark.parametrize("residual", ["none", "isotropic", "exact"])
def test_intervals_are_the_quantiles_of_the_marginals(level, residual):
    la = fit("regression", sigma_noise=0.7, residual=residual)
    mean, variance = la(X, diagonal_output=True)
    for noise in (True, False):
        marginals = Normal(mean, (variance + noise * 0.7**2).sqrt())
        lower, upper = la.interval(X, level, observation_noise=noise)
        assert_close(marginals.cdf(lower), torch.full_like(mean, (1 - level) / 2), 1e-8, atol=1e-15)
        assert_close(upper - mean, mean - lower, 1e-9)
        assert (upper > lower).all()


# ---------------------------------------------------------------------------- coverage

N_TASKS, N_DATA, DELTA, SIGMA = 400, 11, 0.8, 0.6


class Tasks:
    """Linear regressions that are drawn as the model says, one for each output, each with its own weights, prior to posterior."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=F64)

        weights = normal(N_TASKS, D) / DELTA**0.5
        x, self.x_test = normal(N_DATA, D), normal(1, D)
        y = x @ weights.T + SIGMA * normal(N_DATA, N_TASKS)
        self.f_test = self.x_test @ weights.T
        self.y_test = self.f_test + SIGMA * normal(1, N_TASKS)
        self.la = self.fitted(x, y)

    @staticmethod
    def fitted(x, y):
        """Return ELLA with all directions, in which it is exact, at the weights of the largest posterior density."""
        model = nn.Linear(D, N_TASKS, bias=False, dtype=F64)
        ridge = torch.linalg.solve(x.T @ x / SIGMA**2 + DELTA * torch.eye(D, dtype=F64), x.T @ y / SIGMA**2)
        model.weight.data.copy_(ridge.T)
        options = {"sigma_noise": SIGMA, "prior_precision": DELTA, "temperature": 1.0}
        la = Laplace(model, "regression", "all", "ella", **options)
        la.fit(loader(x, y), basis=identity_basis(dict(model.named_parameters())))
        return la


@pytest.fixture(scope="module")
def tasks():
    return Tasks(0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("of_targets", [True, False])
def test_intervals_of_a_right_model_cover_as_often_as_they_say(tasks, level, of_targets):
    lower, upper = tasks.la.interval(tasks.x_test, level, observation_noise=of_targets)
    truth = tasks.y_test if of_targets else tasks.f_test
    covered = int(((lower <= truth) & (truth <= upper)).sum())
    error = (N_TASKS * level * (1 - level)) ** 0.5  # of a binomial count: the tasks are independent
    assert abs(covered - N_TASKS * level) <= 3 * error, f"{covered} of {N_TASKS} at {level}"


def test_intervals_without_noise_cover_too_few_targets(tasks):
    lower, upper = tasks.la.interval(tasks.x_test, 0.9, observation_noise=False)
    covered = int(((lower <= tasks.y_test) & (tasks.y_test <= upper)).sum())
    assert covered < N_TASKS * 0.9 - 6 * (N_TASKS * 0.09) ** 0.5


@pytest.mark.parametrize("likelihood", ["poisson", "heteroscedastic"])
def test_parts_of_the_variance_of_counts_and_of_noise_that_depends_on_the_input(likelihood):
    outputs = Outputs(
        torch.tensor([[0.3, -0.5]], dtype=F64), torch.tensor([[[0.6, 0.0], [0.1, 0.4]]], dtype=F64)
    )
    generator = torch.Generator().manual_seed(0)
    f = outputs.mean + torch.randn(400_000, 1, 2, generator=generator, dtype=F64) @ outputs.psi[0].T
    if likelihood == "poisson":  # the variance given the rate is the rate
        aleatoric, epistemic = f.exp().mean(0), f.exp().var(0)
    else:
        aleatoric, epistemic = f[..., 1:].exp().mean(0), f[..., :1].var(0)
    found = LIKELIHOODS[likelihood].uncertainty(outputs, [], 0.0)
    assert_close(found[0], aleatoric, rtol=1e-2)
    assert_close(found[1], epistemic, rtol=2e-2)


def test_noise_per_output_is_the_aleatoric_part_and_widens_intervals():
    sigma = torch.tensor([0.5, 1.0, 3.0], dtype=F64)
    la = fit("regression", sigma_noise=sigma)
    mean, variance = la(X, diagonal_output=True)
    found = la.uncertainty(X)
    assert_close(found.aleatoric, sigma.square().expand(N_TEST, C))
    assert_close(found.epistemic, variance)
    lower, upper = la.interval(X, 0.9)
    half = float(Normal(0.0, 1.0).icdf(torch.tensor(0.95, dtype=F64))) * (variance + sigma.square()).sqrt()
    assert_close(lower, mean - half)
    assert_close(upper, mean + half)


def test_intervals_of_noise_that_depends_on_the_input_are_about_targets():
    model = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    la = fitted("heteroscedastic", model, loader(inputs(), targets("regression")[:, :1]))
    mean, variance = la(X, diagonal_output=True)
    lower, upper = la.interval(X, 0.9)
    assert lower.shape == (N_TEST, 1)
    assert_close((lower + upper) / 2, mean)
    assert_close(((upper - lower) / 2).square() / variance, torch.full_like(mean, 1.6448536269514722**2))


def test_counts_have_no_intervals():
    la = fitted("poisson", None, loader(inputs(), targets("classification")[:, None].expand(-1, C).double()))
    with pytest.raises(ValueError, match="nearly Gaussian; the likelihood is 'poisson'"):
        la.interval(X)
    assert la.uncertainty(X).total.shape == (N_TEST, C)


@pytest.mark.parametrize("variance", ["ella", "none", "constant", "last_layer"])
def test_scales_of_classes_and_other_variances_are_those_of_predictions(variance):
    own = {"class_scales": (0.5, 1.7, 1.1), "class_biases": (-0.8, 0.3, 1.2), "logit_scale": 0.6}
    la = fit("classification", temperature=0.3, variance=variance, **own)
    found = la.uncertainty(X, 256)
    p = la(X, link_approx="mc", n_samples=256)
    assert_close(found.total, Categorical(p).entropy())
    assert bool(found.epistemic.any()) == (variance != "none")
    if variance == "none":
        logits = torch.tensor(own["class_scales"], dtype=F64) * 0.6 * la.model(X).detach()
        logits = logits + torch.tensor(own["class_biases"], dtype=F64)
        assert_close(found.aleatoric, Categorical(logits=logits).entropy())


@pytest.mark.parametrize("variance", ["none", "constant", "last_layer"])
def test_intervals_have_the_variance_of_predictions(variance):
    la = fit("regression", sigma_noise=0.7, temperature=0.3, variance=variance)
    mean, spread = la(X, diagonal_output=True)
    z = float(Normal(0.0, 1.0).icdf(torch.tensor(0.95, dtype=F64)))
    for with_noise in (True, False):
        lower, upper = la.interval(X, 0.9, with_noise)
        assert_close((lower + upper) / 2, mean)
        assert_close((upper - lower) / 2, z * (spread + 0.49 * with_noise).sqrt())
    assert_close(la.uncertainty(X).total, spread + 0.49)
