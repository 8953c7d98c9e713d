r"""What a model's operators support, found out once, on two rows.

Forward mode has no rule for some operators, vmap none for others, torch.func none
for old-style autograd functions. Each way of computing features and landmark
gradients is tried in the order of its cost; the first that works is used, and a
warning says what is lost. Nothing is decided by the text of an exception, and
nothing again for every batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .autodiff import FunctionalModel, Weights, backward_passes, flat
from .batches import Input
from .features import FEATURES
from .gradients import RowEngine, gradient_rows, looped_rows
from .memory import Chunks, attempt
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
        A key of :data:`laplace_ella.features.FEATURES`.
    rows : {"vmap", "loop"}
        Gradients of many inputs at once, or one by one.
    """

    features: str
    rows: str

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
        If the mode named does not work, if not even backward passes do, or if forward
        and reverse mode disagree.

    Notes
    -----
    Cost: about 20 forward passes of two rows. Call it inside ``safely``.
    """
    weights = model.weights()
    f = model(weights, x)
    tangents = _random_tangents(weights)
    rows, why_rows = _probe_rows(model, weights, x)
    ladder = _LADDER if mode == "auto" else [m for m in _LADDER if m.split()[0] == mode]
    features, phi, why = _probe_features(model, weights, x, tangents, ladder, rows)
    if features is None:
        raise ValueError(
            f"{'This model' if mode == 'auto' else f'autodiff={mode!r}'} cannot be differentiated: {why}. "
            "Allowed are 'auto', 'forward', 'double' and 'reverse'; the last needs no more than backward()."
        )
    if phi is not None and not features.startswith("reverse"):
        _check_adjoint(model, x, tangents, phi[..., 0])
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
    return Support(features, rows)


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


def _random_tangents(weights: Weights) -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(2, *w.shape, generator=generator).to(w) for k, w in weights.items()}


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


def _check_adjoint(model: FunctionalModel, x: Input, tangents: Weights, phi: Tensor) -> None:
    r"""Require :math:`\langle u, J v \rangle = \langle J^T u, v \rangle`.

    For u along :math:`J v`, where nothing cancels; ones if that is zero.
    """
    phi = phi.detach()
    u = phi / phi.norm() if phi.any() else torch.ones_like(phi)
    with torch.no_grad():
        pulled = backward_passes(model, x, lambda f, leaves, pull: pull((f * u).sum(), leaves))
    left = float((u.double() * phi.double()).sum())
    right = sum(float((g.double() * tangents[k][0].double()).sum()) for k, g in pulled.items())
    finite = math.isfinite(left) and math.isfinite(right)
    if finite and abs(left - right) > _tolerance(phi) * max(abs(left), abs(right)):
        raise ValueError(
            f"Forward and reverse mode disagree about this model's derivative: {left:.6g} and {right:.6g} for the "
            "same product. An operation that only one of them sees is the usual cause: a `no_grad` inside the "
            "forward pass (use detach()), or an autograd.Function whose jvp and backward differ. Mend the model, "
            "or name the mode to trust: autodiff='reverse'."
        )


def _tolerance(phi: Tensor) -> float:
    eps = torch.finfo(phi.dtype).eps
    # TF32, which float32 convolutions use on GPUs by default, has the precision of float16.
    if phi.is_cuda and phi.dtype == torch.float32:
        eps = torch.finfo(torch.float16).eps
    return 3 * math.sqrt(eps)
