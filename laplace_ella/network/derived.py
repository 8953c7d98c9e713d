r"""Weights as the layers see them: what a model makes of its weights alone, computed once instead of at every call.

A forward pass makes tensors of weights before an input meets them: a normalisation is folded into a
convolution, a matrix is transposed, a parametrisation computes one. They do not depend on the input. A
:class:`DerivedModel` takes them as weights of its own, so that they, and the directions along which
they change with V, are computed once for a basis.

How a model comes from its weights to where inputs meet them is recorded, call by call, and every
later pass is compared with the record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..data.batches import Input, batch_size, each_cut, tensors
from .functional import FunctionalModel, Weights
from .memory import attempt
from .places import named, places_of
from .safety import LOCK

# Questions about a tensor that do not read its values.
QUESTIONS = frozenset(
    [
        Tensor.dim,
        Tensor.size,
        Tensor.numel,
        Tensor.stride,
        Tensor.is_contiguous,
        Tensor.is_floating_point,
        Tensor.__len__,
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "ndim", "dtype", "device", "requires_grad", "layout", "is_cuda", "is_leaf")
        ),
    ]
)
# Functions that repeat a tensor, for every input of a batch for instance.
REPEATING = frozenset(
    [Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to]
)
LOOKUPS = (F.embedding, torch.embedding)
# Functions of torch.nn.functional that are calls of their own; what others call is looked at instead.
WHOLE = frozenset(
    [F.layer_norm, F.group_norm, F.batch_norm, F.instance_norm, F.embedding, getattr(F, "rms_norm", None)]
)
# Entries of each tensor that are compared before what was derived is used again.
SAMPLED = 8
# Directions that are derived at a time.
AT_ONCE = 4
# Numbers of inputs to record with, of which one is taken that no tensor has as a length.
COUNTS = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


class DivergedError(Exception):
    """A forward pass that does not follow the one that was recorded."""


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor of the model, or one derived from them, in the arguments of a call."""

    name: str


@dataclass(frozen=True)
class Call:
    """A call that takes tensors of the model, or what was derived from them.

    Attributes
    ----------
    function : callable
    slots : tuple of str
        Names of these tensors, in the order of the arguments.
    kind : {"derive", "use", "other"}
        Whether it makes new ones of them alone, lets an input meet them, or does neither.
    arguments : (args, kwargs), optional
        Those of a call that derives, with slots in place of tensors of the model.
    made : tuple of str
        Names of the tensors that it makes.
    """

    function: Any
    slots: tuple[str, ...]
    kind: str
    arguments: Any = None
    made: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """The calls of a forward pass that take tensors of the model.

    Attributes
    ----------
    calls : tuple of Call
    sources : dict of str to frozenset of str
        The weights that each tensor was made from, those that directions exist for; none for a buffer.
    key : str
        Equal for records whose derived tensors are computed alike.
    """

    calls: tuple[Call, ...]
    sources: Mapping[str, frozenset[str]]
    key: str

    @property
    def derived(self) -> list[str]:
        """Names of tensors that inputs meet and that are derived from weights."""
        met = {s for c in self.calls if c.kind != "derive" for s in c.slots}
        return [s for c in self.calls for s in c.made if s in met and self.sources[s]]


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of nested lists, tuples and dicts."""
    if isinstance(value, dict):
        return {k: mapped(v, function) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        made = [mapped(v, function) for v in value]
        return made if isinstance(value, list) else tuple(made)
    return function(value)


def leaves_of(value: Any) -> Iterator[Any]:
    """Yield the leaves of nested lists, tuples and dicts."""
    if isinstance(value, dict):
        for v in value.values():
            yield from leaves_of(v)
    elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        for v in value:
            yield from leaves_of(v)
    else:
        yield value


@cache
def opened(function: Any) -> Any:
    """Return a function of ``torch.nn.functional`` such that modes see the calls in it, not itself; None for others.

    A mode that calls such a function again would be asked about it again, without end.
    """
    if not isinstance(function, FunctionType) or function.__module__ != F.__name__ or function in WHOLE:
        return None
    unasked = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _never
    )
    made = FunctionType(function.__code__, {**function.__globals__, **unasked}, function.__name__)
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return None if function.__closure__ else made


def _never(*_: Any) -> bool:
    return False


class _Recorder(TorchFunctionMode):
    """Records the calls that take tensors of the model."""

    def __init__(self, names: dict[int, str], weights: frozenset[str], x: Input) -> None:
        super().__init__()
        self.names, self.size = dict(names), batch_size(x)
        self.sources = {k: frozenset([k]) & weights for k in names.values()}
        self.entered = {id(t): t for t in tensors(x)}  # all that depends on the input; kept, so that ids stay
        self.kept: list[Tensor] = []
        self.calls: list[Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in QUESTIONS:
            return func(*args, **kwargs)
        taken = [t for t in leaves_of((args, kwargs)) if isinstance(t, Tensor)]
        slots = tuple(self.names[id(t)] for t in taken if id(t) in self.names)
        others = [t for t in taken if id(t) not in self.names]
        body = opened(func) if slots else None
        if body is not None:
            with self:
                return body(*args, **kwargs)
        if self._reorders(func, args):
            raise ValueError("inputs are put in an order that depends on them")
        out = func(*args, **kwargs)
        made = [t for t in leaves_of(out) if isinstance(t, Tensor)]
        fresh = [t for t in made if not any(t is s for s in taken)]
        meets = any(id(t) in self.entered or self._per_input(t) for t in others)
        if not slots or meets:
            if meets:
                written = [args[0]] if func is Tensor.__setitem__ else []
                self._enter([*made, *written, *(t._base for t in (*made, *written) if t._base is not None)])
            if slots:
                self.calls.append(Call(func, slots, "use" if self._of_weights(slots) else "other"))
            return out
        repeats = func in REPEATING and any(self._per_input(t) for t in made)
        if repeats:
            self._enter(made)
        if self._of_weights(slots) and (len(fresh) < len(made) or func is Tensor.__setitem__):
            raise ValueError("a weight is written into another tensor")
        if repeats or len(fresh) < len(made) or not made:
            kind = "use" if self._of_weights(slots) and (repeats or made) else "other"
            self.calls.append(Call(func, slots, kind))
            return out
        arguments = mapped((args, kwargs), self._kept_as)
        number = len(self.calls)
        new = tuple(f"{number}.{i}" for i in range(len(made)))
        for name, t in zip(new, made):
            self.names[id(t)] = name
            self.sources[name] = frozenset().union(*(self.sources[s] for s in slots))
            self.kept.append(t)
        self.calls.append(Call(func, slots, "derive", arguments, new))
        return out

    def _reorders(self, func: Any, args: Any) -> bool:
        """Tell whether a call takes inputs of the batch in an order that depends on them."""
        if func is not Tensor.__getitem__ and func not in (torch.index_select, Tensor.index_select):
            return False
        if not self._per_input(args[0]) or id(args[0]) not in self.entered:
            return False
        index = args[1] if func is Tensor.__getitem__ else args[-1]
        first = index[0] if isinstance(index, tuple) and index else index
        return isinstance(first, Tensor) and not first.is_floating_point() and id(first) in self.entered

    def _kept_as(self, value: Any) -> Any:
        """Return a slot for a tensor of the model, and a copy of another, which may be written to."""
        if id(value) in self.names:
            return Slot(self.names[id(value)])
        return value.detach().clone() if isinstance(value, Tensor) else value

    def _enter(self, found: list[Tensor]) -> None:
        self.entered.update((id(t), t) for t in found)

    def _per_input(self, t: Tensor) -> bool:
        return t.ndim > 0 and t.shape[0] == self.size

    def _of_weights(self, slots: tuple[str, ...]) -> bool:
        return any(self.sources[s] for s in slots)


def _key(calls: list[Call]) -> str:
    """Return a hash of how tensors are derived."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(str((value.dtype, value.shape)).encode())
            found.update(
                value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                if value.numel()
                else b""
            )
        else:
            found.update(repr(value).encode())

    for call in calls:
        if call.kind == "derive":
            found.update(repr((call.function, call.made)).encode())
            for leaf in leaves_of(call.arguments):
                add(leaf)
    return found.hexdigest()


def repeated(model: FunctionalModel, x: Input) -> Input:
    """Return a batch of ``x``'s first input over and over, as often as no tensor of the model is long."""
    of_model = (*model.module.parameters(), *model.module.buffers())
    lengths = {n for t in (*of_model, *tensors(x)) for n in t.shape}
    size = next((n for n in COUNTS if n not in lengths), COUNTS[-1])
    return each_cut(x, lambda t: torch.cat([t[:1]] * size))


def record(model: FunctionalModel, x: Input) -> Record:
    """Run a model on a batch of ``x``'s first input over and over, and record its calls; inside ``safely``.

    Raises
    ------
    Exception
        Whatever the model raises.
    """
    weights = model.weights()
    placed = model.placed(weights)
    x = repeated(model, x)

    def run(module: nn.Module) -> Record:
        recorder = _Recorder({id(t): k for k, t in placed.items()}, frozenset(weights), x)
        with recorder:
            model.called(module, placed, x)
        return Record(tuple(recorder.calls), recorder.sources, _key(recorder.calls))

    return model.within(placed, run)


class Follower(TorchFunctionMode):
    """Follows a record: hands out what is derived already, and shows calls where an input meets weights.

    Parameters
    ----------
    record : Record
    names : dict of int to str
        Names of the tensors that stand in the model's places, by their ids.
    derived : dict of Tensor
        What is derived already.
    use : callable, optional
        (number, call, names, args, kwargs) -> output, for calls of kind "use". By default, the function is called.
    """

    def __init__(
        self, record: Record, names: dict[int, str], derived: Weights, use: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.record, self.derived, self.use, self.position = record, derived, use, 0
        self.names = {**names, **{id(t): k for k, t in derived.items()}}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in QUESTIONS:
            return func(*args, **kwargs)
        names = self.names
        slots = named(names, (*args, *kwargs.values()) if kwargs else args)
        if not slots:
            return func(*args, **kwargs)
        body = opened(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        calls = self.record.calls
        call = calls[self.position] if self.position < len(calls) else None
        if (
            call is None
            or (call.function is not func and call.function != func)
            or call.slots != tuple(slots)
        ):
            raise DivergedError
        self.position += 1
        if call.kind == "derive":
            if not _same(call.arguments, (args, kwargs)):
                raise DivergedError
            return self._made(call)
        if call.kind == "use" and self.use is not None:
            return self.use(self.position - 1, call, names, args, kwargs)
        return func(*args, **kwargs)

    def _made(self, call: Call) -> Any:
        made = [self.derived[k] for k in call.made]
        return made[0] if len(made) == 1 else tuple(made)


def _same(recorded: Any, found: Any) -> bool:
    """Tell whether a call that derives has the arguments that were recorded, besides tensors of the model."""
    if isinstance(recorded, Slot):
        return True  # their names are compared
    if isinstance(recorded, dict):
        return recorded.keys() == found.keys() and all(_same(v, found[k]) for k, v in recorded.items())
    if isinstance(recorded, (list, tuple)):
        return len(recorded) == len(found) and all(map(_same, recorded, found))
    if isinstance(recorded, Tensor):
        return isinstance(found, Tensor) and torch.equal(recorded, found)
    return recorded is found or bool(recorded == found)


def derive(record: Record, placed: Weights) -> Weights:
    """Compute all tensors that are derived from those in the model's places."""
    found = dict(placed)
    for call in record.calls:
        if call.kind == "derive":
            args, kwargs = mapped(call.arguments, lambda v: found[v.name] if isinstance(v, Slot) else v)
            out = call.function(*args, **kwargs)
            found.update(zip(call.made, out if isinstance(out, (list, tuple)) else [out]))
    return {k: t for k, t in found.items() if k not in placed}


@dataclass(frozen=True)
class Stamp:
    """What tells tensors from others, and from what they are once they are written to.

    Attributes
    ----------
    places : tuple
        Addresses, and counts of writes.
    sample : Tensor
        Some entries of each: writes through ``.data``, as optimisers and moving averages do them, are counted by nobody.
    """

    places: tuple[Any, ...]
    sample: Tensor

    def same(self, other: Stamp) -> bool:
        """Tell whether the tensors are the same, with the same values as far as can be seen."""
        return self.places == other.places and torch.equal(self.sample, other.sample)


def stamp_of(tensors: Iterable[Tensor]) -> Stamp:
    """Return the stamp of tensors on one or several devices."""
    found = list(tensors)
    places = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in found)
    samples = [
        t.detach().reshape(-1)[:: max(1, t.numel() // SAMPLED)][:SAMPLED].double().cpu() for t in found
    ]
    return Stamp(places, torch.cat([s.nan_to_num(0.5) for s in samples]))


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
        super().__init__(model.module, model.names)
        self.model, self.record, self.in_pairs = model, record, model.in_pairs
        self._ready: tuple[Stamp, Weights] | None = None

    @property
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
        stamp = self._stamp()
        if self._ready is None or not stamp.same(self._ready[0]):
            weights = self.weights()
            self._ready = stamp, self.laid_out({**weights, **derive(self.record, self.placed(weights))})
        return self._ready[1]

    def _stamp(self) -> Stamp:
        with LOCK:
            own = places_of(self.module)
        return stamp_of([*own.parameters.values(), *own.buffers.values()])

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
        wanted, weights = self.record.derived, self.ready()
        if not wanted:
            return {}
        needed = frozenset().union(*(self.record.sources[k] for k in wanted))
        moving = {k: w for k, w in weights.items() if k in needed}

        def made(moved: Weights) -> Weights:
            own = {k: w for k, w in weights.items() if k in self.names}
            found = derive(self.record, self.placed({**own, **moved}))
            return {k: found[k] for k in wanted}

        rank = len(next(iter(directions.values())))
        parts = [
            along(made, moving, {k: directions[k][a : a + AT_ONCE] for k in moving})
            for a in range(0, rank, AT_ONCE)
        ]
        return {k: torch.cat([p[k] for p in parts]) for k in wanted}

    def prepared_bytes(self) -> int:
        """Return the bytes that one direction takes once more."""
        ready = self.ready()
        return sum(ready[k].numel() * ready[k].element_size() for k in self.record.derived)

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
        placed = self.placed(own)
        follower = Follower(self.record, {id(t): k for k, t in placed.items()}, derived, use)

        def run(module: nn.Module) -> Tensor:
            with follower:
                return self.model.called(module, placed, x, **model_kwargs)

        found = self.model.within(placed, run)
        if follower.position != len(self.record.calls):
            raise DivergedError
        return found
