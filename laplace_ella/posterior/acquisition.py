r"""Which inputs to ask labels of: BatchBALD's greedy choice.

A batch is worth the mutual information of its labels, taken together, and the function. By the chain rule it grows with
every choice by :math:`I(y; f \mid y_{chosen})`, the gain; so that two inputs that would tell the same are not both chosen, as they
are by their separate informations (BALD). Source: Kirsch, van Amersfoort, Gal (NeurIPS 2019), arXiv 1906.08158.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batches import Input
from ..network.engine import Engine
from ..parallel.ranks import ALONE
from ..parallel.sharding import work_through
from .gaussian import Outputs, without_autocast
from .likelihoods import Likelihood, entropy_of
from .links import Noise, quasi_normal, with_room
from .posterior import Posterior
from .prediction import attend, linearise, numbers_per_output

# Numbers of the largest tensors that are made of some candidates at a time, unless one candidate takes more; and of the
# probabilities of the whole pool, up to which they are kept between choices.
NUMBERS_AT_ONCE, NUMBERS_KEPT = 2**22, 2**24


class Acquisition(NamedTuple):
    """Inputs chosen one after the other, and what they are worth.

    Attributes
    ----------
    indices : LongTensor (b,)
        Positions in the pool, in the order in which they were chosen.
    scores : Tensor (b,)
        Mutual information, in nats, of the function and the labels of the first 1 ... b choices together, float64. What a choice
        adds are its differences; the first is BALD's score.
    """

    indices: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Labellings:
    """Labels that the chosen inputs may get: all of them, or a sample.

    Attributes
    ----------
    probabilities : Tensor (M,)
        Of each labelling; 1 / M in a sample.
    weights : Tensor (S, M)
        What a labelling makes of the S samples of the function: each column sums to one.
    """

    probabilities: Tensor
    weights: Tensor

    @classmethod
    def of_nothing(cls, n_samples: int, device: torch.device) -> Labellings:
        """Return what there is before any choice."""
        one = torch.ones(1, dtype=torch.float64, device=device)
        return cls(one, (one / n_samples).expand(n_samples, 1))

    def gains(self, p: Tensor, entropies: Tensor) -> Tensor:
        r"""Return :math:`I(y; f \mid y_{chosen})` (n,) of candidates.

        Parameters
        ----------
        p : Tensor (S, n, Y)
            Probabilities of their labels under each function.
        entropies : Tensor (S, n)
            The entropies of these.
        """
        given = (self.weights.T @ p.flatten(1)).unflatten(1, p.shape[1:])
        # Of the same labellings, so that the difference is positive also where they are a sample.
        known = (self.weights @ self.probabilities) @ entropies
        return self.probabilities @ -torch.special.xlogy(given, given).sum(-1) - known

    def joined_by(self, p: Tensor, most: int, start: Tensor) -> Labellings:
        """Return the labellings with one more input, whose labels have probabilities (S, Y).

        Parameters
        ----------
        most : int
            If there are more labellings, so many are drawn: in equal steps through the sum of their probabilities, so that
            each of M = ``most`` labellings goes on with one label.
        start : Tensor ()
            The first step, uniform in [0, 1).
        """
        given = self.weights.T @ p
        joint = (self.probabilities[:, None] * given).flatten()
        kept = joint.nonzero()[:, 0]
        probabilities = joint[kept] / joint.sum()
        if len(kept) > most:
            steps = (torch.arange(most, dtype=joint.dtype, device=joint.device) + start.to(joint)) / most
            kept = kept[torch.searchsorted(probabilities.cumsum(0), steps).clamp(max=len(kept) - 1)]
            probabilities = torch.full_like(steps, 1 / most)
        before, label = kept // p.shape[1], kept % p.shape[1]
        return Labellings(probabilities, self.weights[:, before] * p[:, label] / given.flatten()[kept])


@dataclass(frozen=True)
class Pool:
    """The candidates: Gaussians over their outputs, and the noise of S functions, which they share."""

    outputs: Outputs
    likelihood: Likelihood
    noise: Tensor
    rest: Tensor | None = None

    def __len__(self) -> int:
        return len(self.outputs.mean)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.outputs.device

    def parts(self, numbers_of_one: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, of some candidates at a time, the probabilities (S, n, Y) of their labels under each function, and the entropies (S, n).

        Parameters
        ----------
        numbers_of_one : int
            What one candidate takes while it is worked on.
        """
        step = max(1, NUMBERS_AT_ONCE // numbers_of_one)
        for rows in (slice(a, a + step) for a in range(0, len(self), step)):
            log_p = self.log_probabilities(rows)
            yield log_p.exp(), entropy_of(log_p)

    def log_probabilities(self, rows: slice) -> Tensor:
        """Return the log probabilities (S, n, Y) of the labels of some candidates, under each function."""
        isotropic = self.outputs.isotropic
        some = replace(
            self.outputs,
            mean=self.outputs.mean[rows],
            psi=self.outputs.psi[rows],
            isotropic=None if isotropic is None else isotropic[rows],
        )
        f = some.functions(self.noise, self.rest).double()
        return of_all_targets(self.likelihood.log_probabilities(f))


def of_all_targets(log_p: Tensor) -> Tensor:
    """Return the log probabilities (S, n, Y^D) of the labels of D independent targets (S, n, D, Y) together."""
    if log_p.ndim == 3:
        return log_p
    first, *others = log_p.unbind(2)
    for one in others:
        first = (first[..., None] + one[..., None, :]).flatten(-2)
    return first


def n_labels_of(likelihood: Likelihood, n_outputs: int) -> int:
    """Return in how many ways an input may be labelled."""
    *targets, n_labels = likelihood.log_probabilities(
        torch.zeros(n_outputs, dtype=torch.float64, device="cpu")
    ).shape
    return int(n_labels ** math.prod(targets))


def read_pool(posterior: Posterior, engine: Engine, inputs: Iterable[Input], noise: Noise) -> Pool:
    """Compute the outputs of all candidates, once; where ranks share the directions, each has a pool of its own."""
    found: list[Outputs] = []

    def look_at(x: Input | None) -> None:
        if x is None:
            attend(posterior, engine, posterior.residual)
        else:
            found.append(posterior.outputs(linearise(posterior, engine, x)))

    width = numbers_per_output(posterior)
    parts = (part for x in inputs for part in engine.bounded(x, width))
    work_through(parts, look_at, ALONE, posterior.fit.basis.ranks, "the pool")
    if not found:
        empty = torch.zeros(0, posterior.fit.n_outputs, dtype=torch.float64, device=engine.device)
        return Pool(Outputs(empty, empty[..., None]), posterior.likelihood, empty)
    isotropic = [o.isotropic for o in found if o.isotropic is not None]
    joined = Outputs(
        torch.cat([o.mean for o in found]),
        torch.cat([o.psi for o in found]),
        torch.cat(isotropic) if isotropic else None,
    )
    points = quasi_normal(noise.n_samples, joined.psi.shape[-1], noise.seed).to(joined.psi)
    return Pool(with_room(joined), posterior.likelihood, points, _rest(joined, noise, engine.budget()))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _rest(outputs: Outputs, noise: Noise, budget: int) -> Tensor | None:
    """Draw the noise (S, D, C) of the isotropic residual."""
    if outputs.isotropic is None:
        return None
    shape = noise.n_samples, outputs.isotropic.shape[1], outputs.mean.shape[1]
    if 8 * math.prod(shape) > budget:
        raise ValueError(
            f"The residual of {noise.n_samples} functions takes noise of shape {shape}, {8 * math.prod(shape):.2g} bytes, and the "
            f"memory budget is {budget:.2g}. Lower n_samples or residual_samples, or choose with residual='none'."
        )
    noise_of_tangents = torch.randn(
        shape, generator=_generator(noise.seed), dtype=torch.float64, device="cpu"
    )
    return noise_of_tangents.to(outputs.isotropic)


@torch.no_grad()
def batch_bald(
    posterior: Posterior,
    engine: Engine,
    inputs: Iterable[Input],
    batch_size: int,
    noise: Noise,
    n_labellings: int,
) -> Acquisition:
    """Choose inputs of a pool greedily by the mutual information of all their labels.

    Raises
    ------
    ValueError
        If the pool has fewer inputs than are to be chosen, or the noise of the residual does not fit the memory budget.
    """
    pool = read_pool(posterior, engine, inputs, noise)
    if len(pool) < batch_size:
        raise ValueError(
            f"batch_size must be at most the size of the pool; got {batch_size}, and the pool has {len(pool)} candidates. "
            "A generator that was read before is empty: pass a fresh one."
        )
    n_labels = n_labels_of(posterior.likelihood, posterior.fit.n_outputs)
    start = torch.rand(batch_size, generator=_generator(noise.seed), dtype=torch.float64, device="cpu")
    return greedy(pool, n_labels, n_labellings, start)


@without_autocast
def greedy(pool: Pool, n_labels: int, n_labellings: int, starts: Tensor) -> Acquisition:
    """Choose the candidate of the largest gain, one after the other."""
    n_samples = len(pool.noise)
    labellings = Labellings.of_nothing(n_samples, pool.device)
    read = partial(pool.parts, n_labels * max(n_samples, n_labellings))
    kept = list(read()) if len(pool) * n_samples * n_labels <= NUMBERS_KEPT else None
    indices: list[int] = []
    gained: list[Tensor] = []
    for start in starts:
        gains = torch.cat([labellings.gains(*part) for part in kept or read()])
        gains[indices] = -math.inf
        best = int(gains.argmax())
        indices.append(best)
        gained.append(gains[best])
        if len(indices) < len(starts):
            p = pool.log_probabilities(slice(best, best + 1))[:, 0].exp()
            labellings = labellings.joined_by(p, n_labellings, start)
    return Acquisition(
        torch.tensor(indices, dtype=torch.int64, device=pool.device), torch.stack(gained).cumsum(0)
    )


def check_labels(posterior: Posterior, n_labellings: int) -> None:
    """Require targets with finitely many labels, not more of them than there are labellings, and functions of ELLA's to sample.

    Raises
    ------
    ValueError
    """
    likelihood = posterior.likelihood
    try:
        n_labels = n_labels_of(likelihood, posterior.fit.n_outputs)
    except NotImplementedError:
        raise ValueError(
            f"batch_bald() enumerates the labels that inputs may get, of which likelihood={likelihood.name!r} has no finite set. "
            "Use it with classification, bernoulli or reward_modeling; for regression choose by uncertainty(x).epistemic."
        ) from None
    if not likelihood.has_classes and n_labels > n_labellings:
        raise ValueError(
            f"batch_bald() enumerates the labels of an input, and {posterior.fit.n_outputs} binary targets together have {n_labels}; "
            f"n_labellings={n_labellings} allows no more than that. Raise n_labellings, or fit fewer targets."
        )
    if posterior.variance != "ella":
        raise ValueError(
            f"batch_bald() samples functions of ELLA's posterior, and with variance={posterior.variance!r} inputs share no such "
            "functions, nor is ELLA's temperature tuned. Tune it: la.optimize_hyperparameters(val_loader, 'auto', method='ELLA (T)'); or "
            "do that with twin = copy.deepcopy(la), and call twin.batch_bald(), so that la goes on predicting as it does."
        )
    if posterior.residual.in_weights:
        raise ValueError(
            f"batch_bald() samples functions of all inputs of the pool together, and those with residual={posterior.residual.name!r} "
            "have as many dimensions as the network has weights. Choose with residual='isotropic' or 'none'."
        )
