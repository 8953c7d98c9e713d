r"""What simpler methods reach on the same validation data, tuned as well: the yardstick of every result.

None needs a Jacobian: MAP, temperature scaling, vector scaling, and a Gaussian over the
outputs whose variance is constant, or grows with what the last layer takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ..data.loading import check_some
from ..data.progress import Progress, no_progress
from ..parallel.ranks import Ranks
from ..posterior.gaussian import Outputs
from ..posterior.likelihoods import Prediction
from ..posterior.setting import Setting
from .scoring import SKIPPED, Block, Loss, ValidationData, score
from .search import LOGIT_SCALES, Search, decades, joint_search, noises, refine

# Setting -> what predicts a block under it.
Predictor = Callable[[Setting], Callable[[Block], Prediction]]


@dataclass(frozen=True)
class Baseline:
    """A simpler method on the validation data, tuned on them.

    Attributes
    ----------
    score : float
        Its loss; by default the mean NLL of an input.
    difference : float
        ``score`` minus that of the best setting: positive if the setting is better.
    standard_error : float or None
        The standard error of the difference, paired input by input; None for a loss that is not a mean over inputs.
    parameters : dict of float
        The values that were tuned; for vector scaling, how many there are.
    """

    score: float
    difference: float
    standard_error: float | None
    parameters: dict[str, float]


class Scorer:
    """Scores predictions of one likelihood on one set of data, with one loss.

    Parameters
    ----------
    data : ValidationData
        The validation data of this rank.
    loss : torchmetrics.Metric or callable, optional
    device : torch.device
        The device of the predictions.
    ranks : Ranks
        The ranks that score together, each on its part of the data.

    Attributes
    ----------
    likelihood : Likelihood
        The likelihood of the data.
    name : str
        The name of the loss.
    n_inputs : int
        The number of inputs of all ranks together.

    Raises
    ------
    ValueError
        If there are no data.
    """

    def __init__(self, data: ValidationData, loss: Loss | None, device: torch.device, ranks: Ranks) -> None:
        self.data, self.loss, self.device, self.ranks = data, loss, device, ranks
        self.likelihood = data.likelihood
        self.name = "mean NLL" if loss is None else str(getattr(loss, "__name__", type(loss).__name__))
        self.n_inputs = int(ranks.total(torch.tensor(data.n_inputs, dtype=torch.int64, device="cpu")))
        check_some(self.n_inputs, "validation loader")

    def of_map(self, setting: Setting) -> Callable[[Block], Prediction]:
        """Return what predicts as the network itself does, its logits scaled by s.

        The covariance that a user's loss gets is that of targets whose outputs are certain.
        """

        def predict(block: Block) -> Prediction:
            f = block.linearised.f
            f = f.to(torch.promote_types(f.dtype, torch.float32))
            f = f * setting.logit_scale
            if self.loss is None or self.likelihood.has_probabilities:
                return self.likelihood.certain(f)
            mean, variance = self.likelihood.conditional_moments(f)
            return mean, torch.diag_embed(variance)

        return predict

    @torch.no_grad()
    def __call__(self, predictor: Predictor, setting: Setting) -> float:
        """Return the loss of a setting's predictions."""

        def pairs() -> Iterator[tuple[Prediction, Tensor]]:
            predict = predictor(setting)
            return ((predict(block), block.targets) for block in self.data)

        noise_variance = float(setting.sigma_noise) ** 2
        return score(pairs, self.likelihood, self.loss, noise_variance, self.ranks, self.device)

    @torch.no_grad()
    def each(self, predictor: Predictor, setting: Setting) -> Tensor | None:
        """Return the NLL of each input of all ranks; None with a loss of the user's."""
        if self.loss is not None:
            return None
        variance: Any = float(setting.sigma_noise) ** 2
        found = [torch.zeros(0, dtype=torch.float64, device="cpu")]
        with self.ranks.together("the score of each input"):
            predict = predictor(setting)
            found += [self.likelihood.nll(predict(b), b.targets, variance).cpu() for b in self.data]
        return self.ranks.joined(torch.cat(found))

    def gradient(
        self, predictor: Predictor, setting: Setting, names: Sequence[str]
    ) -> tuple[float, Sequence[float]]:
        """Return the mean NLL, and its derivatives in the log10 of the parameters named."""

        def nll(block: Block, logs: Tensor) -> Tensor:
            setting_at = setting.at(**{k: 10 ** logs[i] for i, k in enumerate(names)})
            return self.likelihood.nll(predictor(setting_at)(block), block.targets, setting_at.sigma_noise**2)

        value, slope = self.mean_and_gradient(nll, [math.log10(getattr(setting, k)) for k in names])
        return value, slope.tolist()

    @torch.enable_grad()
    def mean_and_gradient(
        self, values_of: Callable[[Block, Tensor], Tensor], numbers: Sequence[float]
    ) -> tuple[float, Tensor]:
        """Return the mean over the data of a function of (block, numbers) with values (B,), and its gradient."""
        leaf = torch.tensor(numbers, dtype=torch.float64, device="cpu", requires_grad=True)
        leaf.grad = torch.zeros_like(leaf)
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        with self.ranks.together("the gradient of the score", SKIPPED):
            for block in self.data:
                values = values_of(block, leaf)
                values.sum().backward()
                sums += torch.tensor(
                    [float(values.detach().sum()), len(values)], dtype=torch.float64, device="cpu"
                )
        total, n, *slope = self.ranks.total(torch.cat([sums, leaf.grad])).tolist()
        return total / n, torch.tensor(slope, dtype=torch.float64, device="cpu") / n

    def search(
        self,
        predictor: Predictor,
        start: Setting,
        grids: Mapping[str, Sequence[Any]],
        progress: Progress = no_progress,
    ) -> Search:
        """Search the grids, and refine the best setting; without grids, ``start`` is scored."""
        search = Search(partial(self, predictor))
        joint_search(search, start, grids, progress)
        refine(search, grids, partial(self.gradient, predictor) if self.loss is None else None)
        return search


def with_variance(block: Block, setting: Setting, variance: Tensor) -> Outputs:
    """Return a Gaussian over the outputs with variance T v of all of an input's, v (B,)."""
    f = block.linearised.f
    dtype = torch.promote_types(f.dtype, torch.float32)
    deviation = (setting.temperature * variance.to(f.device, dtype)[:, None]) ** 0.5
    return Outputs(f.to(dtype) * setting.logit_scale, f.new_zeros(*f.shape, 0, dtype=dtype), deviation)


def baselines(
    scorer: Scorer,
    predict_outputs: Callable[[Outputs], Prediction],
    start: Setting,
    searched: Mapping[str, Sequence[Any]],
    n_outputs: int,
    lowest: float,
    each: Tensor | None,
) -> Iterator[tuple[str, Baseline | None]]:
    """Tune each simpler method on the data, and yield (name, baseline), or (name, None) where it is not available.

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
    lowest, each
        The loss of the best setting of ELLA, and the NLL of each input under it, if there is one.
    """
    start = start.at(logit_scale=1.0)
    # Variances in other units than ELLA's may have to be smaller.
    grids: dict[str, Sequence[Any]] = {
        "temperature": decades(-6, 6),
        "logit_scale": LOGIT_SCALES,
        "sigma_noise": searched.get("sigma_noise", noises(start.sigma_noise)),
    }
    of_variance = ["temperature", *(k for k in ("logit_scale", "sigma_noise") if k in searched)]

    def with_variance_of(variance: Callable[[Block], Tensor]) -> Predictor:
        return lambda setting: lambda block: predict_outputs(with_variance(block, setting, variance(block)))

    def last_layer(block: Block) -> Tensor:
        assert block.last_layer is not None
        return block.last_layer + 1

    def tuned(predictor: Predictor, names: Sequence[str], **parameters: float) -> Baseline:
        search = scorer.search(predictor, start, {k: grids[k] for k in names})
        value = search.table[search.best]
        error = _standard_error(scorer.each(predictor, search.best), each)
        parameters |= {k: float(getattr(search.best, k)) for k in names}
        return Baseline(value, value - lowest, error, parameters)

    constant = with_variance_of(lambda block: block.linearised.f.new_ones(len(block.targets)))

    yield "MAP", tuned(scorer.of_map, [])
    if scorer.likelihood.has_probabilities:
        yield "temperature scaling", tuned(scorer.of_map, ["logit_scale"])
        vector_scaling = _vector_scaling(scorer, n_outputs)
        yield "vector scaling", tuned(vector_scaling, [], numbers=2.0 * n_outputs)
    if scorer.likelihood.has_noise:
        yield "constant variance", tuned(scorer.of_map, ["sigma_noise"])
    else:
        yield "constant variance", tuned(constant, of_variance)
    available = not scorer.ranks.any(scorer.data.lacks_last_layer, "the last layer")
    yield "last-layer variance", tuned(with_variance_of(last_layer), of_variance) if available else None


def _standard_error(left: Tensor | None, right: Tensor | None) -> float | None:
    """Return the standard error of a mean difference, paired input by input."""
    if left is None or right is None:
        return None
    difference = left - right
    return float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else math.inf


def _vector_scaling(scorer: Scorer, n_outputs: int) -> Predictor:
    """Scale and shift each logit by numbers of its own, tuned on the NLL (Guo et al., ICML 2017)."""
    likelihood = scorer.likelihood

    def predict(block: Block, w: Tensor) -> Tensor:
        f, w = block.linearised.f.double(), w.to(block.linearised.f.device)
        return likelihood.inverse_link(f * w[:n_outputs] + w[n_outputs:])

    def nll(block: Block, w: Tensor) -> Tensor:
        return likelihood.nll(predict(block, w), block.targets, block.linearised.f.new_zeros(()))

    def objective(numbers: Any) -> tuple[float, Any]:
        value, slope = scorer.mean_and_gradient(nll, numbers)
        return value, slope.numpy()

    start = np.concatenate([np.ones(n_outputs), np.zeros(n_outputs)])
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    best = torch.tensor(found, dtype=torch.float64, device="cpu")
    return lambda setting: lambda block: predict(block, best)
