r"""Reading loaders: their batches are separated into inputs and targets, and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .batches import Input, Raw, check_finite, raw_size
from .checks import shown

# (inputs as the loader has them, how many there are) -> inputs that can be cut along the batch.
Prepare = Callable[[Raw, "int | None"], Input]
# What gives a loader, of what others pass around in its place: data modules, trainers.
LOADERS = ("train_dataloader", "val_dataloader", "get_train_dataloader", "get_eval_dataloader")


def check_loader(name: str, loader: Any) -> None:
    """Require an iterable that may yield batches, without asking it for one."""
    kind = type(loader)
    iterable = hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")
    if not iterable or isinstance(loader, (str, bytes, Mapping, Tensor, type)):
        own = [k for k in LOADERS if callable(getattr(loader, k, None))]
        instead = (
            f"Pass one of its own: {' or '.join(f'{k}()' for k in own)}"
            if own
            else "A single batch goes into a list"
        )
        raise ValueError(
            f"{name} must be an iterable of batches, a DataLoader for instance; got {shown(loader)}. {instead}."
        )


def check_some(n: int, loader: str) -> None:
    """Require at least one input."""
    if not n:
        raise ValueError(
            f"The {loader} yielded no data; at least one input is needed, with a target that is not ignored (-100). A generator "
            "that was read before is empty: pass a fresh one."
        )


def check_total(n_total: int | None, n_read: int) -> None:
    """Require a total number of inputs that is no less than the number of those read."""
    if n_total is not None and n_total < n_read:
        raise ValueError(
            f"n_total must be at least the number of inputs read, {n_read}; got {n_total}. It is the size of the data "
            "that the loader shows a sample of."
        )


def split_batch(batch: Any, dict_key_x: str, dict_key_y: str) -> tuple[Raw, Tensor, Tensor | None]:
    """Separate the model's input from the targets of one batch of a loader, and from their weights if there are any.

    A mapping batch is passed to the model whole, as laplace-torch does; it has no weights.

    Raises
    ------
    KeyError
        If a mapping batch has no entry ``dict_key_y``.
    ValueError
        If the batch is neither a mapping nor a pair ``(inputs, targets)`` of an
        input and a tensor, nor these two and weights.
    """
    weights = None
    if isinstance(batch, Mapping):
        if dict_key_y not in batch:
            raise KeyError(
                f"The batch has no targets under {dict_key_y!r}; its keys are {sorted(map(str, batch))}. "
                "Pass dict_key_y=... to the constructor."
            )
        x, y = batch, batch[dict_key_y]
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) in (2, 3):
        x, y, *more = batch
        weights = more[0] if more else None
    else:
        raise ValueError(
            "A batch must be a pair (inputs, targets), with weights (inputs, targets, weights), or a mapping that holds "
            f"inputs and targets; got {_describe(batch)}. Wrap the loader so that it yields one of the two."
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
    if len(batch) == 3 and not isinstance(batch, Mapping):
        _check_weights(weights, len(y))
    return x, y, weights


def _check_weights(weights: Any, size: int) -> None:
    """Require weights, which nothing else that may stand third in a batch looks like."""
    if not isinstance(weights, Tensor) or not weights.is_floating_point() or weights.shape[:1] != (size,):
        raise ValueError(
            f"The third entry of a batch must be the weights of its {size} inputs, a floating-point tensor with one for each; "
            f"got {shown(weights)}. Anything else that the model takes goes into a mapping with the inputs."
        )
    bad = ~(weights.isfinite() & (weights >= 0))
    if bad.any():
        raise ValueError(f"Weights must be finite and at least 0; got {float(weights[bad][0]):.6g}.")


def _describe(batch: Any) -> str:
    size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    return f"{type(batch).__name__}{size}"


def named_batches(
    loader: Iterable[Any], dict_key_x: str, dict_key_y: str, prepare: Prepare
) -> Iterator[tuple[str, Input, Tensor, Tensor | None]]:
    """Yield ``(name, inputs, targets, weights or None)`` of each batch that is not empty.

    The name ("batch 3") is for error messages.

    Raises
    ------
    ValueError
        If a batch has the wrong structure, or its inputs are not finite or cannot be cut.
    """
    for i, batch in enumerate(loader):
        x, y, weights = split_batch(batch, dict_key_x, dict_key_y)
        if len(y):
            check_finite(x, f"The inputs of batch {i}")
            yield f"batch {i}", prepare(x, len(y)), y, weights


def named_inputs(loader: Iterable[Any], dict_key_x: str, prepare: Prepare) -> Iterator[tuple[str, Input]]:
    """Yield ``(name, inputs)`` of each batch that is not empty.

    A batch may be inputs alone, a sequence that starts with them, or a mapping.

    Raises
    ------
    ValueError
        If a batch holds no inputs, or they are not finite or cannot be cut.
    """
    for i, batch in enumerate(loader):
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, (Tensor, Mapping)):
            raise ValueError(
                f"Batch {i} must be inputs, a pair (inputs, targets) or a mapping; got {_describe(batch)}."
            )
        check_finite(x, f"The inputs of batch {i}")
        if raw_size(x, dict_key_x):
            yield f"batch {i}", prepare(x, None)
