r"""What a fit will cost: stage by stage, in forward passes, seconds and bytes, before any of it is done."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..data.batches import Input, batch_size, inputs_between, n_bytes
from ..data.loading import Prepare, named_batches
from ..data.progress import duration
from ..network.engine import Engine
from ..network.features import FEATURES
from ..network.memory import Chunks, gigabytes
from ..nystrom.gram import choose_rows
from ..nystrom.jacobian import from_rows
from ..nystrom.rows import RowSource
from ..posterior.likelihoods import Likelihood
from .rehearsal import Rehearsal, rehearsed_landmarks

# Forward passes a gradient row takes with torch.func; the arithmetic demands 3.
GRADIENT_COST = 5.0
# And layer by layer, where most weights have outer products in place of rows.
COST_BY_LAYER = 3.0
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
    seconds : float
        Its time, from a chunk of it that was measured; that of the loader is not in it.
    """

    name: str
    what: str
    forwards: float
    n_bytes: int
    seconds: float = 0.0


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
        How features are computed; a key of :data:`laplace_ella.network.features.FEATURES`.
    seconds : float
        Time of a plain forward pass of one input, measured on the first batch.
    budget : int
        Bytes that gradient rows and activations may take.
    prediction : float
        Seconds that a prediction takes for an input of a batch like the first, without a residual.
    single_prediction : float
        The same for an input alone.
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
    prediction: float = 0.0
    single_prediction: float = 0.0

    @property
    def forwards(self) -> float:
        """Total cost in plain forward passes of one input."""
        return sum(s.forwards for s in self.stages)

    @property
    def peak(self) -> int:
        """Peak memory beyond model and data, in bytes."""
        return max(s.n_bytes for s in self.stages)

    @property
    def total_seconds(self) -> float:
        """Total time, without that of the loader."""
        return sum(s.seconds for s in self.stages)

    @property
    def over_budget(self) -> tuple[Stage, ...]:
        """The stages that hold more than the budget."""
        return tuple(s for s in self.stages if s.n_bytes > self.budget)

    def __str__(self) -> str:
        n, total = str(self.n_data), ""
        if self.n_data is None:
            n, total = "unknown", "and as many as there are inputs"
        lines = [f"{'stage':<22}{'of':<38}{'forwards':>12}{'time':>10}{'memory':>10}"]
        for s in (*self.stages, Stage("total", total, self.forwards, self.peak, self.total_seconds)):
            numbers = f"{s.forwards:>12.4g}{duration(s.seconds):>10}{gigabytes(s.n_bytes):>10}"
            lines.append(f"{s.name:<22}{s.what:<38}{numbers}")
        lines.append(
            f"a prediction takes {duration(self.prediction)} an input in batches like the first, "
            f"{duration(self.single_prediction)} alone"
        )
        if self.over_budget:
            names = ", ".join(f"{s.name} ({gigabytes(s.n_bytes)})" for s in self.over_budget)
            lines.append(
                f"WARNING: more than the budget of {gigabytes(self.budget)} will be held by {names}. The budget bounds "
                "gradient rows and activations; the directions, K x P numbers, and the inputs kept come on top. Fewer "
                "directions (n_eigenvalues) or inputs (subsample_size, curvature_size) take less."
            )
        head = (
            f"ELLA with N={n}, C={self.n_outputs}, P={self.n_params}, M={self.n_landmarks}, K={self.rank}; "
            f"features by {self.mode} mode; memory budget {gigabytes(self.budget)}"
        )
        return "\n".join([head, *lines])


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
    for _, x, *_ in named_batches(loader, dict_key_x, dict_key_y, prepare):
        return x
    raise ValueError("The training loader yielded no data; at least one input is needed.")


def data_size(loader: Any, batch: int) -> int | None:
    """Return N as far as a loader tells: its sampler, its data set, or its length in batches."""
    for name in ("sampler", "dataset"):
        with suppress(AttributeError, TypeError):  # there is none, or it has no length
            return len(getattr(loader, name))
    with suppress(TypeError):
        return len(loader) * batch
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
    likelihood: Likelihood,
) -> Plan:
    """Work out the stages of a fit from one batch on the model's device.

    Parameters
    ----------
    x : input of B inputs
        As the model takes it.
    n_data : int or None
        N; None if it is unknown, which counts as more than enough.
    n_landmarks, rank, n_curvature : int
        M, K, n as asked for (None: all).
    sampled : int
        How many labels per input are sampled for the curvature; 0 for the exact one.
    likelihood : Likelihood

    Notes
    -----
    Cost: a few chunks of each stage; see :class:`laplace_ella.fitting.rehearsal.Rehearsal`.
    """
    limit = math.inf if n_data is None else n_data
    n_landmarks = int(min(n_landmarks, limit * engine.facts(x).n_coordinates))
    rank = min(rank, n_landmarks)
    n = min(n_curvature or limit, limit)
    n = 0 if n == math.inf else int(n)
    n_kept = min(n_landmarks, limit) + (n if n_curvature else 0)

    def plan(source: RowSource) -> Plan:
        held = choose_rows(source, engine.budget(), engine.spill)
        rehearsal = Rehearsal(engine, x, held, rank, n, sampled, likelihood)
        return Plan(
            stages=_stages(rehearsal, n_data, int(n_kept) * n_bytes(inputs_between(x, 0, 1))),
            n_data=n_data,
            n_outputs=engine.facts(x).n_outputs,
            n_params=engine.row_count(),
            n_landmarks=n_landmarks,
            rank=rank,
            n_curvature=n,
            mode=rehearsal.mode,
            seconds=rehearsal.per_forward,
            budget=engine.budget(),
            prediction=rehearsal.per_prediction,
            single_prediction=rehearsal.of_single_prediction(),
        )

    return from_rows(engine, rehearsed_landmarks(x, n_landmarks), plan)


def _stages(rehearsal: Rehearsal, n_data: int | None, kept: int) -> tuple[Stage, ...]:
    """Return the stages of a fit, which holds ``kept`` bytes of inputs all the time."""
    engine, x, held, mode = rehearsal.engine, rehearsal.x, rehearsal.held, rehearsal.mode
    m, rank, n, sampled = len(held.source), rehearsal.rank, rehearsal.n_curvature, rehearsal.sampled
    facts, size, directions = engine.facts(x), batch_size(x), rank * engine.row_size()
    features = (
        directions + engine.choice(x).prepared_bytes(mode, rank) + 8 * size * facts.n_coordinates * rank
    )
    chunks = engine.choice(x).chunks(mode, rank)
    chunks = Chunks(min(chunks.inputs, size), chunks.directions)
    cost = 2 + 3 * sampled if sampled else FEATURES[mode].forwards(facts.n_coordinates, rank)
    table = [  # name, of what, forward passes, bytes, seconds
        (
            "training data",
            "all inputs once, number unknown" if n_data is None else f"{n_data} inputs once",
            n_data or 0,
            _PLAIN_TENSORS * size * facts.input_bytes,
            (n_data or 0) * rehearsal.per_forward,
        ),
        (
            "landmark gradients",
            f"{m} landmarks x {held.gradients / m:.3g} ({held.kind})",
            (COST_BY_LAYER if held.source.matrices else GRADIENT_COST) * held.gradients,
            held.n_bytes + engine.choice(x).gradient_bytes(m, held.source.row_bytes),
            held.gradients * rehearsal.per_gradient() + rehearsal.of_gram(),
        ),
        (
            "directions",
            f"{rank} x {engine.row_count()} weights",
            0,
            held.n_bytes + 2 * directions,
            rehearsal.of_directions(),
        ),
        (
            "curvature",
            f"{n or 'all'} inputs",
            n * cost,
            features + engine.choice(x).feature_bytes(mode, chunks),
            n * rehearsal.per_curvature(),
        ),
    ]
    return tuple(Stage(name, what, float(f), kept + b, seconds) for name, what, f, b, seconds in table)
