"""Which patches of an image a method hides: each mask is a pure function of (seed, epoch, sample id) and its numbers.

A method asks for masks by `Mask` objects; whatever makes batches draws them with `add_masks`, so that they come with
each batch, whoever reads it. The words of `philox.py` are spent as follows:

    RandomMask      "mask"            counter (id, epoch, 0, block): one word per patch
    BlockMask       "mask/block"      counter (id, epoch, run, try): area, ratio, top, left
    SemanticMask    "mask/semantic"   counter (id, epoch, 0, block): one word per patch, from a new block one per part

Letters: B images, N patches per image, below 2^20, K kept patches, M = N - K masked patches; P parts.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastssl.batch import Batch
from fastssl.config import ConfigError

TRIES = 64  # of a run of a BlockMask


@dataclass(frozen=True)
class Mask(ABC):
    """What is hidden of one view group; `counts` are K and M.

    Attributes:
        name: the view group, and the mask's name in `Batch.masks`.
    """

    purpose: ClassVar[str]
    name: str

    @property
    @abstractmethod
    def counts(self) -> tuple[int, int]: ...

    @abstractmethod
    def _hide(self, code: Any, *where: Any, parts: np.ndarray | None, schedule_epoch: int, out: Any) -> None:
        """Has `masks_compiled.py`, the module `code`, write kept and masked patches to `out`.

        Args:
            where: sample ids, epoch and key.
        """


@dataclass(frozen=True)
class RandomMask(Mask):
    """Uniform random masking (He et al., "Masked autoencoders are scalable vision learners", CVPR 2022).

    Attributes:
        num_patches: N.
        ratio: share of masked patches, from 0 to less than 1.

    Raises:
        ConfigError: the ratio is outside its range, or leaves no patch.
    """

    purpose = "mask"
    num_patches: int
    ratio: float

    def __post_init__(self) -> None:
        kept_patches(self.num_patches, self.ratio)

    @property
    def counts(self) -> tuple[int, int]:
        keep = kept_patches(self.num_patches, self.ratio)
        return keep, self.num_patches - keep

    def _hide(self, code: Any, *where: Any, parts: np.ndarray | None, schedule_epoch: int, out: Any) -> None:
        code.random_masks(*where, *out)


@dataclass(frozen=True)
class BlockMask(Mask):
    """Block-wise masking (Bao et al., "BEiT", ICLR 2022), as CAE does it (Chen et al., arXiv 2202.03026).

    A try draws a rectangle: its area uniform between `min_patches` and the number of patches still to hide (at most
    `max_patches`; it may be the smaller of the two), height / width log-uniform, then its place. It counts if it is
    lower and narrower than the grid, hides something new, and not more than is still to hide. The authors make runs of
    ten tries, each up to the first that counts, until M patches are hidden. As a run in vain changes nothing, the
    length of a run does not matter; here it is 64.

    Limits: there are 24 runs, 40 if more than half of the patches are hidden (and two more for each further
    `max_patches` in M); patches still to hide after that are the first free ones, row by row. Simulated masks took at
    most 17 runs for 98 of 14 x 14 patches (3 million masks), 22 for 392 of 28 x 28 (300,000) and 33 for 588 of 28 x 28
    (100,000); more where hardly any rectangle fits, say with `min_patches` near N.

    Attributes:
        grid: rows and columns of patches, which are numbered row by row.
        num_masked: M, from 1 to N - 1.
        min_patches: smallest area, before height and width are rounded.
        max_patches: largest area; None: M.
        min_aspect, max_aspect: range of height / width; None: 1 / min_aspect.

    Raises:
        ConfigError: the numbers allow no mask.
    """

    purpose = "mask/block"
    grid: tuple[int, int]
    num_masked: int
    min_patches: int = 16
    max_patches: int | None = None
    min_aspect: float = 0.3
    max_aspect: float | None = None

    def __post_init__(self) -> None:
        _check_blocks(self.grid, self.num_masked, self.min_patches, *self._bounds)

    @property
    def _bounds(self) -> tuple[int, float, float]:
        """Largest area, smallest and largest aspect."""
        largest = self.num_masked if self.max_patches is None else self.max_patches
        highest = 1 / max(self.min_aspect, 1e-9) if self.max_aspect is None else self.max_aspect
        return largest, self.min_aspect, highest

    @property
    def counts(self) -> tuple[int, int]:
        return math.prod(self.grid) - self.num_masked, self.num_masked

    def _hide(self, code: Any, *where: Any, parts: np.ndarray | None, schedule_epoch: int, out: Any) -> None:
        largest, lowest, highest = self._bounds
        keep, hidden = self.counts
        runs = (22 if hidden <= keep else 38) + 2 * -(-hidden // largest)
        bounds = self.min_patches, largest, math.log(lowest), math.log(highest)
        code.block_masks(*where, self.grid, *bounds, runs, TRIES, *out)


@dataclass(frozen=True)
class SemanticMask(Mask):
    """Masking guided by semantic parts (Li et al., "SemMAE", NeurIPS 2022, arXiv 2206.10207).

    Two ways to hide M patches are mixed by the number of patches that each takes from a part of c patches: rint(c x
    ratio) within every part (intra), and whole parts in random order, the last one cut, until there are M (inter). The
    mean of the two counts, weighted by `semantic_schedule`, is rounded half to even; a part's patches are hidden along
    a random order of all patches. Rounding may leave a few too many or too few: then the first hidden patches of that
    order are shown, or the last shown ones hidden, so that there are always M.

    A patch without a part, of any label outside 0 .. P - 1, is never hidden for a part's count, so it is among the
    first to be shown. Where N x ratio is not a whole number, the authors' code hides trunc(N x ratio) patches by whole
    parts, and the rest as above; here it is M at once.

    Attributes:
        num_patches: N.
        ratio: share of masked patches, from 0 to less than 1.
        num_parts: P, from 1 to 1024.
        epochs, power: `total` and `power` of `semantic_schedule`.

    Raises:
        ConfigError: a number is outside its range.
    """

    purpose = "mask/semantic"
    num_patches: int
    ratio: float
    num_parts: int
    epochs: int
    power: float = 2.0

    def __post_init__(self) -> None:
        kept_patches(self.num_patches, self.ratio)
        semantic_schedule(0, self.epochs, self.power)
        if not 1 <= self.num_parts <= 1024:
            raise ConfigError(f"num_parts is {self.num_parts}; it must be from 1 to 1024")

    @property
    def counts(self) -> tuple[int, int]:
        keep = kept_patches(self.num_patches, self.ratio)
        return keep, self.num_patches - keep

    def _hide(self, code: Any, *where: Any, parts: np.ndarray | None, schedule_epoch: int, out: Any) -> None:
        wanted = (len(where[0]), self.num_patches)
        if parts is None or parts.shape != wanted:
            given = "missing" if parts is None else list(parts.shape)
            raise ConfigError(f"part labels of {self.name} are {given}; they must be {list(wanted)}, one per patch")
        labels = np.require(parts, np.int64, ["C", "W"])
        inter = semantic_schedule(schedule_epoch, self.epochs, self.power)
        code.semantic_masks(*where, labels, self.num_parts, float(self.ratio), inter, *out)


def draw(
    mask: Mask,
    ids: np.ndarray,
    *,
    seed: int,
    epoch: int,
    parts: np.ndarray | None = None,
    schedule_epoch: int | None = None,
    out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The masks of some samples. No image's mask depends on the others.

    Args:
        ids: int64 [B], sample ids, below 2^32.
        seed, epoch: 32-bit numbers.
        parts: int64 [B, N], part of each patch, for a `SemanticMask`.
        schedule_epoch: the epoch at which schedules stand, from 0; None: `epoch`.
        out: int64 [B, K] and [B, M], contiguous, to be filled.

    Returns:
        Indices of the kept patches int64 [B, K] and of the masked ones int64 [B, M], ascending.

    Raises:
        ConfigError: part labels are missing or do not fit.
    """
    from fastssl.loaders import masks_compiled

    ids = np.require(ids, np.int64, ["C", "W"])
    if out is None:
        keep, hidden = mask.counts
        out = np.empty((len(ids), keep), np.int64), np.empty((len(ids), hidden), np.int64)
    key = np.uint64(seed), np.uint64(zlib.crc32(mask.purpose.encode()))
    schedule_epoch = epoch if schedule_epoch is None else schedule_epoch
    mask._hide(masks_compiled, ids, epoch, key, parts=parts, schedule_epoch=schedule_epoch, out=out)
    return out


def add_masks(
    batch: Batch,
    masks: Sequence[Mask],
    *,
    seed: int,
    schedule_epoch: int | None = None,
    take: Callable[[tuple[int, ...], torch.dtype], Tensor] = lambda shape, dtype: torch.empty(shape, dtype=dtype),
) -> None:
    """Draws a batch's masks into `Batch.masks`, once its ids and part labels are final.

    Args:
        seed, schedule_epoch: as for `draw`.
        take: gives memory of a shape and type, such as `Memory.take`.
    """
    for mask in masks:
        kept, masked = (take((len(batch), count), torch.int64) for count in mask.counts)
        labels = batch.parts.get(mask.name)
        draw(
            mask,
            batch.id.numpy(),
            seed=seed,
            epoch=batch.epoch,
            parts=None if labels is None else labels[:, 0].flatten(1).numpy(),
            schedule_epoch=schedule_epoch,
            out=(kept.numpy(), masked.numpy()),
        )
        batch.masks[mask.name] = kept, masked


def semantic_schedule(step: int, total: int, power: float = 2.0) -> float:
    """Weight of whole parts in a `SemanticMask`: ((step + 1) / total) ^ power, 1 at the last step and from there on.

    It is the paper's alpha, from 0 (within parts) to 1 (whole parts). SemMAE's recipe counts epochs, so a whole epoch
    has one value. The authors' code has 800 as its total whatever the run's length.

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
        ConfigError: the ratio is outside [0, 1), or leaves no patch.
    """
    keep = int(num_patches * (1 - ratio) + 1e-6) if 0 <= ratio < 1 else 0
    if keep < 1:
        raise ConfigError(f"mask ratio {ratio} keeps none of {num_patches} patches; it must be from 0 to less than 1")
    return keep


def _check_blocks(
    grid: tuple[int, int], num_masked: int, min_patches: int, max_patches: int, min_aspect: float, max_aspect: float
) -> None:
    """Raises ConfigError unless a `BlockMask` can reach `num_masked` with these numbers."""
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
