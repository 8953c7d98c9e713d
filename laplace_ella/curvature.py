r"""Curvature backends for laplace-torch whose Jacobian is :math:`\phi = J V`.

The host's own formulas, applied to such a backend, compute ELLA: it is linearised
Laplace with the weights confined to :math:`\theta^* + \operatorname{span}(V)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsGGN, EFInterface, GGNInterface
from torch import Tensor, nn

from .autodiff import FunctionalModel, Weights, largest_activation, safe_autodiff
from .basis import NystromBasis, Progress, build_basis
from .batches import Input, batch_size, collate, key_first, rows, to_model
from .features import (
    CPU_WORKING_SET,
    LIVE_TENSORS,
    Chunks,
    forward_features,
    plan_chunks,
    reverse_features,
)
from .gradients import Engine, asdl_rows, backpack_rows, gradient_rows, supported_engine
from .landmarks import Landmarks
from .likelihoods import LIKELIHOODS
from .memory import default_budget
from .validation import check_finite_features, check_size


class NystromGGN(GGNInterface):
    r"""Generalised Gauss-Newton curvature seen through a Nystrom basis, in forward mode.

    Parameters
    ----------
    model : torch.nn.Module
    likelihood : {"classification", "regression"}
    dict_key_x, dict_key_y : str
        Keys of inputs and targets in mapping batches.
    chunk_size : int, optional
        Directions per forward-mode call. Default: as many as keep tensors in cache
        (CPU), or within the memory budget (GPU).
    memory_budget : int, optional
        Bytes that gradient rows may take. Default: a quarter of the free memory.
    """

    engine: ClassVar[Any] = staticmethod(gradient_rows)  # see gradients.Engine

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        *,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(model, likelihood, dict_key_x=dict_key_x, dict_key_y=dict_key_y)
        self.chunk_size = check_size("chunk_size", chunk_size)
        self.memory_budget = check_size("memory_budget", memory_budget)
        self.basis: NystromBasis | None = None
        self._function = FunctionalModel(model)
        self._engine: Engine | None = None
        self._row_bytes: dict[Any, int] = {}

    @property
    def _reference(self) -> Tensor:
        return next(self.model.parameters())

    def to_model(self, x: Input) -> Input:
        """Move an input to the model's device and dtype."""
        return to_model(key_first(x, self.dict_key_x), self._reference.device, self._reference.dtype)

    def forward(self, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the model's outputs (B, C), in evaluation mode and without a graph."""
        with safe_autodiff(self.model):
            return self._function(self._function.weights(), self.to_model(x), **model_kwargs)

    def forward_at(
        self, offsets: Weights, x: Input, enable_backprop: bool = False, **model_kwargs: Any
    ) -> Tensor:
        """Return the outputs (S, B, C) at the weights plus each of S offsets (S, *shape)."""
        n_samples = next(iter(offsets.values())).shape[0]
        with safe_autodiff(self.model, enable_backprop):
            x = self.to_model(x)
            weights = self._function.weights()
            return torch.stack(
                [
                    self._function({k: w + offsets[k][s] for k, w in weights.items()}, x, **model_kwargs)
                    for s in range(n_samples)
                ]
            )

    def build_basis(self, landmarks: Landmarks, rank: int, progress: Progress) -> NystromBasis:
        """Compute the basis of the landmarks' gradients; see :func:`laplace_ella.basis.build_basis`."""
        with safe_autodiff(self.model):
            longest = self.to_model(max(landmarks.inputs, key=_numel))
            return build_basis(
                self._function,
                landmarks,
                rank,
                engine=self._supported_engine(longest),
                to_model=self.to_model,
                block_rows=self._gradient_rows_per_call(longest),
                memory_rows=self._budget() // self._row_size(),
                progress=progress,
            )

    def features(self, x: Input, basis: NystromBasis, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        r"""Compute :math:`\phi(x)` (B, C, K) and f(x) (B, C) with a given basis."""
        with safe_autodiff(self.model, enable_backprop):
            x, weights = self.to_model(x), self._function.weights()
            if batch_size(x) == 0:
                f = self._function(weights, x)
                return f.new_zeros(*f.shape, basis.rank), f
            chunks = self._feature_chunks(x, basis.rank)
            return self._project(weights, basis.directions, x, chunks)

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
        """
        if self.basis is None:
            raise AttributeError("The backend has no basis yet. Call fit() on the estimator first.")
        return self.features(x, self.basis, enable_backprop)

    def full(self, x: Input, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Compute loss () and curvature (K, K) of a batch, in float64.

        Overrides :meth:`laplace.curvature.GGNInterface.full`, without a (B, C, C) tensor.
        """
        phi, f = self.jacobians(x)
        y = LIKELIHOODS[self.likelihood].targets(y.to(f.device), f)
        return LIKELIHOODS[self.likelihood].loss(f, y), self.curvature(phi, f)

    def curvature(self, phi: Tensor, f: Tensor) -> Tensor:
        r"""Return :math:`\sum_b \phi_b^T \Lambda_b \phi_b` (K, K), float64."""
        root = LIKELIHOODS[self.likelihood].curvature_root(phi.double(), f.double())
        return root.T @ root

    def accumulate(
        self,
        batches: Iterable[tuple[str, Input]],
        basis: NystromBasis,
        n_data: int,
        every: int | None = None,
    ) -> list[tuple[int, Tensor]]:
        r"""Sum the curvature over batches, and scale it to N inputs.

        Parameters
        ----------
        batches : iterable of (name, input)
        n_data : int
            N.
        every : int, optional
            Take a snapshot after every so many batches; always after the last.

        Returns
        -------
        list of (n, G)
            The number n of inputs read, and :math:`N / n` times their curvature (K, K).

        Raises
        ------
        ValueError
            If the features of a batch are not finite.
        """
        total = torch.zeros(basis.rank, basis.rank, dtype=torch.float64, device=self._reference.device)
        snapshots: list[tuple[int, Tensor]] = []
        seen = step = taken = 0
        for step, (name, x) in enumerate(batches, start=1):
            phi, f = self.features(x, basis)
            check_finite_features(phi, f, name)
            total += self.curvature(phi, f)
            seen += len(f)
            if every and step % every == 0:
                snapshots.append((seen, total * (n_data / seen)))
                taken = step
        if taken < step:
            snapshots.append((seen, total * (n_data / seen)))
        return snapshots

    def _supported_engine(self, x: Input) -> Engine:
        """Try the class's engine on two copies of the first row, once."""
        if self._engine is None:
            row = rows(x, 0, 1)
            _, pair = next(collate([row, row], 2))
            self._engine = supported_engine(type(self).engine, self._function, pair)
        return self._engine

    def _project(
        self, weights: Weights, directions: Weights, x: Input, chunks: Chunks
    ) -> tuple[Tensor, Tensor]:
        return forward_features(self._function, weights, directions, x, chunks)

    def _feature_chunks(self, x: Input, rank: int) -> Chunks:
        row_bytes = self._largest_activation(x)
        if self._reference.device.type == "cpu":
            return plan_chunks(row_bytes, rank, CPU_WORKING_SET, self.chunk_size)
        return plan_chunks(row_bytes, rank, self._budget() // LIVE_TENSORS, self.chunk_size)

    def _gradient_rows_per_call(self, x: Input) -> int:
        working_set = CPU_WORKING_SET if self._reference.device.type == "cpu" else self._budget() // 4
        return max(
            1, min(working_set // self._largest_activation(x), self._budget() // 4 // self._row_size())
        )

    def _largest_activation(self, x: Input) -> int:
        signature = tuple(
            (v.shape[1:], v.dtype) if isinstance(v, Tensor) else None
            for v in (x.values() if not isinstance(x, Tensor) else [x])
        )
        if signature not in self._row_bytes:
            with torch.no_grad():
                self._row_bytes[signature] = largest_activation(self._function, rows(x, 0, 1))
        return self._row_bytes[signature]

    def _row_size(self) -> int:
        return sum(w.numel() * w.element_size() for w in self._function.weights().values())

    def _budget(self) -> int:
        return self.memory_budget or default_budget(self._reference.device)


def _numel(x: Input) -> int:
    values = [x] if isinstance(x, Tensor) else x.values()
    return sum(v.numel() for v in values if isinstance(v, Tensor))


class ReverseNystromGGN(NystromGGN):
    """:class:`NystromGGN` in reverse mode: cost grows with C instead of K.

    Prefer it with few outputs and many directions (C = 1, K = 20, say).
    """

    def _project(
        self, weights: Weights, directions: Weights, x: Input, chunks: Chunks
    ) -> tuple[Tensor, Tensor]:
        engine = self._supported_engine(x)
        return reverse_features(self._function, weights, directions, x, chunks, engine)

    def _feature_chunks(self, x: Input, rank: int) -> Chunks:
        return Chunks(rows=self._gradient_rows_per_call(x), directions=rank)


class BackPackNystromGGN(NystromGGN):
    """:class:`NystromGGN` with landmark gradients from BackPACK."""

    engine = staticmethod(backpack_rows)

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not all(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "The BackPACK backend does not support frozen parameters (as in laplace-torch). "
                "Leave `backend` out: torch.func does."
            )
        super().__init__(model, *args, **kwargs)


class AsdlNystromGGN(NystromGGN):
    """:class:`NystromGGN` with landmark gradients from ASDL."""

    engine = staticmethod(asdl_rows)


_BACKENDS: list[tuple[type, type[NystromGGN]]] = [
    (NystromGGN, NystromGGN),
    (BackPackGGN, BackPackNystromGGN),
    (AsdlGGN, AsdlNystromGGN),
    (CurvlinopsGGN, NystromGGN),
]


def nystrom_backend(backend: type | None) -> type[NystromGGN]:
    """Find our backend for one of laplace-torch's.

    Raises
    ------
    ValueError
        For empirical-Fisher and Hessian backends, whose curvature is not a GGN.
    """
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
