"""A manifest: a JSON file that names a data set's shards, with what tells each from another file, and its classes.

By it a data set is opened whose files cannot be listed (https), changed (shards appended and dropped), and known to be
whole. `fastssl convert` writes `x.beton.json` beside `x.beton`; of shards, whoever finds all of a conversion there
writes `<what their names begin with>.shards.json`.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import glob
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from fastssl.config import Checked, printable
from fastssl.loaders import store
from fastssl.loaders.beton import BetonError
from fastssl.loaders.sources import (
    BetonSource,
    Shards,
    Source,
    SourceError,
    check_alike,
    check_complete,
    files_of,
    is_manifest,
    is_tar,
    named,
    open_betons,
)
from fastssl.loaders.tar import TarSource, open_tars

log = logging.getLogger(__name__)

FORMAT = "fastssl manifest 1"
LISTED = 100  # shards that a table lists
ENDING = ".json"


class ManifestError(SourceError):
    """A manifest cannot be read, made or changed; the message names it and what is wrong."""


@dataclass(frozen=True)
class Entry:
    """One shard.

    Attributes:
        name: where it lies, relative to the manifest.
        images, bytes: how many.
        checksum: of a .beton its tables' and its side file's checksums (nothing behind the dash: it has none); of a tar
            that of its index, which has every image's.
        conversion: a number that all shards of one conversion have in common; 0: not known.
    """

    name: str
    images: int
    bytes: int
    checksum: str
    conversion: int = 0

    def fault(self, found: Entry) -> str:
        """How a file differs from this shard, as the end of a sentence; empty where it does not."""
        tables, _, side = self.checksum.partition("-")
        tables_found, _, side_found = found.checksum.partition("-")
        if self.bytes != found.bytes:
            return f"has {found.bytes} bytes, but {self.bytes} in the manifest"
        if self.images != found.images:
            return f"has {found.images} images, but {self.images} in the manifest"
        if tables != tables_found or (side and side_found and side != side_found):  # a side file may go
            return f"has the checksum {found.checksum}, but {self.checksum} in the manifest: it is another file"
        return ""


@dataclass(frozen=True)
class Manifest:
    """A data set by its shards.

    Attributes:
        path: the manifest's file.
        kind: what the shards are.
        classes: class names of all shards; may be empty.
        parts: shape of the part maps; empty where there are none.
        shards: in their order.
    """

    path: str
    kind: Literal["beton", "tar"]
    classes: list[str]
    parts: list[int]
    shards: list[Entry]

    def file(self, entry: Entry) -> str:
        """Path or URL of a shard."""
        return store.join(store.folder(self.path), entry.name)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "path": store.shown(self.path), "shards": [vars(entry) for entry in self.shards]}

    def table(self) -> str:
        images, size = (sum(getattr(entry, key) for entry in self.shards) for key in ("images", "bytes"))
        many = "s" * (len(self.shards) != 1)
        lines = [
            f"{store.shown(self.path)}: {images} images in {len(self.classes) or 'no'} classes, "
            f"{len(self.shards)} {self.kind} shard{many}, {size / 1e6:.1f} MB"
            + (f", part maps {'x'.join(map(str, self.parts))}" if self.parts else "")
        ]
        width = max(len(printable(entry.name)) for entry in self.shards)
        lines += [
            f"  {printable(entry.name):<{width}}  {entry.images} images  {entry.bytes / 1e6:.1f} MB  {entry.checksum}"
            for entry in self.shards[:LISTED]
        ]
        return "\n".join([*lines, *([f"  and {len(self.shards) - LISTED} more"] if len(self.shards) > LISTED else [])])

    def write(self) -> None:
        """Writes the file, whole or not at all; equal contents give equal bytes."""
        head = {"format": FORMAT, "kind": self.kind, "classes": self.classes, "parts": self.parts}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        shards = ",\n  ".join(json.dumps(vars(entry)) for entry in self.shards)
        text = "\n".join(["{", *lines, ' "shards": [', f"  {shards}", " ]", "}", ""])
        try:
            store.write_bytes(self.path, text.encode())
        except OSError as error:
            raise ManifestError(f"{store.shown(self.path)} cannot be written: {error.strerror or error}") from None


def read_manifest(path: str) -> Manifest:
    """Reads a manifest; its shards are not looked at.

    Raises:
        ManifestError: it is not there, or is none.
    """
    shown = store.shown(path)
    try:
        data = store.read_bytes(path)
    except OSError as error:
        raise ManifestError(f"{shown} cannot be read: {error.strerror or error}") from None
    try:
        values = json.loads(data)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ManifestError(f'{shown} is no manifest of a data set: it lacks "format": "{FORMAT}"')
        shards = [Entry(**entry) for entry in values.pop("shards")]
        found = Manifest(path, **values, shards=shards)
        whole = [number for e in shards for number in (e.images, e.bytes, e.conversion)] + found.parts
        words = [word for e in shards for word in (e.name, e.checksum)] + found.classes
        if found.kind not in ("beton", "tar") or not shards:
            raise ValueError("no shards of a known kind")
        if any(type(number) is not int or number < 0 for number in whole) or not all(type(w) is str for w in words):
            raise ValueError("a value of the wrong type")
    except ManifestError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{shown} is a damaged manifest ({printable(str(error))})") from None
    for entry in shards:
        if not entry.name or store.is_url(entry.name) or entry.name.startswith(("/", "file:")) or "\0" in entry.name:
            raise ManifestError(f"{shown} names the shard '{printable(entry.name)}', which is not relative to it")
    return found


def open_manifest(path: str) -> Source:
    """The data set that a manifest names, every shard compared with what the manifest says of it.

    Raises:
        SourceError: the manifest is none; a shard is missing or another file.
    """
    manifest = read_manifest(path)
    files = [manifest.file(entry) for entry in manifest.shards]
    shards = _open(files, manifest.kind, manifest.classes)
    for entry, shard in zip(manifest.shards, shards, strict=True):
        if fault := difference(manifest, entry, shard):
            raise ManifestError(f"{store.shown(path)}: {store.shown(shard.path)} {fault}")
    source = Shards(path, shards, manifest.classes)
    return named([shard for shard in shards if isinstance(shard, BetonSource)], source)


def difference(manifest: Manifest, entry: Entry, shard: BetonSource | TarSource) -> str:
    """What is wrong with the file of a manifest's shard, as the end of a sentence; empty: nothing."""
    if isinstance(shard, BetonSource):
        if shard.beton.side and shard.classes != manifest.classes:
            return "has other classes than the manifest"
        if list(shard.beton.parts_shape or ()) != manifest.parts:
            return "has other part maps than the manifest"
    return entry.fault(_entry(entry.name, shard))


def _entry(name: str, shard: BetonSource | TarSource) -> Entry:
    if isinstance(shard, TarSource):
        return Entry(name, len(shard), shard.size, shard.index.checksum())
    beton, side = shard.beton, shard.beton.side
    checksums = f"{beton.tables_crc32:08x}-{f'{zlib.crc32(np.ascontiguousarray(side.crc32)):08x}' if side else ''}"
    return Entry(name, len(shard), beton.size, checksums, side.conversion if side else 0)


def _open(files: Sequence[str], kind: str, classes: list[str] | None) -> Sequence[BetonSource | TarSource]:
    try:
        return open_tars(files, classes) if kind == "tar" else open_betons(files)
    except BetonError as error:
        raise ManifestError(str(error)) from None


# -- the command -------------------------------------------------------------------------------------------------------


@dataclass
class MakeOptions(Checked):
    """Which shards a new manifest names."""

    manifest: str = ""
    """The file to write; it must end in .json."""
    shards: list[str] = field(default_factory=list)
    """.beton files, or tars in WebDataset's layout; globs and brace lists ('train-{000..015}.tar') are allowed. Tars
    take their class names from a classes.txt beside the first one."""
    overwrite: bool = False
    """Replace the manifest if it exists. False: refuse."""


@dataclass
class ChangeOptions(Checked):
    """Which shards to append to a manifest, or to drop from it."""

    manifest: str = ""
    """The manifest."""
    shards: list[str] = field(default_factory=list)
    """To append: files as for 'make'. To drop: names as 'show' lists them; patterns ('train-00*') are allowed."""


@dataclass
class ShowOptions(Checked):
    """Which manifest to show."""

    manifest: str = ""
    """The manifest."""


def make(options: MakeOptions) -> Manifest:
    """Write a manifest of existing shards. Warns where some of a conversion are missing, or are of two divisions.

    Raises:
        SourceError: a shard cannot be read, shards do not belong together, or the manifest exists.
    """
    if not is_manifest(options.manifest):
        raise ManifestError(f"{store.shown(options.manifest)} must end in {ENDING}")
    if not options.overwrite and store.exists(options.manifest):
        raise ManifestError(f"{store.shown(options.manifest)} exists already; --overwrite replaces it")
    files = _files(options.shards)
    kind: Literal["beton", "tar"] = "tar" if is_tar(files[0]) else "beton"
    shards = _open(files, kind, None)
    betons = [shard for shard in shards if isinstance(shard, BetonSource)]
    classes = check_alike(options.manifest, betons) if betons else shards[0].classes
    parts = list(betons[0].beton.parts_shape or ()) if betons else []
    manifest = _with(Manifest(options.manifest, kind, classes, parts, []), files, shards)
    manifest.write()
    for conversion in {entry.conversion for entry in manifest.shards} - {0}:
        try:
            check_complete(
                store.shown(options.manifest),
                [shard for shard in betons if shard.beton.side and shard.beton.side.conversion == conversion],
            )
        except SourceError as error:
            log.warning("%s", error)
    return manifest


def add(options: ChangeOptions) -> Manifest:
    """Append shards to a manifest: of the same kind, with the same classes and shape of part maps.

    Raises:
        SourceError: a shard cannot be read, is there already, or does not belong there.
    """
    with _alone(options.manifest) as manifest:
        files = _files(options.shards)
        if is_tar(files[0]) != (manifest.kind == "tar"):
            raise ManifestError(
                f"{store.shown(manifest.path)} names {manifest.kind} shards, not {store.shown(files[0])}"
            )
        manifest = _with(manifest, files, _open(files, manifest.kind, manifest.classes))
        manifest.write()
    return manifest


def drop(options: ChangeOptions) -> Manifest:
    """Drop shards from a manifest; the order of the others stays, and no file is deleted.

    Raises:
        SourceError: it names no such shard, or would have none left.
    """
    with _alone(options.manifest) as manifest:
        left = manifest.shards
        for name in options.shards:
            kept = [e for e in left if not fnmatch.fnmatchcase(e.name, name) and name not in (e.name, manifest.file(e))]
            if len(kept) == len(left):
                raise ManifestError(f"{store.shown(manifest.path)} has no shard {store.shown(name)}")
            left = kept
        if not left:
            raise ManifestError(f"{store.shown(manifest.path)} would have no shards left")
        manifest = replace(manifest, shards=left)
        manifest.write()
    return manifest


def show(options: ShowOptions) -> Manifest:
    """Show what a manifest names. Raises SourceError."""
    return read_manifest(options.manifest)


def _files(names: Sequence[str]) -> list[str]:
    files = [file for name in names for file in files_of(name)]
    if any(is_tar(file) != is_tar(files[0]) for file in files):
        raise ManifestError("a data set is tars, or .beton files, not both")
    return files


def _with(manifest: Manifest, files: Sequence[str], shards: Sequence[BetonSource | TarSource]) -> Manifest:
    """The manifest with more shards at its end, and the files that these were opened from."""
    entries, shown = list(manifest.shards), store.shown(manifest.path)
    for file, shard in zip(files, shards, strict=True):
        new, where = _entry(_relative(file, manifest.path), shard), store.shown(file)
        for old in entries:
            alike = (old.bytes, old.checksum) == (new.bytes, new.checksum) and not new.checksum.endswith("-")
            if old.name == new.name or alike:
                raise ManifestError(f"{shown}: {where} is there already, as {printable(old.name)}")
        if fault := difference(manifest, new, shard):
            raise ManifestError(f"{shown}: {where} {fault}")
        entries.append(new)
    return replace(manifest, shards=entries)


def _relative(path: str, manifest: str) -> str:
    """A shard's name in a manifest."""
    folder = store.folder(manifest)
    if not store.is_url(path) and not store.is_url(manifest):
        return os.path.relpath(store.plain(path), folder or ".")
    if not path.startswith(f"{folder}/"):
        raise ManifestError(
            f"{store.shown(manifest)} cannot name {store.shown(path)}, which does not lie in its folder"
        )
    return path[len(folder) + 1 :]


@contextlib.contextmanager
def _alone(path: str) -> Iterator[Manifest]:
    """A manifest that no other process of this machine changes meanwhile (in a store: nothing keeps others away)."""
    if store.is_url(path):
        yield read_manifest(path)
        return
    while True:
        read_manifest(path)  # or one line on what is wrong
        with open(store.plain(path), "rb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(store.plain(path))):  # else replaced meanwhile
                yield read_manifest(path)
                return


# -- after a conversion ------------------------------------------------------------------------------------------------


def after_conversion(path: str) -> str:
    """Writes the manifest of the conversion that made a .beton, once all its shards are there; any number of processes
    may do so at the same time.

    Returns:
        One line where it was not written though all shards are there; else empty.
    """
    try:
        shard = BetonSource(path)
        side = shard.beton.side
        if side is None:
            return ""
        target, shards = store.beside(path, ENDING), {path: shard}
        if (total := side.shard[1]) > 1:
            shards = _shards_beside(path, side.conversion, total)
            if not shards:
                return ""
            target = store.join(store.folder(path), shards_name([store.base(file) for file in shards]))
        classes, parts = check_alike(target, list(shards.values())), list(shard.beton.parts_shape or ())
        manifest = _with(Manifest(target, "beton", classes, parts, []), list(shards), list(shards.values()))
        if store.exists(target):
            there = read_manifest(target)
            if [entry.name for entry in there.shards] != [entry.name for entry in manifest.shards]:
                return f"{store.shown(target)} names other shards and was left as it is"
        manifest.write()
    except (SourceError, BetonError, OSError) as error:
        return f"no manifest was written: {error}"
    return ""


def _shards_beside(path: str, conversion: int, total: int) -> dict[str, BetonSource]:
    """All shards of a conversion in the folder of one of them, by file, in their order; none where some are missing."""
    folder = store.folder(path)
    files = store.glob(store.join(folder if store.is_url(path) else glob.escape(folder), "*.beton"))
    found: dict[int, tuple[str, BetonSource]] = {}
    for file in files if len(files) >= total else ():
        with contextlib.suppress(SourceError, BetonError):
            one = BetonSource(file)
            side = one.beton.side
            if side and (side.conversion, side.shard[1]) == (conversion, total):
                if (number := side.shard[0]) in found:
                    raise ManifestError(f"{store.shown(found[number][0])} and {store.shown(file)} are the same shard")
                found[number] = file, one
    return dict(found[number] for number in range(total)) if len(found) == total else {}


def shards_name(names: Sequence[str]) -> str:
    """How the manifest of a conversion's shards is called: train-0.beton, train-1.beton, ... -> train.shards.json."""
    first, last = min(names), max(names)
    same = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return f"{re.sub(r'[-_.]*[0-9]*$', '', first[:same]) or 'all'}.shards{ENDING}"
