"""The outer structure of a JPEG file, read without decoding a pixel: about a tenth of a millisecond per megabyte.

Source: ITU-T T.81, annex B (markers) and table B.2 (frame header).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SOI = b"\xff\xd8"
_SOF = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # frame headers; the other three share their range
_HUFFMAN_DCT = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive
_SOS, _EOI, _APP1 = 0xDA, 0xD9, 0xE1
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length: TEM, RST0 to RST7, SOI
_LUMA = {(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)}  # samplings of 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # inside a scan: neither a stuffed 0xff nor a restart


@dataclass
class Jpeg:
    """What the markers of a JPEG file say.

    Attributes:
        fault: why the file is broken (truncated, damaged), as the end of a sentence; None where it is whole.
        height, width: in pixels, as stored (before any EXIF rotation).
        common: 8-bit Huffman-coded gray or three components in a usual sampling: every decoder takes it.
        app1: whether there is an APP1 segment, which may hold an EXIF orientation.
    """

    fault: str | None = None
    height: int = 0
    width: int = 0
    common: bool = False
    app1: bool = False


def scan(data: bytes) -> Jpeg:
    """Walks the segments of a JPEG file up to its end-of-image marker; what follows that is ignored."""
    jpeg, at, scans, clean = Jpeg(), len(SOI), 0, data.startswith(SOI)
    while True:
        found = _NEXT_MARKER.search(data, at)
        if not found:
            jpeg.fault = "is truncated (no end-of-image marker)"
            return jpeg
        clean &= scans > 0 or found.start() == at  # stray bytes between two segments
        code, at = data[found.start() + 1], found.end()
        if code == _EOI:
            break
        if code in _ALONE:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        if at + max(length, 2) > len(data):
            jpeg.fault = "is truncated (a segment runs past the end)"
            return jpeg
        if length < 2:
            jpeg.fault = f"is damaged (a segment of length {length} at byte {at})"
            return jpeg
        segment, at = data[at + 2 : at + length], at + length
        if code in _SOF and not jpeg.height and len(segment) >= 6:
            jpeg.height, jpeg.width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
            jpeg.common = code in _HUFFMAN_DCT and segment[0] == 8 and _common_sampling(segment[5], segment[6:])
        jpeg.app1 |= code == _APP1
        scans += code == _SOS
    if not scans or not jpeg.height or not jpeg.width:
        jpeg.fault = "is damaged (no image between start and end)"
    jpeg.common &= clean
    return jpeg


def _common_sampling(count: int, components: bytes) -> bool:
    factors = [(value >> 4, value & 15) for value in components[1 : 3 * count : 3]]
    if count == 1:
        return len(factors) == 1
    return count == 3 == len(factors) and factors[0] in _LUMA and factors[1:] == [(1, 1), (1, 1)]
