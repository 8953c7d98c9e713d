r"""Features :math:`\phi(x) = J(x) V` contracted layer by layer.

A weight enters a layer linearly, y = L(a; W), so that

.. math:: \phi_{bck} = \sum_l \langle g_{lc}[b], L(a_l[b]; V_{lk}) \rangle

with cotangents :math:`g_{lc} = df_c / dy_l`. C backward passes with respect to activations give those of all layers, one
layer after the other, and each is contracted and released at once: no gradient of P numbers is ever there.
:mod:`laplace_ella.network.uses` knows the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.func import vmap

from ..data.batches import Input, batch_size, detached, inputs_between
from .derived import Call, DerivedModel, DivergedError, Record, record, repeated
from .functional import FunctionalModel, Weights
from .memory import Chunks
from .uses import MOVED, RULES, Context, Elementwise, Layout, Product, UnknownUseError, Use, layout_of, used

Action = Callable[[Use, Tensor], None]


class _Entered(torch.autograd.Function):
    """Hands the cotangents (n, ...) of all passes at once to an action, where torch maps over the passes."""

    @staticmethod
    def forward(g: Tensor, action: Callable[[Tensor], None]) -> Tensor:
        action(g[None])
        return g.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, g: Tensor, action: Callable[[Tensor], None]) -> tuple[Tensor, None]:
        action(g.movedim(in_dims[0], 0))
        return g.new_zeros(()), None


class _Pass:
    """A forward pass whose layers keep what they take, and where cotangents of their outputs arrive."""

    def __init__(self, model: ContractedModel, layouts: dict[int, Layout]) -> None:
        self.model, self.layouts = model, layouts
        self.reached: list[tuple[list[Use], Any]] = []  # uses, and where cotangents of their output arrive
        self.first: list[tuple[list[Use], Any]] = []  # of layers that no other weight comes before
        self.read: list[tuple[Tensor, int]] = []  # what layers took, and the count of its writes

    def use(self, number: int, call: Call, names: dict[int, str], args: Any, kwargs: Any) -> Any:
        """Compute the output of a call in which an input meets weights."""
        if number not in self.layouts:  # gradients of these weights are computed otherwise
            return call.function(*args, **kwargs)
        sources = self.model.record.sources

        def slot(t: Any) -> str | None:
            name = names.get(id(t))
            return name if name is not None and sources[name] else None

        self.read += [(t, t._version) for t in args if isinstance(t, Tensor) and id(t) not in names]
        context = Context(slot, self.layouts[number])
        y, uses = used(call.function, context, args, kwargs)
        if any(y is t for t in args):  # written in place
            self.read = [(t, v) for t, v in self.read if t is not y]
        first = not y.requires_grad
        if first:
            y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
        (self.first if first else self.reached).append((uses, get_gradient_edge(y)))
        return y

    def check(self) -> None:
        """Require that nothing was written to that layers took."""
        if any(t._version != version for t, version in self.read):
            raise DivergedError

    def backward(self, f: Tensor, cotangents: Tensor, action: Action) -> None:
        """Hand the cotangents (n, B, ...) of every layer's output to an action."""
        if not f.requires_grad:
            return

        def act(uses: list[Use], g: Tensor) -> None:
            for use in uses:
                action(use, g)

        handles = []
        for uses, edge in self.reached:

            def entered(grads: Any, uses: list[Use] = uses, number: int = edge.output_nr) -> None:
                if grads[number] is not None:
                    _Entered.apply(grads[number], partial(act, uses))

            handles.append(edge.node.register_prehook(entered))
        edges = [edge for _, edge in self.first]

        def pull(u: Tensor) -> Tensor:
            found = torch.autograd.grad(f, edges, u, allow_unused=True, retain_graph=True)
            for (uses, _), g in zip(self.first, found):
                if g is not None:
                    _Entered.apply(g, partial(act, uses))
            return u

        try:
            if len(cotangents) == 1:
                pull(cotangents[0])
            else:
                vmap(pull)(cotangents)
        finally:
            for handle in handles:
                handle.remove()


class ContractedModel(DerivedModel):
    """A model of whose layers it is known how weights enter them.

    Attributes
    ----------
    layouts : dict of int to Layout
        For calls with rules, by their number in the record: where the inputs of a batch are in their output.
    uses : list of Use
        Of one input, for counts.
    uncovered : frozenset of str
        Weights that enter a call without a rule.
    """

    def __init__(self, model: FunctionalModel, record: Record) -> None:
        super().__init__(model, record)
        self.layouts: dict[int, Layout] = {}
        self.uncovered: frozenset[str] = frozenset()
        self.uses: list[Use] = []

    def visit(
        self, weights: Weights, x: Input, cotangents: Tensor | None, action: Action, at_once: int | None = None
    ) -> Tensor:
        """Run the model and backward passes, and hand every use of weights with its cotangents to an action.

        Parameters
        ----------
        weights : dict of Tensor
            Prepared: with all that is derived.
        cotangents : Tensor (B, n, L C), optional
            By default, unit vectors of the L C outputs.
        action : callable
            (use, cotangents of the layer's output (n, ...)) -> None
        at_once : int, optional
            How many of the cotangents go through the layers at a time; all by default.

        Returns
        -------
        f : Tensor (B, L C)

        Raises
        ------
        DivergedError
            If the pass does not follow the record.
        """
        own = {k: w for k, w in weights.items() if k in self.names}
        derived = {k: w for k, w in weights.items() if k not in self.names}
        run = _Pass(self, self.layouts)
        with torch.enable_grad():
            f = self.followed(own, derived, detached(x), run.use).flatten(1)
            run.check()
            size, n = f.shape
            if cotangents is None:
                units = torch.eye(n, dtype=f.dtype, device=f.device)
                cotangents = units[:, None].expand(n, size, n)
            else:
                cotangents = cotangents.transpose(0, 1)
            run.backward(f, cotangents, action)
        return f.detach()

    def cost(self, n: int, rank: int) -> float:
        """Return the cost of the features of an input by contraction, in passes through all products."""
        return sum(use.products(n, rank) for use in self.uses)


def contracted_model(model: FunctionalModel, x: Input) -> ContractedModel:
    """Record how a model uses its weights; inside ``safely``.

    Raises
    ------
    Exception
        Whatever the model raises when it is run on several copies of the first input of ``x``.
    """
    made = ContractedModel(model, record(model, x))
    x = repeated(model, x)
    size, sources, uncovered = batch_size(x), made.record.sources, set()

    def use(number: int, call: Call, names: dict[int, str], args: Any, kwargs: Any) -> Any:
        y = call.function(*args, **kwargs)
        layout = layout_of(y, size) if isinstance(y, Tensor) else None
        uses = None
        if layout is not None and call.function in RULES:

            def slot(t: Any) -> str | None:
                name = names.get(id(t))
                return name if name is not None and sources[name] else None

            with suppress(UnknownUseError):
                uses = used(call.function, Context(slot, layout), args, kwargs)[1]
        if uses is None:
            uncovered.update(*(sources[s] for s in call.slots))
        else:
            assert layout is not None
            made.layouts[number] = layout
            made.uses += uses
        return y

    weights = made.prepared(made.weights())
    made.followed(made.weights(), {k: w for k, w in weights.items() if k not in made.names}, x, use)
    made.uncovered = frozenset(uncovered)
    return made


def contracted_features(
    model: FunctionalModel, weights: Weights, directions: Weights, x: Input, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\phi(x)` layer by layer, from C backward passes with respect to activations.

    Notes
    -----
    Cost: about 1 + C forward passes per input, and for each layer the cheaper of C gradients of its weights with their
    products with V, and K outputs along V with their products with cotangents.
    """
    assert isinstance(model, ContractedModel)
    found = [_features(model, weights, directions, part) for part in _parts(x, chunks.inputs)]
    return torch.cat([phi for phi, _ in found]), torch.cat([f for _, f in found])


def _parts(x: Input, at_once: int) -> list[Input]:
    size = batch_size(x)
    n = -(-size // at_once)
    step = -(-size // n)
    return [inputs_between(x, a, a + step) for a in range(0, size, step)]


def _features(
    model: ContractedModel, weights: Weights, directions: Weights, x: Input
) -> tuple[Tensor, Tensor]:
    total: list[Tensor] = []
    small: list[tuple[Tensor, Tensor]] = []  # gradients of weights with few numbers, and directions

    def contract(use: Use, g: Tensor) -> None:
        v = directions[use.slot]
        if isinstance(use, Elementwise):
            found = use.gradients(g)
            small.append((found.reshape(*found.shape[:2], -1), v.reshape(len(v), -1)))
            return
        found = use.features(g, v)
        total.append(found if not total else total.pop().add_(found))

    f = model.visit(weights, x, None, contract)
    if small:
        found = torch.cat([g for g, _ in small], -1) @ torch.cat([v for _, v in small], -1).T
        total.append(found if not total else total.pop().add_(found))
    rank = len(next(iter(directions.values())))
    phi = total[0] if total else f.new_zeros(*f.shape, rank)
    return phi, f
