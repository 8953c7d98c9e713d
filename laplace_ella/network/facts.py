r"""What is found out about inputs of one shape: the axes of their outputs, and the memory that they take."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..data.batches import Input, doubled, each_cut, inputs_between
from ..data.hashing import normal_like
from .by_layer import rows_by_layer
from .contraction import ContractedModel, contracted_cotangents, contracted_model
from .features import forward_pass
from .functional import FunctionalModel, Pull, Weights, backward_passes, first_weight
from .gradients import looped_rows
from .memory import Chunks, attempt
from .outputs import Axes
from .pulling import pulled
from .rewriting import agree, rewritten


@dataclass(frozen=True)
class InputFacts:
    """What was found out about inputs of one shape.

    Attributes
    ----------
    axes : Axes
        Of the outputs, which say what their positions are.
    n_outputs : int
        C.
    input_bytes : int
        Bytes that a row takes in the largest intermediate tensor.
    graph_bytes : int
        Bytes that a row takes in all of them: what a backward pass keeps, at most.
    rewritten : FunctionalModel
        The model for forward mode.
    contracted : ContractedModel or None
        The model for contraction layer by layer; None if it does not work for it.
    why_not : str
        Why not, then.
    """

    axes: Axes
    n_outputs: int
    input_bytes: int
    graph_bytes: int
    rewritten: FunctionalModel
    contracted: ContractedModel | None = None
    why_not: str = ""

    @property
    def n_coordinates(self) -> int:
        """Outputs of one input: C times the positions."""
        return math.prod(self.axes.positions) * self.n_outputs


def find_facts(
    model: FunctionalModel, pair: Input, precision: torch.dtype, derivable: bool, one_by_one: bool
) -> InputFacts:
    """Run the model on one input and on two, and describe what comes of it.

    Parameters
    ----------
    pair : input of two rows
    precision : torch.dtype
        The coarsest on the way.
    derivable : bool
        Whether the model may be rewritten and recorded: it is not where it is compiled.
    one_by_one : bool
        Whether reverse mode takes the inputs of a batch one by one.

    Notes
    -----
    Cost: some twenty passes of a row or two. Call it inside :func:`laplace_ella.network.safety.safely`.
    """
    f = model.outputs(model.weights(), pair)
    input_bytes, graph_bytes = activation_bytes(model, pair)
    plain = InputFacts(model.axes_of(f), f.shape[-1], input_bytes, graph_bytes, model)
    if not derivable:
        return replace(plain, why_not="the model is compiled")
    rewrite, _ = attempt(lambda: rewritten(model, pair, precision))
    for_forward = model if rewrite is None else rewrite
    plain = replace(plain, rewritten=for_forward)
    made, error = attempt(lambda: _contracted(for_forward, pair, precision, rewrite is not None, one_by_one))
    if made is None:
        return replace(plain, why_not=f"{type(error).__name__}: {error}".splitlines()[0])
    contracted, forward = made
    return replace(plain, contracted=contracted, rewritten=contracted if forward else for_forward)


def _contracted(
    model: FunctionalModel, pair: Input, precision: torch.dtype, forward: bool, one_by_one: bool
) -> tuple[ContractedModel, bool]:
    """Record a model, and require that contraction agrees with plain ways; say whether forward mode may follow the record.

    Raises
    ------
    Exception
        If it cannot be recorded, or does not agree.
    """
    made = contracted_model(model, pair, one_by_one)
    weights, ready = model.weights(), made.ready()
    tangents = normal_like(weights, 2, seed=0)
    directions = {**tangents, **made.prepared(tangents)}
    found = {k: directions[k] for k in made.met}
    x = _distinct(pair)
    missed = _moving(model, x) - made.reached
    if missed:
        raise ValueError(f"no call was seen that {', '.join(sorted(missed)[:3])} enter")
    # In both orders: a model may sort its inputs.
    for batch in (x, each_cut(x, lambda t: t.flip(0))):
        f = made(ready, batch)
        entries = torch.arange(f.numel(), dtype=f.dtype, device=f.device).view_as(f)
        u = torch.stack([(entries + shift).cos() for shift in (0, 1)], 1)
        contracted = contracted_cotangents(made, ready, found, batch, u, Chunks(2, 1))
        if not agree(contracted, pulled(model, None, tangents, batch, 1, u)[0], precision):
            raise ValueError("contraction layer by layer and backward passes disagree")
    if not forward:
        return made, False
    pushed, _ = attempt(lambda: forward_pass(made, ready, found, x))
    plain = forward_pass(model, weights, tangents, x)
    return made, pushed is not None and all(agree(a, b, precision) for a, b in zip(pushed, plain))


def layers_of(
    model: FunctionalModel, facts: InputFacts, pair: Input, precision: torch.dtype, one_by_one: bool
) -> ContractedModel | None:
    """Return the model for gradients layer by layer: not folded, as gradients of a few tensors would have to be of more.

    None if it does not work for contraction, or its gradients do not agree with plain backward passes. Inside ``safely``.
    """
    if facts.contracted is None or not facts.contracted.record.derived:
        return facts.contracted

    def find() -> ContractedModel:
        made, _ = _contracted(model, pair, precision, False, one_by_one)
        x, device = _distinct(pair), first_weight(model.module).device
        outputs = torch.zeros(2, dtype=torch.int64, device=device)
        plain = looped_rows(model, model.weights(), x, outputs)
        for name, rows in rows_by_layer(made, x, outputs, {}).items():
            if not isinstance(rows, Tensor) or not agree(rows, plain[name], precision):
                raise ValueError(f"gradients layer by layer and backward passes disagree in {name}")
        return made

    return attempt(find)[0]


def _moving(model: FunctionalModel, x: Input) -> set[str]:
    """Return the weights that the outputs depend on."""

    def action(f: Tensor, leaves: Weights, pull: Pull) -> set[str]:
        return {k for k, g in pull(f.cos().sum(), leaves).items() if g.any()}

    found: set[str] = backward_passes(model, x, action)
    return found


def _distinct(pair: Input) -> Input:
    """Return two inputs of which the second is the first one backwards."""

    def other(t: Tensor) -> Tensor:
        return torch.cat([t[:1], t[:1].flip(-1) if t.ndim > 1 else t[:1]])

    return each_cut(pair, other)


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
