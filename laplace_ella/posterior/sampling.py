r"""Samples of weights and functions from the posterior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Input, NamingShape, Raw, check_finite_input
from ..data.checks import check_size
from ..network.engine import Engine
from ..network.functional import Weights, flat
from ..network.lookups import padding_rows
from .checks import check_finite_samples, check_generator
from .likelihoods import Likelihood, Prediction
from .posterior import Posterior
from .prediction import linearise
from .residual import RESIDUALS


@dataclass(frozen=True)
class Draws:
    """How many samples are drawn, and with which generator; None: torch's own."""

    n: int
    generator: torch.Generator | None = None

    @classmethod
    def checked(cls, n_samples: Any, generator: Any) -> Draws:
        """Return draws of a positive number of samples; raise ValueError on anything else."""
        check_size("n_samples", n_samples, optional=False)
        check_generator(generator)
        return cls(n_samples, generator)

    def normal(self, posterior: Posterior, *shape: int) -> Tensor:
        """Draw standard normal numbers (n, *shape), the same on ranks that share the directions."""
        like = posterior.setting.prior_precision
        device = like.device if self.generator is None else self.generator.device
        noise = torch.randn(self.n, *shape, generator=self.generator, device=device, dtype=like.dtype)
        # Ranks that share the directions have to draw the same weights.
        return posterior.fit.basis.ranks.of_first(noise.to(like.device))


def weight_offsets(posterior: Posterior, draws: Draws, fixed: Mapping[str, int] | None = None) -> Weights:
    r"""Draw offsets :math:`V z` (S, *shape) of the weights; with the exact residual, outside the span too.

    Except in one row of each of the weights that ``fixed`` names.
    """
    noise = draws.normal(posterior, posterior.rank)
    offsets = posterior.basis.combine(noise @ posterior.scale.to(noise.dtype).T)
    if not posterior.residual.in_weights:
        return offsets
    outside = _outside_offsets(posterior, draws)
    for name, row in (fixed or {}).items():
        if name in outside:
            outside[name][:, row] = 0
    return {k: v + outside[k] for k, v in offsets.items()}


def _outside_offsets(posterior: Posterior, draws: Draws) -> Weights:
    r"""Draw :math:`\sqrt{\rho / \delta} (I - V V^T) w` (S, *shape)."""
    basis, deviation = posterior.basis, posterior.residual_variance**0.5
    noise = {k: draws.normal(posterior, *v.shape[1:]) for k, v in basis.directions.items()}
    inside = basis.combine(basis.overlap(noise).T)
    return {k: deviation * (noise[k] - v).to(v.dtype) for k, v in inside.items()}


def sampled_weights(posterior: Posterior, engine: Engine, draws: Draws) -> Tensor:
    r"""Draw weights :math:`\theta^* + V z` (S, P), in the order of ``parameters()``; padding rows stay as they are."""
    offsets = weight_offsets(posterior, draws, padding_rows(engine.module))
    return posterior.fit.mean + torch.cat([flat(v) for v in offsets.values()], 1)


def sampled_functions(
    posterior: Posterior, engine: Engine, x: Raw | Input, draws: Draws, diagonal_output: bool, backprop: bool
) -> tuple[Tensor, torch.dtype]:
    """Draw functions (S, B, C) of the linearised network, in the precision of their moments.

    Parameters
    ----------
    diagonal_output : bool
        Whether outputs and inputs are drawn independently.

    Returns
    -------
    samples, dtype
        And the dtype of the model's outputs.
    """
    in_weights = posterior.in_weights and not diagonal_output
    seen = linearise(posterior, engine, x, backprop, RESIDUALS["none"] if in_weights else None)
    outputs, dtype = posterior.outputs(seen), seen.f.dtype
    if diagonal_output:
        return outputs.independent_samples(draws.normal(posterior, *outputs.mean.shape)), dtype
    noise, rest = draws.normal(posterior, outputs.psi.shape[-1]), None
    if outputs.isotropic is not None:
        rest = draws.normal(posterior, outputs.isotropic.shape[1], outputs.mean.shape[1])
    samples = outputs.functions(noise, rest)
    if in_weights:
        _add_outside(posterior, engine, samples, x, draws.generator)
    return samples, dtype


def _add_outside(
    posterior: Posterior, engine: Engine, samples: Tensor, x: Raw | Input, generator: torch.Generator | None
) -> None:
    r"""Add :math:`J (I - V V^T) w` to samples (S, B, C), as many weights at a time as fit."""
    n_weights = max(1, engine.budget() // (8 * engine.row_size()))
    for part in samples.split(posterior.fit.basis.ranks.least(n_weights, "samples of weights")):
        pushed, _ = engine.push(x, _outside_offsets(posterior, Draws(len(part), generator)))
        part += pushed.movedim(-1, 0)


def outputs_at(
    engine: Engine, offsets: Weights, x: Raw | Input, backprop: bool = False, **model_kwargs: Any
) -> Tensor:
    """Return the outputs (S, B, C) of the network itself at the weights plus each of S offsets.

    Raises
    ------
    ValueError
        If inputs or outputs are not finite.
    """
    check_finite_input(x)
    with NamingShape(x):
        samples = engine.forward_at(offsets, x, enable_backprop=backprop, **model_kwargs)
    check_finite_samples(samples)
    return samples


def averaged(samples: Tensor, likelihood: Likelihood) -> Prediction:
    """Average what networks with sampled weights predict, given their outputs (S, B, C)."""
    if likelihood.has_probabilities:
        return likelihood.inverse_link(samples).mean(0)
    mean, variance = likelihood.conditional_moments(samples)
    return mean.mean(0), mean.var(0) + variance.mean(0)


def scored(samples: Tensor, likelihood: Likelihood) -> Prediction:
    """Return what the likelihood's ``nll`` takes for the outputs (S, B, C) of networks with sampled weights."""
    if likelihood.has_probabilities:
        return averaged(samples, likelihood)
    return samples.mean(0), samples.var(0)


def check_enough(likelihood: Likelihood, n_samples: int) -> None:
    """Require two samples where a variance is estimated from them."""
    if not likelihood.has_probabilities and n_samples < 2:
        raise ValueError(f"A variance needs n_samples of at least 2 with pred_type='nn'; got {n_samples}.")
