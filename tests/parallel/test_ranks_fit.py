"""Fits shared by the ranks of a process group, against one process on the whole data."""

from collections import UserDict

import numpy as np
import oracle
import pytest
import test_positions
import torch
import torch.distributed as dist
from conftest import C, K, M, N, assert_close
from processes import outcome_of
from ranked import (
    F64,
    FEW,
    LAYERWISE,
    N_MORE,
    REDUCED,
    RTOL,
    Case,
    Counted,
    assert_agree,
    assert_identical,
    assert_refused,
    assert_stopped,
    batches,
    check,
    loader,
    report,
    run,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from laplace_ella import ELLALaplace
from laplace_ella.data.hashing import CURVATURE_INPUT, LANDMARK_INPUT, LANDMARK_OUTPUT, hash_keys
from laplace_ella.data.landmarks import explicit_landmarks
from laplace_ella.fitting import stages
from laplace_ella.nystrom.gram import choose_rows
from laplace_ella.nystrom.jacobian import row_source
from laplace_ella.parallel import ranks

pytest_plugins = ("groups",)
pytestmark = pytest.mark.filterwarnings(REDUCED, FEW)

SAMPLE = {"curvature_size": 13}
FITS = {
    "all inputs": Case(),
    "a sample of inputs": Case(options=SAMPLE),
    "a second pass": Case("regression", options={"curvature_size": None}),
    "sampled labels": Case(options={"curvature": "mc", "curvature_samples": 3, **SAMPLE, "seed": 5}),
    "sampled labels in a second pass": Case(options={"curvature": "mc", "curvature_size": None}),
    "more landmarks than inputs": Case("regression", options={"subsample_size": 47}),
    "every pair": Case(options={"subsample_size": 1000}),
    "one landmark": Case(options={"subsample_size": 1, "n_eigenvalues": 1}),
    "a share of the trace": Case(options={"n_eigenvalues": 0.9}),
    "more directions than rank": Case(options={"n_eigenvalues": 31}),
    "blocks of rows": Case(options={"memory_budget": 3000}),
    "blocks of two rows": Case("regression", options={"memory_budget": 1300}),
    "blocks of many rows": Case(options={"memory_budget": 16_000, "subsample_size": 47}),
    "spilled rows": Case(options={"memory_budget": 2000, "spill": "cpu", "spill_dtype": torch.float32}),
    "reverse mode": Case("regression", options={"autodiff": "reverse"}),
    "isotropic residual": Case(options={"residual": "isotropic", "residual_scale": 0.3}),
    "exact residual": Case("regression", options={"residual": "exact", "residual_scale": 0.3}),
    "layerwise prior": Case(options={"prior_precision": LAYERWISE}),
    "balanced": Case(options=SAMPLE, fit={"balanced": True}),
    "balanced pairs": Case(options={"subsample_size": 47}, fit={"balanced": True}),
    "given landmarks": Case("regression", fit={"landmarks": True}),
    "batches of one": Case(batch=1, options=SAMPLE),
    "snapshots at every batch": Case(batch=3, options=SAMPLE, fit={"val_steps": 1}),
    "snapshots at every second batch": Case(batch=3, options=SAMPLE, fit={"val_steps": 2}),
    "the first inputs": Case(options=SAMPLE, fit={"max_samples": 14}),
    "the first inputs of many": Case("regression", fit={"max_samples": 13, "n_total": 101}),
    "the first in a second pass": Case(
        options={"curvature_size": None}, fit={"max_samples": 1, "landmarks": True}
    ),
    "convolutions": Case(model="conv_batchnorm", options=SAMPLE),
    "tied weights": Case(model="tied", options=SAMPLE),
    "frozen weights": Case(model="partly_frozen", options=SAMPLE),
}


@pytest.mark.parametrize("name", FITS)
def test_two_ranks_find_what_one_process_finds(two, name):
    case = FITS[name]
    check(two(run, case), run(case), same_steps=case.options.get("curvature_size", 1) is not None)


@pytest.mark.parametrize("name", list(FITS)[::4])
def test_three_ranks_find_what_one_process_finds(three, name):
    case = FITS[name]
    check(three(run, case), run(case), same_steps=case.options.get("curvature_size", 1) is not None)


def test_cases_are_those_that_they_are_named_after():
    blocks = "blocks of rows"
    for name, kind in {blocks: blocks, "blocks of two rows": blocks, "all inputs": "kept"}.items():
        la = FITS[name].estimator()
        pairs = torch.randn(la.subsample_size, 2, dtype=F64), torch.randint(C, (la.subsample_size,))
        source = row_source(la.backend.engine, explicit_landmarks(pairs))
        assert choose_rows(source, la.backend.engine.budget()).kind == kind, name
    plain, balanced, every, second = (
        run(FITS[name])
        for name in (
            "a sample of inputs",
            "balanced",
            "snapshots at every batch",
            "snapshots at every second batch",
        )
    )
    assert not torch.equal(plain["eigenvalues"], balanced["eigenvalues"])
    assert (every["n"], second["n"]) == ([3, 6, 9, 12, 13], [6, 12, 13])


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


def run_on(case, kind):
    """Fit the data of a loader of some kind; in one process, what it yields on all ranks together."""
    p, alone = case.problem, not dist.is_initialized()
    size = 2 if alone else dist.get_world_size()
    dataset = TensorDataset(p.x, p.y)
    if kind == "batches of other lengths":
        data = loader(p.x, p.y, 8 if alone else (3, 8, 5)[dist.get_rank()])
    elif kind == "dropping":
        kept = N - N % size
        data = loader(p.x[:kept], p.y[:kept]) if alone else loader(p.x, p.y, drop_last=True)
    elif kind == "shuffling":
        sampler = DistributedSampler(
            dataset, shuffle=True, seed=3, **({"num_replicas": 1, "rank": 0} if alone else {})
        )
        sampler.set_epoch(2)
        data = DataLoader(dataset, 5, sampler=sampler)
    elif kind == "batch sampler" and not alone:
        sampler = DistributedSampler(dataset, shuffle=False)
        data = DataLoader(dataset, batch_sampler=BatchSampler(sampler, 5, drop_last=False))
    elif kind == "sampler of batches":  # of five batches, one rank has three and the other two
        whole = batches(p.x, p.y, 4)[:5]
        data = (
            whole
            if alone
            else DataLoader(whole, batch_size=None, sampler=DistributedSampler(whole, shuffle=False))
        )
    elif kind == "fewer inputs than ranks":
        data = loader(p.x[:1], p.y[:1])
    else:
        data = loader(p.x, p.y)
    return report(case.fitted(data=data), p.x_test)


@pytest.mark.parametrize(
    "kind",
    [
        "batches of other lengths",
        "dropping",
        "shuffling",
        "batch sampler",
        "sampler of batches",
        "fewer inputs than ranks",
    ],
)
def test_distributed_samplers(two, kind):
    options = {"n_eigenvalues": 2, "subsample_size": 2} if kind == "fewer inputs than ranks" else SAMPLE
    case = Case(options=options, fit={"landmarks": True} if kind == "sampler of batches" else {})
    if kind == "sampler of batches":
        case = Case(options={"curvature_size": None}, fit=case.fit)
    found, expected = two(run_on, case, kind), run_on(case, kind)
    assert expected["n_data"] == {"dropping": 22, "sampler of batches": 20, "fewer inputs than ranks": 1}.get(
        kind, N
    )
    check(found, expected, same_steps=kind not in ("sampler of batches", "fewer inputs than ranks"))


def run_on_shards(case, sizes, kind="list"):
    x, y = case.shard(sizes)
    data = batches(x, y)
    data = {
        "list": data,
        "iterator": iter(data),
        "loader": DataLoader(TensorDataset(x, y), 5) if len(x) else data,
    }[kind]
    return report(case.fitted(data=data), case.problem.x_test)


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
    return outcome_of(
        case.estimator().fit, loader(case.problem.x, case.problem.y, num_replicas=size, rank=rank)
    )


def test_first_inputs_of_other_loaders_are_divided_evenly(group):
    case, n = Case(options={"curvature_size": None}, fit={"landmarks": True}), 13
    sizes = (12, 11) if group.size == 2 else (9, 7, 7)
    found = group(run_first, case, sizes, n)
    each = [n // group.size + (r < n % group.size) for r in range(group.size)]
    p = case.problem
    parts = [(x[:k], y[:k]) for x, y, k in zip(p.x.split(sizes), p.y.split(sizes), each)]
    check([f for f, _ in found], report(case.fitted(data=parts), p.x_test), same_steps=False)
    assert [asked for _, asked in found] == [2 * -(-k // 5) for k in each]  # two passes


def run_first(case, sizes, n):
    la, data = case.estimator(), Counted(batches(*case.shard(sizes)))
    la.fit(data, max_samples=n, landmarks=case.problem.landmarks)
    return report(la, case.problem.x_test), data.asked


@pytest.mark.parametrize("name", ["added", "basis", "merged", "forgotten", "forgotten on one rank"])
@pytest.mark.parametrize(
    ("group", "likelihood"), [(2, "regression"), (3, "classification")], indirect=["group"]
)
def test_parts_of_the_data(group, name, likelihood):
    case = Case(likelihood, options={"curvature_size": 7} if name == "basis" else {})
    check(group(run_in_parts, case, name), run_in_parts(case, name))


@pytest.mark.parametrize(
    "options",
    [{"curvature_size": 7}, {"curvature_size": None}, {"curvature": "mc", "curvature_size": 7}],
    ids=str,
)
def test_added_data(two, options):
    case = Case(options=options)
    check(two(run_in_parts, case, "added"), run_in_parts(case, "added"))


def run_in_parts(case, name):
    la, other, more = case.fitted(), case.estimator(), case.data()
    if name in ("basis", "merged"):
        other.fit(loader(*more), basis=la.basis)
        assert_identical(dict(other.basis.directions), dict(la.basis.directions))
    if name == "merged":
        la.merge(other)
    if name == "added" or name.startswith("forgotten"):
        la.fit(loader(*more), override=False)
    if name == "forgotten" or (
        name != "added" and not dist.is_initialized() and name.startswith("forgotten")
    ):
        la.forget(loader(*more))
    elif name.startswith("forgotten"):
        last = dist.get_rank() == dist.get_world_size() - 1
        la.forget(batches(*more) if last else [])
    la = other if name == "basis" else la
    assert la.n_data == {"basis": N_MORE, "merged": N + N_MORE, "added": N + N_MORE}.get(name, N)
    return report(la, case.problem.x_test)


def test_data_that_would_leave_nothing_are_not_forgotten(two):
    for outcome, before, after in two(forget_everything):
        assert outcome.error == "ValueError"
        assert_identical(before, after)


def forget_everything():
    case = Case()
    p, la = case.problem, case.fitted()
    before = report(la, p.x_test)
    return outcome_of(la.forget, loader(p.x, p.y)), before, report(la, p.x_test)


class Encoding(UserDict):
    """A mapping whose entries are attributes too."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class OfEncodings(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Case().problem.model

    def forward(self, batch):
        return self.net(batch.input_ids)


def fit_encodings(sizes, shard, **more):
    case = Case(options={"curvature_size": None, "shard_directions": shard})
    x, outputs = case.problem.landmarks
    data = [Encoding({"input_ids": x, "labels": y, **more}) for x, y in batches(*case.shard(sizes))]
    la = case.estimator(OfEncodings())
    la.fit(data, landmarks=None if more else (Encoding({"input_ids": x, "labels": outputs}), outputs))
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
    if kind == "named":
        return report(case.fitted(process_group=dist.group.WORLD), p.x_test)
    if kind == "wrapped":
        model = DistributedDataParallel(p.model)
        la = case.fitted(model)
        assert la.model is model.module
        return report(la, p.x_test)
    if kind == "apart":
        return report(case.fitted(data=batches(*case.shard((17, 6))), process_group=None), p.x_test)
    members = [[0, 2]] if kind == "some" else [[0, 1], [2]]
    groups = [dist.new_group(of) for of in members]  # collective, of all ranks
    which = [i for i, of in enumerate(members) if rank in of]
    if not which:
        return None
    group = groups[which[0]]
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


def test_every_rank_can_work_alone_on_data_of_its_own(two):
    case = Case(options=SAMPLE)
    p = case.problem
    for found, x, y in zip(two(run_in_group, "apart"), p.x.split((17, 6)), p.y.split((17, 6))):
        assert_agree(found, report(case.fitted(data=batches(x, y)), p.x_test))


@pytest.mark.parametrize("value", ["world", 2])
def test_other_process_groups_are_refused(two, value):
    with pytest.raises(ValueError, match="process_group"):
        Case().estimator(process_group=value)
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
