r"""How inputs are cut into rows: read off their shapes, and made sure of on the model itself.

Everything here works on single rows of a batch, which the model has never seen alone. That an
entry of a mapping as long as the batch has one row for each input, that the outputs of an
input depend on its own row only, that the model leaves its inputs as they are, and in which
dtype it takes them, are assumptions; the first batch of every kind shows whether they hold.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
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
    leaves,
    moved,
    name_of,
    nested,
    raw_size,
    rows,
    tensors,
)
from ..data.row_lists import rotated, row_lists
from .functional import FunctionalModel, first_weight
from .memory import attempt
from .recording import Recording, coarsest, with_graph
from .repeating import plain_passes
from .safety import safely

# So many ways of reading a mapping are tried.
READINGS = 32
# Of a batch that is one tensor, whose rows are known, so many are looked at.
TENSOR_ROWS = 8


class Cutting:
    """Cuts inputs of one model into rows.

    Parameters
    ----------
    function : FunctionalModel
    dict_key_x : str
        The entry of mappings that has one row for each input.
    """

    def __init__(self, function: FunctionalModel, dict_key_x: str = "input_ids") -> None:
        self.function, self.dict_key_x = function, dict_key_x
        self._shared: set[Path] = set()  # entries known not to be cut
        self._unused: set[Path] = set()  # lists of which the model does not use the order
        self._known: dict[Any, torch.dtype | None] = {}  # kinds of inputs, and what they are converted to
        self._warned = False

    def knowledge(self) -> Any:
        """Return what was found out of the model's inputs, for :meth:`learn`."""
        return (
            set(self._shared),
            set(self._unused),
            dict(self._known),
            self._warned,
            self.function.in_pairs,
        )

    def learn(self, knowledge: Any) -> None:
        """Know what was found out of a copy of the model."""
        self._shared, self._unused, self._known, self._warned, self.function.in_pairs = knowledge

    def forget(self) -> None:
        """Find everything out again, the model having changed."""
        self._shared.clear()
        self._unused.clear()
        self._known.clear()

    def __call__(self, x: Raw | Input, size: int | None = None) -> Input:
        """Say which tensors of an input are cut into rows.

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
            treat its rows one by one.

        Notes
        -----
        Cost: for the first input of a kind (with these entries and dtypes), two or three forward passes of it
        (of a tensor: of eight rows), and some of one or two rows.
        """
        if isinstance(x, Nested):
            return x
        if not isinstance(x, (Tensor, Mapping)):
            raise ValueError(
                f"The model's input must be a tensor or a mapping of tensors; got {type(x).__name__}."
            )
        check_tensors(x, "The inputs")
        guess = x if isinstance(x, Tensor) else nested(x, self._paths(x, size or self._size(x)))
        empty = batch_size(guess) == 0 if isinstance(guess, Tensor) or guess.rows else False
        known = self._kind(guess) in self._known and not any(self._lists(x, batch_size(guess)))
        return guess if empty or known else self._verified(x, size)

    def to_model(self, x: Raw | Input, device: torch.device) -> Input:
        """Cut an input, move it to the model's device, and convert it if the model does not take it as it is."""
        x = self(x)
        return moved(x, device, self._known.get(self._kind(x)))

    def _size(self, x: Mapping[str, Any]) -> int:
        """Return how many inputs a mapping holds, as far as that is known without the model."""
        if self.dict_key_x not in x:
            for path, leaf in leaves(x):
                if isinstance(leaf, Tensor) and leaf.ndim and path not in self._shared:
                    return len(leaf)
        return raw_size(x, self.dict_key_x)

    def _paths(self, x: Mapping[str, Any], size: int) -> list[Path]:
        return [
            path
            for path, leaf in leaves(x)
            if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size and path not in self._shared
        ]

    def _lists(self, x: Raw, size: int) -> Iterator[Path]:
        """Yield where there are lists of a value for each input that the model may use."""
        if isinstance(x, Mapping):
            yield from (path for path, _ in row_lists(x, size) if path not in self._unused)

    def _kind(self, x: Input) -> Any:
        """Tell apart what the model may treat differently: entries, how they are cut, dtypes, devices, autocast."""
        reference = first_weight(self.function.module)
        kind, enabled = reference.device.type, torch.is_autocast_enabled(reference.device.type)
        setting = reference.device, reference.dtype, torch.get_autocast_dtype(kind) if enabled else None
        if isinstance(x, Tensor):
            return setting, x.dtype
        return (
            setting,
            x.paths,
            tuple((path, getattr(leaf, "dtype", None)) for path, leaf in x.shared()),
            tuple(t.dtype for t in x.rows),
        )

    # ------------------------------------------------------------------ at the first batch of a kind

    def _verified(self, x: Raw, size: int | None) -> Input:
        device = first_weight(self.function.module).device
        f, dtype, paths = safely(self.function.module, lambda: self._confirmed(x, size, device))
        if isinstance(x, Tensor):
            self._known[self._kind(x)] = self._known[self._kind(_converted(x, dtype))] = dtype
            return x
        cut = nested(x, paths)
        self._known[self._kind(cut)] = self._known[self._kind(_converted(cut, dtype))] = dtype
        if len(f) > 1:  # of one row, all tensors with one are cut, whether they are shared or not
            self._shared |= {path for path, leaf in cut.shared() if isinstance(leaf, Tensor)}
        return cut

    def _confirmed(
        self, x: Raw, size: int | None, device: torch.device
    ) -> tuple[Tensor, torch.dtype | None, list[Path]]:
        """Return the outputs of a batch, the dtype that inputs are converted to, and the entries that are cut."""
        if isinstance(x, Tensor):
            some: Input = detached(x[:TENSOR_ROWS])
        else:  # a single row may have to be doubled
            some = nested(x, self._paths(x, 1) if (size or self._size(x)) == 1 else [])
        with Recording() as record:
            f, dtype = self._plain_outputs(moved(some, device))
        eps = _coarsest_eps(f, record.dtypes, self.function.module)
        n = len(some) if isinstance(some, Tensor) else size
        if n is not None and len(f) != n:
            raise ValueError(
                f"The model returned outputs of shape {tuple(f.shape)} for {n} inputs; their first axis must be the "
                "batch, with one row for each input. Wrap the model so that its forward returns such outputs."
            )
        paths = self._reading(x, some, f, dtype, device, eps)
        for path in list(self._lists(x, len(f))):
            assert isinstance(x, Mapping)
            self._check_unused(x, path, paths, f, dtype, device)
        return f, dtype, paths

    def _check_unused(
        self,
        x: Mapping[str, Any],
        path: Path,
        paths: list[Path],
        f: Tensor,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        """Require that the outputs are the same when the values of a list have changed places."""
        other = _converted(moved(nested(rotated(x, path), []), device), dtype)
        found, _ = attempt(partial(self._run, other))
        bound = 100 * torch.finfo(f.dtype).eps * f.abs().max()  # the same pass, but for sums in another order
        if found is None or found.shape != f.shape or (found - f).abs().max() > bound:
            raise ValueError(self._refusal(x, paths, f))
        self._unused.add(path)

    def _plain_outputs(self, x: Input) -> tuple[Tensor, torch.dtype | None]:
        """Run the model as its user does, and return its outputs, and the dtype that inputs are converted to."""
        run = partial(self._run, x)
        # Of a tensor, there are few rows; the graph of a whole batch may not fit.
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
        raise error

    def _in_pairs(self, x: Input) -> Tensor | None:
        """Return the outputs of a single row that the model takes only beside another, and remember that."""
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
        warnings.warn(
            f"The model does not take inputs of {', '.join(sorted(map(str, others)))}, so that they are converted to "
            f"{reference}, the dtype of its first weight. Convert them in the data set to silence this. The reason: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
            stacklevel=2,
        )

    def _run(self, x: Input) -> Tensor:
        """Run the model on copies, and require that it leaves them as they are."""
        given = copied(x)
        f = self.function.own_outputs(given)
        names = [""] if isinstance(x, Tensor) else [f" under {name}" for name in _names(x)]
        pairs = zip(tensors(given), tensors(x), names)
        changed = [name for copy, original, name in pairs if not _equal(copy, original)]
        if changed:
            raise ChangedInputError(
                f"The model's forward pass changes its input{', '.join(changed)} in place, and every input is passed to it many "
                "times. Let it work on a copy: x = x - mean instead of x -= mean, or a first layer with inplace=False."
            )
        return f

    def _reading(
        self, x: Raw, some: Input, f: Tensor, dtype: torch.dtype | None, device: torch.device, eps: float
    ) -> list[Path]:
        """Return the entries that are cut, so that rows alone have the outputs that they have in the batch."""
        readings = [[]] if isinstance(x, Tensor) else islice(self._readings(x, len(f)), READINGS)
        first: list[Path] | None = None
        for paths in readings:
            first = paths if first is None else first
            cut = some if isinstance(x, Tensor) else nested(x, paths)
            if self._agrees(_converted(moved(detached(cut), device), dtype), f, eps):
                return paths
        if first is None:
            raise ValueError(
                f"The model returned outputs of shape {tuple(f.shape)}, and the input has no tensor with {len(f)} rows; one "
                "must have a row for each input."
            )
        if _has_batch_statistics(self.function.module):  # of which probing warns
            return first
        plain_passes(self.function, _converted(moved(some, device), dtype))  # is it random?
        raise ValueError(self._refusal(x, first, f))

    def _readings(self, x: Mapping[str, Any], size: int) -> Iterator[list[Path]]:
        """Yield sets of entries that may be cut: all that are long enough, then fewer."""
        paths = self._paths(x, size)
        for left_out in range(len(paths)):
            for shared in combinations(paths[::-1], left_out):
                kept = [path for path in paths if path not in shared]
                if self.dict_key_x not in x or any(path[0] == self.dict_key_x for path in kept):
                    yield kept

    def _agrees(self, x: Input, f: Tensor, eps: float) -> bool:
        """Tell whether the first and the last row, alone, have the outputs that they have in the batch."""
        for i in {0, len(f) - 1}:
            row = rows(x, i, i + 1)
            found, _ = attempt(partial(self._run, doubled(row)))
            if found is None or not _alike(found, f[[i, i]], f, eps):
                return False
            single, _ = attempt(partial(self.function.own_outputs, copied(row)))
            # A model that squeezes loses the batch axis of a single row.
            self.function.in_pairs |= single is None or single.shape != f[:1].shape
        return True

    def _refusal(self, x: Raw, paths: list[Path], f: Tensor) -> str:
        cause = "The outputs of an input depend on the other inputs of its batch"
        if not isinstance(x, Tensor):
            whole = [f"{name_of(path)} ({_describe(leaf)})" for path, leaf in leaves(x) if path not in paths]
            if whole:
                cause += f", or on entries that cannot be cut into {len(f)} rows: {', '.join(whole)}"
        return (
            f"{cause}: its row alone has other outputs than in the batch. Every prediction here is of rows on their own. Pass "
            "tensors whose first axis is the batch (lists of lengths as a tensor, graphs as padded tensors with masks), "
            "and models that treat rows one by one."
        )


class ChangedInputError(ValueError):
    """A forward pass that writes into the tensors it is given."""


def _converted(x: Input, dtype: torch.dtype | None) -> Input:
    return x if dtype is None else moved(x, tensors(x)[0].device, dtype)


def _names(x: Nested) -> list[str]:
    shared = [path for path, leaf in x.shared() if isinstance(leaf, Tensor)]
    return [name_of(path) for path in (*x.paths, *shared)]


def _equal(copy: Tensor, original: Tensor) -> bool:
    # Whether anything is written may depend on the values: a count of writes tells too.
    return copy._version == 0 and copy.shape == original.shape and bool(torch.equal(copy, original))


def _describe(leaf: Any) -> str:
    return f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__


def _has_batch_statistics(module: nn.Module) -> bool:
    norms = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(m.running_mean is None for m in norms)


def _alike(found: Tensor, expected: Tensor, f: Tensor, eps: float) -> bool:
    """Tell whether outputs differ by rounding only, compared with how much those of other rows differ."""
    if found.shape != expected.shape:
        return False
    scale, spread = f.double().abs().max(), (f.double() - f.double().mean(0)).abs().max()
    bound = min(300 * eps, math.sqrt(eps)) * scale + 3 * math.sqrt(eps) * spread
    difference = (found.double() - expected.double()).abs().max()
    return bool(difference <= bound) or not bool(f.isfinite().all())


def _coarsest_eps(f: Tensor, recorded: set[torch.dtype], module: nn.Module) -> float:
    dtypes = {f.dtype, *recorded, *(p.dtype for p in module.parameters())}
    if f.is_cuda and torch.float32 in dtypes:  # TF32
        dtypes.add(torch.float16)
    return torch.finfo(coarsest(dtypes)).eps
