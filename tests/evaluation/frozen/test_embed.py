"""`fastssl embed`: the table is the features, the list names its rows, the sheet shows neighbours."""

import csv
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.cli import main
from fastssl.config import Model
from fastssl.evaluation.frozen.embed import _write_list, embed_batch, nearest, place
from fastssl.evaluation.frozen.features import extract, write_table
from fastssl.loaders.loader import BadSampleError
from fastssl.loaders.sources import open_source
from fastssl.models import build_backbone
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint
from fastssl.weights.backbone import open_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five images of two colours in two classes, and a checkpoint."""
    root = tmp_path_factory.mktemp("embed")
    for i in range(5):
        name = ("blue", "red")[i % 2]
        (root / "images" / name).mkdir(parents=True, exist_ok=True)
        colour = (200 - 9 * i, 30, 40) if name == "red" else (40, 30, 200 - 9 * i)
        Image.new("RGB", (40, 40), colour).save(root / "images" / name / f"{i}.png")
    torch.manual_seed(0)
    model = Model("vit_tiny", 32, 8, 32, 1, 2)
    method = {f"encoder.{key}": value for key, value in build_backbone(model).state_dict().items()}
    config = {"model": vars(model), "run": {"seed": 0}, "monitor": {"mean_patch": True}}
    checkpoint.write(root / "c.pt", Checkpoint("pretrain", config, method, "encoder.", step=1))
    return root


def test_table_list_and_sheet(folder, tmp_path, capsys):
    out = tmp_path / "new" / "cifar"
    command = ["embed", str(folder / "c.pt"), str(folder / "images"), str(out), "--dtype=float32", "--sheet=2"]
    assert main([*command, "--batch-size=2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["images"], result["width"]) == (5, 64)
    backbone, source = open_backbone(folder / "c.pt").module, open_source(str(folder / "images"))
    table = np.load(f"{out}.npy")
    assert table.dtype == np.float32
    expected = extract(backbone, source, size=32, mean_patch=True, workers=1).values.numpy()
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-6)
    with open(f"{out}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(range(5))
    assert [row["class"] for row in rows] == ["blue"] * 3 + ["red"] * 2
    assert rows[4]["name"].endswith("red/3.png")
    sheet = np.asarray(Image.open(f"{out}.png")).astype(int)
    side = 32 * 3 + 2
    (rows,) = (abs(sheet[:, 40] - [40, 30, 200]).max(-1) < 20).nonzero()  # the queries are blue
    cells = sheet[[rows[40], rows[-40]], 40::side]  # one pixel of each picture: [2 queries, query and 4 others, 3]
    assert cells.shape == (2, 5, 3)
    red = cells[..., 0] > cells[..., 2]
    assert red[:, 0].tolist() == [False, False]  # images 0 and 2 of the folder's order are blue
    assert red[0].tolist() == [False, False, False, True, True]  # its own colour first
    assert {path.name for path in out.parent.iterdir()} == {
        f"cifar{end}" for end in (".npy", ".csv", ".png", "-map.png")
    }
    assert result["note"] == ""


def test_half_precision_and_no_sheet(folder, tmp_path, capsys):
    assert main(["embed", str(folder / "c.pt"), str(folder / "images"), str(tmp_path / "a"), "--sheet=0"]) == 0
    assert np.load(tmp_path / "a.npy").dtype == np.float16
    assert not (tmp_path / "a.png").exists()
    assert "5 images, 64 numbers each" in capsys.readouterr().out


def test_parts_that_are_merged_are_the_files_of_one_job(folder, tmp_path, capsys):
    def run(out: str, *more: str) -> int:
        return main(["embed", str(folder / "c.pt"), str(folder / "images"), out, "--batch-size=2", "--map=4", *more])

    one, out = str(tmp_path / "one"), str(tmp_path / "out")
    assert run(one) == 0
    for part in ("2/3", "0/3", "1/3", "0/3"):  # the first one twice
        assert run(out, f"--shard={part}") == 0
    with open(f"{out}.2-of-3.csv", newline="") as file:
        assert [row["index"] for row in csv.DictReader(file)] == ["4"]
    assert np.array_equal(np.load(f"{out}.1-of-3.npy"), np.load(f"{one}.npy")[2:4])
    assert run(out, "--merge=3") == 0
    for end in (".npy", ".csv", ".png", "-map.png"):
        assert Path(f"{one}{end}").read_bytes() == Path(f"{out}{end}").read_bytes()

    assert run(out, "--shard=1/3", "--precision=bf16") == 0
    with open(f"{out}.2-of-3.npy", "r+b") as damaged:
        damaged.seek(200)
        damaged.write(b"x")
    for more, words in (
        (["--merge=3"], "of 3 parts 2 are missing, damaged or .* run them again: --shard 1/3, 2/3$"),
        (["--merge=3", "--blocks=2"], "--shard 0/3, 1/3, 2/3$"),
        (["--merge=4"], "5 images are 3 batches of 2, which cannot be 4 parts"),
        (["--merge=2", "--shard=0/2"], "merge is 2; it must be 0 where shard is set"),
    ):
        assert run(out, *more) > 0
        assert re.search(words, capsys.readouterr().err.strip())


def test_images_in_memory_have_the_numbers_of_the_data_set(folder, tmp_path):
    backbone, source = open_backbone(folder / "c.pt"), open_source(str(folder / "images"))
    files = [Path(source.file(i)) for i in range(5)]
    expected = extract(backbone.module, source, size=32, mean_patch=True, batch_size=5).values.numpy()
    images = [files[0].read_bytes(), np.array(Image.open(files[1])), *(file.read_bytes() for file in files[2:])]
    found = embed_batch(backbone, images)
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)

    images[1], images[3] = b"text", images[3][:50]
    bad: list[tuple[int, str]] = []
    found = embed_batch(backbone, images, bad=bad)
    assert [(i, reason.split(" (")[0][:12]) for i, reason in sorted(bad)] == [(1, "is not an im"), (3, "is truncated")]
    assert np.isnan(found[[1, 3]]).all()
    np.testing.assert_allclose(found[[0, 2, 4]], expected[[0, 2, 4]], rtol=1e-6)
    with pytest.raises(BadSampleError, match=r"image 1\) is not an image"):
        embed_batch(backbone, images[:3])
    with pytest.raises(ValueError, match=r"image 0 is float32 \(8, 8, 3\); pixels are uint8"):
        embed_batch(backbone, [np.zeros((8, 8, 3), np.float32)])


def test_nearest_against_a_loop():
    values = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    for own in (np.array([3, 17]), None):
        similar, found = nearest(values, 2 * values[[3, 17]], 4, own)
        for row, near, query in zip(found.tolist(), similar.tolist(), (3, 17), strict=True):
            cosine = [torch.cosine_similarity(values[query], other, dim=0).item() for other in values]
            order = sorted((i for i in range(30) if own is None or i != query), key=lambda i: -cosine[i])
            assert row == order[:4]
            assert near == pytest.approx([cosine[i] for i in row], abs=1e-6)


def test_like_features_lie_together_on_the_map():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 60, generator=generator)
    values = centres.repeat_interleave(20, 0) + 0.1 * torch.randn(60, 60, generator=generator)
    points = torch.from_numpy(place(values))
    assert points.shape == (60, 2)
    distance = torch.cdist(points, points).fill_diagonal_(torch.inf)
    assert (distance.argmin(1) // 20 == torch.arange(60) // 20).all()


def test_a_network_that_gives_every_image_the_same_has_a_map_of_one_point():
    assert not place(torch.ones(40, 64)).any()


def test_the_map_is_left_out_in_a_line_where_its_library_is_missing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    assert main(["embed", str(folder / "c.pt"), str(folder / "images"), str(tmp_path / "a")]) == 0
    assert "note: no map, for sklearn.manifold is not installed: pip install" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy", "a.csv", "a.png"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["c.pt", "images"], 2, "OUT"),
        (["none.pt", "images", "out"], 1, "no such checkpoint"),
        (["c.pt", "nothing", "out"], 1, "does not exist"),
        (["c.pt", "images", "c.pt/out"], 1, "cannot be written"),
        (["c.pt", "images", "out", "--size=20"], 2, "multiple of model.patch_size"),
    ],
)
def test_messages(folder, arguments, code, words, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["embed", *arguments]) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    assert not (folder / "out.npy").exists()


def test_no_cell_of_the_list_is_a_formula_and_odd_names_are_written(tmp_path):
    for name in ("=HYPERLINK(1)", "+1", "\udcff\n", "plain"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name / "a.png")
    _write_list(tmp_path / "list.csv", open_source(str(tmp_path / "in")), np.arange(4))
    with open(tmp_path / "list.csv", newline="", encoding="utf-8") as file:
        assert [row["class"] for row in csv.DictReader(file)] == ["'+1", "'=HYPERLINK(1)", "plain", "\\xff\\n"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_called_that():
    with pytest.raises(OSError, match="No space left on device"):
        write_table(Path("/dev/full"), [np.zeros((100, 100), np.float32)])


def test_the_table_is_numpys(tmp_path):
    for kind in (np.float16, np.float32):
        table = np.arange(6, dtype=kind).reshape(2, 3)
        write_table(tmp_path / "a.npy", [table[:1], table[1:]])
        np.save(tmp_path / "b.npy", table)
        assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
