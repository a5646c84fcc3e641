import io
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.config import ConfigError
from fastssl.loaders.beton import ALLOCATION, ARRAY, HEADER, IMAGE, INT, Beton, Field
from fastssl.loaders.beton_writer import BetonWriter
from fastssl.loaders.decode import Encoded
from fastssl.loaders.verify import WHOLE_FILE, VerifyError, VerifyOptions, verify

FIELDS = [Field("image", IMAGE), Field("label", INT), Field("parts", ARRAY, (1, 2, 2), np.dtype("u1"))]
ROWS = HEADER.itemsize + len(FIELDS) * 1041  # where the metadata rows begin
COUNT = 70  # more than one task of a worker


def make(path, seed=0) -> None:
    rng = np.random.default_rng(seed)
    with BetonWriter(path, FIELDS, COUNT) as writer:
        for i in range(COUNT):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)).save(buffer, "JPEG")
            image = Encoded(np.frombuffer(buffer.getvalue(), np.uint8), "jpg", 16, 24)
            writer.append(image, i, np.full((1, 2, 2), i, np.uint8))
        writer.finish(names=[f"{i}.jpg" for i in range(COUNT)])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "a.beton"
    make(path)
    return path


@pytest.fixture
def damage(good, tmp_path):
    """Copies the good file, with its bytes or its tables changed; returns what verify finds, as text."""

    def run(change, side=True) -> list[str]:
        path = tmp_path / "a.beton"
        data = np.fromfile(good, np.uint8)
        beton = Beton(good)
        rows = data[ROWS : ROWS + beton.rows.nbytes].view(beton.rows.dtype)
        data = change(data, rows, data[beton.data_end :].view(ALLOCATION)) if change else data
        path.write_bytes(data.tobytes())
        Path(f"{path}.npz").unlink(missing_ok=True)
        if side:
            shutil.copy(f"{good}.npz", f"{path}.npz")
        found = [str(problem) for problem in verify(VerifyOptions(str(path), workers=1)).problems]
        return [text.removeprefix(f"{path}").strip() for text in found]

    return run


TABLES = "has a damaged header, metadata or allocation table (their checksum has changed)"


def test_a_good_file(good):
    report = verify(VerifyOptions(str(good), workers=2))
    assert (report.ok, report.files, report.samples, report.problems) == (True, 1, COUNT, [])
    assert "70 samples in 1 file: all good" in report.table()
    assert report.as_dict()["ok"] is True


def test_a_flipped_byte_anywhere_in_the_file(good, damage):
    """Every byte that means something: header, descriptors, rows, data, allocation table."""
    beton = Beton(good)
    begin, end = int(beton.allocations["ptr"].min()), beton.size
    draw = random.Random(0).sample
    tables, rest = range(HEADER.itemsize, beton.tables_end), range(begin, end)
    for place in (*range(0, HEADER.itemsize, 2), *draw(tables, 6), *draw(rest, 6)):

        def flip(data, rows, table, place=place):
            data[place] ^= 1 << place % 8
            return data

        assert damage(flip), place


def test_a_flipped_byte_in_the_data_names_the_sample(damage):
    def flip(data, rows, table):
        data[int(table["ptr"][2 * 65]) + 300] ^= 1  # two pieces per sample: image, parts
        return data

    assert damage(flip) == ["[65] 65.jpg has a wrong checksum: its bytes are not those that were written"]


def test_every_truncation(good, damage):
    size = good.stat().st_size
    for length in (0, 10, HEADER.itemsize, 2000, ROWS + 100, size // 2, size - 24, size - 1):
        found = damage(lambda data, rows, table, length=length: data[:length])
        assert len(found) == 1, length
        assert "truncated" in found[0] or "zero bytes" in found[0] or "too few" in found[0]


def test_a_wrong_pointer(damage):
    def change(data, rows, table):
        rows["f0"]["data_ptr"][3] += 1
        return data

    for side, source in ((True, " 3.jpg"), (False, "")):
        assert damage(change, side)[-1].startswith(f"[3]{source} has a wrong pointer (")


def test_a_pointer_to_another_sample(damage):
    def change(data, rows, table):
        rows["f0"]["data_ptr"][3] = rows["f0"]["data_ptr"][4]
        return data

    found = damage(change)
    assert found[0] == TABLES
    assert found[1] == "[3] 3.jpg points at the bytes of sample 4 (field 'image')"


def test_overlap_outside_and_page_border(damage):
    def change(data, rows, table):
        table["size"][0] += 5
        table["ptr"][7] = rows["f2"][3] = 100
        return data

    found = damage(change)
    assert "[0] 0.jpg has stored bytes that overlap those of another sample" in found
    assert "[3] 3.jpg has stored bytes outside the data region" in found

    def smaller_pages(data, rows, table):
        data[:24].view(HEADER)["page_size"] = 256
        return data

    assert any("cross the border of a page (256 bytes)" in text for text in damage(smaller_pages))


def test_a_size_that_differs_from_the_metadata_without_checksums(damage):
    def change(data, rows, table):
        rows["f0"]["height"][5] = 17
        return data

    assert damage(change, side=False) == ["[5] is 16 x 24 pixels, but 17 x 24 were promised"]


def test_a_file_without_side_file_is_verified_but_said_to_lack_checksums(good, tmp_path):
    shutil.copy(good, tmp_path)
    report = verify(VerifyOptions(str(tmp_path / "a.beton"), workers=1))
    assert report.ok
    assert report.unchecked == [str(tmp_path / "a.beton")]
    assert "has no checksums" in report.table()


def test_the_side_file_of_another_file(good, tmp_path):
    make(tmp_path / "b.beton", seed=1)
    shutil.copy(f"{good}.npz", tmp_path / "b.beton.npz")
    report = verify(VerifyOptions(str(tmp_path / "b.beton"), workers=1))
    assert not report.ok
    assert "belongs to another file" in str(report.problems[0]) or "checksum" in str(report.problems[0])


def test_a_damaged_side_file(good, tmp_path):
    shutil.copy(good, tmp_path)
    (tmp_path / "a.beton.npz").write_bytes(b"garbage")
    problems = verify(VerifyOptions(str(tmp_path / "a.beton"), workers=1)).problems
    assert [problem.index for problem in problems] == [WHOLE_FILE]
    assert "a.beton.npz is damaged" in problems[0].reason


def test_garbage_never_crashes(good, tmp_path):
    """Random damage to the tables, heavy and light: a report each time."""
    rng = np.random.default_rng(0)
    data = np.fromfile(good, np.uint8)
    beton = Beton(good)
    for trial in range(12):
        changed = data.copy()
        places = rng.integers(0, beton.tables_end if trial % 2 else HEADER.itemsize, 1 + 3 * trial)
        changed[places] = rng.integers(0, 256, len(places), np.uint8)
        if trial % 4 == 3:
            changed[:4] = data[:4]
        path = tmp_path / "a.beton"
        path.write_bytes(changed.tobytes())
        shutil.copy(f"{good}.npz", f"{path}.npz")
        if (changed != data).any():
            assert not verify(VerifyOptions(str(path), workers=1, decode=bool(trial % 3))).ok


def test_a_glob_of_files(good, tmp_path):
    for name in ("s-0.beton", "s-1.beton"):
        shutil.copy(good, tmp_path / name)
        shutil.copy(f"{good}.npz", tmp_path / f"{name}.npz")
    (tmp_path / "s-1.beton").write_bytes(b"x")
    report = verify(VerifyOptions(str(tmp_path / "s-*.beton"), workers=2))
    assert (report.files, report.samples, len(report.problems)) == (2, COUNT, 1)
    assert report.problems[0].file.endswith("s-1.beton")
    assert "s-1.beton is no .beton file" in report.table()


@pytest.mark.parametrize("path", ["none.beton", "none-*.beton", ""])
def test_nothing_to_verify(path):
    with pytest.raises(VerifyError, match=r"names no \.beton file"):
        verify(VerifyOptions(path))


def test_options_are_checked():
    with pytest.raises(ConfigError, match="workers is -1"):
        VerifyOptions(workers=-1)
