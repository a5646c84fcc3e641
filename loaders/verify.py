"""Reads every sample of a .beton file, or of a glob of shards, and lists what is wrong."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastssl.config import Checked, NonNegativeInt, printable
from fastssl.loaders.beton import WRONG_CHECKSUM, Beton, BetonError, SideFile, SideFileError, pointers
from fastssl.loaders.decode import DecodeError
from fastssl.loaders.pool import WorkerDied, cores, ordered
from fastssl.loaders.window_decoder import decode
from fastssl.progress import progress_bar

CHUNK = 64  # samples per task of a worker
LISTED = 100  # problems that a summary lists
WHOLE_FILE = -1  # index of a problem that concerns no single sample


class VerifyError(ValueError):
    """There is nothing to verify."""


@dataclass
class VerifyOptions(Checked):
    """What to verify, and how thoroughly."""

    path: str = ""
    """A .beton file, or a glob of shards ('train-*.beton')."""
    workers: NonNegativeInt = 0
    """Processes. 0: one per usable core."""
    decode: bool = True
    """Decode every image. False: positions and checksums only."""


@dataclass(frozen=True)
class Problem:
    """Something wrong: file, sample index (WHOLE_FILE: the file as a whole), source name if known, and the reason."""

    file: str
    index: int
    source: str
    reason: str

    def __str__(self) -> str:
        where = self.file if self.index == WHOLE_FILE else f"{self.file}[{self.index}] {self.source}".rstrip()
        return f"{printable(where)} {self.reason}"


@dataclass
class Report:
    """What a verification found.

    Attributes:
        files, samples: how many were read.
        problems: what is wrong, in the order of the files and samples; training calls the same samples bad.
        warned: JPEGs that libjpeg decodes with a warning. They are trained on as they are; pixels may be missing.
        unchecked: files without checksums, because FFCV's own writer made them or the side file is missing.
        seconds: wall-clock time.
    """

    files: int = 0
    samples: int = 0
    problems: list[Problem] = field(default_factory=list)
    warned: list[Problem] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        lists = {key: [vars(problem) for problem in getattr(self, key)] for key in ("problems", "warned")}
        return {**vars(self), **lists, "ok": self.ok}

    def table(self) -> str:
        found = f"{len(self.problems)} problem{'s' * (len(self.problems) != 1)}" if self.problems else "all good"
        lines = [f"{self.samples} samples in {self.files} file{'s' * (self.files != 1)}: {found}; {self.seconds:.1f} s"]
        lines += _listing(self.problems)
        if self.warned:
            lines += [f"{len(self.warned)} decode with a warning, as PIL shows them (pixels may be missing):"]
            lines += _listing(self.warned)
        for name in map(printable, self.unchecked):
            lines += [f"  {name} has no checksums ({name}.npz is missing or damaged): damaged pixels may pass"]
        return "\n".join(lines)


def _listing(found: list[Problem]) -> list[str]:
    more = [f"  and {len(found) - LISTED} more"] if len(found) > LISTED else []
    return [*(f"  {problem}" for problem in found[:LISTED]), *more]


def verify(options: VerifyOptions) -> Report:
    """Verifies .beton files: header, positions, overlaps, checksums, and that every image decodes to its size.

    Damage of any kind ends up in the report, never in an exception.

    Raises:
        VerifyError: the path names no file.
    """
    begin = time.perf_counter()
    if not os.path.exists(options.path) and glob.has_magic(options.path):
        paths = sorted(glob.glob(options.path))
    else:
        paths = [options.path] if os.path.isfile(options.path) else []
    if not paths:
        raise VerifyError(f"{options.path} names no .beton file")
    report = Report(files=len(paths))
    for path in paths:
        _verify_file(path, options, report)
    report.seconds = round(time.perf_counter() - begin, 3)
    return report


def _verify_file(path: str, options: VerifyOptions, report: Report) -> None:
    def note(index: int, reason: str, where: list[Problem] = report.problems) -> None:
        name = side.name(index) if side is not None and 0 <= index < len(side.crc32) else ""
        where.append(Problem(path, index, name, reason))

    side = None
    try:
        beton = Beton(path)
    except BetonError as error:
        return note(WHOLE_FILE, str(error).removeprefix(path).strip())
    report.samples += len(beton)
    try:
        side = SideFile.of(beton)
        if side:
            side.check_names()
    except SideFileError as error:
        note(WHOLE_FILE, f"has a side file that cannot be used: {error}")
    if side is None:
        report.unchecked.append(path)
    elif fault := side.mismatch(beton):
        note(WHOLE_FILE, fault.removeprefix(path).strip())
    checksums = side.crc32 if side is not None and len(side.crc32) == len(beton) else None

    found, warned = list(_misplaced(beton)), []
    chunks = range(-(-len(beton) // CHUNK))
    workers = max(1, min(options.workers or cores(), len(chunks)))
    results = ordered(_verify_chunk, chunks, workers, _start, (path, checksums, options.decode))
    try:
        with progress_bar(len(beton), os.path.basename(path)) as bar:
            for count, faults, warnings in results:
                found += faults
                warned += warnings
                bar.update(count)
    except WorkerDied as error:
        note(WHOLE_FILE, f"could not be read to the end: {error}")
    finally:
        results.close()
    for index, reason in sorted(found, key=lambda item: item[0]):
        note(index, reason)
    for index, reason in warned:
        note(index, reason, report.warned)


def _misplaced(beton: Beton) -> Iterator[tuple[int, str]]:
    """Pieces of samples that lie outside the data, overlap, cross a page, or belong to another sample."""
    table = beton.allocations[beton.allocations["size"] > 0]
    ids, begins, sizes = (table[key].astype(np.int64) for key in ("sample_id", "ptr", "size"))
    ends = begins + sizes
    outside = (begins < beton.tables_end) | (ends < begins) | (ends > beton.data_end)
    for i in ids[outside]:
        yield int(i), "has stored bytes outside the data region"
    ids, begins, ends = ids[~outside], begins[~outside], ends[~outside]
    for i in ids[begins // beton.page_size != (ends - 1) // beton.page_size]:
        yield int(i), f"has stored bytes that cross the border of a page ({beton.page_size} bytes)"
    order = np.argsort(begins, kind="stable")
    ids, begins, ends = ids[order], begins[order], ends[order]
    for i in ids[1:][np.maximum.accumulate(ends)[:-1] > begins[1:]]:
        yield int(i), "has stored bytes that overlap those of another sample"
    for index, column in enumerate(beton.fields):
        if column.stored and len(begins):
            pointer = pointers(beton.rows, beton.fields, index).astype(np.int64)
            at = np.minimum(np.searchsorted(begins, pointer), len(begins) - 1)
            for i in np.flatnonzero((begins[at] == pointer) & (ids[at] != np.arange(len(beton)))):
                yield int(i), f"points at the bytes of sample {ids[at[i]]} (field '{column.name}')"


# -- in the workers --------------------------------------------------------------------------------------------------

_beton: Beton
_checksums: np.ndarray | None
_decode: bool


def _start(path: str, checksums: np.ndarray | None, decode_too: bool) -> None:
    global _beton, _checksums, _decode
    _beton, _checksums, _decode = Beton(path), checksums, decode_too


def _verify_chunk(chunk: int) -> tuple[int, list[tuple[int, str]], list[tuple[int, str]]]:
    ids = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(_beton)))
    faults, warnings = [], []
    for i in ids:
        try:
            if warning := _check(i):
                warnings.append((i, f"({warning})"))
        except DecodeError as error:
            faults.append((i, str(error)))
        except Exception as error:  # damaged data may break any assumption; the report names the sample all the same
            faults.append((i, f"cannot be read ({type(error).__name__}: {error})"))
    return len(ids), faults, warnings


def _check(i: int) -> str:
    """What libjpeg warns of in sample `i`; raises what is wrong with it."""
    if _checksums is not None and _beton.sample_crc32(i) != _checksums[i]:
        raise DecodeError(WRONG_CHECKSUM)
    image = _beton.image(i)
    warning = decode(image).warning if _decode else ""
    _beton.parts(i)
    return warning
