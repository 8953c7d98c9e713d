r"""The user's module as a pure function of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Input, Nested, batch_size, detached, doubled
from .calling import Calling
from .interrupts import raise_held_back
from .lookups import Lookups
from .memory import attempt
from .outputs import Axes, channels_last, checked_tensor
from .places import Places, Tree
from .safety import LOCK

Weights = dict[str, Tensor]


def flat(values: Tensor) -> Tensor:
    """Flatten all axes but the first, also where there is no other, or an empty one."""
    return values.reshape(values.shape[0], math.prod(values.shape[1:]))


def is_dense(tensor: Tensor) -> bool:
    """Say whether a tensor's elements fill a piece of memory, each once, in any order of its axes."""
    if tensor.is_contiguous():
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
    """Return the first of ``module.parameters()``, without leaving generators unfinished, which may swallow Ctrl-C."""
    waiting = [module]
    while waiting:
        m = waiting.pop()
        for p in m._parameters.values():
            if p is not None:
                return p
        waiting += [child for child in reversed(m._modules.values()) if child is not None]
    return next(module.parameters())  # there is none: StopIteration


def setting_of(module: nn.Module) -> Any:
    """Tell apart what the same model can support differently: its device, its dtype, and the user's autocast."""
    weight = first_weight(module)
    kind = weight.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return weight.device, weight.dtype, autocast


def n_trainable(module: nn.Module) -> int:
    """Return P, the number of weights that require grad."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def with_batch_statistics(module: nn.Module) -> list[str]:
    """Return the names of the batch normalisations that use the batch's own statistics in evaluation mode too."""
    norms = nn.modules.batchnorm._BatchNorm
    return [k for k, m in module.named_modules() if isinstance(m, norms) and m.running_mean is None]


class FunctionalModel:
    r"""A module seen as :math:`\theta \mapsto f(x; \theta)` over its trainable weights.

    Which weights these are is settled here: some may be frozen later, as they are for serving, and
    others unfrozen. Tied weights appear once, frozen weights not at all. Buffers are handed to the
    module as copies, so that no call can alter them.

    Parameters
    ----------
    module : torch.nn.Module
        Takes a tensor, a mapping or its entries by name; returns what :mod:`laplace_ella.network.outputs` reads. The axes
        between batch and channels, positions in a sequence or an image, are
        flattened: differentiation sees L x C outputs per input.
    names : collection of str, optional
        The names of the weights; by default, of all that require grad now.
    channel_axis : int, optional
        1, if the module returns outputs (B, C, ...).
    calling : Calling, optional
        How the module takes mappings.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Collection[str] | None = None,
        channel_axis: int | None = None,
        calling: Calling | None = None,
    ) -> None:
        self.module, self.channel_axis, self.tree = module, channel_axis, Tree(module)
        self.calling = calling or Calling()
        with LOCK:  # while another thread has them exchanged, none requires grad
            trainable = {k for k, p in self.tree.places().parameters.items() if p.requires_grad}
        found = trainable if names is None else names
        self.names = frozenset(found)
        self.bare = False  # whether outputs have no channel axis
        self.in_pairs = False  # whether single rows are doubled, for a model that squeezes
        self.knows_backward_only = False  # a re-entrant checkpoint does; found out at the first gradient

    def weights(self) -> Weights:
        """Return the weights, detached, in the order of ``parameters()``.

        Slices of larger tensors are copied: forward mode would copy their tangents at every use, and has
        no tangents for tensors that overlap in memory.
        """
        with LOCK:
            found = {k: p.detach() for k, p in self.tree.places().parameters.items() if k in self.names}
        return {k: w if is_dense(w) else w.contiguous() for k, w in found.items()}

    def flat_weights(self) -> Tensor:
        """Return all weights in one vector (P,), in float32 at least: fp16 holds no number above 65504."""
        values = torch.cat([w.reshape(-1) for w in self.weights().values()])
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def own_weights(self) -> dict[str, nn.Parameter]:
        """Return the module's own parameters that are the weights: not what stands in their places."""
        with LOCK:
            return {k: p for k, p in self.tree.places().parameters.items() if k in self.names}

    def buffers(self) -> Weights:
        """Return copies of the buffers."""
        with LOCK:
            return _copies(self.tree.places().buffers)

    def placed(self, weights: Weights, places: Places | None = None) -> Weights:
        """Return all that calls see: these weights, copies of the buffers, and the other parameters, without gradients."""
        with LOCK:
            places = self.tree.places() if places is None else places
            others = {
                k: p.detach() if p.requires_grad else p
                for k, p in places.parameters.items()
                if k not in weights
            }
            return {**others, **_copies(places.buffers), **weights}

    def within(self, weights: Weights | None, action: Callable[[nn.Module, Weights], Any]) -> Any:
        """Run ``action(module, placed)`` while these weights, and copies of the buffers, take the places of the module's own.

        ``placed`` are all tensors that the module then holds, by name; without weights, copies of the buffers. Every
        place is exchanged once, whatever its names: torch.func.functional_call would restore the wrong tensor where
        one submodule is registered twice.
        """
        raise_held_back()
        with LOCK:
            places = self.tree.places()
            placed = _copies(places.buffers) if weights is None else self.placed(weights, places)
        found = [place for place in places.holders if place[2] in placed]
        before = [holder[key] for holder, key, _ in found]
        try:
            for holder, key, name in found:
                holder[key] = placed[name]
            return action(self.module, placed)
        finally:
            for (holder, key, _), tensor in zip(found, before):
                holder[key] = tensor

    def __call__(self, weights: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, L C) at ``weights``; see :meth:`outputs`."""
        return self.outputs(weights, x, **model_kwargs).flatten(1)

    def outputs(self, weights: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, ..., C) at ``weights``, in their own shape.

        Raises
        ------
        ValueError
            If the module returns no tensor with one entry for each input.
        """
        return self.within(weights, lambda module, placed: self.called(module, placed, x, **model_kwargs))

    def called(self, module: nn.Module, placed: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, ..., C) of the module, in whose places ``placed`` stands now."""
        with Lookups():
            return self.outputs_of(module, x, **model_kwargs)

    def outputs_near(self, weights: Weights, offsets: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, ..., C) at the sum of weights and offsets.

        Padding rows of embeddings are looked up in ``weights``, as their derivatives have it.
        """
        moved = {k: w + offsets[k] for k, w in weights.items()}
        held = {id(moved[k]): w for k, w in weights.items()}

        def run(module: nn.Module, _: Weights) -> Tensor:
            with Lookups(held):
                return self.outputs_of(module, x, **model_kwargs)

        return self.within(moved, run)

    def own_outputs(self, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, ..., C) at the module's own weights: a plain forward pass.

        :meth:`outputs` takes longer where layers multiply sequences: by tensors that require no gradient,
        PyTorch multiplies them one by one.
        """
        return self.within(None, lambda module, _: self.outputs_of(module, x, **model_kwargs))

    def outputs_of(self, module: nn.Module, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, ..., C) of the module, with what takes the places of its tensors now."""
        if self.in_pairs and batch_size(x) == 1:
            return self.read(called(self.calling, module, doubled(x), **model_kwargs), doubled(x))[:1]
        return self.read(called(self.calling, module, x, **model_kwargs), x)

    def read(self, f: Tensor, x: Input) -> Tensor:
        """Return outputs (B, ..., C) of the tensor that the module returned for x; (B, n, C) at positions that are picked."""
        self.bare, f = f.ndim == 1, channels_last(f, self.channel_axis)
        if not isinstance(x, Nested) or x.positions is None:
            return f
        rows = f.flatten(1, -2)
        return rows.gather(1, x.positions[..., None].expand(-1, -1, rows.shape[-1]))

    def axes_of(self, f: Tensor) -> Axes:
        """Return the axes that the module's outputs have, given outputs (B, ..., C) of the last call."""
        return Axes(tuple(f.shape[1:-1]), self.channel_axis, self.bare)


def called(calling: Calling, module: nn.Module, x: Input, **model_kwargs: Any) -> Tensor:
    """Call a module as its user does, and return the tensor (B, ...) that it returns.

    Raises
    ------
    ValueError
        If it returns none.
    """
    out = calling(module, x.container() if isinstance(x, Nested) else x, **model_kwargs)
    return checked_tensor(out, batch_size(x))


def last_layer_norms(model: FunctionalModel, x: Input) -> Tensor | None:
    r"""Return :math:`|z|^2` (B,) of the inputs z of the layer that returns the model's outputs.

    None if no layer with weights of its own returns them, row by row. Cost: a forward pass.
    Inside :func:`laplace_ella.network.safety.safely`.
    """
    calls: list[tuple[nn.Module, Any, Any]] = []
    leaves = [m for m in model.module.modules() if any(True for _ in m.parameters(recurse=False))]
    hooks = [m.register_forward_hook(lambda m, args, out: calls.append((m, args, out))) for m in leaves]
    try:
        f, raw = model.within(None, lambda module, _: _with_own(model, module, x))
    finally:
        for hook in hooks:
            hook.remove()
    for m, args, out in calls:
        z = args[0] if args else None
        if out is not raw or not isinstance(z, Tensor) or math.prod(getattr(m, "kernel_size", ())) != 1:
            continue
        # A convolution has its outputs in axis 1, other layers in the last; what is in the other one are positions.
        if raw.ndim > 2 and hasattr(m, "kernel_size") != (model.channel_axis == 1):
            return None
        z = channels_last(z, model.channel_axis)
        if z.shape[:-1] == f.shape[:-1]:
            return z.double().square().sum(-1).flatten()
    return None


def _with_own(model: FunctionalModel, module: nn.Module, x: Input) -> tuple[Tensor, Tensor]:
    """Return the outputs (B, ..., C), and the tensor that they were read from."""
    raw = called(model.calling, module, doubled(x) if model.in_pairs and batch_size(x) == 1 else x)
    return model.read(raw, x)[: batch_size(x)], raw


Pull = Callable[..., Weights]


def backward_passes(model: FunctionalModel, x: Input, action: Callable[[Tensor, Weights, Pull], Any]) -> Any:
    """Run the model once, and let ``action(f, leaves, pull)`` take gradients by plain backward passes.

    ``leaves`` are the weights that f was computed with. ``pull(scalar, names)`` returns the gradient of a
    scalar made from the outputs f with respect to the weights named. This works where torch.func does not:
    with old-style autograd functions, and with re-entrant checkpoints, which know ``backward()`` only.
    If gradients are recorded (``enable_backprop``), the result can be differentiated.
    """
    record = torch.is_grad_enabled()
    leaves = {k: w.requires_grad_() for k, w in model.weights().items()}

    def pull(scalar: Tensor, names: Iterable[str]) -> Weights:
        gradients = _gradients(model, scalar, leaves, record) if scalar.requires_grad else {}
        return {k: _or_zeros(gradients.get(k), leaves[k]) for k in names}

    def run(module: nn.Module, _: Weights) -> Any:
        with torch.enable_grad():
            with Lookups():
                f = model.outputs_of(module, x if record else detached(x)).flatten(1)
            return action(f, leaves, pull)

    return model.within(leaves, run)


def _gradients(
    model: FunctionalModel, scalar: Tensor, leaves: Weights, record: bool
) -> Mapping[str, Tensor | None]:
    if record or not model.knows_backward_only:
        compute = partial(torch.autograd.grad, scalar, list(leaves.values()), allow_unused=True)
        found, error = attempt(lambda: compute(retain_graph=True, create_graph=record))
        if found is not None:
            return dict(zip(leaves, found))
        if record and error is not None:
            raise error
    for leaf in leaves.values():
        leaf.grad = None
    scalar.backward(retain_graph=True)
    model.knows_backward_only = True
    return {k: leaf.grad for k, leaf in leaves.items()}


def _copies(tensors: Weights) -> Weights:
    return {k: (t.detach() if t.requires_grad else t).clone() for k, t in tensors.items()}


def _or_zeros(gradient: Tensor | None, weight: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(weight)
    return gradient if gradient.layout == torch.strided else gradient.to_dense()
