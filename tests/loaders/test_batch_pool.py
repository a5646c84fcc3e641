"""The threads that fill whole batches: what they fill and what they leave, how they end, forks, and doing without."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.config import View
from fastssl.loaders import batch_pool, window_decoder
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.draw import draw_all
from fastssl.loaders.engine import choose_engine
from fastssl.loaders.ffcv_loader import FFCVLoader
from fastssl.loaders.loader import BadSampleError, Crops, Loader
from fastssl.loaders.masks import SemanticMask
from fastssl.loaders.reference_loader import ReferenceLoader
from fastssl.loaders.sources import FolderSource, open_source

pytestmark = [
    pytest.mark.timeout(600),  # nothing hangs
    pytest.mark.skipif(not (window_decoder.works() and batch_pool._start), reason="the C part was not built"),
]
VIEWS = [
    View(name="a", count=2, size=24),
    View(name="b", size=16, squash=40, interpolation="lanczos"),
    View(name="c", count=3, size=8, squash=40, interpolation="bilinear"),
    View(name="d", size=12, squash=33),
]


def decode_threads():
    """How many threads of pools this process has."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm") as file:
            names.append(file.read().strip())
    return names.count("fastssl-decode")


def assert_no_decode_threads():
    """The system may list a thread for a moment after it was joined."""
    end = time.monotonic() + 10
    while decode_threads() and time.monotonic() < end:
        time.sleep(0.01)
    assert decode_threads() == 0


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert_no_decode_threads()
    assert not [t for t in threading.enumerate() if t.name.startswith("fastssl-loader")]


def picture(k, height=90, width=120):
    rng = np.random.default_rng(k)
    small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    for k in range(24):
        path = tmp_path / "images" / f"class{k % 3}" / f"{k:02}-ä.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(k, 60 + k, 90 - 2 * k).save(path)
    return tmp_path / "images"


def make_beton(folder, path, **options):
    convert(ConvertOptions(str(folder), str(path), **options))
    return open_source(str(path))


def same(mine, other):
    assert len(mine) == len(other)
    for a, b in zip(mine, other, strict=True):
        assert torch.equal(a.id, b.id)
        for name in b.views:
            assert torch.equal(a.box[name], b.box[name])
            assert torch.equal(a.views[name], b.views[name]), name


def batches(kind, source, views=VIEWS, **options):
    with kind(source, views, **dict(batch_size=4, seed=3, workers=3, prefetch=2) | options) as loader:
        return list(loader.epoch(1))


def fill(source, ids, views=VIEWS, heights=None):
    """Which rows the pool fills, and the crops."""
    known, widths = source.sizes(ids)
    heights = known if heights is None else heights
    drawn = draw_all(views, heights, widths, seed=0, epoch=0, ids=ids)
    groups = [
        Crops(v, drawn[v.name].box, drawn[v.name].flip, np.zeros((len(ids), v.count, 3, v.size, v.size), np.uint8))
        for v in views
    ]
    pool = batch_pool.start(2)
    try:
        return pool.fill(source.places(ids), heights, widths, groups).tolist(), groups
    finally:
        pool.close()


def test_folders_files_raw_pixels_and_shards_are_filled(folder, tmp_path):
    expected = batches(ReferenceLoader, open_source(str(folder)))
    for k in range(2):
        make_beton(folder, tmp_path / f"s-{k}.beton", shard=f"{k}/2")
    raw = make_beton(folder, tmp_path / "raw.beton", mode="raw")
    one, shards = make_beton(folder, tmp_path / "one.beton"), open_source(str(tmp_path / "s-*.beton"))
    backwards = np.arange(len(shards))[::-1].copy()
    assert all(fill(shards, backwards)[0])
    for row, i in zip(shards.places(backwards).table, backwards.tolist(), strict=True):
        assert os.pread(row[1], row[3], row[2]) == bytes(shards.read(i).data)
    same(batches(FFCVLoader, shards), batches(ReferenceLoader, shards))
    sources = [open_source(str(folder)), one, raw]
    for source in sources:
        filled, _ = fill(source, np.arange(len(source)))
        assert all(filled)
        same(batches(FFCVLoader, source), expected)
        same(batches(FFCVLoader, source, VIEWS[:1]), batches(ReferenceLoader, source, VIEWS[:1]))


def test_what_is_no_usual_image_is_left_and_comes_all_the_same(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for k in range(8):
        picture(k).save(folder / f"{k}.jpg")
    picture(1).save(folder / "1.jpg", exif=turned)
    (folder / "2.jpg").unlink()
    picture(2).save(folder / "2.png")
    picture(3).convert("CMYK").save(folder / "3.jpg")
    source = FolderSource(str(folder))
    filled, _ = fill(source, np.arange(8))
    assert filled == [True, False, False, False, True, True, True, True]
    expected = batches(ReferenceLoader, source)
    same(batches(FFCVLoader, source), expected)
    same(batches(FFCVLoader, source, workers=1, prefetch=5), expected)


def exif(*entries, head=b"II*\0", count=None):
    """An APP1 segment with little-endian entries (tag, kind, count, value)."""
    order = "<" if head[:1] == b"I" else ">"
    body = struct.pack(order + "H", len(entries) if count is None else count)
    for tag, kind, number, value in entries:
        body += struct.pack(order + "HHI", tag, kind, number) + struct.pack(order + "HH", value, 0)
    return app1(b"Exif\0\0" + head + struct.pack(order + "I", 8) + body + bytes(4))


def app1(content):
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:%s='%d'/>"
UPRIGHT, TURNED = (0x0112, 3, 1, 1), (0x0112, 3, 1, 6)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_files_that_say_they_are_upright_are_filled(tmp_path):
    said = {  # APP1 segments -> whether the pool takes them
        "nothing": (b"", True),
        "upright": (exif((0x0100, 4, 1, 9), UPRIGHT), True),
        "upright, big-endian": (exif(UPRIGHT, head=b"MM\0*"), True),
        "turned": (exif(TURNED), False),
        "turned, big-endian": (exif(TURNED, head=b"MM\0*"), False),
        "both": (exif(UPRIGHT, TURNED), False),
        "not of it": (exif((0x0100, 4, 1, 9)), True),
        "a long number": (exif((0x0112, 4, 1, 6)), False),
        "cut": (exif(UPRIGHT, count=3), False),
        "no TIFF": (exif(UPRIGHT, head=b"IIII"), False),
        "text": (app1(XMP % (b"Model", 6)), True),
        "turned by text": (app1(XMP.replace(b"'", b'"') % (b"Orientation", 6)), False),
        "upright, and text": (exif(UPRIGHT) + app1(XMP % (b"Orientation", 1)), True),
        "two blocks": (exif((0x0100, 4, 1, 9)) + exif(TURNED), False),
        "short": (app1(b"Exif\0\0II"), True),
    }
    for k, (segments, _) in enumerate(said.values()):
        out = io.BytesIO()
        picture(k, 60, 60).save(out, "JPEG")
        (tmp_path / f"{k:02}.jpg").write_bytes(out.getvalue()[:2] + segments + out.getvalue()[2:])
    source = FolderSource(str(tmp_path))
    filled, _ = fill(source, np.arange(len(said)))
    assert dict(zip(said, filled, strict=True)) == {name: taken for name, (_, taken) in said.items()}
    same(batches(FFCVLoader, source, batch_size=3), batches(ReferenceLoader, source, batch_size=3))


def test_of_other_files_only_the_beginning_is_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    source = FolderSource(str(tmp_path))
    ids = np.zeros(1, np.int64)
    source.sizes(ids)

    def read():
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    before = read()
    assert fill(source, ids, VIEWS[:1])[0] == [False]
    assert read() - before < 100_000 < os.path.getsize(tmp_path / "a.png")


@pytest.mark.parametrize("shards", [1, 2])
def test_part_labels_come_without_python_for_each_image(folder, tmp_path, shards, monkeypatch):
    rng = np.random.default_rng(0)
    for path in folder.rglob("*.jpg"):
        target = tmp_path / "parts" / path.relative_to(folder).with_suffix(".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, rng.integers(0, 256, (5, 9, 7), np.uint8))
    for k in range(shards):
        make_beton(folder, tmp_path / f"p-{k}.beton", parts=str(tmp_path / "parts"), shard=f"{k}/{shards}")
    source = open_source(str(tmp_path / "p-*.beton"))
    more = {"part_grid": {"a": 4, "c": 3}, "masks": [SemanticMask("a", 16, 0.75, 5, 10)]}
    expected = batches(ReferenceLoader, source, **more)
    by_row = []
    monkeypatch.setattr(FFCVLoader, "_fill", lambda self, *rest: by_row.append(rest) or Loader._fill(self, *rest))
    found = batches(FFCVLoader, source, **more)
    assert not by_row
    rows = source.shards[0].beton.rows
    pointers = rows[f"f{source.shards[0].beton._parts}"]
    for wrong in (0, 2**64 - 1, int(pointers[3]) + 1):
        pointers[2] = wrong
        with FFCVLoader(source, VIEWS, batch_size=24, seed=3, **more) as loader:
            [damaged] = loader.epoch(1)
        assert [i for i, _, _ in loader.bad] == [2]
        assert 2 not in damaged.id
    for mine, other in zip(found, expected, strict=True):
        for name in more["part_grid"]:
            assert torch.equal(mine.parts[name], other.parts[name])
        assert all(torch.equal(a, b) for a, b in zip(mine.masks["a"], other.masks["a"], strict=True))
    same(found, expected)


def test_faults_are_left(folder, tmp_path):
    source = open_source(str(folder))
    files = [source.name(k) for k in range(6)]
    source.sizes(np.arange(6))
    with open(files[0], "rb") as file:
        data = file.read()
    for file, content in zip(files, (b"", data[: len(data) // 2], b"text", data, None), strict=False):
        if content is None:
            os.unlink(file)
        else:
            with open(file, "wb") as out:
                out.write(content)
    filled, groups = fill(source, np.arange(6))
    assert filled == [False, False, False, False, False, True]  # the fourth is of another size
    assert not groups[0].out[:5].any()
    assert groups[0].out[5].any()


def test_metadata_that_leads_nowhere_is_left(folder, tmp_path):
    source = make_beton(folder, tmp_path / "a.beton")
    beton = source.beton
    rows = beton.rows[f"f{beton._image}"]
    rows["data_ptr"][0] += 1
    rows["data_ptr"][1] = 2**64 - 1
    rows["mode"][2] = 9
    rows["data_ptr"][3] = 0
    beton.heights[4] += 1
    rows["mode"][5] = 1  # raw, but not of that size
    beton.data_end = int(rows["data_ptr"][7]) + 1
    ids = np.arange(8)
    table = source.places(ids).table
    assert (table[[0, 1, 2, 3, 7], 0] == 0).all()
    for k in (4, 5, 6):
        assert table[k, 1:].tolist() == [beton._file.fileno(), rows["data_ptr"][k], beton.image(k).data.size]
    filled, _ = fill(source, ids)
    assert filled == [False] * 6 + [True, False]


def test_boxes_that_leave_the_image_are_left(folder):
    source = open_source(str(folder))
    heights, _ = source.sizes(np.arange(2))
    assert fill(source, np.arange(2), VIEWS[:1], heights * 4)[0] == [False, False]


def test_arrays_that_do_not_fit_are_refused(folder):
    source = open_source(str(folder))
    group = Crops(
        VIEWS[0], np.zeros((1, 2, 4), np.int64), np.zeros((1, 2), bool), np.zeros((1, 2, 3, 24, 25), np.uint8)
    )
    pool = batch_pool.start(1)
    with pytest.raises(ValueError, match=r"views.a: uint8 \(1, 2, 3, 24, 25\), not contiguous uint8"):
        pool.fill(source.places(np.arange(1)), *source.sizes(np.arange(1)), [group])
    pool.close()


def test_closing_wakes_what_waits_and_ends_the_threads(folder):
    source = open_source(str(folder))
    ids = np.arange(24).repeat(4000)
    heights, widths = source.sizes(ids)
    drawn = draw_all(VIEWS[:1], heights, widths, seed=0, epoch=0, ids=ids)["a"]
    group = Crops(VIEWS[0], drawn.box, drawn.flip, np.empty((len(ids), 2, 3, 24, 24), np.uint8))
    pool = batch_pool.start(2)
    assert decode_threads() == 2
    caught = []

    def wait():
        try:
            pool.fill(source.places(ids), heights, widths, [group])
        except RuntimeError as error:
            caught.append(str(error))

    waiting = [threading.Thread(target=wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    time.sleep(0.3)
    pool.close()
    pool.close()
    for thread in waiting:
        thread.join(60)
    assert caught == ["the pool was closed"] * 3
    wait()  # too late
    assert len(caught) == 4


@pytest.mark.parametrize("leave", ["close", "drop", "break", "loader", "error", "end"])
def test_however_an_epoch_ends_its_threads_end(folder, leave):
    source = open_source(str(folder))
    on_bad = "raise" if leave == "error" else "skip"
    loader = FFCVLoader(source, VIEWS, batch_size=2, seed=0, workers=3, prefetch=2, on_bad=on_bad)
    stream = loader.epoch(0)
    next(stream)
    assert decode_threads() == 3
    if leave == "close":
        stream.close()
    elif leave == "drop":
        del stream
    elif leave == "break":
        stream.close()
        for _ in loader.epoch(1):
            assert decode_threads() == 3
            break
    elif leave == "loader":
        loader.close()
    elif leave == "end":
        list(stream)
    else:
        for k in range(24):
            os.truncate(source.name(k), 100)
        with pytest.raises(BadSampleError):
            list(stream)
    assert_no_decode_threads()
    assert len(list(loader.epoch(1))) == 12 if leave != "error" else True


def test_closing_ends_an_epoch_that_is_still_compiling(folder, monkeypatch):
    compiling, go_on, caught = threading.Event(), threading.Event(), []
    start = batch_pool.start

    def compile_slowly(threads):
        compiling.set()
        assert go_on.wait(60)
        return start(threads)

    monkeypatch.setattr(batch_pool, "start", compile_slowly)
    loader = FFCVLoader(open_source(str(folder)), VIEWS, batch_size=2, seed=0, workers=2)

    def read():
        with pytest.raises(RuntimeError, match="the loader was closed while its batches were being read"):
            caught.extend(loader.epoch(0))

    reader = threading.Thread(target=read)
    reader.start()
    assert compiling.wait(60)
    loader.close()
    go_on.set()
    reader.join(60)
    assert not reader.is_alive()
    assert caught == []
    assert_no_decode_threads()
    assert len(list(loader.epoch(0))) == 12


def test_two_loaders_at_once(folder, tmp_path):
    sources = open_source(str(folder)), make_beton(folder, tmp_path / "a.beton", mode="raw")
    options = dict(seed=3), dict(seed=4, views=VIEWS[1:], workers=1)
    expected = [batches(FFCVLoader, source, **more) for source, more in zip(sources, options, strict=True)]
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(FFCVLoader(source, more.pop("views", VIEWS), batch_size=4, **dict(workers=3) | more))
            for source, more in zip(sources, options, strict=True)
        ]
        pairs = list(zip(*(loader.epoch(1) for loader in loaders), strict=True))
        found: list[list] = [[], []]
        threads = [threading.Thread(target=lambda k=k: found[k].extend(loaders[k].epoch(1))) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for k in range(2):
        same([pair[k] for pair in pairs], expected[k])
        same(found[k], expected[k])


def test_many_epochs_of_many_threads(folder):
    source = open_source(str(folder))
    expected = batches(FFCVLoader, source)
    for workers in (1, 16):
        for _ in range(20):
            same(batches(FFCVLoader, source, workers=workers, prefetch=7), expected)


def test_without_the_c_part_batches_are_the_same(folder, monkeypatch):
    source = open_source(str(folder))
    expected = batches(FFCVLoader, source)
    monkeypatch.setattr(batch_pool, "_start", None)  # an older build, without the pool
    same(batches(FFCVLoader, source), expected)
    monkeypatch.setattr(window_decoder, "_library", None)
    assert batch_pool.start(1) is None
    same(batches(FFCVLoader, source), expected)
    engine, why = choose_engine("auto")
    assert engine == "ffcv"
    assert "PIL decodes, at half the speed or less, as the compiled part is missing" in why
    with FFCVLoader(source, VIEWS, batch_size=24, seed=3, workers=3) as loader:
        _, pieces = loader._prepare(np.arange(24), 0, 0)
        assert len(pieces) == 6  # of four rows each


@pytest.mark.parametrize("how", ["end", "exit", "error"])
def test_a_process_that_ends_in_mid_epoch_ends(folder, how):
    code = f"""
import sys
from fastssl.config import View
from fastssl.loaders.ffcv_loader import FFCVLoader
from fastssl.loaders.sources import open_source
loader = FFCVLoader(open_source({str(folder)!r}), [View(name="a", size=16)], batch_size=2, seed=0, workers=2)
stream = loader.epoch(0)
next(stream)
print("first", flush=True)
{dict(end="", exit="sys.exit(0)", error="raise SystemExit(0) from ValueError()")[how]}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "first\n"), done.stderr
    assert done.stderr == ""


def test_a_child_forked_in_mid_epoch_drops_that_epoch_and_reads_its_own(folder):
    code = f"""
import gc, os, warnings
warnings.simplefilter("ignore")
from fastssl.config import View
from fastssl.loaders.ffcv_loader import FFCVLoader
from fastssl.loaders.sources import open_source
source = open_source({str(folder)!r})
def make():
    return FFCVLoader(source, [View(name="a", size=16)], batch_size=2, seed=0, workers=2)
loader = make()
stream = loader.epoch(0)
sums = [next(stream).views["a"].sum().item()]
children = []
for leave in (False, True):
    child = os.fork()
    if child == 0:
        if leave:
            loader.close()
            del stream
            gc.collect()
        mine = [batch.views["a"].sum().item() for batch in make().epoch(0)]
        os._exit(mine[0] != sums[0] or len(mine) != 12)
    children.append(child)
rest = len(list(stream))
child = os.fork()  # after its use
if child == 0:
    mine = [batch.views["a"].sum().item() for batch in loader.epoch(0)]
    os._exit(mine[0] != sums[0] or len(mine) != 12)
children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
print(rest)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[0, 0, 0]\n11\n", done.stderr


def test_the_cut_follows_pils_version_whatever_is_cached():
    """numba's cache on disk does not know of globals: a process with another PIL must not find this one's code."""
    code = """
import sys, PIL
PIL.__version__ = sys.argv[1]
import ctypes, numpy as np
from fastssl.loaders import resample
frame = np.random.default_rng(0).integers(0, 256, (400, 64, 3), np.uint8)
box, flip = np.array([[0, 0, 400, 64]]), np.zeros(1, bool)
out, other, bad = np.empty((1, 3, 32, 32), np.uint8), np.empty((1, 3, 32, 32), np.uint8), np.zeros(1, np.int64)
resample.cut_all(frame, (0, 0), box, flip, 32, "bicubic", out)
kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 14)(resample.cut_address())
kind(frame.ctypes.data, frame.strides[0], 400, 64, 0, 0, box.ctypes.data, flip.ctypes.data, 1, 32,
     resample.FILTERS["bicubic"], 1, other.ctypes.data, bad.ctypes.data)
assert bad[0] == -1
assert np.array_equal(out, other), (out != other).sum()
print(out.sum())
"""
    sums = []
    for version in ("13.0.0", "12.2.0", "13.0.0"):
        done = subprocess.run([sys.executable, "-c", code, version], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        sums.append(done.stdout)
    assert sums[0] == sums[2] != sums[1]
