r"""Batches of model inputs: taking them apart, moving them, putting rows together.

An *input* is what the model takes: a tensor whose first axis is the batch, or a
mapping (a Hugging Face batch, say) some of whose entries are such tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from copy import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

Input = Tensor | Mapping[str, Any]


def split_batch(batch: Any, dict_key_x: str, dict_key_y: str) -> tuple[Input, Tensor]:
    """Separate the model's input from the targets of one batch of a loader.

    A mapping batch is passed to the model whole, as laplace-torch does.

    Raises
    ------
    KeyError
        If a mapping batch has no entry ``dict_key_y``.
    ValueError
        If the batch is neither a mapping nor a pair ``(inputs, targets)`` of an
        input and a tensor.
    """
    if isinstance(batch, Mapping):
        if dict_key_y not in batch:
            raise KeyError(
                f"The batch has no targets under {dict_key_y!r}; its keys are {sorted(map(str, batch))}. "
                "Pass dict_key_y=... to the constructor."
            )
        x, y = batch, batch[dict_key_y]
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        x, y = batch
    else:
        raise ValueError(
            "A batch must be a pair (inputs, targets) or a mapping that holds both; "
            f"got {_describe(batch)}. Wrap the loader so that it yields one of the two."
        )
    if not isinstance(x, (Tensor, Mapping)) or not isinstance(y, Tensor):
        raise ValueError(
            "Inputs must be a tensor or a mapping, and targets a tensor; got "
            f"{type(x).__name__} and {type(y).__name__}. Convert them in the data set or the collate function."
        )
    inputs = key_first(x, dict_key_x)
    if y.ndim == 0 or batch_size(inputs) != y.shape[0]:
        raise ValueError(
            f"Inputs and targets of a batch must have the same length; got {batch_size(inputs)} inputs "
            f"and targets of shape {tuple(y.shape)}."
        )
    return inputs, y


def _describe(batch: Any) -> str:
    size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    return f"{type(batch).__name__}{size}"


def key_first(x: Input, dict_key_x: str) -> Input:
    """Put the entry that decides the batch axis first, if a mapping has it."""
    if not isinstance(x, Mapping) or dict_key_x not in x:
        return x
    return like(x, {dict_key_x: x[dict_key_x], **x})


def like(x: Mapping[str, Any], entries: dict[str, Any]) -> Mapping[str, Any]:
    """Put entries into a mapping of the type of ``x``, which models may rely on."""
    if type(x) is dict or not isinstance(x, MutableMapping):
        return entries
    new = copy(x)
    new.clear()
    new.update(entries)
    return new


def batch_size(x: Input) -> int:
    """Return the length of the batch axis; of a mapping, that of its first tensor."""
    if isinstance(x, Tensor):
        return x.shape[0] if x.ndim else 0
    for value in x.values():
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]
    raise ValueError(
        "A mapping input must hold a tensor whose first axis is the batch; "
        f"got the keys {sorted(map(str, x))} without one."
    )


def to_model(x: Input, device: torch.device, dtype: torch.dtype) -> Input:
    """Move an input to the model's device; floating point goes to the model's dtype.

    Tensors made under ``torch.inference_mode`` are cloned, as forward-mode AD
    cannot use them.
    """
    if isinstance(x, Mapping):
        moved = {k: to_model(v, device, dtype) if isinstance(v, Tensor) else v for k, v in x.items()}
        return like(x, moved)
    if not isinstance(x, Tensor):
        raise ValueError(
            f"The model's input must be a tensor or a mapping of tensors; got {type(x).__name__}."
        )
    # Not waiting for a copy is safe towards the GPU only.
    x = x.to(device, dtype if x.is_floating_point() else None, non_blocking=device.type == "cuda")
    return x.clone() if x.is_inference() else x


def detached(x: Input) -> Input:
    """Cut an input from the graph that led to it."""
    if isinstance(x, Tensor):
        return x.detach()
    return like(x, {k: v.detach() if isinstance(v, Tensor) else v for k, v in x.items()})


def is_finite(x: Input) -> bool:
    """Tell whether no floating-point entry of an input is NaN or infinite."""
    values = x.values() if isinstance(x, Mapping) else [x]
    return all(bool(v.isfinite().all()) for v in values if isinstance(v, Tensor) and v.is_floating_point())


def rows(x: Input, start: int, stop: int) -> Input:
    """Slice the batch axis; entries of a mapping without that axis are kept whole."""
    if isinstance(x, Tensor):
        return x[start:stop]
    size = batch_size(x)
    return like(x, {k: v[start:stop] if _has_batch_axis(v, size) else v for k, v in x.items()})


def in_slices(x: Input, bounded: Callable[[Input], Iterable[Input]]) -> Iterator[tuple[slice, Input]]:
    """Cut a batch by a function that returns its parts in order; yield which rows they are, and the parts."""
    start = 0
    for part in bounded(x):
        stop = start + batch_size(part)
        yield slice(start, stop), part
        start = stop


def single_row(x: Input, index: int) -> Input:
    """Copy one row out of a batch, so that the batch itself can be freed."""
    row = rows(x, index, index + 1)
    if isinstance(row, Tensor):
        return row.detach().clone()
    return like(row, {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in row.items()})


def packed(x: Input) -> Any:
    """Return an input as tensors and plain types, on the CPU, cut from graphs and larger storages.

    Raises
    ------
    ValueError
        If a mapping holds anything else.
    """
    if isinstance(x, Tensor):
        return _own(x)
    foreign = [k for k, v in x.items() if not _is_plain(v)]
    if foreign:
        raise ValueError(
            f"The inputs hold objects other than tensors and plain Python types under {foreign}, which can neither be sent "
            "to other processes nor kept in a checkpoint. Convert them in the data set."
        )
    return {k: _own(v) if isinstance(v, Tensor) else v for k, v in x.items()}


def _own(tensor: Tensor) -> Tensor:
    moved = tensor.detach().cpu()
    return (
        moved if moved.untyped_storage().nbytes() == moved.numel() * moved.element_size() else moved.clone()
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(map(_is_plain, chain(value.keys(), value.values())))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, Tensor) or type(value) in (str, bytes, bool, int, float, type(None))


def unpacked(entries: Any, example: Input | None) -> Input:
    """Give back to packed entries the type of mapping, and the devices, that an example has."""
    if isinstance(example, Mapping) and isinstance(entries, dict):
        return like(example, {k: _beside(v, example.get(k)) for k, v in entries.items()})
    return _beside(entries, example)


def _beside(value: Any, example: Any) -> Any:
    both = isinstance(value, Tensor) and isinstance(example, Tensor)
    return value.to(example.device) if both else value


def _has_batch_axis(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size


def collate(inputs: Sequence[Input], batch: int) -> Iterator[tuple[list[int], Input]]:
    """Join single rows into batches of at most ``batch`` rows of equal shape.

    Yields
    ------
    indices, x : list of int, input
        Which of ``inputs`` the rows of ``x`` are. Inputs of different shapes
        (sequences padded batch by batch) never meet in one batch.
    """
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(inputs):
        groups.setdefault(_signature(x), []).append(i)
    for indices in groups.values():
        for start in range(0, len(indices), batch):
            part = indices[start : start + batch]
            yield part, _join([inputs[i] for i in part])


def _signature(x: Input) -> Any:
    if isinstance(x, Tensor):
        return (x.shape[1:], x.dtype)
    return tuple((k, _entry_signature(v)) for k, v in x.items())


def _entry_signature(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return id(value)
    if _has_batch_axis(value, 1):
        return (value.shape[1:], value.dtype)
    # Shared by its whole batch: rows may only meet where it is the same.
    return (value.shape, value.dtype, hash(tuple(value.flatten().tolist())))


def _join(inputs: Sequence[Input]) -> Input:
    first = inputs[0]
    if isinstance(first, Tensor):
        return torch.cat(list(inputs))  # type: ignore[arg-type]
    joined = {
        k: torch.cat([x[k] for x in inputs]) if _has_batch_axis(v, 1) else v  # type: ignore[index]
        for k, v in first.items()
    }
    return like(first, joined)


def named_batches(
    loader: Iterable[Any], dict_key_x: str, dict_key_y: str
) -> Iterator[tuple[str, Input, Tensor]]:
    """Yield ``(name, inputs, targets)`` of each batch, with finite inputs.

    The name ("batch 3") is for error messages.

    Raises
    ------
    ValueError
        If a batch has the wrong structure, or its inputs are not finite.
    """
    for i, batch in enumerate(loader):
        x, y = split_batch(batch, dict_key_x, dict_key_y)
        if batch_size(x) == 0:
            continue
        if not is_finite(x):
            raise ValueError(
                f"The inputs of batch {i} hold NaN or infinite values; every input must be finite. "
                "Clean or drop them before fitting."
            )
        yield f"batch {i}", x, y


def named_inputs(loader: Iterable[Any], dict_key_x: str) -> Iterator[tuple[str, Input]]:
    """Yield ``(name, inputs)`` of each batch, which may be inputs alone, a sequence that starts with them, or a mapping.

    Raises
    ------
    ValueError
        If a batch holds no inputs, or they are not finite.
    """
    for i, batch in enumerate(loader):
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, (Tensor, Mapping)):
            raise ValueError(
                f"Batch {i} must be inputs, a pair (inputs, targets) or a mapping; got {_describe(batch)}."
            )
        if not is_finite(x):
            raise ValueError(
                f"The inputs of batch {i} hold NaN or infinite values; every input must be finite."
            )
        if batch_size(x):
            yield f"batch {i}", key_first(x, dict_key_x)
