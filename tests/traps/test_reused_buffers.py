"""Loaders that fill the same buffers again for every batch, as prefetchers to pinned memory do."""

from __future__ import annotations

import pytest
import torch
from helpers import C, D, build, inputs, targets, train_loader
from torch import nn

from laplace_ella.posterior.gaussian import Linearised
from laplace_ella.posterior.likelihoods import LIKELIHOODS
from laplace_ella.tuning.scoring import Block, ValidationData
from laplace_ella.tuning.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:(Only 28|The best (prior_precision|temperature))")

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
            yield self.batch(self.x, self.y)

    def batch(self, x, y):
        return {"x": {"deep": [x]}, "labels": y} if self.as_mapping else (x, y)

    def fresh(self):
        return [self.batch(x, y) for x, y in self.batches]


def loaders(likelihood, as_mapping=False):
    x, y = inputs(4 * LENGTH, seed=3), targets(likelihood, 4 * LENGTH, seed=4)
    val = Reusing(list(zip(x.split(LENGTH), y.split(LENGTH))), as_mapping)
    return Reusing(list(train_loader(likelihood)), as_mapping), val


class Deep(nn.Linear):
    def forward(self, batch):
        return super().forward(batch if isinstance(batch, torch.Tensor) else batch["x"]["deep"][0])


def early_stopping(la, train, val):
    la.fit(train, val_loader=val)
    return la.fit_history_["val_nll"]


def grid_search(la, train, val, *args, **options):
    la.optimize_prior_precision(*args, method="gridsearch", val_loader=val, grid_size=5, **options)
    return la.temperature, float(la.prior_precision)


def of_sampled_weights(la, train, val):
    return grid_search(la, train, val, "nn", link_approx="mc", n_samples=5)


def joint_search(la, train, val):
    found = la.optimize_hyperparameters(val, ["temperature", "prior_precision"], link_approx="probit")
    return found.score, {k: b.score for k, b in found.baselines.items() if b}


def novelty(la, train, val):
    la.calibrate_novelty(val)
    return la.novelty(inputs(5, seed=9))


JOBS = {
    "classification": [early_stopping, grid_search, of_sampled_weights, joint_search, novelty],
    "regression": [grid_search, joint_search],
}


@pytest.mark.parametrize("as_mapping", [False, True])
@pytest.mark.parametrize(("likelihood", "job"), [(k, job) for k, jobs in JOBS.items() for job in jobs])
def test_each_batch_is_seen_as_it_was(likelihood, job, as_mapping):
    train, val = loaders(likelihood, as_mapping)
    model, results = Deep(D, C, dtype=torch.float64), []
    for data in ((train, val), (train.fresh(), val.fresh())):
        la = build(likelihood, model, temperature=None, n_eigenvalues=3)
        la.fit(data[0])
        results.append((la.H, job(la, *data)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=0)


def test_what_is_kept_of_a_batch_is_a_copy():
    f, y = torch.ones(3, C), torch.ones(3, dtype=torch.long)
    data = ValidationData(LIKELIHOODS["classification"], Store(10**6))
    data.append(Block(Linearised(f, torch.ones(3, C, 2)), y, torch.arange(3)))
    f.zero_()
    y.zero_()
    (block,) = data
    assert block.linearised.f.eq(1).all()
    assert block.targets.eq(1).all()
