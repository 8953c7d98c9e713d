r"""From inputs to predictions: features, the Gaussian over outputs, a link."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data.batches import Input, NamingShape, Raw, check_finite_input
from ..network.checks import check_finite_features
from ..network.engine import Engine
from ..nystrom.jacobian import answer_others, features
from .checks import check_features
from .gaussian import Linearised, Outputs, positive_part, without_autocast
from .likelihoods import Likelihood, Prediction
from .links import LINKS, Noise
from .posterior import Posterior
from .residual import RESIDUALS, Residual, joint_kernel

Results = TypeVar("Results", bound="Tensor | tuple[Tensor, ...]")
Found = TypeVar("Found", Tensor, tuple[Tensor, Tensor], Prediction)


def checked_features(
    posterior: Posterior, engine: Engine, x: Raw | Input, enable_backprop: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Compute :math:`\phi(x) = J(x) V` (B, C, K) and f(x) (B, C) of finite inputs.

    Raises
    ------
    ValueError
        If inputs or features are not finite.
    """
    basis = posterior.basis
    with basis.ranks.together("the inputs of a prediction"):
        check_finite_input(x)
    with basis.ranks.together("the features of a prediction"):
        with NamingShape(x):
            phi, f = features(engine, basis, x, enable_backprop)
        check_finite_features(phi, f, "the inputs given")
    return phi, f


def linearise(
    posterior: Posterior,
    engine: Engine,
    x: Raw | Input,
    enable_backprop: bool = False,
    residual: Residual | None = None,
) -> Linearised:
    """Compute what a prediction needs: features, and what the residual is made of."""
    if residual is None and posterior.variance != "ella":
        return _without_features(posterior, engine, x, enable_backprop)
    seen = _with_features(posterior, engine, x, enable_backprop, residual or posterior.residual)
    if posterior.variance == "last_layer":
        return replace(seen, norms=engine.last_layer_norms(x))
    return seen


def _without_features(
    posterior: Posterior, engine: Engine, x: Raw | Input, enable_backprop: bool
) -> Linearised:
    """Run the model alone, and see what its last layer takes where the variance depends on that."""
    check_finite_input(x)
    with NamingShape(x):
        phi, f = engine.push(
            x, {k: v[:0] for k, v in posterior.fit.basis.directions.items()}, enable_backprop
        )
        norms = engine.last_layer_norms(x, enable_backprop) if posterior.variance == "last_layer" else None
    check_finite_features(phi, f, "the inputs given")
    return Linearised(f, phi, norms=norms)


def _with_features(
    posterior: Posterior, engine: Engine, x: Raw | Input, enable_backprop: bool, residual: Residual
) -> Linearised:
    residual.check(None, enable_backprop)
    prepared = _prepared(posterior, engine, residual)
    phi, f = checked_features(posterior, engine, x, enable_backprop)
    return residual.look(engine, x, phi, f, prepared, enable_backprop)


def attend(posterior: Posterior, engine: Engine, residual: Residual) -> None:
    """Take part in :func:`linearise` of ranks that share the directions, having no inputs of one's own."""
    _prepared(posterior, engine, residual)
    basis = posterior.basis
    with basis.ranks.together("the inputs of a prediction"):
        pass
    with basis.ranks.together("the features of a prediction"):
        answer_others(engine, basis)


def _prepared(posterior: Posterior, engine: Engine, residual: Residual) -> Any:
    of_tangents = posterior.shared, posterior.residual_samples, posterior.seed
    return residual.prepare(engine, posterior.basis, *of_tangents)


def numbers_per_output(posterior: Posterior) -> int:
    """Return how many numbers :func:`linearise` keeps of each output."""
    return posterior.rank + posterior.residual.numbers_per_output(posterior.fit.n_outputs)


def in_parts(
    posterior: Posterior, engine: Engine, x: Raw | Input, compute: Callable[[Any], Results]
) -> Results:
    """Apply a function to the inputs of a batch, to as many at a time as features may take memory for, and join its results.

    Parameters
    ----------
    compute : callable
        Inputs -> tensor (B L, ...), or tuple of such tensors.
    """
    if (
        posterior.variance != "ella" or posterior.fit.basis.sharded
    ):  # without features, or in step with other ranks
        return compute(x)
    check_finite_input(x)
    with NamingShape(x):
        parts = list(engine.bounded(x, numbers_per_output(posterior)))
    if len(parts) < 2:
        return compute(x)
    return joined([compute(part) for part in parts])


def joined(parts: list[Results]) -> Results:
    """Join results, tensors or tuples of them, along their first axis."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)  # type: ignore[arg-type, return-value]
    found = map(torch.cat, zip(*parts))
    return type(first)(*found) if hasattr(first, "_fields") else tuple(found)  # type: ignore[return-value]


@without_autocast
def predict(outputs: Outputs, likelihood: Likelihood, link: str, noise: Noise) -> Prediction:
    """Turn a Gaussian over outputs into a prediction.

    Returns
    -------
    Tensor (B, C), or pair of Tensor
        Probabilities; or mean (B, D) and covariance (B, D, D) of the targets, with ``noise.diagonal_output`` the
        variance (B, D).
    """
    if likelihood.has_probabilities:
        return LINKS[link].predict(outputs, likelihood, noise)
    mean, spread = moments(outputs, noise.diagonal_output)
    return likelihood.target_moments(mean, spread, mean.shape[-1])


def moments(outputs: Outputs, diagonal_output: bool = False) -> tuple[Tensor, Tensor]:
    """Return mean (B, C) and covariance (B, C, C), or variance (B, C)."""
    return outputs.mean, outputs.variance if diagonal_output else outputs.covariance()


def joint_moments(
    posterior: Posterior, engine: Engine, x: Raw | Input, enable_backprop: bool
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return mean (BC,) and covariance (BC, BC) of all inputs together, and the dtype of the model's outputs."""
    in_weights = posterior.in_weights
    seen = linearise(posterior, engine, x, enable_backprop, RESIDUALS["none"] if in_weights else None)
    outputs = posterior.outputs(seen)
    covariance = outputs.joint_covariance()
    if in_weights:
        flat_phi = seen.phi.flatten(0, 1).double()
        kernel = joint_kernel(engine, x) if len(flat_phi) else flat_phi.new_zeros(0, 0)
        covariance = covariance + posterior.residual_variance * positive_part(kernel - flat_phi @ flat_phi.T)
    return outputs.mean.flatten(), covariance, seen.f.dtype


def output_moments(
    posterior: Posterior,
    engine: Engine,
    x: Raw | Input,
    joint: bool = False,
    diagonal_output: bool = False,
    enable_backprop: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the outputs: of each input, or of all together, in the model's dtype."""
    mean, spread, dtype = _output_moments(posterior, engine, x, joint, diagonal_output, enable_backprop)
    return mean.to(dtype), spread.to(dtype)


def _output_moments(
    posterior: Posterior,
    engine: Engine,
    x: Raw | Input,
    joint: bool,
    diagonal_output: bool,
    enable_backprop: bool,
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return the moments of the outputs in their own precision, and the dtype of the model's outputs."""
    if joint:
        return joint_moments(posterior, engine, x, enable_backprop)
    seen = linearise(posterior, engine, x, enable_backprop)
    return *moments(posterior.outputs(seen), diagonal_output), seen.f.dtype


def target_moments(
    posterior: Posterior,
    engine: Engine,
    x: Raw | Input,
    likelihood: Likelihood,
    joint: bool = False,
    diagonal_output: bool = False,
    enable_backprop: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the targets: of each input, or of all together, in the model's dtype."""
    mean, spread, dtype = _output_moments(posterior, engine, x, joint, diagonal_output, enable_backprop)
    mean, spread = likelihood.target_moments(mean, spread, posterior.fit.n_outputs)
    return mean.to(dtype), spread.to(dtype)


def probabilities(
    posterior: Posterior,
    engine: Engine,
    x: Raw | Input,
    likelihood: Likelihood,
    link: str,
    noise: Noise,
    enable_backprop: bool = False,
) -> Tensor:
    """Return the probabilities (B, C) of inputs, in the model's dtype."""
    seen = linearise(posterior, engine, x, enable_backprop)
    found = joined([predict(posterior.outputs(rows), likelihood, link, noise) for rows in seen.blocks()])
    assert isinstance(found, Tensor)
    return found.to(seen.f.dtype)


def of_call(
    posterior: Posterior,
    engine: Engine,
    x: Raw | Input,
    likelihood: Likelihood,
    link: str,
    noise: Noise,
    joint: bool = False,
    enable_backprop: bool = False,
) -> Prediction:
    """Return what a call of an estimator does: probabilities, or moments of the targets where the likelihood has none."""

    def compute(part: Any) -> Prediction:
        if likelihood.has_probabilities:
            return probabilities(posterior, engine, part, likelihood, link, noise, enable_backprop)
        flags = joint, noise.diagonal_output, enable_backprop
        return target_moments(posterior, engine, part, likelihood, *flags)

    return compute(x) if joint else in_parts(posterior, engine, x, compute)


def as_network(engine: Engine, x: Raw | Input, found: Found, channels: int = 1, lead: int = 0) -> Found:
    """Give what was found for the positions of inputs the axes that the network's outputs have, if these are known.

    Parameters
    ----------
    found : Tensor (*lead, B L, *channels), or tuple
        Of a tuple, what has an axis more than the first has two axes of channels.
    channels, lead : int
        As in :meth:`laplace_ella.network.outputs.Axes.laid_out`.
    """
    if engine.channel_axis is None and not engine.function.bare:
        return found
    axes = engine.axes(x)
    if isinstance(found, Tensor):
        return axes.laid_out(found, channels, lead)
    return tuple(axes.laid_out(t, channels + t.ndim - found[0].ndim, lead) for t in found)  # type: ignore[return-value]


def of_features(posterior: Posterior, phi: Tensor) -> Outputs:
    """Return the Gaussian over outputs with given features (B, C, K), without the residual; its mean says nothing.

    Raises
    ------
    ValueError
        If these are no features of the posterior's basis.
    """
    check_features(phi, posterior.rank, posterior.setting.prior_precision.device)
    return Linearised(phi[..., 0], phi).outputs(posterior.scale)
