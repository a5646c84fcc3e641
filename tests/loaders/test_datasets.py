"""Data sets by name: tiny files laid out as torchvision has them come out of the converter as they went in."""

import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from fastssl.cli import main
from fastssl.loaders.convert import ConvertError, ConvertOptions, convert
from fastssl.loaders.datasets import open_named
from fastssl.loaders.sources import SourceError, decode, open_source


@pytest.fixture(autouse=True)
def _any_checksum(monkeypatch):
    for part in (torchvision.datasets.stl10, torchvision.datasets.cifar):
        monkeypatch.setattr(part, "check_integrity", lambda path, *_: os.path.exists(path))


def pixels(count, side, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def lay_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir()
    counts = {"train": 5, "test": 3, "unlabeled": 4}
    for seed, (split, count) in enumerate(counts.items()):
        pixels(count, 96, seed).transpose(0, 3, 2, 1).tofile(folder / f"{split}_X.bin")  # columns first, as MATLAB
        (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(folder / f"{split}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"kind{i}" for i in range(10)))


def lay_cifar10(root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        data = pixels(2, 32, i).transpose(0, 3, 1, 2).reshape(2, -1)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [i, 9 - i]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"kind{i}" for i in range(10)]}))


def lay_cifar100(root):
    folder = root / "cifar-100-python"
    folder.mkdir()
    for i, name in enumerate(("train", "test")):
        data = pixels(3, 32, i).transpose(0, 3, 1, 2).reshape(3, -1)
        (folder / name).write_bytes(pickle.dumps({"data": data, "fine_labels": [7, i, 99]}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"kind{i}" for i in range(100)]}))


def lay_pets(root):
    folder = root / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for k, name in enumerate(("Abyssinian_1", "great_dane_2")):
        Image.fromarray(pixels(1, 40, k)[0]).save(folder / "images" / f"{name}.jpg")
    lines = ["Abyssinian_1 1 1 1\n", "great_dane_2 2 2 1\n"]
    (folder / "annotations" / "trainval.txt").write_text("".join(lines))
    (folder / "annotations" / "test.txt").write_text("".join(reversed(lines)))


def lay_imagenet(root):
    torch.save(({"n01": ("tench",), "n02": ("goldfish", "carp")}, ["n02"]), root / "meta.bin")
    for split, wnid in (("train", "n01"), ("train", "n02"), ("val", "n01"), ("val", "n02")):
        (root / split / wnid).mkdir(parents=True)
        Image.fromarray(pixels(1, 40, 3)[0]).save(root / split / wnid / "a.jpg")


LAY = {"stl10": lay_stl10, "cifar10": lay_cifar10, "cifar100": lay_cifar100, "pets": lay_pets, "imagenet": lay_imagenet}


def run(tmp_path, name, **options):
    root = tmp_path / "set"
    if not root.exists():
        root.mkdir()
        LAY[name.lower()](root)
    out = tmp_path / "out.beton"
    convert(ConvertOptions(f"{name}:{root}", str(out), workers=2, overwrite=True, **options))
    return open_source(str(out)), root


def images_of(source):
    return np.stack([decode(source.read(i)) for i in range(len(source))])


@pytest.mark.parametrize(
    ("split", "parts", "labels"),
    [
        ("", ["train"], [0, 1, 2, 3, 4]),
        ("test", ["test"], [0, 1, 2]),
        ("unlabeled", ["unlabeled"], [-1] * 4),
        ("train+unlabeled", ["train", "unlabeled"], [0, 1, 2, 3, 4, *[-1] * 4]),
    ],
)
def test_stl10(tmp_path, split, parts, labels):
    source, _ = run(tmp_path, "STL10", split=split, mode="raw")
    seeds = {"train": (5, 0), "test": (3, 1), "unlabeled": (4, 2)}
    expected = np.concatenate([pixels(count, 96, seed) for count, seed in (seeds[part] for part in parts)])
    assert np.array_equal(images_of(source), expected)
    assert source.labels.tolist() == labels
    assert source.classes == [f"kind{i}" for i in range(10)]
    assert source.name(1).endswith(f"{split or 'train'}/000001")


def test_cifar10(tmp_path):
    source, _ = run(tmp_path, "cifar10", mode="raw")
    assert np.array_equal(images_of(source), np.concatenate([pixels(2, 32, i) for i in range(5)]))
    assert source.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    source, _ = run(tmp_path, "cifar10", split="test", mode="raw")
    assert np.array_equal(images_of(source), pixels(2, 32, 5))


def test_cifar100_in_shards_and_as_jpeg(tmp_path):
    source, _ = run(tmp_path, "CIFAR100", split="test", shard="1/3", mode="raw")
    assert np.array_equal(images_of(source), pixels(3, 32, 1)[1:2])
    assert (source.labels.tolist(), len(source.classes)) == ([1], 100)
    source, _ = run(tmp_path, "CIFAR100", split="test", quality=95)
    assert source.read(0).mode == "jpg"


def test_files_of_pets_and_imagenet_are_copied(tmp_path):
    source, root = run(tmp_path, "pets")
    names = ("Abyssinian_1", "great_dane_2")
    for i, name in enumerate(names):
        file = root / "oxford-iiit-pet" / "images" / f"{name}.jpg"
        assert source.read(i).data.tobytes() == file.read_bytes()
    assert (source.classes, source.labels.tolist()) == (["Abyssinian", "Great Dane"], [0, 1])
    assert source.name(0).endswith("oxford-iiit-pet/images/Abyssinian_1.jpg")
    source, _ = run(tmp_path, "pets", split="test")
    assert source.labels.tolist() == [1, 0]


def test_imagenet_has_the_classes_of_its_folders(tmp_path):
    for split in ("train", "val"):
        source, root = run(tmp_path, "ImageNet", split=split)
        folder = open_source(str(root / split))
        assert source.classes == folder.classes == ["n01", "n02"]
        assert source.labels.tolist() == folder.labels.tolist()
        assert source.name(0).endswith(f"{split}/n01/a.jpg")


def test_the_command(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    lay_stl10(tmp_path / "set")
    out = tmp_path / "a.beton"
    assert main(["convert", f"stl10:{tmp_path / 'set'}", str(out), "--split", "train+unlabeled", "--workers", "1"]) == 0
    assert "9 images in 10 classes" in capsys.readouterr().out


def test_paths_are_paths(tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    assert open_named(str(folder)) is None
    assert open_named("train/a:b") is None
    for change in ({"split": "test"}, {"download": True}):
        with pytest.raises(SourceError, match="is a path; split and download are for data sets by name"):
            open_named(str(folder), **change)


@pytest.mark.parametrize(
    ("src", "options", "message"),
    [
        ("stl11:/nowhere", {}, r"no data set is known as 'stl11' \(known: stl10, cifar10"),
        ("stl10:/nowhere", {"split": "val"}, "stl10 has no split 'val'; it has train, test, unlabeled"),
        ("stl10:/nowhere", {}, "/nowhere does not hold stl10 as torchvision stores it .*; --download true fetches it"),
        ("Pets:/nowhere", {}, "/nowhere does not hold Pets as torchvision stores it"),
        ("imagenet:/nowhere", {"download": True}, "ImageNet cannot be downloaded"),
        ("imagenet:/nowhere", {}, r"/nowhere does not hold imagenet .*\)$"),
    ],
)
def test_what_is_not_there(tmp_path, src, options, message):
    with pytest.raises(ConvertError, match=message):
        convert(ConvertOptions(src, str(tmp_path / "a.beton"), **options))
    assert list(tmp_path.iterdir()) == []
