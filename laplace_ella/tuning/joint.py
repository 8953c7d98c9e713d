r"""``optimize_hyperparameters``: all that predictions depend on, from one pass over the validation data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data import validation
from ..data.progress import Progress
from ..posterior.likelihoods import Prediction
from ..posterior.setting import SETTING_NAMES, Setting
from .baselines import Predictor, Scorer, baselines
from .candidates import Candidates
from .result import TuningResult, compared, remarks
from .scoring import Loss
from .search import (
    DISCRETE,
    LOGIT_SCALES,
    Search,
    decades,
    joint_search,
    noises,
    refine,
)


class JointTuning(Candidates):
    """Tuning of any of the parameters of the predictive, with simpler methods beside it."""

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
            "sigma_noise"); with a residual, "residual_scale" too. A temperature fixed by the user is
            left out. A parameter on which the loss does not depend keeps its value.
        link_approx : str
            The link of the predictions that the setting is for.
        n_samples : int
            How many samples "mc" takes.
        loss : torchmetrics.Metric or callable, optional
            Of (probabilities, targets), or (means, covariances, targets) for regression; lower is better.
            Default: the mean NLL an input (or position), which is refined by L-BFGS; any
            other loss by golden-section search.
        apply : bool
            Give the estimator the best setting. Directions beyond K' are dropped until the next fit.
        progress_bar : bool
            Show the progress.

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
        what = "optimize_hyperparameters()"
        with torch.inference_mode(False), self._changes() as view:
            with view._ranks.together(f"the arguments of {what}"):
                view._check_H_init()
                validation.check_prediction("glm", link_approx, n_samples, None, None)
                validation.check_link(view.likelihood, link_approx)
                validation.check_loss(loss)
                validation.check_loader("val_loader", val_loader)
                validation.check_flag("apply", apply)
                validation.check_flag("progress_bar", progress_bar)
                grids = view._grids(search)
            values = {k: [float(v) for v in grid] for k, grid in grids.items()}
            view._require_same_search(
                what, search=values, link_approx=str(link_approx), n_samples=int(n_samples)
            )
            progress = view._progress(progress_bar)
            result, skipped = view._tuned(val_loader, grids, link_approx, n_samples, loss, apply, progress)
        if skipped:
            warnings.warn(skipped, stacklevel=2)
        if result.notes:
            warnings.warn(" ".join(result.notes), stacklevel=2)
        return result

    def _tuned(
        self,
        val_loader: Iterable[Any],
        grids: dict[str, Sequence[Any]],
        link_approx: str,
        n_samples: int,
        loss: Loss | None,
        apply: bool,
        progress: Progress,
    ) -> tuple[TuningResult, str]:
        """Tune, and return the result with what is to be said of candidates that were skipped."""
        scorer = self._scorer(val_loader, loss, progress, last_layer=True)
        predict_from = self._link(link_approx, n_samples, loss)
        predictor = self._predictor(predict_from)
        found = Search(partial(scorer, predictor))
        joint_search(found, self._setting(), grids, progress)
        refine(found, grids, partial(scorer.gradient, predictor) if loss is None else None)
        skipped = found.conclude()
        best, ignored = found.without_ignored(self._setting(), grids)
        each = scorer.each(predictor, best)
        methods = baselines(scorer, predict_from, self._setting(), grids, self.n_outputs)
        compared_with = {
            name: compared(method, found.table[best], each)
            for name, method in progress(methods, "Simpler methods")
        }
        result = TuningResult(
            best,
            found.table[best],
            tuple(grids),
            tuple(found.table.items()),
            compared_with,
            scorer.n_inputs,
            scorer.name,
            apply,
            remarks(
                compared_with,
                found.table[best],
                scorer.n_inputs,
                self._equals_map(scorer, predictor, best),
                _remarks_on_values(found, best, ignored, grids),
            ),
        )
        if apply:
            self._apply(result.best, tuple(grids))
        return result, skipped

    def _grids(self, search: Any) -> dict[str, Sequence[Any]]:
        """Return the values of each parameter to search, from small to large variance."""
        if search is None:
            free = [] if self._temperature_fixed else ["temperature"]
            own = {"regression": ["sigma_noise"], "reward_modeling": []}
            residual = [] if self.residual == "none" else ["residual_scale"]
            search = [*free, *own.get(self.likelihood, ["logit_scale"]), *residual]
        given = validation.by_name("search", search)
        validation.check_search(
            given, SETTING_NAMES, self.likelihood, self._temperature_fixed, self.residual, self.temperature
        )
        sizes = [n for n, _ in self.snapshots]
        limits = {"n_eigenvalues": list(range(1, self.basis.rank + 1)), "curvature_size": sizes}
        rank = self.basis.rank
        defaults: dict[str, Sequence[Any]] = {
            "temperature": decades(-3, 6),
            "prior_precision": decades(-4, 6)[::-1],
            "logit_scale": LOGIT_SCALES,
            "residual_scale": decades(-10, 1),
            # From large to small: directions are not given up for a tie.
            "n_eigenvalues": [rank, *(k for k in (500, 200, 100, 50, 20, 10, 5, 2, 1) if k < rank)],
            "curvature_size": sizes[::-1],
            "sigma_noise": noises(float(self.sigma_noise)),
        }
        return {
            k: defaults[k] if values is None else validation.check_values(k, values, limits.get(k))
            for k, values in given.items()
        }

    @torch.no_grad()
    def _equals_map(self, scorer: Scorer, predictor: Predictor, best: Setting) -> bool:
        """Tell whether the best setting predicts what the network does, to 3 digits."""
        start, sigma = self._setting().at(logit_scale=1.0), float(best.sigma_noise)
        ours, of_map = predictor(best), scorer.of_map(start)
        differs = False
        with scorer.ranks.together("the comparison with MAP"):
            differs = any(_difference(ours(b), of_map(b), sigma) >= 5e-4 for b in scorer.data)
        return not scorer.ranks.any(differs, "the comparison with MAP")

    def _apply(self, setting: Setting, names: Sequence[str]) -> None:
        if "curvature_size" in names:
            self._keep_snapshot(setting.curvature_size)
        if "n_eigenvalues" in names and setting.n_eigenvalues < self.basis.rank:
            self._keep_leading(setting.n_eigenvalues)
        if "temperature" in names:
            self._temperature = setting.temperature
        for name in {"prior_precision", "logit_scale", "residual_scale", "sigma_noise"} & set(names):
            setattr(self, name, getattr(setting, name))


def _remarks_on_values(
    found: Search, best: Setting, ignored: Sequence[str], grids: Mapping[str, Sequence[Any]]
) -> list[str]:
    """Say where the best values lie on edges, and which parameters the loss ignores."""
    values = {k: sorted(v) for k, v in grids.items() if k not in (*DISCRETE, *ignored)}
    temperatures = values.get("temperature", [])
    if len(temperatures) > 1 and best.temperature <= 1.01 * temperatures[0]:
        notes = [
            "The best temperature is the smallest: the variance in the span of the basis does not help on these data."
        ]
    else:
        notes = [found.edge(k, v) for k, v in values.items()]
    return notes + [
        f"The loss does not depend on {k}, which is left at {getattr(best, k):.4g}." for k in ignored
    ]


def _difference(left: Prediction, right: Prediction, sigma: float) -> float:
    """Return by how much probabilities differ from MAP's; or the variance of outputs, relative to the noise."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return float((left.double() - right.double()).abs().max())
    variance = left[1] if left[1].ndim == left[0].ndim else left[1].diagonal(dim1=-2, dim2=-1)
    return float(variance.max()) / sigma**2
