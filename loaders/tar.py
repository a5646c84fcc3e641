"""WebDataset's tar shards, read where they lie: an index says which bytes of a tar are which image.

The files of one sample follow each other in the tar and share a key, their name up to the first dot of its last part:
`n01/7.jpg` and `n01/7.cls` are the sample `n01/7`. Its image is the file with a known ending, its label the integer in
`.cls`, or `label` or `class` in `.json`. The index is built when a shard is first opened, which reads all of it once,
and kept beside it (`<shard>.index.npz`), or in the cache folder where nothing can be written there.

Source: the layout of WebDataset's shards; the tar formats (ustar, pax, GNU) as Python's tarfile reads them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from fastssl.config import printable
from fastssl.loaders import cache, store
from fastssl.loaders.beton import DAMAGE, WRONG_CHECKSUM, join_words, read_arrays, split_words
from fastssl.loaders.decode import (
    FILE_AT,
    MAX_BYTES,
    SUFFIXES,
    UNKNOWN,
    DecodeError,
    Encoded,
    Places,
    header_size,
    open_image,
    read_at,
    upright_size,
)
from fastssl.loaders.pool import WorkerDied, cores, ordered
from fastssl.loaders.sources import Source, SourceError
from fastssl.loaders.store import StoreError, StoreFile
from fastssl.progress import progress_bar

log = logging.getLogger(__name__)

MARK = "fastssl index of a tar, version 1"
BLOCK = 8 << 20  # bytes of a tar that count as one page, and that are fetched together from a store
AHEAD = 4  # pieces of that size that are read ahead of an index, per shard
TOGETHER = 4  # shards in a store that are indexed at the same time
SAID = 3  # names of each kind of left-out files
_RECORD = 512  # bytes, tar's unit
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SPLIT = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # key, and the ending behind its first dot
_META = re.compile(r"(?:.*/)?__[^/]*__(?:/.*)?", re.DOTALL)  # WebDataset's own
_INTEGER = re.compile(rb"\s*[+-]?\d{1,18}\s*")


@dataclass(frozen=True)
class Index:
    """What a tar holds.

    Attributes:
        begins, sizes: int64 [n], where each image's bytes lie in the tar.
        heights, widths: int64 [n], in pixels, upright; 0 where the image has no readable header.
        labels: int64 [n]; -1 where there is none.
        crc32: uint32 [n], checksum of each image's bytes.
        names: uint8, the images' names in the tar, each with a zero byte behind it.
        left_out: one line on the files that belong to no sample; empty where there are none.
    """

    begins: np.ndarray
    sizes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    labels: np.ndarray
    crc32: np.ndarray
    names: np.ndarray
    left_out: str = ""

    def checksum(self) -> str:
        """A short text that changes when an image, its place or its label does."""
        crc = 0
        for array in (self.begins, self.sizes, self.labels, self.crc32, self.names):
            crc = zlib.crc32(np.ascontiguousarray(array), crc)
        return f"{crc:08x}"

    def bounds(self) -> np.ndarray:
        """Where blocks of about BLOCK bytes begin, each of whole images, and where the last one ends: int64 [K + 1]."""
        first = np.unique(self.begins // BLOCK, return_index=True)[1]
        return np.append(self.begins[first], self.begins[-1] + self.sizes[-1])

    def name(self, i: int) -> str:
        """The name of an image in the tar."""
        begin = self._ends[i - 1] + 1 if i else 0
        return os.fsdecode(self.names[begin : self._ends[i]].tobytes())

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.flatnonzero(self.names == 0)

    def write(self, path: Path, stamp: str) -> None:
        """Writes the index, whole or not at all; `stamp` is what tells this version of the tar from another."""
        stored, arrays = io.BytesIO(), {key: getattr(self, key) for key in _ARRAYS}
        np.savez(stored, stamp=join_words([MARK, stamp, self.left_out]), **arrays)
        store.write_bytes(str(path), stored.getvalue())

    @classmethod
    def read(cls, path: Path, stamp: str) -> Index | None:
        """A kept index; None where there is none, or none of this version of the tar, or it is damaged."""
        with contextlib.suppress(*DAMAGE, TypeError):
            entries = read_arrays(path, "stamp", *_ARRAYS)
            mark, version, left_out = split_words(entries.pop("stamp"))
            count, names = len(entries["begins"]), entries["names"]
            whole = all(len(entries[key]) == count for key in _ARRAYS[:-1]) and np.count_nonzero(names == 0) == count
            if (mark, version) == (MARK, stamp) and whole:
                return cls(**entries, left_out=left_out)
        return None


_ARRAYS = ("begins", "sizes", "heights", "widths", "labels", "crc32", "names")


class TarSource(Source):
    """The samples of one tar shard. An image is compared with its checksum when it is first read.

    Args:
        path: the tar.
        file: it, opened (`open_tars` does).
        index: of it.
        classes: class names; may be empty.

    Attributes:
        size: of the tar, in bytes.

    Raises:
        SourceError: it has a label that is no class.
    """

    def __init__(self, path: str, file: File, index: Index, classes: Sequence[str] = ()) -> None:
        self.path, self.classes, self.index = store.shown(path), list(classes), index
        self._file, self.labels = file, index.labels
        self.size = _size(file)
        if isinstance(file, StoreFile):
            self.blocks, self.in_store = cache.Blocks(file, index.bounds()), True
        self._checked = np.zeros(len(self), np.bool_)
        if classes and (worst := int(self.labels.max())) >= len(classes):
            i = int(self.labels.argmax())
            raise SourceError(f"{self.name(i)} has label {worst}, but there are {len(classes)} class names")
        if index.left_out:
            log.warning("%s: %s", self.path, index.left_out)

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.index.heights[ids], self.index.widths[ids]

    def lengths(self) -> np.ndarray:
        return self.index.sizes

    def read(self, i: int) -> Encoded:
        data = self._bytes(i)
        if not self._checked[i]:
            if zlib.crc32(data) != self.index.crc32[i]:
                raise DecodeError(WRONG_CHECKSUM)
            self._checked[i] = True
        height, width = int(self.index.heights[i]), int(self.index.widths[i])
        if height <= 0:
            height, width = upright_size(open_image(data))
        return Encoded(np.frombuffer(data, np.uint8), "file", height, width)

    def _bytes(self, i: int) -> bytes:
        begin, size = int(self.index.begins[i]), int(self.index.sizes[i])
        if size > MAX_BYTES:
            raise DecodeError(f"has {size} bytes; at most {MAX_BYTES} are read")
        if self.blocks is not None:
            data = self.blocks.read(begin, begin + size)
            if zlib.crc32(data) == self.index.crc32[i]:
                return data
            cache.forget(self.blocks.block(int(self.block_numbers(np.array([i]))[0])))  # damaged there, perhaps
            return self.blocks.read(begin, begin + size)
        assert not isinstance(self._file, StoreFile)
        return read_at(self._file.fileno(), begin, size)

    def places(self, ids: np.ndarray) -> Places:
        begins, sizes = self.index.begins[ids], self.index.sizes[ids]
        table = np.empty((len(ids), 4), np.int64)
        table[:, 0], table[:, 3] = FILE_AT, sizes
        held: Sequence[cache.Held] = ()
        if isinstance(self._file, StoreFile):
            table[:, 1], table[:, 2], held = cast(cache.Blocks, self.blocks).places(begins, sizes)
            table[table[:, 1] < 0, 0] = UNKNOWN
        else:
            table[:, 1], table[:, 2] = self._file.fileno(), begins
        return Places(table, held=held)

    def block_numbers(self, ids: np.ndarray) -> np.ndarray:
        return super().block_numbers(ids) if self.blocks is None else self.blocks.at(self.index.begins[ids])

    def to_check(self, ids: np.ndarray) -> np.ndarray | None:
        checked = self._checked[ids]
        return None if checked.all() else -checked.astype(np.int64)

    def sound(self, ids: np.ndarray, crc32: np.ndarray) -> np.ndarray:
        found = (crc32 < 0) | (crc32 == self.index.crc32[ids])
        self._checked[ids[found & (crc32 >= 0)]] = True
        return found

    def name(self, i: int) -> str:
        return printable(f"{store.base(self.path)}[{i}] {self.index.name(i)}")

    def fingerprint(self) -> str:
        return f"{self.size}-{self.index.checksum()}"

    def pages(self) -> np.ndarray:
        return self.index.begins // BLOCK


File = io.FileIO | StoreFile


def open_tars(paths: Sequence[str], classes: Sequence[str] | None = None) -> list[TarSource]:
    """Opens tar shards; those that have no index yet are read once, with a progress bar.

    Args:
        classes: class names; None: the lines of `classes.txt` beside the first shard, if it is there.

    Raises:
        SourceError: a shard cannot be read, is compressed, truncated or damaged, has no images, or has samples that are
            not as WebDataset lays them out; the message names shard and sample.
        StoreError: a store does not give it.
    """
    for path in paths:
        if not store.base(path).lower().endswith(".tar"):
            raise SourceError(_compressed(path, "compressed"))
    if classes is None:
        classes = _class_names(store.join(store.folder(paths[0]), "classes.txt"))
    cache.allow_files()
    files = store.together(_open, paths)
    three = zip(paths, files, _indices(paths, files), strict=True)
    return [TarSource(path, file, index, classes) for path, file, index in three]


def _class_names(path: str) -> list[str]:
    if not store.exists(path, optional=True):
        return []
    try:
        return store.read_bytes(path).decode().splitlines()
    except (OSError, ValueError) as error:
        raise SourceError(f"{store.shown(path)} cannot be read: {error}") from None


# -- the index ---------------------------------------------------------------------------------------------------------


def _indices(paths: Sequence[str], files: Sequence[File]) -> list[Index]:
    """The index of each shard. Several that are not there yet are built at the same time: by processes; of shards in a
    store, by threads."""
    found = [_kept(path, file) for path, file in zip(paths, files, strict=True)]
    missing = [i for i, index in enumerate(found) if index is None]
    if len(missing) == 1:
        found[missing[0]] = _make(paths[missing[0]], f"indexing {store.base(paths[missing[0]])}")
    elif missing:
        wanted, pool, results = [paths[i] for i in missing], ThreadPoolExecutor(TOGETHER), None
        try:
            in_store = any(map(store.is_url, wanted))
            results = None if in_store else ordered(_make, wanted, min(cores(), len(wanted)))
            with progress_bar(len(missing), "indexing", "shards") as bar:
                for i, index in zip(missing, results or pool.map(_make, wanted), strict=True):
                    found[i] = index
                    bar.update()
        except WorkerDied as error:
            raise SourceError(f"the tar shards' index could not be built: {error}") from None
        finally:
            pool.shutdown(cancel_futures=True)
            if results:
                results.close()
    return [index for index in found if index]


def _kept(path: str, file: File) -> Index | None:
    return next((found for place in _index_paths(path, file) if (found := Index.read(place, _stamp(file)))), None)


def _make(path: str, bar: str = "") -> Index:
    """Builds a shard's index and keeps it; other processes of this machine that want the same one wait and take it."""
    file = _open(path)
    stream, places = _Stream(file) if isinstance(file, StoreFile) else None, _index_paths(path, file)
    with io.BufferedReader(stream or cast(io.FileIO, file), 1 << 20) as reader, _alone(file, places):
        if index := _kept(path, file):
            return index
        stamp, size = _stamp(file), _size(file)
        with progress_bar(size >> 20, printable(bar), "MiB") as shown:

            def image_at(begin: int) -> None:
                shown.update((begin >> 20) - shown.n)
                if stream:
                    stream.image_at(begin)

            index = build(cast(BinaryIO, reader), store.shown(path), size, image_at)
        if stream:
            stream.keep(int(index.bounds()[-1]))
        fault = OSError("there is no cache folder")
        for place in places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                index.write(place, stamp)
                return index
            except OSError as error:
                fault = error
    log.warning("the index of %s cannot be kept (%s) and will be built each time", store.shown(path), fault)
    return index


@contextlib.contextmanager
def _alone(file: File, places: Sequence[Path]) -> Iterator[None]:
    """Keeps other processes of this machine from indexing the same tar. Of one in a store they wait for as long as its
    images come into the cache, in the folder of the index."""
    folder = -1
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            if not isinstance(file, StoreFile):
                fcntl.flock(file, fcntl.LOCK_EX)
            elif places:
                places[0].parent.mkdir(parents=True, exist_ok=True)
                folder = os.open(places[0].parent, os.O_RDONLY)
                _wait(folder)
        yield
    finally:
        if folder >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_UN)  # a child may have it open, too
            os.close(folder)


def _wait(folder: int) -> None:
    """Locks a folder, or gives up when nothing has come into it for as long as a request may take."""
    seen, since = 0, time.monotonic()
    while time.monotonic() - since < store.timeout():
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.05)
        if (now := os.fstat(folder).st_mtime_ns) != seen:
            seen, since = now, time.monotonic()


def _index_paths(path: str, file: File) -> list[Path]:
    """Where a shard's index may lie: beside it, or in the cache folder; of one in a store with its blocks there."""
    if isinstance(file, StoreFile):
        return [Path(cache.folder(), cache.folder_of(file), "table-index.npz")] if cache.folder() and file.etag else []
    key = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]
    away = [Path(cache.default_folder(), f"index-{key}", "index.npz")] if cache.default_folder() else []
    return [Path(f"{store.plain(path)}.index.npz"), *away]


def _open(path: str) -> File:
    if store.is_url(path):
        return StoreFile(path)
    path = store.plain(path)
    try:
        if not os.path.isfile(path):
            raise SourceError(f"{printable(path)} {'is no file' if os.path.exists(path) else 'does not exist'}")
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise SourceError(f"{printable(path)} cannot be read: {error.strerror}") from None


def _size(file: File) -> int:
    return file.size if isinstance(file, StoreFile) else os.fstat(file.fileno()).st_size


def _stamp(file: File) -> str:
    """What tells this version of a tar from another one."""
    return f"{_size(file)}:{file.etag if isinstance(file, StoreFile) else os.fstat(file.fileno()).st_mtime_ns}"


class _Stream(io.RawIOBase):
    """A tar in a store while its index is built: read once, in large pieces, some ahead. The blocks that its images are
    read in later go into the cache on the way."""

    def __init__(self, file: StoreFile) -> None:
        self.url, self._file, self._at = file.url, file, 0
        self._begin = -1  # of the block that is being read: its first image
        self._pieces: dict[int, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(AHEAD)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._at >= self._file.size:
            return 0
        inside = self._at % BLOCK
        data = memoryview(self._piece(self._at // BLOCK))[inside : inside + len(view)]
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _piece(self, number: int) -> bytes:
        for k in range(number, min(number + AHEAD, -(-self._file.size // BLOCK))):
            if k not in self._pieces:
                self._pieces[k] = self._pool.submit(self._file.read, k * BLOCK, min((k + 1) * BLOCK, self._file.size))
        return self._pieces[number].result()

    def image_at(self, begin: int) -> None:
        """Notes where an image begins; it may be the first one of a block."""
        if self._begin >= 0 and begin // BLOCK == self._begin // BLOCK:
            return
        self.keep(begin)
        self._begin = begin
        for k in [k for k in self._pieces if k < begin // BLOCK]:
            del self._pieces[k]

    def keep(self, end: int) -> None:
        """Puts the block that ends here into the cache."""
        if 0 <= self._begin < end and cache.folder() and cache.folder_of(self._file):
            block = cache.piece(self._file, self._begin, end)
            cache.hold([replace(block, file=cast(StoreFile, _Read(self.url, self._between(self._begin, end))))])

    def _between(self, begin: int, end: int) -> bytes:
        first, last = begin // BLOCK, (end - 1) // BLOCK
        data = b"".join(self._piece(k) for k in range(first, last + 1))
        return data[begin - first * BLOCK : end - first * BLOCK]


@dataclass(frozen=True)
class _Read:
    """A range of a file that has been read already, for the cache to fetch."""

    url: str
    data: bytes

    def read(self, begin: int, end: int) -> bytes:
        return self.data


@dataclass
class _Sample:
    """The files of one key, as they come."""

    key: str
    endings: set[str] = field(default_factory=set)
    image: str = ""
    row: tuple[int, ...] = ()
    cls: int | None = None
    json: int | None = None

    @property
    def label(self) -> int:
        return next((label for label in (self.cls, self.json) if label is not None), -1)


def build(file: BinaryIO, shown: str, size: int, image_at: Callable[[int], object]) -> Index:
    """Reads a tar to its end.

    Args:
        file: the tar, opened to be read.
        shown, size: its name for messages, and its bytes.
        image_at: told where each image begins, in their order.

    Raises:
        SourceError: see `open_tars`.
    """
    head = file.read(8)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise SourceError(_compressed(shown, f"compressed ({kind})"))
    file.seek(0)
    samples: list[_Sample] = []
    left_out: Counter[str] = Counter()
    others: list[str] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            keys: set[str] = set()
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps all of them
                if member.isdir() or _META.fullmatch(member.name):
                    continue
                parts = _SPLIT.fullmatch(member.name)
                if not member.isreg() or not parts:
                    left_out["no regular files" if not member.isreg() else "hidden or without an ending"] += 1
                    others.append(member.name)
                    continue
                if member.issparse():
                    raise SourceError(f"{shown} has the sparse file '{printable(member.name)}'; pack it as a plain one")
                key, ending = parts[1], parts[2].lower()
                if not samples or samples[-1].key != key:
                    if key in keys:
                        raise SourceError(
                            f"{shown} has files of sample '{printable(key)}' in two places; a sample's files must "
                            "follow each other (pack them with tar --sort=name), and keys must differ"
                        )
                    keys.add(key)
                    samples.append(_Sample(key))
                if _take(samples[-1], member, ending, file, shown):
                    image_at(member.offset_data)
            end = tar.offset
    except SourceError:
        raise
    except StoreError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise SourceError(f"{shown} is no tar, or is truncated or damaged ({error})") from None
    _check_end(file, shown, end, size)
    whole = [sample for sample in samples if sample.image]
    for sample in samples:
        if not sample.image:
            left_out["samples without an image"] += 1
            others.append(f"{sample.key}.{min(sample.endings)}")
    if not whole:
        known = " ".join(sorted(SUFFIXES))
        raise SourceError(f"{shown} has no images in it ({len(samples)} samples); known endings: {known}")
    words = ", ".join(f"{count} {what}" for what, count in left_out.items())
    named = ", ".join(map(printable, others[:SAID])) + (", ..." if len(others) > SAID else "")
    begins, sizes, heights, widths, crc32 = np.array([sample.row for sample in whole], np.int64).T.copy()
    labels = np.array([sample.label for sample in whole], np.int64)
    names = join_words([sample.image for sample in whole])
    line = f"left out: {words} ({named})" if others else ""
    return Index(begins, sizes, heights, widths, labels, crc32.astype(np.uint32), names, line)


def _take(sample: _Sample, member: tarfile.TarInfo, ending: str, file: BinaryIO, shown: str) -> bool:
    """Notes one more file of a sample; whether it is its image."""
    name = f"'{printable(member.name)}'"
    if ending in sample.endings:
        raise SourceError(f"{shown} has {name} twice; a key names one sample")
    if "\0" in member.name:
        raise SourceError(f"{shown} has a zero byte in the name {name}")
    sample.endings.add(ending)
    is_image = f".{ending.rpartition('.')[2]}" in SUFFIXES
    if not is_image and ending not in ("cls", "json"):
        return False
    begin, size = member.offset_data, member.size
    data = b""
    if size <= MAX_BYTES:
        file.seek(begin)
        data = file.read(size)
        if len(data) < size:
            raise SourceError(f"{shown} is truncated: it ends inside {name}")
    if is_image:
        if sample.image:
            raise SourceError(f"{shown} has several images for sample '{printable(sample.key)}': {name} is one more")
        height = width = 0
        with contextlib.suppress(DecodeError):
            height, width = header_size(data)
        sample.image, sample.row = member.name, (begin, size, height, width, zlib.crc32(data))
    elif ending == "cls":
        if not _INTEGER.fullmatch(data) or int(data) < -1:
            raise SourceError(f"{shown} has {name}, which is not a class number (an integer from 0; -1: none)")
        sample.cls = int(data)
    else:
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{shown} has {name}, which is not JSON ({error})") from None
        found = [values.get(key) for key in ("label", "class")] if isinstance(values, dict) else []
        sample.json = next((v for v in found if type(v) is int and -1 <= v < 1 << 62), None)
    return is_image


def _check_end(file: BinaryIO, shown: str, end: int, size: int) -> None:
    """Raises SourceError unless a tar ends with zeros behind its last file: what tarfile stops at may be damage."""
    file.seek(end)
    if len(mark := file.read(_RECORD)) < _RECORD:
        raise SourceError(f"{shown} is truncated: it has no end mark (zeros) behind its last file, at byte {end}")
    if any(mark):
        raise SourceError(f"{shown} is damaged at byte {end}: there is neither a file's header nor the end mark")
    while piece := file.read(BLOCK):
        if piece.count(0) < len(piece):
            raise SourceError(f"{shown} has data behind its end mark (byte {end}), as two tars in one; pack it again")


def _compressed(path: str, how: str) -> str:
    return f"{store.shown(path)} is {how}: no image in it can be read alone; unpack it to a plain .tar"
