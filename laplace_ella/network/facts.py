r"""What is found out about inputs of one shape: the axes of their outputs, and the memory that they take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..data.batches import Input, doubled, each_cut, inputs_between
from ..data.hashing import normal_like
from .by_layer import rows_by_layer
from .contraction import ContractedModel, contracted_features, contracted_model
from .features import forward_pass
from .functional import FunctionalModel, Pull, Weights, backward_passes, first_weight, flat
from .gradients import looped_rows
from .memory import Chunks, attempt
from .outputs import Axes
from .rewriting import Rewrites, RewrittenModel, agree, find_rewrites, rewritten

# Times the tolerance: so far apart, contraction may be right all the same, and is tried on other inputs.
NEAR = 10.0


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
    Cost: some forty passes of a row. Call it inside :func:`laplace_ella.network.safety.safely`.
    """
    f, input_bytes, graph_bytes = activation_bytes(model, pair)
    plain = InputFacts(model.axes_of(f), f.shape[-1], input_bytes, graph_bytes, model)
    if not derivable:
        return replace(plain, why_not="the model is compiled")
    reference = Reference.of(model, pair)
    rewrites, _ = attempt(lambda: find_rewrites(model, pair))
    candidate = model if rewrites is None else RewrittenModel(model, rewrites)
    # It need not be compared with the model by itself, if what is made of it agrees with backward passes.
    made, why_not, pushed = _recorded(candidate, pair, reference, precision, one_by_one)
    if not pushed:
        checked, _ = attempt(lambda: rewritten(model, pair, precision))
        unchecked, candidate = candidate, model if checked is None else checked
        if made is None and _rewrites(unchecked) != _rewrites(candidate):
            made, why_not, pushed = _recorded(candidate, pair, reference, precision, one_by_one)
    for_forward = made if made is not None and pushed else candidate
    return replace(plain, rewritten=for_forward, contracted=made, why_not=why_not)


def _rewrites(model: FunctionalModel) -> Rewrites | None:
    return model.rewrites if isinstance(model, RewrittenModel) else None


def _recorded(
    model: FunctionalModel, pair: Input, reference: Reference, precision: torch.dtype, one_by_one: bool
) -> tuple[ContractedModel | None, str, bool]:
    """Return a model for contraction, or why there is none, and whether forward mode may follow its record."""
    found, error = attempt(lambda: _contracted(model, pair, reference, precision, one_by_one))
    if found is None:
        return None, f"{type(error).__name__}: {error}".splitlines()[0], False
    return found[0], "", _is_pushed(*found, reference, precision)


@dataclass(frozen=True)
class Reference:
    """What plain backward passes of single inputs say of two inputs that differ.

    Attributes
    ----------
    model : FunctionalModel
    x : input of two
    f : Tensor (2, L C)
    cotangents : Tensor (2, 2, L C)
        u, two of each input.
    tangents : dict of Tensor (2, *shape)
        V
    products : Tensor (2, 2)
        :math:`V^T J^T` (:meth:`mixed` u) of each input.
    moving : frozenset of str
        The weights that the outputs depend on.
    """

    model: FunctionalModel
    x: Input
    f: Tensor
    cotangents: Tensor
    tangents: Weights
    products: Tensor
    moving: frozenset[str]

    @classmethod
    def of(cls, model: FunctionalModel, pair: Input) -> Reference:
        """Run a forward and a backward pass of each input."""
        x, moving = _distinct(pair), set[str]()
        tangents = normal_like(model.weights(), 2, seed=0)
        bases = {k: flat(v) for k, v in tangents.items()}

        def action(f: Tensor, leaves: Weights, pull: Pull) -> tuple[Tensor, Tensor, Tensor]:
            number = len(found) * f.numel()
            entries = torch.arange(number, number + f.numel(), dtype=f.dtype, device=f.device)
            u = torch.stack([(entries + shift).cos() for shift in (0, 1)])
            gradients = pull(cls.mixed(u[None])[0] @ f[0], leaves)
            moving.update(k for k, g in gradients.items() if g.any())
            products = torch.stack([b @ gradients[k].reshape(-1) for k, b in bases.items()]).sum(0)
            return f.detach()[0], u, products

        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for i in (0, 1):
            found.append(backward_passes(model, inputs_between(x, i, i + 1), action))
        f, u, products = map(torch.stack, zip(*found))
        return cls(model, x, f, u, tangents, products, frozenset(moving))

    def of_others(self) -> Reference:
        """Return what they say of other inputs of the same kind: with entries of the last axis moved on by one."""
        return Reference.of(self.model, each_cut(self.x, lambda t: t.roll(1, -1) if t.ndim > 1 else t))

    @staticmethod
    def mixed(values: Tensor) -> Tensor:
        """Return a combination (B, ...) of what belongs to the two cotangents (B, 2, ...)."""
        return values[:, 0] - 0.5 * values[:, 1]


def _contracted(
    model: FunctionalModel, pair: Input, reference: Reference, precision: torch.dtype, one_by_one: bool
) -> tuple[ContractedModel, Weights]:
    """Record a model, require that contraction agrees with plain backward passes, and return what it took for V.

    Raises
    ------
    Exception
        If it cannot be recorded, or does not agree.
    """
    made = contracted_model(model, pair, one_by_one)
    missed = reference.moving - made.reached
    if missed:
        raise ValueError(f"no call was seen that {', '.join(sorted(missed)[:3])} enter")
    directions = {**reference.tangents, **made.prepared(reference.tangents)}
    found = {k: directions[k] for k in made.met}
    if not _holds(partial(_compared, made, found), reference, precision):
        raise ValueError("contraction layer by layer and backward passes disagree")
    return made, found


Compared = list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]


def _compared(made: ContractedModel, found: Weights, reference: Reference) -> Compared:
    """Return products and outputs by contraction, each beside those of plain backward passes."""
    mixed, pull = reference.mixed, partial(contracted_features, made, made.ready(), found)
    phi, f = pull(reference.x, Chunks(2, 1), reference.cotangents)
    # In the other order too: a model may sort its inputs. And with one cotangent, which is pulled without vmap.
    flipped = each_cut(reference.x, lambda t: t.flip(0))
    other, g = pull(flipped, Chunks(2, 1), mixed(reference.cotangents).flip(0)[:, None])
    passes = ((mixed(phi), f), (other[:, 0].flip(0), g.flip(0)))
    return [((phi, reference.products), (f, reference.f)) for phi, f in passes]


def _is_pushed(made: ContractedModel, found: Weights, reference: Reference, precision: torch.dtype) -> bool:
    """Tell whether forward mode may follow the record: whether it then agrees with plain backward passes."""
    first = {k: v[:1].clone() for k, v in found.items()}

    def compared(of: Reference) -> Compared:
        phi, f = forward_pass(made, made.ready(), first, of.x)
        products = torch.einsum("bc,bck->bk", of.mixed(of.cotangents), phi)
        return [((products, of.products[:, :1]), (f, of.f))]

    return bool(attempt(lambda: _holds(compared, reference, precision))[0])


def _holds(compare: Callable[[Reference], Compared], reference: Reference, precision: torch.dtype) -> bool:
    """Tell whether what is compared is equal up to rounding.

    Where rounding moves an input across a kink of a deep network gradients jump, but hardly for other inputs too.
    """

    def agrees(compared: Compared, times: float = 1) -> bool:
        return all(agree(*of_v, precision, times) and agree(*of_f, precision) for of_v, of_f in compared)

    compared = compare(reference)
    return agrees(compared) or (agrees(compared, NEAR) and agrees(compare(reference.of_others())))


def layers_of(
    model: FunctionalModel, facts: InputFacts, pair: Input, precision: torch.dtype, one_by_one: bool
) -> ContractedModel | None:
    """Return the model for gradients layer by layer: not folded, as gradients of a few tensors would have to be of more.

    None if it does not work for contraction, or its gradients do not agree with plain backward passes. Inside ``safely``.
    """
    if facts.contracted is None or not facts.contracted.record.derived:
        return facts.contracted

    def find() -> ContractedModel:
        made, _ = _contracted(model, pair, Reference.of(model, pair), precision, one_by_one)
        x, device = _distinct(pair), first_weight(model.module).device
        outputs = torch.zeros(2, dtype=torch.int64, device=device)
        plain = looped_rows(model, model.weights(), x, outputs)
        for name, rows in rows_by_layer(made, x, outputs, {}).items():
            if not isinstance(rows, Tensor) or not agree(rows, plain[name], precision):
                raise ValueError(f"gradients layer by layer and backward passes disagree in {name}")
        return made

    return attempt(find)[0]


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


def activation_bytes(model: FunctionalModel, pair: Input) -> tuple[Tensor, int, int]:
    """Return the outputs (2, ..., C), the bytes that one row takes in the largest intermediate tensor, and in all of them.

    The difference of a pass of two rows and one of a single row leaves out what does not grow
    with the batch (weights, masks).
    """
    sizes, outputs, n_rows = [], [], 2 if model.in_pairs else 1
    for batch in (pair, doubled(pair)) if model.in_pairs else (inputs_between(pair, 0, 1), pair):
        with torch.no_grad(), _TensorSizes() as record:
            outputs.append(model.outputs(model.weights(), batch))
        sizes.append(record.nbytes)
    one, two = sizes
    grown = [b - a for a, b in zip(one, two)] if len(one) == len(two) else [b // 2 for b in two]
    return outputs[-1], max(1, max(grown) // n_rows), max(1, sum(grown) // n_rows)
