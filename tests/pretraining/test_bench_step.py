"""`fastssl bench step`: its parts add up to the step, all contenders are measured, the run's folder is not touched."""

import json

import pytest

from fastssl.cli import main
from fastssl.loaders.synthetic import draw_images

TINY = [
    "--method=dino",
    "--model.name=vit_tiny",
    "--model.image_size=32",
    "--model.patch_size=8",
    "--model.width=32",
    "--model.depth=1",
    "--model.heads=2",
    "--views.global1.size=32",
    "--views.global2.size=32",
    "--views.local.size=16",
    "--views.local.count=2",
    "--dino.out_dim=64",
    "--dino.head_hidden=32",
    "--data.batch_size=8",
    "--data.workers=1",
    "--run.device=cpu",
    "--run.threads=1",
    "--bench.steps=2",
    "--bench.warmup=1",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return draw_images(tmp_path_factory.mktemp("images"), train=24, val=8) / "train"


def test_parts_add_up_to_the_step(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    assert main(["bench", "step", *TINY, f"--data.path={images}", f"--run.dir={run}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["kernels"] for row in result["rows"]] == ["auto", "reference"]
    for row in result["rows"]:
        assert {"data", "augment", "forward", "backward", "optimizer", "ema", "other"} <= set(row["parts"])
        assert row["images_per_s"] == pytest.approx(8 / row["milliseconds"] * 1000)
        assert sum(row["parts"].values()) == pytest.approx(row["milliseconds"], rel=1e-6)
        assert 0 < row["mfu"] < 2
        assert row["memory"] > 1e7
        assert row["launches"] > 200
        assert 0 < row["host"] < 10 * row["milliseconds"]
        assert sum(row["operations"].values()) > 100
    assert result["run"]["images_per_step"] == 8
    assert not run.exists()
    assert list(tmp_path.iterdir()) == []


def test_one_contender_on_one_batch(images, capsys):
    more = ["--bench.kernels=reference", "--bench.repeat_batch=true", "--bench.rounds=1"]
    assert main(["bench", "step", *TINY, f"--data.path={images}", *more]) == 0
    table = capsys.readouterr().out
    assert "dino with vit_tiny, 8 images per step" in table
    assert {"data", "backward", "step", "images/s", "MFU", "peak memory", "launches", "host ms"} <= {
        line[:16].strip() for line in table.splitlines()
    }
    (only,) = [line.split() for line in table.splitlines() if line.startswith("ms per step")]
    assert only[3:] == ["reference"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "data.path is empty"),
        (["--bench.kernels=fast"], "bench.kernels is 'fast'; it must be of auto, reference, triton"),
        (["--bench.step=3"], "unknown key 'bench.step'; did you mean 'bench.steps'?"),
        (["--bench.rounds=0"], "bench.rounds"),
    ],
)
def test_messages(more, words, capsys):
    assert main(["bench", "step", *TINY, *more]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
