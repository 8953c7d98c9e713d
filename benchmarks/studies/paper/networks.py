"""The networks of the paper, with what its authors' commands say of each, and their published weights.

Weights come from a file, or are downloaded if the user asks for it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.problems import MEAN, PROBLEMS, STD

Transform = Callable[[Any], Any]

RELEASE = "https://github.com/chenyaofo/pytorch-cifar-models/releases/download/resnet/"
FILES = {
    "resnet20": "cifar10_resnet20-4118986f.pt",
    "resnet32": "cifar10_resnet32-ef93fc4d.pt",
    "resnet44": "cifar10_resnet44-2a3cabcb.pt",
    "resnet56": "cifar10_resnet56-187c023a.pt",
}
# timm's names of torchvision's first weights, and of the ViT that timm gave by this name in 2022.
TIMM = {
    "resnet18": "resnet18.tv_in1k",
    "resnet34": "resnet34.tv_in1k",
    "resnet50": "resnet50.tv_in1k",
    "vit_base_patch16_224": "vit_base_patch16_224.augreg_in21k_ft_in1k",
}


@dataclass(frozen=True)
class Network:
    """A network of the paper.

    ``build`` downloads weights if told so; ``transforms`` gives what turns pictures into inputs: as for
    testing, and with the random crops that the authors' code validates on.
    """

    name: str
    build: Callable[[bool], nn.Module]
    source: str  # of its weights, in words
    transforms: Callable[[nn.Module], tuple[Transform, Transform]]
    prior_precision: float  # 1 / sigma_0^2
    n_outputs: int


def of_cifar(name: str) -> Network:
    smallest = 0.6 if name == "resnet44" else 0.5
    return Network(name, partial(build_cifar, name), RELEASE + FILES[name], crops(smallest), 25.0, 10)


def of_imagenet(name: str) -> Network:
    precision = 1e5 if name.startswith("vit") else 100.0
    source = f"timm's {TIMM[name]} (state dict, .pth or .safetensors)"
    return Network(name, partial(build_timm, TIMM[name]), source, timm_transforms, precision, 1000)


def build_cifar(name: str, download: bool) -> nn.Module:
    model = PROBLEMS[name].build(10)
    if download:
        url = RELEASE + FILES[name]
        model.load_state_dict(torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True))
    return model


def build_timm(name: str, download: bool) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=download)


def crops(smallest: float) -> Callable[[nn.Module], tuple[Transform, Transform]]:
    """Return what gives the transforms of CIFAR-10: crops cover ``smallest`` of the area or more."""

    def transforms(model: nn.Module) -> tuple[Transform, Transform]:
        from torchvision import transforms as of

        as_input = [of.ToTensor(), of.Normalize(MEAN, STD)]
        cropped = of.RandomResizedCrop(32, scale=(smallest, 1.0))
        return of.Compose(as_input), of.Compose([cropped, *as_input])

    return transforms


def timm_transforms(model: nn.Module) -> tuple[Transform, Transform]:
    from timm.data import create_transform, resolve_data_config

    own = resolve_data_config(model=model)
    augmented = create_transform(
        own["input_size"],
        is_training=True,
        scale=(0.08, 0.1),
        color_jitter=0.4,
        interpolation="bicubic",
        re_prob=0.25,
        mean=own["mean"],
        std=own["std"],
    )
    return create_transform(**own), augmented


CIFAR = {name: of_cifar(name) for name in FILES}
IMAGENET = {name: of_imagenet(name) for name in TIMM}


def weights_file(network: Network, given: Path | None, download: bool) -> Path | None:
    """Return the file of a network's weights, None for a download.

    Raises
    ------
    ValueError
        If there is no such file, or it is not said where weights come from.
    """
    if given is None:
        if download:
            return None
        raise ValueError(
            f"no weights for {network.name}. Get {network.source} and pass --weights FILE (or a folder of such "
            "files), or pass --download to let this script fetch them."
        )
    if download:
        raise ValueError("--weights and --download exclude each other; both were passed. Leave one out.")
    if given.is_dir():
        found = [path for path in sorted(given.glob(f"*{network.name}*")) if path.suffix in SUFFIXES]
        if len(found) == 1:
            return found[0]
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"the folder {given} must hold one file *{network.name}* ({', '.join(SUFFIXES)}); found: {names}. "
            f"Put {network.source} there, or pass --weights FILE."
        )
    if not given.is_file():
        raise ValueError(f"--weights {given}: no such file. Get {network.source}, or pass --download.")
    return given


SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def loaded(network: Network, weights: Path | None) -> nn.Module:
    """Return the network in evaluation mode, with the weights of a file, or downloaded ones."""
    model = network.build(weights is None)
    if weights is not None:
        try:
            model.load_state_dict(state_dict(weights))
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{weights} cannot be read as the weights of {network.name} ({first}). Allowed is a state dict "
                f"with its names and shapes: {network.source}."
            ) from error
    return model.eval()


def state_dict(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def require(*packages: str) -> None:
    """Raise unless all packages are there."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"this needs {' and '.join(missing)}. Install: pip install {' '.join(missing)}.")
