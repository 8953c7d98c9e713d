r"""The early stopping of the paper: validation data choose how many curvature inputs G is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..data.stream import Stream
from ..network.engine import Engine
from ..parallel.ranks import Ranks
from ..posterior.likelihoods import name_of
from ..posterior.posterior import Posterior
from .candidates import link_of, predictor_of, require_same_search, scorer_of


def stopped_early(
    posterior: Posterior, engine: Engine, stream: Stream, ranks: Ranks, link: str, free: bool
) -> dict[str, Any]:
    r"""Score every snapshot of G; if free, keep the best n, with T = N / n and :math:`\delta n / N`.

    Returns
    -------
    dict
        The fit, with the scores in its history, and the values of the setting.
    """
    posterior = posterior.with_variance("ella")
    fit, setting = posterior.fit, posterior.setting
    require_same_search(posterior, ranks, "fit()", link_approx=name_of(link))
    scorer = scorer_of(posterior, engine, stream, ranks)
    predict_from = link_of(posterior, link, 100)
    # The covariance T [G + T delta I]^-1 adds T delta to G, whatever T is now, so that fitting again changes nothing.
    delta, residual_variance = setting.prior_precision * setting.temperature, posterior.residual_variance

    def stopped_at(n: int) -> Posterior:
        if not free:
            return posterior
        prior = delta * (n / fit.n_data)
        scale = setting.residual_scale
        if posterior.residual.adds:  # the residual is not changed by the temperature
            scale = residual_variance * float(prior)
        new = setting.at(prior_precision=prior, temperature=fit.n_data / n, residual_scale=scale)
        return replace(posterior, setting=new, current=fit.first(n))

    scores = {}
    for n, _ in stream.progress(fit.snapshots, "Early stopping"):
        candidate = stopped_at(n)
        plain = candidate.plain.at(curvature_size=n)
        scores[n] = scorer(predictor_of(candidate, predict_from), plain)
    best = stopped_at(min(scores, key=scores.__getitem__))
    history = {"processed_examples": [float(n) for n in scores], "val_nll": list(scores.values())}
    names = ("prior_precision", "temperature", "residual_scale") if free else ()
    values = {name: getattr(best.setting, name) for name in names}
    changes = {"variance": "ella"} if free else {}
    if free and posterior.likelihood.has_probabilities:
        changes["link"] = name_of(link)
    return {"current": replace(best.fit, history=history), "setting": values, **changes}
