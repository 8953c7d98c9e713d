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
from ..parallel.ranks import ALONE, Ranks
from ..posterior.gaussian import Outputs
from ..posterior.likelihoods import Likelihood, Prediction
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
    n_inputs : int
        The number of inputs of all ranks together.

    Raises
    ------
    ValueError
        If there are no data.
    """

    def __init__(
        self, data: ValidationData, loss: Loss | None, device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        self.data, self.loss, self.device, self.ranks = data, loss, device, ranks
        self.n_inputs = int(ranks.total(torch.tensor(data.n_inputs, dtype=torch.int64, device="cpu")))
        check_some(self.n_inputs, "validation loader")

    @property
    def likelihood(self) -> Likelihood:
        """Of the data."""
        return self.data.likelihood

    @property
    def name(self) -> str:
        """Of the loss."""
        if self.loss is None:
            return "mean NLL"
        return str(getattr(self.loss, "__name__", type(self.loss).__name__))

    def of_map(self, setting: Setting) -> Callable[[Block], Prediction]:
        """Return what predicts as the network itself does, its logits scaled by s.

        The covariance a user's loss expects is 0.
        """

        def predict(block: Block) -> Prediction:
            f = block.linearised.f
            f = f.to(torch.promote_types(f.dtype, torch.float32))
            certain = self.likelihood.certain(f * setting.logit_scale)
            if self.loss is None or isinstance(certain, Tensor):
                return certain
            return certain[0], torch.diag_embed(certain[1])

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

    def tune(
        self, predictor: Predictor, start: Setting, grids: Mapping[str, Sequence[Any]]
    ) -> tuple[Setting, float]:
        """Return the best setting over the grids, refined, and its loss."""
        search = Search(partial(self, predictor))
        if not grids:
            search(start)
        else:
            joint_search(search, start, grids, lambda cells, name: cells)
            refine(search, grids, partial(self.gradient, predictor) if self.loss is None else None)
        return search.best, search.table[search.best]


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
) -> Iterator[tuple[str, tuple[float, Tensor | None, dict[str, float]] | None]]:
    """Tune each simpler method on the data, and yield (name, (score, each input's NLL, parameters) or None).

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
    # Variances in other units than ELLA's may have to be smaller.
    grids: dict[str, Sequence[Any]] = {
        "temperature": decades(-6, 6),
        "logit_scale": LOGIT_SCALES,
        "sigma_noise": searched.get("sigma_noise", noises(start.sigma_noise)),
    }
    of_variance = ["temperature", *(k for k in ("logit_scale", "sigma_noise") if k in searched)]
    plain = scorer.of_map
    start = start.at(logit_scale=1.0)

    def with_variance_of(variance: Callable[[Block], Tensor]) -> Predictor:
        return lambda setting: lambda block: predict_outputs(with_variance(block, setting, variance(block)))

    def last_layer(block: Block) -> Tensor:
        assert block.last_layer is not None
        return block.last_layer + 1

    def tuned(predictor: Predictor, names: Sequence[str]) -> tuple[float, Tensor | None, dict[str, float]]:
        best, lowest = scorer.tune(predictor, start, {k: grids[k] for k in names})
        return lowest, scorer.each(predictor, best), {k: float(getattr(best, k)) for k in names}

    constant = with_variance_of(lambda block: block.linearised.f.new_ones(len(block.targets)))

    has_links = scorer.likelihood.has_probabilities
    yield "MAP", tuned(plain, [])
    if has_links:
        yield "temperature scaling", tuned(plain, ["logit_scale"])
        yield "vector scaling", _vector_scaling(scorer, n_outputs)
        yield "constant variance", tuned(constant, of_variance)
    else:
        yield "constant variance", tuned(plain, ["sigma_noise"])
    available = not scorer.ranks.any(scorer.data.lacks_last_layer, "the last layer")
    yield "last-layer variance", tuned(with_variance_of(last_layer), of_variance) if available else None


def _vector_scaling(scorer: Scorer, n_outputs: int) -> tuple[float, Tensor | None, dict[str, float]]:
    """Scale and shift each logit by numbers of its own, tuned on the NLL (Guo et al., ICML 2017)."""
    likelihood = scorer.likelihood
    inverse_link = likelihood.inverse_link

    def predict(block: Block, w: Tensor) -> Tensor:
        w = w.to(block.linearised.f.device)
        return inverse_link(block.linearised.f.double() * w[:n_outputs] + w[n_outputs:])

    def objective(numbers: Any) -> tuple[float, Any]:
        value, slope = scorer.mean_and_gradient(
            lambda block, w: likelihood.nll(
                predict(block, w), block.targets, block.linearised.f.new_zeros(())
            ),
            numbers,
        )
        return value, slope.numpy()

    start = np.concatenate([np.ones(n_outputs), np.zeros(n_outputs)])
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    best = torch.tensor(found, dtype=torch.float64, device="cpu")

    def fitted(setting: Setting) -> Callable[[Block], Prediction]:
        return lambda block: predict(block, best)

    setting = Setting(1.0, None, 1.0, 1.0, 1, 1, 1.0)
    return scorer(fitted, setting), scorer.each(fitted, setting), {"numbers": 2.0 * n_outputs}
