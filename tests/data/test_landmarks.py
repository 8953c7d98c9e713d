"""Which inputs and outputs become landmarks, and which inputs the curvature: samples by hash, in one pass."""

import warnings
from collections import Counter

import oracle
import pytest
import torch
from conftest import C, M, N, assert_close, make_problem
from helpers import directions, fit_problem

from laplace_ella.data.hashing import LANDMARK_INPUT, hash_keys
from laplace_ella.data.landmarks import BottomK, balanced, draw_outputs, uniform
from laplace_ella.data.stream import Stream
from laplace_ella.fitting.scan import Scan, scan
from laplace_ella.network.outputs import Axes
from laplace_ella.posterior.likelihoods import LIKELIHOODS

F64 = torch.float64


def keys_of(seed, n=N):
    return hash_keys(seed, LANDMARK_INPUT, torch.arange(n))


def offered(capacity, keys, groups, batch):
    """Stream positions 0, 1, ... in batches; each item is its own position."""
    sample = BottomK(capacity)
    for positions in torch.arange(len(keys)).split(batch):
        labels = None if groups is None else [groups[i] for i in positions]
        sample.offer(positions, keys[positions], labels, lambda i, p=positions: int(p[i]))
    return sample


def water_filling(keys, groups, capacity):
    """Offline: give every group one place in turn, lowest label first, while it has rows left."""
    order = keys.argsort().tolist()
    queues = [[i for i in order if groups[i] == g] for g in sorted(set(groups))]
    chosen = []
    while len(chosen) < min(capacity, len(keys)):
        for queue in queues:
            if queue and len(chosen) < capacity:
                chosen.append(queue.pop(0))
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(20))
def test_balanced_sample_is_water_filling_and_a_plain_one_the_smallest_keys(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 17, (int(torch.randint(1, 6, (), generator=generator)),), generator=generator)
    groups = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    groups = groups[torch.randperm(len(groups), generator=generator)].tolist()
    capacity = int(torch.randint(1, len(groups) + 3, (), generator=generator))
    keys = keys_of(seed, len(groups))
    for batch in (1, 5, len(groups)):
        sample = offered(capacity, keys, groups, batch)
        assert sample.positions() == water_filling(keys, groups, capacity)
        assert sample.groups() == [groups[i] for i in sample.positions()]
        plain = offered(capacity, keys, None, batch)
        assert plain.items() == plain.positions() == sorted(keys.argsort()[:capacity].tolist())


@pytest.mark.parametrize(
    ("sizes", "capacity", "expected"),
    [
        ([7, 7, 7], 12, [4, 4, 4]),  # even
        ([7, 7, 7], 11, [4, 4, 3]),  # a remainder
        ([2, 13, 7], 11, [2, 5, 4]),  # a class with too few
        ([1, 2, 3], 11, [1, 2, 3]),  # too few of all
        ([13, 7, 5], 2, [1, 1, 0]),  # fewer places than classes
    ],
)
def test_balanced_sample_shares_places_evenly(sizes, capacity, expected):
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).tolist()
    for order in (groups, groups[::-1]):
        counts = Counter(offered(capacity, keys_of(0, len(order)), order, 5).groups())
        assert [counts[g] for g in range(len(sizes))] == expected


def test_keys_are_distinct_nonnegative_and_differ_by_seed_and_purpose():
    positions = torch.arange(20_000)
    keys = [hash_keys(*args, positions) for args in ((0, 0), (1, 0), (0, 1), (2**62, 3))]
    joined = torch.cat(keys)
    assert joined.min() >= 0
    assert len(joined.unique()) == len(joined)
    bits = (keys[0][:, None] >> torch.arange(62)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / len(positions) ** 0.5


def drawn(n, m, scheme=uniform, n_curvature=0, seed=0):
    """Scan n inputs, each of which is its own number, with the labels 0, 1, 2, 0, ..."""
    x, y = torch.arange(n, dtype=F64)[:, None], torch.arange(n) % C
    found, data = Scan(BottomK(m), BottomK(n_curvature)), list(zip(x.split(50), y.split(50)))
    batches = Stream(data, "input_ids", "labels", lambda x, size: x).batches("Training data")
    likelihood = LIKELIHOODS["classification"]
    forward = lambda batch: (batch.x.repeat(1, C), Axes())  # noqa: E731
    scan(batches, forward, likelihood, found=found, seed=seed, scheme=scheme)
    pairs = draw_outputs(found.landmarks, seed)
    return [(int(x), int(c)) for x, c in zip(pairs.inputs, pairs.outputs)], found


def test_landmarks_and_curvature_inputs_are_independent_samples_of_all_inputs():
    n, m, k, n_seeds = 1000, 300, 200, 20
    shared, counts = 0, torch.zeros(n)
    for seed in range(n_seeds):
        _, found = drawn(n, m, n_curvature=k, seed=seed)
        counts[found.landmarks.positions()] += 1
        shared += len(set(found.landmarks.positions()) & set(found.curvature.positions()))
    # Hypergeometric
    variance = k * (m / n) * (1 - m / n) * (n - k) / (n - 1)
    assert abs(shared / n_seeds - m * k / n) < 4 * (variance / n_seeds) ** 0.5
    assert ((counts - n_seeds * m / n) / (n_seeds * m / n * (1 - m / n)) ** 0.5).abs().max() < 5


def test_inputs_are_distinct_while_there_are_enough_then_pairs_are_and_outputs_are_uniform():
    pairs, _ = drawn(3000, 2000)
    assert len({x for x, _ in pairs}) == 2000
    counts = torch.bincount(torch.tensor([c for _, c in pairs]), minlength=C)
    assert (counts - 2000 / C).abs().max() < 4 * (2000 * (1 / C) * (1 - 1 / C)) ** 0.5
    for scheme in (uniform, balanced):
        pairs, _ = drawn(N, 53, scheme)
        assert len(set(pairs)) == len(pairs) == 53
    of_classes = Counter(x % C for x, _ in pairs)
    assert max(of_classes.values()) - min(of_classes.values()) <= 1


def fit(p, landmarks=None, **options):
    return fit_problem(p, {"landmarks": landmarks}, **options)


def test_more_landmarks_than_pairs_take_all_pairs_with_one_warning_if_named(dtype):
    p = make_problem("mlp", "regression", dtype)
    reduced = rf"subsample_size was reduced from {N * C + 1} to {N * C}"
    with pytest.warns(UserWarning, match=reduced) as record:
        la = fit(p, subsample_size=N * C + 1)
    assert sum("was reduced" in str(w.message) for w in record) == 1
    everything = p.x.repeat_interleave(C, 0), torch.arange(N * C) % C
    assert_close(la.basis.eigenvalues, fit(p, everything).basis.eigenvalues)
    assert la.basis.n_landmarks == N * C
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit(p).basis.n_landmarks == N * C
        assert fit(p, subsample_size=N * C).basis.n_landmarks == N * C


def test_rank_above_the_data_is_reduced_with_one_warning_if_named(dtype):
    p = make_problem("mlp", "regression", dtype)
    repeated = tuple(t[[0, 1, 2, 0, 1]] for t in p.landmarks)
    with pytest.warns(UserWarning, match="n_eigenvalues was reduced from 5 to 3") as record:
        la = fit(p, repeated)
    assert sum("was reduced" in str(w.message) for w in record) == 1
    assert la.basis.rank == 3
    assert fit(p, repeated, n_eigenvalues=None).basis.rank == 3


def test_fit_draws_by_seed_alone(small_problem):
    draws = ((0, 5), (0, 23), (1, 5))
    fits = [fit(small_problem, batch=batch, subsample_size=M, seed=seed) for seed, batch in draws]
    found = [la.basis.eigenvalues for la in fits]
    assert_close(found[0], found[1])
    assert (found[0] - found[2]).abs().max() > 1e-3


def test_balanced_fit_uses_the_balanced_landmarks(dtype):
    p = make_problem("mlp", "classification", dtype)
    y = torch.tensor([0] * 19 + [1, 1, 2, 2])
    p = p.with_data(p.x, y)
    la = fit_problem(p, {"landmarks": None, "balanced": True}, subsample_size=6, n_eigenvalues=3)
    chosen = water_filling(keys_of(0), y.tolist(), 6)
    assert Counter(y[chosen].tolist()) == {0: 2, 1: 2, 2: 2}
    rows = oracle.jacobian(p.model, p.x[chosen]).flatten(0, 1)
    V = directions(la)
    span = torch.linalg.qr(rows.T)[0]
    assert_close(span @ span.T @ V, V)
