r"""``fit`` and ``plan``: one pass over the data, landmarks, basis, curvature, in this order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..data import validation
from ..data.batches import Input, Raw, batch_size, digest_of, rows
from ..data.hashing import digest
from ..data.landmarks import BottomK, draw_outputs
from ..data.pooling import dealt
from ..data.progress import Progress
from ..data.stream import Stream
from ..network.safety import exclusively
from ..nystrom.basis import NystromBasis
from ..parallel.ranks import ALONE, Ranks
from ..posterior.consistency import Consistent, of_one_moment
from ..posterior.likelihoods import LIKELIHOODS
from ..posterior.setting import Setting
from . import checkpoint
from .accumulation import RunningSum
from .checkpoint import on_device_of
from .plan import Plan, data_size, first_batch
from .resume import FitFiles, random_state_restored
from .scan import Scan, over_all, scan
from .stages import Job, accumulate, find_basis, read_data


class Fitting(Consistent):
    """Fitting of an estimator.

    A mixin: :class:`laplace_ella.ELLALaplace` supplies what is declared here.
    """

    params: list[nn.Parameter]
    likelihood: str
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
    shard_directions: bool
    _ranks: Any  # Ranks
    _device: Any
    _dtype: Any
    _backend_kwargs: dict[str, Any]
    _labels_sampled: bool
    _temperature: float
    _temperature_fixed: bool
    _named_by_user: set[str]
    n_predictions: int
    _largest_sums: list[float]
    _set_fit: Callable[..., None]
    _likelihood_name: str
    _scorer: Callable[..., Any]
    _require_same_search: Callable[..., None]
    _progress: Callable[[bool], Progress]
    _check_H_init: Callable[[], None]
    _check_unchanged: Callable[[], None]
    _follow_model: Callable[[], None]
    _check_settings: Callable[[], None]
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
        landmarks: tuple[Raw, Tensor] | None = None,
        balanced: bool = False,
        val_loader: Iterable[Any] | None = None,
        val_steps: int | None = None,
        link_approx: str = "probit",
        basis: NystromBasis | None = None,
        max_samples: int | None = None,
        n_total: int | None = None,
        checkpoint: str | PathLike[str] | None = None,
        checkpoint_every: int = 100,
    ) -> None:
        r"""Fit the posterior at the model's weights.

        On several ranks of a process group, all call it, each with its part of the data, and all
        end with the same posterior; see docs/scaling.md.

        Parameters
        ----------
        train_loader : iterable
            Any iterable of batches ``(x, y)`` or mappings; read once, twice with
            ``curvature_size=None``. Inputs are moved to the model's device, and converted to
            its dtype only if it does not take them as they are. Tensors of a mapping that are as
            long as the batch, also in containers inside it, are cut into rows.
        override : bool
            False keeps the basis and adds data to loss, N and G.
        progress_bar : bool
            Show the progress of each stage.
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
        basis : NystromBasis, optional
            That of another fit of the same model, instead of landmarks: estimators with one basis can be
            merged.
        max_samples : int, optional
            Read so many inputs (on all ranks together), and ask the loader for no batch after them.
        n_total : int, optional
            N, where the loader shows a sample of the data only: loss and G are scaled to it.
        checkpoint : str or path, optional
            Where to keep what each stage has found, so that a fit that was interrupted, called again with the
            same arguments, goes on. The loader has to replay the same order; the states of torch's, numpy's
            and Python's generators, and of the loader's own, are restored for it. The files ``checkpoint``,
            ``checkpoint.gram``, ``checkpoint.basis`` and ``checkpoint.curvature`` are deleted once they are not
            needed any more. A symbolic link is followed, and stays.
        checkpoint_every : int
            Batches between two checkpoints.

        Raises
        ------
        ValueError
            If an argument is out of range, the loader empty, a batch malformed or not
            finite, or the features not finite; if a checkpoint cannot be used, or the loader does not replay its
            data; if ranks differ in what must be alike. A previous fit stays intact.
        RankError
            If another rank failed.
        KeyboardInterrupt
            When interrupted. Before G has an input the previous fit stays intact; after that, in a single process,
            G is kept as estimated from the inputs so far, with a warning. With ``override=False`` and ``checkpoint``
            the previous fit stays intact in any case.

        Notes
        -----
        Cost in forward passes: N, plus 3 or more a landmark, plus 1 + 2K a curvature
        input (with ``curvature="mc"``, 2 + 3 a sampled label); with ``val_loader``, 1 + 2K a validation
        input, however many n are scored. Memory: M x P numbers if the budget allows, K x P
        afterwards.
        """
        now = self._view()  # what is asked for, whatever other threads assign meanwhile
        ranks = now._ranks
        with ranks.together("the arguments of fit"):
            fresh = validation.check_flag("override", override) or now.H is None
            validation.check_flag("progress_bar", progress_bar)
            now._check_fit(train_loader, balanced)
            now._check_weights(fresh)
            for one in (self, now):
                one._follow_model()
            if not fresh:
                now._check_H_init()
                now._check_unchanged()
            now._check_basis(basis, landmarks, fresh)
            max_samples = validation.check_size("max_samples", max_samples)
            n_total = validation.check_size("n_total", n_total)
            val_steps = validation.check_size("val_steps", val_steps)
            validation.check_size("checkpoint_every", checkpoint_every, optional=False)
            validation.check_prediction("glm", link_approx, 100, None, None)
            validation.check_link(self.likelihood, link_approx)
            if val_loader is not None:
                validation.check_loader("val_loader", val_loader)
            if landmarks is not None:
                landmarks = validation.check_landmarks(landmarks, now.dict_key_x)
            every = val_steps or (1 if val_loader is not None else None)
            needed = checkpoint is not None or ranks.size > 1  # hashing V takes seconds
            arguments = now._arguments(
                needed,
                override=fresh,
                balanced=bool(balanced),
                val_loader=val_loader is not None,
                val_steps=every,
                max_samples=max_samples,
                n_total=n_total,
                landmarks=digest(digest_of(landmarks[0]), landmarks[1]) if needed and landmarks else None,
                basis=basis.fingerprint() if needed and basis is not None else None,
            )
            files = FitFiles(checkpoint, checkpoint_every, {**arguments, **now._computing()}, ranks)
            progress, seen = now._progress(progress_bar), 0 if fresh else now.n_data
            stream = Stream(
                train_loader,
                now.dict_key_x,
                now.dict_key_y,
                now.backend.inputs,
                ranks,
                progress,
                seen,
                max_samples,
            )
            given = None
            if landmarks is not None:
                given = now.backend.inputs(landmarks[0], len(landmarks[1])), landmarks[1]
        ranks.require_equal({**arguments, "checkpoint": checkpoint is not None}, "fit()")
        job = Job(ranks, stream, files, progress, now.backend, every, now.seed, now._labels())
        own = now._scan(job, balanced, given, fresh and basis is None)
        found, n_read = over_all(own, ranks), own.n_data
        validation.check_total(n_total, found.n_data)
        sample = None if now.curvature_size is None else dealt(own.curvature, ranks)
        del own  # and with it the inputs that went to other ranks
        if basis is None:
            basis = now._new_basis(job, found, given, balanced) if fresh else now.basis
        basis = on_device_of(basis, now.model)
        found = replace(found, landmarks=BottomK(0))
        total = RunningSum(basis.rank, now._device)
        # Data that are added are kept in the files alone: they would be added twice by the fit that goes on.
        keep = ranks.size == 1 and (fresh or not files.paths)
        wanted = n_read if sample is None else sample.size

        def finish(new: Fitting, ranks: Ranks, unfinished: bool = False) -> None:
            if not fresh:
                now._check_same_basis(new)
            new._finish(basis, found, n_total or found.n_data, fresh, total, ranks, unfinished)

        with self._kept_on_interrupt(total, wanted, fresh, finish) if keep else nullcontext():
            accumulate(job, basis, sample, n_read, found.longest, total)
            with self._changes(replaces_fit=fresh) as new:
                finish(new, ranks)
                if val_loader is not None:
                    free = fresh and not new._temperature_fixed
                    new._stop_early(val_loader, link_approx, free, progress)
                with ranks.together("the last stage of fit"):
                    pass  # no rank deletes its files while another still needs its own
        files.delete_all()

    @contextmanager
    def _kept_on_interrupt(
        self, total: RunningSum, wanted: int, fresh: bool, finish: Callable[..., None]
    ) -> Iterator[None]:
        """Keep what there is of G when interrupted."""
        try:
            yield
        except KeyboardInterrupt:
            if total.seen:
                with self._changes(replaces_fit=fresh) as new:
                    finish(new, ALONE, unfinished=True)
                warnings.warn(
                    f"fit() was interrupted after {total.seen} of {wanted} curvature inputs. The estimator is fitted with G as "
                    f"estimated from these, scaled to N = {self.n_data}.",
                    stacklevel=6,  # user, three decorators of fit, fit, contextlib, here
                )
            raise

    def _finish(
        self,
        basis: NystromBasis,
        found: Scan,
        n_data: int,
        fresh: bool,
        total: RunningSum,
        ranks: Ranks,
        unfinished: bool = False,
    ) -> None:
        """Become what was fitted, added to what was fitted before unless that is replaced."""
        snapshots = total.snapshots(n_data, ranks, unfinished)
        self._warn_of_few_samples(snapshots[-1][0], basis.rank)
        share = n_data / found.n_data
        loss, n_predictions = found.loss * share, round(found.n_predictions * share)
        if not fresh:  # what was fitted before has no first n inputs any more
            snapshots = [(self.n_curvature + snapshots[-1][0], self.H + snapshots[-1][1])]
            loss = self.loss + loss.to(self.loss.device)
            n_data, n_predictions = self.n_data + n_data, self.n_predictions + n_predictions
        largest = (0.0, 0.0) if fresh else self._largest_sums
        sampled = self._labels() > 0 or (not fresh and self._labels_sampled)
        self._set_fit(basis, snapshots, loss, (n_data, n_predictions, found.n_outputs), largest)
        self._labels_sampled = sampled

    def _scan(self, job: Job, balanced: bool, landmarks: tuple[Input, Tensor] | None, draws: bool) -> Scan:
        """Read this rank's training data, and draw landmarks if they are neither given nor kept."""
        found = Scan(
            BottomK(self.subsample_size if draws and landmarks is None else 0),
            BottomK(self.curvature_size or 0),
        )
        unchecked = [] if landmarks is None else [landmarks]

        def forward(x: Input) -> Tensor:
            f = self.backend.forward(x)
            while unchecked:  # at the first batch, before any long work
                inputs, outputs = unchecked.pop()
                of_landmark = self.backend.forward(rows(inputs, 0, 1)) if f.ndim > 2 else f
                validation.check_coordinates(outputs, of_landmark.shape[1:].numel())
            self.backend.support(x)  # probes, at the first batch too
            return f

        read_data(
            job,
            found,
            partial(scan, forward=forward, likelihood=LIKELIHOODS[self.likelihood], balanced=balanced),
        )
        return found

    def _new_basis(
        self, job: Job, found: Scan, given: tuple[Input, Tensor] | None, balanced: bool
    ) -> NystromBasis:
        if given is None:
            landmarks = draw_outputs(found.landmarks, self.seed, balanced)
            if len(landmarks) < self.subsample_size:
                reason = "the data have no more pairs of input and output"
                self._report_reduction("subsample_size", len(landmarks), reason)
        else:
            landmarks = validation.explicit_landmarks(given)
        basis = find_basis(job, landmarks, self.n_eigenvalues, self.shard_directions)
        basis = replace(basis, of_model=checkpoint.fingerprint(self.model))
        if isinstance(self.n_eigenvalues, float):
            if basis.retained < self.n_eigenvalues - 1e-9:
                reason = f"more directions exceed the memory budget or the numerical rank; these retain {basis.retained:.3g}"
                self._report_reduction("n_eigenvalues", basis.rank, reason)
        elif basis.rank < self.n_eigenvalues:
            reason = f"the gradients of {len(landmarks)} landmarks have no higher numerical rank"
            self._report_reduction("n_eigenvalues", basis.rank, reason)
        return basis

    @torch.inference_mode(False)
    @torch.no_grad()
    @of_one_moment
    def plan(self, train_loader: Iterable[Any], verbose: bool = True) -> Plan:
        """Work out what :meth:`fit` will compute, and what it will cost, without doing it.

        Seconds are those of a chunk of each stage, which is run and timed here, times the number of chunks:
        on a machine that does something else meanwhile they are off by as much as that changes. What the loader
        takes is not in them.

        In a process group: what this rank does, with its share of the landmarks and curvature inputs.

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
            If the loader is a one-shot iterator or empty, or its first batch malformed, or gradients of its
            inputs are not finite.

        Notes
        -----
        Cost: of each of about eight chunks, as large as the fit's, a warm-up and up to five calls, none once they have
        taken .7 seconds; so seconds at most where a chunk takes less than one. Memory: no more than the fit.
        Estimator, model and random generators, the loader's too, are left as they were.
        """
        validation.check_flag("verbose", verbose)
        validation.check_loader("train_loader", train_loader)
        self._check_settings()
        ranks = self._ranks
        with random_state_restored(train_loader):
            x = first_batch(train_loader, self.dict_key_x, self.dict_key_y, self.backend.inputs)
        n = self.curvature_size
        plan = self.backend.plan(
            x,
            n_data=data_size(train_loader, batch_size(x)),
            n_landmarks=ranks.lengths(self.subsample_size)[0],
            rank=self._largest_rank(),
            n_curvature=None if n is None else ranks.lengths(n)[0],
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

    def _arguments(self, needed: bool, **of_call: Any) -> dict[str, Any]:
        """Return what the result of a fit depends on, data apart, in plain types."""
        if not needed:
            return {}
        names = [
            *("seed", "subsample_size", "n_eigenvalues"),
            *("curvature_size", "curvature", "curvature_samples", "shard_directions"),
        ]
        before = "nothing" if of_call["override"] else digest(self.H, self.basis.fingerprint())
        return {
            "model": checkpoint.fingerprint(self.model),
            **{name: getattr(self, name) for name in names},
            "likelihood": self._likelihood_name,
            "backend": type(self.backend).__name__,
            "dtype": str(self._dtype),
            **of_call,
            "fitted before": before,
        }

    def _computing(self) -> dict[str, Any]:
        """Return what the rounding of a fit depends on; ranks may differ in it."""
        options = {k: str(v) for k, v in self._backend_kwargs.items() if k != "spill"}
        return {**options, "spill": self._backend_kwargs["spill"] is not None}

    def _check_basis(self, basis: Any, landmarks: Any, fresh: bool) -> None:
        if basis is None:
            return
        if landmarks is not None or not fresh:
            raise ValueError(
                "basis= takes the place of landmarks, and override=False keeps the basis there is; pass one of them."
            )
        if not isinstance(basis, NystromBasis):
            raise ValueError(
                f"basis must be the basis of a fitted estimator, or None; got {validation.shown(basis)}."
            )
        ranks = self._ranks if self.shard_directions else ALONE
        checkpoint.check_shard((basis.ranks.rank, basis.ranks.size), ranks, "The basis given")
        checkpoint.check_directions(basis, self.backend.engine.function.weights(), "The basis given")
        if basis.of_model not in (None, checkpoint.fingerprint(self.model)):
            raise ValueError(
                "The basis given was made from another model: parameters and buffers have the same shapes, but other "
                "values. Its directions are gradients at those values. Pass the basis of a fit of this model as it is "
                "now, or leave basis= out, so that one is made."
            )

    @exclusively
    def _check_fit(self, train_loader: Any, balanced: bool) -> None:
        validation.check_loader("train_loader", train_loader)
        self._check_settings()
        if validation.check_flag("balanced", balanced) and self.likelihood in ("regression", "bernoulli"):
            raise ValueError(f"balanced=True needs classes; {self.likelihood} has none. Leave it out.")
        if self.curvature_size is None and isinstance(train_loader, Iterator):
            raise ValueError(
                "curvature_size=None reads the data twice, and this loader is an iterator that can be read once. "
                "Pass an iterable that can be started again, or a number as curvature_size."
            )

    @exclusively
    def _check_weights(self, fresh: bool) -> None:
        """Require the weights that the estimator was built with; all of them may be frozen since."""
        settled = self.backend.engine.function.names
        own = [p.shape for k, p in self.model.named_parameters() if k in settled]
        trainable = {k for k, p in self.model.named_parameters() if p.requires_grad}
        if own != [p.shape for p in self.params] or (fresh and trainable and trainable != settled):
            raise ValueError(
                "The model's parameters that require grad are not those it had when the estimator was built, over which "
                "its posterior is. Build a new estimator after changing them, or set the flags back."
            )

    def _warn_of_few_samples(self, n: int, rank: int) -> None:
        if self.curvature == "mc" and n < 20 * rank:
            warnings.warn(
                f"curvature='mc' estimates G (K = {rank}) from {n} inputs; under 20 K = {20 * rank} it is badly wrong. "
                "Raise curvature_size, lower n_eigenvalues, or use curvature='exact'.",
                stacklevel=6,
            )

    def _report_reduction(self, name: str, reached: int, reason: str) -> None:
        if name in self._named_by_user:
            warnings.warn(
                f"{name} was reduced from {getattr(self, name)} to {reached}: {reason}.", stacklevel=6
            )

    def _stop_early(self, val_loader: Iterable[Any], link_approx: str, free: bool, progress: Any) -> None:
        r"""Score every snapshot of G; if free, keep the best, with T = N / n and :math:`\delta n / N`."""
        self._require_same_search("fit()", link_approx=str(link_approx))
        scorer = self._scorer(val_loader, None, progress)
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
