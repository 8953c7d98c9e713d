r"""Prior precision, observation noise and temperature: checked when assigned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data import validation
from ..nystrom.caching import outside_inference, without_inference
from .consistency import SWAP, Consistent, of_one_moment
from .residual import RESIDUALS


def curvature_factor(sigma_noise: Tensor, temperature: Any) -> Tensor:
    r"""Return :math:`1 / (\sigma^2 T)`, by which the curvature is multiplied, float64."""
    # The square of a small noise underflows in float32.
    return 1 / sigma_noise.double().square() / temperature


class Hyperparameters(Consistent):
    """The numbers that may change after a fit.

    A mixin: laplace-torch, next in line, stores prior precision and noise.
    """

    likelihood: str
    enable_backprop: bool
    shard_directions: bool
    n_layers: int
    n_params: int
    _device: torch.device
    _residual: str
    _logit_scale: float
    _residual_scale: float
    _prior_precision: Tensor
    _prior_mean: Tensor
    _sigma_noise: Tensor
    _temperature: float
    _temperature_fixed: bool

    @property
    def _dtype(self) -> torch.dtype:
        # fp16 holds no number above 65504, so hyperparameters of such models are fp32.
        return torch.promote_types(super()._dtype, torch.float32)  # type: ignore[misc]

    @property
    def temperature(self) -> float:
        """T, which divides the curvature; assigning it fixes it, None frees it at 1."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float | None) -> None:
        number = 1.0 if value is None else validation.positive_number("temperature", value)
        with SWAP:
            self._temperature, self._temperature_fixed = number, value is not None

    @property
    def temperature_fixed(self) -> bool:
        """Whether tuning leaves T alone."""
        return self._temperature_fixed

    @property
    def prior_precision(self) -> Tensor:
        """Delta: (1,), one per weight tensor (L,), or one per weight (P,)."""
        return self._prior_precision

    @prior_precision.setter
    @outside_inference()  # what is stored may meet a graph later
    def prior_precision(self, value: float | Tensor) -> None:
        validation.check_prior_precision("prior_precision", value, self.n_layers, self.n_params)
        validation.check_positive("prior_precision", self._rounded(value))
        validation.check_residual(self.residual, value, enable_backprop=False)
        validation.check_sharding(self.shard_directions, value, self.n_params, enable_backprop=False)
        _host_setter(self, "prior_precision")(self, value.clone() if isinstance(value, Tensor) else value)

    @property
    def sigma_noise(self) -> Tensor:
        """Observation noise, a standard deviation; 1 unless the likelihood is regression."""
        return self._sigma_noise

    @sigma_noise.setter
    @outside_inference()
    def sigma_noise(self, value: float | Tensor) -> None:
        self._check_noise(value)
        _host_setter(self, "sigma_noise")(self, without_inference(value))

    def _rounded(self, value: float | Tensor) -> Tensor:
        """Return a value as it would be stored."""
        return torch.as_tensor(value, dtype=self._dtype, device=self._device)

    def _check_noise(self, value: float | Tensor) -> None:
        validation.check_noise(value)
        validation.check_positive("sigma_noise", self._rounded(value))
        if self.likelihood != "regression" and float(value) != 1:
            raise ValueError(
                f"sigma_noise is for regression only and must be 1 for {self._likelihood_name!r}; got {value}."
            )

    @property
    def logit_scale(self) -> float:
        """s, by which the mean of the logits is multiplied, and not their covariance."""
        return self._logit_scale

    @logit_scale.setter
    def logit_scale(self, value: float) -> None:
        number = validation.positive_number("logit_scale", value)
        if number != 1 and self.likelihood not in ("classification", "bernoulli"):
            raise ValueError(
                f"logit_scale is for classification and bernoulli and must be 1 for {self._likelihood_name!r}; got {value}."
            )
        self._logit_scale = number

    @property
    def residual(self) -> str:
        """What is added for the directions outside the span: "none", "isotropic" or "exact"."""
        return self._residual

    @residual.setter
    def residual(self, value: str) -> None:
        validation.check_choice("residual", value, RESIDUALS)
        validation.check_residual(value, getattr(self, "_prior_precision", None), self.enable_backprop)
        self._residual = value

    @property
    def residual_scale(self) -> float:
        r"""rho: the residual variance is :math:`\rho / \delta` times what lies outside the span."""
        return self._residual_scale

    @residual_scale.setter
    def residual_scale(self, value: float) -> None:
        self._residual_scale = validation.positive_number("residual_scale", value)

    @property
    @of_one_moment
    def residual_variance(self) -> float:
        r""":math:`\rho / \delta`, the variance of each weight outside the span; 0 without a residual."""
        return 0.0 if self.residual == "none" else self.residual_scale / float(self.prior_precision)

    @property
    def prior_mean(self) -> Tensor:
        """Prior mean: () or (1,), or one per weight (P,)."""
        return self._prior_mean

    @prior_mean.setter
    @outside_inference()
    def prior_mean(self, value: float | Tensor) -> None:
        validation.check_prior_mean(value, self.n_params)
        validation.check_prior_mean(self._rounded(value), self.n_params)
        _host_setter(self, "prior_mean")(self, without_inference(value))

    @property
    def _H_factor(self) -> Tensor:
        return curvature_factor(self.sigma_noise, self.temperature)

    @property
    def _likelihood_name(self) -> str:
        return str(getattr(self.likelihood, "value", self.likelihood))


def _host_setter(estimator: Hyperparameters, name: str) -> Callable[[Any, Any], None]:
    return getattr(super(Hyperparameters, type(estimator)), name).fset
