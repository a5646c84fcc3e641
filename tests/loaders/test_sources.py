import io
import os
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from fastssl.cli import main
from fastssl.loaders.beton import ARRAY, IMAGE, INT, Beton, Field
from fastssl.loaders.beton_writer import BetonWriter
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.decode import Encoded
from fastssl.loaders.sources import DecodeError, SourceError, decode, list_images, open_source, scan_folder
from fastssl.loaders.views import evaluation_batches
from fastssl.pretraining.identity import identity


def picture(path, height=8, width=12, colour=(200, 100, 50), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path, **options)


def shard(path, labels, classes=("a", "b"), part_of=(0, 1), parts=None) -> None:
    fields = [Field("image", IMAGE), Field("label", INT)]
    fields += [Field("parts", ARRAY, parts, np.dtype("u1"))] if parts else []
    with BetonWriter(path, fields, len(labels)) as writer:
        for k, label in enumerate(labels):
            image = Encoded(np.full(2 * (3 + k) * 3, 10 * k, np.uint8), "raw", 2, 3 + k)
            writer.append(image, label, *([np.full(parts, k, np.uint8)] if parts else []))
        writer.finish(classes, [f"{path.stem}/{k}.png" for k in range(len(labels))], part_of)


# -- folders ---------------------------------------------------------------------------------------------------------


def test_class_folders(tmp_path):
    for name in ("dog/2.JPG", "dog/10.jpeg", "cat/x/deep.png", "cat/a.WebP", "cat/b.TIF"):
        picture(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    picture(tmp_path / "cat" / ".hidden.jpg")
    picture(tmp_path / ".cache" / "x.jpg")
    source = open_source(str(tmp_path))
    assert source.classes == ["cat", "dog", "empty"]
    names = [os.path.relpath(source.name(i), tmp_path) for i in range(len(source))]
    assert names == ["cat/a.WebP", "cat/b.TIF", "cat/x/deep.png", "dog/10.jpeg", "dog/2.JPG"]
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    assert not source.has_parts
    assert source.parts(0) is None
    assert decode(source.read(4)).shape == (8, 12, 3)


def test_flat_folder(tmp_path):
    picture(tmp_path / "b.jpg")
    picture(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    source = open_source(tmp_path)
    assert source.classes == []
    assert source.labels.tolist() == [-1, -1]


def test_sizes_are_upright_and_read_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "0.jpg", 10, 20)
    picture(tmp_path / "1.jpg", 10, 20, exif=exif)
    (tmp_path / "2.jpg").write_bytes(b"")
    source = open_source(str(tmp_path))
    for _ in range(2):
        heights, widths = source.sizes(np.array([2, 1, 0, 1]))
        assert heights.tolist() == [0, 20, 10, 20]
        assert widths.tolist() == [0, 10, 20, 10]
        assert heights.dtype == np.int64
        picture(tmp_path / "0.jpg", 33, 44)  # from now on the size is remembered
    assert decode(source.read(1)).shape == (20, 10, 3)
    with pytest.raises(DecodeError, match="is 33 x 44 pixels, but 10 x 20 were promised"):
        decode(source.read(0))


def test_unreadable_files_raise_when_read(tmp_path):
    (tmp_path / "0.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "1.jpg").write_bytes(b"")
    (tmp_path / "2.jpg").write_text("text")
    source = open_source(str(tmp_path))
    for i, message in enumerate(("cannot be read: No such file", "has zero bytes", "is not an image")):
        with pytest.raises(DecodeError, match=f"^{message}"):
            source.read(i)


# -- .beton ----------------------------------------------------------------------------------------------------------


def test_one_beton(tmp_path):
    shard(tmp_path / "a.beton", [1, 0], parts=(2, 3, 3))
    source = open_source(str(tmp_path / "a.beton"))
    assert (len(source), source.classes, source.labels.tolist(), source.has_parts) == (2, ["a", "b"], [1, 0], True)
    assert [side.tolist() for side in source.sizes(np.array([1, 0, 1]))] == [[2, 2, 2], [4, 3, 4]]
    assert source.name(1) == "a.beton[1] a/1.png"
    assert (decode(source.read(1)) == 10).all()
    assert np.array_equal(source.parts(1), np.ones((2, 3, 3), np.uint8))


def test_shards_are_one_data_set_in_numerical_order(tmp_path):
    for part, k in enumerate((0, 1, 2, 10)):
        names, labels = [str(j) for j in range(11)], [k] * (k + 1)
        shard(tmp_path / f"t-{k}.beton", labels, names, part_of=(part, 4), parts=(1, 2, 2))
    source = open_source(str(tmp_path / "t-*.beton"))
    assert source.labels.tolist() == [0] + [1] * 2 + [2] * 3 + [10] * 11
    assert source.name(3) == "t-2.beton[0] t-2/0.png"
    assert source.read(16).width == 13
    assert [side.tolist() for side in source.sizes(np.array([0, 2, 16]))] == [[2, 2, 2], [3, 4, 13]]
    assert (source.parts(5) == 2).all()
    assert source.has_parts


def test_reading_from_many_threads(tmp_path):
    for k in range(3):
        shard(tmp_path / f"t-{k}.beton", [0] * 20, part_of=(k, 3))
        picture(tmp_path / "folder" / f"{k}.png", 5 + k, 7)
    for path in (tmp_path / "t-*.beton", tmp_path / "folder"):
        source = open_source(str(path))
        wrong = []

        def read(source=source, wrong=wrong) -> None:
            for i in np.random.default_rng().permutation(len(source)):
                height, width = (int(side[0]) for side in source.sizes(np.array([i])))
                if decode(source.read(i)).shape != (height, width, 3):
                    wrong.append(i)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


# -- what cannot be opened -------------------------------------------------------------------------------------------


def test_paths_that_hold_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    (tmp_path / "zero.beton").touch()
    shard(tmp_path / "none.beton", [])
    os.mkfifo(tmp_path / "pipe.beton")
    for path, message in (
        ("pipe.beton", "cannot be read: it is not a regular file"),
        ("gone", "gone does not exist"),
        ("gone-*.beton", r"gone-\*\.beton matches no file"),
        ("empty", r"empty has no images in it; known endings: .*\.bmp"),
        ("text", r"text has no images in it; .*left out: 1 with endings that are not listed \(\.txt 1\): a\.txt"),
        ("text/a.txt", r"a\.txt is no \.beton file"),
        ("zero.beton", "cannot be read: it has zero bytes"),
        ("none.beton", "has no samples"),
    ):
        with pytest.raises(SourceError, match=message):
            open_source(str(tmp_path / path))


def test_folder_of_shards_is_pointed_out(tmp_path):
    shard(tmp_path / "a.beton", [0])
    with pytest.raises(SourceError, match=r"name \.beton shards by a glob"):
        open_source(str(tmp_path))


def test_images_beside_class_folders(tmp_path):
    picture(tmp_path / "cat" / "a.jpg")
    picture(tmp_path / "b.jpg")
    with pytest.raises(SourceError, match=r"has images in sub-folders \(cat/a.jpg\) and directly in it \(b.jpg\)"):
        open_source(str(tmp_path))


def test_shards_that_do_not_belong_together(tmp_path):
    shard(tmp_path / "c-0.beton", [0])
    shard(tmp_path / "c-1.beton", [0], classes=("a", "c"))
    shard(tmp_path / "p-0.beton", [0], parts=(1, 2, 2))
    shard(tmp_path / "p-1.beton", [0], parts=(1, 3, 3))
    for name, what in (("c", "classes"), ("p", "part maps")):
        with pytest.raises(SourceError, match=rf"{name}-0\.beton and .*{name}-1\.beton have different {what}"):
            open_source(str(tmp_path / f"{name}-*.beton"))


def test_a_glob_takes_the_shards_of_one_conversion_alone(tmp_path):
    """Two whole data sets, or shards of two folders that fit by their numbers, are no data set."""
    for name in ("train", "val"):
        for k in range(3):
            picture(tmp_path / name / "a" / f"{name}{k}.png", colour=(k, 0, 0))
        for part in ("", "0/2", "1/2"):
            target = tmp_path / f"{name}{part[:1]}.beton"
            convert(ConvertOptions(str(tmp_path / name), str(target), shard=part, workers=1))
    assert len(open_source(str(tmp_path / "train[01].beton"))) == 3
    (tmp_path / "val0.beton").rename(tmp_path / "train0.beton")
    (tmp_path / "val0.beton.npz").rename(tmp_path / "train0.beton.npz")
    for pattern, first, second in (("[tv]?*[nl].beton", "train", "val"), ("train[01].beton", "train0", "train1")):
        with pytest.raises(
            SourceError, match=rf"{first}\.beton and .*{second}\.beton, which are not shards of the same"
        ):
            open_source(str(tmp_path / pattern))
    assert len(open_source(str(tmp_path / "t*n.beton"))) == 3  # matches one file


def test_missing_shards_are_named(tmp_path):
    for index in (0, 1, 3):
        shard(tmp_path / f"t-{index}.beton", [0], part_of=(index, 5))
    with pytest.raises(SourceError, match=r"t-\*\.beton lacks shard 2, 4 of 5"):
        open_source(str(tmp_path / "t-*.beton"))
    assert len(open_source(str(tmp_path / "t-1.beton"))) == 1
    for index in (2, 4):
        shard(tmp_path / f"t-{index}.beton", [0], part_of=(index, 5))
    assert len(open_source(str(tmp_path / "t-*.beton"))) == 5
    shard(tmp_path / "t-again.beton", [0], part_of=(4, 5))
    with pytest.raises(SourceError, match="matches 6 files, but there are 5 shards"):
        open_source(str(tmp_path / "t-*.beton"))
    shard(tmp_path / "t-again.beton", [0], part_of=(0, 1))
    with pytest.raises(SourceError, match="not shards of the same conversion"):
        open_source(str(tmp_path / "t-*.beton"))


def test_a_side_file_of_another_file_is_refused(tmp_path):
    shard(tmp_path / "a.beton", [0])
    shard(tmp_path / "b.beton", [0, 1])
    os.replace(tmp_path / "b.beton.npz", tmp_path / "a.beton.npz")
    with pytest.raises(SourceError, match="belongs to another file"):
        open_source(str(tmp_path / "a.beton"))


def test_pages_of_shards_follow_each_other(tmp_path):
    for k in range(2):
        shard(tmp_path / f"{k}.beton", [0, 1, 0], part_of=(k, 2))
    pages = open_source(str(tmp_path / "*.beton")).pages()
    assert len(set(pages[:3])) == len(set(pages[3:])) == 1
    assert pages[3] > pages[0]


def test_a_folder_has_no_pages(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(SourceError, match=r"has no pages to read in order \(data.page_window\); convert it to .beton"):
        open_source(str(tmp_path)).pages()


# -- what is left out, and odd names ---------------------------------------------------------------------------------


def test_what_is_left_out_is_counted_and_named_and_links_are_followed_once(tmp_path, caplog):
    data, apart = tmp_path / "data", tmp_path / "apart"
    for name in ("cat/a.JPG", "cat/deep/b.jfif", "cat/c.pgm", ".old/x.jpg", "cat/.ipynb_checkpoints/a.jpg"):
        image = Image.new("L" if name.endswith("pgm") else "RGB", (4, 4))
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(data / name, "PPM" if name.endswith("pgm") else "JPEG")
    picture(apart / "dogs" / "d.png")
    picture(apart / "dogs" / "puppies" / "e.png")
    for name in ("cat/a.jp2", "cat/b.heic", "cat/none", "notes.txt"):
        (data / name).write_text("x")
    (data / "faces").mkdir()
    for link, target in {
        "dog": apart / "dogs",
        "dog again": apart / "dogs",  # a second way
        "cat/up": data,  # a circle
    }.items():
        (data / link).symlink_to(target)
    (apart / "dogs" / "puppies" / "back").symlink_to(apart)
    (data / "self").symlink_to("self")
    found = scan_folder(data)
    assert found.files == ["cat/a.JPG", "cat/c.pgm", "cat/deep/b.jfif", "dog/d.png", "dog/puppies/e.png"]
    assert found.classes == ["cat", "dog", "faces"]
    assert found.labels.tolist() == [0, 0, 0, 1, 1]
    text = found.left_out()
    assert "2 hidden: .old, cat/.ipynb_checkpoints" in text
    assert "5 with endings that are not listed" in text
    assert ".heic 1" in text
    assert ": cat/a.jp2, cat/b.heic, cat/none, ..." in text
    assert "3 linked folders that were read already: cat/up, dog again, dog/puppies/back/dogs" in text
    assert "1 classes without images: faces" in text
    assert list_images(data).files == found.files
    open_source(str(data))
    assert caplog.text.count("left out: ") == 1


def test_names_that_are_not_utf_8_and_hold_terminal_escapes_go_through(tmp_path, capsysbinary):
    name, kind = b"\xff\x1b[31m\n.png".decode("utf-8", "surrogateescape"), b"\xe9=".decode("utf-8", "surrogateescape")
    for k in range(3):
        picture(tmp_path / "in" / kind / f"{k}{name}", colour=(k, 0, 0))
    (tmp_path / "in" / kind / f"bad{name}").write_text("no image")
    beton = tmp_path / b"\xfe.beton".decode("utf-8", "surrogateescape")
    assert main(["convert", str(tmp_path / "in"), str(beton), "--max-bad", "1"]) == 0
    assert main(["verify", str(beton)]) == 0
    for source in (open_source(str(tmp_path / "in")), open_source(str(beton))):
        assert source.classes == [kind]
        assert source.name(0).endswith("\\xe9=/0\\xff\\x1b[31m\\n.png")
        assert {len(batch) for batch in evaluation_batches(source, size=4, resize=4, batch_size=1, ids=[0, 1])} == {1}
        identity(source)
        source.fingerprint()
    printed = b"".join(capsysbinary.readouterr())
    assert b"\x1b[31m" not in printed
    assert b"\\xe9=/bad\\xff\\x1b[31m\\n.png is not an image" in printed


# -- side files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["gone", "cut", "flipped", "bomb", "gone while open", "cut while open"])
@pytest.mark.parametrize("sharded", [False, True])
def test_without_its_side_file_a_beton_goes_by_numbers_with_one_warning(tmp_path, caplog, capsys, fate, sharded):
    for k in range(2):
        shard(tmp_path / f"{k}.beton", [0, 1, 1], part_of=(k, 2) if sharded else (0, 1))
    path = str(tmp_path / ("*.beton" if sharded else "0.beton"))
    before, side = identity(open_source(path)), tmp_path / "0.beton.npz"
    open_now = open_source(path) if "open" in fate else None
    data = side.read_bytes()
    if "gone" in fate:
        side.unlink()
    elif fate == "bomb":  # more in memory than on disk
        with zipfile.ZipFile(side, "w", zipfile.ZIP_DEFLATED) as archive:
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 22,)})
            for name in ("file", "classes", "crc32", "names"):
                archive.writestr(f"{name}.npy", header.getvalue() + bytes(1 << 22))
    else:
        side.write_bytes(data[: len(data) // 2] if "cut" in fate else data[:300] + bytes([data[300] ^ 1]) + data[301:])
    source = open_now or open_source(path)
    for i in (0, 1):
        assert source.name(i).startswith(f"0.beton[{i}]")
        source.read(i)
    assert identity(source) == before
    assert source.classes == (["a", "b"] if sharded or open_now else [])
    assert len(caplog.records) == 1
    assert main(["verify", path]) == (0 if "gone" in fate else 1)
    text = capsys.readouterr().out
    assert "0.beton has no checksums" in text if "gone" in fate else "has a side file that cannot be used" in text


def test_the_right_data_and_no_other(tmp_path):
    shard(tmp_path / "a.beton", [0, 1])
    other = (tmp_path / "a.beton").read_bytes()
    opened = Beton(tmp_path / "a.beton")
    at = int(opened.rows["f0"]["data_ptr"][1]) + 3
    (tmp_path / "b.beton").write_bytes(other[:at] + bytes([other[at] ^ 8]) + other[at + 1 :])
    assert identity(open_source(str(tmp_path / "a.beton"))) != identity(open_source(str(tmp_path / "b.beton")))
