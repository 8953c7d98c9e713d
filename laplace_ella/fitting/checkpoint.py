r"""Checkpoints: tensors and plain types, with a hash of the model instead of a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..data.hashing import add_tensor, digest_of
from ..data.landmarks import Landmarks
from ..network.functional import Weights
from ..network.safety import LOCK
from ..nystrom.basis import NystromBasis
from ..nystrom.compact import pack_directions, unpack_directions
from ..parallel.ranks import ALONE, Ranks
from .state_checks import check_basis, check_entries, check_orthonormal

# States of format 3, which laplace_ella 0.1.0 wrote, hold no digest.
FORMAT, READABLE = 4, (3, 4)
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
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def fingerprint(model: nn.Module) -> str:
    """Hash names, shapes, dtypes and bytes of all parameters and buffers.

    The same model gives the same hash on every device. Cost: one pass over the
    weights, copied to the CPU one at a time.
    """
    digest = hashlib.blake2b(digest_size=16)
    with LOCK:  # while another thread has the weights exchanged, they are others
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            digest.update(name.encode())
            add_tensor(digest, tensor)
    return digest.hexdigest()


def pack_basis(basis: NystromBasis) -> dict[str, Any]:
    """Turn a basis, apart from its landmarks and its model, into tensors and plain types."""
    return {"directions": dict(basis.directions), **_pack_spectrum(basis), "coefficients": basis.coefficients}


SPECTRUM = ("eigenvalues", "trace", "spectrum", "shard", "grams")


def _pack_spectrum(basis: NystromBasis) -> dict[str, Any]:
    return {
        "eigenvalues": basis.eigenvalues,
        "trace": basis.trace,
        "spectrum": basis.spectrum,
        "shard": (basis.ranks.rank, basis.ranks.size),
        "grams": basis.grams,
    }


def pack_saved_basis(basis: NystromBasis, stored: str) -> dict[str, Any]:
    """Turn a basis into tensors and plain types that share no memory with it; see :mod:`laplace_ella.nystrom.compact`."""
    spectrum = copied(_pack_spectrum(basis))
    return {**pack_directions(basis, stored), **spectrum, "stored": stored, "model": basis.of_model}


def copied(value: Any) -> Any:
    """Copy tensors and plain containers of any depth, cut from graphs."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return type(value)(map(copied, value)) if type(value) in (list, tuple) else value


def check_directions(basis: NystromBasis, weights: Weights, what: str) -> None:
    """Require directions in the space of an estimator's weights, in their dtypes, as many as eigenvalues.

    Raises
    ------
    ValueError
    """
    n = len(range(basis.rank)[basis.ranks.turns()])
    _check_shapes(basis.directions, n, _shapes(weights), what)


def _shapes(weights: Weights, half: bool = False) -> Shapes:
    """Return shape and dtype of each weight; in half precision, where they are not already."""
    return {
        k: (tuple(w.shape), torch.float16 if half and w.element_size() > 2 else w.dtype)
        for k, w in weights.items()
    }


def _check_shapes(directions: Weights, n: int, shapes: Shapes, what: str) -> None:
    expected = {k: ((n, *shape), dtype) for k, (shape, dtype) in shapes.items()}
    if {k: (tuple(v.shape), v.dtype) for k, v in directions.items()} != expected:
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
        coefficients=None if basis.coefficients is None else basis.coefficients.to(device),
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
    """Rebuild the basis of :func:`pack_basis` beside an estimator's weights; ``ranks`` are those that share its directions.

    Raises
    ------
    ValueError
        If its directions are not those of these weights.
    """
    basis = _with_spectrum(state, state["directions"], weights, ranks)
    check_directions(basis, weights, "The checkpoint")
    coefficients = state.get("coefficients")
    return replace(
        basis,
        directions={k: state["directions"][k].to(w) for k, w in weights.items()},
        coefficients=None if coefficients is None else coefficients.to(basis.eigenvalues.device),
    )


def _with_spectrum(
    state: dict[str, Any], directions: Weights, weights: Weights, ranks: Ranks
) -> NystromBasis:
    check_shard(state["shard"], ranks, "The checkpoint")
    device = next(iter(weights.values())).device
    eigenvalues, spectrum = (state[k].to(device, torch.float64) for k in ("eigenvalues", "spectrum"))
    grams = None if state["grams"] is None else state["grams"].to(device, torch.float64)
    return NystromBasis(directions, eigenvalues, float(state["trace"]), spectrum, ranks, grams)


def unpack_saved_basis(state: dict[str, Any], backend: Any, ranks: Ranks = ALONE) -> NystromBasis:
    """Rebuild the basis of :func:`pack_saved_basis`, computing directions that are not in it.

    Parameters
    ----------
    state : dict
    backend : NystromGGN
    ranks : Ranks
        Those that share the directions.

    Raises
    ------
    ValueError
        If its directions are not those of the estimator's weights, or not orthonormal.
    """
    made_of: dict[str, Any] = {}
    weights = backend.engine.function.weights()

    def combined(inputs: list[Any], outputs: Tensor, coefficients: Tensor) -> Weights:
        landmarks = Landmarks(backend.restored_inputs(inputs), outputs)
        made_of.update(landmarks=landmarks, coefficients=coefficients.to(backend.engine.device))
        return backend.combined(landmarks, coefficients)

    directions = unpack_directions(state, weights, combined)
    basis = _with_spectrum(copied({k: state[k] for k in SPECTRUM}), directions, weights, ranks)
    check_directions(basis, weights, "The checkpoint")
    of_all = basis.grams.sum(0) if basis.sharded and basis.grams is not None else None
    check_orthonormal(directions, basis.eigenvalues, of_all, ranks.turns())
    return replace(basis, of_model=state.get("model"), **made_of)


def check_state(state: Any, cls_name: str, likelihood: str, model: nn.Module, weights: Weights) -> None:
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
    if type(state.get("format")) is not int or state["format"] not in READABLE:
        raise ValueError(
            f"The checkpoint has format {state.get('format')}, this version reads {READABLE}; fit again."
        )
    keys = STATE_KEYS | ({"digest"} if state["format"] > 3 else set())
    if keys - state.keys():
        raise ValueError(
            f"The checkpoint is incomplete: it lacks {sorted(keys - state.keys())}. Save it again."
        )
    if state.keys() - keys:
        raise ValueError(
            f"The checkpoint has entries that no estimator saves: {sorted(map(repr, state.keys() - keys))}. Take them out."
        )
    if state["likelihood"] != likelihood:
        raise ValueError(
            f"The checkpoint was made with likelihood={state['likelihood']!r}; this estimator has {likelihood!r}."
        )
    if state["fingerprint"] != fingerprint(model):
        raise ValueError(
            "The checkpoint was made with another model: the hash of parameters and buffers differs. "
            "Load the model's own weights first, then the checkpoint."
        )
    _check_basis_and_entries(state, weights)


def _check_basis_and_entries(state: dict[str, Any], weights: Weights) -> None:
    check_basis(state["basis"])
    basis = state["basis"]
    if "directions" in basis:
        rank, size = basis["shard"]
        n = len(range(rank, len(basis["eigenvalues"]), size))
        _check_shapes(basis["directions"], n, _shapes(weights, "scales" in basis), "The checkpoint")
    check_entries(state, weights)
    if "digest" in state and state["digest"] != digest_of_state(state):
        raise ValueError(
            "The checkpoint is damaged: what was read is not what was saved. Copy the file again, or save it again."
        )


def digest_of_state(state: dict[str, Any]) -> str:
    """Return a hash of all entries but the hash itself. Cost: a pass over V on the CPU."""
    return digest_of({k: v for k, v in state.items() if k != "digest"})
