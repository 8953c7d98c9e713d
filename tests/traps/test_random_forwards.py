"""Forward passes that are random in evaluation mode: refused with their cause, whatever the way to differentiate."""

from __future__ import annotations

import random
import re
from itertools import count

import numpy as np
import pytest
import torch
from awkward import X, check_features
from helpers import C, D, H, build, fitted, mlp, train_loader
from models import Applied
from torch import nn
from torch.nn import functional as F

MODES = ["auto", "forward", "double", "reverse"]
GENERATOR, CALLS = torch.Generator(), count()


def net(function):
    """A network whose module '0.2' calls a function of a layer and its inputs."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(D, H), nn.Tanh(), Applied(function, nn.Linear(H, H)))
    return nn.Sequential(body, nn.Linear(H, C)).double()


def dropped(layer, x):
    return F.dropout(x, 0.5)


# Functions, and what draws their numbers where that is known. Layers left out for a whole batch, rarely, have equal
# rows in one pass, and equal passes most often too.
RANDOM = {
    "dropout": (dropped, "bernoulli_"),
    "noise": (lambda layer, x: x + 0.1 * torch.rand_like(x), "rand_like"),
    "own generator": (lambda layer, x: x * torch.rand(1, generator=GENERATOR).to(x), "rand"),
    "gumbel": (lambda layer, x: F.gumbel_softmax(x, dim=-1), "exponential_"),
    "depth": (lambda layer, x: x if torch.rand(()) < 0.1 else x + layer(x), "rand"),
    "depth by Python": (lambda layer, x: x if random.random() < 0.1 else x + layer(x), ""),
    "noise by numpy": (lambda layer, x: x + float(np.random.rand()), ""),  # noqa: NPY002
    "no function of its input": (lambda layer, x: x + next(CALLS), ""),
}


@pytest.mark.parametrize("autodiff", MODES)
@pytest.mark.parametrize("name", RANDOM)
def test_random_forwards_are_refused_with_their_cause(name, autodiff):
    random.seed(0)
    function, draws = RANDOM[name]
    model = net(function)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    la = build(model=model, autodiff=autodiff)
    drawn = f"drawn by {draws}()" if draws else "differ by up to"
    cause = "The first difference arises in module '0.2' (Applied)."
    with pytest.raises(ValueError, match=f"forward pass is random.*{re.escape(drawn)}.*{re.escape(cause)}"):
        la.fit(train_loader())
    assert la.H is None
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_where_it_arises_outside_of_the_layers():
    model = Applied(lambda net, x: net(F.dropout(x, 0.5)))
    with pytest.raises(ValueError, match=r"arises in the model's own forward\(\)"):
        fitted(model=model)
    layer = Applied(dropped, nn.Identity())
    model = nn.Sequential(nn.Linear(D, H), layer, nn.Linear(H, H), layer, nn.Linear(H, C)).double()
    with pytest.raises(ValueError, match=r"arises in module '1' \(Applied\)"):
        fitted(model=model)
    model = mlp()
    model.register_forward_pre_hook(lambda m, args: F.dropout(args[0], 0.5))
    said = r"differ by up to .* Random numbers are drawn by \w+\(\)\. Linearised"
    with pytest.raises(ValueError, match=said):
        fitted(model=model)


def test_it_is_said_before_any_long_work():
    rows, read = [], []
    model = net(dropped)
    model.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    batches = (read.append(batch) or batch for batch in train_loader())
    with pytest.raises(ValueError, match="forward pass is random"):
        fitted(model=model, data=batches)
    assert len(read) == 1
    assert sum(rows) < 50


def unused(layer, x):
    torch.rand_like(x), random.random()
    return x


def seeded(layer, x):
    return x * torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(0)).to(x)


def off(layer, x):
    return F.dropout(x, 0.5, layer.training)


@pytest.mark.filterwarnings("ignore:.*(one by one|forward mode)")  # vmap takes no random numbers
@pytest.mark.parametrize("function", [unused, seeded, off])
def test_forwards_that_are_functions(function):
    check_features(fitted(model=net(function).train()), X)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.01)]
)
def test_sums_in_another_order_are_not_random(dtype, size):
    """Rounding in another way in every call, as atomic additions on a GPU do."""
    model = net(lambda layer, x: x * (1 + size * (next(CALLS) % 2))).to(dtype)
    fitted(model=model, data=train_loader(dtype=dtype), n_eigenvalues=1)
