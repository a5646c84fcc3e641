import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.config import Config, Data, Model, Monitor
from fastssl.evaluation.data import EvaluationError
from fastssl.loaders.sources import SourceError
from fastssl.models import build_backbone
from fastssl.pretraining.monitor import KNNMonitor

MODEL = Model(name="vit_tiny", image_size=16, patch_size=8, width=24, depth=2, heads=2, drop_path=0.5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Training and validation images of two classes that differ in colour, and a folder without labels."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, images in (("train", 24), ("val", 12)):
        for i in range(images):
            name = ("day", "night")[i % 2]
            (root / split / name).mkdir(parents=True, exist_ok=True)
            noise = generator.integers(0, 40, (20, 24, 3), dtype=np.uint8)
            picture = noise + np.uint8(180) if name == "day" else noise
            Image.fromarray(picture).save(root / split / name / f"{i}.png")
    return root


def monitor(folders, train="train", val="val", **numbers):
    data = Data(path=str(folders / train), val=str(folders / val) if val else "", batch_size=5)
    config = Config("dino", None, None, data=data, model=MODEL, monitor=Monitor(every=1, **numbers))
    return KNNMonitor(config, device=torch.device("cpu"), dtype=torch.float32, workers=1)


class Broken(torch.nn.Module):
    """A backbone that sees nothing of the image."""

    def represent(self, images, blocks=1, mean_patch=False):
        return torch.ones(len(images), 4)


def test_tells_a_seeing_backbone_from_a_blind_one(folders):
    torch.manual_seed(0)
    seeing = monitor(folders, k=3)
    assert seeing.measure(build_backbone(MODEL)) == 100.0
    assert seeing.measure(Broken()) == 50.0


def test_images_of_val_that_are_in_data_are_said(folders, tmp_path, capsys):
    monitor(folders)
    monitor(folders, val="train")  # each image is judged by the others
    assert capsys.readouterr().err == ""
    shutil.copytree(folders / "train", tmp_path / "val")
    monitor(folders, val=tmp_path / "val")
    assert "monitor: 24 of 24 images of data.val" in capsys.readouterr().err


def test_a_training_run_goes_on_bitwise(folders):
    """One optimizer step after a measurement equals one without it: weights, modes, stochastic depth."""

    def step(measured):
        torch.manual_seed(0)
        backbone = build_backbone(MODEL).train()
        if measured:
            monitor(folders).measure(backbone)
        assert all(part.training for part in backbone.modules())
        optimizer = torch.optim.AdamW(backbone.parameters(), 0.1)
        backbone(torch.randn(8, 3, 16, 16)).square().sum().backward()
        optimizer.step()
        return backbone.state_dict()

    plain, measured = step(False), step(True)
    assert all(torch.equal(plain[key], measured[key]) for key in plain)


def test_measures_evenly_spaced_parts(folders):
    part = monitor(folders, train_images=8, val_images=4)
    assert part.train_ids.tolist() == [0, 3, 6, 9, 12, 15, 18, 21]
    assert part.val_ids.tolist() == [0, 3, 6, 9]
    seen = []

    class Counting(Broken):
        def represent(self, images, blocks=1, mean_patch=False):
            seen.append(len(images))
            return super().represent(images)

    part.measure(Counting())
    assert seen == [5, 3, 4]  # never more than data.batch_size at a time


def test_the_same_images_do_not_find_themselves(folders):
    class ByHeart(torch.nn.Module):
        """A feature of its own for every image: only an image that found itself would be classified right."""

        def represent(self, images, blocks=1, mean_patch=False):
            at = torch.arange(len(images)) + self.begin
            self.begin += len(images)
            return torch.nn.functional.one_hot(at % 24, 24).float()

    same, backbone = monitor(folders, val="train", k=1), ByHeart()
    backbone.begin = 0
    assert same.measure(backbone) <= 50.0


def test_needs_validation_images(folders):
    with pytest.raises(SourceError, match="nowhere does not exist"):
        monitor(folders, val="nowhere")


def test_needs_labels(folders):
    with pytest.raises(EvaluationError, match=r"data.val \(.*day\) has no labels"):
        monitor(folders, val="val/day")
    with pytest.raises(EvaluationError, match=r"data.path \(.*night\) has no labels"):
        monitor(folders, train="train/night")
