"""Landmarks are drawn by a scheme: a function of a batch and a seed."""

from __future__ import annotations

import pytest
import torch
from conftest import C, M, N

from laplace_ella.data.hashing import LANDMARK_INPUT, hash_keys, uniforms
from laplace_ella.data.landmarks import (
    BottomK,
    balanced,
    check_landmarks,
    draw_outputs,
    offer_inputs,
    uniform,
)
from laplace_ella.data.stream import Stream

F64 = torch.float64
X, Y = torch.arange(N, dtype=F64)[:, None], (torch.arange(N) % 7 == 0).long()  # four of one class


def drawn(scheme, m=M, batch=5, seed=3, y=Y):
    """The inputs that are drawn, and the outputs."""
    sample = BottomK(m)
    stream = Stream(list(zip(X.split(batch), y.split(batch))), "x", "y", lambda x, size: x)
    for part in stream.batches("data"):
        offer_inputs(sample, part, C, scheme, seed)
    landmarks = draw_outputs(sample, seed)
    return [int(x) for x in landmarks.inputs], landmarks.outputs.tolist()


def far_away(batch, seed):
    return -batch.x.flatten(1).norm(dim=1), None


def often_small(batch, seed):
    """Draw x with a weight of exp(-x): exponential variables of these rates."""
    u = uniforms(seed, LANDMARK_INPUT, batch.positions, 1)[:, 0]
    return -u.log() / (-batch.x[:, 0]).exp(), None


@pytest.mark.parametrize("batch", [1, 5, N])
def test_a_scheme_from_outside(batch):
    assert drawn(far_away, batch=batch)[0] == list(range(N - M, N))


def test_a_scheme_with_weights():
    found = [drawn(often_small, 1, seed=seed)[0][0] for seed in range(500)]
    share = (1 - torch.tensor(-1.0).exp()) / (1 - torch.tensor(-float(N)).exp())
    deviation = (share * (1 - share) / 500).sqrt()
    assert abs(found.count(0) / 500 - share) < 4 * deviation


def test_uniform_and_balanced():
    keys = hash_keys(3, LANDMARK_INPUT, torch.arange(N))
    assert drawn(uniform)[0] == sorted(keys.argsort()[:M].tolist())
    assert sum(int(Y[i]) for i in drawn(balanced, 8)[0]) == 4
    pairs = list(zip(*drawn(balanced, 24)))
    assert len(set(pairs)) == 24
    assert sum(int(Y[i]) for i, _ in pairs) == 12  # all of the small class, with every output
    assert drawn(balanced, 8, y=torch.nn.functional.one_hot(Y).double()) == drawn(balanced, 8)


def test_balanced_needs_one_class_for_each_input():
    (part,) = Stream([(X, Y)], "x", "y", lambda x, size: x).batches("data")
    with pytest.raises(ValueError, match=r"one class for each input; got 46 targets for 23"):
        offer_inputs(BottomK(M), type(part)(part.name, part.positions, part.x, Y.repeat(2)), C, balanced, 0)


@pytest.mark.parametrize(
    ("landmarks", "match"),
    [
        (X, "pair"),
        ((X, Y, Y), "pair"),
        ((X, Y.double()), "LongTensor of shape"),
        ((X, Y[:0]), "LongTensor of shape"),
        ((X[1:], Y), "as many inputs as outputs; got 22 and 23"),
        ((X * torch.nan, Y), "NaN"),
        ((X.to_sparse(), Y), "dense"),
    ],
)
def test_pairs_that_are_refused(landmarks, match):
    with pytest.raises(ValueError, match=match):
        check_landmarks(landmarks, "x")
