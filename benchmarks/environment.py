"""The machine, the versions and the commit that numbers were measured with, as every JSON file says them."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import laplace_ella

HERE = Path(__file__).resolve().parent


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """Describe this run; options that a benchmark does not have count as not given."""
    given = vars(args).get
    device = given("device") or torch.device("cpu")

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    return {
        "torch": torch.__version__,
        "laplace-torch": version("laplace-torch"),
        "laplace_ella": laplace_ella.__version__,
        "python": platform.python_version(),
        "commit": git("rev-parse", "HEAD") or None,
        "package_changed_since": bool(git("status", "--porcelain", "--", "../laplace_ella")),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "malloc": laplace_ella.raise_malloc_thresholds() if given("malloc") else "as it comes",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "load_before": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "weights": "cifar10_resnet20" if given("data") else "random",
        "images": "CIFAR-10 (JPEG)" if given("data") else "noise",
        "dtype": "float32",
        "quick": bool(given("quick")),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
