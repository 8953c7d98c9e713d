r"""Predictions, samples and moments, given features and the posterior of their K coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import links, posterior, validation
from .autodiff import flat
from .batches import Input

_NO_DENSITY = (
    "ELLA's posterior lives on the K directions around the weights and has no density over all P weights. "
    "Use sample(), functional_samples() or log_marginal_likelihood()."
)


@posterior.without_autocast
def predict(
    f: Tensor,
    psi: Tensor,
    likelihood: str,
    *,
    joint: bool = False,
    link_approx: str = "probit",
    n_samples: int = 100,
    diagonal_output: bool = False,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Turn outputs f (B, C) and whitened features psi (B, C, K) into a prediction.

    Returns
    -------
    Tensor (B, C), or pair of Tensor
        Class probabilities; or moments, if the likelihood is "regression".
    """
    if likelihood == "regression":
        return moments(f, psi, joint, diagonal_output)
    if link_approx == "probit":
        probabilities = links.probit(f, psi)
    elif link_approx == "mc":
        dimension = f.shape[-1] if diagonal_output else psi.shape[-1]
        noise = links.quasi_normal(n_samples, dimension, seed)
        probabilities = links.monte_carlo(f, psi, noise, diagonal_output)
    else:
        probabilities = links.laplace_bridge(f, psi, normalize=link_approx == "bridge_norm")
    return probabilities.to(f.dtype)


def moments(
    f: Tensor, psi: Tensor, joint: bool = False, diagonal_output: bool = False
) -> tuple[Tensor, Tensor]:
    """Return mean and covariance: (B, C) and (B, C, C) or (B, C); (BC,) and (BC, BC) if joint."""
    if joint:
        return f.flatten(), posterior.joint_covariance(psi).to(f.dtype)
    spread = posterior.variance(psi) if diagonal_output else posterior.covariance(psi)
    return f, spread.to(f.dtype)


class Predictive:
    """What an estimator offers once it has features, a basis and a posterior.

    A mixin: :class:`laplace_ella.ELLALaplace` supplies what is declared here.
    """

    likelihood: str
    backend: Any
    mean: Tensor
    seed: int
    enable_backprop: bool
    basis: Any  # NystromBasis
    posterior_scale: Any  # Tensor (K, K)
    _device: Any
    _dtype: Any
    _check_H_init: Callable[[], None]

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
        validation.check_finite_input(x)
        phi, f = self.backend.jacobians(x, enable_backprop=self.enable_backprop)
        validation.check_finite_features(phi, f, "the inputs given")
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
            samples = self._nn_functional_samples(x, n_samples, generator, **model_kwargs)
            if likelihood == "regression":
                return samples.mean(0), samples.var(0)
            return samples.softmax(-1).mean(0)
        phi, f = self.features(x)
        return predict(
            f,
            posterior.whiten(phi, self.posterior_scale),
            likelihood,
            joint=joint,
            link_approx=link_approx,
            n_samples=n_samples,
            diagonal_output=diagonal_output,
            seed=self._link_seed(generator),
        )

    def _link_seed(self, generator: torch.Generator | None) -> int:
        if generator is None:
            return self.seed
        return int(torch.randint(2**31, (), generator=generator, device=generator.device))

    def predictive(
        self, x: Input, pred_type: str = "glm", link_approx: str = "probit", n_samples: int = 100
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict; the host's shorthand for a call."""
        return self(x, pred_type=pred_type, link_approx=link_approx, n_samples=n_samples)

    def _glm_predictive_distribution(
        self, X: Input, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        phi, f = self.features(X)
        return moments(f, posterior.whiten(phi, self.posterior_scale), joint, diagonal_output)

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
        return posterior.covariance(posterior.whiten(Js, self.posterior_scale)).to(Js.dtype)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Return the joint covariance (BC, BC) of all inputs' outputs.

        Parameters
        ----------
        Js : Tensor (B, C, K)
            What ``backend.jacobians`` returns: the features.
        """
        self._check_jacobians(Js)
        return posterior.joint_covariance(posterior.whiten(Js, self.posterior_scale)).to(Js.dtype)

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
            return posterior.independent_samples(f, psi, noise).to(f.dtype)
        noise = self._noise(n_samples, psi.shape[-1], generator=generator)
        return posterior.functional_samples(f, psi, noise).to(f.dtype)

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
        validation.check_finite_input(X)
        offsets = self.basis.combine(self._coordinates(n_samples, generator))
        samples = self.backend.forward_at(offsets, X, enable_backprop=self.enable_backprop, **model_kwargs)
        validation.check_finite_samples(samples)
        return samples

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
