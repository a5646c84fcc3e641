"""Linear head and cross-entropy over a codebook, a chunk of tokens at a time: the logits of all tokens never exist."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.kernels._check import FLOATS, INTEGERS, Shapes, check, once
from fastssl.kernels._path import use_triton
from fastssl.kernels.token_cross_entropy import reference

NAME = "token_cross_entropy"


class TokenCrossEntropy(NamedTuple):
    """What one pass over the tokens gives.

    Attributes:
        loss: scalar, nats per counted token; the only part with a gradient.
        accuracy: scalar, share of the counted tokens whose largest logit (the first of equal ones) is the label's.
    """

    loss: Tensor
    accuracy: Tensor


def token_cross_entropy(tokens: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> TokenCrossEntropy:
    """Mean cross-entropy of a linear head over K codes (CAE: Chen et al. 2022, the loss over visual codes).

        for t in range(T):
            if labels[t] != -1:
                logits = weight @ tokens[t] + bias
                loss += logsumexp(logits) - logits[labels[t]]
                accuracy += argmax(logits) == labels[t]
        loss, accuracy = loss / count, accuracy / count  # both 0 if no token counts

    Logits and all sums are float32 for every type of the inputs; only the logits' gradients are rounded to the tokens'
    type, for the matrix products. Rounding the logits as well would move 4 bytes of 14 less per logit, but a bfloat16
    logit of 20 is off by up to 0.06 and its probability by 6 %. Products of float32 inputs follow PyTorch's float32
    matmul precision. At most 128 MiB of logits exist at once (more only from 262144 codes on).

    Gradients that are wanted are computed along with the loss, in float32, and only scaled by the backward pass: one
    matrix product less than computing the logits twice. Gradients of gradients are not available.

    Args:
        tokens: [T, D], float32, float16 or bfloat16.
        weight: [K, D], the tokens' type, or float32 (then rounded for the products, as autocast does; its gradient
            stays float32).
        bias: [K], the tokens' type or float32. None: no bias.
        labels: int32 or int64 [T], from 0 to K - 1, or -1 for a token that does not count. Any other label makes the
            loss and the gradients NaN; nothing outside the tensors is read.

    Returns:
        TokenCrossEntropy, both float32 (float64 for float64 tokens).

    Raises:
        KernelError: a shape or type that does not fit.
    """
    _check(tokens, weight, bias, labels)
    if use_triton(NAME, tokens) and tokens.dtype in FLOATS[:3]:
        from fastssl.kernels.token_cross_entropy import kernel

        grad = torch.is_grad_enabled()
        wanted = [grad and x is not None and x.requires_grad for x in (tokens, weight, bias)]
        return TokenCrossEntropy(*kernel.forward(tokens, weight, bias, labels, *wanted)[:2])
    return TokenCrossEntropy(*reference.token_cross_entropy(tokens, weight, bias, labels))


@once
def _check(tokens: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> None:
    shapes = Shapes(NAME)
    shapes("tokens", tokens, "T D")
    wide = (tokens.dtype,) if tokens.dtype in (torch.float32, torch.float64) else (tokens.dtype, torch.float32)
    shapes("weight", weight, "K D", wide)
    if bias is not None:
        shapes("bias", bias, "K", wide)
    shapes("labels", labels, "T", INTEGERS)
    check(weight.shape[0] > 0, NAME, "weight", "[K, D] with K of at least 1", list(weight.shape))
