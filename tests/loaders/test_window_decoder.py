import io
import resource
import threading

import numpy as np
import pytest
from PIL import Image

from fastssl.loaders import decode as images
from fastssl.loaders import jpeg, window_decoder
from fastssl.loaders.decode import DecodeError, Encoded
from fastssl.loaders.window_decoder import decode

needs_library = pytest.mark.skipif(not window_decoder._library, reason="fastssl.loaders._window was not built")


@pytest.fixture(params=["_window", "PIL"])
def way(request, monkeypatch):
    """Both ways of decoding, whatever this machine prefers."""
    if request.param == "PIL":
        monkeypatch.setattr(window_decoder, "_library", None)
    elif not window_decoder._library:
        pytest.skip("fastssl.loaders._window was not built")
    return request.param


def picture_of(height, width, seed=0):
    """Coarse shapes with some noise, so that neighbouring blocks differ."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), np.uint8))
    pixels = np.asarray(coarse.resize((width, height))).astype(int) + rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def stored(data, mode="jpg"):
    with Image.open(io.BytesIO(data)) as image:
        height, width = images.upright_size(image) if mode == "file" else image.size[::-1]
    return Encoded(np.frombuffer(data, np.uint8), mode, height, width)


def frame_header(data):
    """Where precision, height, width and components stand."""
    return next(data.index(code) + 4 for code in (b"\xff\xc0", b"\xff\xc2") if code in data)


def with_sampling(data, height, width, sampling):
    """The same blocks under another frame header: another picture, but a valid file."""
    at, changed = frame_header(data), bytearray(data)
    changed[at + 1 : at + 5] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    changed[at + 7] = sampling
    return bytes(changed)


KINDS = {
    "444": save(picture_of(75, 101), quality=90, subsampling=0),
    "422": save(picture_of(75, 101), quality=90, subsampling=1),
    "420": save(picture_of(75, 101), quality=90, subsampling=2),
    "440": with_sampling(save(picture_of(80, 96), subsampling=1), 96, 80, 0x12),
    "411": with_sampling(save(picture_of(80, 96), subsampling=2), 40, 192, 0x41),
    "even": save(picture_of(64, 96), quality=75),
    "gray": save(picture_of(75, 101).convert("L"), quality=90),
    "progressive": save(picture_of(75, 101), progressive=True),
    "restarts": save(picture_of(75, 101), restart_marker_blocks=3, optimize=True),
    "small": save(picture_of(3, 5)),
    "one": save(picture_of(1, 1)),
    "long": save(picture_of(2, 400)),
    "tall": save(picture_of(400, 2)),
    "rgb": save(picture_of(75, 101), keep_rgb=True),
}


def windows(height, width, count=40):
    rng = np.random.default_rng(height * width)
    for _ in range(count):
        h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
        yield rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w


# ---- the same pixels


@pytest.mark.parametrize("kind", KINDS)
def test_whole_images_are_those_of_the_reference(way, kind):
    encoded = stored(KINDS[kind])
    found = decode(encoded)
    assert (found.top, found.left, found.pixels.dtype) == (0, 0, np.uint8)
    assert found.pixels.flags.c_contiguous
    assert np.array_equal(found.pixels, images.decode(encoded))


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_parts_of_the_whole(way, kind):
    encoded = stored(KINDS[kind])
    whole = images.decode(encoded)
    for top, left, height, width in windows(*whole.shape[:2]):
        found = decode(encoded, (top, left, height, width))
        part = found.pixels[top - found.top :, left - found.left :][:height, :width]
        assert np.array_equal(part, whole[top : top + height, left : left + width]), (top, left, height, width)


@needs_library
def test_no_more_is_decoded_than_is_needed():
    encoded = stored(save(picture_of(400, 600)))
    for top, left, height, width in ((0, 0, 400, 600), (100, 200, 50, 60), (399, 599, 1, 1), (0, 300, 400, 5)):
        found = decode(encoded, (top, left, height, width))
        assert found.top == top
        assert len(found.pixels) == height
        assert 0 <= left - found.left <= 16 + 4
        assert found.pixels.shape[1] <= width + (left - found.left) + 4


@needs_library
def test_no_usual_kind_is_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(images, "decode", None)
    for data in KINDS.values():
        decode(stored(data))


def test_data_may_be_any_view(way, monkeypatch):
    data = KINDS["420"]
    apart = np.repeat(np.frombuffer(data, np.uint8), 2)[::2]
    expected = images.decode(stored(data))
    if way == "_window":
        monkeypatch.setattr(images, "decode", None)
    assert np.array_equal(decode(Encoded(apart, "jpg", 75, 101)).pixels, expected)


# ---- what is left to the reference


def test_other_files_are_decoded_too(way):
    image = picture_of(40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (
        save(image, "PNG"),
        save(image.convert("CMYK"), quality=95),
        save(image, "WEBP", lossless=True),
        save(image, exif=exif),
        b"\xff\xd8\xff\xff" + save(image)[2:],
    ):
        for mode in ("file", "jpg"):
            encoded = stored(data, mode)
            found = decode(encoded, (1, 2, 3, 4))
            part = found.pixels[1 - found.top :, 2 - found.left :][:3, :4]
            assert np.array_equal(part, images.decode(encoded)[1:4, 2:6])


@needs_library
def test_upright_files_with_exif_are_not_left_to_the_reference(monkeypatch):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    encoded = stored(save(picture_of(40, 60), exif=exif), "file")
    expected = images.decode(encoded)
    monkeypatch.setattr(images, "decode", None)
    assert np.array_equal(decode(encoded).pixels, expected)


@pytest.mark.parametrize("orientation", [2, 3, 8])
def test_turned_files_are_shown_upright_but_not_those_of_a_beton(way, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain, encoded = save(picture_of(40, 60)), stored(save(picture_of(40, 60), exif=exif), "file")
    upright = images.decode(encoded)
    assert upright.shape == ((60, 40, 3) if orientation == 8 else (40, 60, 3))
    assert np.array_equal(decode(encoded).pixels, upright)
    assert np.array_equal(decode(Encoded(encoded.data, "jpg", 40, 60)).pixels, images.decode(stored(plain)))


def test_raw_pixels_are_not_copied(way):
    data = np.arange(4 * 5 * 3, dtype=np.uint8)
    found = decode(Encoded(data, "raw", 4, 5), (1, 1, 2, 2))
    assert np.shares_memory(found.pixels, data)
    assert np.array_equal(found.pixels, data.reshape(4, 5, 3))
    assert (found.top, found.left) == (0, 0)


@pytest.mark.parametrize(
    "window", [(-1, 0, 2, 2), (0, -1, 2, 2), (0, 0, 0, 2), (0, 0, 2, 0), (39, 0, 2, 2), (0, 59, 2, 2), (0, 0, 41, 60)]
)
def test_windows_outside_the_image(way, window):
    with pytest.raises(ValueError, match="does not lie in 40 x 60 pixels"):
        decode(stored(save(picture_of(40, 60))), window)


# ---- damage


def reference_error(encoded):
    with pytest.raises(DecodeError) as caught:
        images.decode(encoded)
    return str(caught.value)


def test_faults_have_the_words_of_the_reference(way, capfd):
    good = KINDS["420"]
    begin = good.index(b"\xff\xda")
    large = bytearray(good)
    large[frame_header(good) + 1 : frame_header(good) + 5] = b"\xea\x60" * 2
    faulty = [
        Encoded(np.frombuffer(data, np.uint8), mode, height, width)
        for data, mode, height, width in (
            (b"", "jpg", 75, 101),
            (b"\xff\xd8", "jpg", 75, 101),
            (good[:1000], "jpg", 75, 101),
            (good[:-2], "jpg", 75, 101),
            (good[: begin + 4], "jpg", 75, 101),
            (good[:begin] + b"\xff\xd9", "jpg", 75, 101),
            (good[:2] + b"\xff\xe0\x00\x01" + good[2:], "jpg", 75, 101),
            (good, "jpg", 75, 100),
            (good, "file", 101, 75),
            (good, "raw", 75, 101),
            (bytes(large), "jpg", 60000, 60000),
            (b"not an image at all", "file", 75, 101),
        )
    ]
    for encoded in faulty:
        for window in (None, (0, 0, 1, 1)):
            with pytest.raises(DecodeError) as caught:
                decode(encoded, window)
            assert str(caught.value) == reference_error(encoded)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_no_pixels_promised(way, mode):
    with pytest.raises(DecodeError, match=r"has no pixels \(0 x 5 were promised\)"):
        decode(Encoded(np.zeros(0, np.uint8), mode, 0, 5), (0, 0, 1, 1))


@needs_library
def test_missing_data_is_warned_of(capfd):
    good = save(picture_of(200, 200), quality=95)
    begin, end = good.index(b"\xff\xda") + 14, len(good) - 2
    half = (begin + end) // 2
    short = stored(good[:half] + good[end:])
    assert jpeg.scan(bytes(short.data)).fault is None
    found = decode(short)
    assert found.warning == "Corrupt JPEG data: premature end of data segment"
    assert np.array_equal(found.pixels, images.decode(short))
    upper = decode(short, (0, 0, 60, 200))  # that part is there
    assert np.array_equal(upper.pixels, images.decode(stored(good))[:60])
    assert upper.warning == ""
    assert capfd.readouterr() == ("", "")


def test_stray_bytes_do_no_harm(way, capfd):
    good = KINDS["420"]
    encoded = stored(good[:-2] + b"stray" + good[-2:] + b"more")
    assert np.array_equal(decode(encoded).pixels, images.decode(stored(good)))


def test_garbage_never_does_worse_than_an_error(way, monkeypatch):
    """Bytes changed at random: an image of the promised size or a DecodeError; structural faults are always seen."""
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for data in (KINDS["420"], KINDS["progressive"], KINDS["restarts"], KINDS["gray"]):
        size = stored(data)
        for k in range(150):
            changed = np.frombuffer(data, np.uint8).copy()
            reach = len(data) if k % 2 else 700  # every other time in the headers
            changed[rng.integers(2, reach, rng.integers(1, 4))] = rng.integers(0, 256)
            encoded = Encoded(changed, "jpg", size.height, size.width)
            try:
                found = decode(encoded, (20, 30, 10, 20))
            except DecodeError:
                outcomes[False] += 1
            else:
                outcomes[True] += 1
                assert found.top <= 20
                assert found.left <= 30
                assert found.top + found.pixels.shape[0] >= 30
                assert found.left + found.pixels.shape[1] >= 50
                assert jpeg.scan(changed.tobytes()).fault is None
    assert min(outcomes.values()) > 100


@needs_library
def test_the_walk_over_segments_finds_what_scan_finds(monkeypatch):
    """Random markers in a file; the same verdict from both."""
    calls = []
    rng = np.random.default_rng(1)
    good = KINDS["420"]
    for _ in range(2000):
        changed = np.frombuffer(good, np.uint8).copy()
        begin = len(good) // 2 if rng.random() < 0.3 else 0
        at = rng.integers(begin, len(good) - 4)
        at = good.index(b"\xff", at) if rng.random() < 0.5 else at  # most of the data means nothing to the walk
        at = min(at, len(good) - 4)
        changed[at : at + 4] = rng.choice([0, 0, 1, 17, 0xC0, 0xC4, 0xD3, 0xD9, 0xDA, 0xE1, 0xFE, 0xFF, 0xFF, 0xFF], 4)
        code, _ = window_decoder._call(Encoded(changed, "file", 75, 101), (0, 0, 75, 101), False)
        seen = jpeg.scan(changed.tobytes())
        if seen.fault:
            assert code == window_decoder._LEFT_TO_OTHERS
        elif seen.common:  # otherwise, stray bytes may be left to others
            assert code != window_decoder._HAS_APP1 or seen.app1
        calls.append((code, bool(seen.fault), seen.app1))
    assert {(0, False, False), (2, True, False)} <= set(calls)


@needs_library
def test_failures_leave_no_memory_behind():
    good = save(picture_of(300, 300), progressive=True)
    begin, end = good.index(b"\xff\xda") + 14, len(good) - 2
    bad = [
        stored(good[: (begin + end) // 2] + good[end:]),
        Encoded(np.frombuffer(good, np.uint8), "jpg", 300, 299),
        stored(good),
    ]

    def rounds(count):
        for _ in range(count):
            for encoded in bad:
                window_decoder._call(encoded, (0, 0, 300, 299), True)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before = rounds(20)
    assert rounds(150) - before < 10  # MiB; one decoder's coefficients take 0.5


# ---- in a loader


def test_threads_do_not_meet(way):
    encoded = [stored(save(picture_of(60 + k, 90, k))) for k in range(6)]
    expected = [images.decode(one) for one in encoded]
    wrong = []

    def work(k):
        for _ in range(30):
            found = decode(encoded[k], (10, 20, 30, 40))
            if not np.array_equal(
                found.pixels[10 - found.top :, 20 - found.left :][:30, :40], expected[k][10:40, 20:60]
            ):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not window_decoder._load(), reason="fastssl.loaders._window was not built")
def test_a_library_that_was_built_works():
    assert window_decoder._library


@needs_library
def test_no_byte_is_written_where_the_pixels_do_not_fit():
    data, buffer = np.frombuffer(KINDS["420"], np.uint8), np.full(30 * 40 * 3, 77, np.uint8)
    place, message = np.array([20, 30, 30, 40]), np.zeros(200, np.uint8)
    arguments = (data.ctypes.data, data.size, 75, 101, 1, place.ctypes.data, buffer.ctypes.data)
    assert window_decoder._library(*arguments, buffer.size, message.ctypes.data) == window_decoder._LEFT_TO_OTHERS
    assert (buffer == 77).all()


@needs_library
def test_a_library_that_does_not_work_is_not_used(monkeypatch):
    right = window_decoder._library
    assert window_decoder._works()

    def shifted(*arguments):
        code = right(*arguments)
        arguments[5][1] += 1
        return code

    for wrong in (lambda *_: 1, lambda *_: 2, shifted):
        monkeypatch.setattr(window_decoder, "_library", wrong)
        assert not window_decoder._works()


def test_missing_or_foreign_libraries_are_passed_over(monkeypatch, tmp_path):
    (tmp_path / "x.so").write_bytes(b"no library")
    for spec in (None, type("Spec", (), {"origin": str(tmp_path / "x.so")})):
        monkeypatch.setattr(window_decoder.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert window_decoder._load() is None
