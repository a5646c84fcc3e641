"""The methods' own losses over a data set: the mean over images, whatever the batch, with nothing left to chance."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import recipe
from torchvision.transforms import v2

from fastssl.augment import augment
from fastssl.batch import Batch
from fastssl.cli import main
from fastssl.config import ConfigError
from fastssl.evaluation import ssl
from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.ssl import SSLOptions, central_batches, central_box, evaluate_ssl
from fastssl.loaders.sources import open_source
from fastssl.methods import METHODS, view_list
from fastssl.parse import parse_pretrain
from fastssl.step import Values
from fastssl.training import checkpoint

IMAGES = 21
SCHEDULE = {"schedule.epochs": 4, "schedule.warmup_epochs": 0}
NAMES = ("dino", "mae", "sit", "sit_v1")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An unlabelled folder of images of all shapes."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(IMAGES):
        height, width = generator.integers(20, 90, 2)
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.png")
    return folder


def save_run(path, images, name, **keys):
    """A checkpoint as a run leaves it, at step 3 of 8."""
    values = {"method": name, "data.path": images, **recipe(name), **SCHEDULE, **keys}
    config, _ = parse_pretrain([f"--{key}={value}" for key, value in values.items()])
    torch.manual_seed(0)
    method = METHODS[name](config)
    fit = {"method": name, "images_per_step": 10, "images": IMAGES}
    content = {"config": config.as_dict(), "fit": fit, "step": 3, "backbone_prefix": method.backbone_prefix}
    checkpoint.save(path, {**content, "method": method.state_dict()})
    return {"checkpoint": str(path), "data": str(images), "workers": 1, "precision": "fp32"}, config, method.eval()


@pytest.mark.parametrize("name", NAMES)
def test_means_over_images_against_plain_batches(images, tmp_path, name):
    given, config, method = save_run(tmp_path / "last.pt", images, name)
    evaluation = evaluate_ssl(SSLOptions(**given, batch_size=8, seed=4))
    files = sorted(images.iterdir())
    sums = {}
    for begin in (0, 8, 16):
        rows = torch.arange(begin, min(begin + 8, IMAGES))
        views = {}
        for view in view_list(config.views):
            central = v2.Compose([v2.Resize(view.size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(view.size)])
            pictures = [np.asarray(central(Image.open(files[i]))) for i in rows]
            pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
            views[view.name] = pixels[:, None].repeat(1, view.count, 1, 1, 1)
        with torch.no_grad():
            out = method(augment(Batch(rows, torch.full_like(rows, -1), views=views)), Values(2, 8, 2, 4))
        for key, value in {"loss": out.loss, **out.metrics}.items():
            sums[key] = sums.get(key, 0) + value.item() * len(rows)
    assert evaluation.values == pytest.approx({key: value / IMAGES for key, value in sums.items()}, rel=1e-5)
    assert next(iter(evaluation.values)) == "loss"


def test_the_value_by_chance_stands_beside_and_knows_the_small_last_batch(images, tmp_path):
    given, *_ = save_run(tmp_path / "last.pt", images, "sit_v1")
    evaluation = evaluate_ssl(SSLOptions(**given, batch_size=8))
    chance = (8 * math.log(15) + 8 * math.log(15) + 5 * math.log(9)) / 21
    assert evaluation.values["contrastive_chance"] == pytest.approx(chance)
    assert evaluation.values["rotation_chance"] == pytest.approx(math.log(4))
    lines = evaluation.table().splitlines()
    assert "sit_v1" in lines[0]
    assert "21 images, 8 at a time" in lines[0]
    (row,) = [line.split() for line in lines if line.split()[:1] == ["contrastive"]]
    assert row == ["contrastive", f"{evaluation.values['contrastive']:.4f}", f"{chance:.4f}"]
    assert "contrastive_chance" not in evaluation.table()


@pytest.mark.parametrize("name", ["sit", "sit_v1"])
def test_nothing_is_left_to_chance(images, tmp_path, name):
    given, *_ = save_run(tmp_path / "last.pt", images, name, **{"model.drop_path": 0.5})
    state = torch.get_rng_state()
    first = evaluate_ssl(SSLOptions(**given)).values
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert evaluate_ssl(SSLOptions(**given)).values == first
    assert evaluate_ssl(SSLOptions(**given, seed=1)).values != first


def test_the_command_prints_json_or_a_table(images, tmp_path, capsys):
    given, *_ = save_run(tmp_path / "last.pt", images, "sit")
    arguments = ["evaluate", "ssl", *(f"--{key}={value}" for key, value in given.items())]
    assert main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["images"] == IMAGES
    assert values["method"] == "sit"
    assert values["loss"] == pytest.approx(values["contrastive"] + values["reconstruction"])
    assert main(arguments) == 0
    assert "reconstruction" in capsys.readouterr().out


def test_central_views_boxes_and_squashed_groups(images):
    config, _ = parse_pretrain(["--method=saae", f"--data.path={images}"])
    views = view_list(config.views)
    for view in views:
        view.size, view.squash = 16, 16
    views[0].squash, views[0].count = 0, 2
    batches = list(central_batches(open_source(str(images)), views, {}, 6, 1))
    assert [len(batch) for batch in batches] == [6, 6, 6, 3]
    assert torch.cat([batch.id for batch in batches]).tolist() == list(range(IMAGES))
    batch, image = batches[0], Image.open(sorted(images.iterdir())[2])
    plain, squashed = (batch.views[view.name][2] for view in views[:2])
    assert plain.shape == (2, 3, 16, 16)
    assert torch.equal(plain[0], plain[1])
    whole = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(squashed[0].permute(1, 2, 0).numpy(), whole)
    assert batch.box[views[1].name][2].tolist() == [[0, 0, 1, 1]]
    side = min(image.height, image.width)
    top, left = (image.height - side) / 2 / image.height, (image.width - side) / 2 / image.width
    expected = [top, left, side / image.height, side / image.width]
    assert batch.box[views[0].name][2, 1].tolist() == pytest.approx(expected)
    assert not any(flip.any() for flip in batch.flip.values())


def test_box_of_a_larger_view():
    assert central_box(512, 256, 224).tolist() == pytest.approx([0.28125, 0.0625, 0.4375, 0.875])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": ""}, "checkpoint is empty; name a checkpoint with --checkpoint"),
        ({"data": ""}, "data is empty; name images with --data"),
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_unusable_options(change, message):
    with pytest.raises(ConfigError, match=message):
        SSLOptions(**{"checkpoint": "a", "data": "b", **change})


def test_a_checkpoint_that_does_not_fit(images, tmp_path, monkeypatch):
    given, *_ = save_run(tmp_path / "last.pt", images, "sit")
    content = checkpoint.load(given["checkpoint"])
    content["method"].pop("student.head.0.bias")
    checkpoint.save(tmp_path / "broken.pt", content)
    with pytest.raises(EvaluationError, match=r"broken\.pt does not fit its method"):
        evaluate_ssl(SSLOptions(**{**given, "checkpoint": str(tmp_path / "broken.pt")}))
    content["config"]["method"] = "unheard"
    checkpoint.save(tmp_path / "other.pt", content)
    with pytest.raises(EvaluationError, match="of method 'unheard'; known: "):
        evaluate_ssl(SSLOptions(**{**given, "checkpoint": str(tmp_path / "other.pt")}))
    monkeypatch.setattr(ssl.METHODS["sit"], "part_grid", staticmethod(lambda config: {"view1": 4}))
    with pytest.raises(EvaluationError, match=r"method sit needs part maps, and .* has none"):
        evaluate_ssl(SSLOptions(**given))
