"""Cases of token_cross_entropy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._spec import FP32, Case, Maker, Op, nbytes
from fastssl.kernels.token_cross_entropy import reference, token_cross_entropy


def inputs(
    make: Maker,
    dtype: torch.dtype,
    *,
    T: int,
    D: int,
    K: int,
    bias: bool = True,
    ignored: float = 0.0,
    size: float = 1.0,
    strided: bool = False,
    parameters: torch.dtype | None = None,
) -> dict[str, Any]:
    tokens = make.normal(T, 2 * D if strided else D, dtype=dtype)
    weight = make.normal(*((D, K) if strided else (K, D)), dtype=parameters or dtype, scale=size * max(1, D) ** -0.5)
    labels = torch.where(make.boolean(T, p=ignored), -1, make.integers(T, high=K))
    wide_labels = labels.to(torch.int32).repeat_interleave(2)
    return {
        "tokens": tokens[:, ::2] if strided else tokens,
        "weight": weight.t() if strided else weight,
        "bias": make.normal(K, dtype=parameters or dtype, scale=0.5) if bias else None,
        "labels": wide_labels[::2] if strided else labels,
    }


def min_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    read = nbytes(inputs["tokens"], inputs["weight"])
    return 2 * read + nbytes(inputs["bias"]) if backward else read + nbytes(inputs["bias"], inputs["labels"])


def flops(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    (tokens, width), classes = inputs["tokens"].shape, len(inputs["weight"])
    return (4 if backward else 2) * tokens * width * classes


def cross_entropy(tokens: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """All logits in the inputs' type, their float32 copy, and its log-softmax."""
    return F.cross_entropy(F.linear(tokens, weight, bias).float(), labels, ignore_index=-1)


def chunked_by_torch(tokens: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """PyTorch's own fused loss, chunked as it chooses."""
    return F.linear_cross_entropy(
        tokens, weight, labels, linear_bias=bias, ignore_index=-1, options=torch.nn.LinearCrossEntropyOptions()
    )


LIBRARY = {"F.linear, F.cross_entropy": cross_entropy}
if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
    LIBRARY["F.linear_cross_entropy, chunked"] = chunked_by_torch

PROOF: dict[str, Case] = {
    "cae": {"T": 37, "D": 24, "K": 200},
    "ragged": {"T": 37, "D": 16, "K": 130, "ignored": 0.3},
    "no bias": {"T": 9, "D": 8, "K": 65, "bias": False},
    "long rows": {"T": 11, "D": 8, "K": 9300, "ignored": 0.2},
    "long rows, no bias": {"T": 3, "D": 4, "K": 8193, "bias": False},
    "one token, one code": {"T": 1, "D": 1, "K": 1},
    "one value too many": {"T": 17, "D": 5, "K": 257},
    "large logits": {"T": 12, "D": 32, "K": 100, "size": 20.0},
    "strided": {"T": 13, "D": 16, "K": 48, "strided": True},
    "float32 parameters": {"T": 20, "D": 16, "K": 40, "parameters": FP32},
    "nothing counts": {"T": 6, "D": 4, "K": 9, "ignored": 2.0},
    "no tokens": {"T": 0, "D": 4, "K": 9},
}

BENCH: dict[str, Case] = {
    "CAE-B T=6272 D=768 K=8192": {"T": 6272, "D": 768, "K": 8192},
    "CAE-L T=6272 D=1024 K=8192, no bias": {"T": 6272, "D": 1024, "K": 8192, "bias": False},
    "T=4096 D=768 K=65536": {"T": 4096, "D": 768, "K": 65536},
}

OPS = [
    Op(
        "token_cross_entropy", token_cross_entropy, reference.token_cross_entropy, inputs, PROOF, BENCH, min_bytes,
        flops, ("tokens", "weight", "bias"), library=LIBRARY,
        tolerance={FP32: (1e-5, 5e-5)},  # sums over all codes in float32, one after the other in some libraries
    )
]  # fmt: skip
