r"""How the outputs of a model are read, and given back as the model has them.

Everything else sees outputs (B, ..., C): a tensor, with the batch first and the channels (classes, or numbers of a
regression) last. What networks return is brought into this form here, and what is made of it for users into the form of
their network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..data.checks import shown

# What the channel axis may be. None: the last, where nothing else was said or found out.
CHANNEL_AXES = (None, 1, -1)
# The entries of a mapping that are the outputs: of Hugging Face's models, and of torchvision's segmentation networks.
KEYS = ("logits", "out")


def check_channel_axis(value: Any) -> int | None:
    """Require one of :data:`CHANNEL_AXES`, and return it."""
    if value is None or (type(value) is int and value in CHANNEL_AXES):
        return value
    raise ValueError(
        "channel_axis must be 1, for outputs (batch, classes, ...) as nn.CrossEntropyLoss takes them, -1, for outputs (batch, "
        f"..., classes), or None, to find out from the targets which of the two it is; got {value!r}."
    )


def tensor_of(out: Any) -> Any:
    """Return the tensor among what a model returned, or what it returned if there is none.

    That is its ``.logits``; the entry "logits" or "out" of a mapping, or its only tensor; the first tensor of a sequence that
    has an axis, so that neither a loss before it nor caches and hidden states after it matter.
    """
    if isinstance(out, Tensor):
        return out
    found = getattr(out, "logits", None)
    if found is not None:
        return found
    if isinstance(out, Mapping):
        tensors = [v for v in out.values() if isinstance(v, Tensor)]
        named = [out[key] for key in KEYS if isinstance(out.get(key), Tensor)]
        return named[0] if named else tensors[0] if len(tensors) == 1 else out
    if isinstance(out, (tuple, list)):
        return next((v for v in out if isinstance(v, Tensor) and v.ndim), out)
    return out


def checked_tensor(out: Any, size: int) -> Tensor:
    """Return the tensor (B, ...) among what a model returned for B inputs; B = 0: it is not known how many.

    Raises
    ------
    ValueError
        If there is none, if it has not one entry for each input, or if its entries are no floating-point numbers.
    """
    f = tensor_of(out)
    # One axis may be the outputs of an input whose batch axis was squeezed away.
    if not isinstance(f, Tensor) or not f.ndim or (f.ndim == 1 and size not in (0, len(f))):
        raise ValueError(
            "The model must return a tensor of shape (batch,), (batch, outputs), (batch, ..., outputs) or (batch, outputs, ...), an "
            "object with such `.logits`, a mapping with such an entry 'logits' or 'out' or a single tensor, or a sequence "
            f"that begins with one; got {_described(f)}. Wrap the model so that its forward returns one; a squeeze() without an "
            "axis drops the batch axis of a single input."
        )
    if not f.is_floating_point():
        raise ValueError(
            f"The model's outputs must be floating-point numbers that its weights change; got {f.dtype}. Return logits "
            "or means instead of what is made of them (argmax, rounding)."
        )
    return f


def _described(found: Any) -> str:
    if isinstance(found, Mapping):
        return f"{type(found).__name__} with the keys {sorted(map(str, found))}"
    return f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else shown(found)


def channels_last(f: Tensor, channel_axis: int | None) -> Tensor:
    """Return outputs (B, ..., C) of outputs as a network has them: (B,), (B, C), (B, ..., C) or (B, C, ...)."""
    if f.ndim == 1:
        return f[:, None]
    return f.movedim(1, -1) if channel_axis == 1 and f.ndim > 2 else f


@dataclass(frozen=True)
class Axes:
    """The axes of a model's outputs for inputs of one shape.

    Attributes
    ----------
    positions : tuple of int
        Those between batch and channels: () for one prediction per input.
    channel_axis : int or None
        1 or -1, where the channels are. None: last, and what is given to users has a row for each position.
    bare : bool
        Whether there is no channel axis: outputs are (B,).
    """

    positions: tuple[int, ...] = ()
    channel_axis: int | None = None
    bare: bool = False

    def targets(self, y: Tensor) -> Tensor:
        """Return targets with their channels last, if they have channels: class indices have none."""
        if self.bare and y.ndim == 1:
            return y[:, None]
        second = self.channel_axis == 1 and self.positions and y.ndim == 2 + len(self.positions)
        return y.movedim(1, -1) if second else y

    def laid_out(self, values: Tensor, channels: int = 1, lead: int = 0) -> Tensor:
        """Give values of positions the axes that the network's outputs have.

        Parameters
        ----------
        values : Tensor (*lead, B L, *channels)
        channels : int
            How many axes of channels there are: 0 for a number, 2 for a matrix, which takes the place of the one that the outputs have.
        lead : int
            How many axes come before the batch.

        Returns
        -------
        Tensor (*lead, B, *positions, *channels), or with the channels before the positions
        """
        if self.bare:
            return values.flatten(lead) if channels else values
        if self.channel_axis is None or not self.positions:
            return values
        values = values.unflatten(lead, (values.shape[lead] // math.prod(self.positions), *self.positions))
        if self.channel_axis == -1:
            return values
        last = range(values.ndim - channels, values.ndim)
        return values.movedim(tuple(last), tuple(range(lead + 1, lead + 1 + channels)))
