r"""What a checkpoint holds about the model: a hash of its weights, never a copy."""

from __future__ import annotations

import hashlib
from itertools import chain
from typing import Any

import torch
from torch import nn

from .basis import NystromBasis

FORMAT = 1


def fingerprint(model: nn.Module) -> str:
    """Hash names, shapes, dtypes and bytes of all parameters and buffers.

    The same model gives the same hash on every device. Cost: one pass over the
    weights, copied to the CPU one at a time.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()


def pack_basis(basis: NystromBasis) -> dict[str, Any]:
    """Turn a basis into tensors and plain types."""
    return {
        "directions": dict(basis.directions),
        "eigenvalues": basis.eigenvalues,
        "trace": basis.trace,
        "n_landmarks": basis.n_landmarks,
    }


def unpack_basis(state: dict[str, Any], model: nn.Module) -> NystromBasis:
    """Rebuild a basis on the model's device.

    Raises
    ------
    ValueError
        If its directions are not those of the model's trainable parameters.
    """
    weights = {k: p for k, p in model.named_parameters() if p.requires_grad}
    directions = state["directions"]
    if {k: tuple(v.shape[1:]) for k, v in directions.items()} != {
        k: tuple(w.shape) for k, w in weights.items()
    }:
        raise ValueError(
            "The checkpoint's directions belong to other parameters than those of this model that require "
            "grad. Build the model as it was, with the same requires_grad flags, and load again."
        )
    return NystromBasis(
        {k: directions[k].to(w) for k, w in weights.items()},
        state["eigenvalues"].to(next(iter(weights.values())).device, torch.float64),
        float(state["trace"]),
        int(state["n_landmarks"]),
    )
