r"""The processes that share a piece of work: one, or the ranks of a torch.distributed group.

Everything that crosses process boundaries goes through :class:`Ranks`; a single process
(:data:`ALONE`) does the same steps and exchanges nothing.
"""

from __future__ import annotations

import io
import reprlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")
# Sums of no more numbers are added up by every rank itself, from the terms of all ranks in the same order.
GATHERED_SUM = 2**16
# The key under which a rank sends its error in place of an item.
FAILED = "laplace_ella: failed"


class RankError(RuntimeError):
    """Another rank failed, ended, or did not come."""


class _Local(threading.local):
    """What a thread remembers: in how many nested pieces of common work it is, and an error that all ranks know of."""

    depth = 0
    told: BaseException | None = None


_LOCAL = _Local()


class Ranks:
    """The ranks of a process group; without one, this process alone.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional

    Attributes
    ----------
    rank, size : int
        The number of this process, and how many there are.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    # ------------------------------------------------------------------ who does what

    def lengths(self, n: int) -> list[int]:
        """Return how many of n items each rank takes."""
        return [n // self.size + (r < n % self.size) for r in range(self.size)]

    def share(self, items: Any) -> Any:
        """Return this rank's share of a sequence or tensor that all ranks know: some items in succession."""
        lengths = self.lengths(len(items))
        start = sum(lengths[: self.rank])
        return items[start : start + lengths[self.rank]]

    def turns(self) -> slice:
        """Return which items belong to this rank where they are dealt like cards."""
        return slice(self.rank, None, self.size)

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self  # a process group cannot be copied

    # ------------------------------------------------------------------ staying together

    @contextmanager
    def together(self, what: str, alike: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """Let all ranks finish a piece of work; if one fails, all do.

        Parameters
        ----------
        what : str
            The piece of work, for messages.
        alike : tuple of classes
            Errors, made of a text, that all ranks raise if one does and none fails with another error.

        Raises
        ------
        RankError
            If another rank failed inside, naming it and its error, or does not answer.
        """
        if self.size == 1:
            yield
            return
        _LOCAL.depth += 1
        try:
            error: BaseException | None = None
            try:
                yield
            except BaseException as raised:
                error = raised
            self._settle(what, error, alike)
        finally:
            _LOCAL.depth -= 1
            if not _LOCAL.depth:
                _LOCAL.told = None

    def _settle(self, what: str, error: BaseException | None, alike: tuple[type[Exception], ...]) -> None:
        """Tell the others how a piece of work has ended, and raise if it failed anywhere."""
        if error is not None and (isinstance(error, RankError) or error is _LOCAL.told):
            raise error  # all ranks know of it
        reports: list[Any] = []
        try:
            reports = self.gathered(None if error is None else _report(error, alike), what)
        except RankError:
            if error is None or isinstance(error, alike):
                raise
        if error is not None:
            _LOCAL.told = _LOCAL.told if isinstance(error, alike) else error
            raise error
        for report in filter(None, reports):
            raise alike[report["alike"]](report["text"])

    @contextmanager
    def lockstep(self, what: str) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """Let a loop of exchanges go on when work between them fails; at its end, all ranks fail.

        Yields
        ------
        callable
            Returns a context for the work between two exchanges, which keeps its errors for the end.
        """
        if self.size == 1:
            yield nullcontext
            return
        errors: list[BaseException] = []

        @contextmanager
        def between() -> Iterator[None]:
            try:
                yield
            except BaseException as error:
                errors.append(error)

        yield between
        with self.together(what):
            if errors:
                raise errors[0]

    def require_equal(self, values: dict[str, Any], what: str) -> None:
        """Require that all ranks have the same values.

        Raises
        ------
        ValueError
            On every rank, naming what differs.
        """
        everyone = self.gathered(values, what)
        for name in values:
            found = [theirs[name] for theirs in everyone]
            if any(value != found[0] for value in found):
                raise ValueError(
                    f"All ranks must have the same {name} in {what}; got {reprlib.repr(found)} on ranks 0 to "
                    f"{self.size - 1}. Set it alike, or pass process_group=None to work in one process alone."
                )

    # ------------------------------------------------------------------ exchanging objects

    def gathered(self, item: Any, what: str) -> list[Any]:
        """Return every rank's item: tensors and plain types, tensors on the CPU.

        Raises
        ------
        RankError
            If the ranks are not at the same step, or one failed or does not answer.
        """
        return [item] if self.size == 1 else self._sent([item], what)

    def exchanged(self, items: Sequence[Any], what: str) -> list[Any]:
        """Send an item to each rank, and return those received, in the order of the ranks.

        Raises
        ------
        RankError
            If the ranks are not at the same step, or one failed or does not answer.
        """
        return list(items) if self.size == 1 else self._sent(items, what)

    def _sent(self, items: Sequence[Any], what: str) -> list[Any]:
        """Send one item to all ranks, or one to each, and return those received."""
        failure: Exception | None = None
        try:
            lengths, sent = self._outgoing([(what, item) for item in items])
        except Exception as error:  # the others wait, and have to hear of it
            failure, (lengths, sent) = error, self._outgoing([(what, _report(error))])
        steps, theirs = zip(*self._delivered(lengths, sent, what))
        failed = {r: item[FAILED] for r, item in enumerate(theirs) if type(item) is dict and FAILED in item}
        if len(set(steps)) > 1:
            causes = "".join(f" Rank {rank} failed: {cause}" for rank, cause in failed.items())
            raise RankError(
                f"The ranks are out of step: they are in {reprlib.repr(steps)}. All have to make the same calls; pass "
                f"process_group=None to work in one process alone.{causes[:2000]}"
            )
        if failure is not None:
            raise failure
        for rank, cause in failed.items():
            raise RankError(f"Rank {rank} failed in {what}, so that all ranks stop. Its error: {cause}")
        return list(theirs)

    def _outgoing(self, items: Sequence[Any]) -> tuple[list[int], Tensor]:
        """Return the bytes for every rank, one after the other, and how many there are for each."""
        parts = [_packed(item) for item in items]
        parts *= self.size // len(parts)
        return [len(part) for part in parts], self._wire(torch.cat(parts))

    def _delivered(self, lengths: list[int], sent: Tensor, what: str) -> list[Any]:
        """Send bytes to each rank, and return what those received mean."""
        leaving = self._wire(torch.tensor(lengths, dtype=torch.int64, device="cpu"))
        coming = torch.empty_like(leaving)
        with self._reached(what):
            dist.all_to_all_single(coming, leaving, group=self.group)
            sizes = coming.tolist()
            received = sent.new_empty(sum(sizes))
            dist.all_to_all_single(received, sent, sizes, lengths, group=self.group)
        return [_unpacked(part) for part in received.split(sizes)]

    def on_first(self, item: Any, work: Callable[[list[Any]], Item], what: str, alike: Any = ()) -> Item:
        """Let the first rank work on the items of all ranks, and return its result on every rank."""
        received = self.exchanged([item, *[None] * (self.size - 1)], what)
        with self.together(what, alike):
            found = work(received) if self.rank == 0 else None
        return self.gathered(found, what)[0]

    def any(self, flag: bool, what: str) -> bool:
        """Tell whether a flag is set on any rank."""
        return any(self.gathered(bool(flag), what))

    def least(self, number: Any, what: str) -> Any:
        """Return the smallest number that a rank has."""
        return min(self.gathered(number, what))

    def greatest(self, number: Any, what: str) -> Any:
        """Return the largest number that a rank has."""
        return max(self.gathered(number, what))

    # ------------------------------------------------------------------ tensors

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks of tensors of one shape; the same bits on every rank."""
        if self.size == 1:
            return values
        if values.numel() <= GATHERED_SUM:
            return torch.stack(self.gathered(values, "a sum")).sum(0).to(values.device)
        return self._replaced(values, "a sum", dist.all_reduce)

    def of_first(self, values: Tensor) -> Tensor:
        """Return rank 0's tensor; all ranks have one of the same shape."""
        if self.size == 1:
            return values
        send = partial(dist.broadcast, src=dist.get_global_rank(self.group, 0))
        return self._replaced(values, "a broadcast", send)

    def _replaced(self, values: Tensor, what: str, collective: Callable[..., Any]) -> Tensor:
        """Return what a collective makes of a tensor in place."""
        with self.together(what):  # there may be no room for it
            sent = self._wire(values.contiguous().clone())
        with self._reached(what):
            collective(sent, group=self.group)
        return sent.to(values.device)

    def joined(self, values: Tensor) -> Tensor:
        """Return tensors (n, ...) of all ranks one after the other."""
        if self.size == 1:
            return values
        return torch.cat(self.gathered(values, "parts of a tensor")).to(values.device)

    def interleaved(self, values: Tensor, n: int) -> Tensor:
        """Return as (..., n), on every rank, what :meth:`turns` dealt along the last axis."""
        if self.size == 1:
            return values
        return dealt_back(self.gathered(values, "a tensor dealt out"), n).to(values.device)

    def columns(self, rows: Tensor, lengths: Sequence[int], width: int) -> Iterator[Tensor]:
        """Yield slices of the columns of gradient rows that are spread over the ranks.

        Parameters
        ----------
        rows : Tensor (m, P)
            The gradient rows of this rank.
        lengths : sequence of int
            How many rows each rank has.
        width : int
            How many columns a slice may have.

        Yields
        ------
        Tensor (M, <= width)
            All rows, and some of the columns. Together the ranks see each column once, and zeros beyond
            the last. The slice is only valid until the next is asked for.
        """
        n_columns = rows.shape[1]
        if self.size == 1:
            for start in range(0, n_columns, width):
                yield rows[:, start : start + width]
            return
        width = max(1, min(width, -(-n_columns // self.size)))
        itemsize = rows.element_size()
        sizes = [n * width * itemsize for n in lengths]
        with self.together("the exchange of gradient rows"):  # there may be no room for it
            outgoing = rows.new_zeros(self.size, len(rows), width)
            place = self._wire(rows.new_empty(1, dtype=torch.uint8)).device
            received = torch.empty(sum(sizes), dtype=torch.uint8, device=place)
        for start in range(0, n_columns, width * self.size):
            outgoing.zero_()
            for rank, piece in enumerate(rows[:, start : start + width * self.size].split(width, 1)):
                outgoing[rank, :, : piece.shape[1]] = piece
            sent = self._wire(outgoing.view(-1).view(torch.uint8))
            with self._reached("the exchange of gradient rows"):
                dist.all_to_all_single(
                    received, sent, sizes, [len(rows) * width * itemsize] * self.size, group=self.group
                )
            yield received.view(rows.dtype).view(sum(lengths), width)

    def _wire(self, values: Tensor) -> Tensor:
        """Put a tensor where the group's backend takes it: "nccl" on GPUs, others on the CPU."""
        backends = dict(pair.split(":") for pair in dist.get_backend_config(self.group).split(","))
        if values.device.type == "cpu":
            return values if "cpu" in backends else values.cuda()
        return values if backends.get(values.device.type) == "nccl" else values.cpu()

    @contextmanager
    def _reached(self, what: str) -> Iterator[None]:
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"Rank {self.rank} could not reach the other ranks in {what}: one of them ended, or did not come "
                "within the process group's timeout; init_process_group(timeout=...) sets it. All "
                "ranks have to make the same calls; pass process_group=None to work in one process alone. "
                f"torch.distributed says: {error}"
            ) from error


ALONE = Ranks()


def ranks_of(process_group: Any) -> Ranks:
    """Return the ranks of "default" (torch.distributed's group, if there is one), of a group, or of None."""
    if process_group is None or not dist.is_available() or not dist.is_initialized():
        return ALONE
    group = dist.group.WORLD if isinstance(process_group, str) else process_group
    return Ranks(group)


def check_process_group(group: Any) -> None:
    """Require "default", a process group that this process is in, or None."""
    is_named = group is None or (isinstance(group, str) and group == "default")
    if not is_named and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ValueError(
            "process_group must be 'default' (torch.distributed's group, if one is initialised), a "
            "torch.distributed.ProcessGroup that this process is in, or None (this process alone); "
            f"got {type(group).__name__} {group!r}."
        )


def dealt_back(parts: Sequence[Tensor], n: int) -> Tensor:
    """Join parts (..., n_r), dealt like cards to the ranks along the last axis, into (..., n)."""
    whole = parts[0].new_empty(*parts[0].shape[:-1], n)
    for rank, part in enumerate(parts):
        whole[..., rank :: len(parts)] = part
    return whole


def _packed(item: Any) -> Tensor:
    """Write tensors and plain types as bytes."""
    buffer = io.BytesIO()
    torch.save(item, buffer)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8)


def _unpacked(values: Tensor) -> Any:
    # Nothing but tensors and plain types is read from bytes.
    return torch.load(io.BytesIO(values.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


def _report(error: BaseException, alike: Sequence[type[Exception]] = ()) -> dict[str, Any]:
    """Describe an error for the other ranks: as a failure, or by its place among those that all ranks raise alike."""
    for i, kind in enumerate(alike):
        if isinstance(error, kind):
            return {"alike": i, "text": str(error)}
    return {FAILED: f"{type(error).__name__}: {error}"}
