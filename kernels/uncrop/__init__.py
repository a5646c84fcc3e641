"""Un-crop: code maps of crops pasted back to where the crops lay in the whole image, in one pass over the canvas."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.kernels._check import INTEGERS, Shapes, check, once
from fastssl.kernels._path import use_triton
from fastssl.kernels.uncrop import reference

NAME = "uncrop"


def uncrop(
    codes: Tensor,
    mask_code: Tensor,
    box: Tensor,
    flip: Tensor,
    *,
    grid: int | tuple[int, int],
    flip_axis: str = "width",
) -> Tensor:
    """Each view's code map, resized to its crop's box on a canvas of mask codes (SAAE, Wang et al. 2022, "un-crop").

        for v in range(V):
            top, left, height, width = box[v]
            q = codes[v] as [rows, columns, C], mirrored if flip[v]
            canvas[v] = mask_code in all cells
            canvas[v, top : top + height, left : left + width] = bilinear resize of q to height x width cells
        # bilinear per axis, n cells from size: cell i lies at x = max(0, (i + 1/2) size / n - 1/2), between cells
        # floor(x) and floor(x) + 1 (align_corners false, no antialiasing); n = size copies the map

    Args:
        codes: [V, rows columns, C], V views (crops x samples), cells in row-major order.
        mask_code: [C], the code of cells that the crop did not see; may have another type (it is cast to the codes').
        box: int32 or int64 [V, 4], (top, left, height, width) in cells; it must lie inside the grid (not checked, the
            device would have to be waited for). `cells` makes it from pixels.
        flip: bool [V], whether the crop was mirrored.
        grid: cells per side, or (rows, columns), of the code maps and of the canvas.
        flip_axis: "width" undoes the mirroring; "channel" reverses the channels instead, as the authors' code does.

    Returns:
        Canvas [V, rows columns, C], the codes' type, contiguous. Gradients flow to codes and mask_code.

    Raises:
        KernelError: a shape or type that does not fit.
    """
    rows, columns = _check(codes, mask_code, box, flip, grid, flip_axis)
    if use_triton(NAME, codes) and torch.float64 not in (codes.dtype, mask_code.dtype):
        from fastssl.kernels.uncrop import kernel

        return kernel.forward(codes, mask_code, box, flip, rows, columns, flip_axis == "channel")
    return reference.uncrop(codes, mask_code, box, flip, (rows, columns), flip_axis)


@once
def _check(
    codes: Tensor, mask_code: Tensor, box: Tensor, flip: Tensor, grid: int | tuple[int, int], flip_axis: str
) -> tuple[int, int]:
    rows, columns = _sides(NAME, grid)
    shapes = Shapes(NAME)
    _, number, _ = shapes("codes", codes, "V S C")
    check(number == rows * columns, NAME, "codes", f"[V, {rows * columns}, C]", list(codes.shape))
    shapes("mask_code", mask_code, "C")
    shapes("box", box, "V 4", INTEGERS)
    shapes("flip", flip, "V", (torch.bool,))
    check(flip_axis in ("width", "channel"), NAME, "flip_axis", "'width' or 'channel'", repr(flip_axis))
    return rows, columns


def cells(box: Tensor, patch_size: int) -> Tensor:
    """Pixel boxes in cells, rounded down to whole ones as the authors do; at least one cell per side.

    Args:
        box: int32 or int64 [V, 4], (top, left, height, width) in pixels of the squashed image.
        patch_size: pixels per cell.

    Returns:
        [V, 4], (top, left, height, width) in cells, same type.

    Raises:
        KernelError: another shape or type.
    """
    Shapes("cells")("box", box, "V 4", INTEGERS)
    first = box[:, :2] // patch_size
    last = (box[:, :2] + box[:, 2:]) // patch_size
    return torch.cat([first, (last - first).clamp_min(1)], dim=1)


def unseen(box: Tensor, *, grid: int | tuple[int, int]) -> Tensor:
    """Which cells of the canvas the crop did not see.

    Args:
        box: int32 or int64 [V, 4], (top, left, height, width) in cells.
        grid: cells per side, or (rows, columns).

    Returns:
        bool [V, rows columns].

    Raises:
        KernelError: another shape or type.
    """
    Shapes("unseen")("box", box, "V 4", INTEGERS)
    return ~reference.seen(box, *_sides("unseen", grid)).flatten(1)


def _sides(op: str, grid: int | tuple[int, int]) -> tuple[int, int]:
    rows, columns = reference.sides(grid)
    check(rows > 0 and columns > 0, op, "grid", "positive numbers", grid)
    return rows, columns
