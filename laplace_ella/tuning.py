r"""``optimize_prior_precision``: evidence as the host has it, grid search from one pass.

Features depend neither on the prior nor on the temperature, so the model runs once
over the validation data, and every candidate is scored from the features kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import posterior, validation
from .basis import Progress
from .batches import Input
from .likelihoods import LIKELIHOODS
from .predictive import predict
from .scoring import Loss, Prediction, ValidationData
from .search import Setting, grid_search


def progress_bars(enabled: bool) -> Progress:
    """Return what wraps an iterable in a named progress bar, or does nothing."""
    # tqdm.auto's bars start an iterable twice, and with it the workers of a loader.
    return lambda iterable, name: tqdm(iterable, desc=name) if enabled else iterable


class Tuning:
    """Tuning of prior precision and temperature.

    A mixin: :class:`laplace_ella.ELLALaplace` supplies what is declared here, and
    laplace-torch, next in line, the maximisation of the evidence.
    """

    likelihood: str
    backend: Any
    seed: int
    dict_key_x: str
    dict_key_y: str
    prior_precision: Any  # Tensor (1,), (L,) or (P,)
    sigma_noise: Any  # Tensor ()
    temperature: Any  # float
    posterior_scale: Any  # Tensor (K, K)
    _temperature_fixed: bool
    _device: Any
    _undone_on_error: Callable[[], AbstractContextManager[None]]
    _check_H_init: Callable[[], None]
    features: Callable[[Input], tuple[Tensor, Tensor]]
    __call__: Callable[..., Any]

    def optimize_prior_precision(
        self,
        pred_type: str = "glm",
        method: str = "marglik",
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: str = "scalar",
        val_loader: Iterable[Any] | None = None,
        loss: Loss | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 6,
        grid_size: int = 100,
        link_approx: str = "probit",
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
    ) -> None:
        """Tune the prior precision; with ``temperature=None``, a grid search tunes T too.

        See :meth:`laplace.BaseLaplace.optimize_prior_precision` for the parameters; what
        differs:

        - "gridsearch" runs the model once over ``val_loader`` (glm). The default loss is
          the mean NLL, for regression too (with the noise in the variance).
        - A temperature given as a number stays; None is tuned together with the prior,
          from 1e-3 to 1e6. After "marglik" it stays 1, with a warning.
        - If tuning fails, the estimator is as it was.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            On an unknown option, without ``val_loader`` where it is needed, or if no
            candidate has a finite loss.

        Notes
        -----
        Cost: 1 + 2K forward passes a validation input, whatever the grid; with
        ``pred_type="nn"``, n_samples forward passes an input and candidate (temperature
        and prior: about 500 candidates). Memory: N_val x C x K numbers.
        """
        validation.check_choice("method", method, ("marglik", "gridsearch"))
        validation.check_choice("prior_structure", prior_structure, ("scalar", "layerwise", "diag"))
        validation.check_size("grid_size", grid_size, optional=False)
        pred_type = validation.check_prediction(
            pred_type, "mc" if method == "marglik" else link_approx, n_samples, None, None
        )
        self._check_H_init()
        with self._undone_on_error():
            if method == "marglik":
                self._maximize_evidence(
                    n_steps, lr, init_prior_prec, prior_structure, val_loader, progress_bar
                )
            else:
                grid = torch.logspace(
                    log_prior_prec_min, log_prior_prec_max, grid_size, base=log_prior_prec_base
                )
                self._search_grid(
                    grid.tolist(), val_loader, loss, pred_type, link_approx, n_samples, progress_bar
                )
        if verbose:
            print(f"Optimized prior precision is {self.prior_precision}, temperature {self.temperature:.4g}.")

    def _maximize_evidence(
        self,
        n_steps: int,
        lr: float,
        init: float | Tensor,
        structure: str,
        val_loader: Any,
        progress_bar: bool,
    ) -> None:
        with warnings.catch_warnings():
            # The host reminds of the link here, which evidence does not use.
            warnings.filterwarnings("ignore", "By default `link_approx`")
            super().optimize_prior_precision(  # type: ignore[misc]
                "glm",
                "marglik",
                n_steps,
                lr,
                init,
                structure,
                val_loader=val_loader,
                progress_bar=progress_bar,
            )
        if not self._temperature_fixed:
            warnings.warn(
                f"The evidence tunes the prior only: the temperature stays {self.temperature:.4g}; at 1, ELLA's "
                "predictions are close to MAP's whatever the prior. Use method='gridsearch' with a val_loader to tune both, "
                "or pass temperature=1.0 if that is what you want.",
                stacklevel=3,
            )

    def _search_grid(
        self,
        priors: list[float],
        val_loader: Any,
        loss: Any,
        pred_type: str,
        link_approx: str,
        n_samples: int,
        progress_bar: bool,
    ) -> None:
        if val_loader is None:
            raise ValueError("method='gridsearch' scores on validation data: pass val_loader=...")
        if loss is not None and not callable(loss):
            raise ValueError(f"loss must be a torchmetrics.Metric or a callable; got {type(loss).__name__}.")
        progress = progress_bars(progress_bar)
        data = self._validation_data(val_loader, pred_type, progress)
        before = (self.prior_precision, self.temperature)

        def evaluate(setting: Setting) -> float:
            self.prior_precision, self._temperature = setting.prior_precision, setting.temperature
            return self._score(data, loss, pred_type, link_approx, n_samples)

        best = grid_search(evaluate, priors, self.temperature if self._temperature_fixed else None, progress)
        if best is None:
            warnings.warn(
                "The loss is the same for every setting on the grid, so the setting is left as it was. "
                "A loss of the mean alone does not depend on prior and temperature.",
                stacklevel=3,
            )
            self.prior_precision, self._temperature = before
        else:
            self.prior_precision, self._temperature = best.prior_precision, best.temperature

    def _validation_data(self, loader: Any, pred_type: str, progress: Any) -> ValidationData:
        """Keep the features of each batch; its inputs, for the "nn" predictive."""

        def keep_features(x: Input) -> tuple[Any, Tensor]:
            phi, f = (t.detach() for t in self.features(x))
            return (phi, f), f

        def keep_input(x: Input) -> tuple[Any, Tensor]:
            return x, self.backend.forward(x)

        prepare = keep_input if pred_type == "nn" else keep_features
        return ValidationData(
            loader,
            prepare,
            LIKELIHOODS[self.likelihood],
            self.dict_key_x,
            self.dict_key_y,
            progress,
        )

    @torch.no_grad()
    def _score(self, data: ValidationData, loss: Any, pred_type: str, link: str, n_samples: int) -> float:
        likelihood = "regression" if self.likelihood == "regression" else "classification"

        def from_features(kept: tuple[Tensor, Tensor]) -> Prediction:
            psi = posterior.whiten(kept[0], self.posterior_scale)
            return predict(
                kept[1],
                psi,
                likelihood,
                link_approx=link,
                n_samples=n_samples,
                # NLL needs variances only; what the user's loss gets is the host's.
                diagonal_output=likelihood == "regression" and loss is None,
                seed=self.seed,
            )

        def from_input(x: Input) -> Prediction:
            # The same noise for every candidate, so that the best is not the luckiest.
            generator = torch.Generator(self._device).manual_seed(self.seed)
            return self(x, "nn", link_approx=link, n_samples=n_samples, generator=generator, fitting=True)

        return data.score(from_input if pred_type == "nn" else from_features, loss, self.sigma_noise.square())
