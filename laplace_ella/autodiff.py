r"""The user's module as a pure function of its weights, and the contexts that make it safe.

Everything that runs the model runs inside :func:`safe_autodiff`, which undoes
whatever it switches, exceptions included.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .batches import Input, detached, rows
from .interrupts import contained
from .memory import OutOfMemory
from .norms import ElementaryNorms

Weights = dict[str, Tensor]
Method = TypeVar("Method", bound=Callable[..., Any])

# Train flags, backend switches and torch.func.functional_call act on the whole
# process or the whole module. One re-entrant lock, held while any of them is
# changed, makes the contexts nest strictly: the last one out restores.
_LOCK = threading.RLock()


def exclusively(method: Method) -> Method:
    """Let a method wait until no other thread has the model's weights exchanged."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _LOCK:
            return method(*args, **kwargs)

    return run  # type: ignore[return-value]


def flat(values: Tensor) -> Tensor:
    """Flatten all axes but the first, also where there is no other, or an empty one."""
    return values.reshape(values.shape[0], math.prod(values.shape[1:]))


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel and torch.compile."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(module.module)
    inner = getattr(module, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else module


class _Within(nn.Module):
    """Hands its module to an action, so that weights stay exchanged while more than a forward runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, action: Callable[[nn.Module], Any]) -> Any:
        return action(self.module)


class FunctionalModel:
    r"""A module seen as :math:`\theta \mapsto f(x; \theta)` over its trainable weights.

    Tied weights appear once, frozen weights not at all. Buffers are handed to the
    module as copies, so that no call can alter them.

    Parameters
    ----------
    module : torch.nn.Module
        Takes a tensor or a mapping, returns a tensor (B, ..., C) or an object whose
        ``.logits`` is one. The axes between, positions in a sequence or an image, are
        flattened: differentiation sees L x C outputs an input.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._within = _Within(module)
        self.knows_backward_only = False  # a re-entrant checkpoint does; found out at the first gradient

    def weights(self) -> Weights:
        """Return the weights that require grad, detached, in the order of ``parameters()``."""
        with _LOCK:  # while another thread has them exchanged, none requires grad
            return {k: p.detach() for k, p in self.module.named_parameters() if p.requires_grad}

    def buffers(self) -> Weights:
        """Return copies of the buffers."""
        with _LOCK:
            return {k: b.detach().clone() for k, b in self.module.named_buffers()}

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
        return self.within(
            {**self.buffers(), **weights}, lambda module: outputs_of(module, x, **model_kwargs)
        )

    def own_outputs(self, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (B, ..., C) at the module's own weights: a plain forward pass.

        :meth:`outputs` takes longer where layers multiply sequences: by tensors that require no gradient,
        PyTorch multiplies them one by one.
        """
        return self.within(self.buffers(), lambda module: outputs_of(module, x, **model_kwargs))


def outputs_of(module: nn.Module, x: Input, **model_kwargs: Any) -> Tensor:
    """Run a module, and return its outputs (B, ..., C).

    Raises
    ------
    ValueError
        If the outputs are not a tensor of two axes or more.
    """
    out = module(x, **model_kwargs)
    f = getattr(out, "logits", out)
    if not isinstance(f, Tensor) or f.ndim < 2:
        got = f"shape {tuple(f.shape)}" if isinstance(f, Tensor) else type(f).__name__
        raise ValueError(
            "The model must return a tensor of shape (batch, outputs) or (batch, ..., outputs), or an object "
            f"with such `.logits`; got {got}. Wrap the model so that its forward returns one."
        )
    return f


def last_layer_norms(model: FunctionalModel, x: Input) -> Tensor | None:
    r"""Return :math:`|z|^2` (B,) of the inputs z of the layer whose output are the model's outputs.

    None if no layer with weights of its own returns them, row by row. Cost: a forward pass.
    Inside :func:`safe_autodiff`.
    """
    calls: list[tuple[nn.Module, Any, Any]] = []
    leaves = [m for m in model.module.modules() if any(True for _ in m.parameters(recurse=False))]
    hooks = [m.register_forward_hook(lambda m, args, out: calls.append((m, args, out))) for m in leaves]
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
            return action(outputs_of(module, x if record else detached(x)).flatten(1), leaves, pull)

    return model.within({**model.buffers(), **leaves}, run)


def _accumulated(scalar: Tensor, leaves: Weights) -> dict[str, Tensor | None]:
    for leaf in leaves.values():
        leaf.grad = None
    scalar.backward(retain_graph=True)
    return {k: leaf.grad for k, leaf in leaves.items()}


def _or_zeros(gradient: Tensor | None, weight: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(weight)
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def safe_autodiff(module: nn.Module, enable_backprop: bool = False) -> AbstractContextManager[None]:
    """Make a module's forward pass differentiable in both modes, and change nothing for good.

    Inside: evaluation mode, mathematical attention and no fused fast path (neither
    fused kernel has a forward-mode rule), no fused recurrent kernels if the module
    holds recurrent layers, compiled parts run eagerly, no inference mode, gradients
    recorded only with ``enable_backprop``. Threads take turns.

    Parameters
    ----------
    module : torch.nn.Module
    enable_backprop : bool
        Record a graph, so that gradients can reach the inputs.
    """
    return _Safe(module, enable_backprop)


class _Safe:
    """What :func:`safe_autodiff` returns: no generator, as an interrupt can leave those entered for too long."""

    def __init__(self, module: nn.Module, enable_backprop: bool) -> None:
        self.module, self.enable_backprop = module, enable_backprop
        self._stack = ExitStack()

    def __enter__(self) -> None:
        try:
            self._stack.enter_context(_LOCK)
            self._stack.enter_context(contained())
            _switch_all(self._stack, self.module, self.enable_backprop)
        except BaseException:
            self._stack.__exit__(*sys.exc_info())
            raise

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def __del__(self) -> None:
        self._stack.close()  # if an interrupt came at the first instruction of leaving


def _switch_all(stack: ExitStack, module: nn.Module, enable_backprop: bool) -> None:
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.set_grad_enabled(enable_backprop))
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    mha = torch.backends.mha
    stack.enter_context(switched(mha.get_fastpath_enabled, mha.set_fastpath_enabled, False))
    # Under the user's autocast, every copy of the weights would stay until its end.
    stack.enter_context(switched(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, False))
    stack.enter_context(_without_batching_warnings())
    if _has_compiled_parts(module):
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    # oneDNN's and cuDNN's recurrent kernels have no forward-mode rule; both
    # also run convolutions, so they stay on for every other model.
    if any(isinstance(m, nn.RNNBase) for m in module.modules()):
        stack.enter_context(_disabled(torch.backends.mkldnn))
        stack.enter_context(_disabled(torch.backends.cudnn))
    stack.enter_context(_evaluation_mode(module))
    if enable_backprop:
        stack.enter_context(ElementaryNorms())


@contextmanager
def switched(read: Callable[[], bool], write: Callable[[bool], Any], value: bool) -> Iterator[None]:
    """Give a process-wide switch a value, and its old one back at the end."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


_quiet = 0


@contextmanager
def _without_batching_warnings() -> Iterator[None]:
    # vmap would warn of an operator without batching rule at every call; probing says it once.
    # torch does not tell the flag's value, so that contexts are counted; on is its default.
    global _quiet
    functorch: Any = torch._C._functorch
    _quiet += 1
    functorch._set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        _quiet -= 1
        functorch._set_vmap_fallback_warning_enabled(_quiet == 0)


def _has_compiled_parts(module: nn.Module) -> bool:
    # torch 2.4 and 2.5 cannot be told to run such parts eagerly.
    return hasattr(torch.compiler, "set_stance") and any(hasattr(m, "_orig_mod") for m in module.modules())


@contextmanager
def _disabled(library: Any) -> Iterator[None]:
    # The libraries' own flags() contexts set their TF32 options too, and may warn.
    before = library.enabled
    library.enabled = False
    try:
        yield
    finally:
        library.enabled = before


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    # The flag itself, not .eval(): modules may override train() with side effects
    # (LoRA layers merge their weights there), and each keeps its own flag. Tensors that
    # a forward pass stores would belong to a transform that has ended.
    before = [(m, m.training, dict(vars(m))) for m in module.modules()]
    try:
        for m, _, _ in before:
            m.training = False
        yield
    finally:
        for m, training, attributes in before:
            m.training = training
            _restore_tensors(m.__dict__, attributes)


def _restore_tensors(current: dict[str, Any], before: dict[str, Any]) -> None:
    stored = [k for k, v in current.items() if isinstance(v, Tensor) and before.get(k) is not v]
    for name in stored:
        if name in before:
            current[name] = before[name]
        else:
            del current[name]


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
    does not grow with the batch (weights, masks). Call it inside :func:`safe_autodiff`.
    """
    sizes = []
    for batch in (rows(pair, 0, 1), pair):
        with torch.no_grad(), _TensorSizes() as record:
            model(model.weights(), batch)
        sizes.append(record.nbytes)
    one, two = sizes
    grown = [b - a for a, b in zip(one, two)] if len(one) == len(two) else [b // 2 for b in two]
    return max(1, *grown), max(1, sum(grown))
