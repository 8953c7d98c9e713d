r"""Scores of predictions on validation data: of all of them, of each fold, of each input, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..data.loading import check_some
from ..parallel.ranks import Ranks
from ..posterior.likelihoods import Prediction
from ..posterior.setting import Setting
from .metrics import of_rows
from .scoring import N_FOLDS, SKIPPED, Block, Loss, ValidationData, score

# Setting -> what predicts a block under it.
Predictor = Callable[[Setting], Callable[[Block], Prediction]]


@dataclass(frozen=True)
class HeldOut:
    """What a method reaches on data that it was not tuned on.

    Attributes
    ----------
    sums, counts : Tensor (m,)
        The loss of each input, summed over its positions, and how many these are. With a loss of the user's, which need
        not be a mean over inputs: of each fold, times its rows, and how many these are.
    rows : dict of Tensor
        What metrics are computed from, as :func:`laplace_ella.tuning.metrics.of_rows` returns it.
    """

    sums: Tensor
    counts: Tensor
    rows: dict[str, Tensor]

    @property
    def score(self) -> float:
        """The mean loss."""
        return float(self.sums.sum() / self.counts.sum())

    def minus(self, other: HeldOut) -> tuple[float, float]:
        """Return the difference of the mean losses, and its standard error, paired by input (or fold)."""
        sums, n = self.sums - other.sums, self.counts.sum()
        mean, m = sums.sum() / n, len(sums)
        squared = (sums - mean * self.counts).square().sum() * m / max(1, m - 1)
        return float(mean), float(squared.sqrt() / n) if m > 1 else math.inf


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
        """Return what predicts as the network itself does, its logits scaled and shifted as a setting says.

        The covariance that a user's loss gets is that of targets whose outputs are certain.
        """

        def predict(block: Block) -> Prediction:
            f = block.linearised.f
            f = setting.scaled(f.to(torch.promote_types(f.dtype, torch.float32)))
            if self.loss is None or self.likelihood.has_probabilities:
                return self.likelihood.certain(f)
            mean, variance = self.likelihood.conditional_moments(f)
            return mean, torch.diag_embed(variance)

        return predict

    def nll(self, prediction: Prediction, block: Block, setting: Setting) -> Tensor:
        """Return the NLL of each row of a block (B,)."""
        return self.likelihood.nll(prediction, block.targets, setting.sigma_noise**2)

    @torch.no_grad()
    def __call__(self, predictor: Predictor, setting: Setting) -> float:
        """Return the loss of a setting's predictions."""

        def pairs() -> Iterator[tuple[Prediction, Tensor]]:
            predict = predictor(setting)
            return ((predict(block), block.targets) for block in self.data)

        return self._score(pairs, setting)

    def _score(self, pairs: Callable[[], Iterator[tuple[Prediction, Tensor]]], setting: Setting) -> float:
        noise_variance = float(setting.sigma_noise) ** 2
        return score(pairs, self.likelihood, self.loss, noise_variance, self.ranks, self.device)

    @torch.no_grad()
    def nll_by_fold(self, predictor: Predictor, setting: Setting) -> Tensor:
        """Return the summed NLL of each fold, and its number of rows: (2, F), float64."""
        sums = torch.zeros(2, N_FOLDS, dtype=torch.float64, device="cpu")
        with self.ranks.together("the score of each fold", SKIPPED):
            predict = predictor(setting)
            for block in self.data:
                folds, values = block.folds.cpu(), self.nll(predict(block), block, setting).double().cpu()
                sums += torch.stack([torch.zeros_like(sums[0]).index_add_(0, folds, values), _sizes(folds)])
        return self.ranks.total(sums)

    @torch.no_grad()
    def by_fold(self, predictor: Predictor, setting: Setting) -> Tensor:
        """Return the losses of the folds, each times its number of rows, and these numbers: (2, F), float64."""
        if self.loss is None:
            return self.nll_by_fold(predictor, setting)
        with self.ranks.together("the score of each fold", SKIPPED):
            predict, sizes = predictor(setting), torch.zeros(N_FOLDS, dtype=torch.float64, device="cpu")
            kept = [(predict(block), block) for block in self.data]
            for _, block in kept:
                sizes += _sizes(block.folds.cpu())
        sizes = self.ranks.total(sizes)
        losses = [
            self._score(partial(_of_fold, kept, fold), setting) if sizes[fold] else 0.0
            for fold in range(N_FOLDS)
        ]
        return torch.stack([sizes * torch.tensor(losses, dtype=torch.float64, device="cpu"), sizes])

    @torch.no_grad()
    def each(self, predictor: Predictor, setting: Setting) -> Tensor | None:
        """Return the NLL of each input of all ranks; None with a loss of the user's."""
        if self.loss is not None:
            return None
        found = [torch.zeros(0, dtype=torch.float64, device="cpu")]
        with self.ranks.together("the score of each input"):
            predict = predictor(setting)
            found += [self.nll(predict(b), b, setting).cpu() for b in self.data]
        return self.ranks.joined(torch.cat(found))

    @torch.no_grad()
    def held_out(self, predictor: Predictor, settings: Sequence[Setting]) -> HeldOut:
        """Return what a method reaches that was tuned without each fold in turn.

        Parameters
        ----------
        settings : sequence of Setting
            Those found without the first fold, without the second, and so on.
        """
        likelihood = self.likelihood
        # A user's loss gets moments of targets. Only in regression these are those of outputs, which metrics are of.
        measured = self.loss is None or likelihood.has_probabilities or likelihood.has_noise
        columns: dict[str, list[Tensor]] = {}
        with self.ranks.together("the scores of data held out"):
            for fold, setting in enumerate(settings):
                predict, noise_variance = predictor(setting), float(setting.sigma_noise) ** 2
                for block in self.data:
                    which = block.folds == fold
                    if not which.any():
                        continue
                    part = block.of(which)
                    found = {"position": part.positions}
                    if measured:
                        found |= of_rows(likelihood, predict(part), part.targets, noise_variance)
                    for name, values in found.items():
                        columns.setdefault(name, []).append(values.cpu())
        mine = {k: torch.cat(v) for k, v in columns.items()}
        of_ranks = [found for found in self.ranks.gathered(mine, "the scores of data held out") if found]
        rows = {k: torch.cat([found[k] for found in of_ranks]) for k in of_ranks[0]}
        _, which, counts = rows.pop("position").unique(return_inverse=True, return_counts=True)
        if self.loss is None:
            sums = torch.zeros(len(counts), dtype=torch.float64, device="cpu").index_add_(
                0, which, rows["NLL"]
            )
            return HeldOut(sums, counts, rows)
        losses = [self.by_fold(predictor, setting)[:, fold] for fold, setting in enumerate(settings)]
        sums, counts = torch.stack(losses, 1)
        return HeldOut(sums, counts, rows)

    def gradient(
        self, predictor: Predictor, setting: Setting, names: Sequence[str], without: int | None = None
    ) -> tuple[float, Sequence[float]]:
        """Return the mean NLL, if wanted without a fold, and its derivatives in the log10 of the parameters named."""

        def nll(block: Block, logs: Tensor) -> Tensor:
            setting_at = setting.at(**{k: 10 ** logs[i] for i, k in enumerate(names)})
            return self.nll(predictor(setting_at)(block), block, setting_at)

        logs = [math.log10(getattr(setting, k)) for k in names]
        value, slope, _ = self.mean_and_gradient(nll, logs, without)
        return value, slope.tolist()

    @torch.enable_grad()
    def mean_and_gradient(
        self,
        values_of: Callable[[Block, Tensor], Tensor],
        numbers: Sequence[float],
        without: int | None = None,
    ) -> tuple[float, Tensor, float]:
        """Return the mean over the data of a function of (block, numbers) with values (B,), its gradient, and how many they are.

        Parameters
        ----------
        without : int, optional
            The fold that is left out.
        """
        leaf = torch.tensor(numbers, dtype=torch.float64, device="cpu", requires_grad=True)
        leaf.grad = torch.zeros_like(leaf)
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        with self.ranks.together("the gradient of the score", SKIPPED):
            for block in self.data:
                values = values_of(block, leaf)
                if without is not None:
                    values = values[block.folds != without]
                values.sum().backward()
                sums += torch.tensor(
                    [float(values.detach().sum()), len(values)], dtype=torch.float64, device="cpu"
                )
        total, n, *slope = self.ranks.total(torch.cat([sums, leaf.grad])).tolist()
        return total / n, torch.tensor(slope, dtype=torch.float64, device="cpu") / n, n


def _sizes(folds: Tensor) -> Tensor:
    return folds.bincount(minlength=N_FOLDS).double()


def _of_fold(kept: list[tuple[Prediction, Block]], fold: int) -> Iterator[tuple[Prediction, Tensor]]:
    for prediction, block in kept:
        which = block.folds == fold
        if which.any():
            part = (
                prediction[which] if isinstance(prediction, Tensor) else tuple(p[which] for p in prediction)
            )
            yield part, block.targets[which]  # type: ignore[misc]
