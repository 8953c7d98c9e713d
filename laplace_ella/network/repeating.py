r"""The test that the forward pass is a function of its input and the weights, and not random."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Input
from .functional import FunctionalModel
from .recording import Recording, coarsest, python_random_state, with_graph

# A pass that draws random numbers is repeated this often: a layer that is left out with a probability of 1/20 makes
# no difference at first. A fit takes some hundred times as long.
PASSES = 128


def plain_passes(model: FunctionalModel, x: Input) -> tuple[Tensor, torch.dtype]:
    """Run the module twice at its own weights, recording a graph if it can.

    Returns
    -------
    f : Tensor (B, ..., C)
    precision : torch.dtype
        The coarsest floating-point type on the way, weights included.

    Raises
    ------
    ValueError
        If the passes differ, saying what is random.
    Exception
        Whatever the forward pass raises.

    Notes
    -----
    Kernels that add in no fixed order, as GPUs have, are not random: outputs may differ by rounding.
    Cost: two forward passes; 128 if random numbers are drawn that make no difference.
    """
    record, state = Recording(), python_random_state()
    with record:
        f, run = with_graph(lambda: model.own_outputs(x))
    precision = coarsest({*record.dtypes, *(w.dtype for w in model.weights().values())})
    drawn = bool(record.draws) or python_random_state() != state
    for _ in range(PASSES - 1 if drawn else 1):
        gap = _gap(f, run(), torch.finfo(precision).eps, drawn)
        if gap:
            raise ValueError(
                "The forward pass is random, also in evaluation mode: the same input twice gave outputs that differ by "
                f"up to {gap:.3g}. {_culprit(model, x, record.draws)} Linearised Laplace needs outputs that follow from the input and the "
                "weights, whichever way they are differentiated. Let the layer follow the module's mode "
                "(F.dropout(x, p, training=self.training)), or draw its numbers once and keep them in a buffer."
            )
    return f, precision


def _gap(left: Tensor, right: Tensor, eps: float, drawn: bool) -> float:
    """Return the largest difference of outputs if it is more than rounding, else 0."""
    a, b = left.detach().double(), right.detach().double()
    if a.shape != b.shape:
        return float("inf")
    difference = torch.where(a == b, 0, a - b)  # infinities may be equal
    tolerance = min(100 * eps, eps**0.5) if drawn else eps**0.5
    if not difference.isfinite().all():
        return 0.0 if torch.equal(a.isfinite(), b.isfinite()) else float("inf")
    return float(difference.abs().max()) if difference.norm() > tolerance * b.norm() else 0.0


class _Followed:
    """What the modules took and returned in one plain pass, innermost calls first."""

    def __init__(self, model: FunctionalModel, x: Input) -> None:
        self.names = {
            id(m): f"module {k!r} ({type(m).__name__})" for k, m in model.module.named_modules() if k
        }
        self.entered: list[list[Tensor]] = []
        # A call is known by its module and its number.
        self.calls: dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]] = {}
        with ExitStack() as stack:
            for m in model.module.modules():
                stack.callback(m.register_forward_pre_hook(self._enter).remove)
                stack.callback(m.register_forward_hook(self._leave).remove)
            model.own_outputs(x)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.entered.append(_copies(args))

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        where = self.names.get(id(module), "the model's own forward()")
        number = sum(name == where for name, _ in self.calls)
        self.calls[where, number] = self.entered.pop(), _copies(out)


def _copies(values: Any) -> list[Tensor]:
    found = values if isinstance(values, (tuple, list)) else [values]
    return [v.detach().clone() for v in found if isinstance(v, Tensor)]


def _culprit(model: FunctionalModel, x: Input, draws: list[str]) -> str:
    """Say what is random: what draws, and the first module that returns something else for equal inputs."""
    drawn = f"Random numbers are drawn by {', '.join(dict.fromkeys(draws[:3]))}(). " if draws else ""
    first = _Followed(model, x)
    for _ in range(PASSES):
        again = _Followed(model, x)
        for call, (taken, returned) in first.calls.items():
            other = again.calls.get(call)
            if other is not None and _equal(taken, other[0]) and not _equal(returned, other[1]):
                return f"{drawn}The first difference arises in {call[0]}."
    return drawn.strip() or "torch draws no random numbers, so they come from elsewhere."


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    pairs = zip(left, right)
    return len(left) == len(right) and not any(_gap(a, b, _eps(a), drawn=False) for a, b in pairs)


def _eps(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps if t.is_floating_point() or t.is_complex() else 0.0
