"""Pictures: colours, covers, maps, sheets, and that a run draws them and goes on undisturbed."""

import numpy as np
import torch
from PIL import Image

from fastssl import pictures
from fastssl.batch import IMAGENET_MEAN, IMAGENET_STD
from fastssl.pictures import Sheet


def test_to_picture_undoes_the_normalisation():
    image = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(pictures.to_picture((image - mean) / std), image)
    assert pictures.to_picture(torch.full((3, 2, 2), 99.0)).max() == 1


def test_cover_paints_marked_cells_only():
    image = torch.rand(3, 4, 6)
    cells = torch.tensor([[True, False, False], [False, False, True]])
    covered = pictures.cover(image, cells)
    assert covered[:, :2, :2].eq(0.5).all()
    assert covered[:, 2:, 4:].eq(0.5).all()
    assert torch.equal(covered[:, :2, 2:], image[:, :2, 2:])
    assert torch.equal(covered[:, 2:, :4], image[:, 2:, :4])


def test_heat_is_yellow_at_the_peak_and_blue_at_the_bottom():
    out = pictures.heat(torch.zeros(3, 4, 4), torch.tensor([[5.0, 1.0], [1.0, 1.0]]), strength=1.0)
    assert out[:, 0, 0].tolist() == [1, 1, 0]
    torch.testing.assert_close(out[:, 3, 3], torch.tensor([0.0, 0.0, 0.6]))
    flat = pictures.heat(torch.zeros(2, 3, 4, 4), torch.ones(2, 2, 2))
    assert flat.isfinite().all()


def test_tint_has_a_colour_per_label_and_none_for_others():
    image = torch.rand(3, 2, 6)
    out = pictures.tint(image, torch.tensor([[0, 1, -1]]), 2, strength=1.0)
    assert not torch.allclose(out[:, 0, 0], out[:, 0, 2])
    torch.testing.assert_close(out[:, 0, 0], out[:, 1, 1])
    assert torch.equal(out[:, :, 4:], image[:, :, 4:])
    many = pictures.tint(torch.rand(5, 3, 4, 4), torch.zeros(5, 2, 2, dtype=torch.int64), 3)
    assert many.shape == (5, 3, 4, 4)


def test_sheet_and_file(tmp_path):
    rows = torch.arange(6.0).div(6).view(2, 3, 1, 1, 1).expand(2, 3, 3, 112, 112)
    path = tmp_path / "new" / "sheet.png"
    pictures.save(path, Sheet(rows))
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (226, 340, 3)
    assert [pixels[0, column, 0] for column in (0, 114, 228)] == [0, 42, 85]
    assert pixels[114, 228, 0] == round(255 * 5 / 6)
    assert (pixels[112:114] == 255).all()
    pictures.save(path, Sheet(torch.rand(1, 1, 3, 32, 32)))  # small ones are enlarged
    assert Image.open(path).size == (96, 96)


def test_words_stand_beside_their_pictures_and_cover_none():
    rows = torch.tensor([0.8, 0.2]).view(1, 2, 1, 1, 1).expand(2, 2, 3, 112, 112)
    words = {
        "titles": ["short", "a title that takes several lines, withanextremelylongwordthatnolinecanholdinonepiece"],
        "legend": [pictures.heat_key("where"), (None, "a line of text")],
        "captions": [["cat 0.9", "dog"], ["x" * 200, ""]],
    }
    bare = np.asarray(pictures.draw(Sheet(rows))).astype(int)
    for name in words:
        whole = np.asarray(pictures.draw(Sheet(rows, **{name: words[name]}))).astype(int)
        assert whole.shape[1] == (pictures.NARROWEST if name == "legend" else bare.shape[1])
        for column, level in ((50, 204), (170, 51)):
            line = (whole[:, column] == level).all(-1)
            assert line.sum() == 2 * 112  # both pictures, whole
        dark = (whole.max(-1) < 40).any(1)  # rows of pixels with letters
        first, last = np.flatnonzero((whole[:, 50] == 204).all(-1))[[0, -1]]
        assert {"titles": dark[:first].any(), "legend": dark[last + 1 :].any(), "captions": dark[first + 112 :].any()}[
            name
        ]
    bar = np.asarray(pictures.draw(Sheet(rows, legend=words["legend"])))[bare.shape[0] + 8]
    assert bar[0].tolist() == [0, 0, 153]  # the scale: from dark blue to yellow
    assert bar[pictures.SWATCH - 1].tolist() == [255, 255, 0]
    both = pictures.stack([("first", Sheet(rows)), ("a heading that is wider than the sheet below it", Sheet(rows))])
    assert both.height > 2 * bare.shape[0] + 40
    assert both.width > bare.shape[1]
