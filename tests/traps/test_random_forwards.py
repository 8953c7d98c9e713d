"""Forward passes that are random in evaluation mode: refused with their cause, whatever the way to differentiate."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from helpers import N_TEST, C, D, H, build, fitted, inputs, mlp, reference_features, train_loader
from torch import nn
from torch.nn import functional as F

X = inputs(N_TEST, seed=7)
MODES = ["auto", "forward", "double", "reverse"]


class MCDropout(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.rand_like(x)


class OwnGenerator(nn.Module):
    """Draws from a generator that no global state shows, without a gradient."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x):
        return x * torch.rand(1, generator=self.generator).to(x)


class Gumbel(nn.Module):
    def forward(self, x):
        return F.gumbel_softmax(x, dim=-1)


class Depth(nn.Module):
    """Leaves a layer out of a whole batch, rarely: rows of one pass are equal, and passes most often too."""

    def __init__(self, p=0.1):
        super().__init__()
        self.p, self.layer = p, nn.Linear(H, H).double()

    def forward(self, x):
        return x if torch.rand(()) < self.p else x + self.layer(x)


class PythonDepth(Depth):
    def forward(self, x):
        return x if random.random() < self.p else x + self.layer(x)


class NumpyNoise(nn.Module):
    def forward(self, x):
        return x + float(np.random.rand())  # noqa: NPY002


class Counting(nn.Module):
    """Not random, but no function of its input either."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


def net(layer):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(D, H).double(), nn.Tanh(), layer)
    return nn.Sequential(body, nn.Linear(H, C).double())


LAYERS = [MCDropout, Noise, OwnGenerator, Gumbel, Depth, PythonDepth, NumpyNoise, Counting]
DRAWING = {
    MCDropout: "bernoulli_",
    Noise: "rand_like",
    OwnGenerator: "rand",
    Gumbel: "exponential_",
    Depth: "rand",
}


@pytest.mark.parametrize("autodiff", MODES)
@pytest.mark.parametrize("layer", LAYERS)
def test_random_forwards_are_refused_with_their_cause(layer, autodiff):
    random.seed(0)
    model = net(layer())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    la = build(model=model, autodiff=autodiff)
    drawn = f"drawn by {DRAWING[layer]}()" if layer in DRAWING else "differ by up to"
    cause = f"The first difference arises in module '0.2' ({layer.__name__})."
    with pytest.raises(ValueError, match=f"forward pass is random.*{re.escape(drawn)}.*{re.escape(cause)}"):
        la.fit(train_loader())
    assert la.H is None
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_the_models_own_forward_is_named():
    model = mlp()
    model.forward = lambda x: nn.Sequential.forward(model, F.dropout(x, 0.5))
    with pytest.raises(ValueError, match=r"arises in the model's own forward\(\)"):
        fitted(model=model)


def test_a_module_that_is_called_twice_is_found():
    layer = MCDropout()
    model = nn.Sequential(nn.Linear(D, H), layer, nn.Linear(H, H), layer, nn.Linear(H, C)).double()
    with pytest.raises(ValueError, match=r"arises in module '1' \(MCDropout\)"):
        fitted(model=model)


def test_it_is_said_before_any_long_work():
    rows, read = [], []
    model = net(MCDropout())
    model.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    batches = (read.append(batch) or batch for batch in train_loader())
    with pytest.raises(ValueError, match="forward pass is random"):
        fitted(model=model, data=batches)
    assert len(read) == 1
    assert sum(rows) < 50


def test_where_it_arises_outside_of_modules_the_draws_are_named():
    model = mlp()
    model.register_forward_pre_hook(lambda m, args: F.dropout(args[0], 0.5))
    with pytest.raises(
        ValueError, match=r"differ by up to .* Random numbers are drawn by \w+\(\)\. Linearised"
    ):
        fitted(model=model)


# ------------------------------------------------------------------ what is not random


class Unused(nn.Module):
    """Draws numbers that nothing depends on."""

    def forward(self, x):
        torch.rand_like(x), random.random()
        return x


class Seeded(nn.Module):
    def forward(self, x):
        noise = torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x)
        return x * noise


class Off(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return F.dropout(self.dropout(x), 0.5, self.training)


@pytest.mark.filterwarnings("ignore:.*(one by one|forward mode)")  # vmap takes no random numbers
@pytest.mark.parametrize("layer", [Unused, Seeded, Off])
@pytest.mark.parametrize("training", [False, True])
def test_forwards_that_are_functions(layer, training):
    model = net(layer()).train(training)
    la = fitted(model=model)
    phi, _ = la.features(X)
    torch.testing.assert_close(phi, reference_features(model, la.basis, X)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_atomic_additions_are_not_random(dtype):
    class Scattered(nn.Module):
        def forward(self, x):
            index = torch.arange(H * 1000, device=x.device) % H
            return torch.zeros_like(x).index_add(1, index, x.repeat(1, 1000) / 1000)

    model = net(Scattered()).to("cuda", dtype)
    fitted(model=model, data=train_loader(dtype=dtype), n_eigenvalues=1)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.01)]
)
def test_sums_in_another_order_are_not_random(dtype, size):
    class Reordered(nn.Module):
        """Rounds in another way in every call, as atomic additions on a GPU do."""

        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * (1 + size * (self.calls % 2))

    model = net(Reordered()).to(dtype)
    fitted(model=model, data=train_loader(dtype=dtype), n_eigenvalues=1)
