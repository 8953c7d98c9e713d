"""Ways to a prediction: ELLA here, laplace-torch's flavours, and the plain network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from laplace import Laplace
from laplace.curvature import AsdlGGN, BackPackGGN
from torch import nn

import laplace_ella  # noqa: F401 (makes hessian_structure="ella" known)

# Both ELLAs: as many landmarks as laplace-torch's takes in seconds, all data in the curvature.
ELLA = {"subsample_size": 24, "n_eigenvalues": 20}
ALL, LAST = "all", "last_layer"
# What a P x P matrix in float64 may take before full Laplace is not tried.
FULL_LIMIT = 8e9


def ours(model: nn.Module, likelihood: str = "classification", **options: Any) -> Any:
    """Return an unfitted estimator of this package."""
    return Laplace(model, likelihood, ALL, "ella", **options)


def of_host(model: nn.Module, **options: Any) -> Any:
    """Return laplace-torch's own ELLA, unfitted."""
    return Laplace(model, "classification", ALL, "gp", functional_approximation="nystrom", **options)


def flavour(subset: str, structure: str) -> Callable[[nn.Module], Any]:
    return lambda model: Laplace(model, "classification", subset, structure)


def ella(backend: Any = None) -> Callable[[nn.Module], Any]:
    return lambda model: ours(model, backend=backend, curvature_size=None, temperature=1.0, **ELLA)


# None stands for MAP, the network as it is.
METHODS: dict[str, Callable[[nn.Module], Any] | None] = {
    "MAP": None,
    "ELLA, torch.func": ella(),
    "ELLA, BackPACK": ella(BackPackGGN),
    "ELLA, ASDL": ella(AsdlGGN),
    "laplace-torch's ELLA": lambda model: of_host(model, **ELLA),
    "last layer, full": flavour(LAST, "full"),
    "last layer, kron": flavour(LAST, "kron"),
    "all weights, diag": flavour(ALL, "diag"),
    "all weights, kron": flavour(ALL, "kron"),
    "all weights, full": flavour(ALL, "full"),
}


def does_not_fit(method: str, model: nn.Module) -> str | None:
    """Say why a method is not worth trying, or return None."""
    n_bytes = 8 * sum(p.numel() for p in model.parameters()) ** 2
    if method == "all weights, full" and n_bytes > FULL_LIMIT:
        return f"does not fit: P x P numbers take {n_bytes / 1e9:.0f} GB"
    return None
