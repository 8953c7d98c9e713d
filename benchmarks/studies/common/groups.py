"""The methods in groups, each a function of what one seed's methods share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from benchmarks.studies.common import all_weights, baselines, ella, last_layer
from benchmarks.studies.common.baselines import Row
from benchmarks.studies.common.grid_search import searches
from benchmarks.studies.common.images import Data

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
    size: ella.Size
    seed: int
    times: ella.Times
    residual: bool = True  # whether it is of interest
    novelty: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def sets(self) -> dict[str, Tensor]:
        return {"test": self.on_device.test[0], **self.on_device.ood}

    @cached_property
    def la(self) -> Any:
        return ella.fitted(self.model, self.on_device, self.size, self.seed, self.times)

    @cached_property
    def kept(self) -> dict[str, ella.Kept]:
        shares: dict[str, Tensor | None] = dict.fromkeys(self.sets)
        if self.residual:
            with self.times.stage("features and residual share", sum(map(len, self.sets.values()))):
                shares = {name: ella.shares(self.la, x) for name, x in self.sets.items()}
        return {name: ella.keep(self.la, x, shares[name]) for name, x in self.sets.items()}


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


def of_ella(shared: Shared) -> Rows:
    """Tune ELLA in every way, and keep its novelty scores."""
    rows = ella.rows(shared.la, shared.on_device, shared.kept, shared.times)
    la = shared.la
    la.residual = "none"
    ella.apply(la, rows["ELLA (T, s)"].parameters)
    shared.novelty["ELLA residual share"] = {name: one.share.cpu() for name, one in shared.kept.items()}
    shared.novelty["ELLA novelty"] = ella.novelty(la, shared.on_device, shared.sets, shared.times)
    return rows


def sampled(shared: Shared) -> Rows:
    """Tune ELLA with a curvature from sampled labels."""
    return ella.sampled_row(shared.la, shared.size, shared.on_device, shared.kept, shared.times)


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
    "ella": of_ella,
    "sampled": sampled,
}
