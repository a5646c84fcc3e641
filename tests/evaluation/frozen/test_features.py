import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastssl.config import Model
from fastssl.evaluation.data import EvaluationError, check_labels, default_resize, open_labelled, spaced_ids
from fastssl.evaluation.frozen import features
from fastssl.evaluation.frozen.features import Features, extract, pixels
from fastssl.loaders.convert import ConvertOptions, convert
from fastssl.loaders.sources import open_source
from fastssl.models import build_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of flat colours, 7 images, sizes varied."""
    root = tmp_path_factory.mktemp("images")
    for i in range(7):
        name = ("blue", "red")[i % 2]
        (root / name).mkdir(exist_ok=True)
        colour = (200 - 5 * i, 30, 40) if name == "red" else (40, 30, 200 - 5 * i)
        Image.new("RGB", (40 + 3 * i, 50 - 2 * i), colour).save(root / name / f"{i}.png")
    return root


class Probe(nn.Module):
    """A backbone whose feature is the mean colour; it draws random numbers and notes what it was given."""

    def __init__(self, fill=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.fill, self.seen = fill, []

    def represent(self, images, blocks=1, mean_patch=False):
        self.seen.append((tuple(images.shape), images.dtype, blocks, mean_patch, torch.is_autocast_enabled("cpu")))
        torch.rand(1), np.random.default_rng().random()
        out = self.dropout(self.norm(images.mean((2, 3)) * self.scale))
        return out if self.fill is None else torch.full_like(out, self.fill)


def test_every_image_once_in_order(folder):
    source, backbone = open_source(str(folder)), Probe()
    got = extract(backbone, source, size=16, resize=20, batch_size=3, workers=2, blocks=2, mean_patch=True)
    assert got.values.shape == (7, 3)
    assert got.values.dtype == torch.float32
    assert got.ids.tolist() == list(range(7))
    assert got.labels.tolist() == source.labels.tolist()
    assert got.classes == ("blue", "red")
    assert [shape for shape, *_ in backbone.seen] == [(3, 3, 16, 16), (3, 3, 16, 16), (1, 3, 16, 16)]
    assert all(rest == [torch.float32, 2, True, False] for _, *rest in backbone.seen)
    red, blue = got.values[got.labels == 1], got.values[got.labels == 0]
    assert (red[:, 0] > blue[:, 0].max()).all()  # the colours arrive, normalised, in RGB order
    assert (red[:, 2] < blue[:, 2].min()).all()


def test_batch_size_does_not_matter(folder):
    source = open_source(str(folder))
    one, all_ = (extract(Probe(), source, size=16, batch_size=b) for b in (1, 100))
    assert torch.allclose(one.values, all_.values)


def test_chosen_ids(folder):
    source = open_source(str(folder))
    whole, part = (extract(Probe(), source, size=16, ids=ids) for ids in (None, np.array([5, 2])))
    assert part.ids.tolist() == [5, 2]
    assert torch.allclose(part.values, whole.values[[5, 2]])
    assert part.labels.tolist() == whole.labels[[5, 2]].tolist()


def test_leaves_no_trace(folder):
    """Modes (also mixed ones), buffers, gradients and random generators stay: training goes on bitwise."""
    backbone = Probe().train()
    backbone.dropout.eval()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    extract(backbone, open_source(str(folder)), size=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert [part.training for part in backbone.modules()] == [True, True, False]
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert backbone.scale.grad is None


def test_what_a_backbone_caches_stays_usable_in_training(folder):
    class Caching(Probe):
        def represent(self, images, blocks=1, mean_patch=False):
            self.cache = images.new_ones(3)
            return super().represent(images)

    backbone = Caching()
    extract(backbone, open_source(str(folder)), size=16)
    (backbone.cache * backbone.scale).sum().backward()
    assert backbone.scale.grad == 3


def test_modes_come_back_after_an_error(folder):
    backbone = Probe(fill=float("nan")).train()
    with pytest.raises(EvaluationError, match="the features of image 0 are not finite"):
        extract(backbone, open_source(str(folder)), size=16, batch_size=1)
    assert len(backbone.seen) == 1  # found at once, not after hours
    assert all(part.training for part in backbone.modules())


def test_low_precision(folder):
    backbone = Probe()
    got = extract(backbone, open_source(str(folder)), size=16, dtype=torch.bfloat16)
    assert backbone.seen[0][-1]  # under autocast
    assert got.values.dtype == torch.float16
    full = extract(Probe(), open_source(str(folder)), size=16)
    assert torch.allclose(got.values.float(), full.values, atol=0.02)


def test_too_large_for_float16_is_an_error(folder):
    with pytest.raises(EvaluationError, match="not finite"):
        extract(Probe(fill=1e6), open_source(str(folder)), size=16, dtype=torch.bfloat16)


def test_pixels(folder):
    source = open_source(str(folder))
    got = pixels(source, size=8)
    assert got.values.shape == (7, 3 * 8 * 8)
    reference = extract(Probe(), source, size=8)
    assert torch.allclose(got.values.view(7, 3, 64).mean(-1) / (1 + 1e-5) ** 0.5, reference.values, atol=1e-5)


def test_default_resize():
    assert [default_resize(size) for size in (32, 64, 96, 224, 384)] == [32, 64, 110, 256, 439]


@pytest.mark.parametrize(("images", "limit"), [(10, 4), (10, 10), (3, 100), (50_000, 7)])
def test_spaced_ids(images, limit):
    ids = spaced_ids(images, limit)
    assert len(set(ids.tolist())) == min(images, limit)
    assert ids[0] == 0
    assert ids.max() < images
    gaps = np.diff(ids)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def table(labels, classes=()):
    labels = torch.tensor(labels, dtype=torch.int64)
    return Features(torch.ones(len(labels), 2), labels, torch.arange(len(labels)), classes)


def test_number_of_classes():
    assert check_labels(table([0, 3]), table([1]), "a", "b") == 4
    assert check_labels(table([0], ("x", "y", "z")), table([1]), "a", "b") == 3


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (table([0]), table([]), "VAL holds no images"),
        (table([-1, -1]), table([0]), "TRAIN has no labels; put the images of each class in a sub-folder"),
        (table([0]), table([0, -1, 1, -1]), "VAL has no label for 2 of 4 images, the first at index 1"),
        (table([0], ("x",)), table([0, 1], ("x",)), "VAL has label 1 at index 1, but only 1 classes"),
        (
            table([0], ("cat", "dog")),
            table([0], ("cat",)),
            "classes differ: TRAIN has 2, VAL has 1; 'dog' is only in TRAIN",
        ),
        (table([0], ("cat",)), table([0], ("cat", "dog")), "VAL has 2, TRAIN has 1; 'dog' is only in VAL"),
        (table([0], ("cat", "dog")), table([0], ("dog", "cat")), "class 0 is 'cat' in TRAIN and 'dog' in VAL"),
    ],
)
def test_data_that_cannot_be_judged(train, val, message):
    with pytest.raises(EvaluationError, match=message):
        check_labels(train, val, "TRAIN", "VAL")


def test_open_labelled_names_key_and_path(folder):
    with pytest.raises(EvaluationError, match=r"val \(.*blue\) has no labels"):
        open_labelled(str(folder), str(folder / "blue"))
    train, val = open_labelled(str(folder), str(folder))
    assert len(train) == len(val) == 7


def test_features_are_finite_even_far_down_the_table():
    values = torch.zeros(70_000, 1)
    values[69_999] = float("inf")
    with pytest.raises(EvaluationError, match="image 69999 are not finite"):
        Features(values, torch.zeros(70_000, dtype=torch.int64), torch.arange(70_000))


# -- kept on disk, shared among processes ------------------------------------------------------------------------------


def small_network(seed=0):
    torch.manual_seed(seed)
    return build_backbone(Model(name="vit_tiny", image_size=32, patch_size=8, width=32, depth=1, heads=2))


def test_kept_features_are_read_again_and_only_for_the_same_weights_data_and_settings(folder, tmp_path, monkeypatch):
    source, network = open_source(str(folder)), small_network()
    how = {"cache": tmp_path / "kept", "size": 32, "batch_size": 4, "workers": 1}
    first = features.extract_cached(network, source, **how)
    assert torch.equal(first.values, features.extract(network, source, size=32, workers=1).values)

    calls = []
    original = features.extract
    monkeypatch.setattr(features, "extract", lambda *a, **k: calls.append(1) or original(*a, **k))
    again = features.extract_cached(small_network(), open_source(str(folder)), **{**how, "batch_size": 8})
    assert calls == []
    for key in ("values", "labels", "ids", "classes"):
        a, b = getattr(first, key), getattr(again, key)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert isinstance(np.load(next((tmp_path / "kept").iterdir()), mmap_mode="r"), np.memmap)

    features.extract_cached(small_network(1), source, **how)
    features.extract_cached(network, source, **how, mean_patch=True)
    features.extract_cached(network, source, **{**how, "size": 16})
    assert len(calls) == 3
    picture = next((folder).rglob("*.png"))
    kept = picture.stat()
    try:
        os.utime(picture, ns=(kept.st_atime_ns, kept.st_mtime_ns + 10))
        features.extract_cached(network, open_source(str(folder)), **how)
    finally:
        os.utime(picture, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert len(calls) == 4
    features.extract_cached(network, source, **{**how, "cache": None})
    assert len(calls) == 5
    assert len(list((tmp_path / "kept").iterdir())) == 5


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def flipped(path):
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)


def other_table(shape, dtype):
    def write(path):
        with open(path, "wb") as file:
            np.save(file, np.ones(shape, dtype))

    return write


def of_other_weights(path):
    [other] = (path.parent / "other").iterdir()
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    "spoil",
    [cut_short, flipped, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"hello"), of_other_weights,
     other_table((3, 5), np.float32), other_table((7, 32), np.float32), other_table((7, 32), object)],
)  # fmt: skip
def test_a_kept_table_that_is_not_this_one_is_computed_again_with_a_line(spoil, folder, tmp_path, capsys):
    source, network = open_source(str(folder)), small_network()
    how = {"size": 32, "batch_size": 4, "workers": 1}
    features.extract_cached(small_network(1), source, cache=tmp_path / "kept/other", **how)
    first = features.extract_cached(network, source, cache=tmp_path / "kept", **how)
    assert first.values.shape == (7, 32)
    [path] = (tmp_path / "kept").glob("*.npy")
    spoil(path)
    for lines in (1, 0):  # the second time it is whole again
        again = features.extract_cached(network, source, cache=tmp_path / "kept", **how)
        assert torch.equal(again.values, first.values)
        assert capsys.readouterr().err.count("computed again") == lines


def test_features_are_known_by_what_no_weight_shows(folder, tmp_path):
    source, how = open_source(str(folder)), {"cache": tmp_path, "size": 32, "batch_size": 4, "workers": 1}
    first, other = small_network(), small_network()
    other.blocks[0].attn.num_heads, other.blocks[0].attn.head_dim = 4, 8
    found = [features.extract_cached(network, source, **how).values for network in (first, other)]
    assert not torch.equal(*found)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_beton_is_known_by_its_checksums(folder, tmp_path):
    first, second = tmp_path / "a.beton", tmp_path / "b.beton"
    for path in (first, second):
        convert(ConvertOptions(str(folder), str(path)))
    assert open_source(first).fingerprint() == open_source(second).fingerprint()
    convert(ConvertOptions(str(folder), str(second), mode="raw", overwrite=True))
    assert open_source(first).fingerprint() != open_source(second).fingerprint()
    Path(f"{first}.npz").unlink()
    lone = open_source(first).fingerprint()
    os.utime(first, ns=(1, 1))
    assert open_source(first).fingerprint() != lone


def test_an_unwritable_folder_is_said_and_costs_nothing_else(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    source, network = open_source(str(folder)), small_network()
    found = features.extract_cached(network, source, cache=tmp_path / "file" / "kept", size=32, batch_size=4, workers=1)
    assert len(found) == len(source)
    assert "features are not kept" in capsys.readouterr().err


def shared(rank, folder, cache):
    source, network = open_source(str(folder)), small_network()
    ids = np.array([5, 1, 6])
    how = {"size": 32, "batch_size": 4, "workers": 1, "shared": True}
    few = features.extract(network, source, ids=np.array([3]), **how)
    return (
        features.extract(network, source, **how),
        features.extract(network, source, ids=ids, **how),
        few,
        features.extract_cached(network, source, cache=cache, **how),
        features.extract_cached(network, source, cache=cache, **how),
    )


def test_processes_share_the_images_and_all_have_the_whole_table(folder, tmp_path, on_processes):
    source, network = open_source(str(folder)), small_network()
    whole = features.extract(network, source, size=32, workers=1)
    assert len(whole) % 2 == 1  # an uneven share
    for everything, some, few, kept, read in on_processes(2, shared, str(folder), tmp_path / "kept"):
        for found in (everything, kept, read):
            torch.testing.assert_close(found.values, whole.values)
            assert torch.equal(found.labels, whole.labels)
            assert torch.equal(found.ids, whole.ids)
        assert some.ids.tolist() == [5, 1, 6]
        torch.testing.assert_close(some.values, whole.values[[5, 1, 6]])
        assert few.ids.tolist() == [3]
