"""Which samples stand in which batch: a pure function of (seed, epoch, position, rank, world)."""

from __future__ import annotations

import numpy as np

from fastssl.config import ConfigError
from fastssl.loaders.philox import HALF, below, random_words


def order(count: int, seed: int, epoch: int, pages: np.ndarray | None = None, window: int = 0) -> np.ndarray:
    """The order of one epoch: a permutation of 0 .. count - 1, int64 [count], the same on every rank.

    Sorts random 32-bit numbers, one per sample; equal ones stay in the order of their ids. With `pages`, the pages come
    in random order, and only the samples of `window` successive pages are shuffled among each other: a data set that
    does not fit in memory is then read in large pieces, and each piece once.

    Args:
        count: samples.
        seed, epoch: 32-bit numbers.
        pages: int64 [count], the page of the file that each sample lies in; None shuffles all samples.
        window: pages whose samples are shuffled together.
    """
    if not 0 < count < 2**32:
        raise ConfigError(f"the data has {count} samples; from 1 to 2^32 - 1 can be ordered")
    keys = _random_keys("order", count, seed, epoch)
    if pages is None:
        return np.sort(keys << HALF | np.arange(count, dtype=np.uint64)).astype(np.uint32).astype(np.int64)
    used, page = np.unique(pages, return_inverse=True)
    place = np.empty(len(used), np.int64)
    place[np.argsort(_random_keys("pages", len(used), seed, epoch), kind="stable")] = np.arange(len(used))
    return np.lexsort((keys, place[page] // window)).astype(np.int64)


def _random_keys(purpose: str, count: int, seed: int, epoch: int) -> np.ndarray:
    """A 32-bit word for each of 0 .. count - 1, uint64 [count]."""
    words = random_words(seed, purpose, np.arange((count + 3) // 4), epoch)
    return np.stack(words, axis=-1).reshape(-1)[:count]


def batches_per_epoch(count: int, batch_size: int, world: int = 1) -> int:
    """Whole batches of `batch_size` images on each of `world` ranks; the samples left over are not used in that epoch.

    Raises:
        ConfigError: there is not one whole batch.
    """
    batches = count // (batch_size * world)
    if batches == 0:
        raise ConfigError(
            f"the data has {count} images, fewer than one batch of {batch_size * world} "
            f"({batch_size} on each of {world} ranks): lower data.batch_size"
        )
    return batches


def batch_ids(order: np.ndarray, position: int, batch_size: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """Sample ids of this rank's batch at `position` in the epoch, int64 [batch_size].

    All ranks together take the next batch_size x world samples of `order`, each rank one slice, so the samples of an
    optimizer step are the same for any number of ranks with the same product. Accumulated micro-batches are
    consecutive positions.

    Raises:
        ValueError: the epoch has no such whole batch, or there is no such rank.
    """
    batches = batches_per_epoch(len(order), batch_size, world)
    if not 0 <= position < batches:
        raise ValueError(f"batch {position} of the epoch does not exist; there are {batches}")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} does not exist; there are {world}")
    start = (position * world + rank) * batch_size
    return order[start : start + batch_size]


def replacement(sample: int, attempt: int, count: int, seed: int, epoch: int) -> int:
    """The sample that stands in for an unreadable one; `attempt` counts up while replacements are unreadable too."""
    return int(below(random_words(seed, "replacement", sample, epoch, attempt)[0], count))
