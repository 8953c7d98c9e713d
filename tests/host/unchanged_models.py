"""Six small models with data in float64, and all the numbers that an estimator gives for them.

Everything here uses public names of laplace_ella, torch and Python alone. Weights and data come from ``random.Random``,
whose stream Python promises to keep, through operations that IEEE arithmetic rounds in one way only, so that they are the
same to the bit on every machine and with every version of torch.

The spectra of the landmarks' gradients are well separated (the least gap between neighbouring eigenvalues up to the K-th
is named by :func:`least_gap`), so that rounding does not turn the directions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import laplace_ella

# Distinct sizes, so that a swapped axis cannot pass.
N, N_VAL, B, M, K = 41, 23, 4, 17, 5
BATCH = 9
LINKS = ("probit", "mc", "bridge", "bridge_norm")
RESIDUALS = ("none", "isotropic", "exact")
Numbers = dict[str, Any]


# ---------------------------------------------------------------------- models and data


def uniform(seed: int, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Return numbers that depend on the seed alone."""
    draw = random.Random(seed)
    n = torch.Size(shape).numel()
    values = [low + (high - low) * draw.random() for _ in range(n)]
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def integers(seed: int, n_values: int, *shape: int) -> Tensor:
    """Return whole numbers from 0 to n_values - 1 that depend on the seed alone."""
    draw = random.Random(seed)
    n = torch.Size(shape).numel()
    return torch.tensor([int(draw.random() * n_values) for _ in range(n)]).reshape(shape)


def filled(model: nn.Module, seed: int) -> nn.Module:
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


class Residual(nn.Module):
    """A residual block with in-place activations and an in-place sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Linear(3, 7), nn.Linear(7, 5)
        self.second, self.head = nn.Linear(5, 7), nn.Linear(7, 2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).tanh()
        out = self.second(self.relu(self.first(h)))
        out += h
        return self.head(out.tanh_())


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), nn.Linear(6, 3)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x).tanh()).tanh()).tanh())


class Rewards(nn.Module):
    """Rewards (B, 1) of options (B, 3), or (B, 2) of pairs of options (B, 2, 3); some weights are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
        self.net[0].weight.requires_grad_(False)
        self.net[2].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(0, 1)).reshape(len(x), 2) if x.ndim == 3 else self.net(x)


class Sequence(nn.Module):
    """Takes a mapping of tokens and a mask; logits (B, 3, C) for each of 3 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        h, mask = self.embedding(batch["input_ids"]), batch["attention_mask"][..., None].to(torch.float64)
        mean = (h * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return self.head(self.mix(torch.cat([h, mean.expand_as(h)], -1)).tanh())


def convolution() -> nn.Module:
    layers = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 2 * 2, 3)
    return nn.Sequential(*layers)


def tokens(seed: int, n: int) -> dict[str, Tensor]:
    mask = (torch.arange(3) <= integers(seed + 1, 3, n)[:, None]).long()
    return {"input_ids": integers(seed, 7, n, 3), "attention_mask": mask}


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

    def model(self) -> nn.Module:
        return filled(self.build(), self.seed)

    def batches(self, part: int, n: int) -> list[Any]:
        """Return batches of n inputs; ``part`` says which data they are."""
        x, y = self.inputs(10 * self.seed + part, n), self.targets(10 * self.seed + part, n)
        cuts = [slice(i, i + BATCH) for i in range(0, n, BATCH)]
        if isinstance(x, dict):
            return [{**{k: v[cut] for k, v in x.items()}, "labels": y[cut]} for cut in cuts]
        return [(x[cut], y[cut]) for cut in cuts]

    def x(self) -> Any:
        """Return B inputs of a prediction."""
        return (self.prediction_inputs or self.inputs)(10 * self.seed + 9, B)

    def estimator(self, **changes: Any) -> Any:
        options = {"subsample_size": M, "n_eigenvalues": K, "memory_budget": 10**8, "chunk_size": 4}
        options = {**options, **self.options, **changes}
        return laplace_ella.Laplace(self.model(), self.likelihood, "all", "ella", **options)

    def fitted(self, **changes: Any) -> Any:
        la = self.estimator(**changes)
        with quiet():
            la.fit(self.batches(1, N), **self.fit)
        return la


def vectors(*shape: int) -> Callable[[int, int], Tensor]:
    return lambda seed, n: 1.5 * uniform(seed, n, *shape)


def labels(n_values: int, *shape: int) -> Callable[[int, int], Tensor]:
    return lambda seed, n: integers(seed + 5, n_values, n, *shape)


def binary(seed: int, n: int) -> Tensor:
    return integers(seed + 5, 2, n, 3).double()


# Between them: all likelihoods, residuals, kinds of curvature and of priors, and ranks named and found by a share.
CASES = [
    Case(
        name="mlp",
        likelihood="classification",
        build=lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)),
        inputs=vectors(3),
        targets=labels(3),
        options={"curvature_size": 29, "prior_precision": 0.6, "seed": 3},
        search={"temperature": None, "logit_scale": None},
        seed=1,
    ),
    Case(
        name="conv_batchnorm",
        likelihood="classification",
        build=convolution,
        inputs=vectors(2, 3, 3),
        targets=labels(3),
        options={
            "curvature": "mc",
            "curvature_samples": 2,
            "curvature_size": None,
            "n_eigenvalues": 2,
            "prior_precision": uniform(70, 6, low=0.3, high=1.2),
            "temperature": 1.7,
        },
        search={"logit_scale": [0.5, 1.0, 2.0]},
        seed=2,
        fit={"balanced": True},
    ),
    Case(
        name="residual_inplace",
        likelihood="regression",
        build=Residual,
        inputs=vectors(3),
        targets=vectors(2),
        options={
            "n_eigenvalues": 0.9,
            "sigma_noise": 0.7,
            "residual": "isotropic",
            "residual_scale": 0.4,
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
        name="tied",
        likelihood="bernoulli",
        build=Tied,
        inputs=vectors(3),
        targets=binary,
        options={"residual": "exact", "residual_scale": 0.5, "logit_scale": 1.2, "curvature_size": None},
        search={"prior_precision": [0.1, 1.0, 10.0], "n_eigenvalues": [2, 5], "curvature_size": [9, 41]},
        seed=4,
        fit={"val_steps": 1},
    ),
    Case(
        name="partly_frozen",
        likelihood="reward_modeling",
        build=Rewards,
        inputs=vectors(2, 3),
        targets=labels(2),
        options={
            "prior_precision": uniform(71, 35, low=0.3, high=1.2),
            "prior_mean": uniform(72, 35, low=-0.1, high=0.1),
            "n_eigenvalues": 4,
            "seed": 11,
        },
        search={"temperature": [0.01, 0.1, 1.0, 10.0]},
        seed=5,
        prediction_inputs=vectors(3),
    ),
    Case(
        name="sequence",
        likelihood="classification",
        build=Sequence,
        inputs=tokens,
        targets=labels(3, 3),
        options={
            "residual": "isotropic",
            "residual_samples": 3,
            "prior_precision": 1.3,
            "curvature_size": 19,
        },
        search={"temperature": [0.1, 1.0, 10.0], "residual_scale": [0.01, 1.0]},
        seed=6,
        fit={"landmarks": (tokens(990, M), integers(991, 9, M))},
    ),
]


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


# ---------------------------------------------------------------------- the numbers


@contextmanager
def quiet() -> Iterator[None]:
    """Let warnings pass, which other tests look at."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(17)


def numbers_of(c: Case) -> Numbers:
    """Return everything by name. Names that start with "seeded" depend on torch's random streams too."""
    la = c.fitted()
    found: Numbers = {}
    parts = [of_fit, of_posterior, of_predictions, of_samples, of_evidence, of_prior_tuning, of_joint_tuning]
    parts += [of_early_stopping, of_more_data, of_novelty, of_backprop, of_backends, of_words]
    with quiet():
        for part in parts:
            for name, value in part(c, deepcopy(la)).items():
                first, _, rest = name.partition(" ")
                key = (
                    f"seeded {part.__name__[3:]} {rest}"
                    if first == "seeded"
                    else f"{part.__name__[3:]} {name}"
                )
                found[key] = value
    return found


def of_fit(c: Case, la: Any) -> Numbers:
    basis = la.basis
    phi, f = la.backend.jacobians(c.x())
    snapshots = {f"snapshot {n}": G for n, G in la.snapshots}
    return {
        "H": la.H,
        "eigenvalues": basis.eigenvalues,
        "spectrum": basis.spectrum / basis.trace,
        "trace": basis.trace,
        "retained": basis.retained,
        "rank": basis.rank,
        "landmarks": basis.n_landmarks,
        "loss": la.loss,
        "counts": [la.n_data, la.n_predictions, la.n_outputs, la.n_curvature, la.n_params, la.n_layers],
        "mean": la.mean,
        "history": la.fit_history_["processed_examples"],
        **snapshots,
        **{f"direction {k}": v for k, v in basis.directions.items()},
        "features": phi,
        "outputs": f,
    }


def of_posterior(c: Case, la: Any) -> Numbers:
    phi, _ = la.backend.jacobians(c.x())
    return {
        "precision": la.posterior_precision,
        "scale": la.posterior_scale,
        "covariance": la.posterior_covariance,
        "functional variance": la.functional_variance(phi),
        "functional covariance": la.functional_covariance(phi),
        "residual variance": la.residual_variance,
        "hyperparameters": [float(la.temperature), float(la.sigma_noise), la.logit_scale, la.residual_scale],
        "prior": la.prior_precision,
        "share outside": la.residual_share(c.x()),
        "captured trace": la.approximation_error(c.x()).captured_trace,
        "covariance error": la.approximation_error(c.x(), c.batches(1, N)).covariance_error,
    }


def residuals(la: Any) -> Iterator[str]:
    """Give an estimator with a scalar prior every residual in turn."""
    for residual in RESIDUALS if la.prior_precision.numel() == 1 else ("none",):
        la.residual = residual
        yield residual


def of_predictions(c: Case, la: Any) -> Numbers:
    found: Numbers = {}
    for residual in residuals(la):
        if c.likelihood in ("regression", "reward_modeling"):
            for flags in ({}, {"joint": True}, {"diagonal_output": True}):
                mean, spread = la(c.x(), **flags)
                name = f"{residual} {''.join(flags)}"
                found |= {f"{name} mean": mean, f"{name} spread": spread}
        for link in links(c):
            seeded = "seeded " if link == "mc" else ""
            x = c.x() if c.prediction_inputs is None else c.inputs(58, B)
            found[f"{seeded}{residual} {link}"] = la(x, link_approx=link, n_samples=30, fitting=True)
        if links(c):
            found[f"seeded {residual} mc diagonal"] = la(
                x, link_approx="mc", diagonal_output=True, n_samples=30, fitting=True
            )
            found[f"seeded {residual} mc generator"] = la(
                x, link_approx="mc", n_samples=30, fitting=True, generator=generator()
            )
    return {k: v for k, v in found.items() if isinstance(v, Tensor)}


def links(c: Case) -> tuple[str, ...]:
    """Return the links that a likelihood has."""
    return {"regression": (), "bernoulli": ("probit", "mc")}.get(c.likelihood, LINKS)


def of_samples(c: Case, la: Any) -> Numbers:
    found: Numbers = {}
    for residual in residuals(la):
        own = {
            "weights": la.sample(3, generator=generator()),
            "functions": la.functional_samples(c.x(), n_samples=3, generator=generator()),
            "independent": la.functional_samples(
                c.x(), n_samples=3, diagonal_output=True, generator=generator()
            ),
            "functions nn": la.functional_samples(c.x(), "nn", n_samples=3, generator=generator()),
            "predictive": la.predictive_samples(c.x(), n_samples=3, generator=generator()),
            "predictive nn": la.predictive_samples(c.x(), "nn", n_samples=3, generator=generator()),
        }
        of_networks = la(c.x(), pred_type="nn", link_approx="mc", n_samples=3, generator=generator())
        own |= {f"nn {i}": value for i, value in enumerate(as_tuple(of_networks))}
        found |= {f"seeded {residual} {k}": v for k, v in own.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(23)
        return {**found, "seeded of torch's own generator": la.sample(2)}


def of_evidence(c: Case, la: Any) -> Numbers:
    found = {
        "likelihood": la.log_likelihood,
        "scatter": la.scatter,
        "log det ratio": la.log_det_ratio,
        "log det prior": la.log_det_prior_precision,
        "log det posterior": la.log_det_posterior_precision,
        "evidence": la.log_marginal_likelihood(),
    }
    prior = (1.1 * la.prior_precision.detach()).requires_grad_()
    noise = (0.9 * la.sigma_noise.detach()).requires_grad_()
    arguments = (prior, noise) if c.likelihood == "regression" else (prior,)
    evidence = la.log_marginal_likelihood(*arguments)
    gradients = torch.autograd.grad(evidence, arguments)
    return {**found, "elsewhere": evidence, **{f"gradient {i}": g for i, g in enumerate(gradients)}}


def as_tuple(prediction: Any) -> tuple[Tensor, ...]:
    return prediction if isinstance(prediction, tuple) else (prediction,)


def tuned(la: Any) -> list[float]:
    return [float(la.temperature), float(la.sigma_noise), la.logit_scale, la.residual_scale]


def of_prior_tuning(c: Case, la: Any) -> Numbers:
    found: Numbers = {}
    by_evidence = deepcopy(la)
    structure = {"conv_batchnorm": "layerwise", "partly_frozen": "diag"}.get(c.name, "scalar")
    by_evidence.optimize_prior_precision(n_steps=15, prior_structure=structure, init_prior_prec=0.8)
    found["evidence"] = by_evidence.prior_precision
    val = c.batches(2, N_VAL)
    by_grid = deepcopy(la)
    by_grid.optimize_prior_precision(method="gridsearch", val_loader=val, grid_size=7)
    found |= {"grid": by_grid.prior_precision, "grid setting": tuned(by_grid)}
    if c.name == "mlp":
        for name, options in {
            "mc": {"link_approx": "mc"},
            "nn": {"pred_type": "nn", "link_approx": "mc"},
        }.items():
            other = deepcopy(la)
            other.optimize_prior_precision(
                method="gridsearch", val_loader=val, grid_size=2, n_samples=5, **options
            )
            found |= {f"seeded {name}": other.prior_precision, f"seeded {name} setting": tuned(other)}
    return found


def of_joint_tuning(c: Case, la: Any) -> Numbers:
    found: Numbers = {}
    val = c.batches(2, N_VAL)
    for link in ("probit", "mc") if c.name == "mlp" else ("probit",):
        other = deepcopy(la)
        search = {"temperature": [0.1, 1.0, 10.0]} if link == "mc" else c.search
        result = other.optimize_hyperparameters(val, search, link_approx=link, n_samples=16)
        own = {
            "best": [float(v) for v in vars(result.best).values() if v is not None],
            "score": result.score,
            "searched": list(result.searched),
            "first scores": [score for _, score in result.table[:12]],
            "inputs": result.n_inputs,
            "loss": result.loss,
            "applied": result.applied,
            "setting": tuned(other),
            "prior": other.prior_precision,
            "H": other.H,
            "prediction": as_tuple(other(c.x()))[-1],
        }
        for name, baseline in result.baselines.items():
            own |= {f"baseline {name}": baseline is not None}
            if baseline is not None:
                own |= {
                    f"baseline {name} score": baseline.score,
                    f"baseline {name} difference": baseline.difference,
                    f"baseline {name} error": baseline.standard_error,
                    f"baseline {name} parameters": sorted(baseline.parameters),
                    f"baseline {name} values": [float(v) for v in baseline.parameters.values()],
                }
        seeded = "seeded " if link == "mc" else ""
        found |= {f"{seeded}{link} {k}": v for k, v in own.items()}
    return found


def of_early_stopping(c: Case, la: Any) -> Numbers:
    la = c.estimator(temperature=None)
    options = {k: v for k, v in c.fit.items() if k != "val_steps"}
    la.fit(c.batches(1, N), val_loader=c.batches(2, N_VAL), val_steps=2, **options)
    return {
        "history": [float(v) for values in la.fit_history_.values() for v in values],
        "n": la.n_curvature,
        "H": la.H,
        "setting": tuned(la),
        "prior": la.prior_precision,
        "evidence": la.log_marginal_likelihood(),
    }


def of_more_data(c: Case, la: Any) -> Numbers:
    """Return what override=False, merge, forget, basis=, max_samples and n_total give."""

    def sums(la: Any) -> Numbers:
        return {"H": la.H, "loss": la.loss, "counts": [la.n_data, la.n_predictions, la.n_curvature]}

    found: Numbers = {}
    added = deepcopy(la)
    added.fit(c.batches(3, 13), override=False)
    found |= {f"added {k}": v for k, v in sums(added).items()}
    whole = c.estimator(curvature_size=1000, curvature="exact")
    whole.fit(c.batches(1, N), **c.fit)
    other = c.estimator(curvature_size=1000, curvature="exact")
    other.fit(c.batches(3, 13), basis=whole.basis)
    whole.merge(other)
    found |= {f"merged {k}": v for k, v in sums(whole).items()}
    whole.forget(c.batches(1, N)[:2])
    found |= {f"remaining {k}": v for k, v in sums(whole).items()}
    part = c.estimator()
    part.fit(c.batches(1, N), max_samples=31, n_total=500, **c.fit)
    return {**found, **{f"of a sample {k}": v for k, v in sums(part).items()}}


def of_novelty(c: Case, la: Any) -> Numbers:
    if c.likelihood in ("regression", "reward_modeling"):
        return {"uncalibrated": la.novelty(c.x())}
    la.calibrate_novelty(c.batches(4, 3 * N))
    return {"seeded calibrated": la.novelty(c.x())}


def of_backprop(c: Case, la: Any) -> Numbers:
    """Return the gradients of predictions in the inputs."""
    x = c.x()
    if isinstance(x, dict):
        return {}
    la = c.fitted(enable_backprop=True, residual="none")
    x.requires_grad_()
    total = sum((i + 1) * (p * uniform(60, *p.shape)).sum() for i, p in enumerate(as_tuple(la(x))))
    return {"gradient": torch.autograd.grad(total, x)[0]}


def of_backends(c: Case, la: Any) -> Numbers:
    """Return what the other ways to differentiate the model give."""
    if c.name != "mlp":
        return {}
    own = laplace_ella.ReverseNystromGGN, laplace_ella.BackPackNystromGGN, laplace_ella.AsdlNystromGGN
    changes: list[dict[str, Any]] = [{"backend": backend} for backend in own]
    changes += [{"autodiff": mode} for mode in ("forward", "double", "reverse")]
    found: Numbers = {}
    for change in changes:
        other = c.fitted(**change)
        name = " ".join(getattr(v, "__name__", v) for v in change.values())
        found |= {f"{name} H": other.H, f"{name} features": other.backend.jacobians(c.x())[0]}
    return found


def of_words(c: Case, la: Any) -> Numbers:
    plan = c.estimator(n_eigenvalues=K).plan(c.batches(1, N), verbose=False)
    counts = [plan.n_data, plan.n_outputs, plan.n_params, plan.n_landmarks, plan.rank, plan.n_curvature]
    return {
        "repr": repr(la),
        "repr unfitted": repr(c.estimator()),
        "arguments": list(la.get_params()),
        "plan counts": counts,
        "plan mode": plan.mode,
        "plan stages": [stage.name for stage in plan.stages],
        "plan forwards": [float(stage.forwards) for stage in plan.stages],
        "plan bytes": [stage.n_bytes for stage in plan.stages],
        "plan budget": plan.budget,
    }


def least_gap(la: Any) -> float:
    """Return the least difference between neighbouring eigenvalues up to the K-th, and the next, over the largest."""
    first = la.basis.spectrum[: la.basis.rank + 1]
    return float((first[:-1] - first[1:]).min() / first[0])


# ---------------------------------------------------------------------- checkpoints


def small(residual: str = "none") -> Any:
    """Return an unfitted estimator whose saved states take a few KiB."""
    model = filled(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), 7)
    options = {"subsample_size": 6, "n_eigenvalues": 3, "prior_precision": 0.7, "temperature": 1.4}
    options |= {"residual": residual, "curvature_size": 9}
    return laplace_ella.Laplace(model, "classification", "all", "ella", **options)


def small_fitted() -> Any:
    la = small("isotropic")
    x, y = uniform(81, 12, 2), integers(82, 3, 12)
    with quiet():
        la.fit([(x[:7], y[:7]), (x[7:], y[7:])])
        la.calibrate_novelty([uniform(83, 10, 2)])
    return la


def of_small(la: Any) -> Numbers:
    """Return what a loaded state has to give."""
    x = uniform(84, 3, 2)
    return {
        "probit": la(x),
        "bridge": la(x, link_approx="bridge"),
        "share outside": la.residual_share(x),
        "evidence": la.log_marginal_likelihood(),
        "H": la.H,
        "loss": la.loss,
        "hyperparameters": [float(la.temperature), float(la.prior_precision), la.residual_scale],
        "counts": [la.n_data, la.n_predictions, la.n_outputs, la.n_curvature, la.subsample_size],
        "residual": la.residual,
        "repr": repr(la),
        "seeded novelty": la.novelty(x),
        "history": la.fit_history_["processed_examples"],
    }
