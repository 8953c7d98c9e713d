r"""A forward pass as it was recorded: which calls take weights, which make others of them, and where inputs meet them.

Every later pass is compared with the record, call by call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..data.batches import Input, batch_size, each_cut, tensors
from .functional import FunctionalModel, Weights
from .layouts import Layout, layout_of
from .places import named

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
# Functions that take entries of a tensor along an axis, and these with others that take some of its rows.
ALONG = frozenset([torch.gather, Tensor.gather, torch.take_along_dim, Tensor.take_along_dim])
TAKING = ALONG | {Tensor.__getitem__, torch.index_select, Tensor.index_select}
# Functions of torch.nn.functional that are calls of their own; what others call is looked at instead.
WHOLE = frozenset(
    [F.layer_norm, F.group_norm, F.batch_norm, F.instance_norm, F.embedding, getattr(F, "rms_norm", None)]
)
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
    layouts : dict of int to Layout
        Where the inputs of a batch are in the output of a call of kind "use", by its number, where that is clear.
    """

    calls: tuple[Call, ...]
    sources: Mapping[str, frozenset[str]]
    key: str
    layouts: Mapping[int, Layout]

    def slot(self, names: Mapping[int, str], value: Any) -> str | None:
        """Return the name of a tensor that directions exist for, by its id; None for any other value."""
        name = names.get(id(value))
        return name if name is not None and self.sources[name] else None

    @cached_property
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
        self.layouts: dict[int, Layout] = {}

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
        self._require_order(func, args, kwargs)
        before = [t._version for t in taken]
        out = func(*args, **kwargs)
        made = [t for t in leaves_of(out) if isinstance(t, Tensor)]
        fresh = [t for t in made if not any(t is s for s in taken)]
        meets = any(id(t) in self.entered or self._per_input(t) for t in others)
        if not slots or meets:
            if meets:
                written = [args[0]] if func is Tensor.__setitem__ else []
                self._enter([*made, *written, *(t._base for t in (*made, *written) if t._base is not None)])
            if slots:
                self._met(func, slots, self._of_weights(slots), out)
            return out
        repeats = func in REPEATING and any(self._per_input(t) for t in made)
        if repeats:
            self._enter(made)
        if self._of_weights(slots) and any(t._version != n for t, n in zip(taken, before)):
            raise ValueError("a tensor is written to, of weights or with them")
        if repeats or len(fresh) < len(made) or not made:
            self._met(func, slots, repeats and self._of_weights(slots), out)
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

    def _met(self, func: Any, slots: tuple[str, ...], is_use: bool, out: Any) -> None:
        """Record a call that derives nothing."""
        layout = layout_of(out, self.size) if is_use and isinstance(out, Tensor) else None
        if layout is not None:
            self.layouts[len(self.calls)] = layout
        self.calls.append(Call(func, slots, "use" if is_use else "other"))

    def _require_order(self, func: Any, args: Any, kwargs: Any) -> None:
        """Require that a call does not take inputs of the batch in an order that depends on them."""
        if func not in TAKING or not args or not self._per_input(args[0]) or id(args[0]) not in self.entered:
            return
        more = (*args[1:], *kwargs.values())
        if func in ALONG and next((v for v in more if isinstance(v, int)), 0) % args[0].ndim:
            return  # entries of one input
        index = next((v for v in more if not isinstance(v, int)), None)
        first = index[0] if isinstance(index, tuple) and index else index
        if isinstance(first, Tensor) and not first.is_floating_point() and id(first) in self.entered:
            raise ValueError("inputs are put in an order that depends on them")

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
                value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
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
    x = repeated(model, x)

    def run(module: nn.Module, placed: Weights) -> Record:
        recorder = _Recorder({id(t): k for k, t in placed.items()}, frozenset(weights), x)
        with recorder:
            model.called(module, placed, x)
        return Record(tuple(recorder.calls), recorder.sources, _key(recorder.calls), recorder.layouts)

    return model.within(weights, run)


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
