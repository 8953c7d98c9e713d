"""A child that is forked while another thread is in the middle of a call predicts as its parent does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

PROGRAM = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
import laplace_ella

class Stops(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Tanh(), nn.Linear(7, 3)).double()
        self.register_buffer("scale", torch.full((), 2.0, dtype=torch.float64))
        self.left, self.thread, self.last = None, None, None
        self.inside, self.go = threading.Event(), threading.Event()

    def forward(self, x):
        if threading.current_thread() is self.thread:
            self.left -= 1
            if self.left == 0:
                self.inside.set()
                assert self.go.wait(100)
        return self.net(x) * self.scale

torch.manual_seed(0)
model = Stops().train()
x, y = torch.randn(23, 5).double(), torch.randint(3, (23,))
la = laplace_ella.Laplace(
    model, "classification", "all", "ella", subsample_size=13, n_eigenvalues=5, temperature=1.0,
    residual="exact",
)
la.fit([(x, y)])
expected = la(x)

def in_order(la):
    names = [k for k, p in model.named_parameters() if p.requires_grad and isinstance(p, nn.Parameter)]
    flags = all(m.training for m in model.modules())
    attention = torch.backends.cuda.flash_sdp_enabled() and torch.backends.mha.get_fastpath_enabled()
    return len(names) == 4 and flags and attention and torch.equal(la(x), expected)

def child():
    signal.alarm(20)
    try:
        good = in_order(la)
        la.fit([(x, y)])
        return 0 if good and in_order(la) else 1
    except BaseException:
        import traceback
        traceback.print_exc()
        return 2

held = sys.argv[1]
for place in map(int, sys.argv[2].split(",")):
    model.inside.clear(), model.go.clear()
    if held == "lock":
        def work():
            with laplace_ella.network.safety.LOCK:
                model.inside.set()
                assert model.go.wait(100)
    else:
        work = lambda: la(x)
    model.thread = threading.Thread(target=work)
    model.left = place
    model.thread.start()
    assert model.inside.wait(100), place
    pid = os.fork()
    if pid == 0:
        os._exit(child())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    model.go.set()
    model.thread.join()
    assert code == 0, (place, code)
    assert in_order(la)

# The thread that has the lock forks: its own call goes on in the child.
pid = -1
class Forks(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.armed = model.net, False
    def forward(self, x):
        global pid
        if self.armed and pid < 0:
            pid = os.fork()
        return self.net(x)
forks = Forks()
other = laplace_ella.Laplace(forks, "classification", "all", "ella", temperature=1.0)
other.fit([(x, y)])
expected_of_other = other(x)
forks.armed = True
parent = os.getpid()
found = torch.equal(other(x), expected_of_other) and torch.equal(other(x), expected_of_other)
if os.getpid() != parent:
    os._exit(0 if found else 1)
assert found
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
print("done")
"""


@pytest.mark.parametrize(("held", "places"), [("lock", "1"), ("call", "1,2")])
def test_a_child_forked_during_a_call_predicts_and_fits(held, places):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, held, places],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("done")
