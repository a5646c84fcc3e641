"""Cases of patch_pixel_loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.kernels._spec import FP16, FP32, Case, Maker, Op, nbytes
from fastssl.kernels.patch_pixel_loss import patch_pixel_loss, reference


def inputs(
    make: Maker,
    dtype: torch.dtype,
    *,
    B: int,
    size: tuple[int, int],
    p: int,
    M: int,
    image_dtype: torch.dtype | None = None,
    count: bool = False,
    strided: bool = False,
    **options: Any,
) -> dict[str, Any]:
    rows, columns = size[0] // p, size[1] // p
    images = make.normal(B, 3, *size, dtype=image_dtype or dtype)
    prediction = make.normal(B, M, 3 * p * p * (2 if strided else 1), dtype=dtype)
    masked = make.choice(B, rows * columns, M)
    return {
        "prediction": prediction[..., ::2] if strided else prediction,
        "images": images.to(memory_format=torch.channels_last) if strided else images,
        "masked": masked.int().T.contiguous().T if strided else masked,
        "patch_size": p,
        "count": make.integers(B, high=M + 1) if count else None,
        **options,
    }


def min_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    prediction, images = inputs["prediction"], inputs["images"]
    target = prediction.numel() * images.element_size()
    return nbytes(prediction) * (2 if backward else 1) + target + nbytes(inputs["masked"])


PROOF: dict[str, Case] = {
    "mae": {"B": 3, "size": (32, 48), "p": 8, "M": 17},
    "one patch": {"B": 1, "size": (4, 4), "p": 4, "M": 1},
    "pixels as they are": {"B": 2, "size": (12, 8), "p": 4, "M": 5, "norm_pixels": False},
    "odd patches": {"B": 2, "size": (15, 20), "p": 5, "M": 7},
    "painted, ragged": {
        "B": 4, "size": (24, 24), "p": 8, "M": 9, "count": True, "norm_pixels": False, "channels_last": False,
    },
    "strided": {"B": 2, "size": (16, 32), "p": 8, "M": 6, "strided": True, "image_dtype": FP32},
    "no patches": {"B": 2, "size": (8, 8), "p": 4, "M": 0},
}  # fmt: skip

BENCH: dict[str, Case] = {
    "MAE B/16, B=256": {"B": 256, "size": (224, 224), "p": 16, "M": 147},
    "SemMAE B/8, B=64": {"B": 64, "size": (224, 224), "p": 8, "M": 588},
    "SAAE B=240, ragged": {
        "B": 240, "size": (224, 224), "p": 16, "M": 196, "count": True, "norm_pixels": False, "channels_last": False,
    },
}  # fmt: skip

OPS = [
    Op(
        "patch_pixel_loss", patch_pixel_loss, reference.patch_pixel_loss, inputs, PROOF, BENCH, min_bytes,
        gradients=("prediction",), tolerance={FP16: (1e-3, 2e-3)},
    )
]  # fmt: skip
