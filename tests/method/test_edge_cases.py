"""Inputs, models and settings at the edges: each was wrong once, or easily could be."""

import io
from collections import UserDict
from copy import deepcopy

import numpy as np
import pytest
import torch
from helpers import N_TEST, C, D, N, build, fitted, inputs, loader, mlp, targets, train_loader, val_loader
from torch import nn

from laplace_ella import ReverseNystromGGN

# Networks of a few weights on random labels often have their optimum on an edge of the grid;
# test_hyperparameter_search.py tests what is said of it.
pytestmark = pytest.mark.filterwarnings("ignore:The best (prior_precision|temperature), ")


X = inputs(N_TEST, seed=6)


class Scaled(nn.Module):
    """Multiplies by an entry that the whole batch shares."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, batch):
        return self.net(batch["input_ids"]) * batch["scale"].mean()


def test_entries_shared_by_a_batch_stay_with_its_rows():
    x, y, start, batches = inputs(), targets("classification"), 0, []
    for k, size in enumerate((3, 5, 5, 6, 4), start=1):
        part = slice(start, start + size)
        scale = torch.full((7,), float(k), dtype=x.dtype)
        batches.append({"input_ids": x[part], "scale": scale, "labels": y[part]})
        start += size
    assert start == N
    landmarks = {"input_ids": x[:4], "scale": torch.ones(7, dtype=x.dtype)}, torch.tensor([0, 1, 2, 0])
    sampled, streamed = (build(model=Scaled(), curvature_size=n, n_eigenvalues=3) for n in (100, None))
    for la in (sampled, streamed):
        la.fit(batches, landmarks=landmarks)
    torch.testing.assert_close(sampled.H, streamed.H)


class AttributeBatch(UserDict):
    """A mapping whose entries models may take as attributes, as in Hugging Face's."""

    def __getattr__(self, name):
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


class TakesAttributes(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, batch):
        return self.net(batch.input_ids)


def test_mappings_keep_their_type():
    x, y = inputs(), targets("classification")
    la = fitted(model=TakesAttributes(), data=[AttributeBatch(input_ids=x, labels=y)])
    expected = fitted(data=[(x, y)])
    torch.testing.assert_close(la(AttributeBatch(input_ids=X)), expected(X))


class Gated(nn.Module):
    """Has a weight without axes and one without entries."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.gate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.nothing = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))

    def forward(self, x):
        return self.gate * self.net(x)


@pytest.mark.parametrize("backend", [None, ReverseNystromGGN])
def test_weights_without_axes_or_entries(backend):
    la = fitted(model=Gated(), backend=backend)
    phi, _ = la.features(X)
    assert phi.isfinite().all()
    assert la.sample(3).shape == (3, la.n_params)
    gram = sum(
        v.flatten(1) @ v.flatten(1).T if v.ndim > 1 else v[:, None] * v
        for v in la.basis.directions.values()
        if v.numel()
    )
    torch.testing.assert_close(gram, torch.eye(5, dtype=torch.float64))
    la.prior_precision = torch.arange(1.0, la.n_layers + 1)
    assert la(X).isfinite().all()


class Shrinking:
    """Yields less the second time."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        batches, self.batches = self.batches, self.batches[:1]
        return iter(batches)


def test_a_second_pass_over_other_data_is_refused():
    la = fitted(curvature_size=None)
    before = la(X)
    with pytest.raises(ValueError, match=f"read 7 inputs, the first {N}"):
        la.fit(Shrinking(list(train_loader())))
    torch.testing.assert_close(la(X), before)


def test_history_of_added_data_scores_the_whole_posterior():
    la = fitted()
    la.fit(loader(inputs(seed=7), targets("classification", seed=8)), override=False, val_loader=val_loader())
    p = torch.cat([la(x) for x, _ in val_loader()])
    y = torch.cat([y for _, y in val_loader()])
    expected = -p.gather(1, y[:, None]).log().mean().item()
    assert la.fit_history_["val_nll"] == [pytest.approx(expected)]
    assert la.fit_history_["processed_examples"] == [2 * N]


def test_a_restored_estimator_finds_its_gradient_engine_again():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(D, C, batch_first=True, dtype=torch.float64)

        def forward(self, x):
            return self.layer(x[:, None])[0][:, 0]

    torch.manual_seed(0)
    model = Recurrent()
    la, other = (build(model=model, backend=ReverseNystromGGN) for _ in range(2))
    with pytest.warns(UserWarning, match="one by one"):
        la.fit(train_loader())
    other.load_state_dict(la.state_dict())
    with pytest.warns(UserWarning, match="one by one"):
        predicted = other(X)
    torch.testing.assert_close(predicted, la(X))


@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
def test_wide_posteriors_of_half_precision_models(link):
    la = fitted(model=mlp(dtype=torch.float16), data=train_loader(dtype=torch.float16), temperature=1e6)
    la.prior_precision = 1e-4
    probs = la(X.half(), link_approx=link)
    assert probs.dtype == torch.float16
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(X), dtype=torch.float16), atol=5e-3, rtol=0)


class Exponential(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x).mul(40).exp()


def test_settings_whose_samples_overflow_are_skipped():
    la = fitted(model=Exponential(), temperature=1.0)
    with pytest.warns(UserWarning, match="settings were skipped"):
        la.optimize_prior_precision(
            "nn", "gridsearch", val_loader=val_loader(), link_approx="mc", n_samples=5, grid_size=7,
            log_prior_prec_min=-8, log_prior_prec_max=12,
        )  # fmt: skip
    assert la.prior_precision > 1e-4


def test_sampled_tuning_is_repeatable_and_leaves_the_global_generator_alone():
    chosen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        la, data = fitted(), list(val_loader())
        after_fit = torch.get_rng_state()
        la.optimize_prior_precision(
            "nn", "gridsearch", val_loader=data, link_approx="mc", n_samples=5, grid_size=9
        )
        assert torch.equal(torch.get_rng_state(), after_fit)
        chosen.append(float(la.prior_precision))
    assert chosen[0] == chosen[1]


def test_checkpoints_of_numpy_sizes_load():
    la = fitted(n_eigenvalues=np.int64(3), seed=np.int32(4))
    buffer = io.BytesIO()
    torch.save(la.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["n_eigenvalues"] == 3


def test_a_model_that_changed_after_the_fit_is_not_saved():
    model = mlp()
    la = fitted(model=model)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(ValueError, match="changed since the fit"):
        la.state_dict()


class Stores(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, C, dtype=torch.float64)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.hidden = self.layer(x)
        return self.hidden


def test_what_a_forward_pass_stores_is_no_tensor_of_ours():
    model = Stores()
    la = fitted(model=model)
    la(X)
    assert not hasattr(model, "hidden")
    assert model.calls > 0
    deepcopy(model)
    kept = model(X).detach()
    model.hidden = kept
    la(X)
    assert model.hidden is kept


def test_a_landmark_coordinate_that_does_not_exist_is_found_at_the_first_batch():
    read = []
    batches = (read.append(batch) or batch for batch in train_loader())
    with pytest.raises(ValueError, match=r"0\.\.2"):
        build().fit(batches, landmarks=(inputs(2), torch.tensor([0, C])))
    assert len(read) == 1


@pytest.mark.parametrize(("name", "value"), [("prior_precision", 1e39), ("prior_precision", 1e-50)])
def test_numbers_that_float32_cannot_hold(name, value):
    la = fitted(model=mlp(dtype=torch.float32), data=train_loader(dtype=torch.float32))
    with pytest.raises(ValueError, match=name):
        setattr(la, name, value)
    assert la.prior_precision == 1


def test_other_trainable_weights_than_at_construction_are_refused():
    model = mlp()
    la = build(model=model)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="require grad are not those"):
        la.fit(train_loader())


def test_a_prior_changed_in_place_by_the_user_changes_nothing():
    prior = torch.tensor([2.0], dtype=torch.float64)
    la = fitted(prior_precision=prior)
    prior.fill_(100)
    assert la.prior_precision == 2


def test_empty_batches():
    la = fitted("regression")
    mean, covariance = la(X[:0])
    assert mean.shape == (0, C)
    assert covariance.shape == (0, C, C)
    assert la.functional_samples(X[:0], n_samples=2).shape == (2, 0, C)


def test_monte_carlo_in_too_many_dimensions_names_the_limit():
    from laplace_ella.posterior.links import quasi_normal

    with pytest.raises(ValueError, match="at most 21201 dimensions"):
        quasi_normal(3, 30000, 0)


def test_a_variance_of_one_sample_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        fitted("regression")(X, "nn", link_approx="mc", n_samples=1)
