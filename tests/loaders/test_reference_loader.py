import logging
import threading
import traceback
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image
from torchvision.transforms import v2

from fastssl.config import ConfigError, View
from fastssl.loaders.draw import draw_all
from fastssl.loaders.index import order, replacement
from fastssl.loaders.loader import BadSampleError, part_labels
from fastssl.loaders.masks import BlockMask, RandomMask, SemanticMask, draw
from fastssl.loaders.reference_loader import ReferenceLoader, evaluation_view
from fastssl.loaders.sources import DecodeError, Encoded, Source, open_source

JITTER = dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2, blur=0.5, solarize=0.2)
VIEWS = [
    View(name="a", count=2, size=24, **JITTER),
    View(name="b", size=16, scale=(0.05, 0.4), interpolation="bilinear"),
]


class Memory(Source):
    """Random images of varied size, held in memory; the ids in `broken` cannot be decoded."""

    def __init__(self, count, broken=(), parts=None):
        rng = np.random.default_rng(1)
        self.path, self.classes = "memory", []
        self.labels = np.arange(count) % 10
        self.images = [rng.integers(0, 256, (*rng.integers(20, 60, 2), 3), dtype=np.uint8) for _ in range(count)]
        self.broken = set(broken)
        self.has_parts = parts is not None
        self._parts = parts

    def sizes(self, ids):
        heights, widths = np.array([self.images[i].shape[:2] for i in ids]).T
        return np.where(np.isin(ids, list(self.broken)), 0, [heights, widths])

    def read(self, i):
        if i in self.broken:
            raise DecodeError("is broken")
        height, width, _ = self.images[i].shape
        return Encoded(self.images[i].reshape(-1), "raw", height, width)

    def name(self, i):
        return f"image-{i}.png"

    def fingerprint(self):
        return self.path

    def parts(self, i):
        return self._parts[i] if self.has_parts else None


def loader(source, views=VIEWS, batch_size=4, seed=3, **more):
    return ReferenceLoader(source, views, batch_size=batch_size, seed=seed, **more)


def tensors(batch):
    """Every tensor of a batch by name."""
    found = {"id": batch.id, "label": batch.label}
    for key in ("views", "box", "flip", "parts"):
        found |= {f"{key}.{name}": value for name, value in getattr(batch, key).items()}
    for name, fields in batch.photometric.items():
        found |= {f"{name}.{key}": value for key, value in vars(fields).items()}
    for name, (kept, masked) in batch.masks.items():
        found |= {f"masks.{name}.kept": kept, f"masks.{name}.masked": masked}
    return found


def by_sample(batches):
    """(sample id, tensor name) → row, over all batches."""
    rows = {}
    for batch in batches:
        for name, value in tensors(batch).items():
            for row, sample in enumerate(batch.id.tolist()):
                rows[sample, name] = value[row]
    return rows


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("fastssl-loader")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert loader_threads() == []


# ---- what a batch holds


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_crops_equal_torchvisions(interpolation):
    source = Memory(6)
    view = View(name="v", count=3, size=31, interpolation=interpolation)
    mode = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}.get(
        interpolation, v2.InterpolationMode.LANCZOS
    )
    (batch,) = loader(source, [view], batch_size=6).epoch(2)
    ids = batch.id.numpy()
    drawn = draw_all([view], *source.sizes(ids), seed=3, epoch=2, ids=ids)["v"]
    assert drawn.flip.any()
    assert not drawn.flip.all()
    for row, sample in enumerate(ids):
        image = Image.fromarray(source.images[sample])
        for crop in range(3):
            expected = F.resized_crop(image, *drawn.box[row, crop].tolist(), [31, 31], mode)
            if drawn.flip[row, crop]:
                expected = F.horizontal_flip(expected)
            assert torch.equal(batch.views["v"][row, crop], F.pil_to_tensor(expected))


def test_batch_is_complete():
    source = Memory(9)
    batches = list(loader(source).epoch(5))
    assert len(batches) == 2
    for batch in batches:
        assert batch.epoch == 5
        assert batch.label.tolist() == source.labels[batch.id].tolist()
        shapes = {name: (str(value.dtype), tuple(value.shape)) for name, value in tensors(batch).items()}
        assert shapes == {
            "id": ("torch.int64", (4,)),
            "label": ("torch.int64", (4,)),
            "views.a": ("torch.uint8", (4, 2, 3, 24, 24)),
            "views.b": ("torch.uint8", (4, 1, 3, 16, 16)),
            "box.a": ("torch.float32", (4, 2, 4)),
            "box.b": ("torch.float32", (4, 1, 4)),
            "flip.a": ("torch.bool", (4, 2)),
            "flip.b": ("torch.bool", (4, 1)),
            "a.jitter": ("torch.bool", (4, 2)),
            "a.order": ("torch.int64", (4, 2, 4)),
            "a.factor": ("torch.float32", (4, 2, 4)),
            "a.gray": ("torch.bool", (4, 2)),
            "a.blur_sigma": ("torch.float32", (4, 2)),
            "a.solarize": ("torch.float32", (4, 2)),
        }
    assert torch.cat([b.id for b in batches]).tolist() == order(9, 3, 5)[:8].tolist()


def test_box_fractions_give_back_the_pixels():
    source = Memory(8)
    ids = order(8, 3, 0)
    heights, widths = source.sizes(ids)
    drawn = draw_all(VIEWS, heights, widths, seed=3, epoch=0, ids=ids)
    (batch,) = loader(source, batch_size=8).epoch(0)
    sides = torch.tensor(np.stack([heights, widths, heights, widths], -1))[:, None]
    for name in ("a", "b"):
        assert np.array_equal((batch.box[name] * sides).round().numpy(), drawn[name].box)


def test_squash_resizes_the_whole_image_first():
    source = Memory(4)
    view = View(name="v", size=20, squash=40, interpolation="bilinear", flip=0.0)
    (batch,) = loader(source, [view]).epoch(0)
    for row, sample in enumerate(batch.id.tolist()):
        frame = Image.fromarray(source.images[sample]).resize((40, 40), Image.Resampling.BILINEAR)
        top, left, height, width = (batch.box["v"][row, 0] * 40).round().int().tolist()
        expected = F.resized_crop(frame, top, left, height, width, [20, 20], v2.InterpolationMode.BILINEAR)
        assert torch.equal(batch.views["v"][row, 0], F.pil_to_tensor(expected))


def test_same_crop_at_another_size():
    source = Memory(4)
    views = [VIEWS[0], replace(VIEWS[0], name="small", size=12, same_crop_as="a")]
    (batch,) = loader(source, views).epoch(0)
    assert torch.equal(batch.box["a"], batch.box["small"])
    assert torch.equal(batch.flip["a"], batch.flip["small"])
    assert batch.views["small"].shape == (4, 2, 3, 12, 12)


def test_image_folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(Memory(4).images[i]).save(tmp_path / name / f"{i}.jpg")
    (batch,) = loader(open_source(str(tmp_path))).epoch(0)
    assert sorted(batch.label.tolist()) == [0, 0, 1, 1]


# ---- the same crops whatever the surroundings


@pytest.mark.parametrize(
    "change", [dict(workers=4), dict(prefetch=1), dict(workers=3, prefetch=20), dict(batch_size=3)]
)
def test_crops_do_not_depend_on_threads_prefetch_or_batch_size(change):
    source = Memory(12)
    plain = by_sample(loader(source, batch_size=4).epoch(1))
    assert_same(plain, by_sample(loader(source, **{"batch_size": 4, **change}).epoch(1)))


@pytest.mark.parametrize("world", [2, 8])
def test_ranks_share_out_the_same_global_batches(world):
    source = Memory(20)
    whole = list(loader(source, batch_size=8).epoch(1))
    ranks = [list(loader(source, batch_size=8 // world, rank=r, world=world).epoch(1)) for r in range(world)]
    assert {len(batches) for batches in ranks} == {len(whole)} == {2}
    for position, batch in enumerate(whole):
        parts = [tensors(batches[position]) for batches in ranks]
        assert_same(tensors(batch), {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def test_epoch_starts_anywhere():
    engine = loader(Memory(20))
    whole = [tensors(batch) for batch in engine.epoch(3)]
    for start in (0, 2, 5):
        rest = [tensors(batch) for batch in engine.epoch(3, start=start)]
        assert len(rest) == 5 - start
        for a, b in zip(whole[start:], rest, strict=True):
            assert_same(a, b)


def test_epoch_and_seed_change_crops_and_order():
    source = Memory(12)
    one, other = (next(loader(source, seed=seed).epoch(epoch)) for seed, epoch in ((3, 0), (3, 1)))
    assert one.id.tolist() != other.id.tolist()
    a, b, c = (by_sample(loader(source, seed=seed).epoch(epoch)) for seed, epoch in ((3, 0), (3, 1), (4, 0)))
    assert not torch.equal(a[5, "views.a"], b[5, "views.a"])
    assert not torch.equal(a[5, "views.a"], c[5, "views.a"])


# ---- part maps


def labels_of_one(maps, box, flip, frame, grid):
    """Part labels of one crop, patch by patch."""
    _, rows, columns = maps.shape
    labels = np.empty((grid, grid), int)
    for u in range(grid):
        for v in range(grid):
            x, y = (v + 0.5) / grid, (u + 0.5) / grid
            x = 1 - x if flip else x
            across = np.clip(columns * (box[1] + x * box[3]) / frame[1] - 0.5, 0, columns - 1)
            down = np.clip(rows * (box[0] + y * box[2]) / frame[0] - 0.5, 0, rows - 1)
            left, top = int(across), int(down)
            right, bottom = min(left + 1, columns - 1), min(top + 1, rows - 1)
            dx, dy = across - left, down - top
            upper = maps[:, top, left] * (1 - dx) + maps[:, top, right] * dx
            lower = maps[:, bottom, left] * (1 - dx) + maps[:, bottom, right] * dx
            labels[u, v] = np.argmax(upper * (1 - dy) + lower * dy)
    return labels


def test_part_labels_follow_crop_and_flip():
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 256, (6, 14, 10), dtype=np.uint8)
    box = np.array([[0, 0, 50, 80], [3, 7, 20, 31], [40, 60, 10, 20]])
    for flip in (np.zeros(3, bool), np.ones(3, bool), np.array([True, False, True])):
        (labels,) = part_labels(maps[None], box[None], flip[None], np.array([[50, 80]]), 7)
        assert labels.dtype == np.int64
        for crop in range(3):
            assert np.array_equal(labels[crop], labels_of_one(maps, box[crop], flip[crop], (50, 80), 7))


def test_part_labels_of_a_mirrored_crop_are_mirrored():
    maps = np.random.default_rng(0).integers(0, 256, (6, 14, 14), dtype=np.uint8)
    box = np.array([[3, 7, 20, 31]])
    straight, mirrored = (
        part_labels(maps[None], box[None], np.array([[flip]]), np.array([[50, 80]]), 14) for flip in (False, True)
    )
    assert np.array_equal(straight[..., ::-1], mirrored)


def test_loader_delivers_part_labels():
    rng = np.random.default_rng(0)
    source = Memory(4, parts=rng.integers(0, 256, (4, 6, 14, 14), dtype=np.uint8))
    views = [VIEWS[0], View(name="s", size=16, squash=32)]
    (batch,) = loader(source, views, part_grid={"a": 6, "s": 4}).epoch(0)
    ids = batch.id.numpy()
    drawn = draw_all(views, *source.sizes(ids), seed=3, epoch=0, ids=ids)
    for name, grid in (("a", 6), ("s", 4)):
        for row, sample in enumerate(ids):
            frame = source.images[sample].shape[:2] if name == "a" else (32, 32)
            for crop in range(drawn[name].flip.shape[1]):
                box, flip = drawn[name].box[row, crop], drawn[name].flip[row, crop]
                expected = labels_of_one(source.parts(sample), box, flip, frame, grid)
                assert np.array_equal(batch.parts[name][row, crop].numpy(), expected)


@pytest.mark.parametrize("workers", [0, 3])
def test_loader_delivers_masks(workers):
    parts = np.random.default_rng(0).integers(0, 256, (12, 6, 14, 14), dtype=np.uint8)
    masks = [RandomMask("a", 16, 0.75), BlockMask("b", (4, 4), 8, 2), SemanticMask("s", 36, 0.75, 6, 10)]
    views = [*VIEWS, View(name="s", size=24)]
    more = {"views": views, "part_grid": {"s": 6}, "masks": masks, "workers": workers}
    engine = loader(Memory(12, broken=[5, 9], parts=parts), **more)
    for stage in (None, 7):
        batches = list(engine.epoch(2, schedule_epoch=stage))
        assert len(engine.bad) == 2  # their substitutes have masks of their own
        for batch in batches:
            labels = batch.parts["s"][:, 0].flatten(1).numpy()
            for mask in masks:
                expected = draw(mask, batch.id.numpy(), seed=3, epoch=2, parts=labels, schedule_epoch=stage)
                for a, b in zip(batch.masks[mask.name], expected, strict=True):
                    assert np.array_equal(a.numpy(), b)
    healthy = by_sample(loader(Memory(12, parts=parts), batch_size=3, **more).epoch(2))
    for batch in engine.epoch(2):
        for name, value in tensors(batch).items():
            for row, sample in enumerate(batch.id.tolist()):
                assert torch.equal(value[row], healthy[sample, name]), (sample, name)


def test_a_semantic_mask_needs_part_labels():
    with pytest.raises(ConfigError, match="part labels of a are missing"):
        next(loader(Memory(8), masks=[SemanticMask("a", 16, 0.75, 6, 10)]).epoch(0))


# ---- bad samples


def test_bad_sample_is_replaced_and_reported_once(caplog):
    source, broken = Memory(12), Memory(12, broken=[5, 9])
    with caplog.at_level(logging.WARNING):
        engine = loader(broken, workers=3)
        batches = list(engine.epoch(0)) + list(engine.epoch(0))
    assert engine.bad == [(5, "image-5.png", "is broken"), (9, "image-9.png", "is broken")]
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(lines) == [f"sample {i} (image-{i}.png) is broken; another one replaces it" for i in (5, 9)]
    ids = torch.cat([batch.id for batch in batches[:3]]).tolist()
    substitute = {}
    for sample in (5, 9):
        attempt = 0
        while sample not in substitute:
            candidate = replacement(sample, attempt, 12, 3, 0)
            if candidate not in (5, 9):
                substitute[sample] = candidate
            attempt += 1
    assert ids == [substitute.get(sample, sample) for sample in order(12, 3, 0).tolist()]
    healthy = by_sample(loader(source).epoch(0))
    for batch in batches:
        for name, value in tensors(batch).items():
            for row, sample in enumerate(batch.id.tolist()):
                assert torch.equal(value[row], healthy[sample, name]), (sample, name)


def test_too_many_bad_samples_end_the_epoch():
    with pytest.raises(BadSampleError) as caught:
        list(loader(Memory(12, broken=[1, 4, 7]), max_bad=2).epoch(0))
    text = str(caught.value)
    assert text.startswith("3 samples cannot be read; data.max_bad allows 2.")
    for sample in (1, 4, 7):
        assert f"sample {sample} (image-{sample}.png) is broken" in text


def test_bound_on_bad_samples_is_inclusive():
    assert len(list(loader(Memory(12, broken=[1, 4]), max_bad=2).epoch(0))) == 3


def test_all_samples_bad_ends_the_epoch():
    engine = loader(Memory(5, broken=range(5)))
    for _ in range(2):
        with pytest.raises(BadSampleError, match="5 samples cannot be read"):
            list(engine.epoch(0))


def test_bad_sample_can_end_the_epoch():
    with pytest.raises(BadSampleError, match=r"^sample 4 \(image-4\.png\) is broken$"):
        list(loader(Memory(12, broken=[4]), on_bad="raise").epoch(0))


def test_damaged_file_in_a_folder(tmp_path):
    for i in range(5):
        Image.fromarray(Memory(5).images[i]).save(tmp_path / f"{i}.jpg")
    (tmp_path / "0.jpg").write_bytes(b"")
    (tmp_path / "1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:400])
    engine = loader(open_source(str(tmp_path)), batch_size=5)
    (batch,) = engine.epoch(0)
    assert set(batch.id.tolist()) <= {2, 3, 4}
    assert [(i, name.split("/")[-1]) for i, name, _ in engine.bad] == [(0, "0.jpg"), (1, "1.jpg")]
    assert engine.bad[0][2] == "has zero bytes"


# ---- nothing hangs


def test_error_in_a_worker_keeps_its_traceback():
    source = Memory(12)
    source.read = lambda i: 1 // 0
    with pytest.raises(ZeroDivisionError) as caught:
        list(loader(source, workers=2).epoch(0))
    assert "source.read = lambda i: 1 // 0" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_leaving_an_epoch_early_frees_the_threads():
    engine = loader(Memory(40), workers=3)
    stream = engine.epoch(0)
    next(stream)
    assert loader_threads()
    stream.close()
    assert loader_threads() == []
    for _ in engine.epoch(1):
        break
    assert loader_threads() == []
    assert len(list(engine.epoch(2))) == 10


def test_close_ends_epochs():
    with loader(Memory(40), workers=3) as engine:
        stream = engine.epoch(0)
        next(stream)
    assert loader_threads() == []
    with pytest.raises(RuntimeError, match="the loader was closed"):
        list(stream)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(batch_size=13), ValueError, "has 12 images, fewer than one batch of 13"),
        (dict(batch_size=4, world=4), ValueError, "fewer than one batch of 16"),
        (dict(rank=2, world=2), ValueError, "rank 2 does not exist"),
        (dict(seed=2**32), ValueError, "seed is 4294967296"),
        (dict(views=[View(name="a"), View(name="a")]), ConfigError, "different, non-empty names"),
        (dict(part_grid={"a": 3}), ConfigError, "has no part maps, which the method needs"),
    ],
)
def test_unusable_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        loader(Memory(12), **arguments)


def test_unknown_group_in_part_grid():
    with pytest.raises(ValueError, match=r"part_grid names \['c'\]"):
        loader(Memory(12, parts=np.zeros((12, 2, 3, 3), np.uint8)), part_grid={"c": 3})


def test_start_behind_the_end():
    with pytest.raises(ValueError, match="batch 4 of the epoch does not exist; there are 3"):
        loader(Memory(12)).epoch(0, start=4)


# ---- evaluation


@pytest.mark.parametrize("shape", [(33, 50), (50, 33), (32, 32), (97, 31), (20, 21), (256, 500)])
@pytest.mark.parametrize(("size", "resize"), [(28, 32), (32, 32), (17, 40)])
def test_evaluation_view_equals_torchvisions(shape, size, resize):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    expected = v2.Compose([v2.Resize(resize, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)])(image)
    assert np.array_equal(evaluation_view(image, size, resize), np.asarray(expected))
