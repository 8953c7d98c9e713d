"""A model of fits on several processes: what each stage computes, sends and holds.

Counted from what one process was measured to take (run.py), published figures of a GPU, and assumed links. No
number here is a measurement of several processes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

TITLES = {"resnet50": "ResNet-50", "vit_b_16": "ViT-B/16"}
LANDMARKS = (500, 2000)
RANK = 20
WORLDS = (1, 2, 4, 8, 16, 32, 64)
# Numbers of a sum up to which every rank sends its terms to every other, instead of an all-reduce.
GATHERED_SUM = 2**16
# Numbers of one sum of directions (gram.py).
SUMMED = 2**22
DOUBLE = 8


@dataclass(frozen=True)
class Links:
    """How processes are connected; bytes a second are those that one GPU sends, while it receives as many."""

    per_node: int = 8
    within: float = 300e9
    between: float = 25e9
    latency: float = 50e-6  # of one collective, whatever it carries

    def seconds(self, world: int, n_bytes: float, calls: float) -> tuple[float, float]:
        """Return what sending takes, and what starting the calls takes."""
        if world == 1:
            return 0.0, 0.0
        return n_bytes / (self.within if world <= self.per_node else self.between), calls * self.latency


@dataclass(frozen=True)
class Device:
    """What one process computes with."""

    name: str
    images: dict[str, float]  # plain forward passes a second
    products: float  # float64 operations a second, of Gram matrices
    combinations: float  # the same, of K combinations of rows
    eigh: dict[str, float]  # seconds of M x M eigenvectors
    memory: float | None  # bytes; None: not of interest


@dataclass(frozen=True)
class Fit:
    """The sizes of a fit and of a grid search."""

    n_landmarks: int
    rank: int
    n_data: int = 1_281_167  # images of ImageNet's training set
    n_curvature: int = 2000
    n_validation: int = 50_000
    batch: int = 128
    candidates: int = 100


@dataclass(frozen=True)
class Stage:
    """Seconds and bytes of one process in one stage."""

    name: str
    bound: str  # what the computation waits for
    compute: float
    sent: float = 0.0  # bytes
    sending: float = 0.0  # seconds
    starting: float = 0.0  # seconds

    @property
    def seconds(self) -> float:
        return self.compute + self.sending + self.starting

    @property
    def limit(self) -> str:
        """Which part of it is the longest."""
        parts = {self.bound: self.compute, "links": self.sending, "latency": self.starting}
        return max(parts, key=lambda part: parts[part])


# Published figures: github.com/facebookincubator/AITemplate, examples/01_resnet-50 and 04_vit, README.md: PyTorch 1.12
# eager, half precision, batches of 128, 224 x 224, A100-40GB. Float64 products: NVIDIA's data sheet of the A100, peak
# of its tensor cores, of which half is assumed to be reached.
A100_IMAGES = {"resnet50": 4816.71, "vit_b_16": 2138.35}
A100_PEAK, A100_SHARE, A100_MEMORY = 19.5e12, 0.5, 40e9


def devices(measured: dict[str, Any]) -> list[Device]:
    """Return the device that was measured, and one GPU from published figures."""
    products = measured["products"]
    about = measured["environment"]
    name = about["gpu"] or threads(about)
    largest = str(max(map(int, products["gram"])))
    here = Device(
        name,
        {network: 1 / measured[network]["seconds_a_forward"] for network in TITLES},
        1e9 * products["gram"][largest]["gflops"],
        1e9 * products["combine"][largest]["gflops"],
        {m: found["seconds"] for m, found in products["eigh"].items()},
        None,
    )
    flops = A100_PEAK * A100_SHARE
    gpu = Device("A100-40GB (published)", A100_IMAGES, flops, flops, here.eigh, A100_MEMORY)
    return [here, gpu]


def threads(about: dict[str, Any]) -> str:
    return f"{about['cpu']}, {about['threads']} thread" + "s" * (about["threads"] > 1)


def features_cost(network: dict[str, Any], rank: int) -> float:
    """Return the forwards of one input's features: those measured, times (1 + 2K) over that of the K measured."""
    return network["forwards"]["features"]["median"] * (1 + 2 * rank) / (1 + 2 * network["K"])


def slice_width(n_rows: int) -> int:
    """Return how many columns of M rows are held in float64 at once (gram.py)."""
    return max(64, min(8192, 2**22 // n_rows))


def times_computed(network: dict[str, Any], fit: Fit, world: int, budget: float, streamed: int = 8) -> float:
    """Return how often a gradient row is computed, at most, if rows may take so many bytes (gram.py).

    Blocks of weights can be cheaper than these blocks of rows.
    """
    m, row = fit.n_landmarks, network["row_bytes"]
    if share(m, world) * row <= budget:
        return 1.0
    capacity = max(2, int(budget // row))
    streamed = min(streamed, max(1, capacity // 4))
    starts = range(0, m, (capacity - streamed) * world)
    return sum(m - a for a in starts) / m + (starts[-1] / m)


def stages(
    network: dict[str, Any], images: float, device: Device, links: Links, fit: Fit, world: int, sharded: bool
) -> list[Stage]:
    """Work out the stages of a fit and of a grid search for the busiest of ``world`` processes."""
    m, k, n_params = fit.n_landmarks, fit.rank, network["P"]
    itemsize = network["row_bytes"] / n_params
    forward = 1 / images
    forwards = {kind: found["median"] for kind, found in network["forwards"].items()}
    of_others = (world - 1) / world
    n_landmarks, n_curvature, n_validation = (share(n, world) for n in (m, fit.n_curvature, fit.n_validation))
    width = slice_width(m)
    features = features_cost(network, k)
    exchanged = [0.0, 0.0]  # bytes an input, calls a batch
    if sharded and world > 1:
        # Each process pushes its own directions through every process's inputs, its plain passes among them.
        features *= world * (1 + 2 * share(k, world)) / (1 + 2 * k)
        exchanged = [
            (world - 1) * network["input_bytes"] + of_others * network["C"] * k * itemsize,
            2.0,
        ]

    def stage(name: str, bound: str, compute: float, sent: float = 0.0, calls: float = 0.0) -> Stage:
        return Stage(name, bound, compute, sent * (world > 1), *links.seconds(world, sent, calls))

    def batches(n: float) -> float:
        return -(-n // fit.batch)

    n_snapshots = max(1, fit.n_curvature // fit.batch).bit_length() + 1
    return [
        stage("scan", "forwards", share(fit.n_data, world) * forward * forwards["scan"], 0, 2),
        stage("inputs exchanged", "nothing", 0.0, of_others * (m + n_curvature) * network["input_bytes"], 6),
        stage("gradient rows", "forwards", n_landmarks * forward * forwards["gradients"]),
        stage(
            "Gram matrix",
            "float64 products",
            2 * m * m * n_params / world / device.products,
            of_others * n_landmarks * network["row_bytes"] + summed(m * m, world),
            -(-n_params // (width * world)) + 2,
        ),
        # Every rank computes them; all take those of the first.
        stage("eigenvectors", "eigenvectors", device.eigh[str(m)], m * m * DOUBLE, 4),
        stage(
            "directions",
            "float64 products",
            2 * k * n_landmarks * n_params / device.combinations,
            summed(k * n_params, world),
            -(-k * n_params // SUMMED),
        ),
        stage(
            "curvature",
            "forwards",
            n_curvature * forward * (features + forwards["curvature"]),
            n_curvature * exchanged[0],
            batches(n_curvature) * exchanged[1],
        ),
        stage("sums of G", "nothing", 0.0, summed(n_snapshots * k * k, world), 5),
        stage(
            "grid search",
            "forwards",
            n_validation * forward * features,
            n_validation * exchanged[0] + fit.candidates * summed(2, world),
            batches(n_validation) * exchanged[1] + 2 * fit.candidates,
        ),
    ]


def share(n: int, world: int) -> int:
    return -(-n // world)


def summed(n_numbers: float, world: int) -> float:
    """Return the bytes a process sends for a sum of float64 numbers over all."""
    if n_numbers <= GATHERED_SUM:
        return (world - 1) * n_numbers * DOUBLE
    return 2 * (world - 1) / world * n_numbers * DOUBLE


def memory(network: dict[str, Any], fit: Fit, world: int, sharded: bool) -> dict[str, float]:
    """Return bytes of one process: what it holds at once on the device at most, and of inputs on the host."""
    m, k, row = fit.n_landmarks, fit.rank, network["row_bytes"]
    rows = share(m, world) * row
    directions = (share(k, world) if sharded else k) * row
    matrices = 3 * m * m * DOUBLE + 3 * m * slice_width(m) * DOUBLE
    return {
        "weights": row,
        "rows": rows,
        "directions": directions,
        "peak": row + matrices + rows + directions,
        "afterwards": row + directions,
        "inputs while reading": (m + fit.n_curvature) * network["input_bytes"],
        "inputs afterwards": (m + share(fit.n_curvature, world)) * network["input_bytes"],
        "validation features": share(fit.n_validation, world) * network["C"] * k * row / network["P"],
    }


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Return numbers with five digits."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}


FITS = tuple(Fit(m, k) for m in LANDMARKS for k in (20, 100))


def modelled(measured: dict[str, Any], links: Links) -> dict[str, Any]:
    """Return all fits on all numbers of processes, as plain types."""
    chosen = devices(measured)
    rows = []
    for key in TITLES:
        for fit in FITS:
            for device in chosen:
                for sharded in (False, True):
                    for world in WORLDS:
                        found = stages(measured[key], device.images[key], device, links, fit, world, sharded)
                        rows.append(
                            {
                                "network": key,
                                "device": device.name,
                                "M": fit.n_landmarks,
                                "K": fit.rank,
                                "world": world,
                                "shard_directions": sharded,
                                "fit_seconds": math.fsum(s.seconds for s in found[:-1]),
                                "stages": [
                                    rounded(asdict(s) | {"seconds": s.seconds, "limit": s.limit})
                                    for s in found
                                ],
                                "bytes": rounded(memory(measured[key], fit, world, sharded)),
                            }
                        )
    return {
        "measured": measured["environment"],
        "links": asdict(links),
        "devices": [asdict(device) for device in chosen],
        "fit": asdict(FITS[0]) | {"n_landmarks": list(LANDMARKS), "rank": [20, 100]},
        "rows": rows,
    }
