import ctypes
import mmap
import threading

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("numba")

from fastssl.config import View
from fastssl.loaders import resample
from fastssl.loaders.reference_loader import cut
from fastssl.loaders.resample import cut_all, cut_part, part_window, squash

FILTERS = ("bilinear", "bicubic", "lanczos")


def noise(height, width, seed=0):
    """Random pixels, many of them black or white, so that sums leave the range of a byte and are clipped."""
    values = np.random.default_rng(seed).integers(-150, 400, (height, width, 3))
    return values.clip(0, 255).astype(np.uint8)


def random_boxes(rng, height, width, count):
    sides = np.stack([rng.integers(1, height + 1, count), rng.integers(1, width + 1, count)])
    corners = rng.integers(0, np.array([[height], [width]]) - sides + 1)
    return np.concatenate([corners, sides]).T.copy()


def ours(frame, boxes, flips, size, kind, origin=(0, 0)):
    out = np.full((len(boxes), 3, size, size), 77, np.uint8)
    cut_all(frame, origin, np.asarray(boxes), np.asarray(flips), size, kind, out)
    return out


def by_pil(frame, boxes, flips, size, kind):
    out = np.empty((len(boxes), 3, size, size), np.uint8)
    cut(Image.fromarray(frame), View(size=size, interpolation=kind), np.asarray(boxes), np.asarray(flips), out)
    return out


def one_pass(pixels, size, kind):
    """Rows resized one weight at a time: the definition, in exact sums of rounded weights."""
    support = {"bilinear": 1, "bicubic": 2, "lanczos": 3}[kind]
    length = len(pixels)
    scale = length / size
    stretch = max(scale, 1.0)
    result = np.empty((size, *pixels.shape[1:]), np.uint8)
    for i in range(size):
        centre = (i + 0.5) * scale
        taps = range(max(int(centre - support * stretch + 0.5), 0), min(int(centre + support * stretch + 0.5), length))
        weights = []
        for tap in taps:
            x = abs(tap - centre + 0.5) / stretch
            if kind == "bilinear":
                weights.append(max(1 - x, 0))
            elif kind == "lanczos":
                weights.append(np.sinc(x) * np.sinc(x / 3) if x < 3 else 0)
            else:
                weights.append(1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * (x - 1) * (x - 2) ** 2 if x < 2 else 0)
        fixed = np.rint(np.array(weights) / sum(weights) * 2**22).astype(np.int64)
        total = np.tensordot(fixed, pixels[taps.start : taps.stop].astype(np.int64), 1) + 2**21
        result[i] = (total >> 22).clip(0, 255)
    return result


# ---- against PIL


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize(
    ("shape", "size"),
    [((375, 500), 224), ((500, 333), 96), ((64, 64), 32), ((120, 90), 47), ((33, 40), 7), ((9, 5), 1)],
)
def test_crops_are_pils_to_the_bit(kind, shape, size):
    rng = np.random.default_rng(size)
    frame, boxes, flips = noise(*shape), random_boxes(rng, *shape, 12), rng.random(12) < 0.5
    boxes[0] = 0, 0, *shape
    assert np.array_equal(ours(frame, boxes, flips, size, kind), by_pil(frame, boxes, flips, size, kind))


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (10000, 50), (50, 10000), (600, 10), (16, 5), (15, 6)])
@pytest.mark.parametrize("size", [1, 31, 96])
def test_odd_shapes(kind, shape, size):
    frame = noise(*shape)
    boxes = [(0, 0, *shape), (shape[0] - 1, shape[1] - 1, 1, 1)]
    assert np.array_equal(
        ours(frame, boxes, [True, False], size, kind), by_pil(frame, boxes, [True, False], size, kind)
    )


def test_sizes_of_boxes_around_all_block_sizes():
    frame, rng = noise(70, 70), np.random.default_rng(1)
    sides = [1, 2, 5, 6, 10, 11, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65]
    boxes = np.array([(rng.integers(0, 71 - h), rng.integers(0, 71 - w), h, w) for h in sides for w in sides])
    flips = rng.random(len(boxes)) < 0.5
    for size in (16, 33):
        assert np.array_equal(ours(frame, boxes, flips, size, "bicubic"), by_pil(frame, boxes, flips, size, "bicubic"))


@pytest.mark.parametrize("tall_first", [False, True])
@pytest.mark.parametrize("kind", FILTERS)
def test_both_orders_of_the_passes_follow_the_definition(monkeypatch, tall_first, kind):
    monkeypatch.setattr(resample, "TALL_FIRST", tall_first)
    size = 40
    cases = (((150, 60), True), ((111, 75), True), ((110, 75), False), ((60, 150), False), ((150, 9), True))
    for shape, much_taller in cases:
        frame = noise(*shape)
        if tall_first and much_taller:
            expected = one_pass(one_pass(frame, size, kind).swapaxes(0, 1), size, kind).swapaxes(0, 1)
        else:
            expected = one_pass(one_pass(frame.swapaxes(0, 1), size, kind).swapaxes(0, 1), size, kind)
        got = ours(frame, [(0, 0, *shape)], [False], size, kind)[0]
        assert np.array_equal(got, expected.transpose(2, 0, 1)), shape


@pytest.mark.parametrize("shape", [(375, 500), (500, 300), (20, 31), (1, 1), (900, 8)])
@pytest.mark.parametrize("side", [9, 10, 11, 224])
def test_squash_is_pils_resize_of_the_whole_image(shape, side):
    frame = noise(*shape)
    got = squash(frame, side)
    assert np.array_equal(got, Image.fromarray(frame).resize((side, side), Image.Resampling.BILINEAR))
    assert got.flags.c_contiguous


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("tall_first", [False, True])
def test_a_part_of_the_resized_image_is_cut_from_the_pixels_it_is_made_of(monkeypatch, kind, tall_first):
    monkeypatch.setattr(resample, "TALL_FIRST", tall_first)
    for shape, grid, corner, size in (
        ((150, 60), (64, 64), (20, 1), 40), ((60, 150), (64, 200), (0, 160), 40), ((90, 90), (90, 90), (7, 8), 33),
        ((7, 9), (70, 45), (30, 0), 16), ((300, 40), (50, 50), (49, 0), 1),
    ):  # fmt: skip
        image, tall = noise(*shape), tall_first and shape[0] - grid[0] > 2 * max(shape[1] - grid[1], 0)
        passes = [(image.swapaxes(0, 1), grid[1]), (None, grid[0])] if not tall else [(image, grid[0]), (None, grid[1])]
        between = one_pass(*passes[0], kind).swapaxes(0, 1)
        whole = one_pass(between, passes[1][1], kind)
        whole = whole.swapaxes(0, 1) if tall else whole
        expected = whole[corner[0] :, corner[1] :][:size, :size].transpose(2, 0, 1)
        top, left, height, width = part_window(shape, grid, corner, size, kind)
        frame = image[top : top + height, left : left + width]
        assert np.array_equal(cut_part(frame, (top, left), shape, grid, corner, size, kind), expected)
        assert np.array_equal(cut_part(image, (0, 0), shape, grid, corner, size, kind), expected)
        for rows, columns in ((slice(1, None), slice(None)), (slice(None), slice(1, None)), (slice(-1), slice(None)),
                              (slice(None), slice(-1))):  # fmt: skip
            origin = (top + (rows.start or 0), left + (columns.start or 0))
            with pytest.raises(ValueError, match="leaves the frame"):
                cut_part(frame[rows, columns], origin, shape, grid, corner, size, kind)


# ---- where the pixels lie


def test_frame_is_a_part_of_the_image():
    image, rng = noise(200, 300), np.random.default_rng(2)
    top, left, height, width = 37, 51, 90, 120
    boxes = random_boxes(rng, height, width, 8) + np.array([top, left, 0, 0])
    flips = rng.random(8) < 0.5
    expected = by_pil(image, boxes, flips, 48, "bicubic")
    view = image[top : top + height, left : left + width]  # rows farther apart than they are long
    stored = view.copy()
    stored.flags.writeable = False
    for frame in (view, stored, np.asfortranarray(view), view[::-1].copy()[::-1]):
        assert np.array_equal(ours(frame, boxes, flips, 48, "bicubic", (top, left)), expected)


def test_all_of_a_groups_crops_and_nothing_else_is_written():
    frame = noise(60, 60)
    memory = np.full((5, 3, 20, 20), 77, np.uint8)
    boxes, flips = np.array([(0, 0, 50, 50), (10, 10, 20, 5), (3, 0, 1, 60)]), np.array([False, True, False])
    cut_all(frame, (0, 0), boxes, flips, 20, "bilinear", memory[1:4])
    assert np.array_equal(memory[1:4], by_pil(frame, boxes, flips, 20, "bilinear"))
    assert (memory[[0, 4]] == 77).all()


@pytest.mark.parametrize("shape", [(70, 3), (70, 50), (40, 11), (5, 4), (1, 1), (300, 10)])
@pytest.mark.parametrize("at_the_end", [True, False])
def test_no_byte_beside_the_frame_is_read(shape, at_the_end):
    """The frame borders on memory that may not be touched: reading it would kill the process."""
    page, size = mmap.PAGESIZE, shape[0] * shape[1] * 3
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    block = np.frombuffer(memory, np.uint8)
    for k in (0, pages + 1):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(block.ctypes.data + k * page), page, 0) == 0
    begin = (pages + 1) * page - size if at_the_end else page
    frame = block[begin : begin + size].reshape(*shape, 3)
    frame[:] = noise(*shape)
    for crop in (32, 7):
        boxes = [(0, 0, *shape), (shape[0] // 2, shape[1] // 2, -(-shape[0] // 2), -(-shape[1] // 2))]
        assert np.array_equal(
            ours(frame, boxes, [False, True], crop, "lanczos"), by_pil(frame, boxes, [False, True], crop, "lanczos")
        )


# ---- in a loader


def test_threads_do_not_meet():
    frames = [noise(100 + 7 * k, 130, k) for k in range(6)]
    boxes = np.array([(0, 0, 100, 130), (20, 30, 50, 40)])
    alone = [ours(frame, boxes, [False, True], 64, "bicubic") for frame in frames]
    wrong = []

    def work(k):
        for _ in range(20):
            if not np.array_equal(ours(frames[k], boxes, [False, True], 64, "bicubic"), alone[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_compiled_function_for_all_calls_kept_on_disk_and_without_the_gil():
    frame, boxes, flips = noise(50, 50), np.array([(0, 0, 9, 9)]), np.zeros(1, bool)
    fixed = boxes.copy()
    fixed.flags.writeable = False
    for box in (boxes, fixed, boxes.astype(np.int32), np.asfortranarray(np.repeat(boxes, 2, 0))[::2]):
        ours(frame, box, flips, np.int64(8), "bilinear", (np.int64(0), 0))
    squash(frame, 5)
    cut_part(frame, (0, 0), frame.shape[:2], (np.int64(9), 9), (1, 2), 5, "bicubic")
    compiled = resample._cut_boxes
    assert len(compiled.signatures) == 1
    assert compiled.targetoptions["nogil"]
    assert compiled.stats.cache_path


# ---- what is refused


@pytest.mark.parametrize(
    "box",
    [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0), (16, 0, 5, 5), (0, 26, 5, 5), (0, 0, 21, 5),
     (0, 0, 5, 31), (0, 0, 2**62, 1), (2**62, 0, 2**62, 1), (0, 0, -3, 5)],
)  # fmt: skip
def test_boxes_outside_the_frame(box):
    with pytest.raises(ValueError, match=r"leaves the frame, 20 x 30 pixels from \(7, 9\) on"):
        ours(noise(20, 30), [(7, 9, 2, 2), np.add(box, (7, 9, 0, 0))], [False, False], 8, "bicubic", (7, 9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(out=np.empty((1, 3, 8, 9), np.uint8)), "out is uint8"),
        (dict(out=np.empty((1, 3, 8, 8), np.float32)), "out is float32"),
        (dict(out=np.empty((1, 3, 8, 16), np.uint8)[..., ::2]), "must be contiguous"),
        (dict(frame=np.zeros((20, 30), np.uint8)), "the frame is"),
        (dict(frame=np.zeros((20, 30, 3), np.int16)), "the frame is int16"),
        (dict(frame=np.zeros((20, 30, 4), np.uint8)), "the frame is"),
        (dict(flips=np.zeros(2, bool)), r"\(2,\) in flips"),
        (dict(boxes=np.zeros((1, 3), np.int64)), r"\(1, 3\) numbers in boxes"),
    ],
)
def test_unusable_arrays(change, message):
    arguments = dict(
        frame=noise(20, 30), origin=(0, 0), boxes=np.array([(0, 0, 5, 5)]), flips=np.zeros(1, bool), size=8,
        interpolation="bicubic", out=np.empty((1, 3, 8, 8), np.uint8),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        cut_all(**(arguments | change))
