"""A child that is forked while another thread is in the middle of a call predicts as its parent does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

PROGRAM = """
import os, signal, threading, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
from helpers import build, inputs, targets
from models import Applied

net = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Tanh(), nn.Linear(7, 3)).double()
model = Applied(lambda net, x: model.called() or net(x), net).train()
model.called = lambda: None
x, y = inputs(), targets("classification")
la = build(model=model)
la.fit([(x, y)])
expected = la(x)

def in_order():
    own = [p for p in model.parameters() if p.requires_grad and isinstance(p, nn.Parameter)]
    attention = torch.backends.cuda.flash_sdp_enabled() and torch.backends.mha.get_fastpath_enabled()
    return len(own) == 4 and all(m.training for m in model.modules()) and attention and torch.equal(la(x), expected)

def child():
    signal.alarm(20)  # a lock that nobody has any more would stay shut
    try:
        good = in_order()
        la.fit([(x, y)])
        return 0 if good and in_order() else 1
    except BaseException:
        import traceback
        traceback.print_exc()
        return 2

def succeeded(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

# Another thread is in the model, and goes on only when the fork has begun: which waits for it.
inside, forking, left = threading.Event(), threading.Event(), []
os.register_at_fork(before=forking.set)

def stop():
    if threading.current_thread() is thread and not inside.is_set():
        inside.set()
        assert forking.wait(100)

def work():
    assert torch.equal(la(x), expected)
    left.append(True)

thread, model.called = threading.Thread(target=work), stop
thread.start()
assert inside.wait(100)
pid = os.fork()
if pid == 0:
    os._exit(child())
thread.join()
assert left and succeeded(pid) and in_order()

# The thread that has the lock forks: its own call goes on in the child.
pids, parent = [], os.getpid()
model.called = lambda: None if pids else pids.append(os.fork())
found = in_order()
if os.getpid() != parent:
    os._exit(0 if found and child() == 0 else 1)
assert found and in_order() and succeeded(pids[0])
print("done")
"""


def test_a_child_forked_during_a_call_predicts_and_fits():
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests.parent}:{tests / 'support'}"}
    program = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("done")
