"""Ways in which ranks once waited for each other, or went apart: each of them, with a short timeout."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchmetrics
from conftest import C, K, N
from laplace.utils.enums import Likelihood, LinkApprox
from processes import Group, Outcome, outcome_of
from test_distributed import (
    F64,
    LAYERWISE,
    Broken,
    Case,
    Moody,
    assert_agree,
    assert_close,
    assert_identical,
    batches,
    check,
    loader,
    miscalibration,
    posterior_of,
    predictions,
    report,
    split,
    tune,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import laplace_ella
from laplace_ella.nystrom import basis, gram
from laplace_ella.nystrom import rows as row_source
from laplace_ella.parallel import ranks
from laplace_ella.posterior.gaussian import NotPositiveDefiniteError

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two ranks, of which none waits for longer than a test may take."""
    group = Group(2, tmp_path_factory.mktemp("pair") / "group", timeout=20)
    yield group
    group.kill()


@pytest.fixture
def two(pair):
    yield pair
    assert pair.alive
    assert pair.in_step(), "the ranks are out of step after this test"


def assert_stopped(found: list[Outcome], kind: str, text: str = "", failed: int = 1) -> None:
    """Require that one rank raised its error, and that the other was told at once."""
    assert found[failed].error == kind, found[failed].trace
    assert text in found[failed].text
    other = found[1 - failed]
    assert other.error == "RankError", other.trace
    assert "timeout" not in other.text
    assert kind in other.text
    assert text in other.text


# ---------------------------------------------------------------------------- errors between exchanges


class Full(OSError):
    pass


def failing(*args: Any, **kwargs: Any) -> Any:
    raise Full("no space left")


def raise_interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt("enough")


PLACES: dict[str, tuple[dict[str, Any], Any, str, Any]] = {
    "spilled rows": ({"memory_budget": 2000, "spill": "cpu"}, gram.Spill, "empty", failing),
    "eigenvectors": ({}, torch.linalg, "eigh", failing),
    "directions": ({}, basis, "_like", failing),
    "directions, spread": ({"shard_directions": True}, basis, "_like", failing),
    "Gram matrix": ({}, row_source, "combinations_with_replacement", failing),
    "Gram matrix, interrupted": ({}, row_source, "combinations_with_replacement", raise_interrupt),
    "sums of directions": ({}, torch, "cat", failing),
    "sampled labels": (
        {"shard_directions": True, "curvature": "mc"},
        laplace_ella.NystromGGN,
        "_sampled_curvature",
        failing,
    ),
    "curvature": ({"shard_directions": True}, laplace_ella.NystromGGN, "curvature", failing),
}


@pytest.mark.parametrize("name", PLACES)
def test_an_error_anywhere_in_a_fit_stops_all_ranks(two, name):
    kind = "KeyboardInterrupt" if "interrupted" in name else "Full"
    assert_stopped(two(fail_in, name), kind)


def fail_in(name: str) -> Outcome:
    options, place, attribute, replacement = PLACES[name]
    case = Case(options={"curvature_size": 13, **options})
    p, la = case.problem, case.estimator()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1 and name == "sums of directions":
            combination = gram.RowSource.combination

            def inside(*args: Any) -> Tensor:
                with pytest.MonkeyPatch.context() as inner:
                    # In the sum, and not in the exchange that follows.
                    total = ranks.Ranks.total
                    cat = torch.cat
                    inner.setattr(ranks.Ranks, "total", restoring(inner, total, cat))
                    inner.setattr(place, attribute, replacement)
                    return combination(*args)

            patch.setattr(gram.RowSource, "combination", inside)
        elif dist.get_rank() == 1:
            patch.setattr(place, attribute, replacement)
        return outcome_of(la.fit, loader(p.x, p.y))


def restoring(patch: pytest.MonkeyPatch, total: Any, cat: Any) -> Any:
    def run(*args: Any) -> Tensor:
        patch.setattr(torch, "cat", cat)
        return total(*args)

    return run


@pytest.mark.parametrize("what", ["columns", "sum", "large sum", "broadcast"])
def test_no_room_for_an_exchange_stops_all_ranks(two, what):
    assert_stopped(two(run_out_of_room, what), "MemoryError", "no room")


def run_out_of_room(what: str) -> Outcome:
    case = Case(options={"curvature_size": 13})
    p, la = case.problem, case.estimator()
    with pytest.MonkeyPatch.context() as patch:
        if what == "large sum":
            patch.setattr(ranks, "GATHERED_SUM", 0)
        if dist.get_rank() == 1:
            refuse_room(patch, what)
        return outcome_of(la.fit, loader(p.x, p.y))


def refuse_room(patch: pytest.MonkeyPatch, what: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("no room")

    packed, inside = ranks._packed, {"large sum": "total", "broadcast": "of_first"}
    if what == "columns":
        new_zeros = torch.Tensor.new_zeros

        def zeros(self: Tensor, *size: int, **options: Any) -> Tensor:
            return refuse() if len(size) == 3 else new_zeros(self, *size, **options)

        patch.setattr(torch.Tensor, "new_zeros", zeros)
    elif what == "sum":

        def pack(item: Any) -> Tensor:
            is_sum = isinstance(item, tuple) and item[0] == "a sum" and isinstance(item[1], Tensor)
            return refuse() if is_sum else packed(item)

        patch.setattr(ranks, "_packed", pack)
    else:
        method = getattr(ranks.Ranks, inside[what])

        def without_room(self: Any, values: Tensor) -> Tensor:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(torch.Tensor, "clone", refuse)
                return method(self, values)

        patch.setattr(ranks.Ranks, inside[what], without_room)


def test_an_error_that_is_known_is_not_told_twice(two):
    """In a search with spread directions, where pieces of common work are nested."""
    assert_stopped(two(fail_in_nested_work), "Full", "no space left")


def fail_in_nested_work() -> Outcome:
    case = Case(options={"temperature": None})
    la = case.fitted(shard_directions=True)
    if dist.get_rank() == 1:
        la.backend.engine.features = failing
    return outcome_of(lambda: tune(la, case, {}))


def test_an_exception_that_a_loader_raises_again_is_reported_again(two):
    for round_ in zip(*two(fail_twice)):
        assert_stopped(list(round_), "ValueError", "disk on fire")


def fail_twice() -> list[Outcome]:
    case, error = Case(options={"curvature_size": 13}), ValueError("disk on fire")
    la, data = case.estimator(), batches(*split(case, (11, 12))[dist.get_rank()], 3)
    data = Broken(data, 1, error) if dist.get_rank() == 1 else data
    return [outcome_of(la.fit, data) for _ in range(2)]


@pytest.mark.parametrize("name", ["plain", "isotropic", "layerwise"])
def test_features_that_are_not_finite_stop_the_first_prediction_of_all(two, name):
    assert_stopped(two(predict_nan, name), "ValueError", "finite")


def predict_nan(name: str) -> Outcome:
    more = {
        "plain": {},
        "isotropic": {"residual": "isotropic"},
        "layerwise": {"prior_precision": torch.cat([LAYERWISE, LAYERWISE[:1]])},
    }
    case = Case(options=more[name])
    la = case.estimator(Moody(), shard_directions=True)
    la.fit(loader(case.problem.x + 0.1, case.problem.y))
    return outcome_of(la, torch.zeros(3, 2, dtype=F64) if dist.get_rank() else case.problem.x_test[:3])


def test_what_is_said_of_a_spread_basis_needs_no_other_rank(two):
    for evidence, other in two(evidence_on_one_rank):
        assert other is None or other == pytest.approx(evidence)


def evidence_on_one_rank() -> tuple[float, float | None]:
    la = Case(options={"prior_precision": LAYERWISE}).fitted(shard_directions=True)
    evidence = float(la.log_marginal_likelihood())
    la._cache.clear()
    return evidence, float(la.log_marginal_likelihood()) if dist.get_rank() == 0 else None


def test_evidence_is_maximised_by_one_rank_alone(two):
    found, _ = two(maximise_evidence)
    la = Case().fitted()
    la.optimize_prior_precision(n_steps=3)
    assert found == pytest.approx(float(la.prior_precision))


def maximise_evidence() -> float | None:
    la = Case().fitted()
    if dist.get_rank():
        return None
    la.optimize_prior_precision(n_steps=3)
    return float(la.prior_precision)


def test_ranks_with_different_memory_draw_the_same_samples(two):
    case = Case("regression", options={"residual": "exact"})
    la = case.fitted()
    for samples in two(sample_within, case):
        assert samples.shape == la.functional_samples(case.problem.x_test[:3], n_samples=12).shape
        assert samples.isfinite().all()


def sample_within(case: Case) -> Tensor:
    la = case.fitted(shard_directions=True)
    la.backend.engine.assume_free(32 * la.backend.engine.row_size() * (4 - dist.get_rank()))
    generator = torch.Generator().manual_seed(1)
    return la.functional_samples(case.problem.x_test[:3], n_samples=12, generator=generator)


def test_a_large_object_goes_round_by_itself(two):
    case = Case(options={"curvature_size": 13})
    expected = report(case.fitted(), case.problem.x_test)
    found = two(run_with_little_padding, case)
    check(found, expected)


def run_with_little_padding(case: Case) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "PADDED", 700)
        patch.setattr(ranks, "GATHERED_SUM", 8)
        return report(case.fitted(), case.problem.x_test)


def test_calls_that_differ_are_told_apart(two):
    for outcome in two(call_differently):
        assert outcome.error == "RankError", outcome.trace
        assert "out of step" in outcome.text


def call_differently() -> Outcome:
    group = ranks.ranks_of("default")
    if dist.get_rank() == 0:
        return outcome_of(group.total, torch.ones(3))
    return outcome_of(group.any, True, "a question")


# ---------------------------------------------------------------------------- losses


@pytest.mark.parametrize("process_group", [None, "default"])
def test_a_metric_made_of_metrics(two, process_group):
    case = Case(model="confident", options={"temperature": 50.0})
    expected = tune_by_composed(case, None)
    found = two(tune_by_composed, case, process_group)
    if process_group is None:
        found, other = found
        assert other is None
        assert_agree(found, expected)
    else:
        check(found, expected)


def tune_by_composed(case: Case, process_group: Any) -> dict[str, Any] | None:
    if dist.is_initialized() and process_group is None and dist.get_rank():
        return None
    alone, p, data = process_group is None, case.problem, case.validation()
    la = case.estimator(process_group=process_group)
    la.fit(batches(p.x, p.y) if alone else loader(p.x, p.y))
    loss = 3 - 2 * torchmetrics.classification.MulticlassAccuracy(C, average="micro")
    val = batches(*data, 3) if alone else loader(*data, 3)
    la.optimize_prior_precision(method="gridsearch", val_loader=val, loss=loss, grid_size=301)
    return report(la, case.problem.x_test)


def test_a_loss_with_noise_of_its_own_is_that_of_one_rank(two):
    first, other = two(tune_by_noise)
    assert_identical(first, other)


def tune_by_noise() -> dict[str, Any]:
    case = Case(model="confident", options={"temperature": 50.0})
    la, generator = case.fitted(), torch.Generator().manual_seed(dist.get_rank())

    def loss(p: Tensor, y: Tensor) -> float:
        return miscalibration(p, y) + float(torch.rand((), generator=generator))

    tune(la, case, {"loss": loss})
    return posterior_of(la)


class Worse(NotPositiveDefiniteError):
    pass


def test_settings_that_fail_on_one_rank_are_skipped_by_all(two):
    for outcome in two(tune_with_failing_settings):
        assert outcome.error == "ValueError", outcome.trace
        assert "None of the" in outcome.text
        assert "bad" in outcome.text


def tune_with_failing_settings() -> Outcome:
    la, rank = Case(options={"temperature": 50.0}).fitted(), dist.get_rank()

    def loss(p: Tensor, y: Tensor) -> float:
        raise Worse("bad")

    def failing_link(*args: Any, **kwargs: Any) -> Any:
        def predict(outputs: Any) -> Any:
            raise Worse("bad")

        return predict

    if rank == 1:  # in the predictions, before the first rank evaluates the loss
        la._link = failing_link
    return outcome_of(lambda: tune(la, Case(), {"loss": loss}))


# ---------------------------------------------------------------------------- what ranks pass


def test_enums_and_numpy_integers(two, tmp_path):
    found = two(run_with_types, str(tmp_path / "fit"))
    expected = run_with_types(str(tmp_path / "alone"))
    assert expected["n_data"] == 11
    check(found, expected)


def run_with_types(path: str) -> dict[str, Any]:
    case = Case(options={"curvature_size": np.int64(7), "seed": np.int64(3), "temperature": None})
    p = case.problem
    model, options = p.model, p.options(subsample_size=np.int64(5), n_eigenvalues=K, **case.options)
    la = laplace_ella.ELLALaplace(model, **{**options, "likelihood": Likelihood.CLASSIFICATION})
    la.fit(loader(p.x, p.y), max_samples=np.int64(11), checkpoint=path, checkpoint_every=np.int64(1))
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=loader(*case.validation()),
        link_approx=LinkApprox.PROBIT,
        n_samples=np.int64(7),
        grid_size=np.int64(3),
    )
    return report(la, p.x_test)


class Encoding(UserDict):
    """A mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class OfEncodings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Case().problem.model

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch.input_ids)


@pytest.mark.parametrize("shard", [False, True])
def test_mappings_keep_their_type_on_a_rank_that_has_run_out(two, shard):
    la = Case(options={"curvature_size": None}).estimator(OfEncodings())
    la.fit(encodings((18, 5))[0] + encodings((18, 5))[1], landmarks=encoded_landmarks())
    for found in two(fit_encodings, (18, 5), shard):
        assert_agree(found, {"H": la.H, "loss": la.loss})


def encodings(sizes: tuple[int, ...], more: Any = None) -> list[list[Encoding]]:
    extra = {} if more is None else {"more": more}
    return [
        [Encoding({"input_ids": x, "labels": y, **extra}) for x, y in batches(*part)]
        for part in split(Case(), sizes)
    ]


def encoded_landmarks() -> tuple[Encoding, Tensor]:
    x, outputs = Case().problem.landmarks
    return Encoding({"input_ids": x, "labels": outputs}), outputs


def fit_encodings(sizes: tuple[int, ...], shard: bool) -> dict[str, Any]:
    la = Case(options={"curvature_size": None, "shard_directions": shard}).estimator(OfEncodings())
    la.fit(encodings(sizes)[dist.get_rank()], landmarks=encoded_landmarks())
    return {"H": la.H, "loss": la.loss}


def test_what_cannot_be_sent_is_named(two):
    for outcome in two(fit_with_arrays):
        assert "more" in outcome.text
        assert "other processes" in outcome.text


def fit_with_arrays() -> Outcome:
    la = Case(options={"curvature_size": 13}).estimator(OfEncodings())
    return outcome_of(la.fit, encodings((11, 12), np.zeros(3))[dist.get_rank()])


def test_a_distributed_sampler_of_batches(two):
    case = Case(options={"curvature_size": None}, fit={"landmarks": True})
    p = case.problem
    whole = batches(p.x, p.y, 4)[:5]  # of which one rank has three and the other two
    la = case.estimator()
    la.fit(whole, landmarks=p.landmarks)
    assert la.n_data == 20
    check(two(fit_by_batches, case, whole), report(la, p.x_test), same_steps=False)


def fit_by_batches(case: Case, whole: list[Any]) -> dict[str, Any]:
    la = case.estimator()
    sampler = DistributedSampler(whole, shuffle=False)
    la.fit(DataLoader(whole, batch_size=None, sampler=sampler), landmarks=case.problem.landmarks)
    return report(la, case.problem.x_test)


@pytest.mark.parametrize("shard", [False, True])
def test_a_basis_that_is_spread_otherwise_is_refused(two, shard):
    for outcome, state in two(fit_with_basis_of_other_kind, shard):
        assert outcome.error == "ValueError", outcome.trace
        assert "shard_directions" in outcome.text
        assert state


def fit_with_basis_of_other_kind(shard: bool) -> tuple[Outcome, bool]:
    case = Case()
    first, p = case.fitted(shard_directions=shard), case.problem
    second = case.estimator(shard_directions=not shard)
    outcome = outcome_of(lambda: second.fit(loader(p.x, p.y), basis=first.basis))
    return outcome, second.H is None


@pytest.mark.parametrize("name", ["prior_precision", "link_approx"])
def test_early_stopping_with_different_settings_is_refused(two, name):
    for outcome in two(stop_with_difference, name):
        assert outcome.error == "ValueError", outcome.trace
        assert name.split("_")[0] in outcome.text or "setting" in outcome.text


def stop_with_difference(name: str) -> Outcome:
    rank = dist.get_rank()
    prior = 0.01 + rank if name == "prior_precision" else 0.6
    case = Case(options={"temperature": None, "prior_precision": prior}, fit={"val_loader": True})
    p, la = case.problem, case.estimator()
    link = ("probit", "mc")[rank] if name == "link_approx" else "probit"
    return outcome_of(lambda: la.fit(loader(p.x, p.y), link_approx=link, **case.arguments()))


def test_vector_priors_that_differ_are_refused(two):
    for outcome in two(search_with_difference):
        assert outcome.error == "ValueError", outcome.trace


def search_with_difference() -> Outcome:
    la = Case(options={"temperature": None, "prior_precision": LAYERWISE * (1 + dist.get_rank())}).fitted()
    return outcome_of(la.optimize_hyperparameters, loader(*Case().validation()), ["temperature"])


# ---------------------------------------------------------------------------- the rest


def test_the_approximation_error_is_that_of_all_data(two):
    expected = approximation_error()
    for found in two(approximation_error):
        assert_close(torch.tensor(found), torch.tensor(expected), 1e-6)


def approximation_error() -> tuple[float, float]:
    case = Case()
    p, la = case.problem, case.fitted()
    found = la.approximation_error(p.x_test, loader(p.x, p.y))
    return found.captured_trace, found.covariance_error


def test_a_plan_is_that_of_one_rank(two):
    for n_data, n_landmarks, n in two(plan_of_rank):
        assert n_data == (N + 1) // 2
        assert n_landmarks == 6  # of 11
        assert n == 7  # of 13


def plan_of_rank() -> tuple[Any, int, int]:
    case = Case(options={"curvature_size": 13})
    plan = case.estimator().plan(loader(case.problem.x, case.problem.y), verbose=False)
    return plan.n_data, plan.n_landmarks, plan.n_curvature


def test_an_estimator_with_spread_directions_can_be_copied(two):
    for found, expected in two(copy_spread):
        assert_identical(found, expected)


def copy_spread() -> tuple[Any, Any]:
    la = Case().fitted(shard_directions=True)
    x = Case().problem.x_test
    return predictions(copy.deepcopy(la), x), predictions(la, x)


def test_inputs_of_others_are_let_go(two):
    """While the basis is made, a rank holds M landmark inputs and its share of the curvature inputs."""
    assert two(count_inputs) == [11 + 7, 11 + 6]


def count_inputs() -> int:
    import gc

    case, seen = Case(options={"curvature_size": 13}), []
    p, la = case.problem, case.estimator()
    build = la.backend.build_basis

    def look(*args: Any) -> Any:
        gc.collect()
        rows = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (1, 2) and t.dtype == F64]
        seen.append(len(rows))
        return build(*args)

    la.backend.build_basis = look
    la.fit([(x.clone(), y.clone()) for x, y in batches(p.x, p.y)][dist.get_rank() :: 2])
    return seen[0]
