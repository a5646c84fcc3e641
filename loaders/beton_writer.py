"""Writing .beton files (see `fastssl.loaders.beton`): whole or not at all, in bounded memory, in plain numpy."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.loaders.beton import (
    ALLOCATION,
    ARRAY,
    ARRAY_ARGUMENTS,
    BYTES,
    DESCRIPTOR,
    HEADER,
    IMAGE,
    JSON,
    MODES,
    PAGE_SIZE,
    PARTIAL,
    TENSOR,
    VERSION,
    Beton,
    BetonError,
    Field,
    SideFile,
    pointers,
    row_type,
)
from fastssl.loaders.decode import Encoded

MAX_PIECE = 1 << 31  # the largest power of two that the header's page_size holds, in bytes
CLOSED = -1  # in place of a file's number

Sample = Sequence[Encoded | float | bytes | np.ndarray]
"""One value per field: Encoded (mode jpg or raw) for IMAGE, a number for FLOAT and INT, bytes for BYTES and JSON, an
array of the field's shape and dtype for ARRAY."""


class Block:
    """Samples on their way into a file.

    Attributes:
        rows: metadata, structured [k]; the pointers are set by `place`.
        sizes: uint64 [k, stored fields], bytes stored per sample and field.
        crc32: uint32 [k], as `Beton.sample_crc32`.
    """

    def __init__(self, fields: Sequence[Field], samples: Sequence[Sample]) -> None:
        self.rows = np.zeros(len(samples), row_type(fields))
        self.sizes = np.zeros((len(samples), sum(field.stored for field in fields)), np.uint64)
        self.crc32 = np.zeros(len(samples), np.uint32)
        self._pointers = [pointers(self.rows, fields, index) for index, field in enumerate(fields) if field.stored]
        self._bytes: list[list[np.ndarray]] = []
        for k, sample in enumerate(samples):
            stored, crc = [], 0
            for index, (field, value) in enumerate(zip(fields, sample, strict=True)):
                data = _fill(self.rows[f"f{index}"][k : k + 1], field, value)
                crc = zlib.crc32(data, crc)
                if field.stored:
                    stored.append(data)
            self._bytes.append(stored)
            self.sizes[k] = [data.size for data in stored]
            self.crc32[k] = crc

    def place(self, begin: int) -> int:
        """Gives each sample its position in the file, from byte `begin` on; returns the end of the last one."""
        for k, sizes in enumerate(self.sizes.tolist()):
            for pointer, size in zip(self._pointers, sizes, strict=True):
                page = page_for(size)
                if begin % page + size > page:
                    begin += page - begin % page
                pointer[k] = begin
                begin += max(size, 1)  # FFCV finds a piece by its position, so no two may share one
        return begin

    def write(self, file: int) -> None:
        """Writes the bytes of all samples at their positions."""
        for k, stored in enumerate(self._bytes):
            for pointer, data in zip(self._pointers, stored, strict=True):
                write_at(file, data, int(pointer[k]))


class BetonWriter:
    """Writes a .beton under a temporary name of its own, `<path>.<8 hex digits>.partial`, and gives it its name when
    it is whole.

    Use as a context manager: `append` samples (or `add` blocks that were placed and written elsewhere), then `finish`.
    Leaving the context without `finish` removes what was written; a killed process leaves only the temporary file,
    which the next writer of the same path removes. Several may write the same path at once, on several machines too:
    none sees the others' bytes, and what the last one to finish wrote stands there in the end. (A writer that lives is
    known by a lock on its file; where the file system has no locks, the files of killed ones stay.)

    Args:
        path: the file to make; an existing one is replaced when the new one is whole.
        fields: its columns; at least one IMAGE field, else `Beton` will not open it.
        capacity: at most so many samples.

    Attributes:
        partial: the temporary file.
        restarted: whether earlier, unfinished attempts were found (and removed).
        begin: position of the first sample's bytes.

    Raises:
        BetonError: the folder cannot be written.
    """

    def __init__(self, path: str | Path, fields: Sequence[Field], capacity: int) -> None:
        self.path, self.fields = Path(path), list(fields)
        self._descriptors = np.concatenate([_descriptor(field) for field in self.fields])
        tables = HEADER.itemsize + self._descriptors.nbytes + capacity * row_type(self.fields).itemsize
        self.begin = -(-tables // PAGE_SIZE) * PAGE_SIZE
        self._end, self._capacity = self.begin, capacity
        self._blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.restarted = _remove_left(self.path)
        self.partial, self._file = _open_new(self.path)

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file != CLOSED:
            self.partial.unlink(missing_ok=True)
            os.close(self._file)
            self._file = CLOSED

    def append(self, *sample: Encoded | float | bytes | np.ndarray) -> None:
        """Writes one sample, one value per field."""
        self.write(Block(self.fields, [sample]))

    def write(self, block: Block) -> None:
        """Writes the next samples."""
        end = block.place(self._end)
        block.write(self._file)
        self.add(block.rows, block.sizes, block.crc32, end)

    def add(self, rows: np.ndarray, sizes: np.ndarray, crc32: np.ndarray, end: int) -> None:
        """Takes over the next samples, whose bytes are in the temporary file already, the last one up to `end`."""
        self._blocks.append((rows, sizes, crc32))
        self._end = end

    def finish(
        self,
        classes: Sequence[str] = (),
        names: Sequence[str] = (),
        shard: tuple[int, int] = (0, 1),
        conversion: int = 0,
    ) -> None:
        """Writes the tables and the side file, waits for the disk, and gives the files their names.

        Args:
            classes: class names, in the order of the labels.
            names: source name of each sample.
            shard: which of how many shards this file is, counted from 0.
            conversion: a number that all shards of a conversion have in common.
        """
        empty = Block(self.fields, [])
        blocks = [(empty.rows, empty.sizes, empty.crc32), *self._blocks]
        sizes, crc32 = (np.concatenate([block[k] for block in blocks]) for k in (1, 2))
        # joined as bytes: numpy's concatenate leaves the padding between columns undefined
        rows = np.frombuffer(b"".join(block[0].tobytes() for block in blocks), row_type(self.fields))
        if len(rows) > self._capacity:
            raise BetonError(f"{self.path}: {len(rows)} samples were added, but capacity is {self._capacity}")
        allocations = np.zeros(sizes.shape, ALLOCATION)
        allocations["sample_id"] = np.arange(len(rows))[:, None]
        allocations["size"] = sizes
        stored = [index for index, field in enumerate(self.fields) if field.stored]
        for column, index in enumerate(stored):
            allocations["ptr"][:, column] = pointers(rows, self.fields, index)
        page = page_for(int(sizes.max(initial=0)))
        header = np.array([(VERSION, len(self.fields), page, len(rows), self._end)], HEADER)
        head, tail = header.tobytes() + self._descriptors.tobytes() + rows.tobytes(), allocations.tobytes()
        os.ftruncate(self._file, self._end)  # reaches this far even where nothing was stored
        write_at(self._file, head, 0)
        write_at(self._file, tail, self._end)
        os.fsync(self._file)

        side_path, side_mine = Path(SideFile.path_of(self.path)), _side_of(self.partial)
        crc_tables, size = zlib.crc32(tail, zlib.crc32(head)), self._end + len(tail)
        side = SideFile(side_path, list(classes), shard, size, crc_tables, crc32, conversion)
        try:
            side.write(side_mine, names)
            _sync_folder(self.path.parent)
            os.replace(self.partial, self.path)
        except BaseException:
            if self.partial.exists():  # else the .beton has its name
                side_mine.unlink(missing_ok=True)
            raise
        # From here on the new pair counts: a reader that finds no side file, or the old one, takes this one.
        _sync_folder(self.path.parent)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file), os.stat(self.path)):  # else another writer's pair counts
                os.replace(side_mine, side_path)
        _sync_folder(self.path.parent)
        os.close(self._file)
        self._file = CLOSED
        _remove_left(self.path)  # of those whose last processes were still ending when this one began


def page_for(size: int) -> int:
    """The page, in bytes, that a piece of `size` bytes must not cross: PAGE_SIZE, or the next power of two above."""
    if size > MAX_PIECE:
        raise BetonError(f"a sample of {size} bytes does not fit in a .beton page (at most {MAX_PIECE} bytes)")
    return max(PAGE_SIZE, 1 << max(size - 1, 0).bit_length())


def write_at(file: int, data: bytes | np.ndarray, position: int) -> None:
    """Writes all of `data` at a position of an open file."""
    view = memoryview(data).cast("B")
    while len(view):
        written = os.pwrite(file, view, position)
        view, position = view[written:], position + written


def _fill(row: np.ndarray, field: Field, value: Any) -> np.ndarray:
    """Fills a field's metadata (a view of one row) but for the pointer; returns the bytes that stand for the value
    (of the kind that `Sample` says for the field's type)."""
    if field.type_id == IMAGE:
        row["mode"], row["height"], row["width"] = MODES.index(value.mode), value.height, value.width
        return value.data
    if field.type_id in (BYTES, JSON):
        data = np.frombuffer(value, np.uint8)
        row["size"] = data.size
        return data
    if field.type_id in (ARRAY, TENSOR):
        if value.shape != field.shape or value.dtype != field.dtype:
            raise BetonError(f"field '{field.name}' takes {field.dtype} {field.shape}, not {value.dtype} {value.shape}")
        return np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    row[:] = value
    return np.frombuffer(row.tobytes(), np.uint8)


def _descriptor(field: Field) -> np.ndarray:
    descriptor = np.zeros(1, DESCRIPTOR)
    name = np.frombuffer(field.name.encode("ascii"), np.uint8)
    if not 1 <= name.size <= 16:
        raise BetonError(f"field name '{field.name}' must have 1 to 16 ASCII characters")
    descriptor["type_id"] = field.type_id
    descriptor["name"][0, : name.size] = name
    if field.type_id in (ARRAY, TENSOR):
        text = json.dumps(np.dtype(field.dtype).descr).encode("ascii")
        head = np.zeros(1, ARRAY_ARGUMENTS)
        head["shape"][0, : len(field.shape)] = field.shape
        head["type_length"] = len(text)
        arguments = head.tobytes() + text
        descriptor["arguments"][0, : len(arguments)] = np.frombuffer(arguments, np.uint8)
    return descriptor


def _open_new(path: Path) -> tuple[Path, int]:
    """A new temporary file for `path`, locked: its name, and the open file."""
    while True:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise BetonError(f"{path} cannot be written: {error.strerror}") from None
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if partial.exists():
            return partial, file
        os.close(file)  # another writer found it before it was locked, and removed it


def _remove_left(path: Path) -> bool:
    """Removes the temporary files that killed writers of `path` have left; returns whether there were any. A side file
    that is `path`'s stays."""
    found, name = False, re.compile(rf"{re.escape(path.name)}(\.[0-9a-f]{{8}})?(\.npz)?{re.escape(PARTIAL)}")
    with contextlib.suppress(OSError):
        names = [name.fullmatch(other) for other in os.listdir(path.parent)]
        for left in [path.with_name(match[0]) for match in names if match and not match[2]]:
            with contextlib.suppress(OSError), open(left, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where its writer lives, or nothing is known
                left.unlink()
                _side_of(left).unlink(missing_ok=True)
                found = True
        sides = [path.with_name(match[0]) for match in names if match and match[2]]
        sides = [side for side in sides if not side.with_name(side.name.replace(f".npz{PARTIAL}", PARTIAL)).exists()]
        counts = None
        with contextlib.suppress(BetonError):
            counts = Beton(path).side if sides else None
        for side in sides:
            if counts is None or counts.path != side:
                side.unlink(missing_ok=True)
    return found


def _side_of(partial: Path) -> Path:
    """The temporary name of the side file that belongs to a temporary .beton."""
    return partial.with_name(partial.name.removesuffix(PARTIAL) + ".npz" + PARTIAL)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems cannot
        os.fsync(file)
    os.close(file)
