"""Where encoded samples come from: .beton files, tar shards (tar.py), a manifest of these (manifest.py), or a folder of
images."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from fastssl.config import printable
from fastssl.loaders import cache, store
from fastssl.loaders.beton import WRONG_CHECKSUM, Beton, BetonError, PartPlaces, SideFile
from fastssl.loaders.decode import (
    FILE_AT,
    FILE_BY_NAME,
    MAX_BYTES,
    SUFFIXES,
    DecodeError,
    Encoded,
    Places,
    decode,
    file_size,
    header_size,
    open_image,
    read_file,
    upright_size,
)

if TYPE_CHECKING:
    from fastssl.loaders.tar import TarSource

log = logging.getLogger(__name__)

__all__ = ["DecodeError", "Encoded", "Source", "SourceError", "decode", "open_source", "scan_folder"]


class SourceError(ValueError):
    """A data set cannot be opened; the message names the path and what is wrong."""


class Source(ABC):
    """A data set of encoded samples, numbered from 0. Reading is safe from many threads.

    Attributes:
        path: what it was opened from.
        classes: class names; empty where the data has none (labels may exist all the same, in FFCV's own files).
        labels: int64 [n], class indices; -1 where the data has none.
        has_parts: whether every sample has part maps.
        in_store: whether it lies in a store, and what is asked for is fetched in blocks.
        blocks: of a single file in a store.
    """

    path: str
    classes: list[str]
    labels: np.ndarray
    has_parts: bool = False
    in_store: bool = False
    blocks: cache.Blocks | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths in pixels, upright, int64 like `ids`; 0 where an image file has no readable header."""

    @abstractmethod
    def read(self, i: int) -> Encoded:
        """The encoded image of sample `i`, for `decode`. Raises DecodeError, without the sample's name."""

    def places(self, ids: np.ndarray) -> Places | None:
        """Where compiled code finds the encoded images of some samples; None where only `read` has them."""
        return None

    def to_check(self, ids: np.ndarray) -> np.ndarray | None:
        """Which samples' checksums are wanted, int64 [B], 0 for yes and -1 for no; None: of none."""
        return None

    def sound(self, ids: np.ndarray, crc32: np.ndarray) -> np.ndarray:
        """Whether samples hold the bytes that were written, bool [B], by the checksums of their images; -1: unknown."""
        return np.ones(len(ids), np.bool_)

    @abstractmethod
    def name(self, i: int) -> str:
        """How messages name sample `i`, printable."""

    def parts(self, i: int) -> np.ndarray | None:
        """Part maps of sample `i`: uint8 [N, h, w]; None where the data has none."""
        return None

    def part_places(self, ids: np.ndarray) -> PartPlaces | None:
        """Where compiled code finds the part maps of some samples; None where only `parts` has them."""
        return None

    def lengths(self) -> np.ndarray:
        """Bytes of each encoded image, int64 [n]; 0 where there is nothing."""
        return np.array([self.read(i).data.size for i in range(len(self))], np.int64)

    def block_numbers(self, ids: np.ndarray) -> np.ndarray:
        """The block that each of some samples is fetched in, int64 [B]; -1 where it lies on a disk."""
        return np.full(len(ids), -1, np.int64)

    def block(self, number: int) -> cache.Block:
        """A block by its number."""
        return cast(cache.Blocks, self.blocks).block(number)

    @contextlib.contextmanager
    def coming(self, ids: np.ndarray) -> Iterator[None]:
        """Inside, what these samples need is fetched ahead, in their order; nothing where the data lies on a disk."""
        numbers = self.block_numbers(ids) if self.in_store else np.empty(0, np.int64)
        used, first = np.unique(numbers, return_index=True)
        order = used[np.argsort(first)]
        order = order[order >= 0]
        reading = cache.ahead(len(order), lambda k: self.block(int(order[k]))) if len(order) else None
        try:
            yield
        finally:
            if reading is not None:
                reading.close()

    @abstractmethod
    def fingerprint(self) -> str:
        """A short text that changes when the data does: checksums where there are any, else names, sizes and times."""

    def pages(self) -> np.ndarray:
        """The page that each sample's image lies in, int64 [n]; SourceError where the data has no pages."""
        raise SourceError(f"{self.path} has no pages to read in order (data.page_window); convert it to .beton")


def open_source(path: str) -> Source:
    """Opens a data set by its path: a .beton file, a tar in WebDataset's layout, several of either, a manifest, or a
    folder of images.

    Several files are a glob, with numbers in the names in numerical order ('train-*.beton'), or a brace list in its own
    order ('train-{000..015}.tar'). A manifest ends in .json. A folder's sub-folders are its classes, in the order of
    their names, with images at any depth; a folder without sub-folders is unlabelled.

    Raises:
        SourceError: nothing there, nothing usable there, or shards that do not belong together.
    """
    path = store.plain(path)
    try:
        if store.is_folder(path):
            return StoreFolder(path) if store.is_url(path) else FolderSource(path)
        if is_manifest(path):
            from fastssl.loaders.manifest import open_manifest

            return open_manifest(path)
        return _open_files(path, files_of(path))
    except (BetonError, store.StoreError) as error:
        raise SourceError(str(error)) from None


def files_of(path: str) -> list[str]:
    """The files that a path names: itself, or what a glob or a brace list stands for.

    Raises:
        SourceError: there are none.
    """
    if not (store.is_url(path) and store.has_magic(path)) and store.exists(path):
        return [path]
    found = []
    for name in expand(path):
        found += store.glob(name) if store.has_magic(name) else [name]
    if not found:
        raise SourceError(f"{store.shown(path)} matches no file")
    if found == [path]:
        raise SourceError(f"{store.shown(path)} does not exist")
    return found


def is_manifest(path: str) -> bool:
    """Whether a path is that of a manifest (manifest.py)."""
    return store.base(path).lower().endswith(".json")


def _open_files(path: str, files: list[str]) -> Source:
    """The data set that `path` names, whose files these are, in their order."""
    tars = [file for file in files if is_tar(file)]
    if tars and len(tars) < len(files):
        other = next(file for file in files if not is_tar(file))
        raise SourceError(f"{path} names {tars[0]} and {other}: a data set is tars, or .beton files, not both")
    if tars:
        from fastssl.loaders.tar import open_tars

        shards = open_tars(files)
        return shards[0] if files == [path] else Shards(path, shards, shards[0].classes)
    betons = open_betons(files)
    if files == [path]:
        return named(betons, betons[0])
    classes = check_alike(path, betons)
    check_complete(path, betons)
    return named(betons, Shards(path, betons, classes))


def open_betons(files: Sequence[str]) -> list[BetonSource]:
    """Opens .beton files, several at a time."""
    cache.allow_files()
    return store.together(BetonSource, files)


def is_tar(path: str) -> bool:
    """Whether a file's name is that of a tar, compressed or not."""
    return bool(re.search(r"\.(tar|tgz|tar\.(gz|bz2|xz|zst))$", store.base(path), re.IGNORECASE))


def expand(path: str) -> list[str]:
    """The names that a path with brace lists stands for, in order: {000..015} counts, {a,b} lists, as in a shell.
    Without them it stands for itself.

    Raises:
        SourceError: more than MAX_NAMES.
    """
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", path)
    if not found:
        return [path]
    if found[3] is None:
        first, last = int(found[1]), int(found[2])
        if abs(last - first) >= MAX_NAMES:
            raise SourceError(f"{path} stands for more than {MAX_NAMES} names")
        step, width = (1 if first <= last else -1), max(map(len, (found[1], found[2])))
        width = width if "0" in (found[1][:1], found[2][:1]) else 0
        words = [f"{number:0{width}}" for number in range(first, last + step, step)]
    else:
        words = found[3].split(",")
    tails = expand(path[found.end() :])
    if len(words) * len(tails) > MAX_NAMES:
        raise SourceError(f"{path} stands for more than {MAX_NAMES} names")
    return [f"{path[: found.start()]}{word}{tail}" for word in words for tail in tails]


MAX_NAMES = 1_000_000


def named(shards: Sequence[BetonSource], source: Source) -> Source:
    """The data set of these .beton files; warns of those whose side file is gone (FFCV's own writer makes none)."""
    gone = [
        shard.path
        for shard in shards
        if not shard.beton.side and not store.exists(str(SideFile.path_of(shard.beton.path)), optional=True)
    ]
    if gone:
        more = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
        log.warning(
            "%s%s has no side file (%s): classes and samples go by their numbers, and there are no checksums",
            *(printable(gone[0]), more, printable(f"{gone[0]}.npz")),
        )
    return source


class BetonSource(Source):
    """The samples of one .beton file.

    A stored JPEG is compared with its checksum when it is first read: decoders see one flipped bit in ten. Of raw
    pixels, a byte is one value, and to check them would cost as much as to cut them.
    """

    def __init__(self, path: str) -> None:
        self.path = store.shown(path) if store.is_url(path) else path
        self.beton = Beton(path)
        if not len(self.beton):
            raise SourceError(f"{self.path} has no samples")
        self.blocks = self.beton.blocks
        self.in_store = self.blocks is not None
        self.classes, self.labels = self.beton.classes, self.beton.labels
        self.has_parts = self.beton.parts_shape is not None
        self._checked = np.zeros(len(self.beton), np.bool_) if self.beton.checksums else None

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.beton.heights[ids], self.beton.widths[ids]

    def read(self, i: int) -> Encoded:
        image = self.beton.image(i)
        if self._checked is not None and not self._checked[i] and image.mode == "jpg":
            if not self.beton.sound(i, zlib.crc32(image.data)):
                if not self.beton.forget(i):
                    raise DecodeError(WRONG_CHECKSUM)
                image = self.beton.image(i)  # again from the store: what was in the cache may have been damaged
                if not self.beton.sound(i, zlib.crc32(image.data)):
                    raise DecodeError(WRONG_CHECKSUM)
            self._checked[i] = True
        return image

    def to_check(self, ids: np.ndarray) -> np.ndarray | None:
        if self._checked is None or self._checked[ids].all():
            return None
        return -self._checked[ids].astype(np.int64)

    def sound(self, ids: np.ndarray, crc32: np.ndarray) -> np.ndarray:
        pairs = zip(ids.tolist(), crc32.tolist(), strict=True)
        found = np.array([crc < 0 or self.beton.sound(i, crc) for i, crc in pairs], np.bool_)
        if self._checked is not None:
            self._checked[ids[found & (crc32 >= 0)]] = True
        return found

    def places(self, ids: np.ndarray) -> Places:
        return self.beton.places(ids)

    def lengths(self) -> np.ndarray:
        return self.beton.lengths()

    def block_numbers(self, ids: np.ndarray) -> np.ndarray:
        return self.beton.block_numbers(ids)

    def name(self, i: int) -> str:
        return self.beton.name(i)

    def parts(self, i: int) -> np.ndarray | None:
        return self.beton.parts(i)

    def part_places(self, ids: np.ndarray) -> PartPlaces | None:
        return self.beton.part_places(ids)

    def fingerprint(self) -> str:
        return self.beton.fingerprint()

    def pages(self) -> np.ndarray:
        return self.beton.pages


class FolderSource(Source):
    """The images of a folder; a header is read when a size is first asked for."""

    def __init__(self, path: str) -> None:
        self.path = path
        found = scan_folder(path)
        self.classes, self.files, self.labels = found.classes, found.files, found.labels
        if left_out := found.left_out():
            log.warning("%s: %s", printable(path), left_out)
        self._sizes = np.full((2, len(self.files)), -1, np.int64)  # threads may fill an entry twice, with equal values

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for i in np.unique(np.asarray(ids)[self._sizes[0, ids] < 0]):
            self._sizes[:, i] = self._header_size(i)
        return self._sizes[0, ids], self._sizes[1, ids]

    def read(self, i: int) -> Encoded:
        data = read_file(self.file(i))
        if self._sizes[0, i] <= 0:
            self._sizes[:, i] = upright_size(open_image(data))
        height, width = (int(side) for side in self._sizes[:, i])
        return Encoded(np.frombuffer(data, np.uint8), "file", height, width)

    def places(self, ids: np.ndarray) -> Places:
        folder = os.path.join(self.path, "")
        names = os.fsencode("".join([f"{folder}{self.files[i]}\0" for i in ids.tolist()]))
        text = np.frombuffer(names, np.uint8)
        table = np.zeros((len(ids), 4), np.int64)
        table[:, 0] = FILE_BY_NAME
        table[:, 2] = text.ctypes.data
        table[1:, 2] += np.flatnonzero(text == 0)[:-1] + 1
        return Places(table, names)

    def name(self, i: int) -> str:
        return printable(self.file(i))

    def file(self, i: int) -> str:
        """The path of sample `i`."""
        return os.path.join(self.path, self.files[i])

    def lengths(self) -> np.ndarray:
        return np.array([max(0, self.length(i)) for i in range(len(self))], np.int64)

    def length(self, i: int) -> int:
        """Bytes of sample `i`; -1 where there is no such file any more."""
        try:
            return os.path.getsize(self.file(i))
        except OSError:
            return -1

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for i, name in enumerate(self.files):
            try:
                facts = os.stat(self.file(i))
                digest.update(os.fsencode(f"{name}:{facts.st_size}:{facts.st_mtime_ns}\n"))
            except OSError:
                digest.update(os.fsencode(f"{name}\n"))
        return digest.hexdigest()

    def _header_size(self, i: int) -> tuple[int, int]:
        try:
            return file_size(self.file(i))
        except DecodeError:
            return 0, 0


class StoreFolder(FolderSource):
    """The images of a folder in a store, each fetched as it is; the listing says what there is."""

    in_store = True

    def __init__(self, url: str) -> None:
        self.path, self._url = store.shown(url), url
        listed = store.listing(url)
        found = Found()
        found = _classes(self.path, _tree([file.name for file in listed], found), found)
        self.classes, self.files, self.labels = found.classes, found.files, found.labels
        if left_out := found.left_out():
            log.warning("%s: %s", self.path, left_out)
        facts = {file.name: file for file in listed}
        self._lengths = np.array([facts[name].size for name in self.files], np.int64)
        self._etags = [facts[name].etag for name in self.files]
        self._sizes = np.full((2, len(self.files)), -1, np.int64)
        self._folder = cache.folder_for(url)
        cache.register(self._folder if all(self._etags) else "", int(self._lengths.sum()))

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        new = np.unique(np.asarray(ids)[self._sizes[0, ids] < 0])
        for some in np.split(new, range(256, len(new), 256)):  # each is an open file
            for i, held in zip(some.tolist(), self._hold(some), strict=True):
                try:
                    self._sizes[:, i] = header_size(held.read()) if held else (0, 0)
                except DecodeError:
                    self._sizes[:, i] = 0
        return self._sizes[0, ids], self._sizes[1, ids]

    def places(self, ids: np.ndarray) -> Places:
        held = self._hold(ids)
        table = np.zeros((len(ids), 4), np.int64)
        for row, one in zip(table, held, strict=True):
            if one:
                row[:] = FILE_AT, one.fd, 0, one.size
        return Places(table, held=held)

    def read(self, i: int) -> Encoded:
        (held,) = self._hold(np.array([i]))
        if held is None:
            raise DecodeError(f"has {self._lengths[i]} bytes; at most {MAX_BYTES} are read")
        data = held.read()
        if self._sizes[0, i] <= 0:
            self._sizes[:, i] = upright_size(open_image(data))
        height, width = (int(side) for side in self._sizes[:, i])
        return Encoded(np.frombuffer(data, np.uint8), "file", height, width)

    def _hold(self, ids: np.ndarray) -> list[cache.Held | None]:
        """The files of some samples, fetched and open; None for those that are too long to be read."""
        short = [i for i in ids.tolist() if self._lengths[i] <= MAX_BYTES]
        found = dict(zip(short, cache.hold([self.block(i) for i in short]), strict=True))
        return [found.get(i) for i in ids.tolist()]

    def file(self, i: int) -> str:
        return store.join(self._url, self.files[i])

    def name(self, i: int) -> str:
        return store.shown(self.file(i))

    def length(self, i: int) -> int:
        return int(self._lengths[i])

    def block_numbers(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(ids, np.int64)

    def block(self, number: int) -> cache.Block:
        size, etag = int(self._lengths[number]), self._etags[number]
        facts = f"{self.files[number]}\n{size}\n{etag}".encode(errors="surrogateescape")
        file = store.StoreFile(self.file(number), size, etag)
        return cache.Block(file, 0, size, self._folder if etag else "", hashlib.sha256(facts).hexdigest()[:24])

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, size, etag in zip(self.files, self._lengths.tolist(), self._etags, strict=True):
            digest.update(os.fsencode(f"{name}:{size}:{etag}\n"))
        return digest.hexdigest()


class Files(FolderSource):
    """Some image files, unlabelled.

    Raises:
        SourceError: one of them is not there, or is a folder.
    """

    def __init__(self, files: Sequence[str]) -> None:
        for file in files:
            if not os.path.isfile(file):
                wrong = "is a folder; name the image files in it" if os.path.isdir(file) else "does not exist"
                raise SourceError(f"{printable(file)} {wrong}")
        self.path, self.classes, self.files = "", [], list(files)
        self.labels = np.full(len(files), -1, np.int64)
        self._sizes = np.full((2, len(files)), -1, np.int64)


class Shards(Source):
    """Several files as one data set, one after the other.

    Args:
        path: what they were opened from.
        shards: .beton files that agree (`check_alike`), or tars.
        classes: class names of all.
    """

    def __init__(self, path: str, shards: Sequence[BetonSource | TarSource], classes: list[str]) -> None:
        self.path, self.shards, self.classes = path, shards, classes
        self.has_parts = shards[0].has_parts
        self.labels = np.concatenate([shard.labels for shard in shards])
        sizes = [shard.sizes(np.arange(len(shard))) for shard in shards]
        self._heights, self._widths = (np.concatenate(sides) for sides in zip(*sizes, strict=True))
        self._begins = np.cumsum([0, *(len(shard) for shard in shards)])
        self.in_store = any(shard.in_store for shard in shards)
        self._blocks = np.cumsum([0, *(len(shard.blocks or ()) for shard in shards)])

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._heights[ids], self._widths[ids]

    def fingerprint(self) -> str:
        return " ".join(shard.fingerprint() for shard in self.shards)

    def read(self, i: int) -> Encoded:
        shard, i = self._find(i)
        return shard.read(i)

    def to_check(self, ids: np.ndarray) -> np.ndarray | None:
        wanted = np.full(len(ids), -1, np.int64)
        for shard, mine, inside in self._split(ids):
            if (one := shard.to_check(inside)) is not None:
                wanted[mine] = one
        return None if (wanted < 0).all() else wanted

    def sound(self, ids: np.ndarray, crc32: np.ndarray) -> np.ndarray:
        found = np.empty(len(ids), np.bool_)
        for shard, mine, inside in self._split(ids):
            found[mine] = shard.sound(inside, crc32[mine])
        return found

    def places(self, ids: np.ndarray) -> Places:
        table = np.empty((len(ids), 4), np.int64)
        held: list = []
        if self.in_store:  # all at once: one shard after the other would be slow
            numbers = np.unique(self.block_numbers(ids))
            held += cache.hold([self.block(k) for k in numbers[numbers >= 0].tolist()])
        for shard, mine, inside in self._split(ids):
            found = shard.places(inside)
            table[mine] = found.table
            held += found.held
        return Places(table, held=held)

    def part_places(self, ids: np.ndarray) -> PartPlaces | None:
        if (first := self.shards[0].part_places(np.empty(0, np.int64))) is None:
            return None
        table = np.empty((len(ids), 2), np.int64)
        held: list = []
        for shard, mine, inside in self._split(ids):
            found = cast(PartPlaces, shard.part_places(inside))
            table[mine] = found.table
            held += found.held
        return PartPlaces(table, first.shape, held)

    def lengths(self) -> np.ndarray:
        return np.concatenate([shard.lengths() for shard in self.shards])

    def block_numbers(self, ids: np.ndarray) -> np.ndarray:
        numbers = np.full(len(ids), -1, np.int64)
        shards = self._begins.searchsorted(ids, "right") - 1
        for k in np.unique(shards).tolist():
            mine = shards == k
            if self.shards[k].in_store:
                numbers[mine] = self.shards[k].block_numbers(ids[mine] - self._begins[k]) + self._blocks[k]
        return numbers

    def block(self, number: int) -> cache.Block:
        k = int(self._blocks.searchsorted(number, "right")) - 1
        return self.shards[k].block(number - int(self._blocks[k]))

    def _split(self, ids: np.ndarray) -> Iterator[tuple[BetonSource | TarSource, np.ndarray, np.ndarray]]:
        """The shards that some samples lie in: which these are, bool [B], and their numbers in the shard."""
        shards = self._begins.searchsorted(ids, "right") - 1
        for k in np.unique(shards).tolist():
            mine = shards == k
            yield self.shards[k], mine, ids[mine] - self._begins[k]

    def name(self, i: int) -> str:
        shard, i = self._find(i)
        return shard.name(i)

    def parts(self, i: int) -> np.ndarray | None:
        shard, i = self._find(i)
        return shard.parts(i)

    def pages(self) -> np.ndarray:
        each = [shard.pages() for shard in self.shards]
        begins = np.cumsum([0, *(pages.max() + 1 for pages in each)])
        return np.concatenate([pages + begin for pages, begin in zip(each, begins[:-1], strict=True)])

    def _find(self, i: int) -> tuple[BetonSource | TarSource, int]:
        k = int(np.searchsorted(self._begins, i, side="right")) - 1
        return self.shards[k], i - int(self._begins[k])


def check_alike(path: str, shards: Sequence[BetonSource]) -> list[str]:
    """The class names that all shards have; SourceError where these, or the part maps, differ. A shard without a side
    file takes the others' names."""
    first = next((shard for shard in shards if shard.beton.side), shards[0])
    for shard in shards:
        for what, mine, other in (
            ("classes", first.classes, shard.classes if shard.beton.side else first.classes),
            ("part maps", first.beton.parts_shape, shard.beton.parts_shape),
        ):
            if mine != other:
                raise SourceError(f"{path}: {first.path} and {shard.path} have different {what}")
    return first.classes


def check_complete(path: str, shards: Sequence[BetonSource]) -> None:
    """Raises SourceError unless files that say which shard they are make up the whole of one conversion."""
    said = {shard.path: shard.beton.side.shard for shard in shards if shard.beton.side}
    of = {shard.path: (said[shard.path][1], shard.beton.side.conversion) for shard in shards if shard.beton.side}
    totals = {total for _, total in said.values()}
    first, *others = said or [""]
    for other in others:
        if of[other] != of[first] or totals == {1}:
            raise SourceError(
                f"{path} matches {first} and {other}, which are not shards of the same conversion; name one data "
                "set, or have a manifest name the shards of both (fastssl manifest make)"
            )
    if totals <= {1}:
        return
    (total,) = totals
    present = [index for index, _ in said.values()]
    missing = sorted(set(range(total)) - set(present))
    if len(missing) > len(shards) - len(said):  # the others lack their side files
        raise SourceError(f"{path} lacks shard {', '.join(map(str, missing))} of {total} (counted from 0)")
    if len(shards) > total:
        raise SourceError(f"{path} matches {len(shards)} files, but there are {total} shards")


@dataclass
class Found:
    """The images of a folder, and what in it is none.

    Attributes:
        classes: names of the sub-folders.
        files: relative to the folder, sorted within each class.
        labels: int64 [files].
        other: what was left out, by the reason.
    """

    classes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    other: dict[str, list[str]] = field(default_factory=dict)

    def left_out(self) -> str:
        """One line that counts and names what was left out; empty where nothing was."""
        words = []
        for reason, names in self.other.items():
            shown = ", ".join(sorted(map(printable, names))[:NAMED])
            if reason == UNLISTED:
                endings = Counter(os.path.splitext(name)[1].lower() or "none" for name in names)
                reason = f"{reason} ({', '.join(f'{printable(end)} {n}' for end, n in endings.most_common(NAMED))})"
            words.append(f"{len(names)} {reason}: {shown}{', ...' if len(names) > NAMED else ''}")
        return f"left out: {'; '.join(words)}" if words else ""


NAMED = 3  # of each kind of things left out
UNLISTED, HIDDEN = "with endings that are not listed", "hidden"
TWICE, EMPTY = "linked folders that were read already", "classes without images"


def scan_folder(path: str | Path) -> Found:
    """Lists the images of a folder at any depth; its sub-folders are classes.

    Hidden files and folders are left out; linked folders are followed, each folder once.

    Raises:
        SourceError: no images, or images both directly in the folder and in its sub-folders.
    """
    found = Found()
    return _classes(os.fspath(path), _walk(os.fspath(path), found), found)


def _classes(path: str, top: _Folder, found: Found) -> Found:
    """Completes what was found below `top`, the folder `path`: classes, files and labels. Raises SourceError."""
    labels = []
    for label, (name, folder) in enumerate(sorted(top.folders.items())):
        before = len(found.files)
        found.files += folder.images(f"{name}/")
        labels += [label] * (len(found.files) - before)
        if len(found.files) == before:
            found.other.setdefault(EMPTY, []).append(name)
    flat = sorted(top.files)
    if found.files and flat:
        below, here = printable(found.files[0]), printable(flat[0])
        raise SourceError(
            f"{path} has images in sub-folders ({below}) and directly in it ({here}); "
            "give each class a sub-folder, or use no sub-folders"
        )
    if flat:
        found.files, found.labels = flat, np.full(len(flat), -1, np.int64)
        found.other.pop(EMPTY, None)
        return found
    if not found.files:
        found.other.pop(EMPTY, None)
        endings = {os.path.splitext(name)[1] for name in found.other.get(UNLISTED, ())}
        shards = next((end for end in (".beton", ".tar") if end in endings), "")
        glob = f" (name {shards} shards by a glob: folder/*{shards})" if shards else ""
        left_out = f"; {found.left_out()}" if found.other else ""
        known = " ".join(sorted(SUFFIXES))
        raise SourceError(f"{path} has no images in it; known endings: {known}{glob}{left_out}")
    found.classes, found.labels = sorted(top.folders), np.array(labels, np.int64)
    return found


def list_images(path: str | Path) -> Found:
    """As `scan_folder`, at any depth and without classes; there may be none."""
    found = Found()
    found.files = sorted(_walk(os.fspath(path), found).images(""))
    return found


@dataclass
class _Folder:
    files: list[str] = field(default_factory=list)
    folders: dict[str, _Folder] = field(default_factory=dict)

    def images(self, prefix: str) -> list[str]:
        """Its files, sorted, then those of its folders, likewise."""
        found = [prefix + name for name in sorted(self.files)]
        for name, folder in sorted(self.folders.items()):
            found += folder.images(f"{prefix}{name}/")
        return found


def _tree(names: Sequence[str], found: Found) -> _Folder:
    """The images of a listing as `_walk` gives those of a disk."""
    top, hidden = _Folder(), set()
    for name in names:
        parts = name.split("/")
        folders, last = parts[:-1], parts[-1]
        if not last:  # how some programs mark a folder
            continue
        if any(dots := [part.startswith(".") for part in parts]):
            hidden.add("/".join(parts[: dots.index(True) + 1]))
        elif os.path.splitext(last)[1].lower() not in SUFFIXES:
            found.other.setdefault(UNLISTED, []).append(name)
        else:
            folder = top
            for part in folders:
                folder = folder.folders.setdefault(part, _Folder())
            folder.files.append(last)
    if hidden:
        found.other[HIDDEN] = sorted(hidden)
    return top


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or into a closed folder
        return False


def _walk(root: str, found: Found) -> _Folder:
    """The images below a folder; notes in `found` what is left out. Real folders come first, then what links lead to,
    in the order of their names: the folder that two ways lead to is read by the same one each time."""
    seen: set[tuple[int, int]] = set()
    links: list[tuple[str, _Folder, str]] = []

    def leave_out(reason: str, name: str) -> None:
        found.other.setdefault(reason, []).append(name)

    def read(place: str, linked: bool) -> _Folder | None:
        """One folder, `place` relative to the root; None where links lead to one that was read already."""
        folder, path = _Folder(), os.path.join(root, place) if place else root
        try:
            facts = os.stat(path)
            if linked and (facts.st_dev, facts.st_ino) in seen:
                return None
            seen.add((facts.st_dev, facts.st_ino))
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise SourceError(f"{printable(path)} cannot be listed: {error.strerror}") from None
        for entry in entries:
            name = os.path.join(place, entry.name)
            if entry.name.startswith("."):
                leave_out(HIDDEN, name)
            elif _is_folder(entry):
                if entry.is_symlink():
                    links.append((name, folder, entry.name))
                elif below := read(name, linked):
                    folder.folders[entry.name] = below
                else:
                    leave_out(TWICE, name)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                folder.files.append(entry.name)  # if it is a dead link or no regular file, it is a bad one
            else:
                leave_out(UNLISTED, name)
        return folder

    top = read("", False)
    assert top is not None
    while links:
        links.sort(key=lambda link: link[0])
        name, folder, last = links.pop(0)
        if below := read(name, True):
            folder.folders[last] = below
        else:
            leave_out(TWICE, name)
    return top
