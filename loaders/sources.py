"""Where encoded samples come from: a .beton file, a glob of .beton shards, or a folder of images."""

from __future__ import annotations

import glob
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

import numpy as np

from fastssl.config import printable
from fastssl.loaders.beton import WRONG_CHECKSUM, Beton, BetonError, SideFile
from fastssl.loaders.decode import (
    FILE_BY_NAME,
    SUFFIXES,
    DecodeError,
    Encoded,
    Places,
    decode,
    file_size,
    open_image,
    read_file,
    upright_size,
)

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

    def part_places(self, ids: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]] | None:
        """Where compiled code finds the part maps of some samples, as `Beton.part_places`, and their shape; None where
        only `parts` has them."""
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
            return _named(BetonSource(path))
        if not glob.has_magic(path):
            raise SourceError(f"{path} does not exist")
        shards = sorted(glob.glob(path), key=_natural)
        if not shards:
            raise SourceError(f"{path} matches no file")
        return _named(*(BetonSource(shard) for shard in shards), pattern=path)
    except BetonError as error:
        raise SourceError(str(error)) from None


def _named(*shards: BetonSource, pattern: str = "") -> Source:
    """One data set of .beton files; warns of those whose side file is gone (FFCV's own writer makes none)."""
    source = Shards(pattern, list(shards)) if pattern else shards[0]
    gone = [shard.path for shard in shards if not SideFile.path_of(shard.beton.path).exists() and not shard.beton.side]
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
        self.path = path
        self.beton = Beton(path)
        if not len(self.beton):
            raise SourceError(f"{path} has no samples")
        self.classes, self.labels = self.beton.classes, self.beton.labels
        self.has_parts = self.beton.parts_shape is not None
        self._checked = np.zeros(len(self.beton), np.bool_) if self.beton.checksums else None

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.beton.heights[ids], self.beton.widths[ids]

    def read(self, i: int) -> Encoded:
        image = self.beton.image(i)
        if self._checked is not None and not self._checked[i] and image.mode == "jpg":
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

    def name(self, i: int) -> str:
        return self.beton.name(i)

    def parts(self, i: int) -> np.ndarray | None:
        return self.beton.parts(i)

    def part_places(self, ids: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]] | None:
        shape = self.beton.parts_shape
        return None if shape is None else (self.beton.part_places(ids), shape)

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
    """Several .beton files as one data set, one after the other."""

    def __init__(self, path: str, shards: list[BetonSource]) -> None:
        self.path, self.shards = path, shards
        first = next((shard for shard in shards if shard.beton.side), shards[0])
        for shard in shards:
            for what, mine, other in (
                ("classes", first.classes, shard.classes if shard.beton.side else first.classes),
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
        for shard, mine, inside in self._split(ids):
            table[mine] = shard.places(inside).table
        return Places(table)

    def part_places(self, ids: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]] | None:
        shape = self.shards[0].beton.parts_shape
        if shape is None:
            return None
        table = np.empty((len(ids), 2), np.int64)
        for shard, mine, inside in self._split(ids):
            table[mine] = shard.beton.part_places(inside)
        return table, shape

    def _split(self, ids: np.ndarray) -> Iterator[tuple[BetonSource, np.ndarray, np.ndarray]]:
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

    def _find(self, i: int) -> tuple[BetonSource, int]:
        k = int(np.searchsorted(self._begins, i, side="right")) - 1
        return self.shards[k], i - int(self._begins[k])


def _check_complete(path: str, shards: list[BetonSource]) -> None:
    """Raises SourceError unless files that say which shard they are make up the whole of one conversion."""
    said = {shard.path: shard.beton.side.shard for shard in shards if shard.beton.side}
    of = {shard.path: (said[shard.path][1], shard.beton.side.conversion) for shard in shards if shard.beton.side}
    totals = {total for _, total in said.values()}
    first, *others = said or [""]
    for other in others:
        if of[other] != of[first] or totals == {1}:
            raise SourceError(
                f"{path} matches {first} and {other}, which are not shards of the same conversion; name one data set"
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
    top = _walk(os.fspath(path), found)
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
        betons = " (name .beton shards by a glob: folder/*.beton)" if any(Path(path).glob("*.beton")) else ""
        left_out = f"; {found.left_out()}" if found.other else ""
        known = " ".join(sorted(SUFFIXES))
        raise SourceError(f"{path} has no images in it; known endings: {known}{betons}{left_out}")
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


def _natural(path: str) -> list:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", path)]
