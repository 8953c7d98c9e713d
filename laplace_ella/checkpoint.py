r"""Checkpoints: tensors and plain types, with a hash of the model instead of a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .autodiff import Weights
from .basis import NystromBasis
from .hashing import add_tensor
from .ranks import ALONE, Ranks

FORMAT = 3
PLAIN_STATE = (
    *("enable_backprop", "subsample_size", "n_eigenvalues", "curvature_size", "seed", "n_curvature"),
    *("logit_scale", "residual", "residual_scale", "residual_samples", "curvature", "curvature_samples"),
)
TENSOR_STATE = ("prior_mean", "prior_precision", "sigma_noise")
STATE_KEYS = {
    *("format", "cls_name", "likelihood", "fingerprint", "basis", "H", "loss", "n_data", "n_outputs"),
    "n_predictions",
    *("temperature", "temperature_fixed", "named_by_user", "snapshots", "labels_sampled"),
    "largest_sums",
    "novelty_reference",
    *("novelty_setting", "fit_history"),
    *(*TENSOR_STATE, *PLAIN_STATE),
}


def fingerprint(model: nn.Module) -> str:
    """Hash names, shapes, dtypes and bytes of all parameters and buffers.

    The same model gives the same hash on every device. Cost: one pass over the
    weights, copied to the CPU one at a time.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(name.encode())
        add_tensor(digest, tensor)
    return digest.hexdigest()


def pack_basis(basis: NystromBasis) -> dict[str, Any]:
    """Turn a basis into tensors and plain types."""
    return {
        "directions": dict(basis.directions),
        "eigenvalues": basis.eigenvalues,
        "trace": basis.trace,
        "spectrum": basis.spectrum,
        "shard": (basis.ranks.rank, basis.ranks.size),
        "grams": basis.grams,
    }


def check_directions(basis: NystromBasis, weights: Weights, what: str) -> None:
    """Require directions in the space of an estimator's weights, in their dtypes, as many as eigenvalues.

    Raises
    ------
    ValueError
    """
    n = len(range(basis.rank)[basis.ranks.turns()])
    shapes = {k: ((n, *w.shape), w.dtype) for k, w in weights.items()}
    if {k: (tuple(v.shape), v.dtype) for k, v in basis.directions.items()} != shapes:
        raise ValueError(
            f"{what} belongs to other parameters than those of this estimator, in number, shape or dtype: those of the "
            "model that required grad when the estimator was built. Build the model as it was, and the estimator while "
            "the requires_grad flags are as they were; they may change afterwards."
        )


def check_dtypes(basis: NystromBasis, params: Iterable[Tensor]) -> None:
    """Require weights in the dtypes that they were fitted in.

    Raises
    ------
    ValueError
    """
    for (name, v), p in zip(basis.directions.items(), params):
        if v.dtype != p.dtype:
            raise ValueError(
                f"The estimator was fitted with {name!r} in {v.dtype}, and the model has it in {p.dtype} now: their "
                f"products would be of neither. Convert the model back, with model.to({v.dtype}), or fit again."
            )


def on_device_of(basis: NystromBasis, model: nn.Module) -> NystromBasis:
    """Return a basis whose tensors are where the model is; the same object if they are already."""
    device = next(model.parameters()).device
    if all(v.device == device for v in basis.directions.values()):
        return basis
    return replace(
        basis,
        directions={k: v.to(device) for k, v in basis.directions.items()},
        eigenvalues=basis.eigenvalues.to(device),
        spectrum=basis.spectrum.to(device),
        grams=None if basis.grams is None else basis.grams.to(device),
    )


def check_shard(shard: tuple[int, int], ranks: Ranks, what: str) -> None:
    """Require the directions of one rank of so many.

    Raises
    ------
    ValueError
    """
    if tuple(shard) != (ranks.rank, ranks.size):
        raise ValueError(
            f"{what} holds the directions of rank {shard[0]} of {shard[1]}, and this estimator those of rank "
            f"{ranks.rank} of {ranks.size}. Use it on as many ranks as made it, with the same shard_directions."
        )


def unpack_basis(state: dict[str, Any], weights: Weights, ranks: Ranks = ALONE) -> NystromBasis:
    """Rebuild a basis beside an estimator's weights; ``ranks`` are those that share its directions.

    Raises
    ------
    ValueError
        If its directions are not those of these weights.
    """
    check_shard(state["shard"], ranks, "The checkpoint")
    device = next(iter(weights.values())).device
    eigenvalues, spectrum = (state[k].to(device, torch.float64) for k in ("eigenvalues", "spectrum"))
    grams = None if state["grams"] is None else state["grams"].to(device, torch.float64)
    basis = NystromBasis(state["directions"], eigenvalues, float(state["trace"]), spectrum, ranks, grams)
    check_directions(basis, weights, "The checkpoint")
    return replace(basis, directions={k: state["directions"][k].to(w) for k, w in weights.items()})


def check_state(state: Any, cls_name: str, likelihood: str, model: nn.Module) -> None:
    """Require a checkpoint of this class, likelihood and model, in the present format.

    Raises
    ------
    ValueError
        Naming what differs.
    """
    found = state.get("cls_name") if isinstance(state, dict) else type(state).__name__
    if found != cls_name:
        raise ValueError(
            f"The state must come from {cls_name}.state_dict(); got one of {found}. "
            "Build the estimator with the same subset_of_weights and hessian_structure."
        )
    if state.get("format") != FORMAT:
        raise ValueError(
            f"The checkpoint has format {state.get('format')}, this version reads {FORMAT}; fit again."
        )
    missing = STATE_KEYS - state.keys()
    if missing:
        raise ValueError(f"The checkpoint is incomplete: it lacks {sorted(missing)}. Save it again.")
    if state["likelihood"] != likelihood:
        raise ValueError(
            f"The checkpoint was made with likelihood={state['likelihood']!r}; this estimator has {likelihood!r}."
        )
    if state["fingerprint"] != fingerprint(model):
        raise ValueError(
            "The checkpoint was made with another model: the hash of parameters and buffers differs. "
            "Load the model's own weights first, then the checkpoint."
        )
