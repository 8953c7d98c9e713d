"""Measure how good ELLA's probabilities are beside simpler methods, on real images, and write it as JSON.

    python benchmarks/quality.py --case fashion-cnn|fashion-vit|mnist-cnn|cifar10-jpeg|all [--data PATH]
        [--fashion PATH] [--seeds 3] [--groups NAME,NAME] [--add [--only-seeds N,N]] [--quick] [--device cpu|cuda] [--threads 2] [--out FILE]

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
from pathlib import Path
from typing import Any

import baselines
import ella_rows
import scores
import torch
from image_data import Counts, Data, cifar_data, fashion_data, mnist_data
from method_groups import GROUPS, Shared
from problems import network
from published import mnist_cnn
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
    build: Callable[[], nn.Module] | None = None  # None: the published ResNet-20, which --data holds
    epochs: int = 0  # 0: the weights are published
    rate: float = 0.0
    size: ella_rows.Size = field(default_factory=ella_rows.Size)


FASHION = Counts(train=30_000)
CASES = {
    "fashion-cnn": Case("strided CNN", "Fashion-MNIST", fashion_data, FASHION, SmallCNN, 5, 4e-3),
    "fashion-vit": Case(
        "small ViT", "Fashion-MNIST", fashion_data, replace(FASHION, test=2000, ood=500), SmallViT, 4, 2e-3
    ),
    "mnist-cnn": Case(
        "CNN, published weights",
        "MNIST",
        mnist_data,
        Counts(train=2000, validation=1000, test=1000, ood=250),
        mnist_cnn,
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
    inputs = {"train": on_device.train[0], "validation": on_device.validation[0], "test": on_device.test[0]}
    outputs = {name: baselines.outputs(model, x) for name, x in (inputs | on_device.ood).items()}
    times = ella_rows.Times(model, on_device.test[0][: ella_rows.BATCH])
    residual = "isotropic" if "ella" in args.groups else "none"
    shared = Shared(model, data, on_device, outputs, case.size, seed, times, residual)
    rows: dict[str, baselines.Row] = {}
    for group in args.groups:
        rows |= GROUPS[group](shared)
    return {
        "seed": seed,
        "training_seconds": seconds if case.epochs else None,
        "training_accuracy": float((outputs["train"].f.argmax(1) == data.train[1]).double().mean()),
        "methods": scored(rows, data),
        "novelty": novelty_scored(simple_novelty(outputs, rows) | shared.novelty, rows["MAP"], data),
        "times": times.stages,
    }


def prepared(case: Case, data: Data, seed: int, args: argparse.Namespace) -> nn.Module:
    """Return the network in evaluation mode, trained if its weights are not published."""
    if case.build is None:
        return network("resnet20", args.data, args.device)
    if not case.epochs:
        return case.build().to(args.device)
    torch.manual_seed(seed)
    return train(case.build().to(args.device), *data.train, case.epochs, seed, case.rate)


def scored(rows: dict[str, baselines.Row], data: Data) -> dict[str, Any]:
    """Return each method's scores, and how its NLL differs from those of the two references."""
    y = data.test[1]
    found = {}
    for name, row in rows.items():
        test = row.probabilities["test"]
        found[name] = {
            **scores.of_probabilities(
                test, y, {of: p for of, p in row.probabilities.items() if of != "test"}
            ),
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
    weights = "trained here" if case.epochs else "published"
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
    path = args.out or (None if args.quick else HERE / "results" / f"quality_{name}.json")
    found = json.loads(path.read_text()) if args.add else about(name, case, args)
    seeds = args.only_seeds or list(range(args.seeds))
    if args.add:
        require_fitting(found, case, [] if args.only_seeds else seeds)
        about_seeds = {"seeds": args.only_seeds} if args.only_seeds else {}
        found.setdefault("added", []).append({"groups": args.groups, **about_seeds, **environment(args)})
    start = time.perf_counter()
    for seed in seeds:
        one = run_seed(case, seed, args)
        before = next((known for known in found["seeds"] if known["seed"] == seed), None)
        if before is None:
            found["seeds"].append(one)
        else:
            add(before, one)
        if not args.add:
            found["environment"]["seconds"] = round(time.perf_counter() - start)
        print(summary(before or one, f"{name}, seed {seed}"), flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(f"written: {os.path.relpath(path)}; {time.perf_counter() - start:.0f} s so far", flush=True)


def require_fitting(found: dict[str, Any], case: Case, seeds: list[int]) -> None:
    """Refuse to add to what was run with other sizes, or without these seeds."""
    if (found["counts"], found["ella"]) != (asdict(case.counts), asdict(case.size)):
        raise SystemExit(
            "The file holds a run of other sizes. Nothing was added; run the whole case again, without --add."
        )
    missing = set(seeds) - {one["seed"] for one in found["seeds"]}
    if missing:
        raise SystemExit(
            f"The file has no seed {sorted(missing)}. Name it with --only-seeds to add it whole."
        )


def add(seed: dict[str, Any], more: dict[str, Any]) -> None:
    """Add methods to a seed's scores, if network and split are the same: then so is the NLL of MAP."""
    before, now = (one["methods"]["MAP"]["nll"] for one in (seed, more))
    if abs(before - now) > 1e-4:
        raise SystemExit(
            f"The NLL of MAP was {before:.5f} and is {now:.5f}: these are other networks or images. "
            "Nothing was added; run the whole case again, without --add."
        )
    seed["methods"] |= {k: row for k, row in more["methods"].items() if k not in REFERENCES}
    seed["novelty"] |= {k: row for k, row in more["novelty"].items() if k.startswith("ELLA")}
    seed["times"] |= more["times"]


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


def group_names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    return [name for name in GROUPS if name in {"simple", *names}]


def seed_numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parsed(parser: argparse.ArgumentParser, kind: str) -> argparse.Namespace:
    """Add the options that all benchmarks of these cases have, and read and check them."""
    parser.add_argument("--data", type=Path, help="folder with cifar10_resnet20.pt, cifar10_jpeg_*.npz")
    parser.add_argument(
        "--fashion", type=Path, default=DEBIAN, help="Fashion-MNIST: IDX files, or torchvision's root"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--seeds", type=int, help="how many; default 3, or 1 with --quick")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument(
        "--out", type=Path, help=f"of one case; default: results/{kind}_CASE.json, or nothing with --quick"
    )
    args = parser.parse_args()
    if args.out is not None and args.case == "all":
        parser.error("--out names the file of one case; with --case all, leave it out")
    if args.data is None and args.case in ("cifar10-jpeg", "all"):
        parser.error("cifar10-jpeg needs --data; see README.md beside this file for what the folder holds")
    args.seeds = args.seeds or (1 if args.quick else 3)
    args.malloc = False  # read by run.environment
    return args


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument(
        "--groups", type=group_names, default=list(GROUPS), help=f"of {','.join(GROUPS)}; 'simple' always"
    )
    parser.add_argument("--add", action="store_true", help="to the scores, or seeds, that the file holds")
    parser.add_argument(
        "--only-seeds", type=seed_numbers, help="with --add: these seeds instead of all, such as 1,2"
    )
    args = parsed(parser, "quality")
    if args.only_seeds and not args.add:
        parser.error("--only-seeds needs --add: a new file starts with seed 0")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # of other libraries, hundreds of them
    for name in CASES if args.case == "all" else [args.case]:
        run_case(name, args)


if __name__ == "__main__":
    main()
