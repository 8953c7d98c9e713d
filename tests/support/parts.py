"""Likelihoods with models and data that come in parts, loaders that count, refusals, and a dense check."""

from collections import UserDict

import pytest
import torch
from conftest import assert_close
from helpers import C, D, N, Snapshot, as_tuple, build, inputs, mlp, reference_features, targets
from torch.utils.data import IterableDataset, TensorDataset, get_worker_info

SIZE = 5

# Tuning of a few weights on a few random labels.
QUIET = pytest.mark.filterwarnings(
    "ignore:The best (prior_precision|temperature)",
    "ignore:No setting predicts better than the network itself",
    "ignore:.*validation inputs",
    "ignore:curvature='mc' estimates G",
    "ignore:(subsample_size|n_eigenvalues) was reduced",
)

X = inputs(11, seed=7)
L = 2
SIZES = (None, 11, 2000)


class Kind:
    """A likelihood, a model for it, and data."""

    def __init__(self, likelihood, positions=False, **options):
        self.likelihood, self.positions, self.options = likelihood, positions, options

    def __repr__(self):
        return self.likelihood + (" at positions" if self.positions else "")

    def build(self, model=None, **options):
        options = {"curvature_size": None, **self.options, **options}
        return build(self.likelihood, model, **options)

    def data(self, seed, n=N, size=SIZE):
        generator = torch.Generator().manual_seed(seed)
        shape = (n, L) if self.positions else (n,)
        x = torch.randn(*shape, D, generator=generator, dtype=torch.float64)
        if self.likelihood == "classification":
            y = torch.randint(C, shape, generator=generator)
        else:
            y = torch.randn(*shape, C, generator=generator, dtype=torch.float64)
            y = (y > 0).double() if self.likelihood == "bernoulli" else y
        return list(zip(x.split(size), y.split(size)))


KINDS = [
    Kind("classification"),
    Kind("regression", sigma_noise=0.6),
    Kind("bernoulli"),
    Kind("classification", positions=True),
]


def assert_same_posterior(la, expected, rtol=1e-9):
    for name in ("H", "loss", "posterior_covariance", "posterior_precision"):
        assert_close(getattr(la, name), getattr(expected, name), rtol, name=name)
    for name in ("n_data", "n_curvature", "n_predictions", "n_outputs"):
        assert getattr(la, name) == getattr(expected, name), name
    assert_close(la.log_marginal_likelihood(), expected.log_marginal_likelihood(), rtol)
    for a, b in zip(as_tuple(la(X)), as_tuple(expected(X)), strict=True):
        assert_close(a, b, rtol)
    for k, v in expected.basis.directions.items():
        assert torch.equal(la.basis.directions[k], v)


class Counting:
    """A loader that counts how often it was read, and how many batches it was asked for."""

    def __init__(self, data):
        self.data, self.reads, self.asked = data, 0, 0

    def __iter__(self):
        self.reads += 1
        for batch in self.data:
            self.asked += 1
            yield batch


class Attributes(UserDict):
    """A mapping whose entries are attributes too, as in Hugging Face's."""

    def __getattr__(self, name):
        if name != "data" and name in self.data:
            return self.data[name]
        raise AttributeError(name)


class Untouchable:
    def __iter__(self):
        raise AssertionError("the loader was read")


def refused(la, action, match, error=ValueError):
    """Require an error that leaves the estimator as it was, bit for bit."""
    before = Snapshot(la, X[:, None].expand(-1, L, -1) if la.n_predictions > la.n_data else X)
    snapshots = [(n, G.clone()) for n, G in la.snapshots]
    plain = (la.n_curvature, la.n_predictions, la.state_dict()["fingerprint"], la.fit_history_)
    basis = la.basis
    with pytest.raises(error, match=match) as caught:
        action()
    before.check()
    assert la.basis is basis
    assert plain == (la.n_curvature, la.n_predictions, la.state_dict()["fingerprint"], la.fit_history_)
    assert [n for n, _ in snapshots] == [n for n, _ in la.snapshots]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(snapshots, la.snapshots, strict=True))
    return str(caught.value)


def la_data():
    return KINDS[0].data(1)


def two(kind, **options):
    """Return two estimators of one model and one basis, with data of their own."""
    model = mlp()
    la, other = kind.build(model, **options), kind.build(model, **options)
    la.fit(kind.data(1))
    other.fit(kind.data(2), basis=la.basis)
    return la, other


class Lines(IterableDataset):
    """The inputs of a data set, dealt out to workers."""

    def __init__(self, n=N, seed=1):
        self.of = mapped(n, seed)

    def __iter__(self):
        info = get_worker_info()
        yield from (self.of[i] for i in range(info.id, len(self.of), info.num_workers))


def mapped(n=N, seed=1):
    return TensorDataset(inputs(n, seed=seed), targets("classification", n, seed=seed + 1))


def check(model, batches, x, **kwargs):
    """Fit, and compare features, curvature and probabilities of whole batches with plain backward passes."""
    la = build(model=model, **kwargs)
    la.fit(batches)
    phi, f = la.features(x)
    expected, outputs = reference_features(model, la.basis, x)
    torch.testing.assert_close(f, outputs)
    torch.testing.assert_close(phi, expected)
    G = torch.zeros_like(la.H)
    for batch in batches:
        of_batch, logits = reference_features(model, la.basis, batch if isinstance(batch, dict) else batch[0])
        p = logits.softmax(-1)
        Lambda = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        G += torch.einsum("bck,bcd,bdl->kl", of_batch, Lambda, of_batch)
    torch.testing.assert_close(la.H, G)
    variance = torch.einsum("bck,kl,bcl->bc", expected, la.posterior_covariance, expected)
    probit = (outputs / torch.sqrt(1 + torch.pi / 8 * variance)).softmax(-1)
    torch.testing.assert_close(la(x), probit)
    return la


def draws(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(x, y=None, size=7):
    return list(zip(x.split(size), (targets("classification", len(x)) if y is None else y).split(size)))
