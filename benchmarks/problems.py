"""What is measured on: a ResNet-20 for 32 x 32 images, and images for it."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn

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


class ResNet20(nn.Module):
    """The CIFAR ResNet-20 of He et al. (2016), with 1x1 shortcuts: 272 474 parameters.

    Names match the weights of github.com/chenyaofo/pytorch-cifar-models (cifar10_resnet20).
    """

    def __init__(self, n_outputs: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.fc = nn.Linear(64, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def resnet20(data: Path | None, device: torch.device) -> nn.Module:
    """Return a ResNet-20 in evaluation mode, with the weights in ``data`` or random ones."""
    torch.manual_seed(0)
    model = ResNet20()
    if data is not None:
        model.load_state_dict(torch.load(data / "cifar10_resnet20.pt", weights_only=True))
    return model.eval().to(device)


def images(n: int, data: Path | None) -> tuple[Tensor, Tensor]:
    """Return n images and labels: CIFAR-10 (JPEG) if ``data`` holds it, else noise."""
    generator = torch.Generator().manual_seed(0)
    if data is None:
        return torch.randn(n, 3, 32, 32, generator=generator), torch.randint(10, (n,), generator=generator)
    import numpy as np
    from PIL import Image

    with np.load(data / "cifar10_jpeg_test.npz") as file:
        jpeg, offset, label = file["jpeg"].tobytes(), file["offset"], file["label"]
    chosen = torch.randperm(len(label), generator=generator)[:n].tolist()
    pictures = [np.asarray(Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]]))) for i in chosen]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return x.contiguous(), torch.from_numpy(label[chosen].astype("int64"))
