r"""What is known of the model at inputs, once there is a fit: features, residual, and the Gaussian they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data import validation
from ..data.batches import Input
from ..data.hashing import TANGENT, derived_seed, normal_like
from ..network.functional import Weights
from ..network.safety import exclusively
from .consistency import Consistent, of_one_moment
from .gaussian import Linearised, Outputs


class Linearisation(Consistent):
    """The linearised network of an estimator, and its posterior over outputs.

    A mixin: :class:`laplace_ella.ELLALaplace` supplies what is declared here.
    """

    likelihood: str
    seed: int
    enable_backprop: bool
    logit_scale: Any  # float
    residual: str
    residual_samples: int
    residual_variance: Any  # float
    basis: Any  # NystromBasis
    posterior_scale: Any  # Tensor (K, K)
    _device: Any
    _dtype: Any
    _check_H_init: Callable[[], None]

    @of_one_moment
    def features(self, x: Input) -> tuple[Tensor, Tensor]:
        r"""Compute :math:`\phi(x) = J(x) V` and f(x).

        Returns
        -------
        phi, f : Tensor (B, C, K), Tensor (B, C)
            For a model with outputs (B, ..., C), positions are flattened into the batch, input by input.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If inputs or features are not finite.

        Notes
        -----
        Cost: at least 1 + 2K forward passes a row.
        """
        self._check_H_init()
        with self.basis.ranks.together("the inputs of a prediction"):
            validation.check_finite_input(x)
        with self.basis.ranks.together("the features of a prediction"):
            with validation.NamingShape(x):
                phi, f = self.backend.features(x, self.basis, self.enable_backprop)
            validation.check_finite_features(phi, f, "the inputs given")
        return phi, f

    def _attend(self, residual: str) -> None:
        """Take part in the predictions of ranks that share the directions, without inputs of one's own."""
        if residual == "isotropic":
            self._residual_tangents()
        with self.basis.ranks.together("the inputs of a prediction"):
            pass
        with self.basis.ranks.together("the features of a prediction"):
            self.backend.answer_others(self.basis)

    def _linearised(self, x: Input, residual: str | None = None) -> Linearised:
        """Compute what a prediction needs: features, and what the residual is made of."""
        residual = self.residual if residual is None else residual
        validation.check_residual(residual, None, self.enable_backprop)
        # Before the features: ranks that share the directions work out what all need first.
        tangents = self._residual_tangents()[0] if residual == "isotropic" else None
        phi, f = self.features(x)
        if tangents is not None:
            pushed, _ = self.backend.push(x, tangents, self.enable_backprop)
            validation.check_finite_features(pushed, f, "the inputs given")
            return Linearised(f, phi, pushed=pushed)
        if residual == "exact":
            empty = f.new_zeros(0, f.shape[-1], f.shape[-1], dtype=torch.float64)
            return Linearised(f, phi, gram=self.backend.output_grams(x) if len(f) else empty)
        return Linearised(f, phi)

    @exclusively
    def _residual_tangents(self) -> tuple[Weights, Tensor]:
        """Return S tangents (S, *shape), and their overlap (K, S) with the directions; the same at every call."""
        small, large = (self.seed, self.residual_samples), self.basis.directions.values()
        return self._cached("tangents", self._drawn_tangents, small, large)

    @torch.inference_mode(False)  # they are kept, and may meet a graph later
    def _drawn_tangents(self) -> tuple[Weights, Tensor]:
        seed = derived_seed(self.seed, TANGENT)
        tangents = normal_like(self.backend.engine.function.weights(), self.residual_samples, seed)
        return tangents, self.basis.overlap(tangents)

    def _outputs(self, linearised: Linearised) -> Outputs:
        """Return the Gaussian that the current posterior makes of the outputs."""
        return linearised.outputs(
            self.posterior_scale,
            self.logit_scale,
            self.residual_variance,
            None if linearised.pushed is None else self._residual_tangents()[1],
        )
