r"""The rehearsal of a fit: one chunk of each of its stages, timed on the batch at hand.

A forward pass says little of what a fit takes. Where a network has more weights than
activations, reading and folding K x P numbers for every few inputs costs more than arithmetic
does, and no count of forward passes knows of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Input, batch_size, inputs_between, single_input
from ..data.landmarks import Landmarks
from ..network.engine import Engine
from ..network.features import FEATURES
from ..network.functional import Weights
from ..nystrom.basis import NystromBasis, stored_directions
from ..nystrom.gram import HeldRows
from ..nystrom.rows import Rows
from ..posterior.likelihoods import Likelihood
from .curvature import Curvature, Part, curvature

# What has taken so many seconds is not timed once more ...
LONG = 0.7
# ... and nothing is timed more often than this, after a warm-up.
REPEATS = 5
# Gradient rows that are timed together take at most this many bytes on a CPU, where their cost is that of writing them.
ROW_BYTES = 2**28
# The products of all landmarks' rows are timed on so many bytes of them.
PRODUCT_BYTES = 2**25
# The products of outer products are timed for so many rows, and combinations of them for fewer.
GRAM_ROWS, COMBINED_ROWS = 1000, 200
# The eigenvectors of no larger matrix are computed.
EIGEN_SIZE = 300
# Where the time of directions adds up, one after the other, so many are timed.
LOOPED_DIRECTIONS = 2


def seconds_of(compute: Callable[[], Tensor]) -> float:
    """Return what a call takes: the median of up to five, after a warm-up, or of the warm-up if that is long."""
    taken: list[float] = []
    while len(taken) <= REPEATS and sum(taken) < LONG:
        start = perf_counter()
        compute().flatten()[:1].cpu()  # waits for the device
        taken.append(perf_counter() - start)
    rest = sorted(taken[1:] or taken)
    return rest[len(rest) // 2]


@dataclass(frozen=True)
class Rehearsal:
    """Times one chunk of each stage of a fit, and tells what the stages take in seconds; inside ``safely``.

    Attributes
    ----------
    engine : Engine
        That of the fit, or one that cuts calls as it does.
    x : input of B inputs
        A batch as the loader gives it, on the model's device.
    held : HeldRows
        The rows of M landmarks, which may be asked for.
    rank, n_curvature : int
        K, n.
    sampled : int
        How many labels per input are sampled for the curvature; 0 for the exact one.
    likelihood : Likelihood

    Notes
    -----
    Nothing of it is kept but seconds. Memory: at most as much as the fit takes, K x P numbers among it. Cost: for each
    of about eight chunks, a warm-up and up to five calls, but none once they have taken .7 seconds.
    """

    engine: Engine
    x: Input
    held: HeldRows
    rank: int
    n_curvature: int
    sampled: int
    likelihood: Likelihood

    @property
    def mode(self) -> str:
        """How features are computed; a key of :data:`laplace_ella.network.features.FEATURES`."""
        return self.engine.choice(self.x).mode(self.rank)

    @cached_property
    def per_forward(self) -> float:
        """Seconds of a plain forward pass of one input, in a batch like the one at hand."""
        return seconds_of(lambda: self.engine.forward(self.x)) / batch_size(self.x)

    def per_gradient(self) -> float:
        """Return the seconds of a gradient row."""
        source = self.held.source
        n = min(source.landmarks_per_call, len(source))
        if source.device.type == "cpu":
            n = min(n, max(1, ROW_BYTES // source.row_bytes))

        def compute() -> Tensor:
            rows = source(range(n))
            return next((o.left for o in rows.outer.values()), rows.values)

        return seconds_of(compute) / n

    def of_gram(self) -> float:
        """Return the seconds of the Gram matrix of M rows, and of its eigenvectors."""
        source, (values, ratio), (outer, n) = self.held.source, self._values(), self._outer(GRAM_ROWS)
        products = ratio * seconds_of(lambda: source.products((values, len(source))))
        products += (len(source) / n) ** 2 * seconds_of(lambda: source.products((outer, n)))
        return products + _eigenvectors(len(source), source.device)

    def of_directions(self) -> float:
        """Return the seconds of K combinations of M rows, and of storing them."""
        source, (values, ratio), (outer, n) = self.held.source, self._values(), self._outer(COMBINED_ROWS)
        ones = torch.ones(len(source), self.rank, dtype=torch.float64, device=source.device)
        some = ones[:n, :LOOPED_DIRECTIONS]
        combinations = ratio * seconds_of(lambda: source.combination(ones, values))
        more = (len(source) / n) * (self.rank / some.shape[1])
        combinations += more * seconds_of(lambda: source.combination(some, outer))
        n_parts = self._n_parts(self.x)
        return combinations + n_parts * self.tangents(n_parts)[1]

    def per_curvature(self) -> float:
        """Return the seconds of one input's part of G, in a batch like the one at hand."""
        return self._per_sampled() if self.sampled and self.n_curvature else self.per_prediction

    @cached_property
    def per_prediction(self) -> float:
        """Seconds of the features of one input, in a batch like the one at hand."""
        at_once = self.engine.choice(self.x).chunks(self.mode, self.rank).inputs
        # As Engine.bounded cuts features off that would take too much.
        width = 8 * self.rank * self.engine.facts(self.x).n_coordinates
        at_once = min(at_once, self.engine.budget() // 4 // width)
        n_parts = self._n_parts(self.x)
        return n_parts * self._per_input(lambda x: self._features(x, n_parts), at_once)

    def of_single_prediction(self) -> float:
        """Return the seconds of the features of an input alone."""
        x = inputs_between(self.x, 0, 1)
        n_parts = self._n_parts(x)
        return n_parts * seconds_of(lambda: self._features(x, n_parts))

    def _values(self) -> tuple[Rows, float]:
        """Return some columns of M rows without outer products, and how many times as many there are in all."""
        size, n_values = len(self.held.source), self.held.source.n_values
        at_most = min(PRODUCT_BYTES, self.engine.budget() // 4) // (size * self.held.dtype.itemsize)
        width = min(n_values, max(64, at_most))
        values = torch.ones(size, width, dtype=self.held.dtype, device=self.held.device)
        return Rows(values, {}), n_values / max(1, width)

    def _outer(self, at_most: int) -> tuple[Rows, int]:
        """Return the outer products of at most so many rows, and how many these are."""
        source, n = self.held.source, min(at_most, len(self.held.source))
        found = source.empty(n, torch.empty(n, 0, dtype=source.dtype, device=source.device))
        for outer in found.outer.values():
            outer.left.fill_(1)
            outer.right.fill_(1)
        return found, n

    def _n_parts(self, x: Input) -> int:
        """Return how many parts of the directions cost as much as the one that is timed on such a batch."""
        entering = FEATURES[self.mode].directions
        if self.sampled or entering == "all":
            return 1  # all that there are enter every call
        chunks = self.engine.choice(x).chunks(self.mode, self.rank)
        return math.ceil(self.rank / (chunks.directions if entering == "several" else LOOPED_DIRECTIONS))

    def tangents(self, n_parts: int) -> tuple[Weights, float]:
        """Return one of so many parts of K tangents of length one, stored as a basis stores its directions, and the seconds that took."""
        made = vars(self).setdefault("_tangents", {})
        if n_parts not in made:
            weights, n_weights = self.engine.function.weights(), self.engine.row_count()
            start = perf_counter()
            entry = next(iter(weights.values())).new_full((1, 1), n_weights**-0.5)
            found = stored_directions(weights, entry.expand(math.ceil(self.rank / n_parts), n_weights))
            next(iter(found.values())).flatten()[:1].cpu()  # waits for the device
            made[n_parts] = found, perf_counter() - start
        return made[n_parts]

    def _per_input(self, compute: Callable[[Input], Tensor], at_once: int) -> float:
        """Return the seconds per input of a batch that is cut into calls of at most so many."""
        size = batch_size(self.x)
        n_calls = math.ceil(size / max(1, at_once))
        return (
            n_calls * seconds_of(lambda: compute(inputs_between(self.x, 0, math.ceil(size / n_calls)))) / size
        )

    def _features(self, x: Input, n_parts: int) -> Tensor:
        return curvature(self.likelihood, *self.engine.features(x, self.tangents(n_parts)[0]))

    def _per_sampled(self) -> float:
        ones = torch.ones(self.rank, dtype=torch.float64, device=self.engine.device)
        basis = NystromBasis(self.tangents(1)[0], ones, float(self.rank), ones)
        of = Curvature(self.engine, self.likelihood, basis, self.sampled)

        def compute(x: Input) -> Tensor:
            positions = torch.arange(batch_size(x), dtype=torch.int64, device="cpu")
            return of(Part("the first batch", positions, x))

        looped = self.engine.support(self.x).gradients != "vmap"
        return self._per_input(compute, 1 if looped else self.engine.choice(self.x).gradients_per_call())


def rehearsed_landmarks(x: Input, n_landmarks: int) -> Landmarks:
    """Return M landmarks made of the inputs of a batch, over and over, each with its first output."""
    inputs: list[Any] = [single_input(x, i) for i in range(min(batch_size(x), n_landmarks))]
    repeated = [inputs[i % len(inputs)] for i in range(n_landmarks)]
    return Landmarks(repeated, torch.zeros(n_landmarks, dtype=torch.int64, device="cpu"))


def _eigenvectors(size: int, device: torch.device) -> float:
    """Return the seconds of the eigenvectors of a matrix (size, size)."""
    part = min(size, EIGEN_SIZE)
    generator = torch.Generator("cpu").manual_seed(0)
    matrix = torch.randn(part, part, generator=generator, dtype=torch.float64, device="cpu").to(device)
    return seconds_of(lambda: torch.linalg.eigh(matrix @ matrix.T)[0]) * (size / part) ** 3
