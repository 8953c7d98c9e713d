r"""What is found out about inputs of one shape: the axes of their outputs, and the memory that they take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..data.batches import Input, doubled, inputs_between
from .functional import FunctionalModel
from .rewriting import rewritten


@dataclass(frozen=True)
class InputFacts:
    """What was found out about inputs of one shape.

    Attributes
    ----------
    positions : tuple of int
        The axes of the outputs between batch and C: () for one prediction per input.
    n_outputs : int
        C.
    input_bytes : int
        Bytes that a row takes in the largest intermediate tensor.
    graph_bytes : int
        Bytes that a row takes in all of them: what a backward pass keeps, at most.
    rewritten : FunctionalModel
        The model for forward mode.
    """

    positions: tuple[int, ...]
    n_outputs: int
    input_bytes: int
    graph_bytes: int
    rewritten: FunctionalModel

    @property
    def n_coordinates(self) -> int:
        """Outputs of one input: C times the positions."""
        return math.prod(self.positions) * self.n_outputs


def find_facts(model: FunctionalModel, pair: Input, precision: torch.dtype | None) -> InputFacts:
    """Run the model on one input and on two, and describe what comes of it.

    Parameters
    ----------
    pair : input of two rows
    precision : torch.dtype, optional
        The coarsest on the way, where forward mode is used and the model may be rewritten for it.

    Notes
    -----
    Cost: three or four passes of a row or two. Call it inside :func:`laplace_ella.network.safety.safely`.
    """
    shape = model.outputs(model.weights(), pair).shape
    input_bytes, graph_bytes = activation_bytes(model, pair)
    for_forward = model if precision is None else rewritten(model, pair, precision)
    return InputFacts(tuple(shape[1:-1]), shape[-1], input_bytes, graph_bytes, for_forward)


class _TensorSizes(TorchDispatchMode):
    """Record the bytes behind every tensor that an operator returns; a view has those of its base."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[int] = []
        self.seen: dict[int, Any] = {}  # keeps them, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for v in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(v, Tensor) and v.layout == torch.strided:
                storage = v.untyped_storage()
                # A view, or a result written in place, takes no memory of its own.
                self.nbytes.append(0 if storage.data_ptr() in self.seen else storage.nbytes())
                self.seen[storage.data_ptr()] = storage
        return out


def activation_bytes(model: FunctionalModel, pair: Input) -> tuple[int, int]:
    """Return the bytes that one row takes in the largest intermediate tensor, and in all of them.

    The difference of a pass of two rows and one of a single row leaves out what does not grow
    with the batch (weights, masks).
    """
    sizes, n_rows = [], 2 if model.in_pairs else 1
    for batch in (pair, doubled(pair)) if model.in_pairs else (inputs_between(pair, 0, 1), pair):
        with torch.no_grad(), _TensorSizes() as record:
            model(model.weights(), batch)
        sizes.append(record.nbytes)
    one, two = sizes
    grown = [b - a for a, b in zip(one, two)] if len(one) == len(two) else [b // 2 for b in two]
    return max(1, max(grown) // n_rows), max(1, sum(grown) // n_rows)
