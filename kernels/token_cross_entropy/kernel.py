"""Linear head and cross-entropy: cuBLAS products around a Triton kernel, on one workspace of logits.

    x = tokens weight' + bias;  loss = mean over the counted tokens of [lse(x) - x_label]
    d x = softmax(x) - (k == label), written over x in the tokens' type
    d tokens = d x weight;  d weight = d x' tokens;  d bias = column sums of d x; all times upstream / count

Per chunk of tokens: one product into the workspace, one pass over it (one read, and one write where gradients are
wanted), two products out of it. Gradients are summed in float32 over the chunks and scaled by the backward pass.
No atomics, so every run gives the same bits.

Letters: T tokens, D width, K codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import cdiv, launch, power_of_2, recording

# Not measured yet: WORKSPACE, WHOLE, and the warps per row.
WORKSPACE = 128 << 20  # bytes of logits at most
WHOLE = 8192  # rows up to this length are held in registers
FP16_SCALE = 2.0**15  # of d x, so that a probability of 1e-9 is still a float16; -1 becomes -32768


@triton.jit
def _slope(e, z, own, counted, valid, scale):
    """softmax - one hot, times scale, from e = z softmax; 0 if the row does not count, NaN if its label is no code."""
    slope = e * (scale / z) - tl.where(own, scale, 0.0)
    return tl.where(valid, tl.where(counted, slope, 0.0), float("nan"))


@triton.jit
def _short_rows(
    logits,  # float32 [rows, pitch]; what lies past K is anything
    slopes,  # the same memory in the inputs' type, out: a row's d x starts where its logits start
    bias,  # float32 [pitch] or nothing
    labels,  # int [rows]
    losses,  # float32 [rows], out
    hits,  # float32 [rows], out
    column_sums,  # float32 [programs, pitch] or nothing, out: sum of d x over the program's rows
    rows,
    K,
    pitch,
    slope_pitch,
    scale,
    BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k = tl.arange(0, BLOCK)
    padded = k < pitch
    total = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64)
    following = tl.load(logits + first * pitch + k, mask=k < tl.where(first < rows, pitch, 0), other=0.0)
    for row in range(first, rows, tl.num_programs(0)):
        x = following
        after = row + tl.num_programs(0)  # read while this row is worked on
        following = tl.load(logits + after * pitch + k, mask=k < tl.where(after < rows, pitch, 0), other=0.0)
        label = tl.load(labels + row)
        valid = (label >= -1) & (label < K)
        label = tl.where(valid, label, -1).to(tl.int32)
        if BIAS:
            x += tl.load(bias + k, mask=padded, other=0.0)
        x = tl.where(k < K, x, -float("inf"))
        m = tl.max(x, 0)
        own = tl.sum(tl.where(k == label, x, 0.0), 0)
        earlier = tl.max(((x == m) & (k < label)).to(tl.int32), 0)  # an equal logit before the label's
        e = tl.exp(x - m)
        z = tl.sum(e, 0)
        loss = tl.where(label == -1, 0.0, m + tl.log(z) - own)
        tl.store(losses + row, tl.where(valid, loss, float("nan")))
        tl.store(hits + row, ((label != -1) & (own == m) & (earlier == 0)).to(tl.float32))
        if GRAD:  # every thread has read its part of the row before z is known: overwriting it is safe
            slope = _slope(e, z, k == label, label != -1, valid, scale)
            tl.store(slopes + row * slope_pitch + k, slope.to(slopes.dtype.element_ty), mask=padded)
            if BIAS_GRAD:
                total += slope
    if BIAS_GRAD:
        tl.store(column_sums + tl.program_id(0).to(tl.int64) * pitch + k, total, mask=padded)


@triton.jit
def _long_rows(
    logits,
    slopes,
    bias,
    labels,
    losses,
    hits,
    column_sums,
    rows,
    K,
    pitch,
    slope_pitch,
    scale,
    BIAS: tl.constexpr,
    GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    R: tl.constexpr,  # rows per program, all at once
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < rows
    label = tl.load(labels + row, mask=inside, other=-1)
    valid = (label >= -1) & (label < K)
    label = tl.where(valid, label, -1).to(tl.int32)
    m = tl.full([R], -float("inf"), tl.float32)
    z = tl.zeros([R], tl.float32)
    own = tl.zeros([R], tl.float32)
    best = tl.zeros([R], tl.int32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        here = inside[:, None] & (k < pitch)[None, :]
        x = tl.load(logits + row[:, None] * pitch + k[None, :], mask=here, other=0.0)
        if BIAS:
            x += tl.load(bias + k, mask=k < pitch, other=0.0)[None, :]
        x = tl.where((k < K)[None, :], x, -float("inf"))
        top, at_top = tl.max(x, 1, return_indices=True)
        best = tl.where(top > m, start + at_top, best)
        new = tl.maximum(m, top)
        z = z * tl.exp(m - new) + tl.sum(tl.exp(x - new[:, None]), 1)
        own += tl.sum(tl.where(k[None, :] == label[:, None], x, 0.0), 1)
        m = new
    loss = tl.where(label == -1, 0.0, m + tl.log(z) - own)
    tl.store(losses + row, tl.where(valid, loss, float("nan")), mask=inside)
    tl.store(hits + row, (best == label).to(tl.float32), mask=inside)
    if GRAD:
        counted = (label != -1)[:, None]
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            here = inside[:, None] & (k < pitch)[None, :]
            x = tl.load(logits + row[:, None] * pitch + k[None, :], mask=here, other=0.0)
            tl.debug_barrier()  # d x of half the type lies over the first half of the block, which others still read
            if BIAS:
                x += tl.load(bias + k, mask=k < pitch, other=0.0)[None, :]
            x = tl.where((k < K)[None, :], x, -float("inf"))
            e = tl.exp(x - m[:, None])
            slope = _slope(e, z[:, None], k[None, :] == label[:, None], counted, valid[:, None], scale)
            at = row[:, None] * slope_pitch + k[None, :]
            tl.store(slopes + at, slope.to(slopes.dtype.element_ty), mask=here)
            if BIAS_GRAD:
                total = tl.sum(slope, 0)
                tl.store(column_sums + tl.program_id(0).to(tl.int64) * pitch + k, total, mask=k < pitch)


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a b, or out += a b, with float32 sums. `out` is float32 whatever the type of a and b."""
    if recording():
        return
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(add), out=out)


def rows_per_chunk(tokens: int, classes: int) -> int:
    """Tokens per chunk: a multiple of 128, at most WORKSPACE bytes of float32 logits, chunks of about equal size."""
    most = max(128, WORKSPACE // (4 * classes) // 128 * 128)
    return 128 * cdiv(tokens, 128 * max(1, cdiv(tokens, most)))


def _processors(tensor: Tensor) -> int:
    """Of the GPU; one in the interpreter."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1


@torch.library.custom_op("fastssl::token_cross_entropy", mutates_args=())
def forward(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, tokens_grad: bool, weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss and accuracy; then, for the backward pass, a scalar and the float32 gradients of tokens, weight and bias
    that it multiplies (empty where not wanted)."""
    (count, width), classes = tokens.shape, len(weight)
    weight, labels = weight.detach().to(tokens.dtype), labels.contiguous()
    grad = tokens_grad or weight_grad or bias_grad

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=tokens.device)

    d_tokens = empty(count, width) if tokens_grad else empty(0)
    d_weight = empty(classes, width) if weight_grad else empty(0)
    if count == 0:
        d_weight.zero_()
    d_bias = torch.zeros(classes, dtype=torch.float32, device=tokens.device) if bias_grad else empty(0)
    losses, hits = empty(2, count).unbind()

    chunk = max(1, min(rows_per_chunk(count, classes), count))
    pitch = 16 * cdiv(classes, 16)  # rows that start, and masks that change, at multiples of 16 values
    bias = None if bias is None else F.pad(bias.detach().float(), (0, pitch - classes))
    logits = empty(chunk, pitch)
    slopes = logits.view(tokens.dtype)  # [chunk, pitch or 2 pitch]
    if classes <= WHOLE:
        kernel, block = _short_rows, power_of_2(classes)
        warps = max(1, min(16, block // 512))
        programs = min(chunk, _processors(tokens) * (16 // warps))
        options = {"BLOCK": block, "num_warps": warps}
    else:
        kernel, programs, options = _long_rows, cdiv(chunk, 2), {"R": 2, "BLOCK": 2048, "num_warps": 8}
    column_sums = empty(programs, pitch) if bias_grad else None
    scale = FP16_SCALE if tokens.dtype == torch.float16 else 1.0
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        x = tokens.detach()[part]
        rows = len(x)
        _product(x, weight.t(), logits[:rows, :classes])
        launch(
            kernel, (programs,), logits, slopes, bias, labels[part], losses[part], hits[part], column_sums,
            rows, classes, pitch, slopes.shape[1], scale, BIAS=bias is not None, GRAD=grad, BIAS_GRAD=bias_grad,
            **options,
        )  # fmt: skip
        slope = slopes[:rows, :classes]
        if tokens_grad:
            _product(slope, weight, d_tokens[part])
        if weight_grad:
            _product(slope.t(), x, d_weight, add=start > 0)
        if column_sums is not None:
            d_bias += column_sums.sum(0)[:classes]

    counted = (labels != -1).sum().clamp_min(1).float()
    return losses.sum() / counted, hits.sum() / counted, 1 / (scale * counted), d_tokens, d_weight, d_bias


@forward.register_fake
def _(tokens, weight, bias, labels, tokens_grad, weight_grad, bias_grad):
    def empty(*shape):
        return tokens.new_empty(shape, dtype=torch.float32)

    wanted = zip((tokens, weight, bias), (tokens_grad, weight_grad, bias_grad), strict=True)
    return empty(), empty(), empty(), *(empty(*x.shape) if wants else empty(0) for x, wants in wanted)


@torch.library.custom_op("fastssl::token_cross_entropy_backward", mutates_args=())
def backward(scale: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient times the scalar `scale`, in another type."""
    return torch.mul(gradient, scale, out=torch.empty(gradient.shape, dtype=dtype, device=gradient.device))


@backward.register_fake
def _(scale, gradient, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.wanted = inputs[4:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for the saved gradients


def _differentiate(ctx, upstream, *_):
    factor, *gradients = ctx.saved_tensors
    if upstream is None:
        return (None,) * 7
    scale = upstream * factor
    grads = [
        backward(scale, gradient, dtype) if wanted else None
        for gradient, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
    ]
    return *grads, *[None] * 4


forward.register_autograd(_differentiate, setup_context=_save)
