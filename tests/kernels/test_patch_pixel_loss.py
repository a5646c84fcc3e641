"""Pixel loss of masked patches: against the float64 reference, MAE's definition, and by its properties."""

import pytest
import torch

from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels._verify import verify
from fastssl.kernels.patch_pixel_loss import bench, patch_pixel_loss
from fastssl.methods.mae import masked_pixel_loss, patchify

OP = bench.OPS[0]


@pytest.mark.parametrize("dtype", OP.dtypes, ids=str)
@pytest.mark.parametrize("case", OP.proof)
def test_equals_the_reference(case, dtype, device):
    verify(OP, OP.proof[case], dtype, device)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_equals_mae(path, device):
    torch.manual_seed(0)
    images = torch.randn(3, 3, 16, 24, device=device)
    masked = torch.stack([torch.randperm(24, device=device)[:10] for _ in range(3)])
    prediction = torch.randn(3, 10, 48, device=device)
    with forced(path):
        loss = patch_pixel_loss(prediction, images, masked, patch_size=4)
    torch.testing.assert_close(loss, masked_pixel_loss(prediction, patchify(images, 4), masked))


@pytest.mark.parametrize("path", ["reference", "triton"])
@pytest.mark.parametrize("loss", ["l2", "l1"])
def test_offset_gives_its_square_or_itself_and_uncounted_values_get_no_gradient(path, loss, device):
    """SAAE card, oracle 6; SiT card, oracle 8."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8, device=device)
    pixels = torch.rand(2, 8, 8, device=device) < 0.4
    masked = torch.arange(4, device=device).expand(2, 4)
    painted = images.unflatten(3, (2, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 1, 3, 5).reshape(2, 4, 48)
    prediction = (painted + 0.25).requires_grad_()
    with forced(path):
        value = patch_pixel_loss(
            prediction, images, masked, patch_size=4, norm_pixels=False, loss=loss, channels_last=False, pixels=pixels
        )
    torch.testing.assert_close(value.item(), 0.0625 if loss == "l2" else 0.25)
    value.backward()
    hit = pixels[:, None].expand(2, 3, 8, 8).unflatten(3, (2, 4)).unflatten(2, (2, 4))
    hit = hit.permute(0, 2, 4, 1, 3, 5).reshape(2, 4, 48)
    assert (prediction.grad[~hit] == 0).all()
    slope = (0.5 if loss == "l2" else 1.0) / hit.sum().item()
    torch.testing.assert_close(prediction.grad[hit], torch.full_like(prediction.grad[hit], slope))


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
        ({"loss": "huber"}, "loss must be 'l2' or 'l1', not 'huber'"),
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
