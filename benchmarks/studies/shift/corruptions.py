"""Corrupted images for shift.py: rotations, blur, noise and the like, each at five severities.

The kinds are those of Hendrycks and Dietterich (ICLR 2019) that need no data of their own, and rotations as in
Ovadia et al. (NeurIPS 2019). Levels are chosen here so that accuracy falls gradually on images of 28 and 32
pixels. Pixels go in and come out in [0, 1], (N, channels, height, width), before any normalisation.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, pad

N_SEVERITIES = 5


def rotation(pixels: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Turn each image to the left or to the right, which is drawn; corners become black."""
    side = 2.0 * torch.randint(2, (len(pixels),), generator=generator) - 1
    angle = side * math.radians(degrees)
    zero = torch.zeros_like(angle)
    rows = [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero]
    grid = affine_grid(torch.stack(rows, 1).reshape(-1, 2, 3), list(pixels.shape), align_corners=False)
    return grid_sample(pixels, grid, align_corners=False)


def blur(pixels: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Convolve with a Gaussian of this standard deviation in pixels."""
    radius = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-radius, radius + 1).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    one_by_one = pixels.reshape(-1, 1, *pixels.shape[-2:])  # each channel as an image
    extended = pad(one_by_one, [radius] * 4, mode="replicate")
    return conv2d(conv2d(extended, kernel[None, None, :, None]), kernel[None, None, None]).view_as(pixels)


def gaussian_noise(pixels: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    return pixels + sigma * torch.randn(pixels.shape, generator=generator)


def jpeg(pixels: Tensor, quality: int, generator: torch.Generator) -> Tensor:
    """Compress with JPEG at this quality, and decompress."""
    images = (255 * pixels).round().to(torch.uint8)
    return torch.stack([_compressed(image, quality) for image in images]).to(pixels) / 255


def _compressed(image: Tensor, quality: int) -> Tensor:
    file, grey = io.BytesIO(), len(image) == 1
    Image.fromarray((image[0] if grey else image.permute(1, 2, 0)).numpy()).save(
        file, format="JPEG", quality=quality
    )
    found = torch.from_numpy(np.array(Image.open(file)))
    return found[None] if grey else found.permute(2, 0, 1)


def contrast(pixels: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Shrink the distance to the image's mean by this factor."""
    mean = pixels.mean((1, 2, 3), keepdim=True)
    return mean + factor * (pixels - mean)


def brightness(pixels: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    return pixels + shift


@dataclass(frozen=True)
class Kind:
    """A corruption with its levels, one a severity, for grey and for coloured images."""

    function: Callable[[Tensor, float, torch.Generator], Tensor]
    level: str  # what the levels are
    grey: tuple[float, ...]
    colour: tuple[float, ...]

    def levels(self, channels: int) -> tuple[float, ...]:
        return self.grey if channels == 1 else self.colour


# Levels differ, since photographs suffer from noise and blur that clothes on black do not notice.
KINDS = {
    "rotation": Kind(rotation, "degrees", (5, 9, 13, 18, 24), (8, 15, 22, 30, 40)),
    "blur": Kind(blur, "standard deviation, pixels", (0.8, 1.2, 1.6, 2, 2.5), (0.5, 0.6, 0.7, 0.85, 1)),
    "Gaussian noise": Kind(
        gaussian_noise, "standard deviation", (0.1, 0.15, 0.2, 0.3, 0.4), (0.015, 0.03, 0.045, 0.06, 0.08)
    ),
    "JPEG": Kind(jpeg, "quality", (15, 9, 6, 4, 2), (60, 40, 27, 18, 10)),
    "contrast": Kind(contrast, "factor", (0.85, 0.75, 0.65, 0.55, 0.45), (0.7, 0.5, 0.4, 0.3, 0.2)),
    "brightness": Kind(brightness, "added", (0.04, 0.08, 0.12, 0.16, 0.2), (0.1, 0.2, 0.3, 0.4, 0.5)),
}


def corrupted(pixels: Tensor, kind: str, severity: int, seed: int) -> Tensor:
    """Return the images with a corruption of a severity from 1 to 5; what is drawn is the same at each of them."""
    if not 1 <= severity <= N_SEVERITIES:
        raise ValueError(f"severity must be 1 to {N_SEVERITIES}; got {severity}")
    chosen = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    level = chosen.levels(pixels.shape[1])[severity - 1]
    return chosen.function(pixels, level, generator).clamp(0, 1)
