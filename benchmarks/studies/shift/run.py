"""Measure how probabilities keep up with corrupted and other images, and write it as JSON."""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import MEAN, STD
from benchmarks.studies.common import baselines, ella, scores
from benchmarks.studies.common.cases import CASES, Case, about, parsed, prepared, quick
from benchmarks.studies.common.groups import Shared, last_layers, simple
from benchmarks.studies.common.images import (
    FASHION_MEAN,
    FASHION_STD,
    Counts,
    Data,
    fitted,
    grey,
    normaliser,
    parts,
)
from benchmarks.studies.common.results import results, run_seeds
from benchmarks.studies.common.start import options_of
from benchmarks.studies.shift.corruptions import KINDS, N_SEVERITIES, corrupted
from benchmarks.studies.shift.summary import by_severity

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
    """How many images a case of common/cases.py is shifted with, and how its pixels were normalised."""

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
    times = ella.Times(model, sets["test"][: ella.BATCH])
    shared = Shared(model, data, on_device, outputs, case.size, seed, times)
    rows = simple(shared) | last_layers(shared)
    rows |= ella.rows(shared.la, on_device, shared.kept, times)
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
    path = args.out or (None if args.quick else results("shift") / f"shift_{name}.json")
    run_seeds(found, args.seeds, lambda seed: run_seed(case, shift, seed, args), nlls, path)


def nlls(found: dict[str, Any]) -> dict[str, Any]:
    """Return the mean NLL of each method over the kinds of corruption, by severity."""
    return {name: dict(zip("012345", by_severity(row, "nll"))) for name, row in found["methods"].items()}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = options_of(__package__)
    parser.add_argument("--case", choices=[*SHIFTS, "all"], default="all")
    parser.add_argument("--svhn", type=Path, help="SVHN: test_32x32.mat or its folder, torchvision's root")
    return parsed(parser, arguments)


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # of other libraries, hundreds of them
    for name in SHIFTS if args.case == "all" else [args.case]:
        run_case(name, args)
