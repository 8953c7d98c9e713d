"""Measure what ELLA costs on this machine, in plain forward passes, and write it as JSON.

    python benchmarks/run.py --quick [--data PATH] [--device cpu|cuda] [--out FILE]

See README.md beside this file for what is measured, and how.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import laplace
import psutil
import torch
from laplace import Laplace
from problems import images, resnet20
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_ella
from laplace_ella.autodiff import FunctionalModel, safe_autodiff
from laplace_ella.gradients import asdl_rows, backpack_rows, gradient_rows

HERE = Path(__file__).resolve().parent
GIGABYTE = 1e9
ENGINES = {"torch.func": gradient_rows, "BackPACK": backpack_rows, "ASDL": asdl_rows}


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time functions in turn, round after round after a warm-up, so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 1):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(times: dict[str, list[float]], name: str, unit: str) -> dict[str, float]:
    """Median of the quotients of each round, with the quartiles."""
    quotients = [a / b for a, b in zip(times[name], times[unit])]
    low, middle, high = statistics.quantiles(quotients, n=4)
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def plain(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass of the user's model, without a graph."""

    @torch.no_grad()
    def forward() -> Tensor:
        return model(x)

    return forward


def loader(x: Tensor, y: Tensor, batch: int) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def result(
    case: str, unit: str, value: float, target: float | None, at_most: bool = True, **more: Any
) -> dict[str, Any]:
    met = None if target is None else (value <= target if at_most else value >= target)
    bound = None if target is None else {"at most" if at_most else "at least": target}
    return {"case": case, "value": round(value, 3), "unit": unit, "target": bound, "met": met, **more}


def gradients(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Landmark gradients at batch 50, by each engine."""
    model = resnet20(args.data, args.device)
    x = images(50, args.data)[0].to(args.device)
    outputs = torch.arange(50, device=args.device) % 10
    function = FunctionalModel(model)

    def rows_by(engine: Callable[..., Any]) -> Callable[[], Any]:
        def compute() -> Any:
            with safe_autodiff(model):
                return engine(function, function.weights(), x, outputs)

        return compute

    functions = {"forward": plain(model, x), **{k: rows_by(e) for k, e in ENGINES.items()}}
    times = interleaved(functions, 7 if args.quick else 21, args.device)
    forward = statistics.median(times["forward"]) / 50
    return [
        result(
            f"landmark gradients, {name}",
            "forwards a landmark",
            ratios(times, name, "forward")["median"],
            12 if name == "torch.func" else None,
            batch=50,
            spread=ratios(times, name, "forward"),
            forward_ms_an_image=1e3 * forward,
        )
        for name in ENGINES
    ]


def features(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Features of 50 images at K = 20, C = 10, with the automatic chunks."""
    model = resnet20(args.data, args.device)
    x, y = (t.to(args.device) for t in images(50, args.data))
    la = Laplace(model, "classification", "all", "ella", subsample_size=40, n_eigenvalues=20)
    la.fit(loader(x, y, 50))
    functions = {"forward": plain(model, x), "features": lambda: la.backend.features(x, la.basis)}
    times = interleaved(functions, 7 if args.quick else 21, args.device)
    spread = ratios(times, "features", "forward")
    return [
        result(
            "features, K = 20, C = 10",
            "forwards a sample",
            spread["median"],
            54,
            batch=50,
            spread=spread,
            forward_ms_an_image=1e3 * statistics.median(times["forward"]) / 50,
        )
    ]


def against_host(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Fit and prediction against laplace-torch's own ELLA: M = N = 24, K = 20, exact G, batches of 8."""
    if not hasattr(laplace, "ELLA"):
        print(f"laplace-torch {version('laplace-torch')} has no ELLA: comparison skipped")
        return []
    model = resnet20(args.data, args.device)
    x, y = (t.to(args.device) for t in images(24, args.data))
    batches = loader(x, y, 8)
    sizes = {"subsample_size": 24, "n_eigenvalues": 20}
    fitted: dict[str, Any] = {}

    def fit_ours(landmarks: tuple[Tensor, Tensor] | None = None) -> None:
        la = Laplace(model, "classification", "all", "ella", curvature_size=None, temperature=1.0, **sizes)
        la.fit(batches, landmarks=landmarks)
        fitted["ours"] = la

    def fit_host() -> None:
        la = Laplace(model, "classification", "all", "gp", functional_approximation="nystrom", **sizes)
        la.fit(batches)
        fitted["host"] = la

    def predict(name: str) -> Callable[[], Tensor]:
        return lambda: torch.cat([fitted[name](xb, link_approx="probit") for xb, _ in batches])

    repeats = 3 if args.quick else 7
    fits = interleaved({"ours": fit_ours, "host": fit_host}, repeats, args.device)
    predictions = interleaved({"ours": predict("ours"), "host": predict("host")}, repeats, args.device)
    # The two draw different landmarks; with the host's, predictions agree.
    chosen = torch.randperm(24, generator=torch.Generator().manual_seed(fitted["host"].seed))
    outputs = torch.randint(10, (24,), generator=torch.Generator().manual_seed(fitted["host"].seed + 1))
    fit_ours((x[chosen.to(x.device)], outputs))
    apart = float((predict("ours")() - predict("host")()).abs().max())
    return [
        result(
            f"{name} against laplace-torch's own ELLA",
            "times as fast",
            ratios(times, "host", "ours")["median"],
            target,
            at_most=False,
            spread=ratios(times, "host", "ours"),
            seconds={k: statistics.median(v) for k, v in times.items()},
            **more,
        )
        for name, times, target, more in (
            ("fit", fits, 12, {}),
            ("prediction", predictions, 2.2, {"largest_difference_with_equal_landmarks": apart}),
        )
    ]


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of a fit beyond what model, data and one forward pass hold."""
    model = resnet20(args.data, args.device)
    x, y = images(500, args.data)
    plain(model, x[:50].to(args.device))()
    la = Laplace(model, "classification", "all", "ella", subsample_size=200, n_eigenvalues=20)
    before = memory_in_use(args.device)
    la.fit(loader(x, y, 50))
    extra = (peak_memory(args.device) - before) / GIGABYTE
    return [result("peak extra memory of fit", "GB", extra, 2, batch=50, M=200, K=20, N=500)]


def memory_in_use(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """Return the peak of this process, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count the parent's peak too
        (line,) = (row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


CASES = {"gradients": gradients, "features": features, "host": against_host, "memory": memory}


def in_fresh_process(case: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one case in a process of its own, so that no case inherits another's memory."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", case, "--device", str(args.device)]
    command += ["--threads", str(args.threads)]
    command += ["--quick"] if args.quick else []
    command += ["--data", str(args.data)] if args.data else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *notes, last = done.stdout.splitlines()
    for note in notes:
        print(note)
    return json.loads(last)


def environment(args: argparse.Namespace) -> dict[str, Any]:
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
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "load_before": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else None,
        "weights": "cifar10_resnet20" if args.data else "random",
        "images": "CIFAR-10 (JPEG)" if args.data else "noise",
        "dtype": "float32",
        "quick": args.quick,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(row: dict[str, Any]) -> str:
    text = f"{row['case']:44}{row['value']:9.2f} {row['unit']:20}"
    if row["target"] is None:
        return text
    ((bound, number),) = row["target"].items()
    return f"{text} target: {bound} {number:g}, {'met' if row['met'] else 'MISSED'}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--data", type=Path, help="folder with cifar10_resnet20.pt, cifar10_jpeg_test.npz")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, help="default: results/quick.json or full.json here")
    parser.add_argument("--case", choices=CASES, help="one case, in this process, printed as JSON")
    args = parser.parse_args()
    args.out = args.out or HERE / "results" / ("quick.json" if args.quick else "full.json")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.case:
        warnings.simplefilter("ignore")  # of other libraries, hundreds of them
        print(json.dumps(CASES[args.case](args)))
        return
    found = {"environment": environment(args), "results": []}
    print("  ".join(f"{k} {v}" for k, v in found["environment"].items()))
    for case in CASES:
        rows = in_fresh_process(case, args)
        found["results"] += rows
        for row in rows:
            print(report(row), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {os.path.relpath(args.out)}")


if __name__ == "__main__":
    main()
