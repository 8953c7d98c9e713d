r"""How a batch is cut into its inputs: read off the shapes, and made sure of on the model itself.

Everything here works on single inputs of a batch, which the model has never seen alone. That an
entry of a mapping as long as the batch has one value for each input, that the outputs of an
input depend on this input only, that the model leaves its inputs as they are, and in which
dtype it takes them, are assumptions; the first batch of every kind shows whether they hold.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import partial
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import (
    Input,
    Nested,
    Path,
    Raw,
    batch_size,
    check_tensors,
    copied,
    detached,
    doubled,
    inputs_between,
    leaves,
    moved,
    name_of,
    nested,
    raw_size,
    tensors,
)
from ..data.input_lists import input_lists, rotated
from .functional import FunctionalModel, first_weight, setting_of, with_batch_statistics
from .memory import attempt
from .recording import Recording, coarsest, with_graph
from .repeating import plain_passes
from .safety import safely

# At most this many ways of reading a mapping are tried.
READINGS = 32
# At most this many inputs are looked at where a batch is one tensor: then it is known how it is cut.
TENSOR_INPUTS = 8


class Cutting:
    """Cuts batches of one model into their inputs.

    Parameters
    ----------
    function : FunctionalModel
    dict_key_x : str
        The entry of mappings that has one value for each input.
    """

    def __init__(self, function: FunctionalModel, dict_key_x: str = "input_ids") -> None:
        self.function, self.dict_key_x = function, dict_key_x
        self._warned = False
        self.forget()

    def forget(self) -> None:
        """Find everything out again, the model having changed."""
        self._shared: set[Path] = set()  # entries known not to be cut
        self._unused: set[Path] = set()  # lists whose order does not matter to the model
        self._known: dict[Any, torch.dtype | None] = {}  # kinds of batches, and what they are converted to

    def knowledge(self) -> Any:
        """Return what was found out about the model's inputs, for :meth:`learn`."""
        found = self._shared, self._unused, self._known, self._warned
        return (*map(copy, found), self.function.in_pairs, self.function.calling.by_name)

    def learn(self, knowledge: Any) -> None:
        """Take over what was found out about a copy of the model."""
        self._shared, self._unused, self._known, self._warned, *of_function = knowledge
        self.function.in_pairs, self.function.calling.by_name = of_function

    def __call__(self, x: Raw | Input, size: int | None = None) -> Input:
        """Say which tensors of a batch are cut.

        Parameters
        ----------
        x : tensor, mapping, or what this method returned
        size : int, optional
            How many inputs there are, if that is known.

        Raises
        ------
        Exception
            Whatever the model raises.
        ValueError
            If it is neither a tensor nor a mapping, holds tensors that cannot be cut, or the model does not
            treat its inputs one by one.

        Notes
        -----
        Cost: for the first batch of a kind (with these entries and dtypes), two or three forward passes of it
        (of eight inputs if it is a tensor), and some of one or two inputs.
        """
        if isinstance(x, Nested):
            return x
        if not isinstance(x, (Tensor, Mapping)):
            raise ValueError(
                f"The model's input must be a tensor or a mapping of tensors; got {type(x).__name__}."
            )
        check_tensors(x, "The inputs")
        guess = _cut(x, self._paths(x, size or self._size(x)))
        n = batch_size(guess)
        empty = n == 0 and (isinstance(guess, Tensor) or bool(guess.cut))
        known = self._kind(guess) in self._known and not any(self._lists(x, n))
        return guess if empty or known else self._verified(x, size)

    def to_model(self, x: Raw | Input, device: torch.device) -> Input:
        """Cut a batch, move it to the model's device, and convert it if the model does not take it as it is."""
        x = self(x)
        return moved(x, device, self._known.get(self._kind(x)))

    def _size(self, x: Raw) -> int:
        """Return how many inputs a batch holds, as far as that is known without the model."""
        if isinstance(x, Mapping) and self.dict_key_x not in x:
            for path, leaf in leaves(x):
                if isinstance(leaf, Tensor) and leaf.ndim and path not in self._shared:
                    return len(leaf)
        return raw_size(x, self.dict_key_x)

    def _paths(self, x: Raw, size: int) -> list[Path]:
        """Return the paths of the tensors that may be cut into so many inputs."""
        return [
            path
            for path, leaf in leaves(x)
            if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size and path not in self._shared
        ]

    def _lists(self, x: Raw, size: int) -> Iterator[Path]:
        """Yield the paths of lists that have one value for each input, and that the model may use."""
        if isinstance(x, Mapping):
            yield from (path for path, _ in input_lists(x, size) if path not in self._unused)

    def _kind(self, x: Input) -> Any:
        """Tell apart what the model may treat differently: its setting, entries and how they are cut, dtypes."""
        setting = setting_of(self.function.module)
        if isinstance(x, Tensor):
            return setting, x.dtype
        shared = tuple((path, getattr(leaf, "dtype", None)) for path, leaf in x.shared())
        return setting, x.paths, shared, tuple(t.dtype for t in x.cut)

    # ------------------------------------------------------------------ at the first batch of a kind

    def _verified(self, x: Raw, size: int | None) -> Input:
        some = x[:TENSOR_INPUTS] if isinstance(x, Tensor) else x
        f, dtype, paths = safely(self.function.module, lambda: self._confirmed(some, size))
        cut = _cut(x, paths)
        self._known[self._kind(cut)] = self._known[self._kind(_converted(cut, dtype))] = dtype
        # Where there is one input, all tensors of length 1 are cut, shared or not.
        if isinstance(cut, Nested) and len(f) > 1:
            self._shared |= {path for path, leaf in cut.shared() if isinstance(leaf, Tensor)}
        return cut

    def _confirmed(self, x: Raw, size: int | None) -> tuple[Tensor, torch.dtype | None, list[Path]]:
        """Return the outputs of a batch, the dtype that inputs are converted to, and the entries that are cut."""
        n = len(x) if isinstance(x, Tensor) else size
        single = (n or self._size(x)) == 1  # a single input may have to be doubled
        whole = _cut(x, self._paths(x, 1) if single else [])
        device = first_weight(self.function.module).device
        with Recording() as record:
            f, dtype = self._plain_outputs(moved(detached(whole), device))
        if n is not None and len(f) != n:
            raise ValueError(
                f"The model returned outputs of shape {tuple(f.shape)} for {n} inputs; their first axis must be the "
                "batch, with one entry for each input. Wrap the model so that its forward returns such outputs."
            )

        def enter(cut: Input) -> Input:
            return moved(detached(cut), device, dtype)

        eps = _coarsest_eps(f, record.dtypes, self.function.module)
        paths = self._reading(x, f, enter, eps)
        for path in list(self._lists(x, len(f))):
            # The outputs must be the same when the values of a list have changed places.
            found, _ = attempt(partial(self._run, enter(nested(rotated(x, path), []))))
            bound = 100 * torch.finfo(f.dtype).eps * f.abs().max()  # sums may be in another order
            if found is None or found.shape != f.shape or (found - f).abs().max() > bound:
                raise ValueError(_refusal(x, paths, f))
            self._unused.add(path)
        return f, dtype, paths

    def _plain_outputs(self, x: Input) -> tuple[Tensor, torch.dtype | None]:
        """Run the model as its user does, and return its outputs, and the dtype that inputs are converted to."""
        run = partial(self._run, x)
        # A tensor was cut to a few inputs; the graph of a mapping, which is whole, may not fit.
        f, error = attempt(lambda: with_graph(run)[0].detach() if isinstance(x, Tensor) else run())
        if f is None:
            f = self._in_pairs(x)
        if f is not None:
            return f, None
        assert error is not None
        reference = first_weight(self.function.module).dtype
        others = {t.dtype for t in tensors(x) if t.is_floating_point() and t.dtype != reference}
        if others:
            f, _ = attempt(lambda: self._run(_converted(x, reference)))
            if f is not None:
                self._say_converted(others, reference, error)
                return f, reference
        self._refuse_dtype(x, reference, error)
        raise error

    def _in_pairs(self, x: Input) -> Tensor | None:
        """Return the outputs of a single input that the model takes only beside another, and remember that."""
        if batch_size(x) != 1 or self.function.in_pairs:
            return None
        self.function.in_pairs = True
        f, error = attempt(lambda: self._run(x))
        self.function.in_pairs = error is None
        return f

    def _say_converted(self, others: set[torch.dtype], reference: torch.dtype, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"The model does not take inputs of {', '.join(sorted(map(str, others)))}, so that they are converted to "
            f"{reference}, the dtype of its first weight. Convert them in the data set to silence this. The reason: {reason}",
            stacklevel=2,
        )

    def _refuse_dtype(self, x: Input, reference: torch.dtype, error: Exception) -> None:
        """Say what is wrong with inputs whose dtype the model does not take, if that is what failed."""
        if isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex():
            f, _ = attempt(lambda: self._run(x.to(reference)))
            if f is not None:
                raise ValueError(
                    f"The model does not take inputs of {x.dtype}, and takes {reference}. Convert them in the data set, "
                    "with the scale that the model was trained with."
                ) from error
        of_complex = {str(t.dtype) for t in tensors(x) if t.is_complex()}
        if of_complex:
            raise ValueError(
                f"The model does not take inputs of {', '.join(sorted(of_complex))}. Pass real and imaginary parts as real numbers."
            ) from error

    def _run(self, x: Input) -> Tensor:
        """Run the model on copies, and require that it leaves them as they are."""
        given = copied(x)
        f = self.function.own_outputs(given)
        names = [""]
        if isinstance(x, Nested):
            shared = [path for path, leaf in x.shared() if isinstance(leaf, Tensor)]
            names = [f" under {name_of(path)}" for path in (*x.paths, *shared)]
        entries = zip(tensors(given), tensors(x), names)
        # Whether anything is written may depend on the values: a count of writes tells too.
        changed = [name for t, old, name in entries if t._version or not torch.equal(t, old)]
        if changed:
            raise ValueError(
                f"The model's forward pass changes its input{', '.join(changed)} in place, and every input is passed to it many "
                "times. Let it work on a copy: x = x - mean instead of x -= mean, or a first layer with inplace=False."
            )
        return f

    def _reading(self, x: Raw, f: Tensor, enter: Callable[[Input], Input], eps: float) -> list[Path]:
        """Return the entries that are cut, so that inputs alone have the outputs that they have in the batch."""
        readings = [[]] if isinstance(x, Tensor) else list(islice(self._readings(x, len(f)), READINGS))
        for paths in readings:
            if self._agrees(enter(_cut(x, paths)), f, eps):
                return paths
        if not readings:
            raise ValueError(
                f"The model returned outputs of shape {tuple(f.shape)}, and the input has no tensor of length {len(f)}; one "
                "must have an entry for each input."
            )
        if not with_batch_statistics(self.function.module):  # probing warns of these
            plain_passes(self.function, enter(_cut(x, readings[0])))  # is it random?
            raise ValueError(_refusal(x, readings[0], f))
        return readings[0]

    def _readings(self, x: Mapping[str, Any], size: int) -> Iterator[list[Path]]:
        """Yield sets of entries that may be cut: all that are long enough, then fewer."""
        paths = self._paths(x, size)
        for left_out in range(len(paths)):
            for shared in combinations(paths[::-1], left_out):
                kept = [path for path in paths if path not in shared]
                if self.dict_key_x not in x or any(path[0] == self.dict_key_x for path in kept):
                    yield kept

    def _agrees(self, x: Input, f: Tensor, eps: float) -> bool:
        """Tell whether the first and the last input, alone, have the outputs that they have in the batch."""
        for i in {0, len(f) - 1}:
            alone = inputs_between(x, i, i + 1)
            found, _ = attempt(partial(self._run, doubled(alone)))
            if found is None or not _alike(found, f[[i, i]], f, eps):
                return False
            single, _ = attempt(partial(self.function.own_outputs, copied(alone)))
            # A model that squeezes loses the batch axis of a single input.
            self.function.in_pairs |= single is None or single.shape != f[:1].shape
        return True


def _cut(x: Raw, paths: list[Path]) -> Input:
    return x if isinstance(x, Tensor) else nested(x, paths)


def _refusal(x: Raw, paths: list[Path], f: Tensor) -> str:
    """Say that the inputs of a batch are not treated one by one."""
    cause = "The outputs of an input depend on the other inputs of its batch"
    whole = [] if isinstance(x, Tensor) else [entry for entry in leaves(x) if entry[0] not in paths]
    if whole:
        named = ", ".join(f"{name_of(path)} ({_describe(leaf)})" for path, leaf in whole)
        cause += f", or on entries that cannot be cut into {len(f)} inputs: {named}"
    return (
        f"{cause}: alone, it has other outputs than in the batch. Every prediction here is of inputs on their own. Pass "
        "tensors whose first axis is the batch (lists of lengths as a tensor, graphs as padded tensors with masks), "
        "and models that treat inputs one by one."
    )


def _converted(x: Input, dtype: torch.dtype | None) -> Input:
    return x if dtype is None else moved(x, tensors(x)[0].device, dtype)


def _describe(leaf: Any) -> str:
    return f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__


def _alike(found: Tensor, expected: Tensor, f: Tensor, eps: float) -> bool:
    """Tell whether outputs differ by rounding only, compared with how much those of other inputs differ."""
    if found.shape != expected.shape:
        return False
    scale, spread = f.double().abs().max(), (f.double() - f.double().mean(0)).abs().max()
    bound = min(300 * eps, math.sqrt(eps)) * scale + 3 * math.sqrt(eps) * spread
    difference = (found.double() - expected.double()).abs().max()
    return bool(difference <= bound) or not bool(f.isfinite().all())


def _coarsest_eps(f: Tensor, recorded: set[torch.dtype], module: nn.Module) -> float:
    dtypes = {f.dtype, *recorded, *(p.dtype for p in module.parameters())}
    if f.is_cuda and torch.float32 in dtypes:  # TF32 has the precision of float16
        dtypes.add(torch.float16)
    return torch.finfo(coarsest(dtypes)).eps
