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
from measure import loader, once, plain, synchronize
from torch import Tensor, nn

from laplace_ella import Laplace, posterior
from laplace_ella.predictive import predict

BATCH = 100
# So small a scale that there is no residual variance: rows with and without one share an estimator.
NO_RESIDUAL = 1e-30


@dataclass(frozen=True)
class Size:
    """M, K and n."""

    subsample_size: int = 500
    n_eigenvalues: int = 20
    curvature_size: int = 2000


@dataclass(frozen=True)
class Kept:
    """What predictions need of N inputs, whatever the setting: phi (N, C, K), f (N, C), residual share (N,)."""

    phi: Tensor
    f: Tensor
    share: Tensor


@dataclass
class Times:
    """Seconds of each stage, and in plain forward passes of inputs, timed just before and after it."""

    model: nn.Module
    x: Tensor
    stages: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, n_inputs: int) -> Iterator[None]:
        before = self._forwards()
        start = time.perf_counter()
        yield
        synchronize(self.x.device)
        seconds = time.perf_counter() - start
        forwards = seconds / statistics.median(before + self._forwards())
        self.stages[name] = {
            "seconds": seconds,
            "forwards": forwards,
            "inputs": n_inputs,
            "forwards_an_input": forwards / n_inputs,
        }

    def _forwards(self) -> list[float]:
        calls = [once(plain(self.model, self.x), self.x.device)[0] for _ in range(6)]
        return [seconds / len(self.x) for seconds in calls[1:]]


def keep(la: Any, x: Tensor) -> Kept:
    """Compute what ``probabilities`` needs."""
    parts = [(*la.features(part), la.residual_share(part)) for part in x.split(BATCH)]
    return Kept(*(torch.cat(column).detach() for column in zip(*parts)))


@torch.no_grad()
def probabilities(la: Any, kept: Kept) -> Tensor:
    """Return what the estimator, in its present setting, predicts by Monte Carlo (N, C)."""
    psi = posterior.whiten(kept.phi, la.posterior_scale)
    if la.residual_scale != NO_RESIDUAL:
        # r, from the share r C / (r C + |phi|^2): a further, independent direction for each output
        span = kept.phi.square().sum((1, 2)) / kept.f.shape[1]
        r = span * kept.share / (1 - kept.share).clamp_min(1e-12)
        scale = (la.residual_scale / la.prior_precision * r).sqrt()
        identity = torch.eye(kept.f.shape[1], dtype=psi.dtype, device=psi.device)
        psi = torch.cat([psi, scale[:, None, None].to(psi) * identity], 2)
    return predict(
        la.logit_scale * kept.f, psi, "classification", link_approx="mc", n_samples=N_SAMPLES, seed=la.seed
    )


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


def searched(*names: str) -> Callable[[Any, Any], dict[str, Any]]:
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


ROWS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "ELLA, T = 1": untempered,
    "ELLA (T)": tempered,
    "ELLA (T, s)": searched("temperature", "logit_scale"),
    "ELLA + residual (T, s, rho)": searched("temperature", "logit_scale", "residual_scale"),
}


UNTUNED: dict[str, float | None] = {
    "temperature": None,
    "prior_precision": 1.0,
    "logit_scale": 1.0,
    "residual_scale": NO_RESIDUAL,
}


def apply(la: Any, setting: dict[str, float]) -> None:
    """Give the estimator a setting; what it leaves out is as before tuning."""
    for name, value in (UNTUNED | setting).items():
        setattr(la, name, value)


def setting(la: Any) -> dict[str, float]:
    """Return the estimator's setting, without a residual scale if there is no residual."""
    found = {name: float(getattr(la, name)) for name in UNTUNED}
    if la.residual_scale == NO_RESIDUAL:
        del found["residual_scale"]
    return found


def fitted(model: nn.Module, data: Data, size: Size, seed: int, times: Times) -> Any:
    """Return a fitted estimator."""
    la = Laplace(
        model,
        "classification",
        "all",
        "ella",
        seed=seed,
        residual="isotropic",
        residual_scale=NO_RESIDUAL,
        **asdict(size),
    )
    with times.stage("fit", len(data.train[1])):
        la.fit(loader(*data.train, BATCH))
    return la


def rows(
    la: Any, data: Data, sets: dict[str, Tensor], times: Times
) -> tuple[dict[str, Row], dict[str, Kept]]:
    """Tune each row on the validation images, and let it predict all sets from one feature pass.

    Returns
    -------
    rows by name, and what was kept of each set
    """
    with times.stage("features and residual share", sum(map(len, sets.values()))):
        kept = {name: keep(la, x) for name, x in sets.items()}
    return {name: _row(la, name, data, kept, times) for name in ROWS}, kept


def _row(la: Any, name: str, data: Data, kept: dict[str, Kept], times: Times) -> Row:
    apply(la, {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        with times.stage(f"tune: {name}", len(data.validation[1])):
            more = ROWS[name](la, loader(*data.validation, BATCH))
    with times.stage(f"predict from features: {name}", sum(len(k.f) for k in kept.values())):
        found = {of: probabilities(la, k).cpu() for of, k in kept.items()}
    notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return Row(found, setting(la), times.stages[f"tune: {name}"]["seconds"], notes, more)


def novelty(la: Any, data: Data, sets: dict[str, Tensor], times: Times) -> dict[str, Tensor]:
    """Calibrate on the validation inputs, without labels, and score each set, under the present setting."""
    with times.stage("calibrate novelty", len(data.validation[0])):
        la.calibrate_novelty(data.validation[0].split(BATCH))
    with times.stage("novelty", sum(map(len, sets.values()))):
        return {
            name: torch.cat([la.novelty(part).detach() for part in x.split(BATCH)]).cpu()
            for name, x in sets.items()
        }
