r"""Predictions and moments, given features and the posterior of their K coordinates."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..data import validation
from ..data.batches import Input
from . import gaussian as posterior
from . import links
from .consistency import of_one_moment
from .gaussian import Linearised, Outputs, positive_part
from .likelihoods import LIKELIHOODS, Prediction
from .sampling import Sampling

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


class Predictive(Sampling):
    """Calls of an estimator, and the moments of its outputs; a mixin."""

    @of_one_moment
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
        for name, flag in (("joint", joint), ("diagonal_output", diagonal_output), ("fitting", fitting)):
            validation.check_flag(name, flag)
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
        return int(torch.randint(2**31, (), generator=generator, dtype=torch.int64, device=generator.device))

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

    @of_one_moment
    def functional_variance(self, Js: Tensor) -> Tensor:
        """Return the covariance (B, C, C) of each input's outputs, without the residual.

        Parameters
        ----------
        Js : Tensor (B, C, K)
            What ``backend.jacobians`` returns: the features.
        """
        self._check_jacobians(Js)
        return self._span(Js).covariance().to(Js.dtype)

    @of_one_moment
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
