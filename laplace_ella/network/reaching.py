r"""The test that a module's places reach its weights.

Features, landmark gradients and weight samples run the module while other tensors
stand in the places of its weights. Where the forward pass finds a weight elsewhere
(an alias in a list, a closure, a value computed from it and kept), the weight itself
still takes part, as a constant: features lack its share, in forward and in reverse
mode alike. What a backward pass of exchanged weights finds of the module's own is
exactly that share.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Input
from .caches import caches_emptied
from .functional import FunctionalModel, Pull, Weights, backward_passes
from .memory import attempt

# Names of the nodes in a graph that torch's own operators leave.
OWN_NODES = re.compile(r"\w+Backward\d+|AccumulateGrad")


def check_reached(model: FunctionalModel, x: Input, plain: Tensor) -> None:
    """Require that a forward pass with exchanged weights knows nothing of the module's own.

    Parameters
    ----------
    plain : Tensor
        The outputs of a plain forward pass before, which recorded a graph: had the module kept a value
        computed from weights, it would hold the graph of the module's own.

    Raises
    ------
    ValueError
        If it does, naming the weights.

    Warns
    -----
    UserWarning
        If the module uses tensors that it kept before, without a graph, in place of weights.

    Notes
    -----
    Cost: a forward pass; a backward pass too, where functions that are not torch's own may hide graphs. The gradients and hooks of the module's own weights stay out of it.
    """
    own = model.own_weights()
    missed = _missed(model, x, own)
    if missed:
        raise ValueError(
            f"The forward pass reads {_list(missed)} elsewhere than from the attributes of the modules that own them: "
            "through an alias in a plain list or dict, a closure, or a value computed from them and kept (a cache, "
            "functools.lru_cache). Exchanging weights, by which derivatives and weight samples are computed, does not "
            "reach those, so that features would lack their share. Read the weights as module attributes "
            "(self.layer.weight), and compute what depends on them in every forward pass."
        )
    if not model.knows_backward_only:  # such graphs do not show what is inside
        _warn_of_constants(model, x, plain, own)


def _missed(model: FunctionalModel, x: Input, own: dict[str, nn.Parameter]) -> list[str]:
    """Return the names of the module's own weights that take part while others stand in their places."""

    def found(f: Tensor, leaves: Weights, pull: Pull) -> list[str]:
        names = _in_graph(f, own)
        if names or not _hides_graphs(f):
            return names
        _, error = attempt(
            lambda: torch.autograd.grad(f.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        )
        return [] if error is None else _by_backward(f, own, pull)

    with torch.no_grad():
        # A model without a backward pass is none of this test's business.
        names, _ = attempt(lambda: backward_passes(model, x, found))
    return names or []


def _by_backward(f: Tensor, own: dict[str, nn.Parameter], pull: Pull) -> list[str]:
    # A re-entrant checkpoint has a graph within the graph, which shows in what is accumulated only.
    before = [(k, p, p.grad) for k, p in own.items() if p.is_leaf]
    try:
        for _, p, _ in before:
            p.grad = None
        pull(f.sum(), ())
        return [k for k, p, _ in before if p.grad is not None]
    finally:
        for _, p, gradient in before:
            p.grad = gradient


def _nodes(f: Tensor) -> set[Any]:
    """Return the nodes of the graph that leads to ``f``."""
    seen, waiting = set(), [f.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return seen


def _in_graph(f: Tensor, own: dict[str, nn.Parameter]) -> list[str]:
    """Return the names of weights that lead to ``f``, without a backward pass."""
    # Nodes that accumulate the gradient of a leaf have it as their variable.
    reached = {id(getattr(node, "variable", None)) for node in _nodes(f)}
    return [k for k, p in own.items() if id(p) in reached]


def _hides_graphs(f: Tensor) -> bool:
    """Tell whether there may be a graph within the graph: in functions other than torch's own, as a checkpoint is one."""
    kinds = {type(node) for node in _nodes(f)}
    return any(kind.__module__ != "builtins" or not OWN_NODES.fullmatch(kind.__name__) for kind in kinds)


def _warn_of_constants(model: FunctionalModel, x: Input, plain: Tensor, own: dict[str, nn.Parameter]) -> None:
    part = _in_graph(plain, own)
    without_part = {k: p for k, p in own.items() if k not in part}
    if not without_part:
        return
    with caches_emptied(model.module) as caches, torch.enable_grad():
        again, _ = attempt(lambda: model.own_outputs(x)) if caches else (None, None)
    names = [] if again is None else _in_graph(again, without_part)
    if names:
        warnings.warn(
            f"The outputs do not depend on {_list(names)}, because the model uses what it kept, without a graph, in "
            f"{_list(caches)}. These weights count as constants, as they do for autograd. Empty what the model "
            "keeps, and compute it in every forward pass, if the posterior should know them.",
            stacklevel=4,
        )


def _list(names: Iterable[str]) -> str:
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:8]) + (f" and {len(quoted) - 8} more" if len(quoted) > 8 else "")
