"""Targets that are ignored (-100), weights of inputs and positions, and smoothed labels."""

from __future__ import annotations

import oracle
import pytest
import torch
from conftest import C, K, M, assert_close
from helpers import DictModel, dict_batches, inputs, loader, mlp, targets
from models import Sequence
from searching import grid_search
from torch.nn import functional as F

from laplace_ella import ELLALaplace
from laplace_ella.data.hashing import CURVATURE_INPUT, hash_keys
from laplace_ella.data.stream import Stream
from laplace_ella.nystrom.basis import identity_basis
from laplace_ella.parallel.ranks import ALONE
from laplace_ella.posterior.likelihoods import LIKELIHOODS
from laplace_ella.tuning.candidates import scorer_of
from laplace_ella.tuning.scoring import ValidationData

F64 = torch.float64
N, L = 23, 7
T, DELTA = 1.3, 0.6


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sequence():
    torch.manual_seed(0)
    return Sequence().double().eval()


X = torch.randn(N, L, 2, dtype=F64, generator=generator(1))
Y = torch.randint(C, (N, L), generator=generator(2)).masked_fill(
    torch.rand(N, L, generator=generator(3)) < 0.4, -100
)
W = torch.rand(N, L, dtype=F64, generator=generator(4))
MASK = (Y != -100).double()


def batches(*tensors, size=5):
    return list(zip(*(t.split(size) for t in tensors)))


def fit(model, data, likelihood="classification", basis=True, **options) -> ELLALaplace:
    la = ELLALaplace(
        model, likelihood, **{"temperature": T, "prior_precision": DELTA, "curvature_size": None, **options}
    )
    given = identity_basis(la.backend.engine.function.weights()) if basis else None
    la.fit(data, basis=given)
    return la


def dense(la, weights):
    """G and loss of the sequence model, each prediction with its weight (N, L)."""
    phi, f = la.features(X)
    w = weights.flatten()
    G = sum(a * p.T @ oracle.output_hessian(g, "classification") @ p for a, p, g in zip(w, phi, f))
    loss = F.cross_entropy(f, Y.flatten().clamp_min(0), reduction="none") @ w
    return G, loss


def check(la, weights):
    G, loss = dense(la, weights)
    assert_close(la.H, G)
    assert_close(la.loss, loss)
    assert la.n_predictions == pytest.approx(float(weights.sum()))
    theta = oracle.weights(la.model)
    ratio = torch.logdet(G / T + DELTA * torch.eye(len(G), dtype=F64)) - torch.logdet(
        DELTA * torch.eye(len(G), dtype=F64)
    )
    assert_close(la.log_marginal_likelihood(), -loss / T - 0.5 * (ratio + DELTA * theta @ theta))


def assert_same_sums(la, expected):
    assert_close(la.H, expected.H)
    assert_close(la.loss, expected.loss)
    assert la.n_predictions == pytest.approx(expected.n_predictions)


# The budget is that of few inputs, so that batches are cut.
SIZES = [
    {"curvature_size": None},
    {"curvature_size": 2000},
    {"curvature_size": 2000, "memory_budget": 60_000},
]


@pytest.mark.parametrize("options", SIZES, ids=str)
def test_ignored_positions_add_nothing(options):
    la = fit(sequence(), batches(X, Y), **options)
    assert isinstance(la.n_predictions, int)
    assert la.n_data == N
    check(la, MASK)
    loss, G = la.backend.full(X, Y)
    assert_close(G, la.H)
    assert_close(loss, la.loss)


@pytest.mark.parametrize("options", SIZES, ids=str)
def test_weights_of_inputs_and_positions_multiply_their_part(options):
    check(fit(sequence(), batches(X, Y, W), **options), MASK * W)
    of_inputs = W[:, 0]
    check(fit(sequence(), batches(X, Y, of_inputs), **options), MASK * of_inputs[:, None])


def test_batches_with_and_without_weights_may_be_mixed():
    data = batches(X, Y, W)
    mixed = [b[:2] if i % 2 else b for i, b in enumerate(data)]
    weights = torch.cat([torch.ones_like(w) if i % 2 else w for i, (_, _, w) in enumerate(data)])
    for size in (None, 2000):
        check(fit(sequence(), mixed, curvature_size=size), MASK * weights)


def test_a_sample_of_the_inputs_is_scaled_to_all():
    la = fit(sequence(), batches(X, Y, W), curvature_size=10)
    chosen = hash_keys(la.seed, CURVATURE_INPUT, torch.arange(N)).argsort()[:10]
    only = torch.zeros(N, 1, dtype=F64).index_fill_(0, chosen, 1.0)
    assert_close(la.H, dense(la, MASK * W * only)[0] * N / 10)


@pytest.mark.filterwarnings("ignore:curvature='mc' estimates G")
def test_sampled_labels_are_weighted_too():
    la = fit(sequence(), batches(X, Y, W), curvature="mc", curvature_samples=3000)
    assert_close(la.H, dense(la, MASK * W)[0], rtol=0.05)


@pytest.mark.parametrize("likelihood", sorted(LIKELIHOODS.keys() - {"reward_modeling"}))
def test_whole_weights_are_repetitions(likelihood):
    model, x = mlp(4), inputs()
    y = {
        "classification": targets("classification", N, 4),
        "bernoulli": torch.randint(2, (N, 4)),
        "poisson": torch.randint(5, (N, 4)),
        "heteroscedastic": torch.randn(N, 2, dtype=F64),
        "regression": torch.randn(N, 4, dtype=F64),
    }[likelihood]
    counts = torch.randint(4, (N,), generator=generator(5))
    weighted = fit(model, batches(x, y, counts.double()), likelihood)
    repeated = fit(model, batches(x.repeat_interleave(counts, 0), y.repeat_interleave(counts, 0)), likelihood)
    assert_same_sums(weighted, repeated)
    assert_close(weighted.log_marginal_likelihood(), repeated.log_marginal_likelihood())
    assert weighted.n_data == N


def test_ignored_inputs_are_as_if_they_were_not_there():
    x, y = inputs(), targets("classification")
    kept = torch.arange(N) % 3 != 0
    some = fit(mlp(), batches(x[kept], y[kept]))
    la = fit(mlp(), batches(x, y.masked_fill(~kept, -100)))
    assert_same_sums(la, some)
    assert_close(la(x), some(x))
    column = fit(mlp(), batches(x, y.masked_fill(~kept, -100)[:, None]))
    assert_close(column.H, la.H)


@pytest.mark.parametrize("balanced", [False, True])
def test_landmarks_are_drawn_from_inputs_that_count(balanced):
    x, y = inputs(), targets("classification")
    kept = torch.arange(N) % 2 == 0
    la = ELLALaplace(mlp(), "classification", subsample_size=M, n_eigenvalues=K)
    la.fit(batches(x, y.masked_fill(~kept, -100)), balanced=balanced)
    assert set(la.basis.landmarks.positions) <= set(kept.nonzero()[:, 0].tolist())
    la.fit(batches(x, y, kept.double()), balanced=balanced)
    assert set(la.basis.landmarks.positions) <= set(kept.nonzero()[:, 0].tolist())


def test_mappings_and_their_weights():
    model, data = DictModel(), dict_batches()
    weights = torch.rand(N, dtype=F64, generator=generator())
    parts = weights.split(7)
    la = fit(model, [(b, b["labels"], w) for b, w in zip(data, parts)])
    zero = [
        (b, b["labels"], w * 0) if i else (b, b["labels"], w) for i, (b, w) in enumerate(zip(data, parts))
    ]
    assert_close(
        fit(model, zero).H + fit(model, [(b, b["labels"], w) for b, w in list(zip(data, parts))[1:]]).H, la.H
    )
    ignored = [{**b, "labels": torch.full_like(b["labels"], -100)} if i else b for i, b in enumerate(data)]
    assert_close(fit(model, ignored).H, fit(model, data[:1]).H)


class Stopping:
    """Batches that end with an error at first."""

    def __init__(self, data):
        self.data, self.stops = data, True

    def __iter__(self):
        for i, batch in enumerate(self.data):
            if self.stops and i == 3:
                raise OSError("no more")
            yield batch


@pytest.mark.parametrize("size", [None, 13])
def test_a_fit_that_was_interrupted_goes_on(size, tmp_path):
    expected = fit(sequence(), batches(X, Y, W), curvature_size=size)
    data = Stopping(batches(X, Y, W))
    with pytest.raises(OSError, match="no more"):
        ELLALaplace(sequence(), "classification", curvature_size=size).fit(
            data, basis=expected.basis, checkpoint=tmp_path / "fit", checkpoint_every=1
        )
    data.stops = False
    la = ELLALaplace(sequence(), "classification", curvature_size=size)
    la.fit(data, basis=expected.basis, checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert_close(la.H, expected.H)
    assert_close(la.loss, expected.loss)
    torch.save(la.state_dict(), tmp_path / "la.pt")
    other = ELLALaplace(sequence(), "classification")
    other.load_state_dict(torch.load(tmp_path / "la.pt", weights_only=True))
    assert other.n_predictions == la.n_predictions


def test_weighted_data_are_taken_away_again():
    data = batches(X, Y, W)
    la, rest = fit(sequence(), data), fit(sequence(), data[:3])
    la.forget(data[3:])
    assert_same_sums(la, rest)
    other = fit(sequence(), data[3:])
    other.fit(data[:3], override=False)
    whole = fit(sequence(), data)
    assert_same_sums(other, whole)
    error = rest.approximation_error(X[:2], data[:3])
    assert error.covariance_error < 1e-6


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ignored_targets_are_not_scored():
    la = fit(sequence(), batches(X, Y), basis=False, temperature=None, n_eigenvalues=K)
    result = la.optimize_hyperparameters(batches(X, Y), {"temperature": [50.0]})
    p, rows = la(X, link_approx="mc", n_samples=128), Y.flatten() != -100
    expected = F.nll_loss(p[rows].log(), Y.flatten()[rows])
    assert result.score == pytest.approx(float(expected), rel=1e-9)
    of_map = F.cross_entropy(la.features(X)[1], Y.flatten())
    assert result.baselines["MAP"].score == pytest.approx(float(of_map), rel=1e-9)

    def brier(p, y):
        assert len(p) == len(y) == int(rows.sum())
        return (p - F.one_hot(y, C)).square().sum(-1).mean()

    for options in ({}, {"pred_type": "nn", "link_approx": "mc", "n_samples": 3}):
        grid = {"log_prior_prec_min": -1, "log_prior_prec_max": 3, "grid_size": 3}
        assert grid_search(la, batches(X, Y), loss=brier, **grid, **options) > 0


def test_smoothed_labels_are_probabilities():
    x, y, eps = inputs(), targets("classification"), 0.1
    smooth = (1 - eps) * F.one_hot(y, C).double() + eps / C
    la, plain = fit(mlp(), batches(x, smooth)), fit(mlp(), batches(x, y))
    assert_close(la.loss, F.cross_entropy(oracle.outputs(mlp(), x), y, label_smoothing=eps, reduction="sum"))
    assert_close(la.H, plain.H)
    assert la.log_marginal_likelihood() != plain.log_marginal_likelihood()


REFUSED = {
    "lengths": (
        torch.ones(N, dtype=torch.long),
        "third entry of a batch must be the weights.*floating-point",
    ),
    "list": ([1.0] * N, "third entry"),
    "short": (torch.ones(N - 1), "third entry"),
    "negative": (-torch.ones(N), r"at least 0; got -1"),
    "nan": (torch.full((N,), float("nan")), "finite"),
    "of classes": (
        torch.ones(N, C),
        r"In batch 0: weights must be one for each input, or .*of shape \(23,\); got \(23, 3\)",
    ),
    "zero": (torch.zeros(N), "no target that counts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_cannot_be_are_refused(case):
    weights, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        fit(mlp(), [(inputs(), targets("classification"), weights)])


def test_what_is_ignored_is_said():
    x, y = inputs(), targets("classification")
    with pytest.raises(ValueError, match="no target that counts"):
        fit(mlp(), batches(x, torch.full_like(y, -100)))
    with pytest.raises(ValueError, match=r"or be -100, which is ignored; got 255"):
        fit(mlp(), batches(x, y.masked_fill(y == 0, 255)))
    with pytest.raises(ValueError, match="or be -100"):  # which 156 is in eight bits
        fit(mlp(), batches(x, y.masked_fill(y == 0, 156).to(torch.uint8)))
    la = fit(mlp(), loader(x, y))
    weighted = batches(x, y, torch.ones(N))
    with pytest.raises(ValueError, match=r"In validation batch 0: weights are for data that are fitted"):
        la.optimize_hyperparameters(weighted, ["prior_precision"])
    with pytest.raises(ValueError, match="weights are for data that are fitted"):
        la.optimize_prior_precision(
            pred_type="nn", method="gridsearch", val_loader=weighted, link_approx="mc", n_samples=2
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_methods_are_chosen_without_what_is_ignored():
    x, y = torch.cat([X] * 3), torch.cat([Y] * 3)
    y[::5] = -100  # all of a fold
    y[1] = -100
    la = fit(sequence(), batches(X, Y), basis=False, temperature=None, n_eigenvalues=K)
    for loss in (None, lambda p, y: F.nll_loss(p.log(), y)):
        result = la.optimize_hyperparameters(batches(x, y), "auto", method="MAP", loss=loss)
        counted = (y != -100).any(1)
        assert result.n_inputs == int(counted.sum())
        f = la.features(x)[1].unflatten(0, y.shape)
        each = F.cross_entropy(f.flatten(0, 1), y.flatten(), reduction="none").unflatten(0, y.shape).sum(1)
        of_map = result.held_out["MAP"]
        n = int((y != -100).sum())
        assert of_map.score == pytest.approx(float(each.sum()) / n, rel=1e-9)
    s = result.baselines["temperature scaling"].parameters["logit_scale"]
    assert 0 < s < 100
    few = torch.full_like(y, -100).index_copy_(0, torch.arange(49), Y.repeat(3, 1)[:49].clamp_min(0))
    with pytest.raises(ValueError, match="takes 50 validation inputs or more; got 49"):
        la.optimize_hyperparameters(batches(x, few), "auto")
    for data in (batches(x, torch.full_like(y, -100)), batches(x, y, torch.ones(len(y)))):
        with pytest.raises(ValueError, match=r"validation (loader|batch 0)"):
            la.optimize_hyperparameters(data, "auto")


def test_folds_are_cut_as_predictions_are(monkeypatch):
    kept = []
    monkeypatch.setattr(ValidationData, "append", lambda self, block: kept.append(block))
    la = fit(sequence(), batches(X, Y), basis=False, n_eigenvalues=K)
    stream = Stream(batches(X, Y), "x", "y", lambda x, n: x)
    with pytest.raises(ValueError, match="validation loader"):  # nothing was kept for it
        scorer_of(la._posterior, la.backend.engine, stream, ALONE, last_layer=True)
    rows = Y.flatten() != -100
    assert torch.equal(torch.cat([b.positions for b in kept]), torch.arange(N).repeat_interleave(L)[rows])
    assert torch.equal(torch.cat([b.targets for b in kept]), Y.flatten()[rows])
    for name in ("f", "phi"):
        assert sum(len(getattr(b.linearised, name)) for b in kept) == int(rows.sum())
