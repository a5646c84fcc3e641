"""Which patches of an image are hidden: masks made on the device, each a pure function of (seed, epoch, sample id).

Letters: B images, N patches per image, K kept patches, M = N - K masked patches.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from fastssl.config import ConfigError

LOW = 0xFFFFFFFF


def random_mask(ids: Tensor, num_patches: int, ratio: float, *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Uniform random masking (He et al., "Masked autoencoders are scalable vision learners", CVPR 2022).

    An image's mask does not depend on the other images of the batch.

    Args:
        ids: int64 [B], sample ids, below 2^32.
        num_patches: N, below 2^20.
        ratio: share of masked patches, from 0 to less than 1.
        seed, epoch: 32-bit numbers.

    Returns:
        Indices of the kept patches int64 [B, K] and of the masked ones int64 [B, M], ascending, on the device of `ids`.

    Raises:
        ValueError: the ratio is outside its range, or leaves no patch.
    """
    keep = kept_patches(num_patches, ratio)
    blocks = torch.arange((num_patches + 3) // 4, device=ids.device)
    words = philox((ids[:, None], epoch, 0, blocks), (seed, zlib.crc32(b"mask")))
    scores = torch.stack(words, dim=-1).flatten(1)[:, :num_patches]
    patches = (scores << 20 | torch.arange(num_patches, device=ids.device)).sort(dim=1).values & 0xFFFFF
    return patches[:, :keep].sort(dim=1).values, patches[:, keep:].sort(dim=1).values


def kept_patches(num_patches: int, ratio: float) -> int:
    """K = floor(N (1 - ratio)), as if the decimal `ratio` were exact: 10 of 100 at 0.9, not 9.

    Raises:
        ValueError: the ratio is outside [0, 1), or leaves no patch.
    """
    keep = int(num_patches * (1 - ratio) + 1e-6) if 0 <= ratio < 1 else 0
    if keep < 1:
        raise ConfigError(f"mask ratio {ratio} keeps none of {num_patches} patches; it must be from 0 to less than 1")
    return keep


def philox(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on the device: the words of `fastssl.loaders.philox`, as int64 tensors.

    Args:
        counter: four 32-bit numbers or int64 tensors of them that broadcast together; at least one tensor.
        key: two 32-bit numbers.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The products need 64 bits: int64 wraps, and the mask takes the sign extension off the upper half.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32 & LOW) ^ c1 ^ k0, p1 & LOW
        c2, c3 = (p0 >> 32 & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return torch.broadcast_tensors(c0, c1, c2, c3)
