r"""``optimize_prior_precision``: evidence as the host has it, grid search from one pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data import validation
from ..data.batches import copied
from ..data.progress import Progress
from ..data.stream import Stream
from ..parallel.ranks import ALONE
from ..posterior.likelihoods import LIKELIHOODS, Prediction, checked_targets
from ..posterior.setting import Setting
from .candidates import Candidates
from .scoring import Loss, score
from .search import FLAT, TEMPERATURES, Search, grid_search

_FLAT_LOSS = (
    "The loss is the same for every setting on the grid, so the setting is left as it was. "
    "A loss of the mean alone does not depend on prior and temperature."
)


class PriorTuning(Candidates):
    """Tuning of the prior precision, and of the temperature with it.

    laplace-torch, next in line, maximises the evidence.
    """

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
        - A loss is minimised; it gets probabilities, or means and covariances. A metric that is
          better when higher is refused.
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
        # The evidence is the same on all ranks, each of which may maximise it by itself.
        ranks = self._ranks if method == "gridsearch" else ALONE
        with ranks.together("the arguments of optimize_prior_precision()"):
            validation.check_choice("prior_structure", prior_structure, ("scalar", "layerwise", "diag"))
            validation.check_size("grid_size", grid_size, optional=False)
            validation.check_choice("link_approx", link_approx, validation.LINKS)
            validation.check_flag("verbose", verbose)
            validation.check_flag("progress_bar", progress_bar)
            low, high, base = validation.check_interval(
                log_prior_prec_min, log_prior_prec_max, log_prior_prec_base, grid_size, method == "gridsearch"
            )
            n_steps, lr = validation.check_count("n_steps", n_steps), validation.positive_number("lr", lr)
            init_prior_prec = validation.as_prior(init_prior_prec)
            validation.check_prior_precision("init_prior_prec", init_prior_prec, self.n_layers, self.n_params)
            if val_loader is not None:
                validation.check_loader("val_loader", val_loader)
            pred_type = validation.check_prediction(
                pred_type, "mc" if method == "marglik" else link_approx, n_samples, None, None
            )
            if method == "gridsearch":
                validation.check_link(self.likelihood, link_approx)
                validation.check_loss(loss)
                validation.check_given(
                    "val_loader", val_loader, "method='gridsearch' scores on validation data"
                )
            self._check_H_init()
        with torch.inference_mode(False), self._changes() as view:
            if method == "marglik":
                view._maximize_evidence(
                    n_steps, lr, init_prior_prec, prior_structure, val_loader, progress_bar
                )
            else:
                grid = torch.logspace(low, high, int(grid_size), base=base, dtype=torch.float32, device="cpu")
                view._search_grid(
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
        if not isinstance(init, Tensor):
            init = torch.tensor(init, dtype=torch.float32, device=self._device)
        # The host's optimiser keeps its steps on the default device.
        with warnings.catch_warnings(), torch.enable_grad(), self._device:
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
                f"The evidence tunes the prior only: the temperature stays {self.temperature:.4g}"
                + (
                    ". Assign temperature=1.0 for the posterior that the evidence is of, "
                    if self.likelihood == "regression"
                    else "; at 1, ELLA's predictions are close to MAP's whatever the prior. Pass temperature=1.0 if that is "
                    "what you want, "
                )
                + "or use method='gridsearch' with a val_loader to tune both.",
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
        start, before = self._setting(), (self.prior_precision, self._temperature)
        self._require_same_search(
            "optimize_prior_precision()",
            grid=priors,
            pred_type=pred_type,
            link_approx=str(link_approx),
            n_samples=int(n_samples),
            temperature_fixed=self._temperature_fixed,
        )
        progress = self._progress(progress_bar)
        if pred_type == "nn":
            evaluate, score_of_map = self._nn_scores(val_loader, loss, n_samples, progress)
        else:
            scorer = self._scorer(val_loader, loss, progress)
            evaluate = partial(scorer, self._predictor(self._link(link_approx, n_samples, loss)))
            score_of_map = partial(scorer, scorer.of_map, start)
        search = Search(evaluate)
        grid_search(search, start, priors, not self._temperature_fixed, progress)
        skipped = search.conclude()
        if search.is_flat():
            remarks = [_FLAT_LOSS]
            self.prior_precision, self._temperature = before  # which "nn" changes
        else:
            best, remarks = self._chosen(search, priors, score_of_map)
            self.prior_precision, self._temperature = best.prior_precision, best.temperature
        for remark in filter(None, [skipped, *remarks]):
            warnings.warn(remark, stacklevel=3)

    def _chosen(
        self, search: Search, priors: Sequence[float], score_of_map: Callable[[], float]
    ) -> tuple[Setting, list[str]]:
        """Return the setting to use, and what is to be said of it."""
        best, lowest = search.best, search.table[search.best]
        edge = search.edge("prior_precision", sorted(priors))
        if edge:
            edge = f"{edge} Widen it with log_prior_prec_min or log_prior_prec_max."
        if self._temperature_fixed:
            return best, [edge]
        map_score = score_of_map()
        if lowest < map_score - FLAT * abs(map_score):
            return best, [edge, search.edge("temperature", TEMPERATURES)]
        scaled = f", its logits scaled by {self.logit_scale:.4g}" if self.logit_scale != 1 else ""
        remark = (
            f"No setting predicts better than the network itself{scaled} (MAP: {map_score:.5g}, the best setting: "
            f"{lowest:.5g}); the setting of the smallest variance is used."
        )
        return best.at(temperature=TEMPERATURES[0], prior_precision=max(priors)), [remark]

    def _nn_scores(
        self, val_loader: Any, loss: Any, n_samples: int, progress: Progress
    ) -> tuple[Callable[[Setting], float], Callable[[], float]]:
        """Return what scores a setting by the "nn" predictive, which runs the model; and what scores MAP."""
        likelihood, ranks, kept = LIKELIHOODS[self.likelihood], self._ranks, []
        with ranks.together("the validation data"):
            stream = Stream(
                val_loader, self.dict_key_x, self.dict_key_y, self.backend.inputs, ranks, progress
            )
            for batch in stream.batches("Validation data"):
                f = self.backend.forward(batch.x)
                flat_f, name = f.flatten(0, -2), f"validation {batch.name}"
                y = checked_targets(likelihood, batch.y, flat_f, f.shape[1:-1], name)
                # Copies: a loader may fill its buffers again.
                kept.append((copied(batch.x), flat_f.clone(), y.clone()))
        validation.check_some(ranks.greatest(len(kept), "the validation data"), "validation loader")
        # As in a call, in which reward models are fitted as classifiers.
        predicted_as = "classification" if self.likelihood == "reward_modeling" else self.likelihood

        def predictions() -> Iterator[tuple[Prediction, Tensor]]:
            # The same noise for every candidate, so that the best is not the luckiest.
            generator = torch.Generator(self._device).manual_seed(self.seed)
            offsets = self._weight_offsets(n_samples, generator)
            return ((self._nn_prediction(offsets, x, predicted_as), y) for x, _, y in kept)

        @torch.no_grad()
        def evaluate(setting: Setting) -> float:
            self.prior_precision, self._temperature = setting.prior_precision, setting.temperature
            return score(
                predictions, likelihood, loss, self.sigma_noise.double().square(), ranks, self._device
            )

        def score_of_map() -> float:
            def plain() -> Iterator[tuple[Prediction, Tensor]]:
                return ((likelihood.certain(f), y) for _, f, y in kept)

            return score(plain, likelihood, loss, self.sigma_noise.double().square(), ranks, self._device)

        return evaluate, score_of_map
