"""Outputs (B, ..., C): sequences and dense prediction, whose positions join the batch axis."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from conftest import assert_close
from helpers import moments
from models import WITH_POSITIONS, Applied
from searching import by_loop, grid_search
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from laplace_ella import ELLALaplace, ReverseNystromGGN
from laplace_ella.data.hashing import CURVATURE_INPUT, hash_keys

F64 = torch.float64
B, N, C, K, M = 5, 13, 3, 5, 11
LIKELIHOODS = ("classification", "regression", "bernoulli")
SIGMA, T, DELTA = 0.7, 1.3, 0.6


def flat(net: nn.Module) -> nn.Module:
    """All L C outputs of an input in one axis."""
    return Applied(lambda net, x: net(x).flatten(1), net)


def directions(la: ELLALaplace) -> Tensor:
    return oracle.dense(la.basis.directions)


class Case:
    """A model with positions, data with their targets, and landmarks."""

    def __init__(self, name: str, likelihood: str) -> None:
        build, shape = WITH_POSITIONS[name]
        torch.manual_seed(0)
        self.likelihood, self.sigma = likelihood, SIGMA if likelihood == "regression" else 1.0
        self.model = build().double().eval()
        self.x, self.x_val, self.x_test = (torch.randn(n, *shape, dtype=F64) for n in (N, 11, B))
        self.positions = oracle.outputs(self.model, self.x).shape[1:-1]
        self.L = math.prod(self.positions)
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

    def fit(self, landmarks: bool = True, loader=None, **options) -> ELLALaplace:
        options = {"n_eigenvalues": K, "temperature": T, "prior_precision": DELTA, **options}
        la = ELLALaplace(self.model, self.likelihood, self.sigma, **options)
        la.fit(self.loader() if loader is None else loader, landmarks=self.landmarks if landmarks else None)
        return la

    def jacobian(self, x: Tensor) -> Tensor:
        """J (B L, C, P) of the flat model, position by position."""
        return oracle.jacobian(flat(self.model), x).unflatten(1, (self.L, C)).flatten(0, 1)

    def dense_features(self, la: ELLALaplace, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.jacobian(x) @ directions(la), oracle.outputs(self.model, x).reshape(-1, C)

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

    def nll_of_calls(self, la: ELLALaplace) -> float:
        """Mean NLL of an input."""
        prediction, y = la(self.x_val), self.y_val
        if self.likelihood == "regression":
            mean, cov = prediction
            std = (cov.diagonal(dim1=1, dim2=2) + self.sigma**2).sqrt()
            total = -Normal(mean, std).log_prob(y.reshape(-1, C)).sum()
        elif self.likelihood == "bernoulli":
            total = F.binary_cross_entropy(prediction, y.reshape(-1, C).double(), reduction="sum")
        else:
            total = F.nll_loss(prediction.log(), y.flatten(), reduction="sum")
        return float(total) / len(y)


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request) -> str:
    return request.param


@pytest.fixture(params=WITH_POSITIONS)
def case(request, likelihood) -> Case:
    return Case(request.param, likelihood)


def test_landmark_coordinates_index_the_flattened_outputs(case):
    la = case.fit(n_eigenvalues=M)
    rows, V = oracle.gradient_rows(flat(case.model), *case.landmarks), directions(la)
    assert la.basis.rank == M
    assert la.basis.trace == pytest.approx(float(rows.square().sum()))
    assert_close(rows @ V @ V.T, rows, 1e-7)
    assert int(case.landmarks[1].max()) >= C
    x, outputs = case.landmarks
    case.landmarks = x, outputs.clone().index_fill_(0, torch.tensor([3]), case.L * C)
    with pytest.raises(ValueError, match=str(case.L * C)):
        case.fit()


OPTIONS = [{}, {"curvature_size": None}, {"backend": ReverseNystromGGN}, {"batch": 1}, {"batch": N}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_curvature_loss_and_evidence_are_sums_over_positions(case, options):
    options = dict(options)
    la = case.fit(loader=case.loader(options.pop("batch", 5)), **options)
    phi, f = case.dense_features(la, case.x)
    assert_close(la.H, case.curvature(phi, f), name="G")
    assert_close(la.loss, case.loss(f, case.y), name="loss")
    assert la.n_data == N
    A = case.curvature(phi, f) / (case.sigma**2 * T) + DELTA * torch.eye(K, dtype=F64)
    theta = oracle.weights(case.model)
    expected = -case.loss(f, case.y) / (case.sigma**2 * T)
    if case.likelihood == "regression":
        expected = expected - f.numel() * math.log(case.sigma * math.sqrt(2 * math.pi))
    expected = expected - 0.5 * (torch.logdet(A) - K * math.log(DELTA)) - 0.5 * DELTA * theta @ theta
    assert_close(la.log_marginal_likelihood(), expected, name="evidence")


def test_curvature_of_a_sample_counts_inputs(case):
    la = case.fit(curvature_size=7)
    n, G = la.snapshots[-1]
    assert n == 7
    assert_close(G, la.H)
    order = hash_keys(la.seed, CURVATURE_INPUT, torch.arange(N)).argsort()[:7]
    assert_close(G, N / 7 * case.curvature(*case.dense_features(la, case.x[order])))


@pytest.mark.filterwarnings("ignore:n_eigenvalues was reduced")
def test_random_landmarks_come_from_all_positions_and_may_be_all_pairs(case):
    la = case.fit(landmarks=False, subsample_size=N * case.L)
    assert la.basis.n_landmarks == N * case.L  # more than N C: several positions of an input
    with pytest.warns(UserWarning, match=f"subsample_size was reduced from 100000 to {N * case.L * C}"):
        la = case.fit(landmarks=False, subsample_size=100_000)
    assert la.basis.trace == pytest.approx(float(case.jacobian(case.x).square().sum()))


def test_predictions_have_one_row_a_position(case):
    la = case.fit(temperature=50.0)
    phi, f = case.dense_features(la, case.x_test)
    for ours, theirs in zip(la.features(case.x_test), (phi, f), strict=True):
        assert_close(ours, theirs)
    cov, joint = (g(phi, la.posterior_precision) for g in (oracle.covariance, oracle.joint_covariance))
    for together, expected in ((False, (f, cov)), (True, (f.flatten(), joint))):
        for ours, theirs in zip(moments(la, case.x_test, joint=together), expected, strict=True):
            assert_close(ours, theirs)
    prediction, variance = la(case.x_test), cov.diagonal(dim1=1, dim2=2)
    if case.likelihood == "regression":
        assert_close(prediction[1], cov)
        assert_close(la(case.x_test, diagonal_output=True)[1], variance)
        return
    if case.likelihood == "classification":
        expected = oracle.probit(f, cov)
        assert_close(la(case.x_test, link_approx="bridge"), oracle.bridge(f, cov, False), 1e-7)
    else:
        expected = (f / (1 + math.pi / 8 * variance).sqrt()).sigmoid()
    assert_close(prediction, expected)
    assert_close(la(case.x_test, link_approx="mc", n_samples=2**11), expected, rtol=0, atol=0.08)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_searches_find_what_loops_over_calls_find(case):
    la, val = case.fit(temperature=100.0), list(zip(case.x_val.split(5), case.y_val.split(5)))
    expected = by_loop(la, lambda: case.nll_of_calls(la), size=8)
    assert grid_search(la, val, grid_size=8) == expected
    la, temperatures = case.fit(temperature=None), (1.0, 30.0, 1000.0)
    result = la.optimize_hyperparameters(val, {"temperature": temperatures}, link_approx="probit")
    by_temperature = {s.temperature: score for s, score in result.table}
    ratios = []
    for temperature in temperatures:
        la.temperature = temperature
        ratios.append(by_temperature[temperature] / case.nll_of_calls(la))
    # A mean over inputs or over positions: the same factor for all.
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-9)
    assert ratios[0] == pytest.approx(1) or ratios[0] == pytest.approx(1 / case.L)


def test_targets_of_another_shape_are_refused_naming_the_batch(case):
    wrong = [case.y[:, :-1]]
    if case.y.ndim > 2:  # as many numbers in another order: flattening them would mix them up
        wrong.append(case.y.mT)
    for y in wrong:
        with pytest.raises(ValueError, match=r"batch \d"):
            case.fit(loader=list(zip(case.x.split(5), y.split(5))))


def test_one_position_is_no_position(likelihood):
    """(B, 1, C) gives what (B, C) gives."""
    case, found = Case("sequence", likelihood), []
    x, y, x_test = case.x[:, :1], case.y[:, :1], case.x_test[:, :1]
    landmarks = case.landmarks[0][:, :1], case.landmarks[1] % C
    for model, targets in ((case.model, y), (flat(case.model), y[:, 0])):
        la = ELLALaplace(model, likelihood, case.sigma, n_eigenvalues=K)
        la.fit(list(zip(x.split(5), targets.split(5))), landmarks=landmarks)
        found.append((la.H, la.log_marginal_likelihood(), *moments(la, x_test)))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


def padded_batches() -> list[dict[str, Tensor]]:
    """Tokens and their mask; each batch is as long as its longest sequence."""
    generator, batches = torch.Generator().manual_seed(6), []
    for size, length in ((5, 7), (5, 3), (3, 5)):
        lengths = torch.randint(2, length + 1, (size, 1), generator=generator)
        lengths[0] = length
        tokens, labels = (torch.randint(n, (size, length), generator=generator) for n in (11, C))
        mask = (torch.arange(length) < lengths).double()
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return batches


def tagged(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits (B, L, C)."""
    h = net[0](batch["input_ids"]) * batch["attention_mask"][..., None]
    return net[1](h + h.mean(1, keepdim=True).sin())


def fit_tagger(curvature_size) -> ELLALaplace:
    torch.manual_seed(0)
    model = Applied(tagged, nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, C)).double())
    sizes = {"n_eigenvalues": K, "subsample_size": M, "curvature_size": curvature_size}
    la = ELLALaplace(model, "classification", **sizes)
    la.fit(padded_batches())
    return la


@pytest.mark.parametrize("curvature_size", [None, 1000])
def test_batches_of_several_lengths_are_fitted(curvature_size):
    la, total, loss = fit_tagger(curvature_size), 0, 0
    for batch in padded_batches():
        phi, f = la.features(batch)
        assert_close(f, la.model(batch).flatten(0, 1))
        total = total + oracle.curvature(phi, f, "classification")
        loss = loss + F.cross_entropy(f, batch["labels"].flatten(), reduction="sum")
        one = Applied(lambda net, x, batch=batch: net(batch).flatten()[None], la.model)
        expected = oracle.jacobian(one, batch["input_ids"][:1])[0] @ directions(la)
        assert_close(phi.flatten(0, 1), expected)
    assert la.n_data == 13
    assert_close(la.H, total)
    assert_close(la.loss, loss)
