"""What fewer directions of one fit cost in NLL and calibration, and what they save in forward passes and milliseconds."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import loader, once
from benchmarks.methods import ours
from benchmarks.problems import MEAN, STD, network
from benchmarks.studies.ablations.quality import TUNED, Posterior, Seen, scored, simple, tuned
from benchmarks.studies.common import baselines, scores
from benchmarks.studies.common.ella import keep
from benchmarks.studies.common.images import Pair, cifar10_jpeg, normaliser, parts

SIZES = {"subsample_size": 500, "n_eigenvalues": 50, "curvature_size": 400}
COUNTS = {"train": 2000, "validation": 800, "test": 1000}
RANKS = (1, 2, 5, 10, 20, 50)
BATCHES = (1, 64)
REPEATS = 3


def images(data: Path, counts: dict[str, int]) -> dict[str, Pair]:
    """Return training images, and validation and test images from those that the network was not fitted to."""
    x, y = cifar10_jpeg(data / "cifar10_jpeg_train10k.npz")
    x_test, y_test = cifar10_jpeg(data / "cifar10_jpeg_test.npz")
    (train,) = parts(len(y), 0, counts["train"])
    validation, test = parts(len(y_test), 0, counts["validation"], counts["test"])
    scale = normaliser(MEAN, STD)
    found = {"train": (x[train], y[train])}
    found |= {"validation": (x_test[validation], y_test[validation]), "test": (x_test[test], y_test[test])}
    return {name: (scale(pixels), labels) for name, (pixels, labels) in found.items()}


def fitted(args: argparse.Namespace) -> tuple[Any, dict[str, Pair], dict[str, Any]]:
    """Return a fitted estimator, its images, and what it is."""
    counts = {k: n // 20 for k, n in COUNTS.items()} if args.quick else COUNTS
    sizes = {"subsample_size": 20, "n_eigenvalues": 5, "curvature_size": 20} if args.quick else SIZES
    pairs, model = images(args.data, counts), network("resnet20", args.data, torch.device("cpu"))
    la = ours(model, prior_precision=1.0, **sizes)
    la.fit(loader(*pairs["train"], 100))
    about = {
        "network": "ResNet-20, published weights",
        "images": "CIFAR-10 (JPEG)",
        "parameters": la.n_params,
    }
    return la, pairs, about | {"counts": counts, "sizes": sizes}


def calls(args: argparse.Namespace) -> dict[str, Any]:
    """Return what ``predict_plan`` promises for calls of each size and K', and what these calls then take."""
    la, pairs, about = fitted(args)
    x, rows = pairs["test"][0], []
    plans = {b: la.predict_plan(x[:b], verbose=False) for b in BATCHES}
    for at_each in zip(*(plan.prices for plan in plans.values())):
        la.n_directions = at_each[0].n_directions
        la(x[:1])  # prepares the directions
        found = {str(b): taken(la, x[:b], price) for b, price in zip(BATCHES, at_each)}
        rows.append({"K": la.n_directions, "retained": at_each[0].retained, "calls": found})
    passes = {str(b): plan.seconds for b, plan in plans.items()}
    return {**about, "passes": passes, "rows": rows}


def taken(la: Any, x: torch.Tensor, price: Any) -> dict[str, Any]:
    """Return what was promised of a call, and what it takes."""
    seconds = [once(lambda: la(x), x.device)[0] for _ in range(REPEATS if len(x) == 1 else 1)]
    promised = {name: getattr(price, name) for name in ("mode", "counted", "forwards", "seconds", "n_bytes")}
    return {**promised, "taken": statistics.median(seconds)}


def methods(G: torch.Tensor, validation: Seen, test: Seen) -> dict[str, Any]:
    """Tune T, and T and s, for as many directions as G has; score on test images."""
    posterior, found = Posterior.of(G), {}
    for name, grids in TUNED.items():
        setting = tuned(posterior, validation, grids)
        p = posterior.predictor(test)(setting)
        wrong, entropy = p.argmax(1) != test.y, scores.entropy(p)
        found[name] = scored(posterior, setting, test, errors=scores.auroc(entropy[~wrong], entropy[wrong]))
    return found


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Return the scores of each K', from the features of all directions."""
    la, pairs, about = fitted(args)
    seen, outputs, whole = {}, {}, la.basis
    for name in ("validation", "test"):
        x, y = pairs[name]
        kept = keep(la, x)
        seen[name], outputs[name] = Seen(kept.phi, kept.f, y), baselines.outputs(la.model, x)
    rows = []
    for k in (k for k in RANKS if k <= whole.rank):
        la.n_directions = k
        rows.append({"K": k, "retained": la.basis.retained, "methods": methods(la.H, **seen)})
    simpler = simple(outputs, seen["validation"].y, seen["test"].y)
    return {**about, "samples": baselines.N_SAMPLES, "simple": simpler, "rows": rows}
