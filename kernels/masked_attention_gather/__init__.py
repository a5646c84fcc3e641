"""Kept tokens of masked models, taken out."""

from __future__ import annotations

from torch import Tensor

from fastssl.kernels._check import FLOATS, INTEGERS, Shapes, once
from fastssl.kernels._path import use_triton
from fastssl.kernels.masked_attention_gather import gather_reference

NAME = "gather_tokens"


def gather_tokens(tokens: Tensor, ids: Tensor, *, count: Tensor | None = None) -> Tensor:
    """The kept tokens (He et al. 2022, section 3: the encoder's input).

        for b in range(B):
            for k in range(K):  # or count[b]; zeros from there on
                out[b, k] = tokens[b, ids[b, k]]

    Args:
        tokens: [B, N, D], float32, float16 or bfloat16.
        ids: int32 or int64 [B, K], the patches kept, in any order; those of one row differ.
        count: int32 or int64 [B]; only the first count[b] ids count, what stands behind them is never used. None: all.

    Returns:
        [B, K, D], the tokens' type. A gradient flows to the tokens.

    Raises:
        KernelError: a shape or type that does not fit.
    """
    _check(tokens, ids, count)
    if use_triton(NAME, tokens) and tokens.dtype in FLOATS[:3]:
        from fastssl.kernels.masked_attention_gather import gather_kernel

        return gather_kernel.gather(tokens, ids, count)
    return gather_reference.gather_tokens(tokens, ids, count=count)


@once
def _check(tokens: Tensor, ids: Tensor, count: Tensor | None) -> None:
    shapes = Shapes(NAME)
    shapes("tokens", tokens, "B N D")
    shapes("ids", ids, "B K", INTEGERS)
    if count is not None:
        shapes("count", count, "B", INTEGERS)
