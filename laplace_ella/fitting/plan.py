r"""What a fit will cost: stage by stage, in forward passes, seconds and bytes, before any of it is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

from ..data.batches import Input, batch_size, n_bytes, rows
from ..data.landmarks import Landmarks
from ..data.loading import Prepare, named_batches
from ..network.engine import Engine
from ..network.memory import Chunks, gigabytes
from ..network.safety import safely
from ..nystrom.gram import KeptRows, Rows, RowSource, Spill, choose_rows
from .rehearsal import FEATURE_COST, Prices, Rehearsal, rehearsed_landmarks

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
        n = "unknown" if self.n_data is None else str(self.n_data)
        lines = [
            (
                f"ELLA with N={n}, C={self.n_outputs}, P={self.n_params}, M={self.n_landmarks}, K={self.rank}; "
                f"features by {self.mode} mode; memory budget {gigabytes(self.budget)}"
            ),
            f"{'stage':<22}{'of':<38}{'forwards':>12}{'time':>10}{'memory':>10}",
        ]
        total = "" if self.n_data is not None else "and as many as there are inputs"
        every = (*self.stages, Stage("total", total, self.forwards, self.peak, self.total_seconds))
        lines += [
            f"{s.name:<22}{s.what:<38}{s.forwards:>12.4g}{_duration(s.seconds):>10}{gigabytes(s.n_bytes):>10}"
            for s in every
        ]
        lines.append(
            f"a prediction takes {_duration(self.prediction)} an input in batches like the first, "
            f"{_duration(self.single_prediction)} alone"
        )
        return "\n".join([*lines, *self._complaints()])

    def _complaints(self) -> list[str]:
        if not self.over_budget:
            return []
        names = ", ".join(f"{s.name} ({gigabytes(s.n_bytes)})" for s in self.over_budget)
        why = (
            "The budget bounds gradient rows and activations; the directions, K x P numbers, and the inputs kept come on "
            "top. Fewer directions (n_eigenvalues) or inputs (subsample_size, curvature_size) take less."
        )
        return [f"WARNING: more than the budget of {gigabytes(self.budget)} will be held by {names}. {why}"]


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


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


@dataclass(frozen=True)
class _Sizes:
    """How much there is of everything."""

    n_data: int | None
    n_landmarks: int
    rank: int
    n_curvature: int
    kept: int  # bytes of the inputs kept


def _sizes(
    x: Input, n_coordinates: int, n_data: int | None, n_landmarks: int, rank: int, n_curvature: int | None
) -> _Sizes:
    limit = math.inf if n_data is None else n_data
    n_landmarks = int(min(n_landmarks, limit * n_coordinates))
    n = int(min(n_curvature or limit, limit)) if limit < math.inf or n_curvature else 0
    kept = n_bytes(rows(x, 0, 1)) * (min(n_landmarks, limit) + (n if n_curvature else 0))
    return _Sizes(n_data, n_landmarks, min(rank, n_landmarks), n, int(kept))


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
    **functions: Callable[..., Any],
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
    **functions : callable
        What :meth:`laplace_ella.fitting.rehearsal.Rehearsal.prices` times.

    Notes
    -----
    Cost: a few chunks of each stage; see :class:`laplace_ella.fitting.rehearsal.Rehearsal`.
    """
    facts = engine.facts(x)
    sizes = _sizes(x, facts.n_coordinates, n_data, n_landmarks, rank, n_curvature)
    source = safely(engine.module, lambda: row_source(rehearsed_landmarks(x, sizes.n_landmarks)))
    held = choose_rows(source, engine.budget(), spill)
    rehearsal = Rehearsal(
        engine,
        x,
        rank=sizes.rank,
        n_curvature=sizes.n_curvature,
        sampled=sampled,
    )
    prices = rehearsal.prices(source, spill if held.kind == KeptRows.kind else None, **functions)
    stages = (
        _pass_over_data(engine, x, sizes, prices),
        _gradients(engine, x, sizes, held, prices),
        _directions(engine, sizes, held, prices),
        _curvature(engine, x, sizes, sampled, prices),
    )
    return Plan(
        stages=stages,
        n_data=n_data,
        n_outputs=facts.n_outputs,
        n_params=engine.row_count(),
        n_landmarks=sizes.n_landmarks,
        rank=sizes.rank,
        n_curvature=sizes.n_curvature,
        mode=rehearsal.mode,
        seconds=prices.forward,
        budget=engine.budget(),
        prediction=prices.prediction,
        single_prediction=prices.single,
    )


def _pass_over_data(engine: Engine, x: Input, sizes: _Sizes, prices: Prices) -> Stage:
    n = sizes.n_data
    return Stage(
        "training data",
        "all inputs once, number unknown" if n is None else f"{n} inputs once",
        float(n or 0),
        int(sizes.kept + _PLAIN_TENSORS * batch_size(x) * engine.facts(x).row_bytes),
        (n or 0) * prices.forward,
    )


def _gradients(engine: Engine, x: Input, sizes: _Sizes, held: Rows, prices: Prices) -> Stage:
    return Stage(
        "landmark gradients",
        f"{sizes.n_landmarks} landmarks x {held.gradients / sizes.n_landmarks:.3g} ({held.kind})",
        GRADIENT_COST * held.cost,
        int(sizes.kept + held.n_bytes + engine.gradient_bytes(x, sizes.n_landmarks)),
        held.cost * prices.landmark + prices.gram,
    )


def _directions(engine: Engine, sizes: _Sizes, held: Rows, prices: Prices) -> Stage:
    return Stage(
        "directions",
        f"{sizes.rank} x {engine.row_count()} weights",
        0.0,
        int(sizes.kept + held.n_bytes + 2 * sizes.rank * engine.row_size()),
        prices.directions,
    )


def _curvature(engine: Engine, x: Input, sizes: _Sizes, sampled: int, prices: Prices) -> Stage:
    mode, facts = engine.mode(x, sizes.rank), engine.facts(x)
    chunks = engine.chunks(mode, x, sizes.rank)
    chunks = Chunks(min(chunks.rows, batch_size(x)), chunks.directions)
    cost = 2 + 3 * sampled if sampled else FEATURE_COST[mode](facts.n_coordinates, sizes.rank)
    held = sizes.rank * engine.row_size() + 8 * batch_size(x) * facts.n_coordinates * sizes.rank
    return Stage(
        "curvature",
        f"{sizes.n_curvature if sizes.n_curvature else 'all'} inputs",
        sizes.n_curvature * cost,
        int(sizes.kept + held + engine.feature_bytes(mode, chunks, x)),
        prices.curvature,
    )
