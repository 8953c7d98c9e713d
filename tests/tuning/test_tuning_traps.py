"""What went wrong once in tuning, residual and novelty; each has a test of its own."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
import torchmetrics
from conftest import assert_close
from helpers import (
    C,
    D,
    DictModel,
    M,
    N,
    build,
    dict_batches,
    fitted,
    inputs,
    loader,
    mlp,
    targets,
    train_loader,
    val_loader,
)
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_ella import ELLALaplace
from laplace_ella.data.landmarks import BottomK
from laplace_ella.data.pooling import dealt
from laplace_ella.fitting.accumulation import parts_of_sample
from laplace_ella.parallel.ranks import ALONE
from laplace_ella.tuning.search import Search, Setting, decades, joint_search

F64 = torch.float64
X = inputs(7, seed=7)
SEARCH = ["temperature", "logit_scale", "residual_scale"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def free(**options):
    return fitted(**{"temperature": None, **options})


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("residual", ["none", "isotropic", "exact"])
def test_searches_work_where_no_gradient_is_recorded(context, residual):
    search = SEARCH if residual != "none" else SEARCH[:2]
    expected = free(residual=residual).optimize_hyperparameters(val_loader(), search).score
    la = free(residual=residual)
    with context():
        found = la.optimize_hyperparameters(val_loader(), [*search, "n_eigenvalues"])
    assert found.score <= expected + 1e-6
    assert la(X).isfinite().all()


def test_tangents_made_in_inference_mode_can_meet_a_graph():
    la = fitted(residual="isotropic", enable_backprop=True)
    with torch.inference_mode():
        la(X)
    x = X.clone().requires_grad_()
    la(x).square().sum().backward()
    assert x.grad.isfinite().all()


def test_equal_eigenvalues_of_the_residual_do_not_stop_a_search():
    model = nn.Linear(D, C, dtype=F64)  # J J^T is a multiple of the identity
    la = free(model=model, residual="exact", n_eigenvalues=2)
    result = la.optimize_hyperparameters(val_loader(), ["residual_scale", "prior_precision"])
    assert result.score == min(s for _, s in result.table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_the_exact_residual_has_no_negative_variance(likelihood, dtype):
    data = train_loader(likelihood, dtype=torch.float32)
    options = {"residual": "exact", "n_eigenvalues": None, "prior_precision": 1e-5, "subsample_size": N * C}
    la = fitted(likelihood, mlp(dtype=dtype), data, **options)
    x = inputs(dtype=torch.float32)
    if likelihood == "regression":
        _, covariance = la(x)
        assert (covariance.diagonal(dim1=1, dim2=2) >= 0).all()
        _, joint = la(x[:5], joint=True)
        assert (joint.diagonal() >= 0).all()
    else:
        assert la(x).isfinite().all()
    assert la.functional_samples(x, diagonal_output=True, n_samples=3).isfinite().all()


@pytest.mark.parametrize("method", ["residual_share", "functional_samples", "approximation_error", "plan"])
def test_threads_may_ask_for_weights_while_others_predict(method):
    model = mlp()
    estimators = [
        fitted(model=model, residual="exact" if method == "functional_samples" else "isotropic")
        for _ in range(2)
    ]
    failures: list[BaseException] = []

    def predict() -> None:
        for _ in range(40):
            estimators[0](X)

    def ask() -> None:
        try:
            for _ in range(10):
                estimators[1]._cache.clear()
                if method == "plan":
                    estimators[1].plan(train_loader(), verbose=False)
                else:
                    getattr(estimators[1], method)(X)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=f) for f in (predict, ask, ask)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_a_users_loss_gets_the_same_kind_of_prediction_from_every_method():
    shapes = set()

    def loss(mean, covariance, y):
        shapes.add(covariance.shape)
        noisy = covariance + 0.1 * torch.eye(C, dtype=covariance.dtype)
        return -torch.distributions.MultivariateNormal(mean, noisy).log_prob(y).mean()

    la = fitted("regression", temperature=None)
    result = la.optimize_hyperparameters(val_loader("regression"), ["temperature"], loss=loss)
    assert shapes == {(17, C, C)}
    assert result.baselines["MAP"].standard_error is None


def test_a_state_with_a_residual_loads_where_the_prior_was_a_vector():
    state = fitted(residual="isotropic").state_dict()
    la = fitted(prior_precision=torch.ones(sum(p.numel() for p in mlp().parameters())))
    la.load_state_dict(state)
    assert la.residual == "isotropic"
    assert_close(la(X), fitted(residual="isotropic")(X))


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
    assert_close(la.H, fitted(curvature="mc").H)


def test_extreme_logits_can_be_scaled_down():
    model = mlp()
    with torch.no_grad():
        model[-1].weight.mul_(60)
    result = free(model=model).optimize_hyperparameters(val_loader())
    assert result.baselines["temperature scaling"].parameters["logit_scale"] < 0.25
    f = torch.cat([model(x) for x, _ in val_loader()]).detach()
    y = torch.cat([y for _, y in val_loader()])
    lowest = min(nn.functional.cross_entropy(s * f, y).item() for s in torch.logspace(-2, 1, 301))
    assert result.baselines["temperature scaling"].score <= lowest + 1e-6


def test_an_optimum_on_an_edge_is_noted():
    result = free().optimize_hyperparameters(val_loader(), {"logit_scale": [5.0, 10.0]})
    assert any("edge" in note and "below" in note for note in result.notes)


def test_constant_noise_is_tuned_whatever_is_searched():
    la = fitted("regression", temperature=None, sigma_noise=0.1)
    result = la.optimize_hyperparameters(val_loader("regression"), ["temperature"])
    assert result.baselines["constant variance"].score < result.baselines["MAP"].score - 1
    assert result.baselines["constant variance"].parameters["sigma_noise"] > 0.3


def test_early_snapshots_are_random_where_shapes_differ():
    sample = BottomK(100)
    positions = torch.arange(100)
    keys = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    sample.offer(positions, keys, None, lambda i: torch.zeros(1, 3 if i < 50 else 7))
    parts = parts_of_sample(dealt(sample, ALONE), 10, None)
    lengths = [part.x.shape[1] for part in parts if part.x is not None for _ in range(len(part.x))]
    assert {3, 7} <= set(lengths[:20])
    assert len(lengths) == 100


def calibrated(**options):
    la = free(**options)
    la.calibrate_novelty(val_loader())
    return la


CHANGES: dict[str, Callable] = {
    "temperature": lambda la: setattr(la, "temperature", 3.0),
    "logit scale": lambda la: setattr(la, "logit_scale", 0.5),
    "prior": lambda la: setattr(la, "prior_precision", 7.0),
    "residual": lambda la: setattr(la, "residual", "isotropic"),
    "seed": lambda la: setattr(la, "seed", 5),
    "rank": lambda la: la.optimize_hyperparameters(val_loader(), {"n_eigenvalues": [2]}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_calibration_made_under_another_setting_is_refused(change):
    la = calibrated()
    la.novelty(X)
    CHANGES[change](la)
    with pytest.raises(ValueError, match=r"calibrate_novelty\(\)"):
        la.novelty(X)
    la.calibrate_novelty(val_loader())
    assert la.novelty(X).isfinite().all()


def test_tangents_follow_the_seed():
    la, other = fitted(residual="isotropic", seed=3), fitted(residual="isotropic", seed=3)
    before = la(X)
    other.seed = la.seed = 4
    assert not torch.equal(la(X), before)
    assert torch.equal(la(X), other(X))


def test_parts_of_a_batch_count_the_blocks_of_the_exact_residual():
    la = fitted(residual="exact", memory_budget=8000)
    sizes = [len(x) for x in la.backend.bounded(inputs(), la._width())]
    assert sum(sizes) == N
    assert max(sizes) * 8 * C * (la.basis.rank + C) <= 2000


def test_early_stopping_leaves_the_residual_alone():
    la = build(temperature=None, residual="isotropic", residual_scale=0.3, prior_precision=2.0)
    la.fit(train_loader(), val_loader=val_loader())
    assert la.residual_variance == pytest.approx(0.15)


def test_the_history_is_in_the_checkpoint():
    la = build(temperature=None)
    la.fit(train_loader(), val_loader=val_loader())
    other = fitted()
    other.load_state_dict(la.state_dict())
    assert other.fit_history_ == la.fit_history_


class Shifted(DictModel):
    """Has an entry before the batch that all rows share."""

    def forward(self, batch):
        out = super().forward(batch)
        out.logits = out.logits + batch["shift"][: out.logits.shape[1]]
        return out


@pytest.mark.parametrize("residual", ["isotropic", "exact"])
def test_mappings_whose_first_tensor_is_shared(residual):
    data = [{"shift": torch.ones(4, dtype=F64), **batch} for batch in dict_batches()]
    la = fitted(model=Shifted(), data=data, residual=residual)
    assert la(data[0]).shape == (7, C)
    assert la.residual_share(data[0]).shape == (7,)


def test_targets_of_two_kinds_may_meet_in_validation_data():
    y = targets("classification", 17, seed=4)
    x = inputs(17, seed=3)
    mixed = [(x[:9], y[:9]), (x[9:], nn.functional.one_hot(y[9:], C).double())]
    scores = [free().optimize_hyperparameters(data, ["temperature"]).score for data in (mixed, [(x, y)])]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)


def test_warnings_name_the_users_line():
    calls = iter(range(10**6))

    def broken_now_and_then(p, y):
        return float("nan") if next(calls) % 7 == 3 else -p.gather(1, y[:, None]).log().mean()

    la, state = free(), fitted().state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        la.optimize_prior_precision(
            method="gridsearch", val_loader=val_loader(), loss=broken_now_and_then, grid_size=11
        )
        la.optimize_hyperparameters(val_loader(), loss=broken_now_and_then)
        build(enable_backprop=True).load_state_dict(state)
    assert len(caught) >= 3
    assert {w.filename for w in caught} == {__file__}


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_a_flat_loss_leaves_the_setting_alone(pred_type):
    la = free(prior_precision=0.7)
    before = la(X)
    with pytest.warns(UserWarning, match="same for every setting"):
        la.optimize_prior_precision(
            pred_type,
            "gridsearch",
            val_loader=val_loader(),
            loss=lambda p, y: 0.5,
            link_approx="mc",
            n_samples=3,
            grid_size=3,
        )
    assert (float(la.prior_precision), la.temperature) == (0.7, 1.0)
    assert torch.equal(la(X), before)


class HigherIsBetter(torchmetrics.classification.MulticlassAccuracy):
    """Accuracy."""


@pytest.mark.parametrize("tune", ["optimize_prior_precision", "optimize_hyperparameters"])
def test_losses_that_would_mislead_are_named(tune):
    la = free()
    before = la(X)

    def call(loss):
        kwargs = {"method": "gridsearch", "grid_size": 3} if tune == "optimize_prior_precision" else {}
        getattr(la, tune)(val_loader=val_loader(), loss=loss, **kwargs)

    with pytest.raises(ValueError, match="better when higher"):
        call(HigherIsBetter(num_classes=C))
    with pytest.raises(ValueError, match="instance"):
        call(nn.MSELoss)
    with pytest.raises(ValueError, match="metric"):
        call("nll")
    assert torch.equal(la(X), before)
    with pytest.warns(UserWarning, match="receives probabilities") as caught:
        call(nn.CrossEntropyLoss())
    assert {w.filename for w in caught} == {__file__}


def test_a_parameter_that_the_loss_ignores_keeps_its_value():
    la = fitted("regression", temperature=None, sigma_noise=0.7)
    result = la.optimize_hyperparameters(
        val_loader("regression"), loss=lambda mean, cov, y: (mean - y).square().mean()
    )
    assert float(la.sigma_noise) == 0.7
    assert la.temperature == 1
    assert sum("does not depend" in note for note in result.notes) == 2


def test_a_rank_that_does_not_matter_is_not_cut_and_a_fit_restores_it():
    la = free(prior_precision=1e12)  # no variance, whatever the rank
    la.optimize_hyperparameters(val_loader(), ["n_eigenvalues"])
    assert la.basis.rank == 5
    la.optimize_hyperparameters(val_loader(), {"n_eigenvalues": [2]})
    assert la.basis.rank == 2
    with pytest.raises(ValueError, match="Fit again"):
        la.optimize_hyperparameters(val_loader(), {"n_eigenvalues": [5]})
    la.fit(train_loader())
    assert la.basis.rank == 5


def test_a_residual_is_searched_by_default():
    result = free(residual="isotropic").optimize_hyperparameters(val_loader())
    assert result.searched == ("temperature", "logit_scale", "residual_scale")
    assert "held fixed: prior_precision" in result.summary()


@pytest.mark.parametrize(("seed", "prior"), [(0, 1e-3), (1, 1e-3), (3, 1e-3), (3, 1e-6)])
def test_a_search_of_many_parameters_is_no_worse_than_scaled_logits(seed, prior):
    """Started from the current widths it ended in an optimum of large logits in these cases."""
    model = mlp(seed=seed)
    with torch.no_grad():
        model[-1].weight.mul_(5)
        x = inputs(300, seed=3)
        labels = torch.multinomial((model(x) / 3).softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    la = free(model=model, residual="isotropic", seed=seed, prior_precision=prior)
    result = la.optimize_hyperparameters(loader(x, labels[:, 0], 100), SEARCH, n_samples=32)
    assert result.score <= result.baselines["temperature scaling"].score + 1e-4


def test_a_search_of_three_parameters_is_no_worse_than_one_of_two():
    """From the smallest width alone it missed what needs a temperature and less noise at once, at a usual prior."""

    def loss(setting):
        if setting.prior_precision >= 100:  # too narrow to be of use
            return 5 + abs(math.log10(setting.sigma_noise))
        return 10 * abs(math.log10(setting.temperature) - 2) + 10 * abs(math.log10(setting.sigma_noise) + 1)

    grids = {
        "prior_precision": decades(-4, 4)[::-1],
        "temperature": decades(-3, 6),
        "sigma_noise": decades(-4, 2),
    }
    start = Setting(1.0, 1.0, 1.0, 1.0, 20, 100, 1.0)
    two, three = Search(loss), Search(loss)
    joint_search(two, start, {k: grids[k] for k in ("temperature", "sigma_noise")}, lambda x, _: x)
    joint_search(three, start, grids, lambda x, _: x)
    assert two.table[two.best] == 0
    assert three.table[three.best] == 0


def test_what_is_better_is_called_better():
    la = free(logit_scale=30.0)
    model_labels = [(x, la.model(x).argmin(-1)) for x, _ in val_loader()]
    result = la.optimize_hyperparameters(model_labels, {"temperature": [1e-3]})
    assert any("are better" in note and "MAP" in note for note in result.notes)
    assert not any("as good" in note and "MAP" in note for note in result.notes)


def test_a_string_is_no_list_of_names():
    with pytest.raises(ValueError, match=r"\['temperature'\]"):
        free().optimize_hyperparameters(val_loader(), "temperature")
    with pytest.raises(ValueError, match="values of temperature"):
        free().optimize_hyperparameters(val_loader(), {"temperature": 5})


def test_the_representation_names_what_was_tuned():
    la = free(residual="isotropic", curvature="mc", logit_scale=0.5)
    for part in ("logit_scale=0.5", "residual='isotropic'", "curvature='mc'", "n=23"):
        assert part in repr(la)


def test_the_plan_knows_sampled_labels():
    plans = [build(curvature=c).plan(train_loader(), verbose=False) for c in ("exact", "mc")]
    costs = [plan.stages[-1].forwards for plan in plans]
    assert costs[1] == 5 * N < costs[0]


def test_the_share_is_the_same_under_autocast():
    la = fitted(model=mlp(dtype=torch.float32), data=train_loader(dtype=torch.float32))
    x = X.float()
    seen = la._seen(x)
    expected = la.residual_share(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = la._overlap(seen)
        from laplace_ella.posterior.residual import residual_share

        assert_close(residual_share(seen, inside).float(), expected)


def test_the_basis_is_that_of_its_landmarks_whatever_the_history():
    """A rank that was cut, a fit again: the share asked for decides anew."""
    la = fitted(n_eigenvalues=0.9, temperature=None)
    rank = la.basis.rank
    assert la.basis.retained >= 0.9
    assert la.basis.spectrum.shape == (M,)
    la.fit(loader(inputs(), targets("classification")))
    assert la.basis.rank == rank


def test_noise_is_searched_finely_enough_that_no_wide_variance_stands_in_for_it():
    """With half-decade steps of sigma, a huge temperature with hardly any noise won the grid, and was refined."""
    x, y = (torch.tensor(a).float() for a in load_diabetes(return_X_y=True))
    x, y = x / x.std(0), ((y - y.mean()) / y.std())[:, None]
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    train, val = (TensorDataset(x[i], y[i]) for i in (order[:200], order[200:]))
    model = nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(train.tensors[0]), train.tensors[1]).backward()
        optimizer.step()
    la = ELLALaplace(model, "regression", curvature_size=None)
    la.fit(DataLoader(train, batch_size=50))
    val = DataLoader(val, batch_size=50)
    found = la.optimize_hyperparameters(val, apply=False)
    fine = {"temperature": [1e-3, 1.0, 1e3, 1e6], "sigma_noise": torch.logspace(-1, 0.5, 60).tolist()}
    assert found.score <= la.optimize_hyperparameters(val, fine, apply=False).score + 1e-3
