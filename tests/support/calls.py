"""Everything that a fitted estimator predicts, as functions of estimator and inputs, repeatable to the bit."""

from __future__ import annotations

import torch
from helpers import as_tuple, train_loader


def generator(seed=3):
    return torch.Generator("cpu").manual_seed(seed)


NN = {"pred_type": "nn", "n_samples": 3}
PREDICTIONS = {
    "probit": lambda la, x: la(x),
    "mc": lambda la, x: la(x, link_approx="mc", n_samples=8),
    "mc, diagonal": lambda la, x: la(x, link_approx="mc", n_samples=8, diagonal_output=True),
    "bridge": lambda la, x: la(x, link_approx="bridge"),
    "bridge_norm": lambda la, x: la(x, link_approx="bridge_norm"),
    "joint": lambda la, x: la(x, joint=True),
    "predictive": lambda la, x: la.predictive(x),
    "nn": lambda la, x: la(x, **NN, link_approx="mc", generator=generator()),
    "features": lambda la, x: la.features(x),
    "functional samples": lambda la, x: la.functional_samples(x, n_samples=3, generator=generator()),
    "nn samples": lambda la, x: la.functional_samples(x, **NN, generator=generator()),
    "predictive samples": lambda la, x: la.predictive_samples(x, n_samples=3, generator=generator()),
    "sample": lambda la, x: la.sample(3, generator()),
    "residual share": lambda la, x: la.residual_share(x),
    "novelty": lambda la, x: la.novelty(x),
    "evidence": lambda la, x: la.log_marginal_likelihood(),
    "posterior covariance": lambda la, x: la.posterior_covariance,
    "functional variance": lambda la, x: la.functional_variance(la.backend.jacobians(x)[0]),
}
# What classes alone have.
OF_CLASSES = ("bridge", "bridge_norm")


def predicted(la, x, *without):
    """Every prediction that the likelihood has, one tensor after the other."""
    left_out = without if la.likelihood == "classification" else (*without, *OF_CLASSES)
    found = [as_tuple(call(la, x)) for name, call in PREDICTIONS.items() if name not in left_out]
    return tuple(t for tensors in found for t in tensors)


def error(la, x, data=None):
    """The error of the covariance at inputs, as a tensor."""
    found = la.approximation_error(x, train_loader() if data is None else data).covariance_error
    return torch.tensor(found, dtype=torch.float64, device="cpu")
