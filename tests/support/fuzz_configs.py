"""Random configurations: a network, data, and options of estimator and fit; and the fit of one."""

from dataclasses import dataclass
from typing import Any

import torch
from fuzz_networks import Draw, Network, make_network
from fuzz_oracle import F64, mapped
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

    @property
    def tolerance(self):
        return TOLERANCE[self.dtype]

    @property
    def spills(self):
        return self.options["spill"] is not None

    def __str__(self):
        shapes = {k: tuple(v.shape) for k, v in self.options.items() if isinstance(v, Tensor)}
        sizes, pairs = [len(y) for _, y in self.batches], self.landmarks and len(self.landmarks[1])
        return (
            f"{self.network.family}, {self.likelihood}, {self.dtype}, C={self.n_outputs}, batches={sizes}, "
            f"parts={self.parts}, landmarks={pairs}, {self.options | shapes}, {self.fit_options}"
        )


def draw_config(seed, number):
    """Draw configuration ``number`` of a seed."""
    draw = Draw(f"{seed}/{number}")
    generator = torch.Generator().manual_seed(draw.getrandbits(31))
    dtype = draw.choices((F64, torch.float32, torch.bfloat16), (6, 3, 1))[0]
    likelihoods = ("classification", "regression", "bernoulli", "classification", "reward_modeling")
    likelihood = draw.choice(likelihoods)
    classes = likelihood in ("classification", "reward_modeling")
    n_outputs = draw.randint(2 if classes else 1, 5)
    network = make_network(draw, n_outputs, dtype)
    sizes = draw_sizes(draw)
    key_y = draw.choice(("labels", "y")) if network.family == "tokens" else "labels"
    one_hot = draw.maybe(0.15)
    of_inputs = draw.choice((dtype, F64)) if dtype != F64 else F64

    def some(n, length):
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
    x_test, landmarks = some(n_test, lengths[0]), None
    if draw.maybe(0.6):
        m = draw.choice((1, 3, 7, 11))
        x = some(m, lengths[0])
        landmarks = x, torch.randint(outputs(network, x)[0].numel(), (m,), generator=generator)
    options = draw_options(draw, likelihood, dtype, network, generator)
    if network.family == "tokens":
        options |= {"dict_key_x": network.module.body.key, "dict_key_y": key_y}
    if landmarks is None:
        pairs = sum(outputs(network, x).numel() for x, _ in batches)
        options["subsample_size"] = pairs if draw.maybe(0.6) else draw.choice((1, 2, 5, 13))
    parts, fit_options = [len(sizes)], {}
    if len(sizes) > 1 and draw.maybe(0.2):
        first = draw.randint(1, len(sizes) - 1)
        parts = [first, len(sizes) - first]
    if landmarks is None and classes and not network.positions and draw.maybe(0.2):
        fit_options["balanced"] = True
    if draw.maybe(0.1) and len(parts) == 1:
        fit_options["n_total"] = 2 * sum(sizes)
    of_data = network, likelihood, dtype, n_outputs, batches, x_test, n_test, landmarks
    return Config(*of_data, parts, options, fit_options, in_training=draw.maybe(0.5))


def draw_sizes(draw):
    """Draw the sizes of batches: equal but for the last, or any."""
    n, b = draw.choice((1, 3, 7, 11, 13)), draw.choice((1, 2, 3, 5, 20))
    if draw.maybe(0.2):
        return [draw.randint(1, 5) for _ in range(draw.randint(1, 4))]
    return [min(b, n - a) for a in range(0, n, b)]


def outputs(network, x):
    """Return the outputs for inputs as they are drawn."""
    module = network.module.eval()
    dtype = next(module.parameters()).dtype
    with torch.no_grad():
        out = module(x.to(dtype) if isinstance(x, Tensor) else mapped(torch.clone, x))
    module.train()
    return getattr(out, "logits", out)


def targets(network, x, likelihood, one_hot, generator):
    f = outputs(network, x)
    if likelihood == "regression":
        return torch.randn(f.shape, generator=generator).to(f.dtype)
    if likelihood == "bernoulli":
        y = torch.randint(2, f.shape, generator=generator)
        return y if one_hot else y.to(f.dtype)
    if one_hot and not network.positions:
        return torch.randn(f.shape, generator=generator).softmax(-1)
    return torch.randint(f.shape[-1], f.shape[:-1], generator=generator)


def draw_options(draw, likelihood, dtype, network, generator):
    """Draw arguments of the estimator."""
    sizes = [p.numel() for p in network.module.parameters() if p.requires_grad]
    shape = draw.choice((1, 1, 1, len(sizes), sum(sizes)))
    precision = (torch.rand(shape, generator=generator, dtype=F64) + 0.1) * draw.choice((0.01, 1.0, 30.0))
    options = {
        "prior_precision": float(precision) if shape == 1 else precision,
        "n_eigenvalues": draw.choice((1, 2, 3, 5, 9, 0.9)),
        "curvature_size": draw.choice((None, 2000, 2000, 4)),
        "seed": draw.randint(0, 3),
        "chunk_size": draw.choice((None, None, 1, 2, 3)),
        "temperature": draw.choice((None, 1.0, 0.3, 20.0)),
        "prior_mean": draw.choice((0.0, 0.3)),
    }
    row = sum(sizes) * dtype.itemsize
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
        options |= {"residual_scale": draw.choice((1.0, 1e-3)), "residual_samples": draw.choice((1, 3))}
    options["enable_backprop"] = options.get("residual") != "exact" and draw.maybe(0.1)
    if draw.maybe(0.12):
        options |= {"curvature": "mc", "curvature_samples": draw.choice((1, 3))}
    names = [*BACKENDS] if network.plain else ["CurvlinopsGGN", "NystromGGN", "ReverseNystromGGN"]
    options["backend"] = draw.choice((None, None, None, *names))
    if options["backend"] != "ReverseNystromGGN":
        options["autodiff"] = draw.choice((None, "auto", "forward", "double", "reverse"))
    return options


def estimator(config, options):
    if options["backend"] is not None:
        options = {**options, "backend": BACKENDS[options["backend"]]}
    return ELLALaplace(config.network.module, config.likelihood, **options)


def fitted(config, folder):
    """Fit, in one part or two."""
    options, module, start = config.options, config.network.module, 0
    data = [x if isinstance(x, dict) else (x, y) for x, y in config.batches]
    allowed = ["All landmark gradients are zero"]
    if options.get("autodiff") not in (None, "auto"):
        allowed += ["cannot be differentiated"]
    if options["backend"] in ("BackPackGGN", "AsdlGGN"):
        allowed += ["Leave `backend` out", "conv2d.dilation has to be"]
    module.train(config.in_training)
    try:
        la = estimator(config, options | ({"spill": folder} if options["spill"] == "folder" else {}))
        for n in config.parts:
            given = None if start else config.landmarks
            la.fit(data[start : start + n], override=not start, landmarks=given, **config.fit_options)
            start += n
    except ValueError as error:
        if any(text in str(error) for text in allowed):
            raise Refused(str(error)) from error
        raise
    assert all(m.training == config.in_training for m in module.modules()), "training flags changed"
    assert all(p.grad is None for p in module.parameters()), ".grad was written"
    return la
