"""Damage of image blocks, and the drawing of the blocks, in plain PyTorch."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from fastssl.kernels._philox import LOW, philox

NOISE_KEY = zlib.crc32(b"noise") & LOW >> 1  # second halves of the keys; below 2^31
BLOCKS_KEY = zlib.crc32(b"blocks") & LOW >> 1


def corrupt(
    views: Tensor, boxes: Tensor, kind: Tensor, source: Tensor, ids: Tensor, seed: int, epoch: int, view: int
) -> tuple[Tensor, Tensor]:
    """See `fastssl.kernels.corrupt.corrupt`."""
    _, _, height, width = views.shape
    shown = topmost(boxes, kind, height, width)
    pixels = torch.arange(height * width, device=views.device).view(height, width)
    words = philox((pixels, view, epoch, ids[:, None, None]), (seed, NOISE_KEY))
    exact = torch.promote_types(views.dtype, torch.float32)
    noise = torch.stack([*normals(words[0], words[1], exact), normals(words[2], words[3], exact)[0]], dim=1)
    shown = shown[:, None]
    painted = torch.where(shown == 0, views, 0)
    painted = torch.where(shown == 2, noise.to(views.dtype), painted)
    painted = torch.where(shown == 3, views[source], painted)
    return torch.empty_like(views).copy_(painted), shown[:, 0] > 0


def topmost(boxes: Tensor, kind: Tensor, height: int, width: int) -> Tensor:
    """1 + kind of the last rectangle over each pixel, 0 where there is none: uint8 [B, H, W]."""
    shown = torch.zeros(len(boxes), height, width, dtype=torch.uint8, device=boxes.device)
    for box, k in zip(boxes.unbind(1), kind.unbind(1), strict=True):
        shown = torch.where(inside(box, height, width), (k + 1).to(torch.uint8)[:, None, None], shown)
    return shown


def inside(box: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in one rectangle per image: [B, 4] -> bool [B, H, W]."""
    top, left, tall, wide = box[:, :, None].unbind(1)  # [B, 1]
    row, column = torch.arange(height, device=box.device), torch.arange(width, device=box.device)
    rows = (row >= top) & (row < top + tall)
    columns = (column >= left) & (column < left + wide)
    return rows[:, :, None] & columns[:, None, :]


def normals(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two normal numbers from two words (Box and Muller 1958); 24 bits of each word count."""
    uniform = ((first >> 8) + 1).to(dtype) * 2**-24  # (0, 1]
    angle = ((second >> 8 ^ 2**23) - 2**23).to(dtype) * (math.pi * 2**-23)  # [-pi, pi)
    radius = (-2 * uniform.log()).sqrt()
    return radius * angle.cos(), radius * angle.sin()


def draw_blocks(
    ids: Tensor, height: int, width: int, fraction: float, seed: int, epoch: int, view: int = 0, kind: int = 0,
    max_side: float = 0.3, align: int = 1, uniform_rate: bool = True, max_blocks: int = 128,
) -> Tensor:  # fmt: skip
    """See `fastssl.kernels.corrupt.draw_blocks`."""
    draws = torch.arange(max_blocks + 1, device=ids.device)
    words = torch.stack(philox((ids[:, None], epoch, view, draws), (seed, BLOCKS_KEY + kind)))  # [4, B, draws]
    low, span = budget(height, width, fraction)
    need = low + below(words[0, :, 0], span + 1)  # [B], pixels
    top, tall = extent(words[0, :, 1:], words[1, :, 1:], height, int(max_side * height), align, uniform_rate)
    left, wide = extent(words[2, :, 1:], words[3, :, 1:], width, int(max_side * width), align, uniform_rate)
    boxes = torch.stack([top, left, tall, wide], dim=2)  # [B, max_blocks, 4]
    covered = torch.zeros(len(ids), height, width, dtype=torch.bool, device=ids.device)
    for n in range(max_blocks):
        boxes[:, n] *= (covered.sum(dim=(1, 2)) < need)[:, None]
        covered |= inside(boxes[:, n], height, width)
    return boxes.int()


def budget(height: int, width: int, fraction: float) -> tuple[int, int]:
    """Least number of pixels to cover, and how much more it may be."""
    low, high = (math.ceil(share * height * width - 1e-6) for share in (min(0.5, fraction), fraction))
    return low, high - low


def extent(
    start: Tensor, length: Tensor, side: int, limit: int, align: int, uniform_rate: bool
) -> tuple[Tensor, Tensor]:
    """Start and length of blocks along one side of the image, from two words each."""
    length = align + below(length, limit - align)
    if uniform_rate:
        cells = half_even(length, align)
        start = below(start, -(-side // align) + cells - 1) - cells + 1
        end = (start + cells) * align
        start = (start * align).clamp_min(0)
        return start, end.clamp_max(side) - start
    start = below(start, side - align) // align * align
    length = half_even(torch.minimum(length, side - start), align) * align
    return start, torch.minimum(length, side - start)


def half_even(length: Tensor, align: int) -> Tensor:
    """length / align, rounded, half to even."""
    cells, rest = length // align, 2 * (length % align)
    return cells + ((rest > align) | (rest == align) & (cells % 2 == 1))


def below(word: Tensor, n: Tensor | int) -> Tensor:
    """An integer uniform in {0, .., n - 1} from a word."""
    return word * n >> 32
