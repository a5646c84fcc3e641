"""Encoded bytes → upright RGB pixels, the same way for image folders, .beton files and the converter."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from fastssl.loaders import jpeg

SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"))
"""File names that count as images, in any case."""

MAX_PIXELS = 1 << 27
"""More pixels than this are taken for a damaged header or a decompression bomb (RGB: 384 MiB)."""

_MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P6")
_ORIENTATION = 0x0112
_TIFF_SIZE = (0x0100, 0x0101)  # tags of width and height
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


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


UNKNOWN, JPEG, RAW, FILE_BY_NAME = range(4)


@dataclass(frozen=True)
class Places:
    """Where the bytes of some samples lie, for compiled code that reads them.

    Attributes:
        table: int64 [B, 4], one row per sample: a kind and three numbers:
            UNKNOWN       to be read by Python, which may find that it cannot be
            JPEG, RAW     file descriptor, first byte, bytes; the modes 'jpg' and 'raw' of `Encoded`
            FILE_BY_NAME  0, address of the file's name, 0; the mode 'file'
        names: what the addresses lead to.
    """

    table: np.ndarray
    names: bytes = b""


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
    data = bytes(encoded.data)
    if data.startswith(jpeg.SOI) and (fault := jpeg.scan(data).fault):  # PIL fills some missing parts with gray
        raise DecodeError(fault)
    image = to_rgb(open_image(data), upright=encoded.mode == "file")
    if (image.height, image.width) != size:
        raise DecodeError(f"is {image.height} x {image.width} pixels, but {size[0]} x {size[1]} were promised")
    return np.array(image)


def open_image(data: bytes) -> Image.Image:
    """Reads the header of an encoded image; the pixels are decoded when they are asked for.

    Raises:
        DecodeError: zero bytes, not an image, a damaged header, or more than MAX_PIXELS.
    """
    if len(data) == 0:
        raise DecodeError("has zero bytes")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        known = data.startswith(_MAGIC)
        raise DecodeError("has a truncated or damaged header" if known else "is not an image") from None
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
    """Height and width of `to_rgb(image)`, from the header alone."""
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose `size` is upright already in newer versions of PIL
        width, height = (image.tag_v2[tag] for tag in _TIFF_SIZE)
    return (width, height) if orientation(image) in _SIDEWAYS else (height, width)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none or it is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1
    return value if value in range(1, 9) else 1


def to_rgb(image: Image.Image, upright: bool = True) -> Image.Image:
    """Any PIL image as upright 8-bit RGB: the first frame, 16-bit samples by their high byte, transparency ignored.

    Raises:
        DecodeError: the data is truncated or damaged, or its pixels have no defined range (float, 32-bit).
    """
    try:
        image.load()
        if upright and orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
    except OSError as error:
        reason = "is truncated" if "truncated" in str(error) else "is damaged"
        raise DecodeError(f"{reason} ({_words(error)})") from None
    except Exception as error:  # as in open_image
        raise DecodeError(f"is damaged ({_words(error)})") from None
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise DecodeError("has floating-point pixels, whose range is not defined; store it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise DecodeError("has 32-bit pixels, whose range is not defined; store it with 8 or 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return image.convert("RGB")


def _words(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
