"""The masks of `masks.py`, and part labels, one image after the other, in compiled code that holds no lock.

Importing this module needs numba. The first use compiles for some seconds; numba keeps the result on disk.

Letters: B images, N patches per image, K kept patches, M = N - K masked patches; P parts.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from fastssl.loaders.philox import HALF, rounds

PLACE = np.uint64(20)  # bits of a number that has a patch's or a part's score above them
LOWEST = np.uint64((1 << 20) - 1)

_philox = njit(nogil=True, cache=True)(rounds)


@njit(nogil=True, cache=True)
def random_masks(ids, epoch, key, kept, masked):
    """Keeps the K patches of the lowest scores.

    Args:
        ids: int64 [B].
        epoch, key: the counter's second word; seed and purpose.
        kept, masked: int64 [B, K] and [B, M], written.
    """
    keep, patches = kept.shape[1], kept.shape[1] + masked.shape[1]
    words, hidden = np.empty((patches + 3) // 4 * 4, np.uint64), np.empty(patches, np.bool_)
    ranked = np.empty(patches, np.uint64)
    for b in range(len(ids)):
        _fill_words(ids[b], epoch, key, words)
        for i in range(patches):
            ranked[i] = words[i] << PLACE | np.uint64(i)
        ranked.sort()
        for i in range(patches):
            hidden[ranked[i] & LOWEST] = i >= keep
        _list(hidden, kept[b], masked[b])


@njit(nogil=True, cache=True)
def block_masks(ids, epoch, key, grid, smallest, largest, low, high, runs, tries, kept, masked):
    """Hides rectangles, each the first of a run of tries that counts, until M patches are hidden.

    Args:
        ids, epoch, key, kept, masked: as for `random_masks`.
        grid: rows and columns of patches.
        smallest, largest: bounds of a rectangle's area.
        low, high: bounds of ln(height / width).
        runs, tries: how many runs of how many tries each.
    """
    rows, columns = grid
    num_masked, stretch = masked.shape[1], (high - low) * 2.0**-32
    hidden = np.empty((rows, columns), np.bool_)
    table = np.empty((rows + 1, columns + 1), np.int64)  # (i, j): hidden patches of the first i rows and j columns
    for b in range(len(ids)):
        hidden[:], table[:] = False, 0
        for run in range(runs):
            room = min(num_masked - table[rows, columns], largest)
            if room == 0:
                break
            for attempt in range(tries):
                area_word, aspect_word, top_word, left_word = _philox(
                    np.uint64(ids[b]), np.uint64(epoch), np.uint64(run), np.uint64(attempt), key[0], key[1]
                )
                ratio = math.exp(float(aspect_word) * stretch + low)
                area = float(area_word) * 2.0**-32 * (room - smallest) + smallest
                height, width = int(np.rint(math.sqrt(area * ratio))), int(np.rint(math.sqrt(area * (1 / ratio))))
                if height >= rows or width >= columns:
                    continue
                top = int((top_word * np.uint64(rows - height + 1)) >> HALF)
                left = int((left_word * np.uint64(columns - width + 1)) >> HALF)
                bottom, right = top + height, left + width
                known = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
                if 0 < height * width - known <= room:
                    hidden[top:bottom, left:right] = True
                    _sum(hidden, table)
                    break
        missing = num_masked - table[rows, columns]
        flat = hidden.reshape(rows * columns)
        for i in range(len(flat)):
            if missing > 0 and not flat[i]:
                flat[i] = True
                missing -= 1
        _list(flat, kept[b], masked[b])


@njit(nogil=True, cache=True)
def semantic_masks(ids, epoch, key, labels, num_parts, ratio, inter, kept, masked):
    """Hides within parts and whole parts; see `SemanticMask`.

    Args:
        ids, epoch, key, kept, masked: as for `random_masks`.
        labels: int64 [B, N].
        num_parts: P.
        ratio, inter: share of masked patches; weight of whole parts.
    """
    patches = labels.shape[1]
    first = (patches + 3) // 4 * 4  # word of the first part: words come in blocks of four
    words = np.empty(first + (num_parts + 3) // 4 * 4, np.uint64)
    for b in range(len(ids)):
        _fill_words(ids[b], epoch, key, words)
        scores, part_scores = words[:patches], words[first : first + num_parts]
        hide_parts(labels[b], scores, part_scores, ratio, inter, kept[b], masked[b])


@njit(nogil=True, cache=True)
def hide_parts(labels, scores, part_scores, ratio, inter, kept, masked):
    """One image of `semantic_masks` for given scores.

    Args:
        labels: int64 [N].
        scores: uint64 [N], below 2^32; patches are taken in ascending order of them, of equal ones by number.
        part_scores: uint64 [P], the same for parts.
        kept, masked: int64 [K] and [M], written.
    """
    patches, parts, keep = len(labels), len(part_scores), len(kept)
    count, quota = np.zeros(parts, np.int64), np.zeros(parts, np.int64)
    ranked, hidden = np.empty(patches, np.uint64), np.empty(patches, np.bool_)
    for i in range(patches):
        ranked[i] = scores[i] << PLACE | np.uint64(i)
        if 0 <= labels[i] < parts:
            count[labels[i]] += 1
    present = np.empty(parts, np.uint64)
    found = 0
    for p in range(parts):
        if count[p]:
            present[found] = part_scores[p] << PLACE | np.uint64(p)
            found += 1
    present = present[:found]
    present.sort()
    before = 0
    for key in present:
        p = np.int64(key & LOWEST)
        intra = np.rint(np.rint(count[p] * ratio * 1e6) / 1e6)  # first as if the decimal `ratio` were exact
        whole = min(max(patches - keep - before, 0), count[p])
        quota[p] = int(np.rint((1 - inter) * intra + inter * whole))
        before += count[p]
    ranked.sort()
    shown = 0
    for key in ranked:
        i = np.int64(key & LOWEST)
        p = labels[i]
        hidden[i] = 0 <= p < parts and quota[p] > 0
        if hidden[i]:
            quota[p] -= 1
        else:
            shown += 1
    for key in ranked:  # too few are shown: show the first hidden ones
        i = np.int64(key & LOWEST)
        if shown < keep and hidden[i]:
            hidden[i] = False
            shown += 1
    for key in ranked[::-1]:  # too many are shown: hide the last shown ones
        i = np.int64(key & LOWEST)
        if shown > keep and not hidden[i]:
            hidden[i] = True
            shown -= 1
    _list(hidden, kept, masked)


@njit(nogil=True, cache=True)
def _fill_words(sample, epoch, key, words):
    """Words of the blocks 0, 1, ... of a sample, uint64; as many as there is room for, a multiple of four."""
    for block in range(len(words) // 4):
        four = _philox(np.uint64(sample), np.uint64(epoch), np.uint64(0), np.uint64(block), key[0], key[1])
        words[4 * block], words[4 * block + 1], words[4 * block + 2], words[4 * block + 3] = four


@njit(nogil=True, cache=True)
def _sum(hidden, table):
    """Writes the table of `block_masks`."""
    for i in range(hidden.shape[0]):
        total = 0
        for j in range(hidden.shape[1]):
            total += hidden[i, j]
            table[i + 1, j + 1] = table[i, j + 1] + total


@njit(nogil=True, cache=True)
def _list(hidden, kept, masked):
    """Writes the numbers of the patches that are not hidden and of those that are, ascending."""
    shown = 0
    for i in range(len(hidden)):
        if hidden[i]:
            masked[i - shown] = i
        else:
            kept[shown] = i
            shown += 1


@njit(nogil=True, cache=True)
def label_parts(maps, box, flip, frame, labels):
    """Writes the part labels of crops; `loader.part_labels`.

    Args:
        maps: uint8 [B, N, h, w].
        box, flip: float64 [B, n, 4] and bool [B, n].
        frame: float64 [B, 2].
        labels: int64 [B, n, g, g], written.
    """
    images, count, grid, _ = labels.shape
    _, parts, height, width = maps.shape
    for b in range(images):
        for n in range(count):
            top, left, box_height, box_width = box[b, n]
            for u in range(grid):
                up, down, lower = _taps(top + (u + 0.5) / grid * box_height, frame[b, 0], height)
                for v in range(grid):
                    across = (v + 0.5) / grid
                    x = left + (1 - across if flip[b, n] else across) * box_width
                    west, east, right = _taps(x, frame[b, 1], width)
                    best = -1.0
                    for p in range(parts):
                        here = maps[b, p]
                        near = here[up, west] * (1.0 - lower) + here[down, west] * lower
                        far = here[up, east] * (1.0 - lower) + here[down, east] * lower
                        value = near * (1.0 - right) + far * right
                        if value > best:
                            best, labels[b, n, u, v] = value, p


@njit(nogil=True, cache=True)
def _taps(place, length, cells):
    """The cells around a place on a frame of this length, and the second one's weight."""
    position = min(max(cells * place / length - 0.5, 0.0), cells - 1.0)
    first = int(position)
    return first, min(first + 1, cells - 1), position - first
