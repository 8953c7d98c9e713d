"""Networks whose outputs have another precision than what computes them."""

from __future__ import annotations

import pytest
import torch
from awkward import WrongJvp, halved_gradient
from conftest import assert_close
from helpers import N_TEST, C, D, H, fitted, inputs, reference_features, train_loader
from models import Applied
from torch import nn

from laplace_ella import NystromGGN
from laplace_ella.data.hashing import normal_like
from laplace_ella.network.adjoint import LARGEST_RATIO
from laplace_ella.network.recording import Recording, coarsest, tolerance

SEEDS = range(3)
X = inputs(N_TEST, seed=7, dtype=torch.float32)
BF16 = torch.bfloat16


def layers(*more):
    return nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, H), nn.ReLU(), *more, nn.Linear(H, C))


def autocast(net, x):
    with torch.autocast(x.device.type, BF16):
        f = net(x)
    return f.float()


class Body(nn.Module):
    """A body in bfloat16, a head in float32, and something in between."""

    def __init__(self, between=lambda h: h, dtype=BF16):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, H), nn.Tanh()).to(dtype)
        self.head = nn.Linear(H, C)
        self.between, self.dtype = between, dtype

    def forward(self, x):
        return self.head(self.between(self.body(x.to(self.dtype))).float())


class LoRA(nn.Module):
    """A frozen layer in bfloat16, and trainable updates of rank 2 in float32."""

    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, H)).to(BF16).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, H)), nn.Parameter(torch.randn(H, 2))
        self.head = nn.Linear(H, C)

    def forward(self, x):
        h = self.base[:2](x.to(BF16))
        h = self.base[2](h) + (h.float() @ self.down.T @ self.up.T).to(BF16)
        return self.head(h.float().tanh())


CASES = {
    "autocast": (lambda: Applied(autocast, layers(nn.LayerNorm(H))), BF16),
    "body": (Body, BF16),
    "LoRA": (LoRA, BF16),
    "doubled": (lambda: Applied(lambda net, x: net(x).double(), layers(nn.LayerNorm(H))), torch.float32),
    "halved": (lambda: Applied(lambda net, x: net(x.half()).float(), layers().half()), torch.float16),
}


def built(kind, seed, *args):
    torch.manual_seed(seed)
    return kind(*args)


@pytest.mark.filterwarnings("ignore:.*one by one")  # layer norms under autocast
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CASES)
def test_mixed_precision_fits(name, seed):
    kind, precision = CASES[name]
    model = built(kind, seed)
    la = fitted(model=model, data=train_loader(dtype=torch.float32), n_eigenvalues=2)
    support = la.backend.support(X)
    assert (support.features, support.precision) == ("forward", precision)
    phi, f = la.features(X)
    expected_phi, expected_f = reference_features(model, la.basis, X)
    eps = torch.finfo(precision).eps
    assert_close(f, expected_f, rtol=4 * eps)
    assert_close(phi, expected_phi, rtol=8 * eps)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("fault", [halved_gradient, WrongJvp.apply], ids=["no_grad", "wrong jvp"])
def test_faults_in_bodies_are_found(fault, dtype, seed):
    model = built(Body, seed, fault, dtype)
    with pytest.raises(ValueError, match="Forward and reverse mode disagree"):
        NystromGGN(model, "classification").support(X)


def test_a_coarse_tensor_beside_the_way_makes_nobody_blind():
    def fault(h):
        with torch.no_grad():
            kept = h / 50
        return h * 49 / 50 + kept + h.new_ones((), dtype=BF16)

    model = built(Body, 0, fault, torch.float32)
    with pytest.raises(ValueError, match="Forward and reverse mode disagree"):
        NystromGGN(model, "classification").support(X)


def test_rewriting_goes_on_in_mixed_precision():
    convolutions = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Tanh()).to(BF16)
    body = Applied(lambda net, x: net(x.to(BF16)).float().mean((2, 3)), convolutions)
    model = nn.Sequential(body, nn.Linear(5, C))
    x = torch.randn(3, 2, 7, 7)
    backend = NystromGGN(model, "classification")
    assert backend.support(x).features == "forward"
    assert list(backend.engine.facts(x).rewritten.model.rewrites.folds) == [0]


@pytest.mark.filterwarnings("ignore:.*one by one")
def test_convolutions_are_contracted_under_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(54, C)
    )
    x = torch.randn(3, 2, 7, 7)
    found = {}
    with torch.autocast("cpu", BF16):
        for autodiff in ("contraction", "reverse"):
            engine = NystromGGN(model, "classification", autodiff=autodiff).engine
            V = normal_like(engine.function.weights(), 4, seed=1)
            found[autodiff], _ = engine.push(x, V)
            assert autodiff == "reverse" or engine.facts(engine.inputs(x)).contracted is not None
    assert_close(found["contraction"], found["reverse"], rtol=4 * torch.finfo(BF16).eps)


def test_the_recording_sees_types_and_draws():
    with Recording() as record:
        x = torch.ones(3, dtype=torch.float64).to(torch.float16).float()
        x.bernoulli_(0.5)
        torch.rand(2, generator=torch.Generator())
    assert record.dtypes == {torch.float64, torch.float16, torch.float32}
    assert record.draws == ["bernoulli_", "rand"]


def test_the_coarsest_precision():
    assert coarsest([torch.int64, torch.bool]) == torch.float64
    assert coarsest([torch.float32, torch.int8, torch.float64]) == torch.float32
    assert coarsest([torch.float16, torch.bfloat16, torch.float32]) == BF16
    assert coarsest([torch.complex64, torch.float64]) == torch.complex64
    assert coarsest([torch.float8_e4m3fn]) == BF16  # of what is computed with it
    assert tolerance(torch.float64) < 1e-7 < 1e-4 < tolerance(torch.float32, torch.float64) < 2e-3
    assert LARGEST_RATIO > 1
