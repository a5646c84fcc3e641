"""Un-crop in plain PyTorch: the resize is separable, so each view is two small matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.kernels._exact import exact


@exact
def uncrop(
    codes: Tensor, mask_code: Tensor, box: Tensor, flip: Tensor, grid: int | tuple[int, int], flip_axis: str = "width"
) -> Tensor:
    """See `fastssl.kernels.uncrop.uncrop`."""
    exact = torch.promote_types(torch.promote_types(codes.dtype, mask_code.dtype), torch.float32)
    rows, columns = sides(grid)
    q = codes.to(exact).unflatten(1, (rows, columns))  # [V, rows, columns, C]
    axis = 2 if flip_axis == "width" else 3
    q = torch.where(flip[:, None, None, None], q.flip(axis), q)
    top, left, height, width = box.unbind(1)
    vertical, horizontal = matrices(top, height, rows, exact), matrices(left, width, columns, exact)
    painted = torch.einsum("vrs,vsxc->vrxc", vertical, q)
    painted = torch.einsum("vyx,vrxc->vryc", horizontal, painted)
    inside = seen(box, rows, columns)[..., None]
    return torch.where(inside, painted, mask_code.to(exact)).to(codes.dtype).flatten(1, 2)


def sides(grid: int | tuple[int, int]) -> tuple[int, int]:
    """(rows, columns)."""
    return (grid, grid) if isinstance(grid, int) else grid


def matrices(first: Tensor, n: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Per view the matrix [canvas cell, map cell] of the bilinear resize of `size` cells to the n from `first` on."""
    i = torch.arange(size, device=first.device)
    n = n[:, None]
    place = i - first[:, None]  # [V, canvas cell], counted from the box's first cell
    x = (((2 * place + 1) * size - n).clamp_min(0).to(dtype) / (2 * n)).clamp_max(size - 1)
    weight = (1 - (x[:, :, None] - i).abs()).clamp_min(0)
    return torch.where(((place >= 0) & (place < n))[:, :, None], weight, 0)


def seen(box: Tensor, rows: int, columns: int) -> Tensor:
    """Which canvas cells lie inside the box: bool [V, rows, columns]."""
    place = (
        torch.arange(max(rows, columns), device=box.device) - box[:, :2, None]
    )  # [V, 2, cells], from the box's first
    inside = (place >= 0) & (place < box[:, 2:, None])
    return inside[:, 0, :rows, None] & inside[:, 1, None, :columns]
