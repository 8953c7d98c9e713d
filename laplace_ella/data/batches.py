r"""A batch of inputs: taking it apart, moving it, putting inputs of several batches together.

What users pass is *raw*: a tensor whose first axis is the batch, or a mapping (a Hugging Face
batch, say) of tensors, other objects, and lists, tuples and mappings of them. An :data:`Input` is a
tensor, or a :class:`Nested`, which says which of a container's tensors are cut along the batch;
:mod:`laplace_ella.network.cutting` finds that out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .checks import shown
from .hashing import digest

Raw = Tensor | Mapping[str, Any]
# The keys and indices that lead to an entry of nested containers.
Path = tuple[Any, ...]


@dataclass(frozen=True)
class Slot:
    """Takes the place of the i-th tensor that is cut along the batch."""

    index: int


@dataclass(frozen=True)
class Nested:
    """A container of which some tensors are cut along the batch, and all inputs share the rest.

    Attributes
    ----------
    cut : tuple of Tensor (B, ...)
        The tensors that are cut.
    paths : tuple of Path
        Where they stand in the container.
    template : container or Slot
        The container, with slots in their places; the slot itself, where the input is a tensor.
    picked : bool
        Whether the last of the tensors, (B, n), stands nowhere in the container: it says at which positions
        outputs are wanted; see :func:`at_positions`.
    """

    cut: tuple[Tensor, ...]
    paths: tuple[Path, ...]
    template: Any
    picked: bool = False

    def container(self) -> Any:
        """Return the user's container, made anew at every level: a model may write into it."""
        return rebuilt(self.template, lambda path, v: self.cut[v.index] if isinstance(v, Slot) else v)

    @property
    def positions(self) -> Tensor | None:
        """The positions (B, n) at which outputs are wanted; None: at all of them."""
        return self.cut[-1] if self.picked else None

    def shared(self) -> list[tuple[Path, Any]]:
        """Return the entries that all inputs share, with their paths."""
        return [(path, leaf) for path, leaf in leaves(self.template) if not isinstance(leaf, Slot)]


Input = Tensor | Nested


def nested(x: Any, paths: Sequence[Path]) -> Nested:
    """Say which tensors of a container are cut along the batch; its containers are copied."""
    found: dict[Path, Tensor] = {}

    def slot(path: Path, leaf: Any) -> Any:
        if path not in paths:
            return leaf
        found[path] = leaf
        return Slot(len(found) - 1)

    template = rebuilt(x, slot)
    return Nested(tuple(found.values()), tuple(found), template)


def at_positions(x: Input, positions: Tensor) -> Nested:
    """Return a batch of inputs of which only the outputs at some positions (B, n) are wanted, counted as they are flattened."""
    where: Path = ("positions of the outputs",)
    if isinstance(x, Tensor):
        return Nested((x, positions), ((), where), Slot(0), True)
    return replace(x, cut=(*x.cut, positions), paths=(*x.paths, where), picked=True)


def bare_tensor(x: Input) -> Tensor | None:
    """Return the tensor that a model is called with; None if that is a container."""
    if isinstance(x, Tensor):
        return x
    return x.cut[0] if isinstance(x.template, Slot) else None


def leaves(x: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the entries of nested containers that are none themselves, with their paths; of another value, itself."""
    if not is_container(x):
        yield path, x
        return
    for key, value in items(x):
        yield from leaves(value, (*path, key))


def items(x: Any) -> Iterable[tuple[Any, Any]]:
    """Return the entries of one container, with their keys or indices."""
    return x.items() if isinstance(x, Mapping) else enumerate(x)


def is_container(value: Any) -> bool:
    """Tell whether a value is a container whose tensors may be cut along the batch."""
    # The inputs of a packed sequence lie across its tensors.
    return isinstance(value, (Mapping, list, tuple)) and not isinstance(value, PackedSequence)


def rebuilt(x: Any, function: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """Copy nested containers, with what a function of (path, entry) returns in place of each entry.

    A container that the function returns as it is, is copied in turn.
    """
    if not is_container(x):
        return function(path, x)

    def copied_entry(here: Path, value: Any) -> Any:
        new = function(here, value)
        return rebuilt(new, function, here) if new is value and is_container(value) else new

    entries = {key: copied_entry((*path, key), value) for key, value in items(x)}
    return like(x, entries)


def like(x: Any, entries: dict[Any, Any]) -> Any:
    """Put entries, by their keys or indices, into a container of the type of ``x``, which models may rely on."""
    if isinstance(x, list):
        return list(entries.values())
    if isinstance(x, tuple):
        return type(x)(*entries.values()) if hasattr(x, "_fields") else tuple(entries.values())
    if type(x) is dict or not isinstance(x, MutableMapping):
        return entries
    new = copy(x)
    if not isinstance(x, dict):
        if not hasattr(new, "__dict__"):
            return entries
        # A copy may share the mapping that it wraps, which is the user's.
        wrapped = {k: copy(v) for k, v in vars(new).items() if isinstance(v, MutableMapping)}
        vars(new).update(wrapped)
    new.clear()
    new.update(entries)
    return new


def name_of(path: Path) -> str:
    """Write a path as it is indexed: ``'in'[0]``."""
    return repr(path[0]) + "".join(f"[{key!r}]" for key in path[1:])


def tensors(x: Raw | Input) -> list[Tensor]:
    """Return all tensors of an input, raw or not."""
    if isinstance(x, Nested):
        return [*x.cut, *(leaf for _, leaf in x.shared() if isinstance(leaf, Tensor))]
    return [leaf for _, leaf in leaves(x) if isinstance(leaf, Tensor)]


def raw_size(x: Raw, dict_key_x: str, expected: int | None = None) -> int:
    """Return how many inputs there are, as far as lengths tell.

    The size of a mapping is the length of the first tensor under ``dict_key_x``. Without such an entry
    it is ``expected`` where a tensor has that length, or else the length of the first tensor.

    Raises
    ------
    ValueError
        If a mapping holds no tensor with an axis.
    """
    if isinstance(x, Tensor):
        return x.shape[0] if x.ndim else 0
    entries = {dict_key_x: x[dict_key_x]} if dict_key_x in x else x
    lengths = [len(t) for t in tensors(entries) if t.ndim] or [len(t) for t in tensors(x) if t.ndim]
    if not lengths:
        raise ValueError(
            "A mapping input must hold a tensor whose first axis is the batch; "
            f"got the keys {sorted(map(str, x))} without one."
        )
    return expected if dict_key_x not in x and expected in lengths else lengths[0]


# ---------------------------------------------------------------------- checks


def check_tensors(x: Raw, what: str) -> None:
    """Require tensors that can be cut along their first axis.

    Raises
    ------
    ValueError
        If an entry is sparse, nested or a packed sequence; the message names it.
    """
    for path, leaf in leaves(x):
        where = f" under {name_of(path)}" if path else ""
        if isinstance(leaf, PackedSequence):
            raise ValueError(
                f"{what} hold a packed sequence{where}, which cannot be cut along the batch. Pass the padded "
                "tensor and a tensor of lengths, and pack them inside the model."
            )
        if isinstance(leaf, Tensor) and (leaf.layout != torch.strided or leaf.is_nested):
            kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
            shape = f"({leaf.size(0)}, ...)" if leaf.is_nested else tuple(leaf.shape)
            raise ValueError(
                f"{what} must be dense tensors; got a {kind} tensor of shape {shape}{where}. Convert it in the "
                "collate function, with to_dense() or to_padded_tensor()."
            )


def check_finite(x: Raw | Input, what: str) -> None:
    """Require tensors that can be cut along their first axis, without NaN or infinity."""
    if not isinstance(x, Nested):
        check_tensors(x, what)
    floating = (t for t in tensors(x) if t.is_floating_point() or t.is_complex())
    if not all(bool(t.isfinite().all()) for t in floating):
        raise ValueError(
            f"{what} hold NaN or infinite values; they must be finite. Clean or drop them first."
        )


def check_finite_input(x: Raw | Input) -> None:
    """Require an input of a prediction: a tensor with a batch axis or a mapping, without NaN or infinity."""
    if not isinstance(x, (Tensor, Mapping, Nested)) or (isinstance(x, Tensor) and not x.ndim):
        raise ValueError(
            f"x must be a tensor whose first axis is the batch, or a mapping of tensors; got {shown(x)}."
        )
    check_finite(x, "The inputs")


class NamingShape:
    """Adds the shapes of the inputs to an error of the model, as torch only speaks of some product inside."""

    # This is no generator, as the end of one may swallow an interrupt.
    def __init__(self, x: Raw | Input) -> None:
        self.x = x

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, Exception) or not hasattr(error, "add_note"):  # Python 3.10 has no notes
            return
        x = self.x.container() if isinstance(self.x, Nested) else self.x
        entries = [(name_of(p), v) for p, v in leaves(x)] if isinstance(x, Mapping) else [("x", x)]
        shapes = [f"{name} of shape {tuple(v.shape)}" for name, v in entries if isinstance(v, Tensor)]
        note = f"The inputs were {', '.join(shapes) or shown(x)}."
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


# ---------------------------------------------------------------------- one batch


def batch_size(x: Input) -> int:
    """Return the length of the batch axis."""
    if isinstance(x, Nested):
        return x.cut[0].shape[0] if x.cut else 0
    return x.shape[0] if x.ndim else 0


def each_cut(x: Input, function: Callable[[Tensor], Tensor]) -> Input:
    """Apply a function to the tensors of a batch that are cut."""
    return replace(x, cut=tuple(map(function, x.cut))) if isinstance(x, Nested) else function(x)


def each(x: Input, function: Callable[[Tensor], Tensor]) -> Input:
    """Apply a function to all tensors of a batch."""
    if isinstance(x, Tensor):
        return function(x)
    template = rebuilt(x.template, lambda path, v: function(v) if isinstance(v, Tensor) else v)
    return replace(x, cut=tuple(map(function, x.cut)), template=template)


def moved(x: Input, device: torch.device, dtype: torch.dtype | None = None) -> Input:
    """Move a batch to a device; floating point to ``dtype``, if one is given.

    Tensors made under ``torch.inference_mode`` are cloned, as forward-mode AD
    cannot use them.
    """

    def move(t: Tensor) -> Tensor:
        # This waits for the copy, as a loader may fill its buffer again at once.
        t = t.to(device, dtype if t.is_floating_point() else None)
        return t.clone() if t.is_inference() else t

    return each(x, move)


def detached(x: Input) -> Input:
    """Detach all tensors of a batch from the graph that led to them."""
    return each(x, Tensor.detach)


def inputs_between(x: Input, start: int, stop: int) -> Input:
    """Slice the batch axis."""
    return each_cut(x, lambda t: t[start:stop])


def doubled(x: Input) -> Input:
    """Repeat all inputs once."""
    return each_cut(x, lambda t: torch.cat([t, t]))


def in_slices(x: Input, bounded: Callable[[Input], Iterable[Input]]) -> Iterator[tuple[slice, Input]]:
    """Cut a batch by a function that returns its parts in order; yield which inputs they are, and the parts."""
    start = 0
    for part in bounded(x):
        stop = start + batch_size(part)
        yield slice(start, stop), part
        start = stop


def copied(x: Input) -> Input:
    """Copy all tensors, so that what they are copied from can be freed, or filled again by its loader."""
    return each(x, lambda t: t.detach().clone())


def single_input(x: Input, index: int) -> Input:
    """Copy one input out of a batch."""
    return copied(inputs_between(x, index, index + 1))


def n_bytes(x: Input) -> int:
    """Return the bytes of all tensors of an input."""
    return sum(t.numel() * t.element_size() for t in tensors(x))


def input_digest(x: Raw | Input) -> str:
    """Return a hash of all tensors and plain values of an input, raw or not."""
    if isinstance(x, Tensor):
        return digest(x)
    whole = x.container() if isinstance(x, Nested) else x
    return digest(*(part for path, leaf in leaves(whole) for part in (name_of(path), leaf)))


def signature(x: Input) -> Any:
    """Return what batches have in common whose inputs have the same shapes and dtypes, in the same places."""
    if isinstance(x, Tensor):
        return (x.shape[1:], x.dtype)
    cut = tuple((path, t.shape[1:], t.dtype) for path, t in zip(x.paths, x.cut))
    return cut, tuple((path, t.shape, t.dtype) for path, t in x.shared() if isinstance(t, Tensor))


# ---------------------------------------------------------------------- inputs of several batches


def collate(inputs: Sequence[Input], batch: int) -> Iterator[tuple[list[int], Input]]:
    """Join single inputs into batches of at most ``batch`` inputs of equal shape.

    Yields
    ------
    indices, x : list of int, Input
        Which of ``inputs`` are in the batch ``x``. Inputs of different shapes
        (sequences padded batch by batch) never meet in one batch.
    """
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(inputs):
        # Inputs may only meet where what their batches share is the same.
        shared = [] if isinstance(x, Tensor) else x.shared()
        values = tuple((path, _value(leaf)) for path, leaf in shared)
        groups.setdefault((signature(x), values), []).append(i)
    for indices in groups.values():
        for start in range(0, len(indices), batch):
            part = indices[start : start + batch]
            yield part, _join([inputs[i] for i in part])


def is_plain(value: Any) -> bool:
    """Tell whether a value is a tensor, or of a type that checkpoints and other processes take."""
    return isinstance(value, Tensor) or type(value) in (str, bytes, bool, int, float, type(None))


def _value(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return digest(leaf)
    return leaf if is_plain(leaf) else id(leaf)


def _join(inputs: Sequence[Input]) -> Input:
    first = inputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(inputs))  # type: ignore[arg-type]
    columns = zip(*(x.cut for x in inputs))  # type: ignore[union-attr]
    return replace(first, cut=tuple(torch.cat(column) for column in columns))
