r"""Weights as the layers see them: what a model makes of its weights alone, computed once instead of at every call.

A forward pass makes tensors of weights before an input meets them: a normalisation is folded into a
convolution, a matrix is transposed, a parametrisation computes one. They do not depend on the input. A
:class:`DerivedModel` takes them as weights of its own, so that they, and the directions along which
they change with V, are computed once for a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from ..data.batches import Input
from .calls import DivergedError, Follower, Record, derive
from .functional import FunctionalModel, Weights, is_dense
from .memory import attempt
from .safety import LOCK

# Entries of each tensor that are compared before what was derived is used again.
SAMPLED = 8
# Directions that are derived at a time.
AT_ONCE = 4


@dataclass(frozen=True)
class Stamp:
    """What tells tensors from others, and from what they are once they are written to.

    Attributes
    ----------
    places : tuple
        The name, the address, the shape and the strides of each tensor.
    read : tuple of str
        Those that others are made of.
    writes : tuple of int
        How often these were written to.
    views : list of list of Tensor
        Some of their entries, in lists of views that are alike. Writes through ``.data``, as optimisers and moving
        averages do them, are counted by nobody.
    samples : list of Tensor
        What these entries were, a tensor for each list.
    """

    places: list[Any]
    read: tuple[str, ...]
    writes: tuple[int, ...]
    views: list[list[Tensor]]
    samples: list[Tensor]

    def same(self, other: Stamp) -> bool:
        """Tell whether the tensors are the same, with the same values as far as can be seen."""
        return (
            self.places == other.places
            and self.writes == other.writes
            and all(map(torch.equal, self.samples, other.samples))
        )


def stamp_of(tensors: Weights, sources: Collection[str], before: Stamp | None = None) -> Stamp:
    """Return the stamp of tensors on one or several devices; of the same as ``before``, it is found faster.

    ``sources`` are the names of those that others are made of. Copies are made of tensors that do not fill their memory.
    """
    places = [(k, t.data_ptr(), t.shape, t.stride()) for k, t in tensors.items()]
    if before and before.places == places:
        read, views = before.read, before.views
    else:
        read = tuple(k for k, t in tensors.items() if k in sources or not is_dense(t))
        views = _alike([_some_entries(tensors[k]) for k in read])
    writes = writes_of(map(tensors.__getitem__, read))
    # Bytes are compared, as NaN equals nothing.
    samples = [torch.cat(some).view(torch.uint8) for some in views]
    return Stamp(places, read, writes, views, samples)


def _alike(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Group tensors such that torch.cat joins each group at a fifth of its time: with the same strides in it."""
    found: dict[Any, list[Tensor]] = {}
    for t in tensors:
        found.setdefault((t.device, t.dtype, t.shape, t.stride()), []).append(t)
    return list(found.values())


def writes_of(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return how often tensors were written to: 0 of those made in inference mode, where nobody counts."""
    return tuple(0 if t.is_inference() else t._version for t in tensors)


def _some_entries(t: Tensor) -> Tensor:
    """Return a view of a few entries of a tensor: of all of it, or of its longest axis if it does not fill its memory."""
    t = t.detach()
    if is_dense(t):
        line = t.as_strided((t.numel(),), (1,))
    else:
        longest = max(range(t.ndim), key=lambda axis: t.shape[axis])
        line = t.movedim(longest, -1)[(0,) * (t.ndim - 1)]
    return line[:: max(1, len(line) // SAMPLED)][:SAMPLED]


def along(function: Callable[[Weights], Weights], weights: Weights, directions: Weights) -> Weights:
    """Return the derivatives (K, ...) of a function of weights along directions (K, *shape)."""

    def push(tangent: Weights) -> Weights:
        return jvp(function, (weights,), (tangent,))[1]

    found, _ = attempt(lambda: vmap(push)(directions))
    if found is not None:
        return found
    # Without forward mode: the gradient of <u, J v> = <J^T u, v> with respect to u.
    made, pull, *_ = vjp(function, weights)

    def pushed(tangent: Weights) -> Weights:
        zeros = {k: torch.zeros_like(t) for k, t in made.items()}
        return vjp(lambda u: pull(u)[0], zeros)[1](tangent)[0]

    count = len(next(iter(directions.values())))
    rows = [pushed({k: v[i] for k, v in directions.items()}) for i in range(count)]
    return {k: torch.stack([r[k] for r in rows]) for k in made}


class DerivedModel(FunctionalModel):
    """A model as a function of what is derived from its weights; these come along, for passes that take another way.

    Parameters
    ----------
    model : FunctionalModel
        Possibly rewritten for forward mode.
    record : Record
    """

    def __init__(self, model: FunctionalModel, record: Record) -> None:
        super().__init__(model.module, model.names, model.channel_axis, model.calling)
        self.model, self.record, self.in_pairs, self.tree = model, record, model.in_pairs, model.tree
        self._ready: tuple[Stamp, Weights] | None = None

    @cached_property
    def met(self) -> frozenset[str]:
        """The weights, and what is derived from them, that inputs meet."""
        slots = {s for call in self.record.calls if call.kind != "derive" for s in call.slots}
        return frozenset(s for s in slots if self.record.sources[s])

    def parts(self, weights: Weights) -> tuple[Weights, Weights]:
        """Tell the model's own weights from those that are derived."""
        own = {k: w for k, w in weights.items() if k in self.names}
        return own, {k: w for k, w in weights.items() if k not in self.names}

    def ready(self) -> Weights:
        """Return the model's weights, and all that is derived from them: computed once for as long as nothing is written."""
        with LOCK:
            own = self.tree.places()
        before = None if self._ready is None else self._ready[0]
        stamp = stamp_of({**own.parameters, **own.buffers}, self._sources, before)
        if self._ready is None or not stamp.same(self._ready[0]):
            weights = self.weights()
            self._ready = stamp, self.laid_out({**weights, **derive(self.record, self.placed(weights))})
        return self._ready[1]

    @cached_property
    def _sources(self) -> frozenset[str]:
        """Names of tensors that others are made of, or that are laid out anew."""
        slots = {s for call in self.record.calls if call.kind == "derive" for s in call.slots}
        return frozenset(slots.union(self.prepared_names))

    @property
    def stamp(self) -> Stamp:
        """What the tensors were that :meth:`ready` was made of."""
        assert self._ready is not None
        return self._ready[0]

    def laid_out(self, ready: Weights) -> Weights:
        """Return weights in the order in which calls want them."""
        return ready

    def forget(self) -> None:
        """Derive anew at the next call."""
        self._ready = None

    def prepared(self, directions: Weights) -> Weights:
        """Return what directions (K, *shape) are for the derived tensors that inputs meet, by name.

        Cost: three passes over K times the derived tensors, a few directions at a time.
        """
        wanted = self.record.derived
        if not wanted:
            return {}
        made, moving = self._deriving(wanted)
        rank = len(next(iter(directions.values())))
        parts = [
            along(made, moving, {k: directions[k][a : a + AT_ONCE] for k in moving})
            for a in range(0, rank, AT_ONCE)
        ]
        return {k: torch.cat([p[k] for p in parts]) for k in wanted}

    def _deriving(self, wanted: Collection[str]) -> tuple[Callable[[Weights], Weights], Weights]:
        """Return the function that derives some tensors, and the weights that it takes."""
        weights = self.ready()
        needed = frozenset().union(*(self.record.sources[k] for k in wanted))

        def made(moved: Weights) -> Weights:
            own = {k: w for k, w in weights.items() if k in self.names}
            found = derive(self.record, self.placed({**own, **moved}))
            return {k: found[k] for k in wanted}

        return made, {k: w for k, w in weights.items() if k in needed}

    @cached_property
    def sources_of_derived(self) -> frozenset[str]:
        """The weights that enter through tensors derived from them, possibly beside other ways."""
        return frozenset().union(*(self.record.sources[k] for k in self.record.derived))

    def pulled_back(self, gradients: Weights) -> Weights:
        """Return the gradients (B, n, *shape) of weights, of gradients of weights and of tensors derived from them."""
        own, derived = self.parts(gradients)
        if not derived:
            return own
        made, moving = self._deriving(derived)
        pull = vjp(made, moving)[1]
        found = vmap(vmap(lambda g: pull(g)[0]))(derived)
        return {**own, **{k: g + own[k] if k in own else g for k, g in found.items()}}

    @property
    def prepared_names(self) -> Collection[str]:
        """Names of the tensors for which directions are prepared."""
        return self.record.derived

    @cached_property
    def direction_bytes(self) -> int:
        """The bytes of what is prepared of one direction."""
        ready = self.ready()
        return sum(ready[k].numel() * ready[k].element_size() for k in self.prepared_names)

    def outputs(self, weights: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, ..., C) at ``weights``, of which some may be derived.

        Raises
        ------
        DivergedError
            If all are, and the pass does not follow the record.
        """
        own, derived = self.parts(weights)
        if len(derived) < sum(len(c.made) for c in self.record.calls):
            return self.model.outputs(own, x, **model_kwargs)
        return self.followed(own, derived, x, None, **model_kwargs)

    def followed(
        self, own: Weights, derived: Weights, x: Input, use: Callable[..., Any] | None, **model_kwargs: Any
    ) -> Tensor:
        """Return the outputs (B, ..., C) of a pass that follows the record.

        Raises
        ------
        DivergedError
            If it does not.
        """

        def run(module: nn.Module, placed: Weights) -> Tensor:
            follower = Follower(self.record, {id(t): k for k, t in placed.items()}, derived, use)
            with follower:
                found = self.model.called(module, placed, x, **model_kwargs)
            if follower.position != len(self.record.calls):
                raise DivergedError
            return found

        return self.model.within(own, run)
