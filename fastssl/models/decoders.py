"""Decoders that paint masked patches from the visible ones."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.models.blocks import run_blocks, transformer_blocks
from fastssl.models.vit import sincos_positions


class MAEDecoder(nn.Module):
    """The light transformer decoder of He et al. 2022 (arXiv 2111.06377), section 3.

    Masked patches enter as one learned token plus their position. Attention does not care about the order of tokens
    (positions are added to them), so the masked ones stand behind the visible ones and nothing is sorted back; the last
    norm and the prediction are computed for them alone.

    Args:
        encoder_width: channels of the encoder's tokens (D).
        grid: (rows, columns) of patches of the image.
        outputs: values predicted per patch (P).
        width, depth, heads: the decoder's own tokens (d), blocks and attention heads.
    """

    def __init__(
        self, encoder_width: int, grid: tuple[int, int], outputs: int, *, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(width, *grid), requires_grad=False)
        self.blocks = transformer_blocks(width, depth, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        """Predicts the masked patches.

        Args:
            tokens: the encoder's output for the class token and the visible patches, [B, 1+K, D].
            keep: int64 [B, K], the visible patches, in the order of `tokens`.
            masked: int64 [B, M], the patches to predict.

        Returns:
            [B, M, P], in the order of `masked`.
        """
        place = self.pos_embed[0, 1:]
        x = self.embed(tokens)
        visible = x[:, 1:] + F.embedding(keep, place)
        hidden = self.mask_token + F.embedding(masked, place)
        x = torch.cat([x[:, :1], visible, hidden], dim=1)
        x = run_blocks(self.blocks, x, self.norm)
        return self.pred(x[:, -masked.shape[1] :].flatten(0, 1)).unflatten(0, masked.shape)


class PixelDecoder(nn.Module):
    """Paints an image from its patch tokens: a few linear layers, then one square of pixels per token (SiT).

    `convTrans` is a transposed convolution only in name: it holds the authors' keys and is applied as a matrix product.

    Args:
        width: channels of the tokens (D).
        patch_size: side of a patch, in pixels (p).
        layers: linear layers of width D, each followed by a GELU.
    """

    def __init__(self, width: int, patch_size: int, layers: int) -> None:
        super().__init__()
        pairs = [(nn.Linear(width, width), nn.GELU()) for _ in range(layers)]
        self.mlp = nn.Sequential(*(module for pair in pairs for module in pair))
        self.convTrans = nn.ConvTranspose2d(width, 3, patch_size, patch_size)
        for linear, _ in pairs:
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, N, D] of rows x columns patches, row by row -> images [B, 3, rows p, columns p]."""
        weight = self.convTrans.weight  # [D, 3, p, p]
        x = F.linear(self.mlp(tokens), weight.flatten(1).t()).unflatten(2, weight.shape[1:]).unflatten(1, grid)
        bias = cast(Tensor, self.convTrans.bias)[:, None, None]
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3) + bias
