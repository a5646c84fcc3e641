"""Photometric augmentation: against the float64 reference, torchvision crop by crop, and known values.

tests/test_augment.py holds more about the reference path.
"""

import math
import threading
from itertools import permutations

import pytest
import torch
import torchvision.transforms.v2.functional as F

from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels.photometric import BLUR_RADIUS, cases, photometric, reference

OP = cases.OPS[0]
JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # leaves pixel values in [0, 1]
ORDERS = torch.tensor(list(permutations(range(4))))
SIDES = [(24, 24), (5, 9), (1, 1), (1, 40), (40, 1), (67, 53), (3, 1100), (2, 2100)]  # in one and in several tiles


@pytest.fixture(params=["reference", "triton", "auto"])  # auto: the compiled twin, on the CPU
def path(request):
    return request.param


@pytest.fixture
def place(path, device):
    return "cpu" if path == "auto" else device


def nothing(N, device="cpu"):
    """Parameters that change no crop."""
    drawn = {
        "jitter": torch.zeros(N, dtype=torch.bool),
        "order": torch.arange(4).repeat(N, 1),
        "factor": torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(N, 1),
        "gray": torch.zeros(N, dtype=torch.bool),
        "blur_sigma": torch.zeros(N),
        "solarize": torch.full((N,), 256.0),
    }
    return {name: value.to(device) for name, value in drawn.items()}


def drawn(N, device="cpu", seed=0, solarize=256.0):
    """Wider draws than DINO's, every crop its own; eight crops have all combinations of jitter, gray and blur."""
    g = torch.Generator().manual_seed(seed)
    u, i = torch.rand(N, 8, generator=g), torch.arange(N)
    values = {
        "jitter": i & 4 == 0,
        "order": torch.rand(N, 4, generator=g).argsort(1),
        "factor": torch.cat([0.3 + 1.5 * u[:, 1:4], u[:, 4:5] - 0.5], 1),
        "gray": i & 1 == 1,
        "blur_sigma": torch.where(i & 2 == 2, 0.1 + 1.9 * u[:, 7], 0.0),
        "solarize": torch.full((N,), solarize),
    }
    return {name: value.to(device) for name, value in values.items()}


def pixels(N, height=20, width=24, device="cpu", seed=0):
    """Smooth random crops; the first is black, the second white, the third one color."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(N, 3, 5, 6, generator=g) * 300 - 20
    crops = torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear").clamp(0, 255).to(torch.uint8)
    for i, color in enumerate([(0, 0, 0), (255, 255, 255), (77, 200, 11)][:N]):
        crops[i] = torch.tensor(color, dtype=torch.uint8)[:, None, None]
    return crops.to(device)


def by_torchvision(crops, p):
    """All but solarize, crop by crop, with torchvision in float64."""
    out = []
    for n, crop in enumerate(crops):
        x = crop.double() / 255
        if p["jitter"][n]:
            for op in p["order"][n].tolist():
                x = JITTER[op](x, p["factor"][n, op].item())
        if p["gray"][n]:
            x = F.rgb_to_grayscale(x, 3)
        sigma, side = p["blur_sigma"][n].item(), 2 * BLUR_RADIUS + 1
        if sigma > 0:
            x = F.gaussian_blur(F.pad(x, [side], padding_mode="edge"), [side, side], [sigma, sigma])
            x = x[..., side:-side, side:-side]
        out.append(x)
    return torch.stack(out)


def assert_same(out, expected, atol=1e-5):
    torch.testing.assert_close(out.double(), expected.double(), atol=atol, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(17, 33), (1, 3)])
def test_equals_torchvision(path, height, width, place):
    crops, p = pixels(8, height, width, place), drawn(8, place)
    with forced(path):
        out = photometric(crops, **p, **RAW)
    assert_same(out, by_torchvision(crops, p))


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("seed", range(3))
def test_the_compiled_twin_equals_torchvision(sides, seed):
    n = 24 if max(sides) < 1000 else 6
    crops, p = pixels(n, *sides, seed=seed), drawn(n, seed=seed)
    with forced("auto"):
        assert_same(photometric(crops, **p, **RAW), by_torchvision(crops, p))


@pytest.mark.parametrize("op", range(4))
def test_one_jitter_operation(path, op, place):
    """Every combination of five levels, and smooth crops; factors to the ends of their ranges."""
    levels = torch.tensor([0, 1, 90, 254, 255], dtype=torch.uint8, device=place)
    hues = torch.linspace(-0.5, 0.5, 9 if path == "triton" else 41)  # the interpreter takes long
    amounts = hues if op == 3 else torch.tensor([0.0, 0.3, 1.0, 1.7, 1.9])
    p = nothing(len(amounts), place)
    p["jitter"][:] = True
    p["factor"][:, op] = amounts
    colors = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 5, 25).repeat(len(amounts), 1, 1, 1)
    for crops in (colors, pixels(len(amounts), 24, 24, place)):
        with forced(path):
            out = photometric(crops, **p, **RAW)
        assert_same(out, by_torchvision(crops, p), 2e-6)


@pytest.mark.parametrize("sides", [(24, 24), (67, 53)])
@pytest.mark.parametrize("factor", [[1.6, 1.5, 1.7, 0.13], [0.6, 0.5, 0.7, -0.3]])
def test_every_order(sides, factor):
    """Factors above 1: values are cut off between the operations, and the mean gray depends on it."""
    crops, p = pixels(24, *sides, seed=3), nothing(24)
    p |= {"jitter": ~p["jitter"], "order": ORDERS, "factor": torch.tensor(factor).repeat(24, 1)}
    with forced("auto"):
        assert_same(photometric(crops, **p, **RAW), by_torchvision(crops, p), 5e-6)


@pytest.mark.parametrize("sides", [(24, 24), (1, 1), (4, 7), (70, 53), (2, 2100)])
@pytest.mark.parametrize("gray", [False, True])
def test_blur(sides, gray):
    """Also the strengths at which the compiled twin's number of taps changes."""
    crops, p = pixels(10, *sides), nothing(10)
    p["gray"][:] = gray
    p["blur_sigma"] = torch.tensor([0.1, 0.18, 0.2, 0.5, 0.7, 0.75, 0.8, 1.0, 2.0, 0.0])
    with forced("auto"):
        assert_same(photometric(crops, **p, **RAW), by_torchvision(crops, p))


@pytest.mark.parametrize("threshold", [0.0, 1.0, 127.5, 128.0, 254.5, 255.0, 255.5, 256.0])
def test_solarize_level_by_level(path, threshold, place):
    p = nothing(1, place)
    p["solarize"][:] = threshold
    crops = torch.arange(256, dtype=torch.uint8, device=place).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    with forced(path):
        out = photometric(crops, **p, **RAW)
    expected = [255 - level if threshold <= 255 and level >= threshold else level for level in range(256)]
    for channel in range(3):
        assert (out[0, channel].flatten() * 255).round().int().tolist() == expected


def test_solarize_comes_last(path, place):
    """At the threshold the last bit decides, so values that come within 1e-5 of it may be on either side: a few."""
    crops, p = pixels(12, 24, 24, place), drawn(12, place, solarize=70.0)
    x = reference.photometric(crops, **p | {"solarize": torch.full((12,), 256.0, device=place)}, **RAW)
    with forced(path):
        out = photometric(crops, **p, **RAW)
    close = (x - 70 / 255).abs() < 1e-5
    assert close.float().mean() < 1e-3
    expected = torch.where(x >= 70 / 255, 1 - x, x)
    torch.testing.assert_close(out[~close], expected[~close], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.minimum(out, 1 - out), torch.minimum(x, 1 - x), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", OP.dtypes, ids=str)
def test_blur_keeps_what_is_flat_and_spreads_a_dot(path, dtype, place):
    crops = torch.zeros(3, 3, 33, 47, dtype=torch.uint8, device=place)
    crops[0] = 200
    crops[1:, :, 16, 33] = 255
    p = nothing(3, place)
    p["blur_sigma"][:] = torch.tensor([2.0, 1.5, 0.1], device=place)
    with forced(path):
        out = photometric(crops, **p, **RAW, dtype=dtype).float()
    exact = dtype == torch.float32
    torch.testing.assert_close(out[0], torch.full_like(out[0], 200 / 255), atol=1e-6 if exact else 4e-3, rtol=0)
    assert out[1, 0].sum().item() == pytest.approx(1, abs=1e-5 if exact else 1e-2)
    for dim, center in ((0, 33), (1, 16)):
        offset = torch.arange(out.shape[3 - dim], device=place) - center
        assert (out[1, 2].sum(dim) * offset**2).sum().item() == pytest.approx(1.5**2, rel=0.01 if exact else 0.03)
    torch.testing.assert_close(out[2], crops[2].float() / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [*OP.dtypes, torch.float64], ids=str)
def test_normalises_and_casts(path, dtype, place):
    crops = pixels(4, 30, 31, place)
    expected = F.normalize(crops.double() / 255, cases.MEAN, cases.STD)
    p = nothing(4, place)
    with forced(path):
        for parameters in ({}, p):
            out = photometric(crops, **parameters, mean=cases.MEAN, std=cases.STD, dtype=dtype)
            assert out.dtype == dtype
            assert out.is_contiguous()
            torch.testing.assert_close(out, expected.to(dtype))
            if dtype == torch.float32:
                assert_same(out, expected, 2e-6)


@pytest.mark.parametrize("path", ["triton", "auto"])
def test_a_crop_is_treated_alike_in_any_batch_and_run(path, place, monkeypatch):
    """Also by several threads at once."""
    n = 64 if path == "auto" else 3
    crops, p = pixels(n, 17, 33, place, seed=1), drawn(n, place, seed=1, solarize=90.0)
    with forced(path):
        runs = []
        for threads in (1, 4, 4):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            runs.append(photometric(crops, **p, **RAW))
        alone = [photometric(crops[i : i + 1], **{k: v[i : i + 1] for k, v in p.items()}, **RAW) for i in range(n)]
    for other in (*runs[1:], torch.cat(alone)):
        assert torch.equal(runs[0], other)


def test_what_draws_nothing_changes_nothing(path, place):
    crops, p = pixels(24, 24, 24, place), nothing(24, place)
    with forced(path):
        assert_same(photometric(crops, **p, **RAW), crops / 255, 1e-7)
        assert_same(photometric(crops, **p | {"jitter": ~p["jitter"]}, **RAW), crops / 255, 1e-6)


def test_a_range_leaves_the_other_crops_and_the_rest_of_the_scratch_alone():
    pytest.importorskip("numba")
    from fastssl.kernels.photometric.cpu import photometric_range

    crops, p = pixels(24, 30, 50), drawn(24)
    with forced("auto"):
        whole = photometric(crops, **p, **RAW)
    out, size = torch.full(crops.shape, -7.0), 3 * (30 + 2 * BLUR_RADIUS) * 50
    scratch = torch.full((size + 100,), math.nan)
    scratch[size:] = -9
    arrays = [x.numpy() for x in (*p.values(), torch.full((3,), 1 / 255), torch.zeros(3), scratch, out)]
    photometric_range(crops.numpy(), 5, 17, *arrays)
    assert torch.equal(out[5:17], whole[5:17])
    assert (out[:5] == -7).all()
    assert (out[17:] == -7).all()
    assert (scratch[size:] == -9).all()


def test_the_compiled_twin_works_without_pythons_lock():
    """While one thread computes for 10 ms, another goes on in Python; on a busy machine not at every attempt."""
    pytest.importorskip("numba")
    crops, p = pixels(1, 1000, 1000), drawn(1)
    p["blur_sigma"][:] = 1
    photometric(crops, **p, **RAW)

    def ticks():
        ended, count = threading.Event(), 0
        thread = threading.Thread(target=lambda: (photometric(crops, **p, **RAW), ended.set()))
        thread.start()
        while not ended.wait(0.001):
            count += 1
        thread.join()
        return count

    assert any(ticks() >= 2 for _ in range(30))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)])
def test_empty(shape):
    assert photometric(torch.empty(shape, dtype=torch.uint8), **drawn(shape[0]), **RAW).shape == shape


def test_inputs_are_not_changed(path, place):
    crops, p = pixels(3, device=place), drawn(3, place)
    before, parameters = crops.clone(), {name: value.clone() for name, value in p.items()}
    with forced(path):
        photometric(crops, **p, **RAW)
    assert torch.equal(crops, before)
    assert all(torch.equal(value, parameters[name]) for name, value in p.items())


def test_compiles_without_a_graph_break(device, compiles_whole):
    crops, p = pixels(3, device=device), drawn(3, device)
    gain = torch.ones((), device=device, requires_grad=True)
    compiles_whole(lambda gain: gain * photometric(crops, **p, **RAW), gain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crops": torch.zeros(2, 3, 8, 8)}, "crops must be uint8, not float32"),
        ({"crops": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, r"crops must be \[N, 3, H, W\], not \[2, 1, 8, 8\]"),
        ({"factor": torch.zeros(2, 3)}, r"factor must be \[N, 4\] with N = 2, not \[2, 3\]"),
        ({"order": torch.zeros(2, 4)}, "order must be int32 or int64, not float32"),
        ({"order": torch.full((2, 4), 4)}, r"order must be from 0 \(brightness\) to 3 \(hue\), not another value"),
        ({"order": torch.full((2, 4), -1)}, "order must be from 0"),
        ({"gray": torch.zeros(2)}, "gray must be bool, not float32"),
        ({"gray": None, "order": None}, "must be all given or all None, not without order, gray"),
        ({"mean": (0.5,)}, "mean must be 3 numbers, not 1"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be 3 numbers other than 0, not"),
        ({"dtype": torch.uint8}, "dtype must be a floating-point type, not torch.uint8"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = {"crops": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), **nothing(2), **RAW}
    with pytest.raises(KernelError, match=message):
        photometric(**inputs | change)


@pytest.mark.parametrize("name", OP.library)
def test_library_pipelines_run(name):
    inputs = OP.inputs(cases.Maker(), torch.float32, N=3, size=(16, 16))
    out = OP.library[name](**inputs)
    assert out.shape == (3, 3, 16, 16)
    assert out.isfinite().all()
    assert math.isclose(out.std().item(), 1, abs_tol=0.9)


@pytest.mark.parametrize(
    "path", ["auto", "reference"] if torch.cuda.is_available() else ["auto", "reference", "triton"]
)
def test_memory_for_the_result_is_used(path):
    x, p = pixels(3), drawn(3)
    out = torch.empty(x.shape)
    with forced(path):
        result = photometric(x, **p, **RAW, out=out)
        assert result is out
        torch.testing.assert_close(out, photometric(x, **p, **RAW))
        with pytest.raises(KernelError, match=r"out must be \[N, 3, H, W\] with N = 3"):
            photometric(x, **p, **RAW, out=out[:2])
