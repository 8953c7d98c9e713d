"""A posterior as tensors and plain types, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..nystrom.basis import NystromBasis
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


def posterior_of(state: dict[str, Any], basis: NystromBasis, like: Posterior, mean: Any) -> Posterior:
    """Return the posterior that a checked state holds, where another one of the same model is.

    Parameters
    ----------
    state : dict
        Which is not shared.
    basis : NystromBasis
        That of the state, on the model's device.
    mean : Tensor (P,)
        The weights.
    """
    state = copied({k: v for k, v in state.items() if k != "basis"})
    place = like.setting.prior_precision
    device, usual = place.device, state["novelty_reference"]
    fit = Fit(
        basis=basis,
        mean=mean,
        novelty=None if usual is None else (usual, state["novelty_setting"]),
        **{name: state[key] for key, name in _OF_FIT.items()},
    )
    new = replace(
        like,
        setting=like.setting.at(**{name: state[name] for name in _OF_SETTING}),
        residual=RESIDUALS[state["residual"]],
        current=fit,
        **{name: state[name] for name in _OF_POSTERIOR},
    )
    new = replace(new, setting=new.setting.at(**_shaped(new.setting)))
    return new.to(device, place.dtype)


def _shaped(setting: Any) -> dict[str, Any]:
    """Return prior and noise in the shapes that an estimator stores."""
    return {
        "prior_precision": setting.prior_precision.reshape(-1),
        "sigma_noise": setting.sigma_noise.reshape(()),
    }
