"""A small grammar of networks, each with what makes inputs for it. Nothing here comes from the package."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from models import Applied
from torch import nn
from torch.nn.utils import parametrizations

# Where a kink is, a rounding error decides which side an input is on: with float64 only.
SMOOTH = (nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.Sigmoid, nn.Mish)
KINKED = (nn.ReLU, nn.LeakyReLU, nn.Hardtanh, nn.ELU, lambda: nn.ReLU(inplace=True))
VOCABULARY = 11
F64 = torch.float64


@dataclass
class Network:
    """A network in training mode, and how to make n inputs of it from a generator (with sequences of a length).

    ``positions``: whether outputs are (B, ..., C) with axes between. ``plain``: layers that BackPACK and ASDL know.
    """

    family: str
    module: nn.Module
    inputs: Callable[[int, torch.Generator, int], Any]
    positions: bool = False
    plain: bool = False


class Draw(random.Random):
    """Choices by probability."""

    def maybe(self, probability):
        return self.random() < probability

    def activation(self, dtype):
        every = SMOOTH + KINKED if dtype == F64 else SMOOTH
        return self.choice(every)()


def residual(block, inplace):
    """x + f(x), in place or not."""

    def forward(net, x):
        out = net(x)
        if inplace:
            out += x
            return out
        return out + x

    return Applied(forward, block)


class Wrapped(nn.Module):
    """What surrounds a body: a learnt scale, a head that is never used, an object with logits around the outputs."""

    def __init__(self, body, draw):
        super().__init__()
        self.body = body
        self.scale = nn.Parameter(torch.tensor(1.3)) if draw.maybe(0.3) else None
        self.unused = nn.Linear(2, 3) if draw.maybe(0.15) else None
        self.as_object = draw.maybe(0.2)

    def forward(self, x):
        f = self.body(x)
        f = f if self.scale is None else f * self.scale
        return SimpleNamespace(logits=f) if self.as_object else f


def linear(draw, n_in, n_out):
    layer = nn.Linear(n_in, n_out, bias=draw.maybe(0.8))
    return parametrizations.weight_norm(layer) if draw.maybe(0.1) else layer


def features(shape):
    return lambda n, generator, length: torch.randn(n, *shape, generator=generator, dtype=F64)


def mlp(draw, n_outputs, dtype):
    n_in, width = draw.choice((1, 2, 5)), draw.choice((3, 5, 7))
    plain = draw.maybe(0.5)
    dense = (lambda draw, a, b: nn.Linear(a, b)) if plain else linear
    layers = [nn.Linear(n_in, width), draw.activation(dtype)]
    shared = nn.Linear(width, width)
    for _ in range(draw.randint(0, 2)):
        kind = draw.choice(("linear",) if plain else ("linear", "residual", "tied", "norm", "dropout"))
        if kind == "linear":
            layers += [dense(draw, width, width), draw.activation(dtype)]
        elif kind == "residual":
            block = nn.Sequential(linear(draw, width, 3), draw.activation(dtype), linear(draw, 3, width))
            layers += [residual(block, draw.maybe(0.5))]
        elif kind == "tied":
            layers += [shared, draw.activation(dtype), shared]
        elif kind == "norm":
            layers += [draw.choice((nn.LayerNorm, nn.BatchNorm1d))(width)]
        else:
            layers += [nn.Dropout(0.3)]
    net = nn.Sequential(*layers, dense(draw, width, n_outputs))
    return Network("mlp", net if plain else Wrapped(net, draw), features((n_in,)), plain=plain)


def norm(draw, channels, axes):
    kind = draw.choice(("Batch", "group", "Instance", "none"))
    if kind == "group":
        return nn.GroupNorm(draw.choice([g for g in (1, 2, channels) if channels % g == 0]), channels)
    if kind == "none":
        return nn.Identity()
    return getattr(nn, f"{kind}Norm{axes}d")(channels, affine=draw.maybe(0.8 if kind == "Batch" else 0.7))


class Conv(nn.Module):
    """Convolutions, and a head on the mean, on all, or on every position."""

    def __init__(self, draw, axes, n_outputs, dtype, head, plain):
        super().__init__()
        channels, size = draw.choice((1, 2, 3)), 7 if axes == 1 else 6
        self.shape, layers = (channels, *[size] * axes), []
        for _ in range(draw.randint(1, 2)):
            wide = draw.choice((2, 4))
            options = {"stride": draw.choice((1, 1, 2)), "dilation": draw.choice((1, 1, 2))}
            options |= {"padding": draw.choice((0, 1)), "bias": draw.maybe(0.7)}
            options["groups"] = 2 if channels % 2 == 0 and not plain and draw.maybe(0.3) else 1
            options["kernel_size"] = draw.choice((1, 2, 3))
            left = size_after(size, **options)
            if left < 3:  # so that there is something to normalise over
                options |= {"kernel_size": 1, "stride": 1, "dilation": 1}
                left = size_after(size, **options)
            size = left
            layers.append((nn.Conv1d, nn.Conv2d)[axes - 1](channels, wide, **options))
            layers += [] if plain else [norm(draw, wide, axes)]
            layers.append(draw.activation(dtype))
            channels = wide
        if not plain and dtype == F64 and draw.maybe(0.2):
            layers.append((nn.MaxPool1d, nn.MaxPool2d)[axes - 1](2, 1))
        self.body, self.head = nn.Sequential(*layers), head
        with torch.no_grad():
            out = self.body.eval()(torch.zeros(1, *self.shape))
        self.body.train()
        self.last = nn.Linear(out[0].numel() if head == "all" else channels, n_outputs)

    def forward(self, x):
        h = self.body(x)
        if self.head == "positions":
            return self.last(h.movedim(1, -1))
        return self.last(h.flatten(1) if self.head == "all" else h.flatten(2).mean(2))


def size_after(size, kernel_size, padding, dilation, stride, **others):
    """Return what a convolution leaves of an axis."""
    return (size + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1


def conv(draw, n_outputs, dtype):
    axes, plain = draw.choice((1, 2)), draw.maybe(0.3)
    head = draw.choice(("all", "mean", "positions"))
    net = Conv(draw, axes, n_outputs, dtype, head, plain)
    if plain and head == "all":
        flat = nn.Sequential(*net.body, nn.Flatten(), net.last)
        return Network("conv", flat, features(net.shape), plain=True)
    return Network("conv", Wrapped(net, draw), features(net.shape), head == "positions")


class Tokens(nn.Module):
    """Embeddings of tokens with a mask, in a mapping; the mean of what follows, or an output for every token."""

    def __init__(self, draw, n_outputs, dtype, positions, key):
        super().__init__()
        self.positions, self.key, width = positions, key, 4
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.place = nn.Parameter(torch.randn(1, 7, width)) if draw.maybe(0.5) else None
        self.kind = draw.choice(("none", "attention", "layer", "mlp"))
        if self.kind == "attention":
            self.mix = nn.MultiheadAttention(width, draw.choice((1, 2)), batch_first=True, dropout=0.1)
        elif self.kind == "layer":
            options = {"batch_first": True, "norm_first": draw.maybe(0.5)}
            self.mix = nn.TransformerEncoderLayer(width, 2, 6, 0.1, "gelu", **options)
        elif self.kind == "mlp":
            self.mix = nn.Sequential(linear(draw, width, width), draw.activation(dtype))
        tied = draw.maybe(0.3)
        self.last = nn.Linear(VOCABULARY if tied else width, n_outputs)
        self.decoder = nn.Linear(width, VOCABULARY, bias=False) if tied else None
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, batch):
        h, mask = self.embedding(batch[self.key]), batch["attention_mask"]
        h = h if self.place is None else h + self.place[:, : h.shape[1]]
        if self.kind == "attention":
            h = h + self.mix(h, h, h, key_padding_mask=~mask.bool(), need_weights=False)[0]
        elif self.kind == "layer":
            h = self.mix(h, src_key_padding_mask=~mask.bool())
        elif self.kind == "mlp":
            h = self.mix(h)
        h = h if self.decoder is None else self.decoder(h).tanh()
        m = mask[..., None].to(h)
        return self.last(h if self.positions else (h * m).sum(1) / m.sum(1))


def tokens(draw, n_outputs, dtype):
    positions, key = draw.maybe(0.35), draw.choice(("input_ids", "tokens"))
    of_tokens, of_mask = draw.choice((torch.int64, torch.int32)), draw.choice((torch.int64, torch.bool))
    more = draw.choice(({}, {"note": "a string"}, {"scale": torch.tensor(2.0)}, {"empty": None}))
    net = Tokens(draw, n_outputs, dtype, positions, key)

    def inputs(n, generator, length):
        lengths = torch.randint(1, length + 1, (n, 1), generator=generator)
        found = torch.randint(VOCABULARY, (n, length), generator=generator).to(of_tokens)
        return {key: found, "attention_mask": (torch.arange(length) < lengths).to(of_mask), **more}

    return Network("tokens", Wrapped(net, draw), inputs, positions)


def recurrent(draw, n_outputs, dtype):
    """A recurrent layer, and a head on its last state or on all."""
    positions, both = draw.maybe(0.3), draw.maybe(0.3)
    kind, depth = draw.choice((nn.GRU, nn.LSTM, nn.RNN)), draw.choice((1, 2))
    layers = kind(3, 4, depth, batch_first=True, bidirectional=both), nn.Linear(8 if both else 4, n_outputs)

    def forward(net, x):
        h = net[0](x)[0]
        return net[1](h if positions else h[:, -1])

    net = Wrapped(Applied(forward, nn.ModuleList(layers)), draw)
    return Network(
        "recurrent", net, lambda n, generator, length: features((length, 3))(n, generator, 0), positions
    )


def nested(draw, n_outputs, dtype):
    """Two tensors in a tuple, a third in a mapping inside of the mapping."""
    layers = linear(draw, 2, 5), linear(draw, 3, 5), draw.activation(dtype), nn.Linear(5, n_outputs)

    def forward(net, batch):
        left, right, activation, last = net
        (a, b), c = batch["in"], batch["more"]["c"]
        batch["in"] = None  # what models do to the mapping that they are given
        h = activation(left(a) + right(b))
        return last(h * c[:, None].to(h))

    def inputs(n, generator, length):
        a, b, c = (torch.randn(n, *s, generator=generator).to(dtype) for s in ((2,), (3,), ()))
        return {"in": (a, b), "more": {"c": c, "note": "a string"}}

    return Network("nested", Wrapped(Applied(forward, nn.ModuleList(layers)), draw), inputs)


FAMILIES = {"mlp": mlp, "conv": conv, "tokens": tokens, "recurrent": recurrent, "nested": nested}


def make_network(draw, n_outputs, dtype):
    """Build a network; random weights, running statistics that are not 0 and 1, some of it frozen, never all."""
    family = draw.choices(list(FAMILIES), (5, 4, 3, 1, 1))[0]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(draw.getrandbits(31))
        with torch.enable_grad():
            network = FAMILIES[family](draw, n_outputs, dtype)
        for name, buffer in network.module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand_like(buffer))
        for p in network.module.parameters():
            p.mul_(1.5)
    network.module.to(dtype)
    if not network.plain and draw.maybe(0.25):
        weights = list(network.module.parameters())
        for p in draw.sample(weights, draw.randint(1, len(weights))):
            p.requires_grad_(False)
        # An output bias alone has the same gradients everywhere; a first weight sees inputs.
        weights[0].requires_grad_(True)
    return network
