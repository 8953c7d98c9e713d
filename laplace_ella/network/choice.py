r"""Which way computes features, of which model, and in which chunks: decided by counts, for inputs of one shape.

:mod:`laplace_ella.network.costs` has what is counted, and :mod:`laplace_ella.network.features` the ways.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from .costs import Counts, of_contraction, of_forward_mode, sizes
from .derived import DerivedModel
from .facts import InputFacts
from .features import FEATURES, reverse_is_cheaper
from .functional import FunctionalModel
from .memory import CPU_GRADIENT_SET, CPU_WORKING_SET, LIVE_TENSORS, Chunks
from .probing import Support

# Ways to compute features are compared for batches of so many inputs.
USUAL_SIZE = 16


def allowed(autodiff: str, support: Support) -> list[str]:
    """Return the ways that users allow and the model supports, that of its support first."""
    if autodiff != "auto":
        return [support.features]
    others = [
        k for k, way in FEATURES.items() if way.contracts or way.gradients == support.gradients == "vmap"
    ]
    return list(dict.fromkeys([support.features, *others]))


def without_record(support: Support) -> str:
    """Return the way that takes over where a contraction does not work: plain backward passes."""
    return "reverse" if support.gradients == "vmap" else "reverse loop"


@dataclass(frozen=True)
class Choice:
    """What the choice depends on.

    Attributes
    ----------
    function : FunctionalModel
        The model as it is.
    facts, support
        What was found out about it, and about inputs of this shape.
    autodiff : str
        What the user allows.
    chunk_size : int or None
        Directions a call, if the user says so.
    n_weights, row_bytes : int
        P, and the bytes of a gradient.
    budget : int
        Bytes that gradients and activations may take.
    size : int
        Inputs of the batch.
    on_cpu : bool
    records : bool
        Whether a graph leads back to the inputs.
    """

    function: FunctionalModel
    facts: InputFacts
    support: Support
    autodiff: str
    chunk_size: int | None
    n_weights: int
    row_bytes: int
    budget: int
    size: int
    on_cpu: bool
    records: bool

    # ------------------------------------------------------------------ the way

    def mode(self, rank: int) -> str:
        """Choose the cheapest way that the model supports, by counts."""
        names, facts = allowed(self.autodiff, self.support), self.facts
        first = names[0]
        if FEATURES[first].contracts and (self.records or facts.contracted is None):
            return without_record(self.support)
        if len(names) == 1 or not (FEATURES[first].reference or FEATURES[first].directions != "all"):
            return first
        contraction = next((k for k in names if FEATURES[k].contracts), None)
        if contraction is not None and self.contracts(rank):
            return min(first, contraction, key=lambda k: self.cost(k, rank))
        if reverse_is_cheaper(facts.n_coordinates, rank, facts.graph_bytes / self.row_bytes):
            return next((k for k in names if FEATURES[k].gradients), first)
        return first

    def contraction(self, rank: int) -> str | None:
        """Return the way that contracts layer by layer, if it is allowed and works for such inputs."""
        found = next((k for k in allowed(self.autodiff, self.support) if FEATURES[k].contracts), None)
        return found if found is not None and self.contracts(rank) else None

    def contracts(self, rank: int) -> bool:
        """Tell whether contraction works for such inputs, and what it prepares is within the budget."""
        contracted = self.facts.contracted
        if contracted is None or self.records:
            return False
        return rank * contracted.direction_bytes <= self.budget // 2

    def model_for(self, mode: str, rank: int) -> FunctionalModel:
        """Return the model that a way takes, for which there is room for what it prepares."""
        way, contracted = FEATURES[mode], self.facts.contracted
        if way.contracts and contracted is not None:
            return contracted
        if not way.forward:
            return self.function
        function = self.facts.rewritten
        while isinstance(function, DerivedModel) and rank * function.direction_bytes > self.budget // 2:
            function = function.model
        return function

    def remark(self, mode: str) -> str:
        """Say what a contraction that the user named, or that was chosen, cannot do; empty if there is nothing."""
        contracted, wanted = self.facts.contracted, self.support.features
        if FEATURES[wanted].contracts and contracted is None:
            return (
                f"autodiff={self.autodiff!r} does not work for this model ({self.facts.why_not}), so that its "
                "features are computed by plain backward passes. Name no mode, or 'forward', for cheaper ones."
            )
        if FEATURES[wanted].contracts and not FEATURES[mode].contracts:
            return (
                f"autodiff={self.autodiff!r} records no graph back to the inputs, so that features with "
                "enable_backprop=True are computed by plain backward passes. Name no mode, or 'forward', for cheaper ones."
            )
        if FEATURES[mode].contracts and contracted is not None and contracted.uncovered:
            return (
                f"{len(contracted.uncovered)} weights ({', '.join(sorted(contracted.uncovered)[:3])} ...) are used in a "
                "way that contraction layer by layer has no rule for. Their gradients are computed by reverse mode, for "
                "about 1 + 2 C forward passes of an input more."
            )
        return ""

    # ------------------------------------------------------------------ its cost

    @property
    def counts(self) -> Counts:
        """What there is to compute for one input."""
        item = self.row_bytes / self.n_weights
        multiplications = 0 if self.facts.contracted is None else self.facts.contracted.multiplications
        return Counts(multiplications, self.facts.graph_bytes / item, self.facts.input_bytes, self.n_weights)

    def cost(self, mode: str, rank: int) -> float:
        """Return what the features of an input in a batch of usual size cost, counted in multiplications.

        Inputs of one shape are treated alike, however many come at a time.
        """
        facts, way, counts = self.facts, FEATURES[mode], self.counts
        chunks = self.chunks(mode, rank, USUAL_SIZE)
        if way.contracts and facts.contracted is not None:
            n = facts.n_coordinates
            products = facts.contracted.products(n, rank)
            if facts.contracted.uncovered:
                products += (1 + 4 * n) * counts.forward
            return of_contraction(counts, n, rank, products, chunks.inputs, self._cached_bytes)
        if way.forward:
            return of_forward_mode(counts, rank, chunks, self._cached_bytes)
        return way.forwards(facts.n_coordinates, rank) * counts.forward

    # ------------------------------------------------------------------ chunks and memory

    def chunks(self, mode: str, rank: int, size: int | None = None) -> Chunks:
        """Cut a batch and K directions so that what a call holds stays within budget, at the least cost."""
        way, size = FEATURES[mode], self.size if size is None else size
        if way.gradients == "loop":
            return Chunks(1, 1)
        if way.contracts:
            return self.contraction_chunks(mode, rank, self.facts.n_coordinates, size)
        if way.directions == "all":
            return Chunks(self.inputs_within_budget(self.feature_bytes(mode, Chunks(1, 1))), 1)
        counts, within = self.counts, max(1, self.budget // LIVE_TENSORS)
        wanted = 1 if way.directions == "one" else min(rank, self.chunk_size or rank)
        directions = {math.ceil(wanted / parts) for parts in range(1, wanted + 1)}
        if self.chunk_size:
            directions = {wanted}
        possible = [
            Chunks(b, d) for b in sizes(size) for d in sorted(directions) if b * d * counts.largest <= within
        ]
        fallback = Chunks(1, wanted if self.chunk_size else 1)
        cost = partial(of_forward_mode, counts, rank, working_set=self._cached_bytes)
        return min(possible, key=lambda c: cost(chunks=c), default=fallback)

    def contraction_chunks(self, mode: str, rank: int, n: int, size: int | None = None) -> Chunks:
        """Cut a batch for a contraction with n cotangents an input."""
        counts, way = self.counts, FEATURES[mode]
        each = way.held[1] * self.facts.graph_bytes + way.per_output * n * self.facts.input_bytes
        possible = [b for b in sizes(self.size if size is None else size) if b * each <= self.budget // 2]
        cost = partial(of_contraction, counts, n, rank, 0.0, working_set=self._cached_bytes)
        return Chunks(min(possible, key=lambda b: cost(inputs=b), default=1), 1)

    def feature_bytes(self, mode: str, chunks: Chunks) -> int:
        """Estimate what one call of the features holds."""
        facts, way = self.facts, FEATURES[mode]
        held = facts.input_bytes, facts.graph_bytes, self.row_bytes
        each = sum(n * size for n, size in zip(way.held, held))
        each += way.per_output * facts.n_coordinates * facts.input_bytes
        return chunks.inputs * chunks.directions * each

    def prepared_bytes(self, mode: str, rank: int) -> int:
        """Return the bytes of what is prepared of K directions, once for a basis."""
        function = self.model_for(mode, rank)
        return rank * function.direction_bytes if isinstance(function, DerivedModel) else 0

    def gradients_per_call(self, row_bytes: int | None = None) -> int:
        """Return for how many rows gradients are computed at once: a quarter of the budget, or less."""
        return self.inputs_within_budget(self._bytes_per_gradient(row_bytes))

    def gradient_bytes(self, n_inputs: int, row_bytes: int | None = None) -> int:
        """Estimate what a call of the landmark gradients holds, for at most so many of them; by default, rows of P numbers."""
        return min(n_inputs, self.gradients_per_call(row_bytes)) * self._bytes_per_gradient(row_bytes)

    def inputs_within_budget(self, bytes_per_input: int, cotangents: int = 1) -> int:
        """Return how many inputs of so many bytes, and cotangents, a call may take: a quarter of the budget, or less."""
        by_budget = self.budget // 4 // bytes_per_input
        if self.on_cpu:
            by_budget = min(by_budget, CPU_GRADIENT_SET // (cotangents * self.facts.input_bytes))
        return max(1, by_budget)

    def _bytes_per_gradient(self, row_bytes: int | None) -> int:
        return 2 * (self.row_bytes if row_bytes is None else row_bytes) + self.facts.graph_bytes

    @property
    def _cached_bytes(self) -> int:
        """The bytes that a tensor may take without being slower for it."""
        return CPU_WORKING_SET if self.on_cpu else self.budget
