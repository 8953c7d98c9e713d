r"""The estimator: laplace-torch's contract, kept by the modules that do the work.

Each method checks what it is given, takes the posterior of this moment, and calls the function that does the work. What
changes is a new posterior, assigned in one statement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, NoReturn, TypeVar, overload

import torch
from torch import Tensor, nn

from . import host
from .backends import OPTIONS, backend_options, nystrom_backend
from .data.batches import Input, Raw
from .data.checks import check_choice, check_flag, check_key, check_options, integer
from .data.landmarks import Scheme
from .data.loading import check_loader
from .data.notices import warn_user
from .data.progress import progress_bars
from .data.stream import Stream
from .fitting import asked, merging, prices, saving
from .fitting import checkpoint as checkpoints
from .fitting.fit import FitInterrupted, fit
from .fitting.plan import Plan
from .fitting.prices import PredictionPlan
from .fitting.state import assigned, posterior_of, state_of
from .host import BaseLaplace, CurvatureInterface, ParametricLaplace
from .module import PredictiveModule
from .network.checks import check_model, check_module
from .network.engine import Engine
from .network.functional import n_trainable, unwrap
from .network.safety import LOCK, exclusively
from .nystrom.basis import NystromBasis
from .nystrom.caching import outside_inference, without_inference
from .nystrom.compact import STORED
from .parallel.ranks import ALONE, Ranks, check_process_group, ranks_of
from .posterior import acquisition, attributes, checks, copying, novelty, prediction, sampling, uncertainty
from .posterior.acquisition import Acquisition
from .posterior.attributes import become, of_fit, of_posterior, of_setting
from .posterior.fit import Fit
from .posterior.likelihoods import LIKELIHOODS, Prediction, name_of
from .posterior.links import Noise
from .posterior.novelty import ApproximationError
from .posterior.posterior import Posterior
from .posterior.residual import RESIDUALS
from .posterior.sampling import Draws
from .posterior.uncertainty import Uncertainty
from .tuning import choosing, early_stopping, joint, prior
from .tuning.checks import check_loss
from .tuning.result import TuningResult
from .tuning.scoring import Loss

Self = TypeVar("Self", bound="ELLALaplace")


@overload
def Laplace(
    model: nn.Module,
    likelihood: str = ...,
    subset_of_weights: str = ...,
    *,
    hessian_structure: Literal["ella"],
    **kwargs: Any,
) -> ELLALaplace: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: str,
    subset_of_weights: str,
    hessian_structure: Literal["ella"],
    *args: Any,
    **kwargs: Any,
) -> ELLALaplace: ...
@overload
def Laplace(
    model: nn.Module,
    likelihood: str = ...,
    subset_of_weights: str = ...,
    hessian_structure: str = ...,
    *args: Any,
    **kwargs: Any,
) -> BaseLaplace: ...
def Laplace(
    model: nn.Module,
    likelihood: str = "classification",
    subset_of_weights: str = "last_layer",
    hessian_structure: str = "kron",
    *args: Any,
    **kwargs: Any,
) -> BaseLaplace:
    """Build any flavour of laplace-torch, ELLA among them.

    :func:`laplace.Laplace` with a default likelihood, so that
    ``Laplace(model, subset_of_weights="all", hessian_structure="ella")`` is complete. It builds ELLA itself, also where
    the host's factory would not find it.

    Parameters
    ----------
    model : torch.nn.Module
        The trained network.
    likelihood : {"classification", "regression", "reward_modeling", "bernoulli", "poisson", "heteroscedastic"}
        The last three, for binary and multi-label targets, counts, and noise that depends on the input, with "ella" only.
    subset_of_weights : {"last_layer", "subnetwork", "all"}
        "ella" needs "all".
    hessian_structure : {"kron", "diag", "full", "lowrank", "gp", "ella"}
        "ella" returns an :class:`ELLALaplace`, for type checkers too.
    *args, **kwargs
        Passed to the estimator.
    """
    check_module(model)
    check_choice("subset_of_weights", subset_of_weights, ("last_layer", "subnetwork", "all"))
    if host.FINDS_SUBCLASSES:
        check_choice("hessian_structure", hessian_structure, _structures())
    if hessian_structure == "ella":
        if subset_of_weights != "all":
            raise ValueError(
                f"hessian_structure='ella' needs subset_of_weights='all'; got {subset_of_weights!r}. Pass both."
            )
        return ELLALaplace(model, likelihood, *args, **kwargs)
    return host.Laplace(model, likelihood, subset_of_weights, hessian_structure, *args, **kwargs)


def _structures() -> list[str]:
    """Return the structures of the Hessian that are known: laplace-torch's, and those that subclasses name."""
    classes, found = [BaseLaplace], {"gp"}
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        found |= {cls._key[1]} if hasattr(cls, "_key") else set()
    return sorted(found)


class ELLALaplace(ParametricLaplace):
    r"""Linearised Laplace over all weights, through a Nystrom approximation of the NTK.

    The posterior lives on :math:`\theta^* + V z`, with K orthonormal directions V that
    span the leading gradients of M landmarks, and :math:`z \sim N(0, A^{-1})`,
    :math:`A = G / (\sigma^2 T) + V^T \Delta V`.
    Source: Deng, Zhou, Zhu (NeurIPS 2022), arXiv 2210.12642.

    Parameters
    ----------
    model : torch.nn.Module
        The trained network, which takes a tensor, a mapping, or the entries of a mapping by name, as the parameters of its
        ``forward`` say (docs/frameworks.md). The posterior is over its parameters that require grad now; they may be
        frozen later. Outputs may be (B, ..., C), (B, C, ...) or (B,), in an object with ``.logits``, a mapping
        or a tuple: see ``channel_axis``. DataParallel, DistributedDataParallel and torch.compile wrappers
        are taken off.
    likelihood : str
        "classification", "regression" or "reward_modeling", as in :class:`laplace.ParametricLaplace`;
        "bernoulli", for binary and multi-label targets; "poisson", for counts, with outputs that are log rates; or
        "heteroscedastic", for numbers, with all means and then the logarithms of all variances as outputs.
    sigma_noise : float or Tensor
        Observation noise, a standard deviation (regression); a tensor (C,) gives each output its own. Tuning scales
        them together, and keeps the ratios.
    prior_precision : float or Tensor
        Scalar, one per weight tensor, or one per weight.
    prior_mean : float or Tensor
        Scalar, or one per weight.
    temperature : float, optional
        T; a number stays fixed. None means 1 until ``optimize_prior_precision(
        method="gridsearch")`` or ``optimize_hyperparameters`` tunes it on validation data.
    enable_backprop : bool
        Let gradients reach the inputs through predictions (not the weights).
    dict_key_x : str
        Key of the inputs in mapping batches.
    dict_key_y : str
        Key of their targets, which a model that takes the entries of a mapping by name does not get.
    backend : type or instance, optional
        Where landmark gradients come from: CurvlinopsGGN (torch.func, default),
        BackPackGGN, AsdlGGN, or a :class:`NystromGGN`. Of an instance, the class is used, and, of a NystromGGN,
        those of its options that are at their defaults here.
    backend_kwargs : dict, optional
        Passed to the backend; they come before the arguments below.
    asdl_fisher_kwargs : dict, optional
        Taken for compatibility; gradients need no Fisher options.
    subsample_size : int, optional
        M, how many landmarks; default 500.
    n_eigenvalues : int or float, optional
        K, how many directions; default 20. A float in (0, 1) is the share of the trace of the
        landmarks' Gram matrix that they have to retain. What is named here and exceeds the data or
        their numerical rank is reduced with a warning, a default without. It is for the next fit; of a fit's
        directions, :attr:`n_directions` says how many are used.
    curvature_size : int or None
        How many inputs G is estimated from, without bias; all of them if there are fewer.
        None takes all of them, in a second pass.
    seed : int
        Seeds the draws of landmarks and curvature inputs, and the Monte-Carlo link.
    chunk_size : int, optional
        Directions per forward-mode call; default by memory.
    memory_budget : int or float, optional
        Bytes (int), or share of the device's free memory (float), that gradient rows and
        activations may take; default a quarter of the free memory.
    autodiff : {"auto", "forward", "double", "contraction", "reverse"}, optional
        How features are computed; default "auto", which see in :class:`NystromGGN`.
    compile : bool
        Run forward mode through :func:`torch.compile`: minutes of compiling for each
        shape of batch, then faster.
    spill : str or path, optional
        "cpu" or a folder: keeps there the gradient rows that do not fit, which otherwise are computed again.
    spill_dtype : torch.dtype
        The precision of spilled rows; see :class:`NystromGGN`.
    curvature : {"exact", "mc"}
        "mc" estimates G from labels sampled from the model: cheaper, and fine from 20 K inputs on.
    curvature_samples : int
        How many labels are sampled for each curvature input.
    logit_scale : float
        s: the mean of the logits is multiplied by it, their covariance is not.
    class_scales, class_biases : sequence of float, optional
        w and b, one number for each class (or label): the mean of the logits is w s f + b, and their covariance what it is
        without. None: 1 and 0.
    residual : {"none", "isotropic", "exact"}
        What outputs get for the directions outside the span, which ELLA leaves out:
        nothing, the same variance for all outputs of an input, or what exact linearised
        Laplace gives them. Scalar prior only.
    residual_scale : float
        rho, by which the residual variance is multiplied; only rho over the prior precision
        matters.
    residual_samples : int
        S, from how many random tangents the isotropic residual is made.
    process_group : "default", torch.distributed.ProcessGroup, or None
        The processes that fit and tune together, each with its part of the data: by default
        torch.distributed's group, if one is initialised. None: this process alone.
    shard_directions : bool
        Spread V over the ranks, K / W directions on each of W, where K x P numbers do not fit one
        device. All ranks then have to call predictions too, each with inputs of its own.
    temperature_fixed : bool, optional
        Whether tuning leaves T alone. Default: if ``temperature`` is a number.
    variance : {"ella", "none", "constant", "last_layer"}
        Where the variance of predicted outputs comes from. "none" predicts as the network does, up to scales and biases; with
        "constant" it is T, and with "last_layer" T (1 + \|z\|^2), z what the last layer takes. Only "ella" needs features:
        with the others a prediction costs a forward pass (or two). Weights are drawn
        from ELLA's posterior with any of them.
    link_approx : {"probit", "mc", "bridge", "bridge_norm"}, optional
        The link of calls that name none. None: the one that tuning was for, and "probit" before.
    channel_axis : {None, 1, -1}
        Where outputs with positions have their channels (classes): 1 for (B, C, ...), as convolutions and ``nn.CrossEntropyLoss`` have
        them, -1 for (B, ..., C). Predictions then have the axes of the network's outputs. None: ``fit`` finds out from the targets
        of the first batch. If the channels are last, predictions have a row for each position, input by input: (B L, C).
    curvature_positions : int, optional
        At how many of its positions, drawn from the seed, each curvature input is looked at, without bias. None: at all.

    Attributes
    ----------
    H : Tensor (K, K)
        G, the curvature summed over the data, float64; None before a fit.
    snapshots : list of (n, Tensor (K, K))
        G as estimated from the first n curvature inputs, scaled to all N.
    n_curvature : int
        How many inputs H is estimated from.
    mean : Tensor (P,)
        The weights at the time of the fit.
    n_data, n_outputs, loss
        N, C, and the negative log likelihood summed over the data (up to constants). N counts
        inputs, also where they have many positions; ``n_predictions`` counts positions.

    Every argument is an attribute too, whose value builds an equal estimator; see :meth:`get_params`.

    Raises
    ------
    ValueError
        If an argument is out of its range; the message says what is allowed.
    """

    _key = ("all", "ella")
    _posterior: Posterior

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_key" not in vars(cls):
            # laplace.Laplace looks classes up by their keys: with this one's, a subclass might take its place.
            cls._key = ("all", f"ella: {cls.__module__}.{cls.__qualname__}")

    # A plain function without variables of its own: lightning-uq-box, for one, builds an estimator like another from
    # the names in the code of this function, and the attributes of these names.
    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float | None = None,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | CurvatureInterface | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        *,
        subsample_size: int | None = None,
        n_eigenvalues: int | float | None = None,
        curvature_size: int | None = 2000,
        seed: int = 0,
        chunk_size: int | None = None,
        memory_budget: int | float | None = None,
        autodiff: str | None = None,
        compile: bool = False,  # noqa: A002
        spill: str | PathLike[str] | None = None,
        spill_dtype: torch.dtype = torch.bfloat16,
        curvature: str = "exact",
        curvature_samples: int = 1,
        logit_scale: float = 1.0,
        residual: str = "none",
        residual_scale: float = 1.0,
        residual_samples: int = 4,
        process_group: Any = "default",
        shard_directions: bool = False,
        temperature_fixed: bool | None = None,
        class_scales: Sequence[float] | Tensor | None = None,
        class_biases: Sequence[float] | Tensor | None = None,
        variance: str = "ella",
        link_approx: str | None = None,
        channel_axis: int | None = None,
        curvature_positions: int | None = None,
    ) -> None:
        with LOCK:  # while another thread has the model's weights exchanged, none requires grad
            check_model(model)
            check_flag("enable_backprop", enable_backprop)
            checks.check_kinds(likelihood, residual, prior_precision, sigma_noise, enable_backprop)
            checks.check_sharding(shard_directions, prior_precision, n_trainable(model), enable_backprop)
            check_key("dict_key_x", dict_key_x)
            check_key("dict_key_y", dict_key_y)
            check_process_group(process_group)
            self._named_by_user = asked.named(subsample_size=subsample_size, n_eigenvalues=n_eigenvalues)
            self._posterior = Posterior.unfitted(LIKELIHOODS[name_of(likelihood)], RESIDUALS[residual])
            self.subsample_size, self.n_eigenvalues = subsample_size, n_eigenvalues
            self.curvature_size, self.seed = curvature_size, seed
            self.curvature, self.curvature_samples = curvature, curvature_samples
            self.residual_samples = residual_samples
            self.channel_axis, self.curvature_positions = channel_axis, curvature_positions
            self.chunk_size, self.memory_budget, self.autodiff = chunk_size, memory_budget, autodiff
            self.compile, self.spill, self.spill_dtype = compile, spill, spill_dtype
            asked.checked_sizes(self)
            self.process_group, self.shard_directions = process_group, bool(shard_directions)
            self.backend_kwargs = check_options("backend_kwargs", backend_kwargs)
            self.asdl_fisher_kwargs = check_options("asdl_fisher_kwargs", asdl_fisher_kwargs)
            # Only what every host takes: others may add, rename or move their arguments.
            super().__init__(unwrap(model), self._posterior.likelihood.host_name)
            self.prior_precision, self.prior_mean, self.temperature = prior_precision, prior_mean, temperature
            self.enable_backprop, self.dict_key_x, self.dict_key_y = (
                bool(enable_backprop),
                dict_key_x,
                dict_key_y,
            )
            self._backend: Any = None
            self._backend_cls = nystrom_backend(backend)
            self._backend_kwargs = backend_options(backend, vars(self), self.backend_kwargs)
            self.likelihood, self.link_approx = likelihood, link_approx
            self.sigma_noise = sigma_noise
            self.logit_scale, self.residual_scale = logit_scale, residual_scale
            self.variance, self.class_scales, self.class_biases = variance, class_scales, class_biases
            if temperature_fixed is not None:
                become(self, temperature_fixed=check_flag("temperature_fixed", temperature_fixed))
            self._build_backend()

    def _build_backend(self) -> None:
        try:
            self.__dict__.update(self.backend.options)  # as they are used
        except TypeError as error:
            raise ValueError(
                f"backend_kwargs={self._backend_kwargs} do not fit {self._backend_cls.__name__}: {error}. "
                f"It takes {', '.join(OPTIONS)}."
            ) from error

    # ------------------------------------------------------------------ attributes

    @of_fit
    def H(self) -> Any:
        """G (K, K), the curvature summed over the data, float64; None before a fit."""

    @of_fit
    def snapshots(self) -> Any:
        """Pairs (n, Tensor (K, K)): G as estimated from the first n curvature inputs, scaled to all N."""
        return []

    @of_fit
    def n_curvature(self) -> Any:
        """From how many inputs ``H`` is estimated."""
        return 0

    @of_fit
    def loss(self) -> Any:
        """Negative log likelihood summed over the data, up to constants."""
        return 0.0

    @of_fit
    def n_data(self) -> Any:
        """N, the number of inputs."""
        return 0

    @of_fit
    def n_predictions(self) -> Any:
        """N times the positions of an input, without those that are ignored; with weights, their sum."""
        return 0

    @of_fit
    def n_outputs(self) -> Any:
        """C, the number of outputs."""
        return 0

    @of_fit
    def mean(self) -> Any:
        """The weights (P,) at the time of the fit; the prior mean before."""
        return self.prior_mean

    @of_fit
    def fit_history_(self) -> Any:
        """Validation NLL of each snapshot of G, after early stopping."""
        return {"processed_examples": [], "val_nll": []}

    @attributes.of_temperature
    def temperature(self) -> Any:
        """T, which divides the curvature, or with another ``variance`` multiplies that alone; assigning it fixes it, None frees it at 1."""

    @attributes.of_prior_precision
    def prior_precision(self) -> Any:
        """Delta: (1,), one per weight tensor (L,), or one per weight (P,)."""

    @attributes.of_noise
    def sigma_noise(self) -> Any:
        """Observation noise, a standard deviation: (), or one per output (C,); 1 unless the likelihood is regression.

        The ratios between outputs enter loss and curvature: once fitted, it can be scaled as a whole only.
        """

    @of_setting
    def logit_scale(self) -> Any:
        """s, by which the mean of the logits is multiplied, and not their covariance."""

    @of_setting
    def class_scales(self) -> Any:
        """w, by which the mean of each logit is multiplied, beside s: a tuple of C numbers, or None for 1."""

    @of_setting
    def class_biases(self) -> Any:
        """b, which is added to the mean of each logit: a tuple of C numbers, or None for 0."""

    @attributes.of_variance
    def variance(self) -> Any:
        """Where the variance of predicted outputs comes from: "ella", "none", "constant" or "last_layer".

        Assigned, it makes a temperature that was tuned for a variance of another kind 1 again, with a warning; one that is
        fixed stays.
        """

    @attributes.of_link
    def link_approx(self) -> Any:
        """The link of calls that name none: the one that tuning was for, or that was assigned; None: "probit"."""

    @of_setting
    def residual_scale(self) -> Any:
        r"""rho: the residual variance is :math:`\rho / \delta` times what lies outside the span."""

    @attributes.of_residual
    def residual(self) -> Any:
        """What is added for the directions outside the span: "none", "isotropic" or "exact"."""

    @attributes.of_prior_mean
    def prior_mean(self) -> Any:
        """Prior mean: () or (1,), or one per weight (P,)."""

    @attributes.of_choice
    def seed(self) -> Any:
        """Seeds the draws of landmarks and curvature inputs, the tangents of the residual, and the Monte-Carlo link."""

    @attributes.of_choice
    def residual_samples(self) -> Any:
        """S, from how many random tangents the isotropic residual is made."""

    @property
    def temperature_fixed(self) -> bool:
        """Whether tuning leaves T alone."""
        return self._posterior.temperature_fixed

    @property
    def residual_variance(self) -> float:
        r""":math:`\rho / \delta`, the variance of each weight outside the span; 0 without a residual."""
        return self._posterior.residual_variance

    @of_posterior
    def basis(now: Posterior) -> NystromBasis:
        """The K directions that are used, and the spectrum they come from.

        Raises
        ------
        AttributeError
            Before a fit.
        """
        return now.basis

    @attributes.of_rank
    def n_directions(self) -> Any:
        """K', how many of the directions that the fit found are used: the leading ones; assigning None means all.

        A prediction costs less with fewer: :meth:`predict_plan` says how much. What follows is what a fit with
        ``n_eigenvalues=K'`` would have found, apart from temperature and scales, which tuning found for another K': tune
        again. Nothing is dropped, so that it may be raised again, up to as many directions as the fit found. A new fit uses
        all of its own. Copies of an estimator (``copy.copy``) share the directions in memory, and each may use as many as it
        likes.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If a value is not an integer, or not from 1 to the number of directions of the fit.
        """

    @of_posterior
    def posterior_precision(now: Posterior) -> Tensor:
        r""":math:`A = G / (\sigma^2 T) + V^T \Delta V` (K, K), float64.

        Differentiable in the prior precision and the noise.
        """
        return now.precision

    @of_posterior
    def posterior_scale(now: Posterior) -> Tensor:
        """S (K, K) with S S^T the posterior covariance, float64; a copy.

        Computed again if prior, noise, temperature, H or directions have changed, also in place.

        Raises
        ------
        ValueError
            If prior precision or noise have got a value that would have been refused.
        """
        return now.scale.clone()

    @of_posterior
    def posterior_covariance(now: Posterior) -> Tensor:
        r"""Covariance :math:`A^{-1}` (K, K) of the coordinates, float64."""
        return now.covariance

    @of_posterior
    def log_likelihood(now: Posterior) -> Tensor:
        """Log likelihood of the training data."""
        return now.log_likelihood

    @of_posterior
    def scatter(now: Posterior) -> Tensor:
        r""":math:`(\theta^* - \mu_0)^T \Delta (\theta^* - \mu_0)`."""
        return now.scatter

    @of_posterior
    def log_det_ratio(now: Posterior) -> Tensor:
        """Log determinant of A, less that of the prior precision."""
        return now.log_det_ratio

    @of_posterior
    def log_det_prior_precision(now: Posterior) -> Tensor:
        r"""Log determinant of :math:`V^T \Delta V`, the prior precision of the K coordinates."""
        return now.log_det_prior_precision

    @of_posterior
    def log_det_posterior_precision(now: Posterior) -> Tensor:
        """Log determinant of A."""
        return now.log_det_posterior_precision

    @property
    def _H_factor(self) -> Tensor:
        return self._posterior.curvature_factor

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _dtype(self) -> torch.dtype:
        # fp16 holds no number above 65504, so hyperparameters of such models are fp32.
        return torch.promote_types(next(self.model.parameters()).dtype, torch.float32)

    @property
    def backend(self) -> Any:
        """The backend, with the basis of the last fit, whose outputs it reads as those of that fit."""
        if self._backend is None:
            of_pairs = self.likelihood == "reward_modeling"
            self._backend = self._backend_cls(
                self.model,
                "classification" if of_pairs else self.likelihood,
                self.dict_key_x,
                self.dict_key_y,
                **self._backend_kwargs,
            )
        backend, now = self._backend, self._posterior.current
        backend.engine = backend.engine.along(self.channel_axis if now is None else now.channel_axis)
        backend.basis = None if now is None else self._posterior.basis
        backend.observed = self._posterior.likelihood
        return backend

    # ------------------------------------------------------------------ this moment

    @property
    def _engine(self) -> Engine:
        return self.backend.engine

    @property
    def _ranks(self) -> Ranks:
        """The processes that share the work."""
        return ranks_of(self.process_group)

    def _now(self) -> Posterior:
        """Return the posterior of this moment, where the model is."""
        if self._posterior.setting.prior_precision.device != self._device:
            self._follow_model()
        return self._posterior

    @exclusively
    def _follow_model(self) -> None:
        settled, named = self._engine.function.names, self.model.named_parameters()
        self.params = [p for k, p in named if k in settled]  # some devices need new parameters
        attributes.follow(self, self._device, self._dtype)

    def _fitted(self) -> Posterior:
        """Return the posterior of this moment, which there is after a fit.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If the model's dtype has changed since.
        """
        now = self._now()
        if now.current is None:
            raise AttributeError("Laplace not fitted. Run fit() first.")
        checkpoints.check_dtypes(now.fit.basis, self.params)
        return now

    def _check_H_init(self) -> None:
        self._fitted()

    def _init_H(self) -> None:
        self.H = None

    def _unchanged(self) -> Posterior:
        """Return the posterior of this moment, which belongs to the model as it is.

        Raises
        ------
        ValueError
            If the model has changed since the fit.
        """
        now = self._fitted()
        checkpoints.check_unchanged(now.fit.fingerprint, self.model)
        return now

    def _stream(
        self, loader: Iterable[Any], progress_bar: bool = False, engine: Engine | None = None, **more: Any
    ) -> Stream:
        ranks = self._ranks
        bars = progress_bars(progress_bar and ranks.rank == 0)
        inputs = (engine or self._engine).inputs
        return Stream(loader, self.dict_key_x, self.dict_key_y, inputs, ranks, bars, **more)

    # ------------------------------------------------------------------ fitting

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(
        self,
        train_loader: Iterable[Any],
        override: bool = True,
        progress_bar: bool = False,
        *,
        landmarks: tuple[Raw, Tensor] | Scheme | None = None,
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
            Any iterable of batches ``(x, y)``, ``(x, y, weights)`` or mappings; read once, twice with
            ``curvature_size=None``. Class indices of -100 are ignored. Weights, floating point, of each
            input or position multiply loss and curvature. Inputs are moved to the model's device, and converted to
            its dtype only if it does not take them as they are. Tensors of a mapping that are as
            long as the batch, also in containers inside it, are cut into rows.
        override : bool
            False keeps the basis and adds data to loss, N and G.
        progress_bar : bool
            Show the progress of each stage.
        landmarks : tuple or callable, optional
            (inputs, outputs): M inputs in one batch, and a LongTensor (M,) of output
            coordinates, instead of a random draw. Or how inputs are drawn: a function (batch, seed) -> (keys,
            groups), see :mod:`laplace_ella.data.landmarks`.
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
        Cost in forward passes: N, plus 3 or more for each landmark, plus 1 + 2K for each curvature
        input (with ``curvature="mc"``, 2 + 3 for each sampled label); with ``val_loader``, 1 + 2K for each
        validation input, however many n are scored. Memory: M x P numbers if the budget allows, K x P
        afterwards.
        """
        more = (landmarks, balanced, val_loader, val_steps, link_approx, basis, max_samples, n_total)
        request = asked.Request(train_loader, override, progress_bar, *more, checkpoint, checkpoint_every)
        job, recipe, before = asked.prepare(self, request)

        def joined(new: Fit) -> Fit:
            return new if before is None else before.plus(new)

        def finished(new: Fit) -> tuple[Fit, dict[str, Any]]:
            return new, self._chosen(joined(new), request, job.ranks, before is None)

        try:
            new, found = fit(job, recipe, before, finished)
        except FitInterrupted as stop:
            become(self, before, more=stop.fit, current=joined(stop.fit))
            warn_user(
                f"{stop} The estimator is fitted with G as estimated from these, scaled to N = {self.n_data}."
            )
            raise
        with job.ranks.together("the last stage of fit"):
            pass  # no rank deletes its files while another still needs its own
        become(self, before, more=new, **found)
        job.files.delete_all()

    def _chosen(self, fit: Fit, request: asked.Request, ranks: Ranks, fresh: bool) -> dict[str, Any]:
        """Return what the estimator is to take over after a fit, having chosen among snapshots of G."""
        if request.val_loader is None:
            return {"current": fit}
        now, engine = self._posterior.fitted(fit), self._engine.along(fit.channel_axis)
        stream = self._stream(request.val_loader, request.progress_bar, engine)
        free = fresh and not now.temperature_fixed
        return early_stopping.stopped_early(now, engine, stream, ranks, request.link_approx, free)

    @torch.inference_mode(False)
    @torch.no_grad()
    def plan(self, train_loader: Iterable[Any], verbose: bool = True) -> Plan:
        """Work out what :meth:`fit` will compute, and what it will cost, without doing it.

        Seconds are those of a chunk of each stage, which is run and timed here, times the number of chunks:
        on a machine that does something else meanwhile they are off by as much as that changes. What the loader
        takes is not in them.

        In a process group, the plan is that of this rank, with its share of the landmarks and curvature inputs.

        Parameters
        ----------
        train_loader : iterable
            The training data; only the first batch is read.
        verbose : bool
            Whether to print the plan: forward passes, seconds and bytes of each stage. Where
            ``n_eigenvalues`` is a share, it counts as many directions as the budget allows.

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
        check_flag("verbose", verbose)
        plan = asked.plan(self, train_loader)
        if verbose:
            print(plan)
        return plan

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: Any) -> None:
        r"""Add what another estimator was fitted to: G, loss and N of its data.

        The result is that of ``fit(their_data, override=False)``, up to rounding; ``other`` stays as it is.

        Parameters
        ----------
        other : ELLALaplace
            Fitted to other data with ``basis=`` of this one, with the same model, likelihood, noise,
            temperature and prior.

        Raises
        ------
        AttributeError
            If one of the two is not fitted.
        ValueError
            If they differ in what has to be the same. Both stay as they are.
        """
        merging.check_other(self, other, ELLALaplace)
        mine, theirs = self._unchanged(), other._unchanged()
        become(self, mine.fit, current=merging.merged(mine, theirs), more=theirs.fit)

    @torch.inference_mode(False)
    @torch.no_grad()
    def forget(self, loader: Iterable[Any], progress_bar: bool = False) -> None:
        r"""Take data away that this estimator was fitted to: from G, loss and N.

        The result is that of a fit to the remaining data *with the same basis*, up to rounding. This is no
        unlearning: landmarks among the forgotten inputs stay in the basis, and the network was trained on them.

        In a process group, all ranks call it, each with its part of what is to be forgotten.

        Parameters
        ----------
        loader : iterable
            Batches of those data, as in :meth:`fit`; read once.
        progress_bar : bool
            Show the progress.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If G is not the exact one of all N inputs, if the loader is empty or holds all data that there are, or
            data that were not among those fitted, as far as G and the loss can tell: their differences must
            not be negative. The estimator stays as it is.
        RankError
            If another rank failed.

        Notes
        -----
        Cost: 1 + 2K forward passes for each input.
        """
        ranks = self._ranks
        with ranks.together("the arguments of forget()"):
            now = self._unchanged()
            merging.check_exact(now.fit)
            check_loader("loader", loader)
            stream = self._stream(loader, check_flag("progress_bar", progress_bar))
        become(self, now.fit, current=merging.without(now, self._engine, stream, ranks))

    # ------------------------------------------------------------------ predictions

    @torch.inference_mode(False)
    def predict_plan(self, x: Input, verbose: bool = True) -> PredictionPlan:
        """Measure what a prediction of inputs like ``x`` costs with 1, 2, 5, 10, 20 ... directions, up to all of the fit.

        Seconds are those of ``la(x)`` with ``n_directions`` at each of these values: with the link of calls that name none, the residual
        there is, and everything prepared that is prepared once for a basis. Forward passes are counted, and measured in
        units of a plain pass of the same inputs. Where calls of few inputs are planned, pass few.

        Parameters
        ----------
        x : Tensor or mapping
            B inputs.
        verbose : bool
            Whether to print the plan as a table.

        Returns
        -------
        PredictionPlan

        Raises
        ------
        AttributeError
            Before a fit, where there are no directions yet: :meth:`plan` says what a prediction takes with K of them.
        ValueError
            If there are no inputs, or if inputs or features are not finite; if the directions are spread over ranks, or with a
            ``variance`` other than "ella", which uses none.

        Notes
        -----
        Cost: for each number of directions a prediction of one input, and up to six of all, none once they have taken .7
        seconds. Memory: one prediction's. With ``compile=True`` what is measured is not compiled, as
        that takes minutes for each number of directions. Estimator and model are left as they were.
        """
        check_flag("verbose", verbose)
        now = self._fitted()
        prices.check_priced(now)
        plan = prices.prediction_plan(now, self._engine.eager(), x, self.enable_backprop)
        if verbose:
            print(plan)
        return plan

    def __call__(
        self,
        x: Input,
        pred_type: str = "glm",
        joint: bool = False,
        link_approx: str | None = None,
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: Any,
    ) -> Prediction:
        """Predict; see :meth:`laplace.ParametricLaplace.__call__`, from which it differs in this.

        - ``pred_type="gp"`` means "glm".
        - Without ``link_approx`` the link is the one that the setting was tuned for (``la.link_approx``), and "probit"
          where none was; with ``pred_type="nn"`` it is "mc".
        - ``link_approx="mc"`` draws quasi-random noise from the estimator's seed, or
          from ``generator``, one vector for all inputs: the same call gives the same
          result.
        - No link forms a (B, C, C) tensor.

        Returns
        -------
        Tensor (B, C), or pair of Tensor
            Probabilities; or mean (B, C) and covariance (B, C, C), its diagonal
            (B, C) with ``diagonal_output``, or (BC,) and (BC, BC) with ``joint``. These are moments
            of the outputs in regression, where ``sigma_noise`` is not included; and of the targets with
            "poisson" and "heteroscedastic" (D = C / 2 of them), whose noise follows from the outputs. With
            outputs (B, ..., C), B counts positions. With ``channel_axis``, named or found to be 1, predictions have the axes of
            the network's outputs: (B, C, ...) and (B, C, C, ...), or (B, ..., C) and (B, ..., C, C); with outputs (B,), they are (B,).
            ``joint`` counts positions in any case.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If ``pred_type`` or ``link_approx`` is unknown, or inputs are not finite.
        """
        flags = {"joint": joint, "diagonal_output": diagonal_output, "fitting": fitting}
        pred_type, link_approx = self._checked_call(
            pred_type, link_approx, n_samples, generator, model_kwargs, **flags
        )
        now, engine = self._fitted(), self._engine
        likelihood = now.likelihood if fitting else now.likelihood.of_calls
        if pred_type == "nn":
            sampling.check_enough(likelihood, n_samples)
            offsets = sampling.weight_offsets(now, Draws(n_samples, generator))
            samples = sampling.outputs_at(engine, offsets, x, self.enable_backprop, **model_kwargs)
            return prediction.as_network(engine, x, sampling.averaged(samples, likelihood))
        draws = generator if likelihood.has_probabilities else None  # moments take nothing from it
        noise = Noise.seeded(n_samples, draws, now.seed, diagonal_output)
        options = (likelihood, link_approx, noise, joint, self.enable_backprop)
        found = prediction.of_call(now, engine, x, *options)
        return found if joint else prediction.as_network(engine, x, found)

    def _checked_call(
        self,
        pred_type: str,
        link_approx: str | None,
        n_samples: int,
        generator: torch.Generator | None,
        model_kwargs: dict[str, Any],
        **flags: bool,
    ) -> tuple[str, str]:
        """Return the kind of prediction and the link that the arguments of a call mean, if they are allowed."""
        link_approx = self._posterior.link_for(link_approx, pred_type)
        pred_type = checks.check_prediction(pred_type, link_approx, n_samples, generator, self._device)
        checks.check_link(self._posterior.likelihood, link_approx)
        checks.check_call(pred_type, model_kwargs, **flags)
        return pred_type, link_approx

    def predictive(
        self, x: Input, pred_type: str = "glm", link_approx: str | None = None, n_samples: int = 100
    ) -> Prediction:
        """Predict; the host's shorthand for a call."""
        return self(x, pred_type=pred_type, link_approx=link_approx, n_samples=n_samples)

    def _glm_predictive_distribution(
        self, X: Input, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        now = self._fitted()
        return prediction.output_moments(now, self._engine, X, joint, diagonal_output, self.enable_backprop)

    def features(self, x: Input) -> tuple[Tensor, Tensor]:
        r"""Compute :math:`\phi(x) = J(x) V` and f(x).

        Returns
        -------
        phi, f : Tensor (B, C, K), Tensor (B, C)
            For a model with outputs (B, ..., C), positions are flattened into the batch, input by input.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If inputs or features are not finite.

        Notes
        -----
        Cost: at least 1 + 2K forward passes for each input.
        """
        return prediction.checked_features(self._fitted(), self._engine, x, self.enable_backprop)

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Return the covariance (B, C, C) of each input's outputs, without the residual.

        Parameters
        ----------
        Js : Tensor (B, C, K)
            What ``backend.jacobians`` returns: the features.
        """
        return prediction.of_features(self._fitted(), Js).covariance().to(Js.dtype)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Return the joint covariance (BC, BC) of all inputs' outputs, without the residual.

        Parameters
        ----------
        Js : Tensor (B, C, K)
            What ``backend.jacobians`` returns: the features.
        """
        return prediction.of_features(self._fitted(), Js).joint_covariance().to(Js.dtype)

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw weights :math:`\theta^* + V z` (S, P), in the order of ``parameters()``.

        With ``residual="exact"`` they leave the span, as those of exact linearised
        Laplace do; the isotropic residual is one of functions and leaves weights alone.
        Padding rows of embeddings stay as they are.
        """
        draws = Draws.checked(n_samples, generator)
        return sampling.sampled_weights(self._fitted(), self._engine, draws)

    def functional_samples(
        self,
        x: Input,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw functions, evaluated at the inputs: (S, B, C); with ``channel_axis``, as for a call, (S, B, C, ...).

        Each draw uses one noise vector for all inputs, in the K dimensions of the span and in
        those of the residual, so that a function is smooth, and two calls with equal
        generators agree. With the exact residual that noise has P dimensions.

        Parameters
        ----------
        x : Tensor or mapping
            B inputs.
        pred_type : {"glm", "nn"}
            Whether functions are draws of the linearised network, or networks with sampled weights.
        n_samples : int
            S.
        diagonal_output : bool
            Draw outputs and inputs independently instead (glm).
        generator : torch.Generator, optional
            Default: torch's own.

        Raises
        ------
        AttributeError, ValueError
            As for a call.
        """
        engine = self._engine
        samples, dtype = self._functions(x, pred_type, n_samples, diagonal_output, generator)
        return prediction.as_network(engine, x, samples.to(dtype), lead=1)

    def predictive_samples(
        self,
        x: Input,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw :meth:`functional_samples`, turned into probabilities, rates, or means and variances (S, B, C)."""
        engine = self._engine
        samples, dtype = self._functions(x, pred_type, n_samples, diagonal_output, generator)
        # Before they are rounded: fp16 holds no logit above 65504.
        found = self._posterior.likelihood.of_calls.inverse_link(samples).to(dtype)
        return prediction.as_network(engine, x, found, lead=1)

    def _functions(
        self, x: Input, pred_type: str, n_samples: int, diagonal_output: bool, generator: Any
    ) -> tuple[Tensor, torch.dtype]:
        """Draw functions (S, B, C) in the precision of their moments; and the dtype of the model's outputs."""
        pred_type = checks.check_prediction(pred_type, "mc", n_samples, generator)
        check_flag("diagonal_output", diagonal_output)
        draws, backprop = Draws.checked(n_samples, generator), self.enable_backprop
        now, engine = self._fitted(), self._engine
        if pred_type == "nn":
            samples = sampling.outputs_at(engine, sampling.weight_offsets(now, draws), x, backprop)
            return samples, samples.dtype
        return sampling.sampled_functions(now, engine, x, draws, diagonal_output, backprop)

    def uncertainty(
        self, x: Input, n_samples: int = 128, generator: torch.Generator | None = None
    ) -> Uncertainty:
        r"""Say how uncertain the targets of inputs are, and how much of it more training data would take away.

        Classification: the entropy of the mean prediction (total), the expected entropy (aleatoric) and the mutual information of
        target and weights (epistemic), in nats, all from the same samples of the logits: those of ``link_approx="mc"``. Bernoulli: the same for each
        of the C targets. Regression: variances, with :math:`\sigma^2` as the aleatoric part; nothing is sampled. Reward models are
        regressions without noise here, as in a call.

        Parameters
        ----------
        x : Tensor or mapping
            B inputs.
        n_samples : int
            S, how many samples of the logits.
        generator : torch.Generator, optional
            Gives the seed of the samples. Default: the estimator's seed, so that the same call gives the same result.

        Returns
        -------
        Uncertainty
            ``total``, ``aleatoric`` and ``epistemic``: Tensor (B,) for classification, else (B, C). With outputs (B, ..., C), B counts
            positions; with ``channel_axis``, as for a call, they are (B, ...), and (B, C, ...) or (B, ..., C). Differentiable with respect to the inputs with ``enable_backprop``.

        Raises
        ------
        AttributeError, ValueError
            As for a call.
        NotImplementedError
            If a likelihood added from outside does not say what its uncertainty is.

        Notes
        -----
        Cost: that of a call with ``link_approx="mc"``. With the default temperature both parts are what the posterior says; tune it first
        (:meth:`optimize_hyperparameters`), as the size of the epistemic part is that of the variance.
        Source: Depeweg et al. (ICML 2018), arXiv 1710.07283, eq. 4.
        """
        checks.check_prediction("glm", "mc", n_samples, generator, self._device)
        now, engine = self._fitted(), self._engine
        noise = Noise.seeded(n_samples, generator, now.seed, diagonal_output=False)
        likelihood = now.likelihood.of_calls
        found = uncertainty.uncertainty(now, engine, x, likelihood, noise, self.enable_backprop)
        return Uncertainty(*(prediction.as_network(engine, x, part, part.ndim - 1) for part in found))

    def interval(
        self, x: Input, level: float = 0.95, observation_noise: bool = True
    ) -> tuple[Tensor, Tensor]:
        r"""Return intervals in which regression targets lie with a given probability.

        The central intervals of the Gaussian marginals, :math:`\mu \pm z \sqrt{v + \sigma^2}`.

        Parameters
        ----------
        x : Tensor or mapping
            B inputs.
        level : float
            The probability, between 0 and 1.
        observation_noise : bool
            Whether :math:`\sigma^2` counts: True gives intervals of targets, False of the noiseless function.

        Returns
        -------
        lower, upper : Tensor (B, C)
            Of each output by itself. With outputs (B, ..., C), B counts positions; with ``channel_axis``, as for a call. Differentiable with respect to the
            inputs with ``enable_backprop``.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If the level is not between 0 and 1, or targets are not numbers.

        Notes
        -----
        They cover as often as they say if the model is right: noise and temperature have to be tuned. Reward models have no noise.
        """
        level = uncertainty.checked_level(level)
        with_noise = check_flag("observation_noise", observation_noise)
        uncertainty.check_numbers_predicted(self._posterior.likelihood)
        now, engine = self._fitted(), self._engine
        likelihood = now.likelihood.of_calls
        found = uncertainty.interval(now, engine, x, likelihood, level, with_noise, self.enable_backprop)
        return prediction.as_network(engine, x, found)

    def batch_bald(
        self,
        pool_loader: Iterable[Any],
        batch_size: int,
        *,
        n_samples: int = 256,
        n_labellings: int = 1024,
        generator: torch.Generator | None = None,
    ) -> Acquisition:
        r"""Choose which inputs of a pool to label next: those whose labels together tell most about the function.

        The mutual information of the labels of the batch and the function, maximised greedily (BatchBALD), so that inputs that
        tell the same are not chosen together, as they are by their own :meth:`uncertainty`. Functions are samples in the K dimensions of the span,
        shared by the whole pool.

        Parameters
        ----------
        pool_loader : iterable
            Batches of unlabelled inputs, always in the same order: x alone, (x, y) or mappings; read once. No labels are used.
        batch_size : int
            b, how many to choose.
        n_samples : int
            S, how many functions are sampled. No batch can tell more than log S nats of them.
        n_labellings : int
            Up to how many labellings of the inputs chosen so far are gone through one by one, :math:`C^b` of them; beyond, so many are drawn.
        generator : torch.Generator, optional
            Gives the seed of the samples. Default: the estimator's seed.

        Returns
        -------
        Acquisition
            ``indices`` (b,), positions in the pool, in the order of choice, and ``scores`` (b,), the mutual information of
            the first 1 ... b of them, in nats. With outputs (B, ..., C), candidates are positions, input by input; with C binary
            targets, an input gets all its labels. Of a reward model, pairs are chosen.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If the likelihood has no finite set of labels (regression), an argument is out of range, the pool is smaller than the batch,
            or ``variance`` is not "ella".

        Notes
        -----
        Cost: the features of the pool, once; then about S x C x min(n_labellings, C^b) operations for each candidate and choice. Memory: K x C numbers
        for each candidate, and some 100 MB. On several ranks each chooses from its own pool; with ``shard_directions=True`` all have to call.
        Source: Kirsch, van Amersfoort, Gal (NeurIPS 2019), arXiv 1906.08158.
        """
        now, engine = self._fitted(), self._engine
        with now.fit.basis.ranks.together("the arguments of batch_bald()"):
            size = integer("batch_size", batch_size, "a positive integer", 1)
            most = integer("n_labellings", n_labellings, "a positive integer", 1)
            checks.check_prediction("glm", "mc", n_samples, generator, self._device)
            check_loader("pool_loader", pool_loader)
            acquisition.check_labels(now, most)
        noise = Noise.seeded(n_samples, generator, now.seed, diagonal_output=False)
        inputs = Stream(pool_loader, self.dict_key_x, self.dict_key_y, engine.inputs).inputs("Pool")
        return acquisition.batch_bald(now, engine, inputs, size, noise, most)

    @torch.no_grad()
    def residual_share(self, x: Input) -> Tensor:
        r"""Return the share of an input's gradient outside the span, :math:`1 - |\phi|^2 / \operatorname{tr} J J^T`.

        Exact with ``residual="exact"``; else estimated from ``residual_samples`` random
        tangents, the same for all inputs.

        Returns
        -------
        Tensor (B,)
            In [0, 1]: 0 where the landmarks explain an input's gradients, 1 where they say nothing about it.

        Raises
        ------
        AttributeError, ValueError
            As for a call.

        Notes
        -----
        Cost: features, plus 1 + 2S forward passes for each input (exact: about 5C).
        """
        now, engine = self._fitted(), self._engine
        seen = novelty.seen_with_shares(now, engine, x, self.enable_backprop)
        return prediction.as_network(engine, x, seen.residual_share.to(seen.f.dtype), 0)

    @torch.no_grad()
    def novelty(self, x: Input) -> Tensor:
        """Return how novel inputs are (B,): larger is further from the training data.

        The :meth:`residual_share`; once :meth:`calibrate_novelty` was called, the normal score of the
        predictive entropy plus half that of the share. It is a score of its own, not part of the
        predictive, and finds inputs from elsewhere, not errors: docs/tuning.md shows where it fails.

        Raises
        ------
        AttributeError, ValueError
            As for a call; ValueError also if the setting has changed since the calibration.
        """
        now, engine = self._fitted(), self._engine
        found = novelty.novelty(now, engine, x, self.enable_backprop)
        return prediction.as_network(engine, x, found, 0)

    @torch.no_grad()
    def calibrate_novelty(self, in_distribution_loader: Iterable[Any]) -> None:
        """Learn what entropy and residual share are usual, for :meth:`novelty`.

        Parameters
        ----------
        in_distribution_loader : iterable
            Batches of inputs the model is meant for, which it was not fitted to: (x, y), mappings, or
            x alone; hundreds at least, since scores end where theirs do. No labels are used, and
            no other data.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If the likelihood is regression, which has no entropy, or there are fewer than two inputs.
        """
        ranks = self._ranks
        with ranks.together("the data to calibrate novelty on"):
            now = self._fitted()
            novelty.check_probabilities(now.likelihood)
            check_loader("in_distribution_loader", in_distribution_loader)
            stream = self._stream(in_distribution_loader)
        new = novelty.calibrated(now, self._engine, stream, ranks, self.enable_backprop)
        become(self, now.fit, current=new)

    def approximation_error(self, x: Input, train_loader: Iterable[Any] | None = None) -> ApproximationError:
        r"""Say how much of the model's derivatives at given inputs the basis captures.

        Parameters
        ----------
        x : Tensor or mapping
            B inputs.
        train_loader : iterable, optional
            The training data: compares with exact linearised Laplace too, for networks of up to 5 000 weights.
            In a process group all ranks have to pass it, each with its part of the data.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If the network is too large for the exact comparison, or there are no inputs, or no training data.

        Notes
        -----
        Cost: as :meth:`residual_share`; with training data, C backward passes for each of
        them and P x P matrices.
        """
        now, stream = self._fitted(), None
        if train_loader is not None:
            check_loader("train_loader", train_loader)
            novelty.check_exact_size(self.n_params)
            stream = self._stream(train_loader)
        return novelty.approximation_error(now, self._engine, x, stream, self._ranks, self.enable_backprop)

    # ------------------------------------------------------------------ tuning

    def log_marginal_likelihood(
        self, prior_precision: Tensor | None = None, sigma_noise: Tensor | None = None
    ) -> Tensor:
        """Compute the evidence of the model confined to the K directions.

        Overrides :meth:`laplace.ParametricLaplace.log_marginal_likelihood`: log
        determinants are of K x K matrices, and bad values are refused before the
        current ones change. Differentiable in both arguments, which become current. A
        residual changes nothing: outside the span the posterior is the prior.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If a value is not positive and finite, or noise is given to a classifier.
        """
        now = self._fitted()
        given = {"prior_precision": prior_precision, "sigma_noise": sigma_noise}
        values = {k: attributes.checked(self, k, v) for k, v in given.items() if v is not None}
        if sigma_noise is not None:
            checks.check_noise_is_tunable(now.likelihood)
        evidence = replace(now, setting=now.setting.at(**values)).log_evidence
        if values:  # which do not become current if it fails
            become(self, setting=values)
        return evidence

    def optimize_prior_precision(
        self,
        pred_type: str = "glm",
        method: str = "marglik",
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: str = "scalar",
        val_loader: Iterable[Any] | None = None,
        loss: Loss | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 6,
        grid_size: int = 100,
        link_approx: str = "probit",
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
    ) -> None:
        """Tune the prior precision; with ``temperature=None``, a grid search tunes T too.

        See :meth:`laplace.BaseLaplace.optimize_prior_precision` for the parameters; what
        differs:

        - "gridsearch" runs the model once over ``val_loader`` (glm). The default loss is
          the mean NLL, for regression too (with the noise in the variance).
        - A temperature given as a number stays; None is tuned together with the prior,
          from 1e-3 to 1e6. After "marglik" it stays 1, with a warning.
        - A loss that is the same over the whole grid leaves the setting as it was; an optimum
          on an edge of the grid, a candidate that fails, and predictions that do no better
          than MAP's are each warned of.
        - A loss is minimised; it gets probabilities, or means and covariances. A metric that is
          better when higher is refused.
        - Calls that name no link use ``link_approx`` from then on (glm).
        - Where no setting is better than the network itself, the present one stays if it is as good. For regression a
          warning then names a noise that is larger than the errors.
        - If tuning fails, the estimator is as it was.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            On an unknown option, an empty grid, without ``val_loader`` where it is needed, or
            if no candidate has a finite loss.

        Notes
        -----
        Cost: 1 + 2K forward passes for each validation input, whatever the grid; with
        ``pred_type="nn"``, n_samples forward passes for each input and candidate (temperature
        and prior: about 500 candidates). Memory: N_val x C x K numbers, the part of them beyond
        the memory budget in a temporary file.
        """
        interval = (log_prior_prec_min, log_prior_prec_max, log_prior_prec_base, grid_size)
        options = (pred_type, link_approx, n_samples, loss)
        of_evidence = (n_steps, lr, init_prior_prec, prior_structure)
        check_choice("method", method, ("marglik", "gridsearch"))
        # The evidence is the same on all ranks, each of which may maximise it by itself.
        ranks = self._ranks if method == "gridsearch" else ALONE
        with ranks.together("the arguments of optimize_prior_precision()"):
            verbose, progress_bar = check_flag("verbose", verbose), check_flag("progress_bar", progress_bar)
            steps = prior.checked_evidence(*of_evidence, self.n_layers, self.n_params, self._device)
            search = prior.checked_search(method, interval, options, val_loader, self._posterior.likelihood)
            now = self._fitted()
        with torch.inference_mode(False):
            if method == "marglik":
                new, remarks = self._maximised(*steps, val_loader=val_loader, progress_bar=progress_bar)
            else:
                stream = self._stream(val_loader, progress_bar)  # type: ignore[arg-type]
                new, remarks = prior.tuned_prior(now, self._engine, stream, ranks, search)
        become(self, **new)
        for remark in remarks:
            warn_user(remark)
        if verbose:
            print(f"Optimized prior precision is {self.prior_precision}, temperature {self.temperature:.4g}.")

    def _maximised(self, *steps: Any, **more: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the prior precision that laplace-torch finds for the evidence, on a copy; and what is to be said."""
        twin = copy(self)
        # The host's optimiser keeps its steps on the default device.
        with prior.quiet_host(), torch.enable_grad(), self._device:
            options = dict(zip(("n_steps", "lr", "init_prior_prec", "prior_structure"), steps))
            super(ELLALaplace, twin).optimize_prior_precision("glm", "marglik", **options, **more)
        return prior.replaced(self._posterior, twin._posterior), prior.remarks_on_evidence(twin._posterior)

    def optimize_hyperparameters(
        self,
        val_loader: Iterable[Any],
        search: str | Sequence[str] | Mapping[str, Sequence[float] | None] | None = None,
        *,
        method: str | None = None,
        link_approx: str = "mc",
        n_samples: int = 128,
        loss: Loss | None = None,
        apply: bool = True,
        progress_bar: bool = False,
    ) -> TuningResult:
        r"""Tune any of the parameters of the predictive jointly, and compare with simpler methods.

        Parameters
        ----------
        val_loader : iterable
            Batches of data that the model was not fitted to; read once.
        search : "auto", sequence of str, or mapping, optional
            "auto" chooses a method: MAP, temperature scaling, vector scaling, a constant variance, one from the last layer's
            inputs, and ELLA with T, with T and s, and with T, class scales and biases (for regression with T, and with T and
            sigma) are compared by 5-fold cross-validation, and the simplest within one standard error of the best is taken.
            The estimator then predicts with it, by a forward pass alone if it needs no features.
            Else what of ELLA is tuned: any of "temperature" T, "logit_scale" s, "residual_scale" rho, "prior_precision",
            "n_eigenvalues" (leading K' <= K directions), "curvature_size" (n, from the snapshots of
            the fit), "sigma_noise", "class_scales" w and "class_biases" b. The last two are found by gradients of the NLL,
            jointly with all others, with a ridge whose weight is chosen by cross-validation. A mapping gives the values of the grid, None the
            default. Default: ("temperature", "logit_scale"); for regression ("temperature",
            "sigma_noise"); with a residual, "residual_scale" too. A temperature fixed by the user is
            left out. A parameter on which the loss does not depend keeps its value, and where nothing is better than the
            present setting, nothing changes. Where an earlier search has changed the prior precision and this one does not
            search it, the value before is tried too.
        method : str, optional
            With "auto", the method to take whatever the comparison says, by the name that ``result.summary()`` shows.
        link_approx : str
            The link of the predictions that the setting is for, which becomes the one of calls that name none.
        n_samples : int
            How many samples "mc" takes.
        loss : torchmetrics.Metric or callable, optional
            Of (probabilities, targets), or (means, covariances, targets) for regression; lower is better.
            Default: the mean NLL of an input (or position), which is refined by L-BFGS; any
            other loss by golden-section search.
        apply : bool
            Give the estimator the best setting; K' becomes ``n_directions``.
        progress_bar : bool
            Show the progress; with "auto", and how long methods take, before the first of them.

        Returns
        -------
        TuningResult

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            On parameters that cannot be searched, or if no setting has a finite loss. The
            estimator is then as it was.

        Notes
        -----
        Cost: one pass of features (and a plain forward pass) over the validation data. The
        candidates take N_val x C x K operations each, times the samples with "mc".
        """
        ranks = self._ranks
        with torch.inference_mode(False):
            with ranks.together("the arguments of optimize_hyperparameters()"):
                now = self._fitted()
                checks.check_prediction("glm", link_approx, n_samples)
                checks.check_link(now.likelihood, link_approx)
                check_loss(loss)
                check_loader("val_loader", val_loader)
                check_flag("apply", apply)
                stream = self._stream(val_loader, check_flag("progress_bar", progress_bar))
                options = {
                    "link": name_of(link_approx),
                    "n_samples": int(n_samples),
                    "loss": loss,
                    "apply": apply,
                }
                wanted = choosing.asked_for(now, search, method, **options)
            result, remarks = choosing.searched(now, self._engine, stream, ranks, wanted)
            if apply:
                become(self, now.fit, **joint.applied(now, result, wanted.link))
                if "n_eigenvalues" in result.searched:
                    self._engine.drop_prepared()  # of directions that may not be used any more
        for remark in remarks:
            warn_user(remark)
        return result

    # ------------------------------------------------------------------ saving and copying

    @exclusively
    def state_dict(self, *, directions: str = "full") -> dict[str, Any]:
        """Return the fitted state: tensors and plain types, loadable with ``weights_only=True``.

        It holds a hash of the model, not its weights, and a hash of all that it holds, so that damage is found. It
        shares no memory with the estimator. All directions of the fit are in it, also where ``n_directions`` is lower.

        Parameters
        ----------
        directions : {"full", "half", "landmarks"}
            How V is stored, which takes K x P numbers, K times what the model takes. "full": as it is. "half": in
            float16, with a scale for each direction and weight; the directions are made orthonormal again when
            they are loaded, and features and variances differ by 1e-3 of the largest or less (1e-5 on a ResNet-18). "landmarks": as the
            M landmark inputs (training data, then, which go wherever the file goes), their output coordinates and
            M x K coefficients. :meth:`load_state_dict` computes V from them, at M x 5 forward passes (or what it
            takes to read and write M x P numbers, if that is more), and agrees with the fit up to rounding.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If the model has changed since; or if the directions cannot be stored in this way: those spread over
            ranks only in full, and as landmarks only those of a fit (also with ``basis=`` of one), or of a state
            that was stored so, whose rows were not spilled in lower precision.
        """
        check_choice("directions", directions, STORED)
        now = self._unchanged()
        own = {name: getattr(self, name) for name in checkpoints.OF_ESTIMATOR}
        own |= {"cls_name": type(self).__name__, "named_by_user": sorted(self._named_by_user)}
        if self.curvature_positions is not None:
            own["curvature_positions"] = self.curvature_positions
        return checkpoints.whole_state({**state_of(now), **own}, now.fit.basis, directions)

    @exclusively
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; tensors move to the model's device.

        Raises
        ------
        ValueError
            If the state is not one of this class, belongs to another model, likelihood or choice of
            parameters, or is damaged. The estimator is then as it was.

        Notes
        -----
        Cost: K^2 P operations to check that the directions are orthonormal. With ``directions="landmarks"``,
        M x 5 forward passes, or what it takes to read and write M x P numbers. A state of laplace_ella 0.1.0 holds no hash, so that damage is found only where
        it breaks a type, a shape, a range, a symmetry or orthonormality.
        """
        engine, now, name = self._engine, self._now(), type(self).__name__
        checkpoints.check_state(state_dict, name, now.likelihood.name, self.model, engine.function.weights())
        ranks = asked.sharing(self)
        checkpoints.check_shard(state_dict["basis"]["shard"], ranks, "The checkpoint")
        like = assigned(self, now, state_dict)
        chosen = now.setting.temperature if now.temperature_fixed else None
        for remark in checkpoints.differences(state_dict, self.enable_backprop, chosen):
            warn_user(remark)
        engine.forget()
        engine = engine.along(checkpoints.read_along(state_dict, self.channel_axis))
        with outside_inference():  # what is loaded may meet a graph later
            state = without_inference(state_dict)
            basis = checkpoints.unpack_saved_basis(state["basis"], engine, ranks)
            new = posterior_of(state, basis, like, engine.function.flat_weights())
        own = {name: state[name] for name in checkpoints.OF_ESTIMATOR}
        own["curvature_positions"] = state.get("curvature_positions")
        attributes.exchange(self, new, **own, _named_by_user=set(state["named_by_user"]))

    def save(self, path: str | PathLike[str], *, directions: str = "full") -> None:
        """Write what :meth:`state_dict` returns to a file, for :meth:`load`.

        The file is replaced as a whole or not at all, so that who reads it meanwhile reads the old one or the new one. The
        network's weights are not in it, but a hash of them: save them beside it, as you would without this package.

        Parameters
        ----------
        path : str or path
            Of a file, in an existing folder. A symbolic link is followed, and stays. Where directions are spread over
            ranks (``shard_directions``), each rank writes a file of its own, to whose name ``.<rank>-of-<size>`` is appended.
        directions : {"full", "half", "landmarks"}
            How V is stored; see :meth:`state_dict`.

        Raises
        ------
        AttributeError, ValueError
            As for :meth:`state_dict`; ValueError also if the path is not that of a file in an existing folder.
        OSError
            If the file cannot be written. One that was there before stays as it was.
        """
        saving.save(self.state_dict(directions=directions), path, asked.sharing(self))

    @classmethod
    def load(cls: type[Self], path: str | PathLike[str], model: nn.Module, **options: Any) -> Self:
        """Build the estimator that :meth:`save` has written to a file, for a network that has its weights already.

        The file is read with ``torch.load(..., weights_only=True)``: nothing in it is run. Files of
        ``torch.save(la.state_dict(), path)`` are the same.

        Parameters
        ----------
        path : str or path
            Of the file; as it was passed to :meth:`save`, also where each rank has one of its own.
        model : torch.nn.Module
            The network with the weights that the estimator was fitted at, on the device where it is to predict. The same
            parameters have to require grad; freeze the others before, and all of them afterwards, if you like.
        **options
            Arguments of the constructor that are not in the file: keys of mappings, backend, memory and the like. Likelihood and
            hyperparameters are.

        Returns
        -------
        ELLALaplace

        Raises
        ------
        OSError
            If the file cannot be read.
        ValueError
            If it is truncated or damaged, no such file, of another class or format, or belongs to another network.

        Notes
        -----
        Cost: that of :meth:`load_state_dict`. In every process K x P numbers; docs/serving.md has how processes share them.
        """
        ranks = (
            ranks_of(options.get("process_group", "default")) if options.get("shard_directions") else ALONE
        )
        state = saving.saved_state(path, cls.__name__, ranks)
        la = cls(model, state["likelihood"], **{"enable_backprop": state["enable_backprop"], **options})
        la.load_state_dict(state)
        return la

    def as_module(
        self,
        *,
        pred_type: str = "glm",
        joint: bool = False,
        link_approx: str | None = None,
        n_samples: int = 100,
        diagonal_output: bool = False,
    ) -> PredictiveModule:
        """Return a module whose forward pass is a call of this estimator, for code that takes modules.

        ``la.as_module()(x)`` is ``la(x)``: probabilities (B, C), or mean and covariance, with ``diagonal_output=True`` mean and
        variances (B, C). The module keeps the fit and the setting of this moment, and shares the network.

        Parameters
        ----------
        pred_type, joint, link_approx, n_samples, diagonal_output
            As for a call, of which they are the arguments in every forward pass.

        Returns
        -------
        PredictiveModule
            Of an estimator that is not fitted yet, it gets its posterior by ``load_state_dict``.

        Raises
        ------
        ValueError
            As for a call.
        """
        flags = {"joint": joint, "diagonal_output": diagonal_output}
        self._checked_call(pred_type, link_approx, n_samples, None, {}, fitting=False, **flags)
        options = {"pred_type": pred_type, "link_approx": link_approx, "n_samples": n_samples, **flags}
        return PredictiveModule(copy(self), options)

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
        unnamed = {"subsample_size", "n_eigenvalues"} - self._named_by_user
        return copying.arguments_of(self, {"backend": self._backend_cls, **dict.fromkeys(unnamed)})

    def __sklearn_clone__(self: Self) -> Self:
        # clone() itself compares arguments by identity, and hyperparameters are converted to tensors.
        return type(self)(**deepcopy(self.get_params(), {id(self.process_group): self.process_group}))

    @exclusively
    def __copy__(self: Self) -> Self:
        new = type(self).__new__(type(self))
        own = {k: copy(v) if isinstance(v, (list, dict, set)) else v for k, v in vars(self).items()}
        new.__dict__.update(own, _backend=copy(self._backend))
        return new

    @exclusively
    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self.process_group)] = self.process_group  # which belongs to the process
        new.__dict__.update(deepcopy(self._state(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        copying.check_picklable(self.process_group)
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {**vars(self), "_posterior": self._posterior.detached()}

    def __repr__(self) -> str:
        return attributes.description(self, f"M={self.subsample_size}, K={self.n_eigenvalues}")

    # ------------------------------------------------------------------ what the posterior has not

    def log_prob(self, value: Tensor, normalized: bool = True) -> NoReturn:
        """Refuse: the posterior has no density over all weights.

        Raises
        ------
        NotImplementedError
        """
        raise NotImplementedError(checks.NO_DENSITY)

    def square_norm(self, value: Tensor) -> NoReturn:
        """Refuse: the posterior has no precision over all weights.

        Raises
        ------
        NotImplementedError
        """
        raise NotImplementedError(checks.NO_DENSITY)
