r"""What can be tuned without another pass over the data."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

# Numbers of directions that are tried, and priced, if nobody names others.
USUAL_RANKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


@dataclass(frozen=True)
class Setting:
    r"""One value of everything that can be tuned without another pass over the data.

    An estimator has one, with tensors; the candidates of a search are others, with numbers.

    Attributes
    ----------
    temperature : float
        T.
    prior_precision : float, Tensor or None
        :math:`\delta`. Among candidates, None stands for a prior of several values, which stays as it is.
    logit_scale : float
        s.
    residual_scale : float
        :math:`\rho`.
    n_eigenvalues : int or None
        K', how many of the leading directions are used (``n_directions`` of an estimator); None: all.
    curvature_size : int or None
        n, from how many inputs G is estimated; None: as in the fit.
    sigma_noise : float or Tensor
        :math:`\sigma`; where outputs differ in it, its geometric mean.
    class_scales, class_biases : tuple of float, or None
        w and b (C,): the mean of the logits is w s f + b. None: 1 and 0.
    """

    temperature: Any
    prior_precision: Any
    logit_scale: Any
    residual_scale: Any
    n_eigenvalues: int | None
    curvature_size: int | None
    sigma_noise: Any
    class_scales: Any = None
    class_biases: Any = None

    def at(self, **values: Any) -> Setting:
        """Return the setting with other values of some parameters."""
        return replace(self, **values)

    def scaled(self, f: Tensor) -> Tensor:
        """Return w s f + b, the mean of the logits (..., C) that a network's outputs f stand for."""
        f = f * self.logit_scale
        if self.class_scales is not None:
            f = f * torch.as_tensor(self.class_scales, dtype=f.dtype, device=f.device)
        if self.class_biases is not None:
            f = f + torch.as_tensor(self.class_biases, dtype=f.dtype, device=f.device)
        return f

    @property
    def curvature_factor(self) -> Tensor:
        r""":math:`h = 1 / (\sigma^2 T)`, by which the curvature is multiplied, float64."""
        # The square of a small noise underflows in float32.
        return 1 / self.sigma_noise.double().square() / self.temperature

    def to(self, device: torch.device, dtype: torch.dtype) -> Setting:
        """Return the setting with its tensors in another place."""
        return self.at(
            prior_precision=self.prior_precision.to(device, dtype),
            sigma_noise=self.sigma_noise.to(device, dtype),
        )

    def detached(self) -> Setting:
        """Return the setting without graphs of its tensors."""
        return self.at(prior_precision=self.prior_precision.detach(), sigma_noise=self.sigma_noise.detach())

    def rounded(self, like: Setting) -> Setting:
        """Return a candidate with tensors, rounded as those of an estimator's setting are."""

        def number(value: Any, other: Tensor) -> Tensor:
            if isinstance(value, Tensor):
                return value.to(other.device)
            return torch.tensor(value, dtype=other.dtype, device=other.device)

        prior = self.prior_precision
        return self.at(
            prior_precision=like.prior_precision
            if prior is None
            else number(prior, like.prior_precision).reshape(-1),
            sigma_noise=number(self.sigma_noise, like.sigma_noise),
        )


SETTING_NAMES = tuple(f.name for f in fields(Setting))
# Of each output one number, signed ones among them: tuned by gradients, without grids.
PER_CLASS = ("class_scales", "class_biases")
