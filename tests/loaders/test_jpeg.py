import io

import numpy as np
import pytest
from PIL import Image

from fastssl.loaders.jpeg import scan


def jpeg(height=40, width=56, mode="RGB", **options) -> bytes:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        jpeg(),
        jpeg(mode="L"),
        jpeg(progressive=True),
        jpeg(subsampling=0),
        jpeg(subsampling=1),
        jpeg(restart_marker_blocks=3),
        jpeg(comment=b"\xff\xd9 an end marker inside a segment"),
        jpeg() + b"bytes after the end",
    ],
    ids=["baseline", "gray", "progressive", "444", "422", "restarts", "comment", "trailing"],
)
def test_a_whole_common_jpeg(data):
    for form in (data, memoryview(data)):
        found = scan(form)
        assert (found.fault, found.height, found.width, found.common) == (None, 40, 56, True)


def test_every_truncation_is_seen():
    for data in (jpeg(24, 16), jpeg(24, 16, progressive=True)):
        for length in range(2, len(data)):
            fault = scan(data[:length]).fault
            assert fault is not None, length
            assert fault.startswith("is truncated"), length


def test_zeros_in_place_of_the_second_half_are_seen():
    data = jpeg(200, 200)
    assert scan(data[: len(data) // 2] + bytes(len(data) // 2)).fault == "is truncated (no end-of-image marker)"


def test_segment_without_length_is_damage():
    assert "segment of length 0 at byte 4" in scan(b"\xff\xd8\xff\xe0\0\0" + jpeg()[2:]).fault


def test_end_without_image_is_damage():
    assert scan(b"\xff\xd8\xff\xd9").fault == "is damaged (no image between start and end)"


def test_uncommon_jpegs_are_not_common():
    assert not scan(jpeg(mode="CMYK")).common
    stray = jpeg()
    assert scan(stray[:2] + b"stray" + stray[2:]) == scan(stray).__class__(None, 40, 56, False)
    frame = stray.index(b"\xff\xc0")
    for at, value in ((4, 12), (11, 0x14), (13, 0x21)):  # precision; samplings of luma (1 x 4), of blue (2 x 1)
        changed = bytearray(stray)
        changed[frame + at + (at > 11)] = value
        assert not scan(bytes(changed)).common, at


def test_app1_is_reported():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert scan(jpeg(exif=exif)).app1
    assert not scan(jpeg()).app1
