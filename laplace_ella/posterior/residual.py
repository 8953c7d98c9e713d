r"""The residual, which the basis leaves out: the prior variance :math:`\delta^{-1} J (I - V V^T) J^T` of the outputs.

Far from the landmarks the features vanish, and with them the variance, where exact
linearised Laplace returns to the prior. Two ways to put that back, for a scalar prior:
exactly, from all C rows of the Jacobian of each input, or isotropically, from a few random
tangents. Source: docs/math.md, section "Residual".
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Input, Raw, batch_size, single_input
from ..data.hashing import TANGENT, derived_seed, normal_like
from ..data.landmarks import Landmarks
from ..data.progress import no_progress
from ..network.calls import DivergedError
from ..network.checks import check_finite_features
from ..network.engine import Engine
from ..network.functional import Weights
from ..network.safety import exclusively, safely
from ..nystrom.basis import NystromBasis
from ..nystrom.gram import choose_rows
from ..nystrom.jacobian import from_rows, row_source
from ..nystrom.kernels import kernels_of_layers
from ..nystrom.rows import kernels as kernels_of_rows
from .gaussian import Linearised
from .kept import Memory


class Residual:
    """What outputs get for the directions outside the span, which here is nothing.

    Attributes
    ----------
    name : str
        The name that users pass.
    adds : bool
        Whether there is a residual variance.
    in_weights : bool
        Whether weights and functions are drawn outside the span too.
    """

    name = "none"
    adds = False
    in_weights = False

    @property
    def of_shares(self) -> Residual:
        """The residual by which shares of gradients outside the span are estimated."""
        return RESIDUALS["isotropic"]

    def check(self, prior_precision: Any, enable_backprop: bool) -> None:
        """Require a prior, and a kind of prediction, that this residual works with.

        Raises
        ------
        ValueError
        """
        if self.adds and isinstance(prior_precision, Tensor) and prior_precision.numel() != 1:
            raise ValueError(
                f"residual={self.name!r} needs a scalar prior_precision, as the part of J J^T outside the span is known "
                f"without its weights; got {prior_precision.numel()} values. Use residual='none', or one value."
            )

    def numbers_per_output(self, n_outputs: int) -> int:
        """Return how many numbers of each output :meth:`look` keeps beside the features."""
        return 0

    def work(self, n: int, n_coordinates: int) -> tuple[int, int]:
        """Return how many tangents :meth:`look` pushes, and how many gradients of an input it computes.

        Parameters
        ----------
        n : int
            How many random tangents the isotropic residual is made from.
        n_coordinates : int
            How many outputs an input has at all its positions.
        """
        return 0, 0

    def variance(self, residual_scale: Any, prior_precision: Tensor) -> Any:
        r"""Return :math:`\rho / \delta`, the variance of each weight outside the span."""
        return residual_scale / prior_precision.double().reshape(()) if self.adds else 0.0

    def prepare(self, engine: Engine, basis: NystromBasis, memory: Memory, n: int, seed: int) -> Any:
        """Return what all inputs need; ranks that share the directions work it out before the features."""

    def look(
        self, engine: Engine, x: Raw | Input, phi: Tensor, f: Tensor, prepared: Any, enable_backprop: bool
    ) -> Linearised:
        """Return what is known of the model at inputs, whose features (B, C, K) and outputs (B, C) are given."""
        return Linearised(f, phi)


class Isotropic(Residual):
    """The same variance for all outputs of an input, from n random tangents."""

    name = "isotropic"
    adds = True

    def work(self, n: int, n_coordinates: int) -> tuple[int, int]:
        """Return the n tangents."""
        return n, 0

    def prepare(self, engine: Engine, basis: NystromBasis, memory: Memory, n: int, seed: int) -> Any:
        """Return n tangents (n, *shape), and their overlap (K, n) with the directions; the same at every call."""
        return tangents(engine, basis, memory, n, seed)

    def look(
        self, engine: Engine, x: Raw | Input, phi: Tensor, f: Tensor, prepared: Any, enable_backprop: bool
    ) -> Linearised:
        """Push the tangents too."""
        pushed, _ = engine.push(x, prepared[0], enable_backprop)
        check_finite_features(pushed, f, "the inputs given")
        return Linearised(f, phi, pushed=pushed, overlap=prepared[1])


class Exact(Residual):
    """What exact linearised Laplace gives outputs, from C gradients of each input."""

    name = "exact"
    adds = True
    in_weights = True

    @property
    def of_shares(self) -> Residual:
        """The exact residual itself, whose shares are exact."""
        return self

    def check(self, prior_precision: Any, enable_backprop: bool) -> None:
        """Require a scalar prior, and no graph."""
        super().check(prior_precision, enable_backprop)
        if enable_backprop:
            raise ValueError(
                "residual='exact' computes rows of the Jacobian without a graph and does not work with "
                "enable_backprop=True. Use residual='isotropic'."
            )

    def numbers_per_output(self, n_outputs: int) -> int:
        """Return C: a row of the kernel."""
        return n_outputs

    def work(self, n: int, n_coordinates: int) -> tuple[int, int]:
        """Return a gradient for each output."""
        return 0, n_coordinates

    def look(
        self, engine: Engine, x: Raw | Input, phi: Tensor, f: Tensor, prepared: Any, enable_backprop: bool
    ) -> Linearised:
        """Compute the kernel of each input too."""
        empty = f.new_zeros(0, f.shape[-1], f.shape[-1], dtype=torch.float64)
        return Linearised(f, phi, kernel=kernels(engine, x) if len(f) else empty)


RESIDUALS: dict[str, Residual] = {kind.name: kind() for kind in (Residual, Isotropic, Exact)}


@exclusively
@torch.inference_mode(False)  # they are kept, and may meet a graph later
def tangents(
    engine: Engine, basis: NystromBasis, memory: Memory, n: int, seed: int
) -> tuple[Weights, Tensor]:
    """Return n random tangents (n, *shape), and their overlap (K, n) with the directions; drawn once."""

    def draw() -> tuple[Weights, Tensor]:
        drawn = normal_like(engine.function.weights(), n, derived_seed(seed, TANGENT))
        return drawn, basis.overlap(drawn)

    return memory("tangents", draw, (seed, n), basis.directions.values())


def kernels(engine: Engine, x: Raw | Input) -> Tensor:
    """Compute :math:`J J^T` (B L, C, C) of each input and position, float64.

    Notes
    -----
    Cost: about 2 + 2C forward passes for each input layer by layer, or 5C where the model does not work for that. What does not
    fit the memory budget is computed a few inputs at a time; rows of a single input that do not fit, again.
    """
    x = engine.inputs(x)
    return safely(engine.module, lambda: _kernels(engine, x))


def _kernels(engine: Engine, x: Input) -> Tensor:
    with suppress(DivergedError):
        found = kernels_of_layers(engine, engine.to_model(x))
        if found is not None:
            return found
    return kernels_from_rows(engine, x)


def kernels_from_rows(engine: Engine, x: Input) -> Tensor:
    """Compute what :func:`kernels` does from rows of P numbers; inside ``safely``."""
    facts, budget = engine.facts(engine.to_model(x)), engine.budget()
    n_coordinates, n_outputs = facts.n_coordinates, facts.n_outputs
    pairs = _all_pairs(x, n_coordinates)
    source = row_source(engine, pairs, by_layer=False)
    inputs_at_once = budget // 4 // (source.row_bytes * n_coordinates)
    if not inputs_at_once:  # not even the rows of one input fit
        groups = [slice(a, a + n_outputs) for a in range(0, len(pairs), n_outputs)]
        parts = [Landmarks(pairs.inputs[g], pairs.outputs[g]) for g in groups]
        sources = [row_source(engine, part, by_layer=False) for part in parts]
        return torch.stack([choose_rows(s, budget).gram(no_progress) for s in sources])
    step = inputs_at_once * n_coordinates
    blocks = [range(a, min(a + step, len(pairs))) for a in range(0, len(pairs), step)]
    return torch.cat([kernels_of_rows(source(list(block)).values, n_outputs) for block in blocks])


def joint_kernel(engine: Engine, x: Raw | Input) -> Tensor:
    """Compute :math:`J J^T` (B L C, B L C) of all inputs together, float64; see :func:`kernels`."""
    x = engine.inputs(x)
    pairs = _all_pairs(x, engine.facts(engine.to_model(x)).n_coordinates)
    budget = engine.budget()
    return from_rows(engine, pairs, lambda source: choose_rows(source, budget).gram(no_progress))


def _all_pairs(x: Input, n_coordinates: int) -> Landmarks:
    """Return every input with every output, input by input."""
    size = batch_size(x)
    inputs = [row for row in (single_input(x, i) for i in range(size)) for _ in range(n_coordinates)]
    return Landmarks(inputs, torch.arange(n_coordinates, dtype=torch.int64, device="cpu").repeat(size))
