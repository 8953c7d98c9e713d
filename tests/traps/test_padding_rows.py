"""Padding rows of embeddings, and gradients scaled by frequency: one derivative in every mode."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close
from helpers import build, reference_features
from laplace.curvature import AsdlGGN, BackPackGGN
from models import Applied
from torch import nn
from torch.nn import functional as F

from laplace_ella.network.features import FEATURES
from laplace_ella.network.functional import FunctionalModel
from laplace_ella.network.lookups import padding_rows
from laplace_ella.network.memory import Chunks
from laplace_ella.network.safety import safely
from laplace_ella.nystrom.basis import identity_basis
from laplace_ella.posterior.residual import kernels

F64 = torch.float64
TOKENS, PAD, WIDTH, C, LENGTH = 11, 2, 5, 3, 4


# Some of the models have no forward mode, or no batched gradients.
falls_back = pytest.mark.filterwarnings("ignore:(This model|An operator has no batching rule):UserWarning")


def randomised(module):
    """Fill padding rows too: a lookup of a row of zeros hides what is done to it."""
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.to(F64)


class Pooled(nn.Module):
    """Tokens, averaged, classified."""

    def __init__(self, **options):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, **{"padding_idx": PAD, **options})
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, C)

    def forward(self, x):
        return self.head(self.hidden(self.embedding(x)).tanh().mean(1))


class TokenClassifier(nn.Module):
    """What BertForTokenClassification is, in small."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(TOKENS, WIDTH, padding_idx=PAD)
        self.positions = nn.Embedding(LENGTH + 3, WIDTH, padding_idx=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, C)

    def forward(self, x):
        seen = x != self.words.padding_idx  # which a model may ask at any time
        h = self.norm(self.words(x) + self.positions(torch.where(seen, seen.cumsum(1) + 1, 1)))
        scores = self.query(h) @ self.key(h).mT
        h = h + (scores - 2.0 * (~seen[:, None])).softmax(-1) @ self.value(h)
        return self.head(h.tanh())


def raw(lookup):
    """A parameter that is looked up by a function."""
    net = nn.ModuleDict({"head": nn.Linear(WIDTH, C)})
    net.weight = nn.Parameter(torch.zeros(TOKENS, WIDTH))
    return Applied(lambda net, x: net["head"](lookup(net.weight, x).tanh().mean(1)), net)


class Tied(nn.Module):
    """A language model whose head is its embedding: the padding row has a gradient from there."""

    def __init__(self, by_function=False):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH, padding_idx=PAD)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        if not by_function:
            self.head = nn.Linear(WIDTH, TOKENS, bias=False)
            self.head.weight = self.embedding.weight

    def forward(self, x):
        h = self.hidden(self.embedding(x)).tanh().mean(1)
        return h @ self.embedding.weight.T


def bag(**options):
    embedding = nn.EmbeddingBag(TOKENS, WIDTH, mode="mean", padding_idx=PAD, **options)
    return nn.Sequential(embedding, nn.Tanh(), nn.Linear(WIDTH, C))


def computed():
    """A weight that is itself a function of parameters has a padding row too."""
    model = Pooled()
    nn.utils.parametrize.register_parametrization(model.embedding, "weight", nn.Tanh())
    return model


MODELS = {
    "pooled": Pooled,
    "by frequency": lambda: Pooled(scale_grad_by_freq=True),
    "by frequency alone": lambda: Pooled(scale_grad_by_freq=True, padding_idx=None),
    "negative": lambda: Pooled(padding_idx=PAD - TOKENS),
    "sparse": lambda: Pooled(sparse=True),
    "sparse alone": lambda: Pooled(sparse=True, padding_idx=None),
    "tokens": TokenClassifier,
    "function": lambda: raw(lambda weight, x: F.embedding(x, weight, padding_idx=PAD - TOKENS)),
    "low-level": lambda: raw(lambda weight, x: torch.embedding(weight, x, PAD)),
    "tied": Tied,
    "tied by function": lambda: Tied(by_function=True),
    "computed": computed,
    "bag": bag,
    "bag by frequency": lambda: bag(scale_grad_by_freq=True),
}


def make(name):
    return randomised(MODELS[name]())


def allowed(name, way=""):
    """Bags have no rules of forward mode, and vmap no sparse gradients."""
    return (
        FEATURES[way].reference
        if name.startswith("bag")
        else not (name.startswith("sparse") and way == "reverse")
    )


def tokens(n=13, seed=1):
    x = torch.randint(TOKENS, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    x[:, -1] = PAD
    x[1], x[2, :2] = PAD, 4  # nothing but padding; a token that comes twice
    return x


def data_of(model, x, batch=5):
    f = model(x)
    y = torch.randint(f.shape[-1], f.shape[:-1], generator=torch.Generator().manual_seed(2))
    return list(zip(x.split(batch), y.split(batch)))


def reference(model):
    """The model whose derivatives by plain backward passes are meant: not divided by frequencies, and dense."""
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)):
            m.scale_grad_by_freq = m.sparse = False
    return model


def drawn(model, n):
    weights, generator = FunctionalModel(model).weights(), torch.Generator().manual_seed(3)
    return {k: torch.randn(n, *w.shape, generator=generator, dtype=F64) for k, w in weights.items()}


def true_features(model, directions, x):
    """J(x) V (B, L C, K) by plain backward passes, one for each row and output."""
    named = {f"net.{k}": v for k, v in directions.items()}
    basis = SimpleNamespace(rank=len(next(iter(named.values()))), directions=named)
    return reference_features(Applied(lambda net, x: net(x).flatten(1), reference(model)), basis, x)[0]


def fit(model, **kwargs):
    la = build(model=model, subsample_size=17, **kwargs)
    la.fit(data_of(model, tokens()))
    return la


@falls_back
@pytest.mark.parametrize(("name", "way"), [(k, w) for k in MODELS for w in FEATURES if allowed(k, w)])
def test_every_way_has_the_derivative_of_a_plain_backward_pass(name, way):
    model, x = make(name), tokens(7)
    function, v = FunctionalModel(model), drawn(model, 2)
    phi, f = safely(model, lambda: FEATURES[way](function, function.weights(), v, x, Chunks(3, 2)))
    assert_close(phi, true_features(model, v, x))
    assert_close(f, model(x).flatten(1).detach())


@falls_back
@pytest.mark.parametrize("name", ["by frequency", "sparse", "sparse alone", "tokens", "tied", "bag"])
def test_fits_of_all_modes_agree(name):
    model, x = make(name), tokens(7, seed=4)
    modes = ["auto"] if name.startswith("bag") else ["auto", "forward", "double", "reverse"]
    first, *others = (fit(model, autodiff=mode, residual="isotropic") for mode in modes)
    for la in (first, *others):
        phi, _ = la.features(x)
        expected = true_features(model, la.basis.directions, x)
        assert_close(phi, expected.reshape(-1, phi.shape[1], la.basis.rank), name="phi")
        assert_close(la.H, first.H, name="G")
        assert_close(la(x), first(x), name="probabilities")
        assert_close(la.novelty(x), first.novelty(x), name="novelty")


@pytest.mark.parametrize("name", ["pooled", "by frequency", "negative", "tokens"])
def test_padding_rows_have_no_part_in_directions(name):
    model = make(name)
    la = fit(model)
    rows = padding_rows(model)
    assert len(rows) == (2 if name == "tokens" else 1)
    for weight, row in rows.items():
        assert la.basis.directions[weight].any()
        assert not la.basis.directions[weight][:, row].any()


@pytest.mark.parametrize("name", ["tied", "tied by function"])
def test_a_padding_row_that_the_head_shares_keeps_the_heads_part(name):
    model = make(name)
    la = build(model=model, n_eigenvalues=3, residual="exact")
    la.fit(data_of(model, tokens()), landmarks=(tokens(5), torch.tensor([PAD, 0, PAD, 1, PAD])))
    assert la.basis.directions["embedding.weight"][:, PAD].any()
    if name == "tied":  # a row that the head shares is no constant
        assert padding_rows(model) == {}
        samples = la.sample(3)[:, : TOKENS * WIDTH].reshape(3, TOKENS, WIDTH)
        assert (samples[:, PAD] != model.embedding.weight[PAD]).all()


@falls_back
@pytest.mark.parametrize("name", ["pooled", "by frequency", "tokens", "tied", "function", "bag"])
def test_the_exact_residual_is_that_of_plain_backward_passes(name):
    model, x = make(name), tokens(5, seed=4)
    la = build("regression", model, subsample_size=17, residual="exact", prior_precision=0.6)
    la.fit([(x, torch.zeros_like(model(x))) for x in tokens().split(5)])
    weights = FunctionalModel(model).weights()
    J = true_features(model, identity_basis(weights).directions, x)
    J = J.reshape(-1, model(x).shape[-1], J.shape[-1])
    assert_close(kernels(la.backend.engine, x), J @ J.mT)
    V = torch.cat([v.flatten(1) for v in la.basis.directions.values()], 1)
    outside = J - J @ V.T @ V
    covariance = outside @ outside.mT / 0.6 + J @ V.T @ la.posterior_covariance @ V @ J.mT
    assert_close(la(x)[1].reshape(covariance.shape), covariance)


@pytest.mark.parametrize("name", ["pooled", "tokens", "tied", "function", "tied by function"])
def test_networks_at_sampled_weights_look_padding_up_where_it_was(name):
    """As the linearised network does: its limit for small offsets."""
    model, x, h = make(name), tokens(5, seed=4), 1e-6
    la, v = fit(model), drawn(model, 1)
    moved = [la.backend.engine.forward_at({k: s * h * t for k, t in v.items()}, x)[0] for s in (1, -1)]
    slope = (moved[0] - moved[1]) / (2 * h)
    assert_close(slope.flatten(), true_features(model, v, x).flatten(), rtol=1e-6)


def test_sampled_weights_leave_padding_rows_alone():
    model = make("pooled")
    la = fit(model, residual="exact")
    samples = la.sample(3)[:, : TOKENS * WIDTH].reshape(3, TOKENS, WIDTH)
    assert torch.equal(samples[:, PAD], model.embedding.weight[PAD].detach().expand(3, WIDTH))
    assert (samples[:, PAD + 1] != model.embedding.weight[PAD + 1]).all()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("backend", [AsdlGGN, BackPackGGN])
@pytest.mark.parametrize(("padding", "by_frequency"), [(None, False), (PAD, False), (PAD - TOKENS, True)])
def test_landmark_gradients_of_the_libraries_are_the_same(padding, by_frequency, backend):
    options = {"padding_idx": padding, "scale_grad_by_freq": by_frequency}
    embedding = nn.Embedding(TOKENS, WIDTH, **options)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(LENGTH * WIDTH, C))
    model = randomised(model).float()  # the libraries' rules are of float32
    ours, theirs = (fit(model, backend=b, n_eigenvalues=3) for b in (None, backend))
    for k, v in ours.basis.directions.items():
        assert_close(theirs.basis.directions[k], v, name=k, rtol=1e-4)
    assert embedding.padding_idx == (None if padding is None else PAD)
    assert embedding.scale_grad_by_freq == by_frequency
