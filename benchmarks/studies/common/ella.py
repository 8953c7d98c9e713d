"""The rows of ELLA: it is fitted once, its features are computed once, and every row is tuned and predicted from them."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import loader, once, plain, synchronize
from benchmarks.methods import ours
from benchmarks.studies.common.baselines import N_SAMPLES, Row, mean_softmax, quasi_normal
from benchmarks.studies.common.images import Data

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


@dataclass(frozen=True)
class Kept:
    """What predictions need of inputs, whatever the setting: outputs (N, C), features (N, C, K), residual shares (N,)."""

    f: Tensor
    phi: Tensor
    share: Tensor | None = None

    @property
    def outside(self) -> Tensor:
        """The trace (N,) of J J^T outside the span of the basis."""
        assert self.share is not None
        inside = self.phi.square().sum((1, 2))
        return inside * self.share / (1 - self.share).clamp_min(torch.finfo(inside.dtype).eps)


@torch.no_grad()
def keep(la: Any, x: Tensor, share: Tensor | None = None, batch: int = BATCH) -> Kept:
    """Compute the features of all inputs."""
    phi, f = zip(*(la.features(part) for part in x.split(batch)))
    return Kept(torch.cat(f), torch.cat(phi), share)


@torch.no_grad()
def shares(la: Any, x: Tensor, batch: int = BATCH) -> Tensor:
    """Return the residual shares (N,): exact if the estimator's residual is, else estimated."""
    return torch.cat([la.residual_share(part) for part in x.split(batch)])


@torch.no_grad()
def probabilities(la: Any, kept: Kept, n_samples: int = N_SAMPLES) -> Tensor:
    """Predict with the estimator in its present setting, by Monte Carlo (N, C); a residual is the isotropic one."""
    psi = kept.phi @ la.posterior_scale.to(kept.phi)
    rank, n_outputs = psi.shape[-1], psi.shape[1]
    if la.residual == "none":
        noise = quasi_normal(n_samples, rank, la.seed).to(psi)
        return mean_softmax(la.logit_scale * kept.f, (psi @ sample for sample in noise))
    width = (kept.outside / n_outputs * la.residual_variance).sqrt()[:, None]
    noise = quasi_normal(n_samples, rank + n_outputs, la.seed).to(psi)
    offsets = (psi @ sample[:rank] + width * sample[rank:] for sample in noise)
    return mean_softmax(la.logit_scale * kept.f, offsets)


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
    la = ours(model, seed=seed, **asdict(size))
    with times.stage("fit", len(data.train[1])):
        la.fit(loader(*data.train, BATCH))
    return la


def sampled_row(la: Any, size: Size, data: Data, kept: dict[str, Kept], times: Times) -> dict[str, Row]:
    """Tune T and s once more, with G from one sampled label an input, and the same directions."""
    sampled = ours(la.model, seed=la.seed, curvature="mc", **asdict(size))
    with times.stage("fit: sampled G, given directions", len(data.train[1])):
        sampled.fit(loader(*data.train, BATCH), basis=la.basis)
    name = "ELLA, sampled G (T, s)"
    return {name: _row(sampled, name, searched("temperature", "logit_scale"), data, kept, times)}


def rows(la: Any, data: Data, kept: dict[str, Kept], times: Times) -> dict[str, Row]:
    """Tune each row on the validation images, and let it predict all sets from one feature pass."""
    return {name: _row(la, name, tune, data, kept, times) for name, tune in ROWS.items()}


def _row(la: Any, name: str, tune: Tuning, data: Data, kept: dict[str, Kept], times: Times) -> Row:
    la.residual = "isotropic" if "residual" in name else "none"
    apply(la, {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        with times.stage(f"tune: {name}", len(data.validation[1])):
            more = tune(la, loader(*data.validation, BATCH))
    with times.stage(f"predict from features: {name}", sum(len(one.f) for one in kept.values())):
        found = {of: probabilities(la, k).cpu() for of, k in kept.items()}
    notes = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return Row(found, setting(la), times.stages[f"tune: {name}"]["seconds"], notes, more)


@torch.no_grad()
def novelty(la: Any, data: Data, sets: dict[str, Tensor], times: Times) -> dict[str, Tensor]:
    """Calibrate on the validation inputs, without labels, and score each set, under the present setting."""
    with times.stage("calibrate novelty", len(data.validation[0])):
        la.calibrate_novelty(data.validation[0].split(BATCH))
    return {name: torch.cat([la.novelty(part) for part in x.split(BATCH)]).cpu() for name, x in sets.items()}
