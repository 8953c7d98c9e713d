r"""Attributes of an estimator that belong to its posterior, which is read from and replaced as a whole.

An estimator holds its posterior as ``_posterior``, and nothing else that predictions depend on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..data.checks import check_choice, integer, positive_number
from ..data.notices import warn_user
from ..nystrom.caching import outside_inference, without_inference
from . import checks
from .fit import Fit
from .likelihoods import Likelihood, name_of
from .posterior import Posterior
from .residual import RESIDUALS
from .setting import PER_CLASS
from .variances import VARIANCES

REPLACED = (
    "Another thread has fitted, loaded or tuned this estimator meanwhile, and what was computed here belongs to the "
    "fit that it had before. The estimator is as the other thread left it. Call again."
)
# Held while a posterior is exchanged for another, and never while a model runs or processes talk.
SWAP = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child finds no change half made, and a lock that somebody releases
    os.register_at_fork(before=SWAP.acquire, after_in_parent=SWAP.release, after_in_child=SWAP.release)


def become(
    estimator: Any,
    of: Fit | None = None,
    setting: Mapping[str, Any] = MappingProxyType({}),
    more: Fit | None = None,
    **changes: Any,
) -> None:
    """Give an estimator the posterior that it has now with some changes.

    Parameters
    ----------
    of : Fit, optional
        The fit that a new one (``current``) was derived from.
    setting : mapping
        New values of parameters of the setting.
    more : Fit, optional
        What was added to that fit. It is added to the one that the estimator has by now, if that has the same basis.
    **changes
        New values of fields of the posterior.

    Raises
    ------
    RuntimeError
        If the estimator has another fit by now, to which nothing can be added.
    """
    with SWAP:
        before = estimator._posterior
        now = before.current
        if "current" in changes and of is not None and now is not of:
            if more is None or now is None or now.basis is not of.basis:
                raise RuntimeError(REPLACED)
            changes["current"] = now.plus(more)
        after = before.fitted(changes.pop("current")) if "current" in changes else before
        exchange(estimator, replace(after, setting=after.setting.at(**setting), **changes))


def exchange(estimator: Any, posterior: Posterior, **attributes: Any) -> None:
    """Give an estimator another posterior, and with it other values of plain attributes, in one step."""
    fit = posterior.current
    with SWAP:
        if fit is not None and fit is not estimator._posterior.current:
            estimator.model.output_size = fit.n_outputs  # as the host does
        vars(estimator).update(attributes, _posterior=posterior)


def follow(estimator: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Move the posterior of an estimator to a device."""
    with SWAP:
        estimator._posterior = estimator._posterior.to(device, dtype)


def checked(estimator: Any, name: str, value: Any, posterior: Posterior | None = None) -> Any:
    """Return a value of a parameter of the setting, or a prior mean, as it is stored.

    Parameters
    ----------
    posterior : Posterior, optional
        The one whose likelihood and residual the value is to go with; by default the estimator's.

    Raises
    ------
    ValueError
    """
    posterior = posterior or estimator._posterior
    like = torch.empty((), dtype=estimator._dtype, device=estimator._device)
    with outside_inference():  # what is stored may meet a graph later
        value = without_inference(value)
        if name == "prior_precision":
            sizes = estimator.n_layers, estimator.n_params, estimator.shard_directions
            return checks.checked_prior_precision(value, posterior.residual, *sizes, like)
        if name == "sigma_noise":
            return checked_noise(value, posterior, like)[0]
        if name == "prior_mean":
            return checks.checked_prior_mean(value, estimator.n_params, like)
    if name == "logit_scale":
        return checks.checked_logit_scale(value, posterior.likelihood)
    if name in PER_CLASS:
        numbers = checks.checked_classes(name, value, posterior.likelihood, positive=name == "class_scales")
        if posterior.current is not None:
            checks.check_classes(posterior.setting.at(**{name: numbers}), posterior.fit.n_outputs)
        return numbers
    return positive_number(name, value)


def checked_noise(value: Any, posterior: Posterior, like: Tensor) -> tuple[Tensor, Likelihood]:
    """Return the scale of a noise, and the likelihood with its ratios, which a fit does not let change."""
    scale, likelihood = checks.checked_noise(value, posterior.likelihood, like)
    if posterior.current is not None:
        checks.check_ratios(likelihood, posterior.likelihood)
        likelihood = posterior.likelihood
    return scale, likelihood


def _property(
    stub: Callable[..., Any], read: Callable[[Posterior], Any], changes: Callable[[Any, Any], dict[str, Any]]
) -> Any:
    """Make a property of the posterior.

    Parameters
    ----------
    changes : callable
        (estimator, value) -> what :func:`become` is told when a value is assigned.
    """

    def write(estimator: Any, value: Any) -> None:
        become(estimator, **changes(estimator, value))

    return property(lambda estimator: read(estimator._posterior), write, doc=stub.__doc__)


def of_setting(stub: Callable[..., Any]) -> Any:
    """Make a property of a parameter of the setting, checked when it is assigned."""
    name = stub.__name__
    return _property(
        stub, lambda p: getattr(p.setting, name), lambda e, v: {"setting": {name: checked(e, name, v)}}
    )


def of_noise(stub: Callable[..., Any]) -> Any:
    """Make the property of the observation noise: its scale is one of the setting, its ratios of the likelihood."""

    def changes(estimator: Any, value: Any) -> dict[str, Any]:
        like = torch.empty((), dtype=estimator._dtype, device=estimator._device)
        with outside_inference():
            scale, likelihood = checked_noise(without_inference(value), estimator._posterior, like)
        return {"setting": {"sigma_noise": scale}, "likelihood": likelihood}

    return _property(stub, lambda p: p.sigma_noise, changes)


def of_temperature(stub: Callable[..., Any]) -> Any:
    """Make the property of the temperature, which is free if None is assigned, and fixed else."""

    def changes(estimator: Any, value: Any) -> dict[str, Any]:
        number = 1.0 if value is None else positive_number("temperature", value)
        return {"setting": {"temperature": number}, "temperature_fixed": value is not None}

    return _property(stub, lambda p: p.setting.temperature, changes)


def of_choice(stub: Callable[..., Any]) -> Any:
    """Make a property of what the posterior is made with, which is used, and checked, by the next call."""
    name = stub.__name__
    return _property(stub, lambda p: getattr(p, name), lambda e, v: {name: v})


def of_prior_precision(stub: Callable[..., Any]) -> Any:
    """Make the property of the prior precision, which is the user's own once it is assigned."""

    def changes(estimator: Any, value: Any) -> dict[str, Any]:
        new = checked(estimator, "prior_precision", value)
        return {"setting": {"prior_precision": new}, "prior_before": None}

    return _property(stub, lambda p: p.setting.prior_precision, changes)


def of_link(stub: Callable[..., Any]) -> Any:
    """Make the property of the link that calls use which name none."""

    def changes(estimator: Any, value: Any) -> dict[str, Any]:
        if value is not None:
            checks.check_link(estimator._posterior.likelihood, value)
        return {"link": None if value is None else name_of(value)}

    return _property(stub, lambda p: p.link, changes)


def of_variance(stub: Callable[..., Any]) -> Any:
    """Make the property of where the variance of predictions comes from, for which alone a temperature is tuned."""

    def write(estimator: Any, value: Any) -> None:
        check_choice("variance", value, VARIANCES)
        with SWAP:  # no other thread tunes the temperature between the two
            before = estimator._posterior
            exchange(estimator, before.with_variance(value))
            after = estimator._posterior
        lost = before.setting.temperature
        if after.setting.temperature != lost:
            warn_user(
                f"The temperature {lost:.4g} was found with variance={before.variance!r} and means something else with {value!r}: "
                "it is 1 again. Assign la.temperature, or tune it: optimize_hyperparameters(val_loader)."
            )

    return property(lambda estimator: estimator._posterior.variance, write, doc=stub.__doc__)


def of_prior_mean(stub: Callable[..., Any]) -> Any:
    """Make the property of the prior mean."""
    return _property(stub, lambda p: p.prior_mean, lambda e, v: {"prior_mean": checked(e, "prior_mean", v)})


def of_residual(stub: Callable[..., Any]) -> Any:
    """Make the property of the residual's name."""

    def changes(estimator: Any, value: Any) -> dict[str, Any]:
        check_choice("residual", value, RESIDUALS)
        residual = RESIDUALS[value]
        residual.check(estimator._posterior.setting.prior_precision, estimator.enable_backprop)
        return {"residual": residual}

    return _property(stub, lambda p: p.residual.name, changes)


def of_fit(stub: Callable[..., Any]) -> Any:
    """Make a property of what a fit left; before a fit it is what the function returns."""
    name = stub.__name__

    def read(estimator: Any) -> Any:
        now = estimator._now()
        if now.current is None:
            return stub(estimator)
        return getattr(now.used, {"fit_history_": "history"}.get(name, name))

    def write(estimator: Any, value: Any) -> None:
        """Assign, as the host's constructor does before there is a fit."""
        if name == "H" and value is None:
            become(estimator, current=None)
        elif (fit := estimator._posterior.current) is not None:
            if name in ("H", "snapshots"):
                _check_all_are_used(estimator._posterior, name)
            become(estimator, fit, current=replace(fit, **{name: value}))

    return property(read, write, doc=stub.__doc__)


def _check_all_are_used(posterior: Posterior, name: str) -> None:
    if posterior.rank < posterior.fit.basis.rank:
        raise ValueError(
            f"{name} cannot be assigned while {posterior.rank} of {posterior.fit.basis.rank} directions are used, of which "
            "its matrices would be. Assign n_directions = None first."
        )


def of_rank(stub: Callable[..., Any]) -> Any:
    """Make the property of how many of the fitted directions are used; None stands for all."""

    def read(estimator: Any) -> int:
        return int(estimator._fitted().rank)

    def write(estimator: Any, value: Any) -> None:
        estimator._fitted()
        with SWAP:  # no other thread exchanges the fit between the check and the assignment
            now = estimator._posterior
            exchange(
                estimator, now.using(None if value is None else _checked_rank(value, now.fit.basis.rank))
            )
        estimator._engine.drop_prepared()

    return property(read, write, doc=stub.__doc__)


def _checked_rank(value: Any, most: int) -> int:
    what = (
        f"an integer from 1 to {most}, as many directions as the fit found, or None for all of them (n_eigenvalues is how "
        "many the next fit looks for)"
    )
    return integer("n_directions", value, what, 1, most)


def of_posterior(stub: Callable[..., Any]) -> Any:
    """Make a read-only property of what follows from the posterior of a fitted estimator: what the function returns."""
    return property(lambda estimator: stub(estimator._fitted()), doc=stub.__doc__)


def _rank(posterior: Posterior) -> str:
    used, fitted = posterior.rank, posterior.fit.basis.rank
    return f"{used}" if used == fitted else f"{used} of {fitted}"


def description(estimator: Any, sizes: str) -> str:
    """Return what ``repr`` shows of an estimator.

    Parameters
    ----------
    sizes : str
        M and K as they were asked for, before a fit.
    """
    p = estimator._posterior
    s, fit = p.setting, p.current
    if fit is None:
        fitted = f"{sizes}, P={estimator.n_params}, not fitted"
    else:
        fitted = (
            f"M={fit.basis.n_landmarks}, K={_rank(p)}, retained trace={p.basis.retained:.3f}, "
            f"P={estimator.n_params}, n_data={fit.n_data}, n={fit.n_curvature}"
        )
    prior = (
        f"{float(s.prior_precision):.4g}"
        if s.prior_precision.numel() == 1
        else f"{s.prior_precision.numel()} values"
    )
    sigma = p.sigma_noise
    values = {
        "sigma_noise": float(sigma) if sigma.numel() == 1 else 1.0,
        "logit_scale": s.logit_scale,
        "residual_scale": s.residual_scale if p.residual.adds else 1.0,
    }
    more = [f", {k}={v:.4g}" for k, v in values.items() if v != 1]
    more += [f", sigma_noise={sigma.numel()} values"] if sigma.numel() > 1 else []
    more += [f", {k}: {len(v)} values" for k in PER_CLASS if (v := getattr(s, k)) is not None]
    more += [f", variance={p.variance!r} (predicts without features)"] if p.variance != "ella" else []
    more += [f", link_approx={p.link!r}"] if p.link is not None else []
    more += [f", residual={p.residual.name!r}"] if p.residual.adds else []
    more += [f", curvature={estimator.curvature!r}"] if estimator.curvature != "exact" else []
    axis = estimator.channel_axis if fit is None else fit.channel_axis
    of_outputs = {"channel_axis": axis, "curvature_positions": estimator.curvature_positions}
    more += [f", {k}={v}" for k, v in of_outputs.items() if v is not None]
    fixed = "" if p.temperature_fixed else " (free)"
    return (
        f"ELLALaplace({p.likelihood.name!r}, {fitted}, prior_precision={prior}, "
        f"temperature={s.temperature:.4g}{fixed}{''.join(more)})"
    )
