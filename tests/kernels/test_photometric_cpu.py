import threading
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

pytest.importorskip("numba")

from fastssl import augment
from fastssl.batch import Photometric
from fastssl.kernels.photometric.cpu import BLUR_RADIUS, from_levels, photometric_cpu, photometric_range, scratch_size

JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RAW = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # leaves pixel values in [0, 1]
ORDERS = np.array(list(permutations(range(4))))
SIDES = [(24, 24), (5, 9), (1, 1), (1, 40), (40, 1), (67, 53), (3, 1100), (2, 2100)]  # in one and in several tiles


def images(n=24, height=24, width=24, seed=0):
    """Smooth random crops with a black, a white and a gray one among them."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (n, 5, 5, 3), dtype=np.uint8)
    pixels = [np.asarray(Image.fromarray(s).resize((width, height), Image.Resampling.BICUBIC)) for s in small]
    pixels = np.stack(pixels).transpose(0, 3, 1, 2).copy()
    pixels[:3] = np.array([0, 255, 77])[:, None, None, None][: len(pixels)]
    return pixels


def nothing(n=24):
    """Parameters that change no crop."""
    return {
        "jitter": np.zeros(n, np.bool_),
        "order": np.tile(np.arange(4), (n, 1)),
        "factor": np.tile(np.array([1, 1, 1, 0], np.float32), (n, 1)),
        "gray": np.zeros(n, np.bool_),
        "blur_sigma": np.zeros(n, np.float32),
        "solarize": np.full(n, 256, np.float32),
    }


def drawn(n=24, seed=0):
    """Parameters of which every crop has its own."""
    rng = np.random.default_rng(seed)
    u = rng.random((n, 10))
    return {
        "jitter": u[:, 0] < 0.7,
        "order": ORDERS[rng.integers(0, 24, n)],
        "factor": np.concatenate([0.4 + 1.4 * u[:, 1:4], u[:, 4:5] - 0.5], axis=1).astype(np.float32),
        "gray": u[:, 5] < 0.3,
        "blur_sigma": np.where(u[:, 6] < 0.5, 0.1 + 1.9 * u[:, 7], 0).astype(np.float32),
        "solarize": np.where(u[:, 8] < 0.4, 128, 256).astype(np.float32),
    }


def compiled(crops, p, mean=RAW[0], std=RAW[1]):
    """The function under test; whatever it leaves unwritten is not a number."""
    out = np.full(crops.shape, np.nan, np.float32)
    scratch = np.full(scratch_size(*crops.shape[2:]), np.nan, np.float32)
    photometric_cpu(crops, *(p or nothing(0) | dict.fromkeys(nothing(0))).values(), mean, std, out, scratch)
    return out


def blurred(image, sigma):
    """torchvision's Gaussian blur, but with repeated edge pixels."""
    size = 2 * BLUR_RADIUS + 1
    padded = F.pad(image, [size], padding_mode="edge")
    return F.gaussian_blur(padded, [size, size], [sigma, sigma])[..., size:-size, size:-size]


def by_torchvision(crops, p):
    """The same operations, crop by crop, with torchvision in float64."""
    out = torch.from_numpy(crops).double() / 255
    for i, x in enumerate(out):
        if p["jitter"][i]:
            for op in p["order"][i].tolist():
                x = JITTER[op](x, p["factor"][i, op].item())
        if p["gray"][i]:
            x = F.rgb_to_grayscale(x, 3)
        if p["blur_sigma"][i] > 0:
            x = blurred(x, p["blur_sigma"][i].item())
        out[i] = F.solarize(x, p["solarize"][i].item() / 255) if p["solarize"][i] <= 255 else x
    return out.numpy()


def assert_same(ours, theirs, most=1e-5):
    assert not np.isnan(ours).any()
    assert np.abs(ours - theirs).max() < most


@pytest.mark.parametrize(
    ("op", "value"),
    [(op, value) for op in (0, 1, 2) for value in (0.0, 0.3, 1.0, 1.7)] + [(3, v) for v in (-0.5, -0.1, 0.2, 0.5)],
)
def test_one_jitter_operation(op, value):
    p, x = nothing(), images()
    p["jitter"][:] = True
    p["factor"][:, op] = value
    assert_same(compiled(x, p), by_torchvision(x, p), 2e-6)


@pytest.mark.parametrize("sides", [(24, 24), (67, 53)])
def test_every_order(sides):
    """Factors above 1, so that values are cut off between the operations, and the mean gray depends on it."""
    p, x = nothing(), images(24, *sides, seed=3)
    p["jitter"][:] = True
    p["order"][:] = ORDERS
    p["factor"][:] = [1.6, 1.5, 1.7, 0.13]
    assert_same(compiled(x, p), by_torchvision(x, p), 5e-6)
    p["factor"][:] = [0.6, 0.5, 0.7, -0.3]
    assert_same(compiled(x, p), by_torchvision(x, p), 5e-6)


def test_hue_of_every_kind_of_color():
    levels = np.array([0, 1, 90, 254, 255], np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels, indexing="ij")).reshape(1, 3, 5, 25)
    p, x = nothing(41), np.repeat(colors, 41, axis=0)
    p["jitter"][:] = True
    p["factor"][:, 3] = np.linspace(-0.5, 0.5, 41)
    assert_same(compiled(x, p), by_torchvision(x, p), 2e-6)


@pytest.mark.parametrize("sides", [(24, 24), (1, 1), (4, 7), (70, 53), (2, 2100)])
@pytest.mark.parametrize("gray", [False, True])
def test_blur(sides, gray):
    """Also the strengths at which the number of taps changes."""
    p, x = nothing(10), images(10, *sides)
    p["gray"][:] = gray
    p["blur_sigma"][:] = 0.1, 0.18, 0.2, 0.5, 0.7, 0.75, 0.8, 1.0, 2.0, 0.0
    assert_same(compiled(x, p), by_torchvision(x, p))


@pytest.mark.parametrize("threshold", [0.0, 1.0, 127.5, 128.0, 255.0, 255.5, 256.0])
def test_solarize(threshold):
    p = nothing(1)
    p["solarize"][:] = threshold
    x = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (1, 3, 1, 1))
    solarizes = threshold <= 255
    expected = [255 - value if solarizes and value >= threshold else value for value in range(256)]
    assert np.rint(compiled(x, p)[0, 1] * 255).ravel().tolist() == expected


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("seed", range(3))
def test_everything(sides, seed):
    n = 24 if max(sides) < 1000 else 6
    p, x = drawn(n, seed), images(n, *sides, seed=seed)
    p["solarize"][:] = 256  # compared on its own: at the threshold the last bit decides
    assert_same(compiled(x, p), by_torchvision(x, p))


@pytest.mark.parametrize("part", ["nothing else", "jitter", "gray", "blur", "gray, blur"])
def test_solarize_comes_last(part):
    p, x = nothing(), images(seed=4)
    p["jitter"][:], p["factor"][:] = "jitter" in part, [1.3, 0.8, 1.2, 0.1]
    p["gray"][:], p["blur_sigma"][:] = "gray" in part, 1.0 * ("blur" in part)
    p["solarize"][:] = 100
    apart = np.abs(compiled(x, p) - by_torchvision(x, p)) > 1e-5
    assert apart.mean() < 1e-3


@pytest.mark.parametrize("side", [24, 61])
def test_agrees_with_the_operations_in_pytorch(side):
    """Where a value lies within the rounding of the threshold, one may solarize and the other not."""
    p, x = drawn(96, seed=7), images(96, side, side, seed=7)
    ours = compiled(x, p)
    batch = Photometric(**{key: torch.from_numpy(value)[None] for key, value in p.items()})
    theirs = augment.photometric(torch.from_numpy(x)[None], batch, *RAW)[0].numpy()
    distance = np.abs(ours - theirs)
    assert distance[p["solarize"] > 255].max() < 1e-5
    assert (distance > 1e-5).mean() < 1e-4


@pytest.mark.parametrize("p", [None, nothing(), drawn()], ids=["none", "nothing", "drawn"])
def test_normalises(p):
    x = images()
    expected = torch.from_numpy(compiled(x, p) if p is not None else x / np.float32(255))
    expected = F.normalize(expected, list(MEAN), list(STD)).numpy()
    np.testing.assert_allclose(compiled(x, p, MEAN, STD), expected, rtol=0, atol=2e-6)


def test_drawn_nothing_changes_nothing():
    x, p = images(), nothing()
    np.testing.assert_allclose(compiled(x, p), x / np.float32(255), rtol=0, atol=1e-7)
    p = nothing()
    p["jitter"][:] = True
    np.testing.assert_allclose(compiled(x, p), x / np.float32(255), rtol=0, atol=1e-6)


def test_repeated_operations():
    x, p = images(seed=2), nothing()
    p["jitter"][:] = True
    p["factor"][:] = [1.3, 1.4, 0.7, 0.2]
    p["order"][:] = np.random.default_rng(0).integers(0, 4, (24, 4))
    p["order"][:4] = [[1, 1, 1, 1], [0, 1, 0, 1], [3, 1, 1, 2], [2, 2, 3, 3]]
    assert_same(compiled(x, p), by_torchvision(x, p))


def test_input_is_not_changed():
    x, p = images(), drawn()
    before, parameters = x.copy(), {key: value.copy() for key, value in p.items()}
    compiled(x, p)
    np.testing.assert_array_equal(x, before)
    for key, value in p.items():
        np.testing.assert_array_equal(value, parameters[key])


def test_range_and_scratch():
    """A range leaves the other crops alone, and what lies in a longer scratch beyond scratch_size stays."""
    x, p = images(24, 30, 50), drawn()
    whole = compiled(x, p)
    out = np.full(x.shape, -7, np.float32)
    size = scratch_size(30, 50)
    scratch = np.full(size + 100, -9, np.float32)
    photometric_range(x, 5, 17, *p.values(), *from_levels(*RAW), scratch, out)
    np.testing.assert_array_equal(out[5:17], whole[5:17])
    assert (out[:5] == -7).all()
    assert (out[17:] == -7).all()
    assert (scratch[size:] == -9).all()
    alone = np.empty(x[:1].shape, np.float32)
    for i in range(24):
        photometric_cpu(x[i : i + 1], *(value[i : i + 1] for value in p.values()), *RAW, alone)
        np.testing.assert_array_equal(alone[0], whole[i])


def test_threads_do_not_disturb_each_other():
    x, p = images(64, 40, 40), drawn(64)
    whole, out = compiled(x, p), np.zeros(x.shape, np.float32)

    def work(first):
        for _ in range(20):
            part = slice(first, first + 16)
            photometric_cpu(x[part], *(value[part] for value in p.values()), *RAW, out[part])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(0, 64, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(out, whole)


def test_works_without_pythons_lock():
    """While one thread computes for 10 ms, another goes on in Python; on a busy machine not at every attempt."""
    x, p = images(1, 1000, 1000), drawn(1)
    p["blur_sigma"][:] = 1
    out = compiled(x, p)

    def ticks():
        ended, count = threading.Event(), 0
        thread = threading.Thread(target=lambda: (photometric_cpu(x, *p.values(), *RAW, out), ended.set()))
        thread.start()
        while not ended.wait(0.001):
            count += 1
        thread.join()
        return count

    assert any(ticks() >= 2 for _ in range(30))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)])
def test_empty(shape):
    assert compiled(np.empty(shape, np.uint8), drawn(shape[0])).shape == shape


class TestWrongInputIsRefused:
    def call(self, crops=None, out=None, mean=RAW[0], std=RAW[1], scratch=None, **changed):
        crops = images(4) if crops is None else crops
        out = np.empty(images(4).shape, np.float32) if out is None else out
        photometric_cpu(crops, *(drawn(4) | changed).values(), mean, std, out, scratch)

    @pytest.mark.parametrize("crops", [images(4)[0], images(4).transpose(0, 2, 3, 1)])
    def test_shape_of_the_crops(self, crops):
        with pytest.raises(ValueError, match=r"must be \[N, 3, H, W\]"):
            self.call(crops)

    @pytest.mark.parametrize("crops", [images(4) / np.float32(255), images(4)[..., ::-1]])
    def test_type_and_layout_of_the_crops(self, crops):
        with pytest.raises(ValueError, match=r"^crops is .* must be uint8 \[4, 3, 24, 24\] in C order"):
            self.call(crops)

    @pytest.mark.parametrize("out", [np.empty((4, 3, 24, 23), np.float32), np.empty((4, 3, 24, 24))])
    def test_out(self, out):
        with pytest.raises(ValueError, match=r"^out is .* must be float32 \[4, 3, 24, 24\]"):
            self.call(out=out)

    @pytest.mark.parametrize("name", list(nothing()))
    def test_parameters(self, name):
        for wrong in (drawn(3)[name], drawn(4)[name].astype(np.float16), np.repeat(drawn(4)[name], 2, axis=0)[::2]):
            with pytest.raises(ValueError, match=f"^{name} is "):
                self.call(**{name: wrong})
        if name != "jitter":
            with pytest.raises(ValueError, match=f"^{name} is None; the drawn parameters come together"):
                self.call(**{name: None})

    @pytest.mark.parametrize("value", [-1, 4])
    def test_unknown_operation(self, value):
        order = drawn(4)["order"].copy()
        order[2, 1] = value
        with pytest.raises(ValueError, match="order has a value that is no operation"):
            self.call(order=order)

    def test_scratch(self):
        with pytest.raises(ValueError, match=r"scratch has .* crops of 24 x 24 need"):
            self.call(scratch=np.empty(scratch_size(24, 24) - 1, np.float32))

    @pytest.mark.parametrize("std", [(1, 0, 1), (1, 1)])
    def test_normalisation(self, std):
        with pytest.raises(ValueError, match="must be 3 numbers each, std without a 0"):
            self.call(std=std)
