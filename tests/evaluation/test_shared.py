"""Images of val that are in data are found, however the two lie on the disk; every command refuses them."""

import json
import zlib

import numpy as np
import pytest
from PIL import Image
from tiny import draw_classes, save_checkpoint

from fastssl.cli import main
from fastssl.config import Model
from fastssl.evaluation.shared import crc32_before, shared_images
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.sources import open_source

VIT = Model(name="vit_tiny", image_size=16, patch_size=8, width=24, depth=2, heads=2)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folders of JPEGs, and .beton files of them. val has two images of train, one of them in another class, and one
    that ends like one of train and is as long."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for name, count in (("train", 9), ("val", 6)):
        for i in range(count):
            path = root / name / f"class{i % 3}" / f"{name}{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (20, 18, 3), dtype=np.uint8)).save(path, quality=80)
    (root / "val/class0/copy.jpg").write_bytes((root / "train/class0/train3.jpg").read_bytes())
    (root / "val/class2/moved.jpg").write_bytes((root / "train/class1/train4.jpg").read_bytes())
    near = bytearray((root / "train/class2/train5.jpg").read_bytes())
    near[40] ^= 1  # in a table of the header
    (root / "val/class2/near.jpg").write_bytes(near)
    for name in ("train", "val"):
        convert(ConvertOptions(str(root / name), str(root / f"{name}.beton"), workers=1))
        for shard in "01":
            convert(
                ConvertOptions(str(root / name), str(root / f"{name}-{shard}.beton"), shard=f"{shard}/2", workers=1)
            )
        (root / f"{name}-alone.beton").write_bytes((root / f"{name}.beton").read_bytes())
    return root


@pytest.mark.parametrize("val", ["val", "val.beton", "val-[01].beton", "val-alone.beton"])
@pytest.mark.parametrize("train", ["train", "train.beton", "train-[01].beton", "train-alone.beton"])
def test_images_of_both_are_found(train, val, sets):
    data, judged = open_source(str(sets / train)), open_source(str(sets / val))
    names = open_source(str(sets / "train")).files, open_source(str(sets / "val")).files  # in the same order
    found = {(names[0][i], names[1][j]) for i, j in shared_images(data, judged)}
    assert found == {("class0/train3.jpg", "class0/copy.jpg"), ("class1/train4.jpg", "class2/moved.jpg")}


def test_a_checksum_in_common_by_chance_is_not_the_same_image(sets, monkeypatch):
    monkeypatch.setattr(
        "fastssl.evaluation.shared._Images.checksums", lambda self: np.zeros(len(self.lengths), np.uint32)
    )
    data, judged = open_source(str(sets / "train.beton")), open_source(str(sets / "val.beton"))
    names = open_source(str(sets / "train")).files, open_source(str(sets / "val")).files
    found = {(names[0][i].split("/")[1], names[1][j].split("/")[1]) for i, j in shared_images(data, judged)}
    assert found == {("train3.jpg", "copy.jpg"), ("train4.jpg", "moved.jpg"), ("train5.jpg", "near.jpg")}


def test_a_checksum_less_its_last_bytes():
    data, last = [b"", b"ab", bytes(range(256))], np.random.default_rng(0).integers(0, 256, (3, 8)).astype(np.uint8)
    whole = [zlib.crc32(one + end.tobytes()) for one, end in zip(data, last, strict=True)]
    assert crc32_before(np.array(whole, np.uint32), last).tolist() == [zlib.crc32(one) for one in data]


@pytest.mark.parametrize("protocol", ["knn", "linear", "attentive", "finetune"])
def test_every_protocol_refuses_them_unless_told(protocol, sets, tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "last.pt", VIT)
    arguments = ["evaluate", protocol, checkpoint, f"--data={sets}/train", f"--val={sets}/val.beton", "--device=cpu"]
    assert main(arguments) == 1
    words = f"2 of 9 images of val ({sets}/val.beton) are in data ({sets}/train) too, e.g. val.beton["
    error = capsys.readouterr().err
    assert words in error
    assert "--allow_shared true" in error
    if protocol == "knn":
        assert main([*arguments, "--allow_shared", "--workers=1", "--json"]) == 0
        assert words in capsys.readouterr().err


def test_segment_and_detect_refuse_them(tmp_path, capsys):
    checkpoint = save_checkpoint(tmp_path / "last.pt", VIT)
    draw_classes(tmp_path / "images", 2, 0)
    pictures = sorted((tmp_path / "images").rglob("*.png"))
    for name in ("a", "b"):
        for sub in ("images", "labels"):
            (tmp_path / name / sub).mkdir(parents=True)
        for i, picture in enumerate(pictures):
            (tmp_path / name / "images" / f"{name}{i}.png").write_bytes(picture.read_bytes())
            Image.fromarray(np.eye(20, 18, dtype=np.uint8)).save(tmp_path / name / "labels" / f"{name}{i}.png")
    folders = [f"--data={tmp_path}/a", f"--val={tmp_path}/b", "--device=cpu", "--warmup_steps=0", "--crop=16"]
    assert main(["evaluate", "segment", checkpoint, *folders]) == 1
    assert "2 of 2 images of val" in capsys.readouterr().err

    box = [2, 2, 9, 9]
    outline = {"bbox": box, "iscrowd": 0, "segmentation": [[2, 2, 11, 2, 11, 11, 2, 11]], "category_id": 1}
    for name in ("a", "b"):
        images = [{"id": i, "file_name": f"images/{name}{i}.png", "height": 20, "width": 18} for i in range(2)]
        objects = [{**outline, "id": i, "image_id": i} for i in range(2)]
        content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "box"}]}
        (tmp_path / name / "set.json").write_text(json.dumps(content))
    files = [f"--data={tmp_path}/a/set.json", f"--val={tmp_path}/b/set.json", "--device=cpu"]
    assert main(["evaluate", "detect", checkpoint, *files]) == 1
    assert "2 of 2 images of val" in capsys.readouterr().err
