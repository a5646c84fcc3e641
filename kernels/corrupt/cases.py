"""Cases of corrupt and draw_blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.kernels._spec import FP32, Case, Maker, Op, nbytes
from fastssl.kernels.corrupt import corrupt, draw_blocks, reference


def inputs(
    make: Maker,
    dtype: torch.dtype,
    *,
    B: int,
    size: tuple[int, int],
    R: int,
    sides: tuple[int, int],
    kinds: tuple[int, int] = (0, 3),
    used: float = 0.8,
    strided: bool = False,
    seed: int = 1,
) -> dict[str, Any]:
    """R rectangles with sides in [low, high), kinds in [low, high), a share `used` of them used; some cross borders."""
    height, width = size
    views = make.normal(B, 3, height, width, dtype=dtype)
    boxes = torch.stack(
        [
            make.integers(B, R, low=-2, high=height, dtype=torch.int32),
            make.integers(B, R, low=-2, high=width, dtype=torch.int32),
            make.integers(B, R, low=sides[0], high=sides[1], dtype=torch.int32) * make.boolean(B, R, p=used),
            make.integers(B, R, low=sides[0], high=sides[1], dtype=torch.int32),
        ],
        dim=2,
    )
    kind = make.integers(B, R, low=kinds[0], high=kinds[1], dtype=torch.int32)
    source, ids = make.integers(B, high=max(B, 1)), make.integers(B, high=2**32)
    if strided:
        views = views.contiguous(memory_format=torch.channels_last)
        boxes, kind = boxes.transpose(0, 1).contiguous().transpose(0, 1), kind.t().contiguous().t()
        source = source.to(torch.int32)
    return {
        "views": views, "boxes": boxes, "kind": kind, "source": source, "ids": ids, "seed": seed, "epoch": 3, "view": 1,
    }  # fmt: skip


def min_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    shown = reference.topmost(inputs["boxes"], inputs["kind"], *inputs["views"].shape[2:])
    read = ((shown == 0) | (shown == 3)).sum().item() * 3 * inputs["views"].element_size()
    return nbytes(outputs) + read + nbytes(inputs["boxes"], inputs["kind"], inputs["ids"])


def where(
    views: Tensor, boxes: Tensor, kind: Tensor, source: Tensor, ids: Tensor, seed: int, epoch: int, view: int
) -> tuple[Tensor, Tensor]:
    shown = reference.topmost(boxes, kind, *views.shape[2:])[:, None]
    painted = torch.where(shown == 2, torch.randn_like(views), torch.where(shown == 3, views[source], views))
    return painted.masked_fill_(shown == 1, 0), shown[:, 0] > 0


def draw_inputs(make: Maker, dtype: torch.dtype, *, B: int, size: tuple[int, int], **options: Any) -> dict[str, Any]:
    ids = make.integers(B, high=2**32)
    return {"ids": ids, "height": size[0], "width": size[1], "seed": 5, "epoch": 2, **options}


PROOF: dict[str, Case] = {
    "all kinds": {"B": 3, "size": (40, 72), "R": 9, "sides": (3, 20)},
    "one pixel": {"B": 1, "size": (1, 1), "R": 1, "sides": (1, 4), "used": 1.0},
    "more than two words of rectangles": {"B": 2, "size": (33, 31), "R": 70, "sides": (1, 9)},
    "several tiles, ragged": {"B": 2, "size": (35, 67), "R": 12, "sides": (5, 30)},
    "noise": {"B": 2, "size": (24, 32), "R": 2, "sides": (8, 30), "kinds": (1, 2), "seed": 2**32 - 5},
    "zeros": {"B": 2, "size": (24, 32), "R": 5, "sides": (8, 30), "kinds": (0, 1)},
    "strided": {"B": 3, "size": (17, 40), "R": 6, "sides": (2, 12), "strided": True},
    "none used": {"B": 2, "size": (8, 24), "R": 3, "sides": (2, 5), "used": 0.0},
    "no rectangles": {"B": 2, "size": (8, 24), "R": 0, "sides": (2, 5)},
    "no images": {"B": 0, "size": (8, 24), "R": 2, "sides": (2, 5)},
}

BENCH: dict[str, Case] = {
    "SiT zeros, B=256": {"B": 256, "size": (224, 224), "R": 64, "sides": (1, 67), "kinds": (0, 1), "used": 0.6},
    "SiT zeros or alien, B=256": {
        "B": 256, "size": (224, 224), "R": 128, "sides": (1, 67), "kinds": (0, 3), "used": 0.3,
    },
    "SiT v1 noise and alien, B=128": {
        "B": 128, "size": (224, 224), "R": 32, "sides": (11, 56), "kinds": (1, 3), "used": 0.5,
    },
}  # fmt: skip

DRAW_PROOF: dict[str, Case] = {
    "zeros": {"B": 1, "size": (64, 64), "fraction": 0.5},
    "upstream": {"B": 2, "size": (64, 70), "fraction": 0.3, "uniform_rate": False, "view": 1},
    "aligned": {"B": 2, "size": (60, 40), "fraction": 0.5, "align": 4, "max_side": 0.6, "kind": 2},
    "aligned, upstream": {
        "B": 2, "size": (39, 61), "fraction": 0.5, "align": 4, "max_side": 0.6, "uniform_rate": False,
    },
    "a range of budgets": {"B": 2, "size": (32, 33), "fraction": 0.6, "max_side": 0.5},
    "too few blocks": {"B": 2, "size": (20, 100), "fraction": 0.9, "max_blocks": 5},
    "no blocks": {"B": 2, "size": (20, 20), "fraction": 0.5, "max_blocks": 0},
    "no images": {"B": 0, "size": (20, 20), "fraction": 0.5},
}  # fmt: skip

DRAW_BENCH: dict[str, Case] = {
    "SiT zeros, B=256": {"B": 256, "size": (224, 224), "fraction": 0.5},
    "SiT alien, upstream, B=256": {"B": 256, "size": (224, 224), "fraction": 0.3, "uniform_rate": False},
    "SiT, 16 x 16, B=256": {"B": 256, "size": (224, 224), "fraction": 0.5, "align": 16},
    "512 x 512, B=64": {"B": 64, "size": (512, 512), "fraction": 0.5},
}

OPS = [
    Op("corrupt", corrupt, reference.corrupt, inputs, PROOF, BENCH, min_bytes, library={"torch.where": where}),
    Op(
        "draw_blocks", draw_blocks, reference.draw_blocks, draw_inputs, DRAW_PROOF, DRAW_BENCH,
        lambda inputs, outputs, backward: nbytes(inputs, outputs), dtypes=(FP32,), tolerance={FP32: (0.0, 0.0)},
    ),
]  # fmt: skip
