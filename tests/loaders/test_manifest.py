"""Manifests: written by conversions in any order, opened, changed, and verified against the files that they name."""

import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from PIL import Image

from fastssl.cli import main
from fastssl.loaders import cache, manifest
from fastssl.loaders.beton import SideFile
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.manifest import ChangeOptions, MakeOptions, add, after_conversion, make, read_manifest
from fastssl.loaders.sources import SourceError, open_source
from fastssl.pretraining.identity import identity

NAMES = [f"train-{k}.beton" for k in range(3)]


def picture(k) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (8, 9 + k, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def pack(path, first, count=2, classes=2):
    with tarfile.open(path, "w") as archive:
        for k in range(first, first + count):
            for name, data in ((f"{k}.jpg", picture(k)), (f"{k}.cls", b"%d" % (k % classes))):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for k in range(9):
        (root / "ab"[k // 5]).mkdir(exist_ok=True)
        (root / "ab"[k // 5] / f"{k}.jpg").write_bytes(picture(k))
    return root


def shards(folder, where, numbers=(0, 1, 2), **options):
    where.mkdir(exist_ok=True)
    for k in numbers:
        convert(ConvertOptions(str(folder), str(where / NAMES[k]), shard=f"{k}/3", workers=1, **options))
    return where


@pytest.fixture
def split(folder, tmp_path):
    return shards(folder, tmp_path / "split")


def test_a_conversion_writes_its_manifest(folder, tmp_path):
    convert(ConvertOptions(str(folder), str(tmp_path / "train.beton"), workers=1))
    assert sorted(os.listdir(tmp_path)) == ["train.beton", "train.beton.json", "train.beton.npz"]
    named, file = open_source(tmp_path / "train.beton.json"), open_source(tmp_path / "train.beton")
    assert (named.classes, named.labels.tolist()) == (["a", "b"], [0] * 5 + [1] * 4)
    assert named.read(7).data.tobytes() == file.read(7).data.tobytes()
    assert (identity(named), named.fingerprint()) == (identity(file), file.fingerprint())
    convert(ConvertOptions(str(folder), str(tmp_path / "train.beton"), workers=1, max_resolution=8, overwrite=True))
    assert len(open_source(tmp_path / "train.beton.json")) == 9  # of the new file


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)], ids=str)
def test_the_last_shard_writes_the_manifest_of_all(folder, tmp_path, order):
    where = shards(folder, tmp_path / "split", order[:2])
    assert not list(where.glob("*.json"))
    shards(folder, where, order[2:])
    (path,) = where.glob("*.json")
    assert path.name == "train.shards.json"
    entries = read_manifest(str(path)).shards
    assert [(entry.name, entry.images) for entry in entries] == list(zip(NAMES, [3, 3, 3], strict=True))
    assert identity(open_source(path)) == identity(open_source(where / "train-*.beton"))
    assert identity(open_source(path)) == identity(open_source(where / "train-{0..2}.beton"))
    data = path.read_bytes()
    path.unlink()
    with ThreadPoolExecutor(3) as pool:  # whoever sees all writes the same
        assert list(pool.map(after_conversion, [str(where / name) for name in NAMES])) == [""] * 3
    assert path.read_bytes() == data
    assert sorted(os.listdir(where)) == sorted([*NAMES, *(f"{name}.npz" for name in NAMES), path.name])


def test_a_manifest_that_somebody_changed_is_left(split, folder, capsys):
    path = str(split / "train.shards.json")
    assert main(["manifest", "drop", path, "train-1*"]) == 0
    data = (split / "train.shards.json").read_bytes()
    shards(folder, split, [2], overwrite=True)
    assert "train.shards.json names other shards and was left as it is" in capsys.readouterr().err
    assert (split / "train.shards.json").read_bytes() == data
    (split / "train.shards.json").write_text("{}")
    assert "is no manifest" in after_conversion(str(split / NAMES[0]))
    assert (split / "train.shards.json").read_text() == "{}"


def test_shards_are_dropped_and_appended(split, folder, tmp_path, capsys):
    path = str(split / "train.shards.json")
    assert main(["manifest", "drop", path, NAMES[0]]) == 0
    assert open_source(path).labels.tolist() == [0, 0, 1, 1, 1, 1]  # no shard of the conversion is missed
    convert(ConvertOptions(str(folder), str(tmp_path / "more.beton"), workers=1))
    assert main(["manifest", "add", path, str(split / NAMES[0]), str(tmp_path / "more.beton"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [entry["name"] for entry in said["shards"]] == [NAMES[1], NAMES[2], NAMES[0], "../more.beton"]
    assert open_source(path).labels.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0] + [0] * 5 + [1] * 4
    assert main(["manifest", "show", path]) == 0
    assert "18 images in 2 classes, 4 beton shards" in capsys.readouterr().out
    assert main(["verify", path, "--workers", "1"]) == 0


def test_shards_that_are_missing_or_of_two_divisions_are_told_of(split, folder, tmp_path, caplog):
    for k in range(2):
        convert(ConvertOptions(str(folder), str(tmp_path / f"half-{k}.beton"), shard=f"{k}/2", workers=1))
    halves, thirds = [str(tmp_path / f"half-{k}.beton") for k in range(2)], [str(split / name) for name in NAMES]
    for files, line in {
        (*thirds,): "",
        (*thirds[:2],): "m.json lacks shard 2 of 3 (counted from 0)",
        (halves[0], *thirds[2:]): "which are not shards of the same conversion",
    }.items():
        caplog.clear()
        make(MakeOptions(str(tmp_path / "m.json"), list(files), overwrite=True))
        assert bool(caplog.messages) == bool(line)
        assert line in caplog.text


def test_a_side_file_may_go(split, caplog):
    SideFile.path_of(split / NAMES[1]).unlink()
    assert open_source(split / "train.shards.json").classes == ["a", "b"]
    assert "has no side file" in caplog.text


def swap(where):
    for end in ("", ".npz"):
        os.replace(where / f"{NAMES[0]}{end}", where / "x")
        os.replace(where / f"{NAMES[1]}{end}", where / f"{NAMES[0]}{end}")
        os.replace(where / "x", where / f"{NAMES[1]}{end}")


def cut(where):
    os.truncate(where / NAMES[1], 1000)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda where: (where / NAMES[1]).unlink(), "train-1.beton cannot be read: No such file or directory"),
        (cut, "train-1.beton is truncated or has a damaged header"),
        (swap, "train-0.beton has 8390"),
    ],
)
def test_opening_and_verify_name_the_shard_that_is_not_the_manifests(split, capsys, damage, reason):
    damage(split)
    with pytest.raises(SourceError, match=reason.replace(".", r"\.")):
        open_source(split / "train.shards.json")
    assert main(["verify", str(split / "train.shards.json"), "--workers", "1"]) == 1
    assert reason.partition(" cannot")[0] in capsys.readouterr().out


def test_tars(tmp_path, monkeypatch, capsys):
    for k in range(6):
        pack(tmp_path / f"t-{k}.tar", 2 * k)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    monkeypatch.chdir(tmp_path)
    assert main(["manifest", "make", "m.json", "t-{0..1}.tar"]) == 0
    assert "m.json: 4 images in 2 classes, 2 tar shards" in capsys.readouterr().out
    (tmp_path / "classes.txt").unlink()
    source = open_source("m.json")
    assert (source.classes, source.labels.tolist()) == (["a", "b"], [0, 1, 0, 1])
    assert identity(source) == identity(open_source("t-{0,1}.tar"))
    with ThreadPoolExecutor(4) as pool:  # an array of jobs
        list(pool.map(lambda k: add(ChangeOptions("m.json", [f"t-{k}.tar"])), range(2, 6)))
    assert sorted(entry.name for entry in read_manifest("m.json").shards) == [f"t-{k}.tar" for k in range(6)]
    assert main(["verify", "m.json", "--workers", "1"]) == 0
    pack(tmp_path / "t-1.tar", 7)
    assert main(["verify", "m.json", "--workers", "1"]) == 1
    assert "t-1.tar has the checksum" in capsys.readouterr().out
    with pytest.raises(SourceError, match=r"m.json: t-1.tar has the checksum \w+, but \w+ in the manifest"):
        open_source("m.json")


def test_in_a_store(split, tmp_path):
    files = fsspec.filesystem("memory")
    for name in os.listdir(split):
        files.pipe_file(f"/m/{name}", (split / name).read_bytes())
    files.pipe_file("/m/t-0.tar", open(pack(tmp_path / "t-0.tar", 3), "rb").read())  # noqa: SIM115
    cache.use(str(tmp_path / "cache"))
    try:
        local, source = open_source(split / "train.shards.json"), open_source("memory://m/train.shards.json")
        assert identity(source) == identity(local)
        assert source.read(8).data.tobytes() == local.read(8).data.tobytes()
        assert main(["manifest", "drop", "memory://m/train.shards.json", NAMES[0]]) == 0
        assert open_source("memory://m/train.shards.json").labels.tolist() == [0, 0, 1, 1, 1, 1]
        assert main(["manifest", "make", "memory://m/t.json", "memory://m/t-*.tar"]) == 0
        assert open_source("memory://m/t.json").labels.tolist() == [1, 0]
        with pytest.raises(SourceError, match=r"cannot name .*t-0.tar, which does not lie in its folder"):
            make(MakeOptions("memory://other/t.json", ["memory://m/t-0.tar"]))
    finally:
        cache.use("none")
        files.rm("/m", recursive=True)


WRONG = {
    "x.txt must end in .json": ["make", "x.txt", "t.tar"],
    "m.json exists already": ["make", "m.json", "t.tar"],
    "m.json: t.tar is there already, as t.tar": ["add", "m.json", "t.tar"],
    "m.json: copy.tar is there already, as t.tar": ["add", "m.json", "copy.tar"],
    "m.json names tar shards, not train-0.beton": ["add", "m.json", "train-0.beton"],
    "a data set is tars, or .beton files, not both": ["make", "n.json", "t.tar", "train-0.beton"],
    "n.json: train-0.beton and other.beton have different classes": ["make", "n.json", "train-0.beton", "other.beton"],
    "train.json: other.beton has other classes than the manifest": ["add", "train.json", "other.beton"],
    "three.tar[0] 2.jpg has label 2, but there are 2 class names": ["add", "m.json", "three.tar"],
    "m.json has no shard u.tar": ["drop", "m.json", "u.tar"],
    "m.json would have no shards left": ["drop", "m.json", "*"],
    "none.json cannot be read: No such file or directory": ["show", "none.json"],
    "coco.json is no manifest of a data set": ["show", "coco.json"],
    "damaged.json is a damaged manifest": ["show", "damaged.json"],
    "away.json names the shard '/etc/t.tar', which is not relative to it": ["show", "away.json"],
}


@pytest.fixture(scope="module")
def workshop(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("workshop")
    shards(folder, root, [0])
    make(MakeOptions(str(root / "train.json"), [str(root / NAMES[0])]))
    (root / "other").mkdir()
    os.symlink(folder / "a", root / "other" / "c")
    convert(ConvertOptions(str(root / "other"), str(root / "other.beton"), workers=1))
    data = open(pack(root / "t.tar", 0), "rb").read()  # noqa: SIM115
    (root / "copy.tar").write_bytes(data)
    pack(root / "three.tar", 2, 1, classes=3)
    (root / "classes.txt").write_text("a\nb\n")
    make(MakeOptions(str(root / "m.json"), [str(root / "t.tar")]))
    (root / "coco.json").write_text('{"images": []}')
    text = (root / "m.json").read_text()
    (root / "damaged.json").write_text(text.replace('"images": 2', '"images": "2"'))
    (root / "away.json").write_text(text.replace('"t.tar"', '"/etc/t.tar"'))
    return root


@pytest.mark.parametrize("reason", WRONG)
def test_what_is_wrong_is_one_line_and_changes_nothing(workshop, monkeypatch, capsys, reason):
    monkeypatch.chdir(workshop)
    before = {path: path.read_bytes() for path in workshop.glob("*.json")}
    assert main(["manifest", *WRONG[reason]]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert {path: path.read_bytes() for path in workshop.glob("*.json")} == before


def test_names():
    assert manifest.shards_name(["train-000.beton", "train-001.beton"]) == "train.shards.json"
    assert manifest.shards_name(["cifar10-0.beton", "cifar10-1.beton"]) == "cifar10.shards.json"
    assert manifest.shards_name(["0.beton", "1.beton"]) == "all.shards.json"
