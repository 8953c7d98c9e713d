"""Six small models with data in float64, and a smaller one whose saved states take a few KiB.

Everything here uses public names of laplace_ella, torch and Python alone. Weights and data come from ``random.Random``,
whose stream Python promises to keep, through operations that IEEE arithmetic rounds in one way only, so that they are the
same to the bit on every machine and with every version of torch.

The spectra of the landmarks' gradients are well separated, so that rounding does not turn the directions.
"""

import random
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from models import Residual, RewardModel
from torch import Tensor, nn

import laplace_ella

# Distinct sizes, so that a swapped axis cannot pass.
N, N_VAL, B, M, K = 41, 23, 4, 17, 5
BATCH = 9


def stream(seed, shape):
    draw = random.Random(seed)
    return [draw.random() for _ in range(torch.Size(shape).numel())]


def uniform(seed, *shape, low=-1.0, high=1.0):
    """Return numbers that depend on the seed alone."""
    values = [low + (high - low) * v for v in stream(seed, shape)]
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def integers(seed, n_values, *shape):
    """Return whole numbers from 0 to n_values - 1 that depend on the seed alone."""
    return torch.tensor([int(v * n_values) for v in stream(seed, shape)]).reshape(shape)


def filled(model, seed):
    """Give a model weights and running statistics that depend on the seed alone, and evaluation mode."""
    model = model.double().eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            size = 1.5 / max(1, p[0].numel()) ** 0.5 if p.ndim > 1 else 0.4
            p.copy_(size * uniform(1000 * seed + i, *p.shape))
        for name, b in model.named_buffers():
            if b.is_floating_point():
                b.copy_(uniform(1000 * seed + 500, *b.shape, low=0.5 if "var" in name else -0.5, high=1.5))
    return model


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 3)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x).tanh()).tanh()).tanh())


def rewards():
    """Rewards of options, or of pairs of options; some weights are frozen."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    return RewardModel(net)


class Sequence(nn.Module):
    """Takes a mapping of tokens and a mask; logits (B, 3, C) for each of 3 positions."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, batch):
        h, mask = self.embedding(batch["input_ids"]), batch["attention_mask"][..., None].to(torch.float64)
        mean = (h * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return self.head(self.mix(torch.cat([h, mean.expand_as(h)], -1)).tanh())


def convolution():
    layers = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 2 * 2, 3)
    return nn.Sequential(*layers)


def tokens(seed, n):
    mask = (torch.arange(3) <= integers(seed + 1, 3, n)[:, None]).long()
    return {"input_ids": integers(seed, 7, n, 3), "attention_mask": mask}


@contextmanager
def quiet():
    """Let warnings pass, which other tests look at."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Case:
    """A model, its data, and what the estimator is built, fitted and tuned with."""

    name: str
    likelihood: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any]  # (seed, n) -> inputs of a fit
    targets: Callable[[int, int], Tensor]  # (seed, n) -> targets
    options: dict[str, Any]
    search: dict[str, Any]
    seed: int
    fit: dict[str, Any] = field(default_factory=dict)
    prediction_inputs: Callable[[int, int], Any] | None = None

    def model(self):
        return filled(self.build(), self.seed)

    def batches(self, part, n):
        """Return batches of n inputs; ``part`` says which data they are."""
        x, y = self.inputs(10 * self.seed + part, n), self.targets(10 * self.seed + part, n)
        cuts = [slice(i, i + BATCH) for i in range(0, n, BATCH)]
        if isinstance(x, dict):
            return [{**{k: v[cut] for k, v in x.items()}, "labels": y[cut]} for cut in cuts]
        return [(x[cut], y[cut]) for cut in cuts]

    def x(self):
        """Return B inputs of a prediction."""
        return (self.prediction_inputs or self.inputs)(10 * self.seed + 9, B)

    def estimator(self, **changes):
        options = {"subsample_size": M, "n_eigenvalues": K, "memory_budget": 10**8, "chunk_size": 4}
        options = {**options, **self.options, **changes}
        return laplace_ella.Laplace(self.model(), self.likelihood, "all", "ella", **options)

    def fitted(self, **changes):
        la = self.estimator(**changes)
        with quiet():
            la.fit(self.batches(1, N), **self.fit)
        return la


def vectors(*shape):
    return lambda seed, n: 1.5 * uniform(seed, n, *shape)


def labels(n_values, *shape):
    return lambda seed, n: integers(seed + 5, n_values, n, *shape)


def binary(seed, n):
    return integers(seed + 5, 2, n, 3).double()


# Between them: all likelihoods, residuals, kinds of curvature and of priors, and ranks named and found by a share.
WIDE = {"low": 0.3, "high": 1.2}
MC = {"curvature": "mc", "curvature_samples": 2, "curvature_size": None}
ISOTROPIC = {"residual": "isotropic", "residual_scale": 0.4}
CASES = [
    Case(
        *("mlp", "classification", lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))),
        *(vectors(3), labels(3)),
        options={"curvature_size": 29, "prior_precision": 0.6, "seed": 3},
        search={"temperature": None, "logit_scale": None},
        seed=1,
    ),
    Case(
        *("conv_batchnorm", "classification", convolution, vectors(2, 3, 3), labels(3)),
        options={**MC, "n_eigenvalues": 2, "prior_precision": uniform(70, 6, **WIDE), "temperature": 1.7},
        search={"logit_scale": [0.5, 1.0, 2.0]},
        seed=2,
        fit={"balanced": True},
    ),
    Case(
        *("residual_inplace", "regression", lambda: Residual(3, 7, 5, 2, torch.tanh_)),
        *(vectors(3), vectors(2)),
        options={
            **ISOTROPIC,
            "n_eigenvalues": 0.9,
            "sigma_noise": 0.7,
            "prior_precision": 0.9,
            "prior_mean": 0.1,
        },
        search={
            "temperature": [0.1, 1.0, 10.0],
            "sigma_noise": [0.3, 0.7, 1.5],
            "residual_scale": [0.1, 1.0],
        },
        seed=3,
    ),
    Case(
        *("tied", "bernoulli", Tied, vectors(3), binary),
        options={"residual": "exact", "residual_scale": 0.5, "logit_scale": 1.2, "curvature_size": None},
        search={"prior_precision": [0.1, 1.0, 10.0], "n_eigenvalues": [2, 5], "curvature_size": [9, 41]},
        seed=4,
        fit={"val_steps": 1},
    ),
    Case(
        *("partly_frozen", "reward_modeling", rewards, vectors(2, 3), labels(2)),
        options={
            "prior_precision": uniform(71, 35, **WIDE),
            "prior_mean": uniform(72, 35, low=-0.1, high=0.1),
            "n_eigenvalues": 4,
            "seed": 11,
        },
        search={"temperature": [0.01, 0.1, 1.0, 10.0]},
        seed=5,
        prediction_inputs=vectors(3),
    ),
    Case(
        *("sequence", "classification", Sequence, tokens, labels(3, 3)),
        options={
            **ISOTROPIC,
            "residual_scale": 1.0,
            "residual_samples": 3,
            "prior_precision": 1.3,
            "curvature_size": 19,
        },
        search={"temperature": [0.1, 1.0, 10.0], "residual_scale": [0.01, 1.0]},
        seed=6,
        fit={"landmarks": (tokens(990, M), integers(991, 9, M))},
    ),
]


def small(residual="none"):
    """Return an unfitted estimator whose saved states take a few KiB."""
    model = filled(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), 7)
    options = {"subsample_size": 6, "n_eigenvalues": 3, "prior_precision": 0.7, "temperature": 1.4}
    options |= {"residual": residual, "curvature_size": 9}
    return laplace_ella.Laplace(model, "classification", "all", "ella", **options)


def small_fitted():
    la = small("isotropic")
    x, y = uniform(81, 12, 2), integers(82, 3, 12)
    with quiet():
        la.fit([(x[:7], y[:7]), (x[7:], y[7:])])
        la.calibrate_novelty([uniform(83, 10, 2)])
    return la
