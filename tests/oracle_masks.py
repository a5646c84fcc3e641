"""The masks of `fastssl.loaders.masks` for whole batches in PyTorch: what tests compare the compiled ones with.

Letters: B images, N patches per image, K kept patches, M = N - K masked patches; T tries of a run; P parts.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.kernels._philox import philox
from fastssl.loaders.masks import TRIES, kept_patches


def random_mask(ids: Tensor, num_patches: int, ratio: float, *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """See `RandomMask`."""
    keep = kept_patches(num_patches, ratio)
    blocks = torch.arange((num_patches + 3) // 4)
    words = philox((ids[:, None], epoch, 0, blocks), (seed, zlib.crc32(b"mask")))
    scores = torch.stack(words, dim=-1).flatten(1)[:, :num_patches]
    patches = (scores << 20 | torch.arange(num_patches)).sort(dim=1).values & 0xFFFFF
    return patches[:, :keep].sort(dim=1).values, patches[:, keep:].sort(dim=1).values


def block_mask(
    ids: Tensor,
    grid: tuple[int, int],
    *,
    num_masked: int,
    min_patches: int = 16,
    max_patches: int | None = None,
    min_aspect: float = 0.3,
    max_aspect: float | None = None,
    seed: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """See `BlockMask`; tries of a run are judged side by side."""
    rows, columns = grid
    num_patches = rows * columns
    max_patches = num_masked if max_patches is None else max_patches
    max_aspect = 1 / max(min_aspect, 1e-9) if max_aspect is None else max_aspect
    row, column = (torch.arange(n + 1) for n in grid)
    side = torch.stack([row[-1:], column[-1:]])  # [2, 1]
    # Patch (i, j) stands in cell (i + 1, j + 1), so that the sums below begin with 0.
    hidden = torch.zeros(len(ids), rows + 1, columns + 1, dtype=torch.bool)
    runs = (22 if 2 * num_masked <= num_patches else 38) + 2 * -(-num_masked // max_patches)
    for share, stretch, place in _block_draws(ids, runs, min_aspect, max_aspect, seed, epoch):
        # Cell (i, j) counts the hidden patches of the first i rows and j columns.
        table = hidden.cumsum(1).cumsum(2).flatten(1)
        room = (num_masked - table[:, -1:]).clamp(max=max_patches)  # [B, 1]
        area = share * (room - min_patches) + min_patches  # [B, T]
        size = (area[:, None] * stretch).sqrt().round().long().minimum(side)  # [B, 2, T]: height, width
        spare = side - size
        start = place * (spare + 1) >> 32
        edges = torch.stack([start, start + size], dim=1)  # [B, 2, 2, T]: top, left; bottom, right
        corners = edges[:, :, None, 0] * (columns + 1) + edges[:, None, :, 1]  # [B, 2, 2, T]: top, bottom; left, right
        sums = table.gather(1, corners.flatten(1)).view_as(corners).diff(dim=1).diff(dim=2)[:, 0, 0]
        new = size.prod(1) - sums  # [B, T]
        counts = (spare.prod(1) > 0) & (new > 0) & (new <= room)
        first = counts.byte().argmax(1, keepdim=True)  # [B, 1]
        top, left, bottom, right = edges.flatten(1, 2).gather(2, first[:, None].expand(-1, 4, -1)).unbind(1)  # [B, 1]
        inside_rows = (row > top) & (row <= bottom) & counts.gather(1, first)
        inside_columns = (column > left) & (column <= right)
        hidden |= inside_rows[:, :, None] & inside_columns[:, None]
        if (hidden.sum((1, 2)) == num_masked).all():
            break  # all further runs would change nothing
    hidden = hidden[:, 1:, 1:].flatten(1)
    missing = num_masked - hidden.sum(1, keepdim=True)
    hidden = hidden | ((~hidden).cumsum(1) <= missing)
    patches = (hidden.long() << 20 | torch.arange(num_patches)).sort(dim=1).values & 0xFFFFF
    return patches[:, : num_patches - num_masked], patches[:, num_patches - num_masked :]


def _block_draws(
    ids: Tensor, runs: int, min_aspect: float, max_aspect: float, seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What the tries of one run after the other draw.

    Yields:
        Where the area lies between its bounds, float64 [B, T]; what to multiply it by for height^2 and width^2, float64
        [B, 2, T]; words for top and left, int64 [B, 2, T].
    """
    low, high = math.log(min_aspect), math.log(max_aspect)
    for begin in range(0, runs, 4):
        run = torch.arange(begin, min(begin + 4, runs))[:, None, None]
        tries = torch.arange(TRIES)
        area, aspect, top, left = philox((ids[:, None], epoch, run, tries), (seed, zlib.crc32(b"mask/block")))
        share = area.double() * 2.0**-32
        ratio = (aspect.double() * ((high - low) * 2.0**-32) + low).exp()
        yield from zip(share, torch.stack([ratio, 1 / ratio], 2), torch.stack([top, left], 2), strict=True)


def semantic_mask(
    labels: Tensor,
    ids: Tensor,
    *,
    ratio: float,
    inter: float,
    num_parts: int,
    seed: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    """See `SemanticMask`; `inter` is the weight of whole parts."""
    num_patches = labels.shape[1]
    keep = kept_patches(num_patches, ratio)
    first = (num_patches + 3) // 4 * 4  # word of the first part: words come in blocks of four
    blocks = torch.arange((first + num_parts + 3) // 4)
    words = philox((ids[:, None], epoch, 0, blocks), (seed, zlib.crc32(b"mask/semantic")))
    scores = torch.stack(words, dim=-1).flatten(1)
    hidden = _hide_parts(
        labels, scores[:, :num_patches], scores[:, first : first + num_parts], keep, ratio=ratio, inter=inter
    )
    return hidden[:, :keep].sort(dim=1).values, hidden[:, keep:].sort(dim=1).values


def _hide_parts(
    labels: Tensor, scores: Tensor, part_scores: Tensor, keep: int, *, ratio: float, inter: float
) -> Tensor:
    """`semantic_mask` for given scores: patches int64 [B, N], the `keep` visible ones first.

    Args:
        labels: int64 [B, N].
        scores: int64 [B, N], below 2^32; patches are taken in ascending order of them, of equal ones by number.
        part_scores: int64 [B, P], the same for parts.
    """
    num_patches, num_parts = labels.shape[1], part_scores.shape[1]
    part = labels.masked_fill((labels < 0) | (labels > num_parts), num_parts)
    numbers = torch.arange(num_patches)
    parts = torch.arange(num_parts + 1)
    ranked = (part << 52 | scores << 20 | numbers).sort(dim=1).values  # part by part
    begin = torch.searchsorted(ranked, (parts << 52).expand(len(labels), -1).contiguous())  # [B, P + 1]
    order = (part_scores << 20 | parts[:-1]).sort(dim=1).values & 0xFFFFF  # [B, P]
    count = begin.diff(dim=1).gather(1, order)
    intra = (count.double() * ratio).round(decimals=6).round()  # first as if the decimal `ratio` were exact
    whole = (num_patches - keep - (count.cumsum(1) - count)).clamp(min=0).minimum(count)
    quota = ((1 - inter) * intra + inter * whole.double()).round().long()
    quota = torch.zeros_like(begin).scatter(1, order, quota)  # [B, P + 1]; 0 without a part
    part = ranked >> 52
    hide = numbers - begin.gather(1, part) < quota.gather(1, part)
    return (hide.long() << 52 | ranked & 0xFFFFFFFFFFFFF).sort(dim=1).values & 0xFFFFF
