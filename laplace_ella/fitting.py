r"""``fit`` and ``plan``: one pass over the data, landmarks, basis, curvature, in this order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from . import validation
from .autodiff import exclusively
from .basis import NystromBasis
from .batches import Input, batch_size, collate, named_batches
from .landmarks import draw_outputs
from .likelihoods import LIKELIHOODS
from .plan import Plan, data_size, first_batch
from .scan import Scan, scan
from .tuning import progress_bars


class Fitting:
    """Fitting of an estimator.

    A mixin: :class:`laplace_ella.ELLALaplace` supplies what is declared here.
    """

    model: Any  # torch.nn.Module
    params: list[nn.Parameter]
    likelihood: str
    backend: Any
    basis: Any  # NystromBasis
    subsample_size: int
    n_eigenvalues: int
    curvature_size: int | None
    seed: int
    dict_key_x: str
    dict_key_y: str
    H: Any  # Tensor (K, K), None before a fit
    loss: Any  # Tensor ()
    n_data: int
    fit_history_: dict[str, list[float]]
    _named_by_user: set[str]
    _posterior_scale: Tensor | None
    _set_fit: Callable[[NystromBasis, Tensor, Tensor, int, int], None]
    _undone_on_error: Callable[[], AbstractContextManager[None]]
    _validation_data: Callable[..., Any]
    _score: Callable[..., float]

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(
        self,
        train_loader: Iterable[Any],
        override: bool = True,
        progress_bar: bool = False,
        *,
        landmarks: tuple[Input, Tensor] | None = None,
        balanced: bool = False,
        val_loader: Iterable[Any] | None = None,
        val_steps: int | None = None,
    ) -> None:
        r"""Fit the posterior at the model's weights.

        Parameters
        ----------
        train_loader : iterable
            Any iterable of batches ``(x, y)`` or mappings; read once, twice with
            ``curvature_size=None``. Floating-point inputs are converted to the
            model's dtype.
        override : bool
            False keeps the basis and adds data to loss, N and G.
        progress_bar : bool
        landmarks : tuple, optional
            (inputs, outputs): M inputs in one batch, and a LongTensor (M,) of output
            coordinates, instead of a random draw.
        balanced : bool
            Draw landmark inputs evenly over the classes.
        val_loader : iterable, optional
            Record the validation NLL in ``fit_history_["val_nll"]``, as
            ``laplace.ELLA`` does; it does not influence the fit.
        val_steps : int, optional
            Record it after every so many curvature batches too.

        Raises
        ------
        ValueError
            If an argument is out of range, the loader empty, a batch malformed or not
            finite, or the features not finite. A previous fit stays intact.

        Notes
        -----
        Cost in forward passes: N, plus 3 or more a landmark, plus 1 + 2K a curvature
        input. Memory: M x P numbers if the budget allows, K x P afterwards.
        """
        self._check_fit(train_loader, balanced, val_steps)
        if landmarks is not None:
            landmarks = validation.check_landmarks(landmarks, self.dict_key_x)
        progress = progress_bars(progress_bar)
        fresh = override or self.H is None

        def forward(x: Input) -> Tensor:
            f = self.backend.forward(x)
            if landmarks is not None:
                validation.check_coordinates(landmarks[1], f.shape[-1])
            self.backend.support(x)  # probes at the first batch, before any long work
            return f

        found = scan(
            progress(train_loader, "Training data"),
            forward,
            LIKELIHOODS[self.likelihood],
            n_landmarks=self.subsample_size if fresh and landmarks is None else 0,
            n_curvature=self.curvature_size or 0,
            seed=self.seed,
            balanced=balanced,
            dict_key_x=self.dict_key_x,
            dict_key_y=self.dict_key_y,
            first_position=0 if fresh else self.n_data,
        )
        basis = self._new_basis(found, landmarks, balanced, progress) if fresh else self.basis
        batches = progress(self._curvature_batches(found, train_loader), "Curvature")
        snapshots = self.backend.accumulate(batches, basis, found.n_data, val_steps)
        H, loss, n_data = snapshots[-1][1], found.loss, found.n_data
        if not fresh:
            snapshots = [(self.n_data + n, self.H + G) for n, G in snapshots]
            H, loss, n_data = self.H + H, self.loss + loss, self.n_data + n_data
        with self._undone_on_error():
            self._set_fit(basis, H, loss, n_data, found.n_outputs)
            self._record_history(snapshots, val_loader)

    def plan(self, train_loader: Iterable[Any], verbose: bool = True) -> Plan:
        """Work out what :meth:`fit` will compute, and what it will cost, without doing it.

        Parameters
        ----------
        train_loader : iterable
            Of which the first batch is read.
        verbose : bool
            Print the plan: forward passes, seconds and bytes of each stage.

        Returns
        -------
        Plan

        Raises
        ------
        ValueError
            If the loader is a one-shot iterator or empty, or its first batch malformed.
        """
        x = first_batch(train_loader, self.dict_key_x, self.dict_key_y)
        plan = self.backend.plan(
            x,
            n_data=data_size(train_loader, batch_size(x)),
            n_landmarks=self.subsample_size,
            rank=self.n_eigenvalues,
            n_curvature=self.curvature_size,
        )
        if verbose:
            print(plan)
        return plan

    @exclusively
    def _check_fit(self, train_loader: Any, balanced: bool, val_steps: Any) -> None:
        validation.check_size("val_steps", val_steps)
        if [id(p) for p in self.model.parameters() if p.requires_grad] != [id(p) for p in self.params]:
            raise ValueError(
                "The model's parameters that require grad are not those it had when the estimator was built. "
                "Build a new estimator after changing them."
            )
        if balanced and self.likelihood == "regression":
            raise ValueError("balanced=True needs classes; regression has none. Leave it out.")
        if self.curvature_size is None and isinstance(train_loader, Iterator):
            raise ValueError(
                "curvature_size=None reads the data twice, and this loader is an iterator that can be read once. "
                "Pass an iterable that can be started again, or a number as curvature_size."
            )

    def _new_basis(
        self, found: Scan, given: tuple[Input, Tensor] | None, balanced: bool, progress: Any
    ) -> NystromBasis:
        if given is None:
            landmarks = draw_outputs(found.landmarks, found.n_outputs, self.seed, balanced)
            if len(landmarks) < self.subsample_size:
                self._report_reduction(
                    "subsample_size", len(landmarks), "the data have no more pairs of input and output"
                )
        else:
            landmarks = validation.explicit_landmarks(given)
        basis = self.backend.build_basis(landmarks, self.n_eigenvalues, progress)
        if basis.rank < self.n_eigenvalues:
            reason = f"the gradients of {len(landmarks)} landmarks have no higher numerical rank"
            self._report_reduction("n_eigenvalues", basis.rank, reason)
        return basis

    def _report_reduction(self, name: str, reached: int, reason: str) -> None:
        if name in self._named_by_user:
            warnings.warn(
                f"{name} was reduced from {getattr(self, name)} to {reached}: {reason}.", stacklevel=6
            )

    def _curvature_batches(self, found: Scan, loader: Any) -> Iterator[tuple[str, Input]]:
        if self.curvature_size is None:
            seen = 0
            for name, x, y in named_batches(loader, self.dict_key_x, self.dict_key_y):
                seen += len(y)
                yield name, x
            if seen != found.n_data:
                raise ValueError(
                    f"The second pass over the training data read {seen} inputs, the first {found.n_data}; with "
                    "curvature_size=None the loader must yield the same data twice. Pass a number instead."
                )
        else:
            positions = found.curvature.positions()
            for indices, x in collate(found.curvature.rows(), found.batch):
                yield f"training inputs {[positions[i] for i in indices][:8]}", x

    def _record_history(self, snapshots: list[tuple[int, Tensor]], val_loader: Any) -> None:
        scores: list[float] = []
        if val_loader is not None:
            data = self._validation_data(val_loader, "glm", progress_bars(False))
            final = self.H
            for _, self.H in snapshots:
                self._posterior_scale = None
                scores.append(self._score(data, None, "glm", "probit", 100))
            self.H, self._posterior_scale = final, None
        self.fit_history_ = {"processed_examples": [float(n) for n, _ in snapshots], "val_nll": scores}
