"""The Ray programs of docs/cluster, and `convert_shard` on rows that Ray Data has: a task that dies is run again."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import save_checkpoint

from fastssl.config import Model
from fastssl.evaluation.frozen.embed import embed_batch
from fastssl.loaders.convert import ConvertOptions, convert, convert_shard, shards_of
from fastssl.loaders.sources import open_source
from fastssl.weights.backbone import open_backbone

ray = pytest.importorskip("ray", reason="the package ray is not installed")
pytest.importorskip("pyarrow", reason="the package pyarrow, which Ray Data needs, is not installed")

pytestmark = pytest.mark.slow

PROGRAMS = Path(__file__).parents[2] / "docs" / "cluster"
TOTAL = 3


@pytest.fixture(scope="module")
def cluster():
    """Ray on two CPUs, whose workers find the programs and this file."""
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{PROGRAMS}:{here}:{here.parent}")
        patch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        patch.syspath_prepend(str(PROGRAMS))
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """30 small JPEGs in two classes, one of them cut, and the files that `fastssl convert` makes of them."""
    root = tmp_path_factory.mktemp("ray")
    for k in range(30):
        path = root / "images" / f"class {k % 2}" / f"{k:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(path)
    os.truncate(root / "images" / "class 0" / "04.jpg", 300)
    for k in range(TOTAL):
        options = {"shard": f"{k}/{TOTAL}", "max_resolution": 44, "max_bad": 1, "workers": 1}
        convert(ConvertOptions(str(root / "images"), str(root / f"expected-{k}.beton"), **options))
    return root / "images"


def same_files(images: Path, made: list[Path]) -> bool:
    pairs = zip(sorted(images.parent.glob("expected-*.beton")), made, strict=True)
    return all(
        Path(f"{a}{end}").read_bytes() == Path(f"{b}{end}").read_bytes() for a, b in pairs for end in ("", ".npz")
    )


def test_convert(cluster, images, tmp_path, capsys):
    """A file that is gone is made again, and no other; of another number of files all of them."""
    main = importlib.import_module("ray_convert").main
    how = ConvertOptions(max_resolution=44, max_bad=1)
    main(str(images), str(tmp_path / "train"), TOTAL, how)
    said = capsys.readouterr().out
    assert "\n  class 0/04.jpg is truncated" in said
    made = sorted(tmp_path.glob("train-*.beton"))
    assert same_files(images, made)
    source = open_source(str(tmp_path / "train.json"))
    assert [source.name(i).split(" ", 1)[1] for i in range(29)] == [
        name for name in open_source(str(images)).files if name != "class 0/04.jpg"
    ]
    made[1].unlink()
    before = made[0].stat().st_mtime_ns
    main(str(images), str(tmp_path / "train"), TOTAL, how)
    assert same_files(images, made)
    assert made[0].stat().st_mtime_ns == before
    main(str(images), str(tmp_path / "train"), 2, how)
    assert len(open_source(str(tmp_path / "train.json"))) == 29


def write(group: dict, shards: list, out: str) -> dict:
    """The rows of one planned file, in any order. Its task dies once, when half of it is written."""
    shard = shards[int(group["shard"][0])]
    names = [os.path.relpath(path, group["root"][0]) for path in group["path"]]
    stored = dict(zip(names, group["bytes"], strict=True))

    def read(name: str) -> bytes:
        marker = Path(f"{out}.died")
        if shard.index == 1 and name == shard.names[5] and not marker.exists():
            marker.touch()
            os._exit(1)
        return stored[name]

    done = convert_shard(shard, read, f"{out}-{shard.index}.beton")
    return {"shard": [shard.index], "images": [done.images]}


def test_rows_of_a_data_set_and_a_task_that_dies(cluster, images, tmp_path):
    source, out = open_source(str(images)), str(tmp_path / "a")
    how = ConvertOptions(max_resolution=44, max_bad=1)
    shards = shards_of(source.files, source.labels, source.classes, TOTAL, how)
    shard_of = {os.path.join(images, name): shard.index for shard in shards for name in shard.names}
    rows = ray.data.read_binary_files(str(images), include_paths=True).map(
        lambda row: {**row, "root": str(images), "shard": shard_of[row["path"]]}
    )
    done = rows.groupby("shard").map_groups(write, fn_args=(shards, out), num_cpus=1).take_all()
    assert Path(f"{out}.died").exists()
    assert {row["shard"]: row["images"] for row in done} == {0: 9, 1: 10, 2: 10}
    assert same_files(images, [Path(f"{out}-{k}.beton") for k in range(TOTAL)])
    assert not list(tmp_path.glob("*.partial"))


def test_embed(cluster, images, tmp_path):
    """Every image once, with `embed_batch`'s numbers; the cut one keeps its row."""
    model = save_checkpoint(tmp_path / "c.pt", Model("vit_tiny", 32, 8, 32, 1, 2))
    importlib.import_module("ray_embed").main(model, str(images), str(tmp_path / "out"), 1, gpu=False)
    rows = {row["path"]: row for row in ray.data.read_parquet(str(tmp_path / "out")).take_all()}
    source = open_source(str(images))
    assert sorted(rows) == sorted(source.file(i) for i in range(30))
    backbone = open_backbone(model)
    for path, row in rows.items():
        bad: list[tuple[int, str]] = []
        expected = embed_batch(backbone, [Path(path).read_bytes()], bad=bad)[0]
        np.testing.assert_allclose(row["features"], expected, rtol=1e-5, atol=1e-6)
        assert row["fault"] == (bad[0][1] if bad else "")
        assert np.isnan(expected).all() == path.endswith("04.jpg")
