r"""Directions in a file: whole, in half precision, or as the landmarks and coefficients they are made of.

V takes K x P numbers, K times what the model takes. Half precision takes half of that or less. Landmarks and
coefficients take M inputs and M x K numbers, whatever P is, and V is computed from them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.landmarks import Landmarks
from ..data.packing import packed
from ..network.functional import Weights, flat
from .basis import NystromBasis
from .rows import gram

STORED = ("full", "half", "landmarks")


def pack_directions(basis: NystromBasis, stored: str) -> dict[str, Any]:
    """Return the directions as tensors and plain types that share no memory with the basis.

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
    if stored == "half":
        rounded = {k: _rounded(v) for k, v in basis.directions.items()}
        return {
            "directions": {k: v for k, (v, _) in rounded.items()},
            "scales": {k: s for k, (_, s) in rounded.items()},
        }
    if stored == "landmarks":
        return _pack_landmarks(basis)
    return {"directions": {k: v.detach().clone() for k, v in basis.directions.items()}}


def unpack_directions(
    state: dict[str, Any],
    weights: Weights,
    combined: Callable[[list[Any], Tensor, Tensor], Weights],
) -> Weights:
    """Return directions (K, *shape) on the devices of the weights; what the state holds is not shared.

    Parameters
    ----------
    state : dict
        What :func:`pack_directions` returned.
    weights : dict of Tensor
    combined : callable
        (packed inputs, output coordinates, coefficients) -> directions.
    """
    stored = state.get("stored", "full")
    if stored == "landmarks":
        inputs = [state["inputs"][i] for i in state["which"].tolist()]
        return combined(inputs, state["outputs"].clone(), state["coefficients"].clone())
    kept = state["directions"]
    if stored == "full":
        return {k: kept[k].detach().to(w, copy=True) for k, w in weights.items()}
    # float16 differs from the float32 of the scales, and a bfloat16 weight's rows have no scale.
    scaled = {k: _scaled(kept[k].to(w.device), state["scales"][k], w.dtype) for k, w in weights.items()}
    return orthonormalised(scaled)


def _rounded(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return directions (K, *shape) in 2 bytes a number, and the scale (K,) that each is to be multiplied by.

    Divided by their largest entry, numbers of float16 have 11 significant bits where it matters; bfloat16 has 8.
    """
    if directions.element_size() <= 2:
        return directions.detach().clone(), torch.ones(len(directions), dtype=torch.float32, device="cpu")
    # torch.abs().amax() of an axis without entries has no value.
    largest = (
        flat(directions).abs().amax(1) if directions[:1].numel() else directions.new_ones(len(directions))
    )
    scales = torch.where(largest > 0, largest, torch.ones_like(largest)).float()
    shape = -1, *[1] * (directions.ndim - 1)
    return (directions / scales.view(shape).to(directions)).half(), scales.cpu()


def _scaled(rounded: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    values = rounded.to(dtype, copy=True)
    return values.mul_(scales.to(values).view(-1, *[1] * (values.ndim - 1)))


def orthonormalised(directions: Weights) -> Weights:
    r"""Return :math:`V (V^T V)^{-1/2}`: of the orthonormal directions with this span, those nearest to V."""
    if any(v.element_size() <= 2 for v in directions.values()):  # whose rounding no rotation removes
        return directions
    products = overlaps(directions)
    values, vectors = torch.linalg.eigh(products)
    root = (vectors / values.sqrt()) @ vectors.T
    return {k: torch.empty_like(v).copy_(torch.tensordot(root.to(v), v, 1)) for k, v in directions.items()}


def overlaps(directions: Weights) -> Tensor:
    """Return :math:`V^T V` (K, K), float64."""
    device = next(iter(directions.values())).device
    return torch.stack([gram(flat(v), device) for v in directions.values()]).sum(0)


def _pack_landmarks(basis: NystromBasis) -> dict[str, Any]:
    if basis.landmarks is None or basis.coefficients is None:
        raise ValueError(
            "directions='landmarks' needs the landmarks that the directions were made of, and this basis has none: it "
            "was restored from a state with directions, or its gradient rows were spilled in a lower precision. "
            "Use directions='half' or 'full', or fit again."
        )
    places: dict[int, int] = {}  # an input may occur with several of its outputs
    for x in basis.landmarks.inputs:
        places.setdefault(id(x), len(places))
    distinct = {places[id(x)]: x for x in basis.landmarks.inputs}
    return {
        "inputs": [_copied(packed(distinct[i])) for i in range(len(distinct))],
        "which": torch.tensor(
            [places[id(x)] for x in basis.landmarks.inputs], dtype=torch.int64, device="cpu"
        ),
        "outputs": basis.landmarks.outputs.detach().cpu().clone(),
        "coefficients": basis.coefficients.detach().cpu().clone(),
    }


def _copied(entries: Any) -> Any:
    if isinstance(entries, Tensor):
        return entries.clone()
    if isinstance(entries, dict):
        return {k: _copied(v) for k, v in entries.items()}
    return type(entries)(map(_copied, entries)) if isinstance(entries, (list, tuple)) else entries


def landmarks_of(inputs: Sequence[Any], outputs: Tensor) -> Landmarks:
    """Return landmarks whose places in the training data are not known."""
    return Landmarks(list(inputs), outputs)


def orthonormal_within(eigenvalues: Tensor, eps: float) -> Tensor:
    r"""Return by how much each entry of :math:`V^T V` (K, K) of a fit may differ from the identity's.

    Directions are gradients divided by the roots of their eigenvalues, so that rounding grows with the ratio of
    the largest eigenvalue to theirs.
    """
    roots = (eigenvalues / eigenvalues[0]).sqrt()
    return 4 * math.sqrt(eps) + 100 * eps / torch.outer(roots, roots)
