"""Damage of image blocks: against the float64 reference, the loops of the method, and by its properties."""

import math

import pytest
import torch

from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels._philox import philox as on_tensors
from fastssl.kernels.corrupt import ALIEN, NOISE, ZERO, cases, corrupt, draw_blocks, draw_first, reference


def philox(counter, key):
    """Philox4x32-10 in plain integers, as its paper says it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & 0xFFFFFFFF, p >> 32 ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_its_authors_words(counter, key, words):
    expected = [int(word, 16) for word in words.split()]
    assert philox(counter, key) == expected
    assert [int(word) for word in on_tensors(tuple(map(torch.tensor, counter)), key)] == expected


def damage_by_loop(views, boxes, kind, source, ids, seed, epoch, view):
    """Rectangle by rectangle and pixel by pixel."""
    out, mask = views.clone(), torch.zeros(views.shape[0], *views.shape[2:], dtype=torch.bool)
    height, width = views.shape[2:]
    for b in range(len(views)):
        for (top, left, tall, wide), k in zip(boxes[b].tolist(), kind[b].tolist(), strict=True):
            for y in range(max(top, 0), min(top + tall, height)):
                for x in range(max(left, 0), min(left + wide, width)):
                    value = views[source[b], :, y, x] if k == ALIEN else torch.zeros(3)
                    if k == NOISE:
                        counter = (y * width + x, view + b // len(ids), epoch, int(ids[b % len(ids)]))
                        words = philox(counter, (seed, reference.NOISE_KEY))
                        radius = [math.sqrt(-2 * math.log(((word >> 8) + 1) / 2**24)) for word in words[::2]]
                        angle = [(word >> 8) / 2**24 * 2 * math.pi for word in words[1::2]]
                        first, second = (radius[0] * f(angle[0]) for f in (math.cos, math.sin))
                        value = torch.tensor([first, second, radius[1] * math.cos(angle[1])])
                    out[b, :, y, x] = value
                    mask[b, y, x] = True
    return out, mask


def test_equals_the_loop(path, device):
    inputs = cases.inputs(
        cases.Maker(seed=3), torch.float32, B=4, size=(11, 14), R=4, sides=(2, 9), of=2, seed=2**31 + 7
    )
    inputs |= {
        "epoch": 2**32 - 1,
        "view": 2**31 - 1,  # and 2^31
        "kind": torch.tensor([[0, 1, 2, 1], [2, 1, 0, 2], [1, 2, 0, 0], [0, 2, 1, 1]]).int(),
    }
    out, mask = damage_by_loop(**inputs)
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with forced(path):
        got = corrupt(**moved)
    assert torch.equal(got.mask.cpu(), mask)
    torch.testing.assert_close(got.views.cpu(), out, rtol=0, atol=1e-5)


def blocks_by_loop(identity, height, width, fraction, align, kind, seed, epoch, view, uniform_rate, max_side):
    """Section 2.4 of the SiT card, and the uniform variant, with words of Philox for the random draws."""

    def words(n):
        return philox((identity, epoch, view, n), (seed, reference.BLOCKS_KEY + kind))

    def draw(low, high, word):  # {low .. high - 1}
        return low + (word * (high - low) >> 32)

    low, high = (math.ceil(round(m * height * width, 6)) for m in (min(0.5, fraction), fraction))
    budget = draw(low, high + 1, words(0)[0])
    mask, blocks = torch.zeros(height, width, dtype=torch.bool), []
    while mask.sum() < budget:
        word, block = words(len(blocks) + 1), []
        for side, start, length in ((height, *word[:2]), (width, *word[2:])):
            h = draw(align, int(max_side * side), length)
            if uniform_rate:
                h = round(h / align) * align
                r = draw(1 - h // align, math.ceil(side / align), start) * align
            else:
                r = draw(0, side - align, start) // align * align
                h = round(min(h, side - r) / align) * align
            block += [max(r, 0), min(r + h, side) - max(r, 0)]
        top, tall, left, wide = block
        blocks.append([top, left, tall, wide])
        mask[top : top + tall, left : left + wide] = True
    return torch.tensor(blocks, dtype=torch.int32), mask


@pytest.mark.parametrize(
    "options",
    [
        {"fraction": 0.5, "align": 1, "uniform_rate": True},
        {"fraction": 0.3, "align": 1, "uniform_rate": False, "kind": 2},
        {"fraction": 0.6, "align": 4, "uniform_rate": True, "epoch": 2**32 - 2},
        {"fraction": 0.4, "align": 4, "uniform_rate": False, "seed": 2**32 - 1},
    ],
)
def test_blocks_equal_the_loop(path, options, device):
    options = {"height": 43, "width": 34, "max_side": 0.5, "kind": 0, "seed": 1, "epoch": 0, **options}
    ids = [0, 2**32 - 3]
    given = {key: value for key, value in options.items() if key not in ("kind", "fraction")}
    given |= {"alien": options["kind"] / 2, "drop": options["fraction"], "replace": options["fraction"], "views": 2}
    with forced(path):
        boxes, kind, _ = (x.cpu() for x in draw_blocks(torch.tensor(ids, device=device), **given))
    assert kind.eq(options["kind"]).all()
    for row, got in enumerate(boxes):
        expected, mask = blocks_by_loop(ids[row % 2], view=row // 2, **options)
        n = len(expected)
        assert torch.equal(got[:n], expected)
        assert not got[n:].any()
        assert torch.equal(reference.topmost(got[None], torch.zeros(1, 128, dtype=torch.int32), 43, 34)[0] > 0, mask)


@pytest.mark.parametrize("group", [0, 4])
def test_what_a_view_shows_equals_the_loop(path, group, device):
    ids, key = [3, 2**32 - 1, 8, 0, 5, 7], (2**32 - 2, reference.DAMAGE_KEY)
    shares = {"drop": 0.5, "replace": 0.0, "alien": 0.4, "noise": 0.6}
    with forced(path):
        boxes, kind, source = draw_blocks(
            torch.tensor(ids, device=device), views=3, height=9, width=9, max_side=0.9, seed=2**32 - 2, epoch=9,
            group=group, max_blocks=(2, 1), **shares,
        )  # fmt: skip
        assert boxes.shape == (18, 2, 4)
        assert kind.shape == (18, 2)
    for row in range(18):
        view, b = divmod(row, 6)
        mixed, fill, other, _ = philox((ids[b], 9, view, 0), key)
        expected = ALIEN if mixed / 2**32 < 0.4 else NOISE if fill / 2**32 < 0.6 else ZERO
        assert kind[row].tolist() == [expected] * 2
        assert bool(boxes[row].any()) == (expected != ALIEN)  # none of a share of 0
        first = b // 4 * 4
        near = [*range(b + 1, min(first + 4, 6)), *range(first, b)] if group else range(6)
        assert source[row] == 6 * view + near[other * len(near) >> 32]
    assert {ZERO, NOISE, ALIEN} == set(kind.flatten().tolist())


def test_the_epoch_may_be_on_the_device(path, device):
    ids, inputs = torch.arange(3, device=device), filled(NOISE, device)
    blocks = {"views": 2, "height": 20, "width": 20, "drop": 0.2, "replace": 0.2, "max_side": 0.7, "seed": 5}
    blocks["max_blocks"] = (6, 6)

    def everything(epoch):
        drawn = (
            draw_blocks(ids, epoch=epoch, **blocks),
            draw_first(ids, views=2, side=20, share=0.2, seed=5, epoch=epoch),
        )
        return [*drawn[0], *drawn[1], *corrupt(**inputs | {"epoch": epoch})]

    with forced(path):
        pairs = zip(everything(2**32 - 9), everything(torch.tensor(2**32 - 9, device=device)), strict=True)
    assert all(torch.equal(number, tensor) for number, tensor in pairs)


def cover(boxes):
    """Which pixels of 224 x 224 the blocks cover."""
    boxes = boxes[:, : int((boxes[:, :, 2] > 0).sum(dim=1).max())]
    return reference.topmost(boxes, torch.zeros_like(boxes[:, :, 0]), 224, 224) > 0


@pytest.mark.parametrize(("fraction", "budget", "mean", "images"), [(0.5, 25_088, 0.511, 64), (0.3, 15_053, 0.313, 40)])
def test_upstreams_blocks_have_the_cards_statistics(fraction, budget, mean, images):
    """SiT card, oracle 7."""
    ids = torch.arange(images)
    with forced("reference"):
        boxes = draw_blocks(
            ids, views=1, height=224, width=224, drop=fraction, replace=0, alien=0, seed=0, epoch=0, uniform_rate=False
        ).boxes
    count = (boxes[:, :, 2] > 0).sum(dim=1)
    assert count.max() < 90
    assert count.float().mean().item() == pytest.approx({0.5: 40, 0.3: 20}[fraction], rel=0.1)
    covered = cover(boxes)
    pixels = covered.sum(dim=(1, 2))
    assert (pixels >= budget).all()
    assert pixels.float().mean().item() / 224**2 == pytest.approx(mean, abs=0.004)
    boxes[ids, count - 1] = 0
    assert (cover(boxes).sum(dim=(1, 2)) < budget).all()
    if fraction == 0.5:
        rate = covered.float().mean(dim=0)
        assert rate[:16, :16].mean().item() == pytest.approx(0.04, abs=0.045)
        assert rate[104:120, 104:120].mean().item() == pytest.approx(0.60, abs=0.12)
        assert rate[-16:, -16:].mean().item() == pytest.approx(0.61, abs=0.12)
        assert rate[16].mean().item() == pytest.approx(0.30, abs=0.05)


def test_a_uniform_rate_covers_corners_and_centre_alike():
    with forced("reference"):
        options = {"height": 224, "width": 224, "drop": 0.5, "replace": 0.0, "alien": 0.0, "seed": 0, "epoch": 0}
        covered = cover(draw_blocks(torch.arange(24), views=2, **options).boxes).float()
    assert (covered.sum(dim=(1, 2)) >= 25_088).all()
    rate = covered.mean(dim=0)
    corners = torch.stack([rate[:16, :16], rate[:16, -16:], rate[-16:, :16], rate[-16:, -16:]]).mean().item()
    assert corners == pytest.approx(0.5, abs=0.12)
    for edge in (rate[0], rate[-1], rate[:, 0], rate[:, -1], rate[112]):
        assert edge.mean().item() == pytest.approx(0.5, abs=0.08)


def test_blocks_belong_to_the_sample_not_to_the_batch(path, device):
    options = {"views": 2, "height": 40, "width": 40, "drop": 0.4, "replace": 0.4, "alien": 0, "max_side": 0.5}
    options |= {"seed": 1, "epoch": 2, "max_blocks": (6, 6)}
    first = {"views": 2, "side": 40, "share": 0.3, "seed": 1, "epoch": 2}
    with forced(path):
        boxes = draw_blocks(torch.tensor([7, 3, 9], device=device), **options).boxes
        assert torch.equal(draw_blocks(torch.tensor([9, 7], device=device), **options).boxes, boxes[[2, 0, 5, 3]])
        assert not torch.equal(boxes[3, 0], boxes[0, 0])  # the views differ
        for change in ({"seed": 2}, {"epoch": 3}, {"alien": 1}):
            other = draw_blocks(torch.tensor([7], device=device), **options | change).boxes
            assert not torch.equal(other[0, 0], boxes[0, 0]), change
        drawn = draw_first(torch.tensor([7, 3, 9], device=device), **first)
        again = draw_first(torch.tensor([9, 7], device=device), **first)
        for name in ("boxes", "soft", "weights", "turns"):
            assert torch.equal(getattr(again, name), getattr(drawn, name)[[2, 0, 5, 3]])


def filled(kind, device, B=4, size=(24, 40)):
    """Inputs of corrupt with one rectangle of a kind per image, over all but the outermost pixels."""
    torch.manual_seed(0)
    boxes = torch.tensor([1, 1, size[0] - 2, size[1] - 2], dtype=torch.int32, device=device).expand(B, 1, 4)
    return {
        "views": torch.randn(B, 3, *size, device=device),
        "boxes": boxes,
        "kind": torch.full((B, 1), kind, dtype=torch.int32, device=device),
        "source": torch.arange(B, device=device).roll(1),
        "ids": torch.arange(10, 10 + B, device=device),
        "seed": 5,
    }


@pytest.mark.parametrize("kind", [ZERO, NOISE, ALIEN])
def test_outside_stays_clean_bitwise_and_inside_is_what_the_kind_says(path, kind, device):
    """SiT card, oracle 7. Every image is damaged itself, and still shows clean in another."""
    inputs = filled(kind, device)
    inputs["boxes"] = inputs["boxes"].clone()
    inputs["boxes"][0] = 0  # not used
    clean = inputs["views"].clone()
    with forced(path):
        views, mask = corrupt(**inputs)
    assert torch.equal(inputs["views"], clean)
    assert mask.sum(dim=(1, 2)).tolist() == [0, *[22 * 38] * 3]
    hit = mask[:, None].expand_as(clean)
    assert torch.equal(views[~hit], clean[~hit])
    if kind == NOISE:
        assert (views[hit] != clean[hit]).all()
    else:
        assert torch.equal(views[hit], clean.roll(1, 0)[hit] if kind == ALIEN else torch.zeros_like(clean[hit]))


def test_the_last_rectangle_decides(path, device):
    inputs = filled(ZERO, device, B=1)
    order = [ALIEN, ZERO] * 20 + [NOISE, ZERO]  # more than 32 rectangles: the second word of them decides
    inputs["boxes"] = inputs["boxes"].expand(1, len(order), 4)
    for used in range(1, len(order) + 1, 13):
        inputs["kind"] = torch.tensor([order], dtype=torch.int32, device=device)
        boxes = inputs["boxes"].clone()
        boxes[:, used:, 2] = 0
        expected = {**inputs, "boxes": boxes[:, used - 1 : used], "kind": inputs["kind"][:, used - 1 : used]}
        with forced(path):
            assert torch.equal(corrupt(**inputs | {"boxes": boxes}).views, corrupt(**expected).views)


def test_noise_is_normal_and_belongs_to_the_sample(path, device):
    inputs = filled(NOISE, device, size=(32, 64))
    with forced(path):
        views = corrupt(**inputs).views
        flipped = {k: v.flip(0) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        assert torch.equal(corrupt(**flipped).views.flip(0), views)
        for change in ({"seed": 6}, {"epoch": 1}, {"view": 1}, {"ids": inputs["ids"] + 100}):
            other = corrupt(**inputs | change).views[:, :, 1:-1, 1:-1]
            assert (other != views[:, :, 1:-1, 1:-1]).float().mean() > 0.99, change
    noise = views[:, :, 1:-1, 1:-1].double()  # 22,320 values
    assert abs(noise.mean().item()) < 0.03
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert (noise**4).mean().item() == pytest.approx(3, abs=0.25)
    assert (noise > 0).double().mean().item() == pytest.approx(0.5, abs=0.015)
    lines = noise.transpose(0, 1).flatten(1)
    correlation = torch.corrcoef(torch.cat([lines, lines.abs(), lines.roll(1, 1)]))
    assert (correlation - torch.eye(9, device=device)).abs().max() < 0.06


def test_no_gradient(path, device):
    inputs = filled(ALIEN, device)
    inputs["views"].requires_grad_()
    with forced(path):
        assert not corrupt(**inputs).views.requires_grad


def test_compiles_without_a_graph_break(device, compiles_whole):
    inputs = filled(NOISE, device, B=2)

    def step(leaf):
        options = {"drop": 0.2, "replace": 0.2, "max_side": 0.9, "max_blocks": (1, 1)}
        blocks = draw_blocks(inputs["ids"], views=1, height=24, width=40, seed=1, epoch=1, **options)
        drawn = draw_first(inputs["ids"], views=1, side=24, share=0.1, seed=1, epoch=1)
        soft = {"soft": drawn.soft, "weights": drawn.weights}
        views, mask = corrupt(**inputs | blocks._asdict() | soft)
        return leaf * views * mask[:, None]

    compiles_whole(step, torch.randn(2, 3, 24, 40, device=device, requires_grad=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": torch.zeros(4, 4, 8, 8)}, r"corrupt: views must be \[N, 3, H, W\], not \[4, 4, 8, 8\]"),
        ({"boxes": torch.zeros(4, 1, 4)}, "corrupt: boxes must be int32, not float32"),
        ({"kind": torch.zeros(4, 2, dtype=torch.int32)}, r"kind must be \[N, R\] with N = 4, R = 1, not \[4, 2\]"),
        ({"source": torch.zeros(3, dtype=torch.int64)}, r"source must be \[N\] with N = 4, not \[3\]"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "views must be a multiple of the 3 ids in number, not 4"),
        ({"soft": torch.zeros(4, 2, 4).int()}, "weights must be given if and only if soft is, not NoneType"),
        ({"ids": torch.zeros(4, dtype=torch.int32)}, "ids must be int64, not int32"),
    ],
)
def test_bad_arguments_of_corrupt_are_named(change, message):
    with pytest.raises(KernelError, match=message):
        corrupt(**filled(ZERO, "cpu") | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(2, 1, dtype=torch.int64)}, r"draw_blocks: ids must be \[B\], not \[2, 1\]"),
        ({"drop": 1.0}, "drop must be from 0 to less than 1, not 1.0"),
        ({"replace": -0.1}, "replace must be from 0 to less than 1, not -0.1"),
        ({"align": 0}, "align must be at least 1, not 0"),
        ({"align": 9}, r"max_side must be a share that leaves sides above align = 9, not 0.3 \(9\)"),
        ({"max_blocks": (3, -1)}, r"max_blocks must be at least 0, not \(3, -1\)"),
    ],
)
def test_bad_arguments_of_draw_blocks_are_named(change, message):
    inputs = {"ids": torch.arange(2), "views": 2, "height": 32, "width": 40, "seed": 0, "epoch": 0}
    inputs |= {"drop": 0.5, "replace": 0.3}
    with pytest.raises(KernelError, match=message):
        draw_blocks(**inputs | change)
