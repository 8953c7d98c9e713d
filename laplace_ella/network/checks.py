r"""Checks of the network: that it is a module, has weights to be uncertain about, and holds them whole."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..data.checks import shown


def check_module(model: Any) -> None:
    """Require a module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, the trained network; got {shown(model)}.")


def check_weights(model: Any) -> None:
    """Require a module whose weights and buffers have values."""
    check_module(model)
    for name, values in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(values) or values.is_meta:
            raise ValueError(
                f"model must have values for all its weights and buffers; {name!r} has none, as it is "
                f"{'lazy: run the model once' if is_lazy(values) else 'on the meta device: load the weights'} first."
            )


def check_model(model: Any) -> None:
    """Require a module whose weights have values, with at least one real weight that requires grad."""
    check_weights(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "The model has no parameter that requires grad, so there is no weight to be uncertain about. "
            "Call requires_grad_(True) on the parameters to include before the estimator is built; for serving, they may "
            "be frozen again right after that."
        )
    of_complex = [repr(k) for k, p in model.named_parameters() if p.requires_grad and p.is_complex()]
    if of_complex:
        raise ValueError(
            f"The model has complex weights, for which there is no real Gaussian posterior: {', '.join(of_complex)}. Freeze "
            "them with requires_grad_(False), or keep real and imaginary parts as weights of their own."
        )


def check_whole(model: nn.Module) -> None:
    """Refuse weights that are spread over processes."""
    sharded = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    if sharded or any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise ValueError(
            "The model's weights are sharded over processes (FSDP, DTensor), where forward-mode AD has no rules; "
            "every process must hold them whole. Use DistributedDataParallel, or gather the weights into a plain "
            "copy of the module first."
        )


def check_finite_features(phi: Tensor, f: Tensor, name: str) -> None:
    """Require features and outputs without NaN or infinity; the message names the batch."""
    if not (phi.isfinite().all() and f.isfinite().all()):
        raise ValueError(
            f"The features or outputs for {name} hold NaN or infinite values; they must be finite. "
            "A square root or a norm at zero has no finite derivative: check the model there."
        )
