"""Seeds, comparison, and the problems: every model of the table with data and hyperparameters.

Sizes are distinct primes, so that a swapped axis cannot pass: B, C, K, M, N below.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from models import MODELS, N_HIDDEN, N_INPUTS, C, ConvNet, Residual, Tied
from models import wide_mlp as mlp
from torch import Tensor, nn

__all__ = ["MODELS", "N_HIDDEN", "N_INPUTS", "C", "ConvNet", "Residual", "Tied", "mlp"]

collect_ignore = ["host/stand_in"]  # a package called laplace, of which other processes run the tests
B, K, M, N = 7, 5, 11, 23
LIKELIHOODS = ("classification", "regression")

torch.set_num_threads(1)  # tensors are tiny here: threads only wait for each other


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> Iterator[None]:
    """A suite that a shell runs in the background starts with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_close(
    actual: Tensor, expected: Tensor, rtol: float | None = None, atol: float = 0.0, name: str = "value"
) -> None:
    """Compare up to ``atol + rtol * max |expected|``; ``rtol`` follows from the coarser dtype: 1e-9 in float64."""
    actual, expected = torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    if rtol is None:
        eps = max(torch.finfo(t.dtype).eps for t in (actual, expected) if t.is_floating_point())
        rtol = 4.5e6 * eps if eps < 1e-10 else 100 * eps
    a, e = actual.double().cpu(), expected.double().cpu()
    assert a.isfinite().all(), f"{name}: {int((~a.isfinite()).sum())} of {a.numel()} entries are not finite"
    bound = atol + rtol * (float(e.abs().max()) if e.numel() else 0.0)
    error = (a - e).abs()
    if e.numel() == 0 or error.max() <= bound:
        return
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape)) if error.ndim else ()
    raise AssertionError(
        f"{name}: {int((error > bound).sum())} of {e.numel()} entries differ by more than {bound:.2e}; the most, "
        f"{float(error.max()):.3e}, at {at}: {float(a[at]):.8g}, expected {float(e[at]):.8g}.{_hint(a, e, bound)}"
    )


def _hint(a: Tensor, e: Tensor, bound: float) -> str:
    factor = float((a * e).sum() / e.square().sum().clamp_min(1e-300))
    if (a - factor * e).abs().max() <= bound * max(1, abs(factor)):
        return f" It is the expected value times {factor:.6g}."
    if a.ndim >= 2 and a.shape == a.mT.shape and (a.mT - e).abs().max() <= bound:
        return " It is the expected value transposed."
    return ""


@dataclass(frozen=True)
class Problem:
    """A model, data, landmarks and hyperparameters that are not 1."""

    name: str
    likelihood: str
    model: nn.Module
    x: Tensor  # (N, ...)
    y: Tensor  # (N,) or (N, C)
    x_test: Tensor  # (B, ...)
    landmarks: tuple[Tensor, Tensor]  # (M, ...), (M,)
    sigma_noise: float
    temperature: float = 1.3
    prior_precision: float = 0.6

    def loader(self, batch: int = 5) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(batch), self.y.split(batch)))

    def options(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments common to laplace-torch's estimators and ours."""
        names = "likelihood", "sigma_noise", "temperature", "prior_precision"
        return {**{name: getattr(self, name) for name in names}, **changes}

    def with_data(self, x: Tensor, y: Tensor) -> Problem:
        return replace(self, x=x, y=y)


def make_problem(name: str, likelihood: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    build, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().to(dtype).eval()
        x, x_test, x_landmarks = (torch.randn(n, *shape).to(dtype) for n in (N, B, M))
        y = torch.randint(C, (N,)) if likelihood == "classification" else torch.randn(N, C).to(dtype)
        outputs = torch.randint(C, (M,))
    sigma_noise = 1.0 if likelihood == "classification" else 0.7
    return Problem(name, likelihood, model, x, y, x_test, (x_landmarks, outputs), sigma_noise)


@pytest.fixture(scope="session")
def dtype() -> torch.dtype:
    return torch.float64


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=MODELS)
def problem(request: pytest.FixtureRequest, likelihood: str, dtype: torch.dtype) -> Problem:
    """Every model with every likelihood."""
    return make_problem(request.param, likelihood, dtype)


@pytest.fixture
def small_problem(likelihood: str, dtype: torch.dtype) -> Problem:
    """The MLP with every likelihood."""
    return make_problem("mlp", likelihood, dtype)
