r"""Candidates: what each setting would predict on validation data that the model has seen once.

Features depend on none of the parameters tuned, so the model runs once over the
validation data, and every candidate is scored from what was kept of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import posterior
from .basis import Progress
from .batches import Input
from .hyperparameters import curvature_factor
from .likelihoods import LIKELIHOODS, Prediction
from .posterior import Linearised, Outputs
from .predictive import predict
from .scoring import Block, Loss, ValidationData
from .search import Setting
from .store import Store


def progress_bars(enabled: bool) -> Progress:
    """Return what wraps an iterable in a named progress bar, or does nothing."""
    # tqdm.auto's bars start an iterable twice, and with it the workers of a loader.
    return lambda iterable, name: tqdm(iterable, desc=name) if enabled else iterable


class Candidates:
    """Settings of an estimator, and what they predict.

    A mixin: :class:`laplace_ella.ELLALaplace` supplies what is declared here.
    """

    likelihood: str
    backend: Any
    basis: Any  # NystromBasis
    seed: int
    dict_key_x: str
    dict_key_y: str
    prior_precision: Any  # Tensor (1,), (L,) or (P,)
    sigma_noise: Any  # Tensor ()
    temperature: Any  # float
    logit_scale: Any  # float
    residual: str
    residual_scale: Any  # float
    snapshots: list[tuple[int, Tensor]]
    n_curvature: int
    n_outputs: int
    H: Any  # Tensor (K, K)
    _temperature: float
    _temperature_fixed: bool
    _posterior_scale: Tensor | None
    _device: Any
    _dtype: Any
    _undone_on_error: Callable[[], AbstractContextManager[None]]
    _check_H_init: Callable[[], None]
    _linearised: Callable[..., Linearised]
    _residual_tangents: Callable[[], tuple[Any, Tensor]]
    _keep_leading: Callable[[int], None]
    _keep_snapshot: Callable[[int], None]
    __call__: Callable[..., Any]

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

    def _number(self, value: Any) -> Tensor:
        """Round a number as the attribute of the estimator would be."""
        if isinstance(value, Tensor):
            return value.to(self._device)
        return torch.tensor(value, dtype=self._dtype, device=self._device)

    def _width(self) -> int:
        """Return how many numbers are kept of each output."""
        return self.basis.rank + (self.n_outputs if self.residual == "exact" else 0)

    def _predictor(
        self, predict_from: Callable[[Outputs], Prediction]
    ) -> Callable[[Block, Setting], Prediction]:
        """Return what predicts a block of validation data under a setting."""
        latest: list[Any] = [None, None]

        def predictor(block: Block, setting: Setting) -> Prediction:
            if latest[0] is not setting:  # once a candidate, not once a block
                latest[:] = setting, self._gaussian_of(setting)
            return predict_from(latest[1](block.linearised))

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

    def _validation_data(self, loader: Any, progress: Progress, last_layer: bool = False) -> ValidationData:
        """Run the model once over validation data, and keep what candidates need."""
        width = self._width()

        def linearise(x: Input) -> Iterator[tuple[tuple[int, ...], Linearised, Tensor | None]]:
            for part in self.backend.bounded(x, width):
                norms = self.backend.last_layer_norms(part) if last_layer else None
                yield self.backend.positions(part), _detached(self._linearised(part)), norms

        budget, spill = self.backend.engine.budget() // 2, self.backend.spill
        return ValidationData(
            loader,
            linearise,
            LIKELIHOODS[self.likelihood],
            self.dict_key_x,
            self.dict_key_y,
            progress,
            Store(budget, None if spill is None else spill.folder),
        )


def _detached(seen: Linearised) -> Linearised:
    parts = (seen.f, seen.phi, seen.pushed, seen.gram)
    return Linearised(*(None if t is None else t.detach() for t in parts))  # type: ignore[arg-type]
