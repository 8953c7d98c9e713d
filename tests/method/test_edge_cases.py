"""Inputs and models at the edges: each was wrong once, or easily could be."""

from collections import UserDict
from copy import deepcopy

import pytest
import torch
from helpers import N_TEST, C, D, N, build, fitted, inputs, loader, mlp, targets, train_loader, val_loader
from models import Applied
from torch import nn

from laplace_ella import ReverseNystromGGN

F64 = torch.float64
X = inputs(N_TEST, seed=6)


def test_entries_shared_by_a_batch_stay_with_its_rows():
    batches = []
    for k, (x, y) in enumerate(
        zip(inputs().split((3, 5, 5, 6, 4)), targets("classification").split((3, 5, 5, 6, 4)))
    ):
        batches.append({"input_ids": x, "scale": torch.full((7,), k + 1.0, dtype=F64), "labels": y})
    landmarks = {"input_ids": inputs()[:4], "scale": torch.ones(7, dtype=F64)}, torch.tensor([0, 1, 2, 0])
    model = Applied(lambda net, batch: net(batch["input_ids"]) * batch["scale"].mean())
    sampled, streamed = (build(model=model, curvature_size=n, n_eigenvalues=3) for n in (100, None))
    for la in (sampled, streamed):
        la.fit(batches, landmarks=landmarks)
    torch.testing.assert_close(sampled.H, streamed.H)


class AttributeBatch(UserDict):
    """A mapping whose entries models may take as attributes, as in Hugging Face's."""

    def __getattr__(self, name):
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


def test_mappings_keep_their_type():
    x, y = inputs(), targets("classification")
    model = Applied(lambda net, batch: net(batch.input_ids))
    la = fitted(model=model, data=[AttributeBatch(input_ids=x, labels=y)])
    torch.testing.assert_close(la(AttributeBatch(input_ids=X)), fitted(data=[(x, y)])(X))


@pytest.mark.parametrize("backend", [None, ReverseNystromGGN])
def test_weights_without_axes_or_entries(backend):
    model = Applied(lambda net, x: model.gate * net(x))
    model.gate = nn.Parameter(torch.tensor(0.7, dtype=F64))
    model.nothing = nn.Parameter(torch.zeros(0, 3, dtype=F64))
    la = fitted(model=model, backend=backend)
    assert la.features(X)[0].isfinite().all()
    assert la.sample(3).shape == (3, la.n_params)
    V = torch.cat([v.reshape(len(v), -1) for v in la.basis.directions.values()], 1)
    torch.testing.assert_close(V @ V.T, torch.eye(5, dtype=F64))
    la.prior_precision = torch.arange(1.0, la.n_layers + 1)
    assert la(X).isfinite().all()


def test_history_of_added_data_scores_the_whole_posterior():
    la = fitted()
    la.fit(loader(inputs(seed=7), targets("classification", seed=8)), override=False, val_loader=val_loader())
    x, y = (torch.cat(part) for part in zip(*val_loader()))
    expected = -la(x).gather(1, y[:, None]).log().mean().item()
    assert la.fit_history_ == {"processed_examples": [2 * N], "val_nll": [pytest.approx(expected)]}
    other = fitted()
    other.load_state_dict(la.state_dict())
    assert other.fit_history_ == la.fit_history_


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


def test_what_a_forward_pass_stores_is_no_tensor_of_ours():
    def storing(net, x):
        model.hidden = net(x)
        return model.hidden

    model = Applied(storing, mlp())
    la = fitted(model=model)
    la(X)
    assert not hasattr(model, "hidden")
    deepcopy(model)
    kept = model(X).detach()
    model.hidden = kept
    la(X)
    assert model.hidden is kept


def test_the_basis_is_that_of_its_landmarks_whatever_the_history():
    """A rank that was cut, a fit again: the share asked for decides anew."""
    la = fitted(n_eigenvalues=0.9, temperature=None)
    rank = la.basis.rank
    assert la.basis.retained >= 0.9
    assert la.basis.spectrum.shape == (13,)
    la.fit(train_loader())
    assert la.basis.rank == rank


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
