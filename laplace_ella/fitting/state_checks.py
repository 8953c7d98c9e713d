r"""What each entry of a saved estimator has to be: types, shapes, ranges, and that matrices are what they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.validation import CURVATURES
from ..network.functional import Weights
from ..nystrom.compact import STORED, orthonormal_within, overlaps
from ..posterior.residual import RESIDUALS

# Rounding of sums over data, relative to the largest entry or eigenvalue.
ROUNDING = 1e-8


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a state depend on.

    Attributes
    ----------
    rank : int
        K.
    n_params : int
        P.
    n_weights : int
        L, how many weight tensors there are.
    """

    rank: int
    n_params: int
    n_weights: int

    @classmethod
    def of(cls, state: dict[str, Any], weights: Weights) -> Sizes:
        """Return those of a state and an estimator's weights."""
        n_params = sum(w.numel() for w in weights.values())
        return cls(len(state["basis"]["eigenvalues"]), n_params, len(weights))


Holds = Callable[[Any, Sizes], bool]


def _number(low: float, high: float = math.inf) -> Holds:
    return lambda v, _: type(v) in (int, float) and math.isfinite(v) and low < v <= high


def _whole(low: int) -> Holds:
    return lambda v, _: type(v) is int and v >= low


def _flag(value: Any, sizes: Sizes) -> bool:
    return type(value) is bool


def _one_of(allowed: tuple[str, ...]) -> Holds:
    return lambda v, _: type(v) is str and v in allowed


def _or_none(holds: Holds) -> Holds:
    return lambda v, sizes: v is None or holds(v, sizes)


def _listed(value: Any, of: Callable[[Any], bool]) -> bool:
    return type(value) in (list, tuple) and all(map(of, value))


def is_dense(value: Any, dtype: torch.dtype | None = torch.float64) -> bool:
    """Say whether a value is a plain tensor of finite numbers, of this dtype, or of any floating-point dtype."""
    if type(value) is not Tensor or value.layout != torch.strided or value.is_meta:
        return False
    fits = value.is_floating_point() if dtype is None else value.dtype == dtype
    return fits and bool(value.isfinite().all())


def _vector(lengths: Callable[[Sizes], tuple[int, ...]], positive: bool) -> Holds:
    def holds(value: Any, sizes: Sizes) -> bool:
        if not is_dense(value, None) or value.ndim > 1 or value.numel() not in lengths(sizes):
            return False
        return not positive or bool((value > 0).all())

    return holds


def _is_curvature(value: Any, sizes: Sizes) -> bool:
    if not is_dense(value) or value.shape != (sizes.rank, sizes.rank):
        return False
    rounding = ROUNDING * float(value.abs().max())
    if float((value - value.mT).abs().max()) > rounding:
        return False
    return float(torch.linalg.eigvalsh(value)[0]) >= -rounding


def _are_snapshots(value: Any, sizes: Sizes) -> bool:
    def is_snapshot(pair: Any) -> bool:
        return type(pair) in (list, tuple) and len(pair) == 2 and _whole(1)(pair[0], sizes)

    if not _listed(value, is_snapshot) or not value:
        return False
    counts = [n for n, _ in value]
    return counts == sorted(set(counts)) and all(_is_curvature(G, sizes) for _, G in value)


def _is_reference(value: Any, sizes: Sizes) -> bool:
    return (
        is_dense(value) and value.ndim == 2 and value.shape[1] == 2 and bool((value.diff(dim=0) >= 0).all())
    )


def _is_history(value: Any, sizes: Sizes) -> bool:
    names = {"processed_examples", "val_nll"}
    return (
        type(value) is dict
        and value.keys() == names
        and all(_listed(v, lambda e: type(e) is float) for v in value.values())
    )


def _is_loss(value: Any, sizes: Sizes) -> bool:
    return is_dense(value, None) and value.ndim == 0 and float(value) >= 0


def _is_rank(value: Any, sizes: Sizes) -> bool:
    return _whole(1)(value, sizes) or (type(value) is float and 0 < value < 1)


_ONE = ("a number, positive and finite", _number(0))
_COUNT = ("a positive integer", _whole(1))
ENTRIES: dict[str, tuple[str, Holds]] = {
    "H": ("a (K, K) matrix in float64, symmetric and positive semi-definite", _is_curvature),
    "snapshots": ("a list of pairs (n, matrix as H), n ascending", _are_snapshots),
    "loss": ("a floating-point tensor () of at least 0", _is_loss),
    **dict.fromkeys(("n_data", "n_predictions", "n_outputs", "n_curvature"), _COUNT),
    **dict.fromkeys(("subsample_size", "residual_samples", "curvature_samples"), _COUNT),
    "curvature_size": ("a positive integer or None", _or_none(_whole(1))),
    "n_eigenvalues": ("a positive integer, or a share in (0, 1)", _is_rank),
    "seed": ("an integer", lambda v, _: type(v) is int),
    **dict.fromkeys(("temperature", "logit_scale", "residual_scale"), _ONE),
    **dict.fromkeys(("temperature_fixed", "labels_sampled", "enable_backprop"), ("True or False", _flag)),
    "residual": (f"one of {RESIDUALS}", _one_of(RESIDUALS)),
    "curvature": (f"one of {CURVATURES}", _one_of(CURVATURES)),
    "prior_precision": (
        "a floating-point tensor of 1, L or P positive numbers",
        _vector(lambda s: (1, s.n_weights, s.n_params), positive=True),
    ),
    "prior_mean": ("a floating-point tensor of 1 or P numbers", _vector(lambda s: (1, s.n_params), False)),
    "sigma_noise": ("a floating-point tensor of 1 positive number", _vector(lambda s: (1,), True)),
    "named_by_user": (
        "a list of 'subsample_size' and 'n_eigenvalues'",
        lambda v, _: _listed(v, lambda e: type(e) is str and e in ("subsample_size", "n_eigenvalues")),
    ),
    "largest_sums": (
        "a list of 2 numbers of at least 0",
        lambda v, s: _listed(v, lambda e: _number(-math.ulp(0.0))(e, s)) and len(v) == 2,
    ),
    "novelty_reference": ("a float64 tensor (n, 2), ascending, or None", _or_none(_is_reference)),
    "novelty_setting": (
        "a list of numbers, strings and None",
        lambda v, _: _listed(v, lambda e: type(e) in (int, float, str, bool, type(None))),
    ),
    "fit_history": ("two lists of numbers, processed_examples and val_nll", _is_history),
}


def check_entries(state: dict[str, Any], weights: Weights) -> None:
    """Require that entries are of the right type, shape and range; the basis, see :func:`check_basis`, comes first.

    Raises
    ------
    ValueError
        Naming the entry.
    """
    sizes = Sizes.of(state, weights)
    for name, (what, holds) in ENTRIES.items():
        if not holds(state[name], sizes):
            raise ValueError(_wrong(name, what, state[name]))


def _wrong(name: str, what: str, value: Any) -> str:
    if isinstance(value, Tensor):
        unlike = value.layout != torch.strided or value.is_meta
        kind = "without numbers" if unlike else "" if value.isfinite().all() else "that is not finite"
        got = f"a tensor {tuple(value.shape)} of {value.dtype} {kind}".strip()
    else:
        got = repr(value)
    return f"The checkpoint's {name} must be {what}; got {got[:99]}. The file is damaged, or was edited. Save it again."


def _descends(value: Any, positive: bool) -> bool:
    if not is_dense(value) or value.ndim != 1 or not len(value):
        return False
    return bool((value.diff() <= 0).all()) and (not positive or bool(value[-1] > 0))


def _is_shard(value: Any) -> bool:
    return _listed(value, lambda e: type(e) is int) and len(value) == 2 and 0 <= value[0] < value[1]


def _is_grams(value: Any, rank: int) -> bool:
    if not is_dense(value) or value.ndim != 3 or value.shape[1:] != (rank, rank):
        return False
    return bool((value - value.mT).abs().max() <= ROUNDING)


_LAYOUTS = {
    "full": {"directions"},
    "half": {"directions", "scales"},
    "landmarks": {"inputs", "which", "outputs", "coefficients"},
}
_BASIS = {"eigenvalues", "trace", "spectrum", "shard", "grams"}


def check_basis(state: Any) -> None:
    """Require the entries of a basis: the spectrum, and the directions or what they are made of.

    Raises
    ------
    ValueError
        Naming the entry.
    """
    stored = state.get("stored", "full") if type(state) is dict else None
    if type(stored) is not str or stored not in STORED:
        raise ValueError(_wrong("basis", f"a dictionary, with directions stored as one of {STORED}", state))
    wanted = _BASIS | _LAYOUTS[stored]
    if not wanted <= state.keys() <= wanted | {"stored", "model"}:
        raise ValueError(
            _wrong("basis", f"a dictionary with the entries {sorted(wanted)}", sorted(map(str, state)))
        )
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "eigenvalues": ("positive numbers in float64, descending", lambda v: _descends(v, True)),
        "spectrum": ("numbers in float64, descending", lambda v: _descends(v, False)),
        "trace": ("a positive number", lambda v: _number(0)(v, None)),  # type: ignore[arg-type]
        "shard": ("a rank and a number of ranks", _is_shard),
    }
    for name, (what, holds) in checks.items():
        if not holds(state[name]):
            raise ValueError(_wrong(f"basis[{name!r}]", what, state[name]))
    if type(state.get("model")) not in (str, type(None)):
        raise ValueError(_wrong("basis['model']", "a string or None", state["model"]))
    rank = len(state["eigenvalues"])
    if state["grams"] is not None and not _is_grams(state["grams"], rank):
        raise ValueError(
            _wrong("basis['grams']", "symmetric matrices (L, K, K) in float64, or None", state["grams"])
        )
    if stored == "landmarks":
        _check_landmarks(state, rank)
    else:
        _check_directions(state)


def _check_directions(state: dict[str, Any]) -> None:
    directions, scales = state["directions"], state.get("scales")
    if type(directions) is not dict or not all(is_dense(v, None) for v in directions.values()):
        raise ValueError(
            _wrong("basis['directions']", "a dictionary of finite tensors", _outline(directions))
        )
    if scales is None:
        return
    fits = type(scales) is dict and scales.keys() == directions.keys()
    if not fits or not all(
        is_dense(s, torch.float32) and s.shape == directions[k].shape[:1] and bool((s > 0).all())
        for k, s in scales.items()
    ):
        raise ValueError(
            _wrong("basis['scales']", "K positive numbers in float32 a weight", _outline(scales))
        )


def _outline(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, dict) else value


def _check_landmarks(state: dict[str, Any], rank: int) -> None:
    size = len(state["spectrum"])

    def are_indices(value: Any, below: float) -> bool:
        if type(value) is not Tensor or value.dtype != torch.int64 or value.shape != (size,):
            return False
        return bool((value >= 0).all()) and bool((value < below).all())

    inputs, coefficients = state["inputs"], state["coefficients"]
    if type(inputs) is not list or not all(type(x) in (Tensor, dict, list, tuple) for x in inputs):
        raise ValueError(_wrong("basis['inputs']", "a list of inputs", inputs))
    if not is_dense(coefficients) or coefficients.shape != (size, rank):
        raise ValueError(_wrong("basis['coefficients']", "a matrix (M, K) in float64", coefficients))
    for name, below in (("which", len(inputs)), ("outputs", math.inf)):
        if not are_indices(state[name], below):
            raise ValueError(_wrong(f"basis[{name!r}]", "M integers of at least 0 in int64", state[name]))


def check_orthonormal(directions: Weights, eigenvalues: Tensor, of_all: Tensor | None, kept: slice) -> None:
    r"""Require :math:`V^T V = I` up to the precision of the weights.

    Parameters
    ----------
    directions : dict of Tensor (K_rank, *shape)
        Those of this rank.
    eigenvalues : Tensor (K,)
    of_all : Tensor (K, K), optional
        The products of the directions of all ranks, where they are spread.
    kept : slice
        Which directions this rank has.

    Raises
    ------
    ValueError
    """
    eps = max(torch.finfo(v.dtype).eps for v in directions.values())
    allowed = orthonormal_within(eigenvalues, eps)
    identity = torch.eye(len(eigenvalues), dtype=torch.float64, device=eigenvalues.device)
    own = overlaps(directions)
    pairs = [(own, identity[kept][:, kept], allowed[kept][:, kept])]
    if of_all is not None:
        pairs.append((of_all, identity, allowed))
    for found, expected, bound in pairs:
        error = (found - expected).abs()
        if not bool((error <= bound).all()):
            raise ValueError(
                f"The checkpoint's directions must be orthonormal; V^T V differs from the identity by up to "
                f"{float(error.max()):.3g}. The file is damaged, or was edited. Save it again."
            )
