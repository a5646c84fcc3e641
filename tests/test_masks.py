import zlib

import numpy as np
import pytest
import torch

from fastssl.loaders.philox import random_words
from fastssl.masks import kept_patches, philox, random_mask


def mask(ids, patches=196, ratio=0.75, seed=0, epoch=0):
    return random_mask(torch.as_tensor(ids), patches, ratio, seed=seed, epoch=epoch)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_makes_the_same_masks_without_waiting():
    ids = torch.tensor([0, 5, 2**32 - 1], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = mask(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(ours, mask(ids.cpu()), strict=True):
        assert torch.equal(a.cpu(), b)
