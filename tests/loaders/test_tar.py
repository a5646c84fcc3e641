"""WebDataset tar shards: the batches of the same images in a folder or .beton, and one line for whatever is wrong."""

import fcntl
import gzip
import io
import itertools
import json
import os
import resource
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.cli import main
from fastssl.config import View
from fastssl.evaluation.shared import shared_images
from fastssl.loaders import batch_pool, cache, store, tar
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.engine import make_loader
from fastssl.loaders.loader import Loader
from fastssl.loaders.sources import SourceError, expand, open_betons, open_source
from fastssl.pretraining.identity import identity

VIEWS = [View(name="a", count=2, size=24), View(name="b", size=16, squash=40)]


def encoded(k, kind="JPEG", height=50, **options) -> bytes:
    small = np.random.default_rng(k).integers(0, 256, (9, 12, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((70 - k, height + k), Image.Resampling.BICUBIC).save(buffer, kind, **options)
    return buffer.getvalue()


def pack(path, files, **options):
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w", **options) as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def samples(names, images, first_label=0):
    return [
        file
        for k, (name, image) in enumerate(zip(names, images, strict=True))
        for file in ((name, image), (name.rpartition(".")[0] + ".cls", str(first_label + k // 6).encode()))
    ]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Twelve JPEGs of two classes in a folder, a .beton, and two tars."""
    root = tmp_path_factory.mktemp("data")
    names = [f"{('cat', 'dog')[k // 6]}/{k:02}-ä.jpg" for k in range(12)]
    images = [encoded(k, progressive=k == 3) for k in range(12)]
    for name, image in zip(names, images, strict=True):
        (root / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "folder" / name).write_bytes(image)
    convert(ConvertOptions(str(root / "folder"), str(root / "all.beton"), workers=1))
    files = samples(names, images)
    (root / "tars").mkdir()
    pack(root / "tars/t-9.tar", files[:10], format=tarfile.PAX_FORMAT)
    pack(root / "tars/t-10.tar", files[10:], format=tarfile.GNU_FORMAT)
    (root / "tars/classes.txt").write_text("cat\ndog\n")
    return root


def batches(engine, source, start=0, **options):
    settings = {"batch_size": 3, "seed": 5, "workers": 2, **options}
    with make_loader(engine, source, VIEWS, **settings) as loader:
        return list(loader.epoch(1, start))


def assert_same(mine, other):
    assert len(mine) == len(other) > 0
    for a, b in zip(mine, other, strict=True):
        assert torch.equal(a.id, b.id)
        assert torch.equal(a.label, b.label)
        for name in b.views:
            assert torch.equal(a.box[name], b.box[name])
            assert torch.equal(a.views[name], b.views[name])


@pytest.mark.parametrize("engine", ["ffcv", "reference"])
def test_batches_are_those_of_a_folder_and_of_a_beton(both, engine, monkeypatch):
    source = open_source(f"{both}/tars/t-*.tar")
    wanted = batches("reference", open_source(f"{both}/all.beton"))
    assert_same(batches("reference", open_source(f"{both}/folder")), wanted)
    if engine == "ffcv" and batch_pool.available():  # all by compiled code
        monkeypatch.setattr(Loader, "_fill", None)
    assert_same(batches(engine, source), wanted)
    assert_same(batches(engine, source, start=2), wanted[2:])
    assert_same(batches(engine, source, rank=1, world=2, batch_size=2), batches(engine, source, batch_size=2)[1::2])
    assert source.classes == ["cat", "dog"]
    assert source.name(5) == "t-10.tar[0] cat/05-ä.jpg"
    windowed = [batch.id.tolist() for batch in batches(engine, source, page_window=1)]
    assert sorted(itertools.chain(*windowed)) == list(range(12))


def test_other_kinds_of_images_are_those_of_a_folder(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    images = {"a.png": encoded(1, "PNG"), "b.jpg": encoded(2, exif=turned), "c.webp": encoded(3, "WEBP")}
    images |= {"d.jpg": encoded(4)[:-300], "e.jpeg": b"", "f.jpg": encoded(5)}
    for name, image in images.items():
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(image)
    source, folder = open_source(pack(tmp_path / "x.tar", images.items())), open_source(tmp_path / "folder")
    options = {"batch_size": 6}
    assert_same(batches("ffcv", source, **options), batches("ffcv", folder, **options))
    ids = np.arange(6)
    assert np.array_equal(source.sizes(ids), folder.sizes(ids))
    assert source.labels.tolist() == [-1] * 6


def test_the_order_of_the_names_is_free_and_brace_lists_keep_theirs(both):
    by_glob, by_list = open_source(f"{both}/tars/t-*.tar"), open_source(f"{both}/tars/t-{{9..10}}.tar")
    assert by_glob.labels.tolist() == by_list.labels.tolist() == [0] * 6 + [1] * 6
    assert identity(by_glob) == identity(by_list) != identity(open_source(f"{both}/tars/t-{{10..9}}.tar"))
    assert expand("s3://b/{train,val}-{008..010}.beton")[::4] == ["s3://b/train-008.beton", "s3://b/val-009.beton"]
    assert expand("{9..11}.tar{}") == ["9.tar{}", "10.tar{}", "11.tar{}"]
    with pytest.raises(SourceError, match=r"t-9.tar and .*all.beton: a data set is tars, or .beton files, not both"):
        open_source(f"{both}/{{tars/t-9.tar,all.beton}}")
    with pytest.raises(SourceError, match="more than 1000000 names"):
        expand("{0..999}{0..9999}")


def test_an_index_is_built_once_and_again_for_another_tar(tmp_path, monkeypatch):
    path = pack(tmp_path / "x.tar", samples(["a.jpg", "b.jpg"], [encoded(1), encoded(2)]))
    built = []
    build = tar.build
    monkeypatch.setattr(tar, "build", lambda *arguments: built.append(1) or build(*arguments))
    first = open_source(path)
    assert open_source(path).fingerprint() == first.fingerprint()
    assert built == [1]
    os.utime(path, ns=(0, 0))
    assert open_source(path).fingerprint() == first.fingerprint()
    assert built == [1, 1]
    kept = tmp_path / "x.tar.index.npz"
    assert sorted(os.listdir(tmp_path)) == ["x.tar", "x.tar.index.npz"]
    data = bytearray(kept.read_bytes())
    data[data.index(first.index.crc32.tobytes())] ^= 1
    kept.write_bytes(data)
    open_source(path)
    assert built == [1, 1, 1]


def test_where_nothing_can_be_written_the_index_goes_to_the_cache(tmp_path, monkeypatch, caplog):
    path = pack(tmp_path / "x.tar", [("a.jpg", encoded(1))])
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.tar.index.npz").mkdir()  # stands for a folder that is closed to us
    open_source(path)
    (kept,) = (tmp_path / "cache").glob("*/index.npz")
    stamp = kept.stat().st_mtime_ns
    open_source(path)
    assert kept.stat().st_mtime_ns == stamp
    assert not caplog.messages
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "x.tar"))
    assert len(open_source(path)) == 1
    assert "cannot be kept" in caplog.messages[0]


def test_changed_bytes_are_bad_samples_and_verify_names_them(both, tmp_path, capsys):
    path = tmp_path / "x.tar"
    path.write_bytes((both / "tars/t-9.tar").read_bytes())
    index = open_source(str(path)).index
    data, facts = bytearray(path.read_bytes()), path.stat()
    data[index.begins[1] + index.sizes[1] // 2] ^= 4
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # damage of the disk, not another file
    source = open_source(str(path))
    with make_loader("ffcv", source, VIEWS, batch_size=5, seed=1, workers=2) as loader:
        list(loader.epoch(0))
        ((i, name, reason),) = loader.bad
    assert (i, name) == (1, "x.tar[1] cat/01-ä.jpg")
    assert reason.startswith("has a wrong checksum")
    assert main(["verify", str(path), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "5 samples in 1 file: 1 problem" in out
    assert "x.tar[1] cat/01-ä.jpg has a wrong checksum" in out


def test_labels(tmp_path):
    image = encoded(1)
    files = [("a.jpg", image), ("a.cls", b"7\n"), ("a.json", b'{"label": 3}'), ("b.JPG", image)]
    files += [("b.json", json.dumps({"class": 2}).encode()), ("c.input.png", encoded(1, "PNG"))]
    files += [("c.json", b'{"label": "cat"}'), ("d.txt", b"no image"), ("__meta__/x.json", b"{}"), (".e.jpg", b"")]
    source = open_source(pack(tmp_path / "x.tar", files))
    assert source.labels.tolist() == [7, 2, -1]
    assert source.classes == []
    assert (
        source.index.left_out == "left out: 1 hidden or without an ending, 1 samples without an image (.e.jpg, d.txt)"
    )
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(SourceError, match=r"x.tar\[0\] a.jpg has label 7, but there are 2 class names"):
        open_source(tmp_path / "x.tar")


def cut(data, files):
    return data[: 512 + len(files[0][1]) // 2]


WRONG = {
    "is truncated: it ends inside 'a.jpg'": cut,
    "is truncated: it has no end mark": lambda data, files: data[: 1024 * -(-len(data.rstrip(b"\0")) // 1024)][:-512],
    "is no tar, or is truncated or damaged": lambda data, files: b"no tar at all" * 100,
    "is compressed (gzip): no image in it can be read alone; unpack it": lambda data, files: gzip.compress(data),
    "has data behind its end mark": lambda data, files: data + data,
    "has files of sample 'a' in two places": [("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"1")],
    "has 'a.jpg' twice": [("a.jpg", b"x"), ("a.jpg", b"x")],
    "has several images for sample 'a': 'a.seg.png' is one more": [("a.jpg", b"x"), ("a.seg.png", b"x")],
    "has 'a.cls', which is not a class number": [("a.jpg", b"x"), ("a.cls", b"cat")],
    "has 'a.json', which is not JSON": [("a.jpg", b"x"), ("a.json", b"{")],
    "has no images in it (1 samples)": [("a.txt", b"x")],
    "has no images in it (0 samples)": [],
}


@pytest.mark.parametrize("reason", WRONG)
def test_what_is_wrong_is_one_line(tmp_path, reason):
    files = WRONG[reason]
    path = pack(tmp_path / "x.tar", [("a.jpg", encoded(1))] if callable(files) else files)
    if callable(files):
        with open(path, "rb") as file:
            data = file.read()
        with open(path, "wb") as file:
            file.write(files(data, [("a.jpg", encoded(1))]))
    with pytest.raises(SourceError) as caught:
        open_source(path)
    assert f"x.tar {reason}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["x.tar"]


def test_a_damaged_header_in_the_middle_loses_nothing_silently(both, tmp_path):
    data = bytearray((both / "tars/t-10.tar").read_bytes())
    at = data.index(b"dog/08")
    data[at + 150] ^= 0xFF  # its checksum: tarfile would end there as if the tar did
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(SourceError, match=f"x.tar is damaged at byte {at}"):
        open_source(tmp_path / "x.tar")


def test_a_sparse_file_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    os.truncate(tmp_path / "a.jpg", 1 << 20)
    if os.system(f"tar -C {tmp_path} --sparse --format=gnu -cf {tmp_path}/x.tar a.jpg 2>/dev/null"):
        pytest.skip("no GNU tar")
    with pytest.raises(SourceError, match=r"has the sparse file 'a.jpg'"):
        open_source(tmp_path / "x.tar")


def test_images_of_both_sets_are_found(both):
    source = open_source(f"{both}/tars/t-*.tar")
    for other in ("all.beton", "folder", "tars/t-*.tar"):
        assert shared_images(source, open_source(f"{both}/{other}")) == [(k, k) for k in range(12)]


@pytest.fixture
def in_store(both, tmp_path, monkeypatch):
    """The tars in a store, and a list of the ranges that are read of it."""
    files = fsspec.filesystem("memory")
    for name in os.listdir(both / "tars"):
        files.pipe_file(f"/data/{name}", (both / "tars" / name).read_bytes())
    cache.use(str(tmp_path / "cache"))
    reads, read = [], store.StoreFile._read

    def noted(file, begin, end):
        reads.append((file.url, begin, end))
        return read(file, begin, end)

    monkeypatch.setattr(store.StoreFile, "_read", noted)
    yield reads
    cache.use("none")
    files.rm("/data", recursive=True)


@pytest.mark.parametrize("block", [tar.BLOCK, 4096])  # one block each, and several
def test_in_a_store_each_byte_is_fetched_once(both, in_store, block, monkeypatch, tmp_path):
    monkeypatch.setattr(tar, "BLOCK", block)
    url = "memory://data/t-*.tar"
    local, source = open_source(f"{both}/tars/t-*.tar"), open_source(url)
    assert source.in_store
    assert source.name(5) == local.name(5)
    assert (source.fingerprint(), identity(source)) == (local.fingerprint(), identity(local))
    wanted = batches("ffcv", local)
    assert_same(batches("ffcv", source), wanted)
    size = sum(shard.size for shard in source.shards)
    ranges = [r for r in in_store if r[0].endswith(".tar")]
    assert sum(end - begin for _, begin, end in ranges) == size
    in_store.clear()
    assert_same(batches("reference", open_source(url)), wanted)
    assert [r for r in in_store if r[0].endswith(".tar")] == []
    for kept in tmp_path.glob("cache/*/*/*-*"):  # damage of the cache: fetched again
        if "table" not in kept.name:
            kept.write_bytes(bytes(kept.stat().st_size))
    assert_same(batches("ffcv", open_source(url)), wanted)


def test_processes_index_a_tar_in_a_store_together(both, in_store, monkeypatch, tmp_path):
    """One fetches it, the others wait and take its index; one that has been stopped is not waited for."""
    url, first = "memory://data/t-9.tar", store.StoreFile._read

    def slowly(file, begin, end):
        time.sleep(0.2)
        return first(file, begin, end)

    monkeypatch.setattr(store.StoreFile, "_read", slowly)
    with ThreadPoolExecutor(3) as pool:  # each with a lock of its own, as processes have
        found = list(pool.map(tar._make, [url] * 3))
    assert len({index.checksum() for index in found}) == 1
    assert sum(end - begin for _, begin, end in in_store) == (both / "tars/t-9.tar").stat().st_size
    monkeypatch.setenv("FASTSSL_STORE_TIMEOUT", "0.1")
    (kept,) = tmp_path.glob("cache/**/table-index.npz")
    kept.unlink()
    stopped = os.open(kept.parent, os.O_RDONLY)
    fcntl.flock(stopped, fcntl.LOCK_EX)
    assert tar._make(url).checksum() == found[0].checksum()
    os.close(stopped)


def test_shards_may_be_more_than_the_files_that_may_be_open(both, tmp_path):
    open_source(pack(tmp_path / "0.tar", [("a.jpg", encoded(1))]))
    files = {".tar": tmp_path / "0.tar", ".tar.index.npz": tmp_path / "0.tar.index.npz"}
    files |= {f".beton{end}": f"{both}/all.beton{end}" for end in ("", ".npz")}
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 20
    names = [str(tmp_path / f"{k + 1}") for k in range(limit)]
    for name in names:
        for end, file in files.items():
            os.link(file, f"{name}{end}")
    for opened in (tar.open_tars, open_betons):
        ending = ".tar" if opened is tar.open_tars else ".beton"
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
        try:
            assert len(opened([f"{name}{ending}" for name in names])) == limit
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))


def test_without_a_cache_a_store_is_read_all_the_same(both, in_store, caplog):
    cache.use("none")
    source = open_source("memory://data/t-{9..10}.tar")
    assert_same(batches("ffcv", source), batches("ffcv", open_source(f"{both}/tars/t-*.tar")))
    assert "cannot be kept (there is no cache folder)" in caplog.messages[0]
