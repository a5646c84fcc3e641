"""Pictures of what a method sees and does: pieces that methods put together, and sheets of them as PNG files.

Images here are float [..., 3, H, W] in 0 to 1. Letters: g side of a grid of cells (patches, positions of a map).
"""

from __future__ import annotations

import colorsys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastssl.batch import IMAGENET_MEAN, IMAGENET_STD

GAP = 2  # pixels between the pictures of a sheet


def to_picture(views: Tensor) -> Tensor:
    """Normalised views [..., 3, H, W] (ImageNet mean and standard deviation) as pictures, cut off at 0 and 1."""
    mean, std = (torch.tensor(values, device=views.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (views.float() * std + mean).clamp(0, 1)


def heat(picture: Tensor, maps: Tensor, strength: float = 0.6) -> Tensor:
    """A map laid over a picture, dark blue (its least value) over red to yellow (its largest).

    Args:
        picture: [..., 3, H, W].
        maps: [..., g, g], any range; each map is stretched to its own range.
    """
    lo, hi = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    level = _enlarge(((maps - lo) / (hi - lo).clamp_min(1e-12)).float(), picture.shape[-2:])
    colour = torch.stack(
        [(2 * level).clamp(0, 1), (2 * level - 1).clamp(0, 1), (0.6 - 1.2 * level).clamp(0, 1)], dim=-3
    )
    return (1 - strength) * picture + strength * colour


def cover(picture: Tensor, cells: Tensor, colour: float = 0.5) -> Tensor:
    """The picture with the marked cells painted in one gray.

    Args:
        picture: [..., 3, H, W].
        cells: bool [..., g, g], the cells to hide.
    """
    hidden = _enlarge(cells.float(), picture.shape[-2:])[..., None, :, :]
    return picture * (1 - hidden) + colour * hidden


def tint(picture: Tensor, labels: Tensor, count: int, strength: float = 0.6) -> Tensor:
    """The picture with each cell tinted in the colour of its label.

    Args:
        picture: [..., 3, H, W].
        labels: int [..., g, g], from 0 to count - 1; others are not tinted.
        count: how many labels there are.
    """
    palette = torch.tensor([colorsys.hsv_to_rgb(i / count, 0.9, 1.0) for i in range(count)], device=picture.device)
    known = (labels >= 0) & (labels < count)
    colour = palette[labels.clamp(0, count - 1)].movedim(-1, -3)  # [..., 3, g, g]
    weight = strength * _enlarge(known.float(), picture.shape[-2:])[..., None, :, :]
    return picture * (1 - weight) + weight * _enlarge(colour, picture.shape[-2:])


def sheet(pictures: Tensor) -> Tensor:
    """[rows, columns, 3, H, W] -> one picture [3, rows (H + gap) - gap, columns (W + gap) - gap] on white."""
    rows, columns, _, height, width = pictures.shape
    padded = F.pad(pictures.float(), (0, GAP, 0, GAP), value=1.0)
    joined = padded.permute(2, 0, 3, 1, 4).reshape(3, rows * (height + GAP), columns * (width + GAP))
    return joined[:, :-GAP, :-GAP]


def save(path: Path, pictures: Tensor) -> None:
    """Writes [rows, columns, 3, H, W] as one PNG file, small ones enlarged; makes its folder."""
    scale = max(1, 112 // pictures.shape[-1])
    pixels = (sheet(pictures.cpu().clamp(0, 1).repeat_interleave(scale, -1).repeat_interleave(scale, -2)) * 255).round()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.byte().permute(1, 2, 0).numpy()).save(path)


def _enlarge(cells: Tensor, size: tuple[int, ...]) -> Tensor:
    """[..., g, g] -> [..., H, W] by nearest neighbour."""
    lead = cells.shape[:-2]
    return F.interpolate(cells.reshape(-1, 1, *cells.shape[-2:]), size=tuple(size), mode="nearest").reshape(
        *lead, *size
    )
