"""Measure how good ELLA's probabilities are beside simpler methods, on real images, and write it as JSON.

    python benchmarks/quality.py --case fashion-cnn|fashion-vit|cifar10-jpeg|all [--data PATH] [--fashion PATH]
        [--seeds 3] [--quick] [--device cpu|cuda] [--threads 2] [--out FILE]

Every method is tuned on the same validation images, which the network was not fitted to, and scored on
test images. The seed changes the split, ELLA's landmarks and curvature inputs, and the network where it
is trained here. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import ella_rows
import last_layer
import scores
import torch
from image_data import Counts, Data, cifar_data, fashion_data
from problems import network
from run import environment
from torch import Tensor, nn
from trained import SmallCNN, SmallViT, train

HERE = Path(__file__).resolve().parent
REFERENCES = ("MAP", "temperature scaling")
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Case:
    """A network with its images."""

    network: str
    images: str
    data: Callable[[Counts, int, Path, Any], Data]
    counts: Counts
    build: Callable[[], nn.Module] | None = None  # None: published weights
    epochs: int = 0
    rate: float = 0.0
    size: ella_rows.Size = field(default_factory=ella_rows.Size)


FASHION = Counts(train=30_000)
CASES = {
    "fashion-cnn": Case("strided CNN", "Fashion-MNIST", fashion_data, FASHION, SmallCNN, 5, 4e-3),
    "fashion-vit": Case(
        "small ViT", "Fashion-MNIST", fashion_data, replace(FASHION, test=2000, ood=500), SmallViT, 4, 2e-3
    ),
    "cifar10-jpeg": Case(
        "ResNet-20, published weights",
        "CIFAR-10 (JPEG)",
        cifar_data,
        Counts(train=10_000, test=2500, ood=500),
    ),
}


def quick(case: Case) -> Case:
    return replace(
        case,
        counts=Counts(train=1000, validation=200, test=200, ood=50),
        size=ella_rows.Size(subsample_size=40, n_eigenvalues=5, curvature_size=100),
    )


def run_seed(case: Case, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return all scores of one seed."""
    data = case.data(case.counts, seed, args.fashion, args.data)
    on_device = data.to(args.device)
    start = time.perf_counter()
    model = prepared(case, on_device, seed, args)
    seconds = time.perf_counter() - start
    sets = {"test": on_device.test[0], **on_device.ood}
    inputs = {"train": on_device.train[0], "validation": on_device.validation[0], **sets}
    outputs = {name: baselines.outputs(model, x) for name, x in inputs.items()}
    rows = simple_rows(model, data, outputs, seed)

    times = ella_rows.Times(model, sets["test"][: ella_rows.BATCH])
    la = ella_rows.fitted(model, on_device, case.size, seed, times)
    of_ella, kept = ella_rows.rows(la, on_device, sets, times)
    rows |= of_ella

    la.residual = "none"
    ella_rows.apply(la, rows["ELLA (T, s)"].parameters)
    own = {
        "ELLA residual share": {name: ella_rows.shares(la, parts).cpu() for name, parts in kept.items()},
        "ELLA novelty": ella_rows.novelty(la, on_device, kept, times),
    }
    return {
        "seed": seed,
        "training_seconds": seconds if case.build else None,
        "training_accuracy": float((outputs["train"].f.argmax(1) == data.train[1]).double().mean()),
        "methods": scored(rows, data),
        "novelty": novelty_scored(simple_novelty(outputs, rows) | own, rows["MAP"], data),
        "times": times.stages,
    }


def prepared(case: Case, data: Data, seed: int, args: argparse.Namespace) -> nn.Module:
    """Return the network in evaluation mode, trained if its weights are not published."""
    if case.build is None:
        return network("resnet20", args.data, args.device)
    torch.manual_seed(seed)
    return train(case.build().to(args.device), *data.train, case.epochs, seed, case.rate)


def simple_rows(
    model: nn.Module, data: Data, outputs: dict[str, baselines.Outputs], seed: int
) -> dict[str, baselines.Row]:
    """Tune all that needs no Jacobian of the whole network."""
    val, y = outputs["validation"], data.validation[1]
    tunings: dict[str, Callable[[], baselines.Tuned]] = {
        name: partial(method, val, y, seed) for name, method in baselines.METHODS.items()
    }
    for name, structure in last_layer.STRUCTURES.items():
        tunings[name] = partial(
            last_layer.tune, structure, model.fc, outputs["train"], data.train[1], val, y, seed
        )
    return {name: baselines.row(tuning, outputs, y) for name, tuning in tunings.items()}


def scored(rows: dict[str, baselines.Row], data: Data) -> dict[str, Any]:
    """Return each method's scores, and how its NLL differs from those of the two references."""
    y = data.test[1]
    found = {}
    for name, row in rows.items():
        test = row.probabilities["test"]
        found[name] = {
            **scores.of_probabilities(test, y, {of: row.probabilities[of] for of in data.ood}),
            "nll_minus": {
                other: scores.difference(test, rows[other].probabilities["test"], y) for other in REFERENCES
            },
            "parameters": row.parameters,
            "seconds": row.seconds,
            "notes": row.notes,
            **row.more,
        }
    return found


def simple_novelty(
    outputs: dict[str, baselines.Outputs], rows: dict[str, baselines.Row]
) -> dict[str, dict[str, Tensor]]:
    """Return the novelty scores that one forward pass gives, by their names, of each set."""
    functions = baselines.novelty_scores(outputs["train"], rows["temperature scaling"].parameters["divisor"])
    chosen = {name: out for name, out in outputs.items() if name not in ("train", "validation")}
    return {name: {of: score(out) for of, out in chosen.items()} for name, score in functions.items()}


def novelty_scored(found: dict[str, dict[str, Tensor]], row: baselines.Row, data: Data) -> dict[str, Any]:
    """Return how well each novelty score does; errors are those of the row's method."""
    wrong = row.probabilities["test"].argmax(1) != data.test[1]
    return {
        name: scores.of_novelty(of["test"], wrong, {outside: of[outside] for outside in data.ood})
        for name, of in found.items()
    }


def about(name: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Return what was run, on what."""
    weights = "trained here" if case.build else "cifar10_resnet20"
    return {
        "case": name,
        "environment": {**environment(args), "weights": weights, "images": case.images},
        "network": case.network,
        "parameters": n_parameters(case),
        "counts": asdict(case.counts),
        "epochs": case.epochs,
        "ella": asdict(case.size),
        "samples": baselines.N_SAMPLES,
        "seeds": [],
    }


def n_parameters(case: Case) -> int:
    model = case.build() if case.build else network("resnet20", None, torch.device("cpu"))
    return sum(p.numel() for p in model.parameters())


def run_case(name: str, args: argparse.Namespace) -> None:
    """Run all seeds, and write after each."""
    case = quick(CASES[name]) if args.quick else CASES[name]
    found = about(name, case, args)
    path = args.out or (None if args.quick else HERE / "results" / f"quality_{name}.json")
    start = time.perf_counter()
    for seed in range(args.seeds):
        found["seeds"].append(run_seed(case, seed, args))
        found["environment"]["seconds"] = round(time.perf_counter() - start)
        print(summary(found["seeds"][-1], f"{name}, seed {seed}"), flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(f"written: {os.path.relpath(path)}; {found['environment']['seconds']} s so far", flush=True)


def summary(found: dict[str, Any], title: str) -> str:
    """Return one seed's scores as text."""
    sets = list(found["methods"]["MAP"]["auroc"])
    head = ["NLL", "- MAP", "+-", "ECE", "accuracy", "Brier", "seconds", *sets]
    lines = [f"{title:36}" + "".join(f"{word[:9]:>10}" for word in head)]
    for name, row in found["methods"].items():
        gap = row["nll_minus"]["MAP"]
        numbers = [row["nll"], gap["mean"], gap["standard_error"], row["ece"], row["accuracy"], row["brier"]]
        lines.append(_line(name, [*numbers, row["seconds"], *row["auroc"].values()]))
    lines.append(f"{'novelty':36}" + "".join(f"{word[:9]:>10}" for word in ["errors", *sets]))
    lines += [_line(name, [row["errors"], *row["auroc"].values()]) for name, row in found["novelty"].items()]
    lines.append(f"{'times':36}" + "".join(f"{word:>10}" for word in ("seconds", "inputs", "forwards")))
    for name, stage in found["times"].items():
        numbers = [stage[key] for key in ("seconds", "inputs", "forwards_an_input")]
        lines.append(_line(name, numbers))
    return "\n".join(lines)


def _line(name: str, numbers: list[float]) -> str:
    return f"{name:36}" + "".join(f"{number:10.4g}" for number in numbers)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--data", type=Path, help="folder with cifar10_resnet20.pt, cifar10_jpeg_*.npz")
    parser.add_argument(
        "--fashion", type=Path, default=DEBIAN, help="Fashion-MNIST: IDX files, or torchvision's root"
    )
    parser.add_argument("--seeds", type=int, help="how many; default 3, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument(
        "--out", type=Path, help="of one case; default: results/quality_CASE.json, or nothing with --quick"
    )
    args = parser.parse_args()
    if args.out is not None and args.case == "all":
        parser.error("--out names the file of one case; with --case all, leave it out")
    if args.data is None and args.case not in ("fashion-cnn", "fashion-vit"):
        parser.error("cifar10-jpeg needs --data; see README.md beside this file for what the folder holds")
    args.seeds = args.seeds or (1 if args.quick else 3)
    args.malloc = False  # read by run.environment
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # of other libraries, hundreds of them
    for name in CASES if args.case == "all" else [args.case]:
        run_case(name, args)


if __name__ == "__main__":
    main()
