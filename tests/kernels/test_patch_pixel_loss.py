"""Pixel loss of masked patches: against the float64 reference, the paper's loop, and by its properties."""

import pytest
import torch

from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels.patch_pixel_loss import patch_pixel_loss


def loss_by_loop(prediction, images, masked, p, norm_pixels, channels_last):
    """Patch by patch and value by value, as the MAE paper says it."""
    total, count = 0.0, 0
    for b in range(len(images)):
        for slot, patch in enumerate(masked[b].tolist()):
            columns = images.shape[3] // p
            top, left = patch // columns * p, patch % columns * p
            spots = [(c, top + y, left + x) for y in range(p) for x in range(p) for c in range(3)]
            if not channels_last:
                spots.sort()
            target = [images[b, c, y, x] for c, y, x in spots]
            if norm_pixels:
                mean = sum(target) / len(target)
                variance = sum((x - mean) ** 2 for x in target) / (len(target) - 1)
                target = [(x - mean) / (variance + 1e-6) ** 0.5 for x in target]
            total = total + sum((prediction[b, slot, i] - x) ** 2 for i, x in enumerate(target))
            count += len(target)
    return total / count


@pytest.mark.parametrize("norm_pixels", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_equals_the_papers_loop(path, norm_pixels, channels_last, device):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64) * 3 + 7
    masked = torch.tensor([[3, 0, 5], [1, 2, 4]])
    prediction = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    expected = loss_by_loop(prediction, images, masked, 2, norm_pixels, channels_last)
    slope = torch.autograd.grad(expected * 0.7, prediction)[0].float()
    inputs = prediction.detach().float().to(device).requires_grad_()
    with forced(path):
        loss = patch_pixel_loss(
            inputs, images.float().to(device), masked.to(device), patch_size=2, norm_pixels=norm_pixels,
            channels_last=channels_last,
        )  # fmt: skip
        (loss * 0.7).backward()
    torch.testing.assert_close(loss.item(), expected.item(), rtol=1e-5, atol=0)
    torch.testing.assert_close(inputs.grad.cpu(), slope, rtol=1e-4, atol=1e-6)


def test_a_flat_patch_has_a_zero_target(path, device):
    images, masked = torch.full((1, 3, 4, 4), 0.3, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device)
    with forced(path):
        loss = patch_pixel_loss(torch.full((1, 1, 48), 0.5, device=device), images, masked, patch_size=4)
    assert loss.item() == pytest.approx(0.25, rel=1e-3)


def test_visible_patches_and_the_order_of_images_do_not_matter(path, device):
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8, device=device)
    masked = torch.tensor([[3, 0], [1, 2]], device=device)
    prediction = torch.randn(2, 2, 48, device=device)
    with forced(path):
        loss = patch_pixel_loss(prediction, images, masked, patch_size=4)
        shuffled = patch_pixel_loss(prediction.flip(0), images.flip(0), masked.flip(0), patch_size=4)
        images[0, :, :4, 4:] += 100  # patch 1, visible
        again = patch_pixel_loss(prediction, images, masked, patch_size=4)
    torch.testing.assert_close(shuffled, loss)
    assert torch.equal(again, loss)


def test_offset_gives_its_square_and_uncounted_patches_get_no_gradient(path, device):
    """SAAE card, oracle 6."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8, device=device)
    masked, count = torch.arange(4, device=device).expand(2, 4), torch.tensor([4, 1], device=device)
    painted = images.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 1, 3, 5).reshape(2, 4, 48)
    prediction = (painted + 0.25).requires_grad_()
    with forced(path):
        value = patch_pixel_loss(
            prediction, images, masked, patch_size=4, norm_pixels=False, channels_last=False, count=count
        )
    torch.testing.assert_close(value.item(), 0.0625)
    value.backward()
    expected = torch.full_like(prediction, 0.5 / (5 * 48))
    expected[1, 1:] = 0
    torch.testing.assert_close(prediction.grad, expected, rtol=1.3e-6, atol=0)


def test_nothing_counted_is_zero(device):
    images, masked = torch.randn(2, 3, 8, 8, device=device), torch.zeros(2, 1, dtype=torch.int64, device=device)
    prediction = torch.randn(2, 1, 48, device=device, requires_grad=True)
    none = torch.zeros(2, dtype=torch.int64, device=device)
    for path in ("reference", "triton"):
        with forced(path):
            loss = patch_pixel_loss(prediction, images, masked, patch_size=4, count=none)
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, prediction)[0] == 0).all()


def test_compiles_without_a_graph_break(device, compiles_whole):
    inputs = {"images": torch.randn(2, 3, 8, 8, device=device), "patch_size": 4}
    inputs["masked"] = torch.tensor([[0, 2], [1, 3]], device=device)
    prediction = torch.randn(2, 2, 48, device=device, requires_grad=True)
    compiles_whole(lambda prediction: patch_pixel_loss(prediction, **inputs), prediction)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": torch.zeros(2, 1, 47)}, r"prediction must be \[B, M, 48\], not \[2, 1, 47\]"),
        ({"masked": torch.zeros(2, 1)}, "masked must be int32 or int64, not float32"),
        ({"images": torch.zeros(2, 3, 8, 9)}, "sides that are multiples of 4, not"),
        ({"count": torch.zeros(3, dtype=torch.int64)}, r"count must be \[B\] with B = 2, not \[3\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = {
        "prediction": torch.zeros(2, 1, 48), "images": torch.zeros(2, 3, 8, 8),
        "masked": torch.zeros(2, 1, dtype=torch.int64), "patch_size": 4,
    }  # fmt: skip
    with pytest.raises(KernelError, match=message):
        patch_pixel_loss(**inputs | change)
