"""The toy models of all tests: one table of builders and input shapes, and wrappers that give a network a property."""

import threading
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Distinct primes, so that a swapped axis cannot pass.
D, H, C = 5, 7, 3
N_INPUTS, N_HIDDEN = 2, 13
F64 = torch.float64


def mlp(n_outputs=C, seed=0, dtype=F64):
    """D inputs, H hidden units; the same weights for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, n_outputs)).to(dtype)


def partly_frozen_mlp():
    model = mlp()
    model[0].bias.requires_grad_(False)
    return model


def wide_mlp():
    return nn.Sequential(nn.Linear(N_INPUTS, N_HIDDEN), nn.Tanh(), nn.Linear(N_HIDDEN, C))


def partly_frozen():
    layers = nn.Linear(N_INPUTS, N_HIDDEN), nn.Tanh(), nn.Linear(N_HIDDEN, 5), nn.Tanh(), nn.Linear(5, C)
    model = nn.Sequential(*layers)
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


class ConvNet(nn.Sequential):
    """Convolution and batch normalisation whose running statistics differ from 0 and 1."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 5, 2), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 2 * 2, C)
        )
        with torch.no_grad():
            self[1].running_mean.copy_(0.3 * torch.randn(5))
            self[1].running_var.copy_(0.5 + torch.rand(5))


class Residual(nn.Module):
    """A residual block with in-place activations and an in-place sum."""

    def __init__(self, n_inputs=N_INPUTS, width=N_HIDDEN, inner=5, n_outputs=C, last=None):
        super().__init__()
        self.stem = nn.Linear(n_inputs, width)
        self.first, self.second = nn.Linear(width, inner), nn.Linear(inner, width)
        self.head, self.relu, self.last = nn.Linear(width, n_outputs), nn.ReLU(inplace=True), last

    def forward(self, x):
        h = self.stem(x).tanh()
        out = self.second(self.relu(self.first(h)))
        out += h
        return self.head((self.last or self.relu)(out))


class Tied(nn.Module):
    """Two layers that share one weight, as embeddings and heads of language models do."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(N_INPUTS, N_HIDDEN)
        self.first, self.second = nn.Linear(N_HIDDEN, N_HIDDEN), nn.Linear(N_HIDDEN, N_HIDDEN)
        self.second.weight = self.first.weight
        self.head = nn.Linear(N_HIDDEN, C)

    def forward(self, x):
        return self.head(self.second(self.first(self.stem(x).tanh()).tanh()).tanh())


class Sequence(nn.Module):
    """(B, L, 2) -> (B, L, C); every position sees those before it."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(2, 7), nn.Linear(7, C)

    def forward(self, x):
        h = self.stem(x).tanh()
        return self.head(h + h.cumsum(1).sin())


class Pixels(nn.Module):
    """(B, 2, H, W) -> (B, H, W, C)."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, C, 1)

    def forward(self, x):
        return self.head(self.stem(x).tanh()).permute(0, 2, 3, 1)


# Name: builder, and the shape of an input. Weights are float32 and those of the global generator.
Builder = Callable[[], nn.Module]
MODELS = {
    "mlp": (wide_mlp, (N_INPUTS,)),
    "conv_batchnorm": (ConvNet, (2, 3, 3)),
    "residual_inplace": (Residual, (N_INPUTS,)),
    "tied": (Tied, (N_INPUTS,)),
    "partly_frozen": (partly_frozen, (N_INPUTS,)),
}
WITH_POSITIONS = {
    "sequence": (Sequence, (7, 2)),
    "pixels": (Pixels, (2, 2, 5)),
}


class Applied(nn.Module):
    """A network, and a function of it and of the inputs in the place of its forward pass."""

    def __init__(self, forward, net=None):
        super().__init__()
        self.net, self.function = mlp() if net is None else net, forward

    def forward(self, x):
        return self.function(self.net, x)


class Counting(nn.Module):
    """Counts how often it is called."""

    def __init__(self, net=None):
        super().__init__()
        self.net, self.calls = mlp() if net is None else net, 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


class Waiting(nn.Module):
    """Stops in its forward pass, while its weights are exchanged, until it may go on."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def stop(self):
        self.inside.clear()
        self.go_on.clear()

    def forward(self, x):
        self.inside.set()
        assert self.go_on.wait(60)
        return self.net(x)

    def __deepcopy__(self, memo):
        return self


class RewardModel(nn.Module):
    """Rewards (B, 1) of options (B, D); logits (B, 2) of pairs of options (B, 2, D)."""

    def __init__(self, net=None):
        super().__init__()
        self.net = mlp(n_outputs=1) if net is None else net

    def forward(self, x):
        return self.net(x.flatten(0, 1)).reshape(len(x), 2) if x.ndim == 3 else self.net(x)


class DictModel(nn.Module):
    """Takes a mapping, returns an object with ``.logits``, as Hugging Face's models do."""

    def __init__(self, key_x="input_ids"):
        super().__init__()
        torch.manual_seed(0)
        self.key_x = key_x
        self.embedding = nn.Embedding(11, H, dtype=F64)
        self.head = nn.Linear(H, C, dtype=F64)

    def forward(self, batch):
        mask = batch["attention_mask"][..., None]
        mean = (self.embedding(batch[self.key_x]) * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=self.head(mean.tanh()))


def weighted(net, batch):
    """Apply weights that all inputs share."""
    return net({**batch, "attention_mask": batch["attention_mask"] * batch["weights"]})


class Checkpointed(nn.Module):
    """Recomputes its block in the backward pass, unless ``use_reentrant`` is None.

    Checkpoints of the old style know ``backward()`` only, which adds to ``.grad``; they
    need an input that requires grad, hence the stem.
    """

    def __init__(self, use_reentrant, width=D):
        super().__init__()
        self.stem = nn.Linear(width, H)
        self.block = nn.Sequential(nn.Linear(H, H), nn.Tanh(), nn.Linear(H, C))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        h = self.stem(x).tanh()
        if self.use_reentrant is None:
            return self.block(h)
        return checkpoint(self.block, h, use_reentrant=self.use_reentrant)
