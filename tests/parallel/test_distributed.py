"""Fits and tuning shared by the ranks of a process group, against one process on the whole data."""

from __future__ import annotations

import os
import pickle
import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import oracle
import pytest
import test_positions
import torch
import torch.distributed as dist
import torchmetrics
from conftest import B, C, K, M, N, Problem, assert_close, make_problem
from helpers import as_tuple
from processes import Group, Outcome, outcome_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

import laplace_ella
from laplace_ella import ELLALaplace
from laplace_ella.data.hashing import CURVATURE_INPUT, LANDMARK_INPUT, LANDMARK_OUTPUT, hash_keys
from laplace_ella.data.validation import explicit_landmarks
from laplace_ella.nystrom.gram import KeptRows, SampleBlocks, WeightBlocks, choose_rows

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")

F64 = torch.float64
N_VAL, N_MORE = 17, 19
LAYERWISE = torch.tensor([0.2, 1.7, 0.6, 3.1], dtype=F64)
RTOL = 1e-6


# ---------------------------------------------------------------------------- groups of processes


class Groups:
    """Groups that tests share; one that a test broke is started anew."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept, self.started = folder, {}, 0

    def get(self, size: int) -> Group:
        if size not in self.kept or not self.kept[size].alive:
            self.started += 1
            self.kept[size] = Group(size, self.folder / f"group-{self.started}")
        return self.kept[size]

    def check(self, size: int) -> None:
        group = self.kept[size]
        if group.alive and not group.in_step():
            group.kill()
            pytest.fail("The ranks are out of step after this test.")


@pytest.fixture(scope="session")
def groups(tmp_path_factory) -> Iterator[Groups]:
    groups = Groups(tmp_path_factory.mktemp("groups"))
    yield groups
    for group in groups.kept.values():
        group.kill()


@pytest.fixture
def two(groups) -> Iterator[Group]:
    yield groups.get(2)
    groups.check(2)


@pytest.fixture
def three(groups) -> Iterator[Group]:
    yield groups.get(3)
    groups.check(3)


@pytest.fixture(params=[2, 3])
def group(request, groups) -> Iterator[Group]:
    yield groups.get(request.param)
    groups.check(request.param)


# Each likelihood with one size of a group: all four pairs would find little more.
PAIRS = pytest.mark.parametrize(
    ("group", "likelihood"), [(2, "regression"), (3, "classification")], indirect=["group"]
)


def on_two_and_some_on_three(names: Iterable[str]) -> Any:
    """Every case with classification on two ranks, every second one with regression on three."""
    cases = [(name, 2, "classification") for name in names]
    cases += [(name, 3, "regression") for name in list(names)[::2]]
    return pytest.mark.parametrize(("name", "group", "likelihood"), cases, indirect=["group"])


@pytest.fixture
def fresh(tmp_path) -> Iterator[Any]:
    """Start groups in which ranks may die."""
    made: list[Group] = []

    def make(size: int, timeout: float = 3.0) -> Group:
        made.append(Group(size, tmp_path / f"fresh-{len(made)}", timeout))
        return made[-1]

    yield make
    for group in made:
        group.kill()


# ---------------------------------------------------------------------------- one case, in a group or alone


@dataclass(frozen=True)
class Case:
    """A fit: what is passed to the constructor, and to ``fit``."""

    likelihood: str = "classification"
    model: str = "mlp"
    options: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    batch: int = 5

    @property
    def problem(self) -> Problem:
        p = make_problem("mlp" if self.model == "confident" else self.model, self.likelihood)
        if self.model == "confident":  # whose logits are too large
            with torch.no_grad():
                p.model[-1].weight.mul_(6)
        return p

    def estimator(self, model: nn.Module | None = None, **more: Any) -> ELLALaplace:
        p = self.problem
        options = {"subsample_size": M, "n_eigenvalues": K, **self.options, **more}
        return ELLALaplace(p.model if model is None else model, **p.options(**options))

    def arguments(self) -> dict[str, Any]:
        named = {"landmarks": self.problem.landmarks, "val_loader": loader(*self.validation())}
        return {k: named[k] if k in named and v is True else v for k, v in self.fit.items()}

    def fitted(self, model: nn.Module | None = None, **more: Any) -> ELLALaplace:
        p, la = self.problem, self.estimator(model, **more)
        la.fit(loader(p.x, p.y, self.batch), **self.arguments())
        return la

    def data(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs of another sample, with targets that the model predicts at times."""
        p, generator = self.problem, torch.Generator().manual_seed(seed)
        x = torch.randn(n, *p.x.shape[1:], generator=generator, dtype=F64)
        noise = torch.randn(n, C, generator=generator, dtype=F64)
        f = oracle.outputs(p.model, x) + (4 if self.likelihood == "classification" else 1) * noise
        return x, f.argmax(1) if self.likelihood == "classification" else f

    def validation(self) -> tuple[Tensor, Tensor]:
        return self.data(N_VAL, 11)


def loader(x: Tensor, y: Tensor, batch: int = 5, **sampling: Any) -> DataLoader:
    """Load the whole data in one process, this rank's part of them in a group."""
    dataset = TensorDataset(x, y)
    if not dist.is_initialized():
        return DataLoader(dataset, batch)
    sampler = DistributedSampler(dataset, **{"shuffle": False, **sampling})
    return DataLoader(dataset, batch, sampler=sampler)


def batches(x: Tensor, y: Tensor, batch: int = 5) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(batch), y.split(batch))) if len(x) else []


def predictions(la: ELLALaplace, x: Tensor) -> dict[str, Any]:
    calls: dict[str, dict[str, Any]] = {"probit": {}, "mc": {"link_approx": "mc", "n_samples": 32}}
    if la.likelihood == "regression":
        calls = {"moments": {}, "joint": {"joint": True}}
    found = {f"{k} {i}": t for k, v in calls.items() for i, t in enumerate(as_tuple(la(x, **v)))}
    found["features"], found["outputs"] = la.features(x)
    return found


def posterior_of(la: ELLALaplace) -> dict[str, Any]:
    found = {"n": [n for n, _ in la.snapshots], **{f"snapshot {n}": G for n, G in la.snapshots}}
    for name in ("H", "loss", "n_data", "n_predictions", "n_outputs", "n_curvature", "mean"):
        found[name] = getattr(la, name)
    for name in ("prior_precision", "temperature", "sigma_noise", "residual_scale", "logit_scale"):
        found[name] = getattr(la, name)
    for name in ("eigenvalues", "spectrum", "trace", "rank", "n_landmarks"):
        found[name] = getattr(la.basis, name)
    found["evidence"] = la.log_marginal_likelihood().detach()
    found["history"] = la.fit_history_
    return found


def report(la: ELLALaplace, x: Tensor) -> dict[str, Any]:
    """Return all that a fit leaves."""
    return {
        **posterior_of(la),
        **{f"directions of {k}": v for k, v in la.basis.directions.items()},
        **predictions(la, x),
        "samples": la.functional_samples(x, n_samples=3, generator=torch.Generator().manual_seed(5)),
    }


def assert_identical(left: Any, right: Any, name: str = "value") -> None:
    """Require the same bits."""
    assert type(left) is type(right), name
    if isinstance(left, dict):
        assert left.keys() == right.keys(), name
        for k in left:
            assert_identical(left[k], right[k], f"{name}: {k}")
    elif isinstance(left, Tensor):
        assert torch.equal(left, right), f"{name}: differs by up to {(left - right).abs().max()}"
    else:
        assert left == right, name


def assert_agree(found: Any, expected: Any, name: str = "value") -> None:
    """Require numbers that differ by rounding only."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for k in expected:
            assert_agree(found[k], expected[k], f"{name}: {k}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), name
        for i, (a, e) in enumerate(zip(found, expected)):
            assert_agree(a, e, f"{name} {i}")
    elif isinstance(expected, (Tensor, float)):
        assert_close(torch.as_tensor(found), torch.as_tensor(expected), RTOL, name=name)
    else:
        assert found == expected, name


def check(found: list[dict[str, Any]], expected: dict[str, Any], same_steps: bool = True) -> None:
    """Require the same bits on all ranks, and what one process found up to rounding.

    ``same_steps=False``: where batches are others, so are the n of all snapshots but the last.
    """
    for rank, other in enumerate(found[1:], start=1):
        assert_identical(other, found[0], f"rank {rank} against rank 0")
    if same_steps:
        assert_agree(found[0], expected)
    else:
        assert found[0]["n"][-1] == expected["n"][-1]
        assert_identical(found[0][f"snapshot {found[0]['n'][-1]}"], found[0]["H"])
        assert_agree(without_steps(found[0]), without_steps(expected))


def without_steps(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if not k.startswith("snapshot") and k not in ("n", "history")}


def run(case: Case) -> dict[str, Any]:
    return report(case.fitted(), case.problem.x_test)


# ---------------------------------------------------------------------------- fits of a distributed sampler

OPTIONS: dict[str, dict[str, Any]] = {
    "all inputs": {},
    "a sample of inputs": {"curvature_size": 13},
    "a second pass": {"curvature_size": None},
    "another seed": {"seed": 5, "curvature_size": 13},
    "sampled labels": {"curvature": "mc", "curvature_samples": 3, "curvature_size": 13},
    "sampled labels in a second pass": {"curvature": "mc", "curvature_size": None},
    "more landmarks than inputs": {"subsample_size": 47},
    "every pair": {"subsample_size": 1000},
    "fewer landmarks than ranks": {"subsample_size": 2, "n_eigenvalues": 2},
    "one landmark": {"subsample_size": 1, "n_eigenvalues": 1},
    "a share of the trace": {"n_eigenvalues": 0.9},
    "more directions than rank": {"n_eigenvalues": 31},
    "blocks of rows": {"memory_budget": 3000},
    "blocks of two rows": {"memory_budget": 1300},
    "blocks of weights": {"memory_budget": 4000},
    "blocks of weights of many rows": {"memory_budget": 16_000, "subsample_size": 47},
    "spilled rows": {"memory_budget": 2000, "spill": "cpu", "spill_dtype": torch.float32},
    "reverse mode": {"autodiff": "reverse"},
    "isotropic residual": {"residual": "isotropic", "residual_scale": 0.3},
    "exact residual": {"residual": "exact", "residual_scale": 0.3},
    "layerwise prior": {"prior_precision": LAYERWISE},
}
REDUCED = "ignore:(n_eigenvalues|subsample_size) was reduced"
FEW = "ignore:curvature='mc' estimates G"


@pytest.mark.filterwarnings(REDUCED, FEW)
@on_two_and_some_on_three(OPTIONS)
def test_a_group_finds_what_one_process_finds(group, name, likelihood):
    case = Case(likelihood, options=OPTIONS[name])
    check(group(run, case), run(case), same_steps=OPTIONS[name].get("curvature_size", 1) is not None)


def test_budgets_are_those_of_the_kinds_they_are_named_after():
    kinds = {"blocks of rows": SampleBlocks, "blocks of two rows": SampleBlocks, "all inputs": KeptRows}
    kinds |= {"blocks of weights": WeightBlocks, "blocks of weights of many rows": WeightBlocks}
    for name, kind in kinds.items():
        la = Case(options=OPTIONS[name]).estimator()
        size = la.subsample_size
        pairs = torch.randn(size, 2, dtype=F64), torch.randint(C, (size,))
        source = la.backend.row_source(explicit_landmarks(pairs))
        assert type(choose_rows(source, la.backend.engine.budget())) is kind, name


@pytest.mark.parametrize("options", [{}, {"subsample_size": 47}], ids=["distinct inputs", "pairs"])
def test_balanced_landmarks(group, options):
    case = Case(options=options, fit={"balanced": True})
    expected = run(case)
    assert not torch.equal(expected["eigenvalues"], run(Case(options=options))["eigenvalues"])
    check(group(run, case), expected)


@PAIRS
@pytest.mark.parametrize("options", [{"curvature_size": 13}, {"curvature_size": None}], ids=["sample", "all"])
def test_given_landmarks(group, likelihood, options):
    case = Case(likelihood, options=options, fit={"landmarks": True})
    check(group(run, case), run(case), same_steps=options["curvature_size"] is not None)


@pytest.mark.parametrize("batch", [1, 7, N])
def test_batch_sizes(group, batch):
    case = Case(batch=batch, options={"curvature_size": 13})
    found, expected = group(run, case), run(case)
    if batch == N:  # no rank has so many, so that there is a snapshot more
        longest = -(-N // group.size)
        assert found[0]["n"] == [longest, 13]
    check(found, expected, same_steps=batch < N)


@pytest.mark.parametrize("val_steps", [1, 2])
def test_snapshots_at_every_so_many_batches(group, val_steps):
    case = Case(batch=3, options={"curvature_size": 13}, fit={"val_steps": val_steps})
    expected = run(case)
    assert expected["n"] == ([3, 6, 9, 12, 13] if val_steps == 1 else [6, 12, 13])
    check(group(run, case), expected)


@pytest.mark.parametrize("model", ["conv_batchnorm", "tied", "partly_frozen"])
def test_other_models(group, model):
    case = Case(model=model, options={"curvature_size": 13})
    check(group(run, case), run(case))


@pytest.mark.filterwarnings(
    "ignore:The best (prior_precision|temperature), ", "ignore:No setting predicts better"
)
@pytest.mark.parametrize("likelihood", test_positions.LIKELIHOODS)
def test_outputs_with_positions(two, likelihood):
    check(two(run_sequence, likelihood), run_sequence(likelihood))


def run_sequence(likelihood: str) -> dict[str, Any]:
    case = test_positions.Case("sequence", likelihood)
    la = ELLALaplace(case.model, likelihood, case.sigma, n_eigenvalues=K, subsample_size=29, temperature=None)
    la.fit(loader(case.x, case.y))
    assert la.n_predictions == la.n_data * case.L
    la.optimize_prior_precision(
        method="gridsearch", val_loader=loader(case.x_val, case.y_val), link_approx="probit", grid_size=5
    )
    return report(la, case.x_test)


def test_batches_of_other_lengths_on_each_rank(two):
    found = two(run_with_batches, [3, 8])
    check(found, run(Case(batch=8, options={"curvature_size": 13})))


def run_with_batches(sizes: list[int]) -> dict[str, Any]:
    return run(Case(batch=sizes[dist.get_rank()], options={"curvature_size": 13}))


def test_a_sampler_that_drops_what_is_left_over(group):
    kept = N - N % group.size
    case = Case(options={"curvature_size": 13})
    p, la = case.problem, case.estimator()
    la.fit(batches(p.x[:kept], p.y[:kept]))
    assert la.n_data < N
    check(group(run_dropping_the_last, case), report(la, p.x_test))


def run_dropping_the_last(case: Case) -> dict[str, Any]:
    p, la = case.problem, case.estimator()
    la.fit(loader(p.x, p.y, drop_last=True))
    return report(la, p.x_test)


def test_a_shuffling_sampler_is_the_order_it_deals_in(group):
    case = Case(options={"curvature_size": 13})
    p, la = case.problem, case.estimator()
    sampler = DistributedSampler(p.x, 1, 0, shuffle=True, seed=3)
    sampler.set_epoch(2)
    order = torch.tensor(list(sampler))
    la.fit(batches(p.x[order], p.y[order]))
    expected = report(la, p.x_test)
    assert not torch.equal(expected["eigenvalues"], run(case)["eigenvalues"])
    check(group(run_shuffled, case), expected)


def run_shuffled(case: Case) -> dict[str, Any]:
    p, la = case.problem, case.estimator()
    shard = loader(p.x, p.y, shuffle=True, seed=3)
    shard.sampler.set_epoch(2)
    la.fit(shard)
    return report(la, p.x_test)


def test_a_distributed_sampler_in_a_batch_sampler(group):
    case = Case(options={"curvature_size": 13})
    check(group(run_with_batch_sampler, case), run(case))


def run_with_batch_sampler(case: Case) -> dict[str, Any]:
    p, la = case.problem, case.estimator()
    dataset = TensorDataset(p.x, p.y)
    sampler = BatchSampler(DistributedSampler(dataset, shuffle=False), 5, drop_last=False)
    la.fit(DataLoader(dataset, batch_sampler=sampler))
    return report(la, p.x_test)


def test_fewer_inputs_than_ranks(three):
    case = Case(options={"n_eigenvalues": 2})
    p, la = case.problem, case.estimator(subsample_size=2)
    la.fit(batches(p.x[:2], p.y[:2]))
    check(three(run_on_few, case), report(la, p.x_test), same_steps=False)


def run_on_few(case: Case) -> dict[str, Any]:
    p, la = case.problem, case.estimator(subsample_size=2)
    la.fit(loader(p.x[:2], p.y[:2]))
    return report(la, p.x_test)


def test_fitting_twice_gives_the_same_bits(two):
    for first, second in two(run_twice, Case(options={"curvature_size": 13})):
        assert_identical(first, second)


def run_twice(case: Case) -> list[dict[str, Any]]:
    return [run(case), run(case)]


# ---------------------------------------------------------------------------- other loaders

SHARDS = {2: [(17, 6), (23, 0), (0, 23)], 3: [(11, 5, 7), (0, 23, 0), (1, 0, 22)]}


def split(case: Case, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    p = case.problem
    return list(zip(p.x.split(sizes), p.y.split(sizes)))


def run_on_shards(case: Case, sizes: tuple[int, ...], kind: str = "list") -> dict[str, Any]:
    la, mine = case.estimator(), split(case, sizes)[dist.get_rank()]
    data: Any = batches(*mine)
    if kind == "iterator":
        data = iter(data)
    elif kind == "loader":
        data = DataLoader(TensorDataset(*mine), 5)
    la.fit(data, **case.arguments())
    return report(la, case.problem.x_test)


@PAIRS
@pytest.mark.parametrize("curvature_size", [None, 2000])
@pytest.mark.parametrize("which", range(3))
def test_given_landmarks_with_any_shards(group, likelihood, which, curvature_size):
    case = Case(likelihood, options={"curvature_size": curvature_size}, fit={"landmarks": True})
    found = group(run_on_shards, case, SHARDS[group.size][which])
    check(found, run(case), same_steps=False)


@pytest.mark.parametrize("kind", ["list", "iterator", "loader"])
def test_unknown_samplers_draw_by_rank_and_place(group, kind):
    """Row j of rank r has the key of (seed, (r << 40) + j)."""
    case, n = Case(options={"curvature_size": 13, "seed": 3}), 13
    sizes = SHARDS[group.size][0]
    p, found = case.problem, group(run_on_shards, case, sizes, kind)
    positions = torch.cat([(r << 40) + torch.arange(size) for r, size in enumerate(sizes)])
    drawn = hash_keys(3, LANDMARK_INPUT, positions).argsort()[:M].sort().values
    outputs = hash_keys(3, LANDMARK_OUTPUT, positions[drawn]) % C
    la = case.estimator()
    la.fit(p.loader(), landmarks=(p.x[drawn], outputs))
    order = hash_keys(3, CURVATURE_INPUT, positions).argsort()
    sample = {}
    for size in (5, 10, n):
        phi, f = la.features(p.x[order[:size]])
        sample[size] = N / size * oracle.curvature(phi, f, p.likelihood)
    for one in found:
        assert_identical(one, found[0])
        assert_close(one["eigenvalues"], la.basis.eigenvalues, RTOL)
        assert_close(one["loss"], la.loss, RTOL)
        assert one["n"] == [5, 10, 13]
        for size, G in sample.items():
            assert_close(one[f"snapshot {size}"], G, RTOL, name=f"n={size}")
        assert_identical(one["H"], one[f"snapshot {n}"])


def test_an_empty_shard_may_have_no_landmarks(two):
    case = Case(options={"curvature_size": 13})
    found = two(run_on_shards, case, (N, 0))
    check(found, run(case))  # rank 0 counts as one process does


def test_no_data_on_any_rank_is_an_error_on_all(two):
    for outcome in two(outcome_of, run_on_shards, Case(), (0, 0, 23)):
        assert outcome.error == "ValueError"
        assert "no data" in outcome.text


@pytest.mark.parametrize("wrong", ["replicas", "rank"])
def test_a_sampler_of_another_group_is_refused(two, wrong):
    for outcome in two(fit_with_wrong_sampler, wrong, (0, 1)):
        assert outcome.error == "ValueError"
        assert "DistributedSampler" in outcome.text


@pytest.mark.parametrize("wrong", ["replicas", "rank"])
def test_a_sampler_of_another_group_on_one_rank_only(two, wrong):
    right, refused = two(fit_with_wrong_sampler, wrong, (1,))
    assert refused.error == "ValueError"
    assert right.error == "RankError"
    assert "DistributedSampler" in right.text


def fit_with_wrong_sampler(wrong: str, ranks: tuple[int, ...]) -> Outcome:
    case, rank, size = Case(), dist.get_rank(), dist.get_world_size()
    if rank in ranks and wrong == "rank":
        rank = size - 1 - rank
    elif rank in ranks:
        size += 1
    p = case.problem
    shard = loader(p.x, p.y, num_replicas=size, rank=rank)
    return outcome_of(case.estimator().fit, shard)


# ---------------------------------------------------------------------------- parts of the data


@pytest.mark.parametrize("n", [1, 13, 22, 100])
@pytest.mark.parametrize("curvature_size", [7, None])
def test_first_inputs_of_a_distributed_sampler(three, n, curvature_size):
    case = Case(options={"curvature_size": curvature_size}, fit={"max_samples": n, "landmarks": True})
    found, expected = three(run, case), run(case)
    assert expected["n_data"] == min(n, N)
    check(found, expected, same_steps=curvature_size is not None)


@pytest.mark.parametrize("size", [N, 101])
def test_data_of_which_a_part_is_read(group, size):
    case = Case("regression", fit={"max_samples": 13, "n_total": size})
    found, expected = group(run, case), run(case)
    assert expected["n_data"] == size
    check(found, expected)


def test_fewer_in_total_than_were_read_is_refused_on_all_ranks(two):
    for outcome in two(outcome_of, run, Case(fit={"n_total": N - 1})):
        assert outcome.error == "ValueError"
        assert "n_total" in outcome.text


class Counted:
    """Counts the batches that are asked for."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.asked = batches, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.asked += 1
            yield batch


def test_first_inputs_of_other_loaders_are_divided_evenly(group):
    case, n = Case(options={"curvature_size": None}), 13
    sizes = (12, 11) if group.size == 2 else (9, 7, 7)
    found = group(run_first, case, sizes, n)
    each = [n // group.size + (r < n % group.size) for r in range(group.size)]
    p, la = case.problem, case.estimator()
    parts = [(x[:k], y[:k]) for (x, y), k in zip(split(case, sizes), each)]
    la.fit(parts, landmarks=p.landmarks)
    check([f for f, _ in found], report(la, p.x_test), same_steps=False)
    assert [asked for _, asked in found] == [2 * -(-k // 5) for k in each]  # two passes


def run_first(case: Case, sizes: tuple[int, ...], n: int) -> tuple[dict[str, Any], int]:
    la, mine = case.estimator(), Counted(batches(*split(case, sizes)[dist.get_rank()]))
    la.fit(mine, max_samples=n, landmarks=case.problem.landmarks)
    return report(la, case.problem.x_test), mine.asked


# ---------------------------------------------------------------------------- adding and removing data


@PAIRS
@pytest.mark.parametrize("options", [{}, {"curvature_size": 7}, {"curvature_size": None}], ids=str)
def test_added_data(group, likelihood, options):
    case = Case(likelihood, options=options)
    check(group(run_added, case), run_added(case))


@pytest.mark.filterwarnings(FEW)
def test_added_data_with_sampled_labels(group):
    case = Case(options={"curvature": "mc", "curvature_size": 7})
    check(group(run_added, case), run_added(case))


def run_added(case: Case) -> dict[str, Any]:
    la = case.fitted()
    la.fit(loader(*case.data(N_MORE, 12)), override=False)
    assert la.n_data == N + N_MORE
    return report(la, case.problem.x_test)


@PAIRS
def test_a_basis_of_an_earlier_fit(group, likelihood):
    case = Case(likelihood, options={"curvature_size": 7})
    check(group(run_with_basis, case), run_with_basis(case))


def run_with_basis(case: Case) -> dict[str, Any]:
    la, other = case.fitted(), case.estimator()
    other.fit(loader(*case.data(N_MORE, 12)), basis=la.basis)
    assert_identical(dict(other.basis.directions), dict(la.basis.directions))
    return report(other, case.problem.x_test)


@PAIRS
def test_merged_fits(group, likelihood):
    case = Case(likelihood)
    check(group(run_merged, case), run_merged(case))


def run_merged(case: Case) -> dict[str, Any]:
    la, other = case.fitted(), case.estimator()
    other.fit(loader(*case.data(N_MORE, 12)), basis=la.basis)
    la.merge(other)
    assert la.n_data == N + N_MORE
    return report(la, case.problem.x_test)


@PAIRS
@pytest.mark.parametrize("even", [True, False])
def test_forgotten_data(group, likelihood, even):
    case = Case(likelihood)
    check(group(run_forgotten, case, even), run_forgotten(case, even))


def run_forgotten(case: Case, even: bool) -> dict[str, Any]:
    la, more = case.fitted(), case.data(N_MORE, 12)
    la.fit(loader(*more), override=False)
    if even or not dist.is_initialized():
        la.forget(loader(*more))
    else:  # all of it on the last rank
        last = dist.get_rank() == dist.get_world_size() - 1
        la.forget(batches(*more) if last else [])
    assert la.n_data == N
    return report(la, case.problem.x_test)


def test_data_that_would_leave_nothing_are_not_forgotten(two):
    for outcome, before, after in two(forget_everything):
        assert outcome.error == "ValueError"
        assert_identical(before, after)


def forget_everything() -> tuple[Outcome, Any, Any]:
    case = Case()
    p, la = case.problem, case.fitted()
    before = report(la, p.x_test)
    return outcome_of(la.forget, loader(p.x, p.y)), before, report(la, p.x_test)


# ---------------------------------------------------------------------------- tuning and novelty


@PAIRS
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("temperature", [None, 1.3])
@pytest.mark.parametrize("curvature_size", [13, 2000])
def test_early_stopping(group, likelihood, temperature, curvature_size):
    options = {"temperature": temperature, "curvature_size": curvature_size}
    fit = {"val_loader": True, "val_steps": 1}
    case = Case(likelihood, "confident", options, fit, batch=3)
    expected = run(case)
    assert len(set(expected["history"]["val_nll"])) == len(expected["n"]) > 4
    check(group(run, case), expected)


class Brier(torchmetrics.Metric):
    """Mean squared distance of probabilities to labels, weighted by class."""

    higher_is_better = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=F64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=F64), dist_reduce_fx="sum")

    def update(self, p: Tensor, y: Tensor) -> None:
        weights = 1.0 + y.double()
        self.total += (weights * (p.double() - nn.functional.one_hot(y, C)).square().sum(1)).sum()
        self.count += weights.sum()

    def compute(self) -> Tensor:
        return self.total / self.count


def miscalibration(p: Tensor, y: Tensor) -> float:
    """A loss of all inputs at once, which no mean over batches or ranks is."""
    confidence, label = p.max(1)
    return 0.1 + abs(float(confidence.double().mean()) - float((label == y).double().mean()))


def wide(means: Tensor, covariances: Tensor, targets: Tensor) -> float:
    variances = covariances.diagonal(dim1=1, dim2=2)
    return float(((targets - means).square() / (variances + 0.5) + (variances + 0.5).log()).sum(1).max())


def calibration_error() -> torchmetrics.Metric:
    return torchmetrics.classification.MulticlassCalibrationError(C, n_bins=5)


GRIDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "probit": ("classification", {}, {}),
    "mc": ("classification", {}, {"link_approx": "mc", "n_samples": 32}),
    "prior alone": ("classification", {"temperature": 50.0}, {"grid_size": 301}),
    "regression": ("regression", {}, {}),
    "callable": ("classification", {"temperature": 50.0}, {"loss": miscalibration, "grid_size": 301}),
    "callable of moments": ("regression", {"temperature": 5e3}, {"loss": wide}),
    "metric of sums": ("classification", {"temperature": 50.0}, {"loss": Brier}),
    "metric of lists": ("classification", {"temperature": 50.0}, {"loss": calibration_error}),
    "nn": (
        "classification",
        {"temperature": 50.0},
        {"pred_type": "nn", "link_approx": "mc", "n_samples": 7, "grid_size": 9},
    ),
    "residual": ("classification", {"residual": "isotropic"}, {}),
    "small memory": ("classification", {"memory_budget": 3000}, {}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", GRIDS)
def test_grid_search(two, name):
    likelihood, options, arguments = GRIDS[name]
    case = Case(likelihood, "confident", options={"temperature": None, **options})
    expected, *of_parts = [run_grid(case, arguments, part) for part in (None, (0, 2), (1, 2))]
    chosen = ("prior_precision", "temperature")
    assert any(expected[k] != part[k] for k in chosen for part in of_parts)
    check(two(run_grid, case, arguments), expected)


def run_grid(case: Case, arguments: dict[str, Any], part: tuple[int, int] | None = None) -> dict[str, Any]:
    """With ``part``, a rank of so many, on the validation data of that rank alone."""
    la, (x, y) = case.fitted(), case.validation()
    tune(la, case, arguments, batches(x[part[0] :: part[1]], y[part[0] :: part[1]], 3) if part else None)
    return report(la, case.problem.x_test)


def tune(la: ELLALaplace, case: Case, arguments: dict[str, Any], val: Any = None) -> None:
    loss = arguments.get("loss")
    if loss in (Brier, calibration_error):
        arguments = {**arguments, "loss": loss()}
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=loader(*case.validation(), 3) if val is None else val,
        **{"grid_size": 13, "log_prior_prec_min": -3, "log_prior_prec_max": 3, **arguments},
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["probit", "regression", "callable", "metric of lists", "nn"])
def test_grid_search_on_any_shards(three, name):
    likelihood, options, arguments = GRIDS[name]
    case = Case(likelihood, "confident", options={"temperature": None, **options})
    found = three(run_grid_on_shards, case, arguments)
    check(found, run_grid(case, arguments))


def run_grid_on_shards(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    la, (x, y) = case.fitted(), case.validation()
    sizes = (4, 0, 13)
    part = list(zip(x.split(sizes), y.split(sizes)))[dist.get_rank()]
    tune(la, case, arguments, val=batches(*part, 3))
    return report(la, case.problem.x_test)


JOINT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "default": ("classification", {}, {}),
    "regression": ("regression", {}, {}),
    "directions and inputs": (
        "classification",
        {},
        {"search": {"temperature": None, "n_eigenvalues": None, "curvature_size": None}},
    ),
    "residual": (
        "classification",
        {"residual": "isotropic"},
        {"search": {"temperature": [0.1, 1.0, 10.0], "residual_scale": [1e-3, 0.1]}},
    ),
    "callable": ("classification", {}, {"search": ["temperature"], "loss": miscalibration}),
    "metric": ("classification", {}, {"search": ["temperature"], "loss": Brier}),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", JOINT)
def test_joint_search(two, name):
    likelihood, options, arguments = JOINT[name]
    case = Case(likelihood, "confident", options={"temperature": None, **options})
    check(two(run_joint, case, arguments), run_joint(case, arguments))


def run_joint(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    la, loss = case.fitted(), arguments.get("loss")
    if loss is Brier:
        arguments = {**arguments, "loss": loss()}
    arguments = {"link_approx": "probit", **arguments}
    result = la.optimize_hyperparameters(loader(*case.validation(), 3), **arguments)
    return {
        **report(la, case.problem.x_test),
        "best": list(map(float, astuple(result.best))),
        "score": result.score,
        "table": [[*map(float, astuple(setting)), score] for setting, score in result.table],
        "methods": {k: None if b is None else b.score for k, b in result.baselines.items()},
        "n_inputs": result.n_inputs,
    }


def test_novelty(group):
    case = Case(options={"residual": "isotropic"})
    check(group(run_novelty, case, True), run_novelty(case, True))


def test_novelty_on_any_shards_without_labels(group):
    case = Case()
    check(group(run_novelty, case, False), run_novelty(case, False))


def run_novelty(case: Case, even: bool) -> dict[str, Any]:
    la, (x, y) = case.fitted(), case.validation()
    if even or not dist.is_initialized():
        la.calibrate_novelty(loader(x, y, 3))
    else:  # too few on one rank to calibrate by
        sizes = (1, N_VAL - 1, *(dist.get_world_size() - 2) * (0,))
        la.calibrate_novelty(x.split(sizes)[dist.get_rank()].split(3))
    return {"reference": la._novelty_reference, "novelty": la.novelty(case.problem.x_test)}


# ---------------------------------------------------------------------------- which processes


def test_one_rank_can_work_alone(two):
    case = Case(options={"curvature_size": None, "temperature": None}, fit={"val_loader": True})
    found, nothing = two(run_alone_on_rank_0, case)
    assert nothing is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = run_all_steps(case)
    assert_agree(found, expected)


def run_alone_on_rank_0(case: Case) -> dict[str, Any] | None:
    if dist.get_rank():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run_all_steps(case, process_group=None)


def run_all_steps(case: Case, **more: Any) -> dict[str, Any]:
    p, la = case.problem, case.estimator(**more)
    val = batches(*case.validation(), 3)
    la.fit(batches(p.x, p.y), val_loader=val)
    other = case.estimator(**more)  # without an early stop, after which nothing can be forgotten
    other.fit(batches(p.x, p.y))
    other.fit(batches(*case.data(N_MORE, 12)), override=False)
    other.forget(batches(*case.data(N_MORE, 12)))
    found = {"fitted": report(la, p.x_test), "forgotten": report(other, p.x_test)}
    for loss in (None, miscalibration, Brier):
        tune(la, case, {"loss": loss}, val)
        found[getattr(loss, "__name__", "default")] = report(la, p.x_test)
    la.optimize_hyperparameters(val, ["temperature"], link_approx="probit")
    la.calibrate_novelty(val)
    return {**found, "tuned": report(la, p.x_test), "novelty": la.novelty(p.x_test)}


def test_every_rank_can_work_alone_on_data_of_its_own(two):
    case = Case(options={"curvature_size": 7})
    p = case.problem
    for found, part in zip(two(run_apart, case), split(case, (17, 6))):
        la = case.estimator()
        la.fit(batches(*part))
        assert_agree(found, report(la, p.x_test))


def run_apart(case: Case) -> dict[str, Any]:
    la = case.estimator(process_group=None)
    la.fit(batches(*split(case, (17, 6))[dist.get_rank()]))
    return report(la, case.problem.x_test)


def test_a_group_of_some_ranks(three):
    case = Case(options={"curvature_size": 13})
    found = three(run_in_subgroup, case)
    assert found[1] is None
    check([found[0], found[2]], run(case))


def run_in_subgroup(case: Case) -> dict[str, Any] | None:
    subgroup = dist.new_group([0, 2])  # collective, of all ranks
    if dist.get_rank() == 1:
        return None
    p, la = case.problem, case.estimator(process_group=subgroup)
    rank = dist.get_rank(subgroup)
    la.fit(loader(p.x, p.y, num_replicas=2, rank=rank))
    return report(la, p.x_test)


def test_groups_side_by_side(three):
    """Rank 2 alone, and ranks 0 and 1 together, at the same time."""
    case = Case(options={"curvature_size": 13})
    found, expected = three(run_side_by_side, case), run(case)
    check(found[:2], expected)
    assert_agree(found[2], expected)


def run_side_by_side(case: Case) -> dict[str, Any]:
    subgroups = [dist.new_group([0, 1]), dist.new_group([2])]
    which = dist.get_rank() // 2
    p, la = case.problem, case.estimator(process_group=subgroups[which])
    la.fit(loader(p.x, p.y, num_replicas=2 - which, rank=dist.get_rank() % 2))
    return report(la, p.x_test)


def test_the_default_group_can_be_named(two):
    case = Case(options={"curvature_size": 13})
    named = two(run_in_named_group, case)
    for found, expected in zip(named, two(run, case)):
        assert_identical(found, expected)


def run_in_named_group(case: Case) -> dict[str, Any]:
    return report(case.fitted(process_group=dist.group.WORLD), case.problem.x_test)


@pytest.mark.parametrize("value", ["world", 2])
def test_other_process_groups_are_refused(two, value):
    with pytest.raises(ValueError, match="process_group"):
        Case().estimator(process_group=value)
    for outcome in two(build_with_process_group, value):
        assert outcome.error == "ValueError"
        assert "process_group" in outcome.text


def build_with_process_group(value: Any) -> Outcome:
    return outcome_of(build_and_fit, value)


def build_and_fit(value: Any) -> None:
    Case().fitted(process_group=value)


def test_a_data_parallel_model_is_unwrapped(group):
    case = Case(options={"curvature_size": 13})
    check(group(run_wrapped, case), run(case))


def run_wrapped(case: Case) -> dict[str, Any]:
    model = DistributedDataParallel(case.problem.model)
    la = case.fitted(model)
    assert la.model is model.module
    return report(la, case.problem.x_test)


def test_sharded_weights_are_refused(two):
    for outcome in two(outcome_of, build_with_sharded_weights):
        if outcome.error == "ImportError":
            pytest.skip("torch has no fully_shard")
        assert outcome.error == "ValueError", outcome.trace
        assert "FSDP" in outcome.text


def build_with_sharded_weights() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    Case().estimator(fully_shard(Case().problem.model, mesh=mesh))


# ---------------------------------------------------------------------------- ranks that disagree

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "seed": ("seed", {"seed": 1}),
    "landmarks": ("subsample_size", {"subsample_size": 7}),
    "rank": ("n_eigenvalues", {"n_eigenvalues": 3}),
    "share": ("n_eigenvalues", {"n_eigenvalues": 0.5}),
    "curvature inputs": ("curvature_size", {"curvature_size": 7}),
    "second pass": ("curvature_size", {"curvature_size": None}),
    "labels": ("curvature", {"curvature": "mc"}),
    "sharded": ("shard_directions", {"shard_directions": True}),
}
ARGUMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "balanced": ("balanced", {"balanced": True}),
    "landmarks": ("landmarks", {"landmarks": True}),
    "val_steps": ("val_steps", {"val_steps": 2}),
    "max_samples": ("max_samples", {"max_samples": 7}),
    "n_total": ("n_total", {"n_total": 101}),
}


def assert_refused(found: list[tuple[Outcome, int]], name: str) -> None:
    for outcome, asked in found:
        assert outcome.error == "ValueError", outcome.trace
        assert name in outcome.text
        assert asked <= 1


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_differ_are_refused(group, name):
    named, options = SETTINGS[name]
    assert_refused(group(fit_with_difference, Case(), Case(options=options)), named)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_differ_are_refused(group, name):
    named, arguments = ARGUMENTS[name]
    assert_refused(group(fit_with_difference, Case(), Case(fit=arguments)), named)


def test_validation_data_on_one_rank_only_are_refused(group):
    usual, other = (Case(fit={"val_steps": 1, **more}) for more in ({}, {"val_loader": True}))
    assert_refused(group(fit_with_difference, usual, other), "val_loader")


def fit_with_difference(usual: Case, other: Case) -> tuple[Outcome, int]:
    """The last rank differs."""
    case = other if dist.get_rank() == dist.get_world_size() - 1 else usual
    p = case.problem
    shard = Counted(batches(p.x, p.y))
    la = case.estimator()
    return outcome_of(lambda: la.fit(shard, **case.arguments())), shard.asked


@pytest.mark.parametrize("what", ["weight", "buffer", "architecture"])
def test_models_that_differ_are_refused(two, what):
    for outcome, asked in two(fit_with_other_model, what):
        assert outcome.error == "ValueError", outcome.trace
        assert "model" in outcome.text or "weights" in outcome.text
        assert asked <= 1


def fit_with_other_model(what: str) -> tuple[Outcome, int]:
    case = Case(model="conv_batchnorm" if what == "buffer" else "mlp")
    p = case.problem
    model, mine = p.model, dist.get_rank() == 1
    with torch.no_grad():
        if mine and what == "weight":
            model[2].bias[1] += 1e-9
        elif mine and what == "buffer":
            model[1].running_mean[1] += 1e-9
        elif mine:
            model = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, C)).double()
    la, shard = case.estimator(model), Counted(batches(p.x, p.y))
    return outcome_of(lambda: la.fit(shard)), shard.asked


def test_landmarks_that_differ_are_refused(two):
    for outcome, asked in two(fit_with_other_landmarks):
        assert outcome.error == "ValueError", outcome.trace
        assert "landmarks" in outcome.text
        assert asked <= 1


def fit_with_other_landmarks() -> tuple[Outcome, int]:
    case = Case()
    p, la = case.problem, case.estimator()
    x, outputs = p.landmarks
    shard = Counted(batches(p.x, p.y))
    return outcome_of(lambda: la.fit(shard, landmarks=(x + 1e-9 * dist.get_rank(), outputs))), shard.asked


def test_bases_that_differ_are_refused(two):
    for outcome, asked in two(fit_with_other_bases):
        assert outcome.error == "ValueError", outcome.trace
        assert "basis" in outcome.text
        assert asked <= 1


def fit_with_other_bases() -> tuple[Outcome, int]:
    case = Case()
    p = case.problem
    alone = case.estimator(process_group=None, seed=dist.get_rank())
    alone.fit(batches(p.x, p.y))
    la, shard = case.estimator(), Counted(batches(p.x, p.y))
    return outcome_of(lambda: la.fit(shard, basis=alone.basis)), shard.asked


# ---------------------------------------------------------------------------- ranks that fail


class Broken:
    """Raises in a pass over the data, after a few batches."""

    def __init__(self, batches: Any, after: int, error: BaseException, passes: int = 0) -> None:
        self.batches, self.after, self.error, self.passes = list(batches), after, error, passes

    def __iter__(self) -> Iterator[Any]:
        self.passes -= 1
        for i, batch in enumerate(self.batches):
            if self.passes < 0 and i == self.after:
                raise self.error
            yield batch


class Moody(nn.Module):
    """A network that can be told to fail, with a root that has no derivative at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale, self.mood = Case().problem.model, nn.Parameter(torch.ones(C, dtype=F64)), ""

    def forward(self, x: Tensor) -> Tensor:
        if self.mood == "raises":
            raise RuntimeError("out of order")
        root = (self.scale * x.square().sum(1, keepdim=True)).sqrt()
        return (self.net(x) + root) * (float("nan") if self.mood == "nan" else 1.0)


FAILURES = {
    "first batch": ("ValueError", "disk"),
    "later batch": ("ValueError", "disk"),
    "second pass": ("ValueError", "disk"),
    "validation": ("ValueError", "disk"),
    "interrupt": ("KeyboardInterrupt", "enough"),
    "structure": ("ValueError", "batch"),
    "targets": ("ValueError", ""),
    "short second pass": ("ValueError", "second pass"),
    "model raises": ("RuntimeError", "out of order"),
    "model gives NaN": ("ValueError", ""),
    "input is NaN": ("ValueError", "finite"),
    "features are NaN": ("ValueError", "finite"),
    "landmarks": ("ValueError", "landmarks"),
    "argument": ("ValueError", "val_steps"),
    "type": ("ValueError", "train_loader must be an iterable"),
}


def break_rank(name: str, la: ELLALaplace, data: Any, arguments: dict[str, Any]) -> Any:
    """Change what this rank passes to a fit; return its loader."""
    x, y = data[1]
    if name == "first batch":
        return Broken(data, 0, ValueError("disk on fire"))
    if name == "later batch":
        return Broken(data, 2, ValueError("disk on fire"))
    if name == "second pass":
        return Broken(data, 1, ValueError("disk on fire"), passes=1)
    if name == "validation":
        arguments["val_loader"] = Broken(data, 1, ValueError("disk on fire"))
    elif name == "interrupt":
        return Broken(data, 1, KeyboardInterrupt("enough"))
    elif name == "structure":
        return [data[0], "a batch"]
    elif name == "targets":
        return [data[0], (x, y + 100)]
    elif name == "short second pass":
        return Shrinking(data)
    elif name == "model raises":
        la.model.mood = "raises"
    elif name == "model gives NaN":
        la.model.mood = "nan"
    elif name == "input is NaN":
        return [data[0], (x * float("nan"), y)]
    elif name == "features are NaN":
        return [data[0], (x * 0, y)]
    elif name == "landmarks":
        arguments["landmarks"] = (x, torch.zeros(1 + len(x), dtype=torch.int64))
    elif name == "argument":
        arguments["val_steps"] = 0
    else:
        return None
    return data


class Shrinking:
    """Yields fewer batches at every pass."""

    def __init__(self, batches: Any) -> None:
        self.batches = [*batches]

    def __iter__(self) -> Iterator[Any]:
        found = list(self.batches)
        self.batches.pop()
        return iter(found)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_rank_raises_its_error_and_the_others_say_so(two, name):
    kind, text = FAILURES[name]
    last = 1
    found = two(fail_on_last_rank, name)
    for _, before, after, again in found:
        assert_identical(after, before)  # the fit before is as it was
        assert_identical(again, before)  # and the group can go on
    raised = found[last][0]
    assert raised.error == kind, raised.trace
    assert text in raised.text
    for outcome, *_ in found[:last]:
        assert outcome.error == "RankError", outcome.trace
        assert "RuntimeError" in outcome.bases
        assert f"rank {last}" in outcome.text.lower()
        assert kind in outcome.text
        assert raised.text in outcome.text


def fail_on_last_rank(name: str) -> tuple[Outcome, Any, Any, Any]:
    case = Case(options={"curvature_size": None, "temperature": None})
    la = case.estimator(Moody())
    p, mine = case.problem, dist.get_rank() == 1
    data = batches(*split(case, (11, 12))[dist.get_rank()], 3)
    arguments = {"landmarks": p.landmarks, "val_loader": batches(*case.validation(), 3)}
    la.fit(data, **arguments)
    before = report(la, p.x_test)
    broken = break_rank(name, la, data, arguments) if mine else data
    outcome = outcome_of(lambda: la.fit(broken, **arguments))
    la.model.mood = ""
    after = report(la, p.x_test)
    other = case.estimator(la.model)
    other.fit(data, landmarks=p.landmarks, val_loader=batches(*case.validation(), 3))
    return outcome, before, after, report(other, p.x_test)


TUNINGS = ("grid", "nn grid", "joint", "novelty", "forget", "added")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TUNINGS)
def test_a_rank_that_fails_in_later_steps(two, name):
    (other, *states), (failed, *mine) = two(fail_later, name)
    assert failed.error == "OSError"
    assert other.error == "RankError", other.trace
    assert "rank 1" in other.text.lower()
    assert "OSError" in other.text
    assert "disk" in other.text
    for before, after in (states, mine):
        assert_identical(before, after)


def fail_later(name: str) -> tuple[Outcome, Any, Any]:
    case = Case(options={"temperature": 50.0 if name == "nn grid" else None})
    la, x = case.fitted(), case.problem.x_test
    before = report(la, x)
    val: Any = batches(*case.validation(), 3)
    if dist.get_rank() == 1:
        val = Broken(val, 1, OSError("disk on fire"))
    steps = {
        "grid": lambda: tune(la, case, {}, val),
        "nn grid": lambda: tune(la, case, GRIDS["nn"][2], val),
        "joint": lambda: la.optimize_hyperparameters(val, link_approx="probit"),
        "novelty": lambda: la.calibrate_novelty(val),
        "forget": lambda: la.forget(val),
        "added": lambda: la.fit(val, override=False),
    }
    return outcome_of(steps[name]), before, report(la, x)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_loss_that_fails_on_one_rank(two):
    failed, other = two(fail_in_the_loss)  # the first rank evaluates it for all
    assert failed.error == "OSError"
    assert other.error == "RankError", other.trace
    assert "OSError" in other.text


def fail_in_the_loss() -> Outcome:
    case = Case(options={"temperature": 50.0})
    la, rank = case.fitted(), dist.get_rank()

    def loss(p: Tensor, y: Tensor) -> float:
        if rank == 0:
            raise OSError("disk on fire")
        return miscalibration(p, y)

    return outcome_of(lambda: tune(la, case, {"loss": loss}))


class Deadly:
    """A loader in which the process ends."""

    def __init__(self, batches: Any, passes: int = 0) -> None:
        self.batches, self.passes = batches, passes

    def __iter__(self) -> Iterator[Any]:
        self.passes -= 1
        for i, batch in enumerate(self.batches):
            if self.passes < 0 and i == 1:
                os._exit(3)
            yield batch


@pytest.mark.parametrize("passes", [0, 1], ids=["first pass", "second pass"])
def test_a_rank_that_ends_does_not_leave_the_others_waiting(fresh, passes):
    outcomes = fresh(3).outcomes(end_on_rank_1, passes)
    assert outcomes[1].error == "exit"
    assert outcomes[1].exit_code == 3
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.error == "RankError", outcome.trace
        assert "timeout" in outcome.text
        assert "3 s" in outcome.text


def end_on_rank_1(passes: int) -> dict[str, Any]:
    case = Case(options={"curvature_size": None})
    p, la = case.problem, case.estimator()
    data: Any = batches(p.x, p.y)
    la.fit(Deadly(data, passes) if dist.get_rank() == 1 else data)
    return report(la, p.x_test)


def test_a_rank_that_never_comes(fresh):
    waiting, absent = fresh(2).outcomes(stay_away_on_rank_1)
    assert absent.value == "absent"
    assert waiting.error == "RankError", waiting.trace
    assert "timeout" in waiting.text
    assert "3 s" in waiting.text


def stay_away_on_rank_1() -> str:
    if dist.get_rank() == 1:
        return "absent"
    Case().fitted()
    return "fitted"


# ---------------------------------------------------------------------------- directions spread over ranks


def parts_of(x: Tensor, kind: str) -> Tensor:
    """This rank's part of test inputs; all of them in one process."""
    if not dist.is_initialized():
        return x
    sizes = {"unequal": {2: (5, 2), 3: (4, 1, 2)}, "empty": {2: (B, 0), 3: (3, 0, 4)}}[kind]
    return x.split(sizes[dist.get_world_size()])[dist.get_rank()]


def run_sharded(case: Case, kind: str = "unequal", tuning: dict[str, Any] | None = None) -> dict[str, Any]:
    la = case.fitted(shard_directions=True)
    if tuning is not None:
        tune(la, case, tuning)
    x = parts_of(case.problem.x_test, kind)
    return {
        "posterior": posterior_of(la),
        "directions": {k: v.clone() for k, v in la.basis.directions.items()},
        "predictions": predictions(la, x),
    }


def check_sharded(found: list[dict[str, Any]], expected: dict[str, Any], same_steps: bool = True) -> None:
    """Compare joined predictions, and each rank's directions, with those of one process."""
    size = len(found)
    for rank, one in enumerate(found):
        assert_identical(one["posterior"], found[0]["posterior"], f"rank {rank} against rank 0")
        for k, v in expected["directions"].items():
            assert_close(one["directions"][k], v[rank::size], RTOL, name=f"directions of {k}")
    check([found[0]["posterior"]], expected["posterior"], same_steps)
    for k, v in expected["predictions"].items():
        if not k.startswith("joint"):
            assert_close(torch.cat([one["predictions"][k] for one in found]), v, RTOL, name=k)


SHARDED: dict[str, dict[str, Any]] = {
    "K not divisible": {},
    "fewer directions than ranks": {"n_eigenvalues": 1},
    "a share": {"n_eigenvalues": 0.9},
    "a sample": {"curvature_size": 13},
    "a second pass": {"curvature_size": None},
    "sampled labels": {"curvature": "mc", "curvature_samples": 3, "curvature_size": 13},
    "sampled labels in a second pass": {"curvature": "mc", "curvature_size": None},
    "layerwise prior": {"prior_precision": LAYERWISE},
    "blocks of rows": {"memory_budget": 3000},
    "blocks of weights": {"memory_budget": 4000},
    "spilled rows": {"memory_budget": 2000, "spill": "cpu", "spill_dtype": torch.float32},
    "reverse mode": {"autodiff": "reverse"},
    "isotropic residual": {"residual": "isotropic", "residual_scale": 0.3},
    "exact residual": {"residual": "exact", "residual_scale": 0.3},
}


@pytest.mark.filterwarnings(FEW)
@on_two_and_some_on_three(SHARDED)
def test_spread_directions_give_what_one_process_gives(group, name, likelihood):
    case = Case(likelihood, options=SHARDED[name])
    same_steps = SHARDED[name].get("curvature_size", 1) is not None
    check_sharded(group(run_sharded, case), run_sharded(case), same_steps)


def test_every_rank_keeps_its_turns(group):
    for rank, (kept, rank_of_basis, n_values) in enumerate(group(shapes_of_directions)):
        assert set(kept) == {len(range(rank, K, group.size))}
        assert (rank_of_basis, n_values) == (K, K)


def shapes_of_directions() -> tuple[list[int], int, int]:
    la = Case().fitted(shard_directions=True)
    return [len(v) for v in la.basis.directions.values()], la.basis.rank, len(la.basis.eigenvalues)


def test_without_a_group_spreading_changes_nothing(likelihood):
    case = Case(likelihood, options={"curvature_size": 13})
    x = case.problem.x_test
    assert_identical(report(case.fitted(shard_directions=True), x), report(case.fitted(), x))


@PAIRS
def test_a_rank_without_a_batch_takes_part_in_predictions(group, likelihood):
    case = Case(likelihood)
    check_sharded(group(run_sharded, case, "empty"), run_sharded(case))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["probit", "mc", "regression", "prior alone", "callable", "metric of lists"])
def test_grid_search_with_spread_directions(two, name):
    likelihood, options, arguments = GRIDS[name]
    case = Case(likelihood, "confident", options={"temperature": None, **options})
    check_sharded(two(run_sharded, case, "unequal", arguments), run_sharded(case, "unequal", arguments))


@PAIRS
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("temperature", [None, 1.3])
def test_early_stopping_with_spread_directions(group, likelihood, temperature):
    options = {"temperature": temperature, "curvature_size": 13}
    fit = {"val_loader": True, "val_steps": 1}
    case = Case(likelihood, "confident", options, fit, batch=3)
    check_sharded(group(run_sharded, case), run_sharded(case))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("curvature", ["exact", "mc"])
@pytest.mark.filterwarnings(FEW)
def test_spread_directions_with_any_shards(three, which, curvature):
    options = {"curvature_size": None, "curvature": curvature}
    case = Case(options=options, fit={"landmarks": True})
    sizes = SHARDS[3][which]
    found, expected = three(run_sharded_on_shards, case, sizes), run_sharded(case)
    if curvature == "mc":  # labels are drawn by rank and place
        for f in (*found, expected):
            f["posterior"] = {k: f["posterior"][k] for k in ("eigenvalues", "loss", "n_data")}
            f["predictions"] = {k: f["predictions"][k] for k in ("features", "outputs")}
    check_sharded(found, expected, same_steps=curvature == "mc")


def run_sharded_on_shards(case: Case, sizes: tuple[int, ...]) -> dict[str, Any]:
    la = case.estimator(shard_directions=True)
    la.fit(batches(*split(case, sizes)[dist.get_rank()]), **case.arguments())
    return {
        "posterior": posterior_of(la),
        "directions": dict(la.basis.directions),
        "predictions": predictions(la, parts_of(case.problem.x_test, "unequal")),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_later_steps_with_spread_directions(three):
    case = Case(options={"temperature": None})
    found, expected = three(run_later_steps_sharded, case), run_later_steps_sharded(case)
    for one in found:
        assert_identical(one["common"], found[0]["common"])
    assert_agree(found[0]["common"], expected["common"])
    assert_close(torch.cat([one["novelty"] for one in found]), expected["novelty"], RTOL)


def run_later_steps_sharded(case: Case) -> dict[str, Any]:
    la, more = case.fitted(shard_directions=True), case.data(N_MORE, 12)
    x = parts_of(case.problem.x_test, "unequal")
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
    return {"common": common, "novelty": la.novelty(x)}


S = 3000


@pytest.mark.parametrize("seeds", ["equal", "different", "global"])
def test_moments_of_sampled_weights_with_spread_directions(three, seeds):
    """Where weights hardly move, samples have the moments of the linearised model."""
    case = Case("regression", options={"temperature": 1e-6, "prior_precision": 1e6})
    la = case.fitted()
    mean, cov = la._glm_predictive_distribution(case.problem.x_test[:2], joint=True)
    error = ((torch.outer(cov.diagonal(), cov.diagonal()) + cov.square()) / S).sqrt()
    for samples in three(sample_sharded, case, seeds):
        flat = samples.flatten(1)
        assert ((flat.mean(0) - mean).abs() <= 5.5 * (cov.diagonal() / S).sqrt() + 1e-4 * mean.abs()).all()
        assert ((flat.T.cov() - cov).abs() <= 5.5 * error + 1e-3 * cov.abs().max()).all()


def sample_sharded(case: Case, seeds: str) -> Tensor:
    la = case.fitted(shard_directions=True)
    seed = 4 + dist.get_rank() if seeds == "different" else 4
    generator = None if seeds == "global" else torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    return la.functional_samples(case.problem.x_test[:2], "nn", S, generator=generator)


def test_a_shard_is_restored_on_its_rank(two, tmp_path):
    for before, after, onto_other, size in two(save_and_load, str(tmp_path)):
        assert_identical(after, before)
        assert onto_other.error == "ValueError"
        assert "rank" in onto_other.text
        assert size < K  # directions of this rank only


def save_and_load(folder: str) -> tuple[Any, Any, Outcome, int]:
    case = Case()
    la, rank = case.fitted(shard_directions=True), dist.get_rank()
    x = parts_of(case.problem.x_test, "unequal")
    before = predictions(la, x)
    torch.save(la.state_dict(), f"{folder}/{rank}.pt")
    dist.barrier()
    states = [torch.load(f"{folder}/{r}.pt", weights_only=True) for r in (rank, 1 - rank)]
    loaded, other = (case.estimator(shard_directions=True) for _ in range(2))
    loaded.load_state_dict(states[0])
    size = len(next(iter(loaded.basis.directions.values())))
    return before, predictions(loaded, x), outcome_of(other.load_state_dict, states[1]), size


def test_a_shard_fits_no_group_of_another_size(two, three, tmp_path):
    states = two(state_of_shard)
    for outcome in three(load_shard, states):
        assert outcome.error == "ValueError"
    for shard_directions in (True, False):
        with pytest.raises(ValueError, match=r"rank|shard"):
            Case().estimator(shard_directions=shard_directions).load_state_dict(pickle.loads(states[0]))
    for outcome in two(load_shard, states, False):  # whole directions are wanted
        assert outcome.error == "ValueError"


def state_of_shard() -> bytes:
    return pickle.dumps(Case().fitted(shard_directions=True).state_dict())


def load_shard(states: list[bytes], shard_directions: bool = True) -> Outcome:
    state = pickle.loads(states[dist.get_rank() % len(states)])
    la = Case().estimator(shard_directions=shard_directions)
    return outcome_of(la.load_state_dict, state)


def test_whole_directions_are_restored_in_any_group(group):
    case = Case()
    la = case.fitted()
    expected = predictions(la, case.problem.x_test)
    for found in group(load_whole, pickle.dumps(la.state_dict())):
        assert_agree(found, expected)


def load_whole(state: bytes) -> dict[str, Any]:
    la = Case().estimator()
    la.load_state_dict(pickle.loads(state))
    return predictions(la, Case().problem.x_test)


@pytest.mark.parametrize("what", ["enable_backprop", "prior", "later prior"])
def test_what_spread_directions_do_not_do_is_refused(two, what):
    for outcome in two(ask_too_much, what):
        assert outcome.error == "ValueError", outcome.trace
        assert "shard_directions" in outcome.text


def ask_too_much(what: str) -> Outcome:
    n_weights = sum(w.numel() for w in Case().problem.model.parameters())
    prior = torch.linspace(1, 2, n_weights, dtype=F64)
    if what == "later prior":
        la = Case().fitted(shard_directions=True)
        return outcome_of(setattr, la, "prior_precision", prior)
    options = {"enable_backprop": True} if what == "enable_backprop" else {"prior_precision": prior}
    return outcome_of(lambda: Case().fitted(shard_directions=True, **options))


def test_a_bad_input_of_one_rank_stops_the_prediction_of_all(two):
    (other, again), (failed, same) = two(predict_badly)
    assert failed.error == "ValueError"
    assert "finite" in failed.text
    assert other.error == "RankError", other.trace
    assert "rank 1" in other.text.lower()
    assert_identical(again, same)


def predict_badly() -> tuple[Outcome, dict[str, Any]]:
    case = Case()
    la, x = case.fitted(shard_directions=True), case.problem.x_test
    bad = x * float("nan") if dist.get_rank() == 1 else x
    return outcome_of(la, bad), predictions(la, x)


# ---------------------------------------------------------------------------- fits that go on


class Mortal(nn.Module):
    """Counts its calls; at one of them, all processes named are killed."""

    def __init__(self, net: nn.Module, last: int | None = None, pids: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.net, self.calls, self.last, self.pids = net, 0, last, pids

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.last:
            kill(self.pids)
        return self.net(x)


def kill(pids: tuple[int, ...]) -> None:
    """Kill processes, this one last."""
    for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
        os.kill(pid, signal.SIGKILL)


def run_mortal(
    case: Case, path: str | None, last: int | None = None, pids: tuple[int, ...] = ()
) -> tuple[dict[str, Any], int]:
    p = case.problem
    model = Mortal(p.model, last if dist.get_rank() == 0 else None, pids)
    la = case.estimator(model)
    more = {} if path is None else {"checkpoint": path, "checkpoint_every": 1}
    la.fit(loader(p.x, p.y, case.batch), **case.arguments(), **more)
    calls = model.calls
    return report(la, p.x_test), calls


RESUMED: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "in the first pass": ({"curvature_size": 13}, {}, 0.4),
    "before the curvature": ({"curvature_size": 13, "memory_budget": 4000}, {"balanced": True}, 0.7),
    "in the Gram matrix": ({"curvature_size": 13, "memory_budget": 2000}, {}, 0.55),
    "in the second pass": ({"curvature_size": None}, {}, 0.97),
    "with sampled labels": ({"curvature_size": None, "curvature": "mc"}, {}, 0.97),
}


@pytest.mark.filterwarnings(FEW)
@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_fit_goes_on_to_the_same_bits(fresh, two, tmp_path, name):
    options, arguments, share = RESUMED[name]
    case = Case(options=options, fit=arguments, batch=1)
    expected = two(run_mortal, case, None)
    left = killed(fresh(2), case, tmp_path, share * expected[0][1])
    stages = ("", ".gram", ".basis", ".curvature")
    assert left
    assert ("fit.pt.0-of-2.gram" in left) == (name == "in the Gram matrix")
    assert left <= {f"fit.pt.{rank}-of-2{stage}" for rank in range(2) for stage in stages}
    assert ("fit.pt.0-of-2.curvature" in left) == (share > 0.9)
    found = two(run_mortal, case, str(tmp_path / "fit.pt"))
    for (resumed, _), (whole, _) in zip(found, expected):
        assert_identical(resumed, whole)
    assert found[0][1] < expected[0][1]
    assert list(tmp_path.glob("fit.pt*")) == []


def killed(group: Group, case: Case, folder: Path, calls: float) -> set[str]:
    """Kill all ranks after some calls of the model of rank 0; return the files of the fit, without temporary ones."""
    pids = tuple(process.pid for process in group.processes)
    outcomes = group.outcomes(run_mortal, case, str(folder / "fit.pt"), int(calls), pids)
    assert [o.exit_code for o in outcomes] == [-signal.SIGKILL] * group.size
    return {file.name for file in folder.glob("fit.pt*") if file.suffix != ".tmp"}


class Writes:
    """Counts the files of a stage that a fit puts in place.

    Before the last of them on one rank, once the last of the other rank is in place, all processes are killed.
    """

    def __init__(self, folder: str, stage: str, dying: int | None, last: int, pids: tuple[int, ...]) -> None:
        self.marker, self.pids, self.last, self.count = Path(folder) / "other-is-done", pids, last, 0
        self.dying, self.rank, self.replace = dying, dist.get_rank(), os.replace
        self.name = f"fit.pt.{self.rank}-of-2{stage}"

    def __call__(self, source: Any, target: Any, **options: Any) -> None:
        ours = os.path.basename(target) == self.name
        self.count += ours
        at_last = ours and self.dying is not None and self.count == self.last
        if at_last and self.rank == self.dying:
            while not self.marker.exists():
                pass
            kill(self.pids)
        self.replace(source, target, **options)
        if at_last:
            self.marker.touch()


def run_to_write(
    case: Case, folder: str, stage: str, dying: int | None = None, last: int = 0, pids: tuple[int, ...] = ()
) -> int:
    with pytest.MonkeyPatch.context() as patch:
        writes = Writes(folder, stage, dying, last, pids)
        patch.setattr(os, "replace", writes)
        patch.setattr(os, "rename", writes)
        run_mortal(case, f"{folder}/fit.pt")
    return writes.count


@pytest.mark.parametrize("stage", ["", ".basis", ".curvature"], ids=["data", "basis", "curvature"])
@pytest.mark.parametrize("spread", [False, True], ids=["whole", "spread"])
def test_a_rank_that_was_one_file_behind(fresh, two, tmp_path, stage, spread):
    dying = int(spread)  # either rank
    case = Case(options={"curvature_size": None, "shard_directions": spread})
    expected = two(run_mortal, case, None)
    writes = two(run_to_write, case, str(tmp_path), stage)
    assert writes[0] == writes[1] > 0
    group = fresh(2)
    pids = tuple(process.pid for process in group.processes)
    outcomes = group.outcomes(run_to_write, case, str(tmp_path), stage, dying, writes[0], pids)
    assert [o.exit_code for o in outcomes] == [-signal.SIGKILL] * 2
    assert (tmp_path / f"fit.pt.{1 - dying}-of-2{stage}").exists()
    for (resumed, _), (whole, _) in zip(two(run_mortal, case, str(tmp_path / "fit.pt")), expected):
        assert_identical(resumed, whole)
    assert list(tmp_path.glob("fit.pt*")) == []


@pytest.mark.parametrize("lost", [0, 1])
def test_checkpoints_that_one_rank_lost(fresh, two, tmp_path, lost):
    """The ranks start again together, or refuse together."""
    case = Case(options={"curvature_size": None}, batch=1)
    expected = two(run_mortal, case, None)
    left = killed(fresh(2), case, tmp_path, 0.97 * expected[0][1])
    files = [name for name in left if f"{lost}-of-2" in name]
    assert files
    for name in files:
        (tmp_path / name).unlink()
    outcomes = two.outcomes(run_mortal, case, str(tmp_path / "fit.pt"))
    if outcomes[0].error is None:
        for outcome, whole in zip(outcomes, expected):
            assert outcome.error is None, outcome.trace
            assert_identical(outcome.value[0], whole[0])
    else:
        assert {o.error for o in outcomes} <= {"ValueError", "RankError"}
        assert "checkpoint" in outcomes[0].text


def test_a_checkpoint_of_another_fit_is_refused_by_all(fresh, two, tmp_path):
    case = Case(options={"curvature_size": None}, batch=1)
    calls = two(run_mortal, case, None)[0][1]
    assert killed(fresh(2), case, tmp_path, 0.97 * calls)
    files = {file: file.read_bytes() for file in tmp_path.glob("fit.pt*") if file.suffix != ".tmp"}
    other = Case(options={"curvature_size": None, "seed": 1}, batch=1)
    for outcome in two.outcomes(run_mortal, other, str(tmp_path / "fit.pt")):
        assert outcome.error == "ValueError", outcome.trace
        assert "seed" in outcome.text
    assert {file: file.read_bytes() for file in tmp_path.glob("fit.pt*")} == files


def test_a_folder_that_only_one_rank_has_is_an_error_on_all(two, tmp_path):
    outcomes = two(fit_with_paths, [str(tmp_path / "fit.pt"), str(tmp_path / "absent" / "fit.pt")])
    assert outcomes[1].error == "ValueError"
    assert outcomes[0].error in ("RankError", "ValueError")
    assert list(tmp_path.glob("fit.pt*")) == []


def fit_with_paths(paths: list[str]) -> Outcome:
    return outcome_of(run_mortal, Case(), paths[dist.get_rank()])


# ---------------------------------------------------------------------------- the names


def test_rank_error_is_exported():
    assert issubclass(laplace_ella.RankError, RuntimeError)
    assert "RankError" in laplace_ella.__all__
