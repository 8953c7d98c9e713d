r"""Predictions, samples and moments, given features and the posterior of their K coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import links, posterior, validation
from .autodiff import Weights, exclusively, flat
from .batches import Input
from .hashing import TANGENT, derived_seed
from .likelihoods import LIKELIHOODS, Prediction
from .posterior import Linearised, Outputs, positive_part
from .residual import random_tangents

_NO_DENSITY = (
    "ELLA's posterior lives on the K directions around the weights and has no density over all P weights. "
    "Use sample(), functional_samples() or log_marginal_likelihood()."
)


@posterior.without_autocast
def predict(
    outputs: Outputs,
    likelihood: str,
    *,
    joint: bool = False,
    link_approx: str = "probit",
    n_samples: int = 100,
    diagonal_output: bool = False,
    seed: int = 0,
) -> Prediction:
    """Turn a Gaussian over outputs into a prediction.

    Returns
    -------
    Tensor (B, C), or pair of Tensor
        Probabilities; or moments, if the likelihood is "regression".
    """
    inverse_link = LIKELIHOODS[likelihood].inverse_link
    if inverse_link is None:
        return moments(outputs, joint, diagonal_output)
    if link_approx == "probit":
        return links.probit(outputs, inverse_link)
    if link_approx == "mc":
        dimension = outputs.mean.shape[-1] if diagonal_output else outputs.noise_dimension
        noise = links.quasi_normal(n_samples, dimension, seed)
        return links.monte_carlo(outputs, inverse_link, noise, diagonal_output)
    return links.laplace_bridge(outputs, normalize=link_approx == "bridge_norm")


def moments(outputs: Outputs, joint: bool = False, diagonal_output: bool = False) -> tuple[Tensor, Tensor]:
    """Return mean and covariance: (B, C) and (B, C, C) or (B, C); (BC,) and (BC, BC) if joint."""
    if joint:
        return outputs.mean.flatten(), outputs.joint_covariance()
    return outputs.mean, outputs.variance if diagonal_output else outputs.covariance()


class Predictive:
    """What an estimator offers once it has features, a basis and a posterior.

    A mixin: :class:`laplace_ella.ELLALaplace` supplies what is declared here.
    """

    likelihood: str
    backend: Any
    mean: Tensor
    seed: int
    enable_backprop: bool
    logit_scale: Any  # float
    residual: str
    residual_samples: int
    residual_variance: Any  # float
    basis: Any  # NystromBasis
    posterior_scale: Any  # Tensor (K, K)
    _tangents: tuple[tuple[int, int], Weights, Tensor] | None
    _device: Any
    _dtype: Any
    _check_H_init: Callable[[], None]

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
        Cost: at least 1 + 2K forward passes a row.
        """
        self._check_H_init()
        with self.basis.ranks.together("the inputs of a prediction"):
            validation.check_finite_input(x)
        with self.basis.ranks.together("the features of a prediction"):
            phi, f = self.backend.jacobians(x, enable_backprop=self.enable_backprop)
            validation.check_finite_features(phi, f, "the inputs given")
        return phi, f

    def _attend(self, residual: str) -> None:
        """Take part in the predictions of ranks that share the directions, without inputs of one's own."""
        if residual == "isotropic":
            self._residual_tangents()
        with self.basis.ranks.together("the inputs of a prediction"):
            pass
        with self.basis.ranks.together("the features of a prediction"):
            self.backend.answer_others(self.basis)

    def _linearised(self, x: Input, residual: str | None = None) -> Linearised:
        """Compute what a prediction needs: features, and what the residual is made of."""
        residual = self.residual if residual is None else residual
        validation.check_residual(residual, None, self.enable_backprop)
        # Before the features: ranks that share the directions work out what all need first.
        tangents = self._residual_tangents()[0] if residual == "isotropic" else None
        phi, f = self.features(x)
        if tangents is not None:
            pushed, _ = self.backend.push(x, tangents, self.enable_backprop)
            validation.check_finite_features(pushed, f, "the inputs given")
            return Linearised(f, phi, pushed=pushed)
        if residual == "exact":
            empty = f.new_zeros(0, f.shape[-1], f.shape[-1], dtype=torch.float64)
            return Linearised(f, phi, gram=self.backend.output_grams(x) if len(f) else empty)
        return Linearised(f, phi)

    @exclusively
    @torch.inference_mode(False)  # they are kept, and may meet a graph later
    def _residual_tangents(self) -> tuple[Weights, Tensor]:
        """Return S tangents (S, *shape), and their overlap (K, S) with the directions; the same at every call."""
        made_for = (self.seed, self.residual_samples)
        if self._tangents is None or self._tangents[0] != made_for:
            seed = derived_seed(self.seed, TANGENT)
            tangents = random_tangents(self.backend.engine.function.weights(), self.residual_samples, seed)
            self._tangents = made_for, tangents, self.basis.overlap(tangents)
        return self._tangents[1:]

    def _outputs(self, linearised: Linearised) -> Outputs:
        """Return the Gaussian that the current posterior makes of the outputs."""
        return linearised.outputs(
            self.posterior_scale,
            self.logit_scale,
            self.residual_variance,
            None if linearised.pushed is None else self._residual_tangents()[1],
        )

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
    ) -> Prediction:
        """Predict; see :meth:`laplace.ParametricLaplace.__call__`, from which it differs in this.

        - ``pred_type="gp"`` means "glm".
        - ``link_approx="mc"`` draws quasi-random noise from the estimator's seed, or
          from ``generator``, one vector for all inputs: the same call gives the same
          result.
        - No link forms a (B, C, C) tensor.

        Returns
        -------
        Tensor (B, C), or pair of Tensor
            Probabilities; or mean (B, C) and covariance (B, C, C), its diagonal
            (B, C) with ``diagonal_output``, or (BC,) and (BC, BC) with ``joint``. The
            observation noise is not included. With outputs (B, ..., C), B counts positions.

        Raises
        ------
        AttributeError
            Before a fit.
        ValueError
            On an unknown ``pred_type`` or ``link_approx``, or inputs that are not finite.
        """
        pred_type = validation.check_prediction(pred_type, link_approx, n_samples, generator, self._device)
        validation.check_link(self.likelihood, link_approx)
        if model_kwargs and pred_type == "glm":
            raise ValueError(
                f"Unknown arguments {sorted(model_kwargs)}; those of a call are pred_type, joint, link_approx, n_samples, "
                "diagonal_output and generator. Arguments for the model itself go with pred_type='nn' only."
            )
        self._check_H_init()
        likelihood = self.likelihood
        if likelihood == "reward_modeling":
            likelihood = "classification" if fitting else "regression"
        if pred_type == "nn":
            validation.check_variance_samples(likelihood, n_samples)
            offsets = self._weight_offsets(n_samples, generator)
            return self._nn_prediction(offsets, x, likelihood, **model_kwargs)
        if likelihood == "regression":
            return self._glm_predictive_distribution(x, joint, diagonal_output)
        linearised = self._linearised(x)
        probabilities = predict(
            self._outputs(linearised),
            likelihood,
            link_approx=link_approx,
            n_samples=n_samples,
            diagonal_output=diagonal_output,
            seed=self._link_seed(generator),
        )
        assert isinstance(probabilities, Tensor)
        return probabilities.to(linearised.f.dtype)

    def _link_seed(self, generator: torch.Generator | None) -> int:
        if generator is None:
            return self.seed
        return int(torch.randint(2**31, (), generator=generator, device=generator.device))

    def predictive(
        self, x: Input, pred_type: str = "glm", link_approx: str = "probit", n_samples: int = 100
    ) -> Prediction:
        """Predict; the host's shorthand for a call."""
        return self(x, pred_type=pred_type, link_approx=link_approx, n_samples=n_samples)

    def _glm_predictive_distribution(
        self, X: Input, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        linearised = self._linearised(X, "none" if joint and self.residual == "exact" else None)
        mean, spread = moments(self._outputs(linearised), joint, diagonal_output)
        if joint and self.residual == "exact":
            flat_phi = linearised.phi.flatten(0, 1).double()
            gram = self.backend.joint_gram(X) if len(flat_phi) else flat_phi.new_zeros(0, 0)
            spread = spread + self.residual_variance * positive_part(gram - flat_phi @ flat_phi.T)
        return mean.to(linearised.f.dtype), spread.to(linearised.f.dtype)

    def _check_jacobians(self, Js: Tensor) -> None:
        validation.check_features(Js, self.basis.rank, self._device)

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Return the covariance (B, C, C) of each input's outputs, without the residual.

        Parameters
        ----------
        Js : Tensor (B, C, K)
            What ``backend.jacobians`` returns: the features.
        """
        self._check_jacobians(Js)
        return self._span(Js).covariance().to(Js.dtype)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Return the joint covariance (BC, BC) of all inputs' outputs, without the residual.

        Parameters
        ----------
        Js : Tensor (B, C, K)
            What ``backend.jacobians`` returns: the features.
        """
        self._check_jacobians(Js)
        return self._span(Js).joint_covariance().to(Js.dtype)

    def _span(self, phi: Tensor) -> Outputs:
        return Linearised(phi[..., 0], phi).outputs(self.posterior_scale)

    def _noise(self, *shape: int, generator: torch.Generator | None) -> Tensor:
        validation.check_size("n_samples", shape[0], optional=False)
        device = self._device if generator is None else generator.device
        noise = torch.randn(*shape, generator=generator, device=device, dtype=self._dtype)
        # Ranks that share the directions have to draw the same weights.
        return self.basis.ranks.of_first(noise.to(self._device))

    def _coordinates(self, n_samples: int, generator: torch.Generator | None) -> Tensor:
        noise = self._noise(n_samples, self.basis.rank, generator=generator)
        return noise @ self.posterior_scale.to(noise.dtype).T

    def _weight_offsets(self, n_samples: int, generator: torch.Generator | None) -> Weights:
        r"""Draw offsets :math:`V z` (S, *shape) of the weights; with the exact residual, outside the span too."""
        offsets = self.basis.combine(self._coordinates(n_samples, generator))
        if self.residual != "exact":
            return offsets
        outside = self._outside_offsets(n_samples, generator)
        return {k: v + outside[k] for k, v in offsets.items()}

    def _outside_offsets(self, n_samples: int, generator: torch.Generator | None) -> Weights:
        r"""Draw :math:`\sqrt{\rho / \delta} (I - V V^T) w` (S, *shape)."""
        noise = {
            k: self._noise(n_samples, *v.shape[1:], generator=generator)
            for k, v in self.basis.directions.items()
        }
        inside = self.basis.combine(self.basis.overlap(noise).T)
        return {k: self.residual_variance**0.5 * (noise[k] - v).to(v.dtype) for k, v in inside.items()}

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw weights :math:`\theta^* + V z` (S, P), in the order of ``parameters()``.

        With ``residual="exact"`` they leave the span, as those of exact linearised
        Laplace do; the isotropic residual is one of functions and leaves weights alone.
        """
        offsets = self._weight_offsets(n_samples, generator)
        return self.mean + torch.cat([flat(v) for v in offsets.values()], 1)

    def functional_samples(
        self,
        x: Input,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw functions, evaluated at the inputs: (S, B, C).

        Each draw uses one noise vector for all inputs, in the K dimensions of the span and in
        those of the residual, so that a function is smooth, and two calls with equal
        generators agree. With the exact residual that noise has P dimensions.

        Parameters
        ----------
        x : Tensor or mapping
            B inputs.
        pred_type : {"glm", "nn"}
            Of the linearised network, or of networks with sampled weights.
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
        pred_type = validation.check_prediction(pred_type, "mc", n_samples, generator, None)
        self._check_H_init()
        if pred_type == "nn":
            return self._nn_functional_samples(x, n_samples, generator)
        in_weights = self.residual == "exact" and not diagonal_output
        linearised = self._linearised(x, "none" if in_weights else None)
        outputs, dtype = self._outputs(linearised), linearised.f.dtype
        if diagonal_output:
            return outputs.independent_samples(
                self._noise(n_samples, *outputs.mean.shape, generator=generator)
            ).to(dtype)
        noise = self._noise(n_samples, outputs.psi.shape[-1], generator=generator)
        samples = posterior.functional_samples(outputs.mean, outputs.psi, noise)
        if outputs.isotropic is not None:
            shape = outputs.isotropic.shape[1], outputs.mean.shape[1]
            noise = self._noise(n_samples, *shape, generator=generator)
            samples = samples + torch.einsum("bd,sdc->sbc", outputs.isotropic, noise.to(outputs.isotropic))
        if in_weights:
            self._add_outside(samples, x, generator)
        return samples.to(dtype)

    def _add_outside(self, samples: Tensor, x: Input, generator: torch.Generator | None) -> None:
        r"""Add :math:`J (I - V V^T) w` to samples (S, B, C), as many weights at a time as fit."""
        engine = self.backend.engine
        n_weights = max(1, engine.budget() // (8 * engine.row_size()))
        for part in samples.split(self.basis.ranks.least(n_weights, "samples of weights")):
            pushed, _ = self.backend.push(x, self._outside_offsets(len(part), generator))
            part += pushed.movedim(-1, 0)

    def predictive_samples(
        self,
        x: Input,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw :meth:`functional_samples`, turned into probabilities where the likelihood has them: (S, B, C)."""
        samples = self.functional_samples(x, pred_type, n_samples, diagonal_output, generator)
        if self.likelihood == "reward_modeling":
            return samples
        inverse_link = LIKELIHOODS[self.likelihood].inverse_link
        return samples if inverse_link is None else inverse_link(samples)

    def _nn_functional_samples(
        self,
        X: Input,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        return self._outputs_at(self._weight_offsets(n_samples, generator), X, **model_kwargs)

    def _outputs_at(self, offsets: Weights, x: Input, **model_kwargs: Any) -> Tensor:
        """Return the outputs (S, B, C) at the weights plus each of S offsets."""
        validation.check_finite_input(x)
        samples = self.backend.forward_at(offsets, x, enable_backprop=self.enable_backprop, **model_kwargs)
        validation.check_finite_samples(samples)
        return samples

    def _nn_prediction(self, offsets: Weights, x: Input, likelihood: str, **model_kwargs: Any) -> Prediction:
        """Average what networks with sampled weights predict."""
        samples = self._outputs_at(offsets, x, **model_kwargs)
        inverse_link = LIKELIHOODS[likelihood].inverse_link
        if inverse_link is None:
            return samples.mean(0), samples.var(0)
        return inverse_link(samples).mean(0)

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
