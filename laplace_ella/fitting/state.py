"""A posterior as tensors and plain types, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..nystrom.basis import NystromBasis
from ..posterior import attributes, checks
from ..posterior.fit import Fit
from ..posterior.posterior import Posterior
from ..posterior.residual import RESIDUALS
from .checkpoint import copied

_OF_FIT = {
    **{name: name for name in ("H", "loss", "n_data", "n_predictions", "n_outputs", "n_curvature")},
    **{name: name for name in ("snapshots", "labels_sampled", "largest_sums", "fingerprint")},
    "fit_history": "history",
}
_OF_SETTING = ("temperature", "prior_precision", "sigma_noise", "logit_scale", "residual_scale")
_OF_POSTERIOR = ("prior_mean", "temperature_fixed", "seed", "residual_samples")


def state_of(posterior: Posterior) -> dict[str, Any]:
    """Return all entries of a state apart from the basis; they share no memory with the posterior."""
    fit, setting = posterior.fit, posterior.setting
    usual, found_with = fit.novelty or (None, [])
    state = {
        "likelihood": posterior.likelihood.name,
        "residual": posterior.residual.name,
        "novelty_reference": usual,
        "novelty_setting": found_with,
        **{key: getattr(fit, name) for key, name in _OF_FIT.items()},
        **{name: getattr(setting, name) for name in _OF_SETTING},
        **{name: getattr(posterior, name) for name in _OF_POSTERIOR},
    }
    return copied({**state, "snapshots": list(fit.snapshots), "largest_sums": list(fit.largest_sums)})


def assigned(estimator: Any, now: Posterior, state: dict[str, Any]) -> Posterior:
    """Return a posterior with the attributes that a state holds, which must be such as could be assigned one by one.

    Raises
    ------
    ValueError
        As assigning them does.
    """
    state = copied(
        {name: state[name] for name in (*_OF_SETTING, *_OF_POSTERIOR, "residual", "enable_backprop")}
    )
    prior, graphs = state["prior_precision"], state["enable_backprop"]
    residual = RESIDUALS[state["residual"]]
    residual.check(prior, graphs)
    checks.check_sharding(estimator.shard_directions, prior, estimator.n_params, graphs)
    new = replace(now, residual=residual, **{name: state[name] for name in _OF_POSTERIOR})
    setting = {name: attributes.checked(estimator, name, state[name], new) for name in _OF_SETTING}
    mean = attributes.checked(estimator, "prior_mean", new.prior_mean, new).reshape(new.prior_mean.shape)
    return replace(new, setting=new.setting.at(**setting), prior_mean=mean)


def posterior_of(state: dict[str, Any], basis: NystromBasis, like: Posterior, mean: Any) -> Posterior:
    """Return a posterior with the fit that a checked state holds.

    Parameters
    ----------
    state : dict
        Which is not shared.
    basis : NystromBasis
        That of the state, on the model's device.
    like : Posterior
        All but the fit; see :func:`assigned`.
    mean : Tensor (P,)
        The weights.
    """
    state = copied({k: v for k, v in state.items() if k != "basis"})
    usual = state["novelty_reference"]
    fit = Fit(
        basis=basis,
        mean=mean,
        novelty=None if usual is None else (usual, state["novelty_setting"]),
        **{name: state[key] for key, name in _OF_FIT.items()},
    )
    return replace(like, current=fit.to(mean.device))
