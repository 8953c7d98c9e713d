r"""A fit rehearsed: one chunk of each of its stages, timed on the batch at hand.

A forward pass says little of what a fit takes. Where a network has more weights than
activations, reading and folding K x P numbers for every few rows costs more than arithmetic
does, and no count of forward passes knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Input, batch_size, rows, single_row
from ..data.landmarks import Landmarks
from ..network.engine import Engine
from ..network.functional import Weights
from ..network.safety import safely
from ..nystrom.basis import NystromBasis, _like
from ..nystrom.gram import Spill
from ..nystrom.rows import RowSource
from .accumulation import Part

# Forward passes that the features of one input take, of each way to compute them.
FEATURE_COST: dict[str, Callable[[int, int], float]] = {
    "forward": lambda n_outputs, rank: 1 + 2 * rank,
    "forward loop": lambda n_outputs, rank: 3 * rank,
    "double": lambda n_outputs, rank: 3 + 3 * rank,
    "reverse": lambda n_outputs, rank: 1 + 4 * n_outputs,
    "reverse loop": lambda n_outputs, rank: 1 + 4 * n_outputs,
}
# What has taken so many seconds is not timed once more ...
LONG = 0.7
# ... and nothing is, more often than this, after a warm-up.
REPEATS = 5
# Gradient rows that are timed together take at most this many bytes on a CPU, where their cost is that of writing them.
ROW_BYTES = 2**28
# Of products with the rows of all landmarks, so many bytes of rows are timed.
PRODUCT_BYTES = 2**25
# The eigenvectors of no larger matrix are computed.
EIGEN_SIZE = 300
# Directions that are pushed where a call takes one after the other.
LOOPED_DIRECTIONS = 2
# Random numbers drawn; tangents repeat them.
NOISE = 2**16


@dataclass(frozen=True)
class Prices:
    """What parts of a fit take, in seconds.

    Attributes
    ----------
    forward : float
        A plain forward pass of an input, in a batch like the one at hand.
    landmark : float
        A gradient row.
    gram : float
        The Gram matrix of M rows, and its eigenvectors.
    directions : float
        K combinations of M rows.
    curvature : float
        G from n inputs.
    prediction : float
        The features of an input, in such a batch.
    single : float
        The features of an input alone.
    """

    forward: float
    landmark: float
    gram: float
    directions: float
    curvature: float
    prediction: float
    single: float


@dataclass(frozen=True)
class _Blocks:
    """Seconds of a call as a function of its rows: a straight line through one row and many."""

    rows: int
    many: float
    one: float

    def __call__(self, n_rows: int) -> float:
        slope = (self.many - self.one) / max(1, self.rows - 1)
        return max(self.many / self.rows, self.one + slope * (n_rows - 1))

    def batch(self, size: int) -> float:
        """Return the seconds of a batch, cut as :mod:`laplace_ella.network.features` cuts it."""
        n_blocks = -(-size // self.rows)
        return sum(self(-(-(size - i) // n_blocks)) for i in range(n_blocks))

    def inputs(self, n: int, size: int) -> float:
        """Return the seconds of n inputs in batches of ``size``."""
        return n // size * self.batch(size) + self.batch(n % size)


def seconds_of(compute: Callable[[], Tensor]) -> float:
    """Return what a call takes: the median of up to five, after a warm-up, or of the warm-up if that is long."""
    taken: list[float] = []
    while len(taken) <= REPEATS and sum(taken) < LONG:
        start = perf_counter()
        compute().flatten()[:1].cpu()  # waits for the device
        taken.append(perf_counter() - start)
    rest = sorted(taken[1:] or taken)
    return rest[len(rest) // 2]


class Rehearsal:
    """Times one chunk of each stage of a fit.

    Parameters
    ----------
    engine : Engine
        Of the fit, or one that cuts calls as it does.
    x : input of B rows
        A batch as the loader gives it, on the model's device.
    rank, n_curvature : int
        K, n.
    sampled : int
        Labels an input that are sampled for the curvature; 0 for the exact one.

    Notes
    -----
    Nothing of it is kept but seconds: tangents have their own generator, and are freed with it. Memory: at most as
    much as the fit takes, K x P numbers among it. Cost: of each of about eight chunks a warm-up and up to five calls,
    none once they have taken .7 seconds.
    """

    def __init__(
        self,
        engine: Engine,
        x: Input,
        *,
        rank: int,
        n_curvature: int,
        sampled: int,
    ) -> None:
        self.engine, self.x, self.size = engine, x, batch_size(x)
        self.rank, self.n_curvature, self.sampled = rank, n_curvature, sampled
        self.mode = engine.mode(x, rank)
        self.at_once = self._directions_at_once()
        self.copied = 0.0  # seconds that storing as many tangents took

    def prices(
        self,
        source: RowSource,
        spill: Spill | None,
        *,
        forward: Callable[[Input], Tensor],
        curvature: Callable[[Tensor, Tensor], Tensor],
        curvature_of: Callable[[NystromBasis, int], Callable[[Part], Tensor]],
    ) -> Prices:
        """Time a chunk of each stage.

        Parameters
        ----------
        source : RowSource
            Of M landmarks, whose rows may be asked for.
        spill : Spill, optional
            Where rows go.
        forward, curvature, curvature_of : callable
            Those of :class:`laplace_ella.NystromGGN`.
        """
        per_forward = seconds_of(lambda: forward(self.x)) / self.size
        landmark, (products, combinations), tangents, features = safely(
            self.engine.module, lambda: self._stages(source, spill, curvature)
        )
        ratio = self._of_all_directions()
        if self.sampled and self.n_curvature:
            per_sum = self._sampled(tangents, curvature_of).inputs(self.n_curvature, self.size)
        else:
            per_sum = ratio * features.inputs(self.n_curvature, self.size)
        return Prices(
            forward=per_forward,
            landmark=landmark,
            gram=products,
            directions=combinations + self.copied * self.rank / self.at_once,
            curvature=per_sum,
            prediction=ratio * features.batch(self.size) / self.size,
            single=ratio * features(1),
        )

    def _stages(
        self, source: RowSource, spill: Spill | None, curvature: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[float, tuple[float, float], Weights, _Blocks]:
        """Time gradients, products of them, and features; return the tangents of the latter too."""
        landmark, products, tangents = self._landmark(source), self._products(source, spill), self._tangents()
        return landmark, products, tangents, self._features(tangents, curvature)

    def _directions_at_once(self) -> int:
        if self.sampled or self.mode.startswith("reverse"):
            return self.rank  # all that there are enter every call
        if self.mode == "forward":
            return self.engine.chunks(self.mode, self.x, self.rank).directions
        return min(self.rank, LOOPED_DIRECTIONS)

    def _of_all_directions(self) -> float:
        """Return what all directions cost, over those that are timed."""
        cost = FEATURE_COST[self.mode]
        n_outputs = self.engine.facts(self.x).n_coordinates
        chunk = self.rank if self.mode != "forward" else self.at_once
        parts = [min(chunk, self.rank - a) for a in range(0, self.rank, chunk)]
        return sum(cost(n_outputs, d) for d in parts) / cost(n_outputs, min(chunk, self.at_once))

    def _tangents(self) -> Weights:
        """Return tangents of length one (d, *shape) as a basis stores them; the values do not matter."""
        weights = self.engine.function.weights()
        noise = _noise(NOISE, dtype=torch.float32) / self.engine.row_count() ** 0.5
        start = perf_counter()
        found = {
            k: _like(w, _repeated(noise.to(w), w).expand(self.at_once, *w.shape)) for k, w in weights.items()
        }
        next(iter(found.values())).flatten()[:1].cpu()  # waits for the device
        self.copied = perf_counter() - start
        return found

    def _blocks(self, compute: Callable[[Input], Tensor], at_once: int) -> _Blocks:
        n_rows = -(-self.size // -(-self.size // min(self.size, max(1, at_once))))
        many = seconds_of(lambda: compute(rows(self.x, 0, n_rows)))
        one = many if n_rows == 1 else seconds_of(lambda: compute(rows(self.x, 0, 1)))
        return _Blocks(n_rows, many, one)

    def _features(self, tangents: Weights, curvature: Callable[[Tensor, Tensor], Tensor]) -> _Blocks:
        engine = self.engine
        at_once = 1 if self.mode == "reverse loop" else engine.chunks(self.mode, self.x, self.rank).rows
        # As NystromGGN.bounded cuts features off that would take too much.
        width = 8 * self.rank * engine.facts(self.x).n_coordinates
        return self._blocks(
            lambda x: curvature(*engine.features(x, tangents)), min(at_once, engine.budget() // 4 // width)
        )

    def _sampled(
        self, tangents: Weights, curvature_of: Callable[[NystromBasis, int], Callable[[Part], Tensor]]
    ) -> _Blocks:
        ones = torch.ones(self.rank, dtype=torch.float64, device=self.engine.device)
        basis = NystromBasis(tangents, ones, float(self.rank), ones)
        of = curvature_of(basis, self.sampled)

        def compute(x: Input) -> Tensor:
            return of(
                Part("the first batch", torch.arange(batch_size(x), dtype=torch.int64, device="cpu"), x)
            )

        looped = self.engine.support(self.x).rows != "vmap"
        return self._blocks(compute, 1 if looped else self.engine.gradients_per_call(self.x))

    def _landmark(self, source: RowSource) -> float:
        n_rows = min(source.rows_per_call, len(source))
        if source.device.type == "cpu":
            n_rows = min(n_rows, max(1, ROW_BYTES // source.row_bytes))
        return seconds_of(lambda: source(list(range(n_rows)))) / n_rows

    def _products(self, source: RowSource, spill: Spill | None) -> tuple[float, float]:
        """Return the seconds of Gram matrix and eigenvectors, and of the combinations of rows."""
        dtype = source.dtype if spill is None else spill.dtype
        size, n_weights = len(source), sum(source.sizes.values())
        at_most = min(PRODUCT_BYTES, self.engine.budget() // 4) // (size * dtype.itemsize)
        width = min(n_weights, max(64, at_most))
        device = source.device if spill is None else torch.device("cpu")
        values = torch.ones(size, width, dtype=dtype, device=device)
        per_gram = seconds_of(lambda: source.gram(values, size)) * n_weights / width
        coefficients = torch.ones(size, self.rank, dtype=torch.float64, device=source.device)
        per_sum = seconds_of(lambda: source.combination(coefficients, values)) * n_weights / width
        return per_gram + _eigenvectors(size, source.device), per_sum


def rehearsed_landmarks(x: Input, n_landmarks: int) -> Landmarks:
    """Return M landmarks made of the rows of a batch, over and over, each with its first output."""
    inputs: Sequence[Any] = [single_row(x, i) for i in range(min(batch_size(x), n_landmarks))]
    repeated = [inputs[i % len(inputs)] for i in range(n_landmarks)]
    return Landmarks(repeated, torch.zeros(n_landmarks, dtype=torch.int64, device="cpu"))


def _noise(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=dtype, device="cpu")


def _eigenvectors(size: int, device: torch.device) -> float:
    """Return the seconds of the eigenvectors of a matrix (size, size)."""
    part = min(size, EIGEN_SIZE)
    matrix = _noise(part, part, dtype=torch.float64).to(device)
    return seconds_of(lambda: torch.linalg.eigh(matrix @ matrix.T)[0]) * (size / part) ** 3


def _repeated(noise: Tensor, weight: Tensor) -> Tensor:
    return noise.repeat(-(-weight.numel() // len(noise)))[: weight.numel()].view(weight.shape)
