r"""Data that come and go after a fit: ``merge`` adds another estimator's, ``forget`` takes some away.

With the basis kept, G and the loss are sums over the data, so that parts of them can be added and
subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.hashing import digest
from ..data.progress import Progress
from ..data.stream import Batch, Stream
from ..data.validation import check_flag, check_loader, check_some
from ..parallel.ranks import Ranks
from ..parallel.sharding import work_through
from ..posterior.consistency import Consistent
from ..posterior.gaussian import positive_part

# Features of one input differ by rounding where batches do: eigenvalues of a difference of two G down to
# minus so many eps of the largest there ever was are zero.
ROUNDING = 100
LARGEST_ROUNDING = 0.01  # of half precision
HYPERPARAMETERS = ("sigma_noise", "temperature", "prior_precision", "prior_mean")


def _rounded(value: Any) -> Tensor:
    """Return a hyperparameter as the tensor that is compared."""
    if isinstance(value, Tensor):
        return value.double()
    return torch.tensor(value, dtype=torch.float32, device="cpu").double()


class Merging(Consistent):
    """Adding and taking away what was fitted.

    A mixin: :class:`laplace_ella.ELLALaplace` supplies what is declared here.
    """

    params: list[nn.Parameter]
    likelihood: str
    basis: Any  # NystromBasis
    dict_key_x: str
    dict_key_y: str
    H: Any  # Tensor (K, K)
    loss: Any  # Tensor ()
    n_data: int
    n_predictions: int
    n_outputs: int
    n_curvature: int
    _ranks: Any  # Ranks
    _device: Any
    _fingerprint: str
    _labels_sampled: bool
    _largest_sums: list[float]
    _progress: Callable[[bool], Progress]
    _set_fit: Callable[..., None]
    _check_H_init: Callable[[], None]
    _check_unchanged: Callable[[], None]

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: Any) -> None:
        r"""Add what another estimator was fitted to: G, loss and N of its data.

        The result is that of ``fit(their_data, override=False)``, up to rounding; ``other`` stays as it is.

        Parameters
        ----------
        other : ELLALaplace
            Fitted to other data with ``basis=`` of this one, with the same model, likelihood, noise,
            temperature and prior.

        Raises
        ------
        AttributeError
            If one of the two is not fitted.
        ValueError
            If they differ in what has to be the same. Both stay as they are.
        """
        if not isinstance(other, Merging) or other is self:
            got = (
                "this estimator itself, whose data would count twice"
                if other is self
                else type(other).__name__
            )
            raise ValueError(f"merge() takes another fitted ELLALaplace; got {got}.")
        with self._changes() as view:
            view._add(other._view())

    def _add(self, other: Merging) -> None:
        for estimator in (self, other):
            estimator._check_H_init()
            estimator._check_unchanged()
        mine, theirs = self._identity(), other._identity()
        differ = [name for name in mine if mine[name] != theirs[name]]
        if differ:
            raise ValueError(
                f"Estimators to be merged must have the same {', '.join(mine)}; these differ in {', '.join(differ)}. "
                "Fit the other one with basis=la.basis; give both the same noise, temperature and prior, or merge before tuning."
            )
        n, G = self.n_curvature + other.n_curvature, self.H + other.H.to(self._device)
        counts = self.n_data + other.n_data, self.n_predictions + other.n_predictions, self.n_outputs
        sampled = self._labels_sampled or other._labels_sampled
        largest = [max(pair) for pair in zip(self._largest_sums, other._largest_sums)]
        self._set_fit(self.basis, [(n, G)], self.loss + other.loss.to(self._device), counts, largest)
        self._labels_sampled = sampled

    def _identity(self) -> dict[str, Any]:
        """Return what two estimators must share to be merged, in plain types."""
        values = {k: getattr(self, k) for k in HYPERPARAMETERS}
        numbers = {k: digest(_rounded(v).reshape(-1)) for k, v in values.items()}
        return {
            "model": self._fingerprint,
            "likelihood": str(self.likelihood),
            "basis": digest(self.basis.directions, self.basis.eigenvalues),
            **numbers,
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def forget(self, loader: Iterable[Any], progress_bar: bool = False) -> None:
        r"""Take data away that this estimator was fitted to: from G, loss and N.

        The result is that of a fit to the remaining data *with the same basis*, up to rounding. This is no
        unlearning: landmarks among the forgotten inputs stay in the basis, and the network was trained on them.

        On several ranks, all call it, each with its part of what is to be forgotten.

        Parameters
        ----------
        loader : iterable
            Batches of those data, as in :meth:`fit`; read once.
        progress_bar : bool
            Show the progress.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If G is not the exact one of all N inputs, if the loader is empty or holds all data that there are, or
            data that were not among those fitted, as far as G and the loss can tell: their differences must
            not be negative. The estimator stays as it is.
        RankError
            If another rank failed.

        Notes
        -----
        Cost: 1 + 2K forward passes an input.
        """
        with self._changes() as view:
            view._take_away(loader, progress_bar)

    def _take_away(self, loader: Iterable[Any], progress_bar: bool) -> None:
        ranks = self._ranks
        with ranks.together("the arguments of forget()"):
            self._check_H_init()
            self._check_unchanged()
            self._check_exact()
            check_loader("loader", loader)
            check_flag("progress_bar", progress_bar)
            stream = Stream(
                loader,
                self.dict_key_x,
                self.dict_key_y,
                self.backend.inputs,
                ranks,
                self._progress(progress_bar),
            )
        G, loss, (n, n_predictions) = self._sums_over(stream, ranks)
        check_some(n, "loader of the data to forget")
        with ranks.together("what remains"):
            self._check_count(n)
            remaining, n_left = self._remaining(G, loss), self.n_data - n
        remaining = ranks.of_first(remaining)
        loss, counts = (self.loss - loss).clamp_min(0), (n_left, self.n_predictions - n_predictions)
        self._set_fit(self.basis, [(n_left, remaining)], loss, (*counts, self.n_outputs), self._largest_sums)

    def _sums_over(self, stream: Stream, ranks: Ranks) -> tuple[Tensor, Tensor, list[int]]:
        """Return G (K, K) and loss () of the data of all ranks, and how many inputs and predictions they are."""
        basis, what = self.basis, "the data to forget"
        G, loss, counts = (
            torch.zeros_like(self.H),
            torch.zeros_like(self.loss),
            torch.zeros(2, dtype=torch.int64, device="cpu"),
        )

        def add(batch: Batch | None) -> None:
            if batch is None:
                self.backend.answer_others(basis)
                return
            of_loss, of_G = self.backend.full(batch.x, batch.y, name=batch.name, basis=basis)
            G.add_(of_G)
            loss.add_(of_loss)
            n = len(batch.y)
            predictions = n * math.prod(self.backend.positions(batch.x))
            counts.add_(torch.tensor([n, predictions], dtype=torch.int64, device="cpu"))
            self._check_count(int(counts[0]))  # of a stream without end, too

        parts = stream.parts("Data to forget", partial(self.backend.bounded, width=basis.rank))
        work_through(parts, add, ranks, basis.ranks, what)
        return ranks.total(G), ranks.total(loss), ranks.total(counts).tolist()

    def _check_exact(self) -> None:
        if self.n_curvature == self.n_data and not self._labels_sampled:
            return
        found = (
            "sampled labels" if self._labels_sampled else f"{self.n_curvature} of N = {self.n_data} inputs"
        )
        raise ValueError(
            "forget() needs the exact G of all data, as it cannot be known what the data to be forgotten have contributed to an "
            f"estimate; this one is made from {found}. Fit with curvature_size=None, or N at least, with "
            "curvature='exact' and without n_total or early stopping."
        )

    def _check_count(self, n: int) -> None:
        if n >= self.n_data:
            raise ValueError(
                f"forget() would leave no data: the loader has {n} inputs or more, and the estimator was fitted to {self.n_data}. "
                "Pass those to be forgotten; fit again to start anew."
            )

    def _remaining(self, G: Tensor, loss: Tensor) -> Tensor:
        """Return what remains of G, and require that it is a sum over data: no negative curvature, and no negative loss."""
        largest, largest_loss = self._largest_sums
        remaining = self.H - G
        lowest = float(torch.linalg.eigvalsh(remaining)[0])
        eps = min(ROUNDING * torch.finfo(self.params[0].dtype).eps, LARGEST_ROUNDING)
        if lowest < -eps * largest or self.loss - loss < -eps * largest_loss:
            raise ValueError(
                "The data to be forgotten are not among those that the estimator was fitted to: without them, the smallest "
                f"eigenvalue of G would be {lowest:.3g} (the largest was {largest:.3g}), and the loss, a sum of positive "
                f"terms, {float(self.loss - loss):.3g}. Pass inputs and targets as they were fitted, each once."
            )
        return positive_part(remaining) if lowest < 0 else remaining
