"""ELLA's rows of quality.py: one fit, one feature pass over test and other data, one tuning a row."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from baselines import N_SAMPLES, Row
from image_data import Data
from laplace_ella.predictive import predict
from laplace_ella.residual import residual_share
from measure import loader, once, plain, synchronize
from torch import Tensor, nn

from laplace_ella import Laplace
from laplace_ella.posterior import Linearised

BATCH = 100


@dataclass(frozen=True)
class Size:
    """M, K and n."""

    subsample_size: int = 500
    n_eigenvalues: int = 20
    curvature_size: int = 2000


@dataclass
class Times:
    """Seconds of each stage, and in plain forward passes of inputs, timed just before and after it."""

    model: nn.Module
    x: Tensor
    clock: Callable[[], float] = time.perf_counter
    repeats: int = 5
    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, n_inputs: int) -> Iterator[None]:
        before = self._forwards()
        start = self.clock()
        yield
        synchronize(self.x.device)
        seconds = self.clock() - start
        forwards = seconds / statistics.median(before + self._forwards())
        self.stages[name] = {
            "seconds": seconds,
            "forwards": forwards,
            "inputs": n_inputs,
            "forwards_an_input": forwards / n_inputs,
        }

    def _forwards(self) -> list[float]:
        forward = plain(self.model, self.x)
        calls = [once(forward, self.x.device, self.clock)[0] for _ in range(1 + self.repeats)]
        return [seconds / len(self.x) for seconds in calls[1:]]


@torch.no_grad()
def keep(la: Any, x: Tensor, residual: str = "isotropic") -> list[Linearised]:
    """Compute what predictions, and novelty if there is a residual, need of all inputs, whatever the setting."""
    return [la._linearised(part, residual) for part in x.split(BATCH)]


@torch.no_grad()
def probabilities(la: Any, kept: list[Linearised]) -> Tensor:
    """Return what the estimator, in its present setting, predicts by Monte Carlo (N, C)."""
    if la.residual == "none":
        kept = [Linearised(part.f, part.phi) for part in kept]
    options = {"link_approx": "mc", "n_samples": N_SAMPLES, "seed": la.seed}
    return torch.cat([predict(la._outputs(part), "classification", **options) for part in kept])


@torch.no_grad()
def shares(la: Any, kept: list[Linearised]) -> Tensor:
    """Return the residual shares (N,)."""
    return torch.cat([residual_share(part, la._residual_tangents()[1]) for part in kept])


def untempered(la: Any, val_loader: Any) -> dict[str, Any]:
    """Tune the prior precision at T = 1."""
    la.temperature = 1.0
    return tempered(la, val_loader)


def tempered(la: Any, val_loader: Any) -> dict[str, Any]:
    """Tune temperature and prior precision."""
    la.optimize_prior_precision(
        method="gridsearch", val_loader=val_loader, link_approx="mc", n_samples=N_SAMPLES
    )
    return {}


def searched(*names: str) -> Tuning:
    """Return what tunes the parameters named, all at once."""

    def tune(la: Any, val_loader: Any) -> dict[str, Any]:
        result = la.optimize_hyperparameters(val_loader, names, link_approx="mc", n_samples=N_SAMPLES)
        scores = {name: None if found is None else found.score for name, found in result.baselines.items()}
        return {
            "validation_nll": result.score,
            "validation_nll_of_baselines": scores,
            "notes_of_result": list(result.notes),
        }

    return tune


Tuning = Callable[[Any, Any], dict[str, Any]]
ROWS: dict[str, Tuning] = {
    "ELLA, T = 1": untempered,
    "ELLA (T)": tempered,
    "ELLA (T, s)": searched("temperature", "logit_scale"),
    "ELLA + residual (T, s, rho)": searched("temperature", "logit_scale", "residual_scale"),
}


UNTUNED: dict[str, float | None] = {
    "temperature": None,
    "prior_precision": 1.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
}


def apply(la: Any, setting: dict[str, float]) -> None:
    """Give the estimator a setting; what it leaves out is as before tuning."""
    for name, value in (UNTUNED | setting).items():
        setattr(la, name, value)


def setting(la: Any) -> dict[str, float]:
    """Return the estimator's setting, without a residual scale if there is no residual."""
    names = [name for name in UNTUNED if name != "residual_scale" or la.residual != "none"]
    return {name: float(getattr(la, name)) for name in names}


def fitted(model: nn.Module, data: Data, size: Size, seed: int, times: Times) -> Any:
    """Return a fitted estimator."""
    la = Laplace(model, "classification", "all", "ella", seed=seed, **asdict(size))
    with times.stage("fit", len(data.train[1])):
        la.fit(loader(*data.train, BATCH))
    return la


def sampled_row(
    la: Any, size: Size, data: Data, kept: dict[str, list[Linearised]], times: Times
) -> dict[str, Row]:
    """Tune T and s once more, with G from one sampled label an input, and the same directions."""
    sampled = Laplace(la.model, "classification", "all", "ella", seed=la.seed, curvature="mc", **asdict(size))
    with times.stage("fit: sampled G, given directions", len(data.train[1])):
        sampled.fit(loader(*data.train, BATCH), basis=la.basis)
    name = "ELLA, sampled G (T, s)"
    return {name: _row(sampled, name, searched("temperature", "logit_scale"), data, kept, times)}


def rows(la: Any, data: Data, kept: dict[str, list[Linearised]], times: Times) -> dict[str, Row]:
    """Tune each row on the validation images, and let it predict all sets from one feature pass."""
    return {name: _row(la, name, tune, data, kept, times) for name, tune in ROWS.items()}


def _row(
    la: Any, name: str, tune: Tuning, data: Data, kept: dict[str, list[Linearised]], times: Times
) -> Row:
    la.residual = "isotropic" if "residual" in name else "none"
    apply(la, {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        with times.stage(f"tune: {name}", len(data.validation[1])):
            more = tune(la, loader(*data.validation, BATCH))
    with times.stage(
        f"predict from features: {name}", sum(len(part.f) for parts in kept.values() for part in parts)
    ):
        found = {of: probabilities(la, k).cpu() for of, k in kept.items()}
    notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return Row(found, setting(la), times.stages[f"tune: {name}"]["seconds"], notes, more)


def novelty(la: Any, data: Data, kept: dict[str, list[Linearised]], times: Times) -> dict[str, Tensor]:
    """Calibrate on the validation inputs, without labels, and score each set, under the present setting."""
    with times.stage("calibrate novelty", len(data.validation[0])):
        la.calibrate_novelty(data.validation[0].split(BATCH))
    return {name: torch.cat([la._novelty_of(part) for part in parts]).cpu() for name, parts in kept.items()}
