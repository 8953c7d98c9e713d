r"""What a fit leaves: the basis, G, and sums over the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..nystrom.basis import NystromBasis

Snapshots = Sequence[tuple[int, Tensor]]


@dataclass(frozen=True, eq=False)
class Fit:
    """What a fit leaves; nothing in it changes.

    Attributes
    ----------
    basis : NystromBasis
        The K directions.
    snapshots : list of (n, Tensor (K, K))
        G as estimated from the first n curvature inputs, scaled to all N, float64; n ascends.
    n_curvature : int
        How many inputs ``H`` is estimated from.
    H : Tensor (K, K)
        G, the curvature summed over the data, float64.
    loss : Tensor ()
        Negative log likelihood summed over the data, up to constants.
    n_data, n_outputs : int
        N and C.
    n_predictions : int or float
        N times the positions of an input, without those whose targets are ignored; with weights, their sum.
    mean : Tensor (P,)
        The weights at the time of the fit.
    fingerprint : str
        The hash of the model that was fitted.
    largest_sums : (float, float)
        The largest eigenvalue of G, and the largest loss, that were ever part of these sums: their rounding stays.
    labels_sampled : bool
        Whether any part of G was estimated from sampled labels, or from some of the positions.
    history : dict
        Validation scores along the fit.
    novelty : (Tensor (n, 2), list) or None
        Usual entropies and residual shares, ascending, and the setting that they were found with.
    channel_axis : int or None
        Where outputs have their channels: 1 or -1; None: last, and predictions have a row for each position.
    """

    basis: NystromBasis
    snapshots: Snapshots
    n_curvature: int
    H: Tensor
    loss: Tensor
    n_data: int
    n_predictions: float
    n_outputs: int
    mean: Tensor
    fingerprint: str
    largest_sums: Sequence[float] = (0.0, 0.0)
    labels_sampled: bool = False
    history: dict[str, list[float]] = field(default_factory=lambda: {"processed_examples": [], "val_nll": []})
    novelty: tuple[Tensor, list[Any]] | None = None
    channel_axis: int | None = None

    @property
    def exact(self) -> bool:
        """Whether G is that of all inputs and their positions, without sampled labels."""
        return self.n_curvature == self.n_data and not self.labels_sampled

    def curvature(self, n: int | None = None, rank: int | None = None) -> Tensor:
        """Return G (K', K') as estimated from the first n inputs, for the leading K' directions."""
        G = self.H if n in (None, self.n_curvature) else dict(self.snapshots)[n]
        return G[:rank, :rank]

    def first(self, n: int) -> Fit:
        """Return the fit with G as estimated from the first n curvature inputs."""
        return replace(self, n_curvature=n, H=dict(self.snapshots)[n])

    def within(self, basis: NystromBasis) -> Fit:
        """Return the fit within the leading directions of its basis, which are another basis; memory is shared."""
        rank = basis.rank
        snapshots = [(n, G[:rank, :rank]) for n, G in self.snapshots]
        return replace(self, basis=basis, snapshots=snapshots, H=self.H[:rank, :rank])

    def with_sums(self, snapshots: Snapshots, loss: Tensor, n_data: int, n_predictions: float) -> Fit:
        """Return the fit with other sums over data, whose usual novelty is not known."""
        sums = sums_over_data(snapshots, loss, n_data, n_predictions, self.largest_sums)
        return replace(self, **sums, novelty=None)

    def plus(self, other: Fit) -> Fit:
        """Return the fit to the data of both, which have one basis; there are no first n inputs any more."""
        n, G = self.n_curvature + other.n_curvature, self.H + other.H.to(self.H.device)
        largest = [max(pair) for pair in zip(self.largest_sums, other.largest_sums)]
        joined = replace(
            self, largest_sums=largest, labels_sampled=self.labels_sampled or other.labels_sampled
        )
        return joined.with_sums(
            [(n, G)],
            self.loss + other.loss.to(self.loss.device),
            self.n_data + other.n_data,
            self.n_predictions + other.n_predictions,
        )

    def to(self, device: torch.device) -> Fit:
        """Return the fit with its tensors on another device."""
        return replace(
            self,
            basis=self.basis.to(device),
            snapshots=[(n, G.to(device)) for n, G in self.snapshots],
            H=self.H.to(device),
            loss=self.loss.to(device),
            mean=self.mean.to(device),
        )


def sums_over_data(
    snapshots: Snapshots,
    loss: Tensor,
    n_data: int,
    n_predictions: float,
    largest: Sequence[float] = (0.0, 0.0),
) -> dict[str, Any]:
    """Return the fields of a fit that are sums over data, or follow from them.

    Parameters
    ----------
    largest : (float, float)
        ``largest_sums`` of the fit before.
    """
    n, H = snapshots[-1]
    sizes = float(torch.linalg.eigvalsh(H)[-1]), float(loss)
    return {
        "snapshots": snapshots,
        "n_curvature": n,
        "H": H,
        "loss": loss,
        "n_data": n_data,
        "n_predictions": n_predictions,
        "largest_sums": [max(pair) for pair in zip(sizes, largest)],
        "history": {"processed_examples": [float(n)], "val_nll": []},
    }
