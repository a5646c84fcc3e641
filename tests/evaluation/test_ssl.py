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
from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.ssl import SSLOptions, evaluate_ssl
from fastssl.loaders.masks import add_masks
from fastssl.methods import METHODS, view_list
from fastssl.parse import parse_pretrain
from fastssl.step import Values
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint, CheckpointError

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
    saved = Checkpoint("pretrain", config.as_dict(), method.state_dict(), method.backbone_prefix, step=3)
    saved.fingerprint = {"method": name, "images_per_step": 10, "steps_per_epoch": IMAGES // 10, "images": IMAGES}
    checkpoint.write(path, saved)
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
            batch = Batch(rows, torch.full_like(rows, -1), views=views)
            add_masks(batch, METHODS[name].masks(config), seed=4)
            out = method(augment(batch), Values(2, 8, 2, 4))
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
    saved = checkpoint.read(given["checkpoint"])
    saved.network.pop("student.head.0.bias")
    checkpoint.write(tmp_path / "broken.pt", saved)
    with pytest.raises(CheckpointError, match=r"broken\.pt does not hold a whole sit .*student.head.0.bias"):
        evaluate_ssl(SSLOptions(**{**given, "checkpoint": str(tmp_path / "broken.pt")}))
    saved.config["method"] = "unheard"
    checkpoint.write(tmp_path / "other.pt", saved)
    with pytest.raises(CheckpointError, match="of method 'unheard'; known: "):
        evaluate_ssl(SSLOptions(**{**given, "checkpoint": str(tmp_path / "other.pt")}))
    monkeypatch.setattr(METHODS["sit"], "part_grid", staticmethod(lambda config: {"view1": 4}))
    with pytest.raises(EvaluationError, match=r"method sit needs part maps, and .* has none"):
        evaluate_ssl(SSLOptions(**given))


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_a_whole_import_is_judged_as_a_finished_run(images, tmp_path, name, capsys):
    values = {"method": name, **recipe(name), **SCHEDULE}
    arguments = [f"--{key}={value}" for key, value in values.items()]
    torch.manual_seed(0)
    method = METHODS[name](parse_pretrain([*arguments, f"--data.path={images}"])[0])
    torch.save(METHODS[name].to_official(method.state_dict()), tmp_path / "official.pth")
    assert main(["import", str(tmp_path / "official.pth"), str(tmp_path / "ours.pt"), *arguments]) == 0
    capsys.readouterr()
    command = ["evaluate", "ssl", f"--checkpoint={tmp_path / 'ours.pt'}", f"--data={images}", "--device=cpu", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["images"], found["step"]) == (name, IMAGES, 0)
    assert found["loss"] > 0
