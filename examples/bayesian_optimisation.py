"""Bayesian optimisation with a neural network: BoTorch asks ELLA how promising a point is, and for the gradient.

The function to maximise is Hartmann's in six dimensions, a standard test, of which a few dozen evaluations are allowed. A small
network is fitted to those made so far; ELLA gives it error bars, with ``enable_backprop=True`` as
differentiable functions of the input, so that BoTorch climbs its expected improvement by L-BFGS, and evaluates the function
at the best point found. Noise and prior precision come from the evidence, as nothing is left over for validation.

What to look for: after the same number of evaluations the search is well ahead of random search. ELLA's variance is
that along K directions, as many as there are evaluations. ``residual="isotropic"`` adds what exact linearised Laplace has in all others;
the error bars then hardly narrow between the evaluations, the search goes from corner to corner of the cube, and finds no more
than random search does in the few dozen evaluations allowed. In fewer dimensions, or with more evaluations, that may differ.

BoTorch comes with the extra ``examples``.

    python examples/bayesian_optimisation.py [--quick] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.models.model import Model
from botorch.optim import optimize_acqf
from botorch.posteriors import GPyTorchPosterior
from botorch.test_functions import Hartmann
from gpytorch.distributions import MultivariateNormal
from laplace import Laplace
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_ella  # noqa: F401 (makes hessian_structure="ella" known)

FUNCTION = Hartmann(6, negate=True)  # its largest value is 3.32
N_START, N_RANDOM_RUNS = 10, 200
COLORS = {"ELLA": "#c44e52", "ELLA with residual": "#4c72b0", "random search": "0.4"}


class Surrogate(Model):
    """What BoTorch needs to know of an estimator: the posterior at inputs (..., q, d)."""

    num_outputs = 1

    def __init__(self, la: Any) -> None:
        super().__init__()
        self.la = la

    def posterior(self, X: Tensor, *_: Any, **__: Any) -> GPyTorchPosterior:
        """Return the joint Gaussian of the q values in each batch."""
        b, q = X.shape[:-2].numel(), X.shape[-2]
        mean, covariance = self.la(X.flatten(0, -2), joint=True)
        blocks = covariance.reshape(b, q, b, q).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        shape = X.shape[:-1]
        return GPyTorchPosterior(MultivariateNormal(mean.reshape(shape), blocks.reshape(*shape, q)))


class Centred(nn.Module):
    """Map [0, 1] to [-2, 2], where tanh bends."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the inputs, stretched."""
        return 4 * x - 2


def train(x: Tensor, y: Tensor, n_steps: int = 200) -> nn.Module:
    """Fit a network by least squares, not to the last digit."""
    layers = [nn.Linear(x.shape[1], 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)]
    model = nn.Sequential(Centred(), *layers).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(n_steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model


def surrogate_of(x: Tensor, y: Tensor, residual: str) -> Any:
    """Return ELLA of a network fitted to standardised values, with noise and prior by evidence."""
    la = Laplace(
        train(x, y),
        "regression",
        subset_of_weights="all",
        hessian_structure="ella",
        temperature=1.0,
        enable_backprop=True,
        residual=residual,
        residual_samples=20,
        n_eigenvalues=len(x),
    )
    la.fit(DataLoader(TensorDataset(x, y), batch_size=50))
    maximize_evidence(la)
    return la


def maximize_evidence(la: Any, n_steps: int = 60) -> None:
    """Set noise and prior precision to where the log evidence is largest."""
    logs = torch.tensor([0.0, -2.0], dtype=torch.float64, requires_grad=True)  # of prior precision and noise
    optimizer = torch.optim.Adam([logs], lr=0.1)
    for _ in range(n_steps):
        optimizer.zero_grad()
        (-la.log_marginal_likelihood(logs[0].exp(), logs[1].exp())).backward()
        optimizer.step()
    la.prior_precision, la.sigma_noise = logs[0].detach().exp(), logs[1].detach().exp()


def next_point(la: Any, best: Tensor) -> Tensor:
    """Return the point (1, d) of the largest expected improvement."""
    bounds = torch.tensor([[0.0], [1.0]], dtype=torch.float64).expand(2, FUNCTION.dim)
    improvement = LogExpectedImprovement(Surrogate(la), best_f=best)
    return optimize_acqf(improvement, bounds, q=1, num_restarts=3, raw_samples=64, options={"maxiter": 30})[0]


def search(seed: int, n: int, residual: str) -> tuple[Tensor, Tensor]:
    """Return inputs (n, d) and values (n, 1): some at random, the others where they promise most."""
    torch.manual_seed(seed)
    x = torch.rand(N_START, FUNCTION.dim, dtype=torch.float64)
    y = FUNCTION(x)[:, None]
    while len(x) < n:
        standardised = (y - y.mean()) / y.std()
        la = surrogate_of(x, standardised, residual)
        new = next_point(la, standardised.max())
        x, y = torch.cat([x, new]), torch.cat([y, FUNCTION(new)[:, None]])
    return x, y


def random_search(n: int) -> Tensor:
    """Return the best value after 1 ... n random evaluations (runs, n)."""
    x = torch.rand(
        N_RANDOM_RUNS, n, FUNCTION.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    return FUNCTION(x).cummax(1).values


def check_gradient(la: Any) -> None:
    """Assert that the gradient of the error bar with respect to the input is that of finite differences."""
    x = torch.full((1, FUNCTION.dim), 0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: la(x)[1].sqrt(), (x,), atol=1e-5)


def plot(curves: dict[str, Tensor], x: Tensor, y: Tensor) -> plt.Figure:
    """Draw the best values found, and a slice of the last surrogate through its best point."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    at = torch.arange(1, next(iter(curves.values())).shape[1] + 1)
    for name, values in curves.items():
        mean, error = values.mean(0), values.std(0) / len(values) ** 0.5
        left.plot(at, mean, color=COLORS[name], label=f"{name}, mean of {len(values)}")
        left.fill_between(at, mean - error, mean + error, color=COLORS[name], alpha=0.2, lw=0)
    left.axvline(N_START, color="black", ls=":", lw=1)
    left.axhline(FUNCTION.optimal_value, color="black", lw=0.8, label="maximum")
    left.set(xlabel=f"evaluations (the first {N_START} at random)", ylabel="best value so far")
    left.set(title="Hartmann's function, 6 dimensions")
    left.legend(frameon=False, fontsize="small", loc="lower right")

    center, scale = y.mean(), y.std()
    line = x[y.argmax()].repeat(200, 1)
    line[:, 0] = torch.linspace(0, 1, 200, dtype=torch.float64)
    for residual, color in (("isotropic", "#c6d4ea"), ("none", "#e8a5a7")):
        torch.manual_seed(0)
        mean, variance = surrogate_of(x, (y - center) / scale, residual)(line)
        mean, deviation = (mean.detach() * scale + center)[:, 0], variance.detach().flatten().sqrt() * scale
        bounds = mean - 2 * deviation, mean + 2 * deviation
        right.fill_between(line[:, 0], *bounds, color=color, lw=0, label=f'2 s.d., residual="{residual}"')
    right.plot(line[:, 0], mean, color="black", lw=1.2, label="network")
    right.plot(line[:, 0], FUNCTION(line), color="black", ls=":", lw=1.2, label="function")
    right.set(xlabel="first coordinate, through the best point", ylabel="value", title="last surrogate")
    right.legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    """Search from several seeds, compare with random search, draw, check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer seeds and evaluations, for a test run")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures", help="where figures go"
    )
    args = parser.parse_args()
    n_seeds, n, start = (2, 25, time.perf_counter()) if args.quick else (5, 40, time.perf_counter())

    curves = {}
    for name, residual in (("ELLA with residual", "isotropic"), ("ELLA", "none"))[1 if args.quick else 0 :]:
        found = [search(seed, n, residual) for seed in range(n_seeds)]
        curves[name] = torch.stack([y[:, 0].cummax(0).values for _, y in found])
        print(f"{name}: best values of each search {curves[name][:, -1].numpy().round(2)}", end=", ")
        print(f"{time.perf_counter() - start:.0f} s")
    curves["random search"] = random_search(n)
    for name, values in curves.items():
        print(f"{name:20} {values[:, -1].mean():.2f} after {n} evaluations, mean of {len(values)}")
    print(f"{'maximum':20} {FUNCTION.optimal_value:.2f}")

    x, y = found[0]
    args.out.mkdir(parents=True, exist_ok=True)
    plot(curves, x, y).savefig(args.out / "bayesian_optimisation.png", dpi=110)
    print(f"figure: {os.path.relpath(args.out / 'bayesian_optimisation.png')}")
    check_gradient(surrogate_of(x, (y - y.mean()) / y.std(), "isotropic"))
    best, random = (curves[name][:, -1].mean() for name in ("ELLA", "random search"))
    assert best > random, "on average the search beats random search"
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
