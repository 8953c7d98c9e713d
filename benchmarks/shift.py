"""Measure how probabilities keep up when test images are corrupted or of another kind, and write it as JSON.

    python benchmarks/shift.py --case fashion-cnn|cifar10-jpeg|all [--data PATH] [--fashion PATH] [--svhn PATH]
        [--seeds N] [--quick] [--device cpu|cuda] [--threads 2] [--out FILE]

Every method is tuned once, on clean validation images, as in quality.py. It is then scored on corrupted copies
of the same test images, and on test images mixed with images of other data sets, which have no right answer.
See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import baselines
import ella_rows
import scores
import torch
from corruptions import KINDS, N_SEVERITIES, corrupted
from image_data import FASHION_MEAN, FASHION_STD, Counts, Data, fitted, grey, normaliser, parts
from method_groups import Shared, last_layers, simple
from problems import MEAN, STD
from quality import CASES, Case, about, parsed, prepared, quick
from shift_summary import by_severity
from torch import Tensor

HERE = Path(__file__).resolve().parent
METHODS = (
    "MAP",
    "temperature scaling",
    "vector scaling",
    "last-layer variance (T)",
    "last-layer full",
    "last-layer KFAC",
    "last-layer KFAC (T, s)",
    "ELLA, T = 1",
    "ELLA (T)",
    "ELLA (T, s)",
    "ELLA + residual (T, s, rho)",
)
CONFIDENCES = (*(round(0.05 * step, 2) for step in range(20)), 0.99)
N_DRAWS = 20  # of labels


@dataclass(frozen=True)
class Shift:
    """How many images a case of quality.py is shifted with, and how its pixels were normalised."""

    counts: Counts
    mean: tuple[float, ...]
    std: tuple[float, ...]


SHIFTS = {
    "fashion-cnn": Shift(
        Counts(train=30_000, validation=1000, test=1000, ood=1000), FASHION_MEAN, FASHION_STD
    ),
    "cifar10-jpeg": Shift(Counts(train=10_000, validation=1000, test=200, ood=200), MEAN, STD),
}


def run_seed(case: Case, shift: Shift, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return all scores of one seed."""
    data = shifted(case.data(case.counts, seed, args.fashion, args.data), shift, seed, args.svhn)
    on_device = data.to(args.device)
    model = prepared(case, on_device, seed, args)
    sets = {"test": on_device.test[0], **on_device.ood}
    inputs = {"train": on_device.train[0], "validation": on_device.validation[0], **sets}
    outputs = {name: baselines.outputs(model, x) for name, x in inputs.items()}
    times = ella_rows.Times(model, sets["test"][: ella_rows.BATCH])
    shared = Shared(model, data, on_device, outputs, case.size, seed, times, "isotropic")
    rows = simple(shared) | last_layers(shared)
    rows |= ella_rows.rows(shared.la, on_device, shared.kept, times)
    return {"seed": seed, "methods": {name: scored(rows[name], data) for name in METHODS}}


def shifted(data: Data, shift: Shift, seed: int, svhn: Path | None) -> Data:
    """Return the data with corrupted test images beside the other data sets; pure noise is left out."""
    scale = normaliser(shift.mean, shift.std)
    pixels = unscaled(data.test[0], shift)
    sets = {name: x for name, x in data.ood.items() if not name.endswith("noise")}
    if svhn is not None:
        x = svhn_images(svhn, pixels.shape[1:])
        sets["SVHN"] = scale(x[parts(len(x), seed, len(pixels))[0]])
    for place, kind in enumerate(KINDS):
        for severity in range(1, N_SEVERITIES + 1):
            sets[shift_name(kind, severity)] = scale(
                corrupted(pixels, kind, severity, seed * len(KINDS) + place)
            )
    return replace(data, ood=sets)


def unscaled(x: Tensor, shift: Shift) -> Tensor:
    """Return the pixels, in [0, 1], of normalised images."""
    centre, width = (torch.tensor(values)[:, None, None] for values in (shift.mean, shift.std))
    return (x * width + centre).clamp(0, 1)


def shift_name(kind: str, severity: int) -> str:
    return f"{kind}, severity {severity}"


def svhn_images(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Read SVHN's test images, pixels in [0, 1], with the number of channels and the size that are asked for.

    ``path`` is test_32x32.mat, or the folder that holds it: the root that torchvision downloads to.
    """
    from torchvision.datasets import SVHN

    root = path.parent if path.suffix == ".mat" else path
    try:
        pixels = torch.from_numpy(SVHN(root, split="test", download=False).data)
    except RuntimeError as error:
        raise SystemExit(
            f"No complete test_32x32.mat of SVHN in {root}. Pass --svhn ROOT with the root given to "
            "torchvision.datasets.SVHN(ROOT, split='test', download=True)."
        ) from error
    return fitted(grey(pixels) if shape[0] == 1 else pixels, shape)


def scored(row: baselines.Row, data: Data) -> dict[str, Any]:
    """Return a method's scores on clean and corrupted images, and on mixtures with each other data set."""
    y, of = data.test[1], row.probabilities
    names = {kind: [shift_name(kind, n) for n in range(1, N_SEVERITIES + 1)] for kind in KINDS}
    corrupt = {name for kind in names.values() for name in kind}
    return {
        "clean": of_set(of["test"], y),
        "corrupted": {kind: [of_set(of[name], y) for name in chosen] for kind, chosen in names.items()},
        "mixed": {name: by_confidence(of["test"], y, of[name]) for name in data.ood if name not in corrupt},
        "parameters": row.parameters,
        "notes": row.notes,
    }


def of_set(p: Tensor, y: Tensor) -> dict[str, float]:
    """Return the scores of probabilities on one set of images."""
    found = scores.of_probabilities(p, y, {})
    del found["auroc"]
    return {**found, "ece_of_calibrated": ece_of_calibrated(p), "entropy": float(scores.entropy(p).mean())}


def ece_of_calibrated(p: Tensor) -> float:
    """Return the mean ECE over labels drawn from the probabilities themselves: not 0, as the images are few."""
    labels = torch.multinomial(
        p.double(), N_DRAWS, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    return sum(scores.calibration_error(p, y) for y in labels.mT) / N_DRAWS


def by_confidence(p: Tensor, y: Tensor, outside: Tensor) -> dict[str, list[Any]]:
    """Return how many images are predicted with at least each confidence, and the share of these that is right.

    Images of another data set count as wrong. Source: Lakshminarayanan, Pritzel, Blundell (NeurIPS 2017).
    """
    confidence = torch.cat([p, outside]).double().max(1).values
    right = torch.cat([p.argmax(1) == y, torch.zeros(len(outside), dtype=torch.bool)])
    kept = [confidence >= least for least in CONFIDENCES]
    return {
        "confidence": list(CONFIDENCES),
        "kept": [float(chosen.double().mean()) for chosen in kept],
        "accuracy": [float(right[chosen].double().mean()) if chosen.any() else None for chosen in kept],
    }


def run_case(name: str, args: argparse.Namespace) -> None:
    """Run all seeds, and write after each."""
    shift = SHIFTS[name]
    case = replace(CASES[name], counts=shift.counts)
    if args.quick:
        case = quick(case)
        case = replace(case, counts=replace(case.counts, ood=case.counts.test))
    channels = len(shift.mean)
    found = about(name, case, args) | {
        "levels": {kind: {"of": k.level, "levels": k.levels(channels)} for kind, k in KINDS.items()},
    }
    path = args.out or (None if args.quick else HERE / "results" / f"shift_{name}.json")
    start = time.perf_counter()
    for seed in range(args.seeds):
        found["seeds"].append(run_seed(case, shift, seed, args))
        found["environment"]["seconds"] = round(time.perf_counter() - start)
        print(summary(found["seeds"][-1], f"{name}, seed {seed}"), flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(f"written: {os.path.relpath(path)}; {found['environment']['seconds']} s so far", flush=True)


def summary(found: dict[str, Any], title: str) -> str:
    """Return one seed's scores as text: means over the kinds of corruption at each severity."""
    lines = []
    for score in ("nll", "ece", "accuracy"):
        lines.append(f"{title + ': ' + score:36}" + "".join(f"{n:10}" for n in range(N_SEVERITIES + 1)))
        lines += [
            f"{name:36}" + "".join(f"{value:10.4f}" for value in by_severity(row, score))
            for name, row in found["methods"].items()
        ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*SHIFTS, "all"], default="all")
    parser.add_argument("--svhn", type=Path, help="SVHN: test_32x32.mat or its folder, torchvision's root")
    return parsed(parser, "shift")


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # of other libraries, hundreds of them
    for name in SHIFTS if args.case == "all" else [args.case]:
        run_case(name, args)


if __name__ == "__main__":
    main()
