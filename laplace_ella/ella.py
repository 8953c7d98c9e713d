r"""The estimator: laplace-torch's contract, kept by the modules that do the work."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import laplace
import torch
from laplace import ParametricLaplace
from laplace.curvature import CurvatureInterface
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from tqdm.auto import tqdm

from . import checkpoint, links, posterior, tuning, validation
from .basis import NystromBasis
from .batches import Input, collate, is_finite, named_batches
from .curvature import NystromGGN, nystrom_backend
from .landmarks import Landmarks, draw_outputs
from .likelihoods import LIKELIHOODS
from .scan import Scan, scan

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
    likelihood : {"classification", "regression", "reward_modeling"}
    subset_of_weights : {"all", "last_layer", "subnetwork"}
    hessian_structure : {"ella", "kron", "diag", "full", "lowrank", "gp"}
        "ella" needs ``subset_of_weights="all"`` and returns an :class:`ELLALaplace`.
    *args, **kwargs
        Passed to the estimator.
    """
    return laplace.Laplace(model, likelihood, subset_of_weights, hessian_structure, *args, **kwargs)


class ELLALaplace(ParametricLaplace):
    r"""Linearised Laplace over all weights, through a Nystrom approximation of the NTK.

    The posterior lives on :math:`\theta^* + V z`, with K orthonormal directions V that
    span the leading gradients of M landmarks, and :math:`z \sim N(0, A^{-1})`,
    :math:`A = G / (\sigma^2 T) + V^T \Delta V`.
    Source: Deng, Zhou, Zhu (NeurIPS 2022), arXiv 2210.12642.

    Parameters
    ----------
    model, likelihood, sigma_noise, prior_precision, prior_mean
        As in :class:`laplace.ParametricLaplace`. The prior precision may be scalar, one
        per weight tensor, or one per weight.
    temperature : float, optional
        T; a number stays fixed. None means 1 until ``optimize_prior_precision(
        method="gridsearch")`` tunes it together with the prior: at T = 1 ELLA's
        predictions are close to MAP's whatever the prior.
    enable_backprop : bool
        Let gradients reach the inputs through predictions (not the weights).
    dict_key_x, dict_key_y : str
        Keys of inputs and targets in mapping batches.
    backend : type, optional
        Where landmark gradients come from: CurvlinopsGGN (torch.func, default),
        BackPackGGN, AsdlGGN, or a :class:`NystromGGN`.
    backend_kwargs : dict, optional
        Passed to the backend.
    asdl_fisher_kwargs : dict, optional
        Taken for compatibility; gradients need no Fisher options.
    subsample_size : int, optional
        M, how many landmarks; default 500.
    n_eigenvalues : int, optional
        K, how many directions; default 20. What is named here and exceeds the data or
        their numerical rank is reduced with a warning, a default without.
    curvature_size : int or None
        From how many inputs G is estimated (without bias); all if there are fewer.
        None: all, in a second pass.
    seed : int
        Of landmarks, curvature inputs and Monte-Carlo links.
    chunk_size : int, optional
        Directions per forward-mode call; default by memory.
    memory_budget : int, optional
        Bytes that gradient rows may take; default a quarter of the free memory.

    Attributes
    ----------
    H : Tensor (K, K)
        G, the curvature summed over the data, float64; None before a fit.
    mean : Tensor (P,)
        The weights at the time of the fit.
    n_data, n_outputs, loss
        N, C, and the negative log likelihood summed over the data (up to constants).

    Raises
    ------
    ValueError
        On any argument out of its range; see each message.
    """

    _key = ("all", "ella")

    # Fixed until the options they describe exist.
    logit_scale = 1.0
    residual = "none"
    residual_scale = 1.0
    curvature = "exact"

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
        backend: type[CurvatureInterface] | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        *,
        subsample_size: int | None = None,
        n_eigenvalues: int | None = None,
        curvature_size: int | None = 2000,
        seed: int = 0,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        validation.check_model(model)
        validation.check_choice("likelihood", likelihood, LIKELIHOODS)
        sizes = {
            "subsample_size": subsample_size,
            "n_eigenvalues": n_eigenvalues,
            "curvature_size": curvature_size,
            "chunk_size": chunk_size,
            "memory_budget": memory_budget,
        }
        for name, value in sizes.items():
            validation.check_size(name, value)
        validation.check_seed(seed)
        # The host's constructor assigns hyperparameters, whose setters use these.
        self.H: Tensor | None = None
        self._posterior_scale: Tensor | None = None
        self._named_sizes = (subsample_size is not None, n_eigenvalues is not None)
        self.subsample_size = DEFAULT_SUBSAMPLE_SIZE if subsample_size is None else subsample_size
        self.n_eigenvalues = DEFAULT_N_EIGENVALUES if n_eigenvalues is None else n_eigenvalues
        self.curvature_size = curvature_size
        self.seed = seed
        self.chunk_size = chunk_size
        self.memory_budget = memory_budget
        self.fit_history_: dict[str, list[float]] = {"processed_examples": [], "val_nll": []}
        super().__init__(
            model,
            likelihood,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,  # type: ignore[arg-type]
            enable_backprop,
            dict_key_x,
            dict_key_y,
            nystrom_backend(backend),
            {"chunk_size": chunk_size, "memory_budget": memory_budget, **(backend_kwargs or {})},
            asdl_fisher_kwargs,
        )
        self.mean = self.prior_mean
        self._build_backend()

    def _build_backend(self) -> None:
        try:
            self.backend
        except TypeError as error:
            raise ValueError(
                f"backend_kwargs={self._backend_kwargs} do not fit {self._backend_cls.__name__}: {error}. "
                "It takes chunk_size and memory_budget."
            ) from error

    # ------------------------------------------------------------------ hyperparameters

    @property
    def _dtype(self) -> torch.dtype:
        # fp16 holds no number above 65504, so hyperparameters of such models are fp32.
        return torch.promote_types(super()._dtype, torch.float32)

    @property
    def temperature(self) -> float:
        """T, which divides the curvature; assigning it fixes it, None frees it at 1."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float | None) -> None:
        number = 1.0 if value is None else validation.positive_number("temperature", value)
        self._temperature, self._temperature_fixed = number, value is not None
        self._posterior_scale = None

    @property
    def prior_precision(self) -> Tensor:
        """Delta: (1,), one per weight tensor (L,), or one per weight (P,)."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: float | Tensor) -> None:
        validation.check_positive("prior_precision", value)
        ParametricLaplace.prior_precision.fset(self, value)  # type: ignore[attr-defined]

    @property
    def sigma_noise(self) -> Tensor:
        """Observation noise, a standard deviation; 1 unless the likelihood is regression."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, value: float | Tensor) -> None:
        validation.check_positive("sigma_noise", value)
        if self.likelihood != "regression" and torch.as_tensor(value).ne(1).any():
            raise ValueError(
                f"sigma_noise is for regression only and must be 1 for {self.likelihood!r}; got {value}."
            )
        ParametricLaplace.sigma_noise.fset(self, value)  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ fit

    def _init_H(self) -> None:
        self.H = None

    @property
    def basis(self) -> NystromBasis:
        """The K directions and the spectrum they come from.

        Raises
        ------
        AttributeError
            Before a fit.
        """
        self._check_H_init()
        return self.backend.basis  # type: ignore[attr-defined]

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
            :class:`laplace.ELLA` does; it does not influence the fit.
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
        self._check_fit(train_loader, landmarks, balanced, val_steps)
        progress = _progress(progress_bar)
        fresh = override or self.H is None
        found = scan(
            progress(train_loader, "Training data"),
            self.backend.forward,  # type: ignore[attr-defined]
            LIKELIHOODS[self.likelihood],
            n_landmarks=self.subsample_size if fresh and landmarks is None else 0,
            n_curvature=self.curvature_size or 0,
            seed=self.seed,
            balanced=balanced,
            dict_key_y=self.dict_key_y,
            first_position=0 if fresh else self.n_data,
        )
        basis = self._new_basis(found, landmarks, balanced, progress) if fresh else self.basis
        G, snapshots = self._curvature(found, basis, train_loader, val_steps, progress)
        if fresh:
            self.H, self.loss, self.n_data = G, found.loss, found.n_data
        else:
            self.H, self.loss = self.H + G, self.loss + found.loss
            self.n_data += found.n_data
        self.backend.basis = basis  # type: ignore[attr-defined]
        self.mean = parameters_to_vector(self.params).detach().to(self._dtype)
        self._set_n_outputs(found.n_outputs)
        self._posterior_scale = None
        self._record_history(snapshots, val_loader)

    def _check_fit(self, train_loader: Any, landmarks: Any, balanced: bool, val_steps: Any) -> None:
        validation.check_size("val_steps", val_steps)
        if balanced and self.likelihood == "regression":
            raise ValueError("balanced=True needs classes; regression has none. Leave it out.")
        if landmarks is not None:
            validation.check_landmarks(landmarks)
        if self.curvature_size is None and iter(train_loader) is train_loader:
            raise ValueError(
                "curvature_size=None reads the data twice, and this loader is an iterator that can be read once. "
                "Pass an iterable that can be started again, or a number as curvature_size."
            )

    def _set_n_outputs(self, n_outputs: int) -> None:
        self.n_outputs = n_outputs
        self.model.output_size = n_outputs  # type: ignore[assignment]  # as the host does

    def _new_basis(
        self, found: Scan, given: tuple[Input, Tensor] | None, balanced: bool, progress: Any
    ) -> NystromBasis:
        if given is None:
            landmarks = draw_outputs(found.landmarks, found.n_outputs, self.seed, balanced)
            self._report_reduction(
                0, "subsample_size", self.subsample_size, len(landmarks), "the data have no more pairs"
            )
        else:
            landmarks = validation.explicit_landmarks(given, found.n_outputs)
        basis = self.backend.build_basis(landmarks, self.n_eigenvalues, progress)  # type: ignore[attr-defined]
        self._report_reduction(
            1,
            "n_eigenvalues",
            self.n_eigenvalues,
            basis.rank,
            f"the gradients of the {len(landmarks)} landmarks have no higher numerical rank",
        )
        return basis

    def _report_reduction(self, which: int, name: str, wanted: int, got: int, reason: str) -> None:
        if got < wanted and self._named_sizes[which]:
            warnings.warn(f"{name} was reduced from {wanted} to {got}: {reason}.", stacklevel=4)

    def _curvature(
        self, found: Scan, basis: NystromBasis, loader: Any, every: int | None, progress: Any
    ) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """Return G (K, K), scaled to all N inputs, and what it was every few batches on the way."""
        total = torch.zeros(basis.rank, basis.rank, dtype=torch.float64, device=self._device)
        snapshots: list[tuple[int, Tensor]] = []
        seen = 0
        batches = self._curvature_batches(found, loader)
        for step, (name, x) in enumerate(progress(batches, "Curvature"), start=1):
            phi, f = self.backend.features(x, basis)  # type: ignore[attr-defined]
            _check_features(phi, f, name)
            total += self.backend.curvature(phi, f)  # type: ignore[attr-defined]
            seen += len(f)
            if every and step % every == 0:
                snapshots.append((seen, total * (found.n_data / seen)))
        G = total * (found.n_data / seen)
        if not snapshots or snapshots[-1][0] < seen:
            snapshots.append((seen, G))
        return G, snapshots

    def _curvature_batches(self, found: Scan, loader: Any) -> Iterator[tuple[str, Input]]:
        if self.curvature_size is None:
            for name, x, _ in named_batches(loader, self.dict_key_y):
                yield name, x
        else:
            for i, (_, x) in enumerate(collate(found.curvature.rows(), found.batch)):
                yield f"curvature batch {i}", x

    def _record_history(self, snapshots: list[tuple[int, Tensor]], val_loader: Any) -> None:
        self.fit_history_ = {"processed_examples": [float(n) for n, _ in snapshots], "val_nll": []}
        if val_loader is None:
            return
        batches = self._validation_batches(val_loader, _progress(False))
        final = self.H
        try:
            for _, self.H in snapshots:
                self._posterior_scale = None
                self.fit_history_["val_nll"].append(self._score(batches, None, "glm", "probit", 100))
        finally:
            self.H, self._posterior_scale = final, None

    # ------------------------------------------------------------------ posterior

    @property
    def posterior_precision(self) -> Tensor:
        r""":math:`A = G / (\sigma^2 T) + V^T \Delta V` (K, K), float64, differentiable in the
        prior precision and the noise."""
        self._check_H_init()
        return self._H_factor.double() * self.H + self.basis.project_precision(self.prior_precision)

    @property
    def posterior_scale(self) -> Tensor:
        """S (K, K) with S S^T the posterior covariance, float64."""
        if self._posterior_scale is None:
            self._posterior_scale = posterior.posterior_scale(self.posterior_precision.detach())
        return self._posterior_scale

    @property
    def posterior_covariance(self) -> Tensor:
        r"""Covariance :math:`A^{-1}` (K, K) of the coordinates, float64."""
        return self.posterior_scale @ self.posterior_scale.T

    @property
    def log_det_prior_precision(self) -> Tensor:
        r"""Log determinant of :math:`V^T \Delta V`, the prior precision of the K coordinates."""
        return posterior.log_det(self.basis.project_precision(self.prior_precision))

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """Log determinant of A."""
        return posterior.log_det(self.posterior_precision)

    def log_prob(self, value: Tensor, normalized: bool = True) -> NoReturn:
        """Refuse: the posterior has no density over all weights.

        Raises
        ------
        NotImplementedError
        """
        raise NotImplementedError(_NO_DENSITY)

    def square_norm(self, value: Tensor) -> NoReturn:
        """Refuse: the posterior has no precision over all weights.

        Raises
        ------
        NotImplementedError
        """
        raise NotImplementedError(_NO_DENSITY)

    # ------------------------------------------------------------------ prediction

    def features(self, x: Input) -> tuple[Tensor, Tensor]:
        r"""Compute :math:`\phi(x) = J(x) V` and f(x).

        Returns
        -------
        phi, f : Tensor (B, C, K), Tensor (B, C)

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            If inputs or features are not finite.

        Notes
        -----
        Cost: at least 1 + 2K forward passes a row.
        """
        self._check_H_init()
        if isinstance(x, (Tensor, dict)) and not is_finite(x):
            raise ValueError("The inputs hold NaN or infinite values; they must be finite.")
        phi, f = self.backend.jacobians(x, enable_backprop=self.enable_backprop)
        _check_features(phi, f, "the inputs given")
        return phi, f

    def __call__(
        self,
        x: Input,
        pred_type: str = "glm",
        joint: bool = False,
        link_approx: str = "probit",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
        **model_kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict; see :meth:`laplace.ParametricLaplace.__call__`, from which it differs in this.

        - ``pred_type="gp"`` means "glm".
        - ``link_approx="mc"`` draws quasi-random noise from the estimator's seed, or
          from ``generator``, one vector for all inputs: the same call gives the same
          result.
        - No link forms a (B, C, C) tensor.

        Returns
        -------
        Tensor (B, C), or pair of Tensor
            Class probabilities; or mean (B, C) and covariance (B, C, C), its diagonal
            (B, C) with ``diagonal_output``, or (BC,) and (BC, BC) with ``joint``. The
            observation noise is not included.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            On an unknown ``pred_type`` or ``link_approx``, or inputs that are not finite.
        """
        pred_type = validation.check_prediction(pred_type, link_approx, n_samples, generator, self._device)
        self._check_H_init()
        likelihood = self.likelihood
        if likelihood == "reward_modeling":
            likelihood = "classification" if fitting else "regression"
        if pred_type == "glm":
            return self._predict(
                *self.features(x), likelihood, joint, link_approx, n_samples, diagonal_output, generator
            )
        samples = self._nn_functional_samples(x, n_samples, generator, **model_kwargs)
        if likelihood == "regression":
            return samples.mean(0), samples.var(0)
        return samples.softmax(-1).mean(0)

    def _predict(
        self,
        phi: Tensor,
        f: Tensor,
        likelihood: str,
        joint: bool,
        link_approx: str,
        n_samples: int,
        diagonal_output: bool,
        generator: torch.Generator | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        psi = posterior.whiten(phi, self.posterior_scale)
        if likelihood == "regression":
            return _moments(f, psi, joint, diagonal_output)
        if link_approx == "probit":
            return links.probit(f, psi)
        if link_approx == "mc":
            dimension = f.shape[-1] if diagonal_output else psi.shape[-1]
            noise = links.quasi_normal(n_samples, dimension, _seed(generator, self.seed))
            return links.monte_carlo(f, psi, noise, diagonal_output)
        return links.laplace_bridge(f, psi, normalize=link_approx == "bridge_norm")

    def predictive(
        self, x: Input, pred_type: str = "glm", link_approx: str = "probit", n_samples: int = 100
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict; the host's shorthand for a call."""
        return self(x, pred_type=pred_type, link_approx=link_approx, n_samples=n_samples)

    def _glm_predictive_distribution(
        self, X: Input, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        phi, f = self.features(X)
        return _moments(f, posterior.whiten(phi, self.posterior_scale), joint, diagonal_output)

    def _check_jacobians(self, Js: Tensor) -> None:
        validation.check_features(Js, self.basis.rank, self._device)

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Return the covariance (B, C, C) of each input's outputs.

        Parameters
        ----------
        Js : Tensor (B, C, K)
            What ``backend.jacobians`` returns: the features.
        """
        self._check_jacobians(Js)
        return posterior.covariance(posterior.whiten(Js, self.posterior_scale))

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Return the joint covariance (BC, BC) of all inputs' outputs.

        Parameters
        ----------
        Js : Tensor (B, C, K)
            What ``backend.jacobians`` returns: the features.
        """
        self._check_jacobians(Js)
        return posterior.joint_covariance(posterior.whiten(Js, self.posterior_scale))

    # ------------------------------------------------------------------ samples

    def _noise(self, *shape: int, generator: torch.Generator | None) -> Tensor:
        validation.check_size("n_samples", shape[0], optional=False)
        device = self._device if generator is None else generator.device
        noise = torch.randn(*shape, generator=generator, device=device, dtype=self._dtype)
        return noise.to(self._device)

    def _coordinates(self, n_samples: int, generator: torch.Generator | None) -> Tensor:
        noise = self._noise(n_samples, self.basis.rank, generator=generator)
        return noise @ self.posterior_scale.to(noise.dtype).T

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw weights :math:`\theta^* + V z` (S, P), in the order of ``parameters()``."""
        offsets = self.basis.combine(self._coordinates(n_samples, generator))
        return self.mean + torch.cat([v.flatten(1) for v in offsets.values()], 1)

    def functional_samples(
        self,
        x: Input,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw functions, evaluated at the inputs: (S, B, C).

        Each draw uses one noise vector in K dimensions for all inputs, so that a
        function is smooth, and two calls with equal generators agree.

        Parameters
        ----------
        diagonal_output : bool
            Draw outputs and inputs independently instead (glm).

        Raises
        ------
        AttributeError, ValueError
            As for a call.
        """
        pred_type = validation.check_prediction(pred_type, "mc", n_samples, generator, None)
        self._check_H_init()
        if pred_type == "nn":
            return self._nn_functional_samples(x, n_samples, generator)
        phi, f = self.features(x)
        psi = posterior.whiten(phi, self.posterior_scale)
        if diagonal_output:
            noise = self._noise(n_samples, *f.shape, generator=generator)
            return posterior.independent_samples(f, psi, noise)
        return posterior.functional_samples(
            f, psi, self._noise(n_samples, psi.shape[-1], generator=generator)
        )

    def predictive_samples(
        self,
        x: Input,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw :meth:`functional_samples`, through the softmax for classification: (S, B, C)."""
        samples = self.functional_samples(x, pred_type, n_samples, diagonal_output, generator)
        return samples.softmax(-1) if self.likelihood == "classification" else samples

    def _nn_functional_samples(
        self,
        X: Input,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        offsets = self.basis.combine(self._coordinates(n_samples, generator))
        return self.backend.forward_at(  # type: ignore[attr-defined]
            offsets, X, enable_backprop=self.enable_backprop, **model_kwargs
        )

    # ------------------------------------------------------------------ tuning

    def optimize_prior_precision(
        self,
        pred_type: str = "glm",
        method: str = "marglik",
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: str = "scalar",
        val_loader: Iterable[Any] | None = None,
        loss: tuning.Loss | None = None,
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
        - If tuning fails, the estimator is as it was.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            On an unknown option, without ``val_loader`` where it is needed, or if no
            candidate has a finite loss.

        Notes
        -----
        Cost: 1 + 2K forward passes a validation input, whatever the grid. Memory:
        N_val x C x K numbers.
        """
        validation.check_choice("method", method, ("marglik", "gridsearch"))
        validation.check_choice("prior_structure", prior_structure, ("scalar", "layerwise", "diag"))
        validation.check_size("grid_size", grid_size, optional=False)
        pred_type = validation.check_prediction(
            pred_type, "mc" if method == "marglik" else link_approx, n_samples, None, None
        )
        self._check_H_init()
        before = (self._prior_precision, self._temperature, self._temperature_fixed)
        try:
            if method == "marglik":
                self._maximize_evidence(
                    n_steps, lr, init_prior_prec, prior_structure, val_loader, progress_bar
                )
            else:
                grid = torch.logspace(
                    log_prior_prec_min, log_prior_prec_max, grid_size, base=log_prior_prec_base
                )
                self._search_grid(
                    grid.tolist(), val_loader, loss, pred_type, link_approx, n_samples, progress_bar
                )
        except BaseException:
            self._prior_precision, self._temperature, self._temperature_fixed = before
            self._posterior_scale = None
            raise
        if verbose:
            print(f"Optimized prior precision is {self.prior_precision}, temperature {self.temperature:.4g}.")

    def _maximize_evidence(
        self,
        n_steps: int,
        lr: float,
        init: float | Tensor,
        structure: str,
        val_loader: Any,
        progress_bar: bool,
    ) -> None:
        with warnings.catch_warnings():
            # The host reminds of the link here, which evidence does not use.
            warnings.filterwarnings("ignore", "By default `link_approx`")
            super().optimize_prior_precision(
                "glm",
                "marglik",
                n_steps,
                lr,
                init,
                structure,
                val_loader=val_loader,
                progress_bar=progress_bar,
            )
        if not self._temperature_fixed:
            warnings.warn(
                "The evidence tunes the prior only: the temperature stays 1, where ELLA's predictions are close "
                "to MAP's whatever the prior. Use method='gridsearch' with a val_loader to tune both, "
                "or pass temperature=1.0 if that is what you want.",
                stacklevel=3,
            )

    def _search_grid(
        self,
        priors: list[float],
        val_loader: Any,
        loss: Any,
        pred_type: str,
        link_approx: str,
        n_samples: int,
        progress_bar: bool,
    ) -> None:
        if val_loader is None:
            raise ValueError("method='gridsearch' scores on validation data: pass val_loader=...")
        if loss is not None and not callable(loss):
            raise ValueError(f"loss must be a torchmetrics.Metric or a callable; got {type(loss).__name__}.")
        progress = _progress(progress_bar)
        batches = self._validation_batches(val_loader, progress, pred_type)
        fixed = self._temperature if self._temperature_fixed else None
        before = tuning.Setting(self._prior_precision, self._temperature)  # type: ignore[arg-type]

        def evaluate(setting: tuning.Setting) -> float:
            self._apply(setting)
            return self._score(batches, loss, pred_type, link_approx, n_samples)

        best = tuning.grid_search(evaluate, priors, fixed, progress)
        if best is None:
            warnings.warn(
                "The loss is the same for every setting on the grid, so the setting is left as it was. "
                "A loss of the mean alone does not depend on prior and temperature.",
                stacklevel=3,
            )
        self._apply(before if best is None else best)

    def _apply(self, setting: tuning.Setting) -> None:
        self.prior_precision = setting.prior_precision
        self._temperature = setting.temperature

    def _validation_batches(
        self, val_loader: Any, progress: Any, pred_type: str = "glm"
    ) -> list[tuple[Any, Tensor]]:
        """Return (features, targets) of each batch; (input, targets) for the "nn" predictive."""
        likelihood, result = LIKELIHOODS[self.likelihood], []
        for name, x, y in progress(named_batches(val_loader, self.dict_key_y), "Validation data"):
            if pred_type == "nn":
                f = self.backend.forward(x)  # type: ignore[attr-defined]
                kept: Any = x
            else:
                phi, f = self.features(x)
                kept = (phi.detach(), f.detach())
            try:
                result.append((kept, likelihood.targets(y.to(f.device), f)))
            except ValueError as error:
                raise ValueError(f"In validation {name}: {error}") from None
        if not result:
            raise ValueError("The validation loader yielded no data; at least one input is needed.")
        return result

    def _score(
        self, batches: list[tuple[Any, Tensor]], loss: Any, pred_type: str, link: str, n_samples: int
    ) -> float:
        likelihood = "regression" if self.likelihood == "regression" else "classification"
        with torch.no_grad():
            if pred_type == "nn":
                predictions = [self(x, "nn", False, link, n_samples, fitting=True) for x, _ in batches]
            else:
                predictions = [
                    self._predict(*kept, likelihood, False, link, n_samples, False, None)
                    for kept, _ in batches
                ]
            targets = [y for _, y in batches]
            return tuning.score(predictions, targets, loss, self.sigma_noise.detach().square())

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the fitted state: tensors and plain types, loadable with ``weights_only=True``.

        Holds a hash of the model, not its weights.

        Raises
        ------
        AttributeError
            Before a fit.
        """
        self._check_H_init()
        return {
            "format": checkpoint.FORMAT,
            "cls_name": type(self).__name__,
            "likelihood": str(getattr(self.likelihood, "value", self.likelihood)),
            "fingerprint": checkpoint.fingerprint(self.model),
            "basis": checkpoint.pack_basis(self.basis),
            "H": self.H,
            "loss": self.loss,
            "n_data": self.n_data,
            "n_outputs": self.n_outputs,
            "prior_mean": self.prior_mean.detach(),
            "prior_precision": self.prior_precision.detach(),
            "sigma_noise": self.sigma_noise.detach(),
            "temperature": self.temperature,
            "temperature_fixed": self._temperature_fixed,
            "enable_backprop": self.enable_backprop,
            "subsample_size": self.subsample_size,
            "n_eigenvalues": self.n_eigenvalues,
            "curvature_size": self.curvature_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; tensors move to the model's device.

        Raises
        ------
        ValueError
            If the state is not one of this class, or belongs to another model,
            likelihood or choice of parameters. The estimator is then as it was.
        """
        validation.check_state(state_dict, type(self).__name__, str(getattr(self.likelihood, "value", self.likelihood)))
        if state_dict["fingerprint"] != checkpoint.fingerprint(self.model):
            raise ValueError(
                "The checkpoint was made with another model: the hash of parameters and buffers differs. "
                "Load the model's own weights first, then the checkpoint."
            )
        basis = checkpoint.unpack_basis(state_dict["basis"], self.model)
        self.prior_mean = state_dict["prior_mean"]
        self.prior_precision = state_dict["prior_precision"]
        self.sigma_noise = state_dict["sigma_noise"]
        self.temperature = state_dict["temperature"]
        self._temperature_fixed = state_dict["temperature_fixed"]
        self.H = state_dict["H"].to(self._device, torch.float64)
        self.loss = state_dict["loss"].to(self._device)
        for name in ("n_data", "enable_backprop", "subsample_size", "n_eigenvalues", "curvature_size", "seed"):
            setattr(self, name, state_dict[name])
        self.backend.basis = basis  # type: ignore[attr-defined]
        self.mean = parameters_to_vector(self.params).detach().to(self._dtype)
        self._set_n_outputs(state_dict["n_outputs"])
        self._posterior_scale = None

    def __repr__(self) -> str:
        likelihood = str(getattr(self.likelihood, "value", self.likelihood))
        if self.H is None:
            fitted = f"M={self.subsample_size}, K={self.n_eigenvalues}, P={self.n_params}, not fitted"
        else:
            fitted = (
                f"M={self.basis.n_landmarks}, K={self.basis.rank}, retained trace={self.basis.retained:.3f}, "
                f"P={self.n_params}, n_data={self.n_data}"
            )
        prior = (
            f"{float(self.prior_precision):.4g}"
            if self.prior_precision.numel() == 1
            else f"{self.prior_precision.numel()} values"
        )
        fixed = "" if self._temperature_fixed else " (free)"
        return (
            f"ELLALaplace({likelihood!r}, {fitted}, prior_precision={prior}, "
            f"temperature={self.temperature:.4g}{fixed})"
        )


_NO_DENSITY = (
    "ELLA's posterior lives on the K directions around the weights and has no density over all P weights. "
    "Use sample(), functional_samples() or log_marginal_likelihood()."
)


def _progress(enabled: bool) -> Callable[[Iterable[Any], str], Iterable[Any]]:
    return lambda iterable, description: tqdm(iterable, desc=description, disable=not enabled)


def _check_features(phi: Tensor, f: Tensor, name: str) -> None:
    if not (phi.isfinite().all() and f.isfinite().all()):
        raise ValueError(
            f"The features or outputs for {name} hold NaN or infinite values; they must be finite. "
            "A square root or a norm at zero has no finite derivative: check the model there."
        )


def _moments(f: Tensor, psi: Tensor, joint: bool, diagonal_output: bool) -> tuple[Tensor, Tensor]:
    if joint:
        return f.flatten(), posterior.joint_covariance(psi)
    return f, posterior.variance(psi) if diagonal_output else posterior.covariance(psi)


def _seed(generator: torch.Generator | None, default: int) -> int:
    if generator is None:
        return default
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))
