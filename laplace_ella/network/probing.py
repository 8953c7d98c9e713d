r"""What a model's operators support, found out once, on two rows.

Forward mode has no rule for some operators, vmap none for others, torch.func none
for old-style autograd functions. The ways of computing features and landmark
gradients are tried in the order of their cost; the first that works is used, and a
warning says what is lost. Nothing is decided by the text of an exception, and
nothing is decided again for every batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..data.batches import Input
from ..data.hashing import normal_like
from .adjoint import SCALES, check_adjoint
from .features import AUTODIFF, FEATURES
from .functional import FunctionalModel, Weights, flat, with_batch_statistics
from .gradients import RowEngine, gradient_rows, looped_rows
from .memory import Chunks, attempt
from .reaching import check_reached
from .repeating import plain_passes
from .safety import switched

# What a call takes of two rows: all directions at once.
PAIR = Chunks(2, len(SCALES))


@dataclass(frozen=True)
class Support:
    """How features and landmark gradients of a model can be computed.

    Attributes
    ----------
    features : str
        A key of :data:`laplace_ella.network.features.FEATURES`.
    gradients : {"vmap", "loop"}
        Whether gradients of many inputs are computed at once, or one by one.
    precision : torch.dtype
        The coarsest floating-point type on the way from the input to the outputs.
    """

    features: str
    gradients: str
    precision: torch.dtype

    @property
    def engine(self) -> RowEngine:
        """What computes landmark gradients with torch alone."""
        return gradient_rows if self.gradients == "vmap" else looped_rows


class _FailedFunction(TorchFunctionMode):
    """Remembers which function failed first."""

    name = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            self.name = self.name or f"{getattr(func, '__name__', func)}: "
            raise


def _attempt(compute: Callable[[], Any], batched: str = "") -> tuple[Any, str]:
    """Return (result, ""), or (None, why it failed).

    Where vmap has no rule for an operator, it may run the operator slice by slice. With ``batched``, the name of
    what is computed for many at once, that is the second attempt, and a warning says so if it works.
    """
    functorch: Any = torch._C._functorch
    switch = functorch._is_vmap_fallback_enabled, functorch._set_vmap_fallback_enabled
    reason = ""
    for slice_by_slice in (False, True) if batched else (True,):
        failed = _FailedFunction()
        with switched(*switch, slice_by_slice), failed:
            found, error = attempt(compute)
        if error is None:
            if reason:
                warnings.warn(
                    f"An operator has no batching rule, so that {batched} run it slice by slice, which is slower. "
                    f"The reason: {reason}",
                    stacklevel=2,
                )
            return found, ""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = reason or failed.name + lines[0]
    return None, reason


def probe(model: FunctionalModel, x: Input, mode: str = "auto") -> Support:
    """Find out how features and landmark gradients can be computed.

    Parameters
    ----------
    x : input of two rows
    mode : str
        "auto" takes the first way that works; a name, such as "reverse", takes ways of this name only.

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
    Cost: about 20 forward passes of two rows. Call it inside ``safely``.
    """
    plain, precision = plain_passes(model, x)
    check_reached(model, x, plain)
    weights = model.weights()
    gradients, why_one_by_one = _probe_gradients(model, weights, x)
    # Contraction is chosen by costs, where it works, or by name.
    allowed = {
        k: w for k, w in FEATURES.items() if mode == w.autodiff or (mode == "auto" and not w.contracts)
    }
    ladder = [k for k, w in allowed.items() if w.gradients in (None, gradients)]
    tangents = normal_like(weights, 1, seed=0)
    name, phi, why = _probe_features(model, weights, x, tangents, ladder)
    if name is None:  # the last way takes the least, so that it says what is in the way
        *others, last = map(repr, AUTODIFF)
        raise ValueError(
            f"{'This model' if mode == 'auto' else f'autodiff={mode!r}'} cannot be differentiated: {why}. "
            f"Allowed are {', '.join(others)} and {last}; 'reverse' needs no more than backward()."
        )
    way = FEATURES[name]
    if not way.reference:
        check_adjoint(model, x, tangents, phi, lambda v: way(model, weights, v, x, PAIR)[0], precision)
    _warn_of_batch_statistics(model.module)
    if name != ladder[0]:
        warnings.warn(
            f"This model has no {FEATURES[ladder[0]].words}, so features are computed by {way.words} "
            f"(C = {plain.flatten(1).shape[-1]}). The reason: {why}",
            stacklevel=2,
        )
    if gradients == "loop":
        warnings.warn(
            "This model cannot be differentiated for several inputs at once, so landmark gradients are "
            f"computed one by one, which is slower. The reason: {why_one_by_one}",
            stacklevel=2,
        )
    return Support(name, gradients, precision)


def _probe_gradients(model: FunctionalModel, weights: Weights, x: Input) -> tuple[str, str]:
    device = next(iter(weights.values())).device
    outputs = torch.zeros(2, dtype=torch.int64, device=device)
    found, why = _attempt(
        # Embeddings may have sparse gradients, which cannot be laid out in rows.
        lambda: [flat(g) for g in gradient_rows(model, weights, x, outputs).values()],
        "landmark gradients of many inputs at once",
    )
    return ("loop", why) if found is None else ("vmap", "")


def _probe_features(
    model: FunctionalModel, weights: Weights, x: Input, tangents: Weights, ladder: list[str]
) -> tuple[str | None, Any, str]:
    """Return the first way that works, its features of one direction, and why the first of all did not.

    If none does: nothing, and why the last did not.
    """
    reason = why = ""
    for name in ladder:
        way = FEATURES[name]
        compute = partial(way, model, weights, tangents, x, PAIR)
        found, why = _attempt(compute, "features" if way.directions == "several" else "")
        if found is not None:
            return name, found[0], reason
        reason = reason or why
    return None, None, why


def _warn_of_batch_statistics(module: nn.Module) -> None:
    names = with_batch_statistics(module)
    if names:
        warnings.warn(
            f"The outputs of this model depend on the other rows of a batch: {', '.join(names)} normalise by the batch's "
            "own statistics in evaluation mode too (track_running_stats=False), so that results change with "
            "batches and chunks. Use running statistics, or a normalisation of single rows.",
            stacklevel=3,
        )
