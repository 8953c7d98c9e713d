"""The page on serving: its blocks run, and so does its script, whose workers are processes of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from laplace_ella import ELLALaplace

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/serving.md").read_text(), re.S | re.M)


def test_blocks_and_workers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "serving"}
    *blocks, script = BLOCKS
    for block in blocks:
        exec(block, names)
    Path("serve.py").write_text(script)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "serve.py"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    model.load_state_dict(torch.load("network.pt", weights_only=True))
    expected = ELLALaplace.load("posterior.pt", model)(torch.linspace(-1, 1, 24).reshape(6, 4))
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1])).reshape(6, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
