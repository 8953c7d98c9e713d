"""What this study is asked to do: data, networks and sizes, and what is wrong with them, said before any long work."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.studies.common.start import options_of
from benchmarks.studies.paper.data import Counts, Source, cifar10, cifar10_jpeg, imagenet
from benchmarks.studies.paper.networks import CIFAR, IMAGENET, Network, loaded, require, weights_file

RANK = 20


@dataclass(frozen=True)
class Kind:
    """Data with the networks for them."""

    option: str
    networks: dict[str, Network]
    read: Callable[[Path, Network], Source]
    counts: Counts
    file: str  # of the results
    workers: int = 0


KINDS = {
    "cifar_root": Kind(
        "--cifar-root",
        CIFAR,
        lambda root, _: cifar10(root),
        Counts(40_000, 10_000, 2000, 10_000, 10_000, 1000),
        "paper_cifar10_{}",
    ),
    "imagenet_root": Kind(
        "--imagenet-root",
        IMAGENET,
        imagenet,
        Counts(50_000, 5000, 5000, 50_000, 10_000, 100),
        "paper_imagenet_{}",
        min(16, os.cpu_count() or 1),
    ),
    "data": Kind(
        "--data",
        {"resnet20": CIFAR["resnet20"]},
        lambda folder, _: cifar10_jpeg(folder),
        Counts(8000, 2000, 2000, 4500, 8000, 100),
        "paper_cifar10-jpeg",
    ),
}


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = options_of(__package__)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--cifar-root", type=Path, help="root of torchvision's CIFAR10")
    data.add_argument("--imagenet-root", type=Path, help="folder with ImageNet's train and val folders")
    data.add_argument("--data", type=Path, help="folder with cifar10_resnet20.pt and cifar10_jpeg_*.npz")
    parser.add_argument("--network", help="one of the paper's, or all; default: the smallest")
    parser.add_argument("--weights", type=Path, help="state dict, or a folder of them")
    parser.add_argument("--download", action="store_true", help="fetch the published weights")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    parser.add_argument("--batch-size", type=positive, default=100)
    parser.add_argument("--seeds", type=positive, default=1, help="how many")
    parser.add_argument(
        "--subsample",
        type=positive,
        help="at most so many images of each kind, to try it; nothing is written",
    )
    parser.add_argument("--threads", type=positive, default=2, help="threads of torch")
    parser.add_argument("--out", type=Path, help="of one network; default: in results/")
    args = parser.parse_args(arguments)
    args.quick = args.subsample is not None
    try:
        args.kind, args.root, names = chosen(args)
        args.source = args.kind.read(args.root, names[0])
        args.counts = enough(args.kind.counts, args.source, args.subsample)
        args.jobs = [(network, prepared(network, args)) for network in names]
    except ValueError as error:
        parser.error(str(error))
    return args


def chosen(args: argparse.Namespace) -> tuple[Kind, Path, list[Network]]:
    """Return the kind of data, where they are, and the networks; raise ValueError on what does not go together."""
    kind, root = next((kind, getattr(args, name)) for name, kind in KINDS.items() if getattr(args, name))
    name = args.network or next(iter(kind.networks))
    if name != "all" and name not in kind.networks:
        raise ValueError(
            f"--network {name} does not go with {kind.option}. Choose {', '.join(kind.networks)}, or all."
        )
    if args.out is not None and name == "all":
        raise ValueError("--out names the file of one network; with --network all, leave it out.")
    if args.subsample is not None and args.subsample < 2 * RANK:
        raise ValueError(f"--subsample must be at least {2 * RANK}; got {args.subsample}.")
    if args.device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda; got {args.device}.")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch sees no CUDA device. Use --device cpu, or install torch for CUDA."
        )
    if not root.is_dir():
        raise ValueError(f"{kind.option} {root}: no such folder. Pass the folder that holds the data.")
    require("torchvision", *(["timm"] if kind.networks is IMAGENET else []))
    return kind, root, list(kind.networks.values()) if name == "all" else [kind.networks[name]]


def enough(counts: Counts, source: Source, subsample: int | None) -> Counts:
    """Return how many images are used, and raise ValueError if there are fewer."""
    counts = counts if subsample is None else counts.at_most(subsample)
    for kind, needed, data in (
        ("training", counts.train + counts.held_out, source.train),
        ("test", counts.test, source.test),
    ):
        if needed > len(data):
            raise ValueError(
                f"{needed} {kind} images are needed, and {source.images} has {len(data)} here. Complete the data, or try "
                f"it with --subsample {len(data) // 2}."
            )
    return counts


def prepared(network: Network, args: argparse.Namespace) -> nn.Module:
    """Return the network with its weights; CIFAR-10 (JPEG) has them beside the images."""
    beside = args.data if args.data and not args.download else None
    return loaded(network, weights_file(network, args.weights or beside, args.download))
