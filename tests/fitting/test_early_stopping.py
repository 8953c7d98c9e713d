"""``fit(val_loader=...)``: the paper's early stopping, which is a temperature and a prior."""

import dataclasses
import math

import oracle
import pytest
import torch
from conftest import C, K, assert_close
from helpers import fit_problem, nll_of_calls
from models import Counting
from searching import over_confident

from laplace_ella.data.hashing import CURVATURE_INPUT, hash_keys

F64 = torch.float64
DELTA = 0.6
N_VAL, VAL_BATCH = 17, 5


def validation(problem, y=None):
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(N_VAL, 2, generator=generator, dtype=F64)
    if y is None and problem.likelihood == "regression":
        y = oracle.outputs(problem.model, x) + torch.randn(N_VAL, C, generator=generator, dtype=F64)
    elif y is None:
        y = torch.randint(C, (N_VAL,), generator=generator)
    return list(zip(x.split(VAL_BATCH), y.split(VAL_BATCH)))


def fit(problem, val=None, *, val_steps=1, link_approx="probit", **options):
    """Without validation data where ``val`` is False."""
    arguments = {"val_loader": validation(problem) if val is None else val, "val_steps": val_steps}
    arguments = {} if val is False else {**arguments, "link_approx": link_approx}
    options = {"temperature": None, "prior_precision": DELTA, "curvature_size": 2000, **options}
    return fit_problem(problem, arguments, **options)


def chosen(la):
    scores = la.fit_history_["val_nll"]
    return int(la.fit_history_["processed_examples"][scores.index(min(scores))])


def naive_scores(la, problem, val, **options):
    """Score G_n + (n/N) delta I, for every snapshot, by calls; on an estimator of its own."""
    other = fit(problem, curvature_size=la.curvature_size)
    scores = {}
    for n, G in la.snapshots:
        other.H = G
        other.temperature = la.n_data / n
        other.prior_precision = DELTA * n / la.n_data
        scores[n] = nll_of_calls(other, val, **options)
    return scores


@pytest.mark.parametrize("curvature_size", [1000, 13])
def test_stopping_after_n_inputs_is_a_temperature_and_a_prior(small_problem, curvature_size):
    """[G_n + (n/N) delta I]; so it is after another fit."""
    p, val = small_problem, validation(small_problem)
    la, n_data = fit(p, val, curvature_size=curvature_size), len(p.x)
    n = chosen(la)
    G_n = n / n_data * dict(la.snapshots)[n] / p.sigma_noise**2
    expected = G_n + n / n_data * DELTA * torch.eye(K, dtype=F64)
    scores = la.fit_history_["val_nll"]
    for again in (False, True):
        if again:
            la.fit(p.loader(), landmarks=p.landmarks, val_loader=val, val_steps=1)
        assert_close(la.posterior_precision, expected)
        assert_close(la.posterior_covariance, torch.linalg.inv(expected), 1e-8)
        assert la.n_data == n_data
        assert la.temperature == pytest.approx(n_data / n)
        assert_close(la.prior_precision, torch.tensor([DELTA * n / n_data], dtype=F64))
        assert_close(la.H, dict(la.snapshots)[n])
        assert la.fit_history_["val_nll"] == pytest.approx(scores)
    assert all(isinstance(s, float) and math.isfinite(s) for s in scores)
    prior = torch.tensor([0.2, 1.7, 0.6, 3.1], dtype=F64)
    la = fit(p, val, curvature_size=curvature_size, prior_precision=prior)  # is scaled as a whole
    assert_close(la.prior_precision, prior * chosen(la) / n_data)


@pytest.mark.parametrize("val_steps", [1, 2, None])
@pytest.mark.parametrize("curvature_size", [1000, 13])
def test_snapshots_follow_batches_and_are_scaled_to_all_data(small_problem, val_steps, curvature_size):
    """G_n is that of the n training inputs with the smallest keys, times N/n."""
    p = small_problem
    la = fit(p, val_steps=val_steps, curvature_size=curvature_size)
    steps = (10, 20) if val_steps == 2 else (5, 10, 15, 20)
    size = min(curvature_size, len(p.x))
    expected = [*(n for n in steps if n < size), size]
    assert la.fit_history_["processed_examples"] == expected
    assert len(la.fit_history_["val_nll"]) == len(expected)
    assert [n for n, _ in la.snapshots] == expected
    order = hash_keys(la.seed, CURVATURE_INPUT, torch.arange(len(p.x))).argsort()
    for n, G in la.snapshots:
        phi, f = la.features(p.x[order[:n]])
        assert_close(G, len(p.x) / n * oracle.curvature(phi, f, p.likelihood), name=f"n={n}")


@pytest.mark.parametrize("curvature_size", [1000, 13])
@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
def test_recorded_scores_are_those_of_a_loop_over_calls(small_problem, curvature_size, link):
    if small_problem.likelihood == "regression" and link != "probit":
        return
    val = validation(small_problem)
    la = fit(small_problem, val, curvature_size=curvature_size, link_approx=link)
    expected = naive_scores(la, small_problem, val, link_approx=link)
    assert la.fit_history_["processed_examples"] == list(expected)
    assert la.fit_history_["val_nll"] == pytest.approx(list(expected.values()), abs=1e-9)
    assert len(set(la.fit_history_["val_nll"])) == len(expected)
    assert la.temperature == pytest.approx(la.n_data / min(expected, key=expected.__getitem__))
    assert nll_of_calls(la, val, link_approx=link) == pytest.approx(min(expected.values()), abs=1e-9)


@pytest.mark.parametrize("right", [True, False])
def test_wrong_labels_stop_early_and_right_ones_late(right):
    p = over_confident("classification")
    x = torch.cat([x for x, _ in validation(p)])
    f = oracle.outputs(p.model, x)
    la = fit(p, validation(p, f.argmax(1) if right else f.argmin(1)))
    assert chosen(la) == (23 if right else 5)


def test_a_fit_without_validation_chooses_nothing(small_problem):
    la = fit(small_problem, False)
    assert la.temperature == 1.0
    assert la.prior_precision.item() == DELTA
    assert la.fit_history_["val_nll"] == []


def test_validation_data_are_read_and_passed_through_the_model_once(small_problem):
    calls = []
    for val in (False, True):
        for val_steps in (1, 5):
            model = Counting(small_problem.model)
            p = dataclasses.replace(small_problem, model=model)
            fit(p, iter(validation(small_problem)) if val else False, val_steps=val_steps)
            calls.append(model.calls)
    # Whatever the number of snapshots.
    assert calls[0] == calls[1] < calls[2] == calls[3]


def test_adding_data_records_the_score_of_the_whole_and_chooses_nothing(small_problem):
    p, la = small_problem, fit(small_problem, False)
    la.fit(p.loader(), override=False, val_loader=validation(p))
    assert la.fit_history_["processed_examples"] == [2 * len(p.x)]
    assert len(la.fit_history_["val_nll"]) == 1
    assert (la.temperature, la.n_curvature) == (1, 2 * len(p.x))


def test_a_temperature_fixed_by_the_user_stays_and_scores_are_recorded(small_problem):
    la = fit(small_problem, temperature=1.0)
    plain = fit(small_problem, False, temperature=1.0)
    assert la.temperature == 1
    assert_close(la.posterior_precision, plain.posterior_precision)
    assert la.fit_history_["processed_examples"][-1] == len(small_problem.x)
    assert len(la.fit_history_["val_nll"]) == len(la.fit_history_["processed_examples"]) > 1
