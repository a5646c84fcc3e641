"""The outer structure of a JPEG file, read without decoding a pixel: about a tenth of a millisecond per megabyte.

Source: ITU-T T.81, annex B (markers) and table B.2 (frame header).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

SOI = b"\xff\xd8"
MAX_SCANS = 100
"""A JPEG with more scans (10 are usual in a progressive one) is made to waste time: each goes over all pixels."""
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # frame headers; the other three share their range
_HUFFMAN_DCT = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive
_PROGRESSIVE = 0xC2
_SOS, _EOI, _APP1 = 0xDA, 0xD9, 0xE1
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RST0 to RST7, SOI
_LUMA = {(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)}  # samplings of 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1
_FRAME = struct.Struct(">BHHB")  # precision, height, width, number of components
_NO_MARKER = {0x00, *range(0xD0, 0xD8), 0xFF}  # after 0xff: a stuffed 0xff, a restart, a fill byte
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


@dataclass
class Jpeg:
    """What the markers of a JPEG file say.

    Attributes:
        fault: why the file is bad (truncated, damaged, a bomb), as the end of a sentence; None where it is whole.
        height, width: in pixels, as stored (before any EXIF rotation).
        common: 8-bit Huffman-coded gray or three components in a usual sampling, and nothing behind a single scan:
            every decoder takes it, and takes it alike.
        app1: whether there is an APP1 segment, which may hold an EXIF orientation.
    """

    fault: str | None = None
    height: int = 0
    width: int = 0
    common: bool = False
    app1: bool = False


def scan(data: bytes | memoryview) -> Jpeg:
    """Walks the segments of a JPEG file up to its end-of-image marker; what follows that is ignored."""
    jpeg, at, end, scans, clean = Jpeg(), len(SOI), len(data), 0, data[:2] == SOI
    parts, single = 0, False  # components; whether the first scan has all of them, and all of their data
    while True:
        if at + 1 >= end or data[at] != 0xFF or data[at + 1] in _NO_MARKER:
            found = _NEXT_MARKER.search(data, at)
            if not found:
                jpeg.fault = "is truncated (no end-of-image marker)"
                return jpeg
            clean &= scans > 0  # otherwise, stray bytes between two segments
            at = found.start()
        code, at = data[at + 1], at + 2
        if code == _EOI:
            break
        clean &= not single
        if code in _ALONE:
            continue
        length = data[at] << 8 | data[at + 1] if at + 1 < end else 2
        if at + length > end:
            jpeg.fault = "is truncated (a segment runs past the end)"
            return jpeg
        if length < 2:
            jpeg.fault = f"is damaged (a segment of length {length} at byte {at})"
            return jpeg
        if code == _APP1:
            jpeg.app1 = True
        elif code == _SOS:
            scans += 1
            single |= scans == 1 and parts == (data[at + 2] if length > 2 else 0)
            if scans > MAX_SCANS:
                jpeg.fault = f"has more than {MAX_SCANS} scans (a decompression bomb)"
                return jpeg
        elif code in _SOF and not jpeg.height and length >= 8:
            precision, jpeg.height, jpeg.width, count = _FRAME.unpack_from(data, at + 2)
            components = bytes(data[at + 8 : at + length])
            jpeg.common = code in _HUFFMAN_DCT and precision == 8 and _common_sampling(count, components)
            parts = count if code != _PROGRESSIVE else 0
        at += length
    if not scans or not jpeg.height or not jpeg.width:
        jpeg.fault = "is damaged (no image between start and end)"
    jpeg.common &= clean
    return jpeg


def _common_sampling(count: int, components: bytes) -> bool:
    factors = [(value >> 4, value & 15) for value in components[1 : 3 * count : 3]]
    if count == 1:
        return len(factors) == 1
    return count == 3 == len(factors) and factors[0] in _LUMA and factors[1:] == [(1, 1), (1, 1)]
