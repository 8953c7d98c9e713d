r"""The processes that share a piece of work: one, or the ranks of a torch.distributed group.

Everything that crosses process boundaries goes through :class:`Ranks`; a single process
(:data:`ALONE`) does the same steps and exchanges nothing.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")
# Numbers of a sum up to which every rank adds up all ranks' terms itself, in the same order.
GATHERED_SUM = 2**16
# Bytes up to which an object is sent padded to the length of the longest, in one exchange.
PADDED = 2**20
# Under which a rank says that it could not send what it should.
UNSENT = "laplace_ella: not sent"


class RankError(RuntimeError):
    """Another rank failed, ended, or did not come."""


class _Local(threading.local):
    """What a thread is in: so many pieces of common work, and an error that all ranks know of."""

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
        Which of how many this process is.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    # ------------------------------------------------------------------ who does what

    def lengths(self, n: int) -> list[int]:
        """Return how many of n items each rank takes."""
        return [n // self.size + (r < n % self.size) for r in range(self.size)]

    def bounds(self, n: int) -> slice:
        """Return which of n items, that all ranks know, are this rank's share: some in a row."""
        lengths = self.lengths(n)
        start = sum(lengths[: self.rank])
        return slice(start, start + lengths[self.rank])

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this rank's share of items that all ranks know."""
        return items[self.bounds(len(items))]

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
            Errors, made of a text, that all ranks raise if one does and none fails otherwise.

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
            raise error  # all know of it
        report = None if error is None else _report(error, alike)
        reports: list[Any] = []
        try:
            reports = self.gathered(report, what)
        except RankError:
            if error is None:
                raise
        if error is not None and not isinstance(error, alike):
            _LOCAL.told = error
            raise error
        for rank, found in enumerate(reports):
            if found and found["alike"] is None:
                raise RankError(
                    f"Rank {rank} failed in {what}, so that all ranks stop. Its error: {found['error']}"
                )
        if error is not None:
            raise error
        for found in filter(None, reports):
            raise alike[found["alike"]](found["text"])

    @contextmanager
    def lockstep(self, what: str) -> Iterator[Callable[[], AbstractContextManager[None]]]:
        """Let a loop of exchanges go on when work between them fails; at the end, all ranks fail.

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

    def in_step(self, items: Iterable[Item]) -> Iterator[Item | None]:
        """Yield items until every rank has run out of its own; None for this rank after that."""
        if self.size == 1:
            yield from items
            return
        iterator = iter(items)
        while True:
            with self.together("reading data"):
                item = next(iterator, None)
            if not self.any(item is not None, "reading data"):
                return
            yield item

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
                    f"All ranks must have the same {name} in {what}; got {_shortened(found)} on ranks 0 to "
                    f"{self.size - 1}. Set it alike, or pass process_group=None to work in one process alone."
                )

    # ------------------------------------------------------------------ exchanging objects

    def gathered(self, item: Any, what: str) -> list[Any]:
        """Return every rank's item: tensors and plain types, tensors on the CPU.

        Raises
        ------
        RankError
            If the ranks are not at the same step, or one does not answer.
        """
        if self.size == 1:
            return [item]
        failure: Exception | None = None
        try:
            payload = _packed((what, item))
        except Exception as error:  # which the others have to hear of, as they wait
            failure, payload = error, _packed((what, {UNSENT: f"{type(error).__name__}: {error}"}))
        mine = self._wire(payload)
        lengths = [torch.zeros(1, dtype=torch.int64, device=mine.device) for _ in range(self.size)]
        with self._reached(what):
            dist.all_gather(
                lengths, torch.tensor([len(mine)], dtype=torch.int64, device=mine.device), group=self.group
            )
            received = [_unpacked(part) for part in self._parts(mine, [int(n) for n in lengths])]
        steps = [step for step, _ in received]
        if len(set(steps)) > 1:
            failed = [f" Rank {r} failed: {e['error']}" for r, (_, e) in enumerate(received) if _is_report(e)]
            raise RankError(
                f"The ranks are out of step: they are in {_shortened(steps)}. All have to make the same calls; pass "
                f"process_group=None to work in one process alone.{''.join(failed)[:2000]}"
            )
        if failure is not None:
            raise failure
        for rank, (_, theirs) in enumerate(received):
            if isinstance(theirs, dict) and UNSENT in theirs:
                raise RankError(
                    f"Rank {rank} failed in {what}, so that all ranks stop. Its error: {theirs[UNSENT]}"
                )
        return [theirs for _, theirs in received]

    def _parts(self, mine: Tensor, lengths: list[int]) -> Iterator[Tensor]:
        """Yield the bytes of every rank: small ones padded, in one exchange, large ones one after the other."""
        if max(lengths) <= PADDED:
            padded = torch.cat([mine, mine.new_zeros(max(lengths) - len(mine))])
            parts = [torch.empty_like(padded) for _ in lengths]
            dist.all_gather(parts, padded, group=self.group)
            yield from (part[:n] for part, n in zip(parts, lengths))
            return
        for rank, n in enumerate(lengths):
            part = mine if rank == self.rank else mine.new_empty(n)
            dist.broadcast(part, dist.get_global_rank(self.group, rank), group=self.group)
            yield part

    def exchanged(self, items: Sequence[Any], what: str) -> list[Any]:
        """Send an item to each rank, and return those received, in the order of the ranks."""
        if self.size == 1:
            return list(items)
        outgoing = [_packed(item) for item in items]
        lengths = self._wire(torch.tensor([len(b) for b in outgoing], dtype=torch.int64, device="cpu"))
        coming = torch.empty_like(lengths)
        with self._reached(what):
            dist.all_to_all_single(coming, lengths, group=self.group)
            sizes = coming.tolist()
            received = self._wire(torch.empty(sum(sizes), dtype=torch.uint8, device="cpu"))
            dist.all_to_all_single(
                received, self._wire(torch.cat(outgoing)), sizes, lengths.tolist(), group=self.group
            )
        return [_unpacked(part) for part in received.split(sizes)]

    def on_first(self, item: Any, work: Callable[[list[Any]], Item], what: str, alike: Any = ()) -> Item:
        """Send every rank's item to the first, which works on all of them, and return on all what it made of them."""
        received = self.exchanged([item, *[None] * (self.size - 1)], what)
        found: Any = None
        with self.together(what, alike):
            if self.rank == 0:
                found = work(received)
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
        with self.together("a sum"):
            summed = self._wire(values.contiguous().clone())
        with self._reached("a sum"):
            dist.all_reduce(summed, group=self.group)
        return summed.to(values.device)

    def of_first(self, values: Tensor) -> Tensor:
        """Return rank 0's tensor; all ranks have one of the same shape."""
        if self.size == 1:
            return values
        with self.together("a broadcast"):
            sent = self._wire(values.contiguous().clone())
        with self._reached("a broadcast"):
            dist.broadcast(sent, dist.get_global_rank(self.group, 0), group=self.group)
        return sent.to(values.device)

    def joined(self, values: Tensor) -> Tensor:
        """Return tensors (n, ...) of all ranks one after the other."""
        if self.size == 1:
            return values
        return torch.cat(self.gathered(values, "parts of a tensor")).to(values.device)

    def interleaved(self, values: Tensor, n: int) -> Tensor:
        """Return what :meth:`turns` dealt, along the last axis, as (..., n) on every rank."""
        if self.size == 1:
            return values
        return dealt_back(self.gathered(values, "a tensor dealt out"), n).to(values.device)

    def columns(self, rows: Tensor, lengths: Sequence[int], width: int) -> Iterator[Tensor]:
        """Yield slices of the columns of a matrix whose rows are spread over the ranks.

        Parameters
        ----------
        rows : Tensor (m, P)
            This rank's.
        lengths : sequence of int
            How many each rank has.
        width : int
            Columns a slice.

        Yields
        ------
        Tensor (M, <= width)
            All rows, and some of the columns; together the ranks see each column once, or
            as zeros beyond the last. To be used before the next is asked for.
        """
        n_columns = rows.shape[1]
        if self.size == 1:
            for start in range(0, n_columns, width):
                yield rows[:, start : start + width]
            return
        width = max(1, min(width, -(-n_columns // self.size)))
        itemsize = rows.element_size()
        sizes = [n * width * itemsize for n in lengths]
        with self.together("the exchange of gradient rows"):  # if there is no room for it, too
            outgoing = rows.new_zeros(self.size, len(rows), width)
            place = self._wire(rows.new_empty(1, dtype=torch.uint8)).device
            received = torch.empty(sum(sizes), dtype=torch.uint8, device=place)
        for start in range(0, n_columns, width * self.size):
            outgoing.zero_()
            for rank in range(self.size):
                piece = rows[:, start + rank * width : start + (rank + 1) * width]
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
        if values.device.type == "cpu" and "cpu" not in backends:
            return values.cuda()
        if values.device.type != "cpu" and backends.get(values.device.type) != "nccl":
            return values.cpu()
        return values

    @contextmanager
    def _reached(self, what: str) -> Iterator[None]:
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"Rank {self.rank} could not reach the other ranks in {what}: one of them ended, or did not come "
                f"within the process group's timeout{self._timeout()}; init_process_group(timeout=...) sets it. All "
                "ranks have to make the same calls; pass process_group=None to work in one process alone. "
                f"torch.distributed says: {error}"
            ) from error

    def _timeout(self) -> str:
        for device in ("cpu", "cuda"):
            try:
                options = self.group._get_backend(torch.device(device)).options
                return f" of {options._timeout.total_seconds():.0f} s"
            except (AttributeError, RuntimeError):
                continue
        return ""


ALONE = Ranks()


def ranks_of(process_group: Any) -> Ranks:
    """Return the ranks of "default" (torch.distributed's group, if there is one), of a group, or of None."""
    if process_group is None or not dist.is_available() or not dist.is_initialized():
        return ALONE
    group = dist.group.WORLD if isinstance(process_group, str) else process_group
    return Ranks(group)


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


def _report(error: BaseException, alike: Sequence[type[Exception]]) -> dict[str, Any]:
    which = [i for i, kind in enumerate(alike) if isinstance(error, kind)]
    return {
        "text": str(error),
        "error": f"{type(error).__name__}: {error}",
        "alike": which[0] if which else None,
    }


def _is_report(item: Any) -> bool:
    return isinstance(item, dict) and item.keys() == {"text", "error", "alike"}


def _shortened(values: Sequence[Any]) -> str:
    texts = [str(v) for v in values]
    return ", ".join(texts[:8]) + (", ..." if len(texts) > 8 else "")
