r"""What ways to compute features cost, counted: which one is chosen, and how a call is cut into chunks.

Everything is counted in multiplications of matrix products. A number that is read from memory, or written to it, costs as much as
:data:`MOVED` of them; arithmetic on activations that does not fit the cache costs more, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .memory import Chunks
from .uses import MOVED

# Besides products, contraction unfolds inputs, sums gradients and goes through smaller products than forward mode.
CONTRACTION = 1.3
# It reads tensors once or twice only, so that these may be larger: in a set of 16 MB, what malloc still recycles.
CONTRACTION_SET = 2
# Tensors that do not fit the cache are as slow as this.
UNCACHED = 1.6
# A gradient is written, and copied to where it is kept.
WRITTEN = 3
# A product in float64 costs as much as so many in float32.
DOUBLE = 2


@dataclass(frozen=True)
class Counts:
    """What there is to compute for one input.

    Attributes
    ----------
    multiplications : float
        In the matrix products of a forward pass.
    numbers : float
        In all its activations.
    largest : int
        Bytes of the largest of them.
    directions : float
        Numbers that are read for one direction: P.
    """

    multiplications: float
    numbers: float
    largest: int
    directions: float

    @property
    def forward(self) -> float:
        """The cost of a forward pass."""
        return self.multiplications + MOVED * self.numbers


def of_forward_mode(counts: Counts, rank: int, chunks: Chunks, working_set: int) -> float:
    """Return the cost of an input's features along K directions by forward mode, in chunks."""
    parts = math.ceil(rank / chunks.directions)
    fits = chunks.inputs * chunks.directions * counts.largest <= working_set
    passes = (parts + 2 * rank) * counts.forward * (1 if fits else UNCACHED)
    return passes + MOVED * rank * counts.directions / chunks.inputs


def of_contraction(
    counts: Counts, n_outputs: int, rank: int, products: float, inputs: int, working_set: int
) -> float:
    """Return the cost of an input's features by contraction, whose products cost as much."""
    fits = inputs * n_outputs * counts.largest <= CONTRACTION_SET * working_set
    passes = (1 + n_outputs) * counts.forward * (1 if fits else UNCACHED)
    return CONTRACTION * (passes + products) + MOVED * rank * counts.directions / inputs


def of_gradients(counts: Counts, n: int, met: float) -> float:
    """Return the cost of n gradients of an input, each of which is multiplied with so many others in float64."""
    return n * (3 * counts.forward + (WRITTEN * MOVED + DOUBLE * met) * counts.directions)


def of_gradients_by_layer(
    counts: Counts, n: int, met: float, full: float, outer: float, multiplied: float
) -> float:
    """Return the cost of the same layer by layer, where outer products take the place of some gradients.

    Parameters
    ----------
    full, outer, multiplied : float
        Numbers of these gradients, of their outer products, and multiplications for a product of two.
    """
    others = counts.directions - full
    of_each = WRITTEN * MOVED * (others + outer) + DOUBLE * met * (others + multiplied)
    return CONTRACTION * (1 + 2 * n) * counts.forward + n * of_each


def sizes(size: int) -> list[int]:
    """Return into how large parts a batch of a size may be cut: powers of two, and all of it."""
    return sorted({size, *(2**i for i in range(size.bit_length()) if 2**i < size)})
