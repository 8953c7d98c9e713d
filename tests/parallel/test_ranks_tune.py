"""Tuning, early stopping and novelty on the ranks of a process group, against one process."""

from dataclasses import astuple

import numpy as np
import pytest
import torch.distributed as dist
from conftest import K
from laplace.utils.enums import Likelihood, LinkApprox
from processes import outcome_of
from ranked import (
    GRIDS,
    LAYERWISE,
    N_VAL,
    Brier,
    Case,
    assert_agree,
    assert_refused,
    batches,
    check,
    grid_case,
    loader,
    mine,
    miscalibration,
    posterior_of,
    report,
    run,
    tune,
)

from laplace_ella import ELLALaplace
from laplace_ella.posterior.gaussian import NotPositiveDefiniteError

pytest_plugins = ("groups",)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("temperature", [None, 1.3])
@pytest.mark.parametrize(
    ("group", "likelihood", "size"), [(2, "regression", 13), (3, "classification", 2000)], indirect=["group"]
)
def test_early_stopping(group, likelihood, size, temperature):
    options = {"temperature": temperature, "curvature_size": size}
    case = Case(likelihood, "confident", options, {"val_loader": True, "val_steps": 1}, batch=3)
    expected = run(case)
    assert len(set(expected["history"]["val_nll"])) == len(expected["n"]) > 4
    check(group(run, case), expected)


def run_grid(name, sizes=None, part=None):
    """Search on the validation data, divided in some way; with ``part``, on those of a rank of two alone."""
    case = grid_case(name)
    la, (x, y) = case.fitted(), case.validation()
    val = None if sizes is None else batches(mine(x, sizes), mine(y, sizes), 3)
    tune(la, case, GRIDS[name][2], val if part is None else batches(x[part::2], y[part::2], 3))
    return report(la, case.problem.x_test)


@pytest.mark.parametrize("name", GRIDS)
def test_grid_search(two, name):
    expected = run_grid(name)
    of_parts = [run_grid(name, part=part) for part in (0, 1)]
    assert name == "metric of metrics" or any(
        expected[k] != part[k] for k in ("prior_precision", "temperature") for part in of_parts
    )
    check(two(run_grid, name), expected)


@pytest.mark.parametrize("name", ["probit", "callable", "metric of lists", "nn"])
def test_grid_search_on_any_shards(three, name):
    check(three(run_grid, name, (4, 0, 13)), run_grid(name))


SCALES = {"temperature": [0.1, 1.0, 10.0], "residual_scale": [1e-3, 0.1]}
JOINT = {
    "default": ("classification", {}, {}),
    "regression": ("regression", {}, {}),
    "sizes": ("classification", {}, {"search": ["temperature", "n_eigenvalues", "curvature_size"]}),
    "residual": ("classification", {"residual": "isotropic"}, {"search": SCALES}),
    "callable": ("classification", {}, {"search": ["temperature"], "loss": miscalibration}),
}


@pytest.mark.parametrize("name", JOINT)
def test_joint_search(two, name):
    likelihood, options, arguments = JOINT[name]
    case = Case(likelihood, "confident", options={"temperature": None, **options})
    check(two(run_joint, case, arguments), run_joint(case, arguments))


def numbers(setting):
    return [float(v) for v in astuple(setting) if v is not None]


def run_joint(case, arguments):
    la = case.fitted()
    result = la.optimize_hyperparameters(loader(*case.validation(), 3), link_approx="probit", **arguments)
    return {
        **report(la, case.problem.x_test),
        "best": numbers(result.best),
        "score": result.score,
        "table": [[*numbers(setting), score] for setting, score in result.table],
        "methods": {k: None if b is None else b.score for k, b in result.baselines.items()},
        "n_inputs": result.n_inputs,
    }


@pytest.mark.parametrize("residual", ["none", "isotropic"])
def test_novelty(group, residual):
    case = Case(options={"residual": residual})
    check(group(run_novelty, case), run_novelty(case))


def run_novelty(case):
    """Without a residual, by inputs without labels, of which one rank has too few to calibrate by."""
    la, (x, y) = case.fitted(), case.validation()
    sizes = (1, N_VAL - 1, 0)[: dist.get_world_size()] if dist.is_initialized() else (N_VAL,)
    la.calibrate_novelty(mine(x, sizes).split(3) if case.options["residual"] == "none" else loader(x, y, 3))
    error = la.approximation_error(case.problem.x_test, loader(case.problem.x, case.problem.y))
    found = {"captured": error.captured_trace, "covariance": error.covariance_error}
    return {"novelty": la.novelty(case.problem.x_test), **found}


def test_enums_and_numpy_integers(two, tmp_path):
    found = two(run_with_types, str(tmp_path / "fit"))
    expected = run_with_types(str(tmp_path / "alone"))
    assert expected["n_data"] == 11
    check(found, expected)


def run_with_types(path):
    case = Case(options={"curvature_size": np.int64(7), "seed": np.int64(3), "temperature": None})
    p = case.problem
    options = p.options(subsample_size=np.int64(5), n_eigenvalues=K, **case.options)
    la = ELLALaplace(p.model, **{**options, "likelihood": Likelihood.CLASSIFICATION})
    la.fit(loader(p.x, p.y), max_samples=np.int64(11), checkpoint=path, checkpoint_every=np.int64(1))
    options = {"link_approx": LinkApprox.PROBIT, "n_samples": np.int64(7), "grid_size": np.int64(3)}
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(*case.validation()), **options)
    return report(la, p.x_test)


def test_one_rank_can_work_alone(two):
    case = Case(options={"curvature_size": None, "temperature": None}, fit={"val_loader": True})
    found, nothing = two(run_alone_on_rank_0, case)
    assert nothing is None
    assert_agree(found, run_all_steps(case))


def run_alone_on_rank_0(case):
    return None if dist.get_rank() else run_all_steps(case, process_group=None)


def run_all_steps(case, **more):
    p, la = case.problem, case.estimator(**more)
    val = batches(*case.validation(), 3)
    la.fit(batches(p.x, p.y), val_loader=val)
    other = case.estimator(**more)  # without an early stop, after which nothing can be forgotten
    other.fit(batches(p.x, p.y))
    other.fit(batches(*case.data()), override=False)
    other.forget(batches(*case.data()))
    found = {"fitted": report(la, p.x_test), "forgotten": report(other, p.x_test)}
    for loss in (None, miscalibration, Brier):
        tune(la, case, {"loss": loss}, val)
        found[getattr(loss, "__name__", "default")] = posterior_of(la)
    la.optimize_hyperparameters(val, ["temperature"], link_approx="probit")
    la.optimize_prior_precision(n_steps=3)
    la.calibrate_novelty(val)
    return {**found, "tuned": report(la, p.x_test), "novelty": la.novelty(p.x_test)}


def test_evidence_is_that_of_one_rank(two):
    expected = evidence()
    for found in two(evidence):
        assert found[:1] == pytest.approx(expected[:1])
    maximised, _ = two(evidence)
    assert maximised == pytest.approx(expected)


def evidence():
    """Of a fit by all ranks; the first computes it again, and maximises it, alone."""
    la, whole = Case(options={"prior_precision": LAYERWISE}).fitted(shard_directions=True), Case().fitted()
    found = [float(la.log_marginal_likelihood())]
    if not dist.is_initialized() or dist.get_rank() == 0:
        la.prior_precision = LAYERWISE.flip(0)
        found.append(float(la.log_marginal_likelihood()))
        whole.optimize_prior_precision(n_steps=3)
        found.append(float(whole.prior_precision))
    return found


def test_settings_that_fail_on_one_rank_are_skipped_by_all(two):
    outcomes = two(tune_with_failing_settings)
    assert_refused(outcomes, "None of the")
    assert_refused(outcomes, "bad")


def tune_with_failing_settings():
    la = Case(options={"temperature": 50.0}).fitted()

    def loss(p, y):
        raise NotPositiveDefiniteError("bad")

    return outcome_of(lambda: tune(la, Case(), {"loss": loss}))


@pytest.mark.parametrize("name", ["prior_precision", "link_approx", "layerwise prior of a search"])
def test_settings_that_differ_in_tuning_are_refused(two, name):
    assert_refused(two(tune_with_difference, name), "All ranks must have the same")


def tune_with_difference(name):
    rank = dist.get_rank()
    prior = {"prior_precision": 0.01 + rank, "link_approx": 0.6}.get(name, LAYERWISE * (1 + rank))
    case = Case(options={"temperature": None, "prior_precision": prior}, fit={"val_loader": True})
    p = case.problem
    if name.startswith("layerwise"):
        la = Case(options=case.options).fitted()
        return outcome_of(la.optimize_hyperparameters, loader(*case.validation()), ["temperature"])
    link = ("probit", "mc")[rank] if name == "link_approx" else "probit"
    return outcome_of(lambda: case.estimator().fit(loader(p.x, p.y), link_approx=link, **case.arguments()))
