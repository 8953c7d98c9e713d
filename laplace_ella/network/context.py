r"""What the rules of :mod:`laplace_ella.network.rules` are told of a call, and what they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .layouts import Layout
from .uses import Elementwise, Use


@dataclass(frozen=True)
class Context:
    """What a rule needs to know of a call.

    Attributes
    ----------
    slot : callable
        Tensor -> its name if it is a weight, or derived from one, along which directions exist; else None.
    layout : Layout
        Where inputs are in the output, and in what enters.
    """

    slot: Callable[[Any], str | None]
    layout: Layout

    def batch_first(self, g: Tensor) -> Tensor:
        """Bring cotangents (n, ...) into the order (n, B, ...)."""
        return self.layout.batch_first(g, 1)


class UnknownUseError(Exception):
    """A use of weights that no rule knows."""


# (context, args, kwargs) -> output, uses
Rule = Callable[..., tuple[Tensor, list[Use]]]


def bias_of(context: Context, slot: str, bias: Tensor, channel: int | None = None) -> Elementwise:
    """Return the use of a bias, which is added along the last axis, or along that of channels of ``channel`` more axes."""
    shape = tuple(bias.shape) if channel is None else (*bias.shape, *[1] * channel)
    return Elementwise(slot, shape, 1.0, context.batch_first)
