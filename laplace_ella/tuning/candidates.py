r"""Candidates: what each setting would predict on validation data that the model has seen once.

Features depend on none of the parameters tuned, so the model runs once over the
validation data, and every candidate is scored from what was kept of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ..data.hashing import digest
from ..data.stream import Batch, Stream
from ..network.engine import Engine
from ..parallel.ranks import Ranks
from ..parallel.sharding import work_through
from ..posterior.gaussian import Outputs
from ..posterior.likelihoods import Prediction
from ..posterior.links import Noise
from ..posterior.posterior import Posterior
from ..posterior.prediction import attend, linearise, moments, numbers_per_output, predict
from ..posterior.setting import PER_CLASS, SETTING_NAMES, Setting
from ..posterior.targets import check_unweighted, checked_targets, scored_rows
from .scorer import Predictor, Scorer
from .scoring import Block, Loss, ValidationData
from .store import Store


def require_same_search(posterior: Posterior, ranks: Ranks, what: str, **arguments: Any) -> None:
    """Require that all ranks search the same, from the same posterior."""
    plain = posterior.plain
    setting = [
        None if v is None else float(v)
        for k in SETTING_NAMES
        if k not in PER_CLASS
        for v in [getattr(plain, k)]
    ]
    setting += [v for k in PER_CLASS for v in getattr(plain, k) or ()]
    fitted = digest(posterior.fit.H, posterior.setting.prior_precision)
    of_posterior = {"setting": setting, "residual": posterior.residual.name, "seed": posterior.seed}
    ranks.require_equal({**arguments, **of_posterior, "fit": fitted}, what)


def link_of(
    posterior: Posterior, link: str, n_samples: int, loss: Loss | None = None
) -> Callable[[Outputs], Prediction]:
    """Return what turns a Gaussian over outputs into the prediction that a loss is of.

    Without probabilities, the NLL is of moments of the outputs, and a user's loss of those of the targets.
    """
    likelihood = posterior.likelihood
    if loss is None and not likelihood.has_probabilities:
        return partial(moments, diagonal_output=likelihood.scores_marginals)
    return partial(predict, likelihood=likelihood, link=link, noise=Noise(n_samples, posterior.seed))


def predictor_of(posterior: Posterior, predict_from: Callable[[Outputs], Prediction]) -> Predictor:
    """Return a function of a setting, which returns what predicts a block of validation data under it."""

    def predictor(setting: Setting) -> Callable[[Block], Prediction]:
        gaussian = posterior.at(setting).differentiable()
        return lambda block: predict_from(gaussian(block.linearised))

    return predictor


def scorer_of(
    posterior: Posterior,
    engine: Engine,
    stream: Stream,
    ranks: Ranks,
    loss: Loss | None = None,
    last_layer: bool = False,
) -> Scorer:
    """Run the model once over validation data, and keep what candidates need.

    Parameters
    ----------
    last_layer : bool
        Whether to keep what simpler methods need of the last layer.
    """
    likelihood, spill, width = posterior.likelihood, engine.spill, numbers_per_output(posterior)
    data = ValidationData(likelihood, Store(engine.budget() // 2, None if spill is None else spill.folder))

    def keep(part: Batch | None) -> None:
        if part is None:
            attend(posterior, engine, posterior.residual)
            return
        norms = engine.last_layer_norms(part.x) if last_layer else None
        seen, axes = linearise(posterior, engine, part.x).detached(), engine.axes(part.x)
        check_unweighted(part.weights, f"validation {part.name}")
        targets = checked_targets(likelihood, part.y, seen.f, axes, f"validation {part.name}")
        of_rows = part.positions.to(targets.device).repeat_interleave(len(targets) // len(part.y))
        block, rows = Block(replace(seen, norms=norms), targets, of_rows), scored_rows(likelihood, part.y)
        data.append(block if rows is None else block.of(rows.to(targets.device)))

    parts = stream.parts("Validation data", partial(engine.bounded, width=width))
    work_through(parts, keep, ranks, posterior.fit.basis.ranks, "the validation data")
    return Scorer(data, loss, engine.device, ranks)
