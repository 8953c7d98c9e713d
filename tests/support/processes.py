"""Process groups of real processes, which call functions that tests send them.

Processes are forked from a server that has imported torch once, so that a group starts within
a tenth of a second. Every call has a deadline, after which all processes of the group are killed.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

DEADLINE = 60.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed", "laplace_ella"])


@dataclass(frozen=True)
class Outcome:
    """What a rank's call came to: a value, or an error's class, base classes, text and trace."""

    value: Any = None
    error: str | None = None
    bases: tuple[str, ...] = ()
    text: str = ""
    trace: str = ""
    exit_code: int | None = None


def outcome_of(function, *args):
    """Call a function, and tell what came of it."""
    try:
        return Outcome(function(*args))
    except BaseException as error:
        bases = tuple(c.__name__ for c in type(error).__mro__)
        return Outcome(None, type(error).__name__, bases, str(error), traceback.format_exc())


class Group:
    """Processes that form the default process group (gloo) of each other.

    Parameters
    ----------
    size : int
    folder : Path
        For the file by which they find each other.
    timeout : float
        Of the process group, in seconds; by default longer than any call may take.
    """

    def __init__(self, size, folder, timeout=10 * DEADLINE):
        if not dist.is_gloo_available():
            pytest.skip("needs torch.distributed with gloo")
        self.size, self.folder, self.pipes, self.processes = size, folder, [], []
        self.exited = {}
        folder.mkdir(parents=True)
        for rank in range(size):
            pipe, other = _context.Pipe()
            args = (other, rank, size, str(folder), timeout)
            process = _context.Process(target=_serve, args=args, daemon=True)
            process.start()
            other.close()
            self.pipes.append(pipe)
            self.processes.append(process)

    @property
    def alive(self):
        return bool(self.processes) and not self.exited

    def outcomes(self, function, *args, deadline=DEADLINE):
        """Let every rank call a function of a module, and return what came of it, rank by rank.

        A process that ends instead has the outcome "exit". Filters of warnings are those of the test.
        """
        request = pickle.dumps((warnings.filters, function, args))
        end, found = time.monotonic() + deadline, {}
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send_bytes(request)
            except BrokenPipeError:
                found[rank] = self._exit_of(rank)
        while len(found) < self.size:
            waiting = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in found}
            ready = connection.wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                stacks = self._stacks(waiting.values())
                self.kill()
                pytest.fail(f"Ranks {sorted(waiting.values())} did not answer within {deadline} s.\n{stacks}")
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    found[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    found[rank] = self._exit_of(rank)
        return [found[rank] for rank in range(self.size)]

    def __call__(self, function, *args, deadline=DEADLINE):
        """As :meth:`outcomes`, for calls that return on every rank: their values."""
        outcomes = self.outcomes(function, *args, deadline=deadline)
        failed = [f"Rank {rank}: {o.trace or o.error}" for rank, o in enumerate(outcomes) if o.error]
        if failed:
            pytest.fail("\n".join(failed))
        return [o.value for o in outcomes]

    def in_step(self):
        """Tell whether the ranks can still talk, and none has collectives left from before."""
        token = os.urandom(8)
        try:
            return self(_tokens, token, deadline=15) == [[token] * self.size] * self.size
        except pytest.fail.Exception:
            return False

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10)
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []

    def _exit_of(self, rank):
        self.processes[rank].join(10)
        self.exited[rank] = self.processes[rank].exitcode
        return Outcome(error="exit", exit_code=self.exited[rank])

    def _stacks(self, ranks):
        found = []
        for rank in ranks:
            os.kill(self.processes[rank].pid, signal.SIGUSR1)
            self.processes[rank].join(1)
            found.append(f"Rank {rank}:\n{(self.folder / f'stack-{rank}').read_text()}")
        return "\n".join(found)


def _tokens(token):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, token)
    return found


def _serve(pipe, rank, size, folder, timeout):
    torch.set_num_threads(1)
    with open(f"{folder}/stack-{rank}", "w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        if sys.platform == "linux":  # the machine's name need not have an address
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        limit = timedelta(seconds=timeout)
        url = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", init_method=url, rank=rank, world_size=size, timeout=limit)
        while True:
            try:
                request = pipe.recv_bytes()
            except EOFError:
                os._exit(0)  # without waiting for other ranks
            pipe.send_bytes(pickle.dumps(outcome_of(_answer, request)))


def _answer(request):
    filters, function, args = pickle.loads(request)
    with warnings.catch_warnings():
        warnings.resetwarnings()
        for action, message, category, module, line in filters:
            texts = (getattr(pattern, "pattern", pattern) or "" for pattern in (message, module))
            message, module = texts
            warnings.filterwarnings(action, message, category, module, line, append=True)
        torch.manual_seed(0)
        return function(*args)
