"""Outputs (B, ..., C): sequences and dense prediction, whose positions join the batch axis."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import torch
from conftest import assert_close
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from laplace_ella import ELLALaplace, ReverseNystromGGN
from laplace_ella.data.hashing import CURVATURE_INPUT, hash_keys

F64 = torch.float64
B, N, C, K, M, D = 5, 13, 3, 5, 11, 2
LIKELIHOODS = ("classification", "regression", "bernoulli")
SIGMA, T, DELTA = 0.7, 1.3, 0.6


class Sequence(nn.Module):
    """(B, L, D) -> (B, L, C); every position sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(D, 7), nn.Linear(7, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).tanh()
        return self.head(h + h.cumsum(1).sin())


class Pixels(nn.Module):
    """(B, D, H, W) -> (B, H, W, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(D, 5, 3, padding=1), nn.Conv2d(5, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).tanh()).permute(0, 2, 3, 1)


SHAPES = {"sequence": (Sequence, (7, D), (7,)), "pixels": (Pixels, (D, 2, 5), (2, 5))}


class Flat(nn.Module):
    """All L C outputs of an input in one axis."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).flatten(1)


class At(nn.Module):
    """The outputs at one position."""

    def __init__(self, net: nn.Module, position: int) -> None:
        super().__init__()
        self.net, self.position = net, position

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).flatten(1, -2)[:, self.position]


class Case:
    """A model with positions, data with their targets, and landmarks."""

    def __init__(self, name: str, likelihood: str) -> None:
        build, shape, self.positions = SHAPES[name]
        torch.manual_seed(0)
        self.likelihood, self.L = likelihood, math.prod(self.positions)
        self.model = build().double().eval()
        self.x, self.x_val, self.x_test = (torch.randn(n, *shape, dtype=F64) for n in (N, 11, B))
        self.y, self.y_val = (self.targets(n) for n in (N, 11))
        self.landmarks = torch.randn(M, *shape, dtype=F64), torch.randint(self.L * C, (M,))

    def targets(self, n: int) -> Tensor:
        if self.likelihood == "classification":
            return torch.randint(C, (n, *self.positions))
        if self.likelihood == "bernoulli":
            return torch.randint(2, (n, *self.positions, C))
        return torch.randn(n, *self.positions, C, dtype=F64)

    def loader(self, size: int = 5) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(size), self.y.split(size)))

    def val_loader(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x_val.split(5), self.y_val.split(5)))

    @property
    def sigma(self) -> float:
        return SIGMA if self.likelihood == "regression" else 1.0

    def fit(self, landmarks: bool = True, loader=None, **options) -> ELLALaplace:
        options = {"n_eigenvalues": K, "temperature": T, "prior_precision": DELTA, **options}
        la = ELLALaplace(self.model, self.likelihood, self.sigma, **options)
        la.fit(self.loader() if loader is None else loader, landmarks=self.landmarks if landmarks else None)
        return la

    def dense_features(self, la: ELLALaplace, x: Tensor) -> tuple[Tensor, Tensor]:
        """J V of the flat model, position by position."""
        V = torch.cat([v.flatten(1) for v in la.basis.directions.values()], 1).T
        phi = oracle.jacobian(Flat(self.model), x) @ V
        return phi.reshape(-1, C, V.shape[1]), oracle.outputs(Flat(self.model), x).reshape(-1, C)

    def curvature(self, phi: Tensor, f: Tensor) -> Tensor:
        if self.likelihood != "bernoulli":
            return oracle.curvature(phi, f, self.likelihood)
        p = f.sigmoid()
        return torch.einsum("bck,bc,bcl->kl", phi, p * (1 - p), phi)

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        if self.likelihood == "classification":
            return F.cross_entropy(f, y.flatten(), reduction="sum")
        if self.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(f, y.reshape(-1, C).double(), reduction="sum")
        return 0.5 * (f - y.reshape(-1, C)).square().sum()

    def nll_of_calls(self, la: ELLALaplace, **options) -> float:
        """Mean NLL of a position."""
        total = 0.0
        for x, y in self.val_loader():
            if self.likelihood == "regression":
                mean, cov = la(x)
                std = (cov.diagonal(dim1=1, dim2=2) + self.sigma**2).sqrt()
                total -= Normal(mean, std).log_prob(y.reshape(-1, C)).sum().item()
            elif self.likelihood == "bernoulli":
                p = la(x, **options)
                total += F.binary_cross_entropy(p, y.reshape(-1, C).double(), reduction="sum").item()
            else:
                total += F.nll_loss(la(x, **options).log(), y.flatten(), reduction="sum").item()
        return total / (len(self.x_val) * self.L)


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request) -> str:
    return request.param


@pytest.fixture(params=SHAPES)
def case(request, likelihood) -> Case:
    return Case(request.param, likelihood)


# ---------------------------------------------------------------------------- features, fit


def test_features_are_those_of_one_position_at_a_time(case):
    la = case.fit()
    phi, f = la.features(case.x_test)
    assert phi.shape == (B * case.L, C, K)
    assert f.shape == (B * case.L, C)
    V = torch.cat([v.flatten(1) for v in la.basis.directions.values()], 1).T
    for position in range(case.L):
        one = At(case.model, position)
        assert_close(phi[position :: case.L], oracle.jacobian(one, case.x_test) @ V, name=f"at {position}")
        assert_close(f[position :: case.L], oracle.outputs(one, case.x_test))


def test_landmark_coordinates_index_the_flattened_outputs(case):
    la = case.fit(n_eigenvalues=M)
    V = torch.cat([v.flatten(1) for v in la.basis.directions.values()], 1).T
    rows = oracle.gradient_rows(Flat(case.model), *case.landmarks)
    assert la.basis.rank == M
    assert la.basis.trace == pytest.approx(float(rows.square().sum()))
    assert_close(rows @ V @ V.T, rows, 1e-7)
    assert int(case.landmarks[1].max()) >= C


def test_a_landmark_coordinate_beyond_all_positions_is_refused(case):
    x, outputs = case.landmarks
    case.landmarks = x, outputs.clone().index_fill_(0, torch.tensor([3]), case.L * C)
    with pytest.raises(ValueError, match=str(case.L * C)):
        case.fit()


def test_curvature_and_loss_are_sums_over_positions(case):
    la = case.fit()
    phi, f = case.dense_features(la, case.x)
    assert_close(la.H, case.curvature(phi, f), name="G")
    assert_close(la.loss, case.loss(f, case.y), name="loss")
    assert la.n_data == N


@pytest.mark.parametrize("size", [1, 4, N])
def test_batch_size_does_not_matter(case, size):
    la, other = case.fit(), case.fit(loader=case.loader(size))
    assert_close(other.H, la.H)
    assert_close(other.loss, la.loss)


def test_streamed_curvature_equals_the_one_kept(case):
    assert_close(case.fit(curvature_size=None).H, case.fit().H)


def test_curvature_of_a_sample_counts_inputs(case):
    la = case.fit(curvature_size=7)
    n, G = la.snapshots[-1]
    assert n == 7
    assert_close(G, la.H)
    order = hash_keys(la.seed, CURVATURE_INPUT, torch.arange(N)).argsort()[:7]
    assert_close(G, N / 7 * case.curvature(*case.dense_features(la, case.x[order])))


def test_random_landmarks_come_from_all_positions(case):
    la = case.fit(landmarks=False, subsample_size=N * case.L)
    assert la.basis.n_landmarks == N * case.L  # more than N C: several positions of an input


@pytest.mark.filterwarnings("ignore:n_eigenvalues was reduced")
def test_all_pairs_of_inputs_and_coordinates_can_be_landmarks(case):
    with pytest.warns(UserWarning, match=f"subsample_size was reduced from 100000 to {N * case.L * C}"):
        la = case.fit(landmarks=False, subsample_size=100_000)
    rows = oracle.jacobian(Flat(case.model), case.x)
    assert la.basis.trace == pytest.approx(float(rows.square().sum()))


def test_evidence_counts_every_position(case):
    la = case.fit()
    phi, f = case.dense_features(la, case.x)
    A = case.curvature(phi, f) / (case.sigma**2 * T) + DELTA * torch.eye(K, dtype=F64)
    theta = oracle.weights(case.model)
    expected = -case.loss(f, case.y) / (case.sigma**2 * T)
    if case.likelihood == "regression":
        expected = expected - f.numel() * math.log(case.sigma * math.sqrt(2 * math.pi))
    expected = expected - 0.5 * (torch.logdet(A) - K * math.log(DELTA)) - 0.5 * DELTA * theta @ theta
    assert_close(la.log_marginal_likelihood(), expected)


def test_reverse_mode_equals_forward_mode(case):
    forward, reverse = case.fit(), case.fit(backend=ReverseNystromGGN)
    assert_close(reverse.H, forward.H)
    for ours, theirs in zip(reverse.features(case.x_test), forward.features(case.x_test)):
        assert_close(ours, theirs)


# ---------------------------------------------------------------------------- predictions


def test_moments_are_those_of_the_dense_features(case):
    la = case.fit()
    phi, f = case.dense_features(la, case.x_test)
    A = la.posterior_precision
    for together, expected in ((False, oracle.covariance(phi, A)), (True, oracle.joint_covariance(phi, A))):
        mean, cov = la._glm_predictive_distribution(case.x_test, joint=together)
        assert_close(mean, f.flatten() if together else f)
        assert_close(cov, expected)


def test_predictions_have_one_row_a_position(case):
    la = case.fit(temperature=50.0)
    phi, f = case.dense_features(la, case.x_test)
    cov = oracle.covariance(phi, la.posterior_precision)
    prediction = la(case.x_test)
    if case.likelihood == "regression":
        assert_close(prediction[0], f)
        assert_close(prediction[1], cov)
        assert_close(la(case.x_test, diagonal_output=True)[1], cov.diagonal(dim1=1, dim2=2))
        return
    if case.likelihood == "classification":
        expected = oracle.probit(f, cov)
        assert_close(la(case.x_test, link_approx="bridge"), oracle.bridge(f, cov, False), 1e-7)
    else:
        expected = (f / (1 + math.pi / 8 * cov.diagonal(dim1=1, dim2=2)).sqrt()).sigmoid()
    assert_close(prediction, expected)
    assert_close(la(case.x_test, link_approx="mc", n_samples=2**11), expected, rtol=0, atol=0.08)


def test_samples_share_their_noise_over_positions(case):
    la = case.fit()
    samples = la.functional_samples(case.x_test, n_samples=5000, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (5000, B * case.L, C)
    mean, cov = la._glm_predictive_distribution(case.x_test, joint=True)
    variance = cov.diagonal()
    error = (torch.outer(variance, variance) + cov.square()).div(5000).sqrt()
    assert ((samples.flatten(1).T.cov() - cov).abs() <= 5.5 * error + 1e-12).all()
    assert ((samples.mean(0).flatten() - mean).abs() <= 5.5 * (variance / 5000).sqrt()).all()


def test_sampled_weights_predict_positions(case):
    la = case.fit()
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    samples = la.functional_samples(case.x_test, "nn", 7, generator=generators[0])
    assert samples.shape == (7, B * case.L, C)
    prediction = la(case.x_test, "nn", link_approx="mc", n_samples=7, generator=generators[1])
    expected = {
        "classification": samples.softmax(-1).mean(0),
        "bernoulli": samples.sigmoid().mean(0),
        "regression": samples.mean(0),
    }[case.likelihood]
    assert_close(prediction[0] if case.likelihood == "regression" else prediction, expected)


def test_exact_residual_is_that_of_every_position(case):
    la = case.fit(residual="exact", residual_scale=0.3)
    V = torch.cat([v.flatten(1) for v in la.basis.directions.values()], 1).T
    J = oracle.jacobian(Flat(case.model), case.x_test).flatten(0, 1)
    R = J - J @ V @ V.T
    expected = J @ V @ la.posterior_covariance @ V.T @ J.T + 0.3 / DELTA * R @ R.T
    assert_close(la._glm_predictive_distribution(case.x_test, joint=True)[1], expected, 1e-8)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_grid_search_finds_what_a_loop_over_calls_finds(case):
    la, grid = case.fit(temperature=100.0), torch.logspace(-3, 4, 8).tolist()
    scores = []
    for delta in grid:
        la.prior_precision = delta
        scores.append(case.nll_of_calls(la))
    la.prior_precision = 1.0
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=case.val_loader(),
        log_prior_prec_min=-3,
        log_prior_prec_max=4,
        grid_size=8,
    )
    assert la.prior_precision.item() == grid[int(np.argmin(scores))]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hyperparameter_search_finds_what_a_loop_over_calls_finds(case):
    la, temperatures = case.fit(temperature=None), (1.0, 30.0, 1000.0)
    result = la.optimize_hyperparameters(
        case.val_loader(), {"temperature": temperatures}, link_approx="probit"
    )
    by_temperature = {s.temperature: score for s, score in result.table}
    ratios = []
    for temperature in temperatures:
        la.temperature = temperature
        ratios.append(by_temperature[temperature] / case.nll_of_calls(la))
    # A mean over inputs or over positions: the same factor for all.
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-9)
    assert ratios[0] == pytest.approx(1) or ratios[0] == pytest.approx(case.L)


# ---------------------------------------------------------------------------- targets


def test_targets_of_another_shape_are_refused_naming_the_batch(case):
    wrong = [case.y[:, :-1]]
    if case.y.ndim > 2:  # as many numbers in another order: flattening them would mix them up
        wrong.append(case.y.mT)
    for y in wrong:
        with pytest.raises(ValueError, match=r"batch \d"):
            case.fit(loader=list(zip(case.x.split(5), y.split(5))))


def test_one_position_is_no_position(likelihood):
    """(B, 1, C) gives what (B, C) gives."""
    case = Case("sequence", likelihood)
    x, y = case.x[:, :1], case.y[:, :1]
    landmarks = case.landmarks[0][:, :1], case.landmarks[1] % C
    models = (case.model, Flat(case.model))
    targets = (y, y[:, 0])
    fits = []
    for model, y in zip(models, targets):
        la = ELLALaplace(model, likelihood, case.sigma, n_eigenvalues=K)
        la.fit(list(zip(x.split(5), y.split(5))), landmarks=landmarks)
        fits.append(la)
    assert_close(fits[0].H, fits[1].H)
    assert_close(fits[0].log_marginal_likelihood(), fits[1].log_marginal_likelihood())
    for ours, theirs in zip(
        fits[0]._glm_predictive_distribution(case.x_test[:, :1]),
        fits[1]._glm_predictive_distribution(case.x_test[:, :1]),
    ):
        assert_close(ours, theirs)


# ---------------------------------------------------------------------------- variable length


class Tagger(nn.Module):
    """Tokens and their mask in a mapping; logits (B, L, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 5), nn.Linear(5, C)

    def forward(self, batch) -> Tensor:
        h = self.embedding(batch["input_ids"]) * batch["attention_mask"][..., None]
        return self.head(h + h.mean(1, keepdim=True).sin())


def padded_batches() -> list[dict[str, Tensor]]:
    """Each batch is as long as its longest sequence."""
    generator = torch.Generator().manual_seed(6)
    batches = []
    for size, length in ((5, 7), (5, 3), (3, 5)):
        lengths = torch.randint(2, length + 1, (size, 1), generator=generator)
        lengths[0] = length
        batches.append(
            {
                "input_ids": torch.randint(11, (size, length), generator=generator),
                "attention_mask": (torch.arange(length) < lengths).double(),
                "labels": torch.randint(C, (size, length), generator=generator),
            }
        )
    return batches


def fit_tagger(**options) -> ELLALaplace:
    torch.manual_seed(0)
    options = {"n_eigenvalues": K, "subsample_size": M, "temperature": T, **options}
    la = ELLALaplace(Tagger().double().eval(), "classification", prior_precision=DELTA, **options)
    la.fit(padded_batches())
    return la


@pytest.mark.parametrize("curvature_size", [None, 1000])
def test_batches_of_several_lengths_are_fitted(curvature_size):
    la, total, loss = fit_tagger(curvature_size=curvature_size), 0, 0
    for batch in padded_batches():
        phi, f = la.features(batch)
        assert f.shape == (batch["labels"].numel(), C)
        with torch.no_grad():
            assert_close(f, la.model(batch).flatten(0, 1))
        total = total + oracle.curvature(phi, f, "classification")
        loss = loss + F.cross_entropy(f, batch["labels"].flatten(), reduction="sum")
    assert la.n_data == 13
    assert_close(la.H, total)
    assert_close(la.loss, loss)


def test_features_of_a_mapping_are_the_directional_derivatives():
    la, batch = fit_tagger(), padded_batches()[1]
    phi, _ = la.features(batch)
    for k in range(K):
        sides = []
        for sign in (1, -1):
            moved = {
                name: p.detach() + sign * 1e-5 * la.basis.directions[name][k]
                for name, p in la.model.named_parameters()
            }
            sides.append(torch.func.functional_call(la.model, moved, (batch,)).detach().flatten(0, 1))
        assert_close(phi[..., k], (sides[0] - sides[1]) / 2e-5, 1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_batches_of_several_lengths_are_tuned_on():
    la, grid = fit_tagger(temperature=100.0), torch.logspace(-3, 4, 8).tolist()
    scores = []
    for delta in grid:
        la.prior_precision = delta
        scores.append(
            sum(
                F.nll_loss(la(b).log(), b["labels"].flatten(), reduction="sum").item()
                for b in padded_batches()
            )
        )
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=padded_batches(),
        log_prior_prec_min=-3,
        log_prior_prec_max=4,
        grid_size=8,
    )
    assert la.prior_precision.item() == grid[int(np.argmin(scores))]
