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
from .baselines import Scorer
from .basis import NystromBasis
from .batches import Input, batch_size, collate, named_batches, rows
from .candidates import progress_bars
from .landmarks import draw_outputs
from .likelihoods import LIKELIHOODS
from .plan import Plan, data_size, first_batch
from .scan import Scan, scan
from .search import Setting


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
    n_eigenvalues: int | float
    curvature_size: int | None
    seed: int
    dict_key_x: str
    dict_key_y: str
    H: Any  # Tensor (K, K), None before a fit
    loss: Any  # Tensor ()
    n_data: int
    temperature: Any  # float
    prior_precision: Any  # Tensor (1,), (L,) or (P,)
    curvature: str
    curvature_samples: int
    residual: str
    residual_variance: Any  # float
    residual_scale: Any  # float
    snapshots: list[tuple[int, Tensor]]
    n_curvature: int
    fit_history_: dict[str, list[float]]
    _temperature: float
    _temperature_fixed: bool
    _named_by_user: set[str]
    _posterior_scale: Tensor | None
    n_predictions: int
    _set_fit: Callable[[NystromBasis, list[tuple[int, Tensor]], Tensor, tuple[int, int, int]], None]
    _undone_on_error: Callable[[], AbstractContextManager[None]]
    _validation_data: Callable[..., Any]
    _predictor: Callable[..., Any]
    _link: Callable[..., Any]
    _setting: Callable[[], Setting]
    _keep_snapshot: Callable[[int], None]

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
        link_approx: str = "probit",
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
            Stop early, as the paper does: of the first n curvature inputs, n up to
            ``curvature_size``, the n with the smallest validation NLL is kept, and with it
            :math:`[G_n + (n / N) \delta I]^{-1}`. That is a temperature: T = N / n with the
            prior precision :math:`\delta n / N`, and both are set so (T stays free, so that a grid
            search may still tune it). ``fit_history_`` has the NLL of every n. With a temperature that
            you fixed, or ``override=False``, the NLL is only recorded, as ``laplace.ELLA`` does.
        val_steps : int, optional
            Score, and take a snapshot of G, after every so many curvature batches; default 1. The
            first n inputs are a random sample, except with ``curvature_size=None``, where they are those that come first: shuffle.
        link_approx : str
            The link that validation predictions use.

        Raises
        ------
        ValueError
            If an argument is out of range, the loader empty, a batch malformed or not
            finite, or the features not finite. A previous fit stays intact.

        Notes
        -----
        Cost in forward passes: N, plus 3 or more a landmark, plus 1 + 2K a curvature
        input (with ``curvature="mc"``, 2 + 3 a sampled label); with ``val_loader``, 1 + 2K a validation
        input, however many n are scored. Memory: M x P numbers if the budget allows, K x P
        afterwards.
        """
        self._check_fit(train_loader, balanced, val_steps)
        if val_loader is not None:
            validation.check_prediction("glm", link_approx, 100, None, None)
            validation.check_link(self.likelihood, link_approx)
        if landmarks is not None:
            landmarks = validation.check_landmarks(landmarks, self.dict_key_x)
        progress = progress_bars(progress_bar)
        fresh = override or self.H is None
        unchecked = [] if landmarks is None else [landmarks]

        def forward(x: Input) -> Tensor:
            f = self.backend.forward(x)
            while unchecked:  # at the first batch, before any long work
                inputs, outputs = unchecked.pop()
                of_landmark = self.backend.forward(rows(inputs, 0, 1)) if f.ndim > 2 else f
                validation.check_coordinates(outputs, of_landmark.shape[1:].numel())
            self.backend.support(x)  # probes, at the first batch too
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
        every = val_steps or (1 if val_loader is not None else None)
        snapshots = self.backend.accumulate(
            batches,
            basis,
            found.n_data,
            every,
            sampled=self._labels(),
            seed=self.seed,
            first_position=0 if fresh else self.n_data,
        )
        self._warn_of_few_samples(snapshots[-1][0], basis.rank)
        loss, counts = found.loss, (found.n_data, found.n_predictions)
        if not fresh:  # what was fitted before has no first n inputs any more
            snapshots = [(self.n_curvature + snapshots[-1][0], self.H + snapshots[-1][1])]
            loss = self.loss + loss
            counts = self.n_data + found.n_data, self.n_predictions + found.n_predictions
        with self._undone_on_error():
            self._set_fit(basis, snapshots, loss, (*counts, found.n_outputs))
            self.fit_history_ = {"processed_examples": [float(self.n_curvature)], "val_nll": []}
            if val_loader is not None:
                free = fresh and not self._temperature_fixed
                self._stop_early(val_loader, link_approx, free, progress)

    def plan(self, train_loader: Iterable[Any], verbose: bool = True) -> Plan:
        """Work out what :meth:`fit` will compute, and what it will cost, without doing it.

        Parameters
        ----------
        train_loader : iterable
            Of which the first batch is read.
        verbose : bool
            Print the plan: forward passes, seconds and bytes of each stage. Of ``n_eigenvalues`` as a
            share, which is not known before, it counts as many directions as the budget allows.

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
            rank=self._largest_rank(),
            n_curvature=self.curvature_size,
            sampled=self._labels(),
        )
        if verbose:
            print(plan)
        return plan

    def _labels(self) -> int:
        """Return how many labels an input are sampled for G; 0 for the exact one."""
        return 0 if self.curvature == "exact" else self.curvature_samples

    def _largest_rank(self) -> int:
        """Return K; of a share, which is not known before, as much as the memory budget allows."""
        if isinstance(self.n_eigenvalues, int):
            return self.n_eigenvalues
        engine = self.backend.engine
        return max(1, min(self.subsample_size, engine.budget() // engine.row_size()))

    @exclusively
    def _check_fit(self, train_loader: Any, balanced: bool, val_steps: Any) -> None:
        validation.check_size("val_steps", val_steps)
        validation.check_choice("curvature", self.curvature, validation.CURVATURES)
        validation.check_size("curvature_samples", self.curvature_samples, optional=False)
        if [id(p) for p in self.model.parameters() if p.requires_grad] != [id(p) for p in self.params]:
            raise ValueError(
                "The model's parameters that require grad are not those it had when the estimator was built. "
                "Build a new estimator after changing them."
            )
        if balanced and self.likelihood in ("regression", "bernoulli"):
            raise ValueError(f"balanced=True needs classes; {self.likelihood} has none. Leave it out.")
        if self.curvature_size is None and isinstance(train_loader, Iterator):
            raise ValueError(
                "curvature_size=None reads the data twice, and this loader is an iterator that can be read once. "
                "Pass an iterable that can be started again, or a number as curvature_size."
            )

    def _warn_of_few_samples(self, n: int, rank: int) -> None:
        if self.curvature == "mc" and n < 20 * rank:
            warnings.warn(
                f"curvature='mc' estimates G (K = {rank}) from {n} inputs; under 20 K = {20 * rank} it is badly wrong. "
                "Raise curvature_size, lower n_eigenvalues, or use curvature='exact'.",
                stacklevel=5,
            )

    def _new_basis(
        self, found: Scan, given: tuple[Input, Tensor] | None, balanced: bool, progress: Any
    ) -> NystromBasis:
        if given is None:
            landmarks = draw_outputs(found.landmarks, self.seed, balanced)
            if len(landmarks) < self.subsample_size:
                self._report_reduction(
                    "subsample_size", len(landmarks), "the data have no more pairs of input and output"
                )
        else:
            landmarks = validation.explicit_landmarks(given)
        basis = self.backend.build_basis(landmarks, self.n_eigenvalues, progress)
        if isinstance(self.n_eigenvalues, float):
            if basis.retained < self.n_eigenvalues - 1e-9:
                reason = f"more directions exceed the memory budget or the numerical rank; these retain {basis.retained:.3g}"
                self._report_reduction("n_eigenvalues", basis.rank, reason)
        elif basis.rank < self.n_eigenvalues:
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
            # In random order, so that the first n are a random sample too.
            sample = found.curvature.by_key()
            for start in range(0, len(sample), found.batch):
                part = sample[start : start + found.batch]
                for indices, x in collate([x for _, x in part], found.batch):
                    yield f"training inputs {sorted(part[i][0] for i in indices)[:8]}", x

    def _stop_early(self, val_loader: Iterable[Any], link_approx: str, free: bool, progress: Any) -> None:
        r"""Score every snapshot of G; if free, keep the best, with T = N / n and :math:`\delta n / N`."""
        scorer = Scorer(self._validation_data(val_loader, progress), None)
        predictor = self._predictor(self._link(link_approx, 100))
        # What the covariance T [G + T delta I]^-1 adds to G, whatever T is now: fitting again changes nothing.
        delta, residual_variance = self.prior_precision * self.temperature, self.residual_variance

        def stop_at(n: int) -> None:
            if free:
                self.prior_precision, self._temperature = delta * (n / self.n_data), self.n_data / n
                self._keep_snapshot(n)
                if self.residual != "none":  # which no temperature changes
                    self.residual_scale = residual_variance * float(self.prior_precision)

        scores = []
        for n, _ in progress(self.snapshots, "Early stopping"):
            stop_at(n)
            scores.append(scorer(predictor, self._setting().at(curvature_size=n)))
        stop_at(self.snapshots[min(range(len(scores)), key=scores.__getitem__)][0])
        self.fit_history_ = {"processed_examples": [float(n) for n, _ in self.snapshots], "val_nll": scores}
