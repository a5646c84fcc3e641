"""Random numbers as a pure function of what they are for: the counter-based generator Philox4x32-10 in numpy.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A block of four 32-bit words is a
function of a key and a counter, used here as

    key      (seed of the run, CRC-32 of the purpose)
    counter  (sample id, epoch, crop number, block number)

The purpose is a name: "order", "pages", "replacement", "mask", "mask/block", "mask/semantic", or "view/<group>". Hence
no draw depends on another draw, on the other groups, on the batch, on workers or on ranks. `masks_compiled.py` compiles
`rounds`, and `fastssl.kernels._philox` has the same generator on the device.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEPS = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


def philox(
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike], key: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Philox4x32-10: four uint64 arrays of 32-bit words, of the shape that the four counters broadcast to.

    Args:
        counter: four 32-bit numbers or arrays of them.
        key: two 32-bit numbers.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    return rounds(c0, c1, c2, c3, np.uint64(key[0]), np.uint64(key[1]))


def rounds(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """The ten rounds of `philox` on counters and keys of type uint64: arrays, or numbers where it is compiled."""
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (p1 >> HALF) ^ c1 ^ k0, p1 & LOW
        c2, c3 = (p0 >> HALF) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return c0, c1, c2, c3


def random_words(
    seed: int, purpose: str, sample: ArrayLike, epoch: int, crop: ArrayLike = 0, block: ArrayLike = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Four uint64 arrays of 32-bit words for (seed, purpose, sample id, epoch, crop number, block number)."""
    return philox((sample, epoch, crop, block), (seed, zlib.crc32(purpose.encode())))


def below(word: np.ndarray, limit: ArrayLike) -> np.ndarray:
    """32-bit words as whole numbers 0 .. limit - 1, int64; `limit` up to 2^32."""
    return ((word * np.asarray(limit, np.uint64)) >> HALF).astype(np.int64)


def uniform(word: np.ndarray, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """32-bit words as float64 in [low, high)."""
    return word * ((high - low) * 2.0**-32) + low
