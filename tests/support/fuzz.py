"""Random configurations of the whole package against a dense oracle.

    python tests/fuzz.py [--count 200] [--seed 0] [--start 0] [--only NUMBER] [--keep-going]

A configuration follows from a seed and a number; what fails prints the line that repeats it alone.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz_networks import Draw, Network, make_network
from fuzz_oracle import (
    F64,
    Dense,
    bridge,
    curvature,
    evidence,
    loss,
    mapped,
    monte_carlo,
    probit,
    residual_of_directions,
)
from laplace.curvature import AsdlGGN, BackPackGGN, CurvlinopsGGN
from torch import Tensor

from laplace_ella import ELLALaplace, NystromGGN, ReverseNystromGGN

# What a number may be off by, as a share of the largest of its kind: roundings of a few layers.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3, torch.bfloat16: 0.35}
BACKENDS = {"CurvlinopsGGN": CurvlinopsGGN, "BackPackGGN": BackPackGGN, "AsdlGGN": AsdlGGN}
BACKENDS |= {"NystromGGN": NystromGGN, "ReverseNystromGGN": ReverseNystromGGN}


class Refused(Exception):
    """A library that was asked for says that it cannot do a model."""


@dataclass
class Config:
    """One configuration: a network, data, and options of estimator and fit."""

    network: Network
    likelihood: str
    dtype: torch.dtype
    n_outputs: int
    batches: list[tuple[Any, Tensor]]
    x: Any
    n_test: int
    landmarks: tuple[Any, Tensor] | None
    parts: list[int]  # how many batches are in each call of fit
    options: dict[str, Any]
    fit_options: dict[str, Any]
    in_training: bool
    spills: bool

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    def __str__(self) -> str:
        chosen = {
            k: (tuple(v.shape) if isinstance(v, Tensor) and v.numel() > 1 else v)
            for k, v in self.options.items()
        }
        n = sum(len(y) for _, y in self.batches)
        pairs = None if self.landmarks is None else len(self.landmarks[1])
        return (
            f"{self.network.family}, {self.likelihood}, {self.dtype}, C={self.n_outputs}, N={n}, "
            f"batches={[len(y) for _, y in self.batches]}, parts={self.parts}, landmarks={pairs}, {chosen}, {self.fit_options}"
        )


def draw_config(seed: int, number: int) -> Config:
    """Draw configuration ``number`` of a seed."""
    draw = Draw(f"{seed}/{number}")
    generator = torch.Generator().manual_seed(draw.getrandbits(31))
    dtype = draw.choices((torch.float64, torch.float32, torch.bfloat16), (6, 3, 1))[0]
    likelihood = draw.choice(
        ("classification", "regression", "bernoulli", "classification", "reward_modeling")
    )
    least = 2 if likelihood in ("classification", "reward_modeling") else 1
    n_outputs = draw.randint(least, 5)
    network = make_network(draw, n_outputs, dtype)
    sizes = draw_sizes(draw)
    key_y = draw.choice(("labels", "y")) if network.family == "tokens" else "labels"
    one_hot = draw.maybe(0.15)
    of_inputs = draw.choice((dtype, F64)) if dtype != F64 else F64

    def some(n: int, length: int) -> Any:
        x = network.inputs(n, generator, length)
        return x if isinstance(x, dict) else x.to(dtype).to(of_inputs)

    lengths = [draw.randint(2, 5)] * len(sizes) if draw.maybe(0.6) else [draw.randint(2, 6) for _ in sizes]
    batches = []
    for n, length in zip(sizes, lengths):
        x = some(n, length)
        y = targets(network, x, likelihood, one_hot, generator)
        if isinstance(x, dict):
            x[key_y] = y
        batches.append((x, y))
    n_test = draw.choice((1, 2, 5))
    x_test = some(n_test, lengths[0])
    n_params = sum(p.numel() for p in network.module.parameters() if p.requires_grad)
    landmarks = None
    if draw.maybe(0.6):
        m = draw.choice((1, 3, 7, 11))
        x = some(m, lengths[0])
        n_coordinates = count(network, x)
        landmarks = x, torch.randint(n_coordinates, (m,), generator=generator)
    options, spills = draw_options(draw, likelihood, dtype, network, n_params, generator)
    if network.family == "tokens":
        options |= {"dict_key_x": network.module.body.key, "dict_key_y": key_y}
    pairs = sum(count(network, x) * len(y) for x, y in batches)
    if landmarks is None:
        options["subsample_size"] = pairs if draw.maybe(0.6) else draw.choice((1, 2, 5, 13))
    parts = [len(sizes)]
    if len(sizes) > 1 and draw.maybe(0.2):
        first = draw.randint(1, len(sizes) - 1)
        parts = [first, len(sizes) - first]
    fit_options: dict[str, Any] = {}
    by_class = likelihood in ("classification", "reward_modeling") and not network.positions
    if landmarks is None and by_class and draw.maybe(0.2):
        fit_options["balanced"] = True
    if draw.maybe(0.1) and len(parts) == 1:
        fit_options["n_total"] = 2 * sum(sizes)
    return Config(
        network=network,
        likelihood=likelihood,
        dtype=dtype,
        n_outputs=n_outputs,
        batches=batches,
        x=x_test,
        n_test=n_test,
        landmarks=landmarks,
        parts=parts,
        options=options,
        fit_options=fit_options,
        in_training=draw.maybe(0.5),
        spills=spills,
    )


def draw_sizes(draw: Draw) -> list[int]:
    """Draw the sizes of batches: equal but for the last, or any."""
    n, b = draw.choice((1, 3, 7, 11, 13)), draw.choice((1, 2, 3, 5, 20))
    if draw.maybe(0.2):
        return [draw.randint(1, 5) for _ in range(draw.randint(1, 4))]
    return [min(b, n - a) for a in range(0, n, b)]


def outputs(network: Network, x: Any) -> Tensor:
    """Return the outputs for an input as it is drawn."""
    module = network.module.eval()
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        out = module(x.to(dtype) if isinstance(x, Tensor) else mapped(torch.clone, x))
    module.train()
    return getattr(out, "logits", out)


def count(network: Network, x: Any) -> int:
    """Return how many outputs an input has."""
    return outputs(network, x).shape[1:].numel()


def targets(network: Network, x: Any, likelihood: str, one_hot: bool, generator: torch.Generator) -> Tensor:
    f = outputs(network, x)
    if likelihood == "regression":
        return torch.randn(f.shape, generator=generator).to(f.dtype)
    if likelihood == "bernoulli":
        y = torch.randint(2, f.shape, generator=generator)
        return y if one_hot else y.to(f.dtype)
    if one_hot and not network.positions:
        return torch.randn(f.shape, generator=generator).softmax(-1)
    return torch.randint(f.shape[-1], f.shape[:-1], generator=generator)


def draw_options(
    draw: Draw,
    likelihood: str,
    dtype: torch.dtype,
    network: Network,
    n_params: int,
    generator: torch.Generator,
) -> tuple[dict[str, Any], bool]:
    """Draw arguments of the estimator, and say whether gradient rows could be spilled."""
    sizes = [p.numel() for p in network.module.parameters() if p.requires_grad]
    shape = draw.choice((1, 1, 1, len(sizes), n_params))
    precision = (torch.rand(shape, generator=generator, dtype=F64) + 0.1) * draw.choice((0.01, 1.0, 30.0))
    options: dict[str, Any] = {
        "prior_precision": float(precision) if shape == 1 else precision,
        "n_eigenvalues": draw.choice((1, 2, 3, 5, 9, 0.9)),
        "curvature_size": draw.choice((None, 2000, 2000, 4)),
        "seed": draw.randint(0, 3),
        "chunk_size": draw.choice((None, None, 1, 2, 3)),
        "temperature": draw.choice((None, 1.0, 0.3, 20.0)),
        "prior_mean": draw.choice((0.0, 0.3)),
    }
    row = n_params * dtype.itemsize
    budget = draw.choice((None, None, None, 1, 2 * row, 5 * row, 0.01))
    spill = draw.choice((None, None, "cpu", "folder")) if budget is not None else None
    options |= {"memory_budget": budget, "spill": spill}
    options["spill_dtype"] = draw.choice((torch.float32, torch.bfloat16, torch.float16))
    if likelihood == "regression":
        options["sigma_noise"] = draw.choice((1.0, 0.4, 2.0))
    if likelihood in ("classification", "bernoulli"):
        options["logit_scale"] = draw.choice((1.0, 1.0, 0.5, 3.0))
    if shape == 1:
        options["residual"] = draw.choice(("none", "none", "isotropic", "exact"))
        options["residual_scale"] = draw.choice((1.0, 1e-3))
        options["residual_samples"] = draw.choice((1, 3))
    options["enable_backprop"] = options.get("residual") != "exact" and draw.maybe(0.1)
    if draw.maybe(0.12):
        options |= {"curvature": "mc", "curvature_samples": draw.choice((1, 3))}
    names = [*BACKENDS] if network.plain else ["CurvlinopsGGN", "NystromGGN", "ReverseNystromGGN"]
    options["backend"] = draw.choice((None, None, None, *names))
    if options["backend"] != "ReverseNystromGGN":
        options["autodiff"] = draw.choice((None, "auto", "forward", "double", "reverse"))
    return options, spill is not None


# ---------------------------------------------------------------------- fitting


def build(config: Config, folder: str) -> ELLALaplace:
    options = dict(config.options)
    if options["spill"] == "folder":
        options["spill"] = folder
    if options["backend"] is not None:
        options["backend"] = BACKENDS[options["backend"]]
    return ELLALaplace(config.network.module, config.likelihood, **options)


def loader(config: Config, first: int, n: int) -> list[Any]:
    return [x if isinstance(x, dict) else (x, y) for x, y in config.batches[first : first + n]]


def fitted(config: Config, folder: str) -> ELLALaplace:
    """Fit, in one part or two."""
    options = config.options
    asked_for = (
        options.get("autodiff") not in (None, "auto"),
        options["backend"] in ("BackPackGGN", "AsdlGGN"),
    )
    config.network.module.train(config.in_training)
    try:
        la = build(config, folder)
        start = 0
        for i, n in enumerate(config.parts):
            given = config.landmarks if i == 0 else None
            la.fit(loader(config, start, n), override=i == 0, landmarks=given, **config.fit_options)
            start += n
    except ValueError as error:
        allowed = ["All landmark gradients are zero"]
        allowed += ["cannot be differentiated"] if asked_for[0] else []
        allowed += ["Leave `backend` out", "conv2d.dilation has to be"] if asked_for[1] else []
        if any(text in str(error) for text in allowed):
            raise Refused(str(error)) from error
        raise
    assert all(m.training == config.in_training for m in config.network.module.modules()), (
        "training flags changed"
    )
    assert all(p.grad is None for p in config.network.module.parameters()), ".grad was written"
    return la


# ---------------------------------------------------------------------- comparing


def close(name: str, actual: Any, expected: Any, tolerance: float, scale: float | None = None) -> None:
    """Compare up to ``tolerance`` times the largest expected value, or ``scale``."""
    a, e = (torch.as_tensor(v, dtype=F64).detach() for v in (actual, expected))
    assert a.shape == e.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
    if not e.numel():
        return
    assert bool(a.isfinite().all()), f"{name}: not finite"
    largest = max(float(e.abs().max()), scale or 0.0)
    error = float((a - e).abs().max())
    assert error <= tolerance * largest + 1e-12, f"{name}: off by {error:.3e}, the largest is {largest:.3e}"


def flat(tangents: dict[str, Tensor]) -> Tensor:
    """Return tangents of all weights (S, P)."""
    return torch.cat([v.reshape(len(v), -1).to(F64) for v in tangents.values()], 1)


@dataclass
class Truth:
    """What a fitted estimator should say, with the directions and G that it has."""

    config: Config
    la: ELLALaplace
    dense: Dense = field(init=False)

    def __post_init__(self) -> None:
        config, la = self.config, self.la
        self.dense = Dense(config.network.module)
        self.V = flat(la.basis.directions).T
        self.train = [self.dense.jacobian(x, len(y)) for x, y in config.batches]
        self.J, self.f, _ = self.dense.jacobian(config.x, config.n_test)
        self.phi = self.J @ self.V
        self.delta = self.dense.prior(config.options["prior_precision"])
        self.sigma = config.options.get("sigma_noise", 1.0)
        self.temperature = config.options["temperature"] or 1.0
        # V^T V = I, which rounding of V does not change.
        scalar = isinstance(config.options["prior_precision"], float)
        identity = torch.eye(la.basis.rank, dtype=F64)
        self.projected = self.delta[0] * identity if scalar else self.V.T @ (self.delta[:, None] * self.V)
        self.A = la.H / (self.sigma**2 * self.temperature) + self.projected
        self.scale = config.options.get("logit_scale", 1.0)
        self.outside = self.J - self.phi @ self.V.T
        self.rho = config.options.get("residual_scale", 1.0) / float(self.delta[0])

    @property
    def hosted(self) -> str:
        """The likelihood of the fit."""
        return "classification" if self.config.likelihood == "reward_modeling" else self.config.likelihood

    def rows(self) -> Tensor | None:
        """Return R (M, P), if it is known which landmarks there are."""
        config = self.config
        if config.landmarks is None:
            pairs = [J.flatten(0, 1) for J, _, _ in self.train[: config.parts[0]]]
            every = torch.cat(pairs)
            return every if config.options["subsample_size"] >= len(every) else None
        x, outputs = config.landmarks
        J, _, lengths = self.dense.jacobian(x, len(outputs))
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1] * config.n_outputs
        return J.flatten(0, 1)[starts + outputs]

    def covariance(self) -> Tensor:
        inverse = torch.linalg.inv(self.A)
        cov = torch.stack([p @ inverse @ p.T for p in self.phi])
        residual = self.config.options.get("residual", "none")
        if residual == "exact":
            cov = cov + self.rho * self.outside @ self.outside.mT
        elif residual == "isotropic":
            g = flat(self.la._residual_tangents()[0])
            pushed = self.outside @ (g - g @ self.V @ self.V.T).T
            share = pushed.square().sum((1, 2)) / pushed.shape[1:].numel()
            cov = cov + self.rho * share[:, None, None] * torch.eye(cov.shape[-1], dtype=F64)
        return cov

    def joint(self) -> Tensor:
        flat, outside = self.phi.flatten(0, 1), self.outside.flatten(0, 1)
        cov = flat @ torch.linalg.inv(self.A) @ flat.T
        return cov + self.rho * outside @ outside.T


def check_directions(t: Truth) -> None:
    """V is orthonormal, and made of eigenvectors of the landmarks' Gram matrix."""
    config, la = t.config, t.la
    eps = max(torch.finfo(config.dtype).eps, torch.finfo(F64).eps)
    if config.spills:
        eps = max(eps, torch.finfo(config.options["spill_dtype"]).eps)
    values = la.basis.eigenvalues
    condition = float(values[0] / values[-1])
    off = 1e3 * torch.finfo(config.dtype).eps + 1e2 * 2e-16 * condition
    close("V^T V", t.V.T @ t.V, torch.eye(la.basis.rank), off)
    rows = t.rows()
    # Gradients that all but cancel, of weights whose scale a norm takes off, are rounding in less than float64.
    if rows is None or (config.dtype != F64 and values[0] < 1e-5):
        return
    loose = {torch.float64: 1e4, torch.float32: 1e3, torch.bfloat16: 20}[config.dtype] * eps
    if config.spills:
        loose = max(loose, 20 * eps)
    spectrum = torch.linalg.eigvalsh(rows @ rows.T).flip(0).clamp_min(0)
    close("eigenvalues", values, spectrum[: la.basis.rank], loose)
    close("trace", la.basis.trace, spectrum.sum(), loose)
    found = residual_of_directions(rows, t.V, values)
    bound = loose * (values[0] / values).sqrt()
    assert bool((found <= bound).all()), (
        f"directions are no eigenvectors: {found.tolist()}, {values.tolist()}"
    )
    asked = config.options["n_eigenvalues"]
    if isinstance(asked, int) and la.basis.rank < min(asked, len(rows)):
        left = float(spectrum[la.basis.rank] / spectrum[0])
        assert left < 10 * max(loose, len(rows) * 3e-16), (
            f"rank {la.basis.rank}, and the next eigenvalue is {left:.2e}"
        )


def check_curvature(t: Truth) -> None:
    config, la = t.config, t.la
    n = sum(len(y) for _, y in config.batches)
    total = config.fit_options.get("n_total", n)
    assert la.n_data == total
    y = torch.cat([flat_targets(config, y) for _, y in config.batches])
    f = torch.cat([f for _, f, _ in t.train])
    t.loss = loss(f, y, t.hosted) * total / n
    t.n_numbers = f.numel() * total / n
    close("loss", la.loss, t.loss, t.config.tolerance, scale=float(f.abs().sum()) * total / n)
    H, size = la.H, config.options["curvature_size"]
    assert H.shape == (la.basis.rank, la.basis.rank)
    close("symmetry of G", H, H.T, 1e-12)
    least = float(torch.linalg.eigvalsh(H)[0])
    assert least > -1e-9 * max(1e-30, float(H.abs().max())), f"G has an eigenvalue of {least}"
    exact = size is None or all(size >= sum(len(y) for _, y in part) for part in parts_of(config))
    if exact and config.options.get("curvature", "exact") == "exact":
        phi = torch.cat([J @ t.V for J, _, _ in t.train])
        scale = max(float((p.T @ p).abs().max()) for p in phi) * 1e-6
        close("G", H, curvature(phi, f, t.hosted) * total / n, 4 * config.tolerance, scale)


def parts_of(config: Config) -> list[list[tuple[Any, Tensor]]]:
    found, start = [], 0
    for n in config.parts:
        found.append(config.batches[start : start + n])
        start += n
    return found


def flat_targets(config: Config, y: Tensor) -> Tensor:
    """Return targets (B L,) or (B L, C)."""
    per_output = config.likelihood in ("regression", "bernoulli") or y.is_floating_point()
    return y.flatten(0, -2) if per_output else y.flatten()


def check_posterior(t: Truth) -> None:
    la = t.la
    close("posterior precision", la.posterior_precision, t.A, 10 * t.config.tolerance)
    inverse = torch.linalg.inv(la.posterior_precision.detach())
    condition = float(torch.linalg.cond(la.posterior_precision.detach()))
    close("posterior covariance", la.posterior_covariance, inverse, 1e-9 + 1e-14 * condition)
    theta = t.dense.theta()
    offset = theta - t.config.options["prior_mean"]
    expected = evidence(
        t.loss,
        t.n_numbers,
        t.hosted,
        t.A,
        t.projected,
        offset @ (t.delta * offset),
        t.sigma,
        t.temperature,
    )
    if t.config.dtype != torch.bfloat16:
        size = float(t.loss) / (t.sigma**2 * t.temperature) + t.n_numbers
        close("evidence", la.log_marginal_likelihood(), expected, 5 * t.config.tolerance, scale=size)


def check_features(t: Truth) -> None:
    phi, f = t.la.features(t.config.x)
    size = float(t.J.flatten(0, 1).norm(dim=1).max())
    close("phi", phi, t.phi, t.config.tolerance, scale=size if t.config.dtype != F64 else size * 1e-3)
    close("f", f, t.f, t.config.tolerance, scale=1.0)
    cov = torch.stack([p @ torch.linalg.inv(t.A) @ p.T for p in t.phi])
    loose = 4 * t.config.tolerance
    size = spread(t, cov)
    close("functional variance", t.la.functional_variance(phi), cov, loose, size)


def spread(t: Truth, cov: Tensor) -> float:
    """Return how large a variance along any direction is: what rounding of phi is measured by."""
    largest = float(torch.linalg.inv(t.A).diagonal().max())
    return largest * float(t.J.flatten(0, 1).square().sum(1).max()) * (1e-3 if t.config.dtype == F64 else 1.0)


def check_predictions(t: Truth) -> None:
    config, la, cov = t.config, t.la, t.covariance()
    if config.likelihood in ("regression", "reward_modeling"):
        check_moments(t, cov)
        return
    f, link = t.f * t.scale, config.likelihood
    off = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 0.3}[config.dtype]
    off = off * (1 + float(f.abs().max()))
    close("probit", la(config.x), probit(f, cov, link), off, 1.0)
    mc = la(config.x, link_approx="mc", n_samples=512)
    close("mc", mc, monte_carlo(f, cov, link), max(off, 0.06), 1.0)
    diagonal = torch.diag_embed(cov.diagonal(dim1=1, dim2=2))
    mc = la(config.x, link_approx="mc", n_samples=512, diagonal_output=True)
    close("mc, independent outputs", mc, monte_carlo(f, diagonal, link), max(off, 0.06), 1.0)
    nn = la(config.x, pred_type="nn", link_approx="mc", n_samples=3)
    probabilities = [mc, nn]
    if link == "classification":
        for name in ("bridge", "bridge_norm"):
            p = la(config.x, link_approx=name)
            expected = bridge(f, cov, name == "bridge_norm")
            if expected is not None and config.dtype == F64:
                close(name, p, expected, 1e-4, 1.0)
            probabilities.append(p)
        for p in probabilities:
            close(
                "sum of probabilities",
                p.double().sum(-1),
                torch.ones(len(p)),
                0.03 if p.dtype == torch.bfloat16 else 1e-5,
            )
    for p in probabilities:
        assert bool(((p >= 0) & (p <= 1.001)).all()), "probabilities outside of [0, 1]"


def check_moments(t: Truth, cov: Tensor) -> None:
    config, la = t.config, t.la
    loose, size = 4 * config.tolerance, spread(t, cov)
    mean, full = la(config.x)
    close("mean", mean, t.f, config.tolerance, 1.0)
    close("covariance", full, cov, loose, size)
    _, variances = la(config.x, diagonal_output=True)
    close("variance", variances, cov.diagonal(dim1=1, dim2=2), loose, size)
    if config.options.get("residual", "none") in ("none", "exact"):
        flat = t.phi.flatten(0, 1)
        joint = (
            t.joint() if config.options.get("residual") == "exact" else flat @ torch.linalg.inv(t.A) @ flat.T
        )
        mean, found = la(config.x, joint=True)
        close("joint mean", mean, t.f.flatten(), config.tolerance, 1.0)
        close("joint covariance", found, joint, loose, size)


def check_samples(t: Truth) -> None:
    config, la = t.config, t.la
    generator = torch.Generator().manual_seed(0)
    drawn = la.functional_samples(config.x, n_samples=3, generator=generator)
    assert drawn.shape == (3, *t.f.shape)
    assert bool(drawn.isfinite().all())
    drawn = la.predictive_samples(config.x, n_samples=3, generator=generator)
    assert drawn.shape == (3, *t.f.shape)
    offsets = la.sample(3, generator=generator).double() - t.dense.theta()
    assert offsets.shape == (3, len(t.V))
    if config.options.get("residual") != "exact" and config.dtype == F64:
        outside = offsets - offsets @ t.V @ t.V.T
        close(
            "samples of weights in the span",
            outside,
            torch.zeros_like(outside),
            1.0,
            1e-7 * float(offsets.norm()),
        )


def check_novelty(t: Truth) -> None:
    if t.config.options.get("residual") != "exact" or t.config.dtype == torch.bfloat16:
        return
    total = t.J.square().sum((1, 2))
    share = t.outside.square().sum((1, 2)) / total.clamp_min(1e-300)
    if bool((total > 1e-9).all()):
        close("residual share", t.la.residual_share(t.config.x), share, 10 * t.config.tolerance, 1.0)


def check_saved(t: Truth) -> None:
    """Save, load into another estimator, and predict."""
    file = io.BytesIO()
    torch.save(t.la.state_dict(), file)
    file.seek(0)
    names = ("dict_key_x", "dict_key_y", "enable_backprop", "autodiff", "backend")
    options = {k: v for k, v in t.config.options.items() if k in names}
    if options.get("backend") is not None:
        options["backend"] = BACKENDS[options["backend"]]
    other = ELLALaplace(t.config.network.module, t.config.likelihood, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    mine, theirs = t.la(t.config.x), other(t.config.x)
    pairs = zip(mine, theirs) if isinstance(mine, tuple) else [(mine, theirs)]
    for a, b in pairs:
        close(
            "a saved estimator's prediction",
            b,
            a,
            0.05 if a.dtype == torch.bfloat16 else 1e-3 if a.dtype != F64 else 1e-9,
        )


CHECKS = (
    check_directions,
    check_curvature,
    check_posterior,
    check_features,
    check_predictions,
    check_samples,
    check_novelty,
    check_saved,
)


def run(seed: int, number: int) -> str:
    """Check one configuration; returns "agrees", or why it could not be tried.

    Raises
    ------
    AssertionError
        With the configuration, and the line that repeats it.
    """
    config = draw_config(seed, number)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            truth = Truth(config, fitted(config, folder))
            for check in CHECKS:
                check(truth)
        except Refused as error:
            return f"refused: {str(error)[:60]}"
        except Exception as error:
            line = f"python tests/fuzz.py --seed {seed} --only {number}"
            raise AssertionError(f"{type(error).__name__}: {error}\n{config}\n{line}") from error
    return "agrees"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the first number")
    parser.add_argument("--only", type=int, help="one number, with its traceback")
    args = parser.parse_args()
    torch.set_num_threads(1)
    numbers = range(args.start, args.start + args.count) if args.only is None else [args.only]
    found: Counter[str] = Counter()
    start = time.perf_counter()
    for number in numbers:
        try:
            found[run(args.seed, number)] += 1
        except AssertionError as error:
            found["disagrees"] += 1
            print(error, "\n", flush=True)
            if args.only is not None:
                traceback.print_exception(error)
    print(f"{dict(found)}, {time.perf_counter() - start:.0f} s")
    return int(found["disagrees"] > 0)


if __name__ == "__main__":
    sys.exit(main())
