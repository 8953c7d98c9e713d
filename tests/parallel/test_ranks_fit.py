"""Fits shared by the ranks of a process group, against one process on the whole data."""

import numpy as np
import oracle
import pytest
import test_positions
import torch
import torch.distributed as dist
from conftest import C, K, M, N, assert_close
from models import Applied
from parts import Attributes, Counting
from processes import outcome_of
from ranked import (
    F64,
    FEW,
    FITS,
    N_MORE,
    REDUCED,
    RTOL,
    SAMPLE,
    STREAMED,
    Case,
    assert_agree,
    assert_identical,
    assert_refused,
    assert_stopped,
    batches,
    check,
    check_run,
    loader,
    report,
    run,
)
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from laplace_ella import ELLALaplace
from laplace_ella.data.hashing import CURVATURE_INPUT, LANDMARK_INPUT, LANDMARK_OUTPUT, hash_keys
from laplace_ella.data.landmarks import explicit_landmarks
from laplace_ella.fitting import stages
from laplace_ella.network.calls import DivergedError
from laplace_ella.nystrom import jacobian
from laplace_ella.nystrom.gram import choose_rows
from laplace_ella.nystrom.jacobian import row_source
from laplace_ella.parallel import ranks

pytest_plugins = ("groups",)
pytestmark = pytest.mark.filterwarnings(REDUCED, FEW)


@pytest.mark.parametrize("name", FITS)
def test_two_ranks_find_what_one_process_finds(two, name):
    check_run(two, FITS[name])


@pytest.mark.parametrize("name", list(FITS)[::4])
def test_three_ranks_find_what_one_process_finds(three, name):
    check_run(three, FITS[name])


def test_cases_are_those_that_they_are_named_after():
    for name, kind in {"blocks of rows": "blocks of rows", "all inputs": "kept"}.items():
        la = FITS[name].estimator()
        pairs = torch.randn(la.subsample_size, 2, dtype=F64), torch.randint(C, (la.subsample_size,))
        source = row_source(la.backend.engine, explicit_landmarks(pairs))
        assert choose_rows(source, la.backend.engine.budget()).kind == kind, name
    plain, balanced = (run(FITS[name])["eigenvalues"] for name in ("a sample of inputs", "balanced"))
    assert not torch.equal(plain, balanced)
    every, second = (run(FITS[f"snapshots at every {which}"])["n"] for which in ("batch", "second batch"))
    assert (every, second) == ([3, 6, 9, 12, 13], [6, 12, 13])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("likelihood", test_positions.LIKELIHOODS)
def test_outputs_with_positions(two, likelihood):
    check(two(run_sequence, likelihood), run_sequence(likelihood))


def run_sequence(likelihood):
    case = test_positions.Case("sequence", likelihood)
    la = ELLALaplace(case.model, likelihood, case.sigma, n_eigenvalues=K, subsample_size=29, temperature=None)
    la.fit(loader(case.x, case.y))
    assert la.n_predictions == la.n_data * case.L
    val = loader(case.x_val, case.y_val)
    la.optimize_prior_precision(method="gridsearch", val_loader=val, link_approx="probit", grid_size=5)
    return report(la, case.x_test)


def test_large_sums(two):
    case = FITS["a sample of inputs"]
    check(two(run_with_large_sums, case), run(case))


def run_with_large_sums(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "GATHERED_SUM", 8)
        return run(case)


def test_all_ranks_begin_again_with_rows_if_one_cannot_follow_its_passes(two):
    case = FITS["a sample of inputs"]
    check(two(run_diverging, case), run(case))


def run_diverging(case):
    def diverge(*args):
        raise DivergedError

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(jacobian, "rows_by_layer", diverge)
        return run(case)


def run_on(case, kind):
    """Fit the data of a loader of some kind; in one process, what it yields on all ranks together."""
    p, alone = case.problem, not dist.is_initialized()
    dataset, data, kept = TensorDataset(p.x, p.y), loader(p.x, p.y), N - N % 2
    if kind == "batches of other lengths":
        data = loader(p.x, p.y, 8 if alone else (3, 8, 5)[dist.get_rank()])
    elif kind == "dropping":
        data = loader(p.x[:kept], p.y[:kept]) if alone else loader(p.x, p.y, drop_last=True)
    elif kind == "shuffling":
        whole = {"num_replicas": 1, "rank": 0} if alone else {}
        sampler = DistributedSampler(dataset, shuffle=True, seed=3, **whole)
        sampler.set_epoch(2)
        data = DataLoader(dataset, 5, sampler=sampler)
    elif kind == "batch sampler" and not alone:
        sampler = DistributedSampler(dataset, shuffle=False)
        data = DataLoader(dataset, batch_sampler=BatchSampler(sampler, 5, drop_last=False))
    elif kind == "sampler of batches":  # of five batches, one rank has three and the other two
        data = batches(p.x, p.y, 4)[:5]
        if not alone:
            data = DataLoader(data, batch_size=None, sampler=DistributedSampler(data, shuffle=False))
    elif kind == "fewer inputs than ranks":
        data = loader(p.x[:1], p.y[:1])
    return report(case.fitted(data=data), p.x_test)


# Kind: what is fitted, and how many inputs one process then reads.
LOADERS = {
    **{k: (Case(options=SAMPLE), N) for k in ("batches of other lengths", "shuffling", "batch sampler")},
    "dropping": (Case(options=SAMPLE), 22),
    "sampler of batches": (Case(options=STREAMED, fit={"landmarks": True}), 20),
    "fewer inputs than ranks": (Case(options={"n_eigenvalues": 2, "subsample_size": 2}), 1),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_distributed_samplers(two, kind):
    case, n = LOADERS[kind]
    found, expected = two(run_on, case, kind), run_on(case, kind)
    assert expected["n_data"] == n
    check(found, expected, case.same_steps and n > 1)


def run_on_shards(case, sizes, kind="list"):
    x, y = case.shard(sizes)
    data = DataLoader(TensorDataset(x, y), 5) if kind == "loader" else batches(x, y)
    return report(case.fitted(data=iter(data) if kind == "iterator" else data), case.problem.x_test)


@pytest.mark.parametrize("sizes", [(17, 6), (0, 23), (11, 5, 7), (1, 0, 22)], ids=str)
@pytest.mark.parametrize("curvature_size", [None, 2000])
def test_given_landmarks_with_any_shards(groups, sizes, curvature_size):
    case = Case("regression", options={"curvature_size": curvature_size}, fit={"landmarks": True})
    found = groups.get(len(sizes))(run_on_shards, case, sizes)
    groups.check(len(sizes))
    check(found, run(case), same_steps=False)


@pytest.mark.parametrize("kind", ["list", "iterator", "loader"])
def test_unknown_samplers_draw_by_rank_and_place(two, kind):
    """Row j of rank r has the key of (seed, (r << 40) + j)."""
    case, sizes, n = Case(options={**SAMPLE, "seed": 3}), (17, 6), 13
    p, found = case.problem, two(run_on_shards, case, sizes, kind)
    positions = torch.cat([(r << 40) + torch.arange(size) for r, size in enumerate(sizes)])
    drawn = hash_keys(3, LANDMARK_INPUT, positions).argsort()[:M].sort().values
    outputs = hash_keys(3, LANDMARK_OUTPUT, positions[drawn]) % C
    la = case.estimator()
    la.fit(p.loader(), landmarks=(p.x[drawn], outputs))
    order = hash_keys(3, CURVATURE_INPUT, positions).argsort()
    for one in found:
        assert_identical(one, found[0])
        assert_close(one["eigenvalues"], la.basis.eigenvalues, RTOL)
        assert_close(one["loss"], la.loss, RTOL)
        assert one["n"] == [5, 10, n]
        for size in one["n"]:
            phi, f = la.features(p.x[order[:size]])
            G = N / size * oracle.curvature(phi, f, p.likelihood)
            assert_close(one[f"snapshot {size}"], G, RTOL, name=f"n={size}")


def test_a_rank_without_data(two):
    case = Case(options=SAMPLE)
    check(two(run_on_shards, case, (N, 0)), run(case))  # rank 0 counts as one process does
    assert_refused(two(outcome_of, run_on_shards, case, (0, 0, N)), "no data")


@pytest.mark.parametrize("wrong", ["replicas", "rank"])
def test_a_sampler_of_another_group_is_refused(two, wrong):
    assert_refused(two(fit_with_wrong_sampler, wrong, (0, 1)), "DistributedSampler")
    assert_stopped(two(fit_with_wrong_sampler, wrong, (1,)), "ValueError", "DistributedSampler")


def fit_with_wrong_sampler(wrong, ranks):
    case, rank, size = Case(), dist.get_rank(), dist.get_world_size()
    if rank in ranks:
        rank, size = (size - 1 - rank, size) if wrong == "rank" else (rank, size + 1)
    data = loader(case.problem.x, case.problem.y, num_replicas=size, rank=rank)
    return outcome_of(case.estimator().fit, data)


def test_first_inputs_of_other_loaders_are_divided_evenly(group):
    case, n = Case(options=STREAMED, fit={"landmarks": True}), 13
    sizes = (12, 11) if group.size == 2 else (9, 7, 7)
    found = group(run_first, case, sizes, n)
    each = [n // group.size + (r < n % group.size) for r in range(group.size)]
    p = case.problem
    parts = [(x[:k], y[:k]) for x, y, k in zip(p.x.split(sizes), p.y.split(sizes), each)]
    check([f for f, _ in found], report(case.fitted(data=parts), p.x_test), same_steps=False)
    assert [asked for _, asked in found] == [2 * -(-k // 5) for k in each]  # two passes


def run_first(case, sizes, n):
    la, data = case.estimator(), Counting(batches(*case.shard(sizes)))
    la.fit(data, max_samples=n, landmarks=case.problem.landmarks)
    return report(la, case.problem.x_test), data.asked


PARTS = ("added", "basis", "merged", "forgotten", "forgotten on one rank")
OF_PARTS = [
    (kind, name, {"curvature_size": 7} if name == "basis" else {}) for kind in (2, 3) for name in PARTS
]
OF_PARTS += [
    (3, "added", o) for o in ({"curvature_size": 7}, STREAMED, {"curvature": "mc", "curvature_size": 7})
]


@pytest.mark.parametrize(("group", "name", "options"), OF_PARTS, indirect=["group"], ids=str)
def test_parts_of_the_data(group, name, options):
    case = Case("regression" if group.size == 2 else "classification", options=options)
    check(group(run_in_parts, case, name), run_in_parts(case, name))


def run_in_parts(case, name):
    la, other, more = case.fitted(), case.estimator(), case.data()
    if name in ("basis", "merged"):
        other.fit(loader(*more), basis=la.basis)
        assert_identical(dict(other.basis.directions), dict(la.basis.directions))
    else:
        la.fit(loader(*more), override=False)
    if name == "merged":
        la.merge(other)
    elif name == "forgotten on one rank" and dist.is_initialized():
        la.forget(batches(*more) if dist.get_rank() == dist.get_world_size() - 1 else [])
    elif name.startswith("forgotten"):
        la.forget(loader(*more))
    la = other if name == "basis" else la
    assert la.n_data == {"basis": N_MORE, "merged": N + N_MORE, "added": N + N_MORE}.get(name, N)
    return report(la, case.problem.x_test)


@pytest.mark.parametrize("size", [13, 2000, None])
def test_weights_and_ignored_targets(two, size):
    case = Case(options={"curvature_size": size}, fit={"landmarks": True})
    check(two(run_weighted, case), run_weighted(case), same_steps=size is not None)


def run_weighted(case):
    p, weights = case.problem, torch.linspace(0.1, 2, N, dtype=F64)
    data = TensorDataset(p.x, p.y.index_fill(0, torch.arange(0, N, 4), -100), weights)
    sampler = DistributedSampler(data, shuffle=False) if dist.is_initialized() else None
    return report(case.fitted(data=DataLoader(data, 5, sampler=sampler)), p.x_test)


def test_data_that_would_leave_nothing_are_not_forgotten(two):
    for outcome, before, after in two(forget_everything):
        assert outcome.error == "ValueError"
        assert_identical(before, after)


def forget_everything():
    case = Case()
    p, la = case.problem, case.fitted()
    before = report(la, p.x_test)
    return outcome_of(la.forget, loader(p.x, p.y)), before, report(la, p.x_test)


def fit_encodings(sizes, shard, **more):
    case = Case(options={**STREAMED, "shard_directions": shard})
    x, outputs = case.problem.landmarks
    data = [Attributes({"input_ids": x, "labels": y, **more}) for x, y in batches(*case.shard(sizes))]
    la = case.estimator(Applied(lambda net, batch: net(batch.input_ids), case.problem.model))
    la.fit(data, landmarks=None if more else (Attributes({"input_ids": x, "labels": outputs}), outputs))
    return {"H": la.H, "loss": la.loss}


@pytest.mark.parametrize("shard", [False, True])
def test_mappings_keep_their_type_on_a_rank_that_has_run_out(two, shard):
    for found in two(fit_encodings, (18, 5), shard):
        assert_agree(found, fit_encodings((N,), False))


def test_what_cannot_be_sent_is_named(two):
    for outcome in two(fit_with_arrays):
        assert "more" in outcome.text
        assert "other processes" in outcome.text


def fit_with_arrays():
    return outcome_of(lambda: fit_encodings((11, 12), False, more=np.zeros(3)))


def run_in_group(kind):
    case = Case(options=SAMPLE)
    p, rank = case.problem, dist.get_rank()
    if kind == "wrapped":
        model = DistributedDataParallel(p.model)
        la = case.fitted(model)
        assert la.model is model.module
        return report(la, p.x_test)
    if kind == "named":
        data, group = None, dist.group.WORLD
    else:
        members = [[0, 2]] if kind == "some" else [[0, 1], [2]]
        groups = [(of, dist.new_group(of)) for of in members]  # collective, of all ranks
        group = next((g for of, g in groups if rank in of), None)
        if group is None:
            return None
        data = loader(p.x, p.y, num_replicas=dist.get_world_size(group), rank=dist.get_rank(group))
    return report(case.fitted(data=data, process_group=group), p.x_test)


def test_groups_of_all_ranks_and_of_some(two, three):
    expected = run(Case(options=SAMPLE))
    check(two(run_in_group, "named"), expected)
    check(two(run_in_group, "wrapped"), expected)
    first, absent, last = three(run_in_group, "some")
    assert absent is None
    check([first, last], expected)
    *pair, single = three(run_in_group, "side by side")
    check(pair, expected)
    assert_agree(single, expected)


@pytest.mark.parametrize("value", ["world", 2])
def test_other_process_groups_are_refused(two, value):
    with pytest.raises(ValueError, match="process_group"):
        build(value)
    assert_refused(two(outcome_of, build, value), "process_group")


def build(value):
    Case().estimator(process_group=value)


def test_sharded_weights_are_refused(two):
    outcomes = two(outcome_of, build_with_sharded_weights)
    if outcomes[0].error == "ImportError":
        pytest.skip("torch has no fully_shard")
    assert_refused(outcomes, "FSDP")


def build_with_sharded_weights():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    Case().estimator(fully_shard(Case().problem.model, mesh=mesh))


def test_a_plan_is_that_of_one_rank(two):
    for found in two(plan_of_rank):
        assert found == ((N + 1) // 2, 6, 7)  # of 23, 11 and 13


def plan_of_rank():
    case = Case(options=SAMPLE)
    plan = case.estimator().plan(loader(case.problem.x, case.problem.y), verbose=False)
    return plan.n_data, plan.n_landmarks, plan.n_curvature


def test_inputs_of_others_are_let_go(two):
    """While the basis is made, a rank holds M landmark inputs and its share of the curvature inputs."""
    assert two(count_inputs) == [11 + 7, 11 + 6]


def count_inputs():
    import gc

    case, seen = Case(options=SAMPLE), []
    p, la = case.problem, case.estimator()
    build = stages.basis_of

    def look(*args):
        gc.collect()
        rows = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (1, 2) and t.dtype == F64]
        seen.append(len(rows))
        return build(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "basis_of", look)
        la.fit([(x.clone(), y.clone()) for x, y in batches(p.x, p.y)][dist.get_rank() :: 2])
    return seen[0]
