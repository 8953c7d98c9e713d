"""Tensors of many batches, in memory and in a temporary file."""

import os
from pathlib import Path

import pytest
import torch

from laplace_ella.tuning.store import Store

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]


def rows(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (100 * torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(seed))).to(dtype)


def filled(budget: int, parts: list[tuple], folder: Path | None = None) -> Store:
    store = Store(budget, None if folder is None else str(folder))
    for part in parts:
        store.append(*part)
    return store


def joined(store: Store) -> list:
    return [None if c[0] is None else torch.cat(c) for c in zip(*store)]


@pytest.mark.parametrize("budget", [1, 100, 1000, 10**9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_comes_back_is_what_went_in_whatever_the_budget(budget, dtype):
    parts = [(rows(n, dtype, n), torch.arange(n), None) for n in (5, 1, 7, 2, 11)]
    store = filled(budget, parts)
    for _ in range(2):
        first, second, third = joined(store)
        assert torch.equal(first, torch.cat([p[0] for p in parts]))
        assert torch.equal(second, torch.cat([p[1] for p in parts]))
        assert third is None


def test_memory_stays_within_the_budget():
    parts = [(rows(11, torch.float64, seed),) for seed in range(7)]
    size = parts[0][0].numel() * 8
    store = filled(2 * size, parts)
    assert store.kept <= 2 * size
    in_memory = [b for b in store._blocks if isinstance(b[0], torch.Tensor)]
    assert 0 < len(in_memory) < len(store._blocks)


def test_small_batches_are_joined_into_blocks():
    store = filled(10**9, [(rows(5, torch.float64, seed),) for seed in range(7)])
    assert len(list(store)) == 1


def test_transposed_tensors_come_back_as_they_were():
    x = rows(5, torch.float64).movedim(0, 1).contiguous().movedim(0, 1)
    assert torch.equal(joined(filled(1, [(x,)]))[0], x)


def test_the_file_leaves_nothing_behind(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    store = filled(1, [(rows(5, torch.float64),)], tmp_path)
    assert len(joined(store)[0]) == 5
    del store
    assert not list(tmp_path.iterdir())
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
