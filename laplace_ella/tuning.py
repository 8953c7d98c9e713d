r"""``optimize_prior_precision`` and ``optimize_hyperparameters``: everything from one pass.

Features depend on none of the parameters tuned, so the model runs once over the
validation data, and every candidate is scored from what was kept of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import posterior, validation
from .baselines import Scorer, baselines, map_prediction
from .basis import Progress
from .batches import Input, named_batches
from .hyperparameters import curvature_factor
from .likelihoods import LIKELIHOODS, Prediction, checked_targets
from .posterior import Linearised, Outputs
from .predictive import predict
from .result import SETTING_NAMES, TuningResult, compared, remarks
from .scoring import Block, Loss, ValidationData, score
from .search import LOGIT_SCALES, TEMPERATURES, Search, Setting, decades, grid_search, joint_search, refine
from .store import Store

# A loss that changes by less than this share of it at the edge of a grid is flat there.
FLAT_EDGE = 1e-6


def progress_bars(enabled: bool) -> Progress:
    """Return what wraps an iterable in a named progress bar, or does nothing."""
    # tqdm.auto's bars start an iterable twice, and with it the workers of a loader.
    return lambda iterable, name: tqdm(iterable, desc=name) if enabled else iterable


class Tuning:
    """Tuning of all that predictions depend on, apart from the weights.

    A mixin: :class:`laplace_ella.ELLALaplace` supplies what is declared here, and
    laplace-torch, next in line, the maximisation of the evidence.
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
    n_eigenvalues: int | float
    snapshots: list[tuple[int, Tensor]]
    n_curvature: int
    H: Any  # Tensor (K, K)
    enable_backprop: bool
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

    # ------------------------------------------------------------------ prior precision

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
        - A loss that is the same over the whole grid leaves the setting as it was; an optimum
          on an edge of the grid, a candidate that fails, and predictions that do no better
          than MAP's are each warned of.
        - If tuning fails, the estimator is as it was.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            On an unknown option, an empty grid, without ``val_loader`` where it is needed, or
            if no candidate has a finite loss.

        Notes
        -----
        Cost: 1 + 2K forward passes a validation input, whatever the grid; with
        ``pred_type="nn"``, n_samples forward passes an input and candidate (temperature
        and prior: about 500 candidates). Memory: N_val x C x K numbers, the part of them beyond
        the memory budget in a temporary file.
        """
        validation.check_choice("method", method, ("marglik", "gridsearch"))
        validation.check_choice("prior_structure", prior_structure, ("scalar", "layerwise", "diag"))
        validation.check_size("grid_size", grid_size, optional=False)
        pred_type = validation.check_prediction(
            pred_type, "mc" if method == "marglik" else link_approx, n_samples, None, None
        )
        if method == "gridsearch":
            validation.check_link(self.likelihood, link_approx)
            validation.check_interval(log_prior_prec_min, log_prior_prec_max, grid_size)
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
        validation.check_loss(loss)
        progress = progress_bars(progress_bar)
        start = self._setting()
        if pred_type == "nn":
            evaluate, score_of_map = self._nn_scores(val_loader, loss, n_samples, progress)
        else:
            data = self._validation_data(val_loader, progress)
            scorer = Scorer(data, loss)
            # NLL needs variances only; what the user's loss gets is the host's.
            predictor = self._predictor(link_approx, n_samples, diagonal_output=loss is None)
            plain = partial(map_prediction, likelihood=scorer.likelihood)
            score_of_map = partial(scorer, self._with_covariance(plain, loss), start)

            def evaluate(setting: Setting) -> float:
                return scorer(predictor, setting)

        search = Search(evaluate)
        grid_search(search, start, priors, not self._temperature_fixed, progress)
        search.conclude()
        if search.is_flat():
            warnings.warn(
                "The loss is the same for every setting on the grid, so the setting is left as it was. "
                "A loss of the mean alone does not depend on prior and temperature.",
                stacklevel=3,
            )
            return
        best = search.best
        map_score = math.inf if self._temperature_fixed else score_of_map()
        if search.table[best] >= map_score - FLAT_EDGE * abs(map_score):
            best = best.at(temperature=TEMPERATURES[0], prior_precision=max(priors))
            warnings.warn(
                f"No setting predicts better than the network itself (MAP: {map_score:.5g}, the best setting: "
                f"{search.table[search.best]:.5g}); the setting of the smallest variance is used.",
                stacklevel=3,
            )
        else:
            _warn_of_edge(search, best, "prior_precision", sorted(priors), "log_prior_prec_{}")
            if not self._temperature_fixed:
                _warn_of_edge(search, best, "temperature", TEMPERATURES, "")
        self.prior_precision, self._temperature = best.prior_precision, best.temperature
        self._posterior_scale = None

    def _nn_scores(
        self, val_loader: Any, loss: Any, n_samples: int, progress: Progress
    ) -> tuple[Callable[[Setting], float], Callable[[], float]]:
        """Return what scores a setting by the "nn" predictive, which runs the model; and what scores MAP."""
        likelihood, kept = LIKELIHOODS[self.likelihood], []
        for name, x, y in progress(
            named_batches(val_loader, self.dict_key_x, self.dict_key_y), "Validation data"
        ):
            f = self.backend.forward(x)
            flat_f = f.flatten(0, -2)
            kept.append(
                (x, flat_f, checked_targets(likelihood, y, flat_f, f.shape[1:-1], f"validation {name}"))
            )
        if not kept:
            raise ValueError("The validation loader yielded no data; at least one input is needed.")

        @torch.no_grad()
        def evaluate(setting: Setting) -> float:
            self.prior_precision, self._temperature = setting.prior_precision, setting.temperature
            self._posterior_scale = None
            # The same noise for every candidate, so that the best is not the luckiest.
            pairs = (
                (
                    self(
                        x,
                        "nn",
                        link_approx="mc",
                        n_samples=n_samples,
                        generator=torch.Generator(self._device).manual_seed(self.seed),
                        fitting=True,
                    ),
                    y,
                )
                for x, _, y in kept
            )
            return score(pairs, likelihood, loss, self.sigma_noise.double().square())

        def as_predicted(f: Tensor) -> Prediction:
            return (f, torch.zeros_like(f)) if likelihood.inverse_link is None else likelihood.inverse_link(f)

        def score_of_map() -> float:
            plain = ((as_predicted(f), y) for _, f, y in kept)
            return score(plain, likelihood, loss, self.sigma_noise.double().square())

        return evaluate, score_of_map

    # ------------------------------------------------------------------ all hyperparameters

    def optimize_hyperparameters(
        self,
        val_loader: Iterable[Any],
        search: Sequence[str] | Mapping[str, Sequence[float] | None] | None = None,
        *,
        link_approx: str = "mc",
        n_samples: int = 128,
        loss: Loss | None = None,
        apply: bool = True,
        progress_bar: bool = False,
    ) -> TuningResult:
        r"""Tune any of the parameters of the predictive jointly, and compare with simpler methods.

        Parameters
        ----------
        val_loader : iterable
            Batches of data that the model was not fitted to; read once.
        search : sequence of str, or mapping, optional
            Any of "temperature" T, "logit_scale" s, "residual_scale" rho, "prior_precision",
            "n_eigenvalues" (leading K' <= K directions), "curvature_size" (n, from the snapshots of
            the fit) and "sigma_noise". A mapping gives the values of the grid, None the
            default. Default: ("temperature", "logit_scale"); for regression ("temperature",
            "sigma_noise"); a temperature fixed by the user is left out.
        link_approx, n_samples
            As in the predictions that the setting is for.
        loss : torchmetrics.Metric or callable, optional
            Default: the mean NLL an input (or position), which is refined by L-BFGS; any
            other loss by golden-section search.
        apply : bool
            Give the estimator the best setting. Directions beyond K' are dropped.
        progress_bar : bool

        Returns
        -------
        TuningResult

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            On parameters that cannot be searched, or if no setting has a finite loss. The
            estimator is then as it was.

        Notes
        -----
        Cost: one pass of features (and a plain forward pass) over the validation data. The
        candidates take N_val x C x K operations each, times the samples with "mc".
        """
        self._check_H_init()
        validation.check_prediction("glm", link_approx, n_samples, None, None)
        validation.check_link(self.likelihood, link_approx)
        validation.check_loss(loss)
        grids = self._grids(search)
        progress = progress_bars(progress_bar)
        with self._undone_on_error():
            scorer = Scorer(self._validation_data(val_loader, progress, last_layer=True), loss)
            predictor = self._predictor(link_approx, n_samples, diagonal_output=loss is None)
            found = Search(lambda setting: scorer(predictor, setting))
            joint_search(found, self._setting(), grids, progress)
            refine(found, grids, partial(scorer.gradient, predictor) if loss is None else None)
            found.conclude()
            result = self._result(scorer, found, grids, apply, link_approx, n_samples)
            if apply:
                self._apply(result.best, tuple(grids))
        if result.notes:
            warnings.warn(" ".join(result.notes), stacklevel=2)
        return result

    def _grids(self, search: Any) -> dict[str, Sequence[Any]]:
        """Return the values of each parameter to search, from small to large variance."""
        if search is None:
            free = [] if self._temperature_fixed else ["temperature"]
            search = [*free, "sigma_noise" if self.likelihood == "regression" else "logit_scale"]
            if self.likelihood == "reward_modeling":
                search = free
        given = dict(search) if isinstance(search, Mapping) else dict.fromkeys(search)
        validation.check_search(
            given, SETTING_NAMES, self.likelihood, self._temperature_fixed, self.residual, self.temperature
        )
        sizes = [n for n, _ in self.snapshots]
        limits = {"n_eigenvalues": list(range(1, self.basis.rank + 1)), "curvature_size": sizes}
        sigma = float(self.sigma_noise)
        rank = self.basis.rank
        defaults: dict[str, Sequence[Any]] = {
            "temperature": decades(-3, 6),
            "prior_precision": decades(-4, 6)[::-1],
            "logit_scale": LOGIT_SCALES,
            "residual_scale": decades(-10, 1),
            "n_eigenvalues": sorted({k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500) if k < rank} | {rank}),
            "curvature_size": sizes[::-1],
            "sigma_noise": [sigma * 10 ** (e / 2) for e in range(-6, 7)],
        }
        return {
            k: defaults[k] if values is None else validation.check_values(k, values, limits.get(k))
            for k, values in given.items()
        }

    def _result(
        self,
        scorer: Scorer,
        found: Search,
        grids: dict[str, Sequence[Any]],
        applied: bool,
        link_approx: str,
        n_samples: int,
    ) -> TuningResult:
        predictor = self._predictor(link_approx, n_samples, diagonal_output=scorer.loss is None)
        best, each = found.best, scorer.each(predictor, found.best)

        def predict_outputs(outputs: Outputs) -> Prediction:
            return self._predict_from(outputs, link_approx, n_samples, diagonal_output=scorer.loss is None)

        compared_with = {
            name: compared(method, found.table[best], each)
            for name, method in baselines(scorer, predict_outputs, self._setting(), grids)
        }
        plain = partial(map_prediction, likelihood=scorer.likelihood)
        start = self._setting().at(logit_scale=1.0)
        with torch.no_grad():
            equals_map = all(
                _difference(predictor(b, best), plain(b, start), float(best.sigma_noise)) < 5e-4
                for b in scorer.data
            )
        return TuningResult(
            best,
            found.table[best],
            tuple(grids),
            tuple(found.table.items()),
            compared_with,
            scorer.data.n_inputs,
            "mean NLL"
            if scorer.loss is None
            else getattr(scorer.loss, "__name__", type(scorer.loss).__name__),
            applied,
            remarks(found.table[best], compared_with, scorer.data.n_inputs, equals_map),
        )

    def _apply(self, setting: Setting, names: Sequence[str]) -> None:
        if "curvature_size" in names:
            self._keep_snapshot(setting.curvature_size)
        if "n_eigenvalues" in names:
            self._keep_leading(setting.n_eigenvalues)
        if "temperature" in names:
            self._temperature = setting.temperature
        for name in {"prior_precision", "logit_scale", "residual_scale", "sigma_noise"} & set(names):
            setattr(self, name, getattr(setting, name))
        self._posterior_scale = None

    # ------------------------------------------------------------------ candidates

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

    def _predictor(
        self, link_approx: str, n_samples: int, diagonal_output: bool
    ) -> Callable[[Block, Setting], Prediction]:
        """Return what predicts a block of validation data under a setting."""
        latest: list[Any] = [None, None]

        def predictor(block: Block, setting: Setting) -> Prediction:
            if latest[0] is not setting:  # once a candidate, not once a block
                latest[:] = setting, self._gaussian_of(setting)
            outputs = latest[1](block.linearised)
            return self._predict_from(outputs, link_approx, n_samples, diagonal_output)

        return predictor

    def _predict_from(
        self, outputs: Outputs, link_approx: str, n_samples: int, diagonal_output: bool
    ) -> Prediction:
        likelihood = "classification" if self.likelihood == "reward_modeling" else self.likelihood
        return predict(
            outputs,
            likelihood,
            link_approx=link_approx,
            n_samples=n_samples,
            diagonal_output=diagonal_output and likelihood == "regression",
            seed=self.seed,
        )

    def _with_covariance(self, plain: Any, loss: Loss | None) -> Callable[[Block, Setting], Prediction]:
        """Give the user's loss for regression the covariance (B, C, C) it expects, here of zeros."""
        if loss is None or self.likelihood != "regression":
            return plain
        return lambda block, setting: (plain(block, setting)[0], torch.diag_embed(plain(block, setting)[1]))

    def _validation_data(self, loader: Any, progress: Progress, last_layer: bool = False) -> ValidationData:
        """Run the model once over validation data, and keep what candidates need."""
        rank = self.basis.rank

        def linearise(x: Input) -> Iterator[tuple[tuple[int, ...], Linearised, Tensor | None]]:
            for part in self.backend.bounded(x, rank):
                with torch.no_grad():
                    seen = self._linearised(part)
                norms = self.backend.last_layer_norms(part) if last_layer else None
                yield self.backend.positions(part), _detached(seen), norms

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


def _difference(left: Prediction, right: Prediction, sigma: float) -> float:
    """Return by how much probabilities differ from MAP's; or the variance of outputs, relative to the noise."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return float((left.double() - right.double()).abs().max())
    variance = left[1] if left[1].ndim == left[0].ndim else left[1].diagonal(dim1=-2, dim2=-1)
    return float(variance.max()) / sigma**2


def _warn_of_edge(search: Search, best: Setting, name: str, values: Sequence[float], argument: str) -> None:
    """Warn of an optimum on the edge of a grid in ascending order, where the loss still falls."""
    value = getattr(best, name)
    for edge, inner, word, bound in ((0, 1, "below", "min"), (-1, -2, "above", "max")):
        if len(values) > 1 and math.isclose(value, values[edge], rel_tol=1e-6):
            gain = search(best.at(**{name: values[inner]})) - search.table[best]
            if gain > FLAT_EDGE * abs(search.table[best]):
                hint = f" Widen the grid with {argument.format(bound)}." if argument else ""
                warnings.warn(
                    f"The best {name}, {value:.4g}, lies on an edge of its grid ({values[0]:.4g} to "
                    f"{values[-1]:.4g}); the loss still falls {word} it.{hint}",
                    stacklevel=4,
                )
