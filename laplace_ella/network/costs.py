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


def sizes(size: int) -> list[int]:
    """Return into how large parts a batch of a size may be cut: powers of two, and all of it."""
    return sorted({size, *(2**i for i in range(size.bit_length()) if 2**i < size)})
