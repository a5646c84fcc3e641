"""The oracle of our .beton code is FFCV itself: its Loader reads what we write, we read what its writer writes."""

import gc
import io

import numpy as np
import pytest
from PIL import Image

try:
    import ffcv  # noqa: F401
except ImportError as error:
    pytest.skip(f"ffcv cannot be imported ({error})", allow_module_level=True)

from ffcv import fields as ffcv_fields
from ffcv.fields.basics import FloatDecoder, IntDecoder
from ffcv.fields.bytes import BytesDecoder
from ffcv.fields.ndarray import NDArrayDecoder
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, SimpleRGBImageDecoder
from ffcv.libffcv import imdecode
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader
from ffcv.writer import DatasetWriter

from fastssl.loaders.beton import ARRAY, BYTES, FLOAT, IMAGE, INT, Beton, Field
from fastssl.loaders.beton_writer import BetonWriter
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.decode import Encoded, decode
from fastssl.loaders.sources import open_source
from fastssl.loaders.verify import VerifyOptions, verify

# numba, which FFCV compiles with, complains when its functions are collected
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
COUNT = 12


@pytest.fixture(autouse=True, scope="module")
def collect_compiled_functions():
    yield
    gc.collect()


def smooth(height, width, seed) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def read_all(path, pipelines, os_cache=True) -> dict[str, np.ndarray]:
    """All samples of a file as FFCV's Loader delivers them, in order; the last batch is not full."""
    order = OrderOption.SEQUENTIAL
    loader = Loader(str(path), 5, num_workers=1, order=order, os_cache=os_cache, drop_last=False, pipelines=pipelines)
    batches = [[np.array(column) for column in batch] for batch in loader]
    return {name: np.concatenate(column) for name, column in zip(pipelines, zip(*batches, strict=True), strict=True)}


def as_ffcv(image: Encoded) -> np.ndarray:
    """One image as FFCV's own library decodes it."""
    if image.mode == "raw":
        return image.data.reshape(image.height, image.width, 3)
    pixels = np.zeros((image.height, image.width, 3), np.uint8)
    assert imdecode(image.data.copy(), pixels, image.height, image.width, image.height, image.width) == 0
    return pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve images of two classes; JPEGs in color and gray, progressive, and files that must be re-encoded."""
    root = tmp_path_factory.mktemp("images")
    for k in range(COUNT):
        (root / f"c{k % 2}").mkdir(exist_ok=True)
        image = smooth(48, 64, k)
        if k == 1:
            image = image.convert("L")
        turned = Image.Exif()
        turned[0x0112] = 3
        options = {2: {"progressive": True}, 3: {"exif": turned}, 4: {"subsampling": 0}}.get(k, {})
        image.save(root / f"c{k % 2}" / f"{k:02d}.{'png' if k > 9 else 'jpg'}", **options)
    return root


@pytest.mark.parametrize(
    ("mode", "os_cache"), [("jpg", False), ("raw", True), ("proportion", True)], ids=["jpg-paged", "raw-mapped", "both"]
)
def test_ffcv_loads_what_we_convert(tmp_path, folder, mode, os_cache):
    path = tmp_path / "a.beton"
    convert(ConvertOptions(str(folder), str(path), mode=mode, workers=2))
    source = open_source(str(path))
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    got = read_all(path, pipelines, os_cache)
    assert got["label"].reshape(-1).tolist() == source.labels.tolist() == [0] * 6 + [1] * 6
    for i in range(COUNT):
        image = source.read(i)
        assert np.array_equal(got["image"][i], as_ffcv(image)), i
        ours = decode(image).astype(int)
        if image.mode == "raw":
            assert np.array_equal(got["image"][i], ours)
        else:  # FFCV asks its JPEG library for the fast, less exact transform
            assert np.abs(got["image"][i] - ours).mean() < 1.5
            assert np.abs(got["image"][i] - ours).max() < 16


def test_ffcv_crops_images_of_different_sizes(tmp_path):
    images = [smooth(40 + 3 * k, 90 - 2 * k, k) for k in range(COUNT)]
    with BetonWriter(tmp_path / "a.beton", [Field("image", IMAGE)], COUNT) as writer:
        for image in images:
            writer.append(Encoded(np.array(image).reshape(-1), "raw", image.height, image.width))
        writer.finish()
    write_ffcv(tmp_path / "b.beton", {"image": ffcv_fields.RGBImageField("raw")}, [(np.array(i),) for i in images])
    ours, theirs = (
        read_all(tmp_path / name, {"image": [CenterCropRGBImageDecoder((24, 24), ratio=0.8)]})["image"]
        for name in ("a.beton", "b.beton")
    )
    assert np.array_equal(ours, theirs)


def test_ffcv_reads_every_kind_of_field(tmp_path):
    rng = np.random.default_rng(0)
    parts = rng.integers(0, 256, (COUNT, 3, 7, 7), np.uint8)
    flow = rng.random((COUNT, 2, 5), np.float32)
    fields = [
        Field("score", FLOAT),
        Field("text", BYTES),
        Field("image", IMAGE),
        Field("parts", ARRAY, (3, 7, 7), np.dtype("u1")),
        Field("label", INT),
        Field("flow", ARRAY, (2, 5), np.dtype("<f4")),
    ]
    pixels = rng.integers(0, 256, (COUNT, 6, 9, 3), np.uint8)
    with BetonWriter(tmp_path / "a.beton", fields, COUNT) as writer:
        for k in range(COUNT):
            image = Encoded(pixels[k].reshape(-1), "raw", 6, 9)
            writer.append(k / 3, bytes([k]) * 8, image, parts[k], -k, flow[k])
        writer.finish()
    pipelines = {
        "score": [FloatDecoder()],
        "text": [BytesDecoder()],
        "image": [SimpleRGBImageDecoder()],
        "parts": [NDArrayDecoder()],
        "label": [IntDecoder()],
        "flow": [NDArrayDecoder()],
    }
    got = read_all(tmp_path / "a.beton", pipelines)
    assert np.array_equal(got["score"].reshape(-1), np.arange(COUNT) / 3)
    assert np.array_equal(got["text"], np.arange(COUNT, dtype=np.uint8)[:, None].repeat(8, 1))
    assert np.array_equal(got["image"], pixels)
    assert np.array_equal(got["parts"], parts)
    assert np.array_equal(got["label"].reshape(-1), -np.arange(COUNT))
    assert np.array_equal(got["flow"], flow)


def test_ffcv_reads_samples_larger_than_its_default_page(tmp_path):
    sides = (100, 1700, 100)  # the large one takes 8.7 MB
    images = [np.full((side, side, 3), 50 * k, np.uint8) for k, side in enumerate(sides)]
    with BetonWriter(tmp_path / "a.beton", [Field("image", IMAGE)], 3) as writer:
        for image in images:
            writer.append(Encoded(image.reshape(-1), "raw", *image.shape[:2]))
        writer.finish()
    pipelines = {"image": [CenterCropRGBImageDecoder((8, 8), ratio=1.0)]}
    got = read_all(tmp_path / "a.beton", pipelines, os_cache=False)
    assert [int(value) for value in got["image"][:, 0, 0, 0]] == [0, 50, 100]


def test_headers_and_tables_are_those_of_ffcv(tmp_path):
    """The same raw samples, written by both: equal field descriptors, metadata and positions relative to the data."""
    pixels = [np.full((5, 6 + k, 3), k, np.uint8) for k in range(COUNT)]
    parts = [np.full((2, 3, 3), k, np.uint8) for k in range(COUNT)]
    fields = [Field("image", IMAGE), Field("label", INT), Field("parts", ARRAY, (2, 3, 3), np.dtype("u1"))]
    with BetonWriter(tmp_path / "a.beton", fields, COUNT) as writer:
        for k in range(COUNT):
            writer.append(Encoded(pixels[k].reshape(-1), "raw", 5, 6 + k), k, parts[k])
        writer.finish()
    theirs_fields = {
        "image": ffcv_fields.RGBImageField("raw"),
        "label": ffcv_fields.IntField(),
        "parts": ffcv_fields.NDArrayField(np.dtype("u1"), (2, 3, 3)),
    }
    write_ffcv(tmp_path / "b.beton", theirs_fields, list(zip(pixels, range(COUNT), parts, strict=True)), workers=1)
    ours, theirs = Reader(str(tmp_path / "a.beton")), Reader(str(tmp_path / "b.beton"))
    assert ours.field_descriptors.tobytes() == theirs.field_descriptors.tobytes()
    assert ours.metadata.dtype == theirs.metadata.dtype
    assert ours.metadata.tobytes() == theirs.metadata.tobytes()
    assert ours.alloc_table.tobytes() == theirs.alloc_table.tobytes()
    assert (ours.page_size, ours.num_samples) == (theirs.page_size, theirs.num_samples)


# -- the other direction ---------------------------------------------------------------------------------------------


class Rows:
    def __init__(self, rows: list[tuple]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple:
        return self.rows[i]


def write_ffcv(path, fields, rows, workers=2) -> None:
    DatasetWriter(str(path), fields, num_workers=workers).from_indexed_dataset(Rows(rows), chunksize=2)


@pytest.mark.parametrize("mode", ["jpg", "raw", "proportion"])
def test_we_read_what_ffcv_writes(tmp_path, mode):
    images = [np.array(smooth(30 + k, 50, k)) for k in range(COUNT)]
    parts = [np.full((2, 3, 3), k, np.uint8) for k in range(COUNT)]
    texts = [np.full(1 + 2 * k, k, np.uint8) for k in range(COUNT)]
    fields = {
        "text": ffcv_fields.BytesField(),
        "image": ffcv_fields.RGBImageField(mode, jpeg_quality=95),
        "weight": ffcv_fields.FloatField(),
        "id": ffcv_fields.IntField(),
        "label": ffcv_fields.IntField(),
        "parts": ffcv_fields.NDArrayField(np.dtype("u1"), (2, 3, 3)),
    }
    rows = [(texts[k], images[k], k / 2, 100 + k, k % 3, parts[k]) for k in range(COUNT)]
    write_ffcv(tmp_path / "a.beton", fields, rows)
    beton, source = Beton(tmp_path / "a.beton"), open_source(str(tmp_path / "a.beton"))
    assert [field.name for field in beton.fields] == list(fields)
    assert source.labels.tolist() == [k % 3 for k in range(COUNT)]
    assert (source.classes, source.name(3), source.has_parts) == ([], "a.beton[3]", True)
    assert [side.tolist() for side in source.sizes(np.arange(COUNT))] == [[30 + k for k in range(COUNT)], [50] * COUNT]
    modes = set()
    for k in range(COUNT):
        image = source.read(k)
        modes.add(image.mode)
        difference = np.abs(decode(image).astype(int) - images[k])
        assert difference.mean() <= (0 if image.mode == "raw" else 8)  # JPEG's loss; two different pictures: about 60
        assert np.array_equal(source.parts(k), parts[k])
        assert np.array_equal(beton.stored(k, 0), texts[k])
        assert (beton.rows["f2"][k], beton.rows["f3"][k]) == (k / 2, 100 + k)
    assert modes <= ({"jpg", "raw"} if mode == "proportion" else {mode})
    report = verify(VerifyOptions(str(tmp_path / "a.beton"), workers=2))
    assert report.ok
    assert report.unchecked


def test_shards_may_come_from_ffcv(tmp_path):
    for name in ("s-0", "s-1"):
        rows = [(np.array(smooth(20, 20, k)), k) for k in range(4)]
        fields = {"image": ffcv_fields.RGBImageField("raw"), "label": ffcv_fields.IntField()}
        write_ffcv(tmp_path / f"{name}.beton", fields, rows)
    source = open_source(str(tmp_path / "s-*.beton"))
    assert source.labels.tolist() == [0, 1, 2, 3] * 2
    assert source.name(5) == "s-1.beton[1]"


def test_gray_jpegs_are_copied_because_ffcv_shows_them_in_rgb():
    buffer = io.BytesIO()
    smooth(48, 64, 0).convert("L").save(buffer, "JPEG", quality=95)
    image = Encoded(np.frombuffer(buffer.getvalue(), np.uint8), "jpg", 48, 64)
    pixels = as_ffcv(image)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert np.abs(pixels.astype(int) - decode(image)).max() <= 8
