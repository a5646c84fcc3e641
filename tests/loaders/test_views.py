import ast
import io
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.config import View
from fastssl.loaders import window_decoder
from fastssl.loaders.decode import DecodeError, Encoded, decode, open_image, upright_size
from fastssl.loaders.loader import BadSampleError, part_labels
from fastssl.loaders.masks import RandomMask, SemanticMask, draw
from fastssl.loaders.reference_loader import FILTERS, evaluation_view
from fastssl.loaders.sources import Source
from fastssl.loaders.views import central_batches, central_box, evaluation_batches

ROOT = Path(__file__).parents[2]
SIZES = [(28, 32), (32, 32), (17, 40), (1, 1), (224, 256)]  # of the crop, and of the shorter side before
SHAPES = [(33, 50), (50, 33), (32, 32), (97, 31), (20, 21), (256, 341), (500, 333), (1, 1), (1, 9), (9, 1), (2, 60),
          (300, 4), (16, 31), (333, 32)]  # fmt: skip


class Stored(Source):
    """Encoded samples in memory; None cannot be decoded."""

    def __init__(self, samples, parts=None):
        self.samples, self.maps = samples, parts
        self.path, self.classes, self.has_parts = "memory", [], parts is not None
        self.labels = np.arange(len(samples)) % 10

    def sizes(self, ids):
        return np.array([[self.samples[i].height, self.samples[i].width] for i in ids]).T

    def read(self, i):
        if self.samples[i] is None:
            raise DecodeError("is broken")
        return self.samples[i]

    def name(self, i):
        return f"image-{i}.png"

    def fingerprint(self):
        return self.path

    def parts(self, i):
        return self.maps[i]


def noise(height, width):
    """Random pixels, many of them black or white, so that filters overshoot."""
    values = np.random.default_rng(height * 1000 + width).integers(-150, 400, (height, width, 3))
    return values.clip(0, 255).astype(np.uint8)


def raw(pixels):
    return Encoded(pixels.reshape(-1), "raw", *pixels.shape[:2])


def file(image, kind, mode="file", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    data = buffer.getvalue()
    header = open_image(data)
    shape = upright_size(header) if mode == "file" else header.size[::-1]
    return Encoded(np.frombuffer(data, np.uint8), mode, *shape)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def by_pil(encoded, size, resize):
    return evaluation_view(Image.fromarray(decode(encoded)), size, resize).transpose(2, 0, 1)


PICTURE = Image.fromarray(noise(75, 101)).resize((150, 211))
FILES = {
    "jpeg": file(PICTURE, "JPEG"),
    "jpeg in a beton": file(PICTURE, "JPEG", "jpg", exif=turned(6)),
    "progressive": file(PICTURE, "JPEG", progressive=True),
    "444": file(PICTURE, "JPEG", subsampling=0),
    "gray": file(PICTURE.convert("L"), "JPEG"),
    "cmyk": file(PICTURE.convert("CMYK"), "JPEG"),
    "png": file(PICTURE, "PNG"),
    "alpha": file(PICTURE.convert("RGBA"), "PNG"),
    "palette": file(PICTURE.convert("P"), "PNG"),
    "16 bits": file(Image.fromarray(noise(90, 60)[..., 0].astype(np.uint16) * 200), "PNG"),
    "wide": file(PICTURE.resize((400, 30)), "JPEG"),
    "one column": file(PICTURE.resize((1, 40)), "JPEG"),
    **{f"turned {k}": file(PICTURE, "JPEG", exif=turned(k)) for k in (1, 2, 3, 6, 8)},
}


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastssl-loader")]


# ---- PIL's pixels


@pytest.mark.parametrize(("size", "resize"), SIZES)
def test_views_are_pils_to_the_bit(size, resize):
    samples = [raw(noise(*shape)) for shape in SHAPES]
    (batch,) = evaluation_batches(Stored(samples), size=size, resize=resize, batch_size=len(samples))
    for row, sample in enumerate(samples):
        assert np.array_equal(batch.views["eval"][row, 0].numpy(), by_pil(sample, size, resize)), SHAPES[row]


@pytest.mark.parametrize("with_library", [True, False])
def test_files_of_all_kinds(with_library, monkeypatch):
    if not with_library:
        monkeypatch.setattr(window_decoder, "_library", None)
    for size, resize in ((64, 73), (17, 170)):
        (batch,) = evaluation_batches(Stored(list(FILES.values())), size=size, resize=resize, batch_size=len(FILES))
        for kind, sample, (pixels,) in zip(FILES, FILES.values(), batch.views["eval"], strict=True):
            assert np.array_equal(pixels.numpy(), by_pil(sample, size, resize)), kind


@pytest.mark.skipif(not window_decoder._library, reason="fastssl.loaders._window was not built")
def test_no_more_is_decoded_than_the_centre_is_made_of(monkeypatch):
    found, plain = [], window_decoder.decode
    monkeypatch.setattr(window_decoder, "decode", lambda *given: found.append(plain(*given)) or found[-1])
    image = file(Image.fromarray(noise(300, 800)), "JPEG")
    (batch,) = evaluation_batches(Stored([image]), size=100, resize=150, batch_size=1)
    assert np.array_equal(batch.views["eval"][0, 0].numpy(), by_pil(image, 100, 150))
    (decoded,) = found  # 200 pixels and 3 on each side; whole blocks across
    assert len(decoded.pixels) == 206
    assert decoded.top == 47
    assert decoded.pixels.shape[1] <= 206 + 16 + 8


def test_a_damaged_file_that_pil_reads_counts():
    whole = file(PICTURE, "JPEG", quality=95)
    damaged = replace(whole, data=np.concatenate([whole.data[: len(whole.data) // 2], whole.data[-2:]]))
    (batch,) = evaluation_batches(Stored([damaged]), size=64, resize=73, batch_size=1)
    assert np.array_equal(batch.views["eval"][0, 0].numpy(), by_pil(damaged, 64, 73))


@pytest.mark.parametrize("interpolation", FILTERS)
def test_squashed_groups_show_the_whole_image(interpolation):
    samples = [raw(noise(*shape)) for shape in SHAPES]
    views = [View(name=f"v{s}", size=30, squash=s, interpolation=interpolation) for s in (30, 47, 9)]
    (batch,) = central_batches(Stored(samples), views, {}, batch_size=len(samples))
    for row, sample in enumerate(samples):
        for view in views:
            squashed = Image.fromarray(decode(sample)).resize((view.squash, view.squash), FILTERS["bilinear"])
            expected = np.asarray(squashed.resize((30, 30), FILTERS[interpolation])).transpose(2, 0, 1)
            assert np.array_equal(batch.views[view.name][row, 0].numpy(), expected)


# ---- what a batch holds


@pytest.mark.parametrize("workers", [0, 3])
def test_everything_is_read_in_order(workers):
    source = Stored([raw(noise(20 + i, 30)) for i in range(11)])
    batches = list(evaluation_batches(source, size=16, resize=18, batch_size=4, workers=workers))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert torch.cat([batch.id for batch in batches]).tolist() == list(range(11))
    assert torch.cat([batch.label for batch in batches]).tolist() == source.labels.tolist()
    assert batches[2].views["eval"].shape == (3, 1, 3, 16, 16)
    assert np.array_equal(batches[2].views["eval"][1, 0].numpy(), by_pil(source.samples[9], 16, 18))


def test_some_images():
    source = Stored([raw(noise(20 + i, 30)) for i in range(11)])
    batches = list(evaluation_batches(source, size=16, resize=18, batch_size=4, ids=[7, 2, 2, 9, 0]))
    assert [batch.id.tolist() for batch in batches] == [[7, 2, 2, 9], [0]]


def test_boxes_flips_and_part_labels_of_several_groups():
    maps = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8), dtype=np.uint8)
    source = Stored([raw(noise(60, 80)), raw(noise(90, 40))], maps)
    views = [View(name="a", count=2, size=14), View(name="b", size=20), View(name="c", size=14, squash=30)]
    resize, grids = {"a": 16, "b": 20}, {"a": 7, "c": 5}
    (batch,) = central_batches(source, views, resize, batch_size=2, part_grid=grids)
    assert [tuple(batch.views[name].shape) for name in "abc"] == [
        (2, 2, 3, 14, 14),
        (2, 1, 3, 20, 20),
        (2, 1, 3, 14, 14),
    ]
    assert not any(flip.any() for flip in batch.flip.values())
    for row, sample in enumerate(source.samples):
        for name, size in (("a", 14), ("b", 20)):
            for pixels, box in zip(batch.views[name][row], batch.box[name][row], strict=True):
                assert np.array_equal(pixels.numpy(), by_pil(sample, size, resize[name]))
                assert box.tolist() == pytest.approx(central_box(sample.height, sample.width, size, resize[name]))
        assert batch.box["c"][row].tolist() == [[0, 0, 1, 1]]
        upright = np.zeros(1, bool)
        for name, grid in grids.items():
            box = batch.box[name][row, :1].double().numpy()
            labels = part_labels(maps[row][None], box[None], upright[None], np.ones((1, 2)), grid)[0, 0]
            assert all(np.array_equal(found.numpy(), labels) for found in batch.parts[name][row])
    assert set(batch.parts) == set(grids)


def test_masks_are_those_of_epoch_0_with_schedules_where_they_are_told_to_stand():
    maps = np.random.default_rng(0).integers(0, 256, (5, 4, 8, 8), dtype=np.uint8)
    source = Stored([raw(noise(30 + i, 40)) for i in range(5)], maps)
    masks = [RandomMask("a", 49, 0.75), SemanticMask("b", 49, 0.75, 4, 10)]
    views = [View(name="a", size=14), View(name="b", size=14)]
    more = {"part_grid": {"b": 7}, "masks": masks, "seed": 3, "schedule_epoch": 6, "workers": 2}
    batches = list(central_batches(source, views, {"a": 16, "b": 16}, batch_size=3, **more))
    assert [len(batch) for batch in batches] == [3, 2]
    for batch in batches:
        labels = batch.parts["b"][:, 0].flatten(1).numpy()
        for mask in masks:
            expected = draw(mask, batch.id.numpy(), seed=3, epoch=0, parts=labels, schedule_epoch=6)
            for a, b in zip(batch.masks[mask.name], expected, strict=True):
                assert np.array_equal(a.numpy(), b)


def test_box_of_a_view():
    assert central_box(512, 256, 224, 256).tolist() == pytest.approx([0.28125, 0.0625, 0.4375, 0.875])


# ---- what is refused


def test_no_image_is_left_out():
    source = Stored([raw(noise(20, 30)), None])
    with pytest.raises(BadSampleError, match=r"^sample 1 \(image-1\.png\) is broken$"):
        list(evaluation_batches(source, size=16, resize=18, batch_size=4))


@pytest.mark.parametrize(("mode", "sides"), [("raw", (4, 5)), ("jpg", (0, 5)), ("file", (4, 5))])
def test_metadata_that_promise_another_image(mode, sides):
    data = noise(5, 5).reshape(-1) if mode == "raw" else FILES["jpeg"].data
    with pytest.raises(BadSampleError, match=rf"^sample 0 .*{sides[0]} x {sides[1]} .*promised"):
        list(evaluation_batches(Stored([Encoded(data, mode, *sides)]), size=16, resize=18, batch_size=4))


def test_the_crop_needs_room():
    with pytest.raises(ValueError, match="resize is 16 pixels, smaller than the crop of 18"):
        evaluation_batches(Stored([]), size=18, resize=16, batch_size=4)


def test_nothing_but_tests_imports_the_oracle():
    """`engine.py` names the reference loader in its table, for who asks for that engine."""
    files = [path for tree in ("fastssl", "loaders", "kernels") for path in (ROOT / tree).rglob("*.py")]
    names = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        if "reference_loader" in path.read_text()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        if "reference_loader" in name
    }
    assert len(files) > 100
    assert names == set()
