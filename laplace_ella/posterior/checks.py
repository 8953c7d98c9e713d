r"""Checks of the posterior's setting, and of what is asked of a prediction, made before any work."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.checks import (
    check_choice,
    check_flag,
    check_numbers,
    check_positive,
    check_size,
    number,
    positive_number,
    shown,
)
from .likelihoods import LIKELIHOODS, Likelihood
from .links import LINKS
from .residual import RESIDUALS, Residual
from .setting import PER_CLASS, Setting

NO_DENSITY = (
    "ELLA's posterior lives on the K directions around the weights and has no density over all P weights. "
    "Use sample(), functional_samples() or log_marginal_likelihood()."
)


class NonFiniteSamplesError(ValueError):
    """Outputs at sampled weights are NaN or infinite."""


# ---------------------------------------------------------------------------- the setting


def as_prior(value: Any) -> Any:
    """Return a sequence of numbers as a tensor, and anything else as it is."""
    is_sequence = isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0
    if is_sequence and all(isinstance(v, Real) for v in value):
        return torch.as_tensor(value, dtype=torch.float64, device="cpu")
    return value


def check_prior_precision(name: str, value: Any, n_layers: int, n_params: int) -> None:
    """Require a positive number, or a tensor of 1, L or P of them."""
    what = (
        f"a positive finite number, or a tensor of 1, of {n_layers} (one per weight tensor that requires grad) or of "
        f"{n_params} values (one per weight)"
    )
    check_numbers(name, value, what, (1, n_layers, n_params))


def check_prior_mean(value: Any, n_params: int) -> None:
    """Require a finite number, or a tensor of 1 or P of them."""
    what = f"a finite number, or a tensor of 1 or of {n_params} finite values (one per weight)"
    check_numbers("prior_mean", value, what, (1, n_params), positive=False)


def check_noise(value: Any) -> None:
    """Require a positive number, or a tensor of one, or of one for each output."""
    several = max(1, value.numel()) if isinstance(value, Tensor) else 1
    check_numbers(
        "sigma_noise", value, "a positive finite number, or a tensor of one or one per output", (several,)
    )


def check_kinds(
    likelihood: Any, residual: Any, prior_precision: Any, sigma_noise: Any, enable_backprop: bool
) -> None:
    """Require a likelihood and a residual that are known, with a prior that they work with."""
    check_choice("likelihood", likelihood, LIKELIHOODS)
    check_choice("residual", residual, RESIDUALS)
    RESIDUALS[residual].check(prior_precision, enable_backprop)
    check_noise(sigma_noise)


def checked_noise(value: Any, likelihood: Likelihood, like: Tensor) -> tuple[Tensor, Likelihood]:
    """Return the scale () of an observation noise, and the likelihood that has it.

    The scale of several is their geometric mean.
    """
    check_noise(value)
    stored = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    check_positive("sigma_noise", stored)
    if not likelihood.has_noise and (stored.numel() > 1 or stored != 1):
        raise ValueError(
            f"sigma_noise is for regression only and must be 1 for {likelihood.name!r}; got {value}."
        )
    scale = stored.reshape(()) if stored.numel() == 1 else stored.double().log().mean().exp().to(stored.dtype)
    return scale, likelihood.with_noise(stored)


def check_ratios(likelihood: Likelihood, fitted: Likelihood) -> None:
    """Require noise whose ratios are those that a fit was made with."""
    mine, theirs = (list(v.options.values()) for v in (likelihood, fitted))
    if np.shape(mine) != np.shape(theirs) or not np.allclose(mine, theirs, rtol=1e-5):
        raise ValueError(
            "The ratios of sigma_noise between outputs enter loss and curvature of a fit, so that it can be changed as a "
            f"whole only, as in la.sigma_noise = 2 * la.sigma_noise; the fit has {fitted.options or 'the same for all'}, and "
            f"what was given has {likelihood.options or 'the same for all'}. Build an estimator with it, and fit that."
        )


def check_noise_is_tunable(likelihood: Likelihood) -> None:
    """Require a likelihood with observation noise."""
    if not likelihood.has_noise:
        raise ValueError(
            f"sigma_noise can be changed for regression only; the likelihood is {likelihood.name!r}. Leave it out."
        )


def checked_logit_scale(value: Any, likelihood: Likelihood) -> float:
    """Return a scale of the logits."""
    number = positive_number("logit_scale", value)
    if number != 1 and not likelihood.has_logits:
        raise ValueError(
            f"logit_scale is for classification and bernoulli and must be 1 for {likelihood.name!r}; got {value}."
        )
    return number


def checked_classes(
    name: str, value: Any, likelihood: Likelihood, positive: bool
) -> tuple[float, ...] | None:
    """Return scales or biases of the logits, one for each class or label, or None."""
    if value is None:
        return None
    kind = "positive finite" if positive else "finite"
    values = value.detach() if isinstance(value, Tensor) else value
    is_sequence = isinstance(values, (list, tuple)) or getattr(values, "ndim", 0) == 1
    if not is_sequence or len(values) == 0:
        raise ValueError(
            f"{name} must be a sequence of {kind} numbers, one for each output, or None; got {shown(value)}."
        )
    numbers = tuple(number(f"An entry of {name}", v, f"a {kind} number", positive) for v in _listed(values))
    if not likelihood.has_logits:
        raise ValueError(
            f"{name} is for classification and bernoulli and must be None for {likelihood.name!r}; got {shown(value)}."
        )
    return numbers


def _listed(values: Any) -> Any:
    return values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values


def check_classes(setting: Setting, n_outputs: int) -> None:
    """Require as many scales and biases of the logits as there are outputs."""
    for name in PER_CLASS:
        values = getattr(setting, name)
        if values is not None and len(values) != n_outputs:
            raise ValueError(
                f"{name} must hold one number for each of the model's {n_outputs} outputs; got {len(values)}. "
                f"Set la.{name} = None to do without."
            )


def checked_prior_precision(
    value: Any, residual: Residual, n_layers: int, n_params: int, sharded: bool, like: Tensor
) -> Tensor:
    """Return a prior precision as it is stored: (1,), (L,) or (P,)."""
    check_prior_precision("prior_precision", value, n_layers, n_params)
    own = value.clone() if isinstance(value, Tensor) else value
    stored = torch.as_tensor(own, dtype=like.dtype, device=like.device).reshape(-1)
    check_positive("prior_precision", stored)
    residual.check(value, enable_backprop=False)
    check_sharding(sharded, value, n_params, enable_backprop=False)
    return stored


def checked_prior_mean(value: Any, n_params: int, like: Tensor) -> Tensor:
    """Return a prior mean as it is stored: (), (1,) or (P,)."""
    check_prior_mean(value, n_params)
    stored = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    check_prior_mean(stored, n_params)
    return stored.reshape(-1) if isinstance(value, Tensor) else stored


def check_sharding(sharded: Any, prior_precision: Any, n_params: int, enable_backprop: bool) -> None:
    """Require what directions that are spread over ranks need: no graph, and no prior for every weight."""
    if check_flag("shard_directions", sharded) and enable_backprop:
        raise ValueError(
            "shard_directions=True sends features between processes, which no graph crosses, and does not work with "
            "enable_backprop=True. Leave one of them out."
        )
    if sharded and isinstance(prior_precision, Tensor) and 1 < n_params == prior_precision.numel():
        raise ValueError(
            "shard_directions=True needs one prior precision, or one per weight tensor, as no process has all directions; "
            f"got one for each of {n_params} weights."
        )


# ---------------------------------------------------------------------------- predictions


def check_link(likelihood: Likelihood, link: Any) -> None:
    """Require a link that a likelihood has; laplace-torch's own regression takes any, and uses none."""
    check_choice("link_approx", link, LINKS)
    is_the_hosts = likelihood.name == likelihood.host_name
    if LINKS[link].of_classes and not likelihood.has_classes and not is_the_hosts:
        others = (
            "those of {} do not. Use 'probit' or 'mc'."
            if likelihood.has_probabilities
            else "{} has not: its predictions are moments, which need no link. Leave link_approx out."
        )
        raise ValueError(
            f"link_approx={link!r} makes probabilities that sum to one over the classes, which "
            + others.format(f"likelihood={likelihood.name!r}")
        )


def check_prediction(
    pred_type: Any,
    link: Any,
    n_samples: Any,
    generator: Any = None,
    device: torch.device | None = None,
) -> str:
    """Check the options of a prediction, and return the predictive: "glm" or "nn"."""
    check_choice("pred_type", pred_type, ("glm", "nn", "gp"))
    check_choice("link_approx", link, LINKS)
    check_size("n_samples", n_samples, optional=False)
    if pred_type == "nn" and link != "mc":
        raise ValueError(f"pred_type='nn' averages over samples: link_approx must be 'mc'; got {link!r}.")
    check_generator(generator, device)
    return "nn" if pred_type == "nn" else "glm"


def check_call(pred_type: str, model_kwargs: Any, **flags: Any) -> None:
    """Require flags that are flags, and arguments for the model only where it runs at sampled weights."""
    for name, flag in flags.items():
        check_flag(name, flag)
    if model_kwargs and pred_type == "glm":
        raise ValueError(
            f"Unknown arguments {sorted(model_kwargs)}; those of a call are pred_type, joint, link_approx, n_samples, "
            "diagonal_output and generator. Arguments for the model itself go with pred_type='nn' only."
        )


def check_generator(generator: Any, device: torch.device | None = None) -> None:
    """Require a generator, on a device if one is given; or None."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, or None; got {shown(generator)}.")
    if device is not None and generator.device != device:
        raise ValueError(f"generator must be on the model's device, {device}; it is on {generator.device}.")


def check_features(phi: Any, rank: int, device: torch.device) -> None:
    """Require features (B, C, K) on the model's device."""
    if not isinstance(phi, Tensor) or phi.ndim != 3 or phi.shape[-1] != rank:
        raise ValueError(
            f"Js must be the features (batch, outputs, {rank}) that backend.jacobians(x) returns, with "
            f"K = {rank} columns instead of one per weight; got {shown(phi)}."
        )
    if phi.device != device:
        raise ValueError(f"Js must be on the model's device, {device}; it is on {phi.device}.")


def check_finite_samples(samples: Tensor) -> None:
    """Require outputs at sampled weights without NaN or infinity."""
    if not samples.isfinite().all():
        raise NonFiniteSamplesError(
            "The outputs at sampled weights hold NaN or infinite values. The posterior is too wide for the "
            "'nn' predictive: raise the prior precision, lower the temperature, or use pred_type='glm'."
        )
