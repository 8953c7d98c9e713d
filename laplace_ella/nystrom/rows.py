r"""The gradient rows of landmarks, which are computed when they are asked for, and their products.

On several ranks, each rank computes its share of the rows that are asked for. For products the ranks
exchange columns, so that each of them multiplies all rows for its part of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise
from typing import Any

import torch
from torch import Tensor

from ..data.batches import collate, inputs_between
from ..data.landmarks import Landmarks
from ..network.functional import FunctionalModel, Weights, flat
from ..network.gradients import RowEngine
from ..network.memory import Chunks, with_smaller_chunks
from ..parallel.ranks import ALONE, Ranks

# Products are summed over slices of this many weights, each of which is held in float64.
SLICE = 8192
# One sum over the ranks has about this many numbers.
SUMMED = 2**22


@dataclass(eq=False)
class RowSource:
    """The gradient rows of landmarks, which are computed when they are asked for.

    Attributes
    ----------
    model : FunctionalModel
    landmarks : Landmarks
        The M pairs of an input and one of its outputs.
    engine : callable
        Computes gradient rows; see :mod:`laplace_ella.network.gradients`.
    to_model : callable
        Moves an input to the model.
    landmarks_per_call : int
        How many rows one call of the engine computes; halved when the device runs out of memory.
    ranks : Ranks
        The processes that compute the rows together, each its share.
    sharded : bool
        Whether each rank keeps only its own combinations of the rows.
    computed : int
        How many rows this rank has computed so far.
    """

    model: FunctionalModel
    landmarks: Landmarks
    engine: RowEngine
    to_model: Callable[[Any], Any]
    landmarks_per_call: int
    ranks: Ranks = ALONE
    sharded: bool = False
    computed: int = 0

    def __post_init__(self) -> None:
        self.weights = self.model.weights()
        self.sizes = {k: w.numel() for k, w in self.weights.items()}
        self.n_weights = sum(self.sizes.values())
        first = next(iter(self.weights.values()))
        self.device, self.dtype = first.device, first.dtype

    def __len__(self) -> int:
        return len(self.landmarks)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.n_weights * self.dtype.itemsize

    def __call__(
        self,
        indices: Sequence[int],
        out: Tensor | None = None,
        norms: Tensor | None = None,
        progress: Callable[[Any], Any] = iter,
    ) -> Tensor:
        """Return the rows (len(indices), P) of some landmarks.

        All ranks have to ask for the same rows, and each gets its share of them. The rows are written to ``out`` if
        it is given. If ``norms`` is given, the norms of the rows are written there, and the rows are divided by them.
        """
        indices = self.ranks.share(indices)
        with self.ranks.together("the gradients of landmarks"):
            if out is None:
                out = torch.empty(len(indices), self.n_weights, device=self.device, dtype=self.dtype)
            inputs = [self.landmarks.inputs[i] for i in indices]
            for part, x in progress(list(collate(inputs, self.landmarks_per_call))):
                self._write(out, part, [indices[i] for i in part], self.to_model(x), norms)
            self.computed += len(indices)
        return out

    def _write(self, out: Tensor, part: list[int], chosen: list[int], x: Any, norms: Tensor | None) -> None:
        """Write the rows of the landmarks ``chosen``, whose inputs are ``x``, to the lines ``part`` of ``out``."""
        gradients = self._gradients(x, self.landmarks.outputs[chosen].to(self.device))
        scale = None
        if norms is not None:
            squares = [flat(g).double().square().sum(1) for g in gradients.values()]
            norms[part] = torch.stack(squares).sum(0).sqrt()
            scale = norms[part, None].clamp_min(torch.finfo(torch.float64).tiny)
        for name, columns in zip(self.sizes, out.split(list(self.sizes.values()), 1)):
            block = flat(gradients[name])
            if not block.isfinite().all():
                raise ValueError(
                    f"The gradients of landmarks {self.landmarks.names(chosen)} hold NaN or infinite values in {name!r}; "
                    "they must be finite. A square root or a norm at zero is a usual cause."
                )
            columns[part] = (block if scale is None else block / scale).to(out.device, out.dtype)

    def _gradients(self, x: Any, outputs: Tensor) -> Weights:
        def compute(chunks: Chunks) -> Weights:
            n, parts = chunks.inputs, []
            for a in range(0, len(outputs), n):
                part = inputs_between(x, a, a + n)
                parts.append(self.engine(self.model, self.weights, part, outputs[a : a + n]))
            return (
                parts[0] if len(parts) == 1 else {k: torch.cat([p[k] for p in parts]) for k in self.weights}
            )

        planned = Chunks(self.landmarks_per_call, 1)
        found, chunks = with_smaller_chunks(
            compute, planned, self.device, lambda c: 2 * c.inputs * self.row_bytes
        )
        self.landmarks_per_call = chunks.inputs
        return found

    def products(self, *sides: tuple[Tensor, int], progress: Callable[[Any], Any] = iter) -> Tensor:
        """Return :func:`inner_products` of one or two sets of rows: this rank's share of them, and how many there are."""
        lengths = [self.ranks.lengths(n) for _, n in sides]
        values = (side for side, _ in sides)
        return inner_products(
            *values, device=self.device, ranks=self.ranks, lengths=lengths, progress=progress
        )

    def combination(self, coefficients: Tensor, values: Tensor) -> Tensor:
        """Return ``coefficients.T @ rows`` (K, P), of coefficients (M, K) and rows of which each rank has its share.

        Each slice is computed in float64. If directions are spread over the ranks, those of this rank are returned.
        """
        # Spilled rows may be coarser than the weights, whose precision orthonormal directions need.
        dtype = torch.promote_types(torch.promote_types(values.dtype, self.dtype), torch.float32)
        n_weights, rank = values.shape[1], coefficients.shape[1]
        width = _slice_width(len(coefficients))
        mine = self.ranks.share(coefficients)
        kept = self.ranks.turns() if self.sharded else slice(None)
        out = coefficients.new_empty(len(range(rank)[kept]), n_weights, dtype=dtype)
        # One sum over the ranks holds several slices.
        block = width * max(1, SUMMED // (rank * width))
        with self.ranks.lockstep("the directions") as between:
            for start in range(0, n_weights, block):
                columns = slice(start, min(start + block, n_weights))
                product = coefficients.new_zeros(rank, columns.stop - columns.start)
                with between():
                    pieces = values[:, columns].split(width, 1)
                    product = torch.cat([mine.T @ p.to(mine.device).double() for p in pieces], 1)
                total = self.ranks.total(product)
                with between():
                    out[:, columns] = total[kept]
        return out


def _slice_width(n_rows: int) -> int:
    return max(64, min(SLICE, 2**22 // n_rows))


def inner_products(
    *sides: Tensor,
    device: torch.device,
    ranks: Ranks = ALONE,
    lengths: Sequence[Sequence[int]] | None = None,
    progress: Callable[[Any], Any] = iter,
) -> Tensor:
    """Return ``left @ right.T`` in float64; of ``left`` alone ``left @ left.T``, of which the upper half is computed.

    On several ranks, ``lengths`` says how many rows of each side each rank has.
    """
    lengths = [[len(side)] for side in sides] if lengths is None else lengths
    sizes, symmetric = [sum(n) for n in lengths], len(sides) == 1
    out = torch.zeros(sizes[0], sizes[-1], dtype=torch.float64, device=device)
    starts = range(0, sizes[0], -(-sizes[0] // 8)) if symmetric else [0]
    blocks = [slice(a, b) for a, b in pairwise([*starts, None])]
    width = _slice_width(sum(sizes))
    slices = range(0, sides[0].shape[1], width)
    columns = (ranks.columns(side, n, width) for side, n in zip(sides, lengths))
    with ranks.lockstep("the Gram matrix") as between:
        for _, pieces in zip(progress(slices), zip(*columns)):
            with between():
                own = [p.to(device).double() for p in pieces]
                for i, j in combinations_with_replacement(blocks, 2):
                    out[i, j].addmm_(own[0][i], own[-1][j].T)
    out = ranks.total(out)
    return out.triu() + out.triu(1).T if symmetric else out


def kernels(values: Tensor, n_outputs: int) -> Tensor:
    """Return :math:`J J^T` (B, C, C), float64, from the rows (B C, P) of all C outputs of B inputs."""
    out = torch.zeros(
        len(values) // n_outputs, n_outputs, n_outputs, dtype=torch.float64, device=values.device
    )
    for piece in values.split(_slice_width(len(values)), 1):
        stacked = piece.double().view(len(out), n_outputs, -1)
        out.baddbmm_(stacked, stacked.mT)
    return out
