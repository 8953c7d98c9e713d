"""Run the paper's settings on its data, or on CIFAR-10 (JPEG), and write the scores as JSON."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks.environment import environment
from benchmarks.methods import ours
from benchmarks.studies.common import baselines, ella, scores
from benchmarks.studies.common.results import chosen, results, run_seeds
from benchmarks.studies.paper.data import Counts, Sets, Source, split
from benchmarks.studies.paper.networks import Network
from benchmarks.studies.paper.options import RANK, parse

N_LANDMARKS = 2000
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
    times = ella.Times(model, next(iter(batches(sets.test)))[0].to(args.device))
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
            "methods": baselines.scored(rows, y, scored_on[on]),
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
    times: ella.Times,
) -> Any:
    """Fit with snapshots of G, for early stopping."""
    la = ours(
        model,
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


def tuned(la: Any, network: Network, val: DataLoader, on: str, times: ella.Times) -> dict[str, Chosen]:
    """Stop early, and search for a temperature, each from the fit as it was."""
    ways: dict[str, Callable[[Any, Any], dict[str, Any]]] = {STOPPED: stopped}
    ways |= {name: ella.searched(*searched) for name, searched in SEARCHES.items()}
    found, all_inputs = {}, la.snapshots[-1][0]
    for name, way in ways.items():
        use(la, all_inputs, {"prior_precision": network.prior_precision})
        stage = f"tune on {on}: {name}"
        with warnings.catch_warnings(record=True) as caught, times.stage(stage, len(val.dataset)):
            warnings.simplefilter("always", UserWarning)
            more = way(la, val)
        more.pop("notes_of_result", None)  # the warnings say the same
        notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        n = more.get("n_curvature", all_inputs)
        found[name] = Chosen(n, ella.setting(la), times.stages[stage]["seconds"], notes, more)
    return found


def stopped(la: Any, val: DataLoader) -> dict[str, Any]:
    """Stop where ``fit(val_loader=val, link_approx="mc")`` would, without another pass over the training data."""
    device, prior = next(la.model.parameters()).device, float(la.prior_precision)
    kept, y = zip(*((ella.keep(la, x.to(device)), y) for x, y in val))

    def stop_at(n: int) -> float:
        use(la, n, {"temperature": la.n_data / n, "prior_precision": prior * n / la.n_data})
        found = torch.cat([ella.probabilities(la, part, 100).cpu() for part in kept])
        return float(scores.nll(found, torch.cat(y)).mean())

    found = {n: stop_at(n) for n, _ in la.snapshots}
    best = min(found, key=found.get)
    stop_at(best)
    history = {"processed_examples": [float(n) for n in found], "val_nll": list(found.values())}
    return {"validation_nll": found[best], "n_curvature": best, "history": history}


def use(la: Any, n_curvature: int, setting: dict[str, float]) -> None:
    """Let G be what was found from the first n curvature inputs, under a setting."""
    la.H = dict(la.snapshots)[n_curvature]
    ella.apply(la, setting)


@torch.no_grad()
def predictions(
    la: Any, chosen: dict[tuple[str, str], Chosen], test: DataLoader, device: torch.device
) -> tuple[Tensor, Tensor, dict[tuple[str, str], Tensor]]:
    """Return logits (N, C), labels (N,), and the class probabilities (N, C) of every setting."""
    f, y, found = [], [], {key: [] for key in chosen}
    for x, labels in test:
        part = ella.keep(la, x.to(device))
        f.append(part.f.cpu())
        y.append(labels)
        for key, row in chosen.items():
            use(la, row.n_curvature, row.setting)
            found[key].append(ella.probabilities(la, part).cpu())
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


def run_network(network: Network, model: nn.Module, args: argparse.Namespace) -> None:
    """Run all seeds, and write after each."""
    model, source, counts = model.to(args.device), args.source, args.counts
    found = about(network, model, source, counts, args)
    file = results("paper") / f"{args.kind.file.format(network.name)}.json"

    def run(seed: int) -> dict[str, Any]:
        sets = split(source, network.transforms(model), counts, seed)
        return run_seed(network, model, sets, counts, seed, source.n_total, args)

    def scores_of(one: dict[str, Any]) -> dict[str, Any]:
        rows = {
            f"{name}, tuned on {on}": row
            for on, part in one["tuned_on"].items()
            for name, row in part["methods"].items()
        }
        return chosen(rows, "nll", "ece", "accuracy", "brier")

    run_seeds(found, args.seeds, run, scores_of, args.out or (None if args.subsample else file))


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


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # of other libraries, hundreds of them
    for network, model in args.jobs:
        run_network(network, model, args)
