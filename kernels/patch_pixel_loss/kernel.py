"""Pixel loss of masked patches in Triton: one program per masked patch reads its pixels straight from the image.

    target = (x - mean(x)) / sqrt(var(x) + 1e-6), or x
    loss = sum of (prediction - target)^2 over the counted patches / number of their values
    d prediction = 2 (prediction - target), times upstream / number

Letters: B images, M masked patches per image, P = 3 p p values per patch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import launch, power_of_2
from fastssl.kernels._op import op


@triton.jit
def _error(
    prediction,  # [B, M, P]
    images,  # [B, 3, H, W], strides ib, ic, ih, iw
    masked,  # int [B, M], strides mb, mm: row-major ids of patches
    row,  # program: b M + m
    M,
    columns,  # patches per row of the image
    ib,
    ic,
    ih,
    iw,
    mb,
    mm,
    p: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """prediction - target of one patch; 0 beyond its P values."""
    b = row // M
    lane = tl.arange(0, BLOCK)
    inside = lane < P  # BLOCK overruns the patch
    patch = tl.load(masked + b * mb + row % M * mm)
    if CHANNELS_LAST:
        channel = lane % 3
        column = lane // 3 % p
        line = lane // (3 * p)
    else:
        column = lane % p
        line = lane // p % p
        channel = lane // (p * p)
    line += patch // columns * p
    column += patch % columns * p
    offset = b * ib + channel.to(tl.int64) * ic + line.to(tl.int64) * ih + column.to(tl.int64) * iw
    x = tl.load(images + offset, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(x, 0) / P
        centred = tl.where(inside, x - mean, 0.0)
        x = centred / tl.sqrt_rn(tl.sum(centred * centred, 0) / (P - 1) + 1e-6)
    y = tl.load(prediction + row * P + lane, mask=inside, other=0.0).to(tl.float32)
    return y - x


@triton.jit
def _forward(
    prediction,
    images,
    masked,
    count,  # int [B] or nothing
    sums,  # float32 [B, M], out: sum of the squared errors, 0 where the patch does not count
    M,
    columns,
    ib,
    ic,
    ih,
    iw,
    mb,
    mm,
    p: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COUNT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if COUNT and row % M >= tl.load(count + row // M):
        tl.store(sums + row, 0.0)
        return
    error = _error(
        prediction, images, masked, row, M, columns, ib, ic, ih, iw, mb, mm, p, P, BLOCK, NORM, CHANNELS_LAST
    )
    tl.store(sums + row, tl.sum(error * error, 0))


@triton.jit(do_not_specialize=["B", "M"])
def _total(
    sums,  # float32 [B, M]
    count,  # int [B] or nothing
    loss,  # float32 scalar, out
    number,  # float32 scalar, out: values that count, at least 1
    B,
    M,
    P: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, B * M, BLOCK):
        total += tl.load(sums + start + lane, mask=start + lane < B * M, other=0.0)
    rows = tl.zeros([BLOCK], tl.int32)
    if COUNT:
        for start in range(0, B, BLOCK):
            here = tl.load(count + start + lane, mask=start + lane < B, other=0)
            rows += tl.minimum(tl.maximum(here, 0), M).to(tl.int32)
        values = tl.sum(rows.to(tl.int64), 0) * P
    else:
        values = B.to(tl.int64) * M * P
    values = tl.maximum(values, 1).to(tl.float32)
    tl.store(number, values)
    tl.store(loss, tl.div_rn(tl.sum(total, 0), values))


@triton.jit
def _backward(
    prediction,
    images,
    masked,
    count,
    upstream,  # float32 scalar
    number,  # float32 scalar: values that count
    gradient,  # [B, M, P], out
    M,
    columns,
    ib,
    ic,
    ih,
    iw,
    mb,
    mm,
    p: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COUNT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    out = gradient + row * P + lane
    if COUNT and row % M >= tl.load(count + row // M):
        tl.store(out, tl.zeros([BLOCK], gradient.dtype.element_ty), mask=lane < P)
        return
    error = _error(
        prediction, images, masked, row, M, columns, ib, ic, ih, iw, mb, mm, p, P, BLOCK, NORM, CHANNELS_LAST
    )
    scale = tl.div_rn(tl.load(upstream), tl.load(number))
    tl.store(out, (2 * error * scale).to(gradient.dtype.element_ty), mask=lane < P)


def _arguments(
    prediction: Tensor, images: Tensor, masked: Tensor, patch_size: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """The numbers and constants that both kernels take."""
    values = prediction.shape[2]
    numbers = (prediction.shape[1], images.shape[3] // patch_size, *images.stride(), *masked.stride())
    block = power_of_2(values)
    # One warp per 256 values: not measured yet.
    return numbers, {"p": patch_size, "P": values, "BLOCK": block, "num_warps": max(1, min(8, block // 256))}


@op("fastssl::patch_pixel_loss")
def forward(
    prediction: Tensor, images: Tensor, masked: Tensor, count: Tensor | None, patch_size: int, norm_pixels: bool,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and the number of counted values, float32 scalars. Saved for the backward pass: nothing but the inputs."""
    numbers, constants = _arguments(prediction, images, masked, patch_size)
    sums = torch.empty(masked.shape, dtype=torch.float32, device=images.device)
    launch(
        _forward, (masked.numel(),), prediction.contiguous(), images, masked, count, sums, *numbers,
        NORM=norm_pixels, CHANNELS_LAST=channels_last, COUNT=count is not None, **constants,
    )  # fmt: skip
    loss, number = (torch.empty((), dtype=torch.float32, device=images.device) for _ in range(2))
    launch(
        _total, (1,), sums, count, loss, number, *masked.shape,
        P=prediction.shape[2], COUNT=count is not None, BLOCK=4096, num_warps=16,
    )  # fmt: skip
    return loss, number


@forward.register_fake
def _(prediction, *rest):
    scalar = prediction.new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar)


@op("fastssl::patch_pixel_loss_backward")
def backward(
    upstream: Tensor, number: Tensor, prediction: Tensor, images: Tensor, masked: Tensor, count: Tensor | None,
    patch_size: int, norm_pixels: bool, channels_last: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the prediction; `number` is that of the counted values."""
    prediction = prediction.contiguous()
    numbers, constants = _arguments(prediction, images, masked, patch_size)
    gradient = torch.empty_like(prediction)
    launch(
        _backward, (masked.numel(),), prediction, images, masked, count, upstream, number, gradient, *numbers,
        NORM=norm_pixels, CHANNELS_LAST=channels_last, COUNT=count is not None, **constants,
    )  # fmt: skip
    return gradient


@backward.register_fake
def _(upstream, number, prediction, *rest):
    return torch.empty_like(prediction, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.options = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, upstream, _):
    *inputs, number = ctx.saved_tensors
    return backward(upstream, number, *inputs, *ctx.options), *[None] * 6


forward.register_autograd(_differentiate, setup_context=_save)
