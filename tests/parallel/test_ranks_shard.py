"""Directions that are spread over ranks give what whole directions give."""

import copy
import pickle

import oracle
import pytest
import torch
import torch.distributed as dist
from conftest import B, K, assert_close
from processes import outcome_of
from ranked import (
    F64,
    FEW,
    FITS,
    GRIDS,
    RTOL,
    STREAMED,
    Case,
    assert_agree,
    assert_identical,
    assert_refused,
    assert_stopped,
    batches,
    check,
    grid_case,
    loader,
    mine,
    posterior_of,
    predictions,
    tune,
)

pytest_plugins = ("groups",)
pytestmark = pytest.mark.filterwarnings(FEW)
UNEQUAL, EMPTY = {2: (5, 2), 3: (4, 1, 2)}, {2: (B, 0), 3: (3, 0, 4)}
S = 3000


def part(x, sizes=UNEQUAL):
    """This rank's part of test inputs; all of them in one process."""
    return mine(x, sizes[dist.get_world_size()]) if dist.is_initialized() else x


def run_sharded(
    case,
    sizes=UNEQUAL,
    grid=None,
    shards=None,
):
    data = None if shards is None else batches(*case.shard(shards))
    la = case.fitted(data=data, shard_directions=True)
    if grid is not None:
        tune(la, case, GRIDS[grid][2])
    return {
        "posterior": posterior_of(la),
        "directions": {k: v.clone() for k, v in la.basis.directions.items()},
        "predictions": predictions(la, part(case.problem.x_test, sizes)),
    }


def check_sharded(found, expected, same_steps=True):
    """Compare joined predictions, and each rank's directions, with those of one process."""
    for rank, one in enumerate(found):
        for k, v in expected["directions"].items():
            assert_close(one["directions"][k], v[rank :: len(found)], RTOL, name=f"directions of {k}")
    check([one["posterior"] for one in found], expected["posterior"], same_steps)
    for k, v in expected["predictions"].items():
        if not k.startswith("joint"):
            assert_close(torch.cat([one["predictions"][k] for one in found]), v, RTOL, name=k)


CASES = {
    "K not divisible": Case(),
    "fewer directions than ranks": Case("regression", options={"n_eigenvalues": 1}),
}
OTHERS = (
    "a second pass",
    "sampled labels in a second pass",
    "layerwise prior",
    "blocks of rows",
    "spilled rows",
)
CASES |= {name: FITS[name] for name in (*OTHERS, "reverse mode", "isotropic residual", "exact residual")}


@pytest.mark.parametrize("name", CASES)
def test_spread_directions_give_what_one_process_gives(two, name):
    case = CASES[name]
    check_sharded(two(run_sharded, case), run_sharded(case), case.same_steps)


@pytest.mark.parametrize("name", list(CASES)[:4])
def test_a_rank_without_a_batch_takes_part_in_predictions(three, name):
    case = CASES[name]
    found = three(run_sharded, case, EMPTY)
    check_sharded(found, run_sharded(case), case.same_steps)
    rank = found[0]["posterior"]["rank"]
    for i, one in enumerate(found):  # every rank keeps its turns
        assert {len(v) for v in one["directions"].values()} == {len(range(i, rank, 3))}


@pytest.mark.parametrize("shards", [(11, 5, 7), (0, 23, 0)], ids=str)
@pytest.mark.parametrize("curvature", ["exact", "mc"])
def test_any_shards(three, shards, curvature):
    case = Case(options={**STREAMED, "curvature": curvature}, fit={"landmarks": True})
    found, expected = three(run_sharded, case, UNEQUAL, None, shards), run_sharded(case)
    if curvature == "mc":  # labels are drawn by rank and place
        for f in (*found, expected):
            f["posterior"] = {k: f["posterior"][k] for k in ("eigenvalues", "loss", "n_data")}
            f["predictions"] = {k: f["predictions"][k] for k in ("features", "outputs")}
    check_sharded(found, expected, same_steps=curvature == "mc")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["probit", "regression", "callable"])
def test_grid_search(two, name):
    case = grid_case(name)
    check_sharded(two(run_sharded, case, UNEQUAL, name), run_sharded(case, grid=name))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_later_steps(three):
    case = Case(options={"temperature": None})
    found, expected = three(run_later_steps, case), run_later_steps(case)
    for one in found:
        assert_identical(one["common"], found[0]["common"])
    assert_agree(found[0]["common"], expected["common"])
    assert_close(torch.cat([one["novelty"] for one in found]), expected["novelty"], RTOL)


def run_later_steps(case):
    la, more = case.fitted(shard_directions=True), case.data()
    la.fit(loader(*more), override=False)
    common = {"added": posterior_of(la)}
    la.forget(loader(*more))
    common["forgotten"] = posterior_of(la)
    other = case.estimator(shard_directions=True)
    other.fit(loader(*more), basis=la.basis)
    la.merge(other)
    common["merged"] = posterior_of(la)
    search = {"temperature": None, "n_eigenvalues": None}
    la.optimize_hyperparameters(loader(*case.validation(), 3), search, link_approx="probit")
    common["tuned"] = posterior_of(la)
    la.calibrate_novelty(loader(*case.validation(), 3))
    x = part(case.problem.x_test)
    assert_identical(predictions(copy.deepcopy(la), x), predictions(la, x))
    return {"common": common, "novelty": la.novelty(x)}


@pytest.mark.parametrize("name", ["K not divisible", "isotropic residual", "layerwise prior"])
def test_fewer_directions_are_used_and_all_of_them_again(two, name):
    case = CASES[name]
    found, expected = two(run_with_fewer, case), run_with_fewer(case)
    for step in ("all", "few", "one", "all again"):
        check_sharded([one[step] for one in found], expected[step])


def run_with_fewer(case):
    la = case.fitted(shard_directions=True)
    found, ranks = {}, {"all": None, "few": 3, "one": 1, "all again": None}
    for step, la.n_directions in ranks.items():
        found[step] = {
            "posterior": posterior_of(la),
            "directions": la.basis.directions,
            "predictions": predictions(la, part(case.problem.x_test)),
        }
    if dist.is_initialized():
        with pytest.raises(ValueError, match="spread over several ranks"):
            la.predict_plan(case.problem.x_test)
    return found


def test_ranks_that_use_other_numbers_of_directions_are_refused(two):
    for error in two(differing, Case()):
        assert "n_directions" in error


def differing(case):
    la = case.fitted(shard_directions=True)
    la.n_directions = 4 - 2 * dist.get_rank()  # of two parts of one size, one would pass for the other
    with pytest.raises(RuntimeError) as caught:
        la.features(case.problem.x_test)
    return str(caught.value)


@pytest.mark.parametrize("seeds", ["different", "global"])
def test_moments_of_sampled_weights(two, seeds):
    """Where weights hardly move, samples have the moments of the linearised model."""
    case = Case("regression", options={"temperature": 1e-6, "prior_precision": 1e6})
    mean, cov = case.fitted()._glm_predictive_distribution(case.problem.x_test[:2], joint=True)
    error = ((torch.outer(cov.diagonal(), cov.diagonal()) + cov.square()) / S).sqrt()
    for samples in two(sample_weights, case, seeds):
        flat = samples.flatten(1)
        assert ((flat.mean(0) - mean).abs() <= 5.5 * (cov.diagonal() / S).sqrt() + 1e-4 * mean.abs()).all()
        assert ((flat.T.cov() - cov).abs() <= 5.5 * error + 1e-3 * cov.abs().max()).all()


def sample_weights(case, seeds):
    la = case.fitted(shard_directions=True)
    generator = None if seeds == "global" else torch.Generator().manual_seed(4 + dist.get_rank())
    torch.manual_seed(4)
    return la.functional_samples(case.problem.x_test[:2], "nn", S, generator=generator)


def test_ranks_with_different_memory_draw_the_same_number_of_samples(two):
    case = Case("regression", options={"residual": "exact"})
    for samples in two(sample_within, case):
        assert samples.shape == (12, 3, 3)
        assert samples.isfinite().all()


def sample_within(case):
    la = case.fitted(shard_directions=True)
    la.backend.engine.assume_free(32 * la.backend.engine.row_size() * (4 - dist.get_rank()))
    generator = torch.Generator().manual_seed(1)
    return la.functional_samples(case.problem.x_test[:3], n_samples=12, generator=generator)


def test_a_shard_is_restored_on_its_rank(two, three):
    found = two(save_and_load)
    states = [state for *_, state in found]
    for before, after, onto_other, size, _ in found:
        assert_identical(after, before)
        assert onto_other.error == "ValueError"
        assert "rank" in onto_other.text
        assert size < K  # directions of this rank only
    for shard_directions in (True, False):
        with pytest.raises(ValueError, match=r"rank|shard"):
            Case().estimator(shard_directions=shard_directions).load_state_dict(pickle.loads(states[0]))
    assert_refused(three(load_shard, states, True), "rank")
    assert_refused(two(load_shard, states, False), "rank")  # whole directions are wanted


def save_and_load():
    la, rank = Case().fitted(shard_directions=True), dist.get_rank()
    x = part(Case().problem.x_test)
    state = pickle.dumps(la.state_dict())
    states = [None, None]
    dist.all_gather_object(states, state)
    loaded, other = (Case().estimator(shard_directions=True) for _ in range(2))
    loaded.load_state_dict(pickle.loads(states[rank]))
    size = len(next(iter(loaded.basis.directions.values())))
    onto_other = outcome_of(other.load_state_dict, pickle.loads(states[1 - rank]))
    return predictions(la, x), predictions(loaded, x), onto_other, size, state


def load_shard(states, shard_directions):
    la = Case().estimator(shard_directions=shard_directions)
    return outcome_of(la.load_state_dict, pickle.loads(states[dist.get_rank() % len(states)]))


def test_whole_directions_are_restored_in_any_group(two):
    la = Case().fitted()
    for found in two(load_whole, pickle.dumps(la.state_dict())):
        assert_agree(found, load_whole(pickle.dumps(la.state_dict())))


def load_whole(state):
    la = Case().estimator()
    la.load_state_dict(pickle.loads(state))
    return predictions(la, Case().problem.x_test)


REFUSED = (
    "enable_backprop",
    "prior",
    "later prior",
    "basis of whole directions",
    "basis of spread directions",
)


@pytest.mark.parametrize("what", REFUSED)
def test_what_spread_directions_do_not_do_is_refused(two, what):
    assert_refused(two(ask_too_much, what), "shard_directions")


def ask_too_much(what):
    case, spread = Case(), {"shard_directions": True}
    prior = torch.linspace(1, 2, len(oracle.weights(case.problem.model)), dtype=F64)
    if what == "later prior":
        return outcome_of(setattr, case.fitted(**spread), "prior_precision", prior)
    if what.startswith("basis"):
        of_spread = what.endswith("spread directions")
        basis = case.fitted(shard_directions=of_spread).basis
        other = case.estimator(shard_directions=not of_spread)
        return outcome_of(lambda: other.fit(loader(case.problem.x, case.problem.y), basis=basis))
    options = {"enable_backprop": True} if what == "enable_backprop" else {"prior_precision": prior}
    return outcome_of(lambda: case.estimator(**spread, **options))


def test_a_bad_input_of_one_rank_stops_the_prediction_of_all(two):
    found = two(predict_badly)
    assert_stopped([outcome for outcome, _ in found], "ValueError", "finite")
    assert_identical(found[0][1], found[1][1])


def predict_badly():
    la, x = Case().fitted(shard_directions=True), Case().problem.x_test
    return outcome_of(la, x * float("nan") if dist.get_rank() == 1 else x), predictions(la, x)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_parts_of_an_uncertainty_intervals_and_choices(two, likelihood):
    """Each rank asks for inputs of its own, and chooses from a pool of its own."""
    case = Case(likelihood, options={"residual": "isotropic"})
    la, x = case.fitted(), case.problem.x_test
    for found, own in zip(two(ask_for_uncertainty, case), x.split(UNEQUAL[2])):
        for name, answer in answers(la, own).items():
            assert_agree(found[name], answer, name)


def answers(la, x):
    found = {"uncertainty": tuple(la.uncertainty(x, 32))}
    if la.likelihood == "regression":
        return found | {"interval": la.interval(x)}
    return found | {"choice": tuple(t.double() for t in la.batch_bald(x.split(1), 2, n_samples=32))}


def ask_for_uncertainty(case):
    return answers(case.fitted(shard_directions=True), part(case.problem.x_test))
