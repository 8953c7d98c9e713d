"""From laplace-torch's own ELLA to this one: the same predictions, in less time, and more to tune.

laplace-torch 0.3 has an ELLA (``hessian_structure="gp"``, ``functional_approximation="nystrom"``). On the same landmarks
both do the same maths. This script takes the landmarks that the host draws, fits both, and asserts that bases span the
same directions and that predictions agree to seven digits; it prints what each step took. Then it leaves the
host's choices behind: landmarks of its own, temperature and logit scale from the same single pass.

What to look for: at temperature 1 the prior is all that the host tunes. The default, 1, is far too wide for this
network; the best one leaves next to no variance, so that its ELLA predicts what the network predicts. The host's
temperature is an argument; searching it would take a pass over the validation data for each value. This network is
nearly calibrated, and nothing is gained on test images by tuning more; quickstart.py has one that is not.

With laplace-torch 0.2.3, which has no ELLA of its own, the script says so and does the other half.

Data: digits (scikit-learn). Nothing is downloaded.

    python examples/migrating.py [--quick] [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import laplace
import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
from laplace import Laplace
from laplace.curvature import GGNInterface
from ood import COLORS, tune
from quickstart import Sizes, expected_calibration_error, fit_weights, in_batches, nll
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from vit import load

import laplace_ella  # noqa: F401 (makes hessian_structure="ella" known)

SIZES = Sizes(train=800, validation=400, test=597, epochs=40, landmarks=200)
QUICK = Sizes(train=300, validation=200, test=100, epochs=20, landmarks=50)
RANK, SEED, BATCH = 20, 1234, 50
N_PRIORS = 11


class Clock:
    """Run steps, and remember the processor time that each took."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = {}

    def __call__(self, who: str, step: str, work: Callable[[], Any]) -> Any:
        """Do the work, and return what it returns."""
        start = time.process_time()
        result = work()
        self.seconds[step, who] = time.process_time() - start
        return result

    def report(self) -> None:
        """Print both sides and their quotient."""
        print(f"\n{'processor time, s':22}{'laplace-torch':>14}{'laplace_ella':>14}")
        for step in dict.fromkeys(step for step, _ in self.seconds):
            theirs, ours = self.seconds[step, "laplace-torch"], self.seconds[step, "laplace_ella"]
            print(f"{step:22}{theirs:14.2f}{ours:14.2f}   {theirs / ours:.1f} times as fast")


def train(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """Train a CNN of 9 000 weights, in double precision so that agreement means something."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ).double()
    return fit_weights(model, x, y, epochs, batch=BATCH, rate=2e-3)


def landmarks_of_the_host(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and outputs that laplace-torch's ELLA draws: a permutation, then outputs batch by batch."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))[:size]
    generator = torch.Generator().manual_seed(SEED + 1)
    outputs = [torch.randint(10, (len(part),), generator=generator) for part in order.split(BATCH)]
    return x[order], torch.cat(outputs)


def search_prior(la: Any, loader: DataLoader) -> float:
    """Search the prior precision at temperature 1, as both can, and keep the best."""
    grid = {"log_prior_prec_min": -4, "log_prior_prec_max": 4, "grid_size": N_PRIORS}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # ours warns of an optimum at the end of the grid, which is printed below
        la.optimize_prior_precision(method="gridsearch", val_loader=loader, link_approx="probit", **grid)
    return float(la.prior_precision)


def before(model: nn.Module, size: int) -> Any:
    """Return laplace-torch's own ELLA."""
    return Laplace(
        model,
        "classification",
        subset_of_weights="all",
        hessian_structure="gp",
        functional_approximation="nystrom",
        subsample_size=size,
        n_eigenvalues=RANK,
        seed=SEED,
        backend=GGNInterface,
    )


def after(model: nn.Module) -> Any:
    """Return this package's; G from all data and temperature 1, as the host's has them."""
    return Laplace(
        model,
        "classification",
        subset_of_weights="all",
        hessian_structure="ella",
        n_eigenvalues=RANK,
        curvature_size=None,
        temperature=1.0,
    )


def compare(
    model: nn.Module, data: dict[str, tuple[Tensor, Tensor]], loaders: dict[str, DataLoader], size: int
) -> tuple[Clock, dict[str, Tensor]]:
    """Do the same with both, and assert that they agree."""
    clock, x = Clock(), data["test"][0]
    theirs, ours = before(model, size), after(model)
    landmarks = landmarks_of_the_host(data["train"][0], size)
    clock("laplace-torch", "fit", lambda: theirs.fit(loaders["train"]))
    clock("laplace_ella", "fit", lambda: ours.fit(loaders["train"], landmarks=landmarks))
    V = torch.cat([v.flatten(1) for v in ours.basis.directions.values()], 1)
    overlap = torch.linalg.svdvals(V @ theirs.dual_directions)
    torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-7)

    predictions = {
        "laplace-torch": lambda b: theirs(b, pred_type="gp", link_approx="probit"),
        "laplace_ella": lambda b: ours(b, link_approx="probit"),
    }
    found = {
        who: clock(who, "prediction", partial(in_batches, predict, x)) for who, predict in predictions.items()
    }
    torch.testing.assert_close(found["laplace_ella"], found["laplace-torch"], rtol=1e-7, atol=1e-12)
    largest = (found["laplace_ella"] - found["laplace-torch"]).abs().max()
    print(f"same landmarks, same predictions: the largest difference of probabilities is {largest:.1e}")

    step, val_loader = f"search of {N_PRIORS} priors", loaders["validation"]
    prior = clock("laplace-torch", step, lambda: search_prior(theirs, val_loader))
    assert prior == clock("laplace_ella", step, lambda: search_prior(ours, val_loader))
    print(f"both find the prior precision {prior:.4g}, of 1e-4 to 1e4")
    found["prior tuned"] = in_batches(predictions["laplace-torch"], x)
    clock.report()
    return clock, found


def plot(clock: Clock | None, pair: dict[str, Tensor], result: Any) -> plt.Figure:
    """Draw the agreement, the times, and what is there to gain from the temperature."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    if clock is not None:
        theirs, ours = (pair[who].flatten() for who in ("laplace-torch", "laplace_ella"))
        left.axline((1e-3, 1e-3), (1, 1), color="black", lw=0.8)
        left.loglog(theirs, ours, ".", ms=3, color=COLORS["ELLA"])
        left.set(title="probabilities, prior 1", xlabel="laplace-torch", ylabel="laplace_ella")
        steps = list(dict.fromkeys(step for step, _ in clock.seconds))
        for i, (who, color) in enumerate((("laplace-torch", "0.6"), ("laplace_ella", COLORS["ELLA"]))):
            places = [k + 0.4 * i for k in range(len(steps))]
            middle.bar(places, [clock.seconds[s, who] for s in steps], 0.38, color=color, label=who)
            middle.bar_label(middle.containers[i], fmt="%.2g", fontsize="small")
        middle.set_xticks([k + 0.2 for k in range(len(steps))], [s.replace(" of ", "\nof ") for s in steps])
        middle.set(ylabel="processor time, s", title="the same work")
        middle.legend(frameon=False, fontsize="small", loc="upper center")
    temperature_scaling = result.baselines["temperature scaling"].parameters["logit_scale"]
    others = {s.logit_scale for s, _ in result.table} - {1.0}
    for scale in (1.0, min(others, key=lambda s: abs(s - temperature_scaling))):
        curve = sorted((s.temperature, v) for s, v in result.table if s.logit_scale == scale)
        right.semilogx(*zip(*curve), ".-", label=f"ELLA, s = {scale:.2g}")
    for name in ("MAP", "temperature scaling"):
        right.axhline(result.baselines[name].score, ls="--", lw=1, color=COLORS[name], label=name)
    right.set(title="validation NLL, one pass", xlabel="temperature T", xlim=(1e-3, 10))
    right.set_ylim(0.9 * result.score, 1.6 * result.baselines["MAP"].score)
    right.legend(frameon=False, fontsize="small")
    return figure


def main() -> None:
    """Train, do the same with both, then tune what only one of them can."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and epochs, for a test run")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures", help="where figures go"
    )
    args = parser.parse_args()
    sizes, start = QUICK if args.quick else SIZES, time.perf_counter()

    data = {k: (x.double(), y) for k, (x, y) in load(sizes).items()}
    model = train(*data["train"], sizes.epochs)
    loaders = {k: DataLoader(TensorDataset(*v), batch_size=BATCH) for k, v in data.items()}
    clock, pair = None, {}
    if hasattr(laplace, "ELLA"):
        clock, pair = compare(model, data, loaders, sizes.landmarks)
    else:
        print("this laplace-torch has no ELLA of its own (0.3 has): here is the other half only")

    la = Laplace(model, "classification", "all", "ella", subsample_size=sizes.landmarks)
    la.fit(loaders["train"])
    print(f"\n{la}")
    result = tune(la, loaders["validation"], ["temperature", "logit_scale"])
    x, y = data["test"]
    found = {
        "MAP": in_batches(lambda b: model(b).softmax(1), x),
        **(
            {"either, prior 1": pair["laplace_ella"], "either, prior tuned": pair["prior tuned"]}
            if pair
            else {}
        ),
        "T and s tuned": in_batches(lambda b: la(b, link_approx="mc", n_samples=128), x),
    }
    print(f"\n{len(y)} test images     {'NLL':>8}{'ECE':>8}")
    for name, p in found.items():
        print(f"{name:20}{nll(p, y).mean():8.4f}{expected_calibration_error(p, y):8.4f}")

    args.out.mkdir(parents=True, exist_ok=True)
    plot(clock, pair, result).savefig(args.out / "migrating.png", dpi=110)
    print(f"\nfigure: {os.path.relpath(args.out / 'migrating.png')}")
    scaled = result.baselines["temperature scaling"].score
    assert result.score <= scaled + 1e-3, "with no variance at all, ELLA is temperature scaling"
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
