"""`fastssl embed`: the table is the features, the list names its rows, the sheet shows neighbours."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.cli import main
from fastssl.config import Model
from fastssl.evaluation.frozen.embed import nearest
from fastssl.evaluation.frozen.features import extract
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
    cells = sheet[40::side, 40::side]  # one pixel of each picture: [2 queries, query and 4 others, 3]
    assert cells.shape == (2, 5, 3)
    red = cells[..., 0] > cells[..., 2]
    assert red[:, 0].tolist() == [False, False]  # images 0 and 2 of the folder's order are blue
    assert red[0].tolist() == [False, False, False, True, True]  # its own colour first
    assert {path.name for path in out.parent.iterdir()} == {"cifar.npy", "cifar.csv", "cifar.png"}


def test_half_precision_and_no_sheet(folder, tmp_path, capsys):
    assert main(["embed", str(folder / "c.pt"), str(folder / "images"), str(tmp_path / "a"), "--sheet=0"]) == 0
    assert np.load(tmp_path / "a.npy").dtype == np.float16
    assert not (tmp_path / "a.png").exists()
    assert "5 images, 64 numbers each" in capsys.readouterr().out


def test_nearest_against_a_loop():
    values = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    found = nearest(values, np.array([3, 17]), 4)
    for row, query in zip(found.tolist(), (3, 17), strict=True):
        cosine = [torch.cosine_similarity(values[query], other, dim=0).item() for other in values]
        order = sorted((i for i in range(30) if i != query), key=lambda i: -cosine[i])
        assert row == order[:4]


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
