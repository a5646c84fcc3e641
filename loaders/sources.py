"""Where encoded samples come from: a .beton file, a glob of .beton shards, or a folder of images."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import overload

import numpy as np

from fastssl.loaders.beton import Beton, BetonError
from fastssl.loaders.decode import (
    FILE_BY_NAME,
    SUFFIXES,
    DecodeError,
    Encoded,
    Places,
    decode,
    open_image,
    upright_size,
)

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
    """

    path: str
    classes: list[str]
    labels: np.ndarray
    has_parts: bool = False

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

    @abstractmethod
    def name(self, i: int) -> str:
        """How messages name sample `i`."""

    def parts(self, i: int) -> np.ndarray | None:
        """Part maps of sample `i`: uint8 [N, h, w]; None where the data has none."""
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """A short text that changes when the data does: checksums where there are any, else names, sizes and times."""

    def pages(self) -> np.ndarray:
        """The page that each sample's image lies in, int64 [n]; SourceError where the data has no pages."""
        raise SourceError(f"{self.path} has no pages to read in order (data.page_window); convert it to .beton")


def open_source(path: str) -> Source:
    """Opens a .beton file, a glob of .beton shards (numbers in the names in numerical order), or a folder of images.

    A folder's sub-folders are its classes, in the order of their names, with images at any depth; a folder without
    sub-folders is unlabelled.

    Raises:
        SourceError: nothing there, nothing usable there, or shards that do not belong together.
    """
    path = os.fspath(path)
    try:
        if os.path.isdir(path):
            return FolderSource(path)
        if os.path.exists(path):
            return BetonSource(path)
        if not glob.has_magic(path):
            raise SourceError(f"{path} does not exist")
        shards = sorted(glob.glob(path), key=_natural)
        if not shards:
            raise SourceError(f"{path} matches no file")
        return Shards(path, [BetonSource(shard) for shard in shards])
    except BetonError as error:
        raise SourceError(str(error)) from None


class BetonSource(Source):
    """The samples of one .beton file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.beton = Beton(path)
        if not len(self.beton):
            raise SourceError(f"{path} has no samples")
        self.classes, self.labels = self.beton.classes, self.beton.labels
        self.has_parts = self.beton.parts_shape is not None

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.beton.heights[ids], self.beton.widths[ids]

    def read(self, i: int) -> Encoded:
        return self.beton.image(i)

    def places(self, ids: np.ndarray) -> Places:
        return self.beton.places(ids)

    def name(self, i: int) -> str:
        return self.beton.name(i)

    def parts(self, i: int) -> np.ndarray | None:
        return self.beton.parts(i)

    def fingerprint(self) -> str:
        return self.beton.fingerprint()

    def pages(self) -> np.ndarray:
        return self.beton.pages


class FolderSource(Source):
    """The images of a folder; a header is read when a size is first asked for."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.classes, self._files, self.labels = scan_folder(path)
        self._sizes = np.full((2, len(self._files)), -1, np.int64)  # threads may fill an entry twice, with equal values

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for i in np.unique(np.asarray(ids)[self._sizes[0, ids] < 0]):
            self._sizes[:, i] = self._header_size(i)
        return self._sizes[0, ids], self._sizes[1, ids]

    def read(self, i: int) -> Encoded:
        data = read_file(os.path.join(self.path, self._files[i]))
        if self._sizes[0, i] <= 0:
            self._sizes[:, i] = upright_size(open_image(data))
        height, width = (int(side) for side in self._sizes[:, i])
        return Encoded(np.frombuffer(data, np.uint8), "file", height, width)

    def places(self, ids: np.ndarray) -> Places:
        folder = os.path.join(self.path, "")
        names = os.fsencode("".join([f"{folder}{self._files[i]}\0" for i in ids.tolist()]))
        text = np.frombuffer(names, np.uint8)
        table = np.zeros((len(ids), 4), np.int64)
        table[:, 0] = FILE_BY_NAME
        table[:, 2] = text.ctypes.data
        table[1:, 2] += np.flatnonzero(text == 0)[:-1] + 1
        return Places(table, names)

    def name(self, i: int) -> str:
        return os.path.join(self.path, self._files[i])

    def fingerprint(self) -> str:
        files = (os.stat(os.path.join(self.path, file)) for file in self._files)
        facts = [f"{file}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in zip(self._files, files, strict=True)]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def _header_size(self, i: int) -> tuple[int, int]:
        try:
            return upright_size(open_image(read_file(os.path.join(self.path, self._files[i]))))
        except DecodeError:
            return 0, 0


class Shards(Source):
    """Several .beton files as one data set, one after the other."""

    def __init__(self, path: str, shards: list[BetonSource]) -> None:
        self.path, self.shards = path, shards
        first = shards[0]
        for shard in shards[1:]:
            for what, mine, other in (
                ("classes", first.classes, shard.classes),
                ("part maps", first.beton.parts_shape, shard.beton.parts_shape),
            ):
                if mine != other:
                    raise SourceError(f"{path}: {first.path} and {shard.path} have different {what}")
        _check_complete(path, shards)
        self.classes, self.has_parts = first.classes, first.has_parts
        self.labels = np.concatenate([shard.labels for shard in shards])
        self._heights = np.concatenate([shard.beton.heights for shard in shards])
        self._widths = np.concatenate([shard.beton.widths for shard in shards])
        self._begins = np.cumsum([0, *(len(shard) for shard in shards)])

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._heights[ids], self._widths[ids]

    def fingerprint(self) -> str:
        return " ".join(shard.fingerprint() for shard in self.shards)

    def read(self, i: int) -> Encoded:
        shard, i = self._find(i)
        return shard.read(i)

    def places(self, ids: np.ndarray) -> Places:
        table = np.empty((len(ids), 4), np.int64)
        shards = np.searchsorted(self._begins, ids, side="right") - 1
        for k in np.unique(shards).tolist():
            mine = shards == k
            table[mine] = self.shards[k].places(ids[mine] - self._begins[k]).table
        return Places(table)

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

    def _find(self, i: int) -> tuple[BetonSource, int]:
        k = int(np.searchsorted(self._begins, i, side="right")) - 1
        return self.shards[k], i - int(self._begins[k])


def _check_complete(path: str, shards: list[BetonSource]) -> None:
    """Raises SourceError unless files that say which shard they are make up the whole."""
    said = {shard.path: shard.beton.side.shard for shard in shards if shard.beton.side}
    totals = {total for _, total in said.values()}
    if totals <= {1}:
        return
    if len(totals) > 1 or len(said) < len(shards):
        raise SourceError(f"{path} matches files that are not shards of the same conversion")
    (total,) = totals
    present = [index for index, _ in said.values()]
    if missing := sorted(set(range(total)) - set(present)):
        raise SourceError(f"{path} lacks shard {', '.join(map(str, missing))} of {total} (counted from 0)")
    if len(present) > total:
        raise SourceError(f"{path} matches {len(present)} files, but there are {total} shards")


def scan_folder(path: str | Path) -> tuple[list[str], list[str], np.ndarray]:
    """Lists the images of a folder.

    Returns:
        Class names, files (relative to the folder, sorted within each class), and labels int64 [files].

    Raises:
        SourceError: no images, or images both directly in the folder and in its sub-folders.
    """
    folders, flat = _list(path)
    files, labels = [], []
    for label, name in enumerate(folders):
        found = list(_images_below(path, name))
        files += found
        labels += [label] * len(found)
    if files and flat:
        raise SourceError(
            f"{path} has images in sub-folders ({files[0]}) and directly in it ({flat[0]}); "
            "give each class a sub-folder, or use no sub-folders"
        )
    if flat:
        return [], flat, np.full(len(flat), -1, np.int64)
    if not files:
        betons = " (name .beton shards by a glob: folder/*.beton)" if any(Path(path).glob("*.beton")) else ""
        raise SourceError(f"{path} has no images in it; known endings: {' '.join(sorted(SUFFIXES))}{betons}")
    return folders, files, np.array(labels, np.int64)


@overload
def read_file(path: str) -> bytes: ...


@overload
def read_file(path: str, space: memoryview | None) -> bytes | memoryview: ...


def read_file(path: str, space: memoryview | None = None) -> bytes | memoryview:
    """The bytes of an image file; in `space`, with no new memory, where they fit.

    Raises:
        DecodeError: the file cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            if space is None:
                return file.read()
            size = 0
            while count := file.readinto(space[size:]):
                size += count
            return space[:size] if size < len(space) else bytes(space) + file.read()
    except OSError as error:
        raise DecodeError(f"cannot be read: {error.strerror}") from None


def _images_below(root: str | Path, folder: str):
    folders, files = _list(os.path.join(root, folder))
    for name in files:
        yield f"{folder}/{name}"
    for name in folders:
        yield from _images_below(root, f"{folder}/{name}")


def _list(folder: str | Path) -> tuple[list[str], list[str]]:
    """Sub-folders and images of a folder, sorted; hidden ones left out."""
    folders, images = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                    images.append(entry.name)
    except OSError as error:
        raise SourceError(f"{folder} cannot be listed: {error.strerror}") from None
    return sorted(folders), sorted(images)


def _natural(path: str) -> list:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", path)]
