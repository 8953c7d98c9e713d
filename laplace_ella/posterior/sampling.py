r"""Samples of weights and functions from the posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..data import validation
from ..data.batches import Input
from ..network.functional import Weights, flat
from ..network.lookups import padding_rows
from . import gaussian as posterior
from .consistency import of_one_moment
from .likelihoods import LIKELIHOODS, Prediction
from .linearisation import Linearisation


class Sampling(Linearisation):
    """Draws of functions, of weights, and of networks at sampled weights; a mixin."""

    mean: Tensor  # (P,)

    def _noise(self, *shape: int, generator: torch.Generator | None) -> Tensor:
        validation.check_size("n_samples", shape[0], optional=False)
        device = self._device if generator is None else generator.device
        noise = torch.randn(*shape, generator=generator, device=device, dtype=self._dtype)
        # Ranks that share the directions have to draw the same weights.
        return self.basis.ranks.of_first(noise.to(self._device))

    def _coordinates(self, n_samples: int, generator: torch.Generator | None) -> Tensor:
        noise = self._noise(n_samples, self.basis.rank, generator=generator)
        return noise @ self.posterior_scale.to(noise.dtype).T

    def _weight_offsets(
        self, n_samples: int, generator: torch.Generator | None, fixed: Mapping[str, int] | None = None
    ) -> Weights:
        r"""Draw offsets :math:`V z` (S, *shape) of the weights; with the exact residual, outside the span too.

        Except in one row of each of the weights that ``fixed`` names.
        """
        offsets = self.basis.combine(self._coordinates(n_samples, generator))
        if self.residual != "exact":
            return offsets
        outside = self._outside_offsets(n_samples, generator)
        for name, row in (fixed or {}).items():
            if name in outside:
                outside[name][:, row] = 0
        return {k: v + outside[k] for k, v in offsets.items()}

    def _outside_offsets(self, n_samples: int, generator: torch.Generator | None) -> Weights:
        r"""Draw :math:`\sqrt{\rho / \delta} (I - V V^T) w` (S, *shape)."""
        noise = {
            k: self._noise(n_samples, *v.shape[1:], generator=generator)
            for k, v in self.basis.directions.items()
        }
        inside = self.basis.combine(self.basis.overlap(noise).T)
        return {k: self.residual_variance**0.5 * (noise[k] - v).to(v.dtype) for k, v in inside.items()}

    @of_one_moment
    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw weights :math:`\theta^* + V z` (S, P), in the order of ``parameters()``.

        With ``residual="exact"`` they leave the span, as those of exact linearised
        Laplace do; the isotropic residual is one of functions and leaves weights alone.
        Padding rows of embeddings stay as they are.
        """
        validation.check_size("n_samples", n_samples, optional=False)
        validation.check_generator(generator)
        offsets = self._weight_offsets(n_samples, generator, padding_rows(self.backend.model))
        return self.mean + torch.cat([flat(v) for v in offsets.values()], 1)

    @of_one_moment
    def functional_samples(
        self,
        x: Input,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw functions, evaluated at the inputs: (S, B, C).

        Each draw uses one noise vector for all inputs, in the K dimensions of the span and in
        those of the residual, so that a function is smooth, and two calls with equal
        generators agree. With the exact residual that noise has P dimensions.

        Parameters
        ----------
        x : Tensor or mapping
            B inputs.
        pred_type : {"glm", "nn"}
            Of the linearised network, or of networks with sampled weights.
        n_samples : int
            S.
        diagonal_output : bool
            Draw outputs and inputs independently instead (glm).
        generator : torch.Generator, optional
            Default: torch's own.

        Raises
        ------
        AttributeError, ValueError
            As for a call.
        """
        samples, dtype = self._functions(x, pred_type, n_samples, diagonal_output, generator)
        return samples.to(dtype)

    def _functions(
        self,
        x: Input,
        pred_type: str,
        n_samples: int,
        diagonal_output: bool,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, torch.dtype]:
        """Draw functions (S, B, C) in the precision of their moments; and the dtype of the model's outputs."""
        pred_type = validation.check_prediction(pred_type, "mc", n_samples, generator, None)
        validation.check_flag("diagonal_output", diagonal_output)
        self._check_H_init()
        if pred_type == "nn":
            samples = self._nn_functional_samples(x, n_samples, generator)
            return samples, samples.dtype
        in_weights = self.residual == "exact" and not diagonal_output
        linearised = self._linearised(x, "none" if in_weights else None)
        outputs, dtype = self._outputs(linearised), linearised.f.dtype
        if diagonal_output:
            noise = self._noise(n_samples, *outputs.mean.shape, generator=generator)
            return outputs.independent_samples(noise), dtype
        noise = self._noise(n_samples, outputs.psi.shape[-1], generator=generator)
        samples = posterior.functional_samples(outputs.mean, outputs.psi, noise)
        if outputs.isotropic is not None:
            shape = outputs.isotropic.shape[1], outputs.mean.shape[1]
            noise = self._noise(n_samples, *shape, generator=generator)
            samples = samples + torch.einsum("bd,sdc->sbc", outputs.isotropic, noise.to(outputs.isotropic))
        if in_weights:
            self._add_outside(samples, x, generator)
        return samples, dtype

    def _add_outside(self, samples: Tensor, x: Input, generator: torch.Generator | None) -> None:
        r"""Add :math:`J (I - V V^T) w` to samples (S, B, C), as many weights at a time as fit."""
        engine = self.backend.engine
        n_weights = max(1, engine.budget() // (8 * engine.row_size()))
        for part in samples.split(self.basis.ranks.least(n_weights, "samples of weights")):
            pushed, _ = self.backend.push(x, self._outside_offsets(len(part), generator))
            part += pushed.movedim(-1, 0)

    @of_one_moment
    def predictive_samples(
        self,
        x: Input,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw :meth:`functional_samples`, turned into probabilities where the likelihood has them: (S, B, C)."""
        samples, dtype = self._functions(x, pred_type, n_samples, diagonal_output, generator)
        inverse_link = LIKELIHOODS[self.likelihood].inverse_link
        if self.likelihood != "reward_modeling" and inverse_link is not None:
            samples = inverse_link(samples)  # before they are rounded: fp16 holds no logit above 65504
        return samples.to(dtype)

    def _nn_functional_samples(
        self,
        X: Input,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        return self._outputs_at(self._weight_offsets(n_samples, generator), X, **model_kwargs)

    def _outputs_at(self, offsets: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (S, B, C) at the weights plus each of S offsets."""
        validation.check_finite_input(x)
        with validation.NamingShape(x):
            samples = self.backend.forward_at(
                offsets, x, enable_backprop=self.enable_backprop, **model_kwargs
            )
        validation.check_finite_samples(samples)
        return samples

    def _nn_prediction(self, offsets: Weights, x: Input, likelihood: str, **model_kwargs: Any) -> Prediction:
        """Average what networks with sampled weights predict."""
        samples = self._outputs_at(offsets, x, **model_kwargs)
        inverse_link = LIKELIHOODS[likelihood].inverse_link
        if inverse_link is None:
            return samples.mean(0), samples.var(0)
        return inverse_link(samples).mean(0)
