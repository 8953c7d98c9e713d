"""What this package uses of laplace-torch, in one table that is checked when it is imported.

A release of the host that lacks one of these, or takes other arguments, is told of here, with its version and what to do,
and not in the middle of a fit. Its curvature backends, of which a host need not have all, are not imported:
``backends.py`` knows them by what they are called.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# The releases that the tests run with.
TESTED = "0.2.3", "0.3"


def _version() -> str:
    try:
        return version("laplace-torch")
    except PackageNotFoundError:
        return "of unknown version"


def _unfit(reason: object) -> ImportError:
    oldest, newest = TESTED
    return ImportError(
        f"laplace_ella cannot use laplace-torch {_version()}: {reason}. It is tested with {oldest} to {newest}. Upgrade "
        f'laplace_ella, or install such a host: pip install "laplace-torch>={oldest},<={newest}".'
    )


try:
    from laplace import BaseLaplace, Laplace, ParametricLaplace
    from laplace.curvature import CurvatureInterface, GGNInterface
except (ImportError, AttributeError) as error:
    raise _unfit(error) from error

__all__ = ["BaseLaplace", "CurvatureInterface", "GGNInterface", "Laplace", "ParametricLaplace"]

# How what is used is called: the numbers of its positional arguments and the names of others. None: it is only inherited
# from, compared with, or asked for its subclasses.
USED: dict[Callable[..., Any], tuple[int, tuple[str, ...]] | None] = {
    Laplace: (4, ()),  # model, likelihood, subset_of_weights, hessian_structure
    BaseLaplace: None,
    ParametricLaplace: (2, ()),  # model, likelihood
    ParametricLaplace.optimize_prior_precision: (
        3,  # self, pred_type, method
        ("n_steps", "lr", "init_prior_prec", "prior_structure", "val_loader", "progress_bar"),
    ),
    CurvatureInterface: None,
    GGNInterface: (2, ()),  # model, likelihood
}


def check_calls(used: Mapping[Callable[..., Any], tuple[int, tuple[str, ...]] | None]) -> None:
    """Check that the host's functions and classes can be called as they are called here.

    Parameters
    ----------
    used : mapping
        As :data:`USED`.

    Raises
    ------
    ImportError
        If one cannot; the message names the host's version and what to do.
    """
    for function, call in used.items():
        if call is None:
            continue
        n_positional, names = call
        try:
            inspect.signature(function).bind(*range(n_positional), **dict.fromkeys(names))
        except TypeError as error:
            raise _unfit(f"{function.__qualname__}() takes other arguments ({error})") from error


def finds_subclasses(factory: Callable[..., Any]) -> bool:
    """Say whether the host's factory finds a class by its ``_key``, as it does up to 0.5.1."""

    class Probe(ParametricLaplace):
        _key = ("all", "probe of laplace_ella")

        def __init__(self, *args: Any) -> None:
            pass

    try:
        return isinstance(factory(None, "classification", *Probe._key), Probe)
    except Exception:  # whatever a factory says to what it does not know
        return False
    finally:
        del Probe._key  # the class itself lives until garbage is collected


check_calls(USED)
FINDS_SUBCLASSES = finds_subclasses(Laplace)
if not FINDS_SUBCLASSES:
    warnings.warn(
        f"The factory of laplace-torch {_version()} does not find the estimators of other packages: laplace.Laplace(..., "
        'hessian_structure="ella") will not work. Use laplace_ella.Laplace instead, which builds all that it does.',
        stacklevel=2,
    )
