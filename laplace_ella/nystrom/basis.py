r"""The Nystrom basis: gradient rows R -> Gram matrix -> directions V in weight space.

:math:`R R^T = U \operatorname{diag}(\lambda) U^T` and
:math:`V = R^T U_K \operatorname{diag}(\lambda_K)^{-1/2}`, so that :math:`V^T V = I`
(Deng, Zhou, Zhu, NeurIPS 2022, section 3; arXiv 2210.12642).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..data.hashing import digest
from ..data.landmarks import Landmarks
from ..data.progress import Progress, no_progress
from ..network.functional import Weights, flat, is_dense
from ..parallel.ranks import ALONE, Ranks
from .caching import keep, outside_inference
from .gram import FRESH, HeldRows, Spill, Unfinished, choose_rows
from .rows import RowSource, inner_products


@dataclass(frozen=True)
class NystromBasis:
    r"""K orthonormal directions in weight space.

    Attributes
    ----------
    directions : dict of Tensor (K, *shape)
        V, one block per trainable weight, in the weight's dtype and memory format.
    eigenvalues : Tensor (K,)
        The leading eigenvalues of the Gram matrix, descending, float64.
    trace : float
        Trace of the Gram matrix: the sum of all its eigenvalues.
    spectrum : Tensor (M,)
        All eigenvalues of the Gram matrix, descending, float64.
    ranks : Ranks
        The processes over which the directions are spread. They are dealt like cards, so that each
        process has (K_rank, *shape) of them. By default, one process has all.
    grams : Tensor (L, K, K), optional
        :attr:`weight_grams`, where no process has all directions.
    of_model : str, optional
        The hash of the model whose gradients the directions come from; None if that is not known.
    landmarks : Landmarks, optional
        The M landmarks, whose inputs take little memory next to V.
    coefficients : Tensor (M, K), optional
        a with :math:`V = R^T a`, float64, where R are the gradient rows of the landmarks. None if the rows
        were rounded to another precision than the model's before V was made of them.
    """

    directions: Weights
    eigenvalues: Tensor
    trace: float
    spectrum: Tensor
    ranks: Ranks = ALONE
    grams: Tensor | None = None
    of_model: str | None = None
    landmarks: Landmarks | None = field(default=None, repr=False)
    coefficients: Tensor | None = field(default=None, repr=False)

    @property
    def n_landmarks(self) -> int:
        """M, the number of landmarks."""
        return len(self.spectrum)

    @property
    def rank(self) -> int:
        """K, the number of directions."""
        return len(self.eigenvalues)

    @property
    def retained(self) -> float:
        """Share of the Gram matrix's trace that the K directions retain, in (0, 1]."""
        return float(self.eigenvalues.sum()) / self.trace

    @property
    def sharded(self) -> bool:
        """Whether the directions are spread over several ranks."""
        return self.ranks.size > 1

    def fingerprint(self) -> str:
        """Return a hash of the basis; if directions are spread, of the spectrum alone, so that all ranks have the same."""
        directions = {} if self.sharded else self.directions
        return digest(self.spectrum, self.eigenvalues, directions)

    def leading(self, rank: int) -> NystromBasis:
        """Return the basis of the first ``rank`` directions: what a fit with that rank would have found.

        It shares memory with this one.
        """
        kept = len(range(rank)[self.ranks.turns()])
        return replace(
            self,
            directions={k: v[:kept] for k, v in self.directions.items()},
            eigenvalues=self.eigenvalues[:rank],
            grams=None if self.grams is None else self.grams[:, :rank, :rank],
            coefficients=None if self.coefficients is None else self.coefficients[:, :rank],
        )

    def to(self, device: torch.device) -> NystromBasis:
        """Return the basis with its tensors on a device; the same object if they are there already."""
        if all(v.device == device for v in (self.eigenvalues, *self.directions.values())):
            return self
        tensors = ("eigenvalues", "spectrum", "grams", "coefficients")
        found = {k: getattr(self, k) for k in tensors}
        moved: dict[str, Any] = {k: v.to(device) for k, v in found.items() if v is not None}
        return replace(self, directions={k: v.to(device) for k, v in self.directions.items()}, **moved)

    def spread(self, ranks: Ranks) -> NystromBasis:
        """Return the basis whose directions here are those of one of several ranks; all of them have to call."""
        found = overlaps_by_weight(self.directions, ranks, [ranks.lengths(self.rank)])
        # The overlaps are in the order of the ranks, to which the directions were dealt like cards.
        indices = torch.arange(self.rank, dtype=torch.int64, device="cpu")
        order = torch.cat([indices[r :: ranks.size] for r in range(ranks.size)]).argsort()
        grams = found[:, order][:, :, order]
        return replace(self, ranks=ranks, grams=grams, landmarks=None, coefficients=None)

    def plot(self, ax: Any = None) -> Any:
        """Draw the spectrum of the Gram matrix, and the share of its trace that K directions retain.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            Without matplotlib, which the extra ``plot`` installs.
        ValueError
            If ``ax`` is something else.
        """
        import matplotlib.pyplot as plt

        if ax is not None and not isinstance(ax, plt.Axes):
            raise ValueError(f"ax must be one of matplotlib's Axes, or None; got {ax!r}.")
        ax = plt.subplots(layout="constrained")[1] if ax is None else ax
        values = self.spectrum.clamp_min(0).cpu().numpy()
        indices, shares = range(1, len(values) + 1), values / values.sum()
        ax.loglog(indices, shares, color="C0")
        ax.set_xlabel("index of the eigenvalue, or K")
        ax.set_ylabel("eigenvalue / trace", color="C0")
        ax.axvline(self.rank, color="0.6", ls="--")
        right = ax.twinx()
        right.semilogx(indices, shares.cumsum(), color="C1")
        right.set(ylim=(0, 1))
        right.set_ylabel("retained share", color="C1")
        ax.set_title(f"K = {self.rank} of M = {self.n_landmarks} retain {self.retained:.1%} of the trace")
        return ax

    @property
    def weight_grams(self) -> Tensor:
        r""":math:`V_l^T V_l` (L, K, K) of each weight tensor l, float64; they sum to the identity."""
        if self.grams is not None:
            return self.grams
        kept = vars(self).get("_overlaps")
        if kept is None or not kept.is_of((), self.directions.values()):
            with outside_inference():  # the overlaps are kept, and may meet a graph later
                kept = keep(overlaps_by_weight(self.directions), (), self.directions.values())
            vars(self)["_overlaps"] = kept
        return kept.value

    def project_precision(self, prior_precision: Tensor) -> Tensor:
        r"""Project a prior precision onto the span: :math:`V^T \Delta V` (K, K), float64.

        Parameters
        ----------
        prior_precision : Tensor (1,), (L,) or (P,)
            One for all weights, one per weight tensor, or one per weight.
            Differentiable.
        """
        delta = prior_precision.double()
        if delta.numel() == 1:
            return delta * torch.eye(self.rank, dtype=torch.float64, device=delta.device)
        blocks = [flat(v) for v in self.directions.values()]
        if delta.numel() == sum(b.shape[1] for b in blocks):
            parts = delta.split([b.shape[1] for b in blocks])
            return sum((b.double() * d) @ b.double().T for b, d in zip(blocks, parts))
        return torch.einsum("l,lkj->kj", delta, self.weight_grams)

    def combine(self, coordinates: Tensor) -> Weights:
        r"""Map coordinates z (S, K) to weight offsets :math:`V z`, a dict of (S, *shape)."""
        with torch.autocast(coordinates.device.type, enabled=False):
            own = coordinates[:, self.ranks.turns()]
            return {
                k: self.ranks.total(torch.tensordot(own.to(v.dtype), v, 1))
                for k, v in self.directions.items()
            }

    def overlap(self, tangents: Weights) -> Tensor:
        r"""Return :math:`V^T g` (K, S) of S tangents (S, *shape), float64."""
        products = (flat(v).double() @ flat(tangents[k]).double().T for k, v in self.directions.items())
        return self.ranks.interleaved(torch.stack(list(products)).sum(0).T, self.rank).T


def overlaps_by_weight(
    directions: Weights, ranks: Ranks = ALONE, lengths: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Return :math:`V_l^T V_l` (L, K, K) of each weight tensor l, float64; see :func:`inner_products` for the ranks."""
    blocks = [flat(v) for v in directions.values()]
    return torch.stack([inner_products(b, device=b.device, ranks=ranks, lengths=lengths) for b in blocks])


def identity_basis(weights: Weights) -> NystromBasis:
    """Return all P unit directions, in which ELLA is exact linearised Laplace. Memory: P x P numbers."""
    n_params = sum(w.numel() for w in weights.values())
    device = next(iter(weights.values())).device
    units = torch.eye(n_params, dtype=torch.float32, device=device)
    ones = torch.ones(n_params, dtype=torch.float64, device=device)
    return NystromBasis(stored_directions(weights, units), ones, float(n_params), ones)


def build_basis(
    source: RowSource,
    rank: int | float,
    *,
    budget: int,
    spill: Spill | None = None,
    progress: Progress,
    unfinished: Unfinished = FRESH,
) -> NystromBasis:
    """Compute the leading directions of the landmarks' gradients.

    Parameters
    ----------
    source : RowSource
        Gradient rows of M landmarks.
    rank : int or float
        K wanted, or the share of the Gram matrix's trace to retain; fewer are returned if the
        numerical rank of the rows is lower, or if a share would need more than the budget.
    budget : int
        Bytes that gradient rows may take; see :func:`laplace_ella.nystrom.gram.choose_rows`. The same on all ranks.
    spill : Spill, optional
        Where rows go that do not fit.
    progress : callable
        Wraps an iterable in a progress bar: (iterable, description) -> iterable.
    unfinished : Unfinished
        The Gram matrix of a fit that was interrupted, and what keeps it.

    Raises
    ------
    ValueError
        If a gradient is not finite, or all of them vanish.
    DivergedError
        On all ranks, if gradients cannot be computed layer by layer after all.

    Notes
    -----
    Cost: 3 or more forward passes a landmark if all rows fit or are spilled; else as
    many times as ``choose_rows(...).gradients`` counts.
    """
    rows = choose_rows(source, budget, spill)
    found = rows.gram(progress, unfinished)
    # All ranks have the same matrix; that they find the same vectors too is not left to chance.
    ranks = source.ranks
    with ranks.together("the eigenvectors"):
        pairs = torch.linalg.eigh(found)
    spectrum, vectors = (ranks.of_first(t).flip(-1) for t in pairs)
    if isinstance(rank, float):
        rank = min(rank_of_share(spectrum, rank), max(1, budget // source.direction_bytes))
    eps = torch.finfo(rows.dtype).eps
    eigenvalues, coefficients = _leading_eigenpairs(spectrum, vectors, rank, eps)
    values = rows.combine(coefficients, progress)
    with ranks.together("the directions"):
        directions = stored_directions(source.weights, values)
    basis = NystromBasis(
        directions,
        eigenvalues,
        float(found.trace()),
        spectrum,
        landmarks=source.landmarks,
        coefficients=coefficients if eps <= torch.finfo(source.dtype).eps else None,
    )
    return basis.spread(ranks) if source.sharded and ranks.size > 1 else basis


def combined(source: RowSource, coefficients: Tensor, budget: int) -> Weights:
    r"""Compute :math:`V = R^T a` from landmarks and coefficients (M, K). Cost: 3 or more forward passes a landmark."""
    rows = HeldRows(source, max(1, min(budget // source.row_bytes, len(source))))
    return stored_directions(source.weights, rows.combine(coefficients, no_progress))


def stored_directions(weights: Weights, values: Tensor) -> Weights:
    """Store directions (K, P) as a basis does: one tensor (K, *shape) per weight."""
    blocks = values.split([w.numel() for w in weights.values()], 1)
    return {k: _like(w, b.reshape(len(b), *w.shape)) for (k, w), b in zip(weights.items(), blocks)}


def rank_of_share(spectrum: Tensor, share: float) -> int:
    """Return the smallest K whose eigenvalues make up a share of the trace."""
    positive = spectrum.clamp_min(0)
    return 1 + int((positive.cumsum(0) < share * positive.sum()).sum())


def _leading_eigenpairs(eigenvalues: Tensor, vectors: Tensor, rank: int, eps: float) -> tuple[Tensor, Tensor]:
    r"""Return eigenvalues (K,), descending, and :math:`U_K \operatorname{diag}(\lambda_K)^{-1/2}` (M, K).

    Eigenvalues up to max(eps of the rows, M eps of float64) times the largest are
    rounding: a Weyl bound for a float64 Gram matrix of rounded rows.
    """
    if eigenvalues[0] <= 0:
        raise ValueError(
            "All landmark gradients are zero, so they span no direction; at least one must differ. "
            "Check that the outputs depend on weights that require grad."
        )
    floor = max(eps, len(eigenvalues) * torch.finfo(torch.float64).eps) * eigenvalues[0]
    kept = min(rank, int((eigenvalues > floor).sum()))
    eigenvalues, vectors = eigenvalues[:kept].clone(), vectors[:, :kept]
    # Eigenvectors have a sign of their own on every machine; fix it.
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return eigenvalues, vectors * signs / eigenvalues.sqrt()


def _like(weight: Tensor, values: Tensor) -> Tensor:
    """Store (K, *shape) so that each slice has the weight's dtype and order of axes in memory.

    A tangent whose strides differ from its weight's is copied at every use. The strides of a slice of a
    larger tensor, or of an expanded one, are no order of axes: directions would overlap.
    """
    own = weight if is_dense(weight) else torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    strides = (own.numel(), *own.stride())
    return weight.new_empty(0).new_empty_strided(tuple(values.shape), strides).copy_(values)
