"""Inputs and models at the edges: each was wrong once, or easily could be."""

import pytest
import torch
from helpers import N_TEST, C, D, N, build, fitted, inputs, targets, train_loader
from models import Applied
from torch import nn

from laplace_ella import ReverseNystromGGN

F64 = torch.float64
X = inputs(N_TEST, seed=6)


def test_entries_shared_by_a_batch_stay_with_its_rows():
    batches, sizes = [], (3, 5, 5, 6, 4)
    for k, (x, y) in enumerate(zip(inputs().split(sizes), targets("classification").split(sizes))):
        batches.append({"input_ids": x, "scale": torch.full((7,), k + 1.0, dtype=F64), "labels": y})
    landmarks = {"input_ids": inputs()[:4], "scale": torch.ones(7, dtype=F64)}, torch.tensor([0, 1, 2, 0])
    model = Applied(lambda net, batch: net(batch["input_ids"]) * batch["scale"].mean())
    sampled, streamed = (build(model=model, curvature_size=n, n_eigenvalues=3) for n in (100, None))
    for la in (sampled, streamed):
        la.fit(batches, landmarks=landmarks)
    torch.testing.assert_close(sampled.H, streamed.H)


def test_a_restored_estimator_finds_its_gradient_engine_again():
    torch.manual_seed(0)
    model = Applied(lambda net, x: net(x[:, None])[0][:, 0], nn.GRU(D, C, batch_first=True, dtype=F64))
    la, other = (build(model=model, backend=ReverseNystromGGN) for _ in range(2))
    with pytest.warns(UserWarning, match="one by one"):
        la.fit(train_loader())
    other.load_state_dict(la.state_dict())
    with pytest.warns(UserWarning, match="one by one"):
        predicted = other(X)
    torch.testing.assert_close(predicted, la(X))


@pytest.mark.filterwarnings("ignore:curvature=.mc.")
def test_the_estimator_alone_decides_how_labels_are_sampled():
    la = fitted(curvature="exact")
    state = fitted(curvature="mc").state_dict()
    state["prior_precision"] = torch.full((1,), -1.0, dtype=F64)
    with pytest.raises(ValueError, match="prior_precision"):
        la.load_state_dict(state)
    before = la.H
    la.fit(train_loader())
    assert torch.equal(la.H, before)
    la.curvature = "mc"
    la.fit(train_loader())
    torch.testing.assert_close(la.H, fitted(curvature="mc").H)
    plans = [build(curvature=c).plan(train_loader(), verbose=False) for c in ("exact", "mc")]
    exact, sampled = (plan.stages[-1].forwards for plan in plans)
    assert sampled == 5 * N < exact
