r"""The one pass over the training data: loss, size, landmark inputs, curvature inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.batches import Input, NamingShape, batch_size, single_input
from ..data.hashing import CURVATURE_INPUT, hash_keys
from ..data.landmarks import BottomK, Entry, Scheme, offer_inputs, uniform
from ..data.loading import check_some
from ..data.packing import packed, unpacked
from ..data.pooling import pooled
from ..data.stream import Batch
from ..network.outputs import Axes
from ..parallel.ranks import Ranks
from ..posterior.likelihoods import Likelihood
from ..posterior.targets import (
    check_weights,
    checked_targets,
    loss,
    prediction_weights,
    sum_of_weights,
)


@dataclass
class Scan:
    """What one pass over N inputs found, or has found so far.

    Attributes
    ----------
    landmarks, curvature : BottomK
        Independent samples: of (input, number of its outputs) for the landmarks, and of
        (input, weights of its predictions or None) for G.
    n_data : int
        N.
    n_predictions : int or float
        Inputs times positions, without those that are ignored; with weights, their sum.
    n_outputs : int
        C.
    channel_axis : int or None
        Where outputs have their channels: 1 or -1; None: last, without anybody having said so.
    n_positions : int
        The most positions of an input seen.
    loss : Tensor ()
        Negative log likelihood summed over the data (and positions), float64.
    longest : int
        The longest batch seen.
    n_batches : int
        How many batches were read.
    """

    landmarks: BottomK
    curvature: BottomK
    n_data: int = 0
    n_predictions: float = 0
    n_outputs: int = 0
    channel_axis: int | None = None
    n_positions: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64, device="cpu"))
    longest: int = 0
    n_batches: int = 0

    def state(self) -> dict[str, Any]:
        """Return tensors and plain types, for :meth:`restore`."""
        return {
            **{name: getattr(self, name) for name in COUNTS},
            "loss": self.loss,
            "landmarks": [
                (entry, *_packed_pair(self.landmarks, entry)) for entry in self.landmarks.entries()
            ],
            "curvature": [
                (entry, *_packed_pair(self.curvature, entry)) for entry in self.curvature.entries()
            ],
        }

    def restore(self, state: dict[str, Any], example: Any) -> None:
        """Become what a scan was; ``example`` is an input, if they are mappings of a type of their own."""
        for name in COUNTS:
            setattr(self, name, state[name])
        self.loss = state["loss"]
        pairs = {entry[1]: (unpacked(x, example), n) for entry, x, n in state["landmarks"]}
        inputs = {entry[1]: (unpacked(x, example), w) for entry, x, w in state["curvature"]}
        self.landmarks = BottomK.of(self.landmarks.capacity, [e for e, *_ in state["landmarks"]], pairs)
        self.curvature = BottomK.of(self.curvature.capacity, [e for e, *_ in state["curvature"]], inputs)


COUNTS = ("n_data", "n_predictions", "n_outputs", "channel_axis", "n_positions", "longest", "n_batches")


def _packed_pair(sample: BottomK, entry: Entry) -> tuple[Any, Any]:
    x, more = sample.row(entry[1])
    return packed(x), more


def _weighted_input(x: Input, weights: Tensor | None, index: int) -> tuple[Input, Tensor | None]:
    return single_input(x, index), None if weights is None else weights[index : index + 1].clone()


def scan(
    batches: Iterable[Batch],
    forward: Callable[[Batch], tuple[Tensor, Axes]],
    likelihood: Likelihood,
    *,
    found: Scan,
    seed: int,
    scheme: Scheme = uniform,
    after: Callable[[Batch], None] = lambda batch: None,
) -> None:
    """Read batches once, and add to what was found before.

    Parameters
    ----------
    batches : iterable of Batch
    forward : callable
        Batch -> outputs (B, ..., C), on the device it likes, and the axes that the network's have.
    found : Scan
    scheme : callable
        How landmark inputs are drawn; see :data:`laplace_ella.data.landmarks.Scheme`.
    after : callable
        Called with every batch once it is part of ``found``.

    Raises
    ------
    ValueError
        If a batch has outputs that are not finite or not of the number before, or targets that
        do not fit the outputs.

    Notes
    -----
    Cost: a plain forward pass an input.
    """
    for batch in batches:
        x, size = batch.x, batch_size(batch.x)
        with NamingShape(x):
            raw, axes = forward(batch)
        f, found.channel_axis = raw.flatten(0, -2), axes.channel_axis
        y = checked_targets(likelihood, batch.y, f, axes, batch.name)
        check_weights(batch.weights, raw.shape[:-1], batch.name)
        weights = prediction_weights(likelihood, batch.y, batch.weights)
        if found.n_outputs not in (0, f.shape[-1]):
            raise ValueError(
                f"The model returned {f.shape[-1]} outputs in {batch.name} and {found.n_outputs} before; "
                "every batch must have the same number."
            )
        counted = None if weights is None else weights.sum(1) > 0
        offer_inputs(found.landmarks, replace(batch, y=y), raw.shape[1:].numel(), scheme, seed, counted)
        keys = hash_keys(seed, CURVATURE_INPUT, batch.positions)
        found.curvature.offer(batch.positions, keys, None, partial(_weighted_input, x, weights))
        found.loss = found.loss.to(f.device) + loss(likelihood, f, y, batch.weights)
        found.n_outputs, found.longest = f.shape[-1], max(found.longest, size)
        found.n_positions = max(found.n_positions, len(f) // size)
        found.n_data = found.n_data + size
        count = sum_of_weights(weights, len(f))
        found.n_predictions += round(count) if batch.weights is None else count
        found.n_batches += 1
        after(batch)


def over_all(found: Scan, ranks: Ranks) -> Scan:
    """Return what the ranks found together, with the landmarks of all, and without curvature inputs.

    Raises
    ------
    ValueError
        If there are no data, or models with different numbers of outputs.
    """
    sums = torch.tensor([found.n_data, found.n_predictions], dtype=torch.float64, device="cpu")
    n_data, n_predictions = (int(v) if v.is_integer() else v for v in ranks.total(sums).tolist())
    check_some(n_data, "training loader")
    if not n_predictions:
        raise ValueError(
            "The training loader has no target that counts: all are -100, which is ignored, or have the weight 0."
        )
    n_outputs = {n for n in ranks.gathered(found.n_outputs, "the number of outputs") if n}
    if len(n_outputs) > 1:
        raise ValueError(f"The models of the ranks have different numbers of outputs: {sorted(n_outputs)}.")
    axis = {a for a, n in ranks.gathered((found.channel_axis, found.n_data), "the channel axis") if n}
    if len(axis) > 1:
        raise ValueError(
            "By their first batches, some ranks find the channels of the outputs in axis 1, and others last. Pass channel_axis=1 or "
            "channel_axis=-1."
        )
    return replace(
        found,
        landmarks=pooled(found.landmarks, ranks),
        curvature=BottomK(0),
        n_data=n_data,
        n_predictions=n_predictions,
        n_outputs=n_outputs.pop(),
        channel_axis=axis.pop(),
        loss=ranks.total(found.loss),
        n_positions=ranks.greatest(found.n_positions, "the positions of an input"),
        longest=ranks.greatest(found.longest, "the longest batch"),
    )
