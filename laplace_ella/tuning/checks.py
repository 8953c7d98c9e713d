r"""Checks of what tuning is given: the loss, the grid, the parameters to search and their values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..data.checks import check_choice, number, positive_number, shown
from ..data.notices import warn_user
from ..posterior.posterior import Posterior
from ..posterior.setting import PER_CLASS

# The largest logarithm of a prior precision that single precision holds, with room for products.
LARGEST_LOGARITHM = 87.0


def check_loss(loss: Any) -> None:
    """Require a callable (a metric is one) that is minimised, or None."""
    if loss is not None and (not callable(loss) or isinstance(loss, type)):
        raise ValueError(f"loss must be a torchmetrics.Metric or a callable; got {shown(loss)}.")
    if getattr(loss, "higher_is_better", None) is True:
        raise ValueError(
            f"loss is minimised, and {type(loss).__name__} is better when higher. Pass a callable that negates it, "
            "as lambda p, y: -metric(p, y)."
        )
    if isinstance(loss, (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)):
        warn_user(
            f"loss receives probabilities, and {type(loss).__name__} expects logits. Leave loss out for the NLL, or "
            "pass a callable of (probabilities, targets)."
        )


def check_interval(low: Any, high: Any, base: Any, size: int, is_searched: bool) -> list[float]:
    """Return the exponents of a grid, which must ascend if the grid is searched, and their base, as floats."""
    ends = [number("log_prior_prec_min", low), number("log_prior_prec_max", high)]
    if positive_number("log_prior_prec_base", base) == 1:
        raise ValueError("log_prior_prec_base must be a positive finite number other than 1; got 1.")
    if is_searched and size > 1 and not ends[0] < ends[1]:
        raise ValueError(
            f"log_prior_prec_min must be smaller than log_prior_prec_max; got {low} and {high}. Exchange them."
        )
    for name, end in zip(("log_prior_prec_min", "log_prior_prec_max"), ends):
        if abs(end * math.log(base)) > LARGEST_LOGARITHM:
            raise ValueError(
                f"{name} must be the exponent of a number that single precision holds; got {base} to the power of {end}."
            )
    return [*ends, float(base)]


def by_name(name: str, value: Any) -> dict[str, Any]:
    """Return a list of names, or a mapping whose keys are names, as a dict."""
    if isinstance(value, str):
        raise ValueError(f"{name} must be a list of names; got {value!r}. Write [{value!r}].")
    names = list(value) if isinstance(value, Iterable) else None
    if names is None or not all(isinstance(v, str) for v in names):
        got = shown(value if names is None else names)
        raise ValueError(f"{name} must be a list of names, or a mapping with such keys; got {got}.")
    return dict(value) if isinstance(value, Mapping) else dict.fromkeys(names)


def check_search(given: Mapping[str, Any], allowed: Iterable[str], posterior: Posterior) -> None:
    """Require parameters that exist, and that a posterior has."""
    if not given:
        raise ValueError(
            f"search must name at least one parameter of {list(allowed)}; got none. A temperature that was given "
            "as a number is fixed: set la.temperature = None to free it."
        )
    for name in given:
        check_choice("A parameter to search", name, allowed)
    likelihood, temperature = posterior.likelihood, posterior.setting.temperature
    reasons = {
        "temperature": posterior.temperature_fixed
        and f"the temperature was fixed at {temperature:.4g}; set la.temperature = None to free it",
        "logit_scale": not likelihood.has_logits and f"likelihood={likelihood.name!r} has no logits to scale",
        **dict.fromkeys(
            PER_CLASS, not likelihood.has_logits and f"likelihood={likelihood.name!r} has no logits to scale"
        ),
        "sigma_noise": not likelihood.has_noise
        and f"likelihood={likelihood.name!r} has no observation noise",
        "residual_scale": not posterior.residual.adds and "residual='none' has no residual variance",
    }
    for name, reason in reasons.items():
        if name in given and reason:
            raise ValueError(f"{name} cannot be searched: {reason}. Leave it out of search.")


def check_no_values(name: str, values: Any) -> None:
    """Require no values of a parameter that has none to choose among."""
    if values is not None:
        raise ValueError(
            f"{name} are found by gradients, not among values; they must be None in search, got {shown(values)}."
        )


def check_values(name: str, values: Any, allowed: list[int] | None) -> list[Any]:
    """Require values of a parameter: positive numbers, or some of those that are allowed."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"The values of {name} to search must be a sequence, or None; got {shown(values)}.")
    values = list(values)
    if not values:
        raise ValueError(
            f"The values of {name} to search are empty; give at least one, or None for the default."
        )
    if allowed is None:
        return [positive_number(f"A value of {name}", v) for v in values]
    wrong = [v for v in values if v not in allowed]
    if wrong:
        raise ValueError(
            f"The values of {name} must be among {allowed}; got {wrong}. Fit again for more than this fit has."
        )
    return [int(v) for v in values]
