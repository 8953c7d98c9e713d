"""BatchBALD: which inputs of a pool are chosen together, against going through all labels of all batches."""

import itertools
import math

import pytest
import torch
from conftest import assert_close
from helpers import C, K, N, RewardModel, Snapshot, fitted, inputs, loader, reward_batches, targets
from models import Sequence, mlp

from laplace_ella import Laplace
from laplace_ella.posterior import acquisition
from laplace_ella.posterior.acquisition import Labellings, Pool, n_labels_of
from laplace_ella.posterior.gaussian import Outputs
from laplace_ella.posterior.likelihoods import LIKELIHOODS

F64 = torch.float64
N_POOL, S = 7, 61
POOL = inputs(N_POOL, seed=9)
MANY = 10**6


def labels(likelihood):
    y = targets("regression")
    return (y > 0).double() if likelihood == "bernoulli" else targets(likelihood)


def fit(likelihood="classification", **options):
    return fitted(
        likelihood, data=loader(inputs(), labels(likelihood)), **{"prior_precision": 0.1, **options}
    )


def make_pool(likelihood="classification", isotropic=False, n_outputs=C, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    outputs = Outputs(normal(N_POOL, n_outputs), 2 * normal(N_POOL, n_outputs, K))
    if isotropic:
        outputs = Outputs(outputs.mean, outputs.psi, normal(N_POOL, 5))
    return Pool(
        outputs, LIKELIHOODS[likelihood], normal(S, K), normal(S, 5, n_outputs) if isotropic else None
    )


def functions(pool):
    """Outputs (S, n, C) of the sampled functions, in a loop over inputs."""
    out = pool.outputs
    f = torch.stack([m + pool.noise @ psi.T for m, psi in zip(out.mean, out.psi)], 1)
    if out.isotropic is not None:
        f = f + torch.stack([(u[:, None] * pool.rest).sum(1) for u in out.isotropic], 1)
    return f


def label_probabilities(pool):
    """Probabilities (S, n, Y) of all ways to label an input."""
    f = functions(pool)
    if pool.likelihood.has_classes:
        return f.softmax(-1)
    ways = torch.tensor(list(itertools.product((1.0, 0.0), repeat=f.shape[-1])), dtype=F64)
    p = f.sigmoid()[..., None, :]
    return (ways * p + (1 - ways) * (1 - p)).prod(-1)


def joint_information(p, chosen):
    """Mutual information of the function and the labels of some inputs, given p (S, n, Y), label by label."""
    joint = known = 0.0
    for labelling in itertools.product(range(p.shape[-1]), repeat=len(chosen)):
        of_functions = math.prod(p[:, i, y] for i, y in zip(chosen, labelling))
        mean = of_functions.mean()
        joint -= mean * mean.log()
        known -= (of_functions * of_functions.log()).mean()
    return joint - known


def greedy_by_enumeration(p, batch_size):
    indices, scores = [], []
    for _ in range(batch_size):
        found = {i: joint_information(p, [*indices, i]) for i in range(p.shape[1]) if i not in indices}
        indices.append(max(found, key=found.__getitem__))
        scores.append(found[indices[-1]])
    return torch.tensor(indices), torch.stack(scores)


def choose(pool, batch_size, n_labellings=MANY, seed=0):
    starts = torch.rand(batch_size, generator=torch.Generator().manual_seed(seed), dtype=F64)
    n_labels = n_labels_of(pool.likelihood, pool.outputs.mean.shape[1])
    return acquisition.greedy(pool, n_labels, n_labellings, starts)


CASES = {
    "classes": lambda seed: make_pool(seed=seed),
    "classes, residual": lambda seed: make_pool(isotropic=True, seed=seed),
    "one binary target": lambda seed: make_pool("bernoulli", n_outputs=1, seed=seed),
    "binary targets": lambda seed: make_pool("bernoulli", n_outputs=2, seed=seed),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_the_choice_and_its_information_are_those_of_all_labels(case, seed):
    pool = CASES[case](seed)
    found = choose(pool, 4)
    indices, scores = greedy_by_enumeration(label_probabilities(pool), 4)
    assert found.indices.tolist() == indices.tolist()
    assert_close(found.scores, scores)


@pytest.mark.parametrize("kept", [0, 2**24])
@pytest.mark.parametrize("numbers", [1, 1000])
def test_the_pool_is_worked_through_in_parts(monkeypatch, numbers, kept):
    pool = make_pool()
    whole = choose(pool, 4)
    monkeypatch.setattr(acquisition, "NUMBERS_AT_ONCE", numbers)
    monkeypatch.setattr(acquisition, "NUMBERS_KEPT", kept)
    found = choose(pool, 4)
    assert torch.equal(found.indices, whole.indices)
    assert_close(found.scores, whole.scores, 1e-12)


def test_a_sample_of_the_labellings_is_close_to_all_of_them():
    pool = make_pool()
    exact, sampled = choose(pool, 6), [choose(pool, 6, 40, seed) for seed in range(20)]
    scores = torch.stack([s.scores for s in sampled])
    assert_close(scores[:, :4], exact.scores[:4].expand(20, 4), 1e-12)  # of at most 27 labellings
    assert 1e-4 < scores[:, 4:].std(0).max() < 0.05
    assert_close(scores.mean(0), exact.scores, 0.01)
    assert (scores.diff(dim=1) > 0).all()
    again = choose(pool, 6, 40, 3)
    assert torch.equal(again.scores, sampled[3].scores)


def test_drawn_labellings_have_the_probabilities_that_they_should():
    pool = make_pool()
    p = label_probabilities(pool)
    before = Labellings.of_nothing(S, pool.device).joined_by(p[:, 0], MANY, torch.tensor(0.5))
    drawn = [before.joined_by(p[:, 1], 5, u) for u in torch.linspace(0, 0.999, 400)]
    for labellings in drawn:
        assert_close(labellings.weights.sum(0), torch.ones(5, dtype=F64), 1e-12)
    # What is known of the function is, on average over labels, what was known before.
    mean = torch.stack([d.weights @ d.probabilities for d in drawn]).mean(0)
    assert_close(mean, torch.full((S,), 1 / S, dtype=F64), 0.05)


def test_labels_without_any_probability_are_left_out():
    pool = make_pool()
    certain = torch.tensor([1.0, 0.0, 0.0], dtype=F64).expand(S, C)
    labellings = Labellings.of_nothing(S, pool.device).joined_by(certain, MANY, torch.tensor(0.5))
    assert labellings.probabilities.tolist() == [1.0]
    (part,) = pool.parts(1)
    assert_close(labellings.gains(*part), Labellings.of_nothing(S, pool.device).gains(*part), 1e-12)


# ---------------------------------------------------------------------------- estimators


def test_the_first_choice_is_that_of_the_largest_epistemic_uncertainty():
    la = fit()
    found, alone = la.batch_bald([POOL], 3, n_samples=64), la.uncertainty(POOL, 64).epistemic
    assert found.indices[0] == alone.argmax()
    assert_close(found.scores[0], alone.max(), 1e-9)
    assert found.scores.dtype == F64
    assert (found.scores.diff() > 0).all()
    assert found.scores[-1] < alone[found.indices].sum()  # together they tell less than one by one
    assert found.scores[-1] < math.log(64)


def test_copies_of_an_input_are_not_chosen_where_bald_takes_them_all():
    # A posterior so wide that functions are sure of their labels: a second label of a copy tells nothing.
    la = fit(prior_precision=1e-3, temperature=1e4)
    most = int(la.uncertainty(POOL, 256).epistemic.argmax())
    pool = torch.cat([POOL, POOL[most].expand(3, -1)])
    copies = {most, N_POOL, N_POOL + 1, N_POOL + 2}
    top = la.uncertainty(pool, 256).epistemic.topk(4).indices
    assert set(top.tolist()) == copies
    found = la.batch_bald([pool], 4)
    assert len(copies & set(found.indices.tolist())) == 1
    assert found.scores[-1] > 1.3 * la.batch_bald([pool[top]], 4).scores[-1]


def test_batches_of_the_pool_and_their_form_make_no_difference():
    la = fit()
    before = Snapshot(la, inputs(11, seed=7))
    whole = la.batch_bald([POOL], 3)
    parts = POOL.split(2)
    for pool in (parts, [(x, None) for x in parts], loader(POOL, targets("classification", N_POOL), 3)):
        found = la.batch_bald(pool, 3)
        assert torch.equal(found.indices, whole.indices)
        assert_close(found.scores, whole.scores)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    one, other = (la.batch_bald([POOL], 3, generator=g) for g in generators)
    assert torch.equal(one.scores, other.scores)
    assert not torch.equal(one.scores, whole.scores)
    before.check()


def test_all_of_a_pool_can_be_chosen():
    found = fit().batch_bald([POOL], N_POOL, n_labellings=64)
    assert sorted(found.indices.tolist()) == list(range(N_POOL))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prior", [1e-12, 1e12])
def test_models_of_every_dtype_and_width(dtype, prior):
    data = loader(inputs(dtype=dtype), targets("classification"))
    la = fitted(model=mlp(dtype=dtype), data=data, prior_precision=prior)
    found = la.batch_bald([POOL.to(dtype)], 4, n_samples=32)
    assert found.scores.isfinite().all()
    assert len(set(found.indices.tolist())) == 4


def test_pairs_are_chosen_for_a_reward_model():
    la = fitted("reward_modeling", RewardModel(), reward_batches())
    pairs = torch.cat([x for x, _ in reward_batches()])
    found = la.batch_bald([pairs], 3, n_samples=64)
    classes = fitted("classification", RewardModel(), reward_batches())
    assert torch.equal(found.indices, classes.batch_bald([pairs], 3, n_samples=64).indices)
    assert int(found.indices.max()) < N


def test_positions_are_candidates():
    model = Sequence().double()
    x = torch.randn(5, 7, 2, dtype=F64)
    la = fitted(model=model, data=loader(x, model(x).detach().argmax(-1)))
    found = la.batch_bald([x], 4)
    assert found.indices[0] == la.uncertainty(x, 256).epistemic.argmax()


def test_the_residual_adds_to_the_information():
    la, plain = fit(residual="isotropic"), fit()
    with_residual, without = (e.batch_bald([POOL], 3, n_samples=512).scores[-1] for e in (la, plain))
    assert with_residual > 1.05 * without
    la.backend.engine.memory_budget = 1000
    with pytest.raises(ValueError, match=r"memory budget is 1e\+03.*Lower n_samples"):
        la.batch_bald([POOL], 3)


@pytest.mark.parametrize("size", [0, -1, 2.0, None, True])
def test_sizes_are_positive_integers(size):
    la = fit()
    with pytest.raises(ValueError, match="batch_size must be a positive integer"):
        la.batch_bald([POOL], size)
    with pytest.raises(ValueError, match="n_labellings must be a positive integer"):
        la.batch_bald([POOL], 2, n_labellings=size)
    with pytest.raises(ValueError, match="n_samples must be a positive integer"):
        la.batch_bald([POOL], 2, n_samples=size)


REFUSED = {
    "regression": ("regression", {}, "labels.*'regression'.*uncertainty"),
    "many targets": ("bernoulli", {}, "binary targets together have 8; n_labellings=7"),
    "residual": ("classification", {"residual": "exact"}, "residual='exact'.*isotropic"),
    "no features": (
        "classification",
        {"variance": "constant"},
        "variance='constant'.*method='ELLA .T.'.*deepcopy",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_enumerated_or_sampled_is_refused_before_the_pool_is_read(what):
    likelihood, options, match = REFUSED[what]
    la = fit(likelihood, **options)

    def pool():
        raise AssertionError("read")
        yield

    with pytest.raises(ValueError, match=match):
        la.batch_bald(pool(), 2, n_labellings=7)


def test_pools_that_are_none():
    la = fit()
    for pool in (POOL, "pool", {"x": POOL}, None):
        with pytest.raises(ValueError, match=r"pool_loader must be an iterable.*into a list"):
            la.batch_bald(pool, 2)
    for pool in ([], [POOL[:0]], [POOL[:1]]):
        with pytest.raises(ValueError, match="batch_size must be at most the size of the pool; got 2"):
            la.batch_bald(pool, 2)
    with pytest.raises(ValueError, match="finite"):
        la.batch_bald([POOL * float("nan")], 2)
    with pytest.raises(AttributeError):
        Laplace(la.model, "classification", "all", "ella").batch_bald([POOL], 2)
