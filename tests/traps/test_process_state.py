"""What the process has set as default dtype and device changes no number, and no constructor leaves them to it."""

from __future__ import annotations

import ast
import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from calls import error, predicted
from helpers import as_tuple, build, inputs, mlp, targets

import laplace_ella
from laplace_ella.posterior.links import quasi_normal

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@contextmanager
def process_state(dtype: torch.dtype | None = None, device: str | None = None) -> Iterator[None]:
    """Set a default dtype and device, as a program that uses the package may; with nothing cached from before.

    Of a device set by ``torch.set_default_device`` torch 2.4 keeps a trace: ``torch.get_default_device`` fails
    in that thread once it is unset.
    """
    before = torch.get_default_dtype()
    quasi_normal.cache_clear()
    try:
        torch.set_default_dtype(dtype or before)
        with nullcontext() if device is None else torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
        quasi_normal.cache_clear()


def batches(likelihood, n=23, seed=1, dtype=torch.float32):
    y = targets("classification" if likelihood == "bernoulli" else likelihood, n, seed=seed + 1, dtype=dtype)
    if likelihood == "bernoulli":
        y = torch.nn.functional.one_hot(y, 3).to(dtype)
    return list(zip(inputs(n, seed=seed, dtype=dtype).split(7), y.split(7)))


def loaded(la, model, directions, **options):
    """Save, and load into a fresh estimator."""
    file = io.BytesIO()
    torch.save(la.state_dict(directions=directions), file)
    file.seek(0)
    fresh = build(la.likelihood, model, **options)
    fresh.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return fresh


def users(likelihood, dtype):
    """Return what the user brings along: model, training and validation data, and inputs."""
    model = mlp(dtype=dtype).eval()
    train, val = batches(likelihood, dtype=dtype), batches(likelihood, 17, seed=3, dtype=dtype)
    return model, train, val, inputs(5, seed=8, dtype=dtype)


def life(likelihood, residual, model, train, val, x):
    """Fit, predict, score, tune, save, load and merge; return every number on the way."""
    options = {"residual": residual, "temperature": None, "residual_samples": 3, "prior_precision": 0.3}
    la = build(likelihood, model, **options)
    la.fit(train)
    found = [la.H, la.loss, la.mean, la.basis.eigenvalues, *la.basis.directions.values()]
    found += predicted(la, x)
    if likelihood != "regression":
        la.calibrate_novelty(val)
        found.append(la.novelty(x))
    found += [
        *la.uncertainty(x, 8),
        *(la.interval(x) if likelihood == "regression" else la.batch_bald([x], 3)),
    ]
    found.append(error(la, x, train))
    for directions in ("full", "half", "landmarks"):
        found += predicted(loaded(la, model, directions, **options), x)
    search = {"method": "gridsearch", "val_loader": val, "grid_size": 2, "link_approx": "mc", "n_samples": 4}
    for pred_type in ("glm", "nn"):
        la.optimize_prior_precision(pred_type, **search)
        found += [la.prior_precision, *as_tuple(la(x))]
        la.temperature = 1.3  # fixed, so that the second search is short
    la.temperature = None
    scale = {} if residual == "none" else {"residual_scale": [1e-3, 1.0]}
    own = "sigma_noise" if likelihood == "regression" else "logit_scale"
    search = {"temperature": [0.1, 10.0], own: [0.5, 1.0], **scale}
    result = la.optimize_hyperparameters(val, search, n_samples=8)
    found.append(torch.tensor(result.score, dtype=torch.float64, device="cpu"))
    found.append(la.temperature * la.H)
    structures = ("scalar",) if residual != "none" else ("scalar", "layerwise", "diag")
    for structure in structures:
        la.optimize_prior_precision(n_steps=3, init_prior_prec=0.3, prior_structure=structure)
        found += [la.prior_precision, la.log_marginal_likelihood(), la.posterior_covariance]
    other = build(likelihood, model, **options)
    other.fit(val, basis=la.basis)
    for estimator in (la, other):
        estimator.prior_precision, estimator.temperature = 0.7, 1.1
        if likelihood == "regression":
            estimator.sigma_noise = 0.9
    la.merge(other)
    la.forget(val)
    return [*found, la.H, *predicted(la, x)]


def assert_same_bits(found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a.dtype, a.device) == (b.dtype, b.device), i
        assert torch.equal(a, b), f"number {i}: {a} and {b}"


CHANGES = [(torch.float64, None), (torch.float16, "meta")]
LIVES = [
    ("classification", "isotropic", torch.float32),
    ("regression", "exact", torch.float64),
    ("bernoulli", "none", torch.float64),
]


@pytest.fixture(scope="module", params=LIVES, ids=lambda life: "-".join(map(str, life)))
def plain_life(request):
    likelihood, residual, dtype = request.param
    arguments = (likelihood, residual, *users(likelihood, dtype))
    return arguments, life(*arguments)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_default_dtype_and_device_change_no_bit(plain_life, change):
    arguments, expected = plain_life
    with process_state(*change):
        found = life(*arguments)
    assert_same_bits(found, expected)


FITS = {
    "reverse mode": {"autodiff": "reverse"},
    "labels sampled": {"curvature": "mc"},
    "some inputs": {"curvature_size": 9},
    "all inputs, in a second pass": {"curvature_size": None},
    "a budget that is too small": {"memory_budget": 4000, "spill": "cpu", "spill_dtype": torch.float32},
    "ASDL": {"backend": laplace_ella.AsdlNystromGGN},
    "BackPACK": {"backend": laplace_ella.BackPackNystromGGN},
    "many landmarks": {"subsample_size": 50},
}


def fit_numbers(options, folder, model, train, val, x):
    la = build(model=model, temperature=None, **options)
    la.plan(train, verbose=False)
    la.fit(train, val_loader=val, checkpoint=folder / "fit", checkpoint_every=1)
    la.fit(val, override=False)
    found = [la.H, la.loss, *la.basis.directions.values(), la(x)]
    la.fit(train, balanced=True)
    return [*found, la.H, la(x)]


@pytest.mark.parametrize("name", FITS)
def test_default_dtype_and_device_change_no_fit(name, tmp_path):
    arguments = FITS[name], tmp_path, *users("classification", torch.float32)
    expected = fit_numbers(*arguments)
    with process_state(torch.float64, "meta"):
        found = fit_numbers(*arguments)
    assert_same_bits(found, expected)


def test_the_state_of_the_process_comes_back():
    before = torch.get_default_dtype(), torch.get_default_device()
    with process_state(torch.float64, "meta"):
        made = torch.empty(1)
        assert (made.dtype, made.is_meta) == (torch.float64, True)
    assert (torch.get_default_dtype(), torch.get_default_device()) == before


def test_a_half_default_dtype_leaves_quasi_random_points_finite():
    expected = quasi_normal(16, 3, 5)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        with process_state(dtype):
            assert torch.equal(quasi_normal(16, 3, 5), expected)


# What makes a tensor of nothing, or of numbers of Python's.
MADE = {"zeros", "ones", "empty", "full", "eye", "arange", "linspace", "logspace", "range", "empty_strided"}
MADE |= {"tensor", "as_tensor", "asarray", "scalar_tensor", "rand", "randn", "randint", "randperm"}
# Functions and methods that draw from the global generator where none is given.
DRAWN = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
METHODS = {"normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
METHODS |= {"cauchy_", "geometric_", "log_normal_"}
NEVER = {"Tensor", "FloatTensor", "DoubleTensor", "LongTensor", "rand_like", "randn_like", "randint_like"}
NEVER |= {"set_default_dtype", "set_default_device", "set_default_tensor_type", "manual_seed", "seed"}


def faults(source: str) -> list[str]:
    """Name the calls of a module that leave dtype, device or generator to the process."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, keywords = node.func.attr, {k.arg for k in node.keywords}
        of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        missing = set()
        if of_torch and name in MADE:
            missing |= {"dtype", "device"} - keywords
        if (of_torch and name in DRAWN) or name in METHODS:
            missing |= {"generator"} - keywords
        if of_torch and name in NEVER:
            missing |= {"another function"}
        if missing:
            found.append(f"line {node.lineno}: {ast.unparse(node)} lacks {', '.join(sorted(missing))}")
    return found


@pytest.mark.parametrize(
    "path", sorted(Path(laplace_ella.__file__).parent.glob("**/*.py")), ids=lambda path: path.stem
)
def test_no_module_leaves_dtype_device_or_generator_to_the_process(path):
    found = faults(path.read_text())
    assert not found, f"{path.name}: " + "; ".join(found)


def test_such_calls_are_found():
    bad = [
        "torch.zeros(3, dtype=d)",
        "torch.randn(3, dtype=d, device=e)",
        "x.normal_()",
        "torch.randn_like(x)",
    ]
    for line in (*bad, "torch.as_tensor(value).to(x)", "torch.multinomial(p, 1)"):
        assert faults(line), line
    for line in ("x.new_zeros(3)", "torch.randn(3, dtype=d, device=e, generator=g)", "torch.zeros_like(x)"):
        assert not faults(line), line
