"""The methods of quality.py in groups, each a function of what one seed's methods share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import all_weights
import baselines
import ella_rows
import last_layer
from baselines import Row
from grid_search import searches
from image_data import Data
from torch import Tensor, nn

from laplace_ella.posterior import Linearised

Rows = dict[str, Row]
# Jacobians of whole networks take a while: fewer sets are predicted with them.
N_OTHER_SETS = 2


@dataclass
class Shared:
    """A network with its data, and what several groups need of them."""

    model: nn.Module
    data: Data
    on_device: Data
    outputs: dict[str, baselines.Outputs]
    size: ella_rows.Size
    seed: int
    times: ella_rows.Times
    residual: str  # the kind that features are kept for
    novelty: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def sets(self) -> dict[str, Tensor]:
        return {"test": self.on_device.test[0], **self.on_device.ood}

    @cached_property
    def la(self) -> Any:
        return ella_rows.fitted(self.model, self.on_device, self.size, self.seed, self.times)

    @cached_property
    def kept(self) -> dict[str, list[Linearised]]:
        with self.times.stage("features and residual share", sum(map(len, self.sets.values()))):
            return {name: ella_rows.keep(self.la, x, self.residual) for name, x in self.sets.items()}


def simple(shared: Shared) -> Rows:
    """Tune what needs one forward pass, and no posterior."""
    val, y = shared.outputs["validation"], shared.data.validation[1]
    return {
        name: baselines.row(partial(method, val, y, shared.seed), shared.outputs, y)
        for name, method in baselines.METHODS.items()
    }


def last_layers(shared: Shared) -> Rows:
    """Tune laplace-torch's posteriors over the last layer, with and without a logit scale."""
    train, val = shared.outputs["train"], shared.outputs["validation"]
    labels, y = shared.data.train[1], shared.data.validation[1]
    rows: Rows = {}
    for structure, flavour in last_layer.STRUCTURES.items():
        start = time.perf_counter()
        posterior = last_layer.LastLayer(flavour, shared.model.fc, train, labels)
        roots = last_layer.validation_roots(posterior, val)
        seconds = time.perf_counter() - start
        for name, scales in searches(structure):
            tune = partial(last_layer.tune, posterior, roots, val, y, shared.seed, scales)
            row = baselines.row(tune, shared.outputs, y)
            rows[name] = replace(row, seconds=seconds + row.seconds)
    return rows


def ella(shared: Shared) -> Rows:
    """Tune ELLA in every way, and keep its novelty scores."""
    rows = ella_rows.rows(shared.la, shared.on_device, shared.kept, shared.times)
    la = shared.la
    la.residual = "none"
    ella_rows.apply(la, rows["ELLA (T, s)"].parameters)
    shared.novelty["ELLA residual share"] = {
        name: ella_rows.shares(la, parts).cpu() for name, parts in shared.kept.items()
    }
    shared.novelty["ELLA novelty"] = ella_rows.novelty(la, shared.on_device, shared.kept, shared.times)
    return rows


def sampled(shared: Shared) -> Rows:
    """Tune ELLA with a curvature from sampled labels."""
    return ella_rows.sampled_row(shared.la, shared.size, shared.on_device, shared.kept, shared.times)


def others(name: str, fit: all_weights.Fit, shared: Shared) -> Rows:
    """Tune another posterior over all weights, with the curvature of as many inputs."""
    x, y = (t[: shared.size.curvature_size] for t in shared.on_device.train)
    sets = dict(list(shared.sets.items())[: 1 + N_OTHER_SETS])
    scale = len(shared.on_device.train[1]) / len(y)
    return all_weights.rows(
        name, fit, shared.model, (x, y), scale, shared.on_device.validation, sets, shared.seed
    )


def of_all_weights(shared: Shared) -> Rows:
    return others("all-weights diagonal", all_weights.diagonal, shared)


def of_kfac(shared: Shared) -> Rows:
    return others("all-weights KFAC", all_weights.kron, shared)


def of_host(shared: Shared) -> Rows:
    size = {key: value for key, value in asdict(shared.size).items() if key != "curvature_size"}
    return others("laplace-torch's ELLA (T)", partial(all_weights.host_ella, size=size), shared)


GROUPS: dict[str, Callable[[Shared], Rows]] = {
    "simple": simple,
    "last-layer": last_layers,
    "diagonal": of_all_weights,
    "kfac": of_kfac,
    "host": of_host,
    "ella": ella,
    "sampled": sampled,
}
