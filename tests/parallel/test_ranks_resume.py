"""Fits of several ranks that are killed go on to the same bits, or all ranks refuse."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import outcome_of
from ranked import FEW, SAMPLE, STREAMED, Case, assert_identical, assert_refused, loader, report
from torch import nn

pytest_plugins = ("groups",)
pytestmark = pytest.mark.filterwarnings(FEW)


class Mortal(nn.Module):
    """Counts its calls; at one of them, all processes named are killed."""

    def __init__(self, net, last=None, pids=()):
        super().__init__()
        self.net, self.calls, self.last, self.pids = net, 0, last, pids

    def forward(self, x):
        self.calls += 1
        if self.calls == self.last:
            kill(self.pids)
        return self.net(x)


def kill(pids):
    """Kill processes, this one last."""
    for pid in sorted(pids, key=lambda pid: pid == os.getpid()):
        os.kill(pid, signal.SIGKILL)


def run_mortal(case, path, last=None, pids=()):
    p = case.problem
    model = Mortal(p.model, last if dist.get_rank() == 0 else None, pids)
    la = case.estimator(model)
    more = {} if path is None else {"checkpoint": path, "checkpoint_every": 1}
    la.fit(loader(p.x, p.y, case.batch), **case.arguments(), **more)
    calls = model.calls
    return report(la, p.x_test), calls


def killed(group, case, folder, calls):
    """Kill all ranks after some calls of the model of rank 0; return the files of the fit, without temporary ones."""
    pids = tuple(process.pid for process in group.processes)
    outcomes = group.outcomes(run_mortal, case, str(folder / "fit.pt"), int(calls), pids)
    assert [o.exit_code for o in outcomes] == [-signal.SIGKILL] * group.size
    return {file.name for file in folder.glob("fit.pt*") if file.suffix != ".tmp"}


def assert_goes_on(two, case, folder, expected):
    found = two(run_mortal, case, str(folder / "fit.pt"))
    for (resumed, _), (whole, _) in zip(found, expected):
        assert_identical(resumed, whole)
    assert found[0][1] < expected[0][1]
    assert list(folder.glob("fit.pt*")) == []


RESUMED = {
    "in the first pass": (SAMPLE, {"balanced": True}, 0.4),
    "in the Gram matrix": ({**SAMPLE, "memory_budget": 2000}, {}, 0.65),
    "in the second pass": ({**STREAMED, "curvature": "mc"}, {}, 0.97),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_killed_fit_goes_on_to_the_same_bits(fresh, two, tmp_path, name):
    options, arguments, share = RESUMED[name]
    case = Case(options=options, fit=arguments, batch=1)
    expected = two(run_mortal, case, None)
    left = killed(fresh(2), case, tmp_path, share * expected[0][1])
    stages = ("", ".basis", ".curvature")
    assert left
    assert left <= {f"fit.pt.{rank}-of-2{stage}" for rank in range(2) for stage in stages}
    if name == "in the Gram matrix":
        assert torch.load(tmp_path / "fit.pt.0-of-2.basis", weights_only=True)["state"]["gram"]
    assert ("fit.pt.0-of-2.curvature" in left) == (share > 0.9)
    assert_goes_on(two, case, tmp_path, expected)


class Writes:
    """Counts the files of a stage that a fit puts in place.

    Before the last of them on one rank, once the last of the other rank is in place, all processes are killed.
    """

    def __init__(self, folder, stage, dying, last, pids):
        self.marker, self.pids, self.last, self.count = Path(folder) / "other-is-done", pids, last, 0
        self.dying, self.rank, self.replace = dying, dist.get_rank(), os.replace
        self.name = f"fit.pt.{self.rank}-of-2{stage}"

    def __call__(self, source, target, **options):
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


def run_to_write(case, folder, stage, dying=None, last=0, pids=()):
    with pytest.MonkeyPatch.context() as patch:
        writes = Writes(folder, stage, dying, last, pids)
        patch.setattr(os, "replace", writes)
        patch.setattr(os, "rename", writes)
        run_mortal(case, f"{folder}/fit.pt")
    return writes.count


@pytest.mark.parametrize(
    ("stage", "spread"),
    [("", False), (".basis", False), (".basis", True), (".curvature", True)],
    ids=["data", "basis", "spread basis", "curvature"],
)
def test_a_rank_that_was_one_file_behind(fresh, two, tmp_path, stage, spread):
    dying = int(spread)  # either rank
    case = Case(options={**STREAMED, "shard_directions": spread})
    expected = two(run_mortal, case, None)
    writes = two(run_to_write, case, str(tmp_path), stage)
    assert writes[0] == writes[1] > 0
    group = fresh(2)
    pids = tuple(process.pid for process in group.processes)
    outcomes = group.outcomes(run_to_write, case, str(tmp_path), stage, dying, writes[0], pids)
    assert [o.exit_code for o in outcomes] == [-signal.SIGKILL] * 2
    assert (tmp_path / f"fit.pt.{1 - dying}-of-2{stage}").exists()
    assert_goes_on(two, case, tmp_path, expected)


def test_files_of_another_fit_and_files_that_one_rank_lost(fresh, two, tmp_path):
    """All ranks refuse the first and leave the files; then they start again together."""
    case = Case(options=STREAMED, batch=1)
    expected = two(run_mortal, case, None)
    left = killed(fresh(2), case, tmp_path, 0.97 * expected[0][1])
    files = {file: file.read_bytes() for file in tmp_path.glob("fit.pt*") if file.suffix != ".tmp"}
    other = Case(options={**STREAMED, "seed": 1}, batch=1)
    assert_refused(two.outcomes(run_mortal, other, str(tmp_path / "fit.pt")), "seed")
    assert {file: file.read_bytes() for file in tmp_path.glob("fit.pt*")} == files
    lost = [name for name in left if "1-of-2" in name]
    assert lost
    for name in lost:
        (tmp_path / name).unlink()
    for (found, _), (whole, _) in zip(two(run_mortal, case, str(tmp_path / "fit.pt")), expected):
        assert_identical(found, whole)


def test_a_folder_that_only_one_rank_has_is_an_error_on_all(two, tmp_path):
    outcomes = two(fit_with_paths, [str(tmp_path / "fit.pt"), str(tmp_path / "absent" / "fit.pt")])
    assert outcomes[1].error == "ValueError"
    assert outcomes[0].error in ("RankError", "ValueError")
    assert list(tmp_path.glob("fit.pt*")) == []


def fit_with_paths(paths):
    return outcome_of(run_mortal, Case(), paths[dist.get_rank()])
