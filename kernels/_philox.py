"""Random words on the device: a function of counters and a key, so they do not depend on the order of the calls."""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words, the same as `fastssl.loaders.philox` has them.

    Args:
        counter: four numbers or int64 tensors that broadcast together, at least one of them a tensor; the lower 32
            bits of each count.
        key: two numbers, likewise.

    Returns:
        Four int64 tensors of the counters' common shape, from 0 to 2^32 - 1.
    """
    c0, c1, c2, c3 = (c & LOW for c in counter)
    k0, k1 = (k & LOW for k in key)
    for _ in range(10):
        # The products need 64 bits: int64 wraps, and the mask takes the sign extension off the upper half.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32 & LOW) ^ c1 ^ k0, p1 & LOW
        c2, c3 = (p0 >> 32 & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return torch.broadcast_tensors(c0, c1, c2, c3)
