"""The compiled engine: the reference's batches to the bit; every fault ends in a replacement or in one clear line."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.config import ConfigError, View
from fastssl.loaders import batch_pool, window_decoder
from fastssl.loaders.beton import Beton
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.ffcv_loader import FFCVLoader, window
from fastssl.loaders.loader import BadSampleError, Crops
from fastssl.loaders.reference_loader import ReferenceLoader
from fastssl.loaders.sources import open_source

VIEWS = [
    View(name="a", count=2, size=32, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, blur=0.5),
    View(name="b", count=3, size=24, scale=(0.05, 0.4), interpolation="bilinear"),
    View(name="c", size=16, squash=48, interpolation="lanczos"),
    View(name="d", count=3, size=8, same_crop_as="b"),
]
pytestmark = pytest.mark.timeout(600)  # nothing hangs


@pytest.fixture
def folder(tmp_path):
    """Sixteen pictures of many kinds and sizes, in two classes."""
    rng = np.random.default_rng(0)
    for k in range(16):
        height, width = (int(side) for side in rng.integers(40, 130, 2))
        if k == 5:
            height, width = 1, 1
        if k == 6:
            height, width = 10000, 50
        pixels = rng.integers(0, 256, (max(height // 8, 1), max(width // 8, 1), 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        path = tmp_path / "images" / f"class{k % 2}" / f"{k:02}.{'png' if k == 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if k == 4:
            image.convert("L").save(path)
        elif k == 7:
            image.save(path, subsampling=0, progressive=True)
        else:
            image.save(path)
    return tmp_path / "images"


@pytest.fixture
def beton(folder, tmp_path):
    path = tmp_path / "data.beton"
    convert(ConvertOptions(str(folder), str(path)))
    return path


def batches(kind, source, views=VIEWS, epoch=1, start=0, **options):
    settings = dict(batch_size=4, seed=3, workers=2, prefetch=2) | options
    with kind(source, views, **settings) as loader:
        return list(loader.epoch(epoch, start)), loader.bad


def assert_equal(mine, other):
    assert len(mine) == len(other)
    for a, b in zip(mine, other, strict=True):
        assert torch.equal(a.id, b.id)
        assert torch.equal(a.label, b.label)
        for name in b.views:
            assert torch.equal(a.box[name], b.box[name])
            assert torch.equal(a.flip[name], b.flip[name])
            assert torch.equal(a.views[name], b.views[name]), name
        for name, drawn in b.photometric.items():
            assert all(torch.equal(getattr(a.photometric[name], key), value) for key, value in vars(drawn).items())


@pytest.mark.parametrize("kind", ["folder", "beton"])
@pytest.mark.parametrize("views", [VIEWS, VIEWS[:2], VIEWS[1:2]], ids=["all", "windows", "one group"])
def test_every_batch_is_the_references(kind, views, request):
    source = open_source(str(request.getfixturevalue(kind)))
    assert_equal(batches(FFCVLoader, source, views)[0], batches(ReferenceLoader, source, views)[0])


@pytest.mark.parametrize("change", [{"workers": 1}, {"workers": 5}, {"prefetch": 1}, {"prefetch": 7}])
def test_threads_and_prefetch_change_nothing(beton, change):
    source = open_source(str(beton))
    assert_equal(batches(FFCVLoader, source, **change)[0], batches(FFCVLoader, source)[0])


def test_resume_and_ranks_change_nothing(beton):
    source = open_source(str(beton))
    whole = batches(FFCVLoader, source)[0]
    assert_equal(batches(FFCVLoader, source, start=2)[0], whole[2:])
    halves = [batches(FFCVLoader, source, batch_size=2, rank=rank, world=2)[0] for rank in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(batch.views["b"], torch.cat([first.views["b"], second.views["b"]]))


def test_page_window_keeps_every_sample(beton):
    source = open_source(str(beton))
    mine = batches(FFCVLoader, source, page_window=1)[0]
    assert sorted(torch.cat([batch.id for batch in mine]).tolist()) == list(range(16))
    assert_equal(mine, batches(ReferenceLoader, source, page_window=1)[0])


def spoil(beton, sample, kind):
    """Damage one sample's bytes inside the file, whose tables stay whole."""
    opened = Beton(beton)
    begin = int(opened.rows[f"f{opened._image}"]["data_ptr"][sample])
    size = opened.image(sample).data.size
    data = bytearray(beton.read_bytes())
    if kind == "header":
        data[begin : begin + 20] = bytes(20)
    elif kind == "end":
        data[begin + size // 2 : begin + size] = bytes(size - size // 2)
    else:
        table = data.index(b"\xff\xc4", begin)
        data[table + 5 : table + 21] = b"\xff" * 16
    beton.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", ["header", "end", "table"])
def test_a_damaged_sample_is_replaced_as_in_the_reference(beton, kind, caplog):
    spoil(beton, 9, kind)
    source = open_source(str(beton))
    mine, bad = batches(FFCVLoader, source)
    assert [i for i, *_ in bad] == [9]
    assert "class1/" in bad[0][1]
    assert caplog.text.count("another one replaces it") == 1
    assert_equal(mine, batches(ReferenceLoader, source)[0])


@pytest.mark.parametrize("kind", [FFCVLoader, ReferenceLoader])
def test_a_replacement_of_the_same_size_brings_its_own_id_label_and_crops(kind, tmp_path):
    """Where all images are of one size, as in CIFAR, the size does not tell that another sample came."""
    rng = np.random.default_rng(0)
    for k in range(8):
        path = tmp_path / "images" / f"class{k}" / f"{k}.jpg"
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    beton = tmp_path / "data.beton"
    convert(ConvertOptions(str(tmp_path / "images"), str(beton)))
    whole = batches(kind, open_source(str(beton)), batch_size=8)[0][0]
    spoil(beton, 3, "header")
    [batch] = batches(kind, open_source(str(beton)), batch_size=8)[0]
    row = whole.id.tolist().index(3)
    other = batch.id[row].item()
    assert other != 3
    assert batch.label[row] == other
    twin = whole.id.tolist().index(other)  # the crops that this sample has of its own
    for name in batch.views:
        assert torch.equal(batch.box[name][row], whole.box[name][twin])
        assert torch.equal(batch.flip[name][row], whole.flip[name][twin])
        assert torch.equal(batch.views[name][row], whole.views[name][twin])


def test_a_damaged_sample_can_end_the_epoch(beton):
    spoil(beton, 9, "header")
    with pytest.raises(BadSampleError, match=r"sample 9 \(data.beton\[9\] class1/"):
        batches(FFCVLoader, open_source(str(beton)), on_bad="raise")


def test_a_file_cut_short_while_training_ends_with_the_reason(beton):
    source = open_source(str(beton))
    with FFCVLoader(source, VIEWS, batch_size=2, seed=0, workers=2, prefetch=1, max_bad=3) as loader:
        stream = loader.epoch(0)
        next(stream)
        os.truncate(beton, 4096)
        with pytest.raises(BadSampleError, match="the file has become shorter since it was opened"):
            list(stream)


def test_a_file_replaced_while_training_changes_nothing(beton, folder, tmp_path):
    expected = batches(FFCVLoader, open_source(str(beton)))[0]
    source = open_source(str(beton))
    other = tmp_path / "other.beton"
    convert(ConvertOptions(str(folder / "class0"), str(other)))
    other.replace(beton)
    assert_equal(batches(FFCVLoader, source)[0], expected)


@pytest.mark.parametrize("where", ["resample.cut_all", "batch_pool.BatchPool.fill"])
def test_an_error_in_a_worker_reaches_the_consumer(beton, where, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("in a worker")

    if where == "resample.cut_all" or not batch_pool.start(1):
        monkeypatch.setattr(window_decoder, "_library", None)
        where = "resample.cut_all"
    monkeypatch.setattr(f"fastssl.loaders.{where}", fail)
    with pytest.raises(ZeroDivisionError, match="in a worker"):
        batches(FFCVLoader, open_source(str(beton)))


def test_leaving_early_frees_threads_and_two_loaders_live_together(beton):
    source = open_source(str(beton))
    before = threading.active_count()
    expected = [batches(FFCVLoader, source, seed=seed)[0] for seed in (1, 2)]
    loaders = [FFCVLoader(source, VIEWS, batch_size=4, seed=seed, workers=2, prefetch=2) for seed in (1, 2)]
    streams = [loader.epoch(1) for loader in loaders]
    pairs = [(next(streams[0]), next(streams[1])) for _ in range(3)]
    for stream, loader in zip(streams, loaders, strict=True):
        stream.close()
        loader.close()
    assert threading.active_count() == before
    for k in range(2):
        assert_equal([pair[k] for pair in pairs], expected[k][:3])


def test_a_new_process_compiles_nothing_anew_and_loads_after_a_fork(beton):
    """What this process has compiled lies in numba's cache on disk."""
    list(FFCVLoader(open_source(str(beton)), [View(name="a", size=16)], batch_size=4, seed=0).epoch(0))
    code = f"""
import os
from fastssl.loaders import draw_compiled, resample
from fastssl.config import View
from fastssl.loaders.ffcv_loader import FFCVLoader
from fastssl.loaders.sources import open_source
loader = FFCVLoader(open_source({str(beton)!r}), [View(name="a", size=16)], batch_size=4, seed=0, workers=2)
first = [batch.views["a"].sum().item() for batch in loader.epoch(0)]
child = os.fork()
if child == 0:
    os._exit(first != [batch.views["a"].sum().item() for batch in loader.epoch(0)])
boxes, draws, cut = resample._cut_boxes.stats, draw_compiled._draw.stats, resample._compile_cut()
print(sum(boxes.cache_hits.values()) + cut.cache_hits, sum(draws.cache_hits.values()))
print(sum(boxes.cache_misses.values()) + sum(draws.cache_misses.values()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), first == [b.views["a"].sum().item() for b in loader.epoch(0)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1", "0", "0", "True"], done.stderr


def test_tiny_data_sets(folder, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    (folder / "class0" / "00.jpg").rename(one / "00.jpg")
    source = open_source(str(one))
    [batch] = batches(FFCVLoader, source, batch_size=1)[0]
    assert batch.id.tolist() == [0]
    with pytest.raises(ConfigError, match="the data has 1 images, fewer than one batch of 2"):
        FFCVLoader(source, VIEWS, batch_size=2, seed=0)


def test_memory_is_steady_over_epochs(beton):
    """After the first epochs no more memory is taken: the batches' memory goes round."""
    source = open_source(str(beton))
    places = set()
    with FFCVLoader(source, VIEWS[:1], batch_size=4, seed=0, workers=2, prefetch=2) as loader:
        for epoch in range(20):
            for batch in loader.epoch(epoch):
                places.add(batch.views["a"].data_ptr())
    assert len(places) <= 2 + 4  # prefetched, in work, and in the consumer's hands


def test_window_holds_all_boxes():
    def group(boxes, squash=0):
        return Crops(View(name="x", squash=squash), np.array(boxes), np.zeros(len(boxes), bool), None)

    assert window([group([[3, 5, 10, 4]])]) == (3, 5, 10, 4)
    assert window([group([[3, 5, 10, 4], [8, 1, 2, 2]]), group([[0, 6, 1, 30]])]) == (0, 1, 13, 35)
    assert window([group([[3, 5, 10, 4]]), group([[0, 0, 8, 8]], squash=8)]) is None
