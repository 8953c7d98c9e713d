"""Turns a posterior into tensors and plain types, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..nystrom.basis import NystromBasis
from ..posterior import attributes, checks
from ..posterior.fit import Fit
from ..posterior.posterior import Posterior
from ..posterior.residual import RESIDUALS
from ..posterior.setting import PER_CLASS
from .checkpoint import copied
from .state_checks import SINCE_FORMAT_5

_OF_FIT = (
    *("H", "loss", "snapshots", "n_data", "n_predictions", "n_outputs", "n_curvature"),
    *("labels_sampled", "largest_sums", "fingerprint"),
)
_OF_SETTING = (
    *("temperature", "prior_precision", "sigma_noise", "logit_scale", "residual_scale"),
    *PER_CLASS,
)
_OF_POSTERIOR = (
    "prior_mean",
    "temperature_fixed",
    "seed",
    "residual_samples",
    "link",
    "prior_before",
    "variance",
)


def state_of(posterior: Posterior) -> dict[str, Any]:
    """Return all entries of a state apart from the basis; they share no memory with the posterior."""
    fit, setting = posterior.fit, posterior.setting
    usual, found_with = fit.novelty or (None, [])
    state = {
        "likelihood": posterior.likelihood.name,
        "residual": posterior.residual.name,
        "novelty_reference": usual,
        "novelty_setting": found_with,
        "fit_history": fit.history,
        **{name: getattr(fit, name) for name in _OF_FIT},
        **{name: getattr(setting, name) for name in _OF_SETTING},
        "sigma_noise": posterior.sigma_noise,
        **{name: getattr(posterior, name) for name in _OF_POSTERIOR},
    }
    if posterior.rank < fit.basis.rank:
        state["n_directions"] = posterior.rank
    if fit.channel_axis is not None:
        state["channel_axis"] = fit.channel_axis
    return copied({**state, "snapshots": list(fit.snapshots), "largest_sums": list(fit.largest_sums)})


def assigned(estimator: Any, now: Posterior, state: dict[str, Any]) -> Posterior:
    """Return a posterior with the attributes that a state holds, refusing those that could not be assigned together.

    Parameters
    ----------
    estimator : ELLALaplace
        The estimator that is to take the state.
    now : Posterior
        The posterior that it has now.

    Raises
    ------
    ValueError
        For the reasons, and with the messages, that assignments have.
    """
    state = {**SINCE_FORMAT_5, **state}
    state = copied(
        {name: state[name] for name in (*_OF_SETTING, *_OF_POSTERIOR, "residual", "enable_backprop")}
    )
    prior, graphs = state["prior_precision"], state["enable_backprop"]
    residual = RESIDUALS[state["residual"]]
    residual.check(prior, graphs)
    checks.check_sharding(estimator.shard_directions, prior, estimator.n_params, graphs)
    like = now.setting.sigma_noise
    _, likelihood = checks.checked_noise(state["sigma_noise"], now.likelihood, like)
    if state["link"] is not None:
        checks.check_link(likelihood, state["link"])
    of_state = {name: state[name] for name in _OF_POSTERIOR}
    new = replace(now, current=None, likelihood=likelihood, residual=residual, **of_state)
    setting = {name: attributes.checked(estimator, name, state[name], new) for name in _OF_SETTING}
    mean = attributes.checked(estimator, "prior_mean", new.prior_mean, new).reshape(new.prior_mean.shape)
    return replace(new, setting=new.setting.at(**setting), prior_mean=mean)


def posterior_of(state: dict[str, Any], basis: NystromBasis, like: Posterior, mean: Any) -> Posterior:
    """Return a posterior with the fit that a checked state holds.

    Parameters
    ----------
    state : dict
        The state, whose tensors are copied.
    basis : NystromBasis
        The basis of the state, on the model's device.
    like : Posterior
        Everything but the fit, as :func:`assigned` returns it.
    mean : Tensor (P,)
        The model's weights.
    """
    state = copied({k: v for k, v in state.items() if k != "basis"})
    usual = state["novelty_reference"]
    fit = Fit(
        basis=basis,
        mean=mean,
        novelty=None if usual is None else (usual, state["novelty_setting"]),
        history=state["fit_history"],
        channel_axis=state.get("channel_axis"),
        **{name: state[name] for name in _OF_FIT},
    )
    return like.fitted(fit.to(mean.device)).using(state.get("n_directions"))
