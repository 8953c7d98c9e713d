r"""What a model's operators support, found out once, on two rows.

Forward mode has no rule for some operators, vmap none for others, torch.func none
for old-style autograd functions. Each way of computing features and landmark
gradients is tried in the order of its cost; the first that works is used, and a
warning says what is lost. Nothing is decided by the text of an exception, and
nothing again for every batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..data.batches import Input
from ..data.hashing import normal_like
from .adjoint import SCALES, check_adjoint
from .features import FEATURES
from .functional import FunctionalModel, Weights, flat
from .gradients import RowEngine, gradient_rows, looped_rows
from .memory import Chunks, attempt
from .reaching import check_reached
from .repeating import plain_passes
from .safety import switched

_LADDER = ("forward", "forward loop", "double", "reverse")
_COST = {
    "forward loop": "one direction at a time, at 3 K instead of 1 + 2 K forward passes a row",
    "double": "two backward passes a direction, at about 3 K instead of 1 + 2 K forward passes a row",
    "reverse": "one backward pass for each of C outputs, at about 1 + 4 C forward passes a row",
    "reverse loop": "one backward pass for each row and output, at 1 + 4 C or more forward passes of single rows",
}


@dataclass(frozen=True)
class Support:
    """How features and landmark gradients of a model can be computed.

    Attributes
    ----------
    features : {"forward", "forward loop", "double", "reverse", "reverse loop"}
        A key of :data:`laplace_ella.network.features.FEATURES`.
    rows : {"vmap", "loop"}
        Gradients of many inputs at once, or one by one.
    precision : torch.dtype
        The coarsest floating-point type on the way from the input to the outputs.
    """

    features: str
    rows: str
    precision: torch.dtype

    @property
    def engine(self) -> RowEngine:
        """What computes landmark gradients with torch alone."""
        return gradient_rows if self.rows == "vmap" else looped_rows


class _FailedFunction(TorchFunctionMode):
    """Remember which function failed."""

    name = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            self.name = self.name or f"{getattr(func, '__name__', func)}: "
            raise


def _attempt(compute: Callable[[], Any], slow_batching: bool = False) -> tuple[Any, str]:
    """Return (result, ""), or (None, why it failed).

    ``slow_batching``: where vmap has no rule for an operator, let it run slice by slice.
    """
    functorch: Any = torch._C._functorch
    switch = functorch._is_vmap_fallback_enabled, functorch._set_vmap_fallback_enabled
    failed = _FailedFunction()
    with switched(*switch, slow_batching), failed:
        found, error = attempt(compute)
    if error is None:
        return found, ""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return None, failed.name + lines[0]


def _attempt_batched(compute: Callable[[], Any], what: str) -> tuple[Any, str]:
    """Try :func:`_attempt`, then again with operators that have no batching rule run slice by slice."""
    found, why = _attempt(compute)
    if found is None:
        found, _ = _attempt(compute, slow_batching=True)
        if found is not None:
            warnings.warn(
                f"An operator has no batching rule, so that {what} run it slice by slice, which is slower. "
                f"The reason: {why}",
                stacklevel=2,
            )
    return found, why


def probe(model: FunctionalModel, x: Input, mode: str = "auto") -> Support:
    """Find out how features and landmark gradients can be computed.

    Parameters
    ----------
    x : input of two rows
    mode : {"auto", "forward", "double", "reverse"}
        "auto" takes the first that works; a name is taken at its word.

    Raises
    ------
    Exception
        Whatever the plain forward pass raises.
    ValueError
        If the forward pass is random, if it finds weights where exchanging them does not reach,
        if the mode named does not work, if not even backward passes do, or if forward
        and reverse mode disagree.

    Notes
    -----
    Plain forward passes come first: what the model keeps of one (an attention mask, say) is then a plain tensor.
    Cost: about 25 forward passes of two rows. Call it inside ``safely``.
    """
    precision = _look_at(model, x)
    weights = model.weights()
    f = model(weights, x)
    tangents = normal_like(weights, 2, seed=0)
    rows, why_rows = _probe_rows(model, weights, x)
    ladder = _LADDER if mode == "auto" else [m for m in _LADDER if m.split()[0] == mode]
    features, phi, why = _probe_features(model, weights, x, tangents, ladder, rows)
    if features is None:
        raise ValueError(
            f"{'This model' if mode == 'auto' else f'autodiff={mode!r}'} cannot be differentiated: {why}. "
            "Allowed are 'auto', 'forward', 'double' and 'reverse'; the last needs no more than backward()."
        )
    if phi is not None and not features.startswith("reverse"):

        def push(pushed: Weights) -> Tensor:
            phi, _ = FEATURES[features](model, weights, pushed, x, Chunks(2, len(SCALES)))
            return phi

        check_adjoint(model, x, tangents, phi, push, precision)
    _warn_of_batch_statistics(model.module)
    if features != "forward" and mode in ("auto", "forward"):
        warnings.warn(
            f"This model has no batched forward mode, so features are computed by {_COST[features]} "
            f"(C = {f.shape[-1]}). The reason: {why}",
            stacklevel=2,
        )
    if rows == "loop":
        warnings.warn(
            "This model cannot be differentiated for several inputs at once, so landmark gradients are "
            f"computed one by one, which is slower. The reason: {why_rows}",
            stacklevel=2,
        )
    return Support(features, rows, precision)


def _look_at(model: FunctionalModel, x: Input) -> torch.dtype:
    """Require that the forward pass can be differentiated at all, and return the coarsest precision on the way."""
    plain, precision = plain_passes(model, x)
    check_reached(model, x, plain)
    return precision


def _probe_rows(model: FunctionalModel, weights: Weights, x: Input) -> tuple[str, str]:
    device = next(iter(weights.values())).device
    outputs = torch.zeros(2, dtype=torch.int64, device=device)
    found, why = _attempt_batched(
        # Embeddings may have sparse gradients, which cannot be laid out in rows.
        lambda: [flat(g) for g in gradient_rows(model, weights, x, outputs).values()],
        "landmark gradients of many inputs at once",
    )
    return ("loop", why) if found is None else ("vmap", "")


def _probe_features(
    model: FunctionalModel, weights: Weights, x: Input, tangents: Weights, ladder: Any, rows: str
) -> tuple[Any, Any, str]:
    """Return the first mode that works, its features of two directions, and why the first did not."""
    reason = ""
    for mode in ladder:
        name = "reverse loop" if mode == "reverse" and rows == "loop" else mode
        compute = partial(FEATURES[name], model, weights, tangents, x, Chunks(2, 2))
        if name == "forward":
            found, why = _attempt_batched(compute, "features")
        else:
            found, why = _attempt(compute, slow_batching=True)
        if found is not None:
            return name, found[0], reason
        reason = reason or why
    return None, None, reason


def _warn_of_batch_statistics(module: nn.Module) -> None:
    names = [
        name
        for name, m in module.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None
    ]
    if names:
        warnings.warn(
            f"The outputs of this model depend on the other rows of a batch: {', '.join(names)} normalise by the batch's "
            "own statistics in evaluation mode too (track_running_stats=False), so that results change with "
            "batches and chunks. Use running statistics, or a normalisation of single rows.",
            stacklevel=3,
        )
