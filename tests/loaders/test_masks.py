"""The compiled masks: against the papers' procedures, patch by patch, and against PyTorch's for many images."""

import math
import random
import zlib
from collections import Counter
from fractions import Fraction

import numpy as np
import oracle_masks
import pytest
import torch

from fastssl.batch import Batch
from fastssl.config import ConfigError
from fastssl.kernels._philox import philox
from fastssl.loaders import masks
from fastssl.loaders.loader import part_labels
from fastssl.loaders.masks import (
    BlockMask,
    RandomMask,
    SemanticMask,
    add_masks,
    draw,
    kept_patches,
    semantic_schedule,
)
from fastssl.loaders.masks_compiled import hide_parts
from fastssl.loaders.philox import random_words


def drawn(mask, ids, seed=0, epoch=0, **more):
    """`draw` in tensors."""
    return tuple(torch.from_numpy(part) for part in draw(mask, np.asarray(ids), seed=seed, epoch=epoch, **more))


def mask(ids, patches=196, ratio=0.75, seed=0, epoch=0):
    return drawn(RandomMask("main", patches, ratio), ids, seed, epoch)


def test_words_equal_the_loaders_generator():
    ids = np.array([0, 1, 77, 2**31, 2**32 - 1])
    ours = philox((torch.tensor(ids)[:, None], 9, 2**32 - 1, torch.arange(7)), (2**32 - 1, zlib.crc32(b"mask")))
    theirs = random_words(2**32 - 1, "mask", ids[:, None], 9, 2**32 - 1, np.arange(7))
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a.numpy(), b.astype(np.int64))


@pytest.mark.parametrize(("patches", "ratio", "keep"), [(196, 0.75, 49), (196, 0.6, 78), (7, 0.0, 7), (1, 0.0, 1)])
def test_kept_and_masked_make_up_the_image(patches, ratio, keep):
    kept, masked = mask(range(20), patches, ratio)
    assert kept.dtype == masked.dtype == torch.int64
    assert kept.shape == (20, keep)
    assert masked.shape == (20, patches - keep)
    assert torch.equal(torch.cat([kept, masked], 1).sort(1).values, torch.arange(patches).expand(20, -1))
    for part in (kept, masked):
        assert torch.equal(part, part.sort(1).values)


def test_keeps_the_patches_of_lowest_score():
    words = random_words(4, "mask", 11, 6, 0, np.arange(5))
    scores = np.stack(words, -1).reshape(-1)[:18]
    kept, _ = mask([11], 18, 0.5, seed=4, epoch=6)
    assert kept[0].tolist() == sorted(np.argsort(scores)[:9].tolist())


def test_mask_never_changes():
    """Runs that resume after an update of the package or of torch rely on these numbers."""
    assert mask([7], 16, 0.75)[0].tolist() == [[0, 4, 7, 14]]


def test_a_sample_gets_its_mask_in_any_batch():
    whole = mask(range(64))
    part = mask([40, 3, 17])
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[[40, 3, 17]], b)


def test_seed_epoch_and_sample_count():
    base = mask([5])[0]
    for other in (mask([6]), mask([5], seed=1), mask([5], epoch=1)):
        assert not torch.equal(base, other[0])


def test_every_patch_is_kept_equally_often():
    kept, _ = mask(range(4000), 49, 0.75)
    share = torch.bincount(kept.flatten(), minlength=49) / 4000
    expected = 12 / 49
    assert (share - expected).abs().max() < 5 * (expected * (1 - expected) / 4000) ** 0.5


def test_decimal_ratios_are_meant_exactly():
    assert kept_patches(100, 0.9) == 10  # int(100 * (1 - 0.9)) is 9
    assert kept_patches(10, 0.7) == 3
    assert kept_patches(196, 0.9) == 19
    assert kept_patches(196, 0.75) == 49


@pytest.mark.parametrize(("patches", "ratio"), [(196, 1.0), (196, -0.1), (3, 0.75), (196, 1.5), (4, float("nan"))])
def test_unusable_ratio(patches, ratio):
    with pytest.raises(ValueError, match=f"mask ratio {ratio} keeps none of {patches} patches"):
        mask([0], patches, ratio)


# Block-wise masks


def blocks_by_hand(grid, masked, draws, *, smallest=16, largest=None, aspect=(0.3, 1 / 0.3), tries=10, runs=10**6):
    """The authors' procedure, one step after the other.

    `draws` has uniform(a, b), randint(a, b) and at(run, attempt), which is told where the procedure stands.

    Returns:
        The mask, bool [rows, columns]; the number of rectangles; the number of runs.
    """
    rows, columns = grid
    mask = np.zeros(grid, bool)
    rectangles = run = 0
    while mask.sum() < masked and run < runs:
        room = min(masked - int(mask.sum()), largest or masked)
        for attempt in range(tries):
            draws.at(run, attempt)
            area = draws.uniform(smallest, room)
            ratio = math.exp(draws.uniform(*(math.log(a) for a in aspect)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height < rows and width < columns:
                top, left = draws.randint(0, rows - height), draws.randint(0, columns - width)
                block = mask[top : top + height, left : left + width]
                if 0 < block.size - block.sum() <= room:
                    block[:] = True
                    rectangles += 1
                    break
        run += 1
    return mask, rectangles, run


class Python:
    """Draws of Python's own generator."""

    def __init__(self, seed):
        self.generator = random.Random(seed)
        self.uniform, self.randint = self.generator.uniform, self.generator.randint

    def at(self, run, attempt):
        pass


class Words:
    """Draws of one sample from the counter-based generator: area, ratio, top and left of each try."""

    def __init__(self, sample, seed, epoch, tries=64):
        self.draw = lambda run: zip(
            *random_words(seed, "mask/block", sample, epoch, run, np.arange(tries)), strict=True
        )

    def at(self, run, attempt):
        if attempt == 0:
            self.run = list(self.draw(run))
        self.next = iter(int(word) for word in self.run[attempt])

    def uniform(self, a, b):
        return a + (b - a) * (next(self.next) / 2**32)

    def randint(self, a, b):
        return a + (next(self.next) * (b - a + 1) >> 32)


def blocks(ids, grid=(14, 14), masked=98, seed=0, epoch=0, **numbers):
    return drawn(BlockMask("main", grid, masked, **numbers), ids, seed, epoch)


def as_grid(masked, patches=196):
    """bool [B, N], True where masked."""
    return torch.zeros(len(masked), patches, dtype=torch.bool).scatter(1, masked, True)


def check_lists(keep, masked, patches):
    """Ascending, disjoint, complete, int64."""
    assert keep.dtype == masked.dtype == torch.int64
    assert torch.equal(torch.cat([keep, masked], 1).sort(1).values, torch.arange(patches).expand(len(keep), -1))
    for part in (keep, masked):
        assert torch.equal(part, part.sort(1).values)


def test_blocks_by_hand_are_the_authors():
    """CAE's generator with Python's random.seed(0): its first mask and where it leaves the generator."""
    draws = Python(0)
    found, rectangles, _ = blocks_by_hand((14, 14), 98, draws)
    bits = "".join(str(int(hidden)) for hidden in found.flatten())
    assert int(bits, 2) == 0x3F80FE03F80FE03F80FF03FC0FF03FC0FF03F80FE03FE0
    assert rectangles == 4
    assert draws.generator.random() == 0.7102534236374868


def test_length_of_a_run_does_not_matter_to_the_authors_procedure():
    found = [[blocks_by_hand((14, 14), 98, Python(seed), tries=tries)[0] for seed in range(100)] for tries in (10, 64)]
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("grid", "masked", "by_hand", "numbers"),
    [
        ((14, 14), 98, {}, {}),
        ((14, 14), 75, {}, {}),
        ((14, 14), 147, {}, {}),
        ((28, 28), 392, {}, {}),
        ((9, 17), 60, {"smallest": 5, "largest": 20}, {"min_patches": 5, "max_patches": 20}),
        ((14, 14), 98, {"smallest": 1, "largest": 2}, {"min_patches": 1, "max_patches": 2}),
        ((17, 9), 60, {"aspect": (0.5, 1.25)}, {"min_aspect": 0.5, "max_aspect": 1.25}),
        ((14, 14), 5, {}, {}),  # fewer than min_patches: the range of areas is turned round
        ((2, 2), 1, {"smallest": 1}, {"min_patches": 1}),
    ],
)
def test_blocks_equal_the_sequential_procedure(grid, masked, by_hand, numbers):
    ids = [*range(40), 2**31, 2**32 - 1]
    keep, hidden = blocks(ids, grid, masked, seed=3, epoch=7, **numbers)
    check_lists(keep, hidden, math.prod(grid))
    assert hidden.shape == (42, masked)
    expected = [blocks_by_hand(grid, masked, Words(i, 3, 7), tries=64, **by_hand)[0].flatten() for i in ids]
    assert np.array_equal(as_grid(hidden, math.prod(grid)).numpy(), expected)


@pytest.mark.parametrize(("masked", "largest", "runs"), [(98, 98, 24), (99, 99, 40), (98, 25, 30)])
def test_patches_still_to_hide_after_the_last_run_are_the_first_free_ones(monkeypatch, masked, largest, runs):
    monkeypatch.setattr(masks, "TRIES", 1)  # so that many masks need more runs
    keep, hidden = blocks(range(100), masked=masked, max_patches=largest)
    check_lists(keep, hidden, 196)
    late = 0
    for i in range(100):
        found, _, _ = blocks_by_hand((14, 14), masked, Words(i, 0, 0), largest=largest, tries=1, runs=runs)
        missing = masked - int(found.sum())
        late += missing > 0
        found.flat[np.flatnonzero(~found)[:missing]] = True
        assert hidden[i].tolist() == np.flatnonzero(found).tolist()
    assert 5 < late < 95


def test_block_statistics():
    """As CAE's generator has them: exactly 98 patches, a strong bias to the centre, 5.55 rectangles."""
    found = torch.cat([as_grid(blocks(range(i, i + 250))[1]) for i in range(0, 10000, 250)]).view(-1, 14, 14)
    assert (found.sum((1, 2)) == 98).all()
    share = found.double().mean(0)
    assert share[[0, 0, 13, 13], [0, 13, 0, 13]].mean() == pytest.approx(0.061, abs=0.01)
    assert share[[0, 6, 7, 13], [7, 0, 13, 6]].mean() == pytest.approx(0.277, abs=0.01)
    assert share[6:8, 6:8].mean() == pytest.approx(0.863, abs=0.01)
    down, across = found[:, 1:] == found[:, :-1], found[:, :, 1:] == found[:, :, :-1]
    assert torch.cat([down.flatten(), across.flatten()]).double().mean() == pytest.approx(0.882, abs=0.005)
    assert torch.allclose(share, share.T, atol=0.03)
    assert torch.allclose(share, share.flip(0), atol=0.03)
    rectangles = [blocks_by_hand((14, 14), 98, Words(i, 0, 0), tries=64)[1] for i in range(300)]
    assert np.mean(rectangles) == pytest.approx(5.55, abs=0.3)


def test_a_sample_gets_its_blocks_in_any_batch():
    whole = blocks(range(100))
    for i in (0, 41, 99):
        for a, b in zip(whole, blocks([i]), strict=True):
            assert torch.equal(a[[i]], b)
    assert len({tuple(row) for row in whole[1].tolist()}) == 100
    assert blocks(np.zeros(0, np.int64))[1].shape == (0, 98)


def test_seed_and_epoch_change_blocks_and_nothing_else_does():
    base = blocks([5])[1]
    assert torch.equal(base, blocks([5])[1])
    for other in (blocks([5], seed=1), blocks([5], epoch=1)):
        assert not torch.equal(base, other[1])


def test_blocks_never_change():
    """Runs that resume after an update of the package or of torch rely on these numbers."""
    assert blocks([7], (5, 5), 10, min_patches=4)[1].tolist() == [[0, 5, 10, 11, 12, 13, 14, 16, 17, 18]]


@pytest.mark.parametrize(
    ("grid", "numbers", "message"),
    [
        ((14, 14), {"masked": 196}, "num_masked is 196; it must be from 1 to 195 on a grid of 14 x 14"),
        ((14, 14), {"masked": 0}, "num_masked is 0; it must be from 1 to 195"),
        ((14, 14), {"min_patches": 0}, "blocks of 0 to 98 patches"),
        ((14, 14), {"max_patches": 15}, "blocks of 16 to 15 patches"),
        ((14, 14), {"min_aspect": 0.0}, "aspects 0.0 to"),
        ((14, 14), {"min_aspect": math.nan}, "aspects nan to"),
        ((14, 14), {"min_aspect": 2.0}, "aspects 2.0 to 0.5"),
        ((14, 14), {"max_aspect": math.inf}, "aspects 0.3 to inf"),
        ((14, 14), {"masked": 195, "min_patches": 190}, "no block of 190 patches"),
        ((14, 14), {"min_patches": 98, "min_aspect": 3.0, "max_aspect": 4.0}, "no block of 98 patches"),
        ((14, 14), {"min_patches": 98, "min_aspect": 0.2, "max_aspect": 0.3}, "no block of 98 patches"),
        ((1, 40), {"masked": 20}, "no block of 16 patches .* narrower than a grid of 1 x 40"),
        ((1, 8), {"masked": 1, "min_patches": 1, "min_aspect": 0.01}, "no block of 1 patches"),
    ],
)
def test_impossible_blocks(grid, numbers, message):
    with pytest.raises(ConfigError, match=message):
        blocks([0], grid, **numbers)


# Masks by semantic parts

SIZES = (70, 40, 30, 26, 14, 10, 6)
ORDER = (2, 0, 5, 1, 3, 4, 6)


def semantic(labels, ids=None, ratio=0.75, inter=0.5, parts=7, seed=0, epoch=0):
    """Masks where whole parts weigh `inter`, a multiple of 1/100."""
    labels = np.asarray(labels)
    wanted = SemanticMask("main", labels.shape[-1], ratio, parts, 100, 1.0 if inter else 1e9)  # 0.01^1e9 is 0
    stage = max(round(100 * inter) - 1, 0)
    assert semantic_schedule(stage, wanted.epochs, wanted.power) == inter
    ids = np.arange(len(labels)) if ids is None else ids
    return drawn(wanted, ids, seed, epoch, parts=labels, schedule_epoch=stage)


def hidden_parts(labels, scores, part_scores, keep, *, ratio, inter):
    """Masks for given scores: int64 [B, N], the kept patches first."""
    found = np.empty(labels.shape, np.int64)
    for row, *given in zip(found, labels, scores, part_scores, strict=True):
        patches, along, parts = (value.numpy() for value in given)
        hide_parts(patches, along.astype(np.uint64), parts.astype(np.uint64), ratio, inter, row[:keep], row[keep:])
    return torch.from_numpy(found)


def quotas_by_hand(sizes, ratio, inter, order, patches, keep):
    """How many patches of each part the rule hides; Python rounds half to even."""
    budget, taken = patches - keep, 0
    quotas = [0] * len(sizes)
    for part in order:
        whole = min(max(budget - taken, 0), sizes[part])
        taken += sizes[part]
        within = round(sizes[part] * Fraction(str(ratio)))
        quotas[part] = round((1 - inter) * within + inter * whole)
    return quotas


def semantic_by_hand(labels, sample, ratio, inter, parts, seed, epoch):
    """Visible and masked patches of one image, in the order in which the rule puts them."""
    count = len(labels)
    blocks = -(-count // 4)
    words = np.stack(random_words(seed, "mask/semantic", sample, epoch, 0, np.arange(blocks + parts)), -1).flatten()
    along = np.argsort(words[:count], kind="stable").tolist()
    order = np.argsort(words[4 * blocks : 4 * blocks + parts], kind="stable").tolist()
    keep = kept_patches(count, ratio)
    sizes = [int((labels == part).sum()) for part in range(parts)]
    quotas = quotas_by_hand(sizes, ratio, inter, order, count, keep)
    seen = Counter()
    shown, hidden = [], []
    for patch in along:
        part = int(labels[patch])
        seen[part] += 1
        hides = 0 <= part < parts and seen[part] <= quotas[part]
        (hidden if hides else shown).append(patch)
    ranked = shown + hidden
    return ranked[:keep], ranked[keep:]


def random_parts(images, patches=196, parts=7, seed=0):
    """int64 [images, patches]: labels with sizes from a flat Dirichlet distribution."""
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.ones(parts), images)
    return torch.tensor(np.stack([generator.choice(parts, patches, p=share) for share in shares]))


def fixed_parts(images=1):
    return torch.repeat_interleave(torch.arange(7), torch.tensor(SIZES)).expand(images, -1)


def masked_per_part(labels, masked, parts=7):
    hidden = labels.gather(1, masked)
    return torch.stack([(hidden == part).sum(1) for part in range(parts)], 1)


def test_rounding_of_small_parts_by_hand():
    counts = {1: 1, 2: 2, 3: 2, 4: 3, 6: 4, 10: 8, 14: 10, 30: 22, 70: 52}
    for count, hidden in counts.items():
        assert quotas_by_hand([count], 0.75, 0, [0], 196, 49) == [hidden]


@pytest.mark.parametrize(
    ("inter", "quotas"),
    [
        (0.0, (52, 30, 22, 20, 10, 8, 4)),
        (0.25, (56, 32, 24, 15, 8, 8, 3)),
        (0.5, (61, 34, 26, 10, 5, 9, 2)),
        (0.75, (66, 35, 28, 5, 2, 10, 1)),
        (1.0, (70, 37, 30, 0, 0, 10, 0)),
    ],
)
def test_quotas_of_the_paper(inter, quotas):
    assert tuple(quotas_by_hand(SIZES, 0.75, inter, ORDER, 196, 49)) == quotas
    scores = torch.randint(2**32, (50, 196))
    part_scores = torch.tensor(ORDER).argsort().expand(50, -1)
    labels = fixed_parts(50)
    patches = hidden_parts(labels, scores, part_scores, 49, ratio=0.75, inter=inter)
    extra = masked_per_part(labels, patches[:, 49:]) - torch.tensor(quotas)
    assert (extra >= 0).all()
    assert (extra.sum(1) == 147 - sum(quotas)).all()


@pytest.mark.parametrize(("inter", "size"), [(0.1, 61), (0.1, 110), (0.1, 138), (0.3, 60), (0.3, 113)])
def test_counts_are_mixed_in_double_precision(inter, size):
    """Means that float32 puts on the other side of a half."""
    labels = (torch.arange(196) >= size).long().expand(20, -1)
    scores = torch.randint(2**32, (20, 196))
    for order in ((0, 1), (1, 0)):
        quotas = quotas_by_hand((size, 196 - size), 0.75, inter, order, 196, 49)
        patches = hidden_parts(labels, scores, torch.tensor(order).expand(20, -1), 49, ratio=0.75, inter=inter)
        extra = masked_per_part(labels, patches[:, 49:], 2) - torch.tensor(quotas)
        assert (extra.abs().sum(1) == abs(147 - sum(quotas))).all()


@pytest.mark.parametrize("inter", [0.0, 0.25, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(
    ("patches", "ratio", "parts"), [(196, 0.75, 7), (196, 0.6, 6), (49, 0.9, 3), (45, 0.7, 1), (50, 0.0, 4)]
)
def test_semantic_masks_equal_the_sequential_rule(patches, ratio, parts, inter):
    labels = random_parts(25, patches, parts + 2) - 1  # from -1 to P: two of them are no part
    ids = torch.tensor([*range(24), 2**32 - 1])
    keep, hidden = semantic(labels, ids, ratio, inter, parts, seed=5, epoch=2)
    check_lists(keep, hidden, patches)
    for i, sample in enumerate(ids.tolist()):
        shown, masked = semantic_by_hand(labels[i].numpy(), sample, ratio, inter, parts, 5, 2)
        assert keep[i].tolist() == sorted(shown)
        assert hidden[i].tolist() == sorted(masked)


def test_decimal_ratios_are_meant_exactly_within_parts():
    labels = (torch.arange(90) // 45).expand(10, -1)
    keep, _ = semantic(labels, ratio=0.7, inter=0.0, parts=2)  # 0.7 * 45 is 31.499999999999996
    for i in range(10):
        assert keep[i].tolist() == sorted(semantic_by_hand(labels[i].numpy(), i, 0.7, 0.0, 2, 0, 0)[0])


def test_semantic_mask_of_784_patches_and_many_parts():
    labels = random_parts(3, 784, 60)
    keep, hidden = semantic(labels, parts=60)
    check_lists(keep, hidden, 784)
    assert keep.shape == (3, 196)
    for i in range(3):
        assert keep[i].tolist() == sorted(semantic_by_hand(labels[i].numpy(), i, 0.75, 0.5, 60, 0, 0)[0])


@pytest.mark.parametrize("inter", [0.0, 0.4, 1.0])
def test_one_part_alone_is_masked_at_random(inter):
    _, hidden = semantic(torch.full((4000, 196), 3), inter=inter)
    share = as_grid(hidden).double().mean(0)
    assert hidden.shape == (4000, 147)
    assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5


def test_whole_parts_cut_at_most_one():
    labels = random_parts(2000)
    keep, hidden = semantic(labels, inter=1.0)
    shown, masked = masked_per_part(labels, keep), masked_per_part(labels, hidden)
    assert ((shown > 0) & (masked > 0)).sum(1).max() == 1
    assert (shown > 0).sum(1).double().mean() == pytest.approx(2.4, abs=0.1)


def test_within_parts_rounding_moves_few_patches():
    """The paper's rule misses the total in half of the images, by four at most."""
    labels = random_parts(3000)
    _, hidden = semantic(labels, inter=0.0)
    sizes = torch.stack([(labels == part).sum(1) for part in range(7)], 1)
    moved = (masked_per_part(labels, hidden) - (sizes * 0.75).round()).abs().sum(1)
    assert moved.max() <= 4
    assert (moved > 0).double().mean() == pytest.approx(0.51, abs=0.04)


def test_order_of_whole_parts_is_uniform():
    labels = (torch.arange(196) // 49).expand(2400, -1)
    keep, _ = semantic(labels, inter=1.0, parts=4)
    last = labels.gather(1, keep)
    assert (last == last[:, :1]).all()
    assert (torch.bincount(last[:, 0], minlength=4) - 600).abs().max() < 5 * (2400 * 3 / 16) ** 0.5


def test_patches_without_a_part_are_shown():
    labels = torch.zeros(6, 196, dtype=torch.int64)
    for row, label in zip(labels, (-1, 7, -(2**40), 2**62, 2**63 - 1, 1000), strict=True):
        row[::4] = label  # 49 of 196
    keep, _ = semantic(labels, inter=1.0)
    assert torch.equal(keep, torch.arange(0, 196, 4).expand(6, -1))
    check_lists(*semantic(torch.full((3, 196), -1)), 196)


def test_masks_move_with_the_patches():
    """Mirrored or shuffled patches with the same randomness have the mirrored or shuffled mask."""
    generator = torch.Generator().manual_seed(0)
    labels = random_parts(30)
    scores = torch.randint(2**32, (30, 196), generator=generator)
    parts = torch.randint(2**32, (30, 7), generator=generator)
    mirrored = torch.arange(196).view(14, 14).flip(1).flatten()
    for move in (mirrored, torch.randperm(196, generator=generator)):
        for inter in (0.0, 0.3, 1.0):
            here = hidden_parts(labels, scores, parts, 49, ratio=0.75, inter=inter)
            there = hidden_parts(labels[:, move], scores[:, move], parts, 49, ratio=0.75, inter=inter)
            for a, b in zip(move[there].split((49, 147), 1), here.split((49, 147), 1), strict=True):
                assert torch.equal(a.sort(1).values, b)


def test_part_labels_of_the_loader_are_taken_flattened():
    generator = np.random.default_rng(0)
    maps = generator.integers(0, 256, (6, 14, 14), dtype=np.uint8)
    box, flip = np.array([[10, 20, 100, 80], [10, 20, 100, 80]]), np.array([False, True])
    parts = torch.from_numpy(
        part_labels(maps[None], box[None], flip[None], np.array([[224, 200]]), 14).repeat(5, 0)
    )  # [B, n, g, g]
    assert torch.equal(parts[:, 0].flip(2), parts[:, 1])
    keep, hidden = semantic(parts[:, 0].flatten(1), inter=1.0, parts=6)
    check_lists(keep, hidden, 196)
    shown, masked = (masked_per_part(parts[:, 0].flatten(1), p, 6) for p in (keep, hidden))
    assert ((shown > 0) & (masked > 0)).sum(1).max() <= 1


def test_a_sample_gets_its_semantic_mask_in_any_batch():
    labels = random_parts(64)
    whole, part = semantic(labels), semantic(labels[[40, 3, 17]], [40, 3, 17])
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[[40, 3, 17]], b)


def test_seed_epoch_and_sample_count_in_semantic_masks():
    labels = random_parts(1)
    base = semantic(labels, [5])[0]
    for other in (semantic(labels, [6]), semantic(labels, [5], seed=1), semantic(labels, [5], epoch=1)):
        assert not torch.equal(base, other[0])


def test_semantic_masks_never_change():
    """Runs that resume after an update of the package or of torch rely on these numbers."""
    labels = (torch.arange(16) // 6)[None]
    assert semantic(labels, [7], parts=3, inter=0.25)[0].tolist() == [[3, 4, 9, 11]]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"ratio": 1.0}, "mask ratio 1.0 keeps none of 196 patches"),
        ({"ratio": -0.1}, "mask ratio -0.1 keeps none"),
        ({"parts": 0}, "num_parts is 0; it must be from 1 to 1024"),
        ({"parts": 1025}, "num_parts is 1025"),
    ],
)
def test_unusable_semantic_numbers(numbers, message):
    with pytest.raises(ConfigError, match=message):
        semantic(**{"labels": torch.zeros(2, 196, dtype=torch.int64), **numbers})


def test_part_labels_that_do_not_fit():
    wanted = SemanticMask("main", 196, 0.75, 7, 10)
    for labels, given in (
        (np.zeros((2, 196)), r"\[2, 196\]"),
        (np.zeros((1, 14, 14)), r"\[1, 14, 14\]"),
        (None, "missing"),
    ):
        with pytest.raises(
            ConfigError, match=rf"part labels of main are {given}; they must be \[1, 196\], one per patch"
        ):
            drawn(wanted, [0], parts=labels)
    with pytest.raises(ConfigError, match=r"step 0 of 0 with power 2\.0"):
        SemanticMask("main", 196, 0.75, 7, 0)


def test_schedule_is_the_papers():
    table = {0: 0.99999844, 199: 0.9375, 399: 0.75, 599: 0.4375, 799: 0.0}
    for epoch, intra in table.items():
        assert 1 - semantic_schedule(epoch, 800) == pytest.approx(intra, abs=5e-9)
    assert np.mean([semantic_schedule(epoch, 800) for epoch in range(800)]) == pytest.approx(1 / 3, abs=1e-3)
    assert semantic_schedule(799, 800) == semantic_schedule(5000, 800) == 1.0
    assert semantic_schedule(49, 200, power=1) == 0.25
    assert semantic_schedule(49, 200, power=3) == 0.25**3


@pytest.mark.parametrize(
    ("step", "total", "power"), [(-1, 10, 2), (0, 0, 2), (0, 10, 0), (0, 10, -1), (0, 10, math.nan)]
)
def test_unusable_schedule(step, total, power):
    with pytest.raises(ConfigError, match=f"step {step} of {total} with power {power}: needs"):
        semantic_schedule(step, total, power)


# Many images, and whole batches

MANY = np.array([*range(6000), *range(2**31, 2**31 + 100), 2**32 - 1])


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (3, 799), (2**32 - 1, 2**32 - 1)])
@pytest.mark.parametrize(("patches", "ratio"), [(196, 0.75), (196, 0.6), (49, 0.9), (45, 0.7), (50, 0.0), (784, 0.75)])
def test_random_masks_equal_pytorchs(patches, ratio, seed, epoch):
    ids = MANY[:: 1 + patches // 100]
    expected = oracle_masks.random_mask(torch.from_numpy(ids), patches, ratio, seed=seed, epoch=epoch)
    for a, b in zip(mask(ids, patches, ratio, seed, epoch), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (2**32 - 1, 799)])
@pytest.mark.parametrize(
    ("grid", "masked", "numbers"),
    [
        ((14, 14), 98, {}),
        ((14, 14), 75, {"max_patches": 40}),
        ((14, 14), 147, {}),
        ((14, 14), 5, {}),
        ((28, 28), 392, {}),
        ((9, 17), 60, {"min_patches": 5, "max_patches": 20}),
        ((17, 9), 60, {"min_aspect": 0.5, "max_aspect": 1.25}),
        ((4, 4), 8, {"min_patches": 2}),
        ((2, 2), 1, {"min_patches": 1}),
    ],
)
def test_block_masks_equal_pytorchs(grid, masked, numbers, seed, epoch):
    ids = MANY[:: 1 + math.prod(grid) // 100]
    expected = oracle_masks.block_mask(
        torch.from_numpy(ids), grid, num_masked=masked, seed=seed, epoch=epoch, **numbers
    )
    for a, b in zip(blocks(ids, grid, masked, seed, epoch, **numbers), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("seed", "epoch", "inter"), [(0, 0, 0.0), (3, 200, 0.07), (2**32 - 1, 799, 0.5), (1, 9, 1.0)])
@pytest.mark.parametrize(
    ("patches", "ratio", "parts"), [(196, 0.75, 6), (196, 0.6, 64), (49, 0.9, 3), (45, 0.7, 1), (50, 0.0, 1024)]
)
def test_semantic_masks_equal_pytorchs(patches, ratio, parts, seed, epoch, inter):
    ids = MANY[:: 1 + patches // 50]
    labels = torch.from_numpy(np.random.default_rng(epoch).integers(-1, min(parts, 9) + 1, (len(ids), patches)))
    expected = oracle_masks.semantic_mask(
        labels, torch.from_numpy(ids), ratio=ratio, inter=inter, num_parts=parts, seed=seed, epoch=epoch
    )
    for a, b in zip(semantic(labels, ids, ratio, inter, parts, seed, epoch), expected, strict=True):
        assert torch.equal(a, b)


def test_masks_of_a_batch():
    """Each under its name; part labels are those of the first crop; schedules stand where they are told to."""
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 6, (3, 2, 14, 14)))
    ids = torch.tensor([9, 4, 7])
    wanted = [RandomMask("a", 16, 0.75), BlockMask("b", (4, 4), 8, 2), SemanticMask("c", 196, 0.75, 64, 8)]
    for stage in (None, 5):
        batch = Batch(ids, ids, epoch=2, parts={"c": labels})
        add_masks(batch, wanted, seed=3, schedule_epoch=stage)
        first = labels[:, 0].flatten(1).numpy()
        for one in wanted:
            expected = drawn(one, ids, 3, 2, parts=first, schedule_epoch=2 if stage is None else stage)
            for a, b in zip(batch.mask(one.name), expected, strict=True):
                assert torch.equal(a, b)
    inter = ((5 + 1) / 8) ** 2
    expected = oracle_masks.semantic_mask(
        labels[:, 0].flatten(1), ids, ratio=0.75, inter=inter, num_parts=64, seed=3, epoch=2
    )
    assert torch.equal(batch.masks["c"][1], expected[1])
    with pytest.raises(ConfigError, match="part labels of c are missing"):
        add_masks(Batch(ids, ids), wanted, seed=3)


def test_masks_move_with_the_batch():
    batch = Batch(torch.arange(4), torch.zeros(4))
    with pytest.raises(ValueError, match="the batch has no mask of the views 'a'; give what makes the batches"):
        batch.mask("a")
    add_masks(batch, [RandomMask("a", 16, 0.75)], seed=0)
    kept, masked = batch.map(lambda value: value[1:3]).mask("a")
    assert torch.equal(kept, batch.masks["a"][0][1:3])
    assert torch.equal(masked, batch.masks["a"][1][1:3])
    assert batch.to("meta").mask("a")[0].device.type == "meta"
