r"""The Gaussian over the K coordinates of the weights, and what it says about outputs.

The weights are :math:`\theta^* + V z` with :math:`z \sim N(0, A^{-1})`. Everything is
expressed with one root: :math:`A^{-1} = S S^T`, and *whitened* features
:math:`\psi = \phi S`, whose inner products are covariances.

:class:`Linearised` is what is known of the model at some inputs, whatever the prior,
noise and temperature; :class:`Outputs` is the Gaussian that a posterior makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """Run a function in the precision of its tensors: products of variances overflow in fp16.

    The first argument, a tensor or an object of tensors, has a ``device``.
    """

    @wraps(function)
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        kind = first.device.type
        if not torch.is_autocast_enabled(
            kind
        ):  # as for nearly all, and entering a context takes longer than a product
            return function(first, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(first, *args, **kwargs)

    return run  # type: ignore[return-value]


class NotPositiveDefiniteError(torch.linalg.LinAlgError):
    """A precision is not positive definite, so that no Gaussian has it."""


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


# How many features are turned into predictions at a time.
BLOCK = 2**22


@dataclass(frozen=True)
class Outputs:
    r"""A Gaussian over the outputs of B inputs.

    The covariance of outputs at x and x' is
    :math:`\psi \psi'^T + \langle u, u' \rangle I + b b^T`, where b is known for x = x' only.

    Attributes
    ----------
    mean : Tensor (B, C)
    psi : Tensor (B, C, R)
        Whitened features.
    isotropic : Tensor (B, D), optional
        u, which gives every output the same variance more.
    block : Tensor (B, C, C), optional
        b, a root, so that no variance is negative.
    """

    mean: Tensor
    psi: Tensor
    isotropic: Tensor | None = None
    block: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.mean.device

    @property
    def noise_dimension(self) -> int:
        """How many standard normal numbers a sample of one input takes."""
        more = self.isotropic is not None or self.block is not None
        return self.psi.shape[-1] + more * self.mean.shape[-1]

    @property
    def extra_variance(self) -> Tensor:
        """The variance (B, 1) of the isotropic part, where there is one."""
        assert self.isotropic is not None
        return self.isotropic.square().sum(-1, keepdim=True)

    @property
    def variance(self) -> Tensor:
        """The variance (B, C) of each output; no C x C matrix."""
        out = self.psi.square().sum(-1)
        if self.isotropic is not None:
            out = out + self.extra_variance
        return out if self.block is None else out + self.block.square().sum(-1)

    @without_autocast
    def covariance(self) -> Tensor:
        """Return the covariance (B, C, C) of each input's outputs."""
        out = self.psi @ self.psi.mT
        if self.isotropic is not None:
            out = out + torch.diag_embed(self.extra_variance.expand_as(self.mean))
        return out if self.block is None else out + self.block @ self.block.mT

    @without_autocast
    def joint_covariance(self) -> Tensor:
        """Return the covariance (BC, BC) of all inputs' outputs, input-major; ``block`` is left out."""
        flat = self.psi.flatten(0, 1)
        out = flat @ flat.T
        if self.isotropic is None:
            return out
        identity = torch.eye(self.mean.shape[-1], dtype=out.dtype, device=out.device)
        return out + torch.kron(self.isotropic @ self.isotropic.T, identity)

    @without_autocast
    def covariance_with_sum(self) -> Tensor:
        """Return the covariance (B, C) of each output with the sum of the outputs."""
        out = torch.einsum("bck,bk->bc", self.psi, self.psi.sum(1))
        if self.isotropic is not None:
            out = out + self.extra_variance
        return out if self.block is None else out + torch.einsum("bcd,bd->bc", self.block, self.block.sum(1))

    def sum_variance(self) -> Tensor:
        """Return the variance (B, 1) of the sum of the outputs, without cancellation in the span."""
        out = self.psi.sum(1).square().sum(-1, keepdim=True)
        if self.isotropic is not None:
            out = out + self.mean.shape[-1] * self.extra_variance
        return out if self.block is None else out + self.block.sum(1).square().sum(-1, keepdim=True)

    @without_autocast
    def samples(self, noise: Tensor) -> Tensor:
        """Return samples (S, B, C), each input's outputs correlated as they should.

        Parameters
        ----------
        noise : Tensor (S, :attr:`noise_dimension`)
            Shared by all inputs; inputs are jointly right in the span of the basis only.
        """
        noise = noise.to(self.psi)
        span, rest = noise[:, : self.psi.shape[-1]], noise[:, self.psi.shape[-1] :]
        out = functional_samples(self.mean, self.psi, span)
        if self.isotropic is not None:
            out = out + root_of(self.extra_variance) * rest[:, None]
        if self.block is not None:
            out = out + torch.einsum("bcd,sd->sbc", self.block, rest)
        return out

    def functions(self, noise: Tensor, rest: Tensor | None = None) -> Tensor:
        """Return samples (S, B, C) of functions, jointly right over all inputs; ``block`` is left out.

        Parameters
        ----------
        noise : Tensor (S, R)
        rest : Tensor (S, D, C), optional
            Needed where there is an isotropic part.
        """
        out = functional_samples(self.mean, self.psi, noise)
        if self.isotropic is None:
            return out
        assert rest is not None
        return out + torch.einsum("bd,sdc->sbc", self.isotropic, rest.to(self.isotropic))

    def independent_samples(self, noise: Tensor) -> Tensor:
        """Return samples (S, B, C) with the variances of the outputs and no correlation.

        Parameters
        ----------
        noise : Tensor broadcastable to (S, B, C)
        """
        return self.mean + root_of(self.variance) * noise.to(self.psi.dtype)


@dataclass(frozen=True)
class Linearised:
    r"""The model linearised at B inputs: what predictions need, under any posterior.

    Attributes
    ----------
    f : Tensor (B, C)
    phi : Tensor (B, C, K)
        Features.
    pushed : Tensor (B, C, S), optional
        :math:`J g_s`, of random tangents; their part outside the span makes the isotropic residual.
    kernel : Tensor (B, C, C), optional
        :math:`J J^T`, whose part outside the span is the exact residual.
    overlap : Tensor (K, S), optional
        :math:`V^T g_s` of these tangents.
    norms : Tensor (B,), optional
        Squared norms of what the last layer takes.
    """

    f: Tensor
    phi: Tensor
    pushed: Tensor | None = None
    kernel: Tensor | None = None
    overlap: Tensor | None = None
    norms: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.f.device

    def detached(self) -> Linearised:
        """Return the same without graphs."""
        found: dict[str, Any] = {k: None if v is None else v.detach() for k, v in vars(self).items()}
        return Linearised(**found)

    def blocks(self) -> list[Linearised]:
        """Cut the inputs into blocks with some millions of features: images have 10^5 positions."""
        size, step = len(self.f), max(1, BLOCK // max(1, self.phi[:1].numel()))
        return [self.of(slice(a, a + step)) for a in range(0, size, step)] if size > step else [self]

    def of(self, rows: Tensor | slice) -> Linearised:
        """Return what is known of some of the inputs, which a mask (B,) names, or a slice."""
        found: dict[str, Any] = {
            k: v if v is None or k == "overlap" else v[rows] for k, v in vars(self).items()
        }
        return Linearised(**found)

    def traces(self) -> tuple[Tensor, Tensor]:
        r"""Return the traces (B,) of :math:`J J^T` inside the span and outside of it, float64.

        The latter is computed from the kernel if there is one, and else estimated from the tangents.
        """
        with torch.autocast(self.device.type, enabled=False):
            inside = self.phi.double().square().sum((-1, -2))
            if self.kernel is None:
                return inside, self.f.shape[-1] * self.residual_vectors().double().square().sum(-1)
            trace = self.kernel.diagonal(dim1=-2, dim2=-1).sum(-1)
            return inside, (trace - inside).clamp_min(0)

    @property
    def residual_share(self) -> Tensor:
        r""":math:`1 - |\phi|^2 / \operatorname{tr} J J^T` (B,), in [0, 1], float64."""
        inside, outside = self.traces()
        return outside / (inside + outside).clamp_min(torch.finfo(torch.float64).tiny)

    def residual_vectors(self, rank: int | None = None) -> Tensor:
        r"""Return :math:`u = J (I - V V^T) g_s / \sqrt{S C}` (B, S C), for the leading directions."""
        assert self.pushed is not None
        assert self.overlap is not None
        dtype = torch.promote_types(self.pushed.dtype, torch.float32)
        inside = self.phi[..., :rank].to(dtype) @ self.overlap[:rank].to(dtype)
        outside = (self.pushed.to(dtype) - inside).flatten(1)
        return outside / outside.shape[1] ** 0.5

    @torch.no_grad()
    def residual_root(self, rank: int) -> Tensor:
        r"""Return b (B, C, C) with :math:`b b^T = J (I - V V^T) J^T`, for the leading directions.

        It has no graph, because the root of a matrix with equal eigenvalues has no derivative.
        """
        assert self.kernel is not None
        phi = self.phi[..., :rank].to(self.kernel.dtype)
        return positive_root(self.kernel - phi @ phi.mT)

    @without_autocast
    def outputs(
        self,
        scale: Tensor,
        scaled: Callable[[Tensor], Tensor] = lambda f: f,
        residual_variance: Any = 0.0,
    ) -> Outputs:
        r"""Return the Gaussian that a posterior makes of the outputs.

        Parameters
        ----------
        scale : Tensor (K', K')
            S with :math:`S S^T = A^{-1}`, for the leading K' directions.
        scaled : callable
            Outputs of the network -> mean of the outputs, which the covariance does not follow.
        residual_variance : float or Tensor ()
            :math:`\rho / \delta`.
        """
        rank = len(scale)
        psi = whiten(self.phi[..., :rank], scale)
        dtype = psi.dtype
        isotropic = block = None
        if self.pushed is not None:
            isotropic = finite((self.residual_vectors(rank) * residual_variance**0.5).to(dtype))
        if self.kernel is not None:
            block = finite((self.residual_root(rank) * residual_variance**0.5).to(dtype))
        return Outputs(finite(scaled(self.f.to(dtype))), psi, isotropic, block)


@without_autocast
def whiten(phi: Tensor, scale: Tensor) -> Tensor:
    r"""Return :math:`\psi = \phi S` (B, C, K), in float32 at least: squares overflow in fp16."""
    dtype = torch.promote_types(phi.dtype, torch.float32)
    scale = finite(scale.to(dtype))
    # Beyond it, a product could be a difference of infinities, which is NaN.
    limit = torch.finfo(dtype).max / (2 * len(scale) * scale.abs().amax().clamp_min(1))
    return phi.to(dtype).clamp(-limit, limit) @ scale


def finite(values: Tensor) -> Tensor:
    """Return the largest number there is for what overflows."""
    largest = torch.finfo(values.dtype).max
    return values.clamp(-largest, largest)


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


def root_of(variance: Tensor) -> Tensor:
    """Return the standard deviation, whose derivative is 0 where the variance is: that of the root is infinite."""
    positive = variance > 0
    return torch.where(positive, variance, torch.ones_like(variance)).sqrt() * positive


def positive_root(matrices: Tensor) -> Tensor:
    """Return B (..., C, C) with B B^T the nearest positive semi-definite matrices: what is negative is rounding."""
    values, vectors = torch.linalg.eigh(matrices)
    return vectors * values.clamp_min(0).sqrt()[..., None, :]


def positive_part(matrix: Tensor) -> Tensor:
    """Return the nearest positive semi-definite matrix."""
    root = positive_root(matrix)
    return root @ root.mT
