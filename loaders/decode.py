"""Encoded bytes → upright RGB pixels: the one way in which an image is opened, for every command.

Converter, folders, .beton files, all engines and evaluation read images through here. The rules:

- Only regular files of at most MAX_BYTES are read, and only FORMATS are opened, whatever the file is called.
- A file is good or bad as a whole, and for good: segments or checksums that are wrong, or a first decode that fails
  make it bad. A whole JPEG that libjpeg decodes with a warning is good, as for PIL and torchvision; `fastssl verify`
  and `convert --check decode` name these.
- The work is bounded: at most MAX_PIXELS, and jpeg.MAX_SCANS scans of a JPEG.
- Pixels are 8-bit RGB: of 16 bits the high byte, of an animation the first frame, palettes and CMYK converted,
  transparency ignored, turned upright as EXIF says.
"""

from __future__ import annotations

import importlib.util
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, overload

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from fastssl.loaders import jpeg

_AVIF = importlib.util.find_spec("PIL._avif") is not None  # from Pillow 11.3 on
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", *(("AVIF",) if _AVIF else ()))
"""What is opened, by PIL's names. Of its others some start programs (EPS), some take unbounded time."""

SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
        *(".ppm", ".pgm", ".pbm", ".pnm", *((".avif",) if _AVIF else ())),
    )
)
"""File names that count as images, in any case."""

MAX_PIXELS = 1 << 27
"""More pixels than this are taken for a damaged header or a decompression bomb (RGB: 384 MiB)."""

MAX_BYTES = 1 << 30
"""Longer files are not read."""

Frame = Literal["", "upright", "stored"]
"""What annotations of an image were drawn on: as EXIF turns it, or the pixels as they lie in the file. Empty: whichever
fits their height and width."""

_MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P6")
_ORIENTATION = 0x0112
_TIFF_SIZE = (0x0100, 0x0101)  # tags of width and height
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_UPRIGHT = {  # what turns each orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {**_UPRIGHT, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


class DecodeError(ValueError):
    """A sample cannot be turned into pixels; the message is the reason alone, the caller adds the sample's name."""


@dataclass(frozen=True)
class Encoded:
    """One stored sample.

    Attributes:
        data: uint8 [bytes], read only where it is a view of a mapped file.
        mode: 'jpg' (JPEG as stored in a .beton, shown without regard to EXIF), 'raw' (RGB rows of a .beton), or
            'file' (an image file of any kind, shown upright).
        height, width: of the decoded image, upright, in pixels.
    """

    data: np.ndarray
    mode: Literal["jpg", "raw", "file"]
    height: int
    width: int


UNKNOWN, JPEG, RAW, FILE_BY_NAME, FILE_AT = range(5)


@dataclass(frozen=True)
class Places:
    """Where the bytes of some samples lie, for compiled code that reads them.

    Attributes:
        table: int64 [B, 4], one row per sample: a kind and three numbers:
            UNKNOWN       to be read by Python, which may find that it cannot be
            JPEG, RAW     file descriptor, first byte, bytes; the modes 'jpg' and 'raw' of `Encoded`
            FILE_BY_NAME  0, address of the file's name, 0; the mode 'file'
            FILE_AT       file descriptor, first byte, bytes; the mode 'file'
        names: what the addresses lead to.
        held: what keeps the files open.
    """

    table: np.ndarray
    names: bytes = b""
    held: Sequence[Any] = ()


def decode(encoded: Encoded) -> np.ndarray:
    """Pixels of a sample: uint8 [H, W, 3], RGB, writable.

    Raises:
        DecodeError: empty, truncated, not an image, absurd dimensions, or not the size that the metadata promises.
    """
    size = (encoded.height, encoded.width)
    if encoded.mode == "raw":
        if encoded.data.size != size[0] * size[1] * 3:
            raise DecodeError(f"has {encoded.data.size} bytes, but {size[0]} x {size[1]} RGB pixels were promised")
        return encoded.data.reshape(*size, 3).copy()
    image = to_rgb(open_image(bytes(encoded.data)), upright=encoded.mode == "file")
    if (image.height, image.width) != size:
        raise DecodeError(f"is {image.height} x {image.width} pixels, but {size[0]} x {size[1]} were promised")
    return np.array(image)


def read_picture(path: str, like: tuple[int, int] | None = None, frame: Frame = "") -> np.ndarray:
    """Pixels of an image file: uint8 [H, W, 3], RGB.

    Args:
        like: height and width of what was drawn on the image (a mask, boxes). None: nothing, it is shown upright.
        frame: see `choose_frame`.

    Raises:
        DecodeError: it cannot be read or decoded, or does not fit `like`.
    """
    image = open_image(read_file(path))
    upright = like is None or choose_frame(image, like, frame)
    return np.array(to_rgb(image, upright))


def read_indices(path: str) -> np.ndarray:
    """A picture whose pixels are numbers, such as a mask: [H, W] in its own integers (a palette's indices), upright.

    Raises:
        DecodeError: it cannot be read or decoded, or is a colour picture.
    """
    image = _load(open_image(read_file(path)))
    if len(image.getbands()) != 1 or image.mode == "F":
        kind = "of fractions" if image.mode == "F" else "a colour picture"
        raise DecodeError(f"is {kind} (mode {image.mode}); a label picture has one class index per pixel")
    return np.array(_turned(image, orientation(image)))


def check_frame(path: str, like: tuple[int, int], frame: Frame = "") -> None:
    """Raises DecodeError where `read_picture` would, as far as the header tells."""
    with open_regular(path) as file:
        choose_frame(_open(file), like, frame)


def choose_frame(image: Image.Image, like: tuple[int, int], frame: Frame = "") -> bool:
    """Whether what was drawn on an image, of height and width `like`, fits it upright (else as stored).

    Raises:
        DecodeError: neither fits; or both do, EXIF turns the image, and `frame` does not say which is meant.
    """
    turn, upright = orientation(image), upright_size(image)
    stored = upright[::-1] if turn in _SIDEWAYS else upright
    fits = {"upright": upright == like, "stored": stored == like}
    if not (fits[frame] if frame else any(fits.values())):
        height, width = stored if frame == "stored" else upright
        raise DecodeError(f"has {width} x {height} pixels, what was drawn on it {like[1]} x {like[0]}")
    if turn != 1 and not frame and all(fits.values()):
        raise DecodeError(
            f"is turned by EXIF (orientation {turn}), and what was drawn on it fits both ways; say whether it was "
            "drawn on the upright image or on the stored pixels: --frame upright or --frame stored"
        )
    return fits["upright"] if not frame else frame == "upright"


# -- files -----------------------------------------------------------------------------------------------------------


def open_regular(path: str) -> io.FileIO:
    """An image file, opened to be read; neither a pipe nor a device is touched.

    Raises:
        DecodeError: there is no such file, it cannot be read, is not a regular file, or is longer than MAX_BYTES.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DecodeError("is not a regular file")
        file = open(path, "rb", buffering=0)  # noqa: SIM115, the caller closes it
    except OSError as error:
        raise DecodeError(f"cannot be read: {error.strerror}") from None
    if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
        file.close()
        raise DecodeError(f"has {size} bytes; at most {MAX_BYTES} are read")
    return file


def read_at(file: int, begin: int, size: int) -> bytes:
    """Bytes of an open file.

    Raises:
        DecodeError: they cannot be read, or the file has become shorter.
    """
    try:
        data = os.pread(file, size, begin)
    except OSError as error:
        raise DecodeError(f"cannot be read: {error.strerror}") from None
    if len(data) < size:
        raise DecodeError("cannot be read: the file has become shorter since it was opened")
    return data


@overload
def read_file(path: str) -> bytes: ...


@overload
def read_file(path: str, space: memoryview | None) -> bytes | memoryview: ...


def read_file(path: str, space: memoryview | None = None) -> bytes | memoryview:
    """The bytes of an image file; in `space`, with no new memory, where they fit.

    Raises:
        DecodeError: as `open_regular`.
    """
    try:
        with open_regular(path) as file:
            if space is None:
                return file.read()
            size = 0
            while count := file.readinto(space[size:]):
                size += count
            return space[:size] if size < len(space) else bytes(space) + file.read()
    except OSError as error:
        raise DecodeError(f"cannot be read: {error.strerror}") from None


def file_size(path: str) -> tuple[int, int]:
    """Height and width of an image file, upright, from its header. Raises DecodeError."""
    with open_regular(path) as file:
        return upright_size(_open(file))


def header_size(data: bytes) -> tuple[int, int]:
    """As `file_size`, of a file's bytes."""
    return upright_size(_open(io.BytesIO(data)))


# -- PIL's images ----------------------------------------------------------------------------------------------------


def open_image(data: bytes) -> Image.Image:
    """Checks the structure of an encoded image and reads its header; `to_rgb` decodes the pixels.

    Raises:
        DecodeError: zero bytes, not of FORMATS, truncated, damaged, or too much work (MAX_PIXELS, jpeg.MAX_SCANS).
    """
    if len(data) == 0:
        raise DecodeError("has zero bytes")
    if data.startswith(jpeg.SOI) and (fault := jpeg.scan(data).fault):  # PIL fills some missing parts with gray
        raise DecodeError(fault)
    image = _open(io.BytesIO(data))
    if isinstance(image, PngImagePlugin.PngImageFile):
        try:
            _open(io.BytesIO(data)).verify()  # the checksums of the pixels, which decoding passes over
        except Exception as error:  # as in _open
            raise _damage(error) from None
    return image


def _open(file: BinaryIO | io.FileIO) -> Image.Image:
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        known = file.read(8).startswith(_MAGIC)
        what = "has a truncated or damaged header" if known else f"is not an image ({', '.join(FORMATS)})"
        raise DecodeError(what) from None
    except Image.DecompressionBombError:
        raise DecodeError(f"has absurd dimensions (more than {MAX_PIXELS} pixels)") from None
    except Exception as error:  # PIL's format readers raise whatever their parsing runs into
        raise DecodeError(f"has a damaged header ({_words(error)})") from None
    if image.height * image.width > MAX_PIXELS:
        raise DecodeError(
            f"has absurd dimensions ({image.height} x {image.width}; at most {MAX_PIXELS} pixels are accepted)"
        )
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of `to_rgb(image)`, of an image whose pixels have not been decoded. Raises DecodeError."""
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose `size` is upright already in newer versions of PIL
        width, height = (image.tag_v2[tag] for tag in _TIFF_SIZE)
    return (width, height) if orientation(image) in _SIDEWAYS else (height, width)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none or it is damaged.

    Raises:
        DecodeError: a PNG, whose EXIF may follow its pixels, cannot be decoded.
    """
    if isinstance(image, PngImagePlugin.PngImageFile):
        _load(image)  # here, since getexif's second attempt at damaged data would succeed, with garbage
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1
    return value if value in range(1, 9) else 1


def to_rgb(image: Image.Image, upright: bool = True) -> Image.Image:
    """Any PIL image as 8-bit RGB, upright or as its pixels are stored; see the rules on top.

    Raises:
        DecodeError: the data is truncated or damaged, or its pixels have no defined range (float, 32-bit).
    """
    turn = orientation(image)
    _load(image)
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # which PIL has turned upright itself
        image = image if upright or turn == 1 else image.transpose(_BACK[turn])
    elif upright:
        image = _turned(image, turn)
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise DecodeError("has floating-point pixels, whose range is not defined; store it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise DecodeError("has 32-bit pixels, whose range is not defined; store it with 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    try:
        return (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")
    except ValueError:
        raise DecodeError(f"has pixels of a kind that cannot be shown in RGB (PIL's {image.mode})") from None


def _turned(image: Image.Image, turn: int) -> Image.Image:
    return image.transpose(_UPRIGHT[turn]) if turn != 1 else image


def _load(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # as in _open
        raise _damage(error) from None
    return image


def _damage(error: Exception) -> DecodeError:
    return DecodeError(f"{'is truncated' if 'truncated' in str(error).lower() else 'is damaged'} ({_words(error)})")


def _words(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
