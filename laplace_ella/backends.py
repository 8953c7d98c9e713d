r"""Curvature backends for laplace-torch whose Jacobian is :math:`\phi = J V`.

The host's own formulas, applied to such a backend, compute ELLA: it is linearised
Laplace with the weights confined to :math:`\theta^* + \operatorname{span}(V)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .data.batches import Input
from .data.checks import check_choice, check_flag, check_size, shown
from .fitting.checkpoint import check_dtypes
from .fitting.curvature import curvature
from .host import CurvatureInterface, GGNInterface
from .network.checks import check_finite_features, check_module, check_weights, check_whole
from .network.engine import AUTODIFF, Engine
from .network.functional import unwrap
from .network.gradients import asdl_library, asdl_rows, backpack_library, backpack_rows
from .network.probing import Support
from .network.safety import LOCK
from .nystrom.basis import NystromBasis
from .nystrom.checks import check_budget, check_spill
from .nystrom.gram import Spill
from .nystrom.jacobian import features
from .posterior.likelihoods import LIKELIHOODS, name_of
from .posterior.targets import checked_targets, prediction_weights

# What a backend takes beside the model, the likelihood and the keys, and what it is without being named.
OPTIONS: dict[str, Any] = {
    "chunk_size": None,
    "memory_budget": None,
    "autodiff": None,
    "compile": False,
    "spill": None,
    "spill_dtype": torch.bfloat16,
}


class NystromGGN(GGNInterface):
    r"""Generalised Gauss-Newton curvature seen through a Nystrom basis.

    Parameters
    ----------
    model : torch.nn.Module
        The network. DataParallel, DistributedDataParallel and torch.compile wrappers are taken off.
    likelihood : str
        "classification", "regression" or "bernoulli".
    dict_key_x : str
        Key of the inputs in mapping batches.
    dict_key_y : str
        Key of their targets, which a model that takes the entries of a mapping by name does not get.
    chunk_size : int, optional
        Directions per forward-mode call. Default: as many as keep tensors in cache
        (CPU), or within the memory budget (GPU).
    memory_budget : int or float, optional
        Bytes (int), or share of the device's free memory (float), that gradient rows
        and activations may take. Default: a quarter of the free memory.
    autodiff : {"auto", "forward", "double", "contraction", "reverse"}
        How features are computed. "auto": forward mode (1 + 2K forward passes) or contraction layer by layer (about
        1 + C, and the cheaper of two products for each layer), whichever counts say is cheaper; where an operator of
        the model does not support it, the next that works.
    compile : bool
        Run forward mode through :func:`torch.compile`.
    spill : str or path, optional
        Keep gradient rows that do not fit the budget in CPU memory ("cpu"), or in a temporary
        file in this folder, instead of computing them again.
    spill_dtype : torch.dtype
        The precision of spilled rows; the relative error of an entry is half its eps.

    Notes
    -----
    A model may return outputs (B, ..., C); positions are flattened into the batch, input by
    input, so that f is (B L, C) wherever it says (B, C).
    """

    row_engine: ClassVar[Any] = None  # None: torch.func, or a loop where that fails
    row_library: ClassVar[Any] = None  # imports the library of the row engine, or says what to install
    default_autodiff: ClassVar[str] = "auto"

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        *,
        chunk_size: int | None = None,
        memory_budget: int | float | None = None,
        autodiff: str | None = None,
        compile: bool = False,  # noqa: A002
        spill: str | PathLike[str] | None = None,
        spill_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        with LOCK:  # while another thread has them exchanged, weights are something else
            check_weights(model)
        check_whole(model)
        check_choice("likelihood", likelihood, LIKELIHOODS)
        known = LIKELIHOODS[name_of(likelihood)]
        if self.row_library is not None:
            self.row_library()
        super().__init__(unwrap(model), known.host_name)
        self.likelihood, self.dict_key_x, self.dict_key_y = likelihood, dict_key_x, dict_key_y
        given = (chunk_size, memory_budget, autodiff, compile, spill, spill_dtype)
        self.options = dict(zip(OPTIONS, given))
        autodiff = self.default_autodiff if autodiff is None else autodiff
        check_choice("autodiff", autodiff, AUTODIFF)
        folder = check_spill(spill, spill_dtype)
        self.basis: NystromBasis | None = None
        self.observed = known
        self.engine = Engine(
            self.model,
            autodiff,
            check_size("chunk_size", chunk_size),
            check_budget(memory_budget),
            check_flag("compile", compile),
            dict_key_x,
            dict_key_y,
            self.row_engine,
            None if spill is None else Spill(folder, spill_dtype),
        )

    def __copy__(self) -> NystromGGN:
        new = type(self).__new__(type(self))
        new.__dict__.update(vars(self))
        new.engine = copy(self.engine)
        return new

    def support(self, x: Input) -> Support:
        """Say how the model can be differentiated; found out once on a device, on one row of ``x``.

        Raises
        ------
        Exception
            Whatever the model raises.
        ValueError
            If the forward pass is random, if it finds weights where exchanging them does not reach, if nothing
            works, or if forward and reverse mode disagree.
        """
        return self.engine.support_for(x)

    def features(self, x: Input, basis: NystromBasis, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        r"""Compute :math:`\phi(x)` (B, C, K) and f(x) (B, C) with a given basis.

        If ranks share its directions, all of them have to call, each with inputs of its own.
        """
        if not isinstance(basis, NystromBasis):
            raise ValueError(f"basis must be a NystromBasis, that of a fitted estimator; got {shown(basis)}.")
        return features(self.engine, basis, x, enable_backprop)

    def jacobians(self, x: Input, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        r"""Compute the features, the Jacobian of the outputs in the K coordinates.

        Overrides :meth:`laplace.curvature.CurvatureInterface.jacobians`, with K
        columns instead of P.

        Returns
        -------
        phi, f : Tensor (B, C, K), Tensor (B, C)

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If the model's dtype has changed since.
        """
        if self.basis is None:
            raise AttributeError("The backend has no basis yet. Call fit() on the estimator first.")
        check_dtypes(self.basis, self.engine.function.weights().values())
        return self.features(x, self.basis, enable_backprop)

    def full(self, x: Input, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Compute loss () and curvature (K, K) of a batch with the basis of the last fit, in float64.

        Overrides :meth:`laplace.curvature.GGNInterface.full`, without a (B, C, C) tensor.
        """
        if not isinstance(y, Tensor):
            raise ValueError(f"y must be a tensor of targets; got {shown(y)}.")
        phi, f = self.jacobians(x)
        check_finite_features(phi, f, "the batch given")
        likelihood = self.observed
        targets = checked_targets(likelihood, y, f, self.engine.axes(x), "the batch given")
        return likelihood.loss(f, targets), curvature(
            likelihood, phi, f, prediction_weights(likelihood, y, None)
        )


class ReverseNystromGGN(NystromGGN):
    """:class:`NystromGGN` in reverse mode: cost grows with C instead of K.

    Prefer it with few outputs and many directions (C = 1, K = 20, say).
    """

    default_autodiff = "reverse"


class BackPackNystromGGN(NystromGGN):
    """:class:`NystromGGN` with landmark gradients from BackPACK, of which it raises an ImportError if it is missing."""

    row_engine = staticmethod(backpack_rows)
    row_library = staticmethod(backpack_library)

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_module(model)
        if not all(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "The BackPACK backend does not support frozen parameters (as in laplace-torch). "
                "Leave `backend` out: torch.func does."
            )
        super().__init__(model, *args, **kwargs)


class AsdlNystromGGN(NystromGGN):
    """:class:`NystromGGN` with landmark gradients from ASDL, of which it raises an ImportError if it is missing."""

    row_engine = staticmethod(asdl_rows)
    row_library = staticmethod(asdl_library)


# By what laplace-torch calls its own, which it need not have.
_BACKENDS: dict[str, type[NystromGGN]] = {
    "CurvlinopsGGN": NystromGGN,
    "BackPackGGN": BackPackNystromGGN,
    "AsdlGGN": AsdlNystromGGN,
}


def nystrom_backend(backend: Any) -> type[NystromGGN]:
    """Find our backend for one of laplace-torch's, or for an instance of one.

    Raises
    ------
    ValueError
        If the backend is one of the empirical Fisher or the Hessian, whose curvature is not a GGN.
    """
    if isinstance(backend, CurvatureInterface):
        backend = type(backend)
    if backend is None or backend is GGNInterface:
        return NystromGGN
    is_backend = isinstance(backend, type) and issubclass(backend, CurvatureInterface)
    names = [base.__name__ for base in backend.__mro__] if is_backend else []
    of_fisher = "EFInterface" in names
    if is_backend and issubclass(backend, NystromGGN):
        return backend
    if not of_fisher and (known := [_BACKENDS[name] for name in names if name in _BACKENDS]):
        return known[0]
    name = getattr(backend, "__name__", repr(backend))
    reason = (
        "the empirical Fisher is not the curvature ELLA needs"
        if of_fisher
        else "it has no generalised Gauss-Newton curvature that is known here"
    )
    raise ValueError(
        f"backend={name} cannot be used with hessian_structure='ella': {reason}. Allowed are CurvlinopsGGN, "
        "BackPackGGN, AsdlGGN, NystromGGN and its subclasses. Leave `backend` out for the default."
    )


def backend_options(backend: Any, given: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a backend to be built.

    Parameters
    ----------
    backend : type, instance or None
        The options of a :class:`NystromGGN` are used where ``given`` has defaults.
    given : mapping
        A value for each of :data:`OPTIONS`, among others.
    further : mapping
        The user's ``backend_kwargs``, which come before all others.
    """
    of_call = {name: given[name] for name in OPTIONS}
    own = backend.options if isinstance(backend, NystromGGN) else {}
    named = {name: value for name, value in of_call.items() if value is not OPTIONS[name]}
    return {**of_call, **own, **named, **further}
