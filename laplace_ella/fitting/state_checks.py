r"""Checks of each entry of a saved estimator: its type, shape and range, and that a matrix is what it stands for.

Whether entries go together is for :func:`laplace_ella.fitting.state.assigned` to say.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..network.functional import Weights
from ..nystrom.basis import NystromBasis
from ..nystrom.compact import LAYOUTS, overlaps
from ..posterior.likelihoods import LIKELIHOODS
from ..posterior.links import LINKS
from ..posterior.residual import RESIDUALS
from ..posterior.variances import VARIANCES
from .curvature import CURVATURES

# Rounding of sums over data, relative to the largest entry or eigenvalue.
ROUNDING = 1e-8
LARGEST = sys.float_info.max
F32, F64, I64 = torch.float32, torch.float64, torch.int64

# ---------------------------------------------------------------------- kinds of values

# What letters in shapes stand for: K directions, M landmarks, L weight tensors of P numbers together, C outputs.
Sizes = dict[str, int]
Holds = Callable[[Any, Sizes], bool]


def of_type(*types: type) -> Holds:
    """Return a check that a value has one of these types, and not one derived from them."""
    return lambda v, s: type(v) in types


def number(above: float = -math.inf, types: tuple[type, ...] = (int, float)) -> Holds:
    """Return a check that a value is a finite number."""
    # No integer that is too large for a float, of which isfinite makes an OverflowError.
    return lambda v, s: type(v) in types and abs(v) <= LARGEST and v > above


def one_of(allowed: tuple[str, ...]) -> Holds:
    """Return a check that a value is one of these strings."""
    return lambda v, s: type(v) is str and v in allowed


def either(*kinds: Holds) -> Holds:
    """Return a check that a value is of any of these kinds."""
    return lambda v, s: any(holds(v, s) for holds in kinds)


def listed(kind: Holds) -> Holds:
    """Return a check that a value is a list or tuple of values of a kind."""
    return lambda v, s: type(v) in (list, tuple) and all(kind(e, s) for e in v)


def per_output(kind: Holds) -> Holds:
    """Return a check that a value is a list or tuple of C values of a kind."""
    return lambda v, s: listed(kind)(v, s) and len(v) == s["C"]


def pair(first: Holds, second: Holds) -> Holds:
    """Return a check that a value is a list or tuple of two values, each of its kind."""
    return lambda v, s: type(v) in (list, tuple) and len(v) == 2 and first(v[0], s) and second(v[1], s)


def mapped(kind: Holds) -> Holds:
    """Return a check that a value is a dictionary of values of a kind."""
    return lambda v, s: type(v) is dict and all(kind(e, s) for e in v.values())


def tensor(
    shapes: str = "*",
    dtype: torch.dtype | None = F64,
    above: float = -math.inf,
    also: Callable[[Tensor], bool] = lambda value: True,
) -> Holds:
    """Return a check that a value is a plain tensor of finite numbers.

    Like the other checks, it is a function of a value and of the sizes that letters in shapes stand for.

    Parameters
    ----------
    shapes : str
        A letter or digit for each axis, "?" for an axis of any length; several shapes have "|" between them; "*" stands
        for any shape.
    dtype : torch.dtype, optional
        The dtype; None stands for any of floating point.
    above : float
        The number that all numbers exceed.
    also : callable
        Says of a tensor what else must be true.
    """

    def holds(value: Any, sizes: Sizes) -> bool:
        if type(value) is not Tensor or value.layout != torch.strided or value.is_meta:
            return False
        found = [str(n) for n in value.shape]
        wanted = [[str(sizes.get(axis, axis)) for axis in shape] for shape in shapes.split("|")]
        fits = value.is_floating_point() if dtype is None else value.dtype == dtype
        fits &= shapes == "*" or any(
            len(shape) == len(found) and all(a in (b, "?") for a, b in zip(shape, found)) for shape in wanted
        )
        return fits and bool(value.isfinite().all() & (value > above).all()) and also(value)

    return holds


def descends(value: Tensor) -> bool:
    """Say whether there are numbers, and none is larger than the one before."""
    return len(value) > 0 and bool((value.diff() <= 0).all())


def symmetric(value: Tensor, rounding: float = ROUNDING) -> bool:
    """Say whether matrices are symmetric up to rounding."""
    return bool(((value - value.mT).abs() <= rounding).all())


def semi_definite(value: Tensor) -> bool:
    """Say whether a matrix is symmetric and has no negative eigenvalue, up to rounding."""
    rounding = ROUNDING * float(value.abs().max())
    return symmetric(value, rounding) and float(torch.linalg.eigvalsh(value)[0]) >= -rounding


def are_snapshots(value: Any, sizes: Sizes) -> bool:
    """Say whether a value is a list of pairs of a number of inputs, more from each to the next, and a curvature."""
    if not listed(pair(COUNT, CURVATURE))(value, sizes):
        return False
    counts = [n for n, _ in value]
    return len(counts) > 0 and counts == sorted(set(counts))


# ---------------------------------------------------------------------- what entries must be, in words and in code

NONE, FLAG, INTEGER = of_type(type(None)), of_type(bool), number(types=(int,))
COUNT, POSITIVE, CURVATURE = number(0, (int,)), number(0), tensor("KK", also=semi_definite)
NAMED = ("subsample_size", "n_eigenvalues")
COUNTS = (
    *("n_data", "n_outputs", "n_curvature"),
    *("subsample_size", "residual_samples", "curvature_samples"),
)
BASIS: dict[str, tuple[str, Holds]] = {
    "eigenvalues": ("positive numbers in float64, descending", tensor("?", above=0, also=descends)),
    "spectrum": ("numbers in float64, descending", tensor("?", also=descends)),
    "trace": ("a positive number", POSITIVE),
    "shard": ("a rank and a number of ranks", lambda v, s: pair(INTEGER, INTEGER)(v, s) and 0 <= v[0] < v[1]),
    "grams": ("symmetric matrices (L, K, K), or None", either(NONE, tensor("?KK", also=symmetric))),
    "model": ("a string or None", of_type(str, type(None))),
    "directions": ("a dictionary of finite tensors", mapped(tensor(dtype=None))),
    "scales": ("K positive numbers in float32 for each weight", mapped(tensor("K", F32, above=0))),
    "inputs": ("a list of inputs", listed(of_type(Tensor, dict, list, tuple))),
    "which": ("M integers of at least 0, in int64", tensor("M", I64, above=-1)),
    "outputs": ("M integers of at least 0, in int64", tensor("M", I64, above=-1)),
    "coefficients": ("a matrix (M, K) in float64", tensor("MK")),
}
COMMON = BASIS.keys() - set().union(*LAYOUTS.values())
ENTRIES: dict[str, tuple[str, Holds]] = {
    "H": ("a (K, K) matrix in float64, symmetric and positive semi-definite", CURVATURE),
    "snapshots": ("a list of pairs (n, matrix as H), n ascending", are_snapshots),
    "loss": ("a floating-point tensor (), of at least 0 unless targets have densities", tensor("", None)),
    **dict.fromkeys(COUNTS, ("a positive integer", COUNT)),
    "n_predictions": ("a positive number", POSITIVE),
    "curvature_size": ("a positive integer or None", either(NONE, COUNT)),
    "n_eigenvalues": (
        "a positive integer, or a share in (0, 1)",
        lambda v, s: COUNT(v, s) or (type(v) is float and 0 < v < 1),
    ),
    "seed": ("an integer from 0 to 2^63 - 1", lambda v, s: INTEGER(v, s) and 0 <= v < 2**63),
    **dict.fromkeys(
        ("temperature", "logit_scale", "residual_scale"), ("a positive and finite number", POSITIVE)
    ),
    **dict.fromkeys(("temperature_fixed", "labels_sampled", "enable_backprop"), ("True or False", FLAG)),
    "residual": (f"one of {tuple(RESIDUALS)}", one_of(tuple(RESIDUALS))),
    "curvature": (f"one of {CURVATURES}", one_of(CURVATURES)),
    "prior_precision": ("1, L or P positive numbers in a tensor", tensor("|1|L|P", None, above=0)),
    "prior_mean": ("1 or P numbers in a tensor", tensor("|1|P", None)),
    "sigma_noise": ("1 or C positive numbers in a tensor", tensor("|1|C", None, above=0)),
    "named_by_user": (f"a list of some of {NAMED}", listed(one_of(NAMED))),
    "largest_sums": (
        "a list of 2 numbers of at least 0",
        lambda v, s: pair(number(), number())(v, s) and min(v) >= 0,
    ),
    "class_scales": ("C positive numbers, or None", either(NONE, per_output(POSITIVE))),
    "class_biases": ("C numbers, or None", either(NONE, per_output(number()))),
    "link": (f"one of {tuple(LINKS)}, or None", either(NONE, one_of(tuple(LINKS)))),
    "variance": (f"one of {tuple(VARIANCES)}", one_of(tuple(VARIANCES))),
    "prior_before": ("a positive number, or None", either(NONE, POSITIVE)),
    "novelty_reference": (
        "a float64 tensor (n, 2), ascending, or None",
        either(NONE, tensor("?2", also=lambda v: bool((v.diff(dim=0) >= 0).all()))),
    ),
    "novelty_setting": (
        "a list of numbers, strings and None",
        listed(of_type(int, float, str, bool, type(None))),
    ),
    "fit_history": (
        "two lists of numbers, processed_examples and val_nll",
        lambda v, s: mapped(listed(of_type(float)))(v, s) and v.keys() == {"processed_examples", "val_nll"},
    ),
}

# What states of estimators hold that use fewer directions than they were fitted with.
OPTIONAL: dict[str, tuple[str, Holds]] = {
    "n_directions": ("an integer from 1 to K", lambda v, s: COUNT(v, s) and v <= s["K"]),
    "channel_axis": ("1 or -1", lambda v, s: type(v) is int and v in (1, -1)),
    "curvature_positions": ("a positive integer", COUNT),
}


# What states before format 5 did not hold, and what they stand for.
SINCE_FORMAT_5: dict[str, Any] = {
    "class_scales": None,
    "class_biases": None,
    "link": None,
    "prior_before": None,
    "variance": "ella",
}


def check_basis(state: Any) -> None:
    """Require all entries of a basis, which are its spectrum, and its directions or what they are made of.

    Raises
    ------
    ValueError
        Naming the entry.
    """
    stored = state.get("stored", "full") if type(state) is dict else None
    if type(stored) is not str or stored not in LAYOUTS:
        what = f"a dictionary, with directions stored as one of {tuple(LAYOUTS)}"
        raise ValueError(_wrong("basis", what, state))
    names = COMMON | LAYOUTS[stored]
    whole = {"model": None, **state}  # which laplace_ella 0.1.0 did not save
    if whole.keys() - {"stored"} != names:
        raise ValueError(_wrong("basis", f"a dictionary with the entries {sorted(names)}", state))
    sizes: Sizes = {}
    for name in (k for k in BASIS if k in names):
        what, holds = BASIS[name]
        if not holds(whole[name], sizes):
            raise ValueError(_wrong(f"basis[{name!r}]", what, whole[name]))
        if name in ("eigenvalues", "spectrum"):
            sizes["K" if name == "eigenvalues" else "M"] = len(whole[name])


def check_entries(state: dict[str, Any], weights: Weights) -> None:
    """Require all other entries, once :func:`check_basis` has let those of the basis pass.

    Raises
    ------
    ValueError
        Naming the entry.
    """
    n_params = sum(w.numel() for w in weights.values())
    sizes = {
        "K": len(state["basis"]["eigenvalues"]),
        "L": len(weights),
        "P": n_params,
        "C": state["n_outputs"],
    }
    optional = {name: OPTIONAL[name] for name in OPTIONAL.keys() & state.keys()}
    for name, (what, holds) in {**ENTRIES, **optional}.items():
        if not holds(state[name], sizes):
            raise ValueError(_wrong(name, what, state[name]))
    if LIKELIHOODS[state["likelihood"]].has_positive_loss and state["loss"] < 0:
        raise ValueError(_wrong("loss", ENTRIES["loss"][0], state["loss"]))


def _wrong(name: str, what: str, value: Any) -> str:
    if isinstance(value, Tensor):
        unlike = value.layout != torch.strided or value.is_meta
        kind = "without numbers" if unlike else "" if value.isfinite().all() else "that is not finite"
        got = f"a tensor {tuple(value.shape)} of {value.dtype} {kind}".strip()
    else:
        got = repr(sorted(map(str, value)) if isinstance(value, dict) else value)
    return f"The checkpoint's {name} must be {what}; got {got[:99]}. The file is damaged, or was edited. Save it again."


def check_orthonormal(basis: NystromBasis) -> None:
    r"""Require :math:`V^T V = I`, up to what the precision of the weights allows.

    Directions are gradients divided by the roots of their eigenvalues, so that rounding grows with the ratio of
    the largest eigenvalue to theirs.

    Raises
    ------
    ValueError
    """
    eps = max(torch.finfo(v.dtype).eps for v in basis.directions.values())
    roots = (basis.eigenvalues / basis.eigenvalues[0]).sqrt()
    allowed = 4 * math.sqrt(eps) + 100 * eps / torch.outer(roots, roots)
    identity, mine = torch.eye(basis.rank, dtype=F64, device=roots.device), basis.ranks.turns()
    found = identity.clone()
    found[mine, mine] = overlaps(basis.directions)
    of_all = found if basis.grams is None else basis.grams.sum(0)
    error = torch.maximum((found - identity).abs(), (of_all - identity).abs())
    if not bool((error <= allowed).all()):
        raise ValueError(
            f"The checkpoint's directions must be orthonormal; V^T V differs from the identity by up to "
            f"{float(error.max()):.3g}. The file is damaged, or was edited. Save it again."
        )
