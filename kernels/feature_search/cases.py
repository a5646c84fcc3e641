"""Cases of the feature search's ops: the stages of a ResNet-50, 8 local crops, 32 images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._spec import FP32, Case, Maker, Op, nbytes
from fastssl.kernels.feature_search import reference, residual_pool, scale_norm_relu, scaled_moments, search_maps


def feature(
    make: Maker, dtype: torch.dtype, B: int, C: int, side: tuple[int, int], layout: str, relu: bool = True
) -> Tensor:
    """[B, C, H, W]; layout "last" (channels innermost), "first" (contiguous), "sliced" (neither)."""
    x = make.normal(B, C, side[0], side[1] * (2 if layout == "sliced" else 1), dtype=dtype)
    x = x.relu() if relu else x
    if layout == "sliced":
        return x[..., ::2]
    return x.contiguous(memory_format=torch.channels_last) if layout == "last" else x


def maps(make: Maker, M: int, B: int, side: tuple[int, int], layout: str) -> Tensor:
    x = make.uniform(M, B, side[0], side[1] * (2 if layout == "sliced" else 1))
    return x[..., ::2] if layout == "sliced" else x


def search_inputs(make: Maker, dtype: torch.dtype, *, M: int, B: int, C: int, side, layout="last") -> dict[str, Any]:
    queries = make.normal(M, B, C * (2 if layout == "sliced" else 1), dtype=FP32).abs()
    return {
        "queries": queries[..., ::2] if layout == "sliced" else queries,
        "feature": feature(make, dtype, B, C, side, layout),
    }


def moments_inputs(make: Maker, dtype: torch.dtype, *, M: int, B: int, C: int, side, layout="last") -> dict[str, Any]:
    y = feature(make, dtype, B, C, side, layout, relu=False)
    return {"y": y, "maps": maps(make, M, B, side, layout)}


def norm_inputs(
    make: Maker, dtype: torch.dtype, *, M: int, B: int, C: int, side, layout="last", given: bool = False
) -> dict[str, Any]:
    statistics = {"mean": make.normal(C), "var": make.uniform(C, low=0.1, high=2.0)} if given else {}
    inputs = moments_inputs(make, dtype, M=M, B=B, C=C, side=side, layout=layout)
    return {**inputs, "weight": make.normal(C), "bias": make.normal(C), **statistics}


def pool_inputs(
    make: Maker, dtype: torch.dtype, *, M: int, B: int, C: int, side, layout="last", mixed: bool = False
) -> dict[str, Any]:
    other = "first" if mixed else layout
    return {
        "z": feature(make, dtype, M * B, C, side, layout, relu=False),
        "weight": make.normal(C),
        "bias": make.normal(C),
        "mean": make.normal(C),
        "var": make.uniform(C, low=0.1, high=2.0),
        "eps": 1e-5,
        "maps": maps(make, M, B, side, layout),
        "feature": feature(make, dtype, B, C, side, other),
    }


def norm_reference(
    y: Tensor, maps: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None = None, var: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if mean is None or var is None:
        mean, m2 = reference.scaled_moments(y, maps)
        var = m2 / max(maps.numel(), 1)
    return reference.scale_norm_relu(y, maps, weight, bias, 1e-5, mean, var), mean, var


def bmm(queries: Tensor, feature: Tensor) -> Tensor:
    keys = F.normalize(feature.flatten(2), dim=1)
    queries = F.normalize(queries, dim=2).to(keys.dtype)
    return torch.bmm(queries.transpose(0, 1), keys).transpose(0, 1).unflatten(2, feature.shape[2:])


def materialised(maps: Tensor, feature: Tensor) -> Tensor:
    dense = torch.contiguous_format if feature.is_contiguous() else torch.channels_last
    scaled = (maps.to(feature.dtype)[:, :, None] * feature).flatten(0, 1)
    return scaled.contiguous(memory_format=dense)


def var_mean(y: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    return torch.var_mean(materialised(maps, y), dim=(0, 2, 3), correction=0)


def batch_norm(y: Tensor, maps: Tensor, weight: Tensor, bias: Tensor, **statistics: Tensor) -> Tensor:
    mean, var = statistics.get("mean"), statistics.get("var")
    return F.batch_norm(materialised(maps, y), mean, var, weight, bias, training=not statistics).relu_()


def add_pool(
    z: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, maps: Tensor, feature: Tensor
) -> Tensor:
    scale = weight * (var + eps).rsqrt()
    shift = bias - mean * scale
    scale, shift = scale.to(z.dtype)[:, None, None], shift.to(z.dtype)[:, None, None]
    return torch.addcmul(shift, z, scale).add_(materialised(maps, feature)).relu_().mean(dim=(2, 3))


def all_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    return nbytes(inputs, outputs)


def search_flops(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    return 2 * outputs[0].numel() * inputs["feature"].shape[1]


PROOF: dict[str, Case] = {
    "one of everything": {"M": 1, "B": 1, "C": 1, "side": (1, 1)},
    "stage 4, small": {"M": 8, "B": 2, "C": 96, "side": (7, 7)},
    "off block": {"M": 3, "B": 2, "C": 70, "side": (5, 7), "layout": "first"},
    "several blocks": {"M": 9, "B": 1, "C": 130, "side": (9, 9)},
    "several blocks, contiguous": {"M": 2, "B": 2, "C": 67, "side": (12, 11), "layout": "first"},
    "strided": {"M": 2, "B": 3, "C": 20, "side": (4, 3), "layout": "sliced"},
    "no crops": {"M": 0, "B": 2, "C": 8, "side": (2, 2)},
    "no images": {"M": 2, "B": 0, "C": 8, "side": (2, 2)},
}

STAGES: dict[str, Case] = {
    "stage 2": {"M": 8, "B": 32, "C": 512, "side": (28, 28)},
    "stage 3": {"M": 8, "B": 32, "C": 1024, "side": (14, 14)},
    "stage 4": {"M": 8, "B": 32, "C": 2048, "side": (7, 7)},
    "stage 2, contiguous": {"M": 8, "B": 32, "C": 512, "side": (28, 28), "layout": "first"},
}
NARROW: dict[str, Case] = {name: {**case, "C": 256} for name, case in STAGES.items()}  # conv1's output


def op(
    call: Callable, expected: Callable, inputs: Callable, library: dict[str, Callable], *,
    bench: dict[str, Case] = STAGES, proof: dict[str, Case] | None = None, **options: Any,
) -> Op:  # fmt: skip
    """An op; `proof` adds to the common cases."""
    proof = PROOF | (proof or {})
    return Op(call.__name__, call, expected, inputs, proof, bench, all_bytes, library=library, **options)


OPS = [
    op(
        search_maps, reference.search_maps, search_inputs, {"F.normalize, bmm": bmm}, flops=search_flops,
        bench=STAGES | {"stage 4, contiguous": STAGES["stage 4"] | {"layout": "first"}},
        proof={
            "many positions": {"M": 2, "B": 1, "C": 5, "side": (23, 23)},
            "many crops, long queries": {"M": 33, "B": 1, "C": 300, "side": (3, 2)},
        },
    ),
    op(scaled_moments, reference.scaled_moments, moments_inputs, {"product, var_mean": var_mean}, bench=NARROW),
    op(
        scale_norm_relu, norm_reference, norm_inputs, {"product, F.batch_norm, relu": batch_norm}, bench=NARROW,
        proof={"given statistics": {"M": 3, "B": 2, "C": 9, "side": (3, 5), "given": True}},
    ),
    op(
        residual_pool, reference.residual_pool, pool_inputs, {"addcmul, product, relu, mean": add_pool},
        proof={"mixed formats": {"M": 2, "B": 2, "C": 12, "side": (6, 5), "mixed": True}},
    ),
]  # fmt: skip
