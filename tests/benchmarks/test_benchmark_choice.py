"""The study of choices: predictions from kept features are the network's, and tables say what was measured."""

import copy

import pytest
import torch
from conftest import assert_close
from torch import nn

from benchmarks.measure import loader
from benchmarks.methods import ours
from benchmarks.studies.choice import methods, report
from benchmarks.studies.choice.features import Features, _seen, estimator

C, N, K = 3, 60, 5


@pytest.fixture(scope="module")
def problem():
    """A network, its training data, and an estimator with their exact curvature."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("hidden", nn.Sequential(nn.Linear(4, 7), nn.Tanh()))
        model.add_module("fc", nn.Linear(7, C))
        x, y = torch.randn(N, 4), torch.arange(N) % C
    la = ours(model, subsample_size=13, n_eigenvalues=K, temperature=3.0)
    la.fit(loader(x, y, 10))
    return model, la, x, y


@pytest.fixture(scope="module")
def features(problem):
    model, la, x, y = problem
    seen = {
        name: _seen(la, model, (x + i / 9, y))
        for i, name in enumerate(("curvature", "validation", "test", "else"))
    }
    return Features(seen, N, torch.linspace(0.2, 1, K), 5.0, 1.0, 0.0)


def test_an_estimator_of_features_is_that_of_the_network(problem, features):
    _, la, x, _ = problem
    for rank in (K, 2):
        la.n_directions = rank
        twin = estimator(methods.leading(features, rank).sets["curvature"], N, rank)
        twin.temperature = 3.0
        test = methods.leading(features, rank).sets["test"]
        for variance in ("ella", "none", "constant", "last_layer"):
            la.variance = twin.variance = variance
            assert_close(methods.predicted(twin, test), la(x + 2 / 9, link_approx="mc", n_samples=128), 1e-4)
        la.variance = "ella"
    la.n_directions = None


def test_curvature_of_some_is_scaled_to_all(features):
    half = features.sets["curvature"][: N // 2]
    assert_close(estimator(half, 2 * N, K).H, 4 * estimator(half, N // 2, K).H, 1e-5)


def test_shares_are_those_of_the_estimator(problem):
    model, la, x, y = problem
    exact = copy.copy(la)
    exact.residual = "exact"  # estimated ones differ with the rank, as what is inside of it needs no estimate
    seen = _seen(exact, model, (x, y))
    for rank in (K, 2):
        exact.n_directions = rank
        assert_close(seen.share(rank), exact.residual_share(x).double(), 1e-4)


@pytest.mark.filterwarnings("ignore:Only 60 validation inputs")
def test_methods_of_a_search_predict_as_the_choice_does(features):
    la, result = methods.chosen(features, 0, features.sets["validation"], features.sets["curvature"])
    of_choice = methods.predicted(la, features.sets["test"])
    found = methods.of_methods(la, result, features)
    assert list(found) == list(result.baselines)
    assert_close(found[result.chosen]["test"], of_choice, 1e-6)
    assert_close(found["MAP"]["else"], features.sets["else"].f.softmax(1), 1e-6)


def test_the_verdict_counts_cases():
    def auto(best, of_scaling):
        pair = {"best": best, "temperature scaling": of_scaling}
        return {of: {"mean": mean, "standard_error": 0.01} for of, mean in pair.items()}

    verdict = report._verdict([auto(0.0, -0.03), auto(0.009, 0.0), auto(0.05, 0.021)])
    assert "In 2 of 3 cases" in verdict
    assert "behind by 0.0500)" in verdict
    assert "more than 2 standard errors in 1, and better by more in 1." in verdict


def test_tables_without_a_run_say_so():
    tables = {**report.OF_EVIDENCE, **report.OF_ABLATIONS, **report.OF_CHOOSING}
    assert {write({}) for write in tables.values()} == {report.NOTHING}
