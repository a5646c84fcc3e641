"""Pixel loss of masked patches, read straight from the image: no patchified copy, no normalised target in memory."""

from __future__ import annotations

from torch import Tensor

from fastssl.kernels._check import FLOATS, INTEGERS, Shapes, check, once
from fastssl.kernels._path import use_triton
from fastssl.kernels.patch_pixel_loss import reference

NAME = "patch_pixel_loss"


def patch_pixel_loss(
    prediction: Tensor,
    images: Tensor,
    masked: Tensor,
    *,
    patch_size: int,
    norm_pixels: bool = True,
    channels_last: bool = True,
    count: Tensor | None = None,
) -> Tensor:
    """Mean squared error over the values of the masked patches (He et al. 2022, section 3; also SAAE's pixel term).

        for b in range(B):
            for m in range(M):  # or count[b]
                x = the 3 p p pixel values of patch masked[b, m] of image b
                target = (x - mean(x)) / sqrt(var(x) + 1e-6) if norm_pixels else x
                total += sum((prediction[b, m] - target) ** 2)
        loss = total / number of values summed

    Args:
        prediction: [B, M, 3 p p], float32, float16 or bfloat16.
        images: [B, 3, H, W], H and W multiples of p; no gradient flows to them.
        masked: int32 or int64 [B, M], row-major ids of the patches predicted; every id must be valid.
        patch_size: p, pixels.
        norm_pixels: compare with the normalised patch (unbiased variance), not with the pixels themselves.
        channels_last: the order of a prediction's values: row, column, channel (MAE), or channel, row, column (what a
            transposed convolution paints: SAAE).
        count: int [B]; only the first count[b] rows count. None: all.

    Returns:
        Scalar, float32 (float64 for float64 predictions); 0 if nothing counts.

    Raises:
        KernelError: a shape or type that does not fit.
    """
    _check(prediction, images, masked, count, patch_size)
    if use_triton(NAME, prediction) and prediction.dtype in FLOATS[:3]:
        from fastssl.kernels.patch_pixel_loss import kernel

        return kernel.forward(prediction, images, masked, count, patch_size, norm_pixels, channels_last)[0]
    return reference.patch_pixel_loss(prediction, images, masked, patch_size, norm_pixels, channels_last, count)


@once
def _check(prediction: Tensor, images: Tensor, masked: Tensor, count: Tensor | None, patch_size: int) -> None:
    shapes = Shapes(NAME)
    _, _, values = shapes("prediction", prediction, "B M P")
    _, _, height, width = shapes("images", images, "B 3 H W")
    shapes("masked", masked, "B M", INTEGERS)
    check(values == 3 * patch_size**2, NAME, "prediction", f"[B, M, {3 * patch_size**2}]", list(prediction.shape))
    fits = height % patch_size == 0 and width % patch_size == 0
    check(fits, NAME, "images", f"[B, 3, H, W] with sides that are multiples of {patch_size}", list(images.shape))
    if count is not None:
        shapes("count", count, "B", INTEGERS)
