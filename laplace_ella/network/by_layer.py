r"""Gradients of single inputs, layer by layer: as outer products, where these are fewer numbers than a gradient.

A matrix with :math:`y_t = W a_t` at T positions of an input has the gradient :math:`\sum_t g_t a_t^T`, with cotangents
:math:`g_t` of the layer's output. Its inner product with that of another input is
:math:`\sum_{ts} (g_t \cdot g'_s)(a_t \cdot a'_s)`: where inputs have no positions (T = 1), the product of two
numbers, so that no gradient of O J numbers is ever written.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.batches import Input, batch_size, each_cut
from .calls import DivergedError
from .contraction import ContractedModel
from .functional import Weights, first_weight
from .gradients import gradient_rows, looped_rows
from .uses import Product, Use


@dataclass(frozen=True)
class Outer:
    r"""Gradients :math:`\sum_t g_t a_t^T` (O, J) of a matrix, which are left as they are.

    Attributes
    ----------
    left : Tensor (B, n, T, O)
        g, for n cotangents of each input.
    right : Tensor (B, T, J)
        a
    """

    left: Tensor
    right: Tensor


Gradients = Tensor | Outer
# Matrices whose gradients are left as outer products, by their names.
Matrices = Mapping[str, Product]


def outer_matrices(model: ContractedModel) -> dict[str, Product]:
    """Return the matrices of which outer products are multiplied with fewer operations than gradients are.

    That is where :math:`T^2 (O + J)` is at most O J; memory is saved there too. They enter one call, as they are.
    """
    uses, entangled = Counter(use.slot for use in model.uses), model.sources_of_derived | model.uncovered
    found = small_outer_products(model)
    return {k: use for k, use in found.items() if uses[k] == 1 and k in model.names - entangled}


def small_outer_products(model: ContractedModel) -> dict[str, Product]:
    """Return the matrices, derived ones too, of which outer products are multiplied with fewer operations than gradients."""

    def is_small(t: int, groups: int, o: int, j: int) -> bool:
        return groups == 1 and t * t * (o + j) <= o * j

    return {use.slot: use for use in model.uses if isinstance(use, Product) and is_small(*use.shape)}


def outer_numbers(matrices: Matrices) -> tuple[int, int, int]:
    """Return how many numbers gradients of matrices have, how many their outer products, and what a product of two takes."""
    shapes = [use.shape for use in matrices.values()]
    return (
        sum(o * j for _, _, o, j in shapes),
        sum(t * (o + j) for t, _, o, j in shapes),
        sum(t * t * (o + j) for t, _, o, j in shapes),
    )


def numbers_at_once(model: ContractedModel) -> int:
    """Return how many numbers of one output's gradient are there at once at most, besides outer products."""
    ready, waiting = model.ready(), {*model.record.derived, *model.sources_of_derived, *model.uncovered}
    alone = {use.slot for use in model.uses} - waiting - outer_matrices(model).keys()
    return sum(ready[k].numel() for k in waiting) + max((ready[k].numel() for k in alone), default=0)


def _visit(
    model: ContractedModel,
    x: Input,
    cotangents: Callable[[Tensor], Tensor] | None,
    matrices: Collection[str],
    act: Callable[[str, Gradients], None],
) -> None:
    """Hand the gradients (B, n, *shape) of each covered weight to an action, as soon as they are complete.

    Parameters
    ----------
    cotangents : callable, optional
        f (B, L C) -> (B, n, L C); by default, unit vectors of the L C outputs.
    matrices : collection of str
        Those whose gradients come as outer products.

    Raises
    ------
    DivergedError
        If the pass does not follow the record.
    """
    ready, expected, sums = model.ready(), Counter(use.slot for use in model.uses), Weights()
    waiting = model.sources_of_derived  # for what comes from derived tensors

    def add(use: Use, g: Tensor) -> None:
        slot = use.slot
        if slot in model.uncovered_slots:
            return
        if isinstance(use, Product) and slot in matrices:
            act(slot, Outer(use.cotangent(g)[..., 0, :].transpose(0, 1), use.operand()[..., 0, :]))
            return
        found = use.gradients(g)
        found = found.reshape(*found.shape[:2], *ready[slot].shape)
        sums[slot] = sums[slot] + found if slot in sums else found
        expected[slot] -= 1
        if not expected[slot] and slot in model.names and slot not in waiting:
            act(slot, sums.pop(slot))

    model.visit(ready, x, cotangents, add)
    for name, found in model.pulled_back(sums).items():
        act(name, found)


def _of_uncovered(model: ContractedModel, x: Input, outputs: Tensor) -> Weights:
    """Return the gradients (B, *shape) of weights that no rule knows, by reverse mode for these alone."""
    if not model.uncovered:
        return {}
    own = {k: w for k, w in model.model.weights().items() if k in model.uncovered}
    return (looped_rows if model.one_by_one else gradient_rows)(model.model, own, x, outputs)


def rows_by_layer(
    model: ContractedModel, x: Input, outputs: Tensor, matrices: Matrices
) -> dict[str, Gradients]:
    """Compute the gradients of one output of each input.

    Parameters
    ----------
    x : input of B inputs
    outputs : LongTensor (B,)
    matrices : dict of Product
        The matrices whose gradients are to be outer products.

    Returns
    -------
    dict of Tensor (B, *shape) or Outer
        Outer products with n = 1.

    Raises
    ------
    DivergedError
        If the pass does not follow the record, or an input has more positions than the products in ``matrices``.

    Notes
    -----
    Cost: two forward passes, and for other weights than these matrices a third. Memory: the activations of B inputs.
    """
    own = outer_matrices(model)
    if any(k not in own or own[k].shape[0] > use.shape[0] for k, use in matrices.items()):
        raise DivergedError
    found: dict[str, Gradients] = dict(_of_uncovered(model, x, outputs))

    def act(name: str, gradients: Gradients) -> None:
        if isinstance(gradients, Tensor):
            found[name] = gradients[:, 0]
            return
        more = matrices[name].shape[0] - gradients.right.shape[1]  # shorter inputs have fewer positions
        if more < 0:  # of inputs of one shape, some have more than those that were recorded
            raise DivergedError
        found[name] = Outer(F.pad(gradients.left, (0, 0, 0, more)), F.pad(gradients.right, (0, 0, 0, more)))

    def units(f: Tensor) -> Tensor:
        return F.one_hot(outputs, f.shape[1]).to(f)[:, None]

    _visit(model, x, units, matrices, act)
    return {
        k: found[k] if k in found else _nothing(k, w, outputs, matrices) for k, w in model.weights().items()
    }


def _nothing(name: str, weight: Tensor, outputs: Tensor, matrices: Matrices) -> Gradients:
    """Return the gradients of a weight that the outputs do not depend on."""
    if name not in matrices:
        return weight.new_zeros(len(outputs), *weight.shape)
    t, _, o, j = matrices[name].shape
    return Outer(weight.new_zeros(len(outputs), 1, t, o), weight.new_zeros(len(outputs), t, j))


def kernels_by_layer(model: ContractedModel, x: Input, positions: int, n_outputs: int) -> Tensor:
    """Compute :math:`J J^T` (B, L, C, C) of each input and each of L positions, float64, from L C backward passes.

    Raises
    ------
    DivergedError
        If the pass does not follow the record.

    Notes
    -----
    Cost: 1 + L C forward passes with respect to activations, and for weights with positions L C for their gradients,
    which are multiplied and let go layer by layer.
    """
    size, n, device = batch_size(x), positions * n_outputs, first_weight(model.module).device
    total = torch.zeros(size, positions, n_outputs, n_outputs, dtype=torch.float64, device=device)

    def act(name: str, gradients: Gradients) -> None:
        found = _kernels(gradients, n_outputs)
        if found.shape != total.shape:  # of inputs of one shape, these have another number of positions
            raise DivergedError
        total.add_(found)

    _visit(model, x, None, outer_matrices(model), act)
    repeated = each_cut(x, lambda t: t.repeat_interleave(n, 0))
    outputs = torch.arange(n, dtype=torch.int64, device=device).repeat(size)
    for name, rows in _of_uncovered(model, repeated, outputs).items():
        act(name, rows.unflatten(0, (size, n)))
    return total


def _kernels(gradients: Gradients, n_outputs: int) -> Tensor:
    """Return the inner products (B, L, C, C) of gradients, float64."""
    if isinstance(gradients, Tensor):
        (size, n), numbers = gradients.shape[:2], math.prod(gradients.shape[2:])
        rows = gradients.reshape(size, n // n_outputs, n_outputs, numbers).double()
        return rows @ rows.mT
    left = gradients.left.double().unflatten(1, (-1, n_outputs))  # (B, L, C, T, O)
    right, shape = gradients.right.double(), left.shape[2:4]
    of_left = left.flatten(2, 3) @ left.flatten(2, 3).mT  # (B, L, C T, C T)
    found = of_left.unflatten(3, shape).unflatten(2, shape)
    return torch.einsum("blctds,bts->blcd", found, right @ right.mT)
