"""A folder of images → one .beton: JPEGs that fit are copied byte for byte, everything else is re-encoded upright.

Workers read, check, re-encode and write; the samples lie in the file in the order of the folder, so that the same
folder gives the same bytes whatever the number of workers.

`convert` does that for the images of a folder on this machine's cores. `shards_of` and `convert_shard` are the same
work as two functions, for engines that spread it over machines: the plan, and one file of it. Nothing here imports
PyTorch.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import mmap
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastssl.config import Checked, NonNegativeInt, Range, ZeroToOne, check, printable, shard_numbers
from fastssl.loaders import jpeg, store, window_decoder
from fastssl.loaders.beton import ARRAY, IMAGE, INT, Beton, BetonError, Field, SideFile
from fastssl.loaders.beton_writer import MAX_PIECE, BetonWriter, Block
from fastssl.loaders.datasets import open_named
from fastssl.loaders.decode import (
    MAX_PIXELS,
    DecodeError,
    Encoded,
    open_image,
    orientation,
    read_file,
    to_rgb,
    upright_size,
)
from fastssl.loaders.manifest import after_conversion
from fastssl.loaders.pool import CONTEXT, WorkerDied, cores, ordered
from fastssl.loaders.sources import Found, SourceError, StoreFolder, is_tar, open_source, scan_folder
from fastssl.progress import progress_bar

CHUNK = 32  # images per task of a worker
STORED = ("split", "max_resolution", "squash", "quality", "mode", "raw_fraction")  # options that shape what is stored
MAX_SIDE = 65500  # of a JPEG; the metadata's 16 bits hold little more
DRAFT = 2  # a JPEG that shrinks is decoded at 1/2, 1/4 or 1/8 if that leaves this many times the wanted side
BUFFER = 32 << 20  # bytes per worker for the JPEGs of a chunk that are copied; more than this takes memory as it goes
READERS = 16  # threads of a worker that read from a store
LISTED = 100  # bad files that a message lists


class ConvertError(RuntimeError):
    """The conversion failed and left nothing behind; the message says why.

    Attributes:
        bad: (source name, reason) of every file that could not be converted.
    """

    def __init__(self, message: str, bad: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.bad = list(bad)


@dataclass
class ConvertOptions(Checked):
    """What to convert, and how the images are stored."""

    src: str = ""
    """Folder of images, here or in a store: one sub-folder per class, or no sub-folders (unlabelled). Or tars in
    WebDataset's layout ('train-{000..015}.tar'). Or a data set by name and the folder that torchvision keeps it in:
    stl10:FOLDER, cifar10:, cifar100:, pets:, imagenet: (see split and download)."""
    dst: str = ""
    """The .beton file to write, here or in a store (s3://BUCKET/FILE.beton). FILE.beton.npz beside it keeps class
    names, source names and checksums, and FILE.beton.json (of all shards together: see docs/stores.md) is its
    manifest."""
    split: str = ""
    """Split of a data set by name: train, test, unlabeled or train+unlabeled (STL10), train or test (CIFAR), trainval
    or test (Pets), train or val (ImageNet). Unlabelled images get label -1. Empty: the first of these."""
    download: bool = False
    """Let torchvision download a data set by name that is not in its folder."""
    max_resolution: NonNegativeInt = 0
    """Images with a longer side are scaled down to this many pixels. 0: no limit."""
    squash: Annotated[int, Range(at_least=0, at_most=MAX_SIDE)] = 0
    """Every image is resized to this square, in pixels, without regard to its shape, as views with the same
    views.*.squash (SAAE) would do at every reading. 0: off."""
    quality: Annotated[int, Range(at_least=1, at_most=95)] = 90
    """JPEG quality of re-encoded images, 1 to 95 (4:2:0 chroma). Copied JPEGs keep their own."""
    mode: Literal["jpg", "raw", "proportion"] = "jpg"
    """jpg, raw (RGB pixels: faster to read, about ten times larger), or proportion (some of each)."""
    raw_fraction: ZeroToOne = 0.5
    """With mode=proportion: the fraction of the images that is stored raw, chosen by their names."""
    check: Literal["structure", "decode"] = "structure"
    """How copied JPEGs are checked: segments and end marker, or also by decoding them (about ten times slower)."""
    max_bad: NonNegativeInt = 0
    """Skip up to so many files that cannot be read or decoded; more fail the conversion, with the list."""
    parts: str = ""
    """Folder of part maps: for src's CLASS/NAME.jpg the file CLASS/NAME.npy, uint8 [N, h, w]. Empty: none."""
    shard: str = ""
    """I/N: convert only the I-th of N equal runs of the files, I from 0 to N-1. Empty: all."""
    workers: NonNegativeInt = 0
    """Processes. 0: one per usable core."""
    overwrite: bool = False
    """Replace dst if it exists (when the new file is whole). False: refuse, unless it is the wanted shard already."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.squash:
            check(not self.max_resolution, "max_resolution", self.max_resolution, "0 (no limit) where squash is set")
        shard_numbers(self.shard)


@dataclass
class ConvertResult:
    """What a conversion did.

    Attributes:
        path, size: the file that was written, and its length in bytes.
        images: samples in it.
        copied: JPEGs among them that were stored byte for byte; the rest was decoded, and encoded anew or stored raw.
        classes: number of classes.
        bad: (source name, reason) of each file that was skipped.
        warned: likewise, of each JPEG that libjpeg decodes with a warning (found by check=decode).
        left_out: what in the folder was not taken for an image, counted and named.
        seconds: wall-clock time.
        there: nothing was written, as the file was there already.
    """

    path: str
    size: int
    images: int
    copied: int
    classes: int
    seconds: float
    bad: list[tuple[str, str]] = field(default_factory=list)
    warned: list[tuple[str, str]] = field(default_factory=list)
    left_out: str = ""
    there: bool = False

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def table(self) -> str:
        if self.there:
            return f"{printable(self.path)} is there already, whole, with these {self.images} images"
        text = (
            f"{printable(self.path)}: {self.images} images in {self.classes or 'no'} classes, "
            f"{self.size / 1e6:.1f} MB; {self.copied} copied byte for byte, "
            f"{self.images - self.copied} decoded and stored anew; "
            f"{self.seconds:.1f} s, {self.images / max(self.seconds, 1e-9):.0f} img/s"
        )
        lines = [text, *([_listing("skipped", self.bad)] if self.bad else [])]
        if self.warned:
            lines.append(_listing("decoded with a warning of libjpeg (pixels may be missing)", self.warned, "file"))
        return "\n".join(lines)


def convert(options: ConvertOptions, say: Callable[[str], None] | None = None) -> ConvertResult:
    """Converts a folder of images into a .beton file.

    Nothing is left under the name `options.dst` unless the file is whole. A killed conversion leaves
    `<dst>.*.partial`; the next one says so and starts over. A shard that is there already stays as it is, and only the
    manifest is written if it is wanting.

    Args:
        options: what to convert and how.
        say: told what is worth knowing before the end; default: a line on stderr above the progress bar.

    Raises:
        ConvertError: no images, more than `max_bad` bad ones, no space, no permission, or a worker that died.
    """
    begin = time.perf_counter()
    say = say or (lambda text: tqdm.write(text, file=sys.stderr))
    _check_target(options.dst)
    there = not options.overwrite and store.exists(options.dst)
    images, left_out = _planned(options) if options.shard or not there else (None, "")
    if left_out:
        say(left_out)
    if there:
        if not images or (found := held(options.dst, images.shard)) is None:
            raise ConvertError(f"{store.shown(options.dst)} exists already; --overwrite true replaces it")
        path = store.shown(found.path)
        result = ConvertResult(path, found.size, len(found), 0, len(found.classes), 0.0, there=True)
    else:
        result = _write(cast(_Images, images), options.dst, options.workers or cores(), say, options.overwrite)
    if left := after_conversion(options.dst):
        say(left)
    return replace(result, left_out=left_out, seconds=round(time.perf_counter() - begin, 3))


@dataclass(frozen=True)
class Shard:
    """One file of a conversion: its images, and what all files of that conversion have in common. See `shards_of`.

    Attributes:
        index, total: which of how many files, counted from 0.
        names: of the images, in their order.
        labels: int64 [names], class index; -1 for none.
        classes: class names in the order of the labels.
        options: how the images are stored; of these only the fields in `STORED`, `check`, `max_bad` and `parts` count.
        parts_shape: of the part maps; () without.
        conversion: a number of all images, their labels and how they are stored: the same in every file.
    """

    index: int
    total: int
    names: Sequence[str]
    labels: np.ndarray
    classes: list[str]
    options: ConvertOptions
    parts_shape: tuple[int, ...]
    conversion: int

    @property
    def fields(self) -> list[Field]:
        """The columns of the file."""
        parts = [Field("parts", ARRAY, self.parts_shape, np.dtype("u1"))] if self.parts_shape else []
        return [Field("image", IMAGE), Field("label", INT), *parts]


def shards_of(
    names: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    classes: Sequence[str] = (),
    total: int = 1,
    options: ConvertOptions | None = None,
) -> list[Shard]:
    """Plans a conversion: a whole data set as `total` equal runs of its images, one for each file to be written.

    The plan of a folder (`fastssl.loaders.sources.scan_folder`: its files, labels and classes) is that of
    `fastssl convert --shard I/N`. A plan is plain data, to be sent to whoever calls `convert_shard`.

    Args:
        names: of all images, in the order of the data set; each once.
        labels: int [names], class index; -1 for none.
        classes: class names in the order of the labels; empty: none.
        total: number of files.
        options: how the images are stored, see `Shard`.

    Raises:
        ConvertError: fewer images than files, labels that do not fit names or classes, or no part maps.
    """
    options, count, labels = options or ConvertOptions(), len(names), np.asarray(labels, np.int64)
    if not 1 <= total <= count:
        raise ConvertError(f"{count} images cannot be {total} shards: each needs one at least")
    if labels.shape != (count,) or (classes and not -1 <= labels.min() <= labels.max() < len(classes)):
        raise ConvertError(f"{count} images need a label each, from -1 (none) to {max(len(classes) - 1, -1)}")
    shape = _parts_shape(options.parts, names) if options.parts else ()
    conversion = 0
    for name, label in zip(names, labels.tolist(), strict=True):
        conversion = zlib.crc32(f"{name}\0{label}\n".encode("utf-8", "surrogateescape"), conversion)
    stored = [(key, value) for key, value in sorted(vars(options).items()) if key in STORED]
    conversion = zlib.crc32(str(stored).encode("utf-8", "surrogateescape"), conversion)
    ends = [count * k // total for k in range(total + 1)]
    return [
        Shard(k, total, names[begin:end], labels[begin:end], list(classes), options, shape, conversion)
        for k, (begin, end) in enumerate(itertools.pairwise(ends))
    ]


def convert_shard(
    shard: Shard,
    read: Callable[[str], bytes],
    dst: str | Path,
    say: Callable[[str], None] | None = None,
    readers: int = 0,
) -> ConvertResult:
    """Writes one file of a planned conversion, in this process, and what stands beside it.

    The same shard gives the same bytes, which are those of `fastssl convert --shard`. It may be called again after it
    was killed, and by several processes at once: the file at `dst` is always a whole one, whoever finishes. What stands
    there before is replaced. A killed call leaves a file `<dst>.*.partial`, which the next one removes.

    Args:
        shard: from `shards_of`.
        read: gives the bytes of an image file by its name. It raises DecodeError (`fastssl.loaders.decode`) where there
            is no such image, which is then a bad one; any other error ends the call.
        dst: the .beton to write; a URL (s3://..) is written in the folder for temporary files ($TMPDIR) and sent in
            one piece, after its side file.
        say: told that a killed call's file was removed; None: nobody.
        readers: threads that call `read` ahead of the rest; 0: none. For a store, where an image is long on its way.

    Returns:
        What was written, with the bad images and why; up to `shard.options.max_bad` are left out.

    Raises:
        ConvertError: as `convert`.
    """
    images = _Images(shard, lambda i, space: read(shard.names[i]), readers)
    return _write(images, os.fspath(dst), 0, say or (lambda text: None), True)


Read = Callable[[int, memoryview], bytes | memoryview]
"""Gives the bytes of a shard's i-th image file, in the space if they fit there."""


def _planned(options: ConvertOptions) -> tuple[_Images, str]:
    """The images of the shard that was asked for, and what of a folder is none."""
    index, total = shard_numbers(options.shard)
    try:
        found, read, readers = _opened(options)
    except SourceError as error:
        raise ConvertError(str(error)) from None
    if total > (count := len(found.files)):
        raise ConvertError(f"shard {options.shard} cannot be made: {store.shown(options.src)} has only {count} images")
    shard, first = shards_of(found.files, found.labels, found.classes, total, options)[index], count * index // total
    return _Images(shard, lambda i, space: read(first + i, space), readers), found.left_out()


def _opened(options: ConvertOptions) -> tuple[Found, Read, int]:
    """The images of `src`, how one is read, and how many threads do so."""
    src = options.src
    if not store.is_url(src) and (named := open_named(src, options.split, options.download)):
        return Found(named.classes, named.names, named.labels), named.read, 0
    if not store.is_url(src) and not is_tar(src):
        found = scan_folder(src)
        return found, lambda i, space: read_file(os.path.join(src, found.files[i]), space), 0
    if options.split or options.download:
        raise SourceError(f"{store.shown(src)} is no data set by name; split and download are for these")
    source = open_source(src)
    if isinstance(source, StoreFolder):  # read past the cache: each image once
        names = source.files
        return Found(source.classes, names, source.labels), lambda i, _: source.block(i).file.read_all(), READERS
    if not is_tar(src):
        raise SourceError(f"{store.shown(src)} is neither a folder of images nor tars")
    names = [source.name(i) for i in range(len(source))]
    return Found(source.classes, names, source.labels), lambda i, _: source.read(i).data.data, 0


def _write(images: _Images, dst: str, workers: int, say: Callable[[str], None], overwrite: bool) -> ConvertResult:
    """See `convert`; without workers in this process."""
    begin, shown, shard = time.perf_counter(), store.shown(dst), images.shard
    options = shard.options
    _check_target(dst)
    with _place_for(dst) as target:
        try:
            with BetonWriter(target, shard.fields, len(shard.names)) as writer:
                if writer.restarted:
                    say(f"{shown}: what an unfinished conversion had left was removed; starting over")
                outcome = _run(images, writer, workers)
                if len(outcome.bad) > options.max_bad or not outcome.names:
                    head = f"{shown} was not written (up to {options.max_bad} bad files are skipped: --max-bad)"
                    raise ConvertError(_listing(head, outcome.bad), outcome.bad)
                if not overwrite and target.exists() and held(target, shard) is None:
                    raise ConvertError(f"{shown} was written by another process meanwhile, and holds other images")
                writer.finish(shard.classes, outcome.names, (shard.index, shard.total), shard.conversion)
        except OSError as error:
            where = printable(str(target))
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ConvertError(f"no space left for {where}; what was written has been removed") from None
            raise ConvertError(f"{where} cannot be written: {error.strerror or error}") from None
        except (WorkerDied, BetonError) as error:
            raise ConvertError(str(error)) from None
        size = target.stat().st_size
    counts = (len(outcome.names), outcome.copied, len(shard.classes), round(time.perf_counter() - begin, 3))
    path = shown if store.is_url(dst) else str(target)
    return ConvertResult(path, size, *counts, outcome.bad, outcome.warned)


def held(path: str | Path, shard: Shard) -> Beton | None:
    """A shard's file, here or in a store; None where there is none, or, by its side file, another one or a damaged one.

    Raises:
        StoreError: a store does not answer.
    """
    try:
        side = (beton := Beton(path)).side
    except BetonError:
        return None
    except store.StoreError as error:
        if error.missing:
            return None
        raise
    facts = shard.conversion, (shard.index, shard.total)
    return beton if side is not None and (side.conversion, side.shard) == facts else None


def _check_target(dst: str) -> None:
    if not store.base(dst).endswith(".beton"):
        raise ConvertError(f"{store.shown(dst)} must end in .beton")
    if not store.is_url(dst) and not (folder := Path(store.plain(dst)).parent).is_dir():
        raise ConvertError(f"{printable(str(folder))} is no folder to write {store.base(dst)} into")


@contextlib.contextmanager
def _place_for(dst: str) -> Iterator[Path]:
    """Where a file is written: at its place, or in a folder from which it is sent to a store in the end."""
    if not store.is_url(dst):
        yield Path(store.plain(dst))
        return
    with tempfile.TemporaryDirectory(prefix="fastssl-") as folder:
        yield (path := Path(folder, store.base(dst)))
        try:
            store.put(SideFile.path_of(path), store.beside(dst, ".npz"))  # first: who sees the .beton finds both
            store.put(path, dst)
        except store.StoreError as error:
            raise ConvertError(f"{store.shown(dst)} was not written: {error}") from None


@dataclass
class _Outcome:
    names: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    warned: list[tuple[str, str]] = field(default_factory=list)
    copied: int = 0

    def add(self, other: _Outcome) -> None:
        self.names += other.names
        self.bad += other.bad
        self.warned += other.warned
        self.copied += other.copied


def _run(images: _Images, writer: BetonWriter, workers: int) -> _Outcome:
    """Converts all files of a shard into the writer's temporary file: here, or in worker processes, with progress."""
    outcome = _Outcome()
    if not workers:
        for chunk in range(images.chunks):
            block, here = images.encoded(chunk)
            writer.write(block)
            outcome.add(here)
        return outcome
    try:
        state = (images, str(writer.partial), _Turn(writer.begin))
    except OSError as error:  # not the destination's fault
        raise WorkerDied(f"worker processes cannot be started ({error.strerror}); is /dev/shm full?") from None
    results = ordered(_convert_chunk, range(images.chunks), min(workers, images.chunks), _start, state)
    try:
        with progress_bar(len(images.shard.names), writer.path.name) as bar:
            for here, rows, sizes, crc32, end in results:
                writer.add(rows, sizes, crc32, end)
                outcome.add(here)
                if here.bad:
                    bar.set_postfix(bad=len(outcome.bad), refresh=False)
                bar.update(len(here.names) + len(here.bad))
    finally:
        results.close()
    return outcome


class _Images:
    """The images of a shard, chunk by chunk, as they are stored."""

    def __init__(self, shard: Shard, read: Read, readers: int = 0) -> None:
        self.shard, self.read, self.readers = shard, read, readers
        self.chunks = -(-len(shard.names) // CHUNK)
        self._buffer: memoryview | None = None
        self._threads: ThreadPoolExecutor | None = None

    def encoded(self, chunk: int) -> tuple[Block, _Outcome]:
        """The samples of a chunk, to be placed and written before the next chunk is asked for."""
        if self._buffer is None:
            self._buffer = memoryview(mmap.mmap(-1, BUFFER))
        shard, samples, outcome, space = self.shard, [], _Outcome(), self._buffer
        mine, coming = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(shard.names))), {}
        if self.readers:
            self._threads = self._threads or ThreadPoolExecutor(self.readers)
            coming = {i: self._threads.submit(self.read, i, memoryview(b"")) for i in mine}
        for i in mine:
            name = shard.names[i]
            try:
                data = coming.pop(i).result() if coming else self.read(i, space)
            except DecodeError as error:
                outcome.bad.append((name, str(error)))
                continue
            except OSError as error:
                raise ConvertError(f"{printable(name)} cannot be read: {error.strerror or error}") from error
            try:
                image, is_copy = encode(data, name, shard.options)
                if shard.options.check == "decode" and (warning := _warning(data)):
                    outcome.warned.append((name, f"({warning})"))
                parts = [_read_parts(shard, name)] if shard.parts_shape else []
            except DecodeError as error:
                outcome.bad.append((name, str(error)))
                continue
            except Exception as error:  # one odd file must not end a long conversion; the list of bad files names it
                outcome.bad.append((name, f"cannot be converted ({type(error).__name__}: {error})"))
                continue
            samples.append((image, shard.labels[i], *parts))
            outcome.names.append(name)
            if is_copy:
                outcome.copied += 1
                space = space[len(data) :]
        return Block(shard.fields, samples), outcome


# -- in the workers --------------------------------------------------------------------------------------------------

_images: _Images
_file: int
_turn: _Turn


class _Turn:
    """Hands out positions in the file chunk by chunk, in order, to workers that finish them in any order."""

    def __init__(self, begin: int) -> None:
        self._changed = CONTEXT.Condition()
        self._next, self._end, self._failed = (CONTEXT.Value("q", v, lock=False) for v in (0, begin, 2**63 - 1))

    def place(self, chunk: int, block: Block) -> int:
        """Waits for the chunks before, then places the block; returns its end."""
        with self._changed:
            self._changed.wait_for(lambda: self._next.value == chunk or self._failed.value < chunk)
            if self._failed.value < chunk:
                raise WorkerDied("an earlier chunk has failed")
            self._end.value = end = block.place(self._end.value)
            self._next.value += 1
            self._changed.notify_all()
        return end

    def fail(self, chunk: int) -> None:
        """Lets no later chunk wait for this one."""
        with self._changed:
            self._failed.value = min(chunk, self._failed.value)
            self._changed.notify_all()


def _start(images: _Images, path: str, turn: _Turn) -> None:
    global _images, _file, _turn
    _images, _file, _turn = images, os.open(path, os.O_WRONLY), turn


def _convert_chunk(chunk: int) -> tuple[_Outcome, np.ndarray, np.ndarray, np.ndarray, int]:
    try:
        block, outcome = _images.encoded(chunk)
        end = _turn.place(chunk, block)
        block.write(_file)
    except BaseException:
        _turn.fail(chunk)
        raise
    return outcome, block.rows, block.sizes, block.crc32, end


def encode(data: bytes | memoryview, name: str, options: ConvertOptions) -> tuple[Encoded, bool]:
    """One image file's bytes as they are stored, and whether they are stored unchanged (as a view of `data`).

    Raises:
        DecodeError: the file cannot be decoded.
    """
    if len(data) > MAX_PIECE:
        raise DecodeError(f"has {len(data)} bytes; a .beton takes at most {MAX_PIECE} per sample")
    as_raw = options.mode == "raw" or (options.mode == "proportion" and _draw(name) < options.raw_fraction)
    if data[:2] == jpeg.SOI:
        header = jpeg.scan(data)
        if header.fault:
            raise DecodeError(header.fault)
        if not as_raw and _fits(header, data, options):
            return Encoded(np.frombuffer(data, np.uint8), "jpg", header.height, header.width), True
    image = open_image(bytes(data))
    height, width = upright_size(image)
    shrink = options.max_resolution / max(height, width) if options.max_resolution else 1.0
    if shrink < 1:
        height, width = (max(1, round(side * shrink)) for side in (height, width))
        image.draft(None, (round(image.width * shrink * DRAFT), round(image.height * shrink * DRAFT)))
    image = to_rgb(image)
    if options.squash:
        height = width = options.squash
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    elif (image.height, image.width) != (height, width):
        image = image.resize((width, height), Image.Resampling.HAMMING)
    if max(height, width) > MAX_SIDE:
        raise DecodeError(f"is {height} x {width} pixels; a .beton holds sides up to {MAX_SIDE}")
    if as_raw:
        return Encoded(np.array(image).reshape(-1), "raw", height, width), False
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=options.quality, comment=b"")  # else PIL takes over the source's comment
    return Encoded(np.frombuffer(buffer.getbuffer(), np.uint8), "jpg", height, width), False


def _warning(data: bytes | memoryview) -> str:
    """What libjpeg warns of; raises DecodeError where a JPEG cannot be decoded."""
    if data[:2] != jpeg.SOI:
        return ""
    header = jpeg.scan(data)
    return window_decoder.decode(Encoded(np.frombuffer(data, np.uint8), "jpg", header.height, header.width)).warning


def _fits(header: jpeg.Jpeg, data: bytes | memoryview, options: ConvertOptions) -> bool:
    """Whether a whole JPEG can be stored as it is: usual coding, upright, not too large, squashed already."""
    return (
        header.common
        and header.height * header.width <= MAX_PIXELS
        and (not options.max_resolution or max(header.height, header.width) <= options.max_resolution)
        and (not options.squash or header.height == header.width == options.squash)
        and (not header.app1 or orientation(open_image(bytes(data))) == 1)
    )


def _draw(name: str) -> float:
    """A number from 0 to 1 that depends on the name alone, hence on neither shards nor workers."""
    return zlib.crc32(os.fsencode(name)) / 2**32


def _parts_path(folder: str, name: str) -> Path:
    return Path(folder, name).with_suffix(".npy")


def _parts_shape(folder: str, files: Sequence[str]) -> tuple[int, ...]:
    """Shape of the part maps: that of the first image that has some."""
    for name in files:
        if (path := _parts_path(folder, name)).exists():
            maps = _load_parts(path)
            if maps is None or maps.ndim != 3 or maps.dtype != np.uint8:
                raise ConvertError(f"{path} holds no part maps; they are uint8 [N, h, w], written by numpy.save")
            return maps.shape
    raise ConvertError(f"{folder} has no part maps for these images; {_parts_path(folder, files[0])} does not exist")


def _read_parts(shard: Shard, name: str) -> np.ndarray:
    path, shape = _parts_path(shard.options.parts, name), shard.parts_shape
    maps = _load_parts(path)
    if maps is None:
        raise DecodeError(f"has no readable part maps ({path})")
    if maps.shape != shape or maps.dtype != np.uint8:
        raise DecodeError(f"has part maps {maps.dtype} {maps.shape}, others have uint8 {shape} ({path})")
    return maps


def _load_parts(path: Path) -> np.ndarray | None:
    try:
        return np.load(path, allow_pickle=False) if path.is_file() else None
    except (OSError, ValueError, EOFError, MemoryError):
        return None


def _listing(head: str, files: list[tuple[str, str]], what: str = "bad file") -> str:
    lines = [f"{head}: {len(files)} {what}{'s' * (len(files) != 1)}"]
    lines += [f"  {printable(name)} {why}" for name, why in files[:LISTED]]
    return "\n".join([*lines, *([f"  and {len(files) - LISTED} more"] if len(files) > LISTED else [])])
