"""The Bernoulli likelihood: binary and multi-label targets, one logit each."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from conftest import assert_close
from scipy.integrate import quad
from torch import Tensor, nn
from torch.nn import functional as F

import laplace_ella
from laplace_ella import ELLALaplace

F64 = torch.float64
B, N, D, H, M, K = 7, 23, 2, 5, 11, 5
WIDTHS = (1, 3)  # binary, multi-label


def mlp(n_outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, n_outputs)).double().eval()


def inputs(n: int = N, seed: int = 1) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labels(n_outputs: int, n: int = N, seed: int = 2) -> Tensor:
    return torch.randint(2, (n, n_outputs), generator=torch.Generator().manual_seed(seed))


def batches(x: Tensor, y: Tensor, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size)))


def landmarks(n_outputs: int, n: int = M) -> tuple[Tensor, Tensor]:
    return 2 * inputs(n, seed=3), torch.arange(n) % n_outputs


def fit(n_outputs: int, y: Tensor | None = None, model: nn.Module | None = None, **options) -> ELLALaplace:
    options = {"n_eigenvalues": K, "temperature": 1.3, "prior_precision": 0.6, **options}
    pairs = options.pop("landmarks", landmarks(n_outputs))
    la = ELLALaplace(mlp(n_outputs) if model is None else model, "bernoulli", **options)
    la.fit(batches(inputs(), labels(n_outputs) if y is None else y), landmarks=pairs)
    return la


def wide(n_outputs: int, **options) -> ELLALaplace:
    """Large variances, so that links matter."""
    return fit(n_outputs, **{"temperature": 30.0, "prior_precision": 0.05, **options})


def dense_curvature(J: Tensor, f: Tensor) -> Tensor:
    total = torch.zeros(J.shape[-1], J.shape[-1], dtype=J.dtype)
    for J_i, f_i in zip(J, f):
        p = [1 / (1 + math.exp(-v)) for v in f_i.tolist()]
        total = total + J_i.T @ torch.diag(torch.tensor([q * (1 - q) for q in p], dtype=J.dtype)) @ J_i
    return total


X = inputs(B, seed=7)

# ---------------------------------------------------------------------------- fit


@pytest.mark.parametrize("n_outputs", WIDTHS)
def test_full_span_equals_dense_laplace(n_outputs):
    model = mlp(n_outputs)
    n_weights = len(oracle.weights(model))
    la = fit(n_outputs, model=model, n_eigenvalues=n_weights, landmarks=landmarks(n_outputs, 101))
    assert la.basis.rank == n_weights
    J, f = oracle.jacobian(model, inputs()), oracle.outputs(model, inputs())
    A = dense_curvature(J, f) / 1.3 + 0.6 * torch.eye(n_weights, dtype=F64)
    J = oracle.jacobian(model, X)
    mean, cov = la._glm_predictive_distribution(X)
    assert_close(mean, oracle.outputs(model, X), name="mean")
    assert_close(cov, oracle.covariance(J, A), 1e-6, name="covariance")
    _, cov = la._glm_predictive_distribution(X, joint=True)
    assert_close(cov, oracle.joint_covariance(J, A), 1e-6, name="joint covariance")


@pytest.mark.parametrize("n_outputs", WIDTHS)
def test_curvature_is_that_of_the_oracle(n_outputs):
    la = fit(n_outputs)
    phi, f = la.features(inputs())
    assert_close(la.H, dense_curvature(phi, f))
    assert_close(la.posterior_precision, la.H / 1.3 + 0.6 * torch.eye(K, dtype=F64))


@pytest.mark.parametrize("n_outputs", WIDTHS)
def test_loss_is_the_summed_binary_cross_entropy(n_outputs):
    la = fit(n_outputs)
    f, y = oracle.outputs(la.model, inputs()), labels(n_outputs)
    expected = sum(
        math.log1p(math.exp(-v if t else v)) for v, t in zip(f.flatten().tolist(), y.flatten().tolist())
    )
    assert_close(la.loss, torch.tensor(expected, dtype=F64))


def test_evidence_is_that_of_the_dense_formula():
    la = fit(3, prior_mean=0.2)
    P = len(oracle.weights(la.model))
    offset = oracle.weights(la.model) - 0.2
    occam = torch.logdet(la.H / 1.3 + 0.6 * torch.eye(K, dtype=F64)) - K * math.log(0.6)
    assert P > K
    expected = -la.loss / 1.3 - 0.5 * occam - 0.5 * 0.6 * offset @ offset
    assert_close(la.log_marginal_likelihood(), expected)


def test_loss_and_curvature_stay_finite_for_confident_logits():
    model = mlp(3)
    with torch.no_grad():
        model[-1].bias.copy_(torch.tensor([0.0, 800.0, -800.0]))
    la = fit(3, model=model)
    assert la.loss.isfinite()
    assert torch.linalg.eigvalsh(la.H)[0] > -1e-12 * la.H.trace()
    assert la(X).isfinite().all()


def test_one_logit_is_classification_with_the_logits_zero_and_f():
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(1)

        def forward(self, x: Tensor) -> Tensor:
            f = self.net(x)
            return torch.cat([torch.zeros_like(f), f], 1)

    la, x = fit(1), 2 * inputs(M, seed=3)
    two = ELLALaplace(
        Padded().eval(), "classification", n_eigenvalues=K, temperature=1.3, prior_precision=0.6
    )
    two.fit(batches(inputs(), labels(1)[:, 0]), landmarks=(x, torch.ones(M, dtype=torch.long)))
    assert_close(la.H, two.H)
    assert_close(la.loss, two.loss)
    assert_close(la.log_marginal_likelihood(), two.log_marginal_likelihood())
    mean, cov = la._glm_predictive_distribution(X)
    two_mean, two_cov = two._glm_predictive_distribution(X)
    assert_close(mean, two_mean[:, 1:])
    assert_close(cov, two_cov[:, 1:, 1:])
    samples = [
        e.predictive_samples(X, n_samples=5, generator=torch.Generator().manual_seed(0)) for e in (la, two)
    ]
    assert_close(samples[0], samples[1][..., 1:])


def test_outputs_are_independent_given_the_weights():
    """Lambda is diagonal: G is the sum of what each output contributes."""
    la = fit(3)
    phi, f = la.features(inputs())
    p = f.sigmoid()
    parts = [(phi[:, c].T * (p * (1 - p))[:, c]) @ phi[:, c] for c in range(3)]
    assert_close(la.H, sum(parts))


# ---------------------------------------------------------------------------- targets

FORMS = {
    "bool": torch.Tensor.bool,
    "uint8": lambda y: y.to(torch.uint8),
    "int32": torch.Tensor.int,
    "int64": torch.Tensor.long,
    "float32": torch.Tensor.float,
    "float64": torch.Tensor.double,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_outputs", WIDTHS)
def test_targets_of_any_type_give_the_same_fit(n_outputs, form):
    la, expected = fit(n_outputs, FORMS[form](labels(n_outputs))), fit(n_outputs)
    assert_close(la.loss, expected.loss)
    assert_close(la.H, expected.H)


@pytest.mark.parametrize("form", FORMS)
def test_targets_of_one_output_may_be_flat(form):
    assert_close(fit(1, FORMS[form](labels(1)[:, 0])).loss, fit(1).loss)


BAD = {
    "flat": (3, labels(3)[:, 0]),
    "too wide": (1, labels(3)),
    "too narrow": (3, labels(2)),
    "an axis more": (3, labels(3)[..., None]),
    "two": (3, labels(3) + 1),
    "minus one": (3, 2 * labels(3) - 1),
    "NaN": (3, labels(3).double().where(labels(3) > 0, float("nan"))),
    "infinite": (1, labels(1).double() / 0.0),
    "complex": (1, labels(1).to(torch.complex128)),
}


@pytest.mark.parametrize("name", BAD)
def test_targets_that_do_not_fit_are_refused_naming_the_batch(name):
    n_outputs, y = BAD[name]
    with pytest.raises(ValueError, match=r"batch \d"):
        fit(n_outputs, y)


def test_the_factory_takes_the_likelihood():
    la = laplace_ella.Laplace(mlp(3), "bernoulli", "all", "ella", n_eigenvalues=K)
    assert type(la) is ELLALaplace
    assert la.likelihood == "bernoulli"
    la.fit(batches(inputs(), labels(3)))
    assert la(X).shape == (B, 3)


def test_noise_is_refused():
    with pytest.raises(ValueError, match=r"[Nn]oise"):
        ELLALaplace(mlp(1), "bernoulli", sigma_noise=0.5)


# ---------------------------------------------------------------------------- predictions


def moments(la: ELLALaplace) -> tuple[np.ndarray, np.ndarray]:
    mean, cov = la._glm_predictive_distribution(X)
    return mean.numpy(), cov.diagonal(dim1=1, dim2=2).numpy()


@pytest.mark.parametrize("n_outputs", WIDTHS)
def test_probit_link_is_the_closed_form(n_outputs):
    la = wide(n_outputs)
    mean, variance = moments(la)
    expected = 1 / (1 + np.exp(-mean / np.sqrt(1 + math.pi / 8 * variance)))
    assert_close(la(X), torch.as_tensor(expected))
    assert la(X).shape == (B, n_outputs)
    assert (la(X) - la.features(X)[1].sigmoid()).abs().max() > 0.02


@pytest.mark.parametrize("n_outputs", WIDTHS)
def test_mc_link_is_the_integral(n_outputs):
    la = wide(n_outputs)
    mean, variance = moments(la)
    expected = np.empty_like(mean)
    for at in np.ndindex(*mean.shape):
        m, s = mean[at], math.sqrt(variance[at])

        def integrand(z, m=m, s=s):
            return math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / (1 + math.exp(-m - s * z))

        expected[at] = quad(integrand, -9, 9)[0]
    assert_close(la(X, link_approx="mc", n_samples=2**13), torch.as_tensor(expected), rtol=0, atol=2e-3)
    assert_close(la(X, link_approx="mc", n_samples=128), torch.as_tensor(expected), rtol=0, atol=0.03)
    assert torch.equal(la(X, link_approx="mc"), la(X, link_approx="mc"))


@pytest.mark.parametrize("link", ["bridge", "bridge_norm"])
def test_bridge_links_are_refused(link):
    la = fit(3)
    with pytest.raises(ValueError, match="bridge"):
        la(X, link_approx=link)
    with pytest.raises(ValueError, match="bridge"):
        la.optimize_prior_precision(
            method="gridsearch", val_loader=batches(inputs(), labels(3)), link_approx=link
        )


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@pytest.mark.parametrize("n_outputs", WIDTHS)
def test_samples_are_probabilities_of_functional_samples(n_outputs, pred_type):
    la = wide(n_outputs)
    functional, predictive = (
        draw(X, pred_type=pred_type, n_samples=13, generator=torch.Generator().manual_seed(4))
        for draw in (la.functional_samples, la.predictive_samples)
    )
    assert predictive.shape == (13, B, n_outputs)
    assert_close(predictive, functional.sigmoid())
    assert predictive.min() > 0
    assert predictive.max() < 1


def test_sampled_weights_predict_the_mean_probability():
    la = wide(3)
    prediction = la(X, "nn", link_approx="mc", n_samples=13, generator=torch.Generator().manual_seed(4))
    samples = la.functional_samples(X, "nn", 13, generator=torch.Generator().manual_seed(4))
    assert_close(prediction, samples.sigmoid().mean(0))


@pytest.mark.parametrize("n_outputs", WIDTHS)
def test_predictive_samples_average_to_the_mc_link(n_outputs):
    la = wide(n_outputs)
    samples = la.predictive_samples(X, n_samples=20_000, generator=torch.Generator().manual_seed(0))
    standard_error = samples.std(0) / len(samples) ** 0.5
    dense = la(X, link_approx="mc", n_samples=2**12)
    assert ((dense - samples.mean(0)).abs() < 5 * standard_error + 1e-3).all()


@pytest.mark.parametrize("link", ["probit", "mc"])
def test_logit_scale_multiplies_the_mean_only(link):
    la = wide(3)
    mean, variance = moments(la)
    la.logit_scale = 1.7
    assert_close(la._glm_predictive_distribution(X)[1].diagonal(dim1=1, dim2=2), torch.as_tensor(variance))
    scaled = torch.as_tensor(1.7 * mean)
    assert_close(la._glm_predictive_distribution(X)[0], scaled)
    if link == "probit":
        expected = (scaled / torch.sqrt(1 + math.pi / 8 * torch.as_tensor(variance))).sigmoid()
        assert_close(la(X), expected)
    samples = la.functional_samples(X, n_samples=7, generator=torch.Generator().manual_seed(0))
    la.logit_scale = 1.0
    plain = la.functional_samples(X, n_samples=7, generator=torch.Generator().manual_seed(0))
    assert_close(samples, plain + 0.7 * torch.as_tensor(mean))


def test_a_restored_estimator_predicts_the_same(tmp_path):
    la = fit(3, logit_scale=1.4)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other = ELLALaplace(la.model, "bernoulli")
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    for link in ("probit", "mc"):
        assert torch.equal(other(X, link_approx=link), la(X, link_approx=link))
    assert other.logit_scale == 1.4


def test_a_checkpoint_of_another_likelihood_is_refused():
    state = fit(3).state_dict()
    with pytest.raises(ValueError, match="likelihood"):
        ELLALaplace(mlp(3), "classification").load_state_dict(state)


# ---------------------------------------------------------------------------- tuning


def val_batches(n_outputs: int) -> list[tuple[Tensor, Tensor]]:
    return batches(inputs(17, seed=5), labels(n_outputs, 17, seed=6))


def nll_of_calls(la: ELLALaplace, val, **options) -> float:
    total = sum(
        F.binary_cross_entropy(la(x, **options), y.double().reshape(len(x), -1), reduction="sum")
        for x, y in val
    )
    return float(total) / sum(len(x) for x, _ in val)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("link", ["probit", "mc"])
@pytest.mark.parametrize("n_outputs", WIDTHS)
def test_grid_search_finds_what_a_loop_over_calls_finds(n_outputs, link):
    la = fit(n_outputs, temperature=200.0)
    val, grid = val_batches(n_outputs), torch.logspace(-3, 4, 15).tolist()
    scores = []
    for delta in grid:
        la.prior_precision = delta
        scores.append(nll_of_calls(la, val, link_approx=link, n_samples=23))
    assert len(set(scores)) > 7
    best = int(np.argmin(scores))
    la.prior_precision = 1.0
    options = {"log_prior_prec_min": -3, "log_prior_prec_max": 4, "grid_size": 15, "n_samples": 23}
    la.optimize_prior_precision(method="gridsearch", val_loader=val, link_approx=link, **options)
    assert la.prior_precision.item() == grid[best]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_callable_loss_gets_probabilities_and_targets():
    la, seen = fit(3, temperature=200.0), []

    def brier(p, y):
        seen.append((tuple(p.shape), tuple(y.shape)))
        return (p - y.double()).square().mean()

    val, grid = val_batches(3), torch.logspace(-3, 4, 8).tolist()
    x, y = (torch.cat(part) for part in zip(*val))
    scores = []
    for delta in grid:
        la.prior_precision = delta
        scores.append(float(brier(la(x), y)))
    seen.clear()
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=val,
        loss=brier,
        log_prior_prec_min=-3,
        log_prior_prec_max=4,
        grid_size=8,
    )
    assert set(seen) == {((17, 3), (17, 3))}
    assert la.prior_precision.item() == grid[int(np.argmin(scores))]


def test_marglik_increases_the_evidence():
    la = fit(3, temperature=1.0)
    la.optimize_prior_precision(method="marglik", n_steps=30, init_prior_prec=5.0)
    tuned = la.log_marginal_likelihood().item()
    assert tuned > la.log_marginal_likelihood(torch.tensor(5.0)).item()
