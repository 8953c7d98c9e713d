r"""Choosing a method: the simplest one that is as good as the best on data held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any

from ..data.checks import check_choice, shown
from ..data.progress import duration
from ..data.stream import Stream
from ..network.engine import Engine
from ..parallel.ranks import Ranks
from ..posterior.gaussian import Outputs
from ..posterior.likelihoods import Prediction
from ..posterior.posterior import Posterior
from ..posterior.setting import PER_CLASS, Setting
from . import joint
from .baselines import baseline, simpler_methods
from .comparison import EQUAL, few_inputs, judged
from .methods import FEWEST, Method, Scores, Tuned, tuned
from .result import TuningResult
from .scorer import HeldOut
from .scoring import SKIPPED
from .search import FLAT


def searched(
    posterior: Posterior, engine: Engine, stream: Stream, ranks: Ranks, search: joint.JointSearch
) -> tuple[TuningResult, list[str]]:
    """Tune ELLA, or all methods, and return the result, and what is to be said.

    Raises
    ------
    ValueError
        If no setting has a finite loss, or there are too few data to choose.
    """
    posterior = posterior.with_variance("ella")  # whose features are looked at
    if not search.auto:
        return joint.tuned(posterior, engine, stream, ranks, search)
    scores, predict_from = joint.scores_of(posterior, engine, stream, ranks, search)
    n_inputs = scores.scorer.n_inputs
    if n_inputs < FEWEST and search.method is None:
        raise ValueError(
            f"search='auto' chooses by cross-validation, which takes {FEWEST} validation inputs or more; got {n_inputs}. "
            "Use more, or say which method you want with method=."
        )
    methods = all_methods(posterior, scores, predict_from)
    available = [m for m in methods.values() if m is not None]
    title = f"Methods{_price(available, scores, posterior.plain)}"
    done = {m.name: tuned(m) for m in stream.progress(available, title)}
    if search.method is not None and search.method not in done:
        raise ValueError(f"method={search.method!r} is not available here; there are {list(done)}.")
    name, reference, reason = _choice(done, search.method)
    chosen = done[name]
    skipped = chosen.search.conclude()
    each = scores.scorer.each(chosen.method.scores.predictor, chosen.best)
    result = TuningResult(
        best=chosen.best,
        score=chosen.score,
        searched=(*chosen.method.grids, *chosen.method.per_class),
        table=tuple(chosen.search.table.items()),
        baselines={k: baseline(done[k], chosen.score, each) if k in done else None for k in methods},
        n_inputs=n_inputs,
        loss=scores.scorer.name,
        applied=search.apply,
        notes=(*filter(None, joint.remarks_on_values(chosen)), *few_inputs(n_inputs)),
        held_out=judged(done, reference),
        chosen=name,
        reference=reference,
        reason=reason,
        variance=chosen.method.variance,
    )
    return result, list(filter(None, [skipped, " ".join(result.notes)]))


def asked_for(posterior: Posterior, search: Any, method: Any, **options: Any) -> joint.JointSearch:
    """Return a search for what the user named; "auto" chooses among methods, or takes the one named.

    Raises
    ------
    ValueError
        If a parameter, a value or a method cannot be had.
    """
    auto = isinstance(search, str) and search == "auto"
    if not auto:
        if method is not None:
            raise ValueError(
                f"method goes with search='auto' only; got {shown(method)}. Leave one of them out."
            )
        return joint.JointSearch(*joint.grids_of(posterior, search), **options)
    if method is not None:
        check_choice("method", method, names_of(posterior))
    return joint.JointSearch({}, (), **options, auto=True, method=method)


def names_of(posterior: Posterior) -> list[str]:
    """Return the names of all methods that a posterior's likelihood has, from the simplest on."""
    likelihood = posterior.likelihood
    of_logits = ["temperature scaling", "vector scaling"] if likelihood.has_logits else []
    return ["MAP", *of_logits, "constant variance", "last-layer variance", *_kinds_of_ella(posterior)]


def _kinds_of_ella(posterior: Posterior) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the ways to tune ELLA by name: the parameters searched on grids, and those of each class."""
    likelihood = posterior.likelihood
    found: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {"ELLA (T)": ((), ())}
    if likelihood.has_logits:
        found["ELLA (T, s)"] = (("logit_scale",), ())
        found["ELLA (T, class scales and biases)"] = (("logit_scale",), PER_CLASS)
    if likelihood.has_noise:
        found["ELLA (T, sigma)"] = (("sigma_noise",), ())
    return found


def all_methods(
    posterior: Posterior, scores: Scores, predict_from: Callable[[Outputs], Prediction]
) -> dict[str, Method | None]:
    """Return all methods from the simplest on; None where one is not available.

    With a temperature that the user fixed, ELLA keeps it, and the methods whose variance it is are not available.
    """
    grids, fixed, n_outputs = (
        joint.usual_grids(posterior),
        posterior.temperature_fixed,
        posterior.fit.n_outputs,
    )
    own = {k: grids[k] for k in ("logit_scale", "sigma_noise") if _has(posterior, k)}
    known = names_of(posterior)
    simpler = simpler_methods(scores.scorer, predict_from, posterior.plain, own, n_outputs)
    found = {
        k: None if m is None or (fixed and "temperature" in m.grids) else m
        for k, m in simpler.items()
        if k in known
    }
    always = [*([] if fixed else ["temperature"]), *(["residual_scale"] if posterior.residual.adds else [])]
    for name, (more, per_class) in _kinds_of_ella(posterior).items():
        searched = {k: grids[k] for k in (*always, *more)}
        starts = tuple(
            s.at(logit_scale=1.0, class_scales=None, class_biases=None)
            for s in joint.starts_of(posterior, searched)
        )
        found[name] = Method(name, scores, starts, searched, per_class, n_outputs)
    return found


def _price(methods: Sequence[Method], scores: Scores, setting: Setting) -> str:
    """Say how long tuning the methods takes, from the time of one prediction of all data; nothing with a loss of the user's."""
    if scores.scorer.loss is not None:
        return ""
    began = 0.0
    with suppress(*SKIPPED):
        for _ in range(2):  # samples are drawn the first time
            began = perf_counter()
            scores.scorer(scores.predictor, setting)
    n_predictions = sum(m.n_predictions for m in methods if m.variance != "none")
    return f", about {duration(n_predictions * (perf_counter() - began))}"


def _has(posterior: Posterior, name: str) -> bool:
    return {"logit_scale": posterior.likelihood.has_logits, "sigma_noise": posterior.likelihood.has_noise}[
        name
    ]


def _choice(done: Mapping[str, Tuned], asked: str | None) -> tuple[str, str, str]:
    """Return the method to use, the one with the smallest loss on data held out, and why.

    The one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984) takes the simplest method
    whose loss is at most one standard error above the smallest, the two being paired; a difference that is a ten-thousandth of
    the loss is none, however small its error. A method that is worse than a simpler one is passed over, whatever its error. MAP is the choice only if the next method's loss is the same: the one number
    of temperature scaling is tuned well enough by few data, and the rule would give it up wherever what it gains is less
    than a standard error, which is large on few data. Where MAP is the best, the next method is taken, and not one that
    predicts as MAP does at a higher price.
    """
    compared = {k: m.held_out for k, m in done.items() if m.held_out is not None}
    best = _first_of_the_best(compared) if compared else str(asked)
    if asked is not None:
        return asked, best, "It was asked for."
    simplest, following, *_ = compared
    if best == simplest:
        next_one = f"{following[0].upper()}{following[1:]}"
        gain = done[simplest].score - done[following].score
        if gain <= FLAT * abs(done[simplest].score):
            return simplest, best, f"{next_one} changes nothing, and no other method is better."
        difference, error = compared[following].minus(compared[simplest])
        reason = f"{simplest} is the best on data held out, and it is the next method"
        return following, best, f"{reason} ({difference:+.4f} +- {error:.4f})."
    others = {k: v for k, v in compared.items() if k != simplest}
    name, found = _first_within_an_error(others, best)
    if name == best:
        reason = "It is the best on data held out, and no simpler method that is tuned is within a standard error of it."
        return name, best, reason
    behind = f"{best} ({found[0]:+.4f} +- {found[1]:.4f})"
    return (
        name,
        best,
        f"It is the simplest method that is tuned within one standard error of the best on data held out, {behind}.",
    )


def _first_within_an_error(compared: Mapping[str, HeldOut], best: str) -> tuple[str, tuple[float, float]]:
    """Return the simplest method within a standard error of the best, and no worse than a simpler one; and how far behind it is."""
    rounding, lowest = EQUAL * abs(compared[best].score), math.inf
    for name, method in compared.items():
        found = method.minus(compared[best])
        if found[0] <= found[1] + rounding and method.score <= lowest + rounding:
            return name, found
        lowest = min(lowest, method.score)
    return best, (0.0, 0.0)


def _first_of_the_best(compared: Mapping[str, HeldOut]) -> str:
    """Return the simplest method whose loss on data held out differs from the smallest by nothing that counts."""
    lowest = min(found.score for found in compared.values())
    return next(k for k, found in compared.items() if found.score - lowest <= EQUAL * abs(lowest))
