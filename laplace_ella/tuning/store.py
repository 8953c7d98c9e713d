r"""Tensors of many batches within a memory budget: what does not fit goes to a temporary file."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]
# Blocks of about this many bytes: large enough to keep cores busy, small next to a budget.
BLOCK_BYTES = 2**25


@dataclass(frozen=True)
class _Filed:
    """Where a tensor lies in the file."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Store:
    """Joins the tensors of batches into blocks, and keeps them.

    Parameters
    ----------
    budget : int
        Bytes that may be kept on the device of the tensors; blocks beyond that go to a temporary file,
        which ends with the process or the store.
    folder : str, optional
        The folder of the file; by default the system's folder for temporary files.
    """

    def __init__(self, budget: int, folder: str | None = None) -> None:
        self.budget, self.folder = budget, folder
        self.block_bytes = max(1, min(BLOCK_BYTES, budget // 4))
        self.kept = 0
        self._buffer: list[Tensors] = []
        self._buffered = 0
        self._blocks: list[tuple[Any, ...]] = []
        self._file: IO[bytes] | None = None

    def append(self, *tensors: Tensor | None) -> None:
        """Add the tensors of a batch (B, ...); those of other shapes after B start a block of their own."""
        if self._buffer and _kinds(self._buffer[0]) != _kinds(tensors):
            self._flush()
        self._buffer.append(tensors)
        self._buffered += _nbytes(tensors)
        if self._buffered >= self.block_bytes:
            self._flush()

    def __iter__(self) -> Iterator[Tensors]:
        """Yield the blocks, joined along the first axis, on the device they came from."""
        if self._buffer:
            self._flush()
        for block in self._blocks:
            yield tuple(self._read(t) if isinstance(t, _Filed) else t for t in block)

    def _flush(self) -> None:
        block = tuple(None if column[0] is None else torch.cat(column) for column in zip(*self._buffer))
        self._buffer, self._buffered = [], 0
        size = _nbytes(block)
        if self.kept + size <= self.budget:
            self.kept += size
            self._blocks.append(block)
        else:
            self._blocks.append(tuple(None if t is None else self._write(t) for t in block))

    def _write(self, tensor: Tensor) -> _Filed:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder, prefix="laplace_ella-features-")  # noqa: SIM115
            weakref.finalize(self, self._file.close)
        offset = self._file.seek(0, 2)
        flat = tensor.detach().cpu().contiguous().flatten()
        self._file.write(flat.view(torch.uint8).numpy().data)
        return _Filed(offset, tuple(tensor.shape), tensor.dtype, tensor.device)

    def _read(self, filed: _Filed) -> Tensor:
        assert self._file is not None
        self._file.seek(filed.offset)
        empty = torch.empty(filed.shape, dtype=filed.dtype, device="cpu")
        self._file.readinto(empty.view(-1).view(torch.uint8).numpy())  # type: ignore[attr-defined]
        return empty.to(filed.device)


def _kinds(tensors: Tensors) -> list[Any]:
    return [None if t is None else (t.shape[1:], t.dtype) for t in tensors]


def _nbytes(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
