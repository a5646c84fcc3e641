"""InfoNCE between patches in Triton: a program holds a block of codes and goes over the image's other codes.

    x = a / (|a| + 1e-10);  y = b / (|b| + 1e-10);  s_pq = <x_p, y_q> / temperature
    total = sum over the valid p of [lse_p - s_pp];  g_pq = exp(s_pq - lse_p) - (p == q) for valid p, otherwise 0
    d x_p = sum_q g_pq y_q / temperature;  d a_p = (d x_p - a_p / |a_p| <x_p, d x_p>) / (|a_p| + 1e-10)

d b likewise, with rows and columns of g exchanged: one kernel does both. Products are of the codes as they are, the
norms come after. Blocks without a valid patch are skipped. No atomics, so every run gives the same bits.

Letters: N images, P patches, C width of a code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import cdiv, launch, power_of_2, recording
from fastssl.kernels._op import op


@triton.jit
def _codes(codes, row, p, c, P: tl.constexpr, C: tl.constexpr):
    """Values c of the codes of patches p of one image; 0 outside."""
    return tl.load(codes + p[:, None] * row + c[None, :], mask=(p < P)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _norm(codes):
    x = codes.to(tl.float32)
    return tl.sqrt_rn(tl.sum(x * x, 1))


@triton.jit
def _products(
    x, y, own, other, op, tp, p, q, P: tl.constexpr, C: tl.constexpr, SLICED: tl.constexpr, WIDEN: tl.constexpr
):
    """x y', float32: [BLOCK, BLOCK]. Sliced: both read again, a few values of each code at a time."""
    if SLICED:
        s = tl.zeros([p.shape[0], q.shape[0]], tl.float32)
        for start in range(0, C, 16):
            c = start + tl.arange(0, 16)
            part = tl.trans(_codes(other, tp, q, c, P, C))
            s += tl.dot(_codes(own, op, p, c, P, C), part, input_precision="ieee")
    else:
        s = _dot(x, tl.trans(y), WIDEN)
    return s


@triton.jit
def _dot(x, y, WIDEN: tl.constexpr):
    if WIDEN:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def _forward(
    a,  # [N, P, C], strides an, ap, 1
    b,  # [N, P, C], strides bn, bp, 1
    valid,  # bool [N, P]
    saved,  # float32 [3, N, P], out: log-sum-exp, infinity where not valid; norm of a, of blocks with a valid patch;
    # norm of b, of images with a valid patch
    sums,  # float32 [2, N, blocks], out: sum of the block's losses, and how many there are
    plane,  # N P
    blocks,
    an,
    ap,
    bn,
    bp,
    inv_temp,
    P: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,  # C, rounded up to a power of two
    BLOCK: tl.constexpr,  # patches of a per program, and of b at once
    SLICED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, WIDTH)
    lse, a_norm, b_norm = saved, saved + plane, saved + 2 * plane
    counts = tl.load(valid + n * P + p, mask=p < P, other=0) != 0
    number = tl.sum(counts.to(tl.int32), 0)
    tl.store(sums + tl.num_programs(0) + tl.program_id(0), number.to(tl.float32))
    if number == 0:
        tl.store(lse + n * P + p, float("inf"), mask=p < P)
        tl.store(sums + tl.program_id(0), 0.0)
        return
    a += n * an
    b += n * bn
    x = _codes(a, ap, p, c, P, C)
    p_norm = _norm(x)
    tl.store(a_norm + n * P + p, p_norm, mask=p < P)
    shrink = inv_temp / (p_norm + 1e-10)
    m = tl.full([BLOCK], -float("inf"), tl.float32)
    z = tl.zeros([BLOCK], tl.float32)
    own = tl.zeros([BLOCK], tl.float32)
    for start in range(0, P, BLOCK):
        q = start + tl.arange(0, BLOCK)
        y = _codes(b, bp, q, c, P, C)
        q_norm = _norm(y)
        tl.store(b_norm + n * P + q, q_norm, mask=q < P)  # by every block of the image, the same
        inverse = 1 / (q_norm + 1e-10)
        s = _products(x, y, a, b, ap, bp, p, q, P, C, SLICED, WIDEN) * shrink[:, None] * inverse[None, :]
        own += tl.sum(tl.where(p[:, None] == q[None, :], s, 0.0), 1)
        s = tl.where((q < P)[None, :], s, -float("inf"))
        new = tl.maximum(m, tl.max(s, 1))
        z = z * tl.exp(m - new) + tl.sum(tl.exp(s - new[:, None]), 1)
        m = new
    total = m + tl.log(z)
    tl.store(lse + n * P + p, tl.where(counts, total, float("inf")), mask=p < P)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(counts, total - own, 0.0), 0))


@triton.jit(do_not_specialize=["number"])
def _total(
    sums,  # float32 [2, number]
    total,  # float32 scalar, out
    count,  # float32 scalar, out
    number,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)
    losses = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    for start in range(0, number, BLOCK):
        inside = start + lane < number
        losses += tl.load(sums + start + lane, mask=inside, other=0.0)
        counts += tl.load(sums + number + start + lane, mask=inside, other=0.0)
    tl.store(total, tl.sum(losses, 0))
    tl.store(count, tl.sum(counts, 0))


@triton.jit
def _backward(
    own,  # [N, P, C], strides on, op, 1: a for its gradient, b for its own
    other,  # [N, P, C], strides tn, tp, 1: the other one
    saved,  # float32 [3, N, P]
    upstream,  # float32 scalar
    gradient,  # [N, P, C], contiguous, out: of `own`
    plane,
    blocks,
    on,
    op,
    tn,
    tp,
    inv_temp,
    ROWS: tl.constexpr,  # `own` is a, whose patches are the rows of g
    LENGTH: tl.constexpr,  # P, rounded up to a power of two
    P: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, WIDTH)
    gradient += n * P * C
    lse = saved + n * P
    own_norm, other_norm = saved + plane, saved + plane
    if ROWS:
        other_norm += plane
    else:
        own_norm += plane
    inside = (p < P)[:, None] & (c < C)[None, :]
    every = tl.arange(0, LENGTH)
    first = 0
    end = P
    if ROWS:
        p_lse = tl.load(lse + p, mask=p < P, other=float("inf"))
        some = tl.min(p_lse, 0) < float("inf")
        wanted = every < P
    else:  # the valid rows lie between first and end
        wanted = tl.load(lse + every, mask=every < P, other=float("inf")) < float("inf")
        first = tl.min(tl.where(wanted, every, P), 0)
        end = tl.max(tl.where(wanted, every + 1, 0), 0)
        some = end > 0
    if not some:
        zeros = tl.zeros([BLOCK, WIDTH], gradient.dtype.element_ty)
        tl.store(gradient + p[:, None] * C + c[None, :], zeros, mask=inside)
        return
    own += n * on
    other += n * tn
    norm = tl.load(own_norm + n * P + p, mask=p < P, other=1.0)
    shrink = inv_temp / (norm + 1e-10)
    # the other codes' weights are g / norm: in units that let every one of them be a float16
    other_norm += n * P
    every_norm = tl.load(other_norm + every, mask=wanted, other=0.0)
    unit = tl.min(tl.where(every_norm > 0, every_norm, 1e30), 0) * 32768
    x = _codes(own, op, p, c, P, C)
    slope = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in range(first, end, BLOCK):
        q = start + tl.arange(0, BLOCK)
        y = _codes(other, tp, q, c, P, C)
        if ROWS:
            counts = q < P
            row_lse = p_lse[:, None]
        else:
            q_lse = tl.load(lse + q, mask=q < P, other=float("inf"))
            counts = q_lse < float("inf")
            row_lse = q_lse[None, :]
        q_norm = tl.load(other_norm + q, mask=counts, other=0.0)
        inverse = tl.where(q_norm > 0, 1 / (q_norm + 1e-10), 0.0)  # a code of zeros adds nothing
        s = _products(x, y, own, other, op, tp, p, q, P, C, SLICED, WIDEN) * shrink[:, None] * inverse[None, :]
        g = tl.exp(s - row_lse) - ((p[:, None] == q[None, :]) & (row_lse < float("inf"))).to(tl.float32)
        slope += _dot((g * (inverse * unit)[None, :]).to(y.dtype), y, WIDEN)
    # read again, by a load that differs from the first, so that no registers hold x through the loop
    at = own + p[:, None] * op + c[None, :]
    x = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    along = tl.sum(x * slope, 1) / tl.maximum(norm, 1e-30) / (norm + 1e-10)
    factor = tl.load(upstream) * inv_temp / unit / (norm + 1e-10)
    slope = (slope - x * along[:, None]) * factor[:, None]
    tl.store(gradient + p[:, None] * C + c[None, :], slope.to(gradient.dtype.element_ty), mask=inside)


def _tile(a: Tensor) -> dict[str, int]:
    """Sizes of the blocks, and how products are taken."""
    width = max(16, power_of_2(a.shape[2]))
    exact = a.dtype == torch.float32
    block, warps = (16, 8) if exact else (32, 4 if width <= 256 else 8)  # not measured yet
    widen = a.dtype == torch.bfloat16 and not (a.is_cuda or recording())  # the interpreter cannot dot it
    return {
        "P": a.shape[1], "C": a.shape[2], "WIDTH": width, "BLOCK": block, "SLICED": exact, "WIDEN": widen,
        "num_warps": warps, "num_stages": 2,
    }  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """The codes with neighbouring values of a code next to each other in memory."""
    return x if x.stride(2) == 1 else x.contiguous()


@op("fastssl::patch_contrast")
def forward(a: Tensor, b: Tensor, valid: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Total and count, float32 scalars; for the backward pass log-sum-exps and norms of a and b, [3, N, P]."""
    a, b, valid = _rows(a), _rows(b), valid.contiguous()
    images, patches, _ = a.shape
    tile = _tile(a)
    blocks = cdiv(patches, tile["BLOCK"])
    saved = torch.empty(3, images, patches, dtype=torch.float32, device=a.device)
    sums = torch.empty(2, images * blocks, dtype=torch.float32, device=a.device)
    launch(
        _forward, (images * blocks,), a, b, valid, saved, sums, images * patches, blocks, *a.stride()[:2],
        *b.stride()[:2], 1 / temperature, **tile,
    )  # fmt: skip
    total, count = (torch.empty((), dtype=torch.float32, device=a.device) for _ in range(2))
    launch(_total, (1,), sums, total, count, images * blocks, BLOCK=1024, num_warps=8)
    return total, count, saved


@forward.register_fake
def _(a, b, valid, temperature):
    def empty(*shape):
        return a.new_empty(shape, dtype=torch.float32)

    return empty(), empty(), empty(3, *a.shape[:2])


@op("fastssl::patch_contrast_backward")
def backward(
    upstream: Tensor, a: Tensor, b: Tensor, saved: Tensor, temperature: float, a_grad: bool, b_grad: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of a and b, contiguous; empty where not wanted."""
    a, b = _rows(a), _rows(b)
    images, patches, _ = a.shape
    tile = _tile(a)
    blocks = cdiv(patches, tile["BLOCK"])
    gradients = []
    for own, other, wanted in ((a, b, a_grad), (b, a, b_grad)):
        gradients.append(torch.empty(own.shape if wanted else (0,), dtype=a.dtype, device=a.device))
        if wanted:
            launch(
                _backward, (images * blocks,), own, other, saved, upstream, gradients[-1], images * patches, blocks,
                *own.stride()[:2], *other.stride()[:2], 1 / temperature,
                ROWS=len(gradients) == 1, LENGTH=power_of_2(patches), **tile,
            )  # fmt: skip
    return gradients[0], gradients[1]


@backward.register_fake
def _(upstream, a, b, saved, temperature, a_grad, b_grad):
    return tuple(a.new_empty(x.shape if wanted else (0,)) for x, wanted in ((a, a_grad), (b, b_grad)))


def _save(ctx, inputs, output):
    a, b, _, ctx.temperature = inputs
    ctx.save_for_backward(a, b, output[2])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, upstream, *_):
    wanted = ctx.needs_input_grad[:2]
    gradients = backward(upstream, *ctx.saved_tensors, ctx.temperature, *wanted)
    return *[gradient if wants else None for gradient, wants in zip(gradients, wanted, strict=True)], None, None


forward.register_autograd(_differentiate, setup_context=_save)
