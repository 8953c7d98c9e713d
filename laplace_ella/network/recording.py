r"""What a plain forward pass does on the way: its precision, and the random numbers it draws."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .memory import attempt

# Coarser types (float8) store weights; what is computed with them has this precision at least.
COARSEST = torch.bfloat16


class Recording(TorchDispatchMode):
    """Record the types of floating-point tensors that operators return, and operators that draw random numbers.

    Attributes
    ----------
    dtypes : set of torch.dtype
    draws : list of str
        The name of an operator for each draw, whichever generator it used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.draws: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            self.draws.append(str(func.overloadpacket.__name__))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.dtypes.add(value.dtype)
        return out


def with_graph(run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], Tensor]]:
    """Run a forward pass, with a graph if one can be recorded; return the outputs, and the function that computed them.

    This is the first pass of all: what a model keeps of it then shows whose weights it came from.

    Raises
    ------
    Exception
        Whatever the forward pass raises.
    """
    recorded = torch.enable_grad()(run)
    f, error = attempt(recorded)
    if f is not None:
        return f, recorded
    f = run()
    _, still = attempt(recorded)
    if error is not None and still is None:
        raise error  # the error is the model's, and has nothing to do with the graph
    return f, run


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the floating-point type with the largest eps, bfloat16 at most; float64 if there is none."""
    floating = [d for d in dtypes if d.is_floating_point or d.is_complex]
    found = max(floating, key=lambda d: torch.finfo(d).eps, default=torch.float64)
    return COARSEST if torch.finfo(found).eps > torch.finfo(COARSEST).eps else found


def python_random_state() -> Any:
    """Return the states of Python's and NumPy's generators, to be compared: no operator shows what they draw."""
    state = np.random.get_state(legacy=False)  # noqa: NPY002 - of the generator that models use
    return random.getstate(), pickle.dumps(state)


def tolerance(*dtypes: torch.dtype) -> float:
    """Return what two ways to compute the same may differ by, relatively, at the coarsest of some precisions."""
    return 3 * math.sqrt(torch.finfo(coarsest(dtypes)).eps)
