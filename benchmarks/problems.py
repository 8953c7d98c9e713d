"""What is measured on: networks of several kinds, and inputs for them.

``network`` and ``samples`` build a problem by its name; both draw the same numbers at every call.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

WORDS = 8000  # that texts are made of
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + shortcut)


def stage(n_blocks: int, channels_in: int, channels: int, stride: int) -> nn.Module:
    """Return blocks of one width, of which the first changes it."""
    following = (Block(channels, channels, 1) for _ in range(n_blocks - 1))
    return nn.Sequential(Block(channels_in, channels, stride), *following)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016), with 1x1 shortcuts; with 20 layers, 272 474 parameters.

    Names match the weights of github.com/chenyaofo/pytorch-cifar-models (cifar10_resnet20, 32, 44, 56).
    """

    def __init__(self, depth: int, n_outputs: int = 10) -> None:
        super().__init__()
        n_blocks = (depth - 2) // 6  # of two layers each, in each of three stages
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(n_blocks, 16, 16, 1)
        self.layer2 = stage(n_blocks, 16, 32, 2)
        self.layer3 = stage(n_blocks, 32, 64, 2)
        self.fc = nn.Linear(64, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


ResNet20 = partial(CifarResNet, 20)


class ViT(nn.Module):
    """A small vision transformer, mean over its tokens: 5 362 378 parameters at 10 outputs, for 32 x 32 images."""

    def __init__(
        self,
        n_outputs: int = 10,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        ratio: int = 4,
        tokens: int = 64,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 4, 4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, heads, ratio * width, **options) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.fc(self.norm(self.layers(tokens)).mean(1))


def mlp(n_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, n_outputs)
    )


def tiny(n_outputs: int) -> nn.Module:
    """So few weights that a P x P matrix is nothing."""
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, n_outputs))


def large_mlp(n_outputs: int) -> nn.Module:
    """Ten million weights, and hardly an activation."""
    return nn.Sequential(
        nn.Linear(784, 2800), nn.ReLU(), nn.Linear(2800, 2800), nn.ReLU(), nn.Linear(2800, n_outputs)
    )


class Encoder(nn.Module):
    """A transformer over word pieces, as BERT is one: classifies a text by its first token, or every token of it."""

    def __init__(
        self,
        n_outputs: int,
        words: int = WORDS,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        length: int = 64,
        tags: bool = False,
    ) -> None:
        super().__init__()
        self.tags = tags
        self.words = nn.Embedding(words, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, length, width))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True}
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(width, heads, 4 * width, **options) for _ in range(depth))
        )
        self.fc = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers(self.words(x) + self.positions)
        return self.fc(hidden if self.tags else hidden[:, 0])


Tagger = partial(Encoder, words=WORDS, width=64, depth=2, length=16, tags=True)


def of_torchvision(name: str, **options: Any) -> Callable[[int], nn.Module]:
    """Return what builds one of torchvision's networks; torchvision is imported then, and not before."""

    def build(n_outputs: int) -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(num_classes=n_outputs, **options)

    return build


@dataclass(frozen=True)
class Problem:
    """A network (as a function of its number of outputs), and the shape of its inputs: of words, if it takes any."""

    build: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    n_outputs: int = 10
    words: int = 0


PROBLEMS = {
    "resnet20": Problem(ResNet20, (3, 32, 32)),
    **{f"resnet{depth}": Problem(partial(CifarResNet, depth), (3, 32, 32)) for depth in (32, 44, 56)},
    "vit": Problem(ViT, (3, 32, 32)),
    "mlp": Problem(mlp, (784,)),
    "tiny": Problem(tiny, (64,)),
    "large-mlp": Problem(large_mlp, (784,)),
    "bert": Problem(Encoder, (64,), words=WORDS),
    "tagger": Problem(Tagger, (16,), words=WORDS),
    "resnet18": Problem(of_torchvision("resnet18"), (3, 32, 32)),
    "resnet18-64": Problem(of_torchvision("resnet18"), (3, 64, 64)),
    "resnet50-64": Problem(of_torchvision("resnet50"), (3, 64, 64)),
    "vit_b_16-64": Problem(of_torchvision("vit_b_16", image_size=64), (3, 64, 64)),
    "resnet50": Problem(of_torchvision("resnet50"), (3, 224, 224), 1000),
    "vit_b_16": Problem(of_torchvision("vit_b_16"), (3, 224, 224), 1000),
}


def network(name: str, data: Path | None, device: torch.device, n_outputs: int | None = None) -> nn.Module:
    """Return a network in evaluation mode, with random weights, or those in ``data`` for "resnet20"."""
    torch.manual_seed(0)
    n_outputs = n_outputs or PROBLEMS[name].n_outputs
    model = PROBLEMS[name].build(n_outputs)
    if name == "resnet20" and data is not None:
        weights = torch.load(data / "cifar10_resnet20.pt", weights_only=True)
        # Of fewer than ten outputs, the first ones.
        weights.update({k: v[:n_outputs] for k, v in weights.items() if k.startswith("fc.")})
        model.load_state_dict(weights)
    return model.eval().to(device)


def samples(name: str, n: int, data: Path | None, n_outputs: int = 10) -> tuple[Tensor, Tensor]:
    """Return n inputs with targets: classes, or one number (n, 1) if there is one output only."""
    problem = PROBLEMS[name]
    if problem.shape == (3, 32, 32):
        x, y = images(n, data)
    else:
        x, y = noise(n, problem.shape, seed=0)
    if problem.words:
        x = torch.randint(problem.words, x.shape, generator=torch.Generator().manual_seed(0))
    return x, torch.zeros(n, 1) if n_outputs == 1 else y % n_outputs


def noise(n: int, shape: tuple[int, ...], seed: int, n_classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, generator=generator)
    return x, torch.randint(n_classes, (n,), generator=generator)


class NoiseBatches(Dataset):
    """Batches of noise, made when asked for and equal at every pass; for ``DataLoader(..., batch_size=None)``."""

    def __init__(self, name: str, n: int, batch: int) -> None:
        self.problem, self.n, self.batch = PROBLEMS[name], n, batch

    def __len__(self) -> int:
        return -(-self.n // self.batch)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= len(self):
            raise IndexError(index)
        size = min(self.batch, self.n - index * self.batch)
        return noise(size, self.problem.shape, seed=index, n_classes=self.problem.n_outputs)


def images(n: int, data: Path | None) -> tuple[Tensor, Tensor]:
    """Return n images and labels: CIFAR-10 (JPEG) if ``data`` holds it, else noise."""
    if data is None:
        return noise(n, (3, 32, 32), seed=0)
    import numpy as np

    with np.load(data / "cifar10_jpeg_test.npz") as file:
        n_images = len(file["label"])
    chosen = torch.randperm(n_images, generator=torch.Generator().manual_seed(0))[:n].tolist()
    pixels, label = decoded(data / "cifar10_jpeg_test.npz", chosen)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return x.contiguous(), torch.from_numpy(label.astype("int64"))


def decoded(path: Path, chosen: list[int] | None = None) -> tuple[Any, Any]:
    """Return pixels (N, 32, 32, 3), uint8, and labels of a file of JPEG images; all, if none are chosen."""
    import numpy as np
    from PIL import Image

    with np.load(path) as file:
        jpeg, offset, label = file["jpeg"].tobytes(), file["offset"], file["label"]
    chosen = list(range(len(label))) if chosen is None else chosen
    pictures = [np.asarray(Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]]))) for i in chosen]
    return np.stack(pictures), label[chosen]
