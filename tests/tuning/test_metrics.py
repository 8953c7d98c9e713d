"""Metrics of predictions, each against its definition on small data."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import norm

from laplace_ella.posterior.likelihoods import LIKELIHOODS
from laplace_ella.tuning.metrics import metrics, of_rows, reliability

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(3)
P = torch.rand(97, 3, generator=GENERATOR, dtype=F64)
P = P / P.sum(1, keepdim=True)
Y = torch.randint(3, (97,), generator=GENERATOR)


def rows_of(name, prediction, y, noise=0.0):
    return of_rows(LIKELIHOODS[name], prediction, y, noise)


def test_of_classes():
    found = metrics(rows_of("classification", P, Y))
    confidence, right = P.max(1).values, P.argmax(1) == Y
    assert found["NLL"] == pytest.approx(-P[torch.arange(97), Y].log().mean().item())
    assert found["Brier"] == pytest.approx(
        sum((float(P[i, c]) - float(c == Y[i])) ** 2 for i in range(97) for c in range(3)) / 97
    )
    edges = [i / 15 for i in range(16)]
    bins = [(confidence > a) & (confidence <= b) for a, b in pairwise(edges)]
    error = sum(abs(float((confidence - right.double())[b].sum())) for b in bins) / 97
    assert found["ECE"] == pytest.approx(error, abs=1e-6)
    parts = np.array_split(np.argsort(confidence.numpy()), 15)
    error = sum(abs(float((confidence - right.double())[torch.from_numpy(i)].sum())) for i in parts) / 97
    assert found["adaptive ECE"] == pytest.approx(error)


def test_of_soft_labels_and_of_several_labels():
    hard = torch.nn.functional.one_hot(Y, 3).double()
    assert metrics(rows_of("classification", P, hard)) == pytest.approx(
        metrics(rows_of("classification", P, Y))
    )
    found = rows_of("bernoulli", P, hard)
    assert found["confidence"].shape == found["correct"].shape == (3 * 97,)
    assert metrics(found)["Brier"] == pytest.approx(float((P - hard).square().sum(1).mean()))


def test_of_a_reliability_diagram():
    points = reliability(rows_of("classification", P, Y))
    assert sum(share for *_, share in points) == pytest.approx(1)
    right = (P.argmax(1) == Y).double().mean().item()
    assert sum(observed * share for _, observed, share in points) == pytest.approx(right)
    assert sum(predicted * share for predicted, _, share in points) == pytest.approx(
        P.max(1).values.mean().item()
    )


def test_coverage_is_the_level_on_data_of_the_predictive_itself():
    mean, variance = torch.randn(20_000, 2, dtype=F64), 0.1 + torch.rand(20_000, 2, dtype=F64)
    y = mean + (variance + 0.5).sqrt() * torch.randn(20_000, 2, dtype=F64)
    for spread in (variance, torch.diag_embed(variance)):
        rows = rows_of("regression", (mean, spread), y, 0.5)
        found = metrics(rows)
        for level in (0.5, 0.9, 0.95):
            error = math.sqrt(level * (1 - level) / 40_000)
            assert abs(found[f"coverage {level:.0%}"] - level) < 5 * error
        assert found["RMSE"] == pytest.approx((y - mean).square().mean().sqrt().item())
    sigmas = ((y - mean).abs() / (variance + 0.5).sqrt()).flatten()[:50]
    assert rows["level"][:50].numpy() == pytest.approx(1 - 2 * norm.sf(sigmas.numpy()))
    assert all(abs(level - held) < 0.02 for level, held, _ in reliability(rows))
