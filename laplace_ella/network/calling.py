r"""How a module takes a mapping: whole, as laplace-torch passes it, or entry by entry, as ``model(**batch)`` does.

The parameters of ``forward`` say which. Models of Hugging Face and peft name the entries of their batches;
``forward(self, batch)`` takes the mapping itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from .memory import attempt


class Calling:
    """Calls one model, or a copy of it, with tensors and mappings.

    - A mapping is passed by name if its keys name two parameters of ``forward`` or more, or one that is not the first, or
      if ``forward`` cannot be called with one argument. The keys have to name all parameters without a default.
    - It is passed whole if they do not, or if they name none.
    - Where either may be meant, it is passed whole, and, if the model fails on that, by name from then on: the keys name
      the first parameter alone, or none, and ``forward`` takes any name by ``**kwargs``.

    By name, targets are left out, unless their parameter has no default, and so is what ``forward`` has no parameter for.

    Parameters
    ----------
    dict_key_y : str
        The key of the targets.
    """

    def __init__(self, dict_key_y: str = "labels") -> None:
        self.dict_key_y = dict_key_y
        self.by_name: bool | None = None  # where either may be meant; None before the first call
        self._forward: _Forward | None = None

    def __call__(self, module: nn.Module, x: Tensor | Mapping[Any, Any], **model_kwargs: Any) -> Any:
        """Return what the model returns.

        Raises
        ------
        Exception
            Whatever the model raises.
        ValueError
            If ``forward`` takes neither the mapping nor its entries.
        """
        if isinstance(x, Tensor):
            return module(x, **model_kwargs)
        self._forward = self._forward or _Forward.of(module)
        entries = self._forward.entries(x, self.dict_key_y)
        by_name = self._forward.by_name(x, entries, model_kwargs)
        by_name = self.by_name if by_name is None else by_name
        if by_name is not None:
            return module(**entries, **model_kwargs) if by_name else module(x, **model_kwargs)
        found, of_whole = attempt(lambda: (module(x, **model_kwargs),))
        if found is None:
            try:
                found = (module(**entries, **model_kwargs),)
            except Exception as error:
                raise error from of_whole
        self.by_name = of_whole is not None
        return found[0]


@dataclass(frozen=True)
class _Forward:
    """The parameters of a ``forward``."""

    signature: inspect.Signature

    @classmethod
    def of(cls, module: nn.Module) -> _Forward:
        """Read the signature; what has none, a scripted module for instance, takes one argument."""
        try:
            return cls(inspect.signature(module.forward))
        except (TypeError, ValueError):
            return cls(inspect.signature(lambda x, /: None))

    @cached_property
    def named(self) -> list[str]:
        """The names of the parameters that can be passed by name."""
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        return [p.name for p in self.signature.parameters.values() if p.kind in kinds]

    @cached_property
    def required(self) -> list[str]:
        """The names of the parameters without a default."""
        any_number = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        found = self.signature.parameters.values()
        return [p.name for p in found if p.default is p.empty and p.kind not in any_number]

    @cached_property
    def takes_any_name(self) -> bool:
        """Whether there is a ``**kwargs``."""
        return any(p.kind is p.VAR_KEYWORD for p in self.signature.parameters.values())

    def entries(self, x: Mapping[Any, Any], dict_key_y: str) -> dict[str, Any]:
        """Return the entries of a mapping that are passed by name, if they are."""
        of_inputs = {k: v for k, v in x.items() if k != dict_key_y or k in self.required}
        return {
            k: v
            for k, v in of_inputs.items()
            if k in self.named or (self.takes_any_name and isinstance(k, str))
        }

    def by_name(
        self, x: Mapping[Any, Any], entries: dict[str, Any], model_kwargs: dict[str, Any]
    ) -> bool | None:
        """Say whether a mapping is passed by name; None where either may be meant.

        Raises
        ------
        ValueError
            If it can be passed in neither way.
        """
        given = {*entries, *model_kwargs}
        missing = [k for k in self.required if k not in self.named or k not in given]
        fits = bool(entries) and not missing
        if not self._takes_one(model_kwargs):
            if fits:
                return True
            raise ValueError(
                f"The model's forward{self.signature} takes neither a mapping nor the entries of this one, whose keys are "
                f"{sorted(map(str, x))}; it needs {missing or self.named}. Give the entries these names in the data set or the "
                "collate function, or wrap the model in a module whose forward takes the mapping."
            )
        matching = [k for k in self.named if k in x]
        if not fits or not (matching or self.takes_any_name):
            return False
        return True if matching and matching != self.named[:1] else None

    def _takes_one(self, model_kwargs: dict[str, Any]) -> bool:
        """Say whether forward may be called with one argument, and these by name."""
        try:
            self.signature.bind(None, **model_kwargs)
        except TypeError:
            return False
        return True
