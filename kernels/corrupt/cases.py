"""Cases of corrupt, draw_blocks and draw_first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.kernels._spec import FP32, Case, Maker, Op, nbytes
from fastssl.kernels.corrupt import corrupt, draw_blocks, draw_first, reference


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
    soft: int = 0,
    of: int = 1,
    seed: int = 1,
) -> dict[str, Any]:
    """R rectangles with sides in [low, high), kinds in [low, high), a share `used` of them used; some cross borders;
    `of` views per image; with `soft`, gray and blurred ones beneath, with up to so many weights."""
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
    source, ids = make.integers(B, high=max(B, 1)), make.integers(B // of, high=2**32)
    if strided:
        views = views.contiguous(memory_format=torch.channels_last)
        boxes, kind = boxes.transpose(0, 1).contiguous().transpose(0, 1), kind.t().contiguous().t()
        source = source.to(torch.int32)
    made = {
        "views": views, "boxes": boxes, "kind": kind, "source": source, "ids": ids, "seed": seed, "epoch": 3, "view": 1,
    }  # fmt: skip
    if soft:
        start = torch.stack([make.integers(B, 2, high=side) for side in size], dim=2)
        extent = torch.stack([make.integers(B, 2, low=1, high=side + 1) for side in size], dim=2)
        extent = extent.minimum(torch.tensor(size, device=make.device) - start)
        weights = make.uniform(B, reference.TAPS, dtype=torch.float64) * (make.uniform(B, 1) > 0.1)
        weights = weights * (torch.arange(reference.TAPS, device=make.device) <= make.integers(B, 1, high=soft))
        weights = weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1]).clamp_min(1e-9)
        made |= {"soft": torch.cat([start, extent], dim=2).int(), "weights": weights}
    return made


def min_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    shown = reference.topmost(inputs["boxes"], inputs["kind"], *inputs["views"].shape[2:])
    read = ((shown == 0) | (shown == 3)).sum().item() * 3 * inputs["views"].element_size()
    return nbytes(outputs) + read + nbytes([value for key, value in inputs.items() if key != "views"])


def where(
    views: Tensor, boxes: Tensor, kind: Tensor, source: Tensor, soft: Tensor | None = None,
    weights: Tensor | None = None, **rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shown = reference.topmost(boxes, kind, *views.shape[2:])[:, None]
    beneath, mask = views, shown[:, 0] > 0
    if soft is not None and weights is not None:
        beneath, softer = reference.softened(views, soft, weights)
        mask |= softer
    painted = torch.where(shown == 2, torch.randn_like(views), torch.where(shown == 3, views[source], beneath))
    return painted.masked_fill_(shown == 1, 0), mask


def draw_inputs(make: Maker, dtype: torch.dtype, *, B: int, **options: Any) -> dict[str, Any]:
    if "size" in options:
        options["height"], options["width"] = options.pop("size")
    return {"ids": make.integers(B, high=2**32), "views": 2, "seed": 5, "epoch": 2, **options}


PROOF: dict[str, Case] = {
    "all kinds": {"B": 3, "size": (40, 72), "R": 9, "sides": (3, 20)},
    "one pixel": {"B": 1, "size": (1, 1), "R": 1, "sides": (1, 4), "used": 1.0},
    "more than two words of rectangles": {"B": 2, "size": (33, 31), "R": 70, "sides": (1, 9)},
    "several tiles, ragged": {"B": 2, "size": (35, 67), "R": 12, "sides": (5, 30)},
    "noise": {"B": 2, "size": (24, 32), "R": 2, "sides": (8, 30), "kinds": (1, 2), "seed": 2**32 - 5},
    "zeros": {"B": 2, "size": (24, 32), "R": 5, "sides": (8, 30), "kinds": (0, 1)},
    "strided": {"B": 3, "size": (17, 40), "R": 6, "sides": (2, 12), "strided": True},
    "two views": {"B": 4, "size": (19, 32), "R": 3, "sides": (4, 20), "of": 2},
    "gray and blurred": {"B": 4, "size": (21, 35), "R": 2, "sides": (2, 9), "of": 2, "soft": 8},
    "gray and blurred, several tiles, strided": {
        "B": 2, "size": (33, 66), "R": 1, "sides": (9, 20), "strided": True, "soft": 3,
    },
    "gray and blurred, one pixel": {"B": 1, "size": (1, 1), "R": 0, "sides": (1, 4), "soft": 8},
    "none used": {"B": 2, "size": (8, 24), "R": 3, "sides": (2, 5), "used": 0.0},
    "no rectangles": {"B": 2, "size": (8, 24), "R": 0, "sides": (2, 5)},
    "no images": {"B": 0, "size": (8, 24), "R": 2, "sides": (2, 5)},
}  # fmt: skip

BENCH: dict[str, Case] = {
    "SiT, 2 views of 128": {
        "B": 256, "size": (224, 224), "R": 66, "sides": (1, 67), "kinds": (0, 3), "used": 0.5, "of": 2,
    },
    "SiT v1, 2 views of 64": {
        "B": 128, "size": (224, 224), "R": 96, "sides": (11, 56), "kinds": (1, 3), "used": 0.2, "of": 2, "soft": 8,
    },
}  # fmt: skip

DRAW_PROOF: dict[str, Case] = {
    "zeros": {"B": 1, "size": (64, 64), "drop": 0.5, "replace": 0.3, "alien": 0.0, "views": 1},
    "zeros, noise, alien": {"B": 5, "size": (24, 20), "drop": 0.4, "replace": 0.3, "noise": 0.5, "max_side": 0.9},
    "upstream": {"B": 1, "size": (64, 70), "drop": 0.3, "replace": 0.2, "uniform_rate": False},
    "aligned": {"B": 2, "size": (60, 40), "drop": 0.5, "replace": 0.5, "align": 4, "max_side": 0.6, "alien": 1.0},
    "aligned, upstream": {
        "B": 2, "size": (39, 61), "drop": 0.5, "replace": 0.3, "align": 4, "max_side": 0.6, "uniform_rate": False,
    },
    "a range of budgets, any image": {
        "B": 3, "size": (32, 33), "drop": 0.6, "replace": 0.7, "max_side": 0.9, "group": 0, "noise": 1.0,
    },
    "too few blocks, alone in a group": {
        "B": 3, "size": (20, 100), "drop": 0.9, "replace": 0.9, "max_blocks": (5, 3), "group": 2,
    },
    "no blocks": {"B": 2, "size": (20, 20), "drop": 0.5, "replace": 0.3, "max_blocks": (0, 0)},
    "no images": {"B": 0, "size": (20, 20), "drop": 0.5, "replace": 0.3},
}  # fmt: skip

DRAW_BENCH: dict[str, Case] = {
    "SiT, 2 views of 128": {"B": 128, "size": (224, 224), "drop": 0.5, "replace": 0.3, "max_blocks": (78, 45)},
    "SiT, upstream, 2 views of 128": {
        "B": 128, "size": (224, 224), "drop": 0.5, "replace": 0.3, "uniform_rate": False,
    },
    "SiT, 16 x 16, 2 views of 128": {"B": 128, "size": (224, 224), "drop": 0.5, "replace": 0.3, "align": 16},
    "512 x 512, 2 views of 32": {"B": 32, "size": (512, 512), "drop": 0.5, "replace": 0.3},
}  # fmt: skip

FIRST_PROOF: dict[str, Case] = {
    "of 224": {"B": 5, "side": 224, "share": 0.3},
    "of 32, any image": {"B": 5, "side": 32, "share": 0.6, "group": 0},
    "tiny, pairs, one view": {"B": 3, "side": 5, "share": 0.3, "group": 2, "views": 1},
    "no images": {"B": 0, "side": 32, "share": 0.3},
}

FIRST_BENCH: dict[str, Case] = {"SiT v1, 2 views of 64": {"B": 64, "side": 224, "share": 0.3}}


def exact_op(name: str, call: Any, plain: Any, proof: dict[str, Case], bench: dict[str, Case], worst: float) -> Op:
    """An op that draws: both paths give the same numbers."""
    return Op(
        name, call, plain, draw_inputs, proof, bench, lambda inputs, outputs, backward: nbytes(inputs, outputs),
        dtypes=(FP32,), tolerance={FP32: (worst, worst)},
    )  # fmt: skip


OPS = [
    Op("corrupt", corrupt, reference.corrupt, inputs, PROOF, BENCH, min_bytes, library={"torch.where": where}),
    exact_op("draw_blocks", draw_blocks, reference.draw_blocks, DRAW_PROOF, DRAW_BENCH, 0.0),
    exact_op("draw_first", draw_first, reference.draw_first, FIRST_PROOF, FIRST_BENCH, 1e-14),  # the blur's weights
]
