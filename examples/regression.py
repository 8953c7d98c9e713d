"""Regression with error bars: noise and prior learned by evidence, and what the rank K does.

A small network is fitted to a noisy sine with a gap in the data. The evidence (marginal
likelihood) of ELLA chooses the observation noise and the prior precision by gradient ascent,
as in laplace-torch's regression example; only the flavour's name differs.

What to look for: the error bars grow in the gap, and the noise is found. With all the
directions that float32 can tell apart, ELLA agrees with exact linearised Laplace over the
range of the data. With fewer it is too certain in the gap, and far from the data it always
is: ELLA knows the uncertainty along K directions, and exact Laplace the rest too.

    python examples/regression.py [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
from laplace import BaseLaplace, Laplace
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import laplace_ella  # noqa: F401 (makes hessian_structure="ella" known)

TRUE_SIGMA = 0.3
GAP = (3.0, 5.0)


def make_data(n: int = 150) -> tuple[Tensor, Tensor]:
    """Draw a noisy sine on [0, 3] and [5, 8]."""
    torch.manual_seed(0)
    u = 6 * torch.rand(n, 1)
    x = torch.where(u < 3, u, u + 2)
    return x, x.sin() + TRUE_SIGMA * torch.randn(n, 1)


def train(x: Tensor, y: Tensor) -> nn.Module:
    """Fit a network of 151 weights by least squares."""
    model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(1000):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return model


def maximize_evidence(la: BaseLaplace, n_steps: int = 200) -> float:
    """Set noise and prior precision to where the log evidence is largest, and return it."""
    log_prior = torch.zeros(1, requires_grad=True)
    log_sigma = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([log_prior, log_sigma], lr=1e-1)
    for _ in range(n_steps):
        optimizer.zero_grad()
        negative = -la.log_marginal_likelihood(log_prior.exp(), log_sigma.exp())
        negative.backward()
        optimizer.step()
    la.prior_precision, la.sigma_noise = log_prior.detach().exp(), log_sigma.detach().exp()
    return float(la.log_marginal_likelihood())


def fit(model: nn.Module, loader: DataLoader, **options) -> BaseLaplace:
    """Fit a flavour of Laplace over all weights, tune it by evidence, and print what it found."""
    la = Laplace(model, "regression", subset_of_weights="all", **options)
    la.fit(loader)
    evidence = maximize_evidence(la)
    print(
        f"{describe(la):>24}: sigma {float(la.sigma_noise):.3f}, prior precision "
        f"{float(la.prior_precision):.3f}, log evidence {evidence:.2f}"
    )
    return la


def describe(la: BaseLaplace) -> str:
    """Name a flavour, with its rank."""
    if hasattr(la, "basis"):
        return f"ELLA, K = {la.basis.rank}"
    return "exact linearised Laplace"


def deviation(la: BaseLaplace, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and epistemic standard deviation of the outputs, each (B,)."""
    mean, variance = la(x)
    return mean.detach().squeeze(1), variance.detach().reshape(-1).sqrt()


def plot(best: BaseLaplace, others: list[BaseLaplace], x: Tensor, y: Tensor, path: Path) -> None:
    """Draw the bands of one fit, and the epistemic deviations of all."""
    grid = torch.linspace(-4, 12, 400)[:, None]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    mean, epistemic = deviation(best, grid)
    total = (epistemic**2 + float(best.sigma_noise) ** 2).sqrt()
    at = grid.squeeze(1)
    left.fill_between(at, mean - 2 * total, mean + 2 * total, color="#c6d4ea", label="total, 2 s.d.")
    left.fill_between(
        at, mean - 2 * epistemic, mean + 2 * epistemic, color="#7f9fcf", label="epistemic, 2 s.d."
    )
    left.plot(at, mean, color="#1f3d73", label="network")
    left.plot(at, at.sin(), color="black", ls=":", label="true function")
    left.scatter(x, y, s=8, color="#c44e52", alpha=0.7, label="data", zorder=3)
    left.set(title=describe(best), xlabel="x", ylabel="y", xlim=(-4, 12), ylim=(-5.5, 4))
    left.legend(loc="lower center", ncol=3, framealpha=1, fontsize="small")

    for low, high in ((0, GAP[0]), (GAP[1], 8)):
        right.axvspan(low, high, color="0.9", label="range of the data" if low == 0 else None)
    colors = ["#dd8452", "#55a868", "#1f3d73"]
    for la, color in zip([*others[:-1], best], colors):
        right.plot(at, deviation(la, grid)[1], color=color, label=describe(la))
    right.plot(at, deviation(others[-1], grid)[1], color="black", ls="--", label=describe(others[-1]))
    right.set(title="epistemic standard deviation", xlabel="x", yscale="log", xlim=(-4, 12), ylim=(0.004, 12))
    right.legend(loc="lower center", ncol=2, framealpha=1, fontsize="small")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def check(best: BaseLaplace, exact: BaseLaplace) -> None:
    """Assert what the docstring promises."""
    assert math.isclose(float(best.sigma_noise), TRUE_SIGMA, rel_tol=0.15)
    data = torch.cat([torch.linspace(0.5, 2.5, 20), torch.linspace(5.5, 7.5, 20)])[:, None]
    gap = torch.tensor([[sum(GAP) / 2]])
    assert deviation(best, gap)[1] > 2 * deviation(best, data)[1].max(), "error bars must grow in the gap"
    inside = torch.linspace(0, 8, 50)[:, None]
    torch.testing.assert_close(deviation(best, inside)[1], deviation(exact, inside)[1], rtol=0.1, atol=0)
    far = torch.tensor([[-4.0]])
    assert deviation(best, far)[1] < deviation(exact, far)[1]


def main() -> None:
    """Train, fit with several ranks and exactly, draw, check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures", help="where figures go"
    )
    args = parser.parse_args()
    start = time.perf_counter()

    x, y = make_data()
    model = train(x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=50)
    print(f"true sigma {TRUE_SIGMA}")
    # The evidence needs no temperature; 1.0 says so, else tuning would be suggested.
    ella = {"hessian_structure": "ella", "temperature": 1.0}
    few = [fit(model, loader, **ella, n_eigenvalues=k) for k in (5, 10)]
    best = fit(model, loader, **ella)  # 20 by default, or as many as there are
    exact = fit(model, loader, hessian_structure="full")
    print(best)

    gap = torch.tensor([[sum(GAP) / 2]])
    for la in (*few, best, exact):
        print(
            f"{describe(la):>24}: epistemic s.d. {float(deviation(la, gap)[1]):.3f} in the middle of the gap"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    plot(best, [*few, exact], x, y, args.out / "regression.png")
    print(f"figure: {os.path.relpath(args.out / 'regression.png')}")
    check(best, exact)
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
