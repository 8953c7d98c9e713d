r"""What every likelihood has: targets, loss, curvature in f, predictive density, links and parameters.

The curvature enters as a root: :math:`\Phi^T \Lambda \Phi = W^T W` with W returned by ``curvature_root``, so that no
C x C matrix is formed and the result is positive semi-definite by construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .gaussian import Outputs

# Class probabilities (B, C); or mean (B, C) and covariance (B, C, C) or variance (B, C).
Prediction: TypeAlias = Tensor | tuple[Tensor, Tensor]


class Likelihood:
    r"""One observation model, of which subclasses change what is different in theirs.

    Attributes
    ----------
    name : str
        The name that users pass.
    host_name : str
        The likelihood of laplace-torch's that comes closest, whose constructor knows no others.
    has_probabilities : bool
        Whether predictions are probabilities (B, C); else they are means and covariances of outputs.
    has_classes : bool
        Whether each input is of one of C classes: probabilities sum to one, and landmarks can be balanced.
    has_logits : bool
        Whether ``logit_scale`` applies.
    has_noise : bool
        Whether ``sigma_noise`` applies.
    tuned : tuple of str
        What is tuned beside the temperature unless the user says otherwise.
    scores_marginals : bool
        Whether ``nll`` needs the variances of outputs only, where predictions are no probabilities.
    has_intervals : bool
        Whether intervals of targets are taken to be those of a Gaussian with their moments.
    has_positive_loss : bool
        Whether no target adds a negative number to the loss, as none does that is one of countably many.
    """

    name = ""
    host_name = "classification"
    has_probabilities = True
    has_classes = False
    has_logits = False
    has_noise = False
    tuned: tuple[str, ...] = ()
    scores_marginals = True
    has_intervals = False
    has_positive_loss = True

    @property
    def of_calls(self) -> Likelihood:
        """The likelihood that predictions of users' calls are made with."""
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What tells it apart from others of its name, in plain types."""
        return {}

    def with_noise(self, sigma_noise: Tensor) -> Likelihood:
        """Return the likelihood for an observation noise (), (1,) or (C,), as far as its scale does not say it all."""
        return self

    def noise(self, scale: Tensor) -> Tensor:
        """Return the observation noise as users know it, () or (C,), of the scale () that is kept in the setting."""
        return scale

    def targets(self, y: Tensor, f: Tensor) -> Tensor:
        """Return y in the shape that the loss wants; raise ValueError on targets that do not fit the outputs f (B, C)."""
        raise NotImplementedError

    def ignored(self, y: Tensor) -> Tensor | None:
        """Return which of the targets of a batch (B, ...) are left out, (B, ...); None if none can be."""
        return None

    def losses(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the negative log likelihoods (B,), up to constants and the noise, float64."""
        raise NotImplementedError

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the negative log likelihood summed over the batch."""
        return self.losses(f, y).sum()

    def curvature_root(self, phi: Tensor, f: Tensor) -> Tensor:
        r"""Return W (R, K) with :math:`W^T W = \sum_b \Phi_b^T \Lambda_b \Phi_b`."""
        raise NotImplementedError

    def sampled_gradients(self, f: Tensor, u: Tensor) -> Tensor:
        r"""Return gradients (B, n, C) of the loss in f at n targets drawn from the likelihood itself.

        Parameters
        ----------
        f : Tensor (B, C)
        u : Tensor (B, n, C)
            Uniform in (0, 1). The mean of the outer products of the gradients is :math:`\Lambda`.
        """
        raise NotImplementedError

    def nll(self, prediction: Prediction, y: Tensor, noise_variance: Any) -> Tensor:
        """Return the negative log predictive density (B,), float64.

        Parameters
        ----------
        prediction : Tensor (B, C), or pair of Tensor
            Probabilities; or the mean (B, C) of the *outputs*, and their variance (B, C), or covariance (B, C, C) unless
            ``scores_marginals``.
        y : Tensor
            Targets, as ``targets`` returns them.
        noise_variance : float or Tensor ()
            The square of the observation noise.
        """
        raise NotImplementedError

    def inverse_link(self, f: Tensor) -> Tensor:
        """Return the predictions of outputs (..., C) that are certain: probabilities, or the outputs themselves."""
        return f

    def entropy(self, p: Tensor) -> Tensor:
        """Return the entropy (B,) of probabilities (B, C)."""
        return -torch.special.xlogy(p, p).sum(-1)

    def log_probabilities(self, f: Tensor) -> Tensor:
        """Return the log probabilities (..., Y) of the Y labels that each target may have, of outputs (..., C).

        Raises
        ------
        NotImplementedError
            If targets have no finite set of labels.
        """
        raise NotImplementedError(
            f"likelihood={self.name!r} names no finite set of labels, whose entropy could be taken. Define "
            "log_probabilities(), or uncertainty(), in its class."
        )

    def uncertainty(
        self, outputs: Outputs, samples: Iterable[Tensor], noise_variance: Any
    ) -> tuple[Tensor, Tensor]:
        r"""Split the uncertainty of each target: what remains if the outputs are known, and what their knowledge would take away.

        Here the expected entropy and the mutual information of target and outputs, in nats, whose sum is the entropy of the
        mean prediction; where targets are numbers, variances.

        Parameters
        ----------
        outputs : Outputs
            The Gaussian over outputs (B, C).
        samples : iterable of Tensor (s, B, C)
            Samples of it, some at a time; not drawn unless they are asked for.
        noise_variance : float or Tensor
            :math:`\sigma^2`, or 0.

        Returns
        -------
        aleatoric, epistemic : Tensor (B, ...)
            None is negative; one number for each target.
        """
        n, known, mean = 0, outputs.mean.new_zeros(()), None
        for f in samples:
            # In logarithms, since the derivative of p log p does not exist where p is rounded to 0.
            log_p = self.log_probabilities(f.double())
            n, known, block = n + len(f), known + entropy_of(log_p).sum(0), log_p.logsumexp(0)
            mean = block if mean is None else torch.logaddexp(mean, block)
        assert mean is not None
        known = known / n
        return known, (entropy_of(mean - math.log(n)) - known).clamp_min(0)

    def log_normaliser(self, sigma_noise: Tensor) -> Tensor | float:
        """Return the log of what the density of one output is divided by, beside what depends on the loss."""
        return 0.0

    def certain(self, f: Tensor) -> Prediction:
        """Return what ``nll`` takes for outputs (B, C) without variance."""
        return self.inverse_link(f) if self.has_probabilities else (f, torch.zeros_like(f))

    def conditional_moments(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance (..., D) of the targets of certain outputs (..., C); without ``sigma_noise``."""
        return f, torch.zeros_like(f)

    def target_moments(self, mean: Tensor, spread: Tensor, n_outputs: int) -> tuple[Tensor, Tensor]:
        """Return the moments of targets, given those of Gaussian outputs; without ``sigma_noise``.

        Parameters
        ----------
        mean : Tensor (..., n C)
            The C outputs of one input, or of n inputs together.
        spread : Tensor (..., n C) or (..., n C, n C)
            Variance or covariance.
        n_outputs : int
            C.

        Returns
        -------
        mean, spread : Tensor (..., n D), and as ``spread``
        """
        return mean, spread


def entropy_of(log_p: Tensor) -> Tensor:
    """Return the entropies (...), in nats, of distributions with log probabilities (..., Y)."""
    return -(log_p.exp() * log_p).sum(-1)
