r"""The kernel :math:`J J^T` of single inputs, which the exact residual and novelty scores take: layer by layer, if that is cheaper."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.batches import Input, batch_size, inputs_between
from ..network.by_layer import kernels_by_layer, numbers_at_once, outer_matrices, outer_numbers
from ..network.contraction import ContractedModel
from ..network.costs import of_gradients, of_gradients_by_layer
from ..network.engine import Engine
from ..network.memory import LIVE_TENSORS, Chunks, with_smaller_chunks


@dataclass(frozen=True)
class KernelWay:
    """How kernels of inputs of one shape are computed, and what that takes.

    Attributes
    ----------
    layers : ContractedModel or None
        The model, layer by layer; None: from rows of P numbers.
    forwards : float
        The cost in plain forward passes of an input, by arithmetic and numbers moved.
    bytes_per_input : int
        Memory that a call layer by layer holds of each input.
    inputs : int
        How many inputs such a call takes.
    """

    layers: ContractedModel | None
    forwards: float
    bytes_per_input: int = 0
    inputs: int = 0


def kernel_way(engine: Engine, x: Input) -> KernelWay:
    """Count what kernels of inputs like ``x`` cost, layer by layer and from rows, and return the cheaper way that fits."""
    facts, choice = engine.facts(x), engine.choice(x)
    counts, n, met = choice.counts, facts.n_coordinates, facts.n_outputs
    rows = KernelWay(None, of_gradients(counts, n, met) / counts.forward)
    layers = None if engine.row_engine else engine.layers(x)
    if layers is None:
        return rows
    each = 2 * facts.graph_bytes + n * (LIVE_TENSORS * facts.input_bytes + 24 * numbers_at_once(layers))
    cost = of_gradients_by_layer(counts, n, met, *outer_numbers(outer_matrices(layers)))
    found = KernelWay(layers, cost / counts.forward, each, choice.inputs_within_budget(each, n))
    return found if each <= engine.budget() // 4 and found.forwards < rows.forwards else rows


def kernels_of_layers(engine: Engine, x: Input) -> Tensor | None:
    """Compute :math:`J J^T` (B L, C, C) of each input and position layer by layer; None if that is not cheaper, or does not fit.

    Inside ``safely``.

    Raises
    ------
    DivergedError
        If a pass does not follow the record.
    """
    way, n_outputs = kernel_way(engine, x), engine.facts(x).n_outputs
    layers, positions = way.layers, engine.facts(x).n_coordinates // n_outputs
    if layers is None:
        return None

    def compute(chunks: Chunks) -> Tensor:
        parts = (inputs_between(x, a, a + chunks.inputs) for a in range(0, batch_size(x), chunks.inputs))
        return torch.cat([kernels_by_layer(layers, part, positions, n_outputs) for part in parts])

    found, _ = with_smaller_chunks(
        compute, Chunks(way.inputs, 1), engine.device, lambda c: c.inputs * way.bytes_per_input
    )
    return found.flatten(0, 1)
