"""ELLA's rows: tuned by evidence, or by the package's own search on validation data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import loader
from benchmarks.methods import ours
from benchmarks.studies.common import ella
from benchmarks.studies.common.ella import Size
from benchmarks.studies.regression.data import Data

BATCH = 500
RESIDUALS = ("isotropic", "exact")

Sets = dict[str, ella.Kept]


def fitted(model: nn.Module, data: Data, size: Size, seed: int, **options: Any) -> Any:
    la = ours(model, "regression", seed=seed, **asdict(size), **options)
    la.fit(loader(*data.train, BATCH))
    return la


def keep(la: Any, data: Data) -> dict[str, Sets]:
    """Compute the features of all sets once, with the share of their gradients that each kind of residual tells of."""
    found: dict[str, Sets] = {kind: {} for kind in RESIDUALS}
    for name, x in data.inputs().items():
        of_features = ella.keep(la, x, batch=BATCH)
        for kind in RESIDUALS:
            la.residual = kind
            found[kind][name] = replace(of_features, share=ella.shares(la, x, BATCH))
    la.residual = "none"
    return found


@torch.no_grad()
def variances(la: Any, kept: dict[str, Sets]) -> dict[str, Tensor]:
    """Return the predictive variance (N,) of each set in the present setting, noise included; there is one output."""
    noise, scale, found = float(la.sigma_noise) ** 2, la.posterior_scale, {}
    for name, one in kept[RESIDUALS[0] if la.residual == "none" else la.residual].items():
        variance = (one.phi @ scale.to(one.phi)).square().sum((1, 2)).double()
        if la.residual != "none":
            variance = variance + one.outside.double() * la.residual_variance
        found[name] = variance + noise
    return found


def by_evidence(la: Any, val_loader: Any, n_steps: int = 200) -> dict[str, Any]:
    """Maximise the evidence over prior precision and noise, as laplace-torch's regression example does; T = 1."""
    la.temperature = 1.0
    log_prior, log_sigma = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([log_prior, log_sigma], lr=0.1)
    for _ in range(n_steps):
        optimizer.zero_grad()
        (-la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())).backward()
        optimizer.step()
    la.prior_precision, la.sigma_noise = log_prior.detach().exp(), log_sigma.detach().exp()
    return {"settings": n_steps}


def searched(*names: str) -> Callable[[Any, Any], dict[str, Any]]:
    """Return what tunes the parameters named, all at once."""

    def tune(la: Any, val_loader: Any) -> dict[str, Any]:
        result = la.optimize_hyperparameters(val_loader, names)
        others = {name: None if found is None else found.score for name, found in result.baselines.items()}
        return {
            "validation_nll": result.score,
            "validation_nll_of_baselines": others,
            "settings": len(result.table),
            "notes_of_result": list(result.notes),
        }

    return tune


@dataclass(frozen=True)
class Tuning:
    tune: Callable[[Any, Any], dict[str, Any]]
    residual: str = "none"


TUNINGS = {
    "evidence": Tuning(by_evidence),
    "T, sigma": Tuning(searched("temperature", "sigma_noise")),
    "T, sigma, delta": Tuning(searched("temperature", "sigma_noise", "prior_precision")),
    "isotropic residual: T, sigma, rho": Tuning(
        searched("temperature", "sigma_noise", "residual_scale"), "isotropic"
    ),
    "exact residual: T, sigma, rho": Tuning(
        searched("temperature", "sigma_noise", "residual_scale"), "exact"
    ),
}
UNTUNED: dict[str, float | None] = {
    "temperature": None,
    "prior_precision": 1.0,
    "sigma_noise": 1.0,
    "residual_scale": 1.0,
}


def start(la: Any, residual: str) -> None:
    """Put the estimator back to where it was before any tuning."""
    la.prior_precision = 1.0
    la.residual = residual
    for name, value in UNTUNED.items():
        setattr(la, name, value)


def setting(la: Any) -> dict[str, float]:
    """Return the estimator's setting, without a residual scale if there is no residual."""
    names = [name for name in UNTUNED if name != "residual_scale" or la.residual != "none"]
    return {name: float(getattr(la, name)) for name in names}


def tuned(la: Any, how: Tuning, data: Data) -> tuple[dict[str, float], dict[str, Any]]:
    """Tune from the start; return the setting, and what is to be said of it."""
    start(la, how.residual)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        more = how.tune(la, loader(*data.validation, BATCH))
    notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return setting(la), {"notes": notes, **more}
