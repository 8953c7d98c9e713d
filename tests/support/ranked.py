"""A fit, and what it leaves, in one process or on the ranks of a group: the same calls, and comparisons of both."""

from dataclasses import dataclass, field
from typing import Any

import oracle
import torch
import torch.distributed as dist
import torchmetrics
from conftest import C, K, M, assert_close, make_problem
from helpers import as_tuple
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from laplace_ella import ELLALaplace

F64 = torch.float64
N_VAL, N_MORE = 17, 19
LAYERWISE = torch.tensor([0.2, 1.7, 0.6, 3.1], dtype=F64)
RTOL = 1e-6
REDUCED = "ignore:(n_eigenvalues|subsample_size) was reduced"
FEW = "ignore:curvature='mc' estimates G"


@dataclass(frozen=True)
class Case:
    """A fit: what is passed to the constructor, and to ``fit``."""

    likelihood: str = "classification"
    model: str = "mlp"
    options: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    batch: int = 5

    @property
    def problem(self):
        p = make_problem("mlp" if self.model == "confident" else self.model, self.likelihood)
        if self.model == "confident":  # whose logits are too large
            with torch.no_grad():
                p.model[-1].weight.mul_(6)
        return p

    def estimator(self, model=None, **more):
        p = self.problem
        options = {"subsample_size": M, "n_eigenvalues": K, **self.options, **more}
        return ELLALaplace(p.model if model is None else model, **p.options(**options))

    def arguments(self):
        named = {"landmarks": self.problem.landmarks, "val_loader": loader(*self.validation())}
        return {k: named[k] if k in named and v is True else v for k, v in self.fit.items()}

    def fitted(self, model=None, data=None, **more):
        p, la = self.problem, self.estimator(model, **more)
        la.fit(loader(p.x, p.y, self.batch) if data is None else data, **self.arguments())
        return la

    def data(self, n=N_MORE, seed=12):
        """Inputs of another sample, with targets that the model predicts at times."""
        p, generator = self.problem, torch.Generator().manual_seed(seed)
        x = torch.randn(n, *p.x.shape[1:], generator=generator, dtype=F64)
        noise = torch.randn(n, C, generator=generator, dtype=F64)
        f = oracle.outputs(p.model, x) + (4 if self.likelihood == "classification" else 1) * noise
        return x, f.argmax(1) if self.likelihood == "classification" else f

    def validation(self):
        return self.data(N_VAL, 11)

    @property
    def same_steps(self):
        """Whether ranks take snapshots at the n at which one process does: not in a second pass."""
        return self.options.get("curvature_size", 1) is not None

    def shard(self, sizes):
        """This rank's part of data that are divided unevenly; all of them in one process."""
        p = self.problem
        return mine(p.x, sizes), mine(p.y, sizes)


def mine(values, sizes):
    return values.split(sizes)[dist.get_rank()] if dist.is_initialized() else values


def loader(x, y, batch=5, **sampling):
    """Load the whole data in one process, this rank's part of them in a group."""
    dataset = TensorDataset(x, y)
    if not dist.is_initialized():
        return DataLoader(dataset, batch)
    sampler = DistributedSampler(dataset, **{"shuffle": False, **sampling})
    return DataLoader(dataset, batch, sampler=sampler)


def batches(x, y, batch=5):
    return list(zip(x.split(batch), y.split(batch))) if len(x) else []


def predictions(la, x):
    calls = {"probit": {}, "mc": {"link_approx": "mc", "n_samples": 32}}
    if la.likelihood == "regression":
        calls = {"moments": {}, "joint": {"joint": True}}
    found = {f"{k} {i}": t for k, v in calls.items() for i, t in enumerate(as_tuple(la(x, **v)))}
    found["features"], found["outputs"] = la.features(x)
    return found


OF_FIT = ("H", "loss", "n_data", "n_predictions", "n_outputs", "n_curvature", "mean", "prior_precision")
OF_FIT += ("temperature", "sigma_noise", "residual_scale", "logit_scale")
OF_BASIS = ("eigenvalues", "spectrum", "trace", "rank", "n_landmarks")


def posterior_of(la):
    found = {"n": [n for n, _ in la.snapshots], **{f"snapshot {n}": G for n, G in la.snapshots}}
    found |= {name: getattr(la, name) for name in OF_FIT} | {
        name: getattr(la.basis, name) for name in OF_BASIS
    }
    return found | {"evidence": la.log_marginal_likelihood().detach(), "history": la.fit_history_}


def report(la, x):
    """Return all that a fit leaves."""
    return {
        **posterior_of(la),
        **{f"directions of {k}": v for k, v in la.basis.directions.items()},
        **predictions(la, x),
        "samples": la.functional_samples(x, n_samples=3, generator=torch.Generator().manual_seed(5)),
    }


def run(case):
    return report(case.fitted(), case.problem.x_test)


def check_run(group, case):
    """Require that ranks find what one process finds."""
    check(group(run, case), run(case), case.same_steps)


def assert_identical(left, right, name="value"):
    """Require the same bits."""
    assert type(left) is type(right), name
    if isinstance(left, dict):
        assert left.keys() == right.keys(), name
        for k in left:
            assert_identical(left[k], right[k], f"{name}: {k}")
    elif isinstance(left, Tensor):
        assert torch.equal(left, right), f"{name}: differs by up to {(left - right).abs().max()}"
    else:
        assert left == right, name


def assert_agree(found, expected, name="value"):
    """Require numbers that differ by rounding only."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), name
        for k in expected:
            assert_agree(found[k], expected[k], f"{name}: {k}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), name
        for i, (a, e) in enumerate(zip(found, expected)):
            assert_agree(a, e, f"{name} {i}")
    elif isinstance(expected, (Tensor, float)):
        assert_close(torch.as_tensor(found), torch.as_tensor(expected), RTOL, name=name)
    else:
        assert found == expected, name


def check(found, expected, same_steps=True):
    """Require the same bits on all ranks, and what one process found up to rounding.

    ``same_steps=False``: where batches are others, so are the n of all snapshots but the last.
    """
    for rank, other in enumerate(found[1:], start=1):
        assert_identical(other, found[0], f"rank {rank} against rank 0")
    ours = found[0]
    if not same_steps:
        assert ours["n"][-1] == expected["n"][-1]
        assert_identical(ours[f"snapshot {ours['n'][-1]}"], ours["H"])
        steps = tuple(k for k in (*ours, *expected) if k.startswith("snapshot") or k in ("n", "history"))
        ours, expected = ({k: v for k, v in d.items() if k not in steps} for d in (ours, expected))
    assert_agree(ours, expected)


def assert_refused(outcomes, text):
    """Require the same kind of error on all ranks."""
    for outcome in outcomes:
        assert outcome.error == "ValueError", outcome.trace
        assert text in outcome.text


def assert_stopped(outcomes, kind, text="", failed=1):
    """Require that one rank raised its error, and that the others were told at once."""
    mine = outcomes[failed]
    assert mine.error == kind, mine.trace
    assert text in mine.text
    for other in outcomes[:failed] + outcomes[failed + 1 :]:
        assert other.error == "RankError", other.trace
        assert "RuntimeError" in other.bases
        assert "timeout" not in other.text
        assert f"rank {failed}" in other.text.lower()
        assert kind in other.text
        assert mine.text in other.text


class Brier(torchmetrics.Metric):
    """Mean squared distance of probabilities to labels, weighted by class."""

    higher_is_better = False
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=F64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=F64), dist_reduce_fx="sum")

    def update(self, p, y):
        weights = 1.0 + y.double()
        self.total += (weights * (p.double() - nn.functional.one_hot(y, C)).square().sum(1)).sum()
        self.count += weights.sum()

    def compute(self):
        return self.total / self.count


def miscalibration(p, y):
    """A loss of all inputs at once, which no mean over batches or ranks is."""
    confidence, label = p.max(1)
    return 0.1 + abs(float(confidence.double().mean()) - float((label == y).double().mean()))


def wide(means, covariances, targets):
    variances = covariances.diagonal(dim1=1, dim2=2)
    return float(((targets - means).square() / (variances + 0.5) + (variances + 0.5).log()).sum(1).max())


def calibration_error():
    return torchmetrics.classification.MulticlassCalibrationError(C, n_bins=5)


def composed():
    return 3 - 2 * torchmetrics.classification.MulticlassAccuracy(C, average="micro")


def tune(la, case, arguments, val=None):
    loss = arguments.get("loss")
    if loss in (Brier, calibration_error, composed):
        arguments = {**arguments, "loss": loss()}
    la.optimize_prior_precision(
        method="gridsearch",
        val_loader=loader(*case.validation(), 3) if val is None else val,
        **{"grid_size": 13, "log_prior_prec_min": -3, "log_prior_prec_max": 3, **arguments},
    )


HOT = {"temperature": 50.0}
GRIDS = {
    "probit": ("classification", {}, {}),
    "mc": ("classification", {}, {"link_approx": "mc", "n_samples": 32}),
    "regression": ("regression", {}, {}),
    "callable": ("classification", HOT, {"loss": miscalibration, "grid_size": 301}),
    "callable of moments": ("regression", {"temperature": 5e3}, {"loss": wide}),
    "metric of sums": ("classification", HOT, {"loss": Brier}),
    "metric of lists": ("classification", HOT, {"loss": calibration_error}),
    "metric of metrics": ("classification", HOT, {"loss": composed, "grid_size": 301}),
    "nn": ("classification", HOT, {"pred_type": "nn", "link_approx": "mc", "n_samples": 7, "grid_size": 9}),
    "residual": ("classification", {"residual": "isotropic"}, {}),
    "small memory": ("classification", {"memory_budget": 3000}, {}),
}


def grid_case(name):
    likelihood, options, _ = GRIDS[name]
    return Case(likelihood, "confident", options={"temperature": None, **options})


SAMPLE, STREAMED = {"curvature_size": 13}, {"curvature_size": None}
FITS = {
    "all inputs": Case(),
    "a sample of inputs": Case(options=SAMPLE),
    "a second pass": Case("regression", options=STREAMED),
    "sampled labels": Case(options={"curvature": "mc", "curvature_samples": 3, **SAMPLE, "seed": 5}),
    "sampled labels in a second pass": Case(options={"curvature": "mc", "curvature_size": None}),
    "more landmarks than inputs": Case("regression", options={"subsample_size": 47}),
    "every pair": Case(options={"subsample_size": 1000}),
    "one landmark": Case(options={"subsample_size": 1, "n_eigenvalues": 1}),
    "a share of the trace": Case(options={"n_eigenvalues": 0.9}),
    "more directions than rank": Case(options={"n_eigenvalues": 31}),
    "blocks of rows": Case(options={"memory_budget": 3000}),
    "blocks of two rows": Case("regression", options={"memory_budget": 1300}),
    "blocks of many rows": Case(options={"memory_budget": 16_000, "subsample_size": 47}),
    "spilled rows": Case(options={"memory_budget": 2000, "spill": "cpu", "spill_dtype": torch.float32}),
    "reverse mode": Case("regression", options={"autodiff": "reverse"}),
    "isotropic residual": Case(options={"residual": "isotropic", "residual_scale": 0.3}),
    "exact residual": Case("regression", options={"residual": "exact", "residual_scale": 0.3}),
    "layerwise prior": Case(options={"prior_precision": LAYERWISE}),
    "balanced": Case(options=SAMPLE, fit={"balanced": True}),
    "balanced pairs": Case(options={"subsample_size": 47}, fit={"balanced": True}),
    "given landmarks": Case("regression", fit={"landmarks": True}),
    "batches of one": Case(batch=1, options=SAMPLE),
    "snapshots at every batch": Case(batch=3, options=SAMPLE, fit={"val_steps": 1}),
    "snapshots at every second batch": Case(batch=3, options=SAMPLE, fit={"val_steps": 2}),
    "the first inputs": Case(options=SAMPLE, fit={"max_samples": 14}),
    "the first inputs of many": Case("regression", fit={"max_samples": 13, "n_total": 101}),
    "the first in a second pass": Case(options=STREAMED, fit={"max_samples": 1, "landmarks": True}),
    "convolutions": Case(model="conv_batchnorm", options=SAMPLE),
    "tied weights": Case(model="tied", options=SAMPLE),
    "frozen weights": Case(model="partly_frozen", options=SAMPLE),
}
