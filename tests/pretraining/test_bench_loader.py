"""`fastssl bench loader` with a recipe: what it reads is what that recipe's training would get."""

import json

import pytest

from fastssl.cli import main
from fastssl.loaders import batch_pool
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.ffcv_loader import FFCVLoader
from fastssl.loaders.synthetic import draw_images
from fastssl.pretraining import bench_loader

RECIPE = """
method: semmae
model: {image_size: 32, patch_size: 8}
data: {batch_size: 6, workers: 1}
views: {main: {size: 32}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    drawn = draw_images(folder / "images", train=10, val=0)
    convert(ConvertOptions(str(drawn / "train"), str(folder / "a.beton"), parts=str(drawn / "parts" / "train")))
    return str(folder / "a.beton")


@pytest.fixture
def command(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return [
        "bench",
        "loader",
        "--config",
        str(tmp_path / "recipe.yaml"),
        "--seconds",
        "0.02",
        "--engine",
        "ffcv,reference",
    ]


@pytest.fixture
def seen(monkeypatch):
    """The batches that came to the photometric operations."""
    batches = []
    monkeypatch.setattr(bench_loader, "augment", lambda batch: batches.append(batch) or batch)
    return batches


def test_a_recipes_views_masks_and_part_labels_are_measured(data, command, seen, capsys, monkeypatch):
    if batch_pool.available():
        monkeypatch.setattr(FFCVLoader, "_fill", None)  # nothing is done image by image
    assert main([*command, "--data", data, "--rounds=2", "--views.main.size", "24", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["env"]["batch"], result["env"]["workers"]) == (6, 1)
    stages = {(row["case"], row["engine"], row["stage"]) for row in result["rows"]}
    assert {
        ("recipe", "ffcv", "masks"),
        ("recipe", "ffcv", "photometric"),
        ("recipe-uint8", "reference", "overall"),
    } <= stages
    assert {case for case, _, _ in stages} == {"recipe", "recipe-uint8"}
    assert err.count("round 1 of 2") == err.count("round 2 of 2") == 4
    for batch in seen:
        assert batch.views["main"].shape[1:] == (1, 3, 24, 24)
        assert batch.parts["main"].shape[1:] == (1, 3, 3)
        assert [len(side[0]) for side in batch.masks["main"]] == [2, 7]
    assert max(len(batch) for batch in seen) == 10  # of the stages
    assert seen[0].id.max() >= 10  # an epoch has some batches, however few the images


def test_an_interrupted_run_keeps_its_rows(data, command, monkeypatch, capsys):
    def augment(batch):
        calls.append(len(batch))
        if len(calls) > 40:
            raise KeyboardInterrupt
        return batch

    calls: list[int] = []
    monkeypatch.setattr(bench_loader, "augment", augment)
    assert main([*command, "--data", data, "--rounds=1000"]) == 130
    assert "round 1 of 1000" in capsys.readouterr().err


def test_without_images_some_are_drawn(command, seen, monkeypatch, capsys):
    monkeypatch.setattr(bench_loader, "DRAWN", 8)
    assert main([*command, "--case=recipe", "--rounds=1"]) == 0
    assert "no images are named (--data): 8 are drawn" in capsys.readouterr().err
    assert seen


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--case", "recipe", "--engine", "torchvision-pil"],
            "torchvision-pil is left out of recipe: it knows none of",
        ),
        (["--views.main.sise", "24"], "unknown key 'views.main.sise'; did you mean 'views.main.size'?"),
    ],
)
def test_messages(data, command, more, words, capsys):
    assert main([*command, "--data", data, *more]) == 2
    assert words in capsys.readouterr().err
    assert main(["bench", "loader", "--data", data, "--case", "recipe"]) == 2
    assert "case is 'recipe'; it must be given with a recipe (--config, --method)" in capsys.readouterr().err
