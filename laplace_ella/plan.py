r"""What a fit will cost: stage by stage, in forward passes and bytes, before any of it is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch

from .batches import Input, batch_size, n_bytes, rows, single_row
from .engine import Engine
from .gram import RowSource, Spill, choose_rows
from .landmarks import Landmarks
from .loading import Prepare, named_batches
from .memory import Chunks, gigabytes
from .safety import safely

# Forward passes a gradient row takes with torch.func; the arithmetic demands 3.
GRADIENT_COST = 5.0
# Tensors of the largest size that a plain forward pass keeps.
_PLAIN_TENSORS = 3


@dataclass(frozen=True)
class Stage:
    """One stage of a fit.

    Attributes
    ----------
    name, what : str
        What it is, and of how much.
    forwards : float
        Its cost in plain forward passes of one input.
    n_bytes : int
        Memory held during the stage, beyond model and data.
    """

    name: str
    what: str
    forwards: float
    n_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a fit will do; ``print`` it.

    Attributes
    ----------
    stages : tuple of Stage
    n_data, n_outputs, n_params : int or None
        N (None: the loader does not tell), C, P.
    n_landmarks, rank, n_curvature : int
        M, K, n.
    mode : str
        How features are computed; a key of :data:`laplace_ella.features.FEATURES`.
    seconds : float
        Time of a plain forward pass of one input, measured on the first batch.
    budget : int
        Bytes that gradient rows and activations may take.
    """

    stages: tuple[Stage, ...]
    n_data: int | None
    n_outputs: int
    n_params: int
    n_landmarks: int
    rank: int
    n_curvature: int
    mode: str
    seconds: float
    budget: int

    @property
    def forwards(self) -> float:
        """Total cost in plain forward passes of one input."""
        return sum(s.forwards for s in self.stages)

    @property
    def peak(self) -> int:
        """Peak memory beyond model and data, in bytes."""
        return max(s.n_bytes for s in self.stages)

    def __str__(self) -> str:
        n = "unknown" if self.n_data is None else str(self.n_data)
        lines = [
            (
                f"ELLA with N={n}, C={self.n_outputs}, P={self.n_params}, M={self.n_landmarks}, K={self.rank}; "
                f"features by {self.mode} mode; memory budget {gigabytes(self.budget)}"
            ),
            f"{'stage':<22}{'of':<38}{'forwards':>12}{'time':>10}{'memory':>10}",
        ]
        total = "" if self.n_data is not None else "and as many as there are inputs"
        for s in (*self.stages, Stage("total", total, self.forwards, self.peak)):
            seconds = _duration(s.forwards * self.seconds)
            lines.append(
                f"{s.name:<22}{s.what:<38}{s.forwards:>12.4g}{seconds:>10}{gigabytes(s.n_bytes):>10}"
            )
        return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def feature_cost(mode: str, n_outputs: int, rank: int) -> float:
    """Return the forward passes that the features of one input take."""
    return {
        "forward": 1 + 2 * rank,
        "forward loop": 3 * rank,
        "double": 3 + 3 * rank,
        "reverse": 1 + 4 * n_outputs,
        "reverse loop": 1 + 4 * n_outputs,
    }[mode]


def first_batch(loader: Any, dict_key_x: str, dict_key_y: str, prepare: Prepare) -> Input:
    """Return the inputs of a loader's first batch.

    Raises
    ------
    ValueError
        If the loader is an iterator, whose batch would be lost, or is empty.
    """
    if isinstance(loader, Iterator):
        raise ValueError(
            "A plan looks at the first batch, and this loader is an iterator, whose batch would be lost to the fit. "
            "Pass an iterable that can be started again, a list with one batch of it for instance."
        )
    for _, x, _ in named_batches(loader, dict_key_x, dict_key_y, prepare):
        return x
    raise ValueError("The training loader yielded no data; at least one input is needed.")


def data_size(loader: Any, batch: int) -> int | None:
    """Return N as far as a loader tells: its sampler, its data set, or its length in batches."""
    sampler = getattr(loader, "sampler", None)
    for sized, factor in ((sampler, 1), (getattr(loader, "dataset", None), 1), (loader, batch)):
        if isinstance(sized, Sized):
            try:
                return len(sized) * factor
            except TypeError:  # an iterable data set without a length
                continue
    return None


def make_plan(
    engine: Engine,
    x: Input,
    *,
    n_data: int | None,
    n_landmarks: int,
    rank: int,
    n_curvature: int | None,
    sampled: int,
    row_source: Callable[[Landmarks], RowSource],
    spill: Spill | None,
    seconds: float,
) -> Plan:
    """Work out the stages of a fit from one batch on the model's device.

    Parameters
    ----------
    x : input of B rows
        As the model takes it.
    n_data : int or None
        N; None if unknown, which counts as more than enough.
    n_landmarks, rank, n_curvature : int
        M, K, n as asked for (None: all).
    sampled : int
        Labels an input that are sampled for the curvature; 0 for the exact one.
    row_source : callable
        Prepares the gradient rows of landmarks.
    seconds : float
        Time of a forward pass of one input.
    """
    facts, size = engine.facts(x), batch_size(x)
    limit = math.inf if n_data is None else n_data
    n_landmarks = int(min(n_landmarks, limit * facts.n_coordinates))
    rank = min(rank, n_landmarks)
    n = int(min(n_curvature or limit, limit)) if limit < math.inf or n_curvature else 0
    mode = safely(engine.module, lambda: engine.mode(x, rank))
    # As many landmarks as there will be, whose rows are never asked for.
    landmarks = Landmarks([single_row(x, 0)] * n_landmarks, torch.zeros(n_landmarks, dtype=torch.int64))
    source = safely(engine.module, lambda: row_source(landmarks))
    held = choose_rows(source, engine.budget(), spill)
    basis = rank * engine.row_size()
    kept = n_bytes(rows(x, 0, 1)) * (min(n_landmarks, limit) + (n if n_curvature else 0))
    chunks = engine.chunks(mode, x, rank)
    chunks = Chunks(min(chunks.rows, size), chunks.directions)
    return Plan(
        stages=(
            Stage(
                "training data",
                "all inputs once, number unknown" if n_data is None else f"{n_data} inputs once",
                float(n_data or 0),
                int(kept + _PLAIN_TENSORS * size * facts.row_bytes),
            ),
            Stage(
                "landmark gradients",
                f"{n_landmarks} landmarks x {held.gradients / n_landmarks:.3g} ({held.kind})",
                GRADIENT_COST * held.cost,
                int(kept + held.n_bytes + engine.gradient_bytes(x, n_landmarks)),
            ),
            Stage(
                "directions",
                f"{rank} x {engine.row_count()} weights",
                0.0,
                int(kept + held.n_bytes + 2 * basis),
            ),
            Stage(
                "curvature",
                f"{n if n else 'all'} inputs",
                n * (2 + 3 * sampled if sampled else feature_cost(mode, facts.n_coordinates, rank)),
                int(
                    kept
                    + basis
                    + engine.feature_bytes(mode, chunks, x)
                    + 8 * size * facts.n_coordinates * rank
                ),
            ),
        ),
        n_data=n_data,
        n_outputs=facts.n_outputs,
        n_params=engine.row_count(),
        n_landmarks=n_landmarks,
        rank=rank,
        n_curvature=n,
        mode=mode,
        seconds=seconds,
        budget=engine.budget(),
    )
