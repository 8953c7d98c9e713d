r"""Prior precision, observation noise and temperature: checked when assigned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import validation


class Hyperparameters:
    """The numbers that may change after a fit; assigning one drops the cached posterior.

    A mixin: laplace-torch, next in line, stores prior precision and noise.
    """

    likelihood: str
    _prior_precision: Tensor
    _prior_mean: Tensor
    _sigma_noise: Tensor
    _temperature: float
    _temperature_fixed: bool
    _posterior_scale: Tensor | None

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
        self._temperature, self._temperature_fixed = number, value is not None
        self._posterior_scale = None

    @property
    def prior_precision(self) -> Tensor:
        """Delta: (1,), one per weight tensor (L,), or one per weight (P,)."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        validation.check_positive("prior_precision", value)
        value = value.clone() if isinstance(value, Tensor) else value
        validation.check_positive("prior_precision", torch.as_tensor(value).to(self._dtype))
        _host_setter(self, "prior_precision")(self, value)

    @property
    def sigma_noise(self) -> Tensor:
        """Observation noise, a standard deviation; 1 unless the likelihood is regression."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        self._check_noise(value)
        _host_setter(self, "sigma_noise")(self, value)

    def _check_noise(self, value: float | Tensor) -> None:
        validation.check_positive("sigma_noise", value)
        validation.check_scalar("sigma_noise", value)
        validation.check_positive("sigma_noise", torch.as_tensor(value).to(self._dtype))
        if self.likelihood != "regression" and float(value) != 1:
            raise ValueError(
                f"sigma_noise is for regression only and must be 1 for {self._likelihood_name!r}; got {value}."
            )

    @property
    def prior_mean(self) -> Tensor:
        """Prior mean: () or (1,), or one per weight (P,)."""
        return self._prior_mean

    @prior_mean.setter
    def prior_mean(self, value: float | Tensor) -> None:
        _host_setter(self, "prior_mean")(self, value)
        if not self._prior_mean.isfinite().all():
            raise ValueError(f"prior_mean must be finite in every entry; got {value}.")

    @property
    def _H_factor(self) -> Tensor:
        # float64: the square of a small noise underflows in float32
        return 1 / self.sigma_noise.double().square() / self.temperature

    @property
    def _likelihood_name(self) -> str:
        return str(getattr(self.likelihood, "value", self.likelihood))


def _host_setter(estimator: Hyperparameters, name: str) -> Callable[[Any, Any], None]:
    return getattr(super(Hyperparameters, type(estimator)), name).fset
