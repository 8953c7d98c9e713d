"""Ctrl-C leaves the old fit or the new one; after ``kill -9`` at any moment the same call goes on."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import Snapshot, assert_same, build, fitted, inputs
from interrupting import N_BATCHES, N_DATA, Ending, Watched, assert_equal_fits, batches, go_on, interrupt

import laplace_ella

X = inputs(11, seed=7)

pytestmark = pytest.mark.filterwarnings("ignore:curvature='mc' estimates G")


def said_by(action):
    """Return the warnings of an action that ends with KeyboardInterrupt and speak of that."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(KeyboardInterrupt):
            action()
    return [w for w in caught if "interrupted" in str(w.message)]


INTERRUPTED = {
    "sample": {},
    "streamed": {"curvature_size": None},
    "sampled labels": {"curvature": "mc"},
    "small sample": {"curvature_size": 11},
}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", INTERRUPTED)
def test_ctrl_c_keeps_the_curvature_there_is(name, checkpoint, tmp_path):
    """And before there is any, the fit before."""
    options = INTERRUPTED[name]
    complete, steps = (build(model=Watched(), **options) for _ in range(2))
    complete.fit(batches(seed=80))  # what the model supports is found out once
    complete.model.calls = 0
    complete.fit(batches())
    steps.fit(batches(), val_steps=1)
    after, calls, kept = dict(steps.snapshots), complete.model.calls, []
    extra = {"checkpoint": tmp_path / "fit", "checkpoint_every": 1} if checkpoint else {}
    for at in [*range(0, calls, 6 if checkpoint else 3), calls - 1]:
        la = fitted(model=Watched(), data=batches(seed=80), **options)
        untouched = Snapshot(la, X)
        la.model.calls, la.model.at, la.model.error = 0, at, KeyboardInterrupt
        said = said_by(lambda la=la: la.fit(batches(), **extra))
        la.model.at = None
        if not said:
            assert not kept, "what was kept before is not kept any more"
            untouched.check()
        else:
            n = la.n_curvature
            assert [w.category for w in said] == [UserWarning]
            assert f"{n} of {steps.n_curvature}" in str(said[0].message)
            assert (la.n_data, la.n_predictions, la.n_outputs) == (N_DATA, N_DATA, 3)
            assert torch.equal(la.H, after[n])
            assert_same((la.loss, la.basis.eigenvalues), (complete.loss, complete.basis.eigenvalues))
            assert la.snapshots[-1][0] == n
            assert la.log_marginal_likelihood().isfinite()
            other = build(model=Watched(), **options)
            other.load_state_dict(la.state_dict())
            assert torch.equal(other(X), la(X))
            kept.append(n)
        if checkpoint:
            resumed = la if at % 2 else build(model=Watched(), **options)
            assert_equal_fits(go_on(resumed, batches(), tmp_path / "fit"), complete, f"at call {at}")
    assert kept == sorted(kept)
    assert kept
    assert set(kept) <= set(after)


def test_ctrl_c_while_validation_data_are_read(tmp_path):
    """G is complete then, and kept as a fit without validation data has it."""
    expected, la, whole = (build(temperature=None) for _ in range(3))
    expected.fit(batches(), val_steps=1)
    val = batches(seed=30, n=17)
    stopped = Ending(val, 1, KeyboardInterrupt)
    with pytest.warns(UserWarning, match="interrupted after 23 of 23"), pytest.raises(KeyboardInterrupt):
        la.fit(batches(), val_loader=stopped, checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert_equal_fits(la, expected)
    whole.fit(batches(), val_loader=val)
    assert_equal_fits(go_on(la, batches(), tmp_path / "fit", val_loader=val), whole)


def test_ctrl_c_while_data_are_added_with_a_checkpoint(tmp_path):
    """They are in its files alone, or they would be added twice by the fit that goes on."""
    la, whole = (fitted(data=batches(), curvature_size=None) for _ in range(2))
    more, untouched = batches(seed=50), Snapshot(la, X)
    whole.fit(more, override=False)
    stopped = Ending(more, N_BATCHES + 3, KeyboardInterrupt)
    path = {"checkpoint": tmp_path / "fit", "checkpoint_every": 1}
    assert said_by(lambda: la.fit(stopped, override=False, **path)) == []
    untouched.check()
    assert_equal_fits(go_on(la, more, tmp_path / "fit", override=False), whole)


def test_ctrl_c_while_data_are_added():
    la, steps = fitted(model=Watched(), data=batches()), build(model=Watched())
    more, before, calls, added = batches(seed=50), la.H, la.model.calls, []
    steps.fit(more, basis=la.basis, val_steps=1)
    la.fit(more, override=False)
    for at in range(calls + 6, la.model.calls, 5):
        la = fitted(model=Watched(), data=batches())
        la.model.at, la.model.error = at, KeyboardInterrupt
        if said_by(lambda la=la: la.fit(more, override=False)):
            added.append(la.n_curvature - N_DATA)
            assert la.n_data == 2 * N_DATA
            # Draws differ, as positions go on: only the size of what was added is known.
            assert 0.2 < float((la.H - before).trace() / steps.H.trace()) < 5
        else:
            assert torch.equal(la.H, before)
            assert la.n_data == N_DATA
    assert added
    assert added == sorted(added)
    assert 0 < added[0] < N_DATA


def test_ctrl_c_while_data_are_forgotten():
    la = fitted(model=Watched(), data=batches())
    untouched, interruptions = Snapshot(la, X), 0
    la.model.error = KeyboardInterrupt
    while la.n_data == N_DATA:
        la.model.at = la.model.calls + interruptions
        try:
            la.forget(batches()[:2])
        except KeyboardInterrupt:
            la.model.at = None
            untouched.check()
            interruptions += 1
    assert interruptions >= 2


def test_another_error_in_the_curvature_keeps_nothing(tmp_path):
    la = fitted(data=batches(seed=80), curvature_size=None)
    untouched = Snapshot(la, X)
    interrupt(la, Ending(batches(), N_BATCHES + 2), tmp_path / "fit", OSError)
    untouched.check()


# The system ends a process, or interrupts it, when it has computed for so long: also while it writes.
PROGRAM = """
import os, signal, sys, time, warnings

import torch
from helpers import build, inputs, mlp, targets
from interrupting import outcome
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")
torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # a kill loses no file that was written
path, result = "folder/fit", "result"


def save_outcome(la):
    torch.save(outcome(la), result)


def in_child(act):
    # Return the process; its exit code is 42 after an interrupt.
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        act()
        code = 0
    except KeyboardInterrupt:
        code = 42
    finally:
        os._exit(code)


def read_result():
    found = torch.load(result, weights_only=True)
    os.remove(result)
    return found


def assert_result(expected):
    (found, plain), (tensors, expected_plain) = read_result(), expected
    assert (plain, found.keys()) == (expected_plain, tensors.keys())
    assert all(torch.equal(found[k], tensors[k]) for k in tensors)
    assert os.listdir("folder") == [], os.listdir("folder")

STOPS, signals = 3, sys.argv[1]
END = {"kill": -signal.SIGPROF, "interrupt": 42}[signals]
MORE = {"checkpoint": path, "checkpoint_every": 1}


def fit(**more):
    torch.manual_seed(3)
    data = TensorDataset(inputs(200), targets("classification", 200))
    la = build(model=mlp(), subsample_size=60, n_eigenvalues=9, curvature_size=None, memory_budget=2**14)
    la.fit(DataLoader(data, batch_size=16, shuffle=True), **more)
    return la


def stopped(delay):
    signal.signal(signal.SIGPROF, signal.SIG_DFL if signals == "kill" else signal.default_int_handler)
    signal.setitimer(signal.ITIMER_PROF, delay)
    la = fit(**MORE)
    signal.setitimer(signal.ITIMER_PROF, 0)
    save_outcome(la)


fit()  # what is loaded at the first use
start = time.process_time()
save_outcome(fit(**MORE))
expected, length, codes = read_result(), time.process_time() - start, []
generator = torch.Generator().manual_seed(0)
while codes.count(END) < STOPS:
    pid = in_child(lambda: stopped(1e-3 + 0.6 * length * float(torch.rand((), generator=generator))))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    assert codes[-1] in (0, END), codes
    if codes[-1] == 0:
        assert_result(expected)
save_outcome(fit(**MORE))
assert_result(expected)
print("stopped", codes.count(END))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("signals", ["kill", "interrupt"])
def test_processes_that_are_stopped_at_any_moment(signals, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "folder").mkdir()
    support = str(Path(__file__).resolve().parents[1] / "support")
    path = os.pathsep.join([support, str(Path(laplace_ella.__file__).parents[1])])
    options = {
        "cwd": tmp_path,
        "env": {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        "timeout": 240,
    }
    command = [sys.executable, "-W", "ignore", "program.py", signals]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "stopped 3"
