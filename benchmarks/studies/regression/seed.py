"""One seed: a split, a network, and what every method makes of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies.common.ella import Size, Times
from benchmarks.studies.regression import ella as ours
from benchmarks.studies.regression import methods as others
from benchmarks.studies.regression import scores
from benchmarks.studies.regression.data import Counts, Data, Table, split
from benchmarks.studies.regression.training import MLP, fit_network

REFERENCES = ("MAP, noise of training rows", "MAP, tuned noise")
HOST = "laplace-torch's ELLA"
SAMPLED = "sampled G"
COMMON = "T, sigma, delta by the others' search"
EXACT_LIMIT = 5000  # weights
# Inputs whose prediction is timed, and compared with what the search took it to be.
TIMED = 200
DISAGREEMENT = 0.05


@dataclass(frozen=True)
class Case:
    """A network with its data; ``sizes`` are those of ELLA, by the name that rows have."""

    widths: tuple[int, ...]
    counts: Counts
    epochs: int
    batch: int
    sizes: dict[str, Size]


def fits(case: Case, seed: int) -> dict[str, Callable[[nn.Module, Data], Any]]:
    """Return what fits each posterior, by its name."""
    first = next(iter(case.sizes.values()))
    found: dict[str, Callable[[nn.Module, Data], Any]] = {
        "last-layer full": partial(others.last_layer, "full"),
        "last-layer KFAC": partial(others.last_layer, "kron"),
        "all-weights diagonal": partial(others.all_weights, "diag"),
        "all-weights KFAC": partial(others.all_weights, "kron"),
        "all-weights full": others.exact,
        HOST: partial(
            others.host_ella, n_landmarks=first.subsample_size, rank=first.n_eigenvalues, seed=seed
        ),
    }
    if n_weights(case) > EXACT_LIMIT:
        del found["all-weights full"]
    for name, size in case.sizes.items():
        found[name] = partial(ours.fitted, size=size, seed=seed)
    name = next(iter(case.sizes))
    found[f"{name}, sampled G"] = partial(ours.fitted, size=first, seed=seed, curvature="mc")
    return found


def n_weights(case: Case) -> int:
    widths = (8, *case.widths, 1)
    return sum((a + 1) * b for a, b in pairwise(widths))


@dataclass(frozen=True)
class Row:
    """A method's predictive variance (N,) of each set of inputs, noise included, and how it was tuned."""

    variances: dict[str, Tensor]
    parameters: dict[str, Any]
    more: dict[str, Any]


class Seed:
    """One seed's run: data, network, errors, times, and the rows that were found so far."""

    def __init__(self, case: Case, table: Table, seed: int) -> None:
        self.case, self.seed, self.data = case, seed, split(table, case.counts, seed)
        start = time.process_time()
        self.model, self.epoch = fit_network(
            MLP(8, case.widths, seed), self.data, case.epochs, case.batch, seed
        )
        self.training_seconds = time.process_time() - start
        self.means = {name: outputs(self.model, x) for name, x in self.data.inputs().items()}
        labelled = {"validation": self.data.validation, "test": self.data.test, **self.data.shifted}
        self.targets = {name: y[:, 0].double() for name, (_, y) in labelled.items()}
        self.errors = {name: y - self.means[name] for name, y in self.targets.items()}
        self.times = Times(self.model, self.data.test[0][:1000], time.process_time, 20)
        self.rows: dict[str, Row] = {}
        self.novelty: dict[str, dict[str, Tensor]] = {}
        few = replace(self.data, train=tuple(part[:20] for part in self.data.train))
        others.last_layer("full", self.model, few)  # what is imported at the first call

    def add_simple(self) -> None:
        """Tune what needs the network's outputs and last hidden layer only."""
        train = self.data.train[1][:, 0].double() - outputs(self.model, self.data.train[0])
        of_training, tuned = float(train.square().mean()), float(self.errors["validation"].square().mean())
        hidden = {name: others.hidden(self.model, x) for name, x in self.data.inputs().items()}
        norms = {name: z.square().sum(1) + 1 for name, z in hidden.items()}
        found = others.search(self.errors["validation"], norms["validation"][None])
        ones = {name: torch.ones_like(norm) for name, norm in norms.items()}
        extra = max(tuned - of_training, 0.0)  # the best constant, in closed form
        self._add(REFERENCES[0], _times(ones, of_training), {"sigma": math.sqrt(of_training)})
        self._add(REFERENCES[1], _times(ones, tuned), {"sigma": math.sqrt(tuned)})
        self._add(
            "constant variance beside that noise", _times(ones, of_training + extra), {"variance": extra}
        )
        self._add(
            "last-layer variance",
            {name: found.factor * norm + found.noise for name, norm in norms.items()},
            {"factor": found.factor, "sigma": math.sqrt(found.noise)},
            settings=found.settings // len(others.PRODUCTS),
        )
        self.novelty["norm of the inputs"] = {
            name: x.square().sum(1) for name, x in self.data.inputs().items()
        }
        self.novelty["norm of the last layer's inputs"] = norms

    def _add(self, name: str, variances: dict[str, Tensor], parameters: dict[str, Any], **more: Any) -> None:
        score = float(scores.nll(0.0, variances["validation"], self.errors["validation"]).mean())
        self.rows[name] = Row(variances, parameters, {**more, "validation_nll": score})

    def add_flavour(self, name: str, fit: Callable[[nn.Module, Data], others.Flavour]) -> None:
        """Fit, search and predict with a posterior of laplace-torch."""
        data = self.data
        with self.times.stage(f"fit: {name}", len(data.train[0])):
            flavour = fit(self.model, data)
        with self.times.stage(f"tune: {name}", len(data.validation[0])):
            shapes = flavour.shapes(data.validation[0], others.PRODUCTS)
            found = others.search(self.errors["validation"], shapes)
            a = others.PRODUCTS[found.index]
            parameters = flavour.give(a, found.factor, found.noise)
            flavour.library(data.test[0][:1])  # factors its posterior
        variances = {
            name: found.factor * flavour.shapes(x, (a,))[0] + found.noise for name, x in data.inputs().items()
        }
        x = data.test[0][:TIMED]
        with self.times.stage(f"predict: {name}", len(x)):
            library = flavour.library(x).double() + found.noise
        apart = float((library / variances["test"][: len(x)] - 1).abs().max())
        if not apart < DISAGREEMENT:
            raise AssertionError(f"{name}: its eigenvalues and its own call differ by {apart:.1%}")
        more = {
            "settings": found.settings,
            "passes_of_its_own_search": found.settings,
            "on_an_edge": found.index in (0, len(others.PRODUCTS) - 1),
        }
        self._add(name, variances, parameters, apart_from_library=apart, **more)

    def add_ella(self, name: str, fit: Callable[[nn.Module, Data], Any], tunings: list[str]) -> None:
        """Fit once, compute features once, and tune and predict each row from them."""
        with self.times.stage(f"fit: {name}", len(self.data.train[0])):
            la = fit(self.model, self.data)
        kept = ours.keep(la, self.data)
        for kind in tunings:
            row = f"{name}: {kind}"
            with self.times.stage(f"tune: {row}", len(self.data.validation[0])):
                parameters, more = ours.tuned(la, ours.TUNINGS[kind], self.data)
            x = self.data.test[0][:TIMED]
            with self.times.stage(f"predict: {row}", len(x)), torch.no_grad():
                la(x, diagonal_output=True)
            more.pop("validation_nll", None)
            passes = 0 if kind == "evidence" else 1
            self._add(row, ours.variances(la, kept), parameters, passes_of_its_own_search=passes, **more)
        self._add_by_common_search(name, la, kept["exact"])
        if len(tunings) == len(ours.TUNINGS):
            self.novelty[f"residual share, {name}"] = {of: one.share for of, one in kept["exact"].items()}

    def _add_by_common_search(self, name: str, la: Any, kept: ours.Sets) -> None:
        """Search ELLA's setting as that of the flavours, to tell its variances from its search."""
        values, vectors = torch.linalg.eigh(la.H)
        weights = torch.stack([1 / (values.clamp_min(0) + a) for a in others.PRODUCTS])
        shapes = {of: weights @ (one.phi[:, 0].double() @ vectors).square().T for of, one in kept.items()}
        found = others.search(self.errors["validation"], shapes["validation"])
        parameters = others.setting(others.PRODUCTS[found.index], found.factor, found.noise)
        variances = {of: found.factor * shape[found.index] + found.noise for of, shape in shapes.items()}
        self._add(
            f"{name}: {COMMON}", variances, parameters, settings=found.settings, passes_of_its_own_search=1
        )

    def scored(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return {
            "seed": self.seed,
            "training_seconds": self.training_seconds,
            "best_epoch": self.epoch,
            "rows": {
                name: len(x) for name, x in [("train", self.data.train[0]), *self.data.inputs().items()]
            },
            "scale": self.data.scale,
            "rmse": {name: _rms(e) for name, e in self.errors.items()},
            "methods": {name: self._scored(row) for name, row in self.rows.items()},
            "novelty": {name: self._novelty(found) for name, found in self.novelty.items()},
            "times": self.times.stages,
        }

    def _scored(self, row: Row) -> dict[str, Any]:
        y, mean = self.targets["test"], self.means["test"]
        gaps = {
            of: scores.difference(mean, row.variances["test"], self.rows[of].variances["test"], y)
            for of in REFERENCES
        }
        return {
            **scores.of_gaussians(self.means, row.variances, self.targets, self.data.scale),
            "errors": scores.largest_errors(self.errors["test"], row.variances["test"]),
            "nll_minus": gaps,
            "parameters": row.parameters,
            **row.more,
        }

    def _novelty(self, found: dict[str, Tensor]) -> dict[str, Any]:
        outside = [name for name in found if name not in ("validation", "test")]
        return {
            "auroc": {name: scores.auroc(found["test"], found[name]) for name in outside},
            "errors": scores.largest_errors(self.errors["test"], found["test"]),
        }


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Return the network's outputs (N,), float64."""
    return torch.cat([model(part)[:, 0] for part in x.split(1000)]).double()


def _times(values: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: factor * value for name, value in values.items()}


def _rms(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())
