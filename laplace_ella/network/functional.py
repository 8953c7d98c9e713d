r"""The user's module as a pure function of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from ..data.batches import Input, Nested, batch_size, detached, doubled, rows
from .lookups import Lookups
from .memory import OutOfMemory
from .module_state import Watch
from .safety import LOCK

Weights = dict[str, Tensor]


def flat(values: Tensor) -> Tensor:
    """Flatten all axes but the first, also where there is no other, or an empty one."""
    return values.reshape(values.shape[0], math.prod(values.shape[1:]))


def is_dense(tensor: Tensor) -> bool:
    """Say whether a tensor's elements fill a piece of memory, each once, in any order of its axes."""
    if not tensor.numel():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel and torch.compile."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(module.module)
    inner = getattr(module, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else module


def first_weight(module: nn.Module) -> nn.Parameter:
    """Return the first of ``module.parameters()``, without the five generators that are made and closed for that."""
    waiting = [module]
    while waiting:
        m = waiting.pop()
        for p in m._parameters.values():
            if p is not None:
                return p
        waiting += [child for child in reversed(m._modules.values()) if child is not None]
    return next(module.parameters())  # there is none: StopIteration


def n_trainable(module: nn.Module) -> int:
    """Return P, the number of weights that require grad."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class _Within(nn.Module):
    """Hands its module to an action, so that weights stay exchanged while more than a forward runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, action: Callable[[nn.Module], Any]) -> Any:
        return action(self.module)


class FunctionalModel:
    r"""A module seen as :math:`\theta \mapsto f(x; \theta)` over its trainable weights.

    Which these are is settled here: parameters may be frozen later, as they are for serving, or
    others unfrozen. Tied weights appear once, frozen weights not at all. Buffers are handed to the
    module as copies, so that no call can alter them.

    Parameters
    ----------
    module : torch.nn.Module
        Takes a tensor or a mapping, returns a tensor (B, ..., C) or an object whose
        ``.logits`` is one. The axes between, positions in a sequence or an image, are
        flattened: differentiation sees L x C outputs an input.
    names : collection of str, optional
        Of the weights. By default all that require grad now.
    """

    def __init__(self, module: nn.Module, names: Collection[str] | None = None) -> None:
        self.module = module
        self._within = _Within(module)
        with LOCK:  # while another thread has them exchanged, none requires grad
            found = {k for k, p in module.named_parameters() if p.requires_grad} if names is None else names
        self.names = frozenset(found)
        self.in_pairs = False  # whether single rows are doubled, for a model that squeezes
        self.knows_backward_only = False  # a re-entrant checkpoint does; found out at the first gradient

    def weights(self) -> Weights:
        """Return the weights, detached, in the order of ``parameters()``.

        Slices of larger tensors are copied: forward mode would copy their tangents at every use, and has
        no tangents for tensors that overlap in memory.
        """
        with LOCK:
            found = {k: p.detach() for k, p in self.module.named_parameters() if k in self.names}
        return {k: w if is_dense(w) else w.contiguous() for k, w in found.items()}

    def own_weights(self) -> dict[str, nn.Parameter]:
        """Return the module's own parameters that are the weights: not what stands in their places."""
        with LOCK:
            return {k: p for k, p in self.module.named_parameters() if k in self.names}

    def buffers(self) -> Weights:
        """Return copies of the buffers."""
        with LOCK:
            return {k: b.detach().clone() for k, b in self.module.named_buffers()}

    def constants(self) -> Weights:
        """Return what calls see besides the weights: the buffers' copies, and parameters unfrozen later, detached."""
        with LOCK:
            named = self.module.named_parameters()
            late = {k: p.detach() for k, p in named if p.requires_grad and k not in self.names}
            return {**late, **self.buffers()}

    def within(self, tensors: Weights, action: Callable[[nn.Module], Any]) -> Any:
        """Run ``action(module)`` while ``tensors`` take the places of weights and buffers.

        Every place is exchanged once, whatever its names: functional_call would restore
        the wrong tensor where one submodule is registered twice.
        """
        named = chain(self.module.named_parameters(), self.module.named_buffers())
        new = {id(t): tensors[k] for k, t in named if k in tensors}
        places = {
            f"module.{prefix}.{k}" if prefix else f"module.{k}": new[id(t)]
            for prefix, m in self.module.named_modules()
            for k, t in chain(m._parameters.items(), m._buffers.items())
            if id(t) in new
        }
        return functional_call(self._within, places, (action,), tie_weights=False)

    def __call__(self, weights: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, L C) at ``weights``; see :meth:`outputs`."""
        return self.outputs(weights, x, **model_kwargs).flatten(1)

    def outputs(self, weights: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, ..., C) at ``weights``, in their own shape.

        Raises
        ------
        ValueError
            If the outputs are not a tensor of two axes or more.
        """
        return self._outputs_in(Lookups(), weights, x, **model_kwargs)

    def outputs_near(self, weights: Weights, offsets: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, ..., C) at the sum of weights and offsets.

        Padding rows of embeddings are looked up in ``weights``, as their derivatives have it.
        """
        moved = {k: w + offsets[k] for k, w in weights.items()}
        held = {id(moved[k]): w for k, w in weights.items()}
        return self._outputs_in(Lookups(held), moved, x, **model_kwargs)

    def _outputs_in(self, lookups: Lookups, weights: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        def run(module: nn.Module) -> Tensor:
            with lookups:
                return self.outputs_of(module, x, **model_kwargs)

        return self.within({**self.constants(), **weights}, run)

    def own_outputs(self, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, ..., C) at the module's own weights: a plain forward pass.

        :meth:`outputs` takes longer where layers multiply sequences: by tensors that require no gradient,
        PyTorch multiplies them one by one.
        """
        return self.within(self.buffers(), lambda module: self.outputs_of(module, x, **model_kwargs))

    def outputs_of(self, module: nn.Module, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, ..., C) of the module, with what takes the places of its tensors now."""
        if self.in_pairs and batch_size(x) == 1:
            return outputs_of(module, doubled(x), **model_kwargs)[:1]
        return outputs_of(module, x, **model_kwargs)


def called(module: nn.Module, x: Input, **model_kwargs: Any) -> Any:
    """Call a module as its user does; a container is made anew for every call."""
    return module(x.container() if isinstance(x, Nested) else x, **model_kwargs)


def outputs_of(module: nn.Module, x: Input, **model_kwargs: Any) -> Tensor:
    """Run a module, and return its outputs (B, ..., C).

    Raises
    ------
    ValueError
        If the outputs are not a tensor of two axes or more.
    """
    out = called(module, x, **model_kwargs)
    f = getattr(out, "logits", out)
    if not isinstance(f, Tensor) or f.ndim < 2:
        got = f"shape {tuple(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
        raise ValueError(
            "The model must return a tensor of shape (batch, outputs) or (batch, ..., outputs), or an object "
            f"with such `.logits`; got {got}. Wrap the model so that its forward returns one; a squeeze() without an "
            "axis drops the batch axis of a single input."
        )
    if not f.is_floating_point():
        raise ValueError(
            f"The model's outputs must be floating-point numbers that its weights change; got {f.dtype}. Return logits "
            "or means instead of what is made of them (argmax, rounding)."
        )
    return f


def last_layer_norms(model: FunctionalModel, x: Input) -> Tensor | None:
    r"""Return :math:`|z|^2` (B,) of the inputs z of the layer whose output are the model's outputs.

    None if no layer with weights of its own returns them, row by row. Cost: a forward pass.
    Inside :func:`laplace_ella.network.safety.safely`.
    """
    calls: list[tuple[nn.Module, Any, Any]] = []
    leaves = [m for m in model.module.modules() if any(True for _ in m.parameters(recurse=False))]
    hooks = [m.register_forward_hook(Watch(calls)) for m in leaves]
    try:
        f = model.own_outputs(x)
    finally:
        for hook in hooks:
            hook.remove()
    for _, args, out in calls:
        z = args[0] if args else None
        if out is f and isinstance(z, Tensor) and z.shape[:-1] == f.shape[:-1]:
            return z.double().square().sum(-1).flatten()
    return None


Pull = Callable[..., Weights]


def backward_passes(model: FunctionalModel, x: Input, action: Callable[[Tensor, Weights, Pull], Any]) -> Any:
    """Run the model once, and let ``action(f, leaves, pull)`` take gradients by plain backward passes.

    ``leaves`` are the weights f was computed with. ``pull(scalar, names)`` returns the
    gradient of a scalar made from the outputs f with respect to the weights named. Works where torch.func does not: with old-style
    autograd functions, and with re-entrant checkpoints, which know ``backward()`` only.
    If gradients are recorded (``enable_backprop``), the result can be differentiated.
    """
    record = torch.is_grad_enabled()
    leaves = {k: w.requires_grad_() for k, w in model.weights().items()}

    def pull(scalar: Tensor, names: Iterable[str]) -> Weights:
        gradients: dict[str, Tensor | None]
        if not scalar.requires_grad:
            gradients = dict.fromkeys(leaves)
        elif not record and model.knows_backward_only:
            gradients = _accumulated(scalar, leaves)
        else:
            try:
                found = torch.autograd.grad(
                    scalar, list(leaves.values()), retain_graph=True, create_graph=record, allow_unused=True
                )
            except OutOfMemory:
                raise
            except RuntimeError:
                if record:
                    raise
                gradients = _accumulated(scalar, leaves)
                model.knows_backward_only = True
            else:
                gradients = dict(zip(leaves, found))
        return {k: _or_zeros(gradients[k], leaves[k]) for k in names}

    def run(module: nn.Module) -> Any:
        with torch.enable_grad():
            with Lookups():
                f = model.outputs_of(module, x if record else detached(x)).flatten(1)
            return action(f, leaves, pull)

    return model.within({**model.constants(), **leaves}, run)


def _accumulated(scalar: Tensor, leaves: Weights) -> dict[str, Tensor | None]:
    for leaf in leaves.values():
        leaf.grad = None
    scalar.backward(retain_graph=True)
    return {k: leaf.grad for k, leaf in leaves.items()}


def _or_zeros(gradient: Tensor | None, weight: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(weight)
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


class _TensorSizes(TorchDispatchMode):
    """Record the bytes behind every tensor that an operator returns; a view has those of its base."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[int] = []
        self.seen: dict[int, Any] = {}  # keeps them, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        values = out if isinstance(out, (tuple, list)) else [out]
        for v in values:
            if isinstance(v, Tensor) and v.layout == torch.strided:
                storage = v.untyped_storage()
                # A view, or a result written in place, takes no memory of its own.
                self.nbytes.append(0 if storage.data_ptr() in self.seen else storage.nbytes())
                self.seen[storage.data_ptr()] = storage
        return out


def activation_bytes(model: FunctionalModel, pair: Input) -> tuple[int, int]:
    """Return the bytes one row takes in the largest intermediate tensor, and in all of them.

    Parameters
    ----------
    pair : input of two rows

    Notes
    -----
    Cost: a forward pass of one row and one of two. Their difference leaves out what
    does not grow with the batch (weights, masks). Call it inside :func:`laplace_ella.network.safety.safely`.
    """
    sizes, n_rows = [], 2 if model.in_pairs else 1
    for batch in (pair, doubled(pair)) if model.in_pairs else (rows(pair, 0, 1), pair):
        with torch.no_grad(), _TensorSizes() as record:
            model(model.weights(), batch)
        sizes.append(record.nbytes)
    one, two = sizes
    grown = [b - a for a, b in zip(one, two)] if len(one) == len(two) else [b // 2 for b in two]
    return max(1, max(grown) // n_rows), max(1, sum(grown) // n_rows)
