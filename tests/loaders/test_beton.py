import contextlib
import errno
import fcntl
import io
import os
import zlib

import numpy as np
import pytest
from PIL import Image

from fastssl.loaders import beton_writer
from fastssl.loaders.beton import ARRAY, BYTES, FLOAT, HEADER, IMAGE, INT, PAGE_SIZE, Beton, BetonError, Field, SideFile
from fastssl.loaders.beton_writer import BetonWriter, Block, page_for
from fastssl.loaders.decode import DecodeError, Encoded, decode
from fastssl.loaders.verify import VerifyOptions, verify

FIELDS = [
    Field("score", FLOAT),
    Field("image", IMAGE),
    Field("label", INT),
    Field("text", BYTES),
    Field("parts", ARRAY, (2, 3, 3), np.dtype("u1")),
    Field("flow", ARRAY, (4,), np.dtype("<f4")),
]


def samples(count: int) -> list[tuple]:
    rng = np.random.default_rng(0)
    result = []
    for i in range(count):
        pixels = rng.integers(0, 256, (20 + i, 30, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        image = (
            Encoded(pixels.reshape(-1), "raw", 20 + i, 30)
            if i % 2
            else Encoded(np.frombuffer(buffer.getvalue(), np.uint8), "jpg", 20 + i, 30)
        )
        parts, flow = rng.integers(0, 256, (2, 3, 3), np.uint8), rng.random(4, np.float32)
        result.append((i / 7, image, i - 1, b"text" * i, parts, flow))
    return result


def write(path, rows, fields=FIELDS, **side) -> None:
    with BetonWriter(path, fields, len(rows)) as writer:
        for row in rows:
            writer.append(*row)
        writer.finish(**side)


def test_what_is_written_is_read(tmp_path):
    path, rows = tmp_path / "a.beton", samples(5)
    write(path, rows, classes=["cat", "dög"], names=[f"{i}\n.jpg" for i in range(5)])
    beton = Beton(path)
    assert (len(beton), beton.fields, beton.page_size) == (5, FIELDS, PAGE_SIZE)
    assert beton.classes == ["cat", "dög"]
    assert beton.labels.tolist() == [-1, 0, 1, 2, 3]
    assert beton.heights.tolist() == [20, 21, 22, 23, 24]
    assert set(beton.widths) == {30}
    for i, (score, image, _, text, parts, flow) in enumerate(rows):
        got = beton.image(i)
        assert np.array_equal(got.data, image.data)
        assert (got.mode, got.height, got.width) == (image.mode, image.height, image.width)
        assert beton.rows["f0"][i] == score
        assert beton.stored(i, 3).tobytes() == text
        assert np.array_equal(beton.parts(i), parts)
        assert np.array_equal(beton.stored(i, 5).view("<f4"), flow)
        assert beton.name(i) == f"a.beton[{i}] {i}\\n.jpg"
        assert beton.side.crc32[i] == beton.sample_crc32(i)
    assert len(set(beton.allocations["ptr"].tolist())) == 4 * 5  # FFCV looks pieces up by position, even empty ones
    expected = zlib.crc32(rows[2][1].data, zlib.crc32(np.float64(2 / 7).tobytes()))
    assert beton.sample_crc32(2) == zlib.crc32(
        rows[2][5].tobytes(),
        zlib.crc32(rows[2][4], zlib.crc32(b"texttext", zlib.crc32(np.int64(1).tobytes(), expected))),
    )


def test_without_side_file_names_are_indices(tmp_path):
    write(tmp_path / "a.beton", samples(2), names=["x.jpg", "y.jpg"])
    (tmp_path / "a.beton.npz").unlink()
    beton = Beton(tmp_path / "a.beton")
    assert (beton.side, beton.classes, beton.name(1)) == (None, [], "a.beton[1]")


def test_without_source_names(tmp_path):
    write(tmp_path / "a.beton", samples(2))
    assert Beton(tmp_path / "a.beton").name(1) == "a.beton[1]"


def test_same_samples_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.beton", samples(3), names=["x", "y", "z"])
    for ending in (".beton", ".beton.npz"):
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


def test_layout(tmp_path):
    """Data begins on a page; no piece crosses a page, not even one larger than the default page."""
    sides = (1200, 1300, 10, 2500, 1300)  # raw: 4.3, 5.1, 0.0, 18.8, 5.1 MB; pages of 8, 8, 8, 32, 8 MiB
    images = [Encoded(np.full(side * side * 3, k, np.uint8), "raw", side, side) for k, side in enumerate(sides)]
    write(tmp_path / "a.beton", [(image,) for image in images], [Field("image", IMAGE)])
    beton = Beton(tmp_path / "a.beton")
    assert beton.page_size == 32 << 20
    begins, sizes = (beton.allocations[key].astype(int).tolist() for key in ("ptr", "size"))
    assert begins[0] == PAGE_SIZE
    for begin, size in zip(begins, sizes, strict=True):
        assert begin // page_for(size) == (begin + size - 1) // page_for(size)
    assert all(begins[k + 1] >= begins[k] + sizes[k] for k in range(4))
    assert beton.allocations["sample_id"].tolist() == [0, 1, 2, 3, 4]
    for k, image in enumerate(images):
        assert np.array_equal(decode(beton.image(k)), image.data.reshape(image.height, image.width, 3))


def test_pages_grow_with_the_sample():
    assert [page_for(size) for size in (0, 1, PAGE_SIZE, PAGE_SIZE + 1, 1 << 31)] == [
        PAGE_SIZE,
        PAGE_SIZE,
        PAGE_SIZE,
        2 * PAGE_SIZE,
        1 << 31,
    ]
    with pytest.raises(BetonError, match="a sample of 2147483649 bytes does not fit"):
        page_for((1 << 31) + 1)


def test_positions_beyond_four_gigabytes():
    block = Block([Field("image", IMAGE)], [(Encoded(np.zeros(3, np.uint8), "raw", 1, 1),)])
    assert block.place(5 << 32) == (5 << 32) + 3
    assert block.rows["f0"]["data_ptr"] == 5 << 32


def test_empty_file(tmp_path):
    write(tmp_path / "a.beton", [])
    assert len(Beton(tmp_path / "a.beton")) == 0


def test_nothing_stays_when_the_writer_is_left_early(tmp_path):
    class Stop(Exception):
        pass

    def run() -> None:
        with BetonWriter(tmp_path / "a.beton", FIELDS, 2) as writer:
            writer.append(*samples(1)[0])
            assert os.listdir(tmp_path) == [writer.partial.name]
            raise Stop

    with pytest.raises(Stop):
        run()
    assert os.listdir(tmp_path) == []


def test_an_unfinished_attempt_is_replaced_and_reported(tmp_path):
    (tmp_path / "a.beton.partial").write_bytes(b"x" * (PAGE_SIZE + 100))
    with BetonWriter(tmp_path / "a.beton", FIELDS, 1) as writer:
        assert writer.restarted
        writer.append(*samples(1)[0])
        writer.finish()
    write(tmp_path / "b.beton", samples(1))
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.beton", "a.beton.npz", "b.beton", "b.beton.npz"]


@pytest.mark.parametrize("locks", [True, False])
def test_writers_of_one_file_do_not_disturb_each_other(tmp_path, monkeypatch, locks):
    """Both write all of it and leave a whole pair; the second begins before the first ends, and ends last."""

    def no_lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_lock)
    path, rows = tmp_path / "a.beton", samples(3)
    write(tmp_path / "b.beton", rows)
    whole = [(tmp_path / name).read_bytes() for name in ("b.beton", "b.beton.npz")]
    with BetonWriter(path, FIELDS, 3) as first, BetonWriter(path, FIELDS, 3) as second:
        assert not second.restarted
        for row in rows:
            first.append(*row)
            second.append(*row)
        for writer in (first, second):
            writer.finish()
            assert [path.read_bytes(), SideFile.path_of(path).read_bytes()] == whole
    assert len(os.listdir(tmp_path)) == 4


def test_a_file_that_was_removed_before_it_was_locked_is_not_written_into(tmp_path, monkeypatch):
    """Another writer takes a new file without a lock for a dead one's."""
    real = fcntl.flock

    def too_late(file: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        for partial in tmp_path.iterdir():
            partial.unlink()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with BetonWriter(tmp_path / "a.beton", FIELDS, 1) as writer:
        writer.append(*samples(1)[0])
        writer.finish()
    assert sorted(os.listdir(tmp_path)) == ["a.beton", "a.beton.npz"]


@pytest.mark.parametrize(
    ("fields", "row", "message"),
    [
        ([Field("a name of 17 char", INT)], (1,), "must have 1 to 16 ASCII characters"),
        ([Field("", INT)], (1,), "must have 1 to 16 ASCII characters"),
        ([Field("p", ARRAY, (2, 2), np.dtype("u1"))], (np.zeros((2, 3), np.uint8),), r"takes uint8 \(2, 2\), not"),
        ([Field("p", ARRAY, (2, 2), np.dtype("u1"))], (np.zeros((2, 2), np.int8),), r"not int8 \(2, 2\)"),
    ],
)
def test_what_cannot_be_written(tmp_path, fields, row, message):
    with pytest.raises(BetonError, match=message):
        write(tmp_path / "a.beton", [row], fields)
    assert not (tmp_path / "a.beton").exists()


def test_more_samples_than_capacity(tmp_path):
    def run() -> None:
        with BetonWriter(tmp_path / "a.beton", FIELDS, 1) as writer:
            for row in samples(2):
                writer.append(*row)
            writer.finish()

    with pytest.raises(BetonError, match="2 samples were added, but capacity is 1"):
        run()


def test_folder_that_does_not_exist(tmp_path):
    with pytest.raises(BetonError, match="cannot be written: No such file or directory"):
        BetonWriter(tmp_path / "none" / "a.beton", FIELDS, 1)


def test_damaged_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "a.beton"
    write(path, samples(2))
    (tmp_path / "a.beton.npz").unlink()
    good = path.read_bytes()

    def header(**values) -> bytes:
        changed = np.frombuffer(good[: HEADER.itemsize], HEADER).copy()
        for key, value in values.items():
            changed[key] = value
        return changed.tobytes() + good[HEADER.itemsize :]

    def descriptor(index: int, at: int, data: bytes) -> bytes:
        begin = HEADER.itemsize + 1041 * index + at
        return good[:begin] + data + good[begin + len(data) :]

    for data, message in (
        (b"", "cannot be read: it has zero bytes"),
        (b"short", "is no .beton file: 5 bytes are too few"),
        (bytes(5000), "is no .beton file of version 2: its header says version 0"),
        (header(num_fields=9000), "9000 fields do not fit"),
        (header(num_samples=1 << 60), "metadata rows do not fit"),
        (header(num_samples=1), "an allocation table of 4 entries should run from byte"),
        (header(table_ptr=1 << 60), "is truncated or has a damaged header: an allocation table of 8 entries"),
        (header(page_size=12345), "page size 12345 is not a power of two"),
        (good[:-1], "is truncated or has a damaged header"),
        (good[: len(good) // 2], "is truncated or has a damaged header"),
        (descriptor(1, 0, b"\xff"), "has a field 'image' of unknown type 255"),
        (descriptor(1, 0, b"\x01"), "an allocation table of 6 entries should run"),
        (descriptor(4, 17 + 264, b"[[[["), "has a damaged description of the array field 'parts'"),
    ):
        path.write_bytes(data)
        with pytest.raises(BetonError, match=message) as caught:
            Beton(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(BetonError, match="cannot be read: No such file"):
        Beton(path)
    write(path, [(1,)], [Field("label", INT)])
    with pytest.raises(BetonError, match=r"has no image field \(fields: label\)"):
        Beton(path)


def test_damaged_rows_are_found_when_read(tmp_path):
    path = tmp_path / "a.beton"
    write(path, samples(3))
    beton = Beton(path)
    beton.rows["f1"]["mode"][0] = 7
    beton.rows["f1"]["data_ptr"][1] += 1
    beton.rows["f1"]["data_ptr"][2] = 0
    for i, message in enumerate(("unknown storage mode 7", "wrong pointer .* for field 'image'", "wrong pointer")):
        with pytest.raises(DecodeError, match=message):
            beton.image(i)
    beton.data_end = 100
    with pytest.raises(DecodeError, match="ends after the stored data"):
        beton.parts(0)


def test_side_files_that_do_not_fit(tmp_path, caplog):
    a, b, side = tmp_path / "a.beton", tmp_path / "b.beton", tmp_path / "a.beton.npz"
    write(a, samples(3))
    write(b, samples(2))
    good = side.read_bytes()

    side.write_bytes((tmp_path / "b.beton.npz").read_bytes())
    with pytest.raises(BetonError, match=r"a\.beton\.npz belongs to another file than"):
        Beton(a).side  # noqa: B018

    for damaged in (b"", b"garbage", good[: len(good) // 2], good[:100] + bytes(50) + good[150:]):
        side.write_bytes(damaged)
        caplog.clear()
        beton = Beton(a)
        assert [(beton.side, beton.classes, beton.name(1)) for _ in range(2)] == [(None, [], "a.beton[1]")] * 2
        assert caplog.text.count("a.beton.npz is damaged") == len(caplog.records) == 1

    side.write_bytes(good)
    data = bytearray(a.read_bytes())
    data[HEADER.itemsize + 6 * 1041 + 8 + 1] ^= 1  # a width
    a.write_bytes(data)
    with pytest.raises(BetonError, match="has a damaged header, metadata or allocation table"):
        Beton(a).side  # noqa: B018
    assert SideFile.of(Beton(a)) is not None


def test_a_file_that_changes_while_it_is_open(tmp_path):
    path = tmp_path / "a.beton"
    write(path, samples(3), names=["a", "b", "c"])
    beton, other = Beton(path), tmp_path / "other.beton"
    whole = [beton.image(i).data.tobytes() for i in range(3)]
    write(other, samples(1))
    other.replace(path)  # the opened file lives on
    assert [beton.image(i).data.tobytes() for i in range(3)] == whole
    write(path, samples(3))
    beton = Beton(path)
    os.truncate(path, beton.allocations["ptr"].max())
    assert beton.image(0).data.tobytes() == whole[0]
    with pytest.raises(DecodeError, match="the file has become shorter since it was opened"):
        beton.stored(2, 5)


def test_pages_of_the_samples(tmp_path):
    path = tmp_path / "a.beton"
    pixels = np.zeros(3 << 20, np.uint8)
    with BetonWriter(path, [Field("image", IMAGE)], 5) as writer:
        for _ in range(5):
            writer.append(Encoded(pixels, "raw", 1024, 1024))
        writer.finish()
    pages = Beton(path).pages
    assert pages.dtype == np.int64
    assert (pages - pages[0]).tolist() == [0, 0, 1, 1, 2]  # two of 3 MiB fit into a page of 8


@pytest.mark.parametrize("renames", [1, 2])
@pytest.mark.parametrize("moment", [0, 1])
def test_two_writers_of_other_images_leave_a_pair(tmp_path, monkeypatch, moment, renames):
    """The second comes just before or after the first gives its .beton its name, and may be stopped halfway."""
    path, moments, renamed = tmp_path / "a.beton", [], []
    real, sync = os.replace, beton_writer._sync_folder

    def replace(*names):
        real(*names)
        renamed.append(names)
        if len(renamed) == renames:
            raise KeyboardInterrupt

    def meanwhile(folder):
        moments.append(folder)
        if len(moments) == moment + 1:
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                patch.setattr(os, "replace", replace)
                patch.setattr(beton_writer, "_sync_folder", sync)
                write(path, samples(4), classes=["second"])

    monkeypatch.setattr(beton_writer, "_sync_folder", meanwhile)
    write(path, samples(3), classes=["first"])
    assert (len(Beton(path)), Beton(path).classes) == ((4, ["second"]) if moment else (3, ["first"]))
    write(path, samples(2), classes=["last"])
    assert (Beton(path).classes, sorted(os.listdir(tmp_path))) == (["last"], ["a.beton", "a.beton.npz"])


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_writer_killed_between_its_renames_leaves_the_old_or_the_new_pair(tmp_path, renames, replaced):
    path = tmp_path / "a.beton"
    if replaced:
        write(path, samples(3), classes=["old"], names=["a", "b", "c"])
    child = os.fork()
    if not child:
        real, left = os.replace, [renames]

        def dying(*names):
            if not left[0]:
                os._exit(0)
            left[0] -= 1
            real(*names)

        os.replace = dying
        write(path, samples(4), classes=["new"], names=["d", "e", "f", "g"])
        os._exit(0)
    os.waitpid(child, 0)
    done = renames > 0
    if not done and not replaced:
        assert not path.exists()
        return
    beton = Beton(path)
    assert (len(beton), beton.classes, beton.name(1)) == (
        (4, ["new"], "a.beton[1] e") if done else (3, ["old"], "a.beton[1] b")
    )
    report = verify(VerifyOptions(str(path), workers=1, decode=False))
    assert (report.ok, report.unchecked) == (True, [])
    write(path, samples(2), classes=["last"], names=["x", "y"])
    assert (Beton(path).classes, sorted(os.listdir(tmp_path))) == (["last"], ["a.beton", "a.beton.npz"])
