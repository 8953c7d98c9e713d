r"""The Gaussian over the K coordinates of the weights, and what it says about outputs.

The weights are :math:`\theta^* + V z` with :math:`z \sim N(0, A^{-1})`. Everything is
expressed with one root: :math:`A^{-1} = S S^T`, and *whitened* features
:math:`\psi = \phi S`, whose inner products are covariances.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """Run a function of tensors in their own precision: products of variances overflow in fp16."""

    @wraps(function)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return run  # type: ignore[return-value]


class NotPositiveDefiniteError(torch.linalg.LinAlgError):
    """A precision that no Gaussian has."""


def posterior_scale(precision: Tensor) -> Tensor:
    r"""Factor a covariance: S (K, K) with :math:`S S^T = A^{-1}`, without inverting A.

    Raises
    ------
    NotPositiveDefiniteError
        If the precision is not positive definite.
    """
    factor = _cholesky(precision)
    identity = torch.eye(len(precision), dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(factor.mT, identity, upper=True)


def log_det(precision: Tensor) -> Tensor:
    """Return the log determinant of a positive definite matrix, differentiably."""
    return 2 * _cholesky(precision).diagonal().log().sum()


def _cholesky(precision: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(precision)
    if not precision.isfinite().all() or info.any():
        values = precision.detach().diagonal()
        raise NotPositiveDefiniteError(
            "The precision of the K coordinates is not finite and positive definite; its diagonal ranges from "
            f"{float(values.min()):.3e} to {float(values.max()):.3e}. Prior precision, noise and temperature "
            "must be of a size that floating point can hold next to the curvature."
        )
    return factor


@without_autocast
def whiten(phi: Tensor, scale: Tensor) -> Tensor:
    r"""Return :math:`\psi = \phi S` (B, C, K), in float32 at least: squares overflow in fp16."""
    dtype = torch.promote_types(phi.dtype, torch.float32)
    return phi.to(dtype) @ scale.to(dtype)


@without_autocast
def covariance(psi: Tensor) -> Tensor:
    """Return the covariance (B, C, C) of each input's outputs."""
    return psi @ psi.mT


@without_autocast
def joint_covariance(psi: Tensor) -> Tensor:
    """Return the covariance (BC, BC) of all inputs' outputs; input-major order."""
    flat = psi.flatten(0, 1)
    return flat @ flat.T


def variance(psi: Tensor) -> Tensor:
    """Return the variance (B, C) of each output; no C x C matrix."""
    return psi.square().sum(-1)


@without_autocast
def functional_samples(f: Tensor, psi: Tensor, noise: Tensor) -> Tensor:
    r"""Return :math:`f + \psi \epsilon` (S, B, C): one noise vector for all inputs.

    Parameters
    ----------
    f : Tensor (B, C)
    psi : Tensor (B, C, K)
    noise : Tensor (S, K)
        Jointly consistent over inputs, and never singular, whatever K and C are.
    """
    offsets = noise.to(psi.dtype) @ psi.flatten(0, 1).T
    return f + offsets.view(len(noise), *f.shape)


def independent_samples(f: Tensor, psi: Tensor, noise: Tensor) -> Tensor:
    """Return samples (S, B, C) with the variances of the outputs and no correlation.

    Parameters
    ----------
    noise : Tensor broadcastable to (S, B, C)
    """
    return f + variance(psi).sqrt() * noise.to(psi.dtype)
