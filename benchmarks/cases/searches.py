"""What searches cost beyond the features, and sampled labels."""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks.cases.setting import Rows, on_device, repeats, tuned_problem
from benchmarks.inside import fit_curvature
from benchmarks.measure import interleaved, loader, once, ratios, result
from benchmarks.methods import ours
from benchmarks.problems import network


def tuning(args: argparse.Namespace, kind: str, n_validation: int = 1000) -> Rows:
    """What a search costs beyond the features of the validation data, of which one pass is the unit."""
    la, batches = tuned_problem(args, n_validation)

    def features() -> None:
        for x, _ in batches:
            la.features(x)

    def grid() -> None:
        la.temperature = 1.0
        la.optimize_prior_precision(method="gridsearch", val_loader=batches, grid_size=100)

    def joint(link: str) -> None:
        la.temperature = None
        la.optimize_hyperparameters(batches, link_approx=link, apply=False)

    title, search, target = {
        "grid": ("grid search of 100 priors", grid, 1.1),
        "probit": ("search of (T, s), probit link", partial(joint, "probit"), 1.3),
        "mc": ("search of (T, s), Monte-Carlo link of 128 samples", partial(joint, "mc"), 2),
    }[kind]
    calls = interleaved({"features": features, "search": search}, repeats(args, 2, 5), args.device)
    return [
        result(
            f"{title}, {n_validation} images",
            "passes of features",
            ratios(calls, "search", "features")["median"],
            target,
            headline=True,
            spread=ratios(calls, "search", "features"),
            seconds={k: v.median() for k, v in calls.items()},
            kind=kind,
        )
    ]


def sampled_curvature(args: argparse.Namespace, rank: int, sizes: tuple[int, ...]) -> Rows:
    """G from sampled labels against the exact one of the same inputs: its error, and what an input costs."""
    model = network("resnet20", args.data, args.device)
    x, y = on_device("resnet20", max(sizes) + 100, args)
    rows = []
    for n in sizes:
        fitted, calls = {}, {}
        for kind in ("exact", "mc"):
            la = ours(model, subsample_size=2 * rank, n_eigenvalues=rank, curvature_size=None, curvature=kind)
            la.fit(loader(x[:50], y[:50], 50))  # finds out what the model supports
            batches = loader(x[:n], y[:n], 50)
            calls[kind], _ = once(partial(fit_curvature, la, batches), args.device)
            la.temperature = 1000.0
            fitted[kind] = la
        exact, mc = fitted["exact"], fitted["mc"]
        phi, _ = exact.features(x[-100:])
        spreads = [float(la.functional_variance(phi).diagonal(dim1=1, dim2=2).mean()) for la in (mc, exact)]
        rows.append(
            result(
                f"sampled labels, K = {rank}, n = {n}: error of G",
                "relative",
                float((mc.H - exact.H).norm() / exact.H.norm()),
                K=rank,
                n=n,
                variance_ratio=spreads[0] / spreads[1],
                times_cheaper=calls["exact"] / calls["mc"],
            )
        )
    return rows
