"""Photometric augmentation: against the float64 reference, torchvision crop by crop, and known values.

tests/test_augment.py holds more about the reference path.
"""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as F

from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels._verify import verify
from fastssl.kernels.photometric import BLUR_RADIUS, cases, photometric, reference

OP = cases.OPS[0]
PATHS = ("reference", "triton")
JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # leaves pixel values in [0, 1]


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
    """Wider draws than DINO's, every crop its own."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(N, 8, generator=g)
    values = {
        "jitter": u[:, 0] < 0.8,
        "order": torch.rand(N, 4, generator=g).argsort(1),
        "factor": torch.cat([0.3 + 1.5 * u[:, 1:4], u[:, 4:5] - 0.5], 1),
        "gray": u[:, 5] < 0.3,
        "blur_sigma": torch.where(u[:, 6] < 0.5, 0.1 + 1.9 * u[:, 7], 0.0),
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
    """All but solarize, crop by crop, with torchvision on float images."""
    out = []
    for n, crop in enumerate(crops):
        x = crop.float() / 255
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


@pytest.mark.parametrize("dtype", OP.dtypes, ids=str)
@pytest.mark.parametrize("case", OP.proof)
def test_equals_the_reference(case, dtype, device):
    verify(OP, OP.proof[case], dtype, device)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("height", "width"), [(17, 33), (1, 3)])
def test_equals_torchvision(path, height, width, device):
    crops, p = pixels(8, height, width, device), drawn(8, device)
    with forced(path):
        out = photometric(crops, **p, **RAW)
    torch.testing.assert_close(out, by_torchvision(crops, p), atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("op", range(4))
def test_one_jitter_operation(path, op, device):
    """Every combination of five levels, factors to the ends of their ranges."""
    levels = torch.tensor([0, 1, 90, 254, 255], dtype=torch.uint8, device=device)
    amounts = [-0.5, -0.1, 0.0, 1 / 3, 0.5] if op == 3 else [0.0, 0.3, 1.0, 1.9]
    crops = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 5, 25).repeat(len(amounts), 1, 1, 1)
    p = nothing(len(amounts), device)
    p["jitter"][:] = True
    p["factor"][:, op] = torch.tensor(amounts, device=device)
    with forced(path):
        out = photometric(crops, **p, **RAW)
    torch.testing.assert_close(out, by_torchvision(crops, p), atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("threshold", [0.0, 1.0, 128.0, 254.5, 255.0, 255.5])
def test_solarize_level_by_level(path, threshold, device):
    p = nothing(1, device)
    p["solarize"][:] = threshold
    crops = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    with forced(path):
        out = photometric(crops, **p, **RAW)
    expected = [255 - level if threshold <= 255 and level >= threshold else level for level in range(256)]
    for channel in range(3):
        assert (out[0, channel].flatten() * 255).round().int().tolist() == expected


@pytest.mark.parametrize("path", PATHS)
def test_solarize_comes_last(path, device):
    """At the threshold the last bit decides, so values that come within 1e-5 of it may be on either side: a few."""
    crops, p = pixels(12, 24, 24, device), drawn(12, device, solarize=70.0)
    x = reference.photometric(crops, **p | {"solarize": torch.full((12,), 256.0, device=device)}, **RAW)
    with forced(path):
        out = photometric(crops, **p, **RAW)
    close = (x - 70 / 255).abs() < 1e-5
    assert close.float().mean() < 1e-3
    expected = torch.where(x >= 70 / 255, 1 - x, x)
    torch.testing.assert_close(out[~close], expected[~close], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.minimum(out, 1 - out), torch.minimum(x, 1 - x), atol=2e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", OP.dtypes, ids=str)
def test_blur_keeps_what_is_flat_and_spreads_a_dot(path, dtype, device):
    crops = torch.zeros(3, 3, 33, 47, dtype=torch.uint8, device=device)
    crops[0] = 200
    crops[1:, :, 16, 33] = 255
    p = nothing(3, device)
    p["blur_sigma"][:] = torch.tensor([2.0, 1.5, 0.1], device=device)
    with forced(path):
        out = photometric(crops, **p, **RAW, dtype=dtype).float()
    exact = dtype == torch.float32
    torch.testing.assert_close(out[0], torch.full_like(out[0], 200 / 255), atol=1e-6 if exact else 4e-3, rtol=0)
    assert out[1, 0].sum().item() == pytest.approx(1, abs=1e-5 if exact else 1e-2)
    for dim, center in ((0, 33), (1, 16)):
        offset = torch.arange(out.shape[3 - dim], device=device) - center
        assert (out[1, 2].sum(dim) * offset**2).sum().item() == pytest.approx(1.5**2, rel=0.01 if exact else 0.03)
    torch.testing.assert_close(out[2], crops[2].float() / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [*OP.dtypes, torch.float64], ids=str)
def test_normalises_and_casts(path, dtype, device):
    crops = pixels(4, 30, 31, device)
    expected = F.normalize(crops.double() / 255, cases.MEAN, cases.STD)
    p = nothing(4, device)
    with forced(path):
        for parameters in ({}, p):
            out = photometric(crops, **parameters, mean=cases.MEAN, std=cases.STD, dtype=dtype)
            assert out.dtype == dtype
            assert out.is_contiguous()
            torch.testing.assert_close(out, expected.to(dtype))


def test_a_crop_is_treated_alike_in_any_batch_and_run(device):
    crops, p = pixels(3, 17, 33, device, seed=1), drawn(3, device, seed=1, solarize=90.0)
    with forced("triton"):
        whole, again = photometric(crops, **p, **RAW), photometric(crops, **p, **RAW)
        alone = [photometric(crops[n : n + 1], **{k: v[n : n + 1] for k, v in p.items()}, **RAW) for n in range(3)]
    assert torch.equal(whole, again)
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize("path", PATHS)
def test_inputs_are_not_changed(path, device):
    crops, p = pixels(3, device=device), drawn(3, device)
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


@pytest.mark.parametrize("path", ["auto", "reference", "triton"])
def test_memory_for_the_result_is_used(path):
    x, p = pixels(3), drawn(3)
    out = torch.empty(x.shape)
    with forced(path):
        result = photometric(x, **p, **RAW, out=out)
        assert result is out
        torch.testing.assert_close(out, photometric(x, **p, **RAW))
        with pytest.raises(KernelError, match=r"out must be \[N, 3, H, W\] with N = 3"):
            photometric(x, **p, **RAW, out=out[:2])
