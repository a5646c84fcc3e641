import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from fastssl.batch import Photometric
from fastssl.config import ConfigError, View
from fastssl.loaders.draw import check_views, draw, draw_all
from fastssl.loaders.philox import random_words

FULL = dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_p=0.8, gray=0.2, blur=0.5, solarize=0.2)
GLOBAL = View(name="global", count=2, size=224, scale=(0.4, 1.0), **FULL)
LOCAL = View(name="local", count=8, size=96, scale=(0.05, 0.4), **FULL)
SEED = dict(seed=3, epoch=5)


def samples(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 600, n), rng.integers(1, 600, n), rng.integers(0, 2**32, n)


def assert_same(a, b):
    assert np.array_equal(a.box, b.box)
    assert np.array_equal(a.flip, b.flip)
    assert (a.photometric is None) == (b.photometric is None)
    for key in a.photometric or {}:
        assert np.array_equal(a.photometric[key], b.photometric[key]), key


def rows(drawn, chosen):
    photometric = {key: value[chosen] for key, value in drawn.photometric.items()}
    return replace(drawn, box=drawn.box[chosen], flip=drawn.flip[chosen], photometric=photometric)


def crop_of_one(view, height, width, sample, crop):
    """One crop, with plain Python arithmetic and torchvision's rule, from the words that the module's table names."""
    words = [[int(w) for w in random_words(3, f"view/{view.name}", sample, 5, crop, block)] for block in range(6)]
    pairs = [(words[block][k], words[block][k + 1]) for block in range(5) for k in (0, 2)]
    low, high = (math.log(r) for r in view.ratio)
    for first, second in pairs:
        area = height * width * (view.scale[0] + (view.scale[1] - view.scale[0]) * first / 2**32)
        ratio = math.exp(low + (high - low) * second / 2**32)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return words[5][0] * (height - h + 1) >> 32, words[5][1] * (width - w + 1) >> 32, h, w
    if width / height < view.ratio[0]:
        w, h = width, round(width / view.ratio[0])
    elif width / height > view.ratio[1]:
        w, h = round(height * view.ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def test_boxes_follow_the_rule_of_random_resized_crop():
    heights, widths, ids = samples(300)
    wide = View(name="wide", count=3, scale=(0.3, 1.0))
    box = draw(wide, heights, widths, ids=ids, **SEED).box
    assert box.dtype == np.int64
    fallback = 0
    for b in range(len(ids)):
        for crop in range(3):
            expected = crop_of_one(wide, int(heights[b]), int(widths[b]), int(ids[b]), crop)
            assert tuple(box[b, crop]) == expected
            fallback += not 3 / 4 - 0.1 < widths[b] / heights[b] < 4 / 3 + 0.1
    assert fallback > 100  # long images, on which most tries fail


def test_boxes_lie_inside():
    heights, widths, ids = samples(5000)
    heights[:50], widths[:50] = 1, 1
    top, left, height, width = draw(LOCAL, heights, widths, ids=ids, **SEED).box.transpose(2, 0, 1)
    assert min(top.min(), left.min()) == 0
    assert min(height.min(), width.min()) == 1
    assert ((top + height) <= heights[:, None]).all()
    assert ((left + width) <= widths[:, None]).all()


def test_boxes_are_distributed_like_torchvisions():
    n = 4000
    torch.manual_seed(0)
    ours = draw(View(name="v"), np.full(n, 300), np.full(n, 400), ids=np.arange(n), **SEED).box[:, 0]
    image = torch.empty(3, 300, 400)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    for column in range(4):
        spread = theirs[:, column].std() * math.sqrt(2 / n)
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 5 * spread
        assert ours[:, column].std() == pytest.approx(theirs[:, column].std(), rel=0.1)


def test_squash_draws_in_the_squashed_frame():
    heights, widths, ids = samples(50)
    view = View(name="v", squash=64, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert (draw(view, heights, widths, ids=ids, **SEED).box == [0, 0, 64, 64]).all()


def test_a_sample_is_drawn_alike_in_any_batch():
    heights, widths, ids = samples(64)
    whole = draw(LOCAL, heights, widths, ids=ids, **SEED)
    chosen = np.array([40, 3, 17])
    assert_same(draw(LOCAL, heights[chosen], widths[chosen], ids=ids[chosen], **SEED), rows(whole, chosen))


def test_groups_do_not_touch_each_other():
    heights, widths, ids = samples(32)
    both = draw_all([GLOBAL, LOCAL], heights, widths, ids=ids, **SEED)
    changed = replace(GLOBAL, count=3, scale=(0.1, 0.2), blur=1.0)
    turned = draw_all([LOCAL, changed], heights, widths, ids=ids, **SEED)
    assert_same(both["local"], turned["local"])
    assert not np.array_equal(both["global"].box[:, 0], both["local"].box[:, 0])


def test_more_crops_leave_the_first_ones_alone():
    heights, widths, ids = samples(32)
    few, many = (draw(replace(LOCAL, count=n), heights, widths, ids=ids, **SEED) for n in (2, 8))
    assert np.array_equal(many.box[:, :2], few.box)
    assert np.array_equal(many.photometric["factor"][:, :2], few.photometric["factor"])


@pytest.mark.parametrize("change", [dict(seed=4), dict(epoch=6)])
def test_seed_and_epoch_change_everything(change):
    heights, widths, ids = samples(32)
    a = draw(LOCAL, heights, widths, ids=ids, **SEED)
    b = draw(LOCAL, heights, widths, ids=ids, **{**SEED, **change})
    assert not np.array_equal(a.box, b.box)
    assert not np.array_equal(a.flip, b.flip)
    for key in a.photometric:
        assert not np.array_equal(a.photometric[key], b.photometric[key]), key


def test_draws_never_change():
    """Runs that resume after an update of the package or of numpy rely on these numbers."""
    drawn = draw(LOCAL, np.array([300]), np.array([400]), ids=np.array([7]), seed=0, epoch=0)
    assert drawn.box[0, 0].tolist() == [141, 114, 96, 112]
    assert drawn.photometric["order"][0, 0].tolist() == [2, 0, 1, 3]


def test_same_crop_shares_geometry_and_nothing_else():
    heights, widths, ids = samples(200)
    small = replace(GLOBAL, name="small", size=112, same_crop_as="global", scale=(0.01, 0.02), flip=0.0)
    drawn = draw_all([small, GLOBAL], heights, widths, ids=ids, **SEED)
    assert np.array_equal(drawn["small"].box, drawn["global"].box)
    assert np.array_equal(drawn["small"].flip, drawn["global"].flip)
    assert not np.array_equal(drawn["small"].photometric["factor"], drawn["global"].photometric["factor"])


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([replace(LOCAL, same_crop_as="globall")], "views.local.same_crop_as is 'globall'; there is no such group"),
        ([GLOBAL, replace(LOCAL, same_crop_as="global")], "views.local.count is 8; it must be 2, as in global"),
        ([LOCAL, replace(LOCAL, name="b", squash=96, same_crop_as="local")], "views.b.squash is 96; it must be 0"),
        (
            [replace(LOCAL, same_crop_as="b"), replace(LOCAL, name="b", same_crop_as="local")],
            "local -> b -> local goes round in a circle",
        ),
        ([replace(LOCAL, same_crop_as="local")], "local -> local goes round"),
        ([LOCAL, LOCAL], "different, non-empty names"),
        ([View()], "different, non-empty names"),
    ],
)
def test_groups_that_do_not_fit_together_are_named(views, message):
    with pytest.raises(ConfigError, match=message):
        check_views(views)


def test_photometric_parameters_have_the_types_of_the_batch():
    heights, widths, ids = samples(16)
    drawn = draw(LOCAL, heights, widths, ids=ids, **SEED).photometric
    assert set(drawn) == set(Photometric.__dataclass_fields__)
    types = {key: (value.dtype.name, value.shape) for key, value in drawn.items()}
    assert types == {
        "jitter": ("bool", (16, 8)),
        "order": ("int64", (16, 8, 4)),
        "factor": ("float32", (16, 8, 4)),
        "gray": ("bool", (16, 8)),
        "blur_sigma": ("float32", (16, 8)),
        "solarize": ("float32", (16, 8)),
    }


def test_photometric_parameters_follow_the_view():
    n = 4000
    view = View(name="v", jitter=(0.4, 1.5, 0.2, 0.1), jitter_p=0.8, gray=0.2, blur=0.5, blur_sigma=(0.5, 1.5),
                solarize=0.1, solarize_threshold=100, flip=0.3)  # fmt: skip
    drawn = draw(view, np.full(n, 50), np.full(n, 50), ids=np.arange(n), **SEED)
    p = {key: value[:, 0] for key, value in drawn.photometric.items()}
    share = {"flip": drawn.flip.mean(), "jitter": p["jitter"].mean(), "gray": p["gray"].mean(),
             "blur": (p["blur_sigma"] > 0).mean(), "solarize": (p["solarize"] == 100).mean()}  # fmt: skip
    for key, expected in dict(flip=0.3, jitter=0.8, gray=0.2, blur=0.5, solarize=0.1).items():
        assert share[key] == pytest.approx(expected, abs=5 * math.sqrt(0.25 / n)), key
    assert set(p["solarize"]) == {100, 256}
    sigma = p["blur_sigma"][p["blur_sigma"] > 0]
    assert 0.5 <= sigma.min() < 0.52
    assert 1.48 < sigma.max() <= 1.5
    for i, (low, high) in enumerate([(0.6, 1.4), (0.0, 2.5), (0.8, 1.2), (-0.1, 0.1)]):
        assert low <= p["factor"][:, i].min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < p["factor"][:, i].max() <= np.float32(high)
    orders, counts = np.unique(p["order"], axis=0, return_counts=True)
    assert len(orders) == 24
    assert abs(counts - n / 24).max() < 5 * math.sqrt(n / 24)
    bits = np.stack([drawn.flip[:, 0], p["jitter"], p["gray"], p["blur_sigma"] > 0, p["solarize"] < 256])
    assert abs(np.corrcoef(bits) - np.eye(5)).max() < 5 / math.sqrt(n)


def test_group_without_photometric_operations_has_none():
    heights, widths, ids = samples(4)
    assert draw(View(name="v"), heights, widths, ids=ids, **SEED).photometric is None
    idle = View(name="v", jitter_p=1.0)
    assert draw(idle, heights, widths, ids=ids, **SEED).photometric is None


def test_probability_one_is_certain_and_zero_never():
    n = 2000
    view = View(name="v", flip=1.0, jitter=(0.1, 0, 0, 0), jitter_p=1.0, gray=1.0, blur=0.0, solarize=0.0)
    drawn = draw(view, np.full(n, 9), np.full(n, 9), ids=np.arange(n), **SEED)
    assert drawn.flip.all()
    assert drawn.photometric["jitter"].all()
    assert drawn.photometric["gray"].all()
    assert not drawn.photometric["blur_sigma"].any()
    assert (drawn.photometric["solarize"] == 256).all()
