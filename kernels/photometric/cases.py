"""Cases of photometric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.kernels._spec import Case, Maker, Op, nbytes
from fastssl.kernels.photometric import photometric, reference

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def inputs(
    make: Maker,
    dtype: torch.dtype,
    *,
    N: int,
    size: tuple[int, int],
    jitter: float = 0.8,
    gray: float = 0.2,
    blur: float = 0.5,
    solarize: float = 0.1,
    threshold: float = 128.0,
    drawn: bool = True,
    strided: bool = False,
) -> dict[str, Any]:
    """Crops of random values with the parameters of DINO's views; jitter, gray, blur, solarize are probabilities."""
    height, width = size
    crops = make.integers(N, 3, height, 2 * width if strided else width, high=256, dtype=torch.uint8)
    result = {"crops": crops[..., ::2] if strided else crops, "mean": MEAN, "std": STD, "dtype": dtype}
    if not drawn:
        return result
    factor = make.uniform(N, 4, low=0.6, high=1.4)
    factor[:, 3] = make.uniform(N, low=-0.1, high=0.1)
    order = make.uniform(N, 4).argsort(1)
    return result | {
        "jitter": make.boolean(N, p=jitter),
        "order": order.to(torch.int32) if strided else order,
        "factor": factor,
        "gray": make.boolean(N, p=gray),
        "blur_sigma": torch.where(make.boolean(N, p=blur), make.uniform(N, low=0.1, high=2.0), 0.0),
        "solarize": torch.where(make.boolean(N, p=solarize), threshold, 256.0),
    }


def exact(**inputs: Any) -> Tensor:
    """The reference; its result stays float64 where the parameters are."""
    factor = inputs.get("factor")
    if factor is not None and factor.dtype == torch.float64:
        inputs["dtype"] = torch.float64
    return reference.photometric(**inputs)


def min_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    return nbytes(inputs["crops"], outputs)


def torchvision_each(crops: Tensor, mean: tuple, std: tuple, dtype: torch.dtype, **drawn: Tensor) -> Tensor:
    """torchvision.transforms.v2 on the GPU as its users have it: crop by crop, drawn anew, with DINO's mean chances."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(2 * reference.BLUR_RADIUS + 1, (0.1, 2.0))], 0.5),
            v2.RandomSolarize(128, 0.1),
            v2.ToDtype(dtype, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    return torch.stack([transform(crop) for crop in crops])


def torchvision_batch(crops: Tensor, mean: tuple, std: tuple, dtype: torch.dtype, **drawn: Tensor) -> Tensor:
    """Another augmentation, for scale: one jitter and one blur, drawn once, for all crops together."""
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.ColorJitter(0.4, 0.4, 0.2, 0.1),
            v2.GaussianBlur(2 * reference.BLUR_RADIUS + 1, (0.1, 2.0)),
            v2.ToDtype(dtype, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    return transform(crops)


# In float32 a value next to solarize's threshold may fall on the other side of it than in float64. Where the step there
# is wide (threshold 70), no crop is blurred: then no value comes near by chance. At 128 the step is 1 of 255 levels,
# at 127.5 none.
PROOF: dict[str, Case] = {
    "dino": {"N": 6, "size": (16, 64)},
    "everything": {
        "N": 3, "size": (33, 35), "jitter": 1.0, "blur": 1.0, "gray": 0.1, "solarize": 1.0, "threshold": 127.5,
    },
    "several programs per crop": {"N": 3, "size": (96, 64), "blur": 0.0, "gray": 0.0, "solarize": 0.0, "jitter": 1.0},
    "jitter": {"N": 12, "size": (9, 11), "jitter": 1.0, "blur": 0.0, "gray": 0.0, "solarize": 0.0},
    "blur": {"N": 2, "size": (18, 31), "jitter": 0.0, "blur": 1.0, "gray": 0.0, "solarize": 0.0},
    "a few pixels, blurred": {"N": 4, "size": (2, 5), "blur": 1.0, "threshold": 127.5},
    "one pixel": {"N": 5, "size": (1, 1), "threshold": 127.5},
    "solarize": {"N": 4, "size": (16, 16), "jitter": 0.0, "blur": 0.0, "solarize": 1.0, "threshold": 70.0},
    "strided": {"N": 3, "size": (17, 20), "strided": True, "threshold": 127.5},
    "nothing drawn": {"N": 3, "size": (24, 23), "drawn": False},
    "no crops": {"N": 0, "size": (8, 8)},
}  # fmt: skip

BENCH: dict[str, Case] = {
    "DINO global crops B=256, 2 x 224": {"N": 512, "size": (224, 224), "blur": 0.55},
    "DINO local crops B=256, 8 x 96": {"N": 2048, "size": (96, 96), "solarize": 0.0},
    "CAE's small view B=256, 112": {"N": 256, "size": (112, 112)},
    "normalise only B=256, 224": {"N": 256, "size": (224, 224), "drawn": False},
}

OPS = [
    Op(
        "photometric", photometric, exact, inputs, PROOF, BENCH, min_bytes,
        library={"torchvision v2, crop by crop": torchvision_each,
                 "torchvision v2, one draw per batch": torchvision_batch},
    )
]  # fmt: skip
