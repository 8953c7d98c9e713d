r"""How far inputs lie outside what the basis knows, and how far the basis is from the exact thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data import validation
from ..data.batches import Input
from ..data.hashing import digest
from ..data.stream import Stream
from ..nystrom.basis import identity_basis
from ..parallel.sharding import work_through
from . import gaussian as posterior
from .consistency import of_one_moment
from .gaussian import Linearised, Outputs
from .likelihoods import LIKELIHOODS
from .linearisation import Linearisation
from .residual import residual_share, traces

# Exact linearised Laplace is made of P x P matrices.
LARGEST_EXACT = 5000
# Of more calibration inputs, so many quantiles are kept.
LARGEST_REFERENCE = 10_000


@dataclass(frozen=True)
class ApproximationError:
    r"""How well the basis covers given inputs.

    Attributes
    ----------
    captured_trace : float
        Share of :math:`\operatorname{tr} J J^T`, summed over the inputs, that lies in the span.
    covariance_error : float or None
        Frobenius norm of the difference between the predictive covariances at the inputs and those of
        exact linearised Laplace, relative to the latter; None if no training data were given.
    """

    captured_trace: float
    covariance_error: float | None


class Novelty(Linearisation):
    """Scores of inputs apart from the predictive.

    A mixin: :class:`laplace_ella.ELLALaplace` supplies what is declared here.
    """

    prior_precision: Any
    dict_key_x: str
    dict_key_y: str
    _H_factor: Any
    _novelty_reference: Tensor | None
    _novelty_setting: list[Any]
    n_outputs: int
    _ranks: Any  # Ranks
    _setting: Callable[[], Any]
    _width: Callable[[], int]
    _link: Callable[..., Callable[[Outputs], Any]]

    @torch.no_grad()
    @of_one_moment
    def residual_share(self, x: Input) -> Tensor:
        r"""Return the share of an input's gradient outside the span, :math:`1 - |\phi|^2 / \operatorname{tr} J J^T`.

        Exact with ``residual="exact"``; else estimated from ``residual_samples`` random
        tangents, the same for all inputs.

        Returns
        -------
        Tensor (B,)
            In [0, 1]: 0 where the landmarks explain an input's gradients, 1 where they say nothing about it.

        Raises
        ------
        AttributeError, ValueError
            As for a call.

        Notes
        -----
        Cost: features, plus 1 + 2S forward passes an input (exact: about 5C).
        """
        seen = self._seen(x)
        return residual_share(seen, self._overlap(seen)).to(seen.f.dtype)

    @torch.no_grad()
    @of_one_moment
    def novelty(self, x: Input) -> Tensor:
        """Return how novel inputs are (B,): larger is further from the training data.

        The :meth:`residual_share`; once :meth:`calibrate_novelty` was called, the normal score of the
        predictive entropy plus half that of the share. It is a score of its own, not part of the
        predictive, and finds inputs from elsewhere, not errors: docs/tuning.md shows where it fails.

        Raises
        ------
        AttributeError, ValueError
            As for a call; and if the setting has changed since the calibration.
        """
        if self._novelty_reference is None:
            return self.residual_share(x)
        return self._novelty_of(self._seen(x))

    def _novelty_of(self, seen: Linearised) -> Tensor:
        assert self._novelty_reference is not None
        if self._novelty_setting != self._setting_of_novelty():
            raise ValueError(
                "The setting has changed since calibrate_novelty() (prior, temperature, scales, rank, residual or "
                "seed), and with it what is usual. Call it again."
            )
        features = self._novelty_features(seen)
        scores = normal_scores(features, self._novelty_reference.to(features))
        return (scores[:, 0] + scores[:, 1] / 2).to(self._dtype)

    @torch.no_grad()
    def calibrate_novelty(self, in_distribution_loader: Iterable[Any]) -> None:
        """Learn what entropy and residual share are usual, for :meth:`novelty`.

        Parameters
        ----------
        in_distribution_loader : iterable
            Batches of inputs the model is meant for, which it was not fitted to: (x, y), mappings, or
            x alone; hundreds at least, since scores end where theirs do. No labels are used, and
            no other data.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            For regression, which has no entropy, or with fewer than two inputs.
        """
        with self._changes() as view:
            view._calibrate(in_distribution_loader)

    def _calibrate(self, in_distribution_loader: Iterable[Any]) -> None:
        ranks, what = self._ranks, "the data to calibrate novelty on"
        with ranks.together(what):
            self._check_H_init()
            if LIKELIHOODS[self.likelihood].inverse_link is None or self.likelihood == "reward_modeling":
                raise ValueError(
                    f"calibrate_novelty() needs probabilities, which likelihood={self.likelihood!r} has not. "
                    "Use residual_share(), or novelty() as it is."
                )
            validation.check_loader("in_distribution_loader", in_distribution_loader)
            stream = Stream(in_distribution_loader, self.dict_key_x, "", self.backend.inputs, ranks)
        found = [torch.zeros(0, 2, dtype=torch.float64, device="cpu")]

        def look_at(x: Input | None) -> None:
            if x is None:
                self._attend(self._residual_seen)
            else:
                found.append(self._novelty_features(self._seen(x)).cpu())

        inputs = (part for x in stream.inputs("Novelty") for part in self.backend.bounded(x, self._width()))
        work_through(inputs, look_at, ranks, self.basis.ranks, what)
        features = ranks.joined(torch.cat(found))
        if len(features) < 2:
            raise ValueError(f"calibrate_novelty() needs at least two inputs; got {len(features)}.")
        ascending = features.sort(0).values
        last, kept = len(ascending) - 1, min(len(ascending), LARGEST_REFERENCE)
        steps = torch.linspace(0, last, kept, dtype=torch.float32, device="cpu")
        self._novelty_reference = ascending[steps.round().long().to(ascending.device)]
        self._novelty_setting = self._setting_of_novelty()

    def _setting_of_novelty(self) -> list[Any]:
        """Return all that the score depends on, apart from the fit, in plain types."""
        # A setting says nothing about priors of several values.
        prior = [digest(self.prior_precision)] if self.prior_precision.numel() > 1 else []
        return [*astuple(self._setting()), self.residual, self.residual_samples, self.seed, *prior]

    def _seen(self, x: Input) -> Linearised:
        return self._linearised(x, self._residual_seen)

    @property
    def _residual_seen(self) -> str:
        return "exact" if self.residual == "exact" else "isotropic"

    def _overlap(self, seen: Linearised) -> Tensor | None:
        return None if seen.pushed is None else self._residual_tangents()[1]

    def _novelty_features(self, seen: Linearised) -> Tensor:
        """Return predictive entropy and residual share (B, 2), float64."""
        share = residual_share(seen, self._overlap(seen))
        parts = Linearised(seen.f, seen.phi) if self.residual == "none" else seen
        p = self._link("mc", 128)(self._outputs(parts)).double()
        return torch.stack([entropy(p, self.likelihood), share], 1)

    @of_one_moment
    def approximation_error(self, x: Input, train_loader: Iterable[Any] | None = None) -> ApproximationError:
        r"""Say how much of the model's derivatives at given inputs the basis captures.

        Parameters
        ----------
        x : Tensor or mapping
            B inputs.
        train_loader : iterable, optional
            The training data: compares with exact linearised Laplace too, for networks of up to 5 000 weights.
            In a process group all ranks have to pass it, each with its part of the data.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If the network is too large for the exact comparison, or there are no inputs, or no training data.

        Notes
        -----
        Cost: as :meth:`residual_share`; with training data, C backward passes for each of
        them and P x P matrices.
        """
        self._check_H_init()
        if train_loader is not None:
            validation.check_loader("train_loader", train_loader)
        weights = self.backend.engine.function.weights()
        n_params = sum(w.numel() for w in weights.values())
        if train_loader is not None and n_params > LARGEST_EXACT:
            raise ValueError(
                f"The comparison with exact linearised Laplace forms P x P matrices, for P up to {LARGEST_EXACT}; "
                f"this model has {n_params} trainable weights. Leave train_loader out."
            )
        with torch.no_grad():
            seen = self._seen(x)
            inside, outside = (t.sum() for t in traces(seen, self._overlap(seen)))
            if not len(seen.f):
                raise ValueError("x must hold at least one input; got none.")
            captured = float(inside / (inside + outside))
            error = None if train_loader is None else self._covariance_error(x, train_loader, weights)
        return ApproximationError(captured, error)

    def _covariance_error(self, x: Input, loader: Iterable[Any], weights: Mapping[str, Tensor]) -> float:
        exact = identity_basis(dict(weights))
        G, n = torch.zeros(exact.rank, exact.rank, dtype=torch.float64, device=self._device), 0
        with self._ranks.together("the training data"):
            stream = Stream(loader, self.dict_key_x, self.dict_key_y, self.backend.inputs, self._ranks)
            for part in stream.parts("Training data", partial(self.backend.bounded, width=exact.rank)):
                n += len(part.y)
                G += self.backend.curvature(*self.backend.features(part.x, exact))
        validation.check_some(self._ranks.greatest(n, "the training data"), "train_loader")
        G = self._ranks.total(G)
        precision = self._H_factor * G + exact.project_precision(self.prior_precision)
        phi, f = self.backend.features(x, exact)
        theirs = Linearised(f, phi).outputs(posterior.posterior_scale(precision)).covariance().double()
        ours = self._outputs(self._linearised(x)).covariance().double()
        return float((ours - theirs).norm() / theirs.norm())


def normal_scores(values: Tensor, reference: Tensor) -> Tensor:
    r"""Return :math:`\Phi^{-1}` of the rank of each column's values among the reference's (B, D).

    Parameters
    ----------
    values : Tensor (B, D)
    reference : Tensor (n, D)
        Ascending in each column. Values beyond it get the score of its end.
    """
    ranks = torch.searchsorted(reference.T.contiguous(), values.T.contiguous(), right=True).T
    return torch.special.ndtri((ranks.to(values.dtype) + 0.5) / (len(reference) + 1))


def entropy(p: Tensor, likelihood: str) -> Tensor:
    """Return the entropy (B,) of class probabilities, or of C independent binary ones."""

    def part(q: Tensor) -> Tensor:
        return -torch.special.xlogy(q, q).sum(-1)

    return part(p) + part(1 - p) if likelihood == "bernoulli" else part(p)
