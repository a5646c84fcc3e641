"""`shards_of` and `convert_shard`: the files of `fastssl convert --shard`, whoever writes them, and however often."""

import io
import os
import pickle
import shutil
import tarfile
import tempfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from fastssl.loaders import convert as convert_module
from fastssl.loaders import store
from fastssl.loaders.convert import ConvertError, ConvertOptions, convert, convert_shard, shards_of
from fastssl.loaders.decode import DecodeError, read_file
from fastssl.loaders.sources import open_source, scan_folder

TOTAL = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 JPEGs and PNGs in two classes, of two sizes, one of them cut."""
    root = tmp_path_factory.mktemp("shards") / "images"
    for k in range(40):
        path = root / f"class {k % 2}" / f"{k:02d}.{'png' if k % 5 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((80 if k % 3 else 40, 30), Image.Resampling.BICUBIC).save(path)
    os.truncate(root / "class 1" / "11.jpg", 200)
    return root


def plan(folder, **how):
    found = scan_folder(folder)
    return shards_of(found.files, found.labels, found.classes, TOTAL, ConvertOptions(max_bad=1, **how))


def pair(path) -> list[bytes]:
    return [path.read_bytes(), path.with_name(f"{path.name}.npz").read_bytes()]


@pytest.mark.parametrize("how", [{}, {"max_resolution": 60, "mode": "proportion", "check": "decode"}])
def test_the_files_are_those_of_the_command(folder, tmp_path, how):
    """From a plan that went to another process and back, its images read in another way."""
    stored = {file: (folder / file).read_bytes() for file in scan_folder(folder).files}
    seen, bad = [], []
    for shard in pickle.loads(pickle.dumps(plan(folder, **how))):
        done = convert_shard(shard, stored.__getitem__, tmp_path / f"a-{shard.index}.beton")
        options = {"shard": f"{shard.index}/{TOTAL}", "max_bad": 1, "workers": 2, **how}
        expected = convert(ConvertOptions(str(folder), str(tmp_path / "b.beton"), overwrite=True, **options))
        assert pair(tmp_path / f"a-{shard.index}.beton") == pair(tmp_path / "b.beton")
        counts = ("images", "copied", "classes", "size", "bad", "warned")
        assert [getattr(done, key) for key in counts] == [getattr(expected, key) for key in counts]
        seen += [*shard.names]
        bad += done.bad
    assert seen == scan_folder(folder).files
    assert bad == [("class 1/11.jpg", "is truncated (a segment runs past the end)")]
    assert len(open_source(str(tmp_path / "a-*.beton"))) == 39


def test_a_missing_image_is_a_bad_one_and_a_reader_that_fails_ends_it(folder, tmp_path):
    shard = plan(folder)[0]

    def read(name: str) -> bytes:
        if name == shard.names[3]:
            raise faults[-1]
        return read_file(str(folder / name))

    faults: list[Exception] = [DecodeError("is not in this bucket")]
    assert convert_shard(shard, read, tmp_path / "a.beton").bad == [(shard.names[3], "is not in this bucket")]
    before = pair(tmp_path / "a.beton")
    for fault, kind, words in (
        (OSError(5, "Input/output error"), ConvertError, rf"{shard.names[3]} cannot be read: Input/output error"),
        (KeyError(shard.names[3]), KeyError, shard.names[3]),
    ):
        faults.append(fault)
        with pytest.raises(kind, match=words):
            convert_shard(shard, read, tmp_path / "a.beton")
    assert pair(tmp_path / "a.beton") == before
    assert len(os.listdir(tmp_path)) == 2
    with pytest.raises(ConvertError, match="up to 1 bad files are skipped") as caught:
        convert_shard(shard, lambda name: b"", tmp_path / "a.beton")
    assert len(caught.value.bad) == len(shard.names)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"total": 3}, "2 images cannot be 3 shards"),
        ({"total": 0}, "2 images cannot be 0 shards"),
        ({"labels": [0]}, "2 images need a label each"),
        ({"labels": [0, 2]}, r"2 images need a label each, from -1 \(none\) to 1"),
    ],
)
def test_plans_that_cannot_be(how, words):
    with pytest.raises(ConvertError, match=words):
        shards_of(**{"names": ["a", "b"], "labels": [0, 1], "classes": ["x", "y"], **how})


def test_a_file_goes_to_a_store_whole_and_after_its_side_file(folder, tmp_path, monkeypatch):
    shard, sent = plan(folder)[1], []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    real = store.put
    monkeypatch.setattr(store, "put", lambda file, url: (sent.append(url), real(file, url)))
    url = "memory://bucket/a b/train-1.beton"
    done = convert_shard(shard, lambda name: read_file(str(folder / name)), url)
    assert sent == [f"{url}.npz", url]
    options = {"shard": "1/3", "max_bad": 1, "workers": 1}
    expected = convert(ConvertOptions(str(folder), str(tmp_path / "b.beton"), **options))
    memory = fsspec.filesystem("memory")
    assert [memory.cat_file(f"/bucket/a b/train-1.beton{end}") for end in ("", ".npz")] == pair(tmp_path / "b.beton")
    assert (done.path, done.size) == (url, expected.size)
    assert convert(ConvertOptions(str(folder), url, **options)).there
    for other in ({"shard": "0/3"}, {"shard": ""}, {"max_resolution": 9}):
        with pytest.raises(ConvertError, match=r"train-1\.beton exists already; --overwrite true"):
            convert(ConvertOptions(str(folder), url, **{**options, **other}))

    def refuse(*_):
        raise PermissionError("no writing here")

    monkeypatch.setattr(type(memory), "put_file", refuse)
    with pytest.raises(ConvertError, match=r"other\.beton was not written: .*no writing here"):
        convert_shard(shard, lambda name: read_file(str(folder / name)), "memory://bucket/other.beton")
    assert sorted(os.listdir(tmp_path)) == ["b.beton", "b.beton.npz"]


def test_images_in_a_store_and_in_tars(folder, tmp_path, monkeypatch):
    """From a store the same bytes as from the disk; of a tar the same images, in the tar's order, by its keys."""
    files = [file for file in scan_folder(folder).files if not file.endswith("11.jpg")]
    for file in files:
        fsspec.filesystem("memory").pipe_file(f"/bucket/images/{file}", (folder / file).read_bytes())
    with tarfile.open(tmp_path / "t-0.tar", "w") as tar:
        for k, file in enumerate(files):
            key, ending = os.path.splitext(file)
            for end, data in ((ending, (folder / file).read_bytes()), (".cls", str(k % 2).encode())):
                (facts := tarfile.TarInfo(f"{key}{end}")).size = len(data)
                tar.addfile(facts, io.BytesIO(data))
    options, facts = {"max_resolution": 60, "workers": 2}, store._facts
    convert(ConvertOptions(str(folder), str(tmp_path / "a.beton"), max_bad=1, **options))
    convert(there := ConvertOptions("memory://bucket/images", str(tmp_path / "b.beton"), **options))
    images, _ = convert_module._planned(there)
    monkeypatch.setattr(
        store, "_facts", lambda url, tries=True: pytest.fail("asked once more") if tries else facts(url)
    )
    assert images.read(0, memoryview(b"")) == (folder / files[0]).read_bytes()  # the listing has told size and version
    convert(ConvertOptions(str(tmp_path / "t-*.tar"), str(tmp_path / "c.beton"), **options))
    disk, there, tars = (open_source(str(tmp_path / f"{name}.beton")) for name in "abc")
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()
    assert there.classes == disk.classes
    for i, file in enumerate(files):
        assert disk.read(i).data.tobytes() == tars.read(i).data.tobytes()
        assert tars.name(i).endswith(f"t-0.tar[{i}] {file}")
    assert tars.labels.tolist() == [k % 2 for k in range(39)]
    with pytest.raises(ConvertError, match=r"shard 0/40 cannot be made: .*t-\*\.tar has only 39 images"):
        convert(ConvertOptions(str(tmp_path / "t-*.tar"), str(tmp_path / "d.beton"), shard="0/40"))


@pytest.mark.parametrize(
    ("src", "how", "words"),
    [
        ("memory://nothing/here", {}, "memory://nothing/here does not exist"),
        ("memory://nothing/here", {"split": "train"}, "is no data set by name; split and download are for these"),
        ("none.tar", {}, r"none\.tar does not exist"),
    ],
)
def test_sources_that_cannot_be(tmp_path, src, how, words):
    with pytest.raises(ConvertError, match=words):
        convert(ConvertOptions(src, str(tmp_path / "a.beton"), **how))
    assert not os.listdir(tmp_path)


def test_a_file_that_another_conversion_wrote_meanwhile_is_not_replaced(folder, tmp_path, monkeypatch):
    """Two commands name the same file; the second one's images are others."""
    dst, other = tmp_path / "a.beton", tmp_path / "other"
    shutil.copytree(folder / "class 0", other)
    first = ConvertOptions(str(folder / "class 0"), str(dst), workers=1)
    real = store.exists

    def too_early(path: str) -> bool:
        monkeypatch.setattr(store, "exists", real)
        found = real(path)
        convert(first)
        return found

    monkeypatch.setattr(store, "exists", too_early)
    assert convert(first).images == 20  # the same images: nothing is lost
    dst.unlink()
    (other / "00.png").unlink()
    monkeypatch.setattr(store, "exists", too_early)
    with pytest.raises(ConvertError, match=r"a\.beton was written by another process meanwhile, and holds other im"):
        convert(ConvertOptions(str(other), str(dst), workers=1))
    assert len(open_source(str(dst))) == 20
