"""Fast decoding: the pixels of `fastssl.loaders.decode.decode`, of no more of the image than is needed.

The work is done by `_window.c`, a small file on libjpeg-turbo that is built at installation where a C compiler and
jpeglib.h are found. It decodes a window and stops after its last row, without Python's lock. Where it was not built,
and for what is not a usual JPEG, `images.decode` decodes the whole image (PIL; the same pixels).
"""

from __future__ import annotations

import ctypes
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fastssl.loaders import decode as images
from fastssl.loaders.decode import DecodeError, Encoded

Window = tuple[int, int, int, int]
"""(top, left, height, width) in pixels of the image."""

_DECODED, _LEFT_TO_OTHERS, _HAS_APP1 = 0, 2, 3  # what the C function returns
_SLACK = 64  # columns that it may write beside the window: whole blocks (up to 32 columns) and a margin
_MESSAGE_BYTES = 200


@dataclass(frozen=True)
class Decoded:
    """A part of an image, at least the part that was asked for.

    Attributes:
        pixels: uint8 [h, w, 3], RGB; read only where it is a view of the stored data.
        top, left: where its first pixel lies in the image.
        warning: libjpeg's first one: some pixels may be missing or wrong. Empty where there was none, or PIL decoded.
    """

    pixels: np.ndarray
    top: int = 0
    left: int = 0
    warning: str = ""


def decode(encoded: Encoded, window: Window | None = None) -> Decoded:
    """The pixels of a sample, or at least those of a window of it; upright, RGB.

    Whether a file is good does not depend on the window.

    Raises:
        DecodeError: as for `fastssl.loaders.decode.decode`.
        ValueError: the window does not lie in the image.
    """
    height, width = encoded.height, encoded.width
    if min(height, width) < 1:
        raise DecodeError(f"has no pixels ({height} x {width} were promised)")
    top, left, h, w = wanted = (0, 0, height, width) if window is None else tuple(map(int, window))
    if not (top >= 0 <= left and 0 < h <= height - top and 0 < w <= width - left):
        raise ValueError(f"the window {wanted} (top, left, height, width) does not lie in {height} x {width} pixels")
    if encoded.mode == "raw" and encoded.data.size == height * width * 3:
        return Decoded(encoded.data.reshape(height, width, 3))
    usual = _library and encoded.mode != "raw" and height * width <= images.MAX_PIXELS
    found = _decode_window(encoded, (top, left, h, w)) if usual else None
    return found or Decoded(images.decode(encoded))


def _decode_window(encoded: Encoded, window: Window) -> Decoded | None:
    """None where `images.decode` has to say what this is."""
    code, found = _call(encoded, window, encoded.mode == "jpg")
    if code == _HAS_APP1 and _is_upright(encoded):
        code, found = _call(encoded, window, True)
    return found


def _call(encoded: Encoded, window: Window, as_stored: bool) -> tuple[int, Decoded | None]:
    assert _library is not None
    top, _, height, width = window
    data = np.ascontiguousarray(encoded.data)
    buffer = np.empty(height * min(width + _SLACK, encoded.width) * 3, np.uint8)
    place, message = (ctypes.c_int64 * 4)(*window), ctypes.create_string_buffer(_MESSAGE_BYTES)
    code = _library(
        data.ctypes.data, data.size, encoded.height, encoded.width, as_stored,
        place, buffer.ctypes.data, buffer.size, message,
    )  # fmt: skip
    if code != _DECODED:
        return code, None
    pixels = buffer[: height * place[3] * 3].reshape(height, place[3], 3)
    return code, Decoded(pixels, top, place[1], message.value.decode(errors="replace"))


def _is_upright(encoded: Encoded) -> bool:
    return images.orientation(images.open_image(bytes(encoded.data))) == 1


def load(name: str) -> Any:
    """A C function of `_window`; None where it was not built or cannot be loaded."""
    spec = importlib.util.find_spec("fastssl.loaders._window")
    if not spec or not spec.origin:
        return None
    try:
        return getattr(ctypes.CDLL(spec.origin), name)
    except (OSError, AttributeError):
        return None


def works() -> bool:
    """Whether the C functions of `_window` are there and decode as PIL does."""
    return _library is not None


def _load() -> Callable[..., int] | None:
    function = load("fastssl_decode_window")
    if not function:
        return None
    address, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    function.argtypes = [address, size, number, number, ctypes.c_int, address, address, size, address]
    return function


def _works() -> bool:
    """Whether `_library` decodes as PIL does; it may have met another libjpeg than the one it was built for."""
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    encoded = Encoded(np.frombuffer(buffer.getvalue(), np.uint8), "jpg", 70, 90)
    whole = images.decode(encoded).astype(np.int64)
    for top, left, height, width in ((0, 0, 70, 90), (37, 51, 9, 13), (1, 17, 40, 1)):
        found = _decode_window(encoded, (top, left, height, width))
        if not found:
            return False
        part = found.pixels[:, left - found.left :][:, :width]
        if np.abs(part - whole[top : top + height, left : left + width]).max() > 2:
            return False
    return True


_library = _load()
if _library and not _works():
    _library = None
