r"""Saved estimators, made of tensors and plain types, with a hash of the model in place of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..data.hashing import add_tensor, digest_of
from ..data.landmarks import Landmarks
from ..network.engine import Engine
from ..network.functional import Weights
from ..network.safety import LOCK
from ..nystrom.basis import NystromBasis
from ..nystrom.compact import pack_directions, unpack_directions
from ..nystrom.jacobian import directions_of
from ..parallel.ranks import ALONE, Ranks
from .state_checks import (
    ENTRIES,
    OPTIONAL,
    SINCE_FORMAT_5,
    check_basis,
    check_entries,
    check_orthonormal,
)

# States of format 3, which laplace_ella 0.1.0 wrote, hold no digest; those before 5 no link, and no scales of classes.
FORMAT, READABLE = 5, (3, 4, 5)
# The entries that are attributes of the estimator itself, and not of its posterior.
OF_ESTIMATOR = (
    *("enable_backprop", "subsample_size", "n_eigenvalues"),
    *("curvature_size", "curvature", "curvature_samples"),
)
STATE_KEYS = {"format", "cls_name", "likelihood", "fingerprint", "basis", *ENTRIES}


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


def pack_basis(basis: NystromBasis, stored: str = "full") -> dict[str, Any]:
    """Turn a basis into tensors and plain types, which may share memory with it; see :mod:`laplace_ella.nystrom.compact`."""
    return {
        **pack_directions(basis, stored),
        "eigenvalues": basis.eigenvalues,
        "trace": basis.trace,
        "spectrum": basis.spectrum,
        "shard": (basis.ranks.rank, basis.ranks.size),
        "grams": basis.grams,
        "stored": stored,
        "model": basis.of_model,
    }


def copied(value: Any) -> Any:
    """Copy tensors, which are cut from their graphs, in plain containers of any depth."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return type(value)(map(copied, value)) if type(value) in (list, tuple) else value


def check_shapes(packed: dict[str, Any], weights: Weights, what: str) -> None:
    """Require directions of a packed basis, if it holds any, to be in the space of an estimator's weights.

    Raises
    ------
    ValueError
    """
    rank, size = packed["shard"]
    n, half = len(range(rank, len(packed["eigenvalues"]), size)), "scales" in packed
    expected = {
        k: ((n, *w.shape), torch.float16 if half and w.element_size() > 2 else w.dtype)
        for k, w in weights.items()
    }
    found = packed.get("directions")
    same = found is None or {k: (tuple(v.shape), v.dtype) for k, v in found.items()} == expected
    if not same or (half and packed["scales"].keys() != weights.keys()):
        raise ValueError(
            f"{what} belongs to other parameters than those of this estimator, in number, shape or dtype: those of the "
            "model that required grad when the estimator was built. Build the model as it was, and the estimator while "
            "the requires_grad flags are as they were; they may change afterwards."
        )


def check_dtypes(basis: NystromBasis, params: Iterable[Tensor]) -> None:
    """Require weights to have the dtypes that they were fitted in.

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


def read_along(state: dict[str, Any], channel_axis: int | None) -> int | None:
    """Return the channel axis of the outputs that a state was fitted to, which has to be that of an estimator, if it has one.

    Raises
    ------
    ValueError
    """
    found: int | None = state.get("channel_axis")
    if channel_axis in (None, found):
        return found
    raise ValueError(
        f"The checkpoint is of outputs with channel_axis={found}, and this estimator has channel_axis={channel_axis}. Build it with "
        f"channel_axis={found}, or without it."
    )


def check_shard(shard: tuple[int, int], ranks: Ranks, what: str) -> None:
    """Require directions that belong to this rank, of as many ranks.

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
    """Rebuild the basis of :func:`pack_basis` from its directions, next to an estimator's weights.

    Parameters
    ----------
    state : dict
        What :func:`pack_basis` returned, and ``"coefficients"``.
    weights : dict of Tensor
    ranks : Ranks
        The ranks that share the directions.

    Raises
    ------
    ValueError
        If its directions are not those of these weights.
    """
    check_shapes(state, weights, "The checkpoint")
    directions = {k: state["directions"][k].to(w) for k, w in weights.items()}
    return _with_spectrum(state, directions, ranks, coefficients=state["coefficients"])


def _with_spectrum(state: dict[str, Any], directions: Weights, ranks: Ranks, **more: Any) -> NystromBasis:
    found = (state["eigenvalues"], float(state["trace"]), state["spectrum"], ranks, state["grams"])
    device = next(iter(directions.values())).device
    return NystromBasis(directions, *found, **more).to(device)


def unpack_saved_basis(state: dict[str, Any], engine: Engine, ranks: Ranks = ALONE) -> NystromBasis:
    """Rebuild the basis of a saved state, computing directions that are not in it.

    Parameters
    ----------
    state : dict
        The entry of a state that :func:`check_state` has let pass.
    engine : Engine
    ranks : Ranks
        The ranks that share the directions.

    Raises
    ------
    ValueError
        If its directions are not orthonormal.
    """
    made_of: dict[str, Any] = {"of_model": state.get("model")}

    def combined(inputs: list[Any], outputs: Tensor, coefficients: Tensor) -> Weights:
        landmarks = Landmarks([engine.restored(x) for x in inputs], outputs)
        made_of.update(landmarks=landmarks, coefficients=coefficients)
        return directions_of(engine, landmarks, coefficients)

    directions = unpack_directions(state, engine.function.weights(), combined)
    spectrum = copied({k: state[k] for k in ("eigenvalues", "trace", "spectrum", "grams")})
    basis = _with_spectrum(spectrum, directions, ranks, **made_of)
    check_orthonormal(basis)
    return basis


def check_state(state: Any, cls_name: str, likelihood: str, model: nn.Module, weights: Weights) -> None:
    """Require an undamaged checkpoint of this class, likelihood and model, in a format that can be read.

    Raises
    ------
    ValueError
        Naming what differs.
    """
    for objection in chain(objections(state, cls_name), _of_other_models(state, likelihood, model)):
        raise ValueError(objection)
    check_basis(state["basis"])
    check_shapes(state["basis"], weights, "The checkpoint")
    check_entries({**SINCE_FORMAT_5, **state}, weights)
    if "digest" in state and state["digest"] != digest_of_state(state):
        raise ValueError(
            "The checkpoint is damaged: what was read is not what was saved. Copy the file again, or save it again."
        )


def objections(state: Any, cls_name: str) -> Iterator[str]:
    """Say why something is no state of this class in a format that can be read, with all of its entries."""
    found = state.get("cls_name", "a dict") if isinstance(state, dict) else type(state).__name__
    if found != cls_name:
        yield (
            f"The state must come from {cls_name}.state_dict(); got one of {found}. "
            "Build the estimator with the same subset_of_weights and hessian_structure."
        )
    if type(state.get("format")) is not int or state["format"] not in READABLE:
        yield f"The checkpoint has format {state.get('format')}, this version reads {READABLE}; fit again."
    keys = STATE_KEYS - ({*SINCE_FORMAT_5} if state["format"] < 5 else set())
    keys |= {"digest"} if state["format"] > 3 else set()
    if keys - state.keys():
        yield f"The checkpoint is incomplete: it lacks {sorted(keys - state.keys())}. Save it again."
    if state.keys() - keys - OPTIONAL.keys():
        extra = sorted(map(repr, state.keys() - keys - OPTIONAL.keys()))
        yield f"The checkpoint has entries that no estimator saves: {extra}. Take them out."


def _of_other_models(state: dict[str, Any], likelihood: str, model: nn.Module) -> Iterator[str]:
    """Say why a state is not one of this likelihood and model."""
    if state["likelihood"] != likelihood:
        yield f"The checkpoint was made with likelihood={state['likelihood']!r}; this estimator has {likelihood!r}."
    if state["fingerprint"] != fingerprint(model):
        yield (
            "The checkpoint was made with another model: the hash of parameters and buffers differs. "
            "Load the model's own weights first, then the checkpoint."
        )


def digest_of_state(state: dict[str, Any]) -> str:
    """Return a hash of all entries but the hash itself; it costs a pass over V on the CPU."""
    return digest_of({k: v for k, v in state.items() if k != "digest"})


def whole_state(entries: dict[str, Any], basis: NystromBasis, stored: str) -> dict[str, Any]:
    """Return a state with a basis, stored in one of the ways there are, and with a hash of all its entries.

    It shares no memory with the basis.
    """
    state = {**entries, "format": FORMAT, "basis": copied(pack_basis(basis, stored))}
    return {**state, "digest": digest_of_state(state)}


def check_unchanged(before: str, model: nn.Module) -> None:
    """Require a model whose hash is what it was at the fit.

    Raises
    ------
    ValueError
    """
    if before != fingerprint(model):
        raise ValueError(
            "The model's weights or buffers have changed since the fit, which belongs to the old ones. "
            "Fit again, or restore them."
        )


def differences(state: dict[str, Any], enable_backprop: bool, temperature: float | None) -> Iterator[str]:
    """Yield a remark for each value of a state that replaces another one that the user chose.

    Parameters
    ----------
    temperature : float or None
        The temperature that the user chose; None if it was left free.
    """
    for name, mine in {"enable_backprop": enable_backprop, "temperature": temperature}.items():
        if mine is not None and mine != state[name]:
            yield f"The checkpoint has {name}={state[name]}, which replaces {name}={mine}."
