r"""The posterior: a fit, a setting and a residual, and what follows from the three.

The weights are :math:`\theta^* + V z` with :math:`z \sim N(0, A^{-1})`,
:math:`A = G / (\sigma^2 T) + V^T \Delta V`. An estimator holds one :class:`Posterior`, replaces it as a whole, and hands
the one it has to a call when the call begins: whatever other threads assign meanwhile, the call sees one state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..data.checks import check_positive
from ..nystrom.basis import NystromBasis
from .checks import checked_noise
from .fit import Fit
from .gaussian import Linearised, Outputs, log_det, posterior_scale
from .kept import Memory
from .likelihoods import Likelihood
from .residual import RESIDUALS, Residual
from .setting import Setting
from .variances import VARIANCES, WITH_SIZE, simple_outputs


@dataclass(frozen=True, eq=False)
class Posterior:
    r"""A Gaussian over the K coordinates of the weights, and what it needs to predict.

    Attributes
    ----------
    likelihood : Likelihood
    setting : Setting
        The setting, with prior precision and noise as tensors.
    prior_mean : Tensor
        (), (1,) or (P,).
    residual : Residual
    residual_samples : int
        How many random tangents the isotropic residual is made from.
    seed : int
    temperature_fixed : bool
        Whether tuning leaves T alone.
    current : Fit or None
        None before a fit.
    link : str or None
        The link that the setting was tuned for, by which calls predict that name none.
    variance : str
        Where the variance of predictions comes from, one of :data:`laplace_ella.posterior.variances.VARIANCES`.
    prior_before : float or None
        The scalar prior precision in place of which tuning found the present one; None if that is the user's.
    """

    likelihood: Likelihood
    setting: Setting
    prior_mean: Tensor
    residual: Residual = RESIDUALS["none"]
    residual_samples: int = 4
    seed: int = 0
    temperature_fixed: bool = False
    current: Fit | None = None
    link: str | None = None
    variance: str = "ella"
    prior_before: float | None = None
    # What all posteriors of one estimator share: tangents, and a basis of leading directions; and what was made of this one.
    shared: Memory = field(default_factory=Memory, repr=False)
    _kept: Memory = field(default_factory=Memory, init=False, repr=False)

    @classmethod
    def unfitted(cls, likelihood: Likelihood, residual: Residual) -> Posterior:
        """Return what an estimator starts with."""
        one = torch.ones(1, dtype=torch.float32, device="cpu")
        return cls(likelihood, Setting(1.0, one, 1.0, 1.0, None, None, one[0]), 0 * one[0], residual)

    @property
    def fit(self) -> Fit:
        """What the fit left."""
        assert self.current is not None
        return self.current

    @property
    def in_weights(self) -> bool:
        """Whether functions are drawn outside the span too, by weights."""
        return self.residual.in_weights and self.variance == "ella"

    @property
    def sigma_noise(self) -> Tensor:
        """The observation noise: (), or (C,) where outputs differ in it."""
        return self.likelihood.noise(self.setting.sigma_noise)

    @property
    def rank(self) -> int:
        """K', how many directions are used."""
        return self.setting.n_eigenvalues or self.fit.basis.rank

    def prior_replaced_by(self, new: float | None) -> float | None:
        """Return the scalar prior precision before tuning, once it finds a new one; None if that is the new one."""
        before = self.plain.prior_precision if self.prior_before is None else self.prior_before
        return None if before == new else before

    def link_for(self, given: Any, pred_type: Any = "glm") -> Any:
        """Return the link that a call names, or else the one of sampled weights, or that the setting was tuned for."""
        if given is not None:
            return given
        return "mc" if isinstance(pred_type, str) and pred_type == "nn" else self.link or "probit"

    @property
    def basis(self) -> NystromBasis:
        """The K' directions that are used, which lie in the memory of all K."""
        whole, rank = self.fit.basis, self.rank
        if rank == whole.rank:
            return whole
        # The same object at every call, as what is prepared of directions is kept for as long as they are.
        return self.shared("basis", lambda: whole.leading(rank), (rank,), whole.directions.values())

    @property
    def used(self) -> Fit:
        """The fit within the directions that are used."""
        return self.fit if self.rank == self.fit.basis.rank else self.fit.within(self.basis)

    @property
    def plain(self) -> Setting:
        """The setting in numbers, with the rank and the number of curvature inputs."""
        s = self.setting
        return s.at(
            prior_precision=float(s.prior_precision) if s.prior_precision.numel() == 1 else None,
            n_eigenvalues=self.rank,
            curvature_size=s.curvature_size or self.fit.n_curvature,
            sigma_noise=float(s.sigma_noise),
        )

    def at(self, candidate: Setting) -> Posterior:
        """Return the posterior with a candidate's setting, rounded as an estimator's attributes are."""
        return replace(self, setting=candidate.rounded(self.setting))

    def using(self, rank: int | None) -> Posterior:
        """Return the posterior with the leading K' directions; None: all of them."""
        # Copies of an estimator, each with a K' of its own, each keep what is made of their directions.
        return replace(self, setting=self.setting.at(n_eigenvalues=rank), shared=Memory())

    def fitted(self, fit: Fit | None) -> Posterior:
        """Return the posterior of another fit, which uses all directions unless they are those of this one."""
        before = self.current
        same = fit is not None and before is not None and fit.basis is before.basis
        return replace(self if same else self.using(None), current=fit)

    def to(self, device: torch.device, dtype: torch.dtype) -> Posterior:
        """Return the posterior on another device; the same object if it is there."""
        place = self.setting.prior_precision
        if (place.device, place.dtype) == (device, dtype):
            return self
        return replace(
            self,
            setting=self.setting.to(device, dtype),
            prior_mean=self.prior_mean.to(device, dtype),
            current=None if self.current is None else self.current.to(device),
            shared=Memory(),  # what there is lies where the model was
        )

    def detached(self) -> Posterior:
        """Return the posterior without the graphs of its setting, which deepcopy refuses."""
        return replace(self, setting=self.setting.detached(), prior_mean=self.prior_mean.detach())

    def with_variance(self, kind: str) -> Posterior:
        """Return the posterior with another variance; a temperature that was tuned for what it means no more is 1 again."""
        means_another = kind != self.variance and not {kind, self.variance}.isdisjoint(WITH_SIZE)
        is_lost = means_another and not self.temperature_fixed
        return replace(
            self, variance=kind, setting=self.setting.at(temperature=1.0) if is_lost else self.setting
        )

    # ------------------------------------------------------------------ the K coordinates

    @property
    def curvature(self) -> Tensor:
        """G (K', K'), float64."""
        return self.fit.curvature(self.setting.curvature_size, self.setting.n_eigenvalues)

    @property
    def prior(self) -> Tensor:
        r""":math:`V^T \Delta V` (K', K'), float64; differentiable."""
        projected = self.fit.basis.project_precision(self.setting.prior_precision)
        return projected[: self.rank, : self.rank]

    @property
    def curvature_factor(self) -> Tensor:
        r""":math:`h = 1 / (\sigma^2 T)`, float64; where T is the size of another variance, it divides no curvature."""
        factor = self.setting.curvature_factor
        return factor * self.setting.temperature if self.variance in WITH_SIZE else factor

    @property
    def precision(self) -> Tensor:
        """A (K', K'), float64; differentiable in prior precision, noise and temperature."""
        return self.curvature_factor * self.curvature + self.prior

    @property
    def scale(self) -> Tensor:
        """S (K', K') with S S^T the covariance, float64, without a graph.

        Computed again if prior, noise, G or directions have changed in place.

        Raises
        ------
        ValueError
            If prior precision or noise have got a value that would have been refused.
        """
        s = self.setting
        small = (s.prior_precision, s.sigma_noise, self.curvature_factor.detach(), self.curvature)
        # The directions enter through V^T Delta V.
        large = self.fit.basis.directions.values() if s.prior_precision.numel() > 1 else ()
        return self._kept("scale", self._scale, small, large)

    @property
    def covariance(self) -> Tensor:
        r""":math:`A^{-1}` (K', K'), float64."""
        return self.scale @ self.scale.T

    @torch.inference_mode(False)  # it is kept, and may meet a graph later
    @torch.no_grad()
    def _scale(self) -> Tensor:
        check_positive("prior_precision", self.setting.prior_precision)
        checked_noise(self.setting.sigma_noise, self.likelihood, self.setting.sigma_noise)
        return posterior_scale(self.precision)

    # ------------------------------------------------------------------ outputs

    @property
    def residual_variance(self) -> float:
        r""":math:`\rho / \delta`, the variance of each weight outside the span; 0 without a residual."""
        return float(self.residual.variance(self.setting.residual_scale, self.setting.prior_precision))

    def outputs(self, seen: Linearised) -> Outputs:
        """Return the Gaussian over the outputs of a linearised model; without a graph of the setting."""
        if (simple := VARIANCES[self.variance]) is not None:
            return simple_outputs(seen, self.setting, simple)
        return seen.outputs(self.scale, self.setting.scaled, self.residual_variance)

    def differentiable(self) -> Callable[[Linearised], Outputs]:
        """Return what :meth:`outputs` does, with graphs of the parameters of the setting."""
        s, scale = self.setting, posterior_scale(self.precision)
        variance: Any = self.residual.variance(s.residual_scale, s.prior_precision)
        return lambda seen: seen.outputs(scale, s.scaled, variance)

    # ------------------------------------------------------------------ evidence

    @property
    def log_likelihood(self) -> Tensor:
        """Log likelihood of the training data."""
        s, fit = self.setting, self.fit
        normaliser = fit.n_predictions * fit.n_outputs * self.likelihood.log_normaliser(s.sigma_noise)
        return -self.curvature_factor * fit.loss - normaliser

    @property
    def log_det_prior_precision(self) -> Tensor:
        r"""Log determinant of :math:`V^T \Delta V`."""
        return log_det(self.prior)

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """Log determinant of A."""
        return log_det(self.precision)

    @property
    def log_det_ratio(self) -> Tensor:
        """Log determinant of A, less that of the prior precision."""
        return self.log_det_posterior_precision - self.log_det_prior_precision

    @property
    def scatter(self) -> Tensor:
        r""":math:`(\theta^* - \mu_0)^T \Delta (\theta^* - \mu_0)`."""
        prior, difference = self.setting.prior_precision, self.fit.mean - self.prior_mean
        if 1 < len(prior) < len(difference):
            sizes = [math.prod(v.shape[1:]) for v in self.fit.basis.directions.values()]
            prior = prior.repeat_interleave(torch.tensor(sizes, dtype=torch.int64, device=prior.device))
        return (difference * prior) @ difference

    @property
    def log_evidence(self) -> Tensor:
        """The evidence of the model confined to the K directions; differentiable in prior precision and noise."""
        return self.log_likelihood - 0.5 * (self.log_det_ratio + self.scatter)
