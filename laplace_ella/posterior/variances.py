r"""Where the variance of the outputs comes from: from ELLA, or from nowhere, a constant or the last layer's inputs.

The last three need no features, so that a prediction costs a forward pass (with the last layer two). They are what
:meth:`laplace_ella.ELLALaplace.optimize_hyperparameters` compares ELLA with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .gaussian import Linearised, Outputs
from .setting import Setting


def _of_last_layer(seen: Linearised) -> Tensor:
    assert seen.norms is not None
    return seen.norms + 1


# Linearised model -> v (B,), of which the outputs' variance is T v; "ella" stands for the covariance of ELLA.
VARIANCES: dict[str, Callable[[Linearised], Tensor] | None] = {
    "ella": None,
    "none": lambda seen: seen.f.new_zeros(len(seen.f)),
    "constant": lambda seen: seen.f.new_ones(len(seen.f)),
    "last_layer": _of_last_layer,
}

IN_WORDS = {
    "ella": "the variance in the span of the basis",
    "none": "no variance",
    "constant": "a constant variance",
    "last_layer": "the variance from the last layer's inputs",
}

# Those whose size T is: the posterior of the weights, and its evidence, are then those at T = 1.
WITH_SIZE = ("constant", "last_layer")


def simple_outputs(seen: Linearised, setting: Setting, variance: Callable[[Linearised], Tensor]) -> Outputs:
    """Return a Gaussian over the outputs with variance T v of all of an input's, and without features.

    Of all inputs together it is that of random biases of the outputs, whose size differs from input to input.
    """
    dtype = torch.promote_types(seen.f.dtype, torch.float32)
    v = variance(seen).to(seen.f.device, dtype)[:, None]
    deviation = None if not v.requires_grad and not v.any() else (setting.temperature * v) ** 0.5
    return Outputs(
        setting.scaled(seen.f.to(dtype)), seen.f.new_zeros(*seen.f.shape, 0, dtype=dtype), deviation
    )
