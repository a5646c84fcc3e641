"""The file format of FFCV (`.beton`, version 2) in plain numpy: its layout, and reading it.

A file is: header, one descriptor per field, one metadata row per sample, zeros up to a page boundary, the stored bytes
(no sample crosses a page boundary), and the allocation table (sample, position, size of every stored piece). Numbers
are little-endian. Beside the file, `<file>.npz` keeps what FFCV has no place for: class names, source names and a
checksum per sample. A file without it, as FFCV's own writer makes, reads just as well.

Source: Leclerc et al. 2023, FFCV, and the format as its writer produces it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import logging
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from fastssl.config import printable
from fastssl.loaders import cache, store
from fastssl.loaders.decode import JPEG, DecodeError, Encoded, Places, read_at
from fastssl.loaders.store import StoreError, StoreFile, shown

log = logging.getLogger(__name__)

VERSION = 2
PAGE_SIZE = 8 << 20  # FFCV's default, in bytes

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table_ptr", "<u8")]
)
DESCRIPTOR = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

FLOAT, INT, IMAGE, BYTES, ARRAY, JSON, TENSOR = range(7)  # type_id of a descriptor
_ROW_TYPES = {
    FLOAT: np.dtype("<f8"),
    INT: np.dtype("<i8"),
    IMAGE: np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")]),
    BYTES: np.dtype([("ptr", "<u8"), ("size", "<u8")]),
    ARRAY: np.dtype("<u8"),
    JSON: np.dtype([("ptr", "<u8"), ("size", "<u8")]),
    TENSOR: np.dtype("<u8"),
}
ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("type_length", "<u8")])
WRONG_CHECKSUM = "has a wrong checksum: its bytes are not those that were written"
MODES: tuple[Literal["jpg", "raw"], ...] = ("jpg", "raw")


class BetonError(ValueError):
    """A .beton file cannot be read or written; the message names the file and what is wrong."""


class SideFileError(BetonError):
    """A side file is damaged; its .beton can be read all the same."""


@dataclass(frozen=True)
class Field:
    """One column of a file. `shape` and `dtype` matter to ARRAY and TENSOR fields only."""

    name: str
    type_id: int
    shape: tuple[int, ...] = ()
    dtype: np.dtype | None = None

    @property
    def stored(self) -> bool:
        """Whether samples keep bytes of this field in the data region (a number lives in its metadata row)."""
        return self.type_id not in (FLOAT, INT)


def row_type(fields: Sequence[Field]) -> np.dtype:
    """Type of a metadata row; its columns are f0, f1, ... in the order of the fields."""
    return np.dtype([("", _ROW_TYPES[field.type_id]) for field in fields], align=True)


def pointers(rows: np.ndarray, fields: Sequence[Field], index: int) -> np.ndarray:
    """View of the column that says where the bytes of field `index` begin: uint64 [n]."""
    column = rows[f"f{index}"]
    kind = fields[index].type_id
    return column["data_ptr"] if kind == IMAGE else column["ptr"] if kind in (BYTES, JSON) else column


class PartPlaces(NamedTuple):
    """Where compiled code finds the part maps of some samples.

    Attributes:
        table: int64 [B, 2], file descriptor and first byte; -1 where Python has to say what is wrong.
        shape: of one sample's maps.
        held: what keeps the files open.
    """

    table: np.ndarray
    shape: tuple[int, ...]
    held: Sequence[Any] = ()


class Beton:
    """A .beton file, on a disk or in a store. Reading is safe from many threads, after a fork, and when the file is cut
    short meanwhile.

    Attributes:
        path, size: the file and its length in bytes.
        blocks: how a file in a store is fetched: whole pages; None of a local one.
        fields: its columns.
        rows: metadata, structured [n] (see `row_type`).
        labels: int64 [n], the field named 'label', or else the first int field; -1 where there is none.
        heights, widths: int64 [n], in pixels.

    Raises:
        BetonError: not a .beton file, truncated, or inconsistent.
        StoreError: a store does not give it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path: Path | str = path if store.is_url(path) else Path(path)
        self.blocks: cache.Blocks | None = None
        if store.is_url(path):
            file = StoreFile(str(path))
            try:
                self._open_in_store(file)
            except BetonError:
                if not cache.forget_file(file):
                    raise
                self._open_in_store(file)  # what was in the cache may have been damaged
            return
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115, closed with this object
            data = np.memmap(self._file, np.uint8, "r").view(np.ndarray)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            reason = "it has zero bytes" if isinstance(error, ValueError) else error.strerror
            raise BetonError(f"{self.path} cannot be read: {reason}") from None
        self.size = data.size
        self._read_header(data)
        self._read_columns()

    def _open_in_store(self, file: StoreFile) -> None:
        self.size, tables = file.size, _Tables(file)
        self._read_header(tables)
        self._read_columns()
        self.__dict__["tables_crc32"] = zlib.crc32(tables[self.data_end :], zlib.crc32(tables[: self.tables_end]))
        self.__dict__.pop("side", None)
        self.blocks = cache.Blocks(file, cache.bounds(self.tables_end, self.data_end, self.page_size))
        _ = self.side  # whose checksum of the tables shows whether they came through sound

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def side(self) -> SideFile | None:
        """The side file; None where there is none, or, with a warning, where it is damaged.

        Raises:
            BetonError: it belongs to another file, or shows that this one's tables are damaged.
        """
        try:
            side = SideFile.of(self)
        except SideFileError as error:
            log.warning("%s; classes and samples go by their numbers", error)
            return None
        if side and (fault := side.mismatch(self)):
            raise BetonError(fault)
        return side

    @property
    def classes(self) -> list[str]:
        """Class names; empty where the file has no side file, or no classes. Raises BetonError as `side`."""
        return self.side.classes if self.side else []

    def image(self, i: int) -> Encoded:
        """The stored image of sample `i`.

        Raises:
            DecodeError: the metadata points outside the stored data, or its mode is unknown.
        """
        row = self.rows[f"f{self._image}"][i]
        if row["mode"] >= len(MODES):
            raise DecodeError(f"has the unknown storage mode {row['mode']} in its metadata")
        data = self.stored(i, self._image)
        return Encoded(data, MODES[row["mode"]], int(row["height"]), int(row["width"]))

    def places(self, ids: np.ndarray) -> Places:
        """Where the images of some samples lie; those that `image` refuses are `UNKNOWN`."""
        rows = self.rows[f"f{self._image}"][ids]
        good, size = self._find(rows["data_ptr"])
        file, begin, held = self._opened(rows["data_ptr"], size, good)
        table = np.empty((len(good), 4), np.int64)
        good &= (file >= 0) & (rows["mode"] < len(MODES))
        table[:, 0] = (rows["mode"] + JPEG) * good  # or else UNKNOWN, which is 0
        table[:, 1], table[:, 2], table[:, 3] = file, begin, size
        return Places(table, held=held)

    def part_places(self, ids: np.ndarray) -> PartPlaces | None:
        """Where the part maps of some samples lie; None where there are none."""
        if self._parts is None:
            return None
        shape = self.fields[self._parts].shape
        at = pointers(self.rows, self.fields, self._parts)[ids]
        good, size = self._find(at)
        good &= size == math.prod(shape)
        file, begin, held = self._opened(at, size, good)
        table = np.stack([file, begin], axis=1)
        table[~good | (file < 0)] = -1
        return PartPlaces(table, shape, held)

    def lengths(self) -> np.ndarray:
        """Bytes of each stored image, int64 [n]; 0 where `image` has to say what is wrong."""
        good, size = self._find(self.rows[f"f{self._image}"]["data_ptr"])
        return np.where(good, size, 0).astype(np.int64)

    def block_numbers(self, ids: np.ndarray) -> np.ndarray:
        """The blocks that the images of some samples begin in, int64 [B]; -1 of a local file."""
        if self.blocks is None:
            return np.full(len(ids), -1, np.int64)
        return self.blocks.at(self.rows[f"f{self._image}"]["data_ptr"][ids])

    def forget(self, i: int) -> bool:
        """Has sample `i` fetched again from the store, as what is in the cache may be damaged; no for a local file."""
        if self.blocks is None:
            return False
        for field in range(len(self.fields)):
            if self.fields[field].stored:
                at = pointers(self.rows, self.fields, field)[[i]]
                cache.forget(self.blocks.block(int(self.blocks.at(at)[0])))
        return True

    def _opened(self, begin: np.ndarray, size: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, np.ndarray, list]:
        """The open files that stored bytes lie in, int64 [B]; where in these; and what keeps them open. -1 where `good`
        does not hold, or the bytes lie in no one file."""
        if self.blocks is None:
            return np.full(len(begin), self._file.fileno(), np.int64), begin.astype(np.int64), []
        return self.blocks.places(begin, size, good)

    def _find(self, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether stored bytes begin at these places and lie in the file, bool [B], and how many, uint64 [B]."""
        at = self._ptrs.searchsorted(begin, "right") - 1
        size, end = self._sizes[at], np.uint64(self.data_end)
        return (self._ptrs[at] == begin) & (begin <= end) & (size <= end - begin), size

    def stored(self, i: int, index: int) -> np.ndarray:
        """The bytes that sample `i` keeps for field `index`: uint8 [size], read-only."""
        ptr = pointers(self.rows, self.fields, index)[i]
        if self.fields[index].type_id in (BYTES, JSON) and not self.rows[f"f{index}"]["size"][i]:
            return np.empty(0, np.uint8)
        at = np.searchsorted(self._ptrs, ptr, side="right") - 1
        if at < 0 or self._ptrs[at] != ptr:
            raise DecodeError(f"has a wrong pointer ({ptr}) for field '{self.fields[index].name}'")
        begin, size = int(ptr), int(self._sizes[at])
        if begin + size > self.data_end:
            raise DecodeError(f"ends after the stored data (byte {begin + size} of {self.data_end})")
        if self.blocks is not None:
            return np.frombuffer(self.blocks.read(begin, begin + size), np.uint8)
        return np.frombuffer(read_at(self._file.fileno(), begin, size), np.uint8)

    @property
    def pages(self) -> np.ndarray:
        """The page that each sample's image begins in, int64 [n]."""
        return (pointers(self.rows, self.fields, self._image) // self.page_size).astype(np.int64)

    @property
    def parts_shape(self) -> tuple[int, ...] | None:
        """Shape of the part maps, the first uint8 array field with three dimensions; None without one."""
        return None if self._parts is None else self.fields[self._parts].shape

    def parts(self, i: int) -> np.ndarray | None:
        """Part maps of sample `i`: uint8 [N, h, w], read-only; None where the file has none."""
        if self._parts is None:
            return None
        data = self.stored(i, self._parts)
        shape = self.fields[self._parts].shape
        if data.size != math.prod(shape):
            raise DecodeError(f"has {data.size} bytes of part maps, but shape {shape} was promised")
        return data.reshape(shape)

    def name(self, i: int) -> str:
        """How messages name sample `i`: the file, the index, and the source file where it is known."""
        return printable(f"{store.base(str(self.path))}[{i}] {self.side.name(i) if self.side else ''}".rstrip())

    @cached_property
    def checksums(self) -> bool:
        """Whether `sound` can tell something: there is a side file, and the image is a sample's first field."""
        return self.side is not None and self._image == 0

    def sound(self, i: int, crc32: int) -> bool:
        """Whether sample `i`, whose image bytes have the checksum `crc32`, holds what was written, as far as known."""
        if not self.checksums:
            return True
        try:
            return self.sample_crc32(i, crc32, 1) == cast(SideFile, self.side).crc32[i]
        except DecodeError:
            return False

    def sample_crc32(self, i: int, crc: int = 0, first: int = 0) -> int:
        """Checksum of all that sample `i` holds: its numbers and stored bytes, in the order of the fields; going on
        from that of the fields before `first`."""
        for index, field in enumerate(self.fields[first:], first):
            value = self.stored(i, index) if field.stored else self.rows[f"f{index}"][i].tobytes()
            crc = zlib.crc32(value, crc)
        return crc

    @cached_property
    def tables_crc32(self) -> int:
        """Checksum of everything but the stored data: header, descriptors, metadata rows, allocation table."""
        data = np.memmap(self._file, np.uint8, "r")
        return zlib.crc32(data[self.data_end :], zlib.crc32(data[: self.tables_end]))

    def fingerprint(self) -> str:
        """A short text that changes when the content does: by checksums, and by time too where no side file has any."""
        facts = [str(self.size), str(self.tables_crc32)]
        if self.side:
            facts.append(str(zlib.crc32(np.ascontiguousarray(self.side.crc32))))
        elif self.blocks is not None:
            facts.append(self.blocks.file.etag)
        else:
            facts.append(str(os.fstat(self._file.fileno()).st_mtime_ns))
        return "-".join(facts)

    def _fail(self, what: str) -> BetonError:
        return BetonError(f"{shown(self.path)} {what}")

    def _read_header(self, data: np.ndarray | _Tables) -> None:
        size = self.size
        if size < HEADER.itemsize:
            raise self._fail(f"is no .beton file: {size} bytes are too few for a header")
        header = data[: HEADER.itemsize].view(HEADER)[0]
        version, num_fields, self.page_size, num_samples, self.data_end = (int(value) for value in header)
        if version != VERSION:
            raise self._fail(f"is no .beton file of version {VERSION}: its header says version {version}")
        self.tables_end = HEADER.itemsize + num_fields * DESCRIPTOR.itemsize
        if self.tables_end > size:
            raise self._fail(f"is truncated or has a damaged header: {num_fields} fields do not fit in {size} bytes")
        descriptors = data[HEADER.itemsize : self.tables_end].view(DESCRIPTOR)
        self.fields = [self._read_field(descriptor) for descriptor in descriptors]
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise self._fail(f"has a damaged header: page size {self.page_size} is not a power of two")
        kind = row_type(self.fields)
        begin, self.tables_end = self.tables_end, self.tables_end + num_samples * kind.itemsize
        if self.tables_end > size:
            raise self._fail(
                f"is truncated or has a damaged header: {num_samples} metadata rows do not fit in {size} bytes"
            )
        expected = num_samples * sum(field.stored for field in self.fields)
        if not self.tables_end <= self.data_end <= size or size - self.data_end != expected * ALLOCATION.itemsize:
            raise self._fail(
                f"is truncated or has a damaged header: an allocation table of {expected} entries should run "
                f"from byte {self.data_end} to the end at byte {size}"
            )
        self.rows = data[begin : self.tables_end].view(kind).copy()
        self.allocations = data[self.data_end :].view(ALLOCATION).copy()

    def _read_field(self, descriptor: np.void) -> Field:
        name = descriptor["name"].tobytes().split(b"\0")[0].decode("ascii", "replace")
        kind = int(descriptor["type_id"])
        if kind not in _ROW_TYPES:
            raise self._fail(f"has a field '{name}' of unknown type {kind}")
        if kind not in (ARRAY, TENSOR):
            return Field(name, kind)
        arguments = descriptor["arguments"]
        head = arguments[: ARRAY_ARGUMENTS.itemsize].view(ARRAY_ARGUMENTS)[0]
        text = arguments[ARRAY_ARGUMENTS.itemsize :][: int(head["type_length"])].tobytes()
        try:
            dtype = np.dtype([tuple(item) for item in json.loads(text)])[0]
        except Exception:  # json's and numpy's parsers raise whatever a damaged text makes them
            raise self._fail(f"has a damaged description of the array field '{name}'") from None
        return Field(name, kind, tuple(int(side) for side in head["shape"] if side), dtype)

    def _read_columns(self) -> None:
        def first(match: Callable[[Field], bool]) -> int | None:
            return next((index for index, field in enumerate(self.fields) if match(field)), None)

        image = first(lambda field: field.type_id == IMAGE)
        if image is None:
            raise self._fail(f"has no image field (fields: {', '.join(field.name for field in self.fields) or 'none'})")
        self._image = image
        self._parts = first(lambda f: f.type_id in (ARRAY, TENSOR) and f.dtype == np.uint8 and len(f.shape) == 3)
        label = first(lambda field: field.type_id == INT and field.name == "label")
        label = first(lambda field: field.type_id == INT) if label is None else label
        images = self.rows[f"f{self._image}"]
        self.heights, self.widths = images["height"].astype(np.int64), images["width"].astype(np.int64)
        self.labels = np.full(len(self), -1, np.int64) if label is None else self.rows[f"f{label}"].astype(np.int64)
        order = np.lexsort((self.allocations["size"], self.allocations["ptr"]))
        self._ptrs = np.ascontiguousarray(self.allocations["ptr"][order])
        self._sizes = np.ascontiguousarray(self.allocations["size"][order])


class _Tables:
    """The tables of a .beton in a store, at its beginning and its end, to be cut like an array of its bytes."""

    def __init__(self, file: StoreFile) -> None:
        self.file, self._head = file, cache.kept(file, 0, min(file.size, HEAD))
        self._tail, self._tail_begin = b"", file.size

    def __getitem__(self, places: slice) -> np.ndarray:
        begin, end, _ = places.indices(self.file.size)
        if begin <= len(self._head) < end:
            self._head += cache.kept(self.file, len(self._head), end)
        if end <= len(self._head):
            return np.frombuffer(self._head, np.uint8)[begin:end]
        if begin < self._tail_begin:
            self._tail, self._tail_begin = cache.kept(self.file, begin, self.file.size), begin
        return np.frombuffer(self._tail, np.uint8)[begin - self._tail_begin : end - self._tail_begin]


HEAD = 1 << 20  # bytes of a file in a store that are fetched first: with luck, all metadata rows


@dataclass(frozen=True)
class SideFile:
    """`<file>.beton.npz`: what FFCV's format has no place for.

    Attributes:
        path: the side file.
        classes: class names, in the order of the labels.
        shard: which of how many shards the .beton is, counted from 0.
        size, tables_crc32: of the .beton it belongs to, in bytes and as `Beton.tables_crc32`.
        crc32: uint32 [n], checksum of each sample (see `sample_crc32`).
        conversion: the same number for all shards of one conversion; 0 where it is not known.
    """

    path: Path | str
    classes: list[str]
    shard: tuple[int, int]
    size: int
    tables_crc32: int
    crc32: np.ndarray
    conversion: int = 0

    @staticmethod
    def path_of(path: Path | str) -> Path | str:
        return path.with_name(path.name + ".npz") if isinstance(path, Path) else store.beside(path, ".npz")

    @classmethod
    def of(cls, beton: Beton) -> SideFile | None:
        """The side file of a .beton; None where there is none. It need not be the right one: see `mismatch`.

        A writer that was killed between giving the .beton its name and the side file its own has left the latter under
        a temporary name; it is then taken from there.

        Raises:
            SideFileError: it is damaged.
        """
        path = cls.path_of(beton.path)
        try:
            side = cls._read(path)
            if side and not side.mismatch(beton):
                return side
            fault = None
        except SideFileError as error:
            side, fault = None, error
        for left in path.parent.glob(f"{glob.escape(path.stem)}.*npz{PARTIAL}") if isinstance(path, Path) else ():
            with contextlib.suppress(SideFileError):
                new = cls._read(left)
                if new and not new.mismatch(beton):
                    return new
        if fault:
            raise fault
        return side

    @classmethod
    def _read(cls, path: Path | str) -> SideFile | None:
        try:
            entries = read_arrays(path, "file", "classes", "crc32")
            shard, total, size, tables_crc32, *later = (int(value) for value in entries["file"])
            crc32 = entries["crc32"]
            if crc32.dtype != np.uint32 or crc32.ndim != 1:
                raise ValueError(f"checksums are {crc32.dtype}, {crc32.ndim}-dimensional")
            return cls(path, split_words(entries["classes"]), (shard, total), size, tables_crc32, crc32, *later[:1])
        except FileNotFoundError:
            return None
        except StoreError as error:
            if store.absent(error, str(path)):
                return None
            raise
        except DAMAGE as error:
            raise SideFileError(f"{shown(path)} is damaged ({_words(error)})") from None

    def write(self, path: Path, names: Sequence[str]) -> None:
        """Writes the side file; equal contents give equal bytes."""
        entries = {
            "file": np.array([*self.shard, self.size, self.tables_crc32, self.conversion], np.int64),
            "classes": join_words(self.classes),
            "crc32": self.crc32,
            "names": join_words(names),
        }
        with open(path, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:  # not compressed: libraries differ in the bytes that they make
                for key, value in entries.items():
                    with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w") as entry:  # ZipInfo's date is fixed: 1980
                        np.lib.format.write_array(entry, value, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())

    def mismatch(self, beton: Beton) -> str | None:
        """Why this is not the side file of `beton`; None where it is."""
        if (self.size, len(self.crc32)) != (beton.size, len(beton)):
            return f"{shown(self.path)} belongs to another file than {shown(beton.path)}"
        if self.tables_crc32 != beton.tables_crc32:
            damage = "has a damaged header, metadata or allocation table (their checksum has changed)"
            return f"{shown(beton.path)} {damage}"
        return None

    def name(self, i: int) -> str:
        """Source name of sample `i`, relative to the folder that was converted; empty where it is not known, which is
        warned of once where the side file has become unreadable."""
        try:
            names, ends = self._names
        except SideFileError as error:
            log.warning("%s; samples go by their numbers", error)
            names, ends = self.__dict__["_names"] = np.empty(0, np.uint8), np.empty(0, np.int64)
        if i >= len(ends):
            return ""
        return os.fsdecode(names[ends[i - 1] + 1 if i else 0 : ends[i]].tobytes())

    def check_names(self) -> None:
        """Raises SideFileError unless the source names can be read, one per sample or none at all."""
        _, ends = self._names
        if len(ends) not in (0, len(self.crc32)):
            raise SideFileError(f"{shown(self.path)} has {len(ends)} names for {len(self.crc32)} samples")

    @cached_property
    def _names(self) -> tuple[np.ndarray, np.ndarray]:
        try:
            names = read_arrays(self.path, "names")["names"]
            return names, np.flatnonzero(names == 0)
        except DAMAGE as error:
            raise SideFileError(f"{shown(self.path)} cannot be read any more ({_words(error)})") from None


PARTIAL = ".partial"  # at the end of a name: not whole, or not yet in its place
DAMAGE = (OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zlib.error, zipfile.BadZipFile)


def read_arrays(path: Path | str, *names: str) -> dict[str, np.ndarray]:
    """Arrays of a side file, or of a tar's index; raises one of DAMAGE. It holds them as they are: none takes more
    memory than the file has bytes."""
    if store.is_url(path):
        file = StoreFile(str(path))
        place: Any = io.BytesIO(cache.kept(file, 0, file.size))
    elif not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")
    else:
        place = path
    found = {}
    with zipfile.ZipFile(place) as archive:
        for name in names:
            if archive.getinfo(f"{name}.npy").compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its {name} are compressed")
            with archive.open(f"{name}.npy") as entry:
                found[name] = np.lib.format.read_array(entry, allow_pickle=False)
                if entry.read(1):  # the checksum is compared at the end
                    raise ValueError(f"its {name} are longer than they say")
    return found


def _words(error: BaseException) -> str:
    return printable(str(error).strip()) or type(error).__name__


def join_words(words: Sequence[str]) -> np.ndarray:
    """Words as uint8, each with a zero byte behind it."""
    return np.frombuffer(b"".join(os.fsencode(word) + b"\0" for word in words), np.uint8)


def split_words(data: np.ndarray) -> list[str]:
    """What `join_words` has joined."""
    return [os.fsdecode(word) for word in data.tobytes().split(b"\0")[:-1]]
