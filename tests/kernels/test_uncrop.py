"""Un-crop: against the float64 reference, the authors' resize-and-paste loop, and the card's known values."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels.uncrop import cells, uncrop, unseen


def boxes(V, rows, columns, device, seed=0):
    """Random boxes inside the grid, all sizes alike."""
    g = torch.Generator().manual_seed(seed)
    height, width = torch.randint(1, rows + 1, (V,), generator=g), torch.randint(1, columns + 1, (V,), generator=g)
    top = (torch.rand(V, generator=g) * (rows - height + 1)).long()
    left = (torch.rand(V, generator=g) * (columns - width + 1)).long()
    return torch.stack([top, left, height, width], 1).to(device), (torch.rand(V, generator=g) < 0.5).to(device)


def pasted(codes, mask_code, box, flip, rows, columns, flip_axis="width"):
    """The authors' loop: resize each map to its box and paste it."""
    canvases = []
    for q, (top, left, height, width), mirrored in zip(codes, box.tolist(), flip.tolist(), strict=True):
        q = q.view(rows, columns, -1)
        if mirrored:
            q = q.flip(1 if flip_axis == "width" else 2)
        small = F.interpolate(q.permute(2, 0, 1)[None], size=(height, width), mode="bilinear", align_corners=False)[0]
        canvas = mask_code.expand(rows, columns, -1).clone()
        canvas[top : top + height, left : left + width] = small.permute(1, 2, 0)
        canvases.append(canvas.flatten(0, 1))
    return torch.stack(canvases)


@pytest.mark.parametrize(
    ("V", "rows", "columns", "flip_axis"), [(1000, 14, 14, "width"), (200, 9, 6, "width"), (200, 7, 7, "channel")]
)
def test_equals_resize_and_paste(path, V, rows, columns, flip_axis, device):
    """SAAE card, oracle 10: random boxes, values and gradients. The interpreter, being slow, takes a twentieth."""
    torch.manual_seed(0)
    if (path, device) == ("triton", "cpu"):
        V = V // 20
    box, flip = boxes(V, rows, columns, device)
    codes = torch.randn(V, rows * columns, 3, device=device, requires_grad=True)
    mask_code = torch.randn(3, device=device, requires_grad=True)
    upstream = torch.randn(V, rows * columns, 3, device=device)
    expected = pasted(codes, mask_code, box, flip, rows, columns, flip_axis)
    slopes = torch.autograd.grad(expected, (codes, mask_code), upstream)
    with forced(path):
        canvas = uncrop(codes, mask_code, box, flip, grid=(rows, columns), flip_axis=flip_axis)
        got = torch.autograd.grad(canvas, (codes, mask_code), upstream)
    torch.testing.assert_close(canvas, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(got[0], slopes[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], slopes[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("flip_axis", ["width", "channel"])
@pytest.mark.parametrize("grid", [(14, 14), (41, 49)])
def test_whole_frame_is_a_copy(path, flip_axis, grid, device):
    """SAAE card, oracles 2 and 9: bitwise; the mask code gets no gradient. (49 is a number with n (1 / n) < 1.)"""
    codes = torch.randn(2, grid[0] * grid[1], 4, device=device)
    mask_code = torch.randn(4, device=device, requires_grad=True)
    box, flip = torch.tensor([[0, 0, *grid]] * 2, device=device), torch.tensor([False, True], device=device)
    with forced(path):
        canvas = uncrop(codes, mask_code, box, flip, grid=grid, flip_axis=flip_axis)
    maps = codes.view(2, *grid, 4)
    assert torch.equal(canvas[0], codes[0])
    assert torch.equal(canvas[1], maps[1].flip(1 if flip_axis == "width" else 2).flatten(0, 1))
    assert not torch.equal(canvas[1], maps[1].flip(2 if flip_axis == "width" else 1).flatten(0, 1))
    assert (torch.autograd.grad(canvas.sum(), mask_code)[0] == 0).all()
    assert not unseen(box, grid=grid).any()


def test_cells_outside_hold_the_mask_code_and_small_boxes_skip_rows(path, device):
    """Card, section 4: a box of 4 cells reads 8 of 14 rows."""
    codes = torch.randn(1, 196, 4, device=device, requires_grad=True)
    mask_code = torch.randn(4, device=device)
    box, flip = torch.tensor([[3, 0, 4, 14]], device=device), torch.tensor([False], device=device)
    with forced(path):
        canvas = uncrop(codes, mask_code, box, flip, grid=14)
    outside = unseen(box, grid=14)
    assert outside.sum() == 10 * 14
    assert outside.view(14, 14)[[2, 7]].all()
    assert not outside.view(14, 14)[3:7].any()
    assert torch.equal(canvas[outside], mask_code.expand(140, 4))
    (slope,) = torch.autograd.grad(canvas.sum(), codes)
    assert (slope.view(14, 14, 4) != 0).any(2).any(1).sum() == 8
    torch.testing.assert_close(slope.sum(1), torch.full((1, 4), 4.0 * 14, device=device))


def test_pixels_become_cells():
    """SAAE card, oracle 1, and every position of a 224-pixel frame."""
    assert cells(torch.tensor([[16, 48, 150, 100]]), 16).tolist() == [[1, 3, 9, 6]]
    assert (~unseen(torch.tensor([[1, 3, 9, 6]]), grid=14)).sum() == 54
    assert cells(torch.tensor([[3, 5, 7, 9], [223, 208, 1, 16]], dtype=torch.int32), 16).tolist() == [
        [0, 0, 1, 1],
        [13, 13, 1, 1],
    ]
    x = torch.arange(224)
    got = cells(torch.stack([x, x, 224 - x, 224 - x], 1), 16)
    assert torch.equal(got[:, 0], (14 * (x.float() / 224)).long())
    assert torch.equal(got[:, 2], 14 - x // 16)
    assert got.dtype == torch.int64


def test_mask_code_keeps_its_type_and_codes_may_be_a_slice(path, device):
    tokens = torch.randn(3, 10, 6, device=device, dtype=torch.bfloat16, requires_grad=True)
    mask_code = torch.randn(6, device=device, requires_grad=True)
    box, flip = boxes(3, 3, 3, device)
    with forced(path):
        canvas = uncrop(tokens[:, 1:], mask_code, box, flip, grid=3)
        canvas.sum().backward()
    assert canvas.dtype == torch.bfloat16
    assert canvas.is_contiguous()
    assert mask_code.grad.dtype == torch.float32
    torch.testing.assert_close(mask_code.grad, unseen(box, grid=3).sum().float().expand(6))
    assert (tokens.grad[:, 0] == 0).all()
    expected = box[:, 2:].prod(1).float()[:, None].expand(3, 6)  # weights of a cell sum to 1
    torch.testing.assert_close(tokens.grad[:, 1:].float().sum(1), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("box", [[0, 0, 2, 2], [0, 1, 1, 1], [1, 0, 2, 9], [-1, -1, 3, 3]])
def test_reads_nothing_beside_a_view(path, box, device):
    """The neighbouring views hold NaN. The last boxes leave the grid: not allowed, but still harmless."""
    codes = torch.full((3, 4, 2), torch.nan, device=device)
    codes[1] = torch.randn(4, 2, device=device)
    codes.requires_grad_()
    mask_code = torch.randn(2, device=device)
    box = torch.tensor([[0, 0, 2, 2], box, [0, 0, 2, 2]], device=device)
    with forced(path):
        canvas = uncrop(codes, mask_code, box, torch.zeros(3, dtype=torch.bool, device=device), grid=2)
        upstream = torch.full_like(canvas, torch.nan)
        upstream[1] = 1
        (slope,) = torch.autograd.grad(canvas, codes, upstream)
    assert canvas[1].isfinite().all()
    assert slope[1].isfinite().all()


@pytest.mark.parametrize("flip_axis", ["width", "channel"])
def test_compiles_without_a_graph_break(flip_axis, device, compiles_whole):
    box, flip = boxes(3, 4, 4, device)
    codes, mask_code = torch.randn(3, 16, 5, device=device), torch.randn(5, device=device)
    compiles_whole(
        lambda codes, mask_code: uncrop(codes, mask_code, box, flip, grid=4, flip_axis=flip_axis),
        codes.requires_grad_(),
        mask_code.requires_grad_(),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(2, 8, 5)}, r"codes must be \[V, 9, C\], not \[2, 8, 5\]"),
        ({"mask_code": torch.zeros(4)}, r"mask_code must be \[C\] with C = 5, not \[4\]"),
        ({"box": torch.zeros(2, 4)}, "box must be int32 or int64, not float32"),
        ({"box": torch.zeros(3, 4, dtype=torch.int64)}, r"box must be \[V, 4\] with V = 2, not \[3, 4\]"),
        ({"flip": torch.zeros(2, dtype=torch.int64)}, "flip must be bool, not int64"),
        ({"flip_axis": "height"}, "flip_axis must be 'width' or 'channel', not 'height'"),
        ({"grid": 0}, "grid must be positive numbers, not 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = {
        "codes": torch.zeros(2, 9, 5), "mask_code": torch.zeros(5), "box": torch.ones(2, 4, dtype=torch.int64),
        "flip": torch.zeros(2, dtype=torch.bool), "grid": 3,
    }  # fmt: skip
    with pytest.raises(KernelError, match=message):
        uncrop(**inputs | change)
    with pytest.raises(KernelError, match="cells: box must be int32 or int64, not float32"):
        cells(torch.zeros(2, 4), 16)
    with pytest.raises(KernelError, match=r"unseen: box must be \[V, 4\], not \[4\]"):
        unseen(torch.zeros(4, dtype=torch.int64), grid=3)
