"""What ELLA is compared with: methods that need the network's logits and last hidden layer only.

Each is tuned on the validation NLL. Where a method has a variance, probabilities are the mean
softmax over 128 quasi-random samples of the logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.studies.common import scores
from benchmarks.studies.common.scores import entropy, nll

N_SAMPLES = 128
REFERENCES = ("MAP", "temperature scaling")
# Of the logits, on the grids of methods that are not ELLA's; refined, so that it can leave their range.
SCALES = (0.4, 0.5, 0.63, 0.79, 1.0, 1.26)


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gives: logits f (N, C) and inputs z (N, D) of the last layer; float64, on the CPU."""

    f: Tensor
    z: Tensor


@dataclass(frozen=True)
class Tuned:
    """A method with its parameters set."""

    probabilities: Callable[[Outputs], Tensor]
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A method's class probabilities of each set of inputs, and how it was tuned."""

    probabilities: dict[str, Tensor]
    parameters: dict[str, Any]
    seconds: float  # of fit and tuning
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor, batch: int = 500) -> Outputs:
    """Run the network, and keep what enters its last layer ``fc``."""
    kept: list[Tensor] = []
    hook = model.fc.register_forward_pre_hook(lambda _, entered: kept.append(entered[0].double().cpu()))
    try:
        f = torch.cat([model(part).double().cpu() for part in x.split(batch)])
    finally:
        hook.remove()
    return Outputs(f, torch.cat(kept))


def plain(val: Outputs, y: Tensor, seed: int) -> Tuned:
    """Return MAP: the network as trained."""
    return Tuned(lambda out: out.f.softmax(1), {})


def temperature_scaling(val: Outputs, y: Tensor, seed: int) -> Tuned:
    """Divide the logits by one number."""
    best = minimum_on_line(lambda t: float(cross_entropy(val.f / t, y)), -2, 2)
    return Tuned(lambda out: (out.f / best).softmax(1), {"divisor": best})


def vector_scaling(val: Outputs, y: Tensor, seed: int) -> Tuned:
    """Scale and shift each logit, 2 C numbers."""
    n_outputs = val.f.shape[1]
    scale = torch.ones(n_outputs, dtype=val.f.dtype, requires_grad=True)
    shift = torch.zeros_like(scale, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scale, shift], max_iter=500, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(scale * val.f + shift, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    w, b = scale.detach(), shift.detach()
    return Tuned(lambda out: (w * out.f + b).softmax(1), {"scale": w.tolist(), "shift": b.tolist()})


def of_ones(out: Outputs) -> Tensor:
    """Give every logit of every input the same variance (N,)."""
    return torch.ones_like(out.z[:, 0])


def of_last_layer(out: Outputs) -> Tensor:
    """Give every logit a variance in proportion to the squared norm of the last layer's input plus 1 (N,)."""
    return out.z.square().sum(1) + 1


def variance(
    val: Outputs,
    y: Tensor,
    seed: int,
    shape: Callable[[Outputs], Tensor],
    scales: tuple[float, ...] = (1.0,),
) -> Tuned:
    """Scale a variance, and the logits too if several scales are given to start from."""
    noise = quasi_normal(N_SAMPLES, val.f.shape[1], seed).to(val.f)

    def probabilities(out: Outputs, size: float, scale: float) -> Tensor:
        width = (size * shape(out)).sqrt()[:, None]
        return mean_softmax(scale * out.f, (width * sample for sample in noise))

    def loss(size: float, scale: float) -> float:
        return float(nll(probabilities(val, size, scale), y).mean())

    def of_size(scale: float) -> tuple[float, float, float]:
        size = minimum_on_line(lambda v: loss(v, scale), -6, 4)
        return loss(size, scale), size, scale

    best = min(of_size(scale) for scale in scales)
    for _ in range(3 if len(scales) > 1 else 0):
        _, size, scale = best
        middle = math.log10(scale)
        best = of_size(minimum_on_line(partial(loss, size), middle - 0.25, middle + 0.25))
    _, size, scale = best
    found = {"variance": size} | ({"logit_scale": scale} if len(scales) > 1 else {})
    return Tuned(lambda out: probabilities(out, size, scale), found)


@lru_cache(maxsize=8)
def quasi_normal(n_samples: int, dimension: int, seed: int) -> Tensor:
    """Draw quasi-random standard normal points (S, D), float64: a scrambled Sobol sequence, as the package's link has."""
    engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed)
    # The engine rounds the first of its points to the default dtype.
    first = engine.quasi.to(torch.float32).double() / 2**engine.MAXBIT
    points = engine.draw(n_samples, dtype=torch.float64)
    points[0] = first
    # Scrambled points lie on a grid of 2^-30 and may be 0, whose quantile is infinite.
    return torch.special.ndtri(points * (1 - 2**-30) + 2**-31)


def mean_softmax(f: Tensor, offsets: Iterable[Tensor]) -> Tensor:
    """Average the softmax of f (N, C) plus each of the offsets (N, C)."""
    total, n = torch.zeros_like(f), 0
    for offset in offsets:
        total += (f + offset).softmax(-1)
        n += 1
    return total / n


def minimum_on_line(loss: Callable[[float], float], low: float, high: float) -> float:
    """Return the positive number with the smallest loss: a grid in powers of ten, four a decade, refined twice.

    Powers from ``low`` to ``high``; the last grid has 196 values a decade.
    """
    step = 0.25
    powers = torch.arange(low, high + step / 2, step, dtype=torch.float64).tolist()
    for _ in range(3):
        best = min(powers, key=lambda power: _finite(loss(10**power)))
        step /= 7
        powers = [best + step * k for k in range(-7, 8)]
    return 10**best


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def row(tune: Callable[[], Tuned], outputs: dict[str, Outputs], y_val: Tensor) -> Row:
    """Tune a method, and let it predict every set but the training inputs."""
    start = time.perf_counter()
    tuned = tune()
    seconds = time.perf_counter() - start
    found = {name: tuned.probabilities(out) for name, out in outputs.items() if name != "train"}
    score = float(nll(found.pop("validation"), y_val).mean())
    return Row(found, tuned.parameters, seconds, more={"validation_nll": score})


def scored(rows: dict[str, Row], y: Tensor, chosen: Tensor | slice = slice(None)) -> dict[str, Any]:
    """Return each method's scores on chosen test inputs, and how its NLL differs from those of the two references."""
    found, test = {}, {name: row.probabilities["test"][chosen] for name, row in rows.items()}
    for name, row in rows.items():
        others = {of: p for of, p in row.probabilities.items() if of != "test"}
        gaps = {other: scores.difference(test[name], test[other], y[chosen]) for other in REFERENCES}
        found[name] = {
            **scores.of_probabilities(test[name], y[chosen], others),
            "nll_minus": gaps,
            "parameters": row.parameters,
            "seconds": row.seconds,
            "notes": row.notes,
            **row.more,
        }
    return found


METHODS: dict[str, Callable[[Outputs, Tensor, int], Tuned]] = {
    "MAP": plain,
    "temperature scaling": temperature_scaling,
    "vector scaling": vector_scaling,
    "constant variance (T)": partial(variance, shape=of_ones),
    "constant variance (T, s)": partial(variance, shape=of_ones, scales=SCALES),
    "last-layer variance (T)": partial(variance, shape=of_last_layer),
    "last-layer variance (T, s)": partial(variance, shape=of_last_layer, scales=SCALES),
}


def novelty_scores(train: Outputs, scaling: float) -> dict[str, Callable[[Outputs], Tensor]]:
    """Return scores (N,) of one forward pass each, larger where an input is less like the training data.

    But for the squared norm, which is smaller there: reports show its negative.

    Parameters
    ----------
    train : Outputs
        Of the training inputs.
    scaling : float
        What temperature scaling divides the logits by.
    """
    centre = train.z.mean(0)
    _, _, directions = torch.linalg.svd(train.z - centre, full_matrices=False)
    leading = directions[:20].mT

    def residual_share(out: Outputs) -> Tensor:
        z = out.z - centre
        return 1 - (z @ leading).square().sum(1) / z.square().sum(1)

    return {
        "entropy of MAP": lambda out: entropy(out.f.softmax(1)),
        "energy": lambda out: -out.f.logsumexp(1),
        "entropy after temperature scaling": lambda out: entropy((out.f / scaling).softmax(1)),
        "penultimate residual share": residual_share,
        "last-layer squared norm": lambda out: out.z.square().sum(1),
    }
