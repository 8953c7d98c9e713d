r"""Curvature backends for laplace-torch whose Jacobian is :math:`\phi = J V`.

The host's own formulas, applied to such a backend, compute ELLA: it is linearised
Laplace with the weights confined to :math:`\theta^* + \operatorname{span}(V)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from os import PathLike
from typing import Any, ClassVar

import torch
from laplace.curvature import (
    AsdlGGN,
    BackPackGGN,
    CurvatureInterface,
    CurvlinopsGGN,
    EFInterface,
    GGNInterface,
)
from torch import Tensor, nn

from .data.batches import Input, Nested, Raw, batch_size, n_bytes, rows
from .data.hashing import SAMPLED_LABEL, uniforms
from .data.landmarks import Landmarks
from .data.packing import packed, unpacked
from .data.progress import Progress
from .data.validation import (
    NamingShape,
    check_budget,
    check_choice,
    check_finite_features,
    check_flag,
    check_module,
    check_size,
    check_spill,
    check_weights,
    check_whole,
    shown,
)
from .fitting.accumulation import Part
from .fitting.checkpoint import check_dtypes
from .fitting.plan import Plan, make_plan
from .network.engine import AUTODIFF, Engine
from .network.functional import Weights, first_weight, last_layer_norms, unwrap
from .network.gradients import RowEngine, asdl_rows, backpack_rows
from .network.probing import Support
from .network.safety import LOCK, safely
from .nystrom.basis import NystromBasis, build_basis, combined
from .nystrom.gram import FRESH, Spill, Unfinished
from .nystrom.rows import RowSource
from .parallel.ranks import ALONE, Ranks
from .parallel.sharding import for_everyone
from .posterior.likelihoods import LIKELIHOODS, checked_targets
from .posterior.residual import joint_gram, output_grams

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
        Key of their targets.
    chunk_size : int, optional
        Directions per forward-mode call. Default: as many as keep tensors in cache
        (CPU), or within the memory budget (GPU).
    memory_budget : int or float, optional
        Bytes (int), or share of the device's free memory (float), that gradient rows
        and activations may take. Default: a quarter of the free memory.
    autodiff : {"auto", "forward", "double", "reverse"}
        How features are computed. "auto": reverse mode if 8 C <= K in a network that shares
        weights between positions (not in an MLP), else forward mode; where an operator of
        the model does not support it, the next that works.
    compile : bool
        Run forward mode through :func:`torch.compile`.
    spill : str or path, optional
        Keep gradient rows that do not fit the budget in CPU memory ("cpu"), or in a temporary
        file in this folder, instead of computing them again.
    spill_dtype : torch.dtype
        In which precision; the relative error of an entry is half its eps.

    Notes
    -----
    A model may return outputs (B, ..., C); positions are flattened into the batch, input by
    input, so that f is (B L, C) wherever it says (B, C).
    """

    row_engine: ClassVar[Any] = None  # None: torch.func, or a loop where that fails
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
        known_to_host = "regression" if likelihood == "regression" else "classification"
        super().__init__(unwrap(model), known_to_host, dict_key_x=dict_key_x, dict_key_y=dict_key_y)
        self.likelihood = likelihood
        given = (chunk_size, memory_budget, autodiff, compile, spill, spill_dtype)
        autodiff = self.default_autodiff if autodiff is None else autodiff
        check_choice("autodiff", autodiff, AUTODIFF)
        folder = check_spill(spill, spill_dtype)
        self.spill = None if spill is None else Spill(folder, spill_dtype)
        self.options = dict(zip(OPTIONS, given))
        self.basis: NystromBasis | None = None
        self._example: Input | None = None  # an input, for the types of its containers
        self.engine = Engine(
            self.model,
            autodiff,
            check_size("chunk_size", chunk_size),
            check_budget(memory_budget),
            check_flag("compile", compile),
            dict_key_x,
        )

    def __copy__(self) -> NystromGGN:
        new = type(self).__new__(type(self))
        new.__dict__.update(vars(self))
        new.engine = copy(self.engine)
        return new

    @property
    def _reference(self) -> Tensor:
        return first_weight(self.model)

    def inputs(self, x: Raw | Input, size: int | None = None) -> Input:
        """Say which tensors of an input are cut into rows; see :class:`laplace_ella.network.cutting.Cutting`.

        Parameters
        ----------
        x : Tensor or mapping
        size : int, optional
            How many inputs there are, if that is known.

        Raises
        ------
        Exception
            Whatever the model raises.
        ValueError
            If the model does not treat the rows of the input one by one.
        """
        with NamingShape(x):
            x = self.engine.cutting(x, size)
        if isinstance(x, Nested) and self._example is None:
            self._example = rows(x, 0, 1)
        return x

    def to_model(self, x: Raw | Input) -> Input:
        """Cut an input into rows and move it to the model's device; convert it where the model needs that."""
        return self.engine.to_model(x)

    def forward(self, x: Raw | Input, **model_kwargs: Any) -> Tensor:
        """Return the model's outputs (B, ..., C), in evaluation mode and without a graph."""
        return safely(self.model, lambda: self.engine.function.own_outputs(self.to_model(x), **model_kwargs))

    def positions(self, x: Input) -> tuple[int, ...]:
        """Return the axes of the outputs for ``x`` between batch and C."""
        return self.engine.facts(self.to_model(x)).positions

    def last_layer_norms(self, x: Input) -> Tensor | None:
        """Return the squared norms (B, ) of what the last layer takes; None without such a layer."""
        return safely(self.model, lambda: last_layer_norms(self.engine.function, self.to_model(x)))

    def forward_at(
        self, offsets: Weights, x: Input, enable_backprop: bool = False, **model_kwargs: Any
    ) -> Tensor:
        """Return the outputs (S, B, C) at the weights plus each of S offsets (S, *shape)."""
        n_samples = next(iter(offsets.values())).shape[0]

        def compute() -> Tensor:
            function, entered = self.engine.function, self.to_model(x)
            weights = function.weights()
            return torch.stack(
                [
                    function.outputs_near(
                        weights, {k: v[s] for k, v in offsets.items()}, entered, **model_kwargs
                    ).flatten(0, -2)
                    for s in range(n_samples)
                ]
            )

        return safely(self.model, compute, enable_backprop)

    def support(self, x: Input) -> Support:
        """Say how the model can be differentiated; found out once a device, on a row of ``x``.

        Raises
        ------
        Exception
            Whatever the model raises.
        ValueError
            If the forward pass is random, if it finds weights where exchanging them does not reach, if nothing
            works, or if forward and reverse mode disagree.
        """
        return self.engine.known_support() or self.engine.support(self.to_model(x))

    def row_source(self, landmarks: Landmarks, ranks: Ranks = ALONE, sharded: bool = False) -> RowSource:
        """Prepare the gradient rows of landmarks; see :class:`laplace_ella.nystrom.rows.RowSource`."""
        longest = self.to_model(max(landmarks.inputs, key=n_bytes))
        support = self.engine.support(longest)
        rows_by: RowEngine = self.row_engine or support.engine
        return RowSource(
            self.engine.function,
            landmarks,
            rows_by,
            self.to_model,
            self.engine.gradients_per_call(longest),
            # The libraries, and plain backward passes, compute all weights' gradients at once.
            separable=self.row_engine is None and support.rows == "vmap",
            ranks=ranks,
            sharded=sharded,
        )

    def build_basis(
        self,
        landmarks: Landmarks,
        rank: int | float,
        progress: Progress,
        ranks: Ranks = ALONE,
        sharded: bool = False,
        unfinished: Unfinished = FRESH,
    ) -> NystromBasis:
        """Compute the basis of the landmarks' gradients; see :func:`laplace_ella.nystrom.basis.build_basis`."""
        with ranks.together("the gradients of landmarks"):
            source = safely(self.model, lambda: self.row_source(landmarks, ranks, sharded))
            budget = self.engine.budget()
        budget = ranks.least(budget, "the memory budget")
        return safely(
            self.model,
            lambda: build_basis(
                source, rank, budget=budget, spill=self.spill, progress=progress, unfinished=unfinished
            ),
        )

    def combined(self, landmarks: Landmarks, coefficients: Tensor) -> Weights:
        r"""Compute the directions :math:`V = R^T a` of landmarks and coefficients; see :func:`laplace_ella.nystrom.basis.combined`."""
        return safely(
            self.model,
            lambda: combined(
                self.row_source(landmarks), coefficients.to(self.engine.device), self.engine.budget()
            ),
        )

    def restored_inputs(self, entries: Sequence[Any]) -> list[Input]:
        """Give packed inputs the types of containers that inputs had here, if there were any."""
        return [unpacked(x, self._example) for x in entries]

    def plan(
        self,
        x: Input,
        *,
        n_data: int | None,
        n_landmarks: int,
        rank: int,
        n_curvature: int | None,
        sampled: int = 0,
    ) -> Plan:
        """Work out what a fit costs, from one batch; see :func:`laplace_ella.fitting.plan.make_plan`."""
        return make_plan(
            self._eager_engine(),
            self.to_model(x),
            n_data=n_data,
            n_landmarks=n_landmarks,
            rank=rank,
            n_curvature=n_curvature,
            sampled=sampled,
            row_source=self.row_source,
            spill=self.spill,
            forward=self.forward,
            curvature=self.curvature,
            curvature_of=self.curvature_of,
        )

    def _eager_engine(self) -> Engine:
        """Return the engine, or one that compiles nothing: that takes minutes a shape."""
        own = self.engine
        if not own.compiled:
            return own
        return Engine(own.module, own.autodiff, own.chunk_size, own.memory_budget, dict_key_x=self.dict_key_x)

    def features(self, x: Input, basis: NystromBasis, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        r"""Compute :math:`\phi(x)` (B, C, K) and f(x) (B, C) with a given basis.

        Where ranks share its directions, all have to call, each with inputs of its own.
        """
        if not isinstance(basis, NystromBasis):
            raise ValueError(f"basis must be a NystromBasis, that of a fitted estimator; got {shown(basis)}.")
        if basis.sharded:
            phi, f = self._shared_features(x, basis)
            assert phi is not None
            assert f is not None
            return phi, f
        return safely(
            self.model, lambda: self.engine.features(self.to_model(x), basis.directions), enable_backprop
        )

    def _shared_features(self, x: Input | None, basis: NystromBasis) -> tuple[Tensor | None, Tensor | None]:
        def answer(theirs: Any) -> Tensor:
            return safely(
                self.model, lambda: self.engine.features(self._unpacked(theirs), basis.directions)[0]
            )

        question = None if x is None else packed(self.inputs(x))
        phi = for_everyone(basis.ranks, question, answer, basis.rank, "the features")
        if x is None or phi is None:
            return None, None
        f = self.forward(x).flatten(0, -2)
        return phi.to(f), f

    def _unpacked(self, theirs: Any) -> Input:
        """Return another rank's input, in containers of the types that inputs here have or had."""
        return self.to_model(unpacked(theirs, self._example))

    def pull(self, x: Input | None, basis: NystromBasis, cotangents: Tensor | None) -> Tensor:
        r"""Compute :math:`V^T J^T u` (B, n, K) of cotangents u (B, n, L C)."""

        def answer(question: Any) -> Tensor:
            theirs, us = self._unpacked(question[0]), question[1].to(self._reference.device)
            return safely(self.model, lambda: self.engine.pull(theirs, basis.directions, us))

        if not basis.sharded:
            assert x is not None
            assert cotangents is not None
            return safely(
                self.model, lambda: self.engine.pull(self.to_model(x), basis.directions, cotangents)
            )
        question = None if x is None or cotangents is None else (packed(self.inputs(x)), cotangents)
        pulled = for_everyone(basis.ranks, question, answer, basis.rank, "the sampled curvature")
        return self._reference.new_zeros(0, 0, basis.rank) if pulled is None else pulled.to(self._reference)

    def push(self, x: Input, tangents: Weights, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Push S tangents (S, *shape) forward: J g (B, C, S), and f (B, C)."""
        return safely(self.model, lambda: self.engine.features(self.to_model(x), tangents), enable_backprop)

    def output_grams(self, x: Input) -> Tensor:
        """Compute :math:`J J^T` (B, C, C) of each input; see :func:`laplace_ella.posterior.residual.output_grams`."""
        x = self.inputs(x)
        facts = self.engine.facts(self.to_model(x))
        return safely(
            self.model,
            lambda: output_grams(
                x, facts.n_outputs, facts.n_coordinates, self.row_source, self.engine.budget()
            ),
        )

    def joint_gram(self, x: Input) -> Tensor:
        """Compute :math:`J J^T` (BC, BC) of all inputs' outputs."""
        x = self.inputs(x)
        n_coordinates = self.engine.facts(self.to_model(x)).n_coordinates
        return safely(self.model, lambda: joint_gram(x, n_coordinates, self.row_source, self.engine.budget()))

    def bounded(self, x: Input, width: int) -> Iterator[Input]:
        """Cut a batch into parts with ``width`` float64 numbers an output in a quarter of the memory budget."""
        x = self.inputs(x)
        size = batch_size(x)
        per_row = 8 * width * self.engine.facts(self.to_model(x)).n_coordinates
        step = max(1, self.engine.budget() // 4 // per_row)
        for start in range(0, size, step):
            yield x if step >= size else rows(x, start, start + step)

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

    def full(
        self,
        x: Input,
        y: Tensor,
        name: str = "the batch given",
        basis: NystromBasis | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Compute loss () and curvature (K, K) of a batch, in float64.

        Overrides :meth:`laplace.curvature.GGNInterface.full`, without a (B, C, C) tensor; ``name`` is for messages.
        The basis is that of the last fit, unless another is given.
        """
        if not isinstance(y, Tensor):
            raise ValueError(f"y must be a tensor of targets; got {shown(y)}.")
        phi, f = self.jacobians(x) if basis is None else self.features(x, basis)
        check_finite_features(phi, f, name)
        y = checked_targets(LIKELIHOODS[self.likelihood], y, f, self.positions(x), name)
        return LIKELIHOODS[self.likelihood].loss(f, y), self.curvature(phi, f)

    def curvature(self, phi: Tensor, f: Tensor) -> Tensor:
        r"""Return :math:`\sum_b \phi_b^T \Lambda_b \phi_b` (K, K), float64."""
        root = LIKELIHOODS[self.likelihood].curvature_root(phi.double(), f.double())
        return root.T @ root

    def curvature_of(self, basis: NystromBasis, sampled: int = 0, seed: int = 0) -> Callable[[Part], Tensor]:
        r"""Return what computes the curvature (K, K) of a part of the data, in float64.

        Parameters
        ----------
        sampled : int
            How many labels an input to sample; 0 for the exact curvature.
        seed : int
            Of those labels.

        Notes
        -----
        What it returns raises ValueError if features are not finite. Where ranks share the directions,
        all have to call it, with ``part.x`` None where they have no inputs left.
        """

        def of(part: Part) -> Tensor:
            if part.x is None:
                if basis.sharded:
                    self.answer_others(basis, sampled)
                return self._reference.new_zeros(basis.rank, basis.rank, dtype=torch.float64)
            if sampled:
                return self._sampled_curvature(part, basis, sampled, seed)
            phi, f = self.features(part.x, basis)
            check_finite_features(phi, f, part.name)
            return self.curvature(phi, f)

        return of

    def _sampled_curvature(self, part: Part, basis: NystromBasis, sampled: int, seed: int) -> Tensor:
        r"""Estimate the curvature (K, K) of a batch from labels drawn from the model's own predictions.

        The gradients of the loss at sampled labels have the curvature as the mean of their
        outer products. Cost: about 2 + 3 forward passes an input and label, whatever K is.
        """
        assert part.x is not None
        f = self.forward(part.x)
        flat_f = f.flatten(0, -2)
        draws = uniforms(seed, SAMPLED_LABEL, part.positions, f.shape[1:].numel() * sampled)
        u = draws.to(f.device).reshape(len(flat_f), sampled, f.shape[-1])
        gradients = LIKELIHOODS[self.likelihood].sampled_gradients(flat_f.double(), u)
        # (B, n, L C): positions are independent, and their gradients add up.
        cotangents = gradients.reshape(len(f), -1, sampled, f.shape[-1]).transpose(1, 2)
        pulled = self.pull(part.x, basis, cotangents.flatten(2).to(f.dtype))
        check_finite_features(pulled, flat_f, part.name)
        flat_pulled = pulled.double().flatten(0, 1)
        return flat_pulled.T @ flat_pulled / sampled

    def answer_others(self, basis: NystromBasis, sampled: int = 0) -> None:
        """Compute other ranks' features with this rank's directions, having no inputs of one's own."""
        if sampled:
            self.pull(None, basis, None)
        else:
            self._shared_features(None, basis)


class ReverseNystromGGN(NystromGGN):
    """:class:`NystromGGN` in reverse mode: cost grows with C instead of K.

    Prefer it with few outputs and many directions (C = 1, K = 20, say).
    """

    default_autodiff = "reverse"


class BackPackNystromGGN(NystromGGN):
    """:class:`NystromGGN` with landmark gradients from BackPACK."""

    row_engine = staticmethod(backpack_rows)

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        check_module(model)
        if not all(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "The BackPACK backend does not support frozen parameters (as in laplace-torch). "
                "Leave `backend` out: torch.func does."
            )
        super().__init__(model, *args, **kwargs)


class AsdlNystromGGN(NystromGGN):
    """:class:`NystromGGN` with landmark gradients from ASDL."""

    row_engine = staticmethod(asdl_rows)


_BACKENDS: list[tuple[type, type[NystromGGN]]] = [
    (NystromGGN, NystromGGN),
    (BackPackGGN, BackPackNystromGGN),
    (AsdlGGN, AsdlNystromGGN),
    (CurvlinopsGGN, NystromGGN),
]


def nystrom_backend(backend: Any) -> type[NystromGGN]:
    """Find our backend for one of laplace-torch's, or for an instance of one.

    Raises
    ------
    ValueError
        For empirical-Fisher and Hessian backends, whose curvature is not a GGN.
    """
    if isinstance(backend, CurvatureInterface):
        backend = type(backend)
    if backend is None or backend is GGNInterface:
        return NystromGGN
    if isinstance(backend, type):
        if issubclass(backend, NystromGGN):
            return backend
        for theirs, ours in _BACKENDS:
            if issubclass(backend, theirs) and not issubclass(backend, EFInterface):
                return ours
    name = getattr(backend, "__name__", repr(backend))
    reason = (
        "the empirical Fisher is not the curvature ELLA needs"
        if isinstance(backend, type) and issubclass(backend, EFInterface)
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
        A value for each of :data:`OPTIONS`.
    further : mapping
        Which come first.
    """
    own = backend.options if isinstance(backend, NystromGGN) else {}
    named = {name: value for name, value in given.items() if value is not OPTIONS[name]}
    return {**given, **own, **named, **further}
