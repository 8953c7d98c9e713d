"""The arguments of an estimator like another, and what a copy in another process may not hold."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def arguments_of(estimator: Any, others: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an estimator like another, with the hyperparameters that it has now.

    Parameters
    ----------
    others : mapping
        The values of arguments that are not the attributes of these names.

    Raises
    ------
    AttributeError
        If a subclass keeps an argument of its constructor under no attribute of the same name.
    """
    found = {name: getattr(estimator, name) for name in _argument_names(type(estimator))}
    found = {k: v.detach() if isinstance(v, Tensor) else v for k, v in found.items()}
    return {k: others.get(k, v) for k, v in found.items()}


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


def check_picklable(process_group: Any) -> None:
    """Require an estimator that does not belong to a process group of this process.

    Raises
    ------
    TypeError
    """
    if process_group not in ("default", None):
        raise TypeError(
            "An estimator with a process group of its own cannot be pickled, as the group belongs to this process; "
            f"process_group must be 'default' or None, and is {process_group!r}. Use state_dict()."
        )
