r"""Tuning of all that predictions depend on, from one pass over the validation data, with simpler methods beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.stream import Stream
from ..network.engine import Engine
from ..parallel.ranks import Ranks
from ..posterior.likelihoods import Prediction
from ..posterior.posterior import Posterior
from ..posterior.setting import SETTING_NAMES, USUAL_RANKS, Setting
from .baselines import Predictor, Scorer, baselines
from .candidates import link_of, predictor_of, require_same_search, scorer_of
from .checks import by_name, check_search, check_values
from .result import TuningResult, remarks
from .scoring import Loss
from .search import DISCRETE, LOGIT_SCALES, Search, decades, noises

Grids = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class JointSearch:
    """A search over grids of several parameters.

    Attributes
    ----------
    grids : mapping
        Name of a parameter -> its values, from small to large variance.
    link : str
    n_samples : int
    loss : torchmetrics.Metric or callable, optional
    apply : bool
        Whether the estimator is given the best setting.
    """

    grids: Grids
    link: str
    n_samples: int
    loss: Loss | None = None
    apply: bool = True


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
    if "n_eigenvalues" in grids:  # features of all directions that are tried
        posterior = posterior.using(max(grids["n_eigenvalues"]))
    values = {k: [float(v) for v in grid] for k, grid in grids.items()}
    options = {"link_approx": search.link, "n_samples": search.n_samples}
    require_same_search(posterior, ranks, "optimize_hyperparameters()", search=values, **options)
    scorer = scorer_of(posterior, engine, stream, ranks, search.loss, last_layer=True)
    predict_from = link_of(posterior, search.link, search.n_samples, search.loss)
    predictor = predictor_of(posterior, predict_from)
    found = scorer.search(predictor, start, grids, progress)
    skipped = found.conclude()
    best, ignored = found.without_ignored(start, grids)
    each, lowest = scorer.each(predictor, best), found.table[best]
    methods = baselines(scorer, predict_from, start, grids, posterior.fit.n_outputs, lowest, each)
    simpler = dict(progress(methods, "Simpler methods"))
    of_values = _remarks_on_values(found, best, ignored, grids)
    is_map = _equals_map(scorer, predictor, start, best)
    result = TuningResult(
        best=best,
        score=lowest,
        searched=tuple(grids),
        table=tuple(found.table.items()),
        baselines=simpler,
        n_inputs=scorer.n_inputs,
        loss=scorer.name,
        applied=search.apply,
        notes=remarks(simpler, lowest, scorer.n_inputs, is_map, of_values),
    )
    return result, list(filter(None, [skipped, " ".join(result.notes)]))


def grids_of(posterior: Posterior, search: Any) -> dict[str, Sequence[Any]]:
    """Return the values of each parameter to search, from small to large variance.

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
    sizes, rank = [n for n, _ in fit.snapshots], fit.basis.rank
    limits = {"n_eigenvalues": list(range(1, rank + 1)), "curvature_size": sizes}
    defaults: dict[str, Sequence[Any]] = {
        "temperature": decades(-3, 6),
        "prior_precision": decades(-4, 6)[::-1],
        "logit_scale": LOGIT_SCALES,
        "residual_scale": decades(-10, 1),
        # These go from large to small, so that directions are not given up for a tie.
        "n_eigenvalues": [rank, *(k for k in USUAL_RANKS[::-1] if k < rank)],
        "curvature_size": sizes[::-1],
        "sigma_noise": noises(float(posterior.setting.sigma_noise)),
    }
    return {
        k: defaults[k] if values is None else check_values(k, values, limits.get(k))
        for k, values in given.items()
    }


def applied(posterior: Posterior, best: Setting, names: Sequence[str]) -> dict[str, Any]:
    """Return the values of some parameters of a setting, and the fit that they belong to, if they do."""
    fit, n, new = posterior.fit, best.curvature_size, best.rounded(posterior.setting)
    if "curvature_size" in names and n is not None:
        fit = fit.first(n)
    values = {k: getattr(new, k) for k in names if k != "curvature_size"}
    # K' and n are of this fit, and not of one that another thread may have made meanwhile.
    return {"setting": values, **({"current": fit} if set(DISCRETE) & set(names) else {})}


@torch.no_grad()
def _equals_map(scorer: Scorer, predictor: Predictor, start: Setting, best: Setting) -> bool:
    """Tell whether the best setting predicts what the network does, to 3 digits."""
    ours, of_map = predictor(best), scorer.of_map(start.at(logit_scale=1.0))
    sigma, differs = float(best.sigma_noise), False
    with scorer.ranks.together("the comparison with MAP"):
        differs = any(_difference(ours(b), of_map(b), sigma) >= 5e-4 for b in scorer.data)
    return not scorer.ranks.any(differs, "the comparison with MAP")


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
    """Return by how much probabilities differ from MAP's; or the variances of outputs, relative to the noise."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return float((left.double() - right.double()).abs().max())
    mine, of_map = (v if v.ndim == m.ndim else v.diagonal(dim1=-2, dim2=-1) for m, v in (left, right))
    return float((mine - of_map).max()) / sigma**2
