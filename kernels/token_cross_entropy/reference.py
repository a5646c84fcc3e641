"""Linear head and cross-entropy over a codebook in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._exact import exact


@exact
def token_cross_entropy(tokens: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """See `fastssl.kernels.token_cross_entropy.token_cross_entropy`; all logits at once."""
    exact = torch.promote_types(tokens.dtype, torch.float32)
    logits = F.linear(tokens.to(exact), weight.to(exact), None if bias is None else bias.to(exact))
    labels = labels.long()
    counted = labels != -1
    wrong = (labels < -1) | (labels >= logits.shape[1])
    target = labels.clamp(0, logits.shape[1] - 1)
    losses = logits.logsumexp(1) - logits.gather(1, target[:, None])[:, 0]
    losses = torch.where(counted, losses * torch.where(wrong, torch.nan, 1.0), 0)
    hits = counted & (logits.detach().argmax(1) == labels)
    count = counted.sum().clamp_min(1)
    return losses.sum() / count, hits.sum().to(exact) / count
