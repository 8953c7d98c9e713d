r"""Landmark gradients: rows :math:`R_m = J(x_m)[c_m]` of the Jacobian, one output each.

An *engine* maps (model, weights, x, outputs) to a dict name -> (B, *shape). Three
libraries compute the same rows; torch.func is the one that needs no layer rules.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from asdl.core import extend as asdl_extend
from asdl.operations import OP_BATCH_GRADS
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from torch import Tensor, nn
from torch.func import grad, vmap

from ..data.batches import Input, Nested, batch_size, inputs_between
from .calling import Calling
from .functional import FunctionalModel, Weights, backward_passes, outputs_of
from .lookups import Lookups, without_padding

RowEngine = Callable[[FunctionalModel, Weights, Input, Tensor], Weights]


def per_input(function: Callable[..., Any], x: Input, *more: Any) -> Any:
    """Apply ``function(row, *entries)`` to every row of a batch at once.

    Parameters
    ----------
    function : callable
        Takes a batch of one row, and one entry of each of ``more``.
    x : input of B rows
    *more : Tensor (B, ...)
    """
    cut = x.cut if isinstance(x, Nested) else (x,)  # vmap knows plain containers only

    def on_row(row: tuple[Tensor, ...], *values: Any) -> Any:
        batch = tuple(t.unsqueeze(0) for t in row)
        return function(replace(x, cut=batch) if isinstance(x, Nested) else batch[0], *values)

    return vmap(on_row)(cut, *more)


def gradient_rows(model: FunctionalModel, weights: Weights, x: Input, outputs: Tensor) -> Weights:
    """Compute per-sample gradients of one output each, with torch.func.

    Parameters
    ----------
    weights : dict of Tensor
        Those that gradients are taken with respect to; the module's own stand in for the others.
    x : input of B rows
    outputs : LongTensor (B,)
        The output of each row whose gradient is taken.

    Returns
    -------
    dict of Tensor (B, *shape)

    Notes
    -----
    Cost: at least 3 forward passes per row. Memory: B x P numbers.
    """

    def gradient(row: Input, c: Tensor) -> Weights:
        return grad(lambda w: model(w, row).gather(1, c.view(1, 1)).squeeze())(weights)

    return per_input(gradient, x, outputs)


def looped_rows(model: FunctionalModel, weights: Weights, x: Input, outputs: Tensor) -> Weights:
    """Compute what :func:`gradient_rows` does, one row after the other.

    For models whose operators do not batch over samples (recurrent layers, branches
    that depend on the data), or that torch.func cannot differentiate at all (old-style
    autograd functions, checkpoints). Cost: at least 3 forward passes of a single row.
    """

    def gradient(row: Input, c: Tensor) -> Weights:
        return backward_passes(model, row, lambda f, leaves, pull: pull(f[0, c], weights))

    gradients = [gradient(inputs_between(x, i, i + 1), outputs[i]) for i in range(batch_size(x))]
    return {k: torch.stack([g[k] for g in gradients]) for k in weights}


def backpack_rows(model: FunctionalModel, weights: Weights, x: Input, outputs: Tensor) -> Weights:
    """Compute what :func:`gradient_rows` does with BackPACK's ``BatchGrad``.

    Works on a copy of the module, since BackPACK leaves hooks and attributes behind.

    Raises
    ------
    ValueError
        If BackPACK cannot run the model, or has no correct gradient for a weight.
    """
    module = extend(_copy(model))
    with warnings.catch_warnings(), backpack(BatchGrad()):
        # It is said of every module that holds others; _verified names the weights that matter.
        warnings.filterwarnings("ignore", "Extension saving to grad_batch does not have", UserWarning)
        padding = _backward_of_outputs("BackPACK", model.calling, module, x, outputs)
    found = {k: getattr(p, "grad_batch", None) for k, p in module.named_parameters()}
    return _verified("BackPACK", found, module, batch_size(x), padding)


def asdl_rows(model: FunctionalModel, weights: Weights, x: Input, outputs: Tensor) -> Weights:
    """Compute what :func:`gradient_rows` does with ASDL's per-sample gradients.

    Works on a copy of the module.

    Raises
    ------
    ValueError
        If ASDL cannot run the model, or has no correct gradient for a weight.
    """
    module = _copy(model)
    found: dict[str, Any] = {}
    with warnings.catch_warnings(), asdl_extend(module, OP_BATCH_GRADS) as context:
        # ASDL's kind of hook is deprecated; _verified catches what it could miss.
        warnings.filterwarnings("ignore", "Using a non-full backward hook", FutureWarning)
        padding = _backward_of_outputs("ASDL", model.calling, module, x, outputs)
        for prefix, layer in module.named_modules():
            for name, gradient in (context.batch_grads(layer) or {}).items():
                found[f"{prefix}.{name}" if prefix else name] = gradient
    return _verified("ASDL", found, module, batch_size(x), padding)


def _copy(model: FunctionalModel) -> nn.Module:
    copy = deepcopy(model.module)
    for name, p in copy.named_parameters():
        p.requires_grad_(name in model.names)
    for m in copy.modules():
        if getattr(m, "inplace", False):
            # Overwriting what a hook returned is an error.
            m.inplace = False  # type: ignore[assignment]
    return copy


@torch.enable_grad()
def _backward_of_outputs(
    library: str, calling: Calling, module: nn.Module, x: Input, outputs: Tensor
) -> dict[str, int]:
    """Run a module and its backward pass; return the padding rows that the library's rules do not know of."""
    if isinstance(x, Tensor) and x.is_floating_point():
        x = x.detach().requires_grad_()  # else BackPACK's hooks on the first layer warn
    try:
        with Lookups():
            f = outputs_of(calling, module, x)
        padding = without_padding(module)
        f.gather(1, outputs[:, None]).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{library} cannot differentiate this model, which runs without it: {error} "
            "Leave `backend` out: torch.func needs no rules for layers."
        ) from error
    return padding


def _verified(
    library: str, found: dict[str, Any], module: nn.Module, size: int, padding: dict[str, int]
) -> Weights:
    """Bring a library's rows into shape, and check them: their sum is the ordinary gradient.

    A weight that a library has no rule for has no row; one that is shared between
    layers, or used outside of a layer, would have a wrong one. Padding rows, given by the names of
    their weights, have no gradient.
    """
    result, wrong = {}, []
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        total = torch.zeros_like(p) if p.grad is None else p.grad
        row = found.get(name)
        if row is None or row.numel() % (size * p.numel()):
            wrong.append(name)
            continue
        # A layer applied at several positions reports one row per position.
        result[name] = row.detach().reshape(size, -1, *p.shape).sum(1)
        if name in padding:
            result[name][:, padding[name]] = 0
        scale = result[name].abs().sum(0).max()
        if (result[name].sum(0) - total).abs().max() > 100 * torch.finfo(p.dtype).eps * scale:
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"{library} has no correct per-sample gradient for {', '.join(wrong)}; it knows the weights of "
            "common layers only. Leave `backend` out: torch.func needs no rules for layers."
        )
    return result
