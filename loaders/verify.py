"""Reads every sample of .beton files or tars, as a path or a manifest names them, and lists what is wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastssl.config import Checked, NonNegativeInt, printable
from fastssl.loaders import cache, store
from fastssl.loaders.beton import WRONG_CHECKSUM, Beton, BetonError, SideFile, SideFileError, pointers
from fastssl.loaders.decode import DecodeError
from fastssl.loaders.manifest import Entry, Manifest, difference, read_manifest
from fastssl.loaders.pool import WorkerDied, cores, ordered
from fastssl.loaders.sources import BetonSource, SourceError, files_of, is_manifest, is_tar
from fastssl.loaders.tar import TarSource, open_tars
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
    """A .beton file, a tar in WebDataset's layout, a glob or brace list of either, or a manifest (.json)."""
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
    """Verifies .beton files and tars: header, positions, overlaps, checksums, and that every image decodes to its size;
    of a manifest also that its shards are all there, and the files that it means.

    Damage of any kind ends up in the report, never in an exception.

    Raises:
        VerifyError: the path names no file.
        SourceError: the manifest is none.
    """
    begin = time.perf_counter()
    manifest = read_manifest(options.path) if is_manifest(options.path) else None
    try:
        paths = [manifest.file(e) for e in manifest.shards] if manifest else files_of(store.plain(options.path))
    except SourceError:
        paths = []
    if not paths or any(os.path.isdir(path) for path in paths):
        raise VerifyError(f"{store.shown(options.path)} names no .beton file, tar or manifest")
    report = Report(files=len(paths))
    for k, path in enumerate(paths):
        _verify_file(path, options, report, manifest, manifest.shards[k] if manifest else None)
    report.seconds = round(time.perf_counter() - begin, 3)
    return report


def _verify_file(
    path: str, options: VerifyOptions, report: Report, manifest: Manifest | None, entry: Entry | None
) -> None:
    shown = store.shown(path)

    def note(index: int, reason: str, where: list[Problem] = report.problems) -> None:
        name = names(index) if index != WHOLE_FILE else ""
        where.append(Problem(shown, index, name, reason))

    def names(index: int) -> str:
        if tar is not None:
            return tar.index.name(index)
        return side.name(index) if side is not None and index < len(side.crc32) else ""

    side, tar, checksums = None, None, None
    try:
        if is_tar(path):
            (tar,) = open_tars([path], manifest.classes if manifest else [])
        else:
            beton = Beton(path)
        if manifest and entry and (fault := difference(manifest, entry, tar or BetonSource(path))):
            note(WHOLE_FILE, f"{fault} ({store.shown(manifest.path)})")
    except (BetonError, SourceError, store.StoreError) as error:
        if isinstance(error, store.StoreError) and not error.missing:
            raise  # the store is away: that says nothing about the data
        return note(WHOLE_FILE, str(error).removeprefix(shown).strip())
    if tar is not None:
        report.samples += len(tar)
        return _verify_samples(path, len(tar), [], None, options, note, report)
    report.samples += len(beton)
    try:
        side = SideFile.of(beton)
        if side:
            side.check_names()
    except SideFileError as error:
        note(WHOLE_FILE, f"has a side file that cannot be used: {error}")
    if side is None:
        report.unchecked.append(shown)
    elif mismatch := side.mismatch(beton):
        note(WHOLE_FILE, mismatch.removeprefix(shown).strip())
    checksums = side.crc32 if side is not None and len(side.crc32) == len(beton) else None
    _verify_samples(path, len(beton), list(_misplaced(beton)), checksums, options, note, report)


def _verify_samples(
    path: str,
    count: int,
    found: list[tuple[int, str]],
    checksums: np.ndarray | None,
    options: VerifyOptions,
    note: Callable[..., None],
    report: Report,
) -> None:
    """Has workers read all samples of a file; notes what is wrong with them, and what was `found` already."""
    warned: list[tuple[int, str]] = []
    chunks = range(-(-count // CHUNK))
    workers = max(1, min(options.workers or cores(), len(chunks)))
    results = ordered(_verify_chunk, chunks, workers, _start, (path, checksums, options.decode))
    try:
        with progress_bar(count, store.base(path)) as bar:
            for done, faults, warnings in results:
                found += faults
                warned += warnings
                bar.update(done)
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

_shard: Beton | TarSource
_checksums: np.ndarray | None
_decode: bool


def _start(path: str, checksums: np.ndarray | None, decode_too: bool) -> None:
    global _shard, _checksums, _decode
    _shard, _checksums, _decode = open_tars([path], [])[0] if is_tar(path) else Beton(path), checksums, decode_too
    if _shard.blocks is not None:
        cache.use("none")  # what lies in the store is meant


def _verify_chunk(chunk: int) -> tuple[int, list[tuple[int, str]], list[tuple[int, str]]]:
    ids = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(_shard)))
    faults, warnings = [], []
    if _shard.blocks is not None:  # whole blocks, rather than a request for each sample
        cache.hold([_shard.blocks.block(k) for k in np.unique(_shard.block_numbers(np.array(ids))).tolist()])
    for i in ids:
        try:
            if warning := _check(i):
                warnings.append((i, f"({warning})"))
        except store.StoreError:
            raise
        except DecodeError as error:
            faults.append((i, str(error)))
        except Exception as error:  # damaged data may break any assumption; the report names the sample all the same
            faults.append((i, f"cannot be read ({type(error).__name__}: {error})"))
    return len(ids), faults, warnings


def _check(i: int) -> str:
    """What libjpeg warns of in sample `i`; raises what is wrong with it."""
    if isinstance(_shard, TarSource):  # which compares its checksums itself
        image = _shard.read(i)
        return decode(image).warning if _decode else ""
    if _checksums is not None and _shard.sample_crc32(i) != _checksums[i]:
        raise DecodeError(WRONG_CHECKSUM)
    image = _shard.image(i)
    warning = decode(image).warning if _decode else ""
    _shard.parts(i)
    return warning
