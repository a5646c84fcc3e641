"""All random parameters of a batch's crops, from (seed, epoch, sample id, view group, crop number) alone.

The words of `fastssl.loaders.philox` for the purpose "view/<group>" are spent as follows:

    block 0       area, ratio of try 1; area, ratio of try 2
    blocks 1-4    the same of tries 3 to 10
    block 5       top, left, flip, jitter yes or no
    block 6       order of the jitter operations, gray, solarize, blur yes or no
    block 7       brightness, contrast, saturation, hue
    block 8       standard deviation of the blur

Letters: B images, n crops of the group (View.count), M = B x n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from fastssl.config import ConfigError, View
from fastssl.loaders.philox import below, random_words, uniform

JITTER_ORDERS = np.array(list(permutations(range(4))))


@dataclass
class Drawn:
    """What was drawn for one view group.

    Attributes:
        box: int64 [B, n, 4], (top, left, height, width) in pixels of the decoded (or squashed) image.
        flip: bool [B, n].
        photometric: arrays [B, n, ...] named and typed like the fields of `fastssl.batch.Photometric`; None when the
            group has no photometric operation.
    """

    box: np.ndarray
    flip: np.ndarray
    photometric: dict[str, np.ndarray] | None


def check_views(views: Sequence[View]) -> None:
    """Raise ConfigError if the groups do not fit together: names, and what `same_crop_as` refers to."""
    crop_owners(views)


def crop_owners(views: Sequence[View]) -> dict[str, View]:
    """By name, the group whose crops each group uses; raises ConfigError like `check_views`."""
    by_name = {view.name: view for view in views}
    if len(by_name) != len(views) or "" in by_name:
        raise ConfigError(f"view groups need different, non-empty names; these are {[view.name for view in views]}")
    return {view.name: _crop_owner(view, by_name) for view in views}


def draw(view: View, heights: np.ndarray, widths: np.ndarray, *, seed: int, epoch: int, ids: np.ndarray) -> Drawn:
    """`draw_all` for one group that cuts its own crops."""
    return draw_all([view], heights, widths, seed=seed, epoch=epoch, ids=ids)[view.name]


def draw_all(
    views: Sequence[View], heights: np.ndarray, widths: np.ndarray, *, seed: int, epoch: int, ids: np.ndarray
) -> dict[str, Drawn]:
    """Draw every group's boxes, flips and photometric parameters.

    Args:
        views: the groups; their order does not matter.
        heights, widths: int64 [B], size of each decoded image in pixels.
        seed, epoch: 32-bit numbers.
        ids: int64 [B], sample ids.

    Raises:
        ConfigError: the groups do not fit together.
    """
    owners = crop_owners(views)
    crops = {}
    drawn = {}
    for view in views:
        owner = owners[view.name]
        if owner.name not in crops:
            crops[owner.name] = _draw_crops(owner, heights, widths, seed, epoch, ids)
        box, flip = crops[owner.name]
        drawn[view.name] = Drawn(box, flip, _draw_photometric(view, seed, epoch, ids))
    return drawn


def _crop_owner(view: View, by_name: dict[str, View]) -> View:
    """The group whose crops `view` uses: itself, or the end of its chain of same_crop_as."""
    owner, seen = view, [view.name]
    while owner.same_crop_as is not None:
        name = owner.same_crop_as
        key = f"views.{owner.name}.same_crop_as"
        if name in seen:
            raise ConfigError(f"{key}: {' -> '.join([*seen, name])} goes round in a circle")
        if name not in by_name:
            raise ConfigError(f"{key} is {name!r}; there is no such group, only {sorted(by_name)}")
        owner = by_name[name]
        seen.append(name)
        for field in ("count", "squash"):
            mine, theirs = getattr(view, field), getattr(owner, field)
            if mine != theirs:
                raise ConfigError(
                    f"views.{view.name}.{field} is {mine}; it must be {theirs}, as in {name}, whose crops it uses"
                )
    return owner


def _draw_crops(
    view: View, heights: np.ndarray, widths: np.ndarray, seed: int, epoch: int, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Random resized crops as torchvision's RandomResizedCrop draws them: box int64 [B, n, 4], flip bool [B, n]."""
    purpose = f"view/{view.name}"
    if view.squash:
        heights = widths = np.full(len(ids), view.squash)
    sample, height, width = (np.repeat(a, view.count) for a in (ids, heights, widths))  # [M]
    crop = np.tile(np.arange(view.count), len(ids))
    box_h, box_w = _central_crop(view.ratio, height, width)
    left_over = np.arange(len(sample))
    for blocks in (np.arange(1), np.arange(1, 5)):
        words = random_words(seed, purpose, sample[left_over, None], epoch, crop[left_over, None], blocks)
        tries = np.stack(words, axis=-1).reshape(len(left_over), -1, 2)  # [m, tries, (area, ratio)]
        area = uniform(tries[..., 0], *view.scale) * (height * width)[left_over, None]
        ratio = np.exp(uniform(tries[..., 1], *(math.log(r) for r in view.ratio)))
        try_h, try_w = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
        fits = (try_h > 0) & (try_h <= height[left_over, None]) & (try_w > 0) & (try_w <= width[left_over, None])
        found = fits.any(axis=1)
        done, first = left_over[found], fits.argmax(axis=1)[found]
        box_h[done], box_w[done] = try_h[found, first], try_w[found, first]
        left_over = left_over[~found]
        if not len(left_over):
            break
    top, left, flip, _ = random_words(seed, purpose, sample, epoch, crop, 5)
    box_top, box_left = below(top, height - box_h + 1), below(left, width - box_w + 1)
    box_top[left_over] = (height - box_h)[left_over] // 2
    box_left[left_over] = (width - box_w)[left_over] // 2
    box = np.stack([box_top, box_left, box_h, box_w], axis=-1)
    return box.reshape(len(ids), view.count, 4), (uniform(flip) < view.flip).reshape(len(ids), view.count)


def _central_crop(ratio: tuple[float, float], height: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Height and width, int64 [M], of the largest crop whose width / height lies in `ratio`."""
    low, high = ratio
    h = np.where(width < height * low, np.rint(width / low), height)
    w = np.where(width > height * high, np.rint(height * high), width)
    return np.maximum(h, 1).astype(np.int64), np.maximum(w, 1).astype(np.int64)


def has_photometric(view: View) -> bool:
    """Whether a group has any photometric operation."""
    return bool((any(view.jitter) and view.jitter_p) or view.gray or view.blur or view.solarize)


def _draw_photometric(view: View, seed: int, epoch: int, ids: np.ndarray) -> dict[str, np.ndarray] | None:
    """The fields of `fastssl.batch.Photometric` as arrays [B, n, ...]; None when the group has no such operation."""
    if not has_photometric(view):
        return None
    jitter_p = view.jitter_p if any(view.jitter) else 0.0
    sample, crop, block = ids[:, None, None], np.arange(view.count)[:, None], np.arange(5, 9)
    words = np.stack(random_words(seed, f"view/{view.name}", sample, epoch, crop, block), axis=-1)  # [B, n, 4, 4]
    chance, strength = uniform(words[:, :, 1]), words[:, :, 2]
    *blend, hue = view.jitter
    ranges = [(max(0.0, 1 - s), 1 + s) for s in blend] + [(-hue, hue)]
    factor = [uniform(strength[..., i], *bounds) for i, bounds in enumerate(ranges)]
    blur_sigma = np.where(chance[..., 3] < view.blur, uniform(words[:, :, 3, 0], *view.blur_sigma), 0)
    return {
        "jitter": uniform(words[:, :, 0, 3]) < jitter_p,
        "order": JITTER_ORDERS[below(words[:, :, 1, 0], len(JITTER_ORDERS))],
        "factor": np.stack(factor, axis=-1).astype(np.float32),
        "gray": chance[..., 1] < view.gray,
        "blur_sigma": blur_sigma.astype(np.float32),
        "solarize": np.where(chance[..., 2] < view.solarize, view.solarize_threshold, 256).astype(np.float32),
    }
