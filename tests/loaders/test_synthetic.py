import json

import numpy as np
from PIL import Image

from fastssl.loaders.synthetic import CLASSES, PART_GRID, PARTS, box_of, draw_image, draw_images, part_maps, run_lengths


def test_the_same_seed_draws_the_same_set_and_another_does_not(tmp_path):
    first = draw_images(tmp_path / "a", train=8, val=4, seed=5)
    second = draw_images(tmp_path / "b", train=8, val=4, seed=5)
    third = draw_images(tmp_path / "c", train=8, val=4, seed=6)
    names = sorted(p.relative_to(first) for p in first.rglob("*.*"))
    assert len(names) == 12 * 3 + 3
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names)
    assert any((first / n).read_bytes() != (third / n).read_bytes() for n in names if n.suffix == ".jpg")


def test_every_image_has_class_box_mask_and_parts_that_agree(tmp_path):
    folder = draw_images(tmp_path, train=16, val=0)
    lines = [json.loads(line) for line in (folder / "annotations.jsonl").read_text().splitlines()]
    assert sorted({line["class"] for line in lines}) == sorted(CLASSES)
    sizes = set()
    for line in lines:
        stem = line["file"].removesuffix(".jpg").removeprefix("train/")
        image, mask = Image.open(folder / line["file"]), np.asarray(Image.open(folder / f"masks/train/{stem}.png"))
        sizes.add(image.size)
        assert mask.shape == image.size[::-1]
        assert set(np.unique(mask)) <= {0, 1, 2}
        left, top, width, height = line["box"]
        outside = mask.copy()
        outside[top : top + height, left : left + width] = 0
        assert outside.sum() == 0
        parts = np.load(folder / f"parts/train/{stem}.npy")
        assert parts.shape == (len(PARTS), PART_GRID, PART_GRID)
        assert abs(parts.astype(int).sum(0) - 255).max() <= 2
    assert len(sizes) > 8


def test_run_lengths_go_down_the_columns_and_start_outside():
    assert run_lengths(np.array([[0, 1, 1], [0, 0, 1]], bool)) == [2, 1, 1, 2]
    assert run_lengths(np.ones((2, 2), bool)) == [0, 4]
    assert run_lengths(np.zeros((2, 3), bool)) == [6]


def test_part_maps_and_box_of_a_known_mask():
    mask = np.zeros((28, 56), np.uint8)
    mask[0:14, 0:28] = 1
    mask[2:4, 4:8] = 2
    assert box_of(mask) == (0, 0, 14, 28)
    maps = part_maps(mask)
    assert maps[2, 1, 1] == 255
    assert maps[1, 0, 0] == 255
    assert maps[0, 13, 13] == 255


def test_train_and_val_share_no_picture():
    train = [draw_image(0, seed=0, number=n)[0] for n in range(0, 20, 2)]
    val = [draw_image(0, seed=0, number=n)[0] for n in range(1, 20, 2)]
    assert not any(a.shape == b.shape and np.array_equal(a, b) for a in train for b in val)
