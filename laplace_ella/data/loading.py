r"""What a loader yields: inputs and targets of a batch, told apart and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .batches import Input, Raw, check_tensors, is_finite, raw_size

# (inputs as the loader has them, how many there are) -> inputs that can be cut into rows.
Prepare = Callable[[Raw, "int | None"], Input]


def split_batch(batch: Any, dict_key_x: str, dict_key_y: str) -> tuple[Raw, Tensor]:
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
    size = raw_size(x, dict_key_x, y.shape[0] if y.ndim else None)
    if y.ndim == 0 or size != y.shape[0]:
        raise ValueError(
            f"Inputs and targets of a batch must have the same length; got {size} inputs "
            f"and targets of shape {tuple(y.shape)}."
        )
    return x, y


def _describe(batch: Any) -> str:
    size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    return f"{type(batch).__name__}{size}"


def named_batches(
    loader: Iterable[Any], dict_key_x: str, dict_key_y: str, prepare: Prepare
) -> Iterator[tuple[str, Input, Tensor]]:
    """Yield ``(name, inputs, targets)`` of each batch, with finite inputs.

    The name ("batch 3") is for error messages.

    Raises
    ------
    ValueError
        If a batch has the wrong structure, or its inputs are not finite or cannot be cut into rows.
    """
    for i, batch in enumerate(loader):
        x, y = split_batch(batch, dict_key_x, dict_key_y)
        if len(y) == 0:
            continue
        _check(x, f"The inputs of batch {i}", " Clean or drop them before fitting.")
        yield f"batch {i}", prepare(x, len(y)), y


def named_inputs(loader: Iterable[Any], dict_key_x: str, prepare: Prepare) -> Iterator[tuple[str, Input]]:
    """Yield ``(name, inputs)`` of each batch, which may be inputs alone, a sequence that starts with them, or a mapping.

    Raises
    ------
    ValueError
        If a batch holds no inputs, or they are not finite or cannot be cut into rows.
    """
    for i, batch in enumerate(loader):
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, (Tensor, Mapping)):
            raise ValueError(
                f"Batch {i} must be inputs, a pair (inputs, targets) or a mapping; got {_describe(batch)}."
            )
        _check(x, f"The inputs of batch {i}")
        if raw_size(x, dict_key_x):
            yield f"batch {i}", prepare(x, None)


def _check(x: Raw, what: str, remedy: str = "") -> None:
    check_tensors(x, what)
    if not is_finite(x):
        raise ValueError(f"{what} hold NaN or infinite values; every input must be finite.{remedy}")
