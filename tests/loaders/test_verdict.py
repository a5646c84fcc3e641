"""One verdict on every file: which are bad does not depend on who opens them, nor on what of them is looked at."""

import io
import os
import signal
import zlib

import numpy as np
import pytest
from PIL import Image

from fastssl.cli import main
from fastssl.config import View
from fastssl.loaders import batch_pool, jpeg, window_decoder
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.decode import DecodeError, Encoded, Places, decode, open_image, read_picture, upright_size
from fastssl.loaders.engine import make_loader
from fastssl.loaders.loader import Crops
from fastssl.loaders.sources import open_source
from fastssl.loaders.verify import VerifyOptions, verify
from fastssl.loaders.views import evaluation_batches

RNG = np.random.default_rng(0)
PIXELS = np.kron(RNG.integers(0, 255, (12, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8)


def save(kind="JPEG", image=None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(buffer, kind, **options)
    return buffer.getvalue()


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def scans(data: bytes, times: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * times + data[-2:]


CLEAN, RESTARTS, WAVES, PNG = save(quality=90), save(restart_marker_blocks=4), save(progressive=True), save("PNG")
SCAN = CLEAN.index(b"\xff\xda")
PIXEL_DATA = PNG.index(b"IDAT") + 4
SECOND = RESTARTS.index(b"\xff\xd1", RESTARTS.index(b"\xff\xda"))
GOOD = {
    "clean.jpg": CLEAN,
    "extra.jpg": CLEAN[:-2] + b"\x12\x34\x56\xff\xd9",  # stray bytes before the end marker
    "early.jpg": CLEAN[:-122] + b"\xff\xd9",  # the scan's last bytes missing
    "flip.jpg": changed(CLEAN, SCAN + 300, b"\x7e\x55\x3a\x11\x7d\x5b"),
    "restarts.jpg": RESTARTS[:SECOND] + RESTARTS[RESTARTS.index(b"\xff\xd3", SECOND) :],
    "waves.jpg": WAVES,
    "good.png": PNG,
    "deep.png": save("PNG", Image.fromarray((PIXELS[..., 0].astype(np.uint16) << 8) + 7)),
    "animated.webp": save("WEBP", save_all=True, append_images=[Image.new("RGB", (96, 96))]),
    "really.gif.jpg": save("GIF"),
}
WARNED = {"early.jpg", "restarts.jpg"}
BAD = {
    "cut.jpg": CLEAN[:-200],
    "table.jpg": changed(CLEAN, CLEAN.index(b"\xff\xc4") + 5, b"\xff" * 16),
    "marker.jpg": changed(CLEAN, SCAN + 300, b"\xff\x46\0\4\0\0"),  # behind it, no more pixels
    "bomb.jpg": scans(WAVES, jpeg.MAX_SCANS),
    "flip.png": changed(PNG, PIXEL_DATA + 50, bytes([PNG[PIXEL_DATA + 50] ^ 4])),
    "cut.png": PNG[:-20],
    "drawing.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 96\n%%EndComments\nshowpage\n%%EOF\n",
    "float.tif": save("TIFF", Image.new("F", (96, 96))),
    "empty.png": b"",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("verdict")
    for name, data in {**GOOD, **BAD}.items():
        (path / name).write_bytes(data)
    return path


def verdict(look) -> bool:
    try:
        look()
    except DecodeError:
        return False
    return True


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_decoders_agree_wherever_they_look(folder, name):
    data, good = (folder / name).read_bytes(), name in GOOD
    assert verdict(lambda: read_picture(str(folder / name))) == good
    try:
        size = upright_size(open_image(data))
    except DecodeError:
        assert not good
        size = (96, 96)
    encoded = Encoded(np.frombuffer(data, np.uint8), "file", *size)
    assert verdict(lambda: decode(encoded)) == good
    for window in (None, (0, 0, 1, 1), (90, 90, 6, 6), (30, 0, 20, 96)):
        assert verdict(lambda window=window: window_decoder.decode(encoded, window)) == good
    if good:
        top, left, height, width = 61, 20, 30, 40
        found = window_decoder.decode(encoded, (top, left, height, width))
        part = found.pixels[top - found.top :, left - found.left :][:height, :width]
        assert np.array_equal(part, decode(encoded)[top : top + height, left : left + width])


@pytest.mark.parametrize("engine", ["ffcv", "reference"])
def test_engines_conversion_verification_and_evaluation_agree(folder, tmp_path, engine, caplog):
    source = open_source(str(folder))
    views = [View(name="v", size=16, scale=(0.05, 0.2))]  # small crops, which miss most of the damage

    def bad_ones(source):
        with make_loader(engine, source, views, batch_size=4, seed=0, workers=2) as loader:
            for epoch in range(4):
                for _ in loader.epoch(epoch):
                    pass
            return {name.rpartition("/")[2].rpartition(" ")[2] for _, name, _ in loader.bad}

    assert bad_ones(source) == set(BAD)
    result = convert(ConvertOptions(str(folder), str(tmp_path / "a.beton"), max_bad=len(BAD), check="decode"))
    assert {name for name, _ in result.bad} == set(BAD)
    # By its structure alone, a JPEG with a wrong table passes; whoever reads it finds out.
    convert(ConvertOptions(str(folder), str(tmp_path / "b.beton"), max_bad=len(BAD)))
    stored = open_source(str(tmp_path / "b.beton"))
    report = verify(VerifyOptions(str(tmp_path / "b.beton")))
    assert bad_ones(stored) == {problem.source for problem in report.problems} == {"table.jpg"}
    if window_decoder.works():
        assert {name for name, _ in result.warned} == {problem.source for problem in report.warned} == WARNED
    unusable = []
    for i in range(len(stored)):
        try:
            list(evaluation_batches(stored, size=8, resize=96, batch_size=1, ids=[i]))
        except RuntimeError:
            unusable.append(stored.name(i).rpartition(" ")[2])
    assert unusable == ["table.jpg"]


def test_every_flipped_bit_of_a_png_is_seen():
    """Also those whose second decoding would succeed, with garbage."""
    for at in np.linspace(PIXEL_DATA, len(PNG) - 17, 120).astype(int):
        data = changed(PNG, at, bytes([PNG[at] ^ 1 << at % 8]))
        for look in (lambda d=data: upright_size(open_image(d)), lambda d=data: decode(Encoded(d, "file", 96, 96))):
            with pytest.raises(DecodeError, match=r"is (damaged|truncated)"):
                look()


def test_sixteen_bits_are_the_same_picture_everywhere(folder, tmp_path):
    expected = np.repeat(PIXELS[..., :1], 3, 2)
    assert np.array_equal(read_picture(str(folder / "deep.png")), expected)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "deep.png").write_bytes(GOOD["deep.png"])
    convert(ConvertOptions(str(tmp_path / "in"), str(tmp_path / "a.beton"), mode="raw"))
    assert np.array_equal(decode(open_source(str(tmp_path / "a.beton")).read(0)), expected)


@pytest.mark.parametrize("what", ["pipe", "link to a device", "absurdly long"])
def test_neither_pipes_nor_devices_are_waited_for(tmp_path, what):
    (tmp_path / "in").mkdir()
    for k in range(3):
        (tmp_path / "in" / f"{k}.jpg").write_bytes(CLEAN)
    odd = tmp_path / "in" / "odd.jpg"
    if what == "pipe":
        os.mkfifo(odd)
    elif what == "absurdly long":
        odd.touch()
        os.truncate(odd, 1 << 40)
    else:
        odd.symlink_to("/dev/zero")
    signal.alarm(30)  # a hang is a failure
    try:
        source = open_source(str(tmp_path / "in"))
        for engine in ("ffcv", "reference"):
            with make_loader(engine, source, [View(name="v", size=16)], batch_size=2, seed=0) as loader:
                assert [len(batch) for epoch in range(2) for batch in loader.epoch(epoch)] == [2] * 4
            assert [os.path.basename(name) for _, name, _ in loader.bad] == ["odd.jpg"]
        assert [name for name, _ in convert(ConvertOptions(str(tmp_path / "in"), str(tmp_path / "a.beton"), max_bad=1)).bad] == ["odd.jpg"]  # fmt: skip  # noqa: E501
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("engine", ["ffcv", "reference"])
def test_several_broken_images_in_a_small_set(tmp_path, engine):
    """The replacement of a replacement may be the wanted sample again, with the boxes of the one in between."""
    for k in range(12):
        data = save(image=Image.fromarray(RNG.integers(0, 255, ((320, 80) if k % 2 else (80, 320)), np.uint8)))
        (tmp_path / f"{k:02}.jpg").write_bytes(data if k % 3 else data[: len(data) // 2])
    source, views = open_source(str(tmp_path)), [View(name="v", size=8)]
    for seed in (5, 7):  # in epoch 1 it happens
        with make_loader(engine, source, views, batch_size=4, seed=seed, workers=1) as loader:
            seen = [i for epoch in range(2) for batch in loader.epoch(epoch) for i in batch.id.tolist()]
            assert len(seen) == 2 * 12
        assert not any(i % 3 == 0 for i in seen)
        assert [i for i, _, _ in loader.bad] == [0, 3, 6, 9]


@pytest.mark.parametrize("engine", ["ffcv", "reference"])
@pytest.mark.parametrize("parts", [False, True])
def test_a_flipped_bit_of_a_stored_jpeg_is_seen_when_read(tmp_path, engine, parts):
    """Decoders see few of them."""
    for k in range(4):
        for sub in ("in", "maps"):
            (tmp_path / sub / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "a" / f"{k}.jpg").write_bytes(CLEAN)
        np.save(tmp_path / "maps" / "a" / f"{k}.npy", np.full((2, 3, 3), k, np.uint8))
    beton = tmp_path / "a.beton"
    convert(ConvertOptions(str(tmp_path / "in"), str(beton), parts=str(tmp_path / "maps") if parts else ""))
    opened = open_source(str(beton)).beton
    at = int(opened.rows["f0"]["data_ptr"][2]) + len(CLEAN) // 2
    with open(beton, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 16]))
    source = open_source(str(beton))
    grid = {"v": 2} if parts else None
    with make_loader(engine, source, [View(name="v", size=16)], batch_size=4, seed=0, part_grid=grid) as loader:
        (batch,) = loader.epoch(0)
    assert [(i, reason) for i, _, reason in loader.bad] == [
        (2, "has a wrong checksum: its bytes are not those that were written")
    ]
    assert 2 not in batch.id.tolist()


def test_checksums_in_c_are_zlibs():
    pool = batch_pool.start(1)
    if pool is None:
        pytest.skip("fastssl.loaders._window was not built")
    with open("/proc/self/exe", "rb") as file:
        sizes = [1, 7, 8, 9, 4099]
        table = np.array([[1, file.fileno(), 5, size] for size in sizes], np.int64)
        out, crc32 = np.empty((5, 1, 3, 4, 4), np.uint8), np.zeros(5, np.int64)
        group = Crops(View(name="v", size=4), np.tile([0, 0, 4, 4], (5, 1, 1)), np.zeros((5, 1), bool), out)
        four = np.full(5, 4)
        assert not pool.fill(Places(table), four, four, [group], crc32=crc32).any()
        pool.close()
        assert crc32.tolist() == [zlib.crc32(os.pread(file.fileno(), size, 5)) for size in sizes]


@pytest.mark.parametrize(("turn", "sides"), [(1, (6, 9)), (3, (6, 9)), (6, (6, 9)), (6, (8, 8))])
def test_what_was_drawn_on_a_picture_and_the_picture_stay_together(tmp_path, turn, sides):
    """`sides`: height and width as stored."""
    stored = np.zeros(sides, np.uint8)
    stored[0, 0] = 255  # one bright corner
    exif = Image.Exif()
    exif[0x0112] = turn
    upright = {1: stored, 3: stored[::-1, ::-1], 6: np.rot90(stored, -1)}[turn]
    for kind, more in (("PNG", {}), ("TIFF", {}), ("JPEG", {"quality": 95, "subsampling": 0})):
        path = tmp_path / kind
        path.write_bytes(save(kind, Image.fromarray(stored), exif=exif, **more))

        def corner(like=None, frame="", path=str(path)):
            bright = read_picture(path, like, frame)[..., 0] > 128
            return (bright.shape, np.flatnonzero(bright).tolist())

        def where(pixels):
            return (pixels.shape, np.flatnonzero(pixels).tolist())

        assert corner() == where(upright)
        assert corner(upright.shape, "upright") == where(upright)
        assert corner(stored.shape, "stored") == where(stored)
        if turn == 1 or upright.shape != stored.shape:
            assert corner(upright.shape) == where(upright)
            assert corner(stored.shape) == where(stored)
        else:
            with pytest.raises(DecodeError, match=rf"turned by EXIF \(orientation {turn}\).* --frame stored"):
                corner(stored.shape)
        with pytest.raises(DecodeError, match=r"pixels, what was drawn on it 3 x 3"):
            corner((3, 3))


def test_no_terminal_escapes_are_printed(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "a\x1b[31mb")]) == 1
    assert "a\\x1b[31mb names no .beton file" in capsys.readouterr().err
