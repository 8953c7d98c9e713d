r"""Copies of an estimator: ``copy``, ``deepcopy``, ``pickle``, and new ones with the same arguments.

Copies are independent: what is done to one leaves the others alone. A shallow copy shares the model, which no
method of an estimator changes.
"""

from __future__ import annotations

import inspect
from copy import copy, deepcopy
from typing import Any, TypeVar

from torch import Tensor

from ..network.safety import exclusively
from .consistency import Consistent, of_one_moment

Self = TypeVar("Self", bound="Copying")


class Copying(Consistent):
    """Copying of an estimator, and its arguments.

    A mixin: :class:`laplace_ella.ELLALaplace` supplies what is declared here. Every argument of the constructor is
    an attribute of the same name, whose value builds an equal estimator.
    """

    temperature_fixed: Any  # bool
    process_group: Any
    _backend: Any  # NystromGGN
    _backend_cls: Any
    _named_by_user: set[str]

    @of_one_moment
    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments of an estimator like this one, with the hyperparameters it has now.

        ``type(la)(**la.get_params())`` is that estimator, for the same model, before a fit. The backend is named by
        its class; sizes that were left at their defaults are None.

        Parameters
        ----------
        deep : bool
            Makes no difference; scikit-learn's ``clone`` passes it.

        Returns
        -------
        dict

        Raises
        ------
        AttributeError
            If a subclass keeps an argument of its constructor under no attribute of the same name.
        """
        found = {name: getattr(self, name) for name in argument_names(type(self))}
        found = {k: v.detach() if isinstance(v, Tensor) else v for k, v in found.items()}
        unnamed = {"subsample_size", "n_eigenvalues"} - self._named_by_user
        own = {"backend": self._backend_cls, **dict.fromkeys(unnamed)}
        return {**found, **{k: v for k, v in own.items() if k in found}}

    def __sklearn_clone__(self: Self) -> Self:
        # clone() itself compares arguments by identity, and hyperparameters are converted to tensors.
        arguments = self.get_params()
        return type(self)(**deepcopy(arguments, {id(self.process_group): self.process_group}))

    @exclusively
    def __copy__(self: Self) -> Self:
        new = type(self).__new__(type(self))
        for name, value in self._own_state().items():
            new.__dict__[name] = copy(value) if isinstance(value, (list, dict, set)) else value
        new._backend = copy(self._backend)  # which holds the basis
        return new

    @exclusively
    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self.process_group)] = self.process_group  # which belongs to the process
        new.__dict__.update(deepcopy(self._own_state(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group not in ("default", None):
            raise TypeError(
                "An estimator with a process group of its own cannot be pickled, as the group belongs to this process; "
                f"process_group must be 'default' or None, and is {self.process_group!r}. Use state_dict()."
            )
        return self._own_state()

    def _own_state(self) -> dict[str, Any]:
        """Return the attributes of one moment; tensors that an evidence was differentiated in, without their graphs."""
        state = {k: v for k, v in vars(self._view()).items() if k != "_viewed"}
        # Which deepcopy refuses.
        state |= {k: v.detach() for k, v in state.items() if isinstance(v, Tensor) and not v.is_leaf}
        return {**state, "_cache": {}}


def argument_names(cls: type) -> list[str]:
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


def given(**values: Any) -> set[str]:
    """Return the names of those that are not None."""
    return {name for name, value in values.items() if value is not None}
