"""Tensors of many batches, in memory and in a temporary file."""

import os
from pathlib import Path

import pytest
import torch

from laplace_ella.tuning.store import Store

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]
OPEN_FILES = Path("/proc/self/fd")


def rows(n, dtype=torch.float64, seed=0):
    return (100 * torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(seed))).to(dtype)


def filled(budget, parts, folder=None):
    store = Store(budget, folder)
    for part in parts:
        store.append(*part)
    return store


def joined(store):
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
    assert store.kept <= budget


def test_batches_are_joined_and_transposed_tensors_come_back_as_they_were():
    assert len(list(filled(10**9, [(rows(5, seed=seed),) for seed in range(7)]))) == 1
    x = rows(5).movedim(0, 1).contiguous().movedim(0, 1)
    assert torch.equal(joined(filled(1, [(x,)]))[0], x)


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="no list of open files")
def test_the_file_leaves_nothing_behind(tmp_path):
    before = len(os.listdir(OPEN_FILES))
    store = filled(1, [(rows(5),)], str(tmp_path))
    assert len(joined(store)[0]) == 5
    del store
    assert not list(tmp_path.iterdir())
    assert len(os.listdir(OPEN_FILES)) == before
