"""Damage of image blocks, and the drawing of the blocks, in plain PyTorch.

Words of Philox have the key (seed, purpose), the purpose being a CRC-32, and are spent as follows:

    noise       counter (pixel, view, epoch, id): two normal numbers of two words each, one of them for nothing
    blocks      counter (id, epoch, view, n): of n = 0 the budget, then per block top, height, left, width
    the others  counter (id, epoch, view, n): n = 0, or the number of the block; its top, left, height, width
"""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._philox import LOW, philox

NOISE_KEY = zlib.crc32(b"noise") & LOW >> 1
BLOCKS_KEY = zlib.crc32(b"blocks") & LOW >> 1  # + the blocks' kind
DAMAGE_KEY, GRAY_KEY, BLUR_KEY, KERNEL_KEY, NOISE_BLOCKS_KEY, ALIEN_BLOCKS_KEY, ROTATION_KEY = (
    zlib.crc32(f"sit/{purpose}".encode())
    for purpose in ("damage", "gray", "blur", "blur/kernel", "noise", "alien", "rotation")
)
CANDIDATES = 48  # for the noise (alien) blocks of SiT's first version; about 8 are used, and 16 of the largest budget
TAPS = 8  # weights of its widest blur: of a pixel and of 7 to each side


def corrupt(
    views: Tensor, boxes: Tensor, kind: Tensor, source: Tensor, ids: Tensor, seed: int, epoch: int | Tensor,
    view: int, soft: Tensor | None = None, weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `fastssl.kernels.corrupt.corrupt`."""
    rows, _, height, width = views.shape
    shown = topmost(boxes, kind, height, width)
    pixels = torch.arange(height * width, device=views.device).view(height, width)
    ids, number = by_view(ids, rows // max(len(ids), 1))
    words = philox((pixels, view + number[:, None, None], epoch, ids[:, None, None]), (seed, NOISE_KEY))
    exact = torch.promote_types(views.dtype, torch.float32)
    noise = torch.stack([*normals(words[0], words[1], exact), normals(words[2], words[3], exact)[0]], dim=1)
    beneath, mask = views, shown > 0
    if soft is not None and weights is not None:
        beneath, softer = softened(views, soft, weights)
        mask = mask | softer
    shown = shown[:, None]
    painted = torch.where(shown == 0, beneath, 0)
    painted = torch.where(shown == 2, noise.to(views.dtype), painted)
    painted = torch.where(shown == 3, views[source], painted)
    return torch.empty_like(views).copy_(painted), mask


def by_view(ids: Tensor, views: int) -> tuple[Tensor, Tensor]:
    """For all views of the samples [B], view after view: ids and view numbers, [views x B] each."""
    return ids.repeat(views), torch.arange(views, device=ids.device).repeat_interleave(len(ids))


def softened(views: Tensor, soft: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Views [N, 3, H, W] with a gray block and then a blurred one, and where these lie, bool [N, H, W]."""
    gray, blur = (inside(box, *views.shape[2:]) for box in soft.unbind(1))
    views = torch.where(gray[:, None], views.mean(dim=1, keepdim=True), views)
    return torch.where(blur[:, None], blurred(views, soft[:, 1], weights), views), gray | blur


def blurred(views: Tensor, box: Tensor, weights: Tensor) -> Tensor:
    """Views [N, 3, H, W] whose block [N, 4] is blurred by itself, reflected at its borders; other pixels are of no
    use. `weights` [N, taps] are those of pixels 0, 1, .. away."""
    dtype = views.dtype
    views = views.to(torch.promote_types(dtype, torch.float32))
    weights = weights.to(views.dtype)[:, :, None, None, None]
    for dim in (2, 3):
        begin, length = box[:, dim - 2, None].long(), box[:, dim, None]  # [N, 1]
        period = (2 * length - 2).clamp_min(1)
        pixel = torch.arange(views.shape[dim], device=views.device) - begin  # [N, side]
        total = torch.zeros_like(views)
        for k in range(1 - weights.shape[1], weights.shape[1]):
            offset = (pixel + k) % period
            neighbour = begin + offset.minimum(period - offset)
            neighbour = neighbour[:, None, :, None] if dim == 2 else neighbour[:, None, None]
            total += weights[:, abs(k)] * views.gather(dim, neighbour.expand_as(views))
        views = total
    return views.to(dtype)


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
    ids: Tensor, views: int, height: int, width: int, drop: float, replace: float, seed: int, epoch: int | Tensor,
    alien: float = 0.5, noise: float = 0.0, group: int = 8, max_side: float = 0.3, align: int = 1,
    uniform_rate: bool = True, max_blocks: tuple[int, int] = (128, 128),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `fastssl.kernels.corrupt.draw_blocks`."""
    count = len(ids)
    ids, view = by_view(ids, views)
    path, fill, other, _ = philox((ids, epoch, view, 0), (seed, DAMAGE_KEY))
    mixed = path < int(alien * 2**32)
    kind = torch.where(mixed, 2, (fill < int(noise * 2**32)).long())
    rows = [
        covering(ids, view, height, width, share, seed, epoch, k, max_side, align, uniform_rate, most)
        for share, k, most in ((drop, 0, max_blocks[0]), (replace, 2, max_blocks[1]))
    ]
    blank, alien_boxes = (F.pad(boxes, (0, 0, 0, max(max_blocks) - boxes.shape[1])) for boxes in rows)
    boxes = torch.where(mixed[:, None, None], alien_boxes, blank)
    source = alien_source(other.view(views, count), group).flatten() + view * count
    return boxes.int(), kind.int()[:, None].repeat(1, boxes.shape[1]), source


def covering(
    ids: Tensor, view: Tensor, height: int, width: int, fraction: float, seed: int, epoch: int | Tensor, kind: int,
    max_side: float, align: int, uniform_rate: bool, max_blocks: int,
) -> Tensor:  # fmt: skip
    """Blocks whose union reaches a budget, int64 [N, max_blocks, 4]."""
    draws = torch.arange(max_blocks + 1, device=ids.device)
    words = torch.stack(philox((ids[:, None], epoch, view[:, None], draws), (seed, BLOCKS_KEY + kind)))
    low, span = budget(height, width, fraction)
    need = low + below(words[0, :, 0], span + 1)  # [N], pixels
    top, tall = extent(words[0, :, 1:], words[1, :, 1:], height, int(max_side * height), align, uniform_rate)
    left, wide = extent(words[2, :, 1:], words[3, :, 1:], width, int(max_side * width), align, uniform_rate)
    boxes = torch.stack([top, left, tall, wide], dim=2)
    covered = torch.zeros(len(ids), height, width, dtype=torch.bool, device=ids.device)
    for n in range(max_blocks):
        boxes[:, n] *= (covered.sum(dim=(1, 2)) < need)[:, None]
        covered |= inside(boxes[:, n], height, width)
    return boxes


def alien_source(words: Tensor, group: int) -> Tensor:
    """The image that another one's alien blocks show, int64 [.., B], as an index into the batch.

    Args:
        words: int64 [.., B], one random 32-bit number per image.
        group: another image of so many consecutive ones; 0: any image of the batch, itself included.
    """
    count = words.shape[-1]
    here = torch.arange(count, device=words.device)
    if group == 0:
        return below(words, count)
    begin = here // group * group
    size = (count - begin).clamp_max(group)
    return begin + (here - begin + 1 + below(words, size - 1)) % size


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


def draw_first(
    ids: Tensor, views: int, side: int, share: float, seed: int, epoch: int | Tensor, group: int = 8
) -> tuple[Tensor, ...]:
    """See `fastssl.kernels.corrupt.draw_first`."""
    count, (ids, view) = len(ids), by_view(ids, views)
    (least, limit), number = first_sides(side), torch.arange(CANDIDATES, device=ids.device)

    def words(key: int, n: Tensor | int = 0) -> tuple[Tensor, ...]:
        return philox((ids[:, None], epoch, view[:, None], n), (seed, key))

    def blocks(key: int, n: Tensor | int, limit: int) -> Tensor:
        drawn = torch.stack(words(key, n), dim=-1)  # [N, R, 4]
        start = below(drawn[..., :2], side - least)
        size = least + below(drawn[..., 2:], max(limit - least, 1))
        return torch.cat([start, size.minimum(side - start)], dim=-1)

    other, *budgets, _ = (word[:, 0] for word in words(DAMAGE_KEY))
    source = alien_source(other.view(views, count), group).flatten() + view * count
    spent = []
    for key, budget in zip((NOISE_BLOCKS_KEY, ALIEN_BLOCKS_KEY), budgets, strict=True):
        boxes = blocks(key, number, limit)
        area = boxes[..., 2] * boxes[..., 3]
        most = budget.double() * first_scale(side, share)
        spent.append(boxes * (area.cumsum(1) - area < most[:, None])[..., None])
    spent[1] *= (source != torch.arange(len(ids), device=ids.device))[:, None, None]
    kind = (1 + (torch.arange(2 * CANDIDATES, device=ids.device) >= CANDIDATES).int()).repeat(len(ids), 1)
    soft = torch.cat([blocks(key, 0, side) for key in (GRAY_KEY, BLUR_KEY)], dim=1)

    kernel, spread, _, _ = words(KERNEL_KEY)  # [N, 1]
    tap = torch.arange(TAPS, device=ids.device)
    sigma = 0.1 + 5 * spread.double() * 2.0**-32
    weights = (-0.5 * (tap / sigma).square()).exp() * (tap <= (3 + below(kernel, 13)) // 2)
    weights = weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])
    turns = words(ROTATION_KEY)[0][:, 0] >> 30
    return torch.cat(spent, dim=1).int(), kind, source, soft.int(), weights, turns


def first_sides(side: int) -> tuple[int, int]:
    """Least side of a block, and the bound on those of noise and alien blocks (11 and 56 of 224 pixels)."""
    return max(1, round(side * 11 / 224)), side // 4


def first_scale(side: int, share: float) -> float:
    """Pixels of a budget per unit of its word."""
    return share * side * side * 2.0**-32
