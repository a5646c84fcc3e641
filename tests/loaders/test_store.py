"""Data in a store: the batches of the same data on a disk, few requests, faults that pass and faults that do not."""

import errno
import fcntl
import http.server
import os
import re
import shutil
import tarfile
import threading
import time
from contextlib import closing

import fsspec
import numpy as np
import pytest
import stores
import torch
from PIL import Image
from tiny import recipe

from fastssl.cli import main
from fastssl.config import View, redacted
from fastssl.loaders import beton, beton_writer, cache, store, tar
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.engine import make_loader, page_window
from fastssl.loaders.sources import SourceError, open_source
from fastssl.loaders.store import StoreError, StoreFile
from fastssl.pretraining.identity import identity

VIEWS = [View(name="a", count=2, size=16), View(name="b", size=8, jitter_p=0.5, jitter=(0.1, 0.1, 0.1, 0.1))]
PAGE = 1 << 14
IMAGES = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 images of 3 classes as a folder, a .beton of several pages, and three shards; on a disk and in a bucket."""
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beton_writer, "PAGE_SIZE", PAGE)
        patch.setattr(cache, "BLOCK", PAGE)
        patch.setattr(tar, "BLOCK", PAGE)
        patch.setattr(beton, "HEAD", 1 << 10)
        for k in range(IMAGES):
            path = root / "img" / f"c{k % 3}" / f"{k:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = np.random.default_rng(k).integers(0, 256, (40 + k, 60, 3), np.uint8)
            Image.fromarray(small).save(path, quality=90)
        convert(ConvertOptions(src=str(root / "img"), dst=str(root / "one.beton"), workers=1))
        convert(ConvertOptions(src=str(root / "img"), dst=str(root / "raw.beton"), mode="raw", workers=1))
        for k in range(3):
            convert(ConvertOptions(src=str(root / "img"), dst=str(root / f"s-{k}.beton"), shard=f"{k}/3", workers=1))
        with tarfile.open(root / "img.tar", "w") as archive:
            for path in sorted((root / "img").glob("*/*")):
                archive.add(path, str(path.relative_to(root / "img")))
        s3 = stores.Store()
        for key, value in {
            **{"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"},
            **{"AWS_ENDPOINT_URL": s3.url, "FASTSSL_STORE_WAIT": "0.02"},
        }.items():
            patch.setenv(key, value)
        s3.put(root)
        yield root, s3
        s3.close()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """A cache of each test's own, as of a process that has just begun."""
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_manager", None)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / cache.FOLDER


def batches(path, engine="ffcv", start=0, epochs=1, between=lambda number: None, **settings):
    """(ids, labels, views) of each batch; no sample is bad."""
    found = []
    source = open_source(path)
    settings = {"rank": 0, "world": 1, "page_window": 0, "workers": 2, "prefetch": 1, **settings}
    with make_loader(engine, source, VIEWS, batch_size=4, seed=3, on_bad="raise", **settings) as loader:
        for epoch in range(epochs):
            with closing(loader.epoch(epoch, start)) as stream:
                for number, batch in enumerate(stream):
                    between(number)
                    found.append((batch.id, batch.label, *(batch.views[view.name].clone() for view in VIEWS)))
    return found


def assert_equal(mine, other):
    assert len(mine) == len(other) > 0
    assert all(torch.equal(a, b) for one, two in zip(mine, other, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("one.beton", "reference"),
        *((name, "ffcv") for name in ("one.beton", "s-*.beton", "s.shards.json", "img.tar", "img")),
    ],
)
def test_batches_are_those_of_the_same_data_on_a_disk(data, name, engine):
    root, _ = data
    window = 0 if name == "img" else 2
    for settings in ({"epochs": 1 + (name == "one.beton")}, {"start": 2, "rank": 1, "world": 2}):
        here = batches(str(root / name), engine, page_window=window, **settings)
        assert_equal(batches(f"s3://bucket/d/{name}", engine, page_window=window, **settings), here)
    mine, other = open_source(f"s3://bucket/d/{name}"), open_source(str(root / name))
    assert identity(mine) == identity(other)
    assert mine.classes == other.classes
    assert mine.lengths().tolist() == other.lengths().tolist()
    assert (page_window(mine, None), page_window(other, None), page_window(mine, 3)) == (64 * (name != "img"), 0, 3)


def test_processes_that_share_a_cache_fetch_each_block_once(data):
    root, s3 = data
    source, expected = "s3://bucket/d/one.beton", batches(str(root / "one.beton"), page_window=2)

    def read():
        assert_equal(batches(source, page_window=2), expected)
        return "equal"

    s3.log.clear()
    slowly = s3.failing(lambda method, path, bytes_: 0.05 if bytes_ else None)
    with slowly, stores.children(2, read) as results:  # they start together
        assert results == ["equal"] * 2
    read()
    blocks = len(np.unique(open_source(source).block_numbers(np.arange(IMAGES))))
    tables = 4
    assert s3.count("one.beton") == blocks + tables < IMAGES
    assert blocks > 3


@pytest.mark.parametrize(
    ("how", "name"),
    [
        *((how, "one.beton") for how in ("none", "small", "tiny", "full", "gone", "closed", "streams", "cut")),
        *(("damaged", name) for name in ("one.beton", "raw.beton", "img")),
    ],
)
def test_any_cache_gives_the_same_batches(data, own_cache, monkeypatch, caplog, how, name):
    root, _ = data
    expected = batches(str(root / name), epochs=2)
    if how == "none":
        cache.use("none")
    elif how in ("small", "tiny", "streams"):
        monkeypatch.setattr(cache, "MEMORY", 1 << 20 if how == "streams" else PAGE)
        cache.use("", {"small": 40e-6 + 5 * PAGE / 1e9, "tiny": 1e-6, "streams": 5 * PAGE / 1e9}[how])
    elif how == "full":
        write = cache._write

        def full(fd, block):
            if "memfd" not in os.readlink(f"/proc/self/fd/{fd}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(fd, block)

        monkeypatch.setattr(cache, "_write", full)
    elif how == "closed":
        own_cache.parent.joinpath("file").write_text("")
        cache.use(str(own_cache.parent / "file" / "cache"))
    elif how in ("cut", "damaged"):
        batches(f"s3://bucket/d/{name}")
        cache._manager = None
        for file in own_cache.glob("*/[0-9a-f]*"):
            whole = file.read_bytes()
            file.write_bytes(whole[:-9] if how == "cut" else bytes(len(whole)))

    def between(number):
        if how == "gone" and number == 1 and own_cache.exists():
            own_cache.rename(own_cache.parent / "away")

    with caplog.at_level("WARNING"):
        assert_equal(batches(f"s3://bucket/d/{name}", epochs=2, between=between), expected)
    said = [record.getMessage() for record in caplog.records]
    words = {"full": "No space left on device", "gone": "cannot be written", "closed": "Not a directory"}
    assert len(said) == (how in ("tiny", *words)) or how == "streams", said
    assert all(words.get(how, "is full") in line for line in said)
    kept = sum(file.stat().st_size for file in own_cache.glob("*/*"))
    if how in ("small", "tiny", "streams"):
        assert kept <= cache._here().disk.bound
    assert not list(own_cache.glob("*/*.partial"))
    cache._manager = None


def test_other_data_goes_first_and_then_what_takes_turns(data, own_cache, monkeypatch):
    _, s3 = data
    batches("s3://bucket/d/s-*.beton")
    cache._manager = None
    monkeypatch.setattr(cache, "MEMORY", PAGE)
    cache.use("", 0.7 * int(np.ptp(open_source("s3://bucket/d/one.beton").blocks.bounds)) / 1e9)
    batches("s3://bucket/d/one.beton", epochs=2, page_window=2)
    assert {folder.name.split("-")[0] for folder in own_cache.glob("*") if list(folder.glob("*"))} >= {"one.beton"}
    assert not list(own_cache.glob("s-*/[0-9]*"))
    assert int((own_cache / "used").read_text()) == sum(file.stat().st_size for file in own_cache.glob("*/*"))
    before = {file.name: file.stat().st_ino for file in own_cache.glob("one.beton-*/[0-9]*")}
    s3.log.clear()
    batches("s3://bucket/d/one.beton", page_window=2)
    after = {file.name: file.stat().st_ino for file in own_cache.glob("one.beton-*/[0-9]*")}
    stayed = [name for name, number in before.items() if after.get(name) == number]
    assert len(stayed) > 0
    assert 0 < s3.count("one.beton") < len(open_source("s3://bucket/d/one.beton").blocks)


@pytest.fixture
def file():
    """A file of 100 kB in a store, as 10 blocks."""
    fsspec.filesystem("memory").pipe_file("/d/file", os.urandom(100_000))
    yield lambda: cache.Blocks(StoreFile("memory://d/file"), np.arange(0, 100_001, 10_000))
    fsspec.filesystem("memory").rm("/d", recursive=True)


def test_the_cache_removes_only_its_own_files(file, own_cache):
    (own_cache / "folder").mkdir(parents=True)
    (own_cache / "left").mkdir()
    mine = [own_cache.parent / "used", own_cache.parent / "runs", own_cache / "folder" / "last.pt"]
    for path in mine:
        path.write_bytes(b"precious" * 10_000)
    cache.use(str(own_cache.parent), 50e-6)
    blocks = file()
    cache.hold([blocks.block(k) for k in range(10)])
    assert {path.read_bytes() for path in mine} == {b"precious" * 10_000}
    assert not (own_cache / "left").exists()


def test_a_process_that_was_stopped_stops_no_other(file, own_cache, caplog, monkeypatch):
    monkeypatch.setenv("FASTSSL_STORE_TIMEOUT", "0.1")
    blocks, done = file(), []
    partial = own_cache / blocks.folder / f"{blocks.block(3).name}.partial"
    partial.parent.mkdir(parents=True)
    with open(partial, "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(
            target=lambda: done.extend(cache.hold([blocks.block(k) for k in range(10)])), daemon=True
        )
        thread.start()
        thread.join(10)
    assert b"".join(one.read() for one in done) == blocks.file.read_all()
    assert len([line for line in caplog.messages if "another process does not finish" in line]) == 1
    assert len(list(own_cache.glob("*/*0000"))) == 9


def test_what_is_read_in_parts_is_read_ahead(file, monkeypatch):
    monkeypatch.setattr(cache, "AHEAD", 20_000)
    blocks, wanted, want = file(), [], cache._Manager._want
    monkeypatch.setattr(cache._Manager, "_want", lambda manager, block: (wanted.append(block), want(manager, block))[1])
    reading = cache.ahead(10, blocks.block)
    for k in range(10):
        deadline = time.monotonic() + 10
        while cache._here().present(blocks.block(k)) is None and time.monotonic() < deadline:
            time.sleep(0.001)
        blocks.read(10_000 * k + 10, 10_000 * k + 20)
    reading.close()
    assert not wanted


def test_another_cache_lets_the_threads_of_the_old_one_end(file, tmp_path):
    before = threading.active_count()
    for k in range(4):
        cache.use(str(tmp_path / f"{k}"))
        blocks = file()
        cache.hold([blocks.block(k) for k in range(10)])
    cache.use("none")
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


class Hosts(fsspec.AbstractFileSystem):
    """Files that hold the name of their host; no versions."""

    protocol, cachable = "hosts", False

    def __init__(self, host, **options):
        super().__init__(**options)
        self.host = host

    @classmethod
    def _strip_protocol(cls, path):
        user, _, rest = path.rpartition("://")[2].rpartition("@")
        return f"{user}/" * bool(user) + rest.partition("/")[2] if "://" in path else path

    @staticmethod
    def _get_kwargs_from_urls(url):
        return {"host": url.partition("://")[2].rpartition("@")[2].partition("/")[0]}

    def info(self, path, **_):
        return {"name": path, "size": 5, "type": "file"}

    def cat_file(self, path, start=None, end=None, **_):
        return self.host.encode()[start:end]

    def glob(self, path, **_):
        return [path.replace("*", "7")]


def test_two_hosts_of_one_scheme(caplog):
    fsspec.register_implementation("hosts", Hosts, clobber=True)
    for url in ("hosts://one.h/d/x-*", "hosts://two.h/d/x-*", "hosts://box@one.h/d/x-*"):
        (found,) = store.glob(url)
        assert found == url.replace("*", "7")
        assert store.read_bytes(found).decode() == url[-11:-6]
    for _ in range(2):
        cache.hold([cache.Blocks(StoreFile("hosts://one.h/x"), np.array([0, 5])).block(0)])
    (line,) = caplog.messages
    assert "tells no version" in line


@pytest.mark.parametrize(
    ("status", "line"),
    [("400", "answers 400"), ("401", "other credentials"), ("403", "refuses it"), *(("404", ""), ("410", ""))],
)
def test_what_is_refused_is_not_missing(data, caplog, status, line):
    _, s3 = data
    url = "s3://bucket/d/one.beton"
    with s3.failing(lambda method, path, bytes_: status if "one.beton" in path else None):
        if not line:
            assert not store.exists(url)
        else:
            with pytest.raises(StoreError, match=line):
                store.exists(url)
        with pytest.raises(SourceError, match=line or "does not exist"):
            open_source(url)
    with s3.failing(lambda method, path, bytes_: status if path.endswith(".npz") else None):
        if status in ("400", "401"):
            with pytest.raises(SourceError, match=f"one.beton.npz cannot be read: .*{line}"):
                open_source(url)
        else:  # without the right to list, a store refuses what is not there
            assert open_source(url).classes == []
            assert "side file" in caplog.text


@pytest.mark.parametrize("fault", ["503", "cut", "short", 0.2])
def test_a_fault_that_passes_is_not_seen(data, caplog, fault):
    root, s3 = data
    left = [3]

    def fails(method, path, bytes_):
        if not path.endswith("one.beton") or not left[0]:
            return None
        left[0] -= 1
        return fault

    with s3.failing(fails):
        assert_equal(batches("s3://bucket/d/one.beton"), batches(str(root / "one.beton")))
    assert not left[0]


@pytest.mark.parametrize("name", ["one.beton", "img"])
def test_a_file_that_stays_away_ends_the_epoch_and_is_named(data, monkeypatch, name):
    _, s3 = data
    monkeypatch.setenv("FASTSSL_STORE_TRIES", "3")
    source = open_source(f"s3://bucket/d/{name}")
    away = "one.beton" if name == "one.beton" else "07.jpg"
    with (
        s3.failing(lambda method, path, bytes_: "503" if path.endswith(away) else None),
        make_loader("ffcv", source, VIEWS, batch_size=4, seed=3, workers=2) as loader,
        pytest.raises(StoreError) as error,
    ):
        list(loader.epoch(0))
    assert re.fullmatch(rf"s3://bucket/d/\S*{away} cannot be read: tried 3 times; the last time: .*", str(error.value))
    assert "503" in str(error.value)
    assert not loader.bad


def test_closing_waits_for_no_store(data):
    _, s3 = data
    source = open_source("s3://bucket/d/one.beton")
    loader = make_loader("ffcv", source, VIEWS, batch_size=4, seed=3, workers=2)
    ended = []

    def read():
        with pytest.raises(RuntimeError, match="closed while") as error:
            next(loader.epoch(0))
        ended.append(error)

    with s3.failing(lambda method, path, bytes_: 5.0 if bytes_ else None):
        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.2)
        begin = time.monotonic()
        loader.close()
        thread.join()
        assert time.monotonic() - begin < 2
    assert ended


def test_a_file_that_becomes_another_one_is_named(data):
    root, _ = data
    fsspec.filesystem("s3").put_file(str(root / "one.beton"), "bucket/d/changing.beton")
    source = open_source("s3://bucket/d/changing.beton")
    fsspec.filesystem("s3").pipe_file("bucket/d/changing.beton", bytes((root / "one.beton").stat().st_size))
    with pytest.raises(StoreError, match=r"s3://bucket/d/changing.beton is another file now than when it was opened"):
        list(make_loader("ffcv", source, VIEWS, batch_size=4, seed=3).epoch(0))
    file = StoreFile("s3://bucket/d/changing.beton")
    fsspec.filesystem("s3").put_file(str(root / "one.beton"), "bucket/d/changing.beton")
    with pytest.raises(StoreError, match="is another file now"):
        file.read_all()


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("s3://bucket/d/none.beton", "s3://bucket/d/none.beton does not exist"),
        ("s3://nobody/one.beton", "s3://nobody/one.beton does not exist"),
        ("s3://key:se/cret@bucket/d/q*.beton", r"s3://bucket/d/q\*.beton matches no file"),
        ("gs://bucket/x.beton", "gs://bucket/x.beton: gs:// needs a package that is not installed: pip install gcsfs"),
        ("nothing://bucket/x", "nothing://bucket/x: nothing:// is unknown; .*"),
        ("http://127.0.0.1:9/x.beton?sig=secret", "http://127.0.0.1:9/x.beton cannot be read: tried 2 times; .*"),
        (
            "http://u:secret@127.0.0.1:9/x-*.beton",
            "http://127.0.0.1:9/x-.* cannot be listed: the web has no folders; .*",
        ),
    ],
)
def test_what_cannot_be_opened_is_one_line(data, monkeypatch, path, line):
    monkeypatch.setenv("FASTSSL_STORE_TRIES", "2")
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(SourceError, match=line) as error:
        open_source(path)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


class Web(http.server.BaseHTTPRequestHandler):
    """Files of a folder, with ranges and ETags; only with the right signature."""

    root, protocol_version = None, "HTTP/1.1"

    def do_GET(self):
        name, _, query = self.path.partition("?")
        file = self.root / name.lstrip("/")
        if query != "sig=top-secret":
            return self._send(403, b"")
        if not file.is_file():
            return self._send(404, b"")
        whole, etag = file.read_bytes(), f'"{file.stat().st_mtime_ns}"'
        if self.headers.get("If-Match", etag) != etag:
            return self._send(412, b"")
        begin, end = 0, len(whole)
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            begin, end = int(found[1]), int(found[2]) + 1
        self._send(206 if found else 200, whole[begin:end], ETag=etag)

    do_HEAD = do_GET

    def _send(self, status, body, **headers):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def web(data):
    """The data by http://, of a server that asks for a signature."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Web,), {"root": data[0]}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_web(data, web, tmp_path):
    root, _ = data
    assert_equal(batches(f"{web}/one.beton?sig=top-secret"), batches(str(root / "one.beton")))
    for name in ("s-{0..2}.beton", "s.shards.json", "img.tar"):
        assert_equal(batches(f"{web}/{name}?sig=top-secret"), batches(str(root / name)))
    shutil.copy(root / "one.beton", root / "other.beton")
    file = StoreFile(f"{web}/other.beton?sig=top-secret")
    os.utime(root / "other.beton", ns=(1, 1))
    with pytest.raises(StoreError, match=r"other.beton is another file now than when it was opened; start again$"):
        file.read(0, 10)


def test_commands_keep_credentials_to_themselves(data, web, tmp_path, monkeypatch, capfd):
    """A run, its continuation by another signature, and an evaluation; and none of it knows the secrets."""
    root, _ = data
    run, words = tmp_path / "run", ["top-secret", "se/cret", "se%2Fcret"]
    settings = recipe("mae") | {"data.val": "s3://key:se%2Fcret@bucket/d/one.beton", "monitor.every": 1}
    settings |= {"data.batch_size": 8, "run.dir": run, "run.device": "cpu", "schedule.warmup_epochs": 0}

    def pretrain(path, steps, *more):
        line = ["pretrain", "--method", "mae", "--data.path", path, "--run.steps", str(steps), *more]
        line += [f"--{key}={value}" for key, value in settings.items()]
        monkeypatch.setattr("sys.argv", ["fastssl", *line])
        return main(line)

    assert pretrain(f"{web}/one.beton?sig=top-secret", 2) == 0
    assert "shuffled by 64 pages at a time (data.page_window)" in capfd.readouterr().err
    assert pretrain(str(root / "one.beton"), 4) != 0
    assert "data.page_window" in capfd.readouterr().err
    assert pretrain("s3://key:se/cret@bucket/d/one.beton", 3) == 0
    assert main(["verify", f"{web}/one.beton?sig=top-secret"]) == 0
    knn = ["evaluate", "knn", str(run / "last.pt"), "--data", "s3://key:se%2Fcret@bucket/d/one.beton"]
    assert main([*knn, "--val", f"{web}/one.beton?sig=top-secret"]) != 0
    assert main([*knn, "--val", f"{web}/one.beton?sig=top-secret", "--allow_shared", "true", "--ks", "[3]"]) == 0
    screen = capfd.readouterr()
    kept = {
        file: file.read_bytes() for folder in (run, tmp_path / "cache") for file in folder.rglob("*") if file.is_file()
    }
    assert any(b"s3://bucket/d/one.beton" in text for text in kept.values())
    for word in words:
        assert word not in screen.out + screen.err
        assert not [file for file, text in kept.items() if word.encode() in text]


def test_redacted():
    for text, clean in {
        "s3://AK:a/b@bucket/x and https://u@h:80/y?sig=1&x=2": "s3://bucket/x and https://h:80/y",
        "--data.path=s3://b/train-?.beton": "--data.path=s3://b/train-?.beton",
        "s3://b/x?versionId=3": "s3://b/x",
        "http://host:8000/a@b": "http://host:8000/a@b",
        "hdfs://host:8000/a@b": "hdfs://host:8000/a@b",
        "S3://AK:7/secret@bucket/x s3://AK:12/a/b@bucket/*.tar": "S3://bucket/x s3://bucket/*.tar",
        "ftp://u:p@ss@h/x https://u:12/34@h": "ftp://h/x https://u:12/34@h",
        "data (https://u:p@h/x?sig=1) and 1/2?": "data (https://h/x) and 1/2?",
    }.items():
        assert redacted(text) == clean


def test_names():
    assert store.join("https://h/d?sig=1", "a b.beton") == "https://h/d/a%20b.beton?sig=1"
    assert store.join("s3://b/d/", "x") == "s3://b/d/x"
    assert store.folder("s3://b/d/x.json") == "s3://b/d"
    assert store.beside("https://h/x.beton?sig=1", ".npz") == "https://h/x.beton.npz?sig=1"
    assert [store.has_magic(path) for path in ("https://h/x?y", "s3://b/x?", "s3://b/x*")] == [False, True, True]
    assert store.plain("file:///a/b%20c") == "/a/b c"
