r"""The estimator: laplace-torch's contract, kept by the modules that do the work."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any

import laplace
import torch
from laplace import ParametricLaplace
from laplace.curvature import CurvatureInterface
from torch import Tensor, nn

from .backends import OPTIONS, backend_options, nystrom_backend
from .data import validation
from .fitting import checkpoint
from .fitting.fitting import Fitting
from .fitting.merging import Merging
from .network.functional import n_trainable, unwrap
from .network.safety import LOCK, exclusively
from .nystrom.basis import NystromBasis
from .nystrom.caching import Kept, outside_inference, without_inference
from .nystrom.compact import STORED
from .parallel.ranks import ALONE, Ranks, ranks_of
from .posterior import gaussian as posterior
from .posterior.consistency import of_one_moment
from .posterior.copying import Copying, given
from .posterior.hyperparameters import Hyperparameters
from .posterior.likelihoods import LIKELIHOODS
from .posterior.novelty import Novelty
from .posterior.predictive import Predictive
from .posterior.residual import RESIDUALS
from .tuning.joint import JointTuning
from .tuning.prior import PriorTuning

DEFAULT_SUBSAMPLE_SIZE = 500
DEFAULT_N_EIGENVALUES = 20


def Laplace(
    model: nn.Module,
    likelihood: str = "classification",
    subset_of_weights: str = "last_layer",
    hessian_structure: str = "kron",
    *args: Any,
    **kwargs: Any,
) -> laplace.BaseLaplace:
    """Build any flavour of laplace-torch, ELLA among them.

    :func:`laplace.Laplace` with a default likelihood, so that
    ``Laplace(model, subset_of_weights="all", hessian_structure="ella")`` is complete.

    Parameters
    ----------
    model : torch.nn.Module
        The trained network.
    likelihood : {"classification", "regression", "reward_modeling", "bernoulli"}
        The last, for binary and multi-label targets, with "ella" only.
    subset_of_weights : {"last_layer", "subnetwork", "all"}
        "ella" needs "all".
    hessian_structure : {"kron", "diag", "full", "lowrank", "gp", "ella"}
        "ella" returns an :class:`ELLALaplace`.
    *args, **kwargs
        Passed to the estimator.
    """
    validation.check_module(model)
    validation.check_choice("subset_of_weights", subset_of_weights, ("last_layer", "subnetwork", "all"))
    validation.check_choice("hessian_structure", hessian_structure, _structures())
    if hessian_structure == "ella" and subset_of_weights != "all":
        raise ValueError(
            f"hessian_structure='ella' needs subset_of_weights='all'; got {subset_of_weights!r}. Pass both."
        )
    return laplace.Laplace(model, likelihood, subset_of_weights, hessian_structure, *args, **kwargs)


def _structures() -> list[str]:
    """Return the structures of the Hessian that are known: laplace-torch's, and those that subclasses name."""
    classes, found = [laplace.baselaplace.BaseLaplace], {"gp"}
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        found |= {cls._key[1]} if hasattr(cls, "_key") else set()
    return sorted(found)


class ELLALaplace(
    Copying,
    Fitting,
    Merging,
    Hyperparameters,
    Predictive,
    Novelty,
    PriorTuning,
    JointTuning,
    ParametricLaplace,
):
    r"""Linearised Laplace over all weights, through a Nystrom approximation of the NTK.

    The posterior lives on :math:`\theta^* + V z`, with K orthonormal directions V that
    span the leading gradients of M landmarks, and :math:`z \sim N(0, A^{-1})`,
    :math:`A = G / (\sigma^2 T) + V^T \Delta V`.
    Source: Deng, Zhou, Zhu (NeurIPS 2022), arXiv 2210.12642.

    Parameters
    ----------
    model : torch.nn.Module
        The trained network. The posterior is over its parameters that require grad now; they may be
        frozen later. Outputs may be (B, ..., C): positions in a sequence or an image are
        flattened into the batch. DataParallel, DistributedDataParallel and torch.compile wrappers
        are taken off.
    likelihood : str
        "classification", "regression" or "reward_modeling", as in :class:`laplace.ParametricLaplace`;
        or "bernoulli", for binary and multi-label targets.
    sigma_noise : float or Tensor
        Observation noise, a standard deviation (regression).
    prior_precision : float or Tensor
        Scalar, one per weight tensor, or one per weight.
    prior_mean : float or Tensor
        Scalar, or one per weight.
    temperature : float, optional
        T; a number stays fixed. None means 1 until ``optimize_prior_precision(
        method="gridsearch")`` tunes it together with the prior: at T = 1 ELLA's
        predictions are close to MAP's whatever the prior.
    enable_backprop : bool
        Let gradients reach the inputs through predictions (not the weights).
    dict_key_x : str
        Key of the inputs in mapping batches.
    dict_key_y : str
        Key of their targets.
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
        their numerical rank is reduced with a warning, a default without.
    curvature_size : int or None
        From how many inputs G is estimated (without bias); all if there are fewer.
        None: all, in a second pass.
    seed : int
        Of landmarks, curvature inputs and Monte-Carlo links.
    chunk_size : int, optional
        Directions per forward-mode call; default by memory.
    memory_budget : int or float, optional
        Bytes (int), or share of the device's free memory (float), that gradient rows and
        activations may take; default a quarter of the free memory.
    autodiff : {"auto", "forward", "double", "reverse"}, optional
        How features are computed; default "auto", which see in :class:`NystromGGN`.
    compile : bool
        Run forward mode through :func:`torch.compile`: minutes of compiling for each
        shape of batch, then faster.
    spill : str or path, optional
        Where gradient rows go that do not fit, instead of being computed again: "cpu", or a folder.
    spill_dtype : torch.dtype
        In which precision; see :class:`NystromGGN`.
    curvature : {"exact", "mc"}
        "mc" estimates G from labels sampled from the model: cheaper, and fine from 20 K inputs on.
    curvature_samples : int
        How many labels an input.
    logit_scale : float
        s: the mean of the logits is multiplied by it, their covariance is not.
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

    Attributes
    ----------
    H : Tensor (K, K)
        G, the curvature summed over the data, float64; None before a fit.
    snapshots : list of (n, Tensor (K, K))
        G as estimated from the first n curvature inputs, scaled to all N.
    n_curvature : int
        From how many inputs H is estimated.
    mean : Tensor (P,)
        The weights at the time of the fit.
    n_data, n_outputs, loss
        N, C, and the negative log likelihood summed over the data (up to constants). N counts
        inputs, also where they have many positions; ``n_predictions`` counts positions.

    Every argument is an attribute too, whose value builds an equal estimator; see :meth:`get_params`.

    Raises
    ------
    ValueError
        On any argument out of its range; see each message.
    """

    _key = ("all", "ella")

    n_data: int
    loss: Any  # Tensor () after a fit
    H: Any  # Tensor (K, K) after a fit, None before

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
    ) -> None:
        with LOCK:  # while another thread has the model's weights exchanged, none requires grad
            validation.check_model(model)
            validation.check_choice("likelihood", likelihood, LIKELIHOODS)
            validation.check_choice("residual", residual, RESIDUALS)
            validation.check_key("dict_key_x", dict_key_x)
            validation.check_key("dict_key_y", dict_key_y)
            validation.check_process_group(process_group)
            validation.check_flag("enable_backprop", enable_backprop)
            validation.check_residual(residual, prior_precision, enable_backprop)
            validation.check_sharding(shard_directions, prior_precision, n_trainable(model), enable_backprop)
            validation.check_noise(sigma_noise)
            self._named_by_user = given(subsample_size=subsample_size, n_eigenvalues=n_eigenvalues)
            self.subsample_size = DEFAULT_SUBSAMPLE_SIZE if subsample_size is None else subsample_size
            self.n_eigenvalues = DEFAULT_N_EIGENVALUES if n_eigenvalues is None else n_eigenvalues
            self.curvature_size, self.seed = curvature_size, seed
            self.curvature, self.curvature_samples = curvature, curvature_samples
            self.residual_samples, self._residual = residual_samples, residual
            self._check_settings()
            self.process_group, self.shard_directions = process_group, bool(shard_directions)
            self.backend_kwargs = validation.check_options("backend_kwargs", backend_kwargs)
            self.asdl_fisher_kwargs = validation.check_options("asdl_fisher_kwargs", asdl_fisher_kwargs)
            self._begin()
            super().__init__(
                unwrap(model),
                # which the host does not know
                "classification" if likelihood == "bernoulli" else likelihood,
                sigma_noise,
                prior_precision,
                prior_mean,
                temperature,
                bool(enable_backprop),
                dict_key_x,
                dict_key_y,
                nystrom_backend(backend),
                backend_options(
                    backend,
                    {
                        "chunk_size": chunk_size,
                        "memory_budget": memory_budget,
                        "autodiff": autodiff,
                        "compile": compile,
                        "spill": spill,
                        "spill_dtype": spill_dtype,
                    },
                    self.backend_kwargs,
                ),
                self.asdl_fisher_kwargs,
            )
            self.likelihood = likelihood
            self.mean = self.prior_mean
            self.logit_scale, self.residual_scale = logit_scale, residual_scale
            if temperature_fixed is not None:
                self._temperature_fixed = validation.check_flag("temperature_fixed", temperature_fixed)
            self._build_backend()

    def _check_settings(self) -> None:
        """Require values that a fit can use; they may have been assigned since the last one."""
        self.subsample_size = (
            validation.check_size("subsample_size", self.subsample_size) or DEFAULT_SUBSAMPLE_SIZE
        )
        self.n_eigenvalues = validation.check_rank(self.n_eigenvalues) or DEFAULT_N_EIGENVALUES
        for name in ("curvature_samples", "residual_samples"):
            setattr(self, name, validation.check_size(name, getattr(self, name), optional=False))
        self.curvature_size = validation.check_size("curvature_size", self.curvature_size)
        self.seed = validation.check_seed(self.seed)
        validation.check_choice("curvature", self.curvature, validation.CURVATURES)

    def _begin(self) -> None:
        """Set what a fit will find; the host's constructor assigns hyperparameters, whose setters use it."""
        self.H = None
        self._basis: NystromBasis | None = None
        self._cache: dict[str, Kept] = {}
        self.snapshots: list[tuple[int, Tensor]] = []
        self.n_curvature = self.n_predictions = 0
        self._labels_sampled = False  # whether any part of G was estimated from sampled labels
        # The largest eigenvalue of G, and the largest loss, that were ever part of these sums: their rounding stays.
        self._largest_sums = [0.0, 0.0]
        self._novelty_reference: Tensor | None = None
        self._novelty_setting: list[Any] = []
        self._fingerprint = ""
        self.fit_history_: dict[str, list[float]] = {"processed_examples": [], "val_nll": []}

    def _build_backend(self) -> None:
        try:
            _ = self.backend
        except TypeError as error:
            raise ValueError(
                f"backend_kwargs={self._backend_kwargs} do not fit {self._backend_cls.__name__}: {error}. "
                f"It takes {', '.join(OPTIONS)}."
            ) from error
        for name in OPTIONS:  # as they were used
            setattr(self, name, self._backend_kwargs[name])

    @property
    def _ranks(self) -> Ranks:
        """The processes that share the work."""
        return ranks_of(self.process_group)

    # ------------------------------------------------------------------ what a fit leaves

    def _init_H(self) -> None:
        self.H = None

    def _check_H_init(self) -> None:
        """Require a fit, and the model in its dtype; what was fitted follows the model to its device.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If the model's dtype has changed since.
        """
        super()._check_H_init()
        assert self._basis is not None
        checkpoint.check_dtypes(self._basis, self.params)
        if self._prior_precision.device != self._device:
            self._follow_model()

    @exclusively
    def _follow_model(self) -> None:
        """Move what was assigned and fitted to the model's device."""
        settled, named = self.backend.engine.function.names, self.model.named_parameters()
        params = [p for k, p in named if k in settled]  # some devices need new parameters
        with self._changes() as view:
            view.params = params
            for name in ("_prior_precision", "_prior_mean", "_sigma_noise"):
                setattr(view, name, getattr(view, name).to(self._device, self._dtype))
            if view.H is None:
                return
            view.snapshots = [(n, G.to(self._device)) for n, G in view.snapshots]
            for name in ("H", "loss", "mean"):
                setattr(view, name, getattr(view, name).to(self._device))
            view._basis = checkpoint.on_device_of(view._basis, self.model)

    def _view(self) -> Any:
        if not self._is_view and self.H is not None and self._prior_precision.device != self._device:
            self._follow_model()
        return super()._view()

    @property
    def basis(self) -> NystromBasis:
        """The K directions and the spectrum they come from.

        Raises
        ------
        AttributeError
            Before a fit.
        """
        self._check_H_init()
        assert self._basis is not None
        return self._basis

    @exclusively
    def _set_fit(
        self,
        basis: NystromBasis,
        snapshots: list[tuple[int, Tensor]],
        loss: Tensor,
        counts: tuple[int, int, int],
        largest_sums: Sequence[float] = (0.0, 0.0),
    ) -> None:
        n_curvature, H = snapshots[-1]
        n_data, n_predictions, n_outputs = counts
        loss = loss.to(self._device)
        sizes = [float(torch.linalg.eigvalsh(H)[-1]), float(loss)]
        found = {
            "_basis": basis,
            "snapshots": snapshots,
            "n_curvature": n_curvature,
            "H": H,
            "loss": loss,
            "n_data": n_data,
            "n_predictions": n_predictions,
            "n_outputs": n_outputs,
            "mean": torch.cat([p.detach().reshape(-1) for p in self.params]).to(self._dtype),
            "_fingerprint": checkpoint.fingerprint(self.model),
            "_largest_sums": [max(pair) for pair in zip(sizes, largest_sums)],
            "fit_history_": {"processed_examples": [float(n_curvature)], "val_nll": []},
            "_novelty_reference": None,
        }
        with self._changes(replaces_fit=True) as view:
            vars(view).update(found)

    def _keep_snapshot(self, n: int) -> None:
        """Let G be what was found from the first n curvature inputs."""
        self.n_curvature, self.H = n, dict(self.snapshots)[n]

    def _keep_leading(self, rank: int) -> None:
        """Drop all but the leading directions."""
        self._basis = self.basis.leading(rank)
        self.snapshots = [(n, G[:rank, :rank].clone()) for n, G in self.snapshots]
        self.H = self.H[:rank, :rank].clone()

    # ------------------------------------------------------------------ posterior

    @property
    @of_one_moment
    def posterior_precision(self) -> Tensor:
        r""":math:`A = G / (\sigma^2 T) + V^T \Delta V` (K, K), float64.

        Differentiable in the prior precision and the noise.
        """
        self._check_H_init()
        return self._H_factor * self.H + self.basis.project_precision(self.prior_precision)

    @property
    @of_one_moment
    def posterior_scale(self) -> Tensor:
        """S (K, K) with S S^T the posterior covariance, float64; a copy.

        Computed again if prior, noise, temperature, H or directions have changed, also in place.

        Raises
        ------
        ValueError
            If prior precision or noise have got a value that would have been refused.
        """
        self._check_H_init()
        small = (self.prior_precision, self.sigma_noise, self.temperature, self.H)
        # The directions enter through V^T Delta V.
        large = self.basis.directions.values() if self.prior_precision.numel() > 1 else ()
        return self._cached("scale", self._computed_scale, small, large).clone()

    @torch.inference_mode(False)  # it is kept, and may meet a graph later
    @torch.no_grad()
    def _computed_scale(self) -> Tensor:
        validation.check_positive("prior_precision", self.prior_precision)
        self._check_noise(self.sigma_noise)
        return posterior.posterior_scale(self.posterior_precision)

    @property
    @of_one_moment
    def posterior_covariance(self) -> Tensor:
        r"""Covariance :math:`A^{-1}` (K, K) of the coordinates, float64."""
        scale = self.posterior_scale
        return scale @ scale.T

    @property
    @of_one_moment
    def log_likelihood(self) -> Tensor:
        """Log likelihood of the training data; the host's, for models with positions too."""
        found = super().log_likelihood
        if self.likelihood != "regression":
            return found
        # The host counts a normaliser for each of N x C outputs, and not for further positions.
        further = (self.n_predictions - self.n_data) * self.n_outputs
        return found - further * torch.log(self.sigma_noise * math.sqrt(2 * math.pi))

    @property
    @of_one_moment
    def scatter(self) -> Tensor:
        r""":math:`(\theta^* - \mu_0)^T \Delta (\theta^* - \mu_0)`; the host's."""
        return super().scatter

    @property
    @of_one_moment
    def log_det_ratio(self) -> Tensor:
        """Log determinant of A, less that of the prior precision; the host's."""
        return super().log_det_ratio

    @property
    @of_one_moment
    def log_det_prior_precision(self) -> Tensor:
        r"""Log determinant of :math:`V^T \Delta V`, the prior precision of the K coordinates."""
        return posterior.log_det(self.basis.project_precision(self.prior_precision))

    @property
    @of_one_moment
    def log_det_posterior_precision(self) -> Tensor:
        """Log determinant of A."""
        return posterior.log_det(self.posterior_precision)

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
        self._check_H_init()
        if prior_precision is not None:
            validation.check_prior_precision("prior_precision", prior_precision, self.n_layers, self.n_params)
        if sigma_noise is not None:
            self._check_noise(sigma_noise)
            validation.check_has_noise(self._likelihood_name)
        with self._changes() as view:
            if prior_precision is not None:
                view.prior_precision = prior_precision
            if sigma_noise is not None:
                view.sigma_noise = sigma_noise
            return view._evidence()  # before the values become current, which they do not if it fails

    def _evidence(self) -> Tensor:
        return super().log_marginal_likelihood()

    # ------------------------------------------------------------------ checkpoints

    @exclusively
    @of_one_moment
    def state_dict(self, *, directions: str = "full") -> dict[str, Any]:
        """Return the fitted state: tensors and plain types, loadable with ``weights_only=True``.

        It holds a hash of the model, not its weights, and a hash of all that it holds, so that damage is found. It
        shares no memory with the estimator.

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
        validation.check_choice("directions", directions, STORED)
        self._check_H_init()
        self._check_unchanged()
        state = checkpoint.copied(self._state())
        state["basis"] = checkpoint.pack_saved_basis(self.basis, directions)
        return {**state, "digest": checkpoint.digest_of_state(state)}

    def _state(self) -> dict[str, Any]:
        """Return all entries of a state apart from the basis and the digest; they are the estimator's own."""
        return {
            "format": checkpoint.FORMAT,
            "cls_name": type(self).__name__,
            "likelihood": self._likelihood_name,
            "fingerprint": self._fingerprint,
            "named_by_user": sorted(self._named_by_user),
            "basis": None,
            "H": self.H,
            "loss": self.loss,
            "n_data": self.n_data,
            "n_predictions": self.n_predictions,
            "n_outputs": self.n_outputs,
            "temperature": self.temperature,
            "temperature_fixed": self._temperature_fixed,
            "snapshots": self.snapshots,
            "labels_sampled": self._labels_sampled,
            "largest_sums": self._largest_sums,
            "novelty_reference": self._novelty_reference,
            "novelty_setting": self._novelty_setting,
            "fit_history": self.fit_history_,
            **{name: getattr(self, name) for name in (*checkpoint.TENSOR_STATE, *checkpoint.PLAIN_STATE)},
        }

    def _check_unchanged(self) -> None:
        if self._fingerprint != checkpoint.fingerprint(self.model):
            raise ValueError(
                "The model's weights or buffers have changed since the fit, which belongs to the old ones. "
                "Fit again, or restore them."
            )

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
        weights = self.backend.engine.function.weights()
        checkpoint.check_state(state_dict, type(self).__name__, self._likelihood_name, self.model, weights)
        ranks = self._ranks if self.shard_directions else ALONE
        checkpoint.check_shard(state_dict["basis"]["shard"], ranks, "The checkpoint")
        self._warn_of_differences(state_dict)
        self.backend.engine.forget()
        with outside_inference():  # what is loaded may meet a graph later
            state_dict = without_inference(state_dict)
            basis = checkpoint.unpack_saved_basis(state_dict["basis"], self.backend, ranks)
            with self._changes(replaces_fit=True) as view:
                view._restore(checkpoint.copied({k: v for k, v in state_dict.items() if k != "basis"}), basis)

    def _restore(self, state: dict[str, Any], basis: NystromBasis) -> None:
        # The residual decides what priors are allowed: none first, and its own last.
        self.residual = "none"
        for name in (*checkpoint.TENSOR_STATE, *checkpoint.PLAIN_STATE):
            setattr(self, name, state[name])
        self.temperature = state["temperature"]
        self._temperature_fixed = state["temperature_fixed"]
        self._named_by_user = set(state["named_by_user"])
        snapshots = [(n, G.to(self._device)) for n, G in state["snapshots"]]
        loss, n_curvature = state["loss"].to(self._device), self.n_curvature
        counts = tuple(state[k] for k in ("n_data", "n_predictions", "n_outputs"))
        self._set_fit(basis, snapshots, loss, counts)
        self.n_curvature, self.H = n_curvature, state["H"].to(self._device)
        self._labels_sampled = state["labels_sampled"]
        self._largest_sums = list(state["largest_sums"])
        self._novelty_reference = state["novelty_reference"]
        self._novelty_setting = state["novelty_setting"]
        self.fit_history_ = state["fit_history"]

    def _warn_of_differences(self, state: dict[str, Any]) -> None:
        pairs: dict[str, tuple[Any, Any]] = {
            "enable_backprop": (self.enable_backprop, state["enable_backprop"])
        }
        if self._temperature_fixed:
            pairs["temperature"] = (self.temperature, state["temperature"])
        for name, (mine, theirs) in pairs.items():
            if mine != theirs:
                warnings.warn(
                    f"The checkpoint has {name}={theirs}, which replaces {name}={mine}.",
                    stacklevel=4,  # user, the lock, load_state_dict, here
                )

    def _more(self) -> str:
        """Return what differs from the defaults, for ``__repr__``."""
        values = {
            "sigma_noise": float(self.sigma_noise),
            "logit_scale": self.logit_scale,
            "residual_scale": 1.0 if self.residual == "none" else self.residual_scale,
        }
        found = [f", {k}={v:.4g}" for k, v in values.items() if v != 1]
        found += [f", residual={self.residual!r}"] if self.residual != "none" else []
        return "".join(found + ([f", curvature={self.curvature!r}"] if self.curvature != "exact" else []))

    @of_one_moment
    def __repr__(self) -> str:
        if self.H is None:
            fitted = f"M={self.subsample_size}, K={self.n_eigenvalues}, P={self.n_params}, not fitted"
        else:
            fitted = (
                f"M={self.basis.n_landmarks}, K={self.basis.rank}, retained trace={self.basis.retained:.3f}, "
                f"P={self.n_params}, n_data={self.n_data}, n={self.n_curvature}"
            )
        prior = (
            f"{float(self.prior_precision):.4g}"
            if self.prior_precision.numel() == 1
            else f"{self.prior_precision.numel()} values"
        )
        fixed = "" if self._temperature_fixed else " (free)"
        return (
            f"ELLALaplace({self._likelihood_name!r}, {fitted}, prior_precision={prior}, "
            f"temperature={self.temperature:.4g}{fixed}{self._more()})"
        )
