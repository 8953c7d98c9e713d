r"""What simpler methods reach on the same validation data, tuned as well: the yardstick of every result.

None needs a Jacobian: MAP, temperature scaling, vector scaling, and a Gaussian over the
outputs whose variance is constant, or grows with what the last layer takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..posterior.gaussian import Outputs
from ..posterior.likelihoods import Prediction
from ..posterior.setting import PER_CLASS, Setting
from ..posterior.variances import VARIANCES, simple_outputs
from .methods import Method, Scores, Tuned
from .scorer import Predictor, Scorer
from .search import LOGIT_SCALES, decades, noises


@dataclass(frozen=True)
class Baseline:
    """A simpler method on the validation data, tuned on them.

    Attributes
    ----------
    score : float
        Its loss on the data that it was tuned on; by default the mean NLL of an input.
    difference : float
        ``score`` minus that of the best setting: positive if the setting is better.
    standard_error : float or None
        The standard error of the difference, paired input by input; None for a loss that is not a mean over inputs.
    parameters : dict of float
        The values that were tuned; for vector scaling, how many there are, and the weight of the ridge.
    setting : Setting or None
        The whole setting, with the scales and biases of classes.
    """

    score: float
    difference: float
    standard_error: float | None
    parameters: dict[str, float]
    setting: Setting | None = field(default=None, repr=False)


def simpler_methods(
    scorer: Scorer,
    predict_outputs: Callable[[Outputs], Prediction],
    start: Setting,
    searched: Mapping[str, Sequence[Any]],
    n_outputs: int,
) -> dict[str, Method | None]:
    """Return the simpler methods from the simplest on; None where one is not available.

    Parameters
    ----------
    predict_outputs : callable
        Gaussian over outputs -> prediction, with the link that is used.
    start : Setting
    searched : mapping
        The parameters that are searched for ELLA, with their grids: where a simpler method has
        them, they are tuned for it too.
    n_outputs : int
        C.
    """
    start = start.at(logit_scale=1.0, class_scales=None, class_biases=None)
    # Variances in other units than ELLA's may have to be smaller.
    grids: dict[str, Sequence[Any]] = {
        "temperature": decades(-6, 6),
        "logit_scale": LOGIT_SCALES,
        "sigma_noise": searched.get("sigma_noise", noises(start.sigma_noise)),
    }
    of_variance = ["temperature", *(k for k in ("logit_scale", "sigma_noise") if k in searched)]
    likelihood = scorer.likelihood

    def with_variance(kind: str) -> Predictor:
        variance = VARIANCES[kind]
        assert variance is not None
        return lambda setting: (
            lambda block: predict_outputs(simple_outputs(block.linearised, setting, variance))
        )

    def method(name: str, predictor: Predictor, names: Sequence[str], **more: Any) -> Method:
        return Method(name, Scores(scorer, predictor), (start,), {k: grids[k] for k in names}, **more)

    per_class = {"per_class": PER_CLASS, "n_outputs": n_outputs}
    found: list[Method] = [method("MAP", scorer.of_map, [], variance="none")]
    if likelihood.has_probabilities:
        found += [
            method("temperature scaling", scorer.of_map, ["logit_scale"], variance="none"),
            method("vector scaling", scorer.of_map, ["logit_scale"], variance="none", **per_class),
        ]
    if likelihood.has_noise:
        found.append(method("constant variance", scorer.of_map, ["sigma_noise"], variance="none"))
    else:
        found.append(method("constant variance", with_variance("constant"), of_variance, variance="constant"))
    methods: dict[str, Method | None] = {m.name: m for m in found}
    name, available = (
        "last-layer variance",
        not scorer.ranks.any(scorer.data.lacks_last_layer, "the last layer"),
    )
    last = method(name, with_variance("last_layer"), of_variance, variance="last_layer")
    return {**methods, name: last if available else None}


def baseline(tuned: Tuned, lowest: float, each: Tensor | None) -> Baseline:
    """Return what a simpler method reaches, beside the loss of the best setting of ELLA, and the NLL of each input under it."""
    scores = tuned.method.scores
    error = _standard_error(scores.scorer.each(scores.predictor, tuned.best), each)
    return Baseline(tuned.score, tuned.score - lowest, error, tuned.parameters, tuned.best)


def _standard_error(left: Tensor | None, right: Tensor | None) -> float | None:
    """Return the standard error of a mean difference, paired input by input."""
    if left is None or right is None:
        return None
    difference = left - right
    return float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else math.inf
