"""Pixel loss of masked patches in Triton: one program per masked patch reads its pixels straight from the image.

    target = (x - mean(x)) / sqrt(var(x) + 1e-6), or x
    loss = sum of (prediction - target)^2 or |prediction - target| over the counted values / their number
    d prediction = 2 (prediction - target) or sign(prediction - target), times upstream / number

Letters: B images, M masked patches per image, P = 3 p p values per patch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import launch, power_of_2


@triton.jit
def _pixels(
    images,  # [B, 3, H, W], strides ib, ic, ih, iw
    patch,  # row-major id of the patch
    b,
    lane,  # position in the patch, P of them
    inside,  # lane < P
    columns,  # patches per row of the image
    ib,
    ic,
    ih,
    iw,
    p: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """A patch's values in the prediction's order, float32; 0 outside."""
    if CHANNELS_LAST:
        channel = lane % 3
        column = lane // 3 % p
        row = lane // (3 * p)
    else:
        column = lane % p
        row = lane // p % p
        channel = lane // (p * p)
    row += patch // columns * p
    column += patch % columns * p
    offset = b * ib + channel.to(tl.int64) * ic + row.to(tl.int64) * ih + column.to(tl.int64) * iw
    return tl.load(images + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _error(
    prediction,  # [B, M, P]
    images,  # [B, 3, H, W]
    masked,  # int [B, M]
    pixels,  # bool [B, H, W] or nothing
    row,  # program: b M + m
    M,
    columns,
    ib,
    ic,
    ih,
    iw,
    pb,
    ph,
    pw,
    mb,
    mm,
    p: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """prediction - target of one patch, and which of its values count."""
    b = row // M
    lane = tl.arange(0, BLOCK)
    inside = lane < P  # BLOCK overruns the patch
    patch = tl.load(masked + b * mb + row % M * mm)
    x = _pixels(images, patch, b, lane, inside, columns, ib, ic, ih, iw, p, CHANNELS_LAST)
    if NORM:
        mean = tl.sum(x, 0) / P
        centred = tl.where(inside, x - mean, 0.0)
        x = centred / tl.sqrt_rn(tl.sum(centred * centred, 0) / (P - 1) + 1e-6)
    counted = inside
    if PIXELS:
        counted = counted & (_pixels(pixels, patch, b, lane, inside, columns, pb, 0, ph, pw, p, CHANNELS_LAST) > 0)
    y = tl.load(prediction + row * P + lane, mask=inside, other=0.0).to(tl.float32)
    return y - x, counted


@triton.jit
def _forward(
    prediction,
    images,
    masked,
    count,  # int [B] or nothing
    pixels,
    sums,  # float32 [B, M], out: sum of the counted errors
    numbers,  # float32 [B, M], out: how many were counted
    M,
    columns,
    ib,
    ic,
    ih,
    iw,
    pb,
    ph,
    pw,
    mb,
    mm,
    p: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    L1: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COUNT: tl.constexpr,
    PIXELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if COUNT and row % M >= tl.load(count + row // M):
        tl.store(sums + row, 0.0)
        tl.store(numbers + row, 0.0)
        return
    error, counted = _error(
        prediction, images, masked, pixels, row, M, columns, ib, ic, ih, iw, pb, ph, pw, mb, mm,
        p, P, BLOCK, NORM, CHANNELS_LAST, PIXELS,
    )  # fmt: skip
    error = tl.abs(error) if L1 else error * error
    tl.store(sums + row, tl.sum(tl.where(counted, error, 0.0), 0))
    tl.store(numbers + row, tl.sum(counted.to(tl.float32), 0))


@triton.jit
def _backward(
    prediction,
    images,
    masked,
    count,
    pixels,
    scale,  # float32 scalar: upstream / number
    gradient,  # [B, M, P], out
    M,
    columns,
    ib,
    ic,
    ih,
    iw,
    pb,
    ph,
    pw,
    mb,
    mm,
    p: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    L1: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COUNT: tl.constexpr,
    PIXELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    out = gradient + row * P + lane
    if COUNT and row % M >= tl.load(count + row // M):
        tl.store(out, tl.zeros([BLOCK], gradient.dtype.element_ty), mask=lane < P)
        return
    error, counted = _error(
        prediction, images, masked, pixels, row, M, columns, ib, ic, ih, iw, pb, ph, pw, mb, mm,
        p, P, BLOCK, NORM, CHANNELS_LAST, PIXELS,
    )  # fmt: skip
    if L1:
        error = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0))
    else:
        error = 2 * error
    error = tl.where(counted, error * tl.load(scale), 0.0)
    tl.store(out, error.to(gradient.dtype.element_ty), mask=lane < P)


def _arguments(
    prediction: Tensor, images: Tensor, masked: Tensor, pixels: Tensor | None, patch_size: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """The numbers and constants that both kernels take."""
    values = prediction.shape[2]
    strides = pixels.stride() if pixels is not None else (0, 0, 0)
    numbers = (prediction.shape[1], images.shape[3] // patch_size, *images.stride(), *strides, *masked.stride())
    block = power_of_2(values)
    # One warp per 256 values: not measured yet.
    return numbers, {"p": patch_size, "P": values, "BLOCK": block, "num_warps": max(1, min(8, block // 256))}


@torch.library.custom_op("fastssl::patch_pixel_loss", mutates_args=())
def forward(
    prediction: Tensor,
    images: Tensor,
    masked: Tensor,
    count: Tensor | None,
    pixels: Tensor | None,
    patch_size: int,
    norm_pixels: bool,
    l1: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and the number of counted values, float32 scalars. Saved for the backward pass: nothing but the inputs."""
    prediction = prediction.contiguous()
    numbers, constants = _arguments(prediction, images, masked, pixels, patch_size)
    sums, counted = torch.empty(2, *masked.shape, dtype=torch.float32, device=images.device).unbind()
    launch(
        _forward, (masked.numel(),), prediction, images, masked, count, pixels, sums, counted, *numbers,
        NORM=norm_pixels, L1=l1, CHANNELS_LAST=channels_last, COUNT=count is not None, PIXELS=pixels is not None,
        **constants,
    )  # fmt: skip
    number = counted.sum().clamp_min(1)
    return sums.sum() / number, number


@forward.register_fake
def _(prediction, images, masked, count, pixels, patch_size, norm_pixels, l1, channels_last):
    scalar = prediction.new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar)


@torch.library.custom_op("fastssl::patch_pixel_loss_backward", mutates_args=())
def backward(
    scale: Tensor,
    prediction: Tensor,
    images: Tensor,
    masked: Tensor,
    count: Tensor | None,
    pixels: Tensor | None,
    patch_size: int,
    norm_pixels: bool,
    l1: bool,
    channels_last: bool,
) -> Tensor:
    """Gradient of the prediction; `scale` is the upstream gradient over the number of counted values."""
    prediction = prediction.contiguous()
    numbers, constants = _arguments(prediction, images, masked, pixels, patch_size)
    gradient = torch.empty_like(prediction)
    launch(
        _backward, (masked.numel(),), prediction, images, masked, count, pixels, scale, gradient, *numbers,
        NORM=norm_pixels, L1=l1, CHANNELS_LAST=channels_last, COUNT=count is not None, PIXELS=pixels is not None,
        **constants,
    )  # fmt: skip
    return gradient


@backward.register_fake
def _(scale, prediction, *rest):
    return torch.empty_like(prediction, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, upstream, _):
    *inputs, number = ctx.saved_tensors
    return backward(upstream / number, *inputs, *ctx.options), *[None] * 8


forward.register_autograd(_differentiate, setup_context=_save)
