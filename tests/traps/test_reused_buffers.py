"""Loaders that fill the same buffers again for every batch, as prefetchers to pinned memory do."""

from __future__ import annotations

import pytest
import torch
from helpers import C, D, build, fitted, inputs, targets, train_loader
from torch import nn
from torch.nn import functional as F

from laplace_ella.posterior.gaussian import Linearised
from laplace_ella.posterior.likelihoods import CATEGORICAL
from laplace_ella.tuning.scoring import Block, ValidationData
from laplace_ella.tuning.store import Store

pytestmark = [
    pytest.mark.filterwarnings("ignore:Only 28 validation inputs"),
    pytest.mark.filterwarnings("ignore:The best (prior_precision|temperature)"),
]

LENGTH = 7


class Reusing:
    """Yields batches in one buffer for inputs and one for targets, of which the last batch remains."""

    def __init__(self, batches, as_mapping=False):
        self.batches, self.as_mapping = [b for b in batches if len(b[0]) == LENGTH], as_mapping
        self.x, self.y = (torch.empty_like(t) for t in self.batches[0])

    def __iter__(self):
        for x, y in self.batches:
            self.x.copy_(x)
            self.y.copy_(y)
            yield {"x": {"deep": [self.x]}, "labels": self.y} if self.as_mapping else (self.x, self.y)

    def fresh(self):
        if self.as_mapping:
            return [{"x": {"deep": [x]}, "labels": y} for x, y in self.batches]
        return self.batches


def loaders(likelihood, as_mapping=False):
    x, y = inputs(4 * LENGTH, seed=3), targets(likelihood, 4 * LENGTH, seed=4)
    val = Reusing(list(zip(x.split(LENGTH), y.split(LENGTH))), as_mapping)
    return Reusing(list(train_loader(likelihood)), as_mapping), val


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(D, C, dtype=torch.float64))

    def forward(self, batch):
        return self.net(batch["x"]["deep"][0])


@pytest.mark.parametrize("as_mapping", [False, True])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_fit_and_every_search_see_each_batch_as_it_was(likelihood, as_mapping):
    train, val = loaders(likelihood, as_mapping)
    model = Deep() if as_mapping else None
    results = []
    for reused in (True, False):
        la = build(likelihood, model, temperature=None, n_eigenvalues=3)
        la.fit(train if reused else train.fresh())
        data = val if reused else val.fresh()
        la.optimize_prior_precision(method="gridsearch", val_loader=data, grid_size=7)
        tuned = la.temperature, float(la.prior_precision)
        scores = la.optimize_hyperparameters(data, ["temperature", "prior_precision"], link_approx="probit")
        results.append((la.H, tuned, scores.score, {k: b.score for k, b in scores.baselines.items() if b}))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]


def test_the_predictive_of_sampled_weights_is_tuned_on_each_batch_as_it_was():
    train, val = loaders("classification")
    tuned = []
    for data in (val, val.fresh()):
        la = fitted(data=train, temperature=1.0)
        la.optimize_prior_precision(
            "nn", "gridsearch", val_loader=data, link_approx="mc", n_samples=5, grid_size=5
        )
        tuned.append(float(la.prior_precision))
    assert tuned[0] == tuned[1]


def test_early_stopping_scores_each_batch_as_it_was():
    train, val = loaders("classification")
    histories = []
    for data in (val, val.fresh()):
        la = build(temperature=None)
        la.fit(train, val_loader=data)
        histories.append(la.fit_history_["val_nll"])
    assert histories[0] == histories[1]


def test_a_search_finds_the_temperature_of_the_data_and_not_of_the_last_batch():
    train, val = loaders("classification")
    la = build(temperature=None)
    la.fit(train)
    la.optimize_prior_precision(method="gridsearch", val_loader=val, link_approx="probit")
    nll = [F.nll_loss(la(x).log(), y, reduction="sum") for x, y in val.batches]
    result = la.optimize_hyperparameters(
        val, {"temperature": [la.temperature]}, link_approx="probit", apply=False
    )
    assert result.score == pytest.approx(float(sum(nll)) / (4 * LENGTH), rel=1e-9)


def test_novelty_is_calibrated_on_each_batch_as_it_was():
    train, val = loaders("classification")
    scores = []
    for data in (val, val.fresh()):
        la = fitted(data=train)
        la.calibrate_novelty(data)
        scores.append(la.novelty(inputs(5, seed=9)))
    assert torch.equal(*scores)


def test_what_is_kept_of_a_batch_is_a_copy():
    f, y = torch.ones(3, C), torch.ones(3, dtype=torch.long)
    data = ValidationData(CATEGORICAL, Store(10**6))
    data.append(3, Block(Linearised(f, torch.ones(3, C, 2)), y, None))
    f.zero_()
    y.zero_()
    (block,) = data
    assert block.linearised.f.eq(1).all()
    assert block.targets.eq(1).all()
