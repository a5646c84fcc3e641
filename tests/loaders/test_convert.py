import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastssl.config import ConfigError, View
from fastssl.loaders import beton_writer, convert
from fastssl.loaders.beton import Beton
from fastssl.loaders.convert import ConvertError, ConvertOptions
from fastssl.loaders.engine import make_loader, working_engines
from fastssl.loaders.sources import decode, open_source
from fastssl.loaders.verify import VerifyOptions, verify


def smooth(height=40, width=60, seed=0) -> Image.Image:
    """A picture without fine grain, so that JPEG keeps it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save(path, image=None, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or smooth()).save(path, **options)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def run(src, dst, **options):
    return convert.convert(ConvertOptions(str(src), str(dst), **{"workers": 2, **options}))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """100 images in 3 classes: JPEGs that fit, JPEGs that do not, and PNGs."""
    folder = tmp_path_factory.mktemp("many")
    for k in range(100):
        ending, side = ("png", 40) if k % 10 == 9 else ("jpg", 90 if k % 7 == 0 else 60)
        save(folder / f"class {k % 3}" / f"{k:03d}.{ending}", smooth(width=side, seed=k))
    return folder


# -- what is copied, what is re-encoded ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 20}, {"comment": b"x" * 100}, {"exif": exif(1)}],
    ids=["baseline", "progressive", "444", "low quality", "comment", "upright EXIF"],
)
def test_a_jpeg_that_fits_is_copied_byte_for_byte(tmp_path, options):
    save(tmp_path / "in" / "a.jpg", **options)
    save(tmp_path / "in" / "gray.jpg", smooth().convert("L"))
    result = run(tmp_path / "in", tmp_path / "a.beton", max_resolution=60)
    beton = Beton(tmp_path / "a.beton")
    for i, name in enumerate(("a.jpg", "gray.jpg")):
        assert beton.image(i).data.tobytes() == (tmp_path / "in" / name).read_bytes()
        assert (beton.image(i).mode, beton.image(i).height, beton.image(i).width) == ("jpg", 40, 60)
    assert (result.images, result.copied, result.bad) == (2, 2, [])


STRAY = io.BytesIO()
smooth().save(STRAY, "JPEG")
REENCODED = {
    "gray.png": {"image": smooth().convert("L")},
    "sixteen.png": {"image": Image.fromarray(np.asarray(smooth().convert("L")).astype(np.uint16) * 257)},
    "palette.png": {"image": smooth().quantize(64), "transparency": 3},
    "alpha.png": {"image": smooth().convert("RGBA")},
    "web.webp": {"lossless": True},
    "bitmap.bmp": {},
    "first.gif": {"save_all": True, "append_images": [smooth(seed=9)]},
    "tagged.tif": {},
    "cmyk.jpg": {"image": smooth().convert("CMYK")},
    **{f"turned{k}.jpg": {"exif": exif(k), "quality": 95} for k in range(2, 9)},
}


@pytest.mark.parametrize("name", REENCODED)
def test_everything_else_shows_the_same_picture_upright(tmp_path, name):
    save(tmp_path / "in" / name, **{"image": smooth(), **REENCODED[name]})
    result = run(tmp_path / "in", tmp_path / "a.beton", quality=95)
    assert result.copied == 0
    folder, beton = open_source(str(tmp_path / "in")), open_source(str(tmp_path / "a.beton"))
    assert beton.read(0).mode == "jpg"
    assert [side.tolist() for side in beton.sizes([0])] == [side.tolist() for side in folder.sizes([0])]
    difference = np.abs(decode(folder.read(0)).astype(int) - decode(beton.read(0)))
    assert difference.mean() < 8  # two different pictures: about 60
    stored = Image.open(io.BytesIO(beton.read(0).data.tobytes()))
    assert (stored.mode, stored.getexif().get(0x0112)) == ("RGB", None)


def test_a_jpeg_with_stray_bytes_is_written_anew(tmp_path):
    data = STRAY.getvalue()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(data[:20] + b"stray" + data[20:])  # behind the first segment
    assert run(tmp_path / "in", tmp_path / "a.beton").copied == 0
    assert verify(VerifyOptions(str(tmp_path / "a.beton"))).ok


def test_large_images_shrink_to_the_limit(tmp_path):
    save(tmp_path / "in" / "a.jpg", smooth(300, 800), quality=95)
    save(tmp_path / "in" / "b.png", smooth(101, 33))
    save(tmp_path / "in" / "c.jpg", smooth(50, 100))
    save(tmp_path / "in" / "d.jpg", smooth(300, 800), quality=95, exif=exif(6))
    save(tmp_path / "in" / "e.png", smooth(1, 400))
    result = run(tmp_path / "in", tmp_path / "a.beton", max_resolution=100, quality=95)
    source = open_source(str(tmp_path / "a.beton"))
    assert [side.tolist() for side in source.sizes(np.arange(5))] == [[38, 100, 50, 100, 1], [100, 33, 100, 38, 100]]
    assert result.copied == 1
    exact = np.asarray(smooth(300, 800).resize((100, 38), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(decode(source.read(0)) - exact).mean() < 3
    assert np.abs(decode(source.read(3)) - np.rot90(exact, -1)).mean() < 3


def test_raw_and_proportion(tmp_path, many):
    run(many, tmp_path / "raw.beton", mode="raw")
    raw, folder = open_source(str(tmp_path / "raw.beton")), open_source(str(many))
    for i in range(len(folder)):
        assert raw.read(i).mode == "raw"
        assert np.array_equal(decode(raw.read(i)), decode(folder.read(i)))
    counts = []
    for fraction in (0.0, 0.3, 1.0):
        run(many, tmp_path / "part.beton", mode="proportion", raw_fraction=fraction, overwrite=True)
        part = open_source(str(tmp_path / "part.beton"))
        counts.append(sum(part.read(i).mode == "raw" for i in range(len(part))))
    assert counts[0] == 0
    assert 15 < counts[1] < 45
    assert counts[2] == 100


# -- squashed images -------------------------------------------------------------------------------------------------


def test_squashed_images_are_those_that_the_loader_would_make(tmp_path):
    save(tmp_path / "in" / "a.jpg", smooth(300, 500))
    save(tmp_path / "in" / "b.png", smooth(20, 33).convert("L"))
    save(tmp_path / "in" / "c.jpg", smooth(90, 50), exif=exif(6))
    save(tmp_path / "in" / "d.jpg", smooth(48, 48), quality=70)
    save(tmp_path / "in" / "e.jpg", smooth(48, 48), exif=exif(3))
    folder = open_source(str(tmp_path / "in"))
    for mode in ("raw", "jpg"):
        result = run(tmp_path / "in", tmp_path / f"{mode}.beton", mode=mode, squash=48, quality=95)
        source = open_source(str(tmp_path / f"{mode}.beton"))
        assert [side.tolist() for side in source.sizes(np.arange(5))] == [[48] * 5] * 2
        assert result.copied == (mode == "jpg")  # d.jpg
        for i in range(5):
            whole = Image.fromarray(decode(folder.read(i)))
            expected = np.asarray(whole.resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
            difference = np.abs(decode(source.read(i)) - expected)
            assert difference.max() == 0 if mode == "raw" or i == 3 else 0 < difference.mean() < 8
    assert source.read(3).data.tobytes() == (tmp_path / "in" / "d.jpg").read_bytes()


@pytest.mark.parametrize("engine", working_engines())
def test_crops_of_squashed_images_are_those_of_the_originals(tmp_path, many, engine):
    """SAAE's views: two crops and the whole image, all of the squashed one."""
    run(many, tmp_path / "a.beton", mode="raw", squash=32)
    views = [
        View(name="crop1", size=32, squash=32, scale=(0.14, 1.0), blur=1.0),
        View(name="crop2", size=32, squash=32, scale=(0.14, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8),
        View(name="reference", size=32, squash=32, scale=(1, 1), ratio=(1, 1), flip=0, interpolation="bilinear"),
    ]
    batches = []
    for path in (many, tmp_path / "a.beton"):
        with make_loader(engine, open_source(str(path)), views, batch_size=50, seed=3, workers=1) as loader:
            batches.append(list(loader.epoch(1)))
    same_codes = engine != "dali"  # which decodes JPEGs by other code than PIL's
    for original, squashed in zip(*batches, strict=True):
        assert torch.equal(original.id, squashed.id)
        for name in ("crop1", "crop2", "reference"):
            assert torch.equal(original.box[name], squashed.box[name])
            assert torch.equal(original.flip[name], squashed.flip[name])
            difference = (original.views[name].int() - squashed.views[name].int()).abs()
            assert difference.max() == 0 if same_codes else difference.float().mean() < 1
            for key, value in vars(original.photometric[name]).items() if name in original.photometric else ():
                assert torch.equal(value, vars(squashed.photometric[name])[key])
        assert original.box["reference"].reshape(-1, 4).unique(dim=0).tolist() == [[0, 0, 1, 1]]
        whole = torch.from_numpy(
            np.stack([decode(open_source(str(tmp_path / "a.beton")).read(i)) for i in squashed.id.tolist()])
        )
        if same_codes:
            assert torch.equal(squashed.views["reference"][:, 0], whole.permute(0, 3, 1, 2))


# -- the whole file --------------------------------------------------------------------------------------------------


def test_names_classes_labels_and_checksums(tmp_path, many):
    result = run(many, tmp_path / "a.beton", max_resolution=60)
    source, folder = open_source(str(tmp_path / "a.beton")), open_source(str(many))
    assert source.classes == folder.classes == ["class 0", "class 1", "class 2"]
    assert np.array_equal(source.labels, folder.labels)
    assert source.name(0) == "a.beton[0] class 0/000.jpg"
    assert (result.images, result.classes, result.size) == (100, 3, (tmp_path / "a.beton").stat().st_size)
    assert 70 < result.copied < 90
    assert "100 images in 3 classes" in result.table()
    assert result.as_dict()["copied"] == result.copied
    assert verify(VerifyOptions(str(tmp_path / "a.beton"))).ok


def test_a_flat_folder_has_no_labels(tmp_path):
    save(tmp_path / "in" / "a.jpg")
    result = run(tmp_path / "in", tmp_path / "a.beton")
    source = open_source(str(tmp_path / "a.beton"))
    assert (source.classes, source.labels.tolist()) == ([], [-1])
    assert "1 images in no classes" in result.table()


def test_the_number_of_workers_does_not_matter(tmp_path, many):
    files = []
    for workers in (1, 2, 5):
        path = tmp_path / f"{workers}.beton"
        run(many, path, max_resolution=60, workers=workers, mode="proportion")
        files.append((path.read_bytes(), path.with_suffix(".beton.npz").read_bytes()))
    assert files[0] == files[1] == files[2]


def test_chunks_that_finish_out_of_order_are_stored_in_order(tmp_path, many, monkeypatch):
    run(many, tmp_path / "a.beton")
    real = convert.encode

    def slow_first(data, name, options):
        time.sleep(0.1 if name.endswith("000.jpg") else 0)
        return real(data, name, options)

    monkeypatch.setattr(convert, "encode", slow_first)
    run(many, tmp_path / "b.beton", workers=4)
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()


def test_more_bytes_than_the_buffer(tmp_path, many, monkeypatch):
    run(many, tmp_path / "a.beton")
    monkeypatch.setattr(convert, "BUFFER", 5000)
    run(many, tmp_path / "b.beton")
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()


def test_shards_make_the_whole(tmp_path, many):
    run(many, tmp_path / "whole.beton")
    for k in range(3):
        run(many, tmp_path / f"s-{k}.beton", shard=f"{k}/3")
    whole, shards = open_source(str(tmp_path / "whole.beton")), open_source(str(tmp_path / "s-*.beton"))
    assert shards.classes == whole.classes
    assert np.array_equal(shards.labels, whole.labels)
    for i in range(100):
        assert shards.read(i).data.tobytes() == whole.read(i).data.tobytes()
        assert shards.name(i).split(" ", 1)[1] == whole.name(i).split(" ", 1)[1]


def test_part_maps(tmp_path):
    for k in range(3):
        save(tmp_path / "in" / "c" / f"{k}.jpg")
        (tmp_path / "parts" / "c").mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "parts" / "c" / f"{k}.npy", np.full((2, 4, 4), k, np.uint8))
    run(tmp_path / "in", tmp_path / "a.beton", parts=str(tmp_path / "parts"))
    source = open_source(str(tmp_path / "a.beton"))
    assert source.has_parts
    assert [int(source.parts(i).max()) for i in range(3)] == [0, 1, 2]
    assert source.parts(0).shape == (2, 4, 4)

    np.save(tmp_path / "parts" / "c" / "1.npy", np.zeros((2, 5, 5), np.uint8))
    (tmp_path / "parts" / "c" / "2.npy").unlink()
    with pytest.raises(ConvertError) as caught:
        run(tmp_path / "in", tmp_path / "b.beton", parts=str(tmp_path / "parts"))
    assert "c/1.jpg has part maps uint8 (2, 5, 5), others have uint8 (2, 4, 4)" in str(caught.value)
    assert "c/2.jpg has no readable part maps" in str(caught.value)

    np.save(tmp_path / "parts" / "c" / "0.npy", np.zeros((5, 5), np.uint8))
    with pytest.raises(ConvertError, match=r"0\.npy holds no part maps; they are uint8 \[N, h, w\]"):
        run(tmp_path / "in", tmp_path / "b.beton", parts=str(tmp_path / "parts"))
    with pytest.raises(ConvertError, match=r"has no part maps for these images; .*0\.npy does not exist"):
        run(tmp_path / "in", tmp_path / "b.beton", parts=str(tmp_path / "elsewhere"))


# -- bad files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bad_folder(tmp_path):
    folder = tmp_path / "in"
    for k in range(3):
        save(folder / "good" / f"{k}.jpg")
    bad = folder / "bad"
    save(bad / "truncated.jpg")
    data = (bad / "truncated.jpg").read_bytes()
    (bad / "truncated.jpg").write_bytes(data[:-100])
    (bad / "zeros.jpg").write_bytes(data[:-100] + bytes(100))
    (bad / "zero.jpg").touch()
    (bad / "text.jpg").write_text("<html>404</html>")
    (bad / "gone.jpg").symlink_to(bad / "nowhere")
    header = bytearray(data)
    frame = data.index(b"\xff\xc0")
    header[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"  # 65500 x 65500
    (bad / "absurd.jpg").write_bytes(header)
    save(bad / "half.png", smooth(300, 300))
    data = (bad / "half.png").read_bytes()
    (bad / "half.png").write_bytes(data[: len(data) // 2])
    return folder


REASONS = {
    "bad/absurd.jpg": "has absurd dimensions",
    "bad/gone.jpg": "cannot be read: No such file or directory",
    "bad/half.png": "is truncated",
    "bad/text.jpg": "is not an image",
    "bad/truncated.jpg": "is truncated (no end-of-image marker)",
    "bad/zero.jpg": "has zero bytes",
    "bad/zeros.jpg": "is truncated (no end-of-image marker)",
}


def test_bad_files_fail_the_conversion_with_the_list(tmp_path, bad_folder):
    with pytest.raises(ConvertError) as caught:
        run(bad_folder, tmp_path / "a.beton", max_bad=6)
    message = str(caught.value)
    assert "a.beton was not written (up to 6 bad files are skipped: --max-bad): 7 bad files" in message
    for name, reason in REASONS.items():
        assert f"\n  {name} {reason}" in message
    assert [name for name, _ in caught.value.bad] == sorted(REASONS)
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_bad_files_are_skipped_up_to_the_limit(tmp_path, bad_folder):
    result = run(bad_folder, tmp_path / "a.beton", max_bad=7)
    assert (result.images, len(result.bad)) == (3, 7)
    assert "skipped: 7 bad files\n  bad/absurd.jpg has absurd dimensions" in result.table()
    source = open_source(str(tmp_path / "a.beton"))
    assert source.classes == ["bad", "good"]
    assert source.labels.tolist() == [1, 1, 1]
    assert source.name(0) == "a.beton[0] good/0.jpg"
    assert verify(VerifyOptions(str(tmp_path / "a.beton"))).ok


def test_no_usable_image(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").touch()
    with pytest.raises(ConvertError, match=r"a\.jpg has zero bytes"):
        run(tmp_path / "in", tmp_path / "a.beton", max_bad=5)


def test_decoding_finds_what_the_structure_does_not_show(tmp_path):
    save(tmp_path / "in" / "a.jpg")
    data = (tmp_path / "in" / "a.jpg").read_bytes()
    table = data.index(b"\xff\xc4")  # a Huffman table with more codes than there is room for
    (tmp_path / "in" / "a.jpg").write_bytes(data[: table + 5] + b"\xff" * 4 + data[table + 9 :])
    run(tmp_path / "in", tmp_path / "a.beton")
    assert not verify(VerifyOptions(str(tmp_path / "a.beton"))).ok
    with pytest.raises(ConvertError, match=r"a\.jpg is damaged"):
        run(tmp_path / "in", tmp_path / "b.beton", check="decode")


def test_an_odd_file_is_listed_with_what_went_wrong(tmp_path, many, monkeypatch):
    real = convert.encode

    def fail(data, name, options):
        if name == "class 0/003.jpg":
            raise ZeroDivisionError("odd")
        return real(data, name, options)

    monkeypatch.setattr(convert, "encode", fail)
    assert run(many, tmp_path / "a.beton", max_bad=1).bad == [
        ("class 0/003.jpg", "cannot be converted (ZeroDivisionError: odd)")
    ]


def test_a_comment_is_not_taken_over(tmp_path):
    """PIL would write a PNG's comment, which is text, into the JPEG, and fail."""
    text = PngInfo()
    text.add_text("comment", "words")
    save(tmp_path / "in" / "a.png", pnginfo=text)
    assert run(tmp_path / "in", tmp_path / "a.beton").images == 1
    assert b"words" not in Beton(tmp_path / "a.beton").image(0).data.tobytes()


def test_sides_beyond_those_of_a_jpeg(tmp_path):
    save(tmp_path / "in" / "long.png", Image.new("RGB", (70000, 1)))
    with pytest.raises(ConvertError, match=r"long\.png is 1 x 70000 pixels; a \.beton holds sides up to 65500"):
        run(tmp_path / "in", tmp_path / "a.beton")
    assert run(tmp_path / "in", tmp_path / "a.beton", max_resolution=1000).images == 1


# -- bad calls -------------------------------------------------------------------------------------------------------


def test_paths_that_do_not_work(tmp_path, many):
    (tmp_path / "empty").mkdir()
    for src, dst, message in (
        (tmp_path / "gone", "a.beton", "gone cannot be listed: No such file or directory"),
        (tmp_path / "empty", "a.beton", "empty has no images in it"),
        (many, "a.bin", r"a\.bin must end in \.beton"),
        (many, "none/a.beton", r"none is no folder to write a\.beton into"),
    ):
        with pytest.raises(ConvertError, match=message):
            run(src, tmp_path / dst)
    assert os.listdir(tmp_path) == ["empty"]
    with pytest.raises(ConvertError, match=r"shard 150/200 cannot be made: .* has only 100 images"):
        run(many, tmp_path / "a.beton", shard="150/200")


def test_an_existing_file_is_replaced_only_when_asked(tmp_path, many):
    save(tmp_path / "in" / "a.jpg")
    run(many, tmp_path / "a.beton")
    with pytest.raises(ConvertError, match=r"a\.beton exists already; --overwrite"):
        run(tmp_path / "in", tmp_path / "a.beton")
    assert len(open_source(str(tmp_path / "a.beton"))) == 100
    run(tmp_path / "in", tmp_path / "a.beton", overwrite=True)
    assert len(open_source(str(tmp_path / "a.beton"))) == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_resolution", -1, "max_resolution is -1"),
        ("squash", -1, r"squash is -1; it must be from 0 to 65500"),
        ("quality", 0, "quality is 0; it must be from 1 to 95"),
        ("raw_fraction", 1.5, "raw_fraction is 1.5"),
        ("max_bad", -1, "max_bad is -1"),
        ("workers", -1, "workers is -1"),
        *[("shard", text, "I/N with I from 0 to N-1") for text in ("4/4", "1", "a/b", "-1/4", "0/0", "1/")],
    ],
)
def test_options_are_checked(key, value, message):
    with pytest.raises(ConfigError, match=message):
        ConvertOptions(**{key: value})


def test_squash_and_a_limit_exclude_each_other():
    with pytest.raises(ConfigError, match=r"max_resolution is 256; it must be 0 \(no limit\) where squash is set"):
        ConvertOptions(squash=224, max_resolution=256)


# -- accidents -------------------------------------------------------------------------------------------------------


def test_full_disk_is_said_and_leaves_nothing(tmp_path, many, monkeypatch):
    def full(file, data, position):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(beton_writer, "write_at", full)
    with pytest.raises(ConvertError, match=r"no space left for .*a\.beton; what was written has been removed"):
        run(many, tmp_path / "a.beton", workers=4)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("where", ["convert._Turn", "pool.ProcessPoolExecutor"])
def test_a_full_shared_memory_is_not_the_destinations_fault(tmp_path, many, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"fastssl.loaders.{where}", full)
    with pytest.raises(ConvertError, match=r"cannot be started \(No space left on device\); is /dev/shm full\?"):
        run(many, tmp_path / "a.beton")
    assert os.listdir(tmp_path) == []


def test_a_killed_worker_is_said_and_leaves_nothing(tmp_path, many, monkeypatch):
    def die(data, name, options):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(convert, "encode", die)
    with pytest.raises(ConvertError, match=r"a worker process died .* try fewer workers"):
        run(many, tmp_path / "a.beton", workers=4)
    assert os.listdir(tmp_path) == []


def test_an_error_in_a_worker_stops_those_that_wait_for_it(tmp_path, many, monkeypatch):
    real, first = convert.Block, (many / "class 0" / "000.jpg").read_bytes()

    def fail(fields, samples):
        if samples[0][0].data.tobytes() == first:
            time.sleep(0.3)  # until the others wait for their turn
            raise ZeroDivisionError("a bug")
        return real(fields, samples)

    monkeypatch.setattr(convert, "Block", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run(many, tmp_path / "a.beton", workers=4)
    assert os.listdir(tmp_path) == []


SLOW = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
import sys, time
from fastssl.loaders import convert
real = convert.encode
def slow(*arguments):
    time.sleep(0.03)
    return real(*arguments)
convert.encode = slow
convert.convert(convert.ConvertOptions(sys.argv[1], sys.argv[2], workers=2))
"""


def start_slow(many, path) -> subprocess.Popen:
    """Starts a conversion that takes seconds, and waits until some of it has been written."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, many, path], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not any(partial.stat().st_size for partial in path.parent.glob("*.partial")):
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_killed_half_way_and_started_again(tmp_path, many):
    path = tmp_path / "a.beton"
    with start_slow(many, path) as process:
        process.kill()
        process.communicate()
    (left,) = tmp_path.iterdir()
    assert re.fullmatch(r"a\.beton\.[0-9a-f]{8}\.partial", left.name)
    said = []
    convert.convert(ConvertOptions(str(many), str(path), workers=2), said.append)
    assert said == [f"{path}: what an unfinished conversion had left was removed; starting over"]
    run(many, tmp_path / "b.beton")
    assert path.read_bytes() == (tmp_path / "b.beton").read_bytes()
    assert not left.exists()


def test_interrupted_by_the_keyboard(tmp_path, many):
    with start_slow(many, tmp_path / "a.beton") as process:
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert os.listdir(tmp_path) == []
    assert errors.count("Traceback") == 1
    assert "KeyboardInterrupt" in errors


def test_what_was_left_out_is_said(tmp_path, many, capsys):
    shutil.copytree(many, tmp_path / "in")
    (tmp_path / "in" / "class 0" / "movie.mp4").touch()
    result = run(tmp_path / "in", tmp_path / "a.beton")
    line = "left out: 1 with endings that are not listed (.mp4 1): class 0/movie.mp4"
    assert line in capsys.readouterr().err
    assert result.left_out == line
