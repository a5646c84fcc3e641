"""A folder of images → one .beton: JPEGs that fit are copied byte for byte, everything else is re-encoded upright.

Workers read, check, re-encode and write; the samples lie in the file in the order of the folder, so that the same
folder gives the same bytes whatever the number of workers.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastssl.config import Checked, NonNegativeInt, Range, ZeroToOne, check, printable
from fastssl.loaders import jpeg, window_decoder
from fastssl.loaders.beton import ARRAY, IMAGE, INT, BetonError, Field
from fastssl.loaders.beton_writer import MAX_PIECE, BetonWriter, Block
from fastssl.loaders.datasets import NamedSet, open_named
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
from fastssl.loaders.pool import CONTEXT, WorkerDied, cores, ordered
from fastssl.loaders.sources import Found, SourceError, scan_folder
from fastssl.progress import progress_bar

CHUNK = 32  # images per task of a worker
STORED = ("split", "max_resolution", "squash", "quality", "mode", "raw_fraction")  # options that shape what is stored
MAX_SIDE = 65500  # of a JPEG; the metadata's 16 bits hold little more
DRAFT = 2  # a JPEG that shrinks is decoded at 1/2, 1/4 or 1/8 if that leaves this many times the wanted side
BUFFER = 32 << 20  # bytes per worker for the JPEGs of a chunk that are copied; more than this takes memory as it goes
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
    """Folder of images: one sub-folder per class, or no sub-folders (unlabelled). Or a data set by name and the folder
    that torchvision keeps it in: stl10:FOLDER, cifar10:, cifar100:, pets:, imagenet: (see split and download)."""
    dst: str = ""
    """The .beton file to write. FILE.beton.npz beside it keeps class names, source names and checksums."""
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
    """Replace dst if it exists (when the new file is whole). False: refuse."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.squash:
            check(not self.max_resolution, "max_resolution", self.max_resolution, "0 (no limit) where squash is set")
        index, total = self.shard_numbers
        check(0 <= index < total, "shard", self.shard, "I/N with I from 0 to N-1, such as 0/4")

    @property
    def shard_numbers(self) -> tuple[int, int]:
        """Which shard of how many; (0, 1) for all, (0, 0) where `shard` cannot be read."""
        index, slash, total = (self.shard or "0/1").partition("/")
        return (int(index), int(total)) if slash and index.isdecimal() and total.isdecimal() else (0, 0)


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

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def table(self) -> str:
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
    `<dst>.partial`; the next one says so and starts over.

    Args:
        options: what to convert and how.
        say: told what is worth knowing before the end; default: a line on stderr above the progress bar.

    Raises:
        ConvertError: no images, more than `max_bad` bad ones, no space, no permission, or a worker that died.
    """
    begin = time.perf_counter()
    say = say or (lambda text: tqdm.write(text, file=sys.stderr))
    target, shown = Path(options.dst), printable(options.dst)
    if target.suffix != ".beton":
        raise ConvertError(f"{shown} must end in .beton")
    if target.exists() and not options.overwrite:
        raise ConvertError(f"{shown} exists already; --overwrite true replaces it")
    if not target.parent.is_dir():
        raise ConvertError(f"{printable(str(target.parent))} is no folder to write {printable(target.name)} into")
    job = _job(options)
    if job.left_out:
        say(job.left_out)
    try:
        with BetonWriter(target, job.fields, len(job.files)) as writer:
            if writer.restarted:
                say(f"{printable(str(writer.partial))} was left by an unfinished conversion; starting over")
            outcome = _run(job, writer)
            if len(outcome.bad) > options.max_bad or not outcome.names:
                head = f"{shown} was not written (up to {options.max_bad} bad files are skipped: --max-bad)"
                raise ConvertError(_listing(head, outcome.bad), outcome.bad)
            writer.finish(job.classes, outcome.names, options.shard_numbers, job.conversion)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConvertError(f"no space left for {shown}; what was written has been removed") from None
        raise ConvertError(f"{shown} cannot be written: {error.strerror or error}") from None
    except (WorkerDied, BetonError) as error:
        raise ConvertError(str(error)) from None
    seconds = time.perf_counter() - begin
    size = target.stat().st_size
    counts = (size, len(outcome.names), outcome.copied, len(job.classes), round(seconds, 3))
    return ConvertResult(str(target), *counts, outcome.bad, outcome.warned, job.left_out)


@dataclass
class _Job:
    """What the workers know: the files to convert, in order."""

    options: ConvertOptions
    fields: list[Field]
    classes: list[str]
    files: list[str]
    labels: np.ndarray
    named: NamedSet | None
    first: int  # position of files[0] in the whole data set
    left_out: str
    conversion: int  # the same for all shards: of all files, their labels, and how they are stored

    def read(self, i: int, space: memoryview) -> bytes | memoryview:
        if self.named:
            return self.named.read(self.first + i, space)
        return read_file(os.path.join(self.options.src, self.files[i]), space)


@dataclass
class _Outcome:
    names: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    warned: list[tuple[str, str]] = field(default_factory=list)
    copied: int = 0


def _job(options: ConvertOptions) -> _Job:
    try:
        named = open_named(options.src, options.split, options.download)
        found = Found(named.classes, named.names, named.labels) if named else scan_folder(options.src)
    except SourceError as error:
        raise ConvertError(str(error)) from None
    fields = [Field("image", IMAGE), Field("label", INT)]
    if options.parts:
        fields.append(Field("parts", ARRAY, _parts_shape(options.parts, found.files), np.dtype("u1")))
    index, total = options.shard_numbers
    count = len(found.files)
    begin, end = count * index // total, count * (index + 1) // total
    if begin == end:
        raise ConvertError(f"shard {options.shard} is empty: {options.src} has only {count} images")
    files, labels = found.files[begin:end], found.labels[begin:end]
    stored = [(key, value) for key, value in sorted(vars(options).items()) if key in STORED]
    facts = [*(f"{file}\0{label}" for file, label in zip(found.files, found.labels, strict=True)), str(stored)]
    conversion = zlib.crc32("\n".join(facts).encode("utf-8", "surrogateescape"))
    return _Job(options, fields, found.classes, files, labels, named, begin, found.left_out(), conversion)


def _run(job: _Job, writer: BetonWriter) -> _Outcome:
    """Lets the workers convert all files into the writer's temporary file; shows progress."""
    outcome, chunks = _Outcome(), -(-len(job.files) // CHUNK)
    workers = min(job.options.workers or cores(), chunks)
    try:
        state = (job, str(writer.partial), _Turn(writer.begin))
    except OSError as error:  # not the destination's fault
        raise WorkerDied(f"worker processes cannot be started ({error.strerror}); is /dev/shm full?") from None
    results = ordered(_convert_chunk, range(chunks), workers, _start, state)
    try:
        with progress_bar(len(job.files), writer.path.name) as bar:
            for names, bad, warned, copied, rows, sizes, crc32, end in results:
                writer.add(rows, sizes, crc32, end)
                outcome.names += names
                outcome.bad += bad
                outcome.warned += warned
                outcome.copied += copied
                if bad:
                    bar.set_postfix(bad=len(outcome.bad), refresh=False)
                bar.update(len(names) + len(bad))
    finally:
        results.close()
    return outcome


# -- in the workers --------------------------------------------------------------------------------------------------

_job_here: _Job
_file: int
_turn: _Turn
_buffer: memoryview


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


def _start(job: _Job, path: str, turn: _Turn) -> None:
    global _job_here, _file, _turn, _buffer
    _job_here, _file, _turn, _buffer = job, os.open(path, os.O_WRONLY), turn, memoryview(mmap.mmap(-1, BUFFER))


def _convert_chunk(chunk: int) -> tuple:
    try:
        samples, names, bad, warned, copied, space = [], [], [], [], 0, _buffer
        for i in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(_job_here.files))):
            name = _job_here.files[i]
            try:
                data = _job_here.read(i, space)
                image, is_copy = encode(data, name, _job_here.options)
                if _job_here.options.check == "decode" and (warning := _warning(data)):
                    warned.append((name, f"({warning})"))
                parts = [_read_parts(_job_here, name)] if _job_here.options.parts else []
            except DecodeError as error:
                bad.append((name, str(error)))
                continue
            except Exception as error:  # one odd file must not end a long conversion; the list of bad files names it
                bad.append((name, f"cannot be converted ({type(error).__name__}: {error})"))
                continue
            samples.append((image, _job_here.labels[i], *parts))
            names.append(name)
            if is_copy:
                copied += 1
                space = space[len(data) :]
        block = Block(_job_here.fields, samples)
        end = _turn.place(chunk, block)
        block.write(_file)
    except BaseException:
        _turn.fail(chunk)
        raise
    return names, bad, warned, copied, block.rows, block.sizes, block.crc32, end


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


def _parts_shape(folder: str, files: list[str]) -> tuple[int, ...]:
    """Shape of the part maps: that of the first image that has some."""
    for name in files:
        if (path := _parts_path(folder, name)).exists():
            maps = _load_parts(path)
            if maps is None or maps.ndim != 3 or maps.dtype != np.uint8:
                raise ConvertError(f"{path} holds no part maps; they are uint8 [N, h, w], written by numpy.save")
            return maps.shape
    raise ConvertError(f"{folder} has no part maps for these images; {_parts_path(folder, files[0])} does not exist")


def _read_parts(job: _Job, name: str) -> np.ndarray:
    path, shape = _parts_path(job.options.parts, name), job.fields[-1].shape
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
