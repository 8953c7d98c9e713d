r"""What can be tuned without another pass over the data."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Setting:
    r"""One candidate.

    Attributes
    ----------
    temperature : float
        T.
    prior_precision : float or None
        :math:`\delta`; None stands for a vector prior, which stays as it is.
    logit_scale : float
        s.
    residual_scale : float
        :math:`\rho`.
    n_eigenvalues : int
        K', how many of the leading directions are used.
    curvature_size : int
        n, from how many inputs G is estimated.
    sigma_noise : float
        :math:`\sigma`.
    """

    temperature: Any
    prior_precision: Any
    logit_scale: Any
    residual_scale: Any
    n_eigenvalues: int
    curvature_size: int
    sigma_noise: Any

    def at(self, **values: Any) -> Setting:
        """Return the setting with other values of some parameters."""
        return replace(self, **values)


SETTING_NAMES = tuple(f.name for f in fields(Setting))
