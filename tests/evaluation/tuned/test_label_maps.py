"""Folders of images and label pictures: pairing, reading, messages; crops whose labels stay on their pixels."""

import colorsys
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.config import ConfigError
from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.tuned.label_maps import (
    IGNORED,
    Crop,
    balanced,
    cut,
    distort,
    normalise,
    open_labelled_folder,
    read_labels,
    resized,
    saturate,
)


def write(folder, labels, names=("a", "sub/b"), size=None):
    """Gray images and the same label picture for each."""
    for name in names:
        for kind, ending in (("images", ".jpg"), ("labels", ".png")):
            path = folder / kind / f"{name}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = size or labels.shape[:2]
            picture = np.full((height, width, 3), 99, np.uint8) if kind == "images" else labels
            Image.fromarray(picture).save(path)
    return str(folder)


def square(value=1, side=8):
    labels = np.zeros((side, side), np.uint8)
    labels[:2] = value
    return labels


def test_pairs_by_relative_path(tmp_path):
    path = write(tmp_path, square(2))
    data = open_labelled_folder(path, "", "data")
    assert [p.name for p in data.images] == ["a.jpg", "b.jpg"]
    apart = open_labelled_folder(f"{path}/images", f"{path}/labels", "data")
    assert apart == data
    picture, labels = data.pair(1, 3)
    assert picture.shape == (3, 8, 8)
    assert labels.dtype == torch.int64
    assert labels.tolist() == square(2).tolist()
    assert read_labels(data, 0, 1) == 3


@pytest.mark.parametrize("kind", ["labels", "annotations", "masks"])
def test_label_folder_has_one_of_three_names(tmp_path, kind):
    write(tmp_path, square())
    (tmp_path / "labels").rename(tmp_path / kind)
    assert len(open_labelled_folder(str(tmp_path), "", "data")) == 2


def test_ignored_and_shifted_labels(tmp_path):
    labels = np.array([[0, 1, 150, 255]], np.uint8)
    path = write(tmp_path, labels)
    plain = open_labelled_folder(path, "", "data").label_map(0)
    assert plain.tolist() == [[0, 1, 150, IGNORED]]
    shifted = open_labelled_folder(path, "", "data", reduce_zero_label=True)
    assert shifted.label_map(0).tolist() == [[IGNORED, 0, 149, IGNORED]]
    other = open_labelled_folder(path, "", "data", ignore=1).label_map(0)
    assert other.tolist() == [[0, IGNORED, 150, 255]]
    with pytest.raises(EvaluationError, match=r"a\.png has label 150 in 1 pixels; labels are 1 to 149"):
        shifted.pair(0, 149)


@pytest.mark.parametrize(
    ("found", "how", "words"),
    [
        ((0, 255), {}, "hold the values 0,255, of which 255 does not count (--ignore): no class indices 0, 1, 2, ..; .*"
                       "--values [0,255] for classes 0 to 1"),
        ((0, 128), {}, "hold the values 0,128: .*--values [0,128] for classes 0 to 1, or how many there are with"),
        ((1, 200, 255), {}, "hold the values 1,200,255, of which 255 does not count"),
        ((0, 65535), {}, "hold the values 0,65535: "),
        ((0, 1, 255), {"reduce_zero_label": True}, "hold the values 0,1, of which 0 does not count"),
        ((0, 7, 255), {"values": (0, 255)}, "has value 7 in 8 pixels, which is neither among --values [0,255] nor"),
        ((0, 128), {"classes": 2}, "has label 128 in 8 pixels; .*--values says which other values mean classes"),
    ],
)  # fmt: skip
def test_values_that_are_no_class_indices_are_refused_with_what_maps_them(found, how, words, tmp_path):
    classes = how.pop("classes", 0)
    labels = np.repeat(np.array(found, np.uint16 if max(found) > 255 else np.uint8), 8).reshape(len(found), 8)
    data = open_labelled_folder(write(tmp_path, labels), "", "data", **how)
    with pytest.raises(EvaluationError, match=".*".join(map(re.escape, words.split(".*")))):
        read_labels(data, classes, 1)


def test_values_are_mapped_to_classes(tmp_path):
    data = open_labelled_folder(
        write(tmp_path, np.array([[0, 255, 9, 40]], np.uint8)), "", "data", 9, values=(255, 0, 40)
    )
    assert data.label_map(0).tolist() == [[1, 0, IGNORED, 2]]
    assert read_labels(data, 3, 1) == 3
    assert [data.value(label) for label in (IGNORED, 0, 1, 2)] == [9, 255, 0, 40]


def test_palette_and_16_bit_pictures_give_indices(tmp_path):
    path = write(tmp_path, square(), names=("a",))
    data = open_labelled_folder(path, "", "data")
    palette = Image.fromarray(square(1)).convert("P")
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.save(tmp_path / "labels" / "a.png")
    assert data.label_map(0).tolist() == square(1).tolist()
    Image.fromarray(square(1).astype(np.uint16) * 300).save(tmp_path / "labels" / "a.png")
    assert data.label_map(0).max() == 300


def test_messages(tmp_path):
    path = write(tmp_path, square(7))
    data = open_labelled_folder(path, "", "val")
    with pytest.raises(EvaluationError, match=r"a\.png has label 7 in 16 pixels; labels are 0 to 6, and 255"):
        data.pair(0, 7)
    with pytest.raises(EvaluationError, match="has label 7 in 16 pixels"):
        read_labels(data, 5, 1)
    Image.new("L", (9, 8)).save(data.labels[0])
    with pytest.raises(EvaluationError, match=r"a\.jpg has 8 x 8 pixels, what was drawn on it 9 x 8 \(label .*a\.png"):
        data.pair(0, 8)
    Image.new("RGB", (8, 8)).save(data.labels[0])
    with pytest.raises(EvaluationError, match=r"a\.png is a colour picture"):
        data.label_map(0)
    data.labels[0].write_bytes(b"nothing")
    with pytest.raises(EvaluationError, match=r"a\.png is not an image"):
        data.label_map(0)
    data.labels[0].unlink()
    with pytest.raises(EvaluationError, match=r"1 of 2 images .* the first is a\.jpg: expected .*a\.png"):
        open_labelled_folder(path, "", "val")
    data.images[0].write_bytes(data.images[0].read_bytes()[:100])
    with pytest.raises(EvaluationError, match=r"a\.jpg "):
        data.picture(0, torch.zeros(8, 8))


def test_messages_about_folders(tmp_path):
    with pytest.raises(ConfigError, match=r"val is .* does not hold the folders images and labels; .*--val_labels"):
        open_labelled_folder(str(tmp_path), "", "val")
    with pytest.raises(ConfigError, match=r"val_labels is .* not a folder"):
        open_labelled_folder(str(tmp_path), str(tmp_path / "no"), "val")
    with pytest.raises(ConfigError, match="has no images in it"):
        open_labelled_folder(str(tmp_path), str(tmp_path), "val")
    path = write(tmp_path, np.full((4, 4), 255, np.uint8))
    with pytest.raises(EvaluationError, match=r"no pixel .* counts"):
        read_labels(open_labelled_folder(path, "", "val"), 0, 1)


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [((683, 1024), 512, 2048, (512, 768)), ((100, 1000), 512, 2048, (205, 2048)), ((360, 480), 96, 1000, (96, 128))],
)
def test_resized(size, short, long, expected):
    assert resized(*size, short, long) == expected
    assert resized(*size[::-1], short, long) == expected[::-1]


# -- crops -----------------------------------------------------------------------------------------------------------


def stripes(height=60, width=80):
    """An image that shows its labels: label k is gray 40 k, in stripes five pixels wide."""
    labels = (torch.arange(width) // 5 % 6).expand(height, width).clone()
    return (labels * 40).to(torch.uint8).expand(3, -1, -1).clone(), labels


def how(**changes):
    return Crop(**{"side": 32, "short_side": 60, "long_side": 200, "scale": (1.0, 1.0), "distort": False, **changes})


def test_labels_stay_on_their_pixels():
    picture, labels = stripes()
    seen = set()
    for number in range(20):
        view, target = cut(picture, labels, how(), seed=0, epoch=3, number=number)
        assert view.shape == (3, 32, 32)
        assert target.shape == (32, 32)
        torch.testing.assert_close(view, normalise((target * 40).expand(3, -1, -1)))
        seen.add(tuple(target[0].tolist()))
    assert len(seen) > 10


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_labels_stay_on_their_pixels_at_other_scales(factor):
    picture = torch.zeros(3, 60, 80, dtype=torch.uint8)
    picture[:, :30, :40] = 240
    labels = (picture[0] > 0).long()
    agree = []
    for number in range(30):
        view, target = cut(picture, labels, how(scale=(factor, factor)), seed=0, epoch=0, number=number)
        inside = target != IGNORED
        agree.append(((view[0] > 0.0) == (target == 1))[inside].float().mean().item())
    assert min(agree) > 0.97


def test_small_images_are_filled_up():
    picture, labels = stripes(20, 24)
    view, target = cut(picture, labels, how(short_side=20, flip=0.0), seed=0, epoch=0, number=0)
    assert (target[:20, :24] == labels).all()
    assert (target[20:] == IGNORED).all()
    assert (target[:, 24:] == IGNORED).all()
    assert (view[:, 20:] == 0).all()
    assert (view[:, :, 24:] == 0).all()


def test_cut_is_a_function_of_seed_epoch_and_number():
    picture, labels = stripes()
    everything = how(scale=(0.5, 2.0), distort=True)

    def view(**changes):
        return cut(picture, labels, everything, **{"seed": 1, "epoch": 2, "number": 3, **changes})

    for a, b in zip(view(), view(), strict=True):
        assert torch.equal(a, b)
    for changes in ({"seed": 2}, {"epoch": 3}, {"number": 4}):
        assert not torch.equal(view()[0], view(**changes)[0])


def test_flips_and_scales_are_spread():
    picture = torch.zeros(3, 40, 40, dtype=torch.uint8)
    labels = torch.arange(40).expand(40, 40).clone()
    wide = how(side=200, short_side=40, scale=(0.5, 2.0))
    targets = [cut(picture, labels, wide, seed=0, epoch=0, number=n)[1] for n in range(200)]
    flips = sum(int(t[0, 0] > 20) for t in targets)
    sides = torch.tensor([int((t[:, 0] != IGNORED).sum()) for t in targets])
    assert 70 < flips < 130
    assert 20 <= sides.min() < 25
    assert 75 < sides.max() <= 80
    assert 45 < sides.float().mean() < 55


def test_balanced():
    def labels(*counts):
        return torch.cat([torch.full((n,), k - 1) for k, n in enumerate(counts)])  # the first number: ignored pixels

    assert balanced(labels(0, 74, 26))
    assert not balanced(labels(0, 75, 25))
    assert not balanced(labels(0, 100))
    assert not balanced(labels(50, 50))
    assert balanced(labels(900, 50, 0, 50))
    assert not balanced(labels(100))


def test_dominated_crops_are_drawn_anew():
    labels = torch.zeros(100, 100, dtype=torch.int64)
    labels[:50, :50] = 1  # most crops of 20 pixels see one class
    picture = torch.zeros(3, 100, 100, dtype=torch.uint8)
    small = how(side=20, short_side=100)
    shares = [balanced(cut(picture, labels, small, seed=0, epoch=0, number=n)[1]) for n in range(200)]
    chance = np.mean([balanced(labels[t : t + 20, s : s + 20]) for t in range(81) for s in range(81)])
    assert chance < 0.35
    assert np.mean(shares) == pytest.approx(1 - (1 - chance) ** 10 * (1 - chance), abs=0.06)


def test_saturate_is_that_of_hsv():
    torch.manual_seed(0)
    picture = torch.rand(3, 1, 50)
    for factor in (0.5, 1.0, 1.4):
        found = saturate(picture, factor)
        for before, after in zip(picture[:, 0].T.tolist(), found[:, 0].T.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*before)
            expected = colorsys.hsv_to_rgb(hue, min(saturation * factor, 1.0), value)
            assert after == pytest.approx(expected, abs=1e-5)
    black = torch.zeros(3, 2, 2)
    assert torch.equal(saturate(black, 1.5), black)


def test_distortion():
    torch.manual_seed(0)
    gray = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    means = torch.tensor([distort(gray, seed=0, epoch=0, number=n).mean() for n in range(400)])
    assert means.min() >= (100 - 32) * 0.5
    assert means.max() <= (100 + 32) * 1.5
    assert 0.2 < (means.sub(100).abs() < 0.01).float().mean() < 0.3  # neither brightness nor contrast
    assert abs(means.mean() - 100) < 5
    colour = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    views = torch.stack([distort(colour, seed=0, epoch=0, number=n) for n in range(100)])
    assert views.min() >= 0
    assert views.max() <= 255
    same = (views - colour).abs().flatten(1).amax(1) < 1e-3
    assert 1 <= same.sum() <= 16  # one in sixteen is left as it is


@pytest.mark.parametrize("sides", [(8, 8), (6, 10)])
def test_pictures_that_exif_turns_and_their_label_pictures_stay_together(tmp_path, sides):
    """The label picture of `b` was drawn on the stored pixels; `a` is not turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros(sides, np.uint8)
    stored[:3, :3] = 1
    for name, more in (("a", {}), ("b", {"exif": exif})):
        for folder, image, kw in (
            ("images", Image.fromarray(stored * 255), more),
            ("labels", Image.fromarray(stored), {}),
        ):
            (tmp_path / folder).mkdir(exist_ok=True)
            image.save(tmp_path / folder / f"{name}.png", **kw)
    (tmp_path / "images" / "notes.txt").touch()
    if sides[0] == sides[1]:
        unsaid = open_labelled_folder(str(tmp_path), "", "data")
        with pytest.raises(EvaluationError, match=r"b\.png is turned by EXIF \(orientation 6\).* --frame stored"):
            read_labels(unsaid, 2, 1)  # before training
    data = open_labelled_folder(str(tmp_path), "", "data", frame="stored" if sides[0] == sides[1] else "")
    assert read_labels(data, 2, 1) == 2
    for i in (0, 1):
        picture, labels = data.pair(i, 2)
        assert torch.equal(picture[0] > 0, labels > 0)
