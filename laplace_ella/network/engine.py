r"""One model and how it is differentiated: the mode, the chunks, and what is remembered of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Input, Raw, batch_size, detached, doubled, rows, signature
from .cutting import Cutting
from .features import FEATURES, Features, forward_features, pulled_cotangents
from .functional import FunctionalModel, Weights, activation_bytes, first_weight
from .memory import (
    CPU_GRADIENT_SET,
    CPU_WORKING_SET,
    LIVE_TENSORS,
    Chunks,
    budget_bytes,
    free_memory,
    let_malloc_adapt,
    plan_chunks,
    with_smaller_chunks,
)
from .probing import Support, probe
from .rewriting import rewritten
from .safety import safely

AUTODIFF = ("auto", "forward", "double", "reverse")
# Reverse mode is chosen if this many times C is at most K ...
REVERSE_COST = 8
# ... and a row's activations take at least this share of its gradient's bytes: where they are
# few, as in an MLP, writing C gradients of P numbers costs more than K tangents.
SHARED_WEIGHTS = 1 / 4


def reverse_is_cheaper(n_outputs: int, rank: int) -> bool:
    """Say whether C backward passes cost less than K tangents; docs/performance.md has the figures."""
    return REVERSE_COST * n_outputs <= rank


@dataclass(frozen=True)
class InputFacts:
    """What was found out about inputs of one shape.

    Attributes
    ----------
    positions : tuple of int
        The axes of the outputs between batch and C: () for one prediction an input.
    n_outputs : int
        C.
    row_bytes : int
        Bytes a row takes in the largest intermediate tensor.
    graph_bytes : int
        Bytes a row takes in all of them: what a backward pass keeps, at most.
    rewritten : FunctionalModel
        The model for forward mode.
    """

    positions: tuple[int, ...]
    n_outputs: int
    row_bytes: int
    graph_bytes: int
    rewritten: FunctionalModel

    @property
    def n_coordinates(self) -> int:
        """Outputs of one input: C times the positions."""
        return math.prod(self.positions) * self.n_outputs


class Engine:
    """Computes features of one model, having found out what it supports and how large it is.

    Parameters
    ----------
    module : torch.nn.Module
    autodiff : {"auto", "forward", "double", "reverse"}
    chunk_size, memory_budget, compiled, dict_key_x
        As in :class:`laplace_ella.NystromGGN`.
    """

    def __init__(
        self,
        module: nn.Module,
        autodiff: str = "auto",
        chunk_size: int | None = None,
        memory_budget: int | float | None = None,
        compiled: bool = False,
        dict_key_x: str = "input_ids",
    ) -> None:
        self.module, self.autodiff = module, autodiff
        self.chunk_size, self.memory_budget, self.compiled = chunk_size, memory_budget, compiled
        self.function = FunctionalModel(module)
        self.cutting = Cutting(self.function, dict_key_x)
        self.forward_features: Features = torch.compile(forward_features) if compiled else forward_features
        let_malloc_adapt()
        self._support: dict[Any, Support] = {}
        self._facts: dict[Any, InputFacts] = {}
        self._smaller: dict[Any, Chunks] = {}
        self._free: dict[torch.device, int] = {}

    # A copy finds out by itself what is of this module or process; weights and how inputs are read do not change.
    def __getstate__(self) -> Any:
        of_model = self.module, self.autodiff, self.chunk_size, self.memory_budget, self.compiled
        return (*of_model, self.cutting.dict_key_x), self.function.names, self.cutting.knowledge()

    def __setstate__(self, state: Any) -> None:
        arguments, names, knowledge = state
        self.__init__(*arguments)  # type: ignore[misc]
        self.function.names = names  # the model may be frozen by now
        self.cutting.learn(knowledge)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return first_weight(self.module).device

    def forget(self) -> None:
        """Find everything out again at the next use, the model having changed."""
        for found in (self._support, self._facts, self._smaller, self._free):
            found.clear()
        self.cutting.forget()

    def to_model(self, x: Raw | Input) -> Input:
        """Cut an input into rows, and move it to the model; see :class:`laplace_ella.network.cutting.Cutting`."""
        return self.cutting.to_model(x, self.device)

    def budget(self) -> int:
        """Return the bytes that gradient rows and activations may take.

        The free memory is looked up once, so that equal calls are cut into equal chunks.
        """
        return budget_bytes(self.memory_budget, self.free())

    def free(self) -> int:
        """Return the free memory that the budget is made of."""
        if self.device not in self._free:
            self._free[self.device] = free_memory(self.device)
        return self._free[self.device]

    def assume_free(self, n_bytes: int) -> None:
        """Cut calls as if so many bytes were free: into the chunks of an earlier process."""
        self._free[self.device] = n_bytes

    def row_count(self) -> int:
        """Return P."""
        return sum(w.numel() for w in self.function.weights().values())

    def row_size(self) -> int:
        """Return the bytes of one gradient row."""
        return sum(w.numel() * w.element_size() for w in self.function.weights().values())

    def known_support(self) -> Support | None:
        """Return what was found out on this device, if anything."""
        return self._support.get(self._setting())

    def support(self, x: Input) -> Support:
        """Say what the model supports; found out once a device, on two copies of a row of ``x``."""
        setting = self._setting()
        if setting not in self._support:
            self._support[setting] = safely(
                self.module, lambda: probe(self.function, _pair(x), self.autodiff)
            )
        return self._support[setting]

    def _setting(self) -> Any:
        """Tell apart what the same model can support differently: devices, dtypes, and the user's autocast."""
        kind, dtype = self.device.type, next(self.module.parameters()).dtype
        return self.device, dtype, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def facts(self, x: Input) -> InputFacts:
        """Describe inputs of the shape of ``x``; found out once a shape. Cost: three or four passes of a row or two."""
        kind = (self._setting(), signature(x))
        if kind not in self._facts:
            self._facts[kind] = safely(self.module, lambda: self._find_facts(x))
        return self._facts[kind]

    def _find_facts(self, x: Input) -> InputFacts:
        pair = _pair(x)
        support = self.support(x)
        forward = support.features.startswith("forward") and not self.compiled
        shape = self.function.outputs(self.function.weights(), pair).shape
        return InputFacts(
            tuple(shape[1:-1]),
            shape[-1],
            *activation_bytes(self.function, pair),
            rewritten(self.function, pair, support.precision) if forward else self.function,
        )

    def mode(self, x: Input, rank: int) -> str:
        """Choose among the ways to compute features: what the model supports, then C, K and its kind."""
        support = self.support(x)
        if self.autodiff != "auto" or support.rows != "vmap":
            return support.features
        facts = self.facts(x)
        shared = facts.graph_bytes >= SHARED_WEIGHTS * self.row_size()
        return "reverse" if shared and reverse_is_cheaper(facts.n_coordinates, rank) else support.features

    def features(self, x: Input, directions: Weights) -> tuple[Tensor, Tensor]:
        r"""Compute :math:`\phi(x)` (B L, C, K) and f(x) (B L, C); inside ``safely``.

        Raises
        ------
        torch.cuda.OutOfMemoryError
            If the device has no room for one row and one direction.
        """
        rank = next(iter(directions.values())).shape[0]
        if batch_size(x) == 0 or rank == 0:  # of few directions, a rank may have none
            f = self.function.outputs(self.function.weights(), x).flatten(0, -2)
            return f.new_zeros(*f.shape, rank), f
        mode = self.mode(x, rank)
        kind = (self._setting(), mode, rank, signature(x))
        chunks = self._smaller.get(kind) or self.chunks(mode, x, rank)
        result, used = with_smaller_chunks(
            lambda c: self._compute(mode, x, directions, c),
            chunks,
            self.device,
            lambda c: self.feature_bytes(mode, c, x),
        )
        if used != chunks:
            self._smaller[kind] = used
        phi, f = result
        n_outputs = self.facts(x).n_outputs
        return phi.reshape(-1, n_outputs, rank), f.reshape(-1, n_outputs)

    def pull(self, x: Input, directions: Weights, cotangents: Tensor) -> Tensor:
        r"""Compute :math:`V^T J^T u` (B, n, K) of cotangents u (B, n, L C); inside ``safely``."""
        chunks = Chunks(self.gradients_per_call(x), 1)
        looped = self.support(x).rows != "vmap"
        found, _ = with_smaller_chunks(
            lambda c: pulled_cotangents(
                self.function, self.function.weights(), directions, x, cotangents, c, looped
            ),
            chunks,
            self.device,
            lambda c: self.feature_bytes("reverse", c, x),
        )
        return found

    def _compute(self, mode: str, x: Input, directions: Weights, chunks: Chunks) -> tuple[Tensor, Tensor]:
        function = self.facts(x).rewritten if mode.startswith("forward") else self.function
        compute = self.forward_features if mode == "forward" else FEATURES[mode]
        return compute(function, function.weights(), directions, x, chunks)

    def feature_bytes(self, mode: str, chunks: Chunks, x: Input) -> int:
        """Estimate what one call of the features holds."""
        facts = self.facts(x)
        if mode.startswith("reverse"):
            return chunks.rows * (2 * self.row_size() + facts.graph_bytes)
        if mode == "double":
            return 2 * chunks.rows * facts.graph_bytes
        return LIVE_TENSORS * chunks.rows * chunks.directions * facts.row_bytes

    def gradient_bytes(self, x: Input, n_rows: int) -> int:
        """Estimate what a call of the landmark gradients holds, for at most so many of them."""
        return min(n_rows, self.gradients_per_call(x)) * (2 * self.row_size() + self.facts(x).graph_bytes)

    def chunks(self, mode: str, x: Input, rank: int) -> Chunks:
        """Cut a batch and K directions so that what a call holds stays within cache or budget."""
        if mode == "reverse":
            return Chunks(self.gradients_per_call(x), 1)
        # Only batched forward mode holds several directions at once.
        at_once = rank if mode == "forward" else 1
        return plan_chunks(self.facts(x).row_bytes, at_once, self._working_set(), self.chunk_size)

    def gradients_per_call(self, x: Input) -> int:
        """Return for how many rows gradients are computed at once: a quarter of the budget, or less."""
        facts = self.facts(x)
        by_budget = self.budget() // 4 // (2 * self.row_size() + facts.graph_bytes)
        if self.device.type == "cpu":
            by_budget = min(by_budget, CPU_GRADIENT_SET // facts.row_bytes)
        return max(1, by_budget)

    def _working_set(self) -> int:
        within_budget = max(1, self.budget() // LIVE_TENSORS)
        return min(CPU_WORKING_SET, within_budget) if self.device.type == "cpu" else within_budget


def _pair(x: Input) -> Input:
    """Return two copies of the first row, cut from any graph."""
    return doubled(detached(rows(x, 0, 1)))
