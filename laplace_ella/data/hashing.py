r"""Hashes: random numbers without state, and digests of tensors.

What is drawn for an input is a hash of the seed, what it is for, and where the input stands
in the data. It does not depend on batches, machines or processes, nor on what was drawn before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# What a key is for: samples with different purposes are independent.
LANDMARK_INPUT, CURVATURE_INPUT, LANDMARK_OUTPUT, LANDMARK_PAIR, SAMPLED_LABEL, TANGENT, POSITION = range(7)


def hash_keys(seed: int, purpose: int, positions: Tensor) -> Tensor:
    """Return uniform 62-bit keys, one per position (N,), by the splitmix64 finaliser.

    Source: Steele, Lea, Flood (2014), Fast splittable pseudorandom number
    generators. int64 arithmetic wraps, so the keys are the same on every machine.
    """
    state = torch.full((), seed, dtype=torch.int64, device=positions.device)
    for word in (torch.full_like(state, purpose), positions.to(torch.int64)):
        state = _mix(state ^ _mix(word))
    return state & (2**62 - 1)


def derived_seed(seed: int, purpose: int, position: int = 0) -> int:
    """Return a seed for a generator of its own, independent of those for other purposes and positions."""
    return int(hash_keys(seed, purpose, torch.tensor([position], dtype=torch.int64, device="cpu")))


def normal_like(tensors: Mapping[str, Tensor], n: int, seed: int) -> dict[str, Tensor]:
    """Draw n standard normal tensors (n, *shape) like each of some; the same on every device.

    They are drawn in float32, whatever the dtype of the tensors and the default one are, as a draw in another
    precision is another draw.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return {
        k: torch.randn(n, *t.shape, generator=generator, dtype=torch.float32, device="cpu").to(t)
        for k, t in tensors.items()
    }


def uniforms(seed: int, purpose: int, positions: Tensor, n: int) -> Tensor:
    """Return uniform numbers (B, n) in (0, 1), n for each position (B,), float64."""
    keys = hash_keys(seed, purpose, positions)[:, None]
    counters = torch.arange(n, dtype=torch.int64, device=positions.device)
    bits = (_mix(keys ^ _mix(counters)) >> 11) & (2**53 - 1)
    return (bits.double() + 0.5) / 2**53


def _mix(z: Tensor) -> Tensor:
    z = z - 7046029254386353131
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def digest(*values: Any) -> str:
    """Return a hash of tensors, mappings of them, strings and numbers."""
    found = hashlib.blake2b(digest_size=16)
    for value in values:
        if isinstance(value, Mapping):
            found.update(digest(*(part for pair in value.items() for part in pair)).encode())
        elif isinstance(value, Tensor):
            add_tensor(found, value)
        else:
            plain = isinstance(value, (str, int, float))
            found.update((repr(value) if plain else type(value).__name__).encode())
    return found.hexdigest()


def digest_of(value: Any) -> str:
    """Return a hash of a state: tensors and plain values in dicts and sequences of any depth."""
    if isinstance(value, dict):
        return digest(*(part for k, v in value.items() for part in (repr(k), digest_of(v))))
    if isinstance(value, (list, tuple)):
        return digest(*map(digest_of, value))
    return digest(value if isinstance(value, Tensor) else repr(value))


def add_tensor(found: Any, tensor: Tensor) -> None:
    """Add shape, dtype and bytes of a tensor to a hash, the same on every device."""
    found.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.numel():
        found.update(flat.view(torch.uint8).numpy())
