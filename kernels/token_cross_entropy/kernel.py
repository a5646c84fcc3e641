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
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import cdiv, launch, power_of_2, recording
from fastssl.kernels._op import op

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
    bias,  # [K] or nothing
    labels,  # int [T]
    losses,  # float32 [T], out
    hits,  # float32 [T], out
    column_sums,  # float32 [programs, pitch] or nothing, out: sum of d x over the program's rows, of this and earlier
    # chunks
    begin,  # token of the first row
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
    sums = column_sums
    total = tl.zeros([BLOCK], tl.float32)
    if BIAS_GRAD:
        sums += tl.program_id(0).to(tl.int64) * pitch
        if begin > 0:
            total = tl.load(sums + k, mask=padded, other=0.0)
    labels += begin
    losses += begin
    hits += begin
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
            x += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
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
        tl.store(sums + k, total, mask=padded)


@triton.jit
def _long_rows(
    logits,
    slopes,
    bias,
    labels,
    losses,
    hits,
    column_sums,
    begin,
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
    labels += begin
    losses += begin
    hits += begin
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
            x += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
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
                x += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            x = tl.where((k < K)[None, :], x, -float("inf"))
            e = tl.exp(x - m[:, None])
            slope = _slope(e, z[:, None], k[None, :] == label[:, None], counted, valid[:, None], scale)
            at = row[:, None] * slope_pitch + k[None, :]
            tl.store(slopes + at, slope.to(slopes.dtype.element_ty), mask=here)
            if BIAS_GRAD:
                total = tl.sum(slope, 0)
                sums = column_sums + tl.program_id(0).to(tl.int64) * pitch + k
                if begin > 0:
                    total += tl.load(sums, mask=k < pitch, other=0.0)
                tl.store(sums, total, mask=k < pitch)


@triton.jit(do_not_specialize=["T", "programs"])
def _finish(
    losses,  # float32 [T]
    hits,  # float32 [T]
    labels,  # int [T]
    column_sums,  # float32 [programs, pitch] or nothing
    loss,  # float32 scalars, out; so the next two
    accuracy,
    factor,  # 1 / (scale x counted tokens)
    bias_sum,  # float32 [K] or nothing, out
    T,
    programs,
    K,
    pitch,
    scale,
    BIAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The first program sums over tokens, each of the others over the programs' sums of some columns."""
    program = tl.program_id(0)
    if program == 0:
        lane = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        right = tl.zeros([BLOCK], tl.float32)
        counted = tl.zeros([BLOCK], tl.int32)
        for start in range(0, T, BLOCK):
            t = start + lane
            total += tl.load(losses + t, mask=t < T, other=0.0)
            right += tl.load(hits + t, mask=t < T, other=0.0)
            counted += (tl.load(labels + t, mask=t < T, other=-1) != -1).to(tl.int32)
        number = tl.maximum(tl.sum(counted, 0), 1).to(tl.float32)
        tl.store(loss, tl.div_rn(tl.sum(total, 0), number))
        tl.store(accuracy, tl.div_rn(tl.sum(right, 0), number))
        tl.store(factor, 1 / (scale * number))
    elif BIAS_GRAD:
        k = (program - 1) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, programs, ROWS):
            row = start + tl.arange(0, ROWS)
            at = column_sums + row.to(tl.int64)[:, None] * pitch + k[None, :]
            sums += tl.load(at, mask=(row < programs)[:, None] & (k < K)[None, :], other=0.0)
        tl.store(bias_sum + k, tl.sum(sums, 0), mask=k < K)


@triton.jit
def _multiply(x, out, factor, block, size, BLOCK: tl.constexpr):
    i = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, (tl.load(x + i, mask=i < size, other=0.0) * factor).to(out.dtype.element_ty), mask=i < size)


@triton.jit
def _scale(
    tokens,  # float32, A, B and C values; what is not wanted has none
    weight,
    bias,
    tokens_out,
    weight_out,
    bias_out,
    upstream,  # float32 scalars
    factor,
    A,
    B,
    C,
    BLOCK: tl.constexpr,
):
    """Every gradient times upstream times factor."""
    block = tl.program_id(0).to(tl.int64)
    scale = tl.load(upstream) * tl.load(factor)
    first = tl.cdiv(A, BLOCK)
    second = first + tl.cdiv(B, BLOCK)
    if block < first:
        _multiply(tokens, tokens_out, scale, block, A, BLOCK)
    elif block < second:
        _multiply(weight, weight_out, scale, block - first, B, BLOCK)
    else:
        _multiply(bias, bias_out, scale, block - second, C, BLOCK)


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


@op("fastssl::token_cross_entropy")
def forward(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, tokens_grad: bool, weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss and accuracy; then, for the backward pass, a scalar and the float32 gradients of tokens, weight and bias
    that it multiplies (empty where not wanted)."""
    (count, width), classes = tokens.shape, len(weight)
    weight, labels = weight.to(tokens.dtype), labels.contiguous()
    grad = tokens_grad or weight_grad or bias_grad

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=tokens.device)

    d_tokens = empty(count, width) if tokens_grad else empty(0)
    d_weight = empty(classes, width) if weight_grad else empty(0)
    if count == 0:
        d_weight.zero_()
    d_bias = empty(classes if bias_grad else 0)
    losses, hits, loss, accuracy, factor = empty(count), empty(count), empty(), empty(), empty()

    chunk = max(1, min(rows_per_chunk(count, classes), count))
    pitch = 16 * cdiv(classes, 16)  # rows that start, and masks that change, at multiples of 16 values
    logits = empty(chunk, pitch)
    slopes = logits if tokens.dtype == logits.dtype else logits.view(tokens.dtype)  # [chunk, pitch or 2 pitch]
    if classes <= WHOLE:
        kernel, block = _short_rows, power_of_2(classes)
        warps = max(1, min(16, block // 512))
        programs = min(chunk, _processors(tokens) * (16 // warps))
        options = {"BLOCK": block, "num_warps": warps}
    else:
        kernel, programs, options = _long_rows, cdiv(chunk, 2), {"R": 2, "BLOCK": 2048, "num_warps": 8}
    column_sums = empty(programs, pitch) if bias_grad else None
    scale = FP16_SCALE if tokens.dtype == torch.float16 else 1.0
    turned = weight.t()
    for start in range(0, count, chunk):
        rows = min(chunk, count - start)
        x, d_x = tokens, d_tokens
        if rows < count:
            x = tokens[start : start + rows]
            d_x = d_tokens[start : start + rows] if tokens_grad else d_tokens
        _product(x, turned, _corner(logits, rows, classes))
        launch(
            kernel, (programs,), logits, slopes, bias, labels, losses, hits, column_sums,
            start, rows, classes, pitch, slopes.shape[1], scale, BIAS=bias is not None, GRAD=grad,
            BIAS_GRAD=bias_grad, **options,
        )  # fmt: skip
        slope = _corner(slopes, rows, classes)
        if tokens_grad:
            _product(slope, weight, d_x)
        if weight_grad:
            _product(slope.t(), x, d_weight, add=start > 0)

    launch(
        _finish, (1 + (cdiv(classes, 64) if bias_grad else 0),), losses, hits, labels, column_sums, loss, accuracy,
        factor, d_bias, count, programs if count else 0, classes, pitch, scale, BIAS_GRAD=bias_grad, BLOCK=1024,
        ROWS=32, COLUMNS=64,
    )  # fmt: skip
    return loss, accuracy, factor, d_tokens, d_weight, d_bias


def _corner(x: Tensor, rows: int, columns: int) -> Tensor:
    return x if x.shape == (rows, columns) else x[:rows, :columns]


@forward.register_fake
def _(tokens, weight, bias, labels, tokens_grad, weight_grad, bias_grad):
    def empty(*shape):
        return tokens.new_empty(shape, dtype=torch.float32)

    wanted = zip((tokens, weight, bias), (tokens_grad, weight_grad, bias_grad), strict=True)
    return empty(), empty(), empty(), *(empty(*x.shape) if wants else empty(0) for x, wants in wanted)


@op("fastssl::token_cross_entropy_backward")
def backward(
    upstream: Tensor, factor: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, tokens_type: torch.dtype,
    weight_type: torch.dtype, bias_type: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients times upstream and the scalar `factor`, each in a type of its own."""
    given, dtypes = (tokens, weight, bias), (tokens_type, weight_type, bias_type)
    scaled = [torch.empty(x.shape, dtype=dtype, device=x.device) for x, dtype in zip(given, dtypes, strict=True)]
    sizes = [x.numel() for x in given]
    blocks = sum(cdiv(size, 1024) for size in sizes)
    launch(_scale, (blocks,), *given, *scaled, upstream, factor, *sizes, BLOCK=1024)
    return scaled[0], scaled[1], scaled[2]


@backward.register_fake
def _(upstream, factor, tokens, weight, bias, *dtypes):
    return tuple(torch.empty_like(x, dtype=dtype) for x, dtype in zip((tokens, weight, bias), dtypes, strict=True))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    ctx.dtypes = [torch.float32 if x is None else x.dtype for x in inputs[:3]]
    ctx.wanted = inputs[4:]
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, upstream, *_):
    gradients = backward(upstream, *ctx.saved_tensors, *ctx.dtypes)
    return *[x if wanted else None for x, wanted in zip(gradients, ctx.wanted, strict=True)], *[None] * 4


forward.register_autograd(_differentiate, setup_context=_save)
