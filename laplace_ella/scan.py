r"""The one pass over the training data: loss, size, landmark inputs, curvature inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .batches import batch_size, named_batches, single_row
from .landmarks import CURVATURE_INPUT, LANDMARK_INPUT, BottomK, hash_keys
from .likelihoods import Likelihood, checked_targets


@dataclass(frozen=True)
class Scan:
    """What one pass over N inputs found.

    Attributes
    ----------
    n_data : int
        N.
    n_predictions : int
        Inputs times positions.
    n_outputs : int
        C.
    loss : Tensor ()
        Negative log likelihood summed over the data (and positions), float64.
    batch : int
        The longest batch seen.
    landmarks, curvature : BottomK
        Independent samples: of (input, number of its outputs) for the landmarks, and of
        inputs for G.
    """

    n_data: int
    n_predictions: int
    n_outputs: int
    loss: Tensor
    batch: int
    landmarks: BottomK
    curvature: BottomK


def scan(
    loader: Iterable[Any],
    forward: Callable[[Any], Tensor],
    likelihood: Likelihood,
    *,
    n_landmarks: int,
    n_curvature: int,
    seed: int,
    balanced: bool,
    dict_key_x: str,
    dict_key_y: str,
    first_position: int = 0,
) -> Scan:
    """Read every batch of a loader once.

    Parameters
    ----------
    loader : iterable
        Any iterable of batches, with or without a length.
    forward : callable
        Input -> outputs (B, ..., C), on the device it likes.
    n_landmarks, n_curvature : int
        Sizes of the two samples; 0 keeps none.
    balanced : bool
        Landmark inputs evenly over the classes.
    first_position : int
        Position of the first input in the whole stream (data fitted before).

    Raises
    ------
    ValueError
        If the loader is empty, or a batch has the wrong structure, inputs or outputs
        that are not finite, or targets that do not fit the outputs.

    Notes
    -----
    Cost: N plain forward passes.
    """
    samples = {LANDMARK_INPUT: BottomK(n_landmarks), CURVATURE_INPUT: BottomK(n_curvature)}
    n, n_predictions, n_outputs, longest = 0, 0, 0, 0
    loss = torch.zeros((), dtype=torch.float64)
    for name, x, y in named_batches(loader, dict_key_x, dict_key_y):
        raw = forward(x)
        n_coordinates, f = raw.shape[1:].numel(), raw.flatten(0, -2)
        y = checked_targets(likelihood, y, f, raw.shape[1:-1], name)
        classes = _classes(y, batch_size(x)) if balanced else None
        if n_outputs not in (0, f.shape[-1]):
            raise ValueError(
                f"The model returned {f.shape[-1]} outputs in {name} and {n_outputs} before; "
                "every batch must have the same number."
            )
        n_outputs, size = f.shape[-1], batch_size(x)
        positions = torch.arange(first_position + n, first_position + n + size)
        landmark = partial(_with_count, x, n_coordinates)
        for purpose, groups, row in (
            (LANDMARK_INPUT, classes, landmark),
            (CURVATURE_INPUT, None, partial(single_row, x)),
        ):
            if samples[purpose].capacity:
                samples[purpose].offer(positions, hash_keys(seed, purpose, positions), groups, row)
        loss = loss.to(f.device) + likelihood.loss(f, y)
        n, n_predictions, longest = n + size, n_predictions + len(f), max(longest, size)
    if n == 0:
        raise ValueError(
            "The training loader yielded no data; at least one input is needed. "
            "A generator that was read before is empty: pass a fresh one."
        )
    return Scan(n, n_predictions, n_outputs, loss, longest, samples[LANDMARK_INPUT], samples[CURVATURE_INPUT])


def _with_count(x: Any, n_coordinates: int, index: int) -> tuple[Any, int]:
    return single_row(x, index), n_coordinates


def _classes(y: Tensor, n_inputs: int) -> list[int]:
    if len(y) != n_inputs:
        raise ValueError(
            f"balanced=True needs one class for each input; got {len(y)} targets for {n_inputs} inputs. Leave it out."
        )
    return (y if y.ndim == 1 else y.argmax(-1)).tolist()
