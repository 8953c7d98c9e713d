r"""What the basis leaves out: the prior variance :math:`\delta^{-1} J (I - V V^T) J^T` of the outputs.

Far from the landmarks the features vanish, and with them the variance, where exact
linearised Laplace returns to the prior. Two ways to put that back, for a scalar prior:
exactly, from all C rows of an input's Jacobian, or isotropically, from a few random
tangents. Source: docs/math.md, section "Residual".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..data.batches import Input, batch_size, single_row
from ..data.landmarks import Landmarks
from ..data.progress import no_progress
from ..nystrom.gram import choose_rows
from ..nystrom.rows import RowSource, block_grams
from .gaussian import Linearised, without_autocast

RESIDUALS = ("none", "isotropic", "exact")


def output_grams(
    x: Input,
    n_outputs: int,
    n_coordinates: int,
    row_source: Callable[[Landmarks], RowSource],
    budget: int,
) -> Tensor:
    """Compute :math:`J J^T` (B L, C, C) of each input and position, float64.

    Parameters
    ----------
    x : input of B rows
    n_outputs, n_coordinates : int
        C, and L C.
    row_source : callable
        Landmarks -> their gradient rows.
    budget : int
        Bytes that rows may take; more are computed again, see :func:`laplace_ella.nystrom.gram.choose_rows`.

    Notes
    -----
    Cost: about 5C forward passes an input. Inside ``safely``.
    """
    size = batch_size(x)
    source = row_source(_all_pairs(x, n_coordinates))
    row_bytes = sum(source.sizes.values()) * source.dtype.itemsize
    at_once = budget // 4 // (row_bytes * n_coordinates)
    if not at_once:  # not even the rows of one input fit
        pairs = source.landmarks
        groups = [slice(a, a + n_outputs) for a in range(0, len(pairs), n_outputs)]
        parts = [Landmarks(pairs.inputs[g], pairs.outputs[g]) for g in groups]
        return torch.stack([choose_rows(row_source(part), budget).gram(no_progress) for part in parts])
    return torch.cat(
        [
            block_grams(
                source(list(range(a * n_coordinates, min(a + at_once, size) * n_coordinates))), n_outputs
            )
            for a in range(0, size, at_once)
        ]
    )


def joint_gram(
    x: Input, n_coordinates: int, row_source: Callable[[Landmarks], RowSource], budget: int
) -> Tensor:
    """Compute :math:`J J^T` (B L C, B L C) of all inputs, float64; see :func:`output_grams`."""
    return choose_rows(row_source(_all_pairs(x, n_coordinates)), budget).gram(no_progress)


def _all_pairs(x: Input, n_coordinates: int) -> Landmarks:
    """Return every input with every output, input by input."""
    size = batch_size(x)
    inputs = [row for row in (single_row(x, i) for i in range(size)) for _ in range(n_coordinates)]
    return Landmarks(inputs, torch.arange(n_coordinates, dtype=torch.int64, device="cpu").repeat(size))


@without_autocast
def traces(linearised: Linearised, overlap: Tensor | None) -> tuple[Tensor, Tensor]:
    r"""Return the traces (B,) of :math:`J J^T` inside the span and outside of it, float64.

    The latter from ``gram`` if there is one, else estimated from the tangents.
    """
    inside = linearised.phi.double().square().sum((-1, -2))
    if linearised.gram is not None:
        trace = linearised.gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        outside = (trace - inside).clamp_min(0)
    else:
        assert overlap is not None
        n_outputs = linearised.f.shape[-1]
        outside = n_outputs * linearised.residual_vectors(overlap).double().square().sum(-1)
    return inside, outside


def residual_share(linearised: Linearised, overlap: Tensor | None) -> Tensor:
    r"""Return :math:`1 - |\phi|^2 / \operatorname{tr} J J^T` (B,), in [0, 1]."""
    inside, outside = traces(linearised, overlap)
    return outside / (inside + outside).clamp_min(torch.finfo(torch.float64).tiny)
