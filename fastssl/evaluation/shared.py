"""Images that are in both of two data sets: what was trained on must not be judged.

Two images are the same if their encoded bytes are. Two .beton files tell by the checksums beside them; anything else by
lengths, then by the last bytes, then by all bytes of the images that are left.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np

from fastssl.config import redacted
from fastssl.evaluation.data import EvaluationError
from fastssl.loaders.beton import IMAGE, INT
from fastssl.loaders.decode import Places
from fastssl.loaders.sources import BetonSource, DecodeError, FolderSource, Shards, Source
from fastssl.loaders.store import StoreError
from fastssl.loaders.tar import TarSource
from fastssl.training import distributed

ENDING = 64  # bytes at an image's end that are compared first
THREADS = 16
PART = 256  # images that a thread takes at a time
Key = Hashable  # what equal images have in common


def check_shared(data: Source, val: Source, data_name: str, val_name: str, allowed: bool) -> None:
    """Raises EvaluationError where images of val are in data too; where that is `allowed`, prints how many."""
    sentence = distributed.from_main(lambda: shared_sentence(data, val, data_name, val_name))
    if sentence and not allowed:
        raise EvaluationError(f"{sentence}; name images that are not trained on (or --allow_shared true to go on)")
    if sentence and distributed.is_main():
        print(sentence, file=sys.stderr)


def shared_sentence(data: Source, val: Source, data_name: str, val_name: str) -> str:
    """How many images of val are in data too, with an example; empty where none is."""
    found = shared_images(data, val)
    if not found:
        return ""
    i, j = found[0]
    example = f"{val.name(j)} is {data.name(i)}"
    return redacted(f"{len(found)} of {len(val)} images of {val_name} are in {data_name} too, e.g. {example}")


def shared_images(data: Source, val: Source) -> list[tuple[int, int]]:
    """(position in data, position in val) of each image of val that is in data."""
    both = _Images(data), _Images(val)
    left = [list(range(len(images.lengths))) for images in both]
    keys: list[list[Key]] = [images.lengths.tolist() for images in both]
    looks: tuple[Callable[[_Images, int], Key] | None, ...] = (None, _Images.ending, _Images.content)
    sums = [crc for images in both if (crc := images.checksums()) is not None]
    if len(sums) == 2:
        keys = [list(zip(k, s.tolist(), strict=True)) for k, s in zip(keys, sums, strict=True)]
        looks = (None, _Images.ending)  # among a million images of one length some have a checksum in common by chance
    found: list[list[tuple[int, Key]]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for look in looks:
            if look:
                keys = [_looks(pool, look, images, pairs) for images, pairs in zip(both, found, strict=True)]
            common = set(keys[0]) & set(keys[1]) - {None, 0}
            found = [[p for p in zip(*pair, strict=True) if p[1] in common] for pair in zip(left, keys, strict=True)]
            left = [[i for i, _ in pairs] for pairs in found]
    at = {key: i for i, key in reversed(found[0])}
    return [(at[key], j) for j, key in found[1]]


def _looks(
    pool: ThreadPoolExecutor, look: Callable[[_Images, int], Key], images: _Images, pairs: list[tuple[int, Key]]
) -> list[Key]:
    """The keys of images by a further look, each with its key before."""

    def some(part: list[tuple[int, Key]]) -> list[Key]:
        return [None if (seen := look(images, i)) is None else (key, seen) for i, key in part]

    parts = [pairs[begin : begin + PART] for begin in range(0, len(pairs), PART)]
    with images.source.coming(np.array([i for i, _ in pairs], np.int64)):
        return [key for keys in pool.map(some, parts) for key in keys]


class _Images:
    """The encoded images of a data set. What two of them are compared by is None where one cannot be read.

    Attributes:
        lengths: in bytes, int64 [n]; 0 where there is nothing.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.lengths = source, source.lengths()
        if not source.in_store and not isinstance(source, FolderSource):
            self.table = cast(Places, source.places(np.arange(len(source)))).table

    def checksums(self) -> np.ndarray | None:
        """CRC-32 of each image's bytes, uint32 [n], where a tar's index or side files have it (these go on over the
        label)."""
        if isinstance(self.source, FolderSource):
            return None
        source, found = self.source, []
        for shard in source.shards if isinstance(source, Shards) else [cast("BetonSource | TarSource", source)]:
            if isinstance(shard, TarSource):
                found.append(shard.index.crc32)
                continue
            beton = shard.beton
            if not beton.side or [field.type_id for field in beton.fields] != [IMAGE, INT]:
                return None
            labels = np.ascontiguousarray(beton.rows["f1"]).view(np.uint8).reshape(-1, 8)
            found.append(crc32_before(beton.side.crc32, labels))
        return np.concatenate(found)

    def ending(self, i: int) -> Key:
        length = int(self.lengths[i])
        count = min(length, ENDING)
        try:
            if self.source.in_store:
                return length, bytes(self.source.read(i).data[-count:])
            if isinstance(self.source, FolderSource):
                with open(self.source.file(i), "rb") as file:
                    file.seek(-count, os.SEEK_END)
                    return length, file.read(count)
            file_number, begin = self.table[i, 1:3].tolist()
            return length, os.pread(file_number, count, begin + length - count)
        except StoreError:
            raise
        except (OSError, DecodeError):
            return None

    def content(self, i: int) -> Key:
        try:
            data = self.source.read(i).data
        except DecodeError:
            return None
        return len(data), zlib.crc32(data)


def crc32_before(crc32: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The CRC-32 of data without its last bytes.

    Args:
        crc32: of the whole data, uint32 [n].
        last: its last bytes, uint8 [n, k].
    """
    ones = np.uint32(0xFFFFFFFF)
    table = np.array([zlib.crc32(bytes([i ^ 255])) ^ 0xFF000000 for i in range(256)], np.uint32)
    index = np.zeros(256, np.uint32)  # of an entry of the table by its highest byte
    index[table >> 24] = np.arange(256)
    state = crc32 ^ ones
    for byte in last.T[::-1]:
        entry = index[state >> 24]
        state = ((state ^ table[entry]) << np.uint32(8)) | (entry ^ byte)
    return state ^ ones
