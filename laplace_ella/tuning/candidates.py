r"""Candidates: what each setting would predict on validation data that the model has seen once.

Features depend on none of the parameters tuned, so the model runs once over the
validation data, and every candidate is scored from what was kept of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.hashing import digest
from ..data.progress import Progress, progress_bars
from ..data.stream import Batch, Stream
from ..parallel.sharding import work_through
from ..posterior import gaussian as posterior
from ..posterior.gaussian import Linearised, Outputs
from ..posterior.hyperparameters import curvature_factor
from ..posterior.likelihoods import LIKELIHOODS, Prediction, checked_targets
from ..posterior.predictive import predict
from ..posterior.sampling import Sampling
from ..posterior.setting import Setting
from .baselines import Predictor, Scorer
from .scoring import Block, Loss, ValidationData
from .store import Store


class Candidates(Sampling):
    """Settings of an estimator, and what they predict.

    A mixin: :class:`laplace_ella.ELLALaplace` supplies what is declared here.
    """

    dict_key_x: str
    dict_key_y: str
    prior_precision: Any  # Tensor (1,), (L,) or (P,)
    sigma_noise: Any  # Tensor ()
    temperature: Any  # float
    residual_scale: Any  # float
    snapshots: list[tuple[int, Tensor]]
    n_curvature: int
    n_layers: int
    n_params: int
    n_outputs: int
    H: Any  # Tensor (K, K)
    _temperature: float
    _temperature_fixed: bool
    _ranks: Any  # Ranks
    _keep_leading: Callable[[int], None]
    _keep_snapshot: Callable[[int], None]

    def _setting(self) -> Setting:
        """Return the setting that the estimator has."""
        prior = self.prior_precision
        return Setting(
            self.temperature,
            float(prior) if prior.numel() == 1 else None,
            self.logit_scale,
            self.residual_scale,
            self.basis.rank,
            self.n_curvature,
            float(self.sigma_noise),
        )

    def _gaussian_of(self, setting: Setting) -> Callable[[Linearised], Outputs]:
        """Return what turns a linearised model into the Gaussian that a setting makes of its outputs."""
        k = setting.n_eigenvalues
        n = setting.curvature_size
        G = self.H if n == self.n_curvature else dict(self.snapshots)[n]
        factor = curvature_factor(self._number(setting.sigma_noise), setting.temperature)
        variance: Any = 0.0
        if setting.prior_precision is None:
            prior = self.basis.project_precision(self.prior_precision)[:k, :k]
        else:
            delta = self._number(setting.prior_precision).double()
            prior = delta * torch.eye(k, dtype=torch.float64, device=self._device)
            if self.residual != "none":
                variance = setting.residual_scale / delta
        scale = posterior.posterior_scale(factor * G[:k, :k] + prior)
        overlap = self._residual_tangents()[1] if self.residual == "isotropic" else None
        return lambda seen: seen.outputs(scale, setting.logit_scale, variance, overlap)

    def _progress(self, enabled: bool) -> Progress:
        """Return what draws progress bars, on one rank."""
        return progress_bars(enabled and self._ranks.rank == 0)

    def _require_same_search(self, what: str, **arguments: Any) -> None:
        """Require that all ranks search the same, from the same posterior."""
        setting = [None if v is None else float(v) for v in astuple(self._setting())]
        fitted = digest(self.H, self.prior_precision)
        of_estimator = {"setting": setting, "residual": self.residual, "seed": self.seed, "fit": fitted}
        self._ranks.require_equal({**arguments, **of_estimator}, what)

    def _number(self, value: Any) -> Tensor:
        """Round a number as the attribute of the estimator would be."""
        if isinstance(value, Tensor):
            return value.to(self._device)
        return torch.tensor(value, dtype=self._dtype, device=self._device)

    def _width(self) -> int:
        """Return how many numbers are kept of each output."""
        return self.basis.rank + (self.n_outputs if self.residual == "exact" else 0)

    def _predictor(self, predict_from: Callable[[Outputs], Prediction]) -> Predictor:
        """Return what turns a setting into what predicts a block of validation data under it."""

        def predictor(setting: Setting) -> Callable[[Block], Prediction]:
            gaussian = self._gaussian_of(setting)
            return lambda block: predict_from(gaussian(block.linearised))

        return predictor

    def _link(
        self, link_approx: str, n_samples: int, loss: Loss | None = None
    ) -> Callable[[Outputs], Prediction]:
        """Return what turns a Gaussian over outputs into the prediction that a loss is of.

        The NLL of a regression needs variances only; what the user's loss gets is the host's.
        """
        likelihood = "classification" if self.likelihood == "reward_modeling" else self.likelihood
        return partial(
            predict,
            likelihood=likelihood,
            link_approx=link_approx,
            n_samples=n_samples,
            diagonal_output=loss is None and likelihood == "regression",
            seed=self.seed,
        )

    def _scorer(self, loader: Any, loss: Loss | None, progress: Progress, last_layer: bool = False) -> Scorer:
        """Run the model once over validation data, and keep what candidates need."""
        ranks, backend, likelihood = self._ranks, self.backend, LIKELIHOODS[self.likelihood]
        budget, spill = backend.engine.budget() // 2, backend.spill
        data = ValidationData(likelihood, Store(budget, None if spill is None else spill.folder))

        def keep(part: Batch | None) -> None:
            if part is None:
                self._attend(self.residual)
                return
            norms = backend.last_layer_norms(part.x) if last_layer else None
            seen, positions = _detached(self._linearised(part.x)), backend.positions(part.x)
            targets = checked_targets(likelihood, part.y, seen.f, positions, f"validation {part.name}")
            data.append(len(part.y), Block(seen, targets, norms))

        with ranks.together("the validation data"):
            stream = Stream(loader, self.dict_key_x, self.dict_key_y, backend.inputs, ranks, progress)
        parts = stream.parts("Validation data", partial(backend.bounded, width=self._width()))
        work_through(parts, keep, ranks, self.basis.ranks, "the validation data")
        return Scorer(data, loss, self._device, ranks)


def _detached(seen: Linearised) -> Linearised:
    parts = (seen.f, seen.phi, seen.pushed, seen.gram)
    return Linearised(*(None if t is None else t.detach() for t in parts))  # type: ignore[arg-type]
