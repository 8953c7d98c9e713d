"""The basis in which a Kronecker-factored curvature of laplace-torch is diagonal."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor


def eigenvalues(kron: Any) -> Tensor:
    """Return the eigenvalues (P,) of a ``KronDecomposed``: a block is one matrix, or a product of two."""
    return torch.cat([v[0] if len(v) == 1 else torch.outer(*v).flatten() for v in kron.eigenvalues])


def rotated(kron: Any, jacobians: Tensor) -> Tensor:
    """Return Jacobians (..., P) in the basis of the eigenvectors."""
    sizes = [prod(len(q) for q in of_block) for of_block in kron.eigenvectors]
    parts = zip(jacobians.split(sizes, -1), kron.eigenvectors)
    return torch.cat([_rotated(part, vectors) for part, vectors in parts], -1)


def _rotated(part: Tensor, vectors: Any) -> Tensor:
    if len(vectors) == 1:
        return part @ vectors[0]
    left, right = vectors
    return (left.mT @ part.unflatten(-1, (len(left), len(right))) @ right).flatten(-2)
