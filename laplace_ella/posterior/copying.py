"""Copies of an estimator: what they are made of, and the arguments of one like it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor


def arguments_of(estimator: Any) -> dict[str, Any]:
    """Return the arguments of an estimator like another, with the hyperparameters that it has now.

    Raises
    ------
    AttributeError
        If a subclass keeps an argument of its constructor under no attribute of the same name.
    """
    found = {name: getattr(estimator, name) for name in _argument_names(type(estimator))}
    found = {k: v.detach() if isinstance(v, Tensor) else v for k, v in found.items()}
    unnamed = {"subsample_size", "n_eigenvalues"} - estimator._named_by_user
    own = {"backend": estimator._backend_cls, **dict.fromkeys(unnamed)}
    return {**found, **{k: v for k, v in own.items() if k in found}}


def _argument_names(cls: type) -> list[str]:
    """Return the names of a constructor's arguments; of those that it hands on by ``**kwargs``, too."""
    names: dict[str, None] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        names |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def own_state(estimator: Any) -> dict[str, Any]:
    """Return the attributes of an estimator, the posterior without the graphs that deepcopy refuses."""
    own = vars(estimator)
    now = own["_posterior"]
    detached = replace(now, setting=now.setting.detached(), prior_mean=now.prior_mean.detach())
    return {**own, "_posterior": detached}


def picklable_state(estimator: Any) -> dict[str, Any]:
    """Return the attributes of an estimator that does not belong to a process group of this process.

    Raises
    ------
    TypeError
    """
    if estimator.process_group not in ("default", None):
        raise TypeError(
            "An estimator with a process group of its own cannot be pickled, as the group belongs to this process; "
            f"process_group must be 'default' or None, and is {estimator.process_group!r}. Use state_dict()."
        )
    return own_state(estimator)
