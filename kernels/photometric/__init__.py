"""Photometric augmentation: uint8 crops and their drawn parameters become normalised float views in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastssl.kernels._check import FLOATS, INTEGERS, Shapes, check, once
from fastssl.kernels._path import use_numba, use_triton
from fastssl.kernels.photometric import reference
from fastssl.kernels.photometric.reference import BLUR_RADIUS as BLUR_RADIUS

NAME = "photometric"


def photometric(
    crops: Tensor,
    *,
    jitter: Tensor | None = None,
    order: Tensor | None = None,
    factor: Tensor | None = None,
    gray: Tensor | None = None,
    blur_sigma: Tensor | None = None,
    solarize: Tensor | None = None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Each crop's drawn operations, then normalised (the augmentation of Grill et al. 2020, appendix B; DINO's views).

        for n in range(N):
            x = crops[n] / 255
            if jitter[n]:
                for op in order[n]:  # luma(x) = 0.2989 red + 0.587 green + 0.114 blue, per pixel
                    target = 0, mean(luma(x)) or luma(x) for op 0, 1, 2
                    x = clip(target + factor[n, op] (x - target), 0, 1)
                    # op 3 instead turns the hue of x (HSV) by factor[n, 3] turns
            if gray[n]:
                x = luma(x) in all channels
            if blur_sigma[n] > 0:
                x = Gaussian blur of x, cut off at BLUR_RADIUS pixels, the edge pixels repeated
            if solarize[n] <= 255:
                x = where(x >= solarize[n] / 255, 1 - x, x)
            out[n] = (x - mean) / std

    The six drawn parameters come together or not at all; without them the crops are only normalised. All arithmetic is
    float32 (float64 for a float64 result). On the CPU a float32 result comes from compiled code, within 1e-5 of exact
    arithmetic (of a range of 1). On a GPU, for a bfloat16 result, the blur's factors are rounded to float16:
    an error below 0.1 of 255 levels. Nothing waits for the device.

    Args:
        crops: uint8 [N, 3, H, W].
        jitter: bool [N], whether the four jitter operations are applied.
        order: int64 or int32 [N, 4], the order in which they are (0 brightness, 1 contrast, 2 saturation, 3 hue); each
            row must be a permutation.
        factor: [N, 4], by operation: brightness, contrast, saturation factors and the hue shift in turns.
        gray: bool [N].
        blur_sigma: [N], standard deviation in pixels; 0 means no blur.
        solarize: [N], threshold in gray levels 0-255; above 255 means no solarize.
        mean, std: per channel, for pixel values in [0, 1].
        dtype: type of the result.
        out: `dtype` [N, 3, H, W], contiguous: memory for the result on the CPU, where new memory costs as much time as
            the work. On a GPU it must be None.

    Returns:
        `dtype` [N, 3, H, W], contiguous. No gradient flows.

    Raises:
        KernelError: a shape or type that does not fit, or only some of the drawn parameters.
    """
    drawn = (jitter, order, factor, gray, blur_sigma, solarize)
    _check(crops, *drawn, tuple(mean), tuple(std), dtype, out)
    if out is not None:
        check(out.device.type == "cpu" and out.is_contiguous(), NAME, "out", "contiguous and on the CPU", out.device)
    exact = torch.float64 in (dtype, None if factor is None else factor.dtype)
    if use_triton(NAME, crops) and not exact:
        from fastssl.kernels.photometric import kernel

        result = kernel.forward(crops, *drawn, [float(m) for m in mean], [float(s) for s in std], dtype)
    elif dtype == torch.float32 and not exact and use_numba(crops):
        return _on_cpu(crops, drawn, mean, std, out)
    else:
        result = reference.photometric(crops, *drawn, mean=mean, std=std, dtype=dtype)
    return result if out is None else out.copy_(result)


@once
def _check(
    crops: Tensor, jitter: Tensor | None, order: Tensor | None, factor: Tensor | None, gray: Tensor | None,
    blur_sigma: Tensor | None, solarize: Tensor | None, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
    out: Tensor | None,
) -> None:  # fmt: skip
    shapes = Shapes(NAME)
    shapes("crops", crops, "N 3 H W", (torch.uint8,))
    given: dict[str, tuple[Any, str, tuple[torch.dtype, ...]]] = {
        "jitter": (jitter, "N", (torch.bool,)),
        "order": (order, "N 4", INTEGERS),
        "factor": (factor, "N 4", FLOATS),
        "gray": (gray, "N", (torch.bool,)),
        "blur_sigma": (blur_sigma, "N", FLOATS),
        "solarize": (solarize, "N", FLOATS),
    }
    missing = [name for name, (value, *_) in given.items() if value is None]
    together = len(missing) in (0, len(given))
    check(together, NAME, "the drawn parameters", "all given or all None", f"without {', '.join(missing)}")
    if not missing:
        for name, (value, shape, dtypes) in given.items():
            shapes(name, value, shape, dtypes)
    check(len(mean) == 3, NAME, "mean", "3 numbers", len(mean))
    check(len(std) == 3 and all(std), NAME, "std", "3 numbers other than 0", list(std))
    check(dtype in FLOATS, NAME, "dtype", "a floating-point type", dtype)
    if out is not None:
        shapes("out", out, "N 3 H W", (dtype,))


def _on_cpu(
    crops: Tensor, drawn: Sequence[Tensor | None], mean: Sequence[float], std: Sequence[float], out: Tensor | None
) -> Tensor:
    """The compiled CPU path, the crops shared out among as many threads as PyTorch uses."""
    from fastssl.kernels.photometric.cpu import photometric_range

    n, _, height, width = crops.shape
    out = torch.empty(crops.shape, dtype=torch.float32) if out is None else out
    if drawn[0] is None:
        drawn = (*(torch.zeros(shape) for shape in ((n,), (n, 4), (n, 4), (n,), (n,))), torch.full((n,), 256))
    dtypes = (torch.bool, torch.int64, torch.float32, torch.bool, torch.float32, torch.float32)
    values = [x.to(dtype).contiguous() for x, dtype in zip(drawn, dtypes, strict=True) if x is not None]
    within = values[1] == values[1].clamp(0, 3)
    check(bool(within.all()), NAME, "order", "from 0 (brightness) to 3 (hue)", "another value")
    scale, shift = torch.tensor(std, dtype=torch.float64), torch.tensor(mean, dtype=torch.float64)
    normal = (1 / (255 * scale)).float(), (-shift / scale).float()
    first, *others = (x.numpy() for x in (crops.contiguous(), *values, *normal))
    each = max(1, -(-n // (4 * torch.get_num_threads())))
    starts = range(0, n if crops.numel() else 0, each)

    def work(start: int) -> None:
        scratch = torch.empty(3 * (height + 2 * BLUR_RADIUS) * width).numpy()
        photometric_range(first, start, min(start + each, n), *others, scratch, out.numpy())

    if torch.get_num_threads() == 1 or len(starts) == 1:
        for start in starts:
            work(start)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(work, starts))
    return out
