"""Which patches of an image are hidden: masks made on the device, each a pure function of (seed, epoch, sample id).

Nothing here waits for the device, and all shapes follow from the arguments. The words of `philox` are spent as follows,
the purpose being the CRC-32 in the key:

    random_mask     "mask"            counter (id, epoch, 0, block): one word per patch
    block_mask      "mask/block"      counter (id, epoch, run, try): area, ratio, top, left
    semantic_mask   "mask/semantic"   counter (id, epoch, 0, block): one word per patch, from a new block one per part

Letters: B images, N patches per image, K kept patches, M = N - K masked patches; T tries of a run; P parts.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.config import ConfigError
from fastssl.kernels._philox import philox

TRIES = 64


def random_mask(ids: Tensor, num_patches: int, ratio: float, *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Uniform random masking (He et al., "Masked autoencoders are scalable vision learners", CVPR 2022).

    An image's mask does not depend on the other images of the batch.

    Args:
        ids: int64 [B], sample ids, below 2^32.
        num_patches: N, below 2^20.
        ratio: share of masked patches, from 0 to less than 1.
        seed, epoch: 32-bit numbers.

    Returns:
        Indices of the kept patches int64 [B, K] and of the masked ones int64 [B, M], ascending, on the device of `ids`.

    Raises:
        ValueError: the ratio is outside its range, or leaves no patch.
    """
    keep = kept_patches(num_patches, ratio)
    blocks = torch.arange((num_patches + 3) // 4, device=ids.device)
    words = philox((ids[:, None], epoch, 0, blocks), (seed, zlib.crc32(b"mask")))
    scores = torch.stack(words, dim=-1).flatten(1)[:, :num_patches]
    patches = (scores << 20 | torch.arange(num_patches, device=ids.device)).sort(dim=1).values & 0xFFFFF
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
    """Block-wise masking (Bao et al., "BEiT", ICLR 2022), as CAE does it (Chen et al., arXiv 2202.03026).

    A try draws a rectangle: its area uniform between `min_patches` and the number of patches still to hide (at most
    `max_patches`; it may be the smaller of the two), height / width log-uniform, then its place. It counts if it is
    lower and narrower than the grid, hides something new, and not more than is still to hide. The authors make runs of
    ten tries, each up to the first that counts, until M patches are hidden. As a run in vain changes nothing, the
    length of a run does not matter; here it is 64, judged side by side.

    An image's mask does not depend on the other images of the batch.

    Limits: there are 24 runs, 40 if more than half of the patches are hidden (and two more for each further
    `max_patches` in M); patches still to hide after that are the first free ones, row by row. Simulated masks took at
    most 17 runs for 98 of 14 x 14 patches (3 million masks), 22 for 392 of 28 x 28 (300,000) and 33 for 588 of 28 x 28
    (100,000); more where hardly any rectangle fits, say with `min_patches` near N.

    Args:
        ids: int64 [B], sample ids, below 2^32.
        grid: rows and columns of patches; N = rows x columns, below 2^20.
        num_masked: M, from 1 to N - 1.
        min_patches: smallest area, before height and width are rounded.
        max_patches: largest area; None: M.
        min_aspect, max_aspect: range of height / width; None: 1 / min_aspect.
        seed, epoch: 32-bit numbers.

    Returns:
        Indices of the kept patches int64 [B, N - M] and of the masked ones int64 [B, M], ascending, on the device of
        `ids`; patches are numbered row by row.

    Raises:
        ConfigError: the numbers allow no mask.
    """
    rows, columns = grid
    num_patches = rows * columns
    max_patches = num_masked if max_patches is None else max_patches
    max_aspect = 1 / max(min_aspect, 1e-9) if max_aspect is None else max_aspect
    _check_blocks(grid, num_masked, min_patches, max_patches, min_aspect, max_aspect)
    device = ids.device
    row, column = (torch.arange(n + 1, device=device) for n in grid)
    side = torch.stack([row[-1:], column[-1:]])  # [2, 1]
    # Patch (i, j) stands in cell (i + 1, j + 1), so that the sums below begin with 0.
    hidden = torch.zeros(len(ids), rows + 1, columns + 1, dtype=torch.bool, device=device)
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
        if device.type == "cpu" and bool((hidden.sum((1, 2)) == num_masked).all()):
            break  # all further runs would change nothing; on a GPU they are made, for asking would make the host wait
    hidden = hidden[:, 1:, 1:].flatten(1)
    missing = num_masked - hidden.sum(1, keepdim=True)
    hidden = hidden | ((~hidden).cumsum(1) <= missing)
    patches = (hidden.long() << 20 | torch.arange(num_patches, device=device)).sort(dim=1).values & 0xFFFFF
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
    ahead = 4 if ids.device.type == "cpu" else runs  # the CPU stops when all masks are full
    for begin in range(0, runs, ahead):
        run = torch.arange(begin, min(begin + ahead, runs), device=ids.device)[:, None, None]
        tries = torch.arange(TRIES, device=ids.device)
        area, aspect, top, left = philox((ids[:, None], epoch, run, tries), (seed, zlib.crc32(b"mask/block")))
        share = area.double() * 2.0**-32
        ratio = (aspect.double() * ((high - low) * 2.0**-32) + low).exp()
        yield from zip(share, torch.stack([ratio, 1 / ratio], 2), torch.stack([top, left], 2), strict=True)


def _check_blocks(
    grid: tuple[int, int], num_masked: int, min_patches: int, max_patches: int, min_aspect: float, max_aspect: float
) -> None:
    """Raises ConfigError unless `block_mask` can reach `num_masked` with these numbers."""
    rows, columns = grid
    if not 0 < num_masked < rows * columns:
        raise ConfigError(
            f"num_masked is {num_masked}; it must be from 1 to {rows * columns - 1} on a grid of {rows} x {columns}"
        )
    if not 0 < min_patches <= max_patches and not 0 < max_patches == num_masked < min_patches:
        raise ConfigError(f"blocks of {min_patches} to {max_patches} patches: the range must be positive and not empty")
    if not 0 < min_aspect <= max_aspect < math.inf:
        raise ConfigError(f"aspects {min_aspect} to {max_aspect}: the range must be positive, finite and not empty")
    area = min(min_patches, num_masked)
    lowest = max(min_aspect, area / (columns - 0.5) ** 2)
    highest = min(max_aspect, (rows - 0.5) ** 2 / area)
    if min(grid) < 2 or lowest > highest:
        raise ConfigError(
            f"no block of {area} patches with height / width from {min_aspect:.3g} to {max_aspect:.3g} is lower and "
            f"narrower than a grid of {rows} x {columns}; lower min_patches or widen the range"
        )


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
    """Masking guided by semantic parts (Li et al., "SemMAE", NeurIPS 2022, arXiv 2206.10207).

    Two ways to hide M patches are mixed by the number of patches that each takes from a part of c patches: rint(c x
    ratio) within every part (intra), and whole parts in random order, the last one cut, until there are M (inter). The
    mean of the two counts, weighted by `inter`, is rounded half to even; a part's patches are hidden along a random
    order of all patches. Rounding may leave a few too many or too few: then the first hidden patches of that order are
    shown, or the last shown ones hidden, so that there are always M.

    `inter` comes from `semantic_schedule`. An image's mask does not depend on the other images of the batch. A patch
    without a part is never hidden for a part's count, so it is among the first to be shown. Checking labels would make
    the host wait: any label outside 0 .. P - 1 counts as no part.

    Where N x ratio is not a whole number, the authors' code hides trunc(N x ratio) patches by whole parts, and the rest
    as above; here it is M at once.

    Args:
        labels: int64 [B, N], part of each patch, such as `batch.parts[name][:, 0].flatten(1)`; -1: none. N below 2^20.
        ids: int64 [B], sample ids, below 2^32.
        ratio: share of masked patches, from 0 to less than 1.
        inter: the paper's alpha, from 0 (within parts) to 1 (whole parts).
        num_parts: P, from 1 to 1024.
        seed, epoch: 32-bit numbers.

    Returns:
        Indices of the kept patches int64 [B, K] and of the masked ones int64 [B, M], ascending, on the device of
        `labels`; K as `kept_patches` has it.

    Raises:
        ConfigError: ratio, inter or num_parts are outside their ranges, or labels are not [B, N] for these ids.
    """
    if labels.ndim != 2 or len(labels) != len(ids):
        raise ConfigError(
            f"part labels are {list(labels.shape)}; they must be [{len(ids)}, patches], one row for each of the ids"
        )
    if not 0 <= inter <= 1:
        raise ConfigError(f"inter is {inter}; it must be from 0 (within parts) to 1 (whole parts)")
    if not 1 <= num_parts <= 1024:
        raise ConfigError(f"num_parts is {num_parts}; it must be from 1 to 1024")
    num_patches = labels.shape[1]
    keep = kept_patches(num_patches, ratio)
    first = (num_patches + 3) // 4 * 4  # word of the first part: words come in blocks of four
    blocks = torch.arange((first + num_parts + 3) // 4, device=ids.device)
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
    numbers = torch.arange(num_patches, device=labels.device)
    parts = torch.arange(num_parts + 1, device=labels.device)
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


def semantic_schedule(step: int, total: int, power: float = 2.0) -> float:
    """`inter` of `semantic_mask` over training: ((step + 1) / total) ^ power, 1 at the last step and from there on.

    SemMAE's recipe counts epochs, so a whole epoch has one value. The authors' code has 800 as its total whatever the
    run's length.

    Args:
        step: epochs (or optimizer steps) done before this one.
        total: epochs (or optimizer steps) of the run.
        power: gamma of the paper: 2 is its recipe, 1 is linear.

    Raises:
        ConfigError: a negative step, no steps in total, or a power that is not positive.
    """
    if step < 0 or total < 1 or not power > 0:
        raise ConfigError(
            f"step {step} of {total} with power {power}: needs step 0 or more, total 1 or more, power > 0"
        )
    return min((step + 1) / total, 1.0) ** power


def kept_patches(num_patches: int, ratio: float) -> int:
    """K = floor(N (1 - ratio)), as if the decimal `ratio` were exact: 10 of 100 at 0.9, not 9.

    Raises:
        ValueError: the ratio is outside [0, 1), or leaves no patch.
    """
    keep = int(num_patches * (1 - ratio) + 1e-6) if 0 <= ratio < 1 else 0
    if keep < 1:
        raise ConfigError(f"mask ratio {ratio} keeps none of {num_patches} patches; it must be from 0 to less than 1")
    return keep
