r"""Tuning of all that predictions depend on, from one pass over the validation data, with simpler methods beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.stream import Stream
from ..network.engine import Engine
from ..parallel.ranks import Ranks
from ..posterior.gaussian import Outputs
from ..posterior.likelihoods import Prediction
from ..posterior.posterior import Posterior
from ..posterior.setting import PER_CLASS, SETTING_NAMES, USUAL_RANKS, Setting
from ..posterior.variances import IN_WORDS
from .baselines import baseline, simpler_methods
from .candidates import link_of, predictor_of, require_same_search, scorer_of
from .checks import by_name, check_no_values, check_search, check_values
from .comparison import judged, remarks
from .methods import Method, Scores, Tuned
from .methods import tuned as tune
from .result import TuningResult
from .scorer import Predictor, Scorer
from .scoring import Loss
from .search import DISCRETE, LOGIT_SCALES, decades, noises

Grids = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class JointSearch:
    """A search over grids of several parameters.

    Attributes
    ----------
    grids : mapping
        Name of a parameter -> its values, from small to large variance.
    per_class : tuple of str
        Which of "class_scales" and "class_biases" are tuned, by gradients.
    link : str
    n_samples : int
    loss : torchmetrics.Metric or callable, optional
    apply : bool
        Whether the estimator is given the best setting.
    auto : bool
        Whether a method is chosen instead.
    method : str or None
        The method that the user has chosen.
    """

    grids: Grids
    per_class: tuple[str, ...]
    link: str
    n_samples: int
    loss: Loss | None = None
    apply: bool = True
    auto: bool = False
    method: str | None = None


def tuned(
    posterior: Posterior, engine: Engine, stream: Stream, ranks: Ranks, search: JointSearch
) -> tuple[TuningResult, list[str]]:
    """Tune, and return the result, and what is to be said.

    Raises
    ------
    ValueError
        If no setting has a finite loss.
    """
    grids, start, progress = search.grids, posterior.plain, stream.progress
    scores, predict_from = scores_of(posterior, engine, stream, ranks, search)
    scorer, n_outputs = scores.scorer, posterior.fit.n_outputs
    ours = tune(
        Method("ELLA", scores, starts_of(posterior, grids), grids, search.per_class, n_outputs), progress
    )
    skipped = ours.search.conclude()
    simpler = simpler_methods(scorer, predict_from, start, grids, n_outputs)
    others = {m.name: tune(m) for m in progress(list(filter(None, simpler.values())), "Simpler methods")}
    each = scorer.each(scores.predictor, ours.best)
    held_out = judged({"ELLA": ours, **others}, "ELLA")
    of_values = remarks_on_values(ours)
    is_map = _equals_map(scorer, scores.predictor, start, ours.best)
    result = TuningResult(
        best=ours.best,
        score=ours.score,
        searched=(*grids, *search.per_class),
        table=tuple(ours.search.table.items()),
        baselines={k: baseline(others[k], ours.score, each) if k in others else None for k in simpler},
        n_inputs=scorer.n_inputs,
        loss=scorer.name,
        applied=search.apply,
        notes=remarks(held_out, scorer.n_inputs, is_map, of_values),
        held_out=held_out,
    )
    return result, list(filter(None, [skipped, " ".join(result.notes)]))


def scores_of(
    posterior: Posterior, engine: Engine, stream: Stream, ranks: Ranks, search: JointSearch
) -> tuple[Scores, Callable[[Outputs], Prediction]]:
    """Run the model over validation data; return the scores of ELLA's settings, and what predicts from outputs."""
    if (
        "n_eigenvalues" in search.grids
    ):  # features of all directions that are tried, the present ones among them
        posterior = posterior.using(max(posterior.rank, *search.grids["n_eigenvalues"]))
    values = {k: [float(v) for v in grid] for k, grid in search.grids.items()}
    options = {"link_approx": search.link, "n_samples": search.n_samples, "per_class": search.per_class}
    options |= {"auto": search.auto, "method": search.method}
    require_same_search(posterior, ranks, "optimize_hyperparameters()", search=values, **options)
    scorer = scorer_of(posterior, engine, stream, ranks, search.loss, last_layer=True)
    predict_from = link_of(posterior, search.link, search.n_samples, search.loss)
    return Scores(scorer, predictor_of(posterior, predict_from)), predict_from


def starts_of(posterior: Posterior, grids: Grids) -> tuple[Setting, ...]:
    """Return the settings to start from: the present one, and that with the prior precision that tuning replaced."""
    now, before = posterior.plain, posterior.prior_before
    if "prior_precision" in grids or before is None or now.prior_precision in (None, before):
        return (now,)
    return now, now.at(prior_precision=before)


def grids_of(posterior: Posterior, search: Any) -> tuple[dict[str, Sequence[Any]], tuple[str, ...]]:
    """Return the values of each parameter to search, from small to large variance; and those that have no grid.

    Parameters
    ----------
    search : sequence of str, mapping or None
        What the user passed.

    Raises
    ------
    ValueError
        If a parameter or a value cannot be searched.
    """
    likelihood, residual, fit = posterior.likelihood, posterior.residual, posterior.fit
    if search is None:
        free = [] if posterior.temperature_fixed else ["temperature"]
        search = [*free, *likelihood.tuned, *(["residual_scale"] if residual.adds else [])]
    given = by_name("search", search)
    check_search(given, SETTING_NAMES, posterior)
    limits = {
        "n_eigenvalues": list(range(1, fit.basis.rank + 1)),
        "curvature_size": [n for n, _ in fit.snapshots],
    }
    per_class = tuple(k for k in PER_CLASS if k in given)
    for k in per_class:
        check_no_values(k, given.pop(k))
    usual = usual_grids(posterior)
    return {
        k: usual[k] if values is None else check_values(k, values, limits.get(k))
        for k, values in given.items()
    }, per_class


def usual_grids(posterior: Posterior) -> dict[str, Sequence[Any]]:
    """Return the values of each parameter that are searched unless the user names others."""
    sizes, rank = [n for n, _ in posterior.fit.snapshots], posterior.fit.basis.rank
    return {
        "temperature": decades(-3, 6),
        "prior_precision": decades(-4, 6)[::-1],
        "logit_scale": LOGIT_SCALES,
        "residual_scale": decades(-10, 1),
        # These go from large to small, so that directions are not given up for a tie.
        "n_eigenvalues": [rank, *(k for k in USUAL_RANKS[::-1] if k < rank)],
        "curvature_size": sizes[::-1],
        "sigma_noise": noises(float(posterior.setting.sigma_noise)),
    }


def applied(posterior: Posterior, result: TuningResult, link: str) -> dict[str, Any]:
    """Return what changes of a posterior: the values of a setting, the variance, the link, and the fit if these ask for it."""
    fit, now, best = posterior.fit, posterior.plain, result.best
    differ = [k for k in SETTING_NAMES if getattr(best, k) != getattr(now, k)]
    if "curvature_size" in differ and best.curvature_size is not None:
        fit = fit.first(best.curvature_size)
    new = best.rounded(posterior.setting)
    found: dict[str, Any] = {"setting": {k: getattr(new, k) for k in differ if k != "curvature_size"}}
    found["variance"] = result.variance
    if posterior.likelihood.has_probabilities:
        found["link"] = link
    if "prior_precision" in differ:
        found["prior_before"] = posterior.prior_replaced_by(best.prior_precision)
    # K' and n are of this fit, and not of one that another thread may have made meanwhile.
    return {**found, **({"current": fit} if set(DISCRETE) & set(result.searched) else {})}


@torch.no_grad()
def _equals_map(scorer: Scorer, predictor: Predictor, start: Setting, best: Setting) -> bool:
    """Tell whether the best setting predicts what the network does, to 3 digits."""
    ours, of_map = (
        predictor(best),
        scorer.of_map(start.at(logit_scale=1.0, class_scales=None, class_biases=None)),
    )
    sigma, differs = float(best.sigma_noise), False
    with scorer.ranks.together("the comparison with MAP"):
        differs = any(_difference(ours(b), of_map(b), sigma) >= 5e-4 for b in scorer.data)
    return not scorer.ranks.any(differs, "the comparison with MAP")


def remarks_on_values(ours: Tuned) -> list[str]:
    """Say where the best values lie on edges, which parameters the loss ignores, and whether the prior is another one."""
    best, start, grids = ours.best, ours.method.starts[0], ours.method.grids
    values = {k: sorted(v) for k, v in grids.items() if k not in (*DISCRETE, *ours.ignored)}
    temperatures = values.get("temperature", [])
    if len(temperatures) > 1 and best.temperature <= 1.01 * temperatures[0]:
        notes = [
            f"The best temperature is the smallest: {IN_WORDS[ours.method.variance]} does not help on these data."
        ]
    else:
        notes = [ours.search.edge(k, v, best) for k, v in values.items()]
    if "prior_precision" not in grids and best.prior_precision != start.prior_precision:
        notes.append(
            f"The prior precision that an earlier search found, {start.prior_precision:.4g}, is given up for the one "
            f"before it, {best.prior_precision:.4g}, with which the loss is lower."
        )
    return notes + [
        f"The loss does not depend on {k}, which is left at {getattr(best, k):.4g}." for k in ours.ignored
    ]


def _difference(left: Prediction, right: Prediction, sigma: float) -> float:
    """Return by how much probabilities differ from MAP's; or the variances of outputs, relative to the noise."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return float((left.double() - right.double()).abs().max())
    mine, of_map = (v if v.ndim == m.ndim else v.diagonal(dim1=-2, dim2=-1) for m, v in (left, right))
    return float((mine - of_map).max()) / sigma**2
