"""The DALI engine: the reference's batches, pixels within stated bounds, every kind of sample, every kind of fault."""

import io
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.config import View
from fastssl.loaders.loader import BadSampleError
from fastssl.loaders.masks import BlockMask, SemanticMask
from fastssl.loaders.reference_loader import ReferenceLoader
from fastssl.loaders.sources import DecodeError, Encoded, Source, decode

pytest.importorskip("nvidia.dali")
from fastssl.loaders.dali_loader import DALILoader, payload, ppm

VIEWS = [
    View(name="a", count=2, size=32, jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, blur=0.5),
    View(name="b", size=24, scale=(0.05, 0.4), interpolation="bilinear"),
    View(name="c", size=16, squash=48, interpolation="lanczos"),
    View(name="d", size=8, same_crop_as="b"),
]


def encoded(pixels, kind="JPEG", mode="file", **options) -> Encoded:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(options.pop("convert", "RGB")).save(buffer, kind, **options)
    return Encoded(np.frombuffer(buffer.getvalue(), np.uint8), mode, *pixels.shape[:2])


class Samples(Source):
    """Given samples, labelled by their number."""

    def __init__(self, samples):
        self.path, self.classes, self.samples = "samples", [], samples
        self.labels = np.arange(len(samples))

    def sizes(self, ids):
        return np.array([[self.samples[i].height, self.samples[i].width] for i in ids]).T

    def read(self, i):
        return self.samples[i]

    def name(self, i):
        return f"image-{i}"

    def fingerprint(self):
        return self.path


def pictures(count, seed=0):
    """Smooth pictures of several sizes: sharp edges are where the engines' resizing differs."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        height, width = (int(side) for side in rng.integers(40, 90, 2))
        small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        yield np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def batches(kind, source, views=VIEWS, start=0, **options):
    settings = dict(batch_size=4, seed=3, workers=2, prefetch=2) | options
    with kind(source, views, **settings) as loader:
        return [batch.to("cpu") for batch in loader.epoch(1, start)], loader.bad


def assert_close(mine, reference):
    assert len(mine) == len(reference)
    for a, b in zip(mine, reference, strict=True):
        assert torch.equal(a.id, b.id)
        assert torch.equal(a.label, b.label)
        for name in b.views:
            assert torch.equal(a.box[name], b.box[name])
            assert torch.equal(a.flip[name], b.flip[name])
            assert a.views[name].shape == b.views[name].shape
            error = (a.views[name].int() - b.views[name].int()).abs()
            assert error.float().mean() < (0.9 if name == "d" else 0.4), name  # d: reduced several times
            assert error.max() <= 25, name
        for name, drawn in b.photometric.items():
            assert all(torch.equal(getattr(a.photometric[name], key), value) for key, value in vars(drawn).items())


@pytest.fixture(scope="module")
def source():
    samples = [encoded(pixels, quality=92) for pixels in pictures(9)]
    plain = list(pictures(5, seed=1))
    samples += [
        encoded(plain[0], "PNG"),
        Encoded(plain[1].reshape(-1), "raw", *plain[1].shape[:2]),
        encoded(plain[2], convert="L"),
        encoded(plain[3], convert="CMYK"),
        encoded(plain[4], progressive=True),
    ]
    turned = Image.fromarray(plain[0])
    exif = turned.getexif()
    exif[0x0112] = 6  # turned by 90 degrees: upright, it is as high as it was wide
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif)
    samples.append(Encoded(np.frombuffer(buffer.getvalue(), np.uint8), "file", turned.width, turned.height))
    return Samples(samples)


def test_every_kind_of_sample_as_the_reference_has_it(source):
    mine, _ = batches(DALILoader, source, batch_size=5)
    assert_close(mine, batches(ReferenceLoader, source, batch_size=5)[0])
    assert sorted(torch.cat([batch.id for batch in mine]).tolist()) == list(range(15))


@pytest.mark.parametrize("change", [{"workers": 1}, {"prefetch": 1}, {"prefetch": 9}])
def test_crops_do_not_depend_on_threads_or_prefetch(source, change):
    mine, other = batches(DALILoader, source)[0], batches(DALILoader, source, **change)[0]
    for a, b in zip(mine, other, strict=True):
        assert all(torch.equal(a.views[name], b.views[name]) for name in a.views)


def test_epoch_starts_anywhere_and_ranks_share_it(source):
    whole = batches(DALILoader, source)[0]
    assert len(whole) == 3
    for a, b in zip(batches(DALILoader, source, start=2)[0], whole[2:], strict=True):
        assert torch.equal(a.views["a"], b.views["a"])
    halves = [batches(DALILoader, source, batch_size=2, rank=rank, world=2)[0] for rank in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(batch.views["b"], torch.cat([first.views["b"], second.views["b"]]))
    assert batches(DALILoader, source, start=3)[0] == []


def truncated(sample):
    return replace(sample, data=sample.data[: len(sample.data) // 2])


def spoiled(sample):
    """A JPEG whose markers are in order but whose Huffman table is not: only a decoder notices."""
    data = sample.data.copy()
    table = data.tobytes().index(b"\xff\xc4")
    data[table + 5 : table + 21] = 255
    return replace(sample, data=data)


@pytest.mark.parametrize("damage", [truncated, spoiled, lambda s: replace(s, data=s.data[:0])])
def test_a_bad_sample_is_replaced_as_in_the_reference(source, damage, caplog):
    samples = list(source.samples)
    samples[4] = damage(samples[4])
    with pytest.raises(DecodeError):
        decode(samples[4])
    mine, bad = batches(DALILoader, Samples(samples), batch_size=5)
    reference, reference_bad = batches(ReferenceLoader, Samples(samples), batch_size=5)
    assert_close(mine, reference)
    assert [i for i, *_ in bad] == [i for i, *_ in reference_bad] == [4]
    assert "sample 4 (image-4)" in caplog.text


def test_a_bad_sample_can_end_the_epoch(source):
    samples = list(source.samples)
    samples[4] = spoiled(samples[4])
    with pytest.raises(BadSampleError, match=r"sample 4 \(image-4\)"):
        batches(DALILoader, Samples(samples), batch_size=5, on_bad="raise")


def test_leaving_an_epoch_early_frees_the_threads(source):
    before = threading.active_count()
    loader = DALILoader(source, VIEWS, batch_size=2, seed=0, workers=2, prefetch=2)
    stream = loader.epoch(0)
    next(stream)
    stream.close()
    loader.close()
    assert threading.active_count() <= before


def test_batches_may_be_kept(source):
    """The pixels are DALI's own memory: it must not be used again while a batch lives."""
    kept = batches(DALILoader, source, views=VIEWS[1:2], batch_size=3, prefetch=1)[0]
    again = batches(ReferenceLoader, source, views=VIEWS[1:2], batch_size=3)[0]
    assert_close(kept, again)


def test_part_labels_and_masks_come_along(source):
    maps = np.random.default_rng(0).integers(0, 256, (15, 3, 7, 7), dtype=np.uint8)

    class Parts(Samples):
        has_parts = True

        def parts(self, i):
            return maps[i]

    masks = [BlockMask("b", (4, 4), 8, 2), SemanticMask("c", 4, 0.5, 3, 10)]
    options = {"part_grid": {"a": 4, "c": 2}, "masks": masks}
    mine = batches(DALILoader, Parts(source.samples), **options)[0]
    reference = batches(ReferenceLoader, Parts(source.samples), **options)[0]
    for a, b in zip(mine, reference, strict=True):
        assert all(torch.equal(a.parts[name], b.parts[name]) for name in ("a", "c"))
        assert all(torch.equal(x, y) for name in "bc" for x, y in zip(a.masks[name], b.masks[name], strict=True))


def test_what_dali_gets():
    pixels = next(pictures(1))
    jpeg = encoded(pixels)
    assert payload(jpeg) is jpeg.data
    assert payload(encoded(pixels, "PNG"))[:2].tobytes() == b"P6"
    with Image.open(io.BytesIO(ppm(pixels).tobytes())) as image:
        assert np.array_equal(np.asarray(image), pixels)
    wrong = replace(jpeg, height=jpeg.height + 1)
    with pytest.raises(DecodeError, match="were promised"):
        payload(wrong)
