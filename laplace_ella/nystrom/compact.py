r"""Directions in a file: whole, in half precision, or as the landmarks and coefficients they are made of.

V takes K x P numbers, K times what the model takes. Half precision takes half of that or less. Landmarks and
coefficients take M inputs and M x K numbers, whatever P is, and V is computed from them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data.packing import packed
from ..network.functional import Weights, flat
from .basis import NystromBasis, overlaps_by_weight

# (packed inputs, output coordinates, coefficients) -> directions
Combine = Callable[[list[Any], Tensor, Tensor], Weights]


def pack_directions(basis: NystromBasis, stored: str) -> dict[str, Any]:
    """Return the directions as tensors and plain types, which may share memory with the basis.

    Raises
    ------
    ValueError
        If the basis cannot be stored in this way.
    """
    if stored != "full" and basis.sharded:
        raise ValueError(
            f"directions={stored!r} needs all directions on one device, and these are spread over {basis.ranks.size} "
            "ranks. Save them with directions='full', each rank its own."
        )
    pack, _ = _WAYS[stored]
    return pack(basis)


def unpack_directions(state: dict[str, Any], weights: Weights, combined: Combine) -> Weights:
    """Return directions (K, *shape) on the devices of the weights; what the state holds is not shared.

    Parameters
    ----------
    state : dict
        What :func:`pack_directions` returned.
    weights : dict of Tensor
    combined : callable
        (packed inputs, output coordinates, coefficients) -> directions.
    """
    _, unpack = _WAYS[state.get("stored", "full")]
    return unpack(state, weights, combined)


def _pack_full(basis: NystromBasis) -> dict[str, Any]:
    return {"directions": dict(basis.directions)}


def _unpack_full(state: dict[str, Any], weights: Weights, combined: Combine) -> Weights:
    return {k: state["directions"][k].detach().to(w, copy=True) for k, w in weights.items()}


def _pack_half(basis: NystromBasis) -> dict[str, Any]:
    rounded = {k: _rounded(v) for k, v in basis.directions.items()}
    return {
        "directions": {k: v for k, (v, _) in rounded.items()},
        "scales": {k: s for k, (_, s) in rounded.items()},
    }


def _rounded(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return directions (K, *shape) in 2 bytes a number, and the scale (K,) that each is to be multiplied by.

    Divided by their largest entry, numbers of float16 have 11 significant bits where it matters; bfloat16 has 8.
    """
    scales = torch.ones(len(directions), dtype=torch.float32, device=directions.device)
    if directions.element_size() <= 2:
        return directions, scales.cpu()
    if directions[:1].numel():  # the largest of no entries has no value
        largest = flat(directions).abs().amax(1)
        scales = torch.where(largest > 0, largest, 1.0).float()
    return (directions / _column(scales, directions)).half(), scales.cpu()


def _unpack_half(state: dict[str, Any], weights: Weights, combined: Combine) -> Weights:
    def scaled(rounded: Tensor, scales: Tensor, weight: Tensor) -> Tensor:
        # float16 differs from the float32 of the scales, and a bfloat16 weight's rows have no scale.
        values = rounded.to(weight.device).to(weight.dtype, copy=True)
        return values.mul_(_column(scales, values))

    directions, scales = state["directions"], state["scales"]
    return _orthonormalised({k: scaled(directions[k], scales[k], w) for k, w in weights.items()})


def _column(scales: Tensor, directions: Tensor) -> Tensor:
    return scales.to(directions).view(-1, *[1] * (directions.ndim - 1))


def _orthonormalised(directions: Weights) -> Weights:
    r"""Return :math:`V (V^T V)^{-1/2}`: of the orthonormal directions with this span, those nearest to V."""
    if any(v.element_size() <= 2 for v in directions.values()):  # no rotation removes their rounding
        return directions
    values, vectors = torch.linalg.eigh(overlaps(directions))
    root = (vectors / values.sqrt()) @ vectors.T
    return {k: torch.empty_like(v).copy_(torch.tensordot(root.to(v), v, 1)) for k, v in directions.items()}


def _pack_landmarks(basis: NystromBasis) -> dict[str, Any]:
    if basis.landmarks is None or basis.coefficients is None:
        raise ValueError(
            "directions='landmarks' needs the landmarks that the directions were made of, and this basis has none: it "
            "was restored from a state with directions, or its gradient rows were spilled in a lower precision. "
            "Use directions='half' or 'full', or fit again."
        )
    distinct = {id(x): x for x in basis.landmarks.inputs}  # an input may occur with several of its outputs
    places = {key: i for i, key in enumerate(distinct)}
    which = [places[id(x)] for x in basis.landmarks.inputs]
    return {
        "inputs": [packed(x) for x in distinct.values()],
        "which": torch.tensor(which, dtype=torch.int64, device="cpu"),
        "outputs": basis.landmarks.outputs.cpu(),
        "coefficients": basis.coefficients.cpu(),
    }


def _unpack_landmarks(state: dict[str, Any], weights: Weights, combined: Combine) -> Weights:
    inputs = [state["inputs"][i] for i in state["which"].tolist()]
    return combined(inputs, state["outputs"].clone(), state["coefficients"].clone())


_WAYS: dict[str, tuple[Callable[[NystromBasis], dict[str, Any]], Callable[..., Weights]]] = {
    "full": (_pack_full, _unpack_full),
    "half": (_pack_half, _unpack_half),
    "landmarks": (_pack_landmarks, _unpack_landmarks),
}
# The entries of each.
LAYOUTS = {
    "full": {"directions"},
    "half": {"directions", "scales"},
    "landmarks": {"inputs", "which", "outputs", "coefficients"},
}
STORED = tuple(_WAYS)


def overlaps(directions: Weights) -> Tensor:
    """Return :math:`V^T V` (K, K), float64."""
    return overlaps_by_weight(directions).sum(0)
