from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image, ImageFilter

from fastssl import augment as module
from fastssl.augment import BLUR_RADIUS, augment, photometric
from fastssl.batch import Batch, Photometric
from fastssl.kernels._path import forced
from fastssl.kernels.photometric import reference

JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
RAW = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # leaves pixel values in [0, 1]


def images(batch=6, count=4, side=24, seed=0):
    """Smooth random crops with some flat, black, white and gray ones among them."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (batch * count, 5, 5, 3), dtype=np.uint8)
    pixels = np.stack([np.asarray(Image.fromarray(s).resize((side, side), Image.Resampling.BICUBIC)) for s in small])
    pixels[:3] = np.array([0, 255, 77])[:, None, None, None]
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).reshape(batch, count, 3, side, side).copy())


def nothing(batch=6, count=4):
    """Parameters that change no crop."""
    shape = (batch, count)
    return Photometric(
        jitter=torch.zeros(shape, dtype=torch.bool),
        order=torch.arange(4).expand(*shape, 4).clone(),
        factor=torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(*shape, 4).clone(),
        gray=torch.zeros(shape, dtype=torch.bool),
        blur_sigma=torch.zeros(shape),
        solarize=torch.full(shape, 256.0),
    )


def drawn(batch=6, count=4, seed=0):
    """Parameters of which every crop has its own."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(batch, count, 10, generator=g)
    return Photometric(
        jitter=u[..., 0] < 0.7,
        order=torch.rand(batch, count, 4, generator=g).argsort(-1),
        factor=torch.cat([0.4 + 1.4 * u[..., 1:4], u[..., 4:5] - 0.5], -1),
        gray=u[..., 5] < 0.3,
        blur_sigma=torch.where(u[..., 6] < 0.5, 0.1 + 1.9 * u[..., 7], 0.0),
        solarize=torch.where(u[..., 8] < 0.4, 128.0, 256.0),
    )


def blurred(image, sigma):
    """torchvision's Gaussian blur, but with repeated edge pixels."""
    size = 2 * BLUR_RADIUS + 1
    padded = F.pad(image, [size], padding_mode="edge")
    return F.gaussian_blur(padded, [size, size], [sigma, sigma])[..., size:-size, size:-size]


def by_torchvision(views, p):
    """The same operations, crop by crop, with torchvision on float images."""
    out = views.float() / 255
    for i in np.ndindex(views.shape[:2]):
        x = out[i]
        if p.jitter[i]:
            for op in p.order[i].tolist():
                x = JITTER[op](x, p.factor[i][op].item())
        if p.gray[i]:
            x = F.rgb_to_grayscale(x, 3)
        if p.blur_sigma[i] > 0:
            x = blurred(x, p.blur_sigma[i].item())
        out[i] = F.solarize(x, p.solarize[i].item() / 255) if p.solarize[i] <= 255 else x
    return out


@pytest.fixture(params=["only chosen crops", "all crops"])
def both_ways(request, monkeypatch):
    """Runs a test with the CPU's and with the accelerator's way of leaving crops out."""
    if request.param == "all crops":
        monkeypatch.setattr(reference, "_only_chosen", reference._select)


@pytest.mark.usefixtures("both_ways")
class TestAgainstTorchvision:
    @pytest.mark.parametrize(
        ("op", "value"),
        [(op, value) for op in (0, 1, 2) for value in (0.0, 0.3, 1.0, 1.7)] + [(3, v) for v in (-0.5, -0.1, 0.2, 0.5)],
    )
    def test_one_jitter_operation(self, op, value):
        p, x = nothing(), images()
        p.jitter[:] = True
        p.factor[..., op] = value
        torch.testing.assert_close(photometric(x, p, **RAW), by_torchvision(x, p), atol=1e-5, rtol=0)

    def test_hue_of_every_kind_of_color(self):
        levels = torch.tensor([0, 1, 90, 254, 255], dtype=torch.uint8)
        colors = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 1, 3, 5, 25)
        x = colors.expand(40, 1, 3, 5, 25).contiguous()
        p = nothing(40, 1)
        p.jitter[:] = True
        p.factor[:, 0, 3] = torch.linspace(-0.5, 0.5, 40)
        torch.testing.assert_close(photometric(x, p, **RAW), by_torchvision(x, p), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
    def test_blur(self, sigma):
        p, x = nothing(), images()
        p.blur_sigma[::2] = sigma
        torch.testing.assert_close(photometric(x, p, **RAW), by_torchvision(x, p), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("threshold", [0.0, 1.0, 128.0, 255.0, 256.0])
    def test_solarize(self, threshold):
        p = nothing(1, 1)
        p.solarize[:] = threshold
        x = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16).repeat(1, 1, 3, 1, 1)
        expected = [255 - value if value >= threshold else value for value in range(256)]
        assert (photometric(x, p, **RAW)[0, 0, 0].flatten() * 255).round().int().tolist() == expected

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("side", [24, 5, 1])
    def test_everything(self, seed, side):
        p, x = drawn(seed=seed), images(side=side, seed=seed)
        p.solarize[:] = 256  # compared on its own: at the threshold the last bit decides
        torch.testing.assert_close(photometric(x, p, **RAW), by_torchvision(x, p), atol=1e-5, rtol=0)

    def test_solarize_comes_last(self):
        p, x = drawn(), images()
        p.solarize[:] = 128
        ours, theirs = photometric(x, p, **RAW), by_torchvision(x, p)
        assert ((ours - theirs).abs() > 1e-5).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("to_8_bit", "most"), [(lambda x: x, 8), (F.to_pil_image, 24)], ids=["torchvision uint8", "PIL"]
)
def test_distance_from_8_bit_images(to_8_bit, most):
    """With 8 bits every operation cuts off the fraction, and PIL's hue and saturation have 256 steps."""
    p, x = drawn(16, 4), images(16, 4)
    p.solarize[:] = 256
    p.blur_sigma[:] = 0
    p.factor = torch.where(torch.tensor([False, False, False, True]), p.factor * 0.2, 0.6 + p.factor * 0.4)
    ours = photometric(x, p, **RAW) * 255
    distance = torch.zeros(x.shape)
    for i in np.ndindex(16, 4):
        image = to_8_bit(x[i])
        if p.jitter[i]:
            for op in p.order[i].tolist():
                image = JITTER[op](image, p.factor[i][op].item())
        if p.gray[i]:
            image = F.rgb_to_grayscale(image, 3)
        distance[i] = (ours[i] - F.to_image(image)).abs()
    assert distance[p.jitter].mean() < 2
    assert distance.max() < most


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_distance_from_pils_blur(sigma):
    """PIL approximates the Gaussian by boxes."""
    p, x = nothing(), images(side=48)
    p.blur_sigma[:] = sigma
    ours = photometric(x, p, **RAW) * 255
    theirs = torch.stack(
        [F.pil_to_tensor(F.to_pil_image(image).filter(ImageFilter.GaussianBlur(sigma))) for image in x.flatten(0, 1)]
    )
    distance = (ours.flatten(0, 1) - theirs).abs()
    assert distance.mean() < 0.6
    assert distance.max() < 4


def test_drawn_nothing_changes_nothing():
    x = images()
    with forced("reference"):
        assert torch.equal(photometric(x, nothing(), **RAW), x.float() / 255)
    torch.testing.assert_close(photometric(x, nothing(), **RAW), x.float() / 255, atol=1e-7, rtol=0)
    p = nothing()
    p.jitter[:] = True
    torch.testing.assert_close(photometric(x, p, **RAW), x.float() / 255, atol=1e-6, rtol=0)


def test_order_of_the_operations_matters():
    x, p = images(), drawn()
    p.jitter[:] = True
    turned = replace(p, order=p.order.flip(-1))
    assert (photometric(x, p) - photometric(x, turned)).abs().mean() > 0.01


def test_blur_keeps_flat_crops_and_total_brightness():
    x = images(side=40)
    x[1, 0] = 200
    p = nothing()
    p.blur_sigma[:] = 2.0
    out = photometric(x, p, **RAW)
    torch.testing.assert_close(out[1, 0], torch.full_like(out[1, 0], 200 / 255))
    dot = torch.zeros(1, 1, 3, 31, 31, dtype=torch.uint8)
    dot[..., 15, 15] = 255
    spread = photometric(dot, replace(nothing(1, 1), blur_sigma=torch.full((1, 1), 1.5)), **RAW)
    assert spread[0, 0, 0].sum().item() == pytest.approx(1, abs=1e-5)
    offset = torch.arange(31) - 15.0
    assert (spread[0, 0, 0].sum(0) * offset**2).sum().item() == pytest.approx(1.5**2, rel=0.01)


def test_a_crop_is_treated_alike_in_any_batch():
    x, p = images(), drawn()
    whole = photometric(x, p)
    for i in np.ndindex(6, 4):
        alone = photometric(x[i][None, None], p.map(lambda value, i=i: value[i][None, None]))
        torch.testing.assert_close(whole[i], alone[0, 0], atol=1e-6, rtol=0)


def test_chunks_make_no_difference(monkeypatch):
    x, p = images(), drawn()
    whole = photometric(x, p)
    monkeypatch.setattr(reference, "CPU_CHUNK", 1)
    torch.testing.assert_close(photometric(x, p), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalises_and_casts(dtype):
    x = images()
    out = photometric(x, None, dtype=dtype)
    assert out.dtype == dtype
    assert out.is_contiguous()
    expected = F.normalize(x.float() / 255, list(module.IMAGENET_MEAN), list(module.IMAGENET_STD))
    torch.testing.assert_close(out, expected.to(dtype))


def test_augment_leaves_the_rest_of_the_batch_alone():
    x, p = images(), drawn()
    batch = Batch(id=torch.arange(6), label=torch.arange(6), epoch=3, views={"a": x, "plain": x}, photometric={"a": p})
    out = augment(batch, dtype=torch.bfloat16)
    assert torch.equal(out.views["a"], photometric(x, p, dtype=torch.bfloat16))
    assert torch.equal(out.views["plain"], photometric(x, None, dtype=torch.bfloat16))
    assert out.id is batch.id
    assert out.epoch == 3
    assert batch.views["a"] is x


def test_input_is_not_changed():
    x, p = images(), drawn()
    before, parameters = x.clone(), p.map(torch.clone)
    photometric(x, p)
    assert torch.equal(x, before)
    for key, value in vars(p).items():
        assert torch.equal(value, getattr(parameters, key))


def test_empty_batch():
    assert photometric(images()[:0], drawn().map(lambda value: value[:0])).shape == (0, 4, 3, 24, 24)


@pytest.mark.parametrize("views", [torch.zeros(2, 1, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
def test_wrong_input_is_refused(views):
    with pytest.raises(ValueError, match=r"takes uint8 \[B, n, 3, S, S\], not"):
        photometric(views, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_without_waiting():
    x, p = images(), drawn()
    p.solarize[:] = 256
    on_gpu = x.cuda(), p.map(torch.Tensor.cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = photometric(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), photometric(x, p), atol=5e-5, rtol=0)


def test_the_compiled_and_the_plain_path_agree_whatever_the_threads():
    x, p = images(), nothing()
    p.jitter[:] = True
    p.blur_sigma[..., ::2] = 1.3
    p.solarize[..., 1::2] = 128
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(photometric(x, p))
    finally:
        torch.set_num_threads(before)
    with forced("reference"):
        plain = photometric(x, p)
    assert torch.equal(*results)
    far = (results[0] - plain).abs() > 5e-5  # of values at the solarize threshold
    assert far.float().mean() < 1e-4
