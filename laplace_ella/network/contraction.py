r"""Features :math:`\phi(x) = J(x) V` contracted layer by layer.

A weight enters a layer linearly, y = L(a; W), so that

.. math:: \phi_{bck} = \sum_l \langle g_{lc}[b], L(a_l[b]; V_{lk}) \rangle

with cotangents :math:`g_{lc} = df_c / dy_l`. C backward passes with respect to activations give those of all layers, one
layer after the other, and each is contracted and released at once: no gradient of P numbers is ever there.
:mod:`laplace_ella.network.uses` knows the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.func import vmap

from ..data.batches import Input, batch_size, detached, doubled, inputs_between
from .calls import Call, DivergedError, Record, record
from .context import Context, UnknownUseError
from .derived import DerivedModel
from .functional import FunctionalModel, Weights
from .layouts import Layout
from .memory import Chunks, Result, attempt
from .pulling import in_blocks, pulled
from .rewriting import RewrittenModel
from .rules import RULES, used
from .uses import Elementwise, Product, Use

Action = Callable[[Use, Tensor], None]


def _or_diverged(compute: Callable[[], Result]) -> Result:
    """Compute what a recorded pass would; what fails, but for lack of memory, is a pass of another kind.

    Raises
    ------
    DivergedError
    """
    found, error = attempt(compute)
    if found is None:
        raise DivergedError from error
    return found


def _of_all_passes(g: Tensor, n: int) -> Tensor:
    """Return the cotangents (n, ...) of all passes, where torch maps over the passes if there are several.

    An autograd function with a rule for vmap would do as well, at a tenth of a millisecond a layer.
    """
    functorch: Any = torch._C._functorch
    if not functorch.is_batchedtensor(g):
        return g[None].expand(n, *g.shape)
    return functorch.get_unwrapped(g).movedim(functorch.maybe_get_bdim(g), 0)


class _Pass:
    """A forward pass whose layers keep what they take, and where cotangents of their outputs arrive."""

    def __init__(self, model: ContractedModel, layouts: dict[int, Layout], size: int) -> None:
        self.model, self.layouts, self.size = model, layouts, size
        self.reached: list[tuple[list[Use], Any]] = []  # uses, and where cotangents of their output arrive
        self.first: list[tuple[list[Use], Any]] = []  # of layers that no other weight comes before
        self.read: list[tuple[Tensor, int]] = []  # what layers took, and the count of its writes

    def use(self, number: int, call: Call, names: dict[int, str], args: Any, kwargs: Any) -> Any:
        """Compute the output of a call in which an input meets weights."""
        if number not in self.layouts:  # gradients of these weights are computed otherwise
            return call.function(*args, **kwargs)
        self.read += [(t, t._version) for t in args if isinstance(t, Tensor) and id(t) not in names]
        context = Context(partial(self.model.record.slot, names), self.layouts[number])
        y, uses = _or_diverged(lambda: used(call.function, context, args, kwargs))
        if context.layout.size(y) != self.size:  # of some of the inputs
            raise DivergedError
        if y._is_view():  # written in place later, it has another history than that of its cotangents
            if number in self.model.written:
                y = y.clone()
            else:
                self.read.append((y, y._version))
        if any(y is t for t in args):  # written in place
            self.read = [(t, v) for t, v in self.read if t is not y]
        first = not y.requires_grad
        if first:
            y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
        (self.first if first else self.reached).append((uses, get_gradient_edge(y)))
        return y

    def check(self) -> None:
        """Require that nothing was written to that layers took."""
        if any(t._version != version for t, version in self.read if not t.is_inference()):
            raise DivergedError

    def backward(self, f: Tensor, cotangents: Tensor, action: Action) -> bool:
        """Hand the cotangents (n, B, ...) of every layer's output to an action; say whether there were any."""
        if not f.requires_grad:
            return False

        def act(uses: list[Use], g: Tensor) -> None:
            for use in uses:
                action(use, g)

        handles = []
        for uses, edge in self.reached:

            def entered(grads: Any, uses: list[Use] = uses, number: int = edge.output_nr) -> None:
                if grads[number] is not None:
                    act(uses, _of_all_passes(grads[number], len(cotangents)))

            handles.append(edge.node.register_prehook(entered))
        edges = [edge for _, edge in self.first]

        def pull(u: Tensor) -> Tensor:
            found = torch.autograd.grad(f, edges, u, allow_unused=True, retain_graph=True)
            for (uses, _), g in zip(self.first, found):
                if g is not None:
                    act(uses, _of_all_passes(g, len(cotangents)))
            return u

        try:
            if len(cotangents) == 1:
                pull(cotangents[0])
            else:
                vmap(pull)(cotangents)
        finally:
            for handle in handles:
                handle.remove()
        return True


class ContractedModel(DerivedModel):
    """A model of whose layers it is known how weights enter them.

    Attributes
    ----------
    layouts : dict of int to Layout
        For calls with rules, by their number in the record: where the inputs of a batch are in their output.
    uses : list of Use
        Of one input, for counts.
    uncovered : frozenset of str
        Weights that enter a call without a rule, whose gradients are taken by reverse mode.
    one_by_one : bool
        Whether reverse mode takes the inputs of a batch one by one.
    """

    def __init__(self, model: FunctionalModel, record: Record, one_by_one: bool = False) -> None:
        super().__init__(model, record)
        self.one_by_one = one_by_one
        self.layouts: dict[int, Layout] = {}
        self.uncovered: frozenset[str] = frozenset()
        self.uses: list[Use] = []
        self.written: frozenset[int] = frozenset()  # calls whose output is written to in place
        self._last: frozenset[str] = frozenset()  # kernels that are laid out with channels last

    @cached_property
    def uncovered_slots(self) -> frozenset[str]:
        """The uncovered weights, and what is derived from them, whose contributions come from elsewhere."""
        return frozenset(k for k, sources in self.record.sources.items() if sources & self.uncovered)

    @cached_property
    def met(self) -> frozenset[str]:
        """The weights, and what is derived from them, that inputs meet or whose gradients come from elsewhere."""
        return super().met | self.uncovered

    @property
    def reached(self) -> frozenset[str]:
        """The weights of which some use is known, or whose gradients come from elsewhere."""
        return self.uncovered.union(*(self.record.sources[use.slot] for use in self.uses))

    def visit(
        self,
        weights: Weights,
        x: Input,
        cotangents: Tensor | Callable[[Tensor], Tensor] | None,
        action: Action,
    ) -> Tensor:
        """Run the model and backward passes, and hand every use of weights with its cotangents to an action.

        Parameters
        ----------
        weights : dict of Tensor
            Prepared: with all that is derived.
        cotangents : Tensor (B, n, L C) or callable, optional
            Or what makes them of f; by default, unit vectors of the L C outputs.
        action : callable
            (use, cotangents of the layer's output (n, ...)) -> None

        Returns
        -------
        f : Tensor (B, L C)

        Raises
        ------
        DivergedError
            If the pass does not follow the record.
        """
        own, derived = self.parts(weights)
        run = _Pass(self, self.layouts, batch_size(x))
        with torch.enable_grad():
            f = self.followed(own, derived, detached(x), run.use).flatten(1)
            run.check()
            size, n = f.shape
            if cotangents is None:
                units = torch.eye(n, dtype=f.dtype, device=f.device)
                cotangents = units[:, None].expand(n, size, n)
            else:
                made = cotangents if isinstance(cotangents, Tensor) else cotangents(f.detach())
                cotangents = made.transpose(0, 1)
            _or_diverged(partial(run.backward, f, cotangents, action))
        return f.detach()

    def prepared(self, directions: Weights) -> Weights:
        """Return directions (K, *shape) for derived tensors, and those of convolutions with channels last."""
        found = {**directions, **super().prepared(directions)}
        last = {k: _channels_last(found[k]) for k in self._last}
        return {k: last.get(k, found[k]) for k in self.prepared_names}

    def laid_out(self, ready: Weights) -> Weights:
        """Bring kernels into the order that convolutions, and their backward passes, then return activations in."""
        return {k: _channels_last(w[None])[0] if k in self._last else w for k, w in ready.items()}

    @property
    def prepared_names(self) -> Collection[str]:
        """Names of the tensors for which directions are prepared: kernels with channels last are, too."""
        return {*self.record.derived, *self._last}

    @cached_property
    def multiplications(self) -> int:
        """In all matrix products of a forward pass of one input."""
        return sum(math.prod(use.shape) for use in self.uses if isinstance(use, Product))

    def products(self, n: int, rank: int) -> float:
        """Return the cost of contracting n cotangents of an input with K directions, in multiplications."""
        return sum(use.products(n, rank) for use in self.uses)


def _channels_last(kernels: Tensor) -> Tensor:
    """Lay out kernels (K, O, I, *kernel) such that I has the smallest stride."""
    return kernels.movedim(2, -1).contiguous().movedim(-1, 2)


def contracted_model(model: FunctionalModel, x: Input, one_by_one: bool = False) -> ContractedModel:
    """Record how a model uses its weights; inside ``safely``.

    Raises
    ------
    Exception
        Whatever the model raises when it is run on several copies of the first input of ``x``.

    Notes
    -----
    Cost: a pass of five copies or more, which shows where inputs are in each call's output, and one of two for the rules.
    """
    made = ContractedModel(model, record(model, x), one_by_one)
    x, sources = doubled(inputs_between(x, 0, 1)), made.record.sources
    uncovered: set[str] = set()
    outputs: list[tuple[int, Tensor, int]] = []

    def use(number: int, call: Call, names: dict[int, str], args: Any, kwargs: Any) -> Any:
        layout = made.record.layouts.get(number)
        if layout is not None and call.function in RULES:
            context = Context(partial(made.record.slot, names), layout)
            with suppress(UnknownUseError):
                y, uses = used(call.function, context, args, kwargs)
                made.layouts[number] = layout
                made.uses += [u.without_input() for u in uses]
                outputs.append((number, y, y._version))
                return y
        uncovered.update(*(sources[s] for s in call.slots))
        return call.function(*args, **kwargs)

    made.followed(*made.parts(made.ready()), x, use)
    made.written = frozenset(number for number, y, version in outputs if y._version != version)
    # Of what is derived from several weights, either all are covered or none.
    together = [sources for sources in made.record.sources.values() if len(sources) > 1]
    while more := {k for s in together if s & uncovered for k in s} - uncovered:
        uncovered |= more
    made.uncovered = frozenset(uncovered)
    if isinstance(model, RewrittenModel) and model.rewrites.channels_last:
        made._last = frozenset(use.slot for use in made.uses if isinstance(use, Product) and use.last)
    made.forget()
    return made


def contracted_features(
    model: FunctionalModel,
    weights: Weights,
    directions: Weights,
    x: Input,
    chunks: Chunks,
    *cotangents: Tensor,
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\phi(x)` layer by layer, from C backward passes with respect to activations.

    Parameters
    ----------
    model : FunctionalModel
        Best a :class:`ContractedModel`; of others, it is recorded first.
    weights, directions : dict of Tensor
        With what is derived and prepared, if the model is a :class:`ContractedModel`.
    cotangents : Tensor (B, n, L C), optional
        u, for :math:`V^T J(x)^T u` (B, n, K) in place of features.

    Notes
    -----
    Cost: about 1 + C forward passes per input, and for each layer the cheaper of C gradients of its weights with their
    products with V, and K outputs along V with their products with cotangents. Memory: the activations of
    ``chunks.inputs`` inputs, and a few layers' cotangents of C outputs.
    """
    if not isinstance(model, ContractedModel):
        model = contracted_model(model, x)
        weights, directions = model.ready(), {**directions, **model.prepared(directions)}
    other = {k: directions[k] for k in model.uncovered}

    def compute(block: Input, *us: Tensor) -> tuple[Tensor, Tensor]:
        phi, f = _of_layers(model, weights, directions, block, *us)
        if other:
            own = {k: weights[k] for k in other}
            phi = phi + pulled(model.model, None if model.one_by_one else own, other, block, len(f), *us)[0]
        return phi, f

    return in_blocks(compute, chunks.inputs, x, *cotangents)


def contracted_cotangents(
    model: ContractedModel,
    weights: Weights,
    directions: Weights,
    x: Input,
    cotangents: Tensor,
    chunks: Chunks,
) -> Tensor:
    r"""Compute :math:`V^T J(x)^T u` (B, n, K) of n cotangents u (B, n, L C) per input, layer by layer."""
    return contracted_features(model, weights, directions, x, chunks, cotangents)[0]


def _of_layers(
    model: ContractedModel, weights: Weights, directions: Weights, x: Input, *cotangents: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the features (B, n, K) of weights in layers that are known, and the outputs (B, L C)."""
    total: list[Tensor] = []
    small: list[tuple[Tensor, Tensor]] = []  # gradients of weights with few numbers, and directions

    def add(found: Tensor) -> None:
        total.append(found if not total else total.pop().add_(found))

    def contract(use: Use, g: Tensor) -> None:
        if use.slot in model.uncovered_slots:
            return
        v = directions[use.slot]
        if isinstance(use, Elementwise):
            found = use.gradients(g)
            small.append((found.reshape(*found.shape[:2], -1), v.reshape(len(v), -1)))
        else:
            add(use.features(g, v))

    f = model.visit(weights, x, cotangents[0] if cotangents else None, contract)
    if small:
        add(torch.cat([g for g, _ in small], -1) @ torch.cat([v for _, v in small], -1).T)
    n, rank = cotangents[0].shape[1] if cotangents else f.shape[1], len(next(iter(directions.values())))
    return total[0] if total else f.new_zeros(len(f), n, rank), f
