"""What makes two starts the same run: the settings that shape it, and the images it learns from."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np

from fastssl.config import Config
from fastssl.loaders.decode import DecodeError, Encoded
from fastssl.loaders.sources import BetonSource, FolderSource, Shards, Source
from fastssl.loaders.store import together
from fastssl.loaders.tar import TarSource

FREE = (
    *("data.path", "data.val", "data.batch_size", "data.workers", "data.engine", "data.prefetch", "data.max_bad"),
    *("data.cache", "data.cache_gb"),
)
"""Keys that may change when a run goes on, beside run.* (but its seed), monitor.* and health.*; what they stand for
(the images, the images per step) is compared instead."""
FILES = ("cae.tokenizer",)
LOOKED_AT = 64  # images that are compared with one another


def settings(config: Config) -> dict[str, Any]:
    """The keys that a continuation must have in common with the run, flat and as plain values. A tokenizer's file
    counts by its content."""
    kept = {
        key: value
        for key, value in flat("", config.as_dict())
        if key not in FREE and (key == "run.seed" or not key.startswith(("run.", "monitor.", "health.")))
    }
    return {key: _content(value) if key in FILES and os.path.isfile(value) else value for key, value in kept.items()}


def flat(prefix: str, value: Any) -> Any:
    """Dotted keys and their values."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(f"{prefix}.{key}" if prefix else key, item)
    else:
        yield prefix, value


def _content(path: str) -> str:
    """The checksum of a file."""
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            crc = zlib.crc32(piece, crc)
    return f"a file with CRC-32 {crc:08x}"


def identity(source: Source) -> str:
    """A short text that is the same for the same images in the same order, wherever they lie: by labels, and the tables
    and some samples' bytes of a .beton, a tar's index, or a folder's names and sizes. Side files have no part in it:
    they may go."""
    digest = hashlib.sha256(np.ascontiguousarray(source.labels).tobytes())
    if isinstance(source, FolderSource):
        for i, name in enumerate(source.files):
            digest.update(os.fsencode(f"{name}:{source.length(i)}\n"))
    else:
        shards = source.shards if isinstance(source, Shards) else [cast("BetonSource | TarSource", source)]
        for shard in shards:
            if isinstance(shard, TarSource):
                digest.update(f"{shard.size}:{shard.index.checksum()}\n".encode())
                continue
            beton = shard.beton
            looked_at = _spaced(len(beton), -(-LOOKED_AT // len(shards)))
            stored = [crc for crc in together(partial(_crc32, beton.image), looked_at) if crc is not None]
            digest.update(f"{beton.size}:{beton.tables_crc32}:{stored}\n".encode())
    return digest.hexdigest()[:16]


def _crc32(read: Callable[[int], Encoded], i: int) -> int | None:
    """Checksum of an image's bytes; None where they cannot be read."""
    try:
        return zlib.crc32(read(i).data)
    except DecodeError:
        return None


def _spaced(images: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, images - 1, count).astype(int)).tolist()


def repeated(source: Source) -> str | None:
    """A line where most of some images, evenly spaced over the data, have the same bytes; else None."""
    looked_at = _spaced(len(source), LOOKED_AT)
    found = [crc for crc in together(partial(_crc32, source.read), looked_at) if crc is not None]
    different = len(set(found))
    if len(found) < 8 or different > len(found) // 2:
        return None
    return f"of {len(found)} images looked at only {different} differ; a network learns nothing from repeated images"
