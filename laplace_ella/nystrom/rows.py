r"""The gradient rows of landmarks, which are computed when they are asked for, and their products.

On several ranks, each rank computes its share of the rows that are asked for. For products the ranks
exchange columns, so that each of them multiplies all rows for its part of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations_with_replacement, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from ..data.batches import collate, inputs_between
from ..data.landmarks import Landmarks
from ..network.by_layer import Gradients, Matrices, Outer, outer_numbers
from ..network.calls import DivergedError
from ..network.functional import FunctionalModel, flat
from ..network.memory import Chunks, with_smaller_chunks
from ..network.uses import Product
from ..parallel.ranks import ALONE, Ranks
from .outer import add_products, combination, is_finite, joined, squares

# Products are summed over slices of this many weights, each of which is held in float64.
SLICE = 8192
# One sum over the ranks has about this many numbers.
SUMMED = 2**22


@dataclass(frozen=True)
class Rows:
    """The gradient rows of m landmarks: numbers, and for matrices whose gradients are outer products these.

    Attributes
    ----------
    values : Tensor (m, P')
        The columns of all other weights.
    outer : dict of Outer
        For n = 1, left (m, 1, T, O) and right (m, T, J).
    """

    values: Tensor
    outer: dict[str, Outer]


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
    matrices : dict of Product
        The matrices whose gradients the engine returns as outer products.
    computed : int
        How many rows this rank has computed so far.
    """

    model: FunctionalModel
    landmarks: Landmarks
    engine: Callable[..., Mapping[str, Gradients]]
    to_model: Callable[[Any], Any]
    landmarks_per_call: int
    ranks: Ranks = ALONE
    sharded: bool = False
    matrices: Matrices = field(default_factory=dict)
    computed: int = 0

    def __post_init__(self) -> None:
        self.weights = self.model.weights()
        self.sizes = {k: w.numel() for k, w in self.weights.items()}
        self.n_weights = sum(self.sizes.values())
        full, self.n_outer, _ = outer_numbers(self.matrices)
        self.n_values = self.n_weights - full
        first = next(iter(self.weights.values()))
        self.device, self.dtype = first.device, first.dtype

    def __len__(self) -> int:
        return len(self.landmarks)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is held."""
        return (self.n_values + self.n_outer) * self.dtype.itemsize

    @property
    def outer_bytes(self) -> int:
        """Bytes of the outer products in one row."""
        return self.n_outer * self.dtype.itemsize

    @property
    def direction_bytes(self) -> int:
        """Bytes of one combination of rows."""
        return self.n_weights * self.dtype.itemsize

    def __call__(
        self,
        indices: Sequence[int],
        out: Tensor | None = None,
        norms: Tensor | None = None,
        progress: Callable[[Any], Any] = iter,
    ) -> Rows:
        """Return the rows of some landmarks.

        All ranks have to ask for the same rows, and each gets its share of them. Their values are written to ``out``
        if it is given. If ``norms`` is given, the norms of the rows are written there, and the rows are divided by them.

        Raises
        ------
        DivergedError
            On all ranks, if gradients cannot be computed layer by layer after all.
        """
        indices = self.ranks.share(indices)
        with self.ranks.together("the gradients of landmarks", (DivergedError,)):
            rows = self.empty(len(indices), out)
            inputs = [self.landmarks.inputs[i] for i in indices]
            for part, x in progress(list(collate(inputs, self.landmarks_per_call))):
                self._write(rows, part, [indices[i] for i in part], self.to_model(x), norms)
            self.computed += len(indices)
        return rows

    def empty(self, n: int, values: Tensor | None = None) -> Rows:
        """Return n rows that are not initialised."""
        new = partial(torch.empty, device=self.device, dtype=self.dtype)
        shapes = {k: use.shape for k, use in self.matrices.items()}
        outer = {k: Outer(new(n, 1, t, o), new(n, t, j)) for k, (t, _, o, j) in shapes.items()}
        return Rows(new(n, self.n_values) if values is None else values, outer)

    def _write(self, rows: Rows, part: list[int], chosen: list[int], x: Any, norms: Tensor | None) -> None:
        """Write the rows of the landmarks ``chosen``, whose inputs are ``x``, to the lines ``part`` of ``rows``."""
        gradients = self._gradients(x, self.landmarks.outputs[chosen].to(self.device))
        scale = torch.ones(len(part), 1, dtype=torch.float64, device=self.device)
        if norms is not None:
            norms[part] = torch.stack([squares(g) for g in gradients.values()]).sum(0).sqrt()
            scale = norms[part, None].clamp_min(torch.finfo(torch.float64).tiny)
        values = [k for k in self.sizes if k not in self.matrices]
        columns = dict(zip(values, rows.values.split([self.sizes[k] for k in values], 1)))
        for name, found in gradients.items():
            if not is_finite(found):
                raise ValueError(
                    f"The gradients of landmarks {self.landmarks.names(chosen)} hold NaN or infinite values in {name!r}; "
                    "they must be finite. A square root or a norm at zero is a usual cause."
                )
            block = flat(found.left if isinstance(found, Outer) else found)
            block = block if norms is None else block / scale
            if isinstance(found, Outer):
                place = rows.outer[name]
                place.left[part] = block.view_as(found.left).to(self.dtype)
                place.right[part] = found.right.to(self.dtype)
            else:
                columns[name][part] = block.to(rows.values.device, rows.values.dtype)

    def _gradients(self, x: Any, outputs: Tensor) -> Mapping[str, Gradients]:
        def compute(chunks: Chunks) -> Mapping[str, Gradients]:
            n, parts = chunks.inputs, []
            for a in range(0, len(outputs), n):
                part = inputs_between(x, a, a + n)
                parts.append(self.engine(self.model, self.weights, part, outputs[a : a + n]))
            return parts[0] if len(parts) == 1 else {k: joined([p[k] for p in parts]) for k in self.weights}

        planned = Chunks(self.landmarks_per_call, 1)
        found, chunks = with_smaller_chunks(
            compute, planned, self.device, lambda c: 2 * c.inputs * self.row_bytes
        )
        self.landmarks_per_call = chunks.inputs
        return found

    def products(self, *sides: tuple[Rows, int], progress: Callable[[Any], Any] = iter) -> Tensor:
        """Return :func:`inner_products` of one or two sets of rows: this rank's share of them, and how many there are."""
        lengths = [self.ranks.lengths(n) for _, n in sides]
        rows, others = sides[0][0], sides[-1][0]
        out = inner_products(
            *(side.values for side, _ in sides),
            device=self.device,
            ranks=self.ranks,
            lengths=lengths,
            progress=progress,
        )
        if not self.matrices:
            return out
        of_all = {
            k: Outer(self.ranks.joined(o.left), self.ranks.joined(o.right)) for k, o in others.outer.items()
        }
        with self.ranks.together("the Gram matrix"):
            found, first = torch.zeros_like(out), sum(lengths[0][: self.ranks.rank])
            own = found[first : first + lengths[0][self.ranks.rank]]
            for name, other in of_all.items():
                add_products(own, rows.outer[name], other, first if len(sides) == 1 else None)
        found = self.ranks.total(found)
        return out + (found.triu() + found.triu(1).T if len(sides) == 1 else found)

    def combination(self, coefficients: Tensor, rows: Rows) -> Tensor:
        """Return ``coefficients.T @ rows`` (K, P), of coefficients (M, K) and rows of which each rank has its share.

        Each slice is computed in float64. If directions are spread over the ranks, those of this rank are returned.
        """
        # Spilled rows may be coarser than the weights, whose precision orthonormal directions need.
        dtype = torch.promote_types(torch.promote_types(rows.values.dtype, self.dtype), torch.float32)
        rank, mine = coefficients.shape[1], self.ranks.share(coefficients)
        kept = range(rank)[self.ranks.turns() if self.sharded else slice(None)]
        out = coefficients.new_empty(len(kept), self.n_weights, dtype=dtype)
        with self.ranks.lockstep("the directions") as between:
            for ks, columns, compute in self._pieces(rows, mine, len(coefficients)):
                product = coefficients.new_zeros(len(ks), columns.stop - columns.start)
                with between():
                    product = compute()
                total = self.ranks.total(product)
                own = [k for k in ks if k in kept]
                with between():
                    if own:
                        place = kept.index(own[0])
                        out[place : place + len(own), columns] = total[own[0] - ks.start :: kept.step]
        return out

    def _pieces(
        self, rows: Rows, mine: Tensor, size: int
    ) -> Iterator[tuple[range, slice, Callable[[], Tensor]]]:
        """Yield parts of the combinations of M rows: which directions, which columns, and what computes them."""
        rank, width, start, at = mine.shape[1], _slice_width(size), 0, 0
        # One sum over the ranks holds several slices.
        block = width * max(1, SUMMED // (rank * width))
        for is_outer, names in groupby(self.sizes, self.matrices.__contains__):
            if is_outer:
                for name in names:
                    columns, outer = slice(start, start + self.sizes[name]), rows.outer.get(name)
                    if outer is not None:  # as it is where columns are looked at alone
                        yield from self._pieces_of_matrix(self.matrices[name], outer, columns, mine, size)
                    start = columns.stop
                continue
            n = sum(self.sizes[k] for k in names)
            for a in range(0, n, block):
                part = rows.values[:, at + a : min(at + a + block, at + n)]
                columns = slice(start + a, start + a + part.shape[1])
                yield range(rank), columns, partial(_combined, mine, part, width)
            start, at = start + n, at + n

    @staticmethod
    def _pieces_of_matrix(
        use: Product, outer: Outer, columns: slice, mine: Tensor, size: int
    ) -> Iterator[tuple[range, slice, Callable[[], Tensor]]]:
        """Yield some directions at a time."""
        rank, step = mine.shape[1], max(1, SUMMED // (use.shape[2] * max(use.shape[3], size)))
        for a in range(0, rank, step):
            ks = range(a, min(a + step, rank))
            yield ks, columns, partial(combination, mine[:, a : ks.stop], outer, use)


def _combined(coefficients: Tensor, values: Tensor, width: int) -> Tensor:
    pieces = (p.to(coefficients.device).double() for p in values.split(width, 1))
    return torch.cat([coefficients.T @ p for p in pieces], 1)


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
