"""Run the paper's settings on the original data, or on CIFAR-10 (JPEG), and write the scores as JSON.

    python benchmarks/paper.py --cifar-root PATH [--network resnet20|resnet32|resnet44|resnet56|all]
        [--weights FILE|FOLDER | --download] [--device cpu|cuda] [--batch-size 100] [--seeds 1] [--subsample N]
        [--threads 2] [--out FILE]
    python benchmarks/paper.py --imagenet-root PATH [--network resnet18|resnet34|resnet50|vit_base_patch16_224|all] ...
    python benchmarks/paper.py --data PATH ...

M = 2000 balanced landmarks, K = 20, the prior of the paper. Every method is tuned twice: on training images held
out and cropped, as the authors' code does, and on a part of the test images. See docs/paper.md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import ella_rows
import scores
import torch
from paper_data import Counts, Sets, Source, split
from paper_networks import Network
from paper_options import RANK, parse
from run import environment
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from laplace_ella import Laplace

HERE = Path(__file__).resolve().parent
N_LANDMARKS = 2000
REFERENCES = ("MAP", "temperature scaling")
HELD_OUT, TEST = "training images, cropped", "test images"  # what is tuned on
SIMPLE = ("MAP", "temperature scaling", "vector scaling")
STOPPED = "ELLA, early stopping"
SEARCHES = {"ELLA (T)": ("temperature",), "ELLA (T, s)": ("temperature", "logit_scale")}


@dataclass(frozen=True)
class Chosen:
    """What tuning found: the number of curvature inputs and the setting."""

    n_curvature: int
    setting: dict[str, float]
    seconds: float
    notes: list[str]
    more: dict[str, Any] = field(default_factory=dict)


def run_seed(
    network: Network, model: nn.Module, sets: Sets, counts: Counts, seed: int, n_total: int, args: Any
):
    """Fit once, tune on either validation data, and let each setting predict all test images in one pass."""
    batches = partial(loader, batch=args.batch_size, workers=args.kind.workers)
    validation = {HELD_OUT: sets.held_out, TEST: Subset(sets.test, sets.validation.tolist())}
    times = ella_rows.Times(model, next(iter(batches(sets.test)))[0].to(args.device))
    la = fitted(network, model, batches(sets.train), len(sets.train), counts, seed, n_total, times)
    settings = {on: tuned(la, network, batches(data), on, times) for on, data in validation.items()}
    flat = {(on, name): found for on, rows in settings.items() for name, found in rows.items()}
    with times.stage("features and predictions", counts.test):
        f, y, probabilities = predictions(la, flat, batches(sets.test), args.device)
    scored_on = {HELD_OUT: torch.arange(len(y)), TEST: sets.scored}
    found = {}
    for on, data in validation.items():
        rows = simple_rows(*logits(model, batches(data), args.device), f, seed)
        rows |= {name: as_row(row, probabilities[on, name]) for name, row in settings[on].items()}
        found[on] = {
            "validation": len(data),
            "test": len(scored_on[on]),
            "methods": scored(rows, y, scored_on[on]),
        }
    return {
        "seed": seed,
        "tuned_on": found,
        "times": times.stages,
        "retained_trace": float(la.basis.retained),
    }


def loader(data: Dataset, batch: int, workers: int) -> DataLoader:
    return DataLoader(data, batch_size=batch, num_workers=workers)


def fitted(
    network: Network,
    model: nn.Module,
    train: DataLoader,
    n_train: int,
    counts: Counts,
    seed: int,
    n_total: int,
    times: ella_rows.Times,
) -> Any:
    """Fit with snapshots of G, for early stopping."""
    la = Laplace(
        model,
        "classification",
        "all",
        "ella",
        subsample_size=min(N_LANDMARKS, n_train),
        n_eigenvalues=RANK,
        curvature_size=counts.curvature,
        prior_precision=network.prior_precision,
        seed=seed,
    )
    every = max(1, counts.every // train.batch_size)
    with times.stage("fit", n_train):
        la.fit(train, balanced=True, val_steps=every, n_total=n_total)
    return la


def tuned(la: Any, network: Network, val: DataLoader, on: str, times: ella_rows.Times) -> dict[str, Chosen]:
    """Stop early, and search for a temperature, each from the fit as it was."""
    ways: dict[str, Callable[[Any, Any], dict[str, Any]]] = {STOPPED: stopped}
    ways |= {name: ella_rows.searched(*searched) for name, searched in SEARCHES.items()}
    found = {}
    for name, way in ways.items():
        use(la, la.snapshots[-1][0], {"prior_precision": network.prior_precision})
        stage = f"tune on {on}: {name}"
        with warnings.catch_warnings(record=True) as caught, times.stage(stage, len(val.dataset)):
            warnings.simplefilter("always", UserWarning)
            more = way(la, val)
        more.pop("notes_of_result", None)  # the warnings say the same
        notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        seconds = times.stages[stage]["seconds"]
        found[name] = Chosen(la.n_curvature, ella_rows.setting(la), seconds, notes, more)
    return found


def stopped(la: Any, val: DataLoader) -> dict[str, Any]:
    """Do what ``fit(val_loader=val, link_approx="mc")`` does after its pass, without another pass."""
    la._stop_early(val, "mc", True, la._progress(False))
    history = la.fit_history_
    return {"validation_nll": min(history["val_nll"]), "n_curvature": la.n_curvature, "history": history}


def use(la: Any, n_curvature: int, setting: dict[str, float]) -> None:
    la._keep_snapshot(n_curvature)
    ella_rows.apply(la, setting)


@torch.no_grad()
def predictions(
    la: Any, chosen: dict[tuple[str, str], Chosen], test: DataLoader, device: torch.device
) -> tuple[Tensor, Tensor, dict[tuple[str, str], Tensor]]:
    """Return logits (N, C), labels (N,), and the class probabilities (N, C) of every setting."""
    f, y, found = [], [], {key: [] for key in chosen}
    for x, labels in test:
        part = la._linearised(x.to(device))
        f.append(part.f.cpu())
        y.append(labels)
        for key, row in chosen.items():
            use(la, row.n_curvature, row.setting)
            found[key].append(ella_rows.probabilities(la, [part]).cpu())
    return torch.cat(f), torch.cat(y), {key: torch.cat(parts) for key, parts in found.items()}


@torch.no_grad()
def logits(model: nn.Module, data: DataLoader, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the network's outputs (N, C) and the labels (N,)."""
    f, y = zip(*((model(x.to(device)).cpu(), labels) for x, labels in data))
    return torch.cat(f), torch.cat(y)


def simple_rows(f_val: Tensor, y_val: Tensor, f_test: Tensor, seed: int) -> dict[str, baselines.Row]:
    """Tune what needs logits only."""
    outputs = {
        name: baselines.Outputs(f.double(), f.new_empty(len(f), 0))
        for name, f in (("validation", f_val), ("test", f_test))
    }
    return {
        name: baselines.row(
            partial(baselines.METHODS[name], outputs["validation"], y_val, seed), outputs, y_val
        )
        for name in SIMPLE
    }


def as_row(chosen: Chosen, probabilities: Tensor) -> baselines.Row:
    return baselines.Row(
        {"test": probabilities}, chosen.setting, chosen.seconds, chosen.notes, dict(chosen.more)
    )


def scored(rows: dict[str, baselines.Row], y: Tensor, chosen: Tensor) -> dict[str, Any]:
    """Return each method's scores on chosen test images."""
    test = {name: row.probabilities["test"][chosen] for name, row in rows.items()}
    return {
        name: {
            **scores.of_probabilities(test[name], y[chosen], {}),
            "nll_minus": {
                other: scores.difference(test[name], test[other], y[chosen]) for other in REFERENCES
            },
            "parameters": row.parameters,
            "seconds": row.seconds,
            "notes": row.notes,
            **row.more,
        }
        for name, row in rows.items()
    }


def run_network(network: Network, model: nn.Module, args: argparse.Namespace) -> None:
    """Run all seeds, and write after each."""
    model, source, counts = model.to(args.device), args.source, args.counts
    found = about(network, model, source, counts, args)
    file = HERE / "results" / f"{args.kind.file.format(network.name)}.json"
    path = args.out or (None if args.subsample else file)
    start = time.perf_counter()
    for seed in range(args.seeds):
        sets = split(source, network.transforms(model), counts, seed)
        found["seeds"].append(run_seed(network, model, sets, counts, seed, source.n_total, args))
        found["environment"]["seconds"] = round(time.perf_counter() - start)
        print(summary(found["seeds"][-1], f"{network.name}, {source.images}, seed {seed}"), flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(f"written: {os.path.relpath(path)}; {found['environment']['seconds']} s so far", flush=True)


def about(network: Network, model: nn.Module, source: Source, counts: Counts, args: Any) -> dict[str, Any]:
    return {
        "environment": {**environment(args), "weights": network.source, "images": source.images},
        "network": network.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "counts": asdict(counts),
        "n_total": source.n_total,
        "ella": {"M": N_LANDMARKS, "K": RANK, "prior_precision": network.prior_precision},
        "samples": baselines.N_SAMPLES,
        "batch_size": args.batch_size,
        "seeds": [],
    }


def summary(found: dict[str, Any], title: str) -> str:
    """Return one seed's scores as text."""
    lines = [title]
    for on, part in found["tuned_on"].items():
        lines.append(f"tuned on {part['validation']} {on}, scored on {part['test']} test images")
        lines.append(f"{'':24}{'NLL':>9}{'ECE':>9}{'accuracy':>10}{'Brier':>9}")
        for name, row in part["methods"].items():
            lines.append(
                f"{name:24}{row['nll']:9.4f}{row['ece']:9.4f}{row['accuracy']:10.4f}{row['brier']:9.4f}"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments, __doc__.splitlines()[0])
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # of other libraries, hundreds of them
    for network, model in args.jobs:
        run_network(network, model, args)


if __name__ == "__main__":
    main()
