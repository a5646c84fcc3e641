"""The compiled draws are those of `draw_all`, number for number."""

import numpy as np
import pytest

from fastssl.config import ConfigError, View
from fastssl.loaders.bench import DINO, SINGLE
from fastssl.loaders.draw import draw_all
from fastssl.loaders.draw_compiled import CompiledDraws

ODD = [
    View(name="a", count=2, scale=(0.4, 1.0), jitter=(0.4, 1.5, 0.2, 0.1), jitter_p=0.8, blur=0.5,
         blur_sigma=(0.3, 1.7), solarize=0.3, solarize_threshold=77.5, gray=0.1, flip=0.3),
    View(name="b", count=3, scale=(1e-4, 0.01), ratio=(0.1, 9.7), flip=1.0),
    View(name="c", count=2, squash=48, scale=(1.0, 1.0), ratio=(1.0, 1.0), gray=1.0),
    View(name="d", count=3, same_crop_as="b", solarize=0.5),
    View(name="e", scale=(0.9, 1.0), ratio=(3.0, 3.5), jitter=(0.0, 0.0, 0.0, 0.3), jitter_p=1.0),
    View(name="f", scale=(0.9, 1.0), ratio=(0.2, 0.25), jitter=(0.3, 0.0, 0.0, 0.0), jitter_p=0.0, flip=0.0),
    View(name="g", count=3, same_crop_as="d"),
]  # fmt: skip


def assert_same(mine, other):
    assert mine.keys() == other.keys()
    for name, drawn in other.items():
        ours = mine[name]
        for key in ("box", "flip"):
            a, b = getattr(ours, key), getattr(drawn, key)
            assert a.dtype == b.dtype
            assert np.array_equal(a, b), (name, key)
        assert (ours.photometric is None) == (drawn.photometric is None)
        for key, value in (drawn.photometric or {}).items():
            assert ours.photometric[key].dtype == value.dtype
            assert np.array_equal(ours.photometric[key], value), (name, key)


@pytest.mark.parametrize("views", [ODD, ODD[::-1], DINO, SINGLE], ids=["odd", "turned", "dino", "single"])
def test_every_number_is_draw_alls(views):
    rng = np.random.default_rng(0)
    for epoch, seed, largest in ((0, 0, 600), (7, 2**32 - 1, 3), (2**32 - 1, 5, 65535), (3, 1, 40)):
        n = 4000
        heights, widths = rng.integers(1, largest + 1, (2, n))
        ids = rng.integers(0, 2**32, n)
        mine = CompiledDraws(views, seed)(heights, widths, epoch=epoch, ids=ids)
        assert_same(mine, draw_all(views, heights, widths, seed=seed, epoch=epoch, ids=ids))


def test_an_empty_batch():
    nothing = np.empty(0, np.int64)
    drawn = CompiledDraws(ODD, 3)(nothing, nothing, epoch=0, ids=nothing)
    assert drawn["b"].box.shape == (0, 3, 4)


def test_groups_that_do_not_fit_together_are_named():
    with pytest.raises(ConfigError, match="there is no such group"):
        CompiledDraws([View(name="a", same_crop_as="b")], 0)
