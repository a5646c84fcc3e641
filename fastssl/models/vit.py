"""One vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) for every method.

It takes images of any size that the patch divides, and can be told which patches to look at. Its state dict has timm's
keys, so weights move between the two as they are.

Letters: B images, N patches of the image, K kept patches, D width, G side of the position table's grid.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.config import ConfigError
from fastssl.kernels.masked_attention_gather import gather_tokens
from fastssl.models.blocks import (
    Block,
    Drop,
    apart,
    last_norms,
    run_blocks,
    run_groups,
    transformer_blocks,
    working_type,
)


class ViT(nn.Module):
    """Pre-norm transformer over square patches and a class token.

    Args:
        width: channels of a token (D).
        depth: number of blocks.
        heads: attention heads per block.
        patch_size: side of a patch, in pixels.
        image_size: side of the image for which the position table is made, in pixels.
        positions: "learned" (trained table), "sincos" or "sincos_rows" (fixed 2-D sine-cosine table,
            `sincos_positions`, with the column or the row in the first half of the channels).
        resample: how the table is brought to another grid, see `resampling`.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        layer_scale: start value of the layer scale (`Block`). 0: none.

    Attributes:
        width, patch_size, num_blocks: as above.
        memory_format: how its weights are best laid out.
        grid: (rows, columns) of patches for which the position table is made.
    """

    memory_format = torch.contiguous_format

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        patch_size: int = 16,
        image_size: int = 224,
        positions: str = "learned",
        resample: str = "plain",
        drop_path: float = 0.0,
        layer_scale: float = 0.0,
    ) -> None:
        super().__init__()
        self.width = width
        self.patch_size = patch_size
        self.num_blocks = depth
        self.resample = resample
        side = image_size // patch_size
        self.grid = (side, side)

        # A convolution only in name: it holds timm's keys, `embed` applies it as one matrix product.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        else:
            table = sincos_positions(width, *self.grid, rows_first=positions == "sincos_rows")
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = transformer_blocks(width, depth, heads, drop_path, layer_scale)
        self.norm = nn.LayerNorm(width, eps=1e-6)

        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed.requires_grad:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def compile_parts(self) -> list[nn.Module]:
        """What torch.compile takes piece by piece: the blocks."""
        return list(self.blocks)

    def positions(self, rows: int, columns: int) -> Tensor:
        """The position table for a grid of rows x columns patches, [1, 1+N, D]; resampled if it is not its own."""
        return resample_positions(self.pos_embed, self.grid, (rows, columns), self.resample)

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Class token and (kept) patches with their positions, before the first block: [B, 1+N, D] or [B, 1+K, D]."""
        rows, columns = patch_grid(images, self.patch_size)
        table = self.positions(rows, columns)
        projection = cast(nn.Conv2d, self.patch_embed["proj"])
        weight = projection.weight.flatten(1)
        patches = cut_patches(images, self.patch_size, working_type(images, weight))  # [B, N, 3 p p]
        if keep is not None:
            patches = gather_tokens(patches, keep)  # [B, K, 3 p p]
        tokens = F.linear(patches, weight, projection.bias)
        if keep is None:
            return torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], dim=1) + table
        first = (self.cls_token + table[:, :1]).expand(len(images), -1, -1)
        return torch.cat([first, tokens + F.embedding(keep, table[0, 1:])], dim=1)

    def tokens(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        drop: Drop | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """All output tokens, after the final norm.

        Args:
            images: float [B, 3, H, W], H and W multiples of the patch side.
            keep: int64 [B, K], the patches to look at (row-major ids 0..N-1), in any order. None: all.
            drop: what stochastic depth is drawn from in training. None: PyTorch's generator.
            dtype: of the result, see `run_blocks`.

        Returns:
            [B, 1+N, D], or [B, 1+K, D] in the order of `keep`; the class token first.
        """
        return run_blocks(self.blocks, self.embed(images, keep), self.norm, drop, dtype)

    def forward(self, images: Tensor, drop: Drop | None = None) -> Tensor:
        """The class token after the final norm, [B, D]; see `tokens`."""
        return self.tokens(images, drop=drop)[:, 0]

    def groups(self, images: Sequence[Tensor], drops: Sequence[Drop | None]) -> list[Tensor]:
        """Class tokens of images of several sizes, which pass the blocks together.

        Args:
            images: per size [B, 3, H, W].
            drops: what stochastic depth is drawn from, per size.

        Returns:
            Per size what `forward` gives, [B, D].
        """
        if len(images) == 1:
            return [self(images[0], drops[0])]
        embedded = [self.embed(x) for x in images]
        sizes = tuple((len(x), x.shape[1]) for x in embedded)
        packed = torch.cat([x.flatten(0, 1) for x in embedded])[:, None]  # [T, 1, D]
        tokens = run_groups(self.blocks, packed, self.norm, sizes, drops)
        return [part[:, 0] for part in apart(tokens, sizes)]

    def intermediate(self, images: Tensor, n: int) -> list[Tensor]:
        """Tokens after each of the last `n` blocks, every one passed through the final norm: n times [B, 1+N, D]."""
        if not 1 <= n <= self.num_blocks:
            raise ConfigError(f"features of the last {n} blocks were asked for; this model has {self.num_blocks}")
        x = self.embed(images)
        return last_norms(self.blocks, x, self.norm, n, dtype=x.dtype)

    def class_attention(self, images: Tensor) -> Tensor:
        """How the class token's attention of the last block is shared out, for every head: [B, 3, H, W] ->
        [B, heads, rows, columns], without the share that the class token keeps for itself."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        weights = cast(Block, self.blocks[-1]).class_attention(x)
        return weights.unflatten(2, patch_grid(images, self.patch_size))

    def represent(self, images: Tensor, blocks: int = 1, mean_patch: bool = False) -> Tensor:
        """The image's feature for evaluation (Caron et al. 2021, appendix F.2).

        Args:
            images: float [B, 3, H, W].
            blocks: the class tokens of so many last blocks are concatenated.
            mean_patch: append the mean of the last block's patch tokens.

        Returns:
            [B, (blocks + mean_patch) D].
        """
        outputs = self.intermediate(images, blocks)
        parts = [tokens[:, 0] for tokens in outputs]
        if mean_patch:
            parts.append(outputs[-1][:, 1:].mean(dim=1))
        return torch.cat(parts, dim=-1)


def resample_positions(table: Tensor, grid: tuple[int, int], new: tuple[int, int], rule: str) -> Tensor:
    """A position table for another grid of patches, by the rule of `resampling`.

    Two matrix products, because the backward pass of PyTorch's bicubic interpolation adds in any order on a GPU.

    Args:
        table: [1, 1+N, D], the class token's row first.
        grid: rows and columns of its N cells.
        new: rows and columns wanted.

    Returns:
        [1, 1 + rows x columns, D]; the table itself where the grids are the same.
    """
    if new == grid:
        return table
    first, cells = table.split([1, grid[0] * grid[1]], dim=1)
    down, across = (
        resampling(old, size, rule, table.device).to(table.dtype) for old, size in zip(grid, new, strict=True)
    )
    with torch.autocast(table.device.type, enabled=False):
        cells = (down @ cells.view(grid[0], -1)).view(new[0], grid[1], -1)  # [rows, G, D]
        cells = torch.matmul(across, cells)  # [rows, columns, D]
    return torch.cat([first, cells.flatten(0, 1)[None]], dim=1)


@functools.lru_cache(maxsize=256)
def resampling(cells: int, size: int, rule: str, device: torch.device) -> Tensor:
    """The weights of a bicubic resize of `cells` values to `size` values, along one axis.

    Args:
        rule: "plain", torch's own with half-pixel centres (MAE, CAE); "dino", whose scale is (size + 0.1) / cells
            (DINO's code and what is built on it); "antialiased" (timm).

    Returns:
        float32 [size, cells].
    """
    with torch.inference_mode(False), torch.no_grad():
        each = torch.eye(cells)[None, None]  # column j is the unit of cell j
        if rule == "dino":
            made = F.interpolate(each, scale_factor=((size + 0.1) / cells, 1.0), mode="bicubic")
        else:
            made = F.interpolate(each, size=(size, cells), mode="bicubic", antialias=rule == "antialiased")
        return made[0, 0].to(device)


def sincos_positions(width: int, rows: int, columns: int, rows_first: bool = False) -> Tensor:
    """Fixed 2-D sine-cosine position table with a zero row for the class token (He et al. 2022, as released with MAE).

    The first half of the channels encodes the column c, the second half the row; each half is
    [sin(c w_0), .., cos(c w_0), ..] with w_k = 10000^(-k / (width / 4)), k = 0 .. width/4 - 1.

    Args:
        rows_first: the first half encodes the row, the second half the column (CAE).

    Returns:
        float32 [1, 1 + rows x columns, width].

    Raises:
        ConfigError: width is not a multiple of 4.
    """
    if width % 4:
        raise ConfigError(f"a sine-cosine position table needs a width that is a multiple of 4, not {width}")
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [coordinate.reshape(-1, 1) * omega for coordinate in ((row, column) if rows_first else (column, row))]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table])[None].float()


def patch_grid(images: Tensor, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches of images [B, 3, H, W]; ConfigError if the patch does not divide H and W."""
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ConfigError(
            f"images are {height} x {width} pixels; both sides must be multiples of the patch's side, {patch_size}"
        )
    return height // patch_size, width // patch_size


def cut_patches(images: Tensor, patch_size: int, dtype: torch.dtype | None = None) -> Tensor:
    """[B, 3, H, W] -> [B, N, 3 p p]: patches in row-major order, values in the order channel, row, column.

    Args:
        dtype: of the result. None: that of the images.
    """
    rows, columns = patch_grid(images, patch_size)
    x = images.unflatten(2, (rows, patch_size)).unflatten(4, (columns, patch_size))  # [B, 3, rows, p, columns, p]
    x = x.permute(0, 2, 4, 1, 3, 5)
    x = x.to(dtype or x.dtype, memory_format=torch.contiguous_format)  # moves the values too if it casts them
    return x.flatten(3).flatten(1, 2)


def join_patches(patches: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `cut_patches`: [B, N, 3 p p] -> [B, 3, H, W]."""
    side = math.isqrt(patches.shape[2] // 3)
    cells = patches.view(-1, rows, columns, 3, side, side)
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def xavier_init_(module: nn.Module) -> None:
    """Initialises as MAE does: linear layers and the patch projection Xavier-uniform, biases of linear layers 0,
    class and mask tokens normal with standard deviation 0.02."""
    for name, parameter in module.named_parameters():
        if name.endswith(("cls_token", "mask_token")):
            nn.init.normal_(parameter, std=0.02)
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)
        elif isinstance(child, ViT):
            nn.init.xavier_uniform_(cast(nn.Conv2d, child.patch_embed["proj"]).weight.flatten(1))
